//! `kill -9` again and again while clients write: of the stream, of the server, of both at once.

use crate::chance::{Chance, tenth_of};
use crate::load::{Load, assert_restored};
use crate::objects::{assert_no_gap, assert_wal_of, system_dir};
use crate::record::Record;
use crate::server::Options;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Killed {
    Stream,
    Server,
    Both,
}

/// What was acknowledged to the server is recycled there: a kill at the wrong moment must not lose it.
#[test]
fn a_stream_killed_at_any_moment_loses_nothing() {
    nothing_is_lost(Killed::Stream);
}

/// A server that crashed writes the end of its WAL anew: what was streamed before must be what it has
/// afterwards, or two histories would be mixed.
#[test]
fn a_server_killed_at_any_moment_loses_nothing() {
    nothing_is_lost(Killed::Server);
}

/// The machine that both run on loses its power.
#[test]
fn a_server_and_its_stream_killed_together_lose_nothing() {
    nothing_is_lost(Killed::Both);
}

#[track_caller]
fn nothing_is_lost(killed: Killed) {
    let mut record = Record::begun(&Options {
        wal_segment_mib: 1,
        ..Options::default()
    });
    let load = Load::start(&record.server, 0);
    let mut chance = Chance::new();
    for _ in 0..tenth_of(100) {
        record.wait_ms(chance.below(500));
        if killed != Killed::Server {
            record.stream.take().unwrap().kill9();
        }
        if killed != Killed::Stream {
            record.server.kill9();
            record.server.start();
        }
        if killed != Killed::Server {
            // pieces one after another, or as many at once as there are
            let way = ["--flush-interval=200ms", "--synchronous"];
            let way = way[usize::try_from(chance.below(2)).unwrap()];
            record.stream = Some(record.anywhen.stream_with(&record.server, &[way]));
        }
    }
    let acknowledged = load.stop();
    record.store_all();
    record.stop_stream();
    let system = system_dir(&record.anywhen, &record.server);
    let compared = assert_wal_of(&system, &[record.server.data()], 1);
    assert!(compared.segments > 0, "{compared:?}");
    assert_no_gap(&system, 1);
    assert_restored(&record, &acknowledged);
}
