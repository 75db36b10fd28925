//! Hostile lengths meet limits before they meet the allocator.

use container::{
    Decoder, Encoder, Error, FrameReader, Header, MAX_FRAME_PLAIN_BYTES, MAX_HEADER_BYTES,
    MAX_TRAILER_BYTES, Part, decode, encode, read_header, read_trailer,
};
use serde_json::{Map, json};

use crate::{SALT, header, key, object, parts, plain_reader, sealed_header};

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
        plain_reader().frame(0, b"", length),
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

/// A sealed frame is held whole before it is opened: its claim must not fill the memory.
#[test]
fn a_sealed_frame_is_refused_by_its_head_when_it_cannot_be_honest() {
    let header = sealed_header(SALT);
    let mut before = Vec::new();
    let mut encoder = Encoder::new(&header, 3, Some(&key())).unwrap();
    let first = encoder.frame(&[1; 100], &mut before).unwrap();
    let cases = [
        // What zstd makes of 900 bytes left at the most, and the tag.
        (1000, 900 + 900 / 256 + 63 + 16 + 64, true),
        (1000, u32::MAX, true),
        (u64::MAX, u32::MAX, true),
        (u64::MAX, (1 << 30) + (1 << 22) + 16, false),
        (u64::MAX, (1 << 30) + (1 << 22) + 17, true),
        (100, 600, true),
    ];
    for (limit, length, refused) in cases {
        let mut decoder = Decoder::new(limit, Some(&key())).unwrap();
        let mut out = Vec::new();
        decoder.push(&before, &mut out).unwrap();
        assert_eq!(out, [1; 100]);
        let head = [*b"ANY\x01", u32::to_le_bytes(length), [0; 4]].concat();
        let result = decoder.push(&head, &mut out);
        if refused {
            assert!(
                matches!(
                    result,
                    Err(Error::TooLarge {
                        part: Part::SealedFrame,
                        found,
                        ..
                    }) if found == u64::from(length)
                ),
                "{limit} {length}: {result:?}"
            );
        } else {
            result.unwrap();
        }
        decoder.finish().unwrap_err();
    }
    // By itself, the frame has to be as long as it says.
    let (reader, _) = FrameReader::new(&before, Some(&key())).unwrap();
    let mut frame = parts::cut(&before, first).to_vec();
    frame[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
    assert!(matches!(
        reader.frame(first.offset, &frame, 100),
        Err(Error::Truncated {
            part: Part::SealedFrame,
            expected: 0x1_0000_0007,
            ..
        })
    ));
}

/// Whoever has the key can still make a mistake, or a bomb.
#[test]
fn a_sealed_bomb_stops_at_the_limit() {
    let zeros = vec![0; 64 << 20];
    let bomb = encode(&sealed_header(SALT), &zeros, Map::new(), 3, Some(&key())).unwrap();
    assert!(bomb.len() < 10_000);
    let mut decoder = Decoder::new(1 << 20, Some(&key())).unwrap();
    let (mut given, mut largest) = (0, 0);
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
    assert!(given <= 1 << 20);
    assert!(largest <= 128 * 1024);
    decoder.finish().unwrap_err();
}

/// What is left of the limit may be all noise, which zstd makes longer.
#[test]
fn a_sealed_object_that_meets_the_limit_exactly_is_read() {
    let mut digest = [0; 32];
    let noise: Vec<u8> = std::iter::repeat_with(|| {
        digest = *blake3::hash(&digest).as_bytes();
        digest
    })
    .take(10_000)
    .flatten()
    .collect();
    for length in [0, 1, 17, 255, 256, 1000, 131_071, 131_072, 131_073, 320_000] {
        for level in [-7, 3, 19] {
            let content = &noise[..length];
            let header = sealed_header(SALT);
            let mut encoder = Encoder::new(&header, level, Some(&key())).unwrap();
            let mut stored = Vec::new();
            encoder.frame(b"", &mut stored).unwrap();
            encoder.frame(content, &mut stored).unwrap();
            encoder.frame(b"", &mut stored).unwrap();
            encoder.finish(Map::new(), &mut stored).unwrap();
            let limit = length as u64;
            assert_eq!(decode(&stored, limit, Some(&key())).unwrap().plain, content);
            if length > 0 {
                let error = decode(&stored, limit - 1, Some(&key())).unwrap_err();
                assert!(matches!(error, Error::TooLarge { .. }), "{error}");
            }
        }
    }
}

/// Room for wraps is that of the header: more are refused, not cut.
#[test]
fn more_wraps_than_a_header_holds_are_refused() {
    let mut header = header();
    let wraps = vec!["x".repeat(300); 300];
    header.encrypt(&key().id("20261120"), &SALT, wraps);
    assert!(matches!(
        Encoder::new(&header, 3, Some(&key())),
        Err(Error::TooLarge {
            part: Part::Header,
            ..
        })
    ));
}
