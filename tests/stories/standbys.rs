//! Standbys: made by a restore, backed up, promoted under a running stream.

use crate::ground::{Ground, eventually};
use crate::judge::{End, assert_verified, moments, restored_moments};
use crate::record::Record;
use crate::server::{Options, Server, Shutdown, write_setting};

/// Restores a standby of the record's server, and waits until it follows.
pub(crate) fn standby_of(record: &Record, ground: &Ground) -> Server {
    let target = ground.path("standby");
    record.anywhen.restore(&target, &["--standby"]);
    assert!(target.join("standby.signal").exists());
    let primary = record.server.conninfo();
    write_setting(&target, &format!("primary_conninfo = '{primary}'"));
    let mut standby = Server::at(ground, &target);
    standby.start();
    follow(record, &standby);
    standby
}

/// Waits until the standby has replayed all that the primary wrote.
pub(crate) fn follow(record: &Record, standby: &Server) {
    let written = record.server.value("select pg_current_wal_flush_lsn()");
    let replayed = format!("select pg_last_wal_replay_lsn() >= '{written}'");
    eventually("the standby follows", || standby.value(&replayed) == "t");
}

/// A backup of a standby spares the primary. What is restored of it is no standby.
#[test]
fn a_backup_of_a_standby_restores_with_the_wal_of_the_primary() {
    let mut record = Record::begun(&Options::default());
    let standby = standby_of(&record, &record.ground);
    record.insert(1);
    follow(&record, &standby);
    let backup = record.anywhen.backup(&standby);
    record.insert(2);
    record.store_all();

    let target = record.target("latest");
    let report = record.anywhen.restore(&target, &[]);
    assert_eq!(report["backup"], backup["id"], "{report}");
    assert_verified(&target);
    assert!(!target.join("standby.signal").exists());
    assert_eq!(
        restored_moments(&record.ground, &target, End::Promoted),
        "0,1,2"
    );
}

/// What a backup of a standby calls its own moment can be restored without any stream: a standby's
/// clock goes on while nothing comes from the primary.
#[test]
fn a_backup_of_a_standby_reaches_its_own_moment_by_itself() {
    let record = Record::of_server(&Options::default());
    record.insert(0);
    record.anywhen.backup(&record.server);
    let standby = standby_of(&record, &record.ground);
    standby.execute("select pg_wal_replay_pause()");
    // a standby that has replayed no commit knows its checkpoint's whole second alone
    let checkpoint = "select checkpoint_time + interval '1 s' from pg_control_checkpoint()";
    let checkpoint = standby.value(checkpoint);
    let over = format!("select clock_timestamp() > '{checkpoint}'");
    eventually("the checkpoint's second is over", || {
        standby.value(&over) == "t"
    });
    let committed = record.insert(1).committed;
    let behind = record.anywhen.backup(&standby);
    standby.execute("select pg_wal_replay_resume()");
    follow(&record, &standby);
    let abreast = record.anywhen.backup(&standby);
    for (backup, rows) in [(behind, "0"), (abreast, "0,1")] {
        let id = backup["id"].as_str().unwrap();
        let moment = backup["finished_at"].as_str().unwrap();
        // both are RFC 3339 in UTC with microseconds
        assert_eq!(moment >= committed.as_str(), rows == "0,1", "{backup}");
        let arguments = ["--backup", id, "--to", moment];
        assert_eq!(record.rows_at(id, &arguments, End::Paused), rows);
    }
}

/// The standby that is streamed from becomes the primary: the stream goes over to its timeline.
#[test]
fn a_stream_follows_a_promotion() {
    let mut record = Record::begun(&Options::default());
    let standby = standby_of(&record, &record.ground);
    record.store_all();
    record.stop_stream();
    let mut stream = record.anywhen.stream(&standby);
    record.insert(1);
    follow(&record, &standby);
    record.server.stop(Shutdown::Fast);
    standby.execute("select pg_promote()");
    standby.wait_until_promoted();
    standby.execute("insert into moments values (2)");
    stream.store_all(&standby);
    stream.stop();

    let target = record.target("latest");
    record.anywhen.restore(&target, &[]);
    assert_eq!(
        restored_moments(&record.ground, &target, End::Promoted),
        "0,1,2"
    );
    assert_eq!(moments(&standby), "0,1,2");
}

/// An archiver of a standby that is behind holds back what it cannot compare yet; it must not wait for that
/// when there is nobody to send it.
#[test]
fn what_waits_for_a_standby_that_is_behind_holds_up_no_stop_and_no_other_server() {
    let mut record = Record::begun(&Options::default());
    let mut standby = standby_of(&record, &record.ground);
    record.store_all();
    record.stop_stream();
    let arguments = ["--slot", "behind", "--flush-interval", "1h"];
    let follows = record.server.conninfo();
    for (ending, row) in [("stopped", 1), ("lost", 3)] {
        let behind = record.anywhen.stream_with(&standby, &arguments);
        record.insert(row);
        follow(&record, &standby);
        standby.execute("alter system set primary_conninfo = ''");
        standby.execute("select pg_reload_conf()");
        let received = "select count(*) from pg_stat_replication
                        where sent_lsn >= pg_last_wal_replay_lsn()";
        eventually(
            "the standby is cut off, and its archiver has what it has",
            || {
                standby.value("select count(*) from pg_stat_wal_receiver") == "0"
                    && standby.value(received) != "0"
            },
        );
        // the same segment, from the primary, and further
        record.insert(row + 1);
        let mut ahead = record.anywhen.stream(&record.server);
        ahead.store_all(&record.server);
        ahead.stop();
        let said = if ending == "stopped" {
            behind.stop_in_vain().succeeded().stderr
        } else {
            standby.kill9();
            eventually("the standby is given up", || {
                behind.stderr().contains("lost the server")
            });
            behind.stop_in_vain().succeeded().stderr
        };
        assert!(said.contains("left to the next stream"), "{said}");
        if ending == "stopped" {
            standby.execute(&format!("alter system set primary_conninfo = '{follows}'"));
            standby.execute("select pg_reload_conf()");
            follow(&record, &standby);
        }
    }
    let restored = record.rows_at("latest", &[], End::Promoted);
    assert_eq!(restored, "0,1,2,3,4");
}
