//! Pages of the log and their headers (`xlog_internal.h`, `XLogPageHeaderData` and
//! `XLogLongPageHeaderData`; the layout is the same in every known version).
//!
//! ```text
//!  0  u16  magic, names the version            24  u64  system identifier   \
//!  2  u16  flags                               32  u32  segment size, bytes  } first page of
//!  4  u32  timeline                            36  u32  page size, bytes    /  each segment
//!  8  u64  address: where the page belongs
//! 16  u32  bytes left of the record that runs into the page
//! 20       padding
//! ```

use thiserror::Error;

use crate::lsn::Lsn;
use crate::major::Major;
use crate::reader::{Reader, TooShort};
use crate::segment::{InvalidSegmentSize, SegmentSize};
use crate::timeline::TimelineId;

/// Bytes of a page (`XLOG_BLCKSZ`; servers can be built with others, and are refused).
pub const PAGE_BYTES: usize = 8192;
/// Bytes of the header of most pages.
pub const SHORT_HEADER_BYTES: usize = 24;
/// Bytes of the header of the first page of a segment.
pub const LONG_HEADER_BYTES: usize = 40;

/// The page begins with the rest of a record (`XLP_FIRST_IS_CONTRECORD`).
pub const CONTINUES_RECORD: u16 = 0x1;
/// The header is the long one (`XLP_LONG_HEADER`).
pub const HAS_LONG_HEADER: u16 = 0x2;

const _: () = assert!(2 + 2 + 4 + 8 + 4 + 4 == SHORT_HEADER_BYTES);
const _: () = assert!(SHORT_HEADER_BYTES + 8 + 4 + 4 == LONG_HEADER_BYTES);

/// The header of a page, as it stands there: nothing is checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageHeader {
    /// Which version wrote it.
    pub magic: u16,
    /// [`CONTINUES_RECORD`], [`HAS_LONG_HEADER`], and others that depend on the version.
    pub flags: u16,
    /// The timeline; 0 is nobody's.
    pub timeline: u32,
    /// Where the page belongs.
    pub address: Lsn,
    /// Bytes left of the record that runs into this page, all later pages included.
    pub remaining_bytes: u32,
    /// What only the first page of a segment has.
    pub long: Option<LongHeader>,
}

/// What the header of a segment's first page adds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LongHeader {
    /// The system identifier.
    pub system_id: u64,
    /// Bytes of a segment, not checked.
    pub segment_bytes: u32,
    /// Bytes of a page, not checked.
    pub page_bytes: u32,
}

impl PageHeader {
    /// The header at the front of `bytes`, and what follows it.
    pub fn parse(bytes: &[u8]) -> Result<(Self, &[u8]), TooShort> {
        let mut fields = Reader::new("page header", bytes);
        let mut header = Self {
            magic: fields.u16()?,
            flags: fields.u16()?,
            timeline: fields.u32()?,
            address: fields.lsn()?,
            remaining_bytes: fields.u32()?,
            long: None,
        };
        fields.take(4)?;
        if header.flags & HAS_LONG_HEADER != 0 {
            header.long = Some(LongHeader {
                system_id: fields.u64()?,
                segment_bytes: fields.u32()?,
                page_bytes: fields.u32()?,
            });
        }
        Ok((header, fields.rest()))
    }

    /// True if the page begins with the rest of a record.
    pub const fn continues_record(&self) -> bool {
        self.flags & CONTINUES_RECORD != 0
    }
}

/// The flags that a version knows (`XLP_ALL_FLAGS`).
pub(crate) fn known_flags(major: Major) -> u16 {
    match major {
        Major::V13 | Major::V14 | Major::V15 | Major::V16 | Major::V17 | Major::V18 => 0xF,
        Major::V19 => 0x7,
    }
}

/// The flag of a page whose first record takes the place of one that was never finished
/// (`XLP_FIRST_IS_OVERWRITE_CONTRECORD`). Up to 18 the bit 4 was `XLP_BKP_REMOVABLE`.
pub(crate) fn overwrites_record(major: Major) -> u16 {
    match major {
        Major::V13 | Major::V14 | Major::V15 | Major::V16 | Major::V17 | Major::V18 => 0x8,
        Major::V19 => 0x4,
    }
}

/// What the first 40 bytes of a segment say about it.
///
/// Read without knowing the version: the layout of this header has been the same for decades, so
/// a segment of a newer server can be put where it belongs though its records cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentHead {
    /// The page magic.
    pub magic: u16,
    /// Whose magic it is; `None` if we know no such version.
    pub major: Option<Major>,
    /// The timeline of the first page: the segment's own, or, in a segment that was copied when
    /// its timeline began, an ancestor.
    pub timeline: TimelineId,
    /// Where the segment starts.
    pub start: Lsn,
    /// The system identifier.
    pub system_id: u64,
    /// The size of this cluster's segments.
    pub segment_size: SegmentSize,
}

/// The bytes are not the start of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum SegmentHeadError {
    /// Fewer than 40 bytes.
    #[error(transparent)]
    Short(#[from] TooShort),
    /// The long header is missing: not the first page of a segment.
    #[error("not the first page of a segment: flags=0x{flags:04X}")]
    NoLongHeader {
        /// The page's flags.
        flags: u16,
    },
    /// The size it names is none.
    #[error(transparent)]
    Size(#[from] InvalidSegmentSize),
    /// Its pages have another size than 8192.
    #[error("pages of another size: expected={PAGE_BYTES}, found={found}")]
    PageSize {
        /// Bytes of a page, as it says.
        found: u32,
    },
    /// It says that it belongs where no segment starts.
    #[error("not where a segment starts: lsn={found}")]
    Address {
        /// Where it says that it belongs.
        found: Lsn,
    },
    /// It is on timeline 0.
    #[error("page of timeline 0")]
    Timeline,
}

impl SegmentHead {
    /// Reads the first 40 bytes; more may follow.
    pub fn parse(bytes: &[u8]) -> Result<Self, SegmentHeadError> {
        let (header, _) = PageHeader::parse(bytes)?;
        let Some(long) = header.long else {
            return Err(SegmentHeadError::NoLongHeader {
                flags: header.flags,
            });
        };
        let segment_size = SegmentSize::from_bytes(u64::from(long.segment_bytes))?;
        if usize::try_from(long.page_bytes) != Ok(PAGE_BYTES) {
            return Err(SegmentHeadError::PageSize {
                found: long.page_bytes,
            });
        }
        if segment_size.offset_of(header.address) != 0 {
            return Err(SegmentHeadError::Address {
                found: header.address,
            });
        }
        Ok(Self {
            magic: header.magic,
            major: Major::from_page_magic(header.magic),
            timeline: TimelineId::new(header.timeline).ok_or(SegmentHeadError::Timeline)?,
            start: header.address,
            system_id: long.system_id,
            segment_size,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(magic: u16, flags: u16) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(magic.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(7_u32.to_le_bytes());
        bytes.extend((5_u64 << 20).to_le_bytes());
        bytes.extend([0; 8]);
        bytes.extend(42_u64.to_le_bytes());
        bytes.extend((1_u32 << 20).to_le_bytes());
        bytes.extend(8192_u32.to_le_bytes());
        bytes
    }

    #[test]
    fn a_segment_of_an_unknown_version_still_says_where_it_belongs() {
        let read = SegmentHead::parse(&head(0xD1FF, HAS_LONG_HEADER)).unwrap();
        assert_eq!(read.major, None);
        assert_eq!(
            (read.timeline.get(), read.start, read.system_id),
            (7, Lsn::new(5 << 20), 42)
        );
    }

    #[test]
    fn a_page_amid_a_segment_is_no_head() {
        let found = SegmentHead::parse(&head(0xD118, 0));
        assert_eq!(found, Err(SegmentHeadError::NoLongHeader { flags: 0 }));
    }

    #[test]
    fn says_how_much_was_missing() {
        let whole = head(0xD118, HAS_LONG_HEADER);
        for length in 0..LONG_HEADER_BYTES {
            let found = SegmentHead::parse(&whole[..length]);
            assert!(matches!(found, Err(SegmentHeadError::Short(_))), "{length}");
        }
    }
}
