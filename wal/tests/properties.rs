//! What holds for any log, and for any damage to it. `PROPTEST_CASES` sets how many are tried.

use proptest::prelude::*;
use wal::{
    Completeness, Lsn, Major, Record, SegmentName, SegmentSize, Segmenter, Verdict, Verifier,
    WalDamage, WalRange, Walk, Walker, verify_segment,
};

use crate::synthetic::{SYSTEM_ID, Writer};

/// One step of a server that writes.
#[derive(Clone, Debug)]
enum Step {
    Record(usize),
    Switch,
    GiveUp(usize),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        20 => (0..300_usize).prop_map(Step::Record),
        6 => (0..40_000_usize).prop_map(Step::Record),
        1 => (1_000_000..2_500_000_usize).prop_map(Step::Record),
        1 => Just(Step::Switch),
        1 => (9000..50_000_usize).prop_map(Step::GiveUp),
    ]
}

fn major() -> impl Strategy<Value = Major> {
    prop::sample::select(Major::ALL.to_vec())
}

fn size() -> SegmentSize {
    SegmentSize::from_bytes(1 << 20).unwrap()
}

fn write(major: Major, steps: &[Step]) -> Writer {
    let mut writer = Writer::new(major, size());
    for (index, step) in steps.iter().enumerate() {
        match step {
            Step::Record(bytes) => {
                let byte = u8::try_from(index % 251).unwrap();
                writer.record(10, 0, &vec![byte; *bytes]);
            }
            Step::Switch => {
                writer.switch();
            }
            Step::GiveUp(bytes) => {
                writer.give_up(*bytes);
            }
        }
    }
    writer
}

fn log() -> impl Strategy<Value = Writer> {
    (major(), prop::collection::vec(step(), 1..60)).prop_map(|(major, steps)| write(major, &steps))
}

/// All records up to where more is needed, the end, or damage, which is returned.
fn walk(walker: &mut Walker) -> (Vec<Record>, Option<WalDamage>) {
    let mut records = Vec::new();
    for record in walker.records() {
        match record {
            Ok(record) => records.push(record),
            Err(damage) => return (records, Some(damage)),
        }
    }
    (records, None)
}

fn places(records: &[Record]) -> Vec<(Lsn, Lsn)> {
    records
        .iter()
        .map(|record| (record.start, record.end))
        .collect()
}

impl std::fmt::Debug for Writer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} records of {}, {} bytes",
            self.records.len(),
            self.major,
            self.bytes.len()
        )
    }
}

proptest! {
    #[test]
    fn every_record_is_found_however_the_bytes_arrive(
        log in log(),
        cuts in prop::collection::vec(1..200_000_usize, 1..20),
    ) {
        let mut walker = Walker::new(log.walker_start());
        let mut found = Vec::new();
        let mut rest = log.bytes.as_slice();
        for cut in cuts.iter().cycle() {
            if rest.is_empty() {
                break;
            }
            let (chunk, after) = rest.split_at((*cut).min(rest.len()));
            walker.push(chunk);
            let (records, damage) = walk(&mut walker);
            prop_assert_eq!(damage, None);
            found.extend(records);
            rest = after;
        }
        prop_assert_eq!(&places(&found), &log.records);
        prop_assert_eq!(walker.whole_records_end(), Some(log.at()));
        prop_assert_eq!(walker.next(), Ok(Walk::NeedMore));
    }

    /// Damage may hide what follows it, and never changes what came before.
    #[test]
    fn a_changed_bit_is_found_or_harmless(
        log in log(),
        place in any::<prop::sample::Index>(),
        bit in 0..8_u32,
    ) {
        let mut bytes = log.bytes.clone();
        let index = place.index(bytes.len());
        bytes[index] ^= 1 << bit;
        let mut walker = Walker::new(log.walker_start());
        walker.push(&bytes);
        let (found, damage) = walk(&mut walker);
        let at = log.start.saturating_add(index as u64);
        let places = places(&found);
        prop_assert_eq!(&places[..], &log.records[..places.len()]);
        if let Some(damage) = damage {
            prop_assert!(damage.at() <= at.saturating_add(8192), "{} at {}", damage, at);
        }
        // only padding, the end of a page header, and a record that was given up can change unseen
        let in_a_record = log.records.iter().any(|(start, end)| *start <= at && at < *end);
        let offset = index % 8192;
        let in_padding = offset < 40;
        if in_a_record && !in_padding {
            prop_assert!(places.len() < log.records.len());
        }
    }

    #[test]
    fn any_bytes_are_walked_without_a_panic(
        major in major(),
        mut bytes in prop::collection::vec(any::<u8>(), 0..20_000),
        headed in any::<bool>(),
    ) {
        let writer = write(major, &[Step::Record(10)]);
        if headed && bytes.len() >= 40 {
            bytes[..40].copy_from_slice(&writer.bytes[..40]);
        }
        let mut verifier = Verifier::new(writer.walker_start());
        verifier.push(&bytes);
        prop_assert_eq!(verifier.position(), writer.start.saturating_add(bytes.len() as u64));
    }

    /// Invariant 12, on every shape of segment.
    #[test]
    fn only_segments_that_were_written_to_the_end_are_complete(log in log()) {
        let mut bytes = log.bytes.clone();
        bytes.resize(bytes.len().next_multiple_of(1 << 20), 0);
        let end = log.at();
        for stretch in Segmenter::new(size()).cut(log.start, &bytes) {
            let timeline = log.walker_start().timeline;
            let name = SegmentName::of(timeline, stretch.segment_start, size());
            let report = verify_segment(name, size(), Some(SYSTEM_ID), stretch.bytes, |_| {}).unwrap();
            prop_assert_eq!(report.checked.verdict(), Verdict::Verified);
            match report.completeness {
                Completeness::Complete => prop_assert!(end >= stretch.range.end),
                Completeness::Switched { at } => {
                    prop_assert!(stretch.range.contains(at) && end >= stretch.range.end);
                }
                Completeness::EndsAt(at) => prop_assert_eq!(at, end),
                Completeness::Unknown => prop_assert!(false, "{:?}", report),
            }
        }
    }

    /// Pieces of a stream cover it, and each says what is in it.
    #[test]
    fn pieces_of_a_stream_add_up(log in log(), cut in 1..300_000_usize) {
        let mut verifier = Verifier::new(log.walker_start());
        let mut from = log.start;
        let mut starts = 0;
        for chunk in log.bytes.chunks(cut) {
            starts += verifier.push(chunk).len();
            let range = WalRange::new(from, from.saturating_add(chunk.len() as u64));
            let checked = verifier.check(range, chunk);
            prop_assert_eq!(checked.verdict(), Verdict::Verified);
            let whole = log.records.iter().filter(|(_, end)| *end <= range.end);
            let inside = || whole.clone().filter(|(start, _)| range.contains(*start));
            prop_assert_eq!(checked.first_record(), inside().next().map(|(start, _)| *start));
            prop_assert_eq!(checked.last_record(), inside().next_back().map(|(start, _)| *start));
            from = range.end;
        }
        prop_assert_eq!(starts, log.records.len());
    }
}
