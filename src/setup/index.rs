//! Summaries put together anew, of a repository that lost some, or whose archiver was stopped before
//! it came to them.

use std::fmt;
use std::sync::Arc;

use serde::Serialize;
use wal::TimelineId;

use crate::clock::Clock;
use crate::error::{Error, Result};
use crate::repository::destination::Destination;
use crate::repository::index::{GROUP_SEGMENTS, IndexState};
use crate::repository::layout::ObjectName;
use crate::repository::{Repository, ServerIdentity};

/// What became of the summaries of one cluster.
#[derive(Debug, Serialize)]
pub struct Rebuilt {
    schema: u32,
    /// The cluster's name.
    cluster: String,
    /// The system identifier.
    system_id: String,
    /// What became of each timeline's.
    timelines: Vec<RebuiltTimeline>,
}

#[derive(Debug, Serialize)]
struct RebuiltTimeline {
    timeline: TimelineId,
    #[serde(flatten)]
    state: IndexState,
}

/// Puts the summaries of a cluster's segments together where that is not done, and reads what is there:
/// what cannot be read is replaced. `told` hears how many bytes of WAL, of how many, were looked at.
pub async fn rebuild(
    destination: &Destination,
    system_id: Option<u64>,
    clock: &Arc<dyn Clock>,
    told: &(dyn Fn(u64, u64) + Sync),
) -> Result<Rebuilt> {
    // for reading first: a repository that was mistyped is not made
    let stored = destination.open(false, clock)?.stored(system_id).await?;
    let record = stored.cluster_record().await?;
    let record = record.ok_or_else(|| {
        let path = stored.locate(&ObjectName::Cluster);
        Error::damaged(format!("what says whose WAL this is is missing: {path}")).hint(
            "restore this object from a copy of the repository; `anywhen backup` writes it anew",
        )
    })?;
    let identity = ServerIdentity {
        system_id: stored.system_id(),
        major: record.major,
        block_bytes: record.block_bytes,
    };
    let open = destination.open(true, clock)?;
    let rebuilt = async {
        let repository = open.repository(identity, false).await?;
        rebuild_all(&repository, told).await
    };
    let rebuilt = rebuilt.await;
    open.settle().await;
    rebuilt
}

async fn rebuild_all(repository: &Repository, told: &(dyn Fn(u64, u64) + Sync)) -> Result<Rebuilt> {
    let catalog = repository.catalog().await?;
    let mut timelines = Vec::new();
    if let Some(size) = catalog.segment_size {
        let segments = |timeline| {
            let wal = catalog.timelines.get(timeline);
            wal.map_or(0, |wal| {
                u64::try_from(wal.segments.len()).unwrap_or(u64::MAX)
            })
        };
        let all: u64 = catalog.timelines.keys().map(segments).sum();
        let bytes = |segments: u64| segments.saturating_mul(size.bytes());
        let mut before = 0;
        for timeline in catalog.timelines.keys() {
            let counted = |groups: u64| {
                let done = before + groups.saturating_mul(GROUP_SEGMENTS);
                told(bytes(done.min(all)), bytes(all));
            };
            let state = repository.roll_up(*timeline, size, true, &counted).await?;
            before += segments(timeline);
            timelines.push(RebuiltTimeline {
                timeline: *timeline,
                state,
            });
        }
    }
    Ok(Rebuilt {
        schema: 1,
        cluster: repository.cluster().to_string(),
        system_id: repository.system_id().to_string(),
        timelines,
    })
}

impl fmt::Display for Rebuilt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cluster {}, system {}", self.cluster, self.system_id)?;
        if self.timelines.is_empty() {
            write!(f, "\n  no WAL is stored")?;
        }
        for RebuiltTimeline { timeline, state } in &self.timelines {
            let IndexState {
                kept,
                written,
                unfinished,
            } = state;
            write!(
                f,
                "\n  timeline {timeline}: {written} written, {kept} kept, {unfinished} not complete; \
                 each is of {GROUP_SEGMENTS} segments"
            )?;
        }
        Ok(())
    }
}
