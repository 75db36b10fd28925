//! An authenticated connection: parameters the server reported, and simple queries.
//!
//! Both kinds of connection are this type: one to a database takes SQL, one made with
//! `replication=true` takes the commands of `repl_gram.y` (and no SQL).

use std::collections::BTreeMap;
use std::future::poll_fn;
use std::io;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use fallible_iterator::FallibleIterator;
use postgres_protocol::escape;
use postgres_protocol::message::{backend, frontend};
use tracing::{debug, warn};

use crate::framing::{Framed, Message, WireError};
use crate::server_error::ServerError;

/// Largest sum of the values of one query's results, in bytes: a server cannot fill our memory.
pub const RESULT_BYTES_MAX: usize = 64 << 20;

/// What a row costs us beside its values.
const ROW_COST_BYTES: usize = 64;

/// The most warnings of one command that are kept.
pub const WARNINGS_MAX: usize = 100;

/// Longer ones are not kept, in bytes.
const WARNING_BYTES_MAX: usize = 8 << 10;

/// More parameters than any server reports; further ones are left out.
const PARAMETERS_MAX: usize = 256;

/// A connection that is ready for commands.
///
/// A command's future that is dropped before it is done leaves its answer unread: every later
/// command fails with [`QueryError::Interrupted`], and the connection must be dropped.
#[derive(Debug)]
pub struct Connection {
    framed: Framed,
    parameters: BTreeMap<String, String>,
    described: String,
    backend_pid: Option<u32>,
    answering: bool,
    silence_max: Option<Duration>,
    warnings: Vec<ServerError>,
    warnings_left_out: u64,
}

impl Connection {
    /// A connection whose server has just sent its first `ReadyForQuery`.
    ///
    /// `parameters` is what it reported until then, `described` says which server this is, for
    /// errors, without any secret.
    pub fn new(framed: Framed, parameters: BTreeMap<String, String>, described: String) -> Self {
        Self {
            framed,
            parameters,
            described,
            backend_pid: None,
            answering: false,
            silence_max: None,
            warnings: Vec::new(),
            warnings_left_out: 0,
        }
    }

    /// The same connection, served by the server's process `pid`.
    #[must_use]
    pub fn with_backend_pid(mut self, pid: Option<u32>) -> Self {
        self.backend_pid = pid;
        self
    }

    /// The same connection, which fails with [`WireError::Silent`] where the server leaves a command
    /// without any answer for so long. What streams is not bounded by it.
    #[must_use]
    pub fn with_silence_max(mut self, silence_max: Duration) -> Self {
        self.silence_max = Some(silence_max);
        self
    }

    /// The server's process for this connection, as `pg_stat_replication.pid` has it; a pooler in
    /// between may say another.
    pub fn backend_pid(&self) -> Option<u32> {
        self.backend_pid
    }

    /// Which server this is, for errors and logs.
    pub fn described(&self) -> &str {
        &self.described
    }

    /// What the server has warned of since the last command was sent: at most the first
    /// [`WARNINGS_MAX`]. They were logged as they came, like those before.
    pub fn warnings(&self) -> &[ServerError] {
        &self.warnings
    }

    /// How many warnings of that command are not among [`Self::warnings`].
    pub fn warnings_left_out(&self) -> u64 {
        self.warnings_left_out
    }

    fn keep_warning(&mut self, warning: ServerError) {
        let texts = [
            Some(&warning.message),
            warning.detail.as_ref(),
            warning.hint.as_ref(),
        ];
        let bytes: usize = texts.into_iter().flatten().map(String::len).sum();
        if self.warnings.len() < WARNINGS_MAX && bytes <= WARNING_BYTES_MAX {
            self.warnings.push(warning);
        } else {
            self.warnings_left_out = self.warnings_left_out.saturating_add(1);
        }
    }

    /// The newest value of a parameter that the server reports by itself (`server_version`,
    /// `in_hot_standby` from 14 on, …).
    pub fn parameter(&self, name: &str) -> Option<&str> {
        self.parameters.get(name).map(String::as_str)
    }

    /// The server's version as PostgreSQL counts it: 180006 is 18.6, 190000 is any 19 before its
    /// release, 0 what cannot be read.
    pub fn server_version_num(&self) -> u32 {
        self.parameter("server_version")
            .and_then(version_num)
            .unwrap_or(0)
    }

    /// Runs `sql`, one statement or several, and returns what each returned.
    ///
    /// Values are text. A statement that returns no rows gives a [`ResultSet`] without columns.
    ///
    /// # Errors
    /// [`QueryError`]; after [`QueryError::Server`] the connection can be used again unless the
    /// [server ended it](ServerError::ends_connection).
    pub async fn simple_query(&mut self, sql: &str) -> Result<Vec<ResultSet>, QueryError> {
        self.run(sql, row_values).await
    }

    /// The one result of `sql`.
    ///
    /// # Errors
    /// [`QueryError`]; [`QueryError::Shape`] if there is not exactly one.
    pub async fn query(&mut self, sql: &str) -> Result<ResultSet, QueryError> {
        let mut results = self.simple_query(sql).await?;
        match (results.pop(), results.len()) {
            (Some(result), 0) => Ok(result),
            (None, _) => Err(QueryError::Shape {
                expected: "one result",
                found: 0,
            }),
            (Some(_), others) => Err(QueryError::Shape {
                expected: "one result",
                found: others + 1,
            }),
        }
    }

    /// The one row that `sql` returns.
    ///
    /// # Errors
    /// [`QueryError`]; [`QueryError::Shape`] if there is not exactly one.
    pub async fn query_row(&mut self, sql: &str) -> Result<Row, QueryError> {
        let mut result = self.query(sql).await?;
        match (result.rows.pop(), result.rows.len()) {
            (Some(values), 0) => Ok(Row {
                columns: result.columns,
                values,
            }),
            (None, _) => Err(QueryError::Shape {
                expected: "one row",
                found: 0,
            }),
            (Some(_), others) => Err(QueryError::Shape {
                expected: "one row",
                found: others + 1,
            }),
        }
    }

    /// The first value of the one row that `sql` returns; `None` is NULL.
    ///
    /// # Errors
    /// [`QueryError`]; [`QueryError::Shape`] if there is not exactly one row with a value.
    pub async fn query_value(&mut self, sql: &str) -> Result<Option<String>, QueryError> {
        let row = self.query_row(sql).await?;
        let none = QueryError::Shape {
            expected: "one value",
            found: 0,
        };
        row.values.into_iter().next().ok_or(none)
    }

    /// Runs `sql` for its effect.
    ///
    /// # Errors
    /// [`QueryError`].
    pub async fn execute(&mut self, sql: &str) -> Result<(), QueryError> {
        self.simple_query(sql).await.map(drop)
    }

    /// Says goodbye and closes the connection. Dropping it does too, less politely: the server
    /// logs a lost connection.
    ///
    /// # Errors
    /// [`WireError::Write`], which no one needs to heed.
    pub async fn terminate(mut self) -> Result<(), WireError> {
        self.framed
            .queue_with(|out| {
                frontend::terminate(out);
                Ok(())
            })
            .map_err(WireError::Write)?;
        self.framed.shutdown().await
    }

    /// Runs a command and reads its whole answer, each row by `read_row`.
    pub(crate) async fn run<V>(
        &mut self,
        command: &str,
        read_row: impl Fn(&backend::DataRowBody) -> Result<Vec<V>, QueryError>,
    ) -> Result<Vec<ResultSet<V>>, QueryError> {
        self.begin(command).await?;
        let mut results = Vec::new();
        let mut current = ResultSet::default();
        let mut result_bytes = 0_usize;
        let mut failed = None;
        loop {
            use backend::Message as B;
            match self.read().await? {
                Message::Backend(B::RowDescription(body)) => {
                    current = ResultSet {
                        columns: column_names(&body)?,
                        rows: Vec::new(),
                    };
                }
                Message::Backend(B::DataRow(body)) => {
                    result_bytes += body.buffer().len() + ROW_COST_BYTES;
                    if result_bytes > RESULT_BYTES_MAX {
                        return Err(QueryError::TooLarge);
                    }
                    current.rows.push(read_row(&body)?);
                }
                Message::Backend(B::CommandComplete(_) | B::EmptyQueryResponse) => {
                    result_bytes += ROW_COST_BYTES;
                    if result_bytes > RESULT_BYTES_MAX {
                        return Err(QueryError::TooLarge);
                    }
                    results.push(std::mem::take(&mut current));
                }
                Message::Backend(B::ErrorResponse(body)) => {
                    let error = ServerError::of_error(&body);
                    if error.ends_connection() {
                        return Err(error.into());
                    }
                    failed = Some(error);
                }
                Message::Backend(B::ReadyForQuery(_)) => {
                    self.answering = false;
                    return failed.map_or(Ok(results), |error| Err(error.into()));
                }
                other => return Err(unexpected("the answer to a command", &other)),
            }
        }
    }

    /// Sends a command, after which its answer must be read up to `ReadyForQuery`.
    pub(crate) async fn begin(&mut self, command: &str) -> Result<(), QueryError> {
        if self.answering {
            return Err(QueryError::Interrupted);
        }
        self.framed
            .queue_with(|out| frontend::query(command, out))
            .map_err(QueryError::Unsendable)?;
        self.answering = true;
        self.warnings.clear();
        self.warnings_left_out = 0;
        self.flush().await
    }

    /// Sends what is queued.
    pub(crate) async fn flush(&mut self) -> Result<(), QueryError> {
        let silence_max = self.silence_max;
        let Err(error) = heard_within(silence_max, self.framed.flush()).await else {
            return Ok(());
        };
        Err(match self.last_words().await {
            Some(said) => said.into(),
            None => error.into(),
        })
    }

    /// What the server said before it closed the connection, which explains more than that
    /// nothing can be sent any more.
    async fn last_words(&mut self) -> Option<ServerError> {
        loop {
            match self.read().await {
                Ok(Message::Backend(backend::Message::ErrorResponse(body))) => {
                    return Some(ServerError::of_error(&body));
                }
                Ok(_) => {}
                Err(_) => return None,
            }
        }
    }

    /// To be called when a `ReadyForQuery` was read outside of this module.
    pub(crate) fn answered(&mut self) {
        self.answering = false;
    }

    pub(crate) fn framed(&mut self) -> &mut Framed {
        &mut self.framed
    }

    /// The next message that is part of an answer. Cancel safe.
    pub(crate) async fn read(&mut self) -> Result<Message, WireError> {
        let silence_max = self.silence_max;
        heard_within(silence_max, poll_fn(|cx| self.poll_read(cx))).await
    }

    /// [`Self::read`] as a poll. What a server may send at any time is dealt with here: notices
    /// are logged, reported parameters kept, notifications dropped.
    pub(crate) fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<Result<Message, WireError>> {
        loop {
            use backend::Message as B;
            match ready!(self.framed.poll_message(cx))? {
                Message::Backend(B::NoticeResponse(body)) => {
                    let notice = ServerError::of_notice(&body);
                    if notice.severity == "WARNING" {
                        warn!(server = self.described, "the server warns: {notice}");
                        self.keep_warning(notice);
                    } else {
                        debug!(server = self.described, "the server says: {notice}");
                    }
                }
                Message::Backend(B::ParameterStatus(body)) => {
                    if let (Ok(name), Ok(value)) = (body.name(), body.value()) {
                        remember(&mut self.parameters, name, value);
                    }
                }
                Message::Backend(B::NotificationResponse(_)) => {}
                message => return Poll::Ready(Ok(message)),
            }
        }
    }
}

async fn heard_within<T>(
    silence_max: Option<Duration>,
    heard: impl Future<Output = Result<T, WireError>>,
) -> Result<T, WireError> {
    let Some(silence_max) = silence_max else {
        return heard.await;
    };
    let heard = tokio::time::timeout(silence_max, heard).await;
    heard.unwrap_or(Err(WireError::Silent {
        seconds: silence_max.as_secs(),
    }))
}

fn remember(parameters: &mut BTreeMap<String, String>, name: &str, value: &str) {
    if parameters.len() < PARAMETERS_MAX || parameters.contains_key(name) {
        parameters.insert(name.to_owned(), value.to_owned());
    }
}

/// What one statement returned. Values are text as the server sent them; `None` is NULL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResultSet<V = Option<String>> {
    /// Names of the columns.
    pub columns: Vec<String>,
    /// Rows, each with one value per column.
    pub rows: Vec<Vec<V>>,
}

impl<V> Default for ResultSet<V> {
    fn default() -> Self {
        Self {
            columns: Vec::new(),
            rows: Vec::new(),
        }
    }
}

/// The only row of a result.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// Names of the columns.
    pub columns: Vec<String>,
    /// One value per column; `None` is NULL.
    pub values: Vec<Option<String>>,
}

impl Row {
    /// The value of the column `name`; `None` is NULL, or no such column.
    pub fn get(&self, name: &str) -> Option<&str> {
        let at = self.columns.iter().position(|column| column == name)?;
        self.values.get(at)?.as_deref()
    }
}

/// `value` as an SQL string literal, quotes included, whatever `standard_conforming_strings` is.
pub fn literal(value: &str) -> String {
    escape::escape_literal(value)
}

/// `name` as a quoted SQL identifier, quotes included.
pub fn identifier(name: &str) -> String {
    escape::escape_identifier(name)
}

/// Why a command did not get its answer.
#[derive(Debug, thiserror::Error)]
pub enum QueryError {
    /// The server refused or could not do it.
    #[error(transparent)]
    Server(Box<ServerError>),
    /// The connection failed, or the peer does not keep to the protocol.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// A message that has no place where it came.
    #[error("unexpected message in {place}: found={found}")]
    Unexpected {
        /// What was being read.
        place: &'static str,
        /// The message's name.
        found: &'static str,
    },
    /// A message that should have come and did not.
    #[error("{missing} is missing from the answer to {place}")]
    Incomplete {
        /// What was being read.
        place: &'static str,
        /// What it lacks.
        missing: &'static str,
    },
    /// A message with contents that cannot be read.
    #[error("malformed {part}: {reason}")]
    Malformed {
        /// The message.
        part: &'static str,
        /// What is wrong with it.
        #[source]
        reason: io::Error,
    },
    /// A value that is not what its column holds.
    #[error("cannot read {what} from the server's answer: found={found:?}")]
    BadValue {
        /// What the value should be.
        what: &'static str,
        /// The value.
        found: String,
    },
    /// A result with another number of parts than asked for.
    #[error("unexpected number of results: expected={expected}, found={found}")]
    Shape {
        /// What was asked for.
        expected: &'static str,
        /// How many came.
        found: usize,
    },
    /// A result over [`RESULT_BYTES_MAX`].
    #[error("refused a result of more than {RESULT_BYTES_MAX} bytes")]
    TooLarge,
    /// A command that the protocol cannot carry, such as one with a zero byte.
    #[error("the command cannot be sent: {0}")]
    Unsendable(#[source] io::Error),
    /// An earlier command's answer was not read to its end.
    #[error("an earlier command on this connection was interrupted")]
    Interrupted,
}

impl From<ServerError> for QueryError {
    fn from(error: ServerError) -> Self {
        Self::Server(Box::new(error))
    }
}

impl QueryError {
    /// Whether the same may succeed on a new connection with nothing changed.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Server(error) => error.is_transient(),
            Self::Wire(error) => error.is_transient(),
            Self::Interrupted => true,
            Self::Unexpected { .. }
            | Self::Incomplete { .. }
            | Self::Malformed { .. }
            | Self::BadValue { .. }
            | Self::Shape { .. }
            | Self::TooLarge
            | Self::Unsendable(_) => false,
        }
    }

    /// The SQLSTATE, if it was the server that refused.
    pub fn sqlstate(&self) -> Option<&str> {
        match self {
            Self::Server(error) => Some(&error.sqlstate),
            _ => None,
        }
    }
}

pub(crate) fn unexpected(place: &'static str, message: &Message) -> QueryError {
    QueryError::Unexpected {
        place,
        found: message.name(),
    }
}

pub(crate) fn column_names(body: &backend::RowDescriptionBody) -> Result<Vec<String>, QueryError> {
    let malformed = |reason| QueryError::Malformed {
        part: "RowDescription",
        reason,
    };
    let names = body.fields().map(|field| Ok(field.name().to_owned()));
    names.collect().map_err(malformed)
}

/// The values of a row as bytes.
pub(crate) fn row_bytes(
    body: &backend::DataRowBody,
) -> Result<Vec<Option<bytes::Bytes>>, QueryError> {
    let malformed = |reason| QueryError::Malformed {
        part: "DataRow",
        reason,
    };
    let row = body.buffer_bytes();
    body.ranges()
        .map(|range| Ok(range.map(|range| row.slice(range))))
        .collect()
        .map_err(malformed)
}

pub(crate) fn row_values(body: &backend::DataRowBody) -> Result<Vec<Option<String>>, QueryError> {
    let text = |bytes: bytes::Bytes| {
        String::from_utf8(bytes.into()).map_err(|e| QueryError::Malformed {
            part: "DataRow",
            reason: io::Error::new(io::ErrorKind::InvalidData, e),
        })
    };
    row_bytes(body)?
        .into_iter()
        .map(|value| value.map(text).transpose())
        .collect()
}

/// "18.6 (Debian 18.6-1)", "19rc1", "17devel", "9.6.24" as `PG_VERSION_NUM` counts.
fn version_num(version: &str) -> Option<u32> {
    let end = version
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(version.len());
    let mut parts = version[..end].split('.').map(str::parse::<u32>);
    let major = parts.next()?.ok()?;
    let minor = parts.next().and_then(Result::ok).unwrap_or(0);
    if major >= 10 {
        major.checked_mul(10_000)?.checked_add(minor)
    } else {
        let patch = parts.next().and_then(Result::ok).unwrap_or(0);
        (major * 10_000)
            .checked_add(minor.checked_mul(100)?)?
            .checked_add(patch)
    }
}
