//! The writer of a backup: messages in, packs and a manifest out. Runs on a thread of its own, since it
//! hashes and encrypts; others hash and compress for it.

use std::collections::BTreeMap;
use std::sync::Arc;

use basebackup::label::Origin;
use basebackup::stream::{Event, Events};
use basebackup::{
    Algorithm, BackupLabel, ControlFile, FileChecker, FileSum, Ledger, Manifest, RelativePath,
    TarEvent, TarParser,
};
use bytes::Bytes;
use container::{CompressedFrame, Encoder};
use jiff::Timestamp;
use tokio::sync::mpsc;
use wal::Lsn;

use super::extents::{EXTENT_BYTES, Extents, Made, Next, NextExtent};
use super::increments::Increments;
use super::inflating::Inflater;
use super::outside::OutsideFile;
use super::pages::{PageChecks, Pages, Suspects};
use super::rebuilding::{ClosedIncrement, OpenIncrement, Predecessor, RebuiltFile, Stretch, Sums};
use crate::error::{Error, Kind, Result, chain};
use crate::repository::kept_manifests::KeptManifests;
use crate::repository::layout::{BackupId, ObjectName};
use crate::repository::manifest::{FILE_LIST_BYTES, FileList, ManifestText};
use crate::repository::records::{Extent, ManifestEntry, ManifestLine, ManifestPath};
use crate::repository::sharing::{EarlierBackup, EarlierExtent, SharedPacks, StoredExtent};
use crate::repository::{BackupRecipe, PLAIN_BYTES_MAX};

/// A pack is closed once it holds so many stored bytes.
const PACK_BYTES: u64 = 32 << 20;
/// Of files whose own mode is not known: nobody but their owner may read them.
const OUTSIDE_MODE: u32 = 0o600;
/// Files whose content is read besides being stored are no larger.
const KEPT_FILE_BYTES_MAX: u64 = 64 << 10;
/// The checksum that the server is asked for, which is its default.
const FILE_CHECKSUM: Algorithm = Algorithm::Crc32c;

/// What the writer is fed with.
pub(super) enum Message {
    CopyBegins,
    Data(Bytes),
    CopyEnds,
    /// All of it has come.
    End,
}

/// What the writer has come to.
pub(super) enum Outcome {
    /// Everything came.
    Whole(Box<Written>),
    /// It broke off; this was stored of it.
    Broken(Packed),
}

/// An object that is ready to be stored.
pub(super) struct Object {
    pub(super) name: ObjectName,
    pub(super) bytes: Vec<u8>,
    pub(super) digest: String,
}

/// What was stored.
pub(super) struct Packed {
    pub(super) files: u64,
    pub(super) bytes: u64,
    pub(super) stored_bytes: u64,
    /// Of the bytes, how many an earlier backup had stored, and the packs of others that hold them.
    pub(super) shared_bytes: u64,
    pub(super) shared_packs: Vec<SharedPacks>,
    /// The encoded manifest object.
    pub(super) manifest: Vec<u8>,
    pub(super) manifest_digest: String,
}

/// What was written, when all of it has come.
pub(super) struct Written {
    pub(super) packed: Packed,
    /// Pages that looked damaged.
    pub(super) suspects: Suspects,
    label: BackupLabel,
    control: ControlFile,
}

impl Written {
    /// Whether the files are those of the server and the backup that were asked for.
    pub(super) fn check_identity(&self, system_id: u64, start_lsn: Lsn) -> Result<()> {
        if self.control.system_id != system_id {
            return Err(Error::damaged(format!(
                "the backup's pg_control is of another system: expected={system_id}, found={}",
                self.control.system_id
            )));
        }
        if self.label.start_lsn != start_lsn {
            return Err(Error::damaged(format!(
                "the backup_label begins elsewhere than the backup: expected={start_lsn}, found={}",
                self.label.start_lsn
            )));
        }
        Ok(())
    }

    /// A moment that no commit before the backup's checkpoint is stamped after. The checkpoint's
    /// own, in whole seconds, is read before its redo position (`xlog.c`, `CreateCheckPoint`).
    pub(super) fn after_checkpoint(&self) -> Timestamp {
        let second = self.control.checkpoint.time.saturating_add(1);
        Timestamp::from_second(second).unwrap_or(Timestamp::MAX)
    }

    /// Whether a primary or a standby was backed up.
    pub(super) fn label_origin(&self) -> Origin {
        self.label.from
    }
}

/// The file that is passing.
struct OpenFile {
    path: RelativePath,
    entry: ManifestEntry,
    size: u64,
    checker: FileChecker,
    /// What has come of the extent at hand.
    pending: Vec<u8>,
    /// How many extents of it have come before.
    nth: usize,
    /// What an earlier backup has stored of it.
    earlier: Option<Arc<[EarlierExtent]>>,
    /// Its pages, where they are checked.
    pages: Option<Pages>,
    /// The content, of those files that are read too.
    kept: Option<Vec<u8>>,
}

struct OpenPack {
    /// In the manifest.
    number: u32,
    /// Among the backup's packs.
    nth: u32,
    encoder: Encoder,
    object: Vec<u8>,
}

impl OpenFile {
    /// The pages of the next extent, where they are checked.
    fn next_pages(&self) -> Option<Pages> {
        let before = self.nth.checked_mul(EXTENT_BYTES)?;
        self.pages?.behind(u64::try_from(before).ok()?)
    }

    /// What an earlier backup has in the place of the next extent.
    fn next_earlier(&mut self) -> Option<StoredExtent> {
        let nth = self.nth;
        self.nth = nth.saturating_add(1);
        self.earlier.as_ref()?.get(nth)?.stored()
    }
}

/// What was stored before.
pub(super) struct Before {
    /// What may be referred to.
    pub(super) earlier: Option<Arc<EarlierBackup>>,
    /// What the server's increments are of, where it sends such.
    pub(super) predecessor: Option<Arc<Predecessor>>,
}

impl Before {
    /// Where the server sends everything.
    pub(super) fn of(earlier: Option<EarlierBackup>) -> Self {
        Self {
            earlier: earlier.map(Arc::new),
            predecessor: None,
        }
    }
}

/// Turns a backup's messages into packs and a manifest.
pub(super) struct Writer {
    events: Events,
    /// Of an archive that the server compresses.
    inflater: Option<Inflater>,
    tar: TarParser,
    tablespace: Option<u32>,
    file: Option<OpenFile>,
    increment: Option<OpenIncrement>,
    extents: Extents,
    /// Those of the first file that has not ended on its way to the packs.
    packed: Vec<Extent>,
    /// Of those that were put together from increments: where in the file they are, and their checksums.
    sums: Vec<(u64, Sums)>,
    backup_manifest: Vec<u8>,
    ledger: Ledger,
    recipe: BackupRecipe,
    backup: BackupId,
    pack: Option<OpenPack>,
    next_pack: u32,
    /// How many packs the manifest names.
    numbers: u32,
    earlier: Option<Arc<EarlierBackup>>,
    /// Where the server sends only what has changed.
    increments: Option<Increments>,
    /// Those of the earlier backup's packs that are referred to, with their numbers in the manifest.
    shared: BTreeMap<u32, u32>,
    shared_bytes: u64,
    manifest: ManifestText,
    /// Where the manifest is kept too.
    kept: Option<KeptManifests>,
    /// Files that lie outside of the data directory.
    outside: Vec<OutsideFile>,
    checks: Option<PageChecks>,
    /// The pages that look damaged of the first file that has not ended on its way to the packs.
    bad: Vec<u32>,
    suspects: Suspects,
    files: u64,
    bytes: u64,
    stored_bytes: u64,
    label: Option<Vec<u8>>,
    control: Option<Vec<u8>>,
}

impl Writer {
    pub(super) fn new(
        events: Events,
        recipe: BackupRecipe,
        id: &BackupId,
        before: Before,
        checks: Option<PageChecks>,
        kept: Option<KeptManifests>,
    ) -> Self {
        Self {
            events,
            inflater: None,
            tar: TarParser::new(),
            tablespace: None,
            file: None,
            increment: None,
            extents: Extents::new(recipe.clone()),
            packed: Vec::new(),
            sums: Vec::new(),
            backup_manifest: Vec::new(),
            ledger: Ledger::new(),
            recipe,
            backup: id.clone(),
            pack: None,
            next_pack: 0,
            numbers: 0,
            earlier: before.earlier,
            increments: before.predecessor.map(Increments::new),
            shared: BTreeMap::new(),
            shared_bytes: 0,
            manifest: ManifestText::new(id, FILE_LIST_BYTES),
            kept,
            outside: Vec::new(),
            checks,
            bad: Vec::new(),
            suspects: Suspects::default(),
            files: 0,
            bytes: 0,
            stored_bytes: 0,
            label: None,
            control: None,
        }
    }

    /// Stores files that lie outside of the data directory too.
    pub(super) fn with(mut self, outside: Vec<OutsideFile>) -> Self {
        self.outside = outside;
        self
    }

    /// Takes messages until there are no more; then everything must have come.
    pub(super) fn run(
        self,
        messages: mpsc::Receiver<Message>,
        objects: &mpsc::Sender<Object>,
    ) -> Result<Outcome> {
        let predecessor = self.increments.as_ref().map(Increments::predecessor);
        let outcome = self.take_all(messages, objects);
        if let (Err(error), Some(predecessor)) = (&outcome, predecessor)
            && error.kind() == Kind::Damaged
        {
            predecessor.give_up();
        }
        outcome
    }

    fn take_all(
        mut self,
        mut messages: mpsc::Receiver<Message>,
        objects: &mpsc::Sender<Object>,
    ) -> Result<Outcome> {
        let mut is_whole = false;
        while let Some(message) = messages.blocking_recv() {
            match message {
                Message::CopyBegins => {
                    let event = self
                        .events
                        .copy_out_begins()
                        .map_err(|error| refused(&error))?;
                    event.map_or(Ok(()), |event| self.event(event, objects))?;
                }
                Message::Data(bytes) => {
                    let events = self
                        .events
                        .copy_data(&bytes)
                        .map_err(|error| refused(&error))?;
                    for event in events {
                        self.event(event, objects)?;
                    }
                }
                Message::CopyEnds => {
                    let event = self
                        .events
                        .copy_out_ends()
                        .map_err(|error| refused(&error))?;
                    event.map_or(Ok(()), |event| self.event(event, objects))?;
                }
                Message::End => is_whole = true,
            }
        }
        if is_whole {
            let written = self.finish(objects)?;
            return Ok(Outcome::Whole(Box::new(written)));
        }
        self.break_off(objects)?;
        self.store_the_rest(objects).map(Outcome::Broken)
    }

    /// Of the file at hand, what has come in whole extents can be referred to.
    fn break_off(&mut self, objects: &mpsc::Sender<Object>) -> Result<()> {
        self.pack(true, objects)?;
        let extents = std::mem::take(&mut self.packed);
        let Some(OpenFile { entry, .. }) = self.file.take().filter(|_| !extents.is_empty()) else {
            return Ok(());
        };
        let line = ManifestLine::File {
            entry,
            size: packed_bytes(&extents),
            extents,
        };
        self.file_line(&line, objects)
    }

    fn event(&mut self, event: Event<'_>, objects: &mpsc::Sender<Object>) -> Result<()> {
        match event {
            Event::ArchiveBegins { tablespace } => {
                self.tablespace = tablespace.oid;
                self.tar = TarParser::new();
                if self.events.is_zstd() {
                    self.inflater = Some(Inflater::new().map_err(|error| refused(&error))?);
                }
            }
            Event::Data(mut bytes) => {
                let Some(mut inflater) = self.inflater.take() else {
                    return self.archive_data(bytes, objects);
                };
                while let Some(plain) =
                    inflater.next(&mut bytes).map_err(|error| refused(&error))?
                {
                    self.archive_data(plain, objects)?;
                }
                self.inflater = Some(inflater);
            }
            Event::ArchiveEnds => {
                if let Some(inflater) = self.inflater.take() {
                    inflater.finish().map_err(|error| refused(&error))?;
                }
                let tar = std::mem::take(&mut self.tar);
                tar.finish().map_err(|error| refused(&error))?;
            }
            Event::ManifestData(bytes) => {
                let with_these = length(&self.backup_manifest).saturating_add(length(bytes));
                check_readable("the server's backup_manifest", with_these)?;
                self.backup_manifest.extend_from_slice(bytes);
            }
            Event::ManifestBegins | Event::ManifestEnds | Event::Progress(_) => {}
        }
        Ok(())
    }

    fn archive_data(&mut self, mut bytes: &[u8], objects: &mpsc::Sender<Object>) -> Result<()> {
        while let Some(event) = self
            .tar
            .next_event(&mut bytes)
            .map_err(|error| refused(&error))?
        {
            self.member(event, objects)?;
        }
        Ok(())
    }

    fn member(&mut self, event: TarEvent<'_>, objects: &mpsc::Sender<Object>) -> Result<()> {
        match event {
            TarEvent::File {
                path,
                size,
                mode,
                mtime,
            } => {
                let path = self.in_data_directory(path);
                let mtime = i64::try_from(mtime).unwrap_or(i64::MAX);
                if let Some(increments) = &mut self.increments {
                    self.increment = increments.open(&path, size, (mode, mtime))?;
                }
                if self.increment.is_none() {
                    self.open_file(path, size, mode, mtime);
                }
                Ok(())
            }
            TarEvent::FileData(bytes) => match self.increment.take() {
                Some(increment) => self.increment_data(increment, bytes, objects),
                None => self.file_data(bytes, objects),
            },
            TarEvent::FileEnd => match self.increment.take() {
                Some(increment) => self.close_increment(increment, objects),
                None => self.close_file(objects),
            },
            TarEvent::Directory { path, mode } => {
                let path = self.in_data_directory(path);
                self.line(&ManifestLine::Directory(entry(&path, mode, 0)))
                    .map(drop)
            }
            TarEvent::Symlink { path, target, mode } => {
                let path = self.in_data_directory(path);
                let target = ManifestPath::from_bytes(&target);
                self.line(&ManifestLine::Link {
                    entry: entry(&path, mode, 0),
                    target,
                })
                .map(drop)
            }
        }
    }

    fn in_data_directory(&self, path: RelativePath) -> RelativePath {
        match self.tablespace {
            Some(oid) => RelativePath::in_tablespace(oid, &path),
            None => path,
        }
    }

    fn open_file(&mut self, path: RelativePath, size: u64, mode: u32, mtime: i64) {
        let is_read = matches!(path.as_bytes(), b"backup_label" | b"global/pg_control")
            && size <= KEPT_FILE_BYTES_MAX;
        let earlier = self.earlier.as_ref();
        self.file = Some(OpenFile {
            nth: 0,
            earlier: earlier.and_then(|earlier| earlier.file(path.as_bytes())),
            entry: entry(&path, mode, mtime),
            size,
            pages: self.checks.and_then(|checks| checks.of_file(&path)),
            checker: FileChecker::new(FILE_CHECKSUM),
            pending: self.extents.room(),
            kept: is_read.then(Vec::new),
            path,
        });
    }

    fn file_data(&mut self, mut bytes: &[u8], objects: &mpsc::Sender<Object>) -> Result<()> {
        let Some(mut file) = self.file.take() else {
            return Err(Error::damaged(
                "the backup's archive has content that no file owns",
            ));
        };
        file.checker.update(bytes);
        if let Some(kept) = &mut file.kept {
            kept.extend_from_slice(bytes);
        }
        while !bytes.is_empty() {
            let room = EXTENT_BYTES.saturating_sub(file.pending.len());
            let (now, later) = bytes.split_at(room.min(bytes.len()));
            file.pending.extend_from_slice(now);
            bytes = later;
            if file.pending.len() == EXTENT_BYTES {
                let next = self.extents.room();
                let plain = std::mem::replace(&mut file.pending, next);
                let pages = file.next_pages();
                self.extents.push(plain, file.next_earlier(), pages);
                self.pack(false, objects)?;
            }
        }
        self.file = Some(file);
        Ok(())
    }

    fn close_file(&mut self, objects: &mpsc::Sender<Object>) -> Result<()> {
        let Some(mut file) = self.file.take() else {
            return Err(Error::damaged(
                "the backup's archive ends a file that did not begin",
            ));
        };
        let pages = file.next_pages();
        let earlier = file.next_earlier();
        let OpenFile {
            path,
            entry,
            mut size,
            checker,
            mut kept,
            mut pending,
            ..
        } = file;
        self.ledger.record(path.clone(), checker.finish());
        if let (b"backup_label", Some(label), Some(increments)) =
            (path.as_bytes(), &mut kept, &mut self.increments)
        {
            *label = increments.label(label)?;
            increments.changed(&path, sum_of(label));
            size = length(label);
            pending.clone_from(label);
        }
        if pending.is_empty() {
            self.extents.give_back(pending);
        } else {
            self.extents.push(pending, earlier, pages);
        }
        self.end_file(entry, size, None);
        match (path.as_bytes(), kept) {
            (b"backup_label", kept) => self.label = kept,
            (b"global/pg_control", kept) => self.control = kept,
            _ => {}
        }
        self.pack(false, objects)
    }

    fn end_file(&mut self, entry: ManifestEntry, size: u64, rebuilt: Option<RebuiltFile>) {
        self.extents.end_file(entry, size, rebuilt);
        self.files = self.files.saturating_add(1);
        self.bytes = self.bytes.saturating_add(size);
    }

    fn increment_data(
        &mut self,
        mut increment: OpenIncrement,
        mut bytes: &[u8],
        objects: &mpsc::Sender<Object>,
    ) -> Result<()> {
        while let Some(stretch) = increment.take(&mut bytes)? {
            self.stretch(stretch, objects)?;
        }
        self.increment = Some(increment);
        Ok(())
    }

    fn stretch(&mut self, stretch: Stretch, objects: &mpsc::Sender<Object>) -> Result<()> {
        match (stretch, &self.increments) {
            (Stretch::Kept(plain_bytes, made), _) => self.extents.keep(plain_bytes, made),
            (Stretch::Changed(rebuild), Some(increments)) => {
                self.extents.rebuild(rebuild, increments.predecessor());
            }
            (Stretch::Changed(_), None) => {
                return Err(Error::damaged("an increment came that nobody asked for"));
            }
        }
        self.pack(false, objects)
    }

    fn close_increment(
        &mut self,
        mut increment: OpenIncrement,
        objects: &mpsc::Sender<Object>,
    ) -> Result<()> {
        while let Some(stretch) = increment.next_stretch()? {
            self.stretch(stretch, objects)?;
        }
        let ClosedIncrement {
            entry,
            size,
            arrived,
            rebuilt,
        } = increment.close()?;
        self.ledger.record(rebuilt.arrived.clone(), arrived);
        self.end_file(entry, size, Some(rebuilt));
        self.pack(false, objects)
    }

    /// Packs what is done of the extents in order; `all` waits for the last of them.
    fn pack(&mut self, all: bool, objects: &mpsc::Sender<Object>) -> Result<()> {
        while let Some(next) = self.extents.next(all)? {
            match next {
                Next::Extent(NextExtent {
                    plain_bytes,
                    made,
                    mut bad,
                    sums,
                }) => {
                    self.bad.append(&mut bad);
                    if let Some(sums) = sums {
                        self.sums.push((packed_bytes(&self.packed), sums));
                    }
                    match made {
                        Made::Zeros => self.packed.push(Extent::Zeros { zeros: plain_bytes }),
                        Made::Frame(frame) => self.pack_frame(&frame, objects)?,
                        Made::Stored(stored) => self.refer_to(&stored)?,
                    }
                }
                Next::FileEnds(entry, size, rebuilt) => {
                    self.suspect(&entry);
                    let sums = std::mem::take(&mut self.sums);
                    if let (Some(rebuilt), Some(increments)) = (rebuilt, &mut self.increments) {
                        increments.rebuilt(rebuilt, &sums);
                    }
                    let extents = std::mem::take(&mut self.packed);
                    let line = if is_outside(&entry) {
                        ManifestLine::Outside {
                            entry,
                            size,
                            extents,
                        }
                    } else {
                        ManifestLine::File {
                            entry,
                            size,
                            extents,
                        }
                    };
                    self.file_line(&line, objects)?;
                }
            }
        }
        Ok(())
    }

    /// Notes the pages of the file that ends which look damaged.
    fn suspect(&mut self, file: &ManifestEntry) {
        let bad = std::mem::take(&mut self.bad);
        let path = file.path.to_bytes();
        if let Some(Ok(path)) = path.map(|path| RelativePath::parse(&path)) {
            self.suspects.add(&path, &bad);
        }
    }

    fn pack_frame(
        &mut self,
        compressed: &CompressedFrame,
        objects: &mpsc::Sender<Object>,
    ) -> Result<()> {
        let mut pack = self.open_pack()?;
        let frame = pack
            .encoder
            .compressed_frame(compressed, &mut pack.object)
            .map_err(|error| refused(&error))?;
        self.packed.push(Extent::Stored(
            pack.number,
            frame.offset,
            frame.stored_bytes,
            compressed.plain_bytes(),
            blake3::Hash::from_bytes(*compressed.hash())
                .to_hex()
                .to_string(),
        ));
        if pack.encoder.stored_bytes() >= PACK_BYTES {
            self.close_pack(pack, objects)?;
        } else {
            self.pack = Some(pack);
        }
        Ok(())
    }

    /// Refers to what an earlier backup has stored.
    fn refer_to(&mut self, stored: &StoredExtent) -> Result<()> {
        let number = self.number_of(stored.pack)?;
        let plain_bytes = stored.plain_bytes.into();
        self.shared_bytes = self.shared_bytes.saturating_add(plain_bytes);
        self.packed.push(Extent::Stored(
            number,
            stored.offset.into(),
            stored.stored_bytes.into(),
            plain_bytes,
            blake3::Hash::from_bytes(stored.hash).to_hex().to_string(),
        ));
        Ok(())
    }

    /// The number in this manifest of one of the earlier backup's packs.
    fn number_of(&mut self, pack: u32) -> Result<u32> {
        if let Some(number) = self.shared.get(&pack) {
            return Ok(*number);
        }
        let name = self.earlier.as_ref().and_then(|it| it.pack_name(pack));
        let name = name.ok_or_else(|| Error::failure("no earlier backup has this pack"))?;
        let number = self.next_number();
        let path = name.path();
        self.line(&ManifestLine::Pack { number, path })?;
        self.shared.insert(pack, number);
        Ok(number)
    }

    /// The number of another pack in this manifest.
    fn next_number(&mut self) -> u32 {
        let number = self.numbers;
        self.numbers = number.saturating_add(1);
        number
    }

    fn open_pack(&mut self) -> Result<OpenPack> {
        if let Some(pack) = self.pack.take() {
            return Ok(pack);
        }
        let nth = self.next_pack;
        self.next_pack = nth.saturating_add(1);
        let name = ObjectName::Pack {
            backup: self.backup.clone(),
            number: nth,
        };
        let number = self.next_number();
        self.line(&ManifestLine::Pack {
            number,
            path: name.path(),
        })?;
        let encoder = self.recipe.encoder(&name)?;
        Ok(OpenPack {
            number,
            nth,
            encoder,
            object: Vec::new(),
        })
    }

    fn close_pack(&mut self, pack: OpenPack, objects: &mpsc::Sender<Object>) -> Result<()> {
        let OpenPack {
            nth,
            encoder,
            mut object,
            ..
        } = pack;
        let trailer = encoder
            .finish(serde_json::Map::new(), &mut object)
            .map_err(|error| refused(&error))?;
        self.stored_bytes = self.stored_bytes.saturating_add(length(&object));
        let name = ObjectName::Pack {
            backup: self.backup.clone(),
            number: nth,
        };
        send(objects, name, object, trailer.digest)
    }

    /// Adds a line to the manifest. Gives the file list that it has filled, if it has.
    fn line(&mut self, line: &ManifestLine) -> Result<Option<FileList>> {
        let filled = self.manifest.add(line);
        let bytes = u64::try_from(self.manifest.bytes()).unwrap_or(u64::MAX);
        check_readable("the backup's manifest", bytes)?;
        Ok(filled)
    }

    fn file_line(&mut self, line: &ManifestLine, objects: &mpsc::Sender<Object>) -> Result<()> {
        let Some(FileList { name, text, digest }) = self.line(line)? else {
            return Ok(());
        };
        check_readable("the lines of a file", length(&text))?;
        let object = encoded(&self.recipe, &name, &text)?;
        self.stored_bytes = self.stored_bytes.saturating_add(length(&object));
        send(objects, name, object, digest.clone())?;
        // not of a backup that was stopped, and is forgotten already
        self.keep(&digest, &text);
        Ok(())
    }

    /// Keeps lines to compare the next backup with, where they cannot be read again. A backup is worth more.
    fn keep(&mut self, digest: &str, text: &[u8]) {
        if let Some(kept) = &self.kept
            && let Err(error) = kept.keep(&self.backup, digest, text)
        {
            tracing::warn!(
                "the next backup will store everything anew: its manifest cannot be kept in {}: {error}",
                kept.folder().display()
            );
            self.kept = None;
        }
    }

    fn finish(mut self, objects: &mpsc::Sender<Object>) -> Result<Written> {
        let label = self.label.take();
        let control = self.control.take();
        // the last of the files that are put together have their sums then
        self.pack(true, objects)?;
        let manifest = self.check_backup_manifest()?;
        if let Some(increments) = &self.increments {
            self.backup_manifest = increments.manifest(manifest)?;
            check_readable("the backup_manifest", length(&self.backup_manifest))?;
        }
        self.store_backup_manifest(objects)?;
        self.store_what_lies_outside();
        let missing = |what| Error::damaged(format!("the backup has no {what}"));
        let packed = self.store_the_rest(objects)?;
        self.events.finish().map_err(|error| refused(&error))?;
        let label = label.ok_or_else(|| missing("backup_label"))?;
        let control = control.ok_or_else(|| missing("global/pg_control"))?;
        Ok(Written {
            packed,
            suspects: self.suspects,
            label: BackupLabel::parse(&label).map_err(|error| refused(&error))?,
            control: ControlFile::parse(&control).map_err(|error| refused(&error))?,
        })
    }

    /// Stores what is on its way to the packs, and encodes the manifest of all that is stored.
    fn store_the_rest(&mut self, objects: &mpsc::Sender<Object>) -> Result<Packed> {
        self.pack(true, objects)?;
        if let Some(pack) = self.pack.take() {
            self.close_pack(pack, objects)?;
        }
        let shared = std::mem::take(&mut self.shared).into_keys().collect();
        let earlier = self.earlier.as_ref();
        let shared_packs = earlier.map(|earlier| earlier.shared(&shared));
        let manifest = std::mem::replace(&mut self.manifest, ManifestText::new(&self.backup, 0));
        let text = manifest.finish();
        let manifest_digest = container::digest(&text);
        self.keep(&manifest_digest, &text);
        let name = ObjectName::Manifest(self.backup.clone());
        let manifest = encoded(&self.recipe, &name, &text)?;
        Ok(Packed {
            files: self.files,
            bytes: self.bytes,
            stored_bytes: self.stored_bytes.saturating_add(length(&manifest)),
            shared_bytes: self.shared_bytes,
            shared_packs: shared_packs.unwrap_or_default(),
            manifest,
            manifest_digest,
        })
    }

    /// Compares every file that came with what the server says it sent.
    fn check_backup_manifest(&self) -> Result<Manifest> {
        let manifest = Manifest::parse(&self.backup_manifest, PLAIN_BYTES_MAX)
            .map_err(|error| refused(&error))?;
        let compared = self.ledger.compare(&manifest).map_err(|mismatches| {
            let shown: Vec<String> = mismatches.iter().take(5).map(ToString::to_string).collect();
            Error::damaged(format!(
                "{} files differ from the server's backup_manifest: {}",
                mismatches.len(),
                shown.join("; ")
            ))
            .hint("the network or this machine's memory changed them; take the backup again")
        });
        compared.map(|()| manifest)
    }

    /// Files that no base backup has, each in one extent. They are not counted among its files.
    fn store_what_lies_outside(&mut self) {
        for OutsideFile { path, bytes } in std::mem::take(&mut self.outside) {
            let size = length(&bytes);
            let entry = ManifestEntry {
                path: ManifestPath::from_bytes(path.as_bytes()),
                mode: OUTSIDE_MODE,
                mtime: 0,
            };
            if !bytes.is_empty() {
                self.extents.push(bytes, None, None);
            }
            self.extents.end_file(entry, size, None);
        }
    }

    /// The manifest becomes a file of the backup, as `pg_verifybackup` wants it.
    fn store_backup_manifest(&mut self, objects: &mpsc::Sender<Object>) -> Result<()> {
        let bytes = std::mem::take(&mut self.backup_manifest);
        let path = RelativePath::parse(b"backup_manifest").map_err(|error| refused(&error))?;
        self.open_file(path, length(&bytes), 0o600, 0);
        self.file_data(&bytes, objects)?;
        self.close_file(objects)
    }
}

/// Whether a file lies outside of the data directory: those in it have paths that begin with a name.
fn is_outside(entry: &ManifestEntry) -> bool {
    matches!(&entry.path, ManifestPath::Text(path) if path.starts_with('/'))
}

fn packed_bytes(extents: &[Extent]) -> u64 {
    let lengths = extents.iter().map(Extent::plain_bytes);
    lengths.fold(0, u64::saturating_add)
}

fn sum_of(bytes: &[u8]) -> FileSum {
    let mut checker = FileChecker::new(FILE_CHECKSUM);
    checker.update(bytes);
    checker.finish()
}

pub(super) fn entry(path: &RelativePath, mode: u32, mtime: i64) -> ManifestEntry {
    ManifestEntry {
        path: ManifestPath::from_bytes(path.as_bytes()),
        mode,
        mtime,
    }
}

/// Encodes a manifest or a file list.
fn encoded(recipe: &BackupRecipe, name: &ObjectName, text: &[u8]) -> Result<Vec<u8>> {
    let mut encoder = recipe.encoder(name)?;
    let mut object = Vec::new();
    encoder
        .frame(text, &mut object)
        .map_err(|error| refused(&error))?;
    encoder
        .finish(serde_json::Map::new(), &mut object)
        .map_err(|error| refused(&error))?;
    Ok(object)
}

fn send(
    objects: &mpsc::Sender<Object>,
    name: ObjectName,
    bytes: Vec<u8>,
    digest: String,
) -> Result<()> {
    let object = Object {
        name,
        bytes,
        digest,
    };
    let sent = objects.blocking_send(object);
    sent.map_err(|_closed| Error::failure("the backup's objects are not taken any more"))
}

/// Refuses now what a restore could not read back.
fn check_readable(what: &str, bytes: u64) -> Result<()> {
    if bytes <= PLAIN_BYTES_MAX {
        return Ok(());
    }
    Err(Error::failure(format!(
        "{what} is larger than a restore can read: bytes={bytes} or more, most={PLAIN_BYTES_MAX}"
    ))
    .hint(
        "the cluster has too many files, or too much data, for this version: some millions of \
         files, some terabytes; back it up by other means, or split it",
    ))
}

fn length(bytes: &[u8]) -> u64 {
    u64::try_from(bytes.len()).unwrap_or(u64::MAX)
}

pub(super) fn refused(error: &(dyn std::error::Error + 'static)) -> Error {
    Error::damaged(format!(
        "the server's backup is not as it should be: {}",
        chain(error)
    ))
    .hint("take the backup again; if it happens again, check the network and the server's log")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_a_manifest_that_no_restore_could_read() {
        // a backup that is listed, and found unusable on the day that it is needed
        check_readable("the manifest", PLAIN_BYTES_MAX).unwrap();
        let error = check_readable("the manifest", PLAIN_BYTES_MAX + 1).unwrap_err();
        assert!(error.message().contains("bytes=1073741825"), "{error}");
        assert!(error.hint_text().is_some());
    }
}
