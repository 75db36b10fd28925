//! Remembers where records start, one bit for each place where one can.

use std::collections::BTreeMap;

use crate::lsn::{Lsn, WalRange};
use crate::segment::SegmentSize;

/// Records start at multiples of eight (`MAXALIGN`).
const STEP_BYTES: u64 = 8;
const WORD_BYTES: u64 = 64 * STEP_BYTES;

/// Where records start in the newest segments.
///
/// One bit for eight bytes, so a 64th of the log that it remembers, however small its records.
#[derive(Debug)]
pub(crate) struct Marks {
    size: SegmentSize,
    segments: BTreeMap<Lsn, Vec<u64>>,
}

impl Marks {
    /// Segments are forgotten, oldest first, when all take more than this.
    const BYTES_MAX: u64 = 4 << 20;
    /// That many are kept in any case.
    const SEGMENTS_MIN: usize = 2;

    pub(crate) const fn new(size: SegmentSize) -> Self {
        Self {
            size,
            segments: BTreeMap::new(),
        }
    }

    /// Begins to remember the segment that holds `lsn`. Returns the start of the oldest that is
    /// still remembered.
    pub(crate) fn enter(&mut self, lsn: Lsn) -> Lsn {
        let start = self.size.start_of(lsn);
        let words = self.size.bytes() / WORD_BYTES;
        self.segments
            .entry(start)
            .or_insert_with(|| vec![0; usize::try_from(words).unwrap_or(usize::MAX)]);
        let segment_bytes = words.saturating_mul(8);
        let most = Self::BYTES_MAX.checked_div(segment_bytes).unwrap_or(0);
        let most = usize::try_from(most).unwrap_or(usize::MAX);
        while self.segments.len() > most.max(Self::SEGMENTS_MIN) {
            self.segments.pop_first();
        }
        self.segments
            .first_key_value()
            .map_or(start, |(oldest, _)| *oldest)
    }

    /// A record starts at `lsn`.
    pub(crate) fn mark(&mut self, lsn: Lsn) {
        let (word, bit) = self.place(lsn);
        let segment = self.segments.get_mut(&self.size.start_of(lsn));
        if let Some(word) = segment.and_then(|words| words.get_mut(word)) {
            *word |= bit;
        }
    }

    /// The first record that starts in `range`.
    pub(crate) fn first_in(&self, range: WalRange) -> Option<Lsn> {
        self.segments
            .range(self.size.start_of(range.start)..range.end)
            .find_map(|(start, words)| {
                let from = self.place(range.start.max(*start)).0;
                positions(*start, words, from).find(|lsn| range.contains(*lsn))
            })
    }

    /// The last record that starts in `range`.
    pub(crate) fn last_in(&self, range: WalRange) -> Option<Lsn> {
        self.segments
            .range(self.size.start_of(range.start)..range.end)
            .rev()
            .find_map(|(start, words)| {
                let segment = WalRange::new(*start, self.size.end_of(*start));
                let within = segment.intersection(range)?;
                let last = self.place(within.end.saturating_sub(1)).0;
                (0..=last).rev().find_map(|word| {
                    let bits = words.get(word).copied().filter(|bits| *bits != 0)?;
                    let upto = [bits];
                    let base = start.saturating_add(u64_of(word).saturating_mul(WORD_BYTES));
                    positions(base, &upto, 0)
                        .filter(|lsn| within.contains(*lsn))
                        .last()
                })
            })
    }

    /// The word and the bit of the place at or before `lsn`.
    fn place(&self, lsn: Lsn) -> (usize, u64) {
        let offset = self.size.offset_of(lsn);
        let word = usize::try_from(offset / WORD_BYTES).unwrap_or(usize::MAX);
        (word, 1 << ((offset / STEP_BYTES) % 64))
    }
}

/// The marked places from the word `from` on; the first word's first place is `start`.
fn positions(start: Lsn, words: &[u64], from: usize) -> impl Iterator<Item = Lsn> {
    words
        .iter()
        .enumerate()
        .skip(from)
        .flat_map(move |(index, word)| {
            let base = start.saturating_add(u64_of(index).saturating_mul(WORD_BYTES));
            let word = *word;
            // most words of large records are empty
            let bits = if word == 0 { 0..0 } else { 0..64_u64 };
            bits.filter(move |bit| word & (1 << bit) != 0)
                .map(move |bit| base.saturating_add(bit.saturating_mul(STEP_BYTES)))
        })
}

fn u64_of(length: usize) -> u64 {
    u64::try_from(length).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn range(start: u64, end: u64) -> WalRange {
        WalRange::new(Lsn::new(start), Lsn::new(end))
    }

    #[test]
    fn finds_the_first_and_the_last_across_segments() {
        let mut marks = Marks::new(SegmentSize::from_bytes(MIB).unwrap());
        let places = [40, 4096, MIB - 8, MIB + 40, 3 * MIB - 8].map(Lsn::new);
        for place in places {
            marks.enter(place);
            marks.mark(place);
        }
        assert_eq!(marks.first_in(range(0, 4 * MIB)), Some(places[0]));
        assert_eq!(marks.last_in(range(0, 4 * MIB)), Some(places[4]));
        assert_eq!(marks.first_in(range(41, 4096)), None);
        assert_eq!(marks.first_in(range(41, 4097)), Some(places[1]));
        assert_eq!(marks.last_in(range(0, MIB)), Some(places[2]));
        assert_eq!(marks.last_in(range(0, MIB - 8)), Some(places[1]));
        assert_eq!(marks.last_in(range(MIB, MIB + 40)), None);
        assert_eq!(marks.first_in(range(4097, 3 * MIB)), Some(places[2]));
    }

    /// A stream runs for years.
    #[test]
    fn forgets_the_oldest_segments() {
        let mut marks = Marks::new(SegmentSize::from_bytes(16 * MIB).unwrap());
        let oldest = (0..100).map(|n| marks.enter(Lsn::new(n * 16 * MIB))).last();
        assert_eq!(oldest, Some(Lsn::new(84 * 16 * MIB)));
    }
}
