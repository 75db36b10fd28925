//! Missing stretches, and the moments around them.

use std::sync::atomic::{AtomicBool, Ordering};

use jiff::Timestamp;
use wal::{Lsn, SegmentName, SegmentSize, TimelineId};

use super::{HoleStatus, Window};
use crate::error::Result;
use crate::repository::Repository;
use crate::repository::catalog::Catalog;
use crate::repository::index::Summaries;
use crate::repository::summary::SegmentSummary;
use crate::repository::walk::Damage;

/// So many segments on each side of a hole are looked at for a commit: of a server that was idle around it
/// nothing else is known than its backups.
const LOOKED_AT: u64 = 16;

/// What is missing between stretches that are stored, or cannot be used.
pub(super) async fn holes(
    repository: &Repository,
    catalog: &Catalog,
    windows: &[Window],
    damaged: &[(TimelineId, Damage)],
) -> Result<Vec<HoleStatus>> {
    let Some(size) = catalog.segment_size else {
        return Ok(Vec::new());
    };
    let mut holes = missing(catalog, size);
    if !repository.unheard().is_empty() {
        // what is missing at an end may be where nobody can be asked
        holes.retain(|hole| !hole.is_lost_end);
    }
    holes.extend(damaged.iter().map(|(timeline, damage)| {
        HoleStatus::between(*timeline, damage.at, size.end_of(damage.at))
    }));
    let moments = Moments {
        summaries: Summaries::new(repository, catalog, size),
        catalog,
        windows,
        size,
        lacks_key: AtomicBool::new(false),
    };
    for hole in &mut holes {
        moments.add_to(hole).await?;
    }
    Ok(holes)
}

impl HoleStatus {
    fn between(timeline: TimelineId, start: Lsn, end: Lsn) -> Self {
        Self {
            timeline,
            start_lsn: start,
            end_lsn: end,
            earliest: None,
            latest: None,
            is_lost_end: false,
        }
    }
}

fn missing(catalog: &Catalog, size: SegmentSize) -> Vec<HoleStatus> {
    let unverified = catalog.holes.iter().filter(|hole| hole.unverified);
    let mut holes: Vec<HoleStatus> = unverified
        .map(|hole| HoleStatus::between(hole.timeline, hole.start, hole.end))
        .collect();
    for (timeline, wal) in &catalog.timelines {
        let coverage = wal.coverage(size);
        for (before, after) in coverage.iter().zip(coverage.iter().skip(1)) {
            let recorded = catalog.holes.iter().any(|hole| {
                hole.timeline == *timeline && hole.start < after.start && before.end < hole.end
            });
            // between two backups that brought their own WAL there is a gap, which is no alarm
            let streamed = catalog.tips.contains_key(timeline);
            if recorded || streamed {
                holes.push(HoleStatus::between(*timeline, before.end, after.start));
            }
        }
    }
    for timeline in catalog.tips.keys() {
        if let Some(lost) = catalog.lost_end(*timeline, size) {
            holes.push(HoleStatus {
                is_lost_end: true,
                ..HoleStatus::between(*timeline, lost.start, lost.end)
            });
        }
    }
    holes
}

/// What is known of when something happened.
struct Moments<'a> {
    summaries: Summaries<'a>,
    catalog: &'a Catalog,
    windows: &'a [Window],
    size: SegmentSize,
    /// Whether a key was missing: then it is for all that is asked later.
    lacks_key: AtomicBool,
}

impl Moments<'_> {
    async fn add_to(&self, hole: &mut HoleStatus) -> Result<()> {
        let (start, end) = (hole.start_lsn, hole.end_lsn);
        let mut windows = self.windows.iter();
        // a server that was idle had moments behind its last commit too
        let window = windows
            .find(|window| window.timeline == hole.timeline && window.latest_lsn == start)
            .map(|window| window.latest);
        let backups = || {
            let backups = self.catalog.backups.iter();
            backups.filter(|backup| backup.timeline == hole.timeline)
        };
        let backup = backups().rfind(|backup| backup.stop_lsn <= start);
        let commit = self.last_commit_before(hole.timeline, start).await?;
        let backup = backup.map(|backup| backup.finished_at);
        hole.earliest = commit.max(window).max(backup);
        if hole.is_lost_end {
            return Ok(());
        }
        let commit = self.first_commit_from(hole.timeline, end).await?;
        let backup = backups().find(|backup| backup.start_lsn >= end);
        let backup = backup.map(|backup| backup.finished_at);
        hole.latest = commit.into_iter().chain(backup).min();
        Ok(())
    }

    /// What is noted of a segment, for whoever may read it: a hole is shown to all.
    async fn summary_of(&self, segment: SegmentName) -> Result<Option<SegmentSummary>> {
        if self.lacks_key.load(Ordering::Relaxed) {
            return Ok(None);
        }
        match self.summaries.of(segment).await {
            Err(error) if error.lacks_key() => {
                self.lacks_key.store(true, Ordering::Relaxed);
                Ok(None)
            }
            summary => Ok(summary?),
        }
    }

    async fn last_commit_before(
        &self,
        timeline: TimelineId,
        lsn: Lsn,
    ) -> Result<Option<Timestamp>> {
        let mut at = lsn;
        for _ in 0..LOOKED_AT {
            at = self.size.start_of(at.saturating_sub(1));
            let segment = SegmentName::of(timeline, at, self.size);
            let summary = self.summary_of(segment).await?;
            let commit = summary.and_then(|summary| summary.last_commit);
            // a stretch that is damaged begins within a segment, and ends the summary's worth
            if let Some(commit) = commit.filter(|commit| commit.lsn < lsn) {
                return Ok(Some(commit.time));
            }
            if at == Lsn::ZERO {
                break;
            }
        }
        Ok(None)
    }

    async fn first_commit_from(&self, timeline: TimelineId, lsn: Lsn) -> Result<Option<Timestamp>> {
        let mut at = self.size.start_of(lsn);
        for _ in 0..LOOKED_AT {
            let segment = SegmentName::of(timeline, at, self.size);
            let summary = self.summary_of(segment).await?;
            if let Some(commit) = summary.and_then(|summary| summary.first_commit) {
                return Ok(Some(commit.time));
            }
            at = self.size.end_of(at);
        }
        Ok(None)
    }
}
