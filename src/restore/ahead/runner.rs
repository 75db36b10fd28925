//! The process that fetches ahead.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures_util::stream::FuturesOrdered;
use futures_util::{FutureExt as _, StreamExt as _};
use rustix::fs::CWD;
use tokio::sync::watch;
use tokio::time::{Instant, interval, sleep_until};
use wal::{Lsn, SegmentName, SegmentSize, TimelineHistory, TimelineId, WalFileName};

use super::{Anchor, CHECKED, LOCK, POSITION, UNDERWAY, position_in};
use crate::durable;
use crate::error::Result;
use crate::repository::Repository;
use crate::repository::catalog::BranchEnd;
use crate::repository::destination::OpenDestination;
use crate::repository::layout::ObjectName;
use crate::repository::walk::segment_timeline;
use crate::restore::fetch::{FetchRequest, branch_of, fetch_complete, system_of};

/// So much may lie ready or be on its way, and one segment in any case.
const AHEAD_BYTES_MAX: u64 = 256 << 20;
/// So many segments are fetched at the same time.
const FETCHED_AT_ONCE: usize = 2;
/// Touched when the newest timeline is asked for; renamed once that is answered.
const ASKING: &str = "asking";
/// How often it looks whether segments were taken.
const LOOK_INTERVAL: Duration = Duration::from_millis(5);
/// How often it looks while nobody takes any.
const IDLE_INTERVAL: Duration = Duration::from_millis(100);
/// After so long without anybody taking any it looks less often.
const IDLE_AFTER: Duration = Duration::from_secs(2);
/// How often the newest timeline is asked for, where that is followed.
const CHECK_INTERVAL: Duration = Duration::from_millis(300);
/// So much is left free on the disk, which is the server's.
const FREE_BYTES_MIN: u64 = 1 << 30;
/// A recovery that asks for nothing for so long is not waited for: the next call begins anew.
const IDLE_MAX: Duration = Duration::from_mins(2);

/// Fetches what comes behind the segment of `request` into `folder`, until the recovery ends or asks for
/// nothing any more, or `stop` says so. Nobody is told of errors: whoever asks for the segment meets
/// them again.
pub async fn run(
    open: impl Fn() -> Result<OpenDestination>,
    request: &FetchRequest,
    folder: &Path,
    stop: watch::Receiver<bool>,
) {
    let Some(_lock) = lock(folder) else { return };
    clear(folder);
    let anchor = folder
        .file_name()
        .and_then(|name| Anchor::of_name(name.to_str()?));
    let Some(anchor) = anchor else { return };
    let mut stopped = stop;
    let fetching = async {
        if let Err(error) = fetch_ahead(&open, request, folder).await {
            tracing::debug!("nothing more is fetched ahead: {}", error.message());
        }
    };
    tokio::select! {
        () = fetching => {}
        () = anchor.gone() => {}
        _ = stopped.wait_for(|asked| *asked) => {}
    }
    std::fs::remove_dir_all(folder).ok();
    if let Some(all) = folder.parent() {
        // where it is empty
        std::fs::remove_dir(all).ok();
    }
}

impl Anchor {
    /// Returns once the process has ended.
    async fn gone(self) {
        let mut looks = interval(IDLE_INTERVAL);
        while self.lives() {
            looks.tick().await;
        }
    }
}

/// The lock on a session's folder; `None` where another process holds it.
fn lock(folder: &Path) -> Option<File> {
    let file = File::create(folder.join(LOCK)).ok()?;
    file.try_lock().ok()?;
    Some(file)
}

/// What the server's account may still write to a disk.
fn free_bytes(folder: &Path) -> u64 {
    let found = rustix::fs::statvfs(folder);
    found.map_or(0, |found| found.f_bavail.saturating_mul(found.f_frsize))
}

/// Removes what another process left here: nobody knows any more what it was good for.
fn clear(folder: &Path) {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return;
    };
    for entry in entries.flatten() {
        if ![LOCK, POSITION]
            .map(Into::into)
            .contains(&entry.file_name())
        {
            std::fs::remove_file(entry.path()).ok();
        }
    }
}

/// What lies ready, and what comes next.
struct Ahead {
    folder: PathBuf,
    size: SegmentSize,
    /// Ready or on their way, in the order in which they are asked for.
    names: VecDeque<SegmentName>,
    /// Where the next one starts that is to be fetched.
    next: Lsn,
    /// The position that was seen last.
    position: SegmentName,
}

impl Ahead {
    fn path(&self, name: SegmentName) -> PathBuf {
        self.folder.join(name.to_string())
    }

    fn has_room(&self) -> bool {
        let bytes = u64::try_from(self.names.len())
            .unwrap_or(u64::MAX)
            .saturating_mul(self.size.bytes());
        let is_within = bytes.saturating_add(self.size.bytes()) <= AHEAD_BYTES_MAX;
        (self.names.is_empty() || is_within) && free_bytes(&self.folder) > FREE_BYTES_MIN
    }

    /// Takes note of what was taken from the folder, and of what was asked for elsewhere. Whether anything was.
    fn look(&mut self) -> bool {
        let before = self.names.len();
        let folder = &self.folder;
        // looked for on its way first: it is renamed from there
        let is_here = |name: &SegmentName| {
            let name = name.to_string();
            folder.join(format!("{name}{UNDERWAY}")).exists() || folder.join(&name).exists()
        };
        // what stands before one that was taken is not asked for any more
        let taken = self.names.iter().rposition(|name| !is_here(name));
        for passed in self
            .names
            .drain(..taken.map_or(0, |last| last + 1))
            .collect::<Vec<_>>()
        {
            self.discard(passed);
        }
        let asked = position_in(&self.folder).filter(|asked| *asked != self.position);
        if let Some(asked) = asked {
            self.position = asked;
            self.begin_behind(asked);
        }
        before != self.names.len() || asked.is_some()
    }

    /// Goes on behind a segment that was fetched by whoever asked for it.
    fn begin_behind(&mut self, asked: SegmentName) {
        let Some(range) = asked.range(self.size) else {
            return;
        };
        let start_of = |name: SegmentName| name.start(self.size).unwrap_or(Lsn::ZERO);
        let passed = self
            .names
            .iter()
            .take_while(|name| start_of(**name) < range.end);
        let kept = self.names.split_off(passed.count());
        let goes_on = kept.front().map_or(self.next, |first| start_of(*first)) == range.end;
        let mut discarded = std::mem::take(&mut self.names);
        if goes_on {
            self.names = kept;
        } else {
            discarded.extend(kept);
            self.next = range.end;
        }
        for name in discarded {
            self.discard(name);
        }
    }

    /// Removes a segment that nobody took; one that is on its way is discarded when it comes.
    fn discard(&self, name: SegmentName) {
        std::fs::remove_file(self.path(name)).ok();
        std::fs::remove_file(self.folder.join(format!("{name}{UNDERWAY}"))).ok();
    }
}

async fn fetch_ahead(
    open: &impl Fn() -> Result<OpenDestination>,
    request: &FetchRequest,
    folder: &Path,
) -> Result<()> {
    let Ok(WalFileName::Segment(first)) = request.name.parse() else {
        return Ok(());
    };
    let system_id = system_of(request)?;
    let repository = open()?.stored(Some(system_id)).await?.strict();
    let named = repository.size_of_any([ObjectName::Segment(first)].into_iter());
    let Some((_, size)) = named.await? else {
        return Ok(());
    };
    let Some(range) = first.range(size) else {
        return Ok(());
    };
    let mut ahead = Ahead {
        folder: folder.to_owned(),
        size,
        names: VecDeque::new(),
        next: range.end,
        position: first,
    };
    asks(folder);
    let Some(branch) = branch_of(&repository, request.timeline).await? else {
        return Ok(());
    };
    let mut following = Following::along(branch, folder);
    let mut fetches = FuturesOrdered::new();
    let mut taken_at = Instant::now();
    let mut looked_at = Instant::now();
    // nothing more is there, or wanted: the call that finds it here no more begins anew
    let mut has_ended = false;
    while taken_at.elapsed() < IDLE_MAX {
        let is_wanted = |start: Lsn| request.until.is_none_or(|until| start < until);
        has_ended |= !is_wanted(ahead.next);
        if has_ended && ahead.names.is_empty() {
            return Ok(());
        }
        while !has_ended
            && is_wanted(ahead.next)
            && fetches.len() < FETCHED_AT_ONCE
            && ahead.has_room()
        {
            let name = name_at(&following.branch, ahead.next, size);
            let part = folder.join(format!("{name}{UNDERWAY}"));
            if File::create(&part).is_err() {
                return Ok(());
            }
            ahead.names.push_back(name);
            ahead.next = size.end_of(ahead.next);
            let fetch = fetch_to(
                repository.clone(),
                following.branch.clone(),
                name,
                part,
                ahead.path(name),
            );
            fetches.push_back(fetch.map(move |fetched| (name, fetched)));
        }
        let is_idle = taken_at.elapsed() > IDLE_AFTER;
        let pace = if is_idle {
            IDLE_INTERVAL
        } else {
            LOOK_INTERVAL
        };
        tokio::select! {
            Some((name, fetched)) = fetches.next() => {
                if !ahead.names.contains(&name) {
                    // the server changed its mind meanwhile
                    ahead.discard(name);
                } else if !fetched {
                    // nothing behind it is asked for before it
                    let at = ahead.names.iter().position(|known| *known == name).unwrap_or_default();
                    for behind in ahead.names.split_off(at) {
                        ahead.discard(behind);
                    }
                    ahead.next = name.start(size).unwrap_or(ahead.next);
                    has_ended = true;
                }
            }
            () = sleep_until(looked_at + pace) => {}
        }
        if looked_at.elapsed() >= pace {
            looked_at = Instant::now();
            let position = ahead.position;
            if !folder.exists() {
                // whoever removed it has no use for what comes
                return Ok(());
            }
            if ahead.look() {
                taken_at = Instant::now();
            }
            if ahead.position != position {
                has_ended = false;
            }
            if following
                .has_moved(&repository, request.timeline, folder)
                .await?
            {
                // what was fetched along the other branch is not this one's: the next call begins anew
                return Ok(());
            }
        }
    }
    Ok(())
}

/// The segment that a server on this branch asks for first, of those that hold a position: that of the
/// newest timeline that had begun by its end (xlogrecovery.c, `XLogFileReadAnyTLI`).
fn name_at(branch: &TimelineHistory, start: Lsn, size: SegmentSize) -> SegmentName {
    let end = BranchEnd {
        timeline: branch.timeline(),
        lsn: Lsn::new(u64::MAX),
    };
    SegmentName::of(segment_timeline(branch, start, end, size), start, size)
}

/// Fetches a segment; whether it is there, complete, and the branch's to its end.
async fn fetch_to(
    repository: Repository,
    branch: TimelineHistory,
    name: SegmentName,
    part: PathBuf,
    ready: PathBuf,
) -> bool {
    let fetched = fetch_complete(&repository, &branch, name).await;
    match fetched {
        Ok(Some(bytes)) => {
            let writing = tokio::task::spawn_blocking(move || -> io::Result<()> {
                // a name that no process before this one writes to still
                let staged = part.with_extension(format!("{}.tmp", std::process::id()));
                std::fs::write(&staged, &bytes)?;
                // a server that is killed with the machine begins anew, and so does its session
                durable::rename_at(CWD, &staged, CWD, &ready)?;
                std::fs::remove_file(&part)
            });
            writing.await.is_ok_and(|written| written.is_ok())
        }
        Ok(None) => false,
        Err(error) => {
            tracing::debug!("{name} is not fetched ahead: {}", error.message());
            false
        }
    }
}

/// The branch along which is fetched.
struct Following {
    branch: TimelineHistory,
    checked: Instant,
}

impl Following {
    fn along(branch: TimelineHistory, folder: &Path) -> Self {
        is_checked(folder);
        Self {
            branch,
            checked: Instant::now(),
        }
    }

    /// Looks now and then whether another timeline is the newest, where that is followed; whether it is.
    async fn has_moved(
        &mut self,
        repository: &Repository,
        timeline: Option<TimelineId>,
        folder: &Path,
    ) -> Result<bool> {
        if timeline.is_some() || self.checked.elapsed() < CHECK_INTERVAL {
            return Ok(false);
        }
        asks(folder);
        let newest = repository.newest_timeline().await?;
        let has_moved = newest.is_some_and(|newest| newest != self.branch.timeline());
        self.checked = Instant::now();
        if !has_moved {
            is_checked(folder);
        }
        Ok(has_moved)
    }
}

/// The newest timeline is asked for now.
fn asks(folder: &Path) {
    std::fs::write(folder.join(ASKING), b"").ok();
}

/// It was the one that is followed: what is here counts for a while from when that was asked.
fn is_checked(folder: &Path) {
    durable::rename_at(CWD, &folder.join(ASKING), CWD, &folder.join(CHECKED)).ok();
}
