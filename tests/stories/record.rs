//! A primary whose rows are committed at known moments, streamed and backed up: the beginning of most
//! stories.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;

use crate::anywhen::{Anywhen, Stream};
use crate::ground::Ground;
use crate::judge::{End, restored_moments};
use crate::server::{Options, Server, execute, value};

/// `to_char` of a moment as RFC 3339 in UTC.
const RFC_3339: &str = r#"'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'"#;

/// A server with a running stream and one backup. The fields are dropped in this order.
pub(crate) struct Record {
    pub(crate) stream: Option<Stream>,
    pub(crate) server: Server,
    pub(crate) anywhen: Anywhen,
    pub(crate) ground: Ground,
}

/// What is known of one row of the table `moments` and of the transaction that inserted it.
#[derive(Clone, Debug)]
pub(crate) struct Moment {
    /// Where its commit record starts.
    pub(crate) commit_lsn: String,
    /// The stamp of its commit record.
    pub(crate) committed: String,
    /// A time after its commit and before the next.
    pub(crate) after: String,
    pub(crate) xid: String,
}

impl Record {
    /// A server with the empty table `moments`, nothing else.
    pub(crate) fn of_server(options: &Options) -> Self {
        Self::on(Ground::new(), options)
    }

    /// The same, on a ground of the story's choice.
    pub(crate) fn on(ground: Ground, options: &Options) -> Self {
        let settings = format!("track_commit_timestamp = on\n{}", options.settings);
        let server = Server::start_new(
            &ground,
            &Options {
                settings,
                ..options.clone()
            },
        );
        server.execute("create table moments (id int primary key, note text)");
        let anywhen = Anywhen::new(&ground);
        Self {
            stream: None,
            server,
            anywhen,
            ground,
        }
    }

    /// A server with the row 0, a running stream and a backup.
    pub(crate) fn begun(options: &Options) -> Self {
        Self::of_server(options).begin()
    }

    /// The row 0, a running stream and a backup.
    pub(crate) fn begin(self) -> Self {
        let mut record = self;
        record.insert(0);
        record.stream = Some(record.anywhen.stream(&record.server));
        record.anywhen.backup(&record.server);
        record
    }

    /// As [`Record::begun`], with the rows 1 to 4 committed one after another behind the backup, and all
    /// of it stored.
    pub(crate) fn with_four_rows() -> (Self, Vec<Moment>) {
        let mut record = Self::begun(&Options::default());
        let mut moments = vec![];
        for id in 1..=4 {
            moments.push(record.insert(id));
            record
                .server
                .execute(&format!("select pg_create_restore_point('after {id}')"));
        }
        record.store_all();
        (record, moments)
    }

    /// Commits the row `id` in a transaction of its own.
    #[track_caller]
    pub(crate) fn insert(&self, id: u32) -> Moment {
        let mut sql = self.server.sql();
        execute(
            &mut sql,
            &format!("begin; insert into moments values ({id}, repeat('x', 100))"),
        );
        let xid = value(&mut sql, "select pg_current_xact_id()");
        // nothing else writes WAL: the next record is the commit
        let commit_lsn = value(&mut sql, "select pg_current_wal_insert_lsn()");
        execute(&mut sql, "commit");
        let after = value(&mut sql, &utc("clock_timestamp()"));
        let committed = value(
            &mut sql,
            &utc(&format!("pg_xact_commit_timestamp('{xid}')")),
        );
        Moment {
            commit_lsn,
            committed,
            after,
            xid,
        }
    }

    /// The time now, by the server's clock.
    #[track_caller]
    pub(crate) fn now(&self) -> String {
        now_of(&self.server)
    }

    /// Takes the repository out of reach, or gives it back: an outage, or a disk that is closed to us.
    pub(crate) fn set_reachable(&mut self, reachable: bool) {
        if self.ground.endpoint().is_none() {
            let mode = if reachable { 0o700 } else { 0o000 };
            let repository = self.anywhen.repository();
            fs::set_permissions(repository, fs::Permissions::from_mode(mode)).unwrap();
        } else if reachable {
            self.ground.endpoint_mut().go_on(&[]);
        } else {
            self.ground.endpoint_mut().kill9();
        }
    }

    /// Removes the folder or the bucket that the repository is in.
    pub(crate) fn remove_repository(&self) {
        let folder = match self.ground.endpoint() {
            Some(endpoint) => endpoint.bucket(),
            None => self.anywhen.repository().to_owned(),
        };
        fs::remove_dir_all(folder).unwrap();
    }

    /// Waits until the stream has stored all that the server wrote.
    #[track_caller]
    pub(crate) fn store_all(&mut self) {
        self.stream
            .as_mut()
            .expect("a running stream")
            .store_all(&self.server);
    }

    /// The server's process for the stream, while it streams.
    #[track_caller]
    pub(crate) fn stream_pid(&self) -> Option<String> {
        let pid = self.server.value(
            "select coalesce(max(pid)::text, '') from pg_stat_replication where state = 'streaming'
             and application_name <> 'walreceiver'",
        );
        (!pid.is_empty()).then_some(pid)
    }

    /// How much the server has written and the stream not stored.
    #[track_caller]
    pub(crate) fn lag_bytes(&self) -> u64 {
        let lag = self.server.value(
            "select min(pg_current_wal_flush_lsn() - flush_lsn)::bigint from pg_stat_replication",
        );
        lag.parse().unwrap()
    }

    /// Lets time pass, by the server's clock, for something that is drawn by lot or must not happen.
    #[track_caller]
    pub(crate) fn wait_ms(&self, wait_ms: u64) {
        self.server
            .execute(&format!("select pg_sleep({wait_ms} / 1000.0)"));
    }

    #[track_caller]
    pub(crate) fn stop_stream(&mut self) {
        self.stream.take().expect("a running stream").stop();
    }

    /// Writes enough for `count` more segments to be complete.
    #[track_caller]
    pub(crate) fn fill_segments(&self, count: u32) {
        let mut sql = self.server.sql();
        for _ in 0..count {
            execute(&mut sql, "create table if not exists filler (bytes text)");
            execute(
                &mut sql,
                "insert into filler select repeat(md5(n::text), 20) from generate_series(1, 200) n",
            );
            execute(&mut sql, "select pg_switch_wal()");
        }
    }

    /// The path of a directory to restore into, which is not there yet.
    pub(crate) fn target(&self, name: &str) -> PathBuf {
        self.ground.path(name)
    }

    /// Restores into a new directory and returns the rows of `moments` at the target.
    #[track_caller]
    pub(crate) fn rows_at(&self, name: &str, arguments: &[&str], end: End) -> String {
        let target = self.target(name);
        self.anywhen.restore(&target, arguments);
        restored_moments(&self.ground, &target, end)
    }
}

/// The time now, by a server's clock.
#[track_caller]
pub(crate) fn now_of(server: &Server) -> String {
    server.value(&utc("clock_timestamp()"))
}

fn utc(moment: &str) -> String {
    format!("select to_char({moment} at time zone 'utc', {RFC_3339})")
}
