//! Attempts at one request until it is answered or its time is up, and what the log says of them.

use std::future::Future;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::fault::Fault;
use super::outage::Outage;
use super::traffic::Meter;
use crate::error::Error;
use crate::retry::{Attempts, Policy};

/// The first wait; a store that is only busy has it behind itself by then.
const FIRST_WAIT: Duration = Duration::from_millis(200);

/// The longest wait: an outage's end is noticed within it.
const MAX_WAIT: Duration = Duration::from_secs(10);

/// Tries again what may succeed later. Clones share what they know of the store.
#[derive(Debug, Clone)]
pub(super) struct Retrying {
    policy: Policy,
    is_persistent: Arc<AtomicBool>,
    outage: Arc<Mutex<Outage>>,
    meter: Meter,
}

/// What is asked, and of whom, for the log.
#[derive(Debug, Clone, Copy)]
pub(super) struct Asked<'a> {
    /// The word for it.
    pub(super) doing: &'static str,
    /// The store's address.
    pub(super) store: &'a str,
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
            is_persistent: Arc::default(),
            outage: Arc::default(),
            meter,
        }
    }

    /// Whoever asks goes on asking when the budget is used up, from now on.
    pub(super) fn persist(&self) {
        self.is_persistent.store(true, Ordering::Relaxed);
    }

    /// Makes attempts until one succeeds, fails for good, or the budget is used up. `explained` makes
    /// of a fault what a user reads.
    pub(super) async fn run<T, F>(
        &self,
        asked: Asked<'_>,
        attempt: impl Fn() -> F,
        explained: impl Fn(&Fault) -> Error,
    ) -> Result<T, Fault>
    where
        F: Future<Output = Result<T, Fault>>,
    {
        let mut attempts = Attempts::new(self.policy);
        loop {
            let began = Instant::now();
            if self.outage().is_under_way(asked.doing) {
                self.meter.retried();
            }
            let fault = match attempt().await {
                Ok(value) => {
                    self.answered(asked, began);
                    return Ok(value);
                }
                Err(fault) if fault.is_answer() => {
                    self.answered(asked, began);
                    return Err(fault);
                }
                Err(fault) => fault,
            };
            let wait = match &fault {
                Fault::Transient { retry_after, .. } if attempts.may_go_on() => Some(*retry_after),
                _ => None,
            };
            let is_tried_again = wait.is_some() || self.is_persistent.load(Ordering::Relaxed);
            let lasts = self
                .outage()
                .failed(asked.doing, Instant::now(), is_tried_again);
            let error = explained(&fault);
            if let Some(lasts) = lasts {
                say(&error, lasts);
            } else {
                tracing::debug!("attempt {}: {}", attempts.count(), error.message());
            }
            let Some(retry_after) = wait else {
                return Err(after(fault, &attempts));
            };
            attempts.wait(retry_after).await;
        }
    }

    fn answered(&self, asked: Asked<'_>, began: Instant) {
        let lasted = self.outage().answered(asked.doing, began, Instant::now());
        if let Some(lasted) = lasted {
            let (store, seconds) = (asked.store, lasted.as_secs_f64());
            tracing::info!("{store} answers again, after {seconds:.0} s");
        }
    }

    /// Whether it is known not to answer: whoever succeeds now has to come through here, which says so.
    pub(super) fn is_in_trouble(&self, doing: &'static str) -> bool {
        self.outage().is_under_way(doing)
    }

    fn outage(&self) -> MutexGuard<'_, Outage> {
        self.outage.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn say(error: &Error, lasts: Duration) {
    let hint = error.hint_text().unwrap_or_default();
    let message = error.message();
    if lasts.is_zero() {
        tracing::warn!("{message}; trying again. hint: {hint}");
    } else {
        let seconds = lasts.as_secs_f64();
        tracing::warn!("{message}; trying again since {seconds:.0} s. hint: {hint}");
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
