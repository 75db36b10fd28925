//! What is stored is what the server wrote, byte for byte.

use crate::objects::{
    assert_equal_to_server, assert_no_gap, files_below, stored_segments, system_dir, unpacked,
};
use crate::record::Record;
use crate::server::Options;

#[test]
fn stored_segments_are_the_servers_own() {
    let mut record = Record::begun(&Options::default());
    record.fill_segments(4);
    record.insert(1);
    record.store_all();
    let system = system_dir(&record.anywhen, &record.server);
    let compared = assert_equal_to_server(&system, record.server.data());
    assert!(compared >= 4, "{compared} segments were compared");
    assert_no_gap(&system, 16);
}

/// Promise 1: a commit on an otherwise idle server is in the repository within the flush interval, not
/// when its segment is full. The pieces of a segment that is not complete hold the server's bytes too.
#[test]
fn the_segment_being_written_is_stored_in_pieces() {
    let mut record = Record::begun(&Options::default());
    record.insert(1);
    record.store_all();
    let system = system_dir(&record.anywhen, &record.server);
    let current = record
        .server
        .value("select pg_walfile_name(pg_current_wal_lsn())");
    assert!(
        !stored_segments(&system).contains_key(&current),
        "{current} is not complete"
    );
    let original = std::fs::read(record.server.data().join("pg_wal").join(&current)).unwrap();
    let base = u64::from_str_radix(&current[8..16], 16).unwrap() << 32
        | u64::from_str_radix(&current[16..], 16).unwrap() << 24;
    let mut pieces = 0;
    for path in files_below(&system.join("wal")) {
        let folder = path
            .parent()
            .unwrap()
            .file_name()
            .unwrap()
            .to_str()
            .unwrap();
        if folder != format!("{current}.pieces") {
            continue;
        }
        let name = path.file_name().unwrap().to_str().unwrap();
        let (start, end) = name.split_once('-').unwrap();
        let within =
            |lsn: &str| usize::try_from(u64::from_str_radix(lsn, 16).unwrap() - base).unwrap();
        assert_eq!(
            unpacked(&path),
            original[within(start)..within(end)],
            "{name}"
        );
        pieces += 1;
    }
    assert!(pieces > 0, "no piece of {current} is stored");
}

/// Little is stored for an idle server, and nothing again and again.
#[test]
fn an_idle_server_costs_next_to_nothing() {
    let mut record = Record::begun(&Options::default());
    record.insert(1);
    record.store_all();
    let objects = |record: &Record| {
        files_below(&system_dir(&record.anywhen, &record.server).join("wal")).len()
    };
    let before = objects(&record);
    // many flush intervals of the stream, as the server counts them: the replies of a second or more
    record.server.execute("select pg_sleep(2)");
    let after = objects(&record);
    assert!(
        after <= before + 2,
        "{} objects stored for two idle seconds",
        after - before
    );
}
