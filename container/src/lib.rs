//! The object container: what every object in a repository looks like, from its first byte to its
//! last. Bytes in, bytes out; nothing here opens, waits or asks the time.
//!
//! | part         | bytes | content |
//! |--------------|------:|---------|
//! | header frame |     4 | zstd skippable frame magic 0x184D2A50, little-endian |
//! |              |     4 | length of the header text, little-endian, at most 64 KiB |
//! |              |     n | [`Header`] as JSON, one line with its line feed |
//! | frames       |     m | standard zstd frames (RFC 8878), each with content size and checksum |
//! | trailer frame|     4 | zstd skippable frame magic 0x184D2A5E, little-endian |
//! |              |     4 | length of the rest, little-endian |
//! |              |     t | [`Trailer`] as JSON, at most 16 MiB |
//! |              |     4 | t, little-endian |
//! |              |     4 | CRC-32 (IEEE) of the trailer's JSON, little-endian |
//! |              |     8 | `ANYWHEN` and the byte 1 |
//!
//! Stock `zstd -dc` skips the two outer parts and gives the plain bytes; `head -n 1` shows a person
//! what an object is; the last [`TAIL_BYTES`] bytes lead to the trailer without reading the rest.
//! [`Trailer::stored_crc32`] covers all bytes before the trailer frame, and
//! [`Trailer::digest`] the plain bytes, so that no changed bit stays unseen.
//!
//! [`Encoder`] and [`Decoder`] mirror each other: `put_header`, `put_frame`, `put_trailer` on the
//! way out; `take_header`, `take_frame`, `take_trailer` on the way back.
#![warn(
    missing_docs,
    clippy::arithmetic_side_effects,
    clippy::as_conversions,
    clippy::indexing_slicing
)]

mod decoder;
mod encoder;
mod error;
mod frame;
mod header;
mod trailer;

pub use decoder::{Decoder, Object, decode};
pub use encoder::{Encoder, Frame, encode};
pub use error::{Error, Part};
pub use frame::{MAX_FRAME_PLAIN_BYTES, decode_frame};
pub use header::{CODEC_ZSTD, FORMAT, Header, MAX_HEADER_BYTES, read_header};
pub use trailer::{MAX_TRAILER_BYTES, TAIL_BYTES, Trailer, read_trailer};

/// What reading one end of an object gave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reading<T> {
    /// The whole of what was asked for.
    Done(T),
    /// The stretch was too short: come back with at least this many bytes in all.
    NeedMore(u64),
}

/// The digest of plain bytes as it stands in a [`Trailer`]: `blake3:` and 64 hex digits.
///
/// Two objects hold the same content if and only if their digests are equal; stored bytes may
/// differ with codec and level.
pub fn digest(plain: &[u8]) -> String {
    digest_text(&blake3::hash(plain))
}

fn digest_text(hash: &blake3::Hash) -> String {
    format!("blake3:{}", hash.to_hex())
}

/// A length in memory as a number of bytes.
fn byte_count(length: usize) -> u64 {
    u64::try_from(length).expect("a length in memory fits in 64 bits")
}
