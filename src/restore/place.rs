//! The places that a restore writes to: checked before a byte is written, and left as they were
//! found if it fails.

use std::fs::{self, DirBuilder};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{
    DirBuilderExt as _, MetadataExt as _, PermissionsExt as _, chown, lchown, symlink,
};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::process::{Pid, geteuid, test_kill_process};

use super::target::TablespaceMapping;
use crate::error::{Error, Result, io};
use crate::repository::records::TablespaceRecord;

/// Stands in a directory while it is being restored, so that no second restore writes there, and so
/// that what a killed one left says what it is.
const MARKER: &str = "anywhen-restore-unfinished";

/// Whom the restored files are given to; none where they belong to whoever restores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner {
    /// The user.
    pub uid: u32,
    /// The group.
    pub gid: u32,
}

impl Owner {
    /// Who must own a restore into `target`: as root the user called `name`, or the owner of the
    /// folder; never root, as whom PostgreSQL refuses to run.
    pub(super) fn of_restore(name: Option<&str>, target: &Path) -> Result<Option<Self>> {
        if !geteuid().is_root() {
            let Some(name) = name else { return Ok(None) };
            if Self::named(name)?.uid == geteuid().as_raw() {
                return Ok(None);
            }
            return Err(Error::usage(format!(
                "only root can give the files to another user: {name}"
            ))
            .hint("run as root, or as that user without --owner"));
        }
        let owner = match name {
            Some(name) => Self::named(name)?,
            None => Self::of_folder(target)?,
        };
        if owner.uid == 0 {
            return Err(Error::usage(format!(
                "the files would belong to root, as whom PostgreSQL refuses to run: {}",
                target.display()
            ))
            .hint("name the user that will run the server, as in --owner postgres"));
        }
        Ok(Some(owner))
    }

    /// The owner of the directory, where it is there and not root's, else of the nearest folder
    /// above.
    fn of_folder(target: &Path) -> Result<Self> {
        let found = target.ancestors().enumerate().find_map(|(at, path)| {
            let metadata = fs::metadata(path).ok()?;
            (at > 0 || metadata.uid() != 0).then(|| Self {
                uid: metadata.uid(),
                gid: metadata.gid(),
            })
        });
        found.ok_or_else(|| Error::failure(format!("no folder above {}", target.display())))
    }

    /// A user of this machine, asked for with `id`, which knows every source of users.
    fn named(name: &str) -> Result<Self> {
        let ask = |flag: &str| {
            let output = Command::new("id")
                .arg(flag)
                .arg("--")
                .arg(name)
                .output()
                .ok()?;
            let text = String::from_utf8(output.stdout).ok()?;
            text.trim().parse::<u32>().ok()
        };
        match (ask("-u"), ask("-g")) {
            (Some(uid), Some(gid)) => Ok(Self { uid, gid }),
            _ => Err(Error::usage(format!("there is no such user: {name:?}"))),
        }
    }
}

/// Refuses a directory to restore into that is not absent or empty.
pub(super) fn check_target(path: &Path) -> Result<()> {
    if let Some(pid) = running_server(path) {
        return Err(Error::usage(format!(
            "a running server holds {}: pid={pid}",
            path.display()
        ))
        .hint("restore into another directory, or stop that server and move its directory away"));
    }
    if is_absent_or_empty(path)? {
        return Ok(());
    }
    let what = if path.join(MARKER).exists() {
        "holds a restore that did not come to its end, or is still under way"
    } else if path.join("PG_VERSION").exists() {
        "holds a PostgreSQL cluster already"
    } else {
        "is not an empty directory"
    };
    Err(Error::usage(format!("{} {what}", path.display()))
        .hint("restore into a directory that is empty or not there"))
}

/// The server whose lock file names a process that lives.
fn running_server(data: &Path) -> Option<i32> {
    let text = fs::read_to_string(data.join("postmaster.pid")).ok()?;
    let number: i32 = text.lines().next()?.trim().parse().ok()?;
    let pid = Pid::from_raw(number)?;
    match test_kill_process(pid) {
        Err(rustix::io::Errno::SRCH) => None,
        _ => Some(number),
    }
}

fn is_absent_or_empty(path: &Path) -> Result<bool> {
    match fs::read_dir(path) {
        Ok(mut entries) => Ok(entries.next().is_none()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(true),
        Err(error) if error.kind() == std::io::ErrorKind::NotADirectory => Ok(false),
        Err(error) => Err(io("read", path, &error)),
    }
}

/// Where a tablespace of the backup goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TablespacePlan {
    /// Its OID.
    pub oid: u32,
    /// Where the server kept it.
    pub from: String,
    /// Where its files go; `None` for one inside of the data directory.
    pub to: Option<PathBuf>,
}

/// Decides where every tablespace goes; only to places that are absent or empty.
pub(super) fn plan_tablespaces(
    records: &[TablespaceRecord],
    mappings: &[TablespaceMapping],
    target: &Path,
) -> Result<Vec<TablespacePlan>> {
    if let Some(stray) = mappings
        .iter()
        .find(|mapping| !records.iter().any(|it| mapping.names(it.oid, &it.location)))
    {
        let known: Vec<String> = records
            .iter()
            .map(|it| format!("{}={}", it.oid, it.location))
            .collect();
        let known = if known.is_empty() {
            "none".to_owned()
        } else {
            known.join(", ")
        };
        return Err(
            Error::usage(format!("the backup has no such tablespace: {stray}"))
                .hint(format!("its tablespaces: {known}")),
        );
    }
    let mut plans: Vec<TablespacePlan> = Vec::new();
    for record in records {
        let mapping = mappings
            .iter()
            .find(|it| it.names(record.oid, &record.location));
        let to = match mapping {
            Some(mapping) => Some(mapping.to.clone()),
            None => Some(PathBuf::from(&record.location)).filter(|path| path.is_absolute()),
        };
        if let Some(to) = &to {
            check_tablespace(record, to, mapping.is_some())?;
            let nested =
                |one: &Path, other: &Path| one.starts_with(other) || other.starts_with(one);
            let taken = plans.iter().filter_map(|plan| plan.to.as_deref());
            if let Some(other) = taken.chain([target]).find(|other| nested(other, to)) {
                return Err(Error::usage(format!(
                    "tablespace {} would share its place: {} and {}",
                    record.oid,
                    to.display(),
                    other.display()
                )));
            }
        }
        plans.push(TablespacePlan {
            oid: record.oid,
            from: record.location.clone(),
            to,
        });
    }
    Ok(plans)
}

fn check_tablespace(record: &TablespaceRecord, to: &Path, is_mapped: bool) -> Result<()> {
    if is_absent_or_empty(to)? {
        return Ok(());
    }
    let (oid, place) = (record.oid, to.display());
    Err(Error::usage(format!(
        "the place of tablespace {oid} is not empty: {place}"
    ))
    .hint(if is_mapped {
        "map it to a directory that is empty or not there".to_owned()
    } else {
        format!("a live server may use it; map it elsewhere with -T {oid}=/another/directory")
    }))
}

/// Refuses a place that replaying CREATE TABLESPACE would link to while something is there.
pub(super) fn check_made_later(oid: u32, place: &Path) -> Result<()> {
    if is_absent_or_empty(place)? {
        return Ok(());
    }
    Err(Error::usage(format!(
        "replay makes tablespace {oid} after the backup began, at a place of this machine that is not \
         empty: {}",
        place.display()
    ))
    .hint(
        "a live server may use it, and -T cannot move it; restore on another machine, from a later \
         backup, or to a target before the tablespace was made",
    ))
}

/// What a restore has made, and takes away again unless it is kept.
#[derive(Debug)]
pub(super) struct Footprint {
    target: PathBuf,
    owner: Option<Owner>,
    /// Directories to empty, outermost first; `true` for those that were not there before.
    roots: Vec<(PathBuf, bool)>,
    /// Folders above them that were not there before.
    parents: Vec<PathBuf>,
    keep: bool,
    /// Set once writers must stop.
    given_up: Arc<AtomicBool>,
}

impl Footprint {
    /// Takes the directory for this restore.
    pub(super) fn begin(target: &Path, owner: Option<Owner>) -> Result<Self> {
        check_target(target)?;
        let mut footprint = Self {
            target: target.to_owned(),
            owner,
            roots: Vec::new(),
            parents: Vec::new(),
            keep: false,
            given_up: Arc::default(),
        };
        footprint.make_root(target)?;
        let marker = footprint.marker();
        fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(&marker)
            .map_err(|error| io("create", &marker, &error))?;
        Ok(footprint)
    }

    /// Makes a directory that was found absent or empty, or takes it over.
    pub(super) fn make_root(&mut self, path: &Path) -> Result<()> {
        let is_new = !path.exists();
        if is_new {
            for missing in missing_parents(path) {
                self.make_parent(&missing)?;
            }
            make_dir(path)?;
        } else if !is_absent_or_empty(path)? {
            return Err(Error::usage(format!(
                "{} is not empty any more",
                path.display()
            )));
        }
        self.roots.push((path.to_owned(), is_new));
        fs::set_permissions(path, fs::Permissions::from_mode(0o700))
            .map_err(|error| io("set the mode of", path, &error))?;
        self.give(path)
    }

    fn make_parent(&mut self, path: &Path) -> Result<()> {
        make_dir(path)?;
        self.parents.push(path.to_owned());
        self.give(path)
    }

    /// Makes a directory below one of the roots; one that is there already is left.
    pub(super) fn make_dir(&self, path: &Path) -> Result<()> {
        if path.is_dir() {
            return Ok(());
        }
        make_dir(path)?;
        self.give(path)
    }

    /// Makes a symbolic link below one of the roots.
    pub(super) fn make_link(&self, path: &Path, to: &Path) -> Result<()> {
        symlink(to, path).map_err(|error| io("create", path, &error))?;
        if let Some(owner) = self.owner {
            lchown(path, Some(owner.uid), Some(owner.gid))
                .map_err(|error| io("change the owner of", path, &error))?;
        }
        Ok(())
    }

    /// Gives a file or directory to the owner.
    pub(super) fn give(&self, path: &Path) -> Result<()> {
        give(path, self.owner)
    }

    /// Set once the restore was given up: writers stop.
    pub(super) fn given_up(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.given_up)
    }

    pub(super) fn owner(&self) -> Option<Owner> {
        self.owner
    }

    /// The directories that were written to.
    pub(super) fn roots(&self) -> impl Iterator<Item = &Path> {
        self.roots.iter().map(|(path, _)| path.as_path())
    }

    /// Every folder in which a name was made that must survive a crash.
    pub(super) fn named_in(&self) -> impl Iterator<Item = &Path> {
        let roots = self
            .roots
            .iter()
            .filter(|(_, is_new)| *is_new)
            .map(|(path, _)| path);
        roots.chain(&self.parents).filter_map(|path| path.parent())
    }

    /// The restore is whole, up to its marker.
    pub(super) fn remove_marker(&self) -> Result<()> {
        let marker = self.marker();
        fs::remove_file(&marker).map_err(|error| io("remove", &marker, &error))
    }

    /// Nothing is taken away.
    pub(super) fn keep(&mut self) {
        self.keep = true;
    }

    fn marker(&self) -> PathBuf {
        self.target.join(MARKER)
    }
}

impl Drop for Footprint {
    fn drop(&mut self) {
        if self.keep {
            return;
        }
        self.given_up.store(true, Ordering::SeqCst);
        // links first: what they point to is emptied as a root of its own
        for (root, is_new) in self.roots.iter().rev() {
            // a writer that had begun before it was told to stop may make one more file
            let emptied = (0..5).any(|_| empty(root).is_ok());
            let removed = emptied && (!is_new || fs::remove_dir(root).is_ok());
            if !removed {
                tracing::warn!(
                    "what the unfinished restore left could not be removed: {}",
                    root.display()
                );
            }
        }
        for parent in self.parents.iter().rev() {
            if let Err(error) = fs::remove_dir(parent) {
                tracing::debug!("{} stays: {error}", parent.display());
            }
        }
    }
}

fn empty(root: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(root)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            fs::remove_dir_all(entry.path())?;
        } else {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Gives a file or directory to the owner, where one is set.
pub(super) fn give(path: &Path, owner: Option<Owner>) -> Result<()> {
    let Some(owner) = owner else { return Ok(()) };
    chown(path, Some(owner.uid), Some(owner.gid))
        .map_err(|error| io("change the owner of", path, &error))
}

fn make_dir(path: &Path) -> Result<()> {
    DirBuilder::new()
        .mode(0o700)
        .create(path)
        .map_err(|error| io("create", path, &error))
}

/// The folders above `path` that are not there, outermost first.
fn missing_parents(path: &Path) -> Vec<PathBuf> {
    let above = path.ancestors().skip(1);
    let mut missing: Vec<PathBuf> = above
        .take_while(|folder| !folder.as_os_str().as_bytes().is_empty() && !folder.exists())
        .map(Path::to_owned)
        .collect();
    missing.reverse();
    missing
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(oid: u32, location: &Path) -> TablespaceRecord {
        TablespaceRecord {
            oid,
            location: location.to_str().unwrap().to_owned(),
        }
    }

    /// The directory may hold the only copy of somebody's data.
    #[test]
    fn a_directory_that_is_not_empty_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        check_target(folder.path()).unwrap();
        check_target(&folder.path().join("a/b")).unwrap();
        fs::write(folder.path().join("photo"), "x").unwrap();
        let error = check_target(folder.path()).unwrap_err();
        assert!(
            error.message().contains(folder.path().to_str().unwrap()),
            "{error}"
        );
        check_target(&folder.path().join("photo")).unwrap_err();
    }

    #[test]
    fn a_directory_of_a_running_server_is_named_as_such() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(
            folder.path().join("postmaster.pid"),
            format!("{}\n/x\n", std::process::id()),
        )
        .unwrap();
        let error = check_target(folder.path()).unwrap_err();
        assert!(error.message().contains("running server"), "{error}");
    }

    #[test]
    fn what_failed_leaves_nothing_and_takes_nothing_along() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("new/data");
        let space = folder.path().join("space");
        fs::create_dir(&space).unwrap();
        let mut footprint = Footprint::begin(&target, None).unwrap();
        footprint.make_root(&space).unwrap();
        footprint.make_dir(&target.join("base")).unwrap();
        fs::write(target.join("base/1"), "x").unwrap();
        fs::write(space.join("1"), "x").unwrap();
        footprint.make_link(&target.join("link"), &space).unwrap();
        assert!(
            check_target(&target)
                .unwrap_err()
                .message()
                .contains("under way")
        );
        drop(footprint);
        assert!(!folder.path().join("new").exists());
        assert!(space.exists() && is_absent_or_empty(&space).unwrap());
    }

    #[test]
    fn tablespaces_go_only_to_places_that_are_free() {
        let folder = tempfile::tempdir().unwrap();
        let (live, free) = (folder.path().join("live"), folder.path().join("free"));
        fs::create_dir(&live).unwrap();
        fs::write(live.join("file"), "x").unwrap();
        let target = folder.path().join("data");
        let records = [record(7, &live)];
        let plan = |mappings: &[String]| {
            let mappings: Vec<_> = mappings.iter().map(|text| text.parse().unwrap()).collect();
            plan_tablespaces(&records, &mappings, &target)
        };
        let refused = plan(&[]).unwrap_err();
        assert!(
            refused.message().contains(live.to_str().unwrap()),
            "{refused}"
        );
        assert!(refused.hint_text().unwrap().contains("-T 7="), "{refused}");
        let moved = plan(&[format!("7={}", free.display())]).unwrap();
        assert_eq!(moved[0].to.as_deref(), Some(free.as_path()));
        let stray = plan(&[format!("8={}", free.display())]).unwrap_err();
        assert!(stray.hint_text().unwrap().contains("7="), "{stray}");
        let inside = format!("7={}", target.join("x").display());
        plan(&[inside]).unwrap_err();
    }

    #[test]
    fn a_tablespace_inside_of_the_data_directory_needs_no_place() {
        let records = [TablespaceRecord {
            oid: 7,
            location: "pg_tblspc/7".to_owned(),
        }];
        let plans = plan_tablespaces(&records, &[], Path::new("/data")).unwrap();
        assert_eq!(plans[0].to, None);
    }
}
