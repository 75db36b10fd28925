//! The trailer: what is known of an object after its last plain byte.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::hex;
use crate::header::FRAME_HEAD_BYTES;
use crate::sealing::{Seal, TAG_BYTES};
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
    /// The trailer's skippable frame with its tail: the last bytes of an object. `seal` gives the
    /// seal for the JSON, or none for a plain object.
    pub(crate) fn to_frame(
        &self,
        seal: impl FnOnce(&[u8]) -> Option<Seal>,
    ) -> Result<Vec<u8>, Error> {
        let text = serde_json::to_vec(self).map_err(Error::TrailerJson)?;
        let length = byte_count(text.len());
        if length > MAX_TRAILER_BYTES {
            return Err(Error::TooLarge {
                part: Part::Trailer,
                limit: MAX_TRAILER_BYTES,
                found: length,
            });
        }
        let seal = seal(&text);
        let seal = seal.as_ref().map_or(&[][..], |seal| seal.as_slice());
        let payload = length
            .saturating_add(TAIL_BYTES)
            .saturating_add(byte_count(seal.len()));
        let payload = u32::try_from(payload);
        let length = u32::try_from(length).expect("the limit is below 4 GiB");
        let mut frame = Vec::with_capacity(text.len().saturating_add(64));
        frame.extend_from_slice(&TRAILER_MAGIC.to_le_bytes());
        frame.extend_from_slice(&payload.expect("the limit is below 4 GiB").to_le_bytes());
        frame.extend_from_slice(seal);
        frame.extend_from_slice(&text);
        frame.extend_from_slice(&length.to_le_bytes());
        frame.extend_from_slice(&crc32fast::hash(&text).to_le_bytes());
        frame.extend_from_slice(TAIL_MAGIC);
        Ok(frame)
    }

    /// Whether the stored bytes before the trailer are those that were written, by their CRC-32.
    pub(crate) fn check_stored(&self, found: u32) -> Result<(), Error> {
        if found != self.stored_crc32 {
            return Err(Error::StoredChecksum {
                expected: self.stored_crc32,
                found,
            });
        }
        Ok(())
    }
}

/// A trailer with what stands around it.
pub(crate) struct Parts<'a> {
    pub(crate) trailer: Trailer,
    /// The trailer's JSON.
    pub(crate) text: &'a [u8],
    pub(crate) seal: Option<Seal>,
}

impl Parts<'_> {
    /// Bytes of the trailer's whole frame, which ends its object.
    pub(crate) fn frame_bytes(&self) -> u64 {
        byte_count(self.text.len())
            .saturating_add(self.seal.map_or(0, |seal| byte_count(seal.len())))
            .saturating_add(TAIL_BYTES)
            .saturating_add(byte_count(FRAME_HEAD_BYTES))
    }
}

/// The trailer's frame that begins at `offset` in an object that is `sealed` or is not, and that
/// must end it. Does not check the seal, only that there is one or none.
pub(crate) fn read_whole(frame: &[u8], offset: u64, sealed: bool) -> Result<Parts<'_>, Error> {
    let found = byte_count(frame.len());
    let object_bytes = offset.saturating_add(found);
    let cut = |missing| Error::Truncated {
        part: Part::Trailer,
        expected: object_bytes.saturating_add(missing),
        found: object_bytes,
    };
    let payload = payload(frame).ok_or_else(|| cut(1))?;
    let whole = payload.saturating_add(byte_count(FRAME_HEAD_BYTES));
    if found < whole {
        return Err(cut(whole.saturating_sub(found)));
    }
    if found > whole {
        return Err(Error::Trailing {
            part: Part::Trailer,
            expected: whole,
            found,
        });
    }
    // The tail may claim a longer trailer than its frame has room for.
    let Reading::Done(parts) = read_parts(frame, found)? else {
        return Err(cut(1));
    };
    let inside = byte_count(parts.text.len())
        .saturating_add(TAIL_BYTES)
        .saturating_add(parts.seal.map_or(0, |seal| byte_count(seal.len())));
    if inside != payload {
        return Err(Error::TrailerLength {
            frame: payload,
            tail: inside,
        });
    }
    match (sealed, parts.seal) {
        (true, None) => Err(Error::Unsealed {
            part: Part::Trailer,
            offset,
        }),
        (false, Some(_)) => Err(Error::MissingField { field: "key" }),
        (true, Some(_)) | (false, None) => Ok(parts),
    }
}

/// The payload length of a trailer frame whose first bytes are at hand.
pub(crate) fn payload(frame: &[u8]) -> Option<u64> {
    match *frame {
        [_, _, _, _, a, b, c, d, ..] => Some(u64::from(u32::from_le_bytes([a, b, c, d]))),
        _ => None,
    }
}

/// Reads the trailer from the last bytes of an object that has `object_bytes` in all.
///
/// `tail` may be damaged or hostile: never panics, allocates at most a multiple of its length. The
/// trailer's own checksum is verified; that it tells the truth about the rest of the object, and
/// the seal of an encrypted object, are for [`crate::Decoder`] to find out.
pub fn read_trailer(tail: &[u8], object_bytes: u64) -> Result<Reading<Trailer>, Error> {
    Ok(match read_parts(tail, object_bytes)? {
        Reading::Done(parts) => Reading::Done(parts.trailer),
        Reading::NeedMore(bytes) => Reading::NeedMore(bytes),
    })
}

pub(crate) fn read_parts(tail: &[u8], object_bytes: u64) -> Result<Reading<Parts<'_>>, Error> {
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
    // With room for a seal, so that nobody has to come back for it.
    let sealed_whole = whole.saturating_add(byte_count(TAG_BYTES));
    let need = Reading::NeedMore(sealed_whole.min(object_bytes));
    let Some((before, text)) = usize::try_from(length)
        .ok()
        .and_then(|length| rest.len().checked_sub(length))
        .and_then(|at| rest.split_at_checked(at))
    else {
        return Ok(need);
    };
    let seal = match head_and_seal(before, payload) {
        Ok(seal) => seal,
        Err(_) if byte_count(tail.len()) < sealed_whole.min(object_bytes) => return Ok(need),
        Err(error) => return Err(error),
    };
    let found = crc32fast::hash(text);
    if found != expected {
        return Err(Error::TrailerChecksum { expected, found });
    }
    let trailer = serde_json::from_slice(text).map_err(Error::TrailerJson)?;
    Ok(Reading::Done(Parts {
        trailer,
        text,
        seal,
    }))
}

/// The seal between a trailer frame's head and its JSON, if there is one. `before` ends where the
/// JSON begins; `payload` is the frame's without a seal.
fn head_and_seal(before: &[u8], payload: u64) -> Result<Option<Seal>, Error> {
    let magic = TRAILER_MAGIC.to_le_bytes();
    let plain = before.last_chunk::<FRAME_HEAD_BYTES>();
    if plain.is_some_and(|head| head.starts_with(&magic) && self::payload(head) == Some(payload)) {
        return Ok(None);
    }
    let sealed = before
        .split_last_chunk::<TAG_BYTES>()
        .and_then(|(before, seal)| Some((before.last_chunk::<FRAME_HEAD_BYTES>()?, seal)))
        .filter(|(head, _)| head.starts_with(&magic));
    let sealed_payload = payload.saturating_add(byte_count(TAG_BYTES));
    let (head, tail) = match (sealed, plain) {
        (Some((head, seal)), _) if self::payload(head) == Some(sealed_payload) => {
            return Ok(Some(*seal));
        }
        (_, Some(head)) if head.starts_with(&magic) => (head, payload),
        (Some((head, _)), _) => (head, sealed_payload),
        (None, found) => {
            let found = found.map(|head| hex(head.get(..4).unwrap_or_default()));
            return Err(Error::NoTrailer {
                found: found.unwrap_or_default(),
            });
        }
    };
    Err(Error::TrailerLength {
        frame: self::payload(head).unwrap_or_default(),
        tail,
    })
}
