//! The places that a restore writes to: checked before a byte is written, and left as they were
//! found if it fails.

mod root;

use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::io::Write as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::process::{Pid, geteuid, test_kill_process};

use root::{Made, MayBe};
pub(super) use root::{Root, Roots, Stays};

use super::target::TablespaceMapping;
use crate::error::{Error, Result, io};
use crate::repository::records::TablespaceRecord;

/// Stands in a directory while it is being restored, so that no second restore writes there, and so
/// that what a killed one left says what it is.
const MARKER: &str = "anywhen-restore-unfinished";
/// Without it no server starts in a directory.
pub(super) const CONTROL_FILE: &str = "global/pg_control";

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
    /// folder, or whom a restore that is resumed was for; never root, as whom PostgreSQL refuses to run.
    pub(super) fn of_restore(
        name: Option<&str>,
        target: &Path,
        resumes: bool,
    ) -> Result<Option<Self>> {
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
            None => match Unfinished::read(target)? {
                Some(Unfinished {
                    owner: Some(owner), ..
                }) if resumes => owner,
                _ => Self::of_folder(target)?,
            },
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
            let uid = metadata.uid();
            // the folder may belong to a group of which the user is no member
            (at > 0 || uid != 0).then(|| Self {
                uid,
                gid: id_of("-g", &uid.to_string()).unwrap_or_else(|| metadata.gid()),
            })
        });
        found.ok_or_else(|| Error::failure(format!("no folder above {}", target.display())))
    }

    /// A user of this machine, asked for with `id`, which knows every source of users.
    fn named(name: &str) -> Result<Self> {
        match (id_of("-u", name), id_of("-g", name)) {
            (Some(uid), Some(gid)) => Ok(Self { uid, gid }),
            _ => Err(Error::usage(format!("there is no such user: {name:?}"))),
        }
    }
}

/// The number of a user (`-u`) or of its own group (`-g`), by the user's name or number.
fn id_of(flag: &str, user: &str) -> Option<u32> {
    let mut id = Command::new("id");
    let output = id.arg(flag).arg("--").arg(user).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    text.trim().parse().ok()
}

/// Refuses a directory to restore into that is not absent or empty; or, where a restore of the cluster with this
/// system identifier is `resumed`, does not hold one that was broken off.
pub(super) fn check_target(path: &Path, resumed: Option<u64>) -> Result<()> {
    if let Some(pid) = running_server(path) {
        return Err(Error::usage(format!(
            "a running server holds {}: pid={pid}",
            path.display()
        ))
        .hint("restore into another directory, or stop that server and move its directory away"));
    }
    if let Some(system_id) = resumed {
        return check_unfinished(path, system_id);
    }
    if is_absent_or_empty(path)? {
        return Ok(());
    }
    let refused = |what| Error::usage(format!("{} {what}", path.display()));
    let elsewhere = "restore into a directory that is empty or not there";
    if path.join(MARKER).exists() {
        let what = "holds a restore that did not come to its end, or is still under way";
        let hint = format!("{elsewhere}; or go on with that one, with --resume");
        return Err(refused(what).hint(hint));
    }
    let what = if path.join("PG_VERSION").exists() {
        "holds a PostgreSQL cluster already"
    } else {
        "is not an empty directory"
    };
    Err(refused(what).hint(elsewhere))
}

/// Refuses what is not a restore of this cluster that was broken off before it could be started.
fn check_unfinished(path: &Path, system_id: u64) -> Result<()> {
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
            "all files of the restore into {shown} were there when it was broken off"
        ))
        .hint("remove that directory, and restore again"));
    }
    Ok(())
}

/// What the marker of a restore says.
struct Unfinished {
    system_id: u64,
    /// Whom its files are for.
    owner: Option<Owner>,
}

impl Unfinished {
    /// `None` where there is none, or one that says nothing.
    fn read(target: &Path) -> Result<Option<Self>> {
        let path = target.join(MARKER);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(io("read", &path, &error)),
        };
        let mut words = text.split_whitespace();
        let system_id = words.next().and_then(|word| word.parse().ok());
        let mut id = || words.next()?.parse().ok();
        let owner = match (id(), id()) {
            (Some(uid), Some(gid)) => Some(Owner { uid, gid }),
            _ => None,
        };
        Ok(system_id.map(|system_id| Self { system_id, owner }))
    }

    fn text(&self) -> String {
        let owner = self
            .owner
            .map(|owner| format!(" {} {}", owner.uid, owner.gid));
        format!("{}{}\n", self.system_id, owner.unwrap_or_default())
    }
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
    resumes: bool,
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
        let mut naming = mappings
            .iter()
            .filter(|it| it.names(record.oid, &record.location));
        let mapping = naming.next();
        if let (Some(first), Some(other)) = (
            mapping,
            naming.find(|it| Some(&it.to) != mapping.map(|it| &it.to)),
        ) {
            return Err(Error::usage(format!(
                "tablespace {} is given two places: {first} and {other}",
                record.oid
            )));
        }
        let to = match mapping {
            Some(mapping) => Some(mapping.to.clone()),
            None => Some(PathBuf::from(&record.location)).filter(|path| path.is_absolute()),
        };
        if let Some(to) = &to {
            let is_own = resumes && is_own_tablespace(target, record.oid, to);
            if !is_own {
                check_tablespace(record, to, mapping.is_some())?;
            }
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

/// Whether the restore that was broken off has taken this place.
fn is_own_tablespace(target: &Path, oid: u32, place: &Path) -> bool {
    let link = fs::read_link(target.join(format!("pg_tblspc/{oid}")));
    link.is_ok_and(|to| to == place)
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

/// Refuses a place that replaying CREATE TABLESPACE would link to while anything is there: also an
/// empty directory may be a live server's.
pub(super) fn check_made_later(oid: u32, place: &Path) -> Result<()> {
    match fs::symlink_metadata(place) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(io("read", place, &error)),
        Ok(_) => {}
    }
    Err(Error::usage(format!(
        "replay makes tablespace {oid} after the backup began, at a place that exists on this \
         machine: {}",
        place.display()
    ))
    .hint(
        "a live server may use it, and -T cannot move it; restore on another machine, from a later \
         backup, or to a target before the tablespace was made",
    ))
}

/// What a restore has made, and takes away again unless it is kept.
///
/// As root, everything stays root's and closed until [`Self::hand_over`].
#[derive(Debug)]
pub(super) struct Footprint {
    owner: Option<Owner>,
    roots: Roots,
    /// Directories to empty, outermost first.
    all: Vec<Arc<Root>>,
    /// Folders above them that were not there before.
    parents: Vec<Made>,
    keep: bool,
    /// Whether the places may hold what is right already, of a restore that was broken off.
    resumes: bool,
    /// Of the cluster that is restored.
    system_id: u64,
    /// Locked: nobody else restores here.
    marker: Option<File>,
    /// The permissions of the server's directories.
    mode: u32,
    /// Set once writers must stop.
    given_up: Arc<AtomicBool>,
}

impl Footprint {
    /// Takes the directory for this restore, or with what is in it where it `resumes` one.
    pub(super) fn begin(
        target: &Path,
        owner: Option<Owner>,
        system_id: u64,
        resumes: bool,
    ) -> Result<Self> {
        check_target(target, resumes.then_some(system_id))?;
        let may_be = if resumes { MayBe::Filled } else { MayBe::Empty };
        let mut parents = Vec::new();
        let root = Root::take(target, owner, may_be, &mut parents).inspect_err(|_| {
            parents.iter().rev().for_each(Made::remove);
        })?;
        let root = Arc::new(root);
        let mut footprint = Self {
            owner,
            roots: Roots::new(Arc::clone(&root)),
            all: vec![Arc::clone(&root)],
            parents,
            // until it is known to be ours
            keep: resumes,
            resumes,
            system_id,
            marker: None,
            mode: 0o700,
            given_up: Arc::default(),
        };
        footprint.mark()?;
        if resumes {
            // once nobody else is at it
            check_target(target, Some(system_id))?;
            footprint.keep = false;
            root.seize()?;
        }
        Ok(footprint)
    }

    fn mark(&mut self) -> Result<()> {
        let (target, path) = (self.target(), Path::new(MARKER));
        let failed = |doing, error| io(doing, &target.path().join(path), &error);
        let marker = if self.resumes {
            // what it says holds on
            let found = target.open(path)?;
            found.ok_or_else(|| failed("open", std::io::ErrorKind::NotFound.into()))?
        } else {
            let mut made = target.create(path)?;
            let unfinished = Unfinished {
                system_id: self.system_id,
                owner: self.owner,
            };
            let written = made.write_all(unfinished.text().as_bytes());
            written.map_err(|error| failed("write", error))?;
            made
        };
        match marker.try_lock() {
            Ok(()) => {}
            Err(TryLockError::Error(error)) if self.resumes => return Err(failed("lock", error)),
            // a file system without locks
            Err(TryLockError::Error(error)) => tracing::debug!("no lock on {MARKER}: {error}"),
            Err(TryLockError::WouldBlock) => {
                return Err(Error::usage(format!(
                    "another restore into {} is under way",
                    target.path().display()
                )));
            }
        }
        self.marker = Some(marker);
        Ok(())
    }

    /// Whether the places may hold what is right already.
    pub(super) fn resumes(&self) -> bool {
        self.resumes
    }

    /// Removes what the backup does not have, once all tablespaces are made; how much that was.
    pub(super) fn sweep(&self, stays: &dyn Fn(&Path) -> Option<Stays>) -> Result<u64> {
        let of_target = |path: &Path| match path.to_str() {
            Some(MARKER) => Some(Stays::Whatever),
            Some("pg_wal" | "pg_wal/archive_status" | "pg_tblspc") => Some(Stays::Directory),
            _ if self.roots.is_tablespace(path) => Some(Stays::Whatever),
            _ => stays(path),
        };
        let mut removed = self.target().sweep(Path::new(""), &of_target)?;
        for (oid, root) in self.roots.tablespaces() {
            let prefix = PathBuf::from(format!("pg_tblspc/{oid}"));
            // clusters of other versions may have theirs beside ours
            let of_tablespace = |path: &Path| {
                let is_beside = path.parent() == Some(prefix.as_path());
                stays(path).or_else(|| is_beside.then_some(Stays::Whatever))
            };
            removed = removed.saturating_add(root.sweep(&prefix, &of_tablespace)?);
        }
        Ok(removed)
    }

    /// Makes the place of a tablespace of the backup, or takes over an empty one.
    pub(super) fn make_tablespace(&mut self, oid: u32, path: &Path) -> Result<()> {
        let link = PathBuf::from(format!("pg_tblspc/{oid}"));
        let is_own = self.resumes && self.target().link_at(&link).is_some_and(|to| to == path);
        let may_be = if is_own { MayBe::Filled } else { MayBe::Empty };
        let root = self.make_root(path, may_be)?;
        if is_own {
            root.seize()?;
        }
        self.roots.add_tablespace(oid, root);
        Ok(())
    }

    /// Makes the place of a tablespace that replay makes.
    pub(super) fn make_place(&mut self, path: &Path) -> Result<()> {
        self.make_root(path, MayBe::Absent).map(drop)
    }

    fn make_root(&mut self, path: &Path, may_be: MayBe) -> Result<Arc<Root>> {
        let root = Root::take(path, self.owner, may_be, &mut self.parents)?;
        let root = Arc::new(root);
        self.all.push(Arc::clone(&root));
        Ok(root)
    }

    /// Makes a directory, by its path in the backup; one that is there already is left.
    pub(super) fn make_dir(&self, path: &Path) -> Result<()> {
        let (root, below) = self.roots.find(path);
        root.make_dir(below)
    }

    /// As [`Self::make_dir`], with the permissions that the server gave it.
    pub(super) fn make_dir_with_mode(&self, path: &Path, mode: u32) -> Result<()> {
        let (root, below) = self.roots.find(path);
        root.make_dir_with_mode(below, mode)
    }

    /// The server's data directory has the permissions of what is in it: it lets its group read, or not.
    /// A server refuses anything else.
    pub(super) fn set_mode(&mut self, of_a_directory: u32) {
        self.mode = 0o700 | (of_a_directory & 0o050);
    }

    /// The permissions of a file that the server writes.
    pub(super) fn file_mode(&self) -> u32 {
        self.mode & 0o660
    }

    /// Makes a symbolic link, by its path in the backup.
    pub(super) fn make_link(&self, path: &Path, to: &Path) -> Result<()> {
        let target = self.target();
        if self.resumes {
            match target.link_at(path) {
                Some(known) if known == to => return Ok(()),
                _ => target.remove(path).map(drop)?,
            }
        }
        target.make_link(path, to)
    }

    /// Set once the restore was given up: writers stop.
    pub(super) fn given_up(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.given_up)
    }

    pub(super) fn owner(&self) -> Option<Owner> {
        self.owner
    }

    /// The data directory.
    pub(super) fn target(&self) -> &Root {
        self.roots.target()
    }

    /// Where the backup's files go, once all tablespaces are made.
    pub(super) fn roots(&self) -> &Roots {
        &self.roots
    }

    /// Lets the owner into the data directory, with all that is in it by now.
    pub(super) fn lend(&self) -> Result<()> {
        self.target().lend()?;
        // nothing is looked up through them again
        let mut parents = self.parents.iter();
        parents.try_for_each(|made| made.hand_over(self.owner))
    }

    /// Closes the data directory again, and empties it of what the owner may have put there.
    pub(super) fn take_back(&mut self) -> Result<()> {
        let target = self.target();
        let emptied = target.close().and_then(|()| target.empty());
        emptied.map_err(|error| io("empty", target.path(), &error))?;
        self.mark()
    }

    /// Gives all that was written to the owner, who cannot reach it yet.
    pub(super) fn give_contents(&self) -> Result<()> {
        self.all.iter().try_for_each(|root| root.give_contents())
    }

    /// A directory of each file system that was written to.
    pub(super) fn file_systems(&self) -> Result<Vec<PathBuf>> {
        let mut devices = BTreeMap::new();
        for root in &self.all {
            root.check_name()?;
            devices.insert(root.device()?, root.path().to_owned());
        }
        Ok(devices.into_values().collect())
    }

    /// The restore is whole: takes the marker away, lets the owner in, and syncs every name.
    pub(super) fn hand_over(&self) -> Result<()> {
        self.target().remove(Path::new(MARKER))?;
        // the data directory last: without it the rest is of no use
        self.all
            .iter()
            .rev()
            .try_for_each(|root| root.hand_over(self.mode))?;
        let mut parents = self.parents.iter();
        parents.try_for_each(|made| made.hand_over(self.owner))
    }

    /// Nothing is taken away.
    pub(super) fn keep(&mut self) {
        self.keep = true;
    }
}

impl Drop for Footprint {
    fn drop(&mut self) {
        if self.keep {
            return;
        }
        self.given_up.store(true, Ordering::SeqCst);
        if self.resumes {
            tracing::warn!(
                "{} is left unfinished, and no server starts there: the same command goes on",
                self.target().path().display()
            );
            return;
        }
        for root in self.all.iter().rev() {
            // a writer that had begun before it was told to stop may make one more file
            let closed = root.close();
            let emptied = closed.is_ok() && (0..5).any(|_| root.empty().is_ok());
            if emptied {
                root.give_back();
            } else {
                tracing::warn!(
                    "what the unfinished restore left could not be removed: {}",
                    root.path().display()
                );
            }
        }
        self.parents.iter().rev().for_each(Made::remove);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

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
        check_target(folder.path(), None).unwrap();
        check_target(&folder.path().join("a/b"), None).unwrap();
        fs::write(folder.path().join("photo"), "x").unwrap();
        let error = check_target(folder.path(), None).unwrap_err();
        assert!(
            error.message().contains(folder.path().to_str().unwrap()),
            "{error}"
        );
        check_target(&folder.path().join("photo"), None).unwrap_err();
    }

    /// A server that is started in the folder's group could not read what its user's own group may.
    #[test]
    fn a_restore_as_root_belongs_to_the_users_own_group() {
        let folder = tempfile::tempdir().unwrap();
        let uid = fs::metadata(folder.path()).unwrap().uid();
        let own = id_of("-g", &uid.to_string()).unwrap();
        if geteuid().is_root() {
            std::os::unix::fs::chown(folder.path(), None, Some(own + 1)).unwrap();
        }
        let owner = Owner::of_folder(&folder.path().join("restored")).unwrap();
        assert_eq!((owner.uid, owner.gid), (uid, own));
    }

    #[test]
    fn a_directory_of_a_running_server_is_named_as_such() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(
            folder.path().join("postmaster.pid"),
            format!("{}\n/x\n", std::process::id()),
        )
        .unwrap();
        let error = check_target(folder.path(), None).unwrap_err();
        assert!(error.message().contains("running server"), "{error}");
    }

    #[test]
    fn what_failed_leaves_nothing_and_takes_nothing_along() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("new/data");
        let space = folder.path().join("space");
        fs::create_dir(&space).unwrap();
        let mut footprint = Footprint::begin(&target, None, 7, false).unwrap();
        footprint.make_tablespace(7, &space).unwrap();
        footprint.make_dir(Path::new("base")).unwrap();
        footprint.make_dir(Path::new("pg_tblspc")).unwrap();
        footprint.make_dir(Path::new("pg_tblspc/7/PG_18")).unwrap();
        fs::write(target.join("base/1"), "x").unwrap();
        fs::write(space.join("1"), "x").unwrap();
        footprint.make_link(Path::new("link"), &space).unwrap();
        assert!(space.join("PG_18").is_dir());
        assert!(
            check_target(&target, None)
                .unwrap_err()
                .message()
                .contains("under way")
        );
        drop(footprint);
        assert!(!folder.path().join("new").exists());
        assert!(space.exists() && is_absent_or_empty(&space).unwrap());
    }

    /// Who holds the folder above could otherwise lead root's writes to any place.
    #[test]
    fn writes_stay_in_the_directory_that_was_taken_whatever_its_name_leads_to() {
        let folder = tempfile::tempdir().unwrap();
        let [target, space, moved, live] =
            ["data", "space", "moved", "live"].map(|name| folder.path().join(name));
        fs::create_dir(&live).unwrap();
        fs::write(live.join("precious"), "x").unwrap();
        let mut footprint = Footprint::begin(&target, None, 7, false).unwrap();
        footprint.make_dir(Path::new("pg_tblspc")).unwrap();
        footprint.make_tablespace(7, &space).unwrap();
        fs::remove_dir(&space).unwrap();
        std::os::unix::fs::symlink(&live, &space).unwrap();
        footprint
            .make_dir(Path::new("pg_tblspc/7/PG_18"))
            .unwrap_err();
        let status = Command::new("mv").args([&target, &moved]).status().unwrap();
        assert!(status.success());
        std::os::unix::fs::symlink(&live, &target).unwrap();
        footprint.make_dir(Path::new("base")).unwrap();
        assert!(moved.join("base").is_dir());
        let error = footprint.hand_over().unwrap_err();
        assert!(error.message().contains("replaced"), "{error}");
        drop(footprint);
        assert_eq!(fs::read_dir(&live).unwrap().count(), 1);
        assert!(is_absent_or_empty(&moved).unwrap());
    }

    #[test]
    fn a_directory_that_was_there_gets_its_mode_back() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("data");
        let mode = || fs::metadata(&target).unwrap().permissions().mode() & 0o7777;
        fs::create_dir(&target).unwrap();
        fs::set_permissions(&target, fs::Permissions::from_mode(0o2750)).unwrap();
        let footprint = Footprint::begin(&target, None, 7, false).unwrap();
        assert_eq!(mode(), 0o700);
        drop(footprint);
        assert_eq!(mode(), 0o2750);
    }

    /// What `restore_command` leaves behind in its trial would be in the way of the backup's files.
    #[test]
    fn a_lent_directory_comes_back_empty_but_for_its_marker() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("data");
        let mut footprint = Footprint::begin(&target, None, 7, false).unwrap();
        footprint.make_dir(Path::new("pg_wal")).unwrap();
        footprint.lend().unwrap();
        fs::write(target.join("pg_wal/left"), "x").unwrap();
        footprint.take_back().unwrap();
        let mut names = fs::read_dir(&target).unwrap();
        assert_eq!(names.next().unwrap().unwrap().file_name(), MARKER);
        assert!(names.next().is_none());
    }

    /// Replay links to it and fills it, and a live server may have made it for itself.
    #[test]
    fn a_place_that_replay_will_fill_must_not_be_there_at_all() {
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path().join("space");
        check_made_later(7, &place).unwrap();
        fs::create_dir(&place).unwrap();
        check_made_later(7, &place).unwrap_err();
        let link = folder.path().join("link");
        std::os::unix::fs::symlink("/nowhere", &link).unwrap();
        check_made_later(7, &link).unwrap_err();
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
            plan_tablespaces(&records, &mappings, &target, false)
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
        let plans = plan_tablespaces(&records, &[], Path::new("/data"), false).unwrap();
        assert_eq!(plans[0].to, None);
    }
}
