//! Everything knowable about a base backup of PostgreSQL from bytes alone.
//!
//! Nothing here opens a file, waits, asks the time or logs: bytes go in, values come out. All
//! parsers may be fed damaged or hostile bytes: they never panic, and allocate no more than a
//! multiple of what was fed.
//!
//! Reading order, which is the order in which a backup arrives: the messages of `BASE_BACKUP`
//! ([`stream`]), the archives in them ([`tar`]) with their paths ([`RelativePath`]), relations' files
//! ([`RelationFile`]) with their [`page`]s and what is sent of those that were in an earlier backup ([`incremental`]),
//! the files with a meaning of their own ([`label`], [`tablespace_map`], [`control`]), and at the end the server's
//! own list ([`manifest`]), against which the files that passed are compared ([`Ledger`], or
//! [`Tally`] where they are too many to be held).
//!
//! Names of PostgreSQL source files in comments say where a fact comes from.
#![warn(
    missing_docs,
    clippy::arithmetic_side_effects,
    clippy::as_conversions,
    clippy::indexing_slicing
)]

pub mod checksum;
pub mod control;
pub mod incremental;
pub mod label;
mod ledger;
mod lines;
pub mod manifest;
pub mod page;
mod path;
mod relation;
pub mod stream;
pub mod tablespace_map;
mod tally;
pub mod tar;

pub use checksum::{Algorithm, Checksum, FileChecker, FileSum, SumOfParts};
pub use control::{ClusterState, ControlFile, WalLevel};
pub use label::BackupLabel;
pub use ledger::{Ledger, Mismatch};
pub use manifest::{Manifest, ManifestFile};
pub use path::{PathFault, RelativePath, UnsafePath};
pub use relation::{BlockLayout, Fork, RelationFile};
pub use tally::{Differences, Tally};
pub use tar::{TarError, TarEvent, TarParser};

/// A length in memory as a number of bytes.
fn byte_count(length: usize) -> u64 {
    u64::try_from(length).expect("a length in memory fits in 64 bits")
}
