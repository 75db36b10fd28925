//! Taking a backup: announced, stored, and made to exist, or given up.

use std::collections::BTreeSet;

use bytes::Bytes;
use container::{CompressedFrame, DIGEST_OF_FRAMES, Encoder, FrameCompressor, Header};
use jiff::Timestamp;

use super::keys::Sealing;
use super::layout::{BackupId, ObjectName};
use super::member::Recipe;
use super::records::BackupRecord;
use super::sharing::Intent;
use super::store::Created;
use super::{Repository, RepositoryError, Result, json_of};

/// What the objects of a backup are encoded with.
#[derive(Debug, Clone)]
pub struct BackupRecipe {
    /// Of no object yet.
    header: Header,
    sealing: Option<Sealing>,
    level: i32,
}

impl BackupRecipe {
    /// Begins an object of the backup.
    pub fn encoder(&self, name: &ObjectName) -> Result<Encoder> {
        let mut header = self.header.clone();
        name.kind().clone_into(&mut header.kind);
        header.name = name.path();
        if matches!(name, ObjectName::Pack { .. }) {
            header.digest_of = Some(DIGEST_OF_FRAMES.to_owned());
        }
        let Recipe { header, key } = Recipe::new(header, self.sealing.as_ref())?;
        Encoder::new(&header, self.level, key.as_ref()).map_err(|error| RepositoryError::Damaged {
            path: name.path(),
            reason: error.to_string(),
        })
    }

    /// Of a backup that is not encrypted, in no repository.
    #[cfg(test)]
    pub(crate) fn of_nothing() -> Self {
        Self {
            header: Header::new("pack", "", "main", "1"),
            sealing: None,
            level: 3,
        }
    }

    /// Compresses a frame for one of its packs, on whatever thread; `hash` is the BLAKE3 hash of `plain`.
    pub fn compress(
        &self,
        plain: &[u8],
        hash: [u8; 32],
    ) -> std::result::Result<CompressedFrame, container::Error> {
        FrameCompressor::new(self.level)?.compress_hashed(plain, hash)
    }
}

/// What a backup writes. It goes to one place: the first of a repository that
/// [`Repository::leader`] gave.
impl Repository {
    /// The first place that can be written to, alone: a backup is written to it, and the others
    /// are filled up from there.
    #[must_use]
    pub fn leader(&self) -> Self {
        let reachable = self.members.iter().find(|member| !member.place().is_away());
        self.only(reachable.unwrap_or_else(|| self.first()))
    }

    /// What the objects of a backup are encoded with.
    pub async fn backup_recipe(&self) -> Result<BackupRecipe> {
        let member = self.first();
        Ok(BackupRecipe {
            header: member.plain_header(&ObjectName::Cluster),
            sealing: member.sealing().await?,
            level: member.place().settings().backup_level,
        })
    }

    /// Creates an object that was encoded already; `digest` is that of its plain bytes.
    pub async fn create_object(
        &self,
        name: &ObjectName,
        object: Bytes,
        digest: &str,
    ) -> Result<()> {
        self.first().create_object(name, object, digest).await
    }

    /// Takes an id for a backup that begins at `time`, or the first moment after it that is free. Whoever
    /// removes things finds that it may refer to what any of `earlier` has stored or refers to.
    pub async fn announce_backup<'a>(
        &self,
        time: Timestamp,
        earlier: impl IntoIterator<Item = &'a BackupRecord>,
    ) -> Result<BackupId> {
        let earlier = earlier.into_iter();
        let refers_to: BTreeSet<BackupId> = earlier.flat_map(BackupRecord::with_owners).collect();
        let store = self.first().store()?;
        let mut at = time;
        loop {
            let id = BackupId::at(at);
            let intent = Bytes::from(json_of(&Intent::of(&id, refers_to.clone())));
            let path = ObjectName::Intent(id.clone()).path();
            if store.create(&path, intent).await? == Created::New {
                return Ok(id);
            }
            at = at
                .checked_add(jiff::SignedDuration::from_millis(1))
                .unwrap_or(at);
        }
    }

    /// Makes a backup exist. Everything that it refers to must be stored before, which is checked of what
    /// is not its own; `recipe` is what that was encoded with, so that one key opens all of it.
    pub async fn commit_backup(&self, record: &BackupRecord, recipe: &BackupRecipe) -> Result<()> {
        let sealing = recipe.sealing.as_ref();
        self.first().commit_backup(record, sealing).await
    }

    /// Removes what a backup that did not come to its end has stored, unless the next one is to use it;
    /// whether it did. What `was_offered` for that ([`Repository::keep_unfinished`]), though it may have
    /// failed, others may refer to by now, and need; `now` tells one removal from another.
    pub async fn discard_backup(
        &self,
        id: &BackupId,
        was_offered: bool,
        now: Timestamp,
    ) -> Result<bool> {
        let member = self.first();
        let name = ObjectName::Backup(id.clone());
        if member.find::<serde_json::Value>(&name).await?.is_some()
            || member.is_unfinished(id).await?
        {
            return Ok(false);
        }
        if was_offered {
            return member.remove_unfinished(id, now).await.map(|()| true);
        }
        // nobody has heard of it; and this must do without writing where no room is left
        let store = member.store()?;
        for folder in [format!("packs/{id}/"), format!("backups/{id}/")] {
            for object in store.list(&folder).await? {
                store.delete(&object.path).await?;
            }
        }
        store.delete(&ObjectName::Intent(id.clone()).path()).await?;
        Ok(true)
    }
}
