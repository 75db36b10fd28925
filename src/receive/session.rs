//! The rules of one connection on one timeline: events and the time in, actions out. Pure.
//!
//! The caller hands over what happened with [`Session::handle`], carries out what
//! [`Session::poll_action`] and [`Session::poll_superseded`] return until they are empty, asks [`Session::poll_store`] what is to be
//! stored when it has the bytes at hand, and comes back with [`Event::Deadline`] when
//! [`Session::deadline`] has passed.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use wal::{Lsn, SegmentSize, WalRange};

use super::pieces::{MERGED_TOGETHER, Pieces, Superseded};
use super::progress::Progress;

/// So many pieces are under way at most while the server waits for us.
const PIECES_UNDER_WAY_MAX: usize = 32;
/// No piece is larger: each is held besides the segment that it is of. What is due beyond it follows
/// in another one.
const PIECE_BYTES_MAX: u64 = 16 << 20;
/// While the server waits for us, one more piece is given to the store for each of these that the
/// last one took: writes to a distant store overlap, and those to a disk gather what comes meanwhile.
const PIECE_EVERY: Duration = Duration::from_millis(2);

/// What the rules need to know.
#[derive(Debug, Clone)]
pub struct SessionOptions {
    /// The server's WAL segment size.
    pub segment_size: SegmentSize,
    /// How long received WAL waits for more before it is stored.
    pub flush_interval: Duration,
    /// How many bytes of WAL are received before they are stored without waiting longer.
    pub piece_bytes: u64,
    /// How often the server hears from us at least.
    pub status_interval: Duration,
    /// How long a server that shuts down waits for its last WAL to be stored.
    pub shutdown_wait: Duration,
    /// Whether the server waits for us, as far as is known when the connection begins.
    pub waited: bool,
    /// Whether the server is told what only the spool has, while it does not wait for us.
    pub spool_counts: bool,
}

/// What is stored of the segment that a connection begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Before {
    /// Its start: where the connection begins.
    pub start: Lsn,
    /// `[start, known)` is stored.
    pub known: Lsn,
    /// In so many pieces.
    pub pieces: usize,
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
    /// Commits wait for us on the server, or do no longer.
    Waited(bool),
    /// Whether they do is not known, or may change without a word: until it is known, only the
    /// repository counts.
    Unsure,
    /// The repository has acknowledged a stretch.
    Stored(WalRange),
    /// The repository cannot be reached, and the spool has acknowledged a stretch.
    Spooled(WalRange),
    /// [`Session::deadline`] has passed.
    Deadline,
    /// No more WAL is taken: asked to stop. The server listens until everything is stored.
    Stop,
    /// No more WAL will come, and nobody listens: the connection is gone, or the timeline has ended.
    End,
}

/// What is to be stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Store {
    /// This stretch of the segment at hand.
    Piece(WalRange),
    /// The whole segment that has just been filled.
    Segment(WalRange),
    /// This stretch of the segment at hand, which is in pieces already; nothing waits for it.
    Merged(WalRange),
}

/// What else is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
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
    /// The server's last record is a shutdown checkpoint. It ends, or it is a standby of one that did,
    /// or has just recovered; one that ends asks us behind that record, and waits until then.
    ServerStops {
        until: Option<Instant>,
    },
    Stopping,
    Ending,
    Over,
}

/// The rules, and where they stand.
#[derive(Debug)]
#[cfg_attr(test, derive(Clone))]
pub struct Session {
    options: SessionOptions,
    progress: Progress,
    pieces: Pieces,
    before: Before,
    /// A segment that is full, and was not given to the store yet.
    full: Option<WalRange>,
    /// Everything before this is stored or was given to the store.
    given: Lsn,
    /// What was received up to here is to be stored without waiting for more.
    wanted: Lsn,
    waited: bool,
    /// When the pieces under way were given to the store.
    given_at: VecDeque<(WalRange, Instant)>,
    /// How long the last piece took.
    piece_took: Duration,
    /// When what waits is stored.
    flush_at: Option<Instant>,
    status_at: Instant,
    phase: Phase,
    actions: VecDeque<Action>,
    superseded: VecDeque<Superseded>,
}

impl Session {
    /// A connection that begins at a segment's start.
    pub fn new(options: SessionOptions, before: Before, now: Instant) -> Self {
        // the spool counts only once it is known that the server does not wait for us
        Self {
            progress: Progress::new(before.start, before.known),
            pieces: Pieces::new(options.segment_size),
            before,
            full: None,
            given: before.known.max(before.start),
            wanted: before.start,
            waited: options.waited,
            given_at: VecDeque::new(),
            piece_took: Duration::ZERO,
            flush_at: None,
            status_at: now + options.status_interval,
            phase: Phase::Streaming,
            actions: VecDeque::new(),
            superseded: VecDeque::new(),
            options,
        }
    }

    /// Nothing is stored under these names: they are taken by pieces that cannot be read, and may lie
    /// where the server sends again what was stored.
    pub fn avoid(&mut self, damaged: Vec<WalRange>) {
        self.pieces.avoid(damaged);
    }

    /// Where the connection stands.
    pub fn progress(&self) -> &Progress {
        &self.progress
    }

    /// Whether the server waits for us.
    pub fn is_waited_for(&self) -> bool {
        self.waited
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
                    self.want();
                    self.report(now);
                    if let Phase::ServerStops { until } = &mut self.phase {
                        until.get_or_insert(now + self.options.shutdown_wait);
                        self.leave_if_server_stops(now);
                    }
                }
            }
            Event::Waited(waited) => self.wait_for_us(waited),
            Event::Unsure => self.progress.count_spool(false),
            Event::Stored(range) => {
                let superseded = self.pieces.acknowledged(range);
                self.superseded.extend(superseded);
                self.progress.acknowledged(range);
                self.settled(range, now);
            }
            Event::Spooled(range) => {
                self.pieces.spooled(range);
                self.progress.in_spool(range);
                self.settled(range, now);
            }
            Event::Deadline => self.deadline_passed(now),
            Event::Stop => self.end(Phase::Stopping),
            Event::End => self.end(Phase::Ending),
        }
    }

    fn end(&mut self, phase: Phase) {
        if self.phase != Phase::Over {
            self.phase = phase;
            self.want();
            self.finish_if_stored();
        }
    }

    fn is_ending(&self) -> bool {
        matches!(self.phase, Phase::Stopping | Phase::Ending)
    }

    /// The next thing to do.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// The next piece to remove: what covers it is acknowledged.
    pub fn poll_superseded(&mut self) -> Option<Superseded> {
        self.superseded.pop_front()
    }

    /// Whether this stretch is being stored to take the place of pieces.
    pub fn is_merge(&self, range: WalRange) -> bool {
        self.pieces.is_merge(range)
    }

    /// The next stretch to store. It is of the segment that ends with, or holds, the last byte that
    /// [`Event::Wal`] told of; what is given here has to be stored, however long that takes.
    pub fn poll_store(&mut self, now: Instant) -> Option<Store> {
        if let Some(segment) = self.full.take() {
            return Some(Store::Segment(segment));
        }
        if let Some(due) = self.due_piece(now) {
            let piece = self.pieces.named_freely(due);
            // the rest follows as soon as the store takes it
            self.want();
            self.pieces.given(piece);
            self.given_at.push_back((piece, now));
            self.given = piece.end;
            self.flush_at = None;
            return Some(Store::Piece(piece));
        }
        let merge = self.merge_of_what_was_there();
        merge
            .or_else(|| self.pieces.next_merge(now))
            .map(Store::Merged)
    }

    /// When to come back with [`Event::Deadline`] at the latest; `may_store` says whether what is
    /// to be stored then could be.
    pub fn deadline(&self, may_store: bool) -> Instant {
        let mut earliest = self.status_at;
        if let Some(flush_at) = self.flush_at.filter(|_| may_store && self.may_give_piece()) {
            earliest = earliest.min(flush_at);
        }
        if let Some(merge_at) = self.pieces.merge_due_at().filter(|_| may_store) {
            earliest = earliest.min(merge_at);
        }
        if let Phase::ServerStops { until: Some(until) } = self.phase
            && self.progress.reported() < self.progress.received()
        {
            earliest = earliest.min(until);
        }
        earliest
    }

    fn wal(&mut self, end: Lsn, shutdown: bool, now: Instant) {
        assert!(
            self.full.is_none(),
            "poll_store was not asked for a full segment"
        );
        self.progress.received_to(end);
        let size = self.options.segment_size;
        if size.start_of(end) == end {
            let segment = size.range_of(Lsn::new(end.as_u64().saturating_sub(1)));
            self.pieces.segment_given(segment);
            self.full = Some(segment);
            self.given = self.given.max(end);
            self.flush_at = None;
        } else if self.given < end {
            self.flush_at
                .get_or_insert(now + self.options.flush_interval);
            if end.bytes_since(self.given) >= self.options.piece_bytes {
                self.want();
            }
        }
        if self.waited || self.is_ending() {
            self.want();
        }
        if shutdown {
            self.want();
            self.phase = Phase::ServerStops { until: None };
        } else if matches!(self.phase, Phase::ServerStops { .. }) {
            self.phase = Phase::Streaming;
        }
    }

    fn wait_for_us(&mut self, waited: bool) {
        self.waited = waited;
        let spool_counts = self.options.spool_counts && !waited;
        self.progress.count_spool(spool_counts);
        if waited {
            self.want();
        }
    }

    /// A stretch is safe, in the repository or in the spool.
    fn settled(&mut self, range: WalRange, now: Instant) {
        if let Some(at) = self.given_at.iter().position(|(given, _)| *given == range)
            && let Some((_, given_at)) = self.given_at.remove(at)
        {
            self.piece_took = now.saturating_duration_since(given_at);
        }
        self.report(now);
        if self.phase != Phase::Streaming || self.waited {
            self.want();
        }
        self.leave_if_server_stops(now);
        self.finish_if_stored();
    }

    fn deadline_passed(&mut self, now: Instant) {
        if self.status_at <= now {
            self.report(now);
        }
        self.leave_if_server_stops(now);
    }

    /// What has been received is to be stored without waiting for more.
    fn want(&mut self) {
        self.wanted = self.progress.received();
    }

    /// What waits to be stored, if it need not wait longer.
    fn due_piece(&self, now: Instant) -> Option<WalRange> {
        let received = self.progress.received();
        let due = self.given < self.wanted || self.flush_at.is_some_and(|at| at <= now);
        if !due || self.given >= received || !self.may_give_piece() {
            return None;
        }
        let segment_start = self.options.segment_size.start_of(received);
        let start = self.given.max(segment_start);
        Some(WalRange {
            start,
            end: received.min(start.saturating_add(PIECE_BYTES_MAX)),
        })
    }

    /// Whether the store is given another piece now. What comes meanwhile gathers for the next one,
    /// so a slow store gets larger pieces instead of more, unless the server waits for us.
    fn may_give_piece(&self) -> bool {
        let more = if self.waited {
            self.piece_took.as_nanos() / PIECE_EVERY.as_nanos()
        } else {
            0
        };
        let most = usize::try_from(more).map_or(PIECES_UNDER_WAY_MAX, |more| {
            (more + 1).min(PIECES_UNDER_WAY_MAX)
        });
        self.pieces.under_way() < most
    }

    /// What earlier connections left of the first segment in many pieces becomes one, once the
    /// server has sent it again.
    fn merge_of_what_was_there(&mut self) -> Option<WalRange> {
        let Before {
            start,
            known,
            pieces,
        } = self.before;
        let received = self.progress.received();
        let at_hand = received >= known && received < self.options.segment_size.end_of(start);
        if pieces <= MERGED_TOGETHER || known <= start || !at_hand {
            return None;
        }
        let range = WalRange { start, end: known };
        self.pieces.merge_given(range).then(|| {
            self.before.pieces = 1;
            range
        })
    }

    fn report(&mut self, now: Instant) {
        self.status_at = now + self.options.status_interval;
        // while it ends nobody is told any more, and nobody need be woken for it
        if !matches!(self.phase, Phase::Ending | Phase::Over) {
            self.actions
                .push_back(Action::Report(self.progress.report()));
        }
    }

    fn leave_if_server_stops(&mut self, now: Instant) {
        let Phase::ServerStops { until: Some(until) } = self.phase else {
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
        let settled = self.pieces.under_way() == 0
            && (self.progress.spooled() >= self.progress.received() || self.resending());
        if self.is_ending() && all_given && settled {
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
    use super::super::pieces::MERGED_AFTER;
    use super::*;

    const MIB: u64 = 1 << 20;

    fn session(start: u64, known: u64, now: Instant) -> Session {
        let options = SessionOptions {
            segment_size: SegmentSize::from_bytes(MIB).unwrap(),
            flush_interval: Duration::from_secs(1),
            piece_bytes: 64 * MIB,
            status_interval: Duration::from_secs(10),
            shutdown_wait: Duration::from_secs(1),
            waited: false,
            spool_counts: false,
        };
        let before = Before {
            start: Lsn::new(start),
            known: Lsn::new(known),
            pieces: 1,
        };
        Session::new(options, before, now)
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

    /// What is stored, and then what else is done.
    fn done(session: &mut Session, now: Instant) -> (Vec<Store>, Vec<Action>) {
        let stores = std::iter::from_fn(|| session.poll_store(now)).collect();
        (
            stores,
            std::iter::from_fn(|| session.poll_action()).collect(),
        )
    }

    fn report(lsn: u64) -> Action {
        Action::Report(Lsn::new(lsn))
    }

    fn piece(start: u64, end: u64) -> Store {
        Store::Piece(range(start, end))
    }

    #[test]
    fn stores_a_piece_once_the_flush_interval_has_passed() {
        let now = Instant::now();
        let mut session = session(MIB, MIB, now);
        session.handle(wal(MIB + 100), now);
        assert_eq!(done(&mut session, now), (vec![], vec![]));
        let later = now + Duration::from_secs(1);
        assert_eq!(session.deadline(true), later);
        session.handle(Event::Deadline, later);
        assert_eq!(
            done(&mut session, later),
            (vec![piece(MIB, MIB + 100)], vec![])
        );
    }

    /// What was stored may not be readable, or lie in another segment than the one that is sent.
    #[test]
    fn nothing_known_is_not_merged() {
        let now = Instant::now();
        let mut session = session(MIB, MIB, now);
        session.before.pieces = 40;
        session.handle(wal(MIB + 100), now);
        assert_eq!(done(&mut session, now).0, []);
    }

    /// A damaged piece is there under the name that what comes again would have: taken for stored, the
    /// server would let go of the only bytes that can be read.
    #[test]
    fn nothing_is_stored_under_the_name_of_what_is_damaged() {
        let now = Instant::now();
        let later = now + Duration::from_secs(1);
        let mut session = session(MIB, MIB, now);
        session.avoid(vec![range(MIB, MIB + 100), range(MIB, MIB + 50)]);
        session.handle(wal(MIB + 100), now);
        session.handle(Event::Deadline, later);
        assert_eq!(done(&mut session, later).0, [piece(MIB, MIB + 25)]);
        session.handle(Event::Stored(range(MIB, MIB + 25)), later);
        let (stores, _) = done(&mut session, later);
        assert_eq!(stores, [piece(MIB + 25, MIB + 100)]);
        session.handle(Event::Stored(range(MIB + 25, MIB + 100)), later);
        assert_eq!(session.progress().stored(), Lsn::new(MIB + 100));
    }

    /// A large segment is held whole: with a copy of nearly all of it beside it, what is held would be
    /// twice what was asked for.
    #[test]
    fn a_large_stretch_is_stored_in_several_pieces() {
        let now = Instant::now();
        let later = now + Duration::from_secs(1);
        let mut session = session(64 * MIB, 64 * MIB, now);
        session.options.segment_size = SegmentSize::from_bytes(64 * MIB).unwrap();
        session.handle(wal(104 * MIB), now);
        session.handle(Event::Deadline, later);
        let mut pieces = Vec::new();
        while let [Store::Piece(piece)] = done(&mut session, later).0.as_slice() {
            pieces.push((piece.start.as_u64() / MIB, piece.end.as_u64() / MIB));
            session.handle(Event::Stored(*piece), later);
        }
        assert_eq!(pieces, [(64, 80), (80, 96), (96, 104)]);
        assert_eq!(session.progress().stored(), Lsn::new(104 * MIB));
    }

    /// A loop that is woken for what it cannot do yet would never sleep.
    #[test]
    fn nobody_is_woken_to_store_what_is_not_at_hand() {
        let now = Instant::now();
        let mut session = session(MIB, MIB, now);
        session.handle(wal(MIB + 100), now);
        assert_eq!(session.deadline(false), now + Duration::from_secs(10));
    }

    #[test]
    fn reports_nothing_before_the_store_has_acknowledged() {
        // a commit that waits for us would return, and be lost with the server
        let now = Instant::now();
        let mut session = session(MIB, MIB, now);
        session.handle(wal(MIB + 100), now);
        session.handle(Event::Keepalive { reply: true }, now);
        assert_eq!(
            done(&mut session, now),
            (vec![piece(MIB, MIB + 100)], vec![report(MIB)])
        );
        session.handle(Event::Stored(range(MIB, MIB + 100)), now);
        assert_eq!(done(&mut session, now), (vec![], vec![report(MIB + 100)]));
    }

    #[test]
    fn a_slow_store_gets_larger_pieces_not_more_of_them() {
        let now = Instant::now();
        let later = now + Duration::from_secs(1);
        let mut session = session(MIB, MIB, now);
        session.handle(wal(MIB + 100), now);
        assert_eq!(done(&mut session, later).0, [piece(MIB, MIB + 100)]);
        session.handle(wal(MIB + 200), later);
        session.handle(wal(MIB + 300), later);
        let late = later + Duration::from_secs(2);
        session.handle(Event::Deadline, late);
        assert_eq!(done(&mut session, late), (vec![], vec![]));
        session.handle(Event::Stored(range(MIB, MIB + 100)), late);
        assert_eq!(
            done(&mut session, late),
            (vec![piece(MIB + 100, MIB + 300)], vec![report(MIB + 100)])
        );
    }

    #[test]
    fn many_pieces_of_one_segment_are_merged_and_go() {
        let now = Instant::now();
        let mut session = session(MIB, MIB, now);
        for n in 1..=u64::try_from(MERGED_TOGETHER).unwrap() {
            session.handle(wal(MIB + n * 10), now);
            session.handle(Event::Keepalive { reply: true }, now);
            let (start, end) = (MIB + (n - 1) * 10, MIB + n * 10);
            assert_eq!(done(&mut session, now).0, [piece(start, end)]);
            session.handle(Event::Stored(range(start, end)), now);
        }
        let merged = range(MIB, MIB + 160);
        assert_eq!(done(&mut session, now).0, []);
        let later = session.deadline(true);
        assert_eq!(later, now + MERGED_AFTER);
        session.handle(Event::Deadline, later);
        assert_eq!(done(&mut session, later).0, [Store::Merged(merged)]);
        session.handle(Event::Stored(merged), later);
        assert_eq!(done(&mut session, later).0, []);
        let gone: Vec<_> = std::iter::from_fn(|| session.poll_superseded()).collect();
        assert_eq!(gone.len(), MERGED_TOGETHER);
        assert!(gone.iter().all(|gone| gone.by == merged), "{gone:?}");
    }

    #[test]
    fn what_many_connections_left_in_pieces_is_merged() {
        let now = Instant::now();
        let mut session = session(MIB, MIB + 500, now);
        session.before.pieces = MERGED_TOGETHER + 1;
        session.handle(wal(MIB + 499), now);
        assert_eq!(done(&mut session, now).0, []);
        session.handle(wal(MIB + 510), now);
        let merge = Store::Merged(range(MIB, MIB + 500));
        assert_eq!(done(&mut session, now).0, [merge]);
        session.handle(wal(MIB + 520), now);
        assert_eq!(done(&mut session, now).0, []);
    }

    #[test]
    fn what_a_server_waits_for_is_stored_at_once() {
        let now = Instant::now();
        let mut session = session(MIB, MIB, now);
        session.handle(wal(MIB + 100), now);
        session.handle(Event::Waited(true), now);
        assert_eq!(done(&mut session, now).0, [piece(MIB, MIB + 100)]);
        // a fast store: what comes meanwhile gathers
        session.handle(wal(MIB + 200), now);
        assert_eq!(done(&mut session, now).0, []);
        let took = now + PIECE_EVERY * 2;
        session.handle(Event::Stored(range(MIB, MIB + 100)), took);
        let second = piece(MIB + 100, MIB + 200);
        assert_eq!(
            done(&mut session, took),
            (vec![second], vec![report(MIB + 100)])
        );
        // a distant one: writes overlap
        session.handle(wal(MIB + 300), took);
        assert_eq!(done(&mut session, took).0, [piece(MIB + 200, MIB + 300)]);
        // acknowledged out of order, reported in order
        session.handle(Event::Stored(range(MIB + 200, MIB + 300)), took);
        assert_eq!(done(&mut session, took).1, [report(MIB + 100)]);
        session.handle(Event::Stored(range(MIB + 100, MIB + 200)), took);
        assert_eq!(done(&mut session, took).1, [report(MIB + 300)]);
    }

    #[test]
    fn enough_bytes_are_stored_before_the_flush_interval_has_passed() {
        let now = Instant::now();
        let mut session = session(MIB, MIB, now);
        session.options.piece_bytes = 1000;
        session.handle(wal(MIB + 999), now);
        assert_eq!(done(&mut session, now).0, []);
        session.handle(wal(MIB + 1000), now);
        assert_eq!(done(&mut session, now).0, [piece(MIB, MIB + 1000)]);
    }

    #[test]
    fn what_is_in_the_spool_is_not_reported_but_lets_a_stop_end() {
        let now = Instant::now();
        let mut session = session(MIB, MIB, now);
        session.handle(wal(MIB + 100), now);
        session.handle(Event::Keepalive { reply: true }, now);
        done(&mut session, now);
        session.handle(Event::Spooled(range(MIB, MIB + 100)), now);
        assert_eq!(done(&mut session, now), (vec![], vec![report(MIB)]));
        session.handle(Event::End, now);
        assert_eq!(done(&mut session, now).1, [Action::Finished]);
    }

    #[test]
    fn a_server_that_waits_for_us_is_not_told_what_only_the_spool_has() {
        let now = Instant::now();
        let mut session = session(MIB, MIB, now);
        session.options.spool_counts = true;
        session.handle(Event::Waited(true), now);
        session.handle(wal(MIB + 100), now);
        done(&mut session, now);
        session.handle(Event::Spooled(range(MIB, MIB + 100)), now);
        assert_eq!(done(&mut session, now).1, [report(MIB)]);
        session.handle(Event::Waited(false), now);
        session.handle(Event::Keepalive { reply: true }, now);
        assert_eq!(done(&mut session, now).1, [report(MIB + 100)]);
    }

    #[test]
    fn the_spool_does_not_count_while_nobody_knows_whether_commits_wait() {
        // the connection that says so is cut, and the stream made a synchronous standby meanwhile
        let now = Instant::now();
        let mut session = session(MIB, MIB, now);
        session.options.spool_counts = true;
        session.handle(Event::Waited(false), now);
        session.handle(Event::Unsure, now);
        session.handle(wal(MIB + 100), now);
        let later = now + Duration::from_secs(1);
        session.handle(Event::Deadline, later);
        done(&mut session, later);
        session.handle(Event::Spooled(range(MIB, MIB + 100)), later);
        assert_eq!(done(&mut session, later).1, [report(MIB)]);
        session.handle(Event::Waited(false), later);
        session.handle(Event::Keepalive { reply: true }, later);
        assert_eq!(done(&mut session, later).1, [report(MIB + 100)]);
    }

    #[test]
    fn a_full_segment_is_stored_whole() {
        let now = Instant::now();
        let mut session = session(MIB, MIB, now);
        session.handle(wal(MIB + 100), now);
        session.handle(wal(2 * MIB), now);
        let segment = range(MIB, 2 * MIB);
        assert_eq!(
            done(&mut session, now),
            (vec![Store::Segment(segment)], vec![])
        );
        session.handle(Event::Stored(segment), now);
        assert_eq!(done(&mut session, now).1, [report(2 * MIB)]);
    }

    #[test]
    fn an_end_waits_for_the_last_byte() {
        let now = Instant::now();
        let mut session = session(MIB, MIB, now);
        session.handle(wal(MIB + 100), now);
        session.handle(Event::End, now);
        assert_eq!(
            done(&mut session, now),
            (vec![piece(MIB, MIB + 100)], vec![])
        );
        session.handle(Event::Stored(range(MIB, MIB + 100)), now);
        assert_eq!(done(&mut session, now), (vec![], vec![Action::Finished]));
    }

    #[test]
    fn an_end_while_the_server_sends_again_needs_nothing_stored() {
        let now = Instant::now();
        let mut session = session(MIB, MIB + 500, now);
        session.handle(wal(MIB + 100), now);
        session.handle(Event::Keepalive { reply: true }, now);
        session.handle(Event::End, now);
        assert_eq!(
            done(&mut session, now),
            (vec![], vec![report(0), Action::Finished])
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
        done(&mut session, now);
        session.handle(Event::Keepalive { reply: true }, now);
        session.handle(Event::Stored(range(MIB, MIB + 100)), now);
        assert!(!done(&mut session, now).1.contains(&Action::Disconnect));
        let later = session.deadline(true) + Duration::from_mins(1);
        session.handle(Event::Deadline, later);
        let (_, actions) = done(&mut session, later);
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
            done(&mut session, at);
            let next = session.deadline(true);
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
        session.handle(Event::Keepalive { reply: true }, now);
        assert_eq!(
            done(&mut session, now),
            (vec![piece(MIB, MIB + 100)], vec![report(MIB)])
        );
        session.handle(Event::Deadline, now + Duration::from_secs(1));
        assert_eq!(done(&mut session, now).1, [Action::Disconnect]);
        session.handle(
            Event::Stored(range(MIB, MIB + 100)),
            now + Duration::from_secs(9),
        );
        assert_eq!(done(&mut session, now).1, [Action::Finished]);
    }

    #[test]
    fn a_shutdown_record_without_a_question_is_no_shutdown() {
        // a standby whose primary was stopped, or a primary that has just recovered: one connection
        // after another would be given up, for as long as nothing is written
        let now = Instant::now();
        let mut session = session(MIB, MIB, now);
        let end = Lsn::new(MIB + 100);
        session.handle(
            Event::Wal {
                end,
                shutdown: true,
            },
            now,
        );
        done(&mut session, now);
        let later = now + Duration::from_mins(1);
        session.handle(Event::Deadline, later);
        assert_eq!(done(&mut session, later).1, [report(MIB)]);
    }

    #[test]
    fn a_stop_tells_the_server_on_until_everything_is_stored() {
        // its commits would wait for what is stored, and its patience with us end
        let now = Instant::now();
        let mut session = session(MIB, MIB, now);
        session.handle(wal(MIB + 100), now);
        session.handle(Event::Keepalive { reply: true }, now);
        done(&mut session, now);
        session.handle(wal(MIB + 200), now);
        session.handle(Event::Stop, now);
        done(&mut session, now);
        let later = session.deadline(true);
        session.handle(Event::Deadline, later);
        assert_eq!(done(&mut session, later), (vec![], vec![report(MIB)]));
        session.handle(Event::Stored(range(MIB, MIB + 100)), later);
        let rest = piece(MIB + 100, MIB + 200);
        assert_eq!(
            done(&mut session, later),
            (vec![rest], vec![report(MIB + 100)])
        );
        session.handle(Event::Stored(range(MIB + 100, MIB + 200)), later);
        let end = vec![report(MIB + 200), Action::Finished];
        assert_eq!(done(&mut session, later), (vec![], end));
    }
}
