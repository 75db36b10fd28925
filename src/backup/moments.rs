//! The moments of a backup: when it began, and the one that it can be restored to by itself.

use std::time::Duration;

use basebackup::label::Origin;
use jiff::Timestamp;
use replication::connection::Connection;
use tokio::time::Instant;
use wal::Lsn;

use super::BackupTaker;
use super::tries::Tries;
use super::writer::Written;
use crate::error::{Error, Result};
use crate::retry::Backoff;
use crate::server::{self, ServerFacts};

/// How long after a clock was read its moment counts as past for every commit at the latest: a commit
/// is stamped before its record is written.
const COMMIT_STAMP_ALLOWANCE: Duration = Duration::from_secs(1);
/// How long a standby may take to replay up to the end of its backup.
const REPLAY_WAIT: Duration = Duration::from_mins(1);

/// The moment that a backup ends at.
pub(super) struct End {
    /// No commit before the stop position is stamped later; every one that is stamped up to it
    /// precedes `lsn`. The second does not hold of a standby that has replayed no commit since its
    /// start: all that is known then is the whole second of its checkpoint, and a commit of that
    /// second may come behind `lsn`.
    pub(super) time: Timestamp,
    /// At or behind the stop position.
    pub(super) lsn: Lsn,
}

impl BackupTaker {
    pub(super) async fn start_moment(&self) -> Result<Timestamp> {
        let mut sql = server::connect_sql(&self.settings).await?;
        Ok(moment(&mut sql).await?.time)
    }

    /// The backup's own moment, which can be restored without any WAL but its own.
    ///
    /// Over a new connection each time: one that was idle during the copy may be gone.
    pub(super) async fn end(
        &self,
        facts: &ServerFacts,
        written: &Written,
        stop_lsn: Lsn,
    ) -> Result<End> {
        let mut tries = Tries::new();
        loop {
            let ended = match written.label_origin() {
                Origin::Primary => self.end_on_primary(facts, stop_lsn).await,
                Origin::Standby => self.end_on_standby(written, stop_lsn).await,
            };
            match ended {
                Ok(end) => return Ok(end),
                Err(error) => tries.again_after(error).await?,
            }
        }
    }

    async fn end_on_primary(&self, facts: &ServerFacts, stop_lsn: Lsn) -> Result<End> {
        let mut sql = server::connect_sql(&self.settings).await?;
        let time = moment(&mut sql).await?.time;
        // every commit stamped up to `time` precedes a position that is read then
        all_have_ended(&mut sql).await?;
        let Some(position) = moment(&mut sql).await?.lsn else {
            return Err(
                Error::failure("the primary became a standby while the backup ran")
                    .hint("take the backup again"),
            );
        };
        let position = server::without_page_header(position, facts.segment_size);
        Ok(End {
            time,
            lsn: position.max(stop_lsn),
        })
    }

    async fn end_on_standby(&self, written: &Written, stop_lsn: Lsn) -> Result<End> {
        let failed = |error| server::query_error("read how far the standby has replayed", &error);
        let mut sql = server::connect_sql(&self.settings).await?;
        let mut backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(1));
        let waiting_since = Instant::now();
        loop {
            let replayed = server::replayed_lsn(&mut sql).await.map_err(failed)?;
            match replayed {
                Some(lsn) if lsn >= stop_lsn => break,
                _ if waiting_since.elapsed() < REPLAY_WAIT => backoff.wait().await,
                _ => {
                    return Err(Error::failure(format!(
                        "the standby has not replayed up to the end of its backup: end={stop_lsn}, \
                         replayed={}",
                        replayed.map_or_else(|| "nothing".to_owned(), |lsn| lsn.to_string())
                    ))
                    .hint("is its replay paused? SELECT pg_wal_replay_resume(); then try again"));
                }
            }
        }
        // the time first: the commit that it is of has been replayed by the position
        let commit = server::last_replayed_commit(&mut sql)
            .await
            .map_err(failed)?;
        let replayed = server::replayed_lsn(&mut sql).await.map_err(failed)?;
        Ok(End {
            // the standby's own clock says nothing about what the primary has committed
            time: commit.unwrap_or_else(|| written.after_checkpoint()),
            lsn: replayed.unwrap_or(stop_lsn).max(stop_lsn),
        })
    }
}

/// Returns once no transaction is in progress any more that is now, or after the allowance. A transaction is
/// in progress from before its commit is stamped until the record of that is written (xact.c,
/// `RecordTransactionCommit`, `ProcArrayEndTransaction`), so whatever ends later is stamped later.
async fn all_have_ended(sql: &mut Connection) -> Result<()> {
    let failed = |error| server::query_error("read which transactions are in progress", &error);
    let until = Instant::now() + COMMIT_STAMP_ALLOWANCE;
    let mut waited_for = server::transactions_in_progress(sql)
        .await
        .map_err(failed)?;
    let mut backoff = Backoff::new(Duration::from_millis(5), Duration::from_millis(100));
    while !waited_for.is_empty() {
        // one that is open for long is not stamped yet: it is not waited for
        if tokio::time::timeout_at(until, backoff.wait())
            .await
            .is_err()
        {
            return Ok(());
        }
        let now = server::transactions_in_progress(sql)
            .await
            .map_err(failed)?;
        waited_for.retain(|xid| now.contains(xid));
    }
    Ok(())
}

async fn moment(sql: &mut Connection) -> Result<server::Moment> {
    let moment = server::read_moment(sql).await;
    moment.map_err(|error| server::query_error("read the server's clock and end of WAL", &error))
}
