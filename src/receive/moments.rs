//! The server's clock, its end of WAL and how it stands to us, asked for again and again beside the
//! stream.

use std::time::Duration;

use replication::connection::{Connection, QueryError};
use replication::conninfo::ConnectionSettings;
use tokio::sync::mpsc;

use crate::error::chain;
use crate::server::{self, Moment, Standing};

/// An answer that takes longer is not waited for: whether commits wait for us must not be old news.
const ANSWER_MAX: Duration = Duration::from_secs(5);

/// What came of asking.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Asked {
    /// The clock and the end of WAL.
    Moment(Moment),
    /// Whether it waits for us, and what it keeps.
    Standing(Standing),
    /// The connection is gone; it is made again.
    Lost,
    /// There was no answer in time: what was heard before may be true no longer.
    Silent,
}

/// What the server is asked about.
#[derive(Debug)]
pub(super) struct Asking {
    /// Leads to the server that streams.
    pub(super) settings: ConnectionSettings,
    /// Its process that streams.
    pub(super) pid: Option<u32>,
    /// The slot that is streamed from.
    pub(super) slot: Option<String>,
}

impl Asking {
    async fn ask(&self, sql: &mut Connection) -> Result<[Asked; 2], QueryError> {
        let moment = server::read_moment_anywhere(sql).await?;
        let standing = server::read_standing(sql, self.pid, self.slot.as_deref()).await?;
        Ok([Asked::Standing(standing), Asked::Moment(moment)])
    }
}

/// Asks at each `interval` until nobody listens.
pub(super) async fn ask(
    sql: Connection,
    asking: Asking,
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
            None => match server::connect_sql(&asking.settings).await {
                Ok(connection) => connection,
                Err(error) => {
                    tracing::debug!("cannot ask for the server's clock: {error}");
                    // whoever does not read then must hear of it again
                    if server::is_shutting_down(&error) && moments.send(Asked::Lost).await.is_err()
                    {
                        return;
                    }
                    continue;
                }
            },
        };
        let asked = match tokio::time::timeout(ANSWER_MAX, asking.ask(&mut connection)).await {
            Ok(Ok(answers)) => {
                sql = Some(connection);
                answers.to_vec()
            }
            Err(_elapsed) => {
                tracing::debug!("the server does not say how it stands to this stream");
                vec![Asked::Silent]
            }
            Ok(Err(error)) => {
                if !std::mem::replace(&mut warned, true) {
                    tracing::warn!(
                        "the server's clock could not be read; `latest` stands still until it \
                         can: {}",
                        chain(&error)
                    );
                }
                vec![Asked::Lost]
            }
        };
        for asked in asked {
            if moments.send(asked).await.is_err() {
                return;
            }
        }
    }
}
