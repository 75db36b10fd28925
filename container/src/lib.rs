//! The object container: what every object in a repository looks like, from its first byte to its
//! last. Bytes in, bytes out; nothing here opens, waits or asks the time.
//!
//! | part         | bytes | content |
//! |--------------|------:|---------|
//! | header frame |     4 | zstd skippable frame magic 0x184D2A50, little-endian |
//! |              |     4 | length of the header text, little-endian, at most 64 KiB |
//! |              |     n | [`Header`] as JSON, one line with its line feed |
//! | frames       |     m | standard zstd frames (RFC 8878), each with content size and checksum; or sealed frames |
//! | trailer frame|     4 | zstd skippable frame magic 0x184D2A5E, little-endian |
//! |              |     4 | length of the rest, little-endian |
//! |              |     s | the seal, of an encrypted object; else nothing |
//! |              |     t | [`Trailer`] as JSON, at most 16 MiB |
//! |              |     4 | t, little-endian |
//! |              |     4 | CRC-32 (IEEE) of the trailer's JSON, little-endian |
//! |              |     8 | `ANYWHEN` and the byte 1 |
//!
//! Stock `zstd -dc` skips the two outer parts and gives the plain bytes; `head -n 1` shows a person
//! what an object is; the last [`TAIL_BYTES`] bytes lead to the trailer without reading the rest.
//! [`Trailer::stored_crc32`] covers all bytes before the trailer frame, and
//! [`Trailer::digest`] the plain bytes, so that no changed bit stays unseen. It is their BLAKE3 hash,
//! or that of the hashes of the frames ([`Header::digest_of`]), which those who compress frames
//! beside each other have already.
//!
//! # Encrypted objects
//!
//! Header and trailer stay clear; the header has a key id, a cipher and a salt besides
//! ([`Header::encrypt`]). Every zstd frame stands inside a sealed frame, which stock zstd refuses:
//!
//! | part         | bytes | content |
//! |--------------|------:|---------|
//! | sealed frame |     4 | `ANY` and the byte 1 |
//! |              |     4 | length of the rest, little-endian |
//! |              |     c | one zstd frame, as a plain object has it, encrypted with AES-256-GCM |
//! |              |    16 | its tag |
//! | seal         |    16 | the tag of nothing, with header and trailer as associated data |
//!
//! | value          | is |
//! |----------------|----|
//! | object key     | HKDF-SHA256 of the [`DataKey`]; salt: the header's 32 bytes; info: `anywhen object key 1` |
//! | nonce          | offset in the object of the sealed frame or of the trailer frame, 8 bytes, big-endian; three bytes 0; one byte 0 for a frame or 1 for the seal |
//! | associated data| the header's frame as stored, magic, length and line feed included; for the seal followed by the trailer's JSON as stored |
//! | fingerprint    | 16 bytes, HKDF-SHA256 of the [`DataKey`]; no salt; info: `anywhen key id 1` |
//! | key id         | day on which the data key was made (`YYYYMMDD`), `-`, fingerprint in hex |
//!
//! So a frame opens in its own place of its own object and nowhere else, and the seal holds where
//! the frames of that object end. What the container cannot know is whether an object should have
//! been encrypted, and whether it stands under the name that its header has: its readers ask.
//!
//! [`Encoder`] and [`Decoder`] mirror each other: `put_header`, `put_frame`, `put_trailer` on the
//! way out; `take_header`, `take_frame`, `take_trailer` on the way back.
#![warn(
    missing_docs,
    clippy::arithmetic_side_effects,
    clippy::as_conversions,
    clippy::indexing_slicing
)]

mod content;
mod decoder;
mod encoder;
mod error;
mod frame;
mod frame_reader;
mod header;
mod key;
mod sealing;
mod stored;
mod trailer;

pub use decoder::{Decoder, Object, decode, frame_places};
pub use encoder::{CompressedFrame, Encoder, Frame, FrameCompressor, encode};
pub use error::{Error, Part};
pub use frame::{LEVEL_STORED, MAX_FRAME_PLAIN_BYTES};
pub use frame_reader::FrameReader;
pub use header::{
    CIPHER_AES_256_GCM, CODEC_ZSTD, DIGEST_OF_FRAMES, FORMAT, Header, MAX_HEADER_BYTES, read_header,
};
pub use key::{DataKey, KEY_BYTES};
pub use stored::check_stored;
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
/// differ with codec and level. Where the header has [`Header::digest_of`], see
/// [`digest_of_frames`].
pub fn digest(plain: &[u8]) -> String {
    digest_text(&blake3::hash(plain))
}

/// The digest of an object whose header says [`DIGEST_OF_FRAMES`]: `blake3:` and the 64 hex digits
/// of the BLAKE3 hash over the 32 bytes of the BLAKE3 hash of each frame's plain bytes, in order.
///
/// Two such objects hold the same content in the same frames if and only if their digests are
/// equal.
pub fn digest_of_frames<'a>(hashes: impl IntoIterator<Item = &'a [u8; 32]>) -> String {
    let mut whole = blake3::Hasher::new();
    for hash in hashes {
        whole.update(hash);
    }
    digest_text(&whole.finalize())
}

fn digest_text(hash: &blake3::Hash) -> String {
    format!("blake3:{}", hash.to_hex())
}

/// A length in memory as a number of bytes.
fn byte_count(length: usize) -> u64 {
    u64::try_from(length).expect("a length in memory fits in 64 bits")
}
