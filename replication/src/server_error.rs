//! What a server says in `ErrorResponse` and `NoticeResponse`.

use std::fmt;

use fallible_iterator::FallibleIterator;
use postgres_protocol::message::backend::{ErrorFields, ErrorResponseBody, NoticeResponseBody};

/// An error, or a notice, that the server sent.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ServerError {
    /// `ERROR`, `FATAL`, `PANIC`, or one of the notices; never translated (field V).
    pub severity: String,
    /// The five characters of the SQLSTATE (field C); see errcodes.txt.
    pub sqlstate: String,
    /// The message, in the server's language (field M).
    pub message: String,
    /// More about the cause (field D).
    pub detail: Option<String>,
    /// What to do about it (field H).
    pub hint: Option<String>,
}

impl ServerError {
    /// Reads an `ErrorResponse`.
    pub fn of_error(body: &ErrorResponseBody) -> Self {
        Self::of_fields(body.fields())
    }

    /// Reads a `NoticeResponse`.
    pub fn of_notice(body: &NoticeResponseBody) -> Self {
        Self::of_fields(body.fields())
    }

    /// Fields up to the first that is malformed: half an error says more than none.
    fn of_fields(mut fields: ErrorFields<'_>) -> Self {
        let mut error = Self::default();
        let mut translated_severity = String::new();
        while let Ok(Some(field)) = fields.next() {
            // Before a connection has settled on an encoding, servers send theirs.
            let value = String::from_utf8_lossy(field.value_bytes()).into_owned();
            match field.type_() {
                b'V' => error.severity = value,
                b'S' => translated_severity = value,
                b'C' => error.sqlstate = value,
                b'M' => error.message = value,
                b'D' => error.detail = Some(value),
                b'H' => error.hint = Some(value),
                _ => {}
            }
        }
        if error.severity.is_empty() {
            error.severity = translated_severity;
        }
        error
    }

    /// Whether the server ends the connection after this.
    pub fn ends_connection(&self) -> bool {
        matches!(self.severity.as_str(), "FATAL" | "PANIC")
    }

    /// Whether the same command may succeed later or on a new connection, with nothing changed:
    /// the connection or the server went away, is starting up, or has no connection free.
    pub fn is_transient(&self) -> bool {
        // 57P01 admin_shutdown, 57P02 crash_shutdown, 57P03 cannot_connect_now,
        // 53300 too_many_connections, class 08 connection exception
        matches!(
            self.sqlstate.as_str(),
            "57P01" | "57P02" | "57P03" | "53300"
        ) || self.sqlstate.starts_with("08")
    }
}

/// Whether an error of this SQLSTATE may pass with nothing changed by anyone, on this connection or a
/// new one: a statement that was cancelled or timed out, memory or disk that ran out, a file that
/// could not be read, a conflict with another session. Not WAL that was removed (58P01).
pub fn may_pass(sqlstate: &str) -> bool {
    // errcodes.txt: 08 connection exception, 40 transaction rollback, 53 insufficient resources,
    // 57 operator intervention, 58 system error; 58P01 is undefined_file
    let class = sqlstate.get(..2).unwrap_or_default();
    matches!(class, "08" | "40" | "53" | "57" | "58") && sqlstate != "58P01"
}

impl fmt::Display for ServerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.severity, self.message)?;
        if let Some(detail) = &self.detail {
            write!(f, " ({detail})")?;
        }
        if let Some(hint) = &self.hint {
            write!(f, " (hint from the server: {hint})")?;
        }
        write!(f, " [SQLSTATE {}]", self.sqlstate)
    }
}

impl std::error::Error for ServerError {}

#[cfg(test)]
mod tests {
    use super::may_pass;

    #[test]
    fn removed_wal_does_not_come_back() {
        for passes in [
            "57014", "53100", "53200", "58030", "40P01", "57P03", "08006",
        ] {
            assert!(may_pass(passes), "{passes}");
        }
        for stays in ["58P01", "42501", "XX000", "28P01", "", "5"] {
            assert!(!may_pass(stays), "{stays}");
        }
    }
}
