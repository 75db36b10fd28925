//! A cluster in two repositories, a folder nearby and an encrypted bucket elsewhere: one that is away
//! stops nothing, is not acknowledged where it should be, is filled up by itself, and either is enough.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;

use crate::anywhen::Anywhen;
use crate::endpoint::BUCKET;
use crate::ground::{Ground, eventually};
use crate::judge::{End, restored_moments};
use crate::objects::{
    assert_all_whole, files_below, remove_segment, stored_segments, system_dir_in,
};
use crate::record::Record;
use crate::sealed::Identity;
use crate::server::{Options, Server, Shutdown, copy_dir, value};

const SHIFTED: &str = "select coalesce(max(flush_lsn), '0/0') >= pg_current_wal_flush_lsn()
                       from pg_stat_replication where application_name = 'anywhen'";

/// A file of settings outside of the data directory.
const OUTSIDE: &str = "outside.conf";

/// A server whose cluster is in a folder and in a bucket.
fn in_two(acknowledge: &str) -> Record {
    let ground = Ground::on_s3();
    let near = ground.make_dir("near", 0o700);
    let endpoint = ground.endpoint().unwrap();
    let Identity { recipient, file } = Identity::get();
    let url = format!("s3://{BUCKET}/offsite");
    let table = format!(
        "[repository.near]\nurl = \"file://{}\"\n\n\
         [repository.offsite]\nurl = \"{url}\"\nendpoint = \"{}\"\nallow_http = true\n\
         recipients = [\"{recipient}\"]\nidentity_file = \"{}\"\nretry_for = \"1s\"\n\n\
         [cluster.main]\nrepositories = [\"near\", \"offsite\"]\nacknowledge = \"{acknowledge}\"\n",
        near.display(),
        endpoint.url(),
        file.display()
    );
    let anywhen = Anywhen::with_table(&ground, "offsite", url, &table);
    let outside = ground.write(OUTSIDE, "work_mem = '5MB'\n", 0o600);
    let options = Options {
        settings: format!("include '{}'", outside.display()),
        ..Options::default()
    };
    let mut record = Record::on(ground, &options);
    record.anywhen = anywhen;
    record
}

fn near(record: &Record) -> PathBuf {
    record.ground.path("near")
}

fn offsite(record: &Record) -> PathBuf {
    record.ground.path(&record.ground.place_of("offsite"))
}

#[track_caller]
fn eventually_acknowledged(record: &Record, what: &str) {
    eventually(what, || value(&mut record.server.sql(), SHIFTED) == "t");
}

/// What `status` says of a repository.
#[track_caller]
fn missing_in(record: &Record, name: &str) -> serde_json::Value {
    let status = record.anywhen.json(&["status"]);
    let repositories = status["clusters"][0]["repositories"].as_array().unwrap();
    let found = repositories.iter().find(|one| one["name"] == name);
    found.expect("a repository of this name")["missing_objects"].clone()
}

/// Restores from one repository alone, while the other does not exist.
#[track_caller]
fn rows_from(record: &Record, name: &str) -> String {
    let target = record.target(&format!("from-{name}"));
    record.anywhen.restore(&target, &["--repository", name]);
    restored_moments(&record.ground, &target, End::Promoted)
}

/// Names of what both hold that must be the same: everything but hints and keys.
fn names_in(record: &Record, repository: &std::path::Path) -> Vec<String> {
    let system = system_dir_in(repository, &record.server);
    let mut names: Vec<String> = files_below(&system)
        .iter()
        .map(|path| path.strip_prefix(&system).unwrap().display().to_string())
        .filter(|name| !name.starts_with("tip/") && !name.contains(".pieces/"))
        .collect();
    names.sort();
    names
}

/// Were the server told, it would drop WAL that only the place has that may burn with the server.
#[test]
fn what_must_be_in_both_is_not_acknowledged_while_one_is_away() {
    let mut record = in_two("all").begin();
    eventually_acknowledged(&record, "both hold everything");
    record.ground.endpoint_mut().kill9();
    record.insert(1);
    record.fill_segments(2);
    // the folder has it, and goes on taking what comes
    let stored_near = || {
        let segments = names_in(&record, &near(&record));
        let is_segment = |name: &&String| name.starts_with("wal/") && !name.contains(".history");
        segments.iter().filter(is_segment).count()
    };
    let before = stored_near();
    record.fill_segments(1);
    eventually("the folder takes what comes", || stored_near() > before);
    let acknowledged = value(&mut record.server.sql(), SHIFTED);
    assert_eq!(acknowledged, "f", "acknowledged what one repository lacks");
    // a backup is complete in one, and says that it is not in the other
    let backup = record
        .anywhen
        .run_on(&record.server, &["backup", "--checkpoint", "fast"]);
    backup.failed_with(4);
    backup.says(&["complete in one repository", "acknowledge"]);
    record.ground.endpoint_mut().go_on(&[]);
    eventually_acknowledged(&record, "the bucket is filled up, and all is acknowledged");
    record.insert(2);
    record.store_all();
    record.stop_stream();
    assert_eq!(missing_in(&record, "offsite"), 0);
    assert_eq!(missing_in(&record, "near"), 0);
    assert_eq!(
        names_in(&record, &near(&record)),
        names_in(&record, &offsite(&record))
    );
    assert_all_whole(&near(&record));
    assert_all_whole(&offsite(&record));
    fs::remove_dir_all(near(&record)).unwrap();
    assert_eq!(rows_from(&record, "offsite"), "0,1,2");
}

/// A slow or lost repository blocks no commit where one copy is enough.
#[test]
fn where_one_is_enough_the_other_is_filled_up_later() {
    let mut record = in_two("any").begin();
    record.ground.endpoint_mut().kill9();
    record.insert(1);
    record.fill_segments(1);
    eventually_acknowledged(&record, "one repository is enough");
    record
        .anywhen
        .run_on(&record.server, &["backup", "--checkpoint", "fast"])
        .succeeded();
    assert!(
        missing_in(&record, "offsite").is_null(),
        "nobody could ask it"
    );
    record.ground.endpoint_mut().go_on(&[]);
    eventually("the bucket is filled up", || {
        names_in(&record, &near(&record)) == names_in(&record, &offsite(&record))
    });
    record.insert(2);
    record.store_all();
    // the first is lost: nothing is configured anew, and the second is enough
    record.stop_stream();
    fs::remove_dir_all(near(&record)).unwrap();
    let [target, outside] = ["without-near", "outside"].map(|name| record.target(name));
    let flags = ["--outside", outside.to_str().unwrap()];
    let report = record.anywhen.restore(&target, &flags);
    let original = record.ground.path(OUTSIDE);
    let copy = outside.join(original.strip_prefix("/").unwrap());
    assert_eq!(fs::read(copy).unwrap(), fs::read(original).unwrap());
    let rows = restored_moments(&record.ground, &target, End::Promoted);
    assert_eq!(rows, "0,1,2", "{report}");
}

/// What the server removed is in the repository that cannot be asked just now: a strict stream that ended
/// over that would have to be started by hand, and would have missed nothing.
#[test]
fn a_strict_stream_waits_for_the_repository_that_may_have_what_the_server_removed() {
    let mut record = in_two("any").begin();
    record.store_all();
    eventually("the bucket holds everything", || {
        names_in(&record, &near(&record)) == names_in(&record, &offsite(&record))
    });
    record.ground.endpoint_mut().kill9();
    waits_for_what_the_server_removed(record);
}

/// As above, where the one that answers holds a backup and nothing of the stream: that no stream lost WAL
/// behind a backup cannot be said while a repository is silent.
#[test]
fn a_strict_stream_waits_for_the_repository_that_alone_has_what_was_streamed() {
    let mut record = in_two("any");
    record.insert(0);
    record.anywhen.backup(&record.server);
    record.ground.endpoint_mut().kill9();
    record.stream = Some(record.anywhen.stream(&record.server));
    waits_for_what_the_server_removed(record);
}

#[track_caller]
fn waits_for_what_the_server_removed(mut record: Record) {
    for setting in [
        "wal_keep_size = 0",
        "max_wal_size = '32MB'",
        "min_wal_size = '32MB'",
    ] {
        record
            .server
            .execute(&format!("alter system set {setting}"));
    }
    record.server.execute("select pg_reload_conf()");
    let first = record
        .server
        .value("select pg_walfile_name(pg_current_wal_lsn())");
    for _ in 0..2 {
        record.fill_segments(2);
        eventually_acknowledged(&record, "one repository is enough");
        record.server.execute("checkpoint");
    }
    record.insert(1);
    eventually_acknowledged(&record, "one repository is enough");
    record.stop_stream();
    let removed = format!("select count(*) from pg_ls_waldir() where name = '{first}'");
    assert_eq!(record.server.value(&removed), "0", "{first} is still there");
    let folder = near(&record);
    let set_mode = |mode| fs::set_permissions(&folder, fs::Permissions::from_mode(mode)).unwrap();
    set_mode(0o000);
    record.ground.endpoint_mut().go_on(&[]);
    let mut command = record.anywhen.command(&["stream", "--strict"]);
    command.args(["-d", &record.server.conninfo()]);
    let mut stream = record.anywhen.launch(command);
    eventually("the stream says who may have it", || {
        assert!(stream.ended().is_none(), "{}", stream.stderr());
        stream.stderr().contains("may have it, and is not there")
    });
    set_mode(0o700);
    record.insert(2);
    eventually_acknowledged(&record, "the stream goes on");
    let status = record.anywhen.json(&["status"]);
    let holes = status["clusters"][0]["holes"].as_array().unwrap().len();
    assert_eq!(holes, 0, "{status}");
}

/// An outage of one repository must not look like the end of what there is.
#[test]
fn what_only_the_lost_repository_has_is_unreachable_and_not_absent() {
    let mut record = in_two("any").begin();
    record.insert(1);
    record.store_all();
    record.stop_stream();
    record.ground.endpoint_mut().kill9();
    fs::remove_dir_all(near(&record)).unwrap();
    record.ground.make_dir("near", 0o700);
    let target = record.target("nowhere");
    record.anywhen.restore_refused(&target, &[], 4);
    record.ground.endpoint_mut().go_on(&[]);
    let target = record.target("somewhere");
    record.anywhen.restore(&target, &[]);
    assert_eq!(
        restored_moments(&record.ground, &target, End::Promoted),
        "0,1"
    );
}

/// PostgreSQL takes "not in the archive" for the end of WAL. A repository that cannot be read says nothing
/// about what is not there.
#[test]
fn a_segment_that_only_a_closed_repository_may_have_is_not_missing() {
    let mut record = in_two("all").begin();
    record.fill_segments(3);
    record.insert(1);
    record.store_all();
    record.stop_stream();
    let [near_system, offsite_system] =
        [near(&record), offsite(&record)].map(|place| system_dir_in(&place, &record.server));
    let names: Vec<String> = stored_segments(&near_system).into_keys().collect();
    let removed = names.last().unwrap();
    remove_segment(&offsite_system, removed);
    let fetched = record.ground.path("fetched");
    let fetch = |name: &str, code: i32| {
        let arguments = ["wal-fetch", name, fetched.to_str().unwrap()];
        let mut fetch = record.anywhen.command(&arguments);
        fetch.current_dir(record.server.data());
        let ended = record.anywhen.run_command(fetch);
        ended.failed_with(code);
        assert_eq!(fetched.exists(), code == 0, "{ended}");
        fs::remove_file(&fetched).unwrap_or_default();
    };
    let beyond = "0000000100000FFF00000001";
    let set_mode =
        |mode| fs::set_permissions(near(&record), fs::Permissions::from_mode(mode)).unwrap();
    set_mode(0o000);
    fetch(removed, 200);
    fetch(beyond, 200);
    set_mode(0o700);
    fetch(removed, 0);
    fetch(beyond, 1);
}

/// Two copies are there for this: one that is damaged is named, and the other is read.
#[test]
fn a_damaged_copy_is_named_and_the_other_one_read() {
    let mut record = in_two("all").begin();
    record.insert(1);
    record.fill_segments(1);
    record.store_all();
    eventually_acknowledged(&record, "both hold everything");
    record.stop_stream();
    let system = system_dir_in(&near(&record), &record.server);
    let mut damaged = 0;
    for path in files_below(&system.join("wal")) {
        let mut bytes = fs::read(&path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(&path, bytes).unwrap();
        damaged += 1;
    }
    assert!(damaged > 1, "{damaged} objects of WAL");
    let target = record.target("mixed");
    let ended = record
        .anywhen
        .run(&["restore", "-D", target.to_str().unwrap()]);
    ended.says(&["damaged object", "instead"]);
    ended.succeeded();
    assert_eq!(
        restored_moments(&record.ground, &target, End::Promoted),
        "0,1"
    );
}

/// A disk that is not mounted leaves a folder to which all of the other repository is copied: it fills
/// another disk, and hides the copy that is there once the disk is back.
#[test]
fn a_folder_that_was_taken_away_is_not_filled_without_a_word() {
    const ASKS: &str = "is its disk mounted?";
    let mut record = in_two("all").begin();
    record.insert(1);
    record.store_all();
    eventually_acknowledged(&record, "both hold everything");
    let first = record.stream.take().unwrap().stop();
    assert!(!first.contains(ASKS), "both were new: {first}");
    let aside = record.target("aside");
    rustix::fs::rename(near(&record), &aside).unwrap();
    record.ground.make_dir("near", 0o700);
    let backup = record
        .anywhen
        .run_on(&record.server, &["backup"])
        .succeeded();
    backup.says(&["repository near", ASKS]);
    // it was asked for, and is done
    assert_eq!(rows_from(&record, "near"), "0,1");
}

/// A repository that is new, or was away, knows nothing of what the other one has: a server that was set back
/// would be taken there, and its WAL be copied over the other's.
#[test]
fn a_backup_of_another_history_is_refused_where_any_repository_knows_better() {
    let mut record = in_two("any");
    record.server.stop(Shutdown::Fast);
    let copy = record.target("earlier");
    copy_dir(record.server.data(), &copy);
    record.server.start();
    let mut record = record.begin();
    eventually_acknowledged(&record, "both hold everything");
    record.insert(1);
    record.store_all();
    record.stop_stream();
    let before = names_in(&record, &offsite(&record));
    record.server.stop(Shutdown::Fast);
    fs::remove_dir_all(near(&record)).unwrap();
    record.ground.make_dir("near", 0o700);
    let mut earlier = Server::at(&record.ground, &copy);
    earlier.start();
    let refused = record.anywhen.run_on(&earlier, &["backup"]);
    refused.failed_with(5);
    refused.says(&["two histories"]);
    earlier.stop(Shutdown::Fast);
    record.server.start();
    assert_eq!(names_in(&record, &offsite(&record)), before);
    assert_eq!(rows_from(&record, "offsite"), "0,1");
}
