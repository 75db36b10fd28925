//! What servers write besides small transactions, with segments of every usual size: the bytes are the
//! server's, and a restore has it all.

use std::fs;
use std::path::PathBuf;

use crate::ground::{give, write_as_account};
use crate::judge::{End, assert_sound, assert_verified, start_restored};
use crate::objects::{assert_no_gap, assert_wal_of, system_dir};
use crate::record::Record;
use crate::server::{Options, Server, Shutdown, execute, value};

#[test]
fn segments_of_1_mib_hold_whatever_a_server_writes() {
    everything_is_stored(1, 20);
}

#[test]
fn segments_of_16_mib_hold_whatever_a_server_writes() {
    everything_is_stored(16, 8);
}

#[test]
fn segments_of_64_mib_hold_whatever_a_server_writes() {
    everything_is_stored(64, 2);
}

#[track_caller]
fn everything_is_stored(wal_segment_mib: u32, switches: u32) {
    let mut record = Record::begun(&Options {
        wal_segment_mib,
        settings: "max_prepared_transactions = 5\n".to_owned(),
        ..Options::default()
    });
    change_definitions(&record.server);
    // crosses the end of a segment of any size
    big_transactions(&record.server, 4000 + 2500 * wal_segment_mib.min(16));
    if wal_segment_mib > 16 {
        record.server.execute("select pg_switch_wal()");
    }
    prepare_transactions(&record.server);
    switch_storm(&record.server, switches);
    record.server.execute("vacuum");
    record.insert(1);
    record.store_all();
    record.stop_stream();
    let system = system_dir(&record.anywhen, &record.server);
    let compared = assert_wal_of(&system, &[record.server.data()], wal_segment_mib.into());
    assert!(
        compared.segments >= switches as usize && compared.pieces > 0,
        "{compared:?}"
    );
    assert_no_gap(&system, wal_segment_mib.into());

    let expected = contents(&record.server);
    let target = record.target("latest");
    record.anywhen.restore(&target, &[]);
    assert_verified(&target);
    let mut restored = start_restored(&record.ground, &target, End::Promoted);
    assert_eq!(contents(&restored), expected);
    restored.execute("commit prepared 'left'");
    assert_eq!(restored.value("select count(*) from prepared"), "2");
    assert_sound(&restored, "postgres");
    restored.stop(Shutdown::Fast);
}

/// Files come and go: relations, databases, rewritten tables.
fn change_definitions(server: &Server) {
    let mut sql = server.sql();
    for statement in [
        "create table dropped as select n from generate_series(1, 5000) n",
        "create table rewritten as select n, n::text as t from generate_series(1, 5000) n",
        "create index on rewritten (n)",
        "alter table rewritten alter n type bigint",
        "alter table rewritten add column more int default 7",
        "create unique index on rewritten (n, t)",
        "cluster rewritten using rewritten_n_t_idx",
        "create table truncated as table rewritten",
        "truncate truncated",
        "insert into truncated select 1, 'one', 2",
        "drop table dropped",
        "create sequence counter",
        "select nextval('counter') from generate_series(1, 40)",
        "create unlogged table unlogged (n int)",
        "create materialized view seen as select count(*) from rewritten",
        "create database gone",
        "create database there",
        "drop database gone",
        "begin; create table rolled_back (n int); insert into rolled_back values (1); rollback",
        "reindex table rewritten",
    ] {
        execute(&mut sql, statement);
    }
}

/// One commits, one aborts; half of the first is undone to a savepoint.
fn big_transactions(server: &Server, rows: u32) {
    let fill = |first: u32| {
        format!(
            "insert into big select n, repeat(md5(n::text), 20)
             from generate_series({first}, {first} + {rows}) n"
        )
    };
    let mut sql = server.sql();
    execute(&mut sql, "create table big (n int primary key, t text)");
    for statement in [
        "begin",
        &fill(1),
        "savepoint half",
        &fill(1_000_000),
        "rollback to half",
        "update big set t = upper(t) where n % 3 = 0",
        "delete from big where n % 5 = 0",
        "commit",
        "begin",
        &fill(2_000_000),
        "rollback",
    ] {
        execute(&mut sql, statement);
    }
}

/// A prepared transaction lives on without its session: in WAL, and after a restore.
fn prepare_transactions(server: &Server) {
    let mut sql = server.sql();
    execute(&mut sql, "create table prepared (id int primary key)");
    for (id, name) in [(1, "left"), (2, "committed"), (3, "rolled back")] {
        let insert = format!("begin; insert into prepared values ({id})");
        execute(&mut sql, &insert);
        execute(&mut sql, &format!("prepare transaction '{name}'"));
    }
    execute(&mut sql, "commit prepared 'committed'");
    execute(&mut sql, "rollback prepared 'rolled back'");
}

/// Segments that are next to empty, one after another.
fn switch_storm(server: &Server, switches: u32) {
    let mut sql = server.sql();
    for number in 0..switches {
        let write = format!("select pg_logical_emit_message(true, 'storm', '{number}')");
        value(&mut sql, &write);
        value(&mut sql, "select pg_switch_wal()");
    }
}

/// What a restore must have, as text.
#[track_caller]
fn contents(server: &Server) -> Vec<String> {
    let mut sql = server.sql();
    [
        "select string_agg(id::text, ',' order by id) from moments",
        "select count(*) || ' ' || md5(string_agg(t, '' order by n)) from big",
        "select count(*) || ' ' || sum(n) || ' ' || sum(more) from rewritten",
        "select string_agg(gid, ',' order by gid) from pg_prepared_xacts",
        "select string_agg(id::text, ',') from prepared",
        "select string_agg(truncated::text, ',') from truncated",
        "select string_agg(datname, ',' order by datname) from pg_database",
        "select string_agg(relname, ',' order by relname) from pg_class where relnamespace = 'public'::regnamespace",
        "select (nextval('counter') > 40)::text",
    ]
    .map(|query| value(&mut sql, query))
    .to_vec()
}

/// So many small files that their lines do not fit into one manifest, without the minutes that as many
/// tables take.
pub(crate) fn fill_a_file_list(server: &Server) {
    let folder = server.data().join("many");
    fs::create_dir(&folder).unwrap();
    give(&folder);
    for number in 0..1200 {
        // a tar's paths end at 99 bytes
        write_as_account(&folder.join(format!("{number:0>94}")), b"", 0o600);
    }
}

/// So many files, and a tablespace with some of them, that a restore can be killed halfway. Where the tablespace is.
pub(crate) fn fill_for_a_kill(record: &Record) -> PathBuf {
    let elsewhere = record.ground.make_dir("elsewhere", 0o700);
    record.server.execute(&format!(
        "create tablespace elsewhere location '{}'",
        elsewhere.display()
    ));
    record.server.execute(
        "create table far tablespace elsewhere as select n from generate_series(1, 20000) n;
         create table filled as select n as id, md5(n::text) as words from generate_series(1, 60000) n",
    );
    fill_a_file_list(&record.server);
    elsewhere
}
