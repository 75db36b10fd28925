//! The product as a black box: the `anywhen` binary, a repository in a folder or a bucket, and the objects
//! in it.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::process::Signal;
use serde_json::Value;

use crate::endpoint::{BUCKET, Endpoint, REGION};
use crate::ground::{Environment, Ground, Programs, Running, command, eventually, shared_folder};
use crate::objects::folders_below;
use crate::sealed::Identity;
use crate::server::{Server, value};

/// One repository, one cluster name, and where the output of the commands goes.
pub(crate) struct Anywhen {
    url: String,
    /// The folder of the repository, where an object is a file; of a bucket too.
    repository: PathBuf,
    environment: Environment,
    /// What says more of the repository than its address does.
    config: Option<PathBuf>,
    state_dir: PathBuf,
    work: PathBuf,
    home: PathBuf,
    pub(crate) cluster: &'static str,
    calls: AtomicUsize,
}

/// How one call of `anywhen` ended.
#[derive(Debug)]
pub(crate) struct Ended {
    /// The exit code; none when a signal ended it.
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    call: String,
}

impl Anywhen {
    /// A repository in the folder `repository` of `ground`, for the cluster `main`.
    pub(crate) fn new(ground: &Ground) -> Self {
        Self::named(ground, "repository", "main")
    }

    pub(crate) fn named(ground: &Ground, repository: &str, cluster: &'static str) -> Self {
        let folder = ground.make_dir(&ground.place_of(repository), 0o700);
        match ground.endpoint() {
            None => Self::at(ground, repository, format!("file://{}", folder.display())),
            Some(endpoint) => {
                let url = format!("s3://{BUCKET}/{repository}");
                let table = repository_table("stories", &url, endpoint);
                Self::with_table(ground, repository, url, &table)
            }
        }
        .of_cluster(cluster)
    }

    /// A repository that needs more said than its address: the table of a configuration file.
    pub(crate) fn with_table(ground: &Ground, name: &str, url: String, table: &str) -> Self {
        let mut anywhen = Self::at(ground, name, url);
        let file = format!("state_dir = \"{}\"\n{table}", anywhen.state_dir.display());
        anywhen.config = Some(ground.write(&format!("{name}.toml"), &file, 0o600));
        anywhen
    }

    fn of_cluster(self, cluster: &'static str) -> Self {
        Self { cluster, ..self }
    }

    fn at(ground: &Ground, name: &str, url: String) -> Self {
        Self {
            url,
            repository: ground.path(&ground.place_of(name)),
            environment: ground.environment(),
            config: None,
            state_dir: ground.make_dir("state", 0o700),
            work: ground.make_dir(&format!("{name}.calls"), 0o755),
            home: ground.make_dir("home", 0o700),
            cluster: "main",
            calls: AtomicUsize::new(0),
        }
    }

    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// Each flag that leads to the repository and opens it without a file, its variable, and its value.
    pub(crate) fn flags(&self) -> Vec<(&'static str, &'static str, String)> {
        let mut flags = vec![
            ("--repo", "ANYWHEN_REPO", self.url.clone()),
            ("--cluster", "ANYWHEN_CLUSTER", self.cluster.to_owned()),
        ];
        if self.config.is_some() {
            let Identity { recipient, file } = Identity::get();
            let (file, keys) = (file.display(), self.state_dir.display());
            flags.extend([
                ("--recipient", "ANYWHEN_RECIPIENTS", recipient.clone()),
                ("--identity-file", "ANYWHEN_IDENTITY_FILE", file.to_string()),
                ("--state-dir", "ANYWHEN_STATE_DIR", keys.to_string()),
            ]);
        }
        flags
    }

    /// The table of the repository, for a configuration file.
    pub(crate) fn table(&self, name: &str, ground: &Ground) -> String {
        match ground.endpoint() {
            Some(endpoint) => repository_table(name, &self.url, endpoint),
            None => format!("[repository.{name}]\nurl = \"{}\"\n", self.url),
        }
    }

    /// The flags that lead to the repository as other commands have it.
    pub(crate) fn place(&self) -> [&str; 2] {
        match &self.config {
            Some(config) => ["--config", config.to_str().unwrap()],
            None => ["--repo", &self.url],
        }
    }

    pub(crate) fn repository(&self) -> &Path {
        &self.repository
    }

    /// Takes away the right to write into any folder of the repository, or gives it back: an outage.
    pub(crate) fn set_writable(&self, writable: bool) {
        let mode = if writable { 0o700 } else { 0o500 };
        for folder in folders_below(&self.repository) {
            fs::set_permissions(&folder, fs::Permissions::from_mode(mode)).unwrap();
        }
    }

    /// `anywhen` with an environment that holds nothing of the developer's.
    pub(crate) fn bare(&self) -> Command {
        let mut command = command(binary());
        command.env("HOME", &self.home);
        command.envs(self.environment.iter().cloned());
        command
    }

    /// `anywhen ARGUMENTS… --repo URL --cluster NAME`, or `--config FILE` where an address says too little.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = self.bare();
        command
            .args(arguments)
            .args(self.place())
            .args(["--cluster", self.cluster]);
        command
    }

    /// Runs any command to its end.
    #[track_caller]
    pub(crate) fn run_command(&self, command: Command) -> Ended {
        let call = format!("{command:?}");
        let mut running = Running::start(command, self.next_output());
        let status = running.end(&call);
        Ended {
            code: status.code(),
            stdout: running.stdout(),
            stderr: running.stderr(),
            call,
        }
    }

    #[track_caller]
    pub(crate) fn run(&self, arguments: &[&str]) -> Ended {
        self.run_command(self.command(arguments))
    }

    /// Runs a command that speaks to `server`.
    #[track_caller]
    pub(crate) fn run_on(&self, server: &Server, arguments: &[&str]) -> Ended {
        let mut command = self.command(arguments);
        command.args(["-d", &server.conninfo()]);
        self.run_command(command)
    }

    /// The document that `ARGUMENTS… --json` prints, of a call that must succeed.
    #[track_caller]
    pub(crate) fn json(&self, arguments: &[&str]) -> Value {
        self.run(&[arguments, &["--json"]].concat())
            .succeeded()
            .document()
    }

    /// Takes a backup and returns its row of the list.
    #[track_caller]
    pub(crate) fn backup(&self, server: &Server) -> Value {
        self.run_on(server, &["backup", "--checkpoint", "fast", "--json"])
            .succeeded()
            .document()
    }

    /// Restores into `target`, which must succeed.
    #[track_caller]
    pub(crate) fn restore(&self, target: &Path, arguments: &[&str]) -> Value {
        let target = target.to_str().unwrap();
        let bin = Programs::get().bin().to_str().unwrap();
        let fixed: &[&str] = &["restore", "-D", target, "--pg-bin", bin];
        self.json(&[fixed, arguments].concat())
    }

    /// Tries to restore into `target`, which must fail with `code` and leave nothing behind.
    #[track_caller]
    pub(crate) fn restore_refused(&self, target: &Path, arguments: &[&str], code: i32) -> Ended {
        let fixed: &[&str] = &["restore", "-D", target.to_str().unwrap()];
        let ended = self.run(&[fixed, arguments].concat());
        ended.failed_with(code);
        let left = fs::read_dir(target).map_or(0, Iterator::count);
        assert_eq!(
            left,
            0,
            "something is left in {}: {ended:?}",
            target.display()
        );
        ended
    }

    /// Starts `stream` on `server` and waits until the server streams to it.
    #[track_caller]
    pub(crate) fn stream(&self, server: &Server) -> Stream {
        self.stream_with(server, &["--flush-interval", "200ms"])
    }

    #[track_caller]
    pub(crate) fn stream_with(&self, server: &Server, arguments: &[&str]) -> Stream {
        let mut command = self.command(&["stream"]);
        command.args(["-d", &server.conninfo()]).args(arguments);
        self.stream_of(server, command)
    }

    /// Starts a `stream` command and waits until `server` streams to it.
    #[track_caller]
    pub(crate) fn stream_of(&self, server: &Server, command: Command) -> Stream {
        let mut stream = Stream {
            running: self.launch(command),
        };
        eventually("the server streams to anywhen", || {
            stream.assert_running();
            let streaming = "select count(*) from pg_stat_replication where state = 'streaming'";
            value(&mut server.sql(), streaming) != "0"
        });
        stream
    }

    /// Starts any command of `anywhen` without waiting for its end.
    pub(crate) fn launch(&self, command: Command) -> Running {
        Running::start(command, self.next_output())
    }

    fn next_output(&self) -> PathBuf {
        self.work
            .join(self.calls.fetch_add(1, Ordering::Relaxed).to_string())
    }
}

impl Ended {
    #[track_caller]
    pub(crate) fn succeeded(self) -> Self {
        self.failed_with(0);
        self
    }

    /// Asserts on the exit code.
    #[track_caller]
    pub(crate) fn failed_with(&self, code: i32) {
        assert_eq!(self.code, Some(code), "{self}");
    }

    /// Asserts on failure with any of the codes that DESIGN.md lists, a panic's 101 not among them.
    #[track_caller]
    pub(crate) fn failed(&self) {
        assert!(matches!(self.code, Some(1..=5)), "{self}");
    }

    /// Asserts that standard error says each of `words`, in any case.
    #[track_caller]
    pub(crate) fn says(&self, words: &[&str]) {
        let said = self.stderr.to_lowercase();
        for word in words {
            assert!(
                said.contains(&word.to_lowercase()),
                "nothing said of {word:?}: {self}"
            );
        }
    }

    /// The one JSON document on standard output.
    #[track_caller]
    pub(crate) fn document(&self) -> Value {
        serde_json::from_str(&self.stdout)
            .unwrap_or_else(|error| panic!("no JSON document: {error}: {self}"))
    }
}

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            code,
            stdout,
            stderr,
            call,
        } = self;
        write!(
            f,
            "{call}\nended with {code:?}\n--- out:\n{stdout}\n--- err:\n{stderr}"
        )
    }
}

/// A running `anywhen stream`.
pub(crate) struct Stream {
    running: Running,
}

impl Stream {
    pub(crate) fn has_ended(&mut self) -> bool {
        self.running.ended().is_some()
    }

    #[track_caller]
    pub(crate) fn assert_running(&mut self) {
        if let Some(status) = self.running.ended() {
            panic!("the stream ended with {status}: {}", self.running.stderr());
        }
    }

    /// Waits until everything that `server` has written so far is acknowledged as durable.
    #[track_caller]
    pub(crate) fn store_all(&mut self, server: &Server) {
        let mut sql = server.sql();
        let written = value(&mut sql, "select pg_current_wal_flush_lsn()");
        let reached = format!(
            "select coalesce(bool_or(flush_lsn >= '{written}'), false)
             from pg_stat_replication where application_name <> 'walreceiver'"
        );
        eventually("the stream stores all that is written", || {
            self.assert_running();
            value(&mut sql, &reached) == "t"
        });
    }

    /// Asks it to stop, and asserts that it stored all. Gives what it said.
    #[track_caller]
    pub(crate) fn stop(mut self) -> String {
        self.running.signal(Signal::TERM);
        self.assert_ended_well();
        self.stderr()
    }

    #[track_caller]
    pub(crate) fn interrupt(mut self) {
        self.running.signal(Signal::INT);
        self.assert_ended_well();
    }

    #[track_caller]
    fn assert_ended_well(&mut self) {
        let status = self.running.end("the stream that was asked to stop");
        assert_eq!(status.code(), Some(0), "{}", self.running.stderr());
    }

    /// Asks it to stop, which it cannot do well.
    #[track_caller]
    pub(crate) fn stop_in_vain(mut self) -> Ended {
        self.running.signal(Signal::TERM);
        let status = self.running.end("the stream that was asked to stop");
        Ended {
            code: status.code(),
            stdout: self.running.stdout(),
            stderr: self.running.stderr(),
            call: "anywhen stream".to_owned(),
        }
    }

    /// Stops it where it is, or lets it go on.
    pub(crate) fn signal(&self, signal: Signal) {
        self.running.signal(signal);
    }

    /// What a power cut does.
    pub(crate) fn kill9(mut self) {
        self.running.signal(Signal::KILL);
        self.running.end("the killed stream");
    }

    pub(crate) fn stderr(&self) -> String {
        self.running.stderr()
    }
}

/// The table of an encrypted repository in a bucket, for a configuration file.
pub(crate) fn repository_table(name: &str, url: &str, endpoint: &Endpoint) -> String {
    let Identity { recipient, file } = Identity::get();
    format!(
        "[repository.{name}]\nurl = \"{url}\"\nendpoint = \"{}\"\nregion = \"{REGION}\"\n\
         allow_http = true\nretry_for = \"3s\"\n\
         recipients = [\"{recipient}\"]\nidentity_file = \"{}\"\n",
        endpoint.url(),
        file.display()
    )
}

/// The binary under test, where the account of the stories can read it: root's checkout may be closed
/// to it.
pub(crate) fn binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| install(Path::new(env!("CARGO_BIN_EXE_anywhen")), "anywhen"))
}

/// Copies a program into the folder that all stories share.
pub(crate) fn install(program: &Path, name: &str) -> PathBuf {
    let copy = shared_folder().join(name);
    // not by our own hands: a program that is open for writing, in a child forked meanwhile by another
    // story too, cannot be executed
    let status = Command::new("install")
        .arg("--mode=755")
        .arg(program)
        .arg(&copy)
        .status();
    assert!(status.unwrap().success(), "cannot copy {name}");
    copy
}
