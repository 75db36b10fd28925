//! Two servers of one system identifier that went different ways: one of them is the cluster, and the
//! other must not get into its history.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::anywhen::Stream;
use crate::ground::{Programs, eventually, eventually_some};
use crate::judge::{End, restored_moments};
use crate::objects::{assert_wal_of, files_below, system_dir};
use crate::record::Record;
use crate::server::{Options, Server, Shutdown, copy_dir};

fn begun() -> Record {
    Record::begun(&Options {
        wal_segment_mib: 1,
        ..Options::default()
    })
}

/// Copies the data directory of the record's server, which is stopped for it, and starts both.
fn split(record: &mut Record) -> Server {
    record.server.stop(Shutdown::Fast);
    let copy = record.target("second");
    copy_dir(record.server.data(), &copy);
    let mut second = Server::at(&record.ground, &copy);
    second.start();
    record.server.start();
    second
}

/// Neither a stream nor a backup may bring another history in.
#[track_caller]
fn refused(record: &Record, second: &Server, says: &[&str]) {
    for command in ["backup", "stream"] {
        let ended = record.anywhen.run_on(second, &[command]);
        ended.failed();
        ended.says(says);
        ended.says(&["hint"]);
    }
}

/// The WAL and the histories that are stored, byte for byte.
fn stored(system: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let files = files_below(&system.join("wal")).into_iter();
    files
        .map(|path| (path.clone(), fs::read(&path).unwrap()))
        .collect()
}

/// Asserts that every object is as it was, and none was added.
#[track_caller]
fn assert_untouched(before: &BTreeMap<PathBuf, Vec<u8>>, system: &Path) {
    let after = stored(system);
    let added: Vec<&PathBuf> = after
        .keys()
        .filter(|key| !before.contains_key(*key))
        .collect();
    assert!(added.is_empty(), "stored of another history: {added:?}");
    for (path, bytes) in before {
        let same = after.get(path) == Some(bytes);
        assert!(same, "{} is not what it was", path.display());
    }
}

/// A copy of the data directory writes under the names of the first one's WAL.
#[test]
fn a_copy_that_goes_its_own_way_on_the_same_timeline_is_refused() {
    let mut record = begun();
    let second = split(&mut record);
    record.insert(1);
    record.store_all();
    record.stop_stream();
    second.execute("insert into moments select n, 'other' from generate_series(100, 200) n");
    let system = system_dir(&record.anywhen, &record.server);
    let before = stored(&system);
    refused(
        &record,
        &second,
        &["two histories", "differs", "timeline 1"],
    );
    assert_untouched(&before, &system);

    // the first goes on as if nothing had been
    record.stream = Some(record.anywhen.stream(&record.server));
    record.insert(2);
    record.store_all();
    assert!(assert_wal_of(&system, &[record.server.data()], 1).pieces > 0);
    assert_eq!(record.rows_at("latest", &[], End::Promoted), "0,1,2");
}

/// What is stored ends with a whole segment: nothing is sent again of itself, and a stream that compares
/// nothing would put the second server's WAL behind the first one's.
#[test]
fn a_copy_is_refused_where_what_is_stored_ends_with_a_segment() {
    let mut record = begun();
    let second = split(&mut record);
    record.insert(1);
    record.fill_segments(2);
    record.store_all();
    record.stop_stream();
    let system = system_dir(&record.anywhen, &record.server);
    // as a stream leaves it that was stopped at the end of a segment
    for piece in files_below(&system.join("wal")) {
        if piece
            .parent()
            .unwrap()
            .to_str()
            .unwrap()
            .ends_with(".pieces")
        {
            fs::remove_file(piece).unwrap();
        }
    }
    let end = record.server.value("select pg_current_wal_flush_lsn()");
    let short = format!("select pg_current_wal_flush_lsn() < '{end}'");
    while second.value(&short) == "t" {
        second.execute(
            "create table if not exists other (bytes text);
             insert into other select repeat(md5(n::text), 20) from generate_series(1, 200) n;
             select pg_switch_wal()",
        );
    }
    second.execute("insert into moments select n, 'other' from generate_series(100, 200) n");
    let before = stored(&system);
    refused(&record, &second, &["two histories"]);
    assert_untouched(&before, &system);
    record.stream = Some(record.anywhen.stream(&record.server));
    record.insert(2);
    record.store_all();
    assert_eq!(record.rows_at("latest", &[], End::Promoted), "0,1,2");
}

/// The copy was promoted: its new timeline would carry its own past, which is not the stored one.
#[test]
fn a_copy_that_was_promoted_does_not_bring_its_own_past_along() {
    let mut record = begun();
    let mut second = split(&mut record);
    // both write, the first one more: the fork lies within what is stored of the first
    second.execute("insert into moments select n, 'other' from generate_series(100, 200) n");
    record.insert(1);
    record.fill_segments(2);
    record.insert(2);
    record.store_all();
    record.stop_stream();
    promote(&mut second);
    second.execute("insert into moments values (300)");
    let system = system_dir(&record.anywhen, &record.server);
    let before = stored(&system);
    refused(&record, &second, &["two histories"]);
    // its history file would lead every restore to where it left the first one
    assert_untouched(&before, &system);
    assert_eq!(record.rows_at("first", &[], End::Promoted), "0,1,2");
    // the first one's own timeline of that number is not taken
    promote(&mut record.server);
    record.stream = Some(record.anywhen.stream(&record.server));
    record.insert(3);
    record.store_all();
    assert_eq!(record.rows_at("latest", &[], End::Promoted), "0,1,2,3");
}

/// Each of them has an archiver that was there before the other one wrote: what is acknowledged by both is
/// lost for one of them, and a restore finds one of the two.
#[test]
fn of_two_primaries_at_once_one_is_refused_before_it_is_acknowledged() {
    let mut record = begun();
    let second = split(&mut record);
    record.store_all();
    record.stop_stream();
    record.stream = Some(record.anywhen.stream(&record.server));
    let mut other = record.anywhen.stream(&second);
    second.execute("insert into moments values (100)");
    record.server.execute("insert into moments values (1)");
    let mut ours = record.stream.take().unwrap();
    let ended = eventually_some("one of them is refused", || {
        [&mut ours, &mut other]
            .into_iter()
            .position(Stream::has_ended)
    });
    let (mut left, server, rows) = match ended {
        0 => (other, &second, "0,100"),
        _ => (ours, &record.server, "0,1"),
    };
    left.store_all(server);
    left.stop();
    let target = record.target("latest");
    let bin = Programs::get().bin().to_str().unwrap();
    let restored =
        record
            .anywhen
            .run(&["restore", "-D", target.to_str().unwrap(), "--pg-bin", bin]);
    if restored.code == Some(5) {
        // both stored in the very same moment, before either could see the other: that is found, and
        // nothing of the two is mixed
        assert!(restored.stderr.contains("two histories"), "{restored}");
        assert!(!target.exists() || target.read_dir().unwrap().next().is_none());
    } else {
        restored.succeeded();
        let found = restored_moments(&record.ground, &target, End::Promoted);
        assert_eq!(found, rows);
    }
}

/// Two standbys that were both promoted: each is timeline 2, from another place on.
#[test]
fn a_second_timeline_of_the_same_number_is_refused() {
    let mut record = begun();
    let mut second = split(&mut record);
    record.insert(1);
    record.store_all();
    promote(&mut record.server);
    record.insert(2);
    record.store_all();
    record.stop_stream();
    promote(&mut second);
    second.execute("insert into moments values (100)");
    let system = system_dir(&record.anywhen, &record.server);
    let before = stored(&system);
    refused(&record, &second, &["00000002.history", "different bytes"]);
    assert_untouched(&before, &system);
    record.stream = Some(record.anywhen.stream(&record.server));
    record.insert(3);
    record.store_all();
    assert_eq!(record.rows_at("latest", &[], End::Promoted), "0,1,2,3");
}

/// After a failover the old primary is started again and writes on: it is not the cluster any more.
#[test]
fn a_primary_that_was_left_behind_is_refused() {
    let mut record = begun();
    let mut second = split(&mut record);
    record.store_all();
    record.stop_stream();
    promote(&mut second);
    let old = std::mem::replace(&mut record.server, second);
    record.stream = Some(record.anywhen.stream(&record.server));
    record.insert(1);
    record.store_all();
    old.execute("insert into moments values (100)");
    let system = system_dir(&record.anywhen, &record.server);
    refused(&record, &old, &["timeline 2", "timeline 1"]);
    record.insert(2);
    record.store_all();
    record.stop_stream();
    let datas = [old.data(), record.server.data()];
    assert!(assert_wal_of(&system, &datas, 1).pieces > 0);
    assert_eq!(record.rows_at("latest", &[], End::Promoted), "0,1,2");
}

/// Nothing differs yet when the backup begins, and while it runs the first server's WAL is stored where the
/// copy writes its own: a restore of that backup would replay the first one's.
#[test]
fn a_backup_of_a_copy_is_refused_at_its_end_where_it_was_not_at_its_beginning() {
    let mut record = begun();
    record.store_all();
    record.stop_stream();
    let second = split(&mut record);
    let mut command = record.anywhen.command(&["backup", "--max-rate", "4096"]);
    command.args(["-d", &second.conninfo()]);
    let mut backup = record.anywhen.launch(command);
    eventually("the backup was let in", || {
        backup.stderr().contains(" begins at ")
    });
    record.stream = Some(record.anywhen.stream(&record.server));
    record.insert(1);
    record.fill_segments(3);
    record.store_all();
    let status = backup.end("the backup of the copy");
    assert_eq!(status.code(), Some(5), "{}", backup.stderr());
    assert!(
        backup.stderr().contains("two histories"),
        "{}",
        backup.stderr()
    );
    record.insert(2);
    record.store_all();
    let backups = record.anywhen.json(&["list"]);
    assert_eq!(backups["backups"].as_array().unwrap().len(), 1);
    assert_eq!(record.rows_at("latest", &[], End::Promoted), "0,1,2");
}

/// Makes a primary begin a new timeline.
#[track_caller]
fn promote(server: &mut Server) {
    server.stop(Shutdown::Fast);
    fs::write(server.data().join("standby.signal"), "").unwrap();
    server.start();
    server.promote();
}
