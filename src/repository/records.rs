//! The small objects of a repository: what they say, as they are written.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use wal::{Lsn, TimelineId, WalRange};

use super::layout::BackupId;
use super::sharing::SharedPacks;

/// The newest repository format that this build reads and the one that it writes.
pub const FORMAT: u32 = 1;

/// `cluster.json`: which system lives here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterRecord {
    /// The repository format.
    pub format: u32,
    /// The cluster's name.
    pub name: String,
    /// The system identifier; a string, since 64 bits do not survive JavaScript.
    pub system_id: String,
    /// The server's major version.
    pub major: u32,
    /// The server's block size in bytes.
    pub block_bytes: u32,
}

/// `tip/<timeline>`: how far a stream had come, and when that was confirmed. A hint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tip {
    /// Everything before this position is stored.
    pub lsn: Lsn,
    /// When that was written, by the archiver's clock.
    pub confirmed_at: Timestamp,
    /// Every commit up to this moment, by the server's clock, is stored: a clock that was read
    /// before the insert position, less a second. Absent where the server is a standby.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub moment: Option<Timestamp>,
}

/// `holes/<timeline>/<start>-<end>`: why a stretch is missing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hole {
    /// The timeline.
    pub timeline: TimelineId,
    /// Where the hole begins.
    pub start: Lsn,
    /// Where the hole ends; not in it.
    pub end: Lsn,
    /// When it was found.
    pub found_at: Timestamp,
    /// Why it arose.
    pub reason: String,
    /// The WAL is stored as it came, but cannot be trusted.
    #[serde(default)]
    pub unverified: bool,
}

impl Hole {
    /// The reason of a hole where the server ran with `wal_level=minimal`: the WAL is whole, and left
    /// changes out.
    pub const MINIMAL_WAL: &str = "the server ran with wal_level=minimal";

    /// Whether it is such a hole.
    pub fn is_of_minimal_wal(&self) -> bool {
        self.unverified && self.reason == Self::MINIMAL_WAL
    }

    /// The stretch.
    pub fn range(&self) -> WalRange {
        WalRange {
            start: self.start,
            end: self.end,
        }
    }
}

/// What is known about the WAL in a segment or piece, in its trailer under `"wal"`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WalFacts {
    /// Whether every page and record in it was checked and found whole.
    pub verified: bool,
    /// From where on it could not be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unverified_from: Option<Lsn>,
    /// Why it could not be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Where the first record that begins in it begins.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_record: Option<Lsn>,
    /// Where the last whole record in it begins.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_record: Option<Lsn>,
    /// Where the last whole record in it ends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub records_end: Option<Lsn>,
}

/// Where the trailer of a timeline's history has its ancestors.
pub const HISTORY_FACTS: &str = "ancestors";

/// One ancestor of a timeline, in the trailer of its history.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct AncestorFacts {
    /// The ancestor.
    pub timeline: TimelineId,
    /// Where the branch left it.
    pub end: Lsn,
}

/// A tablespace as a backup found it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TablespaceRecord {
    /// Its object identifier.
    pub oid: u32,
    /// Where the server kept it.
    pub location: String,
}

/// `backup.json`: the commit point of a backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackupRecord {
    /// The repository format.
    pub format: u32,
    /// The backup's id.
    pub id: BackupId,
    /// The cluster's name.
    pub cluster: String,
    /// The system identifier.
    pub system_id: String,
    /// The timeline on which it was taken.
    pub timeline: TimelineId,
    /// Replay begins here: the redo position of its checkpoint.
    pub start_lsn: Lsn,
    /// A server that has replayed up to here is consistent.
    pub stop_lsn: Lsn,
    /// When it began, by the server's clock.
    pub started_at: Timestamp,
    /// A moment after its end, by the server's clock.
    pub finished_at: Timestamp,
    /// The user's label.
    pub label: String,
    /// The server's version, as it calls itself.
    pub postgres_version: String,
    /// The server's major version.
    pub major: u32,
    /// The WAL segment size in bytes.
    pub segment_bytes: u64,
    /// How many files it has.
    pub files: u64,
    /// The size of its files in bytes.
    pub bytes: u64,
    /// What it took in the repository, in bytes: its own packs and manifest.
    pub stored_bytes: u64,
    /// The packs of other backups that it refers to.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub shared_packs: Vec<SharedPacks>,
    /// Its tablespaces.
    pub tablespaces: Vec<TablespaceRecord>,
    /// The digest of the plain manifest.
    pub manifest_digest: String,
    /// Whether it was taken from a standby.
    #[serde(default)]
    pub from_standby: bool,
    /// How many of its pages have a wrong checksum, as far as anybody looked.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub damaged_page_count: u64,
    /// Which those are, at most the first thousand.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub damaged_pages: Vec<DamagedPages>,
    /// Files that lay outside of the data directory, and are kept with it: full paths on the server.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub outside: Vec<String>,
    /// Where the repository is encrypted, the whole record as a sealed object in base64; label,
    /// tablespaces, damaged pages and files outside stand only there then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sealed: Option<String>,
    /// The digest of the record's other fields as JSON, keys sorted, without spaces. Stands in every
    /// stored record.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks so")]
fn is_zero(count: &u64) -> bool {
    *count == 0
}

/// Pages of a file whose checksum is wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DamagedPages {
    /// The file, below the data directory.
    pub path: String,
    /// Their numbers in the file, from 0.
    pub blocks: Vec<u32>,
}

impl DamagedPages {
    /// The first of them, for people.
    pub fn shown(pages: &[Self]) -> String {
        const SHOWN_MAX: usize = 10;
        let all = pages.iter().flat_map(|file| {
            let blocks = file.blocks.iter();
            blocks.map(|block| format!("{} block {block}", file.path))
        });
        let mut shown: Vec<String> = all.clone().take(SHOWN_MAX).collect();
        if all.count() > SHOWN_MAX {
            shown.push("…".to_owned());
        }
        shown.join(", ")
    }
}

/// One line of a backup's manifest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ManifestLine {
    /// Gives a pack the number by which extents name it.
    Pack {
        /// The number.
        number: u32,
        /// The pack's path in the repository.
        path: String,
    },
    /// A folder.
    Directory(ManifestEntry),
    /// Lines of files that are stored by themselves.
    Files {
        /// The file list's path in the repository.
        path: String,
        /// The digest of its lines.
        digest: String,
    },
    /// A file with its extents in order.
    File {
        /// Path, mode and time.
        #[serde(flatten)]
        entry: ManifestEntry,
        /// The file's size in bytes.
        size: u64,
        /// Its content, in order.
        extents: Vec<Extent>,
    },
    /// A file that lay outside of the data directory; its path is a full one on the server.
    Outside {
        /// Path, mode and time; the latter two are not known.
        #[serde(flatten)]
        entry: ManifestEntry,
        /// The file's size in bytes.
        size: u64,
        /// Its content, in order.
        extents: Vec<Extent>,
    },
    /// A symbolic link; a tablespace's, where the path is `pg_tblspc/<oid>`.
    Link {
        /// Path, mode and time.
        #[serde(flatten)]
        entry: ManifestEntry,
        /// Where it points.
        target: ManifestPath,
    },
}

/// What every entry of a manifest has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManifestEntry {
    /// The path below the data directory.
    pub path: ManifestPath,
    /// Permission bits.
    pub mode: u32,
    /// Time of last change, seconds since 1970.
    pub mtime: i64,
}

/// A path as it is on disk: text where it is UTF-8, else `{"hex": …}`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(untagged)]
pub enum ManifestPath {
    /// UTF-8.
    Text(String),
    /// Any other bytes.
    Bytes {
        /// Two digits a byte.
        hex: String,
    },
}

impl ManifestPath {
    /// The path of these bytes.
    pub fn from_bytes(bytes: &[u8]) -> Self {
        if let Ok(text) = str::from_utf8(bytes) {
            return Self::Text(text.to_owned());
        }
        let digit = |half: u8| char::from_digit(u32::from(half), 16).unwrap_or('0');
        let digits = bytes
            .iter()
            .flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]);
        Self::Bytes {
            hex: digits.collect(),
        }
    }

    /// The bytes; `None` where the digits are not hexadecimal.
    pub fn to_bytes(&self) -> Option<Vec<u8>> {
        match self {
            Self::Text(text) => Some(text.as_bytes().to_vec()),
            Self::Bytes { hex } => bytes_of_hex(hex),
        }
    }
}

/// The bytes that these digits stand for, two each; `None` where they are not hexadecimal.
pub fn bytes_of_hex(digits: &str) -> Option<Vec<u8>> {
    let pairs = digits.as_bytes().chunks(2);
    pairs
        .map(|pair| u8::from_str_radix(str::from_utf8(pair).ok()?, 16).ok())
        .collect()
}

/// A stretch of a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Extent {
    /// `[pack, offset, stored bytes, plain bytes, BLAKE3 of the plain bytes in hex]`.
    Stored(u32, u64, u64, u64, String),
    /// That many zero bytes.
    Zeros {
        /// How many.
        zeros: u64,
    },
}

impl Extent {
    /// How many bytes of the file it holds.
    pub fn plain_bytes(&self) -> u64 {
        match self {
            Self::Stored(_, _, _, plain, _) => *plain,
            Self::Zeros { zeros } => *zeros,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn manifest_lines_survive_the_round_trip() {
        let entry = |path: &[u8]| ManifestEntry {
            path: ManifestPath::from_bytes(path),
            mode: 0o600,
            mtime: 1_763_640_000,
        };
        let lines = [
            ManifestLine::Pack {
                number: 0,
                path: "packs/x/00000000".to_owned(),
            },
            ManifestLine::Directory(entry(b"base")),
            ManifestLine::File {
                entry: entry(b"base/1/\xff\x00odd"),
                size: 12,
                extents: vec![
                    Extent::Stored(0, 100, 10, 8, "ab".repeat(32)),
                    Extent::Zeros { zeros: 4 },
                ],
            },
            ManifestLine::Files {
                path: "backups/x/files/00000000".to_owned(),
                digest: "blake3:ab".to_owned(),
            },
            ManifestLine::Outside {
                entry: entry(b"/etc/postgresql/18/main/postgresql.conf"),
                size: 8,
                extents: vec![Extent::Stored(0, 110, 10, 8, "ab".repeat(32))],
            },
            ManifestLine::Link {
                entry: entry(b"pg_tblspc/16385"),
                target: ManifestPath::from_bytes(b"/mnt/ts"),
            },
        ];
        for line in lines {
            let text = serde_json::to_string(&line).unwrap();
            assert_eq!(
                serde_json::from_str::<ManifestLine>(&text).unwrap(),
                line,
                "{text}"
            );
        }
        assert_eq!(
            ManifestPath::from_bytes(b"\xff\x00").to_bytes().as_deref(),
            Some(b"\xff\x00".as_slice())
        );
    }
}
