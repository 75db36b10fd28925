//! A restored server goes on as the primary: a new timeline in the same repository.

use crate::judge::{End, moments, restored_moments, start_restored};
use crate::record::Record;
use crate::server::{Options, Shutdown};

/// After a restore the life of the cluster goes on, and both histories can be restored: the branch that
/// is alive, and the one that it left.
#[test]
fn both_histories_can_be_restored_after_a_restore_that_went_on() {
    let mut record = Record::begun(&Options::default());
    let first = record.insert(1);
    let second = record.insert(2);
    record.store_all();
    record.stop_stream();
    record.server.stop(Shutdown::Fast);

    let target = record.target("branch");
    record
        .anywhen
        .restore(&target, &["--to-time", &first.after, "--action", "promote"]);
    let branch = start_restored(&record.ground, &target, End::Promoted);
    assert_eq!(moments(&branch), "0,1");
    let mut stream = record.anywhen.stream(&branch);
    branch.execute("insert into moments values (10)");
    stream.store_all(&branch);
    stream.stop();

    let status = record.anywhen.run(&["status", "--timelines"]).succeeded();
    let (_, tree) = status.stdout.split_once("  timelines\n").unwrap();
    let lines: Vec<&str> = tree.lines().collect();
    assert!(
        lines[0].starts_with("    1, WAL 0/") && lines[0].contains("1 backup"),
        "{tree}"
    );
    assert!(lines[1].starts_with("      └ 2 from 0/"), "{tree}");
    // in the server's words: it stops at a position, whatever was asked for
    assert!(
        lines[1].contains(" (after LSN 0/") && lines[1].contains("restorable to"),
        "{tree}"
    );

    let latest = record.target("latest");
    record.anywhen.restore(&latest, &[]);
    assert_eq!(
        restored_moments(&record.ground, &latest, End::Promoted),
        "0,1,10"
    );
    let abandoned = ["--to-xid", &second.xid, "--timeline", "1"];
    assert_eq!(
        record.rows_at("abandoned", &abandoned, End::Paused),
        "0,1,2"
    );
}

/// At a fork a server reads what a prepared transaction wrote from its parent's file of the segment, which no
/// archive has: a restore that is possible must not fail for that, nor must the transaction be lost.
#[test]
fn a_transaction_that_was_prepared_across_a_fork_is_still_there() {
    let settings = "max_prepared_transactions = 5".to_owned();
    let options = Options {
        settings,
        ..Options::default()
    };
    let mut record = Record::begun(&options);
    record
        .server
        .execute("begin; insert into moments values (7); prepare transaction 'across'");
    let first = record.insert(1);
    record.insert(2);
    record.store_all();
    record.stop_stream();
    record.server.stop(Shutdown::Fast);

    let target = record.target("branch");
    let to = ["--to-time", &first.after, "--action", "promote"];
    record.anywhen.restore(&target, &to);
    let mut branch = start_restored(&record.ground, &target, End::Promoted);
    let mut stream = record.anywhen.stream(&branch);
    branch.execute("insert into moments values (10)");
    stream.store_all(&branch);
    stream.stop();
    branch.stop(Shutdown::Fast);

    let latest = record.target("latest");
    record.anywhen.restore(&latest, &[]);
    let restored = start_restored(&record.ground, &latest, End::Promoted);
    assert_eq!(moments(&restored), "0,1,10");
    restored.execute("commit prepared 'across'");
    assert_eq!(moments(&restored), "0,1,7,10");
}

/// A backup taken on the new timeline needs nothing of the old one.
#[test]
fn a_backup_of_a_promoted_server_restores() {
    let mut record = Record::begun(&Options::default());
    let first = record.insert(1);
    record.insert(99);
    record.store_all();
    record.stop_stream();
    record.server.stop(Shutdown::Fast);

    // the backup will hold the settings of this restore: the next one replaces them
    let target = record.target("branch");
    let to = ["--to-time", &first.after, "--action", "promote"];
    record.anywhen.restore(&target, &to);
    let branch = start_restored(&record.ground, &target, End::Promoted);
    let mut stream = record.anywhen.stream(&branch);
    let backup = record.anywhen.backup(&branch);
    assert_eq!(backup["timeline"], 2, "{backup}");
    branch.execute("insert into moments values (2)");
    stream.store_all(&branch);

    let latest = record.target("latest");
    let report = record.anywhen.restore(&latest, &[]);
    assert_eq!(report["backup"], backup["id"], "{report}");
    assert_eq!(
        restored_moments(&record.ground, &latest, End::Promoted),
        "0,1,2"
    );
}
