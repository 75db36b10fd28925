//! Manifests and sums of any size, part by part: the same as from the whole.

use std::collections::BTreeMap;

use basebackup::manifest::{Entries, LINE_BYTES_MAX, ManifestEnd, ManifestError, ManifestWriter};
use basebackup::{
    Algorithm, Checksum, Differences, FileChecker, FileSum, Ledger, Manifest, ManifestFile,
    Mismatch, RelativePath, SumOfParts, Tally,
};
use proptest::prelude::*;
use wal::Major;

use crate::golden;
use crate::server_manifest::{any_manifest, sealed_bytes};

const LIMIT: u64 = 1 << 22;

/// What [`Entries`] makes of the bytes in stretches of this length.
pub(crate) fn read(bytes: &[u8], cut: usize) -> Result<Manifest, ManifestError> {
    let mut entries = Entries::new();
    let mut files = Vec::new();
    for stretch in bytes.chunks(cut) {
        files.extend(entries.push(stretch)?);
    }
    let ManifestEnd {
        version,
        system_id,
        wal_ranges,
    } = entries.finish()?;
    Ok(Manifest {
        version,
        system_id,
        files,
        wal_ranges,
    })
}

proptest! {
    #[test]
    fn reads_in_any_stretches_what_it_reads_from_the_whole(
        manifest in any_manifest(),
        cut in 1_usize..2000,
    ) {
        let bytes = manifest.write();
        prop_assert_eq!(read(&bytes, cut).unwrap(), Manifest::parse(&bytes, LIMIT).unwrap());
    }

    /// A sum that is put together wrong would be written into our own manifest, and every restore
    /// refused.
    #[test]
    fn a_sum_of_parts_is_that_of_the_whole(
        parts in prop::collection::vec(
            (prop::collection::vec(any::<u8>(), 0..300), 0_usize..40_000),
            0..8,
        ),
    ) {
        let mut whole = FileChecker::new(Algorithm::Crc32c);
        let mut sum = SumOfParts::new();
        for (bytes, zeros) in &parts {
            whole.update(bytes);
            sum.part(crc32c::crc32c(bytes), bytes.len() as u64);
            whole.update(&vec![0; *zeros]);
            sum.zeros(*zeros as u64);
        }
        prop_assert_eq!(sum.finish(), whole.finish());
    }

    #[test]
    fn a_sum_of_long_parts_is_that_of_an_independent_implementation(
        parts in prop::collection::vec((any::<u32>(), any::<u64>()), 1..5),
    ) {
        let mut sum = SumOfParts::new();
        let mut expected = 0;
        for (crc, bytes) in &parts {
            sum.part(*crc, *bytes);
            expected = crc32c::crc32c_combine(expected, *crc, usize::try_from(*bytes).unwrap());
        }
        prop_assert_eq!(sum.finish().checksum, Checksum::Crc32c(expected));
    }
}

/// Whatever a server of any major writes is read, or its backups could not be compared.
#[test]
fn reads_what_servers_wrote() {
    for major in [Major::V13, Major::V17, Major::V18] {
        let bytes = golden(major, "backup_manifest.zst");
        let whole = Manifest::parse(&bytes, LIMIT).unwrap();
        for cut in [7, 4096, bytes.len()] {
            assert_eq!(read(&bytes, cut).unwrap(), whole, "{major}, cut {cut}");
        }
        let mut out = Vec::new();
        let mut writer = ManifestWriter::new(whole.version, whole.system_id, &mut out);
        let mut pieces = vec![out];
        for file in &whole.files {
            let mut out = Vec::new();
            writer.file(file, &mut out);
            pieces.push(out);
        }
        let mut out = Vec::new();
        writer.finish(&whole.wal_ranges, &mut out);
        pieces.push(out);
        assert_eq!(pieces.concat(), bytes, "{major}");
    }
}

#[test]
fn finds_any_changed_byte_and_any_cut() {
    let good = small();
    assert_eq!(read(&good, 5).unwrap().files.len(), 2);
    for at in 0..good.len() {
        for bit in 0..8 {
            let mut bad = good.clone();
            bad[at] ^= 1 << bit;
            // The hex digits of the checksum may be of either case.
            if at > good.len() - 68 && bad[at].is_ascii_alphabetic() && bit == 5 {
                continue;
            }
            assert!(read(&bad, 64).is_err(), "bit {bit} of byte {at}");
        }
        assert!(read(&good[..at], 64).is_err(), "cut at {at}");
    }
    for more in ["\n", "x", "{\n"] {
        let bad = [good.as_slice(), more.as_bytes()].concat();
        assert!(read(&bad, 64).is_err(), "{more:?}");
    }
}

fn small() -> Vec<u8> {
    sealed_bytes(
        b"{ \"PostgreSQL-Backup-Manifest-Version\": 2,\n\"System-Identifier\": 7,\n\"Files\": [\n\
          { \"Path\": \"a\", \"Size\": 3 },\n{ \"Path\": \"b\", \"Size\": 4 }\n],\n\"WAL-Ranges\": [\n\
          { \"Timeline\": 1, \"Start-LSN\": \"0/28\", \"End-LSN\": \"0/30\" }\n],\n",
    )
}

/// A list that is understood by halves would let files go unnoticed.
#[test]
fn refuses_lines_that_no_server_writes_and_names_them() {
    let good = String::from_utf8(small()).unwrap();
    let (text, _) = good.rsplit_once("\"Manifest-Checksum\"").unwrap();
    for (from, to, line) in [
        ("\"Files\": [", "\"Files\" : [", 3),
        ("\"Files\": [", "\"New\": 1,\n\"Files\": [", 3),
        ("3 },\n", "3 }\n", 5),
        ("4 }\n", "4 },\n", 6),
        ("],\n\"WAL", "],\n\n\"WAL", 7),
        ("\"WAL-Ranges\": [", "\"WAL-Ranges\": []", 7),
        ("{ \"Post", "{\n\"Post", 1),
        ("-Version\": 2,", "-Version\": +2,", 1),
        ("Identifier\": 7,", "Identifier\": -7,", 2),
        (
            "Identifier\": 7,\n",
            "Identifier\": 7,\n\"System-Identifier\": 7,\n",
            3,
        ),
        ("\"0/30\" }\n],", "\"0/30\" }\n]", 9),
    ] {
        let bad = text.replacen(from, to, 1);
        assert_ne!(bad, text);
        match read(&sealed_bytes(bad.as_bytes()), 64) {
            // an entry that is followed by none is looked for in the line that ends the list
            Err(ManifestError::Json(_)) if line == 6 => {}
            Err(ManifestError::Line { line: found, .. }) => assert_eq!(found, line, "{to:?}"),
            other => panic!("{to:?}: {other:?}"),
        }
    }
    for (from, to) in [
        ("\"Size\": 3 }", "\"Size\": 3, \"New\": 1 }"),
        ("\"Size\": 3", "\"Size\": x"),
    ] {
        let bad = text.replacen(from, to, 1);
        let error = read(&sealed_bytes(bad.as_bytes()), 64).unwrap_err();
        assert!(matches!(error, ManifestError::Json(_)), "{error}");
    }
    let bad = text.replacen("\"b\"", "\"../b\"", 1);
    let error = read(&sealed_bytes(bad.as_bytes()), 64).unwrap_err();
    assert!(
        matches!(error, ManifestError::File { number: 2, .. }),
        "{error}"
    );
    let bad = text.replacen("Version\": 2", "Version\": 3", 1);
    let error = read(&sealed_bytes(bad.as_bytes()), 64).unwrap_err();
    assert!(
        matches!(error, ManifestError::Version { found: 3 }),
        "{error}"
    );
}

#[test]
fn a_line_without_an_end_is_not_waited_for() {
    let mut entries = Entries::new();
    let stretch = [b' '; 4096];
    let held = (0..)
        .take_while(|_| entries.push(&stretch).is_ok())
        .take(1000)
        .count();
    assert_eq!(held, LINE_BYTES_MAX / stretch.len());
    // nor is it said later that all is well
    entries.push(b"\n").unwrap_err();
    entries.finish().unwrap_err();
}

#[test]
fn goes_on_with_nothing_after_an_error() {
    let good = small();
    for broken in [
        &b"nonsense\n"[..],
        b"{ \"PostgreSQL-Backup-Manifest-Version\": 3,\n",
    ] {
        let mut entries = Entries::new();
        entries.push(broken).unwrap_err();
        entries.push(&good).unwrap_err();
        entries.finish().unwrap_err();
    }
}

fn path(text: &str) -> RelativePath {
    RelativePath::parse(text.as_bytes()).unwrap()
}

/// A file of so many bytes with this CRC-32C, as a server lists it.
fn listed(name: &str, size: u64, crc32c: u32) -> ManifestFile {
    ManifestFile {
        path: path(name),
        sum: FileSum {
            size,
            checksum: Checksum::Crc32c(crc32c),
        },
        last_modified: None,
    }
}

/// What the tally finds, the names of unlisted files walked once more.
fn tallied(arrived: &[(&str, u64, u32)], list: &[ManifestFile]) -> Result<(), Vec<Mismatch>> {
    let mut tally = Tally::new();
    for (name, size, crc32c) in arrived {
        tally.record(&path(name), *size, *crc32c);
    }
    for file in list {
        tally.listed(file);
    }
    for (name, ..) in arrived {
        tally.name_unlisted(&path(name));
    }
    assert_eq!(tally.unlisted(), 0);
    tally.finish().map_err(|differences| {
        assert_eq!(differences.more, 0);
        differences.named
    })
}

fn ledgered(arrived: &[(&str, u64, u32)], list: &[ManifestFile]) -> Result<(), Vec<Mismatch>> {
    let mut ledger = Ledger::new();
    for (name, size, crc32c) in arrived {
        ledger.record(path(name), listed(name, *size, *crc32c).sum);
    }
    ledger.compare(&Manifest {
        version: 2,
        system_id: None,
        files: list.to_vec(),
        wal_ranges: Vec::new(),
    })
}

const NAMES: [&str; 6] = ["a", "b", "base/1/1", "pg_wal/x", "backup_manifest", "c"];

proptest! {
    /// A backup with a file missing or torn on the way must be known to be bad, however large.
    #[test]
    fn a_tally_finds_what_a_ledger_finds(
        arrived in prop::collection::vec((prop::sample::select(&NAMES), 0_u64..2, 0_u32..2), 0..9),
        list in prop::collection::vec(prop::sample::select(&NAMES), 0..9),
        sums in prop::collection::vec((0_u64..2, 0_u32..2, any::<bool>()), NAMES.len()),
    ) {
        let list = list.into_iter().map(|name| {
            let of_name = NAMES.iter().position(|known| *known == name).unwrap();
            let (size, crc32c, summed) = sums[of_name];
            let mut file = listed(name, size, crc32c);
            if !summed {
                file.sum.checksum = Checksum::None;
            }
            file
        });
        let list: Vec<_> = list.collect();
        let by_path = |result: Result<(), Vec<Mismatch>>| {
            let mut found = BTreeMap::<_, Vec<_>>::new();
            for mismatch in result.err().unwrap_or_default() {
                found.entry(mismatch.path().clone()).or_default().push(mismatch.to_string());
            }
            for of_path in found.values_mut() {
                of_path.sort();
            }
            found
        };
        let (found, expected) = (tallied(&arrived, &list), ledgered(&arrived, &list));
        prop_assert_eq!(found.is_ok(), expected.is_ok());
        prop_assert_eq!(by_path(found), by_path(expected));
    }
}

#[test]
fn a_tally_says_what_it_was_not_told_the_names_of() {
    let mut tally = Tally::new();
    assert!(tally.is_empty());
    tally.record(&path("a"), 1, 1);
    tally.record(&path("b"), 1, 1);
    tally.record(&path("c"), 1, 1);
    tally.listed(&listed("a", 1, 1));
    assert_eq!((tally.len(), tally.unlisted()), (3, 2));
    for _ in 0..2 {
        tally.name_unlisted(&path("b"));
        tally.name_unlisted(&path("a"));
        tally.name_unlisted(&path("never arrived"));
    }
    let found = tally.finish().unwrap_err();
    let named = vec![Mismatch::Unlisted { path: path("b") }];
    assert_eq!(found, Differences { named, more: 1 });
}

#[test]
fn a_tally_calls_another_algorithm_unknown_and_not_equal() {
    let mut sha = listed("a", 3, 0);
    sha.sum.checksum = Checksum::Sha224([0; 28]);
    assert!(matches!(
        tallied(&[("a", 3, 0)], &[sha]).unwrap_err()[..],
        [Mismatch::Algorithm { .. }]
    ));
}

/// A message of a million lines helps nobody, and does not fit in memory.
#[test]
fn a_tally_names_so_many_differences_and_counts_the_rest() {
    let mut tally = Tally::new();
    for number in 0..1000 {
        tally.listed(&listed(&format!("{number:04}"), 1, 1));
    }
    let found = tally.finish().unwrap_err();
    assert_eq!(found.named.len(), Differences::NAMED_MAX);
    assert_eq!(found.more, 900);
    assert!(
        found
            .named
            .is_sorted_by_key(|mismatch| mismatch.path().clone())
    );
}
