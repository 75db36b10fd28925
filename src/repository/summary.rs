//! What a segment's records say, as its trailer has it.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use wal::{CommitMark, Lsn, Parameters, PgTime, Summary, WalRange};

use super::windows::timestamp;

/// Where a trailer has it, among the facts.
pub const SUMMARY_FACT: &str = "summary";

/// `"summary"` in a segment's trailer: what its records say, of those that end in it
/// ([`wal::Summary`]). What is zero or absent is not written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SegmentSummary {
    /// Where the record before the first one ended.
    pub start: Lsn,
    /// Where the record behind the last one begins, or its page; after a switch, the next segment.
    pub end: Lsn,
    /// The last record.
    pub last: RecordPlace,
    /// The last record that is no shutdown's checkpoint.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_but_shutdown: Option<RecordPlace>,
    /// Commits.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub commits: u64,
    /// The first of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_commit: Option<CommitRecord>,
    /// The last of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_commit: Option<CommitRecord>,
    /// The latest stamp of any of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub newest_commit: Option<Timestamp>,
    /// Transactions that were rolled back.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub aborts: u64,
    /// Transactions that were prepared.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub prepares: u64,
    /// The latest stamp of a preparation, or of the rolling back of a prepared transaction.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub newest_prepared: Option<Timestamp>,
    /// The last commit, preparation, or rolling back of a prepared transaction.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_decision: Option<RecordPlace>,
    /// The least and the greatest transaction, or subtransaction, that ended or dropped a database.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub xids: Option<(u32, u32)>,
    /// Named points.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub restore_points: u64,
    /// Checkpoints.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub checkpoints: u64,
    /// Tablespaces that were made.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub tablespaces_made: u64,
    /// Databases whose files were removed.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub databases_dropped: u64,
    /// Relations whose files a commit or a rollback removed.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub relations_dropped: u64,
    /// Relations that were cut short.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub relations_truncated: u64,
    /// The largest of each setting that a server in recovery must not be below.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parameters: Option<Parameters>,
    /// The first record that says `wal_level=minimal`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub minimal_at: Option<Lsn>,
    /// Records whose bytes do not say what such records say.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub unreadable: u64,
}

/// A record's first byte, and the byte after its last in steps of eight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecordPlace(pub Lsn, pub Lsn);

/// A commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommitRecord {
    /// Where its record begins.
    pub lsn: Lsn,
    /// The transaction.
    pub xid: u32,
    /// Its stamp.
    pub time: Timestamp,
}

impl From<&Summary> for SegmentSummary {
    fn from(summary: &Summary) -> Self {
        let moment = |time: Option<PgTime>| time.map(timestamp);
        let place = |range: WalRange| RecordPlace(range.start, range.end);
        Self {
            start: summary.covers.start,
            end: summary.covers.end,
            last: place(summary.last),
            last_but_shutdown: summary.last_but_shutdown.map(place),
            commits: summary.commits,
            first_commit: summary.first_commit.map(CommitRecord::from),
            last_commit: summary.last_commit.map(CommitRecord::from),
            newest_commit: moment(summary.newest_commit),
            aborts: summary.aborts,
            prepares: summary.prepares,
            newest_prepared: moment(summary.newest_prepared),
            last_decision: summary.last_decision.map(place),
            xids: summary.xids,
            restore_points: summary.restore_points,
            checkpoints: summary.checkpoints,
            tablespaces_made: summary.tablespaces_made,
            databases_dropped: summary.databases_dropped,
            relations_dropped: summary.relations_dropped,
            relations_truncated: summary.relations_truncated,
            parameters: summary.parameters,
            minimal_at: summary.minimal_at,
            unreadable: summary.unreadable,
        }
    }
}

impl From<CommitMark> for CommitRecord {
    fn from(commit: CommitMark) -> Self {
        Self {
            lsn: commit.range.start,
            xid: commit.xid,
            time: timestamp(commit.time),
        }
    }
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks so")]
fn is_zero(count: &u64) -> bool {
    *count == 0
}
