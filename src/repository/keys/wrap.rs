//! A data key on its way through age: wrapped to one recipient, and unwrapped again. Pure.
//!
//! A wrap is an age file (binary, age-encryption.org/v1) to one recipient; its plaintext is the 64
//! hex digits of the key and a line feed, so that `age -d -i IDENTITY WRAP` prints the key.

use std::io::Read as _;

use age::DecryptError;
use container::{DataKey, KEY_BYTES};
use zeroize::Zeroizing;

use super::KeyError;
use super::id::KeyId;
use super::people::{Identities, Recipient};

/// Hex digits and a line feed.
const PLAIN_BYTES: usize = KEY_BYTES * 2 + 1;

/// What became of opening a wrap.
#[derive(Debug)]
pub(super) enum Unwrapped {
    /// It holds the key that was looked for.
    Key(DataKey),
    /// It is for somebody else.
    NotOurs,
    /// It is no wrap, or holds something else than that key.
    Damaged(String),
}

/// Wraps a data key to a recipient.
pub(super) fn wrap(key: &DataKey, recipient: &Recipient) -> Result<Vec<u8>, KeyError> {
    // room from the start: growing would leave a copy behind
    let mut plain = Zeroizing::new(String::with_capacity(PLAIN_BYTES));
    plain.push_str(&key.to_hex());
    plain.push('\n');
    age::encrypt(recipient.as_age(), plain.as_bytes()).map_err(|error| KeyError::Wrapping {
        recipient: recipient.as_str().to_owned(),
        reason: error.to_string(),
    })
}

/// Opens a wrap of the key `id` with whichever identity it is for. `wrap` may be damaged or
/// hostile: never panics, allocates at most a multiple of its length.
pub(super) fn unwrap(wrap: &[u8], identities: &Identities, id: &KeyId) -> Unwrapped {
    let opened =
        age::Decryptor::new_buffered(wrap).and_then(|file| file.decrypt(identities.as_age()));
    let reader = match opened {
        Ok(reader) => reader,
        Err(DecryptError::NoMatchingKeys) => return Unwrapped::NotOurs,
        Err(error) => return Unwrapped::Damaged(error.to_string()),
    };
    let mut plain = Zeroizing::new(Vec::with_capacity(PLAIN_BYTES * 2));
    let most = u64::try_from(PLAIN_BYTES)
        .unwrap_or(u64::MAX)
        .saturating_add(1);
    if let Err(error) = reader.take(most).read_to_end(&mut plain) {
        return Unwrapped::Damaged(error.to_string());
    }
    let key = plain
        .strip_suffix(b"\n")
        .and_then(|digits| str::from_utf8(digits).ok())
        .and_then(|digits| DataKey::from_hex(digits).ok());
    match key {
        None => Unwrapped::Damaged("it does not hold a key".to_owned()),
        Some(key) if key.fingerprint() == id.fingerprint() => Unwrapped::Key(key),
        Some(key) => Unwrapped::Damaged(format!(
            "it holds another key: expected={}, found={}",
            id.fingerprint(),
            key.fingerprint()
        )),
    }
}

#[cfg(test)]
mod tests {
    use jiff::civil::Date;

    use super::super::people::testing::identity;
    use super::*;

    fn key(byte: u8) -> (DataKey, KeyId) {
        let key = DataKey::new(&[byte; KEY_BYTES]);
        let id = KeyId::new(Date::constant(2026, 11, 20), &key.fingerprint()).unwrap();
        (key, id)
    }

    #[test]
    fn a_wrap_opens_for_its_recipient_alone() {
        let (key, id) = key(7);
        let ((ours, recipient), (theirs, _)) = (identity(), identity());
        let wrapped = wrap(&key, &recipient).unwrap();
        let Unwrapped::Key(opened) = unwrap(&wrapped, &ours, &id) else {
            panic!("the wrap does not open")
        };
        assert_eq!(opened.to_hex(), key.to_hex());
        assert!(matches!(unwrap(&wrapped, &theirs, &id), Unwrapped::NotOurs));
    }

    #[test]
    fn no_changed_bit_of_a_wrap_yields_a_key() {
        let (key, id) = key(7);
        let (ours, recipient) = identity();
        let wrapped = wrap(&key, &recipient).unwrap();
        for at in 0..wrapped.len() {
            for bit in 0..8 {
                let mut changed = wrapped.clone();
                changed[at] ^= 1 << bit;
                let became = unwrap(&changed, &ours, &id);
                assert!(!matches!(became, Unwrapped::Key(_)), "byte {at}, bit {bit}");
            }
            let cut = unwrap(&wrapped[..at], &ours, &id);
            assert!(matches!(cut, Unwrapped::Damaged(_)), "cut at {at}: {cut:?}");
        }
    }

    #[test]
    fn a_wrap_of_another_key_is_not_taken_for_it() {
        // a wrap swapped between two folders would otherwise end as "damaged data"
        let ((key, _), (_, other)) = (key(7), key(8));
        let (ours, recipient) = identity();
        let wrapped = wrap(&key, &recipient).unwrap();
        let became = unwrap(&wrapped, &ours, &other);
        assert!(matches!(became, Unwrapped::Damaged(reason) if reason.contains("another key")));
    }

    #[test]
    fn what_is_wrapped_is_a_key_and_nothing_longer() {
        let (_, id) = key(7);
        let (ours, recipient) = identity();
        let long = format!("{}\n", "0".repeat(66));
        for plain in [
            "",
            "\n",
            "07",
            &"0".repeat(64),
            &long,
            &format!("{}\n", "G".repeat(64)),
        ] {
            let wrapped = age::encrypt(recipient.as_age(), plain.as_bytes()).unwrap();
            let became = unwrap(&wrapped, &ours, &id);
            assert!(matches!(became, Unwrapped::Damaged(_)), "{plain:?}");
        }
    }
}
