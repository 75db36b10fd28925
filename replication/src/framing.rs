//! Messages of PostgreSQL's protocol 3.0 over any byte stream.
//!
//! `postgres-protocol` decodes most messages, but knows neither `CopyBothResponse` nor
//! `NegotiateProtocolVersion`, and takes a length of up to 4 GiB at its word. So the header is
//! looked at here first: what is too large is refused before anything is allocated for it, those
//! two messages and `CopyData` are decoded here (the latter without a copy), and the rest is
//! handed on.

use std::fmt;
use std::future::poll_fn;
use std::io;
use std::pin::pin;
use std::task::{Context, Poll};

use bytes::{Buf, Bytes, BytesMut};
use postgres_protocol::message::backend;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Largest `CopyData` that is taken, header excluded, in bytes.
///
/// walsender.c sends at most `MAX_SEND_SIZE`, 16 WAL pages and 25 bytes before them: 131,097 with
/// pages of 8 KiB, 1 MiB with the largest that PostgreSQL can be built with. `BASE_BACKUP` sends
/// 32 KiB and a type byte.
pub const COPY_DATA_BYTES_MAX: usize = 2 << 20;

/// Largest message of any other kind that is taken, header excluded, in bytes: rows of a result,
/// timeline histories, errors with their context.
pub const MESSAGE_BYTES_MAX: usize = 16 << 20;

/// Type byte and length, which counts itself but not the type byte.
const HEADER_BYTES: usize = 5;

/// Room made for one read. What a header announces is reserved in steps of at most
/// [`READ_BYTES_MAX`], so that a liar costs no more than it sends.
const READ_BYTES_MIN: usize = 64 << 10;
const READ_BYTES_MAX: usize = 256 << 10;

/// What a message stream runs over: TCP, a Unix socket, TLS, or a pipe in tests.
pub trait Wire: AsyncRead + AsyncWrite + Unpin + Send + Sync {}

impl<S: AsyncRead + AsyncWrite + Unpin + Send + Sync> Wire for S {}

/// A byte stream read as messages, with a buffer for what is still to be sent.
pub struct Framed {
    stream: Box<dyn Wire>,
    input: BytesMut,
    output: BytesMut,
    /// Bytes were handed to `stream` that it may still hold itself, as TLS does.
    unflushed: bool,
}

impl Framed {
    /// Reads and writes messages on `stream`, from which nothing of the first one was read yet.
    pub fn new(stream: impl Wire + 'static) -> Self {
        Self {
            stream: Box::new(stream),
            input: BytesMut::new(),
            output: BytesMut::new(),
            unflushed: false,
        }
    }

    /// The next message.
    ///
    /// Cancel safe: a dropped future has lost nothing, the next call goes on where it was.
    ///
    /// # Errors
    /// [`WireError`]. After one that is not [transient](WireError::is_transient) the stream has
    /// lost its step and must be dropped.
    pub async fn read_message(&mut self) -> Result<Message, WireError> {
        poll_fn(|cx| self.poll_message(cx)).await
    }

    /// [`Self::read_message`] as a poll.
    pub fn poll_message(&mut self, cx: &mut Context<'_>) -> Poll<Result<Message, WireError>> {
        loop {
            let expected = match decode(&mut self.input)? {
                Decoded::Message(message) => return Poll::Ready(Ok(message)),
                Decoded::Needs(bytes) => bytes,
            };
            let missing = expected - self.input.len();
            // Small messages share one buffer until its room is used up.
            if self.input.capacity() - self.input.len() < missing.min(READ_BYTES_MAX) {
                self.input
                    .reserve(missing.clamp(READ_BYTES_MIN, READ_BYTES_MAX));
            }
            // The future of `read_buf` keeps nothing between polls, so it can be made anew.
            let read = pin!(self.stream.read_buf(&mut self.input)).poll(cx);
            let received = match read {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Ok(received)) => received,
                // TLS says this where a peer went without saying goodbye.
                Poll::Ready(Err(e)) if e.kind() == io::ErrorKind::UnexpectedEof => 0,
                Poll::Ready(Err(e)) => return Poll::Ready(Err(WireError::Read(e))),
            };
            if received == 0 {
                return Poll::Ready(Err(if self.input.is_empty() {
                    WireError::Closed
                } else {
                    WireError::Cut {
                        received: self.input.len(),
                        expected,
                    }
                }));
            }
        }
    }

    /// Adds `bytes` to what [`Self::flush`] sends.
    pub fn queue(&mut self, bytes: &[u8]) {
        self.output.extend_from_slice(bytes);
    }

    /// Lets `write` append whole messages to what [`Self::flush`] sends; of one that fails,
    /// nothing stays.
    ///
    /// # Errors
    /// What `write` returns: `postgres-protocol` refuses strings with a zero byte and messages
    /// over 2 GiB.
    pub fn queue_with(
        &mut self,
        write: impl FnOnce(&mut BytesMut) -> io::Result<()>,
    ) -> io::Result<()> {
        let before = self.output.len();
        write(&mut self.output).inspect_err(|_| self.output.truncate(before))
    }

    /// How many queued bytes the stream has not taken yet.
    pub fn queued_bytes(&self) -> usize {
        self.output.len()
    }

    /// Sends what is queued.
    ///
    /// Cancel safe: a dropped future leaves the unsent rest queued, and never sends a byte twice.
    ///
    /// # Errors
    /// [`WireError::Write`].
    pub async fn flush(&mut self) -> Result<(), WireError> {
        poll_fn(|cx| self.poll_flush(cx)).await
    }

    /// [`Self::flush`] as a poll.
    pub fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), WireError>> {
        while !self.output.is_empty() {
            self.unflushed = true;
            match pin!(self.stream.write_buf(&mut self.output)).poll(cx) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Ok(0)) => {
                    let none_taken = io::Error::from(io::ErrorKind::WriteZero);
                    return Poll::Ready(Err(WireError::Write(none_taken)));
                }
                Poll::Ready(Ok(_)) => {}
                Poll::Ready(Err(e)) => return Poll::Ready(Err(WireError::Write(e))),
            }
        }
        if self.unflushed {
            match pin!(self.stream.flush()).poll(cx) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Ok(())) => self.unflushed = false,
                Poll::Ready(Err(e)) => return Poll::Ready(Err(WireError::Write(e))),
            }
        }
        Poll::Ready(Ok(()))
    }

    /// [`Self::queue`] and [`Self::flush`].
    ///
    /// # Errors
    /// [`WireError::Write`].
    pub async fn send(&mut self, bytes: &[u8]) -> Result<(), WireError> {
        self.queue(bytes);
        self.flush().await
    }

    /// Sends what is queued and closes the writing side: TLS says goodbye.
    ///
    /// # Errors
    /// [`WireError::Write`].
    pub async fn shutdown(&mut self) -> Result<(), WireError> {
        self.flush().await?;
        self.stream.shutdown().await.map_err(WireError::Write)
    }
}

impl fmt::Debug for Framed {
    /// Counts only: the buffers can hold a password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Framed")
            .field("unread_bytes", &self.input.len())
            .field("unsent_bytes", &self.output.len())
            .finish_non_exhaustive()
    }
}

/// A message of the server's.
#[non_exhaustive]
pub enum Message {
    /// `CopyBothResponse`, 'W': WAL follows, and status updates may be sent.
    CopyBoth,
    /// `CopyData`, 'd'.
    CopyData(Bytes),
    /// `NegotiateProtocolVersion`, 'v': what the server does not know of our startup message.
    NegotiateProtocolVersion {
        /// The newest minor version of protocol 3 that the server speaks.
        newest_minor: u32,
        /// The protocol options (`_pq_.`) that it does not know.
        unknown_options: Vec<String>,
    },
    /// Everything else.
    Backend(backend::Message),
}

impl Message {
    /// The name that PostgreSQL's documentation gives to the message, for errors.
    pub fn name(&self) -> &'static str {
        use backend::Message as B;
        match self {
            Self::CopyBoth => "CopyBothResponse",
            Self::CopyData(_) => "CopyData",
            Self::NegotiateProtocolVersion { .. } => "NegotiateProtocolVersion",
            Self::Backend(message) => match message {
                B::AuthenticationCleartextPassword => "AuthenticationCleartextPassword",
                B::AuthenticationGss => "AuthenticationGSS",
                B::AuthenticationKerberosV5 => "AuthenticationKerberosV5",
                B::AuthenticationMd5Password(_) => "AuthenticationMD5Password",
                B::AuthenticationOk => "AuthenticationOk",
                B::AuthenticationScmCredential => "AuthenticationSCMCredential",
                B::AuthenticationSspi => "AuthenticationSSPI",
                B::AuthenticationGssContinue(_) => "AuthenticationGSSContinue",
                B::AuthenticationSasl(_) => "AuthenticationSASL",
                B::AuthenticationSaslContinue(_) => "AuthenticationSASLContinue",
                B::AuthenticationSaslFinal(_) => "AuthenticationSASLFinal",
                B::BackendKeyData(_) => "BackendKeyData",
                B::BindComplete => "BindComplete",
                B::CloseComplete => "CloseComplete",
                B::CommandComplete(_) => "CommandComplete",
                B::CopyData(_) => "CopyData",
                B::CopyDone => "CopyDone",
                B::CopyInResponse(_) => "CopyInResponse",
                B::CopyOutResponse(_) => "CopyOutResponse",
                B::DataRow(_) => "DataRow",
                B::EmptyQueryResponse => "EmptyQueryResponse",
                B::ErrorResponse(_) => "ErrorResponse",
                B::NoData => "NoData",
                B::NoticeResponse(_) => "NoticeResponse",
                B::NotificationResponse(_) => "NotificationResponse",
                B::ParameterDescription(_) => "ParameterDescription",
                B::ParameterStatus(_) => "ParameterStatus",
                B::ParseComplete => "ParseComplete",
                B::PortalSuspended => "PortalSuspended",
                B::ReadyForQuery(_) => "ReadyForQuery",
                B::RowDescription(_) => "RowDescription",
                _ => "a message of a newer protocol",
            },
        }
    }
}

impl fmt::Debug for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::CopyData(data) => write!(f, "CopyData({} bytes)", data.len()),
            other => f.write_str(other.name()),
        }
    }
}

/// Why no message could be read or sent.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The stream ended between two messages.
    #[error("the server closed the connection")]
    Closed,
    /// The stream ended within a message.
    #[error(
        "the connection was cut inside a message: received_bytes={received}, expected_bytes={expected}"
    )]
    Cut {
        /// Bytes of the message that came, header included.
        received: usize,
        /// Bytes of the message that were announced, or of its header if not even that came.
        expected: usize,
    },
    /// Nothing came for as long as is waited.
    #[error("the server was silent for {seconds} s")]
    Silent {
        /// How long that was.
        seconds: u64,
    },
    /// Reading failed.
    #[error("cannot read from the server: {0}")]
    Read(#[source] io::Error),
    /// Writing failed.
    #[error("cannot send to the server: {0}")]
    Write(#[source] io::Error),
    /// A message larger than any that a server sends, refused before it was read.
    #[error(
        "refused a message that is larger than any PostgreSQL sends (is this a PostgreSQL server?): \
         type={tag:?}, bytes={bytes}, limit={limit}"
    )]
    TooLarge {
        /// The type byte.
        tag: char,
        /// What the header announced, without the header.
        bytes: u64,
        /// What is taken of this type.
        limit: usize,
    },
    /// A length that does not even count itself.
    #[error("message with an impossible length: type={tag:?}, length={length}")]
    BadLength {
        /// The type byte.
        tag: char,
        /// The length field.
        length: u32,
    },
    /// A message that does not have its type's layout, or of a type that is not known.
    #[error("malformed message: type={tag:?}: {reason}")]
    Malformed {
        /// The type byte.
        tag: char,
        /// What is wrong with it.
        #[source]
        reason: io::Error,
    },
}

impl WireError {
    /// Whether connecting again may help: the connection was lost. Otherwise the peer does not
    /// speak the protocol.
    pub fn is_transient(&self) -> bool {
        matches!(
            self,
            Self::Closed | Self::Cut { .. } | Self::Silent { .. } | Self::Read(_) | Self::Write(_)
        )
    }
}

enum Decoded {
    Message(Message),
    /// The buffer must hold this many bytes before anything more can be said.
    Needs(usize),
}

/// Takes one message off the front of `input`.
///
/// `input` may be hostile: never panics, allocates nothing of the size that a header claims.
fn decode(input: &mut BytesMut) -> Result<Decoded, WireError> {
    let Some((&[tag, l0, l1, l2, l3], _)) = input.split_first_chunk::<HEADER_BYTES>() else {
        return Ok(Decoded::Needs(HEADER_BYTES));
    };
    let length = u32::from_be_bytes([l0, l1, l2, l3]);
    let Some(body_bytes) = length.checked_sub(4) else {
        return Err(WireError::BadLength {
            tag: char::from(tag),
            length,
        });
    };
    let limit = if tag == backend::COPY_DATA_TAG {
        COPY_DATA_BYTES_MAX
    } else {
        MESSAGE_BYTES_MAX
    };
    let body_bytes = match usize::try_from(body_bytes) {
        Ok(bytes) if bytes <= limit => bytes,
        _ => {
            let bytes = u64::from(body_bytes);
            return Err(WireError::TooLarge {
                tag: char::from(tag),
                bytes,
                limit,
            });
        }
    };
    let total_bytes = HEADER_BYTES + body_bytes;
    if input.len() < total_bytes {
        return Ok(Decoded::Needs(total_bytes));
    }

    let malformed = |reason| WireError::Malformed {
        tag: char::from(tag),
        reason,
    };
    let mut frame = input.split_to(total_bytes);
    let message = match tag {
        backend::COPY_DATA_TAG => {
            frame.advance(HEADER_BYTES);
            Message::CopyData(frame.freeze())
        }
        b'W' => {
            copy_both(&frame[HEADER_BYTES..]).map_err(malformed)?;
            Message::CopyBoth
        }
        b'v' => negotiate_protocol_version(&frame[HEADER_BYTES..]).map_err(malformed)?,
        _ => match backend::Message::parse(&mut frame).map_err(malformed)? {
            Some(message) => Message::Backend(message),
            None => return Err(malformed(invalid("shorter than its header says"))),
        },
    };
    Ok(Decoded::Message(message))
}

/// `CopyBothResponse`: overall format u8, column count i16, a format for each.
fn copy_both(body: &[u8]) -> io::Result<()> {
    let Some((&[_format, c0, c1], formats)) = body.split_first_chunk::<3>() else {
        return Err(invalid("shorter than 3 bytes"));
    };
    let columns = usize::from(u16::from_be_bytes([c0, c1]));
    if formats.len() == columns * 2 {
        Ok(())
    } else {
        Err(invalid("column formats do not fill the message"))
    }
}

/// `NegotiateProtocolVersion`: newest minor version u32, count u32, as many C strings.
fn negotiate_protocol_version(body: &[u8]) -> io::Result<Message> {
    let Some((&[v0, v1, v2, v3, c0, c1, c2, c3], mut rest)) = body.split_first_chunk::<8>() else {
        return Err(invalid("shorter than 8 bytes"));
    };
    let count = u32::from_be_bytes([c0, c1, c2, c3]);
    let mut unknown_options = Vec::new();
    for _ in 0..count {
        let Some(end) = rest.iter().position(|&byte| byte == 0) else {
            return Err(invalid("fewer options than announced"));
        };
        unknown_options.push(String::from_utf8_lossy(&rest[..end]).into_owned());
        rest = &rest[end + 1..];
    }
    if !rest.is_empty() {
        return Err(invalid("bytes after the last option"));
    }
    let newest_minor = u32::from_be_bytes([v0, v1, v2, v3]) & 0xFFFF;
    Ok(Message::NegotiateProtocolVersion {
        newest_minor,
        unknown_options,
    })
}

fn invalid(reason: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason)
}
