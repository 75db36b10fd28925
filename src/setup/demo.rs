//! The whole story on a throwaway server: stream, backup, a mistake, a loss, and the moment before.
//!
//! It runs this binary's own commands as a user would, so what it shows is what there is.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use replication::connection::Connection;
use tokio::process::{Child, Command};

use crate::error::{Error, Result, io};
use crate::retry::Backoff;
use crate::server;

/// Where distributions put the servers' programs.
const BIN_PARENTS: &[&str] = &["/usr/lib/postgresql", "/usr/local/pgsql", "/usr/pgsql"];
/// What the story runs.
const PROGRAMS: &[&str] = &["initdb", "pg_ctl", "postgres"];
/// How long anything in the story may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// Prints a line for the user.
pub type Print = fn(&str) -> Result<()>;
type Stop = tokio::sync::watch::Receiver<bool>;

/// What the user says of the demo.
#[derive(Debug, Clone, Default)]
pub struct DemoOptions {
    /// Where the server's programs are.
    pub pg_bin: Option<PathBuf>,
    /// Whether everything stays for a look at it.
    pub keep: bool,
    /// The tables of a configuration file with its repositories, and with its cluster.
    pub settings: String,
    /// Where what it stores is not removed with the demo's own folder.
    pub stays_in: Vec<StaysIn>,
}

/// A repository that outlives the demo.
#[derive(Debug, Clone)]
pub struct StaysIn {
    /// Its address.
    pub url: String,
    /// Whether a data key is stored there too.
    pub is_encrypted: bool,
}

/// The folder of this process's demo, removed at its end.
pub fn folder() -> PathBuf {
    PathBuf::from(format!("/tmp/anywhen-demo-{}", std::process::id()))
}

/// The cluster's name in this process's demo: each has its own, so that they can share a repository.
pub fn cluster() -> String {
    format!("demo_{}", std::process::id())
}

/// Tells the story. Whatever happens, the server is stopped and the folder removed.
pub async fn run(options: DemoOptions, print: Print, bold: bool, mut stop: Stop) -> Result<()> {
    if rustix::process::geteuid().is_root() {
        return Err(Error::usage("PostgreSQL does not run as root")
            .hint("run the demo as another user, such as: sudo -u postgres anywhen demo"));
    }
    let bin = match &options.pg_bin {
        Some(bin) => std::path::absolute(bin).map_err(|error| io("find", bin, &error))?,
        None => find_bin()?,
    };
    check_programs(&bin)?;
    let folder = folder();
    std::fs::create_dir(&folder).map_err(|error| io("create", &folder, &error))?;
    let mut story = Story {
        program: std::env::current_exe()
            .map_err(|error| Error::failure(format!("cannot find this program: {error}")))?,
        data: folder.join("data"),
        restored: folder.join("restored"),
        settings: options.settings,
        folder: folder.clone(),
        bin,
        stream: None,
        stored: Stored::Nothing,
        print,
        bold,
    };
    let told = tokio::select! {
        told = story.tell() => told,
        _ = stop.wait_for(|asked| *asked) => Err(Error::failure("stopped")),
    };
    story.end().await;
    for place in &options.stays_in {
        if let Some(text) = story.stored.told(place) {
            print(&text)?;
        }
    }
    if options.keep {
        print(&format!("Everything is in {}.", folder.display()))?;
    } else {
        std::fs::remove_dir_all(&folder).map_err(|error| io("remove", &folder, &error))?;
    }
    told
}

fn find_bin() -> Result<PathBuf> {
    let mut found: Vec<(u32, PathBuf)> = Vec::new();
    for parent in BIN_PARENTS {
        let Ok(entries) = std::fs::read_dir(parent) else {
            continue;
        };
        for entry in entries.flatten() {
            let major = entry
                .file_name()
                .to_str()
                .and_then(|name| name.parse().ok());
            let bin = entry.path().join("bin");
            if let Some(major) = major.filter(|_| bin.join("initdb").exists()) {
                found.push((major, bin));
            }
        }
    }
    let on_path = std::env::var_os("PATH").unwrap_or_default();
    let on_path = std::env::split_paths(&on_path).find(|folder| folder.join("initdb").exists());
    found.sort();
    let newest = found.pop().map(|(_, bin)| bin).or(on_path);
    newest.ok_or_else(|| {
        Error::usage("no PostgreSQL server is installed").hint(
            "install one (Debian: apt install postgresql), or name its programs: --pg-bin DIR",
        )
    })
}

fn check_programs(bin: &Path) -> Result<()> {
    let missing = PROGRAMS.iter().find(|name| !bin.join(name).is_file());
    let Some(name) = missing else { return Ok(()) };
    let failure = Error::usage(format!(
        "the server's programs are not there: {name} is missing in {}",
        bin.display()
    ));
    Err(failure.hint(format!(
        "--pg-bin names the folder of {}, such as /usr/lib/postgresql/18/bin",
        PROGRAMS.join(", ")
    )))
}

/// Whether anything of the demo is in its repositories.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stored {
    Nothing,
    Perhaps,
    Something,
}

impl Stored {
    /// What stays in `place`; nothing to say where there is nothing.
    fn told(self, place: &StaysIn) -> Option<String> {
        let url = place.url.trim_end_matches('/');
        let key = if place.is_encrypted {
            format!(", and its data key is the newest in {url}/keys")
        } else {
            String::new()
        };
        let within = format!("{url}/{}{key}", cluster());
        match self {
            Self::Nothing => None,
            Self::Perhaps => Some(format!(
                "If anything was stored before that, it is in {within}."
            )),
            Self::Something => Some(format!(
                "What the demo stored stays in {within}: remove it when you have seen it."
            )),
        }
    }
}

struct Story {
    program: PathBuf,
    bin: PathBuf,
    folder: PathBuf,
    data: PathBuf,
    restored: PathBuf,
    settings: String,
    stream: Option<Child>,
    stored: Stored,
    print: Print,
    bold: bool,
}

impl Story {
    async fn tell(&mut self) -> Result<()> {
        self.chapter("A server, and a repository beside it")?;
        self.start_server().await?;
        let mut sql = self.connect().await?;
        self.say(&format!(
            "PostgreSQL {} runs in {}.",
            version(&sql),
            self.data.display()
        ))?;

        self.chapter("anywhen stream: WAL goes to the repository, second by second")?;
        self.start_stream(&mut sql).await?;
        self.say("The stream has made its replication slot, and is receiving.")?;

        self.chapter("anywhen backup: a copy to start from")?;
        query(
            &mut sql,
            "CREATE TABLE orders (id int PRIMARY KEY, what text)",
        )
        .await?;
        insert(&mut sql, 1, 1000).await?;
        self.anywhen(&["backup", "--label", "demo"]).await?;
        insert(&mut sql, 1001, 1500).await?;
        self.say("1,500 orders are in: 500 of them after the backup.")?;

        self.chapter("A mistake: DROP TABLE orders")?;
        let before = moment(&mut sql).await?;
        self.say(&format!(
            "It is {before}. Then somebody drops the table, and work goes on."
        ))?;
        query(&mut sql, "DROP TABLE orders").await?;
        query(&mut sql, "CREATE TABLE new_orders (id int)").await?;
        insert_into(&mut sql, "new_orders", 1, 50).await?;
        let last_commit = Instant::now();

        self.chapter("A loss: the server dies, and its disk with it")?;
        self.wait_until_stored(&mut sql).await?;
        let at_risk = last_commit.elapsed();
        drop(sql);
        self.pg_ctl(&["stop", "-m", "immediate", "-D"], &self.data)
            .await?;
        std::fs::remove_dir_all(&self.data).map_err(|error| io("remove", &self.data, &error))?;
        self.say(&format!(
            "Gone. The last commit was in the repository {:.1} s after it was made: that is how \
             much work was at risk.",
            at_risk.as_secs_f64()
        ))?;
        self.stop_stream().await?;

        self.chapter("anywhen status: which moments can be had?")?;
        self.anywhen(&["status"]).await?;

        self.chapter("anywhen restore: the moment before the mistake")?;
        let restored = self.restored.display().to_string();
        let started = Instant::now();
        self.anywhen(&[
            "restore", "-D", &restored, "--to", &before, "--action", "promote", "--quiet",
        ])
        .await?;
        self.pg_ctl(&["start", "-w", "-D"], &self.restored).await?;
        let mut sql = self.connect().await?;
        self.wait_until_open(&mut sql).await?;
        let orders = value(&mut sql, "SELECT count(*) FROM orders").await?;
        let dropped = value(&mut sql, "SELECT to_regclass('new_orders') IS NULL").await?;
        self.say(&format!(
            "Restored and open for writing after {:.1} s: {orders} orders are back.",
            started.elapsed().as_secs_f64()
        ))?;
        if orders != "1500" || dropped != "t" {
            return Err(Error::failure(format!(
                "the restored server is not as it was: orders={orders}, expected=1500"
            )));
        }
        self.say("Exactly the 1,500 that were there, and nothing that came after. The end.")
    }

    fn chapter(&self, title: &str) -> Result<()> {
        let (bold, plain) = if self.bold {
            ("\x1b[1m", "\x1b[0m")
        } else {
            ("", "")
        };
        (self.print)(&format!("\n{bold}{title}{plain}"))
    }

    fn say(&self, text: &str) -> Result<()> {
        (self.print)(&format!("  {text}"))
    }

    async fn start_server(&self) -> Result<()> {
        let socket = self.folder.display();
        run_quietly(
            Command::new(self.bin.join("initdb"))
                .args(["-A", "trust", "-N", "-U", "postgres", "-D"])
                .arg(&self.data),
        )
        .await?;
        let settings = format!(
            "\nlisten_addresses = ''\nunix_socket_directories = '{socket}'\nwal_level = replica\n\
             max_wal_senders = 5\nmax_slot_wal_keep_size = '1GB'\nfsync = off\n\
             log_min_messages = fatal\n"
        );
        let path = self.data.join("postgresql.conf");
        let written =
            std::fs::read_to_string(&path).and_then(|text| std::fs::write(&path, text + &settings));
        written.map_err(|error| io("write", &path, &error))?;
        self.pg_ctl(&["start", "-w", "-D"], &self.data).await
    }

    async fn pg_ctl(&self, arguments: &[&str], data: &Path) -> Result<()> {
        let log = self.folder.join("server.log");
        let mut command = Command::new(self.bin.join("pg_ctl"));
        command.arg("-l").arg(log).args(arguments).arg(data);
        run_quietly(&mut command).await
    }

    fn conninfo(&self) -> String {
        format!(
            "host={} user=postgres dbname=postgres",
            self.folder.display()
        )
    }

    async fn connect(&self) -> Result<Connection> {
        server::connect_sql(&server::resolve(Some(&self.conninfo()))?).await
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        // nothing of the user's own settings reaches the demo
        for (name, _) in std::env::vars_os() {
            if name
                .to_str()
                .is_some_and(|name| name.starts_with("ANYWHEN_"))
            {
                command.env_remove(name);
            }
        }
        let config = self.folder.join("anywhen.toml");
        command
            .args(arguments)
            .env("ANYWHEN_CONNECTION", self.conninfo())
            .env("ANYWHEN_CONFIG", config)
            // what `restore` says of starting the server can be run as it is printed
            .env("ANYWHEN_PG_BIN", &self.bin)
            .kill_on_drop(true);
        command
    }

    async fn start_stream(&mut self, sql: &mut Connection) -> Result<()> {
        let config = self.folder.join("anywhen.toml");
        let state = self.folder.join("state");
        let text = format!("state_dir = \"{}\"\n{}", state.display(), self.settings);
        std::fs::write(&config, text).map_err(|error| io("write", &config, &error))?;
        let log = self.stream_log();
        let said = std::fs::File::create(&log).map_err(|error| io("create", &log, &error))?;
        let mut command = self.command(&["stream", "--quiet"]);
        let child = command.stdin(Stdio::null()).stderr(said).spawn();
        self.stream =
            Some(child.map_err(|error| Error::failure(format!("cannot start: {error}")))?);
        self.stored = Stored::Perhaps;
        let streaming = "SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'";
        self.wait_for(sql, streaming, "1").await?;
        self.stored = Stored::Something;
        Ok(())
    }

    fn stream_log(&self) -> PathBuf {
        self.folder.join("stream.log")
    }

    /// An error where the stream has ended by itself, in its own words.
    fn check_stream(&mut self) -> Result<()> {
        let Some(stream) = &mut self.stream else {
            return Ok(());
        };
        let Ok(Some(status)) = stream.try_wait() else {
            return Ok(());
        };
        self.stream = None;
        Err(self.stream_ended(status))
    }

    fn stream_ended(&self, status: std::process::ExitStatus) -> Error {
        let said = std::fs::read_to_string(self.stream_log()).unwrap_or_default();
        let said = said.trim();
        Error::failure(format!("the stream ended with {status}: {said}"))
    }

    async fn stop_stream(&mut self) -> Result<()> {
        let Some(mut stream) = self.stream.take() else {
            return Ok(());
        };
        if let Some(pid) = stream.id().and_then(|id| i32::try_from(id).ok()) {
            let pid = rustix::process::Pid::from_raw(pid);
            if let Some(pid) = pid {
                rustix::process::kill_process(pid, rustix::process::Signal::TERM)
                    .map_err(|error| Error::failure(format!("cannot stop the stream: {error}")))?;
            }
        }
        let status = stream.wait().await;
        match status {
            Ok(status) if status.success() => Ok(()),
            Ok(status) => Err(self.stream_ended(status)),
            Err(error) => Err(Error::failure(format!("the stream did not end: {error}"))),
        }
    }

    async fn wait_until_stored(&mut self, sql: &mut Connection) -> Result<()> {
        let stored = "SELECT flush_lsn >= pg_current_wal_flush_lsn() FROM pg_stat_replication \
                      WHERE application_name = 'anywhen' ORDER BY backend_start LIMIT 1";
        self.wait_for(sql, stored, "t").await
    }

    async fn wait_until_open(&mut self, sql: &mut Connection) -> Result<()> {
        self.wait_for(sql, "SELECT pg_is_in_recovery()", "f").await
    }

    /// Waits until the server answers so; not when nothing will come, since the stream has ended.
    async fn wait_for(&mut self, sql: &mut Connection, text: &str, wanted: &str) -> Result<()> {
        let mut backoff = Backoff::new(Duration::from_millis(20), Duration::from_millis(200));
        let started = Instant::now();
        loop {
            let found = value(sql, text).await?;
            if found == wanted {
                return Ok(());
            }
            self.check_stream()?;
            if started.elapsed() > PATIENCE {
                return Err(Error::failure(format!(
                    "waited {} s in vain: {text}: expected={wanted}, found={found}",
                    PATIENCE.as_secs()
                )));
            }
            backoff.wait().await;
        }
    }

    /// Runs one of our own commands, and shows it.
    async fn anywhen(&self, arguments: &[&str]) -> Result<()> {
        let shown: Vec<String> = arguments
            .iter()
            .filter(|argument| **argument != "--quiet")
            .map(|argument| {
                let quote = if argument.contains(' ') { "'" } else { "" };
                format!("{quote}{argument}{quote}")
            })
            .collect();
        (self.print)(&format!("  $ anywhen {}", shown.join(" ")))?;
        let mut command = self.command(arguments);
        if arguments.first() != Some(&"restore") {
            command.arg("--quiet");
        }
        let output = command.stdin(Stdio::null()).output().await;
        let output = output.map_err(|error| Error::failure(format!("cannot run: {error}")))?;
        let text = String::from_utf8_lossy(&output.stdout);
        for text in text.lines() {
            self.say(text)?;
        }
        if output.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&output.stderr);
        Err(Error::failure(format!(
            "`anywhen {}` failed: {}",
            shown.join(" "),
            said.trim()
        )))
    }

    /// Stops what was started.
    async fn end(&mut self) {
        if let Err(error) = self.stop_stream().await {
            tracing::warn!("{error}");
        }
        for data in [&self.data, &self.restored] {
            if data.join("postmaster.pid").exists()
                && let Err(error) = self.pg_ctl(&["stop", "-m", "immediate", "-D"], data).await
            {
                tracing::warn!("{error}");
            }
        }
    }
}

fn version(sql: &Connection) -> String {
    let version = sql.parameter("server_version").unwrap_or("?");
    version.split(' ').next().unwrap_or(version).to_owned()
}

async fn query(sql: &mut Connection, text: &str) -> Result<()> {
    sql.execute(text)
        .await
        .map_err(|error| server::query_error("run the demo's SQL", &error))
}

async fn value(sql: &mut Connection, text: &str) -> Result<String> {
    let value = sql.query_value(text).await;
    let value = value.map_err(|error| server::query_error("run the demo's SQL", &error))?;
    Ok(value.unwrap_or_default())
}

async fn insert(sql: &mut Connection, first: u32, last: u32) -> Result<()> {
    let text = format!(
        "INSERT INTO orders SELECT n, 'order ' || n FROM generate_series({first}, {last}) AS n"
    );
    query(sql, &text).await
}

async fn insert_into(sql: &mut Connection, table: &str, first: u32, last: u32) -> Result<()> {
    query(
        sql,
        &format!("INSERT INTO {table} SELECT generate_series({first}, {last})"),
    )
    .await
}

/// The server's clock, to the microsecond.
async fn moment(sql: &mut Connection) -> Result<String> {
    let form = "'YYYY-MM-DD HH24:MI:SS.US'";
    let text = format!("SELECT to_char(clock_timestamp() AT TIME ZONE 'UTC', {form}) || '+00'");
    value(sql, &text).await
}

async fn run_quietly(command: &mut Command) -> Result<()> {
    let output = command.stdin(Stdio::null()).output().await;
    let program = command
        .as_std()
        .get_program()
        .to_string_lossy()
        .into_owned();
    let output =
        output.map_err(|error| Error::failure(format!("cannot run {program}: {error}")))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(Error::failure(format!("{program} failed: {}", said.trim())))
}
