//! What servers of each major wrote, judged by what they and their `pg_waldump` said about it.
//! `golden/make` makes these files anew.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use wal::record::rmgr;
use wal::{
    Body, Completeness, Lsn, Major, Reach, Record, SegmentHead, SegmentName, SegmentSize,
    TimelineHistory, TimelineId, Verdict, Verifier, WalDamage, Walk, Walker, WalkerStart,
    verify_segment,
};

use crate::waldump;

/// The segments of one major, in order, with what is known about them.
pub(crate) struct Golden {
    pub(crate) major: Major,
    pub(crate) size: SegmentSize,
    pub(crate) segments: Vec<(SegmentName, Vec<u8>)>,
    /// First word of a line to the words behind it, in order.
    facts: Vec<(String, Vec<String>)>,
    /// Missing for the majors whose `pg_waldump` was not at hand.
    waldump: Option<String>,
}

impl Golden {
    /// The segments of the first timeline.
    pub(crate) fn read(major: Major) -> Self {
        Self::read_timeline(major, 1)
    }

    fn read_timeline(major: Major, timeline: u32) -> Self {
        let folder = folder().join(major.to_string());
        let mut names: Vec<PathBuf> = std::fs::read_dir(&folder)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect();
        names.sort();
        let segment = |path: &PathBuf| {
            let name = path.file_name()?.to_str()?.strip_suffix(".zst")?;
            let name: SegmentName = name.parse().ok()?;
            (name.timeline.get() == timeline).then(|| (name, decompress(path)))
        };
        let segments: Vec<_> = names.iter().filter_map(segment).collect();
        let least = if timeline == 1 { 5 } else { 1 };
        assert!(segments.len() >= least, "{major}: only {}", segments.len());
        let facts = std::fs::read_to_string(folder.join("facts")).unwrap();
        let words = |line: &str| {
            let mut words = line.split(' ').map(str::to_owned);
            (words.next().unwrap(), words.collect())
        };
        let suffix = if timeline == 1 { "" } else { "-2" };
        let waldump = folder.join(format!("waldump{suffix}.zst"));
        Self {
            major,
            size: SegmentHead::parse(&segments[0].1).unwrap().segment_size,
            segments,
            facts: facts.lines().map(words).collect(),
            waldump: waldump
                .exists()
                .then(|| String::from_utf8(decompress(&waldump)).unwrap()),
        }
    }

    pub(crate) fn start(&self) -> WalkerStart {
        let (name, _) = self.segments[0];
        WalkerStart {
            at: name.start(self.size).unwrap(),
            segment_size: self.size,
            major: None,
            timeline: name.timeline,
            system_id: Some(self.fact("system_id")[0].parse().unwrap()),
            skip_to: None,
        }
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.segments
            .iter()
            .flat_map(|(_, bytes)| bytes.iter().copied())
            .collect()
    }

    pub(crate) fn fact(&self, key: &str) -> &[String] {
        &self.facts.iter().find(|(word, _)| word == key).unwrap().1
    }

    fn records(&self) -> Vec<Record> {
        let mut walker = Walker::new(self.start());
        let mut records = Vec::new();
        for (_, bytes) in &self.segments {
            walker.push(bytes);
            for record in walker.records() {
                match record {
                    Ok(record) => records.push(record),
                    // behind the newest record of a file that was used before
                    Err(WalDamage::PageAddress { at, found }) if found < at => return records,
                    Err(damage) => panic!("{}: {damage}", self.major),
                }
            }
        }
        records
    }

    pub(crate) fn bodies(&self) -> Vec<(Record, Body)> {
        let records = self.records().into_iter();
        let body = |record: &Record| record.body(self.major).unwrap();
        records
            .map(|record| (record.clone(), body(&record)))
            .collect()
    }
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

fn decompress(path: &Path) -> Vec<u8> {
    zstd::decode_all(std::fs::read(path).unwrap().as_slice()).unwrap()
}

/// A record that is read wrongly here is a commit that a restore places wrongly.
#[test]
fn finds_the_records_that_pg_waldump_finds() {
    let mut judged = 0;
    for (major, timeline) in Major::ALL
        .into_iter()
        .flat_map(|major| [(major, 1), (major, 2)])
    {
        let golden = Golden::read_timeline(major, timeline);
        let Some(waldump) = &golden.waldump else {
            continue;
        };
        let records = golden.records();
        let lines: Vec<&str> = waldump.lines().collect();
        for (record, line) in records.iter().zip(&lines) {
            let words: Vec<&str> = line.splitn(6, ' ').collect();
            let at = |word: &str| word.parse::<Lsn>().unwrap();
            let number = |word: &str| word.parse::<u32>().unwrap();
            let header = &record.header;
            let found = (record.start, header.total_bytes, header.xid, header.prev);
            let expected = (
                at(words[0]),
                number(words[2]),
                number(words[3]),
                at(words[4]),
            );
            assert_eq!(found, expected, "{major}: {line}");
            assert_eq!(rmgr::name(header.rmgr), Some(words[1]), "{major}: {line}");
            if let Some(description) = words.get(5) {
                waldump::assert_says(&record.body(major).unwrap(), description, major);
            }
        }
        assert_eq!(records.len(), lines.len(), "{major}");
        judged += 1;
    }
    assert_eq!(
        judged, 10,
        "five majors have a pg_waldump, two timelines each"
    );
}

/// The first segment of a timeline begins with a copy of its parent's pages.
#[test]
fn follows_a_promotion() {
    for major in Major::ALL {
        let (parent, child) = (Golden::read(major), Golden::read_timeline(major, 2));
        let (name, bytes) = &child.segments[0];
        let file = std::fs::read(folder().join(major.to_string()).join("00000002.history"));
        let history = TimelineHistory::parse(name.timeline, &file.unwrap()).unwrap();
        let Reach::Until(fork) = history.reach(parent.start().timeline) else {
            panic!("{major}")
        };
        assert_eq!(history.timeline_at(fork), name.timeline);
        let copied = usize::try_from(child.size.offset_of(fork)).unwrap();
        let (_, last) = parent.segments.last().unwrap();
        assert_eq!(bytes[..copied], last[..copied], "{major}");

        let bodies = child.bodies();
        let ended = |body: &Body| {
            let (this, prev) = (Some(name.timeline), Some(parent.start().timeline));
            matches!(body, Body::EndOfRecovery { this_timeline, prev_timeline, .. }
                if (*this_timeline, *prev_timeline) == (this, prev))
        };
        let (record, _) = bodies.iter().find(|(_, body)| ended(body)).unwrap();
        assert_eq!(record.start, fork, "{major}");
        let promoted = child.fact("restore_point_2");
        let named =
            |body: &Body| matches!(body, Body::RestorePoint { name, .. } if *name == "promoted");
        let (record, _) = bodies.iter().find(|(_, body)| named(body)).unwrap();
        assert!(is_said(record.next, &promoted[1]), "{major}");

        // read as a segment of the parent, the pages of the child are damage
        let name = SegmentName {
            timeline: parent.start().timeline,
            ..*name
        };
        let report = verify_segment(name, child.size, None, bytes, |_| {}).unwrap();
        let second_page = name.start(child.size).unwrap().saturating_add(8192);
        if bytes[8192..].iter().any(|byte| *byte != 0) && bytes[8196] == 2 {
            let reason = report.checked.verdict();
            assert!(matches!(reason, Verdict::Unverified { from, .. } if from == second_page));
        }
    }
}

/// That a position that a server said is this one: it names the end of a page by the first byte
/// behind the header of the next.
fn is_said(position: Lsn, said: &str) -> bool {
    let said: Lsn = said.parse().unwrap();
    let header = said.bytes_since(position);
    said == position || (position.as_u64().is_multiple_of(8192) && [24, 40].contains(&header))
}

/// For the majors without a `pg_waldump`, and again for the others: what SQL said stands in the log.
#[test]
#[expect(clippy::too_many_lines, reason = "one arm for each kind of fact")]
fn agrees_with_what_the_server_said_over_sql() {
    for major in Major::ALL {
        let golden = Golden::read(major);
        let bodies = golden.bodies();
        let find = |wanted: &dyn Fn(&Body) -> bool| {
            bodies
                .iter()
                .find(|(_, body)| wanted(body))
                .map(|(record, _)| record)
        };
        let number = |text: &String| text.parse::<u32>().unwrap();
        let mut checked = HashMap::new();
        for (key, words) in &golden.facts {
            let holds = match key.as_str() {
                "commit" => {
                    let xid = number(&words[0]);
                    let end = &golden.fact("commit_end")[0];
                    find(&|body| matches!(body, Body::Commit(c) if c.xid == xid && !c.prepared))
                        .is_some_and(|record| is_said(record.next, end))
                }
                "abort" => {
                    let xid = number(&words[0]);
                    find(&|body| matches!(body, Body::Abort(a) if a.xid == xid)).is_some()
                }
                "commit_with_subxacts" => {
                    let xid = number(&words[0]);
                    let subxacts = [xid + 1, xid + 2];
                    find(
                        &|b| matches!(b, Body::Commit(c) if c.xid == xid && c.subxacts == subxacts),
                    )
                    .is_some()
                }
                "restore_point" => {
                    let name = words[0].as_str();
                    find(&|b| matches!(b, Body::RestorePoint { name: n, .. } if *n == name))
                        .is_some_and(|record| is_said(record.next, &words[1]))
                }
                "dropped_file" | "truncated_file" => {
                    let relation = number(&words[0]);
                    find(&|b| {
                        matches!(b, Body::Commit(c)
                            if c.drops.iter().any(|file| file.relation == relation))
                    })
                    .is_some()
                }
                "prepare_commit" | "prepare_abort" => {
                    let (name, number) = (words[0].as_str(), number(&words[1]));
                    let commits = key == "prepare_commit";
                    let prepared = find(
                        &|b| matches!(b, Body::Prepare { gid, xid, .. } if *gid == name && *xid == number),
                    );
                    let ended = find(&|b| match b {
                        Body::Commit(end) => commits && end.prepared && end.xid == number,
                        Body::Abort(end) => !commits && end.prepared && end.xid == number,
                        _ => false,
                    });
                    prepared.is_some() && ended.is_some()
                }
                "create_tablespace" => find(&|b| {
                    matches!(b, Body::CreateTablespace { oid, path }
                        if *oid == number(&words[0]) && *path == words[1].as_str())
                })
                .is_some(),
                "drop_tablespace" => find(&|b| {
                    *b == Body::DropTablespace {
                        oid: number(&words[0]),
                    }
                })
                .is_some(),
                "create_database" | "drop_database" => {
                    let (database, tablespace) = (number(&words[0]), number(&words[1]));
                    let wanted = if key == "create_database" {
                        Body::CreateDatabase {
                            database,
                            tablespace,
                        }
                    } else {
                        Body::DropDatabase {
                            database,
                            tablespaces: vec![tablespace],
                        }
                    };
                    find(&|b| *b == wanted).is_some()
                }
                "message_end" => bodies.iter().any(|(record, _)| {
                    is_said(record.end.align8(), &words[0]) && record.header.total_bytes > 2_400_000
                }),
                "max_connections" => find(&|b| {
                    matches!(
                        b,
                        Body::ParameterChange {
                            max_connections: 33,
                            ..
                        }
                    )
                })
                .is_some(),
                "switch_end" => bodies
                    .iter()
                    .any(|(record, body)| *body == Body::Switch && is_said(record.end, &words[0])),
                "overwritten_within" => {
                    let (from, to): (Lsn, Lsn) =
                        (words[0].parse().unwrap(), words[1].parse().unwrap());
                    find(&|b| {
                        matches!(b, Body::OverwriteContrecord { overwritten }
                            if from <= *overwritten && *overwritten < to)
                    })
                    .is_some_and(|record| record.start.as_u64() == to.as_u64() + 24)
                }
                "last" => bodies
                    .last()
                    .is_some_and(|(r, _)| r.next >= words[0].parse().unwrap()),
                "first" | "system_id" | "commit_end" | "message_start" | "restore_point_2" => {
                    continue;
                }
                other => panic!("unknown fact: {other}"),
            };
            assert!(holds, "{major}: {key} {words:?}");
            *checked.entry(key).or_insert(0) += 1;
        }
        let backup = find(&|b| matches!(b, Body::BackupEnd { .. })).unwrap();
        let Ok(Body::BackupEnd { start }) = backup.body(major) else {
            panic!("{major}")
        };
        assert!(golden.start().at < start && start < backup.start, "{major}");
        assert_eq!(checked.values().sum::<i32>(), 20, "{major}: {checked:?}");
    }
}

/// A stream cuts the log anywhere, and the walk must not depend on where.
#[test]
fn finds_the_same_records_however_the_bytes_arrive() {
    let golden = Golden::read(Major::V18);
    let bytes = golden.bytes();
    let whole = golden.records();
    for step in [1, 7, 8, 8191, 8192, 131_072] {
        // a byte at a time for one segment is enough
        let limit = if step < 8 { 1 << 20 } else { bytes.len() };
        let mut walker = Walker::new(golden.start());
        let mut records = Vec::new();
        for chunk in bytes[..limit].chunks(step) {
            walker.push(chunk);
            records.extend(walker.records().map_while(Result::ok));
        }
        assert_eq!(records, whole[..records.len()], "{step}");
        let expected = whole
            .iter()
            .filter(|r| r.end.bytes_since(golden.start().at) <= limit as u64);
        assert_eq!(records.len(), expected.count(), "{step}");
    }
}

#[test]
fn names_the_record_that_a_crash_cut() {
    for major in Major::ALL {
        let golden = Golden::read(major);
        let mut walker = Walker::new(golden.start());
        walker.push(&golden.bytes());
        let overwritten = loop {
            match walker.next() {
                Ok(Walk::Overwritten { start, resumed_at }) => break (start.unwrap(), resumed_at),
                Ok(Walk::Record(_)) => {}
                other => panic!("{major}: {other:?}"),
            }
        };
        assert_eq!(
            overwritten.1,
            golden.fact("overwritten_within")[1].parse().unwrap()
        );
        assert!(overwritten.0 < overwritten.1);
    }
}

/// Invariant 12: only a complete segment may supersede its pieces.
#[test]
fn tells_complete_segments_from_beginnings() {
    for major in Major::ALL {
        let golden = Golden::read(major);
        let last = golden.segments.len() - 1;
        let records = golden.records();
        for (index, (name, bytes)) in golden.segments.iter().enumerate() {
            let id = golden.start().system_id;
            let mut count = 0;
            let report = verify_segment(*name, golden.size, id, bytes, |_| count += 1).unwrap();
            let range = name.range(golden.size).unwrap();
            let checked = &report.checked;
            assert_eq!(checked.verdict(), Verdict::Verified, "{major}: {name}");
            if index == last {
                let end = records.last().unwrap().next;
                assert_eq!(
                    report.completeness,
                    Completeness::EndsAt(end),
                    "{major}: {name}"
                );
                assert_eq!(checked.range().end, end);
                assert_eq!(
                    u64::try_from(checked.bytes().len()).unwrap(),
                    end.bytes_since(range.start)
                );
                continue;
            }
            assert_eq!(checked.bytes(), bytes);
            let started = || records.iter().filter(|record| range.contains(record.start));
            let switch = started().find(|record| record.header.is_switch());
            let expected = match switch {
                Some(record) => Completeness::Switched { at: record.start },
                None => Completeness::Complete,
            };
            assert_eq!(report.completeness, expected, "{major}: {name}");
            let whole = || started().filter(|record| record.end <= range.end);
            assert_eq!(count, whole().count(), "{major}: {name}");
            assert_eq!(
                checked.first_record(),
                whole().next().map(|record| record.start)
            );
            assert_eq!(
                checked.last_record(),
                whole().next_back().map(|record| record.start)
            );
        }
    }
}

/// A standby that restored a piece filled up with zeros archives it under the segment's full name.
#[test]
fn a_segment_filled_up_with_zeros_is_never_complete() {
    let golden = Golden::read(Major::V17);
    let (name, bytes) = &golden.segments[0];
    let id = golden.start().system_id;
    let mut ends = Vec::new();
    verify_segment(*name, golden.size, id, bytes, |record| {
        ends.push(record.next);
    })
    .unwrap();
    let start = name.start(golden.size).unwrap();
    // amid a record that runs on into the next segment, the last page cannot be judged
    let last_page = bytes.len() - 8192;
    let places = [8191, 8192, 8200, 8216, 16_384, last_page];
    for cut in (0..last_page).step_by(9973).chain(places) {
        let mut padded = bytes.clone();
        padded[cut..].fill(0);
        if padded == *bytes {
            continue;
        }
        let at = start.saturating_add(cut as u64);
        let report = verify_segment(*name, golden.size, id, &padded, |_| {}).unwrap();
        // the cut can fall into zeros of its own, behind which one record more is whole
        let nonzero = padded
            .iter()
            .rposition(|byte| *byte != 0)
            .map_or(0, |last| last + 1);
        let Completeness::EndsAt(end) = report.completeness else {
            panic!("cut at {cut}: {report:?}");
        };
        let before = ends
            .iter()
            .copied()
            .filter(|end| *end <= at)
            .max()
            .unwrap_or(start);
        assert!(
            end >= before && end.bytes_since(start) <= nonzero as u64 + 8,
            "cut at {cut}: {end}"
        );
        assert!(end <= at.align8(), "cut at {cut}: {end}");
        assert_eq!(report.checked.range().end, end);
    }
}

/// Servers use files again, so that behind the newest record stand pages of an older segment, with
/// records whose checksums are right.
#[test]
fn pages_of_an_earlier_use_of_the_file_are_no_part_of_a_segment() {
    let golden = Golden::read(Major::V16);
    let (name, bytes) = &golden.segments[golden.segments.len() - 1];
    let (_, older) = &golden.segments[0];
    let id = golden.start().system_id;
    let clean = verify_segment(*name, golden.size, id, bytes, |_| {}).unwrap();
    let Completeness::EndsAt(end) = clean.completeness else {
        panic!("{clean:?}")
    };
    let used = usize::try_from(golden.size.offset_of(end)).unwrap();
    for page in [used.next_multiple_of(8192), 65_536] {
        let mut recycled = bytes.clone();
        recycled[page..].copy_from_slice(&older[page..]);
        let report = verify_segment(*name, golden.size, id, &recycled, |_| {}).unwrap();
        assert_eq!(report.completeness, Completeness::EndsAt(end));
        assert_eq!(report.checked, clean.checked);
    }
    // a record that was cut at the end of a page, and an older page behind it
    let (name, bytes) = &golden.segments[1];
    let mut recycled = bytes.clone();
    recycled[8192..].copy_from_slice(&older[8192..]);
    let report = verify_segment(*name, golden.size, id, &recycled, |_| {}).unwrap();
    assert_eq!(
        report.completeness,
        Completeness::EndsAt(name.start(golden.size).unwrap())
    );
    assert!(report.checked.range().is_empty());
}

#[test]
fn a_damaged_segment_is_kept_and_not_trusted() {
    let golden = Golden::read(Major::V15);
    let (name, bytes) = &golden.segments[0];
    let id = golden.start().system_id;
    let mut damaged = bytes.clone();
    damaged[200_000] ^= 0x10;
    let report = verify_segment(*name, golden.size, id, &damaged, |_| {}).unwrap();
    assert_eq!(report.completeness, Completeness::Unknown);
    assert_eq!(report.checked.bytes(), damaged);
    let Verdict::Unverified { from, .. } = report.checked.verdict() else {
        panic!("trusted")
    };
    let place = name.start(golden.size).unwrap().saturating_add(200_000);
    assert!(from <= place && place.bytes_since(from) < 8192, "{from}");
}

#[test]
fn a_segment_of_another_system_is_refused() {
    let golden = Golden::read(Major::V16);
    let (name, bytes) = &golden.segments[0];
    let found = verify_segment(*name, golden.size, Some(1), bytes, |_| {});
    assert!(matches!(
        found,
        Err(wal::SegmentError::System { expected: 1, .. })
    ));
    let other = SegmentSize::from_bytes(1 << 24).unwrap();
    let found = verify_segment(*name, other, None, bytes, |_| {});
    assert!(matches!(found, Err(wal::SegmentError::Length { .. })));
}

/// The stream goes on behind damage, and is trusted again from a later segment on.
#[test]
fn a_stream_is_trusted_again_behind_damage() {
    let golden = Golden::read(Major::V14);
    let start = golden.start();
    let mut bytes = golden.bytes();
    bytes[300_000] ^= 1;
    let segment_bytes = golden.size.bytes();
    let mut verifier = Verifier::new(start);
    for chunk in bytes[..4 << 20].chunks(100_000) {
        verifier.push(chunk);
    }
    let segment = |number: u64| {
        let from = start.at.saturating_add(number * segment_bytes);
        wal::WalRange::new(from, from.saturating_add(segment_bytes))
    };
    assert!(!verifier.verdict_for(segment(0)).is_verified());
    // the long message runs through the second segment and ends in the third
    assert!(!verifier.verdict_for(segment(1)).is_verified());
    assert!(!verifier.verdict_for(segment(2)).is_verified());
    assert!(verifier.verdict_for(segment(3)).is_verified());
    assert_eq!(verifier.damage(), None);
    let before = wal::WalRange::new(start.at, start.at.saturating_add(200_000));
    assert!(verifier.verdict_for(before).is_verified());
}

/// A server of a version to come: its bytes are kept, and nothing is made up about them.
#[test]
fn an_unknown_version_is_said_to_be_unknown() {
    let golden = Golden::read(Major::V19);
    let (name, bytes) = &golden.segments[0];
    let mut newer = bytes.clone();
    newer[..2].copy_from_slice(&0xD1FF_u16.to_le_bytes());
    let report = verify_segment(*name, golden.size, None, &newer, |_| {}).unwrap();
    let at = name.start(golden.size).unwrap();
    let reason = WalDamage::UnknownMagic { at, found: 0xD1FF };
    assert_eq!(
        report.checked.verdict(),
        Verdict::Unverified { from: at, reason }
    );
    assert_eq!(report.completeness, Completeness::Unknown);
    assert_eq!(SegmentHead::parse(&newer).unwrap().major, None);
}

/// What a piece says about its records must not depend on where the pieces were cut.
#[test]
fn pieces_know_their_records() {
    let golden = Golden::read(Major::V13);
    let start = golden.start();
    let bytes = golden.bytes();
    let records = golden.records();
    let mut verifier = Verifier::new(start);
    let mut from = 0;
    for (index, to) in [
        100,
        8192,
        20_000,
        20_040,
        300_000,
        1 << 20,
        2_000_000,
        4 << 20,
    ]
    .into_iter()
    .enumerate()
    {
        let returned = verifier.push(&bytes[from..to]);
        let at = |offset: usize| start.at.saturating_add(offset as u64);
        let range = wal::WalRange::new(at(from), at(to));
        let checked = verifier.check(range, &bytes[from..to]);
        assert_eq!(checked.verdict(), Verdict::Verified, "piece {index}");
        let whole = || records.iter().filter(|record| record.end <= range.end);
        let starting = || whole().filter(|record| range.contains(record.start));
        assert_eq!(
            checked.first_record(),
            starting().next().map(|r| r.start),
            "piece {index}"
        );
        assert_eq!(
            checked.last_record(),
            starting().next_back().map(|r| r.start),
            "piece {index}"
        );
        assert_eq!(
            returned.iter().map(|r| r.start).collect::<Vec<_>>(),
            whole()
                .filter(|r| r.end > range.start)
                .map(|r| r.start)
                .collect::<Vec<_>>(),
        );
        from = to;
    }
    let beyond = wal::WalRange::new(start.at, start.at.saturating_add(6 << 20));
    assert!(!verifier.verdict_for(beyond).is_verified());
    let missing = TimelineId::new(1)
        .map(|_| verifier.check(beyond, Vec::new()))
        .unwrap();
    assert!(!missing.verdict().is_verified());
}
