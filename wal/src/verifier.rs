//! Tells which bytes of the log can be trusted.
//!
//! An archive writes only [`Checked`] bytes, and only this module makes them: of a stream with a
//! [`Verifier`], of a whole file with [`verify_segment`].

use std::borrow::Cow;
use std::fmt;

use thiserror::Error;

use crate::damage::WalDamage;
use crate::lsn::{Lsn, WalRange};
use crate::major::Major;
use crate::marks::Marks;
use crate::name::SegmentName;
use crate::page::{LONG_HEADER_BYTES, PageHeader, SHORT_HEADER_BYTES};
use crate::record::Record;
use crate::segment::SegmentSize;
use crate::segmenter::Segmenter;
use crate::summary::{Summaries, Summary, end_before};
use crate::walker::{Walk, Walker, WalkerStart};

/// Bytes of the log with a verdict on them.
#[derive(Clone, PartialEq, Eq)]
pub struct Checked<'a> {
    range: WalRange,
    bytes: Cow<'a, [u8]>,
    verdict: Verdict,
    first_record: Option<Lsn>,
    last_record: Option<Lsn>,
    whole_records_end: Option<Lsn>,
    summary: Option<Box<Summary>>,
}

impl Checked<'static> {
    /// No bytes, at `at`.
    pub const fn nothing(at: Lsn) -> Self {
        Self {
            range: WalRange { start: at, end: at },
            bytes: Cow::Owned(Vec::new()),
            verdict: Verdict::Verified,
            first_record: None,
            last_record: None,
            whole_records_end: None,
            summary: None,
        }
    }
}

impl<'a> Checked<'a> {
    /// Where the bytes lie.
    pub const fn range(&self) -> WalRange {
        self.range
    }

    /// The bytes, as many as the range says.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The bytes, and no verdict any more.
    pub fn into_bytes(self) -> Cow<'a, [u8]> {
        self.bytes
    }

    /// Whether they can be trusted.
    pub const fn verdict(&self) -> Verdict {
        self.verdict
    }

    /// The start of the first trusted record that starts in the range.
    pub const fn first_record(&self) -> Option<Lsn> {
        self.first_record
    }

    /// The start of the last trusted record that starts in the range; it may end behind it.
    pub const fn last_record(&self) -> Option<Lsn> {
        self.last_record
    }

    /// The end, in steps of eight bytes, of the last trusted record that ends in the range.
    pub const fn whole_records_end(&self) -> Option<Lsn> {
        self.whole_records_end
    }

    /// What the records say that end in it, where it is a whole segment and verified.
    pub fn summary(&self) -> Option<&Summary> {
        self.summary.as_deref()
    }

    /// The same with bytes of its own.
    pub fn into_owned(self) -> Checked<'static> {
        let bytes = Cow::Owned(self.bytes.into_owned());
        Checked { bytes, ..self }
    }
}

/// Without the bytes, which can be a gigabyte.
impl fmt::Debug for Checked<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Checked")
            .field("range", &self.range)
            .field("verdict", &self.verdict)
            .field("first_record", &self.first_record)
            .field("last_record", &self.last_record)
            .field("whole_records_end", &self.whole_records_end)
            .finish_non_exhaustive()
    }
}

/// Whether bytes can be trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Every record that ends in the range is whole and has the right checksum, and nothing is
    /// wrong with the beginning of one that does not end in it, as far as it was seen.
    Verified,
    /// Not to be trusted from here on.
    Unverified {
        /// The first byte that is not trusted, in the range.
        from: Lsn,
        /// Why. It may name an earlier place, where the damage began.
        reason: WalDamage,
    },
}

impl Verdict {
    /// True for [`Self::Verified`].
    pub const fn is_verified(&self) -> bool {
        matches!(self, Self::Verified)
    }
}

/// Verifies a stream as it passes.
///
/// Behind damage nothing is trusted until the first record of a later segment that can be
/// followed again; the stream itself is never held up.
///
/// The bytes may be damaged or hostile: it never panics, and keeps what a [`Walker`] keeps, and
/// where records start in the last 256 MiB, or the last two segments if that is more.
#[derive(Debug)]
pub struct Verifier {
    start: WalkerStart,
    skip_to: Lsn,
    /// None behind damage, until the next segment.
    walker: Option<Walker>,
    seen: WalRange,
    marks: Marks,
    summaries: Summaries,
    doubts: Vec<Doubt>,
}

/// A stretch that is not trusted.
#[derive(Clone, Copy, Debug)]
struct Doubt {
    from: Lsn,
    /// None while it lasts.
    until: Option<Lsn>,
    reason: WalDamage,
    /// Where the log was whole up to before it.
    records_end: Option<Lsn>,
}

impl Verifier {
    /// Starts where `start` says. All records are returned that start at or after
    /// `start.skip_to`.
    pub fn new(start: WalkerStart) -> Self {
        let skip_to = start.skip_to.unwrap_or(Lsn::ZERO);
        // where all records start is remembered, reported or not
        let start = WalkerStart {
            skip_to: None,
            ..start
        };
        Self {
            start,
            skip_to,
            walker: Some(Walker::new(start)),
            seen: WalRange::new(start.at, start.at),
            marks: Marks::new(start.segment_size),
            summaries: Summaries::new(start.segment_size),
            doubts: Vec::new(),
        }
    }

    /// Takes bytes that follow on those pushed before, and returns the records that they
    /// complete.
    pub fn push(&mut self, bytes: &[u8]) -> Vec<Record> {
        let mut records = Vec::new();
        for stretch in Segmenter::new(self.start.segment_size).cut(self.seen.end, bytes) {
            let oldest = self.marks.enter(stretch.range.start);
            self.summaries.forget_before(oldest);
            self.seen = WalRange::new(self.seen.start.max(oldest), stretch.range.end);
            let begins_segment = stretch.range.start == stretch.segment_start;
            if self.walker.is_none() && begins_segment {
                let at = stretch.segment_start;
                self.walker = Some(Walker::new(WalkerStart { at, ..self.start }));
            }
            self.walk(stretch.bytes, &mut records);
        }
        self.doubts
            .retain(|doubt| doubt.until.is_none_or(|until| until > self.seen.start));
        records
    }

    /// The byte after the last one pushed.
    pub const fn position(&self) -> Lsn {
        self.seen.end
    }

    /// The version of the server, once known.
    pub fn major(&self) -> Option<Major> {
        self.walker
            .as_ref()
            .and_then(Walker::major)
            .or(self.start.major)
    }

    /// The damage behind which nothing is trusted now.
    pub fn damage(&self) -> Option<WalDamage> {
        self.doubts
            .iter()
            .find(|doubt| doubt.until.is_none())
            .map(|doubt| doubt.reason)
    }

    /// Where the log that was pushed is whole up to, see [`Walker::whole_records_end`]; none
    /// behind damage.
    pub fn whole_records_end(&self) -> Option<Lsn> {
        self.walker.as_ref().and_then(Walker::whole_records_end)
    }

    /// Whether the bytes of `range`, pushed before, can be trusted. What was not pushed, or so
    /// long ago that it is forgotten, is not.
    pub fn verdict_for(&self, range: WalRange) -> Verdict {
        let outside = if range.start < self.seen.start {
            Some(range.start)
        } else {
            (range.end > self.seen.end).then(|| range.start.max(self.seen.end))
        };
        let unseen = outside.map(|from| (from, WalDamage::NotSeen { at: from }));
        let doubted = self.doubts.iter().filter_map(|doubt| {
            let until = doubt.until.unwrap_or(Lsn::new(u64::MAX));
            let both = WalRange::new(doubt.from, until).intersection(range)?;
            Some((both.start, doubt.reason))
        });
        match doubted.chain(unseen).min_by_key(|(from, _)| *from) {
            Some((from, reason)) => Verdict::Unverified { from, reason },
            None => Verdict::Verified,
        }
    }

    /// The verdict on `bytes`, which lie in `range` and are those that were pushed. If they are
    /// not as many as the range says, none is trusted.
    pub fn check<'a>(&self, range: WalRange, bytes: impl Into<Cow<'a, [u8]>>) -> Checked<'a> {
        let bytes = bytes.into();
        let verdict = if u64::try_from(bytes.len()) == Ok(range.len_bytes()) {
            self.verdict_for(range)
        } else {
            let at = range.start;
            Verdict::Unverified {
                from: at,
                reason: WalDamage::NotSeen { at },
            }
        };
        let trusted = match verdict {
            Verdict::Verified => range,
            Verdict::Unverified { from, .. } => WalRange::new(range.start, from),
        };
        Checked {
            range,
            bytes,
            verdict,
            first_record: self.marks.first_in(trusted),
            last_record: self.marks.last_in(trusted),
            whole_records_end: self.records_end_in(trusted),
            summary: self.summaries.of(trusted).cloned().map(Box::new),
        }
    }

    fn walk(&mut self, bytes: &[u8], records: &mut Vec<Record>) {
        let Some(walker) = self.walker.as_mut() else {
            return;
        };
        walker.push(bytes);
        let reason = loop {
            match walker.next() {
                Ok(Walk::Record(record)) => {
                    self.marks.mark(record.start);
                    if let Some(major) = walker.major() {
                        self.summaries.note(&record, major);
                    }
                    if record.start >= self.skip_to {
                        records.push(record);
                    }
                }
                Ok(Walk::Overwritten { .. }) => {}
                Ok(Walk::NeedMore) => break None,
                Ok(Walk::End { at }) => break Some(WalDamage::Zeros { at }),
                Err(damage) => break Some(damage),
            }
        };
        let open = self.doubts.iter_mut().find(|doubt| doubt.until.is_none());
        if let (Some(doubt), Some(first)) = (open, walker.first_record()) {
            // the rest of a record whose beginning is not trusted is not trusted either
            let clean = walker.skipped_bytes() == 0;
            let segment = self.start.segment_size.start_of(first);
            doubt.until = Some(if clean { segment } else { first });
        }
        if let Some(reason) = reason {
            let records_end = walker.whole_records_end();
            self.walker = None;
            if self.damage().is_none() {
                let from = reason.at();
                self.doubts.push(Doubt {
                    from,
                    until: None,
                    reason,
                    records_end,
                });
            }
        }
    }

    /// The end of the last record that ends in `range`.
    fn records_end_in(&self, range: WalRange) -> Option<Lsn> {
        let before_damage = self.doubts.iter().filter_map(|doubt| doubt.records_end);
        let known = before_damage
            .chain(self.whole_records_end())
            .chain(self.followed_end(range));
        known
            .filter(|end| range.start < *end && *end <= range.end)
            .max()
    }

    /// The same, told by where the next record starts.
    fn followed_end(&self, range: WalRange) -> Option<Lsn> {
        // a record that starts right behind a page header follows one that ended before it
        let beyond = u64::try_from(LONG_HEADER_BYTES)
            .unwrap_or(0)
            .saturating_add(1);
        let mut starts = WalRange::new(range.start, range.end.saturating_add(beyond));
        while let Some(start) = self.marks.last_in(starts) {
            let end = end_before(start, self.start.segment_size);
            if end <= range.end {
                return Some(end);
            }
            starts = WalRange::new(range.start, start);
        }
        None
    }
}

/// What a whole segment file is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SegmentReport<'a> {
    /// The bytes that are to be kept: all of the file; only up to the end of its records where
    /// [`Completeness::EndsAt`] says so, which can be none.
    pub checked: Checked<'a>,
    /// Whether the file is all that there will ever be of the segment.
    pub completeness: Completeness,
}

/// Whether a segment file is all that there will ever be of its segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Completeness {
    /// The records run to the last byte, or beyond into the next segment. Of a record that runs
    /// beyond only the page headers are known to be right: its checksum stands in the next
    /// segment. A file that was cut inside its last page, amid such a record, looks the same.
    Complete,
    /// The records end with a switch to the next segment, and nothing but empty pages follows.
    Switched {
        /// Where the record of the switch starts.
        at: Lsn,
    },
    /// The records end here, and zeros, a cut record, or pages of an earlier use of the file
    /// follow. It is a beginning of the segment, whatever its name says.
    EndsAt(Lsn),
    /// Cannot be said: the records could not be followed to the end, see the verdict.
    Unknown,
}

/// The file is not the segment that it is named as.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum SegmentError {
    /// No segment of this size has this name.
    #[error("no segment of this size has the name: name={name}, segment_bytes={segment_bytes}")]
    Name {
        /// The name.
        name: SegmentName,
        /// The size of the cluster's segments.
        segment_bytes: u64,
    },
    /// The file is longer or shorter than a segment.
    #[error("file is not as long as a segment: name={name}, expected={expected}, found={found}")]
    Length {
        /// The name.
        name: SegmentName,
        /// Bytes of a segment.
        expected: u64,
        /// Bytes of the file.
        found: u64,
    },
    /// It is another system's.
    #[error("segment of another system: name={name}, expected={expected}, found={found}")]
    System {
        /// The name.
        name: SegmentName,
        /// The system identifier that was expected.
        expected: u64,
        /// The file's.
        found: u64,
    },
    /// It says that its cluster's segments have another size.
    #[error("segment of another segment size: name={name}, expected={expected}, found={found}")]
    Size {
        /// The name.
        name: SegmentName,
        /// Bytes that were expected.
        expected: u64,
        /// Bytes that the file says.
        found: u64,
    },
}

/// Follows the records of a whole segment file. `on_record` gets each that starts and ends in it,
/// in order; one that crosses into another segment is seen only by a [`Walker`] over both.
///
/// A damaged segment is no error: it is kept, and not trusted. The bytes may be hostile: never
/// panics, keeps at most as much again.
pub fn verify_segment<'a>(
    name: SegmentName,
    size: SegmentSize,
    system_id: Option<u64>,
    bytes: impl Into<Cow<'a, [u8]>>,
    mut on_record: impl FnMut(&Record),
) -> Result<SegmentReport<'a>, SegmentError> {
    let bytes = bytes.into();
    let Some(range) = name.range(size) else {
        return Err(SegmentError::Name {
            name,
            segment_bytes: size.bytes(),
        });
    };
    let found = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
    if found != size.bytes() {
        return Err(SegmentError::Length {
            name,
            expected: size.bytes(),
            found,
        });
    }
    refuse_another_cluster(name, size, system_id, &bytes)?;

    let mut walker = Walker::new(WalkerStart {
        at: range.start,
        segment_size: size,
        major: None,
        timeline: name.timeline,
        system_id,
        skip_to: None,
    });
    let mut summaries = Summaries::new(size);
    let mut switched = None;
    let mut damaged = None;
    let mut ended = false;
    for chunk in bytes.chunks(CHUNK_BYTES) {
        walker.push(chunk);
        loop {
            match walker.next() {
                Ok(Walk::Record(record)) => {
                    switched = record.header.is_switch().then_some(record.start);
                    if let Some(major) = walker.major() {
                        summaries.note(&record, major);
                    }
                    on_record(&record);
                }
                Ok(Walk::Overwritten { .. }) => {}
                Ok(Walk::NeedMore) => break,
                Ok(Walk::End { .. }) => {
                    ended = true;
                    break;
                }
                Err(damage) => {
                    damaged = Some(damage);
                    break;
                }
            }
        }
        if ended || damaged.is_some() {
            break;
        }
    }
    if let Some(damage) = damaged.filter(|damage| is_mere_end(damage, &walker, range, &bytes)) {
        ended = true;
        // where nothing at all could be followed the damage has the word
        damaged = (damage.at() == range.start).then_some(damage);
    }

    let records_end = walker.whole_records_end().unwrap_or(range.start);
    let completeness = match (damaged, ended, switched) {
        (Some(_), ..) => Completeness::Unknown,
        (None, true, _) => Completeness::EndsAt(records_end),
        (None, false, Some(at)) => Completeness::Switched { at },
        (None, false, None) => Completeness::Complete,
    };
    let kept = match completeness {
        Completeness::EndsAt(end) => WalRange::new(range.start, end.min(range.end)),
        _ => range,
    };
    let verdict = match damaged {
        Some(reason) => Verdict::Unverified {
            from: reason.at(),
            reason,
        },
        None => Verdict::Verified,
    };
    let is_whole = verdict.is_verified() && kept == range;
    let checked = Checked {
        range: kept,
        bytes: shortened(
            bytes,
            usize::try_from(kept.len_bytes()).unwrap_or(usize::MAX),
        ),
        verdict,
        first_record: walker.first_record(),
        last_record: walker.last_record_start(),
        whole_records_end: walker.whole_records_end(),
        summary: summaries
            .of(kept)
            .filter(|_| is_whole)
            .cloned()
            .map(Box::new),
    };
    Ok(SegmentReport {
        checked,
        completeness,
    })
}

/// The walker copies what it is given; this bounds the copy.
const CHUNK_BYTES: usize = 256 << 10;

/// What the header of a known version says against this being a segment of the cluster.
fn refuse_another_cluster(
    name: SegmentName,
    size: SegmentSize,
    system_id: Option<u64>,
    bytes: &[u8],
) -> Result<(), SegmentError> {
    let Ok((
        PageHeader {
            magic,
            long: Some(long),
            ..
        },
        _,
    )) = PageHeader::parse(bytes)
    else {
        return Ok(());
    };
    if Major::from_page_magic(magic).is_none() {
        return Ok(());
    }
    if let Some(expected) = system_id.filter(|expected| *expected != long.system_id) {
        return Err(SegmentError::System {
            name,
            expected,
            found: long.system_id,
        });
    }
    let found = u64::from(long.segment_bytes);
    if found != size.bytes() {
        return Err(SegmentError::Size {
            name,
            expected: size.bytes(),
            found,
        });
    }
    Ok(())
}

/// True if the damage is what the end of the log looks like in a file that goes on: a page that
/// an earlier use of the file left, or a record or page header that was cut and filled up with
/// zeros to the end of the segment.
fn is_mere_end(damage: &WalDamage, walker: &Walker, segment: WalRange, bytes: &[u8]) -> bool {
    match damage {
        WalDamage::PageAddress { at, found } => *found < *at && *at != segment.start,
        WalDamage::AfterSwitch { .. } => false,
        _ => {
            let used = bytes
                .iter()
                .rposition(|byte| *byte != 0)
                .map_or(0, |last| last.saturating_add(1));
            let zeros_from = segment
                .start
                .saturating_add(u64::try_from(used).unwrap_or(u64::MAX));
            let header = u64::try_from(SHORT_HEADER_BYTES).unwrap_or(0);
            zeros_from < walker.position().max(damage.at().saturating_add(header))
                && zeros_from < segment.end
        }
    }
}

fn shortened(bytes: Cow<'_, [u8]>, length: usize) -> Cow<'_, [u8]> {
    match bytes {
        Cow::Borrowed(bytes) => Cow::Borrowed(bytes.get(..length).unwrap_or(bytes)),
        Cow::Owned(mut bytes) => {
            bytes.truncate(length);
            Cow::Owned(bytes)
        }
    }
}
