//! The integration stories: the `anywhen` binary as an operator meets it, against real servers of the
//! PostgreSQL major in `ANYWHEN_PG_BIN`, judged by PostgreSQL. `./check` runs them.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test may panic; clippy.toml exempts #[test] functions, not what they call"
)]

mod anywhen;
mod chance;
mod disk;
mod endpoint;
mod ground;
mod judge;
mod load;
mod objects;
mod proxy;
mod record;
mod resumed;
mod sealed;
mod server;

mod ahead;
mod archivers;
mod azure;
mod backups;
mod bad_input;
mod base_files;
mod breaks;
mod buckets;
mod connections;
mod crashes;
mod damage;
mod delta;
mod drops;
mod encryption;
mod failovers;
mod format;
mod harmless;
mod history;
mod increments;
mod interface;
mod kills;
mod layout;
mod meetings;
mod metrics;
mod networks;
mod outages;
mod pages;
mod places;
mod power_cuts;
mod recovery_tests;
mod sharing;
mod shutdowns;
mod slot_positions;
mod slots;
mod splits;
mod spool;
mod stalls;
mod standbys;
mod summaries;
mod synchronous;
mod targets;
mod timelines;
mod two_places;
mod wal_bytes;
mod wal_fetch;
mod workloads;
mod wrong_places;
