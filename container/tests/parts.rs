//! An object taken apart and put together again, as a forger without the key would.

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use aws_lc_rs::hkdf;
use container::{DataKey, Frame, Header, Reading, Trailer, digest, read_header, read_trailer};
use serde_json::Map;

const HEADER_MAGIC: u32 = 0x184D_2A50;
const TRAILER_MAGIC: u32 = 0x184D_2A5E;

#[derive(Clone)]
pub(crate) struct Parts {
    pub(crate) header: Header,
    pub(crate) frames: Vec<u8>,
    pub(crate) seal: Vec<u8>,
    pub(crate) trailer: Trailer,
}

impl Parts {
    pub(crate) fn of(object: &[u8]) -> Self {
        Self::find(object).unwrap()
    }

    /// Nothing where damage hides where the parts are; what checksums say is not asked.
    pub(crate) fn find(object: &[u8]) -> Option<Self> {
        let Ok(Reading::Done((header, start))) = read_header(object) else {
            return None;
        };
        let (before, tail) = object.split_last_chunk::<16>()?;
        let length = u32::from_le_bytes(tail[..4].try_into().unwrap());
        let at = before.len().checked_sub(usize::try_from(length).unwrap())?;
        let trailer = serde_json::from_slice(&before[at..]).ok()?;
        let between = before.get(usize::try_from(start).unwrap()..at)?;
        let sealed = at
            .checked_sub(24)
            .and_then(|head| before.get(head..)?.first_chunk());
        let seal_bytes = if sealed == Some(&TRAILER_MAGIC.to_le_bytes()) {
            16
        } else {
            0
        };
        let (between, seal) = between.split_at_checked(between.len().checked_sub(seal_bytes)?)?;
        let frames = between.get(..between.len().checked_sub(8)?)?;
        Some(Self {
            header,
            frames: frames.to_vec(),
            seal: seal.to_vec(),
            trailer,
        })
    }

    /// The object with all lengths and checksums in order.
    pub(crate) fn mended(&self) -> Vec<u8> {
        let mut object = self.header_frame();
        object.extend_from_slice(&self.frames);
        let trailer = Trailer {
            stored_crc32: crc32fast::hash(&object),
            ..self.trailer.clone()
        };
        object.extend_from_slice(&trailer_frame(&self.seal, &trailer));
        object
    }

    pub(crate) fn header_frame(&self) -> Vec<u8> {
        let text = serde_json::to_string(&self.header).unwrap() + "\n";
        skippable(HEADER_MAGIC, text.as_bytes())
    }

    pub(crate) fn trailer_frame(&self) -> Vec<u8> {
        trailer_frame(&self.seal, &self.trailer)
    }
}

fn trailer_frame(seal: &[u8], trailer: &Trailer) -> Vec<u8> {
    let text = serde_json::to_vec(trailer).unwrap();
    let length = u32::try_from(text.len()).unwrap().to_le_bytes();
    let crc32 = crc32fast::hash(&text).to_le_bytes();
    let payload = [seal, &text, &length, &crc32, b"ANYWHEN\x01"].concat();
    let frame = skippable(TRAILER_MAGIC, &payload);
    assert_eq!(
        read_trailer(&frame, frame.len() as u64).unwrap(),
        Reading::Done(trailer.clone())
    );
    frame
}

fn skippable(magic: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap();
    [&magic.to_le_bytes(), &length.to_le_bytes(), payload].concat()
}

/// One frame's stored bytes.
pub(crate) fn cut(object: &[u8], frame: Frame) -> &[u8] {
    let start = usize::try_from(frame.offset).unwrap();
    &object[start..start + usize::try_from(frame.stored_bytes).unwrap()]
}

/// What a holder of the key could write: an object with one sealed frame, with `inside` in it.
pub(crate) fn sealed_by_hand(
    key: &DataKey,
    header: &Header,
    inside: &[u8],
    plain: &[u8],
) -> Vec<u8> {
    let gcm = object_key(key, header);
    let seal = |offset: usize, last: u8, bound: &[u8], bytes: &[u8]| {
        let mut nonce = [0; 12];
        nonce[..8].copy_from_slice(&(offset as u64).to_be_bytes());
        nonce[11] = last;
        let mut sealed = bytes.to_vec();
        let nonce = Nonce::assume_unique_for_key(nonce);
        gcm.seal_in_place_append_tag(nonce, Aad::from(bound), &mut sealed)
            .unwrap();
        sealed
    };
    let mut parts = Parts {
        header: header.clone(),
        frames: Vec::new(),
        seal: Vec::new(),
        trailer: Trailer {
            plain_bytes: plain.len() as u64,
            digest: digest(plain),
            stored_crc32: 0,
            facts: Map::new(),
        },
    };
    let head = parts.header_frame();
    let sealed = seal(head.len(), 0, &head, inside);
    let magic = u32::from_le_bytes(*b"ANY\x01");
    parts.frames = skippable(magic, &sealed);
    let before = [head.as_slice(), &parts.frames].concat();
    parts.trailer.stored_crc32 = crc32fast::hash(&before);
    let text = serde_json::to_vec(&parts.trailer).unwrap();
    parts.seal = seal(before.len(), 1, &[head, text].concat(), b"");
    parts.mended()
}

fn object_key(key: &DataKey, header: &Header) -> LessSafeKey {
    let bytes = |digits: &str| -> Vec<u8> {
        let pairs = (0..digits.len()).step_by(2);
        pairs
            .map(|at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap())
            .collect()
    };
    let salt = bytes(header.salt.as_ref().unwrap());
    let secret = hkdf::Salt::new(hkdf::HKDF_SHA256, &salt).extract(&bytes(&key.to_hex()));
    let okm = secret
        .expand(&[b"anywhen object key 1"], &AES_256_GCM)
        .unwrap();
    LessSafeKey::new(UnboundKey::from(okm))
}
