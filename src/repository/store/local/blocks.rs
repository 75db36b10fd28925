//! Whole blocks written past the page cache: what is to be synced at once takes less time that way than
//! through it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use rustix::fs::OFlags;

/// What a disk is given at once, at least. Disks and file systems that take less take this too.
pub(super) const BLOCK: usize = 4 << 10;

/// Bytes to be written, in memory that begins where a block may begin.
#[derive(Debug, Default)]
pub(super) struct Blocks {
    memory: Vec<u8>,
    start: usize,
    length: usize,
}

impl Blocks {
    /// Takes `bytes`, and zeros up to the end of their last block, in place of what was here.
    pub(super) fn fill(&mut self, bytes: &[u8]) {
        let length = bytes.len().next_multiple_of(BLOCK);
        if self.memory.len() < length + BLOCK {
            self.memory = vec![0; (length + BLOCK).next_power_of_two()];
            self.start = self.memory.as_ptr().align_offset(BLOCK);
        }
        self.length = length;
        let blocks = self.start..self.start + length;
        let blocks = self.memory.get_mut(blocks).unwrap_or_default();
        let (content, rest) = blocks.split_at_mut(bytes.len());
        content.copy_from_slice(bytes);
        rest.fill(0);
    }

    /// Writes them at `offset`, where a block begins. They are not synced.
    pub(super) fn write_at(&self, file: &File, offset: u64) -> io::Result<()> {
        let end = self.start + self.length;
        let blocks = self.memory.get(self.start..end).unwrap_or_default();
        match file.write_all_at(blocks, offset) {
            // not every file system, and not every block
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
                set_direct(file, false)?;
                file.write_all_at(blocks, offset)
            }
            written => written,
        }
    }
}

/// Lets a file be written past the page cache, or through it again.
pub(super) fn set_direct(file: &File, direct: bool) -> io::Result<()> {
    let mut flags = rustix::fs::fcntl_getfl(file)?;
    flags.set(OFlags::DIRECT, direct);
    Ok(rustix::fs::fcntl_setfl(file, flags)?)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, OpenOptions};

    use super::*;

    fn file(path: &std::path::Path) -> File {
        fs::write(path, vec![7; 4 * BLOCK]).unwrap();
        OpenOptions::new().write(true).open(path).unwrap()
    }

    fn is_direct(file: &File) -> bool {
        rustix::fs::fcntl_getfl(file)
            .unwrap()
            .contains(OFlags::DIRECT)
    }

    #[test]
    fn a_block_is_written_whole_and_the_next_is_left() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let file = file(&path);
        let is_known = set_direct(&file, true).is_ok();
        assert_eq!(is_direct(&file), is_known);
        let mut blocks = Blocks::default();
        for length in [BLOCK + 1, 1, 2 * BLOCK, 0] {
            let bytes: Vec<u8> = (1..=u8::MAX).cycle().take(length).collect();
            blocks.fill(&bytes);
            blocks.write_at(&file, BLOCK as u64).unwrap();
            let found = fs::read(&path).unwrap();
            let end = BLOCK + length.next_multiple_of(BLOCK);
            assert_eq!(found[BLOCK..BLOCK + length], bytes);
            assert!(found[BLOCK + length..end].iter().all(|byte| *byte == 0));
            assert_eq!(found[3 * BLOCK..], [7; BLOCK]);
            assert_eq!(found[..BLOCK], [7; BLOCK]);
        }
        assert_eq!(is_direct(&file), is_known);
    }

    /// Some file systems ask for larger blocks, or say only when it is written that they do not know how.
    #[test]
    fn what_a_file_system_does_not_take_goes_through_the_page_cache() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let file = file(&path);
        if set_direct(&file, true).is_err() {
            // nothing to fall back from: it goes through the page cache already
            assert!(!is_direct(&file));
        }
        let mut blocks = Blocks::default();
        blocks.fill(b"x");
        blocks.write_at(&file, 8).unwrap();
        assert!(!is_direct(&file));
        assert_eq!(fs::read(&path).unwrap()[8], b'x');
    }
}
