//! How much a store is asked, and what it answers: one count for each attempt at a request.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::fault::Fault;

/// The kind of a request, as services bill them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// An object is written.
    Put,
    /// A step of an upload in parts: begin, one part, complete, give up.
    Part,
    /// An object, or a range of one, is read.
    Get,
    /// An object is looked for.
    Head,
    /// Objects are listed. Counted once, though a service answers in pages of a thousand names.
    List,
    /// An object is deleted.
    Delete,
}

/// What came of an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It was done.
    Done,
    /// There is no such object, or nothing of it in the range.
    NotFound,
    /// There was one of this name already.
    Exists,
    /// No answer, or one that another attempt may better.
    Failed,
    /// An answer that no other attempt will better: rights, settings, a full disk.
    Refused,
}

/// What was asked of a store since it was opened.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Traffic {
    requests: [[u64; Outcome::ALL.len()]; Request::ALL.len()],
    /// Attempts that were made because an earlier one had failed.
    pub retries: u64,
    /// What was written and answered, in bytes as stored.
    pub written_bytes: u64,
    /// What was read, in bytes as stored.
    pub read_bytes: u64,
}

impl Request {
    /// Every value, in the order of the type.
    pub const ALL: [Self; 6] = [
        Self::Put,
        Self::Part,
        Self::Get,
        Self::Head,
        Self::List,
        Self::Delete,
    ];

    /// The word for it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Put => "put",
            Self::Part => "part",
            Self::Get => "get",
            Self::Head => "head",
            Self::List => "list",
            Self::Delete => "delete",
        }
    }
}

impl Outcome {
    /// Every value, in the order of the type.
    pub const ALL: [Self; 5] = [
        Self::Done,
        Self::NotFound,
        Self::Exists,
        Self::Failed,
        Self::Refused,
    ];

    /// The word for it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Done => "ok",
            Self::NotFound => "not_found",
            Self::Exists => "exists",
            Self::Failed => "failed",
            Self::Refused => "refused",
        }
    }

    fn of<T>(answer: &Result<T, Fault>) -> Self {
        match answer {
            Ok(_) => Self::Done,
            Err(Fault::NotFound | Fault::PastEnd) => Self::NotFound,
            Err(Fault::Exists) => Self::Exists,
            Err(Fault::Transient { .. }) => Self::Failed,
            Err(
                Fault::Denied { .. }
                | Fault::ClockSkew { .. }
                | Fault::WrongRegion { .. }
                | Fault::NoBucket { .. }
                | Fault::Full { .. }
                | Fault::Forbidden { .. }
                | Fault::Unsupported { .. }
                | Fault::Refused { .. },
            ) => Self::Refused,
        }
    }
}

impl Traffic {
    /// How often each kind of request had each outcome; those that never happened too.
    pub fn requests(&self) -> impl Iterator<Item = (Request, Outcome, u64)> {
        let rows = Request::ALL.into_iter().zip(self.requests);
        rows.flat_map(|(request, row)| {
            let cells = Outcome::ALL.into_iter().zip(row);
            cells.map(move |(outcome, count)| (request, outcome, count))
        })
    }
}

/// Counts as attempts are made. Clones count together.
#[derive(Debug, Clone, Default)]
pub(super) struct Meter {
    counts: Arc<Counts>,
}

#[derive(Debug, Default)]
struct Counts {
    requests: [[AtomicU64; Outcome::ALL.len()]; Request::ALL.len()],
    retries: AtomicU64,
    written_bytes: AtomicU64,
    read_bytes: AtomicU64,
}

impl Meter {
    /// Waits for one attempt, and counts it. One that is dropped is not counted.
    pub(super) async fn counted<T>(
        &self,
        request: Request,
        attempt: impl Future<Output = Result<T, Fault>>,
    ) -> Result<T, Fault> {
        let answer = attempt.await;
        self.count(request, Outcome::of(&answer));
        answer
    }

    /// One attempt was made, and all was done.
    pub(super) fn done(&self, request: Request) {
        self.count(request, Outcome::Done);
    }

    fn count(&self, request: Request, outcome: Outcome) {
        let row = self.counts.requests.get(request as usize);
        if let Some(cell) = row.and_then(|row| row.get(outcome as usize)) {
            cell.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// An attempt is made again.
    pub(super) fn retried(&self) {
        self.counts.retries.fetch_add(1, Ordering::Relaxed);
    }

    /// So much was sent, and the store answered.
    pub(super) fn written(&self, bytes: usize) {
        add(&self.counts.written_bytes, bytes);
    }

    /// So much was received.
    pub(super) fn read(&self, bytes: usize) {
        add(&self.counts.read_bytes, bytes);
    }

    /// The counts so far.
    pub(super) fn traffic(&self) -> Traffic {
        let load = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let counts = &self.counts;
        Traffic {
            requests: counts
                .requests
                .each_ref()
                .map(|row| row.each_ref().map(load)),
            retries: load(&counts.retries),
            written_bytes: load(&counts.written_bytes),
            read_bytes: load(&counts.read_bytes),
        }
    }
}

fn add(count: &AtomicU64, bytes: usize) {
    // no machine's memory holds more than 64 bits count
    count.fetch_add(u64::try_from(bytes).unwrap_or(u64::MAX), Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use bytes::Bytes;

    use super::super::scripted::{Scripted, Step};
    use super::super::{Store, StoreOptions};
    use super::*;

    fn happened(traffic: &Traffic) -> Vec<(&'static str, &'static str, u64)> {
        let all = traffic.requests();
        all.filter(|(_, _, count)| *count > 0)
            .map(|(request, outcome, count)| (request.word(), outcome.word(), count))
            .collect()
    }

    #[tokio::test(start_paused = true)]
    async fn every_attempt_is_counted_with_what_came_of_it() {
        let objects = Scripted::new([Step::FailBefore, Step::FailBefore]);
        let options = StoreOptions {
            retry_budget: Duration::from_mins(1),
            ..StoreOptions::at("s3://b")
        };
        let store = Store::over(objects, &options);
        let below = store.below("main");
        let bytes = Bytes::from_static(b"12345");
        below.create("x", bytes.clone()).await.unwrap();
        below.create("x", bytes).await.unwrap();
        below.get("x").await.unwrap();
        below.get("y").await.unwrap_err();
        below.list("").await.unwrap();
        below.delete("x").await.unwrap();
        let traffic = store.traffic();
        assert_eq!(
            happened(&traffic),
            [
                ("put", "ok", 1),
                ("put", "exists", 1),
                ("put", "failed", 2),
                ("get", "ok", 1),
                ("get", "not_found", 1),
                ("list", "ok", 1),
                ("delete", "ok", 1),
            ]
        );
        assert_eq!(
            (traffic.retries, traffic.written_bytes, traffic.read_bytes),
            (2, 10, 5)
        );
    }

    #[test]
    fn the_order_of_the_words_is_that_of_the_counts() {
        for (number, request) in Request::ALL.into_iter().enumerate() {
            assert_eq!(request as usize, number, "{}", request.word());
        }
        for (number, outcome) in Outcome::ALL.into_iter().enumerate() {
            assert_eq!(outcome as usize, number, "{}", outcome.word());
        }
    }
}
