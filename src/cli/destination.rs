//! Settings handed on: where a cluster's objects go.

use std::time::Duration;

use crate::config::{AcknowledgedBy, ClusterSettings, RepositorySettings};
use crate::service::{Acknowledge, Destination, EncryptionSettings, PlaceSettings, StoreOptions};

/// A command that tries again by itself does not let each request do so for long.
const OWN_RETRIES: Duration = Duration::from_secs(5);

/// Where a cluster's objects go, for a command that tries again by itself.
pub(super) fn impatient_destination(cluster: &ClusterSettings) -> Destination {
    let mut destination = destination(cluster);
    for place in &mut destination.places {
        place.store.retry_budget = place.store.retry_budget.min(OWN_RETRIES);
    }
    destination
}

/// Where a cluster's objects go.
pub(super) fn destination(cluster: &ClusterSettings) -> Destination {
    Destination {
        cluster: cluster.name.clone(),
        places: cluster.repositories.iter().map(place).collect(),
        acknowledge: match cluster.acknowledge {
            AcknowledgedBy::All => Acknowledge::All,
            AcknowledgedBy::Any => Acknowledge::Any,
        },
    }
}

/// One repository.
pub(super) fn place(repository: &RepositorySettings) -> PlaceSettings {
    PlaceSettings {
        name: repository.name.clone(),
        store: store_options(repository),
        wal_level: repository.wal_level,
        backup_level: repository.backup_level,
        encryption: EncryptionSettings {
            recipients: repository.recipients.clone(),
            identity_file: repository.identity_file.clone(),
            accept_plain: repository.accept_plain,
            state_dir: repository.state_dir.clone(),
            scope: repository.scope(),
        },
    }
}

fn store_options(repository: &RepositorySettings) -> StoreOptions {
    let usual = StoreOptions::at(&repository.url);
    let set = repository.store.clone();
    StoreOptions {
        endpoint: set.endpoint,
        region: set.region,
        path_style: set.path_style,
        allow_http: set.allow_http,
        ca_file: set.ca_file,
        profile: set.profile,
        account: set.account,
        server_side_encryption: set.server_side_encryption,
        kms_key_id: set.kms_key_id,
        bucket_key: set.bucket_key,
        storage_class: set.storage_class,
        concurrency: set.concurrency.unwrap_or(usual.concurrency),
        retry_budget: set.retry_for.unwrap_or(usual.retry_budget),
        ..usual
    }
}
