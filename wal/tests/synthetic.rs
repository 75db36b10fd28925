//! A small encoder of the log, to have every shape of it that servers write rarely.

use wal::page::{CONTINUES_RECORD, HAS_LONG_HEADER, PAGE_BYTES};
use wal::{Lsn, Major, SegmentSize, TimelineId, WalkerStart};

pub(crate) const SYSTEM_ID: u64 = 7_000_000_000_000_000_001;

/// Writes records behind each other as `xloginsert.c` and `xlog.c` do.
pub(crate) struct Writer {
    pub(crate) major: Major,
    pub(crate) size: SegmentSize,
    pub(crate) timeline: u32,
    pub(crate) start: Lsn,
    pub(crate) bytes: Vec<u8>,
    /// Start and end of each record.
    pub(crate) records: Vec<(Lsn, Lsn)>,
    prev: u64,
    /// The flag of the next page, where a record was given up.
    overwrites: bool,
}

impl Writer {
    /// An empty log that begins with the second segment.
    pub(crate) fn new(major: Major, size: SegmentSize) -> Self {
        Self {
            major,
            size,
            timeline: 1,
            start: Lsn::new(size.bytes()),
            bytes: Vec::new(),
            records: Vec::new(),
            prev: size.bytes() - 8,
            overwrites: false,
        }
    }

    pub(crate) fn walker_start(&self) -> WalkerStart {
        WalkerStart {
            at: self.start,
            segment_size: self.size,
            major: None,
            timeline: TimelineId::new(self.timeline).unwrap(),
            system_id: Some(SYSTEM_ID),
            skip_to: None,
        }
    }

    pub(crate) fn at(&self) -> Lsn {
        self.start.saturating_add(self.bytes.len() as u64)
    }

    /// A record of this manager with these main data; returns where it starts.
    pub(crate) fn record(&mut self, rmgr: u8, info: u8, main_data: &[u8]) -> Lsn {
        let (start, record) = self.encode(rmgr, info, main_data);
        self.put(&record, record.len());
        self.records.push((start, self.at()));
        self.prev = start.as_u64();
        self.bytes.resize(self.bytes.len().next_multiple_of(8), 0);
        start
    }

    /// A record with these bytes behind its header, whatever they are.
    pub(crate) fn raw_record(&mut self, rmgr: u8, info: u8, parts: &[u8]) {
        let (start, record) = self.encode_parts(rmgr, info, parts);
        self.put(&record, record.len());
        self.records.push((start, self.at()));
    }

    /// A switch to the next segment, and the empty rest of this one.
    pub(crate) fn switch(&mut self) -> Lsn {
        let start = self.record(0, 0x40, &[]);
        let segment = usize::try_from(self.size.bytes()).unwrap();
        self.bytes
            .resize(self.bytes.len().next_multiple_of(segment), 0);
        start
    }

    /// The beginning of a record that a crash cut at the end of a page, and the record with which
    /// the server goes on.
    pub(crate) fn give_up(&mut self, main_bytes: usize) -> Lsn {
        let (start, record) = self.encode(10, 0, &vec![7; main_bytes]);
        let page_left = PAGE_BYTES - self.bytes.len() % PAGE_BYTES;
        self.put(&record, page_left);
        self.overwrites = true;
        let data = [start.as_u64().to_le_bytes(), [0; 8]].concat();
        self.record(0, 0xD0, &data);
        start
    }

    fn encode(&mut self, rmgr: u8, info: u8, main_data: &[u8]) -> (Lsn, Vec<u8>) {
        let mut parts = Vec::new();
        match u8::try_from(main_data.len()) {
            Ok(0) => {}
            Ok(length) => parts.extend([255, length]),
            Err(_) => {
                parts.push(254);
                parts.extend(u32::try_from(main_data.len()).unwrap().to_le_bytes());
            }
        }
        parts.extend(main_data);
        self.encode_parts(rmgr, info, &parts)
    }

    fn encode_parts(&mut self, rmgr: u8, info: u8, parts: &[u8]) -> (Lsn, Vec<u8>) {
        if self.bytes.len().is_multiple_of(PAGE_BYTES) {
            self.page(0);
        }
        let mut record = Vec::new();
        record.extend(u32::try_from(24 + parts.len()).unwrap().to_le_bytes());
        record.extend(9_u32.to_le_bytes());
        record.extend(self.prev.to_le_bytes());
        record.extend([info, rmgr, 0, 0]);
        let crc = crc32c::crc32c_append(crc32c::crc32c(parts), &record);
        record.extend(crc.to_le_bytes());
        record.extend(parts);
        (self.at(), record)
    }

    /// The first `upto` bytes of the record, with page headers between.
    fn put(&mut self, record: &[u8], upto: usize) {
        let mut done = 0;
        while done < upto.min(record.len()) {
            if self.bytes.len().is_multiple_of(PAGE_BYTES) {
                self.page(record.len() - done);
            }
            let room = PAGE_BYTES - self.bytes.len() % PAGE_BYTES;
            let count = room.min(upto - done).min(record.len() - done);
            self.bytes.extend(&record[done..done + count]);
            done += count;
        }
    }

    fn page(&mut self, remaining_bytes: usize) {
        let at = self.at();
        let long = self.size.offset_of(at) == 0;
        let mut flags = 0;
        if remaining_bytes > 0 {
            flags |= CONTINUES_RECORD;
        }
        if long {
            flags |= HAS_LONG_HEADER;
        }
        if std::mem::take(&mut self.overwrites) {
            flags |= if self.major == Major::V19 { 0x4 } else { 0x8 };
        }
        self.bytes.extend(self.major.page_magic().to_le_bytes());
        self.bytes.extend(flags.to_le_bytes());
        self.bytes.extend(self.timeline.to_le_bytes());
        self.bytes.extend(at.as_u64().to_le_bytes());
        self.bytes
            .extend(u32::try_from(remaining_bytes).unwrap().to_le_bytes());
        self.bytes.extend([0; 4]);
        if long {
            self.bytes.extend(SYSTEM_ID.to_le_bytes());
            self.bytes
                .extend(u32::try_from(self.size.bytes()).unwrap().to_le_bytes());
            self.bytes
                .extend(u32::try_from(PAGE_BYTES).unwrap().to_le_bytes());
        }
    }
}
