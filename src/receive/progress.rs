//! How far one connection on one timeline has come. Pure.

use std::collections::BTreeMap;

use wal::{Lsn, WalRange};

/// Positions of one connection on one timeline: received >= stored >= reported.
///
/// What the repository held before this connection counts as stored only once the server has sent
/// it again, and it was found equal: a server believes any flush position, and releases commits
/// on it.
#[derive(Debug)]
pub struct Progress {
    received: Lsn,
    stored: Lsn,
    reported: Lsn,
    /// Acknowledged stretches that do not begin at or before `stored` yet.
    acknowledged: BTreeMap<Lsn, Lsn>,
    /// The end of what was stored before this connection.
    known: Lsn,
    /// A repository lacks some of what is stored: the report stands still until it is filled up.
    held: bool,
}

impl Progress {
    /// A connection that begins at `start`, with `[start, known)` in the repository already.
    pub fn new(start: Lsn, known: Lsn) -> Self {
        let mut acknowledged = BTreeMap::new();
        if known > start {
            acknowledged.insert(start, known);
        }
        Self {
            received: start,
            stored: start,
            reported: Lsn::ZERO,
            acknowledged,
            known,
            held: false,
        }
    }

    /// Everything before this was received, on this connection.
    pub fn received(&self) -> Lsn {
        self.received
    }

    /// Everything between the connection's start and this is received and acknowledged.
    pub fn stored(&self) -> Lsn {
        self.stored
    }

    /// What the server was last told.
    pub fn reported(&self) -> Lsn {
        self.reported
    }

    /// WAL up to `end` has come.
    pub fn received_to(&mut self, end: Lsn) {
        self.received = self.received.max(end);
        self.advance();
    }

    /// The repository has acknowledged a stretch.
    pub fn acknowledged(&mut self, range: WalRange) {
        let end = self.acknowledged.entry(range.start).or_insert(range.end);
        *end = (*end).max(range.end);
        self.advance();
    }

    /// The flush position to report now; zero while the repository holds what this server has not
    /// sent again.
    pub fn report(&mut self) -> Lsn {
        if self.received >= self.known && !self.held {
            self.reported = self.stored;
            assert!(self.received >= self.stored && self.stored >= self.reported);
        }
        self.reported
    }

    /// Holds the report where it stands, or lets it go on.
    pub fn hold(&mut self, held: bool) {
        self.held = held;
    }

    fn advance(&mut self) {
        if self.received < self.known {
            return;
        }
        while let Some((&start, &end)) = self.acknowledged.first_key_value() {
            if start > self.stored {
                break;
            }
            self.acknowledged.pop_first();
            // what the server has not sent on this connection is not acknowledged to it
            self.stored = self.stored.max(end.min(self.received));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, end: u64) -> WalRange {
        WalRange {
            start: Lsn::new(start),
            end: Lsn::new(end),
        }
    }

    #[test]
    fn reports_nothing_before_what_is_stored_was_sent_again() {
        let mut progress = Progress::new(Lsn::new(100), Lsn::new(200));
        progress.received_to(Lsn::new(150));
        assert_eq!(progress.report(), Lsn::ZERO);
        progress.received_to(Lsn::new(200));
        assert_eq!(progress.report(), Lsn::new(200));
    }

    #[test]
    fn a_gap_in_the_acknowledgements_holds_the_report_back() {
        let mut progress = Progress::new(Lsn::new(100), Lsn::new(100));
        progress.received_to(Lsn::new(400));
        progress.acknowledged(range(200, 300));
        assert_eq!(progress.report(), Lsn::new(100));
        progress.acknowledged(range(100, 200));
        assert_eq!(progress.report(), Lsn::new(300));
    }

    #[test]
    fn reports_nothing_more_while_a_repository_lacks_some_of_it() {
        // the server would drop WAL that only one of two repositories has, and release commits
        let mut progress = Progress::new(Lsn::new(100), Lsn::new(100));
        progress.received_to(Lsn::new(300));
        progress.acknowledged(range(100, 200));
        assert_eq!(progress.report(), Lsn::new(200));
        progress.hold(true);
        progress.acknowledged(range(200, 300));
        assert_eq!(
            (progress.stored(), progress.report()),
            (Lsn::new(300), Lsn::new(200))
        );
        progress.hold(false);
        assert_eq!(progress.report(), Lsn::new(300));
    }

    #[test]
    fn never_reports_beyond_what_this_connection_received() {
        let mut progress = Progress::new(Lsn::new(100), Lsn::new(100));
        progress.received_to(Lsn::new(150));
        progress.acknowledged(range(100, 300));
        assert_eq!(progress.report(), Lsn::new(150));
    }
}
