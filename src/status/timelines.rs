//! The timelines that are stored, and how each came to be.

use serde::Serialize;
use wal::{Lsn, TimelineId};

use crate::repository::catalog::Catalog;

/// A timeline of which something is stored, or that another one grew out of.
#[derive(Debug, Clone, Serialize)]
pub struct TimelineStatus {
    /// Its number.
    pub timeline: TimelineId,
    /// The timeline that it left; `None` for the first.
    pub parent: Option<TimelineId>,
    /// Where.
    pub fork_lsn: Option<Lsn>,
    /// Why, in the server's words, as in `before 2026-11-20 …` or `no recovery target specified`.
    pub reason: Option<String>,
    /// The first WAL that is stored of it.
    pub start_lsn: Option<Lsn>,
    /// The end of what is stored of it; there may be holes before.
    pub end_lsn: Option<Lsn>,
    /// How many backups were taken on it.
    pub backup_count: usize,
}

/// Every timeline, the first one first.
pub(super) fn timelines(catalog: &Catalog) -> Vec<TimelineStatus> {
    let mut known = catalog.stored_timelines();
    for history in catalog.histories.values() {
        known.extend(history.entries().iter().map(|entry| entry.timeline));
    }
    let states = known.into_iter().map(|timeline| {
        let branch = catalog.branch(timeline);
        let left = branch.entries().last();
        let wal = catalog.timelines.get(&timeline);
        let stored = catalog
            .segment_size
            .and_then(|size| Some(wal?.coverage(size)));
        let backups = catalog.backups.iter();
        TimelineStatus {
            timeline,
            parent: left.map(|entry| entry.timeline),
            fork_lsn: left.map(|entry| entry.end),
            reason: left
                .map(|entry| entry.reason.clone())
                .filter(|it| !it.is_empty()),
            start_lsn: stored.and_then(|ranges| Some(ranges.first()?.start)),
            end_lsn: stored.and_then(|ranges| Some(ranges.last()?.end)),
            backup_count: backups.filter(|backup| backup.timeline == timeline).count(),
        }
    });
    states.collect()
}
