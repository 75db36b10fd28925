//! Reads records for a resolver.

use wal::{Lsn, Major, Record};

use super::resolve::{Resolved, Resolver, Seen, Span, What};
use crate::error::Result;
use crate::repository::Repository;
use crate::repository::walk::{Ended, Flow, Stretch, TakeRecords};

/// What a walk came to.
#[derive(Debug)]
pub(super) struct Walked {
    pub(super) resolved: Resolved,
    pub(super) ended: Ended,
    /// Where the last whole record ends.
    pub(super) records_end: Lsn,
}

/// Gives the records of `stretch` to `resolver`, as far as it wants them.
pub(super) async fn walk(
    repository: &Repository,
    stretch: &Stretch<'_>,
    resolver: Resolver,
) -> Result<Walked> {
    let walked = crate::repository::walk::walk(repository, stretch, resolver).await?;
    Ok(Walked {
        resolved: walked.taker.finish(),
        ended: walked.ended,
        records_end: walked.records_end,
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
