//! What can be restored: which backups serve a branch, and up to which moment.

use jiff::{Timestamp, Unit};
use wal::{Lsn, Reach, SegmentName, SegmentSize, TimelineHistory};

use super::resolve::{Resolver, Wanted};
use super::walk::{Ended, Stretch, walk};
use crate::error::Result;
use crate::repository::Repository;
use crate::repository::catalog::{BranchEnd, Catalog};
use crate::repository::records::BackupRecord;

/// A backup that serves a branch.
#[derive(Debug, Clone, Copy)]
pub(super) struct Candidate<'a> {
    pub(super) backup: &'a BackupRecord,
    /// Where the WAL that is stored without a break from the backup on ends.
    pub(super) end: BranchEnd,
}

impl<'a> Candidate<'a> {
    /// The backup, if it lies on the branch and its own WAL is stored whole.
    pub(super) fn of(
        catalog: &Catalog,
        branch: &TimelineHistory,
        backup: &'a BackupRecord,
        size: SegmentSize,
    ) -> Option<Self> {
        match branch.reach(backup.timeline) {
            Reach::NotAncestor => return None,
            Reach::Until(fork) if backup.stop_lsn > fork => return None,
            Reach::Until(_) | Reach::Whole => {}
        }
        // recovery asks for whole segments
        let from = size.start_of(backup.start_lsn);
        let end = catalog.reach(branch, backup.timeline, from, size);
        (end.lsn >= backup.stop_lsn).then_some(Self { backup, end })
    }

    /// The latest moment for which every commit up to it is known to be stored, to the microsecond.
    ///
    /// `newest_stamp` is the latest of the commits that were seen; `tip` is whether the stream's word on
    /// the end of what is stored counts.
    pub(super) fn latest(
        &self,
        catalog: &Catalog,
        newest_stamp: Option<Timestamp>,
        tip: bool,
    ) -> Timestamp {
        let confirmed = catalog
            .tip_within(self.end)
            .filter(|_| tip)
            .and_then(|tip| tip.moment);
        let latest = self
            .backup
            .finished_at
            .max(newest_stamp.unwrap_or(Timestamp::MIN));
        floor_micros(latest.max(confirmed.unwrap_or(Timestamp::MIN)))
    }
}

/// What is printed must be reachable, and print has microseconds.
pub(super) fn floor_micros(time: Timestamp) -> Timestamp {
    let floor = jiff::TimestampRound::new()
        .smallest(Unit::Microsecond)
        .mode(jiff::RoundMode::Floor);
    time.round(floor).unwrap_or(time)
}

/// The backups that serve a branch, newest first.
pub(super) fn candidates<'a>(
    catalog: &'a Catalog,
    branch: &TimelineHistory,
    size: SegmentSize,
) -> Vec<Candidate<'a>> {
    let serving = catalog.backups.iter();
    let mut serving: Vec<Candidate<'a>> = serving
        .filter_map(|backup| Candidate::of(catalog, branch, backup, size))
        .collect();
    serving.sort_by(|a, b| {
        let key = |it: &Candidate<'a>| (it.backup.stop_lsn, it.backup.finished_at);
        key(b).cmp(&key(a))
    });
    serving
}

/// Whether a restore along `branch` can begin with `backup`: it lies on the branch, and its own WAL is
/// stored without a break.
pub fn serves(
    catalog: &Catalog,
    branch: &TimelineHistory,
    backup: &BackupRecord,
    size: SegmentSize,
) -> bool {
    Candidate::of(catalog, branch, backup, size).is_some()
}

/// The latest moment that a restore from `backup` along `branch` reaches, and the end of the WAL stored
/// for it; `None` where the backup does not serve the branch.
///
/// Reads the last stored segments, backwards to the last commit.
pub async fn latest_moment(
    repository: &Repository,
    catalog: &Catalog,
    branch: &TimelineHistory,
    backup: &BackupRecord,
) -> Result<Option<(Timestamp, Lsn)>> {
    let Some(size) = catalog.segment_size else {
        return Ok(None);
    };
    let Some(candidate) = Candidate::of(catalog, branch, backup, size) else {
        return Ok(None);
    };
    let mut end = candidate.end;
    let mut read_to = end.lsn;
    let mut is_whole = true;
    loop {
        let from = size.start_of(read_to.saturating_sub(1));
        let within = BranchEnd {
            lsn: read_to,
            ..end
        };
        let stretch = Stretch {
            branch,
            size,
            from,
            end: within,
        };
        let walked = walk(repository, &stretch, Resolver::new(Wanted::Last)).await?;
        if let Ended::Damaged(damage) = walked.ended {
            // the window ends where WAL cannot be trusted
            is_whole = false;
            end.lsn = damage.at().max(from);
        }
        let stamp = walked.resolved.newest_stamp;
        if stamp.is_some() || from <= size.start_of(backup.stop_lsn) {
            return Ok(Some((candidate.latest(catalog, stamp, is_whole), end.lsn)));
        }
        read_to = from;
    }
}

/// The first segment that is missing behind `end` though more of the branch is stored.
pub(super) fn hole_after(
    catalog: &Catalog,
    branch: &TimelineHistory,
    end: BranchEnd,
    size: SegmentSize,
) -> Option<SegmentName> {
    let parts = branch.parts();
    let reached = parts
        .iter()
        .skip_while(|part| part.timeline != end.timeline);
    reached.enumerate().find_map(|(at, part)| {
        let from = if at == 0 { end.lsn } else { part.start };
        let coverage = catalog.timelines.get(&part.timeline)?.coverage(size);
        let is_later = |start: Lsn| start >= from && part.end.is_none_or(|fork| start < fork);
        let more = coverage.iter().any(|range| is_later(range.start));
        // the whole child is behind a fork that could not be passed
        let unreached = at > 0 && coverage.iter().any(|range| range.end > from);
        (more || unreached).then(|| SegmentName::of(part.timeline, from, size))
    })
}
