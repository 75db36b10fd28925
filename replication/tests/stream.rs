//! `START_REPLICATION` against a scripted server.

use bytes::Bytes;
use replication::stream::{Started, StatusUpdate, StreamError, StreamEvent, WalStream};
use wal::{Lsn, PgTime, TimelineId};

use crate::scripted::{
    Query, Receive, Script, Send, Step, UntilClosed, columns, complete, connection, copy_both,
    copy_data, copy_done, error, keepalive, notice, ready, row, status, wal,
};

const START: u64 = 0x300_0000;
const COMMAND: &str = "START_REPLICATION SLOT \"a\" PHYSICAL 0/3000000 TIMELINE 1";

async fn start(steps: Vec<Step>) -> (Result<Started, StreamError>, Script) {
    let (connection, script) = connection("18.6", steps);
    let timeline = TimelineId::new(1).unwrap();
    (
        connection
            .start_replication(Some("a"), Lsn::new(START), timeline)
            .await,
        script,
    )
}

/// A stream whose server has just said `CopyBothResponse` and goes on with `steps`.
async fn streaming(steps: Vec<Step>) -> (WalStream, Script) {
    let begin = vec![Query(COMMAND), Send(copy_both())];
    match start(begin.into_iter().chain(steps).collect()).await {
        (Ok(Started::Streaming(stream)), script) => (stream, script),
        (other, _) => panic!("{other:?}"),
    }
}

fn report(flush: u64, now: i64, reply_requested: bool) -> StatusUpdate {
    let flush = Lsn::new(flush);
    StatusUpdate {
        write: flush,
        flush,
        apply: Lsn::ZERO,
        reply_requested,
        now: PgTime(now),
    }
}

fn wal_event(start: u64, bytes: &'static [u8]) -> StreamEvent {
    let start = Lsn::new(start);
    StreamEvent::Wal {
        start,
        server_end: start.saturating_add(bytes.len().try_into().unwrap()),
        sent_at: PgTime(7),
        bytes: Bytes::from_static(bytes),
    }
}

#[tokio::test]
async fn yields_wal_that_follows_on_and_keepalives() {
    let sent = [
        notice("hello"),
        wal(START, b"one"),
        keepalive(START + 3, true),
        notice("still here"),
        wal(START + 3, b"two"),
    ];
    let (mut stream, script) = streaming(vec![Send(sent.concat()), UntilClosed]).await;
    assert_eq!(stream.next().await.unwrap(), wal_event(START, b"one"));
    assert_eq!(
        stream.next().await.unwrap(),
        StreamEvent::Keepalive {
            server_end: Lsn::new(START + 3),
            sent_at: PgTime(7),
            reply_requested: true
        }
    );
    assert_eq!(stream.next().await.unwrap(), wal_event(START + 3, b"two"));
    assert_eq!(stream.position(), Lsn::new(START + 6));
    drop(stream);
    script.done().await;
}

/// Bytes stored under positions that are not theirs would be restored as if they were WAL.
#[tokio::test]
async fn refuses_wal_that_does_not_follow_on() {
    for (first, second) in [
        (START + 1, None),
        (START, Some(START + 4)),
        (START, Some(START + 2)),
    ] {
        let mut sent = wal(first, b"one");
        sent.extend(second.into_iter().flat_map(|start| wal(start, b"two")));
        let (mut stream, script) = streaming(vec![Send(sent), UntilClosed]).await;
        if second.is_some() {
            stream.next().await.unwrap();
        }
        let refused = stream.next().await.unwrap_err();
        let found = Lsn::new(second.unwrap_or(first));
        assert!(
            matches!(refused, StreamError::Discontinuity { found: it, .. } if it == found),
            "{refused}"
        );
        assert!(!refused.is_transient());
        assert!(matches!(stream.next().await, Err(StreamError::Ended)));
        drop(stream);
        script.done().await;
    }
}

#[tokio::test]
async fn refuses_messages_that_are_short_long_or_unknown() {
    let whole = keepalive(START, false);
    for (data, says) in [
        (
            &b""[..],
            "malformed copy data message: expected_bytes=1, found_bytes=0",
        ),
        (
            &b"w123456781234567812345678"[..24],
            "expected_bytes=25, found_bytes=24",
        ),
        (
            &whole[5..whole.len() - 1],
            "expected_bytes=18, found_bytes=17",
        ),
        (
            &b"k12345678123456781\0"[..],
            "expected_bytes=18, found_bytes=19",
        ),
        (&b"s"[..], "unknown message in a stream of WAL: type='s'"),
        (
            &b"w\xff\xff\xff\xff\xff\xff\xff\xff1234567812345678x"[..],
            "beyond the last position",
        ),
    ] {
        let (mut stream, script) = streaming(vec![Send(copy_data(data)), UntilClosed]).await;
        let refused = stream.next().await.unwrap_err();
        assert!(refused.to_string().contains(says), "{refused}");
        drop(stream);
        script.done().await;
    }
}

/// A server that shuts down waits for this answer, and a primary that hears nothing for
/// `wal_sender_timeout` cuts the connection.
#[tokio::test]
async fn sends_a_queued_status_while_it_waits_for_the_server() {
    let steps = vec![
        Send(keepalive(START, true)),
        Receive(status(START, 9, false)),
        Send(wal(START, b"one")),
        UntilClosed,
    ];
    let (mut stream, script) = streaming(steps).await;
    stream.next().await.unwrap();
    stream.queue_status(report(START, 9, false));
    assert_eq!(stream.next().await.unwrap(), wal_event(START, b"one"));
    drop(stream);
    script.done().await;
}

/// A caller that cannot send now must neither pile up reports nor lose a request.
#[tokio::test]
async fn sends_only_the_newest_of_the_statuses_that_wait() {
    let steps = vec![
        Receive(status(START + 2, 11, true)),
        Receive(status(START + 3, 12, false)),
        UntilClosed,
    ];
    let (mut stream, script) = streaming(steps).await;
    stream.queue_status(report(START, 9, false));
    stream.queue_status(report(START + 1, 10, true));
    stream.queue_status(report(START + 2, 11, false));
    stream.flush().await.unwrap();
    stream
        .send_status(report(START + 3, 12, false))
        .await
        .unwrap();
    drop(stream);
    script.done().await;
}

fn next_timeline(timeline: &str, at: &str) -> Vec<u8> {
    [
        columns(&["next_tli", "next_tli_startpos"]),
        row(&[Some(timeline), Some(at)]),
        complete("START_STREAMING"),
        complete("START_REPLICATION"),
        ready(),
    ]
    .concat()
}

#[tokio::test]
async fn follows_the_end_of_a_timeline_and_keeps_the_connection() {
    let steps = vec![
        Send([wal(START, b"one"), keepalive(START + 3, false), copy_done()].concat()),
        Receive(copy_done()),
        Send(notice("almost")),
        Send(next_timeline("2", "0/3000002")),
        Query("SHOW work_mem"),
        Send(
            [
                columns(&["work_mem"]),
                row(&[Some("4MB")]),
                complete("SHOW"),
                ready(),
            ]
            .concat(),
        ),
    ];
    let (mut stream, script) = streaming(steps).await;
    stream.next().await.unwrap();
    stream.next().await.unwrap();
    let end = StreamEvent::TimelineEnd {
        next: TimelineId::new(2).unwrap(),
        at: Lsn::new(START + 2),
    };
    assert_eq!(stream.next().await.unwrap(), end);
    // Too late for a status: as a message of its own it would be out of place.
    stream.queue_status(report(START + 3, 9, false));
    stream.flush().await.unwrap();
    let mut connection = stream.into_connection().unwrap();
    assert_eq!(connection.show("work_mem").await.unwrap(), "4MB");
    script.done().await;
}

#[tokio::test]
async fn follows_the_end_of_a_timeline_when_every_read_is_dropped_once() {
    let steps = vec![
        Send(copy_done()),
        Receive(copy_done()),
        Send(next_timeline("2", "0/3000002")),
        UntilClosed,
    ];
    let (mut stream, script) = streaming(steps).await;
    let event = loop {
        tokio::select! {
            biased;
            event = stream.next() => break event.unwrap(),
            () = tokio::task::yield_now() => {}
        }
    };
    assert!(matches!(event, StreamEvent::TimelineEnd { .. }));
    drop(stream);
    script.done().await;
}

#[tokio::test]
async fn is_told_at_once_that_nothing_is_left_of_a_timeline() {
    let (started, script) =
        start(vec![Query(COMMAND), Send(next_timeline("4", "0/3000000"))]).await;
    let Ok(Started::EndOfTimeline { next, at, .. }) = started else {
        panic!("{started:?}");
    };
    assert_eq!((next.get(), at), (4, Lsn::new(START)));
    script.done().await;
}

#[tokio::test]
async fn refuses_a_timeline_that_ends_without_a_next_one() {
    let steps = vec![
        Send(copy_done()),
        Receive(copy_done()),
        Send(
            [
                complete("START_STREAMING"),
                complete("START_REPLICATION"),
                ready(),
            ]
            .concat(),
        ),
    ];
    let (mut stream, script) = streaming(steps).await;
    let refused = stream.next().await.unwrap_err();
    assert_eq!(
        refused.to_string(),
        "the next timeline is missing from the answer to the end of a timeline"
    );
    script.done().await;
    let (started, script) = start(vec![Query(COMMAND), Send(ready())]).await;
    assert!(
        matches!(started, Err(StreamError::Answer(_))),
        "{started:?}"
    );
    script.done().await;
}

/// This is how a server says that the WAL asked for is gone.
#[tokio::test]
async fn hands_the_connection_back_after_an_error_in_the_stream() {
    let gone = "requested WAL segment 000000010000000000000003 has already been removed";
    let steps = vec![
        Send([error("ERROR", "58P01", gone), ready()].concat()),
        Query("SHOW work_mem"),
        Send(
            [
                columns(&["work_mem"]),
                row(&[Some("4MB")]),
                complete("SHOW"),
                ready(),
            ]
            .concat(),
        ),
    ];
    let (mut stream, script) = streaming(steps).await;
    let refused = stream.next().await.unwrap_err();
    assert_eq!(refused.sqlstate(), Some("58P01"));
    assert!(!refused.is_transient());
    assert!(refused.to_string().contains(gone));
    let mut connection = stream.into_connection().unwrap();
    assert_eq!(connection.show("work_mem").await.unwrap(), "4MB");
    script.done().await;
}

#[tokio::test]
async fn reports_what_the_server_said_last_when_it_goes() {
    let said = error(
        "FATAL",
        "57P01",
        "terminating connection due to administrator command",
    );
    let (mut stream, script) = streaming(vec![Send(said)]).await;
    let refused = stream.next().await.unwrap_err();
    assert_eq!(refused.sqlstate(), Some("57P01"));
    assert!(refused.is_transient());
    assert!(stream.into_connection().is_none());
    script.done().await;

    let (mut stream, script) = streaming(vec![Send(error("ERROR", "58P01", "gone"))]).await;
    let refused = stream.next().await.unwrap_err();
    assert_eq!(refused.sqlstate(), Some("58P01"));
    assert!(stream.into_connection().is_none());
    script.done().await;
}

/// A clean shutdown means that all WAL was sent; a cut connection means nothing.
#[tokio::test]
async fn tells_a_shutdown_from_a_cut_connection() {
    let (mut stream, script) = streaming(vec![Send(complete("COPY 0"))]).await;
    assert_eq!(stream.next().await.unwrap(), StreamEvent::ServerClosed);
    assert!(matches!(stream.next().await, Err(StreamError::Ended)));
    script.done().await;

    let (mut stream, script) = streaming(vec![]).await;
    let refused = stream.next().await.unwrap_err();
    assert!(
        matches!(refused, StreamError::Wire(_)) && refused.is_transient(),
        "{refused}"
    );
    script.done().await;
}

/// The server's last words come before the broken pipe that our own answer runs into.
#[tokio::test]
async fn reads_on_when_sending_fails() {
    let (mut stream, script) = streaming(vec![Send(
        [wal(START, b"one"), complete("COPY 0")].concat(),
    )])
    .await;
    script.done().await;
    stream.queue_status(report(START, 9, false));
    assert_eq!(stream.next().await.unwrap(), wal_event(START, b"one"));
    stream
        .send_status(report(START + 3, 10, false))
        .await
        .unwrap_err();
    assert_eq!(stream.next().await.unwrap(), StreamEvent::ServerClosed);
}

#[tokio::test]
async fn stops_through_both_command_completes() {
    let steps = vec![
        Receive(status(START, 9, false)),
        Receive(copy_done()),
        Send(
            [
                wal(START, b"one"),
                keepalive(START, true),
                notice("bye"),
                copy_done(),
            ]
            .concat(),
        ),
        Send(
            [
                complete("START_STREAMING"),
                complete("START_REPLICATION"),
                ready(),
            ]
            .concat(),
        ),
        Query("SHOW work_mem"),
        Send(
            [
                columns(&["work_mem"]),
                row(&[Some("4MB")]),
                complete("SHOW"),
                ready(),
            ]
            .concat(),
        ),
    ];
    let (mut stream, script) = streaming(steps).await;
    stream.queue_status(report(START, 9, false));
    let mut connection = stream.stop().await.unwrap();
    assert_eq!(connection.show("work_mem").await.unwrap(), "4MB");
    script.done().await;
}

#[tokio::test]
async fn stops_while_the_timeline_ends_or_the_server_goes() {
    let steps = vec![
        Send([wal(START, b"one"), copy_done()].concat()),
        Receive(copy_done()),
        Send(next_timeline("2", "0/3000002")),
    ];
    let (stream, script) = streaming(steps).await;
    stream.stop().await.unwrap();
    script.done().await;

    let (stream, script) = streaming(vec![Receive(copy_done()), Send(complete("COPY 0"))]).await;
    let refused = stream.stop().await.unwrap_err();
    assert!(refused.is_transient(), "{refused}");
    script.done().await;
}

#[tokio::test]
async fn says_why_streaming_was_refused() {
    let (started, script) = start(vec![
        Query(COMMAND),
        Send(
            [
                error("ERROR", "55006", "replication slot \"a\" is active"),
                ready(),
            ]
            .concat(),
        ),
    ])
    .await;
    assert_eq!(started.unwrap_err().sqlstate(), Some("55006"));
    script.done().await;

    let (connection, script) = connection("18.6", vec![UntilClosed]);
    let timeline = TimelineId::new(1).unwrap();
    let started = connection
        .start_replication(Some("a b"), Lsn::ZERO, timeline)
        .await;
    assert!(matches!(started, Err(StreamError::Slot(_))), "{started:?}");
    script.done().await;
}

/// The receiver runs as a task of its own.
#[tokio::test]
async fn can_be_driven_from_another_task() {
    let steps = vec![
        Send(wal(START, b"one")),
        Receive(copy_done()),
        Send([copy_done(), complete("START_STREAMING"), ready()].concat()),
    ];
    let (mut stream, script) = streaming(steps).await;
    let driven = tokio::spawn(async move {
        let event = stream.next().await.unwrap();
        stream.stop().await.unwrap();
        event
    });
    assert_eq!(driven.await.unwrap(), wal_event(START, b"one"));
    script.done().await;
}
