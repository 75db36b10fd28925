//! Records and their headers (`xlogrecord.h`, `XLogRecord` and what follows it).
//!
//! ```text
//!  0  u32  bytes in all        16  u8   info: the upper half is the manager's
//!  4  u32  transaction, or 0   17  u8   resource manager
//!  8  u64  start of the        18       padding
//!          record before       20  u32  CRC-32C of bytes [24, end) and then [0, 20)
//! 24  headers of blocks and of the main data, then their bytes in that order, main data last
//! ```

use std::ops::Range;

use thiserror::Error;

use crate::lsn::{Lsn, WalRange};
use crate::major::Major;
use crate::reader::{Reader, TooShort};

/// Bytes of a record's header.
pub const HEADER_BYTES: usize = 24;
/// No record is longer, in bytes: readers of all versions give up before 1 GiB (`mcxt.h`,
/// `MaxAllocSize`); since 16 none is written above 1020 MiB (`XLogRecordMaxSize`).
pub const LARGEST_BYTES: u32 = 1 << 30;

const CRC_AT: usize = 20;
const _: () = assert!(CRC_AT + 4 == HEADER_BYTES);

/// Resource managers by number (`rmgrlist.h`); extensions have 128 to 255.
pub mod rmgr {
    /// The log itself: checkpoints, switches, restore points.
    pub const XLOG: u8 = 0;
    /// Transactions.
    pub const XACT: u8 = 1;
    /// Files of relations.
    pub const SMGR: u8 = 2;
    /// Databases.
    pub const DBASE: u8 = 4;
    /// Tablespaces.
    pub const TBLSPC: u8 = 5;

    /// True for those whose records are read further, see [`Record::body`](super::Record::body).
    /// Nine of ten records are not theirs.
    pub(crate) const fn has_bodies(number: u8) -> bool {
        matches!(number, XLOG | XACT | SMGR | DBASE | TBLSPC)
    }

    const NAMES: [&str; 22] = [
        "XLOG",
        "Transaction",
        "Storage",
        "CLOG",
        "Database",
        "Tablespace",
        "MultiXact",
        "RelMap",
        "Standby",
        "Heap2",
        "Heap",
        "Btree",
        "Hash",
        "Gin",
        "Gist",
        "Sequence",
        "SPGist",
        "BRIN",
        "CommitTs",
        "ReplicationOrigin",
        "Generic",
        "LogicalMessage",
    ];

    /// The name that `pg_waldump` prints, for those that all known versions have.
    pub fn name(number: u8) -> Option<&'static str> {
        NAMES.get(usize::from(number)).copied()
    }
}

/// The header of a record, as it stands there: nothing is checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordHeader {
    /// Bytes of the whole record, without page headers between and padding behind.
    pub total_bytes: u32,
    /// The transaction that wrote it, or 0.
    pub xid: u32,
    /// Where the record before starts.
    pub prev: Lsn,
    /// The upper four bits say what the record is, to its resource manager.
    pub info: u8,
    /// The resource manager, see [`rmgr`].
    pub rmgr: u8,
    /// The checksum.
    pub crc: u32,
}

impl RecordHeader {
    /// The header at the front of `bytes`, and what follows it.
    pub fn parse(bytes: &[u8]) -> Result<(Self, &[u8]), TooShort> {
        let mut fields = Reader::new("record header", bytes);
        let total_bytes = fields.u32()?;
        let xid = fields.u32()?;
        let prev = fields.lsn()?;
        let info = fields.u8()?;
        let rmgr = fields.u8()?;
        fields.take(2)?;
        let crc = fields.u32()?;
        Ok((
            Self {
                total_bytes,
                xid,
                prev,
                info,
                rmgr,
                crc,
            },
            fields.rest(),
        ))
    }

    /// True for the record that ends its segment early (`pg_control.h`, `XLOG_SWITCH`).
    pub const fn is_switch(&self) -> bool {
        self.rmgr == rmgr::XLOG && self.info & 0xF0 == 0x40
    }

    /// True for the record that stands in place of one never finished (`pg_control.h`,
    /// `XLOG_OVERWRITE_CONTRECORD`).
    pub const fn is_overwrite(&self) -> bool {
        self.rmgr == rmgr::XLOG && self.info & 0xF0 == 0xD0
    }
}

/// A record whose checksum was found right. What restores need of it is in [`Record::body`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Where it starts.
    pub start: Lsn,
    /// The byte after its last.
    pub end: Lsn,
    /// Where the next record starts, or its page does: the end in steps of eight bytes; after a
    /// switch, the next segment.
    pub next: Lsn,
    /// Its header.
    pub header: RecordHeader,
    /// The part that belongs to the record and not to one of the blocks it changes; kept only of
    /// those managers' records that [`Record::body`] reads, else empty.
    pub main_data: Vec<u8>,
}

impl Record {
    /// From its first byte to its last; page headers may stand between.
    pub const fn range(&self) -> WalRange {
        WalRange::new(self.start, self.end)
    }
}

/// The parts of a record do not add up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum LayoutError {
    /// The headers run over the end.
    #[error(transparent)]
    Short(#[from] TooShort),
    /// A header of no known kind, or blocks out of order.
    #[error("unexpected block id: offset={offset}, found={found}")]
    BlockId {
        /// Where it stands, in bytes after the record's header.
        offset: usize,
        /// The id.
        found: u8,
    },
    /// A block's relation is the one before, and there was none.
    #[error("block without a relation: offset={offset}")]
    NoRelation {
        /// Where the block's header ends, in bytes after the record's header.
        offset: usize,
    },
    /// The bytes behind the headers are not as many as they announce.
    #[error("wrong number of data bytes: expected={expected}, found={found}")]
    DataBytes {
        /// As the headers say.
        expected: u64,
        /// As there are.
        found: u64,
    },
}

/// The checksum of a whole record (`xlogreader.c`, `ValidXLogRecord`).
pub(crate) fn checksum(record: &[u8]) -> Option<u32> {
    let (head, data) = record.split_at_checked(HEADER_BYTES)?;
    Some(crc32c::crc32c_append(
        crc32c::crc32c(data),
        head.get(..CRC_AT)?,
    ))
}

// xlogrecord.h, XLogRecordBlockHeader and the ids above XLR_MAX_BLOCK_ID
const LARGEST_BLOCK_ID: u8 = 32;
const TOP_XID: u8 = 252;
const ORIGIN: u8 = 253;
const MAIN_DATA_LONG: u8 = 254;
const MAIN_DATA_SHORT: u8 = 255;
const HAS_IMAGE: u8 = 0x10;
const HAS_DATA: u8 = 0x20;
const SAME_RELATION: u8 = 0x80;
const IMAGE_HAS_HOLE: u8 = 0x1;
const LOCATOR_BYTES: usize = 12;

/// Where the main data lies in `parts`, the bytes of a record behind its header (`xlogreader.c`,
/// `DecodeXLogRecord`).
pub(crate) fn main_data(parts: &[u8], major: Major) -> Result<Range<usize>, LayoutError> {
    let total = u64_of(parts.len());
    let mut fields = Reader::new("record", parts);
    let mut announced = 0_u64;
    let mut main_bytes = 0_u64;
    let mut last_block = None;
    let mut has_relation = false;
    while u64_of(fields.rest().len()) > announced {
        let offset = fields.offset();
        match fields.u8()? {
            MAIN_DATA_SHORT => {
                main_bytes = u64::from(fields.u8()?);
                break;
            }
            MAIN_DATA_LONG => {
                main_bytes = u64::from(fields.u32()?);
                break;
            }
            ORIGIN => {
                fields.u16()?;
            }
            TOP_XID if major >= Major::V14 => {
                fields.u32()?;
            }
            id if id <= LARGEST_BLOCK_ID && last_block.is_none_or(|last| id > last) => {
                last_block = Some(id);
                let block = block_header(&mut fields, major)?;
                announced = announced.saturating_add(block.bytes);
                has_relation |= block.names_relation;
                if !has_relation {
                    return Err(LayoutError::NoRelation {
                        offset: fields.offset(),
                    });
                }
            }
            found => return Err(LayoutError::BlockId { offset, found }),
        }
    }
    let expected = announced.saturating_add(main_bytes);
    let found = u64_of(fields.rest().len());
    if expected != found {
        return Err(LayoutError::DataBytes { expected, found });
    }
    let start = total.saturating_sub(main_bytes);
    Ok(usize::try_from(start).unwrap_or(parts.len())..parts.len())
}

struct BlockHeader {
    /// Of its image and data together.
    bytes: u64,
    names_relation: bool,
}

fn block_header(fields: &mut Reader<'_>, major: Major) -> Result<BlockHeader, LayoutError> {
    let flags = fields.u8()?;
    let data_bytes = fields.u16()?;
    if (flags & HAS_DATA != 0) != (data_bytes != 0) {
        let expected = u64::from(flags & HAS_DATA);
        return Err(LayoutError::DataBytes {
            expected,
            found: u64::from(data_bytes),
        });
    }
    let mut bytes = u64::from(data_bytes);
    if flags & HAS_IMAGE != 0 {
        let image_bytes = fields.u16()?;
        let _hole_offset = fields.u16()?;
        let info = fields.u8()?;
        if info & IMAGE_HAS_HOLE != 0 && info & compressed_image(major) != 0 {
            let _hole_bytes = fields.u16()?;
        }
        bytes = bytes.saturating_add(u64::from(image_bytes));
    }
    let names_relation = flags & SAME_RELATION == 0;
    if names_relation {
        fields.take(LOCATOR_BYTES)?;
    }
    let _block = fields.u32()?;
    Ok(BlockHeader {
        bytes,
        names_relation,
    })
}

/// The flags of a compressed image: one up to 14, one for each method since (`BKPIMAGE_*`).
fn compressed_image(major: Major) -> u8 {
    if major >= Major::V15 {
        0x4 | 0x8 | 0x10
    } else {
        0x2
    }
}

fn u64_of(length: usize) -> u64 {
    u64::try_from(length).unwrap_or(u64::MAX)
}
