//! An object back to plain bytes.

use std::fmt;

use zstd::zstd_safe::{InBuffer, OutBuffer};

use crate::content::ContentDigest;
use crate::frame::{self, Decompressor, Next, ZSTD_MAGIC};
use crate::header::FRAME_HEAD_BYTES;
use crate::sealing::{SEALED_HEAD_BYTES, Sealing, TAG_BYTES};
use crate::{
    DataKey, Error, Frame, Header, MAX_TRAILER_BYTES, Part, Reading, TAIL_BYTES, Trailer,
    byte_count, read_header, trailer,
};

const MAGIC_BYTES: usize = 4;
/// The largest block of a zstd frame: one call gives at least as much.
const OUTPUT_BYTES: usize = 128 * 1024;

/// Reads one object as its bytes arrive, in stretches of any length.
///
/// The bytes may be damaged or hostile: never panics, and holds at most an 8 MiB window and the
/// header and trailer at their limits; of an encrypted object also one whole sealed frame, since
/// nothing is decompressed before it is authenticated. Room for that frame is made as its bytes
/// arrive, and a frame longer than zstd's bound for [`crate::MAX_FRAME_PLAIN_BYTES`], or for what
/// is left of the decoder's own limit, is refused by its head.
///
/// **Plain bytes given out before [`Decoder::finish`] returned are not verified**; nothing may be
/// made of them that cannot be thrown away. That holds for encrypted objects too: their end may be
/// missing.
pub struct Decoder {
    state: State,
    /// Until the header was read.
    key: Option<DataKey>,
    header: Option<Header>,
    /// Absent in a plain object.
    sealing: Option<Sealing>,
    /// The part at hand where it has to be seen whole: header, magic number, sealed frame, trailer.
    pending: Vec<u8>,
    /// All bytes taken, the trailer's too.
    object_bytes: u64,
    stored_crc32: crc32fast::Hasher,
    plain: Plain,
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
    /// Inside the sealed frame that began at `offset`.
    SealedFrame {
        offset: u64,
    },
    /// Inside the trailer's frame, which began at `offset`.
    Trailer {
        offset: u64,
    },
}

impl Decoder {
    /// A decoder that gives out at most `max_plain_bytes`.
    ///
    /// `key` is needed for an encrypted object, and not used for a plain one: whether an object may
    /// be plain is for the caller to judge by its header.
    pub fn new(max_plain_bytes: u64, key: Option<&DataKey>) -> Result<Self, Error> {
        Ok(Self {
            state: State::Header,
            key: key.cloned(),
            header: None,
            sealing: None,
            pending: Vec::new(),
            object_bytes: 0,
            stored_crc32: crc32fast::Hasher::new(),
            plain: Plain::new(max_plain_bytes)?,
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
            rest = self.step(rest, &mut sink)?;
        }
        Ok(())
    }

    /// Takes some of the bytes, of one part of the object; the rest of them.
    fn step<'a>(
        &mut self,
        bytes: &'a [u8],
        sink: &mut impl FnMut(&[u8]),
    ) -> Result<&'a [u8], Error> {
        match self.state {
            State::Header => self.take_header(bytes),
            State::Between => self.take_magic(bytes, sink),
            State::Frame { offset } => self.take_frame(offset, bytes, sink),
            State::SealedFrame { offset } => self.take_sealed(offset, bytes, sink),
            State::Trailer { .. } => self.take_trailer(bytes),
        }
    }

    /// Ends the object: only now are its plain bytes known to be those that were written.
    pub fn finish(self) -> Result<(Header, Trailer), Error> {
        let cut = |part: Part, at_least: u64| Error::Truncated {
            part,
            expected: at_least,
            found: self.object_bytes,
        };
        let more = self.object_bytes.saturating_add(1);
        let (header, offset) = match (self.state, self.header) {
            (State::Header, _) | (_, None) => {
                return Err(match read_header(&self.pending)? {
                    Reading::NeedMore(bytes) => cut(Part::Header, bytes),
                    Reading::Done(_) => cut(Part::Header, more),
                });
            }
            (State::Between | State::Frame { .. } | State::SealedFrame { .. }, _) => {
                return Err(cut(Part::Frames, more));
            }
            (State::Trailer { offset }, Some(header)) => (header, offset),
        };
        let parts = trailer::read_whole(&self.pending, offset, self.sealing.is_some())?;
        if let Some((sealing, seal)) = self.sealing.zip(parts.seal) {
            sealing.check_trailer(offset, parts.text, &seal)?;
        }
        let trailer = parts.trailer;
        trailer.check_stored(self.stored_crc32.finalize())?;
        self.plain.check(&trailer)?;
        Ok((header, trailer))
    }

    fn take_header<'a>(&mut self, bytes: &'a [u8]) -> Result<&'a [u8], Error> {
        let rest = match read_header(&self.pending)? {
            Reading::NeedMore(whole) => self.fill_pending(whole, bytes),
            Reading::Done(_) => bytes,
        };
        if let Reading::Done((header, _)) = read_header(&self.pending)? {
            self.sealing = header.sealing(&self.pending, self.key.as_ref())?;
            self.key = None;
            self.plain.digest = header.content_digest()?;
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
        match frame::next(u32::from_le_bytes(magic), self.sealing.is_some(), offset)? {
            Next::Plain => {
                self.pending.clear();
                self.object_bytes = offset;
                self.state = State::Frame { offset };
                self.take_frame(offset, &magic, sink)?;
            }
            Next::Sealed => self.state = State::SealedFrame { offset },
            Next::Trailer => self.state = State::Trailer { offset },
        }
        Ok(rest)
    }

    fn take_frame<'a>(
        &mut self,
        offset: u64,
        bytes: &'a [u8],
        sink: &mut impl FnMut(&[u8]),
    ) -> Result<&'a [u8], Error> {
        let (taken, ended) = self.plain.decompress(offset, bytes, sink)?;
        let (taken, rest) = bytes.split_at_checked(taken).unwrap_or((bytes, &[]));
        self.stored_crc32.update(taken);
        self.object_bytes = self.object_bytes.saturating_add(byte_count(taken.len()));
        if ended {
            self.state = State::Between;
        }
        Ok(rest)
    }

    fn take_sealed<'a>(
        &mut self,
        offset: u64,
        bytes: &'a [u8],
        sink: &mut impl FnMut(&[u8]),
    ) -> Result<&'a [u8], Error> {
        let head = byte_count(SEALED_HEAD_BYTES);
        let &[_, _, _, _, a, b, c, d, ..] = self.pending.as_slice() else {
            return Ok(self.fill_pending(head, bytes));
        };
        let length = u64::from(u32::from_le_bytes([a, b, c, d]));
        let limit = frame::stored_bytes_max(self.plain.bytes_left());
        let limit = limit.saturating_add(byte_count(TAG_BYTES));
        if length > limit {
            return Err(Error::TooLarge {
                part: Part::SealedFrame,
                limit,
                found: length,
            });
        }
        let whole = length.saturating_add(head);
        let rest = self.fill_pending(whole, bytes);
        if byte_count(self.pending.len()) < whole {
            return Ok(rest);
        }
        self.stored_crc32.update(&self.pending);
        let sealed = self.pending.get_mut(SEALED_HEAD_BYTES..);
        let (Some(sealing), Some(sealed)) = (&self.sealing, sealed) else {
            return Err(Error::Unsealed {
                part: Part::SealedFrame,
                offset,
            });
        };
        let content = sealing.open_frame(offset, sealed)?;
        self.plain.decompress_whole(offset, content, sink)?;
        self.pending.clear();
        self.state = State::Between;
        Ok(rest)
    }

    fn take_trailer<'a>(&mut self, bytes: &'a [u8]) -> Result<&'a [u8], Error> {
        let head = byte_count(FRAME_HEAD_BYTES);
        let Some(payload) = trailer::payload(&self.pending) else {
            return Ok(self.fill_pending(head, bytes));
        };
        let limit = MAX_TRAILER_BYTES
            .saturating_add(TAIL_BYTES)
            .saturating_add(byte_count(TAG_BYTES));
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

/// Compressed bytes to plain ones, which are counted and digested.
struct Plain {
    decompressor: Decompressor,
    output: Vec<u8>,
    bytes: u64,
    bytes_max: u64,
    digest: ContentDigest,
}

impl Plain {
    fn new(bytes_max: u64) -> Result<Self, Error> {
        Ok(Self {
            decompressor: Decompressor::new()?,
            output: vec![0; OUTPUT_BYTES],
            bytes: 0,
            bytes_max,
            // until the header was read
            digest: ContentDigest::of_plain(),
        })
    }

    fn bytes_left(&self) -> u64 {
        self.bytes_max.saturating_sub(self.bytes)
    }

    /// Takes bytes of the frame that began at `offset` until they or the frame end: how many were
    /// taken, and whether the frame has ended.
    fn decompress(
        &mut self,
        offset: u64,
        bytes: &[u8],
        sink: &mut impl FnMut(&[u8]),
    ) -> Result<(usize, bool), Error> {
        let mut input = InBuffer::around(bytes);
        loop {
            let mut output = OutBuffer::around(self.output.as_mut_slice());
            let left = self
                .decompressor
                .context()
                .decompress_stream(&mut output, &mut input)
                .map_err(|code| frame::failed(code, offset))?;
            let room_left = output.pos() < output.capacity();
            let plain = output.as_slice();
            self.bytes = self.bytes.saturating_add(byte_count(plain.len()));
            if self.bytes > self.bytes_max {
                return Err(Error::TooLarge {
                    part: Part::Plain,
                    limit: self.bytes_max,
                    found: self.bytes,
                });
            }
            if !plain.is_empty() {
                self.digest.update(plain);
                sink(plain);
            }
            if left == 0 {
                self.digest.end_frame();
                return Ok((input.pos(), true));
            }
            if input.pos() >= bytes.len() && room_left {
                return Ok((input.pos(), false));
            }
        }
    }

    /// Takes what was in the sealed frame that began at `offset`: one frame and nothing else.
    fn decompress_whole(
        &mut self,
        offset: u64,
        content: &[u8],
        sink: &mut impl FnMut(&[u8]),
    ) -> Result<(), Error> {
        let found = byte_count(content.len());
        match content.first_chunk() {
            Some(magic) if u32::from_le_bytes(*magic) != ZSTD_MAGIC => Err(Error::UnknownFrame {
                offset,
                found: u32::from_le_bytes(*magic),
            }),
            _ => match self.decompress(offset, content, sink)? {
                (taken, true) if taken == content.len() => Ok(()),
                (taken, true) => Err(Error::Trailing {
                    part: Part::Frame,
                    expected: byte_count(taken),
                    found,
                }),
                (_, false) => Err(Error::Truncated {
                    part: Part::Frame,
                    expected: found.saturating_add(1),
                    found,
                }),
            },
        }
    }

    /// Whether this is what was written.
    fn check(&self, trailer: &Trailer) -> Result<(), Error> {
        if self.bytes != trailer.plain_bytes {
            return Err(Error::PlainLength {
                part: Part::Plain,
                expected: trailer.plain_bytes,
                found: self.bytes,
            });
        }
        let digest = self.digest.text();
        if digest != trailer.digest {
            return Err(Error::Digest {
                expected: trailer.digest.clone(),
                found: digest,
            });
        }
        Ok(())
    }
}

impl fmt::Debug for Decoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Decoder")
            .field("state", &self.state)
            .field("header", &self.header)
            .field("object_bytes", &self.object_bytes)
            .field("plain_bytes", &self.plain.bytes)
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

/// Reads a whole object with at most `max_plain_bytes` of content; `key` as in [`Decoder::new`].
pub fn decode(bytes: &[u8], max_plain_bytes: u64, key: Option<&DataKey>) -> Result<Object, Error> {
    let mut decoder = Decoder::new(max_plain_bytes, key)?;
    let mut plain = Vec::new();
    decoder.push(bytes, &mut plain)?;
    let (header, trailer) = decoder.finish()?;
    Ok(Object {
        header,
        plain,
        trailer,
    })
}

/// Reads a whole object as [`decode`] does, for the places of its frames, and how many plain bytes each
/// holds.
pub fn frame_places(
    bytes: &[u8],
    max_plain_bytes: u64,
    key: Option<&DataKey>,
) -> Result<Vec<(Frame, u64)>, Error> {
    let mut decoder = Decoder::new(max_plain_bytes, key)?;
    let (mut rest, mut frames, mut plain_before) = (bytes, Vec::new(), 0);
    while !rest.is_empty() {
        let before = decoder.state;
        rest = decoder.step(rest, &mut |_| {})?;
        if let (State::Frame { offset } | State::SealedFrame { offset }, State::Between) =
            (before, decoder.state)
        {
            let frame = Frame {
                offset,
                stored_bytes: decoder.object_bytes.saturating_sub(offset),
            };
            let plain = decoder.plain.bytes;
            frames.push((frame, plain.saturating_sub(plain_before)));
            plain_before = plain;
        }
    }
    decoder.finish()?;
    Ok(frames)
}
