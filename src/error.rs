//! What a command says when it fails: one sentence, a next step, and an exit code.
//!
//! Parts with errors that other code decides on have closed enums of their own; here they become
//! what a person or a script is told.

use std::fmt;
use std::process::ExitCode;

/// What the reader of an error does next; decides the exit code (DESIGN.md, "Exit codes").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Anything that fits none of the others: exit code 1.
    Failure,
    /// Wrong flags or settings, or missing rights: exit code 2.
    Usage,
    /// A target that cannot be reached, or a thing that is not there: exit code 3.
    NotFound,
    /// The repository or the server could not be reached: exit code 4.
    Unreachable,
    /// Stored or received bytes are not what they should be: exit code 5.
    Damaged,
    /// Stopped by a signal: exit code 128 + the signal's number.
    Stopped(u8),
}

impl Kind {
    /// The process's exit code.
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Failure => 1,
            Self::Usage => 2,
            Self::NotFound => 3,
            Self::Unreachable => 4,
            Self::Damaged => 5,
            Self::Stopped(signal) => 128u8.saturating_add(signal),
        }
    }

    /// The word in `"error":{"kind":…}`.
    pub fn word(self) -> &'static str {
        match self {
            Self::Failure => "failure",
            Self::Usage => "usage",
            Self::NotFound => "not_found",
            Self::Unreachable => "unreachable",
            Self::Damaged => "damaged",
            Self::Stopped(_) => "stopped",
        }
    }
}

/// The nearest moments or positions that could be reached instead.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct Nearest {
    /// The last one before what was asked for.
    pub before: Option<String>,
    /// The first one after it.
    pub after: Option<String>,
}

/// A failure as the user reads it.
#[derive(Debug)]
pub struct Error {
    inner: Box<Inner>,
}

#[derive(Debug)]
struct Inner {
    kind: Kind,
    message: String,
    hint: Option<String>,
    nearest: Option<Nearest>,
    is_reported: bool,
    may_pass: bool,
    is_of_store: bool,
}

/// The result of a command or a part of one.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// A failure of `kind`, said in one lower-case sentence.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self {
            inner: Box::new(Inner {
                kind,
                message: message.into(),
                hint: None,
                nearest: None,
                is_reported: false,
                may_pass: false,
                is_of_store: false,
            }),
        }
    }

    /// Wrong flags or settings.
    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(Kind::Usage, message)
    }

    /// A failure that fits no other kind.
    pub fn failure(message: impl Into<String>) -> Self {
        Self::new(Kind::Failure, message)
    }

    /// Something that is not there, or cannot be reached in time.
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(Kind::NotFound, message)
    }

    /// Bytes that are not what they should be.
    pub fn damaged(message: impl Into<String>) -> Self {
        Self::new(Kind::Damaged, message)
    }

    /// Says what to do next.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.inner.hint = Some(hint.into());
        self
    }

    /// Names what could be reached instead.
    #[must_use]
    pub fn nearest(mut self, nearest: Nearest) -> Self {
        self.inner.nearest = Some(nearest);
        self
    }

    /// Puts what was being done before the message.
    #[must_use]
    pub fn context(mut self, doing: impl fmt::Display) -> Self {
        self.inner.message = format!("{doing}: {}", self.inner.message);
        self
    }

    /// Adds what else was found, and what to do about that.
    #[must_use]
    pub fn note(mut self, found: &str, todo: Option<&str>) -> Self {
        self.inner.message.push_str("; besides, ");
        self.inner.message.push_str(found);
        if let Some(todo) = todo {
            self.inner.hint = Some(match self.inner.hint.take() {
                Some(hint) => format!("{hint}; for the backup: {todo}"),
                None => todo.to_owned(),
            });
        }
        self
    }

    /// The report that was printed on standard output says it too: no second document follows.
    #[must_use]
    pub fn is_in_report(mut self) -> Self {
        self.inner.is_reported = true;
        self
    }

    /// A service that has been under way tries again: this may pass with nothing changed by anyone.
    #[must_use]
    pub fn passing(mut self) -> Self {
        self.inner.may_pass = true;
        self
    }

    /// A store said it, which tells of its outages by itself where it is asked for ever.
    #[must_use]
    pub fn of_store(mut self) -> Self {
        self.inner.is_of_store = true;
        self
    }

    /// Whether a store said it.
    pub fn is_of_store(&self) -> bool {
        self.inner.is_of_store
    }

    /// Whether another attempt may succeed: nothing was reached, or what it met may pass.
    pub fn may_pass(&self) -> bool {
        self.inner.may_pass || self.inner.kind == Kind::Unreachable
    }

    /// Whether the report that was printed says it.
    pub fn is_reported(&self) -> bool {
        self.inner.is_reported
    }

    /// What the reader does next.
    pub fn kind(&self) -> Kind {
        self.inner.kind
    }

    /// The sentence.
    pub fn message(&self) -> &str {
        &self.inner.message
    }

    /// The next step, where there is one to name.
    pub fn hint_text(&self) -> Option<&str> {
        self.inner.hint.as_deref()
    }

    /// The nearest reachable moments, where a target was refused.
    pub fn nearest_reachable(&self) -> Option<&Nearest> {
        self.inner.nearest.as_ref()
    }

    /// The process's exit code.
    pub fn exit_code(&self) -> ExitCode {
        ExitCode::from(self.kind().exit_code())
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.inner.message)?;
        if let Some(nearest) = &self.inner.nearest {
            if let Some(before) = &nearest.before {
                write!(f, "\nnearest before: {before}")?;
            }
            if let Some(after) = &nearest.after {
                write!(f, "\nnearest after: {after}")?;
            }
        }
        if let Some(hint) = &self.inner.hint {
            write!(f, "\nhint: {hint}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {}

/// Joins an error and its causes in one line.
pub fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let inner_text = inner.to_string();
        if !text.contains(&inner_text) {
            text.push_str(": ");
            text.push_str(&inner_text);
        }
        cause = inner.source();
    }
    text
}

/// A failed call of the operating system on `path`.
pub fn io(doing: &str, path: &std::path::Path, error: &std::io::Error) -> Error {
    let failure = Error::failure(format!("cannot {doing} {}: {error}", path.display()));
    match error.kind() {
        std::io::ErrorKind::StorageFull => failure.hint("free space on that disk, then try again"),
        std::io::ErrorKind::PermissionDenied => {
            failure.hint("run as the user that owns the folder, or choose another")
        }
        _ => failure,
    }
}
