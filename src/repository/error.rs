//! Why something could not be stored or read, and what a user does about it.

use wal::{Lsn, TimelineId};

use super::keys::KeyError;
use super::layout::{self, ClusterName};
use super::records::FORMAT;
use super::store::StoreError;
use crate::error::{Error, Kind};

/// Why something could not be stored or read.
#[derive(Debug, thiserror::Error)]
pub enum RepositoryError {
    /// The store's own answer.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A key that is missing, or does not fit.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// Stored bytes are not what they should be.
    #[error("damaged object {path}: {reason}")]
    Damaged {
        /// Where.
        path: String,
        /// What was found.
        reason: String,
    },
    /// Another content is stored under this name.
    #[error("different bytes are already stored under {path}: stored={stored}, new={new}")]
    Conflict {
        /// Where.
        path: String,
        /// The digest of what is stored.
        stored: String,
        /// The digest of what was to be stored.
        new: String,
    },
    /// Two stored stretches of one timeline disagree.
    #[error("two histories: stored stretches differ at {lsn} on timeline {timeline}: {path}")]
    TwoHistories {
        /// Where they first differ.
        lsn: Lsn,
        /// The timeline.
        timeline: TimelineId,
        /// The object that disagrees with the others.
        path: String,
    },
    /// The cluster's name belongs to another system.
    #[error(
        "cluster {cluster} in {url} holds another system: stored={stored}, this server={found}"
    )]
    OtherSystem {
        /// The cluster's name.
        cluster: ClusterName,
        /// The repository.
        url: String,
        /// The system identifiers in the repository.
        stored: String,
        /// The system identifier of the server.
        found: u64,
    },
    /// Nothing is stored for the cluster.
    #[error("no cluster {cluster} in {url}{}", what_is(known))]
    NoCluster {
        /// The cluster's name.
        cluster: ClusterName,
        /// The repository.
        url: String,
        /// The clusters that are there, as far as that is known.
        known: Vec<String>,
    },
    /// The cluster is stored, and the system that was asked for is not.
    #[error(
        "no system {system_id} of cluster {cluster} in {url}{}",
        what_is(known)
    )]
    NoSystem {
        /// The system identifier.
        system_id: u64,
        /// The cluster's name.
        cluster: ClusterName,
        /// The repository.
        url: String,
        /// The systems that are there.
        known: Vec<String>,
    },
    /// What was stored a while ago is not there.
    #[error("what was stored in {url} is not there any more")]
    Gone {
        /// The repository.
        url: String,
    },
    /// The server's segment size was changed.
    #[error(
        "the WAL segment size has changed: stored={stored} bytes, this server={found} bytes ({path})"
    )]
    OtherSegmentSize {
        /// The size of what is stored.
        stored: u64,
        /// The server's.
        found: u64,
        /// A stored object of that size.
        path: String,
    },
    /// Several systems live under the name, and none was chosen.
    #[error("cluster {cluster} in {url} holds several systems: {systems}")]
    SeveralSystems {
        /// The cluster's name.
        cluster: ClusterName,
        /// The repository.
        url: String,
        /// Their system identifiers.
        systems: String,
    },
    /// A place could not be asked a moment ago.
    #[error("{reason}")]
    Silent {
        /// What it said then.
        reason: String,
    },
    /// The repository is encrypted, and nothing here says to whom.
    #[error("{url} holds encrypted objects, and no recipients are configured for it")]
    NotPlain {
        /// The repository.
        url: String,
    },
    /// Another process uses the spool.
    #[error("the spool is in use by another process: {path}")]
    SpoolHeld {
        /// The file that is locked.
        path: String,
    },
    /// The spool's folder cannot be used.
    #[error("cannot use the spool {dir}: {reason}")]
    SpoolFolder {
        /// The folder.
        dir: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The spool would be emptied into itself.
    #[error("the spool {dir} and the repository {url} share a folder")]
    SpoolInRepository {
        /// The spool's folder.
        dir: String,
        /// The repository.
        url: String,
    },
    /// What is sealed for one repository cannot be copied to another.
    #[error("a spool needs repositories that encrypt alike: {first} and {other} do not")]
    SpoolUnlike {
        /// The first repository's name.
        first: String,
        /// Another one's.
        other: String,
    },
    /// The repository holds another content than the spool.
    #[error(
        "two histories: the spooled object {spooled} differs from what is stored under {path}: \
         stored={stored}, spooled={new}"
    )]
    SpoolConflict {
        /// Where it lies in the spool, and stays.
        spooled: String,
        /// Where it would go.
        path: String,
        /// The digest of what is stored there.
        stored: String,
        /// The digest of what is spooled.
        new: String,
    },
    /// Every place was passed over.
    #[error("no repository of the cluster took it")]
    NoPlace,
    /// A task of ours ended before its time.
    #[error("a write was interrupted")]
    Interrupted,
    /// Written by a later version.
    #[error("{path} was written in repository format {format}; this build reads up to {FORMAT}")]
    Newer {
        /// Where.
        path: String,
        /// Its format.
        format: u32,
    },
}

impl RepositoryError {
    /// There is no object at this path.
    pub(super) fn absent(path: String) -> Self {
        Self::Store(StoreError::NotFound { path })
    }

    /// Whether the answer is that there is no such object.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Store(StoreError::NotFound { .. }))
    }

    /// Whether it is the key of an object that is missing or damaged, or one where there is none.
    pub fn is_damaged_key(&self) -> bool {
        matches!(self, Self::Key(error) if error.is_damage())
    }

    /// Whether what is stored must be distrusted.
    pub fn is_damage(&self) -> bool {
        match self {
            Self::Damaged { .. } => true,
            Self::Key(error) => error.is_damage(),
            _ => false,
        }
    }

    /// Whether what was asked for is sealed, and its key is not at hand.
    pub fn lacks_key(&self) -> bool {
        matches!(self, Self::Key(error) if error.lacks_key())
    }

    /// Whether another attempt may succeed.
    pub fn is_unreachable(&self) -> bool {
        match self {
            Self::Store(error) => error.may_pass(),
            Self::Key(error) => error.is_unreachable(),
            Self::Gone { .. } | Self::NoPlace | Self::Silent { .. } => true,
            _ => false,
        }
    }
}

/// What there is instead, where there is anything.
fn what_is(known: &[String]) -> String {
    match known {
        [] => String::new(),
        known => format!(": stored={}", known.join(", ")),
    }
}

impl From<layout::InvalidClusterName> for Error {
    fn from(error: layout::InvalidClusterName) -> Self {
        Self::usage(error.to_string())
    }
}

impl From<layout::InvalidBackupId> for Error {
    fn from(error: layout::InvalidBackupId) -> Self {
        Self::usage(error.to_string()).hint("`anywhen list` shows the ids")
    }
}

impl From<RepositoryError> for Error {
    fn from(error: RepositoryError) -> Self {
        let message = error.to_string();
        match error {
            RepositoryError::Store(inner) => inner.into(),
            RepositoryError::Key(inner) => inner.into(),
            RepositoryError::Damaged { .. } => Self::damaged(message)
                .hint("restore this object from a copy of the repository, or use another backup"),
            RepositoryError::SpoolHeld { .. } => Self::failure(message)
                .hint("another `anywhen stream` of this cluster runs here: stop it, or give this \
                       one another --spool-dir"),
            RepositoryError::SpoolFolder { .. } => {
                Self::usage(message).hint("give the spool a folder that this user may write to")
            }
            RepositoryError::SpoolInRepository { .. } => {
                Self::usage(message).hint("give the spool a folder of its own")
            }
            RepositoryError::SpoolUnlike { .. } => Self::usage(message)
                .hint("give all repositories of the cluster the same recipients, or leave out spool_dir"),
            RepositoryError::SpoolConflict { .. } => Self::damaged(message).hint(
                "two servers wrote the same WAL positions; the spooled object stays where it is: \
                 move it away once you know which one is right",
            ),
            RepositoryError::Conflict { .. } | RepositoryError::TwoHistories { .. } => {
                Self::damaged(message).hint(
                    "two servers wrote the same WAL positions (a copy that kept archiving, or a \
                     server set back): give each its own cluster name",
                )
            }
            RepositoryError::OtherSystem { .. } => Self::usage(message).hint(
                "use another --cluster name, or --new-system if this server replaces the old one",
            ),
            RepositoryError::NoCluster { known, .. } if known.is_empty() => {
                Self::not_found(message)
                    .hint("check --repo and --cluster; `anywhen list` shows what is stored")
            }
            RepositoryError::NoCluster { .. } => {
                Self::not_found(message).hint("name one that is stored with --cluster")
            }
            RepositoryError::NoSystem { .. } => {
                Self::not_found(message).hint("name one that is stored with --system-id")
            }
            RepositoryError::Gone { .. } => Self::new(Kind::Unreachable, message)
                .hint("is the disk mounted? nothing is acknowledged until it is back"),
            RepositoryError::NoPlace | RepositoryError::Silent { .. } => {
                Self::new(Kind::Unreachable, message)
                    .hint("check that one of the cluster's repositories can be reached")
            }
            RepositoryError::NotPlain { .. } => Self::usage(message).hint(
                "set recipients (--recipient) to go on writing encrypted; a plain repository needs a \
                 place of its own",
            ),
            RepositoryError::Interrupted => Self::failure(message),
            RepositoryError::OtherSegmentSize { .. } => {
                Self::usage(message).hint("give the server another --cluster name")
            }
            RepositoryError::SeveralSystems { .. } => {
                Self::usage(message).hint("name one with --system-id")
            }
            RepositoryError::Newer { .. } => {
                Self::new(Kind::Failure, message).hint("upgrade anywhen")
            }
        }
    }
}
