//! The tar of a base backup: plain ustar, as PostgreSQL writes it by hand.
//!
//! src/port/tar.c, `tarCreateHeader`: names of at most 99 bytes, no prefix, types `0`, `2` and `5`,
//! numbers in octal or, where they overflow, in base 256. Directories and links end in a slash.
//! 13 and 14 send no zero blocks at the end, 15 and later two. Whatever PostgreSQL never sends, pax
//! and GNU long names among it, is refused by name rather than guessed at.

use crate::{RelativePath, UnsafePath, byte_count};

/// Headers stand at multiples of this, and content is padded to one.
pub const BLOCK_BYTES: usize = 512;

/// Something in an archive, in the order of its bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TarEvent<'a> {
    /// A file begins; as many bytes as `size` says follow in [`TarEvent::FileData`].
    File {
        /// Its path below the archive's root.
        path: RelativePath,
        /// Its length in bytes.
        size: u64,
        /// Its permission bits.
        mode: u32,
        /// When it was last changed: seconds since 1970-01-01 UTC.
        mtime: u64,
    },
    /// The next bytes of the file.
    FileData(&'a [u8]),
    /// The file is whole.
    FileEnd,
    /// A directory.
    Directory {
        /// Its path below the archive's root.
        path: RelativePath,
        /// Its permission bits.
        mode: u32,
    },
    /// A symbolic link. Where it may lead is for the caller to decide.
    Symlink {
        /// Its path below the archive's root.
        path: RelativePath,
        /// Where it leads, unchecked.
        target: Vec<u8>,
        /// Its permission bits.
        mode: u32,
    },
}

/// Why bytes are not an archive of PostgreSQL's. Offsets count from the archive's first byte.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TarError {
    /// The header's checksum does not match.
    #[error("tar header is damaged at byte {offset}: expected checksum {expected}, found {found}")]
    Checksum {
        /// Where the header stands.
        offset: u64,
        /// As the header has it.
        expected: u64,
        /// As computed.
        found: u64,
    },
    /// The header does not say `ustar`.
    #[error("not a ustar header at byte {offset}: found magic {found:?}")]
    NotUstar {
        /// Where the header stands.
        offset: u64,
        /// What stands in the magic's place.
        found: String,
    },
    /// A number is neither octal nor base 256, or too large.
    #[error("tar header has a bad {field} at byte {offset}: found {found:?}")]
    Number {
        /// Where the header stands.
        offset: u64,
        /// Which number.
        field: &'static str,
        /// Its bytes.
        found: String,
    },
    /// A member that PostgreSQL does not send: a hard link, a device, a pax or GNU extension.
    #[error("tar member of a type that PostgreSQL does not send at byte {offset}: type {found:?}")]
    Type {
        /// Where the header stands.
        offset: u64,
        /// The type byte.
        found: char,
    },
    /// The path is split in two, which PostgreSQL does not do.
    #[error("tar header has a path prefix at byte {offset}")]
    Prefix {
        /// Where the header stands.
        offset: u64,
    },
    /// The path leads out of the archive's root.
    #[error("tar header has an unsafe path at byte {offset}")]
    Path {
        /// Where the header stands.
        offset: u64,
        /// What is wrong with the path.
        source: UnsafePath,
    },
    /// A directory or link that claims content.
    #[error("tar member without content has a size at byte {offset}: {size}")]
    Size {
        /// Where the header stands.
        offset: u64,
        /// The size it claims.
        size: u64,
    },
    /// The bytes that fill a member's last block are not zero.
    #[error("tar padding is not zero at byte {offset}")]
    Padding {
        /// Where the first byte that is not zero stands.
        offset: u64,
    },
    /// Something follows the zero block that ends an archive.
    #[error("tar archive goes on after its end at byte {offset}")]
    AfterEnd {
        /// Where the block that is not zero stands.
        offset: u64,
    },
    /// The archive ends inside a member, a header or its final blocks.
    #[error("tar archive is cut short: at least {missing} bytes are missing after byte {offset}")]
    Truncated {
        /// Length of what there was.
        offset: u64,
        /// How many bytes the member at hand lacks.
        missing: u64,
    },
}

/// Follows one archive through pieces of any length.
///
/// The bytes may be damaged or hostile: never panics, and holds at most one header.
#[derive(Debug)]
pub struct TarParser {
    state: State,
    /// Bytes taken.
    offset: u64,
    /// A header that has not come whole.
    header: Vec<u8>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Before or inside a header.
    Header,
    /// Inside a file.
    Content { left: u64, padding: u64 },
    /// In the zeros after a file's last byte.
    Padding { left: u64 },
    /// Zero blocks have come: `blocks` whole ones.
    End { blocks: u64 },
}

impl TarParser {
    /// A parser at an archive's first byte.
    pub fn new() -> Self {
        Self {
            state: State::Header,
            offset: 0,
            header: Vec::new(),
        }
    }

    /// The next event, taken from the front of `input`; `None` when `input` is used up.
    ///
    /// To be called until it says `None`, also when `input` is empty: an empty file's end needs no
    /// further byte. After an error the parser is of no further use.
    pub fn next_event<'a>(
        &mut self,
        input: &mut &'a [u8],
    ) -> Result<Option<TarEvent<'a>>, TarError> {
        loop {
            match self.state {
                State::Content { left: 0, padding } => {
                    self.state = State::Padding { left: padding };
                    return Ok(Some(TarEvent::FileEnd));
                }
                State::Padding { left: 0 } => self.state = State::Header,
                _ if input.is_empty() => return Ok(None),
                State::Content { left, padding } => {
                    let data = self.take(input, left);
                    let left = left.saturating_sub(byte_count(data.len()));
                    self.state = State::Content { left, padding };
                    return Ok(Some(TarEvent::FileData(data)));
                }
                State::Padding { left } => {
                    let offset = self.offset;
                    let zeros = self.take(input, left);
                    if let Some(at) = zeros.iter().position(|byte| *byte != 0) {
                        let offset = offset.saturating_add(byte_count(at));
                        return Err(TarError::Padding { offset });
                    }
                    let left = left.saturating_sub(byte_count(zeros.len()));
                    self.state = State::Padding { left };
                }
                State::Header | State::End { .. } => {
                    if let Some(event) = self.take_block(input)? {
                        return Ok(Some(event));
                    }
                }
            }
        }
    }

    /// Ends the archive; an error if it is not whole.
    pub fn finish(self) -> Result<(), TarError> {
        let missing = match self.state {
            State::Content { left, padding } => left.saturating_add(padding),
            State::Padding { left } => left,
            // A single zero block is half an end.
            State::End { blocks: 1 } => byte_count(BLOCK_BYTES.saturating_sub(self.header.len())),
            State::Header | State::End { .. } if self.header.is_empty() => 0,
            State::Header | State::End { .. } => {
                byte_count(BLOCK_BYTES.saturating_sub(self.header.len()))
            }
        };
        if missing == 0 {
            Ok(())
        } else {
            Err(TarError::Truncated {
                offset: self.offset,
                missing,
            })
        }
    }

    fn take_block(&mut self, input: &mut &[u8]) -> Result<Option<TarEvent<'static>>, TarError> {
        let missing = BLOCK_BYTES.saturating_sub(self.header.len());
        let taken = self.take(input, byte_count(missing));
        self.header.extend_from_slice(taken);
        let Ok(block) = <[u8; BLOCK_BYTES]>::try_from(self.header.as_slice()) else {
            return Ok(None);
        };
        self.header.clear();
        let offset = self.offset.saturating_sub(byte_count(BLOCK_BYTES));
        let is_zero = block.iter().all(|byte| *byte == 0);
        match self.state {
            State::End { blocks } if is_zero => {
                self.state = State::End {
                    blocks: blocks.saturating_add(1),
                };
                Ok(None)
            }
            State::End { .. } => Err(TarError::AfterEnd { offset }),
            _ if is_zero => {
                self.state = State::End { blocks: 1 };
                Ok(None)
            }
            _ => {
                let event = member(&block, offset)?;
                if let TarEvent::File { size, .. } = event {
                    let block = byte_count(BLOCK_BYTES);
                    let padding = size.wrapping_neg() & block.saturating_sub(1);
                    self.state = State::Content {
                        left: size,
                        padding,
                    };
                }
                Ok(Some(event))
            }
        }
    }

    fn take<'a>(&mut self, input: &mut &'a [u8], at_most: u64) -> &'a [u8] {
        let length = usize::try_from(at_most).map_or(input.len(), |most| most.min(input.len()));
        let (taken, rest) = input.split_at_checked(length).unwrap_or((input, &[]));
        *input = rest;
        self.offset = self.offset.saturating_add(byte_count(taken.len()));
        taken
    }
}

impl Default for TarParser {
    fn default() -> Self {
        Self::new()
    }
}

/// A header's fields: name, offset and length (src/include/pgtar.h, POSIX ustar).
const NAME: (usize, usize) = (0, 100);
const MODE: (usize, usize) = (100, 8);
const SIZE: (usize, usize) = (124, 12);
const MTIME: (usize, usize) = (136, 12);
const CHECKSUM: (usize, usize) = (148, 8);
const TYPE: (usize, usize) = (156, 1);
const LINK_TARGET: (usize, usize) = (157, 100);
const MAGIC: (usize, usize) = (257, 6);
const PREFIX: (usize, usize) = (345, 155);

fn member(block: &[u8; BLOCK_BYTES], offset: u64) -> Result<TarEvent<'static>, TarError> {
    let magic = field(block, MAGIC);
    if magic != b"ustar\0" {
        return Err(TarError::NotUstar {
            offset,
            found: magic.escape_ascii().to_string(),
        });
    }
    let number = |at, name| {
        let bytes = field(block, at);
        parse_number(bytes).ok_or_else(|| TarError::Number {
            offset,
            field: name,
            found: bytes.escape_ascii().to_string(),
        })
    };
    let expected = number(CHECKSUM, "checksum")?;
    let found = checksum(block);
    if found != expected {
        return Err(TarError::Checksum {
            offset,
            expected,
            found,
        });
    }
    if field(block, PREFIX).iter().any(|byte| *byte != 0) {
        return Err(TarError::Prefix { offset });
    }
    let kind = field(block, TYPE).first().copied().unwrap_or(0);
    let name = up_to_nul(field(block, NAME));
    // 13 to 19 send `./pg_wal/archive_status/` beside `pg_wal/` (basebackup.c, sendDir).
    let name = name.strip_prefix(b"./").unwrap_or(name);
    let name = match kind {
        b'2' | b'5' => name.strip_suffix(b"/").unwrap_or(name),
        _ => name,
    };
    let size = number(SIZE, "size")?;
    let mode = number(MODE, "mode")?;
    let mode = u32::try_from(mode & 0o7777).expect("twelve bits fit in 32");
    let mtime = number(MTIME, "modification time")?;
    let path = || RelativePath::parse(name).map_err(|source| TarError::Path { offset, source });
    if kind != b'0' && size != 0 && matches!(kind, b'2' | b'5') {
        return Err(TarError::Size { offset, size });
    }
    match kind {
        b'0' => Ok(TarEvent::File {
            path: path()?,
            size,
            mode,
            mtime,
        }),
        b'2' => {
            let target = up_to_nul(field(block, LINK_TARGET)).to_vec();
            Ok(TarEvent::Symlink {
                path: path()?,
                target,
                mode,
            })
        }
        b'5' => Ok(TarEvent::Directory {
            path: path()?,
            mode,
        }),
        other => Err(TarError::Type {
            offset,
            found: char::from(other),
        }),
    }
}

fn field(block: &[u8; BLOCK_BYTES], (offset, length): (usize, usize)) -> &[u8] {
    let end = offset.saturating_add(length);
    block
        .get(offset..end)
        .expect("the fields above lie within a block")
}

fn up_to_nul(bytes: &[u8]) -> &[u8] {
    bytes.split(|byte| *byte == 0).next().unwrap_or_default()
}

/// The sum of a header's bytes, its checksum's own taken as spaces.
fn checksum(block: &[u8; BLOCK_BYTES]) -> u64 {
    let sum = |bytes: &[u8]| bytes.iter().map(|byte| u64::from(*byte)).sum::<u64>();
    let spaces = u64::from(b' ').saturating_mul(byte_count(CHECKSUM.1));
    sum(block)
        .saturating_sub(sum(field(block, CHECKSUM)))
        .saturating_add(spaces)
}

/// src/port/tar.c, `print_tar_number`: octal digits and a space, or 0x80 and a big-endian number.
fn parse_number(bytes: &[u8]) -> Option<u64> {
    if let Some((0x80, number)) = bytes.split_first().map(|(first, rest)| (*first, rest)) {
        return number.iter().try_fold(0_u64, |value, byte| {
            value.checked_mul(256)?.checked_add(u64::from(*byte))
        });
    }
    let end = bytes
        .iter()
        .position(|byte| matches!(byte, b' ' | 0))
        .unwrap_or(bytes.len());
    let (digits, rest) = bytes.split_at_checked(end)?;
    let is_blank = rest.iter().all(|byte| matches!(byte, b' ' | 0));
    if digits.is_empty() || !is_blank {
        return None;
    }
    digits.iter().try_fold(0_u64, |value, byte| match byte {
        b'0'..=b'7' => value
            .checked_mul(8)?
            .checked_add(u64::from(byte.checked_sub(b'0')?)),
        _ => None,
    })
}
