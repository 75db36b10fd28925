//! Queries and short commands against a scripted server.

use std::time::Duration;

use replication::connection::{QueryError, literal};
use replication::framing::WireError;
use replication::slots::{self, SlotError, SlotState};
use wal::{Lsn, TimelineId};

use crate::scripted::{
    Query, Receive, Send, UntilClosed, columns, complete, connection, error, message, notice,
    ready, row,
};

const IDENTITY: &[&str] = &["systemid", "timeline", "xlogpos", "dbname"];

#[tokio::test]
async fn reads_an_answer_between_notices_and_changed_parameters() {
    let answer = [
        notice("before"),
        columns(IDENTITY),
        message(b'S', b"in_hot_standby\0on\0"),
        row(&[
            Some("7300000000000000001"),
            Some("3"),
            Some("1/A0000000"),
            None,
        ]),
        notice("between"),
        complete("IDENTIFY_SYSTEM"),
        message(b'A', b"\0\0\0\x01channel\0payload\0"),
        ready(),
    ];
    let (mut connection, script) = connection(
        "18.6",
        vec![Query("IDENTIFY_SYSTEM"), Send(answer.concat())],
    );
    let identity = connection.identify_system().await.unwrap();
    assert_eq!(identity.system_id, 7_300_000_000_000_000_001);
    assert_eq!(identity.timeline, TimelineId::new(3).unwrap());
    assert_eq!(identity.xlogpos, Lsn::new(0x1_A000_0000));
    assert_eq!(identity.dbname, None);
    assert_eq!(connection.parameter("in_hot_standby"), Some("on"));
    script.done().await;
}

/// A stream would wait for ever at a server that has taken its question and went away without a word.
#[tokio::test]
async fn a_server_without_an_answer_is_given_up_in_time() {
    let limit = Duration::from_millis(50);
    for half in [vec![], columns(IDENTITY)] {
        let steps = vec![Query("IDENTIFY_SYSTEM"), Send(half), UntilClosed];
        let (connection, script) = connection("18.6", steps);
        let mut connection = connection.with_silence_max(limit);
        let error = connection.identify_system().await.unwrap_err();
        let is_silence = matches!(&error, QueryError::Wire(WireError::Silent { .. }));
        assert!(is_silence && error.is_transient(), "{error}");
        drop(connection);
        script.done().await;
    }
}

#[tokio::test]
async fn refuses_an_identity_that_cannot_be_one() {
    for values in [["x", "1", "0/0"], ["7", "0", "0/0"], ["7", "1", "0-0"]] {
        let [system_id, timeline, lsn] = values.map(Some);
        let answer = [
            columns(IDENTITY),
            row(&[system_id, timeline, lsn, None]),
            complete("X"),
            ready(),
        ];
        let (mut connection, script) = connection(
            "18.6",
            vec![Query("IDENTIFY_SYSTEM"), Send(answer.concat())],
        );
        let error = connection.identify_system().await.unwrap_err();
        assert!(matches!(error, QueryError::BadValue { .. }), "{error}");
        script.done().await;
    }
}

#[tokio::test]
async fn is_usable_after_an_error_but_not_after_a_fatal_one() {
    let steps = vec![
        Query("SELECT 1/0"),
        Send([error("ERROR", "22012", "division by zero"), ready()].concat()),
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
        Query("SELECT 2"),
        Send(error("FATAL", "57P01", "terminating connection")),
    ];
    let (mut connection, script) = connection("18.6", steps);
    let refused = connection.execute("SELECT 1/0").await.unwrap_err();
    assert_eq!(refused.sqlstate(), Some("22012"));
    assert_eq!(
        refused.to_string(),
        "ERROR: division by zero [SQLSTATE 22012]"
    );
    assert!(!refused.is_transient());
    assert_eq!(connection.show("work_mem").await.unwrap(), "4MB");
    let fatal = connection.execute("SELECT 2").await.unwrap_err();
    assert_eq!(fatal.sqlstate(), Some("57P01"));
    assert!(fatal.is_transient());
    script.done().await;
}

/// A server that ends an idle connection says why; the broken pipe says nothing.
#[tokio::test]
async fn reports_why_the_server_went_before_the_query() {
    let said = error(
        "FATAL",
        "57P01",
        "terminating connection due to administrator command",
    );
    let (mut connection, script) = connection("18.6", vec![Send(said)]);
    script.done().await;
    let refused = connection.execute("SELECT 1").await.unwrap_err();
    assert_eq!(refused.sqlstate(), Some("57P01"), "{refused}");
}

/// The answer to a dropped query would otherwise be taken for that of the next one.
#[tokio::test]
async fn refuses_a_second_query_after_a_dropped_one() {
    let (mut connection, script) = connection(
        "18.6",
        vec![
            Query("SELECT slow()"),
            Send(columns(&["slow"])),
            UntilClosed,
        ],
    );
    tokio::select! {
        biased;
        _ = connection.execute("SELECT slow()") => panic!("no answer was sent"),
        () = tokio::task::yield_now() => {}
    }
    let refused = connection.execute("SELECT 1").await.unwrap_err();
    assert!(matches!(refused, QueryError::Interrupted), "{refused}");
    drop(connection);
    script.done().await;
}

#[tokio::test]
async fn refuses_a_result_without_end() {
    let endless = row(&[]).repeat(1_100_000);
    let steps = vec![
        Query("SELECT"),
        Send(columns(&[])),
        Send(endless),
        UntilClosed,
    ];
    let (mut connection, script) = connection("18.6", steps);
    let refused = connection.execute("SELECT").await.unwrap_err();
    assert!(matches!(refused, QueryError::TooLarge), "{refused}");
    drop(connection);
    script.done().await;
}

#[tokio::test]
async fn refuses_a_message_that_has_no_place_in_an_answer() {
    let (mut connection, script) =
        connection("18.6", vec![Query("SELECT 1"), Send(message(b'c', b""))]);
    let refused = connection.execute("SELECT 1").await.unwrap_err();
    assert_eq!(
        refused.to_string(),
        "unexpected message in the answer to a command: found=CopyDone"
    );
    script.done().await;
}

#[tokio::test]
async fn keeps_quoted_values_inside_their_quotes() {
    assert_eq!(literal("it's"), "'it''s'");
    assert_eq!(literal(r"\'"), r" E'\\'''");
    let (mut connection, script) = connection("18.6", vec![UntilClosed]);
    let refused = connection.show("work_mem; DROP").await.unwrap_err();
    assert!(matches!(refused, QueryError::BadValue { .. }), "{refused}");
    let refused = connection.execute("SELECT '\0'").await.unwrap_err();
    assert!(matches!(refused, QueryError::Unsendable(_)), "{refused}");
    drop(connection);
    script.done().await;
}

#[tokio::test]
async fn knows_the_version_however_it_is_written() {
    for (text, number) in [
        ("18.6 (Debian 18.6-1.pgdg13+1)", 180_006),
        ("19rc1", 190_000),
        ("20devel", 200_000),
        ("13.22", 130_022),
        ("9.6.24", 90_624),
        ("", 0),
        ("99999999999.1", 0),
    ] {
        let (connection, _script) = connection(text, vec![]);
        assert_eq!(connection.server_version_num(), number, "{text}");
    }
}

#[tokio::test]
async fn takes_a_history_that_the_server_lacks_for_none() {
    let steps = vec![
        Query("TIMELINE_HISTORY 1"),
        Send(columns(&["filename", "content"])),
        Send(error(
            "ERROR",
            "58P01",
            "could not open file \"pg_wal/00000001.history\"",
        )),
        Send(ready()),
        Query("TIMELINE_HISTORY 2"),
        Send(columns(&["filename", "content"])),
        Send(row(&[
            Some("00000002.history"),
            Some("1\t0/3000000\tno recovery target"),
        ])),
        Send([complete("SELECT"), ready()].concat()),
        Query("TIMELINE_HISTORY 3"),
        Send(columns(&["filename", "content"])),
        Send(row(&[Some("../../etc/passwd"), Some("")])),
        Send([complete("SELECT"), ready()].concat()),
    ];
    let (mut connection, script) = connection("18.6", steps);
    let [first, second, third] = [1, 2, 3].map(|id| TimelineId::new(id).unwrap());
    assert_eq!(connection.timeline_history(first).await.unwrap(), None);
    let history = connection.timeline_history(second).await.unwrap().unwrap();
    assert_eq!(history.file_name, "00000002.history");
    assert_eq!(&history.content[..], b"1\t0/3000000\tno recovery target");
    let refused = connection.timeline_history(third).await.unwrap_err();
    assert!(matches!(refused, QueryError::BadValue { .. }), "{refused}");
    script.done().await;
}

#[tokio::test]
async fn creates_a_slot_in_the_words_of_each_version() {
    for (version, command) in [
        (
            "14.19",
            "CREATE_REPLICATION_SLOT \"a\" TEMPORARY PHYSICAL RESERVE_WAL",
        ),
        (
            "15.14",
            "CREATE_REPLICATION_SLOT \"a\" TEMPORARY PHYSICAL (RESERVE_WAL)",
        ),
    ] {
        let answer = [complete("CREATE_REPLICATION_SLOT"), ready()].concat();
        let (mut connection, script) = connection(version, vec![Query(command), Send(answer)]);
        connection
            .create_physical_slot("a", true, true)
            .await
            .unwrap();
        script.done().await;
    }
    let (mut connection, script) = connection("18.6", vec![UntilClosed]);
    let refused = connection
        .create_physical_slot("a\" x", false, true)
        .await
        .unwrap_err();
    assert!(
        matches!(refused, SlotError::InvalidName { .. }),
        "{refused}"
    );
    drop(connection);
    script.done().await;
}

const SLOT_QUERY_18: &str = "SELECT slot_type, active_pid, restart_lsn, wal_status, \
     safe_wal_size, invalidation_reason \
     FROM pg_catalog.pg_replication_slots WHERE slot_name = 'a'";

/// Dropping a slot that keeps WAL would lose that WAL.
#[tokio::test]
async fn reserves_only_for_a_slot_that_keeps_nothing() {
    let ready_slot = [
        Some("physical"),
        None,
        Some("0/3000000"),
        Some("reserved"),
        None,
        None,
    ];
    let names = [
        "slot_type",
        "active_pid",
        "restart_lsn",
        "wal_status",
        "safe_wal_size",
        "r",
    ];
    let answer = [
        columns(&names),
        row(&ready_slot),
        complete("SELECT 1"),
        ready(),
    ]
    .concat();
    let steps = vec![
        Query(SLOT_QUERY_18),
        Send(answer),
        Receive(message(b'X', b"")),
    ];
    let (mut connection, script) = connection("18.6", steps);
    let refused = slots::reserve_slot(&mut connection, "a").await.unwrap_err();
    let SlotError::NotUnreserved { state, .. } = refused else {
        panic!("{refused}");
    };
    let restart = Lsn::new(0x300_0000);
    assert_eq!(
        state,
        SlotState::Ready {
            restart,
            timeline: None,
            safe_wal_bytes: None
        }
    );
    connection.terminate().await.unwrap();
    script.done().await;
}

#[tokio::test]
async fn tells_lost_active_and_unreserved_slots_apart() {
    let names = [
        "slot_type",
        "active_pid",
        "restart_lsn",
        "wal_status",
        "safe_wal_size",
        "r",
    ];
    let cases = [
        (
            [
                Some("physical"),
                None,
                None,
                Some("lost"),
                None,
                Some("wal_removed"),
            ],
            SlotState::Lost {
                why: "wal_removed".to_owned(),
            },
        ),
        (
            [Some("physical"), None, None, None, None, None],
            SlotState::Unreserved,
        ),
        (
            [Some("physical"), Some("77"), None, None, None, None],
            SlotState::Active {
                pid: 77,
                restart: None,
            },
        ),
        (
            [Some("logical"), None, Some("0/1"), None, None, None],
            SlotState::NotPhysical,
        ),
        (
            [
                Some("physical"),
                None,
                Some("0/1"),
                Some("unreserved"),
                Some("-5"),
                None,
            ],
            SlotState::Ready {
                restart: Lsn::new(1),
                timeline: None,
                safe_wal_bytes: Some(-5),
            },
        ),
    ];
    for (values, expected) in cases {
        let answer = [columns(&names), row(&values), complete("SELECT 1"), ready()].concat();
        let (mut connection, script) = connection("18.6", vec![Query(SLOT_QUERY_18), Send(answer)]);
        assert_eq!(
            slots::read_slot(&mut connection, "a").await.unwrap(),
            expected
        );
        script.done().await;
    }
}
