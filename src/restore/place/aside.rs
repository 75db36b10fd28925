//! What the directory of a cluster had that a restore must neither use nor destroy: its WAL, which may be all
//! that is left of the last transactions, and what its server said.

use std::ffi::{CString, OsStr, OsString};
use std::fmt;
use std::fs::{self, File};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Mode};
use rustix::io::Errno;
use wal::WalFileName;

use super::root::MayBe;
use super::root::{names, open_dir};
use super::tablespaces::{LOST_AND_FOUND, are_nested};
use super::{Footprint, Found, Root, check_tree};
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

/// Where WAL goes if not into the data directory: what was `asked` for, which is where a link that is there leads.
pub(in crate::restore) fn plan_wal_place(
    target: &Path,
    found: Found,
    asked: Option<&Path>,
) -> Result<Option<PathBuf>> {
    let pg_wal = target.join(WAL_DIR);
    if found.is_filled() && pg_wal.is_symlink() {
        let place = linked_wal_place(target, found, &pg_wal)?;
        let is_asked =
            asked.is_some_and(|asked| fs::canonicalize(asked).ok().as_ref() == Some(&place));
        if is_asked {
            return Ok(Some(place));
        }
        let shown = place.display();
        return Err(Error::usage(format!(
            "pg_wal in the directory is a link to {shown}: what is there is set aside only where it is named"
        ))
        .hint(format!(
            "a copy of a data directory leads to the WAL of the original, which may be a live server's. If this \
             one is not shared: --waldir {shown}; else remove the link first"
        )));
    }
    let Some(asked) = asked else {
        return Ok(None);
    };
    if found.is_filled() && pg_wal.exists() {
        return Err(Error::usage(format!(
            "{} is a directory: WAL cannot go to {}",
            pg_wal.display(),
            asked.display()
        ))
        .hint("leave --waldir out"));
    }
    Ok(Some(asked.to_owned()))
}

/// Where the link `pg_wal` leads, if that is a place for WAL alone.
fn linked_wal_place(target: &Path, found: Found, link: &Path) -> Result<PathBuf> {
    let place = fs::canonicalize(link).map_err(|error| {
        Error::usage(io("follow", link, &error).message()).hint(
            "mount the file system that this link leads to; or remove the link, and WAL goes into the \
             data directory",
        )
    })?;
    let canonical = fs::canonicalize(target).map_err(|error| io("find", target, &error))?;
    if are_nested(&place, &canonical) {
        return Err(Error::usage(format!(
            "{} leads to the data directory itself: {}",
            link.display(),
            place.display()
        ))
        .hint("remove the link first"));
    }
    if found == Found::Cluster {
        check_tree(&place, None)?;
    }
    let failed = |error: std::io::Error| io("read", &place, &error);
    for entry in fs::read_dir(&place).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if !is_of_wal(entry.file_name().as_bytes()) {
            return Err(Error::usage(format!(
                "pg_wal leads to a folder that holds something else than WAL: {}",
                entry.path().display()
            ))
            .hint(
                "move that away first, or remove the link, and WAL goes into the data directory",
            ));
        }
    }
    Ok(place)
}

/// Whether a server has files and folders of this name in `pg_wal`, or a restore has.
fn is_of_wal(name: &[u8]) -> bool {
    let Ok(name) = str::from_utf8(name) else {
        return false;
    };
    let is_temporary = ["xlogtemp.", "RECOVERY"]
        .iter()
        .any(|it| name.starts_with(it));
    let is_folder =
        ["archive_status", "summaries", LOST_AND_FOUND].contains(&name) || is_folder_for_it(name);
    is_temporary || is_folder || name.parse::<WalFileName>().is_ok()
}

impl Footprint {
    /// Takes the place where WAL goes, where that is not the data directory.
    pub(in crate::restore) fn take_wal_place(&mut self, place: &Path) -> Result<()> {
        let is_linked = self.target().link_at(Path::new(WAL_DIR)).is_some();
        let may_be = if self.found.is_filled() && is_linked {
            MayBe::Filled
        } else {
            MayBe::Empty
        };
        let root = self.make_root(place, may_be)?;
        self.roots.set_wal(root);
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
            let stays = name
                .to_str()
                .is_ok_and(|name| name == LOST_AND_FOUND || is_folder_for_it(name));
            if !stays && aside.count(wal.as_fd(), &name).map_err(failed)? {
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
                && self.found.has_links_of_a_cluster()
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
