//! What `BASE_BACKUP` sends between its result sets, as events.
//!
//! `backup/basebackup_copy.c`. 15 and later send one COPY whose messages begin with a type byte: `n`
//! (an archive begins: its name and the tablespace's path, each ending in NUL), `m` (the manifest
//! begins), `d` (bytes of either), `p` (how many bytes were sent: an i64, big-endian). 13 and 14 send
//! one COPY for each row of the second result set, in that order, and one more for the manifest.

use crate::byte_count;

/// How a server sends a base backup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// 15 and later: one COPY, messages with a type byte.
    Typed,
    /// 13 and 14: one COPY for each archive, and one for the manifest.
    PerArchive,
}

/// A row of `BASE_BACKUP`'s second result set: an archive that will come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tablespace {
    /// The tablespace; `None` is the data directory itself, which comes last.
    pub oid: Option<u32>,
    /// Where the server has it; `None` for the data directory.
    pub location: Option<String>,
    /// Its size in KiB as estimated by the server, if `PROGRESS` was asked for.
    pub size_kib: Option<i64>,
}

/// Something in a base backup, in the order of its bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event<'a> {
    /// An archive begins.
    ArchiveBegins {
        /// What it holds.
        tablespace: Tablespace,
    },
    /// The next bytes of the archive: tar ([`crate::tar`]).
    Data(&'a [u8]),
    /// The archive is whole.
    ArchiveEnds,
    /// The server's list of files begins.
    ManifestBegins,
    /// The next bytes of the list: JSON ([`crate::manifest`]).
    ManifestData(&'a [u8]),
    /// The list is whole.
    ManifestEnds,
    /// The server says that it has sent this many bytes (15 and later).
    Progress(u64),
}

/// Why messages are not those of a base backup.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StreamError {
    /// The rows before the COPY do not end with the data directory, or name it twice.
    #[error("base backup does not list the data directory once and last: {found} archives listed")]
    Tablespaces {
        /// How many rows there were.
        found: usize,
    },
    /// A message at a place where none can be.
    #[error("base backup sends {found} where it cannot: {state}")]
    OutOfPlace {
        /// What came.
        found: &'static str,
        /// Where the backup was.
        state: &'static str,
    },
    /// A message of an unknown type.
    #[error("base backup sends a message of an unknown type: {found:#04x}")]
    Type {
        /// The type byte.
        found: u8,
    },
    /// A message whose content is not what its type asks for.
    #[error("base backup sends a malformed {message} message: {length} bytes")]
    Malformed {
        /// Which message.
        message: &'static str,
        /// Its length in bytes, type byte included.
        length: usize,
    },
    /// Another archive than the one whose turn it is.
    #[error(
        "base backup sends another archive than announced: expected {expected}, found {found:?}"
    )]
    Archive {
        /// The name of the archive whose turn it is.
        expected: String,
        /// The name sent.
        found: String,
    },
    /// It ended before everything announced had come.
    #[error("base backup is cut short: {ended} of {announced} archives came whole")]
    Truncated {
        /// Archives that came whole.
        ended: usize,
        /// Archives announced.
        announced: usize,
    },
}

/// How much a finished backup sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Totals {
    /// Bytes of all archives.
    pub archive_bytes: u64,
    /// Bytes of the server's manifest; `None` if it sent none.
    pub manifest_bytes: Option<u64>,
}

/// Turns the messages of a base backup into events, and refuses an order that cannot be.
#[derive(Debug)]
pub struct Events {
    form: Form,
    tablespaces: Vec<Tablespace>,
    /// What the archives' names end in.
    suffix: &'static str,
    /// How many archives have begun.
    begun: usize,
    state: State,
    totals: Totals,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Outside a COPY.
    Outside,
    /// Inside a COPY, before its first archive (typed form).
    Before,
    Archive,
    Manifest,
    /// After the last COPY.
    After,
}

impl State {
    fn describe(self) -> &'static str {
        match self {
            Self::Outside => "outside a COPY",
            Self::Before => "before the first archive",
            Self::Archive => "inside an archive",
            Self::Manifest => "inside the manifest",
            Self::After => "after the end",
        }
    }
}

impl Events {
    /// Begins with the rows of the second result set, in their order.
    pub fn new(form: Form, tablespaces: Vec<Tablespace>) -> Result<Self, StreamError> {
        let data_directory = tablespaces
            .iter()
            .position(|tablespace| tablespace.oid.is_none());
        if data_directory.map(|at| at.saturating_add(1)) != Some(tablespaces.len()) {
            return Err(StreamError::Tablespaces {
                found: tablespaces.len(),
            });
        }
        Ok(Self {
            form,
            tablespaces,
            suffix: "",
            begun: 0,
            state: State::Outside,
            totals: Totals {
                archive_bytes: 0,
                manifest_bytes: None,
            },
        })
    }

    /// The same of archives that the server compresses with zstd: [`Event::Data`] are one or more frames of
    /// each (`backup/basebackup_zstd.c`, `bbsink_zstd_begin_archive`). The manifest comes as it is.
    #[must_use]
    pub fn zstd(self) -> Self {
        Self {
            suffix: ".zst",
            ..self
        }
    }

    /// Whether the archives are compressed with zstd.
    pub fn is_zstd(&self) -> bool {
        !self.suffix.is_empty()
    }

    /// The archives announced, in the order in which they come.
    pub fn tablespaces(&self) -> &[Tablespace] {
        &self.tablespaces
    }

    /// A COPY begins (`CopyOutResponse`).
    pub fn copy_out_begins(&mut self) -> Result<Option<Event<'static>>, StreamError> {
        if self.state != State::Outside {
            return Err(self.out_of_place("the beginning of a COPY"));
        }
        match self.form {
            Form::Typed => {
                self.state = State::Before;
                Ok(None)
            }
            Form::PerArchive => match self.next_archive() {
                Some(event) => Ok(Some(event)),
                None => Ok(Some(self.manifest_begins())),
            },
        }
    }

    /// A message of the COPY (`CopyData`): what it holds, in order; at most two events.
    pub fn copy_data<'a>(&mut self, message: &'a [u8]) -> Result<Vec<Event<'a>>, StreamError> {
        match self.form {
            Form::PerArchive => Ok(vec![self.data(message)?]),
            Form::Typed => self.typed(message),
        }
    }

    /// The COPY ends (`CopyDone`).
    pub fn copy_out_ends(&mut self) -> Result<Option<Event<'static>>, StreamError> {
        let all_begun = self.begun == self.tablespaces.len();
        let (event, state) = match (self.form, self.state) {
            (Form::PerArchive, State::Archive) => (Event::ArchiveEnds, State::Outside),
            (Form::Typed, State::Archive) if all_begun => (Event::ArchiveEnds, State::After),
            (_, State::Manifest) => (Event::ManifestEnds, State::After),
            (Form::Typed, State::Before | State::Archive) => return Err(self.truncated()),
            _ => return Err(self.out_of_place("the end of a COPY")),
        };
        self.state = state;
        Ok(Some(event))
    }

    /// The command ends: an error unless every archive announced came whole.
    ///
    /// Whether the server found damage while it read is said by the command's own success only: a
    /// failed page checksum is an error after all the data.
    pub fn finish(&self) -> Result<Totals, StreamError> {
        match self.state {
            State::After => Ok(self.totals),
            State::Outside if self.begun == self.tablespaces.len() => Ok(self.totals),
            _ => Err(self.truncated()),
        }
    }

    fn typed<'a>(&mut self, message: &'a [u8]) -> Result<Vec<Event<'a>>, StreamError> {
        if matches!(self.state, State::Outside | State::After) {
            return Err(self.out_of_place("data"));
        }
        let malformed = |name| StreamError::Malformed {
            message: name,
            length: message.len(),
        };
        let Some((kind, rest)) = message.split_first() else {
            return Err(malformed("empty"));
        };
        match kind {
            b'd' => Ok(vec![self.data(rest)?]),
            b'n' => {
                let name = archive_name(rest).ok_or_else(|| malformed("new archive"))?;
                let ended = (self.state == State::Archive).then_some(Event::ArchiveEnds);
                if self.state == State::Manifest {
                    return Err(self.out_of_place("an archive"));
                }
                let begun = self.next_archive().ok_or_else(|| StreamError::Archive {
                    expected: "none".to_owned(),
                    found: String::from_utf8_lossy(name).into_owned(),
                })?;
                if let Event::ArchiveBegins { tablespace } = &begun {
                    let expected = self.expected_name(tablespace);
                    if name != expected.as_bytes() {
                        let found = String::from_utf8_lossy(name).into_owned();
                        return Err(StreamError::Archive { expected, found });
                    }
                }
                Ok(ended.into_iter().chain([begun]).collect())
            }
            b'm' if !rest.is_empty() => Err(malformed("manifest")),
            b'm' if self.state == State::Archive && self.begun == self.tablespaces.len() => {
                Ok(vec![Event::ArchiveEnds, self.manifest_begins()])
            }
            b'm' => Err(self.out_of_place("the manifest")),
            b'p' => {
                let bytes = <[u8; 8]>::try_from(rest).ok().map(i64::from_be_bytes);
                let bytes = bytes.and_then(|bytes| u64::try_from(bytes).ok());
                Ok(vec![Event::Progress(
                    bytes.ok_or_else(|| malformed("progress"))?,
                )])
            }
            found => Err(StreamError::Type { found: *found }),
        }
    }

    fn data<'a>(&mut self, bytes: &'a [u8]) -> Result<Event<'a>, StreamError> {
        let length = byte_count(bytes.len());
        match self.state {
            State::Archive => {
                self.totals.archive_bytes = self.totals.archive_bytes.saturating_add(length);
                Ok(Event::Data(bytes))
            }
            State::Manifest => {
                let sum = self
                    .totals
                    .manifest_bytes
                    .unwrap_or(0)
                    .saturating_add(length);
                self.totals.manifest_bytes = Some(sum);
                Ok(Event::ManifestData(bytes))
            }
            State::Outside | State::Before | State::After => Err(self.out_of_place("data")),
        }
    }

    /// basebackup.c, `perform_base_backup`: `base.tar` or `<oid>.tar`.
    fn expected_name(&self, tablespace: &Tablespace) -> String {
        let suffix = self.suffix;
        match tablespace.oid {
            None => format!("base.tar{suffix}"),
            Some(oid) => format!("{oid}.tar{suffix}"),
        }
    }

    fn next_archive(&mut self) -> Option<Event<'static>> {
        let tablespace = self.tablespaces.get(self.begun)?.clone();
        self.begun = self.begun.saturating_add(1);
        self.state = State::Archive;
        Some(Event::ArchiveBegins { tablespace })
    }

    fn manifest_begins(&mut self) -> Event<'static> {
        self.state = State::Manifest;
        self.totals.manifest_bytes = Some(0);
        Event::ManifestBegins
    }

    fn out_of_place(&self, found: &'static str) -> StreamError {
        StreamError::OutOfPlace {
            found,
            state: self.state.describe(),
        }
    }

    fn truncated(&self) -> StreamError {
        let open = usize::from(self.state == State::Archive);
        StreamError::Truncated {
            ended: self.begun.saturating_sub(open),
            announced: self.tablespaces.len(),
        }
    }
}

/// The archive's name of an `n` message: two strings, each ending in NUL.
fn archive_name(bytes: &[u8]) -> Option<&[u8]> {
    let mut parts = bytes.split(|byte| *byte == 0);
    let name = parts.next()?;
    let _location = parts.next()?;
    (parts.next() == Some(&[]) && parts.next().is_none()).then_some(name)
}
