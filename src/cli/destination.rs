//! Settings handed on: where a cluster's objects go.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::config::{AcknowledgedBy, ClusterSettings, RepositorySettings};
use crate::error::{Error, Result, io};
use crate::service::{
    Acknowledge, Destination, EncryptionSettings, PlaceSettings, SPOOL_BYTES_MAX, SpoolSettings,
    StoreOptions,
};

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
            AcknowledgedBy::All | AcknowledgedBy::Spool => Acknowledge::All,
            AcknowledgedBy::Any => Acknowledge::Any,
        },
    }
}

/// The spool of a stream, if it was asked for one: flags over the cluster's settings.
pub(super) fn spool(
    cluster: &ClusterSettings,
    dir: Option<&Path>,
    bytes_max: Option<u64>,
) -> Result<Option<SpoolSettings>> {
    let acknowledges = cluster.acknowledge == AcknowledgedBy::Spool;
    let bytes_max = bytes_max.or(cluster.spool_bytes_max);
    let Some(dir) = dir.or(cluster.spool_dir.as_deref()) else {
        let asked = match (acknowledges, bytes_max) {
            (true, _) => "acknowledge = \"spool\"",
            (false, Some(_)) => "spool_bytes_max",
            (false, None) => return Ok(None),
        };
        return Err(
            Error::usage(format!("{asked} is set, and there is no spool"))
                .hint("give it a folder: --spool-dir DIR, or spool_dir in the configuration file"),
        );
    };
    if bytes_max == Some(0) {
        return Err(
            Error::usage("a spool that may hold nothing was asked for: spool_bytes_max=0").hint(
                "say how much of the folder's disk it may take, such as 10GiB; without a spool, leave \
                 out --spool-dir and spool_dir",
            ),
        );
    }
    Ok(Some(SpoolSettings {
        dir: spool_dir(dir)?,
        bytes_max: bytes_max.unwrap_or(SPOOL_BYTES_MAX),
        acknowledges,
    }))
}

/// The folder that a flag names, from wherever the command is called: taken as it is, it would be an
/// address, which a relative path is not.
pub(super) fn spool_dir(dir: &Path) -> Result<PathBuf> {
    std::path::absolute(dir).map_err(|error| {
        let failure = Error::usage(io("find", dir, &error).message());
        failure.hint("give the spool's folder as --spool-dir DIR")
    })
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
