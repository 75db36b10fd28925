//! What backups share: extents that an earlier one has stored, which a later one refers to.
//!
//! A backup refers to extents of the newest backup before it, wherever those lie: a restore reads packs
//! alone, and knows no chain. Its record names the packs of others, in the clear, so that whoever has no
//! key can still tell what must stay.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::layout::{BackupId, ObjectName};
use super::member::Member;
use super::records::{BackupRecord, Extent, FORMAT, ManifestLine};
use super::{Repository, RepositoryError, Result};

/// A pack: whose it is, and its number there.
pub(super) type PackId = (BackupId, u32);

/// The name of a pack.
pub(super) fn pack_name((backup, number): PackId) -> ObjectName {
    ObjectName::Pack { backup, number }
}

/// Packs of another backup, by number from `start` up to and without `end`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SharedPacks {
    /// Whose they are.
    pub backup: BackupId,
    /// The first.
    pub start: u32,
    /// The number after the last.
    pub end: u32,
    /// How many bytes they have as they are stored.
    pub bytes: u64,
}

impl SharedPacks {
    /// Each of them.
    pub(super) fn each(&self) -> impl Iterator<Item = PackId> {
        (self.start..self.end).map(|number| (self.backup.clone(), number))
    }

    /// Packs with their stored bytes, those that follow on each other together.
    pub(super) fn of(packs: &BTreeMap<PackId, u64>) -> Vec<Self> {
        let mut all: Vec<Self> = Vec::new();
        for ((backup, number), bytes) in packs {
            match all.last_mut() {
                Some(last) if last.backup == *backup && last.end == *number => {
                    last.end = number.saturating_add(1);
                    last.bytes = last.bytes.saturating_add(*bytes);
                }
                _ => all.push(Self {
                    backup: backup.clone(),
                    start: *number,
                    end: number.saturating_add(1),
                    bytes: *bytes,
                }),
            }
        }
        all
    }
}

/// `intents/<id>`: what a backup that is under way refers to, or may.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Intent {
    format: u32,
    id: BackupId,
    /// Backups whose packs must stay.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    refers_to: BTreeSet<BackupId>,
}

impl Intent {
    pub(super) fn of(id: &BackupId, refers_to: BTreeSet<BackupId>) -> Self {
        Self {
            format: FORMAT,
            id: id.clone(),
            refers_to,
        }
    }

    /// The backup that is under way.
    pub(super) fn id(&self) -> &BackupId {
        &self.id
    }

    /// It, and the backups whose packs must stay.
    pub(super) fn names(&self) -> impl Iterator<Item = &BackupId> {
        std::iter::once(&self.id).chain(&self.refers_to)
    }

    /// Whether it says all that another does.
    pub(super) fn covers(&self, other: &Self) -> bool {
        self.id == other.id && self.refers_to.is_superset(&other.refers_to)
    }
}

impl BackupRecord {
    /// It, and the other backups whose packs it refers to.
    pub(super) fn with_owners(&self) -> BTreeSet<BackupId> {
        let mut owners = self.owners();
        owners.insert(self.id.clone());
        owners
    }

    /// The other backups whose packs it refers to.
    pub(super) fn owners(&self) -> BTreeSet<BackupId> {
        let owners = self.shared_packs.iter().map(|packs| packs.backup.clone());
        owners.collect()
    }
}

/// An extent that an earlier backup refers to. There may be millions: 52 bytes each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoredExtent {
    /// Which of the earlier backup's packs it lies in.
    pub pack: u32,
    /// Where in the pack.
    pub offset: u32,
    /// How many bytes it takes there.
    pub stored_bytes: u32,
    /// How many bytes it holds.
    pub plain_bytes: u32,
    /// Their BLAKE3 hash.
    pub hash: [u8; 32],
}

/// What is known of a stretch of a file in an earlier backup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EarlierExtent {
    /// Nothing that can be referred to.
    Unknown,
    /// It is so many zeros.
    Zeros(u32),
    /// It is stored.
    Stored(StoredExtent),
}

impl EarlierExtent {
    /// What is stored of it.
    pub fn stored(self) -> Option<StoredExtent> {
        match self {
            Self::Stored(stored) => Some(stored),
            Self::Unknown | Self::Zeros(_) => None,
        }
    }

    /// How many bytes it has; `None` where that is not known.
    pub fn plain_bytes(self) -> Option<u32> {
        match self {
            Self::Unknown => None,
            Self::Zeros(bytes) => Some(bytes),
            Self::Stored(stored) => Some(stored.plain_bytes),
        }
    }
}

/// The extents of an earlier backup that can be referred to.
#[derive(Debug)]
pub struct EarlierBackup {
    id: BackupId,
    packs: Vec<(PackId, u64)>,
    /// By their numbers in the manifest: which of `packs`, and their bytes.
    numbers: HashMap<u32, (u32, u64)>,
    /// By path: what is known of each stretch of so many bytes, of files of which anything is.
    files: HashMap<Vec<u8>, Arc<[EarlierExtent]>>,
    closed: BTreeSet<BackupId>,
}

impl EarlierBackup {
    /// Which backup it is.
    pub fn id(&self) -> &BackupId {
        &self.id
    }

    /// The backups whose packs it refers to, and no later one may: not every recipient of now can open them,
    /// or they are plain where all is to be encrypted.
    pub fn closed(&self) -> &BTreeSet<BackupId> {
        &self.closed
    }

    /// What is known of the file at `path`: each stretch of `extent_bytes`, as [`Repository::earlier_backup`]
    /// was asked. `None` where nothing is, as of an empty file.
    pub fn file(&self, path: &[u8]) -> Option<Arc<[EarlierExtent]>> {
        self.files.get(path).map(Arc::clone)
    }

    fn pack(&self, pack: u32) -> Option<&(PackId, u64)> {
        self.packs.get(usize::try_from(pack).ok()?)
    }

    /// With what a later backup that failed has stored too, and rather that.
    #[must_use]
    pub fn with(mut self, later: Self) -> Self {
        let known = self.packs.iter().map(|(pack, _)| pack.clone());
        let mut places: HashMap<PackId, u32> = known.zip(0..).collect();
        let mut moved = Vec::new();
        for (pack, bytes) in later.packs {
            let place = u32::try_from(self.packs.len()).unwrap_or(u32::MAX);
            let place = *places.entry(pack.clone()).or_insert_with(|| {
                self.packs.push((pack, bytes));
                place
            });
            moved.push(place);
        }
        for (path, stretches) in later.files {
            let before = self.files.remove(&path);
            let count = stretches
                .len()
                .max(before.as_ref().map_or(0, |before| before.len()));
            let of_both = (0..count).map(|nth| {
                let of_later = stretches.get(nth).and_then(|extent| {
                    let stored = extent.stored()?;
                    let pack = *moved.get(usize::try_from(stored.pack).ok()?)?;
                    Some(EarlierExtent::Stored(StoredExtent { pack, ..stored }))
                });
                let of_both = of_later.or_else(|| before.as_ref()?.get(nth).copied());
                of_both.unwrap_or(EarlierExtent::Unknown)
            });
            let of_both: Arc<[EarlierExtent]> = of_both.collect();
            self.files.insert(path, of_both);
        }
        self.closed.extend(later.closed);
        self
    }

    /// The name of a pack in the repository.
    pub fn pack_name(&self, pack: u32) -> Option<ObjectName> {
        let (pack, _) = self.pack(pack)?;
        Some(pack_name(pack.clone()))
    }

    /// What a record says of those of its packs that were referred to.
    pub fn shared(&self, packs: &BTreeSet<u32>) -> Vec<SharedPacks> {
        let packs = packs.iter().filter_map(|pack| self.pack(*pack));
        SharedPacks::of(&packs.cloned().collect())
    }

    /// One whose manifest begins with these lines. `there` are the packs that can be referred to, with their
    /// bytes.
    fn of_packs(
        id: BackupId,
        lines: &[ManifestLine],
        there: &BTreeMap<PackId, u64>,
        closed: BTreeSet<BackupId>,
    ) -> Self {
        let (mut packs, mut numbers) = (Vec::new(), HashMap::new());
        for line in lines {
            if let ManifestLine::Pack { number, path } = line
                && let Some(ObjectName::Pack {
                    backup,
                    number: nth,
                }) = ObjectName::parse(path)
                && let Some(bytes) = there.get(&(backup.clone(), nth))
                && let Ok(place) = u32::try_from(packs.len())
            {
                numbers.insert(*number, (place, *bytes));
                packs.push(((backup, nth), *bytes));
            }
        }
        Self {
            id,
            packs,
            numbers,
            files: HashMap::new(),
            closed,
        }
    }

    /// Takes the files among these lines.
    fn take_files(&mut self, lines: Vec<ManifestLine>, extent_bytes: u64) {
        for line in lines {
            let ManifestLine::File { entry, extents, .. } = line else {
                continue;
            };
            let Some(path) = entry.path.to_bytes() else {
                continue;
            };
            let known = stretches(&extents, &self.numbers, extent_bytes);
            if known.iter().any(|extent| *extent != EarlierExtent::Unknown) {
                self.files.insert(path, known.into());
            }
        }
    }
}

/// What is known of each stretch of a file that is as long as the cutter makes them.
fn stretches(
    extents: &[Extent],
    numbers: &HashMap<u32, (u32, u64)>,
    extent_bytes: u64,
) -> Vec<EarlierExtent> {
    let mut known = Vec::new();
    let mut at: u64 = 0;
    for extent in extents {
        let nth = at / extent_bytes.max(1);
        let plain_bytes = extent.plain_bytes();
        // cut otherwise, by another version
        let is_aligned = at.is_multiple_of(extent_bytes) && plain_bytes <= extent_bytes;
        at = at.saturating_add(plain_bytes);
        let extent = match extent {
            Extent::Zeros { zeros } => u32::try_from(*zeros).ok().map(EarlierExtent::Zeros),
            Extent::Stored(..) => stored_extent(extent, numbers).map(EarlierExtent::Stored),
        };
        if let (true, Some(extent), Ok(nth)) = (is_aligned, extent, usize::try_from(nth))
            && nth <= extents.len()
        {
            known.resize(
                known.len().max(nth.saturating_add(1)),
                EarlierExtent::Unknown,
            );
            if let Some(place) = known.get_mut(nth) {
                *place = extent;
            }
        }
    }
    known
}

/// An extent that lies in one of these packs.
fn stored_extent(extent: &Extent, numbers: &HashMap<u32, (u32, u64)>) -> Option<StoredExtent> {
    let Extent::Stored(pack, offset, stored_bytes, plain_bytes, hash) = extent else {
        return None;
    };
    let (pack, pack_bytes) = numbers.get(pack)?;
    let ends_at = offset.checked_add(*stored_bytes)?;
    Some(StoredExtent {
        pack: *pack,
        offset: u32::try_from(*offset).ok()?,
        stored_bytes: u32::try_from(*stored_bytes).ok()?,
        plain_bytes: u32::try_from(*plain_bytes).ok()?,
        hash: *blake3::Hash::from_hex(hash).ok()?.as_bytes(),
    })
    .filter(|_| ends_at <= *pack_bytes)
}

impl Repository {
    /// The newest backup, whose extents the next one may refer to; `None` where there is none that can be
    /// read.
    pub async fn newest_backup(&self) -> Result<Option<BackupRecord>> {
        let member = self.first();
        let listed = member.list("backups/").await?;
        let ids: BTreeSet<BackupId> = listed
            .iter()
            .filter_map(|object| match ObjectName::parse(&object.path) {
                Some(ObjectName::Backup(id)) => Some(id),
                _ => None,
            })
            .collect();
        for id in ids.iter().rev() {
            match member.listed_backup(id).await {
                Ok(Some(record)) => return Ok(Some(record)),
                Ok(None) => {}
                Err(error) if error.is_unreachable() => return Err(error),
                Err(error) => tracing::debug!("backup {id} is not built upon: {error}"),
            }
        }
        Ok(None)
    }

    /// Refuses a backup that refers to packs of others which are about to go, or are not there, whole.
    /// Before [`Repository::commit_backup`], which does it too: what is refused here was never written.
    pub async fn check_stays(&self, record: &BackupRecord) -> Result<()> {
        self.first().check_stays(record).await
    }

    /// What can be referred to of a backup that was announced to be referred to
    /// ([`Repository::announce_backup`]); files are cut every `extent_bytes`.
    ///
    /// An error that [lacks a key](RepositoryError::lacks_key), is damage or says that it is not found means
    /// that nothing can.
    pub async fn earlier_backup(
        &self,
        record: &BackupRecord,
        extent_bytes: u64,
    ) -> Result<EarlierBackup> {
        let member = self.first();
        let name = ObjectName::Manifest(record.id.clone());
        let head = member
            .manifest_lines_of(&name, &record.manifest_digest)
            .await?;
        let lists = member.file_lists_in(&name, &head)?;
        // first: what is marked no more was removed before it was looked for
        let marked = member.marked().await?;
        let mut there = member.sound_packs(record).await?;
        let closed = member.closed_to_some(&there).await?;
        for (owner, mark) in &marked {
            if there.keys().any(|(backup, _)| backup == owner) {
                tracing::info!(
                    "what backup {owner} has stored is stored anew, since its packs may be about to go: {}",
                    member.locate(mark)
                );
            }
        }
        there.retain(|(owner, _), _| !closed.contains(owner) && !marked.contains_key(owner));
        let mut earlier = EarlierBackup::of_packs(record.id.clone(), &head, &there, closed);
        earlier.take_files(head, extent_bytes);
        for (list, digest) in lists {
            let lines = member.manifest_lines_of(&list, &digest).await?;
            earlier.take_files(lines, extent_bytes);
        }
        Ok(earlier)
    }
}

impl Repository {
    /// The bytes of an extent of an earlier backup.
    pub async fn earlier_extent(
        &self,
        earlier: &EarlierBackup,
        stored: &StoredExtent,
    ) -> Result<Vec<u8>> {
        let member = self.first();
        let name = earlier.pack_name(stored.pack);
        let name = name.ok_or_else(|| RepositoryError::absent(stored.pack.to_string()))?;
        let frames = member.frames(&name).await?;
        let bytes = member
            .fetch_range(&name, stored.offset.into(), stored.stored_bytes.into())
            .await?;
        let plain_bytes = usize::try_from(stored.plain_bytes).unwrap_or(usize::MAX);
        let plain = frames
            .frame(stored.offset.into(), &bytes, plain_bytes)
            .map_err(|error| member.damaged(&name, &error))?;
        let (expected, found) = (blake3::Hash::from_bytes(stored.hash), blake3::hash(&plain));
        if found == expected {
            return Ok(plain);
        }
        Err(RepositoryError::Damaged {
            path: member.locate(&name),
            reason: format!(
                "the extent at {} has other content than was stored: expected={expected}, found={found}",
                stored.offset
            ),
        })
    }
}

impl Member {
    /// The packs of backups, by backup and number, with their stored bytes.
    pub(super) async fn packs_of(
        &self,
        backups: &BTreeSet<BackupId>,
    ) -> Result<BTreeMap<PackId, u64>> {
        let mut packs = BTreeMap::new();
        for id in backups {
            for object in self.list(&format!("packs/{id}/")).await? {
                if let Some(ObjectName::Pack { backup, number }) = ObjectName::parse(&object.path) {
                    packs.insert((backup, number), object.bytes);
                }
            }
        }
        Ok(packs)
    }

    /// How many bytes a backup's manifest and its file lists have as they are stored.
    async fn manifest_bytes(&self, id: &BackupId) -> Result<u64> {
        let listed = self.list(&format!("backups/{id}/")).await?;
        let manifests = listed.iter().filter(|object| {
            let name = ObjectName::parse(&object.path);
            let is_of_it =
                |name| matches!(name, ObjectName::Manifest(_) | ObjectName::FileList { .. });
            name.is_some_and(is_of_it)
        });
        Ok(manifests.fold(0, |sum: u64, object| sum.saturating_add(object.bytes)))
    }

    /// The packs that a backup refers to, with their stored bytes; of its own, and of each stretch of
    /// another's, only where all of them have the bytes that the record says.
    async fn sound_packs(&self, record: &BackupRecord) -> Result<BTreeMap<PackId, u64>> {
        let there = self.packs_of(&record.with_owners()).await?;
        let stretch = |backup: &BackupId, start: u32, end: u32| {
            let range = (backup.clone(), start)..=(backup.clone(), end);
            let packs = there.range(range).map(|(id, bytes)| (id.clone(), *bytes));
            packs.collect::<Vec<_>>()
        };
        let sum = |packs: &[(PackId, u64)]| {
            let bytes = packs.iter().map(|(_, bytes)| *bytes);
            bytes.fold(0, u64::saturating_add)
        };
        let mut sound = BTreeMap::new();
        let manifest_bytes = self.manifest_bytes(&record.id).await?;
        let own = stretch(&record.id, 0, u32::MAX);
        if sum(&own).saturating_add(manifest_bytes) == record.stored_bytes {
            sound.extend(own);
        }
        for shared in &record.shared_packs {
            let Some(last) = shared
                .end
                .checked_sub(1)
                .filter(|last| *last >= shared.start)
            else {
                continue;
            };
            let packs = stretch(&shared.backup, shared.start, last);
            if sum(&packs) == shared.bytes {
                sound.extend(packs);
            }
        }
        Ok(sound)
    }

    /// Of the owners of these packs, those whose packs are not for everybody that this place's objects are
    /// for. All packs of a backup have one key.
    async fn closed_to_some(&self, packs: &BTreeMap<PackId, u64>) -> Result<BTreeSet<BackupId>> {
        let firsts: BTreeMap<&BackupId, u32> = packs
            .keys()
            .rev()
            .map(|(owner, number)| (owner, *number))
            .collect();
        let encryption = self.opened()?.encryption;
        let mut closed = BTreeSet::new();
        for (owner, number) in firsts {
            let name = pack_name((owner.clone(), number));
            let (_, header) = self.head(&name).await?;
            if !encryption.is_for_all(&header, &self.locate(&name)).await? {
                closed.insert(owner.clone());
            }
        }
        Ok(closed)
    }

    /// Refuses a backup that refers to packs of others which are not there, whole.
    pub(super) async fn check_shared(&self, record: &BackupRecord) -> Result<()> {
        let there = self.packs_of(&record.owners()).await?;
        for packs in &record.shared_packs {
            let mut found: u64 = 0;
            for pack in packs.each() {
                let bytes = match there.get(&pack) {
                    Some(bytes) => *bytes,
                    // a listing may be late
                    None => match self.trailer_and_size(&pack_name(pack.clone())).await {
                        Ok((_, bytes)) => bytes,
                        Err(error) if error.is_not_found() => {
                            let reason =
                                format!("backup {} needs it, and it is missing", record.id);
                            return Err(self.lacks_shared(pack, &reason));
                        }
                        Err(error) => return Err(error),
                    },
                };
                found = found.saturating_add(bytes);
            }
            if found != packs.bytes {
                let reason = format!(
                    "it, or one of those up to {}, is not as long as it was: expected={} bytes of them \
                     all, found={found}",
                    packs.end.saturating_sub(1),
                    packs.bytes
                );
                return Err(self.lacks_shared((packs.backup.clone(), packs.start), &reason));
            }
        }
        Ok(())
    }

    fn lacks_shared(&self, pack: PackId, reason: &str) -> RepositoryError {
        RepositoryError::Damaged {
            path: self.locate(&pack_name(pack)),
            reason: reason.to_owned(),
        }
    }
}
