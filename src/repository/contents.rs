//! The bytes of a segment: of the whole one, or put together from its pieces.

use wal::{Lsn, SegmentName, SegmentSize, WalRange};

use super::layout::{ObjectName, pieces_prefix};
use super::member::pieces_among;
use super::{Repository, RepositoryError, Result, SegmentContent};

/// What can be read of something that is stored in several objects, and what cannot.
#[derive(Debug)]
pub struct Readable<T> {
    /// What can be read.
    pub content: T,
    /// The objects that are damaged, and how.
    pub damaged: Vec<(ObjectName, RepositoryError)>,
}

impl<T> Readable<T> {
    fn whole(content: T) -> Self {
        Self {
            content,
            damaged: Vec::new(),
        }
    }
}

impl Repository {
    /// The bytes of a segment, from the complete one or put together from its pieces; `None`
    /// where nothing from its beginning on is stored. A piece that is damaged is an error, unless
    /// others hold its bytes, or what stands before it reaches up to `until`.
    pub async fn segment_content(
        &self,
        segment: SegmentName,
        size: SegmentSize,
        until: Option<Lsn>,
    ) -> Result<Option<SegmentContent>> {
        // a piece that was listed may be gone when it is read: the segment has taken its place
        for _ in 0..3 {
            match self.fetch(&ObjectName::Segment(segment)).await {
                Ok(fetched) => {
                    return Ok(Some(SegmentContent {
                        bytes: fetched.plain,
                        complete: true,
                    }));
                }
                Err(error) if error.is_not_found() => {}
                Err(error) => return Err(error),
            }
            match self.assemble(segment, size).await {
                Ok(assembled) => return Self::covering(assembled, segment, size, until),
                Err(error) if error.is_not_found() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    /// What pieces hold, where others hold what the damaged ones should.
    fn covering(
        assembled: Readable<Vec<u8>>,
        segment: SegmentName,
        size: SegmentSize,
        until: Option<Lsn>,
    ) -> Result<Option<SegmentContent>> {
        let Readable { content, damaged } = assembled;
        let start = segment.start(size).unwrap_or(Lsn::ZERO);
        let end = start.saturating_add(u64::try_from(content.len()).unwrap_or(u64::MAX));
        for (name, error) in damaged {
            match name {
                ObjectName::Piece { range, .. } if range.end <= end => {
                    tracing::error!("read from other pieces instead: {error}");
                }
                _ if until.is_some_and(|until| until <= end) => {
                    tracing::warn!("not needed: {error}");
                }
                _ => return Err(error),
            }
        }
        let content = (!content.is_empty()).then_some(content);
        Ok(content.map(|bytes| SegmentContent {
            bytes,
            complete: false,
        }))
    }

    /// As [`Self::segment_content`], as far as what is stored can be read: what is damaged is named
    /// beside it, and what else it would have led to is left out.
    pub async fn readable_content(
        &self,
        segment: SegmentName,
        size: SegmentSize,
    ) -> Result<Readable<Vec<u8>>> {
        let name = ObjectName::Segment(segment);
        for _ in 0..3 {
            match self.fetch(&name).await {
                Ok(fetched) => return Ok(Readable::whole(fetched.plain)),
                Err(error) if error.is_not_found() => {}
                Err(error @ RepositoryError::Damaged { .. }) => {
                    return Ok(Readable {
                        content: Vec::new(),
                        damaged: vec![(name, error)],
                    });
                }
                Err(error) => return Err(error),
            }
            match self.assemble(segment, size).await {
                Err(error) if error.is_not_found() => {}
                assembled => return assembled,
            }
        }
        Ok(Readable::whole(Vec::new()))
    }

    /// As [`Self::readable_content`], without reading it: the stretches that are stored and end
    /// behind `beyond`, sorted, and the digests of their bytes. Needs no key.
    pub async fn segment_digests(
        &self,
        segment: SegmentName,
        size: SegmentSize,
        beyond: Lsn,
    ) -> Result<Readable<Vec<(WalRange, String)>>> {
        let mut digests = Readable::whole(Vec::new());
        let Some(start) = segment.start(size) else {
            return Ok(digests);
        };
        let mut stretches = vec![(ObjectName::Segment(segment), size.range_of(start))];
        for name in self.pieces_of(segment).await? {
            match name {
                ObjectName::Piece { range, .. } if range.end > beyond => {
                    stretches.push((name, range));
                }
                _ => {}
            }
        }
        for (name, range) in stretches {
            match self.trailer(&name).await {
                Ok(trailer) => digests.content.push((range, trailer.digest)),
                // it gave way to its segment
                Err(error) if error.is_not_found() => {}
                Err(error @ RepositoryError::Damaged { .. }) => {
                    digests.damaged.push((name, error));
                }
                Err(error) => return Err(error),
            }
        }
        Ok(digests)
    }

    pub(super) async fn pieces_of(&self, segment: SegmentName) -> Result<Vec<ObjectName>> {
        Ok(pieces_among(&self.list(&pieces_prefix(segment)).await?))
    }

    /// The bytes of a segment from its beginning on, from the pieces that can be read.
    async fn assemble(&self, segment: SegmentName, size: SegmentSize) -> Result<Readable<Vec<u8>>> {
        let mut readable = Readable::whole(Vec::new());
        let Some(start) = segment.start(size) else {
            return Ok(readable);
        };
        let bytes = &mut readable.content;
        // listed by path, so by start: each piece overlaps what is there, follows it, or is beyond
        for name in self.pieces_of(segment).await? {
            let ObjectName::Piece { range, .. } = &name else {
                continue;
            };
            let at = range.start.bytes_since(start);
            let have = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
            if at > have {
                break;
            }
            let piece = match self.piece(&name, *range, size).await {
                Err(error @ RepositoryError::Damaged { .. }) => {
                    readable.damaged.push((name, error));
                    continue;
                }
                piece => piece?,
            };
            let overlap = usize::try_from(have.saturating_sub(at)).unwrap_or(usize::MAX);
            let overlap = overlap.min(piece.len());
            let (known, new) = piece.split_at(overlap);
            let from = usize::try_from(at).unwrap_or(usize::MAX);
            let stored = bytes
                .get(from..from.saturating_add(overlap))
                .unwrap_or_default();
            if let Some(differs) = first_difference(known, stored) {
                return Err(RepositoryError::TwoHistories {
                    lsn: range
                        .start
                        .saturating_add(u64::try_from(differs).unwrap_or(u64::MAX)),
                    timeline: segment.timeline,
                    path: self.locate(&name),
                });
            }
            bytes.extend_from_slice(new);
        }
        Ok(readable)
    }

    /// The bytes of a piece.
    async fn piece(
        &self,
        name: &ObjectName,
        range: WalRange,
        size: SegmentSize,
    ) -> Result<Vec<u8>> {
        let piece = self.fetch(name).await?.plain;
        let of_segment = size.range_of(range.start).covers(range);
        if of_segment && u64::try_from(piece.len()).ok() == Some(range.len_bytes()) {
            return Ok(piece);
        }
        Err(RepositoryError::Damaged {
            path: self.locate(name),
            reason: format!("its name does not fit its length: {}", piece.len()),
        })
    }
}

/// Where two stretches of bytes that begin at the same place differ, as far as both reach.
pub(crate) fn first_difference(a: &[u8], b: &[u8]) -> Option<usize> {
    /// What is compared at once: whole stretches are far quicker to compare than their bytes.
    const BLOCK_BYTES: usize = 4096;

    let both = a.len().min(b.len());
    let (a, b) = (a.get(..both)?, b.get(..both)?);
    let mut blocks = a.chunks(BLOCK_BYTES).zip(b.chunks(BLOCK_BYTES));
    let (number, (a, b)) = (0_usize..).zip(&mut blocks).find(|(_, (a, b))| a != b)?;
    let within = a.iter().zip(b).position(|(a, b)| a != b)?;
    Some(number.saturating_mul(BLOCK_BYTES).saturating_add(within))
}

#[cfg(test)]
mod tests {
    use super::first_difference;

    #[test]
    fn finds_the_first_byte_that_differs() {
        let bytes: Vec<u8> = (0..=u8::MAX).cycle().take(10_000).collect();
        for at in [0, 1, 4095, 4096, 8191, 8192, 9999] {
            let mut other = bytes.clone();
            for changed in other.iter_mut().skip(at).step_by(7) {
                *changed ^= 1;
            }
            assert_eq!(first_difference(&bytes, &other), Some(at));
        }
    }

    #[test]
    fn compares_as_far_as_both_reach() {
        let bytes = vec![7; 5000];
        assert_eq!(first_difference(&bytes, &bytes), None);
        assert_eq!(first_difference(&bytes, bytes.get(..4097).unwrap()), None);
        assert_eq!(first_difference(&[], &bytes), None);
        assert_eq!(first_difference(&[7, 8], &[7]), None);
    }
}
