//! What stands in a directory before a restore: nothing, a restore that was broken off, or the
//! cluster itself.

use std::fs::{self, File};
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use basebackup::ControlFile;
use rustix::process::{Pid, geteuid, test_kill_process};

use super::CONTROL_FILE;
use super::marker::{MARKER, Unfinished};
use crate::error::{Error, Result, io};

/// A server's lock file.
pub(super) const LOCK_FILE: &str = "postmaster.pid";
/// More than `pg_control` has on any major (`PG_CONTROL_FILE_SIZE`), in bytes.
const CONTROL_BYTES_MAX: u64 = 64 << 10;
/// What a restore may write over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Over {
    /// Nothing: the directory is absent or empty.
    Nothing,
    /// A restore that was broken off there.
    Unfinished,
    /// The cluster that was there until now, or what a restore over it left; or nothing.
    Cluster,
}

/// What is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// Nothing, or an empty directory.
    Nothing,
    /// A restore that was broken off.
    Unfinished {
        /// Whether it was one over the cluster's own directory: its links may still be those of that cluster.
        over_cluster: bool,
    },
    /// A server's data directory, of this cluster, which no server holds.
    Cluster,
}

impl Found {
    /// Whether places may hold what is right already.
    pub(in crate::restore) fn is_filled(self) -> bool {
        self != Self::Nothing
    }

    /// Whether the links in it may be those of the cluster, or of what it was copied from.
    pub(in crate::restore) fn has_links_of_a_cluster(self) -> bool {
        !matches!(
            self,
            Self::Nothing
                | Self::Unfinished {
                    over_cluster: false
                }
        )
    }
}

/// Looks what is in a directory that the cluster with this system identifier is to be restored into, and
/// refuses what may not be written over.
pub(in crate::restore) fn check_target(path: &Path, over: Over, system_id: u64) -> Result<Found> {
    if over != Over::Cluster
        && let Some(pid) = running_server(path)
    {
        return Err(Error::usage(format!(
            "a running server holds {}: pid={pid}",
            path.display()
        ))
        .hint("restore into another directory, or stop that server and move its directory away"));
    }
    let found = match over {
        Over::Nothing => check_free(path, system_id),
        Over::Unfinished => check_unfinished(path, system_id),
        Over::Cluster => check_cluster(path, system_id),
    }?;
    if found.is_filled() {
        let metadata = fs::metadata(path).map_err(|error| io("read", path, &error))?;
        check_user(path, geteuid().as_raw(), metadata.uid())?;
    }
    Ok(found)
}

/// Refuses to write, as root, over what somebody else may change meanwhile: links, and folders that are moved,
/// would lead root to any place. What a restore as root has begun is root's.
fn check_user(path: &Path, user: u32, owner: u32) -> Result<()> {
    if user != 0 || owner == 0 {
        return Ok(());
    }
    Err(Error::usage(format!(
        "root does not write over what belongs to another user: {}, uid={owner}",
        path.display()
    ))
    .hint(format!(
        "run the same as that user, whose server needs the repository too: \
         runuser -u \"$(id -nu {owner})\" -- anywhen restore …"
    )))
}

/// Refuses a directory that is not any more what was `found` there.
pub(super) fn check_still(path: &Path, found: Found, system_id: u64) -> Result<()> {
    let over = match found {
        Found::Nothing => Over::Nothing,
        Found::Unfinished { .. } => Over::Unfinished,
        Found::Cluster => Over::Cluster,
    };
    if check_target(path, over, system_id)? == found {
        return Ok(());
    }
    let shown = path.display();
    Err(Error::failure(format!(
        "{shown} is not any more what it was when the plan was made"
    ))
    .hint("restore again, which makes another plan"))
}

fn check_free(path: &Path, system_id: u64) -> Result<Found> {
    if is_absent_or_empty(path)? {
        return Ok(Found::Nothing);
    }
    let refused = |what| Error::usage(format!("{} {what}", path.display()));
    let elsewhere = "restore into a directory that is empty or not there";
    if path.join(MARKER).exists() {
        let what = "holds a restore that did not come to its end, or is still under way";
        let hint = format!("{elsewhere}; or go on with that one, with --resume");
        return Err(refused(what).hint(hint));
    }
    if !path.join("PG_VERSION").exists() {
        return Err(refused("is not an empty directory").hint(elsewhere));
    }
    let refused = refused("holds a PostgreSQL cluster already");
    Err(match control_of(path) {
        Ok(Some(control)) if control.system_id == system_id => refused.hint(format!(
            "{elsewhere}; or over that cluster with --delta: what is right in it stays, all else in it is \
             replaced or removed (--dry-run shows the plan)"
        )),
        _ => refused.hint(elsewhere),
    })
}

/// Refuses what is not a restore of this cluster that was broken off before it could be started.
fn check_unfinished(path: &Path, system_id: u64) -> Result<Found> {
    let shown = path.display();
    let Some(unfinished) = Unfinished::read(path)? else {
        return Err(Error::usage(format!(
            "{shown} does not hold a restore that was broken off"
        ))
        .hint("leave --resume out, and restore into a directory that is empty or not there"));
    };
    if unfinished.system_id != system_id {
        return Err(Error::usage(format!(
            "{shown} holds a restore of another cluster: expected system identifier {system_id}, found={}",
            unfinished.system_id
        )));
    }
    // somebody may have started it
    if path.join(CONTROL_FILE).exists() {
        return Err(Error::usage(format!(
            "{shown} is a whole cluster: its restore was all but done, or had touched nothing"
        ))
        .hint("restore again with --delta instead of --resume, or remove that directory first"));
    }
    Ok(Found::Unfinished {
        over_cluster: unfinished.follows.is_some(),
    })
}

/// Refuses what is not this cluster's, or held by a server.
fn check_cluster(path: &Path, system_id: u64) -> Result<Found> {
    if is_absent_or_empty(path)? {
        return Ok(Found::Nothing);
    }
    let shown = path.display();
    check_no_server(path)?;
    let elsewhere = "restore into a directory that is empty or not there, without --delta";
    let marked = Unfinished::read(path)?.filter(|marked| marked.system_id == system_id);
    let control = match control_of(path) {
        Ok(Some(control)) => control,
        Ok(None) if marked.is_some() => return check_unfinished(path, system_id),
        // a restore was broken off while it wrote it
        Err(_) if marked.is_some() => return Ok(Found::Cluster),
        Ok(None) => {
            return Err(Error::usage(format!(
                "{shown} does not hold a cluster: it has no {CONTROL_FILE}"
            ))
            .hint(elsewhere));
        }
        Err(error) => {
            return Err(Error::usage(format!(
                "whose cluster {shown} holds cannot be told: {}",
                error.message()
            ))
            .hint(elsewhere));
        }
    };
    if control.system_id != system_id {
        return Err(Error::usage(format!(
            "{shown} holds another cluster: expected system identifier {system_id}, found={}",
            control.system_id
        ))
        .hint(elsewhere));
    }
    Ok(Found::Cluster)
}

/// Refuses a directory with a server's lock file: whether that server lives cannot be told from another
/// machine, or from outside of its container.
pub(super) fn check_no_server(path: &Path) -> Result<()> {
    let lock = path.join(LOCK_FILE);
    match fs::symlink_metadata(&lock) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(io("read", &lock, &error)),
        Ok(_) => {}
    }
    let shown = path.display();
    Err(match running_server(path) {
        Some(pid) => Error::usage(format!("a running server holds {shown}: pid={pid}")).hint(format!(
            "stop it first, and see that nothing starts it again: pg_ctl -D {shown} stop, or systemctl \
             stop postgresql"
        )),
        None => Error::usage(format!(
            "a server holds {shown}, or ended without a shutdown: {} is there, and names no process of \
             this machine",
            lock.display()
        ))
        .hint(
            "see that no process of a server is left, in no container and on no other machine; then remove that \
             file",
        ),
    })
}

/// What `pg_control` in a data directory says; `None` where there is none.
fn control_of(data: &Path) -> Result<Option<ControlFile>> {
    let path = data.join(CONTROL_FILE);
    let Some(bytes) = read_up_to(&path, CONTROL_BYTES_MAX)? else {
        return Ok(None);
    };
    let control = ControlFile::parse(&bytes).map_err(|error| {
        let shown = path.display();
        Error::damaged(format!("damaged {shown}: {error}"))
    })?;
    Ok(Some(control))
}

/// The first bytes of a file; `None` where there is none.
pub(super) fn read_up_to(path: &Path, bytes_max: u64) -> Result<Option<Vec<u8>>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io("open", path, &error)),
    };
    let mut bytes = Vec::new();
    let read = file.take(bytes_max).read_to_end(&mut bytes);
    read.map_err(|error| io("read", path, &error))?;
    Ok(Some(bytes))
}

/// The server whose lock file names a process that lives.
fn running_server(data: &Path) -> Option<i32> {
    let text = fs::read_to_string(data.join(LOCK_FILE)).ok()?;
    let number: i32 = text.lines().next()?.trim().parse().ok()?;
    // a backend alone names itself by a negative number
    let pid = Pid::from_raw(number.checked_abs()?)?;
    match test_kill_process(pid) {
        Err(rustix::io::Errno::SRCH) => None,
        _ => Some(number),
    }
}

pub(super) fn is_absent_or_empty(path: &Path) -> Result<bool> {
    match fs::read_dir(path) {
        Ok(mut entries) => Ok(entries.next().is_none()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(true),
        Err(error) if error.kind() == std::io::ErrorKind::NotADirectory => Ok(false),
        Err(error) => Err(io("read", path, &error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_writes_over_its_own_alone() {
        let path = Path::new("/srv/data");
        check_user(path, 26, 26).unwrap();
        check_user(path, 26, 27).unwrap();
        check_user(path, 0, 0).unwrap();
        let error = check_user(path, 0, 26).unwrap_err();
        assert!(error.hint_text().unwrap().contains("id -nu 26"), "{error}");
    }
}
