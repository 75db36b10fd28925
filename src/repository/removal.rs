//! Removing backups, so that no other one is harmed: neither one that exists nor one that is under way.
//!
//! Whoever removes marks the backups whose packs may go, then reads which backups are under way
//! (`intents/`), then which exist. Whoever takes a backup announces it, and what it may refer to, before it
//! reads an earlier manifest; before its `backup.json` it looks for marks, and then whether all packs are
//! there. So either the one sees the intent, or the other sees the mark, or that the pack is gone.
//! This relies on listings that show what was stored before they were asked for.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::layout::{BackupId, ObjectName};
use super::member::Member;
use super::records::{BackupRecord, FORMAT};
use super::sharing::{Intent, PackId, pack_name};
use super::store::Created;
use super::{Repository, RepositoryError, Result, json_of};

/// `marks/<backup id>/<time>`: packs of this backup may be about to go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Mark {
    format: u32,
    /// Whose packs.
    id: BackupId,
    /// The backup that is removed.
    removed: BackupId,
}

/// What became of a backup that was to be removed, and no longer exists.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RemovedBackup {
    /// How many packs went, which nobody needs any more.
    pub packs: u64,
    /// How many bytes they had.
    pub bytes: u64,
    /// Backups whose packs stay for now, since one that is under way may refer to them: by whose intent.
    pub spared: BTreeMap<BackupId, BackupId>,
}

impl Repository {
    /// Removes a backup from the first place, with every pack that it refers to and nobody else does. `now`
    /// tells one removal from another.
    ///
    /// Where it cannot be told what other backups refer to, nothing is removed: that is an error. Marks of
    /// a removal that failed later, or was killed, stay: what they name is not referred to again.
    pub async fn remove_backup(&self, id: &BackupId, now: Timestamp) -> Result<RemovedBackup> {
        let member = self.first();
        let name = ObjectName::Backup(id.clone());
        let record = member.backup_fields(id).await?;
        let record = record.ok_or_else(|| RepositoryError::absent(member.locate(&name)))?;
        let owners = record.with_owners();
        let marks = member.mark(&owners, id, now).await?;
        let removed = match member.what_stays(id, &owners).await {
            // where this fails, the marks stay: what was asked for may still happen
            Ok(stays) => Ok(member.remove_marked(id, &owners, stays).await?),
            // nothing was asked for
            Err(error) => Err(error),
        };
        member.unmark(marks).await?;
        removed
    }
}

impl Member {
    /// Removes what a backup that failed has stored, but for what others refer to. Where one that is under way
    /// may refer to it, all of it stays.
    pub(super) async fn remove_unfinished(&self, id: &BackupId, now: Timestamp) -> Result<()> {
        let name = ObjectName::Unfinished(id.clone());
        let store = self.store()?;
        // nobody writes both: whoever put this there must not have that removed
        if self.backup_fields(id).await?.is_some() {
            return Ok(store.delete(&name.path()).await?);
        }
        // its own packs alone: it refers to those of others as they do themselves
        let owners = BTreeSet::from([id.clone()]);
        // a mark fails a backup that refers to it
        if self.under_way(id, &owners).await?.contains_key(id) {
            return Ok(());
        }
        let marks = self.mark(&owners, id, now).await?;
        let (spared, needed) = match self.what_stays(id, &owners).await {
            Ok(stays) => stays,
            // nothing was asked for
            Err(error) => {
                self.unmark(marks).await?;
                return Err(error);
            }
        };
        if !spared.contains_key(id) {
            // without the manifest nobody refers to it
            store
                .delete(&ObjectName::Manifest(id.clone()).path())
                .await?;
            self.remove_lists(id).await?;
            self.remove_packs(&owners, &needed, &spared).await?;
            self.forget_intent(id).await?;
            // last: what was broken off is found by it
            store.delete(&name.path()).await?;
        }
        self.unmark(marks).await
    }

    async fn unmark(&self, marks: Vec<ObjectName>) -> Result<()> {
        for mark in marks {
            self.store()?.delete(&mark.path()).await?;
        }
        Ok(())
    }

    async fn mark(
        &self,
        owners: &BTreeSet<BackupId>,
        removed: &BackupId,
        now: Timestamp,
    ) -> Result<Vec<ObjectName>> {
        let store = self.store()?;
        let mut marks = Vec::new();
        for owner in owners {
            let mark = Bytes::from(json_of(&Mark {
                format: FORMAT,
                id: owner.clone(),
                removed: removed.clone(),
            }));
            let mut at = now;
            loop {
                let name = ObjectName::Mark {
                    backup: owner.clone(),
                    at: BackupId::at(at),
                };
                if store.create(&name.path(), mark.clone()).await? == Created::New {
                    marks.push(name);
                    break;
                }
                // another removal's, and its end must not end ours
                let next = at.checked_add(jiff::SignedDuration::from_millis(1));
                at = next.unwrap_or(at);
            }
        }
        Ok(marks)
    }

    /// What must stay of these backups' packs, which are marked, once one of them is removed.
    async fn what_stays(&self, removed: &BackupId, owners: &BTreeSet<BackupId>) -> Result<Stays> {
        // in this order: a backup loses its intent once it exists
        let spared = self.under_way(removed, owners).await?;
        let needed = self.needed_without(removed).await?;
        Ok((spared, needed))
    }

    /// Removes a backup whose packs, and those of others that it refers to, are marked.
    async fn remove_marked(
        &self,
        id: &BackupId,
        owners: &BTreeSet<BackupId>,
        (spared, needed): Stays,
    ) -> Result<RemovedBackup> {
        let store = self.store()?;
        // from here on it does not exist, and half of it is never listed
        for name in [
            ObjectName::Backup(id.clone()),
            ObjectName::Manifest(id.clone()),
        ] {
            store.delete(&name.path()).await?;
        }
        self.remove_lists(id).await?;
        let (packs, bytes) = self.remove_packs(owners, &needed, &spared).await?;
        // it may have been killed before it could
        self.forget_intent(id).await?;
        Ok(RemovedBackup {
            packs,
            bytes,
            spared,
        })
    }

    async fn remove_lists(&self, id: &BackupId) -> Result<()> {
        for list in self.list(&format!("backups/{id}/files/")).await? {
            self.store()?.delete(&list.path).await?;
        }
        Ok(())
    }

    /// Removes the packs of these backups that nobody needs: how many, and their bytes.
    async fn remove_packs(
        &self,
        owners: &BTreeSet<BackupId>,
        needed: &Needed,
        spared: &BTreeMap<BackupId, BackupId>,
    ) -> Result<(u64, u64)> {
        let (mut count, mut sum) = (0_u64, 0_u64);
        for (pack, bytes) in self.packs_of(owners).await? {
            if spared.contains_key(&pack.0) || needed.has(&pack) {
                continue;
            }
            self.store()?.delete(&pack_name(pack).path()).await?;
            count = count.saturating_add(1);
            sum = sum.saturating_add(bytes);
        }
        Ok((count, sum))
    }

    /// Of these backups, those that another one than the `removed` may refer to, or is, with that one.
    async fn under_way(
        &self,
        removed: &BackupId,
        owners: &BTreeSet<BackupId>,
    ) -> Result<BTreeMap<BackupId, BackupId>> {
        let mut named = BTreeMap::new();
        for object in self.list("intents/").await? {
            let Some(name @ ObjectName::Intent(_)) = ObjectName::parse(&object.path) else {
                continue;
            };
            // one that is gone by now has become a backup, or nothing
            let Some(intent) = self.find::<Intent>(&name).await? else {
                continue;
            };
            if intent.id() == removed {
                // it exists, or has failed
                continue;
            }
            for owner in intent.names().filter(|owner| owners.contains(*owner)) {
                named.insert(owner.clone(), intent.id().clone());
            }
        }
        Ok(named)
    }

    /// What every backup but one needs.
    async fn needed_without(&self, removed: &BackupId) -> Result<Needed> {
        let mut needed = Needed::default();
        for object in self.list("backups/").await? {
            let Some(ObjectName::Backup(id)) = ObjectName::parse(&object.path) else {
                continue;
            };
            if id == *removed {
                continue;
            }
            if let Some(record) = self.backup_fields(&id).await? {
                needed.add(&record);
            }
        }
        Ok(needed)
    }

    /// Refuses a backup that refers to packs of others which are about to go, or are not there, whole.
    pub(super) async fn check_stays(&self, record: &BackupRecord) -> Result<()> {
        if record.shared_packs.is_empty() {
            return Ok(());
        }
        // first: what is marked no more was removed before it was looked for
        for (owner, mark) in self.marked().await? {
            if record.owners().contains(&owner) {
                return Err(RepositoryError::Damaged {
                    path: self.locate(&mark),
                    reason: format!(
                        "backup {} refers to packs of {owner}, which are being removed",
                        record.id
                    ),
                });
            }
        }
        self.check_shared(record).await
    }

    /// The backups whose packs may be about to go, with the marks that say so.
    pub(super) async fn marked(&self) -> Result<BTreeMap<BackupId, ObjectName>> {
        let marks = self.list("marks/").await?;
        let marks = marks.iter().filter_map(|object| {
            let name = ObjectName::parse(&object.path)?;
            match &name {
                ObjectName::Mark { backup, .. } => Some((backup.clone(), name)),
                _ => None,
            }
        });
        Ok(marks.collect())
    }
}

/// Backups that are spared, by whose intent, and what those that exist refer to.
type Stays = (BTreeMap<BackupId, BackupId>, Needed);

/// Which packs backups that exist refer to.
#[derive(Debug, Default)]
struct Needed {
    /// All packs of these.
    whole: BTreeSet<BackupId>,
    /// Of each, stretches of numbers: from the first up to and without the second.
    stretches: BTreeMap<BackupId, Vec<(u32, u32)>>,
}

impl Needed {
    fn add(&mut self, record: &BackupRecord) {
        self.whole.insert(record.id.clone());
        for shared in &record.shared_packs {
            let stretches = self.stretches.entry(shared.backup.clone()).or_default();
            stretches.push((shared.start, shared.end));
        }
    }

    fn has(&self, (backup, number): &PackId) -> bool {
        let stretches = self.stretches.get(backup);
        let holds = |(start, end): &(u32, u32)| (*start..*end).contains(number);
        self.whole.contains(backup) || stretches.is_some_and(|all| all.iter().any(holds))
    }
}
