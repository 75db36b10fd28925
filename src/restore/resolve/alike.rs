//! Which named point is called almost as one that is not there.

use wal::Lsn;

/// So many bytes a server gives a name at most (`xlog_internal.h`, `MAXFNAMELEN`).
const NAME_BYTES_MAX: usize = 64;

/// A named point that is not the one that is looked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::restore) struct Alike {
    pub(in crate::restore) name: String,
    /// Where its record begins.
    pub(in crate::restore) lsn: Lsn,
    /// How many characters must be changed to come from one name to the other.
    distance: usize,
}

impl Alike {
    /// `None` for what no server calls a point.
    pub(in crate::restore) fn new(name: &[u8], lsn: Lsn, wanted: &str) -> Option<Self> {
        (name.len() < NAME_BYTES_MAX).then(|| {
            let name = String::from_utf8_lossy(name).into_owned();
            let distance = strsim::levenshtein(&name, wanted);
            Self {
                name,
                lsn,
                distance,
            }
        })
    }

    /// The one whose name is more like it; of two such, the later.
    pub(in crate::restore) fn or(self, other: Option<Self>) -> Self {
        let rank = |alike: &Self| (alike.distance, std::cmp::Reverse(alike.lsn));
        match other {
            Some(other) if rank(&other) < rank(&self) => other,
            _ => self,
        }
    }

    /// Whether one name may be a slip of the pen for the other.
    pub(in crate::restore) fn is_close(&self) -> bool {
        self.distance.saturating_mul(2) <= self.name.chars().count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slip_of_the_pen_is_told_from_another_name() {
        let alike =
            |name: &str, lsn, wanted| Alike::new(name.as_bytes(), Lsn::new(lsn), wanted).unwrap();
        let wanted = "before migration";
        let close = alike("before_migration", 1, wanted);
        let other = alike("nightly", 2, wanted);
        assert!(close.is_close() && !other.is_close());
        assert_eq!(other.clone().or(Some(close.clone())), close);
        assert_eq!(close.clone().or(Some(other)), close);
        let later = alike("before.migration", 3, wanted);
        assert_eq!(close.clone().or(Some(later.clone())), later);
        assert_eq!(later.clone().or(Some(close)), later);
    }

    /// Comparing takes as long as both names are.
    #[test]
    fn what_is_too_long_for_a_name_is_not_compared() {
        assert_eq!(Alike::new(&[b'x'; 64], Lsn::ZERO, "x"), None);
        assert!(Alike::new(&[b'x'; 63], Lsn::ZERO, "x").is_some());
    }
}
