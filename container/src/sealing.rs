//! Encryption of one object: AES-256-GCM in the STREAM construction, with the place in the object
//! as the counter.
//!
//! | nonce | bytes | content |
//! |-------|------:|---------|
//! | place |     8 | offset in the object of the sealed frame or of the trailer frame, big-endian |
//! | zero  |     3 | |
//! | last  |     1 | 1 for the seal in the trailer, 0 for a frame |
//!
//! No two stretches of an object begin at the same place, and no two objects have the same key,
//! since each has its own salt: so no nonce is used twice with one key.

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use aws_lc_rs::aead::{MAX_TAG_LEN, NONCE_LEN};

use crate::key::KEY_BYTES;
use crate::{DataKey, Error, Part};

/// The first bytes of a sealed frame: not those of any frame that stock zstd knows, which thereby
/// refuses an encrypted object instead of giving nothing.
pub(crate) const SEALED_MAGIC: u32 = u32::from_le_bytes(*b"ANY\x01");
/// Magic number and length.
pub(crate) const SEALED_HEAD_BYTES: usize = 8;
/// Length of AES-GCM's tag, which ends a sealed frame and is the whole of the trailer's seal.
pub(crate) const TAG_BYTES: usize = 16;
const _: () = assert!(TAG_BYTES == MAX_TAG_LEN);
const _: () = assert!(NONCE_LEN == 12);

/// The tag over header and trailer.
pub(crate) type Seal = [u8; TAG_BYTES];

/// Seals or opens the parts of one object.
pub(crate) struct Sealing {
    key: LessSafeKey,
    /// The header's frame, which every part is bound to.
    header: Vec<u8>,
}

/// The last flag of STREAM.
#[derive(Clone, Copy)]
enum Last {
    No,
    Yes,
}

impl Sealing {
    /// `header` is the header's whole frame, as stored.
    pub(crate) fn new(key: &DataKey, salt: &[u8; KEY_BYTES], header: Vec<u8>) -> Self {
        let key = UnboundKey::new(&AES_256_GCM, key.object_key(salt).as_slice())
            .expect("AES-256 takes 32 bytes");
        Self {
            key: LessSafeKey::new(key),
            header,
        }
    }

    /// Makes a sealed frame of what follows `start` in `out`: [`SEALED_HEAD_BYTES`] to overwrite,
    /// and a zstd frame.
    pub(crate) fn seal_frame(&self, offset: u64, out: &mut Vec<u8>, start: usize) {
        let (head, content) = out
            .get_mut(start..)
            .and_then(|frame| frame.split_first_chunk_mut::<SEALED_HEAD_BYTES>())
            .expect("the encoder left room for the head");
        let length = content.len().saturating_add(TAG_BYTES);
        let length = u32::try_from(length).expect("a frame's limit is below 4 GiB");
        *head = sealed_head(length);
        let tag = self
            .key
            .seal_in_place_separate_tag(nonce(offset, Last::No), Aad::from(&self.header), content)
            .expect("a frame's limit is below that of AES-GCM, 64 GiB");
        out.extend_from_slice(tag.as_ref());
    }

    /// Opens in place what follows the head of a sealed frame: the zstd frame.
    pub(crate) fn open_frame<'a>(
        &self,
        offset: u64,
        sealed: &'a mut [u8],
    ) -> Result<&'a [u8], Error> {
        match self
            .key
            .open_in_place(nonce(offset, Last::No), Aad::from(&self.header), sealed)
        {
            Ok(content) => Ok(content),
            Err(_) => Err(Error::Forged {
                part: Part::SealedFrame,
                offset,
            }),
        }
    }

    /// The seal of a trailer whose frame begins at `offset`.
    pub(crate) fn seal_trailer(&self, offset: u64, text: &[u8]) -> Seal {
        let tag = self
            .key
            .seal_in_place_separate_tag(
                nonce(offset, Last::Yes),
                Aad::from(self.header_and(text)),
                &mut [],
            )
            .expect("header and trailer are below the limit of AES-GCM");
        tag.as_ref()
            .try_into()
            .expect("the tag of AES-GCM has 16 bytes")
    }

    /// Whether header and trailer are those that were written, and the frames end where they did.
    pub(crate) fn check_trailer(&self, offset: u64, text: &[u8], seal: &Seal) -> Result<(), Error> {
        let opened = self.key.open_in_place_separate_tag(
            nonce(offset, Last::Yes),
            Aad::from(self.header_and(text)),
            seal,
            &mut [],
        );
        if opened.is_err() {
            return Err(Error::Forged {
                part: Part::Trailer,
                offset,
            });
        }
        Ok(())
    }

    fn header_and(&self, text: &[u8]) -> Vec<u8> {
        [self.header.as_slice(), text].concat()
    }
}

fn nonce(offset: u64, last: Last) -> Nonce {
    let last = match last {
        Last::No => 0,
        Last::Yes => 1,
    };
    let mut nonce = [0; NONCE_LEN];
    let (place, end) = nonce.split_at_mut(size_of::<u64>());
    place.copy_from_slice(&offset.to_be_bytes());
    end.copy_from_slice(&[0, 0, 0, last]);
    Nonce::assume_unique_for_key(nonce)
}

fn sealed_head(length: u32) -> [u8; SEALED_HEAD_BYTES] {
    let [m0, m1, m2, m3] = SEALED_MAGIC.to_le_bytes();
    let [l0, l1, l2, l3] = length.to_le_bytes();
    [m0, m1, m2, m3, l0, l1, l2, l3]
}
