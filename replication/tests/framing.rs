//! Messages over a stream that is slow, cut, or not PostgreSQL's.

use replication::framing::{COPY_DATA_BYTES_MAX, Framed, Message, WireError};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::scripted::{Send, copy_data, framed, keepalive, message, ready};

async fn first_error(bytes: Vec<u8>) -> WireError {
    let (mut framed, script) = framed(vec![Send(bytes)]);
    let error = framed.read_message().await.unwrap_err();
    script.done().await;
    error
}

/// A wrong port or a hostile peer could otherwise make us reserve gigabytes.
#[tokio::test]
async fn refuses_an_oversize_message_by_its_header_alone() {
    let over = u32::try_from(COPY_DATA_BYTES_MAX + 1 + 4).unwrap();
    let error = first_error([&b"d"[..], &over.to_be_bytes()].concat()).await;
    assert!(
        matches!(error, WireError::TooLarge { tag: 'd', .. }),
        "{error}"
    );
    assert!(!error.is_transient());

    let error = first_error(b"HTTP/1.1 400 Bad Request\r\n".to_vec()).await;
    assert!(
        error.to_string().contains("is this a PostgreSQL server?"),
        "{error}"
    );

    let largest = copy_data(&vec![1; COPY_DATA_BYTES_MAX]);
    let (mut framed, script) = framed(vec![Send(largest)]);
    let Message::CopyData(data) = framed.read_message().await.unwrap() else {
        panic!("no copy data");
    };
    assert_eq!(data.len(), COPY_DATA_BYTES_MAX);
    script.done().await;
}

#[tokio::test]
async fn tells_a_cut_message_from_a_closed_connection() {
    let error = first_error(Vec::new()).await;
    assert!(matches!(error, WireError::Closed), "{error}");
    let whole = keepalive(0x1000, false);
    let error = first_error(whole[..3].to_vec()).await;
    assert!(
        matches!(
            error,
            WireError::Cut {
                received: 3,
                expected: 5
            }
        ),
        "{error}"
    );
    let error = first_error(whole[..whole.len() - 1].to_vec()).await;
    assert!(
        matches!(
            error,
            WireError::Cut {
                received: 22,
                expected: 23
            }
        ),
        "{error}"
    );
    assert!(error.is_transient());
}

#[tokio::test]
async fn names_what_is_wrong_with_a_message() {
    let error = first_error(vec![b'Z', 0, 0, 0, 3]).await;
    assert!(
        matches!(
            error,
            WireError::BadLength {
                tag: 'Z',
                length: 3
            }
        ),
        "{error}"
    );
    for body in [
        message(b'W', &[0]),
        message(b'W', &[0, 0, 1]),
        message(b'!', b"?"),
    ] {
        let error = first_error(body).await;
        assert!(matches!(error, WireError::Malformed { .. }), "{error}");
        assert!(!error.is_transient());
    }
    for body in [
        &[0; 7][..],
        &[0, 3, 0, 0, 0, 0, 0, 1],
        &[0, 3, 0, 0, 0, 0, 0, 0, 9],
    ] {
        let error = first_error(message(b'v', body)).await;
        assert!(
            matches!(error, WireError::Malformed { tag: 'v', .. }),
            "{error}"
        );
    }
}

#[tokio::test]
async fn reads_what_a_server_does_not_know_of_our_startup() {
    let body = [&[0, 3, 0, 0, 0, 0, 0, 1][..], b"_pq_.new\0"].concat();
    let (mut framed, script) = framed(vec![Send(message(b'v', &body))]);
    let Message::NegotiateProtocolVersion {
        newest_minor,
        unknown_options,
    } = framed.read_message().await.unwrap()
    else {
        panic!("no NegotiateProtocolVersion");
    };
    assert_eq!(
        (newest_minor, unknown_options),
        (0, vec!["_pq_.new".to_owned()])
    );
    script.done().await;
}

/// In a select loop most reads are dropped half way; a lost byte would desynchronise the stream.
#[tokio::test]
async fn loses_nothing_when_reads_are_dropped() {
    let (client, mut server) = tokio::io::duplex(1);
    let mut framed = Framed::new(client);
    let sent = [keepalive(1, true), copy_data(b"abc"), ready()].concat();
    let writer = tokio::spawn(async move { server.write_all(&sent).await.unwrap() });
    let mut names = Vec::new();
    let mut dropped = 0;
    while names.len() < 3 {
        tokio::select! {
            biased;
            message = framed.read_message() => names.push(format!("{:?}", message.unwrap())),
            () = tokio::task::yield_now() => dropped += 1,
        }
    }
    assert_eq!(
        names,
        ["CopyData(18 bytes)", "CopyData(3 bytes)", "ReadyForQuery"]
    );
    assert!(dropped > 20, "dropped={dropped}");
    writer.await.unwrap();
}

#[tokio::test]
async fn sends_each_byte_once_when_flushes_are_dropped() {
    let (client, mut server) = tokio::io::duplex(3);
    let mut framed = Framed::new(client);
    let queued: Vec<u8> = (0..=255).collect();
    framed.queue(&queued);
    let reader = tokio::spawn(async move {
        let mut received = vec![0; 256];
        server.read_exact(&mut received).await.unwrap();
        received
    });
    let mut dropped = 0;
    loop {
        tokio::select! {
            biased;
            sent = framed.flush() => break sent.unwrap(),
            () = tokio::task::yield_now() => dropped += 1,
        }
    }
    assert!(dropped > 20, "dropped={dropped}");
    assert_eq!(framed.queued_bytes(), 0);
    assert_eq!(reader.await.unwrap(), queued);
}

/// The buffers hold passwords while logging in.
#[tokio::test]
async fn shows_no_buffered_byte() {
    let (client, _server) = tokio::io::duplex(1);
    let mut framed = Framed::new(client);
    framed.queue(b"hunter2");
    assert_eq!(
        format!("{framed:?}"),
        "Framed { unread_bytes: 0, unsent_bytes: 7, .. }"
    );
}
