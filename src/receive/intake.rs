//! What has come of the segment at hand: compared with what is stored, verified, and kept until it
//! is stored. It waits for nothing, and is lent to another thread where there is much to verify.

use bytes::Bytes;
use wal::{
    Body, Checked, Lsn, Major, Record, SegmentSize, Segmenter, TimelineId, Verdict, Verifier,
    WalDamage, WalRange,
};

use super::known::Known;
use crate::error::Error;
use crate::repository::{buffers, digest, stretch};

/// What of a segment there is room for when its first bytes come: one part of so many.
const FIRST_ROOM: usize = 16;

/// The WAL of one connection, from the beginning of the segment at hand on.
#[derive(Debug)]
pub(super) struct Intake {
    size: SegmentSize,
    timeline: TimelineId,
    major: Option<Major>,
    verifier: Verifier,
    /// What was stored of the first segment before this connection.
    known: Known,
    segment: Vec<u8>,
    segment_start: Lsn,
    /// The last segment in which something could not be verified.
    unverified_segment: Option<Lsn>,
}

/// A stretch of one segment that was taken in.
#[derive(Debug)]
pub(super) struct Part {
    /// Its end.
    pub(super) end: Lsn,
    /// Whether its last record is a shutdown checkpoint, and nothing follows.
    pub(super) shutdown: bool,
    /// The segment, if this filled it.
    pub(super) full: Option<Checked<'static>>,
    /// What is wrong with it.
    pub(super) findings: Vec<Finding>,
}

/// WAL that is stored as it came, and that no restore can use.
#[derive(Debug, Clone, Copy)]
pub(super) struct Finding {
    /// From here on.
    pub(super) from: Lsn,
    /// Why.
    pub(super) reason: Unusable,
}

/// Why WAL cannot be used.
#[derive(Debug, Clone, Copy)]
pub(super) enum Unusable {
    /// It is damaged.
    Unverified(WalDamage),
    /// `wal_level=minimal` left changes out of it: recovery refuses to go on there.
    Minimal,
}

/// The server sends other bytes than those that are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "two histories: this server's WAL differs from what is stored at {at} on timeline {timeline}"
)]
pub(super) struct TwoHistories {
    /// The first byte that differs; of a stretch that is known by its digest, its start.
    pub(super) at: Lsn,
    /// On this timeline.
    pub(super) timeline: TimelineId,
}

impl From<TwoHistories> for Error {
    fn from(error: TwoHistories) -> Self {
        Self::damaged(error.to_string()).hint(
            "the server was set back, or another one stored here: give this one its own --cluster name \
             and take a backup",
        )
    }
}

impl Intake {
    /// Takes in what comes from `start`, a segment's beginning, of which `known` is stored.
    /// `verifier` has seen what comes before, or nothing.
    pub(super) fn new(
        start: Lsn,
        timeline: TimelineId,
        size: SegmentSize,
        major: Option<Major>,
        verifier: Verifier,
        known: Known,
    ) -> Self {
        Self {
            size,
            timeline,
            major,
            verifier,
            known,
            segment: Vec::new(),
            segment_start: start,
            unverified_segment: None,
        }
    }

    /// Takes in stretches that follow on what was taken in before.
    pub(super) fn take_all(&mut self, came: &[(Lsn, Bytes)]) -> Result<Vec<Part>, TwoHistories> {
        let mut parts: Vec<Part> = Vec::new();
        for (start, bytes) in came {
            for stretch in Segmenter::new(self.size).cut(*start, bytes) {
                let mut part = self.take(stretch.range, stretch.bytes)?;
                // within a segment only the end counts
                if let Some(before) = parts.pop_if(|before| before.full.is_none()) {
                    part.findings.splice(0..0, before.findings);
                }
                parts.push(part);
            }
        }
        Ok(parts)
    }

    /// A stretch of the segment at hand; `None` if it is not at hand.
    pub(super) fn stretch(&self, range: WalRange) -> Option<Checked<'static>> {
        let bytes = stretch(&self.segment, self.segment_start, range)?;
        Some(self.verifier.check(range, bytes.to_vec()))
    }

    /// Whether a stretch of the segment at hand has this digest; `None` if it is not at hand.
    pub(super) fn agrees(&self, range: WalRange, expected: &str) -> Option<bool> {
        let bytes = stretch(&self.segment, self.segment_start, range)?;
        Some(digest(bytes) == expected)
    }

    fn take(&mut self, range: WalRange, bytes: &[u8]) -> Result<Part, TwoHistories> {
        if let Some(at) = self.known.differs(self.segment_start, &self.segment, bytes) {
            let timeline = self.timeline;
            return Err(TwoHistories { at, timeline });
        }
        let records = self.verifier.push(bytes);
        let mut findings = self.minimal_wal(&records);
        self.make_room(bytes.len());
        self.segment.extend_from_slice(bytes);
        findings.extend(self.damage(range));
        let shutdown = records
            .last()
            .is_some_and(|last| self.ends_with_shutdown(last, range.end));
        let full = (self.size.start_of(range.end) == range.end).then(|| self.take_segment());
        Ok(Part {
            end: range.end,
            shutdown,
            full,
            findings,
        })
    }

    /// Makes room for more of the segment: little at first, since the segment before is held until it
    /// is stored, and one that is large is all that is to be held.
    fn make_room(&mut self, more: usize) {
        let needed = self.segment.len().saturating_add(more);
        if needed <= self.segment.capacity() {
            return;
        }
        let whole = usize::try_from(self.size.bytes()).unwrap_or(usize::MAX);
        let first = whole / FIRST_ROOM;
        let mut room = if needed <= first {
            Vec::with_capacity(first)
        } else {
            buffers::PLAIN.take(whole)
        };
        room.extend_from_slice(&self.segment);
        self.segment = room;
    }

    fn take_segment(&mut self) -> Checked<'static> {
        let range = self.size.range_of(self.segment_start);
        let plain = std::mem::take(&mut self.segment);
        self.segment_start = range.end;
        self.known = Known::nothing();
        self.verifier.check(range, plain)
    }

    fn damage(&mut self, range: WalRange) -> Option<Finding> {
        let Verdict::Unverified { from, reason } = self.verifier.verdict_for(range) else {
            return None;
        };
        let said = self.unverified_segment.replace(self.segment_start) == Some(self.segment_start);
        (!said).then_some(Finding {
            from,
            reason: Unusable::Unverified(reason),
        })
    }

    fn minimal_wal(&self, records: &[Record]) -> Vec<Finding> {
        let Some(major) = self.major else {
            return Vec::new();
        };
        let of_xlog = |record: &&Record| record.header.rmgr == wal::record::rmgr::XLOG;
        let minimal = |record: &&Record| {
            matches!(
                record.body(major),
                Ok(Body::ParameterChange { wal_level: 0, .. })
            )
        };
        let found = records.iter().filter(of_xlog).filter(minimal);
        let finding = |record: &Record| Finding {
            from: record.start,
            reason: Unusable::Minimal,
        };
        found.map(finding).collect()
    }

    fn ends_with_shutdown(&self, last: &Record, end: Lsn) -> bool {
        let checkpoint = self.major.and_then(|major| last.body(major).ok());
        last.next >= end && matches!(checkpoint, Some(Body::Checkpoint { shutdown: true, .. }))
    }
}

#[cfg(test)]
mod tests {
    use wal::WalkerStart;

    use super::*;

    const SEGMENT: usize = 1 << 20;
    const START: Lsn = Lsn::new(3 << 20);

    fn timeline() -> TimelineId {
        TimelineId::new(1).unwrap()
    }

    fn intake(known: Known) -> Intake {
        let size = SegmentSize::from_bytes(1 << 20).unwrap();
        let verifier = Verifier::new(WalkerStart {
            at: START,
            segment_size: size,
            major: None,
            timeline: timeline(),
            system_id: None,
            skip_to: None,
        });
        Intake::new(START, timeline(), size, None, verifier, known)
    }

    fn came(at: u64, bytes: Vec<u8>) -> (Lsn, Bytes) {
        (START.saturating_add(at), Bytes::from(bytes))
    }

    #[test]
    fn refuses_what_differs_from_what_is_stored() {
        // two histories would be mixed in one segment, and no restore could use it
        let mut intake = intake(Known::bytes(vec![7; 1000]));
        assert!(intake.take_all(&[came(0, vec![7; 400])]).is_ok());
        let mut other = vec![7; 600];
        other[599] = 8;
        let error = intake.take_all(&[came(400, other)]).unwrap_err();
        let at = START.saturating_add(999);
        let timeline = timeline();
        assert_eq!(error, TwoHistories { at, timeline });
    }

    #[test]
    fn gives_each_full_segment_and_compares_only_the_first() {
        let mut intake = intake(Known::bytes(vec![7; SEGMENT]));
        let mut bytes = vec![7; SEGMENT];
        bytes.extend(vec![9; SEGMENT + 10]);
        let parts = intake.take_all(&[came(0, bytes)]).unwrap();
        let full = |part: &Part| part.full.as_ref().map(Checked::range);
        let found: Vec<_> = parts.iter().map(|part| (part.end, full(part))).collect();
        let at = |segments: u64, more| START.saturating_add((segments << 20) + more);
        let expected = [
            (at(1, 0), Some(WalRange::new(at(0, 0), at(1, 0)))),
            (at(2, 0), Some(WalRange::new(at(1, 0), at(2, 0)))),
            (at(2, 10), None),
        ];
        assert_eq!(found, expected);
        let at_hand = WalRange::new(at(2, 3), at(2, 10));
        assert_eq!(
            intake.stretch(at_hand).map(|part| part.range()),
            Some(at_hand)
        );
        assert!(intake.stretch(WalRange::new(at(2, 3), at(2, 11))).is_none());
        assert!(intake.stretch(WalRange::new(at(1, 3), at(1, 10))).is_none());
    }
}
