//! Cuts a stream of log bytes where segments end.

use crate::lsn::{Lsn, WalRange};
use crate::segment::SegmentSize;

/// Cuts bytes of the log into stretches that each lie in one segment.
///
/// A message of a replication stream may cross the end of a segment; what is stored must not.
#[derive(Clone, Copy, Debug)]
pub struct Segmenter {
    size: SegmentSize,
}

/// Bytes of one segment that follow on from each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stretch<'a> {
    /// Where the segment starts that holds them.
    pub segment_start: Lsn,
    /// Where the bytes lie.
    pub range: WalRange,
    /// The bytes.
    pub bytes: &'a [u8],
    /// True if the segment ends with them.
    pub ends_segment: bool,
}

impl Segmenter {
    /// Cuts into segments of `size`.
    pub const fn new(size: SegmentSize) -> Self {
        Self { size }
    }

    /// The stretches of `bytes`, whose first byte lies at `start`, in order; none is empty.
    pub fn cut(self, start: Lsn, bytes: &[u8]) -> impl Iterator<Item = Stretch<'_>> {
        Cuts {
            size: self.size,
            at: start,
            rest: bytes,
        }
    }
}

struct Cuts<'a> {
    size: SegmentSize,
    at: Lsn,
    rest: &'a [u8],
}

impl<'a> Iterator for Cuts<'a> {
    type Item = Stretch<'a>;

    fn next(&mut self) -> Option<Stretch<'a>> {
        if self.rest.is_empty() {
            return None;
        }
        let start = self.at;
        let segment_end = self.size.end_of(start);
        let room = usize::try_from(segment_end.bytes_since(start)).unwrap_or(usize::MAX);
        // at the very end of all positions there is no room; the rest then stays in one stretch
        let room = if room == 0 { usize::MAX } else { room };
        let (bytes, rest) = self.rest.split_at_checked(room).unwrap_or((self.rest, &[]));
        let length = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        self.at = start.saturating_add(length);
        self.rest = rest;
        Some(Stretch {
            segment_start: self.size.start_of(start),
            range: WalRange::new(start, self.at),
            bytes,
            ends_segment: self.at == segment_end,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn cut(start: u64, length: usize) -> Vec<(u64, u64, u64, usize, bool)> {
        let bytes = vec![0; length];
        let size = SegmentSize::from_bytes(MIB).unwrap();
        Segmenter::new(size)
            .cut(Lsn::new(start), &bytes)
            .map(|s| {
                let (start, end) = (s.range.start.as_u64(), s.range.end.as_u64());
                (
                    s.segment_start.as_u64(),
                    start,
                    end,
                    s.bytes.len(),
                    s.ends_segment,
                )
            })
            .collect()
    }

    #[test]
    fn cuts_where_a_segment_ends() {
        assert_eq!(
            cut(2 * MIB - 10, 30),
            [
                (MIB, 2 * MIB - 10, 2 * MIB, 10, true),
                (2 * MIB, 2 * MIB, 2 * MIB + 20, 20, false)
            ]
        );
    }

    #[test]
    fn gives_no_empty_stretch_at_a_boundary() {
        assert_eq!(cut(MIB, 0), []);
        assert_eq!(cut(MIB, 1 << 20), [(MIB, MIB, 2 * MIB, 1 << 20, true)]);
    }

    #[test]
    fn a_long_push_gives_every_segment_it_crosses() {
        assert_eq!(cut(MIB / 2, 3 << 20).len(), 4);
    }
}
