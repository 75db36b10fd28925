//! Receives the WAL of one cluster: meets the server, converses with it, and meets it again.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use replication::conninfo::ConnectionSettings;
use replication::stream::{Started, WalStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use wal::Lsn;

use super::contact::{Contact, Met, Unfit};
use super::conversation::Conversation;
use super::ended::{Ended, stopped, stream_failed};
use super::moments::{self, Asked, Asking};
use super::options::ReceiverOptions;
use super::resume::ResumeAt;
use super::state::{Connection, StreamGauges};
use super::storing::Spooling;
use super::trouble::Trouble;
use crate::clock::Clock;
use crate::error::{Error, Kind, Result};
use crate::repository::Repository;
use crate::repository::destination::{Destination, OpenDestination};
use crate::repository::index::IndexKeeper;
use crate::retry::Backoff;

/// After a connection of this length the next one is tried without much of a wait: commits may be
/// waiting for us.
const LASTED: Duration = Duration::from_secs(1);
/// What a stop says that comes between two streams.
const STOPPED_ALONE: &str = "stopped while no server was followed";
/// How often the server is asked whether it waits for us, and for its clock.
const ASK_INTERVAL: Duration = Duration::from_millis(2500);

/// Receives the WAL of one cluster until it is stopped.
pub struct Receiver {
    settings: ConnectionSettings,
    destination: OpenDestination,
    options: ReceiverOptions,
    clock: Arc<dyn Clock>,
    gauges: StreamGauges,
    keeping: OnceLock<Keeping>,
    spooling: Spooling,
}

impl Receiver {
    /// A receiver for the server behind `settings`, which shows its state in `gauges`.
    pub fn new(
        settings: ConnectionSettings,
        destination: &Destination,
        options: ReceiverOptions,
        clock: Arc<dyn Clock>,
        gauges: StreamGauges,
    ) -> Result<Self> {
        let (now, seen) = (Arc::clone(&clock), gauges.clone());
        let spooling = Spooling::new(options.spool.clone(), now, seen);
        Ok(Self {
            spooling,
            settings,
            destination: destination.open(true, &clock)?,
            options,
            clock,
            gauges,
            keeping: OnceLock::new(),
        })
    }

    /// Where it is stored.
    pub fn destination(&self) -> &OpenDestination {
        &self.destination
    }

    /// Receives until `stop` says so. The first contact must succeed; later ones are tried again
    /// for as long as the server or the repository is only unreachable.
    pub async fn run(self, stop: watch::Receiver<bool>) -> Result<()> {
        let outcome = self.run_until(stop).await;
        self.destination.settle().await;
        self.gauges
            .update(|state| state.connection = Connection::Stopped);
        outcome
    }

    async fn run_until(&self, mut stop: watch::Receiver<bool>) -> Result<()> {
        let new_backoff = || Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
        let mut backoff = new_backoff();
        let mut meetings = Meetings::default();
        self.spooling
            .show_what_is_left(self.destination.cluster())
            .await;
        loop {
            self.gauges
                .update(|state| state.connection = Connection::Connecting);
            let outcome = self.once(&mut meetings, stop.clone()).await;
            let refused = meetings.asked.take();
            meetings.refused = None;
            match outcome {
                Ok((Ended::Stopped, _)) => return Ok(()),
                Ok((Ended::NextTimeline, lasted)) => {
                    if lasted > LASTED {
                        backoff = new_backoff();
                    }
                }
                Ok((Ended::Removed, _)) => meetings.refused = refused,
                Ok((Ended::Lost(reason), lasted)) => {
                    tracing::warn!("lost the server, trying again: {reason}");
                    self.failed(&reason);
                    if lasted > LASTED {
                        backoff = new_backoff();
                    }
                }
                Err(error) if meetings.met && error.may_pass() => {
                    meetings.tell(&error);
                    self.failed(error.message());
                }
                Err(error) => return Err(error),
            }
            self.gauges
                .update(|state| state.connection = Connection::Waiting);
            tokio::select! {
                () = backoff.wait() => {}
                () = stopped(&mut stop) => {
                    tracing::info!("{STOPPED_ALONE}");
                    return Ok(());
                }
            }
        }
    }

    fn failed(&self, reason: &str) {
        let now = self.clock.now();
        self.gauges.update(|state| {
            state.reconnects += 1;
            state.failed(now, reason);
        });
    }

    async fn once(
        &self,
        meetings: &mut Meetings,
        stop: watch::Receiver<bool>,
    ) -> Result<(Ended, Duration)> {
        let since = Instant::now();
        let mut asked = stop.clone();
        let preparing = self.prepare(meetings);
        let prepared = tokio::select! {
            prepared = preparing => prepared?,
            () = stopped(&mut asked) => {
                tracing::info!("{STOPPED_ALONE}");
                return Ok((Ended::Stopped, Duration::ZERO));
            }
        };
        let ended = match prepared {
            Err(ended) => ended,
            Ok(Prepared {
                conversation,
                stream,
                moments,
                whole,
                asking,
            }) => {
                let ended = conversation.run(stream, moments, whole, stop).await;
                asking.abort();
                ended?
            }
        };
        Ok((ended, since.elapsed()))
    }

    /// Meets the first server of the list that can be followed.
    async fn meet(&self, meetings: &mut Meetings) -> Result<Box<Contact>> {
        let mut settings = Some(self.settings.clone());
        let mut unfit: Option<Error> = None;
        while let Some(tried) = settings.take() {
            let made = Contact::make(
                &tried,
                &self.destination,
                &self.spooling,
                &self.options,
                meetings.met,
            );
            match made.await {
                Ok(Met::Ready(contact)) => return Ok(contact),
                Ok(Met::Unfit(Unfit { why, others })) => {
                    unfit.get_or_insert(why);
                    settings = others.map(|others| *others);
                }
                // the rest of the list: what was found before says more
                Err(error) if unfit.is_some() && error.may_pass() => break,
                Err(error) => return Err(error),
            }
        }
        let why = unfit.expect("the list ends with a server that does not do");
        let is_alone = self.settings.is_one_host();
        // a standby comes on; a list may lead to another server in a moment, and a name too
        let is_waited_for = why.kind() == Kind::Unreachable
            || (meetings.met && !(is_alone && why.kind() == Kind::Damaged));
        if !is_waited_for {
            return Err(why);
        }
        self.has_met(meetings);
        let message = format!("no server can be followed now: {}", why.message());
        let failure = Error::new(Kind::Unreachable, message);
        Err(match why.hint_text() {
            Some(hint) => failure.hint(hint),
            None => failure,
        })
    }

    /// From now on whatever may pass is waited for.
    fn has_met(&self, meetings: &mut Meetings) {
        if !std::mem::replace(&mut meetings.met, true) {
            self.destination.persist();
        }
    }

    /// Meets the server and begins to stream; or says why there is nothing to stream.
    async fn prepare(&self, meetings: &mut Meetings) -> Result<Result<Prepared<'_>, Ended>> {
        let mut contact = *self.meet(meetings).await?;
        self.has_met(meetings);
        let server = contact.replication.described().to_owned();
        let resumed = contact.at;
        // another server may have it, and meanwhile it may have been stored
        let same = |refused: &&WalAsked| refused.server == server && refused.resumed == resumed;
        if let Some(refused) = meetings.refused.as_ref().filter(same) {
            let strict = self.options.strict;
            let skipping = contact.skip_removed(refused.start, strict, self.clock.as_ref());
            let holes = u64::try_from(skipping.await?).unwrap_or(u64::MAX);
            self.gauges.update(|state| state.holes += holes);
        }
        let known = contact.read_known().await?;
        meetings.asked = Some(WalAsked {
            server: server.clone(),
            resumed,
            start: contact.at.start,
        });
        let clock = Arc::clone(&self.clock);
        let gauges = self.gauges.clone();
        let storing = self.spooling.storing(&contact);
        let mut conversation =
            Conversation::new(&contact, known, storing, &self.options, clock, gauges).await?;
        let keeping = self
            .keeping
            .get_or_init(|| Keeping::begin(&contact.repository));
        let whole = keeping.whole.clone();
        conversation.tells(keeping.indexing.clone());
        let Contact {
            replication,
            sql,
            settings,
            at,
            ..
        } = contact;
        let slot = self.options.slot.as_deref();
        let asking = Asking {
            settings,
            pid: replication.backend_pid(),
            slot: self.options.slot.clone(),
        };
        let started = replication
            .start_replication(slot, at.start, at.timeline)
            .await;
        let stream = match started {
            Ok(Started::Streaming(stream)) => stream,
            Ok(Started::EndOfTimeline { .. }) => return Ok(Err(Ended::NextTimeline)),
            Err(error) => return stream_failed(&error).map(Err),
        };
        tracing::info!("streaming from {} on timeline {}", at.start, at.timeline);
        meetings.tell_the_end();
        let (asked, moments) = mpsc::channel(1);
        let interval = self.options.tip_interval.min(ASK_INTERVAL);
        let asking = tokio::spawn(moments::ask(sql, asking, interval, asked));
        self.gauges.update(|state| {
            state.connection = Connection::Streaming;
            state.begins();
            state.server = Some(server);
            state.slot.clone_from(&self.options.slot);
            state.timeline = Some(at.timeline);
        });
        Ok(Ok(Prepared {
            conversation,
            stream,
            moments,
            whole,
            asking,
        }))
    }
}

/// What is remembered from one meeting with a server to the next.
#[derive(Debug, Default)]
struct Meetings {
    /// One has succeeded.
    met: bool,
    /// Why none has succeeded since, as it was said.
    trouble: Trouble,
    /// What was asked for last.
    asked: Option<WalAsked>,
    /// The same, where the server no longer had it.
    refused: Option<WalAsked>,
}

impl Meetings {
    /// Says why a meeting did not succeed, if that is news.
    fn tell(&mut self, error: &Error) {
        let message = error.message();
        // a store tells of its outages itself
        if error.is_of_store() || !self.trouble.is_news(message, Instant::now()) {
            tracing::debug!("{message}");
            return;
        }
        let hint = error.hint_text().map(|hint| format!(". hint: {hint}"));
        tracing::warn!("{message}; trying again{}", hint.unwrap_or_default());
    }

    /// Says that it is over, if it was said that it was not.
    fn tell_the_end(&mut self) {
        if let Some(lasted) = self.trouble.is_over(Instant::now()) {
            let seconds = lasted.as_secs_f64();
            tracing::info!("a server is followed again, after {seconds:.0} s");
        }
    }
}

/// WAL that a server was asked for.
#[derive(Debug)]
struct WalAsked {
    server: String,
    /// Where the stream is to go on, by what is stored.
    resumed: ResumeAt,
    /// From here on: there, or behind what was refused before.
    start: Lsn,
}

/// Everything that a conversation needs.
struct Prepared<'a> {
    conversation: Conversation<'a>,
    stream: WalStream,
    moments: mpsc::Receiver<Asked>,
    whole: watch::Receiver<bool>,
    /// Ends with the conversation.
    asking: JoinHandle<()>,
}

/// The repositories are filled up, and summaries put together, for as long as the receiver lives,
/// whether the server is there or not: what takes long does not begin anew with each connection.
struct Keeping {
    whole: watch::Receiver<bool>,
    indexing: IndexKeeper,
    tasks: [JoinHandle<()>; 2],
}

impl Keeping {
    fn begin(repository: &Repository) -> Self {
        let (now_whole, whole) = watch::channel(repository.is_whole());
        let mending = tokio::spawn(repository.clone().keep_whole(now_whole));
        let (indexing, keep) = repository.clone().keep_indexed();
        Self {
            whole,
            indexing,
            tasks: [mending, tokio::spawn(keep)],
        }
    }
}

impl Drop for Keeping {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}
