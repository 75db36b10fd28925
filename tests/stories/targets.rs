//! Every kind of target gives exactly the rows that belong to it.

use crate::ground::{Programs, eventually};
use crate::judge::{End, assert_sound, moments, start_restored};
use crate::record::Record;
use crate::server::{Options, Shutdown, write_setting};

#[test]
fn restores_to_a_time_between_two_commits() {
    let (record, known) = Record::with_four_rows();
    let after_1 = &known[0].after;
    assert_eq!(
        record.rows_at("one", &["--to-time", after_1], End::Paused),
        "0,1"
    );
    let after_3 = &known[2].after;
    assert_eq!(
        record.rows_at("three", &["--to", after_3], End::Paused),
        "0,1,2,3"
    );
}

/// A commit is in or out by its own stamp, to the microsecond: an operator who names the bad
/// transaction's time with `--exclusive` must not get the bad transaction.
#[test]
fn a_commit_at_the_very_target_time_is_in_and_with_exclusive_out() {
    let (record, known) = Record::with_four_rows();
    let time = &known[1].committed;
    assert_eq!(
        record.rows_at("in", &["--to-time", time], End::Paused),
        "0,1,2"
    );
    let exclusive = ["--to-time", time, "--exclusive"];
    assert_eq!(record.rows_at("out", &exclusive, End::Paused), "0,1");
}

#[test]
fn restores_to_an_lsn_with_the_record_that_starts_there_or_without() {
    let (record, known) = Record::with_four_rows();
    let lsn = &known[1].commit_lsn;
    assert_eq!(
        record.rows_at("in", &["--to-lsn", lsn], End::Paused),
        "0,1,2"
    );
    let exclusive = ["--to-lsn", lsn, "--exclusive"];
    assert_eq!(record.rows_at("out", &exclusive, End::Paused), "0,1");
}

#[test]
fn restores_to_a_transaction_with_it_or_without() {
    let (record, known) = Record::with_four_rows();
    let xid = &known[2].xid;
    assert_eq!(
        record.rows_at("in", &["--to-xid", xid], End::Paused),
        "0,1,2,3"
    );
    let exclusive = ["--to-xid", xid, "--exclusive"];
    assert_eq!(record.rows_at("out", &exclusive, End::Paused), "0,1,2");
}

#[test]
fn restores_to_a_named_point() {
    let (record, _) = Record::with_four_rows();
    assert_eq!(
        record.rows_at("two", &["--to-name", "after 2"], End::Paused),
        "0,1,2"
    );
    // who remembers the name almost is told the one that there is
    let target = record.target("refused");
    let said = |name: &str| {
        let refused = ["--to-name", name, "--json"];
        let refused = record.anywhen.restore_refused(&target, &refused, 3);
        let hint = refused.document()["error"]["hint"].clone();
        hint.as_str().unwrap_or_default().to_owned()
    };
    assert!(said("After_2").contains(r#"did you mean "after 2""#));
    assert!(said("release of may").contains("there is"));
}

/// The first consistent moment is the end of the backup, whatever was committed since.
#[test]
fn immediate_restores_what_the_backup_holds_and_nothing_later() {
    let (record, _) = Record::with_four_rows();
    assert_eq!(
        record.rows_at("immediate", &["--immediate"], End::Paused),
        "0"
    );
}

/// The restored server is writable, every row and index of it is sound, and recovery stopped because
/// all was replayed, not because a fetch failed.
#[test]
fn latest_restores_every_commit_and_ends_recovery() {
    let (record, _) = Record::with_four_rows();
    let target = record.target("latest");
    record.anywhen.restore(&target, &[]);
    let server = start_restored(&record.ground, &target, End::Promoted);
    assert_eq!(moments(&server), "0,1,2,3,4");
    server.execute("insert into moments values (5)");
    assert_sound(&server, "postgres");
    assert_eq!(
        server.value("select timeline_id from pg_control_checkpoint()"),
        "2"
    );
}

/// A backup is complete with the WAL that it needs: where no stream ever ran, it restores.
#[test]
fn a_backup_without_a_stream_restores() {
    let record = Record::of_server(&Options::default());
    record.insert(0);
    record.anywhen.backup(&record.server);
    record.insert(1);
    assert_eq!(
        record.rows_at("immediate", &["--immediate"], End::Paused),
        "0"
    );
    assert_eq!(record.rows_at("latest", &[], End::Promoted), "0");
}

/// `--action` decides what the server does at its target.
#[test]
fn promote_and_shutdown_are_done_at_the_target_when_asked() {
    let (record, known) = Record::with_four_rows();
    let time = &known[1].after;
    let promote = ["--to-time", time, "--action", "promote"];
    assert_eq!(record.rows_at("promoted", &promote, End::Promoted), "0,1,2");

    let target = record.target("shut down");
    record
        .anywhen
        .restore(&target, &["--to-time", time, "--action", "shutdown"]);
    let mut server = crate::server::Server::at(&record.ground, &target);
    server.launch();
    server.ended();
    assert!(
        server.log().contains("shutdown at recovery target"),
        "{}",
        server.log()
    );
}

/// `--replay` leaves a stopped cluster that stands at the target already.
#[test]
fn replay_reports_the_moment_that_it_reached() {
    let (record, known) = Record::with_four_rows();
    let target = record.target("replayed");
    let bin = Programs::get().bin().to_str().unwrap();
    let to = [
        "restore",
        "-D",
        target.to_str().unwrap(),
        "--to-time",
        &known[1].after,
    ];
    let report = record
        .anywhen
        .json(&[&to[..], &["--replay", "--pg-bin", bin]].concat());
    assert!(report["reached"]["lsn"].is_string(), "{report}");
    assert_eq!(report["target"]["kind"], "time", "{report}");
    assert!(
        !target.join("postmaster.pid").exists(),
        "a server still runs there"
    );
    let mut server = start_restored(&record.ground, &target, End::Paused);
    assert_eq!(moments(&server), "0,1,2");
    server.stop(Shutdown::Fast);
}

/// Settings that were changed in their file and not in the server that runs, or given on its command line, are
/// lower in what is restored: a server in recovery refuses to go on with them, and nobody knows why.
#[test]
fn settings_that_are_too_low_are_raised_and_what_else_ends_a_replay_is_explained() {
    let mut record = Record::of_server(&Options::default());
    let low = "max_connections = 10\nmax_locks_per_transaction = 32\n";
    write_setting(record.server.data(), low);
    record = record.begin();
    let known = record.insert(1);
    record.store_all();
    let bin = Programs::get().bin().to_str().unwrap().to_owned();
    let replay = |name: &str| {
        let target = record.target(name);
        let fixed = [
            "restore",
            "--replay",
            "--pg-bin",
            &bin,
            "-D",
            target.to_str().unwrap(),
        ];
        record
            .anywhen
            .run(&[&fixed[..], &["--to-lsn", &known.commit_lsn]].concat())
    };
    replay("raised").succeeded();

    let library = "shared_preload_libraries = 'not_on_this_machine'\n";
    write_setting(record.server.data(), library);
    record.anywhen.backup(&record.server);
    let backup = record.anywhen.json(&["list"])["backups"][1]["id"].clone();
    let target = record.target("explained");
    let fixed = [
        "restore",
        "--replay",
        "--pg-bin",
        &bin,
        "-D",
        target.to_str().unwrap(),
    ];
    let ended = record
        .anywhen
        .run(&[&fixed[..], &["--backup", backup.as_str().unwrap()]].concat());
    ended.failed_with(1);
    ended.says(&[
        "not_on_this_machine",
        "is not installed here",
        "starts again with",
        "pg_ctl",
    ]);
    assert!(target.join("PG_VERSION").exists(), "{ended}");
}

/// Promise 3: what `status` calls the latest moment can be restored, and comes to hold all that was
/// committed before, also when nothing more is written.
#[test]
fn what_status_calls_latest_is_reached_by_restore() {
    let (mut record, known) = Record::with_four_rows();
    let mut latest = String::new();
    eventually("status's latest moment passes the last commit", || {
        let status = record.anywhen.json(&["status"]);
        let windows = status["clusters"][0]["windows"].as_array().unwrap();
        latest = windows.last().unwrap()["latest"]
            .as_str()
            .unwrap()
            .to_owned();
        latest >= known[3].committed
    });
    record.stop_stream();
    assert_eq!(
        record.rows_at("latest", &["--to-time", &latest], End::Paused),
        "0,1,2,3,4"
    );
}

/// A plan is free: nothing is written, and it names what it would do.
#[test]
fn dry_run_writes_nothing() {
    let (record, known) = Record::with_four_rows();
    let target = record.target("planned");
    let plan = record
        .anywhen
        .restore(&target, &["--to-time", &known[1].after, "--dry-run"]);
    assert_eq!(plan["dry_run"], true, "{plan}");
    assert!(!target.exists(), "a plan has made the directory");
    assert!(plan["target"]["resolved_lsn"].is_string(), "{plan}");
}
