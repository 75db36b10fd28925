//! PostgreSQL's clock.

/// A moment as PostgreSQL records it: microseconds since 2000-01-01 00:00:00 UTC (`timestamp.h`,
/// `TimestampTz`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PgTime(pub i64);

/// 2000-01-01 00:00:00 UTC in microseconds since 1970 (`timestamp.h`, `POSTGRES_EPOCH_JDATE` less
/// `UNIX_EPOCH_JDATE`: 10,957 days).
const EPOCH_UNIX_MICROS: i64 = 10_957 * 86_400 * 1_000_000;

impl PgTime {
    /// Microseconds since 1970-01-01 00:00:00 UTC; the nearest that 64 bits can hold.
    pub const fn to_unix_micros(self) -> i64 {
        self.0.saturating_add(EPOCH_UNIX_MICROS)
    }

    /// The moment `micros` microseconds after 1970-01-01 00:00:00 UTC; the nearest that 64 bits
    /// can hold.
    pub const fn from_unix_micros(micros: i64) -> Self {
        Self(micros.saturating_sub(EPOCH_UNIX_MICROS))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_from_the_year_2000() {
        assert_eq!(PgTime(0).to_unix_micros(), 946_684_800_000_000);
        assert_eq!(PgTime::from_unix_micros(946_684_800_000_001), PgTime(1));
    }

    #[test]
    fn infinity_does_not_overflow() {
        assert_eq!(PgTime(i64::MAX).to_unix_micros(), i64::MAX);
        assert_eq!(PgTime::from_unix_micros(i64::MIN), PgTime(i64::MIN));
    }
}
