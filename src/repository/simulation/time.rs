//! The time of a schedule, which goes on from one process to the next.

use std::sync::Mutex;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use tokio::time::Instant;

use crate::clock::Clock;

/// Virtual time: each process has a runtime of its own, whose paused clock begins anew.
#[derive(Debug, Default)]
pub(super) struct Time {
    passed: Mutex<(Duration, Option<Instant>)>,
    days: AtomicI64,
}

impl Time {
    /// Since the beginning of the schedule.
    pub(super) fn now(&self) -> Duration {
        let (before, since) = *self.passed.lock().unwrap();
        before + since.map_or(Duration::ZERO, |since| since.elapsed())
    }

    /// What the archiver takes for the time of day.
    pub(super) fn now_by_the_clock(&self) -> Timestamp {
        Clock::now(self)
    }

    /// A runtime begins.
    pub(super) fn begin(&self) {
        self.passed.lock().unwrap().1 = Some(Instant::now());
    }

    /// A runtime ends.
    pub(super) fn end(&self) {
        let now = self.now();
        *self.passed.lock().unwrap() = (now, None);
    }

    /// Time that no process sees pass.
    pub(super) fn pass(&self, time: Duration) {
        self.passed.lock().unwrap().0 += time;
    }

    /// The archiver's clock goes on by a day.
    pub(super) fn next_day(&self) {
        self.days.fetch_add(1, Ordering::Relaxed);
    }
}

impl Clock for Time {
    fn now(&self) -> Timestamp {
        let begin: Timestamp = "2026-11-20T10:00:00Z".parse().unwrap();
        let days = SignedDuration::from_hours(24 * self.days.load(Ordering::Relaxed));
        begin + days + Self::now(self)
    }
}
