//! Hostile lengths meet limits before they meet the allocator.

use container::{
    Decoder, Encoder, Error, Header, MAX_FRAME_PLAIN_BYTES, MAX_HEADER_BYTES, MAX_TRAILER_BYTES,
    Part, decode, decode_frame, encode, read_header, read_trailer,
};
use serde_json::{Map, json};

use crate::{header, object};

/// A few kilobytes in a bucket must not fill an operator's memory at three in the morning.
#[test]
fn a_bomb_stops_at_the_limit() {
    let bomb = encode(&header(), &vec![0; 64 << 20], Map::new(), 3, None).unwrap();
    assert!(bomb.len() < 10_000);
    let mut largest = 0;
    let mut given = 0;
    let mut decoder = Decoder::new(1 << 20, None).unwrap();
    let error = decoder
        .push_to(&bomb, |plain| {
            largest = largest.max(plain.len());
            given += plain.len();
        })
        .unwrap_err();
    assert!(matches!(
        error,
        Error::TooLarge {
            part: Part::Plain,
            limit: 1_048_576,
            ..
        }
    ));
    assert!(!error.is_damage());
    assert!(given <= 1 << 20);
    assert!(largest <= 128 * 1024);
    decoder.finish().unwrap_err();
}

#[test]
fn a_limit_that_is_exactly_met_is_not_exceeded() {
    let stored = object(&[5; 1000]);
    assert_eq!(decode(&stored, 1000, None).unwrap().plain, [5; 1000]);
    assert!(matches!(
        decode(&stored, 999, None),
        Err(Error::TooLarge {
            part: Part::Plain,
            ..
        })
    ));
}

#[test]
fn huge_claimed_lengths_are_refused_by_their_eight_bytes() {
    let mut prefix = 0x184D_2A50_u32.to_le_bytes().to_vec();
    prefix.extend_from_slice(&u32::MAX.to_le_bytes());
    assert!(matches!(
        read_header(&prefix),
        Err(Error::TooLarge {
            part: Part::Header,
            ..
        })
    ));

    let mut tail = u32::MAX.to_le_bytes().to_vec();
    tail.extend_from_slice(&[0; 4]);
    tail.extend_from_slice(b"ANYWHEN\x01");
    let error = read_trailer(&tail, u64::MAX).unwrap_err();
    assert!(matches!(
        error,
        Error::TooLarge {
            part: Part::Trailer,
            ..
        }
    ));
    let claimed = u32::try_from(MAX_TRAILER_BYTES).unwrap();
    tail[..4].copy_from_slice(&claimed.to_le_bytes());
    assert!(matches!(
        read_trailer(&tail, 1000),
        Err(Error::Truncated { .. })
    ));

    let mut encoder = Encoder::new(&header(), 3, None).unwrap();
    let mut out = Vec::new();
    encoder.frame(b"x", &mut out).unwrap();
    out.extend_from_slice(&0x184D_2A5E_u32.to_le_bytes());
    out.extend_from_slice(&u32::MAX.to_le_bytes());
    out.push(0);
    assert!(matches!(
        decode(&out, 1000, None),
        Err(Error::TooLarge {
            part: Part::Trailer,
            ..
        })
    ));
}

/// The writer refuses what no reader would take.
#[test]
fn the_encoder_keeps_the_limits_that_the_decoder_sets() {
    let long = "x".repeat(usize::try_from(MAX_HEADER_BYTES).unwrap());
    let error = Encoder::new(
        &Header {
            name: long,
            ..header()
        },
        3,
        None,
    )
    .unwrap_err();
    assert!(matches!(
        error,
        Error::TooLarge {
            part: Part::Header,
            ..
        }
    ));

    let mut facts = Map::new();
    let long = "x".repeat(usize::try_from(MAX_TRAILER_BYTES).unwrap());
    facts.insert("long".to_owned(), json!(long));
    let error = encode(&header(), b"", facts, 3, None).unwrap_err();
    assert!(matches!(
        error,
        Error::TooLarge {
            part: Part::Trailer,
            ..
        }
    ));

    for level in [-8, 20, i32::MAX] {
        assert!(matches!(
            Encoder::new(&header(), level, None),
            Err(Error::Level { .. })
        ));
    }
    for header in [
        Header {
            format: 2,
            ..header()
        },
        Header {
            codec: "lz4".to_owned(),
            ..header()
        },
        Header {
            key: Some("k".to_owned()),
            ..header()
        },
    ] {
        Encoder::new(&header, 3, None).unwrap_err();
    }
}

#[test]
fn a_frame_beyond_the_largest_segment_is_refused_unread() {
    let length = usize::try_from(MAX_FRAME_PLAIN_BYTES).unwrap() + 1;
    assert!(matches!(
        decode_frame(b"", length),
        Err(Error::TooLarge {
            part: Part::Frame,
            ..
        })
    ));
}

/// What the highest level writes of a large segment still fits the reader's 8 MiB window.
#[test]
fn every_level_is_read_with_the_window_limit() {
    let content = crate::plain(1 << 16).repeat(300);
    for level in [-7, 1, 19] {
        let stored = encode(&header(), &content, Map::new(), level, None).unwrap();
        let mut seen = 0;
        let mut decoder = Decoder::new(u64::MAX, None).unwrap();
        decoder
            .push_to(&stored, |plain| seen += plain.len())
            .unwrap();
        decoder.finish().unwrap();
        assert_eq!(seen, content.len(), "level {level}");
    }
}
