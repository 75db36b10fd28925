//! Backups of which the server sends only what has changed since an earlier one: asking for it, and the
//! `backup_manifest` and `backup_label` of the full backup that is put together.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use basebackup::{
    BackupLabel, ControlFile, FileSum, Fork, Manifest, RelationFile, RelativePath, incremental,
};
use replication::base_backup::{BackupKind, BaseBackupError, BaseBackupStream};
use replication::connection::Connection;
use tokio::sync::watch;

use super::earlier::EarlierRecords;
use super::pages::{block_layout, has_checksums};
use super::rebuilding::{
    Known, OpenIncrement, Predecessor, RebuiltFile, Sums, read_extent, refused,
};
use super::summaries::{self, RelationSegment};
use super::tries::Tries;
use super::writer::{Before, entry};
use super::{BackupTaker, base_backup_error};
use crate::error::{Error, Kind, Result, chain};
use crate::receive::comparison::Lineage;
use crate::repository::records::BackupRecord;
use crate::repository::sharing::{EarlierBackup, EarlierExtent};
use crate::repository::{PLAIN_BYTES_MAX, Repository};
use crate::server::{self, ServerFacts};

/// The first major that sends increments.
const SINCE_MAJOR: u32 = 17;
/// The version of `backup_manifest` that can be uploaded, the first with a system identifier.
const UPLOADED_VERSION: u32 = 2;

/// What helps where summaries are gone.
const KEEP_TIME: &str = "summaries of WAL are kept for wal_summary_keep_time, which has to be longer than the \
                         time between two backups";

/// A server that is about to begin a backup, and what was stored before.
pub(super) struct Asked {
    base: Connection,
    before: Before,
}

impl BackupTaker {
    /// Reads what earlier backups have stored, and asks the server for what has changed since the newest where
    /// it can send that.
    pub(super) async fn ask(&self, base: Connection, to_ask: &ToAsk<'_>) -> Result<Asked> {
        let ToAsk {
            repository,
            records,
            ..
        } = *to_ask;
        let Some((record, earlier)) = records.read_newest(repository).await? else {
            let earlier = records.with_unfinished(None, repository).await?;
            return Ok(Asked {
                base,
                before: Before::of(earlier),
            });
        };
        let earlier = Arc::new(earlier);
        let offer = Offer {
            taker: self,
            to_ask,
            record,
            earlier: &earlier,
        };
        let (base, known) = match offer.make(base).await? {
            Offered::Taken(base, predecessor) => {
                let before = Before {
                    earlier: Some(earlier),
                    predecessor: Some(predecessor),
                };
                return Ok(Asked { base, before });
            }
            Offered::Not(base) => (base, Arc::into_inner(earlier)),
            Offered::Damaged(base) => (base, None),
        };
        let earlier = records.with_unfinished(known, repository).await?;
        Ok(Asked {
            base,
            before: Before::of(earlier),
        })
    }

    /// Begins the backup that was asked for, or one of everything where the server cannot send what has
    /// changed: then without a predecessor.
    pub(super) async fn begin(
        &self,
        asked: Asked,
        to_ask: &ToAsk<'_>,
    ) -> Result<(BaseBackupStream, Before)> {
        let Asked {
            mut base,
            mut before,
        } = asked;
        loop {
            tracing::info!("waiting for a checkpoint");
            let kind = match before.predecessor {
                Some(_) => BackupKind::Increment,
                None => BackupKind::Full,
            };
            let predecessor = before.predecessor.take();
            let why = match (
                base.base_backup(self.server_options(kind)).await,
                predecessor,
            ) {
                (Ok(stream), None) => return Ok((stream, before)),
                (Ok(stream), Some(predecessor)) => {
                    match self.why_too_little(&stream, &predecessor, to_ask).await? {
                        None => {
                            before.predecessor = Some(predecessor);
                            return Ok((stream, before));
                        }
                        Some(why) => why,
                    }
                }
                (Err(error), Some(_)) if is_refusal(&error) => {
                    format!("{}. hint: {KEEP_TIME}", chain(&error))
                }
                (Err(error), _) => return Err(base_backup_error(&error)),
            };
            tracing::info!(
                "the server reads and sends everything, not what has changed since the earlier backup: {why}"
            );
            let known = before.earlier.take().and_then(Arc::into_inner);
            let (records, repository) = (to_ask.records, to_ask.repository);
            before = Before::of(records.with_unfinished(known, repository).await?);
            base = self.connect_again().await?;
        }
    }

    /// Why the increments that are about to come say too little; `None` where they do not.
    async fn why_too_little(
        &self,
        stream: &BaseBackupStream,
        predecessor: &Predecessor,
        to_ask: &ToAsk<'_>,
    ) -> Result<Option<String>> {
        if stream.timeline() != to_ask.lineage.timeline() {
            return Ok(Some("the server was promoted meanwhile".to_owned()));
        }
        let mut sql = server::connect_sql(&self.settings).await?;
        let (since, layout) = (predecessor.from().lsn, predecessor.layout());
        // the server has every summary up to its start now
        let cut = summaries::cut_segments(&mut sql, since, Some(stream.start()), layout).await;
        Ok(match cut {
            Err(error) => Some(chain(&error)),
            Ok(cut) => predecessor
                .has_any_of(&cut)
                .map(|path| format!("{path} was cut while the backup began")),
        })
    }

    /// The server may not have noticed yet that the connection before was given up.
    async fn connect_again(&self) -> Result<Connection> {
        let mut tries = Tries::new();
        loop {
            match server::connect_replication(&self.settings).await {
                Ok(connection) => return Ok(connection),
                Err(error) => tries.again_after(error).await?,
            }
        }
    }
}

/// What it takes to ask a server for what has changed.
pub(super) struct ToAsk<'a> {
    pub(super) facts: &'a ServerFacts,
    pub(super) lineage: &'a Lineage,
    pub(super) repository: &'a Repository,
    pub(super) records: &'a EarlierRecords,
    /// Closed once nobody takes the backup any more.
    pub(super) under_way: watch::Receiver<()>,
}

/// What became of an offer.
enum Offered {
    /// The server is to send increments.
    Taken(Connection, Arc<Predecessor>),
    /// It is to send everything, which was said.
    Not(Connection),
    /// The same; and what the earlier backup has stored is damaged, so that nothing may refer to it.
    Damaged(Connection),
}

/// Offers a server an earlier backup to send increments of.
struct Offer<'a> {
    taker: &'a BackupTaker,
    to_ask: &'a ToAsk<'a>,
    record: &'a BackupRecord,
    earlier: &'a Arc<EarlierBackup>,
}

impl Offer<'_> {
    async fn make(&self, base: Connection) -> Result<Offered> {
        if self.to_ask.facts.major < SINCE_MAJOR {
            return Ok(Offered::Not(base));
        }
        let (text, predecessor) = match self.find().await {
            Ok(found) => found,
            Err(WhyNot::Said(why)) => {
                self.say(&why);
                return Ok(Offered::Not(base));
            }
            Err(WhyNot::Lost(error)) => {
                say_loss(self.record.id.as_str(), &error);
                return Ok(Offered::Damaged(base));
            }
            Err(WhyNot::Unreachable(error)) => return Err(error),
        };
        match upload(base, &text).await {
            Ok(base) => {
                tracing::info!(
                    "the server is asked for what has changed since backup {}",
                    self.record.id
                );
                Ok(Offered::Taken(base, Arc::new(predecessor)))
            }
            Err(error) if is_refusal(&error) => {
                self.say(&chain(&error));
                let base = self.taker.connect_again().await?;
                Ok(Offered::Not(base))
            }
            Err(error) => Err(base_backup_error(&error)),
        }
    }

    fn say(&self, why: &str) {
        tracing::info!(
            "the server reads and sends everything, not what has changed since backup {}: {why}",
            self.record.id
        );
    }

    /// The earlier backup as one that increments can be of, and the manifest to upload.
    async fn find(&self) -> Result<(Vec<u8>, Predecessor), WhyNot> {
        let taker = self.taker;
        if !taker.asks_for_increments {
            return Err(WhyNot::said("that has failed"));
        }
        if !taker.options.verify_checksums {
            let why = "where the server does not check pages, all of them are looked at here";
            return Err(WhyNot::said(why));
        }
        if self.record.damaged_page_count > 0 {
            return Err(WhyNot::said("that one has damaged pages"));
        }
        let mut sql = server::connect_sql(&taker.settings).await?;
        self.check_summaries(&mut sql).await?;
        let manifest = self.file("backup_manifest").await?;
        let control = self.file("global/pg_control").await?;
        if has_checksums(&mut sql).await?
            && !ControlFile::parse(&control).is_ok_and(|it| it.data_checksum_version > 0)
        {
            let why = "its pages have no checksums, and the server's have";
            return Err(WhyNot::said(why));
        }
        self.predecessor(&manifest, &mut sql).await
    }

    /// The server makes summaries of WAL, and surely wrote that of the earlier backup.
    async fn check_summaries(&self, sql: &mut Connection) -> Result<(), WhyNot> {
        let failed = |error| server::query_error("read whether WAL is summarized", &error);
        if !summaries::are_made(sql).await.map_err(failed)? {
            return Err(WhyNot::said(
                "summarize_wal is off. hint: ALTER SYSTEM SET summarize_wal = on; SELECT \
                 pg_reload_conf();",
            ));
        }
        // what the backup holds may have any WAL up to its stop behind it
        let (timeline, stop) = (self.record.timeline, self.record.stop_lsn);
        if !self.to_ask.lineage.has_written(timeline, stop) {
            return Err(WhyNot::Said(format!(
                "it cannot be told whether this server wrote the WAL of that backup, up to {stop} on timeline \
                 {timeline}: what is stored does not lead from there, without a hole, to what the server \
                 still has. hint: let `anywhen stream` run, or raise wal_keep_size"
            )));
        }
        Ok(())
    }

    /// A file of the earlier backup.
    async fn file(&self, path: &str) -> Result<Vec<u8>, WhyNot> {
        let mut content = Vec::new();
        let extents = self.earlier.file(path.as_bytes()).unwrap_or_default();
        for extent in extents.iter() {
            let EarlierExtent::Stored(stored) = extent else {
                return Err(WhyNot::Said(format!("its {path} cannot be referred to")));
            };
            match read_extent(self.to_ask.repository, self.earlier, stored).await {
                Ok(plain) => content.extend(plain),
                Err(error) if is_loss(error.kind()) => return Err(WhyNot::Lost(error)),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(content)
    }

    async fn predecessor(
        &self,
        manifest: &[u8],
        sql: &mut Connection,
    ) -> Result<(Vec<u8>, Predecessor), WhyNot> {
        let failed = |error| server::query_error("read what was cut off of relations", &error);
        let layout = block_layout(sql).await?;
        let since = self.record.start_lsn;
        let cut = summaries::cut_segments(sql, since, None, layout).await;
        let cut = cut.map_err(failed)?;
        let manifest = Manifest::parse(manifest, PLAIN_BYTES_MAX);
        let mut manifest = manifest.map_err(|error| WhyNot::Said(chain(&error)))?;
        if manifest.version != UPLOADED_VERSION
            || manifest.system_id != Some(self.to_ask.facts.system_id)
        {
            return Err(WhyNot::Said(format!(
                "its backup_manifest is not one to upload: version={}, system_id={:?}",
                manifest.version, manifest.system_id
            )));
        }
        // what the server does not find there it sends whole
        manifest.files.retain(|file| {
            let is_cut = RelationSegment::of(&file.path).is_some_and(|it| cut.contains(&it));
            !is_cut && !is_visibility_map(&file.path)
        });
        let text = manifest.write();
        let known = Known {
            repository: self.to_ask.repository.clone(),
            earlier: Arc::clone(self.earlier),
            layout,
            failure: Arc::clone(&self.taker.predecessor_failure),
            under_way: self.to_ask.under_way.clone(),
        };
        let predecessor = Predecessor::new(known, self.record, manifest);
        Ok((text, predecessor.map_err(WhyNot::Said)?))
    }
}

/// Why a server is not asked for increments.
enum WhyNot {
    /// It is to send everything, for this reason.
    Said(String),
    /// What the earlier backup has stored is lost.
    Lost(Error),
    /// A server or a repository does not answer, and no backup can be taken.
    Unreachable(Error),
}

impl WhyNot {
    fn said(why: &str) -> Self {
        Self::Said(why.to_owned())
    }
}

impl From<Error> for WhyNot {
    fn from(error: Error) -> Self {
        match error.kind() {
            Kind::Unreachable => Self::Unreachable(error),
            _ => Self::Said(error.message().to_owned()),
        }
    }
}

/// Bits of a visibility map are cleared by WAL that does not name its blocks, on older minor releases
/// (`access/heap/heapam.c` registers the rows' blocks alone), and what such servers have summarized stays for
/// days: an increment may leave bits set that are not.
fn is_visibility_map(path: &RelativePath) -> bool {
    RelationFile::of(path).is_some_and(|file| file.fork == Fork::Visibility)
}

/// Whether what failed in this way is lost where it was stored.
pub(super) fn is_loss(kind: Kind) -> bool {
    matches!(kind, Kind::Damaged | Kind::NotFound)
}

fn say_loss(id: &str, error: &Error) {
    tracing::error!(
        "what backup {id} has stored is damaged, and this backup stores everything anew: {}. hint: look at \
         that backup with `anywhen restore --backup {id} --dry-run`, and keep others",
        error.message()
    );
}

async fn upload(base: Connection, manifest: &[u8]) -> Result<Connection, BaseBackupError> {
    let mut uploading = base.upload_manifest().await?;
    uploading.send(manifest).await?;
    uploading.finish().await?;
    uploading.into_connection().ok_or(BaseBackupError::Ended)
}

/// Whether the server answered, and does not want to: all of it can be asked for then.
fn is_refusal(error: &BaseBackupError) -> bool {
    error.sqlstate().is_some() && !error.is_transient()
}

/// What the increments of a backup have come to.
pub(super) struct Increments {
    predecessor: Arc<Predecessor>,
    /// By the path that each arrived under: what it is called now, and its sum.
    rebuilt: BTreeMap<RelativePath, (RelativePath, FileSum)>,
    /// How many bytes the server has sent of increments, and of how many in the files of them.
    sent_bytes: u64,
    of_bytes: u64,
}

impl Increments {
    pub(super) fn new(predecessor: Arc<Predecessor>) -> Self {
        Self {
            predecessor,
            rebuilt: BTreeMap::new(),
            sent_bytes: 0,
            of_bytes: 0,
        }
    }

    /// The increment that comes under this path; `None` if it is none.
    pub(super) fn open(
        &mut self,
        arrived: &RelativePath,
        arriving_bytes: u64,
        (mode, mtime): (u32, i64),
    ) -> Result<Option<OpenIncrement>> {
        let Some(path) = incremental::plain_name(arrived) else {
            return Ok(None);
        };
        let entry = entry(&path, mode, mtime);
        self.sent_bytes = self.sent_bytes.saturating_add(arriving_bytes);
        let arriving = (arrived.clone(), arriving_bytes);
        self.predecessor.open(arriving, (path, entry)).map(Some)
    }

    /// The backup that they are of.
    pub(super) fn predecessor(&self) -> Arc<Predecessor> {
        Arc::clone(&self.predecessor)
    }

    /// The `backup_label` of the full backup; the server's has to be one of an increment to the predecessor.
    pub(super) fn label(&self, arrived: &[u8]) -> Result<Vec<u8>> {
        let label = BackupLabel::parse(arrived).map_err(|error| refused(&chain(&error)))?;
        let expected = self.predecessor.from();
        if label.incremental != Some(expected) {
            return Err(refused(&format!(
                "its backup_label is of other increments: expected={expected:?}, found={:?}",
                label.incremental
            )));
        }
        BackupLabel::without_increment(arrived).map_err(|error| refused(&chain(&error)))
    }

    /// A file has another sum than what arrived under its name.
    pub(super) fn changed(&mut self, path: &RelativePath, sum: FileSum) {
        self.rebuilt.insert(path.clone(), (path.clone(), sum));
    }

    /// A file is put together.
    pub(super) fn rebuilt(&mut self, file: RebuiltFile, sums: &[(u64, Sums)]) {
        let sum = file.sum(sums);
        self.of_bytes = self.of_bytes.saturating_add(sum.size);
        self.rebuilt.insert(file.arrived, (file.path, sum));
    }

    /// The `backup_manifest` of what was put together, from the server's of what it sent.
    pub(super) fn manifest(&self, mut sent: Manifest) -> Result<Vec<u8>> {
        for file in &mut sent.files {
            if let Some((path, sum)) = self.rebuilt.get(&file.path) {
                file.path = path.clone();
                file.sum = sum.clone();
            }
        }
        let mut paths = HashSet::new();
        if let Some(twice) = sent.files.iter().find(|file| !paths.insert(&file.path)) {
            return Err(refused(&format!("{} came twice", twice.path)));
        }
        tracing::info!(
            "put together from {} increments: the server sent {} bytes of {}",
            self.rebuilt.len().saturating_sub(1),
            self.sent_bytes,
            self.of_bytes
        );
        Ok(sent.write())
    }
}
