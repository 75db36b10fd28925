//! What a repository holds, as far as names and small objects tell. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::OnceLock;

use wal::{Lsn, SegmentName, SegmentSize, TimelineHistory, TimelineId, WalRange};

use super::layout::{BackupId, ObjectName};
use super::records::{BackupRecord, Hole, Tip};
use super::store::Listed;

/// The stored WAL of one timeline.
#[derive(Debug, Clone, Default)]
pub struct TimelineWal {
    /// Complete segments.
    pub segments: BTreeSet<SegmentName>,
    /// Stretches of segments; of a complete one too, until they are removed.
    pub pieces: BTreeMap<SegmentName, BTreeSet<WalRange>>,
    /// What is covered: asked for again and again, of a year's segments.
    covered: OnceLock<(SegmentSize, Vec<WalRange>)>,
}

impl TimelineWal {
    /// The stored stretches, in order, none touching another. Computed once: what is put into the fields
    /// later is not seen.
    pub fn coverage(&self, size: SegmentSize) -> &[WalRange] {
        let (known, coverage) = self
            .covered
            .get_or_init(|| (size, self.compute_coverage(size)));
        debug_assert_eq!(*known, size, "a timeline has one segment size");
        coverage
    }

    fn compute_coverage(&self, size: SegmentSize) -> Vec<WalRange> {
        let segments = self.segments.iter().filter_map(|name| name.range(size));
        let pieces = self.pieces.values().flatten().copied();
        let mut ranges: Vec<WalRange> = segments.chain(pieces).collect();
        ranges.sort_by_key(|range| (range.start, range.end));
        let mut merged: Vec<WalRange> = Vec::new();
        for range in ranges {
            match merged.last_mut() {
                Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
                _ => merged.push(range),
            }
        }
        merged
    }

    /// With these complete segments alone.
    #[cfg(test)]
    pub fn of_segments(segments: impl IntoIterator<Item = SegmentName>) -> Self {
        Self {
            segments: segments.into_iter().collect(),
            ..Self::default()
        }
    }

    /// Up to where WAL is stored without a break from `from` on; `from` itself if nothing is.
    pub fn covered_from(&self, from: Lsn, size: SegmentSize) -> Lsn {
        let coverage = self.coverage(size);
        let begun = coverage.partition_point(|range| range.start <= from);
        let last_begun = coverage.iter().take(begun).next_back();
        let holding = last_begun.filter(|range| from < range.end);
        holding.map_or(from, |range| range.end)
    }

    /// The end of the last stored stretch.
    pub fn end(&self, size: SegmentSize) -> Option<Lsn> {
        self.coverage(size).last().map(|range| range.end)
    }

    /// Whether a segment later than `segment` is stored, whole or in part.
    pub fn has_later_than(&self, segment: SegmentName) -> bool {
        self.segments
            .iter()
            .next_back()
            .is_some_and(|last| *last > segment)
            || self
                .pieces
                .keys()
                .next_back()
                .is_some_and(|last| *last > segment)
    }

    fn add(&mut self, object: &ObjectName) {
        self.covered.take();
        match object {
            ObjectName::Segment(segment) => {
                self.segments.insert(*segment);
            }
            ObjectName::Piece { segment, range } => {
                self.pieces.entry(*segment).or_default().insert(*range);
            }
            _ => {}
        }
    }
}

/// Where the WAL that is stored without a break along a branch ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BranchEnd {
    /// The timeline on which it ends.
    pub timeline: TimelineId,
    /// The position at which it ends.
    pub lsn: Lsn,
}

/// A backup that is there and cannot be read: its record is damaged, its key is gone, it is not
/// sealed where it should be, or its manifest and packs are not all there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeftOut {
    /// The backup.
    pub id: BackupId,
    /// Why it cannot be read.
    pub reason: String,
    /// What to do about it.
    pub hint: Option<String>,
}

impl LeftOut {
    /// How many there are, and why the first of them is one.
    pub fn told(&self, count: usize) -> String {
        match count {
            1 => format!("1 backup cannot be read: {}", self.reason),
            _ => format!("{count} backups cannot be read: {}", self.reason),
        }
    }
}

/// The backups of a system, as they are listed.
#[derive(Debug, Clone, Default)]
pub struct ListedBackups {
    /// Those that can be read, oldest first.
    pub readable: Vec<BackupRecord>,
    /// Those that cannot.
    pub left_out: Vec<LeftOut>,
}

/// What one system of a cluster has in one repository.
#[derive(Debug, Clone, Default)]
pub struct Catalog {
    /// The WAL segment size, where any WAL or backup is stored.
    pub segment_size: Option<SegmentSize>,
    /// Stored WAL by timeline.
    pub timelines: BTreeMap<TimelineId, TimelineWal>,
    /// Timeline history files.
    pub histories: BTreeMap<TimelineId, TimelineHistory>,
    /// Finished backups, oldest first.
    pub backups: Vec<BackupRecord>,
    /// Backups that are there and cannot be read, oldest first.
    pub left_out: Vec<LeftOut>,
    /// Where streams last were.
    pub tips: BTreeMap<TimelineId, Tip>,
    /// Of these timelines there is a tip, readable or not: a stream has been there.
    pub streamed: BTreeSet<TimelineId>,
    /// Stretches that were given up, as they were recorded.
    pub holes: Vec<Hole>,
    /// Bytes stored for WAL.
    pub wal_bytes: u64,
    /// Bytes stored for backups.
    pub backup_bytes: u64,
}

impl Catalog {
    /// Takes in a listing of object paths.
    pub fn add_listing(&mut self, listed: &[Listed]) {
        for object in listed {
            match ObjectName::parse(&object.path) {
                Some(name @ (ObjectName::Segment(segment) | ObjectName::Piece { segment, .. })) => {
                    self.wal_bytes = self.wal_bytes.saturating_add(object.bytes);
                    self.timelines
                        .entry(segment.timeline)
                        .or_default()
                        .add(&name);
                }
                Some(
                    ObjectName::Pack { .. }
                    | ObjectName::Manifest(_)
                    | ObjectName::FileList { .. }
                    | ObjectName::Backup(_),
                ) => {
                    self.backup_bytes = self.backup_bytes.saturating_add(object.bytes);
                }
                Some(ObjectName::Tip(timeline)) => {
                    self.streamed.insert(timeline);
                }
                _ => {}
            }
        }
    }

    /// The timelines of which WAL, a history or a backup is stored.
    pub fn stored_timelines(&self) -> BTreeSet<TimelineId> {
        let of_wal = self.timelines.keys().chain(self.histories.keys()).copied();
        let of_backups = self.backups.iter().map(|backup| backup.timeline);
        of_wal.chain(of_backups).collect()
    }

    /// The newest timeline of which anything is known.
    pub fn newest_timeline(&self) -> Option<TimelineId> {
        self.stored_timelines().last().copied()
    }

    /// The history of the branch that ends in `timeline`. A timeline without a stored history has
    /// no known ancestors.
    pub fn branch(&self, timeline: TimelineId) -> TimelineHistory {
        match self.histories.get(&timeline) {
            Some(history) => history.clone(),
            None => TimelineHistory::new_first(timeline),
        }
    }

    /// How far WAL is stored without a break along `branch`, from `from` on `timeline`.
    ///
    /// A fork is passed only where the child's copy of the segment that holds it is stored from
    /// that segment's beginning, since recovery asks for that copy.
    pub fn reach(
        &self,
        branch: &TimelineHistory,
        timeline: TimelineId,
        from: Lsn,
        size: SegmentSize,
    ) -> BranchEnd {
        let mut at = BranchEnd {
            timeline,
            lsn: from,
        };
        let parts = branch.parts();
        for part in parts.iter().skip_while(|part| part.timeline != timeline) {
            let stored = self.timelines.get(&part.timeline);
            let covered = |lsn| stored.map_or(lsn, |wal| wal.covered_from(lsn, size));
            if part.timeline != timeline && covered(size.start_of(at.lsn)) <= at.lsn {
                return at;
            }
            at.timeline = part.timeline;
            let end = covered(at.lsn);
            match part.end {
                Some(fork) if end >= fork => at.lsn = fork,
                _ => {
                    at.lsn = end;
                    return at;
                }
            }
        }
        at
    }

    /// What is missing at the end of a timeline: a stream had found more of it stored.
    pub fn lost_end(&self, timeline: TimelineId, size: SegmentSize) -> Option<WalRange> {
        let tip = self.tips.get(&timeline)?;
        let wal = self.timelines.get(&timeline);
        // where nothing is left, a backup has had what it needs at least
        let backups = self.backups.iter();
        let end = wal.and_then(|wal| wal.end(size)).or_else(|| {
            let of_timeline = backups.filter(|backup| backup.timeline == timeline);
            of_timeline.map(|backup| backup.stop_lsn).max()
        })?;
        (end < tip.lsn).then(|| WalRange::new(end, tip.lsn))
    }

    /// The moment that a stream confirmed for a position at or before `end` on `timeline`.
    pub fn tip_within(&self, end: BranchEnd) -> Option<&Tip> {
        self.tips
            .get(&end.timeline)
            .filter(|tip| tip.lsn <= end.lsn)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn size() -> SegmentSize {
        SegmentSize::from_bytes(MIB).unwrap()
    }

    fn timeline(id: u32) -> TimelineId {
        TimelineId::new(id).unwrap()
    }

    fn wal_of(id: u32, segments: &[u64], pieces: &[(u64, u64)]) -> TimelineWal {
        let name = |lsn: u64| SegmentName::of(timeline(id), Lsn::new(lsn), size());
        let mut wal = TimelineWal::default();
        for segment in segments {
            wal.segments.insert(name(segment * MIB));
        }
        for (start, end) in pieces {
            let range = WalRange {
                start: Lsn::new(*start),
                end: Lsn::new(*end),
            };
            wal.pieces.entry(name(*start)).or_default().insert(range);
        }
        wal
    }

    fn forked(child: TimelineWal) -> (Catalog, TimelineHistory) {
        let history = TimelineHistory::parse(timeline(2), b"1\t0/380000\tno recovery target\n");
        let mut catalog = Catalog::default();
        catalog
            .timelines
            .insert(timeline(1), wal_of(1, &[1, 2, 3, 4], &[]));
        catalog.timelines.insert(timeline(2), child);
        catalog.histories.insert(timeline(2), history.unwrap());
        let branch = catalog.branch(timeline(2));
        (catalog, branch)
    }

    #[test]
    fn a_missing_segment_ends_what_is_covered() {
        let wal = wal_of(
            1,
            &[1, 2, 4],
            &[(5 * MIB, 5 * MIB + 100), (5 * MIB + 50, 5 * MIB + 300)],
        );
        assert_eq!(
            wal.covered_from(Lsn::new(MIB + 7), size()),
            Lsn::new(3 * MIB)
        );
        assert_eq!(
            wal.covered_from(Lsn::new(4 * MIB), size()),
            Lsn::new(5 * MIB + 300)
        );
        assert_eq!(
            wal.covered_from(Lsn::new(3 * MIB), size()),
            Lsn::new(3 * MIB)
        );
        assert_eq!(wal.coverage(size()).len(), 2);
    }

    #[test]
    fn a_branch_goes_on_in_the_child_from_the_fork() {
        let (catalog, branch) = forked(wal_of(2, &[3, 4], &[]));
        let end = catalog.reach(&branch, timeline(1), Lsn::new(MIB), size());
        assert_eq!(
            end,
            BranchEnd {
                timeline: timeline(2),
                lsn: Lsn::new(5 * MIB)
            }
        );
    }

    #[test]
    fn a_branch_stops_at_the_fork_when_the_child_was_not_stored() {
        // recovery would replay the parent beyond the fork and keep rows that were abandoned
        let (catalog, branch) = forked(wal_of(2, &[4], &[]));
        let end = catalog.reach(&branch, timeline(1), Lsn::new(MIB), size());
        assert_eq!(
            end,
            BranchEnd {
                timeline: timeline(1),
                lsn: Lsn::new(0x38_0000)
            }
        );
    }
}
