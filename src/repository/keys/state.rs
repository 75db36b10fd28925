//! The data key of the day in `state_dir`, so that the calls of one archiver share it.
//!
//! One file per repository, `<state_dir>/keys/<16 hex digits>.json`, mode 0600, written whole or
//! not at all. It is read without a lock, and replaced only under the lock of `<name>.lock`.

use std::borrow::Cow;
use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use container::DataKey;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use zeroize::Zeroizing;

use super::KeyError;
use super::id::KeyId;
use crate::durable;
use crate::retry::Backoff;

/// The newest format of the file that this build reads and the one that it writes.
const FORMAT: u64 = 1;
/// The lock is held while wraps are stored, which a store that fails may draw out.
const LOCK_PATIENCE: Duration = Duration::from_mins(3);
/// Hex digits of the file's name.
const NAME_DIGITS: usize = 16;

/// A data key, and whom its wraps are for.
#[derive(Debug, Clone)]
pub(super) struct EpochKey {
    /// Its id.
    pub(super) id: KeyId,
    /// The key.
    pub(super) key: DataKey,
    /// The recipients of its wraps, sorted.
    pub(super) recipients: Vec<String>,
}

/// Where the data key of the day is kept.
#[derive(Debug, Clone)]
pub(super) struct StateFile {
    path: PathBuf,
    /// Which one it is about.
    repository: String,
}

/// Held until dropped.
#[derive(Debug)]
pub(super) struct StateLock {
    _file: File,
}

/// The file, as written.
#[derive(Serialize, Deserialize)]
struct Written<'a> {
    format: u64,
    /// Which repository this is about.
    repository: Cow<'a, str>,
    key_id: &'a str,
    /// 64 hex digits.
    key: &'a str,
    recipients: Vec<String>,
}

impl StateFile {
    /// The file for the repository at `address`. Two buckets of one name, at two endpoints or in
    /// two accounts, differ in `scope`; it is empty where there is nothing to tell apart.
    pub(super) fn at(state_dir: &Path, address: &str, scope: &str) -> Self {
        let repository = match scope {
            "" => address.to_owned(),
            // no address holds a line feed
            scope => format!("{address}\n{scope}"),
        };
        let hash = blake3::hash(repository.as_bytes()).to_hex();
        let name: String = hash.as_str().chars().take(NAME_DIGITS).collect();
        Self {
            path: state_dir.join("keys").join(format!("{name}.json")),
            repository,
        }
    }

    /// A folder in `state_dir` for what else is kept of this repository.
    pub(super) fn folder(&self, of: &str) -> Option<PathBuf> {
        let state_dir = self.path.parent()?.parent()?;
        Some(state_dir.join(of).join(self.path.file_stem()?))
    }

    /// The key that is kept; `None` where there is none, or none that can be used: then another
    /// is made, and nothing is lost, since the wraps of the old one are in the repository.
    pub(super) fn read(&self) -> Result<Option<EpochKey>, KeyError> {
        let text = match std::fs::read(&self.path) {
            Ok(text) => Zeroizing::new(text),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(self.failed("read", &error)),
        };
        let kept = self.parse(&text)?;
        if kept.is_none() {
            tracing::warn!(
                "the data key of the day in {} is damaged: making another",
                self.path.display()
            );
        }
        Ok(kept)
    }

    fn parse(&self, text: &[u8]) -> Result<Option<EpochKey>, KeyError> {
        // a later format may change anything but this
        #[derive(Deserialize)]
        struct Format {
            format: u64,
        }
        let Ok(Format { format }) = serde_json::from_slice(text) else {
            return Ok(None);
        };
        if format > FORMAT {
            return Err(KeyError::NewerState {
                path: self.path.clone(),
                format,
            });
        }
        let Ok(written) = serde_json::from_slice::<Written<'_>>(text) else {
            return Ok(None);
        };
        let id = written.key_id.parse::<KeyId>();
        let (Ok(id), Ok(key)) = (id, DataKey::from_hex(written.key)) else {
            return Ok(None);
        };
        let is_whole =
            key.fingerprint() == id.fingerprint() && written.repository == self.repository.as_str();
        Ok(is_whole.then(|| EpochKey {
            id,
            key,
            recipients: written.recipients,
        }))
    }

    /// Keeps a key, in the place of the one that was kept. The wraps of the key must be stored.
    pub(super) fn write(&self, epoch: &EpochKey, _lock: &StateLock) -> Result<(), KeyError> {
        let (id, key) = (epoch.id.to_string(), epoch.key.to_hex());
        let written = Written {
            format: FORMAT,
            repository: Cow::Borrowed(&self.repository),
            key_id: &id,
            key: &key,
            recipients: epoch.recipients.clone(),
        };
        // room from the start: growing would leave copies behind
        let recipients: usize = epoch.recipients.iter().map(|one| one.len() * 2 + 8).sum();
        let room = recipients + self.repository.len() * 6 + 512;
        let mut text = Zeroizing::new(Vec::with_capacity(room));
        serde_json::to_writer(&mut *text, &written)
            .map_err(|error| self.failed("write", &io::Error::other(error)))?;
        text.push(b'\n');
        durable::replace(&self.path, &text).map_err(|error| self.failed("write", &error))
    }

    /// Waits for the lock.
    pub(super) async fn lock(&self) -> Result<StateLock, KeyError> {
        let path = self.path.with_extension("lock");
        let folder = path.parent().unwrap_or_else(|| Path::new("/"));
        durable::create_dir_all(folder).map_err(|error| self.failed("lock", &error))?;
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(|error| self.failed("lock", &error))?;
        let until = Instant::now() + LOCK_PATIENCE;
        let mut backoff = Backoff::new(Duration::from_millis(5), Duration::from_millis(250));
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(StateLock { _file: file }),
                Err(TryLockError::WouldBlock) if Instant::now() < until => backoff.wait().await,
                Err(TryLockError::WouldBlock) => return Err(KeyError::StateBusy { path }),
                Err(TryLockError::Error(error)) => return Err(self.failed("lock", &error)),
            }
        }
    }

    fn failed(&self, doing: &'static str, error: &io::Error) -> KeyError {
        KeyError::State {
            doing,
            path: self.path.clone(),
            reason: error.to_string(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use jiff::civil::Date;

    use super::*;

    fn epoch() -> EpochKey {
        let key = DataKey::new(&[7; 32]);
        EpochKey {
            id: KeyId::new(Date::constant(2026, 11, 20), &key.fingerprint()).unwrap(),
            key,
            recipients: vec!["age1a".to_owned(), "age1b".to_owned()],
        }
    }

    #[tokio::test]
    async fn a_kept_key_is_for_its_owner_alone() {
        let folder = tempfile::tempdir().unwrap();
        let state = StateFile::at(&folder.path().join("state"), "file:///x", "");
        assert!(state.read().unwrap().is_none());
        let lock = state.lock().await.unwrap();
        state.write(&epoch(), &lock).unwrap();
        let read = state.read().unwrap().unwrap();
        assert_eq!((read.id, read.recipients), (epoch().id, epoch().recipients));
        assert_eq!(read.key.to_hex(), epoch().key.to_hex());
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&state.path), 0o600);
        assert_eq!(mode(&state.path.with_extension("lock")), 0o600);
        assert_eq!(mode(state.path.parent().unwrap()), 0o700);
    }

    #[tokio::test]
    async fn two_buckets_of_one_name_do_not_share_a_key() {
        // whoever is given the key of one store would read the other
        let folder = tempfile::tempdir().unwrap();
        let at = |scope| StateFile::at(folder.path(), "s3://b/p", scope);
        let (one, other) = (at("endpoint=https://one"), at("endpoint=https://two"));
        let lock = one.lock().await.unwrap();
        one.write(&epoch(), &lock).unwrap();
        assert!(one.read().unwrap().is_some());
        assert!(other.read().unwrap().is_none() && at("").read().unwrap().is_none());
        // nor where the file is put in the other's place
        std::fs::copy(&one.path, &other.path).unwrap();
        assert!(other.read().unwrap().is_none());
    }

    #[tokio::test]
    async fn a_damaged_key_is_never_used() {
        // what it encrypts could be opened by nobody
        let folder = tempfile::tempdir().unwrap();
        let state = StateFile::at(folder.path(), "file:///x", "");
        let lock = state.lock().await.unwrap();
        state.write(&epoch(), &lock).unwrap();
        let whole = std::fs::read_to_string(&state.path).unwrap();
        let digit = whole.find("0707").unwrap();
        let mut other_key = whole.clone().into_bytes();
        other_key[digit] = b'1';
        let moved = whole.replace("file:///x", "file:///y");
        let damaged = [other_key, moved.into_bytes(), b"{}".to_vec(), Vec::new()];
        let cut = (1..whole.len() - 2).map(|at| whole.as_bytes()[..at].to_vec());
        for text in damaged.into_iter().chain(cut) {
            std::fs::write(&state.path, &text).unwrap();
            assert!(state.read().unwrap().is_none());
        }
        std::fs::write(&state.path, whole.replace("\"format\":1", "\"format\":2")).unwrap();
        assert!(matches!(
            state.read(),
            Err(KeyError::NewerState { format: 2, .. })
        ));
    }

    #[tokio::test]
    async fn the_lock_is_held_by_one_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let state = StateFile::at(folder.path(), "file:///x", "");
        let first = state.lock().await.unwrap();
        let (also, lock) = (state.clone(), state.path.with_extension("lock"));
        let second = tokio::spawn(async move { also.lock().await.is_ok() });
        let free = File::open(lock).unwrap().try_lock();
        assert!(matches!(free, Err(TryLockError::WouldBlock)));
        drop(first);
        assert!(second.await.unwrap());
    }
}
