//! Carries a plan out: directories, files, settings, and `global/pg_control` last, so that nothing
//! that was left half done looks like a cluster.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::io::{Read as _, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use basebackup::{Algorithm, ControlFile, FileChecker, Ledger, RelativePath};
use futures_util::future::try_join_all;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::place::{CONTROL_FILE, Footprint, Root, Roots, Stays, how_it_was_left};
use super::plan::{Phase, RestorePlan, RestoreReport, Work};
use super::raised::{Configured, raised, raised_note};
use super::replay;
use super::settings::{self, StopAt};
use super::target::TargetAction;
use super::trial::try_restore_command;
use super::unit::{FileJob, Manifest, Read, StoredStretch, UnitWriter, decode_all, reads_of};
use crate::durable::{self, FileSystem};
use crate::error::{Error, Kind, Result, io};
use crate::repository::layout::ObjectName;
use crate::repository::records::BackupRecord;
use crate::repository::{Repository, RepositoryError, blocking};

/// How many units of files are under way at once.
const UNITS_AT_ONCE: usize = 4;
/// How many file lists are looked at at once.
const LISTS_AT_ONCE: usize = 8;
/// After so many bytes more they are put on disk, while others are written.
const SETTLED_BYTES: u64 = 128 << 20;
const BACKUP_MANIFEST: &str = "backup_manifest";

/// Carries out a plan. `progress` hears how many bytes of how many are written, and then replayed.
///
/// A restore that fails, or is stopped, leaves the places that it wrote to as it found them.
pub async fn execute(
    repository: &Repository,
    plan: &RestorePlan,
    progress: &(dyn Fn(Work, u64, u64) + Sync),
    mut stop: watch::Receiver<bool>,
) -> Result<RestoreReport> {
    let mut report = plan.report();
    report.dry_run = false;
    let stopped = async move {
        if stop.wait_for(|asked| *asked).await.is_err() {
            // nobody is left who could ask
            std::future::pending::<()>().await;
        }
    };
    tokio::select! {
        done = carry_out(repository, plan, progress, &mut report) => {
            done.map_err(|error| with_other_repositories(error, repository))?;
        }
        () = stopped => {
            let is_whole = report.phases.iter().any(|phase| phase.name == "sync");
            return Err(if is_whole {
                let dir = plan.target_dir.display();
                Error::failure(format!("stopped while the server replayed: {dir} is whole, and stays"))
                    .hint(format!("{}, or remove it", replay::start_command(plan)))
            } else {
                Error::failure("stopped before the restore was complete")
                    .hint(how_it_was_left(plan.found, &plan.target_dir))
            });
        }
    }
    Ok(report)
}

async fn carry_out(
    repository: &Repository,
    plan: &RestorePlan,
    progress: &(dyn Fn(Work, u64, u64) + Sync),
    report: &mut RestoreReport,
) -> Result<()> {
    let began = Instant::now();
    let postgres = if plan.options.replay {
        let bin = plan.options.pg_bin.as_deref();
        Some(replay::find_postgres(bin, plan.backup.major)?)
    } else {
        None
    };
    let id = &plan.backup.id;
    let held = repository.holding(id).await?;
    let Some((repository, record)) = held else {
        return Err(Error::damaged(format!("backup {id} is gone")).hint("use another backup"));
    };
    let manifest = fetch_manifest(&repository, &record).await?;
    check_links(plan, &manifest)?;
    let first = read_first(&repository, &manifest).await?;
    let outside = read_outside(&repository, plan, &manifest).await?;
    let mut footprint = take_directory(&repository, plan, &manifest).await?;
    if plan.found.is_filled() {
        let stamp = plan.decided_at.strftime("%Y%m%dT%H%M%S%3fZ").to_string();
        let aside = footprint.set_aside(&stamp)?;
        report.notes.extend(aside.as_ref().map(ToString::to_string));
        report.set_aside = aside.map(|aside| aside.path);
        clear(&repository, &manifest, &footprint).await?;
    }
    make_directories(&manifest, plan, &mut footprint)?;
    let disks = Disks::open(&footprint)?;

    let settling = Settling::new(&disks);
    let written = write_files(
        &repository,
        plan,
        (&manifest, first),
        &footprint,
        settling,
        progress,
    )
    .await?;
    report.phases.push(Phase::new("files", began.elapsed()));
    report.kept_bytes = written.kept_bytes;

    let began = Instant::now();
    let (control, raised) = write_settings(plan, &manifest, &footprint, &written.control)?;
    make_places(plan, &mut footprint)?;
    report.notes.extend(notes(plan, &footprint)?);
    report.notes.extend(raised_note(&raised));
    footprint.give_contents()?;
    Arc::clone(&disks).sync().await?;
    if footprint.outside().is_some() {
        write_outside(outside, &footprint)?;
        disks.sync().await?;
    }
    write_control(&repository, &manifest, &footprint, written).await?;
    footprint.hand_over()?;
    report.phases.push(Phase::new("sync", began.elapsed()));
    footprint.keep();
    drop(footprint);

    if let Some(postgres) = postgres {
        let began = Instant::now();
        let replayed = replay::replay(plan, &control, &postgres, progress).await?;
        report.reached = Some(replayed.reached);
        report.notes.extend(replayed.notes);
        report.phases.push(Phase::new("replay", began.elapsed()));
    } else {
        report.notes.push(how_to_go_on(plan));
    }
    Ok(())
}

/// Refuses a backup with links that lead nowhere.
fn check_links(plan: &RestorePlan, manifest: &Manifest) -> Result<()> {
    for oid in &manifest.links {
        let is_listed = plan.tablespaces.iter().any(|it| it.oid == *oid);
        // the server lists its tablespaces before it sends their links: replay makes those in between
        let is_made_later = plan.made_later.iter().any(|(made, _)| made == oid);
        if !is_listed && !is_made_later {
            return Err(Error::damaged(format!(
                "the backup has a link for a tablespace that it does not list, and that no WAL makes: \
                 {oid}"
            ))
            .hint("use another backup"));
        }
    }
    Ok(())
}

/// Takes the directory, and every other place, once it is known that all can go on from there.
async fn take_directory(
    repository: &Repository,
    plan: &RestorePlan,
    manifest: &Manifest,
) -> Result<Footprint> {
    try_restore_command(plan).await?;
    let (system_id, found) = (plan.system_id, plan.found);
    if found.is_filled() {
        // what is there is of more use than half of another
        check_packs(repository, manifest).await?;
    }
    let over = plan.over_cluster.as_ref();
    let follows = over.map(|over| over.follows.as_slice());
    let mut footprint = Footprint::begin(&plan.target_dir, plan.owner, system_id, found, follows)?;
    for planned in &plan.tablespaces {
        if let Some(to) = &planned.to {
            footprint.make_tablespace(planned.oid, to)?;
        }
    }
    if let Some(place) = &plan.wal_place {
        footprint.take_wal_place(place)?;
    }
    if let Some(folder) = &plan.options.outside {
        footprint.make_outside(folder)?;
    }
    for path in places_made_by_replay(plan) {
        footprint.try_place(path)?;
    }
    footprint.disarm()?;
    Ok(footprint)
}

/// The manifest of a backup, once it and its file lists were found to be that.
pub(super) async fn fetch_manifest(
    repository: &Repository,
    record: &BackupRecord,
) -> Result<Manifest> {
    let name = ObjectName::Manifest(record.id.clone());
    let place = repository.locate(&name);
    let text = manifest_text(repository, &name, &record.manifest_digest).await?;
    // what is damaged is found before anything is written
    let manifest = blocking(move || {
        let manifest = Manifest::read(text, place)?;
        manifest.check(manifest.text())?;
        Ok::<_, Error>(manifest)
    })
    .await?;
    for lists in manifest.lists.chunks(LISTS_AT_ONCE) {
        let checks = lists
            .iter()
            .map(|(list, digest)| check_list(repository, &manifest, list, digest));
        try_join_all(checks).await?;
    }
    Ok(manifest)
}

async fn check_list(
    repository: &Repository,
    manifest: &Manifest,
    list: &ObjectName,
    digest: &str,
) -> Result<()> {
    manifest.check(&manifest_text(repository, list, digest).await?)
}

async fn manifest_text(
    repository: &Repository,
    name: &ObjectName,
    digest: &str,
) -> Result<Vec<u8>> {
    let text = repository.manifest_text(name, digest).await;
    text.map_err(gone)
}

/// Another repository may have what this one lacks.
fn with_other_repositories(error: Error, repository: &Repository) -> Error {
    let names = repository.heard();
    if names.len() < 2 || !matches!(error.kind(), Kind::Damaged | Kind::Unreachable) {
        return error;
    }
    let names = names.join(", ");
    error.hint(format!(
        "the cluster has several repositories ({names}): choose another one with --repository NAME"
    ))
}

/// An object that a finished backup refers to and that is not there is damage, not a wrong name.
fn gone(error: RepositoryError) -> Error {
    if error.is_not_found() {
        return Error::damaged(format!("an object of the backup is gone: {error}"))
            .hint("restore this object from a copy of the repository, or use another backup");
    }
    error.into()
}

/// The paths of all files of a backup.
async fn all_paths(repository: &Repository, manifest: &Manifest) -> Result<HashSet<Vec<u8>>> {
    let mut files: HashSet<Vec<u8>> = manifest.paths(manifest.text())?;
    for (list, digest) in &manifest.lists {
        let text = manifest_text(repository, list, digest).await?;
        files.extend(manifest.paths(&text)?);
    }
    Ok(files)
}

/// The names that a backup has at the top of the data directory.
pub(super) async fn top_of(
    repository: &Repository,
    record: &BackupRecord,
) -> Result<BTreeSet<Vec<u8>>> {
    let manifest = fetch_manifest(repository, record).await?;
    let files = all_paths(repository, &manifest).await?;
    let directories = manifest.directories.iter();
    let directories = directories.map(|(path, _)| path.as_bytes());
    let paths = directories.chain(files.iter().map(Vec::as_slice));
    let first = |path: &[u8]| path.split(|byte| *byte == b'/').next().map(<[u8]>::to_vec);
    Ok(paths.filter_map(first).collect())
}

/// Looks whether every pack is there, before anything is replaced by what lies in them.
async fn check_packs(repository: &Repository, manifest: &Manifest) -> Result<()> {
    let packs: Vec<&ObjectName> = manifest.packs().collect();
    for packs in packs.chunks(LISTS_AT_ONCE) {
        let looks = packs.iter().map(|pack| repository.frames(pack));
        try_join_all(looks).await.map_err(gone)?;
    }
    Ok(())
}

/// Clears away what the backup does not have.
async fn clear(repository: &Repository, manifest: &Manifest, footprint: &Footprint) -> Result<()> {
    let files = all_paths(repository, manifest).await?;
    let directories = manifest.directories.iter();
    let directories: HashSet<&[u8]> = directories.map(|(path, _)| path.as_bytes()).collect();
    let stays = |path: &Path| {
        let path = path.as_os_str().as_bytes();
        if files.contains(path) {
            Some(Stays::File)
        } else {
            directories.contains(path).then_some(Stays::Directory)
        }
    };
    let removed = footprint.sweep(&stays)?;
    let target = footprint.target().path().display();
    tracing::debug!("removed what the backup does not have from {target}: {removed}");
    Ok(())
}

fn make_directories(
    manifest: &Manifest,
    plan: &RestorePlan,
    footprint: &mut Footprint,
) -> Result<()> {
    footprint.make_dir(Path::new("pg_tblspc"))?;
    // also of one that was dropped before its link was sent: replay drops it again
    for planned in &plan.tablespaces {
        let link = PathBuf::from(format!("pg_tblspc/{}", planned.oid));
        match &planned.to {
            Some(to) => footprint.make_link(&link, to)?,
            None => footprint.make_dir(&link)?,
        }
    }
    let of_global = |(path, _): &&(RelativePath, u32)| path.as_bytes() == b"global";
    if let Some((_, mode)) = manifest.directories.iter().find(of_global) {
        footprint.set_mode(*mode);
    }
    let pg_wal = Path::new("pg_wal");
    if let Some(place) = &plan.wal_place
        && !footprint.target().is_link(pg_wal)
    {
        footprint.make_link(pg_wal, place)?;
    }
    for (path, mode) in &manifest.directories {
        if path.as_path() != pg_wal || plan.wal_place.is_none() {
            footprint.make_dir_with_mode(path.as_path(), *mode)?;
        }
    }
    // replay needs them, also where the server had pg_wal elsewhere
    footprint.make_dir(pg_wal)?;
    footprint.make_dir(Path::new("pg_wal/archive_status"))
}

/// Makes the places of tablespaces that replay makes. They are the last: where a restore is broken off, they would
/// be in the way of the next.
fn make_places(plan: &RestorePlan, footprint: &mut Footprint) -> Result<()> {
    let mut places = places_made_by_replay(plan).into_iter();
    places.try_for_each(|path| footprint.make_place(path))
}

/// The places of tablespaces that replay makes, but for those that the restore has made then.
fn places_made_by_replay(plan: &RestorePlan) -> BTreeSet<&Path> {
    // replay removes what is at a place before it makes another tablespace there
    let restored = plan.tablespaces.iter().filter_map(|it| it.to.as_deref());
    let restored: BTreeSet<&Path> = restored.collect();
    let made = plan.made_later.iter().map(|(_, path)| path.as_path());
    made.filter(|path| !restored.contains(path)).collect()
}

/// What writing the files came to.
struct WrittenFiles {
    ledger: Ledger,
    server_manifest: basebackup::Manifest,
    listed: Arc<BTreeMap<RelativePath, Algorithm>>,
    /// `pg_control`, not written yet.
    control: Vec<u8>,
    /// How many bytes were there already.
    kept_bytes: u64,
}

/// What is read before anything is written: it is small, and nothing goes without it.
struct First {
    server_manifest: basebackup::Manifest,
    /// `pg_control`.
    control: Vec<u8>,
}

async fn read_first(repository: &Repository, manifest: &Manifest) -> Result<First> {
    let text = file_bytes(repository, manifest, BACKUP_MANIFEST).await?;
    let limit = u64::try_from(text.len()).unwrap_or(u64::MAX);
    let server_manifest = basebackup::Manifest::parse(&text, limit).map_err(|error| {
        Error::damaged(format!("damaged backup_manifest: {error}")).hint("use another backup")
    })?;
    let control = file_bytes(repository, manifest, CONTROL_FILE).await?;
    parsed(&control)?;
    Ok(First {
        server_manifest,
        control,
    })
}

fn parsed(control: &[u8]) -> Result<ControlFile> {
    ControlFile::parse(control).map_err(|error| {
        Error::damaged(format!("damaged pg_control in the backup: {error}"))
            .hint("use another backup")
    })
}

async fn write_files(
    repository: &Repository,
    plan: &RestorePlan,
    (manifest, first): (&Manifest, First),
    footprint: &Footprint,
    mut settling: Settling,
    progress: &(dyn Fn(Work, u64, u64) + Sync),
) -> Result<WrittenFiles> {
    let First {
        server_manifest,
        control,
    } = first;
    let files = server_manifest.files.iter();
    let listed: BTreeMap<_, _> = files
        .map(|file| (file.path.clone(), file.sum.checksum.algorithm()))
        .collect();
    let listed = Arc::new(listed);

    let mut ledger = Ledger::new();
    let (done, total) = (AtomicU64::new(0), plan.backup.bytes);
    let kept = AtomicU64::new(0);
    let changes = footprint.changes();
    let is_wanted = |job: &FileJob| job.path.as_bytes() != CONTROL_FILE.as_bytes();
    let mut write = async |text: &[u8], ledger: &mut Ledger| {
        let units = manifest.units(text, is_wanted).map(|unit| {
            let listed = Arc::clone(&listed);
            let (roots, given_up) = (footprint.roots().clone(), footprint.given_up());
            let writer = UnitWriter::new(roots, listed, given_up, changes);
            let (done, kept) = (&done, &kept);
            async move {
                let wrote = |bytes: u64, kept_bytes: u64| {
                    kept.fetch_add(kept_bytes, Ordering::Relaxed);
                    let all = done
                        .fetch_add(bytes, Ordering::Relaxed)
                        .saturating_add(bytes);
                    progress(Work::Files, all, total);
                };
                write_unit(repository, manifest, unit?, writer, &wrote).await
            }
        });
        let mut units = stream::iter(units).buffer_unordered(UNITS_AT_ONCE);
        while let Some(written) = units.try_next().await? {
            for (path, sum) in written {
                ledger.record(path, sum);
            }
            settling.wrote(done.load(Ordering::Relaxed)).await?;
        }
        Ok::<_, Error>(())
    };
    write(manifest.text(), &mut ledger).await?;
    for (list, digest) in &manifest.lists {
        let text = manifest_text(repository, list, digest).await?;
        write(&text, &mut ledger).await?;
    }
    settling.end().await?;
    Ok(WrittenFiles {
        ledger,
        server_manifest,
        listed,
        control,
        kept_bytes: kept.load(Ordering::Relaxed),
    })
}

async fn write_unit(
    repository: &Repository,
    manifest: &Manifest,
    unit: Vec<FileJob>,
    mut writer: UnitWriter,
    wrote: &(dyn Fn(u64, u64) + Sync),
) -> Result<Vec<(RelativePath, basebackup::FileSum)>> {
    let unit = if writer.changes() {
        let roots = writer.roots().clone();
        blocking(move || compare(unit, &roots)).await?
    } else {
        unit
    };
    for read in reads_of(manifest, unit) {
        let stored = fetch_stretch(repository, &read).await?;
        let before = (writer.bytes, writer.kept_bytes);
        writer = blocking(move || writer.apply(read, stored).map(|()| writer)).await?;
        wrote(
            writer.bytes.saturating_sub(before.0),
            writer.kept_bytes.saturating_sub(before.1),
        );
    }
    Ok(std::mem::take(&mut writer.done))
}

/// Looks what of these files is there already.
fn compare(mut unit: Vec<FileJob>, roots: &Roots) -> Result<Vec<FileJob>> {
    unit.iter_mut().try_for_each(|job| job.compare(roots))?;
    Ok(unit)
}

async fn fetch_stretch(repository: &Repository, read: &Read) -> Result<Option<StoredStretch>> {
    let Some((name, offset, length)) = &read.range else {
        return Ok(None);
    };
    let frames = repository.frames(name).await.map_err(gone)?;
    let bytes = repository.fetch_range(name, *offset, *length).await;
    Ok(Some(StoredStretch {
        bytes: bytes.map_err(gone)?,
        offset: *offset,
        frames,
    }))
}

/// The bytes of a file that is small enough to be held.
async fn file_bytes(repository: &Repository, manifest: &Manifest, path: &str) -> Result<Vec<u8>> {
    let Some(job) = manifest.file(path)? else {
        return Err(Error::damaged(format!("the backup has no {path}")).hint("use another backup"));
    };
    bytes_of_job(repository, manifest, job).await
}

async fn bytes_of_job(
    repository: &Repository,
    manifest: &Manifest,
    job: FileJob,
) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    for read in reads_of(manifest, vec![job]) {
        let stored = fetch_stretch(repository, &read).await?;
        bytes = blocking(move || decode_all(read, stored, &mut bytes).map(|()| bytes)).await?;
    }
    Ok(bytes)
}

/// What the files hold that lay outside of the data directory, where they are asked for.
async fn read_outside(
    repository: &Repository,
    plan: &RestorePlan,
    manifest: &Manifest,
) -> Result<Vec<(RelativePath, Vec<u8>)>> {
    let mut files = Vec::new();
    if plan.options.outside.is_some() {
        for job in &manifest.outside {
            let bytes = bytes_of_job(repository, manifest, job.clone()).await?;
            files.push((job.path.clone(), bytes));
        }
    }
    Ok(files)
}

/// Writes files that lay outside of the data directory to where that was asked for, below their full paths.
fn write_outside(files: Vec<(RelativePath, Vec<u8>)>, footprint: &Footprint) -> Result<()> {
    let Some(root) = footprint.outside() else {
        return Ok(());
    };
    for (path, bytes) in files {
        let path = path.as_path();
        root.make_parents(path)?;
        write_all(root, path, &bytes, footprint.file_mode())?;
    }
    root.give_contents()
}

/// Writes `postgresql.auto.conf` and the signal file. Gives the settings too that were raised for a recovery.
fn write_settings(
    plan: &RestorePlan,
    manifest: &Manifest,
    footprint: &Footprint,
    control: &[u8],
) -> Result<(ControlFile, Vec<(&'static str, i32)>)> {
    let control = parsed(control)?;
    let target = footprint.target();
    let auto = Path::new("postgresql.auto.conf");
    let before = read_all(target, auto)?.unwrap_or_default();
    let mut settings = plan.settings();
    let conf = Path::new("postgresql.conf");
    // where the operator's own link leads is theirs
    let conf = if target.is_link(conf) {
        None
    } else {
        read_all(target, conf)?
    };
    let configured = Configured {
        auto: &before,
        conf: conf.as_deref(),
        major: plan.backup.major,
    };
    settings.raised = raised(
        replay::parameters_of(&control),
        plan.parameters,
        &configured,
    );
    let raised = settings.raised.clone();
    // 13 and 14 send them, and do not list them
    settings.in_place_tablespaces |= manifest.has_in_place_tablespace();
    let mode = footprint.file_mode();
    write_all(target, auto, &settings.auto_conf(&before), mode)?;
    let (signal, other) = if plan.options.standby {
        ("standby.signal", "recovery.signal")
    } else {
        ("recovery.signal", "standby.signal")
    };
    target.remove(Path::new(other))?;
    write_all(target, Path::new(signal), b"", mode)?;
    Ok((control, raised))
}

/// What a file holds; `None` where there is none.
fn read_all(root: &Root, path: &Path) -> Result<Option<Vec<u8>>> {
    let Some(mut file) = root.open(path)? else {
        return Ok(None);
    };
    let mut bytes = Vec::new();
    let read = file.read_to_end(&mut bytes);
    read.map_err(|error| io("read", &root.path().join(path), &error))?;
    Ok(Some(bytes))
}

/// Writes a file anew. What is half written goes with the rest of an unfinished restore.
fn write_all(root: &Root, path: &Path, bytes: &[u8], mode: u32) -> Result<()> {
    root.remove(path)?;
    let written = root.create_with_mode(path, mode)?.write_all(bytes);
    written.map_err(|error| io("write", &root.path().join(path), &error))
}

/// The file systems that are written to, a directory of each. What could not be written to one is told once,
/// to whoever syncs next.
struct Disks(Vec<(PathBuf, FileSystem)>);

impl Disks {
    fn open(footprint: &Footprint) -> Result<Arc<Self>> {
        let places = footprint.file_systems()?.into_iter();
        let opened = places.map(|place| match FileSystem::of(&place) {
            Ok(opened) => Ok((place, opened)),
            Err(error) => Err(io("open", &place, &error)),
        });
        Ok(Arc::new(Self(opened.collect::<Result<_>>()?)))
    }

    /// Puts on disk what was written so far.
    async fn sync(self: Arc<Self>) -> Result<()> {
        blocking(move || {
            for (place, disk) in &self.0 {
                disk.sync().map_err(|error| io("sync", place, &error))?;
            }
            Ok(())
        })
        .await
    }
}

/// Puts on disk what is written while more is: at the end less is waited for.
struct Settling {
    disks: Arc<Disks>,
    /// After so many bytes.
    next_at: u64,
    under_way: Option<JoinHandle<Result<()>>>,
}

impl Settling {
    fn new(disks: &Arc<Disks>) -> Self {
        Self {
            disks: Arc::clone(disks),
            next_at: SETTLED_BYTES,
            under_way: None,
        }
    }

    /// So many bytes are written.
    async fn wrote(&mut self, bytes: u64) -> Result<()> {
        let is_free = self.under_way.as_ref().is_none_or(JoinHandle::is_finished);
        if bytes < self.next_at || !is_free {
            return Ok(());
        }
        self.end().await?;
        self.next_at = bytes.saturating_add(SETTLED_BYTES);
        self.under_way = Some(tokio::spawn(Arc::clone(&self.disks).sync()));
        Ok(())
    }

    /// Waits for what is under way: an error that it was told is told to nobody else.
    async fn end(&mut self) -> Result<()> {
        match self.under_way.take() {
            None => Ok(()),
            Some(settled) => settled
                .await
                .map_err(|_cancelled| Error::failure("stopped"))?,
        }
    }
}

/// Compares all that was written, and `pg_control`, with the server's list, and only then writes that.
async fn write_control(
    repository: &Repository,
    manifest: &Manifest,
    footprint: &Footprint,
    written: WrittenFiles,
) -> Result<()> {
    let WrittenFiles {
        mut ledger,
        server_manifest,
        listed,
        control,
        kept_bytes: _,
    } = written;
    let Some(mut job) = manifest.file(CONTROL_FILE)? else {
        return Ok(());
    };
    let algorithm = listed.get(&job.path).copied();
    let mut checker = FileChecker::new(algorithm.unwrap_or(Algorithm::None));
    checker.update(&control);
    ledger.record(job.path.clone(), checker.finish());
    let compared = blocking(move || ledger.compare(&server_manifest)).await;
    if let Err(mismatches) = compared {
        let shown: Vec<String> = mismatches.iter().take(5).map(ToString::to_string).collect();
        return Err(Error::damaged(format!(
            "what was restored is not what the server backed up: {} differences, {}",
            mismatches.len(),
            shown.join("; ")
        ))
        .hint("use another backup"));
    }
    let (roots, given_up) = (footprint.roots().clone(), footprint.given_up());
    let writer = UnitWriter::new(roots, listed, given_up, false);
    // it gets its name whole, or not at all
    let unnamed = "global/pg_control.restored";
    job.path = RelativePath::parse(unnamed.as_bytes())
        .map_err(|error| Error::failure(error.to_string()))?;
    // the extents that it was read from a moment ago
    write_unit(repository, manifest, vec![job], writer, &|_, _| ()).await?;
    let target = footprint.target();
    target.give_one(Path::new(unnamed))?;
    let failed = |error| io("write", &target.path().join(CONTROL_FILE), &error);
    if let Some(file) = target.open(Path::new(unnamed))? {
        durable::sync_file(&file).map_err(failed)?;
    }
    let [from, to] = [unnamed, CONTROL_FILE].map(Path::new);
    durable::rename_at(target.dir(), from, target.dir(), to).map_err(failed)?;
    if let Some(directory) = target.open(Path::new("global"))? {
        durable::sync_file(&directory).map_err(failed)?;
    }
    Ok(())
}

/// What whoever starts the server should know.
fn notes(plan: &RestorePlan, footprint: &Footprint) -> Result<Vec<String>> {
    let mut notes: Vec<String> = Vec::new();
    let needed = plan.options.restore_command.environment_names();
    if !needed.is_empty() {
        notes.push(format!(
            "restore_command reaches the repository with what stands in {}: start the server with the \
             same in its environment",
            needed.join(", ")
        ));
    }
    let target = plan.target_dir.display();
    let (auto, conf) = ["postgresql.auto.conf", "postgresql.conf"]
        .map(Path::new)
        .into();
    let follows =
        |text: Option<Vec<u8>>| settings::sets(&text.unwrap_or_default(), "primary_conninfo");
    // the operator's own link stays, and where it leads is theirs
    if footprint.target().is_link(conf) {
        return Ok(notes);
    }
    let text = read_all(footprint.target(), conf)?;
    let is_alone = plan.options.standby
        && !follows(text.clone())
        && !follows(read_all(footprint.target(), auto)?);
    if is_alone {
        notes.push(format!(
            "{target} has no primary_conninfo: the standby follows what is stored, and streams from no \
             primary; restore with --primary-conninfo, or set it before starting"
        ));
    }
    match text {
        None => notes.push(format!(
            "{target} has no postgresql.conf: the source keeps it elsewhere (Debian: /etc/postgresql), so \
             start the server with one that has the source's settings{}",
            where_settings_are(plan)
        )),
        Some(text) => {
            if settings::sets(&text, "data_directory") {
                notes.push(format!(
                    "{target}/postgresql.conf sets data_directory, which names the source's: change it \
                     before starting"
                ));
            }
        }
    }
    Ok(notes)
}

/// Where to find the settings that the source keeps outside of its data directory.
fn where_settings_are(plan: &RestorePlan) -> String {
    match &plan.options.outside {
        _ if plan.backup.outside.is_empty() => String::new(),
        Some(folder) => format!("; what it had is in {}", folder.display()),
        None => format!(
            "; the backup has {}: `anywhen restore --delta --outside DIR` over {} writes them below DIR",
            plan.backup.outside.join(", "),
            plan.target_dir.display()
        ),
    }
}

fn how_to_go_on(plan: &RestorePlan) -> String {
    let start = format!("start it with: {}", replay::start_command(plan));
    let how = match (plan.stop, plan.action) {
        (StopAt::Never, _) => format!("{start}; it follows its primary"),
        (_, TargetAction::Pause) => format!(
            "{start}; it pauses at the target, where it can be read; SELECT pg_wal_replay_resume() opens \
             it for writing"
        ),
        (_, TargetAction::Promote) => format!("{start}; it opens for writing at the target"),
        (_, TargetAction::Shutdown) => format!(
            "{start}; it shuts down at the target; to open it there, {}",
            replay::open_after_shutdown(plan)
        ),
    };
    format!("{how}\n{}", replay::ANOTHER_PORT)
}
