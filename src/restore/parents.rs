//! The parents' files of a segment in which a timeline begins.
//!
//! At a fork a server asks for the child's file alone, which begins with the parent's records. But where it
//! replays the checkpoint with which the child began, it reads what a transaction that is still prepared wrote
//! (twophase.c, `PrescanPreparedTransactions`), by the timeline that it was on until then
//! (xlogutils.c, `read_local_xlog_page`), and ends with "requested WAL segment … has already been removed"
//! where the parent's file is not in `pg_wal`. It never asks an archive for that one: so it is put there.

use std::path::Path;

use wal::{Lsn, SegmentName, SegmentSize, TimelineHistory, TimelineId};

use super::fetch::begins_with;
use crate::durable;
use crate::error::{Result, io};

/// Puts beside `dest`, in `pg_wal`, what each parent wrote of this segment, whose `bytes` begin with that, where
/// the server has no file with all of it itself.
pub(super) fn place_parents(
    branch: &TimelineHistory,
    segment: SegmentName,
    size: SegmentSize,
    bytes: &[u8],
    dest: &Path,
) {
    for (parent, fork) in parents_in(branch, segment, size) {
        let name = SegmentName {
            timeline: parent,
            ..segment
        };
        let path = dest.with_file_name(name.to_string());
        let written = segment.start(size).map(|start| fork.bytes_since(start));
        let written = written.and_then(|written| bytes.get(..usize::try_from(written).ok()?));
        // what the server has of it may end earlier: it was received so far, or is a file for later use
        let Some(written) = written.filter(|written| !begins_with(&path, written)) else {
            continue;
        };
        let mut whole = written.to_vec();
        whole.resize(bytes.len(), 0);
        if let Err(error) = put(&path, &whole) {
            // most recoveries do without it
            tracing::warn!(
                "a transaction that was prepared at {fork} may stop recovery: {}",
                error.message()
            );
        }
    }
}

/// The timelines before that of `segment` that end within it, with where they do.
fn parents_in(
    branch: &TimelineHistory,
    segment: SegmentName,
    size: SegmentSize,
) -> Vec<(TimelineId, Lsn)> {
    let Some(range) = segment.range(size) else {
        return Vec::new();
    };
    let parts = branch.parts();
    let older = parts
        .iter()
        .take_while(|part| part.timeline != segment.timeline);
    let ends = older.filter_map(|part| Some((part.timeline, part.end?)));
    ends.filter(|(_, end)| range.start < *end && *end < range.end)
        .collect()
}

/// Puts the file there for as long as the server wants it: nobody asks for it again after a crash.
fn put(path: &Path, bytes: &[u8]) -> Result<()> {
    keep_from_archiver(path)?;
    durable::replace(path, bytes).map_err(|error| io("write", path, &error))
}

/// Says that the file is archived, before it is there: a server that opens for writing would archive it
/// (xlogarchive.c, `XLogArchiveCheckDone`), though it is cut off. That is what it does itself with what it
/// restores (`KeepFileRestoredFromArchive`).
fn keep_from_archiver(path: &Path) -> Result<()> {
    let status = path.with_file_name("archive_status");
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".done");
    let done = status.join(name);
    std::fs::write(&done, b"").map_err(|error| io("write", &done, &error))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn size() -> SegmentSize {
        SegmentSize::from_bytes(MIB).unwrap()
    }

    fn segment(id: u32, number: u64) -> SegmentName {
        SegmentName::of(timeline(id), Lsn::new(number * MIB), size())
    }

    fn timeline(id: u32) -> TimelineId {
        TimelineId::new(id).unwrap()
    }

    /// What the branch abandoned must not be in it, nor may the server's archiver take it.
    #[test]
    fn parents_have_what_they_wrote_up_to_their_forks_and_nothing_else() {
        let history = b"1\t0/380000\tno recovery target\n2\t0/380100\tno recovery target\n";
        let branch = TimelineHistory::parse(timeline(3), history).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let pg_wal = folder.path();
        std::fs::create_dir(pg_wal.join("archive_status")).unwrap();
        let dest = pg_wal.join("RECOVERYXLOG");
        let bytes = vec![7; usize::try_from(MIB).unwrap()];
        let put = |segment| place_parents(&branch, segment, size(), &bytes, &dest);

        // the one before, the one behind, and what the parent itself is asked for
        put(segment(3, 2));
        put(segment(3, 4));
        put(segment(1, 3));
        assert_eq!(std::fs::read_dir(pg_wal).unwrap().count(), 1);

        // one goes on behind the fork, and another was received in part
        let own = pg_wal.join(segment(2, 3).to_string());
        let more = vec![7; 0x8_0200];
        std::fs::write(&own, &more).unwrap();
        let part = pg_wal.join(segment(1, 3).to_string());
        std::fs::write(part, &more[..0x100]).unwrap();
        put(segment(3, 3));
        assert_eq!(std::fs::read(&own).unwrap(), more);
        let first = std::fs::read(pg_wal.join(segment(1, 3).to_string())).unwrap();
        assert_eq!(first.len(), bytes.len());
        assert!(first[..0x8_0000].iter().all(|byte| *byte == 7));
        assert!(first[0x8_0000..].iter().all(|byte| *byte == 0));
        let done = pg_wal.join(format!("archive_status/{}.done", segment(1, 3)));
        assert!(done.exists());
    }

    #[test]
    fn a_fork_at_the_beginning_of_a_segment_needs_no_other_file() {
        let branch = TimelineHistory::parse(timeline(2), b"1\t0/300000\tno target\n").unwrap();
        assert_eq!(parents_in(&branch, segment(2, 3), size()), []);
    }
}
