//! The one place that waits between attempts.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;

/// Each backoff of a process takes waits of its own.
static SEED: AtomicU64 = AtomicU64::new(1);

/// A number that no other backoff has.
fn number() -> u64 {
    #[cfg(test)]
    if let Some(number) = replayed::next() {
        return number;
    }
    u64::from(std::process::id()) << 32 ^ SEED.fetch_add(1, Ordering::Relaxed)
}

/// Growing waits between attempts, with jitter, so that many clients do not come back at once.
#[derive(Debug, Clone)]
pub struct Backoff {
    next_ms: u64,
    max_ms: u64,
    seed: u64,
}

impl Backoff {
    /// Waits from `first` up to `max`, doubling.
    pub fn new(first: Duration, max: Duration) -> Self {
        let millis = |wait: Duration| u64::try_from(wait.as_millis()).unwrap_or(u64::MAX).max(1);
        Self {
            next_ms: millis(first),
            max_ms: millis(max),
            // the golden ratio spreads neighbouring numbers; xorshift must not begin with zero
            seed: number().wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1,
        }
    }

    /// The next wait: between a half and the whole of the current step.
    pub fn next_wait(&mut self) -> Duration {
        let step = self.next_ms;
        self.next_ms = step.saturating_mul(2).min(self.max_ms);
        // xorshift64: spread, not secrecy
        self.seed ^= self.seed << 13;
        self.seed ^= self.seed >> 7;
        self.seed ^= self.seed << 17;
        Duration::from_millis(step / 2 + self.seed % (step / 2 + 1))
    }

    /// Sleeps for the next wait.
    pub async fn wait(&mut self) {
        tokio::time::sleep_until(Instant::now() + self.next_wait()).await;
    }
}

/// How long, and how often, one operation is tried.
#[derive(Debug, Clone, Copy)]
pub struct Policy {
    /// The first wait.
    pub first: Duration,
    /// The longest wait.
    pub max: Duration,
    /// After this long no further attempt is begun; zero: one attempt is all.
    pub budget: Duration,
}

/// The attempts at one operation.
#[derive(Debug)]
pub struct Attempts {
    backoff: Backoff,
    budget: Duration,
    since: Instant,
    count: u32,
}

impl Attempts {
    /// The first attempt begins now.
    pub fn new(policy: Policy) -> Self {
        Self {
            backoff: Backoff::new(policy.first, policy.max),
            budget: policy.budget,
            since: Instant::now(),
            count: 1,
        }
    }

    /// The number of the attempt under way, from 1.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// How long the operation has been tried.
    pub fn elapsed(&self) -> Duration {
        self.since.elapsed()
    }

    /// Whether the budget allows another attempt.
    pub fn may_go_on(&self) -> bool {
        self.elapsed() < self.budget
    }

    /// Waits before the next attempt: at least as long as the other side asked for, never beyond
    /// the budget.
    pub async fn wait(&mut self, asked: Option<Duration>) {
        let left = self.budget.saturating_sub(self.elapsed());
        let wait = self.backoff.next_wait().max(asked.unwrap_or_default());
        tokio::time::sleep_until(Instant::now() + wait.min(left)).await;
        self.count = self.count.saturating_add(1);
    }
}

/// Waits that are the same each time a test is run with the same seed.
#[cfg(test)]
pub(crate) mod replayed {
    use std::cell::Cell;

    thread_local! {
        static NEXT: Cell<Option<u64>> = const { Cell::new(None) };
    }

    /// From now on the waits of this thread depend on `seed` alone.
    pub(crate) fn begin(seed: u64) {
        NEXT.set(Some(seed));
    }

    pub(super) fn next() -> Option<u64> {
        let number = NEXT.get()?;
        NEXT.set(Some(number.wrapping_add(1)));
        Some(number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_and_stay_within_the_bound() {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(1));
        let waits: Vec<_> = (0..8).map(|_| backoff.next_wait()).collect();
        assert!(waits[0] >= Duration::from_millis(50) && waits[0] <= Duration::from_millis(100));
        assert!(waits.iter().all(|wait| *wait <= Duration::from_secs(1)));
        assert!(waits[7] >= Duration::from_millis(500));
    }
}
