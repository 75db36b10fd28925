//! Whole backups as servers of every major sent them: messages, archives, and the manifest that
//! has to agree with them. The content of most files is blanked (see `golden/record`), so their
//! sizes are compared, and the checksums of those that are whole.

use std::collections::BTreeMap;

use basebackup::label::{Method, Origin};
use basebackup::stream::{Event, Events, Form, Tablespace, Totals};
use basebackup::{
    Algorithm, BackupLabel, ControlFile, FileChecker, Ledger, Manifest, Mismatch, RelativePath,
    TarEvent, TarParser,
};
use wal::Major;

use crate::golden;

#[derive(Default)]
struct Received {
    ledger: Ledger,
    manifest: Vec<u8>,
    links: BTreeMap<String, String>,
    directories: Vec<String>,
    /// The content of files that are small.
    small: BTreeMap<String, Vec<u8>>,
    totals: Option<Totals>,
}

/// The messages of a recording: type and payload.
fn messages(recording: &[u8]) -> Vec<(u8, &[u8])> {
    let mut messages = Vec::new();
    let mut rest = recording;
    while let Some((&[kind, a, b, c, d], after)) = rest.split_first_chunk::<5>() {
        let length = usize::try_from(u32::from_le_bytes([a, b, c, d])).unwrap();
        let (payload, after) = after.split_at(length);
        messages.push((kind, payload));
        rest = after;
    }
    assert!(rest.is_empty());
    messages
}

fn tablespace(row: &[u8]) -> Tablespace {
    let mut rest = row;
    let mut fields = [const { None::<String> }; 3];
    for field in &mut fields {
        let (length, after) = rest.split_first_chunk().unwrap();
        rest = after;
        if let Ok(length) = usize::try_from(i32::from_be_bytes(*length)) {
            let (text, after) = rest.split_at(length);
            *field = Some(String::from_utf8(text.to_vec()).unwrap());
            rest = after;
        }
    }
    let [oid, location, size_kib] = fields;
    Tablespace {
        oid: oid.map(|oid| oid.parse().unwrap()),
        location,
        size_kib: size_kib.map(|size| size.parse().unwrap()),
    }
}

fn receive(major: Major) -> Received {
    let recording = golden(major, "backup.zst");
    let messages = messages(&recording);
    let rows = messages.iter().filter(|(kind, _)| *kind == b'D');
    let rows = rows.map(|(_, row)| tablespace(row)).collect();
    let form = if major >= Major::V15 {
        Form::Typed
    } else {
        Form::PerArchive
    };
    let mut events = Events::new(form, rows).unwrap();
    let mut received = Received::default();
    let mut archive = None;
    for (kind, payload) in messages {
        let happened = match kind {
            b'H' => events.copy_out_begins().unwrap().into_iter().collect(),
            b'c' => events.copy_out_ends().unwrap().into_iter().collect(),
            b'd' => events.copy_data(payload).unwrap(),
            _ => Vec::new(),
        };
        for event in happened {
            match event {
                Event::ArchiveBegins { tablespace } => {
                    assert!(archive.is_none());
                    archive = Some(Archive::new(tablespace.oid));
                }
                Event::Data(data) => archive.as_mut().unwrap().take(data, &mut received),
                Event::ArchiveEnds => archive.take().unwrap().parser.finish().unwrap(),
                Event::ManifestData(data) => received.manifest.extend_from_slice(data),
                Event::ManifestBegins | Event::ManifestEnds | Event::Progress(_) => {}
            }
        }
    }
    received.totals = Some(events.finish().unwrap());
    received
}

struct Archive {
    oid: Option<u32>,
    parser: TarParser,
    file: Option<(RelativePath, FileChecker, Vec<u8>)>,
}

impl Archive {
    fn new(oid: Option<u32>) -> Self {
        Self {
            oid,
            parser: TarParser::new(),
            file: None,
        }
    }

    fn take(&mut self, mut data: &[u8], received: &mut Received) {
        while let Some(event) = self.parser.next_event(&mut data).unwrap() {
            match event {
                TarEvent::File { path, mode, .. } => {
                    // The odd names were not made by the server.
                    let odd = path.as_bytes().starts_with(b"odd");
                    assert_eq!(mode, if odd { 0o644 } else { 0o600 });
                    let path = match self.oid {
                        Some(oid) => RelativePath::in_tablespace(oid, &path),
                        None => path,
                    };
                    self.file = Some((path, FileChecker::new(Algorithm::Crc32c), Vec::new()));
                }
                TarEvent::FileData(bytes) => {
                    let (_, checker, content) = self.file.as_mut().unwrap();
                    checker.update(bytes);
                    if content.len() < 10_000 {
                        content.extend_from_slice(bytes);
                    }
                }
                TarEvent::FileEnd => {
                    let (path, checker, content) = self.file.take().unwrap();
                    received.small.insert(path.to_string(), content);
                    received.ledger.record(path, checker.finish());
                }
                TarEvent::Directory { path, mode } => {
                    assert_eq!(mode, 0o700);
                    received.directories.push(path.to_string());
                }
                TarEvent::Symlink { path, target, .. } => {
                    let target = String::from_utf8(target).unwrap();
                    received.links.insert(path.to_string(), target);
                }
            }
        }
    }
}

/// The whole way of a backup, on every major, against the server's own list.
#[test]
fn every_file_of_every_major_is_listed_by_its_server_and_the_other_way_round() {
    for major in Major::ALL {
        let received = receive(major);
        let manifest = Manifest::parse(&received.manifest, 1 << 20).unwrap();
        let expected = if major >= Major::V17 { 2 } else { 1 };
        assert_eq!(manifest.version, expected);
        assert!(
            manifest.files.len() > 900,
            "{major}: {} files",
            manifest.files.len()
        );
        // Blanked files have another checksum, and never another size or name.
        let blanked = received.ledger.compare(&manifest).unwrap_err();
        for mismatch in &blanked {
            let Mismatch::Checksum { path, .. } = mismatch else {
                panic!("{major}: {mismatch}")
            };
            let kept = ["backup_label", "global/pg_control", "PG_VERSION"];
            let path = path.to_string();
            assert!(
                !kept.iter().any(|kept| path.ends_with(kept)),
                "{major}: {path}"
            );
        }
        assert!(blanked.len() < received.ledger.len() - 3);
        let totals = received.totals.unwrap();
        assert_eq!(totals.manifest_bytes, Some(received.manifest.len() as u64));
        assert!(totals.archive_bytes > 20 << 20);
    }
}

/// Without the server's `tablespace_map` the links come in the archive of the data directory, and
/// a directory may come as `./pg_wal/archive_status/`.
#[test]
fn links_and_directories_come_under_plain_paths() {
    for major in Major::ALL {
        let received = receive(major);
        let links: Vec<_> = received.links.iter().collect();
        assert_eq!(links.len(), 2, "{major}");
        assert_eq!(links[0].0, "pg_tblspc/16384");
        assert!(links[0].1.ends_with("/places/äöü"), "{links:?}");
        assert_eq!(links[1].0, "pg_tblspc/16385");
        assert!(links[1].1.ends_with("/places/b a\\ck"), "{links:?}");
        for directory in [
            "pg_wal",
            "pg_wal/archive_status",
            "pg_tblspc",
            "base/1",
            "pg_replslot",
        ] {
            let count = received
                .directories
                .iter()
                .filter(|path| *path == directory)
                .count();
            assert_eq!(count, 1, "{directory} of {major}");
        }
        assert_eq!(
            received
                .directories
                .contains(&"pg_wal/summaries".to_owned()),
            major >= Major::V17
        );
        assert!(!received.small.contains_key("tablespace_map"));
    }
}

#[test]
fn label_control_file_and_manifest_of_a_backup_agree() {
    for major in Major::ALL {
        let received = receive(major);
        let manifest = Manifest::parse(&received.manifest, 1 << 20).unwrap();
        let control = ControlFile::parse(&received.small["global/pg_control"]).unwrap();
        let label = BackupLabel::parse(&received.small["backup_label"]).unwrap();
        assert_eq!(control.major, Some(major));
        assert_eq!(
            manifest.system_id.unwrap_or(control.system_id),
            control.system_id
        );
        assert_eq!(label.checkpoint_lsn, control.checkpoint_lsn);
        assert_eq!(label.start_lsn, control.checkpoint.redo);
        assert_eq!(label.start_timeline, control.checkpoint.timeline);
        assert_eq!(label.label, "anywhen golden");
        assert_eq!(
            (label.method, label.from),
            (Method::Streamed, Origin::Primary)
        );
        let range = label.start_segment.range(control.segment_size).unwrap();
        assert!(range.contains(label.start_lsn));
        let [wal] = manifest.wal_ranges.as_slice() else {
            panic!("one range on one timeline")
        };
        assert_eq!(
            (wal.timeline, wal.range.start),
            (label.start_timeline, label.start_lsn)
        );
        assert!(wal.range.end > label.checkpoint_lsn);
        assert_eq!(
            received.small["PG_VERSION"],
            format!("{}\n", major.number()).into_bytes()
        );
    }
}
