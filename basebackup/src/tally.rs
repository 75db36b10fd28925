//! What arrived, compared with what the server says it sent, in a few bytes for each file.

use std::collections::HashMap;

use sha2::{Digest as _, Sha256};

use crate::ledger::{difference, is_left_out};
use crate::{Checksum, FileSum, ManifestFile, Mismatch, RelativePath};

/// The files of a backup as they passed, for any number of them.
///
/// It finds what [`crate::Ledger`] finds, and holds neither paths nor the list: a file is 32 bytes,
/// in a table that is between 7/16 and 7/8 full, and the server's list passes entry by entry
/// ([`crate::manifest::Entries`]). Only a file that arrived and is not listed has lost its name: see
/// [`Tally::name_unlisted`].
#[derive(Debug, Clone, Default)]
pub struct Tally {
    files: HashMap<Key, File>,
    /// Files that arrived, and should be and are not yet listed.
    unlisted: u64,
    differences: Differences,
}

/// The first half of the SHA-256 of a path.
type Key = [u8; 16];

#[derive(Debug, Clone, Copy)]
struct File {
    size: u64,
    crc32c: u32,
    seen: Seen,
}

/// Where a path was seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Seen {
    Arrived,
    Listed,
    /// Arrived and listed.
    Both,
    /// As `Arrived`, and its name was given.
    Named,
}

const _: () = assert!(size_of::<(Key, File)>() == 32);

/// How what arrived differs from `backup_manifest`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Differences {
    /// The first that were found, at most [`Differences::NAMED_MAX`], by path.
    pub named: Vec<Mismatch>,
    /// How many there are besides: beyond that limit, or files that are not listed and were not
    /// named.
    pub more: u64,
}

impl Differences {
    /// The most that are named.
    pub const NAMED_MAX: usize = 100;

    fn add(&mut self, mismatch: Mismatch) {
        if self.named.len() < Self::NAMED_MAX {
            self.named.push(mismatch);
        } else {
            self.more = self.more.saturating_add(1);
        }
    }
}

impl Tally {
    /// An empty tally.
    pub fn new() -> Self {
        Self::default()
    }

    /// A file arrived whole: its length in bytes and its CRC-32C. Files of tablespaces go by
    /// [`RelativePath::in_tablespace`].
    pub fn record(&mut self, path: &RelativePath, size: u64, crc32c: u32) {
        let file = File {
            size,
            crc32c,
            seen: Seen::Arrived,
        };
        if self.files.contains_key(&key(path)) {
            self.differences.add(Mismatch::Twice { path: path.clone() });
            return;
        }
        self.files.insert(key(path), file);
        if !is_left_out(path) {
            self.unlisted = self.unlisted.saturating_add(1);
        }
    }

    /// How many files arrived, or are listed and did not.
    pub fn len(&self) -> usize {
        self.files.len()
    }

    /// Whether none did.
    pub fn is_empty(&self) -> bool {
        self.files.is_empty()
    }

    /// The server lists this file. To be called when all files have arrived.
    ///
    /// What is left out, and what is compared by its length alone, is as in
    /// [`crate::Ledger::compare`].
    pub fn listed(&mut self, listed: &ManifestFile) {
        let path = &listed.path;
        let left_out = is_left_out(path);
        let before = self.files.get(&key(path)).copied();
        let (seen, mismatch) = match before {
            None => {
                let missing = Mismatch::Missing { path: path.clone() };
                (Seen::Listed, (!left_out).then_some(missing))
            }
            Some(file) if matches!(file.seen, Seen::Listed | Seen::Both) => {
                let twice = Mismatch::ListedTwice { path: path.clone() };
                (file.seen, Some(twice))
            }
            Some(_) if left_out => (Seen::Both, None),
            Some(file) => {
                self.unlisted = self.unlisted.saturating_sub(1);
                (Seen::Both, difference(path, &listed.sum, &file.sum()))
            }
        };
        let file = before.unwrap_or(File {
            size: 0,
            crc32c: 0,
            seen,
        });
        self.files.insert(key(path), File { seen, ..file });
        if let Some(mismatch) = mismatch {
            self.differences.add(mismatch);
        }
    }

    /// The list has ended: how many files arrived that are not on it and have not been named.
    ///
    /// Where there are any, which no sound server sends, the caller walks over all that it stored
    /// and gives each path to [`Tally::name_unlisted`].
    pub fn unlisted(&self) -> u64 {
        self.unlisted
    }

    /// A file that arrived, seen again: if it is not listed, that is now known by its name.
    pub fn name_unlisted(&mut self, path: &RelativePath) {
        let file = self.files.get_mut(&key(path));
        let unlisted = file.filter(|file| file.seen == Seen::Arrived && !is_left_out(path));
        if let Some(file) = unlisted {
            file.seen = Seen::Named;
            self.unlisted = self.unlisted.saturating_sub(1);
            self.differences
                .add(Mismatch::Unlisted { path: path.clone() });
        }
    }

    /// Ends the comparison: no difference, or all of them.
    pub fn finish(self) -> Result<(), Differences> {
        let mut differences = self.differences;
        differences.more = differences.more.saturating_add(self.unlisted);
        if differences == Differences::default() {
            return Ok(());
        }
        let by_path = |one: &Mismatch, other: &Mismatch| one.path().cmp(other.path());
        differences.named.sort_by(by_path);
        Err(differences)
    }
}

impl File {
    fn sum(&self) -> FileSum {
        FileSum {
            size: self.size,
            checksum: Checksum::Crc32c(self.crc32c),
        }
    }
}

fn key(path: &RelativePath) -> Key {
    let hash: [u8; 32] = Sha256::digest(path.as_bytes()).into();
    let (half, _) = hash.split_first_chunk().expect("32 bytes have a half");
    *half
}
