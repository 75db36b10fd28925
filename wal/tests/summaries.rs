//! A summary says what the records of its segment say, by servers of every major.

use wal::{
    Body, Lsn, Major, Parameters, Record, Summary, Verifier, WalRange, Walk, Walker, verify_segment,
};

use crate::golden::Golden;

/// The summaries of the segments, as a stream that pushes `chunk` bytes at a time learns them.
fn of_stream(golden: &Golden, chunk: usize) -> Vec<(WalRange, Option<Summary>)> {
    let mut verifier = Verifier::new(golden.start());
    let segments = golden.segments.iter();
    segments
        .map(|(name, bytes)| {
            for part in bytes.chunks(chunk) {
                verifier.push(part);
            }
            let range = name.range(golden.size).unwrap();
            let checked = verifier.check(range, bytes.as_slice());
            (range, checked.summary().cloned())
        })
        .collect()
}

fn place(record: &Record) -> WalRange {
    WalRange::new(record.start, record.end.align8())
}

/// What a restore decides by: anything else here than in the records is a commit too many or too few.
#[test]
fn a_summary_says_what_the_records_say() {
    for major in Major::ALL {
        let golden = Golden::read(major);
        let bodies = golden.bodies();
        let mut seen = 0;
        for (range, summary) in of_stream(&golden, 1 << 16) {
            let Some(summary) = summary else { continue };
            seen += 1;
            let ends_here = |record: &&(Record, Body)| {
                let end = place(&record.0).end;
                range.start < end && end <= range.end
            };
            let here: Vec<&(Record, Body)> = bodies.iter().filter(ends_here).collect();
            let (last, _) = here.last().unwrap();
            assert_eq!(summary.last, place(last), "{major}");
            assert_eq!(summary.covers.end, last.next, "{major}");
            let shutdown = |body: &Body| matches!(body, Body::Checkpoint { shutdown: true, .. });
            let but = here.iter().rev().find(|(_, body)| !shutdown(body));
            assert_eq!(
                summary.last_but_shutdown,
                but.map(|it| place(&it.0)),
                "{major}"
            );
            assert_eq!(summary.unreadable, 0, "{major}");
            assert_counts(&summary, &here, major);
            assert_commits(&summary, &here, major);
        }
        assert!(seen >= 4, "{major}: {seen}");
    }
}

fn assert_counts(summary: &Summary, here: &[&(Record, Body)], major: Major) {
    let count = |is: &dyn Fn(&Body) -> bool| {
        let found = here.iter().filter(|(_, body)| is(body)).count();
        u64::try_from(found).unwrap()
    };
    let (mut drops, mut parameters, mut xids) = (0, None, Vec::new());
    for (record, body) in here {
        match body {
            Body::Commit(end) | Body::Abort(end) => {
                drops += end.drops.len();
                xids.push(end.xid);
                xids.extend(&end.subxacts);
            }
            Body::DropDatabase { .. } => xids.push(record.header.xid),
            Body::ParameterChange {
                max_connections, ..
            } => parameters = parameters.max(Some(*max_connections)),
            _ => {}
        }
    }
    let found = [
        (summary.commits, count(&|b| matches!(b, Body::Commit(_)))),
        (summary.aborts, count(&|b| matches!(b, Body::Abort(_)))),
        (
            summary.prepares,
            count(&|b| matches!(b, Body::Prepare { .. })),
        ),
        (
            summary.restore_points,
            count(&|b| matches!(b, Body::RestorePoint { .. })),
        ),
        (
            summary.checkpoints,
            count(&|b| matches!(b, Body::Checkpoint { .. })),
        ),
        (
            summary.tablespaces_made,
            count(&|b| matches!(b, Body::CreateTablespace { .. })),
        ),
        (
            summary.databases_dropped,
            count(&|b| matches!(b, Body::DropDatabase { .. })),
        ),
        (summary.relations_dropped, u64::try_from(drops).unwrap()),
        (
            summary.relations_truncated,
            count(&|b| matches!(b, Body::TruncateRelation { .. })),
        ),
    ];
    for (number, (found, expected)) in found.into_iter().enumerate() {
        assert_eq!(found, expected, "{major}: {number}");
    }
    let largest = |marks: Parameters| marks.max_connections;
    assert_eq!(summary.parameters.map(largest), parameters, "{major}");
    let least_and_greatest = xids.iter().min().zip(xids.iter().max());
    assert_eq!(
        summary.xids,
        least_and_greatest.map(|(a, b)| (*a, *b)),
        "{major}"
    );
    assert_eq!(summary.minimal_at, None, "{major}");
}

fn assert_commits(summary: &Summary, here: &[&(Record, Body)], major: Major) {
    let commits = here.iter().filter_map(|(record, body)| match body {
        Body::Commit(end) => Some((place(record), end.xid, end.time)),
        _ => None,
    });
    let commits: Vec<_> = commits.collect();
    let mark = |mark: wal::CommitMark| (mark.range, mark.xid, mark.time);
    assert_eq!(
        summary.first_commit.map(mark),
        commits.first().copied(),
        "{major}"
    );
    assert_eq!(
        summary.last_commit.map(mark),
        commits.last().copied(),
        "{major}"
    );
    let newest = commits.iter().map(|(.., time)| *time).max();
    assert_eq!(summary.newest_commit, newest, "{major}");
    let prepared = here.iter().filter_map(|(record, body)| match body {
        Body::Prepare { prepared_at, .. } => Some((place(record), *prepared_at)),
        Body::Abort(end) if end.prepared => Some((place(record), end.time)),
        _ => None,
    });
    let prepared: Vec<_> = prepared.collect();
    let newest = prepared.iter().map(|(_, time)| *time).max();
    assert_eq!(summary.newest_prepared, newest, "{major}");
    let decisions = commits.iter().map(|(place, ..)| *place);
    let last = decisions
        .chain(prepared.iter().map(|(place, _)| *place))
        .max_by_key(|place| place.start);
    assert_eq!(summary.last_decision, last, "{major}");
}

/// Where two summaries meet, no record lies between: whoever takes both has seen all.
#[test]
fn summaries_that_meet_leave_nothing_out() {
    let mut meetings = 0;
    for major in Major::ALL {
        let golden = Golden::read(major);
        let bodies = golden.bodies();
        let summaries: Vec<Summary> = of_stream(&golden, 777)
            .into_iter()
            .filter_map(|(_, summary)| summary)
            .collect();
        for (before, after) in summaries.iter().zip(&summaries[1..]) {
            let between = bodies.iter().filter(|(record, _)| {
                before.last.start < record.start && record.start < after.last.start
            });
            let counted = between.filter(|(_, body)| matches!(body, Body::Commit(_)));
            // else a record was never finished there, or is longer than a segment
            if before.covers.end == after.covers.start {
                let last_of_after = after.last_commit.filter(|it| it.range == after.last);
                let commits = after.commits - u64::from(last_of_after.is_some());
                assert_eq!(u64::try_from(counted.count()).unwrap(), commits, "{major}");
                meetings += 1;
            }
            assert!(before.covers.end <= after.covers.start, "{major}");
        }
    }
    assert!(meetings >= 3 * Major::ALL.len(), "{meetings}");
}

/// How the bytes came changes nothing.
#[test]
fn a_summary_does_not_depend_on_how_the_bytes_came() {
    for major in Major::ALL {
        let golden = Golden::read(major);
        let whole = of_stream(&golden, 1 << 20);
        for chunk in [8, 8191, 1 << 18] {
            assert_eq!(of_stream(&golden, chunk), whole, "{major}: {chunk}");
        }
    }
}

/// A file by itself does not tell the record that began before it, and says so.
#[test]
fn a_file_by_itself_says_from_where_it_knows() {
    let mut shorter = 0;
    for major in Major::ALL {
        let golden = Golden::read(major);
        let streamed = of_stream(&golden, 1 << 20);
        for ((name, bytes), (range, of_stream)) in golden.segments.iter().zip(&streamed) {
            let report = verify_segment(*name, golden.size, None, bytes.as_slice(), |_| {});
            let checked = report.unwrap().checked;
            let (Some(alone), Some(of_stream)) = (checked.summary(), of_stream) else {
                continue;
            };
            assert!(alone.covers.start >= range.start, "{major}");
            assert_eq!(alone.last, of_stream.last, "{major}");
            let lsn = first_record(&golden, bytes, range.start);
            let header = lsn.bytes_since(alone.covers.start);
            assert!([0, 24, 40].contains(&header), "{major}: {header}");
            if of_stream.covers.start < alone.covers.start {
                shorter += 1;
            } else {
                assert_eq!(alone, of_stream, "{major}");
            }
        }
    }
    assert!(
        shorter > 0,
        "no record crossed from one segment to the next"
    );
}

fn first_record(golden: &Golden, bytes: &[u8], at: Lsn) -> Lsn {
    let mut walker = Walker::new(wal::WalkerStart {
        at,
        ..golden.start()
    });
    walker.push(bytes);
    loop {
        match walker.next().unwrap() {
            Walk::Record(record) => return record.start,
            Walk::Overwritten { .. } => {}
            other => panic!("{other:?}"),
        }
    }
}

/// What was not verified is not summed up: its records may be made up.
#[test]
fn damaged_and_partial_segments_have_none() {
    let golden = Golden::read(Major::V18);
    let mut verifier = Verifier::new(golden.start());
    let (name, bytes) = &golden.segments[0];
    let range = name.range(golden.size).unwrap();
    let mut damaged = bytes.clone();
    let middle = damaged.len() / 2;
    damaged[middle] ^= 1;
    verifier.push(&damaged);
    assert_eq!(verifier.check(range, damaged.as_slice()).summary(), None);

    let mut verifier = Verifier::new(golden.start());
    verifier.push(bytes);
    let half = WalRange::new(range.start, Lsn::new(range.start.as_u64() + 8192));
    assert_eq!(verifier.check(half, &bytes[..8192]).summary(), None);
    assert!(verifier.check(range, bytes.as_slice()).summary().is_some());
}
