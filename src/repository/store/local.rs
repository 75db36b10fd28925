//! A folder of this machine as an object store.
//!
//! Reading is `object_store`'s. Writing is our own: what it makes has the modes of the process's
//! umask, and a folder that a killed process made is taken for durable.

mod blocks;
mod files;
mod frame;
mod journal;
#[cfg(test)]
mod power_cuts;
mod replay;
mod scribe;
#[cfg(test)]
mod tests;
mod watch;

use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path as FilePath, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::stream::{self, BoxStream};
use futures_util::{StreamExt as _, TryStreamExt as _};
use object_store::local::LocalFileSystem;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetRange, GetResult, ListResult, MultipartUpload, ObjectMeta,
    ObjectStore, ObjectStoreExt as _, PutMode, PutMultipartOptions, PutOptions, PutPayload,
    PutResult, RenameOptions, Result,
};

use crate::durable::{self, Staged};
use journal::{JOURNALS, Journal, OBJECT_BYTES_MAX};
use scribe::Scribe;

/// Where files are written before they get their names.
const STAGING: &str = ".staging";

/// So many objects are deleted by one thread, which takes longer to wake than to delete one.
const DELETED_TOGETHER: usize = 64;

/// So many small objects are stored without a journal: whoever has no more of them needs none.
const WITHOUT_JOURNAL: usize = 4;

/// Folders known to be durable that are remembered; forgetting them costs a few syncs.
const KNOWN_MAX: usize = 10_000;

/// Set in the extensions of a put: the object is small, and soon superseded. So it is worth a
/// journal, where there is one. It supersedes nothing itself: others look at journals first, and at
/// files then, so what covers a file must have one before that goes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Brief;

/// A store in a folder of this machine. Clones share everything.
#[derive(Debug, Clone)]
pub(super) struct Local {
    root: Root,
    files: Arc<LocalFileSystem>,
    known: Arc<Known>,
    /// Begun when it is worth it; `None` where there cannot be a journal.
    scribe: Arc<OnceLock<Option<Scribe>>>,
    /// How many objects came for which a journal would have been of use.
    missed: Arc<AtomicUsize>,
    /// What the journals of others held when they were last looked at, of objects without files.
    of_others: Arc<Mutex<OfOthers>>,
    /// How often somebody has begun to look at them.
    looks: Arc<AtomicU64>,
}

/// What a look at the journals of others found.
#[derive(Debug, Default)]
struct OfOthers {
    look: u64,
    nameless: HashMap<String, Bytes>,
}

/// Folders that this process has seen synced into their parents, and whether no link leads from
/// them to elsewhere.
type Known = Mutex<HashMap<PathBuf, bool>>;

impl Local {
    /// Opens a folder; with `create`, makes it and clears what killed processes left in it. What
    /// their journals hold is put right either way.
    pub(super) fn open(folder: &FilePath, create: bool) -> io::Result<Self> {
        replay::play_back_all(folder)?;
        if create {
            durable::create_dir_all(folder)?;
            if let Err(error) = durable::remove_stale(&folder.join(STAGING)) {
                tracing::debug!("cannot clear {}/{STAGING}: {error}", folder.display());
            }
        }
        Ok(Self {
            root: Root {
                device_and_inode: identity(folder)?,
                folder: folder.to_owned(),
            },
            files: Arc::new(
                LocalFileSystem::new_with_prefix(folder)
                    .map_err(io::Error::other)?
                    .with_fsync(true),
            ),
            known: Arc::default(),
            scribe: Arc::default(),
            missed: Arc::default(),
            of_others: Arc::default(),
            looks: Arc::default(),
        })
    }

    /// With another journal than the usual one.
    #[cfg(test)]
    fn with_journal(self, settings: journal::Settings) -> io::Result<Self> {
        let scribe = Scribe::begin(&self.root, settings)?;
        assert!(self.scribe.set(Some(scribe)).is_ok());
        Ok(self)
    }

    /// The folder.
    pub(super) fn folder(&self) -> &FilePath {
        &self.root.folder
    }

    /// Makes everything in the folder durable.
    pub(super) async fn sync(&self) -> io::Result<()> {
        let root = self.root.clone();
        blocking(move || {
            root.check()?;
            durable::sync_file_system(&root.folder)
        })
        .await
    }

    /// Makes everything durable by itself that a journal holds, and removes the journal.
    pub(super) async fn settle(&self) -> io::Result<()> {
        let scribe = Arc::clone(&self.scribe);
        // one that is not begun yet is not begun any more
        blocking(move || match scribe.get_or_init(|| None) {
            Some(scribe) => scribe.end(),
            None => Ok(()),
        })
        .await
    }

    fn writer(&self, path: &str) -> Writer {
        Writer {
            object: self.root.folder.join(path),
            path: path.to_owned(),
            root: self.root.clone(),
            known: Arc::clone(&self.known),
        }
    }

    /// Whether the object was put through the journal.
    async fn put_brief(&self, location: &Path, payload: &PutPayload) -> Result<bool> {
        if self.scribe.get().is_none()
            && self.missed.fetch_add(1, Ordering::Relaxed) == WITHOUT_JOURNAL
        {
            // nobody waits for it: it is written out first, which takes longer than an object
            let (root, scribe) = (self.root.clone(), Arc::clone(&self.scribe));
            let missed = Arc::clone(&self.missed);
            tokio::task::spawn_blocking(move || match begin_scribe(&root) {
                // unless it has been settled since
                Ok(begun) => drop(scribe.set(begun)),
                // the disk is away: a journal on another one would make nothing durable
                Err(error) => {
                    tracing::debug!("no journal yet: {error}");
                    missed.store(0, Ordering::Relaxed);
                }
            });
        }
        let Some(Some(scribe)) = self.scribe.get() else {
            return Ok(false);
        };
        let bytes = Bytes::from(payload.clone());
        match scribe.put(self.writer(location.as_ref()), bytes).await {
            Some(Ok(())) => Ok(true),
            Some(Err(error)) if error.kind() == io::ErrorKind::AlreadyExists => {
                Err(exists(location, error))
            }
            Some(Err(error)) => Err(failed(error)),
            None => Ok(false),
        }
    }

    /// Whether the object was put through the journal on this very thread.
    pub(super) fn put_brief_here(&self, path: &str, bytes: &Bytes) -> bool {
        if bytes.len() > OBJECT_BYTES_MAX {
            return false;
        }
        let scribe = self.scribe.get().and_then(Option::as_ref);
        scribe.is_some_and(|scribe| scribe.put_here(|| self.writer(path), bytes))
    }

    fn journal(&self) -> Option<&Arc<Journal>> {
        let scribe = self.scribe.get().and_then(Option::as_ref);
        scribe.map(Scribe::journal)
    }

    /// The bytes of an object that is durable in our journal, and has no file yet.
    async fn nameless(&self, location: &Path) -> Result<Option<Bytes>> {
        let Some(journal) = self.journal().map(Arc::clone) else {
            return Ok(None);
        };
        // whoever writes to it may wait for the disk
        let path = location.to_string();
        let looked = blocking(move || Ok(journal.nameless(&path)));
        looked.await.map_err(failed)
    }

    /// Gives an object its file that is durable in our journal and has none yet; whether there is one.
    async fn name_nameless(&self, location: &Path) -> Result<bool> {
        let Some(journal) = self.journal().map(Arc::clone) else {
            return Ok(false);
        };
        let path = location.to_string();
        let named = blocking(move || {
            let is_there = journal.nameless(&path).is_some();
            if is_there {
                journal.name_one(&path)?;
            }
            Ok(is_there)
        });
        named.await.map_err(failed)
    }

    /// The same of a journal of somebody else's that was seen when objects were last listed.
    fn nameless_of_others(&self, location: &Path) -> Option<Bytes> {
        let of_others = self.of_others.lock();
        let of_others = of_others.unwrap_or_else(PoisonError::into_inner);
        of_others.nameless.get(location.as_ref()).cloned()
    }

    /// Every object without a file, below a prefix.
    async fn all_nameless(&self, prefix: Option<&Path>) -> io::Result<HashMap<Path, u64>> {
        let journal = self.journal().map(Arc::clone);
        let folder = self.root.folder.clone();
        let look = 1 + self.looks.fetch_add(1, Ordering::SeqCst);
        let looked = blocking(move || {
            let own = journal.as_ref();
            let of_others = replay::nameless_in(&folder, own.map(|journal| journal.path()))?;
            let own = own.map(|journal| journal.all_nameless());
            Ok((own.unwrap_or_default(), of_others))
        });
        let (own, of_others) = looked.await?;
        let all = own.iter().chain(&of_others);
        let all = all.filter_map(|(path, bytes)| {
            let location = replay::parsed(path)?;
            let is_below = prefix.is_none_or(|prefix| location.prefix_matches(prefix));
            let size = u64::try_from(bytes.len()).ok()?;
            (is_below && prefix != Some(&location)).then_some((location, size))
        });
        let all = all.collect();
        let seen = self.of_others.lock();
        let mut seen = seen.unwrap_or_else(PoisonError::into_inner);
        // one that began earlier knows less
        if look > seen.look {
            *seen = OfOthers {
                look,
                nameless: of_others,
            };
        }
        Ok(all)
    }

    /// Everything below a prefix, whether it has a file or not.
    async fn list_all(&self, prefix: Option<&Path>) -> Result<Vec<ObjectMeta>> {
        self.check().await?;
        // before the files: what leaves the journals then has one, or is superseded by one that has
        let mut nameless = self.all_nameless(prefix).await.map_err(failed)?;
        let (folder, below) = (self.root.folder.clone(), prefix.cloned());
        let files = blocking(move || files::files_below(&folder, below.as_ref()));
        let mut listed = files.await.map_err(failed)?;
        listed.retain(|object| !is_ours(&object.location));
        for object in &listed {
            nameless.remove(&object.location);
        }
        listed.extend(nameless.into_iter().map(|(location, size)| ObjectMeta {
            location,
            // nobody asks when
            last_modified: std::time::UNIX_EPOCH.into(),
            size,
            e_tag: None,
            version: None,
        }));
        // a disk that goes away halfway must not make a shorter list
        self.check().await?;
        Ok(listed)
    }

    /// An object that is not there is another answer than a folder that is not there.
    async fn found<T>(&self, answer: Result<T>) -> Result<T> {
        if matches!(answer, Err(Error::NotFound { .. })) {
            self.check().await?;
        }
        answer
    }

    /// An error where the folder is not the one that was opened. A disk that does not answer must not
    /// hold up whoever asks for something else.
    async fn check(&self) -> Result<()> {
        let root = self.root.clone();
        blocking(move || root.check()).await.map_err(failed)
    }
}

/// The folder of a local store, and which one it is: a disk that was taken away, or came back
/// over it, is not the one that was opened.
#[derive(Debug, Clone)]
struct Root {
    folder: PathBuf,
    device_and_inode: (u64, u64),
}

impl Root {
    /// An error where the folder is not the one that was opened.
    fn check(&self) -> io::Result<()> {
        if identity(&self.folder)? == self.device_and_inode {
            return Ok(());
        }
        Err(io::Error::other(
            "another folder is there than when the repository was opened",
        ))
    }
}

fn identity(folder: &FilePath) -> io::Result<(u64, u64)> {
    let metadata = std::fs::metadata(folder).map_err(|error| match error.kind() {
        // never to be taken for an object that is not there
        io::ErrorKind::NotFound => io::Error::other(error.to_string()),
        _ => error,
    })?;
    Ok((metadata.dev(), metadata.ino()))
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(io::Error::other).and_then(|done| done)
}

fn put_result() -> PutResult {
    PutResult {
        e_tag: None,
        version: None,
        extensions: object_store::Extensions::default(),
    }
}

fn exists(location: &Path, error: io::Error) -> Error {
    Error::AlreadyExists {
        path: location.to_string(),
        source: Box::new(error),
    }
}

/// Reads what is in memory as a file is read.
async fn read_from(bytes: Bytes, location: &Path, options: GetOptions) -> Result<GetResult> {
    let memory = InMemory::new();
    memory.put(location, bytes.into()).await?;
    memory.get_opts(location, options).await
}

fn failed(error: io::Error) -> Error {
    Error::Generic {
        store: "local",
        source: Box::new(error),
    }
}

/// Begins a journal; `None` where there cannot be one. An error where the folder is not the one that
/// was opened.
fn begin_scribe(root: &Root) -> io::Result<Option<Scribe>> {
    root.check()?;
    let begun = Scribe::begin(root, journal::Settings::default());
    root.check()?;
    let begun = begun.inspect_err(|error| {
        tracing::info!(
            "{} has no journal, every object is synced by itself: {error}",
            root.folder.display()
        );
    });
    Ok(begun.ok())
}

/// Deletes objects, and notes in the journal that they are gone.
fn delete(
    root: &Root,
    journal: Option<&Journal>,
    locations: Vec<Result<Path>>,
) -> Vec<Result<Path>> {
    if let Err(error) = root.check() {
        return vec![Err(failed(error))];
    }
    let paths: Vec<&str> = locations.iter().flatten().map(AsRef::as_ref).collect();
    let had_no_file = match journal {
        Some(journal) => journal.removed(&paths),
        None => vec![false; paths.len()],
    };
    let mut had_no_file = had_no_file.into_iter();
    let deleted = locations.into_iter().map(|location| {
        let location = location?;
        if had_no_file.next() == Some(true) {
            return Ok(location);
        }
        let path = root.folder.join(location.as_ref());
        match std::fs::remove_file(&path) {
            Ok(()) => Ok(location),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(Error::NotFound {
                path: path.display().to_string(),
                source: Box::new(error),
            }),
            Err(error) => Err(failed(error)),
        }
    });
    deleted.collect()
}

/// Whether it lies where no objects are.
fn is_ours(location: &Path) -> bool {
    let first = location.parts().next();
    first.is_some_and(|part| [STAGING, JOURNALS].contains(&part.as_ref()))
}

/// Puts one object into its place.
struct Writer {
    object: PathBuf,
    /// The object's path below the folder.
    path: String,
    root: Root,
    known: Arc<Known>,
}

impl Writer {
    fn create(&self, bytes: &[u8]) -> Result<()> {
        let created = self.place(bytes, Staged::create);
        match created {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                // whoever made it may have been stopped before it was durable
                self.sync_object().map_err(failed)?;
                Err(Error::AlreadyExists {
                    path: self.object.display().to_string(),
                    source: Box::new(error),
                })
            }
            Err(error) => Err(failed(error)),
        }
    }

    /// Whether the object can be put through the journal: its folder is durable. Whether something has
    /// its name already shows when it gets its file: to look takes longer than all else that is done here.
    fn may_be_journaled(&self) -> bool {
        let Some(parent) = self.object.parent() else {
            return false;
        };
        if self.known(parent).is_none() && self.make(parent).is_err() {
            return false;
        }
        // a journal is not played back where a link leads to
        self.known(parent) == Some(true)
    }

    fn overwrite(&self, bytes: &[u8]) -> Result<()> {
        self.place(bytes, Staged::replace).map_err(failed)
    }

    fn place(
        &self,
        bytes: &[u8],
        place: impl Fn(Staged, &FilePath) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut left = 3;
        loop {
            let placed = self
                .stage(bytes)
                .and_then(|staged| place(staged, &self.object));
            left -= 1;
            match placed {
                // cleared away by another process in the moment before it was locked, or with an
                // empty folder
                Err(error) if error.kind() == io::ErrorKind::NotFound && left > 0 => {}
                placed => return placed,
            }
        }
    }

    fn stage(&self, bytes: &[u8]) -> io::Result<Staged> {
        let staging = self.root.folder.join(STAGING);
        if let Some(parent) = self.object.parent() {
            self.make(parent)?;
        }
        durable::create_dir_all(&staging)?;
        Staged::write(&staging, bytes)
    }

    /// Makes a folder durable with those above it, also where another process made them.
    fn make(&self, folder: &FilePath) -> io::Result<()> {
        let above = folder.ancestors();
        let unknown: Vec<_> = above
            .take_while(|above| *above != self.root.folder && self.known(above).is_none())
            .collect();
        for folder in unknown.into_iter().rev() {
            match folder.parent().filter(|_| folder.is_dir()) {
                Some(parent) => durable::sync_dir(parent)?,
                None => durable::create_dir_all(folder)?,
            }
            self.remember(folder);
        }
        durable::create_dir_all(folder)
    }

    /// Of a known folder, whether it lies where its path says.
    fn known(&self, folder: &FilePath) -> Option<bool> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.get(folder).copied()
    }

    fn remember(&self, folder: &FilePath) {
        let resolved = folder.canonicalize().ok();
        let root = self.root.folder.canonicalize().ok();
        let is_within = resolved
            .zip(root)
            .is_some_and(|(resolved, root)| resolved.starts_with(root));
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= KNOWN_MAX {
            known.clear();
        }
        known.insert(folder.to_owned(), is_within);
    }

    fn sync_object(&self) -> io::Result<()> {
        durable::sync_file(&File::open(&self.object)?)?;
        let folders = self.object.ancestors().skip(1);
        for folder in folders.take_while(|folder| folder.starts_with(&self.root.folder)) {
            durable::sync_dir(folder)?;
        }
        Ok(())
    }
}

impl fmt::Display for Local {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.root.folder.display())
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl ObjectStore for Local {
    async fn put_opts(
        &self,
        location: &Path,
        payload: PutPayload,
        options: PutOptions,
    ) -> Result<PutResult> {
        let is_brief = options.mode == PutMode::Create
            && payload.content_length() <= OBJECT_BYTES_MAX
            && options.extensions.get::<Brief>().is_some();
        if is_brief && self.put_brief(location, &payload).await? {
            return Ok(put_result());
        }
        // what supersedes others must have a file
        if options.mode == PutMode::Create && self.name_nameless(location).await? {
            return Err(exists(location, io::ErrorKind::AlreadyExists.into()));
        }
        let writer = self.writer(location.as_ref());
        let written = tokio::task::spawn_blocking(move || {
            writer.root.check().map_err(failed)?;
            let bytes = Bytes::from(payload);
            match options.mode {
                PutMode::Create => writer.create(&bytes)?,
                PutMode::Overwrite => writer.overwrite(&bytes)?,
                PutMode::Update(_) => {
                    return Err(Error::NotSupported {
                        source: "a local folder knows no versions".into(),
                    });
                }
            }
            // what lies on another disk by now is not stored
            writer.root.check().map_err(failed)
        });
        written
            .await
            .map_err(|error| failed(io::Error::other(error)))??;
        Ok(put_result())
    }

    async fn put_multipart_opts(
        &self,
        _: &Path,
        _: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        Err(Error::NotSupported {
            source: "a local folder takes whole objects".into(),
        })
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        self.check().await?;
        // first: it may get its file meanwhile, but not lose it
        if let Some(bytes) = self.nameless(location).await? {
            return read_from(bytes, location, options).await;
        }
        let got = self.files.get_opts(location, options.clone()).await;
        if !matches!(got, Err(Error::NotFound { .. })) {
            return got;
        }
        if let Some(bytes) = self.nameless_of_others(location) {
            return read_from(bytes, location, options).await;
        }
        // it may have left a journal between the two
        let got = self.files.get_opts(location, options).await;
        self.found(got).await
    }

    async fn get_ranges(
        &self,
        location: &Path,
        ranges: &[std::ops::Range<u64>],
    ) -> Result<Vec<Bytes>> {
        let get = |range: &std::ops::Range<u64>| {
            let options = GetOptions {
                range: Some(GetRange::Bounded(range.clone())),
                ..GetOptions::default()
            };
            async { self.get_opts(location, options).await?.bytes().await }
        };
        futures_util::future::try_join_all(ranges.iter().map(get)).await
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        let journal = self.journal().map(Arc::clone);
        let root = self.root.clone();
        let chunks = locations.ready_chunks(DELETED_TOGETHER);
        let deleted = chunks.then(move |chunk| {
            let (root, journal) = (root.clone(), journal.clone());
            async move {
                let all = move || Ok(delete(&root, journal.as_deref(), chunk));
                let deleted: io::Result<Vec<Result<Path>>> = blocking(all).await;
                stream::iter(deleted.unwrap_or_else(|error| vec![Err(failed(error))]))
            }
        });
        deleted.flatten().boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let (local, prefix) = (self.clone(), prefix.cloned());
        let listed = async move {
            match local.list_all(prefix.as_ref()).await {
                Ok(listed) => listed.into_iter().map(Ok).collect(),
                Err(error) => vec![Err(error)],
            }
        };
        stream::once(listed).map(stream::iter).flatten().boxed()
    }

    fn list_with_offset(
        &self,
        prefix: Option<&Path>,
        offset: &Path,
    ) -> BoxStream<'static, Result<ObjectMeta>> {
        let offset = offset.clone();
        self.list(prefix)
            .try_filter(move |object| std::future::ready(object.location > offset))
            .boxed()
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.check().await?;
        let mut listed = self.files.list_with_delimiter(prefix).await?;
        self.check().await?;
        listed.common_prefixes.retain(|folder| !is_ours(folder));
        Ok(listed)
    }

    async fn copy_opts(&self, _: &Path, _: &Path, _: CopyOptions) -> Result<()> {
        Err(Error::NotSupported {
            source: "objects are written once".into(),
        })
    }

    async fn rename_opts(&self, _: &Path, _: &Path, _: RenameOptions) -> Result<()> {
        Err(Error::NotSupported {
            source: "objects are written once".into(),
        })
    }
}
