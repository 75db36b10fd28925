//! How far one connection on one timeline has come. Pure.

use std::collections::BTreeMap;

use wal::{Lsn, WalRange};

/// Positions of one connection on one timeline: received >= spooled >= stored, and nothing is
/// reported that is not stored, or spooled where that is what counts.
///
/// What the repository held before this connection counts as stored only once the server has sent
/// it again, and it was found equal: a server believes any flush position, and releases commits
/// on it.
#[derive(Debug)]
#[cfg_attr(test, derive(Clone))]
pub struct Progress {
    received: Lsn,
    /// Acknowledged by the repository.
    stored: Front,
    /// Acknowledged by the repository or by the spool.
    spooled: Front,
    reported: Lsn,
    /// The end of what was stored before this connection.
    known: Lsn,
    /// Whether the server is told what only the spool has.
    spool_counts: bool,
    /// A repository lacks some of what is stored: the report stands still until it is filled up.
    held: bool,
}

/// Everything before a position was acknowledged, and some stretches behind it.
#[derive(Debug)]
#[cfg_attr(test, derive(Clone))]
struct Front {
    position: Lsn,
    /// Acknowledged stretches that do not begin at or before the position yet.
    ahead: BTreeMap<Lsn, Lsn>,
}

impl Front {
    fn new(start: Lsn, known: Lsn) -> Self {
        let mut ahead = BTreeMap::new();
        if known > start {
            ahead.insert(start, known);
        }
        Self {
            position: start,
            ahead,
        }
    }

    fn add(&mut self, range: WalRange) {
        let end = self.ahead.entry(range.start).or_insert(range.end);
        *end = (*end).max(range.end);
    }

    /// Moves on over what is acknowledged, as far as `received`: what the server has not sent on
    /// this connection is not acknowledged to it.
    fn advance(&mut self, received: Lsn) {
        while let Some(first) = self.ahead.first_entry() {
            let (start, end) = (*first.key(), *first.get());
            if start > self.position {
                break;
            }
            self.position = self.position.max(end.min(received));
            if end > received {
                break;
            }
            first.remove();
        }
    }
}

impl Progress {
    /// A connection that begins at `start`, with `[start, known)` in the repository already.
    pub fn new(start: Lsn, known: Lsn) -> Self {
        Self {
            received: start,
            stored: Front::new(start, known),
            spooled: Front::new(start, known),
            reported: Lsn::ZERO,
            known,
            spool_counts: false,
            held: false,
        }
    }

    /// Everything before this was received, on this connection.
    pub fn received(&self) -> Lsn {
        self.received
    }

    /// Everything between the connection's start and this is received and in the repository.
    pub fn stored(&self) -> Lsn {
        self.stored.position
    }

    /// Everything between the connection's start and this is received, and in the repository or in
    /// the spool.
    pub fn spooled(&self) -> Lsn {
        self.spooled.position
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
        self.stored.add(range);
        self.in_spool(range);
    }

    /// The spool has acknowledged a stretch.
    pub fn in_spool(&mut self, range: WalRange) {
        self.spooled.add(range);
        self.advance();
    }

    /// The flush position to report now; zero while the repository holds what this server has not
    /// sent again.
    pub fn report(&mut self) -> Lsn {
        if self.received >= self.known && !self.held {
            let durable = if self.spool_counts {
                self.spooled()
            } else {
                self.stored()
            };
            self.reported = self.reported.max(durable);
            assert!(self.received >= self.spooled() && self.spooled() >= self.stored());
            assert!(self.spooled() >= self.reported);
        }
        self.reported
    }

    /// Whether the server is told from now on what only the spool has.
    pub fn count_spool(&mut self, counts: bool) {
        self.spool_counts = counts;
    }

    /// Holds the report where it stands, or lets it go on.
    pub fn hold(&mut self, held: bool) {
        self.held = held;
    }

    fn advance(&mut self) {
        if self.received >= self.known {
            self.stored.advance(self.received);
            self.spooled.advance(self.received);
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

    /// What the repository holds beyond what has come is not forgotten.
    #[test]
    fn what_was_acknowledged_beyond_what_has_come_counts_when_it_comes() {
        let mut progress = Progress::new(Lsn::new(100), Lsn::new(100));
        progress.received_to(Lsn::new(150));
        progress.acknowledged(range(100, 300));
        progress.received_to(Lsn::new(250));
        assert_eq!(progress.report(), Lsn::new(250));
    }

    #[test]
    fn the_spool_is_reported_only_where_it_counts() {
        let mut progress = Progress::new(Lsn::new(100), Lsn::new(100));
        progress.received_to(Lsn::new(300));
        progress.acknowledged(range(100, 150));
        progress.in_spool(range(150, 200));
        assert_eq!(progress.report(), Lsn::new(150));
        progress.count_spool(true);
        assert_eq!(progress.report(), Lsn::new(200));
        // a synchronous standby now: what was said is not taken back
        progress.count_spool(false);
        progress.in_spool(range(200, 250));
        assert_eq!(progress.report(), Lsn::new(200));
        progress.acknowledged(range(150, 230));
        assert_eq!(progress.report(), Lsn::new(230));
    }
}
