//! A server that plays a list of steps, over a pipe.

use std::collections::BTreeMap;

use replication::connection::Connection;
use replication::framing::Framed;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::task::JoinHandle;

/// What the server does next.
pub(crate) enum Step {
    /// Read a query; it must be this one.
    Query(&'static str),
    /// Read a message; it must be this one.
    Receive(Vec<u8>),
    /// Send bytes.
    Send(Vec<u8>),
    /// Read until the client closes. Without it the server closes after its last step.
    UntilClosed,
}

pub(crate) use Step::{Query, Receive, Send, UntilClosed};

/// A running script; [`Self::done`] shows whether the client kept to it.
#[must_use]
pub(crate) struct Script(JoinHandle<()>);

impl Script {
    pub(crate) async fn done(self) {
        self.0.await.unwrap();
    }
}

/// A connection to a server of `version` that plays `steps`.
pub(crate) fn connection(version: &str, steps: Vec<Step>) -> (Connection, Script) {
    let (framed, script) = framed(steps);
    let parameters = BTreeMap::from([("server_version".to_owned(), version.to_owned())]);
    (
        Connection::new(framed, parameters, "a scripted server".to_owned()),
        script,
    )
}

pub(crate) fn framed(steps: Vec<Step>) -> (Framed, Script) {
    let (client, server) = tokio::io::duplex(1 << 16);
    (
        Framed::new(client),
        Script(tokio::spawn(play(server, steps))),
    )
}

async fn play(mut stream: DuplexStream, steps: Vec<Step>) {
    for step in steps {
        match step {
            Query(sql) => {
                let message = receive(&mut stream).await;
                let text = String::from_utf8(message[5..message.len() - 1].to_vec()).unwrap();
                assert_eq!((char::from(message[0]), text.as_str()), ('Q', sql));
            }
            Receive(expected) => assert_eq!(receive(&mut stream).await, expected),
            // A client that goes while it is being told something is for its own test to judge.
            Send(bytes) => drop(stream.write_all(&bytes).await),
            UntilClosed => drop(stream.read_to_end(&mut Vec::new()).await),
        }
    }
}

async fn receive(stream: &mut DuplexStream) -> Vec<u8> {
    let mut message = vec![0; 5];
    stream.read_exact(&mut message).await.unwrap();
    let length = u32::from_be_bytes(message[1..].try_into().unwrap());
    message.resize(1 + usize::try_from(length).unwrap(), 0);
    stream.read_exact(&mut message[5..]).await.unwrap();
    message
}

pub(crate) fn message(tag: u8, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len() + 4).unwrap().to_be_bytes();
    [&[tag], &length[..], body].concat()
}

pub(crate) fn columns(names: &[&str]) -> Vec<u8> {
    let mut body = u16::try_from(names.len()).unwrap().to_be_bytes().to_vec();
    for name in names {
        body.extend_from_slice(name.as_bytes());
        body.extend_from_slice(&[0; 19]);
    }
    message(b'T', &body)
}

pub(crate) fn row(values: &[Option<&str>]) -> Vec<u8> {
    let mut body = u16::try_from(values.len()).unwrap().to_be_bytes().to_vec();
    for value in values {
        match value {
            Some(value) => {
                body.extend_from_slice(&u32::try_from(value.len()).unwrap().to_be_bytes());
                body.extend_from_slice(value.as_bytes());
            }
            None => body.extend_from_slice(&(-1_i32).to_be_bytes()),
        }
    }
    message(b'D', &body)
}

pub(crate) fn complete(tag: &str) -> Vec<u8> {
    message(b'C', &[tag.as_bytes(), &[0]].concat())
}

pub(crate) fn ready() -> Vec<u8> {
    message(b'Z', b"I")
}

pub(crate) fn error(severity: &str, sqlstate: &str, text: &str) -> Vec<u8> {
    message(b'E', &fields(severity, sqlstate, text))
}

pub(crate) fn warning(text: &str) -> Vec<u8> {
    message(b'N', &fields("WARNING", "01000", text))
}

pub(crate) fn notice(text: &str) -> Vec<u8> {
    message(b'N', &fields("NOTICE", "00000", text))
}

fn fields(severity: &str, sqlstate: &str, text: &str) -> Vec<u8> {
    format!("S{severity}\0V{severity}\0C{sqlstate}\0M{text}\0\0").into_bytes()
}

pub(crate) fn copy_both() -> Vec<u8> {
    message(b'W', &[0, 0, 0])
}

pub(crate) fn copy_in() -> Vec<u8> {
    message(b'G', &[0, 0, 0])
}

pub(crate) fn copy_out() -> Vec<u8> {
    message(b'H', &[0, 0, 0])
}

pub(crate) fn copy_data(data: &[u8]) -> Vec<u8> {
    message(b'd', data)
}

pub(crate) fn copy_done() -> Vec<u8> {
    message(b'c', &[])
}

pub(crate) fn wal(start: u64, bytes: &[u8]) -> Vec<u8> {
    let end = start.wrapping_add(u64::try_from(bytes.len()).unwrap());
    let parts = [
        &b"w"[..],
        &start.to_be_bytes(),
        &end.to_be_bytes(),
        &7_i64.to_be_bytes(),
        bytes,
    ];
    copy_data(&parts.concat())
}

pub(crate) fn keepalive(end: u64, reply_requested: bool) -> Vec<u8> {
    let reply = [u8::from(reply_requested)];
    copy_data(&[&b"k"[..], &end.to_be_bytes(), &7_i64.to_be_bytes(), &reply].concat())
}

/// The status update that reports `write` = `flush`, as the client must send it.
pub(crate) fn status(flush: u64, now: i64, reply_requested: bool) -> Vec<u8> {
    let flush = flush.to_be_bytes();
    let reply = [u8::from(reply_requested)];
    copy_data(
        &[
            &b"r"[..],
            &flush,
            &flush,
            &[0; 8],
            &now.to_be_bytes(),
            &reply,
        ]
        .concat(),
    )
}
