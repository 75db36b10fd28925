//! A repository in the words of the domain: segments, pieces, histories, backups.
//!
//! Objects are written once: what exists already is compared by the digest of its plain bytes, so
//! a repeated write is success and a different one is refused (DESIGN.md, invariant 4).

pub mod catalog;
pub mod destination;
pub mod layout;
pub mod records;
pub mod store;
pub mod walk;
pub mod windows;

use std::collections::BTreeSet;

use bytes::Bytes;
use container::Header;
use jiff::Timestamp;
use serde::Serialize;
use serde::de::DeserializeOwned;
use wal::{Checked, Lsn, SegmentName, SegmentSize, TimelineHistory, TimelineId, Verdict, WalRange};

use crate::error::{Error, Kind, chain};
use catalog::Catalog;
use layout::{BackupId, ClusterName, ObjectName, pieces_prefix, timeline_prefix};
use records::{BackupRecord, ClusterRecord, FORMAT, Hole, Tip, WalFacts};
use store::{Created, Store, StoreError};

/// The largest plain object that is held in memory at once: a segment of 1 GiB.
pub const PLAIN_BYTES_MAX: u64 = 1 << 30;
/// How much of an object's end is read to find its trailer.
const TAIL_BYTES: u64 = 16 << 10;

/// Why something could not be stored or read.
#[derive(Debug, thiserror::Error)]
pub enum RepositoryError {
    /// The store's own answer.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Stored bytes are not what they should be.
    #[error("damaged object {path}: {reason}")]
    Damaged {
        /// Where.
        path: String,
        /// What was found.
        reason: String,
    },
    /// Another content is stored under this name.
    #[error("different bytes are already stored under {path}: stored={stored}, new={new}")]
    Conflict {
        /// Where.
        path: String,
        /// The digest of what is stored.
        stored: String,
        /// The digest of what was to be stored.
        new: String,
    },
    /// Two stored stretches of one timeline disagree.
    #[error("two histories: stored stretches differ at {lsn} on timeline {timeline}: {path}")]
    TwoHistories {
        /// Where they first differ.
        lsn: Lsn,
        /// The timeline.
        timeline: TimelineId,
        /// The object that disagrees with the others.
        path: String,
    },
    /// The cluster's name belongs to another system.
    #[error(
        "cluster {cluster} in {url} holds another system: stored={stored}, this server={found}"
    )]
    OtherSystem {
        /// The cluster's name.
        cluster: ClusterName,
        /// The repository.
        url: String,
        /// The system identifiers in the repository.
        stored: String,
        /// The system identifier of the server.
        found: u64,
    },
    /// Nothing is stored for the cluster.
    #[error("no cluster {cluster} in {url}")]
    NoCluster {
        /// The cluster's name.
        cluster: String,
        /// The repository.
        url: String,
    },
    /// What was stored a while ago is not there.
    #[error("what was stored in {url} is not there any more")]
    Gone {
        /// The repository.
        url: String,
    },
    /// The server's segment size was changed.
    #[error(
        "the WAL segment size has changed: stored={stored} bytes, this server={found} bytes ({path})"
    )]
    OtherSegmentSize {
        /// The size of what is stored.
        stored: u64,
        /// The server's.
        found: u64,
        /// A stored object of that size.
        path: String,
    },
    /// Several systems live under the name, and none was chosen.
    #[error("cluster {cluster} in {url} holds several systems: {systems}")]
    SeveralSystems {
        /// The cluster's name.
        cluster: ClusterName,
        /// The repository.
        url: String,
        /// Their system identifiers.
        systems: String,
    },
    /// Written by a later version.
    #[error("{path} was written in repository format {format}; this build reads up to {FORMAT}")]
    Newer {
        /// Where.
        path: String,
        /// Its format.
        format: u32,
    },
}

impl RepositoryError {
    /// Whether the answer is that there is no such object.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Store(StoreError::NotFound { .. }))
    }

    /// Whether another attempt may succeed.
    pub fn is_unreachable(&self) -> bool {
        matches!(
            self,
            Self::Store(StoreError::Unreachable { .. }) | Self::Gone { .. }
        )
    }
}

impl From<layout::InvalidClusterName> for Error {
    fn from(error: layout::InvalidClusterName) -> Self {
        Self::usage(error.to_string())
    }
}

impl From<layout::InvalidBackupId> for Error {
    fn from(error: layout::InvalidBackupId) -> Self {
        Self::usage(error.to_string()).hint("`anywhen list` shows the ids")
    }
}

impl From<RepositoryError> for Error {
    fn from(error: RepositoryError) -> Self {
        let message = error.to_string();
        match error {
            RepositoryError::Store(inner) => inner.into(),
            RepositoryError::Damaged { .. } => Self::damaged(message)
                .hint("restore this object from a copy of the repository, or use another backup"),
            RepositoryError::Conflict { .. } | RepositoryError::TwoHistories { .. } => {
                Self::damaged(message).hint(
                    "two servers wrote the same WAL positions (a copy that kept archiving, or a \
                     server set back): give each its own cluster name",
                )
            }
            RepositoryError::OtherSystem { .. } => Self::usage(message).hint(
                "use another --cluster name, or --new-system if this server replaces the old one",
            ),
            RepositoryError::NoCluster { .. } => Self::not_found(message)
                .hint("check --repo and --cluster; `anywhen list` shows what is stored"),
            RepositoryError::Gone { .. } => Self::new(Kind::Unreachable, message)
                .hint("is the disk mounted? nothing is acknowledged until it is back"),
            RepositoryError::OtherSegmentSize { .. } => {
                Self::usage(message).hint("give the server another --cluster name")
            }
            RepositoryError::SeveralSystems { .. } => {
                Self::usage(message).hint("name one with --system-id")
            }
            RepositoryError::Newer { .. } => {
                Self::new(Kind::Failure, message).hint("upgrade anywhen")
            }
        }
    }
}

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

    // -- writing ------------------------------------------------------------------------------

    /// The header of an object of this system.
    pub fn header(&self, name: &ObjectName) -> Header {
        Header {
            format: FORMAT,
            kind: name.kind().to_owned(),
            name: name.path(),
            cluster: self.cluster.to_string(),
            system_id: self.system_id.to_string(),
            timeline: None,
            start: None,
            end: None,
            segment_bytes: None,
            codec: "zstd".to_owned(),
            key: None,
        }
    }

    /// Makes a segment or a piece into the object that [`Self::put_wal`] stores.
    pub async fn encode_wal(
        &self,
        name: ObjectName,
        timeline: TimelineId,
        size: SegmentSize,
        checked: Checked<'static>,
    ) -> Result<EncodedWal> {
        let mut header = self.header(&name);
        header.timeline = Some(timeline.get());
        header.start = Some(checked.range().start.to_string());
        header.end = Some(checked.range().end.to_string());
        header.segment_bytes = Some(size.bytes());
        let mut facts = serde_json::Map::new();
        facts.insert("wal".to_owned(), to_value(&wal_facts(&checked)));
        let level = self.wal_level;
        let encoded = blocking(move || {
            let object = container::encode(&header, checked.bytes(), facts, level)?;
            Ok((object, container::digest(checked.bytes()), checked))
        });
        let (object, digest, checked) =
            encoded.await.map_err(|error| self.damaged(&name, &error))?;
        Ok(EncodedWal {
            name,
            object: object.into(),
            digest,
            checked,
        })
    }

    /// Stores a segment or a piece. Once this returns, it is durable; it may be tried again.
    pub async fn put_wal(&self, wal: &EncodedWal) -> Result<()> {
        self.create_object(&wal.name, wal.object.clone(), &wal.digest)
            .await
    }

    /// Stores a small file of the server's, byte for byte: a history, a backup history.
    pub async fn store_file(&self, name: &ObjectName, bytes: Bytes) -> Result<()> {
        let mut header = self.header(name);
        header.timeline = match name {
            ObjectName::History(timeline) => Some(timeline.get()),
            _ => None,
        };
        self.store_container(name, header, serde_json::Map::new(), bytes, self.wal_level)
            .await
    }

    async fn store_container(
        &self,
        name: &ObjectName,
        header: Header,
        facts: serde_json::Map<String, serde_json::Value>,
        plain: Bytes,
        level: i32,
    ) -> Result<()> {
        let (object, digest) = blocking(move || {
            let digest = container::digest(&plain);
            container::encode(&header, &plain, facts, level).map(|object| (object, digest))
        })
        .await
        .map_err(|error| self.damaged(name, &error))?;
        self.create_object(name, object.into(), &digest).await
    }

    /// Creates an object that was encoded already; `digest` is that of its plain bytes.
    pub async fn create_object(
        &self,
        name: &ObjectName,
        object: Bytes,
        digest: &str,
    ) -> Result<()> {
        match self.store.create(&name.path(), object).await? {
            Created::New => Ok(()),
            Created::Exists => {
                let stored = self.trailer(name).await?.digest;
                if stored == digest {
                    Ok(())
                } else {
                    Err(RepositoryError::Conflict {
                        path: self.locate(name),
                        stored,
                        new: digest.to_owned(),
                    })
                }
            }
        }
    }

    async fn create_json<T: Serialize>(&self, name: &ObjectName, value: &T) -> Result<()> {
        let bytes = Bytes::from(json_of(value));
        match self.store.create(&name.path(), bytes.clone()).await? {
            Created::New => Ok(()),
            Created::Exists => {
                let stored = self.store.get(&name.path()).await?;
                if stored == bytes {
                    return Ok(());
                }
                Err(RepositoryError::Conflict {
                    path: self.locate(name),
                    stored: container::digest(&stored),
                    new: container::digest(&bytes),
                })
            }
        }
    }

    /// Takes an id for a backup that begins at `time`, or the first moment after it that is free.
    pub async fn announce_backup(&self, time: Timestamp) -> Result<BackupId> {
        let mut at = time;
        loop {
            let id = BackupId::at(at);
            let intent = Bytes::from(json_of(&serde_json::json!({ "format": FORMAT, "id": id })));
            match self
                .store
                .create(&ObjectName::Intent(id.clone()).path(), intent)
                .await?
            {
                Created::New => return Ok(id),
                Created::Exists => {
                    at = at
                        .checked_add(jiff::SignedDuration::from_millis(1))
                        .unwrap_or(at);
                }
            }
        }
    }

    /// Makes a backup exist. Everything that it refers to must be stored before.
    pub async fn commit_backup(&self, record: &BackupRecord) -> Result<()> {
        self.create_json(&ObjectName::Backup(record.id.clone()), record)
            .await?;
        self.store
            .delete(&ObjectName::Intent(record.id.clone()).path())
            .await?;
        Ok(())
    }

    /// Removes what a backup that did not come to its end has stored.
    pub async fn discard_backup(&self, id: &BackupId) -> Result<()> {
        if self
            .find::<BackupRecord>(&ObjectName::Backup(id.clone()))
            .await?
            .is_some()
        {
            return Ok(());
        }
        for object in self.store.list(&format!("packs/{id}/")).await? {
            self.store.delete(&object.path).await?;
        }
        self.store
            .delete(&ObjectName::Manifest(id.clone()).path())
            .await?;
        self.store
            .delete(&ObjectName::Intent(id.clone()).path())
            .await?;
        Ok(())
    }

    /// Records that a stretch cannot be had.
    pub async fn record_hole(&self, hole: &Hole) -> Result<()> {
        let name = ObjectName::Hole {
            timeline: hole.timeline,
            range: hole.range(),
        };
        match self.create_json(&name, hole).await {
            // the same hole, found at another time
            Err(RepositoryError::Conflict { .. }) | Ok(()) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Rewrites the tip of a timeline.
    pub async fn write_tip(&self, timeline: TimelineId, tip: &Tip) -> Result<()> {
        let path = ObjectName::Tip(timeline).path();
        Ok(self.store.overwrite(&path, json_of(tip).into()).await?)
    }

    /// Removes those pieces of a segment whose bytes `by` holds, which must be acknowledged.
    ///
    /// A piece that differs is left, and is an error: it is another history.
    pub async fn remove_superseded_pieces(
        &self,
        segment: SegmentName,
        by: &EncodedWal,
    ) -> Result<()> {
        let (start, plain) = (by.checked.range().start, by.checked.bytes());
        for name in self.pieces_of(segment).await? {
            if name == by.name {
                continue;
            }
            let ObjectName::Piece { range, .. } = &name else {
                continue;
            };
            let Some(ours) = stretch(plain, start, *range) else {
                continue;
            };
            let stored = match self.trailer(&name).await {
                Ok(trailer) => trailer.digest,
                Err(error) if error.is_not_found() => continue,
                Err(error) => return Err(error),
            };
            let new = container::digest(ours);
            if stored != new {
                return Err(RepositoryError::Conflict {
                    path: self.locate(&name),
                    stored,
                    new,
                });
            }
            self.store.delete(&name.path()).await?;
        }
        Ok(())
    }

    // -- reading ------------------------------------------------------------------------------

    /// Reads, checks and decodes an object.
    pub async fn fetch(&self, name: &ObjectName) -> Result<Fetched> {
        let object = self.store.get(&name.path()).await?;
        let decoded = blocking(move || container::decode(&object, PLAIN_BYTES_MAX))
            .await
            .map_err(|error| self.damaged(name, &error))?;
        self.check_header(name, &decoded.header)?;
        Ok(Fetched {
            plain: decoded.plain,
            facts: decoded.trailer.facts,
        })
    }

    /// `length` stored bytes of an object from `offset`.
    pub async fn fetch_range(&self, name: &ObjectName, offset: u64, length: u64) -> Result<Bytes> {
        Ok(self.store.get_range(&name.path(), offset, length).await?)
    }

    fn check_header(&self, name: &ObjectName, header: &Header) -> Result<()> {
        let expected = (
            name.path(),
            self.cluster.as_str(),
            self.system_id.to_string(),
        );
        if (&header.name, header.cluster.as_str(), &header.system_id)
            == (&expected.0, expected.1, &expected.2)
        {
            return Ok(());
        }
        Err(RepositoryError::Damaged {
            path: self.locate(name),
            reason: format!(
                "it says that it is another object: cluster={}, system={}, name={}",
                header.cluster, header.system_id, header.name
            ),
        })
    }

    async fn trailer(&self, name: &ObjectName) -> Result<container::Trailer> {
        let mut wanted = TAIL_BYTES;
        loop {
            let (tail, object_bytes) = self.store.get_tail(&name.path(), wanted).await?;
            match container::read_trailer(&tail, object_bytes) {
                Ok(container::Reading::Done(trailer)) => return Ok(trailer),
                Ok(container::Reading::NeedMore(bytes)) if bytes > wanted => wanted = bytes,
                Ok(container::Reading::NeedMore(_)) => {
                    return Err(RepositoryError::Damaged {
                        path: self.locate(name),
                        reason: "no whole trailer at its end".to_owned(),
                    });
                }
                Err(error) => return Err(self.damaged(name, &error)),
            }
        }
    }

    fn damaged(&self, name: &ObjectName, error: &container::Error) -> RepositoryError {
        match error {
            container::Error::NewerFormat { found, .. } => RepositoryError::Newer {
                path: self.locate(name),
                format: *found,
            },
            other => RepositoryError::Damaged {
                path: self.locate(name),
                reason: chain(other),
            },
        }
    }

    async fn find<T: DeserializeOwned>(&self, name: &ObjectName) -> Result<Option<T>> {
        let bytes = match self.store.get(&name.path()).await {
            Ok(bytes) => bytes,
            Err(StoreError::NotFound { .. }) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let damaged = |error: serde_json::Error| RepositoryError::Damaged {
            path: self.locate(name),
            reason: error.to_string(),
        };
        let format: Format = serde_json::from_slice(&bytes).map_err(damaged)?;
        if let Some(format) = format.format.filter(|format| *format > FORMAT) {
            return Err(RepositoryError::Newer {
                path: self.locate(name),
                format,
            });
        }
        serde_json::from_slice(&bytes).map(Some).map_err(damaged)
    }

    /// As [`Self::find`]; one damaged object among many is said, and does not hide the others.
    async fn find_or_warn<T: DeserializeOwned>(&self, name: &ObjectName) -> Result<Option<T>> {
        match self.find(name).await {
            Err(error @ RepositoryError::Damaged { .. }) => {
                tracing::error!("left out: {error}");
                Ok(None)
            }
            other => other,
        }
    }

    /// A backup by its id; `None` if there is none, or it never came to its end.
    pub async fn backup(&self, id: &BackupId) -> Result<Option<BackupRecord>> {
        self.find(&ObjectName::Backup(id.clone())).await
    }

    /// Whether the WAL in a segment or a piece was checked and found whole.
    pub async fn is_verified(&self, name: &ObjectName) -> Result<bool> {
        let facts = self.trailer(name).await?.facts;
        let facts = facts.get("wal").cloned().unwrap_or_default();
        let facts: WalFacts =
            serde_json::from_value(facts).map_err(|error| RepositoryError::Damaged {
                path: self.locate(name),
                reason: format!("its trailer does not say what was verified: {error}"),
            })?;
        Ok(facts.verified)
    }

    /// Refuses a server whose segment size is not that of what is stored.
    pub async fn check_segment_size(&self, size: SegmentSize) -> Result<()> {
        let Some(newest) = self.timelines().await?.last().copied() else {
            return Ok(());
        };
        let wal = self.timeline_wal(newest).await?;
        let piece = || {
            let (segment, ranges) = wal.pieces.last_key_value()?;
            let range = *ranges.last()?;
            Some(ObjectName::Piece {
                segment: *segment,
                range,
            })
        };
        let segment = wal
            .segments
            .last()
            .map(|segment| ObjectName::Segment(*segment));
        let Some(name) = segment.or_else(piece) else {
            return Ok(());
        };
        let stored = self.segment_size_of(&name).await?;
        if stored == size {
            return Ok(());
        }
        Err(RepositoryError::OtherSegmentSize {
            stored: stored.bytes(),
            found: size.bytes(),
            path: self.locate(&name),
        })
    }

    /// Makes everything durable that a listing shows.
    pub async fn sync(&self) -> Result<()> {
        Ok(self.store.sync().await?)
    }

    /// What is stored of WAL, and where streams have been.
    pub async fn wal_catalog(&self) -> Result<Catalog> {
        let mut catalog = Catalog::default();
        catalog.add_listing(&self.store.list("wal/").await?);
        for object in self.store.list("tip/").await? {
            if let Some(name @ ObjectName::Tip(timeline)) = ObjectName::parse(&object.path)
                && let Ok(Some(tip)) = self.find::<Tip>(&name).await
            {
                catalog.tips.insert(timeline, tip);
            }
        }
        Ok(catalog)
    }

    /// Every backup that came to its end, oldest first.
    pub async fn backups(&self) -> Result<Vec<BackupRecord>> {
        let mut backups = Vec::new();
        for object in self.store.list("backups/").await? {
            if let Some(name @ ObjectName::Backup(_)) = ObjectName::parse(&object.path) {
                backups.extend(self.find_or_warn::<BackupRecord>(&name).await?);
            }
        }
        backups.sort_by(|a, b| (a.started_at, &a.id).cmp(&(b.started_at, &b.id)));
        Ok(backups)
    }

    /// The stored WAL of a timeline.
    pub async fn timeline_wal(&self, timeline: TimelineId) -> Result<catalog::TimelineWal> {
        let mut catalog = Catalog::default();
        catalog.add_listing(&self.store.list(&timeline_prefix(timeline)).await?);
        Ok(catalog.timelines.remove(&timeline).unwrap_or_default())
    }

    /// The timelines of which WAL is stored.
    pub async fn timelines(&self) -> Result<BTreeSet<TimelineId>> {
        let folders = self.store.folders("wal/").await?;
        Ok(folders
            .iter()
            .filter_map(|folder| TimelineId::from_hex8(folder))
            .collect())
    }

    /// A timeline's history file, as the server wrote it.
    pub async fn history(&self, timeline: TimelineId) -> Result<Option<Vec<u8>>> {
        match self.fetch(&ObjectName::History(timeline)).await {
            Ok(fetched) => Ok(Some(fetched.plain)),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The branch that ends in `timeline`, from its stored history.
    pub async fn branch(&self, timeline: TimelineId) -> Result<TimelineHistory> {
        match self.history(timeline).await? {
            None => Ok(TimelineHistory::new_first(timeline)),
            Some(text) => self.parse_history(timeline, &text),
        }
    }

    fn parse_history(&self, timeline: TimelineId, text: &[u8]) -> Result<TimelineHistory> {
        TimelineHistory::parse(timeline, text).map_err(|error| RepositoryError::Damaged {
            path: self.locate(&ObjectName::History(timeline)),
            reason: error.to_string(),
        })
    }

    /// Everything that names and small objects tell.
    pub async fn catalog(&self) -> Result<Catalog> {
        let mut catalog = Catalog::default();
        let listed = self.store.list("").await?;
        catalog.add_listing(&listed);
        for object in &listed {
            match ObjectName::parse(&object.path) {
                Some(name @ ObjectName::Backup(_)) => {
                    catalog
                        .backups
                        .extend(self.find::<BackupRecord>(&name).await?);
                }
                Some(ObjectName::History(timeline)) => {
                    if let Some(text) = self.history(timeline).await? {
                        catalog
                            .histories
                            .insert(timeline, self.parse_history(timeline, &text)?);
                    }
                }
                Some(name @ ObjectName::Tip(timeline)) => {
                    // a hint: one that cannot be read is as good as none
                    if let Ok(Some(tip)) = self.find::<Tip>(&name).await {
                        catalog.tips.insert(timeline, tip);
                    }
                }
                Some(name @ ObjectName::Hole { .. }) => {
                    catalog
                        .holes
                        .extend(self.find_or_warn::<Hole>(&name).await?);
                }
                _ => {}
            }
        }
        catalog
            .backups
            .sort_by(|a, b| (a.started_at, &a.id).cmp(&(b.started_at, &b.id)));
        catalog.segment_size = self.segment_size(&catalog).await?;
        Ok(catalog)
    }

    async fn segment_size(&self, catalog: &Catalog) -> Result<Option<SegmentSize>> {
        if let Some(backup) = catalog.backups.last() {
            let name = ObjectName::Backup(backup.id.clone());
            return self
                .checked_size(&name, Some(backup.segment_bytes))
                .map(Some);
        }
        for wal in catalog.timelines.values() {
            let piece = wal.pieces.iter().next();
            let piece = piece.and_then(|(segment, ranges)| {
                ranges.first().map(|range| ObjectName::Piece {
                    segment: *segment,
                    range: *range,
                })
            });
            let name = wal
                .segments
                .first()
                .map(|segment| ObjectName::Segment(*segment))
                .or(piece);
            if let Some(name) = name {
                return self.segment_size_of(&name).await.map(Some);
            }
        }
        Ok(None)
    }

    /// The segment size that the header of a stored segment or piece names.
    pub async fn segment_size_of(&self, name: &ObjectName) -> Result<SegmentSize> {
        let prefix = self.store.get_range(&name.path(), 0, 4096).await?;
        let bytes = match container::read_header(&prefix) {
            Ok(container::Reading::Done((header, _))) => header.segment_bytes,
            Ok(container::Reading::NeedMore(_)) => None,
            Err(error) => return Err(self.damaged(name, &error)),
        };
        self.checked_size(name, bytes)
    }

    fn checked_size(&self, name: &ObjectName, bytes: Option<u64>) -> Result<SegmentSize> {
        let size = bytes.and_then(|bytes| SegmentSize::from_bytes(bytes).ok());
        size.ok_or_else(|| RepositoryError::Damaged {
            path: self.locate(name),
            reason: format!("not a WAL segment size: {bytes:?}"),
        })
    }

    /// The bytes of a segment, from the complete one or put together from its pieces; `None`
    /// where nothing from its beginning on is stored.
    pub async fn segment_content(
        &self,
        segment: SegmentName,
        size: SegmentSize,
    ) -> Result<Option<SegmentContent>> {
        // a piece that was listed may be gone when it is read: the segment has taken its place
        for _ in 0..3 {
            match self.fetch(&ObjectName::Segment(segment)).await {
                Ok(fetched) => {
                    return Ok(Some(SegmentContent {
                        bytes: fetched.plain,
                        complete: true,
                    }));
                }
                Err(error) if error.is_not_found() => {}
                Err(error) => return Err(error),
            }
            match self.assemble(segment, size).await {
                Ok(bytes) => {
                    return Ok(bytes.map(|bytes| SegmentContent {
                        bytes,
                        complete: false,
                    }));
                }
                Err(error) if error.is_not_found() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    async fn pieces_of(&self, segment: SegmentName) -> Result<Vec<ObjectName>> {
        let listed = self.store.list(&pieces_prefix(segment)).await?;
        let names = listed
            .iter()
            .filter_map(|object| ObjectName::parse(&object.path));
        Ok(names
            .filter(|name| matches!(name, ObjectName::Piece { .. }))
            .collect())
    }

    async fn assemble(&self, segment: SegmentName, size: SegmentSize) -> Result<Option<Vec<u8>>> {
        let Some(start) = segment.start(size) else {
            return Ok(None);
        };
        let mut bytes: Vec<u8> = Vec::new();
        // listed by path, so by start: each piece overlaps what is there, follows it, or is beyond
        for name in self.pieces_of(segment).await? {
            let ObjectName::Piece { range, .. } = &name else {
                continue;
            };
            let at = range.start.bytes_since(start);
            let have = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
            if at > have {
                break;
            }
            let piece = self.fetch(&name).await?.plain;
            let damaged = |reason: String| RepositoryError::Damaged {
                path: self.locate(&name),
                reason,
            };
            if u64::try_from(piece.len()).ok() != Some(range.end.bytes_since(range.start))
                || range.end.bytes_since(start) > size.bytes()
            {
                return Err(damaged(format!(
                    "its name does not fit its length: {}",
                    piece.len()
                )));
            }
            let overlap = usize::try_from(have.saturating_sub(at)).unwrap_or(usize::MAX);
            let overlap = overlap.min(piece.len());
            let (known, new) = piece.split_at(overlap);
            let from = usize::try_from(at).unwrap_or(usize::MAX);
            let stored = bytes
                .get(from..from.saturating_add(overlap))
                .unwrap_or_default();
            if let Some(differs) = known.iter().zip(stored).position(|(a, b)| a != b) {
                return Err(RepositoryError::TwoHistories {
                    lsn: range
                        .start
                        .saturating_add(u64::try_from(differs).unwrap_or(u64::MAX)),
                    timeline: segment.timeline,
                    path: self.locate(&name),
                });
            }
            bytes.extend_from_slice(new);
        }
        Ok((!bytes.is_empty()).then_some(bytes))
    }
}

/// What is read of any small object before the rest: whether we can know the rest.
#[derive(serde::Deserialize)]
struct Format {
    format: Option<u32>,
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

fn wal_facts(checked: &Checked<'_>) -> WalFacts {
    let (verified, unverified_from, reason) = match checked.verdict() {
        Verdict::Verified => (true, None, None),
        Verdict::Unverified { from, reason } => (false, Some(from), Some(reason.to_string())),
    };
    WalFacts {
        verified,
        unverified_from,
        reason,
        first_record: checked.first_record(),
        last_record: checked.last_record(),
        records_end: checked.whole_records_end(),
    }
}

fn to_value<T: Serialize>(value: &T) -> serde_json::Value {
    serde_json::to_value(value).expect("our own records have string keys and finite numbers")
}

fn json_of<T: Serialize>(value: &T) -> Vec<u8> {
    let mut bytes = serde_json::to_vec_pretty(&to_value(value)).expect("a value is always JSON");
    bytes.push(b'\n');
    bytes
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
