//! One connection on one timeline: copies from the server's socket, hands stretches to the store,
//! and tells the server how far they are durable, as the [`Session`] decides.

mod arrivals;
mod standing;
mod storage;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::FutureExt as _;
use replication::stream::{StatusUpdate, StreamError, StreamEvent, WalStream};
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};
use wal::{
    Lsn, Major, PgTime, SegmentName, SegmentSize, TimelineId, Verifier, WalRange, WalkerStart,
};

use super::contact::Contact;
use super::ended::{Ended, stopped};
use super::intake::{Intake, Part, TwoHistories};
use super::known::Known;
use super::moments::Asked;
use super::options::ReceiverOptions;
use super::others::Others;
use super::session::{Action, Before, Event, Session, SessionOptions};
use super::state::{Connection as Link, StreamGauges};
use super::storing::{InSpool, Kept, SpoolNews, Storing};
use crate::clock::Clock;
use crate::error::{Error, Result, chain};
use crate::repository::index::IndexKeeper;
use crate::repository::layout::ObjectName;
use crate::repository::records::Tip;
use crate::repository::{Acknowledge, EncodedWal, Repository, RepositoryError};
use crate::server::{Moment, ServerFacts};

/// The server hears from us this often at least, whatever its `wal_sender_timeout` is.
const STATUS_INTERVAL_MAX: Duration = Duration::from_secs(10);
/// A server that has not said anything for so long, though it was asked to, is gone; sooner where
/// it gives up on us sooner.
const SILENCE_MAX: Duration = Duration::from_mins(1);
/// How long the next connection waits for what this one has left to do, on which nothing depends.
const CLEAN_UP: Duration = Duration::from_secs(1);
/// How long a server gets to answer our good-bye.
const FAREWELL: Duration = Duration::from_secs(1);
/// So much WAL is stored without waiting for the flush interval to pass.
const PIECE_BYTES: u64 = 64 << 20;
/// So much WAL waits to be verified at most.
const GATHERED_BYTES_MAX: u64 = 1 << 20;

/// A job for the store has come to its end.
enum JobDone {
    /// The stretch is durable.
    Kept(Kept),
    /// This was stored of a segment.
    Looked(SegmentName, Vec<(WalRange, String)>),
    /// What an object covers is gone; so many bytes of WAL were held for that.
    Cleaned(u64),
    /// Hints, on which nothing depends.
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
    /// What is stored, and held to be compared with the pieces that it covers, in bytes.
    cleaning_bytes: u64,
    /// How many segments and pieces are on their way to the store.
    stores_under_way: usize,
    /// How many notes of WAL that cannot be used are not stored yet.
    unrecorded: Arc<watch::Sender<u32>>,
    others: Others,
    /// Up to here was compared with what was stored before this connection.
    compared: Lsn,
    /// The newest moments that wait for their positions to be stored, oldest first.
    moments: VecDeque<Moment>,
    /// The newest moment whose position is stored, until it is written.
    moment: Option<Moment>,
    tip: Option<Tip>,
    tip_written_at: Option<Instant>,
    /// The positions that were last shown: received, stored, reported.
    shown: Option<(Lsn, Lsn, Lsn)>,
    warned_apply: bool,
    warned_hidden: bool,
    /// When the server last said anything.
    heard_at: Instant,
    silence_max: Duration,
    /// What the rules were told that it is stored, and nobody else yet; and whether it was merged.
    stored: Option<(Arc<EncodedWal>, bool)>,
    jobs: JoinSet<Result<JobDone, RepositoryError>>,
    storing: Arc<Storing>,
    spool_news: mpsc::UnboundedReceiver<SpoolNews>,
    in_spool: InSpool,
    /// Who is told of segments that are stored.
    indexing: Option<IndexKeeper>,
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
    /// A conversation that begins where `contact` says, with what is known to be stored there to compare
    /// with.
    pub(super) async fn new(
        contact: &Contact,
        known: Known,
        (storing, spool_news): (Arc<Storing>, mpsc::UnboundedReceiver<SpoolNews>),
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
        let mut session = Session::new(session_options(options, facts), before, now);
        session.avoid(known.damaged_pieces());
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
            cleaning_bytes: 0,
            stores_under_way: 0,
            unrecorded: Arc::new(watch::Sender::new(0)),
            others: Others::default(),
            compared: before.known,
            moments: VecDeque::new(),
            moment: None,
            tip: None,
            tip_written_at: None,
            shown: None,
            warned_apply: false,
            warned_hidden: false,
            heard_at: now,
            silence_max: silence_max(facts),
            stored: None,
            jobs: JoinSet::new(),
            storing,
            spool_news,
            in_spool: InSpool::default(),
            indexing: None,
            options,
            clock,
            gauges,
            repository: repository.clone(),
            size,
            timeline: at.timeline,
        })
    }

    /// Tells this keeper of the segments that are stored.
    pub(super) fn tells(&mut self, indexing: IndexKeeper) {
        self.indexing = Some(indexing);
    }

    pub(super) async fn run(
        mut self,
        stream: WalStream,
        mut moments: mpsc::Receiver<Asked>,
        mut whole: watch::Receiver<bool>,
        mut stop: watch::Receiver<bool>,
    ) -> Result<Ended> {
        self.hold_unless_whole();
        self.show_spool();
        let mut stream = Some(stream);
        let mut ending = Ending::default();
        let mut reading = true;
        loop {
            self.verify_what_came()?;
            if ending.ended.is_some() && !ending.told && self.is_all_verified() {
                ending.told = true;
                let event = match ending.ended {
                    Some(Ended::Stopped) => Event::Stop,
                    _ => Event::End,
                };
                self.session.handle(event, Instant::now());
            }
            self.store_what_is_due()?;
            if ending.told && self.waits_in_vain() {
                tracing::warn!(
                    "received, and left to the next stream: others have stored more of this segment than \
                     this server has sent, and it was not compared. Nobody was told that it is stored"
                );
                let left = ending.deadline.map(|until| until - Instant::now());
                self.finish(stream, left).await?;
                return Ok(ending.ended.unwrap_or(Ended::Stopped));
            }
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
                        self.say_what_is_stored(&ending);
                        return Ok(ending.ended.unwrap_or(Ended::Stopped));
                    }
                }
            }
            if ending.is_lost() {
                stream = None;
            }
            answer_now(&mut stream);
            self.note_what_is_stored();
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
                    if let Some(reason) = self.heard_all(event, &mut stream)? {
                        if matches!(reason, Ended::Lost(_)) {
                            stream = None;
                        }
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
                    Asked::Lost | Asked::Silent => {
                        self.session.handle(Event::Unsure, Instant::now());
                    }
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

    /// Whether all that is left of an ending waits for WAL that will not come.
    fn waits_in_vain(&self) -> bool {
        self.others.waits_for_the_server() && self.stores_under_way == 0
    }

    /// Whether more WAL may be taken in. What is held is bounded, and a segment that is larger than
    /// the bound is held all the same, but nothing besides.
    fn has_room(&self) -> bool {
        let received = self.session.progress().received();
        let at_hand = received.bytes_since(self.size.start_of(received));
        // what waits for the rest of its segment must not keep that out
        let given = self.unstored_bytes - self.others.held_bytes() + self.cleaning_bytes;
        let held = given + at_hand + self.gathered_bytes + self.lent_bytes;
        self.gathered_bytes < GATHERED_BYTES_MAX
            && (given == 0 || held < self.options.unstored_bytes_max)
    }

    /// Where every repository must hold what is acknowledged, and one lacks something, the server
    /// is told nothing more until that is filled up.
    fn hold_unless_whole(&mut self) {
        if self.repository.acknowledge() == Acknowledge::All {
            self.session
                .hold(!self.repository.is_whole(), Instant::now());
        }
    }

    /// Tells the server the last position, and lets hints and clean-up come to their end.
    /// `left` is the time that a stop leaves for it; `None` where this is not the end.
    async fn finish(&mut self, stream: Option<WalStream>, left: Option<Duration>) -> Result<()> {
        self.note_what_is_stored();
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
                self.note_what_is_stored();
            }
            Ok(())
        };
        // all WAL is stored; merges, hints and clean-up may be left, and another connection waits
        let left = left.unwrap_or(CLEAN_UP);
        tokio::time::timeout(left, rest).await.unwrap_or(Ok(()))
    }

    /// Says that a stop has left nothing behind, where it has not.
    fn say_what_is_stored(&self, ending: &Ending) {
        let progress = self.session.progress();
        let (received, stored) = (progress.received(), progress.stored());
        let is_held =
            self.repository.acknowledge() == Acknowledge::All && !self.repository.is_whole();
        if matches!(ending.ended, Some(Ended::Stopped)) && stored >= received && is_held {
            tracing::info!(
                "stopped: what was received is stored up to {stored} on timeline {} where the \
                 repositories could be reached; the server was told of {} only, and keeps the rest",
                self.timeline,
                progress.reported()
            );
        } else if matches!(ending.ended, Some(Ended::Stopped)) && stored >= received {
            tracing::info!(
                "stopped: all that was received is stored, up to {stored} on timeline {}",
                self.timeline
            );
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

/// Sends what is queued as far as the socket takes it at once: commits may wait for it, and for nothing that
/// is done next. Of what cannot be sent, whoever reads hears.
fn answer_now(stream: &mut Option<WalStream>) {
    if let Some(stream) = stream {
        drop(stream.flush().now_or_never());
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
            // the stream goes on: one record is not checked
            Err(error) if error.is_damage() => tracing::error!(
                "the record that goes on at {} is not checked, since what comes before it cannot be \
                 read: {}. hint: restore this object from a copy of the repository, or take a backup",
                at.start,
                chain(&error)
            ),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(verifier(at.start))
}
