//! What a restore will do, decided as data before a byte is written, and printed for people.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use jiff::Timestamp;
use serde::Serialize;
use wal::{Lsn, Parameters, SegmentSize, TimelineId};

use super::RestoreOptions;
use super::over::OverCluster;
use super::place::{Found, Owner, TablespacePlan};
use super::resolve::{Behind, CommitSeen, LOOK_AHEAD_BYTES, Span};
use super::settings::{Fetching, RecoverySettings, StopAt};
use super::target::{Target, TargetAction, rfc3339};
use crate::repository::records::BackupRecord;

/// What a restore will do.
#[derive(Debug, Clone)]
pub struct RestorePlan {
    /// What was asked for.
    pub options: RestoreOptions,
    /// The directory, as an absolute path.
    pub target_dir: PathBuf,
    /// What is there.
    pub found: Found,
    /// What becomes of the cluster that is there, if one is.
    pub over_cluster: Option<OverCluster>,
    /// Where WAL goes, if not into the data directory.
    pub wal_place: Option<PathBuf>,
    /// The cluster's system identifier.
    pub system_id: u64,
    /// The backup that it begins with.
    pub backup: BackupRecord,
    /// The timeline along which WAL is replayed; the one that the last record wanted lies on.
    pub timeline: TimelineId,
    /// Where recovery stops.
    pub stop: StopAt,
    /// The last record wanted: at or behind the backup's end.
    pub last: Option<Span>,
    /// The last commit that is in, if there is one behind the backup's beginning.
    pub last_in: Option<CommitSeen>,
    /// The first commit that is not, if one is stored.
    pub first_out: Option<CommitSeen>,
    /// Commits that are out though they are stamped before the target.
    pub behind: Behind,
    /// The size of the cluster's segments.
    pub segment_size: SegmentSize,
    /// How many segments of WAL recovery will fetch.
    pub segments: u64,
    /// How many of those were not read to make this plan: their summaries said enough.
    pub unread_segments: u64,
    /// Where tablespaces go.
    pub tablespaces: Vec<TablespacePlan>,
    /// Whether tablespaces without places of their own are in the backup, or replay makes any.
    pub in_place_tablespaces: bool,
    /// Tablespaces that replay makes, and the places that must be there for it.
    pub made_later: Vec<(u32, PathBuf)>,
    /// Whom the files are given to.
    pub owner: Option<Owner>,
    /// What the server does at the target.
    pub action: TargetAction,
    /// The largest that settings of the primary were set to while this WAL was written.
    pub parameters: Parameters,
    /// What whoever restores should know.
    pub warnings: Vec<String>,
    /// When it was decided.
    pub decided_at: Timestamp,
    /// How long deciding took.
    pub took: Duration,
}

impl RestorePlan {
    pub(super) fn settings(&self) -> RecoverySettings {
        let follows = self.stop == StopAt::Never;
        RecoverySettings {
            restore_command: self.options.restore_command.clone(),
            fetching: Fetching {
                system_id: self.system_id,
                timeline: if follows {
                    self.options.timeline
                } else {
                    Some(self.timeline)
                },
                until: (!follows).then(|| self.replayed_up_to()),
            },
            stop: self.stop,
            action: self.action,
            standby: self.options.standby,
            primary_conninfo: self.options.primary_conninfo.clone(),
            follows: self.over_cluster.as_ref().map(|over| over.follows.clone()),
            archive_mode_preserve: self.options.archive_mode_preserve,
            in_place_tablespaces: self.in_place_tablespaces,
            raised: Vec::new(),
        }
    }

    /// The start of the last record wanted, or the end of the backup.
    pub fn resolved_lsn(&self) -> Option<Lsn> {
        match self.stop {
            StopAt::After(lsn) => Some(lsn),
            StopAt::Immediate => Some(self.backup.stop_lsn),
            StopAt::Never => None,
        }
    }

    /// Where replay has come to when it is done: the end of the last record wanted.
    pub fn replayed_up_to(&self) -> Lsn {
        self.last.map_or(self.backup.stop_lsn, |last| last.end)
    }

    /// What is reported of a plan that is not carried out.
    pub fn report(&self) -> RestoreReport {
        let phase = Phase::new("plan", self.took);
        RestoreReport {
            schema: 1,
            dry_run: self.options.dry_run,
            backup: self.backup.id.to_string(),
            timeline: self.timeline,
            target: TargetReport {
                kind: self.options.target.kind(),
                value: self.options.target.value(),
                resolved_lsn: self.resolved_lsn(),
            },
            last_in: self.last_in.map(CommitReport::from),
            first_out: self.first_out.map(CommitReport::from),
            behind: BehindReport {
                commits: self.behind.count,
                through: self.behind.through,
            },
            wal: WalReport {
                segments: self.segments,
                bytes: self.segments.saturating_mul(self.segment_size.bytes()),
                unread_segments: self.unread_segments,
            },
            reached: None,
            files: self.backup.files,
            bytes: self.backup.bytes,
            kept_bytes: 0,
            set_aside: None,
            target_dir: self.target_dir.to_string_lossy().into_owned(),
            phases: vec![phase],
            notes: Vec::new(),
        }
    }

    fn write_point(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let target = &self.options.target;
        let exclusive = if self.options.exclusive {
            ", exclusive"
        } else {
            ""
        };
        writeln!(f, "  target       {target}{exclusive}")?;
        match (self.stop, self.last) {
            (StopAt::After(lsn), _) => {
                writeln!(f, "  last record  {lsn} on timeline {}", self.timeline)?;
            }
            (StopAt::Immediate, _) => {
                let stop = self.backup.stop_lsn;
                writeln!(
                    f,
                    "  last record  the backup's end, {stop} on timeline {}",
                    self.timeline
                )?;
            }
            (StopAt::Never, _) => writeln!(f, "  last record  none: a standby follows")?,
        }
        if let Some(commit) = self.last_in {
            writeln!(f, "  last in      {}", Commit(commit))?;
        }
        match self.first_out {
            Some(commit) => writeln!(f, "  first out    {}", Commit(commit))?,
            None if matches!(self.options.target, Target::Time(_)) => {
                writeln!(f, "  first out    none is stored")?;
            }
            None => {}
        }
        if let Behind {
            count,
            through: Some(lsn),
        } = self.behind
            && count > 0
        {
            let mib = LOOK_AHEAD_BYTES >> 20;
            writeln!(
                f,
                "  behind       {count} commits in the next {mib} MiB are stamped before the target and \
                 stay out; --to-lsn {lsn} would include them, and all up to there"
            )?;
        }
        Ok(())
    }

    fn write_found(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.found.is_filled() {
            writeln!(
                f,
                "  kept         what is right there already, by content; all else in it is replaced or removed"
            )?;
        }
        if self.over_cluster.is_none() {
            return Ok(());
        }
        writeln!(
            f,
            "  first        global/pg_control is removed: no server starts there until all is done"
        )?;
        let place = self
            .wal_place
            .as_ref()
            .map(|place| place.display().to_string());
        writeln!(
            f,
            "  set aside    WAL and logs that are there, in {}/before-…; that WAL is not replayed",
            place.as_deref().unwrap_or("pg_wal")
        )
    }

    fn write_places(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for tablespace in &self.tablespaces {
            match &tablespace.to {
                Some(to) => writeln!(
                    f,
                    "  tablespace   {} from {} to {}{}",
                    tablespace.oid,
                    tablespace.from,
                    to.display(),
                    if tablespace.is_filled {
                        ", over what is there"
                    } else {
                        ""
                    }
                )?,
                None => writeln!(f, "  tablespace   {} in the directory", tablespace.oid)?,
            }
        }
        for (oid, place) in &self.made_later {
            writeln!(
                f,
                "  tablespace   {oid} is made by replay at {}",
                place.display()
            )?;
        }
        if let Some(place) = &self.wal_place {
            writeln!(f, "  pg_wal       a link to {}", place.display())?;
        }
        if !self.backup.outside.is_empty() {
            let to = match &self.options.outside {
                Some(folder) => format!("to {}", folder.display()),
                None => "not restored; --outside DIR writes them below DIR".to_owned(),
            };
            writeln!(f, "  outside      {}: {to}", self.backup.outside.join(", "))?;
        }
        if let Some(owner) = self.owner {
            writeln!(f, "  owner        uid {} gid {}", owner.uid, owner.gid)?;
        }
        Ok(())
    }

    fn write_settings(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let signal = if self.options.standby {
            "standby.signal"
        } else {
            "recovery.signal"
        };
        writeln!(f, "  settings     {signal}, and in postgresql.auto.conf:")?;
        let settings = self.settings().list();
        let (emptied, given): (Vec<_>, Vec<_>) = settings
            .into_iter()
            .partition(|(_, value)| value.is_empty());
        for (name, value) in given {
            writeln!(
                f,
                "                 {name} = '{}'",
                String::from_utf8_lossy(&value)
            )?;
        }
        let emptied: Vec<&str> = emptied.iter().map(|(name, _)| *name).collect();
        writeln!(f, "  emptied      {}", emptied.join(", "))?;
        if self.options.standby {
            let settings = self.settings();
            let names = match &settings.primary_conninfo {
                Some(_) => "primary_slot_name",
                None => "primary_conninfo and primary_slot_name",
            };
            let whose = match &settings.follows {
                None => format!("{names} of the source"),
                Some(lines) if lines.is_empty() => format!("no {names}: the directory has none"),
                Some(_) => format!("{names} of the directory"),
            };
            writeln!(f, "  kept         {whose}")?;
        } else {
            writeln!(
                f,
                "  removed      standby.signal, and settings of other recoveries and standbys"
            )?;
        }
        Ok(())
    }
}

impl fmt::Display for RestorePlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let backup = &self.backup;
        writeln!(f, "restore into {}", self.target_dir.display())?;
        self.write_found(f)?;
        writeln!(
            f,
            "  backup       {} of {}, PostgreSQL {}, {} files, {}",
            backup.id,
            rfc3339(backup.finished_at),
            backup.postgres_version,
            backup.files,
            mib(backup.bytes)
        )?;
        self.write_point(f)?;
        if self.stop != StopAt::Never {
            let bytes = self.segments.saturating_mul(self.segment_size.bytes());
            writeln!(
                f,
                "  WAL          {} segments, {}, from {}",
                self.segments,
                mib(bytes),
                backup.start_lsn
            )?;
            if self.unread_segments > 0 {
                writeln!(
                    f,
                    "                 {} of them are there and were not read: what is noted of them is \
                     enough for this plan; --check-wal reads all first",
                    self.unread_segments
                )?;
            }
            writeln!(f, "  then         {}", self.action.word())?;
        }
        self.write_places(f)?;
        self.write_settings(f)?;
        for warning in &self.warnings {
            writeln!(f, "  warning      {warning}")?;
        }
        Ok(())
    }
}

/// Bytes for people.
pub(super) fn mib(bytes: u64) -> String {
    match bytes {
        0..1024 => format!("{bytes} bytes"),
        1024..1_048_576 => format!("{} KiB", bytes >> 10),
        _ => {
            let tenths = bytes.saturating_mul(10) >> 20;
            format!("{}.{} MiB", tenths / 10, tenths % 10)
        }
    }
}

struct Commit(CommitSeen);

impl fmt::Display for Commit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let CommitSeen { lsn, xid, time } = self.0;
        write!(f, "transaction {xid} of {} at {lsn}", rfc3339(time))
    }
}

/// What of a restore is under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// Files are written; counted in their bytes.
    Files,
    /// A server replays WAL; counted in its bytes. With the stamp of the last transaction, once it tells.
    Replay(Option<Timestamp>),
}

/// What a restore did, or would do; the JSON of `restore`.
#[derive(Debug, Clone, Serialize)]
pub struct RestoreReport {
    /// The version of this form.
    pub schema: u32,
    /// Whether nothing was done.
    pub dry_run: bool,
    /// The backup's id.
    pub backup: String,
    /// The timeline along which WAL is replayed.
    pub timeline: TimelineId,
    /// What was asked for.
    pub target: TargetReport,
    /// The last commit that is in, of those behind the backup's beginning.
    pub last_in: Option<CommitReport>,
    /// The first commit that is not, of those that are stored.
    pub first_out: Option<CommitReport>,
    /// Commits that are out though they are stamped before the target.
    pub behind: BehindReport,
    /// The WAL that is replayed.
    pub wal: WalReport,
    /// How far a replay came; none where none was asked for.
    pub reached: Option<Reached>,
    /// Files of the backup.
    pub files: u64,
    /// Bytes of the backup.
    pub bytes: u64,
    /// How many of them were there already (`--delta`, `--resume`).
    pub kept_bytes: u64,
    /// The folder with the WAL, and the logs, of the cluster that was there (`--delta`).
    pub set_aside: Option<PathBuf>,
    /// The directory.
    pub target_dir: String,
    /// What took how long.
    pub phases: Vec<Phase>,
    /// What to do next, for people.
    #[serde(skip)]
    pub notes: Vec<String>,
}

/// The target of a restore.
#[derive(Debug, Clone, Serialize)]
pub struct TargetReport {
    /// `time`, `lsn`, `xid`, `name`, `immediate` or `latest`.
    pub kind: &'static str,
    /// What was asked for.
    pub value: Option<String>,
    /// The start of the last record wanted, or the end of the backup.
    pub resolved_lsn: Option<Lsn>,
}

/// A commit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CommitReport {
    /// Where its record starts.
    pub lsn: Lsn,
    /// The transaction.
    pub xid: u32,
    /// Its stamp, in RFC 3339.
    pub time: String,
}

impl From<CommitSeen> for CommitReport {
    fn from(commit: CommitSeen) -> Self {
        Self {
            lsn: commit.lsn,
            xid: commit.xid,
            time: rfc3339(commit.time),
        }
    }
}

/// Commits that are out though they are stamped before the target.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct BehindReport {
    /// How many.
    pub commits: u64,
    /// The LSN that would include all of them.
    pub through: Option<Lsn>,
}

/// The WAL that is replayed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct WalReport {
    /// Segments.
    pub segments: u64,
    /// Their plain bytes.
    pub bytes: u64,
    /// How many of them were not read to make the plan: what is noted of them was enough.
    pub unread_segments: u64,
}

/// How far a replay came.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Reached {
    /// The end of the last record replayed.
    pub lsn: Lsn,
    /// The stamp of the last transaction replayed, in RFC 3339.
    pub time: Option<String>,
}

/// A part of the work.
#[derive(Debug, Clone, Serialize)]
pub struct Phase {
    /// `plan`, `files`, `sync` or `replay`.
    pub name: &'static str,
    /// How long it took.
    pub seconds: f64,
}

impl Phase {
    pub(super) fn new(name: &'static str, took: Duration) -> Self {
        let millis = u32::try_from(took.as_millis()).unwrap_or(u32::MAX);
        Self {
            name,
            seconds: f64::from(millis) / 1000.0,
        }
    }
}

impl fmt::Display for RestoreReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds: f64 = self.phases.iter().map(|phase| phase.seconds).sum();
        let size = mib(self.bytes);
        write!(
            f,
            "restored {} files, {size} in {seconds:.1} s: {}",
            self.files, self.target_dir
        )?;
        if self.kept_bytes > 0 {
            write!(f, "\n{} of it were there already", mib(self.kept_bytes))?;
        }
        if let Some(reached) = &self.reached {
            write!(f, "\nreached {}", reached.lsn)?;
            if let Some(time) = &reached.time {
                write!(f, ", last transaction of {time}")?;
            }
            let took = self
                .phases
                .iter()
                .map(|phase| format!("{} {:.1} s", phase.name, phase.seconds));
            write!(f, "\ntook: {}", took.collect::<Vec<_>>().join(", "))?;
        }
        for note in &self.notes {
            write!(f, "\n{note}")?;
        }
        Ok(())
    }
}
