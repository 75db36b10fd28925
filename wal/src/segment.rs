//! Segments: the files that the log is cut into.

use std::fmt;

use thiserror::Error;

use crate::lsn::{Lsn, WalRange};

const SMALLEST_BYTES: u64 = 1 << 20;
const LARGEST_BYTES: u64 = 1 << 30;

/// How large a cluster's segments are: a power of two from 1 MiB to 1 GiB, set by `initdb`
/// (`xlog_internal.h`, `IsValidWalSegSize`). 16 MiB is usual, and never to be assumed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentSize(u32);

/// No server has segments of this size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("not a segment size, expected a power of two from 1 MiB to 1 GiB: bytes={bytes}")]
pub struct InvalidSegmentSize {
    /// The size, in bytes.
    pub bytes: u64,
}

impl SegmentSize {
    /// Segments of `bytes` bytes.
    pub fn from_bytes(bytes: u64) -> Result<Self, InvalidSegmentSize> {
        if !bytes.is_power_of_two() || !(SMALLEST_BYTES..=LARGEST_BYTES).contains(&bytes) {
            return Err(InvalidSegmentSize { bytes });
        }
        match u32::try_from(bytes) {
            Ok(bytes) => Ok(Self(bytes)),
            Err(_) => Err(InvalidSegmentSize { bytes }),
        }
    }

    /// The size in bytes.
    pub fn bytes(self) -> u64 {
        u64::from(self.0)
    }

    /// Where the segment starts that holds the byte at `lsn`.
    pub fn start_of(self, lsn: Lsn) -> Lsn {
        Lsn::new(lsn.as_u64() & !self.mask())
    }

    /// Where the segment ends that holds the byte at `lsn`: the start of the next one.
    pub fn end_of(self, lsn: Lsn) -> Lsn {
        self.start_of(lsn).saturating_add(self.bytes())
    }

    /// The segment that holds the byte at `lsn`.
    pub fn range_of(self, lsn: Lsn) -> WalRange {
        WalRange::new(self.start_of(lsn), self.end_of(lsn))
    }

    /// How many bytes into its segment `lsn` is.
    pub fn offset_of(self, lsn: Lsn) -> u64 {
        lsn.as_u64() & self.mask()
    }

    /// Segments in 4 GiB of log, which is how names are numbered (`xlog_internal.h`,
    /// `XLogSegmentsPerXLogId`).
    pub fn segments_per_xlogid(self) -> u64 {
        1 << 32_u32.saturating_sub(self.0.trailing_zeros())
    }

    fn mask(self) -> u64 {
        self.bytes().saturating_sub(1)
    }
}

/// In bytes, with no unit.
impl fmt::Display for SegmentSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl serde::Serialize for SegmentSize {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u32(self.0)
    }
}

impl<'de> serde::Deserialize<'de> for SegmentSize {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let bytes = u64::deserialize(deserializer)?;
        Self::from_bytes(bytes).map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_what_initdb_takes() {
        for power in 20..=30 {
            assert!(SegmentSize::from_bytes(1 << power).is_ok());
        }
        for bytes in [0, 1, 1 << 19, 1 << 31, (1 << 24) + 1, 3 << 20, u64::MAX] {
            assert_eq!(
                SegmentSize::from_bytes(bytes),
                Err(InvalidSegmentSize { bytes })
            );
        }
    }

    #[test]
    fn a_boundary_belongs_to_the_segment_that_it_starts() {
        let size = SegmentSize::from_bytes(1 << 24).unwrap();
        let boundary = Lsn::new(3 << 24);
        assert_eq!(size.start_of(boundary), boundary);
        assert_eq!(size.end_of(boundary), Lsn::new(4 << 24));
        assert_eq!(size.start_of(Lsn::new((3 << 24) - 1)), Lsn::new(2 << 24));
        assert_eq!(size.offset_of(Lsn::new((3 << 24) + 5)), 5);
        assert_eq!(size.segments_per_xlogid(), 256);
    }
}
