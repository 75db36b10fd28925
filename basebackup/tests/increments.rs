//! Increments of real servers, put together as `pg_combinebackup` does.

use std::collections::BTreeMap;

use basebackup::incremental::IncrementError::{
    Beyond, Length, Magic, Order, Padding, TooManyBlocks,
};
use basebackup::incremental::{Header, HeaderParser, IncrementError, MAGIC, Source, plain_name};
use basebackup::{BackupLabel, BlockLayout, RelativePath, TarEvent, TarParser};
use proptest::prelude::*;
use wal::Major;

use crate::golden;

const USUAL: BlockLayout = BlockLayout::USUAL;

/// The files of a recording by their paths.
fn files(major: Major) -> BTreeMap<String, Vec<u8>> {
    let archive = golden(major, "increment.tar.zst");
    let mut files = BTreeMap::new();
    let mut rest = archive.as_slice();
    let mut parser = TarParser::new();
    let mut path = String::new();
    while let Some(event) = parser.next_event(&mut rest).unwrap() {
        match event {
            TarEvent::File { path: name, .. } => {
                path = name.to_string();
                files.insert(path.clone(), Vec::new());
            }
            TarEvent::FileData(bytes) => files.get_mut(&path).unwrap().extend_from_slice(bytes),
            _ => {}
        }
    }
    files
}

fn path(text: &str) -> RelativePath {
    RelativePath::parse(text.as_bytes()).unwrap()
}

/// The header of a whole increment in stretches of this length, and its blocks.
pub(crate) fn read(
    increment: &[u8],
    layout: BlockLayout,
    cut: usize,
) -> Result<(Header, Vec<u8>), IncrementError> {
    let mut parser = HeaderParser::new(layout, increment.len() as u64)?;
    let mut header = None;
    let mut blocks = Vec::new();
    for stretch in increment.chunks(cut) {
        let mut rest = stretch;
        if header.is_none() {
            header = parser.push(&mut rest)?;
        }
        assert!(header.is_some() || rest.is_empty());
        blocks.extend_from_slice(rest);
    }
    Ok((header.expect("its length was checked"), blocks))
}

/// The file that `increment` makes of the one before.
fn rebuilt(before: &[u8], increment: &[u8]) -> Vec<u8> {
    let (header, sent) = read(increment, USUAL, 1000).unwrap();
    let before_blocks = USUAL.whole_blocks(before.len() as u64);
    let block = |of: &[u8], at: usize| of[at * 8192..(at + 1) * 8192].to_vec();
    let blocks =
        (0..header.rebuilt_blocks()).map(|number| match header.source(number, before_blocks) {
            Source::Sent(place) => block(&sent, place),
            Source::Before => block(before, number as usize),
            Source::Zero => vec![0; 8192],
        });
    blocks.collect::<Vec<_>>().concat()
}

/// A file put together wrong is a wrong restore that starts.
#[test]
fn puts_files_together_as_pg_combinebackup_does() {
    for major in [Major::V17, Major::V18, Major::V19] {
        let files = files(major);
        let (mut empty, mut shorter, mut longer, mut some) = (0, 0, 0, 0);
        for (name, increment) in &files {
            let Some(name) = name.strip_prefix("increment/").map(path) else {
                continue;
            };
            let Some(plain) = plain_name(&name) else {
                assert!(!name.to_string().contains("INCREMENTAL"), "{name}");
                continue;
            };
            let before = &files[&format!("before/{plain}")];
            let after = &files[&format!("after/{plain}")];
            assert!(rebuilt(before, increment) == *after, "{major}: {plain}");
            empty += usize::from(increment.len() == 12);
            some += usize::from(increment.len() > 12);
            shorter += usize::from(after.len() < before.len());
            longer += usize::from(after.len() > before.len());
        }
        // the recording has every kind, or it proves little
        assert!(
            empty >= 6 && some >= 4 && shorter >= 2 && longer >= 2,
            "{major}: {empty} {some} {shorter} {longer}"
        );
    }
}

#[test]
fn makes_the_label_that_pg_combinebackup_makes() {
    for major in [Major::V17, Major::V18, Major::V19] {
        let files = files(major);
        let increment = &files["increment/backup_label"];
        let before = BackupLabel::parse(&files["before/backup_label"]).unwrap();
        let from = BackupLabel::parse(increment).unwrap().incremental.unwrap();
        assert_eq!(
            (from.lsn, from.timeline),
            (before.start_lsn, before.start_timeline)
        );
        assert_eq!(
            BackupLabel::without_increment(increment).unwrap(),
            files["after/backup_label"],
            "{major}"
        );
    }
}

#[test]
fn only_files_of_relations_have_increments() {
    for (name, expected) in [
        ("base/5/INCREMENTAL.16384", Some("base/5/16384")),
        ("base/5/INCREMENTAL.16384_vm.1", Some("base/5/16384_vm.1")),
        ("global/INCREMENTAL.1262", Some("global/1262")),
        (
            "pg_tblspc/16390/PG_18_202506291/5/INCREMENTAL.7",
            Some("pg_tblspc/16390/PG_18_202506291/5/7"),
        ),
        ("base/5/16384", None),
        ("base/5/INCREMENTAL.", None),
        ("base/5/INCREMENTAL.PG_VERSION", None),
        ("base/5/INCREMENTAL.INCREMENTAL.16384", None),
        ("base/5/incremental.16384", None),
        ("INCREMENTAL.16384", None),
        ("pg_wal/INCREMENTAL.16384", None),
        ("INCREMENTAL.x/16384", None),
    ] {
        assert_eq!(plain_name(&path(name)), expected.map(path), "{name}");
    }
}

/// An increment as a server would write it, its blocks filled with their numbers' lowest byte.
fn increment(layout: BlockLayout, truncated_to: u32, blocks: &[u32]) -> Vec<u8> {
    let count = u32::try_from(blocks.len()).unwrap();
    let fixed = [MAGIC, count, truncated_to];
    let mut bytes: Vec<u8> = fixed
        .iter()
        .chain(blocks)
        .flat_map(|n| n.to_le_bytes())
        .collect();
    let block_bytes = layout.block_bytes() as usize;
    if !blocks.is_empty() {
        bytes.resize(bytes.len().next_multiple_of(block_bytes), 0);
    }
    for block in blocks {
        bytes.extend(vec![block.to_le_bytes()[0]; block_bytes]);
    }
    bytes
}

proptest! {
    #[test]
    fn agrees_with_a_file_that_is_put_together_block_by_block(
        truncated_to in 0_u32..24,
        blocks in prop::collection::btree_set(0_u32..20, 0..12),
        before_blocks in 0_u32..24,
        cut in 1_usize..3000,
        range in (0_u32..24, 0_u32..24),
    ) {
        let layout = BlockLayout::new(1024, 20).unwrap();
        let blocks: Vec<u32> = blocks.into_iter().collect();
        let (header, sent) = read(&increment(layout, truncated_to, &blocks), layout, cut).unwrap();
        prop_assert_eq!(sent.len(), blocks.len() * 1024);
        prop_assert_eq!(header.blocks(), &blocks);
        prop_assert_eq!(header.clamped_from(), (truncated_to > 20).then_some(truncated_to));

        // as reconstruct.c does: a map of sources, the newest file's first
        let length = truncated_to.min(20).max(blocks.last().map_or(0, |last| last + 1));
        prop_assert_eq!(header.rebuilt_blocks(), length);
        let mut map = vec![Source::Zero; length as usize];
        for (place, block) in blocks.iter().enumerate() {
            map[*block as usize] = Source::Sent(place);
        }
        for (block, source) in (0..).zip(&mut map) {
            if *source == Source::Zero && block < truncated_to.min(20) && block < before_blocks {
                *source = Source::Before;
            }
        }
        let found: Vec<_> = (0..length).map(|block| header.source(block, before_blocks)).collect();
        prop_assert_eq!(found, map);

        let within = blocks.iter().filter(|block| range.0 <= **block && **block < range.1);
        let within: Vec<u32> = within.copied().collect();
        prop_assert_eq!(&header.blocks()[header.sent(range.0..range.1)], &within);
    }
}

/// What a server says before it was mended must not stop the backup, nor grow the file.
#[test]
fn clamps_a_length_beyond_the_segment() {
    let (header, _) = read(&increment(USUAL, 200_000, &[7]), USUAL, 100).unwrap();
    assert_eq!(header.truncated_to(), 131_072);
    assert_eq!(header.clamped_from(), Some(200_000));
    assert_eq!(header.rebuilt_blocks(), 131_072);
    assert_eq!(header.source(131_071, 131_072), Source::Before);
    assert_eq!(header.source(131_071, 9), Source::Zero);
}

#[test]
fn refuses_what_is_no_increment() {
    let layout = BlockLayout::new(1024, 20).unwrap();
    let good = increment(layout, 9, &[2, 5]);
    read(&good, layout, 7).unwrap();
    let with = |at: usize, value: u32| {
        let mut bad = good.clone();
        bad[at..at + 4].copy_from_slice(&value.to_le_bytes());
        read(&bad, layout, 7).map(|_| ())
    };
    assert_eq!(with(0, 1), Err(Magic { found: 1 }));
    assert_eq!(
        with(4, 21),
        Err(TooManyBlocks {
            limit: 20,
            found: 21
        })
    );
    let length = |expected, found| Err(Length { expected, found });
    assert_eq!(
        with(4, u32::MAX),
        Err(TooManyBlocks {
            limit: 20,
            found: u32::MAX
        })
    );
    assert_eq!(with(4, 1), length(2048, 3072));
    assert_eq!(with(4, 0), length(12, 3072));
    assert_eq!(
        with(12, 5),
        Err(Order {
            before: 5,
            found: 5
        })
    );
    assert_eq!(
        with(12, 6),
        Err(Order {
            before: 6,
            found: 5
        })
    );
    assert_eq!(
        with(16, 20),
        Err(Beyond {
            limit: 20,
            found: 20
        })
    );
    assert_eq!(with(20, 1), Err(Padding));
    assert_eq!(with(1020, 1 << 31), Err(Padding));
    for (cut, expected) in [(0, 12), (11, 12), (12, 3072), (3071, 3072)] {
        let found = read(&good[..cut], layout, 7).map(|_| ());
        assert_eq!(found, length(expected, cut as u64));
    }
    let longer = [good.as_slice(), &[0]].concat();
    assert_eq!(read(&longer, layout, 7).map(|_| ()), length(3072, 3073));
}
