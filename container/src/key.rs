//! The data key: 32 random bytes that the keys of many objects are derived from.

use std::fmt::{self, Write as _};
use std::sync::Arc;

use aws_lc_rs::hkdf;
use zeroize::Zeroizing;

use crate::Error;

/// Length of a [`DataKey`], of the salt in a header, and of the key that both give.
pub const KEY_BYTES: usize = 32;

const FINGERPRINT_BYTES: usize = 16;
/// HKDF's info, which keeps what is derived for one use apart from all others.
const FINGERPRINT_INFO: &[u8] = b"anywhen key id 1";
const OBJECT_KEY_INFO: &[u8] = b"anywhen object key 1";

/// A secret that seals and opens objects. Clones share it; it is overwritten when the last is gone,
/// and `Debug` shows nothing but its fingerprint.
#[derive(Clone)]
pub struct DataKey(Arc<Zeroizing<[u8; KEY_BYTES]>>);

impl DataKey {
    /// The key of these bytes, which must come from a cryptographic source of randomness.
    ///
    /// They are copied: the caller overwrites its own.
    pub fn new(bytes: &[u8; KEY_BYTES]) -> Self {
        // Filled where it stays, so that no copy is left on the stack.
        let mut shared = Arc::new(Zeroizing::new([0; KEY_BYTES]));
        if let Some(place) = Arc::get_mut(&mut shared) {
            place.copy_from_slice(bytes);
        }
        Self(shared)
    }

    /// Reads what [`DataKey::to_hex`] gives: 64 lower-case hex digits and nothing else.
    pub fn from_hex(text: &str) -> Result<Self, Error> {
        let mut bytes = Zeroizing::new([0; KEY_BYTES]);
        if parse_hex(text, bytes.as_mut_slice()) {
            Ok(Self::new(&bytes))
        } else {
            Err(Error::BadKey { found: text.len() })
        }
    }

    /// The key itself, as 64 hex digits: what is wrapped for a recipient.
    pub fn to_hex(&self) -> Zeroizing<String> {
        let mut text = Zeroizing::new(String::with_capacity(KEY_BYTES.saturating_mul(2)));
        push_hex(self.0.as_slice(), &mut text);
        text
    }

    /// 32 hex digits that tell this key from all others and tell nothing else about it.
    pub fn fingerprint(&self) -> String {
        let bytes: Zeroizing<[u8; FINGERPRINT_BYTES]> = self.derive(&[], FINGERPRINT_INFO);
        let mut text = String::new();
        push_hex(bytes.as_slice(), &mut text);
        text
    }

    /// The key's id: the day on which it was made (`YYYYMMDD`, UTC), `-`, and its fingerprint.
    pub fn id(&self, day: &str) -> String {
        format!("{day}-{}", self.fingerprint())
    }

    /// Whether this is the key with that id, made on whichever day.
    pub fn has_id(&self, id: &str) -> bool {
        id.rsplit_once('-')
            .is_some_and(|(_, fingerprint)| fingerprint == self.fingerprint())
    }

    /// The key of the one object that has this salt.
    pub(crate) fn object_key(&self, salt: &[u8; KEY_BYTES]) -> Zeroizing<[u8; KEY_BYTES]> {
        self.derive(salt, OBJECT_KEY_INFO)
    }

    /// HKDF-SHA256 (RFC 5869).
    fn derive<const LENGTH: usize>(&self, salt: &[u8], info: &[u8]) -> Zeroizing<[u8; LENGTH]> {
        let mut out = Zeroizing::new([0; LENGTH]);
        hkdf::Salt::new(hkdf::HKDF_SHA256, salt)
            .extract(self.0.as_slice())
            .expand(&[info], OutputBytes(LENGTH))
            .and_then(|okm| okm.fill(out.as_mut_slice()))
            .expect("HKDF-SHA256 gives up to 8160 bytes");
        out
    }
}

impl fmt::Debug for DataKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("DataKey").field(&self.fingerprint()).finish()
    }
}

struct OutputBytes(usize);

impl hkdf::KeyType for OutputBytes {
    fn len(&self) -> usize {
        self.0
    }
}

/// Appends two lower-case digits per byte.
pub(crate) fn push_hex(bytes: &[u8], text: &mut String) {
    for byte in bytes {
        write!(text, "{byte:02x}").expect("a String takes all that is written to it");
    }
}

/// Fills `bytes` if `text` is exactly their lower-case hex digits.
pub(crate) fn parse_hex(text: &str, bytes: &mut [u8]) -> bool {
    let digit = |digit: u8| match digit {
        b'0'..=b'9' => Some(digit.wrapping_sub(b'0')),
        b'a'..=b'f' => Some(digit.wrapping_sub(b'a').wrapping_add(10)),
        _ => None,
    };
    let (pairs, odd) = text.as_bytes().as_chunks::<2>();
    odd.is_empty()
        && pairs.len() == bytes.len()
        && pairs.iter().zip(bytes).all(|(&[high, low], byte)| {
            let value = digit(high).zip(digit(low));
            if let Some((high, low)) = value {
                *byte = (high << 4) | low;
            }
            value.is_some()
        })
}
