//! Flags become settings, settings become small options, and a command is run.

mod args;
mod commands;
mod destination;
mod keys;
mod logging;
mod output;
mod progress;

use std::panic::AssertUnwindSafe;
use std::process::ExitCode;

use clap::Parser as _;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;

use crate::error::{Error, Kind};
use crate::restore;
use args::{Cli, Command};

/// The version, with the commit that it was built from.
pub const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), " (", env!("ANYWHEN_COMMIT"), ")");
/// `wal-fetch` says this for everything that is not "found" or "not in the archive": PostgreSQL
/// takes codes up to 125 for "the archive ends here" and promotes, 129 to 192 for signals.
const WAL_FETCH_FAILED: u8 = 200;
/// A bug: neither usage nor anything that the user could mend.
const PANICKED: u8 = 1;

/// Runs the command line that this process was given.
pub fn main() -> ExitCode {
    // whatever is created from here on is for its owner alone, in a repository and in a restore
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    std::panic::set_hook(Box::new(|panic| {
        let at = panic
            .location()
            .map(ToString::to_string)
            .unwrap_or_default();
        let payload = panic.payload();
        let said = payload.downcast_ref::<&str>().map(ToString::to_string);
        let said = said
            .or_else(|| payload.downcast_ref::<String>().cloned())
            .unwrap_or_default();
        let bug = Error::failure(format!("a bug in anywhen: {said} ({at})"))
            .hint("nothing was acknowledged that is not stored; please report this");
        output::failure(&bug, false);
    }));
    // a panic in wal-fetch must not look like the end of WAL
    let is_wal_fetch = std::env::args_os().any(|arg| arg == "wal-fetch");
    let is_ahead = std::env::args_os().any(|arg| arg == restore::ahead::FLAG);
    if is_ahead {
        restore::ahead::close_inherited();
    }
    let outcome = std::panic::catch_unwind(AssertUnwindSafe(|| start(is_wal_fetch)));
    ExitCode::from(match outcome {
        // a postmaster that is the first process of a container is asked about it, and takes anything else for a
        // crash of a server process (postmaster.c, `CleanupBackend`)
        _ if is_ahead => 0,
        Ok(code) => code,
        Err(_panic) if is_wal_fetch => WAL_FETCH_FAILED,
        Err(_panic) => PANICKED,
    })
}

fn start(is_wal_fetch: bool) -> u8 {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error, is_wal_fetch),
    };
    if let Command::WalFetch(args) = &cli.command
        && commands::is_at_hand(&cli.global, args)
    {
        return 0;
    }
    let as_json = cli.global.json;
    logging::start(&cli.global, is_wal_fetch);
    let mut threads = tokio::runtime::Builder::new_multi_thread();
    if matches!(cli.command, Command::Stream(_)) {
        // a commit waits for each time that one thread wakes another; work has threads of its own. The
        // second one takes over where the first waits for a disk
        threads.worker_threads(2);
    }
    let runtime = match threads.enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            output::failure(
                &Error::failure(format!("cannot start threads: {error}")),
                as_json,
            );
            return if is_wal_fetch {
                WAL_FETCH_FAILED
            } else {
                PANICKED
            };
        }
    };
    // a task, so that what the network wakes runs where it was woken, not on this thread
    let code = match runtime.block_on(async { tokio::spawn(run(cli)).await }) {
        Ok(code) => code,
        Err(failed) => std::panic::resume_unwind(failed.into_panic()),
    };
    // what was abandoned by a signal is not waited for
    runtime.shutdown_background();
    code
}

/// Commands that are announced, and that this build does not have yet.
const NOT_YET: &[&str] = &["init", "check", "wal-push", "run"];

/// The command that was asked for, where it is one that this build does not have yet.
fn not_yet(error: &clap::Error) -> Option<&'static str> {
    let Some(ContextValue::String(asked)) = error.get(ContextKind::InvalidSubcommand) else {
        return None;
    };
    NOT_YET.iter().find(|name| *name == asked).copied()
}

fn usage(error: &clap::Error, is_wal_fetch: bool) -> u8 {
    if let Some(name) = not_yet(error) {
        let failure = Error::usage(format!("`anywhen {name}` is not built yet"))
            .hint("`anywhen --help` lists what is there; `anywhen stream` takes WAL without an archive_command");
        output::failure(&failure, std::env::args_os().any(|arg| arg == "--json"));
        return failure.kind().exit_code();
    }
    let asked = matches!(
        error.kind(),
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion
    );
    if !asked && std::env::args_os().any(|arg| arg == "--json") {
        let text = error.render().to_string();
        let sentence = text
            .lines()
            .next()
            .unwrap_or_default()
            .trim_start_matches("error: ");
        output::failure_document(&Error::usage(sentence).hint("anywhen --help"));
    }
    if error.print().is_err() {
        tracing::debug!("standard output is closed");
    }
    match (asked, is_wal_fetch) {
        (true, _) => 0,
        (false, true) => WAL_FETCH_FAILED,
        (false, false) => Kind::Usage.exit_code(),
    }
}

async fn run(cli: Cli) -> u8 {
    let (stop_in, stop) = watch::channel(false);
    let as_json = cli.global.json;
    let command = match cli.command {
        // a signal ends it as it ends any program: PostgreSQL knows what that means
        Command::WalFetch(args) if args.runs_ahead_in.is_none() => {
            return commands::wal_fetch(&cli.global, args).await;
        }
        command => command,
    };
    // from here on a signal is a request, not the end of the process
    let handlers = (
        signal(SignalKind::interrupt()),
        signal(SignalKind::terminate()),
        // a lost terminal: a private server must not be left behind
        signal(SignalKind::hangup()),
    );
    let (Ok(interrupt), Ok(terminate), Ok(hangup)) = handlers else {
        output::failure(&Error::failure("cannot take signals"), as_json);
        return Kind::Failure.exit_code();
    };
    let asked_to_stop = stop.clone();
    let listening = tokio::spawn(listen([interrupt, terminate, hangup], stop_in));
    let outcome = match command {
        // these come to an orderly end by themselves
        Command::Stream(args) => commands::stream(&cli.global, args, stop).await,
        Command::Backup(args) => commands::backup(&cli.global, args, stop).await,
        Command::Restore(args) => commands::restore(&cli.global, args, stop).await,
        Command::Demo(args) => commands::demo(&cli.global, args, stop).await,
        Command::WalFetch(args) => {
            if let Some(folder) = &args.runs_ahead_in {
                commands::fetch_ahead(&cli.global, &args, folder, stop).await;
            }
            return 0;
        }
        other => {
            tokio::select! {
                outcome = commands::simple(&cli.global, other) => outcome,
                () = commands::stopped(stop) => Err(Error::new(Kind::Failure, "stopped")),
            }
        }
    };
    let Err(mut error) = outcome else { return 0 };
    if *asked_to_stop.borrow()
        && let Ok(number) = listening.await
    {
        error = Error::new(Kind::Stopped(number), error.to_string());
    }
    output::failure(&error, as_json && !error.is_reported());
    error.kind().exit_code()
}

/// Waits for SIGINT, SIGTERM or SIGHUP, passes that on, and returns the signal's number.
async fn listen(mut signals: [Signal; 3], stop: watch::Sender<bool>) -> u8 {
    let number = next_of(&mut signals).await;
    if stop.send(true).is_err() {
        tracing::debug!("nobody waits for the signal");
    }
    tokio::spawn(async move {
        let number = next_of(&mut signals).await;
        // asked twice: whoever asks does not want to wait for what is stuck
        #[expect(
            clippy::exit,
            reason = "nothing may stand between a second signal and the end"
        )]
        std::process::exit(i32::from(Kind::Stopped(number).exit_code()));
    });
    number
}

/// The number of the next signal that comes.
async fn next_of([interrupt, terminate, hangup]: &mut [Signal; 3]) -> u8 {
    let kind = tokio::select! {
        _ = interrupt.recv() => SignalKind::interrupt(),
        _ = terminate.recv() => SignalKind::terminate(),
        _ = hangup.recv() => SignalKind::hangup(),
    };
    u8::try_from(kind.as_raw_value()).unwrap_or_default()
}
