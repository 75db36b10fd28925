//! Segments that a resolver need not see: what their summaries say is all that it would take from
//! them.

use wal::Lsn;

use super::{CommitSeen, LOOK_AHEAD_BYTES, Point, Resolver, Span, Wanted};
use crate::repository::summary::{CommitRecord, RecordPlace, SegmentSummary};

impl Resolver {
    /// Whether the summary says all that is wanted of its segment, which comes next.
    pub(in crate::restore) fn passes(&self, summary: &SegmentSummary) -> bool {
        // places, databases and transactions are named in the records alone
        let is_plain = summary.tablespaces_made == 0
            && summary.databases_dropped == 0
            && summary.unreadable == 0
            && summary.minimal_at.is_none();
        let mut dropping = self.findings.dropping.iter();
        let ends_a_drop = dropping.any(|(_, xid, _)| concerns(summary, *xid));
        is_plain && !ends_a_drop && self.is_beside_the_end(summary) && self.decides_nothing(summary)
    }

    /// Whether the backup's end does not lie within.
    fn is_beside_the_end(&self, summary: &SegmentSummary) -> bool {
        summary.last.1 <= self.consistent_at || self.consistent_at <= summary.start
    }

    /// Whether the point is not within, nor anything that is told of it.
    fn decides_nothing(&self, summary: &SegmentSummary) -> bool {
        if let Some(point) = &self.point {
            let is_name = matches!(self.wanted, Wanted::Name { .. });
            return is_name
                && summary.restore_points == 0
                && (point.first_out.is_some() || is_far_behind(point, summary.start));
        }
        match &self.wanted {
            Wanted::Time { .. } => {
                let mut stamps = summary
                    .newest_commit
                    .into_iter()
                    .chain(summary.newest_prepared);
                !stamps.any(|time| self.is_out(time))
            }
            Wanted::Lsn { at, .. } => summary.end <= *at,
            Wanted::Xid { xid, .. } => !concerns(summary, *xid),
            Wanted::Name { .. } => summary.restore_points == 0,
            Wanted::Last => true,
        }
    }

    /// Takes a summary instead of the records of its segment.
    pub(in crate::restore) fn pass(&mut self, summary: &SegmentSummary) {
        let last = Some(Span::from(summary.last));
        self.last = last;
        if summary.last.1 <= self.consistent_at {
            self.last_of_backup = last;
        }
        let newer = |found: Option<RecordPlace>, known| found.map(Span::from).or(known);
        self.last_but_shutdown = newer(summary.last_but_shutdown, self.last_but_shutdown);
        self.last_kept = newer(summary.last_decision, self.last_kept);
        self.last_commit = summary
            .last_commit
            .map(CommitSeen::from)
            .or(self.last_commit);
        self.newest_stamp = self.newest_stamp.max(summary.newest_commit);
        if let Some(found) = summary.parameters {
            self.findings.parameters = self.findings.parameters.max(found);
        }
    }
}

/// Whether a transaction may have ended in a segment.
fn concerns(summary: &SegmentSummary, xid: u32) -> bool {
    summary
        .xids
        .is_some_and(|(least, greatest)| (least..=greatest).contains(&xid))
}

fn is_far_behind(point: &Point, start: Lsn) -> bool {
    start.bytes_since(point.boundary) > LOOK_AHEAD_BYTES
}

impl From<RecordPlace> for Span {
    fn from(place: RecordPlace) -> Self {
        Self {
            start: place.0,
            end: place.1,
        }
    }
}

impl From<CommitRecord> for CommitSeen {
    fn from(commit: CommitRecord) -> Self {
        Self {
            lsn: commit.lsn,
            xid: commit.xid,
            time: commit.time,
        }
    }
}
