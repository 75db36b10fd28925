//! Each command: its flags and the settings, handed on as what the part needs.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::IsTerminal as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::CommandFactory as _;
use jiff::tz::TimeZone;
use tokio::sync::watch;

use super::args::{
    ActionArg, ArchiveModeArg, BackupArgs, CheckpointArg, Cli, Command, DemoArgs, Global,
    IndexCommand, RestoreArgs, SlotArgs, SlotCommand, StatusArgs, StreamArgs, TargetArgs,
    WalFetchArgs,
};
use super::destination::{destination, impatient_destination, spool, spool_dir};
use super::output;
use super::progress::Progress;
use crate::backup::{BackupOptions, BackupTaker, CheckpointMode};
use crate::clock::{Clock, SystemClock};
use crate::config::{ClusterSettings, GivenSettings, RepositorySettings, Settings, handed_over};
use crate::error::{Error, Kind, Result, io};
use crate::restore::ahead::Session;
use crate::restore::fetch::{FetchRequest, OpenDestination};
use crate::restore::{
    self, Environment, Over, RestoreCommand, RestoreOptions, Target, TargetAction, Work,
};
use crate::service::{self, ReceiverOptions, StoreOptions, WatchOptions};
use crate::setup::{self, demo::StaysIn};
use crate::status::{self, BackupDone, BackupRow, Shown};

fn clock() -> Arc<dyn Clock> {
    Arc::new(SystemClock)
}

type Stop = watch::Receiver<bool>;

/// Returns once a signal has come.
pub(super) async fn stopped(mut stop: Stop) {
    if stop.wait_for(|asked| *asked).await.is_err() {
        std::future::pending::<()>().await;
    }
}

pub(super) async fn stream(global: &Global, args: StreamArgs, stop: Stop) -> Result<()> {
    let settings = Settings::load(&global.given())?;
    let cluster = settings.cluster()?;
    let slot = args.slot.unwrap_or_else(|| cluster.slot.clone());
    let spool = spool(cluster, args.spool_dir.as_deref(), args.spool_bytes_max)?;
    if args.synchronous && spool.as_ref().is_some_and(|spool| spool.acknowledges) {
        return Err(Error::usage(
            "acknowledge = \"spool\" is refused with --synchronous: commits would wait for a \
             promise that the spool does not keep",
        )
        .hint("set acknowledge to \"all\", or leave out --synchronous"));
    }
    let mut options = ReceiverOptions {
        slot: (!args.no_slot).then_some(slot),
        tip_interval: args.tip_interval,
        shutdown_wait: args.shutdown_wait,
        stop_timeout: args.stop_timeout,
        unstored_bytes_max: args.memory_max,
        synchronous: args.synchronous,
        strict: args.strict,
        new_system: args.new_system,
        spool,
        ..ReceiverOptions::default()
    };
    if let Some(interval) = args.flush_interval.or(cluster.flush_interval) {
        options.flush_interval = interval;
    }
    let watched = WatchOptions {
        metrics: args.metrics.or_else(|| cluster.metrics.clone()),
    };
    let clock = Arc::new(SystemClock);
    let conninfo = cluster.connection.as_deref();
    service::stream(
        conninfo,
        &impatient_destination(cluster),
        options,
        watched,
        clock,
        stop,
    )
    .await
}

pub(super) async fn backup(global: &Global, args: BackupArgs, stop: Stop) -> Result<()> {
    let settings = Settings::load(&global.given())?;
    let cluster = settings.cluster()?;
    let options = BackupOptions {
        label: args.label,
        checkpoint: match args.checkpoint {
            CheckpointArg::Fast => CheckpointMode::Fast,
            CheckpointArg::Spread => CheckpointMode::Spread,
        },
        max_rate_kib: args.max_rate,
        server_compression: args.server_compression,
        verify_checksums: !args.no_verify_checksums,
        full: args.full,
        new_system: args.new_system,
    };
    let conninfo = cluster.connection.as_deref();
    let taker = BackupTaker::new(
        conninfo,
        &destination(cluster),
        options,
        Arc::new(SystemClock),
    )?;
    let progress = Progress::new("backup", global.quiet);
    let taken = taker
        .run(&|done, total| progress.at(done, total), stop)
        .await;
    progress.finish();
    let row = BackupRow::from(&taken?);
    if global.json {
        return output::json(&BackupDone {
            schema: 1,
            backup: row,
        });
    }
    output::line(&status::backup_table(&row))
}

pub(super) async fn restore(global: &Global, args: RestoreArgs, stop: Stop) -> Result<()> {
    let settings = Settings::load(&global.given())?;
    let cluster = settings.cluster()?;
    let options = restore_options(global.given(), &settings, cluster, args)?;
    let planning = async {
        let repository = destination(cluster)
            .open(false, &clock())?
            .stored(global.system_id)
            .await?;
        let plan = restore::plan(&repository, &options, &SystemClock).await?;
        Ok::<_, Error>((repository, plan))
    };
    let (repository, plan) = tokio::select! {
        planned = planning => planned?,
        () = stopped(stop.clone()) => {
            return Err(Error::new(Kind::Failure, "stopped before anything was written"));
        }
    };
    if options.dry_run {
        return if global.json {
            output::json(&plan.report())
        } else {
            output::line(&plan.to_string())
        };
    }
    if !global.json && !global.quiet {
        output::line(&plan.to_string())?;
    }
    let progress = Progress::new("restore", global.quiet);
    let outcome = restore::execute(
        &repository,
        &plan,
        &|work, done, total| {
            match work {
                Work::Files => progress.begin("restore"),
                Work::Replay(reached) => {
                    progress.begin("replay");
                    progress.reached(reached);
                }
            }
            progress.at(done, total);
        },
        stop,
    )
    .await;
    progress.finish();
    let report = outcome?;
    if global.json {
        output::json(&report)
    } else {
        output::line(&report.to_string())
    }
}

fn restore_options(
    given: GivenSettings,
    settings: &Settings,
    cluster: &ClusterSettings,
    args: RestoreArgs,
) -> Result<RestoreOptions> {
    let program = std::env::current_exe()
        .map_err(|error| Error::failure(format!("cannot find this program's path: {error}")))?;
    let timeline = match args.timeline.as_str() {
        "latest" => None,
        text => Some(text.parse().map_err(|_not_a_number| {
            Error::usage(format!("a timeline is a number, or latest: found {text:?}"))
                .hint("`anywhen status --timelines` shows those that are stored")
        })?),
    };
    let backup = args.backup.map(|id| id.parse()).transpose()?;
    // what was given without a file must be given to the restored server too
    let given_repo = cluster
        .repositories
        .first()
        .filter(|_| settings.repo_is_given());
    let tablespaces = args
        .tablespaces
        .iter()
        .map(|text| text.parse())
        .collect::<Result<_, _>>();
    Ok(RestoreOptions {
        target_dir: args.pgdata,
        over: match (args.delta, args.resume) {
            (true, _) => Over::Cluster,
            (false, true) => Over::Unfinished,
            (false, false) => Over::Nothing,
        },
        needed: needed(settings, cluster, &program),
        target: target(args.target)?,
        exclusive: args.exclusive,
        backup,
        timeline,
        action: args.action.map(|action| match action {
            ActionArg::Pause => TargetAction::Pause,
            ActionArg::Promote => TargetAction::Promote,
            ActionArg::Shutdown => TargetAction::Shutdown,
        }),
        standby: args.standby,
        primary_conninfo: args.primary_conninfo,
        tablespaces: tablespaces?,
        waldir: absolute(args.waldir)?,
        outside: absolute(args.outside)?,
        archive_mode_preserve: args.archive_mode == ArchiveModeArg::Preserve,
        owner: args.owner,
        replay: args.replay,
        pg_bin: args.pg_bin,
        check_wal: args.check_wal,
        dry_run: args.dry_run,
        restore_command: RestoreCommand {
            program,
            config: settings.file.clone(),
            repo: given_repo.map(|given| given.url.clone()),
            repositories: given.repositories,
            identity_file: absolute_identity(given.identity_file)?,
            cluster: cluster.name.parse()?,
            environment: environment_of(&cluster.repositories),
        },
    })
}

/// What this program needs on this machine: its own file, settings, keys, and what it stores.
fn needed(settings: &Settings, cluster: &ClusterSettings, program: &Path) -> Vec<PathBuf> {
    let mut needed = vec![program.to_owned()];
    needed.extend(settings.file.clone());
    needed.extend(cluster.spool_dir.clone());
    for repository in &cluster.repositories {
        needed.extend(StoreOptions::at(&repository.url).folder());
        needed.extend(repository.identity_file.clone());
        needed.extend(repository.state_dir.clone());
    }
    needed
}

/// The variables that lead to the repositories and to what reads them, as they are set now.
fn environment_of(repositories: &[RepositorySettings]) -> Environment {
    let is_remote = |one: &RepositorySettings| {
        let scheme = one.url.split_once("://").map(|(scheme, _)| scheme);
        scheme.is_some_and(|scheme| scheme != "file")
    };
    let is_handed_over = |one: &RepositorySettings| {
        let identity = one.identity_file.as_deref();
        identity.is_some_and(|path| handed_over(path).is_some())
    };
    let remote = repositories.iter().any(is_remote);
    let credentials = repositories.iter().any(is_handed_over);
    let variables = std::env::vars_os()
        .filter(|(name, _)| is_needed(&name.to_string_lossy(), remote, credentials))
        .collect();
    Environment(variables)
}

/// Whether a variable leads to a repository that is no folder, or to an identity that was handed
/// over.
fn is_needed(name: &str, remote: bool, credentials: bool) -> bool {
    const BEGINNINGS: &[&str] = &["AWS_", "GOOGLE_", "AZURE_"];
    const NAMES: &[&str] = &[
        "CREDENTIALS_DIRECTORY",
        "HOME",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "NO_PROXY",
        "SSL_CERT_DIR",
        "SSL_CERT_FILE",
    ];
    let begins = |beginning: &&str| name.starts_with(*beginning);
    let leads_there =
        BEGINNINGS.iter().any(begins) || NAMES.contains(&name.to_uppercase().as_str());
    (remote && leads_there) || (credentials && name == "CREDENTIALS_DIRECTORY")
}

/// The restored server runs elsewhere; only what systemd hands over is found by its bare name.
fn absolute_identity(path: Option<PathBuf>) -> Result<Option<PathBuf>> {
    match path {
        Some(path) if handed_over(&path).is_none() => absolute(Some(path)),
        path => Ok(path),
    }
}

fn absolute(path: Option<PathBuf>) -> Result<Option<PathBuf>> {
    let found =
        path.map(|path| std::path::absolute(&path).map_err(|error| io("find", &path, &error)));
    found.transpose()
}

fn target(args: TargetArgs) -> Result<Target> {
    let TargetArgs {
        to,
        to_lsn,
        to_xid,
        to_name,
        immediate,
    } = args;
    Ok(match (to, to_lsn, to_xid, to_name) {
        _ if immediate => Target::Immediate,
        (Some(text), ..) if text == "latest" => Target::Latest,
        (Some(text), ..) => {
            let now = SystemClock.now().to_zoned(TimeZone::system());
            let time = restore::parse_time(&text, &now)?;
            tracing::info!("{}", time.shown);
            Target::Time(time.instant)
        }
        (_, Some(lsn), ..) => Target::Lsn(lsn),
        (_, _, Some(xid), _) => Target::Xid(xid),
        (.., Some(name)) => Target::Name(name),
        _ => Target::Latest,
    })
}

fn fetch_request(global: &Global, args: &WalFetchArgs) -> FetchRequest {
    FetchRequest {
        name: args.name.clone(),
        dest: args.dest.clone(),
        timeline: args.timeline,
        until: args.until,
        system_id: global.system_id,
    }
}

/// The arguments of this program.
fn own_arguments() -> Vec<OsString> {
    std::env::args_os().skip(1).collect()
}

fn session(request: &FetchRequest, args: &WalFetchArgs) -> Option<Session> {
    let is_asked_for = !args.no_ahead && args.runs_ahead_in.is_none();
    is_asked_for
        .then(|| Session::of(request, &own_arguments()))
        .flatten()
}

/// Whether `wal-fetch` has handed out what was fetched before it was asked for: that takes no threads, no
/// settings and no repository.
pub(super) fn is_at_hand(global: &Global, args: &WalFetchArgs) -> bool {
    let request = fetch_request(global, args);
    session(&request, args).is_some_and(|session| session.take(&request))
}

fn open_impatiently(global: &Global) -> Result<OpenDestination> {
    let settings = Settings::load(&global.given())?;
    let cluster = settings.cluster()?;
    impatient_destination(cluster).open(false, &clock())
}

/// Fetches ahead, for a recovery that does not wait for it.
pub(super) async fn fetch_ahead(global: &Global, args: &WalFetchArgs, folder: &Path, stop: Stop) {
    let request = fetch_request(global, args);
    restore::ahead::run(|| open_impatiently(global), &request, folder, stop).await;
}

/// `wal-fetch` has PostgreSQL's exit codes, and no others.
pub(super) async fn wal_fetch(global: &Global, args: WalFetchArgs) -> u8 {
    let request = fetch_request(global, &args);
    let session = session(&request, &args);
    if let Some(session) = &session
        && session.take_underway(&request).await
    {
        return 0;
    }
    let outcome = restore::fetch::run(|| open_impatiently(global), request.clone()).await;
    if let Some(session) = session.filter(|_| outcome.code == 0) {
        session.go_on_behind(&request, &own_arguments());
    }
    if let Some(error) = &outcome.error {
        output::failure(error, false);
    }
    outcome.code
}

/// The commands that a signal may end anywhere.
pub(super) async fn simple(global: &Global, command: Command) -> Result<()> {
    match command {
        Command::Status(args) => status(global, &args).await,
        Command::List => list(global).await,
        Command::Slot(SlotCommand::Show(args)) => {
            let (conninfo, slot) = slot_of(global, args)?;
            let report = setup::slot::show(conninfo.as_deref(), &slot).await?;
            if global.json {
                output::json(&report)
            } else {
                output::line(&report.to_string())
            }
        }
        Command::Slot(SlotCommand::Drop(args)) => {
            let (conninfo, slot) = slot_of(global, args)?;
            setup::slot::drop(conninfo.as_deref(), &slot).await?;
            output::line(&format!(
                "slot {slot} is dropped: no WAL is kept for it any more"
            ))
        }
        Command::Index(IndexCommand::Rebuild) => rebuild_index(global).await,
        Command::Keys(command) => super::keys::run(global, command).await,
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "anywhen", &mut script);
            output::line(&String::from_utf8_lossy(&script))
        }
        Command::Man => {
            let mut page = Vec::new();
            clap_mangen::Man::new(Cli::command())
                .render(&mut page)
                .map_err(|error| Error::failure(format!("cannot render the page: {error}")))?;
            output::line(&String::from_utf8_lossy(&page))
        }
        Command::Stream(_)
        | Command::Backup(_)
        | Command::Restore(_)
        | Command::WalFetch(_)
        | Command::Demo(_) => Err(Error::failure("this command is run elsewhere")),
    }
}

async fn status(global: &Global, args: &StatusArgs) -> Result<()> {
    if global.json && args.metrics {
        return Err(Error::usage(
            "--json and --metrics are two forms of the same: name one",
        ));
    }
    let shown = Shown {
        spools: spools(global, args)?,
        ..shown(global)?
    };
    let now = SystemClock.now();
    let status = status::status(&shown, now).await?;
    if global.json {
        output::json(&status)?;
    } else if args.metrics {
        let metrics = status::Metrics {
            status: &status,
            at: now,
        };
        // what is wrong is among the numbers, which must get to where they are looked at
        return output::line(metrics.to_string().trim_end());
    } else if status.clusters.is_empty() {
        output::line("nothing is stored yet. hint: anywhen stream, and anywhen backup")?;
    } else {
        let clusters = status.clusters.iter();
        let texts: Vec<String> = clusters
            .map(|cluster| status::status_text(cluster, args.timelines, now))
            .collect();
        output::line(texts.join("\n").trim_end())?;
    }
    let clusters = status.clusters.iter();
    status::unreadable(
        clusters
            .clone()
            .flat_map(|cluster| &cluster.unreadable_backups),
    )?;
    status::damaged(clusters)
}

async fn list(global: &Global) -> Result<()> {
    let list = status::list(&shown(global)?).await?;
    if global.json {
        output::json(&list)?;
    } else {
        output::line(&status::list_text(&list))?;
    }
    status::unreadable(list.unreadable_backups.iter())
}

async fn rebuild_index(global: &Global) -> Result<()> {
    let settings = Settings::load(&global.given())?;
    let destination = destination(settings.cluster()?);
    let progress = Progress::new("index", global.quiet);
    let told = |done, total| progress.at(done, total);
    let rebuilt = setup::index::rebuild(&destination, global.system_id, &clock(), &told).await;
    progress.finish();
    let rebuilt = rebuilt?;
    if global.json {
        output::json(&rebuilt)
    } else {
        output::line(&rebuilt.to_string())
    }
}

/// What `status` and `list` show: the cluster that was named, all that are configured, or all
/// that are stored.
fn shown(global: &Global) -> Result<Shown> {
    let settings = Settings::load(&global.given())?;
    let every_cluster = !settings.cluster_is_chosen() && !settings.names_clusters();
    Ok(Shown {
        destinations: settings.clusters().map(destination).collect(),
        every_cluster,
        must_exist: settings.cluster_is_chosen(),
        system_id: global.system_id,
        spools: BTreeMap::new(),
        clock: clock(),
    })
}

/// The folder where each cluster's WAL is spooled.
fn spools(global: &Global, args: &StatusArgs) -> Result<BTreeMap<String, PathBuf>> {
    let settings = Settings::load(&global.given())?;
    let given = args.spool_dir.as_deref().map(spool_dir).transpose()?;
    let spools = settings.clusters().filter_map(|cluster| {
        let dir = given.clone().or_else(|| cluster.spool_dir.clone());
        Some((cluster.name.clone(), dir?))
    });
    Ok(spools.collect())
}

fn slot_of(global: &Global, args: SlotArgs) -> Result<(Option<String>, String)> {
    let settings = Settings::load_without_repository(global.given())?;
    let cluster = settings.cluster()?;
    let slot = args.slot.unwrap_or_else(|| cluster.slot.clone());
    Ok((cluster.connection.clone(), slot))
}

pub(super) async fn demo(global: &Global, args: DemoArgs, stop: Stop) -> Result<()> {
    if global.json {
        return Err(Error::usage("the demo tells a story, and has no document")
            .hint("leave --json out; its commands, such as status, have one each"));
    }
    let mut given = global.given();
    let is_chosen = given.repo.is_some() || !given.repositories.is_empty();
    if !is_chosen {
        let own = setup::demo::folder().join("repository");
        given.repo = Some(format!("file://{}", own.display()));
    }
    let settings = Settings::load(&given)?;
    let cluster = match given.repo {
        // the same for every cluster
        Some(_) => settings.clusters().next(),
        None => None,
    };
    let cluster = cluster.map_or_else(|| settings.cluster(), Ok)?;
    for repository in &cluster.repositories {
        if !repository.recipients.is_empty() && repository.identity_file.is_none() {
            return Err(Error::usage(
                "the demo restores what it encrypts, and has no identity to do so",
            )
            .hint("name it with --identity-file; `anywhen keys generate -o FILE` makes one"));
        }
    }
    if !is_chosen && !settings.file_repositories().is_empty() {
        tracing::info!(
            "the demo has a repository of its own, and leaves those of the configuration file \
             alone: {}. hint: --repository NAME tells the story there",
            settings.file_repositories().join(", ")
        );
    }
    let name = setup::demo::cluster();
    let repositories = cluster.repositories.iter();
    let options = setup::demo::DemoOptions {
        pg_bin: args.pg_bin,
        keep: args.keep,
        settings: cluster.tables_for(&name)?,
        stays_in: repositories
            .filter(|_| is_chosen)
            .map(|one| StaysIn {
                url: one.url.clone(),
                is_encrypted: !one.recipients.is_empty(),
            })
            .collect(),
    };
    let bold = std::io::stdout().is_terminal();
    setup::demo::run(options, output::line, bold, stop).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_restored_server_is_told_where_its_identity_was_handed_over() {
        // also where the repository is a folder: it would ask for WAL that it cannot open
        assert!(is_needed("CREDENTIALS_DIRECTORY", false, true));
        assert!(!is_needed("CREDENTIALS_DIRECTORY", false, false));
        assert!(!is_needed("AWS_SECRET_ACCESS_KEY", false, true));
        assert!(!is_needed("PGPASSWORD", true, true));
        for name in [
            "AWS_PROFILE",
            "https_proxy",
            "HOME",
            "CREDENTIALS_DIRECTORY",
        ] {
            assert!(is_needed(name, true, false), "{name}");
        }
    }
}
