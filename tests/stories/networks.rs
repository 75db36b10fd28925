//! The network between a stream and its server is cut, falls silent, and is slow.

use std::time::{Duration, Instant};

use crate::chance::{Chance, tenth_of};
use crate::ground::{eventually, eventually_within};
use crate::load::{Load, assert_restored};
use crate::objects::{assert_no_gap, assert_wal_of, system_dir};
use crate::proxy::Proxy;
use crate::record::Record;
use crate::server::Options;

/// A server behind a proxy, a stream through it, and clients at work.
fn begun() -> (Record, Proxy, Load) {
    let mut record = Record::of_server(&Options {
        wal_segment_mib: 1,
        tcp: true,
        hba: "host all postgres 127.0.0.1/32 trust\nhost replication postgres 127.0.0.1/32 trust"
            .to_owned(),
        settings: "wal_sender_timeout = '3s'\n".to_owned(),
        ..Options::default()
    });
    record.insert(0);
    let proxy = Proxy::to(record.server.port());
    let mut command = record
        .anywhen
        .command(&["stream", "--flush-interval", "200ms"]);
    command.args(["-d", &proxy.conninfo()]);
    record.stream = Some(record.anywhen.stream_of(&record.server, command));
    record.anywhen.backup(&record.server);
    let load = Load::start(&record.server, 0);
    (record, proxy, load)
}

#[track_caller]
fn assert_nothing_lost(record: &mut Record, load: Load) {
    let acknowledged = load.stop();
    record.store_all();
    record.stop_stream();
    let system = system_dir(&record.anywhen, &record.server);
    let compared = assert_wal_of(&system, &[record.server.data()], 1);
    assert!(compared.segments > 0, "{compared:?}");
    assert_no_gap(&system, 1);
    assert_restored(record, &acknowledged);
}

#[test]
fn a_connection_cut_again_and_again_loses_nothing() {
    let (mut record, proxy, load) = begun();
    let mut chance = Chance::new();
    for _ in 0..tenth_of(40) {
        record.wait_ms(chance.below(500));
        let before = record.stream_pid();
        assert!(proxy.cut() > 0, "nothing was connected");
        eventually("the stream has come back", || {
            record.stream.as_mut().unwrap().assert_running();
            let now = record.stream_pid();
            now.is_some() && now != before
        });
    }
    assert_nothing_lost(&mut record, load);
}

/// A firewall that forgets a connection tells neither side: who waits for the other waits for ever, and
/// WAL piles up on the server.
#[test]
fn a_connection_that_fell_silent_is_given_up() {
    let (mut record, proxy, load) = begun();
    record.store_all();
    let before = record.stream_pid();
    proxy.forget_connections();
    // the server's own patience is three seconds, and the stream's follows from it
    let patience = Duration::from_secs(40);
    eventually_within(patience, "the stream has come back", || {
        record.stream.as_mut().unwrap().assert_running();
        let now = record.stream_pid();
        now.is_some() && now != before
    });
    assert_nothing_lost(&mut record, load);
}

/// A network that is slower than the server writes makes a stream late. It is no reason for the server
/// to drop it, which would send all that is under way once more.
#[test]
fn a_slow_network_costs_no_connection() {
    let (mut record, proxy, load) = begun();
    record.store_all();
    let before = record.stream_pid();
    assert_ne!(before, None);
    proxy.limit(Some(20_000));
    let since = Instant::now();
    eventually("three times the server's patience", || {
        since.elapsed() > Duration::from_secs(10)
    });
    assert!(
        record.lag_bytes() > 100_000,
        "the network was not slow: {}",
        record.lag_bytes()
    );
    proxy.limit(None);
    record.store_all();
    assert_eq!(record.stream_pid(), before, "{}", record.server.log());
    assert_nothing_lost(&mut record, load);
}
