//! `START_REPLICATION`: WAL as the server flushes it, and status updates back.
//!
//! Message layouts are those of walsender.c and of "Streaming Replication Protocol" in
//! PostgreSQL's documentation.

use std::future::poll_fn;
use std::task::{Context, Poll, ready};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use postgres_protocol::message::{backend, frontend};
use wal::{Lsn, PgTime, TimelineId};

use crate::commands::parsed;
use crate::connection::{Connection, QueryError, row_values, unexpected};
use crate::framing::{Message, WireError};
use crate::server_error::ServerError;
use crate::slots::{SlotError, checked_name};

/// `XLogData` before its WAL: type, start, end of WAL, time.
const WAL_HEADER_BYTES: usize = 1 + 8 + 8 + 8;

/// Primary keepalive: type, end of WAL, time, reply requested.
const KEEPALIVE_BYTES: usize = 1 + 8 + 8 + 1;

/// Standby status update: type, write, flush, apply, time, reply requested.
const STATUS_BYTES: usize = 1 + 8 + 8 + 8 + 8 + 1;

impl Connection {
    /// `START_REPLICATION … PHYSICAL` at `start` on `timeline`.
    ///
    /// The server starts exactly at `start`, so for whole segments this is a segment's first byte.
    ///
    /// # Errors
    /// [`StreamError`]. Many refusals come only from [`WalStream::next`], such as 58P01 for WAL
    /// that was removed. The connection is dropped on an error here.
    pub async fn start_replication(
        mut self,
        slot: Option<&str>,
        start: Lsn,
        timeline: TimelineId,
    ) -> Result<Started, StreamError> {
        let slot = match slot.map(checked_name).transpose() {
            Ok(Some(name)) => format!("SLOT \"{name}\" "),
            Ok(None) => String::new(),
            Err(error) => return Err(StreamError::Slot(error)),
        };
        let command = format!("START_REPLICATION {slot}PHYSICAL {start} TIMELINE {timeline}");
        self.begin(&command).await?;

        let place = "the answer to START_REPLICATION";
        let mut next = None;
        loop {
            use backend::Message as B;
            match self.read().await? {
                Message::CopyBoth => {
                    return Ok(Started::Streaming(WalStream {
                        connection: self,
                        phase: Phase::Streaming,
                        expected: start,
                        status: None,
                        can_send: true,
                    }));
                }
                Message::Backend(B::ErrorResponse(body)) => {
                    return Err(ServerError::of_error(&body).into());
                }
                // Nothing of the timeline is left: its successor, without any WAL before it.
                Message::Backend(B::DataRow(body)) => next = Some(next_timeline(&body)?),
                Message::Backend(B::RowDescription(_) | B::CommandComplete(_)) => {}
                Message::Backend(B::ReadyForQuery(_)) => {
                    self.answered();
                    let missing = "the next timeline";
                    let (next, at) = next.ok_or(QueryError::Incomplete { place, missing })?;
                    return Ok(Started::EndOfTimeline {
                        connection: self,
                        next,
                        at,
                    });
                }
                other => return Err(unexpected(place, &other).into()),
            }
        }
    }
}

/// What `START_REPLICATION` led to.
#[derive(Debug)]
pub enum Started {
    /// WAL follows.
    Streaming(WalStream),
    /// The server knows the timeline as one of the past, and has nothing of it after the start.
    EndOfTimeline {
        /// The connection, ready for the next command.
        connection: Connection,
        /// The timeline that followed.
        next: TimelineId,
        /// Where it left the one asked for.
        at: Lsn,
    },
}

/// What the server sends while streaming.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StreamEvent {
    /// A stretch of WAL that follows on the one before. It can cross segment boundaries, and ends
    /// at a page's end or where the server has flushed to: within a record only at a page's end.
    Wal {
        /// Where `bytes` begins.
        start: Lsn,
        /// The end of WAL that the server had to send then.
        server_end: Lsn,
        /// When it sent this, by its clock.
        sent_at: PgTime,
        /// The WAL.
        bytes: Bytes,
    },
    /// Nothing to send, or an answer is wanted.
    Keepalive {
        /// How far the server has sent WAL.
        server_end: Lsn,
        /// When it sent this, by its clock.
        sent_at: PgTime,
        /// The server wants a status update at once: it is shutting down, or half of its
        /// `wal_sender_timeout` went by without one.
        reply_requested: bool,
    },
    /// The timeline ended; [`WalStream::into_connection`] gives the connection back. What came
    /// before can reach past `at` where the server is a standby: that belongs to no one.
    TimelineEnd {
        /// The timeline that followed.
        next: TimelineId,
        /// Where it left this one.
        at: Lsn,
    },
    /// The server shut down in good order and closed the connection, all WAL being sent.
    ServerClosed,
}

/// What is reported to the server (walsender.c, `ProcessStandbyReplyMessage`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StatusUpdate {
    /// Received up to here, exclusive.
    pub write: Lsn,
    /// Durable up to here, exclusive. A server believes it: it recycles WAL and releases
    /// synchronous commits by it.
    pub flush: Lsn,
    /// Replayed up to here, exclusive.
    pub apply: Lsn,
    /// Ask for a keepalive at once.
    pub reply_requested: bool,
    /// When this was made, by our clock.
    pub now: PgTime,
}

/// A running stream of WAL.
///
/// One task can do both directions: [`next`](Self::next) sends what
/// [`queue_status`](Self::queue_status) left while it waits for the server. A loop that does not
/// read just now (its buffers are full) calls [`flush`](Self::flush) instead, which never reads.
/// Whether the peer is still there is for the caller to watch, by a deadline on events: a
/// server sends a keepalive at the latest after half of `wal_sender_timeout`.
#[derive(Debug)]
pub struct WalStream {
    connection: Connection,
    phase: Phase,
    /// Where the next WAL must begin.
    expected: Lsn,
    /// The newest status that was not yet put behind what is being sent: at most one waits.
    status: Option<StatusUpdate>,
    /// False once sending failed: what the server still said is worth reading.
    can_send: bool,
}

/// Where the conversation is. Everything between two events is kept here, so that a future can be
/// dropped anywhere.
#[derive(Debug)]
enum Phase {
    Streaming,
    /// The server said `CopyDone`, ours is queued; its next timeline follows.
    TimelineEnding {
        next: Option<(TimelineId, Lsn)>,
    },
    /// The server said `CommandComplete` and will close.
    ServerClosing,
    /// We said `CopyDone`; the rest is passed over up to `ReadyForQuery`.
    Stopping,
    /// The server refused to go on; `ReadyForQuery` follows.
    Failed(ServerError),
    /// `ReadyForQuery` was read.
    Ready,
    /// No more can come.
    Dead,
}

enum Step {
    Event(StreamEvent),
    Stopped,
}

impl WalStream {
    /// The next event; meanwhile a queued status is sent.
    ///
    /// Cancel safe: a dropped future has lost nothing, so it can be a branch of `select!`.
    ///
    /// # Errors
    /// [`StreamError`], once; then [`StreamError::Ended`]. After [`StreamError::Server`] the
    /// connection may be good for more, see [`Self::into_connection`].
    pub async fn next(&mut self) -> Result<StreamEvent, StreamError> {
        poll_fn(|cx| match ready!(self.poll_step(cx)) {
            Ok(Step::Event(event)) => Poll::Ready(Ok(event)),
            Ok(Step::Stopped) => Poll::Ready(Err(StreamError::Ended)),
            Err(error) => Poll::Ready(Err(error)),
        })
        .await
    }

    /// Leaves `status` to be sent by [`Self::next`] or [`Self::flush`].
    ///
    /// One that still waits is replaced, as only the newest counts; a reply that it requested
    /// stays requested. After the end of the stream this does nothing.
    pub fn queue_status(&mut self, mut status: StatusUpdate) {
        status.reply_requested |= self.status.is_some_and(|waiting| waiting.reply_requested);
        self.status = Some(status);
    }

    /// Sends what is queued, without reading. Cancel safe: nothing is lost or sent twice.
    ///
    /// # Errors
    /// [`StreamError::Wire`]. [`Self::next`] then tells what the server said last, if anything.
    pub async fn flush(&mut self) -> Result<(), StreamError> {
        poll_fn(|cx| self.poll_send(cx))
            .await
            .inspect_err(|_| self.can_send = false)?;
        Ok(())
    }

    /// [`Self::queue_status`] and [`Self::flush`].
    ///
    /// # Errors
    /// [`StreamError::Wire`], as [`Self::flush`].
    pub async fn send_status(&mut self, status: StatusUpdate) -> Result<(), StreamError> {
        self.queue_status(status);
        self.flush().await
    }

    /// Ends streaming from our side, after a status that is still queued. WAL that arrives
    /// meanwhile is passed over: the server sends it again to who asks for it.
    ///
    /// Waits for the server; put a limit to it.
    ///
    /// # Errors
    /// [`StreamError`]; the connection is dropped then, which ends streaming as well.
    pub async fn stop(mut self) -> Result<Connection, StreamError> {
        if matches!(self.phase, Phase::Streaming) {
            poll_fn(|cx| self.poll_send(cx)).await?;
            self.queue_copy_done();
            self.phase = Phase::Stopping;
        }
        while !matches!(self.phase, Phase::Ready) {
            match poll_fn(|cx| self.poll_step(cx)).await? {
                Step::Event(StreamEvent::ServerClosed) => return Err(WireError::Closed.into()),
                Step::Event(_) | Step::Stopped => {}
            }
        }
        Ok(self.connection)
    }

    /// The connection, after [`StreamEvent::TimelineEnd`] or a [`StreamError::Server`] that did
    /// not end it; `None` if it is good for nothing more.
    pub fn into_connection(self) -> Option<Connection> {
        matches!(self.phase, Phase::Ready).then_some(self.connection)
    }

    /// Which server this is, for errors and logs.
    pub fn described(&self) -> &str {
        self.connection.described()
    }

    /// The newest value of a parameter that the server reports by itself.
    pub fn parameter(&self, name: &str) -> Option<&str> {
        self.connection.parameter(name)
    }

    /// Where the next WAL begins.
    pub fn position(&self) -> Lsn {
        self.expected
    }

    fn poll_step(&mut self, cx: &mut Context<'_>) -> Poll<Result<Step, StreamError>> {
        loop {
            if matches!(self.phase, Phase::Ready | Phase::Dead) {
                return Poll::Ready(Err(StreamError::Ended));
            }
            if self.can_send && matches!(self.poll_send(cx), Poll::Ready(Err(_))) {
                // Reading will say why: an error of the server's, or the connection's end.
                self.can_send = false;
            }
            let message = match ready!(self.connection.poll_read(cx)) {
                Ok(message) => message,
                Err(error) => return Poll::Ready(self.cut_off(error)),
            };
            match self.handle(message) {
                Ok(None) => {}
                Ok(Some(step)) => return Poll::Ready(Ok(step)),
                Err(error) => {
                    if !matches!(self.phase, Phase::Ready) {
                        self.phase = Phase::Dead;
                    }
                    return Poll::Ready(Err(error));
                }
            }
        }
    }

    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), WireError>> {
        loop {
            let framed = self.connection.framed();
            if framed.queued_bytes() == 0
                && let Some(status) = self.status.take()
                && matches!(self.phase, Phase::Streaming)
            {
                let body = encode_status(&status);
                framed
                    .queue_with(|out| {
                        frontend::CopyData::new(&body[..])?.write(out);
                        Ok(())
                    })
                    .map_err(WireError::Write)?;
            }
            ready!(framed.poll_flush(cx))?;
            if self.status.is_none() {
                return Poll::Ready(Ok(()));
            }
        }
    }

    fn queue_copy_done(&mut self) {
        let mut message = BytesMut::new();
        frontend::copy_done(&mut message);
        self.connection.framed().queue(&message);
    }

    /// No more messages: what that means depends on what was said before.
    fn cut_off(&mut self, error: WireError) -> Result<Step, StreamError> {
        match std::mem::replace(&mut self.phase, Phase::Dead) {
            Phase::ServerClosing if error.is_transient() => {
                Ok(Step::Event(StreamEvent::ServerClosed))
            }
            Phase::Failed(said) => Err(said.into()),
            _ => Err(error.into()),
        }
    }

    /// One message; `None` if it is no event by itself.
    fn handle(&mut self, message: Message) -> Result<Option<Step>, StreamError> {
        use backend::Message as B;
        if let Message::Backend(B::ErrorResponse(body)) = &message {
            let error = ServerError::of_error(body);
            if error.ends_connection() {
                return Err(error.into());
            }
            self.phase = Phase::Failed(error);
            return Ok(None);
        }
        match (&mut self.phase, message) {
            (Phase::Streaming, Message::CopyData(data)) => self.event(data).map(Some),
            (Phase::Streaming, Message::Backend(B::CopyDone)) => {
                self.phase = Phase::TimelineEnding { next: None };
                self.queue_copy_done();
                Ok(None)
            }
            (Phase::Streaming, Message::Backend(B::CommandComplete(_))) => {
                self.phase = Phase::ServerClosing;
                Ok(None)
            }
            (Phase::TimelineEnding { next }, Message::Backend(B::DataRow(body))) => {
                *next = Some(next_timeline(&body)?);
                Ok(None)
            }
            (Phase::TimelineEnding { next }, Message::Backend(B::ReadyForQuery(_))) => {
                let next = *next;
                self.ready();
                let (place, missing) = ("the end of a timeline", "the next timeline");
                let (next, at) = next.ok_or(QueryError::Incomplete { place, missing })?;
                Ok(Some(Step::Event(StreamEvent::TimelineEnd { next, at })))
            }
            (Phase::Stopping, Message::Backend(B::ReadyForQuery(_))) => {
                self.ready();
                Ok(Some(Step::Stopped))
            }
            (Phase::Failed(_), Message::Backend(B::ReadyForQuery(_))) => match self.ready() {
                Phase::Failed(error) => Err(error.into()),
                _ => Err(StreamError::Ended),
            },
            (
                Phase::TimelineEnding { .. } | Phase::Stopping,
                Message::Backend(B::RowDescription(_) | B::CommandComplete(_)),
            )
            | (
                Phase::Stopping,
                Message::CopyData(_) | Message::Backend(B::CopyDone | B::DataRow(_)),
            )
            | (Phase::Failed(_), _) => Ok(None),
            (_, other) => Err(unexpected("a stream of WAL", &other).into()),
        }
    }

    fn ready(&mut self) -> Phase {
        self.connection.answered();
        std::mem::replace(&mut self.phase, Phase::Ready)
    }

    fn event(&mut self, data: Bytes) -> Result<Step, StreamError> {
        let event = decode_event(data)?;
        if let StreamEvent::Wal { start, bytes, .. } = &event {
            if *start != self.expected {
                return Err(StreamError::Discontinuity {
                    expected: self.expected,
                    found: *start,
                });
            }
            self.expected = end_of(*start, bytes.len())?;
        }
        Ok(Step::Event(event))
    }
}

/// Decodes what one `CopyData` of the server's holds: `Wal` or `Keepalive`.
///
/// `data` may be damaged or hostile: never panics, copies nothing.
///
/// # Errors
/// [`StreamError::MalformedMessage`], [`StreamError::UnknownMessage`], [`StreamError::Overflow`].
pub fn decode_event(mut data: Bytes) -> Result<StreamEvent, StreamError> {
    let found = data.len();
    let lsn = |data: &mut Bytes| Lsn::new(data.get_u64());
    match data.first() {
        Some(b'w') if found >= WAL_HEADER_BYTES => {
            data.advance(1);
            let start = lsn(&mut data);
            let server_end = lsn(&mut data);
            let sent_at = PgTime(data.get_i64());
            end_of(start, data.len())?;
            Ok(StreamEvent::Wal {
                start,
                server_end,
                sent_at,
                bytes: data,
            })
        }
        Some(b'k') if found == KEEPALIVE_BYTES => {
            data.advance(1);
            let server_end = lsn(&mut data);
            let sent_at = PgTime(data.get_i64());
            Ok(StreamEvent::Keepalive {
                server_end,
                sent_at,
                reply_requested: data.get_u8() != 0,
            })
        }
        Some(b'w') => Err(StreamError::MalformedMessage {
            part: "WAL data",
            expected: WAL_HEADER_BYTES,
            found,
        }),
        Some(b'k') => Err(StreamError::MalformedMessage {
            part: "keepalive",
            expected: KEEPALIVE_BYTES,
            found,
        }),
        Some(&tag) => Err(StreamError::UnknownMessage {
            tag: char::from(tag),
        }),
        None => Err(StreamError::MalformedMessage {
            part: "copy data",
            expected: 1,
            found: 0,
        }),
    }
}

fn encode_status(status: &StatusUpdate) -> [u8; STATUS_BYTES] {
    let mut body = [0; STATUS_BYTES];
    let mut out = &mut body[..];
    out.put_u8(b'r');
    out.put_u64(status.write.as_u64());
    out.put_u64(status.flush.as_u64());
    out.put_u64(status.apply.as_u64());
    out.put_i64(status.now.0);
    out.put_u8(u8::from(status.reply_requested));
    body
}

fn end_of(start: Lsn, bytes: usize) -> Result<Lsn, StreamError> {
    let end = u64::try_from(bytes)
        .ok()
        .and_then(|bytes| start.checked_add(bytes));
    end.ok_or(StreamError::Overflow { start, bytes })
}

/// The row `(next_tli int8, next_tli_startpos text)` of walsender.c, `StartReplication`.
fn next_timeline(row: &backend::DataRowBody) -> Result<(TimelineId, Lsn), QueryError> {
    let values = row_values(row)?;
    let mut values = values.iter().map(Option::as_deref);
    let next = parsed("the next timeline", values.next().flatten())?;
    let at = parsed("the next timeline's start", values.next().flatten())?;
    Ok((next, at))
}

/// Why a stream did not start or did not go on.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The server refused. WAL that it no longer has is SQLSTATE 58P01.
    #[error(transparent)]
    Server(Box<ServerError>),
    /// The connection failed, or the peer does not keep to the framing.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The slot cannot be used.
    #[error(transparent)]
    Slot(SlotError),
    /// The server's answer is not what the command has.
    #[error(transparent)]
    Answer(QueryError),
    /// WAL that does not follow on what came before.
    #[error("WAL is not continuous: expected={expected}, found={found}")]
    Discontinuity {
        /// Where it should have begun.
        expected: Lsn,
        /// Where it began.
        found: Lsn,
    },
    /// WAL beyond the last possible position.
    #[error("WAL ends beyond the last position there is: start={start}, bytes={bytes}")]
    Overflow {
        /// Where it begins.
        start: Lsn,
        /// How long it is.
        bytes: usize,
    },
    /// A message of the stream that is too short or too long.
    #[error("malformed {part} message: expected_bytes={expected}, found_bytes={found}")]
    MalformedMessage {
        /// Which message.
        part: &'static str,
        /// Its length, or its least.
        expected: usize,
        /// The length it had.
        found: usize,
    },
    /// A message of the stream of a type that is not known.
    #[error("unknown message in a stream of WAL: type={tag:?}")]
    UnknownMessage {
        /// The type.
        tag: char,
    },
    /// The stream had ended before.
    #[error("the stream has ended")]
    Ended,
}

impl StreamError {
    /// Whether the same may succeed on a new connection with nothing changed.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Server(error) => error.is_transient(),
            Self::Wire(error) => error.is_transient(),
            Self::Slot(error) => error.is_transient(),
            Self::Answer(error) => error.is_transient(),
            Self::Ended => true,
            Self::Discontinuity { .. }
            | Self::Overflow { .. }
            | Self::MalformedMessage { .. }
            | Self::UnknownMessage { .. } => false,
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

impl From<ServerError> for StreamError {
    fn from(error: ServerError) -> Self {
        Self::Server(Box::new(error))
    }
}

impl From<QueryError> for StreamError {
    fn from(error: QueryError) -> Self {
        match error {
            QueryError::Server(error) => Self::Server(error),
            QueryError::Wire(error) => Self::Wire(error),
            error => Self::Answer(error),
        }
    }
}
