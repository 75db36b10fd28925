//! Where a cluster's objects go, as settings have it.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use super::layout::ClusterName;
use super::place::Place;
use super::store::{StoreError, Traffic};
use super::{
    Acknowledge, PlaceSettings, Repository, RepositoryError, ServerIdentity, clusters_in, list_of,
    systems_in,
};
use crate::clock::Clock;
use crate::error::Result;

/// How long a request is tried again where other places can serve.
const SEVERAL_RETRY_BUDGET: Duration = Duration::from_secs(10);

/// A cluster's name, and the places where its objects are kept.
#[derive(Debug, Clone)]
pub struct Destination {
    /// The cluster's name.
    pub cluster: String,
    /// The places; at least one. Reads ask them in this order.
    pub places: Vec<PlaceSettings>,
    /// When something counts as acknowledged.
    pub acknowledge: Acknowledge,
}

/// A destination whose places can be used.
#[derive(Debug, Clone)]
pub struct OpenDestination {
    cluster: ClusterName,
    places: Vec<Arc<Place>>,
    acknowledge: Acknowledge,
}

impl Destination {
    /// A folder, without encryption, everything else as usual.
    #[cfg(test)]
    pub fn local(folder: &std::path::Path, cluster: &str) -> Self {
        let place = PlaceSettings {
            name: "local".to_owned(),
            store: super::store::StoreOptions::at(folder.to_string_lossy()),
            wal_level: 1,
            backup_level: 3,
            encryption: super::keys::EncryptionSettings::default(),
        };
        Self {
            cluster: cluster.to_owned(),
            places: vec![place],
            acknowledge: Acknowledge::All,
        }
    }

    /// Opens the places; `create` makes local folders that are missing.
    ///
    /// One place that cannot be reached is an error where it is the only one.
    pub fn open(&self, create: bool, clock: &Arc<dyn Clock>) -> Result<OpenDestination> {
        let cluster = self.cluster.parse()?;
        // what is wrong with settings leaves no folder behind
        for place in &self.places {
            place.encryption.check().map_err(RepositoryError::from)?;
        }
        let places: Vec<Arc<Place>> = self
            .places
            .iter()
            .map(|settings| {
                let mut settings = settings.clone();
                if self.places.len() > 1 {
                    // one that is away is filled up later rather than waited for
                    let budget = &mut settings.store.retry_budget;
                    *budget = (*budget).min(SEVERAL_RETRY_BUDGET);
                }
                Arc::new(Place::new(settings, create, Arc::clone(clock)))
            })
            .collect();
        let mut opened = 0;
        let mut outage = None;
        for place in &places {
            match place.open() {
                Ok(_) => opened += 1,
                Err(error) if error.is_unreachable() => {
                    outage.get_or_insert(error);
                }
                Err(error) => return Err(error.into()),
            }
        }
        match outage {
            Some(error) if opened == 0 => Err(error.into()),
            _ => Ok(OpenDestination {
                cluster,
                places,
                acknowledge: self.acknowledge,
            }),
        }
    }
}

impl OpenDestination {
    /// Whoever asks its places goes on asking from now on, whatever fails: the log tells of an outage
    /// as a whole.
    pub fn persist(&self) {
        for place in &self.places {
            place.persist();
        }
    }

    /// The cluster's name.
    pub fn cluster(&self) -> &ClusterName {
        &self.cluster
    }

    /// What each place was asked by this process, with the place's name in settings.
    pub fn traffic(&self) -> Vec<(String, Traffic)> {
        let places = self.places.iter();
        places
            .map(|place| (place.settings().name.clone(), place.traffic()))
            .collect()
    }

    /// Leaves nothing behind in the places that another process would have to put right: for the
    /// end of one that writes.
    pub async fn settle(&self) {
        for place in &self.places {
            place.settle().await;
        }
    }

    /// The repository of a server, which writes.
    ///
    /// Places are prepared at first contact; what this process has met and is not there any more is
    /// not made again. A place that cannot be reached falls behind; one at least is needed.
    pub async fn repository(
        &self,
        identity: ServerIdentity,
        new_system: bool,
    ) -> Result<Repository, RepositoryError> {
        let mut repository = self.of_system(identity.system_id);
        repository.prepare(identity, new_system).await?;
        Ok(repository)
    }

    fn of_system(&self, system_id: u64) -> Repository {
        Repository::of(&self.places, &self.cluster, system_id, self.acknowledge)
    }

    /// What is stored under the cluster's name, for reading; `system_id` chooses among several.
    pub async fn stored(&self, system_id: Option<u64>) -> Result<Repository, RepositoryError> {
        let (stored, unheard) = self.systems().await?;
        let chosen = match (system_id, stored.as_slice()) {
            (Some(id), ids) if ids.contains(&id) => id,
            (Some(_), _) | (None, []) => {
                // a place that could not be asked may hold it
                return Err(match unheard {
                    Some(error) => error,
                    None => self.not_stored(system_id, &stored).await,
                });
            }
            (None, [only]) => *only,
            (None, several) => {
                return Err(RepositoryError::SeveralSystems {
                    cluster: self.cluster.clone(),
                    url: self.urls(),
                    systems: list_of(several),
                });
            }
        };
        let repository = self.of_system(chosen);
        repository.check_format().await?;
        Ok(repository)
    }

    /// That nothing is stored of what was asked for, and what there is instead.
    async fn not_stored(&self, system_id: Option<u64>, systems: &[u64]) -> RepositoryError {
        let (cluster, url) = (self.cluster.clone(), self.urls());
        if let (Some(system_id), [_, ..]) = (system_id, systems) {
            return RepositoryError::NoSystem {
                system_id,
                cluster,
                url,
                known: systems.iter().map(ToString::to_string).collect(),
            };
        }
        // it only helps: where it cannot be had, the answer is the same
        let clusters = self.every_cluster().await.unwrap_or_default();
        let known = clusters.into_iter().map(|one| one.cluster.to_string());
        RepositoryError::NoCluster {
            cluster,
            url,
            known: known.collect(),
        }
    }

    /// Every system that is stored under the cluster's name.
    pub async fn every_system(&self) -> Result<Vec<Repository>, RepositoryError> {
        let mut found = Vec::new();
        for system in self.systems().await?.0 {
            found.push(self.stored(Some(system)).await?);
        }
        Ok(found)
    }

    /// The same places for every cluster that they hold.
    pub async fn every_cluster(&self) -> Result<Vec<Self>, RepositoryError> {
        let (names, _) = self
            .in_every_place(|place| async move { clusters_in(&place.open()?.store).await })
            .await?;
        Ok(names
            .into_iter()
            .map(|cluster| Self {
                cluster,
                ..self.clone()
            })
            .collect())
    }

    /// The system identifiers under the cluster's name, and why a place could not be asked.
    async fn systems(&self) -> Result<(Vec<u64>, Option<RepositoryError>), RepositoryError> {
        self.in_every_place(
            |place| async move { systems_in(&place.open()?.store, &self.cluster).await },
        )
        .await
    }

    /// What the places that can be asked answer, put together; an error where none can be.
    async fn in_every_place<T: Ord, Answer>(
        &self,
        ask: impl Fn(Arc<Place>) -> Answer,
    ) -> Result<(Vec<T>, Option<RepositoryError>), RepositoryError>
    where
        Answer: Future<Output = Result<Vec<T>, RepositoryError>>,
    {
        let mut found = BTreeSet::new();
        let (mut answers, mut unheard) = (0, None);
        for place in &self.places {
            let asked = match place.silence() {
                Some(reason) if self.places.len() > 1 => Err(RepositoryError::Silent { reason }),
                _ => ask(Arc::clone(place)).await,
            };
            match asked {
                Ok(answer) => {
                    answers += 1;
                    found.extend(answer);
                }
                // another place may hold it all
                Err(error @ RepositoryError::Store(StoreError::NotFound { .. })) => {
                    unheard.get_or_insert(error);
                }
                Err(error) if error.is_unreachable() => {
                    if self.places.len() > 1 && place.is_silent(&error) {
                        tracing::warn!(
                            "repository {} cannot be asked; what only it has is not seen: {error}",
                            place.settings().name
                        );
                    }
                    unheard.get_or_insert(error);
                }
                Err(error) => return Err(error),
            }
        }
        match unheard {
            Some(error) if answers == 0 => Err(error),
            unheard => Ok((found.into_iter().collect(), unheard)),
        }
    }

    fn urls(&self) -> String {
        let urls: Vec<&str> = self.places.iter().map(|place| place.url()).collect();
        urls.join(" and ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::SystemClock;

    /// Whoever restores must not have to guess under which name it was stored.
    #[tokio::test]
    async fn what_is_not_stored_is_answered_with_what_is() {
        let folder = tempfile::tempdir().unwrap();
        let clock: Arc<dyn Clock> = Arc::new(SystemClock);
        let open = |cluster| Destination::local(folder.path(), cluster).open(true, &clock);
        let absent = open("mian").unwrap().stored(None).await.unwrap_err();
        assert!(!absent.to_string().contains("stored="), "{absent}");
        let identity = ServerIdentity {
            system_id: 7,
            major: 18,
            block_bytes: 8192,
        };
        let written = open("main").unwrap().repository(identity, false).await;
        written.unwrap();
        let absent = open("mian").unwrap().stored(None).await.unwrap_err();
        assert!(absent.to_string().ends_with("stored=main"), "{absent}");
        let absent = open("main").unwrap().stored(Some(8)).await.unwrap_err();
        assert!(absent.to_string().ends_with("stored=7"), "{absent}");
    }
}
