//! What the records of a segment say, in few words: enough to know whether they have to be read.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use crate::body::{Body, TransactionEnd};
use crate::lsn::{Lsn, WalRange};
use crate::major::Major;
use crate::page::{LONG_HEADER_BYTES, PAGE_BYTES, SHORT_HEADER_BYTES};
use crate::record::{Record, rmgr};
use crate::segment::SegmentSize;
use crate::time::PgTime;

/// What the records say that end in one segment, from the first of them that was seen on.
///
/// A record that begins in a segment and ends in the next is the next one's: nobody can read it
/// before that is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary {
    /// From where the record before the first one ended, to where the record behind the last one
    /// begins, or its page; after a switch, the next segment. A segment before this one whose
    /// summary does not end where this one starts leaves records between the two unseen.
    pub covers: WalRange,
    /// The last record; its end is in steps of eight bytes.
    pub last: WalRange,
    /// The last record that is not a shutdown's checkpoint.
    pub last_but_shutdown: Option<WalRange>,
    /// Commits, of prepared transactions too.
    pub commits: u64,
    /// The first of them.
    pub first_commit: Option<CommitMark>,
    /// The last of them.
    pub last_commit: Option<CommitMark>,
    /// The latest stamp of any of them: stamps can run backwards.
    pub newest_commit: Option<PgTime>,
    /// Transactions that were rolled back, prepared ones too.
    pub aborts: u64,
    /// Transactions that were prepared.
    pub prepares: u64,
    /// The latest stamp of a preparation, or of the rolling back of a prepared transaction.
    pub newest_prepared: Option<PgTime>,
    /// The last commit, preparation, or rolling back of a prepared transaction.
    pub last_decision: Option<WalRange>,
    /// The least and the greatest number of a transaction or subtransaction that committed, was
    /// rolled back, or dropped a database here. Plain numbers: where they wrapped around, nearly all.
    pub xids: Option<(u32, u32)>,
    /// `pg_create_restore_point`.
    pub restore_points: u64,
    /// Checkpoints that finished.
    pub checkpoints: u64,
    /// Tablespaces that were made.
    pub tablespaces_made: u64,
    /// Databases whose files were removed.
    pub databases_dropped: u64,
    /// Relations whose files a commit or a rollback removed.
    pub relations_dropped: u64,
    /// Relations that were cut short.
    pub relations_truncated: u64,
    /// The largest of each setting that a server in recovery must not be below, where any was
    /// written.
    pub parameters: Option<Parameters>,
    /// The first record that says `wal_level=minimal`: recovery refuses to go on there.
    pub minimal_at: Option<Lsn>,
    /// Records of a known kind whose bytes do not say what such records say.
    pub unreadable: u64,
}

/// A commit's record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CommitMark {
    /// Where it stands; the end is in steps of eight bytes.
    pub range: WalRange,
    /// The transaction.
    pub xid: u32,
    /// Its stamp.
    pub time: PgTime,
}

/// Settings that a server in recovery must not be below (`xlog_internal.h`, `xl_parameter_change`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Parameters {
    /// `max_connections`.
    pub max_connections: i32,
    /// `max_worker_processes`.
    pub max_worker_processes: i32,
    /// `max_wal_senders`.
    pub max_wal_senders: i32,
    /// `max_prepared_transactions`.
    pub max_prepared_transactions: i32,
    /// `max_locks_per_transaction`.
    pub max_locks_per_transaction: i32,
}

impl Parameters {
    /// The larger of each.
    #[must_use]
    pub fn max(self, other: Self) -> Self {
        Self {
            max_connections: self.max_connections.max(other.max_connections),
            max_worker_processes: self.max_worker_processes.max(other.max_worker_processes),
            max_wal_senders: self.max_wal_senders.max(other.max_wal_senders),
            max_prepared_transactions: self
                .max_prepared_transactions
                .max(other.max_prepared_transactions),
            max_locks_per_transaction: self
                .max_locks_per_transaction
                .max(other.max_locks_per_transaction),
        }
    }

    /// Their names and values.
    pub fn list(self) -> [(&'static str, i32); 5] {
        [
            ("max_connections", self.max_connections),
            ("max_worker_processes", self.max_worker_processes),
            ("max_wal_senders", self.max_wal_senders),
            ("max_prepared_transactions", self.max_prepared_transactions),
            ("max_locks_per_transaction", self.max_locks_per_transaction),
        ]
    }
}

impl Summary {
    /// Of the first record that ends in its segment.
    fn beginning_with(record: &Record, size: SegmentSize) -> Self {
        let last = WalRange::new(record.start, record.end.align8());
        Self {
            covers: WalRange::new(end_before(record.start, size), record.next),
            last,
            last_but_shutdown: None,
            commits: 0,
            first_commit: None,
            last_commit: None,
            newest_commit: None,
            aborts: 0,
            prepares: 0,
            newest_prepared: None,
            last_decision: None,
            xids: None,
            restore_points: 0,
            checkpoints: 0,
            tablespaces_made: 0,
            databases_dropped: 0,
            relations_dropped: 0,
            relations_truncated: 0,
            parameters: None,
            minimal_at: None,
            unreadable: 0,
        }
    }

    /// Takes the next record.
    fn note(&mut self, record: &Record, major: Major) {
        let range = WalRange::new(record.start, record.end.align8());
        self.covers.end = record.next;
        self.last = range;
        let mut is_shutdown = false;
        if rmgr::has_bodies(record.header.rmgr) {
            match record.body(major) {
                Ok(body) => {
                    is_shutdown = matches!(body, Body::Checkpoint { shutdown: true, .. });
                    self.note_body(range, record.header.xid, &body);
                }
                Err(_) => count(&mut self.unreadable, 1),
            }
        }
        if !is_shutdown {
            self.last_but_shutdown = Some(range);
        }
    }

    fn note_body(&mut self, range: WalRange, xid: u32, body: &Body) {
        match body {
            Body::Commit(end) => {
                let commit = CommitMark {
                    range,
                    xid: end.xid,
                    time: end.time,
                };
                count(&mut self.commits, 1);
                self.first_commit.get_or_insert(commit);
                self.last_commit = Some(commit);
                self.newest_commit = self.newest_commit.max(Some(end.time));
                self.last_decision = Some(range);
                self.note_end(end);
            }
            Body::Abort(end) => {
                count(&mut self.aborts, 1);
                if end.prepared {
                    self.newest_prepared = self.newest_prepared.max(Some(end.time));
                    self.last_decision = Some(range);
                }
                self.note_end(end);
            }
            Body::Prepare { prepared_at, .. } => {
                count(&mut self.prepares, 1);
                self.newest_prepared = self.newest_prepared.max(Some(*prepared_at));
                self.last_decision = Some(range);
            }
            Body::RestorePoint { .. } => count(&mut self.restore_points, 1),
            Body::Checkpoint { .. } => count(&mut self.checkpoints, 1),
            Body::CreateTablespace { .. } => count(&mut self.tablespaces_made, 1),
            Body::DropDatabase { .. } => {
                count(&mut self.databases_dropped, 1);
                self.note_xid(xid);
            }
            Body::TruncateRelation { .. } => count(&mut self.relations_truncated, 1),
            Body::ParameterChange {
                max_connections,
                max_worker_processes,
                max_wal_senders,
                max_prepared_transactions,
                max_locks_per_transaction,
                wal_level,
            } => {
                let found = Parameters {
                    max_connections: *max_connections,
                    max_worker_processes: *max_worker_processes,
                    max_wal_senders: *max_wal_senders,
                    max_prepared_transactions: *max_prepared_transactions,
                    max_locks_per_transaction: *max_locks_per_transaction,
                };
                self.parameters = Some(self.parameters.map_or(found, |known| known.max(found)));
                if *wal_level == 0 {
                    self.minimal_at.get_or_insert(range.start);
                }
            }
            _ => {}
        }
    }

    fn note_end(&mut self, end: &TransactionEnd) {
        let drops = u64::try_from(end.drops.len()).unwrap_or(u64::MAX);
        count(&mut self.relations_dropped, drops);
        self.note_xid(end.xid);
        for xid in &end.subxacts {
            self.note_xid(*xid);
        }
    }

    fn note_xid(&mut self, xid: u32) {
        let (least, greatest) = self.xids.unwrap_or((xid, xid));
        self.xids = Some((least.min(xid), greatest.max(xid)));
    }
}

fn count(counter: &mut u64, more: u64) {
    *counter = counter.saturating_add(more);
}

/// Summaries of the newest segments of a stream.
#[derive(Debug)]
pub(crate) struct Summaries {
    size: SegmentSize,
    /// By where the segments begin, in order: what is noted belongs to the last one, or to the next.
    segments: VecDeque<(Lsn, Summary)>,
}

impl Summaries {
    pub(crate) const fn new(size: SegmentSize) -> Self {
        Self {
            size,
            segments: VecDeque::new(),
        }
    }

    /// Takes the next record.
    pub(crate) fn note(&mut self, record: &Record, major: Major) {
        let end = record.end.align8();
        let segment = self.size.start_of(end.saturating_sub(1));
        if let Some((last, summary)) = self.segments.back_mut()
            && *last == segment
        {
            return summary.note(record, major);
        }
        let mut summary = Summary::beginning_with(record, self.size);
        summary.note(record, major);
        self.segments.push_back((segment, summary));
    }

    /// Forgets the segments before `oldest`.
    pub(crate) fn forget_before(&mut self, oldest: Lsn) {
        while let Some((first, _)) = self.segments.front()
            && *first < oldest
        {
            self.segments.pop_front();
        }
    }

    /// Of the segment that `range` is; none where it is less, or where no record ends in it.
    pub(crate) fn of(&self, range: WalRange) -> Option<&Summary> {
        let is_segment = self.size.range_of(range.start) == range;
        let mut segments = self.segments.iter();
        segments
            .find(|(segment, _)| *segment == range.start)
            .map(|(_, summary)| summary)
            .filter(|_| is_segment && !range.is_empty())
    }
}

/// Where the record ended that stands before the one that starts at `start`: there, or at the
/// beginning of a page whose header stands between.
pub(crate) fn end_before(start: Lsn, size: SegmentSize) -> Lsn {
    let page_bytes = u64::try_from(PAGE_BYTES).unwrap_or(u64::MAX);
    let offset = start.as_u64() & page_bytes.saturating_sub(1);
    let page = start.saturating_sub(offset);
    let header = if size.offset_of(page) == 0 {
        LONG_HEADER_BYTES
    } else {
        SHORT_HEADER_BYTES
    };
    if u64::try_from(header) == Ok(offset) {
        page
    } else {
        start
    }
}
