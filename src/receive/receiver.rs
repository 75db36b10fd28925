//! The shell around the rules: one loop that copies from the server's socket, hands stretches to
//! the store, and tells the server how far they are durable.

use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::SignedDuration;
use replication::connection::Connection;
use replication::conninfo::ConnectionSettings;
use replication::slots::{SlotState, read_slot, reserve_slot};
use replication::stream::{Started, StatusUpdate, StreamError, StreamEvent, WalStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use wal::{
    Body, Lsn, Major, PgTime, Record, SegmentName, SegmentSize, Segmenter, TimelineHistory,
    TimelineId, Verdict, Verifier, WalRange, WalkerStart,
};

use super::resume::{ResumeAt, resume_at, skip_removed};
use super::session::{Action, Event, Session, SessionOptions};
use crate::clock::Clock;
use crate::error::{Error, Kind, Result, chain};
use crate::repository::destination::{Destination, OpenDestination};
use crate::repository::layout::ObjectName;
use crate::repository::records::{Hole, Tip};
use crate::repository::{EncodedWal, Repository, RepositoryError, ServerIdentity, stretch};
use crate::retry::Backoff;
use crate::server::{self, Moment, ServerFacts};

/// The server hears from us this often at least, whatever its `wal_sender_timeout` is.
const STATUS_INTERVAL_MAX: Duration = Duration::from_secs(10);
/// A slot that another connection holds is often our own last one, which the server has not
/// missed yet: it is waited for this long.
const SLOT_WAIT: Duration = Duration::from_secs(90);
/// How long a server gets to answer our good-bye.
const FAREWELL: Duration = Duration::from_secs(1);
/// A commit is stamped before its record is written: moments are counted this much earlier.
const COMMIT_STAMP_ALLOWANCE: SignedDuration = SignedDuration::from_secs(1);

/// What the receiver needs to know.
#[derive(Debug, Clone)]
pub struct ReceiverOptions {
    /// The replication slot; `None` streams without one.
    pub slot: Option<String>,
    /// How long received WAL waits before it is stored.
    pub flush_interval: Duration,
    /// How often the tip is rewritten at most.
    pub tip_interval: Duration,
    /// How long a server that shuts down waits for us.
    pub shutdown_wait: Duration,
    /// How long a stop may take.
    pub stop_timeout: Duration,
    /// How much WAL may be held in memory for the store, besides one segment; in bytes.
    pub unstored_bytes_max: u64,
    /// Take the cluster's name for a system that is new under it.
    pub new_system: bool,
}

impl Default for ReceiverOptions {
    fn default() -> Self {
        Self {
            slot: None,
            flush_interval: Duration::from_secs(1),
            tip_interval: Duration::from_secs(10),
            shutdown_wait: Duration::from_secs(1),
            stop_timeout: Duration::from_secs(30),
            unstored_bytes_max: 128 << 20,
            new_system: false,
        }
    }
}

/// Receives the WAL of one cluster until it is stopped.
pub struct Receiver {
    settings: ConnectionSettings,
    destination: OpenDestination,
    options: ReceiverOptions,
    clock: Arc<dyn Clock>,
}

/// Why the conversation with a server ended.
enum Ended {
    /// We were asked to stop, and everything is stored.
    Stopped,
    /// The timeline ended: go on with the next one at once.
    NextTimeline,
    /// The server or the connection went away.
    Lost(String),
    /// The server no longer has what would follow.
    Removed,
}

/// A server that was met: connections, what it said, and where to go on.
struct Contact {
    replication: Connection,
    sql: Connection,
    facts: ServerFacts,
    repository: Repository,
    at: ResumeAt,
    /// From here on the server can send WAL for certain.
    available: Lsn,
}

impl Receiver {
    /// A receiver for the server behind `settings`.
    pub fn new(
        settings: ConnectionSettings,
        destination: &Destination,
        options: ReceiverOptions,
        clock: Arc<dyn Clock>,
    ) -> Result<Self> {
        Ok(Self {
            settings,
            destination: destination.open(true)?,
            options,
            clock,
        })
    }

    /// Receives until `stop` says so. The first contact must succeed; later ones are tried again
    /// for as long as the server or the repository is only unreachable.
    pub async fn run(self, mut stop: watch::Receiver<bool>) -> Result<()> {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(10));
        let mut met = false;
        let mut removed = false;
        loop {
            let outcome = self.once(removed, &mut met, stop.clone()).await;
            removed = false;
            match outcome {
                Ok((Ended::Stopped, _)) => return Ok(()),
                Ok((Ended::NextTimeline, _)) => {}
                Ok((Ended::Removed, _)) => removed = true,
                Ok((Ended::Lost(reason), lasted)) => {
                    tracing::warn!("lost the server, trying again: {reason}");
                    if lasted > Duration::from_secs(30) {
                        backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(10));
                    }
                }
                Err(error) if met && error.kind() == Kind::Unreachable => {
                    tracing::warn!("{}", error.message());
                }
                Err(error) => return Err(error),
            }
            tokio::select! {
                () = backoff.wait() => {}
                () = stopped(&mut stop) => return Ok(()),
            }
        }
    }

    async fn once(
        &self,
        removed: bool,
        met: &mut bool,
        stop: watch::Receiver<bool>,
    ) -> Result<(Ended, Duration)> {
        let since = Instant::now();
        let mut asked = stop.clone();
        let mut contact = tokio::select! {
            contact = self.contact(*met) => contact?,
            () = stopped(&mut asked) => return Ok((Ended::Stopped, Duration::ZERO)),
        };
        *met = true;
        if removed {
            self.record_removed(&mut contact).await?;
        }
        let ended = self.converse(contact, stop).await?;
        Ok((ended, since.elapsed()))
    }

    /// Meets the server: reads its facts, prepares the slot, and finds where to go on.
    async fn contact(&self, met: bool) -> Result<Contact> {
        let mut replication = server::connect_replication(&self.settings).await?;
        let facts = ServerFacts::read(&mut replication).await?;
        facts.check()?;
        let identity = ServerIdentity {
            system_id: facts.system_id,
            major: facts.major,
            block_bytes: facts.block_bytes,
        };
        let new_system = self.options.new_system;
        let repository = self.destination.repository(identity, new_system).await?;
        let mut sql = server::connect_sql(&self.settings).await?;
        let kept = match &self.options.slot {
            Some(slot) => Some(self.prepare_slot(&mut replication, &mut sql, slot).await?),
            None => None,
        };
        if !met && self.options.slot.is_some() && facts.max_slot_wal_keep_size == "-1" {
            tracing::warn!(
                "max_slot_wal_keep_size is unlimited: if this archiver stays away, WAL fills the \
                 server's disk. hint: ALTER SYSTEM SET max_slot_wal_keep_size = '100GB'; \
                 SELECT pg_reload_conf(); or drop the slot when you are done: anywhen slot drop"
            );
        }
        let branch = store_histories(&mut replication, &repository, facts.timeline).await?;
        let stored = stored_ends(&repository, facts.segment_size).await?;
        let available = kept.unwrap_or(facts.flushed);
        let at = resume_at(&branch, &stored, available, facts.segment_size).map_err(|error| {
            Error::usage(error.to_string()).hint(
                "connect to the current primary; if this server is meant to go its own way, give \
                 it another --cluster name",
            )
        })?;
        Ok(Contact {
            replication,
            sql,
            facts,
            repository,
            at,
            available,
        })
    }

    /// Makes sure that the slot is there and keeps WAL; says from where on.
    async fn prepare_slot(
        &self,
        replication: &mut Connection,
        sql: &mut Connection,
        slot: &str,
    ) -> Result<Lsn> {
        let failed = |error| server::slot_error(&format!("use replication slot {slot}"), &error);
        let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(5));
        let waiting_since = Instant::now();
        loop {
            match read_slot(sql, slot).await.map_err(failed)? {
                SlotState::Ready { restart, .. } => return Ok(restart),
                SlotState::Absent => {
                    let made = replication.create_physical_slot(slot, false, true).await;
                    made.map_err(failed)?;
                    tracing::info!("created replication slot {slot}");
                }
                SlotState::Unreserved => {
                    tracing::warn!("slot {slot} kept no WAL: reserving from now on");
                    return reserve_slot(sql, slot).await.map_err(failed);
                }
                SlotState::Active { pid, .. } if waiting_since.elapsed() < SLOT_WAIT => {
                    tracing::info!("slot {slot} is in use by process {pid}: waiting");
                    backoff.wait().await;
                }
                SlotState::Active { pid, .. } => {
                    return Err(Error::failure(format!(
                        "replication slot {slot} is in use: pid={pid}"
                    ))
                    .hint("is another `anywhen stream` running? choose another name with --slot"));
                }
                SlotState::NotPhysical => {
                    return Err(Error::usage(format!("slot {slot} is a logical slot"))
                        .hint("choose another name with --slot"));
                }
                SlotState::Lost { why } => {
                    return Err(Error::failure(format!(
                        "the server gave up slot {slot}, and WAL with it: {why}"
                    ))
                    .hint("anywhen slot drop, start the stream again, and take a backup"));
                }
            }
        }
    }

    /// Notes the hole that removed WAL leaves, and goes on behind it.
    async fn record_removed(&self, contact: &mut Contact) -> Result<()> {
        let size = contact.facts.segment_size;
        let skipped = skip_removed(contact.at, contact.available, size)
            .or_else(|| skip_removed(contact.at, contact.facts.flushed, size));
        let Some((range, next)) = skipped else {
            return Err(Error::failure(format!(
                "the server no longer has WAL from {} on timeline {}",
                contact.at.start, contact.at.timeline
            )));
        };
        tracing::error!(
            "the server removed WAL that is not stored: timeline {}, {} to {}. \
             hint: take a backup now: moments in between cannot be restored",
            contact.at.timeline,
            range.start,
            range.end
        );
        let hole = Hole {
            timeline: contact.at.timeline,
            start: range.start,
            end: range.end,
            found_at: self.clock.now(),
            reason: "the server had removed this WAL before it was received".to_owned(),
        };
        contact.repository.record_hole(&hole).await?;
        contact.at = next;
        Ok(())
    }

    /// Streams on one connection and one timeline until that ends.
    async fn converse(&self, contact: Contact, stop: watch::Receiver<bool>) -> Result<Ended> {
        let Contact {
            replication,
            sql,
            facts,
            repository,
            at,
            ..
        } = contact;
        let segment = SegmentName::of(at.timeline, at.start, facts.segment_size);
        let known = if at.known > at.start {
            repository
                .segment_content(segment, facts.segment_size)
                .await?
        } else {
            None
        };
        let slot = self.options.slot.as_deref();
        let stream = match replication
            .start_replication(slot, at.start, at.timeline)
            .await
        {
            Ok(Started::Streaming(stream)) => stream,
            Ok(Started::EndOfTimeline { .. }) => return Ok(Ended::NextTimeline),
            Err(error) => return stream_failed(&error),
        };
        tracing::info!("streaming from {} on timeline {}", at.start, at.timeline);
        let (moments_in, moments) = mpsc::channel(1);
        let asking = tokio::spawn(ask_moments(sql, self.options.tip_interval, moments_in));
        let conversation = Conversation {
            session: Session::new(
                self.session_options(&facts),
                at.start,
                at.known,
                Instant::now(),
            ),
            verifier: Verifier::new(WalkerStart {
                at: at.start,
                segment_size: facts.segment_size,
                major: None,
                timeline: at.timeline,
                system_id: Some(facts.system_id),
                skip_to: None,
            }),
            major: Major::ALL
                .into_iter()
                .find(|major| major.number() == facts.major),
            known: known.map(|content| content.bytes).unwrap_or_default(),
            segment_start: at.start,
            segment: Vec::new(),
            unstored_bytes: 0,
            unverified: false,
            moment: None,
            tip: None,
            jobs: JoinSet::new(),
            receiver: self,
            repository,
            size: facts.segment_size,
            timeline: at.timeline,
        };
        let ended = conversation.run(stream, moments, stop).await;
        asking.abort();
        ended
    }

    fn session_options(&self, facts: &ServerFacts) -> SessionOptions {
        let quarter = match facts.wal_sender_timeout_ms {
            0 => STATUS_INTERVAL_MAX,
            timeout => Duration::from_millis((timeout / 4).max(1)),
        };
        SessionOptions {
            segment_size: facts.segment_size,
            flush_interval: self.options.flush_interval,
            status_interval: quarter.min(STATUS_INTERVAL_MAX),
            shutdown_wait: self.options.shutdown_wait,
        }
    }
}

fn stream_failed(error: &StreamError) -> Result<Ended> {
    match error.sqlstate() {
        Some("58P01") => Ok(Ended::Removed),
        _ if error.is_transient() => Ok(Ended::Lost(chain(error))),
        _ => Err(Error::failure(format!(
            "cannot stream from the server: {}",
            chain(error)
        ))),
    }
}

/// A job for the store has come to its end.
enum JobDone {
    /// The stretch is durable.
    Stored(Box<EncodedWal>),
    /// Clean-up and hints, on which nothing depends.
    Aside,
}

/// One connection's state besides the rules'.
struct Conversation<'a> {
    receiver: &'a Receiver,
    repository: Repository,
    size: SegmentSize,
    timeline: TimelineId,
    major: Option<Major>,
    session: Session,
    verifier: Verifier,
    /// What was stored of the first segment before this connection.
    known: Vec<u8>,
    /// The bytes of the segment at hand, from its beginning.
    segment: Vec<u8>,
    segment_start: Lsn,
    unstored_bytes: u64,
    unverified: bool,
    /// The newest moment that waits for its position to be stored.
    moment: Option<Moment>,
    tip: Option<Tip>,
    jobs: JoinSet<Result<JobDone, RepositoryError>>,
}

impl Conversation<'_> {
    async fn run(
        mut self,
        stream: WalStream,
        mut moments: mpsc::Receiver<Moment>,
        mut stop: watch::Receiver<bool>,
    ) -> Result<Ended> {
        let mut stream = Some(stream);
        let mut ended: Option<Ended> = None;
        let mut stop_deadline: Option<Instant> = None;
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
                        self.finish(stream, stop_deadline.is_some()).await?;
                        return Ok(ended.unwrap_or(Ended::Stopped));
                    }
                }
            }
            let reading =
                ended.is_none() && self.unstored_bytes < self.receiver.options.unstored_bytes_max;
            let deadline = self.session.deadline();
            let deadline = stop_deadline.map_or(deadline, |stop| stop.min(deadline));
            tokio::select! {
                event = pump(&mut stream, reading) => {
                    if let Some(reason) = self.heard(event)? {
                        ended.get_or_insert(reason);
                        self.session.handle(Event::End, Instant::now());
                    }
                }
                Some(done) = self.jobs.join_next() => self.job_done(done)?,
                Some(moment) = moments.recv() => {
                    self.moment = Some(moment);
                    self.advance_tip();
                }
                () = stopped(&mut stop), if stop_deadline.is_none() => {
                    tracing::info!("stopping: storing what was received");
                    stop_deadline = Some(Instant::now() + self.receiver.options.stop_timeout);
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
                    self.session.handle(Event::Deadline, now);
                }
            }
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
        self.compare_with_known(range, bytes)?;
        let records = self.verifier.push(bytes);
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

    fn compare_with_known(&mut self, range: WalRange, bytes: &[u8]) -> Result<()> {
        let from = self.segment.len();
        let known = self.known.get(from..).unwrap_or_default();
        let differs = known.iter().zip(bytes).position(|(a, b)| a != b);
        if let Some(at) = differs {
            let lsn = range
                .start
                .saturating_add(u64::try_from(at).unwrap_or(u64::MAX));
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
        match self.verifier.verdict_for(range) {
            Verdict::Verified => self.unverified = false,
            Verdict::Unverified { from, reason } => {
                if !self.unverified {
                    tracing::error!(
                        "WAL cannot be verified from {from} on timeline {}: {reason}; it is \
                         stored as it came. hint: take a backup now, and check the server's disk",
                        self.timeline
                    );
                }
                self.unverified = true;
            }
        }
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
        self.known.clear();
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
                    Ok(()) => return Ok(JobDone::Stored(Box::new(wal))),
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
        let JobDone::Stored(wal) = done? else {
            return Ok(());
        };
        let range = wal.checked.range();
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
            confirmed_at: self.receiver.clock.now(),
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
    async fn finish(&mut self, stream: Option<WalStream>, stopping: bool) -> Result<()> {
        if let Some(mut stream) = stream.filter(|_| stopping) {
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
        while let Some(done) = self.jobs.join_next().await {
            self.job_done(done)?;
        }
        Ok(())
    }

    fn status(&self, flush: Lsn) -> StatusUpdate {
        let now = self.receiver.clock.now();
        // remote_write must tell the truth too: nothing counts before it is in the repository
        StatusUpdate {
            write: flush,
            flush,
            apply: Lsn::ZERO,
            reply_requested: false,
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

/// Returns once a stop was asked for.
async fn stopped(stop: &mut watch::Receiver<bool>) {
    if stop.wait_for(|asked| *asked).await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// Asks for the server's clock and end of WAL, again and again, until nobody listens.
async fn ask_moments(mut sql: Connection, interval: Duration, moments: mpsc::Sender<Moment>) {
    let mut ticks = tokio::time::interval(interval);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        match server::read_moment(&mut sql).await {
            Ok(moment) => {
                if moments.send(moment).await.is_err() {
                    return;
                }
            }
            Err(error) => {
                tracing::warn!(
                    "the server's clock cannot be read, so `latest` stands still until the next \
                     connection: {}",
                    chain(&error)
                );
                return;
            }
        }
    }
}

/// Stores the history of the server's timeline and of its ancestors; gives the branch.
async fn store_histories(
    replication: &mut Connection,
    repository: &Repository,
    timeline: TimelineId,
) -> Result<TimelineHistory> {
    let branch = store_history(replication, repository, timeline).await?;
    let branch = branch.unwrap_or_else(|| TimelineHistory::new_first(timeline));
    for entry in branch.entries() {
        store_history(replication, repository, entry.timeline).await?;
    }
    Ok(branch)
}

/// Stores a timeline's history as the server has it; `None` where it has none.
pub async fn store_history(
    replication: &mut Connection,
    repository: &Repository,
    timeline: TimelineId,
) -> Result<Option<TimelineHistory>> {
    let file = replication
        .timeline_history(timeline)
        .await
        .map_err(|error| server::query_error("read the timeline's history", &error))?;
    let Some(file) = file else { return Ok(None) };
    let parsed = TimelineHistory::parse(timeline, &file.content).map_err(|error| {
        Error::damaged(format!(
            "the server's {} is damaged: {error}",
            file.file_name
        ))
    })?;
    repository
        .store_file(&ObjectName::History(timeline), file.content)
        .await?;
    Ok(Some(parsed))
}

async fn stored_ends(
    repository: &Repository,
    size: SegmentSize,
) -> Result<std::collections::BTreeMap<TimelineId, Lsn>> {
    let mut ends = std::collections::BTreeMap::new();
    for timeline in repository.timelines().await? {
        if let Some(end) = repository.timeline_wal(timeline).await?.end(size) {
            ends.insert(timeline, end);
        }
    }
    Ok(ends)
}
