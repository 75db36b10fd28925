//! A look through all that a directory holds, before it is written over.

use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::AsFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, FileType, Statx, StatxAttributes, StatxFlags};
use rustix::process::geteuid;

use super::aside::WAL_DIR;
use super::root::{names, open_dir};
use super::tablespaces::LOST_AND_FOUND;
use crate::error::{Error, Result, io};

/// Refuses a directory below which something could be neither replaced nor removed: a mount point, but for
/// `pg_wal`, or a directory that this user cannot change.
///
/// Root may change also what is its future `owner`'s, in a directory that is closed to all others.
pub(in crate::restore) fn check_tree(path: &Path, owner: Option<u32>) -> Result<()> {
    let opened = open_dir(CWD, path.as_os_str(), true);
    let dir = opened.map_err(|error| io("open", path, &error.into()))?;
    Tree { top: path, owner }.check(&dir, Path::new(""))
}

struct Tree<'a> {
    top: &'a Path,
    owner: Option<u32>,
}

impl Tree<'_> {
    fn check(&self, dir: &File, below: &Path) -> Result<()> {
        let place = self.top.join(below);
        let failed = |error: std::io::Error| io("read", &place, &error);
        let here = look(dir, OsStr::new("")).map_err(failed)?;
        let is_ours = here.stx_uid == geteuid().as_raw() || Some(here.stx_uid) == self.owner;
        if !is_ours || here.stx_mode & 0o700 != 0o700 {
            return Err(Error::usage(format!(
                "a directory cannot be changed by this user: {}, uid={}, mode={:o}",
                place.display(),
                here.stx_uid,
                here.stx_mode & 0o7777
            ))
            .hint("give it to the owner of the data directory, with mode 0700, or move it away"));
        }
        for name in names(dir.as_fd()).map_err(failed)? {
            let name = OsStr::from_bytes(name.to_bytes());
            let found = look(dir, name).map_err(failed)?;
            let path = below.join(name);
            if path == Path::new(LOST_AND_FOUND) {
                continue;
            }
            if path != Path::new(WAL_DIR) && is_mounted(&here, &found) {
                return Err(Error::usage(format!(
                    "something is mounted below {}: {}",
                    self.top.display(),
                    self.top.join(path).display()
                ))
                .hint("unmount it first, or restore into another directory"));
            }
            if is_directory(&found) {
                let opened = open_dir(dir, name, false);
                self.check(&opened.map_err(|error| failed(error.into()))?, &path)?;
            }
        }
        Ok(())
    }
}

fn look(dir: &File, name: &OsStr) -> std::io::Result<Statx> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::EMPTY_PATH;
    Ok(rustix::fs::statx(
        dir,
        name,
        flags,
        StatxFlags::BASIC_STATS,
    )?)
}

/// Whether something is mounted here. Linux says so since 5.8; before, only directories of other file systems
/// are found. Files of an overlay may have other devices than their directory.
fn is_mounted(parent: &Statx, found: &Statx) -> bool {
    let device = |of: &Statx| (of.stx_dev_major, of.stx_dev_minor);
    let is_elsewhere = is_directory(found) && device(parent) != device(found);
    is_elsewhere || found.stx_attributes.contains(StatxAttributes::MOUNT_ROOT)
}

fn is_directory(found: &Statx) -> bool {
    FileType::from_raw_mode(found.stx_mode.into()) == FileType::Directory
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn what_could_not_be_changed_is_named() {
        let folder = tempfile::tempdir().unwrap();
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o750)).unwrap();
        let inner = folder.path().join("base/1");
        fs::create_dir_all(&inner).unwrap();
        fs::write(inner.join("2"), "x").unwrap();
        std::os::unix::fs::symlink("/proc", inner.join("link")).unwrap();
        check_tree(folder.path(), None).unwrap();
        fs::set_permissions(&inner, fs::Permissions::from_mode(0o500)).unwrap();
        let error = check_tree(folder.path(), None).unwrap_err();
        assert!(error.message().contains("base/1"), "{error}");
        // pseudo-terminals, and shared memory
        let error = check_tree(Path::new("/dev"), None).unwrap_err();
        let refused = if geteuid().is_root() {
            "mounted"
        } else {
            "changed"
        };
        assert!(error.message().contains(refused), "{error}");
    }
}
