//! What can be restored, for people and for scripts.

mod holes;
mod metrics;
mod show;
mod timelines;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use jiff::Timestamp;
use serde::Serialize;
use wal::{Lsn, SegmentSize, TimelineId};

use crate::clock::{Clock, rfc3339};
use crate::error::{Error, Kind, Result, chain};
use crate::repository::catalog::{BranchEnd, Catalog, LeftOut};
use crate::repository::destination::Destination;
use crate::repository::forks::{LeftBehind, left_behind};
use crate::repository::records::{BackupRecord, DamagedPages};
use crate::repository::walk::Damage;
use crate::repository::windows::{Candidate, Reached, latest_moment};
use crate::repository::{PlaceState, Repository, SpoolContents};

pub use metrics::Metrics;
pub use show::{backup_table, list_text, status_text};
pub use timelines::TimelineStatus;

/// `status --json`, as DESIGN.md has it.
#[derive(Debug, Serialize)]
pub struct Status {
    /// The version of this document's form.
    pub schema: u32,
    /// Every cluster that was asked for.
    pub clusters: Vec<ClusterStatus>,
}

/// One cluster's system.
#[derive(Debug, Serialize)]
pub struct ClusterStatus {
    /// The cluster's name.
    pub name: String,
    /// The system identifier.
    pub system_id: String,
    /// The server's major version, where it is known.
    pub postgres_major: Option<u32>,
    /// The WAL segment size in bytes, where it is known.
    pub segment_bytes: Option<u64>,
    /// The newest timeline.
    pub timeline: Option<TimelineId>,
    /// What can be restored.
    pub windows: Vec<Window>,
    /// Missing stretches between stored ones.
    pub holes: Vec<HoleStatus>,
    /// What the newest timeline and those before it left behind, where something is stored there.
    pub left_behind: Vec<LeftBehindStatus>,
    /// Where the newest stream last was.
    pub tip: Option<TipStatus>,
    /// How much work a loss of the server now would take with it, in seconds; `None` without a
    /// window.
    pub seconds_at_risk: Option<f64>,
    /// How many backups there are that can be read.
    pub backup_count: usize,
    /// The newest backup.
    pub last_backup: Option<String>,
    /// From when on it can be restored.
    #[serde(serialize_with = "rfc3339::option::serialize")]
    pub last_backup_at: Option<Timestamp>,
    /// Backups that are there and cannot be read; they are not counted.
    pub unreadable_backups: Vec<UnreadableBackup>,
    /// What is stored.
    pub stored: Stored,
    /// What a stream of this machine holds that is not in the repository yet.
    pub spool: Option<SpoolStatus>,
    /// Why that is not known; absent where it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub spool_error: Option<String>,
    /// Where it is kept.
    pub repositories: Vec<RepositoryStatus>,
    /// The timelines, the first one first.
    pub timelines: Vec<TimelineStatus>,
    /// What ends windows before the end of what is stored.
    #[serde(skip)]
    pub(crate) damaged: Vec<Damage>,
}

/// WAL that is stored of a timeline behind the place where the next one left it.
#[derive(Debug, Clone, Serialize)]
pub struct LeftBehindStatus {
    /// The timeline that was left.
    pub timeline: TimelineId,
    /// Where.
    pub fork_lsn: Lsn,
    /// By this one.
    pub next: TimelineId,
    /// The end of what is stored of the timeline that was left.
    pub stored_lsn: Lsn,
}

impl From<LeftBehind> for LeftBehindStatus {
    fn from(left: LeftBehind) -> Self {
        Self {
            timeline: left.timeline,
            fork_lsn: left.fork,
            next: left.next,
            stored_lsn: left.stored,
        }
    }
}

/// One of the repositories that a cluster is kept in.
#[derive(Debug, Clone, Serialize)]
pub struct RepositoryStatus {
    /// Its name in settings.
    pub name: String,
    /// Its address.
    pub url: String,
    /// Whether it could be asked.
    pub reachable: bool,
    /// How many objects and backups it lacks that another one has, where that is known.
    pub missing_objects: Option<usize>,
    /// Why it could not be asked.
    pub error: Option<String>,
}

impl From<PlaceState> for RepositoryStatus {
    fn from(state: PlaceState) -> Self {
        Self {
            name: state.name,
            url: state.url,
            reachable: state.missing.is_ok(),
            missing_objects: state.missing.as_ref().ok().copied(),
            error: state.missing.err(),
        }
    }
}

/// A range of moments that can be restored.
#[derive(Debug, Clone, Serialize)]
pub struct Window {
    /// On this timeline, or its ancestors.
    pub timeline: TimelineId,
    /// The first moment.
    #[serde(serialize_with = "rfc3339::serialize")]
    pub earliest: Timestamp,
    /// The last moment.
    #[serde(serialize_with = "rfc3339::serialize")]
    pub latest: Timestamp,
    /// The position of the first.
    pub earliest_lsn: Lsn,
    /// The end of the WAL that can be replayed.
    pub latest_lsn: Lsn,
    /// Whether the last moment may be later than is said: the WAL is encrypted, and nothing here
    /// reads it.
    pub latest_is_lower_bound: bool,
}

impl Window {
    /// Whether it begins behind a hole, on the hole's timeline or a later one.
    fn is_behind(&self, hole: &HoleStatus) -> bool {
        self.timeline >= hole.timeline && self.earliest_lsn > hole.start_lsn
    }
}

/// A missing stretch.
#[derive(Debug, Clone, Serialize)]
pub struct HoleStatus {
    /// The timeline.
    pub timeline: TimelineId,
    /// Where it begins.
    pub start_lsn: Lsn,
    /// Where it ends.
    pub end_lsn: Lsn,
    /// The last moment before it that is known: a commit's, a backup's, or the end of a window.
    #[serde(serialize_with = "rfc3339::option::serialize")]
    pub earliest: Option<Timestamp>,
    /// The first moment after it that is known: a commit's or a backup's. Only a backup behind it opens a
    /// window.
    #[serde(serialize_with = "rfc3339::option::serialize")]
    pub latest: Option<Timestamp>,
    /// Nothing is stored behind it.
    #[serde(skip)]
    pub(crate) is_lost_end: bool,
}

/// Where a stream was.
#[derive(Debug, Clone, Serialize)]
pub struct TipStatus {
    /// Everything before it is stored.
    pub lsn: Lsn,
    /// When that was confirmed.
    #[serde(serialize_with = "rfc3339::serialize")]
    pub confirmed_at: Timestamp,
}

/// Bytes in the repository.
#[derive(Debug, Clone, Serialize)]
pub struct Stored {
    /// WAL.
    pub wal_bytes: u64,
    /// Backups.
    pub backup_bytes: u64,
}

/// What is in a spool, and not in the repository.
#[derive(Debug, Clone, Serialize)]
pub struct SpoolStatus {
    /// How many segments and pieces.
    pub objects: usize,
    /// What they take there.
    pub bytes: u64,
    /// Their timeline; the newest where there are several.
    pub timeline: Option<TimelineId>,
    /// Where the first stretch of that timeline begins.
    pub start_lsn: Option<Lsn>,
    /// Where the last one ends.
    pub end_lsn: Option<Lsn>,
}

impl From<SpoolContents> for SpoolStatus {
    fn from(contents: SpoolContents) -> Self {
        Self {
            objects: contents.objects,
            bytes: contents.bytes,
            timeline: contents.timeline,
            start_lsn: contents.start,
            end_lsn: contents.end,
        }
    }
}

/// A backup that is there and cannot be read, so that no restore can begin with it.
#[derive(Debug, Clone, Serialize)]
pub struct UnreadableBackup {
    /// Its id.
    pub id: String,
    /// The cluster's name.
    pub cluster: String,
    /// The system identifier.
    pub system_id: String,
    /// Why: its record is damaged, its key is gone, or it is not encrypted where it should be.
    pub reason: String,
    /// What to do about it.
    pub hint: Option<String>,
}

impl UnreadableBackup {
    fn all_of(repository: &Repository, left_out: Vec<LeftOut>) -> Vec<Self> {
        let unreadable = left_out.into_iter().map(|one| Self {
            id: one.id.to_string(),
            cluster: repository.cluster().to_string(),
            system_id: repository.system_id().to_string(),
            reason: one.reason,
            hint: one.hint,
        });
        unreadable.collect()
    }
}

/// `list --json`.
#[derive(Debug, Serialize)]
pub struct List {
    /// The version of this document's form.
    pub schema: u32,
    /// Every backup that can be read, oldest first.
    pub backups: Vec<BackupRow>,
    /// Every backup that is there and cannot be read.
    pub unreadable_backups: Vec<UnreadableBackup>,
}

/// `backup --json`.
#[derive(Debug, Serialize)]
pub struct BackupDone {
    /// The version of this document's form.
    pub schema: u32,
    /// The backup.
    #[serde(flatten)]
    pub backup: BackupRow,
}

/// A backup, for scripts.
#[derive(Debug, Clone, Serialize)]
pub struct BackupRow {
    /// Its id.
    pub id: String,
    /// The cluster's name.
    pub cluster: String,
    /// The system identifier.
    pub system_id: String,
    /// The timeline on which it was taken.
    pub timeline: TimelineId,
    /// Replay begins here.
    pub start_lsn: Lsn,
    /// It is consistent from here on.
    pub stop_lsn: Lsn,
    /// When it began.
    #[serde(serialize_with = "rfc3339::serialize")]
    pub started_at: Timestamp,
    /// When it was complete.
    #[serde(serialize_with = "rfc3339::serialize")]
    pub finished_at: Timestamp,
    /// The user's label.
    pub label: String,
    /// The server's version.
    pub postgres_version: String,
    /// How many files it has.
    pub files: u64,
    /// Their size in bytes.
    pub bytes: u64,
    /// What it took in the repository.
    pub stored_bytes: u64,
    /// How many of its pages have a wrong checksum.
    pub damaged_page_count: u64,
    /// Which, as far as they are known and may be seen.
    pub damaged_pages: Vec<DamagedPages>,
}

impl From<&BackupRecord> for BackupRow {
    fn from(record: &BackupRecord) -> Self {
        Self {
            id: record.id.to_string(),
            cluster: record.cluster.clone(),
            system_id: record.system_id.clone(),
            timeline: record.timeline,
            start_lsn: record.start_lsn,
            stop_lsn: record.stop_lsn,
            started_at: record.started_at,
            finished_at: record.finished_at,
            label: record.label.clone(),
            postgres_version: record.postgres_version.clone(),
            files: record.files,
            bytes: record.bytes,
            stored_bytes: record.stored_bytes,
            damaged_page_count: record.damaged_page_count,
            damaged_pages: record.damaged_pages.clone(),
        }
    }
}

/// Which clusters to show.
#[derive(Clone)]
pub struct Shown {
    /// Where each is stored.
    pub destinations: Vec<Destination>,
    /// Show whatever the repository holds, not only the clusters named.
    pub every_cluster: bool,
    /// Refuse a cluster of which nothing is stored.
    pub must_exist: bool,
    /// Show this system only.
    pub system_id: Option<u64>,
    /// Where WAL is spooled on this machine, by the cluster's name.
    pub spools: BTreeMap<String, PathBuf>,
    /// The time of day.
    pub clock: Arc<dyn Clock>,
}

impl Shown {
    async fn repositories(&self) -> Result<Vec<Repository>> {
        let mut shown = Vec::new();
        for destination in &self.destinations {
            let open = destination.open(false, &self.clock)?;
            let clusters = if self.every_cluster {
                open.every_cluster().await?
            } else {
                vec![open]
            };
            for cluster in clusters {
                let systems = cluster.every_system().await?;
                if systems.is_empty() && self.must_exist {
                    // says that there is none
                    cluster.stored(self.system_id).await?;
                }
                let wanted = |id| self.system_id.is_none_or(|wanted| wanted == id);
                shown.extend(
                    systems
                        .into_iter()
                        .filter(|system| wanted(system.system_id())),
                );
            }
        }
        Ok(shown)
    }
}

impl Shown {
    /// What is spooled of a system; the error says why that is not known.
    async fn spool_of(&self, repository: &Repository) -> Result<Option<SpoolStatus>, String> {
        let cluster = repository.cluster();
        let Some(dir) = self.spools.get(cluster.as_str()) else {
            return Ok(None);
        };
        let clock = Arc::clone(&self.clock);
        let contents = SpoolContents::read(dir, cluster, repository.system_id(), clock).await;
        match contents {
            Ok(contents) => Ok(contents.map(SpoolStatus::from)),
            Err(error) => Err(chain(&error)),
        }
    }

    /// Logs what lies in the spools of this machine.
    async fn say_what_is_spooled(&self) {
        for (name, dir) in &self.spools {
            let Ok(cluster) = name.parse() else { continue };
            match SpoolContents::read_every_system(dir, &cluster, &self.clock).await {
                Ok(systems) => {
                    for contents in systems {
                        let line = show::spool_line(&contents.into());
                        tracing::warn!("cluster {name}: {line}");
                    }
                }
                Err(error) => tracing::warn!("cluster {name}: {error}"),
            }
        }
    }
}

/// The state of every cluster that is to be shown.
pub async fn status(shown: &Shown, now: Timestamp) -> Result<Status> {
    let mut clusters = Vec::new();
    let repositories = match shown.repositories().await {
        // a spool is filled while the repository is away, and is what is left of one that is gone:
        // that much can be said
        Err(error) if matches!(error.kind(), Kind::Unreachable | Kind::NotFound) => {
            shown.say_what_is_spooled().await;
            return Err(error);
        }
        repositories => repositories?,
    };
    for repository in repositories {
        let mut cluster = cluster_status(&repository, now).await?;
        match shown.spool_of(&repository).await {
            Ok(spool) => cluster.spool = spool,
            Err(reason) => cluster.spool_error = Some(reason),
        }
        clusters.push(cluster);
    }
    Ok(Status {
        schema: 1,
        clusters,
    })
}

/// The backups of every cluster that is to be shown.
pub async fn list(shown: &Shown) -> Result<List> {
    let (mut backups, mut unreadable_backups) = (Vec::new(), Vec::new());
    for repository in shown.repositories().await? {
        let listed = repository.backups().await?;
        backups.extend(listed.readable.iter().map(BackupRow::from));
        unreadable_backups.extend(UnreadableBackup::all_of(&repository, listed.left_out));
    }
    Ok(List {
        schema: 1,
        backups,
        unreadable_backups,
    })
}

/// What is wrong where a report had to leave out backups: whoever asks every hour must notice,
/// though the report was printed.
pub fn unreadable<'a>(backups: impl Iterator<Item = &'a UnreadableBackup>) -> Result<()> {
    let backups: Vec<&UnreadableBackup> = backups.collect();
    let Some(first) = backups.first() else {
        return Ok(());
    };
    let message = show::unreadable_sentence(backups.len(), first);
    let failure = Error::damaged(message).is_in_report();
    Err(match &first.hint {
        Some(hint) => failure.hint(hint),
        None => failure,
    })
}

/// What is wrong where a report shows windows that end at WAL that cannot be read.
pub fn damaged<'a>(clusters: impl Iterator<Item = &'a ClusterStatus>) -> Result<()> {
    let mut damaged = clusters.flat_map(|cluster| &cluster.damaged);
    let Some(damage) = damaged.next() else {
        return Ok(());
    };
    let failure = Error::damaged(format!("WAL that is stored cannot be read: {damage}"));
    Err(failure
        .hint("restore this object from a copy of the repository, or take a backup: a window opens behind it")
        .is_in_report())
}

/// The state of one cluster's system.
async fn cluster_status(repository: &Repository, now: Timestamp) -> Result<ClusterStatus> {
    let catalog = repository.catalog().await?;
    let places = repository.place_states().await;
    let record = repository.cluster_record().await?;
    let (windows, damaged) = match catalog.segment_size {
        Some(size) => windows(repository, &catalog, size).await?,
        None => (Vec::new(), Vec::new()),
    };
    let newest = windows.iter().map(|window| window.latest).max();
    let at_risk = newest.map(|latest| now.duration_since(latest).as_secs_f64().max(0.0));
    let tip = catalog.tips.values().next_back();
    let holes = holes::holes(repository, &catalog, &windows, &damaged).await?;
    let newest_branch = catalog
        .newest_timeline()
        .map(|newest| catalog.branch(newest));
    let left_behind = match (newest_branch, catalog.segment_size) {
        (Some(branch), Some(size)) => left_behind(&catalog, &branch, size),
        _ => Vec::new(),
    };
    Ok(ClusterStatus {
        name: repository.cluster().to_string(),
        system_id: repository.system_id().to_string(),
        postgres_major: record.map(|record| record.major),
        segment_bytes: catalog.segment_size.map(SegmentSize::bytes),
        timeline: catalog.newest_timeline(),
        windows,
        holes,
        left_behind: left_behind
            .into_iter()
            .map(LeftBehindStatus::from)
            .collect(),
        tip: tip.map(|tip| TipStatus {
            lsn: tip.lsn,
            confirmed_at: tip.confirmed_at,
        }),
        seconds_at_risk: at_risk,
        backup_count: catalog.backups.len(),
        last_backup: catalog.backups.last().map(|backup| backup.id.to_string()),
        last_backup_at: catalog.backups.last().map(|backup| backup.finished_at),
        unreadable_backups: UnreadableBackup::all_of(repository, catalog.left_out.clone()),
        stored: Stored {
            wal_bytes: catalog.wal_bytes,
            backup_bytes: catalog.backup_bytes,
        },
        spool: None,
        spool_error: None,
        repositories: places.into_iter().map(RepositoryStatus::from).collect(),
        timelines: timelines::timelines(&catalog),
        damaged: damaged.into_iter().map(|(_, damage)| damage).collect(),
    })
}

/// The windows of every branch: for each stretch of WAL without a break, from its first backup's
/// moment to the last that is stored. And what ends them before that.
async fn windows(
    repository: &Repository,
    catalog: &Catalog,
    size: SegmentSize,
) -> Result<(Vec<Window>, Vec<(TimelineId, Damage)>)> {
    let mut windows: Vec<(BranchEnd, Window)> = Vec::new();
    let mut damaged: Vec<(TimelineId, Damage)> = Vec::new();
    for timeline in tips_of_branches(catalog) {
        let branch = catalog.branch(timeline);
        for backup in &catalog.backups {
            let Some(Candidate { end, .. }) = Candidate::of(catalog, &branch, backup, size) else {
                continue;
            };
            let is_within = |(known, window): &(BranchEnd, Window)| {
                *known == end && backup.stop_lsn <= window.latest_lsn
            };
            if windows.iter().any(is_within) {
                // an earlier backup reaches the same end: the window has begun before
                continue;
            }
            let reached = latest_moment(repository, catalog, &branch, backup).await?;
            let Some(Reached { latest, damage }) = reached else {
                continue;
            };
            if let Some(damage) = damage
                && damaged.iter().all(|(_, known)| known.at != damage.at)
            {
                damaged.push((end.timeline, damage));
            }
            let Some(latest) = latest else { continue };
            windows.push((
                end,
                Window {
                    timeline: end.timeline,
                    earliest: backup.finished_at,
                    latest: latest.moment,
                    earliest_lsn: backup.stop_lsn,
                    latest_lsn: latest.lsn,
                    latest_is_lower_bound: latest.is_lower_bound,
                },
            ));
        }
    }
    let windows = windows.into_iter().map(|(_, window)| window).collect();
    Ok((windows, damaged))
}

/// Timelines from which no other that is stored goes on.
fn tips_of_branches(catalog: &Catalog) -> Vec<TimelineId> {
    let mut known: Vec<TimelineId> = catalog.timelines.keys().copied().collect();
    known.extend(catalog.backups.iter().map(|backup| backup.timeline));
    known.sort_unstable();
    known.dedup();
    // a parent too: it can reach beyond the point where its child left it
    known.reverse();
    known
}

#[cfg(test)]
mod tests {
    use super::*;

    /// "Take a backup" for ever, though it was taken.
    #[test]
    fn a_window_lies_behind_a_hole_where_its_backup_does() {
        let at = Timestamp::UNIX_EPOCH;
        let timeline = |id| TimelineId::new(id).unwrap();
        let hole = HoleStatus {
            timeline: timeline(2),
            start_lsn: Lsn::new(100),
            end_lsn: Lsn::new(200),
            earliest: None,
            latest: None,
            is_lost_end: false,
        };
        let begins = |id, lsn| Window {
            timeline: timeline(id),
            earliest: at,
            latest: at,
            earliest_lsn: Lsn::new(lsn),
            latest_lsn: Lsn::new(1000),
            latest_is_lower_bound: false,
        };
        for (id, lsn, is) in [
            (2, 100, false),
            (2, 101, true),
            (3, 300, true),
            (1, 300, false),
        ] {
            assert_eq!(begins(id, lsn).is_behind(&hole), is, "{id} {lsn}");
        }
    }
}
