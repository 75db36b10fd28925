//! A journal of objects that are soon superseded: what makes them durable with one synced write
//! that many of them share, instead of two syncs each.
//!
//! An object is appended to the journal, the journal is synced, and only then does the object get
//! its name, by itself unsynced: whatever a power cut makes of it, the journal has its bytes. The
//! journal has two halves. Before one is filled again, what still exists of its objects is synced;
//! most are gone by then, and never were.

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path as FilePath, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use aws_lc_rs::rand::{SecureRandom as _, SystemRandom};

use super::frame::{ALIGNED, Frame, Note};
use super::{Root, STAGING};
use crate::durable::{self, Staged};

/// The folder of a repository that journals lie in.
pub(super) const JOURNALS: &str = ".journal";
/// What a journal's name begins with: the version of its frames.
pub(super) const VERSION: &str = "1-";

/// Objects larger than this are stored without a journal: writing them twice costs more than a sync.
pub(super) const OBJECT_BYTES_MAX: usize = 256 << 10;
/// One half. Large enough that little of it exists when the other is full, small enough to be read
/// and synced in a moment.
const HALF_BYTES: u64 = 8 << 20;
/// Left free by objects: a half that is full can still say what is gone.
const RESERVED_BYTES: u64 = 64 << 10;

/// Makes what was written to the journal durable.
pub(super) type Sync = Box<dyn Fn(&File) -> io::Result<()> + Send + std::marker::Sync>;

/// Makes objects of a folder durable by themselves.
pub(super) type SyncObjects =
    Box<dyn Fn(&FilePath, &[String]) -> io::Result<()> + Send + std::marker::Sync>;

/// How a journal is made.
pub(super) struct Settings {
    pub(super) half_bytes: u64,
    pub(super) sync: Sync,
    pub(super) sync_objects: SyncObjects,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            half_bytes: HALF_BYTES,
            sync: Box::new(durable::sync_data),
            sync_objects: Box::new(sync_objects),
        }
    }
}

/// A journal of this process. Dropping it makes everything in it durable by itself, and removes it.
#[derive(Debug)]
pub(super) struct Journal {
    shared: Arc<Shared>,
}

struct Shared {
    root: Root,
    path: PathBuf,
    /// Locked for as long as it is open: so others see that its owner lives.
    file: File,
    salt: u64,
    settings: Settings,
    state: Mutex<State>,
    /// An object has got its name, or will have none.
    changed: Condvar,
}

struct State {
    halves: [Half; 2],
    /// The half that is being filled.
    current: usize,
    epoch: u64,
    /// How many frames were written, and how many of them are durable: durable <= written.
    written: u64,
    durable: u64,
    /// A sync failed: nothing more is entrusted to it.
    broken: bool,
    closed: bool,
    /// The objects that are durable through the journal alone.
    objects: HashMap<String, Within>,
    /// What makes a half's objects durable.
    workers: Vec<JoinHandle<()>>,
}

/// Where an object is in the journal.
#[derive(Clone, Copy)]
struct Within {
    half: usize,
    /// It can be read under its path.
    named: bool,
}

struct Half {
    epoch: u64,
    /// How many bytes of it are filled.
    filled: u64,
    /// How many frames, and how many of all were written before its first.
    frames: u64,
    written_before: u64,
    /// Nothing in it is needed.
    free: bool,
    /// Its objects could not be made durable by themselves. A disk says that once: asked again, it
    /// says nothing of what it has lost, so the journal is all there is of them.
    is_kept: bool,
    /// How many of its objects do not have their names yet.
    nameless: usize,
}

impl Half {
    fn new(epoch: u64, written_before: u64, free: bool) -> Self {
        Self {
            epoch,
            filled: 0,
            frames: 0,
            written_before,
            free,
            is_kept: false,
            nameless: 0,
        }
    }
}

/// An object that was appended, and has no name yet.
pub(super) struct Entry<'a> {
    shared: &'a Arc<Shared>,
    path: &'a str,
    half: usize,
    /// How many frames are written with this one.
    through: u64,
}

impl Journal {
    /// Makes a new one. An error where the file system cannot tell whether its owner lives.
    pub(super) fn create(root: &Root, settings: Settings) -> io::Result<Self> {
        let salt = salt()?;
        let (staging, folder) = (root.folder.join(STAGING), root.folder.join(JOURNALS));
        // never the root: where that is gone, its disk was taken away. Whoever made them may have been
        // stopped before they were durable
        durable::create_dir(&staging)?;
        durable::create_dir(&folder)?;
        let path = folder.join(name(salt));
        let file = Staged::zeros(&staging, settings.half_bytes.saturating_mul(2))?;
        let file = file.create_and_keep(&path)?;
        Ok(Self {
            shared: Arc::new(Shared {
                root: root.clone(),
                path,
                file,
                salt,
                settings,
                state: Mutex::new(State {
                    halves: [Half::new(1, 0, false), Half::new(0, 0, true)],
                    current: 0,
                    epoch: 1,
                    written: 0,
                    durable: 0,
                    broken: false,
                    closed: false,
                    objects: HashMap::new(),
                    workers: Vec::new(),
                }),
                changed: Condvar::new(),
            }),
        })
    }

    /// Appends an object, which is not durable yet. `None` where it has to be stored in the ordinary
    /// way: the journal is full, or cannot be written, or has another object under this path.
    pub(super) fn append<'a>(&'a self, path: &'a str, object: &[u8]) -> Option<Entry<'a>> {
        if object.len() > OBJECT_BYTES_MAX {
            return None;
        }
        let shared = &self.shared;
        let mut state = shared.lock();
        if state.objects.contains_key(path) || !shared.make_room(&mut state, path, object) {
            return None;
        }
        let written = shared.write(&mut state, Note::Put { path, object });
        if let Err(error) = written {
            tracing::debug!("cannot write to {}: {error}", shared.path.display());
            return None;
        }
        let half = state.current;
        let within = Within { half, named: false };
        state.objects.insert(path.to_owned(), within);
        state.halves[half].nameless += 1;
        Some(Entry {
            shared,
            path,
            half,
            through: state.written,
        })
    }

    /// Makes everything in it durable by itself, and removes it: nothing more is taken.
    pub(super) fn close(&self) -> io::Result<()> {
        let shared = &self.shared;
        shared.lock().closed = true;
        (0..2).try_for_each(|half| shared.empty(half))?;
        match durable::remove(&shared.path) {
            // by another call
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            removed => removed,
        }
    }

    /// Notes that an object is about to be removed. Nothing waits for that to be durable: what comes
    /// back after a power cut is superseded.
    pub(super) fn gone(&self, path: &str) {
        let shared = &self.shared;
        let mut state = shared.lock();
        // what has no name yet is not what is removed
        if state.objects.get(path).is_some_and(|within| within.named)
            && state.objects.remove(path).is_some()
            && let Err(error) = shared.write(&mut state, Note::Gone { path })
        {
            tracing::debug!("cannot write to {}: {error}", shared.path.display());
        }
    }
}

impl Entry<'_> {
    /// Returns once the object is durable, and all that were appended before.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.shared.sync_through(self.through)
    }

    /// Notes that it can be read under its path now.
    pub(super) fn named(self) {
        if let Some(within) = self.shared.lock().objects.get_mut(self.path) {
            within.named = true;
        }
    }

    /// The object has no name and is not to have one: notes it, durably.
    pub(super) fn withdraw(self) -> io::Result<()> {
        let mut state = self.shared.lock();
        state.objects.remove(self.path);
        self.shared
            .write(&mut state, Note::Gone { path: self.path })?;
        let through = state.written;
        drop(state);
        self.shared.sync_through(through)
    }
}

impl Drop for Entry<'_> {
    fn drop(&mut self) {
        self.shared.lock().halves[self.half].nameless -= 1;
        self.shared.changed.notify_all();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        let waited = self.changed.wait(state);
        waited.unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the object fits, in the other half perhaps, which is taken then.
    fn make_room(self: &Arc<Self>, state: &mut State, path: &str, object: &[u8]) -> bool {
        let Some(bytes) = Frame::encoded_bytes(&Note::Put { path, object }) else {
            return false;
        };
        let needed = u64::try_from(bytes).map_or(u64::MAX, |bytes| bytes + RESERVED_BYTES);
        let (full, other) = (state.current, 1 - state.current);
        if state.broken || state.closed || needed > self.settings.half_bytes {
            return false;
        }
        if needed <= self.settings.half_bytes - state.halves[full].filled {
            return true;
        }
        if !state.halves[other].free {
            return false;
        }
        state.epoch += 1;
        state.halves[other] = Half::new(state.epoch, state.written, false);
        state.current = other;
        self.empty_later(state, full);
        true
    }

    /// Appends a frame to the half that is being filled.
    fn write(&self, state: &mut State, note: Note<'_>) -> io::Result<()> {
        let number = state.current;
        let half = &state.halves[number];
        let frame = Frame {
            epoch: half.epoch,
            sequence: half.frames,
            durable: state.durable.saturating_sub(half.written_before),
            note,
        };
        let no_room = || io::Error::from(io::ErrorKind::StorageFull);
        let bytes = frame.encode(self.salt).ok_or_else(no_room)?;
        let length = u64::try_from(bytes.len()).map_err(io::Error::other)?;
        let start = if number == 0 {
            0
        } else {
            self.settings.half_bytes
        };
        if state.broken || length > self.settings.half_bytes - half.filled {
            return Err(no_room());
        }
        self.file.write_all_at(&bytes, start + half.filled)?;
        let half = &mut state.halves[number];
        half.filled += length;
        half.frames += 1;
        state.written += 1;
        Ok(())
    }

    /// Syncs everything that is written, unless that was done since.
    fn sync_through(self: &Arc<Self>, through: u64) -> io::Result<()> {
        let state = self.lock();
        if state.durable >= through {
            return Ok(());
        }
        if state.broken {
            return Err(io::Error::other("the journal could not be synced"));
        }
        let written = state.written;
        drop(state);
        let synced = (self.settings.sync)(&self.file).and_then(|()| self.check());
        let mut state = self.lock();
        match &synced {
            Ok(()) => state.durable = state.durable.max(written),
            Err(error) => {
                tracing::warn!(
                    "{} could not be synced: {error}; every object is synced by itself from now on",
                    self.path.display()
                );
                state.broken = true;
                // what shares a block with what could not be written
                (0..2).for_each(|half| self.empty_later(&mut state, half));
            }
        }
        synced
    }

    /// An error where nobody would find the journal after a power cut.
    fn check(&self) -> io::Result<()> {
        if durable::links(&self.file)? > 0 {
            return Ok(());
        }
        Err(io::Error::other("somebody has removed it"))
    }

    /// Makes a half's objects durable by themselves, in the background.
    fn empty_later(self: &Arc<Self>, state: &mut State, half: usize) {
        let shared = Arc::clone(self);
        let work = move || {
            if let Err(error) = shared.empty(half) {
                tracing::warn!(
                    "what {} holds could not be synced: {error}; it stays, and is played back when \
                     the repository is opened again",
                    shared.path.display()
                );
            }
        };
        match std::thread::Builder::new()
            .name("journal".to_owned())
            .spawn(work)
        {
            Ok(worker) => {
                state.workers.retain(|worker| !worker.is_finished());
                state.workers.push(worker);
            }
            Err(error) => tracing::debug!("no thread for the journal: {error}"),
        }
    }

    /// Makes a half's objects durable by themselves; then it may be filled again.
    fn empty(&self, half: usize) -> io::Result<()> {
        let mut state = self.lock();
        while state.halves[half].nameless > 0 {
            state = self.wait(state);
        }
        if state.halves[half].free {
            return Ok(());
        }
        if state.halves[half].is_kept {
            return Err(io::Error::other("what it holds could not be synced before"));
        }
        let epoch = state.halves[half].epoch;
        let within = state
            .objects
            .iter()
            .filter(|(_, within)| within.half == half);
        let paths: Vec<String> = within.map(|(path, _)| path.clone()).collect();
        drop(state);
        let synced = self
            .root
            .check()
            .and_then(|()| (self.settings.sync_objects)(&self.root.folder, &paths))
            .and_then(|()| self.root.check());
        let mut state = self.lock();
        if let Err(error) = synced {
            state.halves[half].is_kept = true;
            return Err(error);
        }
        state.objects.retain(|_, within| within.half != half);
        state.halves[half].free = true;
        if state.current != half
            && let Err(error) = self.write(&mut state, Note::Safe { epoch })
        {
            // played back, it would bring back what was removed since
            tracing::debug!("cannot write to {}: {error}", self.path.display());
        }
        Ok(())
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        let workers = std::mem::take(&mut self.shared.lock().workers);
        let joined: Vec<_> = workers.into_iter().map(JoinHandle::join).collect();
        if joined.iter().any(Result::is_err) {
            return;
        }
        if let Err(error) = self.close() {
            tracing::debug!("{} stays: {error}", self.shared.path.display());
        }
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Journal")
            .field("path", &self.path)
            .finish_non_exhaustive()
    }
}

/// What nobody knows who could have put frames of his own making into an object.
fn salt() -> io::Result<u64> {
    let mut salt = [0; 8];
    match SystemRandom::new().fill(&mut salt) {
        Ok(()) => Ok(u64::from_le_bytes(salt)),
        Err(aws_lc_rs::error::Unspecified) => Err(io::Error::other("no random bytes")),
    }
}

/// The name of the journal with this salt.
pub(super) fn name(salt: u64) -> String {
    format!("{VERSION}{salt:016x}")
}

/// Syncs those of the objects that are there, and the folders that they are in.
pub(super) fn sync_objects(folder: &FilePath, paths: &[String]) -> io::Result<()> {
    let mut folders = BTreeSet::new();
    for path in paths {
        let path = folder.join(path);
        folders.extend(path.parent().map(FilePath::to_owned));
        match File::open(&path) {
            Ok(file) => durable::sync_file(&file)?,
            // superseded, and removed by another process
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    folders
        .iter()
        .try_for_each(|folder| durable::sync_dir(folder))
}

const _: () = assert!(HALF_BYTES.is_multiple_of(ALIGNED as u64));
