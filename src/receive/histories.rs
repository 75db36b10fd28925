//! When the history files of timelines are stored.

use bytes::Bytes;
use tokio::sync::OnceCell;
use wal::TimelineId;

use super::failures::Failures;
use super::storing::{is_away_now, new_backoff};
use crate::error::chain;
use crate::repository::layout::ObjectName;
use crate::repository::{Repository, RepositoryError, Spool, SpoolPut};

/// The history files without which the WAL of a timeline has no place: stored before the first of it,
/// and not before this server is known to be the one whose WAL is stored.
pub(super) struct Histories {
    files: Vec<(TimelineId, Bytes)>,
    stored: OnceCell<()>,
}

impl Histories {
    /// Of what is not stored yet, that of `timeline` and of those before it: later ones wait for their
    /// own WAL.
    pub(super) fn until(timeline: TimelineId, missing: &[(TimelineId, Bytes)]) -> Self {
        let files = missing.iter().filter(|(of, _)| *of <= timeline);
        Self {
            files: files.cloned().collect(),
            stored: OnceCell::new(),
        }
    }

    /// Whether [`Self::store`] has returned.
    pub(super) fn are_stored(&self) -> bool {
        self.stored.initialized()
    }

    /// Returns once they are stored, or spooled while the repository is away.
    pub(super) async fn store(
        &self,
        repository: &Repository,
        spool: Option<&Spool>,
        failures: &Failures,
    ) -> Result<(), RepositoryError> {
        let all = async || {
            let mut backoff = new_backoff();
            for (timeline, content) in &self.files {
                let name = ObjectName::History(*timeline);
                loop {
                    match repository.store_file(&name, content.clone()).await {
                        Ok(()) => break,
                        Err(error) if error.is_unreachable() => {
                            is_away_now(spool, failures, &error);
                        }
                        Err(error) => return Err(error),
                    }
                    if let Some(spool) = spool {
                        match spool.put_file(&name, content.clone()).await {
                            Ok(SpoolPut::Stored) => break,
                            Ok(SpoolPut::Full) => {}
                            Err(error) if error.is_unreachable() => {
                                tracing::debug!("cannot spool, trying again: {}", chain(&error));
                            }
                            Err(error) => return Err(error),
                        }
                    }
                    backoff.wait().await;
                }
            }
            Ok(())
        };
        self.stored.get_or_try_init(all).await.copied()
    }
}
