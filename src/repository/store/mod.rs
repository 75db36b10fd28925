//! The store below a repository: objects by path, written once. Only this folder sees
//! `object_store`.
//!
//! From the outside in: [`Store`] knows the repository's words, `retrying` tries again, `bounded`
//! makes one attempt within bounds, and below it is a provider's client (`cloud`, with `answer`
//! between it and the network) or a folder (`local`).

mod address;
mod answer;
mod aws_files;
mod aws_profile;
mod bounded;
mod bulk;
mod cloud;
mod credential_process;
mod error;
mod fault;
mod local;
mod options;
mod outage;
mod retrying;
#[cfg(test)]
mod rules;
#[cfg(test)]
mod scripted;
mod traffic;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use object_store::path::{Path, PathPart};
use object_store::{GetRange, ListResult, ObjectMeta, ObjectStore, PutMode};

use address::Address;
#[cfg(test)]
pub(super) use answer::refusal;
use bounded::{Body, Bounded};
pub use error::StoreError;
use fault::{Fault, Place};
use local::Local;
pub use options::StoreOptions;
use retrying::{Asked, Retrying};
pub use traffic::{Outcome, Request, Traffic};

use crate::error::Error;

/// A disk may be busy for long, and a network folder's server away: only a hung one is given up.
const LOCAL_SILENCE: Duration = Duration::from_mins(10);

/// What a create-if-absent did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Created {
    /// The object is new, and durable.
    New,
    /// Something with this name was there before, or an earlier attempt of ours made it; it was
    /// left as it is. The caller compares.
    Exists,
}

/// One object as a listing shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// The path below the prefix of this store.
    pub path: String,
    /// The stored size in bytes.
    pub bytes: u64,
}

/// What lies directly in a folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FolderList {
    /// Objects, sorted by path.
    pub objects: Vec<Listed>,
    /// The names of folders, sorted.
    pub folders: Vec<String>,
}

/// So many objects a store lists in one answer.
const LISTED_AT_ONCE: usize = 1000;

/// An object store at a URL, and a prefix in it.
#[derive(Debug, Clone)]
pub struct Store {
    client: Bounded,
    retrying: Retrying,
    local: Option<Arc<Local>>,
    /// Where paths of this store begin in the provider's.
    base: Path,
    /// The folder below the repository's root, for messages: empty, or ending in `/`.
    below: String,
    names: Arc<Names>,
    /// A [`Conditions`]; clones share what one of them finds out.
    conditions: Arc<AtomicU8>,
}

/// How a store is called in messages.
#[derive(Debug)]
struct Names {
    url: String,
    address: String,
    bucket_word: &'static str,
    credentials: String,
}

/// What a store makes of "create only if there is none".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Conditions {
    /// It does so, or nobody has found otherwise.
    Honoured,
    /// It writes over what is there.
    Ignored,
    /// It does not take such a request.
    Unknown,
}

impl Conditions {
    fn of(value: u8) -> Self {
        match value {
            0 => Self::Honoured,
            1 => Self::Ignored,
            _ => Self::Unknown,
        }
    }

    fn value(self) -> u8 {
        match self {
            Self::Honoured => 0,
            Self::Ignored => 1,
            Self::Unknown => 2,
        }
    }
}

impl Store {
    /// Opens the store that `options` name. Nothing is asked of a service yet.
    ///
    /// With `create`, a local folder that is not there is made, mode 0700.
    pub fn open(options: &StoreOptions, create: bool) -> Result<Self, StoreError> {
        #[cfg(test)]
        if let Some(objects) = &options.objects {
            return Ok(Self::over(Arc::clone(objects), options));
        }
        let address = Address::parse(&options.url)?;
        let shown = address.to_string();
        match address {
            Address::Local(folder) => {
                // listed, a file would look like a repository in which nothing is stored
                if std::fs::metadata(&folder).is_ok_and(|found| !found.is_dir()) {
                    return Err(StoreError::url(format!("{shown} is not a folder"))
                        .hint("a local repository is a folder; name another, or remove the file"));
                }
                let local = Local::open(&folder, create).map_err(|error| {
                    let fault = match Fault::from(error) {
                        Fault::NotFound => Fault::transient("there is no such folder"),
                        other => other,
                    };
                    fault.at(Place {
                        doing: "open",
                        path: &shown,
                        url: &shown,
                        bucket_word: "folder",
                        credentials: "this user",
                    })
                })?;
                let local = Arc::new(local);
                let objects: Arc<dyn ObjectStore> = Arc::<Local>::clone(&local);
                let client = Bounded::new(objects, options.concurrency, LOCAL_SILENCE);
                let retrying = Retrying::new(Duration::ZERO, client.meter().clone());
                let names = Names {
                    url: options.url.clone(),
                    address: shown,
                    bucket_word: "folder",
                    credentials: "this user".to_owned(),
                };
                let mut store = Self::new(client, retrying, Path::default(), names);
                store.local = Some(local);
                Ok(store)
            }
            Address::Bucket {
                provider,
                bucket,
                prefix,
            } => {
                let cloud = cloud::open(provider, &bucket, options)?;
                let names = Names {
                    url: options.url.clone(),
                    address: shown,
                    bucket_word: provider.bucket_word(),
                    credentials: cloud.credentials,
                };
                let base =
                    Path::parse(&prefix).map_err(|error| StoreError::url(error.to_string()))?;
                let meter = cloud.client.meter().clone();
                let retrying = Retrying::new(options.retry_budget, meter);
                Ok(Self::new(cloud.client, retrying, base, names))
            }
        }
    }

    /// A store over any other implementation, with the rules of a cloud's: for tests.
    pub fn over(objects: Arc<dyn ObjectStore>, options: &StoreOptions) -> Self {
        let client = Bounded::new(objects, options.concurrency, options.request_timeout);
        let names = Names {
            url: options.url.clone(),
            address: options.url.clone(),
            bucket_word: "bucket",
            credentials: "no credentials".to_owned(),
        };
        let retrying = Retrying::new(options.retry_budget, client.meter().clone());
        Self::new(client, retrying, Path::default(), names)
    }

    fn new(client: Bounded, retrying: Retrying, base: Path, names: Names) -> Self {
        Self {
            client,
            retrying,
            local: None,
            base,
            below: String::new(),
            names: Arc::new(names),
            conditions: Arc::new(AtomicU8::new(Conditions::Honoured.value())),
        }
    }

    /// The same store with another folder put before every path.
    #[must_use]
    pub fn below(&self, folder: &str) -> Self {
        Self {
            base: self.at(folder),
            below: format!("{}{folder}/", self.below),
            ..self.clone()
        }
    }

    /// The URL as the user gave it.
    pub fn url(&self) -> &str {
        &self.names.url
    }

    /// The repository's address, the same however its URL was written.
    pub fn address(&self) -> &str {
        &self.names.address
    }

    /// Whether it is a folder of this machine that lies in `folder`, or in which `folder` lies, or
    /// would.
    pub fn shares_folder(&self, folder: &std::path::Path) -> bool {
        let local = self.local.as_ref();
        local.is_some_and(|local| {
            let (ours, theirs) = (resolved(local.folder()), resolved(folder));
            ours.starts_with(&theirs) || theirs.starts_with(&ours)
        })
    }

    /// Whoever asks goes on asking from now on, whatever fails: the log tells of an outage as a whole.
    pub fn persist(&self) {
        self.retrying.persist();
    }

    /// What was asked of it so far, by all stores that come from the same opening.
    pub fn traffic(&self) -> Traffic {
        self.client.meter().traffic()
    }

    /// Where `path` is, for messages.
    pub fn locate(&self, path: &str) -> String {
        format!("{}/{}{path}", self.names.address, self.below)
    }

    /// Creates an object unless one of this name exists. Once it returns `New`, it is durable.
    pub async fn create(&self, path: &str, bytes: Bytes) -> Result<Created, StoreError> {
        let at = self.at(path);
        self.ask("write", path, || self.create_once(&at, bytes.clone()))
            .await
    }

    /// The same for an object that is small and soon superseded: a folder of this machine makes it
    /// durable faster, through a journal.
    pub async fn create_brief(&self, path: &str, bytes: Bytes) -> Result<Created, StoreError> {
        if self.local.is_none() {
            return self.create(path, bytes).await;
        }
        let at = self.at(path);
        let create = || async {
            match self.client.create_brief(&at, bytes.clone()).await {
                Ok(()) => Ok(Created::New),
                Err(Fault::Exists) => Ok(Created::Exists),
                Err(fault) => Err(fault),
            }
        };
        self.ask("write", path, create).await
    }

    /// Creates a small and soon superseded object of a legal path on this very thread, where that is
    /// faster than all else: in a folder of this machine with a journal, whose disk is quick. Whether it
    /// is done; if not, nothing was, and [`Self::create_brief`] does it or says why it cannot be done.
    pub fn create_brief_here(&self, path: &str, bytes: &Bytes) -> bool {
        let Some(local) = &self.local else {
            return false;
        };
        if self.retrying.is_in_trouble("write") {
            return false;
        }
        let length = bytes.len();
        let is_done = if self.base.as_ref().is_empty() {
            local.put_brief_here(path, bytes)
        } else {
            local.put_brief_here(self.at(path).as_ref(), bytes)
        };
        if is_done {
            self.client.meter().done(Request::Put);
            self.client.meter().written(length);
        }
        is_done
    }

    async fn create_once(&self, at: &Path, bytes: Bytes) -> Result<Created, Fault> {
        let conditions = self.conditions();
        if conditions != Conditions::Honoured && self.client.exists(at).await? {
            return Ok(Created::Exists);
        }
        let mode = match conditions {
            Conditions::Unknown => PutMode::Overwrite,
            Conditions::Honoured | Conditions::Ignored => PutMode::Create,
        };
        match self.client.put(at, bytes.clone(), mode).await {
            Ok(()) => Ok(Created::New),
            Err(Fault::Exists) => Ok(Created::Exists),
            Err(Fault::Unsupported { reason }) if conditions == Conditions::Honoured => {
                self.lose(Conditions::Unknown, &reason);
                Box::pin(self.create_once(at, bytes)).await
            }
            Err(fault) => Err(fault),
        }
    }

    /// Finds out whether the store honours "create only if there is none", by creating again, with
    /// the same bytes, the object at `path`, which exists. A store that does not is guarded from
    /// now on: every create looks first.
    pub async fn probe_conditional_create(
        &self,
        path: &str,
        bytes: Bytes,
    ) -> Result<bool, StoreError> {
        if self.local.is_some() {
            return Ok(true);
        }
        if self.conditions() != Conditions::Honoured {
            return Ok(false);
        }
        let at = self.at(path);
        let probe = || self.create_once(&at, bytes.clone());
        if self.ask("write", path, probe).await? == Created::New {
            self.lose(
                Conditions::Ignored,
                "a second create of one object succeeded",
            );
        }
        Ok(self.conditions() == Conditions::Honoured)
    }

    /// Whether it was found to honour "create only if there is none".
    pub fn honours_conditions(&self) -> bool {
        self.conditions() == Conditions::Honoured
    }

    fn conditions(&self) -> Conditions {
        Conditions::of(self.conditions.load(Ordering::Relaxed))
    }

    fn lose(&self, found: Conditions, reason: &str) {
        let before = self.conditions.swap(found.value(), Ordering::Relaxed);
        if Conditions::of(before) == Conditions::Honoured {
            tracing::warn!(
                "{} does not honour conditional writes ({reason}): every object is looked for \
                 before it is written, but two archivers that write at the same moment are not \
                 kept apart; use a store that honours If-None-Match",
                self.names.address
            );
        }
    }

    /// Writes an object over what is there: for the tip alone.
    pub async fn overwrite(&self, path: &str, bytes: Bytes) -> Result<(), StoreError> {
        let at = self.at(path);
        let put = || self.client.put(&at, bytes.clone(), PutMode::Overwrite);
        self.ask("write", path, put).await
    }

    /// The whole object.
    pub async fn get(&self, path: &str) -> Result<Bytes, StoreError> {
        Ok(self.read(path, None).await?.bytes)
    }

    /// The whole object; `None` where it is larger than `bytes_max`, and is not read then.
    pub async fn get_at_most(
        &self,
        path: &str,
        bytes_max: u64,
    ) -> Result<Option<Bytes>, StoreError> {
        let range = GetRange::Bounded(0..bytes_max.saturating_add(1));
        let read = self.read(path, Some(range)).await?;
        Ok((read.object_bytes <= bytes_max).then_some(read.bytes))
    }

    /// Up to `length` bytes from `offset`; fewer only where the object ends.
    pub async fn get_range(
        &self,
        path: &str,
        offset: u64,
        length: u64,
    ) -> Result<Bytes, StoreError> {
        let range = offset..offset.saturating_add(length);
        if range.is_empty() {
            return Ok(Bytes::new());
        }
        let range = GetRange::Bounded(range);
        Ok(self.read(path, Some(range)).await?.bytes)
    }

    /// The last `length` bytes, or all of a shorter object, and the size of the whole object.
    pub async fn get_tail(&self, path: &str, length: u64) -> Result<(Bytes, u64), StoreError> {
        let body = self.read(path, Some(GetRange::Suffix(length))).await?;
        Ok((body.bytes, body.object_bytes))
    }

    async fn read(&self, path: &str, range: Option<GetRange>) -> Result<Body, StoreError> {
        let at = self.at(path);
        self.ask("read", path, || async {
            match self.client.read(&at, range.clone()).await {
                // an empty object has no last bytes, and no object has any beyond its end
                Err(Fault::PastEnd) => Ok(Body {
                    bytes: Bytes::new(),
                    object_bytes: 0,
                }),
                read => read,
            }
        })
        .await
    }

    /// Every object below `folder` (which ends in `/`, or is empty), sorted by path.
    pub async fn list(&self, folder: &str) -> Result<Vec<Listed>, StoreError> {
        let prefix = self.at(folder);
        let objects = self
            .ask("list", folder, || self.client.list(&prefix))
            .await?;
        Ok(self.listed(objects))
    }

    /// As [`Self::list`], where that takes one answer; `None` where there are more objects. A folder of
    /// this machine is always listed at one go.
    pub async fn list_few(&self, folder: &str) -> Result<Option<Vec<Listed>>, StoreError> {
        if self.local.is_some() {
            return self.list(folder).await.map(Some);
        }
        let prefix = self.at(folder);
        let few = || self.client.list_at_most(&prefix, LISTED_AT_ONCE);
        let objects = self.ask("list", folder, few).await?;
        Ok(objects.map(|objects| self.listed(objects)))
    }

    /// What lies directly in `folder`.
    pub async fn list_folder(&self, folder: &str) -> Result<FolderList, StoreError> {
        let entries = self.entries(folder).await?;
        let folders = entries.common_prefixes.iter();
        let folders = folders.filter_map(|path| path.filename().map(str::to_owned));
        let mut folders: Vec<String> = folders.collect();
        folders.sort();
        Ok(FolderList {
            objects: self.listed(entries.objects),
            folders,
        })
    }

    fn listed(&self, objects: Vec<ObjectMeta>) -> Vec<Listed> {
        let listed = objects.into_iter().filter_map(|object| {
            Some(Listed {
                path: self.relative(&object.location)?,
                bytes: object.size,
            })
        });
        let mut listed: Vec<Listed> = listed.collect();
        listed.sort_by(|a, b| a.path.cmp(&b.path));
        listed
    }

    /// The path below this store's prefix.
    fn relative(&self, location: &Path) -> Option<String> {
        let mut parts = location.prefix_match(&self.base)?.peekable();
        parts.peek()?;
        let parts: Vec<_> = parts.map(|part| part.as_ref().to_owned()).collect();
        Some(parts.join("/"))
    }

    /// The names of the objects directly below `folder`, unsorted.
    pub async fn files(&self, folder: &str) -> Result<Vec<String>, StoreError> {
        let listed = self.entries(folder).await?;
        let names = listed
            .objects
            .iter()
            .filter_map(|object| object.location.filename());
        Ok(names.map(str::to_owned).collect())
    }

    /// The names of the folders directly below `folder`, sorted.
    pub async fn folders(&self, folder: &str) -> Result<Vec<String>, StoreError> {
        Ok(self.list_folder(folder).await?.folders)
    }

    async fn entries(&self, folder: &str) -> Result<ListResult, StoreError> {
        let prefix = self.at(folder);
        self.ask("list", folder, || self.client.entries(&prefix))
            .await
    }

    /// Deletes an object; one that is not there is no error.
    pub async fn delete(&self, path: &str) -> Result<(), StoreError> {
        let at = self.at(path);
        self.ask("delete", path, || self.client.delete(&at)).await
    }

    /// Deletes objects, at the same time where that is faster; what is not there is no error.
    pub async fn delete_all(&self, paths: &[String]) -> Result<(), StoreError> {
        let Some(first) = paths.first() else {
            return Ok(());
        };
        if self.local.is_some() {
            let at: Vec<Path> = paths.iter().map(|path| self.at(path)).collect();
            let delete = || self.client.delete_all(at.clone());
            return self.ask("delete", first, delete).await;
        }
        let deletions = paths.iter().map(|path| self.delete(path));
        let deleted = join_all(deletions).await;
        deleted.into_iter().collect()
    }

    /// Makes durable whatever a listing shows; services have done so by themselves.
    pub async fn sync(&self) -> Result<(), StoreError> {
        match &self.local {
            Some(local) => {
                self.ask("sync", "", || async { Ok(local.sync().await?) })
                    .await
            }
            None => Ok(()),
        }
    }

    /// Leaves nothing behind that another process would have to put right: for the end.
    pub async fn settle(&self) -> Result<(), StoreError> {
        match &self.local {
            Some(local) => {
                let settled = local.settle().await;
                settled.map_err(|error| self.failed("settle", "", error.into()))
            }
            None => Ok(()),
        }
    }

    async fn ask<T, F>(
        &self,
        doing: &'static str,
        path: &str,
        attempt: impl Fn() -> F,
    ) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, Fault>>,
    {
        let asked = Asked {
            doing,
            store: &self.names.address,
        };
        let explained = |fault: &Fault| Error::from(self.failed(doing, path, fault.clone()));
        let answer = self.retrying.run(asked, attempt, explained).await;
        answer.map_err(|fault| self.failed(doing, path, fault))
    }

    fn failed(&self, doing: &'static str, path: &str, fault: Fault) -> StoreError {
        fault.at(Place {
            doing,
            path: &self.locate(path),
            url: &self.names.address,
            bucket_word: self.names.bucket_word,
            credentials: &self.names.credentials,
        })
    }

    fn at(&self, path: &str) -> Path {
        let parts = path.split('/').filter(|part| !part.is_empty());
        let parts = parts.map(PathPart::from);
        self.base.parts().chain(parts).collect()
    }
}

/// A path without links, as far as it exists.
fn resolved(path: &std::path::Path) -> PathBuf {
    let existing = path.ancestors().find_map(|above| {
        let rest = path.strip_prefix(above).ok()?;
        Some(above.canonicalize().ok()?.join(rest))
    });
    existing.unwrap_or_else(|| path.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::durable;

    #[tokio::test]
    async fn creates_once_and_tells_absent_from_present() {
        let folder = tempfile::tempdir().unwrap();
        let url = format!("file://{}/a b", folder.path().display());
        let store = Store::open(&StoreOptions::at(&url), true)
            .unwrap()
            .below("main");
        assert!(matches!(
            store.get("x/y").await,
            Err(StoreError::NotFound { .. })
        ));
        let first = store
            .create("x/y", Bytes::from_static(b"one"))
            .await
            .unwrap();
        let second = store
            .create("x/y", Bytes::from_static(b"two"))
            .await
            .unwrap();
        assert_eq!((first, second), (Created::New, Created::Exists));
        assert_eq!(store.get("x/y").await.unwrap(), "one");
        assert_eq!(
            store.get_tail("x/y", 2).await.unwrap(),
            (Bytes::from_static(b"ne"), 3)
        );
        let listed = store.list("x/").await.unwrap();
        assert_eq!(
            listed,
            [Listed {
                path: "x/y".to_owned(),
                bytes: 3
            }]
        );
        assert_eq!(store.folders("").await.unwrap(), ["x"]);
        store.delete("x/y").await.unwrap();
        store.delete("x/y").await.unwrap();
        assert!(store.list("").await.unwrap().is_empty());
    }

    #[test]
    fn a_missing_repository_is_unreachable_not_empty() {
        // taking it for empty would make wal-fetch say "not in the archive", and PostgreSQL promote
        let missing = Store::open(&StoreOptions::at("file:///nonexistent/anywhen"), false);
        assert!(matches!(missing, Err(StoreError::Unreachable { .. })));
    }

    #[tokio::test]
    async fn a_folder_that_was_swapped_is_unreachable_not_empty() {
        // WAL would be acknowledged on the wrong disk, and hidden when the right one comes back
        let folder = tempfile::tempdir().unwrap();
        let (root, aside) = (folder.path().join("root"), folder.path().join("aside"));
        let store = Store::open(&StoreOptions::at(root.to_str().unwrap()), true).unwrap();
        store.create("x", Bytes::from_static(b"one")).await.unwrap();
        durable::rename(&root, &aside).unwrap();
        std::fs::create_dir(&root).unwrap();
        let unreachable = |error| matches!(error, StoreError::Unreachable { .. });
        assert!(unreachable(store.get("x").await.unwrap_err()));
        assert!(unreachable(store.list("").await.unwrap_err()));
        assert!(unreachable(
            store.create("y", Bytes::new()).await.unwrap_err()
        ));
        assert_eq!(std::fs::read_dir(&root).unwrap().count(), 0);
    }

    /// A journal that was begun at the empty mount point would go on there when the disk is back.
    #[tokio::test]
    async fn no_journal_is_begun_where_the_folder_is_not_the_one_that_was_opened() {
        let folder = tempfile::tempdir().unwrap();
        let (root, aside) = (folder.path().join("root"), folder.path().join("aside"));
        for is_there in [false, true] {
            let store = Store::open(&StoreOptions::at(root.to_str().unwrap()), true).unwrap();
            durable::rename(&root, &aside).unwrap();
            if is_there {
                std::fs::create_dir(&root).unwrap();
            }
            for number in 0..10 {
                let name = format!("away-{number}");
                let put = store.create_brief(&name, Bytes::new()).await;
                let refused = put.unwrap_err();
                assert!(
                    matches!(refused, StoreError::Unreachable { .. }),
                    "{refused}"
                );
            }
            // what was begun in the background has come to its end
            store.settle().await.unwrap();
            assert_eq!(root.exists(), is_there);
            if is_there {
                assert_eq!(std::fs::read_dir(&root).unwrap().count(), 0);
                std::fs::remove_dir(&root).unwrap();
            }
            durable::rename(&aside, &root).unwrap();
        }
    }
}
