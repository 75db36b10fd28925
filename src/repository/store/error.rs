//! What a store can answer that is no success, and what a user does about each.

use crate::error::{Error, Kind};

/// Not found, not reachable and refused are different answers, here and in every layer above.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// There is no object of that name.
    #[error("not found: {path}")]
    NotFound {
        /// The object's path in the repository.
        path: String,
    },
    /// The store did not answer, or not as it should.
    #[error("cannot {doing} {path}: {reason}")]
    Unreachable {
        /// What was asked of the store.
        doing: &'static str,
        /// The object's path in the repository.
        path: String,
        /// What the store or the operating system said.
        reason: String,
    },
    /// The store knows the request and does not allow it.
    #[error("access denied: cannot {doing} {path} with {credentials}: {reason}")]
    Denied {
        /// What was asked of the store.
        doing: &'static str,
        /// The object's path in the repository.
        path: String,
        /// Where the credentials came from; never what they are.
        credentials: String,
        /// What the store said.
        reason: String,
    },
    /// The clock of this machine and the store's are too far apart for a signed request.
    #[error("the clocks of this machine and of the store differ too much: {path}: {reason}")]
    ClockSkew {
        /// What was asked for.
        path: String,
        /// What the store said.
        reason: String,
    },
    /// The bucket is in another region than the one asked.
    #[error("the bucket is in {}: {path}: {reason}", region.as_deref().map_or_else(|| "another region".to_owned(), |region| format!("region {region}")))]
    WrongRegion {
        /// What was asked for.
        path: String,
        /// The bucket's region, where the store named it.
        region: Option<String>,
        /// What the store said.
        reason: String,
    },
    /// There is no such bucket: no answer about any object in it.
    #[error("there is no such {bucket_word}: {url}: {reason}")]
    NoBucket {
        /// What the provider calls it.
        bucket_word: &'static str,
        /// The repository.
        url: String,
        /// What the store said.
        reason: String,
    },
    /// There is no room for another object.
    #[error("no room left: cannot {doing} {path}: {reason}")]
    Full {
        /// What was asked of the store.
        doing: &'static str,
        /// The object's path in the repository.
        path: String,
        /// What the store or the operating system said.
        reason: String,
    },
    /// The folder or its file system does not let this user do that.
    #[error("cannot {doing} {path}: {reason}")]
    Forbidden {
        /// What was asked of the store.
        doing: &'static str,
        /// The object's path in the repository.
        path: String,
        /// What the operating system said.
        reason: String,
    },
    /// The store understood the request and will not do it, however often it is asked.
    #[error("the store refuses to {doing} {path}: {reason}")]
    Refused {
        /// What was asked of the store.
        doing: &'static str,
        /// The object's path in the repository.
        path: String,
        /// What the store said.
        reason: String,
    },
    /// The repository's address, or a setting of its store, makes no sense.
    #[error("{message}")]
    Settings {
        /// What is wrong.
        message: String,
        /// What would be right.
        hint: String,
    },
}

impl StoreError {
    /// Wrong settings; the message is a whole sentence.
    pub(super) fn url(message: impl Into<String>) -> Self {
        Self::Settings {
            message: message.into(),
            hint: "use s3://bucket/prefix, gs://bucket/prefix, az://container/prefix or \
                   file:///path/to/repository"
                .to_owned(),
        }
    }

    /// Replaces the hint of wrong settings.
    pub(super) fn hint(self, hint: impl Into<String>) -> Self {
        match self {
            Self::Settings { message, .. } => Self::Settings {
                message,
                hint: hint.into(),
            },
            other => other,
        }
    }

    /// Whether the same request may succeed later without anybody changing our settings: rights
    /// are granted, credentials renewed, clocks set, disks emptied and proxies mended while a
    /// stream runs.
    pub fn may_pass(&self) -> bool {
        !matches!(self, Self::NotFound { .. } | Self::Settings { .. })
    }
}

impl From<StoreError> for Error {
    fn from(error: StoreError) -> Self {
        let message = error.to_string();
        let error = match error {
            StoreError::NotFound { .. } => Self::not_found(message),
            StoreError::Unreachable { .. } => Self::new(Kind::Unreachable, message)
                .hint("check that the repository is there and that this user may use it"),
            StoreError::Denied { .. } => Self::new(Kind::Unreachable, message).hint(
                "check that these are the credentials that you mean, and that they may list the \
                 bucket and read, write and delete below the prefix",
            ),
            StoreError::ClockSkew { .. } => {
                Self::new(Kind::Unreachable, message).hint("set this machine's clock (NTP)")
            }
            StoreError::WrongRegion { region, .. } => {
                let failure = Self::new(Kind::Unreachable, message);
                match region {
                    Some(region) => failure.hint(format!(
                        "set the repository's region to {region:?} (or AWS_REGION)"
                    )),
                    None => failure.hint("set the repository's region (or AWS_REGION)"),
                }
            }
            StoreError::NoBucket { .. } => Self::new(Kind::Unreachable, message)
                .hint("check the name in the address, or make it; anywhen makes no buckets"),
            StoreError::Full { .. } => Self::new(Kind::Unreachable, message)
                .hint("free space where the repository lives; nothing was acknowledged"),
            StoreError::Forbidden { .. } => Self::new(Kind::Unreachable, message)
                .hint("give this user the right to read and write the repository's folder"),
            StoreError::Refused { reason, .. } if reason.contains("certificate") => {
                Self::new(Kind::Unreachable, message)
                    .hint("set the repository's ca_file to the authority that signed it")
            }
            StoreError::Refused { .. } => Self::new(Kind::Unreachable, message)
                .hint("check the endpoint and the settings of this repository"),
            StoreError::Settings { hint, .. } => Self::usage(message).hint(hint),
        };
        error.of_store()
    }
}
