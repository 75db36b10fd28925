//! Taking a base backup: `BASE_BACKUP`'s stream into extents, packs and a manifest, with the WAL
//! that it needs, and `backup.json` last.

mod earlier;
mod extents;
mod increments;
mod inflating;
mod moments;
mod needed_wal;
mod outside;
mod pages;
mod rebuilding;
mod summaries;
mod tries;
mod writer;

use std::future::Future;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use basebackup::label::Origin;
use basebackup::stream::{Events, Form};
use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use jiff::Timestamp;
use replication::base_backup::{
    BackupForm, BackupKind, BackupMessage, BaseBackupError, BaseBackupOptions, BaseBackupStream,
    ManifestChecksums,
};
pub use replication::base_backup::{CheckpointMode, ServerCompression};
use replication::connection::Connection;
use replication::conninfo::ConnectionSettings;
use replication::server_error::ServerError;
use tokio::sync::{mpsc, watch};
use wal::{Lsn, TimelineId};

use crate::clock::Clock;
use crate::error::{Error, Kind, Result, chain};
use crate::receive::comparison::{Lineage, refuse_another_history};
use crate::repository::destination::{Destination, OpenDestination};
use crate::repository::kept_manifests::KeptManifests;
use crate::repository::layout::{BackupId, ObjectName};
use crate::repository::records::{BackupRecord, FORMAT, TablespaceRecord};
use crate::repository::{Acknowledge, BackupRecipe, Repository, ServerIdentity, blocking};
use crate::server::{self, ServerFacts};
use earlier::EarlierRecords;
use increments::ToAsk;
use needed_wal::{NeededWal, Places};
use pages::PageChecks;
use tries::Tries;
use writer::{Message, Object, Outcome, Packed, Writer, Written, refused};

/// How many messages of up to 128 KiB wait for the writer at most.
const QUEUED_MESSAGES: usize = 64;
/// So many packs and file lists are stored at once. Each is in memory, and so are one that waits and one that is filled.
const UPLOADS: usize = 2;
/// A server that sends nothing for so long in the middle of a backup is gone.
const SILENCE_MAX: Duration = Duration::from_mins(10);
/// The first major that can compress what it sends.
const COMPRESSES_SINCE_MAJOR: u32 = 15;

/// What is asked of a backup.
#[derive(Debug, Clone)]
pub struct BackupOptions {
    /// A text to find it by.
    pub label: String,
    /// How it begins.
    pub checkpoint: CheckpointMode,
    /// The most that the server may send, in KiB a second.
    pub max_rate_kib: Option<u32>,
    /// Let the server compress what it sends.
    pub server_compression: Option<ServerCompression>,
    /// Let the server check its pages, and fail the backup where one's checksum is wrong. Else they are
    /// checked here, and named in the backup's record.
    pub verify_checksums: bool,
    /// Read everything, and store it anew, also what an earlier backup has stored.
    pub full: bool,
    /// Take the cluster's name for a system that is new under it.
    pub new_system: bool,
}

/// A server and the repositories that a backup of it goes to.
struct Prepared {
    base: Connection,
    facts: ServerFacts,
    lineage: Lineage,
    everywhere: Repository,
    /// The place that has it first; the others are filled up from there.
    repository: Repository,
}

/// Takes base backups of one cluster.
pub struct BackupTaker {
    settings: ConnectionSettings,
    destination: OpenDestination,
    options: BackupOptions,
    clock: Arc<dyn Clock>,
    /// Whether nothing may be referred to.
    stores_anew: bool,
    /// Whether a server may be asked for what has changed alone.
    asks_for_increments: bool,
    /// Set where what increments are of could not be read.
    predecessor_failure: Arc<OnceLock<Kind>>,
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
            destination: destination.open(true, &clock)?,
            stores_anew: options.full,
            options,
            clock,
            asks_for_increments: true,
            predecessor_failure: Arc::default(),
        })
    }

    /// Takes a backup. `progress` hears how many bytes of about how many have come.
    ///
    /// A backup that fails, or is stopped, leaves nothing that looks like one.
    pub async fn run(
        mut self,
        progress: &(dyn Fn(u64, u64) + Sync),
        stop: watch::Receiver<bool>,
    ) -> Result<BackupRecord> {
        let mut outcome = self.attempt(progress, stop.clone()).await;
        let is_stopped = *stop.borrow();
        if let (Err(error), Some(kind), false) =
            (&outcome, self.predecessor_failure.get(), is_stopped)
        {
            self.asks_for_increments = false;
            self.stores_anew = increments::is_loss(*kind);
            let why = error.message();
            if self.stores_anew {
                tracing::error!("{why}; this backup begins again and stores everything anew");
            } else {
                tracing::warn!("{why}; this backup begins again and reads everything");
            }
            outcome = self.attempt(progress, stop).await;
        }
        self.destination.settle().await;
        outcome
    }

    async fn attempt(
        &mut self,
        progress: &(dyn Fn(u64, u64) + Sync),
        mut stop: watch::Receiver<bool>,
    ) -> Result<BackupRecord> {
        let prepared = tokio::select! {
            prepared = self.prepare() => prepared?,
            _ = stop.wait_for(|asked| *asked) => {
                return Err(Error::new(Kind::Failure, "stopped before the backup had begun"));
            }
        };
        let Prepared {
            base,
            facts,
            lineage,
            everywhere,
            repository,
        } = prepared;
        let earlier = tokio::select! {
            earlier = self.earlier_records(&repository) => earlier?,
            _ = stop.wait_for(|asked| *asked) => {
                return Err(Error::new(Kind::Failure, "stopped before the backup had begun"));
            }
        };
        let kept = repository.kept_manifests()?;
        let now = self.clock.now();
        let id = repository.announce_backup(now, earlier.each()).await?;
        let recipe = repository.backup_recipe().await?;
        let places = Places {
            everywhere: &everywhere,
            first: &repository,
        };
        let was_offered = AtomicBool::new(false);
        let to = Target {
            recipe: &recipe,
            id: &id,
            was_offered: &was_offered,
            earlier,
            kept: kept.clone(),
            lineage,
        };
        let taking = Box::pin(self.take(base, &facts, places, to, progress));
        let taken = tokio::select! {
            taken = taking => taken,
            asked = stop.wait_for(|asked| *asked) => match asked {
                Ok(_) => Err(Error::new(Kind::Failure, "stopped before the backup was complete")),
                Err(_) => Err(Error::new(Kind::Failure, "stopped")),
            },
        };
        match taken {
            Ok(record) => match commit(&repository, &record, &recipe).await {
                Ok(()) => {
                    if let Some(kept) = kept {
                        kept.forget_before(&id);
                    }
                    let spread = spread(&everywhere, &record, stop.clone()).await;
                    self.clean_up_before(&repository, &id, stop).await;
                    spread.map(|()| record)
                }
                Err(error) => Err(error),
            },
            Err(error) => {
                let was_offered = was_offered.into_inner();
                let discarded = repository.discard_backup(&id, was_offered, self.clock.now());
                match (discarded.await, kept) {
                    (Ok(true), Some(kept)) => kept.forget(&id),
                    (Ok(_), _) => {}
                    (Err(error), _) => {
                        tracing::warn!(
                            "what the failed backup had stored stays: {}",
                            chain(&error)
                        );
                    }
                }
                Err(error)
            }
        }
    }

    /// Meets the server and the repositories, and finds that the one belongs to what the others hold.
    async fn prepare(&mut self) -> Result<Prepared> {
        let mut base = server::connect_replication(&self.settings).await?;
        let facts = ServerFacts::read(&mut base).await?;
        facts.check()?;
        self.check_compression(&facts)?;
        // with several hosts, all that belongs to one backup must come from one server
        self.settings = self.settings.clone().pinned_to(&base);
        let identity = ServerIdentity {
            system_id: facts.system_id,
            major: facts.major,
            block_bytes: facts.block_bytes,
        };
        let new_system = self.options.new_system;
        let everywhere = self.destination.repository(identity, new_system).await?;
        // one place has it first, and the others are filled up from there
        let repository = everywhere.leader();
        repository.check_segment_size(facts.segment_size).await?;
        let mut tries = Tries::new();
        // one place may know what the first one does not
        let lineage = loop {
            match refuse_another_history(&self.settings, &everywhere, &facts, &*self.clock).await {
                Ok(lineage) => break lineage,
                Err(error) => {
                    let error = error.context("cannot compare the server with what is stored");
                    tries.again_after(error).await?;
                }
            }
        };
        Ok(Prepared {
            base,
            facts,
            lineage,
            everywhere,
            repository,
        })
    }

    /// Stores everything of a backup but the record that makes it exist.
    async fn take(
        &self,
        base: Connection,
        facts: &ServerFacts,
        places: Places<'_>,
        Target {
            recipe,
            id,
            was_offered,
            earlier: records,
            kept,
            lineage,
        }: Target<'_>,
        progress: &(dyn Fn(u64, u64) + Sync),
    ) -> Result<BackupRecord> {
        let repository = places.first;
        // closed where this is dropped, and what runs on other threads with it
        let (_taking, under_way) = watch::channel(());
        let to_ask = ToAsk {
            facts,
            lineage: &lineage,
            repository,
            records: &records,
            under_way,
        };
        let asked = self.ask(base, &to_ask).await?;
        let layout = if self.options.verify_checksums {
            None
        } else {
            pages::page_layout(&self.settings).await?
        };
        let needed = NeededWal::reserve(&self.settings, facts, id, &*self.clock).await?;
        let outside = self.what_lies_outside().await?;
        let started_at = self.start_moment().await?;
        let (stream, before) = self.begin(asked, &to_ask).await?;
        let (start_lsn, timeline) = (stream.start(), stream.timeline());
        let tablespaces = tablespace_records(&stream);
        tracing::info!("backup {id} begins at {start_lsn} on timeline {timeline}");

        let checks = layout.map(|layout| PageChecks::new(layout, start_lsn));
        let events = self.events(&stream)?;
        let outside_paths = outside.iter().map(|file| file.path.clone()).collect();
        let writer = Writer::new(events, recipe.clone(), id, before, checks, kept).with(outside);
        let begun = Begun {
            facts,
            repository,
            id,
            timeline,
            start_lsn,
            started_at,
            tablespaces,
            outside: outside_paths,
        };
        let received = match self.receive(stream, repository, writer, progress).await {
            Ok(received) => received,
            Err(Broken {
                error,
                packed: None,
            }) => return Err(error),
            Err(Broken {
                error,
                packed: Some(mut packed),
            }) => {
                let manifest = std::mem::take(&mut packed.manifest);
                let record = self.record(begun, packed, start_lsn, started_at);
                if self.is_worth_keeping(&error, repository) && record.bytes > 0 {
                    was_offered.store(true, Ordering::Relaxed);
                    keep_unfinished(repository, &record, manifest).await;
                }
                return Err(error);
            }
        };
        let Received {
            mut written,
            stop_lsn,
            stop_timeline,
        } = received;
        let manifest = Bytes::from(std::mem::take(&mut written.packed.manifest));
        store_manifest(repository, id, manifest, &written.packed.manifest_digest).await?;
        check_timeline(timeline, stop_timeline)?;
        written.check_identity(facts.system_id, start_lsn)?;
        if written.packed.shared_bytes > 0 {
            tracing::info!(
                "stored anew: {} bytes of {}; the rest is shared with earlier backups",
                written
                    .packed
                    .bytes
                    .saturating_sub(written.packed.shared_bytes),
                written.packed.bytes
            );
        }
        let suspects = std::mem::take(&mut written.suspects);
        let (damaged_page_count, damaged_pages) = match checks {
            Some(checks) => suspects.looked_at_again(&self.settings, checks).await?,
            None => (0, Vec::new()),
        };
        pages::say(damaged_page_count, &damaged_pages);
        let from_standby = written.label_origin() == Origin::Standby;
        let end = self.end(facts, &written, stop_lsn).await?;
        needed.receive(places, timeline, start_lsn, end.lsn).await?;
        needed.release().await;

        let record = BackupRecord {
            from_standby,
            damaged_page_count,
            damaged_pages,
            ..self.record(begun, written.packed, stop_lsn, end.time)
        };
        check_stays(repository, &record).await?;
        Ok(record)
    }

    /// Whether the next backup uses what this one has stored: it could not go on, and the next one may.
    fn is_worth_keeping(&self, error: &Error, repository: &Repository) -> bool {
        let is_cut = error.kind() == Kind::Unreachable;
        is_cut && !self.options.full && matches!(repository.can_read_back(), Ok(true))
    }

    /// Removes what failed backups have stored that nobody refers to, unless it is stopped: then the next
    /// backup does.
    async fn clean_up_before(
        &self,
        repository: &Repository,
        id: &BackupId,
        mut stop: watch::Receiver<bool>,
    ) {
        let removed = tokio::select! {
            removed = repository.remove_unfinished(id, self.clock.now()) => removed,
            Ok(_) = stop.wait_for(|asked| *asked) => return,
        };
        if let Err(error) = removed {
            tracing::warn!("what failed backups have stored stays: {}", chain(&error));
        }
    }

    fn record(
        &self,
        begun: Begun<'_>,
        packed: Packed,
        stop_lsn: Lsn,
        finished_at: Timestamp,
    ) -> BackupRecord {
        let Begun {
            facts, repository, ..
        } = begun;
        BackupRecord {
            format: FORMAT,
            id: begun.id.clone(),
            cluster: repository.cluster().to_string(),
            system_id: facts.system_id.to_string(),
            timeline: begun.timeline,
            start_lsn: begun.start_lsn,
            stop_lsn,
            started_at: begun.started_at,
            finished_at,
            label: self.options.label.clone(),
            postgres_version: facts.version.clone(),
            major: facts.major,
            segment_bytes: facts.segment_size.bytes(),
            files: packed.files,
            bytes: packed.bytes,
            stored_bytes: packed.stored_bytes,
            shared_packs: packed.shared_packs,
            tablespaces: begun.tablespaces,
            manifest_digest: packed.manifest_digest,
            from_standby: false,
            damaged_page_count: 0,
            damaged_pages: Vec::new(),
            outside: begun.outside,
            sealed: None,
            digest: None,
        }
    }

    /// The backups that the next one may refer to.
    async fn earlier_records(&self, repository: &Repository) -> Result<EarlierRecords> {
        if self.stores_anew {
            return Ok(EarlierRecords::default());
        }
        let mut tries = Tries::new();
        loop {
            match EarlierRecords::find(repository).await {
                Ok(found) => return Ok(found),
                Err(error) => tries.again_after(error.into()).await?,
            }
        }
    }

    /// Refuses compression that the server does not have.
    fn check_compression(&self, facts: &ServerFacts) -> Result<()> {
        if self.options.server_compression.is_none() || facts.major >= COMPRESSES_SINCE_MAJOR {
            return Ok(());
        }
        let what = format!(
            "no server compresses what it sends before PostgreSQL {COMPRESSES_SINCE_MAJOR}: found={}",
            facts.version
        );
        Err(Error::usage(what).hint("leave out --server-compression"))
    }

    /// What understands the server's messages.
    fn events(&self, stream: &BaseBackupStream) -> Result<Events> {
        let form = match stream.form() {
            BackupForm::Typed => Form::Typed,
            BackupForm::PerTablespace => Form::PerArchive,
        };
        let events = Events::new(form, announced(stream)).map_err(|error| refused(&error))?;
        Ok(match self.options.server_compression {
            Some(_) => events.zstd(),
            None => events,
        })
    }

    fn server_options(&self, kind: BackupKind) -> BaseBackupOptions {
        let mut options = BaseBackupOptions::new(self.backup_label());
        options.kind = kind;
        options.checkpoint = self.options.checkpoint;
        options.max_rate_kib = self.options.max_rate_kib;
        options.compression = self.options.server_compression;
        options.manifest_checksums = ManifestChecksums::Crc32c;
        options.verify_checksums = self.options.verify_checksums;
        options.progress = true;
        options
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

    /// Reads the backup to its end, with the writer on a thread of its own.
    async fn receive(
        &self,
        mut stream: BaseBackupStream,
        repository: &Repository,
        writer: Writer,
        progress: &(dyn Fn(u64, u64) + Sync),
    ) -> Result<Received, Broken> {
        let sizes = stream.tablespaces().iter().filter_map(|row| row.size_kib);
        let total: i64 = sizes.sum();
        let total = u64::try_from(total).unwrap_or(0).saturating_mul(1024);
        let (messages, to_write) = mpsc::channel::<Message>(QUEUED_MESSAGES);
        let (objects, to_upload) = mpsc::channel::<Object>(1);
        let writing = blocking(move || writer.run(to_write, &objects));
        let reading = async move {
            let mut done: u64 = 0;
            loop {
                let message = within(SILENCE_MAX, stream.next()).await;
                let message = message.map_err(|error| with_warnings(error, stream.warnings()))?;
                let message = match message {
                    BackupMessage::CopyOutBegins => Message::CopyBegins,
                    BackupMessage::CopyOutEnds => Message::CopyEnds,
                    BackupMessage::Data(bytes) => {
                        let came = u64::try_from(bytes.len()).unwrap_or(0);
                        done = match self.options.server_compression {
                            None => done.saturating_add(came),
                            // the server says how much that is
                            Some(_) => sent_bytes(&bytes).unwrap_or(done),
                        };
                        progress(done, total);
                        Message::Data(bytes)
                    }
                    BackupMessage::Finished { end, timeline } => {
                        let told = messages.send(Message::End).await;
                        return Ok::<_, Error>(told.ok().map(|()| (end, timeline)));
                    }
                };
                if messages.send(message).await.is_err() {
                    // the writer has failed, and says why
                    return Ok(None);
                }
            }
        };
        let (read, written, uploaded) =
            tokio::join!(reading, writing, upload(repository.clone(), to_upload));
        // the cause first: what fails stops the others, and they only say that they were stopped
        if let Err(error) = uploaded {
            let Err(cause) = read else {
                return Err(error.into());
            };
            // of what was left when the server was gone
            tracing::warn!("what was received last is not stored: {error}");
            return Err(cause.into());
        }
        match (read, written) {
            (Ok(Some((stop_lsn, stop_timeline))), Ok(Outcome::Whole(written))) => Ok(Received {
                written: *written,
                stop_lsn,
                stop_timeline,
            }),
            (Err(error), Ok(Outcome::Broken(packed))) => Err(Broken {
                error,
                packed: Some(packed),
            }),
            (Err(error), _) | (Ok(_), Err(error)) => Err(error.into()),
            (Ok(_), Ok(_)) => {
                Err(Error::failure("the backup's writer stopped before its end").into())
            }
        }
    }
}

/// A backup that has begun.
struct Begun<'a> {
    facts: &'a ServerFacts,
    repository: &'a Repository,
    id: &'a BackupId,
    timeline: TimelineId,
    start_lsn: Lsn,
    started_at: Timestamp,
    tablespaces: Vec<TablespaceRecord>,
    /// Files that are kept though they lie outside of the data directory.
    outside: Vec<String>,
}

/// A backup that broke off, and what was stored of it where the next one can use that.
struct Broken {
    error: Error,
    packed: Option<Packed>,
}

impl From<Error> for Broken {
    fn from(error: Error) -> Self {
        Self {
            error,
            packed: None,
        }
    }
}

async fn store_manifest(
    repository: &Repository,
    id: &BackupId,
    manifest: Bytes,
    digest: &str,
) -> Result<()> {
    let name = ObjectName::Manifest(id.clone());
    Ok(repository.create_object(&name, manifest, digest).await?)
}

/// Lets the next backup use what this one has stored.
async fn keep_unfinished(repository: &Repository, record: &BackupRecord, manifest: Vec<u8>) {
    let manifest = Bytes::from(manifest);
    let mut tries = Tries::new();
    loop {
        let kept = async {
            let digest = &record.manifest_digest;
            store_manifest(repository, &record.id, manifest.clone(), digest).await?;
            Ok::<_, Error>(repository.keep_unfinished(record).await?)
        };
        let Err(error) = kept.await else {
            return tracing::info!(
                "what was stored of it, {} files, is not stored again by the next backup",
                record.files
            );
        };
        if let Err(error) = tries.again_after(error).await {
            return tracing::warn!("the next backup cannot use what was stored: {error}");
        }
    }
}

/// What a backup is written to.
struct Target<'a> {
    recipe: &'a BackupRecipe,
    id: &'a BackupId,
    /// Whether the next backup may know of what it has stored, though it has failed.
    was_offered: &'a AtomicBool,
    /// The backups that it may refer to, which were announced.
    earlier: EarlierRecords,
    /// Where its manifest is kept too.
    kept: Option<KeptManifests>,
    /// What the server was found to be beside them.
    lineage: Lineage,
}

/// A backup whose files are stored, and which the server called good.
struct Received {
    written: Written,
    stop_lsn: Lsn,
    stop_timeline: TimelineId,
}

/// Looks whether all that the backup refers to is there, and stays.
async fn check_stays(repository: &Repository, record: &BackupRecord) -> Result<()> {
    let mut tries = Tries::new();
    while let Err(error) = repository.check_stays(record).await {
        if error.is_damage() {
            return Err(Error::from(error)
                .context("what an earlier backup had stored is gone")
                .hint("take the backup again: what is missing is stored anew"));
        }
        tries.again_after(error.into()).await?;
    }
    Ok(())
}

/// Makes the backup exist. What it refers to is never removed from here on: a write that was given
/// up may come to its end all the same.
async fn commit(
    repository: &Repository,
    record: &BackupRecord,
    recipe: &BackupRecipe,
) -> Result<()> {
    let mut tries = Tries::new();
    while let Err(error) = repository.commit_backup(record, recipe).await {
        let failed = tries.again_after(error.into()).await;
        failed.map_err(|error| match error.kind() {
            Kind::Unreachable => error
                .context("it is not known whether the backup is complete")
                .hint("once the repository answers, `anywhen list` shows whether it is there"),
            _ => error,
        })?;
    }
    Ok(())
}

/// Copies the backup to the cluster's other repositories.
async fn spread(
    everywhere: &Repository,
    record: &BackupRecord,
    mut stop: watch::Receiver<bool>,
) -> Result<()> {
    let stopped = async {
        if stop.wait_for(|asked| *asked).await.is_err() {
            std::future::pending::<()>().await;
        }
    };
    let id = &record.id;
    let spreading = async {
        // one that could not be copied, for a damaged object or a key, does not keep a place from
        // being whole
        everywhere.mend(true).await;
        everywhere.is_whole() && matches!(everywhere.has_everywhere(id).await, Ok(true))
    };
    let whole = tokio::select! {
        whole = spreading => whole,
        () = stopped => false,
    };
    if whole {
        return Ok(());
    }
    match everywhere.acknowledge() {
        Acknowledge::Any => {
            tracing::warn!(
                "backup {id} is complete in one repository, and not in all; a stream, or the next \
                 backup, fills up the others"
            );
            Ok(())
        }
        Acknowledge::All => Err(Error::new(
            Kind::Unreachable,
            format!("backup {id} is complete in one repository, and not in all"),
        )
        .hint(
            "it can be restored; a running stream, or the next backup, fills up the others. \
             acknowledge = \"any\" makes one repository enough",
        )),
    }
}

/// How much a server says that it has sent, before it compressed that (`basebackup_copy.c`).
fn sent_bytes(message: &[u8]) -> Option<u64> {
    let count = message.strip_prefix(b"p")?.try_into().ok()?;
    u64::try_from(i64::from_be_bytes(count)).ok()
}

/// The server's next message, if it comes in time.
async fn within<T>(
    silence_max: Duration,
    next: impl Future<Output = Result<T, BaseBackupError>>,
) -> Result<T> {
    match tokio::time::timeout(silence_max, next).await {
        Ok(message) => message.map_err(|error| base_backup_error(&error)),
        Err(_elapsed) => Err(Error::new(
            Kind::Unreachable,
            format!(
                "the server went silent in the middle of the backup: seconds={}",
                silence_max.as_secs()
            ),
        )
        .hint("check the server's log and the network, and take the backup again")),
    }
}

/// Refuses a backup whose WAL lies on two timelines: restores are planned on one.
fn check_timeline(start: TimelineId, end: TimelineId) -> Result<()> {
    if start == end {
        return Ok(());
    }
    Err(Error::failure(format!(
        "the timeline changed during the backup: start={start}, end={end}"
    ))
    .hint(
        "take it again; if that happens again, the standby has no restart point on the new \
         timeline yet: CHECKPOINT; on the primary first",
    ))
}

async fn upload(repository: Repository, mut objects: mpsc::Receiver<Object>) -> Result<()> {
    let store = async |object: Object| {
        let Object {
            name,
            bytes,
            digest,
        } = object;
        repository
            .create_object(&name, Bytes::from(bytes), &digest)
            .await
    };
    let mut under_way = FuturesUnordered::new();
    loop {
        tokio::select! {
            object = objects.recv(), if under_way.len() < UPLOADS => match object {
                Some(object) => under_way.push(store(object)),
                None => break,
            },
            Some(stored) = under_way.next() => stored?,
        }
    }
    while let Some(stored) = under_way.next().await {
        stored?;
    }
    Ok(())
}

/// An error that comes at the end of a backup says how many pages are damaged, and warnings before it which.
fn with_warnings(error: Error, warnings: &[ServerError]) -> Error {
    const SHOWN_MAX: usize = 20;
    if error.kind() != Kind::Damaged || warnings.is_empty() {
        return error;
    }
    let shown: Vec<&str> = warnings
        .iter()
        .take(SHOWN_MAX)
        .map(|warning| warning.message.as_str())
        .collect();
    let more = if warnings.len() > SHOWN_MAX {
        "; …"
    } else {
        ""
    };
    error.context(format!("the server found: {}{more}", shown.join("; ")))
}

fn announced(stream: &BaseBackupStream) -> Vec<basebackup::stream::Tablespace> {
    let rows = stream.tablespaces().iter();
    rows.map(|row| basebackup::stream::Tablespace {
        oid: row.oid,
        location: row.location.clone(),
        size_kib: row.size_kib,
    })
    .collect()
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
            "the server's data files are damaged; an older backup and the WAL since can restore them. \
             --no-verify-checksums takes a backup all the same, which names the damaged pages",
        ),
        Some("42501") => {
            Error::usage(message).hint("as a superuser: ALTER ROLE <role> REPLICATION;")
        }
        // of our options a server refuses none but this (`backup/basebackup.c`, `parse_basebackup_options`)
        Some("42601") => Error::usage(message)
            .hint("a server that was built without zstd cannot compress: leave out --server-compression"),
        _ if error.is_transient() => Error::new(Kind::Unreachable, message),
        _ => Error::failure(message),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_a_backup_whose_timeline_changed() {
        // it would be listed on the first timeline, whose WAL ends before the backup does
        let timeline = |id| TimelineId::new(id).unwrap();
        check_timeline(timeline(2), timeline(2)).unwrap();
        let error = check_timeline(timeline(1), timeline(2)).unwrap_err();
        assert_eq!(
            error.message(),
            "the timeline changed during the backup: start=1, end=2"
        );
        assert_eq!(error.kind(), Kind::Failure);
    }

    #[tokio::test]
    async fn a_server_that_goes_silent_ends_the_backup() {
        // else a connection that died without a word would hold up every later backup
        let silent = std::future::pending::<Result<(), BaseBackupError>>();
        let error = within(Duration::from_millis(1), silent).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Unreachable);
        assert!(error.message().contains("silent"), "{error}");
        within(SILENCE_MAX, async { Ok(()) }).await.unwrap();
    }
}
