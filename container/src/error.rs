//! What can be wrong with an object.

use std::fmt;

use crate::key::push_hex;

/// A part of an object, to say which one was wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// Magic, length and JSON at the beginning.
    Header,
    /// The zstd frames, as stored.
    Frames,
    /// One frame's plain bytes.
    Frame,
    /// One encrypted frame, as stored.
    SealedFrame,
    /// All plain bytes.
    Plain,
    /// The frame at the end.
    Trailer,
    /// The object as a whole.
    Object,
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Header => "header",
            Self::Frames => "frames",
            Self::Frame => "frame",
            Self::SealedFrame => "sealed frame",
            Self::Plain => "plain bytes",
            Self::Trailer => "trailer",
            Self::Object => "object",
        })
    }
}

/// Why bytes are not an object, or could not become one.
///
/// [`Error::is_damage`] tells bytes that must be distrusted from limits and settings.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The first bytes are not those of a header.
    #[error("not an object of this repository format: begins with {found}")]
    NotAnObject {
        /// The first bytes, at most eight, in hex.
        found: String,
    },
    /// The last bytes are not those of a trailer: cut off, or written by something else.
    #[error("object does not end with a trailer: ends with {found}")]
    NoTrailer {
        /// The last bytes, at most eight, in hex.
        found: String,
    },
    /// Bytes are missing at the end.
    #[error("{part} is cut short: expected at least {expected} bytes, found {found}")]
    Truncated {
        /// The part that was being read.
        part: Part,
        /// Bytes it must have at least.
        expected: u64,
        /// Bytes there were.
        found: u64,
    },
    /// Bytes follow where the part had to end.
    #[error("{part} is followed by foreign bytes: expected {expected} bytes, found {found}")]
    Trailing {
        /// The part that had to end.
        part: Part,
        /// Its length.
        expected: u64,
        /// Bytes there were.
        found: u64,
    },
    /// A part exceeds a limit; nothing was allocated for it.
    #[error("{part} is too large: limit {limit} bytes, found {found}")]
    TooLarge {
        /// The part.
        part: Part,
        /// The limit in bytes.
        limit: u64,
        /// Its size in bytes, or how far reading had come when it went over the limit.
        found: u64,
    },
    /// The header's text is not a header.
    #[error("header is damaged")]
    HeaderJson(#[source] serde_json::Error),
    /// The trailer's text is not a trailer.
    #[error("trailer is damaged")]
    TrailerJson(#[source] serde_json::Error),
    /// Written by a later version.
    #[error("object has a newer format, upgrade anywhen: supported {supported}, found {found}")]
    NewerFormat {
        /// The newest format that this build reads.
        supported: u32,
        /// The object's format.
        found: u32,
    },
    /// Compressed by something that this build does not know.
    #[error("object has an unknown codec, upgrade anywhen: {found:?}")]
    UnknownCodec {
        /// The codec's name.
        found: String,
    },
    /// Its digest is of something that this build does not know.
    #[error("object has an unknown kind of digest, upgrade anywhen: {found:?}")]
    UnknownDigest {
        /// What it is of, as the header has it.
        found: String,
    },
    /// A frame that was compressed elsewhere, for an object whose digest needs its plain bytes.
    #[error(
        "a compressed frame needs a header with a digest of frames: found a digest of plain bytes"
    )]
    DigestOfPlain,
    /// Encrypted, and no key was given.
    #[error("object is encrypted and no key was given: key {key:?}")]
    Encrypted {
        /// The key's id.
        key: String,
    },
    /// Encrypted with another key than the one given.
    #[error("object is encrypted with another key: expected {expected:?}, found {found}")]
    WrongKey {
        /// The key's id, as the header has it.
        expected: String,
        /// [`crate::DataKey::fingerprint`] of the key given.
        found: String,
    },
    /// Encrypted by something that this build does not know.
    #[error("object has an unknown cipher, upgrade anywhen: {found:?}")]
    UnknownCipher {
        /// The cipher's name.
        found: String,
    },
    /// A header says only half of what an encrypted object's must.
    #[error("header of an encrypted object has no {field}")]
    MissingField {
        /// The field.
        field: &'static str,
    },
    /// The header's salt is not one.
    #[error("salt is not 64 lower-case hex digits: found {found:?}")]
    BadSalt {
        /// As the header has it.
        found: String,
    },
    /// Text that should be a data key is not one. It is not repeated: it may be most of a key.
    #[error("data key is not 64 lower-case hex digits: found {found} bytes")]
    BadKey {
        /// Length of the text in bytes.
        found: usize,
    },
    /// A part of an encrypted object stands there as a plain object has it.
    #[error("object is encrypted, and its {part} at byte {offset} is not")]
    Unsealed {
        /// The part.
        part: Part,
        /// Where it begins in the object.
        offset: u64,
    },
    /// A part of an encrypted object is not what the holder of the key wrote in that place of that
    /// object.
    #[error("{part} at byte {offset} is damaged or forged: it does not authenticate")]
    Forged {
        /// The part.
        part: Part,
        /// Where it begins in the object.
        offset: u64,
    },
    /// zstd refused to compress or to decompress.
    #[error("zstd failed on the frame at byte {offset}: {reason}")]
    Zstd {
        /// Where the frame begins in the object (0 when a frame was read on its own).
        offset: u64,
        /// zstd's own words.
        reason: &'static str,
    },
    /// Between the frames stands something that is neither a frame of this object nor the trailer.
    #[error("neither a frame nor the trailer at byte {offset}: found magic {found:#010x}")]
    UnknownFrame {
        /// Where it stands in the object.
        offset: u64,
        /// The magic number found.
        found: u32,
    },
    /// A frame that carries no checksum of its content.
    #[error("zstd frame has no checksum")]
    NoFrameChecksum,
    /// A level of compression that the format does not allow.
    #[error("compression level is out of range: expected {min} to {max}, found {found}")]
    Level {
        /// The lowest level.
        min: i32,
        /// The highest level.
        max: i32,
        /// The level asked for.
        found: i32,
    },
    /// The checksum over the header and the frames does not match.
    #[error("stored bytes are damaged: expected CRC-32 {expected:08x}, found {found:08x}")]
    StoredChecksum {
        /// As the trailer has it.
        expected: u32,
        /// As computed.
        found: u32,
    },
    /// The checksum over the trailer's JSON does not match.
    #[error("trailer is damaged: expected CRC-32 {expected:08x}, found {found:08x}")]
    TrailerChecksum {
        /// As the tail has it.
        expected: u32,
        /// As computed.
        found: u32,
    },
    /// The trailer's two lengths disagree.
    #[error("trailer is damaged: its frame has {frame} bytes, its tail says {tail}")]
    TrailerLength {
        /// Payload length by the skippable frame.
        frame: u64,
        /// Payload length by the tail.
        tail: u64,
    },
    /// The plain bytes are not as many as were written.
    #[error(
        "{part} has another length than it was written with: expected {expected}, found {found}"
    )]
    PlainLength {
        /// One frame or all.
        part: Part,
        /// As written.
        expected: u64,
        /// As decoded.
        found: u64,
    },
    /// The plain bytes are not those that were written.
    #[error("plain bytes are damaged: expected {expected}, found {found}")]
    Digest {
        /// As the trailer has it.
        expected: String,
        /// As computed.
        found: String,
    },
}

impl Error {
    /// Whether the bytes themselves must be distrusted, rather than this build or its limits.
    pub fn is_damage(&self) -> bool {
        match self {
            Self::NewerFormat { .. }
            | Self::UnknownCodec { .. }
            | Self::UnknownDigest { .. }
            | Self::DigestOfPlain
            | Self::Encrypted { .. }
            | Self::WrongKey { .. }
            | Self::UnknownCipher { .. }
            | Self::BadKey { .. }
            | Self::TooLarge { .. }
            | Self::Level { .. } => false,
            Self::NotAnObject { .. }
            | Self::NoTrailer { .. }
            | Self::Truncated { .. }
            | Self::Trailing { .. }
            | Self::HeaderJson(_)
            | Self::TrailerJson(_)
            | Self::MissingField { .. }
            | Self::BadSalt { .. }
            | Self::Unsealed { .. }
            | Self::Forged { .. }
            | Self::Zstd { .. }
            | Self::UnknownFrame { .. }
            | Self::NoFrameChecksum
            | Self::StoredChecksum { .. }
            | Self::TrailerChecksum { .. }
            | Self::TrailerLength { .. }
            | Self::PlainLength { .. }
            | Self::Digest { .. } => true,
        }
    }
}

/// At most eight bytes in hex, for messages.
pub(crate) fn hex(bytes: &[u8]) -> String {
    let mut text = String::new();
    push_hex(bytes.get(..8).unwrap_or(bytes), &mut text);
    text
}
