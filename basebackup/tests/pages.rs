//! Pages of clusters that `pg_checksums` found good.

use basebackup::page::{PageVerdict, check_page};
use wal::{Lsn, Major};

use crate::golden;

const PAGE_BYTES: usize = 8192;
const LATER: Lsn = Lsn::new(u64::MAX);

/// The pages of a recording with their numbers: of a table, of its free space map (3) and of its
/// visibility map (1).
fn pages(major: Major) -> Vec<(u32, Vec<u8>)> {
    let bytes = golden(major, "pages.zst");
    let pages: Vec<_> = bytes.chunks(PAGE_BYTES).map(<[u8]>::to_vec).collect();
    let table = u32::try_from(pages.len()).unwrap() - 4;
    assert!(table > 20);
    (0..table).chain(0..3).chain(0..1).zip(pages).collect()
}

const RECORDED: [Major; 5] = [Major::V13, Major::V15, Major::V17, Major::V18, Major::V19];

/// A checksum computed in another way than the server's would call every page bad, or none.
#[test]
fn finds_good_what_pg_checksums_finds_good() {
    for major in RECORDED {
        for (block, page) in pages(major) {
            assert_eq!(
                check_page(&page, block, LATER),
                PageVerdict::Good,
                "{major}: {block}"
            );
        }
    }
}

/// A page in another's place has good content and is as wrong.
#[test]
fn finds_a_page_in_the_place_of_another() {
    for major in RECORDED {
        for (block, page) in pages(major) {
            let found = check_page(&page, block + 1, LATER);
            assert!(
                matches!(found, PageVerdict::Bad { .. }),
                "{major}: {block}: {found:?}"
            );
        }
    }
}

/// The checksum has 16 bits: of the 65,536 flips in a page, one is expected to keep it.
#[test]
fn finds_flipped_bits() {
    let (block, good) = pages(Major::V18).swap_remove(5);
    let mut missed = 0;
    let mut page = good;
    for at in 0..page.len() {
        for bit in 0..8 {
            page[at] ^= 1 << bit;
            match check_page(&page, block, LATER) {
                PageVerdict::Bad { expected, found } => assert_ne!(expected, found),
                PageVerdict::Good => missed += 1,
                other => panic!("bit {bit} of byte {at}: {other:?}"),
            }
            page[at] ^= 1 << bit;
        }
    }
    assert!(missed <= 4, "{missed}");
    assert_eq!(check_page(&page, block, LATER), PageVerdict::Good);
}

/// What was written while the backup ran may be torn, and must not fail it.
#[test]
fn passes_pages_that_were_changed_since_the_start() {
    let (block, mut page) = pages(Major::V17).swap_remove(0);
    let half = |at: usize| u32::from_le_bytes(page[at..at + 4].try_into().unwrap());
    let lsn = u64::from(half(0)) << 32 | u64::from(half(4));
    assert!(lsn > 0x10_0000);
    page[4000] ^= 1;
    for (start, newer) in [(lsn - 1, true), (lsn, true), (lsn + 1, false)] {
        let found = check_page(&page, block, Lsn::new(start));
        assert_eq!(found == PageVerdict::Newer, newer, "{found:?}");
        assert!(newer || matches!(found, PageVerdict::Bad { .. }));
    }
    // the upper half counts most
    page[0] = 1;
    assert_eq!(
        check_page(&page, block, Lsn::new(lsn + 1)),
        PageVerdict::Newer
    );
}

#[test]
fn a_page_that_was_never_written_to_is_all_zeros() {
    let mut page = vec![0; PAGE_BYTES];
    assert_eq!(check_page(&page, 7, LATER), PageVerdict::New);
    for at in [0, 8, 24, PAGE_BYTES - 1] {
        page[at] = 1;
        for start in [LATER, Lsn::new(0)] {
            let found = check_page(&page, 7, start);
            assert!(matches!(found, PageVerdict::Bad { .. }), "{at}: {found:?}");
        }
        page[at] = 0;
    }
}

#[test]
fn what_is_too_short_for_a_page_is_not_called_good() {
    let (block, page) = pages(Major::V18).swap_remove(0);
    for length in [0, 1, 23, 127] {
        let bad = PageVerdict::Bad {
            expected: 0,
            found: 0,
        };
        assert_eq!(check_page(&page[..length], block, LATER), bad);
    }
}
