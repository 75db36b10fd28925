//! Backups that take long, on a server that is busy meanwhile.

use crate::ground::eventually;
use crate::judge::End;
use crate::record::Record;
use crate::server::{Options, value};

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
