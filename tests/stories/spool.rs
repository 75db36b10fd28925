//! The bucket is away for long, and the stream goes on into a folder: what lies there is told to nobody
//! unless that was asked for, survives a kill, and is in the bucket afterwards, in order and whole.

use std::fs;
use std::path::{Path, PathBuf};

use crate::anywhen::{Anywhen, repository_table};
use crate::endpoint::BUCKET;
use crate::ground::{Ground, eventually};
use crate::judge::End;
use crate::objects::{
    assert_equal_to_server, assert_no_gap, files_below, stored_segments, system_dir, unpacked,
};
use crate::record::Record;
use crate::server::{Options, execute, value};

const FLUSHED: &str = "select coalesce(max(flush_lsn), '0/0') from pg_stat_replication
                       where application_name = 'anywhen'";

/// A server whose stream may spool; `settings` are the cluster's.
fn spooling(settings: &str) -> Record {
    spooling_on(settings, &Options::default())
}

fn spooling_on(settings: &str, options: &Options) -> Record {
    let ground = Ground::on_s3();
    let spool = ground.make_dir("spool", 0o700);
    let url = format!("s3://{BUCKET}/spooled");
    let table = repository_table("stories", &url, ground.endpoint().unwrap());
    let table = table.replace("retry_for = \"3s\"", "retry_for = \"1s\"");
    let table = format!(
        "{table}[cluster.main]\nspool_dir = \"{}\"\n{settings}",
        spool.display()
    );
    let anywhen = Anywhen::with_table(&ground, "spooled", url, &table);
    let mut record = Record::on(ground, options);
    record.anywhen = anywhen;
    let mut record = record.begin();
    record.store_all();
    record
}

/// The spooled objects.
fn spooled(record: &Record) -> Vec<PathBuf> {
    let system = record.server.system_id();
    let wal = record.ground.path("spool/main").join(system).join("wal");
    if wal.exists() {
        files_below(&wal)
    } else {
        vec![]
    }
}

fn spooled_segments(record: &Record) -> usize {
    let whole = |path: &&PathBuf| path.file_name().unwrap().len() == 24;
    spooled(record).iter().filter(whole).count()
}

fn bytes_of(paths: &[PathBuf]) -> u64 {
    let bytes = |path: &PathBuf| fs::metadata(path).map_or(0, |metadata| metadata.len());
    paths.iter().map(bytes).sum()
}

#[track_caller]
fn assert_drained(record: &Record) {
    eventually("the spool is empty", || spooled(record).is_empty());
    let system = system_dir(&record.anywhen, &record.server);
    assert_no_gap(&system, 16);
    let status = record.anywhen.json(&["status"]);
    assert!(status["clusters"][0]["spool"].is_null(), "{status}");
}

#[track_caller]
fn assert_equal(record: &Record) {
    let system = system_dir(&record.anywhen, &record.server);
    assert!(assert_equal_to_server(&system, record.server.data()) >= 4);
}

/// Were the server told of what one disk holds, that disk's end would be the end of acknowledged commits.
#[test]
fn an_outage_goes_to_the_spool_and_the_server_keeps_its_wal() {
    let mut record = spooling("");
    let before = record.server.value(FLUSHED);
    record.ground.endpoint_mut().kill9();
    record.insert(1);
    record.fill_segments(4);
    record.insert(2);
    eventually("the spool takes what comes", || {
        spooled_segments(&record) >= 4
    });
    // several flush intervals in which it could be acknowledged
    let mut sql = record.server.sql();
    for _ in 0..10 {
        assert_eq!(
            value(&mut sql, FLUSHED),
            before,
            "told what only the spool has"
        );
        value(&mut sql, "select pg_sleep(0.1)");
    }
    let status = record.anywhen.run(&["status"]);
    status.failed_with(4);
    status.says(&["in the spool, not yet in the repository", "on timeline 1"]);
    record.ground.endpoint_mut().go_on(&[]);
    record.store_all();
    assert_drained(&record);
    assert_equal(&record);
    assert_eq!(record.rows_at("latest", &[], End::Promoted), "0,1,2");
}

/// The spool alone has what the server was told of, and has dropped: a killed process loses none of it, and
/// the next one goes on behind it, not before.
#[test]
fn what_was_acknowledged_from_the_spool_outlives_a_kill_and_the_servers_own_copy() {
    let mut record = spooling("acknowledge = \"spool\"\n");
    record.ground.endpoint_mut().kill9();
    record.insert(1);
    record.fill_segments(4);
    // acknowledged while the bucket is away
    record.store_all();
    record.stream.take().unwrap().kill9();
    assert!(spooled_segments(&record) >= 4);
    let written: Vec<(String, Vec<u8>)> = spooled(&record)
        .iter()
        .map(|path| path.file_name().unwrap().to_str().unwrap().to_owned())
        .filter(|name| name.len() == 24)
        .map(|name| {
            let original = record.server.data().join("pg_wal").join(&name);
            (name, fs::read(original).unwrap())
        })
        .collect();
    // the server drops what it was told is stored
    record.server.execute("alter system set wal_keep_size = 0");
    record.server.execute("select pg_reload_conf()");
    record.fill_segments(1);
    for _ in 0..2 {
        record.server.execute("checkpoint");
    }
    let oldest = record
        .server
        .value("select min(name) from pg_ls_waldir() where name ~ '^[0-9A-F]{24}$'");
    let first = written.iter().map(|(name, _)| name).min().unwrap();
    assert!(oldest > *first, "the server still has {first}");

    record.ground.endpoint_mut().go_on(&[]);
    let status = record.anywhen.json(&["status"]);
    let spool = &status["clusters"][0]["spool"];
    assert_eq!(spool["objects"], spooled(&record).len());
    assert_eq!(spool["bytes"], bytes_of(&spooled(&record)));
    assert_eq!(spool["timeline"], 1);
    // what is only there is not promised
    let latest = &status["clusters"][0]["windows"][0]["latest_lsn"];
    let is_less = format!(
        "select {}::pg_lsn < {}::pg_lsn",
        quoted(latest),
        quoted(&spool["end_lsn"])
    );
    assert_eq!(record.server.value(&is_less), "t", "{status}");

    record.stream = Some(record.anywhen.stream(&record.server));
    record.insert(2);
    record.store_all();
    assert_drained(&record);
    let stored = stored_segments(&system_dir(&record.anywhen, &record.server));
    for (name, original) in written {
        assert_eq!(unpacked(&stored[&name]), original, "{name}");
    }
    record.stop_stream();
    assert_eq!(record.rows_at("latest", &[], End::Promoted), "0,1,2");
}

fn quoted(value: &serde_json::Value) -> String {
    format!("'{}'", value.as_str().unwrap())
}

/// A commit that waits for the bucket waits for the bucket, whatever the settings say of the spool.
#[test]
fn the_spool_counts_for_no_commit_that_waits() {
    let mut record = spooling("acknowledge = \"spool\"\n");
    record
        .server
        .execute("alter system set synchronous_standby_names = '*'");
    record.server.execute("select pg_reload_conf()");
    eventually("the stream knows that commits wait for it", || {
        let said = record.stream.as_ref().unwrap().stderr();
        said.contains("refused while commits wait")
    });
    record.ground.endpoint_mut().kill9();
    let mut sql = record.server.sql();
    // this one does not wait: it could not be looked at otherwise
    execute(&mut sql, "set synchronous_commit = local");
    execute(&mut sql, "insert into moments values (1, 'x')");
    let written = value(&mut sql, "select pg_current_wal_flush_lsn()");
    eventually("the spool has it", || !spooled(&record).is_empty());
    let counted = format!("select ({FLUSHED}) >= '{written}'");
    for _ in 0..10 {
        assert_eq!(value(&mut sql, &counted), "f", "only the spool has it");
        value(&mut sql, "select pg_sleep(0.1)");
    }
    record.ground.endpoint_mut().go_on(&[]);
    record.store_all();
    assert_drained(&record);
    assert_eq!(record.rows_at("latest", &[], End::Promoted), "0,1");
}

/// Whether commits wait for a stream must be known to be no: one that is next in line is waited for as soon
/// as another standby goes, without a word.
#[test]
fn the_spool_does_not_count_for_a_stream_that_is_next_in_line() {
    let mut record = spooling("acknowledge = \"spool\"\n");
    let mut first = record.anywhen.bare();
    let place = record.ground.make_dir("first", 0o700);
    let server = format!("{} application_name=other", record.server.conninfo());
    let repository = format!("file://{}", place.display());
    first.args(["stream", "--slot", "first", "--cluster", "first"]);
    first.args(["--repo", &repository, "-d", &server]);
    record.stop_stream();
    let mut first = record.anywhen.stream_of(&record.server, first);
    record
        .server
        .execute("alter system set synchronous_standby_names = 'FIRST 1 (other, anywhen)'");
    record.server.execute("select pg_reload_conf()");
    record.stream = Some(record.anywhen.stream(&record.server));
    let state = "select coalesce(max(sync_state), '') from pg_stat_replication
                 where application_name = 'anywhen'";
    eventually("the stream is next in line", || {
        record.server.value(state) == "potential"
    });
    assert_only_the_repository_counts(&mut record);
    first.assert_running();
    first.stop();
}

/// A role that is not shown how the server stands to its stream cannot know that no commit waits for it.
#[test]
fn the_spool_does_not_count_for_a_stream_that_cannot_see() {
    let options = Options {
        hba: "local postgres,replication archiver trust".to_owned(),
        ..Options::default()
    };
    let mut record = spooling_on("acknowledge = \"spool\"\n", &options);
    record.stop_stream();
    record
        .server
        .execute("create role archiver login replication");
    let server = record.server.conninfo();
    let server = server.replace("user=postgres", "user=archiver application_name=anywhen");
    let command = record
        .anywhen
        .command(&["stream", "--flush-interval", "200ms", "-d", &server]);
    let stream = record.anywhen.stream_of(&record.server, command);
    eventually("the stream says what it lacks", || {
        stream.stderr().contains("GRANT pg_monitor")
    });
    record.stream = Some(stream);
    assert_only_the_repository_counts(&mut record);
}

/// The bucket goes away, and nothing is acknowledged until it is back.
#[track_caller]
fn assert_only_the_repository_counts(record: &mut Record) {
    record.store_all();
    record.ground.endpoint_mut().kill9();
    let mut sql = record.server.sql();
    execute(&mut sql, "set synchronous_commit = local");
    execute(&mut sql, "insert into moments values (1, 'x')");
    let written = value(&mut sql, "select pg_current_wal_flush_lsn()");
    eventually("the spool has it", || !spooled(record).is_empty());
    let counted = format!("select ({FLUSHED}) >= '{written}'");
    for _ in 0..10 {
        assert_eq!(value(&mut sql, &counted), "f", "only the spool has it");
        value(&mut sql, "select pg_sleep(0.1)");
    }
    record.ground.endpoint_mut().go_on(&[]);
    record.store_all();
    assert_drained(record);
}

/// Killed in the middle of an outage, a stream finds its way back as soon as the outage is over, and not
/// before: what it would go on from is in the bucket.
#[test]
fn a_stream_that_was_killed_while_it_spooled_begins_with_what_it_had_spooled() {
    let mut record = spooling("");
    record.ground.endpoint_mut().kill9();
    record.insert(1);
    record.fill_segments(2);
    eventually("the spool takes what comes", || {
        spooled_segments(&record) >= 2
    });
    record.stream.take().unwrap().kill9();
    let left = spooled(&record);
    let ended = stream_of(&record, Path::new(record.anywhen.place()[1]));
    ended.failed_with(4);
    assert_eq!(
        spooled(&record),
        left,
        "an outage took something from the spool"
    );
    record.ground.endpoint_mut().go_on(&[]);
    record.stream = Some(record.anywhen.stream(&record.server));
    assert!(
        spooled(&record).is_empty(),
        "it streams, and the spool is not empty"
    );
    record.insert(2);
    record.store_all();
    assert_drained(&record);
    assert_equal(&record);
    assert_eq!(record.rows_at("latest", &[], End::Promoted), "0,1,2");
}

/// Promise 6: neither memory nor the disk of the archiver fills without bound; the server's WAL waits there.
#[test]
fn a_full_spool_stops_the_reading_and_loses_nothing() {
    let most = 60 << 10;
    let mut record = spooling(&format!("spool_bytes_max = \"{most}\"\n"));
    record.ground.endpoint_mut().kill9();
    record.insert(1);
    let full = |record: &Record| record.stream.as_ref().unwrap().stderr();
    eventually("the spool is full", || {
        record.fill_segments(1);
        full(&record).contains("the spool is full")
    });
    // more than is held in memory
    record.fill_segments(12);
    let mut sql = record.server.sql();
    let all_sent = "select count(*) from pg_stat_replication
                    where application_name = 'anywhen' and sent_lsn >= pg_current_wal_flush_lsn()";
    for _ in 0..10 {
        assert_eq!(value(&mut sql, all_sent), "0", "it reads on");
        assert!(bytes_of(&spooled(&record)) <= most);
        value(&mut sql, "select pg_sleep(0.1)");
    }
    record.insert(2);
    record.ground.endpoint_mut().go_on(&[]);
    record.store_all();
    assert_drained(&record);
    assert_equal(&record);
    assert_eq!(record.rows_at("latest", &[], End::Promoted), "0,1,2");
}

/// Two streams would empty one spool into two histories; and WAL that was asked to be spooled must be.
#[test]
fn a_spool_in_use_and_a_spool_without_a_folder_are_refused() {
    let record = spooling("");
    let second = &["stream", "--slot", "second"];
    let ended = record.anywhen.run_on(&record.server, second);
    ended.failed_with(1);
    ended.says(&["the spool is in use", "spool.lock"]);

    let config = record.anywhen.place()[1].to_owned();
    let text = fs::read_to_string(&config).unwrap();
    let line = text.lines().find(|line| line.starts_with("spool_dir"));
    let text = text.replace(line.unwrap(), "acknowledge = \"spool\"");
    let other = record.ground.write("other.toml", &text, 0o600);
    let ended = stream_of(&record, &other);
    ended.failed_with(2);
    ended.says(&["acknowledge = \"spool\"", "--spool-dir"]);
}

fn stream_of(record: &Record, config: &Path) -> crate::anywhen::Ended {
    let mut command = record.anywhen.bare();
    command.args(["stream", "--config", config.to_str().unwrap()]);
    command.args(["-d", &record.server.conninfo()]);
    record.anywhen.run_command(command)
}
