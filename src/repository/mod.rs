//! A repository in the words of the domain: segments, pieces, histories, backups.
//!
//! Objects are written once: what exists already is compared by the digest of its plain bytes, so
//! a repeated write is success and a different one is refused (DESIGN.md, invariant 4).

pub mod catalog;
pub mod destination;
mod error;
pub mod keys;
pub mod layout;
mod reading;
pub mod records;
pub mod store;
pub mod walk;
pub mod windows;
mod writing;

use bytes::Bytes;
use wal::{Checked, Lsn, WalRange};

use layout::{ClusterName, ObjectName};
use records::{ClusterRecord, FORMAT};
use store::Store;

pub use error::RepositoryError;

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
    object: Bytes,
    digest: String,
}

/// The bytes of a segment from its beginning on, as far as they are stored without a break.
#[derive(Debug)]
pub struct SegmentContent {
    /// The bytes; shorter than the segment where it is not complete.
    pub bytes: Vec<u8>,
    /// Whether a complete segment is stored.
    pub complete: bool,
}

/// The system identifiers that are stored under a cluster's name.
pub async fn systems(store: &Store, cluster: &ClusterName) -> Result<Vec<u64>> {
    let folders = store.below(cluster.as_str()).folders("").await?;
    Ok(folders
        .iter()
        .filter_map(|folder| folder.parse().ok())
        .collect())
}

/// The names of the clusters in a repository.
pub async fn clusters(store: &Store) -> Result<Vec<ClusterName>> {
    Ok(store
        .folders("")
        .await?
        .iter()
        .filter_map(|folder| folder.parse().ok())
        .collect())
}

/// One system of a cluster in one repository.
#[derive(Debug, Clone)]
pub struct Repository {
    store: Store,
    cluster: ClusterName,
    system_id: u64,
    wal_level: i32,
    backup_level: i32,
}

impl Repository {
    /// Opens the repository for a server's own objects, and makes `cluster.json` at first contact.
    ///
    /// A name under which another system is stored is refused, unless `new_system` is set.
    pub async fn for_server(
        store: &Store,
        cluster: &ClusterName,
        identity: ServerIdentity,
        new_system: bool,
    ) -> Result<Self> {
        let stored = systems(store, cluster).await?;
        if !new_system && !stored.is_empty() && !stored.contains(&identity.system_id) {
            return Err(RepositoryError::OtherSystem {
                cluster: cluster.clone(),
                url: store.url().to_owned(),
                stored: list_of(&stored),
                found: identity.system_id,
            });
        }
        let repository = Self::of(store, cluster, identity.system_id);
        if repository
            .find::<ClusterRecord>(&ObjectName::Cluster)
            .await?
            .is_none()
        {
            let record = ClusterRecord {
                format: FORMAT,
                name: cluster.to_string(),
                system_id: identity.system_id.to_string(),
                major: identity.major,
                block_bytes: identity.block_bytes,
            };
            repository
                .create_json(&ObjectName::Cluster, &record)
                .await?;
        }
        repository.check_format().await?;
        Ok(repository)
    }

    /// Opens what is stored under a cluster's name; `system_id` chooses among several.
    pub async fn open(
        store: &Store,
        cluster: &ClusterName,
        system_id: Option<u64>,
    ) -> Result<Self> {
        let stored = systems(store, cluster).await?;
        let no_cluster = |name: String| RepositoryError::NoCluster {
            cluster: name,
            url: store.url().to_owned(),
        };
        let chosen = match (system_id, stored.as_slice()) {
            (Some(id), ids) if ids.contains(&id) => id,
            (Some(id), _) => return Err(no_cluster(format!("{cluster} of system {id}"))),
            (None, []) => return Err(no_cluster(cluster.to_string())),
            (None, [only]) => *only,
            (None, several) => {
                return Err(RepositoryError::SeveralSystems {
                    cluster: cluster.clone(),
                    url: store.url().to_owned(),
                    systems: list_of(several),
                });
            }
        };
        let repository = Self::of(store, cluster, chosen);
        repository.check_format().await?;
        Ok(repository)
    }

    fn of(store: &Store, cluster: &ClusterName, system_id: u64) -> Self {
        Self {
            store: store.below(cluster.as_str()).below(&system_id.to_string()),
            cluster: cluster.clone(),
            system_id,
            wal_level: 2,
            backup_level: 3,
        }
    }

    /// Sets the zstd levels for WAL and for backups.
    #[must_use]
    pub fn with_levels(mut self, wal: i32, backup: i32) -> Self {
        self.wal_level = wal;
        self.backup_level = backup;
        self
    }

    /// The zstd level for backups.
    pub fn backup_level(&self) -> i32 {
        self.backup_level
    }

    /// The cluster's name.
    pub fn cluster(&self) -> &ClusterName {
        &self.cluster
    }

    /// The system identifier.
    pub fn system_id(&self) -> u64 {
        self.system_id
    }

    /// Where an object is, for messages.
    pub fn locate(&self, name: &ObjectName) -> String {
        self.store.locate(&name.path())
    }

    async fn check_format(&self) -> Result<()> {
        let record: Option<ClusterRecord> = self.find(&ObjectName::Cluster).await?;
        match record {
            Some(record) if record.format > FORMAT => Err(RepositoryError::Newer {
                path: self.locate(&ObjectName::Cluster),
                format: record.format,
            }),
            _ => Ok(()),
        }
    }

    /// What `cluster.json` says.
    pub async fn cluster_record(&self) -> Result<Option<ClusterRecord>> {
        self.find(&ObjectName::Cluster).await
    }
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

/// Runs compression and hashing away from the threads that serve sockets.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(value) => value,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}
