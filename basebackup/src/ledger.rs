//! What arrived, compared with what the server says it sent.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt;

use crate::{Algorithm, Checksum, FileSum, Manifest, RelativePath};

/// The files of a backup as they passed.
///
/// `backup_manifest` comes after the files that it lists, so each file's size and checksum are kept
/// until then; its bytes are not.
#[derive(Debug, Clone, Default)]
pub struct Ledger {
    files: BTreeMap<RelativePath, FileSum>,
    twice: Vec<RelativePath>,
}

/// A difference between what arrived and `backup_manifest`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mismatch {
    /// Listed, and did not arrive.
    Missing {
        /// The file.
        path: RelativePath,
    },
    /// Arrived, and is not listed.
    Unlisted {
        /// The file.
        path: RelativePath,
    },
    /// Arrived more than once.
    Twice {
        /// The file.
        path: RelativePath,
    },
    /// Listed more than once.
    ListedTwice {
        /// The file.
        path: RelativePath,
    },
    /// Has another length.
    Size {
        /// The file.
        path: RelativePath,
        /// Bytes as listed.
        expected: u64,
        /// Bytes that arrived.
        found: u64,
    },
    /// Has other content.
    Checksum {
        /// The file.
        path: RelativePath,
        /// As listed.
        expected: Checksum,
        /// As computed.
        found: Checksum,
    },
    /// Was checked by another algorithm than it is listed with, so that nothing is known.
    Algorithm {
        /// The file.
        path: RelativePath,
        /// As listed.
        expected: Algorithm,
        /// As computed.
        found: Algorithm,
    },
}

impl Ledger {
    /// An empty ledger.
    pub fn new() -> Self {
        Self::default()
    }

    /// A file arrived whole. Files of tablespaces go by [`RelativePath::in_tablespace`].
    pub fn record(&mut self, path: RelativePath, sum: FileSum) {
        match self.files.entry(path) {
            Entry::Occupied(entry) => self.twice.push(entry.key().clone()),
            Entry::Vacant(entry) => {
                entry.insert(sum);
            }
        }
    }

    /// How many files arrived.
    pub fn len(&self) -> usize {
        self.files.len()
    }

    /// Whether none arrived.
    pub fn is_empty(&self) -> bool {
        self.files.is_empty()
    }

    /// Compares with what the server listed: no difference, or all of them, by path.
    ///
    /// What `pg_verifybackup` leaves out is left out: `backup_manifest` itself and all below `pg_wal`.
    /// A file listed without a checksum is compared by its length.
    pub fn compare(&self, manifest: &Manifest) -> Result<(), Vec<Mismatch>> {
        let mut differences = Vec::new();
        let mut listed = BTreeMap::new();
        for file in &manifest.files {
            if listed.insert(&file.path, &file.sum).is_some() {
                differences.push(Mismatch::ListedTwice {
                    path: file.path.clone(),
                });
            }
        }
        for (path, expected) in &listed {
            if is_left_out(path) {
                continue;
            }
            differences.extend(match self.files.get(path) {
                None => Some(Mismatch::Missing {
                    path: (*path).clone(),
                }),
                Some(found) => difference(path, expected, found),
            });
        }
        let unlisted = self.files.keys().filter(|path| !listed.contains_key(path));
        let unlisted = unlisted.filter(|path| !is_left_out(path));
        differences.extend(unlisted.map(|path| Mismatch::Unlisted { path: path.clone() }));
        differences.extend(
            self.twice
                .iter()
                .map(|path| Mismatch::Twice { path: path.clone() }),
        );
        if differences.is_empty() {
            return Ok(());
        }
        differences.sort_by(|one, other| one.path().cmp(other.path()));
        Err(differences)
    }
}

impl Mismatch {
    /// The file that differs.
    pub fn path(&self) -> &RelativePath {
        match self {
            Self::Missing { path }
            | Self::Unlisted { path }
            | Self::Twice { path }
            | Self::ListedTwice { path }
            | Self::Size { path, .. }
            | Self::Checksum { path, .. }
            | Self::Algorithm { path, .. } => path,
        }
    }
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing { path } => write!(f, "listed file did not arrive: {path}"),
            Self::Unlisted { path } => write!(f, "file arrived that is not listed: {path}"),
            Self::Twice { path } => write!(f, "file arrived more than once: {path}"),
            Self::ListedTwice { path } => write!(f, "file is listed more than once: {path}"),
            Self::Size {
                path,
                expected,
                found,
            } => {
                write!(
                    f,
                    "file has another length: {path}, expected {expected}, found {found}"
                )
            }
            Self::Checksum {
                path,
                expected,
                found,
            } => {
                write!(
                    f,
                    "file has other content: {path}, expected {expected:?}, found {found:?}"
                )
            }
            Self::Algorithm {
                path,
                expected,
                found,
            } => write!(
                f,
                "file was checked by another algorithm: {path}, expected {expected}, found {found}"
            ),
        }
    }
}

/// `pg_verifybackup.c`, `verifier_context.ignore_list`, as far as the server sends it.
pub(crate) fn is_left_out(path: &RelativePath) -> bool {
    path.as_bytes() == b"backup_manifest" || path.is_at_or_below("pg_wal")
}

pub(crate) fn difference(
    path: &RelativePath,
    expected: &FileSum,
    found: &FileSum,
) -> Option<Mismatch> {
    let path = path.clone();
    if expected.size != found.size {
        return Some(Mismatch::Size {
            path,
            expected: expected.size,
            found: found.size,
        });
    }
    let (expected, found) = (&expected.checksum, &found.checksum);
    if *expected == Checksum::None || expected == found {
        return None;
    }
    if expected.algorithm() != found.algorithm() {
        let (expected, found) = (expected.algorithm(), found.algorithm());
        return Some(Mismatch::Algorithm {
            path,
            expected,
            found,
        });
    }
    Some(Mismatch::Checksum {
        path,
        expected: expected.clone(),
        found: found.clone(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{FileChecker, ManifestFile};

    fn path(text: &str) -> RelativePath {
        RelativePath::parse(text.as_bytes()).unwrap()
    }

    fn sum(bytes: &[u8]) -> FileSum {
        let mut checker = FileChecker::new(Algorithm::Crc32c);
        checker.update(bytes);
        checker.finish()
    }

    fn manifest(files: &[(&str, FileSum)]) -> Manifest {
        let files = files.iter().map(|(name, sum)| ManifestFile {
            path: path(name),
            sum: sum.clone(),
            last_modified: None,
        });
        Manifest {
            version: 2,
            system_id: None,
            files: files.collect(),
            wal_ranges: Vec::new(),
        }
    }

    /// A backup with a file missing or torn on the way must be known to be bad while the server is
    /// still there.
    #[test]
    fn finds_every_kind_of_difference() {
        let mut ledger = Ledger::new();
        for (name, bytes) in [
            ("a", b"same"),
            ("b", b"long"),
            ("c", b"good"),
            ("d", b"more"),
            ("e", b"crc!"),
            ("e", b"crc!"),
        ] {
            ledger.record(path(name), sum(bytes));
        }
        assert_eq!(ledger.len(), 5);
        let sha = FileSum {
            size: 4,
            checksum: Checksum::Sha224([0; 28]),
        };
        let listed = manifest(&[
            ("a", sum(b"same")),
            ("b", sum(b"longer")),
            ("c", sum(b"evil")),
            ("e", sha),
            ("f", sum(b"lost")),
            ("a", sum(b"same")),
        ]);
        let found = ledger.compare(&listed).unwrap_err();
        assert_eq!(
            found,
            [
                Mismatch::ListedTwice { path: path("a") },
                Mismatch::Size {
                    path: path("b"),
                    expected: 6,
                    found: 4
                },
                Mismatch::Checksum {
                    path: path("c"),
                    expected: sum(b"evil").checksum,
                    found: sum(b"good").checksum,
                },
                Mismatch::Unlisted { path: path("d") },
                Mismatch::Algorithm {
                    path: path("e"),
                    expected: Algorithm::Sha224,
                    found: Algorithm::Crc32c,
                },
                Mismatch::Twice { path: path("e") },
                Mismatch::Missing { path: path("f") },
            ]
        );
        assert_eq!(found[5].to_string(), "file arrived more than once: e");
    }

    #[test]
    fn leaves_out_what_pg_verifybackup_leaves_out() {
        let mut ledger = Ledger::new();
        ledger.record(path("backup_manifest"), sum(b"x"));
        ledger.record(path("pg_wal/000000010000000000000001"), sum(b"x"));
        ledger.record(path("base/1/1"), sum(b"x"));
        let unchecked = FileSum {
            size: 1,
            checksum: Checksum::None,
        };
        let listed = manifest(&[
            ("pg_wal/archive_status/x.done", sum(b"")),
            ("base/1/1", unchecked),
        ]);
        assert_eq!(ledger.compare(&listed), Ok(()));
        assert!(Ledger::new().compare(&listed).is_err());
    }
}
