//! Timelines by number.

use std::fmt;
use std::num::NonZeroU32;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::lsn::upper_hex8;

/// A timeline of a cluster: a new one begins at each promotion and each end of a recovery.
///
/// Printed in decimal, as PostgreSQL does in messages and settings; in the names of WAL files it
/// is eight hexadecimal digits ([`Self::hex8`]). Never 0. Serialised as a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct TimelineId(NonZeroU32);

impl TimelineId {
    /// The timeline with this number, which is not 0.
    pub const fn new(number: u32) -> Option<Self> {
        match NonZeroU32::new(number) {
            Some(number) => Some(Self(number)),
            None => None,
        }
    }

    /// The number.
    pub const fn get(self) -> u32 {
        self.0.get()
    }

    /// Eight upper-case hexadecimal digits, as in the names of WAL files.
    pub fn hex8(self) -> String {
        format!("{:08X}", self.get())
    }

    /// What [`Self::hex8`] wrote; nothing else is taken.
    pub fn from_hex8(text: &str) -> Option<Self> {
        Self::new(upper_hex8(text)?)
    }
}

impl fmt::Display for TimelineId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// The text is not the number of a timeline.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("not a timeline, expected a number from 1 to 4294967295: found {found:?}")]
pub struct InvalidTimelineId {
    /// The text.
    pub found: String,
}

impl FromStr for TimelineId {
    type Err = InvalidTimelineId;

    fn from_str(text: &str) -> Result<Self, InvalidTimelineId> {
        let digits = text.bytes().all(|byte| byte.is_ascii_digit());
        let parsed = if digits {
            text.parse().ok().and_then(Self::new)
        } else {
            None
        };
        parsed.ok_or_else(|| InvalidTimelineId {
            found: text.chars().take(64).collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_decimal_in_messages_and_hexadecimal_in_names() {
        let timeline = TimelineId::new(26).unwrap();
        assert_eq!(timeline.to_string(), "26");
        assert_eq!(timeline.hex8(), "0000001A");
        assert_eq!(TimelineId::from_hex8("0000001A"), Some(timeline));
        assert_eq!("26".parse(), Ok(timeline));
    }

    #[test]
    fn zero_is_no_timeline() {
        assert_eq!(TimelineId::new(0), None);
        for text in ["0", "", "+1", "-1", "4294967296", "1 ", "1A"] {
            assert!(text.parse::<TimelineId>().is_err(), "{text:?}");
        }
        for text in ["00000000", "0000001a", "1A", "+000001A"] {
            assert_eq!(TimelineId::from_hex8(text), None, "{text:?}");
        }
    }
}
