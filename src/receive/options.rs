//! What a receiver is asked for.

use std::time::Duration;

use crate::repository::SpoolSettings;

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
    /// How much WAL may be held in memory, in bytes; a segment that is larger is held all the same.
    /// What it is compressed to comes on top.
    pub unstored_bytes_max: u64,
    /// Where WAL goes while no repository takes it; `None`: it waits in memory, and on the server.
    pub spool: Option<SpoolSettings>,
    /// Store each commit as soon as it comes, without asking the server whether it waits for us.
    pub synchronous: bool,
    /// Stop where WAL is missing that the server no longer has, instead of going on behind it.
    pub strict: bool,
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
            unstored_bytes_max: 64 << 20,
            synchronous: false,
            strict: false,
            spool: None,
            new_system: false,
        }
    }
}
