//! Where a stream begins: what PostgreSQL's own tests ask of `pg_receivewal` (`020_pg_receivewal.pl`), asked
//! of `stream`.

use crate::judge::{End, restored_moments};
use crate::objects::{assert_no_gap, assert_wal_of, stored_segments, system_dir};
use crate::record::Record;
use crate::server::{Options, Server, write_setting};

fn of_small_segments() -> Record {
    Record::of_server(&Options {
        wal_segment_mib: 1,
        ..Options::default()
    })
}

/// The name of the segment that the server writes into.
fn current_segment(server: &Server) -> String {
    server.value("select pg_walfile_name(pg_current_wal_insert_lsn())")
}

/// Lets the server remove all WAL that no slot keeps.
fn recycle(record: &Record) {
    for mean in [
        "wal_keep_size = 0",
        "max_wal_size = '2MB'",
        "min_wal_size = '2MB'",
    ] {
        record.server.execute(&format!("alter system set {mean}"));
    }
    record.server.execute("select pg_reload_conf()");
    record.fill_segments(3);
    record.server.execute("checkpoint");
    record.server.execute("checkpoint");
}

fn holes(record: &Record) -> usize {
    let status = record.anywhen.json(&["status"]);
    status["clusters"][0]["holes"].as_array().unwrap().len()
}

/// A second run goes on in the segment that the first one left: what comes again is not stored twice, and
/// what is new is not put behind a gap.
#[test]
fn a_second_run_goes_on_within_a_segment() {
    let mut record = of_small_segments().begin();
    let segment = current_segment(&record.server);
    for row in 1..=6 {
        record.insert(row);
        record.store_all();
        // an orderly end, and one that leaves the piece where it is
        if row % 2 == 0 {
            record.stop_stream();
        } else {
            record.stream.take().unwrap().kill9();
        }
        record.insert(100 + row);
        record.stream = Some(record.anywhen.stream(&record.server));
    }
    assert_eq!(current_segment(&record.server), segment);
    record.store_all();
    record.stop_stream();
    let system = system_dir(&record.anywhen, &record.server);
    let compared = assert_wal_of(&system, &[record.server.data()], 1);
    assert!(compared.pieces > 0, "{compared:?}");
    assert_eq!(
        record.rows_at("latest", &[], End::Promoted),
        "0,1,2,3,4,5,6,101,102,103,104,105,106"
    );
}

/// The segment was finished by the first run, and the second begins with the next one.
#[test]
fn a_second_run_goes_on_behind_a_whole_segment() {
    let mut record = of_small_segments().begin();
    for row in 1..=3 {
        record.insert(row);
        record.fill_segments(1);
        record.store_all();
        record.stop_stream();
        record.insert(10 + row);
        record.stream = Some(record.anywhen.stream(&record.server));
    }
    record.store_all();
    record.stop_stream();
    let system = system_dir(&record.anywhen, &record.server);
    assert!(assert_wal_of(&system, &[record.server.data()], 1).segments >= 3);
    assert_no_gap(&system, 1);
    assert_eq!(
        record.rows_at("latest", &[], End::Promoted),
        "0,1,2,3,11,12,13"
    );
}

/// The last whole segment comes again only to be compared: a server that has removed it loses nothing by
/// that.
#[test]
fn a_second_run_goes_on_behind_a_segment_that_the_server_removed() {
    let mut record = of_small_segments().begin();
    record.fill_segments(1);
    record.store_all();
    record.stop_stream();
    let system = system_dir(&record.anywhen, &record.server);
    let last = stored_segments(&system).into_keys().next_back().unwrap();
    recycle(&record);
    let gone = format!("select count(*) from pg_ls_waldir() where name = '{last}'");
    assert_eq!(record.server.value(&gone), "0", "{last} is still there");
    record.insert(1);
    record.stream = Some(record.anywhen.stream(&record.server));
    record.store_all();
    record.stop_stream();
    assert_no_gap(&system, 1);
    assert_eq!(holes(&record), 0);
    assert_eq!(record.rows_at("latest", &[], End::Promoted), "0,1");
}

/// Nothing is stored yet, and the slot was made long before: the server has kept WAL from there on alone,
/// and all of that is wanted.
#[test]
fn a_first_run_begins_where_the_slot_keeps_wal() {
    let mut record = of_small_segments();
    record.insert(0);
    record.fill_segments(2);
    record
        .server
        .execute("select pg_create_physical_replication_slot('anywhen_main', true)");
    let kept = record
        .server
        .value("select pg_walfile_name(restart_lsn) from pg_replication_slots");
    recycle(&record);
    let first = "select min(name) from pg_ls_waldir() where length(name) = 24 and name > '000000010000000000000000'";
    assert_eq!(record.server.value(first), kept, "what lies before is gone");
    record.stream = Some(record.anywhen.stream(&record.server));
    record.insert(1);
    record.store_all();
    record.stop_stream();
    let system = system_dir(&record.anywhen, &record.server);
    let segments = stored_segments(&system);
    assert_eq!(segments.keys().next(), Some(&kept));
    assert_no_gap(&system, 1);
    assert_eq!(holes(&record), 0);
}

/// A slot that somebody dropped, or that a new primary never had: what the server still has closes the
/// gap.
#[test]
fn a_slot_that_is_gone_leaves_no_hole_while_the_server_has_the_wal() {
    let mut record = of_small_segments().begin();
    record.insert(1);
    record.store_all();
    record.stop_stream();
    record
        .server
        .execute("select pg_drop_replication_slot('anywhen_main')");
    record.insert(2);
    record.fill_segments(3);
    record.insert(3);
    record.stream = Some(record.anywhen.stream(&record.server));
    record.store_all();
    record.stop_stream();
    let system = system_dir(&record.anywhen, &record.server);
    assert!(assert_wal_of(&system, &[record.server.data()], 1).segments >= 3);
    assert_no_gap(&system, 1);
    assert_eq!(holes(&record), 0);
    assert_eq!(record.rows_at("latest", &[], End::Promoted), "0,1,2,3");
}

/// What is gone from the server is a hole, and more WAL is better than less: the slot is made again, and
/// the stream goes on with what there is.
#[test]
fn a_slot_that_is_gone_with_its_wal_is_made_again_and_the_hole_is_said() {
    let mut record = of_small_segments().begin();
    record.store_all();
    record.stop_stream();
    record
        .server
        .execute("select pg_drop_replication_slot('anywhen_main')");
    recycle(&record);
    record.fill_segments(3);
    record.server.execute("checkpoint");
    record.stream = Some(record.anywhen.stream(&record.server));
    record.store_all();
    let said = record.stream.as_ref().unwrap().stderr();
    assert!(said.contains("hint: take a backup now"), "{said}");
    assert_eq!(holes(&record), 1);
    let slot = "select count(*) from pg_replication_slots where slot_name = 'anywhen_main'";
    assert_eq!(record.server.value(slot), "1");
    record.anywhen.backup(&record.server);
    record.insert(1);
    record.store_all();
    assert_eq!(record.rows_at("latest", &[], End::Promoted), "0,1");
}

/// A slot on a standby keeps WAL from before its promotion: the stream that comes after it reads the end
/// of the old timeline first, and the history of the new one before its WAL.
#[test]
fn the_switch_of_a_timeline_is_followed_through_the_slot() {
    let mut record = of_small_segments();
    record.insert(0);
    record.anywhen.backup(&record.server);
    let target = record.target("second");
    record.anywhen.restore(&target, &["--standby"]);
    write_setting(
        &target,
        &format!("primary_conninfo = '{}'", record.server.conninfo()),
    );
    let mut standby = Server::at(&record.ground, &target);
    standby.start();
    standby.execute("select pg_create_physical_replication_slot('anywhen_main', true)");
    record.insert(1);
    record.fill_segments(2);
    record.insert(2);
    let written = record.server.value("select pg_current_wal_flush_lsn()");
    let replayed = format!("select pg_last_wal_replay_lsn() >= '{written}'");
    crate::ground::eventually("the standby follows", || standby.value(&replayed) == "t");
    record.server.kill9();
    let last_of_old = stored_name(&written, 1);
    standby.promote();
    standby.execute("insert into moments values (3)");
    standby.execute("select pg_switch_wal()");
    standby.execute("insert into moments values (4)");
    let mut stream = record.anywhen.stream(&standby);
    stream.store_all(&standby);
    stream.stop();
    let system = system_dir(&record.anywhen, &standby);
    let compared = assert_wal_of(&system, &[record.server.data(), standby.data()], 1);
    assert!(
        compared.segments >= 3 && compared.pieces > 0,
        "{compared:?}"
    );
    assert!(system.join("wal/00000002.history").exists());
    let first_of_new = last_of_old.replacen("00000001", "00000002", 1);
    assert!(
        stored_segments(&system).contains_key(&first_of_new),
        "{first_of_new}"
    );
    let target = record.target("latest");
    record.anywhen.restore(&target, &[]);
    assert_eq!(
        restored_moments(&record.ground, &target, End::Promoted),
        "0,1,2,3,4"
    );
}

/// The segment of 1 MiB that holds `lsn`.
fn stored_name(lsn: &str, timeline: u32) -> String {
    let (high, low) = lsn.split_once('/').unwrap();
    let part = |text: &str| u64::from_str_radix(text, 16).unwrap();
    format!("{timeline:08X}{:08X}{:08X}", part(high), part(low) >> 20)
}
