//! How a conversation with a server ends.

use replication::server_error::may_pass;
use replication::stream::StreamError;
use tokio::sync::watch;

use crate::error::{Error, Result, chain};
use crate::server;

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
        Some(sqlstate) if may_pass(sqlstate) || server::slot_has_changed(sqlstate) => {
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

#[cfg(test)]
mod tests {
    use replication::server_error::ServerError;

    use super::*;

    /// A service that has streamed for months would stand still over a full disk that is cleaned up, a
    /// `statement_timeout`, or a slot that an operator dropped just now.
    #[test]
    fn what_passes_does_not_end_the_stream() {
        let failed = |sqlstate: &str| {
            let error = ServerError {
                sqlstate: sqlstate.to_owned(),
                ..ServerError::default()
            };
            stream_failed(&StreamError::from(error))
        };
        for sqlstate in [
            "57014", "53200", "53100", "58030", "42704", "55000", "55006",
        ] {
            assert!(matches!(failed(sqlstate), Ok(Ended::Lost(_))), "{sqlstate}");
        }
        assert!(matches!(failed("58P01"), Ok(Ended::Removed)));
        for sqlstate in ["42501", "XX000", "0A000"] {
            assert!(failed(sqlstate).is_err(), "{sqlstate}");
        }
    }
}
