//! What can be wrong with bytes that should be write-ahead log.

use thiserror::Error;

use crate::lsn::Lsn;
use crate::record::LayoutError;

/// Why bytes cannot be the write-ahead log that was expected.
///
/// The text fits after "damaged WAL: " and is what an archive writes next to bytes that it keeps
/// unverified. [`Self::at`] is where the log stops being trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum WalDamage {
    /// The first page has the magic of no version that we know: perhaps a newer server's.
    #[error("page magic of no known PostgreSQL version: lsn={at}, found=0x{found:04X}")]
    UnknownMagic {
        /// The page.
        at: Lsn,
        /// Its first two bytes.
        found: u16,
    },
    /// A page has another magic than it should.
    #[error("wrong page magic: lsn={at}, expected=0x{expected:04X}, found=0x{found:04X}")]
    PageMagic {
        /// The page.
        at: Lsn,
        /// The magic of this version.
        expected: u16,
        /// The page's.
        found: u16,
    },
    /// A page has flags that its version does not.
    #[error("unknown page flags: lsn={at}, found=0x{found:04X}")]
    PageFlags {
        /// The page.
        at: Lsn,
        /// All its flags.
        found: u16,
    },
    /// A page says that it belongs elsewhere: what a recycled file holds behind its end.
    #[error("page of another position: lsn={at}, found={found}")]
    PageAddress {
        /// The page.
        at: Lsn,
        /// Where it says that it belongs.
        found: Lsn,
    },
    /// A page is of a timeline that cannot stand here: above the one that is read, or below the
    /// page before it.
    #[error("page of another timeline: lsn={at}, expected={least} to {most}, found={found}")]
    PageTimeline {
        /// The page.
        at: Lsn,
        /// The smallest that could be.
        least: u32,
        /// The largest that could be.
        most: u32,
        /// The page's.
        found: u32,
    },
    /// The first page of a segment lacks the long header, or another page has it.
    #[error("wrong kind of page header: lsn={at}, expected_long={expected_long}")]
    HeaderKind {
        /// The page.
        at: Lsn,
        /// True if it should be long.
        expected_long: bool,
    },
    /// The segment is another system's.
    #[error("page of another system: lsn={at}, expected={expected}, found={found}")]
    SystemId {
        /// The page.
        at: Lsn,
        /// The system identifier that was expected.
        expected: u64,
        /// The page's.
        found: u64,
    },
    /// The segment's header names another segment size.
    #[error("page of another segment size: lsn={at}, expected={expected}, found={found}")]
    SegmentSize {
        /// The page.
        at: Lsn,
        /// Bytes that were expected.
        expected: u64,
        /// Bytes that the page says.
        found: u64,
    },
    /// The segment's header names another page size than 8192.
    #[error("page of another page size: lsn={at}, found={found}")]
    PageSize {
        /// The page.
        at: Lsn,
        /// Bytes that the page says.
        found: u32,
    },
    /// A page does not continue the record that runs into it, or continues one that does not.
    #[error("record is not continued: lsn={at}, expected={expected}, found={found}")]
    Continuation {
        /// The page.
        at: Lsn,
        /// Bytes of the record that should follow; 0 where none should.
        expected: u64,
        /// Bytes that the page says; 0 if it continues none.
        found: u64,
    },
    /// A record's length is no record's.
    #[error("impossible record length: lsn={at}, found={found}")]
    RecordLength {
        /// The record.
        at: Lsn,
        /// Its length in bytes, as it says.
        found: u32,
    },
    /// A record does not point back at the one before it.
    #[error("record does not follow the last: lsn={at}, expected={expected}, found={found}")]
    PrevLink {
        /// The record.
        at: Lsn,
        /// Where the record before starts.
        expected: Lsn,
        /// Where this one says that it starts.
        found: Lsn,
    },
    /// The first record of a walk points back at itself or beyond.
    #[error("record points forward: lsn={at}, found={found}")]
    PrevAhead {
        /// The record.
        at: Lsn,
        /// Where it says that the one before starts.
        found: Lsn,
    },
    /// A record's bytes do not give its checksum.
    #[error("wrong record checksum: lsn={at}, expected=0x{expected:08X}, found=0x{found:08X}")]
    RecordChecksum {
        /// The record.
        at: Lsn,
        /// What it says.
        expected: u32,
        /// What its bytes give.
        found: u32,
    },
    /// A record's checksum is right and its parts do not add up.
    #[error("impossible record: lsn={at}, {why}")]
    RecordLayout {
        /// The record.
        at: Lsn,
        /// What does not add up.
        why: LayoutError,
    },
    /// After a fragment was given up, the record that says so is missing or names another.
    #[error("given-up record is not acknowledged: lsn={at}, expected={expected}")]
    NotOverwritten {
        /// Where the acknowledgement should stand.
        at: Lsn,
        /// Where the given-up record started.
        expected: Lsn,
    },
    /// Something stands between a switch and the end of its segment.
    #[error("bytes after a segment switch: lsn={at}")]
    AfterSwitch {
        /// The page.
        at: Lsn,
    },
    /// Zeros where the log should go on.
    #[error("zeros instead of a record: lsn={at}")]
    Zeros {
        /// Where the next record should start.
        at: Lsn,
    },
    /// Nobody looked at these bytes: they lie outside of what was walked.
    #[error("not looked at: lsn={at}")]
    NotSeen {
        /// The first of them.
        at: Lsn,
    },
}

impl WalDamage {
    /// Where the log stops being trusted: the record or page that is wrong.
    pub const fn at(&self) -> Lsn {
        match self {
            Self::UnknownMagic { at, .. }
            | Self::PageMagic { at, .. }
            | Self::PageFlags { at, .. }
            | Self::PageAddress { at, .. }
            | Self::PageTimeline { at, .. }
            | Self::HeaderKind { at, .. }
            | Self::SystemId { at, .. }
            | Self::SegmentSize { at, .. }
            | Self::PageSize { at, .. }
            | Self::Continuation { at, .. }
            | Self::RecordLength { at, .. }
            | Self::PrevLink { at, .. }
            | Self::PrevAhead { at, .. }
            | Self::RecordChecksum { at, .. }
            | Self::RecordLayout { at, .. }
            | Self::NotOverwritten { at, .. }
            | Self::AfterSwitch { at }
            | Self::Zeros { at }
            | Self::NotSeen { at } => *at,
        }
    }
}
