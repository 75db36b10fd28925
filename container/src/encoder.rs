//! Plain bytes to an object.

use std::fmt;

use serde_json::{Map, Value};

use crate::content::ContentDigest;
use crate::sealing::{SEALED_HEAD_BYTES, Sealing};
use crate::{DataKey, Error, Header, MAX_FRAME_PLAIN_BYTES, Part, Trailer, byte_count, frame};

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
    plain_digest: ContentDigest,
}

impl Encoder {
    /// Begins an object. `level` is zstd's, from -7 to 19, or [`crate::LEVEL_STORED`]; `key` is that of
    /// [`Header::encrypt`].
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
            plain_digest: header.content_digest()?,
        })
    }

    /// Appends `plain`, at most [`MAX_FRAME_PLAIN_BYTES`], as one frame that can be decoded without
    /// the others ([`crate::FrameReader`]).
    pub fn frame(&mut self, plain: &[u8], out: &mut Vec<u8>) -> Result<Frame, Error> {
        check_length(plain)?;
        self.put_header(out);
        let compressor = &mut self.compressor;
        let frame = put_frame(
            self.stored_bytes,
            self.sealing.as_ref(),
            out,
            |offset, out| compressor.compress(plain, offset, out).map(drop),
        )?;
        self.plain_digest.update(plain);
        self.plain_digest.end_frame();
        self.count_frame(frame, byte_count(plain.len()), out);
        Ok(frame)
    }

    /// Appends a frame that was compressed elsewhere: the same bytes as [`Encoder::frame`] gives for
    /// its plain bytes at the same level.
    ///
    /// Only for an object whose header says [`crate::DIGEST_OF_FRAMES`]: its digest is made of the
    /// hash that the frame has with it.
    pub fn compressed_frame(
        &mut self,
        compressed: &CompressedFrame,
        out: &mut Vec<u8>,
    ) -> Result<Frame, Error> {
        if !self.plain_digest.add_hashed(&compressed.hash) {
            return Err(Error::DigestOfPlain);
        }
        self.put_header(out);
        let frame = put_frame(self.stored_bytes, self.sealing.as_ref(), out, |_, out| {
            out.extend_from_slice(&compressed.zstd);
            Ok(())
        })?;
        self.count_frame(frame, compressed.plain_bytes, out);
        Ok(frame)
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

    fn put_trailer(self, facts: Map<String, Value>, out: &mut Vec<u8>) -> Result<Trailer, Error> {
        let trailer = Trailer {
            plain_bytes: self.plain_bytes,
            digest: self.plain_digest.text(),
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

    /// Counts a frame that stands at the end of `out`.
    fn count_frame(&mut self, frame: Frame, plain_bytes: u64, out: &[u8]) {
        let length = usize::try_from(frame.stored_bytes).expect("it is in memory");
        let start = out.len().saturating_sub(length);
        self.count_stored(out.get(start..).unwrap_or_default());
        self.plain_bytes = self.plain_bytes.saturating_add(plain_bytes);
    }

    fn count_stored(&mut self, stored: &[u8]) {
        self.stored_bytes = self.stored_bytes.saturating_add(byte_count(stored.len()));
        self.stored_crc32.update(stored);
    }
}

/// Appends what `put_zstd` appends, sealed where the object is; on an error nothing.
fn put_frame(
    offset: u64,
    sealing: Option<&Sealing>,
    out: &mut Vec<u8>,
    put_zstd: impl FnOnce(u64, &mut Vec<u8>) -> Result<(), Error>,
) -> Result<Frame, Error> {
    let start = out.len();
    if sealing.is_some() {
        out.extend_from_slice(&[0; SEALED_HEAD_BYTES]);
    }
    if let Err(error) = put_zstd(offset, out) {
        out.truncate(start);
        return Err(error);
    }
    if let Some(sealing) = sealing {
        sealing.seal_frame(offset, out, start);
    }
    Ok(Frame {
        offset,
        stored_bytes: byte_count(out.len().saturating_sub(start)),
    })
}

fn check_length(plain: &[u8]) -> Result<(), Error> {
    let found = byte_count(plain.len());
    if found > MAX_FRAME_PLAIN_BYTES {
        return Err(Error::TooLarge {
            part: Part::Frame,
            limit: MAX_FRAME_PLAIN_BYTES,
            found,
        });
    }
    Ok(())
}

/// Compresses frames for objects that others write, so that several threads can share the work.
///
/// Which object a frame goes to, and where in it, need not be known yet: sealing comes later
/// ([`Encoder::compressed_frame`]).
pub struct FrameCompressor {
    compressor: frame::Compressor,
}

/// A frame's plain bytes, compressed and hashed.
#[derive(Clone)]
pub struct CompressedFrame {
    /// One whole zstd frame: only [`FrameCompressor`] makes them.
    zstd: Vec<u8>,
    plain_bytes: u64,
    hash: [u8; 32],
}

impl FrameCompressor {
    /// `level` is zstd's, from -7 to 19.
    pub fn new(level: i32) -> Result<Self, Error> {
        Ok(Self {
            compressor: frame::Compressor::new(level)?,
        })
    }

    /// Compresses and hashes `plain`, at most [`MAX_FRAME_PLAIN_BYTES`].
    pub fn compress(&mut self, plain: &[u8]) -> Result<CompressedFrame, Error> {
        self.compress_hashed(plain, *blake3::hash(plain).as_bytes())
    }

    /// As [`FrameCompressor::compress`] for who has the BLAKE3 hash of `plain` already, having
    /// looked it up to see whether it is stored.
    ///
    /// With another hash than that, the object could not be read back.
    pub fn compress_hashed(
        &mut self,
        plain: &[u8],
        hash: [u8; 32],
    ) -> Result<CompressedFrame, Error> {
        check_length(plain)?;
        let mut zstd = Vec::new();
        self.compressor.compress(plain, 0, &mut zstd)?;
        Ok(CompressedFrame {
            zstd,
            plain_bytes: byte_count(plain.len()),
            hash,
        })
    }
}

impl CompressedFrame {
    /// Number of plain bytes.
    pub fn plain_bytes(&self) -> u64 {
        self.plain_bytes
    }

    /// BLAKE3 hash of the plain bytes.
    pub fn hash(&self) -> &[u8; 32] {
        &self.hash
    }

    /// Bytes of the zstd frame; sealed it takes 24 more.
    pub fn compressed_bytes(&self) -> u64 {
        byte_count(self.zstd.len())
    }
}

impl fmt::Debug for FrameCompressor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FrameCompressor").finish_non_exhaustive()
    }
}

impl fmt::Debug for CompressedFrame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CompressedFrame")
            .field("plain_bytes", &self.plain_bytes)
            .field("compressed_bytes", &self.compressed_bytes())
            .finish_non_exhaustive()
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
