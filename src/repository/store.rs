//! The store below a repository: objects by path, written once. Only this file and its siblings
//! see `object_store`.

use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::TryStreamExt as _;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{GetOptions, GetRange, ObjectStore, ObjectStoreExt as _, PutMode, PutOptions};

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
        } else if let Err(error) = std::fs::metadata(&folder) {
            return Err(failed(&error));
        }
        let local = LocalFileSystem::new_with_prefix(&folder)
            .map_err(|error| failed(&chain(&error)))?
            .with_fsync(true);
        Ok(Self {
            inner: Arc::new(local),
            url: url.to_owned(),
            prefix: String::new(),
        })
    }

    /// The same store with another folder put before every path.
    #[must_use]
    pub fn below(&self, folder: &str) -> Self {
        Self {
            inner: Arc::clone(&self.inner),
            url: self.url.clone(),
            prefix: format!("{}{folder}/", self.prefix),
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
        match self
            .inner
            .put_opts(&self.at(path), bytes.into(), options)
            .await
        {
            Ok(_) => Ok(Created::New),
            Err(object_store::Error::AlreadyExists { .. }) => Ok(Created::Exists),
            Err(error) => Err(self.failed("write", path, &error)),
        }
    }

    /// Writes an object over what is there: for the tip alone.
    pub async fn overwrite(&self, path: &str, bytes: Bytes) -> Result<(), StoreError> {
        match self.inner.put(&self.at(path), bytes.into()).await {
            Ok(_) => Ok(()),
            Err(error) => Err(self.failed("write", path, &error)),
        }
    }

    /// The whole object.
    pub async fn get(&self, path: &str) -> Result<Bytes, StoreError> {
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

    /// The names of the folders directly below `folder`, sorted.
    pub async fn folders(&self, folder: &str) -> Result<Vec<String>, StoreError> {
        let prefix = self.at(folder);
        let listed = self
            .inner
            .list_with_delimiter(Some(&prefix))
            .await
            .map_err(|error| self.failed("list", folder, &error))?;
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
                reason: chain(other),
            },
        }
    }
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
