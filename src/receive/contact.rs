//! Meeting a server: its facts, its slot, and where to go on.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use bytes::Bytes;
use replication::connection::Connection;
use replication::conninfo::ConnectionSettings;
use replication::slots::{SlotError, SlotState, read_slot, reserve_slot};
use wal::{Lsn, Reach, SegmentName, SegmentSize, TimelineHistory, TimelineId};

use super::known::Known;
use super::options::ReceiverOptions;
use super::resume::{
    ResumeAt, ResumeError, floor, lacks_at, last_before, left_behind_the_fork, resume_at,
    skip_to_earliest, was_streamed,
};
use super::storing::Spooling;
use crate::clock::Clock;
use crate::error::{Error, Kind, Result};
use crate::repository::catalog::Catalog;
use crate::repository::destination::OpenDestination;
use crate::repository::forks::LeftBehind;
use crate::repository::layout::ObjectName;
use crate::repository::records::{BackupRecord, Hole};
use crate::repository::{Acknowledge, Repository, RepositoryError, ServerIdentity};
use crate::retry::Backoff;
use crate::server::{self, ServerFacts};

/// A slot that another connection holds is often our own last one, which the server has not
/// missed yet: it is waited for this long.
const SLOT_WAIT: Duration = Duration::from_secs(90);

/// History files that are not stored yet are held until the first WAL of their timeline is: so much of
/// them at most, a hundred bytes or so for each timeline.
const HISTORIES_BYTES_MAX: usize = 64 << 20;
/// A server that leaves a question without any answer for so long is gone.
const SILENCE_MAX: Duration = Duration::from_mins(1);

/// A server that was met: connections, what it said, and where to go on.
pub(super) struct Contact {
    pub(super) replication: Connection,
    pub(super) sql: Connection,
    /// Settings that lead to this very server.
    pub(super) settings: ConnectionSettings,
    pub(super) facts: ServerFacts,
    pub(super) repository: Repository,
    pub(super) at: ResumeAt,
    /// In so many pieces the segment is stored that begins there.
    pub(super) pieces: usize,
    pub(super) branch: TimelineHistory,
    /// The history files that are not stored yet.
    pub(super) histories: Vec<(TimelineId, Bytes)>,
    /// From here on the slot keeps WAL.
    kept: Option<Lsn>,
}

/// How a meeting ended.
pub(super) enum Met {
    /// There is WAL to receive.
    Ready(Box<Contact>),
    /// Not with this server, or not now.
    Unfit(Unfit),
}

/// A server that is not followed: another of the list may be.
pub(super) struct Unfit {
    pub(super) why: Error,
    /// Settings that lead to the others of the list.
    pub(super) others: Option<Box<ConnectionSettings>>,
}

impl Contact {
    /// Meets the server: reads its facts, prepares the slot, and finds where to go on. `met` says
    /// that this is not the first time.
    pub(super) async fn make(
        settings: &ConnectionSettings,
        destination: &OpenDestination,
        spooling: &Spooling,
        options: &ReceiverOptions,
        met: bool,
    ) -> Result<Met> {
        let replication = server::connect_replication(settings).await?;
        let mut replication = replication.with_silence_max(SILENCE_MAX);
        let facts = ServerFacts::read(&mut replication).await?;
        facts.check()?;
        let identity = ServerIdentity {
            system_id: facts.system_id,
            major: facts.major,
            block_bytes: facts.block_bytes,
        };
        let is_new = !met && is_nothing_stored(destination, facts.system_id).await;
        let repository = destination.repository(identity, options.new_system).await?;
        repository.check_segment_size(facts.segment_size).await?;
        let others = settings.clone().without(&replication).map(Box::new);
        let described = replication.described().to_owned();
        let unfit = |why: Error| {
            let why = why.context(described);
            Ok(Met::Unfit(Unfit { why, others }))
        };
        if let Some(why) = left_behind(&repository, facts.timeline, facts.segment_size).await? {
            return unfit(why);
        }
        // what is spooled goes on before what follows it
        spooling.empty_into(&repository, identity).await?;
        // with several hosts, whatever is asked over SQL must come from the same server
        let settings = settings.clone().pinned_to(&replication);
        let sql = server::connect_sql(&settings).await?;
        let sql = sql.with_silence_max(SILENCE_MAX);
        let (branch, histories) =
            read_histories(&mut replication, &repository, facts.timeline).await?;
        let mut contact = Self {
            at: ResumeAt {
                timeline: facts.timeline,
                start: facts.flushed,
                known: facts.flushed,
            },
            replication,
            sql,
            settings,
            facts,
            repository,
            pieces: 0,
            branch,
            histories,
            kept: None,
        };
        if let (true, Some(slot)) = (is_new, &options.slot) {
            contact.tell_of_a_slot_that_was_there(slot).await?;
        }
        if let Some(why) = contact.take_slot(options, met).await? {
            return unfit(why);
        }
        if let Some(why) = contact.is_behind().await? {
            return unfit(why);
        }
        contact.tell_what_was_left_behind().await?;
        Ok(Met::Ready(Box::new(contact)))
    }

    /// A slot that keeps WAL was another stream's, perhaps, whose repository is elsewhere, or not mounted:
    /// what is stored here is removed from the server.
    async fn tell_of_a_slot_that_was_there(&mut self, slot: &str) -> Result<()> {
        let found = read_slot(&mut self.sql, slot).await;
        if let SlotState::Ready { restart, .. } =
            found.map_err(|error| slot_failed(slot, &error))?
        {
            tracing::warn!(
                "the repository is new, and slot {slot} was there before: it keeps WAL from {restart} on, \
                 and the stream begins there. hint: if a stream stored elsewhere until now (a disk that is \
                 not mounted, another address), stop this one: the server removes what it has received"
            );
        }
        Ok(())
    }

    /// Says which stored WAL is not part of the server's timeline, before the first of that is stored.
    async fn tell_what_was_left_behind(&self) -> Result<()> {
        let catalog = self.repository.wal_catalog().await?;
        tell_what_was_left_behind(&self.branch, &catalog, self.facts.segment_size);
        Ok(())
    }
}

/// Whether nothing of this system is in any place, as far as all of them could be asked.
async fn is_nothing_stored(destination: &OpenDestination, system_id: u64) -> bool {
    let stored = destination.stored(Some(system_id)).await;
    matches!(
        stored,
        Err(RepositoryError::NoCluster { .. } | RepositoryError::NoSystem { .. })
    )
}

/// Says which stored WAL is not part of a server's branch, before the first of its own timeline is stored.
pub(super) fn tell_what_was_left_behind(
    branch: &TimelineHistory,
    catalog: &Catalog,
    size: SegmentSize,
) {
    let timeline = branch.timeline();
    if let Some(left) = left_behind_the_fork(branch, catalog, size) {
        let LeftBehind {
            timeline: old,
            fork,
            stored,
            ..
        } = left;
        tracing::warn!(
            "timeline {timeline} left timeline {old} at {fork}, and timeline {old} is stored up to \
             {stored}: what was committed there behind the fork is not in timeline {timeline}, which \
             a restore follows. hint: is the old primary stopped? `anywhen restore --timeline {old}` \
             reaches what only it has"
        );
    }
}

impl Contact {
    /// Prepares the slot, and finds where to go on. Says so where this server is not the one: then
    /// no slot was made that would keep WAL for nobody.
    async fn take_slot(&mut self, options: &ReceiverOptions, met: bool) -> Result<Option<Error>> {
        let Some(slot) = &options.slot else {
            self.resume().await?;
            return Ok(None);
        };
        let mut streamed = false;
        let found = read_slot(&mut self.sql, slot).await;
        if found.map_err(|error| slot_failed(slot, &error))? == SlotState::Absent {
            streamed = self.resume().await?;
            if let Some(why) = self.is_behind().await? {
                return Ok(Some(why));
            }
        }
        let asked = SlotAsked {
            slot,
            met,
            strict: options.strict,
            streamed,
        };
        let kept = prepare_slot(&mut self.replication, &mut self.sql, &asked).await?;
        self.kept = Some(kept);
        if !met && self.facts.max_slot_wal_keep_size == "-1" {
            tracing::warn!(
                "max_slot_wal_keep_size is unlimited: if this archiver stays away, WAL fills the \
                 server's disk. hint: ALTER SYSTEM SET max_slot_wal_keep_size = '100GB'; \
                 SELECT pg_reload_conf(); or drop the slot when you are done: anywhen slot drop"
            );
        }
        self.resume().await?;
        Ok(None)
    }

    /// Finds where to go on, from what is stored; says whether a stream stored any of the branch.
    async fn resume(&mut self) -> Result<bool> {
        // what is listed may be there only in memory, after a crash of this machine or of a writer
        self.repository.sync().await?;
        let catalog = self.repository.wal_catalog().await?;
        let (repository, branch) = (&self.repository, &self.branch);
        self.at = resume(repository, &catalog, branch, &self.facts, self.kept).await?;
        self.pieces = pieces_at(&catalog, self.at, self.facts.segment_size);
        Ok(was_streamed(branch, &catalog))
    }

    /// Why this server cannot be streamed from though it is on the right branch: what is stored lies
    /// ahead of what it has.
    async fn is_behind(&mut self) -> Result<Option<Error>> {
        let is_ahead =
            |at: ResumeAt, timeline, flushed| at.timeline == timeline && at.start > flushed;
        if !is_ahead(self.at, self.facts.timeline, self.facts.flushed) {
            return Ok(None);
        }
        let failed = |error| server::query_error("ask how far the server is", &error);
        let is_standby = server::is_in_recovery(&mut self.sql)
            .await
            .map_err(failed)?;
        // what it had a moment ago may be what it had before its promotion
        let now = self.replication.identify_system().await.map_err(failed)?;
        let at = self.at;
        if now.timeline != self.facts.timeline {
            let moved = format!("the server went on meanwhile: timeline {}", now.timeline);
            return Err(Error::new(Kind::Unreachable, moved));
        }
        if !is_ahead(at, now.timeline, now.xlogpos) {
            // it was asked before another archiver stored what it has written since
            self.facts.flushed = now.xlogpos;
            return Ok(None);
        }
        Ok(Some(if is_standby {
            let message = behind_the_stored(at.timeline, now.xlogpos, at.known);
            Error::new(Kind::Unreachable, message).hint("a standby is waited for")
        } else {
            set_back(at.timeline, now.xlogpos, at.known)
        }))
    }

    /// Reads what is stored of the segment at hand, to compare with it. Where that is a whole segment
    /// that cannot be read, the stream goes on behind it.
    pub(super) async fn read_known(&mut self) -> Result<Known> {
        let size = self.facts.segment_size;
        let was = self.at;
        loop {
            let known = Known::of(&self.repository, &self.branch, self.at, size).await?;
            if !known.is_lost() {
                break match self.is_behind().await? {
                    Some(why) if self.at != was => Err(why),
                    _ => Ok(known),
                };
            }
            let catalog = self.repository.wal_catalog().await?;
            let start = size.end_of(self.at.start);
            let stored = catalog.timelines.get(&self.at.timeline);
            let covered = stored.map_or(start, |wal| wal.covered_from(start, size));
            self.at.start = start;
            self.at.known = covered.min(size.end_of(start));
            self.pieces = pieces_at(&catalog, self.at, size);
        }
    }

    /// Why a strict stream does not go on where the server removed WAL.
    /// `silent` names the repositories that cannot be asked.
    fn removed(&self, silent: &str) -> Error {
        let message = format!(
            "the server no longer has WAL from {} on timeline {}, and this stream is strict",
            self.at.known, self.at.timeline
        );
        if !silent.is_empty() {
            let message = format!("{message}; repository {silent} may have it, and is not there");
            return Error::new(Kind::Unreachable, message)
                .hint("the stream goes on once that repository can be asked");
        }
        Error::failure(message).hint(
            "take a backup, and start the stream once without --strict: it goes on behind the hole",
        )
    }

    /// Notes the holes that removed WAL leaves, and goes on behind them, or stops there where that is
    /// asked for. What begins at `refused` was asked for last. Gives how many holes there are.
    pub(super) async fn skip_removed(
        &mut self,
        refused: Lsn,
        strict: bool,
        clock: &dyn Clock,
    ) -> Result<usize> {
        let size = self.facts.segment_size;
        let catalog = self.repository.wal_catalog().await?;
        let mut places = self.oldest_places().await;
        places.extend(self.kept);
        places.push(self.facts.flushed);
        let (at, branch) = (self.at, &self.branch);
        let skipped = skip_to_earliest(at, branch, &catalog, &places, refused, size);
        let Some((holes, next)) = skipped else {
            return Err(Error::failure(format!(
                "the server no longer has WAL from {refused} on timeline {}",
                self.at.timeline
            ))
            .hint("take a backup: it begins a new window"));
        };
        let silent = self.repository.silent().join(", ");
        // WAL that backups alone have brought has gaps, and no stream lost what lies there; who cannot be
        // asked may have what a stream brought
        let streamed = was_streamed(&self.branch, &catalog)
            || !silent.is_empty()
            || !self.is_of_backups(&catalog, next.start).await?;
        let holes = if streamed { holes } else { Vec::new() };
        if strict && !holes.is_empty() {
            return Err(self.removed(&silent));
        }
        if !holes.is_empty() && !silent.is_empty() {
            tracing::warn!(
                "repository {silent} cannot be asked, and may have the WAL that is missing here: \
                 then the hole is gone once it is back"
            );
        }
        let count = holes.len();
        for (timeline, range) in holes {
            tracing::error!(
                "the server removed WAL that is not stored: timeline {timeline}, {} to {}. hint: \
                 take a backup now: moments in between cannot be restored",
                range.start,
                range.end
            );
            let hole = Hole {
                timeline,
                start: range.start,
                end: range.end,
                found_at: clock.now(),
                reason: "the server had removed this WAL before it was received".to_owned(),
                unverified: false,
            };
            self.repository.record_hole(&hole).await?;
        }
        if !streamed {
            tracing::info!(
                "the server no longer has what follows on the last backup: the stream begins at {}",
                next.start
            );
        }
        self.at = next;
        self.pieces = pieces_at(&catalog, next, size);
        Ok(count)
    }
}

impl Contact {
    /// From where on the server may have WAL: what it has of each timeline of the branch. The first
    /// segment of a timeline holds what its parent wrote before the fork too.
    async fn oldest_places(&mut self) -> Vec<Lsn> {
        let size = self.facts.segment_size;
        let segments = server::oldest_segments(&mut self.sql).await;
        let starts = segments.into_iter().filter_map(|segment| {
            let start = segment.start(size)?;
            let is_of_branch = self.branch.reach(segment.timeline) != Reach::NotAncestor;
            (is_of_branch && self.branch.timeline_at(start) <= segment.timeline).then_some(start)
        });
        starts.collect()
    }

    /// Whether a backup brought what is stored last before `lsn`.
    async fn is_of_backups(&self, catalog: &Catalog, lsn: Lsn) -> Result<bool> {
        let size = self.facts.segment_size;
        let Some(last) = last_before(&self.branch, catalog, lsn, size) else {
            return Ok(false);
        };
        let backups = self.repository.backup_records().await?.readable;
        let brought = |backup: &BackupRecord| {
            backup.timeline == last.timeline
                && backup.start_lsn < last.lsn
                && last.lsn <= size.end_of(backup.stop_lsn)
        };
        Ok(backups.iter().any(brought))
    }
}

fn behind_the_stored(timeline: TimelineId, has: Lsn, stored: Lsn) -> String {
    format!(
        "the server is behind what is stored: timeline {timeline}, it has WAL up to {has}, and what is \
         stored ends at {stored}"
    )
}

/// A primary does not get behind what it has sent.
pub(super) fn set_back(timeline: TimelineId, has: Lsn, stored: Lsn) -> Error {
    let message = behind_the_stored(timeline, has, stored);
    Error::damaged(format!("two histories: {message}, and it is no standby")).hint(
        "the server was set back, to an older disk or snapshot: give it its own --cluster name and \
         take a backup",
    )
}

/// In how many pieces the segment is stored that begins where a stream goes on.
fn pieces_at(catalog: &Catalog, at: ResumeAt, size: SegmentSize) -> usize {
    let segment = SegmentName::of(at.timeline, at.start, size);
    let stored = catalog.timelines.get(&at.timeline);
    let pieces = stored.and_then(|stored| stored.pieces.get(&segment));
    pieces.map_or(0, BTreeSet::len)
}

/// Why a server must not be followed whose timeline the repository has left behind.
pub(super) async fn left_behind(
    repository: &Repository,
    server: TimelineId,
    size: SegmentSize,
) -> Result<Option<Error>> {
    let Some(stored) = repository.timelines().await?.last().copied() else {
        return Ok(None);
    };
    // a folder may be left of what was removed
    let is_older = stored > server && repository.timeline_wal(stored).await?.end(size).is_some();
    Ok(is_older.then(|| older_server(&ResumeError::OlderServer { stored, server })))
}

fn older_server(error: &ResumeError) -> Error {
    Error::usage(error.to_string()).hint(
        "connect to the current primary; if this server is meant to go its own way, give it another \
         --cluster name",
    )
}

/// Where to go on, from what is stored.
async fn resume(
    repository: &Repository,
    catalog: &Catalog,
    branch: &TimelineHistory,
    facts: &ServerFacts,
    kept: Option<Lsn>,
) -> Result<ResumeAt> {
    let size = facts.segment_size;
    let floor = floor(branch, catalog, kept, size).unwrap_or(facts.flushed);
    let resumed = resume_at(branch, catalog, floor, size);
    let mut at = resumed.map_err(|error| older_server(&error))?;
    let waits_for_all =
        repository.has_several_places() && repository.acknowledge() == Acknowledge::All;
    let Some(kept) = kept.filter(|_| waits_for_all) else {
        return Ok(at);
    };
    // what one place lacks was not acknowledged, so the slot kept it: it is received again
    let kept = size.start_of(kept);
    for catalog in repository.wal_catalogs().await? {
        let behind = lacks_at(branch, &catalog, kept, size);
        let is_earlier = (behind.timeline, behind.start) < (at.timeline, at.start);
        if is_earlier && behind.known >= kept {
            at = behind;
        }
    }
    Ok(at)
}

/// The slot that is wanted.
struct SlotAsked<'a> {
    slot: &'a str,
    /// This is not the first time.
    met: bool,
    /// A slot that the server gave up is not made anew.
    strict: bool,
    /// A stream has stored WAL of this branch: there was a slot, or there should have been.
    streamed: bool,
}

fn slot_failed(slot: &str, error: &SlotError) -> Error {
    server::slot_error(&format!("use replication slot {slot}"), error)
}

/// Makes sure that the slot is there and keeps WAL; says from where on.
async fn prepare_slot(
    replication: &mut Connection,
    sql: &mut Connection,
    asked: &SlotAsked<'_>,
) -> Result<Lsn> {
    let SlotAsked {
        slot,
        met,
        strict,
        streamed,
    } = *asked;
    let failed = |error| slot_failed(slot, &error);
    let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(5));
    let waiting_since = Instant::now();
    let mut said = false;
    loop {
        match read_slot(sql, slot).await.map_err(failed)? {
            SlotState::Ready { restart, .. } => return Ok(restart),
            SlotState::Absent => {
                let made = replication.create_physical_slot(slot, false, true).await;
                made.map_err(failed)?;
                tracing::info!("created replication slot {slot}");
                if streamed {
                    tracing::warn!(
                        "slot {slot} was not there, though WAL of this branch was streamed: that \
                         went without it or by another name, it was dropped, or this is another \
                         server, as after a failover. Until now the server kept no WAL for it: what \
                         it removed will be said"
                    );
                }
            }
            SlotState::Unreserved => {
                tracing::warn!("slot {slot} kept no WAL: reserving from now on");
                return reserve_slot(sql, slot).await.map_err(failed);
            }
            SlotState::Active { pid, .. } if waiting_since.elapsed() < SLOT_WAIT => {
                if !std::mem::replace(&mut said, true) {
                    tracing::warn!(
                        "slot {slot} is in use by the server's process {pid}: waiting until it is \
                         free. hint: is another `anywhen stream` running? stop it, or choose \
                         another name with --slot"
                    );
                }
                backoff.wait().await;
            }
            SlotState::Active { pid, .. } => {
                // a service that has streamed waits on: it is its own last connection, perhaps
                let kind = if met {
                    Kind::Unreachable
                } else {
                    Kind::Failure
                };
                return Err(Error::new(
                    kind,
                    format!("replication slot {slot} is in use: pid={pid}"),
                )
                .hint("is another `anywhen stream` running? choose another name with --slot"));
            }
            SlotState::NotPhysical => {
                return Err(Error::usage(format!("slot {slot} is a logical slot"))
                    .hint("choose another name with --slot"));
            }
            SlotState::Lost { why } if strict => {
                return Err(Error::failure(format!(
                    "the server gave up slot {slot}, and WAL with it: {why}"
                ))
                .hint("anywhen slot drop, start the stream again, and take a backup"));
            }
            // more WAL is better than less: what is missing is noted as a hole
            SlotState::Lost { why } => {
                tracing::error!(
                    "the server gave up slot {slot}, and WAL with it: {why}. It is made anew. hint: \
                     a larger max_slot_wal_keep_size, and a backup now if WAL is missing"
                );
                replication.drop_slot(slot).await.map_err(failed)?;
            }
        }
    }
}

/// The branch of the server's timeline, and those history files of it that are not stored: they are
/// once the server is known to be the one whose WAL is stored. One that differs from what is stored is
/// an error.
pub(super) async fn read_histories(
    replication: &mut Connection,
    repository: &Repository,
    timeline: TimelineId,
) -> Result<(TimelineHistory, Vec<(TimelineId, Bytes)>)> {
    let newest = read_history(replication, timeline).await?;
    let (branch, newest) = match newest {
        None => (TimelineHistory::new_first(timeline), None),
        Some((branch, content)) => (branch, Some((timeline, content))),
    };
    let mut next = newest;
    let mut ancestors = branch.entries().iter();
    let (mut missing, mut missing_bytes) = (Vec::new(), 0_usize);
    loop {
        if let Some((timeline, content)) = next.take() {
            let name = ObjectName::History(timeline);
            if !repository.holds_file(&name, &content).await? {
                missing_bytes = missing_bytes.saturating_add(content.len());
                missing.push((timeline, content));
            }
        }
        if missing_bytes > HISTORIES_BYTES_MAX {
            return Err(Error::damaged(format!(
                "the server's timeline histories are larger than any cluster has: bytes={missing_bytes} \
                 or more, most={HISTORIES_BYTES_MAX}"
            ))
            .hint("look into the .history files of its pg_wal"));
        }
        let Some(entry) = ancestors.next() else { break };
        let read = read_history(replication, entry.timeline).await?;
        next = read.map(|(_, content)| (entry.timeline, content));
    }
    Ok((branch, missing))
}

/// A timeline's history as the server has it; `None` where it has none.
async fn read_history(
    replication: &mut Connection,
    timeline: TimelineId,
) -> Result<Option<(TimelineHistory, Bytes)>> {
    let file = replication
        .timeline_history(timeline)
        .await
        .map_err(|error| server::query_error("read the timeline's history", &error))?;
    let Some(file) = file else { return Ok(None) };
    let parsed = TimelineHistory::parse(timeline, &file.content).map_err(|error| {
        Error::damaged(format!(
            "the server's {} is damaged: {error}",
            file.file_name
        ))
    })?;
    Ok(Some((parsed, file.content)))
}
