//! What others have stored of the segment at hand: another archiver of this server, a backup, or a
//! server that writes another history under the same names. Before the first piece of a segment is
//! stored, whoever was there before is looked for, and a piece is stored once what it overlaps is
//! found to be the same. Pure.
//!
//! Two that look in the same moment see nothing of each other: the next segment, or a merge, shows it.

use std::time::{Duration, Instant};

use wal::{Checked, Lsn, SegmentName, WalRange};

use crate::repository::layout::ObjectName;

/// Whoever is ahead of this server is ahead by moments, unless it has another history.
const WAIT_MAX: Duration = Duration::from_secs(10);

/// A piece on its way.
pub(super) type Piece = (ObjectName, Checked<'static>);

/// What was found, and what waits for it.
#[derive(Debug, Default)]
pub(super) struct Others {
    /// Which segment this is about.
    segment: Option<SegmentName>,
    /// Nobody has answered yet.
    is_asked: bool,
    /// Stretches that are not compared yet, and the digests of their bytes.
    found: Vec<(WalRange, String)>,
    waiting: Vec<Piece>,
    waiting_since: Option<Instant>,
    is_told: bool,
}

impl Others {
    /// Takes a piece. Gives it back where nothing is in its way; otherwise it comes with
    /// [`Self::released`]. The second value says that its segment has to be looked at.
    pub(super) fn admit(
        &mut self,
        segment: SegmentName,
        piece: Piece,
        now: Instant,
    ) -> (Vec<Piece>, bool) {
        let mut released = Vec::new();
        let is_new = self.segment != Some(segment);
        if is_new {
            released = self.leave();
            self.segment = Some(segment);
            self.is_asked = true;
        }
        if self.is_in_the_way(piece.1.range()) {
            self.waiting.push(piece);
            self.waiting_since.get_or_insert(now);
        } else {
            released.push(piece);
        }
        (released, is_new)
    }

    /// The segment was looked at: this was found of it.
    pub(super) fn found(&mut self, segment: SegmentName, found: Vec<(WalRange, String)>) {
        if self.segment == Some(segment) {
            self.is_asked = false;
            self.found = found;
        }
    }

    /// Compares what was found by `agrees`, which says nothing of what has not come yet. `Err`: the
    /// start of what differs.
    pub(super) fn compare(
        &mut self,
        agrees: impl Fn(WalRange, &str) -> Option<bool>,
    ) -> Result<(), Lsn> {
        let mut left = Vec::new();
        for (range, digest) in std::mem::take(&mut self.found) {
            match agrees(range, &digest) {
                Some(true) => {}
                Some(false) => return Err(range.start),
                None => left.push((range, digest)),
            }
        }
        self.found = left;
        Ok(())
    }

    /// The pieces that wait for nothing any more, in order.
    pub(super) fn released(&mut self) -> Vec<Piece> {
        let waiting = std::mem::take(&mut self.waiting);
        let (held, released): (Vec<_>, Vec<_>) = waiting
            .into_iter()
            .partition(|(_, checked)| self.is_in_the_way(checked.range()));
        self.waiting = held;
        if self.waiting.is_empty() {
            self.waiting_since = None;
        }
        released
    }

    /// How many bytes wait; of the segment at hand, which is in memory anyway.
    pub(super) fn held_bytes(&self) -> u64 {
        let held = self.waiting.iter();
        held.map(|(_, checked)| checked.range().len_bytes()).sum()
    }

    /// Whether pieces wait for more WAL from this server, and for nothing else.
    pub(super) fn waits_for_the_server(&self) -> bool {
        !self.is_asked && !self.waiting.is_empty()
    }

    /// The whole segment is stored: that shows whether others have it otherwise. What waited goes
    /// with it.
    pub(super) fn leave(&mut self) -> Vec<Piece> {
        let waiting = std::mem::take(&mut self.waiting);
        *self = Self::default();
        waiting
    }

    /// The end of what somebody has stored and this server does not send, said once.
    pub(super) fn suspicion(&mut self, now: Instant) -> Option<Lsn> {
        let since = self.waiting_since.filter(|_| !self.is_asked)?;
        if self.is_told || now.saturating_duration_since(since) < WAIT_MAX {
            return None;
        }
        self.is_told = true;
        self.found.iter().map(|(range, _)| range.end).max()
    }

    fn is_in_the_way(&self, range: WalRange) -> bool {
        let overlaps =
            |(other, _): &(WalRange, String)| other.start < range.end && range.start < other.end;
        self.is_asked || self.found.iter().any(overlaps)
    }
}

#[cfg(test)]
mod tests {
    use wal::{SegmentSize, TimelineId, Verifier, WalkerStart};

    use super::*;

    const START: u64 = 1 << 20;

    fn range(start: u64, end: u64) -> WalRange {
        WalRange::new(Lsn::new(START + start), Lsn::new(START + end))
    }

    fn timeline() -> TimelineId {
        TimelineId::new(1).unwrap()
    }

    fn size() -> SegmentSize {
        SegmentSize::from_bytes(START).unwrap()
    }

    fn piece(start: u64, end: u64) -> Piece {
        let range = range(start, end);
        let verifier = Verifier::new(WalkerStart {
            at: Lsn::new(START),
            segment_size: size(),
            major: None,
            timeline: timeline(),
            system_id: None,
            skip_to: None,
        });
        let bytes = vec![0; usize::try_from(range.len_bytes()).unwrap()];
        let segment = segment(range);
        let name = ObjectName::Piece { segment, range };
        (name, verifier.check(range, bytes))
    }

    fn segment(range: WalRange) -> SegmentName {
        SegmentName::of(timeline(), range.start, size())
    }

    fn ranges(pieces: &[Piece]) -> Vec<WalRange> {
        pieces.iter().map(|(_, checked)| checked.range()).collect()
    }

    /// Whoever offers a piece and is told what else is stored of its segment.
    fn looked(found: &[WalRange]) -> Others {
        let mut others = Others::default();
        let first = segment(range(0, 10));
        let (given, is_new) = others.admit(first, piece(0, 10), Instant::now());
        assert!(given.is_empty() && is_new, "stored before anybody looked");
        let found = found.iter().map(|range| (*range, "theirs".to_owned()));
        others.found(first, found.collect());
        others
    }

    #[test]
    fn the_first_piece_of_a_segment_waits_for_the_look_and_the_next_ones_for_nothing() {
        let mut others = looked(&[]);
        assert_eq!(ranges(&others.released()), [range(0, 10)]);
        let next = others.admit(segment(range(10, 20)), piece(10, 20), Instant::now());
        assert_eq!((ranges(&next.0), next.1), (vec![range(10, 20)], false));
        // the next segment is looked at again
        let second = range(START, START + 10);
        let next = others.admit(segment(second), piece(START, START + 10), Instant::now());
        assert_eq!((ranges(&next.0), next.1), (vec![], true));
    }

    /// Commits would be acknowledged that a restore does not find: it reads what the other one stored.
    #[test]
    fn a_piece_waits_until_what_it_overlaps_is_found_to_be_the_same() {
        let mut others = looked(&[range(5, 30), range(40, 50)]);
        others.compare(|_, _| None).unwrap();
        assert!(others.released().is_empty());
        let now = Instant::now();
        let next = others.admit(segment(range(10, 20)), piece(10, 20), now);
        assert!(next.0.is_empty());
        others
            .compare(|range, _| (range.end < Lsn::new(START + 40)).then_some(true))
            .unwrap();
        assert_eq!(ranges(&others.released()), [range(0, 10), range(10, 20)]);
        assert!(!others.waits_for_the_server());
        // what lies ahead is compared when it comes
        let next = others.admit(segment(range(20, 45)), piece(20, 45), now);
        assert!(next.0.is_empty());
        assert_eq!(
            (others.held_bytes(), others.waits_for_the_server()),
            (25, true)
        );
        let differs = others.compare(|_, _| Some(false));
        assert_eq!(differs, Err(Lsn::new(START + 40)));
    }

    #[test]
    fn what_waits_goes_with_its_segment() {
        let mut others = looked(&[range(0, START)]);
        assert!(others.released().is_empty());
        assert_eq!(ranges(&others.leave()), [range(0, 10)]);
        assert!(others.released().is_empty());
        // or with the first piece of the next one
        let mut others = looked(&[range(0, START)]);
        let second = range(START, START + 10);
        let (given, _) = others.admit(segment(second), piece(START, START + 10), Instant::now());
        assert_eq!(ranges(&given), [range(0, 10)]);
    }

    #[test]
    fn somebody_who_stays_ahead_is_said_once() {
        let mut others = looked(&[range(5, 30)]);
        let now = Instant::now();
        assert_eq!(others.suspicion(now), None);
        let later = now + WAIT_MAX;
        assert_eq!(others.suspicion(later), Some(Lsn::new(START + 30)));
        assert_eq!(others.suspicion(later), None);
    }
}
