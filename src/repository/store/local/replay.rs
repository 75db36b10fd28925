//! What is made of the journals of others. Of those that killed processes left, every object is there,
//! and whole, before anything is read. Of those of living ones, what has no file yet is read from the
//! journal.
//!
//! A journal is left by a kill, where the newest objects have no files yet, or by a power cut, where
//! others may be torn or gone besides. Either way it is played back by whoever opens the folder next,
//! and removed.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{File, Metadata, OpenOptions, TryLockError};
use std::io::{self, Read as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path as FilePath, PathBuf};

use bytes::Bytes;
use object_store::path::Path;
use rustix::fs::OFlags;

use super::frame::{self, Frame, FrameId, Note};
use super::journal::{self, JOURNALS, OBJECT_BYTES_MAX, VERSION};
use super::{STAGING, is_ours};
use crate::durable::{self, Staged};

/// What is locked where folders cannot be.
const LOCK: &str = "lock";

/// A writer that lives fills a half from its beginning: behind so many zeros there is nothing.
const LOOKED_AT_TOGETHER: usize = 64 << 10;

/// What is larger is no copy of what was put.
const COPY_BYTES_MAX: usize = 2 * OBJECT_BYTES_MAX;

/// A journal that is larger was not made by us.
const JOURNAL_BYTES_MAX: u64 = 256 << 20;

/// Plays back the journals in a repository's folder whose owners live no longer.
///
/// A journal that cannot be played back is an error: what it holds may be all there is.
pub(super) fn play_back_all(folder: &FilePath) -> io::Result<()> {
    let journals = folder.join(JOURNALS);
    match std::fs::symlink_metadata(&journals) {
        Ok(found) if found.is_dir() => {}
        Ok(_) => return Ok(()),
        // what is no folder holds no journals; whoever opens it says what it is
        Err(error) if is_no_folder(&error) => return Ok(()),
        Err(error) => return Err(unseen(&journals, &error)),
    }
    let found = journals_in(&journals).map_err(|error| unseen(&journals, &error))?;
    if found.is_empty() {
        return Ok(());
    }
    // another process that plays back is waited for: what it plays back is locked as by its owner
    let _alone = alone(&journals).map_err(|error| unseen(&journals, &error))?;
    for (path, salt) in journals_in(&journals).map_err(|error| unseen(&journals, &error))? {
        play_back(folder, &path, salt).map_err(|error| told(&path, &error))?;
    }
    Ok(())
}

/// What the journals in a repository's folder hold, but for `own`, of objects that have no files yet.
///
/// Whoever reads must look at the journals first and list files then: an object leaves a journal only
/// once it has a file, or what supersedes it is stored.
pub(super) fn nameless_in(
    folder: &FilePath,
    own: Option<&FilePath>,
) -> io::Result<HashMap<String, Bytes>> {
    let journals = folder.join(JOURNALS);
    let found = match journals_in(&journals) {
        Ok(found) => found,
        Err(error) if is_no_folder(&error) => return Ok(HashMap::new()),
        Err(error) => return Err(unseen(&journals, &error)),
    };
    let mut nameless = HashMap::new();
    for (path, salt) in found {
        if own == Some(path.as_path()) {
            continue;
        }
        let (before, bytes) = match look(&path) {
            Ok(looks) => looks,
            // played back, or settled
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(unread(&path, &error)),
        };
        // what was removed after the first look may have been superseded by what came after it, and was not
        // seen where it came while we read: only what was removed before is gone
        let mut halves = newest_of(salt, &bytes);
        if before != bytes {
            let before = newest_of(salt, &before);
            let removals = before.iter().flatten().filter(|frame| frame.is_removal());
            let removals: BTreeSet<FrameId> = removals
                .map(|frame| (frame.epoch, frame.sequence))
                .collect();
            let is_gone = |id: &FrameId| removals.contains(id);
            for half in &mut halves {
                half.retain(|frame| !frame.is_removal() || is_gone(&(frame.epoch, frame.sequence)));
            }
        }
        let last = Last::of(halves);
        let without_files = last.put.iter().filter(|(_, put)| !put.has_file);
        nameless.extend(
            without_files
                .filter(|(path, _)| parsed(path).is_some())
                .map(|(path, put)| ((*path).to_owned(), Bytes::copy_from_slice(put.object))),
        );
    }
    Ok(nameless)
}

/// The bytes of a journal's halves, as far as they were ever filled.
type Halves = [Vec<u8>; 2];

/// What somebody else's journal has in its halves, as it was, and as it is a moment later: that is
/// durable.
fn look(path: &FilePath) -> io::Result<(Halves, Halves)> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(no_follow())
        .open(path)?;
    let half_bytes = checked_length(&file.metadata()?)? / 2;
    let look = || -> io::Result<_> {
        Ok([
            read_filled(&file, 0, half_bytes)?,
            read_filled(&file, half_bytes, half_bytes)?,
        ])
    };
    let (before, bytes) = (look()?, look()?);
    // its owner acknowledges nothing that is not synced, and nothing else is to be seen
    match durable::sync_data(&file) {
        Err(error) if is_read_only(&error) => {}
        synced => synced?,
    }
    Ok((before, bytes))
}

fn newest_of(salt: u64, halves: &Halves) -> [Vec<Frame<'_>>; 2] {
    halves.each_ref().map(|half| frame::newest(salt, half))
}

fn halves(salt: u64, bytes: &[u8]) -> [Vec<Frame<'_>>; 2] {
    let (first, second) = bytes.split_at(bytes.len() / 2);
    [frame::newest(salt, first), frame::newest(salt, second)]
}

/// Locks the folder of the journals; a network file system locks no folders, but files that are
/// open for writing.
fn alone(journals: &FilePath) -> io::Result<File> {
    let folder = File::open(journals)?;
    if folder.lock().is_ok() {
        return Ok(folder);
    }
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(no_follow())
        .open(journals.join(LOCK))?;
    file.lock()?;
    Ok(file)
}

fn unseen(journals: &FilePath, error: &io::Error) -> io::Error {
    io::Error::new(
        error.kind(),
        format!(
            "cannot see what journals are in {}: {error}",
            journals.display()
        ),
    )
}

fn unread(journal: &FilePath, error: &io::Error) -> io::Error {
    io::Error::new(
        error.kind(),
        format!("cannot read the journal {}: {error}", journal.display()),
    )
}

fn told(journal: &FilePath, error: &io::Error) -> io::Error {
    io::Error::new(
        error.kind(),
        format!(
            "the journal {} was left by a kill or a power cut and has to be played back before \
             anything is read: {error}",
            journal.display()
        ),
    )
}

/// The journals, with their salts.
fn journals_in(folder: &FilePath) -> io::Result<BTreeMap<PathBuf, u64>> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name();
        let Some((version, salt)) = name.to_str().and_then(|name| name.split_once('-')) else {
            continue;
        };
        let Ok(salt) = u64::from_str_radix(salt, 16) else {
            continue;
        };
        let Ok(version) = version.parse::<u32>() else {
            continue;
        };
        if version > VERSION {
            return Err(io::Error::other(format!(
                "{} is of a later version: upgrade anywhen",
                entry.path().display()
            )));
        }
        if name.to_str() == Some(format!("{version}-{salt:016x}").as_str()) {
            found.insert(entry.path(), salt);
        }
    }
    Ok(found)
}

/// Plays back one journal and removes it, if nobody owns it.
fn play_back(folder: &FilePath, path: &FilePath, salt: u64) -> io::Result<()> {
    let file = match owned(path) {
        Ok(Some(file)) => file,
        // what lives sees its own objects, and everybody else does
        Ok(None) => return Ok(()),
        // its owner was faster
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    let metadata = file.metadata()?;
    if metadata.nlink() == 0 {
        return Ok(());
    }
    let bytes = read(&file, &metadata)?;
    let last = Last::of(halves(salt, &bytes));
    if last.lost > 0 {
        tracing::error!(
            "{} is damaged: {} of its objects or removals are lost",
            path.display(),
            last.lost
        );
    }
    let mut repair = Repair::new(folder, (metadata.uid(), metadata.gid()))?;
    let mut left = 0_u64;
    for (path, put) in &last.put {
        match repair.put(path, put) {
            // it is read from the journal until somebody comes who may write
            Err(error) if is_read_only(&error) && repair.is_missing(path) => left += 1,
            done => done?,
        }
    }
    if left > 0 {
        tracing::debug!("{} stays: objects without files={left}", path.display());
        return repair.finish();
    }
    for (path, object) in &last.gone {
        repair.gone(path, object)?;
    }
    repair.finish()?;
    if repair.conflicts > 0 {
        // no journal by this name: for people to look at
        return durable::rename(path, &path.with_extension("conflict"));
    }
    match durable::remove(path) {
        Err(error) if repair.written == 0 && is_read_only(&error) => {
            // everything in it is there, so it can be read; whoever may write removes it
            tracing::debug!("{} stays: {error}", path.display());
            Ok(())
        }
        removed => removed,
    }
}

/// Opens a journal and becomes its owner; `None` where it has one.
fn owned(path: &FilePath) -> io::Result<Option<File>> {
    let mut options = OpenOptions::new();
    options.read(true).custom_flags(no_follow());
    let file = options.open(path)?;
    let locked = match file.try_lock() {
        // a network file system locks what is open for writing
        Err(TryLockError::Error(_)) => {
            let file = options.write(true).open(path)?;
            file.try_lock().map(|()| file)
        }
        locked => locked.map(|()| file),
    };
    match locked {
        Ok(file) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

fn is_no_folder(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
    )
}

fn is_read_only(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::PermissionDenied
    )
}

fn no_follow() -> i32 {
    OFlags::NOFOLLOW.bits().cast_signed()
}

/// What is written of a half: as far as it is not zeros, as it was made.
fn read_filled(file: &File, start: u64, bytes: u64) -> io::Result<Vec<u8>> {
    let mut filled = Vec::new();
    let mut chunk = vec![0; LOOKED_AT_TOGETHER];
    let mut left = usize::try_from(bytes).map_err(io::Error::other)?;
    while left > 0 {
        let wanted = chunk
            .get_mut(..left.min(LOOKED_AT_TOGETHER))
            .unwrap_or_default();
        let at = start + u64::try_from(filled.len()).map_err(io::Error::other)?;
        file.read_exact_at(wanted, at)?;
        if wanted.iter().all(|byte| *byte == 0) {
            break;
        }
        filled.extend_from_slice(wanted);
        left -= wanted.len();
    }
    Ok(filled)
}

/// How long a journal is, which was made by us.
fn checked_length(metadata: &Metadata) -> io::Result<u64> {
    if !metadata.is_file() || metadata.len() > JOURNAL_BYTES_MAX {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!(
                "it is no journal: bytes={}, most={JOURNAL_BYTES_MAX}",
                metadata.len()
            ),
        ));
    }
    Ok(metadata.len())
}

fn read(mut file: &File, metadata: &Metadata) -> io::Result<Vec<u8>> {
    checked_length(metadata)?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// An object that was put, and is there at last.
#[derive(Debug, Clone, Copy)]
struct Put<'a> {
    frame: FrameId,
    object: &'a [u8],
    has_file: bool,
}

/// What a journal says at last of each path.
#[derive(Debug, Default)]
struct Last<'a> {
    put: BTreeMap<&'a str, Put<'a>>,
    /// Where the objects of frames were put.
    paths: BTreeMap<FrameId, &'a str>,
    /// With what was put there before.
    gone: BTreeMap<&'a str, &'a [u8]>,
    /// How many frames that were durable are not there.
    lost: u64,
}

impl<'a> Last<'a> {
    fn of(mut halves: [Vec<Frame<'a>>; 2]) -> Self {
        halves.sort_by_key(|half| half.first().map(|frame| frame.epoch));
        let safe: BTreeSet<u64> = halves
            .iter()
            .flatten()
            .filter_map(|frame| match frame.note {
                Note::Safe { epoch } => Some(epoch),
                _ => None,
            })
            .collect();
        let mut last = Self::default();
        for frames in halves {
            if frames
                .first()
                .is_some_and(|first| safe.contains(&first.epoch))
            {
                continue;
            }
            let durable = frames.iter().map(|frame| frame.durable).max().unwrap_or(0);
            let there = frames
                .iter()
                .filter(|frame| frame.sequence < durable)
                .count();
            let there = u64::try_from(there).unwrap_or(u64::MAX);
            last.lost = last.lost.saturating_add(durable.saturating_sub(there));
            for frame in frames {
                last.take(&frame);
            }
        }
        last
    }

    fn take(&mut self, frame: &Frame<'a>) {
        let id = (frame.epoch, frame.sequence);
        match frame.note {
            Note::Put { path, object } => {
                self.gone.remove(path);
                let put = Put {
                    frame: id,
                    object,
                    has_file: false,
                };
                self.put.insert(path, put);
                self.paths.insert(id, path);
            }
            Note::Gone { path } => self.is_gone(path),
            Note::Removed { frames } => {
                for path in self.meant(frames) {
                    self.is_gone(path);
                }
            }
            Note::Named { frames } => {
                for path in self.meant(frames) {
                    if let Some(put) = self.put.get_mut(path) {
                        put.has_file = true;
                    }
                }
            }
            Note::Safe { .. } => {}
        }
    }

    fn is_gone(&mut self, path: &'a str) {
        if let Some(put) = self.put.remove(path) {
            self.gone.insert(path, put.object);
        }
    }

    /// The paths that are meant, where nothing was put there since.
    fn meant(&self, frames: frame::Runs<'a>) -> Vec<&'a str> {
        // as they are written: one behind the other, so that nothing is meant twice
        let mut reached = (0, 0);
        let ranges = frames.ranges().filter(move |range| {
            let follows = range.start >= reached && range.start < range.end;
            if follows {
                reached = range.end;
            }
            follows
        });
        let meant = ranges.flat_map(|range| self.paths.range(range));
        let is_last = |id: &FrameId, path: &str| {
            let put = self.put.get(path);
            put.is_some_and(|put| put.frame == *id)
        };
        let meant = meant.filter(|(id, path)| is_last(id, path));
        meant.map(|(_, path)| *path).collect()
    }
}

/// What lies under an object's path.
pub(super) enum There {
    Nothing,
    /// The same bytes, as far as memory has them: a disk that could not write them may say so once
    /// only, and to nobody who asks now.
    Same,
    /// Some of them: it was torn.
    Torn,
    /// An object that is whole by its own checksums, with this digest of its content: another process
    /// was faster, and it is durable.
    Whole(String),
    /// Something that is not ours to touch.
    Other,
}

/// Puts a folder right.
struct Repair<'a> {
    folder: &'a FilePath,
    resolved: PathBuf,
    /// The user and the group of the journal: what root puts right stays theirs.
    owner: (u32, u32),
    /// What is there, and has to be synced.
    same: Vec<String>,
    written: u64,
    /// How many are stored with another content.
    conflicts: u64,
}

impl<'a> Repair<'a> {
    fn new(folder: &'a FilePath, owner: (u32, u32)) -> io::Result<Self> {
        Ok(Self {
            folder,
            resolved: folder.canonicalize()?,
            owner,
            same: Vec::new(),
            written: 0,
            conflicts: 0,
        })
    }

    fn put(&mut self, path: &str, put: &Put<'_>) -> io::Result<()> {
        let Some(at) = self.place(path) else {
            return Ok(());
        };
        let object = put.object;
        match found(&at, object)? {
            There::Same => match self.stage(object).and_then(|staged| staged.replace(&at)) {
                Err(error) if is_read_only(&error) => self.same.push(path.to_owned()),
                replaced => replaced?,
            },
            There::Other if put.has_file => {}
            // the journal is all that there is of it
            There::Other => self.is_in_conflict(path),
            There::Whole(theirs) => self.compare(path, object, &theirs),
            There::Torn => {
                self.stage(object)?.replace(&at)?;
                self.written += 1;
            }
            There::Nothing => {
                if let Some(parent) = at.parent() {
                    durable::create_dir_all(parent)?;
                }
                match self.stage(object)?.create(&at) {
                    Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                    created => created?,
                }
                self.written += 1;
            }
        }
        Ok(())
    }

    /// Whether nothing is there.
    fn is_missing(&self, path: &str) -> bool {
        let found = self.place(path).map(std::fs::symlink_metadata);
        matches!(found, Some(Err(error)) if error.kind() == io::ErrorKind::NotFound)
    }

    /// A whole object is there already. With another content it is another history, and ours was
    /// acknowledged, perhaps.
    fn compare(&mut self, path: &str, object: &[u8], theirs: &str) {
        let ours = container::check_stored(object);
        if ours.is_ok_and(|(_, ours)| ours.digest != theirs) {
            self.is_in_conflict(path);
        }
    }

    fn is_in_conflict(&mut self, path: &str) {
        tracing::error!(
            "{path} is stored with another content than the journal has: two histories; the journal \
             is kept"
        );
        self.conflicts += 1;
    }

    fn stage(&self, object: &[u8]) -> io::Result<Staged> {
        let staging = self.folder.join(STAGING);
        durable::create_dir_all(&staging)?;
        let staged = Staged::write(&staging, object)?;
        staged.give_to(self.owner)?;
        Ok(staged)
    }

    /// What was removed may have come back torn.
    fn gone(&mut self, path: &str, object: &[u8]) -> io::Result<()> {
        if let Some(at) = self.place(path)
            && matches!(found(&at, object)?, There::Torn)
        {
            durable::remove(&at)?;
            self.written += 1;
        }
        Ok(())
    }

    /// Where the object lies; `None` where that is no place in this folder.
    fn place(&self, path: &str) -> Option<PathBuf> {
        let at = parsed(path).map(|_| self.folder.join(path));
        let within = at.filter(|at| {
            let mut above = at.ancestors().skip(1);
            let nearest = above.find_map(|above| above.canonicalize().ok());
            nearest.is_some_and(|nearest| nearest.starts_with(&self.resolved))
        });
        if within.is_none() {
            tracing::warn!("a journal names what is no place in this repository: {path:?}");
        }
        within
    }

    fn finish(&self) -> io::Result<()> {
        journal::sync_objects(self.folder, &self.same)?;
        if self.written > 0 {
            tracing::info!(
                "{}: {} objects that a power cut had torn or lost were put right from the journal",
                self.folder.display(),
                self.written
            );
        }
        Ok(())
    }
}

/// The path of an object, where it is one.
pub(super) fn parsed(path: &str) -> Option<Path> {
    let parsed = Path::parse(path).ok()?;
    (parsed.as_ref() == path && !path.is_empty() && !is_ours(&parsed)).then_some(parsed)
}

/// What lies at `path`, where `object` was put.
pub(super) fn found(path: &FilePath, object: &[u8]) -> io::Result<There> {
    let metadata = match std::fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(There::Nothing),
        Err(error) => return Err(error),
    };
    let length = usize::try_from(metadata.len()).unwrap_or(usize::MAX);
    // another archiver's copy may be longer: it was encoded otherwise
    if !metadata.is_file() || length > COPY_BYTES_MAX {
        return Ok(There::Other);
    }
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(no_follow())
        .open(path)?;
    let mut bytes = Vec::new();
    file.take(metadata.len()).read_to_end(&mut bytes)?;
    Ok(if bytes == object {
        There::Same
    } else if let Ok((_, trailer)) = container::check_stored(&bytes) {
        There::Whole(trailer.digest)
    } else if bytes.len() <= object.len() {
        There::Torn
    } else {
        There::Other
    })
}
