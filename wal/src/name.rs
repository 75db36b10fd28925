//! Names of the files in `pg_wal` and in an archive.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

use crate::lsn::{Lsn, WalRange, upper_hex8};
use crate::segment::SegmentSize;
use crate::timeline::TimelineId;

const SEGMENT_NAME_CHARS: usize = 24;

/// The name of a segment: timeline, then the segment's number in two halves, each eight
/// upper-case hexadecimal digits (`xlog_internal.h`, `XLogFileName`).
///
/// Which part of the log it names depends on the segment size. Names sort by timeline, then by
/// position.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentName {
    /// The timeline that it was written on.
    pub timeline: TimelineId,
    /// The upper 32 bits of its positions.
    pub high: u32,
    /// Its number within those 4 GiB.
    pub low: u32,
}

impl SegmentName {
    /// The segment that holds the byte at `lsn`.
    pub fn of(timeline: TimelineId, lsn: Lsn, size: SegmentSize) -> Self {
        let high = low_half(lsn.as_u64() >> 32);
        let low = low_half((lsn.as_u64() & 0xFFFF_FFFF) >> size.bytes().trailing_zeros());
        Self {
            timeline,
            high,
            low,
        }
    }

    /// Where it starts; `None` if no segment of this size has the name.
    pub fn start(self, size: SegmentSize) -> Option<Lsn> {
        if u64::from(self.low) >= size.segments_per_xlogid() {
            return None;
        }
        let within = u64::from(self.low) << size.bytes().trailing_zeros();
        Some(Lsn::new((u64::from(self.high) << 32) | within))
    }

    /// The stretch of log that it names; `None` if no segment of this size has the name.
    pub fn range(self, size: SegmentSize) -> Option<WalRange> {
        let start = self.start(size)?;
        Some(WalRange::new(start, start.checked_add(size.bytes())?))
    }

    /// The name of the segment that follows on the same timeline; `None` at the end of all
    /// positions, and if no segment of this size has this name.
    pub fn next(self, size: SegmentSize) -> Option<Self> {
        Some(Self::of(self.timeline, self.range(size)?.end, size))
    }

    /// The first sixteen characters, which the segments of 4 GiB of one timeline share.
    pub fn prefix16(self) -> String {
        format!("{:08X}{:08X}", self.timeline.get(), self.high)
    }
}

/// The lower 32 bits.
fn low_half(value: u64) -> u32 {
    u32::try_from(value & 0xFFFF_FFFF).expect("masked to 32 bits")
}

impl fmt::Display for SegmentName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:08X}{:08X}{:08X}",
            self.timeline.get(),
            self.high,
            self.low
        )
    }
}

/// The text is not the name of a WAL file.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("not the name of a WAL file: found {found:?}")]
pub struct InvalidWalFileName {
    /// The text, at most its first 80 characters.
    pub found: String,
}

impl InvalidWalFileName {
    fn new(text: &str) -> Self {
        Self {
            found: text.chars().take(80).collect(),
        }
    }
}

impl FromStr for SegmentName {
    type Err = InvalidWalFileName;

    fn from_str(text: &str) -> Result<Self, InvalidWalFileName> {
        segment_name(text).ok_or_else(|| InvalidWalFileName::new(text))
    }
}

fn segment_name(text: &str) -> Option<SegmentName> {
    if text.len() != SEGMENT_NAME_CHARS {
        return None;
    }
    Some(SegmentName {
        timeline: TimelineId::from_hex8(text.get(..8)?)?,
        high: upper_hex8(text.get(8..16)?)?,
        low: upper_hex8(text.get(16..)?)?,
    })
}

/// The name of any file that PostgreSQL archives or asks an archive for.
///
/// Only the exact forms are names: `FromStr` refuses other cases, lengths, separators and
/// suffixes, so that a name that was read is safe as part of a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum WalFileName {
    /// A segment: `000000010000000000000003`.
    Segment(SegmentName),
    /// The last, incomplete segment of a timeline that was left: `000000010000000000000003.partial`.
    Partial(SegmentName),
    /// How a timeline came to be: `00000002.history`.
    History(TimelineId),
    /// The note on a finished base backup: `000000010000000000000003.00000028.backup`.
    Backup {
        /// The segment in which the backup started.
        segment: SegmentName,
        /// How many bytes into that segment it started.
        offset: u32,
    },
}

impl fmt::Display for WalFileName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Segment(segment) => write!(f, "{segment}"),
            Self::Partial(segment) => write!(f, "{segment}.partial"),
            Self::History(timeline) => write!(f, "{:08X}.history", timeline.get()),
            Self::Backup { segment, offset } => write!(f, "{segment}.{offset:08X}.backup"),
        }
    }
}

impl FromStr for WalFileName {
    type Err = InvalidWalFileName;

    fn from_str(text: &str) -> Result<Self, InvalidWalFileName> {
        wal_file_name(text).ok_or_else(|| InvalidWalFileName::new(text))
    }
}

fn wal_file_name(text: &str) -> Option<WalFileName> {
    let Some((stem, suffix)) = text.split_once('.') else {
        return segment_name(text).map(WalFileName::Segment);
    };
    match suffix {
        "partial" => segment_name(stem).map(WalFileName::Partial),
        "history" => TimelineId::from_hex8(stem).map(WalFileName::History),
        _ => {
            let offset = upper_hex8(suffix.strip_suffix(".backup")?)?;
            Some(WalFileName::Backup {
                segment: segment_name(stem)?,
                offset,
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size(bytes: u64) -> SegmentSize {
        SegmentSize::from_bytes(bytes).unwrap()
    }

    #[test]
    fn a_name_depends_on_the_segment_size() {
        let timeline = TimelineId::new(1).unwrap();
        let lsn: Lsn = "2/B374D848".parse().unwrap();
        let small = SegmentName::of(timeline, lsn, size(1 << 20));
        assert_eq!(small.to_string(), "000000010000000200000B37");
        assert_eq!(
            small.start(size(1 << 20)),
            Some("2/B3700000".parse().unwrap())
        );
        let usual = SegmentName::of(timeline, lsn, size(1 << 24));
        assert_eq!(usual.to_string(), "0000000100000002000000B3");
        assert_eq!(usual.prefix16(), "0000000100000002");
        let large = SegmentName::of(timeline, lsn, size(1 << 30));
        assert_eq!(large.to_string(), "000000010000000200000002");
    }

    #[test]
    fn a_name_of_another_segment_size_has_no_start() {
        let name: SegmentName = "000000010000000200000B37".parse().unwrap();
        assert_eq!(name.start(size(1 << 24)), None);
        assert_eq!(name.next(size(1 << 24)), None);
    }

    #[test]
    fn the_next_name_carries_into_the_upper_half() {
        let name: SegmentName = "0000000100000002000000FF".parse().unwrap();
        let next = name.next(size(1 << 24)).unwrap();
        assert_eq!(next.to_string(), "000000010000000300000000");
        let last: SegmentName = "00000001FFFFFFFF000000FF".parse().unwrap();
        assert_eq!(last.next(size(1 << 24)), None);
    }

    #[test]
    fn every_form_comes_back() {
        for text in [
            "000000010000000000000003",
            "000000010000000000000003.partial",
            "0000000A.history",
            "000000010000000000000003.00000028.backup",
        ] {
            assert_eq!(text.parse::<WalFileName>().unwrap().to_string(), text);
        }
    }

    /// Such a name would become part of a path in the archive.
    #[test]
    fn refuses_names_that_are_not_exact() {
        for text in [
            "",
            ".",
            "..",
            "../00000001.history",
            "00000001.history/..",
            "0000000a.history",
            "00000000.history",
            "1.history",
            "00000001.history ",
            "00000001.HISTORY",
            "000000000000000000000003",
            "00000001000000000000000a",
            "00000001000000000000003",
            "0000000100000000000000003",
            "000000010000000000000003.",
            "000000010000000000000003.partial.partial",
            "000000010000000000000003.partial\n",
            "000000010000000000000003.0000002.backup",
            "000000010000000000000003.00000028.backup.gz",
            "000000010000000000000003..backup",
            "+00000010000000000000003",
            "00000001/000000000000003",
            "é0000000000000000000000",
        ] {
            assert!(text.parse::<WalFileName>().is_err(), "{text:?}");
        }
    }
}
