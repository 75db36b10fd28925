//! Where a moment lies is known without reading all WAL, and is where reading all of it finds it.

use std::fs;

use serde_json::Value;

use crate::anywhen::Ended;
use crate::judge::End;
use crate::objects::{stored_segments, system_dir};
use crate::record::Record;
use crate::server::Options;

fn small_segments() -> Options {
    Options {
        wal_segment_mib: 1,
        settings: "max_prepared_transactions = 5".to_owned(),
        ..Options::default()
    }
}

/// A plan, made by what is noted of WAL or by reading all of it.
fn planned(record: &Record, target: &[&str], reads_all: bool) -> Ended {
    let directory = record.target("planned");
    let mut arguments = vec!["restore", "--dry-run", "--json", "-D"];
    arguments.push(directory.to_str().unwrap());
    arguments.extend(target);
    if reads_all {
        arguments.push("--check-wal");
    }
    record.anywhen.run(&arguments)
}

/// What a plan, or a refusal, says of the target, and how many segments were not read for it.
fn said(ended: &Ended) -> (Value, u64) {
    let mut document = ended.document();
    let wal = document.get_mut("wal").and_then(Value::as_object_mut);
    let unread = wal.and_then(|wal| wal.remove("unread_segments"));
    if let Some(document) = document.as_object_mut() {
        document.remove("phases");
    }
    (document, unread.and_then(|it| it.as_u64()).unwrap_or(0))
}

/// That both ways of planning say the same. Gives how many segments the one did not read.
#[track_caller]
fn assert_same(record: &Record, target: &[&str]) -> u64 {
    let (by_summaries, unread) = said(&planned(record, target, false));
    let (by_records, none) = said(&planned(record, target, true));
    assert_eq!(by_summaries, by_records, "{target:?}");
    assert_eq!(none, 0, "{target:?}");
    unread
}

/// A commit too many or too few would be restored, and nobody would notice.
#[test]
fn a_plan_by_summaries_is_the_one_that_all_records_lead_to() {
    let mut record = Record::begun(&small_segments());
    let mut known = Vec::new();
    for id in 1..=4 {
        record.fill_segments(18);
        known.push(record.insert(id));
        record
            .server
            .execute(&format!("select pg_create_restore_point('after {id}')"));
        record.server.execute(&format!(
            "begin; insert into moments values ({id} + 100); prepare transaction 'p{id}'"
        ));
    }
    record.server.execute("rollback prepared 'p2'");
    record.server.execute("create database gone");
    record.fill_segments(5);
    record.server.execute("drop database gone");
    let dropped = record.now();
    record.fill_segments(5);
    record.store_all();
    record.stop_stream();

    let mut unread = Vec::new();
    for moment in &known {
        for target in [
            vec!["--to-time", &moment.after],
            vec!["--to-time", &moment.committed],
            vec!["--to-time", &moment.committed, "--exclusive"],
            vec!["--to-lsn", &moment.commit_lsn],
            vec!["--to-lsn", &moment.commit_lsn, "--exclusive"],
            vec!["--to-xid", &moment.xid],
            vec!["--to-xid", &moment.xid, "--exclusive"],
        ] {
            unread.push(assert_same(&record, &target));
        }
    }
    for target in [
        vec!["--to-name", "after 3"],
        vec!["--to-name", "after 3", "--exclusive"],
        vec!["--to-time", &dropped],
        vec!["--immediate"],
        vec![],
        // these are refused, with the same words
        vec!["--to-name", "after 5"],
        vec!["--to-xid", "4000000"],
        vec!["--to-time", "2001-01-01T00:00:00Z"],
        vec!["--to-time", "2101-01-01T00:00:00Z"],
    ] {
        unread.push(assert_same(&record, &target));
    }
    // each target that leads far into the WAL was found without reading most of it
    let found = unread.iter().filter(|segments| **segments >= 40).count();
    assert!(found >= 12, "{unread:?}");

    let rows = record.rows_at("three", &["--to-time", &known[2].after], End::Paused);
    assert_eq!(rows, "0,1,2,3");
}

/// Makes so many segments, with a small transaction in each.
fn make_segments(record: &Record, count: u32) {
    record.server.execute(&format!(
        "do $$ begin
           for n in 1..{count} loop
             perform pg_logical_emit_message(true, 'a', 'b');
             perform pg_switch_wal();
           end loop;
         end $$"
    ));
}

/// A year of WAL is looked through in a few hundred requests, or in a hundred thousand.
#[test]
fn summaries_are_put_together_and_can_be_made_anew() {
    let mut record = Record::of_server(&small_segments());
    // segments are put together by 256, those whose numbers begin alike
    make_segments(&record, 240);
    record.server.execute("checkpoint");
    record = record.begin();
    let early = record.insert(1);
    make_segments(&record, 130);
    let middle = record.insert(2);
    make_segments(&record, 140);
    record.insert(3);
    record.store_all();
    let object =
        system_dir(&record.anywhen, &record.server).join("index/00000001/000000010000000000000100");
    crate::ground::eventually("the stream puts summaries together", || object.exists());
    record.stop_stream();

    let targets: [&[&str]; 4] = [
        &["--to-time", &early.after],
        &["--to-time", &middle.after],
        &["--to-xid", &middle.xid],
        &[],
    ];
    let by_index: Vec<u64> = targets.map(|target| assert_same(&record, target)).into();
    assert!(by_index[1] > 100 && by_index[3] > 200, "{by_index:?}");

    let rebuild = || record.anywhen.json(&["index", "rebuild"])["timelines"][0].clone();
    let state = |kept: u64, written: u64| {
        // of the first and the last group there are not all segments
        serde_json::json!({"timeline": 1, "kept": kept, "written": written, "unfinished": 2})
    };
    assert_eq!(rebuild(), state(1, 0));
    let written = fs::read(&object).unwrap();

    // without it, and with one that is damaged, plans are the same
    let mut damaged = written.clone();
    let at = damaged.len() / 2;
    damaged[at] ^= 1;
    crate::ground::write_as_account(&object, &damaged, 0o600);
    planned(&record, targets[1], false)
        .succeeded()
        .says(&["anywhen index rebuild", "000000010000000000000100"]);
    let with_damage: Vec<u64> = targets.map(|target| assert_same(&record, target)).into();
    assert_eq!(with_damage, by_index);
    assert_eq!(rebuild(), state(0, 1));
    fs::remove_file(&object).unwrap();
    let without: Vec<u64> = targets.map(|target| assert_same(&record, target)).into();
    assert_eq!(without, by_index);
    assert_eq!(rebuild(), state(0, 1));
    assert_eq!(rebuild(), state(1, 0));

    // a segment that is not there cannot be planned with, whatever is noted of it
    let stored = stored_segments(&system_dir(&record.anywhen, &record.server));
    fs::remove_file(&stored["000000010000000000000140"]).unwrap();
    let refused = planned(&record, targets[1], false);
    refused.failed_with(3);
    refused.says(&["000000010000000000000140"]);
}
