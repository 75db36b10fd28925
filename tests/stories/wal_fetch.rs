//! `wal-fetch` is PostgreSQL's `restore_command`: 0 found, 1 not in the archive, and 200 for everything
//! else. PostgreSQL takes any code up to 125 for "the archive ends here" and promotes: a failure that
//! looks like the end of WAL loses all that came after.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use crate::objects::{remove_segment, stored_segments, system_dir};
use crate::record::Record;
use crate::server::Options;

struct Archive {
    record: Record,
    /// The names of the complete segments, oldest first.
    segments: Vec<String>,
    dest: PathBuf,
}

fn archive() -> Archive {
    let mut record = Record::begun(&Options {
        wal_segment_mib: 1,
        ..Options::default()
    });
    record.fill_segments(3);
    record.insert(1);
    record.store_all();
    record.stop_stream();
    let segments = stored_segments(&system_dir(&record.anywhen, &record.server));
    let dest = record.ground.path("fetched");
    Archive {
        segments: segments.into_keys().collect(),
        dest,
        record,
    }
}

impl Archive {
    /// `wal-fetch NAME DEST` as PostgreSQL runs it: in the data directory.
    fn fetch(&self, name: &str) -> Command {
        let mut command =
            self.record
                .anywhen
                .command(&["wal-fetch", name, self.dest.to_str().unwrap()]);
        command.current_dir(self.record.server.data());
        command
    }

    #[track_caller]
    fn ends_with(&self, command: Command, code: i32) {
        self.record.anywhen.run_command(command).failed_with(code);
        assert_eq!(
            self.dest.exists(),
            code == 0,
            "the file is there only if it was found"
        );
    }
}

#[test]
fn a_stored_segment_is_fetched_as_the_server_wrote_it() {
    let archive = archive();
    let name = &archive.segments[0];
    archive.ends_with(archive.fetch(name), 0);
    let original = fs::read(archive.record.server.data().join("pg_wal").join(name)).unwrap();
    assert!(
        fs::read(&archive.dest).unwrap() == original,
        "the bytes of {name} differ"
    );
}

/// A segment of which only pieces are stored is put together, and padded to its full size.
#[test]
fn an_incomplete_segment_is_put_together_and_padded() {
    let archive = archive();
    let name = archive
        .record
        .server
        .value("select pg_walfile_name(pg_current_wal_lsn())");
    assert!(!archive.segments.contains(&name));
    let end = "select pg_walfile_name_offset(pg_current_wal_flush_lsn())";
    let row = archive.record.server.value(end);
    let offset: usize = row
        .trim_matches(['(', ')'])
        .split(',')
        .nth(1)
        .unwrap()
        .parse()
        .unwrap();
    archive.ends_with(archive.fetch(&name), 0);
    let fetched = fs::read(&archive.dest).unwrap();
    let original = fs::read(archive.record.server.data().join("pg_wal").join(&name)).unwrap();
    assert_eq!(fetched.len(), 1 << 20);
    assert!(
        fetched[..offset] == original[..offset],
        "the bytes of {name} differ"
    );
}

#[test]
fn what_comes_after_the_end_is_not_in_the_archive() {
    let archive = archive();
    archive.ends_with(archive.fetch("0000000100000FFF00000001"), 1);
    archive.ends_with(archive.fetch("00000009.history"), 1);
}

#[test]
fn a_hole_is_not_the_end() {
    let archive = archive();
    let system = system_dir(&archive.record.anywhen, &archive.record.server);
    let hole = &archive.segments[archive.segments.len() - 2];
    remove_segment(&system, hole);
    archive.ends_with(archive.fetch(hole), 200);
}

#[test]
fn wrong_usage_is_not_the_end() {
    let archive = archive();
    let mut unknown_flag = archive.fetch(&archive.segments[0]);
    unknown_flag.arg("--no-such-flag");
    archive.ends_with(unknown_flag, 200);
    let mut no_names = archive.record.anywhen.command(&["wal-fetch"]);
    no_names.current_dir(archive.record.server.data());
    archive.ends_with(no_names, 200);
    archive.ends_with(archive.fetch("no-such-kind-of-name"), 200);
}

#[test]
fn a_missing_configuration_is_not_the_end() {
    let archive = archive();
    let dest = archive.dest.to_str().unwrap();
    let mut nothing_set = archive.record.anywhen.bare();
    nothing_set.args(["wal-fetch", &archive.segments[0], dest]);
    nothing_set.current_dir(archive.record.server.data());
    archive.ends_with(nothing_set, 200);
    let mut no_file = archive.record.anywhen.bare();
    no_file.args([
        "wal-fetch",
        &archive.segments[0],
        dest,
        "--config",
        "/nowhere/anywhen.toml",
    ]);
    no_file.current_dir(archive.record.server.data());
    archive.ends_with(no_file, 200);
}

#[test]
fn a_panic_is_not_the_end() {
    let archive = archive();
    let mut panics = archive.fetch(&archive.segments[0]);
    panics.env("ANYWHEN_TEST_PANIC", "wal-fetch");
    archive.ends_with(panics, 200);
}

#[test]
fn a_repository_out_of_reach_is_not_the_end() {
    let mut archive = archive();
    archive.record.set_reachable(false);
    let ended = archive
        .record
        .anywhen
        .run_command(archive.fetch(&archive.segments[0]));
    let beyond = archive
        .record
        .anywhen
        .run_command(archive.fetch("0000000100000FFF00000001"));
    archive.record.set_reachable(true);
    ended.failed_with(200);
    beyond.failed_with(200);
    // a folder that is gone, such as a mount that is not there, or a bucket
    archive.record.remove_repository();
    archive.ends_with(archive.fetch("0000000100000FFF00000001"), 200);
}

/// A standby asks again by itself; 200 would shut it down. For it an outage is 1, and a hole is not an
/// outage.
#[test]
fn an_outage_lets_a_standby_ask_again() {
    let mut archive = archive();
    let standby = archive.record.ground.make_dir("standby", 0o700);
    archive.record.ground.make_dir("standby/global", 0o700);
    let control = archive.record.server.data().join("global/pg_control");
    crate::server::copy_dir(&control, &standby.join("global/pg_control"));
    archive
        .record
        .ground
        .write("standby/standby.signal", "", 0o600);
    archive.record.set_reachable(false);
    let mut fetch = archive.fetch(&archive.segments[0]);
    fetch.current_dir(&standby);
    let ended = archive.record.anywhen.run_command(fetch);
    archive.record.set_reachable(true);
    ended.failed_with(1);
}
