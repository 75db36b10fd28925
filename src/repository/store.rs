//! The store below a repository: objects by path, written once. Only this file and its siblings
//! see `object_store`.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::TryStreamExt as _;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{
    GetOptions, GetRange, ListResult, ObjectStore, ObjectStoreExt as _, PutMode, PutOptions,
};

use crate::durable;
use crate::error::{Error, Kind, chain};

/// Not found, not reachable and refused are different answers, here and in every layer above.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// There is no object of that name.
    #[error("not found: {path}")]
    NotFound {
        /// The object's path in the repository.
        path: String,
    },
    /// The store did not answer, or not as it should.
    #[error("cannot {doing} {path}: {reason}")]
    Unreachable {
        /// What was asked of the store.
        doing: &'static str,
        /// The object's path in the repository.
        path: String,
        /// What the store or the operating system said.
        reason: String,
    },
    /// The repository's address is not one that this build understands.
    #[error("{0}")]
    Url(String),
}

impl From<StoreError> for Error {
    fn from(error: StoreError) -> Self {
        let message = error.to_string();
        match error {
            StoreError::NotFound { .. } => Self::not_found(message),
            StoreError::Unreachable { reason, .. } => {
                let failure = Self::new(Kind::Unreachable, message);
                if reason.contains("Permission denied") {
                    failure
                        .hint("give this user the right to read and write the repository's folder")
                } else if reason.contains("No space left") {
                    failure.hint("free space where the repository lives; nothing was acknowledged")
                } else {
                    failure.hint("check that the repository is there and that this user may use it")
                }
            }
            StoreError::Url(_) => {
                Self::usage(message).hint("use a local folder, file:///path/to/repository")
            }
        }
    }
}

/// What a create-if-absent did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Created {
    /// The object is new, and durable.
    New,
    /// Something with this name was there before; it was left as it is.
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

/// An object store at a URL, and a prefix in it.
#[derive(Debug, Clone)]
pub struct Store {
    inner: Arc<dyn ObjectStore>,
    url: String,
    prefix: String,
    root: Root,
}

/// The folder of a local store, and which one it is: a disk that was taken away, or came back
/// over it, is not the one that was opened.
#[derive(Debug, Clone)]
struct Root {
    folder: PathBuf,
    device_and_inode: (u64, u64),
}

impl Root {
    fn of(folder: PathBuf) -> io::Result<Self> {
        let device_and_inode = Self::identity(&folder)?;
        Ok(Self {
            folder,
            device_and_inode,
        })
    }

    fn identity(folder: &std::path::Path) -> io::Result<(u64, u64)> {
        let metadata = std::fs::metadata(folder)?;
        Ok((metadata.dev(), metadata.ino()))
    }

    /// An error where the folder is not the one that was opened.
    fn check(&self) -> io::Result<()> {
        if Self::identity(&self.folder)? == self.device_and_inode {
            return Ok(());
        }
        Err(io::Error::other(
            "another folder is there than when the repository was opened",
        ))
    }

    /// Makes an object that exists durable, with the folders that lead to it.
    fn sync_object(&self, below: &str) -> io::Result<()> {
        let object = self.folder.join(below);
        durable::sync_file(&File::open(&object)?)?;
        let folders = object.ancestors().skip(1);
        for folder in folders.take_while(|folder| folder.starts_with(&self.folder)) {
            durable::sync_dir(folder)?;
        }
        Ok(())
    }
}

impl Store {
    /// Opens the store at `url`: `file:///path`, or an absolute path.
    ///
    /// With `create`, a local folder that is not there is made.
    pub fn open(url: &str, create: bool) -> Result<Self, StoreError> {
        let folder = local_folder(url)?;
        let failed = |error: &dyn std::fmt::Display| StoreError::Unreachable {
            doing: "open",
            path: folder.display().to_string(),
            reason: error.to_string(),
        };
        if create {
            durable::create_dir_all(&folder).map_err(|error| failed(&error))?;
        }
        let root = Root::of(folder.clone()).map_err(|error| failed(&error))?;
        let local = LocalFileSystem::new_with_prefix(&folder)
            .map_err(|error| failed(&chain(&error)))?
            .with_fsync(true);
        Ok(Self {
            inner: Arc::new(local),
            url: url.to_owned(),
            prefix: String::new(),
            root,
        })
    }

    /// The same store with another folder put before every path.
    #[must_use]
    pub fn below(&self, folder: &str) -> Self {
        Self {
            inner: Arc::clone(&self.inner),
            url: self.url.clone(),
            prefix: format!("{}{folder}/", self.prefix),
            root: self.root.clone(),
        }
    }

    /// The URL as the user gave it.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Where `path` is, for messages.
    pub fn locate(&self, path: &str) -> String {
        format!("{}/{}{path}", self.url.trim_end_matches('/'), self.prefix)
    }

    /// Creates an object unless one of this name exists. Once it returns `New`, it is durable.
    pub async fn create(&self, path: &str, bytes: Bytes) -> Result<Created, StoreError> {
        let options = PutOptions {
            mode: PutMode::Create,
            ..PutOptions::default()
        };
        self.check("write", path)?;
        match self
            .inner
            .put_opts(&self.at(path), bytes.into(), options)
            .await
        {
            Ok(_) => Ok(Created::New),
            Err(object_store::Error::AlreadyExists { .. }) => {
                // whoever made it may have been stopped before it was durable
                let (root, below) = (self.root.clone(), format!("{}{path}", self.prefix));
                let synced = tokio::task::spawn_blocking(move || root.sync_object(&below)).await;
                let synced = synced.map_err(io::Error::other).and_then(|synced| synced);
                synced.map_err(|error| self.unreachable("sync", path, &error))?;
                Ok(Created::Exists)
            }
            Err(error) => Err(self.failed("write", path, &error)),
        }
    }

    /// Writes an object over what is there: for the tip alone.
    pub async fn overwrite(&self, path: &str, bytes: Bytes) -> Result<(), StoreError> {
        self.check("write", path)?;
        match self.inner.put(&self.at(path), bytes.into()).await {
            Ok(_) => Ok(()),
            Err(error) => Err(self.failed("write", path, &error)),
        }
    }

    /// The whole object.
    pub async fn get(&self, path: &str) -> Result<Bytes, StoreError> {
        self.check("read", path)?;
        let got = self.inner.get(&self.at(path)).await;
        let got = got.map_err(|error| self.failed("read", path, &error))?;
        got.bytes()
            .await
            .map_err(|error| self.failed("read", path, &error))
    }

    /// `length` bytes from `offset`.
    pub async fn get_range(
        &self,
        path: &str,
        offset: u64,
        length: u64,
    ) -> Result<Bytes, StoreError> {
        let range = offset..offset.saturating_add(length);
        let got = self.inner.get_range(&self.at(path), range).await;
        got.map_err(|error| self.failed("read", path, &error))
    }

    /// The last `length` bytes, or all of a shorter object, and the size of the whole object.
    pub async fn get_tail(&self, path: &str, length: u64) -> Result<(Bytes, u64), StoreError> {
        let options = GetOptions {
            range: Some(GetRange::Suffix(length)),
            ..GetOptions::default()
        };
        let got = self.inner.get_opts(&self.at(path), options).await;
        let got = got.map_err(|error| self.failed("read", path, &error))?;
        let whole = got.meta.size;
        let bytes = got
            .bytes()
            .await
            .map_err(|error| self.failed("read", path, &error))?;
        Ok((bytes, whole))
    }

    /// Every object below `folder` (which ends in `/`, or is empty), sorted by path.
    pub async fn list(&self, folder: &str) -> Result<Vec<Listed>, StoreError> {
        self.check("list", folder)?;
        let prefix = self.at(folder);
        let objects: Vec<_> = self
            .inner
            .list(Some(&prefix))
            .try_collect()
            .await
            .map_err(|error| self.failed("list", folder, &error))?;
        let mut listed: Vec<Listed> = objects
            .into_iter()
            .filter_map(|object| {
                let path = object
                    .location
                    .as_ref()
                    .strip_prefix(self.prefix.as_str())?;
                Some(Listed {
                    path: path.to_owned(),
                    bytes: object.size,
                })
            })
            .collect();
        listed.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(listed)
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

    async fn entries(&self, folder: &str) -> Result<ListResult, StoreError> {
        self.check("list", folder)?;
        let prefix = self.at(folder);
        let listed = self.inner.list_with_delimiter(Some(&prefix)).await;
        listed.map_err(|error| self.failed("list", folder, &error))
    }

    /// The names of the folders directly below `folder`, sorted.
    pub async fn folders(&self, folder: &str) -> Result<Vec<String>, StoreError> {
        let listed = self.entries(folder).await?;
        let mut names: Vec<String> = listed
            .common_prefixes
            .iter()
            .filter_map(|path| path.filename().map(str::to_owned))
            .collect();
        names.sort();
        Ok(names)
    }

    /// Deletes an object; one that is not there is no error.
    pub async fn delete(&self, path: &str) -> Result<(), StoreError> {
        match self.inner.delete(&self.at(path)).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(self.failed("delete", path, &error)),
        }
    }

    /// Makes durable whatever a listing shows.
    pub async fn sync(&self) -> Result<(), StoreError> {
        self.check("sync", "")?;
        let root = self.root.folder.clone();
        let synced = tokio::task::spawn_blocking(move || durable::sync_file_system(&root)).await;
        let synced = synced.map_err(io::Error::other).and_then(|synced| synced);
        synced.map_err(|error| self.unreachable("sync", "", &error))
    }

    fn check(&self, doing: &'static str, path: &str) -> Result<(), StoreError> {
        self.root
            .check()
            .map_err(|error| self.unreachable(doing, path, &error))
    }

    fn unreachable(&self, doing: &'static str, path: &str, error: &io::Error) -> StoreError {
        StoreError::Unreachable {
            doing,
            path: self.locate(path),
            reason: error.to_string(),
        }
    }

    fn at(&self, path: &str) -> Path {
        Path::from(format!("{}{path}", self.prefix))
    }

    fn failed(&self, doing: &'static str, path: &str, error: &object_store::Error) -> StoreError {
        let path = self.locate(path);
        match error {
            object_store::Error::NotFound { .. } => StoreError::NotFound { path },
            other => StoreError::Unreachable {
                doing,
                path,
                reason: innermost(other),
            },
        }
    }
}

/// The operating system's own words, which lie below the library's.
fn innermost(error: &object_store::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    cause.to_string()
}

fn local_folder(url: &str) -> Result<PathBuf, StoreError> {
    let folder = match url.split_once("://") {
        None => PathBuf::from(url),
        Some(("file", path)) => PathBuf::from(decode_percent(path, url)?),
        Some((scheme @ ("s3" | "gs" | "az"), _)) => {
            return Err(StoreError::Url(format!(
                "repositories at {scheme}:// are not supported by this version: url={url}"
            )));
        }
        Some(_) => {
            return Err(StoreError::Url(format!(
                "not the address of a repository: url={url}"
            )));
        }
    };
    if folder.is_absolute() {
        Ok(folder)
    } else {
        Err(StoreError::Url(format!(
            "a repository's folder is an absolute path: found {url:?}"
        )))
    }
}

fn decode_percent(path: &str, url: &str) -> Result<String, StoreError> {
    if !path.contains('%') {
        return Ok(path.to_owned());
    }
    let bad = || StoreError::Url(format!("bad percent-encoding in the address: url={url}"));
    let mut bytes = Vec::with_capacity(path.len());
    let mut rest = path.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let digits = [rest.next().ok_or_else(bad)?, rest.next().ok_or_else(bad)?];
        let digits = str::from_utf8(&digits).ok().ok_or_else(bad)?;
        bytes.push(u8::from_str_radix(digits, 16).ok().ok_or_else(bad)?);
    }
    String::from_utf8(bytes).ok().ok_or_else(bad)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn creates_once_and_tells_absent_from_present() {
        let folder = tempfile::tempdir().unwrap();
        let url = format!("file://{}/a b", folder.path().display());
        let store = Store::open(&url, true).unwrap().below("main");
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
        let missing = Store::open("file:///nonexistent/anywhen", false);
        assert!(matches!(missing, Err(StoreError::Unreachable { .. })));
    }

    #[tokio::test]
    async fn a_folder_that_was_swapped_is_unreachable_not_empty() {
        // WAL would be acknowledged on the wrong disk, and hidden when the right one comes back
        let folder = tempfile::tempdir().unwrap();
        let (root, aside) = (folder.path().join("root"), folder.path().join("aside"));
        let store = Store::open(root.to_str().unwrap(), true).unwrap();
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

    #[test]
    fn refuses_addresses_that_it_does_not_understand() {
        for url in [
            "s3://bucket/x",
            "relative/path",
            "http://x/",
            "file://host%zz",
        ] {
            assert!(
                matches!(Store::open(url, false), Err(StoreError::Url(_))),
                "{url}"
            );
        }
    }
}
