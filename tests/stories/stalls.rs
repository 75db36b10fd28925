//! A store that is away or hangs while the server goes on: nothing is lost, and the server never has a
//! reason to drop the stream.

use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::chance::{Chance, rounds, tenth_of};
use crate::ground::{Ground, eventually};
use crate::load::{Load, assert_restored};
use crate::objects::{assert_no_gap, assert_wal_of, system_dir};
use crate::record::Record;
use crate::server::Options;

/// Far below what a store may be away for.
const SENDER_TIMEOUT: &str = "wal_sender_timeout = '3s'\n";

fn options(wal_segment_mib: u32) -> Options {
    Options {
        wal_segment_mib,
        settings: SENDER_TIMEOUT.to_owned(),
        ..Options::default()
    }
}

/// Outages of seconds, and in a soak of minutes. The server's patience with a silent stream is shorter:
/// the stream must not fall silent for them.
#[test]
fn outages_of_the_store_lose_nothing_and_cost_no_connection() {
    let mut record = Record::begun(&options(1));
    let load = Load::start(&record.server, 0);
    let pid = record.stream_pid();
    assert_ne!(pid, None);
    let mut chance = Chance::new();
    let longest = Duration::from_secs(if rounds(0) == 0 { 8 } else { 120 });
    for _ in 0..tenth_of(20) {
        record.set_reachable(false);
        let away = Duration::from_secs(2 + chance.below(longest.as_secs() - 1));
        let since = Instant::now();
        while since.elapsed() < away {
            record.wait_ms(500);
            record.stream.as_mut().unwrap().assert_running();
        }
        record.set_reachable(true);
        record.store_all();
    }
    let log = record.server.log();
    assert_eq!(record.stream_pid(), pid, "{log}");
    let acknowledged = load.stop();
    record.store_all();
    record.stop_stream();
    let system = system_dir(&record.anywhen, &record.server);
    assert!(assert_wal_of(&system, &[record.server.data()], 1).segments > 0);
    assert_no_gap(&system, 1);
    assert_restored(&record, &acknowledged);
}

/// A store that takes connections and answers nobody, and more WAL than the stream may hold: it stops
/// to read, and goes on to answer.
#[test]
fn a_store_that_hangs_costs_no_connection_while_nothing_is_read() {
    let mut record = Record::on(Ground::on_s3(), &options(16)).begin();
    record.store_all();
    let pid = record.stream_pid();
    assert_ne!(pid, None);
    record.ground.endpoint().unwrap().signal(Signal::STOP);
    // twice of what is held for the store
    record.server.execute(
        "create table bulk (bytes text);
         alter table bulk alter bytes set storage external;
         insert into bulk select repeat('x', 7500) from generate_series(1, 34000)",
    );
    record.insert(1);
    let since = Instant::now();
    eventually("three times the server's patience", || {
        record.stream.as_mut().unwrap().assert_running();
        since.elapsed() > Duration::from_secs(10)
    });
    let unsent = "select sent_lsn < pg_current_wal_flush_lsn() from pg_stat_replication";
    assert_eq!(record.server.value(unsent), "t", "all of it was read");
    record.ground.endpoint().unwrap().signal(Signal::CONT);
    record.store_all();
    assert_eq!(record.stream_pid(), pid, "{}", record.server.log());
    record.stop_stream();
    let system = system_dir(&record.anywhen, &record.server);
    assert!(assert_wal_of(&system, &[record.server.data()], 16).segments > 10);
    assert_no_gap(&system, 16);
}
