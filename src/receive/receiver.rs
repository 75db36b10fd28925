//! Receives the WAL of one cluster: meets the server, converses with it, and meets it again.

use std::sync::Arc;
use std::time::{Duration, Instant};

use replication::conninfo::ConnectionSettings;
use replication::stream::{Started, StreamError, WalStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use super::contact::Contact;
use super::conversation::Conversation;
use super::moments::{self, Asked};
use crate::clock::Clock;
use crate::error::{Error, Kind, Result, chain};
use crate::repository::destination::{Destination, OpenDestination};
use crate::retry::Backoff;

pub use super::contact::store_history;

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
pub(super) enum Ended {
    /// We were asked to stop, and everything is stored.
    Stopped,
    /// The timeline ended: go on with the next one at once.
    NextTimeline,
    /// The server or the connection went away.
    Lost(String),
    /// The server no longer has what would follow.
    Removed,
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
        let preparing = self.prepare(removed, met);
        let prepared = tokio::select! {
            prepared = preparing => prepared?,
            () = stopped(&mut asked) => return Ok((Ended::Stopped, Duration::ZERO)),
        };
        let ended = match prepared {
            Err(ended) => ended,
            Ok(Prepared {
                conversation,
                stream,
                moments,
                asking,
            }) => {
                let ended = conversation.run(stream, moments, stop).await;
                asking.abort();
                ended?
            }
        };
        Ok((ended, since.elapsed()))
    }

    /// Meets the server and begins to stream; or says why there is nothing to stream.
    async fn prepare(&self, removed: bool, met: &mut bool) -> Result<Result<Prepared<'_>, Ended>> {
        let mut contact =
            Contact::make(&self.settings, &self.destination, &self.options, *met).await?;
        *met = true;
        if removed {
            contact.skip_removed(self.clock.as_ref()).await?;
        }
        let clock = Arc::clone(&self.clock);
        let conversation = Conversation::new(&contact, &self.options, clock).await?;
        let Contact {
            replication,
            sql,
            settings,
            at,
            ..
        } = contact;
        let slot = self.options.slot.as_deref();
        let started = replication
            .start_replication(slot, at.start, at.timeline)
            .await;
        let stream = match started {
            Ok(Started::Streaming(stream)) => stream,
            Ok(Started::EndOfTimeline { .. }) => return Ok(Err(Ended::NextTimeline)),
            Err(error) => return stream_failed(&error).map(Err),
        };
        tracing::info!("streaming from {} on timeline {}", at.start, at.timeline);
        let (asked, moments) = mpsc::channel(1);
        let interval = self.options.tip_interval;
        let asking = tokio::spawn(moments::ask(sql, settings, interval, asked));
        Ok(Ok(Prepared {
            conversation,
            stream,
            moments,
            asking,
        }))
    }
}

/// Everything that a conversation needs.
struct Prepared<'a> {
    conversation: Conversation<'a>,
    stream: WalStream,
    moments: mpsc::Receiver<Asked>,
    asking: JoinHandle<()>,
}

/// What a failed stream means for the next one.
pub(super) fn stream_failed(error: &StreamError) -> Result<Ended> {
    match error.sqlstate() {
        Some("58P01") => Ok(Ended::Removed),
        // the slot is still held by our own last connection
        Some("55006") => Ok(Ended::Lost(chain(error))),
        // a standby that has not received what we have
        Some(_) if chain(error).contains("ahead of the WAL flush position") => {
            Ok(Ended::Lost(chain(error)))
        }
        _ if error.is_transient() => Ok(Ended::Lost(chain(error))),
        _ => Err(Error::failure(format!(
            "cannot stream from the server: {}",
            chain(error)
        ))),
    }
}

/// Returns once a stop was asked for.
pub(super) async fn stopped(stop: &mut watch::Receiver<bool>) {
    if stop.wait_for(|asked| *asked).await.is_err() {
        std::future::pending::<()>().await;
    }
}
