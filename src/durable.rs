//! The one place that syncs and renames: what it returns from is on the disk.
//!
//! A rename alone survives a crash only when the directory that holds the name is synced too, and
//! a new directory only when its parent is.

use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Read as _, Write as _};
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{AtFlags, RenameFlags, StatxFlags};
use rustix::io::Errno;

/// Tells the files apart that this process stages.
static STAGED: AtomicU64 = AtomicU64::new(0);

/// Syncs a directory, so that the names in it survive a crash.
pub fn sync_dir(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// Syncs a file's bytes and size.
pub fn sync_file(file: &File) -> io::Result<()> {
    file.sync_all()
}

/// Syncs a file's bytes, and of the rest only what is needed to read them.
pub fn sync_data(file: &File) -> io::Result<()> {
    file.sync_data()
}

/// Syncs everything on the file system that holds `path`: cheaper than one sync per file where a
/// whole tree was written.
pub fn sync_file_system(path: &Path) -> io::Result<()> {
    FileSystem::of(path)?.sync()
}

/// A file system, to be opened before it is written to: Linux tells whoever syncs of what could not be written
/// since then, and of nothing before (`fs/open.c`, `do_dentry_open`; `fs/sync.c`, `syncfs`).
#[derive(Debug)]
pub struct FileSystem {
    directory: File,
}

impl FileSystem {
    /// The one that holds the directory `path`.
    pub fn of(path: &Path) -> io::Result<Self> {
        let directory = File::open(path)?;
        Ok(Self { directory })
    }

    /// Syncs everything on it.
    pub fn sync(&self) -> io::Result<()> {
        Ok(rustix::fs::syncfs(&self.directory)?)
    }
}

/// Creates a folder, mode 0700, and syncs it into its parent, which must be there.
pub fn create_dir(path: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => {}
        Err(error) => return Err(error),
    }
    path.parent().map_or(Ok(()), sync_dir)
}

/// Creates `path` and the parents that are missing, mode 0700, each synced into its parent.
pub fn create_dir_all(path: &Path) -> io::Result<()> {
    let mut missing: Vec<&Path> = Vec::new();
    let mut at = path;
    while !at.as_os_str().is_empty() && !at.is_dir() {
        missing.push(at);
        let Some(parent) = at.parent() else { break };
        at = parent;
    }
    for directory in missing.into_iter().rev() {
        match DirBuilder::new().mode(0o700).create(directory) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && directory.is_dir() => {}
            Err(error) => return Err(error),
        }
        if let Some(parent) = directory.parent() {
            let parent = if parent.as_os_str().is_empty() {
                Path::new(".")
            } else {
                parent
            };
            sync_dir(parent)?;
        }
    }
    Ok(())
}

/// Replaces `path` by `bytes`, mode 0600: after a crash it is the old file or the new one.
pub fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let staged = staged_name(path);
    let written = (|| {
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&staged)?;
        file.write_all(bytes)?;
        file.sync_all()
    })();
    if let Err(error) = written {
        remove_leftover(&staged);
        return Err(error);
    }
    rename(&staged, path)
}

/// A file that was written and synced apart from its place, mode 0600. Until it is put there,
/// dropping it removes it; what a killed process leaves, [`remove_stale`] finds.
#[derive(Debug)]
pub struct Staged {
    // locked for as long as it is open: a locked file has a living owner
    file: File,
    path: PathBuf,
}

impl Staged {
    /// Writes `bytes` to a new file in `folder`, which lies on the file system of its later place.
    pub fn write(folder: &Path, bytes: &[u8]) -> io::Result<Self> {
        let staged = Self::write_unsynced(folder, bytes)?;
        staged.file.sync_all()?;
        Ok(staged)
    }

    /// The same, but not synced: after a power cut the file may be empty, torn or gone.
    pub fn write_unsynced(folder: &Path, bytes: &[u8]) -> io::Result<Self> {
        Self::empty(folder)?.filled_unsynced(bytes)
    }

    /// A new file, to be filled later.
    pub fn empty(folder: &Path) -> io::Result<Self> {
        let staged = Self::open(folder)?;
        // a file system without locks keeps what a killed process leaves
        drop(staged.file.try_lock());
        Ok(staged)
    }

    /// Makes it another user's, where that is possible: a file of root's is of no use to others.
    pub fn give_to(&self, (user, group): (u32, u32)) -> io::Result<()> {
        let metadata = self.file.metadata()?;
        if metadata.uid() != 0 || (user, group) == (metadata.uid(), metadata.gid()) {
            return Ok(());
        }
        std::os::unix::fs::fchown(&self.file, Some(user), Some(group))?;
        self.file.sync_all()
    }

    /// With these bytes after what is in it; not synced.
    pub fn filled_unsynced(mut self, bytes: &[u8]) -> io::Result<Self> {
        self.file.write_all(bytes)?;
        Ok(self)
    }

    /// A new file of so many zeros, synced. They are written, not only set aside: what is written
    /// over them later needs no more than [`sync_data`] of what it is itself.
    ///
    /// An error where the file system has no locks: nobody could see that its owner lives.
    pub fn zeros(folder: &Path, bytes: u64) -> io::Result<Self> {
        let mut staged = Self::open(folder)?;
        staged.file.try_lock()?;
        let written = io::copy(&mut io::repeat(0).take(bytes), &mut staged.file)?;
        debug_assert_eq!(written, bytes);
        staged.file.sync_all()?;
        Ok(staged)
    }

    fn open(folder: &Path) -> io::Result<Self> {
        loop {
            let number = STAGED.fetch_add(1, Ordering::Relaxed);
            let path = folder.join(format!("{}-{number}", std::process::id()));
            let opened = OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&path);
            match opened {
                Ok(file) => return Ok(Self { file, path }),
                // another process of this number, in a container of its own or long ago
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Gives the file its name if nothing has it yet; else the error is `AlreadyExists`.
    pub fn create(self, to: &Path) -> io::Result<()> {
        std::fs::hard_link(&self.path, to)?;
        sync_dir(parent_of(to))
    }

    /// Gives the file its name if nothing has it yet, and goes on as its owner, who holds its lock.
    pub fn create_and_keep(self, to: &Path) -> io::Result<File> {
        let file = self.file.try_clone()?;
        self.create_unsynced(to)?;
        sync_dir(parent_of(to))?;
        Ok(file)
    }

    /// Gives the file its name if nothing has it yet; else the error is `AlreadyExists`. The name is
    /// there for all that run now; after a power cut it may be gone.
    pub fn create_unsynced(mut self, to: &Path) -> io::Result<()> {
        let flags = RenameFlags::NOREPLACE;
        match rustix::fs::renameat_with(rustix::fs::CWD, &self.path, rustix::fs::CWD, to, flags) {
            Ok(()) => {
                self.path.clear();
                Ok(())
            }
            // not every file system knows how
            Err(Errno::INVAL | Errno::NOSYS) => std::fs::hard_link(&self.path, to),
            Err(error) => Err(error.into()),
        }
    }

    /// Gives the file its name, over whatever has it.
    pub fn replace(self, to: &Path) -> io::Result<()> {
        rename(&self.path, to)
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        if !self.path.as_os_str().is_empty() {
            remove_leftover(&self.path);
        }
    }
}

/// Removes the staged files of processes that are no more.
pub fn remove_stale(folder: &Path) -> io::Result<()> {
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    for entry in entries {
        let path = entry?.path();
        let file = match File::open(&path) {
            Ok(file) => file,
            // its owner was faster
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        match file.try_lock() {
            Ok(()) => remove_leftover(&path),
            Err(TryLockError::WouldBlock) => {}
            Err(TryLockError::Error(error)) => return Err(error),
        }
    }
    Ok(())
}

/// Creates `path` with `bytes`, mode 0600; what is there already is left as it is, and an error.
pub fn create_new(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    let written = file
        .write_all(bytes)
        .and_then(|()| file.sync_all())
        .and_then(|()| sync_dir(parent_of(path)));
    if written.is_err() {
        remove_leftover(path);
    }
    written
}

/// Renames `from` to `to` and syncs the directory that holds `to`.
pub fn rename(from: &Path, to: &Path) -> io::Result<()> {
    #[expect(
        clippy::disallowed_methods,
        reason = "this is the one place that renames"
    )]
    std::fs::rename(from, to)?;
    sync_dir(parent_of(to))
}

/// Renames what `from` names in one open directory to `to` in another; neither is synced.
pub fn rename_at(from_dir: impl AsFd, from: &Path, to_dir: impl AsFd, to: &Path) -> io::Result<()> {
    Ok(rustix::fs::renameat(from_dir, from, to_dir, to)?)
}

/// Renames a file in an open directory to a name that nothing has there; the directory is not synced.
pub fn rename_new_at(dir: impl AsFd, from: &Path, to: &Path) -> io::Result<()> {
    let flags = RenameFlags::NOREPLACE;
    Ok(rustix::fs::renameat_with(&dir, from, &dir, to, flags)?)
}

/// Removes a file, and syncs the directory that held it.
pub fn remove(path: &Path) -> io::Result<()> {
    std::fs::remove_file(path)?;
    sync_dir(parent_of(path))
}

fn parent_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

fn staged_name(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}.tmp", std::process::id()));
    PathBuf::from(name)
}

fn remove_leftover(path: &Path) {
    if let Err(error) = std::fs::remove_file(path)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!("could not remove {}: {error}", path.display());
    }
}

/// How many names a file has.
///
/// Nothing else is asked: Linux stamps a file anew at each write once its times were read, since 6.13
/// (`fs/stat.c`, `fill_mg_cmtime`), and a sync then writes the inode too, which takes as long again.
pub fn links(file: &File) -> io::Result<u64> {
    match rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::NLINK) {
        Ok(found) => Ok(found.stx_nlink.into()),
        Err(Errno::NOSYS | Errno::PERM) => Ok(file.metadata()?.nlink()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn creates_a_file_once_for_its_owner_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        create_new(&path, b"first").unwrap();
        let again = create_new(&path, b"second").unwrap_err();
        assert_eq!(again.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(std::fs::read(&path).unwrap(), b"first");
        let mode = std::fs::metadata(&path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode, 0o600);
    }

    #[test]
    fn replaces_a_file_whole_and_leaves_nothing_staged() {
        let folder = tempfile::tempdir().unwrap();
        let deep = folder.path().join("a/b/c");
        create_dir_all(&deep).unwrap();
        let path = deep.join("file");
        replace(&path, b"old").unwrap();
        replace(&path, b"new").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"new");
        assert_eq!(std::fs::read_dir(&deep).unwrap().count(), 1);
        assert_eq!(
            std::fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        let mode = std::fs::metadata(&deep).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode, 0o700);
    }
}
