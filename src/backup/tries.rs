//! A few more tries at what a server or a repository did not answer, so that a blink of the network
//! does not cost hours of copying.

use std::time::Duration;

use crate::error::{Error, Kind, Result};
use crate::retry::Backoff;

/// How often the same is tried again, which takes about twenty seconds.
const TRIES: u32 = 6;

/// The tries that are left.
pub(super) struct Tries {
    left: u32,
    backoff: Backoff,
}

impl Tries {
    /// All of them.
    pub(super) fn new() -> Self {
        Self {
            left: TRIES,
            backoff: Backoff::new(Duration::from_millis(500), Duration::from_secs(10)),
        }
    }

    /// Waits before the next try; gives `error` back where no try is left, or none would help.
    pub(super) async fn again_after(&mut self, error: Error) -> Result<()> {
        if error.kind() != Kind::Unreachable || self.left == 0 {
            return Err(error);
        }
        self.left -= 1;
        tracing::warn!("{}: trying again", error.message());
        self.backoff.wait().await;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_what_did_not_answer_is_tried_again_and_not_for_ever() {
        let mut tries = Tries {
            left: 1,
            backoff: Backoff::new(Duration::from_millis(1), Duration::from_millis(1)),
        };
        let silent = || Error::new(Kind::Unreachable, "no answer");
        let damaged = tries.again_after(Error::damaged("bad bytes")).await;
        assert_eq!(damaged.unwrap_err().kind(), Kind::Damaged);
        tries.again_after(silent()).await.unwrap();
        let given_up = tries.again_after(silent()).await;
        assert_eq!(given_up.unwrap_err().message(), "no answer");
    }
}
