//! Attempts at one request until it is answered or its time is up, and what the log says of them.

use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::fault::Fault;
use super::traffic::Meter;
use crate::retry::{Attempts, Policy};

/// The first wait; a store that is only busy has it behind itself by then.
const FIRST_WAIT: Duration = Duration::from_millis(200);

/// The longest wait: an outage's end is noticed within it.
const MAX_WAIT: Duration = Duration::from_secs(10);

/// The time between two lines about one outage: at first, and at most.
const QUIET_FIRST: Duration = Duration::from_secs(2);
const QUIET_MAX: Duration = Duration::from_mins(1);

/// The time between the end of one outage and the first line about another.
const QUIET_AFTER: Duration = Duration::from_secs(5);

/// Tries again what may succeed later. Clones share what they say.
#[derive(Debug, Clone)]
pub(super) struct Retrying {
    policy: Policy,
    log: Arc<Mutex<Log>>,
    meter: Meter,
}

/// When the next line may be written: many requests fail at a time when a store is away.
#[derive(Debug)]
struct Log {
    next: Instant,
    quiet: Duration,
}

impl Retrying {
    /// Tries for `budget`; zero: one attempt. What is tried again is counted by `meter`.
    pub(super) fn new(budget: Duration, meter: Meter) -> Self {
        Self {
            policy: Policy {
                first: FIRST_WAIT,
                max: MAX_WAIT,
                budget,
            },
            log: Arc::new(Mutex::new(Log {
                next: Instant::now(),
                quiet: QUIET_FIRST,
            })),
            meter,
        }
    }

    /// Makes attempts until one succeeds, fails for good, or the budget is used up.
    pub(super) async fn run<T, F>(
        &self,
        doing: &'static str,
        path: &str,
        attempt: impl Fn() -> F,
    ) -> Result<T, Fault>
    where
        F: Future<Output = Result<T, Fault>>,
    {
        let mut attempts = Attempts::new(self.policy);
        let mut said = false;
        loop {
            match attempt().await {
                Ok(value) => {
                    if attempts.count() > 1 {
                        self.recovered();
                    }
                    if said {
                        let seconds = attempts.elapsed().as_secs_f64();
                        let count = attempts.count();
                        tracing::info!(
                            "the {doing} of {path} succeeded after {seconds:.0} s, at attempt {count}"
                        );
                    }
                    return Ok(value);
                }
                Err(Fault::Transient {
                    reason,
                    retry_after,
                }) if attempts.may_go_on() => {
                    if self.may_speak() {
                        said = true;
                        say(doing, path, &attempts, &reason);
                    }
                    attempts.wait(retry_after).await;
                    self.meter.retried();
                }
                Err(fault) => return Err(after(fault, &attempts)),
            }
        }
    }

    fn may_speak(&self) -> bool {
        let now = Instant::now();
        let mut log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        if now < log.next {
            return false;
        }
        // an outage long after the last one is news again
        log.quiet = if now > log.next + QUIET_MAX {
            QUIET_FIRST
        } else {
            (log.quiet * 2).min(QUIET_MAX)
        };
        log.next = now + log.quiet;
        true
    }

    /// The next outage is news, but a store that is only busy does not fill the log.
    fn recovered(&self) {
        let mut log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        log.quiet = QUIET_FIRST;
        log.next = log.next.min(Instant::now() + QUIET_AFTER);
    }
}

fn say(doing: &str, path: &str, attempts: &Attempts, reason: &str) {
    match attempts.count() {
        1 => tracing::warn!("retrying the {doing} of {path}: {reason}"),
        count => tracing::warn!(
            "retrying the {doing} of {path} for {:.0} s: attempt {count}: {reason}",
            attempts.elapsed().as_secs_f64()
        ),
    }
}

/// A fault that outlived its attempts says how many there were.
fn after(fault: Fault, attempts: &Attempts) -> Fault {
    match fault {
        Fault::Transient {
            reason,
            retry_after,
        } if attempts.count() > 1 => Fault::Transient {
            reason: format!(
                "{reason} ({} attempts in {:.0} s)",
                attempts.count(),
                attempts.elapsed().as_secs_f64()
            ),
            retry_after,
        },
        other => other,
    }
}
