//! The files below a folder, each looked at once: on a network folder every look is a round trip, and
//! a year's WAL is a hundred thousand of them.

use std::fs;
use std::io;
use std::path::{Path as FilePath, PathBuf};

use object_store::ObjectMeta;
use object_store::path::Path;

/// Folders in folders: no object lies so deep. A link can lead in circles.
const DEPTH_MAX: usize = 32;

/// Every file below `folder`, and in it below `prefix`, under its path from `folder`; in no order. What
/// goes while it is looked at is not listed; a folder that is not there holds nothing.
///
/// A file whose name no object can have is not listed. Links are followed.
pub(super) fn files_below(folder: &FilePath, prefix: Option<&Path>) -> io::Result<Vec<ObjectMeta>> {
    let prefix = prefix.map(AsRef::as_ref).unwrap_or_default();
    let mut found = Vec::new();
    let mut folders: Vec<(PathBuf, String, usize)> =
        vec![(folder.join(prefix), prefix.to_owned(), 0)];
    while let Some((folder, below, depth)) = folders.pop() {
        if depth > DEPTH_MAX {
            let reason = format!("folders in folders without end: {}", folder.display());
            return Err(io::Error::other(reason));
        }
        let Some(entries) = unless_gone(fs::read_dir(&folder))? else {
            continue;
        };
        for entry in entries {
            let Some(entry) = unless_gone(entry)? else {
                continue;
            };
            let name = entry.file_name();
            let Some(name) = name.to_str() else { continue };
            let path = match below.as_str() {
                "" => name.to_owned(),
                below => format!("{below}/{name}"),
            };
            let kind = entry.file_type()?;
            let metadata = if kind.is_dir() {
                None
            } else if kind.is_symlink() {
                let Some(metadata) = unless_gone(fs::metadata(entry.path()))? else {
                    continue;
                };
                Some(metadata)
            } else {
                let Some(metadata) = unless_gone(entry.metadata())? else {
                    continue;
                };
                Some(metadata)
            };
            match metadata {
                Some(metadata) if metadata.is_file() => {
                    let Ok(location) = Path::parse(&path) else {
                        continue;
                    };
                    found.push(ObjectMeta {
                        location,
                        // nobody asks when
                        last_modified: std::time::UNIX_EPOCH.into(),
                        size: metadata.len(),
                        e_tag: None,
                        version: None,
                    });
                }
                Some(metadata) if !metadata.is_dir() => {}
                _ => folders.push((entry.path(), path, depth + 1)),
            }
        }
    }
    Ok(found)
}

/// `None` for what is not there, or no folder any more.
fn unless_gone<T>(looked: io::Result<T>) -> io::Result<Option<T>> {
    match looked {
        Ok(found) => Ok(Some(found)),
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ) =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn every_file_is_found_once() {
        let root = tempfile::tempdir().unwrap();
        let at = |path: &str| root.path().join(path);
        fs::create_dir_all(at("a/b/c")).unwrap();
        fs::create_dir_all(at("empty")).unwrap();
        for (path, bytes) in [("a/one", "1"), ("a/b/two", "22"), ("a/b/c/three", "333")] {
            fs::write(at(path), bytes).unwrap();
        }
        fs::write(at("four"), "4444").unwrap();
        symlink(at("a/b"), at("linked")).unwrap();
        symlink(at("nowhere"), at("broken")).unwrap();
        let below = |prefix: Option<&str>| {
            let prefix = prefix.map(Path::from);
            let found = files_below(root.path(), prefix.as_ref()).unwrap();
            let mut found: Vec<(String, u64)> = found
                .iter()
                .map(|object| (object.location.to_string(), object.size))
                .collect();
            found.sort();
            found
        };
        let expected = |paths: &[(&str, u64)]| -> Vec<(String, u64)> {
            paths
                .iter()
                .map(|(path, size)| ((*path).to_owned(), *size))
                .collect()
        };
        let all = [
            ("a/b/c/three", 3),
            ("a/b/two", 2),
            ("a/one", 1),
            ("four", 4),
            ("linked/c/three", 3),
            ("linked/two", 2),
        ];
        assert_eq!(below(None), expected(&all));
        assert_eq!(below(Some("a/b")), expected(&all[..2]));
        assert_eq!(below(Some("empty")), []);
        assert_eq!(below(Some("not/there")), []);
        assert_eq!(below(Some("four")), []);
    }

    #[test]
    fn a_link_that_leads_in_circles_is_an_error() {
        let root = tempfile::tempdir().unwrap();
        symlink(root.path(), root.path().join("round")).unwrap();
        assert!(files_below(root.path(), None).is_err());
    }

    /// A shorter list would look as if objects were gone.
    #[test]
    fn a_folder_that_cannot_be_read_is_an_error() {
        let root = tempfile::tempdir().unwrap();
        let name = "x".repeat(300);
        let prefix = Path::from(name.as_str());
        assert!(files_below(root.path(), Some(&prefix)).is_err());
    }
}
