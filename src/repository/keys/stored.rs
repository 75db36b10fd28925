//! The wraps in a repository: `<url>/keys/<key id>/<wrap id>`.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;

use super::KeyError;
use super::id::{FOLDER, KeyId, WrapId, parse_wrap_path, wrap_path};
use crate::repository::store::{Store, StoreError};

/// A wrap has some 200 bytes; what is longer than this is none.
const WRAP_BYTES_MAX: u64 = 64 << 10;

/// The folder of wraps in a repository.
#[derive(Debug, Clone)]
pub(super) struct StoredWraps {
    store: Store,
}

/// What stands where a wrap is expected.
pub(super) enum StoredWrap {
    /// Its bytes.
    Bytes(Bytes),
    /// It went away since it was listed.
    Gone,
    /// It is far too long to be one, and was not read.
    TooLong,
}

impl StoredWraps {
    /// The wraps of the repository whose root is `root`.
    pub(super) fn of(root: &Store) -> Self {
        Self {
            store: root.below(FOLDER),
        }
    }

    /// Every key of which a wrap is stored, with its wraps, oldest first.
    pub(super) async fn all(&self) -> Result<BTreeMap<KeyId, BTreeSet<WrapId>>, KeyError> {
        let mut keys: BTreeMap<KeyId, BTreeSet<WrapId>> = BTreeMap::new();
        for object in self.store.list("").await? {
            if let Some((key, wrap)) = parse_wrap_path(&object.path) {
                keys.entry(key).or_default().insert(wrap);
            }
        }
        Ok(keys)
    }

    /// The wraps of one key.
    pub(super) async fn of_key(&self, key: &KeyId) -> Result<BTreeSet<WrapId>, KeyError> {
        let listed = self.store.list(&key.folder()).await?;
        let parsed = listed
            .iter()
            .filter_map(|object| parse_wrap_path(&object.path));
        Ok(parsed
            .filter(|(found, _)| found == key)
            .map(|(_, wrap)| wrap)
            .collect())
    }

    /// The bytes of a wrap.
    pub(super) async fn read(&self, key: &KeyId, wrap: &WrapId) -> Result<StoredWrap, KeyError> {
        let path = wrap_path(key, wrap);
        let most = WRAP_BYTES_MAX.saturating_add(1);
        match self.store.get_range(&path, 0, most).await {
            Ok(bytes) if u64::try_from(bytes.len()).is_ok_and(|length| length < most) => {
                Ok(StoredWrap::Bytes(bytes))
            }
            Ok(_) => Ok(StoredWrap::TooLong),
            Err(StoreError::NotFound { .. }) => Ok(StoredWrap::Gone),
            Err(error) => Err(error.into()),
        }
    }

    /// Stores a wrap, unless one is there for the same recipient. Once this returns, it is durable.
    pub(super) async fn add(
        &self,
        key: &KeyId,
        wrap: &WrapId,
        bytes: Vec<u8>,
    ) -> Result<(), KeyError> {
        // two wraps of a key for one recipient differ in their bytes and hold the same
        self.store
            .create(&wrap_path(key, wrap), bytes.into())
            .await?;
        Ok(())
    }

    /// Removes a wrap.
    pub(super) async fn retire(&self, key: &KeyId, wrap: &WrapId) -> Result<(), KeyError> {
        Ok(self.store.delete(&wrap_path(key, wrap)).await?)
    }

    /// Where a wrap is, for messages.
    pub(super) fn locate(&self, key: &KeyId, wrap: &WrapId) -> String {
        self.store.locate(&wrap_path(key, wrap))
    }
}
