//! From settings to a connection that is ready for commands.

mod error;
mod hint;
mod target;

use std::collections::BTreeMap;
use std::future::Future;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use postgres_protocol::message::backend::Message as Backend;
use postgres_protocol::message::frontend;
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream, lookup_host};
use tracing::{debug, warn};

use crate::authentication::{self, Channel, Login, LoginError, Password, Progress};
use crate::connection::Connection;
use crate::conninfo::{ConnectionSettings, Host, Place, SslMode, TargetSessionAttrs, TcpSettings};
use crate::framing::{Framed, WireError};
use crate::passfile::{self, Lookup, Wanted};
use crate::tls::{TlsClient, TlsError};

pub use error::{Attempt, AttemptError, ConnectError};
use hint::Circumstances;

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// SQL in a database.
    Sql,
    /// Physical replication: the commands of `repl_gram.y` and no SQL.
    Replication,
}

/// `SSLRequest`: its length and the code `NEGOTIATE_SSL_CODE` (pqcomm.h).
const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x2f];

/// More parameters than any server reports while logging in; further ones are left out.
const PARAMETERS_MAX: usize = 256;

/// Connects to the first server of the list that will do.
///
/// Every host is tried in order (or at random, `load_balance_hosts`), and every address of its
/// name; each address for at most `connect_timeout`. As in libpq, a server that can be reached
/// but refuses who we are ends the search: the others would too, and trying the same wrong
/// password on all of them locks accounts. One that is starting up, shutting down or full does
/// not end it.
///
/// With `sslmode=prefer` and `allow` the other way is tried where the first fails before the
/// server has asked for anything. libpq tries it after a wrong password too, which tells nothing
/// new.
///
/// On a replication connection the password file is asked for the database `replication`, as by
/// PostgreSQL's own tools, then for the one that the settings name.
///
/// # Errors
/// [`ConnectError`], with what went wrong at each.
pub async fn connect(
    settings: &ConnectionSettings,
    purpose: Purpose,
) -> Result<Connection, ConnectError> {
    let mut search = Search {
        settings,
        purpose,
        tls: None,
        attempts: Vec::new(),
        others_will_do: false,
    };
    let hosts = search.order(settings.hosts.clone());
    let passes: &[TargetSessionAttrs] = match settings.target_session_attrs {
        TargetSessionAttrs::PreferStandby => {
            &[TargetSessionAttrs::PreferStandby, TargetSessionAttrs::Any]
        }
        TargetSessionAttrs::Any => &[TargetSessionAttrs::Any],
        TargetSessionAttrs::ReadWrite => &[TargetSessionAttrs::ReadWrite],
        TargetSessionAttrs::ReadOnly => &[TargetSessionAttrs::ReadOnly],
        TargetSessionAttrs::Primary => &[TargetSessionAttrs::Primary],
        TargetSessionAttrs::Standby => &[TargetSessionAttrs::Standby],
    };
    for target in passes {
        for host in &hosts {
            match search.try_host(host, *target).await {
                Outcome::Connected(connection) => return Ok(*connection),
                Outcome::GoOn => {}
                Outcome::GiveUp => return Err(search.failed()),
            }
        }
        // a second pass helps only if the first met a server that was merely not a standby
        if !search.others_will_do {
            break;
        }
    }
    Err(search.failed())
}

struct Search<'a> {
    settings: &'a ConnectionSettings,
    purpose: Purpose,
    /// Made when the first host needs it: its files matter only then.
    tls: Option<TlsClient>,
    attempts: Vec<Attempt>,
    others_will_do: bool,
}

enum Outcome {
    Connected(Box<Connection>),
    GoOn,
    GiveUp,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Encryption {
    None,
    Tls,
}

/// One place to connect to.
#[derive(Clone, Debug)]
enum Address {
    Unix(String),
    Tcp(SocketAddr),
}

/// What an attempt that failed had learned.
struct Failure {
    error: AttemptError,
    /// The server had asked for a password by then.
    asked: bool,
}

impl<E: Into<AttemptError>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self {
            error: error.into(),
            asked: false,
        }
    }
}

impl Search<'_> {
    fn failed(self) -> ConnectError {
        ConnectError {
            server: self.settings.display(),
            attempts: self.attempts,
        }
    }

    /// In the order to try: as given, or shuffled.
    fn order<T>(&self, mut of: Vec<T>) -> Vec<T> {
        if self.settings.load_balance {
            // the standard library's hashers are seeded at random, which is enough for this
            let seed = RandomState::new();
            for last in (1..of.len()).rev() {
                let mut hasher = seed.build_hasher();
                hasher.write_usize(last);
                let bound = u64::try_from(last + 1).expect("a count of hosts is small");
                let chosen = hasher.finish() % bound;
                of.swap(
                    last,
                    usize::try_from(chosen).expect("below a count of hosts"),
                );
            }
        }
        of
    }

    async fn try_host(&mut self, host: &Host, target: TargetSessionAttrs) -> Outcome {
        let addresses = match resolve(host, self.settings.connect_timeout).await {
            Ok(addresses) => self.order(addresses),
            Err(error) => {
                self.note(described(host, None), error);
                return Outcome::GoOn;
            }
        };
        let password = self.password(host);
        for address in addresses {
            match self.try_address(host, &address, &password, target).await {
                Outcome::GoOn => {}
                done => return done,
            }
        }
        Outcome::GoOn
    }

    async fn try_address(
        &mut self,
        host: &Host,
        address: &Address,
        password: &Password,
        target: TargetSessionAttrs,
    ) -> Outcome {
        use Encryption::{None, Tls};
        let ways: &[Encryption] = match (address, self.settings.tls.mode) {
            // a Unix socket needs none, and servers refuse it there
            (Address::Unix(_), _) | (_, SslMode::Disable) => &[None],
            (_, SslMode::Allow) => &[None, Tls],
            (_, SslMode::Prefer) => &[Tls, None],
            (_, SslMode::Require | SslMode::VerifyCa | SslMode::VerifyFull) => &[Tls],
        };
        for (at, way) in ways.iter().enumerate() {
            let described = described(host, Some(address));
            let last = at + 1 == ways.len();
            let timeout = self.settings.connect_timeout;
            let tried = within(
                timeout,
                self.try_once(host, address, *way, password, &described),
            );
            let failure = match tried.await {
                Ok(Ok(connection)) => {
                    match within(timeout, target::check(connection, self.purpose, target)).await {
                        Ok(Ok(connection)) => return Outcome::Connected(Box::new(connection)),
                        Ok(Err(error)) => {
                            self.others_will_do |= matches!(error, AttemptError::NotWanted { .. });
                            Failure::from(error)
                        }
                        Err(error) => Failure::from(error),
                    }
                }
                Ok(Err(failure)) => failure,
                Err(error) => Failure::from(error),
            };
            let other_way = !last && !failure.asked && failure.error.may_depend_on_tls();
            let ends = failure.error.ends_search();
            self.note(described, failure.error);
            if ends && !other_way {
                return Outcome::GiveUp;
            }
            if !other_way {
                break;
            }
        }
        Outcome::GoOn
    }

    fn note(&mut self, server: String, error: AttemptError) {
        debug!(server, "attempt to connect failed: {error}");
        self.attempts.push(Attempt { server, error });
    }

    async fn try_once(
        &mut self,
        host: &Host,
        address: &Address,
        way: Encryption,
        password: &Password,
        described: &str,
    ) -> Result<Connection, Failure> {
        let settings = self.settings;
        let mut circumstances = Circumstances {
            user: settings.user.clone(),
            dbname: settings.dbname().to_owned(),
            purpose: self.purpose,
            local: matches!(address, Address::Unix(_)),
            encrypted: way == Encryption::Tls,
            our_address: None,
            password_from: match password {
                Password::Found { from, .. } => Some(from.clone()),
                Password::Missing { .. } => None,
            },
        };
        let (mut framed, channel) = match address {
            Address::Unix(name) => (open_unix(name, host.port, settings).await?, Channel::Local),
            Address::Tcp(address) => {
                let tcp = open_tcp(*address, &settings.tcp).await?;
                circumstances.our_address = tcp.local_addr().ok().map(|address| address.ip());
                match way {
                    Encryption::None => (Framed::new(tcp), Channel::Plain),
                    Encryption::Tls => self.secure(tcp, host, address.ip()).await?,
                }
            }
        };
        let login = Login {
            user: &settings.user,
            password,
            require_auth: &settings.login.require_auth,
            channel_binding: settings.login.channel_binding,
            channel,
        };
        let mut progress = Progress::NothingAsked;
        let (parameters, pid) =
            start_up(&mut framed, settings, self.purpose, &login, &mut progress)
                .await
                .map_err(|error| Failure {
                    error: AttemptError::of_login(error, &circumstances),
                    asked: progress != Progress::NothingAsked,
                })?;
        Ok(Connection::new(framed, parameters, described.to_owned()).with_backend_pid(pid))
    }

    /// Asks for TLS, unless it comes first, and agrees on a session; or stays without where the
    /// server has none and the user does not insist.
    async fn secure(
        &mut self,
        mut tcp: TcpStream,
        host: &Host,
        address: IpAddr,
    ) -> Result<(Framed, Channel), Failure> {
        let settings = &self.settings.tls;
        if self.tls.is_none() {
            self.tls = Some(TlsClient::new(settings)?);
        }
        let client = self.tls.as_ref().expect("was just made");
        if !settings.direct {
            tcp.write_all(&SSL_REQUEST).await.map_err(TlsError::Io)?;
            // one byte and no more: what comes after it is the handshake's
            match tcp.read_u8().await.map_err(TlsError::Io)? {
                b'S' => {}
                b'N' if settings.mode <= SslMode::Prefer => {
                    return Ok((Framed::new(tcp), Channel::Plain));
                }
                b'N' => return Err(TlsError::NotOffered.into()),
                b'E' => return Err(TlsError::AnsweredWithError.into()),
                other => {
                    return Err(TlsError::BadAnswer {
                        found: char::from(other),
                    }
                    .into());
                }
            }
        }
        let secured = client
            .handshake(tcp, host.place.certificate_name(), address)
            .await?;
        let channel = Channel::Tls {
            end_point: secured.end_point,
        };
        Ok((Framed::new(secured.stream), channel))
    }

    fn password(&self, host: &Host) -> Password {
        let login = &self.settings.login;
        if let Some((secret, origin)) = &login.password {
            return Password::Found {
                secret: secret.clone(),
                from: origin.to_string(),
            };
        }
        let mut searched = vec!["the connection string, PGPASSWORD".to_owned()];
        let Some(path) = &login.passfile else {
            return Password::Missing {
                searched: searched.join(", "),
            };
        };
        let dbnames: &[&str] = match self.purpose {
            Purpose::Sql => &[self.settings.dbname()],
            Purpose::Replication => &["replication", self.settings.dbname()],
        };
        for dbname in dbnames {
            let wanted = Wanted {
                host: &host.passfile_name,
                port: host.port,
                dbname,
                user: &self.settings.user,
            };
            let shown = path.display();
            let found = match passfile::look_up(path, &wanted) {
                Lookup::Found(secret) => {
                    return Password::Found {
                        secret,
                        from: shown.to_string(),
                    };
                }
                Lookup::NoEntry => {
                    let Wanted {
                        host, port, user, ..
                    } = wanted;
                    format!("no line for {host}:{port}:{dbname}:{user}")
                }
                Lookup::NoFile => "no such file".to_owned(),
                Lookup::TooOpen { mode } => {
                    warn!(
                        "password file is ignored, since others can read it; run `chmod 0600`: \
                         path={shown}, mode={mode:04o}"
                    );
                    format!("ignored, since others can read it: mode={mode:04o}")
                }
                Lookup::NotAFile => "not a file".to_owned(),
                Lookup::Unreadable(error) => error.to_string(),
            };
            let goes_on = found.starts_with("no line");
            searched.push(format!("{shown} ({found})"));
            if !goes_on {
                break;
            }
        }
        Password::Missing {
            searched: searched.join(", "),
        }
    }
}

impl ConnectionSettings {
    /// The same, for the one server of several that `connection` has led to.
    #[must_use]
    pub fn pinned_to(mut self, connection: &Connection) -> Self {
        let led_to = |host: &Host| may_be(host, connection.described());
        if let Some(host) = self.hosts.iter().find(|host| led_to(host)).cloned() {
            self.hosts = vec![host];
        }
        self
    }
}

impl ConnectionSettings {
    /// The same, for the other servers of the list than the one that `connection` has led to; `None`
    /// where there are none.
    #[must_use]
    pub fn without(mut self, connection: &Connection) -> Option<Self> {
        self.hosts
            .retain(|host| !may_be(host, connection.described()));
        (!self.hosts.is_empty()).then_some(self)
    }
}

/// Whether `described` is what a connection to this host is called, at any of its addresses.
fn may_be(host: &Host, described: &str) -> bool {
    let Host { place, port, .. } = host;
    let with_address = format!("host={place}(");
    described == format!("host={place} port={port}")
        || (described.starts_with(&with_address) && described.ends_with(&format!(") port={port}")))
}

fn described(host: &Host, address: Option<&Address>) -> String {
    let Host { place, port, .. } = host;
    match (place, address) {
        (Place::Name(name), Some(Address::Tcp(address))) if address.ip().to_string() != *name => {
            format!("host={name}({}) port={port}", address.ip())
        }
        _ => format!("host={place} port={port}"),
    }
}

async fn within<T>(
    timeout: Option<Duration>,
    future: impl Future<Output = T>,
) -> Result<T, AttemptError> {
    match timeout {
        None => Ok(future.await),
        Some(timeout) => tokio::time::timeout(timeout, future)
            .await
            .map_err(|_elapsed| AttemptError::TimedOut { timeout }),
    }
}

async fn resolve(host: &Host, timeout: Option<Duration>) -> Result<Vec<Address>, AttemptError> {
    match &host.place {
        Place::Unix(name) => Ok(vec![Address::Unix(name.clone())]),
        Place::Address { address, .. } => {
            Ok(vec![Address::Tcp(SocketAddr::new(*address, host.port))])
        }
        Place::Name(name) => {
            let found = within(timeout, lookup_host((name.as_str(), host.port)))
                .await?
                .map_err(AttemptError::Resolve)?;
            let mut addresses: Vec<SocketAddr> = found.collect();
            addresses.dedup();
            Ok(addresses.into_iter().map(Address::Tcp).collect())
        }
    }
}

async fn open_unix(
    name: &str,
    port: u16,
    settings: &ConnectionSettings,
) -> Result<Framed, AttemptError> {
    // pqcomm.h, UNIXSOCK_PATH; a leading @ means a zero byte to tokio as it does to libpq
    let path = format!("{name}/.s.PGSQL.{port}");
    let stream = match path.strip_prefix('@') {
        None => UnixStream::connect(&path).await,
        Some(rest) => UnixStream::connect(format!("\0{rest}")).await,
    }
    .map_err(AttemptError::Unreachable)?;
    if let Some(expected) = &settings.require_peer {
        let uid = stream.peer_cred().map_err(AttemptError::Unreachable)?.uid();
        let found = nix::unistd::User::from_uid(nix::unistd::Uid::from_raw(uid))
            .ok()
            .flatten();
        let found = found.map_or_else(|| format!("uid {uid}"), |user| user.name);
        if found != *expected {
            return Err(AttemptError::WrongPeer {
                expected: expected.clone(),
                found,
            });
        }
    }
    Ok(Framed::new(stream))
}

async fn open_tcp(address: SocketAddr, settings: &TcpSettings) -> Result<TcpStream, AttemptError> {
    let stream = TcpStream::connect(address)
        .await
        .map_err(AttemptError::Unreachable)?;
    stream
        .set_nodelay(true)
        .map_err(AttemptError::Unreachable)?;
    let socket = SockRef::from(&stream);
    let set = || {
        if settings.keepalives {
            let mut keepalive = TcpKeepalive::new();
            if let Some(idle) = settings.idle {
                keepalive = keepalive.with_time(idle);
            }
            if let Some(interval) = settings.interval {
                keepalive = keepalive.with_interval(interval);
            }
            if let Some(count) = settings.count {
                keepalive = keepalive.with_retries(count);
            }
            socket.set_keepalive(true)?;
            socket.set_tcp_keepalive(&keepalive)?;
        }
        if let Some(timeout) = settings.user_timeout {
            socket.set_tcp_user_timeout(Some(timeout))?;
        }
        Ok(())
    };
    set().map_err(AttemptError::SocketOptions)?;
    Ok(stream)
}

/// Sends the startup message, logs in, and reads until the server is ready: what it reported of
/// its parameters.
async fn start_up(
    framed: &mut Framed,
    settings: &ConnectionSettings,
    purpose: Purpose,
    login: &Login<'_>,
    progress: &mut Progress,
) -> Result<(BTreeMap<String, String>, Option<u32>), LoginError> {
    let mut asked = vec![
        ("user", settings.user.as_str()),
        ("application_name", settings.application_name()),
        ("client_encoding", "UTF8"),
    ];
    match purpose {
        Purpose::Sql => asked.push(("database", settings.dbname())),
        // the server needs no database for this; poolers and logs show what is sent
        Purpose::Replication => {
            asked.extend([("database", "replication"), ("replication", "true")]);
        }
    }
    if let Some(options) = &settings.options {
        asked.push(("options", options));
    }
    framed
        .queue_with(|out| frontend::startup_message(asked, out))
        .map_err(|reason| LoginError::Wire(WireError::Write(reason)))?;
    framed.flush().await?;
    authentication::log_in(framed, login, progress).await?;

    let mut parameters = BTreeMap::new();
    let mut pid = None;
    loop {
        match authentication::read(framed).await? {
            Backend::ParameterStatus(body) => {
                if let (Ok(name), Ok(value)) = (body.name(), body.value())
                    && parameters.len() < PARAMETERS_MAX
                {
                    parameters.insert(name.to_owned(), value.to_owned());
                }
            }
            // its key is for cancelling queries, which nothing here does
            Backend::BackendKeyData(body) => pid = u32::try_from(body.process_id()).ok(),
            Backend::ReadyForQuery(_) => return Ok((parameters, pid)),
            other => {
                let found = crate::framing::Message::Backend(other).name();
                return Err(LoginError::Unexpected { found });
            }
        }
    }
}
