//! `restore --resume`: what a killed restore left is gone on with.

use std::fs;
use std::os::unix::fs::{FileExt as _, symlink};
use std::path::Path;

use rustix::process::Signal;

use crate::ground::{eventually, give, write_as_account};
use crate::judge::{End, assert_verified, moments, start_restored};
use crate::objects::files_below;
use crate::record::Record;
use crate::server::{Options, Shutdown, value};
use crate::workloads::fill_for_a_kill;

const MARKER: &str = "anywhen-restore-unfinished";

/// A cluster with many files, a tablespace, a backup, and WAL behind that; its server is stopped.
fn stopped() -> Record {
    let record = Record::of_server(&Options::default());
    fill_for_a_kill(&record);
    let mut record = record.begin();
    record.insert(1);
    record.store_all();
    record.stop_stream();
    record.server.stop(Shutdown::Fast);
    record
}

#[test]
fn a_restore_that_was_killed_goes_on_with_what_is_right() {
    let record = stopped();
    let [from, to] = ["elsewhere", "moved"].map(|name| record.ground.path(name));
    let place = format!("{}={}", from.display(), to.display());
    let target = (1..=20)
        .map(|number| record.target(&format!("killed-{number}")))
        .find(|target| is_killed_halfway(&record, target, &to, &place))
        .expect("it came to its end before it was killed, each time");
    let flags = ["restore", "-D", target.to_str().unwrap(), "-T", &place];

    // as it is nobody may use it, and nobody takes it for something else
    let refused = record.anywhen.run(&flags);
    refused.failed_with(2);
    refused.says(&["did not come to its end", "--resume"]);
    let planned = [&flags, ["--resume", "--dry-run"].as_slice()].concat();
    let planned = record.anywhen.run(&planned).succeeded();
    assert!(planned.stdout.contains("right there already"), "{planned}");

    // what is not right is found, and nobody else's file is written to
    let mut files = files_below(&target.join("base"));
    files.retain(|path| path.metadata().unwrap().len() > 8192);
    let file = fs::File::options().write(true).open(&files[0]).unwrap();
    file.write_all_at(b"damaged", 5000).unwrap();
    file.set_len(file.metadata().unwrap().len() + 100).unwrap();
    let precious = record.ground.write("precious", "of somebody", 0o600);
    fs::remove_file(&files[1]).unwrap();
    fs::hard_link(&precious, &files[1]).unwrap();
    let unknown = target.join("base/unknown");
    fs::create_dir(&unknown).unwrap();
    give(&unknown);
    write_as_account(&unknown.join("file"), b"x", 0o600);
    symlink(&precious, target.join("base/link")).unwrap();

    let report = record.anywhen.restore(&target, &["-T", &place, "--resume"]);
    let kept = report["kept_bytes"].as_u64().unwrap();
    assert!(
        kept > 0 && kept < report["bytes"].as_u64().unwrap(),
        "{report}"
    );
    assert_verified(&target);
    assert_eq!(fs::read_to_string(&precious).unwrap(), "of somebody");
    assert!(!unknown.exists() && !target.join("base/link").is_symlink());
    assert!(!target.join(MARKER).exists());
    let restored = start_restored(&record.ground, &target, End::Promoted);
    assert_eq!(moments(&restored), "0,1");
    let mut sql = restored.sql();
    assert_eq!(value(&mut sql, "select count(*) from far"), "20000");
    assert_eq!(value(&mut sql, "select count(words) from filled"), "60000");
}

/// A restore that is killed while it writes; `false`, with nothing left, where it was too fast.
fn is_killed_halfway(record: &Record, target: &Path, tablespace: &Path, place: &str) -> bool {
    let flags = ["restore", "-D", target.to_str().unwrap(), "-T", place];
    let mut killed = record.anywhen.launch(record.anywhen.command(&flags));
    eventually("some files are there", || {
        killed.ended().is_some() || files_below(&target.join("base")).len() > 300
    });
    if killed.ended().is_none() {
        killed.signal(Signal::KILL);
        killed.end("what was killed");
    }
    if !target.join("global/pg_control").exists() {
        return true;
    }
    fs::remove_dir_all(target).unwrap();
    fs::remove_dir_all(tablespace).unwrap();
    false
}

/// What it replaces must be what a restore of this cluster had written.
#[test]
fn nothing_is_resumed_but_a_restore_of_this_cluster_that_was_broken_off() {
    let mut record = Record::begun(&Options::default());
    record.insert(1);
    record.store_all();
    record.stop_stream();
    let system_id = record.server.system_id();
    record.server.stop(Shutdown::Fast);
    let refused = |target: &Path, words: &[&str]| {
        let before = files_below(target);
        let asked = ["restore", "-D", target.to_str().unwrap(), "--resume"];
        let ended = record.anywhen.run(&asked);
        ended.failed_with(2);
        ended.says(words);
        assert_eq!(files_below(target), before, "{ended}");
    };
    let photos = record.ground.make_dir("photos", 0o700);
    record.ground.write("photos/one", "x", 0o600);
    let no_restore = ["does not hold a restore that was broken off"];
    refused(&photos, &no_restore);
    refused(&record.target("absent"), &no_restore);
    let data = record.server.data().to_owned();
    refused(&data, &no_restore);
    // a marker alone opens nothing
    write_as_account(&data.join(MARKER), b"", 0o600);
    refused(&data, &no_restore);
    write_as_account(&data.join(MARKER), b"7\n", 0o600);
    refused(&data, &["another cluster"]);
    fs::remove_file(data.join(MARKER)).unwrap();
    write_as_account(&data.join(MARKER), system_id.as_bytes(), 0o600);
    let asked = ["restore", "-D", data.to_str().unwrap(), "--resume"];
    let ended = record.anywhen.run(&asked);
    ended.failed_with(2);
    ended.says(&["is a whole cluster", "--delta"]);
    // a server does not mind it, and its backups have it
    record.server.start();
    assert_eq!(moments(&record.server), "0,1");
    record.anywhen.backup(&record.server);
    let target = record.target("of-a-marked-one");
    record.anywhen.restore(&target, &[]);
    assert!(!target.join(MARKER).exists());
    let restored = start_restored(&record.ground, &target, End::Promoted);
    assert_eq!(moments(&restored), "0,1");
}
