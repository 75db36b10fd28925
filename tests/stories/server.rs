//! PostgreSQL servers of the major under test, each in a folder and on a socket of its own.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use postgres::{Client, NoTls};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process};

use crate::ground::{
    Environment, Ground, PATIENCE, Programs, Running, command, eventually, lock, shared_folder,
    write_as_account,
};

/// What every server of the stories is set to. Autovacuum and checkpoints stay out of the way of
/// those that compare LSNs; WAL is retained for those that compare bytes.
const SETTINGS: &str = "\
fsync = off
shared_buffers = 16MB
max_connections = 20
max_wal_senders = 8
max_replication_slots = 8
wal_level = replica
wal_keep_size = 2GB
max_wal_size = 4GB
checkpoint_timeout = 1h
autovacuum = off
log_line_prefix = '%m [%p] '
timezone = 'UTC'
";

/// How a cluster is made.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    /// In MiB.
    pub(crate) wal_segment_mib: u32,
    /// Lines appended to postgresql.conf.
    pub(crate) settings: String,
    /// Lines that take the place of `pg_hba.conf`; local connections are trusted in any case.
    pub(crate) hba: String,
    /// Whether it listens on a port of 127.0.0.1 too.
    pub(crate) tcp: bool,
    /// A system identifier that no other story has, and page checksums on every major.
    pub(crate) own_system: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            wal_segment_mib: 16,
            settings: String::new(),
            hba: String::new(),
            tcp: false,
            own_system: false,
        }
    }
}

pub(crate) struct Server {
    running: Option<Running>,
    data: PathBuf,
    socket_dir: PathBuf,
    tcp_port: Option<u16>,
    /// Where postgresql.conf is, when it is not in the data directory.
    config: Option<PathBuf>,
    log: PathBuf,
    environment: Environment,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Shutdown {
    Fast,
    Immediate,
}

impl Server {
    /// Makes a cluster in `ground` and starts its server.
    pub(crate) fn start_new(ground: &Ground, options: &Options) -> Self {
        let mut server = Self::init(ground, "primary", options);
        server.start();
        server
    }

    /// Makes a cluster in the folder `name` of `ground`.
    pub(crate) fn init(ground: &Ground, name: &str, options: &Options) -> Self {
        let data = ground.path(name);
        if options.own_system {
            initdb(&data, options.wal_segment_mib, &["--data-checksums"]);
        } else {
            copy_dir(&template(options.wal_segment_mib), &data);
        }
        let conf = data.join("postgresql.conf");
        let mut settings = fs::read_to_string(&conf).unwrap();
        write!(settings, "\n{SETTINGS}{}\n", options.settings).unwrap();
        write_as_account(&conf, settings.as_bytes(), 0o600);
        let hba = format!(
            "local all postgres trust\nlocal replication postgres trust\n{}\n",
            options.hba
        );
        write_as_account(&data.join("pg_hba.conf"), hba.as_bytes(), 0o600);
        let mut server = Self::at(ground, &data);
        server.tcp_port = options.tcp.then(free_port);
        server
    }

    /// A server for a data directory that is there already, such as a restored one.
    pub(crate) fn at(ground: &Ground, data: &Path) -> Self {
        let name = data.file_name().unwrap().to_str().unwrap();
        Self {
            running: None,
            data: data.to_owned(),
            socket_dir: ground.make_dir(&format!("{name}.sock"), 0o700),
            tcp_port: None,
            config: None,
            log: ground.path(&format!("{name}.log")),
            environment: ground.environment(),
        }
    }

    /// Moves the configuration of a stopped server to `folder`, as Debian keeps it in /etc.
    pub(crate) fn move_configuration(&mut self, folder: &Path) {
        let mut settings = fs::read_to_string(self.data.join("postgresql.conf")).unwrap();
        writeln!(settings, "data_directory = '{}'", self.data.display()).unwrap();
        write_as_account(&folder.join("postgresql.conf"), settings.as_bytes(), 0o600);
        for name in ["pg_hba.conf", "pg_ident.conf"] {
            let contents = fs::read(self.data.join(name)).unwrap();
            write_as_account(&folder.join(name), &contents, 0o600);
            fs::remove_file(self.data.join(name)).unwrap();
        }
        fs::remove_file(self.data.join("postgresql.conf")).unwrap();
        self.config = Some(folder.to_owned());
    }

    pub(crate) fn data(&self) -> &Path {
        &self.data
    }

    pub(crate) fn socket_dir(&self) -> &Path {
        &self.socket_dir
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.log.with_extension("stderr")).unwrap_or_default()
    }

    /// Starts it and waits until it takes connections.
    #[track_caller]
    pub(crate) fn start(&mut self) {
        self.launch();
        let deadline = Instant::now() + PATIENCE;
        eventually("the server takes connections", || {
            if let Some(status) = self.running.as_mut().unwrap().ended() {
                panic!("the server ended with {status}; its log:\n{}", self.log());
            }
            assert!(Instant::now() < deadline, "its log:\n{}", self.log());
            self.try_sql("postgres").is_ok()
        });
    }

    /// Starts it without waiting.
    pub(crate) fn launch(&mut self) {
        let mut postgres = command(Programs::get().program("postgres"));
        postgres
            .arg("-D")
            .arg(self.config.as_ref().unwrap_or(&self.data))
            .arg("-k")
            .arg(&self.socket_dir)
            .envs(self.environment.iter().cloned());
        match self.tcp_port {
            Some(port) => postgres.args(["-h", "127.0.0.1", "-p", &port.to_string()]),
            None => postgres.args(["-h", "", "-p", "5432"]),
        };
        self.running = Some(Running::start(postgres, self.log.clone()));
    }

    /// Waits until the server has ended by itself.
    #[track_caller]
    pub(crate) fn ended(&mut self) -> std::process::ExitStatus {
        self.running.take().unwrap().end("the server")
    }

    /// Stops it, and says how long that took.
    #[track_caller]
    pub(crate) fn stop(&mut self, how: Shutdown) -> Duration {
        let mut running = self.running.take().expect("a running server");
        let asked = Instant::now();
        running.signal(match how {
            Shutdown::Fast => Signal::INT,
            Shutdown::Immediate => Signal::QUIT,
        });
        running.end("the server that was asked to stop");
        asked.elapsed()
    }

    /// What a power cut does: the server and all its children are killed.
    #[track_caller]
    pub(crate) fn kill9(&mut self) {
        let mut running = self.running.take().expect("a running server");
        // it cannot start another child while we look
        running.signal(Signal::STOP);
        let children = children_of(running.child.id());
        for child in &children {
            let killed = kill_process(*child, Signal::KILL);
            assert!(matches!(killed, Ok(()) | Err(Errno::SRCH)), "{killed:?}");
        }
        running.signal(Signal::KILL);
        running.end("the killed server");
        eventually("its children are gone", || {
            children
                .iter()
                .all(|child| parent_of(child.as_raw_pid()).is_none())
        });
    }

    pub(crate) fn conninfo(&self) -> String {
        format!(
            "host={} port={} user=postgres dbname=postgres",
            self.socket_dir.display(),
            self.port()
        )
    }

    pub(crate) fn port(&self) -> u16 {
        self.tcp_port.unwrap_or(5432)
    }

    /// An SQL session in the database `postgres`, by a client that shares no code with the product.
    #[track_caller]
    pub(crate) fn sql(&self) -> Client {
        self.sql_in("postgres")
    }

    #[track_caller]
    pub(crate) fn sql_in(&self, database: &str) -> Client {
        self.try_sql(database)
            .unwrap_or_else(|error| panic!("no SQL session: {error}; its log:\n{}", self.log()))
    }

    fn try_sql(&self, database: &str) -> Result<Client, postgres::Error> {
        self.client().dbname(database).connect(NoTls)
    }

    /// How a client of the stories' own connects, to the database `postgres`.
    pub(crate) fn client(&self) -> postgres::Config {
        let mut client = postgres::Config::new();
        client
            .host_path(&self.socket_dir)
            .port(self.port())
            .user("postgres")
            .dbname("postgres")
            .connect_timeout(Duration::from_secs(10))
            // a query that waits for a lock fails its story instead of holding up the run
            .options("-c statement_timeout=45s");
        client
    }

    /// One value, as text.
    #[track_caller]
    pub(crate) fn value(&self, query: &str) -> String {
        value(&mut self.sql(), query)
    }

    #[track_caller]
    pub(crate) fn execute(&self, statements: &str) {
        execute(&mut self.sql(), statements);
    }

    pub(crate) fn system_id(&self) -> String {
        self.value("select system_identifier::text from pg_control_system()")
    }

    /// Waits until recovery stands still at its target, as `--action pause` asks.
    #[track_caller]
    pub(crate) fn wait_until_paused(&self) {
        self.wait_until(
            "select pg_is_wal_replay_paused()",
            "replay is paused at its target",
        );
    }

    /// Makes a primary of a standby.
    #[track_caller]
    pub(crate) fn promote(&self) {
        if let Err(error) = self.sql().batch_execute("select pg_promote(false)") {
            panic!("no promotion: {error:?}; the server's log:\n{}", self.log());
        }
        self.wait_until_promoted();
    }

    /// Waits until recovery is over.
    #[track_caller]
    pub(crate) fn wait_until_promoted(&self) {
        self.wait_until("select not pg_is_in_recovery()", "recovery ends");
    }

    #[track_caller]
    fn wait_until(&self, query: &str, what: &str) {
        let deadline = Instant::now() + PATIENCE;
        eventually(what, || {
            assert!(
                Instant::now() + Duration::from_secs(1) < deadline,
                "in vain: {what}; the server's log:\n{}",
                self.log()
            );
            // recovery that ends while we ask makes a query fail
            self.try_sql("postgres")
                .and_then(|mut client| client.query_one(query, &[]))
                .is_ok_and(|row| row.get(0))
        });
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let Some(mut running) = self.running.take() else {
            return;
        };
        if running.ended().is_none() {
            // an immediate stop takes the server's children along, which SIGKILL would orphan
            running.signal(Signal::QUIT);
            running.end("the server at the end of its story");
        }
    }
}

/// The processes whose parent is `parent`.
fn children_of(parent: u32) -> Vec<Pid> {
    let processes = fs::read_dir("/proc").unwrap().flatten();
    processes
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid| parent_of(*pid) == Some(parent))
        .filter_map(Pid::from_raw)
        .collect()
}

/// The parent of a process; none when the process has ended.
fn parent_of(pid: i32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // the name of the program stands in brackets, and may have blanks
    let mut fields = stat.rsplit_once(") ")?.1.split(' ');
    let state = fields.next()?;
    let parent = fields.next()?.parse().ok()?;
    (state != "Z").then_some(parent)
}

/// One value, as text.
#[track_caller]
pub(crate) fn value(client: &mut Client, query: &str) -> String {
    let rows = client
        .simple_query(query)
        .unwrap_or_else(|error| panic!("{query}: {error:?}"));
    rows.iter()
        .find_map(|message| match message {
            postgres::SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
            _ => None,
        })
        .unwrap_or_else(|| panic!("no value: {query}"))
}

#[track_caller]
pub(crate) fn execute(client: &mut Client, statements: &str) {
    client
        .batch_execute(statements)
        .unwrap_or_else(|error| panic!("{statements}: {error:?}"));
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port()
}

/// A cluster as initdb makes it, once per segment size: a story copies it in a tenth of the time.
fn template(wal_segment_mib: u32) -> PathBuf {
    static TEMPLATES: OnceLock<Mutex<HashMap<u32, PathBuf>>> = OnceLock::new();
    let mut templates = lock(TEMPLATES.get_or_init(Mutex::default));
    templates
        .entry(wal_segment_mib)
        .or_insert_with(|| {
            let data = shared_folder().join(format!("template-{wal_segment_mib}"));
            initdb(&data, wal_segment_mib, &[]);
            data
        })
        .clone()
}

fn initdb(data: &Path, wal_segment_mib: u32, flags: &[&str]) {
    let mut initdb = command(Programs::get().program("initdb"));
    initdb
        .args([
            "--no-sync",
            "--username=postgres",
            "--auth=trust",
            "--encoding=UTF8",
        ])
        .args([
            "--locale=C",
            &format!("--wal-segsize={wal_segment_mib}"),
            "-D",
        ])
        .arg(data)
        .args(flags);
    let output = initdb.output().unwrap();
    assert!(
        output.status.success(),
        "initdb failed: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Copies a folder as the account that will own the copy.
pub(crate) fn copy_dir(from: &Path, to: &Path) {
    let status = command("cp").arg("-a").arg(from).arg(to).status().unwrap();
    assert!(
        status.success(),
        "cannot copy {} to {}",
        from.display(),
        to.display()
    );
}

/// Appends a line to the settings of a stopped server.
pub(crate) fn write_setting(data: &Path, line: &str) {
    let path = data.join("postgresql.auto.conf");
    let settings = fs::read_to_string(&path).unwrap();
    write_as_account(&path, format!("{settings}{line}\n").as_bytes(), 0o600);
}
