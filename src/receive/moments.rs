//! The server's clock and end of WAL, asked for again and again beside the stream.

use std::time::Duration;

use replication::connection::Connection;
use replication::conninfo::ConnectionSettings;
use tokio::sync::mpsc;

use crate::error::chain;
use crate::server::{self, Moment};

/// What came of asking.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Asked {
    /// An answer.
    Moment(Moment),
    /// The connection is gone; it is made again.
    Lost,
}

/// Asks at each `interval` until nobody listens.
pub(super) async fn ask(
    sql: Connection,
    settings: ConnectionSettings,
    interval: Duration,
    moments: mpsc::Sender<Asked>,
) {
    let mut ticks = tokio::time::interval(interval);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut sql = Some(sql);
    let mut warned = false;
    loop {
        ticks.tick().await;
        let mut connection = match sql.take() {
            Some(connection) => connection,
            None => match server::connect_sql(&settings).await {
                Ok(connection) => connection,
                Err(error) => {
                    tracing::debug!("cannot ask for the server's clock: {error}");
                    continue;
                }
            },
        };
        let asked = match server::read_moment(&mut connection).await {
            Ok(moment) => {
                sql = Some(connection);
                Asked::Moment(moment)
            }
            Err(error) => {
                if !std::mem::replace(&mut warned, true) {
                    tracing::warn!(
                        "the server's clock could not be read; `latest` stands still until it \
                         can: {}",
                        chain(&error)
                    );
                }
                Asked::Lost
            }
        };
        if moments.send(asked).await.is_err() {
            return;
        }
    }
}
