//! Files put together from a server's increments: it sends the blocks that have changed, and the rest is what an
//! earlier backup, the predecessor, has stored. What comes out are extents as of any other file.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, OnceLock};

use basebackup::incremental::{Header, HeaderParser};
use basebackup::label::IncrementalFrom;
use basebackup::{
    Algorithm, BlockLayout, Checksum, FileChecker, FileSum, Manifest, RelationFile, RelativePath,
    SumOfParts,
};
use tokio::sync::watch;

use super::extents::{EXTENT_BYTES, Made};
use super::summaries::RelationSegment;
use super::tries::Tries;
use crate::error::{Error, Kind, Result};
use crate::repository::Repository;
use crate::repository::records::{BackupRecord, ManifestEntry};
use crate::repository::sharing::{EarlierBackup, EarlierExtent, StoredExtent};

/// The backup that a server's increments are of.
pub(super) struct Predecessor {
    known: Known,
    /// Its relations' files, of those that increments may come of: lengths in bytes and CRC-32C.
    files: HashMap<RelativePath, (u64, u32)>,
    /// Where it begins.
    from: IncrementalFrom,
}

/// What is known of a backup that increments may be of.
pub(super) struct Known {
    pub(super) repository: Repository,
    pub(super) earlier: Arc<EarlierBackup>,
    pub(super) layout: BlockLayout,
    /// Set where the increments, or what they are of, turn out to be good for nothing.
    pub(super) failure: Arc<OnceLock<Kind>>,
    /// Closed once nobody takes the backup any more.
    pub(super) under_way: watch::Receiver<()>,
}

impl Predecessor {
    /// That backup, with the `backup_manifest` that is uploaded. An error says why it can be none.
    pub(super) fn new(
        known: Known,
        record: &BackupRecord,
        manifest: Manifest,
    ) -> Result<Self, String> {
        let from = IncrementalFrom {
            lsn: record.start_lsn,
            timeline: record.timeline,
        };
        let range = manifest.wal_ranges.first();
        if !range.is_some_and(|it| it.range.start == from.lsn && it.timeline == from.timeline) {
            return Err("its backup_manifest begins elsewhere than it does".to_owned());
        }
        let mut files = HashMap::new();
        for file in manifest.files {
            if RelationFile::of(&file.path).is_none() {
                continue;
            }
            let Checksum::Crc32c(crc32c) = file.sum.checksum else {
                return Err(format!("{} has no CRC-32C there", file.path));
            };
            let extents = known.earlier.file(file.path.as_bytes()).unwrap_or_default();
            if !is_all_of(&extents, file.sum.size) {
                return Err(format!("not all of {} can be referred to", file.path));
            }
            files.insert(file.path, (file.sum.size, crc32c));
        }
        Ok(Self { known, files, from })
    }

    /// How the server cuts relations.
    pub(super) fn layout(&self) -> BlockLayout {
        self.known.layout
    }

    /// The first that is found among its files of these segments.
    pub(super) fn has_any_of(&self, cut: &BTreeSet<RelationSegment>) -> Option<&RelativePath> {
        let is_cut = |path: &&RelativePath| {
            RelationSegment::of(path).is_some_and(|segment| cut.contains(&segment))
        };
        if cut.is_empty() {
            return None;
        }
        self.files.keys().find(is_cut)
    }

    /// Increments are not what they should be: the next attempt does without.
    pub(super) fn give_up(&self) {
        // what was found first says more
        let _known = self.known.failure.set(Kind::Failure);
    }

    /// Where it begins.
    pub(super) fn from(&self) -> IncrementalFrom {
        self.from
    }

    /// The increment of the file at `path`, which comes as `arrived` with so many bytes.
    pub(super) fn open(
        &self,
        arriving: (RelativePath, u64),
        (path, entry): (RelativePath, ManifestEntry),
    ) -> Result<OpenIncrement> {
        let Some((size, crc32c)) = self.files.get(&path).copied() else {
            return Err(refused(&format!(
                "{} is of a file that backup {} does not have",
                arriving.0,
                self.known.earlier.id()
            )));
        };
        let extents = self.known.earlier.file(path.as_bytes()).unwrap_or_default();
        let before = FileBefore {
            size,
            crc32c,
            extents,
        };
        OpenIncrement::new(self.known.layout, before, arriving, (path, entry))
    }

    /// Puts an extent together, in `room`.
    pub(super) async fn rebuild(
        &self,
        rebuild: Rebuild,
        mut room: Vec<u8>,
    ) -> Result<(Vec<u8>, Sums)> {
        let before = match rebuild.earlier {
            None => Vec::new(),
            Some(extent) => self.read(extent).await?,
        };
        let sums = rebuild.put_together(&before, &mut room);
        Ok((room, sums))
    }

    async fn read(&self, extent: EarlierExtent) -> Result<Vec<u8>> {
        let stored = match extent {
            EarlierExtent::Zeros(bytes) => {
                return Ok(vec![0; usize::try_from(bytes).unwrap_or(usize::MAX)]);
            }
            EarlierExtent::Unknown => return Err(refused("an extent is not known")),
            EarlierExtent::Stored(stored) => stored,
        };
        let Known {
            repository,
            earlier,
            ..
        } = &self.known;
        let mut under_way = self.known.under_way.clone();
        let read = tokio::select! {
            read = read_extent(repository, earlier, &stored) => read,
            Err(_closed) = under_way.changed() => return Err(Error::failure("stopped")),
        };
        if let Err(error) = &read
            && error.kind() != Kind::Unreachable
        {
            // the first says why; the others fail for the same reason
            let _known = self.known.failure.set(error.kind());
        }
        read
    }
}

/// The bytes of an extent of an earlier backup.
pub(super) async fn read_extent(
    repository: &Repository,
    earlier: &EarlierBackup,
    stored: &StoredExtent,
) -> Result<Vec<u8>> {
    let mut tries = Tries::new();
    loop {
        let error = match repository.earlier_extent(earlier, stored).await {
            Ok(plain) => return Ok(plain),
            Err(error) => Error::from(error),
        };
        let id = earlier.id();
        let error = error.context(format!("what backup {id} has stored cannot be read"));
        tries.again_after(error).await?;
    }
}

/// Whether extents are those of a file of so many bytes, each known.
fn is_all_of(extents: &[EarlierExtent], size: u64) -> bool {
    let whole = u64::try_from(EXTENT_BYTES).unwrap_or(u64::MAX);
    let mut left = size;
    for extent in extents {
        let bytes = extent.plain_bytes().map(u64::from);
        if left == 0 || bytes != Some(left.min(whole)) {
            return false;
        }
        left = left.saturating_sub(whole);
    }
    left == 0
}

/// An extent that is to be put together.
#[derive(Debug)]
pub(super) struct Rebuild {
    /// What the predecessor has in its place, if it reaches so far.
    pub(super) earlier: Option<EarlierExtent>,
    /// Its length in bytes.
    plain_bytes: usize,
    /// So many bytes from the beginning may be the predecessor's; what is behind is what came, or zeros.
    kept_bytes: usize,
    /// So many bytes from the beginning were summed up with the predecessor's file.
    summed_bytes: usize,
    block_bytes: usize,
    /// Where the blocks that came belong.
    offsets: Vec<usize>,
    /// Those blocks.
    blocks: Vec<u8>,
}

/// CRC-32C of an extent that was put together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sums {
    /// Of so many of its first bytes, as they were in the predecessor and as they are now.
    summed_bytes: u64,
    before: u32,
    after: u32,
    /// Of the bytes behind those, and how many they are.
    appended: u32,
    appended_bytes: u64,
}

impl Rebuild {
    /// Puts it together in `plain`, from what the predecessor has.
    fn put_together(&self, before: &[u8], plain: &mut Vec<u8>) -> Sums {
        let kept = self.kept_bytes.min(self.plain_bytes).min(before.len());
        plain.clear();
        plain.extend_from_slice(before.get(..kept).unwrap_or_default());
        plain.resize(self.plain_bytes, 0);
        let blocks = self.blocks.chunks(self.block_bytes.max(1));
        for (offset, block) in self.offsets.iter().zip(blocks) {
            let end = offset.saturating_add(block.len());
            if let Some(place) = plain.get_mut(*offset..end) {
                place.copy_from_slice(block);
            }
        }
        let summed = self.summed_bytes.min(before.len()).min(plain.len());
        let (after, appended) = plain.split_at(summed);
        Sums {
            summed_bytes: bytes_of(summed),
            before: crc32c::crc32c(before.get(..summed).unwrap_or_default()),
            after: crc32c::crc32c(after),
            appended: crc32c::crc32c(appended),
            appended_bytes: bytes_of(appended.len()),
        }
    }
}

fn bytes_of(length: usize) -> u64 {
    u64::try_from(length).unwrap_or(u64::MAX)
}

/// A file that was put together from its increment.
pub(super) struct RebuiltFile {
    /// The path that its increment came under.
    pub(super) arrived: RelativePath,
    pub(super) path: RelativePath,
    /// What is known of its checksum before anything has changed: length in bytes and CRC-32C.
    before: (u64, u32),
}

impl RebuiltFile {
    /// Its sum, from those of the extents that were put together, each with its offset, in order.
    pub(super) fn sum(&self, rebuilt: &[(u64, Sums)]) -> FileSum {
        let (size, crc32c) = self.before;
        let mut sum = SumOfParts::of_file(size, crc32c);
        for (offset, sums) in rebuilt {
            let end = offset.saturating_add(sums.summed_bytes);
            sum.changed(sums.before, sums.after, size.saturating_sub(end));
        }
        for (_, sums) in rebuilt.iter().filter(|(_, sums)| sums.appended_bytes > 0) {
            sum.part(sums.appended, sums.appended_bytes);
        }
        sum.finish()
    }
}

/// The next stretch of a file of which the increment comes.
pub(super) enum Stretch {
    /// It is as the predecessor has it: its length in bytes, and what became of it then.
    Kept(u64, Made),
    /// It is to be put together.
    Changed(Rebuild),
}

/// The increment that is passing.
pub(super) struct OpenIncrement {
    arrived: RelativePath,
    path: RelativePath,
    entry: ManifestEntry,
    layout: BlockLayout,
    checker: FileChecker,
    parser: HeaderParser,
    /// Once all of it has come.
    header: Option<Header>,
    /// Of the file in the predecessor.
    before: FileBefore,
    /// The extent whose blocks come.
    nth: usize,
    /// Those of them that have come.
    blocks: Vec<u8>,
}

/// What the predecessor has of a file.
pub(super) struct FileBefore {
    size: u64,
    crc32c: u32,
    extents: Arc<[EarlierExtent]>,
}

/// What an increment has come to.
pub(super) struct ClosedIncrement {
    pub(super) entry: ManifestEntry,
    /// The file's length in bytes.
    pub(super) size: u64,
    /// Of the bytes that came.
    pub(super) arrived: FileSum,
    pub(super) rebuilt: RebuiltFile,
}

impl OpenIncrement {
    /// The increment of the file at `path`, which comes as `arrived` with so many bytes.
    pub(super) fn new(
        layout: BlockLayout,
        before: FileBefore,
        (arrived, arriving_bytes): (RelativePath, u64),
        (path, entry): (RelativePath, ManifestEntry),
    ) -> Result<Self> {
        let parser = HeaderParser::new(layout, arriving_bytes);
        Ok(Self {
            parser: parser.map_err(|error| refused(&format!("{arrived}: {error}")))?,
            layout,
            before,
            arrived,
            path,
            entry,
            checker: FileChecker::new(Algorithm::Crc32c),
            header: None,
            nth: 0,
            blocks: Vec::new(),
        })
    }

    /// Takes from the front of `bytes`, all of them or up to the end of a stretch.
    pub(super) fn take(&mut self, bytes: &mut &[u8]) -> Result<Option<Stretch>> {
        if self.header.is_none() {
            self.header = self.parsed(bytes)?;
        }
        if bytes.is_empty() {
            return Ok(None);
        }
        let missing = self.expected_bytes().saturating_sub(self.blocks.len());
        let (now, later) = bytes.split_at(missing.min(bytes.len()));
        self.checker.update(now);
        self.blocks.extend_from_slice(now);
        *bytes = later;
        if now.len() < missing {
            return Ok(None);
        }
        let stretch = self.next_stretch()?;
        stretch.map(Some).ok_or_else(|| {
            refused(&format!(
                "{} has more blocks than its header says",
                self.arrived
            ))
        })
    }

    fn parsed(&mut self, bytes: &mut &[u8]) -> Result<Option<Header>> {
        let before = *bytes;
        let header = self.parser.push(bytes);
        let taken = before.len().saturating_sub(bytes.len());
        self.checker.update(before.get(..taken).unwrap_or_default());
        let header = header.map_err(|error| refused(&format!("{}: {error}", self.arrived)))?;
        if let Some(from) = header.as_ref().and_then(Header::clamped_from) {
            tracing::debug!(
                "{} was cut to more blocks than a segment has: {from}",
                self.arrived
            );
        }
        Ok(header)
    }

    /// The next stretch, whose blocks have all come; `None` behind the last.
    pub(super) fn next_stretch(&mut self) -> Result<Option<Stretch>> {
        let at = bytes_of(self.nth).saturating_mul(bytes_of(EXTENT_BYTES));
        let Some(left) = self.size().checked_sub(at).filter(|left| *left > 0) else {
            return Ok(None);
        };
        if self.blocks.len() != self.expected_bytes() {
            return Err(refused(&format!("{} ends before its blocks", self.arrived)));
        }
        let plain_bytes = usize::try_from(left).unwrap_or(usize::MAX);
        let rebuild = self.rebuild(plain_bytes.min(EXTENT_BYTES));
        self.nth = self.nth.saturating_add(1);
        Ok(Some(match (rebuild.earlier, rebuild.is_as_it_was()) {
            (Some(EarlierExtent::Stored(stored)), true) => {
                Stretch::Kept(stored.plain_bytes.into(), Made::Stored(stored))
            }
            (Some(EarlierExtent::Zeros(bytes)), true) => Stretch::Kept(bytes.into(), Made::Zeros),
            _ => Stretch::Changed(rebuild),
        }))
    }

    /// The extent whose blocks have all come, of so many bytes.
    fn rebuild(&mut self, plain_bytes: usize) -> Rebuild {
        let block_bytes = usize::try_from(self.layout.block_bytes()).unwrap_or(usize::MAX);
        let first = self.first_block(self.nth);
        let header = self.header.as_ref();
        let kept_blocks = header.map_or(0, Header::truncated_to);
        let kept_blocks = kept_blocks
            .min(self.layout.whole_blocks(self.before.size))
            .saturating_sub(first);
        let sent = header.and_then(|it| it.blocks().get(self.sent(self.nth)));
        let offset = |block: &u32| bytes_of_blocks(block.saturating_sub(first), block_bytes);
        Rebuild {
            earlier: self.before.extents.get(self.nth).copied(),
            plain_bytes,
            kept_bytes: bytes_of_blocks(kept_blocks, block_bytes),
            summed_bytes: if self.is_shorter() { 0 } else { EXTENT_BYTES },
            block_bytes,
            offsets: sent.unwrap_or_default().iter().map(offset).collect(),
            blocks: std::mem::take(&mut self.blocks),
        }
    }

    /// A file that has become shorter is summed up anew: what it lost cannot be taken out of its sum.
    fn is_shorter(&self) -> bool {
        self.size() < self.before.size
    }

    /// The file's length in bytes.
    fn size(&self) -> u64 {
        let blocks = self.header.as_ref().map_or(0, Header::rebuilt_blocks);
        u64::from(blocks).saturating_mul(self.layout.block_bytes().into())
    }

    /// The number in the file of an extent's first block.
    fn first_block(&self, nth: usize) -> u32 {
        let block_bytes = u64::from(self.layout.block_bytes().max(1));
        let blocks = bytes_of(EXTENT_BYTES) / block_bytes;
        let first = bytes_of(nth).saturating_mul(blocks);
        u32::try_from(first).unwrap_or(u32::MAX)
    }

    /// Which of the blocks that are sent belong to an extent.
    fn sent(&self, nth: usize) -> std::ops::Range<usize> {
        let range = self.first_block(nth)..self.first_block(nth.saturating_add(1));
        self.header
            .as_ref()
            .map_or(0..0, |header| header.sent(range))
    }

    /// How many bytes are sent of the extent whose blocks come.
    fn expected_bytes(&self) -> usize {
        let block_bytes = self.layout.block_bytes();
        let blocks = u32::try_from(self.sent(self.nth).len()).unwrap_or(u32::MAX);
        bytes_of_blocks(blocks, usize::try_from(block_bytes).unwrap_or(usize::MAX))
    }

    /// All of it has come, and [`Self::next_stretch`] has given every stretch.
    pub(super) fn close(self) -> Result<ClosedIncrement> {
        if self.header.is_none() {
            return Err(refused(&format!("{} has no header", self.arrived)));
        }
        let size = self.size();
        let before = if self.is_shorter() {
            (0, 0)
        } else {
            (self.before.size, self.before.crc32c)
        };
        Ok(ClosedIncrement {
            entry: self.entry,
            size,
            arrived: self.checker.finish(),
            rebuilt: RebuiltFile {
                arrived: self.arrived,
                path: self.path,
                before,
            },
        })
    }
}

impl Rebuild {
    /// Whether it is what the predecessor has, and need not be read for its checksum.
    fn is_as_it_was(&self) -> bool {
        let before = self.earlier.and_then(EarlierExtent::plain_bytes);
        let has_its_length =
            before.and_then(|before| usize::try_from(before).ok()) == Some(self.plain_bytes);
        has_its_length
            && self.offsets.is_empty()
            && self.kept_bytes >= self.plain_bytes
            && self.summed_bytes >= self.plain_bytes
    }
}

fn bytes_of_blocks(blocks: u32, block_bytes: usize) -> usize {
    usize::try_from(blocks)
        .unwrap_or(usize::MAX)
        .saturating_mul(block_bytes)
}

pub(super) fn refused(what: &str) -> Error {
    Error::damaged(format!(
        "the server's increment is not as it should be: {what}"
    ))
    .hint("take the backup with --full, which asks for no increments")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::repository::records::ManifestPath;
    use crate::repository::simulation::lots::Lots;

    const BLOCK: usize = 8192;

    fn layout() -> BlockLayout {
        BlockLayout::new(8192, 131_072).unwrap()
    }

    /// A file whose blocks are all different, some of them zeros.
    fn blocks(lots: &mut Lots, count: usize) -> Vec<u8> {
        let mut file = Vec::new();
        for _ in 0..count {
            let byte = u8::try_from(lots.below(4) * lots.below(64)).unwrap();
            file.resize(file.len() + BLOCK, byte);
        }
        file
    }

    /// The extents that a backup of this file has; each knows its place.
    fn extents_of(file: &[u8]) -> Arc<[EarlierExtent]> {
        let extents = file.chunks(EXTENT_BYTES).zip(0_u32..);
        let extents = extents.map(|(plain, nth)| {
            let plain_bytes = u32::try_from(plain.len()).unwrap();
            if plain.iter().all(|byte| *byte == 0) {
                return EarlierExtent::Zeros(plain_bytes);
            }
            EarlierExtent::Stored(StoredExtent {
                pack: 0,
                offset: nth,
                stored_bytes: 1,
                plain_bytes,
                hash: [0; 32],
            })
        });
        extents.collect()
    }

    /// As `basebackup_incremental.h` lays it out.
    fn increment(truncated_to: u32, sent: &[(u32, Vec<u8>)]) -> Vec<u8> {
        let mut bytes = basebackup::incremental::MAGIC.to_le_bytes().to_vec();
        bytes.extend(u32::try_from(sent.len()).unwrap().to_le_bytes());
        bytes.extend(truncated_to.to_le_bytes());
        bytes.extend(sent.iter().flat_map(|(number, _)| number.to_le_bytes()));
        if !sent.is_empty() {
            bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
        }
        bytes.extend(sent.iter().flat_map(|(_, block)| block));
        bytes
    }

    /// What `pg_combinebackup/reconstruct.c` makes of it.
    fn combined(before: &[u8], truncated_to: u32, sent: &[(u32, Vec<u8>)]) -> Vec<u8> {
        let after_last = sent.last().map_or(0, |(number, _)| number + 1);
        let count = usize::try_from(truncated_to.max(after_last)).unwrap();
        let limit = usize::try_from(truncated_to).unwrap() * BLOCK;
        let whole = before.len() / BLOCK * BLOCK;
        let mut file = before[..whole.min(limit)].to_vec();
        file.resize(count * BLOCK, 0);
        for (number, block) in sent {
            let at = usize::try_from(*number).unwrap() * BLOCK;
            file[at..at + BLOCK].copy_from_slice(block);
        }
        file
    }

    fn open(before: &[u8], increment: &[u8]) -> Result<OpenIncrement> {
        let path = |text: &[u8]| RelativePath::parse(text).unwrap();
        let entry = ManifestEntry {
            path: ManifestPath::from_bytes(b"base/5/1"),
            mode: 0o600,
            mtime: 0,
        };
        let before = FileBefore {
            size: bytes_of(before.len()),
            crc32c: crc32c::crc32c(before),
            extents: extents_of(before),
        };
        let arriving = (path(b"base/5/INCREMENTAL.1"), bytes_of(increment.len()));
        OpenIncrement::new(layout(), before, arriving, (path(b"base/5/1"), entry))
    }

    struct Rebuilt {
        file: Vec<u8>,
        closed: ClosedIncrement,
        sum: FileSum,
        kept: usize,
    }

    /// Puts a file together from bytes that come in pieces of any length.
    fn rebuild(before: &[u8], increment: &[u8], lots: &mut Lots) -> Result<Rebuilt> {
        let mut open = open(before, increment)?;
        let (mut file, mut sums, mut kept) = (Vec::new(), Vec::new(), 0);
        let mut room = vec![7; 3];
        let mut add = |stretch: Stretch| match stretch {
            Stretch::Kept(plain_bytes, made) => {
                kept += 1;
                let bytes = usize::try_from(plain_bytes).unwrap();
                match made {
                    Made::Zeros => file.resize(file.len() + bytes, 0),
                    Made::Stored(stored) => {
                        let at = usize::try_from(stored.offset).unwrap() * EXTENT_BYTES;
                        assert_eq!(at, file.len(), "it stays in its place");
                        file.extend_from_slice(&before[at..at + bytes]);
                    }
                    Made::Frame(_) => panic!("what is kept is not stored again"),
                }
            }
            Stretch::Changed(rebuild) => {
                let at = file.len();
                let before = match rebuild.earlier {
                    None => &[],
                    Some(extent) => {
                        let bytes = usize::try_from(extent.plain_bytes().unwrap()).unwrap();
                        &before[at..at + bytes]
                    }
                };
                sums.push((bytes_of(at), rebuild.put_together(before, &mut room)));
                file.extend_from_slice(&room);
            }
        };
        let mut left = increment;
        while !left.is_empty() {
            let most = bytes_of(left.len()).min(lots.pick(&[1, 5000, 300_000]));
            let now = usize::try_from(lots.between(1, most)).unwrap();
            let (mut bytes, later) = left.split_at(now);
            left = later;
            while let Some(stretch) = open.take(&mut bytes)? {
                add(stretch);
            }
            assert!(bytes.is_empty());
        }
        while let Some(stretch) = open.next_stretch()? {
            add(stretch);
        }
        let closed = open.close()?;
        let sum = closed.rebuilt.sum(&sums);
        Ok(Rebuilt {
            file,
            closed,
            sum,
            kept,
        })
    }

    #[test]
    fn files_are_what_pg_combinebackup_makes_of_them() {
        let mut lots = Lots::new(5);
        let (mut kept, mut shorter, mut longer) = (0, 0, 0);
        for _ in 0..300 {
            let count = lots.pick(&[0, 1, 63, 64, 65, 128, 200]);
            let mut before = blocks(&mut lots, count);
            if lots.chance(100) {
                // a block that was half written, as a crash leaves it
                before.resize(before.len() + 100, 1);
            }
            let count = u64::try_from(count).unwrap();
            let truncated_to = lots.pick(&[0, 1, count / 2, count, count, count, count + 3, 300]);
            let truncated_to = u32::try_from(truncated_to).unwrap();
            let per_mille = lots.pick(&[0, 0, 3, 100, 900]);
            let sent = (0..250)
                .filter(|_| lots.chance(per_mille))
                .collect::<Vec<u32>>();
            let sent: Vec<_> = sent
                .into_iter()
                .map(|number| (number, blocks(&mut lots, 1)))
                .collect();
            let expected = combined(&before, truncated_to, &sent);
            let bytes = increment(truncated_to, &sent);
            let rebuilt = rebuild(&before, &bytes, &mut lots).unwrap();
            assert!(rebuilt.file == expected, "{truncated_to} of {count}");
            assert_eq!(rebuilt.closed.size, bytes_of(expected.len()));
            let sum_of = |bytes: &[u8]| {
                let mut checker = FileChecker::new(Algorithm::Crc32c);
                checker.update(bytes);
                checker.finish()
            };
            assert_eq!(rebuilt.sum, sum_of(&expected), "{truncated_to} of {count}");
            assert_eq!(rebuilt.closed.arrived, sum_of(&bytes));
            kept += rebuilt.kept;
            shorter += u32::from(expected.len() < before.len());
            longer += u32::from(expected.len() > before.len());
        }
        assert!(
            kept > 100 && shorter > 30 && longer > 30,
            "{kept} {shorter} {longer}"
        );
    }

    #[test]
    fn an_increment_that_is_cut_short_or_damaged_is_refused() {
        let mut lots = Lots::new(6);
        let before = blocks(&mut lots, 70);
        let sent = vec![(3, blocks(&mut lots, 1)), (66, blocks(&mut lots, 1))];
        let whole = increment(70, &sent);
        rebuild(&before, &whole, &mut lots).unwrap();
        for at in [0, 4, 12, 20] {
            let mut damaged = whole.clone();
            damaged[at] ^= 0x80;
            assert!(rebuild(&before, &damaged, &mut lots).is_err(), "byte {at}");
        }
        for length in [0, 11, BLOCK, 2 * BLOCK] {
            assert!(rebuild(&before, &whole[..length], &mut lots).is_err());
            let mut cut = open(&before, &whole).unwrap();
            let mut bytes = &whole[..length];
            while cut.take(&mut bytes).unwrap().is_some() {}
            let rest = std::iter::from_fn(|| cut.next_stretch().transpose());
            let is_refused = rest.into_iter().any(|stretch| stretch.is_err());
            assert!(is_refused || cut.close().is_err(), "{length} bytes");
        }
    }

    #[test]
    fn a_file_of_which_not_all_is_known_is_no_predecessor() {
        let whole = u64::try_from(EXTENT_BYTES).unwrap();
        let zeros = EarlierExtent::Zeros(u32::try_from(EXTENT_BYTES).unwrap());
        let rest = EarlierExtent::Zeros(5);
        assert!(is_all_of(&[], 0));
        assert!(is_all_of(&[zeros, rest], whole + 5));
        assert!(is_all_of(&[zeros], whole));
        assert!(!is_all_of(&[zeros], whole + 5));
        assert!(!is_all_of(&[zeros, rest], whole));
        assert!(!is_all_of(&[rest, zeros], whole + 5));
        assert!(!is_all_of(&[zeros, EarlierExtent::Unknown], whole + 5));
        assert!(!is_all_of(&[], 5));
    }
}
