//! Passing over segments leads to the same point as seeing all of their records.

use jiff::Timestamp;
use proptest::prelude::*;
use wal::{Lsn, SegmentSize};

use super::*;
use crate::repository::summary::{CommitRecord, RecordPlace, SegmentSummary};

const MIB: u64 = 1 << 20;

fn size() -> SegmentSize {
    SegmentSize::from_bytes(MIB).unwrap()
}

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}

/// What a verifier would say of the records that end in one segment, `end` being where the next one
/// begins.
fn summary_of(records: &[Seen], end: Lsn) -> SegmentSummary {
    let (first, last) = (records.first().unwrap(), records.last().unwrap());
    let place = |record: &Seen| RecordPlace(record.span.start, record.span.end);
    let commits = records.iter().filter_map(|record| match &record.what {
        What::Commit { xid, time, .. } => Some(CommitRecord {
            lsn: record.span.start,
            xid: *xid,
            time: *time,
        }),
        _ => None,
    });
    let commits: Vec<CommitRecord> = commits.collect();
    let prepared = |record: &&Seen| match record.what {
        What::Prepare { time }
        | What::Abort {
            prepared: true,
            time,
            ..
        } => Some(time),
        _ => None,
    };
    let decides =
        |record: &&&Seen| prepared(record).is_some() || matches!(record.what, What::Commit { .. });
    let xids = records.iter().flat_map(|record| match &record.what {
        What::Commit { xid, subxacts, .. } | What::Abort { xid, subxacts, .. } => {
            [&[*xid], subxacts.as_slice()].concat()
        }
        What::DropDatabase { .. } => vec![record.xid],
        _ => Vec::new(),
    });
    let xids: Vec<u32> = xids.collect();
    let count = |is: fn(&What) -> bool| {
        u64::try_from(records.iter().filter(|it| is(&it.what)).count()).unwrap()
    };
    let parameters = records.iter().filter_map(|record| match record.what {
        What::Parameters(parameters) => Some(parameters),
        _ => None,
    });
    let parameters = parameters.reduce(Parameters::max);
    let but = |record: &&Seen| record.what != What::Shutdown;
    SegmentSummary {
        start: first.span.start,
        end,
        last: place(last),
        last_but_shutdown: records.iter().rev().find(but).map(place),
        commits: count(|what| matches!(what, What::Commit { .. })),
        first_commit: commits.first().copied(),
        last_commit: commits.last().copied(),
        newest_commit: commits.iter().map(|commit| commit.time).max(),
        aborts: count(|what| matches!(what, What::Abort { .. })),
        prepares: count(|what| matches!(what, What::Prepare { .. })),
        newest_prepared: records.iter().filter_map(|it| prepared(&it)).max(),
        last_decision: records.iter().rev().find(|it| decides(&it)).map(place),
        xids: xids.iter().min().copied().zip(xids.iter().max().copied()),
        restore_points: count(|what| matches!(what, What::RestorePoint { .. })),
        checkpoints: 0,
        tablespaces_made: count(|what| matches!(what, What::CreateTablespace { .. })),
        databases_dropped: count(|what| matches!(what, What::DropDatabase { .. })),
        relations_dropped: 0,
        relations_truncated: 0,
        parameters,
        minimal_at: None,
        unreadable: 0,
    }
}

fn a_what() -> impl Strategy<Value = What> {
    let second = || (0_i64..30).prop_map(at);
    let xid = || 1_u32..40;
    prop_oneof![
        4 => (xid(), second(), prop::collection::vec(xid(), 0..2))
            .prop_map(|(xid, time, subxacts)| What::Commit { xid, time, subxacts }),
        1 => (xid(), any::<bool>(), second(), prop::collection::vec(xid(), 0..2))
            .prop_map(|(xid, prepared, time, subxacts)| What::Abort { xid, prepared, time, subxacts }),
        1 => second().prop_map(|time| What::Prepare { time }),
        1 => Just(What::Shutdown),
        1 => prop_oneof![Just("a"), Just("b")]
            .prop_map(|name| What::RestorePoint { name: name.into() }),
        1 => (1_u32..5).prop_map(|oid| What::CreateTablespace { oid, path: b"/p".to_vec() }),
        1 => (1_u32..5).prop_map(|database| What::DropDatabase { database }),
        1 => (0_i32..100).prop_map(|max_connections| {
            What::Parameters(Parameters { max_connections, ..Parameters::default() })
        }),
        8 => Just(What::Other),
    ]
}

fn a_wanted() -> impl Strategy<Value = (u8, i64, u64, u32, bool)> {
    (0_u8..5, 0_i64..32, 0_u64..200, 1_u32..42, any::<bool>())
}

proptest! {
    /// A wrong point is a commit too many or too few, and nobody would notice.
    #[test]
    fn passing_over_segments_leads_to_the_same_point(
        whats in prop::collection::vec(
            (a_what(), prop::sample::select(vec![8_u64, 200 * 8, (MIB / 3) & !7, MIB, 9 * MIB]), 1_u32..40),
            1..120,
        ),
        known in prop::collection::vec(prop::bool::weighted(0.9), 600),
        backup_ends_behind in 0_usize..20,
        (kind, second, place, xid, exclusive) in a_wanted(),
    ) {
        let mut records: Vec<Seen> = Vec::new();
        let mut next = MIB + 40;
        for (what, bytes, xid) in whats {
            let span = Span { start: Lsn::new(next), end: Lsn::new(next + bytes) };
            records.push(Seen { span, xid, what });
            next += bytes;
        }
        let ends = Lsn::new(next);
        let wanted = match kind {
            0 => Wanted::Time { at: at(second), exclusive },
            1 => Wanted::Lsn { at: Lsn::new(MIB + place * (next - MIB) / 200), exclusive },
            2 => Wanted::Xid { xid, exclusive },
            3 => Wanted::Name { name: "a".to_owned(), exclusive },
            _ => Wanted::Last,
        };
        let consistent_at = records.get(backup_ends_behind).map_or(ends, |it| it.span.end);

        let mut all = Resolver::new(wanted.clone(), consistent_at);
        for record in &records {
            if all.see(record) == Flow::Stop {
                break;
            }
        }

        let segment = |record: &Seen| size().start_of(record.span.end.saturating_sub(1));
        let mut passing = Resolver::new(wanted, consistent_at);
        let segments = records.chunk_by(|a, b| segment(a) == segment(b));
        'segments: for (number, here) in segments.enumerate() {
            let end = here.last().unwrap().span.end;
            let summary = summary_of(here, end);
            if known[number % known.len()] && passing.passes(&summary) {
                passing.pass(&summary);
                continue;
            }
            for record in here {
                if passing.see(record) == Flow::Stop {
                    break 'segments;
                }
            }
        }
        prop_assert_eq!(format!("{:?}", passing.finish()), format!("{:?}", all.finish()));
    }
}

/// Else the property above would hold of a resolver that passes over nothing.
#[test]
fn segments_that_decide_nothing_are_passed_over() {
    let commit = |xid, second| What::Commit {
        xid,
        time: at(second),
        subxacts: Vec::new(),
    };
    let record = |number: u64, what| Seen {
        span: Span {
            start: Lsn::new(number * MIB + 40),
            end: Lsn::new(number * MIB + 80),
        },
        xid: 0,
        what,
    };
    let summary =
        |number: u64, what: What| summary_of(&[record(number, what)], Lsn::new((number + 1) * MIB));
    let time = Wanted::Time {
        at: at(20),
        exclusive: false,
    };
    let lsn = Wanted::Lsn {
        at: Lsn::new(5 * MIB),
        exclusive: false,
    };
    let name = Wanted::Name {
        name: "a".to_owned(),
        exclusive: false,
    };
    let xid = Wanted::Xid {
        xid: 7,
        exclusive: false,
    };
    let point = What::RestorePoint {
        name: b"a".to_vec(),
    };
    let drop = What::DropDatabase { database: 1 };
    for (wanted, number, what, passes) in [
        (&time, 4, commit(1, 20), true),
        (&time, 4, commit(1, 21), false),
        (&time, 4, What::Prepare { time: at(21) }, false),
        (&time, 4, What::Other, true),
        (&lsn, 4, commit(1, 1), true),
        (&lsn, 5, commit(1, 1), false),
        (&name, 4, commit(1, 1), true),
        (&name, 4, point, false),
        (&xid, 4, commit(6, 1), true),
        (&xid, 4, commit(7, 1), false),
        (&Wanted::Last, 4, commit(1, 1), true),
        (&Wanted::Last, 4, drop, false),
        // the backup ended there
        (&Wanted::Last, 1, commit(1, 1), false),
    ] {
        let resolver = Resolver::new(wanted.clone(), Lsn::new(MIB + 60));
        let summary = summary(number, what.clone());
        assert_eq!(resolver.passes(&summary), passes, "{wanted:?} {what:?}");
    }
}
