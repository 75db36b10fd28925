//! `backup_manifest` as servers write it, read and written.

use std::error::Error as _;

use basebackup::manifest::{FileFault, ManifestError, ManifestWalRange};
use basebackup::{Algorithm, Checksum, FileChecker, FileSum, Manifest, ManifestFile, RelativePath};
use proptest::prelude::*;
use sha2::{Digest as _, Sha256};
use wal::{Lsn, Major, TimelineId, WalRange};

use crate::golden;

const LIMIT: u64 = 1 << 22;

/// A manifest with these bytes before its last line, and the checksum that belongs to them.
pub(crate) fn sealed_bytes(text: &[u8]) -> Vec<u8> {
    let checksum = Checksum::Sha256(Sha256::digest(text).into());
    let last = format!("\"Manifest-Checksum\": \"{checksum}\"}}\n");
    [text, last.as_bytes()].concat()
}

fn sealed(text: &str) -> Vec<u8> {
    sealed_bytes(text.as_bytes())
}

fn with_file(entry: &str) -> Vec<u8> {
    sealed(&format!(
        "{{ \"PostgreSQL-Backup-Manifest-Version\": 1,\n\"Files\": [\n{entry}\n],\n\
         \"WAL-Ranges\": [\n{{ \"Timeline\": 1, \"Start-LSN\": \"0/28\", \"End-LSN\": \"0/30\" }}\n],\n"
    ))
}

/// Restored with a changed manifest, a backup could not be verified by anyone's tool.
#[test]
fn writes_what_a_server_wrote_byte_for_byte() {
    for major in [Major::V13, Major::V17, Major::V18] {
        let bytes = golden(major, "backup_manifest.zst");
        let manifest = Manifest::parse(&bytes, LIMIT).unwrap();
        assert!(manifest.files.len() > 900);
        for file in &manifest.files {
            assert_eq!(file.sum.checksum.algorithm(), Algorithm::Sha256);
            if file.path.as_bytes() == b"PG_VERSION" {
                let mut checker = FileChecker::new(Algorithm::Sha256);
                checker.update(format!("{}\n", major.number()).as_bytes());
                assert!(checker.matches(&file.sum));
            }
        }
        assert!(
            manifest
                .files
                .iter()
                .any(|file| file.path.as_bytes() == b"PG_VERSION")
        );
        assert_eq!(manifest.system_id.is_some(), major >= Major::V17);
        assert_eq!(manifest.write(), bytes, "{major}");
    }
}

#[test]
fn finds_any_changed_byte() {
    let good = with_file(r#"{ "Path": "a", "Size": 3 }"#);
    Manifest::parse(&good, LIMIT).unwrap();
    for at in 0..good.len() {
        for bit in 0..8 {
            let mut bad = good.clone();
            bad[at] ^= 1 << bit;
            // The hex digits of the checksum may be of either case.
            if at > good.len() - 68 && bad[at].is_ascii_alphabetic() && bit == 5 {
                continue;
            }
            assert!(
                Manifest::parse(&bad, LIMIT).is_err(),
                "bit {bit} of byte {at}"
            );
        }
        assert!(Manifest::parse(&good[..at], LIMIT).is_err(), "cut at {at}");
    }
    let mut more = good;
    more.push(b'\n');
    assert!(Manifest::parse(&more, LIMIT).is_err());
}

#[test]
fn refuses_what_it_would_have_to_guess_at() {
    let list = r#""Files": [], "WAL-Ranges": [],"#;
    for text in [
        "",
        "{\n",
        "[\n",
        "{{\n",
        &format!("{{ {list}\n"),
        &format!("{{ {list} \"PostgreSQL-Backup-Manifest-Version\": 1,\n"),
        &format!("{{ \"PostgreSQL-Backup-Manifest-Version\": 1, \"New\": 1, {list}\n"),
        &format!("{{ \"PostgreSQL-Backup-Manifest-Version\": 1, {list} {list}\n"),
        "{ \"PostgreSQL-Backup-Manifest-Version\": 1, \"Files\": [],\n",
        &format!("{{ \"PostgreSQL-Backup-Manifest-Version\": \"1\", {list}\n"),
        &format!(
            "{{ \"PostgreSQL-Backup-Manifest-Version\": 1, \"System-Identifier\": -1, {list}\n"
        ),
    ] {
        let error = Manifest::parse(&sealed(text), LIMIT).unwrap_err();
        assert!(matches!(error, ManifestError::Json(_)), "{text}: {error}");
        assert!(error.source().is_some());
    }
    for version in ["0", "3"] {
        let text = format!("{{ \"PostgreSQL-Backup-Manifest-Version\": {version}, {list}\n");
        let error = Manifest::parse(&sealed(&text), LIMIT).unwrap_err();
        assert!(matches!(error, ManifestError::Version { .. }), "{error}");
    }
    let good = with_file(r#"{ "Path": "a", "Size": 3 }"#);
    let error = Manifest::parse(&good, 10).unwrap_err();
    assert!(matches!(error, ManifestError::TooLarge { limit: 10, .. }));
}

#[test]
fn refuses_entries_that_make_no_sense_and_names_them() {
    let fault = |entry: &str| match Manifest::parse(&with_file(entry), LIMIT) {
        Err(ManifestError::File { number: 1, source }) => source,
        other => panic!("{entry}: {other:?}"),
    };
    assert_eq!(fault(r#"{ "Size": 3 }"#), FileFault::Paths);
    assert_eq!(
        fault(r#"{ "Path": "a", "Encoded-Path": "61", "Size": 3 }"#),
        FileFault::Paths
    );
    for hex in ["6", "6x", "\u{e4}\u{e4}"] {
        let entry = format!(r#"{{ "Encoded-Path": "{hex}", "Size": 3 }}"#);
        assert_eq!(fault(&entry), FileFault::EncodedPath(hex.to_owned()));
    }
    for path in ["../x", "/x", "", "a\\u0000b"] {
        let entry = format!(r#"{{ "Path": "{path}", "Size": 3 }}"#);
        assert!(matches!(fault(&entry), FileFault::Path(_)), "{path}");
    }
    let algorithm = r#"{ "Path": "a", "Size": 3, "Checksum-Algorithm": "MD5", "Checksum": "00" }"#;
    assert_eq!(fault(algorithm), FileFault::Algorithm("MD5".to_owned()));
    for entry in [
        r#"{ "Path": "a", "Size": 3, "Checksum": "00000000" }"#,
        r#"{ "Path": "a", "Size": 3, "Checksum-Algorithm": "CRC32C" }"#,
        r#"{ "Path": "a", "Size": 3, "Checksum-Algorithm": "SHA256", "Checksum": "00000000" }"#,
    ] {
        assert!(
            matches!(fault(entry), FileFault::Checksum { .. }),
            "{entry}"
        );
    }
    for entry in [
        r#"{ "Path": "a" }"#,
        r#"{ "Path": "a", "Size": -3 }"#,
        r#"{ "Path": "a", "Size": 3, "Colour": 1 }"#,
        r#"{ "Path": "a", "Size": 3, "Size": 3 }"#,
    ] {
        let error = Manifest::parse(&with_file(entry), LIMIT).unwrap_err();
        assert!(matches!(error, ManifestError::Json(_)), "{entry}: {error}");
    }
    for range in [
        r#""Timeline": 0, "Start-LSN": "0/28", "End-LSN": "0/30""#,
        r#""Timeline": 1, "Start-LSN": "0-28", "End-LSN": "0/30""#,
        r#""Timeline": 1, "Start-LSN": "0/38", "End-LSN": "0/30""#,
    ] {
        let text = format!(
            "{{ \"PostgreSQL-Backup-Manifest-Version\": 1, \"Files\": [], \
             \"WAL-Ranges\": [{{ {range} }}],\n"
        );
        let error = Manifest::parse(&sealed(&text), LIMIT).unwrap_err();
        assert!(matches!(error, ManifestError::WalRange { .. }), "{error}");
    }
}

fn any_file() -> impl Strategy<Value = ManifestFile> {
    let path = prop::collection::vec(any::<u8>(), 1..40)
        .prop_filter_map("a path that leads out", |bytes| {
            RelativePath::parse(&bytes).ok()
        });
    let checksum = prop_oneof![
        Just(Checksum::None),
        any::<u32>().prop_map(Checksum::Crc32c),
        any::<[u8; 32]>().prop_map(Checksum::Sha256),
        Just(Checksum::Sha512(Box::new([7; 64]))),
    ];
    (path, any::<u64>(), checksum, any::<Option<u32>>()).prop_map(
        |(path, size, checksum, modified)| ManifestFile {
            path,
            sum: FileSum { size, checksum },
            last_modified: modified.map(|number| format!("\"{number}\"\u{1f}\u{e9}")),
        },
    )
}

/// Any manifest that could be written.
pub(crate) fn any_manifest() -> impl Strategy<Value = Manifest> {
    let files = prop::collection::vec(any_file(), 0..6);
    let ranges = prop::collection::vec((1_u32.., any::<u32>(), any::<u32>()), 0..3);
    (files, any::<Option<u64>>(), ranges).prop_map(|(files, system_id, ranges)| {
        let wal_ranges = ranges.into_iter().map(|(timeline, start, length)| {
            let start = Lsn::new(u64::from(start) << 8);
            let range = WalRange::new(start, start.saturating_add(u64::from(length)));
            let timeline = TimelineId::new(timeline).unwrap();
            ManifestWalRange { timeline, range }
        });
        Manifest {
            version: 1 + u32::from(system_id.is_some()),
            system_id,
            files,
            wal_ranges: wal_ranges.collect(),
        }
    })
}

proptest! {
    #[test]
    fn reads_back_what_it_writes(manifest in any_manifest()) {
        prop_assert_eq!(Manifest::parse(&manifest.write(), LIMIT).unwrap(), manifest);
    }
}
