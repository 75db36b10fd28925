//! `backup_manifest`: the server's own list of a backup's files.
//!
//! `backup/backup_manifest.c` writes it, `common/parse_manifest.c` reads it: JSON of one line per file,
//! its version first, its own SHA-256 on the last line. Version 1 is of 13 to 16, version 2, which
//! adds the system identifier, of 17 and later.

mod entries;
mod writer;

use std::borrow::Cow;
use std::fmt;

use serde::Deserialize;
use serde::de::{self, IgnoredAny, MapAccess, SeqAccess, Visitor};
use sha2::{Digest as _, Sha256};
use wal::{Lsn, TimelineId, WalRange};

use crate::checksum::{bytes_of, hex_bytes};
use crate::{Algorithm, Checksum, FileSum, RelativePath, UnsafePath, byte_count};

pub use entries::{Entries, LINE_BYTES_MAX, ManifestEnd};
pub use writer::ManifestWriter;

/// What `backup_manifest` says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// 1 or 2.
    pub version: u32,
    /// The system identifier (version 2).
    pub system_id: Option<u64>,
    /// The files, in the server's order.
    pub files: Vec<ManifestFile>,
    /// The WAL that the backup needs, the newest timeline first.
    pub wal_ranges: Vec<ManifestWalRange>,
}

/// A file of the backup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ManifestFile {
    /// Its path below the data directory; files of tablespaces as `pg_tblspc/<oid>/…`.
    pub path: RelativePath,
    /// Its length in bytes and its checksum.
    pub sum: FileSum,
    /// When it was last changed, as the server wrote it: `2026-11-20 23:18:56 GMT`.
    pub last_modified: Option<String>,
}

/// A stretch of WAL that the backup needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ManifestWalRange {
    /// Its timeline.
    pub timeline: TimelineId,
    /// From where to where, half-open.
    pub range: WalRange,
}

/// Why bytes are not a `backup_manifest`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ManifestError {
    /// It exceeds the caller's limit.
    #[error("backup_manifest is too large: limit {limit} bytes, found {found}")]
    TooLarge {
        /// The limit in bytes.
        limit: u64,
        /// Its length in bytes.
        found: u64,
    },
    /// The last line is not the one with the checksum: cut short, most likely.
    #[error("backup_manifest does not end with its checksum: last line {found:?}")]
    LastLine {
        /// The last line, at most its first 200 bytes.
        found: String,
    },
    /// Its checksum does not match.
    #[error("backup_manifest is damaged: expected SHA-256 {expected}, found {found}")]
    Checksum {
        /// As the last line has it.
        expected: Checksum,
        /// As computed.
        found: Checksum,
    },
    /// It is not the JSON that a manifest is: also for an unknown key, or keys in another order.
    #[error("backup_manifest is not understood")]
    Json(#[source] serde_json::Error),
    /// A line is not one that a server writes in its place ([`Entries`] alone reads by line).
    #[error(
        "backup_manifest is not understood at line {line}: expected {expected}, found {found:?}"
    )]
    Line {
        /// The line's number, from 1.
        line: u64,
        /// What would have been understood.
        expected: &'static str,
        /// The line, at most its first 200 bytes.
        found: String,
    },
    /// A version that this build does not know.
    #[error("backup_manifest has an unknown version: found {found}")]
    Version {
        /// The version.
        found: u64,
    },
    /// A file's entry makes no sense.
    #[error("backup_manifest has a bad entry: number {number}")]
    File {
        /// The entry's number, from 1.
        number: usize,
        /// What is wrong.
        source: FileFault,
    },
    /// A stretch of WAL makes no sense.
    #[error("backup_manifest has a bad WAL range: timeline {timeline}, {start:?} to {end:?}")]
    WalRange {
        /// The timeline.
        timeline: u64,
        /// The first LSN.
        start: String,
        /// The LSN after the last byte.
        end: String,
    },
}

/// What is wrong with a file's entry.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FileFault {
    /// It has no path, or two.
    #[error("neither or both of Path and Encoded-Path")]
    Paths,
    /// Its encoded path is no hex.
    #[error("encoded path is no hex: {0:?}")]
    EncodedPath(String),
    /// Its path leads out of the data directory.
    #[error(transparent)]
    Path(#[from] UnsafePath),
    /// An algorithm that PostgreSQL does not have.
    #[error("unknown checksum algorithm: {0:?}")]
    Algorithm(String),
    /// A checksum without an algorithm, or not one of that algorithm.
    #[error("checksum is not one of {algorithm}: {found:?}")]
    Checksum {
        /// The algorithm.
        algorithm: Algorithm,
        /// What stands there.
        found: String,
    },
}

impl Manifest {
    /// Reads `backup_manifest` and verifies its own checksum.
    ///
    /// `bytes` may be damaged or hostile: never panics, allocates at most a multiple of its length,
    /// which may not exceed `max_bytes`.
    pub fn parse(bytes: &[u8], max_bytes: u64) -> Result<Self, ManifestError> {
        let found = byte_count(bytes.len());
        if found > max_bytes {
            return Err(ManifestError::TooLarge {
                limit: max_bytes,
                found,
            });
        }
        verify_checksum(bytes)?;
        let document: Document<'_> = serde_json::from_slice(bytes).map_err(ManifestError::Json)?;
        document.check()
    }

    /// Writes `backup_manifest` as a server does: `pg_verifybackup` takes it, and what a server of 13
    /// to 18 wrote comes out byte for byte (19 pads the lower half of an LSN with zeros).
    pub fn write(&self) -> Vec<u8> {
        let mut out = Vec::new();
        let mut writer = ManifestWriter::new(self.version, self.system_id, &mut out);
        for file in &self.files {
            writer.file(file, &mut out);
        }
        writer.finish(&self.wal_ranges, &mut out);
        out
    }
}

/// What stands around the checksum on the last line (`SendBackupManifest`).
const CHECKSUM_BEFORE: &str = "\"Manifest-Checksum\": \"";
const CHECKSUM_AFTER: &str = "\"}";

/// The checksum is that of all bytes up to and with the line feed before the last line
/// (`parse_manifest.c`, `verify_manifest_checksum`).
fn verify_checksum(bytes: &[u8]) -> Result<(), ManifestError> {
    let before_end = bytes.strip_suffix(b"\n").unwrap_or(bytes);
    let start = before_end
        .iter()
        .rposition(|byte| *byte == b'\n')
        .map_or(0, |at| at.saturating_add(1));
    let (covered, last) = before_end
        .split_at_checked(start)
        .unwrap_or((&[], before_end));
    let expected = bytes
        .ends_with(b"\n")
        .then(|| checksum_of(last))
        .flatten()
        .ok_or_else(|| ManifestError::LastLine { found: shown(last) })?;
    compare(expected, Checksum::Sha256(Sha256::digest(covered).into()))
}

/// The checksum on the last line, which is given without its line feed.
fn checksum_of(last: &[u8]) -> Option<Checksum> {
    let rest = last.strip_prefix(CHECKSUM_BEFORE.as_bytes())?;
    let hex = rest.strip_suffix(CHECKSUM_AFTER.as_bytes())?;
    Some(Checksum::Sha256(bytes_of(std::str::from_utf8(hex).ok()?)?))
}

fn compare(expected: Checksum, found: Checksum) -> Result<(), ManifestError> {
    if found == expected {
        Ok(())
    } else {
        Err(ManifestError::Checksum { expected, found })
    }
}

/// The beginning of a line, for a message.
fn shown(line: &[u8]) -> String {
    String::from_utf8_lossy(line.get(..200).unwrap_or(line)).into_owned()
}

/// The JSON as it stands, its values not yet understood.
struct Document<'a> {
    version: u64,
    system_id: Option<u64>,
    files: Files,
    wal_ranges: Vec<WalRangeEntry<'a>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileEntry<'a> {
    #[serde(borrow, rename = "Path")]
    path: Option<Cow<'a, str>>,
    #[serde(borrow, rename = "Encoded-Path")]
    encoded_path: Option<Cow<'a, str>>,
    #[serde(rename = "Size")]
    size: u64,
    #[serde(rename = "Last-Modified")]
    last_modified: Option<String>,
    #[serde(borrow, rename = "Checksum-Algorithm")]
    algorithm: Option<Cow<'a, str>>,
    #[serde(borrow, rename = "Checksum")]
    checksum: Option<Cow<'a, str>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WalRangeEntry<'a> {
    #[serde(rename = "Timeline")]
    timeline: u64,
    #[serde(borrow, rename = "Start-LSN")]
    start: Cow<'a, str>,
    #[serde(borrow, rename = "End-LSN")]
    end: Cow<'a, str>,
}

/// The files, understood one by one: of a million entries none is held twice.
struct Files(Result<Vec<ManifestFile>, (usize, FileFault)>);

impl Document<'_> {
    fn check(self) -> Result<Manifest, ManifestError> {
        let version = match self.version {
            1 => 1,
            2 => 2,
            found => return Err(ManifestError::Version { found }),
        };
        let files = self
            .files
            .0
            .map_err(|(number, source)| ManifestError::File { number, source })?;
        let wal_ranges = self
            .wal_ranges
            .iter()
            .map(WalRangeEntry::check)
            .collect::<Result<_, _>>()?;
        Ok(Manifest {
            version,
            system_id: self.system_id,
            files,
            wal_ranges,
        })
    }
}

impl FileEntry<'_> {
    fn check(self) -> Result<ManifestFile, FileFault> {
        let path = match (self.path, self.encoded_path) {
            (Some(path), None) => RelativePath::parse(path.as_bytes())?,
            (None, Some(hex)) => {
                let bytes = hex_bytes(&hex);
                let bytes = bytes.ok_or_else(|| FileFault::EncodedPath(hex.into_owned()))?;
                RelativePath::parse(&bytes)?
            }
            _ => return Err(FileFault::Paths),
        };
        let algorithm = match self.algorithm {
            None => Algorithm::None,
            Some(name) => Algorithm::from_name(&name)
                .ok_or_else(|| FileFault::Algorithm(name.into_owned()))?,
        };
        let hex = self.checksum.unwrap_or_default();
        let checksum = Checksum::from_hex(algorithm, &hex).ok_or_else(|| FileFault::Checksum {
            algorithm,
            found: hex.into_owned(),
        })?;
        let sum = FileSum {
            size: self.size,
            checksum,
        };
        Ok(ManifestFile {
            path,
            sum,
            last_modified: self.last_modified,
        })
    }
}

impl WalRangeEntry<'_> {
    fn check(&self) -> Result<ManifestWalRange, ManifestError> {
        let checked = || {
            let timeline = TimelineId::new(u32::try_from(self.timeline).ok()?)?;
            let (start, end): (Lsn, Lsn) = (self.start.parse().ok()?, self.end.parse().ok()?);
            (start <= end).then(|| ManifestWalRange {
                timeline,
                range: WalRange::new(start, end),
            })
        };
        checked().ok_or_else(|| ManifestError::WalRange {
            timeline: self.timeline,
            start: self.start.clone().into_owned(),
            end: self.end.clone().into_owned(),
        })
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Document<'a> {
    fn deserialize<D: de::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TopLevel;

        impl<'de> Visitor<'de> for TopLevel {
            type Value = Document<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a backup manifest")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let version = value_of(&mut map, "PostgreSQL-Backup-Manifest-Version")?;
                let mut system_id = None;
                let mut key = next_key(&mut map)?;
                if key == "System-Identifier" {
                    system_id = Some(map.next_value()?);
                    key = next_key(&mut map)?;
                }
                expect_key(&key, "Files")?;
                let files = map.next_value()?;
                let wal_ranges = value_of(&mut map, "WAL-Ranges")?;
                let _: String = value_of(&mut map, "Manifest-Checksum")?;
                match map.next_key::<Cow<'_, str>>()? {
                    None => Ok(Document {
                        version,
                        system_id,
                        files,
                        wal_ranges,
                    }),
                    Some(key) => Err(de::Error::custom(format_args!("unexpected key {key:?}"))),
                }
            }
        }

        deserializer.deserialize_map(TopLevel)
    }
}

fn next_key<'de, A: MapAccess<'de>>(map: &mut A) -> Result<Cow<'de, str>, A::Error> {
    map.next_key()?
        .ok_or_else(|| de::Error::custom("a key is missing"))
}

fn expect_key<E: de::Error>(found: &str, expected: &str) -> Result<(), E> {
    if found == expected {
        return Ok(());
    }
    Err(E::custom(format_args!(
        "unexpected key: expected {expected:?}, found {found:?}"
    )))
}

/// The value of the next key, which has to be this one.
fn value_of<'de, A, T>(map: &mut A, expected: &str) -> Result<T, A::Error>
where
    A: MapAccess<'de>,
    T: Deserialize<'de>,
{
    expect_key(&next_key(map)?, expected)?;
    map.next_value()
}

impl<'de> Deserialize<'de> for Files {
    fn deserialize<D: de::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct List;

        impl<'de> Visitor<'de> for List {
            type Value = Files;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of files")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Files, A::Error> {
                let mut files = Vec::new();
                while let Some(entry) = list.next_element::<FileEntry<'_>>()? {
                    match entry.check() {
                        Ok(file) => files.push(file),
                        Err(fault) => {
                            while list.next_element::<IgnoredAny>()?.is_some() {}
                            return Ok(Files(Err((files.len().saturating_add(1), fault))));
                        }
                    }
                }
                Ok(Files(Ok(files)))
            }
        }

        deserializer.deserialize_seq(List)
    }
}
