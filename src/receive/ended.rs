//! How a conversation with a server ends.

use replication::stream::StreamError;
use tokio::sync::watch;

use crate::error::{Error, Result, chain};

/// Why the conversation with a server ended.
pub(super) enum Ended {
    /// We were asked to stop, and everything is stored.
    Stopped,
    /// The timeline ended: go on with the next one at once.
    NextTimeline,
    /// The server or the connection went away.
    Lost(String),
    /// The server no longer has what would follow.
    Removed,
}

/// What a failed stream means for the next one.
pub(super) fn stream_failed(error: &StreamError) -> Result<Ended> {
    match error.sqlstate() {
        Some("58P01") => Ok(Ended::Removed),
        // the slot is still held by our own last connection
        Some("55006") => Ok(Ended::Lost(chain(error))),
        // a standby that has not received what we have
        Some(_) if chain(error).contains("ahead of the WAL flush position") => {
            Ok(Ended::Lost(chain(error)))
        }
        _ if error.is_transient() => Ok(Ended::Lost(chain(error))),
        _ => Err(Error::failure(format!(
            "cannot stream from the server: {}",
            chain(error)
        ))),
    }
}

/// Returns once a stop was asked for.
pub(super) async fn stopped(stop: &mut watch::Receiver<bool>) {
    if stop.wait_for(|asked| *asked).await.is_err() {
        std::future::pending::<()>().await;
    }
}
