//! From a repository back to a data directory: a target becomes a plan, a plan becomes files and
//! settings, and the server fetches its WAL through [`fetch`].
//!
//! Reading order: what is asked for ([`Target`]), which record that is (`resolve`, `walk`), the
//! decision (`choose`, `planning`, [`RestorePlan`]), what is written
//! (`settings`, `place`, `execute`), the private server that replays (`replay`), and PostgreSQL's
//! `restore_command` ([`fetch`]).

pub mod ahead;
mod choose;
mod early_end;
mod execute;
pub mod fetch;
mod over;
mod parents;
mod place;
mod plan;
mod planning;
mod raised;
mod replay;
mod resolve;
mod settings;
mod target;
mod trial;
mod unit;
mod walk;

use std::path::PathBuf;

use wal::TimelineId;

pub use execute::execute;
pub use over::OverCluster;
pub use place::{Found, Over, Owner, TablespacePlan};
pub use plan::{
    BehindReport, CommitReport, Phase, Reached, RestorePlan, RestoreReport, TargetReport,
    WalReport, Work,
};
pub use planning::plan;
pub use resolve::{Behind, CommitSeen, Span};
pub use settings::{Environment, RestoreCommand, StopAt};
pub use target::{MappedFrom, ParsedTime, TablespaceMapping, Target, TargetAction, parse_time};

use crate::repository::layout::BackupId;

/// What is asked of a restore.
#[derive(Debug, Clone)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a flag of the command line of its own"
)]
pub struct RestoreOptions {
    /// The directory to restore into.
    pub target_dir: PathBuf,
    /// What may be there: what is right in it is kept, and the rest replaced or removed.
    pub over: Over,
    /// Files and folders that this program itself needs: none may lie in a directory that is written over.
    pub needed: Vec<PathBuf>,
    /// Where to end.
    pub target: Target,
    /// Leave out what the target names.
    pub exclusive: bool,
    /// The backup to begin with; the newest that serves where none is named.
    pub backup: Option<BackupId>,
    /// The branch; the newest timeline where none is named.
    pub timeline: Option<TimelineId>,
    /// What the server does at the target: pause, and at the latest promote, where nothing is said.
    pub action: Option<TargetAction>,
    /// Restore a standby, which follows the primary that the source followed.
    pub standby: bool,
    /// How a standby reaches its primary; as before where nothing is said.
    pub primary_conninfo: Option<String>,
    /// Where tablespaces go.
    pub tablespaces: Vec<TablespaceMapping>,
    /// Where WAL goes, if not into the data directory, which then has a link to there.
    pub waldir: Option<PathBuf>,
    /// Where files go that lay outside of the data directory and are kept with the backup.
    pub outside: Option<PathBuf>,
    /// Leave `archive_mode` as it was.
    pub archive_mode_preserve: bool,
    /// As root: whom the files are given to.
    pub owner: Option<String>,
    /// Start the server privately, and wait until it has reached the target.
    pub replay: bool,
    /// Where PostgreSQL's programs are.
    pub pg_bin: Option<PathBuf>,
    /// Read all WAL that is to be replayed before anything is written, however much it is.
    pub check_wal: bool,
    /// Only plan.
    pub dry_run: bool,
    /// How the restored server calls this program.
    pub restore_command: RestoreCommand,
}
