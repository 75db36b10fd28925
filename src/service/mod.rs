//! The always-on service: for now, one stream.

use std::sync::Arc;

use tokio::sync::watch;

use crate::clock::Clock;
use crate::error::Result;
use crate::receive::StreamGauges;
use crate::receive::receiver::Receiver;
use crate::server;

pub use crate::receive::ReceiverOptions;
pub use crate::repository::destination::Destination;
pub use crate::repository::keys::EncryptionSettings;
pub use crate::repository::store::StoreOptions;
pub use crate::repository::{Acknowledge, PlaceSettings};

/// Receives the WAL of the server behind `conninfo` until `stop` says so, and stores it.
pub async fn stream(
    conninfo: Option<&str>,
    destination: &Destination,
    options: ReceiverOptions,
    clock: Arc<dyn Clock>,
    stop: watch::Receiver<bool>,
) -> Result<()> {
    let settings = server::resolve(conninfo)?;
    let gauges = StreamGauges::default();
    Receiver::new(settings, destination, options, clock, gauges)?
        .run(stop)
        .await
}
