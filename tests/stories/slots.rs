//! The replication slot: what the server keeps for us, and for how long.

use crate::ground::eventually;
use crate::judge::End;
use crate::record::Record;
use crate::server::{Options, Shutdown, write_setting};

/// A cluster whose slot is forgotten fills its disk: the slot can be seen, and dropped.
#[test]
fn the_slot_can_be_shown_and_dropped() {
    let mut record = Record::begun(&Options::default());
    let slots = "select coalesce(string_agg(slot_name, ','), 'none') from pg_replication_slots";
    assert_eq!(record.server.value(slots), "anywhen_main");
    let shown = record
        .anywhen
        .run_on(&record.server, &["slot", "show"])
        .succeeded();
    assert!(shown.stdout.contains("anywhen_main"), "{shown}");
    record.stop_stream();
    record
        .anywhen
        .run_on(&record.server, &["slot", "drop"])
        .succeeded();
    assert_eq!(record.server.value(slots), "none");
}

/// A dead archiver with an unlimited slot fills the primary: that is said while there is time.
#[test]
fn an_unlimited_slot_is_warned_of() {
    let record = Record::begun(&Options::default());
    let said = record.stream.as_ref().unwrap().stderr();
    assert!(said.contains("max_slot_wal_keep_size"), "{said}");
}

/// A slot that somebody made without reserving WAL protects nothing until it does.
#[test]
fn a_slot_that_reserves_nothing_yet_is_put_to_use() {
    let mut record = Record::of_server(&Options::default());
    record
        .server
        .execute("select pg_create_physical_replication_slot('anywhen_main')");
    record.insert(0);
    record.stream = Some(record.anywhen.stream(&record.server));
    record.store_all();
    let reserved = "select restart_lsn is not null from pg_replication_slots";
    assert_eq!(record.server.value(reserved), "t");
}

/// A server without slots is streamed from without one, and whoever is refused is told so. A slot that
/// is there for the first time on a server that was streamed without is no dropped one.
#[test]
fn a_server_without_slots_is_streamed_from_without_one() {
    let settings = "max_replication_slots = 0\n".to_owned();
    let mut record = Record::of_server(&Options {
        settings,
        ..Options::default()
    });
    let refused = record.anywhen.run_on(&record.server, &["stream"]);
    refused.failed_with(2);
    refused.says(&["max_replication_slots", "hint", "--no-slot"]);
    let refused = record
        .anywhen
        .run_on(&record.server, &["stream", "--slot", "Bad-Slot"]);
    refused.failed_with(2);
    refused.says(&["Bad-Slot", "hint", "lower-case letters"]);
    record.insert(0);
    let mut stream = record.anywhen.stream_with(&record.server, &["--no-slot"]);
    stream.store_all(&record.server);
    let said = stream.stop();
    assert!(
        said.contains("all that was received is stored, up to 0/"),
        "{said}"
    );

    record.server.stop(Shutdown::Fast);
    write_setting(record.server.data(), "max_replication_slots = 4");
    record.server.start();
    record.stream = Some(record.anywhen.stream(&record.server));
    record.store_all();
    let said = record.stream.as_ref().unwrap().stderr();
    assert!(
        said.contains("went without it or by another name"),
        "{said}"
    );
}

/// A stream that was killed leaves its slot in use until the server notices: the next one says what it
/// waits for, and goes on by itself.
#[test]
fn a_stream_waits_for_a_slot_in_use_and_says_so() {
    let mut record = Record::begun(&Options::default());
    let pid = record
        .server
        .value("select active_pid from pg_replication_slots");
    let mut second = record.anywhen.command(&["stream"]);
    second.args(["-d", &record.server.conninfo()]);
    let mut second = record.anywhen.launch(second);
    eventually("the second stream says who has the slot", || {
        assert_eq!(second.ended(), None, "{}", second.stderr());
        let said = second.stderr();
        said.contains("anywhen_main") && said.contains(&pid)
    });
    record.stop_stream();
    let taken_over = format!("select count(*) from pg_replication_slots where active_pid <> {pid}");
    eventually("the second stream takes the slot", || {
        record.server.value(&taken_over) == "1"
    });
}

/// Without a slot the server keeps what it likes; what it kept is streamed.
#[test]
fn a_stream_without_a_slot_leaves_none() {
    let mut record = Record::of_server(&Options::default());
    record.insert(0);
    let arguments = ["--no-slot", "--flush-interval", "200ms"];
    record.stream = Some(record.anywhen.stream_with(&record.server, &arguments));
    record.anywhen.backup(&record.server);
    record.insert(1);
    record.store_all();
    assert_eq!(
        record
            .server
            .value("select count(*) from pg_replication_slots"),
        "0"
    );
    assert_eq!(record.rows_at("latest", &[], End::Promoted), "0,1");
}

/// The server has removed WAL that no repository holds. What is lost is lost: it is said, it shows as a
/// hole, and it does not keep what comes after from being protected again.
#[test]
fn a_slot_that_the_server_gave_up_is_said_to_be_lost() {
    let mut record = Record::begun(&Options {
        wal_segment_mib: 1,
        ..Options::default()
    });
    record.store_all();
    record.stop_stream();
    for mean in [
        "wal_keep_size = 0",
        "max_slot_wal_keep_size = '1MB'",
        "max_wal_size = '2MB'",
        "min_wal_size = '2MB'",
    ] {
        record.server.execute(&format!("alter system set {mean}"));
    }
    record.server.execute("select pg_reload_conf()");
    for _ in 0..4 {
        record.fill_segments(3);
        record.server.execute("checkpoint");
    }
    let state = "select wal_status from pg_replication_slots";
    assert_eq!(record.server.value(state), "lost");
    let strict = ["stream", "--strict"];
    let ended = record.anywhen.run_on(&record.server, &strict);
    ended.failed();
    ended.says(&["anywhen_main", "gave up", "slot drop", "backup"]);
    assert_eq!(record.server.value(state), "lost");

    // more WAL is better than less: what is missing is a hole
    record.server.execute("alter system reset all");
    record.server.execute("select pg_reload_conf()");
    record.stream = Some(record.anywhen.stream(&record.server));
    record.anywhen.backup(&record.server);
    record.insert(1);
    record.store_all();
    let status = record.anywhen.json(&["status"]);
    let holes = status["clusters"][0]["holes"].as_array().unwrap().len();
    assert_eq!(holes, 1, "{status}");
    assert_eq!(record.rows_at("latest", &[], End::Promoted), "0,1");
}

/// The disk of the repository is not mounted: the stream begins a new one below it, and the server removes
/// what the real one then lacks.
#[test]
fn a_new_repository_with_a_slot_that_was_there_is_said() {
    let mut record = Record::begun(&Options::default());
    record.store_all();
    let said = record.stream.as_ref().unwrap().stderr();
    assert!(!said.contains("the repository is new"), "{said}");
    record.stop_stream();
    record.remove_repository();
    let stream = record.anywhen.stream(&record.server);
    let said = stream.stderr();
    assert!(
        said.contains("the repository is new") && said.contains("anywhen_main"),
        "{said}"
    );
    stream.stop();
}
