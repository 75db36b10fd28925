//! A repository in the words of the domain: segments, pieces, histories, backups.
//!
//! Objects are written once: what exists already is compared by the digest of its plain bytes, so
//! a repeated write is success and a different one is refused (DESIGN.md, invariant 4).

mod backup_record;
pub mod buffers;
pub mod catalog;
mod contents;
pub mod destination;
mod error;
pub mod forks;
pub mod index;
pub mod kept_manifests;
pub mod keys;
pub mod layout;
mod listing;
pub mod manifest;
mod member;
mod mending;
mod place;
mod reading;
pub mod records;
mod removal;
mod repack;
pub mod sharing;
#[cfg(test)]
pub(crate) mod simulation;
mod spool;
mod standing;
pub mod store;
pub mod summary;
mod taking;
mod unfinished;
pub mod walk;
pub mod windows;
mod writing;

use std::sync::{Arc, Mutex, OnceLock};

use bytes::Bytes;
use serde::Serialize;
use tokio::runtime::RuntimeFlavor;
use wal::{Checked, Lsn, SegmentSize, TimelineId, WalRange};

use layout::{ClusterName, ObjectName};
use member::Member;
use place::Place;
use records::ClusterRecord;
use store::Store;

pub use container::digest;
pub use contents::Readable;
pub(crate) use contents::first_difference;
pub use error::RepositoryError;
pub use mending::PlaceState;
pub use place::PlaceSettings;
pub use removal::RemovedBackup;
pub use spool::{Drained, SPOOL_BYTES_MAX, Spool, SpoolContents, SpoolPut, SpoolSettings};
pub use taking::BackupRecipe;
pub use writing::Stored;

/// The largest plain object that is held in memory at once: a segment of 1 GiB.
pub const PLAIN_BYTES_MAX: u64 = 1 << 30;

type Result<T, E = RepositoryError> = std::result::Result<T, E>;

/// What a server says of itself, for `cluster.json`.
#[derive(Debug, Clone, Copy)]
pub struct ServerIdentity {
    /// The system identifier.
    pub system_id: u64,
    /// The major version.
    pub major: u32,
    /// The block size in bytes.
    pub block_bytes: u32,
}

/// A decoded object.
#[derive(Debug)]
pub struct Fetched {
    /// The plain bytes.
    pub plain: Vec<u8>,
    /// What was learnt while it was written.
    pub facts: serde_json::Map<String, serde_json::Value>,
}

/// A segment or a piece, ready to be stored.
#[derive(Debug)]
pub struct EncodedWal {
    /// The object's name.
    pub name: ObjectName,
    /// The plain bytes.
    pub checked: Checked<'static>,
    timeline: TimelineId,
    size: SegmentSize,
    digest: OnceLock<String>,
    /// For each place, as it is encoded there; `None` where it was away.
    objects: Mutex<Vec<Option<Bytes>>>,
    /// A piece that supersedes nothing, and is superseded soon.
    is_brief: bool,
    /// The places that have acknowledged it, by number.
    held_by: Mutex<Vec<usize>>,
}

/// The bytes of a segment from its beginning on, as far as they are stored without a break.
#[derive(Debug)]
pub struct SegmentContent {
    /// The bytes; shorter than the segment where it is not complete.
    pub bytes: Vec<u8>,
    /// Whether a complete segment is stored.
    pub complete: bool,
}

/// When something counts as acknowledged, where a cluster has several places.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Acknowledge {
    /// Once every place holds it.
    #[default]
    All,
    /// Once one place holds it; the others are filled up.
    Any,
}

/// One system of a cluster, in every place where it is kept.
#[derive(Debug, Clone)]
pub struct Repository {
    /// At least one; reads ask them in this order.
    members: Vec<Member>,
    cluster: ClusterName,
    system_id: u64,
    acknowledge: Acknowledge,
    /// Whom it is written for, and whether that may be new under the cluster's name.
    identity: Option<(ServerIdentity, bool)>,
    /// Whether a listing needs every place.
    strict: bool,
}

impl Repository {
    fn of(
        places: &[Arc<Place>],
        cluster: &ClusterName,
        system_id: u64,
        acknowledge: Acknowledge,
    ) -> Self {
        let member =
            |place: &Arc<Place>| Member::new(Arc::clone(place), cluster.clone(), system_id);
        Self {
            members: places.iter().map(member).collect(),
            cluster: cluster.clone(),
            system_id,
            // a single place is always waited for
            acknowledge: match places {
                [_] => Acknowledge::All,
                _ => acknowledge,
            },
            identity: None,
            strict: false,
        }
    }

    fn only(&self, member: &Member) -> Self {
        Self {
            members: vec![member.clone()],
            acknowledge: Acknowledge::All,
            ..self.clone()
        }
    }

    /// The same, with an error instead of part of a listing where a place cannot be asked.
    #[must_use]
    pub fn strict(mut self) -> Self {
        self.strict = true;
        self
    }

    /// Whether it is kept in more than one place.
    pub fn has_several_places(&self) -> bool {
        self.members.len() > 1
    }

    /// When something counts as acknowledged.
    pub fn acknowledge(&self) -> Acknowledge {
        self.acknowledge
    }

    /// The cluster's name.
    pub fn cluster(&self) -> &ClusterName {
        &self.cluster
    }

    /// The system identifier.
    pub fn system_id(&self) -> u64 {
        self.system_id
    }

    /// Where an object is, or would be, for messages.
    pub fn locate(&self, name: &ObjectName) -> String {
        self.first().locate(name)
    }

    fn first(&self) -> &Member {
        self.members.first().expect("a repository has a place")
    }

    /// What `cluster.json` says.
    pub async fn cluster_record(&self) -> Result<Option<ClusterRecord>> {
        self.find(&ObjectName::Cluster).await
    }
}

/// The names of the clusters in a place.
async fn clusters_in(root: &Store) -> Result<Vec<ClusterName>> {
    let folders = root.folders("").await?;
    Ok(folders
        .iter()
        .filter_map(|folder| folder.parse().ok())
        .collect())
}

/// The system identifiers that are stored under a cluster's name in a place.
async fn systems_in(root: &Store, cluster: &ClusterName) -> Result<Vec<u64>> {
    let folders = root.below(cluster.as_str()).folders("").await?;
    Ok(folders
        .iter()
        .filter_map(|folder| folder.parse().ok())
        .collect())
}

/// The stretch `range` of bytes that begin at `start`.
pub fn stretch(bytes: &[u8], start: Lsn, range: WalRange) -> Option<&[u8]> {
    if range.start < start {
        return None;
    }
    let from = usize::try_from(range.start.bytes_since(start)).ok()?;
    let to = usize::try_from(range.end.bytes_since(start)).ok()?;
    bytes.get(from..to)
}

fn list_of(ids: &[u64]) -> String {
    ids.iter()
        .map(u64::to_string)
        .collect::<Vec<_>>()
        .join(", ")
}

fn json_of<T: Serialize>(value: &T) -> Vec<u8> {
    let mut bytes = serde_json::to_vec_pretty(&to_value(value)).expect("a value is always JSON");
    bytes.push(b'\n');
    bytes
}

fn to_value<T: Serialize>(value: &T) -> serde_json::Value {
    serde_json::to_value(value).expect("our own records have string keys and finite numbers")
}

/// Does what may block for as long as a disk likes, where it cannot be awaited: whatever else the
/// thread serves goes on elsewhere meanwhile.
pub(crate) fn in_place<T>(work: impl FnOnce() -> T) -> T {
    let runtime = tokio::runtime::Handle::try_current();
    let has_others =
        runtime.is_ok_and(|runtime| runtime.runtime_flavor() == RuntimeFlavor::MultiThread);
    if has_others {
        tokio::task::block_in_place(work)
    } else {
        work()
    }
}

/// Runs compression and hashing away from the threads that serve sockets.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    #[cfg(test)]
    if simulation::is_under_way() {
        // threads of their own would end in an order that no seed gives again
        return work();
    }
    match tokio::task::spawn_blocking(work).await {
        Ok(value) => value,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // the program ends, and whoever waits here with it
            Err(_cancelled) => std::future::pending().await,
        },
    }
}
