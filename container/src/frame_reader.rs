//! One frame of an object, read without the others.

use std::fmt;

use crate::frame::{self, Next};
use crate::sealing::{SEALED_HEAD_BYTES, Sealing};
use crate::{DataKey, Error, Header, Part, Reading, Trailer, byte_count, read_header, trailer};

/// Reads frames of one object by themselves, such as extents in a pack, sealed or plain.
///
/// It needs the object's header once, and of each frame its place and its stored bytes.
pub struct FrameReader {
    sealing: Option<Sealing>,
}

impl FrameReader {
    /// A reader of the object that begins with these bytes, and the object's header.
    ///
    /// `prefix` has at least the header's whole frame ([`read_header`] tells how long that is). A
    /// key given for a plain object is not used: whether an object may be plain is for the caller
    /// to judge by its header.
    pub fn new(prefix: &[u8], key: Option<&DataKey>) -> Result<(Self, Header), Error> {
        let cut = |expected| Error::Truncated {
            part: Part::Header,
            expected,
            found: byte_count(prefix.len()),
        };
        let (header, end) = match read_header(prefix)? {
            Reading::Done(done) => done,
            Reading::NeedMore(bytes) => return Err(cut(bytes)),
        };
        let frame = usize::try_from(end).ok().and_then(|end| prefix.get(..end));
        let sealing = header.sealing(frame.ok_or_else(|| cut(end))?, key)?;
        Ok((Self { sealing }, header))
    }

    /// Decodes the frame that begins at `offset` in the object and is stored as these bytes.
    ///
    /// `stored` may be damaged or hostile: never panics, allocates at most its length and
    /// `expected_plain_bytes`, and those only after the frame itself claims as many. Gives exactly
    /// that many bytes or an error. Of a sealed frame, they are those that were written in this
    /// place of this object; of a plain one, only zstd's own checksum has been verified.
    pub fn frame(
        &self,
        offset: u64,
        stored: &[u8],
        expected_plain_bytes: usize,
    ) -> Result<Vec<u8>, Error> {
        let Some(sealing) = &self.sealing else {
            return frame::decode(stored, expected_plain_bytes, offset);
        };
        let found = byte_count(stored.len());
        let Some((head, rest)) = stored.split_first_chunk::<SEALED_HEAD_BYTES>() else {
            return Err(Error::Truncated {
                part: Part::SealedFrame,
                expected: byte_count(SEALED_HEAD_BYTES),
                found,
            });
        };
        let [m0, m1, m2, m3, l0, l1, l2, l3] = *head;
        let magic = u32::from_le_bytes([m0, m1, m2, m3]);
        if frame::next(magic, true, offset)? != Next::Sealed {
            return Err(Error::UnknownFrame {
                offset,
                found: magic,
            });
        }
        let length = u64::from(u32::from_le_bytes([l0, l1, l2, l3]));
        let expected = length.saturating_add(byte_count(SEALED_HEAD_BYTES));
        if found < expected {
            return Err(Error::Truncated {
                part: Part::SealedFrame,
                expected,
                found,
            });
        }
        if found > expected {
            return Err(Error::Trailing {
                part: Part::SealedFrame,
                expected,
                found,
            });
        }
        let mut sealed = rest.to_vec();
        let content = sealing.open_frame(offset, &mut sealed)?;
        frame::decode(content, expected_plain_bytes, offset)
    }

    /// Reads the trailer as [`crate::read_trailer`] does, and checks the seal of an encrypted object:
    /// what it says was written by who wrote this object. Of the frames it still says nothing.
    pub fn trailer(&self, tail: &[u8], object_bytes: u64) -> Result<Reading<Trailer>, Error> {
        let parts = match trailer::read_parts(tail, object_bytes)? {
            Reading::Done(parts) => parts,
            Reading::NeedMore(bytes) => return Ok(Reading::NeedMore(bytes)),
        };
        let offset = object_bytes.saturating_sub(parts.frame_bytes());
        match (&self.sealing, &parts.seal) {
            (Some(sealing), Some(seal)) => sealing.check_trailer(offset, parts.text, seal)?,
            (Some(_), None) => {
                return Err(Error::Unsealed {
                    part: Part::Trailer,
                    offset,
                });
            }
            (None, Some(_)) => return Err(Error::MissingField { field: "key" }),
            (None, None) => {}
        }
        Ok(Reading::Done(parts.trailer))
    }
}

impl fmt::Debug for FrameReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FrameReader")
            .field("sealed", &self.sealing.is_some())
            .finish()
    }
}
