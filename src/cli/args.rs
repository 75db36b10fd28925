//! The command line, as DESIGN.md's interface has it.
#![expect(
    clippy::doc_markdown,
    reason = "these comments are the help text, shown as they are"
)]
#![expect(clippy::struct_excessive_bools, reason = "each is a flag of its own")]

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::backup::ServerCompression;
use crate::config::{GivenSettings, parse_bytes, parse_duration};

/// The least that a stream gets along with: the smallest segment that PostgreSQL has.
const MEMORY_LEAST: u64 = 1 << 20;

/// Bring a PostgreSQL cluster back to any moment.
#[derive(Debug, Parser)]
#[command(
    name = "anywhen",
    version = super::VERSION,
    about,
    propagate_version = true,
    max_term_width = 100,
    after_help = "Settings come from flags, then ANYWHEN_* variables, then a file (--config, \
                  ~/.config/anywhen/anywhen.toml, /etc/anywhen/anywhen.toml).\n\n\
                  Example:\n  anywhen stream --repo file:///backups -d 'host=db1 user=anywhen'"
)]
pub(super) struct Cli {
    #[command(flatten)]
    pub(super) global: Global,
    #[command(subcommand)]
    pub(super) command: Command,
}

/// Flags of every command, taken before and after its name.
#[derive(Debug, Clone, Args)]
pub(super) struct Global {
    /// The configuration file
    #[arg(long, global = true, env = "ANYWHEN_CONFIG", value_name = "FILE")]
    pub(super) config: Option<PathBuf>,
    /// The repository, such as file:///backups
    #[arg(long, global = true, env = "ANYWHEN_REPO", value_name = "URL")]
    pub(super) repo: Option<String>,
    /// How to reach the server: a libpq connection string or URI
    #[arg(
        short = 'd',
        long = "connection",
        visible_alias = "dbname",
        global = true,
        env = "ANYWHEN_CONNECTION",
        hide_env_values = true,
        value_name = "CONNINFO"
    )]
    pub(super) connection: Option<String>,
    /// The cluster's name in the repository [default: main, or the only one configured]
    #[arg(long, global = true, env = "ANYWHEN_CLUSTER", value_name = "NAME")]
    pub(super) cluster: Option<String>,
    /// Which system, where several have lived under the cluster's name
    #[arg(long, global = true, env = "ANYWHEN_SYSTEM_ID", value_parser = parse_system_id, value_name = "ID")]
    pub(super) system_id: Option<u64>,
    /// Which of the configured repositories [default: all of the cluster's]
    #[arg(
        long,
        global = true,
        env = "ANYWHEN_REPOSITORY",
        value_name = "NAME",
        value_delimiter = ','
    )]
    pub(super) repository: Vec<String>,
    /// Encrypt to this age recipient; may be given several times
    #[arg(
        long = "recipient",
        global = true,
        env = "ANYWHEN_RECIPIENTS",
        hide_env_values = true,
        value_name = "AGE1",
        value_delimiter = ','
    )]
    pub(super) recipients: Vec<String>,
    /// The age identity that reads what is encrypted
    #[arg(
        long,
        global = true,
        env = "ANYWHEN_IDENTITY_FILE",
        value_name = "FILE"
    )]
    pub(super) identity_file: Option<PathBuf>,
    /// Where the keys of the day are kept, so that calls share them
    #[arg(long, global = true, env = "ANYWHEN_STATE_DIR", value_name = "DIR")]
    pub(super) state_dir: Option<PathBuf>,
    /// Print one JSON document on standard output
    #[arg(long, global = true, env = "ANYWHEN_JSON")]
    pub(super) json: bool,
    /// Say more
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub(super) verbose: u8,
    /// Say only what went wrong
    #[arg(
        short,
        long,
        global = true,
        env = "ANYWHEN_QUIET",
        conflicts_with = "verbose"
    )]
    pub(super) quiet: bool,
    /// How logs look
    #[arg(
        long,
        global = true,
        env = "ANYWHEN_LOG_FORMAT",
        default_value = "text"
    )]
    pub(super) log_format: LogFormat,
}

impl Global {
    /// What these flags say of settings.
    pub(super) fn given(&self) -> GivenSettings {
        GivenSettings {
            config: self.config.clone(),
            repo: self.repo.clone(),
            connection: self.connection.clone(),
            cluster: self.cluster.clone(),
            repositories: self.repository.clone(),
            recipients: self.recipients.clone(),
            identity_file: self.identity_file.clone(),
            state_dir: self.state_dir.clone(),
        }
    }
}

/// How logs look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Receive WAL until stopped; SIGTERM and SIGINT store all and exit 0
    Stream(StreamArgs),
    /// Take a base backup, complete with the WAL that it needs
    Backup(BackupArgs),
    /// Rebuild a data directory as it was at a moment
    Restore(RestoreArgs),
    /// Fetch one WAL file: restore_command = 'anywhen wal-fetch %f %p'
    WalFetch(WalFetchArgs),
    /// Show what can be restored
    Status(StatusArgs),
    /// Show the backups
    #[command(after_help = "Example:\n  anywhen list --repo file:///backups --json")]
    List,
    /// Show or drop the replication slot
    #[command(subcommand)]
    Slot(SlotCommand),
    /// Put together what is noted of WAL, so that a moment is found in it without reading it all
    #[command(subcommand)]
    Index(IndexCommand),
    /// Make identities; show and rotate the keys of encrypted repositories
    #[command(subcommand)]
    Keys(KeysCommand),
    /// Tell the whole story on a throwaway server
    Demo(DemoArgs),
    /// Print shell completions
    #[command(after_help = "Example:\n  anywhen completions bash > /etc/bash_completion.d/anywhen")]
    Completions {
        /// For which shell
        shell: clap_complete::Shell,
    },
    /// Print the man page
    Man,
}

#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  anywhen stream --repo file:///backups -d 'host=db1 user=anywhen'"
)]
pub(super) struct StreamArgs {
    /// The replication slot, made at need [default: anywhen_CLUSTER]
    #[arg(long, env = "ANYWHEN_SLOT", value_name = "NAME")]
    pub(super) slot: Option<String>,
    /// Stream without a slot: the server may remove WAL before it was received
    #[arg(long, env = "ANYWHEN_NO_SLOT", conflicts_with = "slot")]
    pub(super) no_slot: bool,
    /// How long received WAL waits before it is stored [default: 1s]; 0s: no longer than the piece before it
    /// takes, at the price of many requests
    #[arg(long, env = "ANYWHEN_FLUSH_INTERVAL", value_parser = parse_duration, value_name = "TIME")]
    pub(super) flush_interval: Option<Duration>,
    /// How often the repository's tip is rewritten at most
    #[arg(long, env = "ANYWHEN_TIP_INTERVAL", value_parser = parse_interval, value_name = "TIME",
          default_value = "10s")]
    pub(super) tip_interval: Duration,
    /// How long a server that shuts down waits for its last WAL to be stored
    #[arg(long, env = "ANYWHEN_SHUTDOWN_WAIT", value_parser = parse_duration, value_name = "TIME",
          default_value = "1s")]
    pub(super) shutdown_wait: Duration,
    /// How long a stop may take; then the exit code is not 0
    #[arg(long, env = "ANYWHEN_STOP_TIMEOUT", value_parser = parse_duration, value_name = "TIME",
          default_value = "30s")]
    pub(super) stop_timeout: Duration,
    /// A folder where WAL goes while no repository can be reached
    #[arg(long, env = "ANYWHEN_SPOOL_DIR", value_name = "DIR")]
    pub(super) spool_dir: Option<PathBuf>,
    /// The most that it may hold; then nothing more is received [default: 10GiB]
    #[arg(long, env = "ANYWHEN_SPOOL_BYTES_MAX", value_parser = parse_bytes, value_name = "SIZE")]
    pub(super) spool_bytes_max: Option<u64>,
    /// Store each commit at once, without asking the server first whether it waits for us
    #[arg(long, env = "ANYWHEN_SYNCHRONOUS")]
    pub(super) synchronous: bool,
    /// Stop where the server removed WAL that is not stored, instead of going on behind the hole
    #[arg(long, env = "ANYWHEN_STRICT")]
    pub(super) strict: bool,
    /// How much WAL may be held in memory; a segment that is larger is held all the same
    #[arg(long, env = "ANYWHEN_MEMORY_MAX", value_parser = parse_memory, value_name = "SIZE",
          default_value = "64MiB")]
    pub(super) memory_max: u64,
    /// Serve Prometheus metrics here, such as 127.0.0.1:9187; port 0 is any that is free
    #[arg(long, env = "ANYWHEN_METRICS", value_name = "ADDR")]
    pub(super) metrics: Option<String>,
    /// This server is new under the cluster's name, and that is meant
    #[arg(long, env = "ANYWHEN_NEW_SYSTEM")]
    pub(super) new_system: bool,
}

#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  anywhen backup --repo file:///backups -d 'host=db1 user=anywhen' \
                        --label 'before the upgrade'\n  \
                        anywhen backup --no-verify-checksums     # where the server finds damaged pages"
)]
pub(super) struct BackupArgs {
    /// A text to find it by
    #[arg(long, env = "ANYWHEN_LABEL", value_name = "TEXT", default_value = "")]
    pub(super) label: String,
    /// Begin with a checkpoint at full speed, or spread over time
    #[arg(long, env = "ANYWHEN_CHECKPOINT", default_value = "fast")]
    pub(super) checkpoint: CheckpointArg,
    /// The most that the server may send in a second: 32k to 1G
    #[arg(long, env = "ANYWHEN_MAX_RATE", value_parser = parse_rate, value_name = "RATE")]
    pub(super) max_rate: Option<u32>,
    /// Let the server compress what it sends, with zstd:1 to zstd:19: where the network is slower than its processors
    #[arg(
        long,
        env = "ANYWHEN_SERVER_COMPRESSION",
        value_parser = parse_server_compression,
        value_name = "zstd:LEVEL"
    )]
    pub(super) server_compression: Option<ServerCompression>,
    /// Take the backup also where the checksums of pages are wrong, and name those pages in it
    #[arg(long, env = "ANYWHEN_NO_VERIFY_CHECKSUMS")]
    pub(super) no_verify_checksums: bool,
    /// Read everything, and store it anew, also what an earlier backup has stored
    #[arg(long, env = "ANYWHEN_FULL")]
    pub(super) full: bool,
    /// This server is new under the cluster's name, and that is meant
    #[arg(long, env = "ANYWHEN_NEW_SYSTEM")]
    pub(super) new_system: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum CheckpointArg {
    /// At once.
    Fast,
    /// Spread over the time that the server's settings give it.
    Spread,
}

#[derive(Debug, Args)]
#[command(
    after_help = "Times: 2026-11-20T14:03:00Z, '2026-11-20 14:03:00 Europe/Paris', \
                        '2026-11-20 14:03:00+01', '10 minutes ago'; a bare local time is taken in \
                        the system's zone.\n\nExamples:\n  \
                        anywhen restore --repo file:///backups -D /srv/restored --to '10 minutes ago' --dry-run\n  \
                        anywhen restore --repo file:///backups -D /srv/restored --to '2026-11-20 14:03:00' --replay\n  \
                        anywhen restore --repo file:///backups -D /srv/restored --resume       # it was killed\n  \
                        anywhen restore --repo file:///backups -D /var/lib/postgresql/18/main --delta --dry-run\n  \
                        anywhen restore --repo file:///backups -D /srv/standby --delta --standby   # it is damaged"
)]
pub(super) struct RestoreArgs {
    /// The folder to restore into; absent or empty, unless --delta or --resume is given
    #[arg(short = 'D', long, visible_aliases = ["target-dir"], env = "ANYWHEN_TARGET_DIR", value_name = "DIR")]
    pub(super) pgdata: PathBuf,
    #[command(flatten)]
    pub(super) target: TargetArgs,
    /// Stop just before the target instead of just after it
    #[arg(long, env = "ANYWHEN_EXCLUSIVE")]
    pub(super) exclusive: bool,
    /// Begin with this backup [default: the newest that serves the target]
    #[arg(long, env = "ANYWHEN_BACKUP", value_name = "ID")]
    pub(super) backup: Option<String>,
    /// The timeline to follow: a number, or latest
    #[arg(
        long,
        env = "ANYWHEN_TIMELINE",
        value_name = "N|latest",
        default_value = "latest"
    )]
    pub(super) timeline: String,
    /// What the server does at the target [default: pause for a target, promote for the latest]
    #[arg(long, env = "ANYWHEN_ACTION")]
    pub(super) action: Option<ActionArg>,
    /// Make a standby: with standby.signal, and primary_conninfo as in the backup, or, with --delta, as in the folder
    #[arg(long, env = "ANYWHEN_STANDBY")]
    pub(super) standby: bool,
    /// How the standby reaches its primary
    #[arg(
        long,
        env = "ANYWHEN_PRIMARY_CONNINFO",
        hide_env_values = true,
        value_name = "CONNINFO",
        requires = "standby"
    )]
    pub(super) primary_conninfo: Option<String>,
    /// Where a tablespace goes: OID=DIR or OLDDIR=DIR; may be repeated
    #[arg(
        short = 'T',
        long = "tablespace",
        env = "ANYWHEN_TABLESPACE",
        value_delimiter = ',',
        value_name = "OID=DIR|OLDDIR=DIR"
    )]
    pub(super) tablespaces: Vec<String>,
    /// Where WAL goes; pg_wal is a link to it [default: into the folder]
    #[arg(long, env = "ANYWHEN_WALDIR", value_name = "DIR")]
    pub(super) waldir: Option<PathBuf>,
    /// Write files that the server kept outside of its data directory, such as Debian's configuration, below this folder
    #[arg(long, env = "ANYWHEN_OUTSIDE", value_name = "DIR")]
    pub(super) outside: Option<PathBuf>,
    /// Whether the restored server archives
    #[arg(long, env = "ANYWHEN_ARCHIVE_MODE", default_value = "off")]
    pub(super) archive_mode: ArchiveModeArg,
    /// As root: who owns the files [default: the owner of the parent folder]
    #[arg(long, env = "ANYWHEN_OWNER", value_name = "USER")]
    pub(super) owner: Option<String>,
    /// Start the restored server on a private socket, wait for the target, and stop it again
    #[arg(long, env = "ANYWHEN_REPLAY")]
    pub(super) replay: bool,
    /// Where the server's programs are, for --replay
    #[arg(long, env = "ANYWHEN_PG_BIN", value_name = "DIR")]
    pub(super) pg_bin: Option<PathBuf>,
    /// Go on with a restore into this folder that was killed: keep what is right there, and replace the rest
    #[arg(long, env = "ANYWHEN_RESUME")]
    pub(super) resume: bool,
    /// Restore over the cluster in this folder, whose server is stopped: keep what is right, by content, and replace
    /// or remove the rest; its WAL and logs are set aside
    #[arg(long, env = "ANYWHEN_DELTA", conflicts_with = "resume")]
    pub(super) delta: bool,
    /// Read all WAL that is replayed before anything is written; without it, that of 64 segments or more is looked
    /// through by what was noted when it was stored
    #[arg(long, env = "ANYWHEN_CHECK_WAL")]
    pub(super) check_wal: bool,
    /// Print the plan, and do nothing
    #[arg(long, env = "ANYWHEN_DRY_RUN")]
    pub(super) dry_run: bool,
}

/// The moment to restore; the latest when none is given.
#[derive(Debug, Args)]
#[group(multiple = false)]
pub(super) struct TargetArgs {
    /// A time; or `latest`
    #[arg(
        long = "to",
        visible_alias = "to-time",
        env = "ANYWHEN_TO",
        value_name = "TIME"
    )]
    pub(super) to: Option<String>,
    /// An LSN
    #[arg(long, env = "ANYWHEN_TO_LSN", value_parser = parse_lsn, value_name = "LSN")]
    pub(super) to_lsn: Option<wal::Lsn>,
    /// A transaction
    #[arg(long, env = "ANYWHEN_TO_XID", value_parser = parse_xid, value_name = "XID")]
    pub(super) to_xid: Option<u64>,
    /// A restore point
    #[arg(long, env = "ANYWHEN_TO_NAME", value_name = "NAME")]
    pub(super) to_name: Option<String>,
    /// The first consistent moment of the backup
    #[arg(long, env = "ANYWHEN_IMMEDIATE")]
    pub(super) immediate: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum ActionArg {
    /// Wait, open for reading.
    Pause,
    /// Open for writing, on a new timeline.
    Promote,
    /// Stop.
    Shutdown,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum ArchiveModeArg {
    /// It does not: a live server may use the same archive.
    Off,
    /// As its configuration says.
    Preserve,
}

#[derive(Debug, Args)]
#[command(
    after_help = "Example, in postgresql.conf:\n  restore_command = 'anywhen wal-fetch %f %p'\n\nExit codes: 0 found, 1 not in the archive, 200 everything else: \
                        PostgreSQL takes 1 for the end of WAL, and stops at 200."
)]
pub(super) struct WalFetchArgs {
    /// The file's name: %f
    pub(super) name: String,
    /// Where it goes: %p
    pub(super) dest: PathBuf,
    /// The branch that is restored: nothing that it left behind is handed out
    #[arg(long, env = "ANYWHEN_FETCH_TIMELINE", value_name = "N")]
    pub(super) timeline: Option<wal::TimelineId>,
    /// What lies behind this position is not needed: that it is missing or damaged does not matter
    #[arg(long, env = "ANYWHEN_FETCH_UNTIL", value_name = "LSN")]
    pub(super) until: Option<wal::Lsn>,
    /// Fetch nothing ahead. Otherwise a process in the background fetches what a recovery asks for next, at most
    /// 256 MiB, into a folder beside the data directory
    #[arg(long, env = "ANYWHEN_NO_AHEAD")]
    pub(super) no_ahead: bool,
    /// As that process, for the recovery whose folder this is
    #[arg(long, value_name = "DIR", hide = true)]
    pub(super) runs_ahead_in: Option<PathBuf>,
}

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  anywhen status --repo file:///backups --timelines")]
pub(super) struct StatusArgs {
    /// Draw the tree of timelines
    #[arg(long, env = "ANYWHEN_TIMELINES")]
    pub(super) timelines: bool,
    /// Print numbers for Prometheus instead, as node_exporter's textfile collector reads them
    #[arg(long, env = "ANYWHEN_STATUS_METRICS", conflicts_with = "timelines")]
    pub(super) metrics: bool,
    /// Where a stream of this machine spools WAL
    #[arg(long, env = "ANYWHEN_SPOOL_DIR", value_name = "DIR")]
    pub(super) spool_dir: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub(super) enum SlotCommand {
    /// Show the state of the slot
    Show(SlotArgs),
    /// Drop the slot: the server keeps WAL for it no longer
    Drop(SlotArgs),
}

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  anywhen slot show -d 'host=db1 user=anywhen'")]
pub(super) struct SlotArgs {
    /// The replication slot [default: anywhen_CLUSTER]
    #[arg(long, env = "ANYWHEN_SLOT", value_name = "NAME")]
    pub(super) slot: Option<String>,
}

#[derive(Debug, Subcommand)]
pub(super) enum IndexCommand {
    /// Write what is missing of it or cannot be read, from the segments
    #[command(
        after_help = "A stream does this by itself as segments come; this is for a repository that \
                            has lost some of it, or whose WAL came another way. Nothing depends on it but \
                            how long a restore takes to be planned. It may be stopped and called again.\n\n\
                            Example:\n  anywhen index rebuild --repo file:///backups"
    )]
    Rebuild,
}

#[derive(Debug, Subcommand)]
pub(super) enum KeysCommand {
    /// Make an identity: the secret file that opens, and the public recipient to encrypt to
    Generate(GenerateArgs),
    /// Show the data keys that are stored, and for whom each is wrapped
    #[command(
        after_help = "No identity is needed, and nothing is opened. Keys that objects carry \
                            themselves (of archivers without a state_dir) are not listed: `anywhen \
                            keys rotate --dry-run` finds them.\n\nExample:\n  \
                            anywhen keys list --repo file:///backups --json"
    )]
    List,
    /// Wrap every data key for the recipients configured now, and for nobody else
    Rotate(RotateArgs),
}

#[derive(Debug, Args)]
#[command(
    after_help = "The file is one of age's (age-encryption.org): `age -d -i FILE` opens what \
                        is wrapped to it. Keep a copy away from the server: without it, what is \
                        encrypted cannot be read by anybody.\n\nExample:\n  \
                        anywhen keys generate -o /etc/anywhen/identity"
)]
pub(super) struct GenerateArgs {
    /// Where the identity goes; never overwritten [default: standard output]
    #[arg(short, long, env = "ANYWHEN_OUTPUT", value_name = "FILE")]
    pub(super) output: Option<PathBuf>,
}

#[derive(Debug, Args)]
#[command(
    after_help = "First change the recipients of every archiver, then rotate. The identity is one \
                        that opens the keys now. Wraps are added and read back before others are \
                        retired; data is never rewritten, so it may be stopped and called again. \
                        Whoever held a retired identity may have kept keys that it opened.\n\n\
                        Examples:\n  \
                        anywhen keys rotate --repo file:///backups --identity-file old \
                        --recipient age1… --dry-run\n  \
                        anywhen keys rotate --config /etc/anywhen/anywhen.toml --yes"
)]
pub(super) struct RotateArgs {
    /// Print the plan, and do nothing
    #[arg(long, env = "ANYWHEN_DRY_RUN")]
    pub(super) dry_run: bool,
    /// Do not ask
    #[arg(short, long, env = "ANYWHEN_YES")]
    pub(super) yes: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  anywhen demo --pg-bin /usr/lib/postgresql/18/bin")]
pub(super) struct DemoArgs {
    /// Where the server's programs are [default: the newest found]
    #[arg(long, env = "ANYWHEN_PG_BIN", value_name = "DIR")]
    pub(super) pg_bin: Option<PathBuf>,
    /// Keep the folder, and say where it is
    #[arg(long, env = "ANYWHEN_KEEP")]
    pub(super) keep: bool,
}

/// An amount of memory in which a stream can go on: the smallest segment that there is.
fn parse_memory(text: &str) -> Result<u64, String> {
    match parse_bytes(text)? {
        bytes if bytes < MEMORY_LEAST => Err("the least is 1MiB".to_owned()),
        bytes => Ok(bytes),
    }
}

/// A length of time that is not zero.
fn parse_interval(text: &str) -> Result<Duration, String> {
    match parse_duration(text)? {
        Duration::ZERO => Err("must be longer than zero".to_owned()),
        interval => Ok(interval),
    }
}

fn parse_lsn(text: &str) -> Result<wal::Lsn, String> {
    text.parse().map_err(|_not_an_lsn| {
        format!("expected a position such as 16/B374D848, as pg_current_wal_lsn() prints it: found {text:?}")
    })
}

fn parse_xid(text: &str) -> Result<u64, String> {
    text.parse().map_err(|_not_a_number| {
        format!("expected a transaction's number such as 4711, as pg_current_xact_id() prints it: found {text:?}")
    })
}

fn parse_system_id(text: &str) -> Result<u64, String> {
    text.parse().map_err(|_not_a_number| {
        format!(
            "expected a system identifier, a number as `anywhen status` prints it: found {text:?}"
        )
    })
}

/// A rate in KiB a second, as `BASE_BACKUP` takes it (basebackup.h, `MAX_RATE_LOWER` and
/// `MAX_RATE_UPPER`): 32 KiB to 1 GiB.
fn parse_rate(text: &str) -> Result<u32, String> {
    let bad = || format!("a rate is a number of KiB, or has k, M or G: found {text:?}");
    let (number, factor) = match text.char_indices().last() {
        Some((at, 'k' | 'K')) => (&text[..at], 1),
        Some((at, 'M')) => (&text[..at], 1024),
        Some((at, 'G')) => (&text[..at], 1024 * 1024),
        _ => (text, 1),
    };
    let number: u32 = number.parse().map_err(|_not_a_number| bad())?;
    let rate = number.checked_mul(factor).ok_or_else(bad)?;
    if (32..=1_048_576).contains(&rate) {
        Ok(rate)
    } else {
        Err(format!("a rate is 32k to 1G: found {text:?}"))
    }
}

/// What `BASE_BACKUP` takes as zstd's level, but for those whose windows are larger than ours.
fn parse_server_compression(text: &str) -> Result<ServerCompression, String> {
    let level = text.strip_prefix("zstd:").and_then(|it| it.parse().ok());
    let level = level.filter(|level| (1..=19).contains(level));
    let level = level.ok_or_else(|| format!("it is zstd:1 to zstd:19: found {text:?}"))?;
    Ok(ServerCompression { level, workers: 0 })
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_holds_together() {
        Cli::command().debug_assert();
    }

    #[test]
    fn global_flags_are_taken_on_both_sides() {
        for line in [
            "anywhen --repo /r status --json",
            "anywhen status --repo /r --json",
        ] {
            let cli = Cli::try_parse_from(line.split(' ')).unwrap();
            assert!(
                cli.global.json && cli.global.repo.as_deref() == Some("/r"),
                "{line}"
            );
        }
    }

    #[test]
    fn two_targets_are_an_error() {
        let line = "anywhen restore -D /x --to-lsn 0/1 --immediate";
        assert!(Cli::try_parse_from(line.split(' ')).is_err());
    }

    #[test]
    fn every_long_flag_has_a_variable() {
        // the last is no setting: one process begins another with it
        let skipped = ["help", "version", "verbose", "runs-ahead-in"];
        let mut commands = vec![Cli::command()];
        while let Some(command) = commands.pop() {
            for arg in command
                .get_arguments()
                .filter(|arg| arg.get_long().is_some())
            {
                let long = arg.get_long().unwrap();
                assert!(
                    skipped.contains(&long) || arg.get_env().is_some(),
                    "--{long}"
                );
            }
            commands.extend(command.get_subcommands().cloned());
        }
    }

    /// What a library says of its own parsing helps nobody at a command line.
    #[test]
    fn a_value_that_does_not_fit_is_answered_with_what_one_looks_like() {
        for (flag, value, expected) in [
            ("--to-lsn", "12345", "such as 16/B374D848"),
            ("--to-xid", "abc", "such as 4711"),
            ("--system-id", "x", "`anywhen status` prints it"),
        ] {
            let line = ["anywhen", "restore", "-D", "/x", flag, value];
            let error = Cli::try_parse_from(line).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
            assert!(!error.contains("invalid digit"), "{error}");
        }
    }

    #[test]
    fn a_stream_of_next_to_no_memory_is_refused_with_what_works() {
        for (flag, value, expected) in [
            ("--memory-max", "0", Some("the least is 1MiB")),
            ("--memory-max", "1023kB", Some("the least is 1MiB")),
            ("--memory-max", "1MB", None),
        ] {
            let parsed = Cli::try_parse_from(["anywhen", "stream", flag, value]);
            let said = parsed.err().map(|error| error.to_string());
            let is_right = match (&said, expected) {
                (Some(said), Some(expected)) => said.contains(expected),
                (said, expected) => said.is_none() && expected.is_none(),
            };
            assert!(is_right, "{flag} {value}: {said:?}");
        }
    }

    #[test]
    fn rates_are_those_of_base_backup() {
        assert_eq!(parse_rate("32k"), Ok(32));
        assert_eq!(parse_rate("100M"), Ok(102_400));
        assert!(parse_rate("31").is_err() && parse_rate("2G").is_err() && parse_rate("x").is_err());
    }
}
