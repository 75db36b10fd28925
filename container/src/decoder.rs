//! An object back to plain bytes.

use std::fmt;

use zstd::zstd_safe::{DCtx, InBuffer, OutBuffer};

use crate::frame::{self, ZSTD_MAGIC};
use crate::header::FRAME_HEAD_BYTES;
use crate::trailer::TRAILER_MAGIC;
use crate::{
    Error, Header, MAX_TRAILER_BYTES, Part, Reading, TAIL_BYTES, Trailer, byte_count, digest_text,
    read_header, read_trailer,
};

const MAGIC_BYTES: usize = 4;
/// The largest block of a zstd frame: one call gives at least as much.
const OUTPUT_BYTES: usize = 128 * 1024;

/// Reads one object as its bytes arrive, in stretches of any length.
///
/// The bytes may be damaged or hostile: never panics, and holds at most an 8 MiB window and the
/// header and trailer at their limits. **Plain bytes given out before [`Decoder::finish`] returned
/// are not verified**; nothing may be made of them that cannot be thrown away.
pub struct Decoder {
    state: State,
    header: Option<Header>,
    /// The part at hand where it has to be seen whole: header, magic number, trailer.
    pending: Vec<u8>,
    decompressor: DCtx<'static>,
    output: Vec<u8>,
    /// All bytes taken, the trailer's too.
    object_bytes: u64,
    stored_crc32: crc32fast::Hasher,
    plain_bytes: u64,
    plain_bytes_max: u64,
    plain_digest: blake3::Hasher,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Header,
    /// Before a frame or the trailer.
    Between,
    /// Inside the frame that began at `offset`.
    Frame {
        offset: u64,
    },
    Trailer,
}

impl Decoder {
    /// A decoder that gives out at most `max_plain_bytes`.
    pub fn new(max_plain_bytes: u64) -> Result<Self, Error> {
        Ok(Self {
            state: State::Header,
            header: None,
            pending: Vec::new(),
            decompressor: frame::decompressor()?,
            output: vec![0; OUTPUT_BYTES],
            object_bytes: 0,
            stored_crc32: crc32fast::Hasher::new(),
            plain_bytes: 0,
            plain_bytes_max: max_plain_bytes,
            plain_digest: blake3::Hasher::new(),
        })
    }

    /// The header, once enough bytes were pushed.
    pub fn header(&self) -> Option<&Header> {
        self.header.as_ref()
    }

    /// Takes the next bytes of the object and appends their plain bytes to `out`.
    ///
    /// A few stored bytes can become many plain ones, up to the decoder's limit; where that is
    /// large, [`Decoder::push_to`] keeps memory bounded.
    pub fn push(&mut self, bytes: &[u8], out: &mut Vec<u8>) -> Result<(), Error> {
        self.push_to(bytes, |plain| out.extend_from_slice(plain))
    }

    /// Takes the next bytes of the object and hands their plain bytes to `sink`, at most 128 KiB at
    /// a time.
    pub fn push_to(&mut self, bytes: &[u8], mut sink: impl FnMut(&[u8])) -> Result<(), Error> {
        let mut rest = bytes;
        while !rest.is_empty() {
            rest = match self.state {
                State::Header => self.take_header(rest)?,
                State::Between => self.take_magic(rest, &mut sink)?,
                State::Frame { offset } => self.take_frame(offset, rest, &mut sink)?,
                State::Trailer => self.take_trailer(rest)?,
            };
        }
        Ok(())
    }

    /// Ends the object: only now are its plain bytes known to be those that were written.
    pub fn finish(self) -> Result<(Header, Trailer), Error> {
        let cut = |part: Part, at_least: u64| Error::Truncated {
            part,
            expected: at_least,
            found: self.object_bytes,
        };
        let more = self.object_bytes.saturating_add(1);
        let header = match (self.state, self.header) {
            (State::Header, _) | (_, None) => {
                return Err(match read_header(&self.pending)? {
                    Reading::NeedMore(bytes) => cut(Part::Header, bytes),
                    Reading::Done(_) => cut(Part::Header, more),
                });
            }
            (State::Between | State::Frame { .. }, _) => return Err(cut(Part::Frames, more)),
            (State::Trailer, Some(header)) => header,
        };
        let payload = trailer_payload(&self.pending);
        let whole = payload.map(|payload| payload.saturating_add(byte_count(FRAME_HEAD_BYTES)));
        let found = byte_count(self.pending.len());
        match whole {
            Some(whole) if found == whole => {}
            Some(whole) if found > whole => {
                return Err(Error::Trailing {
                    part: Part::Trailer,
                    expected: whole,
                    found,
                });
            }
            _ => {
                let missing = whole.map_or(1, |whole| whole.saturating_sub(found));
                return Err(cut(
                    Part::Trailer,
                    self.object_bytes.saturating_add(missing),
                ));
            }
        }
        let Reading::Done(trailer) = read_trailer(&self.pending, found)? else {
            // The tail claims a longer trailer than its frame has room for.
            return Err(cut(Part::Trailer, more));
        };
        let crc32 = self.stored_crc32.finalize();
        if crc32 != trailer.stored_crc32 {
            return Err(Error::StoredChecksum {
                expected: trailer.stored_crc32,
                found: crc32,
            });
        }
        if self.plain_bytes != trailer.plain_bytes {
            return Err(Error::PlainLength {
                part: Part::Plain,
                expected: trailer.plain_bytes,
                found: self.plain_bytes,
            });
        }
        let digest = digest_text(&self.plain_digest.finalize());
        if digest != trailer.digest {
            return Err(Error::Digest {
                expected: trailer.digest,
                found: digest,
            });
        }
        Ok((header, trailer))
    }

    fn take_header<'a>(&mut self, bytes: &'a [u8]) -> Result<&'a [u8], Error> {
        let rest = match read_header(&self.pending)? {
            Reading::NeedMore(whole) => self.fill_pending(whole, bytes),
            Reading::Done(_) => bytes,
        };
        if let Reading::Done((header, _)) = read_header(&self.pending)? {
            header.check_readable()?;
            self.header = Some(header);
            self.stored_crc32.update(&self.pending);
            self.pending.clear();
            self.state = State::Between;
        }
        Ok(rest)
    }

    fn take_magic<'a>(
        &mut self,
        bytes: &'a [u8],
        sink: &mut impl FnMut(&[u8]),
    ) -> Result<&'a [u8], Error> {
        let rest = self.fill_pending(byte_count(MAGIC_BYTES), bytes);
        let Ok(magic) = <[u8; MAGIC_BYTES]>::try_from(self.pending.as_slice()) else {
            return Ok(rest);
        };
        let offset = self.object_bytes.saturating_sub(byte_count(MAGIC_BYTES));
        match u32::from_le_bytes(magic) {
            ZSTD_MAGIC => {
                self.pending.clear();
                self.object_bytes = offset;
                self.state = State::Frame { offset };
                self.take_frame(offset, &magic, sink)?;
                Ok(rest)
            }
            TRAILER_MAGIC => {
                self.state = State::Trailer;
                Ok(rest)
            }
            found => Err(Error::UnknownFrame { offset, found }),
        }
    }

    fn take_frame<'a>(
        &mut self,
        offset: u64,
        bytes: &'a [u8],
        sink: &mut impl FnMut(&[u8]),
    ) -> Result<&'a [u8], Error> {
        let mut input = InBuffer::around(bytes);
        let rest = loop {
            let mut output = OutBuffer::around(self.output.as_mut_slice());
            let left = self
                .decompressor
                .decompress_stream(&mut output, &mut input)
                .map_err(|code| frame::failed(code, offset))?;
            let room_left = output.pos() < output.capacity();
            let plain = output.as_slice();
            self.plain_bytes = self.plain_bytes.saturating_add(byte_count(plain.len()));
            if self.plain_bytes > self.plain_bytes_max {
                return Err(Error::TooLarge {
                    part: Part::Plain,
                    limit: self.plain_bytes_max,
                    found: self.plain_bytes,
                });
            }
            if !plain.is_empty() {
                self.plain_digest.update(plain);
                sink(plain);
            }
            let rest = bytes.get(input.pos()..).unwrap_or_default();
            if left == 0 {
                self.state = State::Between;
                break rest;
            }
            if rest.is_empty() && room_left {
                break rest;
            }
        };
        let taken = bytes.get(..input.pos()).unwrap_or_default();
        self.stored_crc32.update(taken);
        self.object_bytes = self.object_bytes.saturating_add(byte_count(taken.len()));
        Ok(rest)
    }

    fn take_trailer<'a>(&mut self, bytes: &'a [u8]) -> Result<&'a [u8], Error> {
        let head = byte_count(FRAME_HEAD_BYTES);
        let Some(payload) = trailer_payload(&self.pending) else {
            return Ok(self.fill_pending(head, bytes));
        };
        let limit = MAX_TRAILER_BYTES.saturating_add(TAIL_BYTES);
        if payload > limit {
            return Err(Error::TooLarge {
                part: Part::Trailer,
                limit,
                found: payload,
            });
        }
        let whole = payload.saturating_add(head);
        let rest = self.fill_pending(whole, bytes);
        if let Some((foreign, _)) = rest.split_first() {
            // One more byte is kept, so that `finish` cannot succeed after this error.
            self.pending.push(*foreign);
            let found = whole.saturating_add(byte_count(rest.len()));
            return Err(Error::Trailing {
                part: Part::Trailer,
                expected: whole,
                found,
            });
        }
        Ok(rest)
    }

    /// Moves bytes to `pending` until it has `whole`; the rest of `bytes`.
    fn fill_pending<'a>(&mut self, whole: u64, bytes: &'a [u8]) -> &'a [u8] {
        let missing = whole.saturating_sub(byte_count(self.pending.len()));
        let taken =
            usize::try_from(missing).map_or(bytes.len(), |missing| missing.min(bytes.len()));
        let (taken, rest) = bytes.split_at_checked(taken).unwrap_or((bytes, &[]));
        self.pending.extend_from_slice(taken);
        self.object_bytes = self.object_bytes.saturating_add(byte_count(taken.len()));
        rest
    }
}

/// The payload length of a trailer frame whose first bytes are at hand.
fn trailer_payload(frame: &[u8]) -> Option<u64> {
    match *frame {
        [_, _, _, _, a, b, c, d, ..] => Some(u64::from(u32::from_le_bytes([a, b, c, d]))),
        _ => None,
    }
}

impl fmt::Debug for Decoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Decoder")
            .field("state", &self.state)
            .field("header", &self.header)
            .field("object_bytes", &self.object_bytes)
            .field("plain_bytes", &self.plain_bytes)
            .finish_non_exhaustive()
    }
}

/// A whole object, verified.
#[derive(Debug, Clone, PartialEq)]
pub struct Object {
    /// What it is.
    pub header: Header,
    /// Its content.
    pub plain: Vec<u8>,
    /// What was learnt when it was written.
    pub trailer: Trailer,
}

/// Reads a whole object with at most `max_plain_bytes` of content.
pub fn decode(bytes: &[u8], max_plain_bytes: u64) -> Result<Object, Error> {
    let mut decoder = Decoder::new(max_plain_bytes)?;
    let mut plain = Vec::new();
    decoder.push(bytes, &mut plain)?;
    let (header, trailer) = decoder.finish()?;
    Ok(Object {
        header,
        plain,
        trailer,
    })
}
