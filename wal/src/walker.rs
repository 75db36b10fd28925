//! Follows records through pages and segments.

use crate::damage::WalDamage;
use crate::lsn::Lsn;
use crate::major::Major;
use crate::page::{self, LONG_HEADER_BYTES, PAGE_BYTES, PageHeader, SHORT_HEADER_BYTES};
use crate::record::{self, HEADER_BYTES, LARGEST_BYTES, Record, RecordHeader};
use crate::segment::SegmentSize;
use crate::timeline::TimelineId;

/// Follows records through pages and segments, as bytes arrive, in pieces of any length.
///
/// [`Walker::push`] bytes that follow on, then ask [`Walker::next`] until it needs more. Every
/// page header, back link and checksum is looked at. Three ends are told apart: not enough yet
/// ([`Walk::NeedMore`]), an end ([`Walk::End`]: zeros where a record should start, as behind the
/// last record of a server's newest file), and damage ([`WalDamage`]). Once ended or damaged it
/// stays so, and further bytes are dropped.
///
/// The bytes may be damaged or hostile: it never panics, and keeps no more than was pushed since
/// it last needed more, and one record ([`LARGEST_BYTES`]).
#[derive(Debug)]
pub struct Walker {
    segment_size: SegmentSize,
    timeline: TimelineId,
    system_id: Option<u64>,
    major: Option<Major>,
    start: Lsn,
    skip_to: Lsn,
    /// The first byte that was not read yet.
    at: Lsn,
    /// Pushed and not read: `pending[read..]` starts at `at`.
    pending: Vec<u8>,
    read: usize,
    state: State,
    /// The beginning of the record in [`State::Record`].
    partial: Vec<u8>,
    last_page_timeline: u32,
    met_page: bool,
    given_up: Option<Lsn>,
    first_record: Option<Lsn>,
    last_record: Option<Lsn>,
    records_end: Option<Lsn>,
    skipped_bytes: u64,
    stopped: Option<Result<Lsn, WalDamage>>,
}

/// Where a walk starts and what it may expect.
#[derive(Clone, Copy, Debug)]
pub struct WalkerStart {
    /// The first byte that will be pushed: the start of a page, usually of a segment. What is
    /// left there of a record that began before is passed over. Any other position must be the
    /// start of a record.
    pub at: Lsn,
    /// The size of the cluster's segments.
    pub segment_size: SegmentSize,
    /// The version, if it is known beforehand; else the first page tells it. Needed where `at` is
    /// not the start of a page.
    pub major: Option<Major>,
    /// The timeline that is read. Pages of older ones stand in the segment in which it began.
    pub timeline: TimelineId,
    /// The system, if it is known.
    pub system_id: Option<u64>,
    /// The first record to report; those before are checked all the same.
    pub skip_to: Option<Lsn>,
}

/// What a walk came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Walk {
    /// A whole record.
    Record(Record),
    /// The record that starts here was never finished: the server crashed while writing it, and
    /// went on at the page `resumed_at`.
    Overwritten {
        /// The start of the record, where it was seen.
        start: Option<Lsn>,
        /// The page on which the log goes on.
        resumed_at: Lsn,
    },
    /// All that was pushed is in order as far as it goes; push what follows.
    NeedMore,
    /// Zeros stand where the log should go on.
    End {
        /// Where the next record would have started.
        at: Lsn,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// A record starts at the next multiple of eight.
    Between,
    /// In the record that starts here, whose length is known.
    Record { start: Lsn, total_bytes: usize },
    /// In the rest of a record that began before the walk.
    Rest { left_bytes: u64 },
    /// Behind a switch, up to the start of the next segment.
    Switched { until: Lsn },
}

/// How a page goes on with what was going on before it.
enum Joined {
    InOrder,
    /// A record was given up here; where it started is known if that was seen.
    GaveUp {
        start: Option<Lsn>,
    },
}

impl Walker {
    /// Starts where `start` says.
    pub fn new(start: WalkerStart) -> Self {
        Self {
            segment_size: start.segment_size,
            timeline: start.timeline,
            system_id: start.system_id,
            major: start.major,
            start: start.at,
            skip_to: start.skip_to.unwrap_or(Lsn::ZERO),
            at: start.at,
            pending: Vec::new(),
            read: 0,
            state: State::Between,
            partial: Vec::new(),
            last_page_timeline: 0,
            met_page: false,
            given_up: None,
            first_record: None,
            last_record: None,
            records_end: None,
            skipped_bytes: 0,
            stopped: None,
        }
    }

    /// Takes bytes that follow on those pushed before.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.stopped.is_some() {
            return;
        }
        self.pending.drain(..self.read);
        self.read = 0;
        self.pending.extend_from_slice(bytes);
    }

    /// The next record, or why there is none.
    #[expect(
        clippy::should_implement_trait,
        reason = "no iterator: after NeedMore it goes on"
    )]
    pub fn next(&mut self) -> Result<Walk, WalDamage> {
        match self.stopped {
            Some(Ok(at)) => return Ok(Walk::End { at }),
            Some(Err(damage)) => return Err(damage),
            None => {}
        }
        let walked = self.walk();
        match &walked {
            Ok(Walk::End { at }) => self.stop(Ok(*at)),
            Err(damage) => self.stop(Err(*damage)),
            Ok(_) => {}
        }
        walked
    }

    /// The records that can be had now: ends where more bytes are needed, at an end, and after
    /// damage. Records that were never finished are passed over.
    pub fn records(&mut self) -> impl Iterator<Item = Result<Record, WalDamage>> {
        let mut done = false;
        std::iter::from_fn(move || {
            while !done {
                match self.next() {
                    Ok(Walk::Record(record)) => return Some(Ok(record)),
                    Ok(Walk::Overwritten { .. }) => {}
                    Ok(Walk::NeedMore | Walk::End { .. }) => done = true,
                    Err(damage) => {
                        done = true;
                        return Some(Err(damage));
                    }
                }
            }
            None
        })
    }

    /// The byte after the last one pushed; where it ended or was damaged, the byte after the last
    /// one read.
    pub fn position(&self) -> Lsn {
        self.at
            .saturating_add(u64_of(self.pending.len().saturating_sub(self.read)))
    }

    /// The version, once known.
    pub const fn major(&self) -> Option<Major> {
        self.major
    }

    /// The start of the first record that was found whole.
    pub const fn first_record(&self) -> Option<Lsn> {
        self.first_record
    }

    /// The start of the last record that was found whole.
    pub const fn last_record_start(&self) -> Option<Lsn> {
        self.last_record
    }

    /// Where the log is whole up to: the end, in steps of eight bytes, of the last record that
    /// was found whole, and after a switch the end of its segment once that was seen to be zeros.
    /// The rest of a record that began before the walk counts, though its checksum is unknown.
    pub const fn whole_records_end(&self) -> Option<Lsn> {
        self.records_end
    }

    /// Bytes passed over at the start, page headers not counted: the rest of a record that began
    /// before.
    pub const fn skipped_bytes(&self) -> u64 {
        self.skipped_bytes
    }

    /// Where a record stands of which more is awaited, or the rest of one from before the walk.
    pub const fn unfinished_record(&self) -> Option<Lsn> {
        match self.state {
            State::Record { start, .. } => Some(start),
            State::Rest { .. } => Some(self.start),
            State::Between | State::Switched { .. } => None,
        }
    }

    /// The end of the segment whose rest a switch left empty, while it is being passed over.
    pub const fn switched_until(&self) -> Option<Lsn> {
        match self.state {
            State::Switched { until } => Some(until),
            _ => None,
        }
    }

    fn stop(&mut self, how: Result<Lsn, WalDamage>) {
        self.stopped = Some(how);
        self.pending = Vec::new();
        self.partial = Vec::new();
        self.read = 0;
    }

    fn walk(&mut self) -> Result<Walk, WalDamage> {
        loop {
            let step = if self.page_offset() == 0 {
                self.enter_page()?
            } else {
                self.go_on()?
            };
            if let Some(walk) = step {
                return Ok(walk);
            }
        }
    }

    // ------------------------------------------------------------------------------- pages

    fn enter_page(&mut self) -> Result<Option<Walk>, WalDamage> {
        let long = self.segment_size.offset_of(self.at) == 0;
        let header_bytes = if long {
            LONG_HEADER_BYTES
        } else {
            SHORT_HEADER_BYTES
        };
        let Some(bytes) = self.unread().get(..header_bytes) else {
            return Ok(Some(Walk::NeedMore));
        };
        let is_zero = is_zero(bytes);
        let parsed = PageHeader::parse(bytes).map(|(header, _)| header);
        if is_zero && matches!(self.state, State::Switched { .. }) {
            // servers clear the headers of pages that a switch leaves empty
            self.advance(header_bytes);
            return Ok(None);
        }
        if is_zero {
            return Ok(Some(Walk::End {
                at: self.unfinished_record().unwrap_or(self.at),
            }));
        }
        let Ok(header) = parsed else {
            // the long flag on a page that has no room for it
            return Err(WalDamage::HeaderKind {
                at: self.at,
                expected_long: long,
            });
        };
        let major = self.check_page(&header, long)?;
        let joined = self.join_page(&header, major)?;
        self.last_page_timeline = header.timeline;
        self.met_page = true;
        let resumed_at = self.at;
        self.advance(header_bytes);
        Ok(match joined {
            Joined::InOrder => None,
            Joined::GaveUp { start } => Some(Walk::Overwritten { start, resumed_at }),
        })
    }

    /// `xlogreader.c`, `XLogReaderValidatePageHeader`, in its order.
    fn check_page(&mut self, header: &PageHeader, long: bool) -> Result<Major, WalDamage> {
        let at = self.at;
        let found = Major::from_page_magic(header.magic);
        let major = match (self.major, found) {
            (None, Some(major)) => major,
            (Some(expected), Some(major)) if expected == major => major,
            (_, None) if !self.met_page => {
                return Err(WalDamage::UnknownMagic {
                    at,
                    found: header.magic,
                });
            }
            (expected, _) => {
                let expected = expected.map_or(0, Major::page_magic);
                return Err(WalDamage::PageMagic {
                    at,
                    expected,
                    found: header.magic,
                });
            }
        };
        if header.flags & !page::known_flags(major) != 0 {
            return Err(WalDamage::PageFlags {
                at,
                found: header.flags,
            });
        }
        if header.long.is_some() != long {
            return Err(WalDamage::HeaderKind {
                at,
                expected_long: long,
            });
        }
        if let Some(long) = header.long {
            let segment_bytes = u64::from(long.segment_bytes);
            if let Some(expected) = self.system_id.filter(|id| *id != long.system_id) {
                return Err(WalDamage::SystemId {
                    at,
                    expected,
                    found: long.system_id,
                });
            }
            if segment_bytes != self.segment_size.bytes() {
                let expected = self.segment_size.bytes();
                return Err(WalDamage::SegmentSize {
                    at,
                    expected,
                    found: segment_bytes,
                });
            }
            if usize::try_from(long.page_bytes) != Ok(PAGE_BYTES) {
                return Err(WalDamage::PageSize {
                    at,
                    found: long.page_bytes,
                });
            }
            self.system_id = Some(long.system_id);
        }
        if header.address != at {
            return Err(WalDamage::PageAddress {
                at,
                found: header.address,
            });
        }
        let (least, most) = (self.last_page_timeline.max(1), self.timeline.get());
        if !(least..=most).contains(&header.timeline) {
            return Err(WalDamage::PageTimeline {
                at,
                least,
                most,
                found: header.timeline,
            });
        }
        self.major = Some(major);
        Ok(major)
    }

    /// Brings together what was going on and what the page goes on with.
    fn join_page(&mut self, header: &PageHeader, major: Major) -> Result<Joined, WalDamage> {
        let at = self.at;
        let continued = if header.continues_record() {
            u64::from(header.remaining_bytes)
        } else {
            0
        };
        let overwrites = header.flags & page::overwrites_record(major) != 0;
        let expected = match self.state {
            State::Record { total_bytes, .. } => {
                u64_of(total_bytes.saturating_sub(self.partial.len()))
            }
            State::Rest { left_bytes } => left_bytes,
            State::Between if !self.met_page && continued != 0 => {
                self.state = State::Rest {
                    left_bytes: continued,
                };
                return Ok(Joined::InOrder);
            }
            State::Between | State::Switched { .. } => 0,
        };
        if overwrites && continued == 0 && expected != 0 {
            let start = match self.state {
                State::Record { start, .. } => Some(start),
                _ => None,
            };
            self.given_up = start;
            self.partial.clear();
            self.state = State::Between;
            return Ok(Joined::GaveUp { start });
        }
        if continued != expected {
            return Err(WalDamage::Continuation {
                at,
                expected,
                found: continued,
            });
        }
        Ok(Joined::InOrder)
    }

    // ----------------------------------------------------------------------------- records

    fn go_on(&mut self) -> Result<Option<Walk>, WalDamage> {
        match self.state {
            State::Between => self.begin_record(),
            State::Record { start, total_bytes } => self.fill_record(start, total_bytes),
            State::Rest { left_bytes } => Ok(self.pass_rest(left_bytes)),
            State::Switched { .. } => self.pass_empty(),
        }
    }

    /// At least eight bytes of a record's header stand on the page on which it starts.
    fn begin_record(&mut self) -> Result<Option<Walk>, WalDamage> {
        let padding = usize::try_from(self.at.align8().bytes_since(self.at)).unwrap_or(0);
        if padding != 0 {
            let available = padding.min(self.unread().len());
            self.advance(available);
            return Ok((available < padding).then_some(Walk::NeedMore));
        }
        let header_bytes = HEADER_BYTES.min(self.page_left());
        let Some(bytes) = self.unread().get(..header_bytes) else {
            return Ok(Some(Walk::NeedMore));
        };
        if is_zero(bytes) {
            return Ok(Some(Walk::End { at: self.at }));
        }
        let length = bytes.first_chunk().copied().map_or(0, u32::from_le_bytes);
        let total_bytes = usize::try_from(length).unwrap_or(usize::MAX);
        if total_bytes < HEADER_BYTES || length >= LARGEST_BYTES {
            return Err(WalDamage::RecordLength {
                at: self.at,
                found: length,
            });
        }
        let start = self.at;
        self.state = State::Record { start, total_bytes };
        if total_bytes <= self.page_left().min(self.unread().len()) {
            return self.take_record(start, total_bytes);
        }
        Ok(None)
    }

    /// A record that stands whole on its page, as most do: nothing needs to be copied.
    fn take_record(&mut self, start: Lsn, total_bytes: usize) -> Result<Option<Walk>, WalDamage> {
        let from = self.read;
        let place = from..from.saturating_add(total_bytes);
        self.advance(HEADER_BYTES);
        self.check_header(start, self.pending.get(place.clone()).unwrap_or(&[]))?;
        self.advance(total_bytes.saturating_sub(HEADER_BYTES));
        let (header, main_data) =
            self.check_record(start, self.pending.get(place).unwrap_or(&[]))?;
        self.finish_record(start, header, main_data)
    }

    fn fill_record(&mut self, start: Lsn, total_bytes: usize) -> Result<Option<Walk>, WalDamage> {
        let had = self.partial.len();
        // the header first: what it says is looked at before a gigabyte is awaited
        let goal = if had < HEADER_BYTES {
            HEADER_BYTES
        } else {
            total_bytes
        };
        let count = goal
            .saturating_sub(had)
            .min(self.page_left())
            .min(self.unread().len());
        let from = self.read;
        let bytes = self
            .pending
            .get(from..from.saturating_add(count))
            .unwrap_or(&[]);
        self.partial.extend_from_slice(bytes);
        self.advance(count);
        let have = self.partial.len();
        if had < HEADER_BYTES && have == HEADER_BYTES {
            self.check_header(start, &self.partial)?;
        }
        if have == total_bytes {
            let (header, main_data) = self.check_record(start, &self.partial)?;
            self.partial.clear();
            self.partial.shrink_to(PAGE_BYTES);
            return self.finish_record(start, header, main_data);
        }
        let waits = have < goal && self.page_offset() != 0;
        Ok(waits.then_some(Walk::NeedMore))
    }

    /// `xlogreader.c`, `ValidXLogRecordHeader`.
    fn check_header(&self, start: Lsn, record: &[u8]) -> Result<(), WalDamage> {
        let Ok((header, _)) = RecordHeader::parse(record) else {
            return Ok(());
        };
        match self.last_record {
            Some(expected) if header.prev != expected => Err(WalDamage::PrevLink {
                at: start,
                expected,
                found: header.prev,
            }),
            None if header.prev >= start => Err(WalDamage::PrevAhead {
                at: start,
                found: header.prev,
            }),
            _ => Ok(()),
        }
    }

    /// The header and the main data, where all is right with the whole `record`.
    fn check_record(
        &self,
        start: Lsn,
        record: &[u8],
    ) -> Result<(RecordHeader, Vec<u8>), WalDamage> {
        let layout = |why| WalDamage::RecordLayout { at: start, why };
        let (header, parts) = RecordHeader::parse(record).map_err(|short| layout(short.into()))?;
        let found = record::checksum(record).unwrap_or(0);
        if found != header.crc {
            return Err(WalDamage::RecordChecksum {
                at: start,
                expected: header.crc,
                found,
            });
        }
        let Some(major) = self.major else {
            // a walk from amid a page without a known version: nothing can be said
            return Err(WalDamage::UnknownMagic {
                at: start,
                found: 0,
            });
        };
        let main = record::main_data(parts, major).map_err(layout)?;
        let main_data = if record::rmgr::has_bodies(header.rmgr) {
            parts.get(main).unwrap_or(&[]).to_vec()
        } else {
            Vec::new()
        };
        Ok((header, main_data))
    }

    fn finish_record(
        &mut self,
        start: Lsn,
        header: RecordHeader,
        main_data: Vec<u8>,
    ) -> Result<Option<Walk>, WalDamage> {
        self.check_overwrite(start, &header, &main_data)?;

        let end = self.at;
        let aligned = end.align8();
        let next = if header.is_switch() {
            self.segment_end(aligned)
        } else {
            aligned
        };
        self.state = if next > aligned {
            State::Switched { until: next }
        } else {
            State::Between
        };
        self.first_record = self.first_record.or(Some(start));
        self.last_record = Some(start);
        self.records_end = Some(aligned);
        let reported = start >= self.skip_to;
        Ok(reported.then_some(Walk::Record(Record {
            start,
            end,
            next,
            header,
            main_data,
        })))
    }

    /// `xlogrecovery.c`, `VerifyOverwriteContrecord`: the record behind a given-up one names it.
    fn check_overwrite(
        &mut self,
        start: Lsn,
        header: &RecordHeader,
        main_data: &[u8],
    ) -> Result<(), WalDamage> {
        let Some(expected) = self.given_up.take() else {
            return Ok(());
        };
        let named = main_data
            .first_chunk()
            .copied()
            .map(u64::from_le_bytes)
            .map(Lsn::new);
        if !header.is_overwrite() || named != Some(expected) {
            return Err(WalDamage::NotOverwritten {
                at: start,
                expected,
            });
        }
        Ok(())
    }

    fn pass_rest(&mut self, left_bytes: u64) -> Option<Walk> {
        let left = usize::try_from(left_bytes).unwrap_or(usize::MAX);
        let count = left.min(self.page_left()).min(self.unread().len());
        self.advance(count);
        self.skipped_bytes = self.skipped_bytes.saturating_add(u64_of(count));
        let left_bytes = left_bytes.saturating_sub(u64_of(count));
        if left_bytes == 0 {
            self.state = State::Between;
            self.records_end = Some(self.at.align8());
            return None;
        }
        self.state = State::Rest { left_bytes };
        (self.page_offset() != 0).then_some(Walk::NeedMore)
    }

    fn pass_empty(&mut self) -> Result<Option<Walk>, WalDamage> {
        let count = self.page_left().min(self.unread().len());
        if !is_zero(self.unread().get(..count).unwrap_or(&[])) {
            return Err(WalDamage::AfterSwitch { at: self.at });
        }
        self.advance(count);
        let State::Switched { until } = self.state else {
            return Ok(None);
        };
        if self.at >= until {
            self.records_end = Some(until);
            self.state = State::Between;
        }
        Ok((count == 0).then_some(Walk::NeedMore))
    }

    // --------------------------------------------------------------------------- positions

    fn unread(&self) -> &[u8] {
        self.pending.get(self.read..).unwrap_or(&[])
    }

    fn advance(&mut self, count: usize) {
        self.read = self.read.saturating_add(count);
        self.at = self.at.saturating_add(u64_of(count));
    }

    fn page_offset(&self) -> u64 {
        self.at.as_u64() & u64_of(PAGE_BYTES).saturating_sub(1)
    }

    fn page_left(&self) -> usize {
        usize::try_from(u64_of(PAGE_BYTES).saturating_sub(self.page_offset())).unwrap_or(PAGE_BYTES)
    }

    /// The end of the segment in which a switch stands that ends at `end`; itself if it ends the
    /// segment.
    fn segment_end(&self, end: Lsn) -> Lsn {
        if self.segment_size.offset_of(end) == 0 {
            end
        } else {
            self.segment_size.end_of(end)
        }
    }
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|byte| *byte == 0)
}

fn u64_of(length: usize) -> u64 {
    u64::try_from(length).unwrap_or(u64::MAX)
}
