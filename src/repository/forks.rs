//! What a new timeline left behind on the one that it came from.

use wal::{Lsn, SegmentSize, TimelineHistory, TimelineId};

use super::catalog::Catalog;

/// Stored WAL of a timeline behind the place where its successor left it: a standby that was behind was
/// promoted, or a copy was while the first server went on. What was committed there is in no restore
/// that follows the successor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LeftBehind {
    /// The timeline that was left.
    pub timeline: TimelineId,
    /// Where.
    pub fork: Lsn,
    /// By this one.
    pub next: TimelineId,
    /// The end of what is stored of the timeline that was left: behind the fork.
    pub stored: Lsn,
}

/// What the timelines of `branch` left behind, oldest first.
pub fn left_behind(
    catalog: &Catalog,
    branch: &TimelineHistory,
    size: SegmentSize,
) -> Vec<LeftBehind> {
    let parts = branch.parts();
    let forks = parts.iter().zip(parts.iter().skip(1));
    let left = forks.filter_map(|(parent, child)| {
        let fork = parent.end?;
        let stored = catalog.timelines.get(&parent.timeline)?.end(size)?;
        (stored > fork).then_some(LeftBehind {
            timeline: parent.timeline,
            fork,
            next: child.timeline,
            stored,
        })
    });
    left.collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use wal::{SegmentName, WalRange};

    use super::*;
    use crate::repository::catalog::TimelineWal;

    const MIB: u64 = 1 << 20;

    fn timeline(id: u32) -> TimelineId {
        TimelineId::new(id).unwrap()
    }

    /// Commits that were acknowledged are in no restore that follows the newest timeline.
    #[test]
    fn what_each_timeline_left_behind_is_found() {
        let size = SegmentSize::from_bytes(MIB).unwrap();
        let history = b"1\t0/380000\tno recovery target\n2\t0/4A0000\tno recovery target\n";
        let branch = TimelineHistory::parse(timeline(3), history).unwrap();
        let left = |stretches: &[(u32, u64, u64)]| {
            let mut catalog = Catalog::default();
            for (id, start, end) in stretches {
                let range = WalRange::new(Lsn::new(*start), Lsn::new(*end));
                let segment = SegmentName::of(timeline(*id), range.start, size);
                let wal: &mut TimelineWal = catalog.timelines.entry(timeline(*id)).or_default();
                wal.pieces.insert(segment, BTreeSet::from([range]));
            }
            left_behind(&catalog, &branch, size)
        };
        let (first, second) = (0x38_0000, 0x4A_0000);
        assert_eq!(left(&[(1, 3 * MIB, first), (2, 4 * MIB, second)]), []);
        let found = left(&[
            (1, 3 * MIB, first + 8),
            (2, 4 * MIB, second),
            (3, 4 * MIB, 5 * MIB),
        ]);
        let expected = LeftBehind {
            timeline: timeline(1),
            fork: Lsn::new(first),
            next: timeline(2),
            stored: Lsn::new(first + 8),
        };
        assert_eq!(found, [expected]);
        assert_eq!(
            left(&[(1, 3 * MIB, first + 8), (2, 4 * MIB, second + 8)]).len(),
            2
        );
    }
}
