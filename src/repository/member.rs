//! One system of a cluster in one place: objects written once, and read back checked.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use container::{DataKey, FrameReader, Header, Trailer};
use serde::Serialize;
use serde::de::DeserializeOwned;
use wal::{Lsn, SegmentName};

use super::keys::Sealing;
use super::layout::{ClusterName, ObjectName, pieces_prefix};
use super::place::{Opened, Place};
use super::records::{ClusterRecord, FORMAT};
use super::store::{Created, Listed, Store, StoreError};
use super::{
    EncodedWal, Fetched, PLAIN_BYTES_MAX, RepositoryError, Result, ServerIdentity, blocking,
    json_of, list_of, stretch, systems_in,
};
use crate::error::chain;

/// How much of an object's end is read to find its trailer.
const TAIL_BYTES: u64 = 16 << 10;
/// How much of an object's beginning is read to find its header.
const HEAD_BYTES: u64 = 4 << 10;

/// The most stored bytes of an object that is read whole: its content does not become so much more.
const STORED_BYTES_MAX: u64 = PLAIN_BYTES_MAX + (64 << 20);
/// The most of a small object, whose stored bytes are its content.
const TEXT_BYTES_MAX: u64 = 64 << 20;
/// So often an object is created that was there when it was created, and gone when it was compared.
const CREATE_TRIES: usize = 3;

/// One system of a cluster in one place.
#[derive(Debug, Clone)]
pub(super) struct Member {
    place: Arc<Place>,
    cluster: ClusterName,
    system_id: u64,
    /// What single frames are decoded with, by object: a pack is read in many stretches.
    frames: Arc<Mutex<HashMap<String, Arc<FrameReader>>>>,
}

/// A stretch of a segment whose bytes are at hand, and are acknowledged.
pub(super) struct Cover<'a> {
    pub(super) segment: SegmentName,
    /// The object that holds them.
    pub(super) name: &'a ObjectName,
    /// Where they begin.
    pub(super) start: Lsn,
    pub(super) plain: &'a [u8],
}

/// What an encoder needs besides the plain bytes.
pub(super) struct Recipe {
    pub(super) header: Header,
    pub(super) key: Option<DataKey>,
}

impl Recipe {
    /// The recipe of one object: what is encrypted has a salt of its own.
    pub(super) fn new(mut header: Header, sealing: Option<&Sealing>) -> Result<Self> {
        let key = match sealing {
            Some(sealing) => {
                sealing.header_fields(&mut header)?;
                Some(sealing.key().clone())
            }
            None => None,
        };
        Ok(Self { header, key })
    }
}

impl Member {
    pub(super) fn new(place: Arc<Place>, cluster: ClusterName, system_id: u64) -> Self {
        Self {
            place,
            cluster,
            system_id,
            frames: Arc::default(),
        }
    }

    pub(super) fn place(&self) -> &Arc<Place> {
        &self.place
    }

    pub(super) fn cluster(&self) -> &ClusterName {
        &self.cluster
    }

    pub(super) fn system_id(&self) -> u64 {
        self.system_id
    }

    pub(super) fn name(&self) -> &str {
        &self.place.settings().name
    }

    /// Where an object is, for messages.
    pub(super) fn locate(&self, name: &ObjectName) -> String {
        let url = self.place.url().trim_end_matches('/');
        format!("{url}/{}/{}/{}", self.cluster, self.system_id, name.path())
    }

    pub(super) fn opened(&self) -> Result<Opened> {
        self.place.open()
    }

    pub(super) fn store(&self) -> Result<Store> {
        let root = self.opened()?.store;
        Ok(root
            .below(self.cluster.as_str())
            .below(&self.system_id.to_string()))
    }

    /// Makes sure that the place may be written to for this server: its `cluster.json` is there or
    /// is made, and the store is known to keep what is written once.
    ///
    /// A name under which another system is stored is refused, unless `new_system` is set. What
    /// this process has met and is not there any more is not made again: a disk may have been
    /// taken away.
    pub(super) async fn prepare(&self, identity: ServerIdentity, new_system: bool) -> Result<()> {
        let path = ObjectName::Cluster.path();
        let record = self.find::<ClusterRecord>(&ObjectName::Cluster).await?;
        if record.is_none() || !self.place.was_met() {
            self.check_systems(identity, new_system).await?;
        }
        if record.is_none() {
            let record = ClusterRecord {
                format: FORMAT,
                name: self.cluster.to_string(),
                system_id: identity.system_id.to_string(),
                major: identity.major,
                block_bytes: identity.block_bytes,
            };
            self.create_json(&ObjectName::Cluster, &record).await?;
            self.place.is_made();
        }
        self.check_format().await?;
        if !self.place.was_met() {
            self.refuse_to_mix().await?;
            self.warn_of_plain_backups().await?;
            // the same bytes again: a store that keeps what is there refuses them
            let store = self.store()?;
            let bytes = store.get(&path).await?;
            store.probe_conditional_create(&path, bytes).await?;
        }
        self.place.is_met();
        Ok(())
    }

    /// A forgotten setting must not put plain objects beside encrypted ones.
    async fn refuse_to_mix(&self) -> Result<()> {
        let root = self.opened()?.store;
        let is_configured = self.opened()?.encryption.is_configured();
        let accepts = self.place.settings().encryption.accept_plain;
        if is_configured
            || accepts
            || !root
                .folders(&format!("{}/", super::keys::FOLDER))
                .await?
                .iter()
                .any(|folder| folder.parse::<super::keys::KeyId>().is_ok())
        {
            return Ok(());
        }
        Err(RepositoryError::NotPlain {
            url: self.place.url().to_owned(),
        })
    }

    /// Whoever begins to encrypt must know that the past is not read any more.
    async fn warn_of_plain_backups(&self) -> Result<()> {
        let accepts = self.place.settings().encryption.accept_plain;
        if accepts || !self.opened()?.encryption.is_configured() {
            return Ok(());
        }
        let listed = self.list("backups/").await?;
        let mut names = listed
            .iter()
            .filter_map(|object| ObjectName::parse(&object.path));
        let oldest = names.find_map(|name| match name {
            ObjectName::Backup(id) => Some(id),
            _ => None,
        });
        let Some(oldest) = oldest else { return Ok(()) };
        // one that is damaged is another command's to tell
        if let Ok(Some(record)) = self.backup_fields(&oldest).await
            && record.sealed.is_none()
        {
            tracing::warn!(
                "repository {} encrypts what is written from now on; what it holds that is not \
                 encrypted is not read any more, as backup {oldest}. hint: accept_plain = true \
                 reads it; a new prefix and a new backup are cleaner",
                self.name()
            );
        }
        Ok(())
    }

    /// Refuses a place where another system lives, or where this one did a while ago.
    async fn check_systems(&self, identity: ServerIdentity, new_system: bool) -> Result<()> {
        // whatever else lies there: a request that was on its way may have come to another disk
        if self.place.was_met() {
            return Err(RepositoryError::Gone {
                url: self.place.url().to_owned(),
            });
        }
        let root = self.opened()?.store;
        let stored = systems_in(&root, &self.cluster).await?;
        if stored.contains(&identity.system_id) {
            return Ok(());
        }
        if !new_system && !stored.is_empty() {
            return Err(RepositoryError::OtherSystem {
                cluster: self.cluster.clone(),
                url: self.place.url().to_owned(),
                stored: list_of(&stored),
                found: identity.system_id,
            });
        }
        Ok(())
    }

    /// Refuses what a later version wrote.
    pub(super) async fn check_format(&self) -> Result<()> {
        self.find::<ClusterRecord>(&ObjectName::Cluster).await?;
        Ok(())
    }

    /// The header of an object that is written here now, and the key that it names.
    pub(super) async fn recipe(&self, name: &ObjectName) -> Result<Recipe> {
        let sealing = self.sealing().await?;
        Recipe::new(self.plain_header(name), sealing.as_ref())
    }

    /// The key for what is written here now; `None` where that is not encrypted.
    pub(super) async fn sealing(&self) -> Result<Option<Sealing>> {
        Ok(self.opened()?.encryption.sealing().await?)
    }

    /// Encodes and stores one object.
    pub(super) async fn store_container(
        &self,
        name: &ObjectName,
        adapt: impl FnOnce(&mut Header),
        facts: serde_json::Map<String, serde_json::Value>,
        plain: Bytes,
        level: i32,
    ) -> Result<()> {
        let Recipe { mut header, key } = self.recipe(name).await?;
        adapt(&mut header);
        let (object, digest) = blocking(move || {
            let digest = container::digest(&plain);
            container::encode(&header, &plain, facts, level, key.as_ref())
                .map(|object| (object, digest))
        })
        .await
        .map_err(|error| self.damaged(name, &error))?;
        self.create_object(name, object.into(), &digest).await
    }

    /// Creates an object that was encoded already; `digest` is that of its plain bytes.
    pub(super) async fn create_object(
        &self,
        name: &ObjectName,
        object: Bytes,
        digest: &str,
    ) -> Result<()> {
        self.create_as(name, object, digest, false).await
    }

    /// The same for WAL as it comes.
    pub(super) async fn create_wal(&self, wal: &EncodedWal, object: Bytes) -> Result<()> {
        let is_brief = wal.is_brief;
        self.create_as(&wal.name, object, wal.digest(), is_brief)
            .await
    }

    /// Stores a piece that is superseded soon on this very thread, where that is faster than all else;
    /// whether it is done. If not, nothing was.
    pub(super) fn create_wal_here(
        &self,
        name: &ObjectName,
        encode: impl FnOnce(Recipe) -> Option<Bytes>,
    ) -> bool {
        let Some(opened) = self.place.opened() else {
            return false;
        };
        if opened.encryption.is_configured() {
            return false;
        }
        let recipe = Recipe {
            header: self.plain_header(name),
            key: None,
        };
        let path = format!("{}/{}/{}", self.cluster, self.system_id, recipe.header.name);
        let object = encode(recipe);
        object.is_some_and(|object| opened.store.create_brief_here(&path, &object))
    }

    async fn create_as(
        &self,
        name: &ObjectName,
        object: Bytes,
        digest: &str,
        is_brief: bool,
    ) -> Result<()> {
        let store = self.store()?;
        let bytes = u64::try_from(object.len()).unwrap_or(u64::MAX);
        for _ in 0..CREATE_TRIES {
            let object = object.clone();
            let created = match name {
                ObjectName::Manifest(_) | ObjectName::FileList { .. } => {
                    store.create_bulk(&name.path(), object).await?
                }
                _ if is_brief => store.create_brief(&name.path(), object).await?,
                _ => store.create(&name.path(), object).await?,
            };
            if created == Created::New {
                return Ok(());
            }
            let (trailer, stored_bytes) = match self.trailer_and_size(name).await {
                // it was there a moment ago: a piece gave way to what covers it
                Err(error) if error.is_not_found() => continue,
                found => found?,
            };
            // a manifest names stored offsets in packs: equal content does not make them equal
            let same_offsets = !matches!(name, ObjectName::Pack { .. }) || stored_bytes == bytes;
            if trailer.digest == digest && same_offsets {
                return Ok(());
            }
            return Err(RepositoryError::Conflict {
                path: self.locate(name),
                stored: format!("{}, {stored_bytes} bytes", trailer.digest),
                new: format!("{digest}, {bytes} bytes"),
            });
        }
        let reason = "it comes and goes".to_owned();
        Err(RepositoryError::Store(StoreError::Unreachable {
            doing: "write",
            path: self.locate(name),
            reason,
        }))
    }

    pub(super) async fn create_json<T: Serialize>(
        &self,
        name: &ObjectName,
        value: &T,
    ) -> Result<()> {
        self.create_text(name, json_of(value).into()).await
    }

    /// Creates a small object whose stored bytes are its content.
    pub(super) async fn create_text(&self, name: &ObjectName, bytes: Bytes) -> Result<()> {
        let store = self.store()?;
        if store.create(&name.path(), bytes.clone()).await? == Created::New {
            return Ok(());
        }
        let stored = store.get(&name.path()).await?;
        if stored == bytes {
            return Ok(());
        }
        Err(RepositoryError::Conflict {
            path: self.locate(name),
            stored: container::digest(&stored),
            new: container::digest(&bytes),
        })
    }

    /// The bytes of an object as they are stored.
    pub(super) async fn raw(&self, name: &ObjectName) -> Result<Bytes> {
        let stored = self
            .store()?
            .get_at_most(&name.path(), STORED_BYTES_MAX)
            .await?;
        stored.ok_or_else(|| RepositoryError::Damaged {
            path: self.locate(name),
            reason: format!("it is larger than any object: most={STORED_BYTES_MAX}"),
        })
    }

    /// Reads, checks and decodes an object.
    pub(super) async fn fetch(&self, name: &ObjectName) -> Result<Fetched> {
        let object = self.raw(name).await?;
        self.decode(name, object).await
    }

    /// Checks and decodes an object whose stored bytes are at hand.
    pub(super) async fn decode(&self, name: &ObjectName, object: Bytes) -> Result<Fetched> {
        let header = self.header_in(name, &object)?;
        let key = self.key_for(name, &header).await?;
        let decoded = blocking(move || container::decode(&object, PLAIN_BYTES_MAX, key.as_ref()))
            .await
            .map_err(|error| self.damaged(name, &error))?;
        Ok(Fetched {
            plain: decoded.plain,
            facts: decoded.trailer.facts,
        })
    }

    pub(super) fn header_in(&self, name: &ObjectName, object: &[u8]) -> Result<Header> {
        let header = match container::read_header(object) {
            Ok(container::Reading::Done((header, _))) => header,
            Ok(container::Reading::NeedMore(_)) => {
                return Err(RepositoryError::Damaged {
                    path: self.locate(name),
                    reason: format!("it ends within its header: bytes={}", object.len()),
                });
            }
            Err(error) => return Err(self.damaged(name, &error)),
        };
        self.check_header(name, &header)?;
        Ok(header)
    }

    /// The key of an object with this header; `None` where it is not encrypted, and may be so.
    pub(super) async fn key_for(
        &self,
        name: &ObjectName,
        header: &Header,
    ) -> Result<Option<DataKey>> {
        let encryption = self.opened()?.encryption;
        Ok(encryption.key_for(header, &self.locate(name)).await?)
    }

    /// Refuses an object that is not encrypted where all should be.
    pub(super) async fn check_plain(&self, name: &ObjectName) -> Result<()> {
        self.key_for(name, &self.plain_header(name)).await.map(drop)
    }

    pub(super) fn plain_header(&self, name: &ObjectName) -> Header {
        let system_id = self.system_id.to_string();
        Header::new(name.kind(), &name.path(), self.cluster.as_str(), &system_id)
    }

    /// `length` stored bytes of an object from `offset`.
    pub(super) async fn fetch_range(
        &self,
        name: &ObjectName,
        offset: u64,
        length: u64,
    ) -> Result<Bytes> {
        Ok(self
            .store()?
            .get_range(&name.path(), offset, length)
            .await?)
    }

    /// What single frames of an object are decoded with.
    pub(super) async fn frames(&self, name: &ObjectName) -> Result<Arc<FrameReader>> {
        let path = name.path();
        let known = self.known_frames().get(&path).map(Arc::clone);
        if let Some(known) = known {
            return Ok(known);
        }
        let (prefix, header) = self.head(name).await?;
        let key = self.key_for(name, &header).await?;
        let (reader, _) =
            FrameReader::new(&prefix, key.as_ref()).map_err(|error| self.damaged(name, &error))?;
        let reader = Arc::new(reader);
        self.known_frames().insert(path, Arc::clone(&reader));
        Ok(reader)
    }

    fn known_frames(&self) -> std::sync::MutexGuard<'_, HashMap<String, Arc<FrameReader>>> {
        self.frames.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The first bytes of an object, which hold its header.
    pub(super) async fn head(&self, name: &ObjectName) -> Result<(Bytes, Header)> {
        let store = self.store()?;
        let mut wanted = HEAD_BYTES;
        loop {
            let prefix = store.get_range(&name.path(), 0, wanted).await?;
            match container::read_header(&prefix) {
                Ok(container::Reading::NeedMore(bytes)) if bytes > wanted => wanted = bytes,
                _ => {
                    let header = self.header_in(name, &prefix)?;
                    return Ok((prefix, header));
                }
            }
        }
    }

    fn check_header(&self, name: &ObjectName, header: &Header) -> Result<()> {
        let system_id = self.system_id.to_string();
        let expected = (name.path(), self.cluster.as_str(), &system_id);
        if (&header.name, header.cluster.as_str(), &header.system_id)
            == (&expected.0, expected.1, expected.2)
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

    pub(super) async fn trailer(&self, name: &ObjectName) -> Result<Trailer> {
        Ok(self.trailer_and_size(name).await?.0)
    }

    /// The trailer, and the size of the whole object in bytes.
    pub(super) async fn trailer_and_size(&self, name: &ObjectName) -> Result<(Trailer, u64)> {
        let store = self.store()?;
        let mut wanted = TAIL_BYTES;
        loop {
            let (tail, object_bytes) = store.get_tail(&name.path(), wanted).await?;
            match container::read_trailer(&tail, object_bytes) {
                Ok(container::Reading::Done(trailer)) => return Ok((trailer, object_bytes)),
                Ok(container::Reading::NeedMore(bytes)) if bytes > wanted => wanted = bytes,
                Ok(container::Reading::NeedMore(_)) => return Err(self.lacks_trailer(name)),
                Err(error) => return Err(self.damaged(name, &error)),
            }
        }
    }

    /// The trailer, with the word of whoever wrote the object that it is this object's: its header is
    /// read too, and where it is encrypted the seal is checked.
    pub(super) async fn vouched_trailer(&self, name: &ObjectName) -> Result<Trailer> {
        let store = self.store()?;
        let path = name.path();
        let (head, tail) = tokio::join!(self.head(name), store.get_tail(&path, TAIL_BYTES));
        let ((prefix, header), (mut tail, mut object_bytes)) = (head?, tail?);
        let key = self.key_for(name, &header).await?;
        let (reader, _) =
            FrameReader::new(&prefix, key.as_ref()).map_err(|error| self.damaged(name, &error))?;
        let mut asked = TAIL_BYTES;
        loop {
            match reader.trailer(&tail, object_bytes) {
                Ok(container::Reading::Done(trailer)) => return Ok(trailer),
                Ok(container::Reading::NeedMore(bytes)) if bytes > asked => {
                    asked = bytes;
                    (tail, object_bytes) = store.get_tail(&path, asked).await?;
                }
                Ok(container::Reading::NeedMore(_)) => return Err(self.lacks_trailer(name)),
                Err(error) => return Err(self.damaged(name, &error)),
            }
        }
    }

    fn lacks_trailer(&self, name: &ObjectName) -> RepositoryError {
        RepositoryError::Damaged {
            path: self.locate(name),
            reason: "no whole trailer at its end".to_owned(),
        }
    }

    pub(super) fn damaged(&self, name: &ObjectName, error: &container::Error) -> RepositoryError {
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

    /// A small object; `None` if there is none.
    pub(super) async fn find<T: DeserializeOwned>(&self, name: &ObjectName) -> Result<Option<T>> {
        let read = self
            .store()?
            .get_at_most(&name.path(), TEXT_BYTES_MAX)
            .await;
        let bytes = match read {
            Ok(Some(bytes)) => bytes,
            Ok(None) => {
                return Err(RepositoryError::Damaged {
                    path: self.locate(name),
                    reason: format!("it is larger than it can be: most={TEXT_BYTES_MAX}"),
                });
            }
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

    pub(super) async fn list(&self, folder: &str) -> Result<Vec<Listed>> {
        Ok(super::listing::list(&self.store()?, folder).await?)
    }

    /// Removes those pieces of a segment whose bytes `by` holds, which must be acknowledged here;
    /// gives their names.
    pub(super) async fn remove_superseded_pieces(&self, by: &Cover<'_>) -> Result<Vec<ObjectName>> {
        let mut removed = Vec::new();
        for name in self.pieces_of(by.segment).await? {
            if name == *by.name {
                continue;
            }
            let ObjectName::Piece { range, .. } = &name else {
                continue;
            };
            let Some(ours) = stretch(by.plain, by.start, *range) else {
                continue;
            };
            let stored = match self.trailer(&name).await {
                Ok(trailer) => trailer.digest,
                Err(error) if error.is_not_found() => continue,
                // whatever it was: what covers it is here
                Err(error) if error.is_damage() => {
                    tracing::warn!("left where it is, and superseded: {error}");
                    continue;
                }
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
            self.store()?.delete(&name.path()).await?;
            removed.push(name);
        }
        Ok(removed)
    }

    pub(super) async fn pieces_of(&self, segment: SegmentName) -> Result<Vec<ObjectName>> {
        Ok(pieces_among(&self.list(&pieces_prefix(segment)).await?))
    }
}

/// The pieces among what was listed.
pub(super) fn pieces_among(listed: &[Listed]) -> Vec<ObjectName> {
    let names = listed
        .iter()
        .filter_map(|object| ObjectName::parse(&object.path));
    let is_piece = |name: &ObjectName| matches!(name, ObjectName::Piece { .. });
    names.filter(is_piece).collect()
}

/// What is read of any small object before the rest: whether we can know the rest.
#[derive(serde::Deserialize)]
struct Format {
    format: Option<u32>,
}
