//! What earlier backups have stored: a backup refers to it, and stores the rest.

use super::extents::EXTENT_BYTES;
use super::tries::Tries;
use crate::error::{Result, chain};
use crate::repository::layout::BackupId;
use crate::repository::records::BackupRecord;
use crate::repository::sharing::EarlierBackup;
use crate::repository::{Repository, RepositoryError};

/// The backups that one may refer to.
#[derive(Default)]
pub(super) struct EarlierRecords {
    newest: Option<BackupRecord>,
    /// Those that failed since, oldest first.
    unfinished: Vec<BackupRecord>,
}

impl EarlierRecords {
    pub(super) async fn find(repository: &Repository) -> Result<Self, RepositoryError> {
        let newest = repository.newest_backup().await?;
        let unfinished = repository.unfinished_since(newest.as_ref()).await?;
        Ok(Self { newest, unfinished })
    }

    pub(super) fn each(&self) -> impl Iterator<Item = &BackupRecord> {
        self.newest.iter().chain(&self.unfinished)
    }

    /// What the newest has stored.
    pub(super) async fn read_newest(
        &self,
        repository: &Repository,
    ) -> Result<Option<(&BackupRecord, EarlierBackup)>> {
        let Some(newest) = &self.newest else {
            return Ok(None);
        };
        let earlier = earlier_backup(repository, newest).await?;
        Ok(earlier.map(|earlier| (newest, earlier)))
    }

    /// What all of them have stored: `known`, of the newest, and of those that failed since.
    pub(super) async fn with_unfinished(
        &self,
        mut known: Option<EarlierBackup>,
        repository: &Repository,
    ) -> Result<Option<EarlierBackup>> {
        for unfinished in &self.unfinished {
            if let Some(later) = unfinished_backup(repository, unfinished).await? {
                known = Some(match known {
                    Some(known) => known.with(later),
                    None => later,
                });
            }
        }
        Ok(known)
    }
}

/// What a backup that failed has stored; nothing, said, where that cannot be told.
async fn unfinished_backup(
    repository: &Repository,
    unfinished: &BackupRecord,
) -> Result<Option<EarlierBackup>> {
    let id = &unfinished.id;
    let mut tries = Tries::new();
    loop {
        match repository.earlier_backup(unfinished, extent_bytes()).await {
            Ok(stored) => {
                tracing::info!("what the failed backup {id} has stored is used");
                return Ok(Some(stored));
            }
            Err(error) if error.is_unreachable() => tries.again_after(error.into()).await?,
            Err(error) => {
                let why = chain(&error);
                tracing::info!("what the failed backup {id} has stored is not used: {why}");
                return Ok(None);
            }
        }
    }
}

fn extent_bytes() -> u64 {
    u64::try_from(EXTENT_BYTES).unwrap_or(u64::MAX)
}

/// What the newest backup has stored; nothing, said, where that cannot be told.
async fn earlier_backup(
    repository: &Repository,
    newest: &BackupRecord,
) -> Result<Option<EarlierBackup>> {
    let mut tries = Tries::new();
    loop {
        let earlier = repository.earlier_backup(newest, extent_bytes());
        let error = match earlier.await {
            Ok(earlier) => {
                say_what_is_closed(&earlier);
                tracing::info!(
                    "what backup {} has stored is not stored again",
                    earlier.id()
                );
                return Ok(Some(earlier));
            }
            Err(error) => error,
        };
        if error.lacks_key() {
            tracing::info!(
                "everything is stored anew: without an identity, and with nothing of it in state_dir, nobody \
                 can tell what backup {} has stored",
                newest.id
            );
            return Ok(None);
        }
        if !error.is_unreachable() {
            tracing::warn!(
                "everything is stored anew: what backup {} has stored cannot be read: {}",
                newest.id,
                chain(&error)
            );
            return Ok(None);
        }
        tries.again_after(error.into()).await?;
    }
}

fn say_what_is_closed(earlier: &EarlierBackup) {
    let closed: Vec<&str> = earlier.closed().iter().map(BackupId::as_str).collect();
    if !closed.is_empty() {
        tracing::info!(
            "what these backups have stored is stored anew, since it is not encrypted to every recipient of \
             now: {}. hint: `anywhen keys rotate` opens it to all of them, if it is encrypted",
            closed.join(", ")
        );
    }
}
