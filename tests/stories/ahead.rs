//! `wal-fetch` fetches ahead, and what it hands out is what it would have fetched.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use crate::ground::{command, eventually, give, write_as_account};
use crate::judge::{End, assert_sound, moments, start_restored};
use crate::objects::{stored_segments, system_dir};
use crate::record::Record;
use crate::server::{Options, Shutdown};

/// A stopped server's data directory, in which `wal-fetch` is called as a recovery calls it.
struct Recovery {
    record: Record,
    /// The complete segments, oldest first.
    segments: Vec<String>,
}

impl Recovery {
    fn new() -> Self {
        let mut record = Record::begun(&Options {
            wal_segment_mib: 1,
            ..Options::default()
        });
        record.fill_segments(12);
        record.store_all();
        record.stop_stream();
        let segments = stored_segments(&system_dir(&record.anywhen, &record.server));
        record.server.stop(Shutdown::Fast);
        Self {
            segments: segments.into_keys().collect(),
            record,
        }
    }

    /// What is fetched ahead goes below this folder.
    fn folder(&self) -> PathBuf {
        let data = self.record.server.data();
        let name = data.file_name().unwrap().to_str().unwrap();
        data.with_file_name(format!("{name}.anywhen-wal"))
    }

    /// The segments that lie ready.
    fn ready(&self) -> BTreeSet<String> {
        let Ok(sessions) = fs::read_dir(self.folder()) else {
            return BTreeSet::new();
        };
        let files = sessions.flat_map(|session| fs::read_dir(session.unwrap().path()).unwrap());
        files
            .map(|file| file.unwrap().file_name().into_string().unwrap())
            .filter(|name| name.len() == 24)
            .collect()
    }

    /// Asks for a segment as the server does, and gives the exit code. Along a timeline that is named: where
    /// the newest is followed, what lies ready counts for a second behind the last word on which that is.
    fn fetch(&self, name: &str) -> i32 {
        self.fetch_with(name, &["--timeline", "1"])
    }

    fn fetch_with(&self, name: &str, flags: &[&str]) -> i32 {
        let fixed = ["wal-fetch", name, "pg_wal/RECOVERYXLOG"];
        let mut command = self.record.anywhen.command(&[&fixed[..], flags].concat());
        command.current_dir(self.record.server.data());
        fs::remove_file(self.fetched()).ok();
        self.record.anywhen.run_command(command).code.unwrap()
    }

    fn fetched(&self) -> PathBuf {
        self.record.server.data().join("pg_wal/RECOVERYXLOG")
    }

    /// Asks for a segment, which must come as the server wrote it.
    #[track_caller]
    fn assert_given(&self, name: &str) {
        assert_eq!(self.fetch(name), 0, "{name}");
        let original = fs::read(self.record.server.data().join("pg_wal").join(name)).unwrap();
        assert!(fs::read(self.fetched()).unwrap() == original, "{name}");
    }

    #[track_caller]
    fn wait_until_ready(&self, name: &str) {
        eventually("the segment lies ready", || self.ready().contains(name));
    }
}

/// The calls behind the first need no repository: they take no longer than to start and to rename.
#[test]
fn segments_are_fetched_before_they_are_asked_for() {
    let mut recovery = Recovery::new();
    let segments = recovery.segments.clone();
    recovery.assert_given(&segments[0]);
    for name in &segments[1..=6] {
        recovery.wait_until_ready(name);
    }
    recovery.record.set_reachable(false);
    for name in &segments[1..=6] {
        recovery.assert_given(name);
    }
    recovery.record.set_reachable(true);
    // what was handed out is not asked for again; what is, is fetched
    assert!(recovery.ready().iter().all(|name| *name > segments[6]));
    recovery.assert_given(&segments[3]);
    recovery.wait_until_ready(&segments[4]);
    recovery.assert_given(&segments[9]);
    recovery.wait_until_ready(&segments[10]);
    recovery.assert_given(&segments[10]);
}

/// Recovery takes "not found" for the end, and promotes.
#[test]
fn not_found_is_asked_of_the_repository_each_time() {
    let mut recovery = Recovery::new();
    let segments = recovery.segments.clone();
    recovery.assert_given(&segments[segments.len() - 2]);
    recovery.wait_until_ready(segments.last().unwrap());
    recovery.assert_given(segments.last().unwrap());
    let record = &mut recovery.record;
    record.server.start();
    let next = record
        .server
        .value("select pg_walfile_name(pg_switch_wal())");
    record.stream = Some(record.anywhen.stream(&record.server));
    record.fill_segments(2);
    record.store_all();
    record.stop_stream();
    record.server.stop(Shutdown::Fast);
    recovery.assert_given(&next);
    assert_eq!(recovery.fetch("0000000100000FFF00000001"), 1);
}

/// What another branch left behind is in nobody's recovery, whatever was fetched for whom.
#[test]
fn what_was_fetched_with_other_flags_is_not_handed_out() {
    let recovery = Recovery::new();
    let segments = &recovery.segments;
    recovery.assert_given(&segments[0]);
    recovery.wait_until_ready(&segments[2]);
    // nothing is stored of this timeline, so that it has no past
    let flags = ["--timeline", "7"];
    assert_eq!(recovery.fetch_with(&segments[1], &flags), 1);
    assert!(!recovery.fetched().exists());
    recovery.assert_given(&segments[1]);
}

/// Whoever can write there could put WAL of his own into a server.
#[test]
fn a_folder_that_others_can_write_to_is_left_alone() {
    let recovery = Recovery::new();
    let segments = &recovery.segments;
    recovery.assert_given(&segments[0]);
    recovery.wait_until_ready(&segments[3]);
    let session = fs::read_dir(recovery.folder())
        .unwrap()
        .next()
        .unwrap()
        .unwrap()
        .path();
    write_as_account(&session.join(&segments[3]), b"not a segment", 0o600);
    fs::set_permissions(recovery.folder(), fs::Permissions::from_mode(0o777)).unwrap();
    recovery.assert_given(&segments[3]);
    assert_eq!(
        fs::read(session.join(&segments[3])).unwrap(),
        b"not a segment"
    );
    fs::set_permissions(recovery.folder(), fs::Permissions::from_mode(0o700)).unwrap();
}

/// A process that is killed takes nothing along.
#[test]
fn the_process_that_fetches_ahead_may_be_killed() {
    let recovery = Recovery::new();
    let segments = &recovery.segments;
    recovery.assert_given(&segments[0]);
    recovery.wait_until_ready(&segments[2]);
    let killed = kill_those_that_run_ahead(&recovery.folder());
    assert_eq!(killed, 1);
    for name in &segments[1..] {
        recovery.assert_given(name);
    }
}

/// Kills the processes that fetch ahead below a folder; how many there were.
fn kill_those_that_run_ahead(folder: &Path) -> usize {
    let pids = those_that_run_ahead(folder);
    for pid in &pids {
        let pid = rustix::process::Pid::from_raw(*pid).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    }
    pids.len()
}

fn those_that_run_ahead(folder: &Path) -> Vec<i32> {
    let processes = fs::read_dir("/proc").unwrap();
    let running = processes.filter_map(|process| {
        let process = process.unwrap();
        let line = fs::read(process.path().join("cmdline")).ok()?;
        let line = String::from_utf8_lossy(&line).into_owned();
        let is_one = line.contains("--runs-ahead-in") && line.contains(folder.to_str().unwrap());
        is_one.then(|| process.file_name().into_string().unwrap().parse().unwrap())
    });
    running.collect()
}

/// A recovery along its ancestors' timelines, with what was fetched ahead gone behind it.
#[test]
fn a_recovery_leaves_nothing_behind_that_was_fetched_ahead() {
    let mut record = Record::begun(&Options {
        wal_segment_mib: 1,
        ..Options::default()
    });
    record.fill_segments(20);
    record.insert(1);
    record.fill_segments(20);
    record.insert(2);
    record.store_all();
    record.stop_stream();
    let target = record.target("restored");
    record.anywhen.restore(&target, &[]);
    let server = start_restored(&record.ground, &target, End::Promoted);
    assert_eq!(moments(&server), "0,1,2");
    assert_sound(&server, "postgres");
    let folder = target.with_file_name("restored.anywhen-wal");
    eventually("what was fetched ahead is gone", || !folder.exists());
    give(&target);
}

/// Until 15 a server's files are handed down to whatever it starts: what replay removes would keep its
/// space for as long as that process lives.
#[test]
fn nothing_of_the_servers_stays_open() {
    let recovery = Recovery::new();
    let segments = &recovery.segments;
    let inner =
        recovery
            .record
            .anywhen
            .command(&["wal-fetch", &segments[0], "pg_wal/RECOVERYXLOG"]);
    let mut shell = command("/bin/sh");
    shell
        .args(["-c", "exec 9<PG_VERSION; exec \"$@\"", "sh"])
        .arg(inner.get_program())
        .args(inner.get_args())
        .current_dir(recovery.record.server.data());
    for (name, value) in inner.get_envs() {
        shell.env(name, value.unwrap_or_default());
    }
    assert_eq!(recovery.record.anywhen.run_command(shell).code, Some(0));
    recovery.wait_until_ready(&segments[2]);
    let [pid] = those_that_run_ahead(&recovery.folder())[..] else {
        panic!("one process fetches ahead")
    };
    let open = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let open: Vec<PathBuf> = open
        .filter_map(|link| fs::read_link(link.unwrap().path()).ok())
        .collect();
    let data = recovery.record.server.data();
    assert!(!open.is_empty());
    assert!(open.iter().all(|path| !path.starts_with(data)), "{open:?}");
}
