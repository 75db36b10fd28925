//! Pages of relations and their checksums, of a cluster that has them (`SHOW data_checksums`).
//!
//! | at | bytes | in a page's header (`storage/bufpage.h`, `PageHeaderData`) |
//! |---:|------:|---------|
//! |  0 |     8 | LSN after the record that changed the page last, upper half first |
//! |  8 |     2 | checksum |
//! | 14 |     2 | end of free space; 0 only in a page that was never written to |

use wal::Lsn;

/// What can be said of a page that was read while the server was running.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageVerdict {
    /// All zeros: the relation has grown by it, and it was never written to.
    New,
    /// As it was written.
    Good,
    /// Changed since the backup began: it may be torn, and comes from WAL anyway.
    Newer,
    /// Not what was written; unless it was torn by a write that began while it was read, which only
    /// a second look can tell.
    Bad {
        /// The checksum of what stands there, from 1; 0 if that is too short for a page. A page that
        /// is half new may have it, and is bad all the same.
        expected: u16,
        /// The checksum that stands there.
        found: u16,
    },
}

/// Checks a page of a cluster with checksums. `block` is its number in its fork, counted through all
/// segments; `start` is where replay of the backup begins.
///
/// It decides as `backup/basebackup.c`, `verify_page_checksum` does, but for a page without an end of
/// free space: the server passes it, and refuses to read it if anything in it is not zero
/// (`storage/page/bufpage.c`, `PageIsVerified`).
pub fn check_page(page: &[u8], block: u32, start: Lsn) -> PageVerdict {
    let Some((header, _)) = page.split_first_chunk::<LANES_BYTES>() else {
        return PageVerdict::Bad {
            expected: 0,
            found: 0,
        };
    };
    let [
        h3,
        h2,
        h1,
        h0,
        l3,
        l2,
        l1,
        l0,
        c0,
        c1,
        _,
        _,
        _,
        _,
        upper @ ..,
    ] = header;
    let unused = upper.starts_with(&[0, 0]);
    if unused && page.iter().all(|byte| *byte == 0) {
        return PageVerdict::New;
    }
    let lsn = u64::from_le_bytes([*l3, *l2, *l1, *l0, *h3, *h2, *h1, *h0]);
    if Lsn::new(lsn) >= start && !unused {
        return PageVerdict::Newer;
    }
    let found = u16::from_le_bytes([*c0, *c1]);
    let expected = checksum(page, block);
    if found == expected && !unused {
        PageVerdict::Good
    } else {
        PageVerdict::Bad { expected, found }
    }
}

/// How many sums run beside each other (`storage/checksum_impl.h`, `N_SUMS`).
const LANES: usize = 32;
const LANES_BYTES: usize = 4 * LANES;
type Lanes = [u32; LANES];

const FNV_PRIME: u32 = 16_777_619;

/// What each sum begins with (`checksumBaseOffsets`).
const BEGIN: Lanes = [
    0x5B1F_36E9,
    0xB852_5960,
    0x02AB_50AA,
    0x1DE6_6D2A,
    0x79FF_467A,
    0x9BB9_F8A3,
    0x217E_7CD2,
    0x83E1_3D2C,
    0xF8D4_474F,
    0xE39E_B970,
    0x42C6_AE16,
    0x9932_16FA,
    0x7B09_3B5D,
    0x98DA_FF3C,
    0xF718_902A,
    0x0B1C_9CDB,
    0xE58F_764B,
    0x1876_36BC,
    0x5D7B_3BB1,
    0xE73D_E7DE,
    0x92BE_C979,
    0xCCA6_C0B2,
    0x304A_0979,
    0x85AA_43D4,
    0x7831_25BB,
    0x6CA8_EAA2,
    0xE407_EAC6,
    0x4B5C_FC3E,
    0x9FBF_8C76,
    0x15CA_20BE,
    0xF2CA_9FD3,
    0x959B_D756,
];

/// `pg_checksum_page`: over the page with zeros in place of its checksum, and its number.
fn checksum(page: &[u8], block: u32) -> u16 {
    let (rows, _) = page.as_chunks::<LANES_BYTES>();
    let mut lanes = BEGIN;
    if let Some((first, rest)) = rows.split_first() {
        let mut first = *first;
        if let Some(checksum) = first.get_mut(8..10) {
            checksum.fill(0);
        }
        add(&mut lanes, &first);
        for row in rest {
            add(&mut lanes, row);
        }
    }
    for _ in 0..2 {
        add(&mut lanes, &[0; LANES_BYTES]);
    }
    let sum = lanes.iter().fold(block, |sum, lane| sum ^ lane);
    let remainder = u16::try_from(sum % 65_535).expect("it is below 65,535");
    remainder.saturating_add(1)
}

/// `CHECKSUM_COMP`, for all lanes.
fn add(lanes: &mut Lanes, row: &[u8; LANES_BYTES]) {
    let (values, _) = row.as_chunks();
    for (lane, value) in lanes.iter_mut().zip(values) {
        let mixed = *lane ^ u32::from_le_bytes(*value);
        *lane = mixed.wrapping_mul(FNV_PRIME) ^ (mixed >> 17);
    }
}
