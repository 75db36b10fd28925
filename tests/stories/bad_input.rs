//! What goes wrong at the start: each says what is wrong, where, and what to do, and leaves nothing half
//! done.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use crate::anywhen::Anywhen;
use crate::judge::End;
use crate::objects::{files_below, remove_segment, stored_segments, system_dir};
use crate::record::Record;
use crate::server::{Options, Server, Shutdown};

/// The printed SQL is the remedy: it is run as printed, and the same command works.
#[test]
fn a_role_without_replication_gets_the_sql_that_grants_it() {
    let record = Record::of_server(&Options {
        hba: "local all anywhen trust\nlocal replication anywhen trust".to_owned(),
        ..Options::default()
    });
    record.server.execute("create role anywhen login");
    let conninfo = record
        .server
        .conninfo()
        .replace("user=postgres", "user=anywhen");
    let backup = ["backup", "--checkpoint", "fast", "-d", &conninfo];
    let ended = record.anywhen.run(&backup);
    ended.failed();
    ended.says(&["replication", "alter role"]);
    let remedy = statement(&ended.stderr, "ALTER ROLE");
    record.server.execute(&remedy);
    record.anywhen.run(&backup).succeeded();
}

/// The SQL statement in a message, from its first words to its end.
fn statement(message: &str, begins: &str) -> String {
    let from = &message[message.find(begins).expect("SQL in capitals, to be copied")..];
    from.split([';', '\n', '`'])
        .next()
        .unwrap()
        .trim()
        .to_owned()
}

/// Without a line in `pg_hba.conf` the message has the line.
#[test]
fn a_connection_that_pg_hba_refuses_gets_the_line_to_add() {
    let record = Record::of_server(&Options::default());
    record
        .server
        .execute("create role anywhen login replication");
    let conninfo = record
        .server
        .conninfo()
        .replace("user=postgres", "user=anywhen");
    let ended = record.anywhen.run(&["stream", "-d", &conninfo]);
    ended.failed();
    ended.says(&["pg_hba.conf", "replication", "anywhen"]);
}

#[test]
fn wal_level_minimal_is_named_with_the_setting_to_change() {
    let settings = "wal_level = minimal\nmax_wal_senders = 0\n".to_owned();
    let record = Record::of_server(&Options {
        settings,
        ..Options::default()
    });
    for command in ["stream", "backup"] {
        let ended = record.anywhen.run_on(&record.server, &[command]);
        ended.failed();
        ended.says(&["wal_level", "replica"]);
    }
    nothing_listed(&record.anywhen);
}

#[test]
fn used_up_wal_senders_are_named_with_the_setting_to_raise() {
    let settings = "max_wal_senders = 1\n".to_owned();
    let record = Record::of_server(&Options {
        settings,
        ..Options::default()
    });
    let _stream = record.anywhen.stream(&record.server);
    let ended = record.anywhen.run_on(&record.server, &["backup"]);
    ended.failed();
    ended.says(&["max_wal_senders"]);
    nothing_listed(&record.anywhen);
}

#[test]
fn an_unknown_slot_is_not_found() {
    let record = Record::of_server(&Options::default());
    let ended = record
        .anywhen
        .run_on(&record.server, &["slot", "drop", "--slot", "nowhere"]);
    ended.failed_with(3);
    ended.says(&["nowhere"]);
}

/// A logical slot of that name belongs to somebody else.
#[test]
fn a_slot_that_is_not_physical_is_refused_and_left() {
    let settings = "wal_level = logical\n".to_owned();
    let record = Record::of_server(&Options {
        settings,
        ..Options::default()
    });
    record
        .server
        .execute("select pg_create_logical_replication_slot('theirs', 'pgoutput')");
    let ended = record
        .anywhen
        .run_on(&record.server, &["stream", "--slot", "theirs"]);
    ended.failed();
    ended.says(&["theirs", "logical"]);
    let count = "select count(*) from pg_replication_slots where slot_name = 'theirs'";
    assert_eq!(record.server.value(count), "1");
}

/// Two clusters under one name would mix their WAL: the second one is refused until it is said that it
/// is meant.
#[test]
fn another_system_under_the_clusters_name_is_refused() {
    let record = Record::begun(&Options::default());
    let mut other = Server::init(
        &record.ground,
        "other",
        &Options {
            own_system: true,
            ..Options::default()
        },
    );
    other.start();
    assert_ne!(other.system_id(), record.server.system_id());
    let before = files_below(record.anywhen.repository()).len();
    for command in ["stream", "backup"] {
        let ended = record.anywhen.run_on(&other, &[command]);
        ended.failed();
        ended.says(&[
            "--new-system",
            &other.system_id(),
            &record.server.system_id(),
        ]);
    }
    let system = record
        .anywhen
        .repository()
        .join("main")
        .join(other.system_id());
    assert!(!system.exists(), "something is stored of the other system");
    assert!(files_below(record.anywhen.repository()).len() >= before);
    let slots = "select count(*) from pg_replication_slots";
    assert_eq!(
        other.value(slots),
        "0",
        "a slot is left, which would fill the server"
    );
}

/// Refused before a byte is written, with the nearest moment that can be reached.
#[test]
fn a_target_before_the_first_backup_names_the_nearest_that_can_be_reached() {
    let (record, _) = Record::with_four_rows();
    let target = record.target("refused");
    let to = ["--to-time", "2001-01-01T00:00:00Z"];
    let ended = record.anywhen.restore_refused(&target, &to, 3);
    ended.says(&["2001-01-01", "backup"]);
    let arguments = [
        "restore",
        "-D",
        target.to_str().unwrap(),
        to[0],
        to[1],
        "--json",
    ];
    let failure = record.anywhen.run(&arguments).document();
    assert!(
        failure["error"]["nearest"]["after"].is_string(),
        "{failure}"
    );
    record
        .anywhen
        .restore_refused(&target, &["--to-lsn", "0/1"], 3);
}

#[test]
fn a_target_beyond_all_that_is_stored_is_refused() {
    let (mut record, _) = Record::with_four_rows();
    record.stop_stream();
    let target = record.target("refused");
    record
        .anywhen
        .restore_refused(&target, &["--to-time", "2199-01-01T00:00:00Z"], 3);
    record
        .anywhen
        .restore_refused(&target, &["--to-lsn", "FFFF/0"], 3);
    record
        .anywhen
        .restore_refused(&target, &["--to-xid", "2000000000"], 3);
    record
        .anywhen
        .restore_refused(&target, &["--to-name", "nobody named this"], 3);
    record
        .anywhen
        .restore_refused(&target, &["--backup", "20010101T000000.000Z"], 3);
}

/// A hole is found before a byte is written, not by a server that stops half way.
#[test]
fn a_missing_segment_is_named_and_what_lies_before_it_is_restored() {
    let mut record = Record::begun(&Options::default());
    let first = record.insert(1);
    record.fill_segments(4);
    let second = record.insert(2);
    record.store_all();
    record.stop_stream();
    let system = system_dir(&record.anywhen, &record.server);
    let middle = stored_segments(&system)
        .keys()
        .rev()
        .nth(1)
        .unwrap()
        .clone();
    remove_segment(&system, &middle);

    let target = record.target("refused");
    let ended = record.anywhen.restore_refused(&target, &[], 3);
    ended.says(&[&middle]);
    let status = record.anywhen.json(&["status"]);
    assert_eq!(
        status["clusters"][0]["holes"].as_array().map(Vec::len),
        Some(1),
        "{status}"
    );
    // the hole lies between the fillings of two segments, which were committed between these
    let hole = &status["clusters"][0]["holes"][0];
    let moment = |side: &str| hole[side].as_str().unwrap().to_owned();
    let (earliest, latest) = (moment("earliest"), moment("latest"));
    let known = [&first.after, &earliest, &latest, &second.committed];
    assert!(known.is_sorted(), "{known:?}");
    assert!(earliest < latest, "{hole}");
    let metrics = record.anywhen.run(&["status", "--metrics"]).succeeded();
    let system = record.server.system_id();
    let holes = format!("\nanywhen_holes{{cluster=\"main\",system_id=\"{system}\"}} 1\n");
    assert!(metrics.stdout.contains(&holes), "{metrics}");
    record
        .anywhen
        .run(&["status", "--metrics", "--json"])
        .failed_with(2);
    let before = ["--to-lsn", &first.commit_lsn];
    assert_eq!(record.rows_at("before", &before, End::Paused), "0,1");
}

/// Damage is never restored as if it were data.
#[test]
fn a_damaged_segment_is_found_and_named() {
    let mut record = Record::begun(&Options::default());
    record.fill_segments(3);
    record.insert(1);
    record.store_all();
    record.stop_stream();
    let system = system_dir(&record.anywhen, &record.server);
    let (name, path) = stored_segments(&system).into_iter().nth_back(1).unwrap();
    let mut bytes = fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x10;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    fs::write(&path, bytes).unwrap();
    let target = record.target("refused");
    let ended = record
        .anywhen
        .run(&["restore", "-D", target.to_str().unwrap()]);
    if ended.code == Some(0) {
        // the plan need not read every byte; the fetch of that segment must
        let fetched = record.ground.path("fetched");
        let mut fetch = record
            .anywhen
            .command(&["wal-fetch", &name, fetched.to_str().unwrap()]);
        fetch.current_dir(&target);
        record.anywhen.run_command(fetch).failed_with(200);
        assert!(!fetched.exists(), "damaged bytes were handed out");
        return;
    }
    ended.failed_with(5);
    ended.says(&[&name]);
}

#[test]
fn a_repository_that_cannot_be_written_is_named() {
    let record = Record::of_server(&Options::default());
    fs::set_permissions(
        record.anywhen.repository(),
        fs::Permissions::from_mode(0o500),
    )
    .unwrap();
    let path = record.anywhen.repository().to_str().unwrap();
    for command in ["stream", "backup"] {
        let ended = record.anywhen.run_on(&record.server, &[command]);
        ended.failed();
        ended.says(&[path, "permission"]);
    }
    let slots = "select count(*) from pg_replication_slots";
    assert_eq!(
        record.server.value(slots),
        "0",
        "a slot is left that nothing will ever advance"
    );
}

#[test]
fn a_server_that_is_not_there_is_unreachable() {
    let mut record = Record::of_server(&Options::default());
    let conninfo = record.server.conninfo();
    record.server.stop(Shutdown::Fast);
    let ended = record.anywhen.run(&["backup", "-d", &conninfo]);
    ended.failed_with(4);
    ended.says(&["primary.sock"]);
}

#[track_caller]
fn nothing_listed(anywhen: &Anywhen) {
    // nothing was ever stored for the cluster, which list may say with an empty list or with "not found"
    let ended = anywhen.run(&["list", "--json"]);
    assert!(matches!(ended.code, Some(0 | 3)), "{ended}");
    assert!(!ended.stdout.contains("start_lsn"), "{ended}");
}

/// initdb or `pg_upgrade` makes another system; told that it is meant, both are kept and can be restored.
#[test]
fn a_new_system_is_taken_when_it_is_said_to_be_meant() {
    let record = Record::begun(&Options::default());
    let options = Options {
        own_system: true,
        ..Options::default()
    };
    let mut other = Server::init(&record.ground, "other", &options);
    other.start();
    other.execute("create table moments (id int); insert into moments values (77)");
    let backup = ["backup", "--checkpoint", "fast", "--new-system"];
    record.anywhen.run_on(&other, &backup).succeeded();
    let list = record.anywhen.json(&["list"]);
    assert_eq!(list["backups"].as_array().map(Vec::len), Some(2), "{list}");
    for (name, server, rows) in [("first", &record.server, "0"), ("second", &other, "77")] {
        let system = server.system_id();
        assert_eq!(
            record.rows_at(name, &["--system-id", &system], End::Promoted),
            rows
        );
    }
}

/// A pack that rots away is found by its own checks, not by the server that starts on it.
#[test]
fn a_damaged_backup_is_never_restored_as_if_it_were_data() {
    let record = Record::of_server(&Options::default());
    record.insert(0);
    record.anywhen.backup(&record.server);
    let packs = system_dir(&record.anywhen, &record.server).join("packs");
    let pack = files_below(&packs).pop().expect("a pack");
    let mut bytes = fs::read(&pack).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x01;
    fs::set_permissions(&pack, fs::Permissions::from_mode(0o600)).unwrap();
    fs::write(&pack, &bytes).unwrap();
    let damaged = record.target("damaged");
    let ended = record
        .anywhen
        .run(&["restore", "-D", damaged.to_str().unwrap()]);
    ended.failed_with(5);
    ended.says(&[pack.file_name().unwrap().to_str().unwrap()]);
    assert!(
        !damaged.join("global/pg_control").exists(),
        "a server would start there"
    );

    fs::remove_file(&pack).unwrap();
    let missing = record.target("missing");
    let ended = record
        .anywhen
        .run(&["restore", "-D", missing.to_str().unwrap()]);
    assert!(matches!(ended.code, Some(3 | 5)), "{ended}");
    ended.says(&[pack.file_name().unwrap().to_str().unwrap()]);
}

/// Between backups that are complete by themselves nothing was promised: no alarm, and both restore.
#[test]
fn backups_without_a_stream_are_windows_of_their_own_and_no_hole() {
    let record = Record::of_server(&Options::default());
    record.insert(0);
    let first = record.anywhen.backup(&record.server);
    record.fill_segments(3);
    let between = record.insert(1);
    record.fill_segments(3);
    record.insert(2);
    record.anywhen.backup(&record.server);
    let status = record.anywhen.json(&["status"]);
    let cluster = &status["clusters"][0];
    assert_eq!(
        cluster["holes"].as_array().map(Vec::len),
        Some(0),
        "{status}"
    );
    assert_eq!(
        cluster["windows"].as_array().map(Vec::len),
        Some(2),
        "{status}"
    );
    let refused = record.target("refused");
    record
        .anywhen
        .restore_refused(&refused, &["--to-time", &between.after], 3);
    let id = first["id"].as_str().unwrap();
    assert_eq!(
        record.rows_at("first", &["--backup", id, "--immediate"], End::Paused),
        "0"
    );
    assert_eq!(record.rows_at("latest", &[], End::Promoted), "0,1,2");
}
