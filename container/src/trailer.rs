//! The trailer: what is known of an object after its last plain byte.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::hex;
use crate::header::FRAME_HEAD_BYTES;
use crate::{Error, Part, Reading, byte_count};

/// Magic number of the trailer's skippable frame, little-endian in the object.
pub(crate) const TRAILER_MAGIC: u32 = 0x184D_2A5E;
/// The last bytes of every object: name and format.
const TAIL_MAGIC: &[u8; 8] = b"ANYWHEN\x01";
const TAIL_LENGTH: usize = 16;

/// Length of the fixed tail: JSON length, JSON CRC-32, magic.
pub const TAIL_BYTES: u64 = 16;
/// The longest trailer JSON in bytes.
pub const MAX_TRAILER_BYTES: u64 = 16 * 1024 * 1024;

/// What was learnt while an object was written. Fields that a later version adds are ignored.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Trailer {
    /// Number of plain bytes.
    pub plain_bytes: u64,
    /// [`crate::digest`] of the plain bytes: the object's identity.
    pub digest: String,
    /// CRC-32 (IEEE) of all stored bytes before the trailer frame.
    pub stored_crc32: u32,
    /// What the writer of this kind of object adds: verification, summary, ….
    #[serde(default)]
    pub facts: Map<String, Value>,
}

impl Trailer {
    /// The trailer's skippable frame with its tail: the last bytes of an object.
    pub(crate) fn to_frame(&self) -> Result<Vec<u8>, Error> {
        let text = serde_json::to_vec(self).map_err(Error::TrailerJson)?;
        let length = byte_count(text.len());
        if length > MAX_TRAILER_BYTES {
            return Err(Error::TooLarge {
                part: Part::Trailer,
                limit: MAX_TRAILER_BYTES,
                found: length,
            });
        }
        let payload = u32::try_from(length.saturating_add(TAIL_BYTES));
        let length = u32::try_from(length).expect("the limit is below 4 GiB");
        let mut frame = Vec::with_capacity(text.len().saturating_add(64));
        frame.extend_from_slice(&TRAILER_MAGIC.to_le_bytes());
        frame.extend_from_slice(&payload.expect("the limit is below 4 GiB").to_le_bytes());
        frame.extend_from_slice(&text);
        frame.extend_from_slice(&length.to_le_bytes());
        frame.extend_from_slice(&crc32fast::hash(&text).to_le_bytes());
        frame.extend_from_slice(TAIL_MAGIC);
        Ok(frame)
    }
}

/// Reads the trailer from the last bytes of an object that has `object_bytes` in all.
///
/// `tail` may be damaged or hostile: never panics, allocates at most a multiple of its length. The
/// trailer's own checksum is verified; that it tells the truth about the rest of the object is for
/// [`crate::Decoder`] to find out.
pub fn read_trailer(tail: &[u8], object_bytes: u64) -> Result<Reading<Trailer>, Error> {
    let Some((rest, end)) = tail.split_last_chunk::<TAIL_LENGTH>() else {
        return if object_bytes < TAIL_BYTES {
            Err(Error::Truncated {
                part: Part::Object,
                expected: TAIL_BYTES,
                found: object_bytes,
            })
        } else {
            Ok(Reading::NeedMore(TAIL_BYTES))
        };
    };
    let &[l0, l1, l2, l3, c0, c1, c2, c3, ref magic @ ..] = end;
    if magic != TAIL_MAGIC {
        return Err(Error::NoTrailer { found: hex(magic) });
    }
    let length = u64::from(u32::from_le_bytes([l0, l1, l2, l3]));
    let expected = u32::from_le_bytes([c0, c1, c2, c3]);
    if length > MAX_TRAILER_BYTES {
        return Err(Error::TooLarge {
            part: Part::Trailer,
            limit: MAX_TRAILER_BYTES,
            found: length,
        });
    }
    let payload = length.saturating_add(TAIL_BYTES);
    let whole = payload.saturating_add(byte_count(FRAME_HEAD_BYTES));
    if whole > object_bytes {
        return Err(Error::Truncated {
            part: Part::Object,
            expected: whole,
            found: object_bytes,
        });
    }
    let Some((before, text)) = usize::try_from(length)
        .ok()
        .and_then(|length| rest.len().checked_sub(length))
        .and_then(|at| rest.split_at_checked(at))
    else {
        return Ok(Reading::NeedMore(whole));
    };
    let Some((_, &[m0, m1, m2, m3, p0, p1, p2, p3])) =
        before.split_last_chunk::<FRAME_HEAD_BYTES>()
    else {
        return Ok(Reading::NeedMore(whole));
    };
    if u32::from_le_bytes([m0, m1, m2, m3]) != TRAILER_MAGIC {
        return Err(Error::NoTrailer {
            found: hex(&[m0, m1, m2, m3]),
        });
    }
    let frame = u64::from(u32::from_le_bytes([p0, p1, p2, p3]));
    if frame != payload {
        return Err(Error::TrailerLength {
            frame,
            tail: payload,
        });
    }
    let found = crc32fast::hash(text);
    if found != expected {
        return Err(Error::TrailerChecksum { expected, found });
    }
    serde_json::from_slice(text)
        .map(Reading::Done)
        .map_err(Error::TrailerJson)
}
