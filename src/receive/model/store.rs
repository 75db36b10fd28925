//! A model of the repository: objects by name, what they hold, and hints.

use std::collections::BTreeMap;

use wal::{Lsn, SegmentName, SegmentSize, TimelineHistory, TimelineId, WalRange};

use super::content::Content;
use crate::repository::catalog::Catalog;
use crate::repository::records::Tip;

/// The store holds other WAL of this stretch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Conflict(pub(super) WalRange);

/// Objects by timeline, start and end: a segment is what is as long as one.
#[derive(Debug, Clone)]
pub(super) struct Objects {
    size: SegmentSize,
    objects: BTreeMap<(TimelineId, Lsn, Lsn), Content>,
}

impl Objects {
    pub(super) fn new(size: SegmentSize) -> Self {
        Self {
            size,
            objects: BTreeMap::new(),
        }
    }

    /// Writes an object once; what overlaps with it must agree.
    pub(super) fn put(&mut self, timeline: TimelineId, content: Content) -> Result<(), Conflict> {
        let range = content.range();
        if let Some(other) = self.of(timeline).find(|other| !other.agrees_with(&content)) {
            return Err(Conflict(other.range()));
        }
        self.objects
            .insert((timeline, range.start, range.end), content);
        Ok(())
    }

    pub(super) fn remove(&mut self, timeline: TimelineId, range: WalRange) -> Option<Content> {
        self.objects.remove(&(timeline, range.start, range.end))
    }

    pub(super) fn of(&self, timeline: TimelineId) -> impl Iterator<Item = &Content> {
        let of_it =
            (timeline, Lsn::ZERO, Lsn::ZERO)..=(timeline, Lsn::new(u64::MAX), Lsn::new(u64::MAX));
        self.objects.range(of_it).map(|(_, content)| content)
    }

    /// Takes out everything, oldest timeline and lowest position first.
    pub(super) fn take_first(&mut self) -> Option<(TimelineId, Content)> {
        let ((timeline, ..), content) = self.objects.pop_first()?;
        Some((timeline, content))
    }

    pub(super) fn is_empty(&self) -> bool {
        self.objects.is_empty()
    }

    /// The pieces of the segment that begins at `start`.
    pub(super) fn pieces(&self, timeline: TimelineId, start: Lsn) -> Vec<WalRange> {
        let segment = self.size.range_of(start);
        let ranges = self.of(timeline).map(Content::range);
        ranges
            .filter(|range| segment.covers(*range) && *range != segment)
            .collect()
    }

    /// What is stored of a segment from its beginning on without a break.
    pub(super) fn assembled(&self, timeline: TimelineId, start: Lsn) -> Content {
        let segment = self.size.range_of(start);
        let nothing = WalRange { start, end: start };
        let mut found = Content::of(&[], nothing);
        for content in self.of(timeline) {
            let range = content.range();
            let follows = segment.covers(range) && range.start <= found.range().end;
            if follows && range.end > found.range().end {
                found = found.joined(content);
            }
        }
        found
    }

    /// The first position of `wanted` that is neither here nor in `besides`, or is something else.
    pub(super) fn lacks(
        &self,
        besides: Option<&Self>,
        timeline: TimelineId,
        wanted: &Content,
    ) -> Option<Lsn> {
        let mut at = wanted.range().start;
        while at < wanted.range().end {
            let all = self.of(timeline);
            let all = all.chain(besides.into_iter().flat_map(|more| more.of(timeline)));
            let end = all
                .filter(|content| content.range().contains(at))
                .filter(|content| content.agrees_with(wanted))
                .map(|content| content.range().end)
                .max();
            match end {
                Some(end) => at = end,
                None => return Some(at),
            }
        }
        None
    }

    /// As the repository would list it.
    pub(super) fn catalog(&self, tips: &BTreeMap<TimelineId, Lsn>) -> Catalog {
        let mut catalog = Catalog::default();
        for (timeline, start, end) in self.objects.keys().copied() {
            let wal = catalog.timelines.entry(timeline).or_default();
            let segment = SegmentName::of(timeline, start, self.size);
            let range = WalRange { start, end };
            if range == self.size.range_of(start) {
                wal.segments.insert(segment);
            } else {
                wal.pieces.entry(segment).or_default().insert(range);
            }
        }
        let tip = |(timeline, lsn): (&TimelineId, &Lsn)| {
            let tip = Tip {
                lsn: *lsn,
                confirmed_at: jiff::Timestamp::UNIX_EPOCH,
                moment: None,
            };
            (*timeline, tip)
        };
        catalog.tips = tips.iter().map(tip).collect();
        catalog
    }
}

/// The stretches of a branch between two positions, on the timelines that hold them.
pub(super) fn stretches(
    branch: &TimelineHistory,
    from: Lsn,
    to: Lsn,
) -> Vec<(TimelineId, WalRange)> {
    let whole = WalRange {
        start: from,
        end: to,
    };
    let parts = branch.parts();
    let of_part = parts.iter().filter_map(|part| {
        let range = WalRange {
            start: part.start,
            end: part.end.unwrap_or(Lsn::new(u64::MAX)),
        };
        Some((part.timeline, whole.intersection(range)?))
    });
    of_part.collect()
}
