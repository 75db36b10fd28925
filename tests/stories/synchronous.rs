//! Promise 2 at its hardest: commits that waited for the repository, and the repository alone is left.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::anywhen::install;
use crate::chance::{Chance, tenth_of};
use crate::ground::{Running, command, eventually};
use crate::judge::{End, assert_verified, start_restored};
use crate::load::assert_has;
use crate::objects::{lsn, stored_end, system_dir};
use crate::record::Record;
use crate::server::{Options, Server, Shutdown};

/// So many commits are acknowledged at least, in each round.
const COMMITS: u64 = 300;

/// A client in another process tree is told that its commit is durable. Server and archiver are killed,
/// the server's disk is gone, and the archiver's too: whoever has the repository has the commit.
#[test]
fn no_acknowledged_commit_is_missing_once_only_the_repository_is_left() {
    let mut chance = Chance::new();
    for _ in 0..tenth_of(10) {
        let mut record = synchronous();
        let log = record.ground.path("acknowledged");
        let mut client = start_client(&record, &log);
        let wanted = usize::try_from(COMMITS + chance.below(100)).unwrap();
        eventually("enough is acknowledged", || {
            assert!(client.ended().is_none(), "{}", client.stderr());
            record.stream.as_mut().unwrap().assert_running();
            lines(&log).len() >= wanted
        });
        let stream = record.stream.take().unwrap();
        if chance.below(2) == 0 {
            stream.kill9();
            record.wait_ms(chance.below(50));
            record.server.kill9();
        } else {
            record.server.kill9();
            stream.kill9();
        }
        client.end("the client whose server is gone");
        fs::remove_dir_all(record.server.data()).unwrap();
        fs::remove_dir_all(record.ground.path("state")).unwrap();
        record.ground.make_dir("state", 0o700);

        let target = record.target("latest");
        record.anywhen.restore(&target, &[]);
        assert_verified(&target);
        let mut restored = start_restored(&record.ground, &target, End::Promoted);
        let acknowledged: BTreeSet<u32> = lines(&log).into_iter().map(|(id, _)| id).collect();
        assert_has(&restored, &acknowledged);
        restored.stop(Shutdown::Fast);
    }
}

/// The same at many moments: the archiver stops where it is, and what clients were told until then must
/// be in the repository, though nobody has yet stored what came since.
#[test]
fn what_is_acknowledged_is_stored_at_every_moment() {
    let mut record = synchronous();
    let log = record.ground.path("acknowledged");
    let mut client = start_client(&record, &log);
    let system = system_dir(&record.anywhen, &record.server);
    let mut chance = Chance::new();
    for moment in 0..tenth_of(400) {
        let before = lines(&log).len();
        eventually("more is acknowledged", || lines(&log).len() > before);
        record.wait_ms(chance.below(60));
        let stream = record.stream.as_mut().unwrap();
        stream.signal(Signal::STOP);
        // what was released is on its way to the client, or in its hands
        record.wait_ms(20);
        let acknowledged = lines(&log);
        let end = stored_end(&system, 1, 1);
        let missing = acknowledged.iter().filter(|(_, before)| *before >= end);
        let missing: Vec<_> = missing.collect();
        assert!(
            missing.is_empty(),
            "at moment {moment}: {missing:?} behind {end:X}"
        );
        let stream = record.stream.as_mut().unwrap();
        stream.signal(Signal::CONT);
        stream.assert_running();
        assert!(client.ended().is_none(), "{}", client.stderr());
    }
    // and whoever restores need not wait for an archiver that does not answer
    record.stream.as_mut().unwrap().signal(Signal::STOP);
    record.server.kill9();
    client.end("the client whose server is gone");
    fs::remove_dir_all(record.server.data()).unwrap();
    let target = record.target("latest");
    record.anywhen.restore(&target, &[]);
    let restored = start_restored(&record.ground, &target, End::Promoted);
    let acknowledged: BTreeSet<u32> = lines(&log).into_iter().map(|(id, _)| id).collect();
    assert_has(&restored, &acknowledged);
}

/// A server that waits for us waits for the bucket alone, not for an interval that saves requests: that
/// is noticed while the stream runs, and with `--synchronous` it holds from the first commit on.
#[test]
fn a_commit_that_waits_does_not_wait_for_the_flush_interval() {
    // no commit of several is stored in that time unless the server is known to wait
    let (interval, patience) = ("8s", Duration::from_secs(4));
    let mut record = streaming(&["--flush-interval", interval, "--synchronous"]);
    let mut row = 0;
    let mut commits = |record: &Record| {
        let since = Instant::now();
        for _ in 0..4 {
            row += 1;
            record
                .server
                .execute(&format!("insert into history values ({row}, '')"));
        }
        since.elapsed()
    };
    let_commits_wait(&record.server);
    let took = commits(&record);
    assert!(took < patience, "told to be synchronous: {took:?}");
    record.stop_stream();

    record
        .server
        .execute("alter system reset synchronous_standby_names");
    record.server.execute("select pg_reload_conf()");
    let arguments = ["--flush-interval", interval];
    record.stream = Some(record.anywhen.stream_with(&record.server, &arguments));
    let_commits_wait(&record.server);
    eventually("the stream has noticed", || commits(&record) < patience);
}

/// A server whose commits wait for the stream, with a backup.
fn synchronous() -> Record {
    let record = streaming(&["--flush-interval", "20ms"]);
    let_commits_wait(&record.server);
    record
}

/// A server with a stream and a backup, and the table of the client.
fn streaming(arguments: &[&str]) -> Record {
    let mut record = Record::of_server(&Options {
        wal_segment_mib: 1,
        // what is killed for good leaves no shared memory behind
        settings: "dynamic_shared_memory_type = mmap\n".to_owned(),
        ..Options::default()
    });
    record
        .server
        .execute("create table history (id int primary key, note text)");
    record.stream = Some(record.anywhen.stream_with(&record.server, arguments));
    record.anywhen.backup(&record.server);
    record
}

/// Lets commits wait for the stream from now on.
#[track_caller]
fn let_commits_wait(server: &Server) {
    server.execute("alter system set synchronous_standby_names = '*'");
    server.execute("select pg_reload_conf()");
    let sync = "select count(*) from pg_stat_replication where sync_state = 'sync'";
    eventually("the stream is a synchronous standby", || {
        server.value(sync) == "1"
    });
}

/// Starts `tests/commit_client` in a process group of its own.
fn start_client(record: &Record, log: &Path) -> Running {
    static PROGRAM: OnceLock<std::path::PathBuf> = OnceLock::new();
    let program = PROGRAM.get_or_init(|| {
        let built =
            Path::new(env!("CARGO_BIN_EXE_anywhen")).with_file_name("examples/commit_client");
        let shown = built.display();
        assert!(built.exists(), "{shown} is not built: run ./check");
        install(&built, "commit_client")
    });
    let mut client = command(program);
    client
        .arg("--socket-dir")
        .arg(record.server.socket_dir())
        .arg("--log")
        .arg(log)
        .args(["--connections", "8"])
        .process_group(0);
    Running::start(client, record.ground.path("client"))
}

/// What the client was told is durable: the whole lines of its log, each an id and an LSN from before the
/// commit's record.
fn lines(log: &Path) -> Vec<(u32, u64)> {
    let text = fs::read_to_string(log).unwrap_or_default();
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let words = whole.lines().map(|line| line.split_once(' ').unwrap());
    words
        .map(|(id, before)| (id.parse().unwrap(), lsn(before)))
        .collect()
}
