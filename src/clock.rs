//! The time of day, asked for in one place so that tests can hand out their own.

use jiff::Timestamp;

/// Where the time of day comes from.
pub trait Clock: Send + Sync {
    /// The present moment, by this machine's clock.
    fn now(&self) -> Timestamp;
}

/// A moment as JSON has it: RFC 3339 in UTC, with six digits of microseconds.
pub mod rfc3339 {
    use jiff::Timestamp;
    use serde::Serializer;

    /// The text.
    pub fn text(time: &Timestamp) -> String {
        time.strftime("%Y-%m-%dT%H:%M:%S.%6fZ").to_string()
    }

    /// For `#[serde(serialize_with)]`.
    pub fn serialize<S: Serializer>(time: &Timestamp, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&text(time))
    }

    /// The same where there may be none.
    pub mod option {
        use super::{Serializer, Timestamp, text};

        /// For `#[serde(serialize_with)]`.
        pub fn serialize<S: Serializer>(
            time: &Option<Timestamp>,
            serializer: S,
        ) -> Result<S::Ok, S::Error> {
            match time {
                Some(time) => serializer.serialize_some(&text(time)),
                None => serializer.serialize_none(),
            }
        }
    }
}

/// The machine's own clock.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    #[expect(
        clippy::disallowed_methods,
        reason = "this is the one place that asks for the time"
    )]
    fn now(&self) -> Timestamp {
        let now = Timestamp::now();
        // PostgreSQL's clock counts microseconds, and so does everything that we write
        now.round(jiff::Unit::Microsecond).unwrap_or(now)
    }
}
