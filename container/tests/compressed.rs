//! Frames that were compressed elsewhere, in objects whose digest is made of the frames' hashes.

use container::{
    CompressedFrame, DIGEST_OF_FRAMES, DataKey, Encoder, Error, FrameCompressor, FrameReader,
    Header, check_stored, decode, digest_of_frames,
};
use proptest::prelude::*;
use serde_json::Map;

use crate::parts::{Parts, cut};
use crate::{facts, header, key, plain, sealed_header};

/// The header of a pack, sealed or not.
fn pack_header(sealed: bool) -> Header {
    Header {
        digest_of: Some(DIGEST_OF_FRAMES.to_owned()),
        ..if sealed {
            sealed_header([8; 32])
        } else {
            header()
        }
    }
}

fn pack_key(sealed: bool) -> Option<DataKey> {
    sealed.then(key)
}

/// Compressed on another thread, as they will be.
fn compressed(parts: &[Vec<u8>], level: i32) -> Vec<CompressedFrame> {
    std::thread::scope(|scope| {
        let worker = scope.spawn(|| {
            let mut compressor = FrameCompressor::new(level).unwrap();
            let frames = parts.iter().map(|part| compressor.compress(part).unwrap());
            frames.collect()
        });
        worker.join().unwrap()
    })
}

/// An object of these frames.
pub(crate) fn pack(parts: &[Vec<u8>], sealed: bool) -> Vec<u8> {
    let mut encoder = Encoder::new(&pack_header(sealed), 3, pack_key(sealed).as_ref()).unwrap();
    let mut out = Vec::new();
    for frame in compressed(parts, 3) {
        encoder.compressed_frame(&frame, &mut out).unwrap();
    }
    encoder.finish(facts(), &mut out).unwrap();
    out
}

proptest! {
    /// Two ways to write an object would be two formats, of which one is never tested.
    #[test]
    fn gives_the_bytes_that_the_encoder_would_have_given(
        parts in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..3000), 0..6),
        level in -7_i32..=9,
        sealed in any::<bool>(),
    ) {
        let (header, key) = (pack_header(sealed), pack_key(sealed));
        let mut here = Encoder::new(&header, level, key.as_ref()).unwrap();
        let mut elsewhere = Encoder::new(&header, level, key.as_ref()).unwrap();
        let (mut expected, mut found) = (Vec::new(), Vec::new());
        for (part, frame) in parts.iter().zip(compressed(&parts, level)) {
            prop_assert_eq!(frame.plain_bytes(), part.len() as u64);
            prop_assert_eq!(*frame.hash(), *blake3::hash(part).as_bytes());
            let place = elsewhere.compressed_frame(&frame, &mut found).unwrap();
            prop_assert_eq!(place, here.frame(part, &mut expected).unwrap());
            let around = if sealed { 24 } else { 0 };
            prop_assert_eq!(place.stored_bytes, frame.compressed_bytes() + around);
            prop_assert_eq!(elsewhere.stored_bytes(), here.stored_bytes());
            let (reader, _) = FrameReader::new(&found, key.as_ref()).unwrap();
            let plain = reader.frame(place.offset, cut(&found, place), part.len()).unwrap();
            prop_assert_eq!(&plain, part);
        }
        let trailer = elsewhere.finish(facts(), &mut found).unwrap();
        here.finish(facts(), &mut expected).unwrap();
        prop_assert_eq!(&found, &expected);

        let hashes: Vec<[u8; 32]> = parts.iter().map(|part| blake3::hash(part).into()).collect();
        prop_assert_eq!(&trailer.digest, &digest_of_frames(&hashes));
        let object = decode(&found, u64::MAX, key.as_ref()).unwrap();
        prop_assert_eq!(&object.plain, &parts.concat());
        prop_assert_eq!(&object.trailer, &trailer);
        prop_assert_eq!(check_stored(&found).unwrap(), (header, trailer));
    }
}

/// The digest is what write-once goes by: equal digests of different content would lose one of them.
#[test]
fn finds_frames_that_are_swapped_dropped_doubled_or_cut_elsewhere() {
    let parts = [plain(500), plain(700), plain(900)];
    let [one, two, three] = &parts;
    let good = Parts::of(&pack(&parts, false));
    for other in [
        vec![two.clone(), one.clone(), three.clone()],
        vec![one.clone(), three.clone()],
        vec![one.clone(), one.clone(), two.clone(), three.clone()],
        vec![[one.as_slice(), two].concat(), three.clone()],
        vec![one.clone(), two.clone(), three.clone(), Vec::new()],
        vec![],
    ] {
        let mut bad = Parts::of(&pack(&other, false));
        bad.trailer.digest.clone_from(&good.trailer.digest);
        let error = decode(&bad.mended(), 1 << 20, None).unwrap_err();
        assert!(matches!(error, Error::Digest { .. }), "{error}");
        assert!(error.is_damage());
    }
    assert_eq!(
        decode(&good.mended(), 1 << 20, None).unwrap().plain,
        parts.concat()
    );
}

/// One kind of digest is never taken for the other.
#[test]
fn finds_a_header_that_says_another_kind_of_digest() {
    let mut one = Parts::of(&pack(&[plain(500)], false));
    one.header.digest_of = None;
    let error = decode(&one.mended(), 1 << 20, None).unwrap_err();
    assert!(matches!(error, Error::Digest { .. }), "{error}");
    let mut other = Parts::of(&crate::object(&plain(500)));
    other.header.digest_of = Some(DIGEST_OF_FRAMES.to_owned());
    let error = decode(&other.mended(), 1 << 20, None).unwrap_err();
    assert!(matches!(error, Error::Digest { .. }), "{error}");
    let mut sealed = Parts::of(&pack(&[plain(500)], true));
    sealed.header.digest_of = None;
    let error = decode(&sealed.mended(), 1 << 20, Some(&key())).unwrap_err();
    assert!(matches!(error, Error::Forged { .. }), "{error}");
}

#[test]
fn finds_a_hash_that_is_not_the_frames_own() {
    let mut compressor = FrameCompressor::new(3).unwrap();
    let wrong = compressor.compress_hashed(b"content", [1; 32]).unwrap();
    let mut encoder = Encoder::new(&pack_header(false), 3, None).unwrap();
    let mut out = Vec::new();
    encoder.compressed_frame(&wrong, &mut out).unwrap();
    encoder.finish(Map::new(), &mut out).unwrap();
    assert!(matches!(
        decode(&out, 1 << 20, None),
        Err(Error::Digest { .. })
    ));
}

#[test]
fn finds_every_flipped_bit_of_an_object_with_a_digest_of_frames() {
    let good = pack(&[plain(60), plain(90)], false);
    for at in 0..good.len() {
        for bit in 0..8 {
            let mut bad = good.clone();
            bad[at] ^= 1 << bit;
            decode(&bad, 1 << 20, None)
                .expect_err(&format!("bit {bit} of byte {at} of {}", good.len()));
        }
    }
}

/// Its plain bytes are gone: a digest of them cannot be made up.
#[test]
fn a_compressed_frame_goes_into_no_object_that_needs_its_plain_bytes() {
    let frame = FrameCompressor::new(3).unwrap().compress(b"x").unwrap();
    let mut encoder = Encoder::new(&header(), 3, None).unwrap();
    let mut out = Vec::new();
    let error = encoder.compressed_frame(&frame, &mut out).unwrap_err();
    assert!(matches!(error, Error::DigestOfPlain) && !error.is_damage());
    assert!(out.is_empty() && encoder.stored_bytes() == 0);
    // the object can still be written
    encoder.frame(b"y", &mut out).unwrap();
    encoder.finish(Map::new(), &mut out).unwrap();
    assert_eq!(decode(&out, 10, None).unwrap().plain, b"y");
}

#[test]
fn a_kind_of_digest_that_is_not_known_asks_for_an_upgrade() {
    let mut later = Parts::of(&pack(&[plain(500)], false));
    later.header.digest_of = Some("files".to_owned());
    let object = later.mended();
    for result in [
        decode(&object, 1 << 20, None).map(drop),
        check_stored(&object).map(drop),
        FrameReader::new(&object, None).map(drop),
        Encoder::new(&later.header, 3, None).map(drop),
    ] {
        let error = result.unwrap_err();
        assert!(
            matches!(&error, Error::UnknownDigest { found } if found == "files"),
            "{error}"
        );
        assert!(!error.is_damage());
        assert!(error.to_string().contains("upgrade anywhen"));
    }
}

#[test]
fn a_level_out_of_range_is_refused_before_anything_is_compressed() {
    for level in [-8, 20] {
        let error = FrameCompressor::new(level).unwrap_err();
        assert!(matches!(error, Error::Level { found, .. } if found == level));
    }
}

/// A thread's context is used again: what one object broke off must not show in the next.
#[test]
fn an_object_that_was_broken_off_leaves_nothing_behind() {
    let parts = [plain(200_000), plain(70_000)];
    let good = pack(&parts, false);
    for round in 0..20 {
        let mut decoder = container::Decoder::new(1 << 20, None).unwrap();
        let mut out = Vec::new();
        let broken_off = good.len() * round / 20;
        decoder.push(&good[..broken_off], &mut out).unwrap();
        let mut second = container::Decoder::new(1 << 20, None).unwrap();
        drop(decoder);
        let mut whole = Vec::new();
        second.push(&good, &mut whole).unwrap();
        second.finish().unwrap();
        assert_eq!(whole, parts.concat());
        let mut damaged = good.clone();
        damaged[good.len() / 2] ^= 1;
        decode(&damaged, 1 << 20, None).unwrap_err();
    }
}
