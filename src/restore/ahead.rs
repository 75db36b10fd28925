//! WAL that is fetched before a server asks for it.
//!
//! The first `wal-fetch` of a recovery leaves a process behind that fetches the segments that come
//! next into a folder beside the data directory; the calls behind it find them there, and take no
//! longer than a process start and a rename. That process ends with the recovery, and takes the
//! folder with it.
//!
//! It answers nothing itself. What it does not have, each call asks the repository for, so that "not
//! found" is never old news; and what it has is complete segments alone, which never change.

mod runner;

use std::ffi::OsString;
use std::fs::{DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use rustix::fs::CWD;
use rustix::process::{Pid, geteuid, getppid};
use wal::{SegmentName, WalFileName};

use super::fetch::{FetchRequest, place};
use crate::durable;
use crate::retry::Backoff;

pub use runner::run;

/// The flag of the process that fetches ahead.
pub const FLAG: &str = "--runs-ahead-in";
/// The folder beside a data directory, after its name.
const SUFFIX: &str = ".anywhen-wal";
/// A segment that is being fetched.
const UNDERWAY: &str = ".part";
/// Held by the process that fetches ahead.
const LOCK: &str = "lock";
/// The segment that was handed out last by a call that did not find it here.
const POSITION: &str = "position";
/// Touched whenever the newest timeline was found to be the one that is followed.
const CHECKED: &str = "checked";
/// What is here counts for so long after that was asked, where the newest timeline is followed.
const CHECKED_LIMIT: Duration = Duration::from_secs(1);
/// A segment that is on its way is waited for so long; then the repository is asked.
const UNDERWAY_LIMIT: Duration = Duration::from_secs(10);

/// Where segments are that are fetched ahead for one recovery.
#[derive(Debug, Clone)]
pub struct Session {
    folder: PathBuf,
    /// Whether the newest timeline is followed, which may be another one later.
    follows: bool,
}

/// The process with which a recovery ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Anchor {
    pid: i32,
    /// When it started, in clock ticks since the machine did: numbers are given again.
    started: u64,
}

impl Session {
    /// The session of the server that asks; `None` where nothing is fetched ahead: nobody but a server in
    /// recovery asks for one segment after another.
    ///
    /// `arguments` are those of this program: what is fetched with others is another session's.
    pub fn of(request: &FetchRequest, arguments: &[OsString]) -> Option<Self> {
        let is_servers = request.is_servers()
            && matches!(request.name.parse(), Ok(WalFileName::Segment(_)))
            && Path::new("global/pg_control").exists();
        if !is_servers {
            return None;
        }
        let anchor = Anchor::find()?;
        let data = std::env::current_dir().ok()?;
        let digest = short_digest(&identity_of(request, arguments));
        let name = format!("{}-{}-{digest}", anchor.pid, anchor.started);
        Some(Self {
            folder: beside(&data)?.join(name),
            follows: request.timeline.is_none(),
        })
    }

    /// Hands out a segment that is here; whether it was.
    pub fn take(&self, request: &FetchRequest) -> bool {
        if !self.is_own() || !self.counts() {
            return false;
        }
        let ready = self.folder.join(&request.name);
        match durable::rename_at(CWD, &ready, CWD, &request.dest) {
            Ok(()) => true,
            Err(error) if error.kind() == io::ErrorKind::CrossesDevices => {
                let Ok(bytes) = std::fs::read(&ready) else {
                    return false;
                };
                let placed = place(&request.dest, &bytes).is_ok();
                std::fs::remove_file(&ready).ok();
                placed
            }
            Err(_) => false,
        }
    }

    /// As [`Self::take`], waiting for a segment that is on its way.
    pub async fn take_underway(&self, request: &FetchRequest) -> bool {
        let mut backoff = Backoff::new(Duration::from_millis(2), Duration::from_millis(20));
        let until = Instant::now() + UNDERWAY_LIMIT;
        loop {
            // looked at first: it is renamed from the one to the other
            let is_underway = self.is_underway(&request.name);
            if self.take(request) {
                return true;
            }
            if !is_underway || !self.is_running() || Instant::now() > until {
                return false;
            }
            backoff.wait().await;
        }
    }

    /// Takes note of what was handed out by a call that did not find it here, and leaves a process behind
    /// that fetches what comes next, where there is none.
    pub fn go_on_behind(&self, request: &FetchRequest, arguments: &[OsString]) {
        let begun = self.make().and_then(|()| {
            std::fs::write(self.folder.join(POSITION), &request.name)?;
            if self.is_running() {
                return Ok(());
            }
            let mut command = Command::new(std::env::current_exe()?);
            // what else of the server's is open it closes itself, see `close_inherited`
            command
                .args(arguments)
                .arg(FLAG)
                .arg(&self.folder)
                // a signal to the server's processes is not meant for it
                .process_group(0)
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null());
            command.spawn().map(drop)
        });
        if let Err(error) = begun {
            // each call asks the repository by itself
            tracing::debug!("nothing is fetched ahead: {error}");
        }
    }

    fn is_underway(&self, name: &str) -> bool {
        self.folder.join(format!("{name}{UNDERWAY}")).exists()
    }

    /// Whether nobody else can put anything here.
    fn is_own(&self) -> bool {
        let all = self.folder.parent();
        all.is_some_and(is_own) && is_own(&self.folder)
    }

    /// Whether what is here may be handed out: what another timeline left behind must not be.
    fn counts(&self) -> bool {
        if !self.follows {
            return true;
        }
        let checked = std::fs::metadata(self.folder.join(CHECKED)).and_then(|it| it.modified());
        let age = checked.ok().and_then(elapsed_since);
        age.is_some_and(|age| age < CHECKED_LIMIT)
    }

    /// Whether a process fetches ahead.
    fn is_running(&self) -> bool {
        let lock = File::open(self.folder.join(LOCK));
        lock.is_ok_and(|lock| lock.try_lock_shared().is_err())
    }

    /// Makes the folder, and clears what is left of recoveries that are no more.
    fn make(&self) -> io::Result<()> {
        let all = self.folder.parent().unwrap_or(&self.folder);
        make_own(all)?;
        make_own(&self.folder)?;
        for entry in std::fs::read_dir(all)? {
            let path = entry?.path();
            let anchor = path
                .file_name()
                .and_then(|name| Anchor::of_name(name.to_str()?));
            if path != self.folder && anchor.is_some_and(|anchor| !anchor.lives()) {
                std::fs::remove_dir_all(&path).ok();
            }
        }
        Ok(())
    }
}

/// What is fetched with other arguments or settings, or was before the machine was started, is another
/// session's.
fn identity_of(request: &FetchRequest, arguments: &[OsString]) -> Vec<u8> {
    let mut identity = std::fs::read("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    for argument in arguments {
        let asked = argument.as_encoded_bytes();
        let is_this_calls = asked == request.name.as_bytes()
            || asked == request.dest.as_os_str().as_encoded_bytes();
        if !is_this_calls {
            identity.extend_from_slice(asked);
        }
        identity.push(0);
    }
    let settings = std::env::vars_os();
    let mut settings: Vec<(OsString, OsString)> = settings
        .filter(|(name, _)| name.as_encoded_bytes().starts_with(b"ANYWHEN_"))
        .collect();
    settings.sort();
    for (name, value) in settings {
        identity.extend_from_slice(name.as_encoded_bytes());
        identity.push(b'=');
        identity.extend_from_slice(value.as_encoded_bytes());
        identity.push(0);
    }
    let resolved = (request.timeline, request.until, request.system_id);
    identity.extend_from_slice(format!("{resolved:?}").as_bytes());
    identity
}

fn short_digest(bytes: &[u8]) -> String {
    let digest = crate::repository::digest(bytes);
    digest.chars().rev().take(16).collect()
}

/// Closes what the process that began this one had open: until 15 a server's files among them
/// (fd.c, `BasicOpenFilePerm`), whose space would not be free before we end, though they are removed.
pub fn close_inherited() {
    let Ok(open) = std::fs::read_dir("/proc/self/fd") else {
        return;
    };
    let names = open.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let numbers: Vec<i32> = names.filter(|number| *number > 2).collect();
    for number in numbers {
        // one of them was the list's own, and is closed by now
        nix::unistd::close(number).ok();
    }
}

/// How long ago a file was touched, by the clock that stamps files; `None` where that is in the future.
fn elapsed_since(touched: SystemTime) -> Option<Duration> {
    touched.elapsed().ok()
}

/// Where the sessions of a data directory are: beside it, so that neither backups of it nor `pg_rewind`
/// meet them, and on the same file system if possible; else among temporary files.
fn beside(data: &Path) -> Option<PathBuf> {
    let mut name = data.file_name()?.to_owned();
    name.push(SUFFIX);
    let parent = data.parent()?;
    let beside = parent.join(&name);
    let is_writable = rustix::fs::access(parent, rustix::fs::Access::WRITE_OK).is_ok();
    if beside.exists() || is_writable {
        return Some(beside);
    }
    let digest = short_digest(data.as_os_str().as_encoded_bytes());
    Some(std::env::temp_dir().join(format!("anywhen-wal-{}-{digest}", geteuid().as_raw())))
}

/// Makes a folder that nobody else can write to, or refuses one that somebody else can.
fn make_own(folder: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(folder) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    if is_own(folder) {
        return Ok(());
    }
    Err(io::Error::other(format!(
        "not a folder of our own: {}",
        folder.display()
    )))
}

/// Whether it is a folder of this account's that nobody else can write to or read.
fn is_own(folder: &Path) -> bool {
    std::fs::symlink_metadata(folder).is_ok_and(|found| {
        let for_others = found.mode() & 0o077;
        found.is_dir() && found.uid() == geteuid().as_raw() && for_others == 0
    })
}

impl Anchor {
    /// The server's startup process, which ends with the recovery; without a server whoever called us. `None`
    /// where the postmaster is the first process of a container: whatever ends there is its child, and if that
    /// is killed, it takes it for a crash of a server process, and ends all others (postmaster.c,
    /// `CleanupBackend`).
    fn find() -> Option<Self> {
        let parent = getppid().map(Pid::as_raw_nonzero)?.get();
        let postmaster = std::fs::read_to_string("postmaster.pid").ok();
        let postmaster =
            postmaster.and_then(|file| file.lines().next()?.trim().parse::<i32>().ok());
        let Some(postmaster) = postmaster else {
            return Self::of(parent);
        };
        if postmaster == 1 {
            return None;
        }
        let mut pid = parent;
        // a shell or two stand between
        for _ in 0..8 {
            let (parent, _) = stat_of(pid)?;
            if parent == postmaster {
                return Self::of(pid);
            }
            pid = parent;
        }
        Self::of(parent)
    }

    fn of(pid: i32) -> Option<Self> {
        let (_, started) = stat_of(pid)?;
        Some(Self { pid, started })
    }

    /// The one in a session's name.
    fn of_name(name: &str) -> Option<Self> {
        let mut parts = name.split('-');
        Some(Self {
            pid: parts.next()?.parse().ok()?,
            started: parts.next()?.parse().ok()?,
        })
    }

    fn lives(self) -> bool {
        stat_of(self.pid).is_some_and(|(_, started)| started == self.started)
    }
}

/// A process's parent, and when it started (`proc(5)`, `/proc/pid/stat`, fields 4 and 22).
fn stat_of(pid: i32) -> Option<(i32, u64)> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // the name, in parentheses, can hold anything
    let (_, rest) = stat.rsplit_once(") ")?;
    let mut fields = rest.split(' ');
    // a process that has ended, and that nobody has asked about yet, is no more
    let is_dead = matches!(fields.next()?, "Z" | "X");
    let parent = fields.next()?.parse().ok()?;
    let started = fields.nth(17)?.parse().ok()?;
    (!is_dead).then_some((parent, started))
}

/// The segment in a position file.
fn position_in(folder: &Path) -> Option<SegmentName> {
    let text = std::fs::read_to_string(folder.join(POSITION)).ok()?;
    text.parse().ok()
}
