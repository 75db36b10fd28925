//! Reads records for a resolver.

use wal::{Lsn, Major, Record, WalRange};

use super::resolve::{Resolved, Resolver, Seen, Span, What};
use crate::error::Result;
use crate::repository::Repository;
use crate::repository::index::Summaries;
use crate::repository::summary::SegmentSummary;
use crate::repository::walk::{Ended, Flow, Stretch, TakeRecords};

/// What a walk came to.
#[derive(Debug)]
pub(super) struct Walked {
    pub(super) resolved: Resolved,
    pub(super) ended: Ended,
    /// Where the last whole record ends.
    pub(super) records_end: Lsn,
    /// Segments that were not read, since their summaries said enough.
    pub(super) passed: Vec<WalRange>,
}

/// Gives the records of `stretch` to `resolver`, as far as it wants them and `known` does not say
/// enough.
pub(super) async fn walk(
    repository: &Repository,
    stretch: &Stretch<'_>,
    known: Option<&Summaries<'_>>,
    resolver: Resolver,
) -> Result<Walked> {
    let walked = crate::repository::walk::walk(repository, stretch, known, resolver).await?;
    Ok(Walked {
        resolved: walked.taker.finish(),
        ended: walked.ended,
        records_end: walked.records_end,
        passed: walked.passed,
    })
}

impl TakeRecords for Resolver {
    fn take(&mut self, record: &Record, major: Major) -> Flow {
        let span = Span {
            start: record.start,
            end: record.end.align8(),
        };
        let what = what_of(record, major);
        self.see(&Seen {
            span,
            xid: record.header.xid,
            what,
        })
    }

    fn passes(&self, summary: &SegmentSummary) -> bool {
        Self::passes(self, summary)
    }

    fn pass(&mut self, summary: &SegmentSummary) {
        Self::pass(self, summary);
    }
}

/// A record whose checksum is right and whose body cannot be read says nothing that we know of.
fn what_of(record: &Record, major: Major) -> What {
    match record.body(major) {
        Ok(body) => What::of(body),
        Err(error) => {
            tracing::warn!("the record at {} cannot be read: {error}", record.start);
            What::Other
        }
    }
}
