//! What is stored behind a break must not hide it: the server recycles what it believes we have.

use std::fs;

use crate::ground::eventually;
use crate::judge::End;
use crate::objects::{assert_equal_to_server, assert_no_gap, system_dir};
use crate::record::Record;
use crate::server::{Options, Shutdown, value, write_setting};

/// A backup stores the WAL that it needs by itself. A stream that went on behind that would never ask
/// for what lies before, and its first report would let the server recycle it.
#[test]
fn a_backup_taken_while_the_stream_was_down_hides_no_break() {
    let mut record = Record::begun(&Options {
        wal_segment_mib: 1,
        ..Options::default()
    });
    let backups = record.anywhen.json(&["list"]);
    let first = backups["backups"][0]["id"].as_str().unwrap().to_owned();
    record.store_all();
    record.stop_stream();
    record.insert(1);
    record.fill_segments(3);
    record.anywhen.backup(&record.server);
    record.insert(2);
    record.stream = Some(record.anywhen.stream(&record.server));
    record.insert(3);
    record.store_all();
    let system = system_dir(&record.anywhen, &record.server);
    assert!(assert_equal_to_server(&system, record.server.data()) > 3);
    assert_no_gap(&system, 1);
    let status = record.anywhen.json(&["status"]);
    assert_eq!(status["clusters"][0]["holes"].as_array().unwrap().len(), 0);
    let rows = record.rows_at("latest", &["--backup", &first], End::Promoted);
    assert_eq!(rows, "0,1,2,3");
}

/// A disk that is taken away leaves an empty mount point: WAL that is acknowledged there is hidden when
/// the disk comes back.
#[test]
fn a_repository_that_was_taken_away_is_not_made_anew() {
    let mut record = Record::begun(&Options::default());
    record.store_all();
    let repository = record.anywhen.repository().to_owned();
    let aside = record.target("aside");
    rustix::fs::rename(&repository, &aside).unwrap();
    // as open to everyone as a mount point may be
    record.ground.make_dir("repository", 0o777);
    record.insert(1);
    let mut sql = record.server.sql();
    let written = value(&mut sql, "select pg_current_wal_flush_lsn()");
    let sent = format!("select count(*) from pg_stat_replication where sent_lsn >= '{written}'");
    eventually("the server has sent the commit", || {
        value(&mut sql, &sent) == "1"
    });
    eventually("the stream says that the repository is not there", || {
        record
            .stream
            .as_ref()
            .unwrap()
            .stderr()
            .contains("another folder")
    });
    assert_eq!(fs::read_dir(&repository).unwrap().count(), 0);
    fs::remove_dir(&repository).unwrap();
    rustix::fs::rename(&aside, &repository).unwrap();
    record.store_all();
    assert_eq!(record.rows_at("latest", &[], End::Promoted), "0,1");
}

/// With `wal_level=minimal` a server leaves changes out of its WAL, and recovery refuses to go on there:
/// the window ends, and a restore says so before it writes.
#[test]
fn a_time_of_minimal_wal_ends_the_window() {
    let mut record = Record::begun(&Options::default());
    record.store_all();
    let moment = record.insert(1);
    record.store_all();
    record.stop_stream();
    record
        .anywhen
        .run_on(&record.server, &["slot", "drop"])
        .succeeded();
    for (level, senders) in [("minimal", 0), ("replica", 10)] {
        record.server.stop(Shutdown::Fast);
        let data = record.server.data().to_owned();
        write_setting(&data, &format!("wal_level = {level}"));
        write_setting(&data, &format!("max_wal_senders = {senders}"));
        record.server.start();
        record.insert(if senders == 0 { 2 } else { 3 });
    }
    record.stream = Some(record.anywhen.stream(&record.server));
    record.store_all();
    let said = record.stream.as_ref().unwrap().stderr();
    assert!(said.contains("wal_level=minimal"), "{said}");
    let target = record.target("refused");
    record
        .anywhen
        .restore_refused(&target, &[], 5)
        .says(&["wal_level=minimal", "hint"]);
    let rows = record.rows_at("before", &["--to-lsn", &moment.commit_lsn], End::Paused);
    assert_eq!(rows, "0,1");
    // a backup opens a new window, and status shows where
    record.anywhen.backup(&record.server);
    let behind = record.insert(4);
    record.store_all();
    let status = record.anywhen.json(&["status"]);
    let windows = status["clusters"][0]["windows"].as_array().unwrap();
    let latest = |at: usize| windows[at]["latest"].as_str().unwrap();
    assert_eq!(windows.len(), 2, "{status:#}");
    assert!(latest(0) < behind.committed.as_str(), "{status:#}");
    assert!(latest(1) >= behind.committed.as_str(), "{status:#}");
    assert_eq!(record.rows_at("after", &[], End::Promoted), "0,1,2,3,4");
    let rows = record.rows_at("window", &["--to", latest(1)], End::Paused);
    assert_eq!(rows, "0,1,2,3,4");
    // its hint is followed: it is not given again
    let shown = record.anywhen.run(&["status"]).succeeded().stdout;
    assert!(
        shown.contains("HOLE") && shown.contains("a later backup"),
        "{shown}"
    );
}
