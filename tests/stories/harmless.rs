//! A restored copy beside the live server harms nothing of it.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::Command;

use crate::anywhen::binary;
use crate::ground::eventually;
use crate::judge::{End, moments, start_restored};
use crate::objects::files_below;
use crate::record::Record;
use crate::server::Options;

/// The copy has the primary's settings: its `archive_command`, its synchronous standbys, the server it
/// follows. Left as they are, a test restore writes into the live archive, hangs at its first commit, or
/// takes the live server's replication slot.
#[test]
fn a_copy_touches_neither_the_archive_nor_the_primary_of_the_live_server() {
    let mut record = Record::of_server(&Options::default());
    let archive = record.ground.make_dir("archive", 0o700);
    record.server.execute(&format!(
        "alter system set archive_command = 'test ! -e \"{0}/%f\" && cp \"%p\" \"{0}/%f\"'",
        archive.display()
    ));
    record.server.execute("alter system set archive_mode = on");
    let primary = record.server.conninfo();
    record
        .server
        .execute(&format!("alter system set primary_conninfo = '{primary}'"));
    record
        .server
        .execute("alter system set primary_slot_name = 'kept'");
    record
        .server
        .execute("select pg_create_physical_replication_slot('kept', true)");
    record.server.stop(crate::server::Shutdown::Fast);
    record.server.start();
    record.stream = Some(record.anywhen.stream(&record.server));
    record
        .server
        .execute("alter system set synchronous_standby_names = 'anywhere_else, *'");
    record.insert(0);
    record.anywhen.backup(&record.server);
    record.insert(1);
    record.fill_segments(1);
    record.store_all();
    let archived = || files_below(&archive);
    eventually("the live server archives", || !archived().is_empty());
    let senders = "select count(*) from pg_stat_replication";
    let senders_before = record.server.value(senders);

    let target = record.target("copy");
    record.anywhen.restore(&target, &[]);
    assert!(!target.join("standby.signal").exists());
    let copy = start_restored(&record.ground, &target, End::Promoted);
    assert_eq!(moments(&copy), "0,1");
    for (setting, value) in [
        ("archive_mode", "off"),
        ("synchronous_standby_names", ""),
        ("primary_conninfo", ""),
        ("primary_slot_name", ""),
    ] {
        assert_eq!(
            copy.value(&format!("select current_setting('{setting}')")),
            value,
            "{setting}"
        );
    }
    // commits return, and WAL of the copy's own timeline goes nowhere
    copy.execute("insert into moments values (100); select pg_switch_wal(); checkpoint");
    drop(copy);
    let foreign: Vec<_> = archived()
        .into_iter()
        .filter(|path| {
            !path
                .file_name()
                .unwrap()
                .to_str()
                .unwrap()
                .starts_with("00000001")
        })
        .collect();
    assert!(foreign.is_empty(), "the copy archived {foreign:?}");
    assert_eq!(record.server.value(senders), senders_before);
    assert_eq!(moments(&record.server), "0,1");
}

/// A second restore into a place in use would mix two clusters.
#[test]
fn a_directory_that_is_not_empty_or_in_use_is_refused_untouched() {
    let record = Record::of_server(&Options::default());
    record.insert(0);
    record.anywhen.backup(&record.server);
    let live = record.server.data().to_owned();
    let before = names_and_times(&live);
    let ended = record
        .anywhen
        .run(&["restore", "-D", live.to_str().unwrap()]);
    ended.failed();
    ended.says(&[live.to_str().unwrap()]);
    assert_eq!(names_and_times(&live), before);

    let holiday = record.ground.make_dir("holiday", 0o700);
    record.ground.write("holiday/photo", "irreplaceable", 0o600);
    let ended = record
        .anywhen
        .run(&["restore", "-D", holiday.to_str().unwrap()]);
    ended.failed();
    assert_eq!(
        fs::read_to_string(holiday.join("photo")).unwrap(),
        "irreplaceable"
    );
    assert_eq!(files_below(&holiday).len(), 1);
}

/// Restores are run as root at three in the morning; the server then runs as somebody else. Run by
/// anybody else, this asserts the same of their own files.
#[test]
fn the_files_belong_to_the_owner_of_the_parent_with_closed_modes() {
    let record = Record::of_server(&Options::default());
    record.insert(0);
    record.anywhen.backup(&record.server);
    let target = record.target("owned");
    let output = Command::new(binary())
        .args(["restore", "--cluster", "main", "-D"])
        .arg(&target)
        .args(record.anywhen.place())
        .envs(record.ground.environment())
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let owner = fs::metadata(target.parent().unwrap()).unwrap().uid();
    let files = files_below(&target);
    assert!(!files.is_empty());
    for file in &files {
        let metadata = fs::symlink_metadata(file).unwrap();
        assert_eq!(metadata.uid(), owner, "{}", file.display());
        assert_eq!(metadata.mode() & 0o777, 0o600, "{}", file.display());
    }
    let folder = fs::metadata(&target).unwrap();
    assert_eq!((folder.uid(), folder.mode() & 0o777), (owner, 0o700));
    let restored = start_restored(&record.ground, &target, End::Promoted);
    assert_eq!(moments(&restored), "0");
}

fn names_and_times(folder: &Path) -> Vec<(std::path::PathBuf, i64)> {
    files_below(folder)
        .into_iter()
        // the running server writes these by itself
        .filter(|path| {
            path.ends_with("PG_VERSION") || path.extension().is_some_and(|e| e == "conf")
        })
        .map(|path| {
            let modified = fs::metadata(&path).unwrap().mtime_nsec();
            (path, modified)
        })
        .collect()
}
