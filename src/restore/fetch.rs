//! `wal-fetch`: PostgreSQL's `restore_command`.
//!
//! PostgreSQL takes any exit code up to 125 for "the archive ends here" and promotes, so that 1 is
//! said of what is known not to be stored, and of nothing else.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use basebackup::control;
use rustix::fs::CWD;
use tokio::time::Instant;
use wal::{
    Lsn, Reach, SegmentHead, SegmentName, SegmentSize, TimelineHistory, TimelineId, WalFileName,
};

use super::parents::place_parents;
use crate::durable;
use crate::error::{Error, Kind, Result, io};
use crate::repository::catalog::TimelineWal;
use crate::repository::layout::ObjectName;
use crate::repository::{Repository, RepositoryError};
use crate::retry::Backoff;

pub use crate::repository::destination::OpenDestination;

/// Found.
const FOUND: u8 = 0;
/// Not in the archive: recovery has come to its end, a standby asks again.
const NOT_IN_ARCHIVE: u8 = 1;
/// Anything else: beyond 125, so that recovery stops with an error, and no signal's number.
const REFUSED: u8 = 200;
/// A hole is looked at again for this long: it may be a segment that is on its way.
const FILL_LIMIT: Duration = Duration::from_secs(5);
/// How long an outage is sat out.
const RETRY_LIMIT: Duration = Duration::from_secs(20);
const RETRY_FIRST: Duration = Duration::from_millis(250);
const RETRY_MAX: Duration = Duration::from_secs(4);
/// So many objects of each kind are asked for the segment size, where others are damaged.
const ASKED_FOR_SIZE: usize = 4;
/// What PostgreSQL has every segment restored as (xlogrecovery.c, `XLogFileRead`).
const RESTORED_NAME: &str = "RECOVERYXLOG";
/// Makes `wal-fetch` panic, to test that this does not look like the end of WAL.
const TEST_PANIC: &str = "ANYWHEN_TEST_PANIC";

/// What PostgreSQL asks for.
#[derive(Debug, Clone)]
pub struct FetchRequest {
    /// The file's name, `%f`.
    pub name: String,
    /// Where it goes, `%p`: below the working directory or absolute.
    pub dest: PathBuf,
    /// The branch along which recovery goes; the newest timeline where none is named, which is what
    /// PostgreSQL's `recovery_target_timeline = latest` means.
    pub timeline: Option<TimelineId>,
    /// Where recovery ends. Servers read ahead (since 15 for prefetching), so that they ask for
    /// what lies behind it: that it is missing or damaged must not end a recovery that does not
    /// need it.
    pub until: Option<Lsn>,
    /// The system; read from `global/pg_control` in the working directory where none is named.
    pub system_id: Option<u64>,
}

/// How it ended.
#[derive(Debug)]
pub struct FetchOutcome {
    /// The exit code.
    pub code: u8,
    /// What is to be said on standard error.
    pub error: Option<Error>,
}

/// Fetches one file, as PostgreSQL runs it: in the data directory.
///
/// `open` gives where to look; it is called again after an outage.
pub async fn run(
    open: impl Fn() -> Result<OpenDestination>,
    request: FetchRequest,
) -> FetchOutcome {
    let panics = std::env::var_os(TEST_PANIC).is_some_and(|value| value == "wal-fetch");
    assert!(!panics, "asked for by {TEST_PANIC}");
    // a standby asks again by itself
    let is_standby = Path::new("standby.signal").exists();
    let deadline = Instant::now() + RETRY_LIMIT;
    let fill_deadline = Instant::now() + FILL_LIMIT;
    let mut backoff = Backoff::new(RETRY_FIRST, RETRY_MAX);
    loop {
        let error = match fetch(&open, &request).await {
            Ok(true) => {
                return FetchOutcome {
                    code: FOUND,
                    error: None,
                };
            }
            Ok(false) => {
                return FetchOutcome {
                    code: NOT_IN_ARCHIVE,
                    error: None,
                };
            }
            Err(error) => error,
        };
        let is_outage = error.kind() == Kind::Unreachable;
        // segments are not stored in their order, and pieces give way to their segment
        let may_fill = error.kind() == Kind::NotFound && Instant::now() < fill_deadline;
        let waits = is_outage && !is_standby && may_pass(&error) && Instant::now() < deadline;
        if waits || may_fill {
            tracing::warn!("trying again: {}", error.message());
            backoff.wait().await;
            continue;
        }
        let code = if is_outage && is_standby {
            NOT_IN_ARCHIVE
        } else {
            REFUSED
        };
        return FetchOutcome {
            code,
            error: Some(error),
        };
    }
}

/// Whether waiting may help.
fn may_pass(error: &Error) -> bool {
    !error.message().contains("Permission denied")
}

/// Whether the file was found; it is at `dest` then.
async fn fetch(
    open: &impl Fn() -> Result<OpenDestination>,
    request: &FetchRequest,
) -> Result<bool> {
    let name: WalFileName = request.name.parse().map_err(|error| {
        Error::usage(format!("{error}")).hint("restore_command = 'anywhen wal-fetch %f %p'")
    })?;
    let destination = open()?;
    let system_id = system_of(request)?;
    let repository = match destination.stored(Some(system_id)).await {
        // a listing that lacks one repository's part would make WAL look absent
        Ok(repository) => repository.strict(),
        Err(error) => return Err(error.into()),
    };
    let bytes = match name {
        WalFileName::Segment(segment) => {
            let fetched = fetch_segment(&repository, segment, request).await;
            match fetched {
                Err(error) if request.is_beyond(&repository, segment).await? => {
                    if error.kind() == Kind::Unreachable {
                        return Err(error);
                    }
                    tracing::warn!("not needed: {}", error.message());
                    None
                }
                fetched => fetched?,
            }
        }
        WalFileName::History(timeline) => repository.history(timeline).await?,
        WalFileName::Partial(segment) => {
            fetch_file(&repository, &ObjectName::Partial(segment)).await?
        }
        WalFileName::Backup { segment, offset } => {
            fetch_file(&repository, &ObjectName::BackupHistory { segment, offset }).await?
        }
    };
    let Some(bytes) = bytes else {
        // a repository that went away since it was opened has nothing either
        return match repository.cluster_record().await {
            Ok(Some(_)) => Ok(false),
            Ok(None) => Err(Error::new(
                Kind::Unreachable,
                format!(
                    "the repository's cluster.json is gone: {}",
                    repository.locate(&ObjectName::Cluster)
                ),
            )),
            Err(error) => Err(error.into()),
        };
    };
    place(&request.dest, &bytes)?;
    Ok(true)
}

impl FetchRequest {
    /// The file that the server itself has of the segment that it asks for, or would have.
    ///
    /// Known where PostgreSQL reads on after this request: it asks for each segment under one name,
    /// beside its own ones (xlogarchive.c, `RestoreArchivedFile`). A recovery with an end is none
    /// that follows.
    fn own_file(&self) -> Option<PathBuf> {
        (self.is_servers() && self.until.is_none()).then(|| self.dest.with_file_name(&self.name))
    }

    /// Whether it is a server in recovery that asks.
    pub(super) fn is_servers(&self) -> bool {
        self.dest.file_name() == Some(OsStr::new(RESTORED_NAME))
    }

    /// Whether recovery ends before the segment begins.
    async fn is_beyond(&self, repository: &Repository, segment: SegmentName) -> Result<bool> {
        let Some(until) = self.until else {
            return Ok(false);
        };
        let wal = repository.timeline_wal(segment.timeline).await?;
        let Some((_, size)) = repository.size_of_any(objects(&wal, segment)).await? else {
            return Ok(false);
        };
        Ok(segment.start(size).is_some_and(|start| start >= until))
    }
}

/// The system whose WAL is asked for.
pub(super) fn system_of(request: &FetchRequest) -> Result<u64> {
    request
        .system_id
        .map_or_else(system_of_working_directory, Ok)
}

/// The identity of the cluster in whose directory PostgreSQL runs us.
fn system_of_working_directory() -> Result<u64> {
    let path = Path::new("global/pg_control");
    let bytes = std::fs::read(path).map_err(|error| {
        io("read", path, &error).hint(
            "wal-fetch runs in the data directory, as PostgreSQL's restore_command; elsewhere name the \
             system with --system-id",
        )
    })?;
    let identity = control::identity(&bytes)
        .map_err(|error| Error::damaged(format!("{}: {error}", path.display())))?;
    Ok(identity.system_id)
}

async fn fetch_file(repository: &Repository, name: &ObjectName) -> Result<Option<Vec<u8>>> {
    match repository.fetch(name).await {
        Ok(fetched) => Ok(Some(fetched.plain)),
        Err(error) if error.is_not_found() => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// A segment as recovery along the branch may see it, at its full size.
async fn fetch_segment(
    repository: &Repository,
    segment: SegmentName,
    request: &FetchRequest,
) -> Result<Option<Vec<u8>>> {
    let Some(branch) = branch_of(repository, request.timeline).await? else {
        return Ok(None);
    };
    let reach = branch.reach(segment.timeline);
    if reach == Reach::NotAncestor {
        return Ok(None);
    }
    let whole = fetch_file(repository, &ObjectName::Segment(segment)).await?;
    let stored = match whole {
        Some(bytes) => {
            let size = check_head(repository, segment, &bytes, None)?;
            Stored {
                bytes,
                size,
                wal: None,
            }
        }
        None => match incomplete(repository, segment, request.until).await? {
            Some(stored) => stored,
            None => return Ok(None),
        },
    };
    let Some(start) = segment.start(stored.size) else {
        return Ok(None);
    };
    // behind a fork the server's own file may hold what the branch left
    let is_last = stored.wal.is_some() && segment.timeline == branch.timeline();
    let own = request.own_file().filter(|_| is_last);
    let has_itself = own.is_some_and(|own| begins_with(&own, &stored.bytes));
    let size = stored.size;
    let given = give(&branch, segment, start, stored, request.until).map_err(|hole| {
        Error::not_found(format!(
            "WAL is missing though more of the branch is stored: {hole}"
        ))
        .hint(format!(
            "{} is a hole: restore to a point before it, or from a backup behind it",
            repository.locate(&ObjectName::Segment(segment))
        ))
    })?;
    if let Some(bytes) = given.as_ref().filter(|_| request.is_servers()) {
        place_parents(&branch, segment, size, bytes, &request.dest);
    }
    Ok(given.filter(|_| !has_itself))
}

/// Whether the server's own file has all that is stored of a segment that is not complete.
///
/// It may go on behind that, where a standby received more than was stored when its primary died. What
/// is fetched takes the place of it, and a server that is promoted reads its last record once more
/// (xlogrecovery.c, `FinishWalRecovery`): it would PANIC where that is gone.
pub(super) fn begins_with(own: &Path, stored: &[u8]) -> bool {
    std::fs::read(own).is_ok_and(|own| own.starts_with(stored))
}

/// The branch that recovery goes along; `None` where nothing at all is stored.
pub(super) async fn branch_of(
    repository: &Repository,
    timeline: Option<TimelineId>,
) -> Result<Option<TimelineHistory>, RepositoryError> {
    let timeline = match timeline {
        Some(timeline) => Some(timeline),
        None => repository.newest_timeline().await?,
    };
    match timeline {
        Some(timeline) => repository.branch(timeline).await.map(Some),
        None => Ok(None),
    }
}

/// A segment that is stored whole, all of which recovery along the branch may see; `None` where it is less, or
/// not stored, and where a timeline begins in it: more is done for such a one than to hand it out.
pub(super) async fn fetch_complete(
    repository: &Repository,
    branch: &TimelineHistory,
    segment: SegmentName,
) -> Result<Option<Vec<u8>>> {
    let parts = branch.parts();
    let Some(part) = parts.iter().find(|part| part.timeline == segment.timeline) else {
        return Ok(None);
    };
    let Some(bytes) = fetch_file(repository, &ObjectName::Segment(segment)).await? else {
        return Ok(None);
    };
    let size = check_head(repository, segment, &bytes, None)?;
    let range = segment.range(size);
    let is_seen = range.is_some_and(|range| {
        part.start <= range.start && part.end.is_none_or(|fork| range.end <= fork)
    });
    Ok(is_seen.then_some(bytes))
}

/// What is stored of a segment from its beginning on.
struct Stored {
    bytes: Vec<u8>,
    size: SegmentSize,
    /// What else its timeline has, where the segment is not complete.
    wal: Option<TimelineWal>,
}

async fn incomplete(
    repository: &Repository,
    segment: SegmentName,
    until: Option<Lsn>,
) -> Result<Option<Stored>> {
    let wal = repository.timeline_wal(segment.timeline).await?;
    let Some((_, size)) = repository.size_of_any(objects(&wal, segment)).await? else {
        return Ok(None);
    };
    let content = repository.segment_content(segment, size, until).await?;
    let bytes = content.map_or_else(Vec::new, |content| content.bytes);
    if !bytes.is_empty() {
        check_head(repository, segment, &bytes, Some(size))?;
    }
    Ok(Some(Stored {
        bytes,
        size,
        wal: Some(wal),
    }))
}

/// Some of what is stored of the timeline, to learn the segment size from: of this segment first, and
/// of others, since what is asked for may be what is damaged.
fn objects(wal: &TimelineWal, segment: SegmentName) -> impl Iterator<Item = ObjectName> {
    let pieces_of = |segment: SegmentName| {
        let ranges = wal.pieces.get(&segment).into_iter().flatten();
        ranges.map(move |range| ObjectName::Piece {
            segment,
            range: *range,
        })
    };
    let others = wal.segments.iter().filter(move |other| **other != segment);
    let pieces = wal.pieces.keys().copied().flat_map(pieces_of);
    let itself = wal.segments.get(&segment);
    pieces_of(segment)
        .take(ASKED_FOR_SIZE)
        .chain(
            others
                .take(ASKED_FOR_SIZE)
                .copied()
                .map(ObjectName::Segment),
        )
        .chain(pieces.take(ASKED_FOR_SIZE))
        .chain(itself.copied().map(ObjectName::Segment))
}

/// Whether the first page of what is to be handed out is the one that was asked for.
fn check_head(
    repository: &Repository,
    segment: SegmentName,
    bytes: &[u8],
    size: Option<SegmentSize>,
) -> Result<SegmentSize> {
    let damaged = |reason: String| {
        let place = repository.locate(&ObjectName::Segment(segment));
        Error::damaged(format!(
            "{place} is not the segment that its name says: {reason}"
        ))
        .hint("restore this object from a copy of the repository")
    };
    let head = SegmentHead::parse(bytes).map_err(|error| damaged(error.to_string()))?;
    let expected = size.unwrap_or(head.segment_size);
    let length = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
    if head.segment_size != expected || (size.is_none() && length != expected.bytes()) {
        return Err(damaged(format!(
            "segment size={}, expected={expected}, bytes={length}",
            head.segment_size
        )));
    }
    if head.system_id != repository.system_id() {
        return Err(damaged(format!("it is of system {}", head.system_id)));
    }
    // the segment in which a timeline began starts with pages of its parent
    if Some(head.start) != segment.start(expected) || head.timeline > segment.timeline {
        return Err(damaged(format!(
            "it is of {} on timeline {}",
            head.start, head.timeline
        )));
    }
    Ok(expected)
}

/// What recovery may see: nothing at or behind the point where the branch left the timeline, and
/// zeros for what is not written yet; `None` where the branch has nothing there.
///
/// A stretch that is missing below what the branch has is an error: to recovery it would look like
/// the end of WAL. It is none behind `until`, where recovery ends.
fn give(
    branch: &TimelineHistory,
    segment: SegmentName,
    start: Lsn,
    stored: Stored,
    until: Option<Lsn>,
) -> Result<Option<Vec<u8>>, Lsn> {
    let Stored {
        mut bytes,
        size,
        wal,
    } = stored;
    let end = size.end_of(start);
    let Some(part) = branch
        .parts()
        .into_iter()
        .find(|part| part.timeline == segment.timeline)
    else {
        return Ok(None);
    };
    let limit = part.end.unwrap_or(Lsn::new(u64::MAX));
    if limit <= start || end <= part.start {
        return Ok(None);
    }
    let stored_end = start.saturating_add(u64::try_from(bytes.len()).unwrap_or(u64::MAX));
    let is_enough = until.is_some_and(|until| until <= stored_end.min(limit));
    if stored_end < end.min(limit) && !is_enough {
        // an ancestor is known to go on up to the fork
        let goes_on = end <= size.start_of(limit) && part.end.is_some();
        let coverage = wal
            .as_ref()
            .map(|wal| wal.coverage(size))
            .unwrap_or_default();
        let is_later = |at: Lsn| at > stored_end && at < limit;
        if goes_on || coverage.iter().any(|range| is_later(range.start)) {
            return Err(stored_end);
        }
    }
    if bytes.is_empty() {
        return Ok(None);
    }
    let visible = usize::try_from(limit.bytes_since(start)).unwrap_or(usize::MAX);
    bytes.truncate(visible);
    bytes.resize(usize::try_from(size.bytes()).unwrap_or(usize::MAX), 0);
    Ok(Some(bytes))
}

/// Writes the file under another name and renames it: PostgreSQL takes whatever is at `dest`. Nothing is synced:
/// recovery asks again for what a crash takes away.
pub(super) fn place(dest: &Path, bytes: &[u8]) -> Result<()> {
    let mut staged = dest.as_os_str().to_owned();
    staged.push(format!(".{}.tmp", std::process::id()));
    let staged = PathBuf::from(staged);
    let written = std::fs::write(&staged, bytes)
        .map_err(|error| io("write", &staged, &error))
        .and_then(|()| {
            let renamed = durable::rename_at(CWD, &staged, CWD, dest);
            renamed.map_err(|error| io("write", dest, &error))
        });
    if written.is_err()
        && let Err(error) = std::fs::remove_file(&staged)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        tracing::warn!("could not remove {}: {error}", staged.display());
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn size() -> SegmentSize {
        SegmentSize::from_bytes(MIB).unwrap()
    }

    fn timeline(id: u32) -> TimelineId {
        TimelineId::new(id).unwrap()
    }

    fn segment(id: u32, number: u64) -> SegmentName {
        SegmentName::of(timeline(id), Lsn::new(number * MIB), size())
    }

    fn of(bytes: usize, segments: &[SegmentName]) -> Stored {
        let wal = TimelineWal::of_segments(segments.iter().copied());
        Stored {
            bytes: vec![7; bytes],
            size: size(),
            wal: Some(wal),
        }
    }

    fn asked(
        branch: &TimelineHistory,
        name: SegmentName,
        stored: Stored,
    ) -> Result<Option<Vec<u8>>, Lsn> {
        give(branch, name, name.start(size()).unwrap(), stored, None)
    }

    fn forked() -> TimelineHistory {
        TimelineHistory::parse(timeline(2), b"1\t0/380000\tno recovery target\n").unwrap()
    }

    /// Rows that the branch abandoned would come back.
    #[test]
    fn nothing_of_an_ancestor_behind_the_fork_is_given() {
        let whole = usize::try_from(MIB).unwrap();
        let fork = asked(&forked(), segment(1, 3), of(whole, &[]))
            .unwrap()
            .unwrap();
        assert_eq!(fork.len(), whole);
        assert!(fork[..0x8_0000].iter().all(|byte| *byte == 7));
        assert!(fork[0x8_0000..].iter().all(|byte| *byte == 0));
        assert_eq!(asked(&forked(), segment(1, 4), of(whole, &[])), Ok(None));
        // along the first timeline itself all of it belongs
        let first = TimelineHistory::new_first(timeline(1));
        let all = asked(&first, segment(1, 4), of(whole, &[]))
            .unwrap()
            .unwrap();
        assert!(all.iter().all(|byte| *byte == 7));
    }

    /// To recovery a hole looks like the end of WAL: it would promote, and lose all that came
    /// after.
    #[test]
    fn a_hole_is_not_the_end() {
        let first = TimelineHistory::new_first(timeline(1));
        let later = [segment(1, 5)];
        let hole = Lsn::new(4 * MIB);
        assert_eq!(asked(&first, segment(1, 4), of(0, &later)), Err(hole));
        assert_eq!(
            asked(&first, segment(1, 4), of(100, &later)),
            Err(hole.saturating_add(100))
        );
        assert_eq!(asked(&first, segment(1, 6), of(0, &later)), Ok(None));
        // the branch went on to the fork at 3.5 MiB
        assert_eq!(
            asked(&forked(), segment(1, 2), of(0, &[])),
            Err(Lsn::new(2 * MIB))
        );
    }

    /// Backups that were taken without a stream have gaps between them: the first would not be restored.
    #[test]
    fn a_hole_behind_the_end_of_recovery_is_not_in_its_way() {
        let (start, later) = (Lsn::new(4 * MIB), [segment(1, 5)]);
        let first = TimelineHistory::new_first(timeline(1));
        let asked = |branch: &TimelineHistory, name: SegmentName, until: u64| {
            let start = name.start(size()).unwrap();
            let until = start.saturating_add(until);
            give(branch, name, start, of(100, &later), Some(until))
        };
        let given = asked(&first, segment(1, 4), 100).unwrap().unwrap();
        assert!(given[100..].iter().all(|byte| *byte == 0));
        let hole = Err(start.saturating_add(100));
        assert_eq!(asked(&first, segment(1, 4), 101), hole);
        // the end lies on the child, and the ancestor is needed up to the fork
        let before = Err(Lsn::new(2 * MIB + 100));
        assert_eq!(asked(&forked(), segment(1, 2), 2 * MIB), before);
    }

    #[test]
    fn an_unfinished_segment_is_padded_to_its_full_size() {
        let first = TimelineHistory::new_first(timeline(1));
        let bytes = asked(&first, segment(1, 4), of(100, &[])).unwrap().unwrap();
        assert_eq!(bytes.len(), usize::try_from(MIB).unwrap());
        assert!(bytes[..100].iter().all(|byte| *byte == 7));
        assert!(bytes[100..].iter().all(|byte| *byte == 0));
    }

    /// Recovery may ask for the child's copy of a segment that lies before the fork.
    #[test]
    fn a_timeline_has_nothing_before_it_began() {
        let later = [segment(2, 3)];
        assert_eq!(asked(&forked(), segment(2, 2), of(0, &later)), Ok(None));
        let own = asked(
            &forked(),
            segment(2, 3),
            of(usize::try_from(MIB).unwrap(), &later),
        );
        assert!(own.unwrap().unwrap().iter().all(|byte| *byte == 7));
    }

    #[test]
    fn what_is_written_is_whole_or_not_there() {
        let folder = tempfile::tempdir().unwrap();
        let dest = folder.path().join("RECOVERYXLOG");
        place(&dest, b"bytes").unwrap();
        assert_eq!(std::fs::read(&dest).unwrap(), b"bytes");
        place(&folder.path().join("absent/x"), b"bytes").unwrap_err();
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
