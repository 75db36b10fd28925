//! The bytes that are written: small, and known from their position and their history.

use bytes::Bytes;
use wal::{Checked, Lsn, SegmentName, SegmentSize, TimelineId, Verifier, WalRange, WalkerStart};

use super::lots::Lots;
use crate::repository::layout::ObjectName;

/// Segments are cut short, so that thousands of schedules take seconds: the store does not mind.
pub(super) const SEGMENT: u64 = 4096;

/// The segment for which another server writes too, where one does.
pub(super) const CONTESTED: u64 = 3;

pub(super) fn size() -> SegmentSize {
    SegmentSize::from_bytes(1 << 20).unwrap()
}

pub(super) fn timeline(id: u32) -> TimelineId {
    TimelineId::new(id).unwrap()
}

pub(super) fn segment(number: u64) -> SegmentName {
    SegmentName::of(timeline(1), Lsn::new(number << 20), size())
}

pub(super) fn start_of(segment: SegmentName) -> Lsn {
    segment.start(size()).unwrap()
}

/// A segment's bytes in a history: no two histories have one byte in common.
pub(super) fn whole(segment: SegmentName, history: u8) -> Bytes {
    let mut lots = Lots::of(0, segment.to_string());
    let bytes = (0..SEGMENT / 8).flat_map(|_| {
        let word = lots.next();
        // half of it compresses
        let word = if word.is_multiple_of(2) { 0 } else { word };
        word.to_le_bytes()
    });
    bytes.map(|byte| byte ^ history).collect()
}

/// A stretch of a segment: `[from, to)` in bytes from its start.
pub(super) fn piece(number: u64, from: u64, to: u64) -> (ObjectName, WalRange) {
    let segment = segment(number);
    let start = start_of(segment);
    let range = WalRange::new(start.saturating_add(from), start.saturating_add(to));
    let name = if (from, to) == (0, SEGMENT) {
        ObjectName::Segment(segment)
    } else {
        ObjectName::Piece { segment, range }
    };
    (name, range)
}

/// Bytes as an encoder takes them. Nobody here asks whether they are WAL.
pub(super) fn checked(range: WalRange, plain: &Bytes) -> Checked<'static> {
    let start = WalkerStart {
        at: range.start,
        segment_size: size(),
        major: None,
        timeline: timeline(1),
        system_id: None,
        skip_to: None,
    };
    Verifier::new(start).check(range, plain.to_vec())
}
