//! One connection on one timeline: copies from the server's socket, hands stretches to the store,
//! and tells the server how far they are durable, as the [`Session`] decides.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use jiff::SignedDuration;
use replication::stream::{StatusUpdate, StreamError, StreamEvent, WalStream};
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};
use wal::{
    Checked, Lsn, Major, PgTime, SegmentName, SegmentSize, TimelineId, Verifier, WalRange,
    WalkerStart,
};

use super::contact::Contact;
use super::ended::{Ended, stopped, stream_failed};
use super::intake::{Finding, Intake, Part, TwoHistories, Unusable};
use super::known::Known;
use super::moments::Asked;
use super::options::ReceiverOptions;
use super::pieces::Superseded;
use super::session::{Action, Before, Event, Session, SessionOptions, Store};
use super::state::{Connection as Link, StreamGauges};
use super::storing::{self, InSpool, Kept, SpoolNews, Storing};
use crate::clock::Clock;
use crate::error::{Error, Result, chain};
use crate::repository::layout::ObjectName;
use crate::repository::records::{Hole, Tip};
use crate::repository::{Acknowledge, Drained, EncodedWal, Repository, RepositoryError, Stored};
use crate::server::{self, Moment, ServerFacts, Standing};

/// The server hears from us this often at least, whatever its `wal_sender_timeout` is.
const STATUS_INTERVAL_MAX: Duration = Duration::from_secs(10);
/// A server that has not said anything for so long, though it was asked to, is gone; sooner where
/// it gives up on us sooner.
const SILENCE_MAX: Duration = Duration::from_mins(1);
/// How long a server gets to answer our good-bye.
const FAREWELL: Duration = Duration::from_secs(1);
/// A commit is stamped before its record is written: moments are counted this much earlier.
const COMMIT_STAMP_ALLOWANCE: SignedDuration = SignedDuration::from_secs(1);
/// So much WAL is stored without waiting for the flush interval to pass.
const PIECE_BYTES: u64 = 64 << 20;
/// So much WAL is verified where it came; more goes to another thread.
const VERIFIED_HERE_BYTES: u64 = 64 << 10;
/// So much WAL waits to be verified at most.
const GATHERED_BYTES_MAX: u64 = 8 << 20;
/// So many moments wait for their position to be stored at most; a store that is further behind
/// gets some of them only.
const MOMENTS_MAX: usize = 256;

/// A job for the store has come to its end.
enum JobDone {
    /// The stretch is durable.
    Kept(Kept),
    /// Clean-up and hints, on which nothing depends.
    Aside,
}

type Verified = (Intake, Result<Vec<Part>, TwoHistories>);

/// One connection's state besides the rules'.
pub(super) struct Conversation<'a> {
    options: &'a ReceiverOptions,
    clock: Arc<dyn Clock>,
    gauges: StreamGauges,
    repository: Repository,
    size: SegmentSize,
    timeline: TimelineId,
    session: Session,
    /// What has come and is not verified yet.
    gathered: Vec<(Lsn, Bytes)>,
    gathered_bytes: u64,
    /// What is being verified elsewhere, in bytes.
    lent_bytes: u64,
    /// `None` while it is lent out to verify.
    intake: Option<Intake>,
    verifying: Option<JoinHandle<Verified>>,
    /// The server asked for an answer behind what is gathered.
    reply_wanted: bool,
    unstored_bytes: u64,
    /// The newest moments that wait for their positions to be stored, oldest first.
    moments: VecDeque<Moment>,
    /// The newest moment whose position is stored, until it is written.
    moment: Option<Moment>,
    tip: Option<Tip>,
    tip_written_at: Option<Instant>,
    /// The positions that were last shown: received, stored, reported.
    shown: Option<(Lsn, Lsn, Lsn)>,
    warned_apply: bool,
    /// When the server last said anything.
    heard_at: Instant,
    silence_max: Duration,
    jobs: JoinSet<Result<JobDone, RepositoryError>>,
    storing: Storing,
    spool_news: mpsc::UnboundedReceiver<SpoolNews>,
    in_spool: InSpool,
}

/// How far the end of a conversation has come.
#[derive(Default)]
struct Ending {
    ended: Option<Ended>,
    /// The rules were told.
    told: bool,
    /// When a stop gives up.
    deadline: Option<Instant>,
}

impl Ending {
    fn is_lost(&self) -> bool {
        matches!(self.ended, Some(Ended::Lost(_)))
    }
}

impl<'a> Conversation<'a> {
    /// A conversation that begins where `contact` says, with what is stored there to compare with.
    pub(super) async fn new(
        contact: &Contact,
        (storing, spool_news): (Storing, mpsc::UnboundedReceiver<SpoolNews>),
        options: &'a ReceiverOptions,
        clock: Arc<dyn Clock>,
        gauges: StreamGauges,
    ) -> Result<Self> {
        let Contact {
            facts,
            repository,
            at,
            ..
        } = contact;
        let size = facts.segment_size;
        let known = Known::of(repository, &contact.branch, *at, size).await?;
        // what was listed and cannot be put together from the beginning is received again
        let before = Before {
            start: at.start,
            known: known.end(at.start).min(at.known),
            pieces: contact.pieces,
        };
        let major = Major::ALL
            .into_iter()
            .find(|major| major.number() == facts.major);
        let verifier = primed_verifier(contact).await?;
        let now = Instant::now();
        let session = Session::new(session_options(options, facts), before, now);
        Ok(Self {
            session,
            intake: Some(Intake::new(
                at.start,
                at.timeline,
                size,
                major,
                verifier,
                known,
            )),
            gathered: Vec::new(),
            gathered_bytes: 0,
            lent_bytes: 0,
            verifying: None,
            reply_wanted: false,
            unstored_bytes: 0,
            moments: VecDeque::new(),
            moment: None,
            tip: None,
            tip_written_at: None,
            shown: None,
            warned_apply: false,
            heard_at: now,
            silence_max: silence_max(facts),
            jobs: JoinSet::new(),
            storing,
            spool_news,
            in_spool: InSpool::default(),
            options,
            clock,
            gauges,
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
        let mut ending = Ending::default();
        let mut reading = true;
        loop {
            self.verify_what_came()?;
            if ending.ended.is_some() && !ending.told && self.is_all_verified() {
                ending.told = true;
                self.session.handle(Event::End, Instant::now());
            }
            self.store_what_is_due()?;
            while let Some(action) = self.session.poll_action() {
                match action {
                    Action::Report(flush) => {
                        if let Some(stream) = &mut stream {
                            stream.queue_status(self.status(flush));
                        }
                    }
                    Action::Disconnect => {
                        stream = None;
                        let why = "the server shuts down";
                        ending
                            .ended
                            .get_or_insert_with(|| Ended::Lost(why.to_owned()));
                    }
                    Action::Finished => {
                        let left = ending.deadline.map(|until| until - Instant::now());
                        self.finish(stream, left).await?;
                        return Ok(ending.ended.unwrap_or(Ended::Stopped));
                    }
                }
            }
            if ending.is_lost() {
                stream = None;
            }
            self.show();
            let was_reading = reading;
            reading = ending.ended.is_none() && self.has_room();
            if reading && !was_reading {
                // it was we who did not listen
                self.heard_at = Instant::now();
            }
            let deadline = self.deadline(reading, &ending);
            tokio::select! {
                event = pump(&mut stream, reading) => {
                    self.heard_at = Instant::now();
                    if let Some(reason) = self.heard(event)? {
                        ending.ended.get_or_insert(reason);
                    }
                }
                verified = joined(&mut self.verifying) => self.take_back(verified)?,
                Some(done) = self.jobs.join_next() => self.job_done(done)?,
                Some(news) = self.spool_news.recv() => self.heard_of_spool(news)?,
                Some(asked) = moments.recv() => match asked {
                    Asked::Moment(moment) => self.keep_moment(moment),
                    Asked::Standing(standing) => self.stands(&standing),
                    // the server shuts down, perhaps, and we do not read: it must not wait for a
                    // store that is slower than it should wait
                    Asked::Lost if !reading && ending.ended.is_none() => {
                        let why = "the server closed its connections";
                        ending.ended = Some(Ended::Lost(why.to_owned()));
                    }
                    Asked::Lost => {}
                },
                Ok(()) = whole.changed() => self.hold_unless_whole(),
                () = self.gauges.nudged() => {}
                () = stopped(&mut stop), if ending.deadline.is_none() => {
                    tracing::info!("stopping: storing what was received");
                    self.gauges.update(|state| state.connection = Link::Stopping);
                    ending.deadline = Some(Instant::now() + self.options.stop_timeout);
                    ending.ended = Some(Ended::Stopped);
                }
                () = tokio::time::sleep_until(deadline.into()) => {
                    self.deadline_passed(reading, &mut ending)?;
                }
            }
        }
    }

    fn deadline(&self, reading: bool, ending: &Ending) -> Instant {
        let mut deadline = self.session.deadline(self.intake.is_some());
        if reading {
            deadline = deadline.min(self.heard_at + self.silence_max);
        }
        ending.deadline.map_or(deadline, |stop| stop.min(deadline))
    }

    fn deadline_passed(&mut self, reading: bool, ending: &mut Ending) -> Result<()> {
        let now = Instant::now();
        if ending.deadline.is_some_and(|stop| stop <= now) {
            return Err(Error::failure(format!(
                "stopped before everything was stored: first LSN not stored is {} on timeline {}",
                self.session.progress().stored(),
                self.timeline
            ))
            .hint("the server still has it, and sends it again to the next stream"));
        }
        if reading && self.heard_at + self.silence_max <= now {
            let why = format!("it was silent for {} s", self.silence_max.as_secs());
            ending.ended = Some(Ended::Lost(why));
            return Ok(());
        }
        self.session.handle(Event::Deadline, now);
        Ok(())
    }

    /// Whether more WAL may be taken in. What is held is bounded, and a segment that is larger than
    /// the bound is held all the same, but nothing besides.
    fn has_room(&self) -> bool {
        let received = self.session.progress().received();
        let at_hand = received.bytes_since(self.size.start_of(received));
        let held = self.unstored_bytes + at_hand + self.gathered_bytes + self.lent_bytes;
        self.gathered_bytes < GATHERED_BYTES_MAX
            && (self.unstored_bytes == 0 || held < self.options.unstored_bytes_max)
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
            Ok(StreamEvent::Wal {
                start,
                bytes,
                server_end,
                ..
            }) => {
                let came = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
                self.gathered_bytes += came;
                self.gathered.push((start, bytes));
                let now = self.clock.now();
                self.gauges.update(|state| {
                    state.server_end = state.server_end.max(Some(server_end));
                    state.received_at = Some(now);
                    state.received_bytes += came;
                });
                Ok(None)
            }
            Ok(StreamEvent::Keepalive {
                reply_requested,
                server_end,
                ..
            }) => {
                self.gauges
                    .update(|state| state.server_end = state.server_end.max(Some(server_end)));
                let reply = reply_requested;
                self.session
                    .handle(Event::Keepalive { reply }, Instant::now());
                // answered at once; what came before it is stored at once too, when it is verified
                self.reply_wanted |= reply && !self.is_all_verified();
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

    fn is_all_verified(&self) -> bool {
        self.gathered.is_empty() && self.verifying.is_none()
    }

    /// Compares and verifies what has come: here where it is little, else on another thread.
    fn verify_what_came(&mut self) -> Result<()> {
        if self.gathered.is_empty() {
            return Ok(());
        }
        let Some(mut intake) = self.intake.take() else {
            return Ok(());
        };
        let came = std::mem::take(&mut self.gathered);
        let bytes = std::mem::take(&mut self.gathered_bytes);
        if bytes <= VERIFIED_HERE_BYTES {
            let parts = intake.take_all(&came);
            self.take_back((intake, parts))
        } else {
            self.lent_bytes = bytes;
            self.verifying = Some(tokio::task::spawn_blocking(move || {
                let parts = intake.take_all(&came);
                (intake, parts)
            }));
            Ok(())
        }
    }

    fn take_back(&mut self, (intake, parts): Verified) -> Result<()> {
        self.intake = Some(intake);
        self.lent_bytes = 0;
        let parts = parts.map_err(|error| {
            Error::damaged(error.to_string()).hint(
                "the server was set back, or another one stored here: give this one its own \
                 --cluster name and take a backup",
            )
        })?;
        for part in parts {
            for finding in &part.findings {
                self.note_finding(*finding);
            }
            let event = Event::Wal {
                end: part.end,
                shutdown: part.shutdown,
            };
            self.session.handle(event, Instant::now());
            if let Some(segment) = part.full {
                self.store_segment(segment)?;
            }
        }
        if std::mem::take(&mut self.reply_wanted) {
            let reply = Event::Keepalive { reply: true };
            self.session.handle(reply, Instant::now());
        }
        Ok(())
    }

    /// Says that WAL cannot be used, and notes that the window ends there, as it does at a hole.
    fn note_finding(&mut self, finding: Finding) {
        let (from, timeline) = (finding.from, self.timeline);
        let reason = match finding.reason {
            Unusable::Unverified(reason) => {
                tracing::error!(
                    "WAL cannot be verified from {from} on timeline {timeline}: {reason}; it is \
                     stored as it came. hint: take a backup now, and check the server's disk"
                );
                format!("it could not be verified: {reason}")
            }
            Unusable::Minimal => {
                tracing::error!(
                    "the server ran with wal_level=minimal from {from} on: moments since then \
                     cannot be restored. hint: take a backup now"
                );
                "the server ran with wal_level=minimal".to_owned()
            }
        };
        let hole = Hole {
            timeline,
            start: from,
            end: self.size.end_of(from),
            found_at: self.clock.now(),
            reason,
            unverified: true,
        };
        let now = self.clock.now();
        self.gauges.update(|state| {
            state.holes += 1;
            state.failed(now, hole.reason.clone());
        });
        let repository = self.repository.clone();
        self.jobs.spawn(async move {
            if let Err(error) = repository.record_hole(&hole).await {
                tracing::error!("that WAL is unverified was not recorded: {}", chain(&error));
            }
            Ok(JobDone::Aside)
        });
    }

    /// Gives the store what the rules want it to have, if the bytes are here and not lent out.
    fn store_what_is_due(&mut self) -> Result<()> {
        let Some(intake) = &self.intake else {
            return Ok(());
        };
        let mut due = Vec::new();
        while let Some(store) = self.session.poll_store(Instant::now()) {
            let (Store::Piece(range) | Store::Merged(range) | Store::Segment(range)) = store;
            let checked = intake.stretch(range).ok_or_else(|| {
                Error::failure(format!(
                    "no bytes at hand for {} to {}",
                    range.start, range.end
                ))
            })?;
            due.push(checked);
        }
        for checked in due {
            let range = checked.range();
            let segment = SegmentName::of(self.timeline, range.start, self.size);
            self.store(ObjectName::Piece { segment, range }, checked);
        }
        Ok(())
    }

    fn store_segment(&mut self, checked: Checked<'static>) -> Result<()> {
        let range = checked.range();
        let due = self.session.poll_store(Instant::now());
        if due != Some(Store::Segment(range)) {
            return Err(Error::failure(format!(
                "a whole segment was not expected at {}: {due:?}",
                range.start
            )));
        }
        let segment = SegmentName::of(self.timeline, range.start, self.size);
        self.store(ObjectName::Segment(segment), checked);
        Ok(())
    }

    fn store(&mut self, name: ObjectName, checked: Checked<'static>) {
        self.unstored_bytes += checked.range().len_bytes();
        let (gauges, clock) = (self.gauges.clone(), Arc::clone(&self.clock));
        let failed =
            move |why: &str| gauges.update(|state| state.failed(clock.now(), why.to_owned()));
        let kept = self.storing.clone().keep(name, checked, failed);
        self.jobs
            .spawn(async move { kept.await.map(JobDone::Kept) });
    }

    fn job_done(
        &mut self,
        done: Result<Result<JobDone, RepositoryError>, tokio::task::JoinError>,
    ) -> Result<()> {
        let done = done.map_err(|error| Error::failure(format!("a store job failed: {error}")))?;
        let (wal, stored) = match done? {
            JobDone::Kept(Kept::Stored(wal, stored)) => (wal, stored),
            JobDone::Kept(Kept::Spooled(range)) => {
                self.spooled(range);
                return Ok(());
            }
            JobDone::Aside => return Ok(()),
        };
        let range = wal.checked.range();
        self.in_spool.left(range);
        if stored == Stored::Partly {
            self.hold_unless_whole();
        }
        self.unstored_bytes = self.unstored_bytes.saturating_sub(range.len_bytes());
        let merged = self.session.is_merge(range);
        self.session.handle(Event::Stored(range), Instant::now());
        self.show_stored(&wal, merged);
        self.advance_tip();
        self.remove_superseded(wal, merged);
        Ok(())
    }

    /// Takes note that a stretch is durable in the spool, and in memory no longer.
    fn spooled(&mut self, range: WalRange) {
        self.unstored_bytes = self.unstored_bytes.saturating_sub(range.len_bytes());
        let event = if self.storing.is_spooled(range) {
            self.in_spool.insert(range);
            Event::Spooled(range)
        } else {
            // it has gone on to the repository before this was heard
            Event::Stored(range)
        };
        self.session.handle(event, Instant::now());
        self.spool_moved();
    }

    /// Takes note of what went on from the spool to the repository. Only what this connection
    /// received counts: nothing else was compared with what this server sends.
    fn heard_of_spool(&mut self, news: SpoolNews) -> Result<()> {
        match news {
            SpoolNews::Failed(error) => Err(error.into()),
            SpoolNews::Drained(Drained::Lost(name)) => match self.storing.range_of(&name) {
                Some(_) => Err(storing::lost(&name)),
                None => Ok(()),
            },
            SpoolNews::Drained(Drained::Stored(name, stored)) => {
                let Some(stretch) = self.storing.range_of(&name) else {
                    return Ok(());
                };
                if stored == Stored::Partly {
                    self.hold_unless_whole();
                }
                for range in self.in_spool.left(stretch) {
                    self.session.handle(Event::Stored(range), Instant::now());
                }
                self.spool_moved();
                self.advance_tip();
                Ok(())
            }
        }
    }

    /// Shows what lies in the spool.
    fn spool_moved(&mut self) {
        // what goes from the spool takes the pieces with it that it covers
        while self.session.poll_superseded().is_some() {}
        let (bytes, objects) = self.storing.spool_size();
        self.gauges
            .update(|state| (state.spool_bytes, state.spool_objects) = (bytes, objects));
    }

    /// Removes the pieces that an acknowledged object covers.
    fn remove_superseded(&mut self, wal: Arc<EncodedWal>, merged: bool) {
        let range = wal.checked.range();
        let (mut pieces, mut late) = (Vec::new(), Vec::new());
        while let Some(Superseded { piece, by }) = self.session.poll_superseded() {
            let name = self.piece_name(piece);
            if by == range {
                pieces.push(name);
            } else {
                // of a piece that came late
                let segment = SegmentName::of(self.timeline, by.start, self.size);
                late.push((name, ObjectName::Segment(segment)));
            }
        }
        let is_segment = matches!(wal.name, ObjectName::Segment(_));
        let from_start = range.start == self.size.start_of(range.start);
        // pieces of other connections and of backups are looked for
        let others = is_segment || (merged && from_start);
        if !others && pieces.is_empty() && late.is_empty() {
            return;
        }
        let segment = SegmentName::of(self.timeline, range.start, self.size);
        let (repository, gauges) = (self.repository.clone(), self.gauges.clone());
        self.jobs.spawn(async move {
            let removed = async {
                let mut removed = repository.remove_pieces(&pieces, &wal).await?;
                for (piece, by) in &late {
                    removed += repository.remove_piece_covered(piece, by).await?;
                }
                if others {
                    removed += repository.remove_superseded_pieces(segment, &wal).await?;
                }
                Ok(removed)
            };
            match removed.await {
                Ok(removed) => gauges.update(|state| state.pieces_removed += removed),
                Err(error) if RepositoryError::is_unreachable(&error) => {
                    tracing::warn!("superseded pieces stay for now: {}", chain(&error));
                }
                Err(error) => return Err(error),
            }
            Ok(JobDone::Aside)
        });
    }

    fn piece_name(&self, range: WalRange) -> ObjectName {
        let segment = SegmentName::of(self.timeline, range.start, self.size);
        ObjectName::Piece { segment, range }
    }

    /// Shows where the connection stands.
    fn show(&mut self) {
        self.gauges.beat();
        let progress = self.session.progress();
        let now = (progress.received(), progress.stored(), progress.reported());
        if self.shown.replace(now) == Some(now) {
            return;
        }
        self.gauges.update(|state| {
            (state.received, state.stored) = (Some(now.0), Some(now.1));
            state.reported = Some(now.2);
        });
    }

    fn show_stored(&self, wal: &EncodedWal, merged: bool) {
        let (now, bytes) = (self.clock.now(), wal.checked.range().len_bytes());
        let is_segment = matches!(wal.name, ObjectName::Segment(_));
        self.gauges.update(|state| {
            state.stored_at = Some(now);
            match (is_segment, merged) {
                (true, _) => state.segments_stored += 1,
                (false, true) => state.merges += 1,
                (false, false) => state.pieces_stored += 1,
            }
            if !merged {
                state.stored_bytes += bytes;
            }
        });
    }

    /// Takes note of whether the server waits for us, and of what it keeps for us.
    fn stands(&mut self, standing: &Standing) {
        let waits = standing.waits_for_us() || self.options.synchronous;
        if waits != self.session.is_waited_for() {
            let what = if waits { "wait" } else { "no longer wait" };
            tracing::info!("commits on the server {what} for this stream");
            if waits && self.storing.spool_acknowledges() {
                tracing::error!(
                    "acknowledge = \"spool\" is refused while commits wait for this stream: only what \
                     is in the repository is reported. hint: take anywhen out of \
                     synchronous_standby_names, or set acknowledge to \"all\""
                );
            }
            self.session.handle(Event::Waited(waits), Instant::now());
        }
        if waits && standing.remote_apply && !std::mem::replace(&mut self.warned_apply, true) {
            tracing::warn!(
                "synchronous_commit is remote_apply, and an archiver applies nothing: commits that \
                 ask for it wait for ever. hint: synchronous_commit = on"
            );
        }
        self.gauges.update(|state| {
            state.synchronous = waits;
            state.slot_state.clone_from(&standing.slot_state);
            state.retained_bytes = standing.retained_bytes;
        });
    }

    /// Keeps a moment until its position is stored.
    fn keep_moment(&mut self, moment: Moment) {
        if self.moments.len() == MOMENTS_MAX {
            // the newest gives way: the oldest will be reached first
            self.moments.pop_back();
        }
        self.moments.push_back(moment);
        self.advance_tip();
    }

    /// Rewrites the tip once the position of a newer moment is stored, and it is time.
    fn advance_tip(&mut self) {
        let stored = self.session.progress().stored();
        if stored == Lsn::ZERO {
            return;
        }
        while let Some(moment) = self.moments.front()
            && moment
                .insert_lsn
                .is_none_or(|lsn| server::without_page_header(lsn, self.size) <= stored)
        {
            self.moment = self.moments.pop_front();
        }
        let Some(moment) = self.moment else { return };
        let time = moment
            .insert_lsn
            .map(|_primary| moment.time - COMMIT_STAMP_ALLOWANCE);
        if time.is_some() {
            self.gauges.update(|state| state.moment = time);
        }
        let is_due = self
            .tip_written_at
            .is_none_or(|at| at.elapsed() >= self.options.tip_interval);
        let tip = Tip {
            lsn: stored,
            confirmed_at: self.clock.now(),
            moment: time,
        };
        if !is_due || self.tip.as_ref().is_some_and(|last| last.lsn > tip.lsn) {
            return;
        }
        self.moment = None;
        self.tip_written_at = Some(Instant::now());
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
        if !self.in_spool.is_empty() {
            tracing::warn!(
                "stopped while WAL is in the spool and not in the repository: the next stream takes \
                 it there"
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
            reply_requested: self.heard_at.elapsed() >= self.silence_max / 4,
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

/// What was verified elsewhere.
async fn joined(verifying: &mut Option<JoinHandle<Verified>>) -> Verified {
    let Some(handle) = verifying else {
        return std::future::pending().await;
    };
    let verified = handle.await;
    *verifying = None;
    verified.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))
}

fn silence_max(facts: &ServerFacts) -> Duration {
    match facts.wal_sender_timeout_ms {
        0 => SILENCE_MAX,
        timeout => Duration::from_millis(timeout.saturating_mul(3)).min(SILENCE_MAX),
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
        piece_bytes: PIECE_BYTES,
        status_interval: quarter.min(STATUS_INTERVAL_MAX),
        shutdown_wait: options.shutdown_wait,
        waited: options.synchronous,
        spool_counts: options
            .spool
            .as_ref()
            .is_some_and(|spool| spool.acknowledges),
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
