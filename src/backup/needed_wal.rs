//! The WAL that a backup needs, fetched by the backup itself: it is complete whether or not a
//! stream is running.

use std::future::Future;
use std::time::Duration;

use futures_util::StreamExt as _;
use replication::connection::Connection;
use replication::conninfo::ConnectionSettings;
use replication::stream::{Started, StatusUpdate, StreamError, StreamEvent, WalStream};
use tokio::time::{Instant, Interval, MissedTickBehavior};
use wal::{
    Lsn, PgTime, SegmentName, SegmentSize, Segmenter, TimelineId, Verifier, WalRange, WalkerStart,
};

use super::tries::Tries;
use crate::clock::Clock;
use crate::error::{Error, Kind, Result, chain};
use crate::receive::comparison::Comparison;
use crate::repository::Repository;
use crate::repository::catalog::TimelineWal;
use crate::repository::layout::{BackupId, ObjectName};
use crate::server::{self, ServerFacts};

/// How long the server may send no WAL while it is awaited; keepalives do not count.
const SILENCE_MAX: Duration = Duration::from_mins(1);
/// The server hears from us this often at least, whatever its `wal_sender_timeout` is.
const STATUS_INTERVAL_MAX: Duration = Duration::from_secs(10);
/// How many objects are looked at side by side.
const LOOKS_AT_ONCE: usize = 16;
/// How often what is stored is listed anew, where an object that was listed is gone.
const LISTINGS: usize = 3;

/// Where WAL is looked for that may differ, and where that of a backup is stored.
#[derive(Clone, Copy)]
pub(super) struct Places<'a> {
    /// Every repository of the cluster.
    pub(super) everywhere: &'a Repository,
    /// The one that has the backup first.
    pub(super) first: &'a Repository,
}

/// Keeps the server from removing WAL while a backup runs, and fetches what is not stored.
pub(super) struct NeededWal<'a> {
    settings: &'a ConnectionSettings,
    facts: &'a ServerFacts,
    clock: &'a dyn Clock,
    /// Holds a temporary slot, which goes with the connection. Its loss is no failure by itself:
    /// the WAL may be there nevertheless.
    keeper: Connection,
}

impl<'a> NeededWal<'a> {
    /// Makes the server keep WAL from now on.
    pub(super) async fn reserve(
        settings: &'a ConnectionSettings,
        facts: &'a ServerFacts,
        backup: &BackupId,
        clock: &'a dyn Clock,
    ) -> Result<Self> {
        let mut keeper = server::connect_replication(settings).await?;
        keeper
            .create_physical_slot(&slot_name(backup), true, true)
            .await
            .map_err(|error| server::slot_error("keep WAL for the backup", &error))?;
        Ok(Self {
            settings,
            facts,
            clock,
            keeper,
        })
    }

    /// Lets the server remove WAL again.
    pub(super) async fn release(self) {
        if let Err(error) = self.keeper.terminate().await {
            tracing::debug!("the server did not take our leave: {}", chain(&error));
        }
    }

    /// Sees to it that everything from the segment of `start` up to `end` is stored and verified.
    pub(super) async fn receive(
        &self,
        places: Places<'_>,
        timeline: TimelineId,
        start: Lsn,
        end: Lsn,
    ) -> Result<()> {
        let repository = places.first;
        let size = self.facts.segment_size;
        let range = WalRange {
            start: size.start_of(start),
            end,
        };
        let mut covered = range.start;
        let mut tries = Tries::new();
        while let Err(error) = self.try_receive(places, timeline, range).await {
            let stored = repository.timeline_wal(timeline).await;
            let now = stored.map_or(covered, |stored| stored.covered_from(range.start, size));
            if now > covered {
                covered = now;
                tries = Tries::new();
            }
            tries.again_after(error).await?;
        }
        check_verified(repository, timeline, range, size).await
    }

    /// Goes on from what is stored, the last of which is read from the server once more: what another
    /// history has stored there meanwhile would be restored with this backup.
    async fn try_receive(
        &self,
        places: Places<'_>,
        timeline: TimelineId,
        range: WalRange,
    ) -> Result<()> {
        let size = self.facts.segment_size;
        let comparison = Comparison::of_branch(self.settings, places.first, timeline, size).await?;
        let stored = places.first.timeline_wal(timeline).await?;
        let covered = stored.covered_from(range.start, size).min(range.end);
        let start = size.start_of(covered.saturating_sub(1)).max(range.start);
        self.follow(places, comparison, timeline, start, range.end)
            .await
    }

    /// Streams the timeline until `end` is stored.
    ///
    /// Not over the keeper's connection: a server that gives up its slot closes that, and the WAL
    /// may be there nevertheless.
    async fn follow(
        &self,
        places: Places<'_>,
        comparison: Comparison,
        timeline: TimelineId,
        start: Lsn,
        end: Lsn,
    ) -> Result<()> {
        let mut connection = server::connect_replication(self.settings).await?;
        // a standby of 13 does not know its timeline before it was asked for it
        let identity = connection.identify_system().await;
        let identity =
            identity.map_err(|error| server::query_error("identify the server", &error))?;
        if identity.system_id != self.facts.system_id {
            return Err(Error::usage(format!(
                "another system answers than the one that is backed up: expected={}, found={}",
                self.facts.system_id, identity.system_id
            ))
            .hint("name one server in the connection settings, and take the backup again"));
        }
        let started = connection.start_replication(None, start, timeline).await;
        let stream = match started.map_err(|error| stream_error(&error))? {
            Started::Streaming(stream) => stream,
            Started::EndOfTimeline { next, at, .. } => {
                return Err(timeline_ended(timeline, next, at, end));
            }
        };
        let size = self.facts.segment_size;
        let mut taking = Taking {
            everywhere: places.everywhere,
            repository: places.first,
            comparison,
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
        let mut ticks = tokio::time::interval(status_interval(self.facts.wal_sender_timeout_ms));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let attended = Attended {
            stream,
            ticks,
            clock: self.clock,
        };
        taking.run(attended, end).await
    }
}

/// The name of a backup's own slot: of letters, digits and underscores, and no other backup's.
fn slot_name(backup: &BackupId) -> String {
    let id = backup.as_str().chars().map(|letter| {
        if letter.is_ascii_alphanumeric() {
            letter.to_ascii_lowercase()
        } else {
            '_'
        }
    });
    format!("anywhen_backup_{}", id.collect::<String>())
}

/// Below a third of the server's `wal_sender_timeout` (in milliseconds; 0 is none), after which it
/// takes a silent receiver for dead.
fn status_interval(wal_sender_timeout_ms: u64) -> Duration {
    match wal_sender_timeout_ms {
        0 => STATUS_INTERVAL_MAX,
        timeout => Duration::from_millis((timeout / 4).max(1)).min(STATUS_INTERVAL_MAX),
    }
}

/// A stream whose server hears from us in time.
struct Attended<'a> {
    stream: WalStream,
    ticks: Interval,
    clock: &'a dyn Clock,
}

impl Attended<'_> {
    /// The next event; `None` if none has come by `deadline`.
    async fn next(&mut self, deadline: Instant) -> Option<Result<StreamEvent, StreamError>> {
        loop {
            tokio::select! {
                event = self.stream.next() => {
                    if let Ok(StreamEvent::Keepalive { reply_requested: true, .. }) = event {
                        self.stream.queue_status(self.sign_of_life());
                    }
                    return Some(event);
                }
                // the next turn sends it
                _ = self.ticks.tick() => self.stream.queue_status(self.sign_of_life()),
                () = tokio::time::sleep_until(deadline) => return None,
            }
        }
    }

    /// Does `work` while nothing is read, which may be long.
    async fn during<T>(&mut self, work: impl Future<Output = T>) -> T {
        let speaking = async {
            loop {
                self.ticks.tick().await;
                let status = self.sign_of_life();
                if let Err(error) = self.stream.send_status(status).await {
                    // reading will say why
                    tracing::debug!("the server does not hear us: {}", chain(&error));
                    std::future::pending::<()>().await;
                }
            }
        };
        tokio::select! {
            done = work => done,
            never = speaking => never,
        }
    }

    /// Acknowledges nothing: a server would take it for a slot's, or a synchronous commit's. The
    /// keeper's slot keeps the WAL meanwhile.
    fn sign_of_life(&self) -> StatusUpdate {
        StatusUpdate {
            write: Lsn::ZERO,
            flush: Lsn::ZERO,
            apply: Lsn::ZERO,
            reply_requested: false,
            now: PgTime::from_unix_micros(self.clock.now().as_microsecond()),
        }
    }
}

struct Taking<'a> {
    everywhere: &'a Repository,
    repository: &'a Repository,
    comparison: Comparison,
    timeline: TimelineId,
    size: SegmentSize,
    /// Where the segment at hand begins.
    start: Lsn,
    bytes: Vec<u8>,
    verifier: Verifier,
}

impl Taking<'_> {
    async fn run(&mut self, mut stream: Attended<'_>, end: Lsn) -> Result<()> {
        let mut end = end;
        while let Some(further) = self.receive(&mut stream, end).await? {
            end = further;
        }
        Ok(())
    }

    /// Takes and stores what comes up to `end`; gives where to go on to, where more is needed to compare
    /// the last of it.
    async fn receive(&mut self, stream: &mut Attended<'_>, end: Lsn) -> Result<Option<Lsn>> {
        let gathered = u64::try_from(self.bytes.len()).unwrap_or(u64::MAX);
        let mut received = self.start.saturating_add(gathered);
        let mut deadline = Instant::now() + SILENCE_MAX;
        while received < end {
            let Some(event) = stream.next(deadline).await else {
                return Err(Error::new(
                    Kind::Unreachable,
                    format!("the server sent no WAL up to {end}: it stands at {received}"),
                ));
            };
            match event.map_err(|error| stream_error(&error))? {
                StreamEvent::Wal { start, bytes, .. } => {
                    for part in Segmenter::new(self.size).cut(start, &bytes) {
                        received = part.range.end;
                        self.verifier.push(part.bytes);
                        self.bytes.extend_from_slice(part.bytes);
                        if self.size.start_of(received) == received {
                            stream.during(self.store(received)).await?;
                        }
                    }
                    deadline = Instant::now() + SILENCE_MAX;
                }
                StreamEvent::Keepalive { .. } => {}
                StreamEvent::TimelineEnd { next, at } => {
                    return Err(timeline_ended(self.timeline, next, at, end));
                }
                StreamEvent::ServerClosed => {
                    return Err(Error::new(
                        Kind::Unreachable,
                        "the server shut down before the backup's WAL was complete",
                    ));
                }
            }
        }
        stream.during(self.store(received)).await
    }

    /// Compares what is at hand with what is stored of it, and stores it where it is not, as a segment
    /// where it is whole. Gives up to where more must come before that can be done.
    async fn store(&mut self, end: Lsn) -> Result<Option<Lsn>> {
        if self.bytes.is_empty() {
            return Ok(None);
        }
        let (everywhere, place) = (self.everywhere, self.repository);
        let compared = self
            .comparison
            .compare(everywhere, place, self.start, &self.bytes)
            .await?;
        if compared.needs.is_some() {
            return Ok(compared.needs);
        }
        self.comparison.store_histories(self.repository).await?;
        if compared.is_stored {
            self.bytes.clear();
            self.start = end;
            return Ok(None);
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
        Ok(None)
    }
}

/// Refuses WAL that a stream has stored though it could not verify it: no restore could pass it.
async fn check_verified(
    repository: &Repository,
    timeline: TimelineId,
    range: WalRange,
    size: SegmentSize,
) -> Result<()> {
    let mut gone = None;
    // a piece that was listed may be gone when it is read: the segment has taken its place
    for _ in 0..LISTINGS {
        let stored = repository.timeline_wal(timeline).await?;
        let covered = stored.covered_from(range.start, size);
        if covered < range.end {
            return Err(Error::failure(format!(
                "WAL that the backup needs is gone from the repository: from={covered}, to={}",
                range.end
            ))
            .hint("if something is cleaning up there, stop it; then take the backup again"));
        }
        gone = first_gone(repository, objects_in(&stored, range, size)).await?;
        if gone.is_none() {
            return Ok(());
        }
    }
    let gone = gone.map_or_else(String::new, |name| repository.locate(&name));
    Err(Error::failure(format!(
        "WAL that the backup needs vanishes from the repository: {gone}"
    ))
    .hint("if something is cleaning up there, stop it; then take the backup again"))
}

/// Refuses unverified objects; gives one that is gone, if any is.
async fn first_gone(repository: &Repository, names: Vec<ObjectName>) -> Result<Option<ObjectName>> {
    let looks = names.into_iter().map(|name| async {
        let verified = repository.is_verified(&name).await;
        (name, verified)
    });
    let mut looks = futures_util::stream::iter(looks).buffer_unordered(LOOKS_AT_ONCE);
    while let Some((name, verified)) = looks.next().await {
        match verified {
            Ok(true) => {}
            Ok(false) => {
                return Err(Error::damaged(format!(
                    "WAL that the backup needs could not be verified when it was stored: {}",
                    repository.locate(&name)
                ))
                .hint(
                    "check the server's disk; then SELECT pg_switch_wal(); on the primary, and take \
                     the backup again, which begins behind it",
                ));
            }
            Err(error) if error.is_not_found() => return Ok(Some(name)),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(None)
}

/// The stored objects that the WAL in `range` is read from: of a complete segment that one alone.
fn objects_in(stored: &TimelineWal, range: WalRange, size: SegmentSize) -> Vec<ObjectName> {
    let overlaps = |it: WalRange| it.start < range.end && range.start < it.end;
    let segments = stored.segments.iter().copied();
    let segments = segments.filter(|segment| segment.range(size).is_some_and(overlaps));
    let pieces = stored.pieces.iter().flat_map(|(segment, ranges)| {
        let ranges = ranges.iter().copied();
        ranges.map(|range| (*segment, range))
    });
    let pieces =
        pieces.filter(|(segment, range)| overlaps(*range) && !stored.segments.contains(segment));
    segments
        .map(ObjectName::Segment)
        .chain(pieces.map(|(segment, range)| ObjectName::Piece { segment, range }))
        .collect()
}

fn timeline_ended(timeline: TimelineId, next: TimelineId, at: Lsn, end: Lsn) -> Error {
    Error::failure(format!(
        "the timeline changed during the backup: timeline {timeline} ended at {at} and went over to \
         {next}, needed up to {end}"
    ))
    .hint("take it again")
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use std::sync::Arc;

    use super::*;
    use crate::clock::SystemClock;
    use crate::repository::ServerIdentity;
    use crate::repository::destination::Destination;

    const MIB: u64 = 1 << 20;

    fn size() -> SegmentSize {
        SegmentSize::from_bytes(MIB).unwrap()
    }

    fn range(start: u64, end: u64) -> WalRange {
        WalRange {
            start: Lsn::new(start),
            end: Lsn::new(end),
        }
    }

    fn segment(number: u64) -> SegmentName {
        SegmentName::of(TimelineId::new(1).unwrap(), Lsn::new(number * MIB), size())
    }

    #[test]
    fn a_slot_is_named_by_its_backup_alone() {
        // process ids are equal in containers: two backups at once would fight for one slot
        let id: BackupId = "20261120T140300.000Z".parse().unwrap();
        let name = slot_name(&id);
        assert_eq!(name, "anywhen_backup_20261120t140300_000z");
        assert!(name.len() < 64);
    }

    #[test]
    fn a_server_hears_from_us_within_a_third_of_its_patience() {
        assert_eq!(status_interval(0), Duration::from_secs(10));
        for timeout in [4, 500, 2_000, 60_000, 3_600_000] {
            let interval = status_interval(timeout);
            assert!(interval * 3 < Duration::from_millis(timeout), "{timeout}");
            assert!(interval <= Duration::from_secs(10), "{timeout}");
        }
        assert_eq!(status_interval(1), Duration::from_millis(1));
    }

    #[test]
    fn looks_at_all_that_the_needed_wal_is_read_from_and_at_nothing_else() {
        let mut stored = TimelineWal::of_segments([1, 2, 3].map(segment));
        let pieces = |ranges: &[WalRange]| ranges.iter().copied().collect::<BTreeSet<_>>();
        let (of_2, of_4) = (range(2 * MIB, 2 * MIB + 9), range(4 * MIB, 4 * MIB + 8));
        let (next_4, last_4) = (
            range(4 * MIB + 8, 4 * MIB + 64),
            range(4 * MIB + 64, 4 * MIB + 80),
        );
        stored.pieces.insert(segment(2), pieces(&[of_2]));
        stored
            .pieces
            .insert(segment(4), pieces(&[of_4, next_4, last_4]));
        let piece = |range| ObjectName::Piece {
            segment: segment(4),
            range,
        };
        assert_eq!(
            objects_in(&stored, range(2 * MIB, 4 * MIB + 64), size()),
            [
                ObjectName::Segment(segment(2)),
                ObjectName::Segment(segment(3)),
                piece(of_4),
                piece(next_4)
            ]
        );
    }

    #[tokio::test]
    async fn refuses_wal_that_a_stream_stored_unverified() {
        // the backup would be listed, and recovery would stop at the damage before it is consistent
        let folder = tempfile::tempdir().unwrap();
        let identity = ServerIdentity {
            system_id: 7,
            major: 18,
            block_bytes: 8192,
        };
        let destination = Destination::local(folder.path(), "main");
        let clock: Arc<dyn Clock> = Arc::new(SystemClock);
        let open = destination.open(true, &clock).unwrap();
        let repository = open.repository(identity, false).await.unwrap();
        let timeline = TimelineId::new(1).unwrap();
        let whole = range(MIB, 2 * MIB);
        let noise = vec![0xab; usize::try_from(MIB).unwrap()];
        let mut verifier = Verifier::new(WalkerStart {
            at: whole.start,
            segment_size: size(),
            major: None,
            timeline,
            system_id: Some(7),
            skip_to: None,
        });
        verifier.push(&noise);
        let checked = verifier.check(whole, noise);
        let name = ObjectName::Segment(segment(1));
        let encoded = repository.encode_wal(name, timeline, size(), checked).await;
        repository.put_wal(&encoded.unwrap()).await.unwrap();

        let needed = range(MIB, MIB + 100);
        let refused = check_verified(&repository, timeline, needed, size()).await;
        let error = refused.unwrap_err();
        assert_eq!(error.kind(), Kind::Damaged);
        assert!(error.message().contains("verified"), "{error}");
        assert!(error.hint_text().is_some());
    }
}
