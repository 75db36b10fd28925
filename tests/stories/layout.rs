//! Clusters of every shape: tablespaces, names, unlogged tables, segment sizes.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::PermissionsExt as _;

use crate::ground::write_as_account;
use crate::judge::{End, assert_sound, assert_verified, moments, start_restored};
use crate::objects::{assert_equal_to_server, files_below, system_dir};
use crate::record::Record;
use crate::server::{Options, Shutdown, value};

/// A restore beside the live server must not write through the live server's links.
#[test]
fn tablespaces_are_restored_to_the_places_named_and_nowhere_else() {
    let mut record = Record::of_server(&Options::default());
    let live = record.ground.make_dir("live space", 0o700);
    record.server.execute(&format!(
        "create tablespace disk location '{}'",
        live.display()
    ));
    record.server.execute("create table spread (id int) tablespace disk; insert into spread select generate_series(1, 1000)");
    record.insert(0);
    record.stream = Some(record.anywhen.stream(&record.server));
    record.anywhen.backup(&record.server);
    record.server.execute("insert into spread values (1001)");
    record.store_all();
    let oid = record
        .server
        .value("select oid from pg_tablespace where spcname = 'disk'");
    let before = files_below(&live);

    // the live place is taken: refused before a byte is written
    let refused = record.target("refused");
    let ended = record
        .anywhen
        .run(&["restore", "-D", refused.to_str().unwrap()]);
    ended.failed();
    ended.says(&[live.to_str().unwrap()]);
    assert_eq!(files_below(&refused).len(), 0, "{ended}");

    for (name, place) in [
        ("by oid", oid.as_str()),
        ("by path", live.to_str().unwrap()),
    ] {
        let space = record.target(&format!("space {name}"));
        let target = record.target(name);
        record
            .anywhen
            .restore(&target, &["-T", &format!("{place}={}", space.display())]);
        assert_verified(&target);
        let link = fs::read_link(target.join("pg_tblspc").join(&oid)).unwrap();
        assert_eq!(link, space);
        let restored = start_restored(&record.ground, &target, End::Promoted);
        assert_eq!(restored.value("select count(*) from spread"), "1001");
        restored.execute("insert into spread values (1002); checkpoint");
    }
    record.server.execute("checkpoint");
    let after = files_below(&live);
    assert_eq!(record.server.value("select count(*) from spread"), "1001");
    assert_eq!(before, after, "files of the live tablespace came or went");
}

/// Replaying CREATE TABLESPACE makes a link to the place that the record names, which on the machine of
/// the live server is the live server's.
#[test]
fn a_tablespace_made_after_the_backup_is_refused_where_its_place_is_taken() {
    let mut record = Record::begun(&Options::default());
    let before = record.now();
    let live = record.ground.make_dir("later", 0o700);
    record.server.execute(&format!(
        "create tablespace later location '{}'",
        live.display()
    ));
    record
        .server
        .execute("create table spread (id int) tablespace later");
    record.store_all();
    let target = record.target("refused");
    let ended = record
        .anywhen
        .run(&["restore", "-D", target.to_str().unwrap()]);
    ended.failed();
    ended.says(&[live.to_str().unwrap()]);
    assert_eq!(files_below(&target).len(), 0, "{ended}");
    assert_eq!(
        record.rows_at("before", &["--to-time", &before], End::Paused),
        "0"
    );
}

/// Names are bytes to a backup. One of them is no UTF-8, which `backup_manifest` writes in hexadecimal.
#[test]
fn names_in_any_script_and_paths_up_to_the_limit_of_tar_come_back() {
    let record = Record::of_server(&Options::default());
    record.server.execute("create database \"données 資料 ñ\"");
    let mut sql = record.server.sql_in("données 資料 ñ");
    sql.batch_execute(
        "create table \"größe\" (\"naïve\" text primary key); insert into \"größe\" values ('Ω')",
    )
    .unwrap();
    drop(sql);
    let long = "d".repeat(49) + "/" + &"f".repeat(49);
    assert_eq!(long.len(), 99);
    let names: [&OsStr; 3] = [
        OsStr::new("größe 資料.conf"),
        OsStr::from_bytes(b"no\xffutf8"),
        OsStr::new(&long),
    ];
    record
        .ground
        .make_dir(&format!("primary/{}", "d".repeat(49)), 0o700);
    for name in names {
        write_as_account(
            &record.server.data().join(name),
            b"# a file beside the cluster's own\n",
            0o600,
        );
    }
    record.anywhen.backup(&record.server);

    let target = record.target("restored");
    record.anywhen.restore(&target, &[]);
    assert_verified(&target);
    for name in names {
        assert_eq!(
            fs::read(target.join(name)).unwrap(),
            b"# a file beside the cluster's own\n",
            "{name:?}"
        );
    }
    let restored = start_restored(&record.ground, &target, End::Promoted);
    let mut sql = restored.sql_in("données 資料 ñ");
    assert_eq!(value(&mut sql, "select \"naïve\" from \"größe\""), "Ω");
}

/// PostgreSQL refuses to send a path that its tar cannot hold, to every tool alike. A backup that went on
/// without that file would be a lie.
#[test]
fn a_path_that_postgresql_cannot_send_fails_the_backup_by_name() {
    let record = Record::of_server(&Options::default());
    let folder = "d".repeat(60);
    record.ground.make_dir(&format!("primary/{folder}"), 0o700);
    let long = record.server.data().join(&folder).join("f".repeat(60));
    write_as_account(&long, b"", 0o600);
    let ended = record
        .anywhen
        .run_on(&record.server, &["backup", "--checkpoint", "fast"]);
    ended.failed();
    ended.says(&[&folder, "too long for tar"]);
    let list = record.anywhen.json(&["list"]);
    assert_eq!(list["backups"].as_array().map(Vec::len), Some(0), "{list}");
}

/// The link of a tablespace may be longer than tar's field for it; the place is in the server's list of
/// tablespaces too.
#[test]
fn a_tablespace_at_a_long_path_is_restored_or_refused_by_name() {
    let record = Record::of_server(&Options::default());
    let live = record
        .ground
        .make_dir(&format!("space-{}", "s".repeat(110)), 0o700);
    record.server.execute(&format!(
        "create tablespace disk location '{}'",
        live.display()
    ));
    record
        .server
        .execute("create table spread (id int) tablespace disk; insert into spread values (7)");
    let ended = record.anywhen.run_on(
        &record.server,
        &["backup", "--checkpoint", "fast", "--json"],
    );
    if ended.code != Some(0) {
        ended.failed();
        ended.says(&["too long for tar"]);
        let list = record.anywhen.json(&["list"]);
        assert_eq!(list["backups"].as_array().map(Vec::len), Some(0), "{list}");
        return;
    }
    let space = record.target("space");
    let target = record.target("restored");
    record.anywhen.restore(
        &target,
        &["-T", &format!("{}={}", live.display(), space.display())],
    );
    let restored = start_restored(&record.ground, &target, End::Promoted);
    assert_eq!(restored.value("select id from spread"), "7");
}

/// An unlogged table is empty after a restore, as after a crash, and can be written to.
#[test]
fn unlogged_tables_come_back_empty_and_usable() {
    let mut record = Record::of_server(&Options::default());
    record.server.execute(
        "create unlogged table scratch (id int primary key); insert into scratch values (1)",
    );
    record.insert(0);
    record.stream = Some(record.anywhen.stream(&record.server));
    record.anywhen.backup(&record.server);
    record
        .server
        .execute("create unlogged table later (id int primary key); insert into later values (1)");
    record.insert(1);
    record.store_all();
    let target = record.target("restored");
    record.anywhen.restore(&target, &[]);
    assert_verified(&target);
    let restored = start_restored(&record.ground, &target, End::Promoted);
    assert_eq!(moments(&restored), "0,1");
    for table in ["scratch", "later"] {
        assert_eq!(
            restored.value(&format!("select count(*) from {table}")),
            "0"
        );
        restored.execute(&format!("insert into {table} values (2)"));
    }
}

#[test]
fn segments_of_1_mib() {
    segments_of(1);
}

#[test]
fn segments_of_64_mib() {
    segments_of(64);
}

/// The segment size is a fact of the cluster: names, pieces and completeness follow from it.
fn segments_of(wal_segment_mib: u32) {
    let mut record = Record::begun(&Options {
        wal_segment_mib,
        ..Options::default()
    });
    let first = record.insert(1);
    record.fill_segments(2);
    record.insert(2);
    record.store_all();
    let status = record.anywhen.json(&["status"]);
    assert_eq!(
        status["clusters"][0]["segment_bytes"],
        wal_segment_mib * 1024 * 1024,
        "{status}"
    );
    let system = system_dir(&record.anywhen, &record.server);
    assert!(assert_equal_to_server(&system, record.server.data()) >= 2);
    assert_eq!(
        record.rows_at("one", &["--to-lsn", &first.commit_lsn], End::Paused),
        "0,1"
    );
    assert_eq!(record.rows_at("latest", &[], End::Promoted), "0,1,2");
}

/// Two-phase transactions, subtransactions and large objects: records of every length, over page and
/// segment borders.
#[test]
fn a_busy_cluster_comes_back_sound() {
    let settings = "max_prepared_transactions = 5\nwal_compression = on\n".to_owned();
    let mut record = Record::begun(&Options {
        wal_segment_mib: 1,
        settings,
        ..Options::default()
    });
    let mut sql = record.server.sql();
    sql.batch_execute(
        "create table busy (id int primary key, body text);
         insert into busy select n, repeat(md5(n::text), 50) from generate_series(1, 4000) n;
         update busy set body = body || 'x' where id % 3 = 0;
         delete from busy where id % 7 = 0;
         create index on busy (body text_pattern_ops) where id < 100",
    )
    .unwrap();
    sql.batch_execute("begin; insert into busy values (9001); savepoint s; insert into busy values (9002); rollback to s; prepare transaction 'two'").unwrap();
    sql.batch_execute("commit prepared 'two'").unwrap();
    sql.batch_execute("vacuum busy").unwrap();
    let digest = "select md5(string_agg(id || coalesce(body, ''), ',' order by id)) from busy";
    let expected = value(&mut sql, digest);
    drop(sql);
    record.store_all();
    let target = record.target("restored");
    record.anywhen.restore(&target, &[]);
    let restored = start_restored(&record.ground, &target, End::Promoted);
    assert_eq!(restored.value(digest), expected);
    assert_sound(&restored, "postgres");
}

/// Debian keeps the configuration in /etc: the data directory alone does not start. `--replay` does.
#[test]
fn a_cluster_whose_configuration_is_elsewhere_is_replayed_nevertheless() {
    let mut record = Record::of_server(&Options {
        hba: "local all,replication archiver trust".to_owned(),
        ..Options::default()
    });
    record.server.stop(Shutdown::Fast);
    let etc = record.ground.make_dir("etc", 0o700);
    record.server.move_configuration(&etc);
    record.server.start();
    record.insert(0);
    record.stream = Some(record.anywhen.stream(&record.server));
    let configuration = etc.join("postgresql.conf");
    let auto = record.server.data().join("postgresql.auto.conf");
    for is_allowed in [false, true] {
        record.server.execute(if is_allowed {
            "grant pg_read_server_files to archiver; grant execute on function
             pg_catalog.pg_read_binary_file(text, bigint, bigint, boolean) to archiver"
        } else {
            "create role archiver login replication in role pg_read_all_settings"
        });
        let conninfo = record
            .server
            .conninfo()
            .replace("user=postgres", "user=archiver");
        let backup = ["backup", "--checkpoint", "fast", "-d", &conninfo];
        let backup = record.anywhen.run(&backup).succeeded();
        let said = [
            "keep copies",
            "GRANT pg_read_server_files",
            configuration.to_str().unwrap(),
        ];
        for said in said {
            assert_eq!(
                backup.stderr.contains(said),
                !is_allowed,
                "{said}: {backup}"
            );
        }
        assert!(!backup.stderr.contains(auto.to_str().unwrap()), "{backup}");
    }
    let known = record.insert(1);
    record.insert(2);
    record.store_all();

    let target = record.target("restored");
    let to = ["--to-time", &known.after, "--replay"];
    let report = record.anywhen.restore(&target, &to);
    assert!(report["reached"]["lsn"].is_string(), "{report}");
    // the operator puts the configuration back, of which the backup has a copy
    let outside = record.target("outside");
    let again = ["--delta", "--outside", outside.to_str().unwrap()];
    let again = [to.as_slice(), &again].concat();
    record.anywhen.restore(&target, &again);
    for name in ["postgresql.conf", "pg_hba.conf", "pg_ident.conf"] {
        let original = etc.join(name);
        let copy = outside.join(original.strip_prefix("/").unwrap());
        assert_eq!(
            fs::metadata(&copy).unwrap().permissions().mode() & 0o7777,
            0o600
        );
        assert_eq!(
            fs::read(&copy).unwrap(),
            fs::read(&original).unwrap(),
            "{name}"
        );
        let contents = fs::read_to_string(&copy)
            .unwrap()
            .replace("data_directory", "# ");
        write_as_account(&target.join(name), contents.as_bytes(), 0o600);
    }
    let restored = start_restored(&record.ground, &target, End::Paused);
    assert_eq!(moments(&restored), "0,1");
}

/// The folder may be there already, made by whoever set up the disk.
#[test]
fn an_empty_folder_is_taken_and_closed() {
    let record = Record::of_server(&Options::default());
    record.insert(0);
    record.anywhen.backup(&record.server);
    let target = record.ground.make_dir("prepared", 0o755);
    record.anywhen.restore(&target, &[]);
    let mode = fs::metadata(&target).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o700);
    let restored = start_restored(&record.ground, &target, End::Promoted);
    assert_eq!(moments(&restored), "0");
}
