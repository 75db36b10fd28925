//! A bucket that dies, lies and dawdles: nothing acknowledged is lost, nothing is half there, and what
//! cannot be done is said.

use std::io::Write as _;
use std::time::Duration;

use serde_json::Value;

use crate::chance::{Chance, rounds, setting};
use crate::ground::{Ground, Running, eventually};
use crate::judge::{End, restored_moments};
use crate::objects::{assert_all_whole, assert_equal_to_server, assert_no_gap, system_dir};
use crate::record::Record;
use crate::server::{Options, value};

fn record(options: &Options) -> Record {
    Record::on(Ground::on_s3(), options)
}

/// The server recycles what it was told is flushed: an endpoint that dies must not take any of it along,
/// nor leave half an object that later looks like a whole one.
#[test]
fn an_endpoint_killed_under_a_stream_loses_nothing() {
    let mut record = record(&Options {
        wal_segment_mib: 1,
        ..Options::default()
    })
    .begin();
    let mut chance = Chance::new();
    let rounds = rounds(3);
    for round in 1..=rounds {
        record.insert(2 * round - 1);
        record.fill_segments(1);
        // the kill falls before, while or after the stream stores this
        wait_ms(&record, chance.below(400));
        record.ground.endpoint_mut().kill9();
        let acknowledged = flushed(&record);
        record.insert(2 * round);
        wait_ms(&record, 300);
        // an answer may have been on its way; what was committed since cannot be acknowledged
        let end = record.server.value("select pg_current_wal_flush_lsn()");
        let now = flushed(&record);
        assert_ne!(
            now, end,
            "acknowledged, and stored nowhere; before: {acknowledged}"
        );
        // sometimes the archiver dies too, and has only the bucket to go by
        if chance.below(2) == 0 {
            record.stream.take().unwrap().kill9();
            record.ground.endpoint_mut().go_on(&[]);
            record.stream = Some(record.anywhen.stream(&record.server));
        } else {
            record.ground.endpoint_mut().go_on(&[]);
        }
    }
    record.insert(2 * rounds + 1);
    record.store_all();
    let system = system_dir(&record.anywhen, &record.server);
    assert_all_whole(record.anywhen.repository());
    let compared = assert_equal_to_server(&system, record.server.data());
    assert!(
        compared >= rounds as usize,
        "{compared} segments were compared"
    );
    assert_no_gap(&system, 1);
    let expected: Vec<String> = (0..=2 * rounds + 1).map(|id| id.to_string()).collect();
    assert_eq!(
        record.rows_at("latest", &[], End::Promoted),
        expected.join(",")
    );
}

/// A backup is whole or not there, whether the endpoint came back in time or not.
#[test]
fn an_endpoint_killed_under_a_backup_leaves_a_whole_one_or_none() {
    let mut record = record(&Options::default());
    record.insert(0);
    let mut chance = Chance::new();
    let mut whole = 0;
    for round in 1..=rounds(3) {
        let mut slow =
            record
                .anywhen
                .command(&["backup", "--checkpoint", "fast", "--max-rate", "8M"]);
        slow.args(["-d", &record.server.conninfo()]);
        let mut backup = record.anywhen.launch(slow);
        let sent = chance.below(16 << 20);
        let under_way = format!(
            "select count(*) from pg_stat_progress_basebackup
             where phase = 'streaming database files' and backup_streamed > {sent}"
        );
        let mut sql = record.server.sql();
        eventually("the backup is under way", || {
            backup.ended().is_some() || value(&mut sql, &under_way) == "1"
        });
        record.ground.endpoint_mut().kill9();
        // within the time for which a request is tried again, or after it
        wait_ms(&record, chance.below(6_000));
        record.ground.endpoint_mut().go_on(&[]);
        let status = backup.end("the backup whose endpoint was killed");
        match status.code() {
            Some(0) => whole += 1,
            Some(4) => {}
            _ => panic!("round {round}: {status}: {}", backup.stderr()),
        }
        let list = record.anywhen.json(&["list"]);
        assert_eq!(
            list["backups"].as_array().map(Vec::len),
            Some(whole),
            "{list}"
        );
        assert_all_whole(record.anywhen.repository());
    }
    record.insert(1);
    record.anywhen.backup(&record.server);
    let target = record.target("latest");
    record.anywhen.restore(&target, &["--immediate"]);
    assert_eq!(
        restored_moments(&record.ground, &target, End::Paused),
        "0,1"
    );
}

/// A restore ends with the whole directory or with a failure, never with a directory that starts on half
/// of the data.
#[test]
fn an_endpoint_killed_under_a_restore_leaves_no_half_directory_that_starts() {
    let mut record = record(&Options::default());
    record.insert(0);
    record.anywhen.backup(&record.server);
    record.ground.endpoint_mut().kill9();
    let mut chance = Chance::new();
    for round in 1..=rounds(3) {
        // slow enough to be killed in the middle
        record.ground.endpoint_mut().go_on(&["--slow", "200"]);
        let target = record.target(&format!("killed-{round}"));
        let mut restore = launch_restore(&record, &target);
        wait_ms(&record, chance.below(1_500));
        record.ground.endpoint_mut().kill9();
        wait_ms(&record, chance.below(6_000));
        record.ground.endpoint_mut().go_on(&[]);
        let status = restore.end("the restore whose endpoint was killed");
        match status.code() {
            Some(0) => {
                assert_eq!(restored_moments(&record.ground, &target, End::Paused), "0");
            }
            _ => assert!(
                !target.join("global/pg_control").exists(),
                "round {round}: {status}: a server would start there: {}",
                restore.stderr()
            ),
        }
        record.ground.endpoint_mut().kill9();
    }
    record.ground.endpoint_mut().go_on(&[]);
    let again = record.rows_at("again", &["--immediate"], End::Paused);
    assert_eq!(again, "0");
}

fn launch_restore(record: &Record, target: &std::path::Path) -> Running {
    let arguments = ["restore", "-D", target.to_str().unwrap(), "--immediate"];
    record.anywhen.launch(record.anywhen.command(&arguments))
}

/// Stores answer 503 and 500, drop the connection after the work was done, and send half of a body. None
/// of it is a failure of ours, an object twice, or data.
#[test]
fn faults_of_every_kind_are_lived_through() {
    let mut record = record(&Options {
        wal_segment_mib: 1,
        ..Options::default()
    });
    record.insert(0);
    let seed = setting("ANYWHEN_SEED", 1).to_string();
    record.ground.endpoint_mut().kill9();
    record.ground.endpoint_mut().go_on(&[
        "--seed",
        &seed,
        "--slow-down",
        "3",
        "--fail-before",
        "3",
        "--fail-after",
        "3",
        "--cut",
        "3",
        "--slow",
        "20",
    ]);
    record.stream = Some(record.anywhen.stream(&record.server));
    let faults = ["slow_down", "fail_before", "fail_after", "cut", "slow"];
    let mut counts = Value::Null;
    let mut row = 0;
    eventually("every fault has occurred", || {
        row += 1;
        record.insert(row);
        record.fill_segments(1);
        record.store_all();
        record.anywhen.backup(&record.server);
        record.anywhen.json(&["status"]);
        counts = record.ground.endpoint().unwrap().counts();
        faults.iter().all(|fault| counts[fault].as_u64() > Some(0))
    });
    // past the test harness, which shows what a story prints only when it fails
    writeln!(std::io::stdout(), "seed {seed}: {counts}").unwrap();
    let expected: Vec<String> = (0..=row).map(|id| id.to_string()).collect();
    assert_eq!(
        record.rows_at("latest", &[], End::Promoted),
        expected.join(",")
    );
    record.stop_stream();
    assert_all_whole(record.anywhen.repository());
    let endpoint = record.ground.endpoint().unwrap();
    assert_eq!(endpoint.open_uploads(), 0, "an upload was left open");
    let system = system_dir(&record.anywhen, &record.server);
    assert!(assert_equal_to_server(&system, record.server.data()) > 0);
}

/// A load balancer that takes connections for a store that is gone would hold a command for ever.
#[test]
fn a_store_that_never_answers_is_unreachable() {
    let mut record = record(&Options::default());
    record.insert(0);
    record.anywhen.backup(&record.server);
    record.ground.endpoint_mut().kill9();
    record.ground.endpoint_mut().go_on(&["--half-open", "100"]);
    let mut list = record.anywhen.launch(record.anywhen.command(&["list"]));
    // a store may be silent for half a minute, and a list has pages
    let status = list.end_within(Duration::from_mins(3), "a list that nobody answers");
    assert_eq!(status.code(), Some(4), "{}", list.stderr());
    assert!(list.stderr().contains("no answer"), "{}", list.stderr());
    let counts = record.ground.endpoint().unwrap().counts();
    assert!(counts["half_open"].as_u64() > Some(0), "{counts}");
}

/// Some stores take a second create of an object and overwrite the first: written once must hold there
/// too, and the operator must know.
#[test]
fn a_store_that_ignores_conditions_is_found_out_and_used_with_care() {
    let mut record = record(&Options::default());
    record.ground.endpoint_mut().kill9();
    record.ground.endpoint_mut().go_on(&["--ignore-conditions"]);
    record.insert(0);
    record.stream = Some(record.anywhen.stream(&record.server));
    record.anywhen.backup(&record.server);
    record.insert(1);
    record.store_all();
    let said = record.stream.as_ref().unwrap().stderr();
    assert_eq!(said.matches("conditional").count(), 1, "said once: {said}");
    assert_eq!(record.rows_at("latest", &[], End::Promoted), "0,1");
}

/// Where the server's report of the stream stands.
fn flushed(record: &Record) -> String {
    record
        .server
        .value("select coalesce(max(flush_lsn)::text, 'none') from pg_stat_replication")
}

/// Lets time pass, by the server's clock, for something that is drawn by lot or must not happen.
fn wait_ms(record: &Record, wait_ms: u64) {
    record
        .server
        .execute(&format!("select pg_sleep({wait_ms} / 1000.0)"));
}
