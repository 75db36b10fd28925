//! What lies in a spool, for those who only look.

use std::io;
use std::path::Path;
use std::sync::Arc;

use wal::{Lsn, TimelineId};

use super::index::Index;
use crate::clock::Clock;
use crate::repository::keys::EncryptionSettings;
use crate::repository::layout::{ClusterName, ObjectName};
use crate::repository::member::Member;
use crate::repository::place::Place;
use crate::repository::store::StoreOptions;
use crate::repository::{PlaceSettings, RepositoryError, Result};

/// What a spool holds that is not in the repository yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpoolContents {
    /// How many objects.
    pub objects: usize,
    /// What they take, in bytes.
    pub bytes: u64,
    /// The newest timeline of which there is WAL.
    pub timeline: Option<TimelineId>,
    /// Where the first stretch of that timeline begins.
    pub start: Option<Lsn>,
    /// Where the last one ends.
    pub end: Option<Lsn>,
}

impl SpoolContents {
    /// Looks into the spool in the folder `dir`, which another process may hold; `None` where it is
    /// empty, or there is none. No key is needed.
    ///
    /// A spool that cannot be looked into is an error, and never an empty one.
    pub async fn read(
        dir: &Path,
        cluster: &ClusterName,
        system_id: u64,
        clock: Arc<dyn Clock>,
    ) -> Result<Option<Self>> {
        let lock = dir.join(cluster.as_str()).join(super::LOCK);
        // only a file that is not there says that nothing is spooled
        if !lock
            .try_exists()
            .map_err(|error| unusable(dir, &lock, &error))?
        {
            return Ok(None);
        }
        let settings = PlaceSettings {
            name: "spool".to_owned(),
            store: StoreOptions::at(dir.to_string_lossy()),
            wal_level: 1,
            backup_level: 1,
            encryption: EncryptionSettings::default(),
        };
        let place = Arc::new(Place::new(settings, false, clock));
        let member = Member::new(place, cluster.clone(), system_id);
        let mut index = Index::default();
        for listed in member.list("").await? {
            if let Some(name) = ObjectName::parse(&listed.path) {
                index.found(&name, listed.bytes);
            }
        }
        if index.len() == 0 {
            return Ok(None);
        }
        let mut contents = Self {
            objects: index.len(),
            bytes: index.bytes(),
            timeline: None,
            start: None,
            end: None,
        };
        for name in index.names() {
            contents.count(&member, &name).await?;
        }
        Ok(Some(contents))
    }

    /// The same for every system of a cluster of which something is spooled.
    pub async fn read_every_system(
        dir: &Path,
        cluster: &ClusterName,
        clock: &Arc<dyn Clock>,
    ) -> Result<Vec<Self>> {
        let path = dir.join(cluster.as_str());
        let failed = |error: io::Error| unusable(dir, &path, &error);
        let folders = match std::fs::read_dir(&path) {
            Ok(folders) => folders,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(failed(error)),
        };
        let mut found = Vec::new();
        for folder in folders {
            let folder = folder.map_err(failed)?;
            if let Some(system_id) = folder.file_name().to_str().and_then(|id| id.parse().ok()) {
                found.extend(Self::read(dir, cluster, system_id, Arc::clone(clock)).await?);
            }
        }
        Ok(found)
    }

    async fn count(&mut self, member: &Member, name: &ObjectName) -> Result<()> {
        let (timeline, start, end) = match name {
            ObjectName::Piece { segment, range } => (segment.timeline, range.start, range.end),
            ObjectName::Segment(segment) => {
                let header = match member.head(name).await {
                    Ok((_, header)) => header,
                    // it left meanwhile, or says itself what is wrong with it when it does
                    Err(error) if error.is_not_found() || error.is_damage() => return Ok(()),
                    Err(error) => return Err(error),
                };
                let lsn = |text: Option<String>| text.and_then(|text| text.parse().ok());
                match (lsn(header.start), lsn(header.end)) {
                    (Some(start), Some(end)) => (segment.timeline, start, end),
                    _ => return Ok(()),
                }
            }
            _ => return Ok(()),
        };
        if self.timeline.is_none_or(|before| before < timeline) {
            self.timeline = Some(timeline);
            (self.start, self.end) = (Some(start), Some(end));
        }
        self.start = self.start.min(Some(start));
        self.end = self.end.max(Some(end));
        Ok(())
    }
}

/// It is not known what lies in the spool in `dir`, since `path` in it cannot be read.
fn unusable(dir: &Path, path: &Path, error: &io::Error) -> RepositoryError {
    RepositoryError::SpoolFolder {
        dir: super::shown(dir),
        reason: format!("{}: {error}", path.display()),
    }
}
