//! `BASE_BACKUP`: the command by server version, and its answer as raw copy data.
//!
//! What the data means (tar archives, the manifest) is for another to say; here is only which
//! part of the answer it belongs to (`basebackup_copy.c`, and `basebackup.c` before 15).

use std::future::poll_fn;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use postgres_protocol::message::backend;
use wal::{Lsn, TimelineId};

use crate::commands::parsed;
use crate::connection::{Connection, QueryError, row_values, unexpected};
use crate::framing::{Message, WireError};
use crate::server_error::ServerError;

/// The server version from which the command takes its options in parentheses and sends one copy
/// stream with type bytes.
const TYPED_FORM: u32 = 150_000;

/// More tablespaces than any cluster has: an answer that goes on and on is refused.
const TABLESPACES_MAX: usize = 100_000;

/// What is asked of the server. WAL and a tablespace map are never asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseBackupOptions {
    /// Goes into `backup_label`; up to 1023 bytes, no control characters.
    pub label: String,
    /// How the server makes the checkpoint that starts the backup.
    pub checkpoint: CheckpointMode,
    /// Let the server wait until `archive_command` has stored the WAL that the backup needs.
    pub wait: bool,
    /// Limit to the rate of sending, in KiB per second, 32 to 1,048,576.
    pub max_rate_kib: Option<u32>,
    /// Checksums of files in the server's manifest.
    pub manifest_checksums: ManifestChecksums,
    /// Let the server check the pages that it reads, where the cluster has page checksums.
    pub verify_checksums: bool,
    /// Let the server add up the sizes of the tablespaces first, which reads every directory.
    pub progress: bool,
}

impl BaseBackupOptions {
    /// What a backup is best taken with: a fast checkpoint, pages checked, CRC-32C in the manifest.
    pub fn new(label: impl Into<String>) -> Self {
        Self {
            label: label.into(),
            checkpoint: CheckpointMode::Fast,
            wait: false,
            max_rate_kib: None,
            manifest_checksums: ManifestChecksums::Crc32c,
            verify_checksums: true,
            progress: true,
        }
    }

    /// The command for a server of version `version_num`.
    fn command(&self, version_num: u32) -> Result<String, BaseBackupError> {
        if self.label.len() > 1023 || self.label.contains(char::is_control) {
            return Err(BaseBackupError::BadLabel {
                label: self.label.clone(),
            });
        }
        let rate = self.max_rate_kib;
        if let Some(kib) = rate.filter(|kib| !(32..=1_048_576).contains(kib)) {
            return Err(BaseBackupError::BadRate { kib });
        }
        // repl_scanner.l knows no escape but the doubled quote.
        let label = self.label.replace('\'', "''");
        let checksums = self.manifest_checksums.name();
        let mut options = vec![format!("LABEL '{label}'")];
        if self.progress {
            options.push("PROGRESS".to_owned());
        }
        if version_num >= TYPED_FORM {
            options.push(format!("CHECKPOINT '{}'", self.checkpoint.name()));
            options.push(format!("WAIT {}", self.wait));
            options.extend(rate.map(|kib| format!("MAX_RATE {kib}")));
            options.push(format!("VERIFY_CHECKSUMS {}", self.verify_checksums));
            options.push("MANIFEST 'yes'".to_owned());
            options.push(format!("MANIFEST_CHECKSUMS '{checksums}'"));
            return Ok(format!("BASE_BACKUP ({})", options.join(", ")));
        }
        if self.checkpoint == CheckpointMode::Fast {
            options.push("FAST".to_owned());
        }
        if !self.wait {
            options.push("NOWAIT".to_owned());
        }
        options.extend(rate.map(|kib| format!("MAX_RATE {kib}")));
        if !self.verify_checksums {
            options.push("NOVERIFY_CHECKSUMS".to_owned());
        }
        options.push("MANIFEST 'yes'".to_owned());
        options.push(format!("MANIFEST_CHECKSUMS '{checksums}'"));
        Ok(format!("BASE_BACKUP {}", options.join(" ")))
    }
}

/// How a checkpoint is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CheckpointMode {
    /// At once.
    Fast,
    /// Over `checkpoint_completion_target`, minutes usually.
    Spread,
}

impl CheckpointMode {
    fn name(self) -> &'static str {
        match self {
            Self::Fast => "fast",
            Self::Spread => "spread",
        }
    }
}

/// How the server's manifest lets files be checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ManifestChecksums {
    /// By their size.
    None,
    /// CRC-32C.
    Crc32c,
    /// SHA-224.
    Sha224,
    /// SHA-256.
    Sha256,
    /// SHA-384.
    Sha384,
    /// SHA-512.
    Sha512,
}

impl ManifestChecksums {
    fn name(self) -> &'static str {
        match self {
            Self::None => "NONE",
            Self::Crc32c => "CRC32C",
            Self::Sha224 => "SHA224",
            Self::Sha256 => "SHA256",
            Self::Sha384 => "SHA384",
            Self::Sha512 => "SHA512",
        }
    }
}

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

/// Why a base backup did not start or did not finish.
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
    /// The backup had ended before.
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
            Self::BadLabel { .. } | Self::BadRate { .. } | Self::Ended => false,
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

#[cfg(test)]
mod tests {
    use super::{BaseBackupOptions, CheckpointMode, ManifestChecksums};

    fn options() -> BaseBackupOptions {
        BaseBackupOptions {
            max_rate_kib: Some(1024),
            manifest_checksums: ManifestChecksums::Sha256,
            verify_checksums: false,
            ..BaseBackupOptions::new("it's nightly")
        }
    }

    #[test]
    fn writes_the_command_as_each_version_reads_it() {
        assert_eq!(
            options().command(150_000).unwrap(),
            "BASE_BACKUP (LABEL 'it''s nightly', PROGRESS, CHECKPOINT 'fast', WAIT false, \
             MAX_RATE 1024, VERIFY_CHECKSUMS false, MANIFEST 'yes', MANIFEST_CHECKSUMS 'SHA256')"
        );
        assert_eq!(
            options().command(140_012).unwrap(),
            "BASE_BACKUP LABEL 'it''s nightly' PROGRESS FAST NOWAIT MAX_RATE 1024 \
             NOVERIFY_CHECKSUMS MANIFEST 'yes' MANIFEST_CHECKSUMS 'SHA256'"
        );
        let spread = BaseBackupOptions {
            checkpoint: CheckpointMode::Spread,
            wait: true,
            ..options()
        };
        assert!(!spread.command(130_000).unwrap().contains("FAST"));
        assert!(!spread.command(130_000).unwrap().contains("NOWAIT"));
    }

    #[test]
    fn refuses_a_label_that_would_forge_lines_of_backup_label() {
        let forged = BaseBackupOptions::new("x\nSTART TIMELINE: 7");
        forged.command(180_000).unwrap_err();
        BaseBackupOptions::new("ä".repeat(512))
            .command(180_000)
            .unwrap_err();
        let slow = BaseBackupOptions {
            max_rate_kib: Some(31),
            ..options()
        };
        slow.command(180_000).unwrap_err();
    }
}
