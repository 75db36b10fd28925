//! The checksums of files as `backup_manifest` has them (`common/checksum_helper.c`).

use std::fmt;

use sha2::{Digest as _, Sha224, Sha256, Sha384, Sha512};

use crate::byte_count;

/// What a server can be asked to compute for each file: `MANIFEST_CHECKSUMS`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Algorithm {
    /// Nothing: sizes alone can be compared.
    None,
    /// CRC-32C, the default.
    Crc32c,
    /// SHA-224.
    Sha224,
    /// SHA-256.
    Sha256,
    /// SHA-384.
    Sha384,
    /// SHA-512.
    Sha512,
}

impl Algorithm {
    /// Every algorithm.
    pub const ALL: [Self; 6] = [
        Self::None,
        Self::Crc32c,
        Self::Sha224,
        Self::Sha256,
        Self::Sha384,
        Self::Sha512,
    ];

    /// PostgreSQL's name for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "NONE",
            Self::Crc32c => "CRC32C",
            Self::Sha224 => "SHA224",
            Self::Sha256 => "SHA256",
            Self::Sha384 => "SHA384",
            Self::Sha512 => "SHA512",
        }
    }

    /// The algorithm of that name, in any case.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|algorithm| algorithm.name().eq_ignore_ascii_case(name))
    }
}

impl fmt::Display for Algorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A file's checksum. Prints as hex.
#[derive(Clone, PartialEq, Eq)]
pub enum Checksum {
    /// None was computed.
    None,
    /// CRC-32C; its hex form is that of its bytes in little-endian order, as it lies in the memory
    /// of a server (`checksum_helper.c`, `pg_checksum_final`).
    Crc32c(u32),
    /// SHA-224.
    Sha224([u8; 28]),
    /// SHA-256.
    Sha256([u8; 32]),
    /// SHA-384.
    Sha384(Box<[u8; 48]>),
    /// SHA-512.
    Sha512(Box<[u8; 64]>),
}

impl Checksum {
    /// How it was computed.
    pub fn algorithm(&self) -> Algorithm {
        match self {
            Self::None => Algorithm::None,
            Self::Crc32c(_) => Algorithm::Crc32c,
            Self::Sha224(_) => Algorithm::Sha224,
            Self::Sha256(_) => Algorithm::Sha256,
            Self::Sha384(_) => Algorithm::Sha384,
            Self::Sha512(_) => Algorithm::Sha512,
        }
    }

    /// The checksum with this hex form; `None` if the digits are no hex or of another length.
    pub fn from_hex(algorithm: Algorithm, hex: &str) -> Option<Self> {
        Some(match algorithm {
            Algorithm::None => return hex.is_empty().then_some(Self::None),
            Algorithm::Crc32c => Self::Crc32c(u32::from_le_bytes(bytes_of(hex)?)),
            Algorithm::Sha224 => Self::Sha224(bytes_of(hex)?),
            Algorithm::Sha256 => Self::Sha256(bytes_of(hex)?),
            Algorithm::Sha384 => Self::Sha384(Box::new(bytes_of(hex)?)),
            Algorithm::Sha512 => Self::Sha512(Box::new(bytes_of(hex)?)),
        })
    }
}

impl fmt::Display for Checksum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let crc;
        let bytes: &[u8] = match self {
            Self::None => &[],
            Self::Crc32c(value) => {
                crc = value.to_le_bytes();
                &crc
            }
            Self::Sha224(bytes) => bytes,
            Self::Sha256(bytes) => bytes,
            Self::Sha384(bytes) => bytes.as_slice(),
            Self::Sha512(bytes) => bytes.as_slice(),
        };
        bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Checksum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{self}", self.algorithm())
    }
}

/// Exactly `N` bytes from twice as many hex digits, of either case.
pub(crate) fn bytes_of<const N: usize>(hex: &str) -> Option<[u8; N]> {
    hex_bytes(hex)?.try_into().ok()
}

/// The bytes of an even number of hex digits, of either case.
pub(crate) fn hex_bytes(hex: &str) -> Option<Vec<u8>> {
    let (pairs, rest) = hex.as_bytes().as_chunks::<2>();
    let digit = |byte: u8| {
        char::from(byte)
            .to_digit(16)
            .and_then(|digit| u8::try_from(digit).ok())
    };
    if !rest.is_empty() {
        return None;
    }
    pairs
        .iter()
        .map(|[high, low]| digit(*high)?.checked_mul(16)?.checked_add(digit(*low)?))
        .collect()
}

/// A file's length in bytes and its checksum.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileSum {
    /// Length in bytes.
    pub size: u64,
    /// Checksum of all of them.
    pub checksum: Checksum,
}

/// Computes a [`FileSum`] while the file's bytes pass.
#[derive(Debug, Clone)]
pub struct FileChecker {
    size: u64,
    state: State,
}

#[derive(Debug, Clone)]
enum State {
    None,
    Crc32c(u32),
    Sha224(Sha224),
    Sha256(Sha256),
    Sha384(Sha384),
    Sha512(Sha512),
}

impl FileChecker {
    /// At a file's first byte.
    pub fn new(algorithm: Algorithm) -> Self {
        let state = match algorithm {
            Algorithm::None => State::None,
            Algorithm::Crc32c => State::Crc32c(0),
            Algorithm::Sha224 => State::Sha224(Sha224::new()),
            Algorithm::Sha256 => State::Sha256(Sha256::new()),
            Algorithm::Sha384 => State::Sha384(Sha384::new()),
            Algorithm::Sha512 => State::Sha512(Sha512::new()),
        };
        Self { size: 0, state }
    }

    /// The file's next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.size = self.size.saturating_add(byte_count(bytes.len()));
        match &mut self.state {
            State::None => {}
            State::Crc32c(crc) => *crc = crc32c::crc32c_append(*crc, bytes),
            State::Sha224(hasher) => hasher.update(bytes),
            State::Sha256(hasher) => hasher.update(bytes),
            State::Sha384(hasher) => hasher.update(bytes),
            State::Sha512(hasher) => hasher.update(bytes),
        }
    }

    /// The file has ended.
    pub fn finish(self) -> FileSum {
        let checksum = match self.state {
            State::None => Checksum::None,
            State::Crc32c(crc) => Checksum::Crc32c(crc),
            State::Sha224(hasher) => Checksum::Sha224(hasher.finalize().into()),
            State::Sha256(hasher) => Checksum::Sha256(hasher.finalize().into()),
            State::Sha384(hasher) => Checksum::Sha384(Box::new(hasher.finalize().into())),
            State::Sha512(hasher) => Checksum::Sha512(Box::new(hasher.finalize().into())),
        };
        FileSum {
            size: self.size,
            checksum,
        }
    }

    /// The file has ended: whether it is what `expected` says.
    pub fn matches(self, expected: &FileSum) -> bool {
        self.finish() == *expected
    }
}

/// Computes a [`FileSum`] with CRC-32C from those of a file's parts, without the parts' bytes.
#[derive(Debug, Clone, Default)]
pub struct SumOfParts {
    size: u64,
    crc32c: u32,
}

impl SumOfParts {
    /// At a file's first byte.
    pub fn new() -> Self {
        Self::default()
    }

    /// Behind a file whose length in bytes and CRC-32C are known.
    pub fn of_file(size: u64, crc32c: u32) -> Self {
        Self { size, crc32c }
    }

    /// A part has changed which ended `behind` bytes before the end of what is summed up: its CRC-32C
    /// before and after. Its length is the same.
    pub fn changed(&mut self, before: u32, after: u32, behind: u64) {
        // of two files of one length, CRCs differ by that of their difference
        self.crc32c ^= times(before ^ after, shift_by(behind));
    }

    /// The next part: its CRC-32C and its length in bytes.
    pub fn part(&mut self, crc32c: u32, bytes: u64) {
        // both have all ones before and after, which cancel each other out
        self.crc32c = times(self.crc32c, shift_by(bytes)) ^ crc32c;
        self.size = self.size.saturating_add(bytes);
    }

    /// So many zero bytes.
    pub fn zeros(&mut self, bytes: u64) {
        self.crc32c = !times(!self.crc32c, shift_by(bytes));
        self.size = self.size.saturating_add(bytes);
    }

    /// The file has ended.
    pub fn finish(self) -> FileSum {
        FileSum {
            size: self.size,
            checksum: Checksum::Crc32c(self.crc32c),
        }
    }
}

// A CRC is the remainder of a polynomial over GF(2): its highest bit is the coefficient of x^0, its
// lowest that of x^31. Bytes that follow multiply what came before them by x^8 each.

/// The polynomial of CRC-32C (RFC 3720, B.4: 0x1EDC6F41) without x^32, bits reversed.
const CRC32C_POLYNOMIAL: u32 = 0x82F6_3B78;
/// x^0.
const ONE: u32 = 1 << 31;
/// x^8: one byte.
const ONE_BYTE: u32 = ONE >> 8;

/// x^(8 * 2^n) for each bit n of a length in bytes.
const BYTE_SHIFTS: [u32; 64] = {
    let mut shifts = [0; 64];
    let mut left: &mut [u32] = &mut shifts;
    let mut shift = ONE_BYTE;
    while let [first, rest @ ..] = left {
        *first = shift;
        shift = times(shift, shift);
        left = rest;
    }
    shifts
};

/// The product of two remainders.
const fn times(one: u32, other: u32) -> u32 {
    let (mut left, mut term, mut product) = (one, other, 0);
    while left != 0 {
        if left & ONE != 0 {
            product ^= term;
        }
        left <<= 1;
        // the next coefficient: the term times x
        term = (term >> 1) ^ if term & 1 == 0 { 0 } else { CRC32C_POLYNOMIAL };
    }
    product
}

/// What so many bytes multiply what came before them by.
fn shift_by(bytes: u64) -> u32 {
    let set = BYTE_SHIFTS.iter().enumerate();
    let set = set.filter(|(bit, _)| bytes >> bit & 1 == 1);
    set.fold(ONE, |product, (_, shift)| times(*shift, product))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The check values of RFC 3720 and of FIPS 180, for the bytes "abc" or, for CRC-32C,
    /// "123456789" (0xE3069283).
    #[test]
    fn computes_what_the_standards_say() {
        let sum = |algorithm, bytes: &[u8]| {
            let mut checker = FileChecker::new(algorithm);
            bytes.chunks(2).for_each(|chunk| checker.update(chunk));
            checker.finish()
        };
        assert_eq!(
            sum(Algorithm::Crc32c, b"123456789").checksum,
            Checksum::Crc32c(0xE306_9283)
        );
        assert_eq!(
            sum(Algorithm::Crc32c, b"123456789").checksum.to_string(),
            "839206e3"
        );
        for (algorithm, start) in [
            (Algorithm::Sha224, "23097d223405d822"),
            (Algorithm::Sha256, "ba7816bf8f01cfea"),
            (Algorithm::Sha384, "cb00753f45a35e8b"),
            (Algorithm::Sha512, "ddaf35a193617aba"),
            (Algorithm::None, ""),
        ] {
            let sum = sum(algorithm, b"abc");
            assert_eq!(sum.size, 3);
            let hex = sum.checksum.to_string();
            assert!(hex.starts_with(start), "{algorithm}: {hex}");
            assert_eq!(Checksum::from_hex(algorithm, &hex).unwrap(), sum.checksum);
            assert_eq!(
                Checksum::from_hex(algorithm, &hex.to_uppercase()).unwrap(),
                sum.checksum
            );
            assert_eq!(Checksum::from_hex(algorithm, &format!("{hex}00")), None);
            assert_eq!(Algorithm::from_name(algorithm.name()), Some(algorithm));
        }
        assert_eq!(Checksum::from_hex(Algorithm::Crc32c, "839206eg"), None);
        assert_eq!(Checksum::from_hex(Algorithm::Crc32c, "839206e"), None);
        assert_eq!(Algorithm::from_name("md5"), None);
        assert_eq!(Algorithm::from_name("crc32C"), Some(Algorithm::Crc32c));
    }

    #[test]
    fn sums_up_a_file_from_what_has_changed_of_another() {
        let crc = |bytes: &[u8]| crc32c::crc32c(bytes);
        let before: Vec<u8> = (0..=u8::MAX).cycle().take(5000).collect();
        let mut after = before.clone();
        let mut sum = SumOfParts::of_file(5000, crc(&before));
        // the first bytes, some in the middle, the last ones, and some that are as they were
        for range in [0..10_usize, 700..1700, 2000..2100, 4999..5000] {
            for byte in &mut after[range.clone()] {
                *byte ^= if range.start == 2000 { 0 } else { 0x5a };
            }
            let behind = u64::try_from(5000 - range.end).unwrap();
            sum.changed(crc(&before[range.clone()]), crc(&after[range]), behind);
        }
        sum.part(crc(b"and more"), 8);
        sum.zeros(3);
        after.extend_from_slice(b"and more\0\0\0");
        let mut checker = FileChecker::new(Algorithm::Crc32c);
        checker.update(&after);
        assert_eq!(sum.finish(), checker.finish());
    }

    #[test]
    fn matches_only_an_equal_size_and_checksum() {
        let checker = |bytes: &[u8]| {
            let mut checker = FileChecker::new(Algorithm::Crc32c);
            checker.update(bytes);
            checker
        };
        let expected = checker(b"abc").finish();
        assert!(checker(b"abc").matches(&expected));
        assert!(!checker(b"abd").matches(&expected));
        assert!(!checker(b"ab").matches(&expected));
    }
}
