//! Where a stream goes on: from what the repository holds, what the server has, and what its slot
//! keeps. Pure.

use wal::{Lsn, Reach, SegmentSize, TimelineHistory, TimelineId, WalRange};

use crate::repository::catalog::{BranchEnd, Catalog};
use crate::repository::forks::{LeftBehind, left_behind};

/// Where to start streaming.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ResumeAt {
    /// On this timeline.
    pub timeline: TimelineId,
    /// From here: a segment's beginning.
    pub start: Lsn,
    /// `[start, known)` is stored already, and is compared as it comes again.
    pub known: Lsn,
}

/// Why a server must not be followed.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ResumeError {
    /// The repository is ahead on a branch that this server does not know.
    #[error(
        "the repository holds WAL of timeline {stored}, which is not a past of this server's \
         timeline {server}"
    )]
    OlderServer {
        /// The newest timeline in the repository.
        stored: TimelineId,
        /// The server's timeline.
        server: TimelineId,
    },
}

/// From where on what is stored is followed to its first break: what the slot keeps, or where the
/// last stream was, whichever is earlier. A slot that is new, as after a failover, says nothing of
/// what came before it, and a backup may have stored what it points at. Where no tip says where a
/// stream was, it is what is stored first: the server is asked for what it has removed, perhaps, and
/// that costs one answer. `None` where nothing is stored and no slot keeps anything.
pub fn floor(
    branch: &TimelineHistory,
    catalog: &Catalog,
    kept: Option<Lsn>,
    size: SegmentSize,
) -> Option<Lsn> {
    let streamed =
        catalog
            .tips
            .iter()
            .rev()
            .find_map(|(timeline, tip)| match branch.reach(*timeline) {
                Reach::Whole => Some(tip.lsn),
                Reach::Until(fork) => Some(tip.lsn.min(fork)),
                Reach::NotAncestor => None,
            });
    let streamed = streamed.or_else(|| first_stored(branch, catalog, size));
    kept.into_iter().chain(streamed).min()
}

/// Where the first stored stretch of the branch begins.
fn first_stored(branch: &TimelineHistory, catalog: &Catalog, size: SegmentSize) -> Option<Lsn> {
    branch.parts().iter().find_map(|part| {
        let coverage = catalog.timelines.get(&part.timeline)?.coverage(size);
        let first = coverage.first()?.start;
        part.end.is_none_or(|fork| first < fork).then_some(first)
    })
}

/// Whether a stream has stored WAL of the branch, whatever became of its tip.
pub fn was_streamed(branch: &TimelineHistory, catalog: &Catalog) -> bool {
    let mut streamed = catalog.streamed.iter();
    streamed.any(|timeline| branch.reach(*timeline) != Reach::NotAncestor)
}

/// What the branch left behind last. `None` once WAL of the branch's own timeline is stored.
pub fn left_behind_the_fork(
    branch: &TimelineHistory,
    catalog: &Catalog,
    size: SegmentSize,
) -> Option<LeftBehind> {
    let own = catalog.timelines.get(&branch.timeline());
    if own.and_then(|wal| wal.end(size)).is_some() {
        return None;
    }
    let left = left_behind(catalog, branch, size).pop();
    left.filter(|left| left.next == branch.timeline())
}

/// Where to go on.
///
/// `branch` is the history of the server's timeline. Everything before `floor` was reported to the
/// server, or was never ours: it is what the slot keeps, or where the last stream had come to
/// without a break. From there the stored WAL is followed to its first break, wherever more is
/// stored behind that: a backup brings WAL of its own, and segments are not stored in their order.
pub fn resume_at(
    branch: &TimelineHistory,
    catalog: &Catalog,
    floor: Lsn,
    size: SegmentSize,
) -> Result<ResumeAt, ResumeError> {
    let server = branch.timeline();
    let newest = catalog.timelines.keys().next_back().copied();
    if let Some(stored) = newest.filter(|newest| *newest > server) {
        return Err(ResumeError::OlderServer { stored, server });
    }
    let at = branch_at(branch, size.start_of(floor));
    let end = catalog.reach(branch, at.timeline, at.lsn, size);
    // nothing is stored there: the server may still have what follows the last that is
    let end = if end == at {
        last_before(branch, catalog, at.lsn, size).unwrap_or(end)
    } else {
        end
    };
    Ok(behind(branch, catalog, end, size))
}

/// Where one place of several lacks something of what the slot keeps, from `kept` on.
pub fn lacks_at(
    branch: &TimelineHistory,
    catalog: &Catalog,
    kept: Lsn,
    size: SegmentSize,
) -> ResumeAt {
    let at = branch_at(branch, size.start_of(kept));
    let end = catalog.reach(branch, at.timeline, at.lsn, size);
    behind(branch, catalog, end, size)
}

fn branch_at(branch: &TimelineHistory, lsn: Lsn) -> BranchEnd {
    BranchEnd {
        timeline: branch.timeline_at(lsn),
        lsn,
    }
}

/// Where what follows on `end` begins: in the segment at hand, or with the next timeline.
fn behind(
    branch: &TimelineHistory,
    catalog: &Catalog,
    end: BranchEnd,
    size: SegmentSize,
) -> ResumeAt {
    let parts = branch.parts();
    let child = parts
        .iter()
        .skip_while(|part| part.timeline != end.timeline)
        .nth(1);
    let fork = parts
        .iter()
        .find(|part| part.timeline == end.timeline)
        .and_then(|part| part.end);
    match (fork, child) {
        (Some(fork), Some(child)) if end.lsn >= fork => {
            let start = size.start_of(fork);
            let known = catalog
                .timelines
                .get(&child.timeline)
                .map_or(start, |wal| wal.covered_from(start, size));
            ResumeAt {
                timeline: child.timeline,
                start,
                known: known.min(size.end_of(start)),
            }
        }
        _ => ResumeAt {
            timeline: end.timeline,
            start: compared_from(end, catalog, size),
            known: end.lsn,
        },
    }
}

/// Where a server that has WAL up to `flushed` shows best whether it is the one that what is stored came
/// from: at the end of what both have. `None` where nothing of its branch is stored.
pub fn compared_at(
    branch: &TimelineHistory,
    catalog: &Catalog,
    flushed: Lsn,
    size: SegmentSize,
) -> Option<ResumeAt> {
    let last = last_before(branch, catalog, flushed, size)?;
    let end = BranchEnd {
        lsn: last.lsn.min(flushed),
        ..last
    };
    Some(behind(branch, catalog, end, size))
}

/// Where to begin so that something of what is stored comes again: the beginning of the segment that
/// is not complete; or of the last one that is, where nothing is stored behind it. Else a server that
/// went another way before would not be noticed.
fn compared_from(end: BranchEnd, catalog: &Catalog, size: SegmentSize) -> Lsn {
    let start = size.start_of(end.lsn);
    if start < end.lsn {
        return start;
    }
    let before = size.start_of(start.saturating_sub(1));
    let stored = catalog.timelines.get(&end.timeline);
    match stored.map(|wal| wal.covered_from(before, size)) {
        Some(covered) if covered >= start => before,
        _ => start,
    }
}

/// The end of the last stored stretch of the branch that lies before `lsn`.
pub fn last_before(
    branch: &TimelineHistory,
    catalog: &Catalog,
    lsn: Lsn,
    size: SegmentSize,
) -> Option<BranchEnd> {
    branch.parts().iter().rev().find_map(|part| {
        let coverage = catalog.timelines.get(&part.timeline)?.coverage(size);
        let before = coverage.iter().rev().find(|range| range.start < lsn)?;
        let end = part.end.map_or(before.end, |fork| before.end.min(fork));
        Some(BranchEnd {
            timeline: part.timeline,
            lsn: end,
        })
    })
}

/// As [`skip_removed`], to the earliest of `places` from which more than `refused` can be asked for:
/// the server no longer has what begins there. A slot that is new keeps less than the server has.
pub fn skip_to_earliest(
    at: ResumeAt,
    branch: &TimelineHistory,
    catalog: &Catalog,
    places: &[Lsn],
    refused: Lsn,
    size: SegmentSize,
) -> Option<(Vec<(TimelineId, WalRange)>, ResumeAt)> {
    let mut places = places.to_vec();
    places.sort_unstable();
    let mut skipped = places
        .into_iter()
        .filter_map(|place| skip_removed(at, branch, catalog, place, size));
    skipped.find(|(_, next)| next.start > refused)
}

/// The holes that are left when the server no longer has what would follow, by timeline, and where
/// to go on: at `available`, which it has, or where what is stored from there on ends. It is stored
/// already where an earlier stream went on there, and was lost before it could write its tip. There
/// is no hole where the server removed only what is stored.
fn skip_removed(
    at: ResumeAt,
    branch: &TimelineHistory,
    catalog: &Catalog,
    available: Lsn,
    size: SegmentSize,
) -> Option<(Vec<(TimelineId, WalRange)>, ResumeAt)> {
    let start = size.start_of(available);
    // it may have removed what was asked for only to be compared
    if start < at.known || start == at.start {
        return None;
    }
    let parts = branch.parts();
    let holes: Vec<(TimelineId, WalRange)> = parts
        .iter()
        .filter_map(|part| {
            let whole = WalRange {
                start: part.start,
                end: part.end.unwrap_or(start),
            };
            let hole = whole.intersection(WalRange {
                start: at.known,
                end: start,
            })?;
            Some((part.timeline, hole))
        })
        .collect();
    let end = catalog.reach(branch, branch.timeline_at(start), start, size);
    // nothing before it is asked for: the server does not have it
    let next = ResumeAt {
        start: size.start_of(end.lsn).max(start),
        ..behind(branch, catalog, end, size)
    };
    Some((holes, next))
}

#[cfg(test)]
mod tests {
    use wal::SegmentName;

    use super::*;
    use crate::repository::catalog::TimelineWal;
    use crate::repository::records::Tip;

    const MIB: u64 = 1 << 20;

    fn size() -> SegmentSize {
        SegmentSize::from_bytes(MIB).unwrap()
    }

    /// Nothing is stored.
    fn none() -> Catalog {
        Catalog::default()
    }

    fn timeline(id: u32) -> TimelineId {
        TimelineId::new(id).unwrap()
    }

    #[test]
    fn what_the_new_timeline_left_behind_is_found_once() {
        let left = |stretches: &[(u32, u64, u64)]| {
            let left = left_behind_the_fork(&branch(), &stored(stretches, true), size());
            left.map(|left| (left.timeline, left.stored))
        };
        let (fork, end) = (Lsn::new(0x38_0000), Lsn::new(0x39_0000));
        let behind = (1, 3 * MIB, end.as_u64());
        assert_eq!(left(&[behind]), Some((timeline(1), end)));
        assert_eq!(left(&[(1, 3 * MIB, fork.as_u64())]), None);
        assert_eq!(left(&[behind, (2, fork.as_u64(), end.as_u64())]), None);
    }

    /// Timeline 2 left timeline 1 in the middle of segment 3.
    fn branch() -> TimelineHistory {
        TimelineHistory::parse(timeline(2), b"1\t0/380000\tno recovery target\n").unwrap()
    }

    fn range(start: u64, end: u64) -> WalRange {
        WalRange {
            start: Lsn::new(start),
            end: Lsn::new(end),
        }
    }

    fn stored(stretches: &[(u32, u64, u64)], streamed: bool) -> Catalog {
        let mut catalog = Catalog::default();
        for (id, start, end) in stretches {
            let segment = SegmentName::of(timeline(*id), Lsn::new(*start), size());
            let wal: &mut TimelineWal = catalog.timelines.entry(timeline(*id)).or_default();
            wal.pieces
                .entry(segment)
                .or_default()
                .insert(range(*start, *end));
        }
        if streamed {
            let confirmed_at = jiff::Timestamp::UNIX_EPOCH;
            let tip = Tip {
                lsn: Lsn::new(MIB),
                confirmed_at,
                moment: None,
            };
            catalog.tips.insert(timeline(1), tip);
        }
        catalog
    }

    fn resume(catalog: &Catalog, floor: u64) -> Result<ResumeAt, ResumeError> {
        resume_at(&branch(), catalog, Lsn::new(floor), size())
    }

    fn at(id: u32, start: u64, known: u64) -> ResumeAt {
        ResumeAt {
            timeline: timeline(id),
            start: Lsn::new(start),
            known: Lsn::new(known),
        }
    }

    #[test]
    fn begins_where_the_slot_keeps_wal() {
        assert_eq!(
            resume(&stored(&[], false), 5 * MIB + 17),
            Ok(at(2, 5 * MIB, 5 * MIB))
        );
    }

    #[test]
    fn goes_on_in_the_segment_that_was_not_complete() {
        let half = stored(&[(2, 4 * MIB, 4 * MIB + 100)], true);
        assert_eq!(
            resume(&half, 4 * MIB + 50),
            Ok(at(2, 4 * MIB, 4 * MIB + 100))
        );
        let whole = stored(&[(2, 4 * MIB, 5 * MIB)], true);
        // something must be compared: this may be another server
        assert_eq!(resume(&whole, 4 * MIB + 50), Ok(at(2, 4 * MIB, 5 * MIB)));
    }

    #[test]
    fn what_comes_again_only_to_be_compared_may_be_gone() {
        let from = at(2, 4 * MIB, 5 * MIB);
        let nothing = skip_removed(from, &branch(), &none(), Lsn::new(5 * MIB + 9), size());
        assert_eq!(nothing, Some((vec![], at(2, 5 * MIB, 5 * MIB))));
        let again = skip_removed(
            at(2, 5 * MIB, 5 * MIB),
            &branch(),
            &none(),
            Lsn::new(5 * MIB),
            size(),
        );
        assert_eq!(again, None);
    }

    /// The server would recycle what lies before the backup as soon as we report what lies behind.
    #[test]
    fn a_backup_that_was_taken_meanwhile_hides_no_break() {
        let catalog = stored(&[(2, 4 * MIB, 4 * MIB + 100), (2, 7 * MIB, 8 * MIB)], true);
        assert_eq!(
            resume(&catalog, 4 * MIB + 80),
            Ok(at(2, 4 * MIB, 4 * MIB + 100))
        );
    }

    /// After a failover the slot is new, and a backup of the new primary stored what it points at.
    #[test]
    fn a_new_slot_does_not_hide_what_came_before_it() {
        let mut catalog = stored(&[(1, 2 * MIB, 2 * MIB + 5), (2, 6 * MIB, 7 * MIB)], true);
        catalog.tips.get_mut(&timeline(1)).unwrap().lsn = Lsn::new(2 * MIB + 5);
        let kept = Some(Lsn::new(6 * MIB + 40));
        let from = floor(&branch(), &catalog, kept, size()).unwrap();
        assert_eq!(
            resume(&catalog, from.as_u64()),
            Ok(at(1, 2 * MIB, 2 * MIB + 5))
        );
        assert_eq!(floor(&branch(), &none(), kept, size()), kept);
    }

    /// A stream that was killed before its first tip, or whose tip cannot be read: the WAL up to the new
    /// slot would be passed over without a word, though the server has it.
    #[test]
    fn what_came_before_a_new_slot_is_asked_for_without_a_tip() {
        let catalog = stored(&[(2, 4 * MIB, 4 * MIB + 100)], false);
        let kept = Some(Lsn::new(6 * MIB));
        let from = floor(&branch(), &catalog, kept, size()).unwrap();
        assert_eq!(
            resume(&catalog, from.as_u64()),
            Ok(at(2, 4 * MIB, 4 * MIB + 100))
        );
        assert!(!was_streamed(&branch(), &catalog));
        // what lies behind the fork is of another branch
        let beyond = stored(&[(1, 4 * MIB, 5 * MIB)], false);
        assert_eq!(floor(&branch(), &beyond, kept, size()), kept);
        assert_eq!(
            resume_at(&branch(), &catalog, Lsn::new(6 * MIB), size()),
            Ok(at(2, 4 * MIB, 4 * MIB + 100))
        );
    }

    /// A new primary that keeps much WAL: its slot begins behind what it still has.
    #[test]
    fn goes_on_at_the_oldest_wal_that_the_server_has() {
        let from = at(2, 10 * MIB, 10 * MIB + 5);
        let places = [
            Lsn::new(20 * MIB + 7),
            Lsn::new(12 * MIB),
            Lsn::new(30 * MIB),
        ];
        let skip = |refused: u64| {
            let refused = Lsn::new(refused);
            let skipped = skip_to_earliest(from, &branch(), &none(), &places, refused, size());
            skipped.map(|(holes, next)| (holes, next.start))
        };
        let hole = |end: u64| vec![(timeline(2), range(10 * MIB + 5, end * MIB))];
        assert_eq!(skip(10 * MIB), Some((hole(12), Lsn::new(12 * MIB))));
        // it was removed meanwhile: the slot keeps what begins there
        assert_eq!(skip(12 * MIB), Some((hole(20), Lsn::new(20 * MIB))));
        assert_eq!(skip(20 * MIB), Some((hole(30), Lsn::new(30 * MIB))));
        assert_eq!(skip(30 * MIB), None);
    }

    /// A backup of a copy would be stored beside WAL that is not its own.
    #[test]
    fn a_server_is_compared_at_the_end_of_what_both_have() {
        let catalog = stored(&[(1, 2 * MIB, 3 * MIB), (2, 4 * MIB, 4 * MIB + 100)], true);
        let compared = |flushed: u64| compared_at(&branch(), &catalog, Lsn::new(flushed), size());
        assert_eq!(compared(9 * MIB), Some(at(2, 4 * MIB, 4 * MIB + 100)));
        // a standby that is behind
        assert_eq!(compared(4 * MIB + 50), Some(at(2, 4 * MIB, 4 * MIB + 50)));
        assert_eq!(compared(4 * MIB), Some(at(1, 2 * MIB, 3 * MIB)));
        assert_eq!(
            compared_at(&branch(), &none(), Lsn::new(9 * MIB), size()),
            None
        );
        // of its own timeline nothing is stored, and its first segment holds its past too
        let parent = stored(&[(1, 3 * MIB, 4 * MIB)], true);
        let first = compared_at(&branch(), &parent, Lsn::new(9 * MIB), size());
        assert_eq!(first, Some(at(2, 3 * MIB, 3 * MIB)));
    }

    /// Another place has everything before the slot, perhaps: what one lacks before it is not asked for.
    #[test]
    fn what_a_place_lacks_is_looked_for_where_the_slot_keeps_it() {
        let catalog = stored(&[(2, 4 * MIB, 5 * MIB), (2, 6 * MIB, 6 * MIB + 9)], true);
        let lacking = |kept: u64| lacks_at(&branch(), &catalog, Lsn::new(kept), size());
        assert_eq!(lacking(6 * MIB + 3), at(2, 6 * MIB, 6 * MIB + 9));
        assert_eq!(lacking(7 * MIB + 3), at(2, 7 * MIB, 7 * MIB));
    }

    /// A kill while a large segment was under way, and a small piece behind it was not.
    #[test]
    fn a_piece_that_overtook_its_segment_hides_no_break() {
        let catalog = stored(&[(2, 6 * MIB, 6 * MIB + 100)], true);
        assert_eq!(resume(&catalog, 5 * MIB + 1), Ok(at(2, 5 * MIB, 5 * MIB)));
    }

    /// A new primary's slot begins at its own checkpoint, behind what we have.
    #[test]
    fn tries_what_follows_the_last_that_is_stored_before_the_slot() {
        let catalog = stored(&[(2, 4 * MIB, 4 * MIB + 100)], true);
        assert_eq!(resume(&catalog, 6 * MIB), Ok(at(2, 4 * MIB, 4 * MIB + 100)));
    }

    #[test]
    fn finishes_the_parent_before_the_child_begins() {
        let early = stored(&[(1, 2 * MIB, 2 * MIB + 5)], true);
        assert_eq!(resume(&early, 2 * MIB), Ok(at(1, 2 * MIB, 2 * MIB + 5)));
        // a backup of the child does not hide that the parent was not finished
        let both = stored(&[(1, 2 * MIB, 2 * MIB + 5), (2, 4 * MIB, 5 * MIB)], true);
        assert_eq!(resume(&both, 2 * MIB), Ok(at(1, 2 * MIB, 2 * MIB + 5)));
        let forked = stored(&[(1, 3 * MIB, 0x38_0000)], true);
        assert_eq!(resume(&forked, 3 * MIB), Ok(at(2, 3 * MIB, 3 * MIB)));
        let beyond = stored(&[(1, 3 * MIB, 4 * MIB)], true);
        assert_eq!(resume(&beyond, 3 * MIB + 9), Ok(at(2, 3 * MIB, 3 * MIB)));
    }

    #[test]
    fn refuses_a_server_that_was_left_behind() {
        let catalog = stored(&[(1, MIB, 2 * MIB), (3, 5 * MIB, 6 * MIB)], true);
        let error = resume(&catalog, MIB).unwrap_err();
        let expected = ResumeError::OlderServer {
            stored: timeline(3),
            server: timeline(2),
        };
        assert_eq!(error, expected);
    }

    #[test]
    fn what_the_server_removed_is_a_hole_on_each_timeline() {
        let from = at(1, 2 * MIB, 2 * MIB + 100);
        let (holes, next) =
            skip_removed(from, &branch(), &none(), Lsn::new(7 * MIB + 3), size()).unwrap();
        assert_eq!(next, at(2, 7 * MIB, 7 * MIB));
        let expected = [
            (timeline(1), range(2 * MIB + 100, 0x38_0000)),
            (timeline(2), range(0x38_0000, 7 * MIB)),
        ];
        assert_eq!(holes, expected);
        let nothing = skip_removed(
            at(2, 4 * MIB, 5 * MIB),
            &branch(),
            &none(),
            Lsn::new(4 * MIB),
            size(),
        );
        assert_eq!(nothing, None);
    }

    /// The end of the old timeline comes in milliseconds, before a tip is written: without this the
    /// stream would go back to the hole for ever.
    #[test]
    fn a_hole_is_left_behind_for_what_was_stored_behind_it() {
        let catalog = stored(&[(1, 2 * MIB, 2 * MIB + 5), (1, 3 * MIB, 0x38_0000)], true);
        let from = at(1, 2 * MIB, 2 * MIB + 5);
        let available = Lsn::new(3 * MIB);
        let (holes, next) = skip_removed(from, &branch(), &catalog, available, size()).unwrap();
        assert_eq!(holes, [(timeline(1), range(2 * MIB + 5, 3 * MIB))]);
        assert_eq!(next, at(2, 3 * MIB, 3 * MIB));
    }
}
