//! What goes to standard output and standard error: a closed pipe ends quietly.

use std::io::{self, IsTerminal as _, Write as _};

use serde::Serialize;

use crate::error::{Error, Result};

/// Prints a line on standard output.
pub(super) fn line(text: &str) -> Result<()> {
    quiet_when_closed(writeln!(io::stdout().lock(), "{text}"))
}

/// Prints one JSON document on standard output.
pub(super) fn json<T: Serialize>(value: &T) -> Result<()> {
    let text = serde_json::to_string_pretty(value)
        .map_err(|error| Error::failure(format!("cannot print JSON: {error}")))?;
    line(&text)
}

/// Says why a command failed: for people on standard error, and as JSON if that was asked for.
pub(super) fn failure(error: &Error, as_json: bool) {
    if as_json {
        failure_document(error);
    }
    if writeln!(io::stderr().lock(), "anywhen: {error}").is_err() {
        tracing::debug!("standard error is closed");
    }
}

/// Prints why a command failed as JSON on standard output.
pub(super) fn failure_document(error: &Error) {
    #[derive(Serialize)]
    struct Failure<'a> {
        schema: u32,
        error: Body<'a>,
    }
    #[derive(Serialize)]
    struct Body<'a> {
        kind: &'a str,
        message: &'a str,
        hint: Option<&'a str>,
        nearest: Option<&'a crate::error::Nearest>,
    }
    let body = Body {
        kind: error.kind().word(),
        message: error.message(),
        hint: error.hint_text(),
        nearest: error.nearest_reachable(),
    };
    let document = Failure {
        schema: 1,
        error: body,
    };
    if json(&document).is_err() {
        tracing::debug!("standard output is closed");
    }
}

/// Whether progress can be drawn in place.
pub(super) fn draws_progress() -> bool {
    io::stderr().is_terminal()
}

fn quiet_when_closed(written: io::Result<()>) -> Result<()> {
    match written {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(Error::failure(format!("cannot print: {error}")))
        }
        _ => Ok(()),
    }
}
