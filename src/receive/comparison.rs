//! Whether a server's WAL is the one that is stored: asked by those who store some of it without a stream.
//!
//! A copy of a data directory, or a server that was set back, has the identifier of the first one and
//! writes other WAL under the same names. A stream compares what comes again with what is stored; here
//! the same is done once before a backup, and for each stretch that a backup brings.

use std::time::Duration;

use bytes::Bytes;
use replication::connection::Connection;
use replication::conninfo::ConnectionSettings;
use replication::stream::{Started, StatusUpdate, StreamError, StreamEvent, WalStream};
use wal::{Lsn, PgTime, Reach, SegmentName, SegmentSize, TimelineHistory, TimelineId, WalRange};

use super::contact::{left_behind, read_histories, set_back, tell_what_was_left_behind};
use super::ended::{Ended, stream_failed};
use super::intake::TwoHistories;
use super::known::Known;
use super::resume::{ResumeAt, compared_at};
use crate::clock::Clock;
use crate::error::{Error, Kind, Result};
use crate::repository::Repository;
use crate::repository::catalog::Catalog;
use crate::repository::layout::ObjectName;
use crate::server::{self, ServerFacts};

/// A server that sends nothing for so long, though it has what was asked for, is gone.
const SILENCE_MAX: Duration = Duration::from_mins(1);

/// What a server's WAL was found to be, beside the stored one.
#[derive(Debug)]
pub struct Lineage {
    branch: TimelineHistory,
    catalog: Catalog,
    size: SegmentSize,
    /// Where the server has what is stored.
    compared: Option<WalRange>,
}

impl Lineage {
    /// The timeline that the server was on.
    pub fn timeline(&self) -> TimelineId {
        self.branch.timeline()
    }

    /// Whether the server surely wrote the WAL up to `lsn` on `timeline` that is stored: from there on it is
    /// stored without a break, along the server's branch, up to where the server was found to have the same.
    pub fn has_written(&self, timeline: TimelineId, lsn: Lsn) -> bool {
        let is_on_branch = match self.branch.reach(timeline) {
            Reach::Whole => true,
            Reach::Until(fork) => lsn <= fork,
            Reach::NotAncestor => false,
        };
        let Some(compared) = self.compared.filter(|_| is_on_branch) else {
            return false;
        };
        if lsn >= compared.start {
            return lsn <= compared.end;
        }
        let stored = self.catalog.reach(&self.branch, timeline, lsn, self.size);
        stored.lsn >= compared.start
    }
}

/// Refuses a server whose WAL is another history than the stored one, or a past of it, as far as the
/// server still has what is needed to tell.
pub async fn refuse_another_history(
    settings: &ConnectionSettings,
    repository: &Repository,
    facts: &ServerFacts,
    clock: &dyn Clock,
) -> Result<Lineage> {
    let size = facts.segment_size;
    let failed = |error| server::query_error("ask how far the server is", &error);
    let mut connection = server::connect_replication(settings).await?;
    // before the question, so that what another archiver stores meanwhile does not seem ahead
    let catalog = repository.wal_catalog().await?;
    let now = connection.identify_system().await.map_err(failed)?;
    if let Some(why) = left_behind(repository, now.timeline, size).await? {
        return Err(why);
    }
    let (branch, _) = read_histories(&mut connection, repository, now.timeline).await?;
    tell_what_was_left_behind(&branch, &catalog, size);
    let stored = catalog.timelines.get(&now.timeline);
    if let Some(end) = stored
        .and_then(|wal| wal.end(size))
        .filter(|end| *end > now.xlogpos)
    {
        let mut sql = server::connect_sql(settings).await?;
        if !server::is_in_recovery(&mut sql).await.map_err(failed)? {
            return Err(set_back(now.timeline, now.xlogpos, end));
        }
    }
    let compared = match compared_at(&branch, &catalog, now.xlogpos, size) {
        None => None,
        Some(at) => {
            let known = Known::of(repository, &branch, at, size).await?;
            let until = known.compared_until(at.start).min(now.xlogpos);
            compare_at(connection, at, &known, until, clock).await?
        }
    };
    Ok(Lineage {
        branch,
        catalog,
        size,
        compared,
    })
}

/// Compares what the server has from `at` on, until `until`; `None` where it cannot be compared.
async fn compare_at(
    connection: Connection,
    at: ResumeAt,
    known: &Known,
    until: Lsn,
    clock: &dyn Clock,
) -> Result<Option<WalRange>> {
    if until <= at.start {
        return Ok(None);
    }
    let started = connection.start_replication(None, at.start, at.timeline);
    let has_all = match started.await {
        Ok(Started::Streaming(stream)) => compare_stream(stream, at, known, until, clock).await?,
        Ok(Started::EndOfTimeline { .. }) => false,
        Err(error) => {
            not_compared(at, &error)?;
            false
        }
    };
    Ok(has_all.then_some(WalRange {
        start: at.start,
        end: until,
    }))
}

/// Reads what the server has from `at` on, until `until`, beside what is stored there. Whether all of it came;
/// what differs is an error.
async fn compare_stream(
    mut stream: WalStream,
    at: ResumeAt,
    known: &Known,
    until: Lsn,
    clock: &dyn Clock,
) -> Result<bool> {
    let mut came: Vec<u8> = Vec::new();
    while end_of(at.start, &came) < until {
        let Ok(event) = tokio::time::timeout(SILENCE_MAX, stream.next()).await else {
            return Err(Error::new(
                Kind::Unreachable,
                format!("the server sent no WAL up to {until}, which it has"),
            ));
        };
        match event {
            Ok(StreamEvent::Wal { bytes, .. }) => {
                if let Some(lsn) = known.differs(at.start, &came, &bytes) {
                    return Err(another_history(lsn, at.timeline));
                }
                came.extend_from_slice(&bytes);
            }
            // nothing is acknowledged; a server that gets no answer takes us for dead
            Ok(StreamEvent::Keepalive {
                reply_requested: true,
                ..
            }) => stream.queue_status(StatusUpdate {
                write: Lsn::ZERO,
                flush: Lsn::ZERO,
                apply: Lsn::ZERO,
                reply_requested: false,
                now: PgTime::from_unix_micros(clock.now().as_microsecond()),
            }),
            Ok(StreamEvent::Keepalive { .. }) => {}
            Ok(StreamEvent::TimelineEnd { .. }) => return Ok(false),
            Ok(StreamEvent::ServerClosed) => {
                return Err(Error::new(Kind::Unreachable, "the server shut down"));
            }
            Err(error) => {
                not_compared(at, &error)?;
                return Ok(false);
            }
        }
    }
    Ok(true)
}

/// The server no longer has what is stored last: there is nothing to tell it by.
fn not_compared(at: ResumeAt, error: &StreamError) -> Result<()> {
    match stream_failed(error)? {
        Ended::Removed => {
            tracing::warn!(
                "the server no longer has WAL from {} on timeline {}: it is not compared with what is \
                 stored. hint: is it the server that the stored WAL came from, and no copy of it? a copy \
                 wants its own --cluster name",
                at.start,
                at.timeline
            );
            Ok(())
        }
        Ended::Lost(why) => Err(Error::new(Kind::Unreachable, why)),
        Ended::Stopped | Ended::NextTimeline => Ok(()),
    }
}

fn another_history(at: Lsn, timeline: TimelineId) -> Error {
    TwoHistories { at, timeline }.into()
}

fn end_of(start: Lsn, bytes: &[u8]) -> Lsn {
    start.saturating_add(u64::try_from(bytes.len()).unwrap_or(u64::MAX))
}

/// What is stored of a server's branch, for whoever stores WAL of it.
pub struct Comparison {
    branch: TimelineHistory,
    histories: Vec<(TimelineId, Bytes)>,
    size: SegmentSize,
}

impl Comparison {
    /// Of the branch that `timeline` is the end of, as the server behind `settings` has it.
    pub async fn of_branch(
        settings: &ConnectionSettings,
        repository: &Repository,
        timeline: TimelineId,
        size: SegmentSize,
    ) -> Result<Self> {
        let mut connection = server::connect_replication(settings).await?;
        let (branch, histories) = read_histories(&mut connection, repository, timeline).await?;
        Ok(Self {
            branch,
            histories,
            size,
        })
    }

    /// Compares what came of a segment, from its `start` on, with what is stored of it: `everywhere`, and
    /// in the `place` that it is to be stored in, which may know less.
    pub async fn compare(
        &self,
        everywhere: &Repository,
        place: &Repository,
        start: Lsn,
        came: &[u8],
    ) -> Result<Compared> {
        let timeline = self.branch.timeline();
        let at = ResumeAt {
            timeline,
            start,
            known: self.size.end_of(start),
        };
        let known = Known::of(everywhere, &self.branch, at, self.size).await?;
        if let Some(lsn) = known.differs(start, &[], came) {
            return Err(another_history(lsn, timeline));
        }
        let end = end_of(start, came);
        let needs = known.needs(end);
        let known = if everywhere.has_several_places() {
            Known::of(place, &self.branch, at, self.size).await?
        } else {
            known
        };
        let is_stored = known.end(start) >= end;
        let range = WalRange { start, end };
        // it would be taken for stored under the name of what is damaged
        let is_lost = known.is_lost() || (!is_stored && known.damaged_pieces().contains(&range));
        if is_lost {
            let segment = SegmentName::of(timeline, start, self.size);
            let segment = place.locate(&ObjectName::Segment(segment));
            return Err(Error::damaged(format!(
                "stored WAL that the backup needs cannot be read: {segment}"
            ))
            .hint(
                "SELECT pg_switch_wal(); on the primary, and take the backup again, which begins behind it",
            ));
        }
        Ok(Compared { is_stored, needs })
    }

    /// Stores the history files that are missing. To be called once something was compared, and before
    /// anything is stored.
    pub async fn store_histories(&mut self, repository: &Repository) -> Result<()> {
        for (timeline, content) in std::mem::take(&mut self.histories) {
            let name = ObjectName::History(timeline);
            repository.store_file(&name, content).await?;
        }
        Ok(())
    }
}

/// What a comparison found; what differs is an error.
#[derive(Debug)]
pub struct Compared {
    /// All of it is stored already.
    pub is_stored: bool,
    /// What is stored overlaps what came, and can be compared as a whole alone: once WAL up to here has
    /// come.
    pub needs: Option<Lsn>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::repository::store::Listed;

    const MIB: u64 = 1 << 20;

    fn timeline(id: u32) -> TimelineId {
        TimelineId::new(id).unwrap()
    }

    fn at(mib: u64) -> Lsn {
        Lsn::new(mib * MIB)
    }

    /// A server on timeline 2, which left timeline 1 after 10 MiB. Stored are 4 to 8 and 9 to 10 MiB of the one, 10
    /// to 14 MiB of the other; compared were 13 to 14 MiB.
    fn lineage() -> Lineage {
        let size = SegmentSize::from_bytes(MIB).unwrap();
        let mut catalog = Catalog::default();
        let stored = [(1, 4..8), (1, 9..10), (2, 10..14)];
        let stored = stored.into_iter().flat_map(|(id, range)| {
            range.map(move |mib| SegmentName::of(timeline(id), at(mib), size))
        });
        let listed: Vec<Listed> = stored
            .map(|segment| Listed {
                path: ObjectName::Segment(segment).path(),
                bytes: 1,
            })
            .collect();
        catalog.add_listing(&listed);
        let history = format!("1\t{}\tno reason\n", at(10));
        Lineage {
            branch: TimelineHistory::parse(timeline(2), history.as_bytes()).unwrap(),
            catalog,
            size,
            compared: Some(WalRange {
                start: at(13),
                end: at(14),
            }),
        }
    }

    #[test]
    fn what_leads_without_a_hole_to_what_was_compared_was_written_by_the_server() {
        let lineage = lineage();
        for (id, mib, expected) in [
            (2, 14, true),
            (2, 13, true),
            (2, 11, true),
            (1, 10, true),
            (1, 9, true),
            // a hole follows
            (1, 8, false),
            (1, 5, false),
            // behind the fork, and beyond what was compared
            (1, 11, false),
            (2, 15, false),
            (3, 12, false),
        ] {
            let has_written = lineage.has_written(timeline(id), at(mib));
            assert_eq!(has_written, expected, "{mib} MiB on timeline {id}");
        }
        let compared = None;
        let nothing = Lineage {
            compared,
            ..lineage
        };
        assert!(!nothing.has_written(timeline(2), at(14)));
    }
}
