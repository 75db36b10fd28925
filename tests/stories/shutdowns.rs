//! The server goes and comes back under a running stream.

use std::time::Duration;

use crate::judge::End;
use crate::objects::{assert_equal_to_server, assert_no_gap, system_dir};
use crate::record::Record;
use crate::server::{Options, Shutdown};

/// A server that shuts down waits for its archiver; an archiver must not keep it waiting, and a planned
/// shutdown loses nothing.
#[test]
fn a_shutdown_is_quick_and_its_last_wal_is_stored() {
    let mut record = Record::begun(&Options::default());
    record.insert(1);
    let took = record.server.stop(Shutdown::Fast);
    assert!(took < Duration::from_secs(15), "the shutdown took {took:?}");
    record.stream.as_mut().unwrap().assert_running();
    assert_eq!(record.rows_at("latest", &[], End::Promoted), "0,1");
}

#[test]
fn a_stream_goes_on_after_restarts_of_the_server() {
    let mut record = Record::begun(&Options::default());
    for (row, how) in [
        (1, Shutdown::Fast),
        (2, Shutdown::Immediate),
        (3, Shutdown::Fast),
    ] {
        record.insert(row);
        record.fill_segments(1);
        record.server.stop(how);
        record.server.start();
    }
    record.insert(4);
    record.store_all();
    let system = system_dir(&record.anywhen, &record.server);
    assert!(assert_equal_to_server(&system, record.server.data()) >= 3);
    assert_no_gap(&system, 16);
    assert_eq!(record.rows_at("latest", &[], End::Promoted), "0,1,2,3,4");
}

/// SIGTERM and SIGINT are an orderly end: nothing that the server had sent is lost.
#[test]
fn a_stopped_stream_has_stored_all_it_received() {
    let mut record = Record::begun(&Options::default());
    record.insert(1);
    record.store_all();
    record.insert(2);
    // the row is sent at once; the flush interval would store it later
    record.server.execute("select pg_sleep(0.1)");
    record.stop_stream();
    let second = record.anywhen.stream(&record.server);
    record.insert(3);
    record.server.execute("select pg_sleep(0.1)");
    second.interrupt();
    assert_eq!(record.rows_at("latest", &[], End::Promoted), "0,1,2,3");
}

/// Promise 2: with Anywhen in `synchronous_standby_names`, a commit that returned is in the repository,
/// whatever dies the moment after.
#[test]
fn a_commit_that_waited_for_anywhen_survives_the_loss_of_everything_else() {
    let mut record = Record::begun(&Options::default());
    record
        .server
        .execute("alter system set synchronous_standby_names = '*'");
    record.server.execute("select pg_reload_conf()");
    crate::ground::eventually("the stream is a synchronous standby", || {
        record
            .server
            .value("select count(*) from pg_stat_replication where sync_state = 'sync'")
            == "1"
    });
    record.insert(1);
    record.stream.take().unwrap().kill9();
    record.server.stop(Shutdown::Immediate);
    assert_eq!(record.rows_at("latest", &[], End::Promoted), "0,1");
}
