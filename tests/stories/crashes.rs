//! `kill -9` at any moment: nothing is half done, and the next start goes on.

use rustix::process::Signal;

use crate::chance::{Chance, rounds};
use crate::ground::eventually;
use crate::judge::End;
use crate::objects::{assert_equal_to_server, assert_no_gap, system_dir};
use crate::record::Record;
use crate::server::{Options, value};

/// What was acknowledged to the server before the kill is never asked of it again and never missing, and
/// what was not is sent again: no hole, no second history.
#[test]
fn a_killed_stream_goes_on_without_a_hole() {
    let mut record = Record::begun(&Options {
        wal_segment_mib: 1,
        ..Options::default()
    });
    let mut chance = Chance::new();
    let rounds = rounds(3);
    for round in 1..=rounds {
        record.insert(round);
        record.fill_segments(1);
        // the kill falls before, while or after the stream stores this
        let wait_ms = chance.below(400);
        record
            .server
            .execute(&format!("select pg_sleep({wait_ms} / 1000.0)"));
        record.stream.take().unwrap().kill9();
        record.fill_segments(1);
        record.stream = Some(record.anywhen.stream(&record.server));
    }
    record.insert(rounds + 1);
    record.store_all();
    let system = system_dir(&record.anywhen, &record.server);
    let compared = assert_equal_to_server(&system, record.server.data());
    assert!(
        compared >= 2 * rounds as usize,
        "{compared} segments were compared"
    );
    assert_no_gap(&system, 1);
    let expected: Vec<String> = (0..=rounds + 1).map(|id| id.to_string()).collect();
    assert_eq!(
        record.rows_at("latest", &[], End::Promoted),
        expected.join(",")
    );
}

/// Half a backup must never be taken for one; it must not be in the way of the next either.
#[test]
fn a_killed_backup_is_never_listed_and_the_next_one_works() {
    let record = Record::of_server(&Options::default());
    record.insert(0);
    let mut chance = Chance::new();
    for _ in 0..rounds(1) {
        let mut slow =
            record
                .anywhen
                .command(&["backup", "--checkpoint", "fast", "--max-rate", "4M"]);
        slow.args(["-d", &record.server.conninfo()]);
        let mut backup = record.anywhen.launch(slow);
        let sent = chance.below(8 << 20);
        let half_done = format!(
            "select count(*) from pg_stat_progress_basebackup
             where phase = 'streaming database files' and backup_streamed > {sent}"
        );
        let mut sql = record.server.sql();
        eventually("the backup is half done", || {
            if let Some(status) = backup.ended() {
                panic!("the backup ended with {status}: {}", backup.stderr());
            }
            value(&mut sql, &half_done) == "1"
        });
        drop(backup);
        let list = record.anywhen.json(&["list"]);
        assert_eq!(list["backups"].as_array().map(Vec::len), Some(0), "{list}");
        let refused = record.target("refused");
        record.anywhen.restore_refused(&refused, &[], 3);
    }
    record.insert(1);
    record.anywhen.backup(&record.server);
    assert_eq!(
        record.rows_at("immediate", &["--immediate"], End::Paused),
        "0,1"
    );
}

/// A restore that was killed leaves a directory that is refused, not one that is continued by chance.
#[test]
fn a_directory_half_restored_does_not_start_as_if_it_were_whole() {
    let record = Record::of_server(&Options::default());
    record.insert(0);
    record.anywhen.backup(&record.server);
    let target = record.target("half");
    let restore = record
        .anywhen
        .command(&["restore", "-D", target.to_str().unwrap()]);
    let mut restore = record.anywhen.launch(restore);
    eventually("the restore has begun", || {
        restore.ended().is_some()
            || target.join("base").exists()
            || target.join("PG_VERSION").exists()
    });
    let whole = restore.ended().is_some_and(|status| status.success());
    drop(restore);
    // pg_control makes a data directory one that starts: it comes last
    assert!(
        whole || !target.join("global/pg_control").exists() || target.join("backup_label").exists(),
        "half a directory that a server would start in"
    );
    let again = record
        .anywhen
        .run(&["restore", "-D", target.to_str().unwrap()]);
    again.failed();
    again.says(&[target.to_str().unwrap()]);
}

/// Ctrl-C and `systemctl stop` end a backup at once, and leave none.
#[test]
fn a_backup_that_is_told_to_stop_ends_by_the_signal_and_is_not_listed() {
    let record = Record::of_server(&Options::default());
    for (signal, code) in [(Signal::TERM, 143), (Signal::INT, 130)] {
        let mut slow = record.anywhen.command(&["backup", "--max-rate", "1M"]);
        slow.args(["-d", &record.server.conninfo()]);
        let mut backup = record.anywhen.launch(slow);
        let streaming =
            "select count(*) from pg_stat_progress_basebackup where backup_streamed > 0";
        let mut sql = record.server.sql();
        eventually("the backup streams", || value(&mut sql, streaming) == "1");
        backup.signal(signal);
        let status = backup.end("the backup that was told to stop");
        assert_eq!(status.code(), Some(code), "{}", backup.stderr());
        let any = "select count(*) from pg_stat_progress_basebackup";
        eventually("the server has noticed", || value(&mut sql, any) == "0");
        let list = record.anywhen.json(&["list"]);
        assert_eq!(list["backups"].as_array().map(Vec::len), Some(0), "{list}");
    }
}
