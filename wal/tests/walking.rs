//! Each shape of the log, and each way in which it can be wrong, one at a time.

use wal::{
    Lsn, Major, Record, SegmentSize, TimelineId, Verdict, Verifier, WalDamage, WalRange, Walk,
    Walker, WalkerStart,
};

use crate::synthetic::{SYSTEM_ID, Writer};

const PAGE: usize = 8192;
const SEGMENT: usize = 1 << 20;

fn writer() -> Writer {
    Writer::new(Major::V18, SegmentSize::from_bytes(1 << 20).unwrap())
}

/// A log whose records cross its first pages.
fn crossing() -> Writer {
    let mut writer = writer();
    for _ in 0..8 {
        writer.record(10, 0, &[3; 3000]);
    }
    writer
}

fn walk(start: WalkerStart, bytes: &[u8]) -> (Vec<Record>, Result<Walk, WalDamage>) {
    let mut walker = Walker::new(start);
    walker.push(bytes);
    let mut records = Vec::new();
    loop {
        match walker.next() {
            Ok(Walk::Record(record)) => records.push(record),
            Ok(Walk::Overwritten { .. }) => {}
            other => return (records, other),
        }
    }
}

/// What a walk over the crossing log says after `change`.
fn damage(change: impl FnOnce(&mut Vec<u8>)) -> WalDamage {
    let mut log = crossing();
    change(&mut log.bytes);
    let (_, end) = walk(log.walker_start(), &log.bytes);
    end.unwrap_err()
}

fn at(offset: usize) -> Lsn {
    Lsn::new((SEGMENT + offset) as u64)
}

fn put<const N: usize>(bytes: &mut [u8], offset: usize, new: [u8; N]) {
    bytes[offset..offset + N].copy_from_slice(&new);
}

#[test]
fn a_page_of_another_version_is_damage_amid_a_log() {
    let found = damage(|bytes| put(bytes, PAGE, 0xD116_u16.to_le_bytes()));
    let (expected, found_magic) = (0xD118, 0xD116);
    assert_eq!(
        found,
        WalDamage::PageMagic {
            at: at(PAGE),
            expected,
            found: found_magic
        }
    );
    let found = damage(|bytes| put(bytes, 0, 0xD1FF_u16.to_le_bytes()));
    assert_eq!(
        found,
        WalDamage::UnknownMagic {
            at: at(0),
            found: 0xD1FF
        }
    );
}

/// Bit 4 was `XLP_BKP_REMOVABLE` up to 18, and says since 19 that a record was given up.
#[test]
fn page_flags_are_read_by_version() {
    let found = damage(|bytes| put(bytes, PAGE + 2, 0x11_u16.to_le_bytes()));
    assert_eq!(
        found,
        WalDamage::PageFlags {
            at: at(PAGE),
            found: 0x11
        }
    );
    for major in Major::ALL {
        let mut log = Writer::new(major, SegmentSize::from_bytes(1 << 20).unwrap());
        log.record(10, 0, &[1; 30]);
        log.bytes[2] |= 0x4;
        let (records, end) = walk(log.walker_start(), &log.bytes);
        assert_eq!((records.len(), end), (1, Ok(Walk::NeedMore)), "{major}");
        log.bytes[2] |= 0x8;
        let (_, end) = walk(log.walker_start(), &log.bytes);
        assert_eq!(end.is_err(), major == Major::V19, "{major}");
    }
}

#[test]
fn a_page_says_where_it_belongs_and_to_whom() {
    let found = damage(|bytes| put(bytes, PAGE + 8, 0x2000_u64.to_le_bytes()));
    assert_eq!(
        found,
        WalDamage::PageAddress {
            at: at(PAGE),
            found: Lsn::new(0x2000)
        }
    );
    let found = damage(|bytes| put(bytes, 24, 5_u64.to_le_bytes()));
    assert_eq!(
        found,
        WalDamage::SystemId {
            at: at(0),
            expected: SYSTEM_ID,
            found: 5
        }
    );
    let found = damage(|bytes| put(bytes, 32, (1_u32 << 24).to_le_bytes()));
    let (expected, other) = (1 << 20, 1 << 24);
    assert_eq!(
        found,
        WalDamage::SegmentSize {
            at: at(0),
            expected,
            found: other
        }
    );
    let found = damage(|bytes| put(bytes, 36, 4096_u32.to_le_bytes()));
    assert_eq!(
        found,
        WalDamage::PageSize {
            at: at(0),
            found: 4096
        }
    );
}

#[test]
fn only_the_first_page_of_a_segment_has_the_long_header() {
    let found = damage(|bytes| put(bytes, PAGE + 2, 0x3_u16.to_le_bytes()));
    assert_eq!(
        found,
        WalDamage::HeaderKind {
            at: at(PAGE),
            expected_long: false
        }
    );
    let found = damage(|bytes| put(bytes, 2, 0_u16.to_le_bytes()));
    assert_eq!(
        found,
        WalDamage::HeaderKind {
            at: at(0),
            expected_long: true
        }
    );
}

/// In the segment in which a timeline began the pages of its parent come first.
#[test]
fn timelines_of_pages_rise_up_to_the_one_that_is_read() {
    let mut log = crossing();
    put(&mut log.bytes, PAGE + 4, 2_u32.to_le_bytes());
    put(&mut log.bytes, 2 * PAGE + 4, 2_u32.to_le_bytes());
    let child = WalkerStart {
        timeline: TimelineId::new(2).unwrap(),
        ..log.walker_start()
    };
    let (records, end) = walk(child, &log.bytes);
    assert_eq!((records.len(), end), (8, Ok(Walk::NeedMore)));

    let (_, end) = walk(log.walker_start(), &log.bytes);
    let foreign = WalDamage::PageTimeline {
        at: at(PAGE),
        least: 1,
        most: 1,
        found: 2,
    };
    assert_eq!(end, Err(foreign));

    put(&mut log.bytes, 2 * PAGE + 4, 1_u32.to_le_bytes());
    let (_, end) = walk(child, &log.bytes);
    let falling = WalDamage::PageTimeline {
        at: at(2 * PAGE),
        least: 2,
        most: 2,
        found: 1,
    };
    assert_eq!(end, Err(falling));
}

#[test]
fn a_record_is_continued_by_what_is_left_of_it() {
    let found = damage(|bytes| bytes[PAGE + 16] ^= 1);
    assert!(
        matches!(found, WalDamage::Continuation { at, expected, found }
        if at == Lsn::new((SEGMENT + PAGE) as u64) && found == expected ^ 1)
    );
    let found = damage(|bytes| put(bytes, PAGE + 2, 0_u16.to_le_bytes()));
    assert!(matches!(found, WalDamage::Continuation { found: 0, .. }));
}

#[test]
fn a_page_that_continues_nothing_is_damage() {
    let mut log = writer();
    // to the last byte of the page
    log.record(10, 0, &vec![1; PAGE - 40 - 24 - 5]);
    assert_eq!(log.bytes.len(), PAGE);
    log.record(10, 0, &[1; 10]);
    let (records, end) = walk(log.walker_start(), &log.bytes);
    assert_eq!((records.len(), end), (2, Ok(Walk::NeedMore)));
    assert_eq!((records[0].end, records[0].next), (at(PAGE), at(PAGE)));
    assert_eq!(records[1].start, at(PAGE + 24));
    put(&mut log.bytes, PAGE + 2, 1_u16.to_le_bytes());
    put(&mut log.bytes, PAGE + 16, 8_u32.to_le_bytes());
    let (_, end) = walk(log.walker_start(), &log.bytes);
    assert_eq!(
        end,
        Err(WalDamage::Continuation {
            at: at(PAGE),
            expected: 0,
            found: 8
        })
    );
}

/// The length stands on the page on which the record starts; the rest of the header may not.
#[test]
fn a_header_may_cross_a_page() {
    for left in [8, 16, 24] {
        let mut log = writer();
        log.record(10, 0, &vec![1; PAGE - 40 - 24 - 5 - left]);
        assert_eq!(PAGE - log.bytes.len(), left);
        log.record(10, 0, &[2; 10]);
        let (records, end) = walk(log.walker_start(), &log.bytes);
        assert_eq!((records.len(), end), (2, Ok(Walk::NeedMore)), "{left}");
        assert_eq!(records[1].start, at(PAGE - left));
    }
}

/// A recycled file can hold an older record with a right checksum exactly where one is expected.
#[test]
fn a_record_follows_the_one_before() {
    let (mut log, other) = (writer(), crossing());
    let start = log.record(10, 0, &[1; 30]);
    let next = log.bytes.len();
    let older = &other.bytes[40..40 + 3032];
    log.bytes.extend(older);
    let (records, end) = walk(log.walker_start(), &log.bytes);
    assert_eq!(records.len(), 1);
    let found = Lsn::new(SEGMENT as u64 - 8);
    assert_eq!(
        end,
        Err(WalDamage::PrevLink {
            at: at(next),
            expected: start,
            found
        })
    );
    let found = damage(|bytes| put(bytes, 48, u64::MAX.to_le_bytes()));
    assert_eq!(
        found,
        WalDamage::PrevAhead {
            at: at(40),
            found: Lsn::new(u64::MAX)
        }
    );
}

/// A length that is not one must not be awaited: the stream would stand still.
#[test]
fn an_impossible_length_is_damage_at_once() {
    for length in [1_u32, 23, 1 << 30, u32::MAX] {
        let found = damage(|bytes| put(bytes, 40, length.to_le_bytes()));
        assert_eq!(
            found,
            WalDamage::RecordLength {
                at: at(40),
                found: length
            }
        );
    }
    let found = damage(|bytes| bytes[100] ^= 1);
    assert!(matches!(found, WalDamage::RecordChecksum { at: place, .. } if place == at(40)));
}

#[test]
fn zeros_are_an_end_and_no_damage() {
    let mut log = crossing();
    let end = log.at();
    log.bytes.resize(SEGMENT, 0);
    let (records, found) = walk(log.walker_start(), &log.bytes);
    assert_eq!((records.len(), found), (8, Ok(Walk::End { at: end })));
    // within the record that crosses into the second page
    let cut = log
        .records
        .iter()
        .find(|(_, end)| *end > at(PAGE))
        .unwrap()
        .0;
    log.bytes[PAGE..].fill(0);
    let (_, found) = walk(log.walker_start(), &log.bytes);
    assert_eq!(found, Ok(Walk::End { at: cut }));
}

#[test]
fn a_switch_leaves_the_rest_of_its_segment_empty() {
    let mut log = writer();
    log.record(10, 0, &[1; 30]);
    let switch = log.switch();
    log.record(10, 0, &[2; 30]);
    let (records, end) = walk(log.walker_start(), &log.bytes);
    assert_eq!((records.len(), end), (3, Ok(Walk::NeedMore)));
    assert_eq!((records[1].start, records[1].next), (switch, at(SEGMENT)));
    assert_eq!(records[2].header.prev, switch);

    // page headers on the empty pages, as older servers left them
    let header = log.bytes[..24].to_vec();
    let mut headed = log.bytes.clone();
    for page in (PAGE..SEGMENT).step_by(PAGE) {
        headed[page..page + 24].copy_from_slice(&header);
        put(&mut headed, page + 2, 0_u16.to_le_bytes());
        put(&mut headed, page + 8, at(page).as_u64().to_le_bytes());
    }
    let (records, end) = walk(log.walker_start(), &headed);
    assert_eq!((records.len(), end), (3, Ok(Walk::NeedMore)));

    log.bytes[5 * PAGE + 100] = 1;
    let (records, end) = walk(log.walker_start(), &log.bytes);
    assert_eq!(records.len(), 2);
    assert!(
        matches!(end, Err(WalDamage::AfterSwitch { at: place }) if place <= at(5 * PAGE + 100))
    );
}

/// What the server gave up must not be taken for the beginning of what it wrote later.
#[test]
fn a_given_up_record_is_acknowledged_by_the_next() {
    let mut log = writer();
    log.record(10, 0, &[1; 30]);
    let given_up = log.give_up(20_000);
    let mut walker = Walker::new(log.walker_start());
    walker.push(&log.bytes);
    assert!(matches!(walker.next(), Ok(Walk::Record(_))));
    let resumed_at = at(PAGE);
    assert_eq!(
        walker.next(),
        Ok(Walk::Overwritten {
            start: Some(given_up),
            resumed_at
        })
    );
    assert!(matches!(walker.next(), Ok(Walk::Record(record)) if record.header.is_overwrite()));

    // a walk that begins behind its start cannot know where that was
    let mut log = writer();
    log.record(10, 0, &vec![1; SEGMENT + 100]);
    log.give_up(20_000);
    let start = WalkerStart {
        at: at(SEGMENT),
        ..log.walker_start()
    };
    let (records, end) = walk(start, &log.bytes[SEGMENT..]);
    assert_eq!((records.len(), end), (1, Ok(Walk::NeedMore)));

    let mut log = writer();
    let start = log.give_up(20_000);
    let page = log.bytes.split_off(PAGE);
    let mut other = writer();
    other.record(10, 0, &vec![9; 8000]);
    other.give_up(20_000);
    log.bytes.extend(page);
    // the acknowledgement names another record
    let data = PAGE + 24 + 24 + 2;
    let named = other.records[0].1.as_u64();
    put(&mut log.bytes, data, named.to_le_bytes());
    let body = log.bytes[PAGE + 48..PAGE + 48 + 18].to_vec();
    let head = log.bytes[PAGE + 24..PAGE + 44].to_vec();
    let crc = crc32c::crc32c_append(crc32c::crc32c(&body), &head);
    put(&mut log.bytes, PAGE + 44, crc.to_le_bytes());
    let (_, end) = walk(log.walker_start(), &log.bytes);
    assert_eq!(
        end,
        Err(WalDamage::NotOverwritten {
            at: at(PAGE + 24),
            expected: start
        })
    );
}

#[test]
fn a_walk_can_start_at_any_page_or_record() {
    let log = crossing();
    let at_page = WalkerStart {
        at: at(PAGE),
        ..log.walker_start()
    };
    let (from_page, _) = walk(at_page, &log.bytes[PAGE..]);
    let first = log
        .records
        .iter()
        .position(|(start, _)| *start > at(PAGE))
        .unwrap();
    assert_eq!(from_page[0].start, log.records[first].0);
    let mut walker = Walker::new(at_page);
    walker.push(&log.bytes[PAGE..]);
    assert_eq!(walker.unfinished_record(), None);
    assert!(walker.records().all(|record| record.is_ok()));
    assert!(walker.skipped_bytes() > 0);

    let (start, _) = log.records[2];
    let offset = usize::try_from(start.bytes_since(log.start)).unwrap();
    let at_record = WalkerStart {
        at: start,
        major: Some(Major::V18),
        ..log.walker_start()
    };
    let (from_record, end) = walk(at_record, &log.bytes[offset..]);
    assert_eq!((from_record.len(), end), (6, Ok(Walk::NeedMore)));

    let skipping = WalkerStart {
        skip_to: Some(start),
        ..log.walker_start()
    };
    let (reported, _) = walk(skipping, &log.bytes);
    assert_eq!(reported, from_record);
}

/// The bytes of a damaged stretch are stored, and nothing of it is called verified.
#[test]
fn a_verifier_trusts_up_to_the_damage_and_from_a_later_segment() {
    let mut log = writer();
    while log.bytes.len() < 3 * SEGMENT {
        log.record(10, 0, &[3; 3000]);
    }
    log.bytes[100_000] ^= 1;
    let mut verifier = Verifier::new(log.walker_start());
    verifier.push(&log.bytes[..SEGMENT / 2]);
    let damage = verifier.damage().unwrap();
    let checked = verifier.check(WalRange::new(at(0), at(150_000)), &log.bytes[..150_000]);
    let from = damage.at();
    assert!(from <= at(100_000));
    assert_eq!(
        checked.verdict(),
        Verdict::Unverified {
            from,
            reason: damage
        }
    );
    assert_eq!(checked.whole_records_end(), Some(from));
    let behind = WalRange::new(at(150_000), at(160_000));
    let expected = Verdict::Unverified {
        from: at(150_000),
        reason: damage,
    };
    assert_eq!(verifier.verdict_for(behind), expected);

    verifier.push(&log.bytes[SEGMENT / 2..]);
    assert_eq!(verifier.damage(), None);
    let second = WalRange::new(at(SEGMENT), at(2 * SEGMENT));
    // the record that runs into the second segment began in the damaged one
    assert!(
        matches!(verifier.verdict_for(second), Verdict::Unverified { from, .. } if from == second.start)
    );
    let third = WalRange::new(at(2 * SEGMENT), at(3 * SEGMENT));
    assert_eq!(verifier.verdict_for(third), Verdict::Verified);
    let before = WalRange::new(at(0), from);
    assert_eq!(verifier.verdict_for(before), Verdict::Verified);
}

/// Bytes that were never pushed must not borrow the verdict of others.
#[test]
fn a_verifier_answers_only_for_what_it_saw() {
    let log = crossing();
    let mut verifier = Verifier::new(log.walker_start());
    verifier.push(&log.bytes[..10_000]);
    let beyond = WalRange::new(at(0), at(10_001));
    let reason = WalDamage::NotSeen { at: at(10_000) };
    assert_eq!(
        verifier.verdict_for(beyond),
        Verdict::Unverified {
            from: at(10_000),
            reason
        }
    );
    let short = verifier.check(WalRange::new(at(0), at(10_000)), &log.bytes[..9_999]);
    assert!(!short.verdict().is_verified());
    let ahead = WalRange::new(Lsn::ZERO, at(10));
    assert!(!verifier.verdict_for(ahead).is_verified());
}
