//! What went wrong, sorted by what to do about it.

use std::fmt;
use std::io;
use std::time::Duration;

use super::hint::{self, Circumstances};
use crate::authentication::LoginError;
use crate::connection::QueryError;
use crate::conninfo::TargetSessionAttrs;
use crate::framing::WireError;
use crate::server_error::ServerError;
use crate::tls::TlsError;

/// No server of the list would do.
#[derive(Debug)]
pub struct ConnectError {
    /// All that was asked for: `host=… port=… user=…`.
    pub server: String,
    /// What was tried, in order; never empty.
    pub attempts: Vec<Attempt>,
}

/// One try at one address.
#[derive(Debug)]
pub struct Attempt {
    /// Which: `host=… port=…`.
    pub server: String,
    /// Why it failed.
    pub error: AttemptError,
}

impl ConnectError {
    /// Whether trying again later may help with nothing changed by anyone: a server was not
    /// reachable, starting up, full, or not yet the one that was asked for. Where a server
    /// refused who we are, it does not.
    pub fn is_transient(&self) -> bool {
        match self.attempts.last() {
            Some(last) if last.error.ends_search() => false,
            _ => self
                .attempts
                .iter()
                .any(|attempt| attempt.error.is_transient()),
        }
    }

    /// Whether all attempts were at one address, and were refused alike: with TLS and without.
    fn is_one_answer(&self) -> bool {
        let sqlstate = |attempt: &Attempt| match &attempt.error {
            AttemptError::Refused { error, .. } | AttemptError::NotNow(error) => {
                Some(error.sqlstate.clone())
            }
            _ => None,
        };
        match self.attempts.as_slice() {
            [] | [_] => true,
            [first, rest @ ..] => rest.iter().all(|attempt| {
                let same = sqlstate(attempt).is_some() && sqlstate(attempt) == sqlstate(first);
                same && attempt.server == first.server
            }),
        }
    }

    /// What a server said in refusing us, the last if several did.
    pub fn server_error(&self) -> Option<&ServerError> {
        self.attempts
            .iter()
            .rev()
            .find_map(|attempt| match &attempt.error {
                AttemptError::Refused { error, .. } | AttemptError::NotNow(error) => Some(error),
                _ => None,
            })
    }
}

impl fmt::Display for ConnectError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot connect to {}: ", self.server)?;
        if let Some(last) = self.attempts.last().filter(|_| self.is_one_answer()) {
            return last.error.fmt(f);
        }
        for (at, attempt) in self.attempts.iter().enumerate() {
            let separator = if at == 0 { "" } else { "; " };
            write!(f, "{separator}{}: {}", attempt.server, attempt.error)?;
        }
        Ok(())
    }
}

impl std::error::Error for ConnectError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        None // every attempt is told in the message
    }
}

/// Why a server could not be connected to.
#[derive(Debug, thiserror::Error)]
pub enum AttemptError {
    /// Its name has no address.
    #[error("cannot resolve the host name: {0}")]
    Resolve(#[source] io::Error),
    /// Nobody answers there.
    #[error("cannot reach the server: {0}")]
    Unreachable(#[source] io::Error),
    /// It took too long.
    #[error("no connection within connect_timeout={} s", timeout.as_secs())]
    TimedOut {
        /// How long it had.
        timeout: Duration,
    },
    /// The connection was lost, or the peer does not speak the protocol.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// Keepalives or the like cannot be set.
    #[error("cannot set the socket's options: {0}")]
    SocketOptions(#[source] io::Error),
    /// Someone else than `requirepeer` runs the server.
    #[error("the server is not run by whom requirepeer names: expected={expected}, found={found}")]
    WrongPeer {
        /// Who should.
        expected: String,
        /// Who does.
        found: String,
    },
    /// TLS.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// Logging in, before the server judged it.
    #[error(transparent)]
    Login(LoginError),
    /// The server said no, for a reason that will not pass.
    #[error("{error}{}", hint.as_ref().map(|hint| format!("\nhint: {hint}")).unwrap_or_default())]
    Refused {
        /// What it said.
        error: ServerError,
        /// What to do about it.
        hint: Option<String>,
    },
    /// The server said no, for a reason that may pass: it is starting up, shutting down or full.
    #[error("{0}")]
    NotNow(ServerError),
    /// It is not the kind of server that was asked for.
    #[error("the server is not what target_session_attrs asks for: wanted={}", wanted.name())]
    NotWanted {
        /// What was asked for.
        wanted: TargetSessionAttrs,
    },
    /// It would not say which kind it is.
    #[error("cannot find out whether the server is what target_session_attrs asks for: {0}")]
    Undetermined(#[source] QueryError),
}

impl AttemptError {
    pub(super) fn of_login(error: LoginError, circumstances: &Circumstances) -> Self {
        match error {
            LoginError::Wire(error) => Self::Wire(error),
            LoginError::Server(error) if hint::may_pass(&error) => Self::NotNow(error),
            LoginError::Server(error) => {
                let hint = hint::for_refusal(&error, circumstances);
                Self::Refused { error, hint }
            }
            other => Self::Login(other),
        }
    }

    /// Whether trying again later may help with nothing changed by anyone.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Resolve(_)
            | Self::Unreachable(_)
            | Self::TimedOut { .. }
            | Self::NotNow(_)
            | Self::NotWanted { .. } => true,
            // TLS 1.3 tells of a client certificate that it does not like after the handshake
            Self::Wire(WireError::Read(error)) => !is_tls_alert(error),
            Self::Wire(error) => error.is_transient(),
            Self::Tls(error) => error.is_transient(),
            Self::Undetermined(error) => error.is_transient(),
            Self::SocketOptions(_)
            | Self::WrongPeer { .. }
            | Self::Login(_)
            | Self::Refused { .. } => false,
        }
    }

    /// Whether it is of no use to ask another server of the list.
    pub(super) fn ends_search(&self) -> bool {
        match self {
            Self::Login(_) | Self::Refused { .. } => true,
            Self::Tls(error) => error.is_local(),
            _ => false,
        }
    }

    /// Whether the same server might let us in with TLS where this was without, or the reverse.
    pub(super) fn may_depend_on_tls(&self) -> bool {
        match self {
            Self::Refused { .. } | Self::Wire(_) => true,
            Self::Tls(error) => !error.is_local(),
            _ => false,
        }
    }
}

fn is_tls_alert(error: &io::Error) -> bool {
    let inner = error
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<rustls::Error>());
    matches!(inner, Some(rustls::Error::AlertReceived(_)))
}
