//! A backup's manifest: lines of JSON, in one object or, where there are many files, in several.
//!
//! `manifest` names packs, folders, links, and some files. The lines of other files stand in objects of their
//! own, of which each is written and read by itself, so that nobody needs memory for all of them.

use super::layout::{BackupId, ObjectName};
use super::member::Member;
use super::records::{ManifestLine, ManifestPath};
use super::{Repository, RepositoryError, Result, blocking};

/// A file list is closed once its lines have so many bytes, as they do after some 1 GB of large files.
pub const FILE_LIST_BYTES: usize = 256 << 10;

/// Files that a restore reads before all others: their lines stand in the manifest itself.
const READ_FIRST: [&str; 2] = ["backup_manifest", "global/pg_control"];

/// The lines of a manifest, as a backup comes to know them.
#[derive(Debug)]
pub struct ManifestText {
    backup: BackupId,
    head: Vec<u8>,
    files: Vec<u8>,
    list_bytes: usize,
    lists: u32,
}

/// Lines of files that are stored by themselves.
#[derive(Debug)]
pub struct FileList {
    /// Its name.
    pub name: ObjectName,
    /// Its lines.
    pub text: Vec<u8>,
    /// Their digest.
    pub digest: String,
}

impl ManifestText {
    /// No lines yet; those of files are stored by themselves in lists of a little more than `list_bytes`.
    pub fn new(backup: &BackupId, list_bytes: usize) -> Self {
        Self {
            backup: backup.clone(),
            head: Vec::new(),
            files: Vec::new(),
            list_bytes,
            lists: 0,
        }
    }

    /// Adds a line. Gives the list that it has filled, if it has.
    pub fn add(&mut self, line: &ManifestLine) -> Option<FileList> {
        if !is_listed(line) {
            add_line(&mut self.head, line);
            return None;
        }
        add_line(&mut self.files, line);
        if self.files.len() < self.list_bytes {
            return None;
        }
        let name = ObjectName::FileList {
            backup: self.backup.clone(),
            number: self.lists,
        };
        self.lists = self.lists.saturating_add(1);
        let text = std::mem::take(&mut self.files);
        let digest = container::digest(&text);
        let line = ManifestLine::Files {
            path: name.path(),
            digest: digest.clone(),
        };
        add_line(&mut self.head, &line);
        Some(FileList { name, text, digest })
    }

    /// How many bytes the manifest itself has so far.
    pub fn bytes(&self) -> usize {
        self.head.len().saturating_add(self.files.len())
    }

    /// The manifest itself.
    pub fn finish(mut self) -> Vec<u8> {
        self.head.append(&mut self.files);
        self.head
    }
}

/// Whether a line may stand in a list.
fn is_listed(line: &ManifestLine) -> bool {
    let ManifestLine::File { entry, .. } = line else {
        return false;
    };
    !matches!(&entry.path, ManifestPath::Text(path) if READ_FIRST.contains(&path.as_str()))
}

/// Adds a line to a text.
pub(super) fn add_line(text: &mut Vec<u8>, line: &ManifestLine) {
    serde_json::to_writer(&mut *text, line).expect("our own records are JSON");
    text.push(b'\n');
}

/// The lines of a manifest or of a file list.
pub fn lines(text: &[u8]) -> impl Iterator<Item = serde_json::Result<ManifestLine>> {
    let lines = text.split(|byte| *byte == b'\n');
    lines
        .filter(|line| !line.is_empty())
        .map(serde_json::from_slice)
}

/// What a `files` line names; `None` where that is no file list.
pub fn file_list(path: &str) -> Option<ObjectName> {
    ObjectName::parse(path).filter(|name| matches!(name, ObjectName::FileList { .. }))
}

impl Repository {
    /// The text of a manifest or a file list; damage where its digest is another one.
    pub async fn manifest_text(&self, name: &ObjectName, digest: &str) -> Result<Vec<u8>> {
        self.first().manifest_text(name, digest).await
    }
}

impl Member {
    /// The text of a manifest or a file list, as it is stored or kept; damage where its digest is another one.
    pub(super) async fn manifest_text(&self, name: &ObjectName, digest: &str) -> Result<Vec<u8>> {
        let text = match self.fetch(name).await {
            Ok(fetched) => fetched.plain,
            Err(error) if error.lacks_key() => match self.kept_manifest(name, digest)? {
                Some(text) => return Ok(text),
                None => return Err(error),
            },
            Err(error) => return Err(error),
        };
        let (text, found) = blocking(move || {
            let found = container::digest(&text);
            (text, found)
        })
        .await;
        if found == digest {
            return Ok(text);
        }
        Err(self.bad_manifest(
            name,
            format!("it is not the backup's: expected={digest}, found={found}"),
        ))
    }

    /// The lines of a manifest or a file list, which must have this digest.
    pub(super) async fn manifest_lines_of(
        &self,
        name: &ObjectName,
        digest: &str,
    ) -> Result<Vec<ManifestLine>> {
        let text = self.manifest_text(name, digest).await?;
        self.parsed(name, text).await
    }

    /// The lines of a manifest, whosever it is.
    pub(super) async fn manifest_lines(&self, name: &ObjectName) -> Result<Vec<ManifestLine>> {
        let text = self.fetch(name).await?.plain;
        self.parsed(name, text).await
    }

    async fn parsed(&self, name: &ObjectName, text: Vec<u8>) -> Result<Vec<ManifestLine>> {
        let lines = blocking(move || lines(&text).collect::<serde_json::Result<_>>()).await;
        lines.map_err(|error| self.bad_manifest(name, error.to_string()))
    }

    /// The file lists that a manifest names, with their digests.
    pub(super) fn file_lists_in(
        &self,
        manifest: &ObjectName,
        lines: &[ManifestLine],
    ) -> Result<Vec<(ObjectName, String)>> {
        let named = lines.iter().filter_map(|line| match line {
            ManifestLine::Files { path, digest } => Some((path, digest)),
            _ => None,
        });
        named
            .map(|(path, digest)| {
                let name = file_list(path).ok_or_else(|| {
                    self.bad_manifest(manifest, format!("no file list has this path: {path}"))
                })?;
                Ok((name, digest.clone()))
            })
            .collect()
    }

    pub(super) fn bad_manifest(&self, name: &ObjectName, reason: String) -> RepositoryError {
        RepositoryError::Damaged {
            path: self.locate(name),
            reason,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::records::ManifestEntry;
    use super::*;

    fn file(path: &str) -> ManifestLine {
        ManifestLine::File {
            entry: ManifestEntry {
                path: ManifestPath::Text(path.to_owned()),
                mode: 0o600,
                mtime: 0,
            },
            size: 0,
            extents: Vec::new(),
        }
    }

    #[test]
    fn lines_of_files_are_cut_into_lists_that_the_manifest_names() {
        let id = "20261120T140300.123Z".parse().unwrap();
        let pack = ManifestLine::Pack {
            number: 0,
            path: "packs/x/00000000".to_owned(),
        };
        let mut text = ManifestText::new(&id, 200);
        let mut lists = Vec::new();
        let mut expected = Vec::new();
        assert!(text.add(&file("global/pg_control")).is_none());
        for number in 0..10 {
            let line = file(&format!("base/1/{number}"));
            lists.extend(text.add(&line));
            expected.push(line);
        }
        assert!(text.add(&pack).is_none());
        assert!(text.bytes() > 0);
        let head = text.finish();
        let head: Vec<ManifestLine> = lines(&head).map(Result::unwrap).collect();

        let is_list = |line: &&ManifestLine| matches!(line, ManifestLine::Files { .. });
        let named: Vec<&ManifestLine> = head.iter().filter(is_list).collect();
        assert_eq!(named.len(), 3);
        let mut found = Vec::new();
        for (list, named) in lists.iter().zip(named) {
            assert_eq!(container::digest(&list.text), list.digest);
            let expected = ManifestLine::Files {
                path: list.name.path(),
                digest: list.digest.clone(),
            };
            assert_eq!(*named, expected);
            assert_eq!(file_list(&list.name.path()), Some(list.name.clone()));
            found.extend(lines(&list.text).map(Result::unwrap));
        }
        assert_eq!(lists.len(), 3);
        assert!(head.contains(&pack));
        // found without a list, and first
        assert_eq!(head[0], file("global/pg_control"));
        let rest = head[1..]
            .iter()
            .filter(|line| matches!(line, ManifestLine::File { .. }));
        found.extend(rest.cloned());
        assert_eq!(found, expected);
    }

    #[test]
    fn a_list_is_named_by_its_path_alone() {
        for path in [
            "packs/20261120T140300.123Z/00000000",
            "backups/x/files/00000000",
            "/etc/passwd",
        ] {
            assert_eq!(file_list(path), None, "{path}");
        }
    }
}
