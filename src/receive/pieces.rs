//! Which pieces of a segment are merged, and which may go. Pure.
//!
//! A piece may go only once another object that covers all of it is acknowledged (DESIGN.md,
//! invariant 5). What other programs stored is not known here: that is looked for in the repository
//! when the whole segment is there.

use std::time::{Duration, Instant};

use wal::{Lsn, SegmentSize, WalRange};

/// So many adjacent pieces are merged into one, and so many of those into a larger one: every byte
/// is stored again once a level, and few pieces are left of a segment that takes days to fill.
pub(super) const MERGED_TOGETHER: usize = 16;
/// Pieces are merged no more often: where commits wait for each, thousands come in a second, and what
/// is merged sooner is stored again for nothing.
pub(super) const MERGED_AFTER: Duration = Duration::from_millis(200);

/// A piece that may go, and the object that covers it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Superseded {
    /// The piece.
    pub piece: WalRange,
    /// What is acknowledged and covers it.
    pub by: WalRange,
}

#[derive(Debug)]
#[cfg_attr(test, derive(Clone))]
struct Piece {
    range: WalRange,
    /// How often its bytes have been merged.
    level: u32,
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    UnderWay,
    /// Safe, and not in the repository yet.
    Spooled,
    Acknowledged,
}

/// The pieces that this connection stored, in segments that are not settled.
#[derive(Debug)]
#[cfg_attr(test, derive(Clone))]
pub struct Pieces {
    size: SegmentSize,
    given: Vec<Piece>,
    /// What is being stored to take the place of others.
    merging: Option<WalRange>,
    /// Segments that are acknowledged while a piece of theirs is still under way.
    covers: Vec<WalRange>,
    /// Segments before this were given to the store as a whole: their pieces are not merged.
    settled_before: Lsn,
    /// Names that are taken by what cannot be read.
    damaged: Vec<WalRange>,
    /// How many are neither acknowledged nor spooled.
    under_way: usize,
    fresh: Fresh,
    /// A merge was acknowledged since somebody looked whether it can be merged again.
    has_merged: bool,
}

/// Pieces that are acknowledged and were never merged.
#[derive(Debug, Default)]
#[cfg_attr(test, derive(Clone))]
struct Fresh {
    count: usize,
    /// When somebody first saw one of them.
    since: Option<Instant>,
    /// There were so many when they could not be merged.
    in_vain: usize,
}

impl Fresh {
    /// When they may be merged.
    fn due_at(&self) -> Option<Instant> {
        let is_enough = self.count >= MERGED_TOGETHER && self.count > self.in_vain;
        self.since
            .filter(|_| is_enough)
            .map(|since| since + MERGED_AFTER)
    }

    fn is_due(&mut self, now: Instant) -> bool {
        if self.count > 0 {
            self.since.get_or_insert(now);
        }
        self.due_at().is_some_and(|due| due <= now)
    }
}

impl Pieces {
    /// None yet, of segments of this size.
    pub fn new(size: SegmentSize) -> Self {
        Self {
            size,
            given: Vec::new(),
            merging: None,
            covers: Vec::new(),
            settled_before: Lsn::ZERO,
            damaged: Vec::new(),
            under_way: 0,
            fresh: Fresh::default(),
            has_merged: false,
        }
    }

    /// Nothing is stored under these names: they are taken by what cannot be read.
    pub fn avoid(&mut self, damaged: Vec<WalRange>) {
        self.damaged = damaged;
    }

    /// As much of `piece` as can be stored under a name of its own.
    pub fn named_freely(&self, piece: WalRange) -> WalRange {
        let mut free = piece;
        while self.damaged.contains(&free) && free.len_bytes() > 1 {
            free.end = free.start.saturating_add(free.len_bytes() / 2);
        }
        free
    }

    /// How many were given to the store that neither it nor the spool has acknowledged, merged ones
    /// aside.
    pub fn under_way(&self) -> usize {
        self.under_way
    }

    /// Whether this is being stored to take the place of others.
    pub fn is_merge(&self, range: WalRange) -> bool {
        self.merging == Some(range)
    }

    /// A piece was given to the store.
    pub fn given(&mut self, range: WalRange) {
        self.under_way += 1;
        self.given.push(Piece {
            range,
            level: 0,
            state: State::UnderWay,
        });
    }

    /// A whole segment was given to the store.
    pub fn segment_given(&mut self, segment: WalRange) {
        self.settled_before = self.settled_before.max(segment.end);
        self.fresh = Fresh::default();
    }

    /// A merge that is not of pieces given here: of what earlier connections left in the segment.
    /// `false` while another is under way.
    pub fn merge_given(&mut self, range: WalRange) -> bool {
        // under a name that has a damaged object it would be taken for stored
        let free = self.merging.is_none() && !self.damaged.contains(&range);
        if free {
            self.merging = Some(range);
        }
        free
    }

    /// When there may be something to merge, if nothing else happens before.
    pub fn merge_due_at(&self) -> Option<Instant> {
        self.fresh.due_at().filter(|_| self.merging.is_none())
    }

    /// What is to be merged now, if anything is.
    pub fn next_merge(&mut self, now: Instant) -> Option<WalRange> {
        if self.merging.is_some() {
            return None;
        }
        let with_fresh = self.fresh.is_due(now);
        if !with_fresh && !std::mem::take(&mut self.has_merged) {
            return None;
        }
        self.given.sort_by_key(|piece| piece.range.start);
        // under a name that has a damaged object it would be taken for stored
        let is_free = |range: &WalRange| !self.damaged.contains(range);
        let found = self.longest_runs(with_fresh).find(is_free);
        self.merging = found;
        let has_fresh = |range| self.within(range).any(|piece| piece.level == 0);
        if found.is_some_and(has_fresh) {
            self.fresh = Fresh::default();
        } else if with_fresh && found.is_none() {
            self.fresh = Fresh {
                count: self.fresh.count,
                since: Some(now),
                in_vain: self.fresh.count,
            };
        }
        self.merging
    }

    /// What can be merged: adjacent pieces that were merged as often, of those that never were all that
    /// there are.
    fn longest_runs(&self, with_fresh: bool) -> impl Iterator<Item = WalRange> {
        let can_be_merged = move |piece: &Piece| {
            piece.state == State::Acknowledged
                && piece.range.start >= self.settled_before
                && (with_fresh || piece.level > 0)
        };
        let follows = move |before: &Piece, piece: &Piece| {
            before.level == piece.level
                && before.range.end == piece.range.start
                && can_be_merged(before)
                && can_be_merged(piece)
        };
        let runs = self.given.chunk_by(follows);
        let runs = runs.flat_map(|run| {
            let most = match run {
                [Piece { level: 0, .. }, ..] => run.len().max(1),
                _ => MERGED_TOGETHER,
            };
            run.chunks(most)
        });
        let runs = runs.filter(|run| run.len() >= MERGED_TOGETHER);
        runs.filter_map(|run| {
            let (first, last) = (run.first()?, run.last()?);
            Some(WalRange {
                start: first.range.start,
                end: last.range.end,
            })
        })
    }

    /// The spool has taken it: that supersedes nothing.
    pub fn spooled(&mut self, range: WalRange) {
        let is_it = |piece: &&mut Piece| piece.range == range && piece.state == State::UnderWay;
        if let Some(piece) = self.given.iter_mut().find(is_it) {
            piece.state = State::Spooled;
            self.under_way -= 1;
        }
    }

    /// The repository has acknowledged a piece, a merged one or a segment: what may go now.
    pub fn acknowledged(&mut self, range: WalRange) -> Vec<Superseded> {
        if self.merging == Some(range) {
            self.merging = None;
            self.has_merged = true;
            let level = self.within(range).map(|piece| piece.level).max();
            let mut superseded = self.take_acknowledged(range);
            self.given.push(Piece {
                range,
                level: level.map_or(1, |level| level + 1),
                state: State::Acknowledged,
            });
            superseded.extend(self.late(range));
            return superseded;
        }
        // the newest are the last
        let mut given = self.given.iter_mut().rev();
        if let Some(piece) = given.find(|piece| piece.range == range) {
            let before = std::mem::replace(&mut piece.state, State::Acknowledged);
            self.under_way -= usize::from(before == State::UnderWay);
            self.fresh.count += usize::from(before != State::Acknowledged);
            return self.late(range);
        }
        // said twice, or not of this connection
        if !self.is_segment(range) {
            return Vec::new();
        }
        let superseded = self.take_acknowledged(range);
        self.covers.push(range);
        self.forget_covers();
        superseded
    }

    /// What goes of a piece that is acknowledged when its segment already is.
    fn late(&mut self, range: WalRange) -> Vec<Superseded> {
        let cover = self.covers.iter().find(|cover| covers(**cover, range));
        let Some(by) = cover.copied() else {
            return Vec::new();
        };
        let superseded = self.take_acknowledged(by);
        self.forget_covers();
        superseded
    }

    fn is_segment(&self, range: WalRange) -> bool {
        self.size.start_of(range.start) == range.start && range.len_bytes() == self.size.bytes()
    }

    fn within(&self, range: WalRange) -> impl Iterator<Item = &Piece> {
        self.given
            .iter()
            .filter(move |piece| covers(range, piece.range))
    }

    fn take_acknowledged(&mut self, by: WalRange) -> Vec<Superseded> {
        let gone =
            |piece: &mut Piece| piece.state == State::Acknowledged && covers(by, piece.range);
        self.given
            .extract_if(.., gone)
            .map(|piece| Superseded {
                piece: piece.range,
                by,
            })
            .collect()
    }

    fn forget_covers(&mut self) {
        let (pieces, merging) = (&self.given, self.merging);
        self.covers.retain(|cover| {
            let under_way = |range| covers(*cover, range);
            pieces.iter().any(|piece| under_way(piece.range)) || merging.is_some_and(under_way)
        });
    }
}

fn covers(by: WalRange, range: WalRange) -> bool {
    by.start <= range.start && range.end <= by.end
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEGMENT: u64 = 1 << 20;

    fn pieces() -> Pieces {
        Pieces::new(SegmentSize::from_bytes(SEGMENT).unwrap())
    }

    fn range(start: u64, end: u64) -> WalRange {
        WalRange {
            start: Lsn::new(start),
            end: Lsn::new(end),
        }
    }

    fn superseded(pieces: &[(u64, u64)], by: WalRange) -> Vec<Superseded> {
        let pieces = pieces.iter().map(|&(start, end)| range(start, end));
        pieces.map(|piece| Superseded { piece, by }).collect()
    }

    /// Pieces of ten bytes each, given and acknowledged.
    fn stored(count: u64) -> Pieces {
        let mut pieces = pieces();
        for number in 0..count {
            let piece = range(number * 10, number * 10 + 10);
            pieces.given(piece);
            assert_eq!(pieces.acknowledged(piece), []);
        }
        pieces
    }

    /// What is merged once it is time.
    fn next_merge(pieces: &mut Pieces) -> Option<WalRange> {
        let now = Instant::now();
        let at_once = pieces.next_merge(now);
        at_once.or_else(|| pieces.next_merge(now + MERGED_AFTER))
    }

    /// The store would say that it is there, and the good ones would go.
    #[test]
    fn nothing_is_merged_under_the_name_of_a_damaged_object() {
        let mut pieces = pieces();
        pieces.avoid(vec![range(0, 160)]);
        assert!(!pieces.merge_given(range(0, 160)));
        assert!(pieces.merge_given(range(0, 170)));
    }

    #[test]
    fn sixteen_adjacent_pieces_are_merged_and_go_once_that_is_acknowledged() {
        assert_eq!(next_merge(&mut stored(15)), None);
        let mut pieces = stored(16);
        let merged = range(0, 160);
        assert_eq!(next_merge(&mut pieces), Some(merged));
        // one at a time
        assert_eq!(next_merge(&mut pieces), None);
        let gone: Vec<_> = (0..16).map(|n| (n * 10, n * 10 + 10)).collect();
        assert_eq!(pieces.acknowledged(merged), superseded(&gone, merged));
        assert_eq!(next_merge(&mut pieces), None);
    }

    /// Where commits wait for each, thousands come in a second.
    #[test]
    fn pieces_are_merged_now_and_then_and_all_of_them() {
        let mut pieces = stored(16);
        let now = Instant::now();
        assert_eq!(
            (pieces.next_merge(now), pieces.merge_due_at()),
            (None, Some(now + MERGED_AFTER))
        );
        for number in 16..500 {
            let piece = range(number * 10, number * 10 + 10);
            pieces.given(piece);
            assert_eq!(pieces.acknowledged(piece), []);
        }
        let due = now + MERGED_AFTER;
        let before = now + MERGED_AFTER / 2;
        assert_eq!(pieces.next_merge(before), None);
        let merged = range(0, 5000);
        assert_eq!(pieces.next_merge(due), Some(merged));
        assert_eq!(pieces.merge_due_at(), None);
        assert_eq!(pieces.acknowledged(merged).len(), 500);
        assert!(pieces.given.len() == 1 && pieces.under_way() == 0);
    }

    /// An idle stream would be woken for it for ever.
    #[test]
    fn what_cannot_be_merged_is_looked_at_once() {
        let mut pieces = stored(15);
        let behind = range(151, 160);
        pieces.given(behind);
        pieces.acknowledged(behind);
        let now = Instant::now();
        assert_eq!(pieces.next_merge(now), None);
        assert_eq!(pieces.merge_due_at(), Some(now + MERGED_AFTER));
        assert_eq!(pieces.next_merge(now + MERGED_AFTER), None);
        assert_eq!(pieces.merge_due_at(), None);
    }

    #[test]
    fn merged_pieces_are_merged_again() {
        let mut pieces = pieces();
        let mut merges = Vec::new();
        for number in 0..256 {
            let piece = range(number * 10, number * 10 + 10);
            pieces.given(piece);
            pieces.acknowledged(piece);
            while let Some(merged) = next_merge(&mut pieces) {
                pieces.acknowledged(merged);
                merges.push(merged);
            }
        }
        assert_eq!(merges.len(), 17);
        assert_eq!(merges.last(), Some(&range(0, 2560)));
        assert_eq!(pieces.given.len(), 1);
    }

    /// What lies between them may be stored by nobody.
    #[test]
    fn pieces_with_a_gap_between_them_are_not_merged() {
        let mut pieces = stored(15);
        let behind = range(151, 160);
        pieces.given(behind);
        pieces.acknowledged(behind);
        assert_eq!(next_merge(&mut pieces), None);
    }

    /// A piece that is not stored must not be taken for one that is.
    #[test]
    fn what_is_not_acknowledged_is_not_merged() {
        let mut pieces = stored(15);
        pieces.given(range(150, 160));
        assert_eq!(next_merge(&mut pieces), None);
        pieces.acknowledged(range(150, 160));
        // nor with what is
        pieces.given(range(160, 170));
        assert_eq!(next_merge(&mut pieces), Some(range(0, 160)));
    }

    #[test]
    fn a_piece_that_is_acknowledged_later_than_its_segment_goes_then() {
        let mut pieces = stored(1);
        let late = range(10, 20);
        pieces.given(late);
        let segment = range(0, SEGMENT);
        pieces.segment_given(segment);
        assert_eq!(
            pieces.acknowledged(segment),
            superseded(&[(0, 10)], segment)
        );
        assert_eq!(pieces.acknowledged(late), superseded(&[(10, 20)], segment));
        assert!(pieces.given.is_empty() && pieces.covers.is_empty());
    }

    #[test]
    fn a_merge_that_is_acknowledged_later_than_its_segment_goes_too() {
        let mut pieces = stored(16);
        let merged = next_merge(&mut pieces).unwrap();
        let segment = range(0, SEGMENT);
        pieces.segment_given(segment);
        assert_eq!(pieces.acknowledged(segment).len(), 16);
        assert_eq!(
            pieces.acknowledged(merged),
            superseded(&[(0, 160)], segment)
        );
        assert!(pieces.covers.is_empty());
    }

    #[test]
    fn a_segment_that_is_given_as_a_whole_is_not_merged_any_more() {
        let mut pieces = stored(16);
        pieces.segment_given(range(0, SEGMENT));
        assert_eq!(next_merge(&mut pieces), None);
    }

    /// The same said twice must not make a piece supersede itself.
    #[test]
    fn nothing_goes_when_the_same_is_acknowledged_twice() {
        let mut pieces = stored(2);
        assert_eq!(pieces.acknowledged(range(0, 10)), []);
        assert_eq!(pieces.acknowledged(range(0, 20)), []);
    }

    #[test]
    fn the_spool_supersedes_nothing() {
        let mut pieces = stored(15);
        pieces.given(range(150, 160));
        pieces.spooled(range(150, 160));
        assert_eq!((pieces.under_way(), next_merge(&mut pieces)), (0, None));
        pieces.acknowledged(range(150, 160));
        assert_eq!(next_merge(&mut pieces), Some(range(0, 160)));
    }
}
