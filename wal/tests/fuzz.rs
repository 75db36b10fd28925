//! Every parser over its corpus, and over seeded mutations of it.
//!
//! `ANYWHEN_FUZZ_SECONDS` is how long each target is tried (1 unless set), `ANYWHEN_FUZZ_SEED`
//! repeats a run. An input that fails is written next to the build's other temporary files, and
//! belongs into `corpus/<target>/` once its cause is found.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::{Duration, Instant};

use wal::page::PageHeader;
use wal::record::{RecordHeader, rmgr};
use wal::{
    Body, Lsn, Major, Record, SegmentHead, SegmentName, SegmentSize, TimelineHistory, TimelineId,
    WalDamage, WalFileName, Walk, Walker, WalkerStart, verify_segment,
};

use crate::synthetic::{SYSTEM_ID, Writer};

const SEGMENT_BYTES: usize = 1 << 20;

fn size() -> SegmentSize {
    SegmentSize::from_bytes(1 << 20).unwrap()
}

fn timeline() -> TimelineId {
    TimelineId::new(1).unwrap()
}

/// The first byte says how long the pushes are; whatever comes, the walk goes on only forward.
fn walker(input: &[u8]) {
    let Some((step, log)) = input.split_first() else {
        return;
    };
    let mut walker = Walker::new(WalkerStart {
        at: Lsn::new(1 << 20),
        segment_size: size(),
        major: None,
        timeline: timeline(),
        system_id: None,
        skip_to: None,
    });
    let mut last = Lsn::ZERO;
    for chunk in log.chunks(usize::from(*step) * 16 + 1) {
        walker.push(chunk);
        loop {
            match walker.next() {
                Ok(Walk::Record(record)) => {
                    assert!(record.start > last && record.end > record.start);
                    assert!(record.next >= record.end && record.main_data.len() <= log.len());
                    last = record.start;
                }
                Ok(Walk::Overwritten { resumed_at, .. }) => assert!(resumed_at >= last),
                Ok(Walk::NeedMore | Walk::End { .. }) | Err(_) => break,
            }
        }
        assert!(walker.position() <= Lsn::new((1 << 20) + log.len() as u64));
    }
}

/// The first byte says the version; the rest is a record behind its header, with a right checksum.
fn record(input: &[u8]) {
    let Some((major, parts)) = input.split_first() else {
        return;
    };
    let major = Major::ALL[usize::from(*major) % Major::ALL.len()];
    let mut writer = Writer::new(major, size());
    writer.raw_record(10, 0, parts);
    let mut walker = Walker::new(writer.walker_start());
    walker.push(&writer.bytes);
    match walker.next() {
        Ok(Walk::Record(record)) => assert!(parts.ends_with(&record.main_data)),
        Err(WalDamage::RecordLayout { .. }) => {}
        other => panic!("{other:?}"),
    }
}

fn page(input: &[u8]) {
    if let Ok((header, rest)) = PageHeader::parse(input) {
        assert!(rest.len() + 24 <= input.len());
        assert_eq!(header.long.is_some(), input.len() - rest.len() == 40);
    }
    if let Ok(head) = SegmentHead::parse(input) {
        assert_eq!(head.segment_size.offset_of(head.start), 0);
    }
}

fn history(input: &[u8]) {
    let timeline = TimelineId::new(1000).unwrap();
    let Ok(history) = TimelineHistory::parse(timeline, input) else {
        return;
    };
    let mut end = Some(Lsn::ZERO);
    for part in history.parts() {
        assert_eq!(Some(part.start), end);
        assert_eq!(history.timeline_at(part.start), part.timeline);
        end = part.end;
    }
    assert_eq!(end, None);
}

fn file_name(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else {
        return;
    };
    let Ok(name) = text.parse::<WalFileName>() else {
        return;
    };
    assert_eq!(name.to_string(), text);
    assert!(
        text.bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'.')
    );
    assert!(!text.contains(".."));
}

/// Two bytes choose the record, one the version.
fn body(input: &[u8]) {
    let [rmgr, info, major, main_data @ ..] = input else {
        return;
    };
    let majors = Major::ALL.len();
    let record = Record {
        start: Lsn::new(1 << 20),
        end: Lsn::new(2 << 20),
        next: Lsn::new(2 << 20),
        header: RecordHeader {
            total_bytes: 24,
            xid: 1,
            prev: Lsn::ZERO,
            info: *info,
            rmgr: *rmgr % 8,
            crc: 0,
        },
        main_data: main_data.to_vec(),
    };
    let found = record.body(Major::ALL[usize::from(*major) % majors]);
    if let Ok(Body::Commit(end) | Body::Abort(end)) = found {
        assert!(end.subxacts.len() * 4 + end.drops.len() * 12 <= main_data.len());
    }
}

/// The input stands at the front of a segment whose rest is zeros.
fn segment(input: &[u8]) {
    let name = SegmentName::of(timeline(), Lsn::new(1 << 20), size());
    let mut bytes = input.to_vec();
    bytes.resize(SEGMENT_BYTES, 0);
    let Ok(report) = verify_segment(name, size(), Some(SYSTEM_ID), bytes, |_| {}) else {
        return;
    };
    let range = report.checked.range();
    assert!(range.len_bytes() <= SEGMENT_BYTES as u64);
    assert_eq!(report.checked.bytes().len() as u64, range.len_bytes());
    if let Some(end) = report.checked.whole_records_end() {
        assert!(end >= range.start);
    }
}

#[test]
fn walker_survives() {
    let mut seeds = Vec::new();
    for major in Major::ALL {
        let mut writer = Writer::new(major, size());
        for bytes in [0, 1, 200, 300, 9000, 30] {
            writer.record(10, 0, &vec![1; bytes]);
        }
        writer.give_up(10_000);
        writer.record(10, 0, &[5; 50]);
        seeds.push([&[255], writer.bytes.as_slice()].concat());
    }
    fuzz("walker", walker, &seeds);
}

#[test]
fn record_survives() {
    // a block with an image that has a hole and is compressed, a block of the same relation, an
    // origin, a top transaction, main data
    let blocks = [
        &[0, 0x30, 2, 0, 3, 0, 0, 0, 5, 9, 0][..],
        &[1; 12],
        &[7, 0, 0, 0],
        &[1, 0xA0, 1, 0, 8, 0, 0, 0],
        &[253, 1, 0],
        &[252, 1, 0, 0, 0],
        &[255, 3],
        &[1; 3 + 2 + 1 + 3],
    ]
    .concat();
    let seeds: Vec<_> = (0..7)
        .map(|major| [&[major], blocks.as_slice()].concat())
        .collect();
    record(&seeds[5]);
    fuzz("record", record, &seeds);
}

#[test]
fn page_survives() {
    let mut writer = Writer::new(Major::V18, size());
    writer.record(10, 0, &[]);
    fuzz("page", page, &[writer.bytes]);
}

#[test]
fn history_survives() {
    fuzz("history", history, &[]);
}

#[test]
fn file_name_survives() {
    fuzz("file_name", file_name, &[]);
}

#[test]
fn body_survives() {
    let mut seeds = Vec::new();
    for major in 0..7 {
        for info in [0x00, 0x10, 0x20, 0x30, 0x40, 0x80, 0xA0, 0xB0] {
            for rmgr in [
                rmgr::XLOG,
                rmgr::XACT,
                rmgr::SMGR,
                rmgr::DBASE,
                rmgr::TBLSPC,
            ] {
                seeds.push([&[rmgr, info, major], [1; 90].as_slice()].concat());
            }
        }
    }
    fuzz("body", body, &seeds);
}

#[test]
fn segment_survives() {
    let mut writer = Writer::new(Major::V18, size());
    writer.record(10, 0, &[1; 300]);
    let mut switched = writer.bytes.clone();
    writer.switch();
    switched.extend(&writer.bytes[switched.len()..switched.len() + 24]);
    fuzz(
        "segment",
        segment,
        &[writer.bytes[..2000].to_vec(), switched],
    );
}

/// Tries `target` on its corpus and `seeds`, then on mutations of them until time is up.
fn fuzz(name: &str, target: fn(&[u8]), seeds: &[Vec<u8>]) {
    let mut inputs = seeds.to_vec();
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/corpus")
        .join(name);
    for entry in std::fs::read_dir(&corpus).unwrap() {
        inputs.push(std::fs::read(entry.unwrap().path()).unwrap());
    }
    assert!(inputs.len() > seeds.len(), "no corpus for {name}");
    let set = |key: &str| {
        std::env::var(key)
            .ok()
            .map(|text| text.parse::<u64>().unwrap())
    };
    let seed =
        set("ANYWHEN_FUZZ_SEED").unwrap_or_else(|| RandomState::new().build_hasher().finish());
    let time = Duration::from_secs(set("ANYWHEN_FUZZ_SECONDS").unwrap_or(1));
    let try_one = |input: &[u8], number: u64| {
        if catch_unwind(AssertUnwindSafe(|| target(input))).is_err() {
            let kept =
                Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}-{seed}-{number}"));
            std::fs::write(&kept, input).unwrap();
            panic!(
                "{name}: ANYWHEN_FUZZ_SEED={seed} fails at {number}, see {}",
                kept.display()
            );
        }
    };
    for input in &inputs {
        try_one(input, 0);
    }
    let mut random = Random(seed | 1);
    let began = Instant::now();
    let mut number = 0;
    while began.elapsed() < time {
        number += 1;
        let input = mutate(&inputs, &mut random);
        try_one(&input, number);
    }
    eprintln!("{name}: {number} inputs, ANYWHEN_FUZZ_SEED={seed}");
}

fn mutate(inputs: &[Vec<u8>], random: &mut Random) -> Vec<u8> {
    let mut input = inputs[random.below(inputs.len())].clone();
    for _ in 0..=random.below(6) {
        let length = input.len();
        let place = random.below(length.max(1));
        match random.below(7) {
            0 if length > 0 => input[place] ^= 1 << random.below(8),
            1 if length > 0 => input[place] = [0, 1, 0x7F, 0x80, 0xFF][random.below(5)],
            2 => input.insert(place.min(length), random.byte()),
            3 => input.truncate(place),
            4 if length > 8 => {
                let from = random.below(length - 8);
                input.copy_within(from..from + 8, place.min(length - 8));
            }
            5 => {
                let other = &inputs[random.below(inputs.len())];
                let from = random.below(other.len().max(1));
                input.extend(&other[from.min(other.len())..]);
                input.truncate(1 << 16);
            }
            _ if length > 4 => {
                let place = place.min(length - 4);
                for byte in &mut input[place..place + 4] {
                    *byte = random.byte();
                }
            }
            _ => input.push(random.byte()),
        }
    }
    input
}

/// xorshift64*
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % limit as u64).unwrap()
    }

    fn byte(&mut self) -> u8 {
        self.next().to_le_bytes()[7]
    }
}
