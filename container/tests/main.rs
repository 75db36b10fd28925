//! The container's tests, a module per story.
#![expect(
    clippy::unwrap_used,
    reason = "helpers outside #[test] functions may fail loudly too"
)]

mod compressed;
mod damage;
mod forged;
mod fuzz;
mod limits;
mod parts;
mod round_trip;
mod sealed;

use container::{DataKey, FrameReader, Header, encode};
use serde_json::{Map, json};

/// The salt of [`sealed_object`].
const SALT: [u8; 32] = [7; 32];

/// A header as a segment has it.
fn header() -> Header {
    Header {
        timeline: Some(3),
        start: Some("0/1000000".to_owned()),
        end: Some("0/2000000".to_owned()),
        segment_bytes: Some(16 * 1024 * 1024),
        ..Header::new(
            "segment",
            "wal/00000003/0000000300000000/000000030000000000000001",
            "main",
            "7412345678901234567",
        )
    }
}

fn facts() -> Map<String, serde_json::Value> {
    let mut facts = Map::new();
    facts.insert(
        "verified".to_owned(),
        json!({"until": "0/2000000", "records": 17}),
    );
    facts
}

/// A small object of one frame.
fn object(plain: &[u8]) -> Vec<u8> {
    encode(&header(), plain, facts(), 3, None).unwrap()
}

/// Reads the frames of any plain object.
fn plain_reader() -> FrameReader {
    FrameReader::new(&object(b""), None).unwrap().0
}

fn key() -> DataKey {
    DataKey::new(&[42; 32])
}

/// [`header`] with all that an encrypted object's has.
fn sealed_header(salt: [u8; 32]) -> Header {
    let mut header = header();
    header.encrypt(&key().id("20261120"), &salt, vec!["YWdl".to_owned()]);
    header
}

/// [`object`], encrypted with [`key`].
fn sealed_object(plain: &[u8]) -> Vec<u8> {
    encode(&sealed_header(SALT), plain, facts(), 3, Some(&key())).unwrap()
}

/// Bytes that compress a little: the same for every run.
fn plain(length: usize) -> Vec<u8> {
    let mut state = 0x9E37_79B9_u32;
    std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state.to_le_bytes()[0] & 0x1F
    })
    .take(length)
    .collect()
}
