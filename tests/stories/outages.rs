//! The repository cannot be written for a while: nothing is acknowledged that is not stored, nobody waits
//! for it, and nothing is missing afterwards.

use std::time::Duration;

use crate::ground::eventually;
use crate::judge::End;
use crate::objects::{assert_equal_to_server, assert_no_gap, system_dir};
use crate::record::Record;
use crate::server::{Options, Shutdown, value};

/// Promise 2: the flush position that the server sees is durable in the repository, always.
#[test]
fn nothing_is_acknowledged_while_it_cannot_be_stored() {
    let mut record = Record::begun(&Options::default());
    record.store_all();
    record.anywhen.set_writable(false);
    record.insert(1);
    let mut sql = record.server.sql();
    let written = value(&mut sql, "select pg_current_wal_flush_lsn()");
    let at_least = |column: &str| {
        format!("select count(*) from pg_stat_replication where {column} >= '{written}'")
    };
    eventually("the server has sent the commit", || {
        value(&mut sql, &at_least("sent_lsn")) == "1"
    });
    // several flush intervals in which it could be acknowledged
    for _ in 0..20 {
        let acknowledged = value(&mut sql, &at_least("flush_lsn"));
        assert_eq!(acknowledged, "0", "acknowledged, and stored nowhere");
        value(&mut sql, "select pg_sleep(0.1)");
    }
    record.anywhen.set_writable(true);
    record.store_all();
    assert_eq!(record.rows_at("latest", &[], End::Promoted), "0,1");
    // an outage of hours is told when it begins, now and then, and when it is over
    let said = record.stream.as_ref().unwrap().stderr();
    let lines = |word: &str| said.lines().filter(|line| line.contains(word)).count();
    assert_eq!(lines("trying again. hint: "), 1, "{said}");
    assert_eq!(lines("answers again, after"), 1, "{said}");
}

/// Promise 6: a server that is told to stop waits for its last WAL at most `shutdown_wait`.
#[test]
fn a_shutdown_does_not_wait_for_a_repository_that_is_away() {
    let mut record = Record::begun(&Options::default());
    record.store_all();
    record.anywhen.set_writable(false);
    record.insert(1);
    let took = record.server.stop(Shutdown::Fast);
    assert!(took < Duration::from_secs(20), "the shutdown took {took:?}");
    record.anywhen.set_writable(true);
    record.server.start();
    record.fill_segments(1);
    record.store_all();
    let system = system_dir(&record.anywhen, &record.server);
    assert!(assert_equal_to_server(&system, record.server.data()) > 0);
    assert_no_gap(&system, 16);
    assert_eq!(record.rows_at("latest", &[], End::Promoted), "0,1");
}

/// An end that lost something must not look like one that did not.
#[test]
fn a_stop_that_cannot_store_all_is_no_success_and_names_what_is_missing() {
    let mut record = Record::of_server(&Options::default());
    record.insert(0);
    let arguments = ["--flush-interval", "200ms", "--stop-timeout", "2s"];
    let mut stream = record.anywhen.stream_with(&record.server, &arguments);
    record.anywhen.backup(&record.server);
    stream.store_all(&record.server);
    record.anywhen.set_writable(false);
    record.insert(1);
    // what the server has sent need not have been received
    eventually("the stream has tried to store the commit", || {
        stream.stderr().contains("trying again. hint: ")
    });
    let ended = stream.stop_in_vain();
    assert!(matches!(ended.code, Some(1..=5 | 143)), "{ended}");
    ended.says(&["not stored", "0/"]);

    // the server kept it for the slot
    record.anywhen.set_writable(true);
    record.stream = Some(record.anywhen.stream(&record.server));
    record.store_all();
    assert_eq!(record.rows_at("latest", &[], End::Promoted), "0,1");
}
