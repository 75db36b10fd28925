//! The keywords that libpq knows, and what this crate does with each.

/// What becomes of a keyword's value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Treatment {
    /// It takes effect.
    Honoured,
    /// It changes nothing here, and nothing is less safe for that: accepted.
    Harmless,
    /// It asks for something that this crate cannot do, for this reason.
    Refused(&'static str),
}

/// One keyword of a connection string.
#[derive(Debug)]
pub(crate) struct Keyword {
    pub(crate) name: &'static str,
    /// The environment variable that stands in for it.
    pub(crate) variable: Option<&'static str>,
    pub(crate) treatment: Treatment,
}

const fn honoured(name: &'static str, variable: &'static str) -> Keyword {
    Keyword {
        name,
        variable: Some(variable),
        treatment: Treatment::Honoured,
    }
}

const fn without_variable(name: &'static str) -> Keyword {
    Keyword {
        name,
        variable: None,
        treatment: Treatment::Honoured,
    }
}

const fn harmless(name: &'static str, variable: Option<&'static str>) -> Keyword {
    Keyword {
        name,
        variable,
        treatment: Treatment::Harmless,
    }
}

const fn refused(
    name: &'static str,
    variable: Option<&'static str>,
    reason: &'static str,
) -> Keyword {
    Keyword {
        name,
        variable,
        treatment: Treatment::Refused(reason),
    }
}

const NO_CRL: &str = "certificate revocation lists are not checked here";
const NO_OAUTH: &str = "OAuth is not supported; use scram-sha-256 or cert in pg_hba.conf";
const NO_KEYS: &str = "logging in by SCRAM keys is not supported; give the password";

/// Every keyword of libpq 19 and older (fe-connect.c, `PQconninfoOptions`).
pub(crate) const KEYWORDS: &[Keyword] = &[
    honoured("service", "PGSERVICE"),
    honoured("servicefile", "PGSERVICEFILE"),
    honoured("user", "PGUSER"),
    honoured("password", "PGPASSWORD"),
    honoured("passfile", "PGPASSFILE"),
    honoured("channel_binding", "PGCHANNELBINDING"),
    honoured("connect_timeout", "PGCONNECT_TIMEOUT"),
    honoured("dbname", "PGDATABASE"),
    honoured("host", "PGHOST"),
    honoured("hostaddr", "PGHOSTADDR"),
    honoured("port", "PGPORT"),
    honoured("client_encoding", "PGCLIENTENCODING"),
    honoured("options", "PGOPTIONS"),
    honoured("application_name", "PGAPPNAME"),
    without_variable("fallback_application_name"),
    without_variable("keepalives"),
    without_variable("keepalives_idle"),
    without_variable("keepalives_interval"),
    without_variable("keepalives_count"),
    without_variable("tcp_user_timeout"),
    honoured("sslmode", "PGSSLMODE"),
    honoured("sslnegotiation", "PGSSLNEGOTIATION"),
    harmless("sslcompression", Some("PGSSLCOMPRESSION")),
    honoured("sslcert", "PGSSLCERT"),
    honoured("sslkey", "PGSSLKEY"),
    honoured("sslcertmode", "PGSSLCERTMODE"),
    refused(
        "sslpassword",
        None,
        "encrypted private keys cannot be read; decrypt the key once with `openssl pkey`",
    ),
    honoured("sslrootcert", "PGSSLROOTCERT"),
    refused("sslcrl", Some("PGSSLCRL"), NO_CRL),
    refused("sslcrldir", Some("PGSSLCRLDIR"), NO_CRL),
    honoured("sslsni", "PGSSLSNI"),
    refused("sslkeylogfile", None, "TLS keys are never written out"),
    honoured("requirepeer", "PGREQUIREPEER"),
    honoured("require_auth", "PGREQUIREAUTH"),
    honoured("min_protocol_version", "PGMINPROTOCOLVERSION"),
    honoured("max_protocol_version", "PGMAXPROTOCOLVERSION"),
    honoured("ssl_min_protocol_version", "PGSSLMINPROTOCOLVERSION"),
    honoured("ssl_max_protocol_version", "PGSSLMAXPROTOCOLVERSION"),
    honoured("gssencmode", "PGGSSENCMODE"),
    harmless("krbsrvname", Some("PGKRBSRVNAME")),
    harmless("gsslib", Some("PGGSSLIB")),
    harmless("gssdelegation", Some("PGGSSDELEGATION")),
    without_variable("replication"),
    honoured("target_session_attrs", "PGTARGETSESSIONATTRS"),
    honoured("load_balance_hosts", "PGLOADBALANCEHOSTS"),
    refused("scram_client_key", None, NO_KEYS),
    refused("scram_server_key", None, NO_KEYS),
    refused("oauth_issuer", None, NO_OAUTH),
    refused("oauth_client_id", None, NO_OAUTH),
    refused("oauth_client_secret", None, NO_OAUTH),
    refused("oauth_scope", None, NO_OAUTH),
    refused("oauth_ca_file", None, NO_OAUTH),
    harmless("authtype", None),
    harmless("tty", None),
    without_variable("requiressl"),
];

/// The keyword of this name, if libpq knows it.
pub(crate) fn find(name: &str) -> Option<&'static Keyword> {
    KEYWORDS.iter().find(|keyword| keyword.name == name)
}

/// The known keyword that is spelt most like `name`, unless none is close.
pub(crate) fn nearest(name: &str) -> Option<&'static str> {
    // a keyword is short; longer input would only cost time, and is no misspelling of one
    if name.len() > 40 {
        return None;
    }
    let name = name.to_ascii_lowercase();
    KEYWORDS
        .iter()
        .map(|keyword| (edit_distance(&name, keyword.name), keyword.name))
        .min()
        .filter(|(distance, known)| *distance <= known.len().div_ceil(3).min(3))
        .map(|(_, known)| known)
}

/// Levenshtein's distance, in bytes.
fn edit_distance(left: &str, right: &str) -> usize {
    let mut row: Vec<usize> = (0..=right.len()).collect();
    for (i, a) in left.bytes().enumerate() {
        let mut diagonal = i;
        row[0] = i + 1;
        for (j, b) in right.bytes().enumerate() {
            let substituted = diagonal + usize::from(a != b);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[right.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_misspelt_keyword_finds_the_one_that_was_meant() {
        assert_eq!(nearest("hots"), Some("host"));
        assert_eq!(nearest("sslmod"), Some("sslmode"));
        assert_eq!(nearest("SSLMODE"), Some("sslmode"));
        assert_eq!(nearest("username"), None);
        assert_eq!(nearest("passwd"), Some("password"));
        assert_eq!(nearest("wal_segment_size"), None);
        assert_eq!(nearest(&"x".repeat(100_000)), None);
    }
}
