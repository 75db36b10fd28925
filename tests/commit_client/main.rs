//! A client of the stories, in a process of its own: it commits rows, and writes the id of each that was
//! acknowledged into a file, synced, before it commits the next. Nothing of the server or of the archiver
//! tells it anything but the acknowledgement.
//!
//! It ends where its connections do.

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::path::PathBuf;
use std::sync::Mutex;

use clap::Parser;
use postgres::{Config, NoTls};

/// Commits rows into the table `history` for as long as the server is there.
#[derive(Debug, Parser)]
struct Arguments {
    /// The folder of the server's socket.
    #[arg(long)]
    socket_dir: PathBuf,
    #[arg(long, default_value_t = 5432)]
    port: u16,
    /// The ids of acknowledged commits, one a line, are appended here.
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
        let insert = format!("insert into history values ({id}, 'waited for')");
        // a connection that breaks acknowledged nothing
        if sql.batch_execute(&insert).is_err() {
            return;
        }
        note(log, id).expect("a log that can be written");
    }
}

fn note(log: &Mutex<File>, id: u32) -> io::Result<()> {
    let mut log = log.lock().expect("no other client panicked");
    log.write_all(format!("{id}\n").as_bytes())?;
    log.sync_data()
}
