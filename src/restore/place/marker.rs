//! The file that stands in a directory while it is being restored: it keeps others away, and says of what a
//! killed restore left what it is.

use std::fs::{File, TryLockError};
use std::io::Write as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use super::Owner;
use super::found::read_up_to;
use super::root::Root;
use crate::durable;
use crate::error::{Error, Result, io};

/// Its name.
pub(in crate::restore) const MARKER: &str = "anywhen-restore-unfinished";
/// More than it says, in bytes.
const BYTES_MAX: u64 = 64 << 10;
/// Ends its first line in what was a cluster's own directory.
const OVER_CLUSTER: &str = "over-cluster";

/// What it says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::restore) struct Unfinished {
    /// Of the cluster that is restored.
    pub(in crate::restore) system_id: u64,
    /// Whom its files are for.
    pub(in crate::restore) owner: Option<Owner>,
    /// Of a cluster that was there: the lines by which its server followed a primary.
    pub(in crate::restore) follows: Option<Vec<u8>>,
}

impl Unfinished {
    /// `None` where there is none, or one that says nothing.
    pub(in crate::restore) fn read(target: &Path) -> Result<Option<Self>> {
        let bytes = read_up_to(&target.join(MARKER), BYTES_MAX)?;
        Ok(bytes.and_then(|bytes| Self::parse(&bytes)))
    }

    fn parse(bytes: &[u8]) -> Option<Self> {
        let mut lines = bytes.splitn(2, |byte| *byte == b'\n');
        let first = str::from_utf8(lines.next()?).ok()?;
        let mut words: Vec<&str> = first.split_whitespace().collect();
        let over_cluster = words.last() == Some(&OVER_CLUSTER);
        if over_cluster {
            words.pop();
        }
        let mut words = words.into_iter();
        let system_id = words.next()?.parse().ok()?;
        let mut id = || words.next()?.parse().ok();
        let owner = match (id(), id()) {
            (Some(uid), Some(gid)) => Some(Owner { uid, gid }),
            _ => None,
        };
        let follows = lines.next().unwrap_or_default().to_vec();
        Some(Self {
            system_id,
            owner,
            follows: over_cluster.then_some(follows),
        })
    }

    fn bytes(&self) -> Vec<u8> {
        let mut line = self.system_id.to_string();
        if let Some(owner) = self.owner {
            line = format!("{line} {} {}", owner.uid, owner.gid);
        }
        if self.follows.is_some() {
            line.push(' ');
            line.push_str(OVER_CLUSTER);
        }
        line.push('\n');
        let mut bytes = line.into_bytes();
        bytes.extend(self.follows.iter().flatten());
        bytes
    }
}

/// A marker that this process has locked: nobody else restores where it is.
#[derive(Debug)]
pub(super) struct Marker(File);

impl Marker {
    /// Makes it, whole and locked from the moment that it has its name, in the place of one that was `left`.
    pub(super) fn make(
        root: &Root,
        says: &Unfinished,
        left: Option<&Self>,
        needs_lock: bool,
    ) -> Result<Self> {
        let place = root.path().join(MARKER);
        let failed = |doing, error: std::io::Error| io(doing, &place, &error);
        let unnamed = PathBuf::from(format!("{MARKER}.{}", std::process::id()));
        root.remove(&unnamed)?;
        let mut file = root.create(&unnamed)?;
        let made = file
            .write_all(&says.bytes())
            .and_then(|()| durable::sync_file(&file))
            .map_err(|error| failed("write", error));
        let made = made.and_then(|()| {
            lock(&file, &place, needs_lock)?;
            let name = Path::new(MARKER);
            let named = match left {
                // nobody else may replace it while that is locked
                Some(_) => durable::rename_at(root.dir(), &unnamed, root.dir(), name),
                None => root.rename_new(&unnamed, name),
            };
            match named {
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                    Err(under_way(root))
                }
                named => named.map_err(|error| failed("create", error)),
            }
        });
        if made.is_err() {
            root.remove(&unnamed)?;
        }
        made?;
        durable::sync_file(root.dir()).map_err(|error| failed("sync", error))?;
        Ok(Self(file))
    }

    /// Takes one that was left; `None` where there is none.
    pub(super) fn take(root: &Root) -> Result<Option<Self>> {
        let Some(file) = root.open(Path::new(MARKER))? else {
            return Ok(None);
        };
        lock(&file, &root.path().join(MARKER), true)?;
        let marker = Self(file);
        // it may have been another's who had come to an end
        if marker.is_in(root)? {
            Ok(Some(marker))
        } else {
            Err(under_way(root))
        }
    }

    /// Removes it, if it is still the one that has the name.
    pub(super) fn remove(&self, root: &Root) -> Result<()> {
        if self.is_in(root)? {
            root.remove(Path::new(MARKER))?;
        }
        Ok(())
    }

    fn is_in(&self, root: &Root) -> Result<bool> {
        let place = root.path().join(MARKER);
        let failed = |error: std::io::Error| io("read", &place, &error);
        let Some(named) = root.open(Path::new(MARKER))? else {
            return Ok(false);
        };
        let (named, held) = (named.metadata(), self.0.metadata());
        let (named, held) = (named.map_err(failed)?, held.map_err(failed)?);
        Ok((named.dev(), named.ino()) == (held.dev(), held.ino()))
    }
}

/// Sees that nobody else has it locked.
fn lock(file: &File, place: &Path, needs_lock: bool) -> Result<()> {
    match file.try_lock() {
        Ok(()) => Ok(()),
        Err(TryLockError::WouldBlock) => {
            let shown = place.parent().unwrap_or(place).display();
            Err(Error::usage(format!(
                "another restore into {shown} is under way"
            )))
        }
        // a file system without locks
        Err(TryLockError::Error(error)) if !needs_lock => {
            tracing::debug!("no lock on {}: {error}", place.display());
            Ok(())
        }
        Err(TryLockError::Error(error)) => Err(io("lock", place, &error)),
    }
}

fn under_way(root: &Root) -> Error {
    let shown = root.path().display();
    Error::usage(format!("another restore into {shown} is under way"))
}

#[cfg(test)]
mod tests {
    use super::super::root::MayBe;
    use super::*;

    fn root(path: &Path) -> Root {
        Root::take(path, None, MayBe::Filled, &mut Vec::new()).unwrap()
    }

    #[test]
    fn what_it_says_is_read_back() {
        let owner = Some(Owner { uid: 26, gid: 27 });
        for (owner, follows) in [
            (None, None),
            (owner, None),
            (None, Some(Vec::new())),
            (owner, Some(b"primary_conninfo = 'host=\xf6'\n".to_vec())),
        ] {
            let says = Unfinished {
                system_id: 7,
                owner,
                follows,
            };
            assert_eq!(Unfinished::parse(&says.bytes()), Some(says));
        }
        assert_eq!(Unfinished::parse(b""), None);
        assert_eq!(Unfinished::parse(b"x\n"), None);
    }

    /// Two operators at once: the second would take away what the first has.
    #[test]
    fn only_one_has_it_and_only_that_one_removes_it() {
        let folder = tempfile::tempdir().unwrap();
        let root = root(folder.path());
        let says = Unfinished {
            system_id: 7,
            owner: None,
            follows: None,
        };
        let mine = Marker::make(&root, &says, None, true).unwrap();
        assert!(Marker::make(&root, &says, None, true).is_err());
        assert!(Marker::take(&root).is_err());
        assert_eq!(Unfinished::read(folder.path()).unwrap(), Some(says.clone()));
        // of somebody who came after it was removed
        mine.remove(&root).unwrap();
        let other = Marker::make(&root, &says, None, true).unwrap();
        mine.remove(&root).unwrap();
        assert!(other.is_in(&root).unwrap());
        let next = Marker::make(&root, &says, Some(&other), true).unwrap();
        assert!(next.is_in(&root).unwrap());
        drop(next);
        assert!(Marker::take(&root).unwrap().is_some());
        let names = std::fs::read_dir(folder.path()).unwrap().count();
        assert_eq!(names, 1);
    }
}
