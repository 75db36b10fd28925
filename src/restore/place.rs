//! The places that a restore writes to: checked before a byte is written, and left as they were
//! found if it fails.

mod aside;
mod found;
mod marker;
mod root;
mod tablespaces;
mod tree;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::process::geteuid;

pub(super) use aside::plan_wal_place;
pub(super) use found::check_target;
pub use found::{Found, Over};
use found::{LOCK_FILE, check_no_server, check_still};
use marker::Marker;
pub(super) use marker::{MARKER, Unfinished};
use root::{Made, MayBe};
pub(super) use root::{Root, Roots, Stays};
pub use tablespaces::TablespacePlan;
pub(super) use tablespaces::{check_apart, check_folder, check_made_later, plan_tablespaces};
pub(super) use tree::check_tree;

use crate::durable;
use crate::error::{Error, Result, io};

/// Without it no server starts in a directory.
pub(super) const CONTROL_FILE: &str = "global/pg_control";
const GLOBAL_DIR: &str = "global";
/// What says to a server how to begin, or that it must not, and what a restore writes anew: never left of a
/// cluster, also not as links.
const NEVER_LEFT: [&str; 9] = [
    "backup_label",
    "fallback_promote",
    LOCK_FILE,
    "postgresql.auto.conf",
    "promote",
    "recovery.conf",
    "recovery.signal",
    "standby.signal",
    "tablespace_map",
];

/// What servers make in their data directories, and base backups leave out.
const MADE_BY_SERVERS: [&str; 4] = [
    "current_logfiles",
    "current_logfiles.tmp",
    "postgresql.auto.conf.tmp",
    "postmaster.opts",
];

/// Whether the directory of a cluster may be expected to have this at its top though no backup has it.
pub(super) fn is_expected(name: &Path) -> bool {
    let text = name.to_str().unwrap_or_default();
    let is_known = [
        MARKER,
        aside::WAL_DIR,
        "pg_tblspc",
        tablespaces::LOST_AND_FOUND,
    ]
    .contains(&text)
        || NEVER_LEFT.contains(&text)
        || MADE_BY_SERVERS.contains(&text);
    is_known || aside::LOG_DIRS.contains(&text) || aside::is_set_aside(name)
}

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
        found: Found,
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
                }) if found.is_filled() => owner,
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

/// In words, how a restore that was broken off left the directory.
pub(super) fn how_it_was_left(found: Found, path: &Path) -> &'static str {
    match found {
        Found::Nothing => "what was written is removed again; nothing is left to clean up",
        _ if !path.join(CONTROL_FILE).exists() => {
            "no server starts there; the same command goes on with what is there"
        }
        _ if path.join(MARKER).exists() => {
            "all files are there; the same command with --delta comes to the end"
        }
        _ => "nothing was changed: its server starts as before",
    }
}

/// Syncs the names in a directory.
fn sync(directory: &fs::File, below: &Path) -> Result<()> {
    durable::sync_file(directory).map_err(|error| io("sync what is in", below, &error))
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
    /// What was there; the places may hold what is right already.
    found: Found,
    /// Whether that is a cluster that can still be started.
    is_armed: bool,
    /// Of the cluster that is restored.
    system_id: u64,
    /// Nobody else restores here.
    marker: Option<Marker>,
    /// Whether another restore had left one in the cluster that is there.
    was_marked: bool,
    /// Where files from outside of the data directory go.
    outside: Option<Arc<Root>>,
    /// The permissions of the server's directories.
    mode: u32,
    /// Set once writers must stop.
    given_up: Arc<AtomicBool>,
}

impl Footprint {
    /// Takes the directory for this restore, with what was `found` in it; `follows` are the lines by which the
    /// server of a cluster that is there follows a primary.
    pub(super) fn begin(
        target: &Path,
        owner: Option<Owner>,
        system_id: u64,
        found: Found,
        follows: Option<&[u8]>,
    ) -> Result<Self> {
        check_still(target, found, system_id)?;
        if found == Found::Cluster {
            check_tree(target, owner.map(|owner| owner.uid))?;
        }
        let may_be = if found.is_filled() {
            MayBe::Filled
        } else {
            MayBe::Empty
        };
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
            keep: true,
            found,
            is_armed: found == Found::Cluster,
            system_id,
            marker: None,
            was_marked: false,
            outside: None,
            mode: 0o700,
            given_up: Arc::default(),
        };
        let marked = footprint.mark(follows);
        if let Err(error) = marked.and_then(|()| footprint.give_parents(0)) {
            footprint.give_back_if_empty();
            return Err(error);
        }
        if let Found::Unfinished { .. } = found {
            // once nobody else is at it
            check_still(target, found, system_id)?;
            // a kill may have come before that
            if let Ok(global) = root.open_dir(Path::new(GLOBAL_DIR)) {
                sync(&global, target)?;
            }
            root.seize()?;
        }
        footprint.keep = false;
        Ok(footprint)
    }

    /// Sees that no server starts any more from a cluster that is there. From here on it is gone, and an
    /// unfinished restore in its place.
    pub(super) fn disarm(&mut self) -> Result<()> {
        if !self.is_armed {
            return Ok(());
        }
        let target = Arc::clone(&self.roots.target);
        check_still(target.path(), self.found, self.system_id)?;
        target.check_name()?;
        let global = target.open_dir(Path::new(GLOBAL_DIR))?;
        let [control, before] = ["pg_control", "pg_control.before-restore"].map(Path::new);
        let failed = |error| io("remove", &target.path().join(CONTROL_FILE), &error);
        durable::rename_at(&global, control, &global, before).map_err(failed)?;
        self.is_armed = false;
        // a server makes its lock file before it reads pg_control (postmaster.c, PostmasterMain)
        if let Err(error) = check_no_server(target.path()) {
            durable::rename_at(&global, before, &global, control).map_err(failed)?;
            self.is_armed = true;
            return Err(error);
        }
        // before anything else is changed: after a power cut, too, nothing starts there
        sync(&global, target.path())?;
        let mut filled = self.all.iter().filter(|root| root.is_filled());
        filled.try_for_each(|root| root.seize())
    }

    fn mark(&mut self, follows: Option<&[u8]>) -> Result<()> {
        let target = Arc::clone(&self.roots.target);
        let left = if self.found.is_filled() {
            Marker::take(&target)?
        } else {
            None
        };
        if let Found::Unfinished { .. } = self.found {
            // what it says holds on
            let gone =
                || Error::usage(format!("{MARKER} is gone from {}", target.path().display()));
            self.marker = Some(left.ok_or_else(gone)?);
            return Ok(());
        }
        let over_cluster = self.found == Found::Cluster;
        let says = Unfinished {
            system_id: self.system_id,
            owner: self.owner,
            follows: over_cluster.then(|| follows.unwrap_or_default().to_vec()),
        };
        self.was_marked = left.is_some();
        self.marker = Some(Marker::make(
            &target,
            &says,
            left.as_ref(),
            self.found.is_filled(),
        )?);
        Ok(())
    }

    /// Somebody else may restore there by now.
    fn give_back_if_empty(&self) {
        let target = self.target();
        if target.is_empty() {
            target.give_back();
        }
        self.parents.iter().rev().for_each(Made::remove);
    }

    /// Whether the places may hold what is right already.
    pub(super) fn changes(&self) -> bool {
        self.found.is_filled()
    }

    /// Removes what the backup does not have, once all tablespaces are made; how much that was.
    pub(super) fn sweep(&self, stays: &dyn Fn(&Path) -> Option<Stays>) -> Result<u64> {
        let of_target = |path: &Path| match path.to_str() {
            Some(MARKER | tablespaces::LOST_AND_FOUND) => Some(Stays::Whatever),
            Some("pg_wal") if self.roots.wal().is_some() => Some(Stays::Whatever),
            Some("pg_wal" | "pg_wal/archive_status" | "pg_tblspc") => Some(Stays::Directory),
            _ if aside::is_set_aside(path) || self.is_link_of_a_tablespace(path) => {
                Some(Stays::Whatever)
            }
            _ => stays(path).or_else(|| {
                self.is_link_of_the_operator(path)
                    .then_some(Stays::Whatever)
            }),
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

    fn is_link_of_a_tablespace(&self, path: &Path) -> bool {
        self.roots.is_tablespace(path) && self.target().link_at(path).is_some()
    }

    /// A link in the data directory itself, such as to a configuration file: no base backup has those
    /// (`basebackup.c`, `sendDir`), and the server may need it.
    fn is_link_of_the_operator(&self, path: &Path) -> bool {
        let is_top = path.components().count() == 1;
        let is_signal = path.to_str().is_some_and(|name| NEVER_LEFT.contains(&name));
        is_top && !is_signal && self.target().link_at(path).is_some()
    }

    /// Makes the place of a tablespace of the backup, or takes over an empty one.
    pub(super) fn make_tablespace(&mut self, oid: u32, path: &Path) -> Result<()> {
        let link = PathBuf::from(format!("pg_tblspc/{oid}"));
        let is_linked = self.target().link_at(&link).is_some_and(|to| to == path);
        let is_own = self.found.is_filled() && is_linked;
        let may_be = if is_own { MayBe::Filled } else { MayBe::Empty };
        let root = self.make_root(path, may_be)?;
        self.roots.add_tablespace(oid, root);
        Ok(())
    }

    /// Sees that the place of a tablespace that replay makes can be made.
    pub(super) fn try_place(&self, path: &Path) -> Result<()> {
        let mut parents = Vec::new();
        let made = Root::take(path, self.owner, MayBe::Absent, &mut parents);
        let tried = made.map(|root| root.give_back());
        parents.iter().rev().for_each(Made::remove);
        tried
    }

    /// Makes the place of a tablespace that replay makes.
    pub(super) fn make_place(&mut self, path: &Path) -> Result<()> {
        self.make_root(path, MayBe::Absent).map(drop)
    }

    /// Makes the folder for files from outside of the data directory, or takes over an empty one.
    pub(super) fn make_outside(&mut self, path: &Path) -> Result<()> {
        self.outside = Some(self.make_root(path, MayBe::Empty)?);
        Ok(())
    }

    /// The folder for files from outside of the data directory.
    pub(super) fn outside(&self) -> Option<&Root> {
        self.outside.as_deref()
    }

    fn make_root(&mut self, path: &Path, may_be: MayBe) -> Result<Arc<Root>> {
        let before = self.parents.len();
        let root = Root::take(path, self.owner, may_be, &mut self.parents)?;
        let root = Arc::new(root);
        self.all.push(Arc::clone(&root));
        self.give_parents(before)?;
        if root.is_filled() && !self.is_armed {
            root.seize()?;
        }
        Ok(root)
    }

    /// Gives folders above the places to the owner, who must come by, from the one with this number on. At once:
    /// whoever goes on with a restore that was killed does not know that it made them.
    fn give_parents(&self, from: usize) -> Result<()> {
        let mut made = self.parents.iter().skip(from);
        made.try_for_each(|made| made.hand_over(self.owner))
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
        if self.found.is_filled() {
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
        self.target().lend()
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
        let marker = self.marker.as_ref();
        marker.map_or(Ok(()), |marker| marker.remove(self.target()))?;
        // the data directory last: without it the rest is of no use
        self.all
            .iter()
            .rev()
            .try_for_each(|root| root.hand_over(self.mode))
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
        if self.is_armed {
            // nothing is written yet
            self.all.iter().rev().for_each(|root| root.give_back());
            self.parents.iter().rev().for_each(Made::remove);
            // whose cluster it is may be told by that alone
            let marker = self.marker.as_ref().filter(|_| !self.was_marked);
            if let Some(Err(error)) = marker.map(|marker| marker.remove(self.target())) {
                tracing::warn!("{}", error.message());
            }
            return;
        }
        if self.found.is_filled() {
            if let Some(outside) = &self.outside
                && outside.empty().is_ok()
            {
                outside.give_back();
            }
            let path = self.target().path();
            tracing::warn!("{}: {}", path.display(), how_it_was_left(self.found, path));
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

    use super::found::is_absent_or_empty;
    use super::*;

    /// The directory may hold the only copy of somebody's data.
    #[test]
    fn a_directory_that_is_not_empty_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        check_target(folder.path(), Over::Nothing, 7).unwrap();
        check_target(&folder.path().join("a/b"), Over::Nothing, 7).unwrap();
        fs::write(folder.path().join("photo"), "x").unwrap();
        let error = check_target(folder.path(), Over::Nothing, 7).unwrap_err();
        assert!(
            error.message().contains(folder.path().to_str().unwrap()),
            "{error}"
        );
        check_target(&folder.path().join("photo"), Over::Nothing, 7).unwrap_err();
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
        let error = check_target(folder.path(), Over::Nothing, 7).unwrap_err();
        assert!(error.message().contains("running server"), "{error}");
    }

    #[test]
    fn what_failed_leaves_nothing_and_takes_nothing_along() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("new/data");
        let space = folder.path().join("space");
        fs::create_dir(&space).unwrap();
        let mut footprint = Footprint::begin(&target, None, 7, Found::Nothing, None).unwrap();
        footprint.make_tablespace(7, &space).unwrap();
        footprint.make_dir(Path::new("base")).unwrap();
        footprint.make_dir(Path::new("pg_tblspc")).unwrap();
        footprint.make_dir(Path::new("pg_tblspc/7/PG_18")).unwrap();
        fs::write(target.join("base/1"), "x").unwrap();
        fs::write(space.join("1"), "x").unwrap();
        footprint.make_link(Path::new("link"), &space).unwrap();
        assert!(space.join("PG_18").is_dir());
        assert!(
            check_target(&target, Over::Nothing, 7)
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
        let mut footprint = Footprint::begin(&target, None, 7, Found::Nothing, None).unwrap();
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

    /// Until it is known that a restore can go on to its end, a cluster that is there can be started again.
    #[test]
    fn a_cluster_stays_whole_until_it_is_disarmed() {
        let folder = tempfile::tempdir().unwrap();
        let [data, space] = ["data", "new/space"].map(|name| folder.path().join(name));
        fs::create_dir_all(data.join("global")).unwrap();
        fs::set_permissions(&data, fs::Permissions::from_mode(0o750)).unwrap();
        fs::write(data.join(CONTROL_FILE), "x").unwrap();
        // whose it is need not be told by pg_control then
        fs::write(data.join(MARKER), "7 over-cluster\n").unwrap();
        let begin = || {
            let mut begun =
                Footprint::begin(&data, None, 7, Found::Cluster, Some(b"a = 'b'\n")).unwrap();
            begun.make_tablespace(5, &space).unwrap();
            begun
        };
        let mut footprint = begin();
        let mode = || fs::metadata(&data).unwrap().permissions().mode() & 0o7777;
        assert!(space.is_dir() && data.join(CONTROL_FILE).exists());
        fs::write(data.join(LOCK_FILE), "2147483647\n").unwrap();
        let error = footprint.disarm().unwrap_err();
        assert!(error.message().contains(LOCK_FILE), "{error}");
        drop(footprint);
        // the marker alone says whose cluster this is
        assert!(data.join(CONTROL_FILE).exists() && data.join(MARKER).exists());
        assert!(!folder.path().join("new").exists());
        assert_eq!(mode(), 0o750);

        fs::remove_file(data.join(LOCK_FILE)).unwrap();
        let mut footprint = begin();
        footprint.disarm().unwrap();
        assert!(!data.join(CONTROL_FILE).exists());
        drop(footprint);
        let left = Unfinished::read(&data).unwrap().unwrap();
        assert_eq!(left.follows.as_deref(), Some(b"a = 'b'\n".as_slice()));
        let found = check_target(&data, Over::Cluster, 7).unwrap();
        assert_eq!(found, Found::Unfinished { over_cluster: true });
    }

    #[test]
    fn a_directory_that_was_there_gets_its_mode_back() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("data");
        let mode = || fs::metadata(&target).unwrap().permissions().mode() & 0o7777;
        fs::create_dir(&target).unwrap();
        fs::set_permissions(&target, fs::Permissions::from_mode(0o2750)).unwrap();
        let footprint = Footprint::begin(&target, None, 7, Found::Nothing, None).unwrap();
        assert_eq!(mode(), 0o700);
        drop(footprint);
        assert_eq!(mode(), 0o2750);
    }
}
