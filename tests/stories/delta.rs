//! `restore --delta`: a cluster is restored over its own directory.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use rustix::process::Signal;

use crate::ground::{eventually, give, rename, write_as_account};
use crate::judge::{End, assert_sound, assert_verified, moments, start_restored};
use crate::objects::files_below;
use crate::record::Record;
use crate::server::{Options, Server, Shutdown, copy_dir, value};
use crate::standbys::{follow, standby_of};
use crate::workloads::fill_for_a_kill;

const MARKER: &str = "anywhen-restore-unfinished";
const ROWS: &str = "select count(*) || ' ' || md5(string_agg(words, ',' order by id)) from filled";

/// A cluster with many files, a tablespace, a backup, WAL behind that, and more WAL that is stored nowhere; its
/// server is stopped. The flag that names its tablespace, and what its rows come to.
fn stopped() -> (Record, String, String) {
    let mut record = Record::of_server(&Options::default());
    record.server.stop(Shutdown::Fast);
    let conf = record.server.data().join("postgresql.conf");
    let linked = record.ground.path("linked.conf");
    rename(&conf, &linked);
    symlink(&linked, &conf).unwrap();
    record.server.start();
    let elsewhere = fill_for_a_kill(&record);
    let mut record = record.begin();
    record.insert(1);
    let rows = record.server.value(ROWS);
    record.store_all();
    record.stop_stream();
    record.insert(2);
    record
        .server
        .execute("update filled set words = 'lost' where id % 100 = 0");
    let oid = record
        .server
        .value("select oid from pg_tablespace where spcname = 'elsewhere'");
    record.server.stop(Shutdown::Fast);
    (record, format!("{oid}={}", elsewhere.display()), rows)
}

fn contents(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let files = files_below(folder).into_iter();
    files
        .map(|path| {
            let below = path.strip_prefix(folder).unwrap().to_owned();
            (below, fs::read(path).unwrap())
        })
        .collect()
}

/// Files of a table or an index that are large enough to be damaged in the middle.
fn relations(data: &Path) -> Vec<PathBuf> {
    let mut files = files_below(&data.join("base"));
    files.retain(|path| path.metadata().unwrap().len() > 16384);
    assert!(files.len() > 10, "only {} large files", files.len());
    files
}

/// A disk that lies, an operator who tidied up, and an administrator's own files.
fn spoil(record: &Record, data: &Path) -> PathBuf {
    let files = relations(data);
    let file = fs::File::options().write(true).open(&files[0]).unwrap();
    file.write_all_at(b"damaged", 9000).unwrap();
    fs::File::options()
        .write(true)
        .open(&files[1])
        .unwrap()
        .set_len(8192)
        .unwrap();
    fs::remove_file(&files[2]).unwrap();
    let precious = record.ground.write("precious", "of somebody", 0o600);
    fs::remove_file(&files[3]).unwrap();
    fs::hard_link(&precious, &files[3]).unwrap();
    fs::set_permissions(&files[4], fs::Permissions::from_mode(0o400)).unwrap();
    fs::remove_file(&files[5]).unwrap();
    symlink(&precious, &files[5]).unwrap();
    write_as_account(&data.join("notes.txt"), b"x", 0o600);
    let logs = data.join("log");
    fs::create_dir(&logs).unwrap();
    give(&logs);
    write_as_account(&logs.join("postgresql.log"), b"PANIC", 0o600);
    for signal in ["backup_label", "tablespace_map", "standby.signal"] {
        write_as_account(&data.join(signal), b"nonsense", 0o600);
    }
    precious
}

/// No base backup has links, and `pg_verifybackup` counts those that are there.
#[track_caller]
fn assert_verified_but_for_links(data: &Path) {
    let conf = data.join("postgresql.conf");
    let linked = fs::read_link(&conf).unwrap();
    fs::remove_file(&conf).unwrap();
    assert_verified(data);
    symlink(linked, &conf).unwrap();
}

/// What is right stays, and what the server wrote last is neither replayed nor lost.
#[test]
fn a_cluster_is_restored_over_its_own_directory() {
    let (record, place, rows) = stopped();
    let data = record.server.data().to_owned();
    let wal = contents(&data.join("pg_wal"));
    let precious = spoil(&record, &data);
    let before = contents(&data);
    let asked = ["restore", "-D", data.to_str().unwrap(), "--delta"];
    let named = [asked.as_slice(), &["-T", &place]].concat();

    // a plan first, and nothing done without the tablespace named
    let refused = record.anywhen.run(&asked);
    refused.failed_with(2);
    refused.says(&["only where it is named", &format!("-T {place}")]);
    let planned = record
        .anywhen
        .run(&[named.as_slice(), &["--dry-run"]].concat());
    let planned = planned.succeeded().stdout;
    for said in [
        "global/pg_control is removed",
        "pg_wal/before-…",
        "over what is there",
        "they are removed: notes.txt\n",
    ] {
        assert!(planned.contains(said), "{said}: {planned}");
    }
    assert!(
        contents(&data) == before,
        "a refusal or a plan changed something"
    );

    let report = record.anywhen.restore(&data, &["--delta", "-T", &place]);
    let (kept, bytes) = (&report["kept_bytes"], &report["bytes"]);
    let (kept, bytes) = (kept.as_u64().unwrap(), bytes.as_u64().unwrap());
    assert!(kept > bytes / 2 && kept < bytes, "{report}");
    assert!(data.join("postgresql.conf").is_symlink());
    assert_verified_but_for_links(&data);
    assert_eq!(fs::read_to_string(&precious).unwrap(), "of somebody");
    for gone in [
        "notes.txt",
        "log",
        "tablespace_map",
        "standby.signal",
        MARKER,
    ] {
        assert!(!data.join(gone).exists(), "{gone}");
    }

    // what was set aside, to the byte; a server leaves it alone
    let aside = PathBuf::from(report["set_aside"].as_str().unwrap());
    let mut found = contents(&aside);
    assert_eq!(
        found.remove(Path::new("log/postgresql.log")).as_deref(),
        Some(b"PANIC".as_slice())
    );
    assert!(found == wal, "WAL was lost on the way");
    let mut restored = start_restored(&record.ground, &data, End::Promoted);
    assert_eq!(moments(&restored), "0,1");
    assert_eq!(restored.value(ROWS), rows);
    assert_eq!(restored.value("select count(*) from far"), "20000");
    assert_sound(&restored, "postgres");
    restored.execute("checkpoint");
    restored.stop(Shutdown::Fast);
    assert!(contents(&aside).len() > wal.len());

    // once more, to another moment: what was set aside before stays where it is
    let again = record
        .anywhen
        .restore(&data, &["--delta", "-T", &place, "--immediate"]);
    assert_verified_but_for_links(&data);
    assert!(again["set_aside"] != report["set_aside"], "{again}");
    assert!(contents(&aside).len() > wal.len());
}

/// Nothing is touched that is not this cluster's, or that somebody uses.
#[test]
fn nothing_is_written_over_that_is_not_this_clusters_own() {
    let record = Record::begun(&Options::default());
    let data = record.server.data().to_owned();
    let refused = |target: &Path, words: &[&str]| {
        let ended = record
            .anywhen
            .run(&["restore", "-D", target.to_str().unwrap(), "--delta"]);
        ended.failed_with(2);
        ended.says(words);
        ended
    };
    refused(&data, &["a running server holds", "pg_ctl -D"]);
    assert_eq!(moments(&record.server), "0");

    let other = Server::init(
        &record.ground,
        "other",
        &Options {
            own_system: true,
            ..Options::default()
        },
    );
    let photos = record.ground.make_dir("photos", 0o700);
    record.ground.write("photos/one", "x", 0o600);
    for (target, words) in [
        (
            other.data(),
            ["holds another cluster", "expected system identifier"],
        ),
        (&photos, ["does not hold a cluster", "global/pg_control"]),
    ] {
        let before = contents(target);
        refused(target, &words);
        assert!(contents(target) == before, "{}", target.display());
    }

    let mut record = record;
    record.store_all();
    record.stop_stream();
    record.server.stop(Shutdown::Fast);
    let target = |name: &str| record.ground.path(name);
    let copied = target("copied");
    copy_dir(&data, &copied);
    write_as_account(&copied.join("postmaster.pid"), b"2147483647\n", 0o600);
    let before = contents(&copied);
    let refused = |words: &[&str]| {
        let ended = record
            .anywhen
            .run(&["restore", "-D", copied.to_str().unwrap(), "--delta"]);
        ended.failed_with(2);
        ended.says(words);
    };
    refused(&["ended without a shutdown", "in no container"]);
    assert!(contents(&copied) == before);
    fs::remove_file(copied.join("postmaster.pid")).unwrap();
    let plain = record
        .anywhen
        .run(&["restore", "-D", copied.to_str().unwrap()]);
    plain.failed_with(2);
    plain.says(&["holds a PostgreSQL cluster already", "with --delta"]);

    // what pg_wal leads to
    let lost = target("lost");
    rename(&copied.join("pg_wal"), &lost);
    symlink(target("nowhere"), copied.join("pg_wal")).unwrap();
    refused(&["pg_wal", "mount the file system"]);
    fs::remove_file(copied.join("pg_wal")).unwrap();
    symlink(&photos, copied.join("pg_wal")).unwrap();
    refused(&["something else than WAL", "photos/one"]);
    fs::remove_file(copied.join("pg_wal")).unwrap();
    rename(&lost, &copied.join("pg_wal"));
    let mut before = before;
    before.remove(Path::new("postmaster.pid"));
    assert!(contents(&copied) == before, "a refusal changed something");

    // what is there already where it was said that something is: an ordinary restore
    let (absent, wal) = (target("absent"), target("absent.wal"));
    let flags = ["--delta", "--waldir", wal.to_str().unwrap()];
    let report = record.anywhen.restore(&absent, &flags);
    assert_eq!(report["kept_bytes"], 0, "{report}");
    assert!(report["set_aside"].is_null(), "{report}");
    assert_verified(&absent);
    assert_eq!(fs::read_link(absent.join("pg_wal")).unwrap(), wal);
    let restored = start_restored(&record.ground, &absent, End::Promoted);
    assert_eq!(moments(&restored), "0");
    assert!(!files_below(&wal).is_empty());
}

/// Takes all files of tables away, so that there is time to kill it, and kills a restore over the cluster halfway.
fn kill_halfway(record: &Record, data: &Path, flags: &[&str]) {
    let asked = [&["restore", "-D", data.to_str().unwrap(), "--delta"], flags].concat();
    let is_killed = (0..20).any(|_| {
        for path in files_below(&data.join("base")) {
            fs::remove_file(path).unwrap();
        }
        let mut killed = record.anywhen.launch(record.anywhen.command(&asked));
        eventually("some files are there", || {
            killed.ended().is_some() || files_below(&data.join("base")).len() > 300
        });
        if killed.ended().is_none() {
            killed.signal(Signal::KILL);
            killed.end("what was killed");
        }
        !data.join("global/pg_control").exists()
    });
    assert!(
        is_killed,
        "it came to its end before it was killed, each time"
    );
}

/// WAL stays where `pg_wal` leads, and nothing is used that is not named: not a copy's links either.
#[test]
fn a_restore_over_a_cluster_that_was_killed_goes_on() {
    let (record, place, rows) = stopped();
    let data = record.server.data().to_owned();
    let disk = record.ground.path("wal-disk");
    rename(&data.join("pg_wal"), &disk);
    symlink(&disk, data.join("pg_wal")).unwrap();
    let wal = contents(&disk);
    let tablespace = ["-T", place.as_str()];
    let waldir = ["--waldir", disk.to_str().unwrap()];
    let named = [tablespace, waldir].concat();
    let asked = |how: &str, flags: &[&str]| {
        let asked = [&["restore", "-D", data.to_str().unwrap(), how], flags].concat();
        record.anywhen.run(&asked)
    };
    let refused = asked("--delta", &tablespace);
    refused.failed_with(2);
    refused.says(&["is a link to", "--waldir"]);
    assert!(contents(&disk) == wal, "a refusal changed something");
    let logs = data.join("log");
    fs::create_dir(&logs).unwrap();
    give(&logs);
    write_as_account(&logs.join("postgresql.log"), b"PANIC", 0o600);

    kill_halfway(&record, &data, &named);
    for flags in [tablespace, waldir] {
        let refused = asked("--resume", &flags);
        refused.failed_with(2);
        refused.says(&["only where it is named"]);
    }
    let went_on = asked("--delta", &[named.as_slice(), &["--json"]].concat());
    let kept = &went_on.succeeded().document()["kept_bytes"];
    assert!(kept.as_u64().unwrap() > 0, "nothing was kept");
    assert_verified_but_for_links(&data);
    assert_eq!(fs::read_link(data.join("pg_wal")).unwrap(), disk);
    let files = contents(&disk);
    let is_there = |path: &Path, bytes: &[u8]| {
        let mut files = files.iter();
        files.any(|(found, same)| found.ends_with(path) && same == bytes)
    };
    for (path, bytes) in &wal {
        assert!(is_there(path, bytes), "{} is lost", path.display());
    }
    assert!(is_there(Path::new("log/postgresql.log"), b"PANIC"));
    let mut restored = start_restored(&record.ground, &data, End::Promoted);
    let mut sql = restored.sql();
    assert_eq!(value(&mut sql, ROWS), rows);
    assert_eq!(value(&mut sql, "select count(*) from far"), "20000");
    drop(sql);
    assert_eq!(moments(&restored), "0,1");
    restored.stop(Shutdown::Fast);
}

/// The way back for a standby whose disk has damaged what it holds.
#[test]
fn a_damaged_standby_is_restored_and_follows_its_primary_again() {
    let mut record = Record::begun(&Options::default());
    record.server.execute(
        "create table filled as select n as id, md5(n::text) as words from generate_series(1, 60000) n",
    );
    let mut standby = standby_of(&record, &record.ground);
    record.insert(1);
    record.anywhen.backup(&record.server);
    record.insert(2);
    follow(&record, &standby);
    standby.stop(Shutdown::Fast);
    let data = standby.data().to_owned();
    let file = relations(&data).swap_remove(0);
    let file = fs::File::options().write(true).open(file).unwrap();
    file.write_all_at(&[7; 300], 9000).unwrap();
    record.insert(3);
    record.store_all();

    let planned = [
        "restore",
        "-D",
        data.to_str().unwrap(),
        "--delta",
        "--standby",
        "--dry-run",
    ];
    let planned = record.anywhen.run(&planned).succeeded().stdout;
    assert!(
        planned.contains("primary_slot_name of the directory"),
        "{planned}"
    );
    let report = record.anywhen.restore(&data, &["--delta", "--standby"]);
    assert!(report["kept_bytes"].as_u64().unwrap() > 0, "{report}");
    assert_verified(&data);
    // also if it is killed once the backup's settings lie there
    kill_halfway(&record, &data, &["--standby"]);
    fs::remove_file(data.join("postgresql.auto.conf")).unwrap();
    record.anywhen.restore(&data, &["--resume", "--standby"]);
    assert_verified(&data);
    standby.start();
    record.insert(4);
    follow(&record, &standby);
    assert_eq!(moments(&standby), "0,1,2,3,4");
    let receivers = "select count(*) from pg_stat_wal_receiver";
    eventually("it streams", || standby.value(receivers) == "1");
    standby.stop(Shutdown::Fast);

    // or another primary than before
    let conninfo = format!("{} application_name=named", record.server.conninfo());
    let flags = ["--delta", "--standby", "--primary-conninfo", &conninfo];
    record.anywhen.restore(&data, &flags);
    standby.start();
    follow(&record, &standby);
    let named = "select count(*) from pg_stat_replication where application_name = 'named'";
    eventually("it streams as it was told", || {
        record.server.value(named) == "1"
    });
    assert_eq!(moments(&standby), "0,1,2,3,4");
}
