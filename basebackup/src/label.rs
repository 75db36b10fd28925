//! `backup_label`: where recovery of a base backup has to begin.

use std::str::FromStr;

use wal::{Lsn, SegmentName, TimelineId};

use crate::lines::{Lines, Unexpected};

/// What `backup_label` says (xlogbackup.c, `build_backup_content`; 13 and 14: xlog.c,
/// `do_pg_start_backup`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackupLabel {
    /// Where replay begins: the checkpoint's redo position.
    pub start_lsn: Lsn,
    /// The segment that holds `start_lsn`.
    pub start_segment: SegmentName,
    /// Where the checkpoint's record stands.
    pub checkpoint_lsn: Lsn,
    /// How the backup was made.
    pub method: Method,
    /// What kind of server it was made from.
    pub from: Origin,
    /// When it began, in the server's `log_timezone`: for people.
    pub start_time: String,
    /// The label given to it; bytes that are not UTF-8 are replaced.
    pub label: String,
    /// The timeline that `start_lsn` belongs to.
    pub start_timeline: TimelineId,
    /// The backup that this one is an increment of (17 and later). No server starts with it.
    pub incremental: Option<IncrementalFrom>,
}

/// How a backup was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// With `BASE_BACKUP`, or with `pg_backup_start`.
    Streamed,
    /// With the exclusive `pg_start_backup` of 14 and earlier.
    PgStartBackup,
}

/// What kind of server a backup was made from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// A primary (13 writes `master`).
    Primary,
    /// A standby: recovery needs `pg_control`'s end position, not an end-of-backup record.
    Standby,
}

/// The backup that an increment builds on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IncrementalFrom {
    /// Its start position.
    pub lsn: Lsn,
    /// Its timeline.
    pub timeline: TimelineId,
}

/// Why bytes are not a `backup_label`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("backup_label is damaged at line {line}: expected {expected:?}, found {found:?}")]
pub struct LabelError {
    /// The line's number, from 1.
    pub line: usize,
    /// What the line has to begin with.
    pub expected: &'static str,
    /// The line, at most its first 200 bytes; `None` is the end of the file.
    pub found: Option<String>,
}

impl BackupLabel {
    /// Reads `backup_label`. `bytes` may be damaged or hostile: never panics, allocates at most a
    /// multiple of its length.
    pub fn parse(bytes: &[u8]) -> Result<Self, LabelError> {
        let mut lines = Lines::new(bytes);
        let (start_lsn, start_segment) = field(&mut lines, "START WAL LOCATION: ", location)?;
        let checkpoint_lsn = field(&mut lines, "CHECKPOINT LOCATION: ", parsed)?;
        let method = field(&mut lines, "BACKUP METHOD: ", |text| match text {
            "streamed" => Some(Method::Streamed),
            "pg_start_backup" => Some(Method::PgStartBackup),
            _ => None,
        })?;
        let from = field(&mut lines, "BACKUP FROM: ", |text| match text {
            "primary" | "master" => Some(Origin::Primary),
            "standby" => Some(Origin::Standby),
            _ => None,
        })?;
        let start_time = text(&mut lines, "START TIME: ")?;
        let label = text(&mut lines, "LABEL: ")?;
        let start_timeline = field(&mut lines, "START TIMELINE: ", parsed)?;
        let incremental = match lines.end() {
            Ok(()) => None,
            Err(_) => Some(IncrementalFrom {
                lsn: field(&mut lines, "INCREMENTAL FROM LSN: ", parsed)?,
                timeline: field(&mut lines, "INCREMENTAL FROM TLI: ", parsed)?,
            }),
        };
        lines
            .end()
            .map_err(|unexpected| LabelError::new("end of file", unexpected))?;
        Ok(Self {
            start_lsn,
            start_segment,
            checkpoint_lsn,
            method,
            from,
            start_time,
            label,
            start_timeline,
            incremental,
        })
    }

    /// The bytes of `backup_label` without the two lines that make it an increment's: what stands
    /// in a full backup that was put together from one (`pg_combinebackup/backup_label.c`).
    ///
    /// `bytes` have to be those of a label; where those lines are not in it, they come back as they
    /// are.
    pub fn without_increment(bytes: &[u8]) -> Result<Vec<u8>, LabelError> {
        let full = |line: &&[u8]| !line.starts_with(b"INCREMENTAL FROM ");
        Self::parse(bytes)?;
        let lines = bytes.split_inclusive(|byte| *byte == b'\n');
        Ok(lines.filter(full).flatten().copied().collect())
    }
}

impl LabelError {
    fn new(expected: &'static str, unexpected: Unexpected) -> Self {
        Self {
            line: unexpected.line,
            expected,
            found: unexpected.found,
        }
    }
}

/// A line whose value `parse` understands.
fn field<T>(
    lines: &mut Lines<'_>,
    prefix: &'static str,
    parse: impl Fn(&str) -> Option<T>,
) -> Result<T, LabelError> {
    let value = lines
        .expect(prefix)
        .map_err(|unexpected| LabelError::new(prefix, unexpected))?;
    std::str::from_utf8(value)
        .ok()
        .and_then(parse)
        .ok_or_else(|| LabelError::new(prefix, lines.wrong(value)))
}

/// A line whose value is for people.
fn text(lines: &mut Lines<'_>, prefix: &'static str) -> Result<String, LabelError> {
    let value = lines
        .expect(prefix)
        .map_err(|unexpected| LabelError::new(prefix, unexpected))?;
    Ok(String::from_utf8_lossy(value).into_owned())
}

fn parsed<T: FromStr>(text: &str) -> Option<T> {
    text.parse().ok()
}

/// `0/2000028 (file 000000010000000000000002)`
fn location(text: &str) -> Option<(Lsn, SegmentName)> {
    let (lsn, file) = text.split_once(" (file ")?;
    Some((lsn.parse().ok()?, file.strip_suffix(')')?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LABEL: &str = "START WAL LOCATION: 0/900028 (file 000000010000000000000009)\n\
        CHECKPOINT LOCATION: 0/900080\nBACKUP METHOD: streamed\nBACKUP FROM: primary\n\
        START TIME: 2026-11-20 23:19:04 UTC\nLABEL: anywhen\nSTART TIMELINE: 1\n";

    #[test]
    fn reads_what_a_server_wrote() {
        let label = BackupLabel::parse(LABEL.as_bytes()).unwrap();
        assert_eq!(label.start_lsn, Lsn::new(0x90_0028));
        assert_eq!(label.start_segment.to_string(), "000000010000000000000009");
        assert_eq!(label.checkpoint_lsn, Lsn::new(0x90_0080));
        assert_eq!(
            (label.method, label.from),
            (Method::Streamed, Origin::Primary)
        );
        assert_eq!(label.start_time, "2026-11-20 23:19:04 UTC");
        assert_eq!(label.label, "anywhen");
        assert_eq!(label.start_timeline.get(), 1);
        assert_eq!(label.incremental, None);
    }

    #[test]
    fn reads_the_lines_that_some_majors_and_servers_write_differently() {
        let standby = LABEL
            .replace("primary", "standby")
            .replace("streamed", "pg_start_backup");
        let label = BackupLabel::parse(standby.as_bytes()).unwrap();
        assert_eq!(
            (label.method, label.from),
            (Method::PgStartBackup, Origin::Standby)
        );
        let master = LABEL
            .replace("primary", "master")
            .replace("0/9000", "0/009000");
        let label = BackupLabel::parse(master.as_bytes()).unwrap();
        assert_eq!(
            (label.from, label.start_lsn),
            (Origin::Primary, Lsn::new(0x90_0028))
        );
        let odd = [b"a\xFFb", &b""[..]].concat();
        let odd = LABEL
            .as_bytes()
            .split(|byte| *byte == b'\n')
            .flat_map(|line| {
                let line = if line.starts_with(b"LABEL: ") {
                    [b"LABEL: ", odd.as_slice()].concat()
                } else {
                    line.to_vec()
                };
                [line, b"\n".to_vec()].concat()
            });
        let mut odd: Vec<u8> = odd.collect();
        odd.pop();
        assert_eq!(BackupLabel::parse(&odd).unwrap().label, "a\u{FFFD}b");
    }

    /// An increment on its own is not a cluster; taking it for a full backup would lose everything
    /// older than it.
    #[test]
    fn tells_an_increment_from_a_full_backup() {
        let text = format!("{LABEL}INCREMENTAL FROM LSN: 0/3000028\nINCREMENTAL FROM TLI: 2\n");
        let from = BackupLabel::parse(text.as_bytes())
            .unwrap()
            .incremental
            .unwrap();
        assert_eq!((from.lsn, from.timeline.get()), (Lsn::new(0x300_0028), 2));
        let text = format!("{LABEL}INCREMENTAL FROM LSN: 0/3000028\n");
        BackupLabel::parse(text.as_bytes()).unwrap_err();
    }

    /// No server starts with those lines in place.
    #[test]
    fn takes_the_increment_out_and_nothing_else() {
        let odd = LABEL.replace(
            "LABEL: anywhen",
            "LABEL: INCREMENTAL FROM LSN: 0/1 \u{fffd}",
        );
        for full in [LABEL, &odd] {
            let text = format!("{full}INCREMENTAL FROM LSN: 0/3000028\nINCREMENTAL FROM TLI: 2\n");
            for text in [full, &text] {
                let found = BackupLabel::without_increment(text.as_bytes()).unwrap();
                assert_eq!(found, full.as_bytes());
                assert_eq!(BackupLabel::parse(&found).unwrap().incremental, None);
            }
        }
        let half = format!("{LABEL}INCREMENTAL FROM LSN: 0/3000028\n");
        BackupLabel::without_increment(half.as_bytes()).unwrap_err();
    }

    #[test]
    fn names_the_line_that_is_wrong() {
        let bad = LABEL.replace("BACKUP FROM: primary", "BACKUP FROM: nowhere");
        let error = BackupLabel::parse(bad.as_bytes()).unwrap_err();
        assert_eq!((error.line, error.expected), (4, "BACKUP FROM: "));
        assert_eq!(error.found.as_deref(), Some("nowhere"));
        for length in 0..LABEL.len() {
            BackupLabel::parse(&LABEL.as_bytes()[..length]).unwrap_err();
        }
        let more = format!("{LABEL}SOMETHING NEW: 1\n");
        let error = BackupLabel::parse(more.as_bytes()).unwrap_err();
        assert_eq!(
            (error.line, error.found.as_deref()),
            (8, Some("SOMETHING NEW: 1"))
        );
        let cut = format!("{LABEL}x");
        BackupLabel::parse(cut.as_bytes()).unwrap_err();
    }
}
