//! From a backup's manifest to files: what is read together, decoded together and written together.

use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use basebackup::{Algorithm, FileChecker, FileSum, RelativePath};
use bytes::Bytes;
use container::FrameReader;

use super::place::{MARKER, Roots};
use crate::error::{Error, Result, chain, io};
use crate::repository::layout::ObjectName;
use crate::repository::manifest::file_list;
use crate::repository::records::{Extent, ManifestEntry, ManifestLine, ManifestPath};

/// How much is read from a pack at once, and how much of small files is written in one go.
const UNIT_BYTES: u64 = 4 << 20;
/// How many small files are written in one go.
const UNIT_FILES: usize = 256;
/// So much of what is there already is read at once.
const KEPT_AT_ONCE: u64 = 256 << 10;
/// The largest extent that is decoded; those of today have a quarter of a MiB.
const EXTENT_BYTES_MAX: u64 = 64 << 20;

/// A backup's manifest, without the lines of files that are stored by themselves.
pub(super) struct Manifest {
    plain: Vec<u8>,
    /// Where those lines are, with their digests.
    pub(super) lists: Vec<(ObjectName, String)>,
    /// For messages.
    place: String,
    packs: BTreeMap<u32, ObjectName>,
    /// With their modes; a folder comes before what is in it.
    pub(super) directories: Vec<(RelativePath, u32)>,
    /// Tablespace links by OID.
    pub(super) links: Vec<u32>,
    /// Files that lay outside of the data directory, by their full paths without the first slash.
    pub(super) outside: Vec<FileJob>,
}

/// A file to write.
#[derive(Debug, Clone)]
pub(super) struct FileJob {
    pub(super) path: RelativePath,
    pub(super) size: u64,
    mode: u32,
    extents: Vec<Extent>,
    /// Of each extent, whether it is there already; none are where this is empty.
    kept: Vec<bool>,
}

impl FileJob {
    /// Looks which extents are there already.
    pub(super) fn compare(&mut self, roots: &Roots) -> Result<()> {
        let (root, below) = roots.find(self.path.as_path());
        let there = if is_left_out(&self.path) {
            None
        } else {
            root.open(below)?
        };
        let Some(mut file) = there else {
            return Ok(());
        };
        let mut bytes = Vec::new();
        for extent in &self.extents {
            bytes.clear();
            let read = (&mut file)
                .take(extent.plain_bytes())
                .read_to_end(&mut bytes);
            read.map_err(|error| io("read", &root.path().join(below), &error))?;
            let is_whole = u64::try_from(bytes.len()) == Ok(extent.plain_bytes());
            self.kept.push(
                is_whole
                    && match extent {
                        Extent::Zeros { .. } => bytes.iter().all(|byte| *byte == 0),
                        Extent::Stored(_, _, _, _, hash) => {
                            blake3::hash(&bytes).to_hex().as_str() == hash
                        }
                    },
            );
        }
        Ok(())
    }
}

impl Manifest {
    /// Reads a manifest but for its files.
    pub(super) fn read(plain: Vec<u8>, place: String) -> Result<Self> {
        let mut manifest = Self {
            plain: Vec::new(),
            lists: Vec::new(),
            place,
            packs: BTreeMap::new(),
            directories: Vec::new(),
            links: Vec::new(),
            outside: Vec::new(),
        };
        for line in lines(&plain) {
            match manifest.parse(line)? {
                ManifestLine::Pack { number, path } => {
                    let name = ObjectName::parse(&path)
                        .filter(|name| matches!(name, ObjectName::Pack { .. }))
                        .ok_or_else(|| manifest.bad(&format!("not a pack: {path:?}")))?;
                    manifest.packs.insert(number, name);
                }
                ManifestLine::Files { path, digest } => {
                    let name = file_list(&path)
                        .ok_or_else(|| manifest.bad(&format!("not a file list: {path:?}")))?;
                    manifest.lists.push((name, digest));
                }
                ManifestLine::Directory(entry) => {
                    let path = manifest.path(&entry)?;
                    manifest.directories.push((path, entry.mode));
                }
                ManifestLine::Link { entry, .. } => {
                    let path = manifest.path(&entry)?;
                    let oid = tablespace_oid(&path);
                    let oid = oid.ok_or_else(|| {
                        manifest.bad(&format!("a link that is no tablespace's: {path}"))
                    })?;
                    manifest.links.push(oid);
                }
                ManifestLine::Outside {
                    entry,
                    size,
                    extents,
                } => {
                    let path = manifest.outside_path(&entry)?;
                    let job = manifest.job(path, entry.mode, size, extents)?;
                    manifest.outside.push(job);
                }
                ManifestLine::File { .. } => {}
            }
        }
        // tablespaces inside of the data directory are sent before the folder that they are in
        manifest.directories.sort();
        manifest.plain = plain;
        Ok(manifest)
    }

    /// The packs in which extents lie.
    pub(super) fn packs(&self) -> impl Iterator<Item = &ObjectName> {
        self.packs.values()
    }

    /// Whether a tablespace is a folder inside of the data directory.
    pub(super) fn has_in_place_tablespace(&self) -> bool {
        let mut directories = self.directories.iter();
        directories.any(|(path, _)| tablespace_oid(path).is_some())
    }

    /// The lines that stand in the manifest itself.
    pub(super) fn text(&self) -> &[u8] {
        &self.plain
    }

    /// Every file among these lines, in the order in which they lie in packs.
    fn files<'a>(&'a self, text: &'a [u8]) -> impl Iterator<Item = Result<FileJob>> + 'a {
        lines(text).filter_map(|line| match self.parse(line) {
            Ok(ManifestLine::File {
                entry,
                size,
                extents,
            }) => Some(
                self.path(&entry)
                    .and_then(|path| self.job(path, entry.mode, size, extents)),
            ),
            Ok(_) => None,
            Err(error) => Some(Err(error)),
        })
    }

    /// The paths of the files among these lines.
    pub(super) fn paths(&self, text: &[u8]) -> Result<HashSet<Vec<u8>>> {
        self.files(text)
            .map(|file| Ok(file?.path.as_bytes().to_vec()))
            .collect()
    }

    /// Refuses lines that make no sense.
    pub(super) fn check(&self, text: &[u8]) -> Result<()> {
        self.files(text).try_for_each(|file| file.map(drop))
    }

    /// The file at `path`, if its line stands in the manifest itself.
    pub(super) fn file(&self, path: &str) -> Result<Option<FileJob>> {
        self.files(&self.plain)
            .find(|job| {
                job.as_ref()
                    .map_or(true, |job| job.path.as_bytes() == path.as_bytes())
            })
            .transpose()
    }

    /// The files among these lines that `wanted` takes, in units: small ones together.
    pub(super) fn units<'a>(
        &'a self,
        text: &'a [u8],
        wanted: impl Fn(&FileJob) -> bool + 'a,
    ) -> impl Iterator<Item = Result<Vec<FileJob>>> + 'a {
        let mut files = self
            .files(text)
            .filter(move |job| job.as_ref().map_or(true, &wanted));
        let mut waiting: Option<FileJob> = None;
        std::iter::from_fn(move || {
            let mut unit: Vec<FileJob> = Vec::new();
            let mut bytes: u64 = 0;
            loop {
                let job = match waiting.take().map(Ok).or_else(|| files.next()) {
                    None => break,
                    Some(Err(error)) => return Some(Err(error)),
                    Some(Ok(job)) => job,
                };
                bytes = bytes.saturating_add(job.size);
                if !unit.is_empty() && bytes > UNIT_BYTES {
                    waiting = Some(job);
                    break;
                }
                unit.push(job);
                if bytes > UNIT_BYTES || unit.len() >= UNIT_FILES {
                    break;
                }
            }
            (!unit.is_empty()).then_some(Ok(unit))
        })
    }

    fn job(
        &self,
        path: RelativePath,
        mode: u32,
        size: u64,
        extents: Vec<Extent>,
    ) -> Result<FileJob> {
        if path.as_bytes() == b"tablespace_map" {
            // recovery would link the tablespaces back to where the live server has them
            return Err(Error::damaged("the backup has a tablespace_map").hint("take a new backup"));
        }
        let lengths = extents.iter().map(Extent::plain_bytes);
        let sum = lengths.fold(0u64, u64::saturating_add);
        if sum != size {
            return Err(self.bad(&format!("{path} has {size} bytes and extents of {sum}")));
        }
        for extent in &extents {
            if let Extent::Stored(pack, _, stored, plain, _) = extent
                && (*stored > EXTENT_BYTES_MAX
                    || *plain > EXTENT_BYTES_MAX
                    || !self.packs.contains_key(pack))
            {
                return Err(self.bad(&format!("{path} has an extent that cannot be: {extent:?}")));
            }
        }
        Ok(FileJob {
            path,
            size,
            mode,
            extents,
            kept: Vec::new(),
        })
    }

    fn parse(&self, line: &[u8]) -> Result<ManifestLine> {
        serde_json::from_slice(line).map_err(|error| self.bad(&error.to_string()))
    }

    fn path(&self, entry: &ManifestEntry) -> Result<RelativePath> {
        let shown = |path: &ManifestPath| format!("{path:?}");
        let bytes = entry.path.to_bytes();
        let bytes =
            bytes.ok_or_else(|| self.bad(&format!("not a path: {}", shown(&entry.path))))?;
        RelativePath::parse(&bytes).map_err(|error| self.bad(&chain(&error)))
    }

    /// A full path, without its first slash.
    fn outside_path(&self, entry: &ManifestEntry) -> Result<RelativePath> {
        let bad = || self.bad(&format!("not a full path: {:?}", entry.path));
        let bytes = entry.path.to_bytes().ok_or_else(bad)?;
        let below = bytes.strip_prefix(b"/").ok_or_else(bad)?;
        RelativePath::parse(below).map_err(|error| self.bad(&chain(&error)))
    }

    fn bad(&self, reason: &str) -> Error {
        Error::damaged(format!("damaged manifest {}: {reason}", self.place))
            .hint("use another backup")
    }
}

fn lines(plain: &[u8]) -> impl Iterator<Item = &[u8]> {
    plain
        .split(|byte| *byte == b'\n')
        .filter(|line| !line.is_empty())
}

/// The OID in `pg_tblspc/<oid>`.
fn tablespace_oid(path: &RelativePath) -> Option<u32> {
    let digits = path.as_bytes().strip_prefix(b"pg_tblspc/")?;
    digits
        .iter()
        .all(u8::is_ascii_digit)
        .then(|| str::from_utf8(digits).ok()?.parse().ok())?
}

/// Stored bytes of a pack, from `offset` on, and what decodes them.
#[derive(Debug)]
pub(super) struct StoredStretch {
    pub(super) bytes: Bytes,
    pub(super) offset: u64,
    pub(super) frames: Arc<FrameReader>,
}

impl StoredStretch {
    /// Decodes the next frame, of `stored` bytes, which must be what `blake3` says.
    fn next(&mut self, stored: u64, plain: u64, blake3: &str) -> Result<Vec<u8>, String> {
        let length = usize::try_from(stored).unwrap_or(usize::MAX);
        if length > self.bytes.len() {
            return Err("the pack ends before it".to_owned());
        }
        let frame = self.bytes.split_to(length);
        let plain = usize::try_from(plain).unwrap_or(usize::MAX);
        let plain = self.frames.frame(self.offset, &frame, plain);
        self.offset = self.offset.saturating_add(stored);
        let plain = plain.map_err(|error| chain(&error))?;
        let found = blake3::hash(&plain).to_hex();
        if found.as_str() == blake3 {
            Ok(plain)
        } else {
            Err(format!(
                "other content than was stored: expected={blake3}, found={found}"
            ))
        }
    }
}

/// The next frame of what was read; a read that has frames has read something.
fn next_frame(
    from: &mut Option<StoredStretch>,
    stored: u64,
    plain: u64,
    blake3: &str,
) -> Result<Vec<u8>, String> {
    let from = from.as_mut().ok_or("nothing was read")?;
    from.next(stored, plain, blake3)
}

/// Stored bytes that are read at once, and what is done with them.
pub(super) struct Read {
    /// Where to read: pack, offset and length in bytes; none where nothing need be read.
    pub(super) range: Option<(ObjectName, u64, u64)>,
    steps: Vec<Step>,
}

enum Step {
    Open(RelativePath, u32),
    /// The next stored bytes of the read, with the length and digest of what they decode to.
    Stored {
        stored: u64,
        plain: u64,
        blake3: String,
    },
    Zeros(u64),
    /// So many bytes are there already.
    Keep(u64),
    Close,
}

/// What writing the files of a unit takes: as few reads as their extents allow.
pub(super) fn reads_of(manifest: &Manifest, unit: Vec<FileJob>) -> Vec<Read> {
    let mut reads: Vec<Read> = Vec::new();
    let mut current = Read {
        range: None,
        steps: Vec::new(),
    };
    for job in unit {
        current.steps.push(Step::Open(job.path, job.mode));
        for (nth, extent) in job.extents.into_iter().enumerate() {
            if job.kept.get(nth) == Some(&true) {
                current.steps.push(Step::Keep(extent.plain_bytes()));
                continue;
            }
            let Extent::Stored(pack, offset, stored, plain, blake3) = extent else {
                current.steps.push(Step::Zeros(extent.plain_bytes()));
                continue;
            };
            let Some(name) = manifest.packs.get(&pack) else {
                continue;
            };
            match &mut current.range {
                Some((known, from, length))
                    if known == name
                        && from.saturating_add(*length) == offset
                        && length.saturating_add(stored) <= UNIT_BYTES =>
                {
                    *length = length.saturating_add(stored);
                }
                empty @ None => *empty = Some((name.clone(), offset, stored)),
                Some(_) => {
                    let range = Some((name.clone(), offset, stored));
                    reads.push(std::mem::replace(
                        &mut current,
                        Read {
                            range,
                            steps: Vec::new(),
                        },
                    ));
                }
            }
            current.steps.push(Step::Stored {
                stored,
                plain,
                blake3,
            });
        }
        current.steps.push(Step::Close);
    }
    reads.push(current);
    reads
}

/// Writes the files of a unit, one after another.
pub(super) struct UnitWriter {
    roots: Roots,
    /// How `backup_manifest` lists each file.
    listed: Arc<BTreeMap<RelativePath, Algorithm>>,
    given_up: Arc<AtomicBool>,
    /// Whether files may be there already.
    changes: bool,
    open: Option<OpenFile>,
    /// What was written.
    pub(super) done: Vec<(RelativePath, FileSum)>,
    pub(super) bytes: u64,
    /// How many of them were there already.
    pub(super) kept_bytes: u64,
}

struct OpenFile {
    file: File,
    /// How many bytes of it are right by now.
    bytes: u64,
    place: PathBuf,
    path: RelativePath,
    checker: FileChecker,
}

impl UnitWriter {
    pub(super) fn new(
        roots: Roots,
        listed: Arc<BTreeMap<RelativePath, Algorithm>>,
        given_up: Arc<AtomicBool>,
        changes: bool,
    ) -> Self {
        Self {
            roots,
            listed,
            given_up,
            changes,
            open: None,
            done: Vec::new(),
            bytes: 0,
            kept_bytes: 0,
        }
    }

    /// Whether files may be there already.
    pub(super) fn changes(&self) -> bool {
        self.changes
    }

    /// Where it writes.
    pub(super) fn roots(&self) -> &Roots {
        &self.roots
    }

    /// Does the steps of a read whose stored bytes are `from`.
    pub(super) fn apply(&mut self, read: Read, mut from: Option<StoredStretch>) -> Result<()> {
        let place = read
            .range
            .as_ref()
            .map(|(name, offset, _)| (name.path(), *offset));
        for step in read.steps {
            match step {
                Step::Open(path, mode) => self.open(path, mode)?,
                Step::Zeros(count) => self.write_zeros(count)?,
                Step::Keep(count) => self.keep(count)?,
                Step::Stored {
                    stored,
                    plain,
                    blake3,
                } => {
                    let plain = next_frame(&mut from, stored, plain, &blake3)
                        .map_err(|reason| damaged_extent(place.as_ref(), &reason))?;
                    self.write(&plain)?;
                }
                Step::Close => self.close()?,
            }
        }
        Ok(())
    }

    fn open(&mut self, path: RelativePath, mode: u32) -> Result<()> {
        if self.given_up.load(Ordering::SeqCst) {
            return Err(Error::failure("stopped"));
        }
        let (root, below) = self.roots.find(path.as_path());
        let file = if is_left_out(&path) {
            let nowhere = File::options().write(true).open("/dev/null");
            nowhere.map_err(|error| io("open", Path::new("/dev/null"), &error))?
        } else if self.changes {
            root.open_to_change(below, mode)?
        } else {
            root.create_with_mode(below, mode)?
        };
        let place = root.path().join(below);
        let algorithm = self.listed.get(&path).copied().unwrap_or(Algorithm::None);
        self.open = Some(OpenFile {
            file,
            bytes: 0,
            place,
            path,
            checker: FileChecker::new(algorithm),
        });
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let Some(open) = &mut self.open else {
            return Ok(());
        };
        open.checker.update(bytes);
        let count = u64::try_from(bytes.len()).unwrap_or(0);
        self.bytes = self.bytes.saturating_add(count);
        open.bytes = open.bytes.saturating_add(count);
        open.file
            .write_all(bytes)
            .map_err(|error| io("write", &open.place, &error))
    }

    fn write_zeros(&mut self, count: u64) -> Result<()> {
        static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
        let mut left = count;
        while left > 0 {
            let now = usize::try_from(left)
                .unwrap_or(ZEROS.len())
                .min(ZEROS.len());
            self.write(ZEROS.get(..now).unwrap_or_default())?;
            left = left.saturating_sub(u64::try_from(now).unwrap_or(u64::MAX));
        }
        Ok(())
    }

    /// Passes over what is there already, and was compared a moment ago.
    fn keep(&mut self, count: u64) -> Result<()> {
        let Some(open) = &mut self.open else {
            return Ok(());
        };
        let mut bytes = vec![0; usize::try_from(count.min(KEPT_AT_ONCE)).unwrap_or(0)];
        let mut left = count;
        while left > 0 {
            let now = usize::try_from(left).unwrap_or(usize::MAX).min(bytes.len());
            let now = bytes.get_mut(..now).unwrap_or_default();
            let read = open.file.read_exact(now);
            read.map_err(|error| io("read", &open.place, &error))?;
            open.checker.update(now);
            left = left.saturating_sub(u64::try_from(now.len()).unwrap_or(u64::MAX));
        }
        open.bytes = open.bytes.saturating_add(count);
        self.bytes = self.bytes.saturating_add(count);
        self.kept_bytes = self.kept_bytes.saturating_add(count);
        Ok(())
    }

    fn close(&mut self) -> Result<()> {
        if let Some(open) = self.open.take() {
            if self.changes && !is_left_out(&open.path) {
                let cut = open.file.set_len(open.bytes);
                cut.map_err(|error| io("cut off the end of", &open.place, &error))?;
            }
            self.done.push((open.path, open.checker.finish()));
        }
        Ok(())
    }
}

/// Whether a file of a backup is read, and not written: the marker of another restore, which was killed before it
/// had touched the cluster that was backed up then.
fn is_left_out(path: &RelativePath) -> bool {
    path.as_bytes() == MARKER.as_bytes()
}

/// The plain bytes of a job that is small enough to be held, such as `backup_manifest`.
pub(super) fn decode_all(
    read: Read,
    mut from: Option<StoredStretch>,
    out: &mut Vec<u8>,
) -> Result<()> {
    let place = read
        .range
        .as_ref()
        .map(|(name, offset, _)| (name.path(), *offset));
    for step in read.steps {
        match step {
            Step::Stored {
                stored,
                plain,
                blake3,
            } => {
                let plain = next_frame(&mut from, stored, plain, &blake3)
                    .map_err(|reason| damaged_extent(place.as_ref(), &reason))?;
                out.extend_from_slice(&plain);
            }
            Step::Zeros(count) => {
                let count = usize::try_from(count).unwrap_or(usize::MAX);
                out.resize(out.len().saturating_add(count), 0);
            }
            Step::Open(..) | Step::Keep(_) | Step::Close => {}
        }
    }
    Ok(())
}

fn damaged_extent(place: Option<&(String, u64)>, reason: &str) -> Error {
    let (path, offset) = place.cloned().unwrap_or_default();
    Error::damaged(format!(
        "damaged extent in {path}: offset={offset} or behind, {reason}"
    ))
    .hint("restore this object from a copy of the repository, or use another backup")
}

#[cfg(test)]
mod tests {
    use super::super::place::{Footprint, Found};
    use super::*;

    fn entry(path: &str) -> ManifestEntry {
        ManifestEntry {
            path: ManifestPath::from_bytes(path.as_bytes()),
            mode: 0o600,
            mtime: 0,
        }
    }

    fn text(lines: &[ManifestLine]) -> Vec<u8> {
        let lines = lines
            .iter()
            .map(|line| serde_json::to_string(line).unwrap() + "\n");
        lines.collect::<String>().into_bytes()
    }

    fn pack() -> ManifestLine {
        let path = "packs/20261120T140300.000Z/00000000".to_owned();
        ManifestLine::Pack { number: 0, path }
    }

    /// A pack of one frame per content, and the extents that name them.
    fn frames(contents: &[&[u8]]) -> (Vec<u8>, Vec<Extent>) {
        let mut bytes = Vec::new();
        let extents = contents.iter().map(|content| {
            let frame = zstd_frame(content);
            let offset = u64::try_from(bytes.len()).unwrap();
            bytes.extend_from_slice(&frame);
            let digest = blake3::hash(content).to_hex().to_string();
            let length = |bytes: &[u8]| u64::try_from(bytes.len()).unwrap();
            Extent::Stored(0, offset, length(&frame), length(content), digest)
        });
        let extents = extents.collect();
        (bytes, extents)
    }

    fn read_from_pack(bytes: Vec<u8>) -> StoredStretch {
        let header = container::Header::new("pack", "x", "main", "1");
        let mut object = Vec::new();
        let encoder = container::Encoder::new(&header, 1, None).unwrap();
        encoder.finish(serde_json::Map::new(), &mut object).unwrap();
        let (frames, _) = FrameReader::new(&object, None).unwrap();
        StoredStretch {
            bytes: bytes.into(),
            offset: 0,
            frames: Arc::new(frames),
        }
    }

    fn zstd_frame(content: &[u8]) -> Vec<u8> {
        let header = container::Header::new("pack", "x", "main", "1");
        let mut encoder = container::Encoder::new(&header, 1, None).unwrap();
        let mut out = Vec::new();
        let frame = encoder.frame(content, &mut out).unwrap();
        out.split_off(usize::try_from(frame.offset).unwrap())
    }

    fn file(path: &str, size: u64, extents: Vec<Extent>) -> ManifestLine {
        ManifestLine::File {
            entry: entry(path),
            size,
            extents,
        }
    }

    #[test]
    fn files_come_back_from_as_few_reads_as_their_extents_allow() {
        let (bytes, extents) = frames(&[b"first", b"second", b"third"]);
        let [one, two, three] = <[Extent; 3]>::try_from(extents).unwrap();
        let manifest = text(&[
            pack(),
            file("a", 11, vec![one, two]),
            file("b", 0, vec![]),
            file("c", 9, vec![Extent::Zeros { zeros: 4 }, three]),
        ]);
        let manifest = Manifest::read(manifest, "m".to_owned()).unwrap();
        let units: Vec<_> = manifest
            .units(manifest.text(), |_| true)
            .collect::<Result<_>>()
            .unwrap();
        assert_eq!(units.len(), 1);
        let mut reads = reads_of(&manifest, units.into_iter().next().unwrap());
        assert_eq!(reads.len(), 1);
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("data");
        let footprint = Footprint::begin(&target, None, 7, Found::Nothing, None).unwrap();
        let roots = footprint.roots().clone();
        let mut writer = UnitWriter::new(roots, Arc::default(), Arc::default(), false);
        writer
            .apply(reads.remove(0), Some(read_from_pack(bytes)))
            .unwrap();
        let content = |name: &str| std::fs::read(target.join(name)).unwrap();
        assert_eq!(content("a"), b"firstsecond");
        assert_eq!(content("b"), b"");
        assert_eq!(content("c"), b"\0\0\0\0third");
        assert_eq!((writer.done.len(), writer.bytes), (3, 20));
    }

    /// Damage is found, named, and never restored as if it were data.
    #[test]
    fn content_that_is_not_what_was_stored_is_refused() {
        let (_, mut extents) = frames(&[b"wanted"]);
        let (bytes, _) = frames(&[b"forged"]);
        let Some(Extent::Stored(_, _, stored, ..)) = extents.first_mut() else {
            panic!()
        };
        *stored = u64::try_from(bytes.len()).unwrap();
        let manifest = text(&[pack(), file("a", 6, extents)]);
        let manifest = Manifest::read(manifest, "m".to_owned()).unwrap();
        let unit = manifest
            .units(manifest.text(), |_| true)
            .next()
            .unwrap()
            .unwrap();
        let read = reads_of(&manifest, unit).remove(0);
        let folder = tempfile::tempdir().unwrap();
        let footprint =
            Footprint::begin(&folder.path().join("data"), None, 7, Found::Nothing, None).unwrap();
        let roots = footprint.roots().clone();
        let mut writer = UnitWriter::new(roots, Arc::default(), Arc::default(), false);
        let error = writer.apply(read, Some(read_from_pack(bytes))).unwrap_err();
        assert_eq!(error.kind(), crate::error::Kind::Damaged);
    }

    #[test]
    fn a_manifest_cannot_lead_out_of_the_directory() {
        let link = |path: &str| ManifestLine::Link {
            entry: entry(path),
            target: ManifestPath::from_bytes(b"/etc"),
        };
        for line in [
            ManifestLine::Directory(entry("../x")),
            ManifestLine::Directory(entry("/etc")),
            link("base"),
            link("pg_tblspc/../x"),
            ManifestLine::Pack {
                number: 0,
                path: "../../other".to_owned(),
            },
        ] {
            assert!(Manifest::read(text(&[line]), "m".to_owned()).is_err());
        }
        let listed = Manifest::read(text(&[file("a/../../b", 0, vec![])]), "m".to_owned()).unwrap();
        assert!(listed.files(listed.text()).next().unwrap().is_err());
        let wrong = Manifest::read(text(&[file("a", 5, vec![])]), "m".to_owned()).unwrap();
        assert!(wrong.files(wrong.text()).next().unwrap().is_err());
    }
}
