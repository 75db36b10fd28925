//! From a target to what is restored: which backup, which branch, which record is the last.

mod named;

use jiff::Timestamp;
use wal::{Lsn, SegmentName, SegmentSize, TimelineHistory, TimelineId, WalRange};

use super::RestoreOptions;
use super::resolve::{Findings, Point, Resolved, Resolver, Span, Wanted};
use super::settings::StopAt;
use super::target::{Target, TargetAction, rfc3339};
use super::walk::{Walked, walk};
use crate::clock::Clock;
use crate::error::{Error, Nearest, Result};
use crate::repository::Repository;
use crate::repository::catalog::{BranchEnd, Catalog};
use crate::repository::forks::left_behind;
use crate::repository::index::Summaries;
use crate::repository::layout::{BackupId, ObjectName};
use crate::repository::records::{BackupRecord, Hole};
use crate::repository::walk::{Damage, Ended, Stretch, segment_timeline};
use crate::repository::windows::{
    Candidate, candidates, hole_after, is_left_under_way, untrusted_at,
};

/// The longest header of a WAL page: an insert position stands behind it before anything is
/// written.
const PAGE_HEADER_BYTES_MAX: u64 = 40;
const PAGE_BYTES: u64 = 8192;
/// WAL of fewer segments is read whole before anything is restored, so that damage in it is found
/// beforehand: that takes moments. Of more, summaries tell which segments matter.
const READ_WHOLE_SEGMENTS: u64 = 64;

/// The backup and the record that were chosen.
pub(super) struct Chosen {
    pub(super) backup: BackupRecord,
    /// The last record wanted; `None` if even the backup's own last one was not seen.
    pub(super) last: Option<Span>,
    pub(super) point: Option<Point>,
    pub(super) resolved: Resolved,
    /// A standby follows without end.
    follows: bool,
    damaged_at: Option<Damage>,
    /// Segments that were not read to find it.
    passed: Vec<WalRange>,
}

impl Chosen {
    /// Where a record at or before the backup's end is the last one, that end is: a server is not
    /// consistent before it.
    fn new(candidate: &Candidate<'_>, point: Option<Point>, walked: Walked) -> Self {
        let stop = candidate.backup.stop_lsn;
        let last = match &point {
            Some(point) => point.last,
            None => walked.resolved.last,
        };
        // Where nothing behind the backup is wanted, its last record is named. `immediate` stops only
        // once another record follows (xlogrecovery.c, recoveryStopsBefore), which need not be
        // stored, and for a backup from a standby it may stop before the backup's end.
        let of_backup = walked.resolved.last_of_backup;
        let last = last.filter(|last| last.end > stop).or(of_backup);
        let Walked {
            ended,
            mut resolved,
            passed,
            ..
        } = walked;
        resolved.findings = resolved.findings.up_to(last.map_or(stop, |last| last.end));
        Self {
            backup: candidate.backup.clone(),
            last,
            point,
            damaged_at: match ended {
                Ended::Damaged(damage) => Some(damage),
                Ended::Enough | Ended::AtEnd => None,
            },
            resolved,
            follows: false,
            passed,
        }
    }

    /// How many segments of WAL recovery fetches.
    pub(super) fn segments(&self, size: SegmentSize) -> u64 {
        self.replayed(size).len_bytes() / size.bytes()
    }

    /// The segments of WAL that recovery fetches.
    fn replayed(&self, size: SegmentSize) -> WalRange {
        let last_lsn = self.last.map_or(self.backup.stop_lsn, |last| last.end);
        let end = size.end_of(last_lsn.saturating_sub(1));
        WalRange::new(size.start_of(self.backup.start_lsn), end)
    }

    /// How many of them were not read, since their summaries say where the point is.
    pub(super) fn unread_segments(&self, size: SegmentSize) -> u64 {
        let replayed = self.replayed(size);
        let unread = self.passed.iter();
        let unread = unread.filter_map(|passed| passed.intersection(replayed));
        unread.map(|passed| passed.len_bytes() / size.bytes()).sum()
    }

    pub(super) fn stop(&self) -> StopAt {
        match self.last {
            _ if self.follows => StopAt::Never,
            Some(last) => StopAt::After(last.start),
            None => StopAt::Immediate,
        }
    }

    pub(super) fn findings(&self) -> &Findings {
        &self.resolved.findings
    }
}

/// Finds a backup and a record.
pub(super) struct Chooser<'a> {
    repository: &'a Repository,
    catalog: &'a Catalog,
    options: &'a RestoreOptions,
    clock: &'a dyn Clock,
    branch: TimelineHistory,
    pub(super) size: SegmentSize,
    /// Newest first; never empty.
    candidates: Vec<Candidate<'a>>,
    summaries: Summaries<'a>,
}

impl<'a> Chooser<'a> {
    pub(super) fn new(
        repository: &'a Repository,
        catalog: &'a Catalog,
        options: &'a RestoreOptions,
        clock: &'a dyn Clock,
    ) -> Result<Self> {
        let nothing = || {
            Error::not_found(format!(
                "cluster {} has no backup: target={}",
                repository.cluster(),
                options.target
            ))
            .hint("take one with `anywhen backup`; without one there is nothing to restore")
        };
        let newest = catalog.newest_timeline().ok_or_else(nothing)?;
        let size = catalog.segment_size.ok_or_else(nothing)?;
        let timeline = options.timeline.unwrap_or(newest);
        check_timeline(catalog, timeline)?;
        let branch = catalog.branch(timeline);
        let mut candidates = candidates(catalog, &branch, size);
        if let Some(id) = &options.backup {
            let known = catalog.backups.iter().find(|backup| backup.id == *id);
            let backup = known.ok_or_else(|| no_such_backup(id))?;
            candidates.retain(|candidate| candidate.backup.id == *id);
            if candidates.is_empty() {
                return Err(unusable(repository, catalog, &branch, backup, size));
            }
        }
        if candidates.is_empty() {
            return Err(match catalog.backups.last() {
                None => nothing(),
                Some(newest) => unusable(repository, catalog, &branch, newest, size),
            });
        }
        Ok(Self {
            repository,
            catalog,
            options,
            clock,
            branch,
            size,
            candidates,
            summaries: Summaries::new(repository, catalog, size),
        })
    }

    pub(super) async fn choose(&self) -> Result<Chosen> {
        let exclusive = self.options.exclusive;
        match &self.options.target {
            Target::Time(at) => self.to_time(*at, exclusive).await,
            Target::Lsn(at) => self.to_lsn(*at, exclusive).await,
            Target::Xid(xid) => {
                // WAL has the lower half
                let low = u32::try_from(*xid & u64::from(u32::MAX)).unwrap_or(u32::MAX);
                self.to_xid(low, exclusive).await
            }
            Target::Name(name) => self.to_name(name, exclusive).await,
            Target::Immediate => self.immediate().await,
            Target::Latest => self.latest().await,
        }
    }

    // -- times --------------------------------------------------------------------------------

    async fn to_time(&self, at: Timestamp, exclusive: bool) -> Result<Chosen> {
        let older = self
            .candidates
            .iter()
            .filter(|it| it.backup.finished_at <= at);
        for candidate in older {
            let walked = self.walk(candidate, Wanted::Time { at, exclusive }).await?;
            let Some(point) = walked.resolved.point.clone() else {
                let whole = !matches!(walked.ended, Ended::Damaged(_));
                let stamp = walked.resolved.newest_stamp;
                let latest = candidate.latest(self.catalog, stamp, whole);
                if at > latest {
                    return Err(self.beyond_time(at, latest, candidate, &walked));
                }
                // every commit that is stored belongs; what stands behind the last one is not asked
                // for
                let last = Point {
                    last: walked.resolved.last_kept,
                    boundary: walked.records_end,
                    last_in: walked.resolved.last_commit,
                    first_out: None,
                };
                return Ok(Chosen::new(candidate, Some(last), walked));
            };
            if point.boundary >= candidate.backup.stop_lsn {
                return Ok(Chosen::new(candidate, Some(point), walked));
            }
        }
        let earliest = self.candidates.iter().map(|it| it.backup.finished_at).min();
        Err(Error::not_found(format!(
            "no backup was finished before the target: target={}, first backup={}",
            rfc3339(at),
            earliest.map(rfc3339).unwrap_or_default()
        ))
        .hint(
            "a backup leads to its own end and later; `anywhen status` shows what can be restored",
        )
        .nearest(Nearest {
            before: None,
            after: earliest.map(ceil_rfc3339),
        }))
    }

    fn beyond_time(
        &self,
        at: Timestamp,
        latest: Timestamp,
        candidate: &Candidate<'_>,
        walked: &Walked,
    ) -> Error {
        let backups = self.candidates.iter().map(|it| it.backup.finished_at);
        let after = backups.filter(|finished| *finished > at).min();
        let nearest = Nearest {
            before: Some(rfc3339(latest)),
            after: after.map(ceil_rfc3339),
        };
        let target = rfc3339(at);
        let failure = match (self.missing_after(candidate, walked), &walked.ended) {
            (_, Ended::Damaged(damage)) => self.damaged(damage, walked),
            (Some(missing), _) => Error::not_found(format!(
                "WAL is missing before the target: target={target}, missing={missing}"
            ))
            .hint(format!(
                "expected at {}",
                self.repository.locate(&ObjectName::Segment(missing))
            )),
            (None, _) if untrusted_at(self.catalog, candidate.end).is_some() => {
                untrusted_at(self.catalog, candidate.end)
                    .map_or_else(|| Error::damaged("WAL that cannot be used"), untrusted)
            }
            (None, _) if at > self.clock.now() => {
                Error::not_found(format!("the target lies in the future: target={target}"))
                    .hint("without a target, everything that is stored is restored")
            }
            (None, _) => Error::not_found(format!(
                "the target is later than what is stored: target={target}, latest={}",
                rfc3339(latest)
            ))
            .hint(
                "a running stream confirms moments every few seconds; without a target, everything \
                 that is stored is restored",
            ),
        };
        failure.nearest(nearest)
    }

    // -- positions ----------------------------------------------------------------------------

    async fn to_lsn(&self, at: Lsn, exclusive: bool) -> Result<Chosen> {
        for candidate in self
            .candidates
            .iter()
            .filter(|it| it.backup.start_lsn <= at)
        {
            let walked = self.walk(candidate, Wanted::Lsn { at, exclusive }).await?;
            let end = walked.records_end;
            match walked.resolved.point.clone() {
                Some(mut point) if point.boundary >= candidate.backup.stop_lsn => {
                    if walked.resolved.point_is_shutdown && !self.promotes() {
                        point.last = walked.resolved.before_point;
                    }
                    return Ok(Chosen::new(candidate, Some(point), walked));
                }
                Some(_) => {}
                None if end >= candidate.backup.stop_lsn
                    && (stands_at(at, end) || is_stored_end(at, candidate, &walked)) =>
                {
                    let last = Point {
                        last: self.last_of(&walked),
                        boundary: end,
                        last_in: walked.resolved.last_commit,
                        first_out: None,
                    };
                    return Ok(Chosen::new(candidate, Some(last), walked));
                }
                None => {
                    let stops = self.candidates.iter().map(|it| it.backup.stop_lsn);
                    let after = stops.filter(|stop| *stop > at).min();
                    let missing = self.missing_after(candidate, &walked);
                    let failure = match (missing, &walked.ended) {
                        (_, Ended::Damaged(damage)) => self.damaged(damage, &walked),
                        (Some(missing), _) => Error::not_found(format!(
                            "WAL is missing before the target: target={at}, missing={missing}"
                        )),
                        (None, _) => Error::not_found(format!(
                            "the target lies behind what is stored: target={at}, stored up to={end}"
                        )),
                    };
                    return Err(failure.nearest(Nearest {
                        before: Some(end.to_string()),
                        after: after.map(|lsn| lsn.to_string()),
                    }));
                }
            }
        }
        let earliest = self.candidates.iter().map(|it| it.backup.stop_lsn).min();
        Err(Error::not_found(format!(
            "the target lies before the end of the first backup: target={at}, first backup={}",
            earliest.unwrap_or_default()
        ))
        .nearest(Nearest {
            before: None,
            after: earliest.map(|lsn| lsn.to_string()),
        }))
    }

    // -- ends ---------------------------------------------------------------------------------

    async fn immediate(&self) -> Result<Chosen> {
        let candidate = self.newest();
        let stop = candidate.backup.stop_lsn;
        let end = BranchEnd {
            lsn: stop,
            ..candidate.end
        };
        let walked = self.walk_to(candidate, Wanted::Last, end).await?;
        if let Ended::Damaged(damage) = &walked.ended {
            return Err(self.damaged(damage, &walked));
        }
        let point = Point {
            last: None,
            boundary: stop,
            last_in: walked.resolved.last_commit,
            first_out: None,
        };
        Ok(Chosen::new(candidate, Some(point), walked))
    }

    async fn latest(&self) -> Result<Chosen> {
        let candidate = self.newest();
        if self.options.standby {
            // it follows, and replays what is stored by now: tablespaces that are made there too
            let walked = self.walk(candidate, Wanted::Last);
            return Ok(Chosen {
                follows: true,
                ..Chosen::new(candidate, None, walked.await?)
            });
        }
        let walked = self.walk(candidate, Wanted::Last).await?;
        let stamp = walked.resolved.newest_stamp;
        let whole = !matches!(walked.ended, Ended::Damaged(_));
        let latest = candidate.latest(self.catalog, stamp, whole);
        let nearest = Nearest {
            before: Some(rfc3339(latest)),
            after: None,
        };
        if let Ended::Damaged(damage) = &walked.ended {
            return Err(self.damaged(damage, &walked).nearest(nearest));
        }
        if let Some(hole) = untrusted_at(self.catalog, candidate.end) {
            return Err(untrusted(hole).nearest(nearest));
        }
        if let Some(missing) = self.missing_after(candidate, &walked) {
            return Err(Error::not_found(format!(
                "WAL is missing before the latest that is stored: missing={missing}, expected at {}",
                self.repository.locate(&ObjectName::Segment(missing))
            ))
            .hint("restore to a time before it, and take a new backup")
            .nearest(nearest));
        }
        let point = Point {
            last: self.last_of(&walked),
            boundary: walked.records_end,
            last_in: walked.resolved.last_commit,
            first_out: None,
        };
        Ok(Chosen::new(candidate, Some(point), walked))
    }

    /// The last record of all. A server that is stopped there, before it was opened, writes a
    /// restart point at a shutdown's checkpoint, and would start behind its target the next time:
    /// the record before it leaves the same data.
    fn last_of(&self, walked: &Walked) -> Option<Span> {
        if self.promotes() {
            walked.resolved.last
        } else {
            walked.resolved.last_but_shutdown
        }
    }

    /// Whether the server opens for writing at the target.
    fn promotes(&self) -> bool {
        let otherwise = matches!(self.options.target, Target::Latest);
        self.options
            .action
            .map_or(otherwise, |action| action == TargetAction::Promote)
    }

    fn newest(&self) -> &Candidate<'a> {
        self.candidates.first().expect("a chooser has a candidate")
    }

    // -- walking ------------------------------------------------------------------------------

    async fn walk(&self, candidate: &Candidate<'_>, wanted: Wanted) -> Result<Walked> {
        self.walk_to(candidate, wanted, candidate.end).await
    }

    async fn walk_to(
        &self,
        candidate: &Candidate<'_>,
        wanted: Wanted,
        end: BranchEnd,
    ) -> Result<Walked> {
        let from = candidate.backup.start_lsn;
        let stretch = Stretch {
            branch: &self.branch,
            size: self.size,
            from,
            end,
        };
        let segments = end.lsn.bytes_since(from) / self.size.bytes();
        let reads_all = self.options.check_wal || segments < READ_WHOLE_SEGMENTS;
        let walking = walk(
            self.repository,
            &stretch,
            (!reads_all).then_some(&self.summaries),
            Resolver::new(wanted, candidate.backup.stop_lsn),
        );
        let walked = Box::pin(walking).await?;
        match &walked.ended {
            // the backup itself cannot be made consistent
            Ended::Damaged(damage) if damage.at < candidate.backup.stop_lsn => {
                Err(self.damaged(damage, &walked))
            }
            _ => Ok(walked),
        }
    }

    fn missing_after(&self, candidate: &Candidate<'_>, walked: &Walked) -> Option<SegmentName> {
        match &walked.ended {
            Ended::Damaged(_) => None,
            Ended::Enough | Ended::AtEnd => {
                let hole = hole_after(self.catalog, &self.branch, candidate.end, self.size);
                let is_latest = self.options.target == Target::Latest;
                hole.filter(|_| !(is_latest && self.is_left_under_way(candidate.end)))
            }
        }
    }

    fn is_left_under_way(&self, end: BranchEnd) -> bool {
        end.timeline == self.branch.timeline()
            && is_left_under_way(self.catalog, end.timeline, end.lsn, self.size)
    }

    fn damaged(&self, damage: &Damage, walked: &Walked) -> Error {
        let end = self
            .candidates
            .first()
            .map_or_else(|| self.branch.timeline(), |it| it.end.timeline);
        let within = BranchEnd {
            timeline: end,
            lsn: damage.at,
        };
        let start = self.size.start_of(damage.at);
        let timeline = segment_timeline(&self.branch, start, within, self.size);
        let segment = SegmentName::of(timeline, start, self.size);
        Error::damaged(format!(
            "damaged WAL: {damage}; segment={segment}, whole up to={}",
            walked.records_end
        ))
        .hint("restore to a point before it, or begin with a later backup")
    }

    // -- what follows from it -----------------------------------------------------------------

    /// The timeline that the last record wanted lies on, by number. Where that is an ancestor of
    /// the branch, recovery neither needs the histories of its descendants nor passes its own end,
    /// since it stops at a record before the fork.
    pub(super) fn recovery_timeline(&self, chosen: &Chosen) -> Result<TimelineId> {
        let timeline = match chosen.stop() {
            StopAt::After(lsn) => self.branch.timeline_at(lsn).min(self.branch.timeline()),
            StopAt::Immediate => chosen.backup.timeline,
            StopAt::Never => self.branch.timeline(),
        };
        // recovery refuses a number without its history file, other than 1
        if timeline.get() != 1 && !self.catalog.histories.contains_key(&timeline) {
            return Err(Error::not_found(format!(
                "the history of timeline {timeline} is not stored: expected at {}",
                self.repository.locate(&ObjectName::History(timeline))
            ))
            .hint("it comes with a stream or a backup of a server on that timeline"));
        }
        Ok(timeline)
    }

    pub(super) fn warnings(&self, chosen: &Chosen) -> Vec<String> {
        let mut warnings = Vec::new();
        for (lsn, xid, database) in &chosen.findings().dropping {
            warnings.push(format!(
                "database {database} will have no files: they are removed at {lsn}, before the commit of \
                 its DROP DATABASE (transaction {xid}), which is out; --to-lsn {lsn} --exclusive keeps it"
            ));
        }
        if let Some(damage) = &chosen.damaged_at {
            warnings.push(format!("behind the target there is damaged WAL: {damage}"));
        }
        let end = self.branch.timeline();
        if self.options.target == Target::Latest
            && let Some(lost) = self.catalog.lost_end(end, self.size)
        {
            warnings.push(format!(
                "a stream had found timeline {end} stored up to {}, and what is there now ends at {}: the \
                 rest was removed, or lies where it cannot be seen",
                lost.end, lost.start
            ));
        }
        let end = self.newest().end;
        if self.options.target == Target::Latest
            && self.is_left_under_way(end)
            && hole_after(self.catalog, &self.branch, end, self.size).is_some()
        {
            warnings.push(format!(
                "behind {} pieces are stored beside what is missing, and are not restored: a stream was \
                 killed while it stored both, and told nobody of them, unless what is missing was removed",
                end.lsn
            ));
        }
        // older forks were news once
        if let Some(left) = left_behind(self.catalog, &self.branch, self.size).pop() {
            let first_out = chosen.point.as_ref().and_then(|point| point.first_out);
            let passes = match self.options.target {
                // what the old timeline has behind the fork may be from before the target
                Target::Time(_) => first_out.is_none_or(|out| out.lsn >= left.fork),
                _ => chosen.last.is_none_or(|last| last.end > left.fork),
            };
            if passes {
                warnings.push(format!(
                    "timeline {} is stored up to {}, behind {} where timeline {} left it: what was \
                     committed there is not restored; --timeline {} restores it instead of what \
                     timeline {} has",
                    left.timeline, left.stored, left.fork, left.next, left.timeline, left.next
                ));
            }
        }
        if self.branch.timeline() > chosen.backup.timeline
            && !self.catalog.timelines.contains_key(&self.branch.timeline())
        {
            warnings.push(format!(
                "no WAL of timeline {} is stored",
                self.branch.timeline()
            ));
        }
        warnings
    }
}

/// Why what is stored behind a window's end is not used.
fn untrusted(hole: &Hole) -> Error {
    Error::damaged(format!(
        "the WAL that is stored from {} on timeline {} on cannot be used: {}",
        hole.start, hole.timeline, hole.reason
    ))
    .hint("restore to a moment before it, or begin with a backup behind it")
}

/// Whether a position is the end of what is stored: between the last record and there, or behind
/// the header of the page that would come next.
fn stands_at(at: Lsn, end: Lsn) -> bool {
    let header = if end.as_u64().is_multiple_of(PAGE_BYTES) {
        PAGE_HEADER_BYTES_MAX
    } else {
        0
    };
    at <= end.saturating_add(header)
}

/// Whether a position lies in the beginning of a record that is not stored whole.
fn is_stored_end(at: Lsn, candidate: &Candidate<'_>, walked: &Walked) -> bool {
    !matches!(walked.ended, Ended::Damaged(_)) && at <= candidate.end.lsn
}

/// A moment as printed, which must not be earlier than the moment itself.
fn ceil_rfc3339(time: Timestamp) -> String {
    let up = jiff::TimestampRound::new()
        .smallest(jiff::Unit::Microsecond)
        .mode(jiff::RoundMode::Ceil);
    rfc3339(time.round(up).unwrap_or(time))
}

fn check_timeline(catalog: &Catalog, timeline: TimelineId) -> Result<()> {
    let known = catalog.stored_timelines();
    if known.contains(&timeline) {
        return Ok(());
    }
    let list: Vec<String> = known.iter().map(ToString::to_string).collect();
    Err(Error::not_found(format!(
        "nothing of timeline {timeline} is stored: stored={}",
        list.join(", ")
    )))
}

fn no_such_backup(id: &BackupId) -> Error {
    Error::not_found(format!("there is no backup {id}"))
        .hint("`anywhen list` shows those that there are")
}

/// Why a backup cannot be used.
fn unusable(
    repository: &Repository,
    catalog: &Catalog,
    branch: &TimelineHistory,
    backup: &BackupRecord,
    size: SegmentSize,
) -> Error {
    let id = &backup.id;
    let end = catalog.reach(
        branch,
        backup.timeline,
        size.start_of(backup.start_lsn),
        size,
    );
    match branch.reach(backup.timeline) {
        wal::Reach::NotAncestor => Error::not_found(format!(
            "backup {id} lies on timeline {}, which is no past of timeline {}",
            backup.timeline,
            branch.timeline()
        ))
        .hint(format!(
            "restore along its own with --timeline {}",
            backup.timeline
        )),
        wal::Reach::Until(fork) if backup.stop_lsn > fork => Error::not_found(format!(
            "backup {id} ended after timeline {} had left its timeline: stop={}, fork={fork}",
            branch.timeline(),
            backup.stop_lsn
        ))
        .hint(format!(
            "restore along its own with --timeline {}",
            backup.timeline
        )),
        _ => {
            let missing = SegmentName::of(end.timeline, end.lsn, size);
            Error::not_found(format!(
                "WAL that backup {id} needs is missing: stored up to={}, needed up to={}, missing={}",
                end.lsn,
                backup.stop_lsn,
                repository.locate(&ObjectName::Segment(missing))
            ))
            .hint("use another backup, or take a new one")
        }
    }
}
