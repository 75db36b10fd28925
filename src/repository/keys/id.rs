//! Names of data keys and of their wraps, to paths and back. Pure.
//!
//! `keys/<key id>/<wrap id>` below the repository's address. A key id is the day on which the key
//! was made, `YYYYMMDD` in UTC, a hyphen and the key's fingerprint, so that ids sort by time and
//! two archivers never share one. A wrap id is the first 16 hex digits of the BLAKE3 of the
//! recipient, so that what is there for whom can be seen without opening anything.

use std::fmt;
use std::str::FromStr;

use jiff::Timestamp;
use jiff::civil::Date;
use jiff::tz::TimeZone;

/// The folder of all wraps, below the repository's address.
pub const FOLDER: &str = "keys";
/// Hex digits of a key's fingerprint.
const FINGERPRINT_DIGITS: usize = 32;
/// Hex digits of a wrap id.
const WRAP_DIGITS: usize = 16;

/// Text that names no data key or no wrap.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not the id of a data key")]
pub struct InvalidKeyId;

/// The id of a data key: `<YYYYMMDD>-<32 hex digits>`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyId {
    day: Date,
    fingerprint: String,
}

impl KeyId {
    /// The id of a key that is made on `day`.
    pub fn new(day: Date, fingerprint: &str) -> Result<Self, InvalidKeyId> {
        let fits = is_hex(fingerprint, FINGERPRINT_DIGITS) && (0..=9999).contains(&day.year());
        fits.then(|| Self {
            day,
            fingerprint: fingerprint.to_owned(),
        })
        .ok_or(InvalidKeyId)
    }

    /// The day on which the key was made, in UTC, by the clock of the archiver that made it.
    pub fn day(&self) -> Date {
        self.day
    }

    /// What the key itself says who it is.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// The folder of the key's wraps, below [`FOLDER`], with a `/` at its end.
    pub fn folder(&self) -> String {
        format!("{self}/")
    }
}

/// The day of a moment, in UTC.
pub(super) fn day_of(time: Timestamp) -> Date {
    time.to_zoned(TimeZone::UTC).date()
}

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.day.strftime("%Y%m%d"), self.fingerprint)
    }
}

impl FromStr for KeyId {
    type Err = InvalidKeyId;

    fn from_str(text: &str) -> Result<Self, InvalidKeyId> {
        let (day, fingerprint) = text.split_once('-').ok_or(InvalidKeyId)?;
        let id = Date::strptime("%Y%m%d", day)
            .ok()
            .and_then(|day| Self::new(day, fingerprint).ok());
        // what is spelt in another way is not the id
        id.filter(|id| id.to_string() == text).ok_or(InvalidKeyId)
    }
}

impl serde::Serialize for KeyId {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// The id of a wrap within its key.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize)]
pub struct WrapId(String);

impl WrapId {
    /// The id of the wrap for a recipient, `age1…`.
    pub fn of(recipient: &str) -> Self {
        let hash = blake3::hash(recipient.as_bytes()).to_hex();
        Self(hash.as_str().chars().take(WRAP_DIGITS).collect())
    }
}

impl fmt::Display for WrapId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The path of a wrap, below [`FOLDER`].
pub(super) fn wrap_path(key: &KeyId, wrap: &WrapId) -> String {
    format!("{key}/{wrap}")
}

/// What a path below [`FOLDER`] names; `None` where it is no wrap's.
pub(super) fn parse_wrap_path(path: &str) -> Option<(KeyId, WrapId)> {
    let (key, wrap) = path.split_once('/')?;
    let wrap = is_hex(wrap, WRAP_DIGITS).then(|| WrapId(wrap.to_owned()))?;
    Some((key.parse().ok()?, wrap))
}

fn is_hex(text: &str, digits: usize) -> bool {
    text.len() == digits
        && text
            .bytes()
            .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrap_is_found_again_from_its_path() {
        let day = Date::constant(2026, 11, 20);
        let key = KeyId::new(day, &"0123456789abcdef".repeat(2)).unwrap();
        assert_eq!(key.to_string(), "20261120-0123456789abcdef0123456789abcdef");
        let wrap = WrapId::of("age1x");
        let path = wrap_path(&key, &wrap);
        assert_eq!(parse_wrap_path(&path), Some((key, wrap)));
    }

    #[test]
    fn what_only_looks_like_a_wrap_is_left_alone() {
        // retiring deletes by these names: a foreign file must never be taken for a wrap
        let id = "20261120-0123456789abcdef0123456789abcdef";
        for path in [
            format!("{id}/0123456789ABCDEF"),
            format!("{id}/0123456789abcde"),
            format!("{id}/a/0123456789abcdef"),
            "20261320-0123456789abcdef0123456789abcdef/0123456789abcdef".to_owned(),
            "2026112-0123456789abcdef0123456789abcdef/0123456789abcdef".to_owned(),
            "../0123456789abcdef".to_owned(),
            String::new(),
        ] {
            assert_eq!(parse_wrap_path(&path), None, "{path}");
        }
    }
}
