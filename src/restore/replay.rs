//! `--replay`: the restored server, started where nobody else reaches it, until it stands at its
//! target.

use std::fs::{self, DirBuilder, File};
use std::io::Read as _;
use std::os::unix::fs::{
    DirBuilderExt as _, FileExt as _, MetadataExt as _, OpenOptionsExt as _, fchown,
};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use basebackup::ControlFile;
use replication::connect::{Purpose, connect};
use replication::connection::QueryError;
use replication::conninfo::{ConnectionSettings, Environment};
use rustix::fs::OFlags;
use rustix::process::{Pid, Signal, kill_process};
use tokio::process::{Child, Command};
use wal::{Lsn, Parameters, SegmentName, SegmentSize};

use super::early_end::what_helps;
use super::plan::{Reached, RestorePlan, Work};
use super::target::{TargetAction, rfc3339};
use crate::error::{Error, Kind, Result, chain, io};
use crate::retry::Backoff;

const POLL_FIRST: Duration = Duration::from_millis(20);
const POLL_MAX: Duration = Duration::from_millis(500);
/// How many of the server's last lines are shown where it failed.
const SHOWN_LINES: usize = 12;
/// How much of the end of the server's log is looked at, in bytes.
const LOG_BYTES: u64 = 1 << 20;
/// How often a server that says in its log that it is done is asked for more than that.
const ASKED_AGAIN: u32 = 5;
/// Said by a server that was to shut down at its target (`xlogrecovery.c`).
const SHUT_DOWN_AT_TARGET: &str = "shutdown at recovery target";
/// Said by a server that stands at its target (`xlogrecovery.c`, `recoveryPausesHere`).
const PAUSED_AT_TARGET: &str = "pausing at the end of recovery";
/// Said by a server that cannot go on with the settings that it has (`xlogrecovery.c`,
/// `RecoveryRequiresIntParameter`); since 14.
const PAUSED_ELSEWHERE: &str = "recovery has paused";
/// Said by a server of a file that `restore_command` has fetched, before its name (`xlogarchive.c`).
const RESTORED: &str = "restored log file \"";
/// Said by a server that has become a primary (`xlog.c`, `StartupXLOG`).
const RECOVERY_COMPLETE: &str = "archive recovery complete";

/// What a replay came to.
pub(super) struct Replayed {
    pub(super) reached: Reached,
    pub(super) notes: Vec<String>,
}

/// The settings in `pg_control` that a server in recovery must not be below.
pub(super) fn parameters_of(control: &ControlFile) -> Parameters {
    let signed = |value: u32| i32::try_from(value).unwrap_or(i32::MAX);
    Parameters {
        max_connections: signed(control.max_connections),
        max_worker_processes: signed(control.max_worker_processes),
        max_wal_senders: signed(control.max_wal_senders),
        max_prepared_transactions: signed(control.max_prepared_xacts),
        max_locks_per_transaction: signed(control.max_locks_per_xact),
    }
}

/// The `postgres` program of a major version: in `given`, or where distributions put it, or in
/// `PATH`.
pub(super) fn find_postgres(given: Option<&Path>, major: u32) -> Result<PathBuf> {
    if let Some(folder) = given {
        let program = folder.join("postgres");
        return match version_of(&program) {
            Some(found) if found == major => Ok(program),
            Some(found) => Err(Error::usage(format!(
                "{} is of another major version: expected={major}, found={found}",
                program.display()
            ))),
            None => Err(Error::usage(format!("cannot run {}", program.display()))
                .hint("--pg-bin names the folder of the programs postgres and pg_ctl")),
        };
    }
    let usual = [
        format!("/usr/lib/postgresql/{major}/bin"),
        format!("/usr/pgsql-{major}/bin"),
    ];
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = usual
        .into_iter()
        .map(PathBuf::from)
        .chain(std::env::split_paths(&path));
    let mut programs = folders.map(|folder| folder.join("postgres"));
    programs
        .find(|program| version_of(program) == Some(major))
        .ok_or_else(|| {
            Error::usage(format!("no programs of PostgreSQL {major} were found"))
                .hint("name their folder with --pg-bin, or restore without --replay")
        })
}

/// The major version that a program says it is.
fn version_of(program: &Path) -> Option<u32> {
    if !program.is_file() {
        return None;
    }
    let output = std::process::Command::new(program)
        .arg("--version")
        .output()
        .ok()?;
    major_of(&String::from_utf8_lossy(&output.stdout))
}

/// The first number of `postgres (PostgreSQL) 18.6`, or of `… 19rc1`.
fn major_of(shown: &str) -> Option<u32> {
    let version = shown.split_once("(PostgreSQL) ")?.1;
    let digits = version
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(version.len());
    version.get(..digits)?.parse().ok()
}

/// Starts the restored server, waits until it has reached its target, and stops it.
pub(super) async fn replay(
    plan: &RestorePlan,
    control: &ControlFile,
    postgres: &Path,
    progress: &(dyn Fn(Work, u64, u64) + Sync),
) -> Result<Replayed> {
    let private = PrivateFolder::create()?;
    let mut server = Server::start(plan, control, postgres, &private)?;
    let outcome = server.until_at_target(plan, &private, progress).await;
    let stopped = server.stop().await;
    let reached = outcome.map_err(|error| {
        let helps = what_helps(&private.log());
        let helps = helps.unwrap_or("the server's log above says what it lacks");
        let again = start_command(plan);
        let dir = plan.target_dir.display();
        error.hint(format!(
            "{helps}. The files are restored and stay in {dir}, which starts again with: {again}"
        ))
    })?;
    stopped?;
    Ok(reached)
}

/// A folder for the socket, the log and the settings of a private server.
struct PrivateFolder {
    path: PathBuf,
    /// The folder itself: its owner could put something else at its path.
    dir: File,
    log: File,
}

impl PrivateFolder {
    fn create() -> Result<Self> {
        // the path of a Unix socket may have 107 bytes: not every TMPDIR leaves room for it
        let process = std::process::id();
        let names = (0..100).map(|at| PathBuf::from(format!("/tmp/anywhen-replay-{process}-{at}")));
        for path in names {
            match DirBuilder::new().mode(0o700).create(&path) {
                Ok(()) => {
                    let dir = File::open(&path).map_err(|error| io("open", &path, &error))?;
                    let log = create_file(&path.join("log"))?;
                    return Ok(Self { path, dir, log });
                }
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(io("create", &path, &error)),
            }
        }
        Err(Error::failure(
            "too many folders are left of earlier replays: /tmp/anywhen-replay-*",
        ))
    }

    /// Adds a file; only before the folder is given away.
    fn write(&self, plan: &RestorePlan, name: &str, text: &str) -> Result<PathBuf> {
        let path = self.path.join(name);
        let file = create_file(&path)?;
        let written = file.write_all_at(text.as_bytes(), 0);
        written.map_err(|error| io("write", &path, &error))?;
        give(&file, &path, plan)?;
        Ok(path)
    }

    /// Gives the folder to the server's user. From here on names in it are not to be trusted.
    fn give_away(&self, plan: &RestorePlan) -> Result<()> {
        give(&self.dir, &self.path, plan)
    }

    /// What the server wrote last.
    fn log(&self) -> String {
        let length = self.log.metadata().map_or(0, |metadata| metadata.size());
        let read = length.min(LOG_BYTES);
        let mut bytes = vec![0; usize::try_from(read).unwrap_or_default()];
        let found = self.log.read_exact_at(&mut bytes, length - read);
        if let Err(error) = found {
            tracing::debug!("the log changed while it was read: {error}");
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The server's last lines, for an error.
    fn last_lines(&self) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        let from = lines.len().saturating_sub(SHOWN_LINES);
        lines.get(from..).unwrap_or_default().join("\n  ")
    }
}

impl Drop for PrivateFolder {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.path) {
            tracing::debug!("{} stays: {error}", self.path.display());
        }
    }
}

fn create_file(path: &Path) -> Result<File> {
    let mut options = File::options();
    let options = options.read(true).write(true).create_new(true).mode(0o600);
    options
        .open(path)
        .map_err(|error| io("create", path, &error))
}

/// Gives an open file or folder to the server's user.
fn give(file: &File, path: &Path, plan: &RestorePlan) -> Result<()> {
    let Some(owner) = plan.owner else {
        return Ok(());
    };
    fchown(file, Some(owner.uid), Some(owner.gid))
        .map_err(|error| io("change the owner of", path, &error))
}

/// The private server; told to end at once if it is dropped.
struct Server {
    child: Child,
}

impl Server {
    fn start(
        plan: &RestorePlan,
        control: &ControlFile,
        postgres: &Path,
        private: &PrivateFolder,
    ) -> Result<Self> {
        let log = private.path.join("log");
        let open_log = || {
            let file = File::options().append(true).open(&log);
            file.map_err(|error| io("open", &log, &error))
        };
        let (stdout, stderr) = (open_log()?, open_log()?);
        let mut command = Command::new(postgres);
        command.arg("-D").arg(&plan.target_dir);
        for (name, value) in private_settings(plan, control, private)? {
            command.arg("-c").arg(format!("{name}={value}"));
        }
        private.give_away(plan)?;
        command
            .env_clear()
            .env("PATH", "/usr/local/bin:/usr/bin:/bin")
            .envs(plan.options.restore_command.environment.0.iter().cloned())
            .current_dir(&plan.target_dir)
            .stdin(Stdio::null())
            .stdout(stdout)
            .stderr(stderr)
            // a Ctrl-C in the terminal is ours to pass on
            .process_group(0);
        if let Some(owner) = plan.owner {
            command.uid(owner.uid).gid(owner.gid);
        }
        let child = command
            .spawn()
            .map_err(|error| io("start", postgres, &error))?;
        Ok(Self { child })
    }

    /// Waits until the server stands at its target, or has ended.
    async fn until_at_target(
        &mut self,
        plan: &RestorePlan,
        private: &PrivateFolder,
        progress: &(dyn Fn(Work, u64, u64) + Sync),
    ) -> Result<Replayed> {
        let wanted = plan.replayed_up_to();
        let start = plan.backup.start_lsn;
        let mut furthest: Option<Lsn> = None;
        let mut backoff = Backoff::new(POLL_FIRST, POLL_MAX);
        let mut asking = Asking::new(plan, private);
        loop {
            let ended = self.child.try_wait();
            if let Some(status) = ended.map_err(|error| Error::failure(error.to_string()))? {
                return after_end(plan, private, status);
            }
            let state = asking.state().await;
            let at = match &state {
                State::Recovering(at, _) => at.or_else(|| asking.fetched()),
                _ => asking.fetched(),
            };
            // while it changes its state it tells less
            furthest = furthest.max(at);
            if let Some(at) = furthest {
                let at = at.min(wanted);
                let reached = match &state {
                    State::Recovering(_, time) => {
                        time.as_deref().and_then(|time| time.parse().ok())
                    }
                    _ => None,
                };
                progress(
                    Work::Replay(reached),
                    at.bytes_since(start),
                    wanted.bytes_since(start),
                );
            }
            match state {
                State::Unknown | State::Recovering(..) => {}
                State::Paused(reached) if reached.lsn >= wanted => {
                    return Ok(Replayed {
                        reached,
                        notes: ways_on(plan),
                    });
                }
                State::Paused(reached) => {
                    return Err(not_reached(
                        private,
                        &format!("the server paused at {} before the target", reached.lsn),
                    ));
                }
                State::Stuck => {
                    return Err(not_reached(private, "the server paused before the target"));
                }
                State::Promoted(reached) if reached.lsn >= wanted => {
                    let mut notes = Vec::new();
                    if plan.action == TargetAction::Pause {
                        notes.push(
                            "the server could not be read at the target, and so did not pause there: it \
                             is open for writing"
                                .to_owned(),
                        );
                    }
                    notes.extend(ways_on(plan));
                    return Ok(Replayed { reached, notes });
                }
                State::Promoted(reached) => {
                    return Err(not_reached(
                        private,
                        &format!("recovery ended at {} before the target", reached.lsn),
                    ));
                }
            }
            backoff.wait().await;
        }
    }

    /// A fast shutdown.
    async fn stop(&mut self) -> Result<()> {
        self.signal(Signal::INT);
        match self.child.wait().await {
            Ok(_status) => Ok(()),
            Err(error) => Err(Error::failure(format!(
                "cannot wait for the server: {error}"
            ))),
        }
    }

    fn signal(&self, signal: Signal) {
        let pid = self
            .child
            .id()
            .and_then(|id| i32::try_from(id).ok())
            .and_then(Pid::from_raw);
        if let Some(pid) = pid
            && let Err(error) = kill_process(pid, signal)
        {
            tracing::debug!("the server has gone already: {error}");
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // an immediate shutdown; a server that was waited for has no id any more
        self.signal(Signal::QUIT);
    }
}

/// What makes the server private, and lets it start on this machine.
fn private_settings(
    plan: &RestorePlan,
    control: &ControlFile,
    private: &PrivateFolder,
) -> Result<Vec<(&'static str, String)>> {
    let shown = |path: &Path| path.to_string_lossy().into_owned();
    let hba = private.write(plan, "pg_hba.conf", "local all all trust\n")?;
    let ident = private.write(plan, "pg_ident.conf", "")?;
    let mut settings = vec![
        ("listen_addresses", String::new()),
        ("unix_socket_directories", shown(&private.path)),
        ("unix_socket_permissions", "0700".to_owned()),
        ("unix_socket_group", String::new()),
        ("port", PORT.to_owned()),
        ("data_directory", shown(&plan.target_dir)),
        ("hba_file", shown(&hba)),
        ("ident_file", shown(&ident)),
        ("external_pid_file", String::new()),
        ("logging_collector", "off".to_owned()),
        ("log_destination", "stderr".to_owned()),
        // what the log is searched for must be in it
        ("log_min_messages", "warning".to_owned()),
        ("lc_messages", "C".to_owned()),
        ("hot_standby", "on".to_owned()),
        // subscriptions are the source's
        ("max_logical_replication_workers", "0".to_owned()),
        ("ssl", "off".to_owned()),
        ("huge_pages", "try".to_owned()),
    ];
    if !plan.target_dir.join("postgresql.conf").exists() {
        let parameters = parameters_of(control).max(plan.parameters).list();
        let lines = parameters
            .iter()
            .map(|(name, value)| format!("{name} = {value}\n"));
        let conf = private.write(plan, "postgresql.conf", &lines.collect::<String>())?;
        settings.push(("config_file", shown(&conf)));
    }
    Ok(settings)
}

const PORT: &str = "5432";

/// What a server says of itself.
enum State {
    /// It does not answer yet.
    Unknown,
    /// Replaying, how far it has come, and the stamp of the last transaction.
    Recovering(Option<Lsn>, Option<String>),
    Paused(Reached),
    /// It paused before its target.
    Stuck,
    Promoted(Reached),
}

/// Asks the private server, as whichever of its roles is known to exist.
struct Asking<'a> {
    plan: &'a RestorePlan,
    private: &'a PrivateFolder,
    /// Names that the cluster's first role may have.
    roles: Vec<String>,
    /// How often it did not answer though its log says that it is done.
    unanswered: u32,
}

impl<'a> Asking<'a> {
    fn new(plan: &'a RestorePlan, private: &'a PrivateFolder) -> Self {
        let mut roles = vec!["postgres".to_owned()];
        roles.extend(Environment::of_process().user_name);
        roles.extend(plan.options.owner.clone());
        roles.dedup();
        Self {
            plan,
            private,
            roles,
            unanswered: 0,
        }
    }

    async fn state(&mut self) -> State {
        while let Some(role) = self.roles.first().cloned() {
            match self.ask(&role).await {
                Asked::State(State::Unknown) => break,
                Asked::State(state) => return state,
                Asked::NoSuchRole => {
                    self.roles.remove(0);
                }
            }
        }
        // none of the usual roles or databases takes a question: the server's log tells, in its
        // own words; where one may do so in a moment, its answer is more exact
        let state = self.state_from_log();
        if matches!(state, State::Unknown) {
            return state;
        }
        self.unanswered += 1;
        if self.roles.is_empty() || self.unanswered > ASKED_AGAIN {
            return state;
        }
        State::Unknown
    }

    async fn ask(&self, role: &str) -> Asked {
        const QUESTION: &str = "SELECT pg_is_in_recovery() AS recovering, \
             CASE WHEN pg_is_in_recovery() THEN pg_is_wal_replay_paused() END AS paused, \
             pg_last_wal_replay_lsn() AS lsn, \
             to_char(pg_last_xact_replay_timestamp() AT TIME ZONE 'UTC', \
             'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"') AS time";
        let unknown = Asked::State(State::Unknown);
        for database in ["postgres", "template1"] {
            let conninfo = format!(
                "host={} port={PORT} user={} dbname={database} sslmode=disable connect_timeout=5",
                self.private.path.display(),
                quoted(role)
            );
            let Ok(settings) = ConnectionSettings::resolve(&conninfo, &Environment::default())
            else {
                return Asked::NoSuchRole;
            };
            let mut connection = match connect(&settings, Purpose::Sql).await {
                Ok(connection) => connection,
                Err(error) => {
                    let said = chain(&error);
                    let says = |words: &str| said.contains(words);
                    if says("role") && (says("does not exist") || says("not permitted to log in")) {
                        return Asked::NoSuchRole;
                    }
                    if says("database")
                        && (says("does not exist") || says("not currently accepting connections"))
                    {
                        continue;
                    }
                    return unknown;
                }
            };
            let row = match connection.query_row(QUESTION).await {
                Ok(row) => row,
                Err(error) => {
                    log_failed_question(&error);
                    return unknown;
                }
            };
            let lsn = row.get("lsn").and_then(|text| text.parse::<Lsn>().ok());
            // a server that stops at a position leaves out the stamp of the record that it stopped
            // at (xlogrecovery.c, recoveryStopsAfter)
            let stamp = self.plan.last_in.map(|commit| rfc3339(commit.time));
            let time = stamp.or_else(|| row.get("time").map(str::to_owned));
            let reached = lsn.map(|lsn| Reached { lsn, time });
            return Asked::State(match (row.get("recovering"), row.get("paused"), reached) {
                (Some("f"), _, Some(reached)) => State::Promoted(reached),
                (_, Some("t"), Some(reached)) => State::Paused(reached),
                _ => State::Recovering(lsn, row.get("time").map(str::to_owned)),
            });
        }
        unknown
    }

    /// Where the segment begins that the server fetched last: it takes no questions before it is consistent.
    fn fetched(&self) -> Option<Lsn> {
        last_fetched(&self.private.log(), self.plan.segment_size)
    }

    fn state_from_log(&self) -> State {
        let log = self.private.log();
        let reached = || Reached {
            lsn: self.plan.replayed_up_to(),
            time: self.plan.last_in.map(|commit| rfc3339(commit.time)),
        };
        if log.contains(PAUSED_AT_TARGET) {
            State::Paused(reached())
        } else if log.contains(RECOVERY_COMPLETE) {
            State::Promoted(reached())
        } else if log.contains(PAUSED_ELSEWHERE) {
            State::Stuck
        } else {
            State::Unknown
        }
    }
}

/// Where the segment begins that a server's log names last.
fn last_fetched(log: &str, size: SegmentSize) -> Option<Lsn> {
    let mut names = log.rsplit(RESTORED);
    names.find_map(|rest| {
        let name: SegmentName = rest.split('"').next()?.parse().ok()?;
        name.start(size)
    })
}

enum Asked {
    State(State),
    NoSuchRole,
}

/// The end of recovery makes a question fail that was asked while it ended.
fn log_failed_question(error: &QueryError) {
    tracing::debug!("the private server did not answer: {}", chain(error));
}

/// A value in a connection string.
fn quoted(value: &str) -> String {
    let escaped = value.replace('\\', r"\\").replace('\'', r"\'");
    format!("'{escaped}'")
}

/// A server that has ended by itself was to shut down at its target, or failed.
fn after_end(
    plan: &RestorePlan,
    private: &PrivateFolder,
    status: std::process::ExitStatus,
) -> Result<Replayed> {
    if plan.action != TargetAction::Shutdown || !private.log().contains(SHUT_DOWN_AT_TARGET) {
        return Err(not_reached(private, &format!("the server ended: {status}")));
    }
    let path = plan.target_dir.join("global/pg_control");
    let bytes = read_control(&path).map_err(|error| io("read", &path, &error))?;
    let control = ControlFile::parse(&bytes)
        .map_err(|error| Error::damaged(format!("{}: {error}", path.display())))?;
    let lsn = control.min_recovery_point;
    if lsn < plan.replayed_up_to() {
        return Err(not_reached(
            private,
            &format!("the server shut down at {lsn}"),
        ));
    }
    let time = plan.last_in.map(|commit| rfc3339(commit.time));
    Ok(Replayed {
        reached: Reached { lsn, time },
        notes: ways_on(plan),
    })
}

/// The control file of a directory that belongs to the server's user already.
fn read_control(path: &Path) -> std::io::Result<Vec<u8>> {
    /// `PG_CONTROL_FILE_SIZE` (`pg_control.h`).
    const FILE_BYTES: u64 = 8192;
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let flags = i32::try_from(flags.bits()).unwrap_or_default();
    let file = File::options().read(true).custom_flags(flags).open(path)?;
    let mut bytes = Vec::new();
    file.take(FILE_BYTES).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn not_reached(private: &PrivateFolder, how: &str) -> Error {
    Error::new(
        Kind::Failure,
        format!(
            "the target was not reached: {how}; the server's last lines:\n  {}",
            private.last_lines()
        ),
    )
}

/// The commands for both ways on.
fn ways_on(plan: &RestorePlan) -> Vec<String> {
    let dir = plan.target_dir.display();
    let open = match plan.action {
        TargetAction::Pause => format!(
            "to open it: {}, look at it, then SELECT pg_wal_replay_resume()",
            start_command(plan)
        ),
        TargetAction::Promote => format!("to open it: {}", start_command(plan)),
        TargetAction::Shutdown => format!("to open it, {}", open_after_shutdown(plan)),
    };
    vec![
        open,
        ANOTHER_PORT.to_owned(),
        format!("to choose another target: rm -r '{dir}', and restore again"),
    ]
}

/// What is said to whoever starts a copy beside its original.
pub(super) const ANOTHER_PORT: &str =
    "where another server has its port, add to pg_ctl: -o '-p 5433'";

/// The command that starts the restored server, as whoever may.
pub(super) fn start_command(plan: &RestorePlan) -> String {
    let dir = plan.target_dir.display();
    let postgres = find_postgres(plan.options.pg_bin.as_deref(), plan.backup.major);
    let pg_ctl = postgres.map_or_else(
        |_not_here| "pg_ctl".to_owned(),
        |postgres| postgres.with_file_name("pg_ctl").display().to_string(),
    );
    // pg_ctl refuses to run as root
    let as_owner = plan.owner.map_or_else(String::new, |owner| {
        format!(
            "setpriv --reuid {} --regid {} --clear-groups ",
            owner.uid, owner.gid
        )
    });
    format!("{as_owner}{pg_ctl} -D '{dir}' -l '{dir}/startup.log' start")
}

/// How to open a server that shut down at its target. The target must stay: without one a recovery
/// replays everything that is stored.
pub(super) fn open_after_shutdown(plan: &RestorePlan) -> String {
    let dir = plan.target_dir.display();
    format!(
        "append to its settings: echo \"recovery_target_action = 'promote'\" >> \
         '{dir}/postgresql.auto.conf', then {}",
        start_command(plan)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_major_version_of_releases_and_candidates() {
        assert_eq!(
            major_of("postgres (PostgreSQL) 18.6 (Debian 18.6-1)\n"),
            Some(18)
        );
        assert_eq!(major_of("postgres (PostgreSQL) 19rc1\n"), Some(19));
        assert_eq!(major_of("something else"), None);
    }

    /// A server that is not consistent yet tells nobody else how far it has come.
    #[test]
    fn the_log_of_a_server_says_what_it_has_fetched() {
        let size = SegmentSize::from_bytes(16 << 20).unwrap();
        let log = "LOG:  restored log file \"00000002.history\" from archive\n\
                   LOG:  restored log file \"000000010000000000000006\" from archive\n\
                   LOG:  restored log file \"000000020000000000000007\" from archive\n\
                   LOG:  restored log file \"00000003.history\" from archive\n\
                   LOG:  consistent recovery state reached at 0/6000138\n";
        assert_eq!(last_fetched(log, size), Some(Lsn::new(0x700_0000)));
        assert_eq!(
            last_fetched("LOG:  starting archive recovery\n", size),
            None
        );
    }

    #[test]
    fn role_names_cannot_add_settings() {
        assert_eq!(quoted(r"o'b\x host=evil"), r"'o\'b\\x host=evil'");
    }
}
