//! `backup_manifest`, written file by file.

use std::fmt::{self, Write as _};

use serde_json::Value;
use sha2::{Digest as _, Sha256};

use super::{CHECKSUM_AFTER, CHECKSUM_BEFORE, ManifestFile, ManifestWalRange};
use crate::Checksum;

/// Writes `backup_manifest` as a server does, without holding it: every call appends to its `out`
/// the bytes that follow those of the call before.
///
/// What [`super::Manifest::write`] says of its bytes holds for these.
#[derive(Debug, Clone)]
pub struct ManifestWriter {
    /// Of all bytes so far: the checksum on the last line.
    hasher: Sha256,
    /// What stands between the entry before and the next one.
    before_next: &'static str,
}

const FIRST: &str = "\n";
const NEXT: &str = ",\n";

impl ManifestWriter {
    /// Begins a manifest of `version` 1, or of 2 with the system identifier.
    pub fn new(version: u32, system_id: Option<u64>, out: &mut Vec<u8>) -> Self {
        let mut writer = Self {
            hasher: Sha256::new(),
            before_next: FIRST,
        };
        writer.put(out, |out| {
            writeln!(out, "{{ \"PostgreSQL-Backup-Manifest-Version\": {version},")?;
            if let Some(system_id) = system_id {
                writeln!(out, "\"System-Identifier\": {system_id},")?;
            }
            write!(out, "\"Files\": [")
        });
        writer
    }

    /// The next file.
    pub fn file(&mut self, file: &ManifestFile, out: &mut Vec<u8>) {
        let before = std::mem::replace(&mut self.before_next, NEXT);
        self.put(out, |out| {
            out.push_str(before);
            write_file(out, file)
        });
    }

    /// Ends the manifest with the WAL that the backup needs, the newest timeline first.
    pub fn finish(mut self, wal_ranges: &[ManifestWalRange], out: &mut Vec<u8>) {
        self.put(out, |out| {
            write!(out, "\n],\n\"WAL-Ranges\": [")?;
            for (index, range) in wal_ranges.iter().enumerate() {
                out.push_str(if index == 0 { FIRST } else { NEXT });
                write_wal_range(out, range)?;
            }
            writeln!(out, "\n],")
        });
        let checksum = Checksum::Sha256(self.hasher.finalize().into());
        let last = format!("{CHECKSUM_BEFORE}{checksum}{CHECKSUM_AFTER}\n");
        out.extend_from_slice(last.as_bytes());
    }

    /// Appends what `write` writes, which counts towards the checksum.
    fn put(&mut self, out: &mut Vec<u8>, write: impl FnOnce(&mut String) -> fmt::Result) {
        let mut text = String::new();
        write(&mut text).expect("a String takes all that is written to it");
        self.hasher.update(text.as_bytes());
        out.extend_from_slice(text.as_bytes());
    }
}

/// Strings are escaped as utils/adt/json.c, `escape_json` does.
fn write_file(out: &mut String, file: &ManifestFile) -> fmt::Result {
    let path = file.path.as_bytes();
    if let Ok(path) = std::str::from_utf8(path) {
        write!(out, "{{ \"Path\": {}", Value::from(path))?;
    } else {
        write!(out, "{{ \"Encoded-Path\": \"")?;
        path.iter().try_for_each(|byte| write!(out, "{byte:02x}"))?;
        write!(out, "\"")?;
    }
    write!(out, ", \"Size\": {}", file.sum.size)?;
    if let Some(last_modified) = &file.last_modified {
        write!(
            out,
            ", \"Last-Modified\": {}",
            Value::from(last_modified.as_str())
        )?;
    }
    let checksum = &file.sum.checksum;
    if *checksum != Checksum::None {
        let algorithm = checksum.algorithm();
        write!(
            out,
            ", \"Checksum-Algorithm\": \"{algorithm}\", \"Checksum\": \"{checksum}\""
        )?;
    }
    write!(out, " }}")
}

fn write_wal_range(out: &mut String, wal: &ManifestWalRange) -> fmt::Result {
    let ManifestWalRange { timeline, range } = wal;
    write!(out, "{{ \"Timeline\": {timeline}, ")?;
    write!(
        out,
        "\"Start-LSN\": \"{}\", \"End-LSN\": \"{}\" }}",
        range.start, range.end
    )
}
