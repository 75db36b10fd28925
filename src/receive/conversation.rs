//! One connection on one timeline: copies from the server's socket, hands stretches to the store,
//! and tells the server how far they are durable, as the [`Session`] decides.

use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::SignedDuration;
use replication::stream::{StatusUpdate, StreamError, StreamEvent, WalStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use wal::{
    Body, Lsn, Major, PgTime, Record, SegmentName, SegmentSize, Segmenter, TimelineId, Verdict,
    Verifier, WalRange, WalkerStart,
};

use super::contact::Contact;
use super::ended::{Ended, stopped, stream_failed};
use super::known::Known;
use super::moments::Asked;
use super::options::ReceiverOptions;
use super::session::{Action, Event, Session, SessionOptions};
use crate::clock::Clock;
use crate::error::{Error, Result, chain};
use crate::repository::layout::ObjectName;
use crate::repository::records::{Hole, Tip};
use crate::repository::{Acknowledge, EncodedWal, Repository, RepositoryError, Stored, stretch};
use crate::retry::Backoff;
use crate::server::{self, Moment, ServerFacts};

/// The server hears from us this often at least, whatever its `wal_sender_timeout` is.
const STATUS_INTERVAL_MAX: Duration = Duration::from_secs(10);
/// A server that has not said anything for so long, though it was asked to, is gone.
const SILENCE_MAX: Duration = Duration::from_mins(1);
/// How long a server gets to answer our good-bye.
const FAREWELL: Duration = Duration::from_secs(1);
/// A commit is stamped before its record is written: moments are counted this much earlier.
const COMMIT_STAMP_ALLOWANCE: SignedDuration = SignedDuration::from_secs(1);

/// A job for the store has come to its end.
enum JobDone {
    /// The stretch is durable.
    Stored(Arc<EncodedWal>, Stored),
    /// Clean-up and hints, on which nothing depends.
    Aside,
}

/// One connection's state besides the rules'.
pub(super) struct Conversation<'a> {
    options: &'a ReceiverOptions,
    clock: Arc<dyn Clock>,
    repository: Repository,
    size: SegmentSize,
    timeline: TimelineId,
    major: Option<Major>,
    session: Session,
    verifier: Verifier,
    /// What was stored of the first segment before this connection.
    known: Known,
    /// The bytes of the segment at hand, from its beginning.
    segment: Vec<u8>,
    segment_start: Lsn,
    unstored_bytes: u64,
    /// The last segment in which something could not be verified.
    unverified_segment: Option<Lsn>,
    /// The newest moment that waits for its position to be stored.
    moment: Option<Moment>,
    tip: Option<Tip>,
    /// When the server last said anything.
    heard_at: Instant,
    jobs: JoinSet<Result<JobDone, RepositoryError>>,
}

impl<'a> Conversation<'a> {
    /// A conversation that begins where `contact` says, with what is stored there to compare with.
    pub(super) async fn new(
        contact: &Contact,
        options: &'a ReceiverOptions,
        clock: Arc<dyn Clock>,
    ) -> Result<Self> {
        let Contact {
            facts,
            repository,
            at,
            ..
        } = contact;
        let size = facts.segment_size;
        let segment = SegmentName::of(at.timeline, at.start, size);
        let known = if at.known > at.start {
            Known::of(repository, segment, size).await?
        } else {
            Known::nothing()
        };
        // what was listed and cannot be put together from the beginning is received again
        let known_end = known.end(at.start);
        let now = Instant::now();
        let session_options = session_options(options, facts);
        Ok(Self {
            session: Session::new(session_options, at.start, known_end.min(at.known), now),
            verifier: primed_verifier(contact).await?,
            major: Major::ALL
                .into_iter()
                .find(|major| major.number() == facts.major),
            known,
            segment_start: at.start,
            segment: Vec::new(),
            unstored_bytes: 0,
            unverified_segment: None,
            moment: None,
            tip: None,
            heard_at: now,
            jobs: JoinSet::new(),
            options,
            clock,
            repository: repository.clone(),
            size,
            timeline: at.timeline,
        })
    }

    pub(super) async fn run(
        mut self,
        stream: WalStream,
        mut moments: mpsc::Receiver<Asked>,
        mut whole: watch::Receiver<bool>,
        mut stop: watch::Receiver<bool>,
    ) -> Result<Ended> {
        self.hold_unless_whole();
        let mut stream = Some(stream);
        let mut ended: Option<Ended> = None;
        let mut stop_deadline: Option<Instant> = None;
        let mut reading = true;
        loop {
            while let Some(action) = self.session.poll_action() {
                match action {
                    Action::StorePiece(range) => self.store_piece(range)?,
                    Action::StoreSegment(range) => self.store_segment(range)?,
                    Action::Report(flush) => {
                        if let Some(stream) = &mut stream {
                            stream.queue_status(self.status(flush));
                        }
                    }
                    Action::Disconnect => {
                        stream = None;
                        let why = "the server shuts down";
                        ended.get_or_insert_with(|| Ended::Lost(why.to_owned()));
                    }
                    Action::Finished => {
                        let left = stop_deadline.map(|until| until - Instant::now());
                        self.finish(stream, left).await?;
                        return Ok(ended.unwrap_or(Ended::Stopped));
                    }
                }
            }
            if matches!(ended, Some(Ended::Lost(_))) {
                stream = None;
            }
            let was_reading = std::mem::replace(
                &mut reading,
                ended.is_none() && self.unstored_bytes < self.options.unstored_bytes_max,
            );
            if reading && !was_reading {
                // it was we who did not listen
                self.heard_at = Instant::now();
            }
            let mut deadline = self.session.deadline();
            if reading {
                deadline = deadline.min(self.heard_at + SILENCE_MAX);
            }
            let deadline = stop_deadline.map_or(deadline, |stop| stop.min(deadline));
            tokio::select! {
                event = pump(&mut stream, reading) => {
                    self.heard_at = Instant::now();
                    if let Some(reason) = self.heard(event)? {
                        ended.get_or_insert(reason);
                        self.session.handle(Event::End, Instant::now());
                    }
                }
                Some(done) = self.jobs.join_next() => self.job_done(done)?,
                Some(asked) = moments.recv() => match asked {
                    Asked::Moment(moment) => {
                        self.moment = Some(moment);
                        self.advance_tip();
                    }
                    // the server shuts down, perhaps, and we do not read: it must not wait for a
                    // store that is slower than it should wait
                    Asked::Lost if !reading && ended.is_none() => {
                        ended = Some(Ended::Lost("the server closed its connections".to_owned()));
                        self.session.handle(Event::End, Instant::now());
                    }
                    Asked::Lost => {}
                },
                Ok(()) = whole.changed() => self.hold_unless_whole(),
                () = stopped(&mut stop), if stop_deadline.is_none() => {
                    tracing::info!("stopping: storing what was received");
                    stop_deadline = Some(Instant::now() + self.options.stop_timeout);
                    ended = Some(Ended::Stopped);
                    self.session.handle(Event::End, Instant::now());
                }
                () = tokio::time::sleep_until(deadline.into()) => {
                    let now = Instant::now();
                    if stop_deadline.is_some_and(|stop| stop <= now) {
                        return Err(Error::failure(format!(
                            "stopped before everything was stored: first LSN not stored is {} \
                             on timeline {}",
                            self.session.progress().stored(),
                            self.timeline
                        ))
                        .hint("the server still has it, and sends it again to the next stream"));
                    }
                    if reading && self.heard_at + SILENCE_MAX <= now {
                        let why = format!("it was silent for {} s", SILENCE_MAX.as_secs());
                        ended = Some(Ended::Lost(why));
                        self.session.handle(Event::End, now);
                        continue;
                    }
                    self.session.handle(Event::Deadline, now);
                }
            }
        }
    }

    /// Where every repository must hold what is acknowledged, and one lacks something, the server
    /// is told nothing more until that is filled up.
    fn hold_unless_whole(&mut self) {
        if self.repository.acknowledge() == Acknowledge::All {
            self.session
                .hold(!self.repository.is_whole(), Instant::now());
        }
    }

    /// Takes what the server sent. Says so where the conversation is over.
    fn heard(&mut self, event: Result<StreamEvent, StreamError>) -> Result<Option<Ended>> {
        match event {
            Ok(StreamEvent::Wal { start, bytes, .. }) => {
                for part in Segmenter::new(self.size).cut(start, &bytes) {
                    self.take(part.range, part.bytes)?;
                }
                Ok(None)
            }
            Ok(StreamEvent::Keepalive {
                reply_requested, ..
            }) => {
                self.session.handle(
                    Event::Keepalive {
                        reply: reply_requested,
                    },
                    Instant::now(),
                );
                Ok(None)
            }
            Ok(StreamEvent::TimelineEnd { next, at }) => {
                tracing::info!(
                    "timeline {} ended at {at}: following timeline {next}",
                    self.timeline
                );
                Ok(Some(Ended::NextTimeline))
            }
            Ok(StreamEvent::ServerClosed) => {
                Ok(Some(Ended::Lost("the server shut down".to_owned())))
            }
            Err(error) => stream_failed(&error).map(Some),
        }
    }

    /// Takes a stretch of one segment: compares, verifies, keeps.
    fn take(&mut self, range: WalRange, bytes: &[u8]) -> Result<()> {
        self.compare_with_known(bytes)?;
        let records = self.verifier.push(bytes);
        self.note_minimal_wal(&records);
        self.segment.extend_from_slice(bytes);
        self.note_damage(range);
        let shutdown = records
            .last()
            .is_some_and(|last| self.ends_with_shutdown(last, range.end));
        let now = Instant::now();
        self.session.handle(
            Event::Wal {
                end: range.end,
                shutdown,
            },
            now,
        );
        // a full segment is handed to the store before the next one begins
        if self.size.start_of(range.end) == range.end {
            while let Some(action) = self.session.poll_action() {
                match action {
                    Action::StoreSegment(range) => self.store_segment(range)?,
                    Action::StorePiece(range) => self.store_piece(range)?,
                    // nothing else can wait here: actions are carried out after every event
                    Action::Report(_) | Action::Disconnect | Action::Finished => {}
                }
            }
        }
        Ok(())
    }

    /// Compares what has come, and is at the end of `segment` now, with what is stored of it.
    fn compare_with_known(&mut self, bytes: &[u8]) -> Result<()> {
        if let Some(lsn) = self.known.differs(self.segment_start, &self.segment, bytes) {
            return Err(Error::damaged(format!(
                "two histories: this server's WAL differs from what is stored at {lsn} on \
                 timeline {}",
                self.timeline
            ))
            .hint(
                "the server was set back, or another one stored here: give this one its own \
                 --cluster name and take a backup",
            ));
        }
        Ok(())
    }

    fn note_damage(&mut self, range: WalRange) {
        let Verdict::Unverified { from, reason } = self.verifier.verdict_for(range) else {
            return;
        };
        if self.unverified_segment == Some(self.segment_start) {
            return;
        }
        self.unverified_segment = Some(self.segment_start);
        tracing::error!(
            "WAL cannot be verified from {from} on timeline {}: {reason}; it is stored as it came. \
             hint: take a backup now, and check the server's disk",
            self.timeline
        );
        self.record_unusable(from, format!("it could not be verified: {reason}"));
    }

    /// A server that ran with `wal_level=minimal` left changes out of its WAL: recovery refuses to
    /// go on there, so the window ends.
    fn note_minimal_wal(&mut self, records: &[Record]) {
        let Some(major) = self.major else { return };
        for record in records
            .iter()
            .filter(|record| record.header.rmgr == wal::record::rmgr::XLOG)
        {
            if let Ok(Body::ParameterChange { wal_level: 0, .. }) = record.body(major) {
                tracing::error!(
                    "the server ran with wal_level=minimal from {} on: moments since then cannot be \
                     restored. hint: take a backup now",
                    record.start
                );
                self.record_unusable(
                    record.start,
                    "the server ran with wal_level=minimal".to_owned(),
                );
            }
        }
    }

    /// Notes that the window ends there, as it does at a hole.
    fn record_unusable(&mut self, from: Lsn, reason: String) {
        let hole = Hole {
            timeline: self.timeline,
            start: from,
            end: self.size.end_of(from),
            found_at: self.clock.now(),
            reason,
            unverified: true,
        };
        let repository = self.repository.clone();
        self.jobs.spawn(async move {
            if let Err(error) = repository.record_hole(&hole).await {
                tracing::error!("that WAL is unverified was not recorded: {}", chain(&error));
            }
            Ok(JobDone::Aside)
        });
    }

    fn ends_with_shutdown(&self, last: &Record, end: Lsn) -> bool {
        let checkpoint = self.major.and_then(|major| last.body(major).ok());
        last.next >= end && matches!(checkpoint, Some(Body::Checkpoint { shutdown: true, .. }))
    }

    fn store_piece(&mut self, range: WalRange) -> Result<()> {
        let segment = SegmentName::of(self.timeline, range.start, self.size);
        let bytes = stretch(&self.segment, self.segment_start, range).ok_or_else(|| {
            Error::failure(format!(
                "no bytes at hand for {} to {}",
                range.start, range.end
            ))
        })?;
        let plain = bytes.to_vec();
        self.store(ObjectName::Piece { segment, range }, range, plain);
        Ok(())
    }

    fn store_segment(&mut self, range: WalRange) -> Result<()> {
        let plain = std::mem::take(&mut self.segment);
        if range.start != self.segment_start || u64::try_from(plain.len()) != Ok(range.len_bytes())
        {
            return Err(Error::failure(format!(
                "no whole segment at hand at {}",
                range.start
            )));
        }
        self.segment_start = range.end;
        self.known = Known::nothing();
        let segment = SegmentName::of(self.timeline, range.start, self.size);
        self.store(ObjectName::Segment(segment), range, plain);
        Ok(())
    }

    fn store(&mut self, name: ObjectName, range: WalRange, plain: Vec<u8>) {
        self.unstored_bytes = self.unstored_bytes.saturating_add(range.len_bytes());
        let checked = self.verifier.check(range, plain);
        let repository = self.repository.clone();
        let (timeline, size) = (self.timeline, self.size);
        self.jobs.spawn(async move {
            let wal = repository.encode_wal(name, timeline, size, checked).await?;
            let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(15));
            loop {
                match repository.put_wal(&wal).await {
                    Ok(stored) => return Ok(JobDone::Stored(wal, stored)),
                    Err(error) if error.is_unreachable() => {
                        tracing::warn!("cannot store WAL, trying again: {}", chain(&error));
                        backoff.wait().await;
                    }
                    Err(error) => return Err(error),
                }
            }
        });
    }

    fn job_done(
        &mut self,
        done: Result<Result<JobDone, RepositoryError>, tokio::task::JoinError>,
    ) -> Result<()> {
        let done = done.map_err(|error| Error::failure(format!("a store job failed: {error}")))?;
        let JobDone::Stored(wal, stored) = done? else {
            return Ok(());
        };
        let range = wal.checked.range();
        if stored == Stored::Partly {
            self.hold_unless_whole();
        }
        self.unstored_bytes = self.unstored_bytes.saturating_sub(range.len_bytes());
        self.session.handle(Event::Stored(range), Instant::now());
        self.advance_tip();
        let supersedes = match &wal.name {
            ObjectName::Segment(segment) => Some(*segment),
            ObjectName::Piece { segment, .. } if range.start == self.size.start_of(range.start) => {
                Some(*segment)
            }
            _ => None,
        };
        if let Some(segment) = supersedes {
            let repository = self.repository.clone();
            self.jobs.spawn(async move {
                match repository.remove_superseded_pieces(segment, &wal).await {
                    Err(error) if error.is_unreachable() => {
                        tracing::warn!("superseded pieces stay for now: {}", chain(&error));
                        Ok(JobDone::Aside)
                    }
                    other => other.map(|()| JobDone::Aside),
                }
            });
        }
        Ok(())
    }

    /// Rewrites the tip once the position of the newest moment is stored.
    fn advance_tip(&mut self) {
        let stored = self.session.progress().stored();
        let Some(moment) = self.moment else { return };
        let reached = match moment.insert_lsn {
            Some(lsn) => server::without_page_header(lsn, self.size) <= stored,
            None => true,
        };
        if !reached || stored == Lsn::ZERO {
            return;
        }
        self.moment = None;
        let moment = moment
            .insert_lsn
            .map(|_primary| moment.time - COMMIT_STAMP_ALLOWANCE);
        let tip = Tip {
            lsn: stored,
            confirmed_at: self.clock.now(),
            moment,
        };
        if self.tip.as_ref().is_some_and(|last| last.lsn > tip.lsn) {
            return;
        }
        self.tip = Some(tip.clone());
        let repository = self.repository.clone();
        let timeline = self.timeline;
        self.jobs.spawn(async move {
            if let Err(error) = repository.write_tip(timeline, &tip).await {
                tracing::warn!("the tip was not rewritten: {}", chain(&error));
            }
            Ok(JobDone::Aside)
        });
    }

    /// Tells the server the last position, and lets hints and clean-up come to their end.
    /// `left` is the time that a stop leaves for it; `None` where this is not the end.
    async fn finish(&mut self, stream: Option<WalStream>, left: Option<Duration>) -> Result<()> {
        if left.is_some() && !self.repository.is_whole() {
            tracing::warn!(
                "stopped while a repository lacks what another one has: the next stream, or the next \
                 backup, fills it up"
            );
        }
        if let Some(mut stream) = stream.filter(|_| left.is_some()) {
            let flush = self.session.final_report();
            stream.queue_status(self.status(flush));
            let farewell = async {
                stream.flush().await?;
                stream.stop().await.map(drop)
            };
            if let Ok(Err(error)) = tokio::time::timeout(FAREWELL, farewell).await {
                tracing::debug!("the server did not take our leave: {}", chain(&error));
            }
        }
        let rest = async {
            while let Some(done) = self.jobs.join_next().await {
                self.job_done(done)?;
            }
            Ok(())
        };
        match left {
            None => rest.await,
            // all WAL is stored; hints and clean-up may be left
            Some(left) => tokio::time::timeout(left, rest).await.unwrap_or(Ok(())),
        }
    }

    fn status(&self, flush: Lsn) -> StatusUpdate {
        let now = self.clock.now();
        // remote_write must tell the truth too: nothing counts before it is in the repository
        StatusUpdate {
            write: flush,
            flush,
            apply: Lsn::ZERO,
            // a server that lives answers at once
            reply_requested: self.heard_at.elapsed() >= SILENCE_MAX / 4,
            now: PgTime::from_unix_micros(now.as_microsecond()),
        }
    }
}

/// The next event where we read; what is queued is sent in either case, so that the server hears
/// from us also while back-pressure keeps us from reading.
async fn pump(stream: &mut Option<WalStream>, reading: bool) -> Result<StreamEvent, StreamError> {
    match stream {
        Some(stream) if reading => stream.next().await,
        Some(stream) => {
            stream.flush().await?;
            std::future::pending().await
        }
        None => std::future::pending().await,
    }
}

/// The rules' settings for this server.
fn session_options(options: &ReceiverOptions, facts: &ServerFacts) -> SessionOptions {
    let quarter = match facts.wal_sender_timeout_ms {
        0 => STATUS_INTERVAL_MAX,
        timeout => Duration::from_millis((timeout / 4).max(1)),
    };
    SessionOptions {
        segment_size: facts.segment_size,
        flush_interval: options.flush_interval,
        status_interval: quarter.min(STATUS_INTERVAL_MAX),
        shutdown_wait: options.shutdown_wait,
    }
}

/// A verifier that has seen the segment before, where that is stored: so the record that goes on
/// from it is checked too, and a first record that does not follow on the last stored is noticed.
async fn primed_verifier(contact: &Contact) -> Result<Verifier> {
    let Contact {
        facts,
        repository,
        at,
        ..
    } = contact;
    let size = facts.segment_size;
    let verifier = |start| {
        Verifier::new(WalkerStart {
            at: start,
            segment_size: size,
            major: None,
            timeline: at.timeline,
            system_id: Some(facts.system_id),
            skip_to: None,
        })
    };
    let before = size.start_of(at.start.saturating_sub(1));
    if before < at.start {
        let name = ObjectName::Segment(SegmentName::of(at.timeline, before, size));
        match repository.fetch(&name).await {
            Ok(fetched) => {
                let mut primed = verifier(before);
                primed.push(&fetched.plain);
                if primed.damage().is_none() && primed.position() == at.start {
                    return Ok(primed);
                }
            }
            Err(error) if error.is_not_found() => {}
            Err(error) if error.lacks_key() || error.is_damaged_key() => {
                tracing::info!(
                    "the record that goes on at {} is not checked: an archiver without an identity \
                     cannot read what was stored before",
                    at.start
                );
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(verifier(at.start))
}
