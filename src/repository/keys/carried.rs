//! Keys that objects carry in their own headers, found by reading each header.

use std::collections::BTreeMap;

use container::{Error, Header, Reading};
use futures_util::{StreamExt as _, TryStreamExt as _};

use super::KeyId;
use crate::repository::layout::ObjectName;
use crate::repository::store::{Listed, Store, StoreError};
use crate::repository::{Result, clusters_in, systems_in};

/// What is read first of an object: the header of most.
const FIRST_READ_BYTES: u64 = 4096;
/// How many headers are read side by side.
const READS_AT_ONCE: usize = 16;
/// How often it is said how far the reading has come, in headers.
const SAY_EVERY: u64 = 10_000;

/// A key as objects name it.
#[derive(Debug)]
pub(super) struct Carried {
    /// How many objects are encrypted with it.
    pub(super) objects: u64,
    /// One of them, for messages.
    pub(super) example: String,
    /// The wraps that one of them carries, in base64; the same in all that carry any.
    pub(super) wraps: Vec<String>,
}

/// The keys of all objects in the repository whose root is `root`.
pub(super) async fn carried(root: &Store) -> Result<BTreeMap<KeyId, Carried>> {
    let mut found: BTreeMap<KeyId, Carried> = BTreeMap::new();
    let mut seen: u64 = 0;
    for cluster in clusters_in(root).await? {
        for system in systems_in(root, &cluster).await? {
            let store = root.below(cluster.as_str()).below(&system.to_string());
            let listed = store.list("").await?;
            let ours = listed
                .into_iter()
                .filter(|object| ObjectName::parse(&object.path).is_some());
            let mut headers = futures_util::stream::iter(ours)
                .map(|object| header_of(&store, object))
                .buffer_unordered(READS_AT_ONCE);
            while let Some(read) = headers.try_next().await? {
                seen = seen.saturating_add(1);
                if seen.is_multiple_of(SAY_EVERY) {
                    tracing::info!("keys: {seen} headers read");
                }
                if let Some((path, header)) = read {
                    add(&mut found, path, header);
                }
            }
        }
    }
    Ok(found)
}

fn add(found: &mut BTreeMap<KeyId, Carried>, path: String, header: Header) {
    let Some(text) = &header.key else { return };
    let Ok(id) = text.parse::<KeyId>() else {
        tracing::warn!("the header of {path} names no key that could be: {text:?}");
        return;
    };
    let carried = found.entry(id).or_insert_with(|| Carried {
        objects: 0,
        example: path,
        wraps: Vec::new(),
    });
    carried.objects = carried.objects.saturating_add(1);
    if carried.wraps.is_empty() {
        carried.wraps = header.wraps;
    }
}

/// The header of an object, with where it is; `None` where it has none or is gone by now.
///
/// A damaged object is said so and left out: a copy of it may need its key, and a rotation that one
/// object could stop would leave all keys to whom they were for.
async fn header_of(store: &Store, object: Listed) -> Result<Option<(String, Header)>> {
    let Listed { path, bytes } = object;
    let mut length = FIRST_READ_BYTES.min(bytes);
    let reason = loop {
        if length == 0 {
            break "it is empty".to_owned();
        }
        let prefix = match store.get_range(&path, 0, length).await {
            Ok(prefix) => prefix,
            Err(StoreError::NotFound { .. }) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        match container::read_header(&prefix) {
            Ok(Reading::Done((header, _))) => return Ok(Some((store.locate(&path), header))),
            Ok(Reading::NeedMore(more)) if length < more && more <= bytes => length = more,
            Ok(Reading::NeedMore(_)) => break "it is cut short".to_owned(),
            // the small records are plain JSON
            Err(Error::NotAnObject { .. }) => return Ok(None),
            Err(error) => break error.to_string(),
        }
    };
    tracing::warn!(
        "which key {} needs is not known: {reason}",
        store.locate(&path)
    );
    Ok(None)
}
