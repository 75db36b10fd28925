//! Where the tablespaces of a backup go.

use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use super::found::is_absent_or_empty;
use super::{Found, check_tree};
use crate::error::{Error, Result, io};
use crate::repository::records::TablespaceRecord;
use crate::restore::target::TablespaceMapping;

/// What a file system keeps in the topmost of its directories.
pub(super) const LOST_AND_FOUND: &str = "lost+found";

/// Where a tablespace of the backup goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TablespacePlan {
    /// Its OID.
    pub oid: u32,
    /// Where the server kept it.
    pub from: String,
    /// Where its files go; `None` for one inside of the data directory.
    pub to: Option<PathBuf>,
    /// Whether what is there is the directory's own, and is kept where it is right.
    pub is_filled: bool,
}

/// Decides where every tablespace goes: to places that are absent or empty, or to where the directory that
/// was `found` has them.
pub(in crate::restore) fn plan_tablespaces(
    records: &[TablespaceRecord],
    mappings: &[TablespaceMapping],
    target: &Path,
    found: Found,
    major: u32,
) -> Result<Vec<TablespacePlan>> {
    if let Some(stray) = mappings
        .iter()
        .find(|mapping| !records.iter().any(|it| mapping.names(it.oid, &it.location)))
    {
        let known: Vec<String> = records
            .iter()
            .map(|it| format!("{}={}", it.oid, it.location))
            .collect();
        let known = if known.is_empty() {
            "none".to_owned()
        } else {
            known.join(", ")
        };
        return Err(
            Error::usage(format!("the backup has no such tablespace: {stray}"))
                .hint(format!("its tablespaces: {known}")),
        );
    }
    let mut plans: Vec<TablespacePlan> = Vec::new();
    for record in records {
        let mut naming = mappings
            .iter()
            .filter(|it| it.names(record.oid, &record.location));
        let mapping = naming.next();
        if let (Some(first), Some(other)) = (
            mapping,
            naming.find(|it| Some(&it.to) != mapping.map(|it| &it.to)),
        ) {
            return Err(Error::usage(format!(
                "tablespace {} is given two places: {first} and {other}",
                record.oid
            )));
        }
        let to = match mapping {
            Some(mapping) => Some(mapping.to.clone()),
            None => Some(PathBuf::from(&record.location)).filter(|path| path.is_absolute()),
        };
        let mut is_filled = false;
        if let Some(to) = &to {
            let is_own = found.is_filled() && is_own_tablespace(target, record.oid, to);
            is_filled = is_own && !is_absent_or_empty(to)?;
            if is_filled && found.has_links_of_a_cluster() {
                check_own_tablespace(record, to, mapping.is_some(), major)?;
            } else if !is_own {
                check_tablespace(record, to, mapping.is_some())?;
            }
            let taken = plans.iter().filter_map(|plan| plan.to.as_deref());
            if let Some(other) = taken.chain([target]).find(|other| are_nested(other, to)) {
                return Err(Error::usage(format!(
                    "tablespace {} would share its place: {} and {}",
                    record.oid,
                    to.display(),
                    other.display()
                )));
            }
        }
        plans.push(TablespacePlan {
            oid: record.oid,
            from: record.location.clone(),
            to,
            is_filled,
        });
    }
    Ok(plans)
}

/// Whether one of these lies in the other.
pub(super) fn are_nested(one: &Path, other: &Path) -> bool {
    one.starts_with(other) || other.starts_with(one)
}

/// Whether the directory has this place, as a cluster, or because the restore that was broken off has taken it.
fn is_own_tablespace(target: &Path, oid: u32, place: &Path) -> bool {
    let link = fs::read_link(target.join(format!("pg_tblspc/{oid}")));
    link.is_ok_and(|to| to == place)
}

/// Refuses the place of a tablespace of the cluster's own directory unless it is named, and nobody else's
/// files lie in it.
fn check_own_tablespace(
    record: &TablespaceRecord,
    to: &Path,
    is_mapped: bool,
    major: u32,
) -> Result<()> {
    let (oid, place) = (record.oid, to.display());
    if !is_mapped {
        return Err(Error::usage(format!(
            "the directory has tablespace {oid} at {place}: it is written over only where it is named"
        ))
        .hint(format!(
            "a copy of a data directory leads to the tablespaces of the original, which may be a live \
             server's. If this one is not shared: -T {oid}={place}; else -T {oid}=/another/directory"
        )));
    }
    let of_this_major = format!("PG_{major}_");
    let failed = |error: std::io::Error| io("read", to, &error);
    for entry in fs::read_dir(to).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name();
        let is_ours = name.as_bytes().starts_with(of_this_major.as_bytes());
        if !is_ours && name != LOST_AND_FOUND {
            return Err(Error::usage(format!(
                "tablespace {oid} shares its place with something else: {}",
                entry.path().display()
            ))
            .hint(format!(
                "another server may use that; move it away, or map the tablespace elsewhere with \
                 -T {oid}=/another/directory"
            )));
        }
    }
    check_tree(to, None)
}

/// Refuses a folder that is asked for by `flag`, and is not free, or not apart from the rest.
pub(in crate::restore) fn check_folder<'a>(
    flag: &str,
    folder: &Path,
    others: impl Iterator<Item = &'a Path>,
) -> Result<()> {
    check_apart(flag, folder, others)?;
    if is_absent_or_empty(folder)? {
        return Ok(());
    }
    let shown = folder.display();
    Err(
        Error::usage(format!("the folder for {flag} is not empty: {shown}"))
            .hint("name one that is empty or not there"),
    )
}

/// Refuses a folder that shares its place with another.
pub(in crate::restore) fn check_apart<'a>(
    flag: &str,
    folder: &Path,
    mut others: impl Iterator<Item = &'a Path>,
) -> Result<()> {
    match others.find(|other| are_nested(folder, other)) {
        None => Ok(()),
        Some(other) => Err(Error::usage(format!(
            "the folder for {flag} would share its place: {} and {}",
            folder.display(),
            other.display()
        ))),
    }
}

fn check_tablespace(record: &TablespaceRecord, to: &Path, is_mapped: bool) -> Result<()> {
    if is_absent_or_empty(to)? {
        return Ok(());
    }
    let (oid, place) = (record.oid, to.display());
    Err(Error::usage(format!(
        "the place of tablespace {oid} is not empty: {place}"
    ))
    .hint(if is_mapped {
        "map it to a directory that is empty or not there".to_owned()
    } else {
        format!("a live server may use it; map it elsewhere with -T {oid}=/another/directory")
    }))
}

/// Refuses a place that replaying CREATE TABLESPACE would link to while anything is there: also an
/// empty directory may be a live server's.
pub(in crate::restore) fn check_made_later(oid: u32, place: &Path) -> Result<()> {
    match fs::symlink_metadata(place) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(io("read", place, &error)),
        Ok(_) => {}
    }
    Err(Error::usage(format!(
        "replay makes tablespace {oid} after the backup began, at a place that exists on this \
         machine: {}",
        place.display()
    ))
    .hint(
        "a live server may use it, and -T cannot move it; restore on another machine, from a later \
         backup, or to a target before the tablespace was made. If it is what this cluster, or a restore of it \
         that was broken off, has left there: move it away",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(oid: u32, location: &Path) -> TablespaceRecord {
        TablespaceRecord {
            oid,
            location: location.to_str().unwrap().to_owned(),
        }
    }

    /// Replay links to it and fills it, and a live server may have made it for itself.
    #[test]
    fn a_place_that_replay_will_fill_must_not_be_there_at_all() {
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path().join("space");
        check_made_later(7, &place).unwrap();
        fs::create_dir(&place).unwrap();
        check_made_later(7, &place).unwrap_err();
        let link = folder.path().join("link");
        std::os::unix::fs::symlink("/nowhere", &link).unwrap();
        check_made_later(7, &link).unwrap_err();
    }

    #[test]
    fn tablespaces_go_only_to_places_that_are_free() {
        let folder = tempfile::tempdir().unwrap();
        let (live, free) = (folder.path().join("live"), folder.path().join("free"));
        fs::create_dir(&live).unwrap();
        fs::write(live.join("file"), "x").unwrap();
        let target = folder.path().join("data");
        let records = [record(7, &live)];
        let plan = |mappings: &[String]| {
            let mappings: Vec<_> = mappings.iter().map(|text| text.parse().unwrap()).collect();
            plan_tablespaces(&records, &mappings, &target, Found::Nothing, 18)
        };
        let refused = plan(&[]).unwrap_err();
        assert!(
            refused.message().contains(live.to_str().unwrap()),
            "{refused}"
        );
        assert!(refused.hint_text().unwrap().contains("-T 7="), "{refused}");
        let moved = plan(&[format!("7={}", free.display())]).unwrap();
        assert_eq!(moved[0].to.as_deref(), Some(free.as_path()));
        let stray = plan(&[format!("8={}", free.display())]).unwrap_err();
        assert!(stray.hint_text().unwrap().contains("7="), "{stray}");
        let inside = format!("7={}", target.join("x").display());
        plan(&[inside]).unwrap_err();
    }

    #[test]
    fn a_tablespace_inside_of_the_data_directory_needs_no_place() {
        let records = [TablespaceRecord {
            oid: 7,
            location: "pg_tblspc/7".to_owned(),
        }];
        let plans =
            plan_tablespaces(&records, &[], Path::new("/data"), Found::Nothing, 18).unwrap();
        assert_eq!(plans[0].to, None);
    }
}
