//! Tables and sentences that a person can read.

use std::fmt::Write as _;

use comfy_table::presets::NOTHING;
use comfy_table::{CellAlignment, Table};
use indicatif::HumanBytes;
use jiff::Timestamp;
use jiff::tz::TimeZone;

use super::{
    BackupRow, ClusterStatus, HoleStatus, List, RepositoryStatus, SpoolStatus, TimelineStatus,
    UnreadableBackup,
};
use crate::repository::records::DamagedPages;

/// What can be restored of one cluster.
pub fn status_text(status: &ClusterStatus, with_timelines: bool, now: Timestamp) -> String {
    let mut text = format!("cluster {} (system {}", status.name, status.system_id);
    if let Some(major) = status.postgres_major {
        add(&mut text, format_args!(", PostgreSQL {major}"));
    }
    text.push_str(")\n");
    add_windows(&mut text, status);
    if let Some(seconds) = status.seconds_at_risk {
        add(
            &mut text,
            format_args!("  at risk     {} of work\n", seconds_shown(seconds)),
        );
    }
    add_holes(&mut text, status);
    for left in &status.left_behind {
        add(
            &mut text,
            format_args!(
                "  left behind timeline {} from {} to {}, not in timeline {}. hint: restore --timeline {}\n",
                left.timeline, left.fork_lsn, left.stored_lsn, left.next, left.timeline
            ),
        );
    }
    if let Some(tip) = &status.tip {
        let confirmed = shown(tip.confirmed_at);
        add(
            &mut text,
            format_args!(
                "  stream      last confirmed up to {}, at {confirmed}\n",
                tip.lsn
            ),
        );
    } else {
        text.push_str("  stream      has never run. hint: anywhen stream\n");
    }
    let last = status.last_backup.as_deref().unwrap_or("none");
    let age = status.last_backup_at.map_or_else(String::new, |at| {
        let seconds = now.duration_since(at).as_secs_f64().max(0.0);
        format!(", {} ago", seconds_shown(seconds))
    });
    add(
        &mut text,
        format_args!("  backups     {}, last {last}{age}\n", status.backup_count),
    );
    if let Some(first) = status.unreadable_backups.first() {
        let sentence = unreadable_sentence(status.unreadable_backups.len(), first);
        add(&mut text, format_args!("  UNREADABLE  {sentence}"));
        add_hint(&mut text, first);
    }
    add(
        &mut text,
        format_args!(
            "  stored      {} of WAL, {} of backups\n",
            HumanBytes(status.stored.wal_bytes),
            HumanBytes(status.stored.backup_bytes)
        ),
    );
    if let Some(spool) = &status.spool {
        add(
            &mut text,
            format_args!("  SPOOL       {}\n", spool_line(spool)),
        );
    }
    if let Some(reason) = &status.spool_error {
        add(
            &mut text,
            format_args!(
                "  SPOOL       not known: {reason}. hint: run this as the stream's user\n"
            ),
        );
    }
    if status.repositories.len() > 1 {
        for repository in &status.repositories {
            add(
                &mut text,
                format_args!("  {}\n", repository_line(repository)),
            );
        }
    }
    if with_timelines {
        text.push_str("  timelines\n");
        let mut roots = status.timelines.iter();
        for root in roots.by_ref().filter(|timeline| timeline.parent.is_none()) {
            draw(&mut text, status, root, 2);
        }
    }
    text
}

/// What is in a spool, in one line.
pub(super) fn spool_line(spool: &SpoolStatus) -> String {
    let mut line = format!(
        "{} objects, {} in the spool, not yet in the repository",
        spool.objects,
        HumanBytes(spool.bytes)
    );
    if let (Some(timeline), Some(start), Some(end)) =
        (spool.timeline, spool.start_lsn, spool.end_lsn)
    {
        add(
            &mut line,
            format_args!(", from {start} to {end} on timeline {timeline}"),
        );
    }
    line
}

fn add_windows(text: &mut String, status: &ClusterStatus) {
    if status.windows.is_empty() {
        text.push_str(
            match (status.backup_count, status.unreadable_backups.len()) {
                (0, 0) => {
                    "  nothing can be restored yet: there is no backup. hint: anywhen backup\n"
                }
                (0, _) => "  NOTHING can be restored: no backup can be read\n",
                _ => {
                    "  nothing can be restored yet: WAL that the backups need is missing. hint: \
                 anywhen backup\n"
                }
            },
        );
    }
    for window in &status.windows {
        add(
            text,
            format_args!(
                "  restorable  {} to {}  (timeline {}, {} to {})\n",
                shown(window.earliest),
                shown(window.latest),
                window.timeline,
                window.earliest_lsn,
                window.latest_lsn
            ),
        );
    }
    let mut windows = status.windows.iter();
    if windows.any(|window| window.latest_is_lower_bound) {
        text.push_str(
            "              or later: the newest commits are read with an identity only\n",
        );
    }
}

fn repository_line(repository: &RepositoryStatus) -> String {
    let (name, url) = (&repository.name, &repository.url);
    match (&repository.error, repository.missing_objects) {
        (Some(error), _) => format!("AWAY        {name} ({url}): {error}"),
        (None, Some(0) | None) => format!("repository  {name} ({url})"),
        (None, Some(missing)) => format!(
            "BEHIND      {name} ({url}) lacks {missing} objects. hint: a running stream fills it up"
        ),
    }
}

fn add_holes(text: &mut String, status: &ClusterStatus) {
    for hole in &status.holes {
        let advice = if status.windows.iter().any(|window| window.is_behind(hole)) {
            "; a later backup has opened a window behind it"
        } else {
            ". hint: a backup after it opens a new window"
        };
        add(
            text,
            format_args!(
                "  HOLE        timeline {}, {} to {}{}{advice}\n",
                hole.timeline,
                hole.start_lsn,
                hole.end_lsn,
                moments_shown(hole)
            ),
        );
    }
}

/// The moments around a hole, as far as they are known.
fn moments_shown(hole: &HoleStatus) -> String {
    match (hole.earliest.map(shown), hole.latest.map(shown)) {
        (Some(before), Some(after)) => format!(", between {before} and {after}"),
        (Some(before), None) => format!(", after {before}"),
        (None, Some(after)) => format!(", before {after}"),
        (None, None) => String::new(),
    }
}

/// A timeline, how it came to be, what is stored and can be restored of it, and below it those that left it.
fn draw(text: &mut String, status: &ClusterStatus, timeline: &TimelineStatus, depth: usize) {
    let indent = "  ".repeat(depth);
    add(text, format_args!("{indent}"));
    if let Some(fork) = timeline.fork_lsn {
        add(text, format_args!("└ {} from {fork}", timeline.timeline));
    } else {
        add(text, format_args!("{}", timeline.timeline));
    }
    if let Some(reason) = &timeline.reason {
        add(text, format_args!(" ({reason})"));
    }
    if let (Some(start), Some(end)) = (timeline.start_lsn, timeline.end_lsn) {
        add(text, format_args!(", WAL {start} to {end}"));
    }
    match timeline.backup_count {
        0 => {}
        1 => text.push_str(", 1 backup"),
        count => add(text, format_args!(", {count} backups")),
    }
    let mut windows = status.windows.iter();
    match windows.rfind(|window| window.timeline == timeline.timeline) {
        Some(window) => add(
            text,
            format_args!(", restorable to {}\n", shown(window.latest)),
        ),
        None => text.push('\n'),
    }
    let children = status.timelines.iter().filter(|child| {
        child.parent == Some(timeline.timeline) && child.timeline > timeline.timeline
    });
    for child in children {
        draw(text, status, child, depth + 1);
    }
}

/// How many backups cannot be read, and why the first of them cannot.
pub(super) fn unreadable_sentence(count: usize, first: &UnreadableBackup) -> String {
    let word = if count == 1 { "backup" } else { "backups" };
    format!("{count} {word} cannot be read: {}", first.reason)
}

fn add_hint(text: &mut String, backup: &UnreadableBackup) {
    match &backup.hint {
        Some(hint) => add(text, format_args!(". hint: {hint}\n")),
        None => text.push('\n'),
    }
}

/// The backups as a table, and below it those that cannot be read.
pub fn list_text(list: &List) -> String {
    let mut text = match (list.backups.as_slice(), list.unreadable_backups.as_slice()) {
        ([], []) => return "no backups. hint: anywhen backup".to_owned(),
        ([], _) => String::new(),
        (rows, _) => list_table(rows) + "\n",
    };
    for row in list.backups.iter().filter(|row| row.damaged_page_count > 0) {
        add(
            &mut text,
            format_args!("DAMAGED {}: {}\n", row.id, damaged_sentence(row)),
        );
    }
    for backup in &list.unreadable_backups {
        let UnreadableBackup { id, reason, .. } = backup;
        add(&mut text, format_args!("UNREADABLE {id}: {reason}"));
        add_hint(&mut text, backup);
    }
    text.trim_end().to_owned()
}

fn damaged_sentence(row: &BackupRow) -> String {
    let count = row.damaged_page_count;
    let shown = DamagedPages::shown(&row.damaged_pages);
    let named = if shown.is_empty() {
        shown
    } else {
        format!(": {shown}")
    };
    format!("the server's pages with a wrong checksum: {count}{named}")
}

fn list_table(rows: &[BackupRow]) -> String {
    let mut table = Table::new();
    table.load_style(NOTHING);
    table.set_header(vec![
        "id",
        "cluster",
        "finished",
        "PostgreSQL",
        "files",
        "size",
        "stored",
        "timeline",
        "label",
    ]);
    for row in rows {
        table.add_row(vec![
            row.id.clone(),
            row.cluster.clone(),
            shown(row.finished_at),
            row.postgres_version.clone(),
            row.files.to_string(),
            HumanBytes(row.bytes).to_string(),
            HumanBytes(row.stored_bytes).to_string(),
            row.timeline.to_string(),
            row.label.clone(),
        ]);
    }
    for column in 4..8 {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table.to_string()
}

/// One backup that has just been taken.
pub fn backup_table(row: &BackupRow) -> String {
    // a standby's backup ends at the last commit that it has replayed, which may be old
    let took = row.finished_at.duration_since(row.started_at).as_secs_f64();
    let took = took.max(0.0);
    format!(
        "backup {} is complete: {} files, {}, stored as {}, in {}; restorable from {} on",
        row.id,
        row.files,
        HumanBytes(row.bytes),
        HumanBytes(row.stored_bytes),
        seconds_shown(took),
        shown(row.finished_at)
    )
}

/// A moment in local time, to the second, with the zone.
fn shown(time: Timestamp) -> String {
    time.to_zoned(TimeZone::system())
        .strftime("%Y-%m-%d %H:%M:%S %Z")
        .to_string()
}

fn seconds_shown(seconds: f64) -> String {
    if seconds < 120.0 {
        format!("{seconds:.1} s")
    } else if seconds < 7200.0 {
        format!("{:.0} min", seconds / 60.0)
    } else {
        format!("{:.1} h", seconds / 3600.0)
    }
}

fn add(text: &mut String, arguments: std::fmt::Arguments<'_>) {
    text.write_fmt(arguments)
        .expect("writing to a String cannot fail");
}
