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
/// A folder's own files are looked at behind those of the folders in it: a segment takes the place of its
/// pieces, and one of the two must be seen. A file whose name no object can have is not listed. Links are
/// followed.
pub(super) fn files_below(folder: &FilePath, prefix: Option<&Path>) -> io::Result<Vec<ObjectMeta>> {
    let prefix = prefix.map(AsRef::as_ref).unwrap_or_default();
    let mut found = Vec::new();
    look(&folder.join(prefix), prefix, 0, &mut found)?;
    Ok(found)
}

fn look(
    folder: &FilePath,
    below: &str,
    depth: usize,
    found: &mut Vec<ObjectMeta>,
) -> io::Result<()> {
    if depth > DEPTH_MAX {
        let reason = format!("folders in folders without end: {}", folder.display());
        return Err(io::Error::other(reason));
    }
    let path_of = |name: &str| match below {
        "" => name.to_owned(),
        below => format!("{below}/{name}"),
    };
    for (name, path) in entries(folder, |kind| kind != Kind::File)? {
        look(&path, &path_of(&name), depth + 1, found)?;
    }
    for (name, path) in entries(folder, |kind| kind != Kind::Folder)? {
        let Some(metadata) = unless_gone(fs::metadata(path))? else {
            continue;
        };
        let Ok(location) = Path::parse(path_of(&name)) else {
            continue;
        };
        if metadata.is_file() {
            found.push(ObjectMeta {
                location,
                // nobody asks when
                last_modified: std::time::UNIX_EPOCH.into(),
                size: metadata.len(),
                e_tag: None,
                version: None,
            });
        }
    }
    Ok(())
}

/// What an entry of a folder is, as far as the folder tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    File,
    Folder,
    /// A link, which leads to either.
    Link,
}

/// The entries of a folder that are wanted: their names and paths.
fn entries(
    folder: &FilePath,
    is_wanted: impl Fn(Kind) -> bool,
) -> io::Result<Vec<(String, PathBuf)>> {
    let mut wanted = Vec::new();
    let Some(entries) = unless_gone(fs::read_dir(folder))? else {
        return Ok(wanted);
    };
    for entry in entries {
        let Some(entry) = unless_gone(entry)? else {
            continue;
        };
        let Some(kind) = unless_gone(entry.file_type())? else {
            continue;
        };
        let kind = if kind.is_dir() {
            Kind::Folder
        } else if kind.is_symlink() {
            Kind::Link
        } else {
            Kind::File
        };
        if let (true, Ok(name)) = (is_wanted(kind), entry.file_name().into_string()) {
            wanted.push((name, entry.path()));
        }
    }
    Ok(wanted)
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
