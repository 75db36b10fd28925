//! What a backup that failed has stored: the next one refers to it, as to an earlier backup.
//!
//! `backups/<id>/unfinished.json` is a record like `backup.json`, without names, of the packs, the file lists and
//! the manifest that are there. Nobody restores it. The intent stays with it: whoever removes things spares what
//! it names. Once a later backup is complete, it is removed by the rules of [`super::removal`].

use std::collections::BTreeSet;

use jiff::Timestamp;

use super::layout::{BackupId, ObjectName};
use super::member::Member;
use super::records::BackupRecord;
use super::{Repository, RepositoryError, Result};

impl Repository {
    /// Makes what a backup that failed has stored known to the next one. All of it must be stored before.
    ///
    /// Where this fails, the next one may know of it all the same.
    pub async fn keep_unfinished(&self, record: &BackupRecord) -> Result<()> {
        self.first().keep_unfinished(record).await
    }

    /// What backups that failed have stored, oldest first, if none was completed since; `newest` is the newest
    /// that was.
    pub async fn unfinished_since(
        &self,
        newest: Option<&BackupRecord>,
    ) -> Result<Vec<BackupRecord>> {
        let member = self.first();
        let mut since = Vec::new();
        for id in member.unfinished().await? {
            if newest.is_some_and(|newest| id < newest.id) {
                continue;
            }
            match member
                .find_record(&ObjectName::Unfinished(id.clone()))
                .await
            {
                Ok(Some(record)) if record.id == id => since.push(record),
                Ok(_) => {}
                Err(error) if error.is_unreachable() => return Err(error),
                Err(error) => tracing::debug!("failed backup {id} is not used: {error}"),
            }
        }
        Ok(since)
    }

    /// Removes what failed backups before this one have stored, but for what others refer to. What one that is
    /// under way may refer to stays, for the next time.
    pub async fn remove_unfinished(&self, before: &BackupId, now: Timestamp) -> Result<()> {
        let member = self.first();
        let mut failed = None;
        // the newest first: it may refer to packs of those before it
        for id in member.unfinished().await?.iter().rev() {
            if id < before
                && let Err(error) = member.remove_unfinished(id, now).await
            {
                failed.get_or_insert(error);
            }
        }
        failed.map_or(Ok(()), Err)
    }

    /// Whether this archiver can read what it writes now, on a later day too.
    pub fn can_read_back(&self) -> Result<bool> {
        let member = self.first();
        let is_kept = member.kept_manifests()?.is_some();
        Ok(is_kept || !member.opened()?.encryption.is_blind())
    }
}

impl Member {
    async fn keep_unfinished(&self, record: &BackupRecord) -> Result<()> {
        let name = ObjectName::Unfinished(record.id.clone());
        self.create_json(&name, &record.without_names().with_digest())
            .await
    }

    /// Whether a backup that failed is to be used by the next one.
    pub(super) async fn is_unfinished(&self, id: &BackupId) -> Result<bool> {
        let name = ObjectName::Unfinished(id.clone());
        match self.find_record(&name).await {
            Ok(found) => Ok(found.is_some()),
            Err(error @ RepositoryError::Damaged { .. }) => {
                tracing::debug!("failed backup {id} is not used: {error}");
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    /// The backups that failed and are to be used.
    async fn unfinished(&self) -> Result<BTreeSet<BackupId>> {
        let listed = self.list("backups/").await?;
        let ids = listed
            .iter()
            .filter_map(|object| match ObjectName::parse(&object.path) {
                Some(ObjectName::Unfinished(id)) => Some(id),
                _ => None,
            });
        Ok(ids.collect())
    }
}
