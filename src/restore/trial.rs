//! `restore_command` is tried before anything is written: what is missing is said now, and not by a server at
//! start.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;
use wal::SegmentName;

use super::place::{Footprint, Found};
use super::plan::RestorePlan;
use crate::error::{Error, Result};

/// How long one try may take; the command has retries of its own.
const TRIAL_LIMIT: Duration = Duration::from_mins(2);
/// What recovery calls a segment that it fetches, below the data directory.
const FETCHED: &str = "pg_wal/RECOVERYXLOG";

/// Runs `restore_command` as the server will, with nothing in its environment, in a folder that the server's user
/// has meanwhile, and that is gone again then.
pub(super) async fn try_restore_command(plan: &RestorePlan) -> Result<()> {
    let footprint = make_folder(plan)?;
    let folder = footprint.target().path();
    let start = plan.backup.start_lsn;
    let segment = SegmentName::of(plan.backup.timeline, start, plan.segment_size);
    let settings = plan.settings();
    let command = &settings.restore_command;
    let line = command.shell_line(settings.fetching, &segment.to_string(), FETCHED);
    footprint.make_dir(Path::new("pg_wal"))?;
    footprint.lend()?;
    let mut shell = Command::new("/bin/sh");
    shell
        .arg("-c")
        .arg(&line)
        .env_clear()
        .envs(settings.restore_command.environment.0.iter().cloned())
        .current_dir(folder);
    shell
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    if let Some(owner) = plan.owner {
        shell.uid(owner.uid).gid(owner.gid);
    }
    let shown = line.to_string_lossy().into_owned();
    let failed = |how: &str| {
        Error::failure(format!(
            "restore_command does not work: {how}: {shown}, in {}",
            folder.display()
        ))
        .hint(
            "the server's user must be able to run this program and to read the repository and the \
             configuration file, with no more than the repository's variables in its environment",
        )
    };
    let ran = tokio::time::timeout(TRIAL_LIMIT, shell.output()).await;
    let output = match ran {
        Err(_elapsed) => return Err(failed("it takes too long")),
        Ok(Err(error)) => return Err(failed(&error.to_string())),
        Ok(Ok(output)) => output,
    };
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(failed(&format!(
            "{}: {}",
            output.status,
            said.trim().replace('\n', "; ")
        )));
    }
    if footprint.target().remove(Path::new(FETCHED))? {
        Ok(())
    } else {
        Err(failed("it fetched nothing"))
    }
}

/// A folder beside the directory, where there is room for a segment, and where its owner must come by anyway; else
/// one for what is temporary.
fn make_folder(plan: &RestorePlan) -> Result<Footprint> {
    let make = |folder: PathBuf| {
        Footprint::begin(&folder, plan.owner, plan.system_id, Found::Nothing, None)
    };
    let suffix = format!("anywhen-trial-{}", plan.decided_at.as_nanosecond());
    let mut name = plan
        .target_dir
        .file_name()
        .map(OsString::from)
        .unwrap_or_default();
    name.push(".");
    name.push(&suffix);
    make(plan.target_dir.with_file_name(name)).or_else(|_| make(std::env::temp_dir().join(suffix)))
}
