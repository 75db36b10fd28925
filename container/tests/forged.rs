//! Encrypted objects against whoever can write to the bucket and has no key: checksums and lengths
//! can be mended, and still nothing passes but what was sealed, where it was sealed.

use container::{
    Decoder, Encoder, Error, FrameReader, Header, Part, Reading, Trailer, check_stored, decode,
    digest,
};
use serde_json::{Map, json};

use crate::parts::{self, Parts};
use crate::{SALT, facts, header, key, object, plain, sealed_header, sealed_object};

/// Two frames of equal length and the object around them.
fn two_frames(salt: [u8; 32]) -> (Vec<u8>, [container::Frame; 2]) {
    let mut encoder = Encoder::new(&sealed_header(salt), 3, Some(&key())).unwrap();
    let mut out = Vec::new();
    let first = encoder.frame(&[1; 500], &mut out).unwrap();
    let second = encoder.frame(&[2; 500], &mut out).unwrap();
    encoder.finish(facts(), &mut out).unwrap();
    assert_eq!(first.stored_bytes, second.stored_bytes);
    (out, [first, second])
}

fn refusal(bytes: &[u8]) -> Error {
    decode(bytes, 1 << 20, Some(&key())).expect_err("forged")
}

fn forged(bytes: &[u8], expected: Part) {
    let error = refusal(bytes);
    assert!(
        matches!(error, Error::Forged { part, .. } if part == expected),
        "{error}"
    );
}

/// Whoever can write to the bucket can change anything in it but what the key protects.
#[test]
fn refuses_every_flipped_bit() {
    let content = plain(100);
    let good = sealed_object(&content);
    for at in 0..good.len() {
        for bit in 0..8 {
            let mut bad = good.clone();
            bad[at] ^= 1 << bit;
            let error = refusal(&bad);
            // A length that grew is over a limit, and a name that changed is that of something
            // else; all else is plain damage.
            assert!(
                error.is_damage()
                    || matches!(
                        error,
                        Error::TooLarge { .. }
                            | Error::NewerFormat { .. }
                            | Error::UnknownCodec { .. }
                            | Error::UnknownCipher { .. }
                            | Error::WrongKey { .. }
                    ),
                "bit {bit} of byte {at}: {error}"
            );
        }
    }
    assert_eq!(decode(&good, 100, Some(&key())).unwrap().plain, content);
}

/// The checksums of an object need no key, so a forger mends them: only seal and tags are left.
#[test]
fn refuses_every_flipped_bit_whose_checksums_were_mended() {
    let good = sealed_object(&plain(100));
    assert_eq!(Parts::of(&good).mended(), good);
    let mut forgeries = 0;
    for at in 0..good.len() {
        for bit in 0..8 {
            let mut bad = good.clone();
            bad[at] ^= 1 << bit;
            // Where the parts cannot be found any more, there is nothing to mend.
            if let Some(parts) = Parts::find(&bad) {
                let bad = parts.mended();
                if bad != good {
                    let error = refusal(&bad);
                    forgeries += u32::from(matches!(error, Error::Forged { .. }));
                }
            }
        }
    }
    assert!(forgeries > 1000, "{forgeries}");
}

#[test]
fn refuses_a_missing_end_at_every_byte() {
    let good = sealed_object(&plain(200));
    for length in 0..good.len() {
        match refusal(&good[..length]) {
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
        check_stored(&good[..length]).expect_err("cut short");
    }
    for foreign in [vec![0], good.clone()] {
        let bad = [good.clone(), foreign].concat();
        assert!(matches!(refusal(&bad), Error::Trailing { .. }));
        assert!(matches!(check_stored(&bad), Err(Error::Trailing { .. })));
    }
}

/// A caller that goes on after an error must not be told that all is well.
#[test]
fn never_finishes_after_an_error() {
    let good = sealed_object(&plain(300));
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 0x10;
        let mut decoder = Decoder::new(1_000_000, Some(&key())).unwrap();
        for byte in &bad {
            drop(decoder.push(&[*byte], &mut Vec::new()));
        }
        decoder.finish().expect_err(&format!("byte {at}"));
    }
}

#[test]
fn refuses_frames_that_were_swapped_repeated_or_removed() {
    let (good, [first, second]) = two_frames(SALT);
    let cut = |frame| parts::cut(&good, frame).to_vec();
    let (first, second) = (cut(first), cut(second));
    let of = |frames: &[&Vec<u8>]| Parts {
        frames: frames.iter().copied().flatten().copied().collect(),
        ..Parts::of(&good)
    };
    assert_eq!(of(&[&first, &second]).mended(), good);
    forged(&of(&[&second, &first]).mended(), Part::SealedFrame);
    forged(&of(&[&first, &first]).mended(), Part::SealedFrame);
    forged(&of(&[&second]).mended(), Part::SealedFrame);
    forged(&of(&[&first, &second, &second]).mended(), Part::SealedFrame);
    // What is left is sound, and is not all: the seal knows.
    forged(&of(&[&first]).mended(), Part::Trailer);
    forged(&of(&[]).mended(), Part::Trailer);
}

#[test]
fn refuses_parts_of_another_object_with_the_same_data_key() {
    let (one, [frame, _]) = two_frames(SALT);
    let (other, _) = two_frames([8; 32]);
    let [one_parts, other_parts] = [&one, &other].map(|object| Parts::of(object));
    let frames = Parts {
        frames: other_parts.frames.clone(),
        ..one_parts.clone()
    };
    forged(&frames.mended(), Part::SealedFrame);
    let trailer = Parts {
        seal: other_parts.seal.clone(),
        trailer: other_parts.trailer.clone(),
        ..one_parts.clone()
    };
    forged(&trailer.mended(), Part::Trailer);
    let header = Parts {
        header: other_parts.header.clone(),
        ..one_parts
    };
    forged(&header.mended(), Part::SealedFrame);

    let (reader, _) = FrameReader::new(&other, Some(&key())).unwrap();
    assert!(matches!(
        reader.frame(frame.offset, parts::cut(&one, frame), 500),
        Err(Error::Forged { .. })
    ));
}

/// An object under another name, or of another cluster, must not be restored as if it were this.
#[test]
fn refuses_a_header_that_was_edited() {
    let good = sealed_object(&plain(100));
    let edit = |edit: &dyn Fn(&mut Header)| {
        let mut parts = Parts::of(&good);
        edit(&mut parts.header);
        parts.mended()
    };
    let edits: [&dyn Fn(&mut Header); 8] = [
        &|header| header.name = "wal/00000003/0000000300000000/000000030000000000000002".to_owned(),
        &|header| header.kind = "piece".to_owned(),
        &|header| header.cluster = "other".to_owned(),
        &|header| header.system_id = "1".to_owned(),
        &|header| header.start = None,
        &|header| header.key = Some(key().id("20261121")),
        &|header| header.salt = Some("00".repeat(32)),
        &|header| header.wraps.push("YWdl".to_owned()),
    ];
    for change in edits {
        let bad = edit(change);
        // Same length or not, the first frame tells.
        forged(&bad, Part::SealedFrame);
    }
    let other_key = edit(&|header| header.key = Some("20261120-00".to_owned()));
    assert!(matches!(refusal(&other_key), Error::WrongKey { .. }));

    // Even white space that means nothing is not what was written.
    let mut bad = good.clone();
    let length = u32::from_le_bytes(bad[4..8].try_into().unwrap()) + 1;
    bad[4..8].copy_from_slice(&length.to_le_bytes());
    bad.insert(9, b' ');
    forged(&bad, Part::SealedFrame);

    // With no frame to tell, the seal does.
    let mut out = Vec::new();
    Encoder::new(&sealed_header(SALT), 3, Some(&key()))
        .unwrap()
        .finish(Map::new(), &mut out)
        .unwrap();
    decode(&out, 0, Some(&key())).unwrap();
    let mut parts = Parts::of(&out);
    parts.header.name.replace_range(..3, "low");
    forged(&parts.mended(), Part::Trailer);
}

/// Digests decide what "is the same", and facts what can be restored: neither may be forged.
#[test]
fn refuses_a_trailer_that_was_edited() {
    let good = sealed_object(&plain(100));
    let edits: [&dyn Fn(&mut Trailer); 4] = [
        &|trailer| trailer.digest = digest(b"other"),
        &|trailer| trailer.plain_bytes += 1,
        &|trailer| drop(trailer.facts.insert("verified".to_owned(), json!(null))),
        &|trailer| drop(trailer.facts.insert("more".to_owned(), json!(1))),
    ];
    for edit in edits {
        let mut parts = Parts::of(&good);
        edit(&mut parts.trailer);
        let bad = parts.mended();
        forged(&bad, Part::Trailer);
        // Without the key it is in order, and reading it says what it says.
        let (_, trailer) = check_stored(&bad).unwrap();
        assert_eq!(trailer, parts.trailer);
    }
}

/// Whoever has no key can still write a plain object: it must not pass for an encrypted one.
#[test]
fn refuses_an_object_that_is_half_encrypted() {
    let good = sealed_object(&plain(100));
    let from_plain = Parts::of(&object(&plain(100)));
    let with = |edit: &dyn Fn(&mut Parts)| {
        let mut parts = Parts::of(&good);
        edit(&mut parts);
        let bad = parts.mended();
        let error = refusal(&bad);
        let stored = check_stored(&bad).expect_err("half encrypted");
        assert_eq!(error.to_string(), stored.to_string());
        error
    };
    let no_seal = with(&|parts| parts.seal.clear());
    assert!(
        matches!(
            no_seal,
            Error::Unsealed {
                part: Part::Trailer,
                ..
            }
        ),
        "{no_seal}"
    );
    let plain_frame = with(&|parts| parts.frames.clone_from(&from_plain.frames));
    assert!(
        matches!(
            plain_frame,
            Error::Unsealed {
                part: Part::Frame,
                ..
            }
        ),
        "{plain_frame}"
    );
    let plain_header = with(&|parts| parts.header = header());
    assert!(
        matches!(
            plain_header,
            Error::UnknownFrame {
                found: 0x0159_4E41,
                ..
            }
        ),
        "{plain_header}"
    );
    let seal_alone = with(&|parts| {
        parts.header = header();
        parts.frames.clone_from(&from_plain.frames);
    });
    assert!(
        matches!(seal_alone, Error::MissingField { field: "key" }),
        "{seal_alone}"
    );
    for (field, edit) in [
        ("key", (|header| header.key = None) as fn(&mut Header)),
        ("cipher", |header| header.cipher = None),
        ("salt", |header| header.salt = None),
        ("key", |header| {
            (header.key, header.cipher, header.salt) = (None, None, None);
        }),
    ] {
        let error = with(&|parts| edit(&mut parts.header));
        assert!(
            matches!(error, Error::MissingField { field: found } if found == field),
            "{error}"
        );
    }
    for salt in [
        "",
        "5A",
        &"5A".repeat(32),
        &"5a".repeat(33),
        &"é".repeat(32),
    ] {
        let error = with(&|parts| parts.header.salt = Some(salt.to_owned()));
        assert!(matches!(error, Error::BadSalt { .. }), "{error}");
    }
    let cipher = with(&|parts| parts.header.cipher = Some("rot13".to_owned()));
    assert!(matches!(cipher, Error::UnknownCipher { .. }), "{cipher}");
    assert!(!cipher.is_damage());
}

/// An extent is read on its own, far from the seal and the digest.
#[test]
fn refuses_every_flipped_bit_and_every_cut_of_a_single_sealed_frame() {
    let (stored, [frame, _]) = two_frames(SALT);
    let (reader, _) = FrameReader::new(&stored, Some(&key())).unwrap();
    let bytes = parts::cut(&stored, frame);
    assert_eq!(reader.frame(frame.offset, bytes, 500).unwrap(), [1; 500]);
    for at in 0..bytes.len() {
        for bit in 0..8 {
            let mut bad = bytes.to_vec();
            bad[at] ^= 1 << bit;
            let error = reader.frame(frame.offset, &bad, 500).expect_err("damaged");
            assert!(error.is_damage(), "bit {bit} of byte {at}: {error}");
        }
        reader
            .frame(frame.offset, &bytes[..at], 500)
            .expect_err("cut short");
    }
    let refused = |offset, stored: &[u8], plain| {
        let error = reader.frame(offset, stored, plain).expect_err("refused");
        error.to_string()
    };
    assert_eq!(
        refused(frame.offset + 1, bytes, 500),
        format!(
            "sealed frame at byte {} is damaged or forged: it does not authenticate",
            frame.offset + 1
        )
    );
    refused(frame.offset, &[bytes, &[0]].concat(), 500);
    refused(frame.offset, &[bytes, bytes].concat(), 500);
    refused(frame.offset, bytes, 499);
    refused(frame.offset, bytes, 501);
    refused(frame.offset, &Parts::of(&object(&[1; 500])).frames, 500);
    refused(frame.offset, &Parts::of(&stored).trailer_frame(), 500);
    // A plain object's reader opens no sealed frame.
    let (reader, _) = FrameReader::new(&object(b""), Some(&key())).unwrap();
    reader.frame(frame.offset, bytes, 500).expect_err("sealed");
}

/// The holder of the key may be an older or a broken writer: what is inside is checked too.
#[test]
fn refuses_a_sealed_frame_with_anything_but_one_whole_frame_inside() {
    let one = zstd::bulk::compress(&[1; 50], 3).unwrap();
    let skippable = [0x50, 0x2A, 0x4D, 0x18, 1, 0, 0, 0, 9].to_vec();
    let good = parts::sealed_by_hand(&key(), &sealed_header(SALT), &one, &[1; 50]);
    assert_eq!(decode(&good, 50, Some(&key())).unwrap().plain, [1; 50]);
    for inside in [
        Vec::new(),
        b"plain".to_vec(),
        one[..one.len() - 1].to_vec(),
        [one.clone(), one.clone()].concat(),
        [one.clone(), vec![0]].concat(),
        skippable,
    ] {
        let bad = parts::sealed_by_hand(&key(), &sealed_header(SALT), &inside, &[1; 50]);
        let error = refusal(&bad);
        assert!(
            error.is_damage() && !matches!(error, Error::Forged { .. }),
            "{error}"
        );
    }
}

/// A plan is made by what trailers say, long before anybody reads the frames.
#[test]
fn refuses_a_trailer_read_by_itself_that_was_not_written_with_its_object() {
    let read = |object: &[u8], tail: &[u8]| {
        let (reader, _) = FrameReader::new(object, Some(&key())).unwrap();
        reader.trailer(tail, object.len() as u64)
    };
    let good = sealed_object(&plain(5000));
    let Ok(Reading::Done(trailer)) = read(&good, &good) else {
        panic!("it is all there")
    };
    assert_eq!(trailer, check_stored(&good).unwrap().1);
    let frame = Parts::of(&good).trailer_frame().len();
    for start in 0..good.len() {
        match read(&good, &good[start..]).unwrap() {
            Reading::Done(found) => assert_eq!(found, trailer),
            Reading::NeedMore(bytes) => assert!(bytes > (good.len() - start) as u64),
        }
    }
    for bit in 0..frame * 8 {
        let mut bad = good.clone();
        let at = bad.len() - frame + bit / 8;
        bad[at] ^= 1 << (bit % 8);
        match read(&bad, &bad) {
            Ok(Reading::Done(_)) => panic!("bit {bit}"),
            // a length that was flipped can ask for bytes that there are not
            Ok(Reading::NeedMore(_)) | Err(_) => {}
        }
    }
    let mut edited = Parts::of(&good);
    edited.trailer.facts.insert("more".to_owned(), json!(1));
    let mut unsealed = Parts::of(&good);
    unsealed.seal.clear();
    let mut cut = Parts::of(&two_frames(SALT).0);
    cut.frames.truncate(cut.frames.len() / 2);
    for bad in [edited.mended(), cut.mended()] {
        let refused = read(&bad, &bad).unwrap_err();
        let part = Part::Trailer;
        assert!(
            matches!(refused, Error::Forged { part: found, .. } if found == part),
            "{refused}"
        );
    }
    let bad = unsealed.mended();
    assert!(matches!(read(&bad, &bad), Err(Error::Unsealed { .. })));

    // what is not encrypted has no seal, and nobody vouches for it
    let plain_object = object(&plain(100));
    assert!(matches!(
        read(&plain_object, &plain_object),
        Ok(Reading::Done(_))
    ));
    assert!(matches!(
        read(&plain_object, &good),
        Err(Error::MissingField { field: "key" })
    ));
}
