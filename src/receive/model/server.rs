//! A scripted server: a log, its branch, a slot, and what it was told.

use std::fmt::Write as _;

use wal::{Lsn, Reach, SegmentSize, TimelineHistory, TimelineId, WalRange};

use super::content::Content;

/// A server. It lies in nothing, and keeps nothing that it need not keep.
#[derive(Debug, Clone)]
pub(super) struct Server {
    pub(super) branch: TimelineHistory,
    writers: Vec<(Lsn, u32)>,
    /// Its log ends here, all of it flushed.
    pub(super) end: Lsn,
    /// What lies before this was removed: a segment's start.
    pub(super) oldest: Lsn,
    /// From here on the slot keeps WAL.
    pub(super) slot: Option<Lsn>,
    /// Its last record is a shutdown checkpoint.
    pub(super) shutdown: bool,
    /// Another server's data directory was copied, and went its own way on the same timeline.
    pub(super) is_copy: bool,
}

impl Server {
    /// A server on timeline 1.
    pub(super) fn new(start: Lsn) -> Self {
        Self {
            branch: TimelineHistory::new_first(timeline(1)),
            writers: vec![(start, 1)],
            end: start,
            oldest: start,
            slot: None,
            shutdown: false,
            is_copy: false,
        }
    }

    /// What became of it, or of a standby of it, that was promoted at `fork`.
    pub(super) fn promoted(&self, fork: Lsn, number: u32) -> Self {
        let mut history = String::new();
        for entry in self.branch.entries() {
            writeln!(history, "{}\t{}\tgone", entry.timeline, entry.end).unwrap();
        }
        writeln!(history, "{}\t{fork}\tpromoted", self.branch.timeline()).unwrap();
        let branch = TimelineHistory::parse(timeline(number), history.as_bytes()).unwrap();
        Self {
            branch,
            end: fork,
            ..self.rewritten(fork, number)
        }
    }

    /// A copy of its data directory, which writes other WAL from `at` on.
    pub(super) fn copied(&self, at: Lsn, writer: u32) -> Self {
        Self {
            is_copy: true,
            slot: None,
            ..self.rewritten(at, writer)
        }
    }

    fn rewritten(&self, from: Lsn, writer: u32) -> Self {
        let mut server = self.clone();
        server.writers.retain(|(at, _)| *at < from);
        server.writers.push((from, writer));
        server.shutdown = false;
        server
    }

    /// What its log holds there.
    pub(super) fn content(&self, range: WalRange) -> Content {
        Content::of(&self.writers, range)
    }

    /// Up to where it sends a timeline, and whether the timeline ends there.
    pub(super) fn sends_until(&self, timeline: TimelineId) -> (Lsn, bool) {
        match self.branch.reach(timeline) {
            Reach::Until(fork) => (fork, true),
            Reach::Whole | Reach::NotAncestor => (self.end, false),
        }
    }

    /// It is told how far its WAL is durable, on a connection that uses the slot.
    pub(super) fn told(&mut self, flush: Lsn) {
        if flush > Lsn::ZERO {
            self.slot = Some(flush);
        }
    }

    /// A checkpoint removes what neither the slot keeps nor the last segment holds.
    pub(super) fn recycle(&mut self, size: SegmentSize) {
        let kept = self.slot.unwrap_or(self.end).min(self.end);
        self.oldest = self.oldest.max(size.start_of(kept));
    }

    /// The slot kept too much: all but the last segment goes.
    pub(super) fn loses_slot(&mut self, size: SegmentSize) {
        self.slot = None;
        self.oldest = self.oldest.max(size.start_of(self.end));
    }
}

/// A timeline by its number.
pub(super) fn timeline(number: u32) -> TimelineId {
    TimelineId::new(number).unwrap()
}
