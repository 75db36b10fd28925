//! Why one attempt failed, sorted by what happens next.

use std::error::Error as StdError;
use std::io;
use std::time::Duration;

use object_store::client::HttpError;

use super::answer::{Answer, NoCredentials};
use super::aws_files::ProfileError;
use super::error::StoreError;

/// Why one attempt failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Fault {
    /// There is no such object.
    NotFound,
    /// There is one already.
    Exists,
    /// Nothing of the object lies in the range asked for.
    PastEnd,
    /// Another attempt may do it.
    Transient {
        reason: String,
        retry_after: Option<Duration>,
    },
    Denied {
        reason: String,
    },
    ClockSkew {
        reason: String,
    },
    WrongRegion {
        region: Option<String>,
        reason: String,
    },
    NoBucket {
        reason: String,
    },
    Full {
        reason: String,
    },
    Forbidden {
        reason: String,
    },
    /// The service does not know this kind of request.
    Unsupported {
        reason: String,
    },
    /// The service will not do it, for a reason of its own.
    Refused {
        reason: String,
    },
}

/// Where a fault happened, for the error that a user reads.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place<'a> {
    pub(super) doing: &'static str,
    pub(super) path: &'a str,
    pub(super) url: &'a str,
    pub(super) bucket_word: &'static str,
    pub(super) credentials: &'a str,
}

impl Fault {
    /// An attempt that may be made again at once.
    pub(super) fn transient(reason: impl Into<String>) -> Self {
        Self::Transient {
            reason: reason.into(),
            retry_after: None,
        }
    }

    /// What happened, in the store's or the system's words.
    pub(super) fn reason(&self) -> &str {
        match self {
            Self::NotFound => "not found",
            Self::Exists => "something of this name exists",
            Self::PastEnd => "the object ends before the range asked for",
            Self::Transient { reason, .. }
            | Self::Denied { reason }
            | Self::ClockSkew { reason }
            | Self::WrongRegion { reason, .. }
            | Self::NoBucket { reason }
            | Self::Full { reason }
            | Self::Forbidden { reason }
            | Self::Unsupported { reason }
            | Self::Refused { reason } => reason,
        }
    }

    /// Whether the store did what it was asked, and this is what came of it.
    pub(super) fn is_answer(&self) -> bool {
        matches!(
            self,
            Self::NotFound | Self::Exists | Self::PastEnd | Self::Unsupported { .. }
        )
    }

    /// The error for the layers above.
    pub(super) fn at(self, place: Place<'_>) -> StoreError {
        let (doing, path) = (place.doing, place.path.to_owned());
        match self {
            Self::NotFound => StoreError::NotFound { path },
            Self::Transient { reason, .. } => StoreError::Unreachable {
                doing,
                path,
                reason,
            },
            Self::Denied { reason } => StoreError::Denied {
                doing,
                path,
                credentials: place.credentials.to_owned(),
                reason,
            },
            Self::ClockSkew { reason } => StoreError::ClockSkew { path, reason },
            Self::WrongRegion { region, reason } => StoreError::WrongRegion {
                path,
                region,
                reason,
            },
            Self::NoBucket { reason } => StoreError::NoBucket {
                bucket_word: place.bucket_word,
                url: place.url.to_owned(),
                reason,
            },
            Self::Full { reason } => StoreError::Full {
                doing,
                path,
                reason,
            },
            Self::Forbidden { reason } => StoreError::Forbidden {
                doing,
                path,
                reason,
            },
            other @ (Self::Exists
            | Self::PastEnd
            | Self::Unsupported { .. }
            | Self::Refused { .. }) => {
                let reason = other.reason().to_owned();
                StoreError::Refused {
                    doing,
                    path,
                    reason,
                }
            }
        }
    }
}

/// Sorts what a store's client says.
impl From<object_store::Error> for Fault {
    fn from(error: object_store::Error) -> Self {
        use object_store::Error as E;
        if let Some(fault) = typed(&error) {
            return fault;
        }
        let reason = innermost(&error);
        match error {
            E::NotFound { .. } => Self::NotFound,
            E::AlreadyExists { .. } | E::Precondition { .. } | E::NotModified { .. } => {
                Self::Exists
            }
            E::PermissionDenied { .. } | E::Unauthenticated { .. } => Self::Denied { reason },
            E::NotSupported { .. } | E::NotImplemented { .. } => Self::Unsupported { reason },
            E::InvalidPath { .. } | E::UnknownConfigurationKey { .. } => Self::Refused { reason },
            _ => Self::transient(reason),
        }
    }
}

/// Sorts what the operating system says about a local folder.
impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Self {
        Self::of_kind(error.kind(), error.to_string())
    }
}

impl Fault {
    fn of_kind(kind: io::ErrorKind, reason: String) -> Self {
        match kind {
            io::ErrorKind::NotFound => Self::NotFound,
            io::ErrorKind::AlreadyExists => Self::Exists,
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::Full { reason },
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                Self::Forbidden { reason }
            }
            _ => Self::transient(reason),
        }
    }
}

/// What a part of ours put into the chain of causes.
fn typed(error: &(dyn StdError + 'static)) -> Option<Fault> {
    let mut cause = Some(error);
    let mut is_network = false;
    while let Some(inner) = cause {
        // InvalidGetRange of object_store, which is not public
        if inner.to_string().starts_with("Wanted range starting at ") {
            return Some(Fault::PastEnd);
        }
        if let Some(answer) = inner.downcast_ref::<Answer>() {
            return Some(answer.fault());
        }
        if let Some(none) = inner.downcast_ref::<NoCredentials>() {
            let reason = none.to_string();
            return Some(Fault::Denied { reason });
        }
        if let Some(profile) = inner.downcast_ref::<ProfileError>() {
            let reason = profile.to_string();
            return Some(Fault::Denied { reason });
        }
        if inner.downcast_ref::<HttpError>().is_some() {
            is_network = true;
            let reason = innermost(inner);
            // neither will be otherwise later
            if reason.contains("invalid peer certificate") {
                return Some(Fault::Refused { reason });
            }
            if reason.contains("InvalidContentType") {
                let reason = format!("the endpoint does not speak TLS ({reason})");
                return Some(Fault::Refused { reason });
            }
        }
        // a folder's own words; a network's "permission denied" is a firewall's
        if let (false, Some(error)) = (is_network, inner.downcast_ref::<io::Error>()) {
            let fault = Fault::of_kind(error.kind(), innermost(inner));
            if matches!(fault, Fault::Full { .. } | Fault::Forbidden { .. }) {
                return Some(fault);
            }
        }
        cause = inner.source();
    }
    None
}

/// The words nearest to what happened, which lie below the library's.
fn innermost(error: &(dyn StdError + 'static)) -> String {
    let mut cause = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    cause.to_string()
}
