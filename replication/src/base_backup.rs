//! `BASE_BACKUP`: the command by server version, and its answer as raw copy data.
//!
//! What the data means (tar archives, the manifest) is for another to say; here is only which
//! part of the answer it belongs to (`basebackup_copy.c`, and `basebackup.c` before 15).

mod options;

use std::future::poll_fn;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use postgres_protocol::message::backend;
use wal::{Lsn, TimelineId};

use crate::commands::parsed;
use crate::connection::{Connection, QueryError, row_values, unexpected};
use crate::framing::{Message, WireError};
use crate::server_error::ServerError;

pub(crate) use options::INCREMENTAL_SINCE;
pub use options::{
    BackupKind, BaseBackupOptions, CheckpointMode, ManifestChecksums, ServerCompression,
};

/// The server version from which the command takes its options in parentheses and sends one copy
/// stream with type bytes.
const TYPED_FORM: u32 = 150_000;

/// More tablespaces than any cluster has: an answer that goes on and on is refused.
const TABLESPACES_MAX: usize = 100_000;

/// How the answer carries its archives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BackupForm {
    /// 15 and newer: one copy stream, each message with a type byte.
    Typed,
    /// 13 and 14: a copy stream of plain tar for each tablespace, then one of the manifest.
    PerTablespace,
}

/// A tablespace of the backup, in the order that their archives come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TablespaceInfo {
    /// Its OID; `None` for the data directory itself, which comes last.
    pub oid: Option<u32>,
    /// Where it is on the server; `None` for the data directory.
    pub location: Option<String>,
    /// How large it is about, in KiB, if [`BaseBackupOptions::progress`] was asked for.
    pub size_kib: Option<i64>,
}

/// A part of the answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BackupMessage {
    /// A copy stream begins.
    CopyOutBegins,
    /// Contents of the copy stream, as they came; never empty.
    Data(Bytes),
    /// The copy stream is over.
    CopyOutEnds,
    /// The server has said that the backup is good: only now is it one.
    Finished {
        /// A restore must replay WAL up to here, exclusive.
        end: Lsn,
        /// The timeline of `end`.
        timeline: TimelineId,
    },
}

impl Connection {
    /// Starts `BASE_BACKUP`, which can take minutes until the first answer with
    /// [`CheckpointMode::Spread`].
    ///
    /// # Errors
    /// [`BaseBackupError`]; the connection is dropped then.
    pub async fn base_backup(
        mut self,
        options: BaseBackupOptions,
    ) -> Result<BaseBackupStream, BaseBackupError> {
        let version_num = self.server_version_num();
        let form = if version_num >= TYPED_FORM {
            BackupForm::Typed
        } else {
            BackupForm::PerTablespace
        };
        self.begin(&options.command(version_num)?).await?;

        let start = self.rows_before_copy("its start position", 1).await?;
        let Some([start, timeline, ..]) = start.first().map(Vec::as_slice) else {
            return Err(incomplete("its start position").into());
        };
        let start = parsed("a WAL position", start.as_deref())?;
        let timeline = parsed("a timeline", timeline.as_deref())?;

        let rows = self
            .rows_before_copy("its tablespaces", TABLESPACES_MAX)
            .await?;
        let tablespaces = rows
            .into_iter()
            .map(tablespace)
            .collect::<Result<Vec<_>, _>>()?;
        if tablespaces.is_empty() {
            return Err(incomplete("its tablespaces").into());
        }
        let copies_expected = match form {
            BackupForm::Typed => 1,
            BackupForm::PerTablespace => tablespaces.len() + 1,
        };
        Ok(BaseBackupStream {
            connection: self,
            start,
            timeline,
            tablespaces,
            form,
            copies_expected,
            copies_done: 0,
            phase: Phase::BetweenCopies,
        })
    }

    /// One result set of the answer that stands before the copy streams.
    async fn rows_before_copy(
        &mut self,
        part: &'static str,
        rows_max: usize,
    ) -> Result<Vec<Vec<Option<String>>>, BaseBackupError> {
        let mut rows = Vec::new();
        loop {
            use backend::Message as B;
            match self.read().await? {
                Message::Backend(B::RowDescription(_)) => {}
                Message::Backend(B::DataRow(body)) if rows.len() < rows_max => {
                    rows.push(row_values(&body)?);
                }
                Message::Backend(B::CommandComplete(_)) => return Ok(rows),
                Message::Backend(B::ErrorResponse(body)) => {
                    return Err(ServerError::of_error(&body).into());
                }
                other => return Err(unexpected(part, &other).into()),
            }
        }
    }
}

/// A base backup that is being received.
///
/// To give up, drop it: the server ends the backup when it finds the connection closed.
#[derive(Debug)]
pub struct BaseBackupStream {
    connection: Connection,
    start: Lsn,
    timeline: TimelineId,
    tablespaces: Vec<TablespaceInfo>,
    form: BackupForm,
    copies_expected: usize,
    copies_done: usize,
    phase: Phase,
}

/// Where the answer is. Everything between two messages is kept here, so that a future can be
/// dropped anywhere.
#[derive(Debug)]
enum Phase {
    BetweenCopies,
    InCopy,
    /// The end position was read; the server's verdict follows.
    EndKnown {
        end: Lsn,
        timeline: TimelineId,
    },
    /// The server failed the backup; `ReadyForQuery` follows.
    Failed(ServerError),
    /// `ReadyForQuery` was read.
    Ready,
    /// No more can come.
    Dead,
}

impl BaseBackupStream {
    /// Where WAL must be replayed from.
    pub fn start(&self) -> Lsn {
        self.start
    }

    /// The timeline of [`Self::start`].
    pub fn timeline(&self) -> TimelineId {
        self.timeline
    }

    /// The tablespaces in the order that their archives come, the data directory being the last.
    pub fn tablespaces(&self) -> &[TablespaceInfo] {
        &self.tablespaces
    }

    /// How the archives come.
    pub fn form(&self) -> BackupForm {
        self.form
    }

    /// Which server this is, for errors and logs.
    pub fn described(&self) -> &str {
        self.connection.described()
    }

    /// What the server has warned of during the backup, of a bad page for instance, so far: at most
    /// the first [`WARNINGS_MAX`](crate::connection::WARNINGS_MAX).
    pub fn warnings(&self) -> &[ServerError] {
        self.connection.warnings()
    }

    /// How many warnings are not among [`Self::warnings`].
    pub fn warnings_left_out(&self) -> u64 {
        self.connection.warnings_left_out()
    }

    /// The next part of the answer.
    ///
    /// Cancel safe: a dropped future has lost nothing.
    ///
    /// # Errors
    /// [`BaseBackupError`], once; then [`BaseBackupError::Ended`]. Failed page checksums are
    /// [`BaseBackupError::Server`] with SQLSTATE XX001, after all data.
    pub async fn next(&mut self) -> Result<BackupMessage, BaseBackupError> {
        poll_fn(|cx| self.poll_next(cx)).await
    }

    /// The connection, after [`BackupMessage::Finished`] or a [`BaseBackupError::Server`] that
    /// did not end it; `None` if it is good for nothing more.
    pub fn into_connection(self) -> Option<Connection> {
        matches!(self.phase, Phase::Ready).then_some(self.connection)
    }

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Result<BackupMessage, BaseBackupError>> {
        loop {
            if matches!(self.phase, Phase::Ready | Phase::Dead) {
                return Poll::Ready(Err(BaseBackupError::Ended));
            }
            let message = match ready!(self.connection.poll_read(cx)) {
                Ok(message) => message,
                Err(error) => {
                    let said = std::mem::replace(&mut self.phase, Phase::Dead);
                    return Poll::Ready(Err(match said {
                        Phase::Failed(said) => said.into(),
                        _ => error.into(),
                    }));
                }
            };
            match self.handle(message) {
                Ok(None) => {}
                Ok(Some(part)) => return Poll::Ready(Ok(part)),
                Err(error) => {
                    if !matches!(self.phase, Phase::Ready) {
                        self.phase = Phase::Dead;
                    }
                    return Poll::Ready(Err(error));
                }
            }
        }
    }

    /// One message; `None` if it is no part by itself.
    fn handle(&mut self, message: Message) -> Result<Option<BackupMessage>, BaseBackupError> {
        use backend::Message as B;
        if let Message::Backend(B::ErrorResponse(body)) = &message {
            let error = ServerError::of_error(body);
            if error.ends_connection() {
                return Err(error.into());
            }
            self.phase = Phase::Failed(error);
            return Ok(None);
        }
        match (&self.phase, message) {
            (Phase::InCopy, Message::CopyData(data)) => {
                Ok((!data.is_empty()).then_some(BackupMessage::Data(data)))
            }
            (Phase::InCopy, Message::Backend(B::CopyDone)) => {
                self.copies_done += 1;
                self.phase = Phase::BetweenCopies;
                Ok(Some(BackupMessage::CopyOutEnds))
            }
            (Phase::BetweenCopies, Message::Backend(B::CopyOutResponse(_)))
                if self.copies_done < self.copies_expected =>
            {
                self.phase = Phase::InCopy;
                Ok(Some(BackupMessage::CopyOutBegins))
            }
            (Phase::BetweenCopies, Message::Backend(B::DataRow(body)))
                if self.copies_done == self.copies_expected =>
            {
                let values = row_values(&body)?;
                let [end, timeline, ..] = values.as_slice() else {
                    return Err(incomplete("its end position").into());
                };
                let end = parsed("a WAL position", end.as_deref())?;
                let timeline = parsed("a timeline", timeline.as_deref())?;
                self.phase = Phase::EndKnown { end, timeline };
                Ok(None)
            }
            (&Phase::EndKnown { end, timeline }, Message::Backend(B::ReadyForQuery(_))) => {
                self.ready();
                Ok(Some(BackupMessage::Finished { end, timeline }))
            }
            (Phase::Failed(_), Message::Backend(B::ReadyForQuery(_))) => match self.ready() {
                Phase::Failed(error) => Err(error.into()),
                _ => Err(BaseBackupError::Ended),
            },
            // Results begin and end between the copies and after them.
            (
                Phase::BetweenCopies | Phase::EndKnown { .. },
                Message::Backend(B::RowDescription(_) | B::CommandComplete(_)),
            )
            | (Phase::Failed(_), _) => Ok(None),
            (_, other) => Err(unexpected("a base backup", &other).into()),
        }
    }

    fn ready(&mut self) -> Phase {
        self.connection.answered();
        std::mem::replace(&mut self.phase, Phase::Ready)
    }
}

/// The row `(spcoid oid, spclocation text, size int8)`.
fn tablespace(row: Vec<Option<String>>) -> Result<TablespaceInfo, QueryError> {
    let Ok([oid, location, size]) = <[Option<String>; 3]>::try_from(row) else {
        return Err(incomplete("a column of its tablespaces"));
    };
    Ok(TablespaceInfo {
        oid: oid.map(|oid| parsed("an OID", Some(&oid))).transpose()?,
        location,
        size_kib: size.map(|size| parsed("a size", Some(&size))).transpose()?,
    })
}

fn incomplete(missing: &'static str) -> QueryError {
    QueryError::Incomplete {
        place: "BASE_BACKUP",
        missing,
    }
}

/// Why a base backup, or the upload of a manifest for one, did not start or did not finish.
#[derive(Debug, thiserror::Error)]
pub enum BaseBackupError {
    /// The server refused, or failed the backup.
    #[error(transparent)]
    Server(Box<ServerError>),
    /// The connection failed, or the peer does not keep to the framing.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The server's answer is not what the command has.
    #[error(transparent)]
    Answer(QueryError),
    /// A label that `backup_label` cannot hold.
    #[error("a backup's label has at most 1023 bytes and no control characters: label={label:?}")]
    BadLabel {
        /// The label.
        label: String,
    },
    /// A rate that the server does not take.
    #[error("a backup's rate is limited to 32 to 1048576 KiB per second or not at all: rate={kib}")]
    BadRate {
        /// The rate, in KiB per second.
        kib: u32,
    },
    /// A level that the server is not asked for.
    #[error("a server compresses with zstd's levels 1 to 19: level={level}")]
    BadLevel {
        /// The level.
        level: u8,
    },
    /// Something that a later version brought.
    #[error("the server is too old for {what}: needed={since}, found={found}")]
    TooOld {
        /// What was asked for.
        what: &'static str,
        /// The version that brought it, as PostgreSQL counts.
        since: u32,
        /// The server's version.
        found: u32,
    },
    /// The backup, or the upload of a manifest, had ended before.
    #[error("the backup has ended")]
    Ended,
}

impl BaseBackupError {
    /// Whether the same may succeed on a new connection with nothing changed.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Server(error) => error.is_transient(),
            Self::Wire(error) => error.is_transient(),
            Self::Answer(error) => error.is_transient(),
            Self::BadLabel { .. }
            | Self::BadRate { .. }
            | Self::BadLevel { .. }
            | Self::TooOld { .. }
            | Self::Ended => false,
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

impl From<ServerError> for BaseBackupError {
    fn from(error: ServerError) -> Self {
        Self::Server(Box::new(error))
    }
}

impl From<QueryError> for BaseBackupError {
    fn from(error: QueryError) -> Self {
        match error {
            QueryError::Server(error) => Self::Server(error),
            QueryError::Wire(error) => Self::Wire(error),
            error => Self::Answer(error),
        }
    }
}
