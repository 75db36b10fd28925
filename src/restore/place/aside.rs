//! What the directory of a cluster had that a restore must neither use nor destroy: its WAL, which may be all
//! that is left of the last transactions, and what its server said.

use std::ffi::{CString, OsStr, OsString};
use std::fmt;
use std::fs::{self, File};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Mode};
use rustix::io::Errno;
use wal::WalFileName;

use super::root::{names, open_dir};
use super::{Footprint, Root};
use crate::durable;
use crate::error::{Error, Result, io};
use crate::restore::plan::mib;

/// Where a server's WAL is.
pub(super) const WAL_DIR: &str = "pg_wal";
/// Begins the name of a folder for what was set aside. In `pg_wal` no server looks at it and no base backup
/// takes it along (`basebackup.c`, `sendDir`).
const SET_ASIDE: &str = "before-";
/// Where servers put their logs unless they are told otherwise (`log_directory`; `pg_log` before 10).
pub(super) const LOG_DIRS: [&str; 2] = ["log", "pg_log"];

/// What was set aside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::restore) struct Aside {
    /// The folder.
    pub(in crate::restore) path: PathBuf,
    /// How many files of WAL lie in it.
    wal_files: u64,
    /// How many bytes they have.
    wal_bytes: u64,
    /// Where logs went.
    logs: Vec<PathBuf>,
}

impl fmt::Display for Aside {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "what was set aside, to be removed once nobody needs it: {}, {} files of WAL, {}",
            self.path.display(),
            self.wal_files,
            mib(self.wal_bytes)
        )?;
        self.logs
            .iter()
            .try_for_each(|logs| write!(f, "; {}", logs.display()))
    }
}

/// Whether this is something that an earlier restore has set aside, by its path in the data directory.
pub(super) fn is_set_aside(path: &Path) -> bool {
    let text = path.to_str().unwrap_or_default();
    let mut of_logs = LOG_DIRS.iter().filter_map(|log| text.strip_prefix(log));
    let in_wal = text
        .strip_prefix(WAL_DIR)
        .and_then(|rest| rest.strip_prefix('/'));
    let of_logs = of_logs.find_map(|rest| rest.strip_prefix('.'));
    in_wal.or(of_logs).is_some_and(is_folder_for_it)
}

/// The name of a folder for what is set aside.
fn is_folder_for_it(name: &str) -> bool {
    let stamp = name.strip_prefix(SET_ASIDE);
    stamp.is_some_and(|stamp| {
        stamp.starts_with(|c: char| c.is_ascii_digit()) && !stamp.contains('/')
    })
}

/// Where the link `pg_wal` in a data directory leads; `None` where it is none.
pub(in crate::restore) fn wal_place(target: &Path) -> Result<Option<PathBuf>> {
    let link = target.join(WAL_DIR);
    if !link.is_symlink() {
        return Ok(None);
    }
    let place = fs::canonicalize(&link).map_err(|error| {
        Error::usage(io("follow", &link, &error).message()).hint(
            "mount the file system that this link leads to; or remove the link, and WAL goes into the \
             data directory",
        )
    })?;
    let canonical = fs::canonicalize(target).map_err(|error| io("find", target, &error))?;
    if place.starts_with(&canonical) || canonical.starts_with(&place) {
        return Err(Error::usage(format!(
            "{} leads to the data directory itself: {}",
            link.display(),
            place.display()
        ))
        .hint("remove the link first"));
    }
    let dir = open_dir(rustix::fs::CWD, place.as_os_str(), false);
    let dir = dir.map_err(|error| io("open", &place, &error.into()))?;
    let names = names(dir.as_fd()).map_err(|error| io("read", &place, &error))?;
    let stray = names.iter().find(|name| !is_of_wal(name.to_bytes()));
    match stray {
        None => Ok(Some(place)),
        Some(stray) => Err(Error::usage(format!(
            "pg_wal leads to a folder that holds something else than WAL: {}",
            place.join(OsStr::from_bytes(stray.to_bytes())).display()
        ))
        .hint("move that away first, or remove the link, and WAL goes into the data directory")),
    }
}

/// Whether a server has files and folders of this name in `pg_wal`, or a restore has.
fn is_of_wal(name: &[u8]) -> bool {
    let Ok(name) = str::from_utf8(name) else {
        return false;
    };
    let is_temporary = ["xlogtemp.", "RECOVERY"]
        .iter()
        .any(|it| name.starts_with(it));
    let is_folder = ["archive_status", "summaries"].contains(&name) || is_folder_for_it(name);
    is_temporary || is_folder || name.parse::<WalFileName>().is_ok()
}

impl Footprint {
    /// Takes the place that `pg_wal` leads to, if it is a link: WAL stays where the operator has put it.
    pub(super) fn take_wal_place(&mut self) -> Result<()> {
        let Some(place) = wal_place(self.target().path())? else {
            return Ok(());
        };
        let root = self.make_root(&place, super::MayBe::Filled)?;
        root.seize()?;
        self.roots.set_wal(root);
        Ok(())
    }

    /// As root: refuses to take a place that does not belong to whom the data directory belongs to. A link
    /// there may be its owner's, to any directory of this machine.
    pub(super) fn check_wal_place(&self) -> Result<()> {
        let target = self.target();
        let Some(place) = wal_place(target.path())? else {
            return Ok(());
        };
        let uid = |path: &Path| {
            let found = fs::symlink_metadata(path);
            found
                .map(|it| it.uid())
                .map_err(|error| io("read", path, &error))
        };
        let (of_place, of_target) = (uid(&place)?, uid(target.path())?);
        if self.owner.is_some() && of_place != of_target {
            return Err(Error::usage(format!(
                "pg_wal leads to a folder of another user: {}, uid={of_place}, expected={of_target}",
                place.display()
            ))
            .hint("give that folder to the owner of the data directory, if it is the cluster's"));
        }
        Ok(())
    }

    /// Moves WAL that is there into a folder of its own, called `before-<stamp>`, and, of a whole cluster, its
    /// logs too; `None` where there is nothing of these.
    pub(in crate::restore) fn set_aside(&self, stamp: &str) -> Result<Option<Aside>> {
        let failed = |error: std::io::Error| io("set aside what is in", &self.wal_path(), &error);
        let Some(wal) = self.open_wal().map_err(failed)? else {
            return Ok(None);
        };
        let mut aside = Aside {
            path: self.wal_path().join(format!("{SET_ASIDE}{stamp}")),
            wal_files: 0,
            wal_bytes: 0,
            logs: Vec::new(),
        };
        let mut moved: Vec<CString> = Vec::new();
        for name in names(wal.as_fd()).map_err(failed)? {
            let is_from_before = name.to_str().is_ok_and(is_folder_for_it);
            if !is_from_before && aside.count(wal.as_fd(), &name).map_err(failed)? {
                moved.push(name);
            }
        }
        let logs = self.logs().map_err(failed)?;
        if moved.is_empty() && logs.is_empty() {
            return Ok(None);
        }
        let folder = make_folder(&wal, stamp).map_err(failed)?;
        for name in moved {
            let name = Path::new(OsStr::from_bytes(name.to_bytes()));
            durable::rename_at(&wal, name, &folder, name).map_err(failed)?;
        }
        for name in logs {
            let moved = self.move_log(name, (&folder, &aside.path), stamp);
            aside.logs.push(moved.map_err(failed)?);
        }
        for dir in [&folder, &wal, self.target().dir()] {
            durable::sync_file(dir).map_err(failed)?;
        }
        Ok(Some(aside))
    }

    fn wal_path(&self) -> PathBuf {
        let of_link = self.roots.wal().map(Root::path);
        of_link.map_or_else(|| self.target().path().join(WAL_DIR), Path::to_owned)
    }

    /// `pg_wal`; `None` where there is none, or something that is no directory.
    fn open_wal(&self) -> std::io::Result<Option<File>> {
        match self.roots.wal() {
            Some(root) => root.dir().try_clone().map(Some),
            None => directory(self.target(), WAL_DIR),
        }
    }

    /// The folders with logs of a server that was there until now.
    fn logs(&self) -> std::io::Result<Vec<&'static str>> {
        let mut logs = Vec::new();
        for name in LOG_DIRS {
            if let Some(dir) = directory(self.target(), name)?
                && self.found == super::Found::Cluster
                && !names(dir.as_fd())?.is_empty()
            {
                logs.push(name);
            }
        }
        Ok(logs)
    }

    /// Moves logs to the WAL, or, where that is on another file system, out of the restored server's way.
    fn move_log(
        &self,
        name: &str,
        (folder, path): (&File, &Path),
        stamp: &str,
    ) -> std::io::Result<PathBuf> {
        let target = self.target().dir();
        match durable::rename_at(target, Path::new(name), folder, Path::new(name)) {
            Ok(()) => Ok(path.join(name)),
            Err(error) if error.kind() == std::io::ErrorKind::CrossesDevices => {
                let beside = format!("{name}.{SET_ASIDE}{stamp}");
                durable::rename_at(target, Path::new(name), target, Path::new(&beside))?;
                Ok(self.target().path().join(beside))
            }
            Err(error) => Err(error),
        }
    }
}

impl Aside {
    /// Counts a file, or those in a folder; whether it is anything but folders.
    fn count(&mut self, dir: BorrowedFd<'_>, name: &CString) -> std::io::Result<bool> {
        let found = rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)?;
        if FileType::from_raw_mode(found.st_mode) != FileType::Directory {
            let bytes = u64::try_from(found.st_size).unwrap_or(0);
            self.wal_files = self.wal_files.saturating_add(1);
            self.wal_bytes = self.wal_bytes.saturating_add(bytes);
            return Ok(true);
        }
        let below = open_dir(dir, OsStr::from_bytes(name.to_bytes()), false)?;
        let mut is_filled = false;
        for name in names(below.as_fd())? {
            is_filled |= self.count(below.as_fd(), &name)?;
        }
        Ok(is_filled)
    }
}

fn make_folder(wal: &File, stamp: &str) -> std::io::Result<File> {
    let name = OsString::from(format!("{SET_ASIDE}{stamp}"));
    rustix::fs::mkdirat(wal, &name, Mode::RWXU)?;
    Ok(open_dir(wal, &name, false)?)
}

/// A directory below a root, if it is one.
fn directory(root: &Root, name: &str) -> std::io::Result<Option<File>> {
    match open_dir(root.dir(), OsStr::new(name), false) {
        Ok(dir) => Ok(Some(dir)),
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => Ok(None),
        Err(error) => Err(error.into()),
    }
}
