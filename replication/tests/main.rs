//! Tests of the replication connection: against a scripted server, and against real ones.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

mod base_backup;
mod certificates;
mod commands;
mod framing;
mod fuzz;
mod login;
mod real_login;
mod real_protocol;
mod scripted;
mod server;
mod stream;
mod upload_manifest;
