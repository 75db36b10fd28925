//! What can be restored: which backups serve a branch, and up to which moment.

use jiff::{Timestamp, Unit};
use wal::{
    Body, Lsn, Major, PgTime, Reach, Record, SegmentName, SegmentSize, TimelineHistory, TimelineId,
};

use super::Repository;
use super::catalog::{BranchEnd, Catalog};
use super::records::{BackupRecord, Hole};
use super::walk::{Damage, Ended, Flow, Stretch, TakeRecords, walk};
use crate::error::{Kind, Result};

/// A backup that serves a branch.
#[derive(Debug, Clone, Copy)]
pub struct Candidate<'a> {
    /// The backup.
    pub backup: &'a BackupRecord,
    /// Where the WAL that is stored without a break from the backup on ends.
    pub end: BranchEnd,
}

impl<'a> Candidate<'a> {
    /// The backup, if it lies on the branch and its own WAL is stored whole.
    pub fn of(
        catalog: &Catalog,
        branch: &TimelineHistory,
        backup: &'a BackupRecord,
        size: SegmentSize,
    ) -> Option<Self> {
        match branch.reach(backup.timeline) {
            Reach::NotAncestor => return None,
            Reach::Until(fork) if backup.stop_lsn > fork => return None,
            Reach::Until(_) | Reach::Whole => {}
        }
        // recovery asks for whole segments
        let from = size.start_of(backup.start_lsn);
        let end = catalog.reach(branch, backup.timeline, from, size);
        let end = before_untrusted(catalog, branch, backup, from, end);
        (end.lsn >= backup.stop_lsn).then_some(Self { backup, end })
    }

    /// The latest moment for which every commit up to it is known to be stored, to the microsecond.
    ///
    /// `newest_stamp` is the latest of the commits that were seen; `tip` is whether the stream's
    /// word on the end of what is stored counts.
    pub fn latest(
        &self,
        catalog: &Catalog,
        newest_stamp: Option<Timestamp>,
        tip: bool,
    ) -> Timestamp {
        let confirmed = catalog
            .tip_within(self.end)
            .filter(|_| tip)
            .and_then(|tip| tip.moment);
        let latest = self
            .backup
            .finished_at
            .max(newest_stamp.unwrap_or(Timestamp::MIN));
        floor_micros(latest.max(confirmed.unwrap_or(Timestamp::MIN)))
    }
}

/// The first WAL behind a candidate's end that is stored and cannot be trusted, where that is what
/// ends it.
pub fn untrusted_at(catalog: &Catalog, end: BranchEnd) -> Option<&Hole> {
    let mut holes = catalog.holes.iter();
    holes.find(|hole| hole.unverified && hole.timeline == end.timeline && hole.start == end.lsn)
}

/// The end of what is stored from `from` on and can be trusted: WAL that could not be verified ends a
/// window as a hole does.
fn before_untrusted(
    catalog: &Catalog,
    branch: &TimelineHistory,
    backup: &BackupRecord,
    from: Lsn,
    end: BranchEnd,
) -> BranchEnd {
    let parts = branch.parts();
    for part in parts
        .iter()
        .skip_while(|part| part.timeline != backup.timeline)
    {
        let is_last = part.timeline == end.timeline;
        let stop = if is_last { Some(end.lsn) } else { part.end };
        let untrusted = catalog.holes.iter().filter(|hole| {
            // the segment of a damage is not trusted before it either; minimal WAL is whole, and does no
            // harm where replay begins behind it
            let from = if hole.is_of_minimal_wal() {
                backup.start_lsn
            } else {
                from
            };
            hole.unverified
                && hole.timeline == part.timeline
                && hole.start >= part.start.max(from)
                && stop.is_none_or(|stop| hole.start < stop)
        });
        if let Some(lsn) = untrusted.map(|hole| hole.start).min() {
            return BranchEnd {
                timeline: part.timeline,
                lsn,
            };
        }
        if is_last {
            break;
        }
    }
    end
}

/// What is printed must be reachable, and print has microseconds.
pub fn floor_micros(time: Timestamp) -> Timestamp {
    let floor = jiff::TimestampRound::new()
        .smallest(Unit::Microsecond)
        .mode(jiff::RoundMode::Floor);
    time.round(floor).unwrap_or(time)
}

/// The backups that serve a branch, newest first.
pub fn candidates<'a>(
    catalog: &'a Catalog,
    branch: &TimelineHistory,
    size: SegmentSize,
) -> Vec<Candidate<'a>> {
    let serving = catalog.backups.iter();
    let mut serving: Vec<Candidate<'a>> = serving
        .filter_map(|backup| Candidate::of(catalog, branch, backup, size))
        .collect();
    serving.sort_by(|a, b| {
        let key = |it: &Candidate<'a>| (it.backup.stop_lsn, it.backup.finished_at);
        key(b).cmp(&key(a))
    });
    serving
}

/// The latest moment that a restore reaches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Latest {
    /// The moment.
    pub moment: Timestamp,
    /// The end of the WAL stored for it.
    pub lsn: Lsn,
    /// Whether it may be later: the key to the WAL is not at hand, and what is clear to everybody
    /// gives a lower bound.
    pub is_lower_bound: bool,
}

/// How far a restore from a backup reaches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reached {
    /// The latest moment; `None` where what the backup itself needs cannot be replayed.
    pub latest: Option<Latest>,
    /// What ends it before the end of what is stored: WAL that cannot be read.
    pub damage: Option<Damage>,
}

/// How far a restore from `backup` along `branch` reaches; `None` where the backup does not serve the branch.
///
/// Reads the last stored segments, backwards to the last commit.
pub async fn latest_moment(
    repository: &Repository,
    catalog: &Catalog,
    branch: &TimelineHistory,
    backup: &BackupRecord,
) -> Result<Option<Reached>> {
    let Some(size) = catalog.segment_size else {
        return Ok(None);
    };
    let Some(candidate) = Candidate::of(catalog, branch, backup, size) else {
        return Ok(None);
    };
    let mut end = candidate.end;
    let mut read_to = end.lsn;
    let mut damaged: Option<Damage> = None;
    loop {
        let segment = size.start_of(read_to.saturating_sub(1));
        // what stands before the backup in its segment is not replayed
        let from = segment.max(backup.start_lsn);
        let within = BranchEnd {
            lsn: read_to,
            ..end
        };
        let stretch = Stretch {
            branch,
            size,
            from,
            end: within,
        };
        let walked = match walk(repository, &stretch, None, NewestStamp(None)).await {
            Err(error) if error.kind() == Kind::Usage => {
                tracing::debug!("the latest moment is a lower bound: {}", error.message());
                let latest = Latest {
                    moment: candidate.latest(catalog, None, damaged.is_none()),
                    lsn: end.lsn,
                    is_lower_bound: true,
                };
                return Ok(Some(Reached {
                    latest: Some(latest),
                    damage: damaged,
                }));
            }
            walked => walked?,
        };
        if let Ended::Damaged(damage) = walked.ended {
            // the window ends where WAL cannot be trusted
            end.lsn = damage.at.max(from);
            damaged = Some(damage);
        }
        if end.lsn < backup.stop_lsn {
            return Ok(Some(Reached {
                latest: None,
                damage: damaged,
            }));
        }
        let stamp = walked.taker.0;
        if stamp.is_some() || segment <= size.start_of(backup.stop_lsn) {
            let latest = Latest {
                moment: candidate.latest(catalog, stamp, damaged.is_none()),
                lsn: end.lsn,
                is_lower_bound: false,
            };
            return Ok(Some(Reached {
                latest: Some(latest),
                damage: damaged,
            }));
        }
        read_to = segment;
    }
}

/// The latest stamp of the commits that pass.
struct NewestStamp(Option<Timestamp>);

impl TakeRecords for NewestStamp {
    fn take(&mut self, record: &Record, major: Major) -> Flow {
        if let Ok(Body::Commit(end)) = record.body(major) {
            self.0 = self.0.max(Some(timestamp(end.time)));
        }
        Flow::Continue
    }
}

/// A stamp as a moment; one that no clock shows becomes the nearest that there is.
pub fn timestamp(time: PgTime) -> Timestamp {
    let micros = time.to_unix_micros();
    Timestamp::from_microsecond(micros).unwrap_or(if micros < 0 {
        Timestamp::MIN
    } else {
        Timestamp::MAX
    })
}

/// Whether all that is stored behind a gap are pieces that a stream was storing when it was killed,
/// beside what is missing: it tells the server of none before all that comes before is stored.
///
/// Not so where no stream has been, where its tip says that the gap was stored once, where a hole was
/// recorded, where the server went on for a segment, or a backup brought what it needs.
pub fn is_left_under_way(
    catalog: &Catalog,
    timeline: TimelineId,
    gap: Lsn,
    size: SegmentSize,
) -> bool {
    let Some(wal) = catalog.timelines.get(&timeline) else {
        return false;
    };
    let is_behind = |segment: &SegmentName| segment.start(size).is_some_and(|start| start > gap);
    let segments = wal.pieces.keys().filter(|segment| is_behind(segment));
    let tip = catalog.tips.get(&timeline);
    let is_told = tip.is_none_or(|tip| tip.lsn > gap);
    let mut backups = catalog.backups.iter();
    let is_of_backup = backups.any(|backup| backup.timeline == timeline && backup.stop_lsn > gap);
    let mut holes = catalog.holes.iter();
    let is_recorded = holes.any(|hole| hole.timeline == timeline && hole.end > gap);
    catalog.newest_timeline() == Some(timeline)
        && !wal.segments.iter().any(is_behind)
        && segments.count() <= 1
        && !is_told
        && !is_of_backup
        && !is_recorded
}

/// The first segment that is missing behind `end` though more of the branch is stored.
pub fn hole_after(
    catalog: &Catalog,
    branch: &TimelineHistory,
    end: BranchEnd,
    size: SegmentSize,
) -> Option<SegmentName> {
    let parts = branch.parts();
    let reached = parts
        .iter()
        .skip_while(|part| part.timeline != end.timeline);
    reached.enumerate().find_map(|(at, part)| {
        let from = if at == 0 { end.lsn } else { part.start };
        let coverage = catalog.timelines.get(&part.timeline)?.coverage(size);
        let is_later = |start: Lsn| start >= from && part.end.is_none_or(|fork| start < fork);
        let more = coverage.iter().any(|range| is_later(range.start));
        // the whole child is behind a fork that could not be passed
        let unreached = at > 0 && coverage.iter().any(|range| range.end > from);
        (more || unreached).then(|| SegmentName::of(part.timeline, from, size))
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use wal::WalRange;

    use super::*;
    use crate::repository::catalog::TimelineWal;
    use crate::repository::records::{FORMAT, Tip};

    const MIB: u64 = 1 << 20;

    fn size() -> SegmentSize {
        SegmentSize::from_bytes(MIB).unwrap()
    }

    fn timeline(id: u32) -> TimelineId {
        TimelineId::new(id).unwrap()
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    /// A backup of the first half of the segment `number`, finished at that second.
    fn backup(id: u32, number: u64) -> BackupRecord {
        let second = i64::try_from(number).unwrap();
        BackupRecord {
            format: FORMAT,
            id: crate::repository::layout::BackupId::at(at(second)),
            cluster: "main".to_owned(),
            system_id: "1".to_owned(),
            timeline: timeline(id),
            start_lsn: Lsn::new(number * MIB + 40),
            stop_lsn: Lsn::new(number * MIB + MIB / 2),
            started_at: at(second),
            finished_at: at(second),
            label: String::new(),
            postgres_version: "18.6".to_owned(),
            major: 18,
            segment_bytes: MIB,
            files: 1,
            bytes: 1,
            stored_bytes: 1,
            shared_packs: Vec::new(),
            tablespaces: Vec::new(),
            manifest_digest: String::new(),
            from_standby: false,
            damaged_page_count: 0,
            damaged_pages: Vec::new(),
            outside: Vec::new(),
            sealed: None,
            digest: None,
        }
    }

    fn catalog(wal: &[(u32, &[u64])], backups: &[(u32, u64)]) -> Catalog {
        let mut catalog = Catalog {
            segment_size: Some(size()),
            ..Catalog::default()
        };
        for (id, numbers) in wal {
            let names = numbers
                .iter()
                .map(|number| SegmentName::of(timeline(*id), Lsn::new(number * MIB), size()));
            let segments: BTreeSet<SegmentName> = names.collect();
            let wal = TimelineWal::of_segments(segments);
            catalog.timelines.insert(timeline(*id), wal);
        }
        catalog.backups = backups
            .iter()
            .map(|(id, number)| backup(*id, *number))
            .collect();
        let history = TimelineHistory::parse(timeline(2), b"1\t0/480000\tno target\n").unwrap();
        catalog.histories.insert(timeline(2), history);
        catalog
    }

    fn serving(catalog: &Catalog, branch: u32) -> Vec<u64> {
        let found = candidates(catalog, &catalog.branch(timeline(branch)), size());
        found
            .iter()
            .map(|it| it.backup.start_lsn.as_u64() / MIB)
            .collect()
    }

    #[test]
    fn a_backup_serves_the_branches_that_it_lies_on_newest_first() {
        // timeline 2 left timeline 1 in the middle of segment 4
        let catalog = catalog(
            &[(1, &[1, 2, 3, 4, 5, 6]), (2, &[4, 5, 6])],
            &[(1, 2), (1, 3), (1, 5), (2, 6)],
        );
        assert_eq!(serving(&catalog, 1), [5, 3, 2]);
        assert_eq!(serving(&catalog, 2), [6, 3, 2]);
    }

    /// A restore from it would stop at the hole, and the server would never become consistent.
    #[test]
    fn a_backup_whose_own_wal_is_missing_serves_nothing() {
        let catalog = catalog(&[(1, &[1, 3])], &[(1, 1), (1, 2), (1, 3)]);
        assert_eq!(serving(&catalog, 1), [3, 1]);
    }

    /// `status` would promise moments that a restore cannot reach.
    #[test]
    fn wal_that_could_not_be_verified_ends_the_window() {
        let mut catalog = catalog(&[(1, &[1, 2, 3, 4])], &[(1, 1), (1, 4)]);
        catalog.holes.push(Hole {
            timeline: timeline(1),
            start: Lsn::new(2 * MIB + 512),
            end: Lsn::new(3 * MIB),
            found_at: at(9),
            reason: "damage".to_owned(),
            unverified: true,
        });
        let found = candidates(&catalog, &catalog.branch(timeline(1)), size());
        let ends: Vec<u64> = found.iter().map(|it| it.end.lsn.as_u64()).collect();
        assert_eq!(ends, [5 * MIB, 2 * MIB + 512]);
    }

    /// A backup taken right after the return to `wal_level=replica` would be one that nothing counts.
    #[test]
    fn minimal_wal_ends_no_window_that_begins_behind_it_in_its_segment() {
        // each backup begins 40 bytes into its segment
        let mut catalog = catalog(&[(1, &[1, 2, 3])], &[(1, 1), (1, 2)]);
        let hole = |lsn: u64, reason: &str| Hole {
            timeline: timeline(1),
            start: Lsn::new(lsn),
            end: Lsn::new(3 * MIB),
            found_at: at(9),
            reason: reason.to_owned(),
            unverified: true,
        };
        let ends = |catalog: &Catalog| -> Vec<u64> {
            let found = candidates(catalog, &catalog.branch(timeline(1)), size());
            found.iter().map(|it| it.end.lsn.as_u64()).collect()
        };
        catalog.holes = vec![hole(2 * MIB + 39, Hole::MINIMAL_WAL)];
        assert_eq!(ends(&catalog), [4 * MIB, 2 * MIB + 39]);
        catalog.holes = vec![hole(2 * MIB + 40, Hole::MINIMAL_WAL)];
        assert_eq!(
            ends(&catalog),
            [2 * MIB + 40],
            "replayed from the record itself"
        );
        catalog.holes = vec![hole(2 * MIB + 39, "it could not be verified")];
        assert_eq!(ends(&catalog), [2 * MIB + 39], "damage");
    }

    /// A server and its archiver that die together would leave commits that nothing restores without
    /// being told to leave out the last; and what was lost must not pass for that.
    #[test]
    fn pieces_beside_what_a_killed_stream_had_not_stored_are_no_hole() {
        let gap = Lsn::new(3 * MIB + 100);
        let tip = |lsn: u64| Tip {
            lsn: Lsn::new(lsn),
            confirmed_at: at(9),
            moment: None,
        };
        let with_pieces = |wholes: &[u64], pieces: &[(u64, u64)]| {
            let mut catalog = catalog(&[(1, wholes)], &[(1, 1)]);
            catalog.histories.clear();
            catalog.tips.insert(timeline(1), tip(3 * MIB + 100));
            let wal = catalog.timelines.get_mut(&timeline(1)).unwrap();
            for (start, end) in pieces {
                let range = WalRange::new(Lsn::new(*start), Lsn::new(*end));
                let segment = SegmentName::of(timeline(1), range.start, size());
                wal.pieces.entry(segment).or_default().insert(range);
            }
            catalog
        };
        let before = (3 * MIB, 3 * MIB + 100);
        let behind = (4 * MIB, 4 * MIB + 10);
        let left = with_pieces(&[1, 2], &[before, behind]);
        let is_left = |catalog: &Catalog| is_left_under_way(catalog, timeline(1), gap, size());
        assert!(is_left(&left));
        assert!(!is_left(&with_pieces(&[1, 2, 4], &[before])));
        let further = (5 * MIB, 5 * MIB + 10);
        assert!(!is_left(&with_pieces(&[1, 2], &[before, behind, further])));
        let mut told = left.clone();
        told.tips.clear();
        assert!(!is_left(&told));
        told.tips.insert(timeline(1), tip(3 * MIB + 101));
        assert!(!is_left(&told));
        let mut recorded = left.clone();
        recorded.holes.push(Hole {
            timeline: timeline(1),
            start: gap,
            end: Lsn::new(4 * MIB),
            found_at: at(9),
            reason: "removed".to_owned(),
            unverified: false,
        });
        assert!(!is_left(&recorded));
        let mut of_backup = left.clone();
        of_backup.backups.push(backup(1, 4));
        assert!(!is_left(&of_backup));
        let mut promoted = left;
        promoted
            .timelines
            .insert(timeline(2), TimelineWal::default());
        assert!(!is_left(&promoted));
    }

    #[test]
    fn what_is_missing_before_more_of_the_branch_is_a_hole() {
        let end = |id, lsn: u64| BranchEnd {
            timeline: timeline(id),
            lsn: Lsn::new(lsn),
        };
        let hole = |catalog: &Catalog, branch, end| {
            hole_after(catalog, &catalog.branch(timeline(branch)), end, size()).map(|segment| {
                (
                    segment.timeline.get(),
                    segment.start(size()).unwrap().as_u64() / MIB,
                )
            })
        };
        let gap = catalog(&[(1, &[1, 2, 4])], &[]);
        assert_eq!(hole(&gap, 1, end(1, 3 * MIB)), Some((1, 3)));
        assert_eq!(hole(&gap, 1, end(1, 5 * MIB)), None);
        // the child's copy of the segment with the fork is missing, and more of the child is there
        let fork = 4 * MIB + MIB / 2;
        let child = catalog(&[(1, &[3, 4, 5]), (2, &[5])], &[]);
        assert_eq!(hole(&child, 2, end(1, fork)), Some((2, 4)));
        // nothing of the child is there: the branch ends at the fork, whatever its parent did later
        let parent = catalog(&[(1, &[3, 4, 5])], &[]);
        assert_eq!(hole(&parent, 2, end(1, fork)), None);
    }

    /// What `status` prints as the latest moment must be reached by `restore --to`.
    #[test]
    fn the_latest_moment_is_what_is_confirmed_to_be_stored() {
        let mut catalog = catalog(&[(1, &[1, 2])], &[(1, 1)]);
        let branch = catalog.branch(timeline(1));
        let tip = |lsn: u64| Tip {
            lsn: Lsn::new(lsn),
            confirmed_at: at(100),
            moment: Some("1970-01-01T00:01:39.1234567Z".parse().unwrap()),
        };
        let latest = |catalog: &Catalog, stamp: Option<Timestamp>, whole| {
            let backup = &catalog.backups[0];
            let found = Candidate::of(catalog, &branch, backup, size()).unwrap();
            rfc3339(found.latest(catalog, stamp, whole))
        };
        assert_eq!(latest(&catalog, None, true), "1970-01-01T00:00:01.000000Z");
        assert_eq!(
            latest(&catalog, Some(at(50)), true),
            "1970-01-01T00:00:50.000000Z"
        );
        catalog.tips.insert(timeline(1), tip(3 * MIB));
        assert_eq!(
            latest(&catalog, Some(at(50)), true),
            "1970-01-01T00:01:39.123456Z"
        );
        assert_eq!(
            latest(&catalog, Some(at(50)), false),
            "1970-01-01T00:00:50.000000Z"
        );
        // it speaks of WAL that is not there any more
        catalog.tips.insert(timeline(1), tip(3 * MIB + 1));
        assert_eq!(
            latest(&catalog, Some(at(50)), true),
            "1970-01-01T00:00:50.000000Z"
        );
    }

    fn rfc3339(time: Timestamp) -> String {
        crate::clock::rfc3339::text(&time)
    }
}
