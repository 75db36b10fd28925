//! What a user can say about one repository's store.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use super::address::Address;

/// The store of a repository as settings have it. Credentials are not here: they come from the
/// provider's usual places.
#[derive(Clone)]
pub struct StoreOptions {
    /// `file:///path`, an absolute path, `s3://bucket/prefix`, `gs://…` or `az://container/…`.
    pub url: String,
    /// The service's own address, for stores that are not the provider's: `https://host:port`.
    pub endpoint: Option<String>,
    /// The bucket's region (S3).
    pub region: Option<String>,
    /// Whether the bucket stands in the path rather than in the host name (S3); unless set, it
    /// does where an endpoint is given.
    pub path_style: Option<bool>,
    /// Whether an endpoint without TLS is accepted.
    pub allow_http: bool,
    /// PEM certificates that are trusted besides the system's.
    pub ca_file: Option<PathBuf>,
    /// The profile in AWS's shared files; wins over keys in the environment (S3).
    pub profile: Option<String>,
    /// The storage account (Azure); `AZURE_STORAGE_ACCOUNT_NAME` unless set.
    pub account: Option<String>,
    /// `AES256`, `aws:kms` or `aws:kms:dsse` (S3).
    pub server_side_encryption: Option<String>,
    /// The key of `aws:kms`; the provider's own unless set (S3).
    pub kms_key_id: Option<String>,
    /// Whether an S3 bucket key is used with `aws:kms`.
    pub bucket_key: Option<bool>,
    /// The storage class of new objects, in the provider's words (S3 and Google).
    pub storage_class: Option<String>,
    /// How many requests may be under way at a time.
    pub concurrency: usize,
    /// How long making a connection may take.
    pub connect_timeout: Duration,
    /// How long the store may be silent: before its answer begins, and between two stretches of
    /// it. What is sent or read may take longer in all, by its size.
    pub request_timeout: Duration,
    /// How long one operation is tried again before its error is given; zero: not at all.
    pub retry_budget: Duration,
    /// What stands in for the service.
    #[cfg(test)]
    pub objects: Option<std::sync::Arc<dyn object_store::ObjectStore>>,
}

impl StoreOptions {
    /// The folder that it is; `None` for a bucket, and for what is no address.
    pub fn folder(&self) -> Option<PathBuf> {
        match Address::parse(&self.url) {
            Ok(Address::Local(folder)) => Some(folder),
            _ => None,
        }
    }

    /// The store at `url`, everything else as usual.
    pub fn at(url: impl Into<String>) -> Self {
        Self {
            url: url.into(),
            endpoint: None,
            region: None,
            path_style: None,
            allow_http: false,
            ca_file: None,
            profile: None,
            account: None,
            server_side_encryption: None,
            kms_key_id: None,
            bucket_key: None,
            storage_class: None,
            concurrency: 16,
            connect_timeout: Duration::from_secs(10),
            request_timeout: Duration::from_secs(20),
            retry_budget: Duration::from_mins(1),
            #[cfg(test)]
            objects: None,
        }
    }
}

/// Names what decides where objects go; a pasted secret in the address is not shown.
impl fmt::Debug for StoreOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StoreOptions")
            .field("url", &super::address::without_secrets(&self.url))
            .field(
                "endpoint",
                &self
                    .endpoint
                    .as_deref()
                    .map(super::address::without_secrets),
            )
            .field("region", &self.region)
            .field("profile", &self.profile)
            .field("retry_budget", &self.retry_budget)
            .finish_non_exhaustive()
    }
}
