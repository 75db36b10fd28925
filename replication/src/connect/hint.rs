//! What to do about a server's refusal.

use std::net::IpAddr;

use super::Purpose;
use crate::connection::identifier;
use crate::server_error::ServerError;

/// What is known of an attempt, for advice about its failure.
pub(super) struct Circumstances {
    pub(super) user: String,
    pub(super) dbname: String,
    pub(super) purpose: Purpose,
    /// By a Unix socket.
    pub(super) local: bool,
    pub(super) encrypted: bool,
    /// Ours, as far as this machine knows it.
    pub(super) our_address: Option<IpAddr>,
    pub(super) password_from: Option<String>,
}

/// Whether a refusal may pass with nothing changed by anyone (errcodes.txt).
pub(super) fn may_pass(error: &ServerError) -> bool {
    match error.sqlstate.as_str() {
        // too_many_connections, which with a limit of zero no waiting changes
        "53300" => !error.message.contains("(currently 0)"),
        // too little memory, disk or the like; shutting down, restarting, starting up
        "53000" | "53100" | "53200" | "57P01" | "57P02" | "57P03" => true,
        _ => false,
    }
}

/// Advice on a refusal, with the line or the command that helps.
pub(super) fn for_refusal(error: &ServerError, around: &Circumstances) -> Option<String> {
    let role = identifier(&around.user);
    match (error.sqlstate.as_str(), around.purpose) {
        ("28P01", _) => Some(match &around.password_from {
            Some(from) => format!("the password came from {from}; is the user {role} meant?"),
            None => "no password was found to send".to_owned(),
        }),
        ("28000", _) if error.message.contains("pg_hba.conf") => Some(format!(
            "is the user {role} meant? then add this line to the server's pg_hba.conf, and run \
             `SELECT pg_reload_conf()`: {}",
            pg_hba_line(error, around)
        )),
        ("28000", _) => Some(format!(
            "check that the role exists and may log in (CREATE ROLE {role} LOGIN REPLICATION), and \
             which pg_hba.conf line applies to it"
        )),
        ("42501", Purpose::Replication) => {
            Some(format!("run as a superuser: ALTER ROLE {role} REPLICATION"))
        }
        ("42501", Purpose::Sql) => Some(format!(
            "run as the database's owner: GRANT CONNECT ON DATABASE {} TO {role}",
            identifier(&around.dbname)
        )),
        ("3D000", Purpose::Sql) => {
            Some("name a database that exists, such as dbname=postgres".to_owned())
        }
        ("53300", Purpose::Replication) => Some(
            "the server allows no replication: set wal_level=replica (or logical) and \
             max_wal_senders=10, and restart it"
                .to_owned(),
        ),
        _ => None,
    }
}

/// The line that lets us in, for both sorts of connection: whoever lacks one lacks the other.
fn pg_hba_line(error: &ServerError, around: &Circumstances) -> String {
    let database = match around.purpose {
        Purpose::Replication if around.dbname == around.user => "postgres".to_owned(),
        _ => hba_word(&around.dbname),
    };
    let database = format!("{database},replication");
    let user = hba_word(&around.user);
    if around.local {
        return format!("local {database} {user} scram-sha-256");
    }
    let kind = if around.encrypted { "hostssl" } else { "host" };
    // the server's view of our address is what counts; it differs from ours behind a NAT
    let address = seen_address(&error.message).or(around.our_address);
    let address = address.map_or_else(
        || "all".to_owned(),
        |address| format!("{address}/{}", if address.is_ipv4() { 32 } else { 128 }),
    );
    format!("{kind} {database} {user} {address} scram-sha-256")
}

/// `no pg_hba.conf entry for … host "10.1.2.3", user …` (auth.c): the first quoted address.
fn seen_address(message: &str) -> Option<IpAddr> {
    // translations have other quotes and keep the address
    message
        .split(|c: char| !(c.is_ascii_hexdigit() || c == '.' || c == ':'))
        .filter(|word| word.contains(['.', ':']))
        .find_map(|word| word.parse().ok())
}

/// A name as a word of `pg_hba.conf`: quoted if it would mean something else bare.
fn hba_word(name: &str) -> String {
    let plain = name
        .bytes()
        .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_');
    let special = matches!(
        name,
        "all" | "replication" | "sameuser" | "samerole" | "samegroup" | ""
    );
    if plain && !special {
        name.to_owned()
    } else {
        format!("\"{}\"", name.replace('"', "\"\""))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn around(purpose: Purpose, local: bool) -> Circumstances {
        Circumstances {
            user: "Archiver".to_owned(),
            dbname: "postgres".to_owned(),
            purpose,
            local,
            encrypted: true,
            our_address: Some("192.0.2.7".parse().unwrap()),
            password_from: Some("PGPASSWORD".to_owned()),
        }
    }

    fn said(sqlstate: &str, message: &str) -> ServerError {
        ServerError {
            sqlstate: sqlstate.to_owned(),
            message: message.to_owned(),
            ..ServerError::default()
        }
    }

    #[test]
    fn a_missing_pg_hba_line_is_spelt_out() {
        let error = said(
            "28000",
            "no pg_hba.conf entry for replication connection from host \"10.1.2.3\", \
             user \"Archiver\", SSL encryption",
        );
        let hint = for_refusal(&error, &around(Purpose::Replication, false)).unwrap();
        assert!(
            hint.ends_with(r#"hostssl postgres,replication "Archiver" 10.1.2.3/32 scram-sha-256"#),
            "{hint}"
        );
        let hint = for_refusal(&error, &around(Purpose::Sql, true)).unwrap();
        assert!(
            hint.ends_with(r#"local postgres,replication "Archiver" scram-sha-256"#),
            "{hint}"
        );
        let german = said("28000", "kein pg_hba.conf-Eintrag für Host »2001:db8::9«");
        let hint = for_refusal(&german, &around(Purpose::Sql, false)).unwrap();
        assert!(hint.contains(" 2001:db8::9/128 "), "{hint}");
        let unknown = said(
            "28000",
            "pg_hba.conf rejects connection for host \"db.example\"",
        );
        let hint = for_refusal(&unknown, &around(Purpose::Sql, false)).unwrap();
        assert!(hint.contains(" 192.0.2.7/32 "), "{hint}");
    }

    #[test]
    fn a_missing_right_is_spelt_out_as_sql() {
        let error = said("42501", "permission denied to start WAL sender");
        let hint = for_refusal(&error, &around(Purpose::Replication, false)).unwrap();
        assert!(
            hint.contains(r#"ALTER ROLE "Archiver" REPLICATION"#),
            "{hint}"
        );
    }

    #[test]
    fn full_is_a_matter_of_time_and_switched_off_is_not() {
        let senders = "number of requested standby connections exceeds \"max_wal_senders\"";
        assert!(may_pass(&said(
            "53300",
            &format!("{senders} (currently 10)")
        )));
        assert!(!may_pass(&said(
            "53300",
            &format!("{senders} (currently 0)")
        )));
        assert!(may_pass(&said(
            "57P03",
            "the database system is starting up"
        )));
        assert!(!may_pass(&said("28P01", "password authentication failed")));
    }
}
