//! From what is asked for to a plan: what is restored, over what, and to which places.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::time::Instant;

use super::RestoreOptions;
use super::choose::{Chooser, Chosen};
use super::execute::{fetch_manifest, top_of};
use super::over::OverCluster;
use super::place::{
    Found, Owner, TablespacePlan, check_apart, check_folder, check_made_later, check_target,
    plan_tablespaces, plan_wal_place,
};
use super::plan::RestorePlan;
use super::target::{Target, TargetAction};
use crate::clock::Clock;
use crate::error::{Error, Kind, Result, io};
use crate::repository::Repository;
use crate::repository::catalog::Catalog;
use crate::repository::layout::ObjectName;
use crate::repository::records::{BackupRecord, DamagedPages};

/// Decides what a restore will do. Nothing is written; what cannot be reached is refused with the
/// nearest that can.
pub async fn plan(
    repository: &Repository,
    options: &RestoreOptions,
    clock: &dyn Clock,
) -> Result<RestorePlan> {
    let began = Instant::now();
    check_options(options)?;
    let target_dir = std::path::absolute(&options.target_dir)
        .map_err(|error| io("find", &options.target_dir, &error))?;
    let found = check_target(&target_dir, options.over, repository.system_id())?;
    let owner = Owner::of_restore(options.owner.as_deref(), &target_dir, found)?;
    if repository.cluster_record().await?.is_none() {
        // wal-fetch would take the repository for one that went away
        return Err(Error::damaged(format!(
            "what a restored server looks for first is missing: {}",
            repository.locate(&ObjectName::Cluster)
        ))
        .hint(
            "restore this object from a copy of the repository; `anywhen backup` writes it anew",
        ));
    }
    let catalog = repository.catalog().await?;
    let chooser = match Chooser::new(repository, &catalog, options, clock) {
        Ok(chooser) => chooser,
        Err(error) => return Err(why_not(repository, &catalog, options, error).await),
    };
    let chosen = match chooser.choose().await {
        Ok(chosen) => chosen,
        Err(error) => return Err(why_not(repository, &catalog, options, error).await),
    };
    let held = repository.holding(&chosen.backup.id).await?;
    let Some((holder, backup)) = held else {
        return Err(Error::damaged(format!(
            "backup {} is gone",
            chosen.backup.id
        )));
    };
    let places = Places::plan(options, &target_dir, found, &backup, &chosen)?;
    let mut warnings = chooser.warnings(&chosen);
    let mut over_cluster = None;
    if found.has_links_of_a_cluster() {
        let top = top_of(&holder, &backup).await?;
        let wal = places.wal_place.as_deref();
        let over = OverCluster::of(&target_dir, found, options, &top, &places.tablespaces, wal)?;
        warnings.extend(over.warnings());
        over_cluster = Some(over);
    } else if options.dry_run {
        // whoever plans wants to know that it can be carried out
        fetch_manifest(&holder, &backup).await?;
    }
    if backup.damaged_page_count > 0 {
        warnings.push(format!(
            "backup {} has pages whose checksum was wrong on the server: {}, {}; what lies in them is \
             damaged, unless WAL has it. --backup with an earlier one may have it whole",
            backup.id,
            backup.damaged_page_count,
            DamagedPages::shown(&backup.damaged_pages)
        ));
    }
    let options = with_what_is_heard(repository, &catalog, options, &mut warnings);
    let timeline = chooser.recovery_timeline(&chosen)?;
    let behaviour = match options.target {
        Target::Latest => TargetAction::Promote,
        _ => TargetAction::Pause,
    };
    Ok(RestorePlan {
        target_dir,
        found,
        over_cluster,
        wal_place: places.wal_place,
        system_id: repository.system_id(),
        timeline,
        stop: chosen.stop(),
        last: chosen.last,
        last_in: chosen.point.as_ref().and_then(|point| point.last_in),
        first_out: chosen.point.as_ref().and_then(|point| point.first_out),
        behind: chosen.resolved.behind,
        segment_size: chooser.size,
        segments: chosen.segments(chooser.size),
        unread_segments: chosen.unread_segments(chooser.size),
        in_place_tablespaces: in_place_tablespaces(&chosen, &places.tablespaces),
        tablespaces: places.tablespaces,
        made_later: places.made_later,
        owner,
        action: options.action.unwrap_or(behaviour),
        options,
        parameters: chosen.resolved.findings.parameters,
        warnings,
        backup,
        decided_at: clock.now(),
        took: began.elapsed(),
    })
}

/// Where everything goes.
struct Places {
    tablespaces: Vec<TablespacePlan>,
    made_later: Vec<(u32, PathBuf)>,
    wal_place: Option<PathBuf>,
}

impl Places {
    fn plan(
        options: &RestoreOptions,
        target: &Path,
        found: Found,
        backup: &BackupRecord,
        chosen: &Chosen,
    ) -> Result<Self> {
        let tablespaces = plan_tablespaces(
            &backup.tablespaces,
            &options.tablespaces,
            target,
            found,
            backup.major,
        )?;
        let made_later = made_later(chosen, &tablespaces)?;
        let wal_place = plan_wal_place(target, found, options.waldir.as_deref())?;
        check_folders(options, target, found, &tablespaces, wal_place.as_deref())?;
        Ok(Self {
            tablespaces,
            made_later,
            wal_place,
        })
    }
}

/// Refuses folders that share their places, or are not free.
fn check_folders(
    options: &RestoreOptions,
    target: &Path,
    found: Found,
    tablespaces: &[TablespacePlan],
    wal_place: Option<&Path>,
) -> Result<()> {
    let places = || {
        tablespaces
            .iter()
            .filter_map(|it| it.to.as_deref())
            .chain([target])
    };
    if let Some(folder) = wal_place {
        if found.is_filled() && target.join("pg_wal").is_symlink() {
            check_apart("--waldir", folder, places())?;
        } else {
            check_folder("--waldir", folder, places())?;
        }
    }
    match &options.outside {
        Some(folder) => check_folder("--outside", folder, places().chain(wal_place)),
        None => Ok(()),
    }
}

/// Tells what could not be read or asked; a restored server does without a place that cannot be asked.
fn with_what_is_heard(
    repository: &Repository,
    catalog: &Catalog,
    options: &RestoreOptions,
    warnings: &mut Vec<String>,
) -> RestoreOptions {
    let mut options = options.clone();
    for left_out in &catalog.left_out {
        warnings.push(format!(
            "backup {} cannot be read, and was not considered: {}",
            left_out.id, left_out.reason
        ));
    }
    for (name, reason) in repository.unheard() {
        warnings.push(format!(
            "repository {name} cannot be asked, and the restored server does without it: {reason}"
        ));
        options.restore_command.repositories = repository.heard();
    }
    options
}

/// What could not be found may be in a backup that cannot be read, or where nobody could look.
async fn why_not(
    repository: &Repository,
    catalog: &Catalog,
    options: &RestoreOptions,
    error: Error,
) -> Error {
    let named = options.backup.as_ref();
    let mut in_question = catalog.left_out.iter();
    let in_question = in_question.find(|one| named.is_none_or(|named| *named == one.id));
    let Some(first) = in_question.filter(|_| error.kind() == Kind::NotFound) else {
        return unheard(repository, error);
    };
    if named.is_some() || catalog.backups.is_empty() {
        // there is nothing else to restore
        let error = match (repository.holding(&first.id).await, &first.hint) {
            (Err(cause), _) => cause.into(),
            (Ok(_), Some(hint)) => Error::damaged(&first.reason).hint(hint),
            (Ok(_), None) => Error::damaged(&first.reason),
        };
        return match repository.unheard().first() {
            Some((name, reason)) => error.note(
                &format!("repository {name} cannot be asked: {reason}"),
                None,
            ),
            None => error,
        };
    }
    let error = error.note(&first.told(catalog.left_out.len()), first.hint.as_deref());
    unheard(repository, error)
}

/// What could not be found may be where nobody could look.
fn unheard(repository: &Repository, error: Error) -> Error {
    let unheard = repository.unheard();
    let Some((name, reason)) = unheard.first() else {
        return error;
    };
    match error.kind() {
        Kind::NotFound => Error::new(
            Kind::Unreachable,
            format!(
                "{}; but repository {name} cannot be asked: {reason}",
                error.message()
            ),
        )
        .hint("name the repositories that can be reached with --repository to leave it out"),
        _ => error,
    }
}

fn check_options(options: &RestoreOptions) -> Result<()> {
    let has_record = !matches!(options.target, Target::Immediate | Target::Latest);
    if options.exclusive && !has_record {
        return Err(Error::usage(format!(
            "--exclusive leaves out what was named, and {} names nothing",
            options.target.kind()
        )));
    }
    if options.standby && options.replay && options.target == Target::Latest {
        return Err(
            Error::usage("a standby that follows has no end to replay to")
                .hint("leave --replay out, or name a target"),
        );
    }
    Ok(())
}

/// Tablespaces that replay makes: their places must be free.
fn made_later(chosen: &Chosen, tablespaces: &[TablespacePlan]) -> Result<Vec<(u32, PathBuf)>> {
    let mut places: Vec<(u32, PathBuf)> = Vec::new();
    for (_, oid, path) in &chosen.findings().tablespaces {
        let place = PathBuf::from(OsStr::from_bytes(path));
        // an empty path is a tablespace inside of the data directory
        let is_known = places.iter().any(|(made, at)| made == oid && *at == place);
        if !place.is_absolute() || is_known {
            continue;
        }
        let in_backup = tablespaces.iter().find(|tablespace| tablespace.oid == *oid);
        match in_backup.and_then(|tablespace| tablespace.to.as_ref()) {
            // made while the backup ran, and restored to where replay links it again
            Some(to) if *to == place => {}
            Some(to) => {
                return Err(Error::usage(format!(
                    "tablespace {oid} was made while the backup ran, so that replay links it to {} \
                     again: it cannot go to {}",
                    place.display(),
                    to.display()
                ))
                .hint("choose a later backup with --backup, or restore on another machine"));
            }
            None => {
                check_made_later(*oid, &place)?;
                places.push((*oid, place));
            }
        }
    }
    Ok(places)
}

/// Whether the server allowed tablespaces that are folders in `pg_tblspc`, and has some.
fn in_place_tablespaces(chosen: &Chosen, tablespaces: &[TablespacePlan]) -> bool {
    let mut made = chosen.findings().tablespaces.iter();
    made.any(|(_, _, path)| path.is_empty()) || tablespaces.iter().any(|it| it.to.is_none())
}
