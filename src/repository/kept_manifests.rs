//! The manifest of the newest backup in `state_dir`, of an archiver that holds recipients alone: it cannot
//! read what it has written once the key of that day is gone, and compares the next backup with this.
//!
//! `<state_dir>/manifests/<16 hex digits>/<cluster>/<system identifier>/<backup id>/<digest>` holds the plain
//! lines of the manifest or file list of that digest, mode 0600. Nothing is believed that has another digest.

use std::fs::OpenOptions;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use super::Repository;
use super::layout::{BackupId, ObjectName};
use super::member::Member;
use crate::durable;

/// Where the manifests of one system's backups are kept.
#[derive(Debug, Clone)]
pub struct KeptManifests {
    folder: PathBuf,
}

impl KeptManifests {
    /// Keeps the lines of a manifest or file list. They are not synced: what a power cut leaves of them is not
    /// believed, and a backup stores everything anew.
    pub fn keep(&self, backup: &BackupId, digest: &str, text: &[u8]) -> io::Result<()> {
        durable::create_dir_all(&self.of(backup))?;
        let mut options = OpenOptions::new();
        let options = options.write(true).create(true).truncate(true).mode(0o600);
        options.open(self.path(backup, digest))?.write_all(text)
    }

    /// The lines of this digest; `None` where they are not kept, or not whole.
    fn read(&self, name: &ObjectName, digest: &str) -> Option<Vec<u8>> {
        let (ObjectName::Manifest(backup) | ObjectName::FileList { backup, .. }) = name else {
            return None;
        };
        let text = std::fs::read(self.path(backup, digest)).ok()?;
        (container::digest(&text) == digest).then_some(text)
    }

    /// Forgets backups that are older than this one.
    pub fn forget_before(&self, backup: &BackupId) {
        let entries = std::fs::read_dir(&self.folder).into_iter().flatten();
        for entry in entries.flatten() {
            let name = entry.file_name();
            let id = name.to_str().and_then(|name| name.parse::<BackupId>().ok());
            if let Some(id) = id.filter(|id| id < backup) {
                self.forget(&id);
            }
        }
    }

    /// Forgets a backup.
    pub fn forget(&self, backup: &BackupId) {
        let folder = self.of(backup);
        match std::fs::remove_dir_all(&folder) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!("could not remove {}: {error}", folder.display());
            }
            _ => {}
        }
    }

    /// The folder, for messages.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    fn of(&self, backup: &BackupId) -> PathBuf {
        self.folder.join(backup.as_str())
    }

    fn path(&self, backup: &BackupId, digest: &str) -> PathBuf {
        // it comes from a bucket: nothing but a name
        let name = digest.chars().filter(char::is_ascii_alphanumeric);
        self.of(backup).join(name.collect::<String>())
    }
}

impl Repository {
    /// Where the manifest of a backup that is taken now is kept; `None` where it can be read again, or there
    /// is no `state_dir`.
    pub fn kept_manifests(&self) -> super::Result<Option<KeptManifests>> {
        self.first().kept_manifests()
    }
}

impl Member {
    pub(super) fn kept_manifests(&self) -> super::Result<Option<KeptManifests>> {
        let folder = self.opened()?.encryption.manifests_folder();
        Ok(folder.map(|folder| KeptManifests {
            folder: folder
                .join(self.cluster().to_string())
                .join(self.system_id().to_string()),
        }))
    }

    /// What is kept of a manifest or file list that cannot be read.
    pub(super) fn kept_manifest(
        &self,
        name: &ObjectName,
        digest: &str,
    ) -> super::Result<Option<Vec<u8>>> {
        let kept = self.kept_manifests()?;
        Ok(kept.and_then(|kept| kept.read(name, digest)))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn what_is_kept_is_believed_while_its_digest_fits() {
        let folder = tempfile::tempdir().unwrap();
        let kept = KeptManifests {
            folder: folder.path().join("manifests"),
        };
        let [first, second]: [BackupId; 2] =
            ["20261120T140300.123Z", "20261121T140300.123Z"].map(|id| id.parse().unwrap());
        let (text, digest) = (b"lines".as_slice(), container::digest(b"lines"));
        kept.keep(&first, &digest, text).unwrap();
        let name = ObjectName::Manifest(first.clone());
        assert_eq!(kept.read(&name, &digest).as_deref(), Some(text));
        assert_eq!(kept.read(&name, &container::digest(b"others")), None);
        assert_eq!(kept.read(&name, "blake3:../../x"), None);
        let path = kept.path(&first, &digest);
        assert_eq!(
            std::fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        std::fs::write(&path, b"line").unwrap();
        assert_eq!(kept.read(&name, &digest), None);

        kept.keep(&second, &digest, text).unwrap();
        kept.forget_before(&second);
        assert!(!path.exists());
        let list = ObjectName::FileList {
            backup: second.clone(),
            number: 0,
        };
        assert_eq!(kept.read(&list, &digest).as_deref(), Some(text));
        kept.forget(&second);
        kept.forget(&second);
        assert_eq!(kept.read(&list, &digest), None);
    }
}
