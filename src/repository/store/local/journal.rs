//! A journal of objects that are soon superseded: what makes them durable with one synced write
//! that many of them share, instead of two syncs each, and most of them without a file of their own.
//!
//! An object is appended to the journal, and counts once that is synced. It gets its file and its name
//! later, by itself unsynced, where it has not been superseded by then: whatever a power cut makes of
//! it, the journal has its bytes. Until then it is read from the journal. The journal has two halves.
//! Before one is filled again, what still exists of its objects has files, and they are synced; most
//! are gone by then, and never were.

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::fs::File;
use std::io;
use std::path::{Path as FilePath, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use aws_lc_rs::rand::{SecureRandom as _, SystemRandom};
use bytes::Bytes;

use super::blocks::{BLOCK, Blocks, set_direct};
use super::frame::{Frame, FrameId, Note, Runs, runs_of};
use super::replay::{self, There};
use super::{Root, STAGING};
use crate::durable::{self, Staged};

/// The folder of a repository that journals lie in.
pub(super) const JOURNALS: &str = ".journal";
/// The version of its frames. Those of version 1 had no objects without files.
pub(super) const VERSION: u32 = 2;

/// Objects larger than this are stored without a journal: writing them twice costs more than a sync.
pub(super) const OBJECT_BYTES_MAX: usize = 256 << 10;
/// One half. Large enough that little of it exists when the other is full, small enough to be read
/// and synced in a moment.
const HALF_BYTES: u64 = 8 << 20;
/// Left free by objects: a half that is full can still say what is gone.
const RESERVED_BYTES: u64 = 64 << 10;

/// A full half is emptied after this: pieces of WAL are superseded sooner.
const EMPTIED_AFTER: Duration = Duration::from_millis(400);
/// A half that could not be emptied is tried again after this.
const EMPTIED_AGAIN_AFTER: Duration = Duration::from_secs(1);

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
    /// Each held by one at a time: while objects get their names, while the file is written and synced (a
    /// disk says once that it could not), and while a half is emptied.
    naming: Mutex<()>,
    syncing: Mutex<Blocks>,
    emptying: Mutex<()>,
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
    /// What makes a half's objects durable, and when that was last begun.
    workers: Vec<JoinHandle<()>>,
    emptied_at: Instant,
}

/// Where an object is in the journal.
struct Within {
    half: usize,
    frame: FrameId,
    /// What it is until it has a file by its name.
    nameless: Option<Nameless>,
    /// Something else has its name: the journal is kept, and whoever reads finds that.
    is_in_conflict: bool,
}

impl Within {
    /// Its bytes, where it is durable and to be read from here.
    fn readable(&self, durable: u64) -> Option<&Bytes> {
        let nameless = self.nameless.as_ref().filter(|_| !self.is_in_conflict)?;
        (nameless.through <= durable).then_some(&nameless.bytes)
    }
}

/// An object that has no file of its own.
#[derive(Clone)]
struct Nameless {
    bytes: Bytes,
    since: Instant,
    /// It is durable once so many frames are.
    through: u64,
}

struct Half {
    epoch: u64,
    /// How many bytes of it are filled, and how many of them are written to the file.
    filled: u64,
    on_file: u64,
    /// The filled bytes from the beginning of the block on that what is to be written shares with what
    /// is.
    tail: Vec<u8>,
    /// How many frames, and how many of all were written before its first.
    frames: u64,
    written_before: u64,
    /// Nothing in it is needed.
    free: bool,
    /// Its objects could not be made durable by themselves. A disk says that once: asked again, it
    /// says nothing of what it has lost, so the journal is all there is of them.
    is_kept: bool,
}

impl Half {
    fn new(epoch: u64, written_before: u64, free: bool) -> Self {
        Self {
            epoch,
            filled: 0,
            on_file: 0,
            tail: Vec::new(),
            frames: 0,
            written_before,
            free,
            is_kept: false,
        }
    }
}

/// What became of an object that was to be appended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Appended {
    /// It is durable once so many frames are.
    Through(u64),
    /// An object of this path is in the journal and has no file yet.
    Exists,
    /// It has to be stored in the ordinary way: the journal is full, or cannot be written.
    Refused,
}

impl Journal {
    /// Makes a new one. An error where the file system cannot tell whether its owner lives.
    pub(super) fn create(root: &Root, settings: Settings) -> io::Result<Self> {
        assert!(settings.half_bytes.is_multiple_of(BLOCK as u64));
        let salt = salt()?;
        let (staging, folder) = (root.folder.join(STAGING), root.folder.join(JOURNALS));
        // never the root: where that is gone, its disk was taken away. Whoever made them may have been
        // stopped before they were durable
        durable::create_dir(&staging)?;
        durable::create_dir(&folder)?;
        let path = folder.join(name(salt));
        let file = Staged::zeros(&staging, settings.half_bytes.saturating_mul(2))?;
        let file = file.create_and_keep(&path)?;
        if let Err(error) = set_direct(&file, true) {
            tracing::debug!("{} goes through the page cache: {error}", path.display());
        }
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
                    emptied_at: Instant::now(),
                }),
                naming: Mutex::new(()),
                syncing: Mutex::default(),
                emptying: Mutex::new(()),
            }),
        })
    }

    /// Its file.
    pub(super) fn path(&self) -> &FilePath {
        &self.shared.path
    }

    /// Appends an object, which is not durable yet.
    pub(super) fn append(&self, path: &str, object: &Bytes) -> Appended {
        if object.len() > OBJECT_BYTES_MAX {
            return Appended::Refused;
        }
        let shared = &self.shared;
        let mut state = shared.lock();
        match state.objects.get(path) {
            Some(within) if within.nameless.is_some() => return Appended::Exists,
            // it has a file, which whoever creates it in the ordinary way finds
            Some(_) => return Appended::Refused,
            None => {}
        }
        if !shared.make_room(&mut state, path, object) {
            return Appended::Refused;
        }
        let half = state.current;
        let frame = match shared.write(&mut state, Note::Put { path, object }) {
            Ok(frame) => frame,
            Err(error) => {
                tracing::debug!("cannot write to {}: {error}", shared.path.display());
                return Appended::Refused;
            }
        };
        let through = state.written;
        let nameless = Some(Nameless {
            bytes: object.clone(),
            since: Instant::now(),
            through,
        });
        let within = Within {
            half,
            frame,
            nameless,
            is_in_conflict: false,
        };
        state.objects.insert(path.to_owned(), within);
        Appended::Through(through)
    }

    /// Returns once so many frames are durable. Objects that were appended and cannot be made durable
    /// have to be withdrawn.
    pub(super) fn sync(&self, through: u64) -> io::Result<()> {
        self.shared.sync_through(through)
    }

    /// Forgets an object that was appended with so many frames, and is not durable.
    pub(super) fn withdraw(&self, path: &str, through: u64) {
        let mut state = self.shared.lock();
        // what is durable may have a file by now: whoever puts it again finds it here
        if through <= state.durable {
            return;
        }
        let is_it = |within: &Within| {
            let nameless = within.nameless.as_ref();
            nameless.is_some_and(|nameless| nameless.through == through)
        };
        if state.objects.get(path).is_some_and(is_it)
            && let Some(within) = state.objects.remove(path)
        {
            let frames = vec![within.frame];
            self.shared
                .note(&mut state, frames, |frames| Note::Removed { frames });
        }
    }

    /// The bytes of an object that is durable, and has no file yet.
    pub(super) fn nameless(&self, path: &str) -> Option<Bytes> {
        let state = self.shared.lock();
        let within = state.objects.get(path)?;
        within.readable(state.durable).cloned()
    }

    /// Every object that is durable and has no file yet.
    pub(super) fn all_nameless(&self) -> HashMap<String, Bytes> {
        let state = self.shared.lock();
        let all = state.objects.iter().filter_map(|(path, within)| {
            let bytes = within.readable(state.durable)?;
            Some((path.clone(), bytes.clone()))
        });
        all.collect()
    }

    /// How many frames were ever appended.
    pub(super) fn appended(&self) -> u64 {
        self.shared.lock().written
    }

    /// Whether objects are without files.
    pub(super) fn has_nameless(&self) -> bool {
        let state = self.shared.lock();
        let mut objects = state.objects.values();
        objects.any(|within| within.nameless.is_some() && !within.is_in_conflict)
    }

    /// Gives up to `most` objects their files that are durable and have waited for them for so long.
    pub(super) fn name(&self, waited: Duration, most: usize) {
        let now = Instant::now();
        let is_due = |_: &str, nameless: &Nameless, durable| {
            nameless.through <= durable && now.duration_since(nameless.since) >= waited
        };
        if let Err(error) = self.shared.name(is_due, most) {
            let path = self.shared.path.display();
            tracing::debug!("some objects are in {path} alone for now: {error}");
        }
    }

    /// Gives an object its file that is durable and has none.
    pub(super) fn name_one(&self, path: &str) -> io::Result<()> {
        let is_due =
            |it: &str, nameless: &Nameless, durable| it == path && nameless.through <= durable;
        self.shared.name(is_due, 1)
    }

    /// Makes everything in it durable by itself, and removes it: nothing more is taken.
    pub(super) fn close(&self) -> io::Result<()> {
        let shared = &self.shared;
        shared.close();
        (0..2).try_for_each(|half| shared.empty(half))?;
        match durable::remove(&shared.path) {
            // by another call
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            removed => removed,
        }
    }

    /// Notes that objects are about to be removed; says of each whether it had no file, so that
    /// nothing is left to be done. Nothing waits for that to be durable: what comes back after a power
    /// cut is superseded.
    pub(super) fn removed(&self, paths: &[&str]) -> Vec<bool> {
        let shared = &self.shared;
        let mut state = shared.lock();
        let durable = state.durable;
        let mut frames = Vec::new();
        let had_no_file = paths.iter().map(|path| {
            // what is not stored yet is not what is removed
            let is_stored = |within: &Within| {
                let nameless = within.nameless.as_ref();
                nameless.is_none_or(|nameless| nameless.through <= durable)
            };
            if !state.objects.get(*path).is_some_and(is_stored) {
                return false;
            }
            // what lies there is somebody else's, and ours is to be found
            if state.objects.get(*path).is_some_and(|it| it.is_in_conflict) {
                return true;
            }
            state.objects.remove(*path).is_some_and(|within| {
                frames.push(within.frame);
                within.nameless.is_some()
            })
        });
        let had_no_file = had_no_file.collect();
        if !frames.is_empty() {
            shared.note(&mut state, frames, |frames| Note::Removed { frames });
            drop(state);
            shared.write_out();
        }
        had_no_file
    }
}

impl Shared {
    fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        for worker in &state.workers {
            worker.thread().unpark();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the object fits, in the other half perhaps, which is taken then.
    fn make_room(self: &Arc<Self>, state: &mut State, path: &str, object: &[u8]) -> bool {
        let Some(bytes) = Frame::encoded_bytes(&Note::Put { path, object }) else {
            return false;
        };
        let needed = u64::try_from(bytes).map_or(u64::MAX, |bytes| bytes + RESERVED_BYTES);
        let (full, other) = (state.current, 1 - state.current);
        if state.broken && !state.closed {
            for half in [full, other] {
                if !state.halves[half].free {
                    self.empty_again(state, half);
                }
            }
        }
        if state.broken || state.closed || needed > self.settings.half_bytes {
            return false;
        }
        if needed <= self.settings.half_bytes - state.halves[full].filled {
            return true;
        }
        if !state.halves[other].free {
            self.empty_again(state, other);
            return false;
        }
        state.epoch += 1;
        state.halves[other] = Half::new(state.epoch, state.written, false);
        state.current = other;
        self.empty_later(state, full);
        true
    }

    /// Appends what is said of frames, if anything is. Nothing depends on it.
    fn note(
        &self,
        state: &mut State,
        frames: Vec<FrameId>,
        note: impl for<'a> Fn(Runs<'a>) -> Note<'a>,
    ) {
        if frames.is_empty() {
            return;
        }
        let runs = runs_of(frames);
        if let Err(error) = self.write(state, note(Runs(&runs))) {
            tracing::debug!("cannot write to {}: {error}", self.path.display());
        }
    }

    /// Appends a frame to the half that is being filled.
    fn write(&self, state: &mut State, note: Note<'_>) -> io::Result<FrameId> {
        let number = state.current;
        let half = &state.halves[number];
        let frame = Frame {
            epoch: half.epoch,
            sequence: half.frames,
            durable: state.durable.saturating_sub(half.written_before),
            note,
        };
        let no_room = || io::Error::from(io::ErrorKind::StorageFull);
        let length = Frame::encoded_bytes(&frame.note).ok_or_else(no_room)?;
        let filled = half.filled + u64::try_from(length).map_err(io::Error::other)?;
        if state.broken || filled > self.settings.half_bytes {
            return Err(no_room());
        }
        let half = &mut state.halves[number];
        frame
            .append_to(&mut half.tail, self.salt)
            .ok_or_else(no_room)?;
        half.filled = filled;
        half.frames += 1;
        state.written += 1;
        Ok((frame.epoch, frame.sequence))
    }

    /// Writes what was appended to the file, unsynced: others see it. Nothing depends on it.
    fn write_out(self: &Arc<Self>) {
        let mut blocks = self.syncing.lock().unwrap_or_else(PoisonError::into_inner);
        if self.lock().broken {
            return;
        }
        // said there
        drop(self.write_blocks(&mut blocks));
    }

    /// Writes what was appended to the file. On a disk that is full, and makes another place even for what
    /// is written over, it is written with what follows once there is room.
    fn write_blocks(self: &Arc<Self>, blocks: &mut Blocks) -> io::Result<()> {
        let is_full = [io::ErrorKind::StorageFull, io::ErrorKind::QuotaExceeded];
        let written = self.write_tails(blocks);
        match &written {
            Err(error) if is_full.contains(&error.kind()) => {
                tracing::debug!("cannot write to {}: {error}", self.path.display());
            }
            Err(error) => self.breaks(error),
            Ok(()) => {}
        }
        written
    }

    fn write_tails(&self, blocks: &mut Blocks) -> io::Result<()> {
        for number in 0..2 {
            let state = self.lock();
            let half = &state.halves[number];
            let (epoch, filled) = (half.epoch, half.filled);
            if half.on_file == filled {
                continue;
            }
            let length = half.tail.len();
            let tail_at = filled - u64::try_from(length).map_err(io::Error::other)?;
            blocks.fill(&half.tail);
            drop(state);
            let start = if number == 0 {
                0
            } else {
                self.settings.half_bytes
            };
            blocks.write_at(&self.file, start + tail_at)?;
            let mut state = self.lock();
            let half = &mut state.halves[number];
            if half.epoch == epoch {
                half.on_file = filled;
                half.tail.drain(..length - length % BLOCK);
            }
        }
        Ok(())
    }

    /// Writes and syncs everything that was appended, unless that was done since.
    fn sync_through(self: &Arc<Self>, through: u64) -> io::Result<()> {
        let mut blocks = self.syncing.lock().unwrap_or_else(PoisonError::into_inner);
        let state = self.lock();
        if state.durable >= through {
            return Ok(());
        }
        if state.broken {
            return Err(io::Error::other("the journal could not be synced"));
        }
        let written = state.written;
        drop(state);
        self.write_blocks(&mut blocks)?;
        let synced = (self.settings.sync)(&self.file).and_then(|()| self.check());
        match &synced {
            Ok(()) => {
                let mut state = self.lock();
                state.durable = state.durable.max(written);
            }
            Err(error) => self.breaks(error),
        }
        synced
    }

    /// Nothing more is entrusted to a disk that has failed.
    fn breaks(self: &Arc<Self>, error: &io::Error) {
        tracing::warn!(
            "{} could not be written: {error}; every object is synced by itself from now on",
            self.path.display()
        );
        let mut state = self.lock();
        state.broken = true;
        // what shares a block with what could not be written
        (0..2).for_each(|half| self.empty_later(&mut state, half));
    }

    /// An error where nobody would find the journal after a power cut.
    fn check(&self) -> io::Result<()> {
        if durable::links(&self.file)? > 0 {
            return Ok(());
        }
        Err(io::Error::other("somebody has removed it"))
    }

    /// A disk that was full may not be any more. What could not be synced is not tried again.
    fn empty_again(self: &Arc<Self>, state: &mut State, half: usize) {
        let is_at_work = state.workers.iter().any(|worker| !worker.is_finished());
        let is_time = state.emptied_at.elapsed() >= EMPTIED_AGAIN_AFTER;
        if !state.halves[half].is_kept && !is_at_work && is_time {
            self.empty_later(state, half);
        }
    }

    /// Makes a half's objects durable by themselves, in the background.
    fn empty_later(self: &Arc<Self>, state: &mut State, half: usize) {
        state.emptied_at = Instant::now();
        let shared = Arc::clone(self);
        let work = move || {
            shared.wait_for_what_is_superseded();
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

    /// Most objects need no files if they are given the time to be superseded.
    fn wait_for_what_is_superseded(&self) {
        let until = Instant::now() + EMPTIED_AFTER;
        loop {
            let state = self.lock();
            let is_over = state.closed || state.broken;
            drop(state);
            let left = until.saturating_duration_since(Instant::now());
            if is_over || left.is_zero() {
                return;
            }
            // whoever closes the journal wakes this
            std::thread::park_timeout(left);
        }
    }

    /// Gives objects their files, of those that are due up to so many. The bytes of those that cannot be
    /// had stay here; the first error.
    fn name(
        self: &Arc<Self>,
        is_due: impl Fn(&str, &Nameless, u64) -> bool,
        most: usize,
    ) -> io::Result<()> {
        let _alone = self.naming.lock().unwrap_or_else(PoisonError::into_inner);
        let removed = self.name_those(is_due, most)?;
        let mut outcome = Ok(());
        for path in removed {
            match std::fs::remove_file(self.root.folder.join(path)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    outcome = outcome.and(Err(error));
                }
                _ => {}
            }
        }
        outcome
    }

    /// The same once. Gives the paths of those that were removed meanwhile, and have files now.
    fn name_those(
        self: &Arc<Self>,
        is_due: impl Fn(&str, &Nameless, u64) -> bool,
        most: usize,
    ) -> io::Result<Vec<String>> {
        let state = self.lock();
        let durable = state.durable;
        let due = state.objects.iter().filter_map(|(path, within)| {
            let nameless = within.nameless.as_ref();
            let nameless = nameless.filter(|nameless| is_due(path, nameless, durable))?;
            let bytes = nameless.bytes.clone();
            (!within.is_in_conflict).then(|| (path.clone(), within.frame, bytes))
        });
        let due: Vec<(String, FrameId, Bytes)> = due.take(most).collect();
        drop(state);
        if due.is_empty() {
            return Ok(Vec::new());
        }
        self.root.check()?;
        let mut outcome = Ok(());
        let mut named = Vec::new();
        for (path, frame, bytes) in due {
            match make_file(&self.root.folder, &path, &bytes) {
                Ok(is_as_put) => named.push((path, frame, is_as_put)),
                Err(error) => outcome = outcome.and(Err(error)),
            }
        }
        self.root.check()?;
        let mut state = self.lock();
        let mut frames = Vec::new();
        let mut removed = Vec::new();
        for (path, frame, is_as_put) in named {
            let within = state.objects.get_mut(&path);
            let Some(within) = within.filter(|within| within.frame == frame) else {
                if is_as_put {
                    removed.push(path);
                }
                continue;
            };
            if is_as_put {
                within.nameless = None;
                frames.push(frame);
            } else {
                // what the journal alone has is kept for whoever has to choose
                within.is_in_conflict = true;
                let half = within.half;
                state.halves[half].is_kept = true;
            }
        }
        self.note(&mut state, frames, |frames| Note::Named { frames });
        drop(state);
        self.write_out();
        outcome.map(|()| removed)
    }

    /// Makes a half's objects durable by themselves; then it may be filled again.
    fn empty(self: &Arc<Self>, half: usize) -> io::Result<()> {
        let _alone = self.emptying.lock().unwrap_or_else(PoisonError::into_inner);
        let state = self.lock();
        if state.halves[half].free {
            return Ok(());
        }
        let (epoch, written) = (state.halves[half].epoch, state.written);
        drop(state);
        // what cannot be made durable here is withdrawn, and stored in the ordinary way
        if let Err(error) = self.sync_through(written) {
            tracing::debug!("{} before it is emptied: {error}", self.path.display());
        }
        self.name(
            |_, nameless, durable| nameless.through <= durable,
            usize::MAX,
        )?;
        let state = self.lock();
        if state.halves[half].is_kept {
            return Err(io::Error::other("what it holds could not be synced before"));
        }
        let within = state.objects.iter();
        let within = within.filter(|(_, within)| within.half == half);
        let within: Vec<(&String, &Within)> = within.collect();
        let is_nameless = |within: &Within| {
            let nameless = within.nameless.as_ref();
            nameless.is_some_and(|nameless| nameless.through <= state.durable)
        };
        if within.iter().any(|(_, within)| is_nameless(within)) {
            return Err(io::Error::other("some of what it holds has no file yet"));
        }
        let paths: Vec<String> = within.iter().map(|(path, _)| (*path).clone()).collect();
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
        drop(state);
        self.write_out();
        Ok(())
    }
}

/// Gives an object its file. `false` where another one is there, which is no copy of it.
fn make_file(folder: &FilePath, path: &str, bytes: &[u8]) -> io::Result<bool> {
    let at = folder.join(path);
    let staging = folder.join(STAGING);
    let mut left = 3;
    loop {
        let staged = Staged::write_unsynced(&staging, bytes);
        let error = match staged.and_then(|staged| staged.create_unsynced(&at)) {
            Ok(()) => return Ok(true),
            Err(error) => error,
        };
        left -= 1;
        match error.kind() {
            io::ErrorKind::AlreadyExists => match is_copy(&at, path, bytes)? {
                Some(is_copy) => return Ok(is_copy),
                // it was there a moment ago
                None if left > 0 => {}
                None => return Err(error),
            },
            // with an empty folder, or cleared away in the moment before it was locked
            io::ErrorKind::NotFound if left > 0 => {
                durable::create_dir_all(&staging)?;
                at.parent().map_or(Ok(()), durable::create_dir_all)?;
            }
            _ => return Err(error),
        }
    }
}

/// Whether the file at `at` has the content of an object that was put under its path; `None` where
/// there is none.
fn is_copy(at: &FilePath, path: &str, bytes: &[u8]) -> io::Result<Option<bool>> {
    let theirs = match replay::found(at, bytes)? {
        There::Nothing => return Ok(None),
        There::Same => return Ok(Some(true)),
        There::Whole(theirs) => Some(theirs),
        There::Torn | There::Other => None,
    };
    let ours = container::check_stored(bytes).ok();
    let is_same = ours.is_some_and(|(_, ours)| Some(ours.digest) == theirs);
    if !is_same {
        tracing::error!(
            "{path} is stored by somebody else with another content than was acknowledged: two \
             histories; the journal is kept"
        );
    }
    Ok(Some(is_same))
}

impl Drop for Journal {
    fn drop(&mut self) {
        self.shared.close();
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
    format!("{VERSION}-{salt:016x}")
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

const _: () = assert!(HALF_BYTES.is_multiple_of(BLOCK as u64));
