//! Failovers: a chain of them under one stream, a commit that waits on a new timeline behind what is
//! stored, and a standby that is promoted while its clients write.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use postgres::NoTls;

use crate::anywhen::{Anywhen, Stream};
use crate::ground::{Ground, eventually, pause};
use crate::judge::{End, restored_moments};
use crate::load::{Load, ids};
use crate::objects::{assert_wal_of, files_below, lsn, stored_end, system_dir, system_dir_in};
use crate::record::Record;
use crate::server::{Options, Server, Shutdown, execute, value, write_setting};

const WRITER_OF: &str = "select count(*) from pg_stat_wal_receiver where status = 'streaming'";

fn record_of_small_segments() -> Record {
    Record::of_server(&Options {
        wal_segment_mib: 1,
        // what a standby lacks after a backup is asked of its primary
        settings: "wal_receiver_status_interval = '200ms'\nwal_retrieve_retry_interval = '200ms'\n"
            .to_owned(),
        ..Options::default()
    })
}

/// A standby in the folder `name`, which streams from `primary` alone.
#[track_caller]
fn standby_of(record: &Record, primary: &Server, name: &str) -> Server {
    let target = record.target(name);
    record.anywhen.restore(&target, &["--standby"]);
    let conninfo = primary.conninfo();
    write_setting(&target, &format!("primary_conninfo = '{conninfo}'"));
    let mut standby = Server::at(&record.ground, &target);
    standby.start();
    eventually("the standby streams", || standby.value(WRITER_OF) == "1");
    standby
}

/// Waits until `standby` has replayed all that `primary` has written.
#[track_caller]
fn follow(primary: &Server, standby: &Server) {
    let written = primary.value("select pg_current_wal_flush_lsn()");
    let replayed = format!("select pg_last_wal_replay_lsn() >= '{written}'");
    eventually("the standby follows", || standby.value(&replayed) == "t");
}

/// The connection string of an operator: all hosts, whichever takes writes.
fn host_list(ground: &Ground, names: &[&str]) -> String {
    let hosts: Vec<String> = names
        .iter()
        .map(|name| ground.path(&format!("{name}.sock")).display().to_string())
        .collect();
    let ports = vec!["5432"; hosts.len()];
    format!(
        "host={} port={} user=postgres dbname=postgres target_session_attrs=read-write",
        hosts.join(","),
        ports.join(",")
    )
}

fn stream_over(anywhen: &Anywhen, server: &Server, conninfo: &str) -> Stream {
    let mut command = anywhen.command(&["stream", "--flush-interval", "200ms"]);
    command.args(["-d", conninfo]);
    anywhen.stream_of(server, command)
}

/// Waits until `server` streams to anywhen.
#[track_caller]
fn wait_for_stream(server: &Server, stream: &mut Stream) {
    let streaming = "select count(*) from pg_stat_replication
                     where state = 'streaming' and application_name <> 'walreceiver'";
    eventually("the stream has found the new primary", || {
        stream.assert_running();
        server.value(streaming) == "1"
    });
}

/// Five failovers in a minute, by a shutdown or by a crash, and one stream that finds each new primary by
/// itself: a moment on every timeline can be restored.
#[test]
fn a_chain_of_five_promotions_is_followed_and_each_timeline_restored() {
    const NAMES: [&str; 6] = ["primary", "second", "third", "fourth", "fifth", "sixth"];
    let mut record = record_of_small_segments();
    record.insert(0);
    let conninfo = host_list(&record.ground, &NAMES);
    let mut stream = stream_over(&record.anywhen, &record.server, &conninfo);
    record.anywhen.backup(&record.server);
    let mut old = Vec::new();
    let mut moments = vec![(record.now(), "0".to_owned())];
    let mut rows = "0".to_owned();
    for (number, name) in (1..).zip(&NAMES[1..]) {
        stream.store_all(&record.server);
        let standby = standby_of(&record, &record.server, name);
        record.fill_segments(1);
        let ids = [10 * number, 10 * number + 1, 10 * number + 2];
        record.insert(ids[0]);
        follow(&record.server, &standby);
        if number % 2 == 0 {
            stream.store_all(&record.server);
            record.server.kill9();
        } else {
            record.server.stop(Shutdown::Fast);
        }
        standby.promote();
        old.push(std::mem::replace(&mut record.server, standby));
        record.insert(ids[1]);
        rows = format!("{rows},{},{}", ids[0], ids[1]);
        moments.push((record.now(), rows.clone()));
        record.insert(ids[2]);
        rows = format!("{rows},{}", ids[2]);
        wait_for_stream(&record.server, &mut stream);
    }
    stream.store_all(&record.server);
    stream.stop();
    let system = system_dir(&record.anywhen, &record.server);
    assert_histories_come_first(&system, 6);
    let datas: Vec<&Path> = old
        .iter()
        .chain([&record.server])
        .map(Server::data)
        .collect();
    assert!(assert_wal_of(&system, &datas, 1).segments >= 5);
    for (number, (moment, rows)) in moments.iter().enumerate() {
        let target = record.target(&format!("restored-{number}"));
        record.anywhen.restore(&target, &["--to-time", moment]);
        let found = restored_moments(&record.ground, &target, End::Paused);
        assert_eq!(&found, rows, "restored to {moment}");
    }
    let latest = record.rows_at("latest", &[], End::Promoted);
    assert_eq!(latest, rows);
}

/// A recovery that finds WAL of a timeline and no history of it cannot tell where the timeline came from.
#[track_caller]
fn assert_histories_come_first(system: &Path, timelines: u32) {
    let written = |path: &Path| fs::metadata(path).unwrap().modified().unwrap();
    for timeline in 2..=timelines {
        let history = system.join(format!("wal/{timeline:08X}.history"));
        let wal = files_below(&system.join(format!("wal/{timeline:08X}")));
        let first = wal.iter().map(|path| written(path)).min();
        let first = first.unwrap_or_else(|| panic!("nothing of timeline {timeline} is stored"));
        assert!(
            written(&history) <= first,
            "WAL of timeline {timeline} was stored before its history"
        );
    }
}

/// The stream was away while two promotions came one after the other: the timeline between them has WAL
/// that belongs to every restore beyond it.
#[test]
fn a_jump_of_two_timelines_leaves_nothing_out() {
    let mut record = record_of_small_segments().begin();
    record.store_all();
    record.stop_stream();
    record.fill_segments(1);
    record.insert(1);
    for (row, name) in [(2, "second"), (3, "third")] {
        let standby = standby_of(&record, &record.server, name);
        follow(&record.server, &standby);
        record.server.stop(Shutdown::Fast);
        standby.promote();
        record.server = standby;
        record.insert(row);
        record.fill_segments(1);
    }
    record.stream = Some(record.anywhen.stream(&record.server));
    record.store_all();
    record.stop_stream();
    let system = system_dir(&record.anywhen, &record.server);
    assert_histories_come_first(&system, 3);
    let status = record.anywhen.json(&["status"]);
    let holes = status["clusters"][0]["holes"].as_array().unwrap().len();
    assert_eq!(holes, 0, "{status}");
    assert_eq!(record.rows_at("latest", &[], End::Promoted), "0,1,2,3");
}

/// Promise 2 across a failover that lost the end of the old timeline: a position that was stored there
/// says nothing of the new timeline, and a server that is told it would let go of commits that no
/// repository holds.
#[test]
fn a_commit_behind_what_is_stored_waits_for_its_own_timeline() {
    let mut record = record_of_small_segments();
    record.insert(0);
    let conninfo = host_list(&record.ground, &["primary", "second"]);
    let mut stream = stream_over(&record.anywhen, &record.server, &conninfo);
    record.anywhen.backup(&record.server);
    let mut standby = standby_of(&record, &record.server, "second");
    follow(&record.server, &standby);
    standby.stop(Shutdown::Fast);
    // what is lost: far more than the new timeline will write here
    let lost = record.insert(90);
    record.fill_segments(5);
    stream.store_all(&record.server);
    let stored_end = record.server.value("select pg_current_wal_flush_lsn()");
    record.server.kill9();
    write_setting(standby.data(), "primary_conninfo = ''");
    write_setting(standby.data(), "restore_command = ''");
    write_setting(standby.data(), "synchronous_standby_names = '*'");
    standby.start();
    // the first waits for the stream to come; the second for its piece alone
    record.anywhen.set_writable(false);
    standby.promote();
    commit_waiting(&standby, 1, || record.anywhen.set_writable(true));
    wait_for_stream(&standby, &mut stream);
    record.anywhen.set_writable(false);
    commit_waiting(&standby, 2, || {
        let sent = "select sent_lsn >= pg_current_wal_flush_lsn() from pg_stat_replication";
        eventually("the commit is sent", || standby.value(sent) == "t");
        record.anywhen.set_writable(true);
    });
    let at = format!("select pg_current_wal_flush_lsn() < '{stored_end}'");
    assert_eq!(
        standby.value(&at),
        "t",
        "the story is about what lies before"
    );
    // what the first primary alone has is said, since a restore leaves it out
    let said = stream.stderr();
    assert!(said.contains("is not in timeline 2"), "{said}");
    stream.kill9();
    standby.kill9();
    fs::remove_dir_all(standby.data()).unwrap();
    let status = record.anywhen.json(&["status"]);
    let left = &status["clusters"][0]["left_behind"];
    assert_eq!(left[0]["timeline"], 1, "{status}");
    assert_eq!(left[0]["next"], 2, "{status}");
    assert!(
        record
            .anywhen
            .run(&["status"])
            .stdout
            .contains("restore --timeline 1")
    );
    let target = record.target("plan");
    // the new timeline begins later than that moment, and before it by position
    for to in [vec![], vec!["--to-time", &lost.after]] {
        let plan = ["restore", "-D", target.to_str().unwrap(), "--dry-run"];
        let plan = record.anywhen.run(&[&plan[..], &to].concat());
        let shown = plan.succeeded().to_string();
        assert!(shown.contains("restores it instead"), "{to:?}: {shown}");
    }
    assert_eq!(record.rows_at("latest", &[], End::Promoted), "0,1,2");
    let old = record.rows_at("old", &["--timeline", "1"], End::Promoted);
    assert!(old.starts_with("0,90"), "{old}");
}

/// Commits a row, and asserts that it returns only after `until`, and then without a warning.
#[track_caller]
fn commit_waiting(server: &Server, id: u32, until: impl FnOnce()) {
    let settings = server.client();
    let client = std::thread::spawn(move || {
        let mut sql = settings.connect(NoTls).unwrap();
        execute(&mut sql, &format!("insert into moments values ({id})"));
    });
    let waiting = "select count(*) from pg_stat_activity where wait_event = 'SyncRep'";
    let mut sql = server.sql();
    eventually("the commit waits", || {
        assert!(!client.is_finished(), "released, and stored nowhere");
        value(&mut sql, waiting) == "1"
    });
    let since = Instant::now();
    while since.elapsed() < Duration::from_millis(1200) {
        assert!(!client.is_finished(), "released, and stored nowhere");
        pause();
    }
    until();
    client.join().unwrap();
}

/// A host of the list that has not received yet what is stored: nothing of it can be used, nothing is lost
/// by it, and it is waited for.
#[test]
fn a_host_that_is_behind_is_waited_for() {
    let mut record = record_of_small_segments();
    record.insert(0);
    record.anywhen.backup(&record.server);
    let mut standby = standby_of(&record, &record.server, "second");
    follow(&record.server, &standby);
    standby.stop(Shutdown::Fast);
    // the repository has what it lacks
    write_setting(standby.data(), "restore_command = ''");
    let any = host_list(&record.ground, &["primary", "second"]).replace("read-write", "any");
    let mut stream = stream_over(&record.anywhen, &record.server, &any);
    record.insert(1);
    record.fill_segments(2);
    record.insert(2);
    stream.store_all(&record.server);
    record.server.stop(Shutdown::Fast);
    standby.start();
    eventually("the stream says what it waits for", || {
        stream.assert_running();
        stream.stderr().contains("behind what is stored")
    });
    record.server.start();
    follow(&record.server, &standby);
    record.insert(3);
    let written = lsn(&record.server.value("select pg_current_wal_flush_lsn()"));
    let system = system_dir(&record.anywhen, &record.server);
    eventually("all is stored, from whichever host", || {
        stream.assert_running();
        stored_end(&system, 1, 1) >= written
    });
    stream.stop();
    assert!(assert_wal_of(&system, &[record.server.data()], 1).segments >= 2);
    assert_eq!(record.rows_at("latest", &[], End::Promoted), "0,1,2,3");
}

/// When a primary dies, its standby has more than any archive. What it asks the archive for must not take
/// the place of what it has: it would lose commits, or not survive its promotion.
#[test]
fn a_standby_that_has_more_than_is_stored_keeps_it_when_it_is_promoted() {
    let mut record = record_of_small_segments().begin();
    let standby = standby_of(&record, &record.server, "second");
    record.insert(1);
    record.store_all();
    record.stream.take().unwrap().kill9();
    // beyond the page that the repository has the beginning of
    for row in 2..=40 {
        record.insert(row);
    }
    follow(&record.server, &standby);
    record.server.kill9();
    standby.promote();
    assert_eq!(standby.value("select max(id) from moments"), "40");
}

/// A stream from a standby spares the primary. The standby becomes the primary under load, after a crash
/// of the old one, and clients and stream go on.
#[test]
fn a_stream_from_a_standby_that_is_promoted_under_load_loses_nothing() {
    let mut record = record_of_small_segments();
    record.insert(0);
    record.anywhen.backup(&record.server);
    let standby = standby_of(&record, &record.server, "second");
    let mut stream = record.anywhen.stream(&standby);
    let load = Load::start(&record.server, 0);
    let mut sql = standby.sql();
    let behind = "select count(*) from pg_stat_replication
                  where pg_last_wal_receive_lsn() - flush_lsn < 400000";
    record.wait_ms(1500);
    eventually("the standby's WAL is stored", || {
        stream.assert_running();
        value(&mut sql, behind) == "1"
    });
    record.server.kill9();
    drop(load);
    standby.promote();
    let load = Load::start(&standby, 1);
    standby.execute("select pg_sleep(1)");
    let acknowledged = load.stop();
    stream.store_all(&standby);
    stream.stop();
    let expected = ids(&standby);
    let lost: BTreeSet<&u32> = acknowledged.difference(&expected).collect();
    assert!(lost.is_empty(), "{lost:?}");
    let system = system_dir_in(record.anywhen.repository(), &standby);
    let datas = [record.server.data(), standby.data()];
    assert!(assert_wal_of(&system, &datas, 1).segments > 0);
    assert_histories_come_first(&system, 2);
    crate::load::assert_restored(&record, &expected);
}
