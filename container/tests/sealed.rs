//! Encrypted objects: what was sealed comes back with its key, in a form that stays.

use container::{
    DataKey, Decoder, Encoder, Error, FrameReader, Header, Reading, Trailer, check_stored, decode,
    digest, encode, read_header, read_trailer,
};
use proptest::prelude::*;
use serde_json::{Map, json};

use crate::parts::{self, Parts};
use crate::{SALT, facts, header, key, object, plain, sealed_header, sealed_object};

proptest! {
    #[test]
    fn gives_back_what_was_sealed_in_any_frames_through_any_cuts(
        parts in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..3000), 0..6),
        cut in 1_usize..5000,
        level in -7_i32..=9,
        secret: [u8; 32],
        salt: [u8; 32],
    ) {
        let key = DataKey::new(&secret);
        let mut header = header();
        header.encrypt(&key.id("20261120"), &salt, vec!["YWdl".to_owned()]);
        let mut encoder = Encoder::new(&header, level, Some(&key)).unwrap();
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

        let mut decoder = Decoder::new(u64::MAX, Some(&key)).unwrap();
        let mut plain = Vec::new();
        for bytes in stored.chunks(cut) {
            decoder.push(bytes, &mut plain).unwrap();
        }
        let (read_header, read) = decoder.finish().unwrap();
        prop_assert_eq!(&plain, &parts.concat());
        prop_assert_eq!(&read.digest, &digest(&plain));
        prop_assert_eq!(&read_header, &header);
        prop_assert_eq!(&read, &written);
        prop_assert_eq!(check_stored(&stored).unwrap(), (header, written));

        let (reader, _) = FrameReader::new(&stored, Some(&key)).unwrap();
        for (frame, part) in frames.iter().zip(&parts).rev() {
            let bytes = parts::cut(&stored, *frame);
            prop_assert_eq!(&reader.frame(frame.offset, bytes, part.len()).unwrap(), part);
            prop_assert!(reader.frame(frame.offset + 1, bytes, part.len()).is_err());
        }
    }
}

/// Bytes that were computed once without this crate, by Python's `cryptography`, `zstandard` and
/// `blake3`. An object that was written years ago has to open with every later version.
///
/// ```python
/// key, salt = bytes(range(32)), bytes(range(160, 192))
/// hkdf = lambda n, salt, info: HKDF(SHA256(), n, salt, info).derive(key)
/// fingerprint = hkdf(16, None, b"anywhen key id 1").hex()
/// header = pack("<II", 0x184D2A50, len(text)) + text        # text: GOLDEN's first line
/// gcm = AESGCM(hkdf(32, salt, b"anywhen object key 1"))
/// out = header
/// for plain in [b"first", b"second"]:
///     frame = ZstdCompressor(level=3, write_checksum=True).compress(plain)
///     body = gcm.encrypt(pack(">QI", len(out), 0), frame, header)
///     out += b"ANY\x01" + pack("<I", len(body)) + body
/// seal = gcm.encrypt(pack(">QI", len(out), 1), b"", header + trailer)   # trailer: the JSON
/// out += pack("<II", 0x184D2A5E, 16 + len(trailer) + 16) + seal + trailer
/// out += pack("<II", len(trailer), crc32(trailer)) + b"ANYWHEN\x01"
/// ```
const GOLDEN: &str = "\
    502a4d18000100007b22666f726d6174223a312c226b696e64223a227061636b222c226e616d65223a227061636b\
    732f78222c22636c7573746572223a226d61696e222c2273797374656d5f6964223a2231222c22636f646563223a\
    227a737464222c226b6579223a2232303236313132302d3533633166376637616533336361336363613061663666\
    323931326262373937222c22636970686572223a226165732d3235362d67636d222c2273616c74223a2261306131\
    61326133613461356136613761386139616161626163616461656166623062316232623362346235623662376238\
    6239626162626263626462656266222c227772617073223a5b225957646c225d7d0a414e590122000000c9afd783\
    34376468f3c2a0385b6c15ff26f888394d9a4acf7bce37cf516385b07df6414e5901230000002fcf82cdd2707654\
    f5c547e8b2153862fa15eed8e1d3b1dad3e5f583ab7a1a35787a7f5e2a4d18ae000000fa03f5ab00283d0ef2dfc0\
    220e2fc3c47b22706c61696e5f6279746573223a31312c22646967657374223a22626c616b65333a666133346162\
    31396431663134633732626438333761353361633539386431346137616230653863363561663736653436646461\
    343862376362623438613964222c2273746f7265645f6372633332223a3930343139393632322c22666163747322\
    3a7b226e223a317d7d8e000000c8a96a63414e595748454e01";

/// 32 bytes from `first` on.
fn counting(first: u8) -> [u8; 32] {
    let mut bytes = [0; 32];
    for (byte, value) in bytes.iter_mut().zip(first..) {
        *byte = value;
    }
    bytes
}

#[test]
fn writes_and_reads_exactly_the_bytes_of_an_independent_writer() {
    let golden: Vec<u8> = (0..GOLDEN.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&GOLDEN[at..at + 2], 16).unwrap())
        .collect();
    let key = DataKey::new(&counting(0));
    assert_eq!(key.fingerprint(), "53c1f7f7ae33ca3cca0af6f2912bb797");

    let mut header = Header::new("pack", "packs/x", "main", "1");
    header.encrypt(&key.id("20261120"), &counting(160), vec!["YWdl".to_owned()]);
    let mut encoder = Encoder::new(&header, 3, Some(&key)).unwrap();
    let mut written = Vec::new();
    encoder.frame(b"first", &mut written).unwrap();
    let second = encoder.frame(b"second", &mut written).unwrap();
    let mut facts = Map::new();
    facts.insert("n".to_owned(), json!(1));
    encoder.finish(facts, &mut written).unwrap();
    assert_eq!(written, golden);

    let read = decode(&golden, 11, Some(&key)).unwrap();
    assert_eq!(
        (read.plain.as_slice(), read.header),
        (&b"firstsecond"[..], header)
    );
    let (reader, _) = FrameReader::new(&golden, Some(&key)).unwrap();
    let bytes = parts::cut(&golden, second);
    assert_eq!(reader.frame(second.offset, bytes, 6).unwrap(), b"second");
}

#[test]
fn says_which_key_is_needed_and_which_was_given() {
    let stored = sealed_object(b"content");
    let id = key().id("20261120");
    let needed = decode(&stored, 1000, None).unwrap_err();
    assert!(
        matches!(&needed, Error::Encrypted { key } if *key == id),
        "{needed}"
    );
    let other = DataKey::new(&[9; 32]);
    let wrong = decode(&stored, 1000, Some(&other)).unwrap_err();
    assert!(
        matches!(&wrong, Error::WrongKey { expected, found } if *expected == id && *found == other.fingerprint()),
        "{wrong}"
    );
    for error in [
        FrameReader::new(&stored, None).unwrap_err(),
        FrameReader::new(&stored, Some(&other)).unwrap_err(),
    ] {
        assert!(matches!(
            error,
            Error::Encrypted { .. } | Error::WrongKey { .. }
        ));
        assert!(!error.is_damage());
    }
}

/// Encryption asked for and not possible is an error, never a plain write.
#[test]
fn never_writes_plain_what_was_to_be_sealed() {
    let refused = |header: &Header, key: Option<&DataKey>| {
        encode(header, b"content", Map::new(), 3, key).unwrap_err()
    };
    assert!(matches!(
        refused(&header(), Some(&key())),
        Error::MissingField { field: "key" }
    ));
    assert!(matches!(
        refused(&sealed_header(SALT), None),
        Error::Encrypted { .. }
    ));
    let other = DataKey::new(&[9; 32]);
    assert!(matches!(
        refused(&sealed_header(SALT), Some(&other)),
        Error::WrongKey { .. }
    ));
    let no_salt = Header {
        salt: None,
        ..sealed_header(SALT)
    };
    assert!(matches!(
        refused(&no_salt, Some(&key())),
        Error::MissingField { field: "salt" }
    ));
}

/// A reader that holds a key may meet objects from before encryption was set up.
#[test]
fn a_key_is_no_hindrance_to_reading_a_plain_object() {
    let stored = object(b"content");
    assert_eq!(decode(&stored, 7, Some(&key())).unwrap().plain, b"content");
    let (reader, header) = FrameReader::new(&stored, Some(&key())).unwrap();
    assert_eq!(header.key, None);
    let parts = Parts::of(&stored);
    let offset = parts.header_frame().len() as u64;
    assert_eq!(reader.frame(offset, &parts.frames, 7).unwrap(), b"content");
}

/// The content must not be read from the stored bytes, nor guessed by two uploads being equal.
#[test]
fn another_salt_gives_other_bytes_and_stock_zstd_gives_nothing() {
    let content = plain(1000);
    let seal = |salt| encode(&sealed_header(salt), &content, facts(), 3, Some(&key())).unwrap();
    let (one, other) = (Parts::of(&seal([1; 32])), Parts::of(&seal([2; 32])));
    assert_eq!(one.frames.len(), other.frames.len());
    let equal = one.frames.iter().zip(&other.frames).filter(|(a, b)| a == b);
    assert!(equal.count() < one.frames.len() / 16);
    assert_eq!(one.trailer.digest, other.trailer.digest);
    zstd::stream::decode_all(seal([1; 32]).as_slice()).expect_err("encrypted");
    // The same is not encrypted twice: what an upload is tried with again is the same bytes.
    assert_eq!(seal([1; 32]), seal([1; 32]));
}

/// Status and write-once work without a key.
#[test]
fn both_ends_can_be_read_without_a_key_from_as_few_bytes_as_they_ask_for() {
    let stored = sealed_object(&plain(5000));
    let Reading::Done((read, _)) = read_header(&stored).unwrap() else {
        panic!("whole object")
    };
    assert_eq!(read, sealed_header(SALT));
    let object_bytes = stored.len() as u64;
    let mut asked = Vec::new();
    let mut length = 0;
    let trailer = loop {
        let tail = &stored[stored.len() - usize::try_from(length).unwrap()..];
        match read_trailer(tail, object_bytes).unwrap() {
            Reading::NeedMore(bytes) => {
                assert!(bytes > length);
                asked.push(bytes);
                length = bytes;
            }
            Reading::Done(trailer) => break trailer,
        }
    };
    assert_eq!(asked.len(), 2, "{asked:?}");
    assert_eq!(trailer, check_stored(&stored).unwrap().1);
    // However many bytes are at hand, the answer is the same or a request for more.
    for start in 0..stored.len() {
        match read_trailer(&stored[start..], object_bytes).unwrap() {
            Reading::Done(found) => assert_eq!(found, trailer),
            Reading::NeedMore(bytes) => assert!(bytes > (stored.len() - start) as u64),
        }
    }
}

#[test]
fn copies_are_checked_without_a_key() {
    for good in [object(&plain(200)), sealed_object(&plain(200))] {
        let (header, trailer) = check_stored(&good).unwrap();
        let read = decode(&good, 200, Some(&key())).unwrap();
        assert_eq!((header, trailer), (read.header, read.trailer));
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 0x10;
            if let Ok((_, trailer)) = check_stored(&bad) {
                // The seal is the one part that only the key can check.
                let seal = good.len() - usize::try_from(tail_bytes(&trailer)).unwrap();
                assert!((seal - 16..seal).contains(&at), "byte {at}");
            }
        }
    }
}

fn tail_bytes(trailer: &Trailer) -> u64 {
    serde_json::to_vec(trailer).unwrap().len() as u64 + 16
}

#[test]
fn a_data_key_shows_only_its_fingerprint() {
    let key = DataKey::new(&counting(0));
    assert_eq!(
        format!("{key:?}"),
        r#"DataKey("53c1f7f7ae33ca3cca0af6f2912bb797")"#
    );
    let text = key.to_hex();
    assert_eq!(text.len(), 64);
    assert!(text.starts_with("000102030405"));
    let again = DataKey::from_hex(&text).unwrap();
    assert_eq!(again.fingerprint(), key.fingerprint());
    assert!(key.has_id("20261120-53c1f7f7ae33ca3cca0af6f2912bb797"));
    for id in [
        "",
        "-",
        "53c1f7f7ae33ca3cca0af6f2912bb797",
        "20261120-53c1f7f7",
    ] {
        assert!(!key.has_id(id), "{id}");
    }
    for text in [
        String::new(),
        text.to_uppercase(),
        format!("{}\n", *text),
        text[1..].to_owned(),
    ] {
        let error = DataKey::from_hex(&text).unwrap_err();
        assert!(matches!(error, Error::BadKey { found } if found == text.len()));
        assert!(!error.to_string().contains("0001"), "{error}");
    }
}
