//! Writes under way, and waiting for those that began before a moment.
//!
//! A place that missed a write can be filled up only once that write has come to its end in the
//! others: what is listed before may lack it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

/// The writes of a repository that are under way.
#[derive(Debug, Default)]
pub(super) struct InFlight {
    turns: Mutex<Turns>,
    ended: Notify,
    /// Held by who waits: two turns are enough for one at a time.
    waiting: tokio::sync::Mutex<()>,
}

/// Writes are counted in the turn in which they began.
#[derive(Debug, Default)]
struct Turns {
    now_odd: bool,
    even: u64,
    odd: u64,
}

impl Turns {
    fn count(&mut self, odd: bool) -> &mut u64 {
        if odd { &mut self.odd } else { &mut self.even }
    }
}

/// One write; it has ended when this is dropped.
#[derive(Debug)]
pub(super) struct Write {
    all: Arc<InFlight>,
    odd: bool,
}

impl InFlight {
    /// Begins a write. Which places it goes to is decided after this.
    pub(super) fn begin(self: &Arc<Self>) -> Write {
        let mut turns = self.turns();
        let odd = turns.now_odd;
        *turns.count(odd) += 1;
        Write {
            all: Arc::clone(self),
            odd,
        }
    }

    /// Waits until every write that has begun by now has ended; others are not held up.
    pub(super) async fn settle(&self) {
        let _alone = self.waiting.lock().await;
        let odd = {
            let mut turns = self.turns();
            turns.now_odd = !turns.now_odd;
            !turns.now_odd
        };
        loop {
            let ended = self.ended.notified();
            if *self.turns().count(odd) == 0 {
                return;
            }
            ended.await;
        }
    }

    fn turns(&self) -> MutexGuard<'_, Turns> {
        self.turns.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Write {
    fn drop(&mut self) {
        let mut turns = self.all.turns();
        *turns.count(self.odd) -= 1;
        drop(turns);
        self.all.ended.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    #[tokio::test]
    async fn waits_for_what_began_before_and_for_nothing_else() {
        let writes = Arc::new(InFlight::default());
        let before = writes.begin();
        let mut settling = Box::pin(writes.settle());
        assert!(settling.as_mut().now_or_never().is_none());
        let after = writes.begin();
        drop(before);
        settling.await;
        // twice, so that both turns have been waited for
        let mut settling = Box::pin(writes.settle());
        assert!(settling.as_mut().now_or_never().is_none());
        drop(after);
        settling.await;
        writes.settle().await;
    }
}
