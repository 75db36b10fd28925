//! Files of relations: tables, indexes and their maps, in blocks and segments.

use crate::RelativePath;

/// How a server cuts relations: `SHOW block_size` and `SHOW segment_size`, fixed when it was built.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockLayout {
    block_bytes: u32,
    segment_blocks: u32,
}

impl BlockLayout {
    /// What nearly every server has: blocks of 8 KiB in segments of 1 GiB.
    pub const USUAL: Self = Self {
        block_bytes: 8192,
        segment_blocks: 131_072,
    };

    /// A layout that a server can have: a power of two from 1 to 32 KiB (`configure.ac`,
    /// `--with-blocksize`), and segments of up to 2^31 blocks.
    pub fn new(block_bytes: u32, segment_blocks: u32) -> Option<Self> {
        let possible = block_bytes.is_power_of_two()
            && (1024..=32_768).contains(&block_bytes)
            && (1..=1 << 31).contains(&segment_blocks);
        possible.then_some(Self {
            block_bytes,
            segment_blocks,
        })
    }

    /// Bytes of a block.
    pub fn block_bytes(self) -> u32 {
        self.block_bytes
    }

    /// Blocks of a segment: the most that one file has.
    pub fn segment_blocks(self) -> u32 {
        self.segment_blocks
    }

    /// How many whole blocks a file of so many bytes has. What follows the last is no block: it was
    /// torn off while the file grew.
    pub fn whole_blocks(self, bytes: u64) -> u32 {
        let blocks = bytes.checked_div(self.block_bytes.into()).unwrap_or(0);
        let within = u32::try_from(blocks).unwrap_or(u32::MAX);
        within.min(self.segment_blocks)
    }

    /// How many blocks of visibility map a table of so many blocks has at most: bits that a longer
    /// map has are of pages that are no more (`access/heap/visibilitymap.c`: two bits a page, after
    /// a page header of 24 bytes).
    pub fn visibility_map_blocks(self, table_blocks: u64) -> u64 {
        let bytes = self.block_bytes.saturating_sub(PAGE_HEADER_BYTES);
        table_blocks.div_ceil(u64::from(bytes).saturating_mul(4).max(1))
    }
}

/// `storage/bufpage.h`, `SizeOfPageHeaderData`.
const PAGE_HEADER_BYTES: u32 = 24;

/// What the name of a relation's file says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RelationFile {
    /// Which of the relation's forks it belongs to.
    pub fork: Fork,
    /// Which segment of the fork it is, from 0.
    pub segment: u32,
}

/// A fork of a relation (`common/relpath.c`, `forkNames`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fork {
    /// The rows, or the index.
    Main,
    /// `_fsm`: where there is free space.
    FreeSpace,
    /// `_vm`: which pages are visible to all.
    Visibility,
    /// `_init`: what an unlogged relation is made from after a crash.
    Init,
}

impl RelationFile {
    /// What the path of a relation's file below the data directory says; `None` for any other file,
    /// temporary relations' among them.
    pub fn of(path: &RelativePath) -> Option<Self> {
        let (directory, name) = split(path)?;
        holds_relations(directory).then(|| Self::named(name))?
    }

    /// A file's name without its directory (`storage/file/reinit.c`,
    /// `parse_filename_for_nontemp_relation`).
    fn named(name: &[u8]) -> Option<Self> {
        let name = std::str::from_utf8(name).ok()?;
        let (name, segment) = match name.split_once('.') {
            Some((name, segment)) => (name, number(segment)?),
            None => (name, 0),
        };
        let (relation, fork) = match name.split_once('_') {
            None => (name, Fork::Main),
            Some((relation, "fsm")) => (relation, Fork::FreeSpace),
            Some((relation, "vm")) => (relation, Fork::Visibility),
            Some((relation, "init")) => (relation, Fork::Init),
            Some(_) => return None,
        };
        number(relation)?;
        Some(Self { fork, segment })
    }

    /// The number that the file's first block has in its fork; `None` where no fork is that long.
    pub fn first_block(self, layout: BlockLayout) -> Option<u32> {
        self.segment.checked_mul(layout.segment_blocks)
    }
}

/// The directory and the last name of a path that has both.
pub(crate) fn split(path: &RelativePath) -> Option<(&[u8], &[u8])> {
    let bytes = path.as_bytes();
    let at = bytes.iter().rposition(|byte| *byte == b'/')?;
    let (directory, name) = bytes.split_at_checked(at)?;
    Some((directory, name.get(1..)?))
}

/// `global`, `base/<database>`, or `pg_tblspc/<oid>/PG_<version>/<database>`
/// (`backup/basebackup.c`, `sendDir`).
fn holds_relations(directory: &[u8]) -> bool {
    let oid = |name: &[u8]| {
        let text = std::str::from_utf8(name).ok();
        text.and_then(number).is_some()
    };
    let mut names = directory.split(|byte| *byte == b'/');
    match [
        names.next(),
        names.next(),
        names.next(),
        names.next(),
        names.next(),
    ] {
        [Some(b"global"), None, ..] => true,
        [Some(b"base"), Some(database), None, ..] => oid(database),
        [
            Some(b"pg_tblspc"),
            Some(tablespace),
            Some(version),
            Some(database),
            None,
        ] => oid(tablespace) && version.starts_with(b"PG_") && oid(database),
        _ => false,
    }
}

/// A number as PostgreSQL writes it in a name: not zero, without a sign or zeros in front.
fn number(digits: &str) -> Option<u32> {
    digits
        .starts_with(|first| matches!(first, '1'..='9'))
        .then(|| digits.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(path: &str) -> Option<(Fork, u32)> {
        let path = RelativePath::parse(path.as_bytes()).unwrap();
        RelationFile::of(&path).map(|file| (file.fork, file.segment))
    }

    /// A file taken for a relation's would be cut into pages that it does not have.
    #[test]
    fn knows_the_files_of_relations_by_their_paths() {
        for (path, expected) in [
            ("base/5/16384", (Fork::Main, 0)),
            ("base/5/16384.1", (Fork::Main, 1)),
            ("base/5/4294967295.131071", (Fork::Main, 131_071)),
            ("base/5/16384_fsm", (Fork::FreeSpace, 0)),
            ("base/5/16384_vm.2", (Fork::Visibility, 2)),
            ("global/1262_init", (Fork::Init, 0)),
            ("pg_tblspc/16390/PG_18_202506291/5/16391", (Fork::Main, 0)),
        ] {
            assert_eq!(of(path), Some(expected), "{path}");
        }
        for path in [
            "16384",
            "base/16384",
            "base/5/x/16384",
            "base/x/16384",
            "base/5/0",
            "base/5/01",
            "base/5/+1",
            "base/5/4294967296",
            "base/5/16384.0",
            "base/5/16384.01",
            "base/5/16384.",
            "base/5/16384.1.2",
            "base/5/16384_",
            "base/5/16384_vm_fsm",
            "base/5/16384_map",
            "base/5/16384.1_vm",
            "base/5/t3_16384",
            "base/5/PG_VERSION",
            "base/5/pg_filenode.map",
            "base/5/INCREMENTAL.16384",
            "global/5/16384",
            "global/pg_control",
            "pg_wal/16384",
            "pg_tblspc/16390/16391",
            "pg_tblspc/16390/PG_18_202506291/16391",
            "pg_tblspc/16390/XX_18_202506291/5/16391",
            "pg_tblspc/16390/PG_18_202506291/5/6/16391",
        ] {
            assert_eq!(of(path), None, "{path}");
        }
        let odd = RelativePath::parse(b"base/5/16384\xff").unwrap();
        assert_eq!(RelationFile::of(&odd), None);
    }

    #[test]
    fn counts_blocks_through_segments() {
        let layout = BlockLayout::USUAL;
        assert_eq!(BlockLayout::new(8192, 131_072), Some(layout));
        let file = |segment| RelationFile {
            fork: Fork::Main,
            segment,
        };
        assert_eq!(file(0).first_block(layout), Some(0));
        assert_eq!(file(3).first_block(layout), Some(393_216));
        assert_eq!(file(32_768).first_block(layout), None);
        assert_eq!(layout.whole_blocks(8191), 0);
        assert_eq!(layout.whole_blocks(8192 * 3 + 1), 3);
        assert_eq!(layout.whole_blocks(u64::MAX), 131_072);
        for (table, map) in [
            (0, 0),
            (1, 1),
            (32_672, 1),
            (32_673, 2),
            (u64::MAX, u64::MAX / 32_672 + 1),
        ] {
            assert_eq!(layout.visibility_map_blocks(table), map, "{table}");
        }
        for (block_bytes, segment_blocks) in [
            (0, 1),
            (512, 1),
            (8193, 1),
            (65_536, 1),
            (8192, 0),
            (8192, u32::MAX),
        ] {
            assert_eq!(BlockLayout::new(block_bytes, segment_blocks), None);
        }
    }
}
