//! What PostgreSQL's own recovery tests (`src/test/recovery/t`) check of archives, by their names, where no
//! other story does.

use std::fs;

use crate::judge::{End, moments, start_restored};
use crate::record::Record;
use crate::server::{Options, Server, Shutdown};

fn small_segments() -> Options {
    Options {
        wal_segment_mib: 1,
        ..Options::default()
    }
}

/// `026_overwrite_contrecord`: a record that crosses into another segment, of which a crash left the beginning
/// alone. The server goes on behind it, and so must whoever replays that WAL.
#[test]
fn a_record_that_a_crash_broke_off_is_passed_over() {
    let mut record = Record::begun(&small_segments());
    record.store_all();
    record.stop_stream();
    let name = "select pg_walfile_name(pg_current_wal_insert_lsn())";
    let last = loop {
        let before = record.server.value(name);
        record
            .server
            .execute("select pg_logical_emit_message(true, '026', repeat('xyzxz', 20000))");
        let after = record.server.value(name);
        if before != after {
            break after;
        }
    };
    record.server.stop(Shutdown::Immediate);
    fs::remove_file(record.server.data().join("pg_wal").join(last)).unwrap();
    record.server.start();
    record.stream = Some(record.anywhen.stream(&record.server));
    record.insert(1);
    record.fill_segments(2);
    record.store_all();

    let status = record.anywhen.json(&["status"]);
    let holes = status["clusters"][0]["holes"].as_array().map(Vec::len);
    assert_eq!(holes, Some(0), "{status}");
    let target = record.target("restored");
    record.anywhen.restore(&target, &["--check-wal"]);
    let restored = start_restored(&record.ground, &target, End::Promoted);
    assert_eq!(moments(&restored), "0,1");
    let log = restored.log();
    assert!(
        log.contains("successfully skipped missing contrecord"),
        "{log}"
    );
}

/// `045_archive_restartpoint`, and a crash: a recovery that was killed behind a restart point goes on from
/// there, with the same target, and fetches what comes behind.
#[test]
fn a_recovery_that_is_killed_goes_on_from_its_restart_point() {
    let mut record = Record::begun(&small_segments());
    let mut known = Vec::new();
    for id in 1..=3 {
        record.fill_segments(4);
        known.push(record.insert(id));
        record.server.execute("checkpoint");
    }
    record.store_all();
    let target = record.target("restored");
    let to = ["--to-lsn", &known[1].commit_lsn];
    record.anywhen.restore(&target, &to);
    let mut server = Server::at(&record.ground, &target);
    server.start();
    server.wait_until_paused();
    assert_eq!(moments(&server), "0,1,2");
    let redo = "select redo_lsn from pg_control_checkpoint()";
    let begun = server.value(redo);
    server.execute("checkpoint");
    assert_ne!(server.value(redo), begun, "no restart point was written");
    server.kill9();
    server.start();
    server.wait_until_paused();
    assert_eq!(moments(&server), "0,1,2");
    server.stop(Shutdown::Fast);
}
