//! `backup_manifest`, read as it arrives.

use sha2::{Digest as _, Sha256};

use super::{
    CHECKSUM_BEFORE, FileEntry, ManifestError, ManifestFile, ManifestWalRange, WalRangeEntry,
    checksum_of, compare, shown,
};
use crate::Checksum;

/// The longest line that is read, in bytes with its line feed. A path has at most 1 KiB
/// (`pg_config_manual.h`, `MAXPGPATH`), of which JSON makes at most 6.
pub const LINE_BYTES_MAX: usize = 64 * 1024;

/// Reads `backup_manifest` in stretches of any length, and holds no more of it than a line.
///
/// It reads by line what [`super::Manifest::parse`] reads as JSON: exactly the lines that
/// `backup/backup_manifest.c` writes, and none that JSON would allow besides. The bytes may be
/// damaged or hostile: never panics, allocates at most a multiple of what is pushed and of
/// [`LINE_BYTES_MAX`].
///
/// **Files given out before [`Entries::finish`] returned are not verified.**
#[derive(Debug, Clone)]
pub struct Entries {
    expected: Expected,
    /// The beginning of a line whose end has not arrived.
    pending: Vec<u8>,
    /// Of all lines before the one with the checksum.
    hasher: Sha256,
    /// Lines taken.
    lines: u64,
    files: usize,
    end: ManifestEnd,
}

/// What a manifest says besides its files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ManifestEnd {
    /// 1 or 2.
    pub version: u32,
    /// The system identifier (version 2).
    pub system_id: Option<u64>,
    /// The WAL that the backup needs, the newest timeline first.
    pub wal_ranges: Vec<ManifestWalRange>,
}

/// What may stand on the next line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Expected {
    Version,
    SystemIdOrFiles,
    Files,
    /// The first file, or the end of a list without any.
    FirstFile,
    File,
    FilesEnd,
    WalRanges,
    FirstWalRange,
    WalRange,
    WalRangesEnd,
    Checksum,
    Nothing,
    /// An error was given: what follows is not looked at.
    Failed,
}

impl Default for Entries {
    fn default() -> Self {
        Self::new()
    }
}

impl Entries {
    /// Before the first byte.
    pub fn new() -> Self {
        Self {
            expected: Expected::Version,
            pending: Vec::new(),
            hasher: Sha256::new(),
            lines: 0,
            files: 0,
            end: ManifestEnd {
                version: 0,
                system_id: None,
                wal_ranges: Vec::new(),
            },
        }
    }

    /// Takes the next bytes: the files whose entries ended in them.
    pub fn push(&mut self, bytes: &[u8]) -> Result<Vec<ManifestFile>, ManifestError> {
        let mut files = Vec::new();
        let mut rest = bytes;
        while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
            let (line, after) = rest.split_at_checked(end).unwrap_or((rest, &[]));
            rest = after.get(1..).unwrap_or_default();
            let taken = if self.pending.is_empty() {
                self.line(line, &mut files)
            } else {
                let mut whole = std::mem::take(&mut self.pending);
                whole.extend_from_slice(line);
                self.line(&whole, &mut files)
            };
            self.or_failed(taken)?;
        }
        self.pending.extend_from_slice(rest);
        let length = self.check_length(self.pending.len());
        self.or_failed(length)?;
        Ok(files)
    }

    /// The manifest has ended: only now are its files known to be those that the server listed.
    pub fn finish(self) -> Result<ManifestEnd, ManifestError> {
        if self.expected == Expected::Nothing && self.pending.is_empty() {
            return Ok(self.end);
        }
        Err(ManifestError::LastLine {
            found: shown(&self.pending),
        })
    }

    /// A line without its line feed.
    fn line(&mut self, line: &[u8], files: &mut Vec<ManifestFile>) -> Result<(), ManifestError> {
        self.lines = self.lines.saturating_add(1);
        self.check_length(line.len().saturating_add(1))?;
        if self.expected != Expected::Checksum {
            self.hasher.update(line);
            self.hasher.update(b"\n");
        }
        self.expected = match self.expected {
            Expected::Version => {
                const BEFORE: &str = "{ \"PostgreSQL-Backup-Manifest-Version\": ";
                self.end.version = match self.number(line, BEFORE)? {
                    1 => 1,
                    2 => 2,
                    found => return Err(ManifestError::Version { found }),
                };
                Expected::SystemIdOrFiles
            }
            Expected::SystemIdOrFiles if line.starts_with(b"\"System-Identifier\"") => {
                self.end.system_id = Some(self.number(line, "\"System-Identifier\": ")?);
                Expected::Files
            }
            Expected::SystemIdOrFiles | Expected::Files => {
                self.exactly(line, "\"Files\": [")?;
                Expected::FirstFile
            }
            Expected::FirstFile | Expected::FilesEnd if line == LIST_END => Expected::WalRanges,
            Expected::FirstFile | Expected::File => {
                let (entry, followed) = entry(line);
                files.push(self.file(entry)?);
                if followed {
                    Expected::File
                } else {
                    Expected::FilesEnd
                }
            }
            Expected::WalRanges => {
                self.exactly(line, "\"WAL-Ranges\": [")?;
                Expected::FirstWalRange
            }
            Expected::FirstWalRange | Expected::WalRangesEnd if line == LIST_END => {
                Expected::Checksum
            }
            Expected::FirstWalRange | Expected::WalRange => {
                let (entry, followed) = entry(line);
                let range: WalRangeEntry<'_> =
                    serde_json::from_slice(entry).map_err(ManifestError::Json)?;
                self.end.wal_ranges.push(range.check()?);
                if followed {
                    Expected::WalRange
                } else {
                    Expected::WalRangesEnd
                }
            }
            Expected::Checksum => {
                let expected =
                    checksum_of(line).ok_or_else(|| self.wrong(CHECKSUM_BEFORE, line))?;
                let found = std::mem::take(&mut self.hasher).finalize();
                compare(expected, Checksum::Sha256(found.into()))?;
                Expected::Nothing
            }
            Expected::FilesEnd | Expected::WalRangesEnd => {
                return Err(self.wrong("the end of the list", line));
            }
            Expected::Nothing | Expected::Failed => {
                return Err(self.wrong("the end of the manifest", line));
            }
        };
        Ok(())
    }

    fn file(&mut self, entry: &[u8]) -> Result<ManifestFile, ManifestError> {
        let entry: FileEntry<'_> = serde_json::from_slice(entry).map_err(ManifestError::Json)?;
        self.files = self.files.saturating_add(1);
        entry.check().map_err(|source| ManifestError::File {
            number: self.files,
            source,
        })
    }

    /// The number on a line of `before`, digits and a comma.
    fn number(&self, line: &[u8], before: &'static str) -> Result<u64, ManifestError> {
        line.strip_prefix(before.as_bytes())
            .and_then(|rest| rest.strip_suffix(b","))
            .and_then(|digits| serde_json::from_slice(digits).ok())
            .ok_or_else(|| self.wrong(before, line))
    }

    fn exactly(&self, line: &[u8], expected: &'static str) -> Result<(), ManifestError> {
        if line == expected.as_bytes() {
            return Ok(());
        }
        Err(self.wrong(expected, line))
    }

    fn check_length(&self, length: usize) -> Result<(), ManifestError> {
        if length <= LINE_BYTES_MAX {
            return Ok(());
        }
        Err(self.wrong("a line of at most 64 KiB", &self.pending))
    }

    fn wrong(&self, expected: &'static str, line: &[u8]) -> ManifestError {
        ManifestError::Line {
            line: self.lines,
            expected,
            found: shown(line),
        }
    }

    /// Nothing can be made of what follows an error.
    fn or_failed(&mut self, result: Result<(), ManifestError>) -> Result<(), ManifestError> {
        if result.is_err() {
            self.expected = Expected::Failed;
            self.pending = Vec::new();
        }
        result
    }
}

const LIST_END: &[u8] = b"],";

/// An entry of a list, and whether another follows it.
fn entry(line: &[u8]) -> (&[u8], bool) {
    match line.strip_suffix(b",") {
        Some(entry) => (entry, true),
        None => (line, false),
    }
}
