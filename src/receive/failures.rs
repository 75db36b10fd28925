//! What the repository did not do when it was asked, as those note it who ask until it does.

use std::sync::Arc;

use super::state::StreamGauges;
use super::storing::new_backoff;
use crate::clock::Clock;
use crate::error::chain;
use crate::repository::RepositoryError;

/// Shows each failure as the last error. The log tells of the outage as a whole, and so the store
/// does that: it hears of every request.
#[derive(Clone)]
pub(super) struct Failures {
    gauges: StreamGauges,
    clock: Arc<dyn Clock>,
}

impl Failures {
    pub(super) fn new(gauges: StreamGauges, clock: Arc<dyn Clock>) -> Self {
        Self { gauges, clock }
    }

    /// The repository did not answer; `then` says what comes of it.
    pub(super) fn note(&self, error: &RepositoryError, then: &str) {
        let (message, now) = (chain(error), self.clock.now());
        tracing::debug!("{then}: {message}");
        self.gauges.update(|state| state.failed(now, message));
    }

    /// Asks until the repository answers.
    pub(super) async fn ask_until_answered<T, F>(
        &self,
        then: &str,
        ask: impl Fn() -> F,
    ) -> Result<T, RepositoryError>
    where
        F: Future<Output = Result<T, RepositoryError>>,
    {
        let mut backoff = new_backoff();
        loop {
            match ask().await {
                Err(error) if error.is_unreachable() => self.note(&error, then),
                answer => return answer,
            }
            backoff.wait().await;
        }
    }
}
