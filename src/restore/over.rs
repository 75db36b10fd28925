//! A restore over what a cluster's own directory holds: what must be seen, and said, before it is touched.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use super::RestoreOptions;
use super::place::{Found, TablespacePlan, Unfinished, check_tree, is_expected};
use super::settings;
use crate::error::{Error, Result, io};

/// What a plan says of the cluster that was there.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OverCluster {
    /// What is removed though the server knows nothing of it, by its name in the directory.
    pub removed: Vec<String>,
    /// Its tablespaces that the backup does not have where they are: OID and place.
    pub left: Vec<(String, PathBuf)>,
    /// Lines of its `postgresql.auto.conf` that say which primary it followed.
    pub(super) follows: Vec<u8>,
}

/// How many names are told.
const NAMES_SHOWN: usize = 10;

impl OverCluster {
    /// Looks at a directory that a backup with these files and folders at its top is restored over.
    pub(super) fn of(
        target: &Path,
        found: Found,
        options: &RestoreOptions,
        top: &BTreeSet<Vec<u8>>,
        planned: &[TablespacePlan],
        wal_place: Option<&Path>,
    ) -> Result<Self> {
        let marked = Unfinished::read(target)?;
        if found == Found::Cluster {
            let owner = marked.as_ref().and_then(|marked| marked.owner);
            check_tree(target, owner.map(|owner| owner.uid))?;
        }
        check_needed(target, &options.needed)?;
        if let Some(place) = wal_place {
            check_needed(place, &options.needed)?;
        }
        let read = |error: std::io::Error| io("read", target, &error);
        let mut removed = Vec::new();
        for entry in fs::read_dir(target).map_err(read)? {
            let entry = entry.map_err(read)?;
            let name = entry.file_name();
            let is_link = entry.file_type().map_err(read)?.is_symlink();
            if !top.contains(name.as_bytes()) && !is_link && !is_expected(Path::new(&name)) {
                removed.push(name.to_string_lossy().into_owned());
            }
        }
        removed.sort();
        // what stands there now may be the backup's
        let marked = marked.and_then(|marked| marked.follows).unwrap_or_default();
        let follows = match (found, follows_of(target)?) {
            (Found::Cluster, own) if !own.is_empty() => own,
            _ if !marked.is_empty() => marked,
            (Found::Cluster, own) => own,
            _ => Vec::new(),
        };
        Ok(Self {
            removed,
            left: left_tablespaces(target, planned),
            follows,
        })
    }

    /// What whoever restores should know.
    pub(super) fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        if !self.removed.is_empty() {
            let shown: Vec<&str> = self
                .removed
                .iter()
                .take(NAMES_SHOWN)
                .map(String::as_str)
                .collect();
            let more = match self.removed.len().saturating_sub(NAMES_SHOWN) {
                0 => String::new(),
                more => format!(" and {more} more"),
            };
            warnings.push(format!(
                "the backup does not have these in the directory, and they are removed: {}{more}",
                shown.join(", ")
            ));
        }
        for (oid, place) in &self.left {
            warnings.push(format!(
                "the backup does not have tablespace {oid} at {}: what lies there stays, and is nobody's",
                place.display()
            ));
        }
        warnings
    }
}

/// Refuses a directory that holds what Anywhen itself needs.
fn check_needed(target: &Path, needed: &[PathBuf]) -> Result<()> {
    let target = fs::canonicalize(target).map_err(|error| io("find", target, &error))?;
    for needed in needed {
        // what is not there is in nobody's way
        let Ok(found) = fs::canonicalize(needed) else {
            continue;
        };
        if found.starts_with(&target) {
            return Err(Error::usage(format!(
                "{} would be removed: it lies in {}, and Anywhen needs it",
                needed.display(),
                target.display()
            ))
            .hint("move it out of the data directory first"));
        }
    }
    Ok(())
}

/// The lines of `postgresql.auto.conf` by which the server that was there followed its primary.
fn follows_of(target: &Path) -> Result<Vec<u8>> {
    let path = target.join("postgresql.auto.conf");
    match fs::read(&path) {
        Ok(text) => Ok(settings::lines_that_follow(&text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(io("read", &path, &error)),
    }
}

/// Tablespaces of the directory that are not restored to where they are: nothing leads there any more.
fn left_tablespaces(target: &Path, planned: &[TablespacePlan]) -> Vec<(String, PathBuf)> {
    let links = fs::read_dir(target.join("pg_tblspc")).into_iter().flatten();
    let mut left: Vec<_> = links
        .flatten()
        .filter_map(|entry| {
            let oid = entry.file_name().into_string().ok()?;
            let to = fs::read_link(entry.path()).ok()?;
            let is_there = |it: &TablespacePlan| it.to.as_deref() == Some(&to);
            (!planned.iter().any(is_there)).then_some((oid, to))
        })
        .collect();
    left.sort();
    left
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The repository may be all that is left of the cluster.
    #[test]
    fn what_anywhen_needs_is_not_swept_away_with_the_directory_that_holds_it() {
        let folder = tempfile::tempdir().unwrap();
        let data = folder.path().join("data");
        let [inside, beside] = [data.join("backups"), folder.path().join("backups")];
        for made in [&inside, &beside] {
            fs::create_dir_all(made).unwrap();
        }
        check_needed(&data, &[beside.clone(), data.join("absent")]).unwrap();
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&inside, &link).unwrap();
        for needed in [inside, link] {
            let error = check_needed(&data, &[beside.clone(), needed.clone()]).unwrap_err();
            let shown = needed.to_str().unwrap();
            assert!(error.message().contains(shown), "{error}");
        }
    }

    #[test]
    fn a_tablespace_that_the_backup_does_not_have_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let links = folder.path().join("pg_tblspc");
        fs::create_dir(&links).unwrap();
        for oid in ["16384", "16385"] {
            std::os::unix::fs::symlink(format!("/srv/{oid}"), links.join(oid)).unwrap();
        }
        let planned = TablespacePlan {
            oid: 16384,
            from: "/srv/16384".to_owned(),
            to: Some(PathBuf::from("/srv/16384")),
            is_filled: true,
        };
        let left = left_tablespaces(folder.path(), &[planned]);
        assert_eq!(left, [("16385".to_owned(), PathBuf::from("/srv/16385"))]);
    }
}
