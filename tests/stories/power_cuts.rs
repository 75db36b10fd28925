//! A power cut takes what was written and not synced, which `kill -9` never shows: what a disk would have
//! kept is worked out from the calls that strace saw.

use std::fs;
use std::path::Path;

use crate::disk::{Call, Disk, Event, events, traced};
use crate::ground::{Ground, eventually};
use crate::objects::files_below;
use crate::record::Record;
use crate::server::Options;

/// The first bytes of a standby's status update: `CopyData` of 34 bytes, and `r`
/// (protocol-replication).
const STATUS: [u8; 6] = *b"d\0\0\0\x26r";

/// Promise 2: the server recycles what it is told is flushed, and releases commits on it.
#[test]
fn what_is_reported_flushed_survives_a_power_cut() {
    let mut record = Record::on(
        Ground::on_disk(),
        &Options {
            wal_segment_mib: 1,
            ..Options::default()
        },
    );
    let log = record.ground.make_dir("trace", 0o700).join("stream");
    let mut stream = record.anywhen.command(&["stream"]);
    stream.args(["-d", &record.server.conninfo()]);
    stream.args(["--flush-interval", "50ms"]);
    let stream = record
        .anywhen
        .stream_of(&record.server, traced(&stream, &log));
    record.stream = Some(stream);
    // a journal is written out before it is used, for which a slow disk takes seconds
    let mut rows = 0;
    eventually("the stream writes to its journal", || {
        rows += 1;
        record.insert(rows);
        record.store_all();
        writes_to_journal(&log)
    });
    for row in rows + 1..=rows + 30 {
        record.insert(row);
        record.store_all();
    }
    record.fill_segments(2);
    record.store_all();
    record.stop_stream();

    let mut disk = Disk::new(record.anywhen.repository());
    let (mut begin, mut reports) = (None, 0);
    let mut last = 0;
    for event in events(&whole(&log)) {
        match event {
            Event::Succeeded(call) => disk.apply(&call),
            Event::Began(call) => {
                let Some(flushed) = reported_flushed(&call).filter(|lsn| *lsn > 0) else {
                    continue;
                };
                // the first report is where the slot stands, before anything is received
                let begin = *begin.get_or_insert(flushed);
                assert!(
                    covers(&disk, begin, flushed),
                    "reported as flushed to {flushed:X}, streamed from {begin:X}; a disk keeps {:X?}",
                    kept_ranges(&disk)
                );
                reports += usize::from(flushed > last);
                last = flushed;
            }
        }
    }
    assert!(reports > 5, "{reports} reports that moved");
    assert!(disk.has_journaled(), "no journal was written");
    assert_all_kept(&disk, record.anywhen.repository());
}

/// `backup.json` makes a backup exist: it must not outlive what it refers to.
#[test]
fn a_backup_exists_only_once_all_of_it_survives_a_power_cut() {
    let record = Record::on(Ground::on_disk(), &Options::default());
    let log = record.ground.make_dir("trace", 0o700).join("backup");
    let mut backup = record.anywhen.command(&["backup", "--checkpoint", "fast"]);
    backup.args(["-d", &record.server.conninfo()]);
    let ended = record.anywhen.run_command(traced(&backup, &log));
    ended.succeeded();

    let mut disk = Disk::new(record.anywhen.repository());
    let mut commit_points = 0;
    for event in events(&whole(&log)) {
        match event {
            Event::Succeeded(call) => disk.apply(&call),
            Event::Began(call) if names_commit_point(&call) => {
                commit_points += 1;
                let objects = disk.names().filter(|path| is_of_backup(path));
                let lost: Vec<&Path> = objects.filter(|path| !disk.keeps(path)).collect();
                assert!(lost.is_empty(), "a power cut takes {lost:?}");
            }
            Event::Began(_) => {}
        }
    }
    assert_eq!(commit_points, 1, "backup.json is named once");
    assert_all_kept(&disk, record.anywhen.repository());
}

/// The trace of a program that has ended, once the tracer has written it all.
fn whole(log: &Path) -> String {
    let read = || fs::read_to_string(log).unwrap_or_default();
    eventually("the tracer has written its last line", || {
        let trace = read();
        // the column of process ids is padded: a short one is followed by more than one space
        let process = |line: &str| line.split(' ').next().map(str::to_owned);
        let first = trace.lines().next().and_then(process);
        let mut last_words = trace
            .lines()
            .filter(|line| line.contains("+++ exited with"));
        first.is_some() && last_words.any(|line| process(line) == first)
    });
    read()
}

/// Whether a program that is being traced has begun to write to its journal.
fn writes_to_journal(log: &Path) -> bool {
    // as strace prints it, when it is told to print in hexadecimal
    let folder = r"\x2f\x2e\x6a\x6f\x75\x72\x6e\x61\x6c\x2f"; // /.journal/
    let trace = fs::read_to_string(log).unwrap_or_default();
    let mut calls = trace.lines();
    calls.any(|call| call.contains("pwrite64(") && call.contains(folder))
}

/// The flush position of a status update, where `call` sends one.
fn reported_flushed(call: &Call) -> Option<u64> {
    if !matches!(
        call.name.as_str(),
        "write" | "writev" | "sendto" | "sendmsg"
    ) {
        return None;
    }
    let sent = call
        .strings
        .iter()
        .find(|bytes| bytes.starts_with(&STATUS))?;
    let flushed = sent.get(STATUS.len() + 8..STATUS.len() + 16)?;
    Some(u64::from_be_bytes(flushed.try_into().ok()?))
}

/// The ranges of WAL that the disk keeps, by the names of segments of 1 MiB and of pieces.
fn kept_ranges(disk: &Disk) -> Vec<(u64, u64)> {
    let hex = |text: &str| u64::from_str_radix(text, 16).ok();
    let range = |path: &Path| {
        let name = path.file_name()?.to_str()?;
        if let Some((start, end)) = name.split_once('-') {
            return Some((hex(start)?, hex(end)?));
        }
        let (log, segment) = (name.get(8..16)?, name.get(16..24)?);
        let start = (hex(log)? << 32) + (hex(segment)? << 20);
        (name.len() == 24).then_some((start, start + (1 << 20)))
    };
    let mut ranges: Vec<(u64, u64)> = disk
        .names()
        .chain(disk.journaled())
        .filter(|path| disk.keeps(path))
        .filter_map(range)
        .collect();
    ranges.sort_unstable();
    ranges
}

fn covers(disk: &Disk, begin: u64, end: u64) -> bool {
    let mut reached = begin;
    for (start, end) in kept_ranges(disk) {
        if start <= reached {
            reached = reached.max(end);
        }
    }
    reached >= end
}

fn is_of_backup(path: &Path) -> bool {
    let path = path.to_str().unwrap();
    let staged = path.contains('#');
    (path.contains("/packs/") || path.contains("/backups/")) && !staged
}

/// Whether a call gives `backup.json` its name.
fn names_commit_point(call: &Call) -> bool {
    let names = ["link", "linkat", "rename", "renameat", "renameat2"];
    names.contains(&call.name.as_str())
        && call
            .strings
            .last()
            .is_some_and(|path| path.ends_with(b"/backup.json"))
}

/// Asserts that everything in the repository was seen to be made, and survives.
fn assert_all_kept(disk: &Disk, repository: &Path) {
    let files = files_below(repository);
    assert!(files.len() > 1, "{} files", files.len());
    for file in files {
        assert!(
            disk.names().any(|name| name == file),
            "not seen to be made: {}",
            file.display()
        );
        assert!(disk.keeps(&file), "a power cut takes {}", file.display());
    }
}
