//! Reads records along a branch, segment by segment, across the points where timelines fork, and
//! passes over segments of which a summary says all that is wanted.

use std::fmt;
use std::time::Duration;

use wal::{
    Body, Lsn, Major, Record, SegmentName, SegmentSize, TimelineHistory, TimelineId, WalDamage,
    WalRange, Walk, Walker, WalkerStart,
};

use tokio::time::Instant;

use super::catalog::BranchEnd;
use super::index::Summaries;
use super::layout::ObjectName;
use super::summary::SegmentSummary;
use super::{Readable, Repository, blocking};
use crate::error::{Error, Kind, Result, chain};

/// How often the log says how far a long walk has come.
const TOLD_INTERVAL: Duration = Duration::from_secs(10);

/// Takes the records of a walk in their order.
pub trait TakeRecords: Send + 'static {
    /// Takes the next record, and says whether more are wanted.
    fn take(&mut self, record: &Record, major: Major) -> Flow;

    /// Whether a summary says all that is wanted of its segment, which comes next.
    fn passes(&self, _summary: &SegmentSummary) -> bool {
        false
    }

    /// Takes the summary of the next segment instead of its records.
    fn pass(&mut self, _summary: &SegmentSummary) {}
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
    /// Segments that were not read, since their summaries say what is wanted; those that touch are one.
    pub passed: Vec<WalRange>,
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

/// Gives the records of `stretch` to `taker`, as far as it wants them. Segments of which `known` has
/// a summary that is enough for it are not read.
pub async fn walk<T: TakeRecords>(
    repository: &Repository,
    stretch: &Stretch<'_>,
    known: Option<&Summaries<'_>>,
    taker: T,
) -> Result<Walked<T>> {
    let size = stretch.size;
    let mut at = size.start_of(stretch.from);
    let mut state = State {
        start: WalkerStart {
            at,
            segment_size: size,
            major: None,
            timeline: stretch.end.timeline,
            system_id: Some(repository.system_id()),
            skip_to: None,
        },
        walker: None,
        taker,
        position: stretch.from,
        passed: Vec::new(),
        ended: None,
    };
    let mut read_ahead: Option<Content> = None;
    let mut told_at = Instant::now();
    while at < stretch.end.lsn && state.ended.is_none() {
        if told_at.elapsed() > TOLD_INTERVAL {
            told_at = Instant::now();
            tracing::info!("looking through WAL: at {at}, of up to {}", stretch.end.lsn);
        }
        if read_ahead.is_none()
            && let Some(summary) = summary_of(known, stretch, at).await?
            && state.passes(size.range_of(at), &summary)
        {
            state.pass(size.range_of(at), &summary);
            at = size.end_of(at);
            continue;
        }
        // a record that begins in a segment that was passed over is read with it
        at = state.begin(at);
        let segment = match read_ahead.take() {
            Some(segment) => Some(segment),
            None => read(repository, stretch, at).await?,
        };
        let Some(Content { bytes, damage }) = segment else {
            break;
        };
        let next = size.end_of(at);
        let is_last = next >= stretch.end.lsn && damage.is_none();
        let may_pass = match summary_of(known, stretch, next).await? {
            Some(summary) => state.taker.passes(&summary),
            None => false,
        };
        let read_next = async {
            if damage.is_some() || may_pass {
                return Ok(None);
            }
            read(repository, stretch, next).await
        };
        let (walked, next_read) =
            tokio::join!(blocking(move || state.take(&bytes, is_last)), read_next);
        state = walked;
        if state.ended.is_none() {
            state.ended = damage.map(Ended::Damaged);
        }
        if state.ended.is_none() {
            read_ahead = next_read?;
        }
        at = next;
    }
    Ok(Walked {
        taker: state.taker,
        ended: state.ended.unwrap_or(Ended::AtEnd),
        records_end: state.position,
        passed: state.passed,
    })
}

/// The summary of the segment at `start`, where it is known and the segment is wanted whole.
async fn summary_of(
    known: Option<&Summaries<'_>>,
    stretch: &Stretch<'_>,
    start: Lsn,
) -> Result<Option<SegmentSummary>> {
    let Some(known) = known.filter(|_| stretch.size.end_of(start) <= stretch.end.lsn) else {
        return Ok(None);
    };
    let segment = SegmentName::of(stretch.timeline_of(start), start, stretch.size);
    Ok(known.of(segment).await?)
}

struct State<T> {
    /// Where walkers start.
    start: WalkerStart,
    /// `None` where a summary was taken last, or nothing yet.
    walker: Option<Walker>,
    taker: T,
    /// Every record that ends here or before was taken, or wanted by nobody.
    position: Lsn,
    /// Segments that were passed over.
    passed: Vec<WalRange>,
    ended: Option<Ended>,
}

impl<T: TakeRecords> State<T> {
    /// Whether the next segment need not be read: nothing may lie between what was taken and what its
    /// summary covers.
    fn passes(&self, segment: WalRange, summary: &SegmentSummary) -> bool {
        summary.start == self.position
            && segment.start < summary.end
            && summary.end <= segment.end
            && self.taker.passes(summary)
    }

    fn pass(&mut self, segment: WalRange, summary: &SegmentSummary) {
        self.taker.pass(summary);
        self.position = summary.end;
        match self.passed.last_mut() {
            Some(last) if last.end == segment.start => last.end = segment.end,
            _ => self.passed.push(segment),
        }
        self.walker = None;
    }

    /// Makes ready to read the segment at `at`, or the one before where a record begins there of which
    /// nothing was read yet: the one to begin with.
    fn begin(&mut self, at: Lsn) -> Lsn {
        if self.walker.is_some() {
            return at;
        }
        let first = self.start.segment_size.start_of(self.position).min(at);
        if let Some(last) = self.passed.last_mut().filter(|last| last.end == at) {
            last.end = last.end.min(first);
        }
        self.walker = Some(Walker::new(WalkerStart {
            at: first,
            skip_to: Some(self.position),
            ..self.start
        }));
        first
    }

    fn take(mut self, bytes: &[u8], is_last: bool) -> Self {
        let Some(mut walker) = self.walker.take() else {
            return self;
        };
        walker.push(bytes);
        self.ended = loop {
            match walker.next() {
                Ok(Walk::Record(record)) => {
                    let Some(major) = walker.major() else {
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
        let end = walker.whole_records_end();
        self.position = end.map_or(self.position, |end| end.max(self.position));
        self.walker = Some(walker);
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
