//! What lies in a spool, in the order in which it leaves: histories, then WAL by timeline and
//! position, a segment before its pieces. Pure.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use wal::{Lsn, SegmentName, TimelineId, WalRange};

use crate::repository::layout::ObjectName;

/// An object's place in the queue.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Turn {
    /// Without it the WAL of its timeline has no place.
    History(TimelineId),
    /// `piece` is the start and the end of a piece; a longer one comes before those that it covers.
    Wal {
        segment: SegmentName,
        piece: Option<(Lsn, Reverse<Lsn>)>,
    },
}

impl Turn {
    /// `None` of what is never spooled.
    fn of(name: &ObjectName) -> Option<Self> {
        match name {
            ObjectName::History(timeline) => Some(Self::History(*timeline)),
            ObjectName::Segment(segment) => Some(Self::Wal {
                segment: *segment,
                piece: None,
            }),
            ObjectName::Piece { segment, range } => Some(Self::Wal {
                segment: *segment,
                piece: Some((range.start, Reverse(range.end))),
            }),
            _ => None,
        }
    }

    fn name(&self) -> ObjectName {
        match self {
            Self::History(timeline) => ObjectName::History(*timeline),
            Self::Wal {
                segment,
                piece: None,
            } => ObjectName::Segment(*segment),
            Self::Wal {
                segment,
                piece: Some((start, Reverse(end))),
            } => ObjectName::Piece {
                segment: *segment,
                range: WalRange {
                    start: *start,
                    end: *end,
                },
            },
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Its room is taken.
    Underway,
    /// It is durable here.
    There,
    /// Some of the repositories have it, and it waits for the others.
    Copied,
    /// It could not be read, and was put aside: it is nowhere else.
    Aside,
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    bytes: u64,
    state: State,
    /// How many are writing it: a connection that went away may have left one behind.
    writers: u32,
}

/// What came of asking for room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reserved {
    /// There is, or an object of this name is there, or on its way.
    Yes,
    Full,
}

/// What lies in a spool.
#[derive(Debug, Default)]
pub(super) struct Index {
    entries: BTreeMap<Turn, Entry>,
    bytes: u64,
}

impl Index {
    /// What was there before this process.
    pub(super) fn found(&mut self, name: &ObjectName, bytes: u64) {
        self.insert(name, bytes, State::There);
    }

    /// Takes room for an object, so that the whole stays within `bytes_max`.
    pub(super) fn reserve(&mut self, name: &ObjectName, bytes: u64, bytes_max: u64) -> Reserved {
        let known = Turn::of(name).and_then(|turn| self.entries.get_mut(&turn));
        if let Some(entry) = known.filter(|entry| entry.state != State::Aside) {
            entry.writers += 1;
            return Reserved::Yes;
        }
        if self.bytes.saturating_add(bytes) > bytes_max {
            return Reserved::Full;
        }
        self.insert(name, bytes, State::Underway);
        self.entry(name).expect("it was inserted").writers = 1;
        Reserved::Yes
    }

    /// One that had room for it has written it: it is durable, unless something that covers it has
    /// taken its place already, or it has left.
    pub(super) fn written(&mut self, name: &ObjectName) {
        if let Some(entry) = self.entry(name) {
            entry.writers = entry.writers.saturating_sub(1);
            if entry.state != State::Copied {
                entry.state = State::There;
            }
        }
    }

    /// One that had room for it could not write it: the room is free again, unless another is still
    /// writing it, or has.
    pub(super) fn not_written(&mut self, name: &ObjectName) {
        let Some(entry) = self.entry(name) else {
            return;
        };
        entry.writers = entry.writers.saturating_sub(1);
        if entry.writers == 0 && entry.state == State::Underway {
            self.remove(name);
        }
    }

    /// Some of the repositories have it too.
    pub(super) fn copied(&mut self, name: &ObjectName) {
        if let Some(entry) = self.entry(name) {
            entry.state = State::Copied;
        }
    }

    /// It was put aside: its room is free, and what it held is not stored.
    pub(super) fn put_aside(&mut self, name: &ObjectName) {
        self.remove(name);
        self.insert(name, 0, State::Aside);
    }

    pub(super) fn remove(&mut self, name: &ObjectName) {
        let removed = Turn::of(name).and_then(|turn| self.entries.remove(&turn));
        let bytes = removed.map_or(0, |entry| entry.bytes);
        self.bytes = self.bytes.saturating_sub(bytes);
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(super) fn len(&self) -> usize {
        self.present().count()
    }

    pub(super) fn names(&self) -> Vec<ObjectName> {
        self.present().map(|(turn, _)| turn.name()).collect()
    }

    /// Whether something waits to leave.
    pub(super) fn has_more(&self) -> bool {
        self.next_after(None, true).is_some()
    }

    /// The next that leaves, after the one whose turn was `last`; `again` says whether what some of
    /// the repositories have is tried once more.
    pub(super) fn next_after(
        &self,
        last: Option<&Turn>,
        again: bool,
    ) -> Option<(Turn, ObjectName)> {
        let mut there = self
            .entries
            .iter()
            .filter(|(turn, entry)| {
                let waits = entry.state == State::There || (again && entry.state == State::Copied);
                waits && last.is_none_or(|last| *turn > last)
            })
            .map(|(turn, _)| (turn.clone(), turn.name()));
        there.next()
    }

    /// Whether something of this stretch is here alone: in the queue, on its way, or put aside.
    pub(super) fn holds(&self, segment: SegmentName, range: WalRange) -> bool {
        self.entries.keys().any(|turn| match turn {
            Turn::Wal { segment: of, piece } if *of == segment => {
                piece.is_none_or(|(start, Reverse(end))| start < range.end && range.start < end)
            }
            Turn::History(_) | Turn::Wal { .. } => false,
        })
    }

    fn present(&self) -> impl Iterator<Item = (&Turn, &Entry)> {
        let entries = self.entries.iter();
        entries.filter(|(_, entry)| entry.state != State::Aside)
    }

    fn insert(&mut self, name: &ObjectName, bytes: u64, state: State) {
        if let Some(turn) = Turn::of(name) {
            self.bytes = self.bytes.saturating_add(bytes);
            let entry = Entry {
                bytes,
                state,
                writers: 0,
            };
            self.entries.insert(turn, entry);
        }
    }

    fn entry(&mut self, name: &ObjectName) -> Option<&mut Entry> {
        Turn::of(name).and_then(|turn| self.entries.get_mut(&turn))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece() -> ObjectName {
        let segment = "000000010000000000000001".parse().unwrap();
        let (start, end) = (Lsn::new(0x100_0000), Lsn::new(0x100_0064));
        ObjectName::Piece {
            segment,
            range: WalRange { start, end },
        }
    }

    /// A write that fails must not take away what another one has put there: it would be said to be
    /// in the repository, for it is in the spool no longer.
    #[test]
    fn a_write_that_fails_leaves_what_another_one_writes() {
        let mut index = Index::default();
        assert_eq!(index.reserve(&piece(), 100, 1000), Reserved::Yes);
        assert_eq!(index.reserve(&piece(), 100, 1000), Reserved::Yes);
        index.not_written(&piece());
        assert_eq!((index.len(), index.bytes()), (1, 100));
        index.written(&piece());
        assert!(index.has_more());
        // in the other order
        assert_eq!(index.reserve(&piece(), 100, 1000), Reserved::Yes);
        index.not_written(&piece());
        assert_eq!((index.len(), index.bytes()), (1, 100));
    }

    #[test]
    fn room_that_nobody_used_is_free_again() {
        let mut index = Index::default();
        assert_eq!(index.reserve(&piece(), 100, 100), Reserved::Yes);
        index.not_written(&piece());
        assert_eq!((index.len(), index.bytes()), (0, 0));
        assert_eq!(index.reserve(&piece(), 100, 99), Reserved::Full);
    }

    #[test]
    fn what_some_of_the_repositories_have_stays_so_when_it_is_written_again() {
        let mut index = Index::default();
        index.found(&piece(), 100);
        index.copied(&piece());
        assert_eq!(index.reserve(&piece(), 100, 1000), Reserved::Yes);
        index.written(&piece());
        assert_eq!(index.next_after(None, false), None);
    }
}
