//! Commands, slots, the stream and `BASE_BACKUP` against a real server of whatever major
//! `ANYWHEN_PG_BIN` has.

use std::io::{Seek, SeekFrom, Write};

use replication::base_backup::{BackupForm, BackupMessage, BaseBackupOptions};
use replication::connection::{Connection, literal};
use replication::slots::{self, SlotError, SlotState};
use replication::stream::{Started, StatusUpdate, StreamEvent, WalStream};
use wal::{Lsn, PgTime, SegmentName, SegmentSize, TimelineId};

use crate::server::Server;

const MIB: u64 = 1 << 20;

fn small_segments(settings: &[&str]) -> Server {
    Server::start(&["--wal-segsize=1"], settings)
}

async fn value(sql: &mut Connection, query: &str) -> String {
    sql.query_value(query).await.unwrap().unwrap()
}

async fn lsn(sql: &mut Connection, query: &str) -> Lsn {
    value(sql, query).await.parse().unwrap()
}

async fn streaming(
    connection: Connection,
    slot: Option<&str>,
    start: Lsn,
    timeline: TimelineId,
) -> WalStream {
    match connection
        .start_replication(slot, start, timeline)
        .await
        .unwrap()
    {
        Started::Streaming(stream) => stream,
        other @ Started::EndOfTimeline { .. } => panic!("{other:?}"),
    }
}

fn durable_up_to(flush: Lsn) -> StatusUpdate {
    let (apply, now) = (Lsn::ZERO, PgTime(0));
    StatusUpdate {
        write: flush,
        flush,
        apply,
        reply_requested: false,
        now,
    }
}

/// Appends WAL to `received` until `end` was reached.
async fn receive_up_to(stream: &mut WalStream, received: &mut Vec<u8>, end: Lsn) {
    while stream.position() < end {
        if let StreamEvent::Wal { bytes, .. } = stream.next().await.unwrap() {
            received.extend_from_slice(&bytes);
        }
    }
}

#[tokio::test]
async fn identifies_the_system_and_its_settings() {
    let server = small_segments(&[]);
    let mut sql = server.sql().await;
    let mut connection = server.replication().await;

    let identity = connection.identify_system().await.unwrap();
    let query = "SELECT system_identifier FROM pg_control_system()";
    assert_eq!(identity.system_id.to_string(), value(&mut sql, query).await);
    assert_eq!(identity.timeline.get(), 1);
    assert_eq!(identity.dbname, None);
    assert!(identity.xlogpos <= lsn(&mut sql, "SELECT pg_current_wal_lsn()").await);

    assert_eq!(connection.wal_segment_size().await.unwrap().bytes(), MIB);
    assert_eq!(sql.wal_segment_size().await.unwrap().bytes(), MIB);
    assert_eq!(connection.show("wal_level").await.unwrap(), "replica");
    let number = value(&mut sql, "SELECT current_setting('server_version_num')").await;
    let number: u32 = number.parse().unwrap();
    // A version before its release has no minor number in its name.
    assert_eq!(connection.server_version_num() / 10_000, number / 10_000);

    let refused = connection.show("no_such_setting").await.unwrap_err();
    assert_eq!(refused.sqlstate(), Some("42704"));
    let result = sql
        .simple_query("SELECT 1 AS a; SELECT NULL, 'x' WHERE false; SELECT 2")
        .await;
    let results = result.unwrap();
    assert_eq!(results.len(), 3);
    assert_eq!(results[0].columns, ["a"]);
    assert_eq!(results[1].rows.len(), 0);
    assert_eq!(
        value(&mut sql, &format!("SELECT {}", literal("ä'\\"))).await,
        "ä'\\"
    );
    connection.terminate().await.unwrap();
}

#[tokio::test]
async fn reserves_for_a_slot_that_keeps_nothing_and_for_no_other() {
    let server = small_segments(&["wal_level = logical", "max_slot_wal_keep_size = 64MB"]);
    let mut sql = server.sql().await;
    let mut connection = server.replication().await;
    let parenthesised = connection.server_version_num() >= 150_000;

    assert_eq!(
        slots::read_slot(&mut sql, "a").await.unwrap(),
        SlotState::Absent
    );
    connection
        .create_physical_slot("a", false, false)
        .await
        .unwrap();
    assert_eq!(
        slots::read_slot(&mut sql, "a").await.unwrap(),
        SlotState::Unreserved
    );
    let by_command = connection.read_slot_by_command("a").await.unwrap();
    assert_eq!(by_command, parenthesised.then_some(SlotState::Unreserved));
    let absent = connection.read_slot_by_command("b").await.unwrap();
    assert_eq!(absent, parenthesised.then_some(SlotState::Absent));

    let reserved = slots::reserve_slot(&mut sql, "a").await.unwrap();
    let state = slots::read_slot(&mut sql, "a").await.unwrap();
    let SlotState::Ready {
        restart,
        safe_wal_bytes: Some(_),
        ..
    } = state
    else {
        panic!("{state:?}");
    };
    assert_eq!(restart, reserved);
    if let Some(state) = connection.read_slot_by_command("a").await.unwrap() {
        let timeline = TimelineId::new(1);
        assert_eq!(
            state,
            SlotState::Ready {
                restart,
                timeline,
                safe_wal_bytes: None
            }
        );
    }
    let refused = slots::reserve_slot(&mut sql, "a").await.unwrap_err();
    assert!(
        matches!(refused, SlotError::NotUnreserved { .. }),
        "{refused}"
    );
    let refused = connection
        .create_physical_slot("a", false, true)
        .await
        .unwrap_err();
    assert!(refused.to_string().contains("42710"), "{refused}");

    // A slot in use, which is not ours to drop or to reserve.
    connection
        .create_physical_slot("temporary", true, true)
        .await
        .unwrap();
    let start = Lsn::new(reserved.as_u64() / MIB * MIB);
    let stream = streaming(connection, Some("a"), start, TimelineId::new(1).unwrap()).await;
    let state = slots::read_slot(&mut sql, "a").await.unwrap();
    assert!(
        matches!(
            state,
            SlotState::Active {
                restart: Some(_),
                ..
            }
        ),
        "{state:?}"
    );
    let mut second = server.replication().await;
    let refused = second.drop_slot("a").await.unwrap_err();
    assert!(refused.to_string().contains("55006"), "{refused}");
    let mut connection = stream.stop().await.unwrap();

    let logical = "SELECT pg_create_logical_replication_slot('l', 'pgoutput')";
    sql.execute(logical).await.unwrap();
    assert_eq!(
        slots::read_slot(&mut sql, "l").await.unwrap(),
        SlotState::NotPhysical
    );
    let by_command = connection.read_slot_by_command("l").await.unwrap();
    assert_eq!(by_command, parenthesised.then_some(SlotState::NotPhysical));

    second.drop_slot("a").await.unwrap();
    let refused = second.drop_slot("a").await.unwrap_err();
    assert!(refused.to_string().contains("42704"), "{refused}");
    assert_eq!(
        slots::read_slot(&mut sql, "a").await.unwrap(),
        SlotState::Absent
    );
}

#[tokio::test]
async fn tells_a_slot_that_the_server_gave_up_on() {
    let server = small_segments(&[
        "max_slot_wal_keep_size = 2MB",
        "max_wal_size = 2MB",
        "min_wal_size = 2MB",
        "wal_keep_size = 0",
    ]);
    let mut sql = server.sql().await;
    let mut connection = server.replication().await;
    connection
        .create_physical_slot("a", false, true)
        .await
        .unwrap();
    for _ in 0..8 {
        sql.execute("SELECT pg_create_restore_point('x'); SELECT pg_switch_wal()")
            .await
            .unwrap();
    }
    sql.execute("CHECKPOINT").await.unwrap();
    let state = slots::read_slot(&mut sql, "a").await.unwrap();
    assert!(matches!(state, SlotState::Lost { .. }), "{state:?}");
    let refused = slots::reserve_slot(&mut sql, "a").await.unwrap_err();
    assert!(refused.to_string().contains("Lost"), "{refused}");
    connection.drop_slot("a").await.unwrap();
}

/// What is streamed must be what the server keeps, byte for byte.
#[tokio::test]
async fn streams_over_segment_switches_what_the_server_writes() {
    let server = small_segments(&["wal_keep_size = 64MB"]);
    let mut sql = server.sql().await;
    let mut connection = server.replication().await;
    connection
        .create_physical_slot("a", false, true)
        .await
        .unwrap();
    let size = SegmentSize::from_bytes(MIB).unwrap();
    let timeline = TimelineId::new(1).unwrap();
    let start = size.start_of(lsn(&mut sql, "SELECT pg_current_wal_lsn()").await);
    let mut stream = streaming(connection, Some("a"), start, timeline).await;

    let fill = "INSERT INTO t SELECT repeat('x', 100) FROM generate_series(1, 20000)";
    sql.execute("CREATE TABLE t (x text)").await.unwrap();
    let mut received = Vec::new();
    for _ in 0..3 {
        sql.execute(fill).await.unwrap();
        sql.execute("SELECT pg_switch_wal()").await.unwrap();
        let end = lsn(&mut sql, "SELECT pg_current_wal_flush_lsn()").await;
        receive_up_to(&mut stream, &mut received, end).await;
        stream.queue_status(durable_up_to(end));
    }
    let mut segments = 0;
    for (number, bytes) in received.chunks_exact(MIB.try_into().unwrap()).enumerate() {
        let at = start.saturating_add(u64::try_from(number).unwrap() * MIB);
        let name = SegmentName::of(timeline, at, size).to_string();
        let on_server = std::fs::read(server.data().join("pg_wal").join(&name)).unwrap();
        assert!(on_server == bytes, "{name} differs");
        segments += 1;
    }
    assert!(segments >= 6, "segments={segments}");

    // The connection is good for more after a stop, and the slot has what was reported.
    let position = stream.position();
    stream.send_status(durable_up_to(position)).await.unwrap();
    let mut connection = stream.stop().await.unwrap();
    assert_eq!(
        connection.identify_system().await.unwrap().timeline,
        timeline
    );
    let state = slots::read_slot(&mut sql, "a").await.unwrap();
    assert!(
        matches!(state, SlotState::Ready { restart, .. } if restart == position),
        "{state:?}"
    );
}

/// A server that shuts down waits until all that it sent is reported flushed.
#[tokio::test]
async fn lets_a_server_shut_down_by_reporting_and_sees_it_close() {
    let server = small_segments(&["wal_sender_timeout = 60s"]);
    let mut connection = server.replication().await;
    let identity = connection.identify_system().await.unwrap();
    let start = Lsn::new(identity.xlogpos.as_u64() / MIB * MIB);
    let mut stream = streaming(connection, None, start, identity.timeline).await;
    let mut received = Vec::new();
    receive_up_to(&mut stream, &mut received, identity.xlogpos).await;
    let mut stopping = server.stopping();
    let began = std::time::Instant::now();
    loop {
        match stream.next().await.unwrap() {
            StreamEvent::Wal { bytes, .. } => received.extend_from_slice(&bytes),
            StreamEvent::Keepalive { .. } => stream.queue_status(durable_up_to(stream.position())),
            StreamEvent::ServerClosed => break,
            other @ StreamEvent::TimelineEnd { .. } => panic!("{other:?}"),
        }
    }
    assert!(stopping.wait().unwrap().success());
    assert!(began.elapsed().as_secs() < 20, "{:?}", began.elapsed());
    assert!(
        stream.position() > identity.xlogpos,
        "the shutdown checkpoint was not received"
    );
}

#[tokio::test]
async fn is_told_that_wal_is_gone_and_keeps_the_connection() {
    let server = small_segments(&[
        "max_wal_size = 2MB",
        "min_wal_size = 2MB",
        "wal_keep_size = 0",
    ]);
    let mut sql = server.sql().await;
    let first = lsn(&mut sql, "SELECT pg_current_wal_lsn()").await;
    for _ in 0..8 {
        sql.execute("SELECT pg_create_restore_point('x'); SELECT pg_switch_wal()")
            .await
            .unwrap();
    }
    sql.execute("CHECKPOINT").await.unwrap();
    let start = Lsn::new(first.as_u64() / MIB * MIB);
    let timeline = TimelineId::new(1).unwrap();
    let connection = server.replication().await;
    let mut stream = streaming(connection, None, start, timeline).await;
    let refused = stream.next().await.unwrap_err();
    assert_eq!(refused.sqlstate(), Some("58P01"), "{refused}");
    let mut connection = stream.into_connection().unwrap();
    connection.identify_system().await.unwrap();

    let ahead = first.saturating_add(1 << 30);
    let mut stream = streaming(connection, None, ahead, timeline).await;
    let refused = stream.next().await.unwrap_err();
    assert!(
        refused
            .to_string()
            .contains("ahead of the WAL flush position"),
        "{refused}"
    );
}

#[tokio::test]
async fn follows_a_timeline_to_its_end_and_reads_its_history() {
    let server = small_segments(&["wal_keep_size = 64MB"]);
    let mut sql = server.sql().await;
    let start = lsn(&mut sql, "SELECT pg_switch_wal()").await;
    let start = SegmentSize::from_bytes(MIB).unwrap().start_of(start);
    drop(sql);
    server.stop();
    server.start_on_a_new_timeline().await;

    let mut connection = server.replication().await;
    let [first, second, third] = [1, 2, 3].map(|id| TimelineId::new(id).unwrap());
    assert_eq!(connection.identify_system().await.unwrap().timeline, second);
    assert_eq!(connection.timeline_history(first).await.unwrap(), None);
    assert_eq!(connection.timeline_history(third).await.unwrap(), None);
    let history = connection.timeline_history(second).await.unwrap().unwrap();
    assert_eq!(history.file_name, "00000002.history");
    let on_server = std::fs::read(server.data().join("pg_wal/00000002.history")).unwrap();
    assert_eq!(history.content, on_server);
    let text = String::from_utf8(on_server).unwrap();
    let fork: Lsn = text.split('\t').nth(1).unwrap().parse().unwrap();

    let mut stream = streaming(connection, None, start, first).await;
    let end = loop {
        match stream.next().await.unwrap() {
            StreamEvent::Wal { .. } | StreamEvent::Keepalive { .. } => {}
            end => break end,
        }
    };
    assert_eq!(
        end,
        StreamEvent::TimelineEnd {
            next: second,
            at: fork
        }
    );
    assert_eq!(stream.position(), fork);

    // Asked again there is nothing left to send, and the connection still serves.
    let connection = stream.into_connection().unwrap();
    let started = connection
        .start_replication(None, fork, first)
        .await
        .unwrap();
    let Started::EndOfTimeline {
        mut connection,
        next,
        at,
    } = started
    else {
        panic!("{started:?}");
    };
    assert_eq!((next, at), (second, fork));
    connection.identify_system().await.unwrap();
}

#[tokio::test]
async fn follows_a_standby_through_its_promotion() {
    let primary = small_segments(&[]);
    primary.stop();
    let standby = primary.standby();
    let mut connection = standby.replication().await;
    assert_eq!(
        value(&mut standby.sql().await, "SELECT pg_is_in_recovery()").await,
        "t"
    );
    let identity = connection.identify_system().await.unwrap();
    let start = Lsn::new(identity.xlogpos.as_u64() / MIB * MIB);
    let mut stream = streaming(connection, None, start, identity.timeline).await;
    let mut sql = primary.sql().await;
    let marked = lsn(&mut sql, "SELECT pg_create_restore_point('before')").await;
    receive_up_to(&mut stream, &mut Vec::new(), marked).await;

    standby.promote();
    let end = loop {
        match stream.next().await.unwrap() {
            StreamEvent::Wal { .. } => {}
            StreamEvent::Keepalive { .. } => stream.queue_status(durable_up_to(stream.position())),
            end => break end,
        }
    };
    let StreamEvent::TimelineEnd { next, at } = end else {
        panic!("{end:?}");
    };
    assert_eq!(next.get(), 2);
    assert!(at >= marked);
    let mut connection = stream.into_connection().unwrap();
    assert!(connection.timeline_history(next).await.unwrap().is_some());

    // The new timeline goes on where the old one ended, in the same segment.
    let start = Lsn::new(at.as_u64() / MIB * MIB);
    let mut stream = streaming(connection, None, start, next).await;
    let mut sql = standby.sql().await;
    let marked = lsn(&mut sql, "SELECT pg_create_restore_point('after')").await;
    receive_up_to(&mut stream, &mut Vec::new(), marked).await;
}

#[tokio::test]
async fn receives_a_base_backup_in_the_form_of_its_version() {
    let server = Server::start(&["--data-checksums"], &[]);
    let mut sql = server.sql().await;
    let tablespace = server.spare_folder("space").display().to_string();
    let create = format!("CREATE TABLESPACE space LOCATION {}", literal(&tablespace));
    sql.execute(&create).await.unwrap();
    sql.execute("CREATE TABLE t TABLESPACE space AS SELECT generate_series(1, 10000)")
        .await
        .unwrap();
    let before = lsn(&mut sql, "SELECT pg_current_wal_lsn()").await;

    let mut connection = server.replication().await;
    let is_typed = connection.server_version_num() >= 150_000;
    for progress in [true, false] {
        let options = BaseBackupOptions {
            progress,
            ..BaseBackupOptions::new("it's nightly")
        };
        let mut backup = connection.base_backup(options).await.unwrap();
        assert!(backup.start() >= before);
        assert_eq!(backup.timeline().get(), 1);
        let [space, base] = backup.tablespaces() else {
            panic!("{:?}", backup.tablespaces());
        };
        assert_eq!(space.location.as_deref(), Some(tablespace.as_str()));
        assert!(space.oid.is_some() && base.oid.is_none());
        assert_eq!(base.size_kib.is_some_and(|kib| kib > 1000), progress);
        let mut copies = 0;
        let mut bytes = 0;
        let end = loop {
            match backup.next().await.unwrap() {
                BackupMessage::CopyOutBegins => copies += 1,
                BackupMessage::Data(data) => bytes += data.len(),
                BackupMessage::CopyOutEnds => {}
                BackupMessage::Finished { end, timeline } => {
                    assert_eq!(timeline.get(), 1);
                    break end;
                }
            }
        };
        assert!(end > backup.start());
        assert_eq!(backup.form() == BackupForm::Typed, is_typed);
        assert_eq!(copies, if is_typed { 1 } else { 3 });
        assert!(bytes > 10 << 20, "bytes={bytes}");
        connection = backup.into_connection().unwrap();
    }
    connection.identify_system().await.unwrap();
}

#[tokio::test]
async fn fails_a_base_backup_at_its_end_for_a_damaged_page() {
    let server = Server::start(&["--data-checksums"], &[]);
    let mut sql = server.sql().await;
    sql.execute("CREATE TABLE t AS SELECT generate_series(1, 10000)")
        .await
        .unwrap();
    sql.execute("CHECKPOINT").await.unwrap();
    let path = value(&mut sql, "SELECT pg_relation_filepath('t')").await;
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .open(server.data().join(path))
        .unwrap();
    file.seek(SeekFrom::Start(8192 + 5000)).unwrap();
    file.write_all(b"damage").unwrap();

    let connection = server.replication().await;
    let mut backup = connection
        .base_backup(BaseBackupOptions::new("x"))
        .await
        .unwrap();
    let mut last = None;
    let failed = loop {
        match backup.next().await {
            Ok(part) => last = Some(part),
            Err(error) => break error,
        }
    };
    assert_eq!(failed.sqlstate(), Some("XX001"), "{failed}");
    assert!(!failed.is_transient());
    assert_eq!(last, Some(BackupMessage::CopyOutEnds));
    let connection = backup.into_connection().unwrap();

    // Without the check the server sends the page as it is.
    let unchecked = BaseBackupOptions {
        verify_checksums: false,
        ..BaseBackupOptions::new("unchecked")
    };
    let mut backup = connection.base_backup(unchecked).await.unwrap();
    while !matches!(backup.next().await.unwrap(), BackupMessage::Finished { .. }) {}
}
