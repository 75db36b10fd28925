//! Connection settings as libpq reads them: from a connection string, a service file, the `PG*`
//! environment variables, and defaults, in this order.

mod environment;
mod keywords;
mod resolve;
mod secret;
mod syntax;
#[cfg(test)]
mod tests;
mod values;

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use crate::service_file::ServiceFileError;

pub use environment::Environment;
pub use secret::Secret;
pub use syntax::SyntaxError;
pub use values::{
    AuthMethod, CertificateMode, ChannelBindingMode, RequireAuth, SslMode, TargetSessionAttrs,
    TlsVersion,
};

/// The name that the server shows for our connections unless another is asked for.
pub const DEFAULT_APPLICATION_NAME: &str = "anywhen";

/// What to connect to and how, read and checked; nothing is left to look up but what may change
/// between two attempts: names in DNS, the password file, certificates.
#[derive(Clone, Debug)]
pub struct ConnectionSettings {
    pub(crate) hosts: Vec<Host>,
    pub(crate) load_balance: bool,
    pub(crate) target_session_attrs: TargetSessionAttrs,
    pub(crate) user: String,
    pub(crate) dbname: Option<String>,
    pub(crate) application_name: ApplicationName,
    pub(crate) options: Option<String>,
    pub(crate) connect_timeout: Option<Duration>,
    pub(crate) login: LoginSettings,
    pub(crate) tls: TlsSettings,
    pub(crate) tcp: TcpSettings,
    /// `requirepeer`: the operating system's name for who runs the server behind a Unix socket.
    pub(crate) require_peer: Option<String>,
}

impl ConnectionSettings {
    /// Reads a connection string, `keyword=value` pairs or a URI, and completes it.
    ///
    /// What differs from libpq, all of it on the side of saying no or not waiting for ever:
    ///
    /// * Without any host, libpq takes the socket directory that it was built with, which is
    ///   `/tmp` upstream and `/var/run/postgresql` in distributions. One binary serves both: the
    ///   first of the two that holds a socket for the port is taken, else `localhost`.
    /// * `connect_timeout` is 30 s unless set, since nobody watches a service; 0 waits for ever.
    /// * What cannot be honoured (`sslcrl`, `sslpassword`, `gssencmode=require`, OAuth, …) is
    ///   refused, never ignored.
    /// * `client_encoding` is always UTF-8, and `replication` is ours to set.
    ///
    /// # Errors
    /// [`ConninfoError`]; no message holds a password.
    pub fn resolve(conninfo: &str, environment: &Environment) -> Result<Self, ConninfoError> {
        resolve::resolve(conninfo, environment)
    }

    /// Whether they name one host and no list.
    pub fn is_one_host(&self) -> bool {
        self.hosts.len() == 1
    }

    /// The same with this application name, which is the name that `synchronous_standby_names`
    /// matches, whatever the user set.
    #[must_use]
    pub fn with_application_name(mut self, name: &str) -> Self {
        self.application_name = ApplicationName {
            name: name.to_owned(),
            chosen: true,
        };
        self
    }

    /// The same with this application name, unless the user chose one.
    #[must_use]
    pub fn with_default_application_name(mut self, name: &str) -> Self {
        if !self.application_name.chosen {
            name.clone_into(&mut self.application_name.name);
        }
        self
    }

    /// The same, to another database.
    #[must_use]
    pub fn with_dbname(mut self, dbname: &str) -> Self {
        self.dbname = Some(dbname.to_owned());
        self
    }

    /// The application name that the server will show.
    pub fn application_name(&self) -> &str {
        &self.application_name.name
    }

    /// The role to log in as.
    pub fn user(&self) -> &str {
        &self.user
    }

    /// The database for SQL: the one that was named, else one named as the user, as in libpq.
    pub fn dbname(&self) -> &str {
        self.dbname.as_deref().unwrap_or(&self.user)
    }

    /// Whether a database was named; a replication connection needs none.
    pub fn names_dbname(&self) -> bool {
        self.dbname.is_some()
    }

    /// `host=… port=… user=…`, for logs and errors: never with the password.
    pub fn display(&self) -> String {
        let list =
            |of: fn(&Host) -> String| self.hosts.iter().map(of).collect::<Vec<_>>().join(",");
        let hosts = list(|host| host.place.to_string());
        let ports = list(|host| host.port.to_string());
        format!("host={hosts} port={ports} user={}", self.user)
    }
}

/// One server of the list to try.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Host {
    pub(crate) place: Place,
    pub(crate) port: u16,
    /// What the password file calls it.
    pub(crate) passfile_name: String,
}

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// In this directory, or with a leading `@` in the abstract name space, by a Unix socket.
    Unix(String),
    /// At what this name resolves to.
    Name(String),
    /// At this address (`hostaddr`); the name, if any, is for its certificate.
    Address {
        address: IpAddr,
        name: Option<String>,
    },
}

impl Place {
    /// The name that the server's certificate must bear.
    pub(crate) fn certificate_name(&self) -> Option<&str> {
        match self {
            Self::Unix(_) => None,
            Self::Name(name) => Some(name),
            Self::Address { name, .. } => name.as_deref(),
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(name) | Self::Name(name) => f.write_str(name),
            Self::Address {
                address,
                name: None,
            } => write!(f, "{address}"),
            Self::Address {
                address,
                name: Some(name),
            } => write!(f, "{name}({address})"),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ApplicationName {
    pub(crate) name: String,
    /// By the user, not by default.
    pub(crate) chosen: bool,
}

/// How to prove who we are.
#[derive(Clone, Debug)]
pub(crate) struct LoginSettings {
    pub(crate) password: Option<(Secret, Origin)>,
    pub(crate) passfile: Option<PathBuf>,
    pub(crate) require_auth: RequireAuth,
    pub(crate) channel_binding: ChannelBindingMode,
}

/// What TLS must hold to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TlsSettings {
    pub(crate) mode: SslMode,
    /// TLS from the first byte, without asking first (`sslnegotiation=direct`, PostgreSQL 17).
    pub(crate) direct: bool,
    pub(crate) roots: Roots,
    pub(crate) certificate_mode: CertificateMode,
    pub(crate) certificate: FileChoice,
    pub(crate) key: FileChoice,
    pub(crate) version_min: TlsVersion,
    pub(crate) version_max: TlsVersion,
    pub(crate) send_host_name: bool,
    /// Where a list of revoked certificates would be: libpq obeys it if it is there.
    pub(crate) default_crl: Option<PathBuf>,
}

/// Whom to trust with signing servers' certificates.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Roots {
    /// The operating system's authorities (`sslrootcert=system`).
    System,
    /// Those in a file.
    File(FileChoice),
}

/// A file that was named, or one in its default place, which need not exist.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum FileChoice {
    Named(PathBuf),
    /// Nothing if there is no home directory.
    Default(Option<PathBuf>),
}

/// What keeps a TCP connection alive, or finds out that it is not; unset is the system's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TcpSettings {
    pub(crate) keepalives: bool,
    pub(crate) idle: Option<Duration>,
    pub(crate) interval: Option<Duration>,
    pub(crate) count: Option<u32>,
    pub(crate) user_timeout: Option<Duration>,
}

/// Where a value came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The connection string.
    ConnectionString,
    /// A section of a service file.
    Service {
        /// The section's name.
        service: String,
        /// The file.
        path: PathBuf,
    },
    /// An environment variable.
    Variable(&'static str),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ConnectionString => f.write_str("the connection string"),
            Self::Service { service, path } => {
                write!(f, "service {service} in {}", path.display())
            }
            Self::Variable(name) => f.write_str(name),
        }
    }
}

/// Why connection settings are no good. All of these are for the user to correct.
#[derive(Debug, thiserror::Error)]
pub enum ConninfoError {
    /// The connection string itself.
    #[error(transparent)]
    Syntax(#[from] SyntaxError),
    /// A keyword that libpq does not know.
    #[error("unknown connection keyword{}: from={origin}", suggestion(keyword.as_deref(), *.nearest))]
    UnknownKeyword {
        /// The word, unless it looks like anything but a word.
        keyword: Option<String>,
        /// A known one that looks like it.
        nearest: Option<&'static str>,
        /// Where it stands.
        origin: Origin,
    },
    /// A value that its keyword does not take.
    #[error("invalid {keyword}: {expected}: value={value:?}, from={origin}")]
    Value {
        /// The keyword.
        keyword: &'static str,
        /// What it takes.
        expected: String,
        /// What it was given.
        value: String,
        /// Where it stands.
        origin: Origin,
    },
    /// A keyword that asks for what is not done here.
    #[error("{keyword} is not supported: {reason}: from={origin}")]
    Unsupported {
        /// The keyword.
        keyword: &'static str,
        /// Why not.
        reason: &'static str,
        /// Where it stands.
        origin: Origin,
    },
    /// Two settings that exclude each other.
    #[error("{0}")]
    Conflict(&'static str),
    /// Lists that do not match.
    #[error(
        "{keyword} has another number of entries than the hosts: entries={entries}, hosts={hosts}"
    )]
    Counts {
        /// The keyword whose list is too long or too short.
        keyword: &'static str,
        /// How many it has.
        entries: usize,
        /// How many hosts there are.
        hosts: usize,
    },
    /// A host name with an `@`: most likely a URI whose password has one. It is not shown.
    #[error(
        "a host name holds \"@\"; if the password in the URI has one, write it as %40: from={origin}"
    )]
    AtSignInHost {
        /// Where it stands.
        origin: Origin,
    },
    /// Nobody said whom to log in as.
    #[error("no user to log in as: the operating system has no name for this user; set user=…")]
    NoUser,
    /// The service that was named.
    #[error(transparent)]
    Service(#[from] ServiceFileError),
}

fn suggestion(keyword: Option<&str>, nearest: Option<&'static str>) -> String {
    let keyword = keyword
        .map(|keyword| format!(" {keyword:?}"))
        .unwrap_or_default();
    let nearest = nearest
        .map(|nearest| format!(" (did you mean {nearest:?}?)"))
        .unwrap_or_default();
    format!("{keyword}{nearest}")
}
