//! The one place that syncs and renames: what it returns from is on the disk.
//!
//! A rename alone survives a crash only when the directory that holds the name is synced too, and
//! a new directory only when its parent is.

use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

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

/// Syncs everything on the file system that holds `path`: cheaper than one sync per file where a
/// whole tree was written.
pub fn sync_file_system(path: &Path) -> io::Result<()> {
    let directory = File::open(path)?;
    Ok(rustix::fs::syncfs(&directory)?)
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
        let mut staged = Self::open(folder)?;
        // a file system without locks keeps what a killed process leaves
        drop(staged.file.try_lock());
        staged.file.write_all(bytes)?;
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

    /// Gives the file its name, over whatever has it.
    pub fn replace(self, to: &Path) -> io::Result<()> {
        rename(&self.path, to)
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        remove_leftover(&self.path);
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
