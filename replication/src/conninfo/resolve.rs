//! From a connection string and the environment to checked settings.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use zeroize::Zeroizing;

use super::keywords::{self, KEYWORDS, Treatment};
use super::values::{
    CERTIFICATE_MODES, CHANNEL_BINDING_MODES, RequireAuth, SSL_MODES, SWITCHES,
    TARGET_SESSION_ATTRS, TLS_VERSIONS_MAX, TLS_VERSIONS_MIN, one_of,
};
use super::{
    ApplicationName, CertificateMode, ChannelBindingMode, ConnectionSettings, ConninfoError,
    DEFAULT_APPLICATION_NAME, Environment, FileChoice, Host, LoginSettings, Origin, Place, Roots,
    Secret, SslMode, TargetSessionAttrs, TcpSettings, TlsSettings, TlsVersion, syntax,
};
use crate::service_file;

/// PostgreSQL's own port (configure's `--with-pgport`).
const DEFAULT_PORT: u16 = 5432;

const DEFAULT_CONNECT_TIMEOUT: Duration = Duration::from_secs(30);

pub(super) fn resolve(
    conninfo: &str,
    environment: &Environment,
) -> Result<ConnectionSettings, ConninfoError> {
    let given = Given::gather(conninfo, environment)?;
    given.refuse_unsupported()?;
    let application_name = given.text("application_name");
    let fallback_name = given.text("fallback_application_name");
    Ok(ConnectionSettings {
        hosts: hosts(&given, environment)?,
        load_balance: given
            .one_of(
                "load_balance_hosts",
                &[("disable", false), ("random", true)],
            )?
            .unwrap_or(false),
        target_session_attrs: given
            .one_of("target_session_attrs", TARGET_SESSION_ATTRS)?
            .unwrap_or(TargetSessionAttrs::Any),
        user: given
            .text("user")
            .or_else(|| environment.user_name.clone())
            .ok_or(ConninfoError::NoUser)?,
        dbname: given.text("dbname"),
        application_name: ApplicationName {
            chosen: application_name.is_some() || fallback_name.is_some(),
            name: application_name
                .or(fallback_name)
                .unwrap_or_else(|| DEFAULT_APPLICATION_NAME.to_owned()),
        },
        options: given.text("options"),
        connect_timeout: match given.number::<i64>("connect_timeout", "expected seconds")? {
            None => Some(DEFAULT_CONNECT_TIMEOUT),
            Some(seconds) => u64::try_from(seconds)
                .ok()
                .filter(|seconds| *seconds > 0)
                .map(Duration::from_secs),
        },
        login: login(&given, environment)?,
        tls: tls(&given, environment)?,
        tcp: tcp(&given)?,
        require_peer: given.text("requirepeer"),
    })
}

/// Values by keyword, each with where it came from.
struct Given(BTreeMap<&'static str, (Zeroizing<String>, Origin)>);

impl Given {
    fn gather(conninfo: &str, environment: &Environment) -> Result<Self, ConninfoError> {
        let mut given = Self(BTreeMap::new());
        for (name, value) in syntax::parse(conninfo)? {
            // of a keyword that is given twice, libpq takes the last
            let (keyword, value) = known(&name, value, &Origin::ConnectionString)?;
            given.0.insert(keyword, (value, Origin::ConnectionString));
        }

        let service = given
            .text("service")
            .or_else(|| given.variable("service", environment, "PGSERVICE"));
        if let Some(service) = service {
            let named = given
                .text("servicefile")
                .or_else(|| given.variable("servicefile", environment, "PGSERVICEFILE"));
            let found =
                service_file::look_up(&service, named.as_deref().map(Path::new), environment)?;
            let origin = Origin::Service {
                service,
                path: found.path,
            };
            for (name, value) in found.pairs {
                let (keyword, value) = known(&name, value, &origin)?;
                // and of one that a service has twice, the first
                given
                    .0
                    .entry(keyword)
                    .or_insert_with(|| (value, origin.clone()));
            }
        }

        if environment
            .var("PGREQUIRESSL")
            .is_some_and(|value| value.starts_with('1'))
            && environment.var("PGSSLMODE").is_none()
        {
            let origin = Origin::Variable("PGREQUIRESSL");
            let require = Zeroizing::new("require".to_owned());
            given.0.entry("sslmode").or_insert((require, origin));
        }
        for keyword in KEYWORDS {
            let Some(variable) = keyword.variable else {
                continue;
            };
            let Some(value) = environment.var(variable) else {
                continue;
            };
            given
                .0
                .entry(keyword.name)
                .or_insert_with(|| (Zeroizing::new(value.to_owned()), Origin::Variable(variable)));
        }
        Ok(given)
    }

    /// An environment variable, unless its keyword was given, be it as empty.
    fn variable(&self, keyword: &str, environment: &Environment, variable: &str) -> Option<String> {
        let masked = self.0.contains_key(keyword);
        environment
            .var(variable)
            .filter(|value| !masked && !value.is_empty())
            .map(str::to_owned)
    }

    fn refuse_unsupported(&self) -> Result<(), ConninfoError> {
        let refuse = |keyword, reason, origin: &Origin| {
            Err(ConninfoError::Unsupported {
                keyword,
                reason,
                origin: origin.clone(),
            })
        };
        for (name, (value, origin)) in &self.0 {
            if value.is_empty() {
                continue;
            }
            if let Some(Treatment::Refused(reason)) = keywords::find(name).map(|k| k.treatment) {
                return refuse(name, reason, origin);
            }
            let value = value.as_str();
            match *name {
                "gssencmode" => match value {
                    "disable" | "prefer" => {}
                    _ => return refuse(name, "GSSAPI encryption is not spoken here", origin),
                },
                "client_encoding" => match value.to_ascii_lowercase().as_str() {
                    "auto" | "utf8" | "utf-8" | "unicode" => {}
                    _ => return refuse(name, "the encoding is always UTF-8", origin),
                },
                "replication" if value.eq_ignore_ascii_case("database") => {
                    return refuse(name, "replication is physical here", origin);
                }
                "min_protocol_version" => match value {
                    "3.0" => {}
                    _ => return refuse(name, "only protocol 3.0 is spoken here", origin),
                },
                "sslkey" if value.starts_with("engine:") || value.starts_with("pkcs11:") => {
                    return refuse(name, "a private key must be a file", origin);
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// The value of `keyword` and its origin; an empty one counts as none, though it hides what
    /// comes later in the order of precedence.
    fn get(&self, keyword: &str) -> Option<(&str, &Origin)> {
        let (value, origin) = self.0.get(keyword)?;
        (!value.is_empty()).then_some((value.as_str(), origin))
    }

    fn text(&self, keyword: &str) -> Option<String> {
        self.get(keyword).map(|(value, _)| value.to_owned())
    }

    fn origin(&self, keyword: &str) -> Origin {
        self.get(keyword)
            .map_or(Origin::ConnectionString, |(_, origin)| origin.clone())
    }

    fn one_of<T: Copy>(
        &self,
        keyword: &'static str,
        words: &[(&'static str, T)],
    ) -> Result<Option<T>, ConninfoError> {
        self.parsed(keyword, |value| one_of(value, words))
    }

    fn number<T: FromStr>(
        &self,
        keyword: &'static str,
        expected: &str,
    ) -> Result<Option<T>, ConninfoError> {
        self.parsed(keyword, |value| number(value, expected))
    }

    fn parsed<T>(
        &self,
        keyword: &'static str,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> Result<Option<T>, ConninfoError> {
        let Some((value, origin)) = self.get(keyword) else {
            return Ok(None);
        };
        let invalid = |expected| ConninfoError::Value {
            keyword,
            expected,
            value: value.to_owned(),
            origin: origin.clone(),
        };
        parse(value).map(Some).map_err(invalid)
    }

    /// A comma-separated list.
    fn list(&self, keyword: &str) -> Option<Vec<String>> {
        let value = self.text(keyword)?;
        Some(
            value
                .split(',')
                .map(|entry| entry.trim().to_owned())
                .collect(),
        )
    }

    fn file(&self, keyword: &str, environment: &Environment, default: &str) -> FileChoice {
        match self.text(keyword) {
            Some(path) => FileChoice::Named(PathBuf::from(path)),
            None => FileChoice::Default(environment.in_home(default)),
        }
    }
}

/// The keyword under its name in the table, and its value.
fn known(
    name: &str,
    value: Zeroizing<String>,
    origin: &Origin,
) -> Result<(&'static str, Zeroizing<String>), ConninfoError> {
    let Some(keyword) = keywords::find(name) else {
        // what is no word at all may be a piece of a password that lacks its quotes
        let is_word = name.len() <= 40
            && !name.is_empty()
            && name
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
        return Err(ConninfoError::UnknownKeyword {
            keyword: is_word.then(|| name.to_owned()),
            nearest: keywords::nearest(name),
            origin: origin.clone(),
        });
    };
    if keyword.name == "requiressl" {
        let mode = if value.starts_with('1') {
            "require"
        } else {
            "prefer"
        };
        return Ok(("sslmode", Zeroizing::new(mode.to_owned())));
    }
    Ok((keyword.name, value))
}

fn number<T: FromStr>(value: &str, expected: &str) -> Result<T, String> {
    value.trim().parse().ok().ok_or_else(|| expected.to_owned())
}

fn hosts(given: &Given, environment: &Environment) -> Result<Vec<Host>, ConninfoError> {
    let names = given.list("host").unwrap_or_default();
    let addresses = given.list("hostaddr").unwrap_or_default();
    let ports = given.list("port").unwrap_or_default();
    // as in libpq, `hostaddr` decides how many there are, then `host`
    let count = if addresses.is_empty() {
        names.len().max(1)
    } else {
        addresses.len()
    };
    let counted = |keyword, entries| ConninfoError::Counts {
        keyword,
        entries,
        hosts: count,
    };
    if !names.is_empty() && names.len() != count {
        return Err(counted("host", names.len()));
    }
    if ports.len() > 1 && ports.len() != count {
        return Err(counted("port", ports.len()));
    }

    let nonempty =
        |list: &[String], at: usize| list.get(at).filter(|entry| !entry.is_empty()).cloned();
    let mut hosts = Vec::with_capacity(count);
    for at in 0..count {
        let port = match nonempty(&ports, if ports.len() == 1 { 0 } else { at }) {
            None => DEFAULT_PORT,
            Some(port) => number::<u16>(&port, "")
                .ok()
                .filter(|port| *port > 0)
                .ok_or_else(|| ConninfoError::Value {
                    keyword: "port",
                    expected: "expected a number from 1 to 65535".to_owned(),
                    value: port,
                    origin: given.origin("port"),
                })?,
        };
        let name = nonempty(&names, at);
        let place = match nonempty(&addresses, at) {
            Some(address) => Place::Address {
                address: address
                    .parse::<IpAddr>()
                    .ok()
                    .ok_or_else(|| ConninfoError::Value {
                        keyword: "hostaddr",
                        expected: "expected an IPv4 or IPv6 address".to_owned(),
                        value: address,
                        origin: given.origin("hostaddr"),
                    })?,
                name: name.filter(|name| !is_socket_path(name)),
            },
            None => match name {
                Some(name) if is_socket_path(&name) => Place::Unix(name),
                Some(name) if name.contains('@') => {
                    return Err(ConninfoError::AtSignInHost {
                        origin: given.origin("host"),
                    });
                }
                Some(name) => Place::Name(name),
                None => default_place(port, environment),
            },
        };
        let passfile_name = passfile_name(&place, environment);
        hosts.push(Host {
            place,
            port,
            passfile_name,
        });
    }
    Ok(hosts)
}

/// libpq-int.h, `is_unixsock_path`: a path, or a name in the abstract name space.
fn is_socket_path(name: &str) -> bool {
    name.starts_with(['/', '@'])
}

fn default_place(port: u16, environment: &Environment) -> Place {
    let socket = format!(".s.PGSQL.{port}");
    environment
        .default_socket_dirs
        .iter()
        .find(|dir| dir.join(&socket).exists())
        .map_or_else(
            || Place::Name("localhost".to_owned()),
            |dir| Place::Unix(dir.to_string_lossy().into_owned()),
        )
}

fn passfile_name(place: &Place, environment: &Environment) -> String {
    match place {
        Place::Unix(dir)
            if environment
                .default_socket_dirs
                .iter()
                .any(|d| d == Path::new(dir)) =>
        {
            "localhost".to_owned()
        }
        Place::Unix(name)
        | Place::Name(name)
        | Place::Address {
            name: Some(name), ..
        } => name.clone(),
        Place::Address {
            address,
            name: None,
        } => address.to_string(),
    }
}

fn login(given: &Given, environment: &Environment) -> Result<LoginSettings, ConninfoError> {
    let require_auth = |value: &str| value.parse::<RequireAuth>().map_err(str::to_owned);
    Ok(LoginSettings {
        password: given
            .get("password")
            .map(|(value, origin)| (Secret::new(value.as_bytes()), origin.clone())),
        passfile: given
            .text("passfile")
            .map(PathBuf::from)
            .or_else(|| environment.in_home(".pgpass")),
        require_auth: given
            .parsed("require_auth", require_auth)?
            .unwrap_or_default(),
        channel_binding: given
            .one_of("channel_binding", CHANNEL_BINDING_MODES)?
            .unwrap_or(ChannelBindingMode::Prefer),
    })
}

fn tls(given: &Given, environment: &Environment) -> Result<TlsSettings, ConninfoError> {
    let roots = match given.get("sslrootcert") {
        Some(("system", _)) => Roots::System,
        _ => Roots::File(given.file("sslrootcert", environment, ".postgresql/root.crt")),
    };
    let mode = given.one_of("sslmode", SSL_MODES)?.unwrap_or(match roots {
        Roots::System => SslMode::VerifyFull,
        Roots::File(_) => SslMode::Prefer,
    });
    if roots == Roots::System && mode != SslMode::VerifyFull {
        return Err(ConninfoError::Conflict(
            "sslrootcert=system needs sslmode=verify-full: \
             anyone can get a certificate for some name",
        ));
    }
    let direct = given
        .one_of("sslnegotiation", &[("postgres", false), ("direct", true)])?
        .unwrap_or(false);
    if direct && mode < SslMode::Require {
        return Err(ConninfoError::Conflict(
            "sslnegotiation=direct needs sslmode=require, verify-ca or verify-full",
        ));
    }
    let version_min = given
        .one_of("ssl_min_protocol_version", TLS_VERSIONS_MIN)?
        .unwrap_or(TlsVersion::Tls12);
    let version_max = given
        .one_of("ssl_max_protocol_version", TLS_VERSIONS_MAX)?
        .unwrap_or(TlsVersion::Tls13);
    if version_min > version_max {
        return Err(ConninfoError::Conflict(
            "ssl_min_protocol_version is above ssl_max_protocol_version",
        ));
    }
    Ok(TlsSettings {
        mode,
        direct,
        roots,
        certificate_mode: given
            .one_of("sslcertmode", CERTIFICATE_MODES)?
            .unwrap_or(CertificateMode::Allow),
        certificate: given.file("sslcert", environment, ".postgresql/postgresql.crt"),
        key: given.file("sslkey", environment, ".postgresql/postgresql.key"),
        version_min,
        version_max,
        send_host_name: given.one_of("sslsni", SWITCHES)?.unwrap_or(true),
        default_crl: environment.in_home(".postgresql/root.crl"),
    })
}

fn tcp(given: &Given) -> Result<TcpSettings, ConninfoError> {
    // zero, and in libpq less, leave a value to the system
    let positive = |keyword| -> Result<Option<u32>, ConninfoError> {
        let value = given.number::<i32>(keyword, "expected a number")?;
        Ok(value
            .and_then(|value| u32::try_from(value).ok())
            .filter(|value| *value > 0))
    };
    let seconds = |value: u32| Duration::from_secs(u64::from(value));
    Ok(TcpSettings {
        keepalives: given
            .number::<i32>("keepalives", "expected 0 or 1")?
            .unwrap_or(1)
            != 0,
        idle: positive("keepalives_idle")?.map(seconds),
        interval: positive("keepalives_interval")?.map(seconds),
        count: positive("keepalives_count")?,
        user_timeout: positive("tcp_user_timeout")?
            .map(|value| Duration::from_millis(u64::from(value))),
    })
}
