//! The header: what is known of an object before its first plain byte.

use serde::{Deserialize, Serialize};

use crate::content::ContentDigest;
use crate::error::hex;
use crate::key::{KEY_BYTES, parse_hex, push_hex};
use crate::sealing::Sealing;
use crate::{DataKey, Error, Part, Reading, byte_count};

/// Magic number of the header's skippable frame (RFC 8878 §3.1.2), little-endian in the object.
pub(crate) const HEADER_MAGIC: u32 = 0x184D_2A50;
/// Magic number and length.
pub(crate) const FRAME_HEAD_BYTES: usize = 8;

/// The format that this build writes, and the newest that it reads.
pub const FORMAT: u32 = 1;
/// The only codec of format 1.
pub const CODEC_ZSTD: &str = "zstd";
/// The only cipher of format 1.
pub const CIPHER_AES_256_GCM: &str = "aes-256-gcm";
/// The only value of [`Header::digest_of`].
pub const DIGEST_OF_FRAMES: &str = "frames";
/// The longest header text in bytes.
pub const MAX_HEADER_BYTES: u64 = 64 * 1024;

/// What an object is: known before its content, so that it can stand first.
///
/// Fields that a later version adds are ignored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// [`FORMAT`].
    pub format: u32,
    /// What the object holds: `segment`, `piece`, `partial`, `history`, `manifest`, `pack`, ….
    pub kind: String,
    /// The object's path below `<cluster>/<system identifier>/`, so that a copy under another name
    /// is noticed.
    pub name: String,
    /// The cluster's name.
    pub cluster: String,
    /// The system identifier in decimal.
    pub system_id: String,
    /// The timeline, of objects that belong to one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeline: Option<u32>,
    /// First LSN, as `X/X`, of objects that hold a range of WAL.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start: Option<String>,
    /// LSN after the last byte, as `X/X`: ranges are half-open.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub end: Option<String>,
    /// The server's segment size in bytes, of objects that hold WAL.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub segment_bytes: Option<u64>,
    /// [`CODEC_ZSTD`].
    pub codec: String,
    /// [`DIGEST_OF_FRAMES`] where [`crate::Trailer::digest`] is [`crate::digest_of_frames`]; absent
    /// where it is [`crate::digest`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest_of: Option<String>,
    /// The id of the data key that the content is encrypted with ([`DataKey::id`]); absent, as are
    /// all fields below, when it is not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// [`CIPHER_AES_256_GCM`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cipher: Option<String>,
    /// 64 hex digits: 32 random bytes made anew for each upload, from which and the data key the
    /// object's own key is derived.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub salt: Option<String>,
    /// The data key, wrapped to one recipient each: age files in base64. For writers that have no
    /// other place to keep wraps in; they count towards [`MAX_HEADER_BYTES`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub wraps: Vec<String>,
}

impl Header {
    /// A header of this build's format and codec, unencrypted, with no timeline and no range.
    pub fn new(kind: &str, name: &str, cluster: &str, system_id: &str) -> Self {
        Self {
            format: FORMAT,
            kind: kind.to_owned(),
            name: name.to_owned(),
            cluster: cluster.to_owned(),
            system_id: system_id.to_owned(),
            timeline: None,
            start: None,
            end: None,
            segment_bytes: None,
            codec: CODEC_ZSTD.to_owned(),
            digest_of: None,
            key: None,
            cipher: None,
            salt: None,
            wraps: Vec::new(),
        }
    }

    /// Says that the content is encrypted, with the data key of this id.
    ///
    /// `salt` is made anew by a cryptographic source of randomness for each object that is written,
    /// also for one that is written again: two different objects with the same key and salt would
    /// betray both.
    pub fn encrypt(&mut self, key_id: &str, salt: &[u8; KEY_BYTES], wraps: Vec<String>) {
        let mut digits = String::new();
        push_hex(salt, &mut digits);
        self.key = Some(key_id.to_owned());
        self.cipher = Some(CIPHER_AES_256_GCM.to_owned());
        self.salt = Some(digits);
        self.wraps = wraps;
    }

    /// Whether this build can read what follows the header, given the key: the salt, if a key is
    /// needed.
    pub(crate) fn check_readable(&self) -> Result<Option<[u8; KEY_BYTES]>, Error> {
        if self.codec != CODEC_ZSTD {
            return Err(Error::UnknownCodec {
                found: self.codec.clone(),
            });
        }
        self.content_digest()?;
        let missing = |field| Err(Error::MissingField { field });
        match (&self.key, &self.cipher, &self.salt) {
            (None, None, None) if self.wraps.is_empty() => Ok(None),
            (None, _, _) => missing("key"),
            (Some(_), None, _) => missing("cipher"),
            (Some(_), Some(_), None) => missing("salt"),
            (Some(_), Some(cipher), Some(digits)) => {
                if cipher != CIPHER_AES_256_GCM {
                    return Err(Error::UnknownCipher {
                        found: cipher.clone(),
                    });
                }
                let mut salt = [0; KEY_BYTES];
                if !parse_hex(digits, &mut salt) {
                    return Err(Error::BadSalt {
                        found: digits.clone(),
                    });
                }
                Ok(Some(salt))
            }
        }
    }

    /// What computes the digest of the content, as the header says.
    pub(crate) fn content_digest(&self) -> Result<ContentDigest, Error> {
        match self.digest_of.as_deref() {
            None => Ok(ContentDigest::of_plain()),
            Some(DIGEST_OF_FRAMES) => Ok(ContentDigest::of_frames()),
            Some(found) => Err(Error::UnknownDigest {
                found: found.to_owned(),
            }),
        }
    }

    /// What seals or opens the object with this header and `frame`, the header's bytes as stored;
    /// nothing for a plain object, whether a key is given or not.
    pub(crate) fn sealing(
        &self,
        frame: &[u8],
        key: Option<&DataKey>,
    ) -> Result<Option<Sealing>, Error> {
        let Some((salt, id)) = self.check_readable()?.zip(self.key.as_ref()) else {
            return Ok(None);
        };
        match key {
            None => Err(Error::Encrypted { key: id.clone() }),
            Some(key) if !key.has_id(id) => Err(Error::WrongKey {
                expected: id.clone(),
                found: key.fingerprint(),
            }),
            Some(key) => Ok(Some(Sealing::new(key, &salt, frame.to_vec()))),
        }
    }

    /// The header's skippable frame: the first bytes of an object.
    pub(crate) fn to_frame(&self) -> Result<Vec<u8>, Error> {
        let mut text = serde_json::to_vec(self).map_err(Error::HeaderJson)?;
        text.push(b'\n');
        let length = byte_count(text.len());
        if length > MAX_HEADER_BYTES {
            return Err(Error::TooLarge {
                part: Part::Header,
                limit: MAX_HEADER_BYTES,
                found: length,
            });
        }
        let length = u32::try_from(length).expect("the limit is below 4 GiB");
        let mut frame = Vec::with_capacity(text.len().saturating_add(FRAME_HEAD_BYTES));
        frame.extend_from_slice(&HEADER_MAGIC.to_le_bytes());
        frame.extend_from_slice(&length.to_le_bytes());
        frame.extend_from_slice(&text);
        Ok(frame)
    }
}

/// Reads the header from the first bytes of an object: the header, and the length in bytes of its
/// frame (where the zstd frames begin).
///
/// `prefix` may be damaged or hostile: never panics, allocates at most a multiple of
/// [`MAX_HEADER_BYTES`]. A header with a codec or a key that this build does not know is read.
pub fn read_header(prefix: &[u8]) -> Result<Reading<(Header, u64)>, Error> {
    let magic = HEADER_MAGIC.to_le_bytes();
    let seen = prefix
        .get(..prefix.len().min(magic.len()))
        .unwrap_or_default();
    if !magic.starts_with(seen) {
        return Err(Error::NotAnObject { found: hex(prefix) });
    }
    let Some((&[_, _, _, _, a, b, c, d], rest)) = prefix.split_first_chunk::<FRAME_HEAD_BYTES>()
    else {
        return Ok(Reading::NeedMore(byte_count(FRAME_HEAD_BYTES)));
    };
    let length = u64::from(u32::from_le_bytes([a, b, c, d]));
    if length > MAX_HEADER_BYTES {
        return Err(Error::TooLarge {
            part: Part::Header,
            limit: MAX_HEADER_BYTES,
            found: length,
        });
    }
    let end = length.saturating_add(byte_count(FRAME_HEAD_BYTES));
    let text = usize::try_from(length)
        .ok()
        .and_then(|length| rest.get(..length));
    match text {
        Some(text) => Ok(Reading::Done((parse(text)?, end))),
        None => Ok(Reading::NeedMore(end)),
    }
}

fn parse(text: &[u8]) -> Result<Header, Error> {
    // A later format may change any field but this one.
    #[derive(Deserialize)]
    struct Format {
        format: u32,
    }
    let Format { format } = serde_json::from_slice(text).map_err(Error::HeaderJson)?;
    if format > FORMAT {
        return Err(Error::NewerFormat {
            supported: FORMAT,
            found: format,
        });
    }
    serde_json::from_slice(text).map_err(Error::HeaderJson)
}
