//! Plain bytes to an object.

use std::fmt;

use serde_json::{Map, Value};

use crate::sealing::{SEALED_HEAD_BYTES, Sealing};
use crate::{
    DataKey, Error, Header, MAX_FRAME_PLAIN_BYTES, Part, Trailer, byte_count, digest_text, frame,
};

/// Where a frame stands in its object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame {
    /// Its first byte, counted from the object's first.
    pub offset: u64,
    /// Its length as stored.
    pub stored_bytes: u64,
}

/// Writes one object, frame by frame, without ever holding it whole.
///
/// Every call appends to `out` the bytes that follow those of the call before; the caller drains
/// `out` as it likes.
pub struct Encoder {
    /// The header's frame, until the first call that has an `out`.
    header: Vec<u8>,
    /// Absent in a plain object.
    sealing: Option<Sealing>,
    compressor: frame::Compressor,
    stored_bytes: u64,
    stored_crc32: crc32fast::Hasher,
    plain_bytes: u64,
    plain_digest: blake3::Hasher,
}

impl Encoder {
    /// Begins an object. `level` is zstd's, from -7 to 19; `key` is that of [`Header::encrypt`].
    ///
    /// Refuses a header that says something else than what would be written: another format, codec,
    /// cipher or key; a key that is not given; and a key given for a header that has none, since
    /// what was to be encrypted must never be written plain.
    pub fn new(header: &Header, level: i32, key: Option<&DataKey>) -> Result<Self, Error> {
        if header.format != crate::FORMAT {
            return Err(Error::NewerFormat {
                supported: crate::FORMAT,
                found: header.format,
            });
        }
        if key.is_some() && header.key.is_none() {
            return Err(Error::MissingField { field: "key" });
        }
        let frame = header.to_frame()?;
        Ok(Self {
            sealing: header.sealing(&frame, key)?,
            header: frame,
            compressor: frame::Compressor::new(level)?,
            stored_bytes: 0,
            stored_crc32: crc32fast::Hasher::new(),
            plain_bytes: 0,
            plain_digest: blake3::Hasher::new(),
        })
    }

    /// Appends `plain`, at most [`MAX_FRAME_PLAIN_BYTES`], as one frame that can be decoded without
    /// the others ([`crate::FrameReader`]).
    pub fn frame(&mut self, plain: &[u8], out: &mut Vec<u8>) -> Result<Frame, Error> {
        let found = byte_count(plain.len());
        if found > MAX_FRAME_PLAIN_BYTES {
            return Err(Error::TooLarge {
                part: Part::Frame,
                limit: MAX_FRAME_PLAIN_BYTES,
                found,
            });
        }
        self.put_header(out);
        self.put_frame(plain, out)
    }

    /// Ends the object with what was learnt on the way.
    pub fn finish(
        mut self,
        facts: Map<String, Value>,
        out: &mut Vec<u8>,
    ) -> Result<Trailer, Error> {
        self.put_header(out);
        self.put_trailer(facts, out)
    }

    /// Bytes of the object that were given out so far; its whole length after the header, every
    /// frame, and `finish` (whose part is then at the end of `out`).
    pub fn stored_bytes(&self) -> u64 {
        self.stored_bytes
    }

    fn put_header(&mut self, out: &mut Vec<u8>) {
        let header = std::mem::take(&mut self.header);
        out.extend_from_slice(&header);
        self.count_stored(&header);
    }

    fn put_frame(&mut self, plain: &[u8], out: &mut Vec<u8>) -> Result<Frame, Error> {
        let offset = self.stored_bytes;
        let start = out.len();
        if self.sealing.is_some() {
            out.extend_from_slice(&[0; SEALED_HEAD_BYTES]);
        }
        if let Err(error) = self.compressor.compress(plain, offset, out) {
            out.truncate(start);
            return Err(error);
        }
        if let Some(sealing) = &self.sealing {
            sealing.seal_frame(offset, out, start);
        }
        let stored = out.get(start..).unwrap_or_default();
        self.count_stored(stored);
        self.plain_bytes = self.plain_bytes.saturating_add(byte_count(plain.len()));
        self.plain_digest.update(plain);
        Ok(Frame {
            offset,
            stored_bytes: byte_count(stored.len()),
        })
    }

    fn put_trailer(self, facts: Map<String, Value>, out: &mut Vec<u8>) -> Result<Trailer, Error> {
        let trailer = Trailer {
            plain_bytes: self.plain_bytes,
            digest: digest_text(&self.plain_digest.finalize()),
            stored_crc32: self.stored_crc32.finalize(),
            facts,
        };
        let offset = self.stored_bytes;
        let seal = |text: &[u8]| {
            let sealing = self.sealing.as_ref();
            sealing.map(|sealing| sealing.seal_trailer(offset, text))
        };
        out.extend_from_slice(&trailer.to_frame(seal)?);
        Ok(trailer)
    }

    fn count_stored(&mut self, stored: &[u8]) {
        self.stored_bytes = self.stored_bytes.saturating_add(byte_count(stored.len()));
        self.stored_crc32.update(stored);
    }
}

impl fmt::Debug for Encoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Encoder")
            .field("stored_bytes", &self.stored_bytes)
            .field("plain_bytes", &self.plain_bytes)
            .finish_non_exhaustive()
    }
}

/// Writes a whole object with all of `plain` (at most [`MAX_FRAME_PLAIN_BYTES`]) in one frame.
pub fn encode(
    header: &Header,
    plain: &[u8],
    facts: Map<String, Value>,
    level: i32,
    key: Option<&DataKey>,
) -> Result<Vec<u8>, Error> {
    let mut encoder = Encoder::new(header, level, key)?;
    let mut out = Vec::new();
    encoder.frame(plain, &mut out)?;
    encoder.finish(facts, &mut out)?;
    Ok(out)
}
