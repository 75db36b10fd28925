//! What can happen to a request.

use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream;
use object_store::{Error, GetResult, GetResultPayload};
use tokio::time::Instant;

use super::lots::Lots;

/// The kinds of requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Request {
    Put,
    Get,
    Head,
    Delete,
    List,
}

/// What one request meets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    None,
    FailedBefore,
    FailedAfter,
    Slow,
    SlowDown,
    HalfOpen,
    HalfOpenDone,
    LandsLate,
    Truncated,
    BodyBroke,
    BodyStalled,
    ListBroke,
}

/// What each kind can meet, with weights.
pub(super) const WRITE_FAULTS: &[(u64, Fault)] = &[
    (20, Fault::FailedBefore),
    (20, Fault::FailedAfter),
    (15, Fault::Slow),
    (15, Fault::SlowDown),
    (6, Fault::HalfOpen),
    (12, Fault::HalfOpenDone),
    (12, Fault::LandsLate),
];
pub(super) const READ_FAULTS: &[(u64, Fault)] = &[
    (20, Fault::FailedBefore),
    (15, Fault::Slow),
    (15, Fault::SlowDown),
    (10, Fault::HalfOpen),
    (20, Fault::Truncated),
    (10, Fault::BodyBroke),
    (10, Fault::BodyStalled),
];
pub(super) const LIST_FAULTS: &[(u64, Fault)] = &[
    (20, Fault::FailedBefore),
    (15, Fault::Slow),
    (15, Fault::SlowDown),
    (10, Fault::HalfOpen),
    (20, Fault::ListBroke),
];

/// The connection has gone.
pub(super) fn lost(what: &'static str) -> Error {
    Error::Generic {
        store: "simulated",
        source: what.into(),
    }
}

/// Waits, as slow stores do.
pub(super) async fn wait(time: Duration) {
    tokio::time::sleep_until(Instant::now() + time).await;
}

/// A body that ends, breaks or stalls after a part of its bytes.
pub(super) fn spoilt(got: GetResult, bytes: &Bytes, fault: Fault, lots: &mut Lots) -> GetResult {
    let part = bytes.slice(..lots.index(bytes.len().max(1)));
    let part = stream::iter([Ok(part)]);
    let rest = match fault {
        Fault::BodyBroke => stream::iter([Err(lost("connection reset"))]).boxed(),
        Fault::BodyStalled => stream::pending().boxed(),
        _ => stream::empty().boxed(),
    };
    GetResult {
        payload: GetResultPayload::Stream(part.chain(rest).boxed()),
        ..got
    }
}
