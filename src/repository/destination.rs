//! Where a cluster's objects go, as settings have it.

use super::layout::ClusterName;
use super::store::{Store, StoreOptions};
use super::{Repository, RepositoryError, ServerIdentity, clusters, systems};
use crate::error::Result;

/// A repository's address and a cluster's name in it.
#[derive(Debug, Clone)]
pub struct Destination {
    /// The repository's address.
    pub url: String,
    /// The cluster's name.
    pub cluster: String,
    /// The zstd level for WAL.
    pub wal_level: i32,
    /// The zstd level for backups.
    pub backup_level: i32,
}

/// A destination whose store was reached.
#[derive(Debug, Clone)]
pub struct OpenDestination {
    store: Store,
    cluster: ClusterName,
    levels: (i32, i32),
}

impl Destination {
    /// Opens the store; `create` makes a local folder that is missing.
    pub fn open(&self, create: bool) -> Result<OpenDestination> {
        Ok(OpenDestination {
            cluster: self.cluster.parse()?,
            store: Store::open(&StoreOptions::at(&self.url), create)?,
            levels: (self.wal_level, self.backup_level),
        })
    }
}

impl OpenDestination {
    /// The repository of a server, which writes.
    pub async fn repository(
        &self,
        identity: ServerIdentity,
        new_system: bool,
    ) -> Result<Repository, RepositoryError> {
        let repository =
            Repository::for_server(&self.store, &self.cluster, identity, new_system).await?;
        Ok(repository.with_levels(self.levels.0, self.levels.1))
    }

    /// The repository of a server that was met before: nothing is made that is not there any more.
    pub async fn stored_for(
        &self,
        identity: ServerIdentity,
    ) -> Result<Repository, RepositoryError> {
        let known = systems(&self.store, &self.cluster).await?;
        if !known.contains(&identity.system_id) {
            return Err(RepositoryError::Gone {
                url: self.store.url().to_owned(),
            });
        }
        let repository = self.stored(Some(identity.system_id)).await?;
        Ok(repository.with_levels(self.levels.0, self.levels.1))
    }

    /// What is stored under the cluster's name, for reading.
    pub async fn stored(&self, system_id: Option<u64>) -> Result<Repository, RepositoryError> {
        Repository::open(&self.store, &self.cluster, system_id).await
    }

    /// Every system that is stored under the cluster's name.
    pub async fn every_system(&self) -> Result<Vec<Repository>, RepositoryError> {
        let mut found = Vec::new();
        for system in systems(&self.store, &self.cluster).await? {
            found.push(self.stored(Some(system)).await?);
        }
        Ok(found)
    }

    /// The same store for every cluster that it holds.
    pub async fn every_cluster(&self) -> Result<Vec<Self>, RepositoryError> {
        let names = clusters(&self.store).await?;
        Ok(names
            .into_iter()
            .map(|cluster| Self {
                cluster,
                ..self.clone()
            })
            .collect())
    }
}
