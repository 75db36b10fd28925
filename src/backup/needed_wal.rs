//! The WAL that a backup needs, fetched by the backup itself: it is complete whether or not a
//! stream is running.

use replication::connection::Connection;
use replication::conninfo::ConnectionSettings;
use replication::stream::{Started, StreamError, StreamEvent, WalStream};
use wal::{Lsn, SegmentName, SegmentSize, Segmenter, TimelineId, Verifier, WalRange, WalkerStart};

use crate::error::{Error, Kind, Result, chain};
use crate::receive::receiver::store_history;
use crate::repository::Repository;
use crate::repository::layout::ObjectName;
use crate::server::{self, ServerFacts};

/// How long the server may be silent while WAL is awaited.
const SILENCE_MAX: std::time::Duration = std::time::Duration::from_mins(1);

/// Keeps the server from removing WAL while a backup runs, and fetches what is not stored.
pub(super) struct NeededWal<'a> {
    settings: &'a ConnectionSettings,
    facts: &'a ServerFacts,
    /// Holds a temporary slot, which goes with the connection.
    keeper: Connection,
}

impl<'a> NeededWal<'a> {
    /// Makes the server keep WAL from now on.
    pub(super) async fn reserve(
        settings: &'a ConnectionSettings,
        facts: &'a ServerFacts,
    ) -> Result<Self> {
        let mut keeper = server::connect_replication(settings).await?;
        let name = format!("anywhen_backup_{}", std::process::id());
        keeper
            .create_physical_slot(&name, true, true)
            .await
            .map_err(|error| server::slot_error("keep WAL for the backup", &error))?;
        Ok(Self {
            settings,
            facts,
            keeper,
        })
    }

    /// Lets the server remove WAL again.
    pub(super) async fn release(self) {
        if let Err(error) = self.keeper.terminate().await {
            tracing::debug!("the server did not take our leave: {}", chain(&error));
        }
    }

    /// Sees to it that everything from the segment of `start` up to `end` is stored.
    pub(super) async fn receive(
        &self,
        repository: &Repository,
        timeline: TimelineId,
        start: Lsn,
        end: Lsn,
    ) -> Result<()> {
        let size = self.facts.segment_size;
        let mut timeline = timeline;
        let mut from = size.start_of(start);
        self.store_history(repository, timeline).await?;
        loop {
            let stored = repository.timeline_wal(timeline).await?;
            let covered = stored.covered_from(from, size);
            if covered >= end {
                return Ok(());
            }
            let at = size.start_of(covered);
            match self.follow(repository, timeline, at, end).await? {
                None => return Ok(()),
                Some((next, fork)) => {
                    timeline = next;
                    from = size.start_of(fork);
                    self.store_history(repository, timeline).await?;
                }
            }
        }
    }

    /// Not over the keeper's connection: a server that gives up its slot closes that, and the WAL
    /// may be there nevertheless.
    async fn store_history(&self, repository: &Repository, timeline: TimelineId) -> Result<()> {
        let mut connection = server::connect_replication(self.settings).await?;
        store_history(&mut connection, repository, timeline).await?;
        Ok(())
    }

    /// Streams one timeline until `end` is stored, or the timeline ends: then says which follows.
    async fn follow(
        &self,
        repository: &Repository,
        timeline: TimelineId,
        start: Lsn,
        end: Lsn,
    ) -> Result<Option<(TimelineId, Lsn)>> {
        let mut connection = server::connect_replication(self.settings).await?;
        // a standby of 13 does not know its timeline before it was asked for it
        let identity = connection.identify_system().await;
        identity.map_err(|error| server::query_error("identify the server", &error))?;
        let started = connection.start_replication(None, start, timeline).await;
        let stream = match started.map_err(|error| stream_error(&error))? {
            Started::Streaming(stream) => stream,
            Started::EndOfTimeline { next, at, .. } => return Ok(Some((next, at))),
        };
        let size = self.facts.segment_size;
        let mut taking = Taking {
            repository,
            timeline,
            size,
            start,
            bytes: Vec::new(),
            verifier: Verifier::new(WalkerStart {
                at: start,
                segment_size: size,
                major: None,
                timeline,
                system_id: Some(self.facts.system_id),
                skip_to: None,
            }),
        };
        taking.run(stream, end).await
    }
}

struct Taking<'a> {
    repository: &'a Repository,
    timeline: TimelineId,
    size: SegmentSize,
    /// Where the segment at hand begins.
    start: Lsn,
    bytes: Vec<u8>,
    verifier: Verifier,
}

impl Taking<'_> {
    async fn run(&mut self, mut stream: WalStream, end: Lsn) -> Result<Option<(TimelineId, Lsn)>> {
        let mut received = self.start;
        while received < end {
            let event = tokio::time::timeout(SILENCE_MAX, stream.next()).await;
            let event = event.map_err(|_elapsed| {
                Error::new(
                    Kind::Unreachable,
                    format!("the server sent no WAL up to {end}: it stands at {received}"),
                )
            })?;
            match event.map_err(|error| stream_error(&error))? {
                StreamEvent::Wal { start, bytes, .. } => {
                    for part in Segmenter::new(self.size).cut(start, &bytes) {
                        received = part.range.end;
                        self.verifier.push(part.bytes);
                        self.bytes.extend_from_slice(part.bytes);
                        if self.size.start_of(received) == received {
                            self.store(received).await?;
                        }
                    }
                }
                // nothing is acknowledged here: a temporary slot keeps the WAL meanwhile
                StreamEvent::Keepalive { .. } => {}
                StreamEvent::TimelineEnd { next, at } => {
                    self.store(received).await?;
                    return Ok(Some((next, at)));
                }
                StreamEvent::ServerClosed => {
                    return Err(Error::new(
                        Kind::Unreachable,
                        "the server shut down before the backup's WAL was complete",
                    ));
                }
            }
        }
        self.store(received).await?;
        Ok(None)
    }

    /// Stores what is at hand, as a segment where it is whole.
    async fn store(&mut self, end: Lsn) -> Result<()> {
        if self.bytes.is_empty() {
            return Ok(());
        }
        let range = WalRange {
            start: self.start,
            end,
        };
        let segment = SegmentName::of(self.timeline, self.start, self.size);
        let name = if range.len_bytes() == self.size.bytes() {
            ObjectName::Segment(segment)
        } else {
            ObjectName::Piece { segment, range }
        };
        let checked = self.verifier.check(range, std::mem::take(&mut self.bytes));
        if let wal::Verdict::Unverified { from, reason } = checked.verdict() {
            return Err(Error::damaged(format!(
                "the WAL that the backup needs cannot be verified from {from}: {reason}"
            ))
            .hint("check the server's disk, and take the backup again"));
        }
        let encoded = self
            .repository
            .encode_wal(name, self.timeline, self.size, checked)
            .await?;
        self.repository.put_wal(&encoded).await?;
        self.start = end;
        Ok(())
    }
}

fn stream_error(error: &StreamError) -> Error {
    let message = format!(
        "cannot receive the WAL that the backup needs: {}",
        chain(error)
    );
    match error.sqlstate() {
        Some("58P01") => Error::failure(message).hint(
            "the server removed it while the backup ran: raise max_slot_wal_keep_size, and take \
             the backup again",
        ),
        _ if error.is_transient() => Error::new(Kind::Unreachable, message),
        _ => Error::failure(message),
    }
}
