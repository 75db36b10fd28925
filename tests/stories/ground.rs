//! What every story stands on: a folder of its own, the account its programs run as, PostgreSQL's
//! programs, and waiting for something that can be seen.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, geteuid, kill_process};
use tempfile::TempDir;

use crate::endpoint::{BUCKET, Endpoint};

/// How long anything may take that should take a moment, on a machine that builds beside us.
pub(crate) const PATIENCE: Duration = Duration::from_mins(1);

/// Waits until `done` says so, and fails the story with `what` after [`PATIENCE`].
#[track_caller]
pub(crate) fn eventually(what: &str, done: impl FnMut() -> bool) {
    eventually_within(PATIENCE, what, done);
}

/// As [`eventually`], for what may take longer, or must not take so long.
#[track_caller]
pub(crate) fn eventually_within(patience: Duration, what: &str, mut done: impl FnMut() -> bool) {
    some_within(patience, what, || done().then_some(()));
}

/// As [`eventually`], for a condition that yields something.
#[track_caller]
pub(crate) fn eventually_some<T>(what: &str, poll: impl FnMut() -> Option<T>) -> T {
    some_within(PATIENCE, what, poll)
}

#[track_caller]
fn some_within<T>(patience: Duration, what: &str, mut poll: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + patience;
    loop {
        if let Some(found) = poll() {
            return found;
        }
        assert!(
            Instant::now() < deadline,
            "waited {} s in vain: {what}",
            patience.as_secs()
        );
        pause();
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "the pause between two looks at something observable, bounded by a deadline"
)]
pub(crate) fn pause() {
    std::thread::sleep(Duration::from_millis(20));
}

/// The account that servers and `anywhen` run as: PostgreSQL refuses to run as root, so that root's
/// stories run them as `postgres`, or as `nobody` where there is no such user.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Account {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

impl Account {
    /// None where the stories run as somebody ordinary already.
    pub(crate) fn of_programs() -> Option<Self> {
        static ACCOUNT: OnceLock<Option<Account>> = OnceLock::new();
        *ACCOUNT.get_or_init(|| {
            geteuid().is_root().then(|| {
                let passwd = fs::read_to_string("/etc/passwd").unwrap();
                ["postgres", "nobody"]
                    .iter()
                    .find_map(|name| Self::named(&passwd, name))
                    .expect("a user postgres or nobody to run servers as")
            })
        })
    }

    fn named(passwd: &str, name: &str) -> Option<Self> {
        passwd.lines().find_map(|line| {
            let fields: Vec<&str> = line.split(':').collect();
            (fields.first() == Some(&name)).then(|| Self {
                uid: fields[2].parse().unwrap(),
                gid: fields[3].parse().unwrap(),
            })
        })
    }
}

/// Renames what the account of the stories owns.
#[track_caller]
pub(crate) fn rename(from: &Path, to: &Path) {
    let moved = command("mv").arg(from).arg(to).status();
    assert!(moved.unwrap().success());
}

/// A command that runs as the stories' account, with nothing inherited but PATH.
pub(crate) fn command(program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new(program);
    command
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .env("LC_ALL", "C.UTF-8")
        .current_dir("/")
        .stdin(Stdio::null());
    if let Some(account) = Account::of_programs() {
        // with uid set, the standard library drops root's supplementary groups too
        command.uid(account.uid).gid(account.gid);
    }
    command
}

/// What a program finds in its environment.
pub(crate) type Environment = Vec<(&'static str, String)>;

/// Names where the repositories of stories are that do not ask for a place: unset, in folders; `s3`, in
/// buckets and encrypted.
const STORY_REPOSITORY: &str = "ANYWHEN_STORY_REPOSITORY";

/// A folder for one story, removed with it.
pub(crate) struct Ground {
    /// Serves the folder `s3`, where the repositories are in a bucket.
    endpoint: Option<Endpoint>,
    environment: Environment,
    folder: TempDir,
}

impl Ground {
    /// A ground whose repositories are where this run has them.
    pub(crate) fn new() -> Self {
        match std::env::var(STORY_REPOSITORY).as_deref() {
            Err(_) => Self::on_disk(),
            Ok("s3") => Self::on_s3(),
            Ok(other) => panic!("{STORY_REPOSITORY} is unset or s3: {other:?}"),
        }
    }

    /// A ground whose repositories are in a bucket of an endpoint of its own, and encrypted.
    pub(crate) fn on_s3() -> Self {
        let mut ground = Self::on_disk();
        let buckets = ground.make_dir("s3", 0o755);
        ground.make_dir(&format!("s3/{BUCKET}"), 0o755);
        let endpoint = Endpoint::start(&buckets, ground.path("endpoint"));
        ground.environment = endpoint.environment();
        ground.endpoint = Some(endpoint);
        ground
    }

    /// The same ground with variables for its servers and its calls of `anywhen`.
    pub(crate) fn with_environment(mut self, environment: Environment) -> Self {
        self.environment = environment;
        self
    }

    /// A ground whose repositories are folders.
    pub(crate) fn on_disk() -> Self {
        // the path of a Unix socket may have 107 bytes: not every TMPDIR leaves room for it
        let folder = tempfile::Builder::new()
            .prefix("anywhen-")
            .permissions(fs::Permissions::from_mode(0o755))
            .tempdir_in("/tmp")
            .unwrap();
        give(folder.path());
        Self {
            endpoint: None,
            environment: Vec::new(),
            folder,
        }
    }

    pub(crate) fn endpoint(&self) -> Option<&Endpoint> {
        self.endpoint.as_ref()
    }

    pub(crate) fn endpoint_mut(&mut self) -> &mut Endpoint {
        self.endpoint.as_mut().expect("a ground with an endpoint")
    }

    /// What its servers and its calls of `anywhen` find in their environment.
    pub(crate) fn environment(&self) -> Environment {
        self.environment.clone()
    }

    /// The folder of a repository below this one.
    pub(crate) fn place_of(&self, repository: &str) -> String {
        match self.endpoint {
            Some(_) => format!("s3/{BUCKET}/{repository}"),
            None => repository.to_owned(),
        }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Makes a folder that belongs to the account, with `mode`.
    pub(crate) fn make_dir(&self, name: &str, mode: u32) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        give(&path);
        path
    }

    /// Writes a file that belongs to the account, with `mode`.
    pub(crate) fn write(&self, name: &str, contents: &str, mode: u32) -> PathBuf {
        let path = self.path(name);
        write_as_account(&path, contents.as_bytes(), mode);
        path
    }
}

/// A folder that all stories of this run share. A process has no last moment to remove it in, so the
/// next run removes those whose process is gone.
pub(crate) fn shared_folder() -> &'static Path {
    static SHARED: OnceLock<PathBuf> = OnceLock::new();
    SHARED.get_or_init(|| {
        const PREFIX: &str = "anywhen-shared-";
        for entry in fs::read_dir("/tmp").unwrap().flatten() {
            let name = entry.file_name();
            let owner = name
                .to_str()
                .and_then(|name| name.strip_prefix(PREFIX)?.split('-').next());
            if owner.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
                drop(fs::remove_dir_all(entry.path()));
            }
        }
        let folder = tempfile::Builder::new()
            .prefix(&format!("{PREFIX}{}-", std::process::id()))
            .permissions(fs::Permissions::from_mode(0o755))
            .tempdir_in("/tmp")
            .unwrap()
            .keep();
        give(&folder);
        folder
    })
}

pub(crate) fn write_as_account(path: &Path, contents: &[u8], mode: u32) {
    let mut file = File::create(path).unwrap();
    file.set_permissions(fs::Permissions::from_mode(mode))
        .unwrap();
    file.write_all(contents).unwrap();
    give(path);
}

/// Gives `path` to the account that programs run as.
pub(crate) fn give(path: &Path) {
    if let Some(account) = Account::of_programs() {
        chown(path, Some(account.uid), Some(account.gid)).unwrap();
    }
}

/// PostgreSQL's programs of the major under test.
pub(crate) struct Programs {
    bin: PathBuf,
    pub(crate) major: u32,
}

impl Programs {
    /// # Panics
    ///
    /// Without `ANYWHEN_PG_BIN`: a story that is skipped silently protects nobody.
    pub(crate) fn get() -> &'static Self {
        static PROGRAMS: OnceLock<Programs> = OnceLock::new();
        PROGRAMS.get_or_init(|| {
            let bin = std::env::var_os("ANYWHEN_PG_BIN")
                .map(PathBuf::from)
                .expect("ANYWHEN_PG_BIN names a folder with initdb and postgres; run ./check, which sets it");
            let major = Self::major_of(&bin)
                .unwrap_or_else(|| panic!("no PostgreSQL that runs in {}", bin.display()));
            Self { bin, major }
        })
    }

    pub(crate) fn bin(&self) -> &Path {
        &self.bin
    }

    pub(crate) fn program(&self, name: &str) -> PathBuf {
        self.bin.join(name)
    }

    /// A client tool of this major, or else of the nearest later one, or else of the nearest earlier:
    /// some majors come as servers alone.
    pub(crate) fn tool(&self, name: &str) -> PathBuf {
        let own = self.program(name);
        if own.exists() {
            return own;
        }
        let mut others: Vec<(u32, PathBuf)> = self
            .other_bins()
            .into_iter()
            .filter(|bin| bin.join(name).exists())
            .filter_map(|bin| Some((Self::major_of(&bin)?, bin.join(name))))
            .collect();
        others.sort_by_key(|(major, _)| (*major < self.major, major.abs_diff(self.major)));
        others
            .into_iter()
            .next()
            .unwrap_or_else(|| {
                panic!(
                    "no {name} for PostgreSQL {}: ./check --majors installs one",
                    self.major
                )
            })
            .1
    }

    fn other_bins(&self) -> Vec<PathBuf> {
        let mut roots = vec![PathBuf::from("/usr/lib/postgresql")];
        // DIR/MAJOR/bin stands beside the other majors
        roots.extend(self.bin.parent().and_then(Path::parent).map(Path::to_owned));
        roots.extend(std::env::var_os("ANYWHEN_PG_DIR").map(PathBuf::from));
        roots
            .iter()
            .filter_map(|root| fs::read_dir(root).ok())
            .flatten()
            .map(|entry| entry.unwrap().path().join("bin"))
            .collect()
    }

    fn major_of(bin: &Path) -> Option<u32> {
        let output = Command::new(bin.join("postgres"))
            .arg("--version")
            .output()
            .ok()?;
        let version = String::from_utf8(output.stdout).ok()?;
        let number = version.strip_prefix("postgres (PostgreSQL) ")?;
        let digits: String = number.chars().take_while(char::is_ascii_digit).collect();
        digits.parse().ok()
    }
}

/// A program running in the background, killed when it is dropped. Its output goes to files.
pub(crate) struct Running {
    pub(crate) child: Child,
    out: PathBuf,
}

impl Running {
    /// Starts `command` with standard output and error in `<out>.stdout` and `<out>.stderr`.
    pub(crate) fn start(mut command: Command, out: PathBuf) -> Self {
        let child = command
            .stdout(File::create(out.with_extension("stdout")).unwrap())
            .stderr(File::create(out.with_extension("stderr")).unwrap())
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"));
        Self { child, out }
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.child.id()).unwrap()).unwrap();
        kill_process(pid, signal).unwrap();
    }

    /// The exit status, when it has ended.
    pub(crate) fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().unwrap()
    }

    /// Waits for the end of it.
    #[track_caller]
    pub(crate) fn end(&mut self, what: &str) -> ExitStatus {
        self.end_within(PATIENCE, what)
    }

    /// As [`Running::end`], for what has a limit of its own.
    #[track_caller]
    pub(crate) fn end_within(&mut self, patience: Duration, what: &str) -> ExitStatus {
        let deadline = Instant::now() + patience;
        while Instant::now() < deadline {
            if let Some(status) = self.ended() {
                return status;
            }
            pause();
        }
        panic!("{what} did not end; it said: {}", self.stderr());
    }

    pub(crate) fn stdout(&self) -> String {
        self.read("stdout")
    }

    pub(crate) fn stderr(&self) -> String {
        self.read("stderr")
    }

    fn read(&self, which: &str) -> String {
        let bytes = fs::read(self.out.with_extension(which)).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            drop(self.child.kill());
            drop(self.child.wait());
        }
    }
}

/// A lock whose holder may have panicked: the next story does not suffer for it.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
