//! Positions in the write-ahead log.

use std::fmt;
use std::str::FromStr;

use serde::de::{Deserialize, Deserializer, Error as _, Visitor};
use serde::ser::{Serialize, Serializer};
use thiserror::Error;

/// A position in the write-ahead log: a byte offset in the one stream that a cluster writes.
///
/// Written `16/B374D848`, the upper and the lower half in hexadecimal (`pg_lsn.c`, `pg_lsn_out`);
/// read also with the lower half padded to eight digits, as newer servers print it, and in lower
/// case. Serialised as that text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lsn(u64);

impl Lsn {
    /// `0/0`, which is never the start of a record: PostgreSQL's `InvalidXLogRecPtr`.
    pub const ZERO: Self = Self(0);

    /// The position `bytes` into the log.
    pub const fn new(bytes: u64) -> Self {
        Self(bytes)
    }

    /// The byte offset.
    pub const fn as_u64(self) -> u64 {
        self.0
    }

    /// Sixteen upper-case hexadecimal digits: sorts as text in the order of the log.
    pub fn hex16(self) -> String {
        format!("{:016X}", self.0)
    }

    /// What [`Self::hex16`] wrote; nothing else is taken.
    pub fn from_hex16(text: &str) -> Option<Self> {
        if text.len() != 16 {
            return None;
        }
        upper_hex(text).map(Self)
    }

    /// The position `bytes` further on, unless that is beyond 64 bits.
    pub const fn checked_add(self, bytes: u64) -> Option<Self> {
        match self.0.checked_add(bytes) {
            Some(sum) => Some(Self(sum)),
            None => None,
        }
    }

    /// The position `bytes` further on, or the last one that 64 bits can name.
    #[must_use]
    pub const fn saturating_add(self, bytes: u64) -> Self {
        Self(self.0.saturating_add(bytes))
    }

    /// The position `bytes` before, or zero.
    #[must_use]
    pub const fn saturating_sub(self, bytes: u64) -> Self {
        Self(self.0.saturating_sub(bytes))
    }

    /// Bytes from `earlier` to here, 0 if `earlier` is not before.
    pub const fn bytes_since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }

    /// The next multiple of eight, where a record may start (`MAXALIGN`); itself if it is one.
    #[must_use]
    pub const fn align8(self) -> Self {
        Self(self.0.saturating_add(7) & !7)
    }
}

/// The value of upper-case hexadecimal digits; `None` for anything else (also for the sign that
/// `from_str_radix` would take).
pub(crate) fn upper_hex(text: &str) -> Option<u64> {
    let digits = text
        .bytes()
        .all(|byte| matches!(byte, b'0'..=b'9' | b'A'..=b'F'));
    if !digits {
        return None;
    }
    u64::from_str_radix(text, 16).ok()
}

/// As [`upper_hex`], in exactly eight digits.
pub(crate) fn upper_hex8(text: &str) -> Option<u32> {
    if text.len() != 8 {
        return None;
    }
    u32::try_from(upper_hex(text)?).ok()
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:X}/{:X}", self.0 >> 32, self.0 & 0xFFFF_FFFF)
    }
}

/// The text is not an LSN.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("not an LSN, expected hexadecimal halves as in 16/B374D848: found {found:?}")]
pub struct InvalidLsn {
    /// The text.
    pub found: String,
}

impl FromStr for Lsn {
    type Err = InvalidLsn;

    fn from_str(text: &str) -> Result<Self, InvalidLsn> {
        let parsed = text.split_once('/').and_then(|(high, low)| {
            let (high, low) = (hex_half(high)?, hex_half(low)?);
            Some(Self((u64::from(high) << 32) | u64::from(low)))
        });
        parsed.ok_or_else(|| InvalidLsn {
            found: text.chars().take(64).collect(),
        })
    }
}

/// One to eight hexadecimal digits of either case (`pg_lsn.c`, `pg_lsn_in_internal`).
fn hex_half(text: &str) -> Option<u32> {
    let digits = text.bytes().all(|byte| byte.is_ascii_hexdigit());
    if !digits || text.len() > 8 {
        return None;
    }
    u32::from_str_radix(text, 16).ok()
}

impl Serialize for Lsn {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Lsn {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;

        impl Visitor<'_> for Text {
            type Value = Lsn;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an LSN such as \"16/B374D848\"")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Lsn, E> {
                text.parse().map_err(E::custom)
            }
        }

        deserializer.deserialize_str(Text).map_err(D::Error::custom)
    }
}

/// A stretch of the log: from `start` up to, and without, `end`.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
pub struct WalRange {
    /// The first byte.
    pub start: Lsn,
    /// The byte after the last.
    pub end: Lsn,
}

impl WalRange {
    /// From `start` up to, and without, `end`; an `end` before `start` gives an empty range.
    pub const fn new(start: Lsn, end: Lsn) -> Self {
        Self { start, end }
    }

    /// Bytes in the range.
    pub const fn len_bytes(self) -> u64 {
        self.end.bytes_since(self.start)
    }

    /// True if it holds no byte.
    pub const fn is_empty(self) -> bool {
        self.len_bytes() == 0
    }

    /// True if the byte at `lsn` is in the range.
    pub fn contains(self, lsn: Lsn) -> bool {
        self.start <= lsn && lsn < self.end
    }

    /// True if every byte of `other` is in the range.
    pub fn covers(self, other: Self) -> bool {
        other.is_empty() || (self.start <= other.start && other.end <= self.end)
    }

    /// The bytes that both hold, if any.
    pub fn intersection(self, other: Self) -> Option<Self> {
        let both = Self::new(self.start.max(other.start), self.end.min(other.end));
        (!both.is_empty()).then_some(both)
    }
}

impl fmt::Display for WalRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{}, {})", self.start, self.end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prints_and_reads_what_servers_print() {
        let lsn = Lsn::new(0x16_B374_D848);
        assert_eq!(lsn.to_string(), "16/B374D848");
        assert_eq!("16/b374d848".parse(), Ok(lsn));
        assert_eq!("0/00000028".parse(), Ok(Lsn::new(0x28)));
        assert_eq!(Lsn::new(0x28).to_string(), "0/28");
        assert_eq!("FFFFFFFF/FFFFFFFF".parse(), Ok(Lsn::new(u64::MAX)));
    }

    #[test]
    fn refuses_what_is_no_lsn() {
        for text in [
            "",
            "/",
            "0/",
            "/0",
            "0",
            "+1/0",
            "1/+0",
            "0/0/0",
            " 0/0",
            "0/123456789",
            "g/0",
        ] {
            assert!(text.parse::<Lsn>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn sixteen_digits_sort_as_the_log_does_and_come_back() {
        let (low, high) = (Lsn::new(0xFF), Lsn::new(0x1_0000_0000));
        assert!(low.hex16() < high.hex16());
        assert_eq!(Lsn::from_hex16(&high.hex16()), Some(high));
        assert_eq!(Lsn::from_hex16("00000000000000ff"), None);
        assert_eq!(Lsn::from_hex16("+0000000000000FF"), None);
    }

    #[test]
    fn aligns_as_records_do() {
        assert_eq!(Lsn::new(1).align8(), Lsn::new(8));
        assert_eq!(Lsn::new(8).align8(), Lsn::new(8));
    }

    #[test]
    fn a_range_is_half_open() {
        let range = WalRange::new(Lsn::new(8), Lsn::new(16));
        assert!(range.contains(Lsn::new(8)) && !range.contains(Lsn::new(16)));
        assert_eq!(range.len_bytes(), 8);
        assert!(WalRange::new(range.end, range.start).is_empty());
        assert_eq!(
            range.intersection(WalRange::new(Lsn::new(16), Lsn::new(24))),
            None
        );
    }
}
