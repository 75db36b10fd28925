//! Increments: the files `INCREMENTAL.<name>` that a server of 17 and later sends in place of
//! relations' files that were in the backup before, with no more than their changed blocks.
//!
//! | part    | bytes | content (`backup/basebackup_incremental.h`) |
//! |---------|------:|---------|
//! | magic   |     4 | [`MAGIC`] |
//! | blocks  |     4 | *n*, how many blocks are in it |
//! | length  |     4 | the file's least length since the backup before, in blocks |
//! | numbers |   4*n | the blocks' numbers in this file, ascending |
//! | padding |       | zeros up to a multiple of a block, if *n* is not 0 |
//! | content |       | the blocks |
//!
//! All numbers are those of the server's machine; little-endian is read. How a file is put together
//! from its increment and its predecessor is that of `pg_combinebackup/reconstruct.c`.

use std::ops::Range;

use crate::relation::split;
use crate::{BlockLayout, RelationFile, RelativePath, byte_count};

/// The first bytes of an increment (`INCREMENTAL_MAGIC`).
pub const MAGIC: u32 = 0xd3ae_1f0d;

/// What stands before the name of a relation's file (`INCREMENTAL_PREFIX`).
const PREFIX: &[u8] = b"INCREMENTAL.";
const FIXED_BYTES: usize = 12;

/// The path of the file that the increment of this path is of; `None` if it is no increment.
///
/// Only in a backup that was asked for as an increment: anybody may have a file of such a name.
pub fn plain_name(path: &RelativePath) -> Option<RelativePath> {
    let (directory, name) = split(path)?;
    let name = name.strip_prefix(PREFIX)?;
    let plain = RelativePath::parse(&[directory, b"/", name].concat()).ok()?;
    RelationFile::of(&plain).map(|_| plain)
}

/// What an increment says before its blocks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    layout: BlockLayout,
    truncated_to: u32,
    clamped_from: Option<u32>,
    blocks: Vec<u32>,
}

/// Where a block of the file comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// From the increment: it is the block of this index among those sent, from 0.
    Sent(usize),
    /// From the file of the backup before: its block of the same number.
    Before,
    /// From nowhere: all zeros.
    Zero,
}

/// Why bytes are not an increment.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IncrementError {
    /// The first bytes are not those of an increment.
    #[error("increment has a wrong magic number: expected {MAGIC:#010x}, found {found:#010x}")]
    Magic {
        /// The magic number found.
        found: u32,
    },
    /// It claims more blocks than its file can have.
    #[error("increment has too many blocks: limit {limit}, found {found}")]
    TooManyBlocks {
        /// Blocks of a segment.
        limit: u32,
        /// Blocks claimed.
        found: u32,
    },
    /// It has another length than its header says.
    #[error(
        "increment has another length than its header says: expected {expected}, found {found}"
    )]
    Length {
        /// Bytes by the header.
        expected: u64,
        /// Bytes that it has.
        found: u64,
    },
    /// A block's number is not above the one before.
    #[error("increment's blocks are not in order: block {found} after {before}")]
    Order {
        /// The number before.
        before: u32,
        /// The number found.
        found: u32,
    },
    /// A block lies beyond the end of the segment.
    #[error("increment's block is beyond its segment: limit {limit}, found {found}")]
    Beyond {
        /// Blocks of a segment.
        limit: u32,
        /// The number found.
        found: u32,
    },
    /// Something stands between the numbers and the blocks.
    #[error("increment's padding is not zero")]
    Padding,
}

impl Header {
    /// The least length that the file had since the backup before, in blocks: nothing from there on
    /// may come from that backup. At most a segment's.
    pub fn truncated_to(&self) -> u32 {
        self.truncated_to
    }

    /// What stood there, if it was more than a segment has: servers before the fix of 2026 say so
    /// for all but the last segment of a relation that was truncated. To be said, no harm.
    pub fn clamped_from(&self) -> Option<u32> {
        self.clamped_from
    }

    /// The numbers in this file of the blocks that were sent, ascending.
    pub fn blocks(&self) -> &[u32] {
        &self.blocks
    }

    /// Those of the blocks that were sent which lie in a half-open range: their places among all
    /// that were sent.
    pub fn sent(&self, range: Range<u32>) -> Range<usize> {
        let place = |number| self.blocks.partition_point(|block| *block < number);
        place(range.start)..place(range.end).max(place(range.start))
    }

    /// Bytes before the first block.
    pub fn header_bytes(&self) -> u64 {
        header_bytes(self.layout, self.blocks.len())
    }

    /// Length of the file that is put together, in blocks.
    pub fn rebuilt_blocks(&self) -> u32 {
        let after_last = self.blocks.last().map_or(0, |last| last.saturating_add(1));
        self.truncated_to.max(after_last)
    }

    /// Where this block of the file comes from, if the file of the backup before has
    /// `before_blocks` whole blocks ([`BlockLayout::whole_blocks`]).
    pub fn source(&self, block: u32, before_blocks: u32) -> Source {
        match self.blocks.binary_search(&block) {
            Ok(place) => Source::Sent(place),
            Err(_) if block < self.truncated_to.min(before_blocks) => Source::Before,
            Err(_) => Source::Zero,
        }
    }
}

/// Reads the header of an increment as its bytes arrive.
///
/// They may be damaged or hostile: never panics, and holds at most what the header of a segment has
/// that changed everywhere.
#[derive(Debug, Clone)]
pub struct HeaderParser {
    layout: BlockLayout,
    member_bytes: u64,
    /// The header's bytes that have arrived.
    pending: Vec<u8>,
}

impl HeaderParser {
    /// At the first byte of an increment that has `member_bytes` in the archive.
    pub fn new(layout: BlockLayout, member_bytes: u64) -> Result<Self, IncrementError> {
        let least = byte_count(FIXED_BYTES);
        if member_bytes < least {
            return Err(IncrementError::Length {
                expected: least,
                found: member_bytes,
            });
        }
        Ok(Self {
            layout,
            member_bytes,
            pending: Vec::new(),
        })
    }

    /// Takes from the front of `bytes` what belongs to the header, and gives the header once that
    /// was all of it: what is left then are blocks, as many as it says.
    pub fn push(&mut self, bytes: &mut &[u8]) -> Result<Option<Header>, IncrementError> {
        self.fill_pending(byte_count(FIXED_BYTES), bytes);
        let Some(fixed) = self.pending.first_chunk() else {
            return Ok(None);
        };
        let counts = Counts::parse(fixed, self.layout, self.member_bytes)?;
        let whole = header_bytes(self.layout, counts.blocks);
        self.fill_pending(whole, bytes);
        if byte_count(self.pending.len()) < whole {
            return Ok(None);
        }
        let numbers = self.pending.get(FIXED_BYTES..).unwrap_or_default();
        let header = counts.with_numbers(numbers, self.layout)?;
        self.pending = Vec::new();
        Ok(Some(header))
    }

    /// Moves bytes from the front of `bytes` to `pending` until it has `whole`.
    fn fill_pending(&mut self, whole: u64, bytes: &mut &[u8]) {
        let missing = whole.saturating_sub(byte_count(self.pending.len()));
        let missing = usize::try_from(missing).unwrap_or(usize::MAX);
        let (taken, rest) = bytes.split_at_checked(missing).unwrap_or((bytes, &[]));
        self.pending.extend_from_slice(taken);
        *bytes = rest;
    }
}

/// What stands before the blocks' numbers.
struct Counts {
    blocks: usize,
    truncated_to: u32,
}

impl Counts {
    fn parse(
        fixed: &[u8; FIXED_BYTES],
        layout: BlockLayout,
        member_bytes: u64,
    ) -> Result<Self, IncrementError> {
        let [m0, m1, m2, m3, n0, n1, n2, n3, t0, t1, t2, t3] = *fixed;
        let magic = u32::from_le_bytes([m0, m1, m2, m3]);
        if magic != MAGIC {
            return Err(IncrementError::Magic { found: magic });
        }
        let limit = layout.segment_blocks();
        let found = u32::from_le_bytes([n0, n1, n2, n3]);
        let blocks = match usize::try_from(found) {
            Ok(blocks) if found <= limit => blocks,
            _ => return Err(IncrementError::TooManyBlocks { limit, found }),
        };
        let content = u64::from(found).saturating_mul(layout.block_bytes().into());
        let expected = header_bytes(layout, blocks).saturating_add(content);
        if expected != member_bytes {
            return Err(IncrementError::Length {
                expected,
                found: member_bytes,
            });
        }
        Ok(Self {
            blocks,
            truncated_to: u32::from_le_bytes([t0, t1, t2, t3]),
        })
    }

    /// `rest` is all of the header that follows.
    fn with_numbers(self, rest: &[u8], layout: BlockLayout) -> Result<Header, IncrementError> {
        let (numbers, _) = rest.as_chunks();
        let (numbers, padding) = numbers
            .split_at_checked(self.blocks)
            .unwrap_or((numbers, &[]));
        if padding.iter().any(|padding| *padding != [0; 4]) {
            return Err(IncrementError::Padding);
        }
        let limit = layout.segment_blocks();
        let mut blocks = Vec::with_capacity(numbers.len());
        for number in numbers {
            let found = u32::from_le_bytes(*number);
            match blocks.last() {
                Some(&before) if before >= found => {
                    return Err(IncrementError::Order { before, found });
                }
                _ if found >= limit => return Err(IncrementError::Beyond { limit, found }),
                _ => blocks.push(found),
            }
        }
        Ok(Header {
            layout,
            truncated_to: self.truncated_to.min(limit),
            clamped_from: (self.truncated_to > limit).then_some(self.truncated_to),
            blocks,
        })
    }
}

/// `GetIncrementalHeaderSize`.
fn header_bytes(layout: BlockLayout, blocks: usize) -> u64 {
    let numbers = byte_count(blocks).saturating_mul(4);
    let unpadded = numbers.saturating_add(byte_count(FIXED_BYTES));
    if blocks == 0 {
        return unpadded;
    }
    unpadded.next_multiple_of(layout.block_bytes().into())
}
