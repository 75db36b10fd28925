//! The tests of what passes in a base backup, a module per story. What servers of each major sent
//! is in `golden/`, made by `golden/make` and `golden/make_relations`.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "helpers outside #[test] functions may fail loudly too"
)]

mod archives;
mod control_file;
mod fuzz;
mod increments;
mod messages;
mod pages;
mod recorded;
mod server_manifest;
mod streamed;

use wal::Major;

/// A file of `golden/<major>/`.
#[expect(
    clippy::disallowed_methods,
    reason = "the tests read their files; the crate does not"
)]
fn golden(major: Major, name: &str) -> Vec<u8> {
    let path = format!(
        "{}/tests/golden/{}/{name}",
        env!("CARGO_MANIFEST_DIR"),
        major.number()
    );
    let bytes = std::fs::read(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
    match name.strip_suffix(".zst") {
        Some(_) => zstd::stream::decode_all(bytes.as_slice()).unwrap(),
        None => bytes,
    }
}

/// A ustar header as PostgreSQL writes it (src/port/tar.c, `tarCreateHeader`).
fn tar_header(name: &[u8], kind: u8, size: u64, target: &[u8]) -> [u8; 512] {
    let mut header = [0; 512];
    header[..name.len()].copy_from_slice(name);
    header[157..157 + target.len()].copy_from_slice(target);
    header[156] = kind;
    header[257..265].copy_from_slice(b"ustar\x0000");
    header[265..273].copy_from_slice(b"postgres");
    for (at, digits, value) in [
        (100, 7, 0o600),
        (108, 7, 0),
        (116, 7, 0),
        (124, 11, size),
        (136, 11, 1_795_216_499),
    ] {
        put_number(&mut header[at..=at + digits], value);
    }
    seal(&mut header);
    header
}

/// As `print_tar_number`: octal where it fits, base 256 where not.
fn put_number(field: &mut [u8], value: u64) {
    let digits = field.len() - 1;
    if value < 1 << (3 * digits) {
        field.copy_from_slice(format!("{value:0digits$o} ").as_bytes());
    } else {
        field.fill(0);
        field[0] = 0x80;
        field[digits - 7..].copy_from_slice(&value.to_be_bytes());
    }
}

/// Writes the header's checksum anew.
fn seal(header: &mut [u8; 512]) {
    header[148..156].fill(b' ');
    let sum = header.iter().map(|byte| u64::from(*byte)).sum();
    put_number(&mut header[148..156], sum);
}
