//! WAL without its bytes: who wrote which stretch. Two stretches are equal where the same server
//! wrote them.

use wal::{Lsn, WalRange};

/// What a stretch holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Content {
    range: WalRange,
    /// From where on which writer's bytes follow; the first at the stretch's start.
    writers: Vec<(Lsn, u32)>,
}

impl Content {
    /// A stretch of a log, of which `writers` says from where on who wrote it.
    pub(super) fn of(writers: &[(Lsn, u32)], range: WalRange) -> Self {
        let mut found: Vec<(Lsn, u32)> = Vec::new();
        for &(from, writer) in writers.iter().filter(|(from, _)| *from < range.end) {
            if from <= range.start {
                found.clear();
            }
            if found.last().is_none_or(|last| last.1 != writer) {
                found.push((from.max(range.start), writer));
            }
        }
        Self {
            range,
            writers: found,
        }
    }

    /// What it covers.
    pub(super) fn range(&self) -> WalRange {
        self.range
    }

    /// Whether both hold the same wherever they overlap.
    pub(super) fn agrees_with(&self, other: &Self) -> bool {
        self.range
            .intersection(other.range)
            .is_none_or(|both| Self::of(&self.writers, both) == Self::of(&other.writers, both))
    }

    /// What lies before `end`.
    pub(super) fn until(&self, end: Lsn) -> Self {
        let end = self.range.end.min(end).max(self.range.start);
        let range = WalRange {
            start: self.range.start,
            end,
        };
        Self::of(&self.writers, range)
    }

    /// This, and what `next` adds behind it.
    pub(super) fn joined(mut self, next: &Self) -> Self {
        let behind = next.writers.iter().map(|(from, writer)| (*from, *writer));
        let end = self.range.end;
        for (from, writer) in behind {
            let from = from.max(end);
            self.writers.retain(|(at, _)| *at < from);
            if self.writers.last().is_none_or(|last| last.1 != writer) {
                self.writers.push((from, writer));
            }
        }
        self.range.end = end.max(next.range.end);
        self
    }
}
