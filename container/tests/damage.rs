//! Damage is found: no changed, missing or added byte becomes data.

use container::{Decoder, Encoder, Error, Reading, decode, read_trailer};
use serde_json::Map;

use crate::{facts, header, object, plain, plain_reader};

/// A bit that flips in the bucket must never be restored as if it were data.
#[test]
fn finds_every_flipped_bit() {
    let content = plain(200);
    let good = object(&content);
    for at in 0..good.len() {
        for bit in 0..8 {
            let mut bad = good.clone();
            bad[at] ^= 1 << bit;
            let result = decode(&bad, 1_000_000, None);
            let error = result.expect_err(&format!("bit {bit} of byte {at} of {}", good.len()));
            // A length or a format that grew is over a limit; all else is plain damage.
            assert!(
                error.is_damage()
                    || matches!(
                        error,
                        Error::TooLarge { .. }
                            | Error::NewerFormat { .. }
                            | Error::UnknownCodec { .. }
                            | Error::Encrypted { .. }
                    ),
                "{error}"
            );
        }
    }
    assert_eq!(decode(&good, 200, None).unwrap().plain, content);
}

#[test]
fn finds_a_missing_end_at_every_byte() {
    let good = object(&plain(200));
    for length in 0..good.len() {
        let error = decode(&good[..length], 1_000_000, None).expect_err("cut short");
        assert!(error.is_damage(), "cut at {length}: {error}");
        match error {
            Error::Truncated {
                expected, found, ..
            } => {
                assert_eq!(found, length as u64);
                assert!(
                    expected > found && expected <= good.len() as u64,
                    "cut at {length}"
                );
            }
            other => panic!("cut at {length}: {other}"),
        }
    }
}

#[test]
fn finds_bytes_added_at_the_end_even_another_whole_object() {
    let good = object(b"content");
    for foreign in [vec![0], vec![0; 4096], good.clone()] {
        let bad = [good.clone(), foreign].concat();
        let error = decode(&bad, 1_000_000, None).expect_err("foreign bytes");
        assert!(matches!(error, Error::Trailing { .. }), "{error}");
    }
}

/// A caller that goes on after an error must not be told that all is well.
#[test]
fn never_finishes_after_an_error() {
    let good = object(&plain(2000));
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 0x10;
        let mut decoder = Decoder::new(1_000_000, None).unwrap();
        let mut out = Vec::new();
        let failed = bad
            .iter()
            .any(|byte| decoder.push(&[*byte], &mut out).is_err());
        let finished = decoder.finish();
        assert!(
            finished.is_err(),
            "byte {at}, failed while pushing: {failed}"
        );
    }
    let mut decoder = Decoder::new(1_000_000, None).unwrap();
    let mut out = Vec::new();
    let bad = [good, vec![7]].concat();
    decoder.push(&bad, &mut out).unwrap_err();
    assert!(matches!(decoder.finish(), Err(Error::Trailing { .. })));
}

/// Two frames exchanged are each sound; the whole is not what was written.
#[test]
fn finds_frames_in_another_order() {
    let mut encoder = Encoder::new(&header(), 3, None).unwrap();
    let mut good = Vec::new();
    let first = encoder.frame(&[1; 500], &mut good).unwrap();
    let second = encoder.frame(&[2; 500], &mut good).unwrap();
    encoder.finish(facts(), &mut good).unwrap();
    assert_eq!(first.stored_bytes, second.stored_bytes);
    let start = usize::try_from(first.offset).unwrap();
    let middle = usize::try_from(second.offset).unwrap();
    let end = middle + usize::try_from(second.stored_bytes).unwrap();
    let bad = [
        &good[..start],
        &good[middle..end],
        &good[start..middle],
        &good[end..],
    ]
    .concat();
    assert!(matches!(
        decode(&bad, 1000, None),
        Err(Error::StoredChecksum { .. })
    ));
}

/// A trailer of another object with the same stored checksum would need luck; with another digest
/// it must still be refused.
#[test]
fn finds_a_trailer_that_belongs_to_other_content() {
    let one = object(&[b'a'; 64]);
    let other = object(&[b'b'; 64]);
    let cut = |bytes: &[u8]| {
        let magic = 0x184D_2A5E_u32.to_le_bytes();
        bytes
            .windows(4)
            .rposition(|window| window == magic)
            .unwrap()
    };
    let bad = [&one[..cut(&one)], &other[cut(&other)..]].concat();
    assert!(matches!(
        decode(&bad, 1000, None),
        Err(Error::StoredChecksum { .. })
    ));
}

#[test]
fn says_what_a_foreign_file_begins_with() {
    let error = decode(b"PK\x03\x04 and so on", 1000, None).unwrap_err();
    assert_eq!(
        error.to_string(),
        "not an object of this repository format: begins with 504b030420616e64"
    );
    assert!(matches!(
        decode(b"", 1000, None),
        Err(Error::Truncated { .. })
    ));
    let zeros = [0; 64];
    assert!(matches!(
        read_trailer(&zeros, 64),
        Err(Error::NoTrailer { .. })
    ));
    assert!(matches!(
        read_trailer(&zeros[..3], 3),
        Err(Error::Truncated { .. })
    ));
    assert!(matches!(
        read_trailer(&zeros[..3], 64),
        Ok(Reading::NeedMore(16))
    ));
}

/// An extent is read on its own, far from the object's digest.
#[test]
fn finds_every_flipped_bit_and_every_cut_of_a_single_frame() {
    let content = plain(300);
    let mut encoder = Encoder::new(&header(), 3, None).unwrap();
    let mut out = Vec::new();
    let frame = encoder.frame(&content, &mut out).unwrap();
    let stored = out[usize::try_from(frame.offset).unwrap()..].to_vec();
    assert_eq!(plain_reader().frame(0, &stored, 300).unwrap(), content);
    let mut missed = Vec::new();
    for at in 0..stored.len() {
        for bit in 0..8 {
            let mut bad = stored.clone();
            bad[at] ^= 1 << bit;
            if plain_reader()
                .frame(0, &bad, 300)
                .is_ok_and(|plain| plain != content)
            {
                missed.push((at, bit));
            }
        }
        plain_reader()
            .frame(0, &stored[..at], 300)
            .expect_err("cut short");
    }
    assert_eq!(missed, []);
    plain_reader()
        .frame(0, &[stored.clone(), stored.clone()].concat(), 300)
        .expect_err("two frames");
    plain_reader()
        .frame(0, &[stored.clone(), vec![0]].concat(), 300)
        .expect_err("a foreign byte");
    plain_reader().frame(0, &stored, 299).expect_err("shorter");
    plain_reader().frame(0, &stored, 301).expect_err("longer");
    let unchecked = zstd::bulk::compress(&content, 3).unwrap();
    assert!(matches!(
        plain_reader().frame(0, &unchecked, 300),
        Err(Error::NoFrameChecksum)
    ));
    let skippable = [0x50, 0x2A, 0x4D, 0x18, 1, 0, 0, 0, 9];
    assert!(matches!(
        plain_reader().frame(0, &skippable, 0),
        Err(Error::UnknownFrame { .. })
    ));
}

#[test]
fn refuses_what_a_later_version_wrote_and_what_is_encrypted() {
    let rewrite = |from: &str, to: &str| {
        let good = object(b"content");
        let text = String::from_utf8_lossy(&good[8..]).into_owned();
        let line = text.split_inclusive('\n').next().unwrap();
        let later = line.replace(from, to);
        assert_ne!(line, later);
        let length = u32::try_from(later.len()).unwrap().to_le_bytes();
        [
            &good[..4],
            &length,
            later.as_bytes(),
            &good[8 + line.len()..],
        ]
        .concat()
    };
    let newer = decode(
        &rewrite(r#""format":1"#, r#""format":2,"kind":7"#),
        1000,
        None,
    )
    .unwrap_err();
    assert!(newer.to_string().contains("upgrade anywhen"), "{newer}");
    assert!(matches!(
        newer,
        Error::NewerFormat {
            supported: 1,
            found: 2
        }
    ));
    let codec = decode(
        &rewrite(r#""codec":"zstd""#, r#""codec":"brotli""#),
        1000,
        None,
    )
    .unwrap_err();
    assert!(matches!(codec, Error::UnknownCodec { .. }), "{codec}");
    let fields = format!(
        r#""codec":"zstd","key":"k1","cipher":"aes-256-gcm","salt":"{}""#,
        "5a".repeat(32)
    );
    let key = rewrite(r#""codec":"zstd""#, &fields);
    assert!(matches!(
        decode(&key, 1000, None),
        Err(Error::Encrypted { .. })
    ));
}

#[test]
fn a_skippable_frame_between_the_frames_is_refused() {
    let mut encoder = Encoder::new(&header(), 3, None).unwrap();
    let mut out = Vec::new();
    encoder.frame(b"content", &mut out).unwrap();
    out.extend_from_slice(&[0x51, 0x2A, 0x4D, 0x18, 0, 0, 0, 0]);
    encoder.finish(Map::new(), &mut out).unwrap();
    assert!(matches!(
        decode(&out, 1000, None),
        Err(Error::UnknownFrame {
            found: 0x184D_2A51,
            ..
        })
    ));
}
