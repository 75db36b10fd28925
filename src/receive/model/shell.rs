//! What the shell does around the rules of one connection, step by step, without a socket.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use wal::{Lsn, SegmentSize, TimelineId, WalRange};

use super::content::Content;
use super::server::Server;
use super::tally::{Seen, Tally};
use crate::receive::pieces::Superseded;
use crate::receive::session::{Action, Before, Event, Session, SessionOptions, Store};

/// So much WAL is held at most, besides one segment.
const UNSTORED_BYTES_MAX: u64 = 3 << 20;
/// So many pieces are under way at most.
const UNDER_WAY_MAX: usize = 32;

/// Why no more WAL will come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    Stopped,
    Lost,
    NextTimeline,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Piece,
    Segment,
    Merge,
}

/// What the store was given and has not acknowledged.
#[derive(Debug, Clone)]
pub(super) struct Job {
    pub(super) kind: Kind,
    pub(super) content: Content,
    number: u64,
}

/// What the rules want of the world.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wants {
    /// Tell the server.
    Tell(Lsn),
    /// Go.
    Leave,
}

/// One connection.
#[derive(Debug, Clone)]
#[expect(clippy::struct_excessive_bools, reason = "as the shell has them")]
pub(super) struct Shell {
    pub(super) server: usize,
    pub(super) timeline: TimelineId,
    pub(super) before: Before,
    pub(super) session: Session,
    pub(super) options: SessionOptions,
    size: SegmentSize,
    /// What is stored of the first segment, or what its parent has there.
    known: Option<Content>,
    pub(super) connected: bool,
    /// The server has sent everything up to here.
    pub(super) sent: Lsn,
    gathered: VecDeque<(Lsn, bool)>,
    pub(super) lent: bool,
    reply_wanted: bool,
    pub(super) jobs: Vec<Job>,
    next_job: u64,
    pub(super) ended: Option<End>,
    told_end: bool,
    pub(super) finished: bool,
    pub(super) held: bool,
    /// What the server was told last.
    pub(super) told: Lsn,
    /// Everything up to here is stored or was given to the store.
    given: Lsn,
    ungiven_since: Option<Instant>,
    /// The server wants an answer, and what has come up to here stored at once.
    asked_for: Lsn,
    pub(super) reported_at: Instant,
    /// The last record is a shutdown checkpoint.
    ends_with_shutdown: bool,
    /// The server waits until then, if nothing follows.
    shuts_down_at: Option<Instant>,
}

/// What a connection begins with.
pub(super) struct Beginning {
    pub(super) server: usize,
    pub(super) timeline: TimelineId,
    pub(super) before: Before,
    pub(super) known: Option<Content>,
    pub(super) options: SessionOptions,
}

impl Shell {
    pub(super) fn new(beginning: Beginning, now: Instant) -> Self {
        let Beginning {
            server,
            timeline,
            before,
            known,
            options,
        } = beginning;
        Self {
            server,
            timeline,
            before,
            session: Session::new(options.clone(), before, now),
            size: options.segment_size,
            options,
            known,
            connected: true,
            sent: before.start,
            gathered: VecDeque::new(),
            lent: false,
            reply_wanted: false,
            jobs: Vec::new(),
            next_job: 0,
            ended: None,
            told_end: false,
            finished: false,
            held: false,
            told: Lsn::ZERO,
            given: before.known.max(before.start),
            ungiven_since: None,
            asked_for: Lsn::ZERO,
            reported_at: now,
            ends_with_shutdown: false,
            shuts_down_at: None,
        }
    }

    pub(super) fn received(&self) -> Lsn {
        self.session.progress().received()
    }

    /// Whether the shell reads from the server now.
    pub(super) fn is_reading(&self) -> bool {
        let received = self.received();
        let at_hand = received.bytes_since(self.size.start_of(received));
        let unstored: u64 = self
            .jobs
            .iter()
            .map(|job| job.content.range().len_bytes())
            .sum();
        let held = unstored + at_hand + self.sent.bytes_since(received);
        self.connected && self.ended.is_none() && (unstored == 0 || held < UNSTORED_BYTES_MAX)
    }

    /// The server sends what follows, up to `end`.
    pub(super) fn hears_wal(&mut self, end: Lsn, shutdown: bool) {
        self.sent = end;
        self.gathered.push_back((end, shutdown));
    }

    pub(super) fn hears_keepalive(&mut self, reply: bool, now: Instant, tally: &mut Tally) {
        self.session.handle(Event::Keepalive { reply }, now);
        if reply {
            self.is_asked(now);
            self.asked_for = self.received();
        }
        if reply && !self.is_all_verified() {
            self.reply_wanted = true;
            tally.count(Seen::ReplyLater);
        }
    }

    /// The server wants an answer: behind a shutdown checkpoint, because it ends.
    fn is_asked(&mut self, now: Instant) {
        if self.ends_with_shutdown {
            let until = now + self.options.shutdown_wait;
            self.shuts_down_at.get_or_insert(until);
        }
    }

    fn is_all_verified(&self) -> bool {
        self.gathered.is_empty() && !self.lent
    }

    /// One turn of the loop; `lends` says that what came is verified elsewhere. `Err`: two histories.
    pub(super) fn turn(
        &mut self,
        server: &Server,
        lends: bool,
        now: Instant,
        tally: &mut Tally,
    ) -> Result<Vec<Wants>, Lsn> {
        if !self.gathered.is_empty() && !self.lent {
            if lends {
                self.lent = true;
                tally.count(Seen::Lent);
            } else {
                self.take_back(server, now, tally)?;
            }
        }
        if self.ended.is_some() && !self.told_end && self.is_all_verified() {
            self.told_end = true;
            let event = match self.ended {
                Some(End::Stopped) => Event::Stop,
                _ => Event::End,
            };
            self.session.handle(event, now);
        }
        self.store_what_is_due(server, now, tally);
        let mut wants = Vec::new();
        while let Some(action) = self.session.poll_action() {
            assert!(!self.finished, "{action:?} after the end");
            match action {
                Action::Report(lsn) => {
                    self.reported_at = now;
                    wants.push(Wants::Tell(lsn));
                }
                Action::Disconnect => {
                    assert!(
                        self.shuts_down_at.is_some_and(|at| at <= now),
                        "left too early"
                    );
                    self.ended.get_or_insert(End::Lost);
                    self.connected = false;
                    wants.push(Wants::Leave);
                }
                Action::Finished => self.finish(tally),
            }
        }
        if self.ended == Some(End::Lost) {
            self.connected = false;
        }
        Ok(wants)
    }

    /// What was verified elsewhere comes back.
    pub(super) fn verified(
        &mut self,
        server: &Server,
        now: Instant,
        tally: &mut Tally,
    ) -> Result<(), Lsn> {
        self.lent = false;
        self.take_back(server, now, tally)
    }

    fn take_back(&mut self, server: &Server, now: Instant, tally: &mut Tally) -> Result<(), Lsn> {
        while let Some((end, shutdown)) = self.gathered.pop_front() {
            // within a segment only the end counts
            if end != self.size.start_of(end) && !self.gathered.is_empty() {
                continue;
            }
            while self.received() < end {
                let part = self.size.end_of(self.received()).min(end);
                self.take(server, part, shutdown && part == end, now, tally)?;
            }
        }
        if std::mem::take(&mut self.reply_wanted) {
            self.session.handle(Event::Keepalive { reply: true }, now);
            self.is_asked(now);
        }
        Ok(())
    }

    fn take(
        &mut self,
        server: &Server,
        end: Lsn,
        shutdown: bool,
        now: Instant,
        tally: &mut Tally,
    ) -> Result<(), Lsn> {
        let range = WalRange::new(self.received(), end);
        let content = server.content(range);
        if let Some(known) = &self.known
            && !known.agrees_with(&content)
        {
            return Err(range.start);
        }
        self.session.handle(Event::Wal { end, shutdown }, now);
        self.ends_with_shutdown = shutdown;
        self.shuts_down_at = None;
        if self.size.start_of(end) == end {
            self.known = None;
            let segment = self.size.range_of(range.start);
            let due = self.session.poll_store(now);
            assert_eq!(due, Some(Store::Segment(segment)), "a full segment");
            self.given = self.given.max(end);
            self.give(Kind::Segment, server.content(segment), tally);
        }
        if self.given < end {
            self.ungiven_since.get_or_insert(now);
        } else {
            self.ungiven_since = None;
        }
        Ok(())
    }

    fn store_what_is_due(&mut self, server: &Server, now: Instant, tally: &mut Tally) {
        if self.lent {
            return;
        }
        for _ in 0..100 {
            let under_way = self.under_way();
            let Some(store) = self.session.poll_store(now) else {
                return;
            };
            let (kind, range) = match store {
                Store::Piece(range) => (Kind::Piece, range),
                Store::Merged(range) => (Kind::Merge, range),
                Store::Segment(range) => panic!("{range} was given before, or is not at hand"),
            };
            let at_hand = WalRange::new(self.size.start_of(self.received()), self.received());
            assert!(
                !range.is_empty() && at_hand.covers(range),
                "{range} is not at hand"
            );
            if kind == Kind::Piece {
                assert_eq!(
                    range.start,
                    self.given.max(at_hand.start),
                    "a gap, or twice"
                );
                assert!(under_way < UNDER_WAY_MAX, "too many pieces under way");
                let waited = self.session.is_waited_for();
                assert!(
                    under_way == 0 || waited,
                    "a slow store is given more pieces"
                );
                if under_way > 0 {
                    tally.count(Seen::Overlapping);
                }
                self.given = range.end;
                self.ungiven_since = None;
            }
            self.give(kind, server.content(range), tally);
        }
        panic!("there is no end to what is to be stored");
    }

    fn give(&mut self, kind: Kind, content: Content, tally: &mut Tally) {
        tally.count(match kind {
            Kind::Piece => Seen::Piece,
            Kind::Segment => Seen::Segment,
            Kind::Merge => Seen::Merged,
        });
        let number = self.next_job;
        self.next_job += 1;
        self.jobs.push(Job {
            kind,
            content,
            number,
        });
    }

    fn under_way(&self) -> usize {
        let pieces = self.jobs.iter().filter(|job| job.kind == Kind::Piece);
        pieces.count()
    }

    /// The store, or the spool, has acknowledged one: it, and what may go now.
    pub(super) fn job_done(
        &mut self,
        at: usize,
        spooled: bool,
        now: Instant,
        tally: &mut Tally,
    ) -> (Job, Vec<Superseded>) {
        let first = self.jobs.iter().map(|job| job.number).min();
        let job = self.jobs.remove(at);
        if first.is_some_and(|first| first < job.number) {
            tally.count(Seen::OutOfOrder);
        }
        let range = job.content.range();
        let event = if spooled {
            Event::Spooled(range)
        } else {
            Event::Stored(range)
        };
        let superseded = self.tell_stored(event, now);
        (job, superseded)
    }

    pub(super) fn tell_stored(&mut self, event: Event, now: Instant) -> Vec<Superseded> {
        self.session.handle(event, now);
        std::iter::from_fn(|| self.session.poll_superseded()).collect()
    }

    fn finish(&mut self, tally: &mut Tally) {
        let progress = self.session.progress();
        assert!(self.told_end || !self.connected, "finished before the end");
        assert!(
            progress.received() <= self.before.known || progress.spooled() == progress.received(),
            "finished with bytes that are not stored"
        );
        let needed = self.jobs.iter().any(|job| {
            let is_new = job.content.range().end > self.before.known;
            is_new && job.kind != Kind::Merge
        });
        assert!(!needed, "finished while something is under way");
        if progress.received() < self.before.known {
            tally.count(Seen::Resending);
        }
        self.finished = true;
        tally.count(Seen::Finished);
    }

    /// When the shell wakes at the latest.
    pub(super) fn deadline(&self) -> Instant {
        self.session.deadline(!self.lent)
    }

    /// What must hold after each turn.
    pub(super) fn check(&self, now: Instant) {
        let progress = self.session.progress();
        assert!(
            progress.received() >= progress.spooled()
                && progress.spooled() >= progress.stored()
                && progress.stored() >= self.before.start,
            "out of order: {progress:?}"
        );
        assert!(
            progress.reported() <= progress.received(),
            "reported what has not come"
        );
        let resent = progress.received() >= self.before.known;
        assert!(
            resent || progress.stored() == self.before.start,
            "counted before it was sent again: {progress:?}"
        );
        if self.finished {
            return;
        }
        let is_heard = self.connected && (!self.told_end || self.ended == Some(End::Stopped));
        let silent = now.saturating_duration_since(self.reported_at);
        assert!(
            !is_heard || silent <= self.options.status_interval,
            "the server did not hear from us for {silent:?}"
        );
        assert!(self.deadline() > now, "a loop that never sleeps");
        let is_behind = progress.reported() < progress.received();
        let waits = self.shuts_down_at.is_some_and(|at| at <= now && is_behind);
        let is_open = self.connected && !self.told_end;
        assert!(
            !(is_open && waits),
            "a server that shuts down is kept waiting"
        );
        self.check_given(now);
    }

    /// WAL waits for nothing but a store that has enough, and no longer than it should.
    fn check_given(&self, now: Instant) {
        let Some(since) = self
            .ungiven_since
            .filter(|_| !self.lent && self.under_way() == 0)
        else {
            return;
        };
        let waited = now.saturating_duration_since(since);
        assert!(
            waited < self.options.flush_interval,
            "not stored for {waited:?}"
        );
        assert!(
            !self.session.is_waited_for(),
            "commits wait for what is not being stored"
        );
        assert!(
            self.given >= self.asked_for,
            "a reply is wanted, and it is not stored"
        );
        assert!(!self.told_end, "an end that nothing is stored for");
        let bytes = self.received().bytes_since(self.given);
        assert!(
            bytes < self.options.piece_bytes,
            "{bytes} bytes wait to be stored"
        );
    }
}

/// The rules' settings of the model.
pub(super) fn options(size: SegmentSize, waited: bool, spool_counts: bool) -> SessionOptions {
    SessionOptions {
        segment_size: size,
        flush_interval: Duration::from_secs(1),
        piece_bytes: 256 << 10,
        status_interval: Duration::from_secs(10),
        shutdown_wait: Duration::from_secs(2),
        waited,
        spool_counts,
    }
}
