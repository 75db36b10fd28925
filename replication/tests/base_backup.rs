//! `BASE_BACKUP` against a scripted server.

use bytes::Bytes;
use replication::base_backup::{
    BackupForm, BackupMessage, BaseBackupError, BaseBackupOptions, BaseBackupStream, TablespaceInfo,
};
use replication::connection::{QueryError, WARNINGS_MAX};
use wal::{Lsn, TimelineId};

use crate::scripted::{
    Query, Script, Step, columns, complete, connection, copy_data, copy_done, copy_out, error,
    keepalive, notice, ready, row, wal, warning,
};

const COMMAND_15: &str = "BASE_BACKUP (LABEL 'l', PROGRESS, CHECKPOINT 'fast', WAIT false, \
     VERIFY_CHECKSUMS true, MANIFEST 'yes', MANIFEST_CHECKSUMS 'CRC32C')";
const COMMAND_13: &str =
    "BASE_BACKUP LABEL 'l' PROGRESS FAST NOWAIT MANIFEST 'yes' MANIFEST_CHECKSUMS 'CRC32C'";

fn position(lsn: &str) -> Vec<u8> {
    [
        columns(&["recptr", "tli"]),
        row(&[Some(lsn), Some("1")]),
        complete("SELECT"),
    ]
    .concat()
}

fn head() -> Vec<u8> {
    [
        notice("checkpoint starting"),
        position("0/2000028"),
        columns(&["spcoid", "spclocation", "size"]),
        row(&[Some("16384"), Some("/srv/fast"), Some("12")]),
        row(&[None, None, Some("34567")]),
        complete("SELECT"),
    ]
    .concat()
}

async fn backup(
    version: &str,
    steps: Vec<Vec<u8>>,
) -> (Result<BaseBackupStream, BaseBackupError>, Script) {
    let command = if version.starts_with("13") {
        COMMAND_13
    } else {
        COMMAND_15
    };
    let steps = [Query(command)]
        .into_iter()
        .chain(steps.into_iter().map(Step::Send))
        .collect();
    let (connection, script) = connection(version, steps);
    (
        connection.base_backup(BaseBackupOptions::new("l")).await,
        script,
    )
}

/// All parts of the answer, up to and including the one that ends it.
async fn all(stream: &mut BaseBackupStream) -> (Vec<BackupMessage>, Option<BaseBackupError>) {
    let mut parts = Vec::new();
    loop {
        match stream.next().await {
            Ok(part) => {
                let is_last = matches!(part, BackupMessage::Finished { .. });
                parts.push(part);
                if is_last {
                    return (parts, None);
                }
            }
            Err(error) => return (parts, Some(error)),
        }
    }
}

fn data(bytes: &'static [u8]) -> BackupMessage {
    BackupMessage::Data(Bytes::from_static(bytes))
}

fn finished() -> BackupMessage {
    let timeline = TimelineId::new(1).unwrap();
    BackupMessage::Finished {
        end: Lsn::new(0x200_0100),
        timeline,
    }
}

#[tokio::test]
async fn reads_one_typed_copy_of_a_newer_server() {
    let steps = vec![
        head(),
        copy_out(),
        copy_data(b"nbase.tar\0\0"),
        notice("skipping special file"),
        copy_data(b""),
        copy_data(b"dbytes"),
        copy_done(),
        position("0/2000100"),
        [complete("BASE_BACKUP"), ready()].concat(),
    ];
    let (stream, script) = backup("15.14", steps).await;
    let mut stream = stream.unwrap();
    assert_eq!(stream.start(), Lsn::new(0x200_0028));
    assert_eq!(stream.timeline(), TimelineId::new(1).unwrap());
    assert_eq!(stream.form(), BackupForm::Typed);
    let location = Some("/srv/fast".to_owned());
    assert_eq!(
        stream.tablespaces(),
        [
            TablespaceInfo {
                oid: Some(16384),
                location,
                size_kib: Some(12)
            },
            TablespaceInfo {
                oid: None,
                location: None,
                size_kib: Some(34567)
            },
        ]
    );
    let (parts, failed) = all(&mut stream).await;
    assert!(failed.is_none(), "{failed:?}");
    assert_eq!(
        parts,
        [
            BackupMessage::CopyOutBegins,
            data(b"nbase.tar\0\0"),
            data(b"dbytes"),
            BackupMessage::CopyOutEnds,
            finished(),
        ]
    );
    assert!(matches!(stream.next().await, Err(BaseBackupError::Ended)));
    assert!(stream.into_connection().is_some());
    script.done().await;
}

#[tokio::test]
async fn reads_a_copy_per_tablespace_and_the_manifest_of_an_older_server() {
    let copy = |bytes| [copy_out(), copy_data(bytes), copy_done()].concat();
    let steps = vec![
        head(),
        copy(b"tablespace"),
        copy(b"base"),
        copy(b"manifest"),
        position("0/2000100"),
        [complete("SELECT"), ready()].concat(),
    ];
    let (stream, script) = backup("13.22", steps).await;
    let mut stream = stream.unwrap();
    assert_eq!(stream.form(), BackupForm::PerTablespace);
    let (parts, failed) = all(&mut stream).await;
    assert!(failed.is_none(), "{failed:?}");
    let begins = parts
        .iter()
        .filter(|part| **part == BackupMessage::CopyOutBegins)
        .count();
    assert_eq!((begins, parts.last()), (3, Some(&finished())));
    script.done().await;
}

/// Which pages are bad is said in warnings alone, and the error at the end names none.
#[tokio::test]
async fn keeps_what_the_server_warns_of_with_the_backup_that_failed() {
    let bad = |block: usize| {
        warning(&format!(
            "checksum verification failed in file \"./base/5/16384\", block {block}"
        ))
    };
    let failed = error("ERROR", "XX001", "checksum verification failure");
    let many: Vec<u8> = (0..150).flat_map(bad).collect();
    let steps = vec![
        head(),
        [copy_out(), copy_data(b"dx"), bad(999)].concat(),
        [notice("no warning"), many, warning(&"long".repeat(5000))].concat(),
        [copy_done(), position("0/2000100"), failed, ready()].concat(),
    ];
    let (stream, script) = backup("18.6", steps).await;
    let mut stream = stream.unwrap();
    assert!(stream.warnings().is_empty());
    let (_, failed) = all(&mut stream).await;
    assert_eq!(failed.unwrap().sqlstate(), Some("XX001"));
    let warnings = stream.warnings();
    assert_eq!(
        (warnings.len(), stream.warnings_left_out()),
        (WARNINGS_MAX, 52)
    );
    assert_eq!(warnings[0].severity, "WARNING");
    assert!(warnings[0].message.ends_with("block 999"));
    assert!(warnings[1].message.ends_with("block 0"));
    script.done().await;
}

#[tokio::test]
async fn warnings_are_those_of_the_newest_command() {
    let answer = |first| [first, complete("SELECT"), ready()].concat();
    let steps = vec![
        Query("one"),
        Step::Send(answer(warning("first"))),
        Query("two"),
        Step::Send(answer(notice("second"))),
    ];
    let (mut connection, script) = connection("18.6", steps);
    connection.execute("one").await.unwrap();
    assert_eq!(connection.warnings()[0].message, "first");
    connection.execute("two").await.unwrap();
    assert!(connection.warnings().is_empty());
    script.done().await;
}

/// The server finds damaged pages while it sends them and says so at the very end.
#[tokio::test]
async fn is_no_backup_until_the_server_says_so() {
    let damaged = error(
        "ERROR",
        "XX001",
        "checksum verification failure during base backup",
    );
    let typed = [
        head(),
        copy_out(),
        copy_data(b"dbytes"),
        copy_done(),
        position("0/2000100"),
    ];
    let (stream, script) = backup("18.6", [&typed[..], &[damaged.clone(), ready()]].concat()).await;
    let mut stream = stream.unwrap();
    let (parts, failed) = all(&mut stream).await;
    assert_eq!(failed.unwrap().sqlstate(), Some("XX001"));
    assert_eq!(parts.last(), Some(&BackupMessage::CopyOutEnds));
    assert!(stream.into_connection().is_some());
    script.done().await;

    // Cut off at every earlier place, it is none either.
    for end in 1..=typed.len() {
        let (stream, script) = backup("18.6", typed[..end].to_vec()).await;
        let mut stream = stream.unwrap();
        let (parts, failed) = all(&mut stream).await;
        assert!(failed.unwrap().is_transient());
        assert!(!parts.contains(&finished()));
        script.done().await;
    }
}

#[tokio::test]
async fn refuses_an_answer_that_lacks_a_part_or_has_one_too_many() {
    let copy = [copy_out(), copy_data(b"x"), copy_done()].concat();
    let end = [position("0/2000100"), complete("BASE_BACKUP"), ready()].concat();
    for (version, rest) in [
        ("18.6", vec![end.clone()]),
        ("18.6", vec![copy.clone(), copy.clone(), end.clone()]),
        ("18.6", vec![copy.clone(), complete("BASE_BACKUP"), ready()]),
        ("13.22", vec![copy.clone(), copy.clone(), end.clone()]),
        ("18.6", vec![copy_data(b"x")]),
        ("18.6", vec![copy_out(), ready()]),
        (
            "18.6",
            vec![
                copy.clone(),
                columns(&["recptr"]),
                row(&[Some("0/2000100")]),
            ],
        ),
        (
            "18.6",
            vec![
                copy.clone(),
                columns(&["recptr", "tli"]),
                row(&[Some("?"), Some("1")]),
            ],
        ),
    ] {
        let (stream, script) = backup(version, [vec![head()], rest].concat()).await;
        let mut stream = stream.unwrap();
        let (_, failed) = all(&mut stream).await;
        let failed = failed.unwrap();
        assert!(matches!(failed, BaseBackupError::Answer(_)), "{failed}");
        assert!(!failed.is_transient());
        script.done().await;
    }
}

#[tokio::test]
async fn refuses_a_head_that_is_none() {
    for head in [
        complete("SELECT"),
        [position("0/2000028"), complete("SELECT")].concat(),
        [
            position("0/2000028"),
            columns(&["spcoid"]),
            row(&[None]),
            complete("SELECT"),
        ]
        .concat(),
        wal(0, b""),
        keepalive(0, false),
        position("nowhere"),
    ] {
        let (stream, script) = backup("18.6", vec![head]).await;
        let failed = stream.unwrap_err();
        assert!(
            matches!(
                failed,
                BaseBackupError::Answer(
                    QueryError::Incomplete { .. }
                        | QueryError::Unexpected { .. }
                        | QueryError::BadValue { .. }
                )
            ),
            "{failed}"
        );
        script.done().await;
    }
    let refused = error(
        "ERROR",
        "55000",
        "WAL level not sufficient for making an online backup",
    );
    let (stream, script) = backup("18.6", vec![[refused, ready()].concat()]).await;
    assert_eq!(stream.unwrap_err().sqlstate(), Some("55000"));
    script.done().await;
}

#[tokio::test]
async fn loses_nothing_when_every_read_is_dropped_once() {
    let steps = vec![
        head(),
        [copy_out(), copy_data(b"dbytes"), copy_done()].concat(),
        [position("0/2000100"), complete("BASE_BACKUP"), ready()].concat(),
    ];
    let (stream, script) = backup("18.6", steps).await;
    let mut stream = stream.unwrap();
    let mut parts = 0;
    loop {
        tokio::select! {
            biased;
            part = stream.next() => {
                parts += 1;
                if part.unwrap() == finished() {
                    break;
                }
            }
            () = tokio::task::yield_now() => {}
        }
    }
    assert_eq!(parts, 4);
    script.done().await;
}
