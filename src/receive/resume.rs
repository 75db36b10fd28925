//! Where a stream goes on: from what the repository holds, what the server has, and what its slot
//! keeps. Pure.

use std::collections::BTreeMap;

use wal::{Lsn, SegmentSize, TimelineHistory, TimelineId, WalRange};

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

/// Where to go on.
///
/// `branch` is the history of the server's timeline, `stored` the end of what is stored of each
/// timeline, and `fresh` where to begin when nothing is: what the slot keeps, or the end of WAL.
pub fn resume_at(
    branch: &TimelineHistory,
    stored: &BTreeMap<TimelineId, Lsn>,
    fresh: Lsn,
    size: SegmentSize,
) -> Result<ResumeAt, ResumeError> {
    let parts = branch.parts();
    let server = branch.timeline();
    let ahead = stored
        .keys()
        .next_back()
        .copied()
        .filter(|newest| *newest > server);
    if let Some(stored) = ahead {
        return Err(ResumeError::OlderServer { stored, server });
    }
    let newest = parts
        .iter()
        .enumerate()
        .rev()
        .find_map(|(at, part)| stored.get(&part.timeline).map(|end| (at, part, *end)));
    let Some((at, part, end)) = newest else {
        let start = size.start_of(fresh);
        return Ok(ResumeAt {
            timeline: branch.timeline_at(fresh),
            start,
            known: start,
        });
    };
    match (part.end, parts.get(at + 1)) {
        (Some(fork), Some(child)) if end >= fork => {
            let start = size.start_of(fork);
            Ok(ResumeAt {
                timeline: child.timeline,
                start,
                known: start,
            })
        }
        _ => Ok(ResumeAt {
            timeline: part.timeline,
            start: size.start_of(end),
            known: end,
        }),
    }
}

/// The hole that is left when the server no longer has what would follow, and where to go on.
pub fn skip_removed(
    at: ResumeAt,
    available: Lsn,
    size: SegmentSize,
) -> Option<(WalRange, ResumeAt)> {
    let start = size.start_of(available);
    (start > at.known).then_some((
        WalRange {
            start: at.known,
            end: start,
        },
        ResumeAt {
            timeline: at.timeline,
            start,
            known: start,
        },
    ))
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

    fn branch() -> TimelineHistory {
        TimelineHistory::parse(timeline(2), b"1\t0/380000\tno recovery target\n").unwrap()
    }

    fn resume(stored: &[(u32, u64)]) -> Result<ResumeAt, ResumeError> {
        let stored = stored
            .iter()
            .map(|(id, end)| (timeline(*id), Lsn::new(*end)))
            .collect();
        resume_at(&branch(), &stored, Lsn::new(5 * MIB + 17), size())
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
        assert_eq!(resume(&[]), Ok(at(2, 5 * MIB, 5 * MIB)));
    }

    #[test]
    fn goes_on_in_the_segment_that_was_not_complete() {
        assert_eq!(
            resume(&[(2, 4 * MIB + 100)]),
            Ok(at(2, 4 * MIB, 4 * MIB + 100))
        );
        assert_eq!(resume(&[(2, 5 * MIB)]), Ok(at(2, 5 * MIB, 5 * MIB)));
    }

    #[test]
    fn finishes_the_parent_before_the_child_begins() {
        // skipping to the child would leave a hole before the fork
        assert_eq!(resume(&[(1, 2 * MIB + 5)]), Ok(at(1, 2 * MIB, 2 * MIB + 5)));
        assert_eq!(resume(&[(1, 0x38_0000)]), Ok(at(2, 3 * MIB, 3 * MIB)));
        assert_eq!(resume(&[(1, 4 * MIB)]), Ok(at(2, 3 * MIB, 3 * MIB)));
    }

    #[test]
    fn refuses_a_server_that_was_left_behind() {
        let error = resume(&[(1, MIB), (3, 5 * MIB)]).unwrap_err();
        assert_eq!(
            error,
            ResumeError::OlderServer {
                stored: timeline(3),
                server: timeline(2)
            }
        );
    }

    #[test]
    fn what_the_server_removed_is_a_hole() {
        let (hole, next) =
            skip_removed(at(2, 4 * MIB, 4 * MIB + 100), Lsn::new(7 * MIB + 3), size()).unwrap();
        assert_eq!(
            (hole.start.as_u64(), hole.end.as_u64()),
            (4 * MIB + 100, 7 * MIB)
        );
        assert_eq!(next, at(2, 7 * MIB, 7 * MIB));
        assert_eq!(
            skip_removed(at(2, 4 * MIB, 5 * MIB), Lsn::new(4 * MIB), size()),
            None
        );
    }
}
