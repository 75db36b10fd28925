//! Backups of which the server sends only what has changed since the one before (17 and later).

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::anywhen::Ended;
use crate::ground::{Ground, Programs, command, eventually};
use crate::judge::{End, assert_sound, assert_verified, moments, start_restored};
use crate::objects::{files_below, system_dir};
use crate::record::Record;
use crate::server::{Options, Server, Shutdown, copy_dir, execute, write_setting};
use crate::standbys::{follow, standby_of};

/// What is said where the server is asked for changes alone.
const ASKED: &str = "the server is asked for what has changed since backup";

/// What is said once files were put together from what has changed.
const PUT_TOGETHER: &str = "put together from";

/// The server has sent what has changed since a backup, and no more.
#[track_caller]
fn assert_changes_since(before: &Value, said: &Ended) {
    said.says(&[ASKED, id(before), PUT_TOGETHER]);
    let line = said.stderr.lines().find(|line| line.contains(PUT_TOGETHER));
    let numbers: Vec<u64> = line
        .unwrap()
        .split(|c: char| !c.is_ascii_digit())
        .filter_map(|number| number.parse().ok())
        .collect();
    let [.., files, sent, of] = numbers[..] else {
        panic!("{line:?}");
    };
    assert!(files > 100 && sent * 4 < of, "{line:?}");
}

/// A server that can tell what has changed; `None` on a major that cannot, of which nothing is asked.
fn summarizing(ground: Ground) -> Option<Record> {
    summarizing_in(ground, 16, "")
}

fn summarizing_in(ground: Ground, wal_segment_mib: u32, more: &str) -> Option<Record> {
    if Programs::get().major < 17 {
        let record = Record::on(ground, &Options::default());
        take(&record, &[]);
        let (second, _) = take(&record, &[]);
        assert!(!second.stderr.contains("what has changed"), "{second}");
        return None;
    }
    // every change of a page is in WAL, also on majors whose clusters have no page checksums
    let settings = format!("summarize_wal = on\nwal_log_hints = on\nautovacuum = off\n{more}");
    let options = Options {
        wal_segment_mib,
        settings,
        ..Options::default()
    };
    Some(Record::on(ground, &options))
}

fn take(record: &Record, flags: &[&str]) -> (Ended, Value) {
    take_of(record, &record.server, flags)
}

fn take_of(record: &Record, server: &Server, flags: &[&str]) -> (Ended, Value) {
    let asked = [&["backup", "--checkpoint", "fast", "--json"], flags].concat();
    let taken = record.anywhen.run_on(server, &asked).succeeded();
    let backup = taken.document();
    (taken, backup)
}

fn id(backup: &Value) -> &str {
    backup["id"].as_str().unwrap()
}

fn stored_bytes(backup: &Value) -> u64 {
    backup["stored_bytes"].as_u64().unwrap()
}

/// Restores a backup by itself, and finds every file as its `backup_manifest` says.
fn restored(record: &Record, backup: &Value) -> PathBuf {
    let target = record.target(&format!("restored-{}", id(backup)));
    let flags = ["--backup", id(backup), "--immediate"];
    record.anywhen.restore(&target, &flags);
    assert_verified(&target);
    target
}

/// The files of relations below a data directory.
fn relations(data: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let below = |folder| files_below(&data.join(folder));
    let folders = ["base", "global", "pg_xact", "pg_tblspc"];
    let files = folders.map(below).concat();
    let named = files.into_iter().map(|path| {
        let name = path.strip_prefix(data).unwrap().to_owned();
        let content = fs::read(&path).unwrap();
        (name, content)
    });
    named
        .filter(|(name, _)| !name.ends_with("pg_control"))
        .collect()
}

/// Everything that increments tell apart: relations that grow, shrink to nothing and to something, are
/// written anew, come and go, and stay as they were.
fn change_everything(record: &Record) {
    let mut sql = record.server.sql();
    for statement in [
        "update scattered set words = 'changed' where id % 1000 = 7",
        "update elsewhere set words = 'changed' where id % 1000 = 7",
        "insert into growing select n, repeat(md5(n::text), 20) from generate_series(3001, 9000) n",
        "delete from shrinking where id > 6000",
        "vacuum (truncate) shrinking",
        "delete from untouched where id % 1000 = 7",
        "truncate emptied",
        "vacuum full rewritten",
        "drop table dropped",
        "create table made as select n from generate_series(1, 500) n",
        "reindex index scattered_pkey",
        "create database another",
    ] {
        execute(&mut sql, statement);
    }
    // some of the blocks that it is extended by stay empty
    for batch in 2..7 {
        let rows = format!(
            "for i in $(seq {batch}0000 {batch}0130); do printf \"$i\\t%0700d\\n\" 7; done"
        );
        execute(&mut sql, &format!("copy shrinking from program '{rows}'"));
    }
    execute(&mut sql, "checkpoint");
}

/// Whoever restores such a backup gets what a full one would have had, byte for byte.
#[test]
fn what_has_changed_is_put_together_to_what_a_full_backup_has() {
    let Some(record) = summarizing(Ground::new()) else {
        return;
    };
    let mut sql = record.server.sql();
    for (table, rows) in [
        ("scattered", 20_000),
        ("growing", 3_000),
        ("shrinking", 9_000),
        ("emptied", 3_000),
        ("rewritten", 3_000),
        ("dropped", 3_000),
        ("untouched", 9_000),
    ] {
        let create = format!(
            "create table {table} as select n as id, repeat(md5(n::text), 20) as words
             from generate_series(1, {rows}) n"
        );
        execute(&mut sql, &create);
        execute(
            &mut sql,
            &format!("alter table {table} add primary key (id)"),
        );
    }
    // inside of the data directory: another restore may lie beside it
    execute(&mut sql, "set allow_in_place_tablespaces = on");
    execute(&mut sql, "create tablespace inside location ''");
    execute(
        &mut sql,
        "create table elsewhere tablespace inside as table scattered",
    );
    execute(&mut sql, "vacuum");
    record.insert(0);
    let (said, first) = take(&record, &[]);
    assert!(!said.stderr.contains(ASKED), "{said}");
    // nothing is sent twice, nor by the increment of an increment
    let (said, unchanged) = take(&record, &[]);
    assert_changes_since(&first, &said);
    assert!(stored_bytes(&unchanged) * 20 < stored_bytes(&first));
    change_everything(&record);
    let path = "select pg_relation_filepath('shrinking')";
    let shrinking = record.server.value(path);
    record.insert(1);
    let (said, changed) = take(&record, &[]);
    assert_changes_since(&unchanged, &said);
    let (said, full) = take(&record, &["--full"]);
    assert!(!said.stderr.contains(ASKED), "{said}");
    assert!(stored_bytes(&changed) < stored_bytes(&full));
    assert_eq!(changed["files"], full["files"]);

    restored(&record, &unchanged);
    let (changed, full) = (restored(&record, &changed), restored(&record, &full));
    let (ours, theirs) = (relations(&changed), relations(&full));
    assert_eq!(
        ours.keys().collect::<Vec<_>>(),
        theirs.keys().collect::<Vec<_>>()
    );
    assert!(theirs.keys().any(|name| name.starts_with("pg_tblspc")));
    let (blocks, _) = theirs[Path::new(&shrinking)].as_chunks::<8192>();
    assert!(
        blocks.contains(&[0; 8192]),
        "of {} blocks none is empty",
        blocks.len()
    );
    for (name, content) in theirs {
        assert!(ours[&name] == content, "{} differs", name.display());
    }
    let mut server = start_restored(&record.ground, &changed, End::Paused);
    assert_eq!(server.value("select count(*) from growing"), "9000");
    server.execute("select pg_wal_replay_resume()");
    server.wait_until_promoted();
    assert_sound(&server, "postgres");
    server.stop(Shutdown::Fast);
}

/// The summaries are gone, or are not made any more: a backup is taken all the same.
#[test]
fn a_server_that_cannot_say_what_has_changed_sends_everything() {
    let Some(record) = summarizing(Ground::new()) else {
        return;
    };
    record.insert(0);
    let (_, first) = take(&record, &[]);
    record.insert(1);
    let (said, _) = take(&record, &[]);
    assert_changes_since(&first, &said);
    let summaries = record.server.data().join("pg_wal/summaries");
    record.insert(2);
    let written = record.server.value("select pg_current_wal_flush_lsn()");
    record.server.execute("checkpoint");
    let has_it = format!(
        "select exists (select from pg_available_wal_summaries() where end_lsn >= '{written}')"
    );
    eventually("the last WAL is summarized", || {
        record.server.value(&has_it) == "t"
    });
    for file in files_below(&summaries) {
        if file.extension().is_some_and(|it| it == "summary") {
            fs::remove_file(file).unwrap();
        }
    }
    let (said, refused) = take(&record, &[]);
    said.says(&[
        ASKED,
        "reads and sends everything",
        "WAL summaries",
        "wal_summary_keep_time",
    ]);
    assert!(!said.stderr.contains(PUT_TOGETHER), "{said}");
    record
        .server
        .execute("alter system set summarize_wal = off");
    record.server.execute("select pg_reload_conf()");
    eventually("no WAL is summarized any more", || {
        record.server.value("show summarize_wal") == "off"
    });
    record.insert(3);
    let (said, third) = take(&record, &[]);
    said.says(&[
        "summarize_wal is off",
        "ALTER SYSTEM SET summarize_wal = on",
    ]);
    assert!(!said.stderr.contains(ASKED), "{said}");
    for (backup, rows) in [(refused, "0,1,2"), (third, "0,1,2,3")] {
        let flags = ["--backup", id(&backup), "--immediate"];
        assert_eq!(record.rows_at(id(&backup), &flags, End::Paused), rows);
    }
}

/// What the increment is of has rotted: a backup that refers to it would be lost with it.
#[test]
fn a_damaged_predecessor_is_found_and_nothing_refers_to_it() {
    let Some(record) = summarizing(Ground::on_disk()) else {
        return;
    };
    record.insert(0);
    record.server.execute(
        "create table filled as select n as id, md5(n::text) as words from generate_series(1, 50000) n",
    );
    let (_, first) = take(&record, &[]);
    let packs = system_dir(&record.anywhen, &record.server).join("packs");
    let pack = packs.join(id(&first)).join("00000000");
    let mut bytes = fs::read(&pack).unwrap();
    // each extent but what lies at the ends: the header, and the manifest of its files
    let end = bytes.len() * 3 / 4;
    for byte in bytes[4096..end].iter_mut().step_by(512) {
        *byte ^= 1;
    }
    fs::write(&pack, bytes).unwrap();
    record
        .server
        .execute("update filled set words = 'changed' where id % 1000 = 7");
    let (said, second) = take(&record, &[]);
    said.says(&[ASKED, id(&first), "begins again", "everything anew"]);
    assert!(
        stored_bytes(&second) * 10 > stored_bytes(&first) * 9,
        "{second}\n{first}"
    );
    fs::remove_dir_all(packs.join(id(&first))).unwrap();
    restored(&record, &second);
}

/// A standby is backed up, becomes the primary, and is backed up on.
#[test]
fn increments_go_on_from_a_standby_over_its_promotion() {
    let Some(mut record) = summarizing(Ground::new()) else {
        return;
    };
    record.insert(0);
    record.anywhen.backup(&record.server);
    let mut standby = standby_of(&record, &record.ground);
    let mut backups = Vec::new();
    for row in [1, 2] {
        record.insert(row);
        record.server.execute("checkpoint");
        follow(&record, &standby);
        standby.execute("checkpoint");
        backups.push(take_of(&record, &standby, &[]));
    }
    let [(_, first), (said, second)] = &backups[..] else {
        panic!("two backups");
    };
    assert_changes_since(first, said);
    record.server.stop(Shutdown::Fast);
    standby.execute("select pg_promote()");
    standby.wait_until_promoted();
    standby.execute("insert into moments values (3)");
    let (said, third) = take_of(&record, &standby, &[]);
    assert_changes_since(second, &said);
    for (backup, rows) in [(second, "0,1,2"), (&third, "0,1,2,3")] {
        let flags = ["--backup", id(backup), "--immediate"];
        assert_eq!(record.rows_at(id(backup), &flags, End::Paused), rows);
    }
    standby.stop(Shutdown::Fast);
}

/// `pg_checksums` writes to every page, and nothing about it to WAL: nothing tells the server of those pages.
#[test]
fn a_cluster_that_was_given_checksums_is_read_anew() {
    let Some(mut record) = summarizing(Ground::new()) else {
        return;
    };
    let rewrite = |record: &mut Record, how: &str| {
        record.server.stop(Shutdown::Fast);
        let mut rewrite = command(Programs::get().tool("pg_checksums"));
        rewrite.arg(how).arg("-D").arg(record.server.data());
        let output = rewrite.output().unwrap();
        assert!(output.status.success(), "{output:?}");
        record.server.start();
    };
    record.insert(0);
    if record.server.value("show data_checksums") == "on" {
        rewrite(&mut record, "--disable");
    }
    let (_, without) = take(&record, &[]);
    record.insert(1);
    let (said, still_without) = take(&record, &[]);
    assert_changes_since(&without, &said);
    rewrite(&mut record, "--enable");
    let (said, with) = take(&record, &[]);
    said.says(&["reads and sends everything", "have no checksums"]);
    record.insert(2);
    let (said, still_with) = take(&record, &[]);
    assert_changes_since(&with, &said);
    for (backup, rows) in [(still_without, "0,1"), (still_with, "0,1,2")] {
        let flags = ["--backup", id(&backup), "--immediate"];
        assert_eq!(record.rows_at(id(&backup), &flags, End::Paused), rows);
    }
}

/// Somebody sets the server's disk back, and it goes on as if nothing had happened: blocks that changed before
/// it was set back are no changes to it.
#[test]
fn a_server_that_was_set_back_is_read_anew() {
    let Some(mut record) = summarizing_in(
        Ground::new(),
        1,
        "wal_keep_size = 0\nmax_wal_size = 2\nmin_wal_size = 2\n",
    ) else {
        return;
    };
    record.insert(0);
    let (_, first) = take(&record, &[]);
    record.server.stop(Shutdown::Fast);
    let (data, copy) = (record.server.data().to_owned(), record.target("copy"));
    copy_dir(&data, &copy);
    record.server.start();
    record.insert(1);
    let (said, second) = take(&record, &[]);
    assert_changes_since(&first, &said);

    record.server.stop(Shutdown::Fast);
    fs::remove_dir_all(&data).unwrap();
    copy_dir(&copy, &data);
    record.server.start();
    // beyond the WAL of the backup, until what could be compared with it is removed
    record.insert(2);
    record.fill_segments(12);
    let stop = second["stop_lsn"].as_str().unwrap();
    let oldest = format!(
        "select min(name) > pg_walfile_name('{stop}') from pg_ls_waldir() where name ~ '^[0-9A-F]{{24}}$'"
    );
    eventually("what could be compared is removed", || {
        record.server.execute("checkpoint");
        record.server.value(&oldest) == "t"
    });
    let (said, third) = take(&record, &[]);
    said.says(&[
        "reads and sends everything",
        "cannot be told",
        "wal_keep_size",
    ]);
    assert!(!said.stderr.contains(ASKED), "{said}");
    let flags = ["--backup", id(&third), "--immediate"];
    assert_eq!(record.rows_at("restored", &flags, End::Paused), "0,2");
}

/// A standby becomes the primary that has not received all that the newest backup holds: what it lacks is no
/// change to it.
#[test]
fn a_standby_that_lacks_the_end_of_the_newest_backup_is_read_anew() {
    let Some(mut record) = summarizing(Ground::new()) else {
        return;
    };
    record.insert(0);
    record.server.execute(
        "create table filled as select n as id, repeat(md5(n::text), 20) as words
         from generate_series(1, 20000) n",
    );
    record.anywhen.backup(&record.server);
    let mut standby = standby_of(&record, &record.ground);
    let asked = [
        "backup",
        "--checkpoint",
        "fast",
        "--full",
        "--max-rate",
        "8M",
    ];
    let mut slow = record.anywhen.command(&asked);
    slow.args(["-d", &record.server.conninfo()]);
    let mut backup = record.anywhen.launch(slow);
    let streaming = "select count(*) from pg_stat_progress_basebackup where backup_streamed > 0";
    eventually("the backup streams", || {
        record.server.value(streaming) == "1"
    });
    record.insert(1);
    follow(&record, &standby);
    standby.stop(Shutdown::Fast);
    record.insert(2);
    let lost = "update filled set words = 'lost' where id between 100 and 110";
    record.server.execute(lost);
    record.server.execute("checkpoint");
    let status = backup.end("the backup");
    assert_eq!(status.code(), Some(0), "{}", backup.stderr());
    record.server.stop(Shutdown::Fast);

    // the repository has what it lacks
    write_setting(standby.data(), "restore_command = ''");
    standby.start();
    standby.execute("select pg_promote()");
    standby.wait_until_promoted();
    standby.execute("create table more as select n from generate_series(1, 100000) n");
    standby.execute("insert into moments values (3)");
    let (said, taken) = take_of(&record, &standby, &[]);
    said.says(&["reads and sends everything", "cannot be told"]);
    assert!(!said.stderr.contains(ASKED), "{said}");
    let target = restored(&record, &taken);
    let mut server = start_restored(&record.ground, &target, End::Paused);
    assert_eq!(moments(&server), "0,1,3");
    let lost = "select count(*) from filled where words = 'lost'";
    assert_eq!(server.value(lost), "0");
    server.stop(Shutdown::Fast);
    standby.stop(Shutdown::Fast);
}
