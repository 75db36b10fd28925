//! The rules of one connection on one timeline: events and the time in, actions out. Pure.
//!
//! The caller hands over what happened with [`Session::handle`], carries out what
//! [`Session::poll_action`] returns until that is empty, and comes back with [`Event::Deadline`]
//! when [`Session::deadline`] has passed.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use wal::{Lsn, SegmentSize, WalRange};

use super::progress::Progress;

/// After so many pieces of one segment the next one is stored from the segment's beginning, so
/// that a segment that takes days to fill does not leave thousands of them.
const PIECES_MAX: u32 = 32;

/// What the rules need to know.
#[derive(Debug, Clone)]
pub struct SessionOptions {
    /// The server's WAL segment size.
    pub segment_size: SegmentSize,
    /// How long received WAL waits for more before it is stored.
    pub flush_interval: Duration,
    /// How often the server hears from us at least.
    pub status_interval: Duration,
    /// How long a server that shuts down waits for its last WAL to be stored.
    pub shutdown_wait: Duration,
}

/// What can happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// WAL has come; within one segment, and following what came before.
    Wal {
        /// Its end.
        end: Lsn,
        /// Whether its last record is a shutdown checkpoint, and nothing follows.
        shutdown: bool,
    },
    /// The server shows that it is there.
    Keepalive {
        /// Whether it wants an answer at once.
        reply: bool,
    },
    /// The repository has acknowledged a stretch.
    Stored(WalRange),
    /// [`Session::deadline`] has passed.
    Deadline,
    /// No more WAL will come: asked to stop, the connection is gone, or the timeline has ended.
    End,
}

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Store this stretch of the segment at hand.
    StorePiece(WalRange),
    /// Store the whole segment that has just been filled.
    StoreSegment(WalRange),
    /// Tell the server how far WAL is durable.
    Report(Lsn),
    /// Close the connection: the server shuts down, and our store is slower than it should wait.
    Disconnect,
    /// Everything that was received is stored.
    Finished,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Streaming,
    /// The server's last record is a shutdown checkpoint; it waits for us until then.
    ServerStops {
        until: Instant,
    },
    Ending,
    Over,
}

/// The rules, and where they stand.
#[derive(Debug)]
pub struct Session {
    options: SessionOptions,
    progress: Progress,
    /// Everything before this is stored or was given to the store.
    given: Lsn,
    piece_in_flight: Option<WalRange>,
    /// Pieces of the segment at hand since one was stored from its beginning.
    pieces: u32,
    /// When what waits is stored.
    flush_at: Option<Instant>,
    status_at: Instant,
    phase: Phase,
    actions: VecDeque<Action>,
}

impl Session {
    /// A connection that begins at `start` (a segment's start), with `[start, known)` stored.
    pub fn new(options: SessionOptions, start: Lsn, known: Lsn, now: Instant) -> Self {
        Self {
            progress: Progress::new(start, known),
            given: known.max(start),
            piece_in_flight: None,
            pieces: 0,
            flush_at: None,
            status_at: now + options.status_interval,
            phase: Phase::Streaming,
            actions: VecDeque::new(),
            options,
        }
    }

    /// Where the connection stands.
    pub fn progress(&self) -> &Progress {
        &self.progress
    }

    /// Holds what the server is told where it stands, or lets it go on and says so at once.
    pub fn hold(&mut self, held: bool, now: Instant) {
        self.progress.hold(held);
        if !held {
            self.report(now);
        }
    }

    /// The last thing to tell the server, once [`Action::Finished`] has come.
    pub fn final_report(&mut self) -> Lsn {
        self.progress.report()
    }

    /// Takes note of what happened.
    pub fn handle(&mut self, event: Event, now: Instant) {
        match event {
            Event::Wal { end, shutdown } => self.wal(end, shutdown, now),
            Event::Keepalive { reply } => {
                if reply {
                    // the server waits for what it has sent: store it now, answer at once
                    self.store_piece();
                    self.report(now);
                }
            }
            Event::Stored(range) => self.stored(range, now),
            Event::Deadline => self.deadline_passed(now),
            Event::End => {
                if self.phase != Phase::Over {
                    self.phase = Phase::Ending;
                    self.store_piece();
                    self.finish_if_stored();
                }
            }
        }
    }

    /// The next thing to do.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// When to come back with [`Event::Deadline`] at the latest.
    pub fn deadline(&self) -> Instant {
        let mut earliest = self.status_at;
        if let Some(flush_at) = self.flush_at.filter(|_| self.piece_in_flight.is_none()) {
            earliest = earliest.min(flush_at);
        }
        if let Phase::ServerStops { until } = self.phase
            && self.progress.reported() < self.progress.received()
        {
            earliest = earliest.min(until);
        }
        earliest
    }

    fn wal(&mut self, end: Lsn, shutdown: bool, now: Instant) {
        self.progress.received_to(end);
        let segment_start = self
            .options
            .segment_size
            .start_of(Lsn::new(end.as_u64().saturating_sub(1)));
        if self.options.segment_size.start_of(end) == end {
            self.actions.push_back(Action::StoreSegment(WalRange {
                start: segment_start,
                end,
            }));
            self.given = self.given.max(end);
            self.flush_at = None;
            self.pieces = 0;
        } else if self.given < end && self.flush_at.is_none() {
            self.flush_at = Some(now + self.options.flush_interval);
        }
        if shutdown {
            self.store_piece();
            self.phase = Phase::ServerStops {
                until: now + self.options.shutdown_wait,
            };
            self.leave_if_server_stops(now);
        } else if matches!(self.phase, Phase::ServerStops { .. }) {
            self.phase = Phase::Streaming;
        }
    }

    fn stored(&mut self, range: WalRange, now: Instant) {
        if self.piece_in_flight == Some(range) {
            self.piece_in_flight = None;
        }
        self.progress.acknowledged(range);
        self.report(now);
        let urgent = self.phase != Phase::Streaming;
        if urgent || self.flush_at.is_some_and(|at| at <= now) {
            self.store_piece();
        }
        self.leave_if_server_stops(now);
        self.finish_if_stored();
    }

    fn deadline_passed(&mut self, now: Instant) {
        if self.flush_at.is_some_and(|at| at <= now) {
            self.store_piece();
        }
        if self.status_at <= now {
            self.report(now);
        }
        self.leave_if_server_stops(now);
    }

    /// Gives what waits to the store, one piece at a time: what comes meanwhile gathers for the
    /// next one, so a slow store gets larger pieces instead of more.
    fn store_piece(&mut self) {
        let received = self.progress.received();
        if self.piece_in_flight.is_some() || self.given >= received {
            return;
        }
        let segment_start = self.options.segment_size.start_of(received);
        let merge = self.pieces >= PIECES_MAX;
        let start = if merge {
            segment_start
        } else {
            self.given.max(segment_start)
        };
        self.pieces = if merge { 1 } else { self.pieces + 1 };
        let range = WalRange {
            start,
            end: received,
        };
        self.piece_in_flight = Some(range);
        self.given = received;
        self.flush_at = None;
        self.actions.push_back(Action::StorePiece(range));
    }

    fn report(&mut self, now: Instant) {
        if matches!(self.phase, Phase::Streaming | Phase::ServerStops { .. }) {
            self.status_at = now + self.options.status_interval;
            self.actions
                .push_back(Action::Report(self.progress.report()));
        } else {
            // nobody is told any more, and nobody need be woken for it
            self.status_at = now + self.options.status_interval;
        }
    }

    fn leave_if_server_stops(&mut self, now: Instant) {
        let Phase::ServerStops { until } = self.phase else {
            return;
        };
        // what it was told counts, not what is stored: it may be held back for another repository
        if until <= now && self.progress.reported() < self.progress.received() {
            self.phase = Phase::Ending;
            self.actions.push_back(Action::Disconnect);
            self.finish_if_stored();
        }
    }

    fn finish_if_stored(&mut self) {
        // given, not stored: what was stored before this connection needs no second copy
        let all_given = self.given >= self.progress.received();
        let settled = self.piece_in_flight.is_none()
            && (self.progress.stored() >= self.progress.received() || self.resending());
        if self.phase == Phase::Ending && all_given && settled {
            self.phase = Phase::Over;
            self.actions.push_back(Action::Finished);
        }
    }

    /// Whether the server is still sending what was stored before this connection.
    fn resending(&self) -> bool {
        self.given > self.progress.received()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn session(start: u64, known: u64, now: Instant) -> Session {
        let options = SessionOptions {
            segment_size: SegmentSize::from_bytes(MIB).unwrap(),
            flush_interval: Duration::from_secs(1),
            status_interval: Duration::from_secs(10),
            shutdown_wait: Duration::from_secs(1),
        };
        Session::new(options, Lsn::new(start), Lsn::new(known), now)
    }

    fn range(start: u64, end: u64) -> WalRange {
        WalRange {
            start: Lsn::new(start),
            end: Lsn::new(end),
        }
    }

    fn wal(end: u64) -> Event {
        Event::Wal {
            end: Lsn::new(end),
            shutdown: false,
        }
    }

    fn actions(session: &mut Session) -> Vec<Action> {
        std::iter::from_fn(|| session.poll_action()).collect()
    }

    #[test]
    fn stores_a_piece_once_the_flush_interval_has_passed() {
        let now = Instant::now();
        let mut session = session(MIB, MIB, now);
        session.handle(wal(MIB + 100), now);
        assert_eq!(actions(&mut session), []);
        assert_eq!(session.deadline(), now + Duration::from_secs(1));
        session.handle(Event::Deadline, now + Duration::from_secs(1));
        assert_eq!(
            actions(&mut session),
            [Action::StorePiece(range(MIB, MIB + 100))]
        );
    }

    #[test]
    fn reports_nothing_before_the_store_has_acknowledged() {
        // a commit that waits for us would return, and be lost with the server
        let now = Instant::now();
        let mut session = session(MIB, MIB, now);
        session.handle(wal(MIB + 100), now);
        session.handle(Event::Keepalive { reply: true }, now);
        assert_eq!(
            actions(&mut session),
            [
                Action::StorePiece(range(MIB, MIB + 100)),
                Action::Report(Lsn::new(MIB))
            ]
        );
        session.handle(Event::Stored(range(MIB, MIB + 100)), now);
        assert_eq!(actions(&mut session), [Action::Report(Lsn::new(MIB + 100))]);
    }

    #[test]
    fn a_slow_store_gets_larger_pieces_not_more_of_them() {
        let now = Instant::now();
        let later = now + Duration::from_secs(1);
        let mut session = session(MIB, MIB, now);
        session.handle(wal(MIB + 100), now);
        session.handle(Event::Deadline, later);
        session.handle(wal(MIB + 200), later);
        session.handle(wal(MIB + 300), later);
        session.handle(Event::Deadline, later + Duration::from_secs(2));
        assert_eq!(
            actions(&mut session),
            [Action::StorePiece(range(MIB, MIB + 100))]
        );
        session.handle(
            Event::Stored(range(MIB, MIB + 100)),
            later + Duration::from_secs(2),
        );
        assert_eq!(
            actions(&mut session),
            [
                Action::Report(Lsn::new(MIB + 100)),
                Action::StorePiece(range(MIB + 100, MIB + 300))
            ]
        );
    }

    #[test]
    fn many_pieces_of_one_segment_are_merged() {
        let now = Instant::now();
        let mut session = session(MIB, MIB, now);
        for n in 1..=u64::from(PIECES_MAX) + 1 {
            session.handle(wal(MIB + n * 10), now);
            session.handle(Event::Keepalive { reply: true }, now);
            let Some(Action::StorePiece(piece)) = session.poll_action() else {
                panic!("no piece")
            };
            let merged = n > u64::from(PIECES_MAX);
            assert_eq!(
                piece.start.as_u64(),
                if merged { MIB } else { MIB + (n - 1) * 10 }
            );
            session.handle(Event::Stored(piece), now);
            actions(&mut session);
        }
    }

    #[test]
    fn a_full_segment_is_stored_whole() {
        let now = Instant::now();
        let mut session = session(MIB, MIB, now);
        session.handle(wal(MIB + 100), now);
        session.handle(wal(2 * MIB), now);
        assert_eq!(
            actions(&mut session),
            [Action::StoreSegment(range(MIB, 2 * MIB))]
        );
        session.handle(Event::Stored(range(MIB, 2 * MIB)), now);
        assert_eq!(actions(&mut session), [Action::Report(Lsn::new(2 * MIB))]);
    }

    #[test]
    fn an_end_waits_for_the_last_byte() {
        let now = Instant::now();
        let mut session = session(MIB, MIB, now);
        session.handle(wal(MIB + 100), now);
        session.handle(Event::End, now);
        assert_eq!(
            actions(&mut session),
            [Action::StorePiece(range(MIB, MIB + 100))]
        );
        session.handle(Event::Stored(range(MIB, MIB + 100)), now);
        assert_eq!(actions(&mut session), [Action::Finished]);
    }

    #[test]
    fn an_end_while_the_server_sends_again_needs_nothing_stored() {
        let now = Instant::now();
        let mut session = session(MIB, MIB + 500, now);
        session.handle(wal(MIB + 100), now);
        session.handle(Event::Keepalive { reply: true }, now);
        session.handle(Event::End, now);
        assert_eq!(
            actions(&mut session),
            [Action::Report(Lsn::ZERO), Action::Finished]
        );
    }

    #[test]
    fn a_server_that_shuts_down_does_not_wait_for_what_is_held_back() {
        // one of two repositories is away: the other has it all, and the server is told nothing
        let now = Instant::now();
        let mut session = session(MIB, MIB, now);
        session.hold(true, now);
        session.handle(
            Event::Wal {
                end: Lsn::new(MIB + 100),
                shutdown: true,
            },
            now,
        );
        session.handle(Event::Stored(range(MIB, MIB + 100)), now);
        assert!(!actions(&mut session).contains(&Action::Disconnect));
        let later = session.deadline() + Duration::from_mins(1);
        session.handle(Event::Deadline, later);
        let actions = actions(&mut session);
        let end = [Action::Disconnect, Action::Finished];
        assert!(actions.ends_with(&end), "{actions:?}");
    }

    #[test]
    fn nobody_is_woken_for_a_status_that_nobody_is_sent() {
        // a loop that never sleeps, for as long as the store is away
        let now = Instant::now();
        let mut session = session(MIB, MIB, now);
        session.handle(wal(MIB + 100), now);
        session.handle(Event::End, now);
        let mut at = now;
        for _ in 0..3 {
            let next = session.deadline();
            assert!(next > at, "woken at once");
            session.handle(Event::Deadline, next);
            at = next;
        }
    }

    #[test]
    fn a_server_that_shuts_down_waits_no_longer_than_it_should() {
        let now = Instant::now();
        let mut session = session(MIB, MIB, now);
        session.handle(
            Event::Wal {
                end: Lsn::new(MIB + 100),
                shutdown: true,
            },
            now,
        );
        assert_eq!(
            actions(&mut session),
            [Action::StorePiece(range(MIB, MIB + 100))]
        );
        session.handle(Event::Deadline, now + Duration::from_secs(1));
        assert_eq!(actions(&mut session), [Action::Disconnect]);
        session.handle(
            Event::Stored(range(MIB, MIB + 100)),
            now + Duration::from_secs(9),
        );
        assert_eq!(actions(&mut session), [Action::Finished]);
    }
}
