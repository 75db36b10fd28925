//! `backup.json`: written last, and what of it is nobody's business in a repository that encrypts.
//!
//! Positions, times and counts stay clear, so that `status` needs no key; the label and the places
//! of tablespaces are not. The whole record is sealed besides, so that nobody without the key can
//! change the clear part unnoticed.

use std::collections::{BTreeMap, BTreeSet};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use container::Header;

use super::keys::Sealing;
use super::layout::{BackupId, ObjectName};
use super::member::{Member, Recipe};
use super::records::BackupRecord;
use super::sharing::PackId;
use super::store::Listed;
use super::{Repository, RepositoryError, Result};

/// Where a backup is not whole, so many of its objects are looked at to say which one is not.
const OBJECTS_ASKED_MAX: usize = 1000;

impl Member {
    /// Makes a backup exist here, with its names sealed where this place encrypts.
    pub(super) async fn commit_backup(
        &self,
        record: &BackupRecord,
        sealing: Option<&Sealing>,
    ) -> Result<()> {
        let name = ObjectName::Backup(record.id.clone());
        // the same record is given again after an outage, and sealing is never twice the same
        if let Some(stored) = self.backup(&record.id).await?
            && stored == *record
        {
            return self.forget_intent(&record.id).await;
        }
        self.check_stays(record).await?;
        let sealed = self.seal_record(&name, record, sealing)?;
        self.create_json(&name, &sealed.with_digest()).await?;
        self.forget_intent(&record.id).await
    }

    /// Ends what was announced before the backup was stored.
    pub(super) async fn forget_intent(&self, id: &BackupId) -> Result<()> {
        let path = ObjectName::Intent(id.clone()).path();
        Ok(self.store()?.delete(&path).await?)
    }

    fn seal_record(
        &self,
        name: &ObjectName,
        record: &BackupRecord,
        sealing: Option<&Sealing>,
    ) -> Result<BackupRecord> {
        let Recipe { header, key } = Recipe::new(self.plain_header(name), sealing)?;
        if key.is_none() {
            return Ok(record.clone());
        }
        let plain = super::json_of(record);
        let facts = serde_json::Map::new();
        let object = container::encode(&header, &plain, facts, 3, key.as_ref())
            .map_err(|error| self.damaged(name, &error))?;
        Ok(BackupRecord {
            sealed: Some(BASE64.encode(object)),
            ..record.without_names()
        })
    }

    /// A backup's record with its names opened; `None` if there is no such backup.
    pub(super) async fn backup(&self, id: &BackupId) -> Result<Option<BackupRecord>> {
        let name = ObjectName::Backup(id.clone());
        match self.find_record(&name).await? {
            Some(record) => self.open_record(&name, record).await.map(Some),
            None => Ok(None),
        }
    }

    /// A backup's record as it is stored, its names sealed where they are.
    pub(super) async fn backup_fields(&self, id: &BackupId) -> Result<Option<BackupRecord>> {
        self.find_record(&ObjectName::Backup(id.clone())).await
    }

    /// As [`Self::backup`], without the names where the key to them is not at hand.
    pub(super) async fn listed_backup(&self, id: &BackupId) -> Result<Option<BackupRecord>> {
        let name = ObjectName::Backup(id.clone());
        let Some(record) = self.find_record(&name).await? else {
            return Ok(None);
        };
        match self.open_record(&name, record.clone()).await {
            Err(error) if error.lacks_key() => Ok(Some(record)),
            opened => opened.map(Some),
        }
    }

    /// Refuses a backup whose packs and manifest are not all there in their whole length, its own and those
    /// of others that it refers to. `listed` is what a listing of this place showed.
    pub(super) async fn check_is_stored(
        &self,
        record: &BackupRecord,
        listed: &StoredBackups,
    ) -> Result<()> {
        if listed.has_all_of(record) {
            return Ok(());
        }
        // that listing may be older than the record
        let mut listed = self.list(&format!("backups/{}/", record.id)).await?;
        for id in record.with_owners() {
            listed.extend(self.list(&format!("packs/{id}/")).await?);
        }
        let stored = StoredBackups::among(&listed);
        let found = stored.bytes(&record.id);
        if found < record.stored_bytes {
            return Err(self.what_is_lacking(record, found).await?);
        }
        self.check_shared(record).await
    }

    /// The object that is missing or cut short, where that can be told.
    async fn what_is_lacking(&self, record: &BackupRecord, found: u64) -> Result<RepositoryError> {
        let damaged = |name: &ObjectName, reason: &str| RepositoryError::Damaged {
            path: self.locate(name),
            reason: reason.to_owned(),
        };
        let listed = self.list(&format!("packs/{}/", record.id)).await?;
        let packs: BTreeSet<ObjectName> = listed
            .iter()
            .filter_map(|object| ObjectName::parse(&object.path))
            .collect();
        let manifest = ObjectName::Manifest(record.id.clone());
        let lists = match self.manifest_lines(&manifest).await {
            Ok(lines) => self.file_lists_in(&manifest, &lines)?,
            Err(error) if error.lacks_key() || error.is_not_found() => Vec::new(),
            Err(error) => return Err(error),
        };
        let lists = lists.iter().map(|(name, _)| name).chain([&manifest]);
        for name in packs.iter().chain(lists).take(OBJECTS_ASKED_MAX) {
            match self.trailer(name).await {
                Ok(_) => {}
                Err(error) if error.is_not_found() => return Ok(damaged(name, "it is missing")),
                Err(error @ RepositoryError::Damaged { .. }) => return Ok(error),
                Err(error) => return Err(error),
            }
        }
        let number = |number| ObjectName::Pack {
            backup: record.id.clone(),
            number,
        };
        let mut numbers = (0..=u32::MAX).map(number);
        let missing = numbers.find(|pack| !packs.contains(pack));
        Ok(match missing {
            Some(pack) if packs.len() <= OBJECTS_ASKED_MAX => damaged(&pack, "it is missing"),
            _ => self.lacks_objects(record, found),
        })
    }

    /// That `found` bytes are not all that a backup's packs and manifest have.
    pub(super) fn lacks_objects(&self, record: &BackupRecord, found: u64) -> RepositoryError {
        RepositoryError::Damaged {
            path: self.locate(&ObjectName::Backup(record.id.clone())),
            reason: format!(
                "its packs and manifest are not all there: expected={} bytes, found={found}",
                record.stored_bytes
            ),
        }
    }

    /// A record as it is stored, once its digest was found to fit.
    pub(super) async fn find_record(&self, name: &ObjectName) -> Result<Option<BackupRecord>> {
        let Some(record) = self.find::<BackupRecord>(name).await? else {
            return Ok(None);
        };
        let found = record.digest.clone();
        let record = BackupRecord {
            digest: None,
            ..record
        };
        let expected = record.clone().with_digest().digest;
        if found != expected {
            return Err(RepositoryError::Damaged {
                path: self.locate(name),
                reason: format!(
                    "its content is not what its digest says: expected={}, found={}",
                    found.unwrap_or_default(),
                    expected.unwrap_or_default()
                ),
            });
        }
        Ok(Some(record))
    }

    /// The header of what is sealed of a record; `None` where nothing is.
    pub(super) fn sealed_header(
        &self,
        name: &ObjectName,
        record: &BackupRecord,
    ) -> Result<Option<Header>> {
        let Some(sealed) = &record.sealed else {
            return Ok(None);
        };
        let object = self.sealed_object(name, sealed)?;
        self.header_in(name, &object).map(Some)
    }

    fn sealed_object(&self, name: &ObjectName, sealed: &str) -> Result<Vec<u8>> {
        let decoded = BASE64.decode(sealed);
        decoded.map_err(|error| RepositoryError::Damaged {
            path: self.locate(name),
            reason: format!("its sealed part is no base64: {error}"),
        })
    }

    async fn open_record(&self, name: &ObjectName, record: BackupRecord) -> Result<BackupRecord> {
        let Some(sealed) = &record.sealed else {
            self.check_plain(name).await?;
            return Ok(record);
        };
        let damaged = |reason: String| RepositoryError::Damaged {
            path: self.locate(name),
            reason,
        };
        let object = self.sealed_object(name, sealed)?;
        let fetched = self.decode(name, Bytes::from(object)).await?;
        let whole: BackupRecord = serde_json::from_slice(&fetched.plain)
            .map_err(|error| damaged(format!("its sealed part: {error}")))?;
        // the clear part is for those without the key; whoever has it trusts what was sealed
        let clear = BackupRecord {
            sealed: None,
            ..record
        };
        if whole.without_names() != clear {
            return Err(damaged("it says other things than were sealed".to_owned()));
        }
        Ok(whole)
    }
}

/// The packs and manifests of backups, file lists with them, as the listing of one place shows them.
#[derive(Debug, Default)]
pub(super) struct StoredBackups {
    /// How many bytes of both each backup has.
    bytes: BTreeMap<BackupId, u64>,
    packs: BTreeMap<PackId, u64>,
}

impl StoredBackups {
    pub(super) fn among(listed: &[Listed]) -> Self {
        let mut stored = Self::default();
        let is_of_backup = |path: &str| path.starts_with("backups/") || path.starts_with("packs/");
        for object in listed.iter().filter(|object| is_of_backup(&object.path)) {
            let id = match ObjectName::parse(&object.path) {
                Some(ObjectName::Manifest(id) | ObjectName::FileList { backup: id, .. }) => id,
                Some(ObjectName::Pack { backup, number }) => {
                    stored.packs.insert((backup.clone(), number), object.bytes);
                    backup
                }
                _ => continue,
            };
            let sum = stored.bytes.entry(id).or_default();
            *sum = sum.saturating_add(object.bytes);
        }
        stored
    }

    fn bytes(&self, id: &BackupId) -> u64 {
        self.bytes.get(id).copied().unwrap_or_default()
    }

    fn has_all_of(&self, record: &BackupRecord) -> bool {
        self.bytes(&record.id) >= record.stored_bytes
            && record.shared_packs.iter().all(|shared| {
                let of = |number| (shared.backup.clone(), number);
                let packs = (shared.start <= shared.end)
                    .then(|| self.packs.range(of(shared.start)..of(shared.end)));
                let bytes = packs.into_iter().flatten().map(|(_, bytes)| *bytes);
                bytes.fold(0, u64::saturating_add) == shared.bytes
            })
    }
}

impl BackupRecord {
    /// The record as it is stored: a flipped bit must not pass for another time or position.
    pub(super) fn with_digest(self) -> Self {
        let content = serde_json::to_vec(&super::to_value(&self)).expect("a value is always JSON");
        Self {
            digest: Some(container::digest(&content)),
            ..self
        }
    }

    /// What of a record is everybody's.
    pub(super) fn without_names(&self) -> Self {
        Self {
            label: String::new(),
            tablespaces: Vec::new(),
            damaged_pages: Vec::new(),
            outside: Vec::new(),
            ..self.clone()
        }
    }
}

impl Repository {
    /// A backup by its id, from a place that has it whole, and that place alone: packs and manifest
    /// of one backup may lie at other offsets elsewhere. `None` if it never came to its end.
    pub async fn holding(&self, id: &BackupId) -> Result<Option<(Self, BackupRecord)>> {
        let (mut failed, mut absent, mut doubted) = (None, false, None);
        for member in &self.members {
            let record = match member.backup(id).await {
                Ok(Some(record)) => record,
                Ok(None) => {
                    absent = true;
                    continue;
                }
                Err(error) => {
                    failed.get_or_insert(error);
                    continue;
                }
            };
            // a listing may be late: it decides between places, and rules out none
            let is_whole = match self.members.len() {
                1 => Ok(()),
                _ => {
                    member
                        .check_is_stored(&record, &StoredBackups::default())
                        .await
                }
            };
            let found = (self.only(member), record);
            match is_whole {
                Ok(()) => return Ok(Some(found)),
                Err(error) => {
                    tracing::warn!("repository {} is asked last: {error}", member.name());
                    doubted.get_or_insert(found);
                }
            }
        }
        match failed {
            // it may be whole where nobody answers
            Some(error) if error.is_unreachable() => Err(error),
            _ if doubted.is_some() => Ok(doubted),
            Some(error) => Err(error),
            None if absent => Ok(None),
            None => Err(RepositoryError::NoPlace),
        }
    }
}
