//! Backups that take long, on a server that is busy meanwhile.

use serde_json::Value;

use crate::ground::eventually;
use crate::judge::{End, assert_verified, start_restored};
use crate::load::{Load, ids};
use crate::record::Record;
use crate::server::{Options, Shutdown, value};

/// A server gives up receivers that it does not hear from: WAL that takes longer to fetch than
/// `wal_sender_timeout` must not cost the backup.
#[test]
fn a_backup_fetches_more_wal_than_the_server_has_patience_for() {
    let record = Record::of_server(&Options {
        settings: "wal_sender_timeout = '1s'\nmax_wal_size = '8GB'".to_owned(),
        ..Options::default()
    });
    record.insert(0);
    let mut slow = record
        .anywhen
        .command(&["backup", "--checkpoint", "fast", "--max-rate", "8M"]);
    slow.args(["-d", &record.server.conninfo()]);
    let mut backup = record.anywhen.launch(slow);
    let mut sql = record.server.sql();
    let streaming = "select count(*) from pg_stat_progress_basebackup where backup_streamed > 0";
    eventually("the backup streams", || value(&mut sql, streaming) == "1");
    record.fill_segments(64);
    record.insert(1);
    let status = backup.end("the backup of a busy server");
    assert_eq!(status.code(), Some(0), "{}", backup.stderr());
    let log = record.server.log();
    assert!(!log.contains("replication timeout"), "{log}");
    let rows = record.rows_at("immediate", &["--immediate"], End::Paused);
    assert!(["0", "0,1"].contains(&rows.as_str()), "{rows}");
}

/// A backup's own moment is what it promises without a stream: every transaction that the server stamped up
/// to it, and none behind it, under load.
#[test]
fn a_backup_restores_its_own_moment_to_the_last_transaction() {
    let record = Record::of_server(&Options {
        settings: "track_commit_timestamp = on".to_owned(),
        ..Options::default()
    });
    let load = Load::start(&record.server, 0);
    eventually("the load has begun", || !ids(&record.server).is_empty());
    let backups: Vec<_> = (0..3)
        .map(|_| record.anywhen.backup(&record.server))
        .collect();
    load.stop();
    for (number, backup) in backups.iter().enumerate() {
        let moment = backup["finished_at"].as_str().unwrap();
        let stamped = record.server.value(&format!(
            "select string_agg(id::text, ',' order by id) from history
             where pg_xact_commit_timestamp(xmin) <= '{moment}'"
        ));
        let target = record.target(&format!("restored-{number}"));
        record.anywhen.restore(&target, &["--to-time", moment]);
        assert_verified(&target);
        let mut restored = start_restored(&record.ground, &target, End::Paused);
        let found = restored.value("select string_agg(id::text, ',' order by id) from history");
        assert_eq!(found, stamped, "backup {number}");
        restored.stop(Shutdown::Fast);
    }
}

/// Over a slow network the server compresses what it sends: what is stored is the same, and less has come.
#[test]
fn what_the_server_compresses_is_stored_as_if_it_had_not() {
    let record = Record::of_server(&Options::default());
    record.insert(0);
    record.server.execute(
        "create table filled as select n as id, repeat(md5(n::text), 20) as words
         from generate_series(1, 20000) n",
    );
    let asked = ["backup", "--checkpoint", "fast", "--json"];
    let compressing = [&asked[..], &["--server-compression", "zstd:1"]].concat();
    let taken = record.anywhen.run_on(&record.server, &compressing);
    // some majors come without it
    let has_zstd = "select setting like '%--with-zstd%' from pg_config where name = 'CONFIGURE'";
    if record.server.value(has_zstd) != "t" {
        taken.failed_with(2);
        taken.says(&["compress", "leave out --server-compression"]);
        let list = record.anywhen.run(&["list", "--json"]);
        assert!(!list.stdout.contains("stored_bytes"), "{list}");
        return;
    }
    let compressed = taken.succeeded().document();
    let plain = record.anywhen.backup(&record.server);
    // each extent was the same
    let stored = |backup: &Value| backup["stored_bytes"].as_u64().unwrap();
    assert!(stored(&plain) * 10 < stored(&compressed), "{plain}");
    let flags = [
        "--backup",
        compressed["id"].as_str().unwrap(),
        "--immediate",
    ];
    assert_eq!(record.rows_at("restored", &flags, End::Paused), "0");
}
