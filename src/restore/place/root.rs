//! A directory that is restored into, by its handle: what is written goes below that directory,
//! whatever becomes of its name. Its future owner may hold the folder above and could otherwise
//! lead root's writes elsewhere.

use std::collections::BTreeMap;
use std::ffi::{CString, OsStr, OsString};
use std::fs::{self, File, Metadata};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, fchown};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::process::{Gid, Uid, geteuid};

use super::Owner;
use crate::durable;
use crate::error::{Error, Result, io};

const PRIVATE: Mode = Mode::RWXU;

/// A directory that was made, and where its name stands.
#[derive(Debug)]
pub(super) struct Made {
    parent: File,
    name: OsString,
    dir: File,
    path: PathBuf,
}

impl Made {
    /// Gives it to the owner, and syncs it and the folder that names it.
    pub(super) fn hand_over(&self, owner: Option<Owner>) -> Result<()> {
        let path = &self.path;
        give(&self.dir, owner).map_err(|error| io("change the owner of", path, &error))?;
        let synced = durable::sync_file(&self.dir).and_then(|()| durable::sync_file(&self.parent));
        synced.map_err(|error| io("sync", path, &error))
    }

    /// Removes it, if it is empty and still there.
    pub(super) fn remove(&self) {
        if let Err(error) = rustix::fs::unlinkat(&self.parent, &self.name, AtFlags::REMOVEDIR) {
            tracing::debug!("{} stays: {error}", self.path.display());
        }
    }
}

/// What may stand at the place of a [`Root`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum MayBe {
    /// Nothing.
    Absent,
    /// Nothing, or an empty directory.
    Empty,
    /// Whatever is there: it is not closed yet.
    Filled,
}

/// What stays of what is in a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::restore) enum Stays {
    /// A file, if it is one, and nobody else's too.
    File,
    /// A directory, with what stays of what is in it.
    Directory,
    /// Whatever it is.
    Whatever,
}

/// What stood at the place of a [`Root`] before.
#[derive(Debug)]
enum Before {
    /// Nothing: the name was made.
    Absent,
    /// An empty directory with this owner and mode.
    Empty(Metadata),
    /// A directory with something in it.
    Filled,
}

/// A directory that a restore fills; closed to everybody else until it is handed over.
#[derive(Debug)]
pub(in crate::restore) struct Root {
    made: Made,
    before: Before,
    owner: Option<Owner>,
}

impl Root {
    /// Makes a directory at `path`, or takes over what `may_be` there. The folders above it that were missing
    /// are added to `parents`.
    pub(super) fn take(
        path: &Path,
        owner: Option<Owner>,
        may_be: MayBe,
        parents: &mut Vec<Made>,
    ) -> Result<Self> {
        let name = path.file_name();
        let name =
            name.ok_or_else(|| Error::usage(format!("{} does not end in a name", path.display())))?;
        let parent = open_parent(path, parents)?;
        let before = match rustix::fs::mkdirat(&parent, name, PRIVATE) {
            Ok(()) => None,
            Err(Errno::EXIST) if may_be != MayBe::Absent => Some(()),
            Err(error) => return Err(io("create", path, &error.into())),
        };
        // as root, a link may be the future owner's, to any directory of this machine
        let follow = before.is_some() && owner.is_none();
        let dir = open_dir(&parent, name, follow).map_err(|error| {
            let error = io("open", path, &error.into());
            if path.is_symlink() {
                return error.hint("as root, name the directory itself and not a link to it");
            }
            error
        })?;
        let read = |error: std::io::Error| io("read", path, &error);
        let before = match before {
            None => Before::Absent,
            Some(()) if may_be == MayBe::Filled => Before::Filled,
            Some(()) => Before::Empty(dir.metadata().map_err(read)?),
        };
        let root = Self {
            made: Made {
                parent,
                name: name.to_owned(),
                dir,
                path: path.to_owned(),
            },
            before,
            owner,
        };
        if root.is_filled() {
            return Ok(root);
        }
        let closed = root
            .close()
            .map_err(|error| io("set the mode of", path, &error));
        let empty =
            closed.and_then(|()| Ok(names(root.made.dir.as_fd()).map_err(read)?.is_empty()));
        match empty {
            Ok(true) => Ok(root),
            Ok(false) => {
                root.give_back();
                let shown = path.display();
                Err(Error::usage(format!("{shown} is not empty any more")))
            }
            Err(error) => {
                root.give_back();
                Err(error)
            }
        }
    }

    pub(in crate::restore) fn path(&self) -> &Path {
        &self.made.path
    }

    /// The file system that it lies on.
    pub(super) fn device(&self) -> Result<u64> {
        let metadata = self.made.dir.metadata();
        let metadata = metadata.map_err(|error| io("read", self.path(), &error))?;
        Ok(metadata.dev())
    }

    /// Makes a directory below it; one that is there already is left.
    pub(super) fn make_dir(&self, below: &Path) -> Result<()> {
        match rustix::fs::mkdirat(&self.made.dir, below, PRIVATE) {
            Ok(()) | Err(Errno::EXIST) => Ok(()),
            Err(error) => Err(io("create", &self.path().join(below), &error.into())),
        }
    }

    /// Makes the folders above what is below it.
    pub(in crate::restore) fn make_parents(&self, below: &Path) -> Result<()> {
        let mut folders: Vec<&Path> = below.ancestors().skip(1).collect();
        folders.retain(|folder| !folder.as_os_str().is_empty());
        folders
            .iter()
            .rev()
            .try_for_each(|folder| self.make_dir(folder))
    }

    /// As [`Self::make_dir`], with permissions as the server had them, and at least the owner's.
    pub(super) fn make_dir_with_mode(&self, below: &Path, mode: u32) -> Result<()> {
        self.make_dir(below)?;
        let mode = permissions(mode) | PRIVATE;
        let set = rustix::fs::chmodat(&self.made.dir, below, mode, AtFlags::empty());
        set.map_err(|error| io("set the mode of", &self.path().join(below), &error.into()))
    }

    /// Makes a symbolic link below it.
    pub(super) fn make_link(&self, below: &Path, to: &Path) -> Result<()> {
        let made = rustix::fs::symlinkat(to, &self.made.dir, below);
        made.map_err(|error| io("create", &self.path().join(below), &error.into()))
    }

    /// Makes a file below it that was not there, to write to, mode 0600.
    pub(in crate::restore) fn create(&self, below: &Path) -> Result<File> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
        self.open_with(below, flags)
            .map_err(|error| io("create", &self.path().join(below), &error.into()))
    }

    /// As [`Self::create`], with permissions as the server had them.
    pub(in crate::restore) fn create_with_mode(&self, below: &Path, mode: u32) -> Result<File> {
        let file = self.create(below)?;
        let mode = permissions(mode);
        if mode != Mode::RUSR | Mode::WUSR {
            let set = rustix::fs::fchmod(&file, mode);
            set.map_err(|error| io("set the mode of", &self.path().join(below), &error.into()))?;
        }
        Ok(file)
    }

    /// Opens a file below it to change it, or makes it, with permissions as the server had them.
    pub(in crate::restore) fn open_to_change(&self, below: &Path, mode: u32) -> Result<File> {
        let failed = |doing, error: Errno| io(doing, &self.path().join(below), &error.into());
        let file = self
            .open_with(below, OFlags::RDWR | OFlags::CREATE)
            .map_err(|error| failed("open", error))?;
        let set = rustix::fs::fchmod(&file, permissions(mode));
        set.map_err(|error| failed("set the mode of", error))?;
        Ok(file)
    }

    /// Its handle.
    pub(in crate::restore) fn dir(&self) -> &File {
        &self.made.dir
    }

    /// Whether something was there already.
    pub(super) fn is_filled(&self) -> bool {
        matches!(self.before, Before::Filled)
    }

    /// A directory below it, not through a link.
    pub(super) fn open_dir(&self, below: &Path) -> Result<File> {
        let opened = open_dir(self.dir(), below.as_os_str(), false);
        opened.map_err(|error| io("open", &self.path().join(below), &error.into()))
    }

    /// Renames a file below it to a name that nothing has.
    pub(super) fn rename_new(&self, from: &Path, to: &Path) -> std::io::Result<()> {
        match durable::rename_new_at(self.dir(), from, to) {
            // a file system that cannot do that at once
            Err(error)
                if matches!(
                    Errno::from_io_error(&error),
                    Some(Errno::INVAL | Errno::NOSYS)
                ) =>
            {
                rustix::fs::linkat(self.dir(), from, self.dir(), to, AtFlags::empty())?;
                Ok(rustix::fs::unlinkat(self.dir(), from, AtFlags::empty())?)
            }
            renamed => renamed,
        }
    }

    /// Where a link below it leads; `None` where none is.
    pub(super) fn link_at(&self, below: &Path) -> Option<PathBuf> {
        let to = rustix::fs::readlinkat(&self.made.dir, below, Vec::new()).ok()?;
        Some(PathBuf::from(OsStr::from_bytes(to.to_bytes())))
    }

    /// Whether a link is below it.
    pub(in crate::restore) fn is_link(&self, below: &Path) -> bool {
        self.link_at(below).is_some()
    }

    /// Removes what does not stay, by its path behind `prefix`; how much that was.
    pub(super) fn sweep(
        &self,
        prefix: &Path,
        stays: &dyn Fn(&Path) -> Option<Stays>,
    ) -> Result<u64> {
        sweep_below(self.made.dir.as_fd(), prefix, stays)
            .map_err(|error| io("tidy up", self.path(), &error))
    }

    /// Closes it, and takes what is below it from its owner, who may still hold directories in it open.
    pub(super) fn seize(&self) -> Result<()> {
        let path = self.path();
        self.close()
            .map_err(|error| io("set the mode of", path, &error))?;
        if self.owner.is_none() {
            return Ok(());
        }
        let root = Owner { uid: 0, gid: 0 };
        take_below(self.made.dir.as_fd(), root)
            .map_err(|error| io("change the owner of what is in", path, &error))
    }

    /// Opens what is below it, to read; `None` where nothing is.
    pub(in crate::restore) fn open(&self, below: &Path) -> Result<Option<File>> {
        match self.open_with(below, OFlags::RDONLY) {
            Ok(file) => Ok(Some(file)),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(io("open", &self.path().join(below), &error.into())),
        }
    }

    fn open_with(&self, below: &Path, flags: OFlags) -> rustix::io::Result<File> {
        let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let opened = rustix::fs::openat(&self.made.dir, below, flags, Mode::RUSR | Mode::WUSR);
        opened.map(File::from)
    }

    /// Removes a file below it, and says whether it was there.
    pub(in crate::restore) fn remove(&self, below: &Path) -> Result<bool> {
        match rustix::fs::unlinkat(&self.made.dir, below, AtFlags::empty()) {
            Ok(()) => Ok(true),
            Err(Errno::NOENT) => Ok(false),
            Err(error) => Err(io("remove", &self.path().join(below), &error.into())),
        }
    }

    /// Lets the owner in, and gives what is below it to the owner.
    pub(super) fn lend(&self) -> Result<()> {
        self.give_contents()?;
        let given = give(&self.made.dir, self.owner);
        given.map_err(|error| io("change the owner of", self.path(), &error))
    }

    /// Nobody else may enter it from here on.
    pub(super) fn close(&self) -> std::io::Result<()> {
        if self.owner.is_some() {
            fchown(&self.made.dir, Some(0), Some(0))?;
        }
        self.made
            .dir
            .set_permissions(fs::Permissions::from_mode(0o700))
    }

    /// Gives what is below it to the owner, who cannot reach it yet.
    pub(in crate::restore) fn give_contents(&self) -> Result<()> {
        let Some(owner) = self.owner else {
            return Ok(());
        };
        give_below(self.made.dir.as_fd(), owner)
            .map_err(|error| io("change the owner of what is in", self.path(), &error))
    }

    /// Gives one thing below it to the owner.
    pub(in crate::restore) fn give_one(&self, below: &Path) -> Result<()> {
        let Some(owner) = self.owner else {
            return Ok(());
        };
        give_at(self.made.dir.as_fd(), below, owner).map_err(|error| {
            io(
                "change the owner of",
                &self.path().join(below),
                &error.into(),
            )
        })
    }

    /// Gives it to the owner, where its name still leads to it, with permissions as the server had them.
    pub(super) fn hand_over(&self, mode: u32) -> Result<()> {
        self.check_name()?;
        let set = rustix::fs::fchmod(&self.made.dir, permissions(mode) | PRIVATE);
        set.map_err(|error| io("set the mode of", self.path(), &error.into()))?;
        self.made.hand_over(self.owner)
    }

    /// Refuses a root whose name leads elsewhere by now: somebody moved it away.
    pub(super) fn check_name(&self) -> Result<()> {
        let path = self.path();
        let read = |error| io("read", path, &error);
        let named = fs::metadata(path).map_err(read)?;
        let held = self.made.dir.metadata().map_err(read)?;
        if (named.dev(), named.ino()) == (held.dev(), held.ino()) {
            return Ok(());
        }
        let shown = path.display();
        Err(
            Error::failure(format!("{shown} was replaced while it was restored"))
                .hint("see who writes to the folder above it, and restore again"),
        )
    }

    pub(super) fn is_empty(&self) -> bool {
        names(self.made.dir.as_fd()).is_ok_and(|names| names.is_empty())
    }

    pub(super) fn empty(&self) -> std::io::Result<()> {
        remove_below(self.made.dir.as_fd())
    }

    /// Leaves the place as it was found; it must be empty.
    pub(super) fn give_back(&self) {
        let before = match &self.before {
            Before::Absent => return self.made.remove(),
            Before::Filled => return,
            Before::Empty(before) => before,
        };
        let mut done = Ok(());
        if self.owner.is_some() {
            done = fchown(&self.made.dir, Some(before.uid()), Some(before.gid()));
        }
        let permissions = fs::Permissions::from_mode(before.mode() & 0o7777);
        let done = done.and_then(|()| self.made.dir.set_permissions(permissions));
        if let Err(error) = done {
            tracing::debug!("{} keeps its mode: {error}", self.path().display());
        }
    }
}

/// Who may read, write and execute; nothing that makes a program somebody else's.
fn permissions(mode: u32) -> Mode {
    Mode::from_raw_mode(mode & 0o777)
}

/// Where the files of a backup go: its tablespaces have roots of their own.
#[derive(Debug, Clone)]
pub(in crate::restore) struct Roots {
    pub(super) target: Arc<Root>,
    /// Where `pg_wal` leads, if it is a link.
    wal: Option<Arc<Root>>,
    tablespaces: BTreeMap<u32, Arc<Root>>,
}

impl Roots {
    pub(super) fn new(target: Arc<Root>) -> Self {
        Self {
            target,
            wal: None,
            tablespaces: BTreeMap::new(),
        }
    }

    pub(super) fn set_wal(&mut self, root: Arc<Root>) {
        self.wal = Some(root);
    }

    /// Where `pg_wal` leads, if it is a link.
    pub(super) fn wal(&self) -> Option<&Root> {
        self.wal.as_deref()
    }

    pub(super) fn add_tablespace(&mut self, oid: u32, root: Arc<Root>) {
        self.tablespaces.insert(oid, root);
    }

    pub(in crate::restore) fn target(&self) -> &Root {
        &self.target
    }

    /// Those of tablespaces, by OID.
    pub(super) fn tablespaces(&self) -> impl Iterator<Item = (u32, &Root)> {
        let roots = self.tablespaces.iter();
        roots.map(|(oid, root)| (*oid, root.as_ref()))
    }

    /// Whether this is the link to one of them.
    pub(super) fn is_tablespace(&self, path: &Path) -> bool {
        let oid = path.strip_prefix("pg_tblspc").ok().and_then(Path::to_str);
        let oid = oid.and_then(|oid| oid.parse().ok());
        oid.is_some_and(|oid: u32| self.tablespaces.contains_key(&oid))
    }

    /// The root that holds what a backup calls `path`, and the path below that: what lies behind
    /// the links `pg_tblspc/<oid>` and `pg_wal` is not looked up through them.
    pub(in crate::restore) fn find<'a>(&self, path: &'a Path) -> (&Root, &'a Path) {
        let behind_a_link = || {
            let mut parts = path.strip_prefix("pg_tblspc").ok()?.components();
            let oid = parts.next()?.as_os_str().to_str()?;
            let root = self.tablespaces.get(&oid.parse().ok()?)?;
            let below = parts.as_path();
            (!below.as_os_str().is_empty()).then_some((root.as_ref(), below))
        };
        let in_wal = || {
            let below = path.strip_prefix("pg_wal").ok()?;
            let root = self.wal.as_deref()?;
            (!below.as_os_str().is_empty()).then_some((root, below))
        };
        behind_a_link()
            .or_else(in_wal)
            .unwrap_or((&self.target, path))
    }
}

/// The folder that `path` is named in; what is missing of it is made.
fn open_parent(path: &Path, made: &mut Vec<Made>) -> Result<File> {
    let root = Path::new("/");
    let mut missing: Vec<&OsStr> = Vec::new();
    let mut at = path.parent().unwrap_or(root);
    let mut dir = loop {
        match open_dir(CWD, at.as_os_str(), true) {
            Ok(dir) => break dir,
            Err(Errno::NOENT) if at.file_name().is_some() => {
                missing.extend(at.file_name());
                at = at.parent().unwrap_or(root);
            }
            Err(error) => return Err(io("open", at, &error.into())),
        }
    };
    let mut place = at.to_owned();
    for name in missing.into_iter().rev() {
        place.push(name);
        let create = |error: Errno| io("create", &place, &error.into());
        rustix::fs::mkdirat(&dir, name, PRIVATE).map_err(create)?;
        let below = open_dir(&dir, name, false).map_err(create)?;
        let copy = below.try_clone();
        made.push(Made {
            parent: dir,
            name: name.to_owned(),
            dir: copy.map_err(|error| io("open", &place, &error))?,
            path: place.clone(),
        });
        dir = below;
    }
    Ok(dir)
}

pub(super) fn open_dir(at: impl AsFd, name: &OsStr, follow: bool) -> rustix::io::Result<File> {
    let mut flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    if !follow {
        flags |= OFlags::NOFOLLOW;
    }
    let opened = rustix::fs::openat(at, name, flags, Mode::empty());
    opened.map(File::from)
}

/// The names in a directory.
pub(super) fn names(dir: BorrowedFd<'_>) -> std::io::Result<Vec<CString>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(dir)? {
        let name = entry?.file_name().to_owned();
        if !matches!(name.to_bytes(), b"." | b"..") {
            names.push(name);
        }
    }
    Ok(names)
}

fn remove_below(dir: BorrowedFd<'_>) -> std::io::Result<()> {
    for name in names(dir)? {
        match rustix::fs::unlinkat(dir, &name, AtFlags::empty()) {
            Ok(()) => {}
            Err(Errno::ISDIR) => {
                let below = open_dir(dir, OsStr::from_bytes(name.to_bytes()), false)?;
                remove_below(below.as_fd())?;
                rustix::fs::unlinkat(dir, &name, AtFlags::REMOVEDIR)?;
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn sweep_below(
    dir: BorrowedFd<'_>,
    prefix: &Path,
    stays: &dyn Fn(&Path) -> Option<Stays>,
) -> std::io::Result<u64> {
    let mut removed = 0_u64;
    for name in names(dir)? {
        let as_os = OsStr::from_bytes(name.to_bytes());
        let path = prefix.join(as_os);
        let found = rustix::fs::statat(dir, &name, AtFlags::SYMLINK_NOFOLLOW)?;
        let file_type = FileType::from_raw_mode(found.st_mode);
        match (stays(&path), file_type) {
            (Some(Stays::Whatever), _) => continue,
            // with another name, somebody's copy would be written to; of others, or without these rights, nothing
            // could be
            (Some(Stays::File), FileType::RegularFile)
                if found.st_nlink == 1
                    && found.st_mode & 0o600 == 0o600
                    && found.st_uid == geteuid().as_raw() =>
            {
                continue;
            }
            (Some(Stays::Directory), FileType::Directory) => {
                let below = open_dir(dir, as_os, false)?;
                removed = removed.saturating_add(sweep_below(below.as_fd(), &path, stays)?);
                continue;
            }
            _ => {}
        }
        if file_type == FileType::Directory {
            let below = open_dir(dir, as_os, false)?;
            remove_below(below.as_fd())?;
            rustix::fs::unlinkat(dir, &name, AtFlags::REMOVEDIR)?;
        } else {
            rustix::fs::unlinkat(dir, &name, AtFlags::empty())?;
        }
        removed = removed.saturating_add(1);
    }
    Ok(removed)
}

/// Takes what is in a directory, a directory before what is in it: nobody else changes it then.
fn take_below(dir: BorrowedFd<'_>, root: Owner) -> std::io::Result<()> {
    for name in names(dir)? {
        let as_os = OsStr::from_bytes(name.to_bytes());
        give_at(dir, Path::new(as_os), root)?;
        let found = rustix::fs::statat(dir, &name, AtFlags::SYMLINK_NOFOLLOW)?;
        if FileType::from_raw_mode(found.st_mode) == FileType::Directory {
            take_below(open_dir(dir, as_os, false)?.as_fd(), root)?;
        }
    }
    Ok(())
}

/// Gives what is in a directory to the owner, what is deepest first.
fn give_below(dir: BorrowedFd<'_>, owner: Owner) -> std::io::Result<()> {
    for name in names(dir)? {
        let found = rustix::fs::statat(dir, &name, AtFlags::SYMLINK_NOFOLLOW)?;
        if FileType::from_raw_mode(found.st_mode) == FileType::Directory {
            let below = open_dir(dir, OsStr::from_bytes(name.to_bytes()), false)?;
            give_below(below.as_fd(), owner)?;
        }
        give_at(dir, Path::new(OsStr::from_bytes(name.to_bytes())), owner)?;
    }
    Ok(())
}

fn give_at(dir: BorrowedFd<'_>, name: &Path, owner: Owner) -> rustix::io::Result<()> {
    let (uid, gid) = (Uid::from_raw(owner.uid), Gid::from_raw(owner.gid));
    rustix::fs::chownat(dir, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
}

/// Gives an open file or directory to the owner, where one is set.
pub(super) fn give(file: &File, owner: Option<Owner>) -> std::io::Result<()> {
    owner.map_or(Ok(()), |owner| {
        fchown(file, Some(owner.uid), Some(owner.gid))
    })
}
