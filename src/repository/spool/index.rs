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
}

/// What came of asking for room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reserved {
    New,
    /// An object of this name is there, or on its way.
    Known,
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
        let known = Turn::of(name).and_then(|turn| self.entries.get(&turn));
        if known.is_some_and(|entry| entry.state != State::Aside) {
            return Reserved::Known;
        }
        if self.bytes.saturating_add(bytes) > bytes_max {
            return Reserved::Full;
        }
        self.insert(name, bytes, State::Underway);
        Reserved::New
    }

    /// It is durable, unless something that covers it has taken its place already.
    pub(super) fn written(&mut self, name: &ObjectName) {
        self.set(name, State::There);
    }

    /// Some of the repositories have it too.
    pub(super) fn copied(&mut self, name: &ObjectName) {
        self.set(name, State::Copied);
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
            self.entries.insert(turn, Entry { bytes, state });
        }
    }

    fn set(&mut self, name: &ObjectName, state: State) {
        let entry = Turn::of(name).and_then(|turn| self.entries.get_mut(&turn));
        if let Some(entry) = entry {
            entry.state = state;
        }
    }
}
