//! Reads records along a branch, segment by segment, across the points where timelines fork.

use wal::{
    Lsn, Major, SegmentName, SegmentSize, TimelineHistory, TimelineId, WalDamage, Walk, Walker,
    WalkerStart,
};

use super::resolve::{Flow, Resolved, Resolver, Seen, Span, What};
use crate::error::{Error, Result};
use crate::repository::catalog::BranchEnd;
use crate::repository::layout::ObjectName;
use crate::repository::{Repository, blocking};

/// A stretch of a branch's WAL.
#[derive(Debug, Clone)]
pub(super) struct Stretch<'a> {
    pub(super) branch: &'a TimelineHistory,
    pub(super) size: SegmentSize,
    /// The first record wanted.
    pub(super) from: Lsn,
    /// Where what is stored without a break ends, at most.
    pub(super) end: BranchEnd,
}

/// Why a walk ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ended {
    /// The resolver had seen enough.
    Enough,
    /// At the end of the stretch.
    AtEnd,
    /// At bytes that are no WAL.
    Damaged(WalDamage),
}

/// What a walk came to.
#[derive(Debug)]
pub(super) struct Walked {
    pub(super) resolved: Resolved,
    pub(super) ended: Ended,
    /// Where the last whole record ends.
    pub(super) records_end: Lsn,
}

impl Stretch<'_> {
    /// The timeline whose copy of the segment at `start` is read: the newest that has one, as
    /// PostgreSQL does (`xlogrecovery.c`, `XLogFileReadAnyTLI`). It holds the bytes of the older ones up
    /// to the point where it left them.
    pub(super) fn timeline_of(&self, start: Lsn) -> TimelineId {
        segment_timeline(self.branch, start, self.end, self.size)
    }
}

/// As [`Stretch::timeline_of`].
pub(super) fn segment_timeline(
    branch: &TimelineHistory,
    start: Lsn,
    end: BranchEnd,
    size: SegmentSize,
) -> TimelineId {
    let parts = branch.parts();
    let segment_end = size.end_of(start);
    let reached = parts.iter().filter(|part| part.timeline <= end.timeline);
    reached
        .rev()
        .find(|part| part.start < segment_end)
        .map_or(end.timeline, |part| part.timeline)
}

/// Gives the records of `stretch` to `resolver`, as far as it wants them.
pub(super) async fn walk(
    repository: &Repository,
    stretch: &Stretch<'_>,
    resolver: Resolver,
) -> Result<Walked> {
    let size = stretch.size;
    let first = size.start_of(stretch.from);
    let mut state = State {
        walker: Walker::new(WalkerStart {
            at: first,
            segment_size: size,
            major: None,
            timeline: stretch.end.timeline,
            system_id: Some(repository.system_id()),
            skip_to: Some(stretch.from),
        }),
        resolver,
        ended: None,
    };
    let mut at = first;
    let mut bytes = read(repository, stretch, at).await?;
    while let Some(now) = bytes {
        let next = size.end_of(at);
        let is_last = next >= stretch.end.lsn;
        let (walked, read_ahead) = tokio::join!(
            blocking(move || state.take(&now, is_last)),
            read(repository, stretch, next)
        );
        state = walked;
        if state.ended.is_some() {
            break;
        }
        bytes = read_ahead?;
        at = next;
    }
    let records_end = state.walker.whole_records_end().unwrap_or(stretch.from);
    Ok(Walked {
        resolved: state.resolver.finish(),
        ended: state.ended.unwrap_or(Ended::AtEnd),
        records_end,
    })
}

struct State {
    walker: Walker,
    resolver: Resolver,
    ended: Option<Ended>,
}

impl State {
    fn take(mut self, bytes: &[u8], is_last: bool) -> Self {
        self.walker.push(bytes);
        self.ended = loop {
            match self.walker.next() {
                Ok(Walk::Record(record)) => {
                    let span = Span {
                        start: record.start,
                        end: record.end.align8(),
                    };
                    let Some(major) = self.walker.major() else {
                        continue;
                    };
                    let what = what_of(&record, major);
                    let seen = Seen {
                        span,
                        xid: record.header.xid,
                        what,
                    };
                    if self.resolver.take(&seen) == Flow::Stop {
                        break Some(Ended::Enough);
                    }
                }
                Ok(Walk::Overwritten { .. }) => {}
                Ok(Walk::NeedMore) => break None,
                Ok(Walk::End { .. }) if is_last => break Some(Ended::AtEnd),
                Ok(Walk::End { at }) => break Some(Ended::Damaged(WalDamage::Zeros { at })),
                Err(damage) => break Some(Ended::Damaged(damage)),
            }
        };
        self
    }
}

/// A record whose checksum is right and whose body cannot be read says nothing that we know of.
fn what_of(record: &wal::Record, major: Major) -> What {
    match record.body(major) {
        Ok(body) => What::of(body),
        Err(error) => {
            tracing::warn!("the record at {} cannot be read: {error}", record.start);
            What::Other
        }
    }
}

/// The bytes of the segment at `start`, as far as the stretch goes; `None` behind its end.
pub(super) async fn read(
    repository: &Repository,
    stretch: &Stretch<'_>,
    start: Lsn,
) -> Result<Option<Vec<u8>>> {
    if start >= stretch.end.lsn {
        return Ok(None);
    }
    let segment = SegmentName::of(stretch.timeline_of(start), start, stretch.size);
    let wanted = stretch
        .end
        .lsn
        .min(stretch.size.end_of(start))
        .bytes_since(start);
    let wanted = usize::try_from(wanted).unwrap_or(usize::MAX);
    let content = repository.segment_content(segment, stretch.size).await?;
    let mut bytes = content.map_or_else(Vec::new, |content| content.bytes);
    if bytes.len() < wanted {
        return Err(Error::failure(format!(
            "WAL that was listed a moment ago is gone: {}",
            repository.locate(&ObjectName::Segment(segment))
        ))
        .hint("if something is cleaning up there, wait for it; then try again"));
    }
    bytes.truncate(wanted);
    Ok(Some(bytes))
}
