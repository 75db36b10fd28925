//! The one place that waits between attempts.

use std::time::Duration;

use tokio::time::Instant;

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
            seed: u64::from(std::process::id()) | 1,
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
