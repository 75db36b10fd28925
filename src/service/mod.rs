//! The always-on service: for now, one stream, and what it shows of itself.

mod exposition;
mod metrics;
mod notify;

use std::sync::Arc;

use tokio::sync::watch;
use tokio::task::JoinSet;

use metrics::{Endpoint, Source};
use notify::ServiceManager;

use crate::clock::Clock;
use crate::error::Result;
use crate::receive::StreamGauges;
use crate::receive::receiver::Receiver;
use crate::server;

pub use crate::receive::ReceiverOptions;
pub use crate::repository::destination::Destination;
pub use crate::repository::keys::EncryptionSettings;
pub use crate::repository::store::StoreOptions;
pub use crate::repository::{Acknowledge, PlaceSettings, SPOOL_BYTES_MAX, SpoolSettings};

/// How a stream is watched.
#[derive(Debug, Clone, Default)]
pub struct WatchOptions {
    /// Where metrics are read: `host:port`, with port 0 for any that is free; nowhere where absent.
    pub metrics: Option<String>,
}

/// Receives the WAL of the server behind `conninfo` until `stop` says so, and stores it.
///
/// The service manager that started this process, if it is one, is told how that goes.
pub async fn stream(
    conninfo: Option<&str>,
    destination: &Destination,
    options: ReceiverOptions,
    watched: WatchOptions,
    clock: Arc<dyn Clock>,
    stop: watch::Receiver<bool>,
) -> Result<()> {
    options
        .slot
        .as_deref()
        .map_or(Ok(()), server::check_slot_name)?;
    let settings = server::resolve(conninfo)?;
    let endpoint = match &watched.metrics {
        Some(address) => Some(Endpoint::bind(address).await?),
        None => None,
    };
    let gauges = StreamGauges::default();
    let (now, seen) = (Arc::clone(&clock), gauges.clone());
    let receiver = Receiver::new(settings, destination, options, now, seen)?;
    // tasks of their own, which end with this one: a busy stream does not keep them waiting
    let (mut beside, mut told) = (JoinSet::new(), JoinSet::new());
    if let Some(manager) = ServiceManager::of_environment() {
        told.spawn(manager.keep_told(gauges.clone(), stop.clone()));
    }
    if let Some(endpoint) = endpoint {
        tracing::info!("metrics are at http://{}/metrics", endpoint.address());
        beside.spawn(endpoint.serve(Source {
            gauges,
            destination: receiver.destination().clone(),
            clock,
        }));
    }
    let ended = receiver.run(stop.clone()).await;
    if *stop.borrow() {
        // an idle stream ends faster than it is told: without this the manager would not hear of it
        told.join_all().await;
    }
    ended
}
