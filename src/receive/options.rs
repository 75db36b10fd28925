//! What a receiver is asked for.

use std::time::Duration;

/// What the receiver needs to know.
#[derive(Debug, Clone)]
pub struct ReceiverOptions {
    /// The replication slot; `None` streams without one.
    pub slot: Option<String>,
    /// How long received WAL waits before it is stored.
    pub flush_interval: Duration,
    /// How often the tip is rewritten at most.
    pub tip_interval: Duration,
    /// How long a server that shuts down waits for us.
    pub shutdown_wait: Duration,
    /// How long a stop may take.
    pub stop_timeout: Duration,
    /// How much WAL may be held in memory for the store, besides one segment; in bytes.
    pub unstored_bytes_max: u64,
    /// Take the cluster's name for a system that is new under it.
    pub new_system: bool,
}

impl Default for ReceiverOptions {
    fn default() -> Self {
        Self {
            slot: None,
            flush_interval: Duration::from_secs(1),
            tip_interval: Duration::from_secs(10),
            shutdown_wait: Duration::from_secs(1),
            stop_timeout: Duration::from_secs(30),
            unstored_bytes_max: 128 << 20,
            new_system: false,
        }
    }
}
