//! The files of a cluster, as PostgreSQL's own tests of base backups have them: what a server keeps inside
//! of its data directory, whom it lets read, and what it does to its files while they are copied.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use crate::ground::{command, eventually, rename, write_as_account};
use crate::judge::{End, assert_sound, assert_verified, start_restored};
use crate::record::Record;
use crate::server::{Options, Server, Shutdown, execute, value};

const SUMS: &str = "select string_agg(n || ' ' || bytes, ',' order by n) from (
    select 'grown' n, md5(string_agg(t::text, '' order by id)) bytes from grown t union all
    select 'cut', md5(coalesce(string_agg(t::text, '' order by id), '')) from cut t union all
    select 'made', md5(string_agg(t::text, '' order by id)) from made t) sums";

/// A tablespace without a place of its own is a folder in `pg_tblspc`, which is sent before `pg_tblspc` is.
#[test]
fn tablespaces_inside_of_the_data_directory_come_back() {
    let record = Record::of_server(&Options::default());
    let mut sql = record.server.sql();
    // a session's own setting: no statement may stand before CREATE TABLESPACE in one call
    for statement in [
        "set allow_in_place_tablespaces = on",
        "create tablespace inside location ''",
        "create table spread (id int) tablespace inside",
        "insert into spread select generate_series(1, 1000)",
    ] {
        execute(&mut sql, statement);
    }
    record.anywhen.backup(&record.server);
    execute(&mut sql, "insert into spread values (1001)");
    let target = record.target("restored");
    record.anywhen.restore(&target, &[]);
    assert_verified(&target);
    let oid = value(
        &mut sql,
        "select oid from pg_tablespace where spcname = 'inside'",
    );
    let inside = target.join("pg_tblspc").join(oid);
    assert!(fs::symlink_metadata(&inside).unwrap().is_dir());
    let restored = start_restored(&record.ground, &target, End::Promoted);
    assert_eq!(restored.value("select count(*) from spread"), "1000");
    restored.execute("insert into spread values (0); create table more (id int) tablespace inside");
}

/// The mode of everything below a folder, but for what a server makes anew when it starts.
fn modes(data: &Path) -> BTreeMap<PathBuf, u32> {
    let mut modes = BTreeMap::new();
    let mut folders = vec![data.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let metadata = fs::symlink_metadata(&path).unwrap();
            let below = path.strip_prefix(data).unwrap().to_owned();
            modes.insert(below, metadata.mode() & 0o7777);
            if metadata.is_dir() {
                folders.push(path);
            }
        }
    }
    modes
}

/// Somebody copies the cluster's files as a member of its group, and an extension keeps a key that only
/// its owner may read: a restore opens nothing to others, and closes nothing that was open.
#[test]
fn permissions_and_empty_directories_come_back_as_they_were() {
    let mut record = Record::of_server(&Options::default());
    record.server.stop(Shutdown::Fast);
    let data = record.server.data().to_owned();
    write_as_account(&data.join("secret.key"), b"key", 0o400);
    write_as_account(&data.join("public.crt"), b"certificate", 0o644);
    record.ground.make_dir("primary/empty", 0o700);
    let opened = command("chmod").args(["-R", "g+rX"]).arg(&data).status();
    assert!(opened.unwrap().success());
    fs::set_permissions(data.join("secret.key"), fs::Permissions::from_mode(0o400)).unwrap();
    record.server.start();
    record
        .server
        .execute("create table kept (id int); insert into kept values (7)");
    record.anywhen.backup(&record.server);
    let before = modes(&data);
    let target = record.target("restored");
    record.anywhen.restore(&target, &[]);
    let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o7777;
    assert_eq!(mode(&target), 0o750);
    assert_eq!(mode(&target.join("secret.key")), 0o400);
    assert_eq!(mode(&target.join("public.crt")), 0o644);
    assert_eq!(mode(&target.join("postgresql.auto.conf")), 0o640);
    assert!(target.join("empty").is_dir());
    let mut compared = 0;
    for (path, mode) in modes(&target) {
        let Some(was) = before.get(&path) else {
            continue;
        };
        assert_eq!(mode, *was, "{}: {mode:o}, and was {was:o}", path.display());
        compared += 1;
    }
    assert!(compared > 900, "only {compared} files were compared");
    let restored = start_restored(&record.ground, &target, End::Promoted);
    assert_eq!(restored.value("select id from kept"), "7");
}

/// Tables are cut, extended, dropped and made, and so are a database and a tablespace, between the moment at
/// which a server lists its files and the moment at which it sends them; `pg_wal` is a link to elsewhere.
#[test]
fn what_changes_under_a_backup_comes_back_as_it_was_at_the_end() {
    let mut record = Record::of_server(&Options::default());
    record.server.stop(Shutdown::Fast);
    let wal = record.ground.path("elsewhere");
    let data = record.server.data().to_owned();
    rename(&data.join("pg_wal"), &wal);
    let linked = command("ln")
        .arg("-s")
        .arg(&wal)
        .arg(data.join("pg_wal"))
        .status();
    assert!(linked.unwrap().success());
    record.server.start();
    let space = record.ground.make_dir("space", 0o700);
    let filled = "(id) as select generate_series(1, 40000)";
    record.server.execute(&format!(
        "create table grown {filled}; create table cut {filled}; create table gone {filled};
         create unlogged table passing {filled}; create index on grown (id); create index on cut (id)"
    ));
    record.server.execute("create database dropped");
    record.server.execute(&format!(
        "create tablespace dropped location '{}'",
        space.display()
    ));
    record
        .server
        .execute("create table spread tablespace dropped as select 1");
    let mut session = record.server.sql();
    execute(
        &mut session,
        "create temporary table own as select generate_series(1, 40000)",
    );

    let mut command = record.anywhen.command(&["backup", "--checkpoint", "fast"]);
    command.args(["--max-rate", "4096", "-d", &record.server.conninfo()]);
    let mut backup = record.anywhen.launch(command);
    eventually("the files are listed", || {
        backup.stderr().contains(" begins at ")
    });
    let later = record.ground.make_dir("later", 0o700);
    change(&record.server, &space, &later);
    assert!(
        backup.ended().is_none(),
        "the story is about what changes while a backup runs"
    );
    let status = backup.end("the backup");
    assert_eq!(status.code(), Some(0), "{}", backup.stderr());
    let expected = record.server.value(SUMS);
    // replay makes tablespaces at their own places
    drop(session);
    record.server.stop(Shutdown::Fast);
    rename(&later, &record.ground.path("later.live"));
    rename(&space, &record.ground.path("space.live"));

    let target = record.target("restored");
    record.anywhen.restore(&target, &[]);
    assert_verified(&target);
    assert!(
        fs::symlink_metadata(target.join("pg_wal"))
            .unwrap()
            .is_dir()
    );
    let restored = start_restored(&record.ground, &target, End::Promoted);
    assert_eq!(restored.value(SUMS), expected);
    let left = "select count(*) from pg_class where relname in ('gone', 'spread')";
    assert_eq!(restored.value(left), "0");
    assert_eq!(restored.value("select count(*) from passing"), "0");
    let databases =
        "select string_agg(datname, ',' order by datname) from pg_database where not datistemplate";
    assert_eq!(restored.value(databases), "later,postgres");
    assert_eq!(restored.value("select count(*) from pg_tablespace"), "4");
    assert_eq!(restored.value("select id from placed"), "7");
    assert_sound(&restored, "postgres");
}

/// What happens to files while a backup runs.
fn change(server: &Server, space: &Path, later: &Path) {
    server.execute("truncate cut; insert into cut values (1), (2)");
    server.execute("insert into grown select generate_series(40001, 60000)");
    server.execute("delete from grown where id % 3 = 0");
    server.execute("vacuum (truncate) grown");
    server.execute("drop table gone; create table made (id) as select generate_series(1, 5000)");
    server.execute("drop table spread");
    server.execute("drop tablespace dropped");
    server.execute(&format!(
        "create tablespace again location '{}'",
        space.display()
    ));
    server.execute("drop database dropped");
    server.execute("create database later");
    // two at one place, one after the other
    for statement in ["create tablespace brief", "create tablespace later"] {
        server.execute(&format!("{statement} location '{}'", later.display()));
        if statement.ends_with("brief") {
            server.execute("drop tablespace brief");
        }
    }
    server.execute("create table placed tablespace later as select 7 as id");
    server.execute("checkpoint");
}
