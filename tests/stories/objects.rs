//! The repository's objects as files, of a bucket too. Those that are not encrypted are read by stock
//! tools: the second reader of its format.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use container::{Reading, decode, read_header};

use crate::anywhen::Anywhen;
use crate::sealed::{data_key, unwrapped};
use crate::server::Server;

/// `<repository>/<cluster>/<system identifier>`.
pub(crate) fn system_dir(anywhen: &Anywhen, server: &Server) -> PathBuf {
    anywhen
        .repository()
        .join(anywhen.cluster)
        .join(server.system_id())
}

/// The same in any folder that holds a repository, of the cluster `main`.
pub(crate) fn system_dir_in(repository: &Path, server: &Server) -> PathBuf {
    repository.join("main").join(server.system_id())
}

/// The complete segments that are stored, by name, on every timeline.
pub(crate) fn stored_segments(system_dir: &Path) -> BTreeMap<String, PathBuf> {
    files_below(&system_dir.join("wal"))
        .into_iter()
        .filter_map(|path| {
            let name = path.file_name()?.to_str()?.to_owned();
            is_segment_name(&name).then_some((name, path))
        })
        .collect()
}

/// Takes a segment out of the repository, its pieces too.
pub(crate) fn remove_segment(system_dir: &Path, name: &str) {
    let path = stored_segments(system_dir)
        .remove(name)
        .expect("a stored segment");
    fs::remove_file(&path).unwrap();
    let pieces = path.with_file_name(format!("{name}.pieces"));
    if pieces.exists() {
        fs::remove_dir_all(pieces).unwrap();
    }
}

/// The plain bytes of a stored object: what `zstd` makes of it, unless it is encrypted.
#[track_caller]
pub(crate) fn unpacked(object: &Path) -> Vec<u8> {
    let stored = fs::read(object).unwrap();
    let Reading::Done((header, _)) = read_header(&stored).unwrap() else {
        panic!("no whole header: {}", object.display());
    };
    match data_key(object, &header) {
        Some(key) => decode(&stored, u64::MAX, Some(&key)).unwrap().plain,
        None => unpacked_by_zstd(object),
    }
}

#[track_caller]
fn unpacked_by_zstd(object: &Path) -> Vec<u8> {
    let output = Command::new("zstd")
        .arg("-dc")
        .stdin(File::open(object).unwrap())
        .output();
    let output = output.expect("the zstd command");
    assert!(
        output.status.success(),
        "zstd cannot read {}: {}",
        object.display(),
        String::from_utf8_lossy(&output.stderr)
    );
    output.stdout
}

/// Asserts that no object of the repository is half there: each is what its own checks say, from its
/// first byte to its last. Returns how many there are.
#[track_caller]
pub(crate) fn assert_all_whole(repository: &Path) -> usize {
    let files = files_below(repository);
    assert!(!files.is_empty(), "nothing in {}", repository.display());
    for file in files.iter().filter(|file| !is_staged(file)) {
        let stored = fs::read(file).unwrap();
        let shown = file.display();
        if file.starts_with(repository.join("keys")) {
            unwrapped(file);
        } else if stored.starts_with(&CONTAINER_MAGIC) {
            let header = match read_header(&stored) {
                Ok(Reading::Done((header, _))) => header,
                other => panic!("{shown}: {other:?}"),
            };
            let key = data_key(file, &header);
            let object = decode(&stored, u64::MAX, key.as_ref());
            object.unwrap_or_else(|error| panic!("{shown}: {error}"));
        } else {
            let json = serde_json::from_slice::<serde_json::Value>(&stored);
            json.unwrap_or_else(|error| panic!("{shown}: {error}"));
        }
    }
    files.len()
}

/// The first frame of a container (container's lib.rs).
const CONTAINER_MAGIC: [u8; 4] = 0x184D_2A50_u32.to_le_bytes();

/// A local store writes objects in a folder, or under names, that it takes for no object's.
fn is_staged(file: &Path) -> bool {
    let is_hidden = |part: &OsStr| part.as_encoded_bytes().starts_with(b".");
    let name = file.file_name().and_then(OsStr::to_str);
    file.parent()
        .and_then(Path::file_name)
        .is_some_and(is_hidden)
        || name.is_some_and(|name| name.starts_with('.') || name.contains('#'))
}

/// Compares every stored segment with the server's own file, and returns how many those were.
#[track_caller]
pub(crate) fn assert_equal_to_server(system_dir: &Path, data: &Path) -> usize {
    let stored = stored_segments(system_dir);
    for (name, object) in &stored {
        let original = fs::read(data.join("pg_wal").join(name))
            .unwrap_or_else(|error| panic!("the server no longer has {name}: {error}"));
        let copy = unpacked(object);
        assert_eq!(copy.len(), original.len(), "the length of {name}");
        let differs = copy.iter().zip(&original).position(|(a, b)| a != b);
        assert_eq!(differs, None, "the first byte of {name} that differs");
    }
    stored.len()
}

/// How much of what is stored was compared.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Compared {
    pub(crate) segments: usize,
    pub(crate) pieces: usize,
}

/// Compares every stored segment and every piece with the file of that name of one of the servers in
/// `datas`, which have what they wrote.
#[track_caller]
pub(crate) fn assert_wal_of(system_dir: &Path, datas: &[&Path], segment_mib: u64) -> Compared {
    let mut compared = Compared::default();
    for path in files_below(&system_dir.join("wal")) {
        let Some(stretch) = Stretch::of(&path, segment_mib << 20) else {
            continue;
        };
        let copy = unpacked(&path);
        let places = datas
            .iter()
            .map(|data| data.join("pg_wal").join(&stretch.segment));
        let originals: Vec<Vec<u8>> = places.filter_map(|place| fs::read(place).ok()).collect();
        let shown = path.display();
        assert!(
            !originals.is_empty(),
            "no server has the segment of {shown}"
        );
        let differ: Vec<Option<usize>> = originals
            .iter()
            .map(|original| stretch.differs(&copy, original))
            .collect();
        assert!(
            differ.contains(&None),
            "{shown} is no server's WAL; the first bytes that differ: {differ:?}"
        );
        if stretch.is_piece {
            compared.pieces += 1;
        } else {
            compared.segments += 1;
        }
    }
    compared
}

/// Where what is stored of a timeline ends, from its first segment or piece on without a break.
#[track_caller]
pub(crate) fn stored_end(system_dir: &Path, timeline: u32, segment_mib: u64) -> u64 {
    let size = segment_mib << 20;
    let folder = system_dir.join(format!("wal/{timeline:08X}"));
    // before the files: what leaves a journal has one
    let mut found = journaled(system_dir.parent().unwrap().parent().unwrap());
    found.retain(|path| path.starts_with(&folder));
    found.extend(files_below(&folder));
    let mut ranges: Vec<(u64, u64)> = found
        .iter()
        .filter_map(|path| {
            let stretch = Stretch::of(path, size)?;
            let base = stretch.base(size)?;
            Some((base + stretch.start as u64, base + stretch.end as u64))
        })
        .collect();
    ranges.sort_unstable();
    let first = ranges.first().expect("something is stored").0;
    ranges.iter().fold(first, |end, range| {
        if range.0 <= end {
            end.max(range.1)
        } else {
            end
        }
    })
}

/// What the journals of a repository in a folder hold, by docs/format.md: objects, which may have
/// files too by now, or be gone.
pub(crate) fn journaled(repository: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let journals = fs::read_dir(repository.join(".journal"))
        .into_iter()
        .flatten();
    for journal in journals {
        let journal = journal.unwrap().path();
        let name = journal.file_name().unwrap().to_str().unwrap();
        let Some(salt) = name.strip_prefix("2-") else {
            continue;
        };
        let salt = u64::from_str_radix(salt, 16).unwrap().to_le_bytes();
        // its writer may have removed it since
        let Ok(bytes) = fs::read(&journal) else {
            continue;
        };
        // a half is filled from its beginning
        let (first, second) = bytes.split_at(bytes.len() / 2);
        for half in [first, second] {
            let zeros = |block: &[u8]| !block.iter().any(|byte| *byte != 0);
            let filled = half.chunks(64 << 10).take_while(|block| !zeros(block));
            let filled = filled.map(<[u8]>::len).sum();
            for at in (0..filled).step_by(8) {
                let path = put_in(&half[at..], salt);
                found.extend(path.map(|path| repository.join(path)));
            }
        }
    }
    found
}

/// The path of the whole put frame that `bytes` begin with.
fn put_in(bytes: &[u8], salt: [u8; 8]) -> Option<&str> {
    if !bytes.starts_with(b"ANYWJNL\x01") || *bytes.get(12..14)? != [1, 0] {
        return None;
    }
    let crc = u32::from_le_bytes(bytes.get(8..12)?.try_into().ok()?);
    let path = usize::from(u16::from_le_bytes(bytes.get(14..16)?.try_into().ok()?));
    let object = u32::from_le_bytes(bytes.get(16..20)?.try_into().ok()?);
    let end = 44 + path + usize::try_from(object).ok()?;
    let is_whole = crc32c::crc32c_append(crc32c::crc32c(&salt), bytes.get(12..end)?) == crc;
    is_whole.then(|| std::str::from_utf8(&bytes[44..44 + path]).unwrap())
}

/// Which bytes of which segment an object holds.
struct Stretch {
    segment: String,
    start: usize,
    end: usize,
    is_piece: bool,
}

impl Stretch {
    /// None where the object is no WAL.
    fn of(object: &Path, segment_bytes: u64) -> Option<Self> {
        let name = object.file_name()?.to_str()?;
        if is_segment_name(name) {
            return Some(Self {
                segment: name.to_owned(),
                start: 0,
                end: usize::try_from(segment_bytes).unwrap(),
                is_piece: false,
            });
        }
        let folder = object.parent()?.file_name()?.to_str()?;
        let segment = folder.strip_suffix(".pieces")?;
        let (start, end) = name.split_once('-')?;
        let mut stretch = Self {
            segment: segment.to_owned(),
            start: 0,
            end: 0,
            is_piece: true,
        };
        let base = stretch.base(segment_bytes)?;
        let within = |text: &str| usize::try_from(hex(text)?.checked_sub(base)?).ok();
        (stretch.start, stretch.end) = (within(start)?, within(end)?);
        Some(stretch)
    }

    /// Where its segment begins.
    fn base(&self, segment_bytes: u64) -> Option<u64> {
        let (high, low) = (self.segment.get(8..16)?, self.segment.get(16..)?);
        Some((hex(high)? << 32) + hex(low)? * segment_bytes)
    }

    /// The first byte that differs from the whole segment of a server, in the segment.
    fn differs(&self, copy: &[u8], original: &[u8]) -> Option<usize> {
        let original = original.get(self.start..self.end).unwrap_or_default();
        if copy.len() != original.len() {
            return Some(self.start + copy.len().min(original.len()));
        }
        let differs = copy.iter().zip(original).position(|(a, b)| a != b);
        differs.map(|at| self.start + at)
    }
}

fn hex(text: &str) -> Option<u64> {
    u64::from_str_radix(text, 16).ok()
}

/// The number of an LSN in PostgreSQL's words.
pub(crate) fn lsn(text: &str) -> u64 {
    let parts = text
        .split_once('/')
        .and_then(|(high, low)| Some((hex(high)?, hex(low)?)));
    let (high, low) = parts.unwrap_or_else(|| panic!("no LSN: {text:?}"));
    (high << 32) + low
}

/// Asserts that segment follows segment, on one timeline.
#[track_caller]
pub(crate) fn assert_no_gap(system_dir: &Path, segment_mib: u64) {
    let numbers: Vec<u64> = stored_segments(system_dir)
        .keys()
        .map(|name| {
            let log = u64::from_str_radix(&name[8..16], 16).unwrap();
            let segment = u64::from_str_radix(&name[16..], 16).unwrap();
            log * (4096 / segment_mib) + segment
        })
        .collect();
    for pair in numbers.windows(2) {
        assert_eq!(pair[0] + 1, pair[1], "a segment is missing");
    }
}

fn is_segment_name(name: &str) -> bool {
    name.len() == 24
        && name
            .bytes()
            .all(|byte| matches!(byte, b'0'..=b'9' | b'A'..=b'F'))
}

/// Every file below `folder`, in the order of their paths.
pub(crate) fn files_below(folder: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = folders_below(folder)
        .iter()
        .flat_map(|folder| entries(folder))
        .filter(|(_, kind)| kind.is_file())
        .map(|(path, _)| path)
        .collect();
    files.sort();
    files
}

/// `folder` and every folder below it; links are not followed.
pub(crate) fn folders_below(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut ahead = vec![folder.to_owned()];
    while let Some(folder) = ahead.pop() {
        let below = entries(&folder)
            .into_iter()
            .filter(|(_, kind)| kind.is_dir());
        ahead.extend(below.map(|(path, _)| path));
        found.push(folder);
    }
    found
}

fn entries(folder: &Path) -> Vec<(PathBuf, fs::FileType)> {
    let entries = fs::read_dir(folder).into_iter().flatten();
    entries
        .map(|entry| entry.unwrap())
        // a running program may take a file away between two looks
        .filter_map(|entry| Some((entry.path(), entry.file_type().ok()?)))
        .collect()
}
