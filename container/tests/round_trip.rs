//! What was written comes back, however its bytes are cut.

use container::{
    Decoder, Encoder, Header, Reading, TAIL_BYTES, decode, digest, encode, frame_places,
    read_header, read_trailer,
};
use proptest::prelude::*;
use serde_json::Map;

use crate::{facts, header, key, object, plain, plain_reader, sealed_header};

proptest! {
    #[test]
    fn gives_back_what_was_written_in_any_frames_through_any_cuts(
        parts in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..3000), 0..6),
        cut in 1_usize..5000,
        level in -7_i32..=9,
    ) {
        let mut encoder = Encoder::new(&header(), level, None).unwrap();
        let mut stored = Vec::new();
        let mut frames = Vec::new();
        for part in &parts {
            // Drained in between, as an upload does.
            let mut out = Vec::new();
            frames.push(encoder.frame(part, &mut out).unwrap());
            stored.extend_from_slice(&out);
            prop_assert_eq!(encoder.stored_bytes(), stored.len() as u64);
        }
        let written = encoder.finish(facts(), &mut stored).unwrap();

        let mut decoder = Decoder::new(u64::MAX, None).unwrap();
        let mut plain = Vec::new();
        for bytes in stored.chunks(cut) {
            decoder.push(bytes, &mut plain).unwrap();
        }
        let (read_header, read) = decoder.finish().unwrap();
        prop_assert_eq!(&plain, &parts.concat());
        prop_assert_eq!(&read.digest, &digest(&plain));
        prop_assert_eq!(read_header, header());
        prop_assert_eq!(read, written);

        for (frame, part) in frames.iter().zip(&parts) {
            let start = usize::try_from(frame.offset).unwrap();
            let end = start + usize::try_from(frame.stored_bytes).unwrap();
            prop_assert_eq!(&plain_reader().frame(0, &stored[start..end], part.len()).unwrap(), part);
        }
    }
}

/// The promise to someone who has lost Anywhen: any zstd reads an object.
#[test]
fn stock_zstd_gives_the_plain_bytes() {
    let plain = plain(300_000);
    let mut encoder = Encoder::new(&header(), 3, None).unwrap();
    let mut stored = Vec::new();
    encoder.frame(&plain[..100_000], &mut stored).unwrap();
    encoder.frame(&plain[100_000..], &mut stored).unwrap();
    encoder.finish(facts(), &mut stored).unwrap();
    assert_eq!(zstd::stream::decode_all(stored.as_slice()).unwrap(), plain);
}

#[test]
fn shows_a_person_what_an_object_is_on_its_first_line() {
    let stored = object(b"x");
    let line = stored[8..].split(|byte| *byte == b'\n').next().unwrap();
    let text = std::str::from_utf8(line).unwrap();
    assert!(
        text.starts_with(r#"{"format":1,"kind":"segment","name":"wal/00000003/"#),
        "{text}"
    );
    assert!(
        !text.contains("key"),
        "an absent field is not written: {text}"
    );
}

/// Listing a repository reads both ends of objects, never the whole.
#[test]
fn both_ends_can_be_read_alone_from_as_few_bytes_as_they_ask_for() {
    let stored = object(&plain(50_000));
    let mut length = 0_u64;
    let mut rounds = 0;
    let (header_read, end) = loop {
        rounds += 1;
        match read_header(&stored[..usize::try_from(length).unwrap()]).unwrap() {
            Reading::NeedMore(bytes) => {
                assert!(bytes > length);
                length = bytes;
            }
            Reading::Done(done) => break done,
        }
    };
    assert_eq!((header_read, end, rounds), (header(), length, 3));

    let object_bytes = stored.len() as u64;
    let mut length = 0_u64;
    let trailer = loop {
        let start = stored.len() - usize::try_from(length).unwrap();
        match read_trailer(&stored[start..], object_bytes).unwrap() {
            Reading::NeedMore(bytes) => {
                assert!(bytes > length);
                length = bytes;
            }
            Reading::Done(trailer) => break trailer,
        }
    };
    assert!(length > TAIL_BYTES);
    assert_eq!(trailer, decode(&stored, 50_000, None).unwrap().trailer);
    assert_eq!(
        read_trailer(&stored, object_bytes).unwrap(),
        Reading::Done(trailer)
    );
}

#[test]
fn an_object_without_content_is_an_object() {
    for stored in [encode(&header(), b"", Map::new(), 3, None).unwrap(), {
        let mut out = Vec::new();
        Encoder::new(&header(), 3, None)
            .unwrap()
            .finish(Map::new(), &mut out)
            .unwrap();
        out
    }] {
        let object = decode(&stored, 0, None).unwrap();
        assert_eq!(object.plain, b"");
        assert_eq!(object.trailer.digest, digest(b""));
    }
}

/// A later version may add fields; this build must go on reading.
#[test]
fn ignores_fields_that_it_does_not_know() {
    let stored = object(b"content");
    let text = |frame: &[u8]| String::from_utf8(frame[8..].to_vec()).unwrap();
    let Reading::Done((_, end)) = read_header(&stored).unwrap() else {
        panic!("whole object")
    };
    let later = text(&stored[..usize::try_from(end).unwrap()]).replace(
        r#"{"format":1,"#,
        r#"{"format":1,"colour":{"of":["the","bikeshed"]},"#,
    );
    let mut prefix = stored[..4].to_vec();
    prefix.extend_from_slice(&u32::try_from(later.len()).unwrap().to_le_bytes());
    prefix.extend_from_slice(later.as_bytes());
    let Reading::Done((read, _)) = read_header(&prefix).unwrap() else {
        panic!("whole header")
    };
    assert_eq!(read, header());
}

#[test]
fn equal_content_has_an_equal_digest_at_any_level_and_in_any_frames() {
    let plain = plain(10_000);
    let one = decode(
        &encode(&header(), &plain, Map::new(), 1, None).unwrap(),
        10_000,
        None,
    )
    .unwrap();
    let other = decode(
        &encode(&header(), &plain, Map::new(), 19, None).unwrap(),
        10_000,
        None,
    )
    .unwrap();
    assert_ne!(one.trailer.stored_crc32, other.trailer.stored_crc32);
    assert_eq!(one.trailer.digest, other.trailer.digest);
    assert_eq!(one.trailer.digest.len(), "blake3:".len() + 64);
    let header = Header {
        kind: "pack".to_owned(),
        ..header()
    };
    let third = decode(
        &encode(&header, &plain, facts(), 3, None).unwrap(),
        10_000,
        None,
    )
    .unwrap();
    assert_eq!(one.trailer.digest, third.trailer.digest);
}

#[test]
fn tells_where_its_frames_lie() {
    // a copy of a backup that was broken off goes on in packs whose layout only they know
    for (header, key) in [(header(), None), (sealed_header([7; 32]), Some(key()))] {
        let mut encoder = Encoder::new(&header, 3, key.as_ref()).unwrap();
        let mut stored = Vec::new();
        let lengths = [0, 1, 200_000, 5];
        let frames = lengths.map(|length| encoder.frame(&plain(length), &mut stored).unwrap());
        encoder.finish(facts(), &mut stored).unwrap();
        let found = frame_places(&stored, 1 << 20, key.as_ref()).unwrap();
        let expected = std::iter::zip(frames, lengths.map(|length| u64::try_from(length).unwrap()));
        assert_eq!(found, expected.collect::<Vec<_>>());
        stored.pop();
        assert!(frame_places(&stored, 1 << 20, key.as_ref()).is_err());
    }
}
