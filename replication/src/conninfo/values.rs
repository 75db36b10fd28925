//! The values that keywords take, as types.

use std::str::FromStr;

/// How much of TLS is wanted: libpq's `sslmode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum SslMode {
    /// Never.
    Disable,
    /// Only where the server refuses us without.
    Allow,
    /// Where the server has it; the default.
    Prefer,
    /// Always; whose certificate it is matters only where a root certificate file is there.
    Require,
    /// Always, and the certificate must come from a trusted authority.
    VerifyCa,
    /// Always, and the certificate must be this host's.
    VerifyFull,
}

/// `channel_binding`: whether the password exchange is tied to the TLS session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChannelBindingMode {
    /// Not even where it is possible.
    Disable,
    /// Where the server offers it; the default.
    Prefer,
    /// Or no connection: a server, or one who poses as it, that asks otherwise is refused.
    Require,
}

/// `target_session_attrs`: which server of several will do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TargetSessionAttrs {
    /// The first that lets us in; the default.
    Any,
    /// One that takes writes by default.
    ReadWrite,
    /// One that does not.
    ReadOnly,
    /// One that is not in recovery.
    Primary,
    /// One that is in recovery.
    Standby,
    /// A standby, or any if there is none.
    PreferStandby,
}

impl TargetSessionAttrs {
    /// As written in a connection string.
    pub fn name(self) -> &'static str {
        match self {
            Self::Any => "any",
            Self::ReadWrite => "read-write",
            Self::ReadOnly => "read-only",
            Self::Primary => "primary",
            Self::Standby => "standby",
            Self::PreferStandby => "prefer-standby",
        }
    }
}

/// `sslcertmode`: whether a client certificate is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CertificateMode {
    /// Never, even if there is one.
    Disable,
    /// If there is one and the server asks; the default.
    Allow,
    /// Or no connection: the server must ask for one.
    Require,
}

/// A version of TLS that can be spoken here; 1.0 and 1.1 cannot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum TlsVersion {
    /// 1.2
    Tls12,
    /// 1.3
    Tls13,
}

/// A way to log in that `require_auth` can name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AuthMethod {
    /// The password in clear text.
    Password,
    /// The salted MD5 of it.
    Md5,
    /// SCRAM-SHA-256, with channel binding or without.
    ScramSha256,
    /// The server asks for nothing, which it may also do where a client certificate is enough.
    None,
}

impl AuthMethod {
    /// Every method that can be used here.
    pub const ALL: [Self; 4] = [Self::Password, Self::Md5, Self::ScramSha256, Self::None];

    /// As written in `require_auth`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Password => "password",
            Self::Md5 => "md5",
            Self::ScramSha256 => "scram-sha-256",
            Self::None => "none",
        }
    }
}

/// `require_auth`: which ways of logging in the server may ask for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequireAuth {
    allowed: Vec<AuthMethod>,
}

impl Default for RequireAuth {
    fn default() -> Self {
        Self {
            allowed: AuthMethod::ALL.to_vec(),
        }
    }
}

impl RequireAuth {
    /// Whether the server may ask for `method`.
    pub fn allows(&self, method: AuthMethod) -> bool {
        self.allowed.contains(&method)
    }

    /// The names of what is allowed, for an error.
    pub fn names(&self) -> String {
        self.allowed
            .iter()
            .map(|method| method.name())
            .collect::<Vec<_>>()
            .join(",")
    }
}

impl FromStr for RequireAuth {
    /// What is wrong, without the keyword.
    type Err = &'static str;

    /// A comma-separated list, all of its entries with a leading `!` or none; names that only libpq
    /// can honour (`gss`, `sspi`, `oauth`) may stand in it, but not alone.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.is_empty() {
            return Ok(Self::default());
        }
        let negative = text.starts_with('!');
        let mut named = Vec::new();
        for entry in text.split(',') {
            let name = match (entry.strip_prefix('!'), negative) {
                (Some(name), true) => name,
                (None, false) => entry,
                _ => return Err("methods with and without \"!\" cannot be mixed"),
            };
            let method = AuthMethod::ALL
                .into_iter()
                .find(|method| method.name() == name);
            match method {
                Some(method) if named.contains(&method) => return Err("a method is named twice"),
                Some(method) => named.push(method),
                None if matches!(name, "gss" | "sspi" | "oauth") => {}
                None => return Err("expected password, md5, scram-sha-256 or none"),
            }
        }
        let allowed: Vec<_> = AuthMethod::ALL
            .into_iter()
            .filter(|method| named.contains(method) != negative)
            .collect();
        if allowed.is_empty() {
            return Err(
                "nothing is left that can be done here: password, md5, scram-sha-256, none",
            );
        }
        Ok(Self { allowed })
    }
}

/// Reads one of a closed list of words; the list itself is the error.
pub(crate) fn one_of<T: Copy>(text: &str, words: &[(&'static str, T)]) -> Result<T, String> {
    words
        .iter()
        .find(|(word, _)| *word == text)
        .map(|(_, value)| *value)
        .ok_or_else(|| {
            let words: Vec<_> = words.iter().map(|(word, _)| *word).collect();
            format!("expected {}", words.join(", "))
        })
}

pub(crate) const SSL_MODES: &[(&str, SslMode)] = &[
    ("disable", SslMode::Disable),
    ("allow", SslMode::Allow),
    ("prefer", SslMode::Prefer),
    ("require", SslMode::Require),
    ("verify-ca", SslMode::VerifyCa),
    ("verify-full", SslMode::VerifyFull),
];

pub(crate) const CHANNEL_BINDING_MODES: &[(&str, ChannelBindingMode)] = &[
    ("disable", ChannelBindingMode::Disable),
    ("prefer", ChannelBindingMode::Prefer),
    ("require", ChannelBindingMode::Require),
];

pub(crate) const TARGET_SESSION_ATTRS: &[(&str, TargetSessionAttrs)] = &[
    ("any", TargetSessionAttrs::Any),
    ("read-write", TargetSessionAttrs::ReadWrite),
    ("read-only", TargetSessionAttrs::ReadOnly),
    ("primary", TargetSessionAttrs::Primary),
    ("standby", TargetSessionAttrs::Standby),
    ("prefer-standby", TargetSessionAttrs::PreferStandby),
];

pub(crate) const CERTIFICATE_MODES: &[(&str, CertificateMode)] = &[
    ("disable", CertificateMode::Disable),
    ("allow", CertificateMode::Allow),
    ("require", CertificateMode::Require),
];

/// A lower bound: below 1.2 it is met by every version that is spoken here.
pub(crate) const TLS_VERSIONS_MIN: &[(&str, TlsVersion)] = &[
    ("TLSv1", TlsVersion::Tls12),
    ("TLSv1.1", TlsVersion::Tls12),
    ("TLSv1.2", TlsVersion::Tls12),
    ("TLSv1.3", TlsVersion::Tls13),
];

pub(crate) const TLS_VERSIONS_MAX: &[(&str, TlsVersion)] = &[
    ("TLSv1.2", TlsVersion::Tls12),
    ("TLSv1.3", TlsVersion::Tls13),
];

pub(crate) const SWITCHES: &[(&str, bool)] = &[("0", false), ("1", true)];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn require_auth_lists_are_read_as_libpq_reads_them() {
        let allowed = |text: &str| text.parse::<RequireAuth>().map(|list| list.names());
        assert_eq!(
            allowed("").as_deref(),
            Ok("password,md5,scram-sha-256,none")
        );
        assert_eq!(allowed("scram-sha-256").as_deref(), Ok("scram-sha-256"));
        assert_eq!(
            allowed("md5,scram-sha-256").as_deref(),
            Ok("md5,scram-sha-256")
        );
        assert_eq!(
            allowed("!password,!none").as_deref(),
            Ok("md5,scram-sha-256")
        );
        assert_eq!(allowed("gss,md5").as_deref(), Ok("md5"));
        assert_eq!(
            allowed("!gss").as_deref(),
            Ok("password,md5,scram-sha-256,none")
        );
        for refused in [
            "gss",
            "oauth,sspi",
            "md5,!none",
            "!none,md5",
            "md5,md5",
            "scram",
            "md5,",
        ] {
            assert!(allowed(refused).is_err(), "{refused}");
        }
        assert!(allowed("!password,!md5,!scram-sha-256,!none").is_err());
    }
}
