//! Two archivers of one cluster at once.

use crate::anywhen::Stream;
use crate::chance::{Chance, tenth_of};
use crate::ground::eventually;
use crate::load::{Load, assert_restored};
use crate::objects::{assert_no_gap, assert_wal_of, system_dir};
use crate::record::Record;
use crate::server::{Options, Server};

/// Two archivers with slots of their own write the same objects into one repository: neither is in the
/// other's way, and either may die at any moment.
#[test]
fn two_archivers_of_one_cluster_store_it_once_and_either_may_die() {
    let record = Record::of_server(&Options {
        wal_segment_mib: 1,
        ..Options::default()
    });
    record.insert(0);
    let mut streams = SLOTS.map(|slot| Some(begin(&record, slot)));
    record.anywhen.backup(&record.server);
    let load = Load::start(&record.server, 0);
    let mut chance = Chance::new();
    for _ in 0..tenth_of(60) {
        record.wait_ms(chance.below(400));
        let which = usize::try_from(chance.below(2)).unwrap();
        streams[which].take().unwrap().kill9();
        record.wait_ms(chance.below(400));
        streams[1 - which].as_mut().unwrap().assert_running();
        streams[which] = Some(begin(&record, SLOTS[which]));
    }
    let acknowledged = load.stop();
    for stream in streams.iter_mut().flatten() {
        stream.assert_running();
    }
    wait_for_both(&record.server);
    for stream in streams.into_iter().flatten() {
        stream.stop();
    }
    let system = system_dir(&record.anywhen, &record.server);
    assert!(assert_wal_of(&system, &[record.server.data()], 1).segments > 0);
    assert_no_gap(&system, 1);
    assert_restored(&record, &acknowledged);
}

const SLOTS: [&str; 2] = ["first", "second"];

fn begin(record: &Record, slot: &str) -> Stream {
    // their pieces have different ends, and each merges what it stored itself
    let way = if slot == SLOTS[0] {
        "--flush-interval=200ms"
    } else {
        "--synchronous"
    };
    let arguments = ["--slot", slot, way];
    let mut stream = record.anywhen.stream_with(&record.server, &arguments);
    let active =
        format!("select count(*) from pg_replication_slots where slot_name = '{slot}' and active");
    eventually("the slot is in use", || {
        stream.assert_running();
        record.server.value(&active) == "1"
    });
    stream
}

/// Each slot keeps WAL from what its archiver was told is stored.
#[track_caller]
fn wait_for_both(server: &Server) {
    let written = server.value("select pg_current_wal_flush_lsn()");
    let both =
        format!("select count(*) from pg_replication_slots where restart_lsn >= '{written}'");
    eventually("both archivers have stored all", || {
        server.value(&both) == "2"
    });
}
