//! A client of the stories, in a process of its own: it commits rows, and writes the id of each that was
//! acknowledged into a file, synced, before it commits the next; and an LSN that lies before the commit's
//! record. Nothing of the server or of the archiver tells it anything but the acknowledgement.
//!
//! It ends where its connections do.

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::path::PathBuf;
use std::sync::Mutex;

use clap::Parser;
use postgres::{Client, Config, NoTls};

/// Commits rows into the table `history` for as long as the server is there.
#[derive(Debug, Parser)]
struct Arguments {
    /// The folder of the server's socket.
    #[arg(long)]
    socket_dir: PathBuf,
    #[arg(long, default_value_t = 5432)]
    port: u16,
    /// `ID LSN` of each acknowledged commit, one a line, is appended here.
    #[arg(long)]
    log: PathBuf,
    /// How many connections commit at once.
    #[arg(long, default_value_t = 4)]
    connections: u32,
}

fn main() -> io::Result<()> {
    let arguments = Arguments::parse();
    let mut options = OpenOptions::new();
    let log = Mutex::new(options.create(true).append(true).open(&arguments.log)?);
    std::thread::scope(|scope| {
        for number in 0..arguments.connections {
            let (arguments, log) = (&arguments, &log);
            scope.spawn(move || commit_until_the_end(arguments, number, log));
        }
    });
    Ok(())
}

fn commit_until_the_end(arguments: &Arguments, number: u32, log: &Mutex<File>) {
    let mut sql = Config::new()
        .host_path(&arguments.socket_dir)
        .port(arguments.port)
        .user("postgres")
        .dbname("postgres")
        .connect(NoTls)
        .expect("a server that takes connections");
    for id in (number * 1_000_000).. {
        // a connection that breaks acknowledged nothing
        let Ok(lsn) = commit(&mut sql, id) else {
            return;
        };
        note(log, id, &lsn).expect("a log that can be written");
    }
}

/// Commits a row. Returns an LSN from before its commit's record.
fn commit(sql: &mut Client, id: u32) -> Result<String, postgres::Error> {
    let mut transaction = sql.transaction()?;
    let insert = format!("insert into history values ({id}, 'waited for')");
    transaction.batch_execute(&insert)?;
    let lsn = "select pg_current_wal_insert_lsn()::text";
    let lsn = transaction.query_one(lsn, &[])?.get(0);
    transaction.commit()?;
    Ok(lsn)
}

fn note(log: &Mutex<File>, id: u32, lsn: &str) -> io::Result<()> {
    let mut log = log.lock().expect("no other client panicked");
    log.write_all(format!("{id} {lsn}\n").as_bytes())?;
    log.sync_data()
}
