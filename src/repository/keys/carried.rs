//! Keys that objects carry in their own headers, found by reading each header.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use container::{Header, Reading};
use futures_util::{StreamExt as _, TryStreamExt as _};
use serde::Deserialize;

use super::KeyId;
use crate::repository::layout::ObjectName;
use crate::repository::store::{Listed, Store, StoreError};
use crate::repository::{Result, clusters_in, systems_in};

/// What is read first of an object: the header of most.
const FIRST_READ_BYTES: u64 = 4096;
/// A backup's record has some thousand bytes; what is longer than this is none.
const RECORD_BYTES_MAX: u64 = 16 << 20;
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

/// What the objects of a repository say of their keys.
#[derive(Debug, Default)]
pub(super) struct Census {
    /// Every key that is named.
    pub(super) keys: BTreeMap<KeyId, Carried>,
    /// How many objects do not tell which key they need.
    pub(super) unreadable: u64,
    /// One of them, for messages.
    pub(super) unreadable_example: Option<String>,
}

/// What an object says.
enum Said {
    Header(Box<Header>),
    /// It has none: it is a record in the clear, or is gone by now.
    Nothing,
    /// It ought to have one.
    Unreadable(String),
}

/// The keys of all objects in the repository whose root is `root`.
///
/// A damaged object is said so and counted: a copy of it may need its key. It stops nothing here,
/// since a rotation that one object could stop would leave all keys to whom they were for.
pub(super) async fn carried(root: &Store) -> Result<Census> {
    let mut census = Census::default();
    let mut seen: u64 = 0;
    for cluster in clusters_in(root).await? {
        for system in systems_in(root, &cluster).await? {
            let store = root.below(cluster.as_str()).below(&system.to_string());
            let listed = store.list("").await?;
            let ours = listed
                .into_iter()
                .filter_map(|object| Some((ObjectName::parse(&object.path)?, object)));
            let mut headers = futures_util::stream::iter(ours)
                .map(|(name, object)| header_of(&store, name, object))
                .buffer_unordered(READS_AT_ONCE);
            while let Some((path, said)) = headers.try_next().await? {
                seen = seen.saturating_add(1);
                if seen.is_multiple_of(SAY_EVERY) {
                    tracing::info!("keys: {seen} headers read");
                }
                census.add(path, said);
            }
        }
    }
    Ok(census)
}

impl Census {
    fn add(&mut self, path: String, said: Said) {
        let header = match said {
            Said::Header(header) => *header,
            Said::Nothing => return,
            Said::Unreadable(reason) => return self.add_unreadable(path, &reason),
        };
        let Some(text) = &header.key else { return };
        let Ok(id) = text.parse::<KeyId>() else {
            let reason = format!("its header names no key that could be: {text:?}");
            return self.add_unreadable(path, &reason);
        };
        let carried = self.keys.entry(id).or_insert_with(|| Carried {
            objects: 0,
            example: path,
            wraps: Vec::new(),
        });
        carried.objects = carried.objects.saturating_add(1);
        if carried.wraps.is_empty() {
            carried.wraps = header.wraps;
        }
    }

    fn add_unreadable(&mut self, path: String, reason: &str) {
        tracing::warn!("which key {path} needs is not known: {reason}");
        self.unreadable = self.unreadable.saturating_add(1);
        self.unreadable_example.get_or_insert(path);
    }
}

/// What an object says of its key, and where it is.
async fn header_of(store: &Store, name: ObjectName, object: Listed) -> Result<(String, Said)> {
    let path = store.locate(&object.path);
    let said = match name {
        // these are never encrypted
        ObjectName::Cluster
        | ObjectName::Hole { .. }
        | ObjectName::Intent(_)
        | ObjectName::Mark { .. }
        | ObjectName::Unfinished(_)
        | ObjectName::Tip(_) => Ok(Said::Nothing),
        ObjectName::Backup(_) => sealed_in_record(store, &object).await,
        _ => at_the_beginning(store, &object).await,
    };
    match said {
        Ok(said) => Ok((path, said)),
        Err(StoreError::NotFound { .. }) => Ok((path, Said::Nothing)),
        Err(error) => Err(error.into()),
    }
}

/// The header that an object begins with.
async fn at_the_beginning(store: &Store, object: &Listed) -> Result<Said, StoreError> {
    let mut length = FIRST_READ_BYTES.min(object.bytes);
    if length == 0 {
        return Ok(Said::Unreadable("it is empty".to_owned()));
    }
    loop {
        let prefix = store.get_range(&object.path, 0, length).await?;
        match container::read_header(&prefix) {
            Ok(Reading::NeedMore(more)) if length < more && more <= object.bytes => length = more,
            read => return Ok(said_by(read)),
        }
    }
}

/// The header of the object that a backup's record holds in base64: it has a key, and may carry
/// wraps, like any other.
async fn sealed_in_record(store: &Store, object: &Listed) -> Result<Said, StoreError> {
    #[derive(Deserialize)]
    struct Record {
        sealed: Option<String>,
    }
    if object.bytes > RECORD_BYTES_MAX {
        let reason = format!("it is too long for a record: bytes={}", object.bytes);
        return Ok(Said::Unreadable(reason));
    }
    let text = store.get_range(&object.path, 0, RECORD_BYTES_MAX).await?;
    let sealed = match serde_json::from_slice::<Record>(&text) {
        Ok(Record { sealed: None }) => return Ok(Said::Nothing),
        Ok(Record { sealed: Some(text) }) => BASE64.decode(text),
        Err(error) => return Ok(Said::Unreadable(error.to_string())),
    };
    Ok(match sealed {
        Ok(object) => said_by(container::read_header(&object)),
        Err(error) => Said::Unreadable(format!("its sealed part is no base64: {error}")),
    })
}

fn said_by(read: Result<Reading<(Header, u64)>, container::Error>) -> Said {
    match read {
        Ok(Reading::Done((header, _))) => Said::Header(Box::new(header)),
        Ok(Reading::NeedMore(_)) => Said::Unreadable("it is cut short".to_owned()),
        Err(error) => Said::Unreadable(error.to_string()),
    }
}
