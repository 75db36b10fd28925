//! Taking a base backup: `BASE_BACKUP`'s stream into extents, packs and a manifest, with the WAL
//! that it needs, and `backup.json` last.

mod needed_wal;
mod writer;

use std::sync::Arc;
use std::time::Duration;

use basebackup::label::Origin;
use basebackup::stream::Form;
use bytes::Bytes;
use jiff::Timestamp;
use replication::base_backup::{
    BackupForm, BackupMessage, BaseBackupError, BaseBackupOptions, BaseBackupStream,
    CheckpointMode, ManifestChecksums,
};
use replication::connection::Connection;
use replication::conninfo::ConnectionSettings;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use wal::Lsn;

use crate::clock::Clock;
use crate::error::{Error, Kind, Result, chain};
use crate::repository::destination::{Destination, OpenDestination};
use crate::repository::layout::{BackupId, ObjectName};
use crate::repository::records::{BackupRecord, FORMAT, TablespaceRecord};
use crate::repository::{Repository, ServerIdentity, blocking};
use crate::server::{self, ServerFacts};
use needed_wal::NeededWal;
use writer::{Message, Pack, Written};

/// How many messages of up to 128 KiB wait for the writer at most.
const QUEUED_MESSAGES: usize = 64;
/// How long after a clock was read its moment counts as past for every commit: a commit is
/// stamped before its record is written.
const COMMIT_STAMP_ALLOWANCE: Duration = Duration::from_secs(1);

/// What is asked of a backup.
#[derive(Debug, Clone)]
pub struct BackupOptions {
    /// A text to find it by.
    pub label: String,
    /// Begin with a checkpoint at full speed.
    pub fast_checkpoint: bool,
    /// The most that the server may send, in KiB a second.
    pub max_rate_kib: Option<u32>,
    /// Take the cluster's name for a system that is new under it.
    pub new_system: bool,
}

/// Takes base backups of one cluster.
pub struct BackupTaker {
    settings: ConnectionSettings,
    destination: OpenDestination,
    options: BackupOptions,
    clock: Arc<dyn Clock>,
}

impl BackupTaker {
    /// Takes backups of the server behind `conninfo`.
    pub fn new(
        conninfo: Option<&str>,
        destination: &Destination,
        options: BackupOptions,
        clock: Arc<dyn Clock>,
    ) -> Result<Self> {
        let settings = server::resolve(conninfo)?;
        Ok(Self {
            settings,
            destination: destination.open(true)?,
            options,
            clock,
        })
    }

    /// Takes a backup. `progress` hears how many bytes of about how many have come.
    ///
    /// A backup that fails, or is stopped, leaves nothing that looks like one.
    pub async fn run(
        self,
        progress: &(dyn Fn(u64, u64) + Sync),
        mut stop: watch::Receiver<bool>,
    ) -> Result<BackupRecord> {
        let mut base = server::connect_replication(&self.settings).await?;
        let facts = ServerFacts::read(&mut base).await?;
        facts.check()?;
        let identity = ServerIdentity {
            system_id: facts.system_id,
            major: facts.major,
            block_bytes: facts.block_bytes,
        };
        let new_system = self.options.new_system;
        let repository = self.destination.repository(identity, new_system).await?;
        let id = repository.announce_backup(self.clock.now()).await?;
        let taking = self.take(base, &facts, &repository, &id, progress);
        let outcome = tokio::select! {
            outcome = taking => outcome,
            asked = stop.wait_for(|asked| *asked) => match asked {
                Ok(_) => Err(Error::new(Kind::Failure, "stopped before the backup was complete")),
                Err(_) => Err(Error::new(Kind::Failure, "stopped")),
            },
        };
        if outcome.is_err()
            && let Err(error) = repository.discard_backup(&id).await
        {
            tracing::warn!("what the failed backup had stored stays: {}", chain(&error));
        }
        outcome
    }

    async fn take(
        &self,
        base: Connection,
        facts: &ServerFacts,
        repository: &Repository,
        id: &BackupId,
        progress: &(dyn Fn(u64, u64) + Sync),
    ) -> Result<BackupRecord> {
        let mut sql = server::connect_sql(&self.settings).await?;
        let needed = NeededWal::reserve(&self.settings, facts).await?;
        let started_at = self.moment(&mut sql).await?;
        tracing::info!("waiting for a checkpoint");
        let mut options = BaseBackupOptions::new(self.backup_label());
        options.checkpoint = if self.options.fast_checkpoint {
            CheckpointMode::Fast
        } else {
            CheckpointMode::Spread
        };
        options.max_rate_kib = self.options.max_rate_kib;
        options.manifest_checksums = ManifestChecksums::Crc32c;
        options.progress = true;
        let stream = base
            .base_backup(options)
            .await
            .map_err(|error| base_backup_error(&error))?;
        let (start_lsn, timeline) = (stream.start(), stream.timeline());
        let tablespaces = tablespace_records(&stream);
        tracing::info!("backup {id} begins at {start_lsn} on timeline {timeline}");

        let received = self.receive(stream, repository, id, progress).await?;
        let Received { written, stop_lsn } = received;
        written.check_identity(facts.system_id, start_lsn)?;
        let from_standby = written.label_origin() == Origin::Standby;
        let finished_at = self.end_moment(&mut sql, from_standby).await?;
        let read_at = Instant::now();
        needed
            .receive(repository, timeline, start_lsn, stop_lsn)
            .await?;
        if !from_standby {
            // every commit stamped up to `finished_at` precedes this position: with it stored,
            // the backup's own moment can be restored without any other WAL
            tokio::time::sleep_until(read_at + COMMIT_STAMP_ALLOWANCE).await;
            let position = server::read_moment(&mut sql).await;
            let position = position
                .map_err(|error| server::query_error("read the end of WAL", &error))?
                .insert_lsn
                .map(|lsn| server::without_page_header(lsn, facts.segment_size));
            if let Some(end) = position {
                needed
                    .receive(repository, timeline, start_lsn, end.max(stop_lsn))
                    .await?;
            }
        }
        needed.release().await;

        let record = BackupRecord {
            format: FORMAT,
            id: id.clone(),
            cluster: repository.cluster().to_string(),
            system_id: facts.system_id.to_string(),
            timeline,
            start_lsn,
            stop_lsn,
            started_at,
            finished_at,
            label: self.options.label.clone(),
            postgres_version: facts.version.clone(),
            major: facts.major,
            segment_bytes: facts.segment_size.bytes(),
            files: written.files,
            bytes: written.bytes,
            stored_bytes: written.stored_bytes,
            tablespaces,
            manifest_digest: written.manifest_digest,
            from_standby,
        };
        repository.commit_backup(&record).await?;
        Ok(record)
    }

    /// The label in the server's `backup_label`, which is one line.
    fn backup_label(&self) -> String {
        let text = self.options.label.replace(|c: char| c.is_control(), " ");
        if text.trim().is_empty() {
            "anywhen".to_owned()
        } else {
            text
        }
    }

    async fn moment(&self, sql: &mut Connection) -> Result<Timestamp> {
        let moment = server::read_moment(sql).await;
        Ok(moment
            .map_err(|error| server::query_error("read the server's clock", &error))?
            .time)
    }

    /// A moment that no commit before the stop position is stamped after.
    async fn end_moment(&self, sql: &mut Connection, from_standby: bool) -> Result<Timestamp> {
        if from_standby
            && let Some(replayed) = server::last_replayed_commit(sql)
                .await
                .map_err(|error| server::query_error("read the last replayed commit", &error))?
        {
            return Ok(replayed);
        }
        self.moment(sql).await
    }

    /// Reads the backup to its end, with the writer on a thread of its own.
    async fn receive(
        &self,
        mut stream: BaseBackupStream,
        repository: &Repository,
        id: &BackupId,
        progress: &(dyn Fn(u64, u64) + Sync),
    ) -> Result<Received> {
        let form = match stream.form() {
            BackupForm::Typed => Form::Typed,
            BackupForm::PerTablespace => Form::PerArchive,
        };
        let announced: Vec<_> = stream
            .tablespaces()
            .iter()
            .map(|row| basebackup::stream::Tablespace {
                oid: row.oid,
                location: row.location.clone(),
                size_kib: row.size_kib,
            })
            .collect();
        let total: i64 = announced.iter().filter_map(|row| row.size_kib).sum();
        let total = u64::try_from(total).unwrap_or(0).saturating_mul(1024);
        let (messages, to_write) = mpsc::channel::<Message>(QUEUED_MESSAGES);
        let (packs, to_upload) = mpsc::channel::<Pack>(1);
        let writer = writer::Writer::new(form, announced, repository, id)?;
        let writing = blocking(move || writer.run(to_write, &packs));
        let reading = async move {
            let mut done: u64 = 0;
            loop {
                let message = stream
                    .next()
                    .await
                    .map_err(|error| base_backup_error(&error))?;
                let message = match message {
                    BackupMessage::CopyOutBegins => Message::CopyBegins,
                    BackupMessage::CopyOutEnds => Message::CopyEnds,
                    BackupMessage::Data(bytes) => {
                        done = done.saturating_add(u64::try_from(bytes.len()).unwrap_or(0));
                        progress(done, total);
                        Message::Data(bytes)
                    }
                    BackupMessage::Finished { end, .. } => {
                        return Ok::<_, Error>(Some(end));
                    }
                };
                if messages.send(message).await.is_err() {
                    // the writer has failed, and says why
                    return Ok(None);
                }
            }
        };
        let (read, written, uploaded) = tokio::join!(
            reading,
            writing,
            upload(repository.clone(), id.clone(), to_upload)
        );
        // the cause first: what fails stops the others, and they only say that they were stopped
        uploaded?;
        let end: Option<Lsn> = read?;
        let written = written?;
        let Some(stop_lsn) = end else {
            return Err(Error::failure("the backup's writer stopped before its end"));
        };
        let name = ObjectName::Manifest(id.clone());
        repository
            .create_object(
                &name,
                Bytes::from(written.manifest.clone()),
                &written.manifest_digest,
            )
            .await?;
        Ok(Received { written, stop_lsn })
    }
}

/// A backup whose files are stored, and which the server called good.
struct Received {
    written: Written,
    stop_lsn: Lsn,
}

async fn upload(
    repository: Repository,
    id: BackupId,
    mut packs: mpsc::Receiver<Pack>,
) -> Result<()> {
    while let Some(pack) = packs.recv().await {
        let name = ObjectName::Pack {
            backup: id.clone(),
            number: pack.number,
        };
        repository
            .create_object(&name, Bytes::from(pack.object), &pack.digest)
            .await?;
    }
    Ok(())
}

fn tablespace_records(stream: &BaseBackupStream) -> Vec<TablespaceRecord> {
    let rows = stream.tablespaces().iter();
    rows.filter_map(|row| {
        Some(TablespaceRecord {
            oid: row.oid?,
            location: row.location.clone()?,
        })
    })
    .collect()
}

fn base_backup_error(error: &BaseBackupError) -> Error {
    let message = format!("the server did not complete the backup: {}", chain(error));
    match error.sqlstate() {
        Some("XX001") => Error::damaged(message).hint(
            "the server's data files are damaged: see the pages named in its log; an older backup \
             and the WAL since can restore them",
        ),
        Some("42501") => {
            Error::usage(message).hint("as a superuser: ALTER ROLE <role> REPLICATION;")
        }
        _ if error.is_transient() => Error::new(Kind::Unreachable, message),
        _ => Error::failure(message),
    }
}
