//! Reads records along a branch, segment by segment, across the points where timelines fork.

use std::fmt;

use wal::{
    Body, Lsn, Major, Record, SegmentName, SegmentSize, TimelineHistory, TimelineId, WalDamage,
    Walk, Walker, WalkerStart,
};

use super::catalog::BranchEnd;
use super::layout::ObjectName;
use super::{Readable, Repository, blocking};
use crate::error::{Error, Kind, Result, chain};

/// Takes the records of a walk in their order.
pub trait TakeRecords: Send + 'static {
    /// Takes the next record, and says whether more are wanted.
    fn take(&mut self, record: &Record, major: Major) -> Flow;
}

/// Whether a walk goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flow {
    /// More records are wanted.
    Continue,
    /// What was looked for is found.
    Stop,
}

/// A stretch of a branch's WAL.
#[derive(Debug, Clone)]
pub struct Stretch<'a> {
    /// The branch.
    pub branch: &'a TimelineHistory,
    /// The size of its segments.
    pub size: SegmentSize,
    /// The first record wanted.
    pub from: Lsn,
    /// Where what is stored without a break ends, at most.
    pub end: BranchEnd,
}

/// Why a walk ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ended {
    /// What took the records had seen enough.
    Enough,
    /// At the end of the stretch.
    AtEnd,
    /// At bytes that are no WAL, or in an object that cannot be read.
    Damaged(Damage),
}

/// Where stored WAL cannot be used, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    /// The first position that cannot be used.
    pub at: Lsn,
    /// What is wrong there.
    pub reason: String,
}

impl From<WalDamage> for Damage {
    fn from(damage: WalDamage) -> Self {
        Self {
            at: damage.at(),
            reason: damage.to_string(),
        }
    }
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason)
    }
}

/// What a walk came to.
#[derive(Debug)]
pub struct Walked<T> {
    /// What took the records.
    pub taker: T,
    /// Why it ended.
    pub ended: Ended,
    /// Where the last whole record ends.
    pub records_end: Lsn,
}

impl Stretch<'_> {
    /// The timeline whose copy of the segment at `start` is read: the newest that has one, as
    /// PostgreSQL does (`xlogrecovery.c`, `XLogFileReadAnyTLI`). It holds the bytes of the older
    /// ones up to the point where it left them.
    pub fn timeline_of(&self, start: Lsn) -> TimelineId {
        segment_timeline(self.branch, start, self.end, self.size)
    }
}

/// As [`Stretch::timeline_of`].
pub fn segment_timeline(
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

/// Gives the records of `stretch` to `taker`, as far as it wants them.
pub async fn walk<T: TakeRecords>(
    repository: &Repository,
    stretch: &Stretch<'_>,
    taker: T,
) -> Result<Walked<T>> {
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
        taker,
        ended: None,
    };
    let mut at = first;
    let mut segment = read(repository, stretch, at).await?;
    while let Some(Content { bytes, damage }) = segment {
        let next = size.end_of(at);
        let is_last = next >= stretch.end.lsn && damage.is_none();
        let read_next = async {
            match damage {
                Some(_) => Ok(None),
                None => read(repository, stretch, next).await,
            }
        };
        let (walked, read_ahead) =
            tokio::join!(blocking(move || state.take(&bytes, is_last)), read_next);
        state = walked;
        if state.ended.is_none() {
            state.ended = damage.map(Ended::Damaged);
        }
        if state.ended.is_some() {
            break;
        }
        segment = read_ahead?;
        at = next;
    }
    let records_end = state.walker.whole_records_end().unwrap_or(stretch.from);
    Ok(Walked {
        taker: state.taker,
        ended: state.ended.unwrap_or(Ended::AtEnd),
        records_end,
    })
}

struct State<T> {
    walker: Walker,
    taker: T,
    ended: Option<Ended>,
}

impl<T: TakeRecords> State<T> {
    fn take(mut self, bytes: &[u8], is_last: bool) -> Self {
        self.walker.push(bytes);
        self.ended = loop {
            match self.walker.next() {
                Ok(Walk::Record(record)) => {
                    let Some(major) = self.walker.major() else {
                        continue;
                    };
                    if is_minimal(&record, major) {
                        let reason = "the server ran with wal_level=minimal, and left changes out";
                        break Some(Ended::Damaged(Damage {
                            at: record.start,
                            reason: format!("{reason}: lsn={}", record.start),
                        }));
                    }
                    if self.taker.take(&record, major) == Flow::Stop {
                        break Some(Ended::Enough);
                    }
                }
                Ok(Walk::Overwritten { .. }) => {}
                Ok(Walk::NeedMore) => break None,
                Ok(Walk::End { .. }) if is_last => break Some(Ended::AtEnd),
                Ok(Walk::End { at }) => break Some(Ended::Damaged(WalDamage::Zeros { at }.into())),
                Err(damage) => break Some(Ended::Damaged(damage.into())),
            }
        };
        self
    }
}

/// Whether recovery refuses to go on at a record (`xlog.c`, `CheckRequiredParameterValues`).
fn is_minimal(record: &Record, major: Major) -> bool {
    record.header.rmgr == wal::record::rmgr::XLOG
        && matches!(
            record.body(major),
            Ok(Body::ParameterChange { wal_level: 0, .. })
        )
}

/// What can be read of a segment, from its beginning on.
struct Content {
    bytes: Vec<u8>,
    /// What cannot, behind it.
    damage: Option<Damage>,
}

/// The segment at `start`, as far as the stretch goes; `None` behind its end. One damaged piece does
/// not take with it what stands before it.
async fn read(
    repository: &Repository,
    stretch: &Stretch<'_>,
    start: Lsn,
) -> Result<Option<Content>> {
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
    let readable = repository.readable_content(segment, stretch.size).await;
    let (mut bytes, reason) = match readable.map_err(Error::from) {
        Ok(Readable { content, damaged }) => {
            let damaged = damaged.into_iter().next();
            (content, damaged.map(|(_, error)| chain(&error)))
        }
        Err(error) if error.kind() == Kind::Damaged => {
            (Vec::new(), Some(error.message().to_owned()))
        }
        Err(error) => return Err(error),
    };
    let end = start.saturating_add(u64::try_from(bytes.len()).unwrap_or(u64::MAX));
    let damage = match reason {
        _ if bytes.len() >= wanted => None,
        Some(reason) => Some(Damage { at: end, reason }),
        None => {
            return Err(Error::failure(format!(
                "WAL that was listed a moment ago is gone: {}",
                repository.locate(&ObjectName::Segment(segment))
            ))
            .hint("if something is cleaning up there, wait for it; then try again"));
        }
    };
    bytes.truncate(wanted);
    Ok(Some(Content { bytes, damage }))
}
