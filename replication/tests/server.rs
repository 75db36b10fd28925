//! A real PostgreSQL server in a temporary folder, reached by a Unix socket only.

use std::collections::BTreeMap;
use std::os::unix::fs::{MetadataExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use bytes::BytesMut;
use postgres_protocol::message::backend::Message as B;
use postgres_protocol::message::frontend;
use replication::connection::Connection;
use replication::framing::{Framed, Message};
use tempfile::TempDir;
use tokio::net::UnixStream;

pub(crate) struct Server {
    folder: TempDir,
    bin: PathBuf,
}

impl Server {
    /// A new cluster made with `initdb_options`, started with `settings`.
    pub(crate) fn start(initdb_options: &[&str], settings: &[&str]) -> Self {
        let bin = std::env::var_os("ANYWHEN_PG_BIN")
            .expect("ANYWHEN_PG_BIN names no folder with PostgreSQL's programs: run ./check");
        let folder = temporary_folder();
        let server = Self {
            folder,
            bin: PathBuf::from(bin),
        };
        let data = server.data();
        let initdb = [
            "-U",
            "postgres",
            "--auth=trust",
            "--no-sync",
            "--encoding=UTF8",
        ];
        let at = ["-D", data.to_str().unwrap()];
        run(server
            .program("initdb")
            .args(initdb)
            .args(at)
            .args(initdb_options));
        let fixed = [
            "listen_addresses = ''",
            "port = 5432",
            "fsync = off",
            "autovacuum = off",
        ];
        server.configure(&[&fixed[..], settings].concat());
        server.start_again();
        server
    }

    /// A standby of the server, which has to be stopped, and is started again.
    pub(crate) fn standby(&self) -> Self {
        let folder = temporary_folder();
        let standby = Self {
            folder,
            bin: self.bin.clone(),
        };
        run(Command::new("cp")
            .arg("-a")
            .arg(self.data())
            .arg(standby.folder.path()));
        standby.configure(&[&format!(
            "primary_conninfo = 'host={} port=5432 user=postgres'",
            self.folder.path().display()
        )]);
        standby.give_file("standby.signal");
        self.start_again();
        standby.start_again();
        standby
    }

    /// Adds settings, and makes the server listen in its own folder.
    fn configure(&self, settings: &[&str]) {
        let path = self.data().join("postgresql.conf");
        let mut conf = std::fs::read_to_string(&path).unwrap();
        let socket = format!(
            "unix_socket_directories = '{}'",
            self.folder.path().display()
        );
        for line in settings.iter().chain([&socket.as_str()]) {
            conf.push_str(line);
            conf.push('\n');
        }
        std::fs::write(path, conf).unwrap();
    }

    /// An empty file in the data directory.
    fn give_file(&self, name: &str) {
        let path = self.data().join(name);
        std::fs::write(&path, "").unwrap();
        if let Some(user) = other_user() {
            chown(path, Some(user.0), Some(user.1)).unwrap();
        }
    }

    /// `pg_ctl promote`, to its end.
    pub(crate) fn promote(&self) {
        run(self.pg_ctl().args(["promote", "-w"]));
    }

    pub(crate) fn start_again(&self) {
        let log = self.folder.path().join("log");
        run(self.pg_ctl().arg("start").arg("-w").arg("-l").arg(log));
    }

    /// `pg_ctl stop`, running.
    pub(crate) fn stopping(&self) -> Child {
        self.pg_ctl()
            .args(["stop", "-w", "-m", "fast"])
            .stdout(Stdio::null())
            .spawn()
            .unwrap()
    }

    pub(crate) fn stop(&self) {
        assert!(self.stopping().wait().unwrap().success());
    }

    /// Starts the stopped server as a restored copy: it replays what it has, and goes on on a new
    /// timeline.
    pub(crate) async fn start_on_a_new_timeline(&self) {
        let data = self.data();
        let auto = data.join("postgresql.auto.conf");
        let settings = std::fs::read_to_string(&auto).unwrap();
        std::fs::write(auto, settings + "restore_command = 'false'\n").unwrap();
        self.give_file("recovery.signal");
        self.start_again();
        // it answers as a standby before it has come to the end of what it replays
        let mut sql = self.sql().await;
        for _ in 0..3000 {
            let recovers = sql.query_value("SELECT pg_is_in_recovery()").await.unwrap();
            if recovers.as_deref() == Some("f") {
                return;
            }
            tokio::time::timeout(Duration::from_millis(20), std::future::pending::<()>())
                .await
                .unwrap_err();
        }
        panic!("the server does not leave recovery");
    }

    pub(crate) fn data(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    /// A folder that the server may use, beside its data.
    pub(crate) fn spare_folder(&self, name: &str) -> PathBuf {
        let path = self.folder.path().join(name);
        std::fs::create_dir(&path).unwrap();
        if let Some(user) = other_user() {
            chown(&path, Some(user.0), Some(user.1)).unwrap();
        }
        path
    }

    pub(crate) async fn sql(&self) -> Connection {
        self.dial(&[("database", "postgres")]).await
    }

    pub(crate) async fn replication(&self) -> Connection {
        self.dial(&[("replication", "true")]).await
    }

    /// Connects without the crate's own way to connect, which has its own tests.
    async fn dial(&self, parameters: &[(&str, &str)]) -> Connection {
        let socket = self.folder.path().join(".s.PGSQL.5432");
        let mut framed = Framed::new(UnixStream::connect(socket).await.unwrap());
        let mut startup = BytesMut::new();
        let user = [("user", "postgres"), ("client_encoding", "UTF8")];
        let parameters = user.iter().chain(parameters).copied();
        frontend::startup_message(parameters, &mut startup).unwrap();
        framed.send(&startup).await.unwrap();
        let mut reported = BTreeMap::new();
        loop {
            match framed.read_message().await.unwrap() {
                Message::Backend(B::ParameterStatus(body)) => {
                    let (name, value) = (body.name().unwrap(), body.value().unwrap());
                    reported.insert(name.to_owned(), value.to_owned());
                }
                Message::Backend(B::ReadyForQuery(_)) => break,
                Message::Backend(B::AuthenticationOk | B::BackendKeyData(_)) => {}
                other => panic!("{other:?} while logging in"),
            }
        }
        Connection::new(framed, reported, "a real server".to_owned())
    }

    fn pg_ctl(&self) -> Command {
        let mut command = self.program("pg_ctl");
        command.arg("-D").arg(self.data());
        command
    }

    /// A program of PostgreSQL's, which refuses to run as root.
    fn program(&self, name: &str) -> Command {
        let path = self.bin.join(name);
        let mut command = if other_user().is_some() {
            let mut command = Command::new("runuser");
            command.args(["-u", "postgres", "--"]).arg(path);
            command
        } else {
            Command::new(path)
        };
        command
            .current_dir(self.folder.path())
            .env("LC_ALL", "C")
            .env("LC_MESSAGES", "C");
        command
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if self.data().join("postmaster.pid").exists() {
            let mut stop = self.pg_ctl();
            drop(stop.args(["stop", "-w", "-m", "immediate"]).output());
        }
    }
}

fn temporary_folder() -> TempDir {
    let folder = tempfile::Builder::new()
        .prefix("anywhen-replication-")
        .tempdir()
        .unwrap();
    if let Some(user) = other_user() {
        chown(folder.path(), Some(user.0), Some(user.1)).unwrap();
    }
    folder
}

fn run(command: &mut Command) {
    // A server that was started keeps a pipe open, so that nobody may wait for its end.
    let status = command.stdout(Stdio::null()).status().unwrap();
    assert!(status.success(), "{command:?}: {status}");
}

/// The user to run servers as, if that is not us: user and group id.
fn other_user() -> Option<(u32, u32)> {
    if Path::new("/proc/self").metadata().unwrap().uid() != 0 {
        return None;
    }
    let id = |what| {
        let output = Command::new("id")
            .args([what, "postgres"])
            .output()
            .unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        text.trim()
            .parse()
            .expect("as root the tests need the user postgres: run ./check")
    };
    Some((id("-u"), id("-g")))
}
