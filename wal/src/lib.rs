//! Everything knowable about PostgreSQL's write-ahead log from bytes alone.
//!
//! Nothing here opens a file, waits, asks the time or logs: bytes go in, values come out. All
//! parsers may be fed damaged or hostile bytes: they never panic, and allocate no more than what
//! was fed.
//!
//! Reading order: positions ([`Lsn`], [`WalRange`]), who and where ([`TimelineId`],
//! [`SegmentSize`], [`SegmentName`], [`WalFileName`], [`TimelineHistory`]), the format itself
//! ([`Major`], [`page`], [`record`], [`Body`]), the [`Walker`] that follows records through pages
//! and segments, and what an archive builds on it: the [`Segmenter`] and the [`verifier`].
//!
//! Names of PostgreSQL source files in comments say where a fact comes from.
#![warn(
    missing_docs,
    clippy::arithmetic_side_effects,
    clippy::as_conversions,
    clippy::indexing_slicing
)]

pub mod body;
mod damage;
mod history;
mod lsn;
mod major;
mod marks;
mod name;
pub mod page;
mod reader;
pub mod record;
mod segment;
mod segmenter;
mod summary;
mod time;
mod timeline;
pub mod verifier;
mod walker;

pub use body::{Body, BodyError, RelFile, ServerText};
pub use damage::WalDamage;
pub use history::{HistoryEntry, HistoryError, HistoryPart, Reach, TimelineHistory};
pub use lsn::{InvalidLsn, Lsn, WalRange};
pub use major::Major;
pub use name::{InvalidWalFileName, SegmentName, WalFileName};
pub use page::SegmentHead;
pub use reader::TooShort;
pub use record::Record;
pub use segment::{InvalidSegmentSize, SegmentSize};
pub use segmenter::{Segmenter, Stretch};
pub use summary::{CommitMark, Parameters, Summary};
pub use time::PgTime;
pub use timeline::{InvalidTimelineId, TimelineId};
pub use verifier::{
    Checked, Completeness, SegmentError, SegmentReport, Verdict, Verifier, verify_segment,
};
pub use walker::{Walk, Walker, WalkerStart};
