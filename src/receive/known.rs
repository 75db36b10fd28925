//! What is stored of a segment before a connection sends it again.

use wal::{Lsn, SegmentName, SegmentSize, TimelineHistory, WalRange};

use super::resume::ResumeAt;
use crate::error::chain;
use crate::repository::layout::ObjectName;
use crate::repository::{Repository, RepositoryError, digest, first_difference};

/// What is stored of the segment at hand, from its beginning on without a break.
#[derive(Debug)]
pub(super) struct Known {
    own: Content,
    /// What the timelines that it came from hold of the same segment, up to where the branch left
    /// them: another server's past shows itself there.
    ancestors: Vec<Content>,
    /// What is damaged of the segment on its own timeline.
    damaged: Vec<ObjectName>,
}

impl Known {
    /// Nothing is stored.
    pub(super) fn nothing() -> Self {
        Self {
            own: Content::nothing(),
            ancestors: Vec::new(),
            damaged: Vec::new(),
        }
    }

    /// These bytes of its own timeline are stored.
    #[cfg(test)]
    pub(super) fn bytes(bytes: Vec<u8>) -> Self {
        Self {
            own: Content::Bytes(bytes),
            ancestors: Vec::new(),
            damaged: Vec::new(),
        }
    }

    /// What is stored of the segment that begins at `at.start`, on a branch, as far as it can be read.
    pub(super) async fn of(
        repository: &Repository,
        branch: &TimelineHistory,
        at: ResumeAt,
        size: SegmentSize,
    ) -> Result<Self, RepositoryError> {
        let mut own = (Content::nothing(), Vec::new());
        if at.known > at.start {
            let segment = SegmentName::of(at.timeline, at.start, size);
            own = Content::of(repository, segment, size).await?;
        }
        let (own, damaged) = own;
        let mut ancestors = Vec::new();
        let parts = branch.parts().into_iter();
        for part in parts.take_while(|part| part.timeline != at.timeline) {
            let Some(fork) = part.end.filter(|fork| *fork > at.start) else {
                continue;
            };
            let segment = SegmentName::of(part.timeline, at.start, size);
            match Content::of(repository, segment, size).await {
                Ok((content, _damaged)) => ancestors.push(content.until(at.start, fork)),
                Err(error) if error.is_unreachable() => return Err(error),
                // the stream goes on: this server's WAL is none the worse for it
                Err(error) => tracing::warn!(
                    "what is stored of the timeline before is not compared: {}",
                    chain(&error)
                ),
            }
        }
        Ok(Self {
            own,
            ancestors,
            damaged,
        })
    }

    /// Whether the whole segment is stored, and cannot be read: nothing can be stored in its place.
    pub(super) fn is_lost(&self) -> bool {
        let mut damaged = self.damaged.iter();
        damaged.any(|name| matches!(name, ObjectName::Segment(_)))
    }

    /// Pieces that cannot be read: what they should hold is stored under other names.
    pub(super) fn damaged_pieces(&self) -> Vec<WalRange> {
        let ranges = self.damaged.iter().filter_map(|name| match name {
            ObjectName::Piece { range, .. } => Some(*range),
            _ => None,
        });
        ranges.collect()
    }

    /// Where what its own timeline holds ends, in a segment that begins at `start`.
    pub(super) fn end(&self, start: Lsn) -> Lsn {
        self.own.end(start)
    }

    /// Up to here WAL of a segment that begins at `start` is compared with something.
    pub(super) fn compared_until(&self, start: Lsn) -> Lsn {
        let all = self.ancestors.iter().chain([&self.own]);
        all.map(|content| content.end(start)).max().unwrap_or(start)
    }

    /// Where what overlaps the WAL before `end` ends, if only its digest is known and it lies on both
    /// sides of that.
    pub(super) fn needs(&self, end: Lsn) -> Option<Lsn> {
        let Content::Digests(stretches) = &self.own else {
            return None;
        };
        let across = stretches.iter().map(|(range, _)| *range);
        let across = across.filter(|range| range.start < end && end < range.end);
        across.map(|range| range.end).max()
    }

    /// Where the server's WAL is found to differ: `came` has come of the segment that begins at
    /// `start`, and `bytes` follow. Of a stretch, its start.
    pub(super) fn differs(&self, start: Lsn, came: &[u8], bytes: &[u8]) -> Option<Lsn> {
        let mut all = self.ancestors.iter().chain([&self.own]);
        all.find_map(|content| content.differs(start, came, bytes))
    }
}

/// What one timeline holds of a segment.
#[derive(Debug)]
enum Content {
    /// The bytes.
    Bytes(Vec<u8>),
    /// Stretches with the digests of their bytes, sorted: an archiver that cannot read what it
    /// stored before can still tell whether the server sends the same.
    Digests(Vec<(WalRange, String)>),
}

impl Content {
    fn nothing() -> Self {
        Self::Bytes(Vec::new())
    }

    /// What can be read, and what is damaged, which is said.
    async fn of(
        repository: &Repository,
        segment: SegmentName,
        size: SegmentSize,
    ) -> Result<(Self, Vec<ObjectName>), RepositoryError> {
        let (content, damaged) = match repository.readable_content(segment, size).await {
            Ok(readable) => (Self::Bytes(readable.content), readable.damaged),
            // what cannot be read is compared all the same: by the digests of what it should hold
            Err(error) if error.lacks_key() || error.is_damaged_key() => {
                let readable = repository.segment_digests(segment, size, Lsn::ZERO).await?;
                (Self::Digests(readable.content), readable.damaged)
            }
            Err(error) => return Err(error),
        };
        for (name, error) in &damaged {
            let what = match name {
                ObjectName::Segment(_) => "the stream goes on behind it",
                _ => "what it should hold is received again, where the server still has it",
            };
            tracing::error!(
                "stored WAL cannot be read, {what}: {}. hint: restore this object from a copy of the \
                 repository, or take a backup",
                chain(error)
            );
        }
        Ok((content, damaged.into_iter().map(|(name, _)| name).collect()))
    }

    /// What of it lies before `end`, in a segment that begins at `start`.
    fn until(mut self, start: Lsn, end: Lsn) -> Self {
        match &mut self {
            Self::Bytes(bytes) => {
                bytes.truncate(usize::try_from(end.bytes_since(start)).unwrap_or(usize::MAX));
            }
            Self::Digests(stretches) => stretches.retain(|(range, _)| range.end <= end),
        }
        self
    }

    /// Where it ends, in a segment that begins at `start`.
    fn end(&self, start: Lsn) -> Lsn {
        match self {
            Self::Bytes(bytes) => {
                start.saturating_add(u64::try_from(bytes.len()).unwrap_or(u64::MAX))
            }
            Self::Digests(stretches) => stretches.iter().fold(start, |end, (range, _)| {
                if range.start <= end {
                    end.max(range.end)
                } else {
                    end
                }
            }),
        }
    }

    /// Where the server's WAL is found to differ: `came` has come of the segment that begins at
    /// `start`, and `bytes` follow. Of a stretch, its start.
    fn differs(&self, start: Lsn, came: &[u8], bytes: &[u8]) -> Option<Lsn> {
        let offset = |lsn: Lsn| usize::try_from(lsn.bytes_since(start)).unwrap_or(usize::MAX);
        match self {
            Self::Bytes(known) => {
                let known = known.get(came.len()..).unwrap_or_default();
                let differs = first_difference(known, bytes)?;
                let at = came.len().saturating_add(differs);
                Some(start.saturating_add(u64::try_from(at).unwrap_or(u64::MAX)))
            }
            Self::Digests(stretches) => {
                let have = came.len().saturating_add(bytes.len());
                let differs = stretches.iter().find(|(range, stored)| {
                    let (from, to) = (offset(range.start), offset(range.end));
                    // each once, when its last byte comes
                    let ends_now = came.len() < to && to <= have;
                    ends_now && digest(&joined(came, bytes, from, to)) != *stored
                });
                differs.map(|(range, _)| range.start)
            }
        }
    }
}

/// The bytes `[from, to)` of `first` and `second` together.
fn joined(first: &[u8], second: &[u8], from: usize, to: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(to.saturating_sub(from));
    bytes.extend_from_slice(first.get(from..to.min(first.len())).unwrap_or_default());
    let within = |at: usize| at.saturating_sub(first.len());
    bytes.extend_from_slice(second.get(within(from)..within(to)).unwrap_or_default());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: Lsn = Lsn::new(1 << 24);

    fn digests(content: &[u8], stretches: &[(u64, u64)]) -> Content {
        let place = |at: u64| usize::try_from(at).unwrap();
        let stretch = |&(from, to): &(u64, u64)| {
            let range = WalRange {
                start: START.saturating_add(from),
                end: START.saturating_add(to),
            };
            (range, digest(&content[place(from)..place(to)]))
        };
        Content::Digests(stretches.iter().map(stretch).collect())
    }

    #[test]
    fn digests_tell_another_history_as_bytes_do() {
        // without the key, a server that was set back would mix two histories
        let content: Vec<u8> = (0..200_u8).collect();
        let mut other = content.clone();
        other[120] ^= 1;
        let known = digests(&content, &[(0, 100), (80, 150)]);
        assert_eq!(known.end(START), START.saturating_add(150));
        for cut in [0, 1, 80, 99, 120, 121, 149] {
            let (came, bytes) = content.split_at(cut);
            assert_eq!(known.differs(START, came, bytes), None, "{cut}");
            let (came, bytes) = other.split_at(cut);
            let found = known.differs(START, came, bytes);
            assert_eq!(found, Some(START.saturating_add(80)), "{cut}");
        }
        // what is not all there yet cannot be judged
        assert_eq!(known.differs(START, &[], &other[..149]), None);
        let bytes = Content::Bytes(content.clone());
        let (came, rest) = other.split_at(100);
        assert_eq!(
            bytes.differs(START, came, rest),
            Some(START.saturating_add(120))
        );
    }

    #[test]
    fn a_gap_between_digests_ends_what_is_known() {
        let known = digests(&[0; 200], &[(0, 50), (60, 100)]);
        assert_eq!(known.end(START), START.saturating_add(50));
    }

    #[test]
    fn a_digest_of_more_than_has_come_needs_the_rest() {
        // a backup would be complete with WAL that is another server's
        let content: Vec<u8> = (0..200_u8).collect();
        let known = Known {
            own: digests(&content, &[(0, 100), (80, 150), (150, 170)]),
            ancestors: Vec::new(),
            damaged: Vec::new(),
        };
        let at = |offset: u64| START.saturating_add(offset);
        let needs = |end: u64| known.needs(at(end));
        assert_eq!(needs(90), Some(at(150)));
        assert_eq!(needs(100), Some(at(150)));
        assert_eq!(needs(80), Some(at(100)));
        assert_eq!((needs(150), needs(180)), (None, None));
        assert_eq!(known.compared_until(START), at(170));
        assert_eq!(Known::bytes(content).needs(at(90)), None);
    }

    #[test]
    fn what_lies_behind_the_fork_is_not_compared() {
        let content: Vec<u8> = (0..200_u8).collect();
        let fork = START.saturating_add(120);
        let known = |ancestor: Content| Known {
            own: Content::nothing(),
            ancestors: vec![ancestor.until(START, fork)],
            damaged: Vec::new(),
        };
        let mut abandoned = content.clone();
        abandoned[120] ^= 1;
        let mut other = content.clone();
        other[119] ^= 1;
        let at_119 = START.saturating_add(119);
        let bytes = known(Content::Bytes(abandoned.clone()));
        assert_eq!(bytes.differs(START, &[], &content), None);
        assert_eq!(bytes.differs(START, &[], &other), Some(at_119));
        // nothing of its own is stored
        assert_eq!(bytes.end(START), START);
        let digests = known(digests(&abandoned, &[(0, 100), (100, 120), (100, 200)]));
        assert_eq!(digests.differs(START, &[], &content), None);
        let found = digests.differs(START, &[], &other);
        assert_eq!(found, Some(START.saturating_add(100)));
    }
}
