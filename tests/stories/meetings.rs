//! Meeting a server again: what lies between the last stored byte and a new slot, servers of the list that
//! are not the one, and what is stored that cannot be read.

use std::fs;
use std::path::{Path, PathBuf};

use crate::anywhen::{Anywhen, Stream};
use crate::ground::eventually;
use crate::judge::End;
use crate::objects::{assert_no_gap, assert_wal_of, files_below, stored_segments, system_dir};
use crate::record::Record;
use crate::server::{Options, Server, Shutdown, copy_dir, write_setting};
use crate::standbys::{follow, standby_of};

const OLDEST: &str = "select min(name) from pg_ls_waldir() where name ~ '^[0-9A-F]{24}$'";

fn begun() -> Record {
    Record::begun(&Options {
        wal_segment_mib: 1,
        ..Options::default()
    })
}

/// Sets what the server keeps for nobody.
fn keep(server: &Server, settings: &[&str]) {
    for setting in settings {
        server.execute(&format!("alter system set {setting}"));
    }
    server.execute("select pg_reload_conf()");
}

fn drop_slot(server: &Server) {
    server.execute("select pg_drop_replication_slot('anywhen_main')");
}

fn holes(record: &Record) -> usize {
    let status = record.anywhen.json(&["status"]);
    status["clusters"][0]["holes"].as_array().unwrap().len()
}

/// Where the slot of a stream that is met now would begin to keep WAL.
fn redo_segment(server: &Server) -> String {
    server.value("select pg_walfile_name(redo_lsn) from pg_control_checkpoint()")
}

/// A stream over all hosts of the list.
fn stream_over(record: &Record, server: &Server, hosts: &[&Server], attributes: &str) -> Stream {
    let dirs: Vec<String> = hosts
        .iter()
        .map(|host| host.socket_dir().display().to_string())
        .collect();
    let conninfo = format!(
        "host={} port={} user=postgres dbname=postgres target_session_attrs={attributes}",
        dirs.join(","),
        vec!["5432"; dirs.len()].join(",")
    );
    let anywhen: &Anywhen = &record.anywhen;
    let mut command = anywhen.command(&["stream", "--flush-interval", "200ms"]);
    command.args(["-d", &conninfo]);
    anywhen.stream_of(server, command)
}

/// A new slot begins at the last checkpoint, and the tip is only a hint: where it cannot be read, what the
/// server has in between is stored all the same, and the loss of the slot is said.
#[test]
fn a_damaged_tip_and_a_dropped_slot_hide_no_break() {
    let mut record = begun();
    record.store_all();
    record.stop_stream();
    drop_slot(&record.server);
    let system = system_dir(&record.anywhen, &record.server);
    let tip = system.join("tip/00000001");
    fs::write(&tip, b"{ \"lsn\": ").unwrap();
    keep(&record.server, &["wal_keep_size = '1GB'"]);
    record.insert(1);
    record.fill_segments(4);
    record.server.execute("checkpoint");
    let last = stored_segments(&system).into_keys().next_back();
    assert!(last.is_none_or(|last| last < redo_segment(&record.server)));
    record.stream = Some(record.anywhen.stream(&record.server));
    record.insert(2);
    record.store_all();
    let said = record.stream.as_ref().unwrap().stderr();
    assert!(said.contains("slot anywhen_main was not there"), "{said}");
    record.stop_stream();
    assert!(assert_wal_of(&system, &[record.server.data()], 1).segments >= 4);
    assert_no_gap(&system, 1);
    assert_eq!(record.rows_at("latest", &[], End::Promoted), "0,1,2");
}

/// A new primary may keep much more WAL than its new slot: behind what it removed, all that it has is
/// stored, and the hole is no larger than it must be.
#[test]
fn behind_removed_wal_all_that_the_server_still_has_is_stored() {
    let mut record = begun();
    record.store_all();
    record.stop_stream();
    drop_slot(&record.server);
    let nothing = [
        "wal_keep_size = 0",
        "max_wal_size = '2MB'",
        "min_wal_size = '2MB'",
    ];
    keep(&record.server, &nothing);
    // the first one lets go of what came before the second last
    for _ in 0..2 {
        record.fill_segments(3);
        record.server.execute("checkpoint");
    }
    keep(&record.server, &["wal_keep_size = '1GB'"]);
    record.fill_segments(4);
    record.server.execute("checkpoint");
    record.insert(1);
    let oldest = record.server.value(OLDEST);
    let system = system_dir(&record.anywhen, &record.server);
    let kept = redo_segment(&record.server);
    assert!(
        oldest < kept,
        "the story is about what lies between {oldest} and {kept}"
    );
    record.stream = Some(record.anywhen.stream(&record.server));
    record.store_all();
    record.stop_stream();
    let segments = stored_segments(&system);
    assert!(segments.contains_key(&oldest), "{oldest} of {segments:?}");
    assert_eq!(holes(&record), 1);
}

/// Two hosts are named, the new primary restarts, and the old one answers meanwhile: that is no reason to
/// end a service, nor to leave a slot there that would fill its disk.
#[test]
fn a_host_that_was_left_behind_is_passed_over_until_the_primary_is_back() {
    let mut record = begun();
    record.store_all();
    record.stop_stream();
    let ground = &record.ground;
    let mut new = standby_of(&record, ground);
    follow(&record, &new);
    new.promote();
    drop_slot(&record.server);
    let hosts = [&record.server, &new];
    let mut stream = stream_over(&record, &new, &hosts[1..], "any");
    new.execute("insert into moments values (1)");
    stream.store_all(&new);
    stream.stop();
    // the left one stands first in the list
    let mut stream = stream_over(&record, &new, &hosts, "any");
    new.execute("insert into moments values (2)");
    stream.store_all(&new);
    new.stop(Shutdown::Fast);
    eventually("it is said that no server can be followed", || {
        stream.assert_running();
        stream.stderr().contains("no server can be followed now")
    });
    new.start();
    new.execute("insert into moments values (3)");
    stream.store_all(&new);
    stream.stop();
    let slots = "select count(*) from pg_replication_slots";
    assert_eq!(record.server.value(slots), "0", "a slot that nobody uses");
    assert_eq!(record.rows_at("latest", &[], End::Promoted), "0,1,2,3");
}

/// A primary whose disk was set back by some segments would be waited for until it has written as much
/// again, and that is other WAL: it is told at once, whatever language it speaks.
#[test]
fn a_primary_that_was_set_back_is_refused_at_once() {
    let mut record = begun();
    record.server.stop(Shutdown::Fast);
    let copy = record.target("earlier");
    copy_dir(record.server.data(), &copy);
    record.server.start();
    record.fill_segments(5);
    record.store_all();
    record.stop_stream();
    record.server.stop(Shutdown::Fast);
    let mut earlier = Server::at(&record.ground, &copy);
    write_setting(&copy, "lc_messages = 'C'");
    earlier.start();
    for command in ["stream", "backup"] {
        let ended = record.anywhen.run_on(&earlier, &[command]);
        ended.failed_with(5);
        ended.says(&["two histories", "no standby", "set back"]);
    }
}

/// Objects below the pieces' folders, sorted.
fn pieces(system: &Path) -> Vec<PathBuf> {
    let files = files_below(&system.join("wal")).into_iter();
    let mut pieces: Vec<PathBuf> = files
        .filter(|path| path.to_str().unwrap().contains(".pieces/"))
        .collect();
    pieces.sort();
    pieces
}

/// Makes an object unreadable, and leaves its name.
fn damage(object: &Path) {
    let mut bytes = fs::read(object).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0xff;
    fs::write(object, bytes).unwrap();
}

/// The server still has what the repository has lost: a backup that called itself done with it would be
/// restored up to the damage.
#[test]
fn a_backup_does_not_take_damaged_wal_for_its_own() {
    let mut record = begun();
    let mut command = record.anywhen.command(&["backup", "--max-rate", "4096"]);
    command.args(["-d", &record.server.conninfo()]);
    let mut backup = record.anywhen.launch(command);
    eventually("the backup has begun", || {
        backup.stderr().contains(" begins at ")
    });
    record.insert(1);
    record.fill_segments(2);
    record.server.execute("select pg_switch_wal()");
    record.store_all();
    record.stop_stream();
    let segments = stored_segments(&system_dir(&record.anywhen, &record.server));
    let (_, last) = segments.iter().next_back().unwrap();
    damage(last);
    let status = backup.end("the backup");
    assert_eq!(status.code(), Some(5), "{}", backup.stderr());
    let said = backup.stderr();
    assert!(
        said.contains("cannot be read") && said.contains("pg_switch_wal"),
        "{said}"
    );
    record
        .anywhen
        .run_on(&record.server, &["backup", "--checkpoint", "fast"])
        .succeeded();
    assert_eq!(record.rows_at("latest", &[], End::Promoted), "0,1");
}

/// The server is idle, so that what comes again would have the very name of what is damaged: it must not
/// count as stored, and nothing may be written over it.
#[test]
fn a_damaged_piece_is_stored_again_beside_it() {
    let mut record = begun();
    record.store_all();
    for row in 1..=3 {
        record.insert(row);
        record.store_all();
    }
    record.stop_stream();
    let system = system_dir(&record.anywhen, &record.server);
    for damaged in [pieces(&system).pop().unwrap(), pieces(&system).remove(0)] {
        damage(&damaged);
        let before = fs::read(&damaged).unwrap();
        record.stream = Some(record.anywhen.stream(&record.server));
        record.store_all();
        let said = record.stream.as_ref().unwrap().stderr();
        assert!(said.contains("cannot be read"), "{said}");
        record.stream.take().unwrap().kill9();
        assert_eq!(fs::read(&damaged).unwrap(), before, "written over");
    }
    assert_eq!(record.rows_at("beside", &[], End::Promoted), "0,1,2,3");
    // a whole segment takes their place
    record.stream = Some(record.anywhen.stream(&record.server));
    record.fill_segments(1);
    record.insert(4);
    record.store_all();
    record.stop_stream();
    assert_no_gap(&system, 1);
    assert_eq!(record.rows_at("latest", &[], End::Promoted), "0,1,2,3,4");
}

/// The last whole segment is read to be compared with, and the one before what comes to check a record:
/// where it is damaged, the stream goes on without.
#[test]
fn a_damaged_segment_does_not_stop_the_stream() {
    let mut record = begun();
    record.fill_segments(2);
    record.store_all();
    record.stop_stream();
    let system = system_dir(&record.anywhen, &record.server);
    let (name, last) = stored_segments(&system).pop_last().unwrap();
    damage(&last);
    record.stream = Some(record.anywhen.stream(&record.server));
    record.insert(1);
    record.fill_segments(1);
    record.store_all();
    let said = record.stream.as_ref().unwrap().stderr();
    assert!(said.contains(&name), "{said}");
    record.stop_stream();
    record.anywhen.backup(&record.server);
    assert_eq!(record.rows_at("latest", &[], End::Promoted), "0,1");
}
