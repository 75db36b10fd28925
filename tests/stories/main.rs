//! The integration stories: the `anywhen` binary as an operator meets it, against real servers of the
//! PostgreSQL major in `ANYWHEN_PG_BIN`, judged by PostgreSQL. `./check` runs them.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test may panic; clippy.toml exempts #[test] functions, not what they call"
)]

mod anywhen;
mod ground;
mod judge;
mod objects;
mod record;
mod server;

mod backups;
mod bad_input;
mod breaks;
mod connections;
mod crashes;
mod drops;
mod harmless;
mod interface;
mod layout;
mod outages;
mod shutdowns;
mod slots;
mod standbys;
mod targets;
mod timelines;
mod wal_bytes;
mod wal_fetch;
