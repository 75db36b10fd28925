//! `UPLOAD_MANIFEST` and increments: against a scripted server, and a real one.

use replication::base_backup::{
    BackupKind, BackupMessage, BaseBackupError, BaseBackupOptions, BaseBackupStream,
    ServerCompression,
};
use replication::connection::{Connection, QueryError};
use replication::upload_manifest::ManifestUpload;

use crate::scripted::{
    Query, Receive, Script, Send, Step, UntilClosed, columns, complete, connection, copy_both,
    copy_data, copy_done, copy_in, copy_out, error, notice, ready, row,
};
use crate::server::Server;

const COMMAND: Step = Query("UPLOAD_MANIFEST");

async fn begun(steps: Vec<Step>) -> (Result<ManifestUpload, BaseBackupError>, Script) {
    let steps = [COMMAND].into_iter().chain(steps).collect();
    let (connection, script) = connection("18.6", steps);
    (connection.upload_manifest().await, script)
}

fn refusal() -> Vec<u8> {
    error("ERROR", "22P02", "manifest system identifier is 7")
}

#[tokio::test]
async fn uploads_in_parts_and_goes_on_with_the_backup() {
    let manifest = vec![b'm'; (64 << 10) + 3];
    let steps = vec![
        Send([notice("n"), copy_in()].concat()),
        Receive(copy_data(&manifest[..64 << 10])),
        Receive(copy_data(b"mmm")),
        Receive(copy_data(b"end")),
        Receive(copy_done()),
        Send([complete("UPLOAD_MANIFEST"), ready()].concat()),
        Query(
            "BASE_BACKUP (LABEL 'l', PROGRESS, CHECKPOINT 'fast', WAIT false, \
             VERIFY_CHECKSUMS true, MANIFEST 'yes', MANIFEST_CHECKSUMS 'CRC32C', INCREMENTAL)",
        ),
        Send(
            [
                columns(&["recptr", "tli"]),
                row(&[Some("0/2000028"), Some("1")]),
                complete("SELECT"),
                columns(&["spcoid", "spclocation", "size"]),
                row(&[None, None, None]),
                complete("SELECT"),
                copy_out(),
            ]
            .concat(),
        ),
        UntilClosed,
    ];
    let (upload, script) = begun(steps).await;
    let mut upload = upload.unwrap();
    upload.send(&manifest).await.unwrap();
    upload.send(b"").await.unwrap();
    upload.send(b"end").await.unwrap();
    upload.finish().await.unwrap();
    assert!(matches!(
        upload.send(b"x").await,
        Err(BaseBackupError::Ended)
    ));
    assert!(matches!(upload.finish().await, Err(BaseBackupError::Ended)));
    let options = BaseBackupOptions {
        kind: BackupKind::Increment,
        ..BaseBackupOptions::new("l")
    };
    let connection = upload.into_connection().unwrap();
    let mut backup = connection.base_backup(options).await.unwrap();
    assert_eq!(backup.next().await.unwrap(), BackupMessage::CopyOutBegins);
    drop(backup);
    script.done().await;
}

/// What does not take a manifest must not be given one.
#[tokio::test]
async fn refuses_a_server_that_does_not_begin() {
    for (answer, sqlstate) in [
        (
            [
                error("ERROR", "42601", "syntax error at UPLOAD_MANIFEST"),
                ready(),
            ]
            .concat(),
            Some("42601"),
        ),
        (error("FATAL", "57P01", "shutting down"), Some("57P01")),
        (copy_out(), None),
        (copy_both(), None),
        ([complete("UPLOAD_MANIFEST"), ready()].concat(), None),
        (copy_data(b"x"), None),
    ] {
        let (upload, script) = begun(vec![Send(answer)]).await;
        let refused = upload.unwrap_err();
        assert_eq!(refused.sqlstate(), sqlstate);
        assert!(
            sqlstate.is_some() || matches!(refused, BaseBackupError::Answer(_)),
            "{refused}"
        );
        script.done().await;
    }
    let (upload, script) = begun(vec![]).await;
    assert!(upload.unwrap_err().is_transient());
    script.done().await;
}

/// After a refusal that the server ended, the full way needs no new connection.
#[tokio::test]
async fn a_manifest_that_is_not_taken_leaves_the_connection() {
    // at once, while the manifest is being sent, or when it was read
    for (before, after) in [
        (refusal(), ready()),
        (Vec::new(), [refusal(), ready()].concat()),
    ] {
        let steps = vec![
            Send([copy_in(), before].concat()),
            Receive(copy_data(b"manifest")),
            Receive(copy_done()),
            Send(after),
            Query("SHOW x"),
            Send(
                [
                    columns(&["x"]),
                    row(&[Some("y")]),
                    complete("SHOW"),
                    ready(),
                ]
                .concat(),
            ),
        ];
        let (upload, script) = begun(steps).await;
        let mut upload = upload.unwrap();
        upload.send(b"manifest").await.unwrap();
        let refused = upload.finish().await.unwrap_err();
        assert_eq!(refused.sqlstate(), Some("22P02"));
        let mut connection = upload.into_connection().unwrap();
        assert_eq!(connection.show("x").await.unwrap(), "y");
        script.done().await;
    }
}

/// An answer that says half of it is no answer: the increment would be of another backup, or none.
#[tokio::test]
async fn is_not_taken_until_the_server_says_so() {
    let fatal = error("FATAL", "57P01", "shutting down");
    for (answer, check) in [
        (vec![], Check::Transient),
        (complete("UPLOAD_MANIFEST"), Check::Transient),
        (refusal(), Check::Sqlstate("22P02")),
        (fatal, Check::Sqlstate("57P01")),
        (ready(), Check::Answer),
        (copy_done(), Check::Answer),
        (
            [complete("A"), complete("B"), ready()].concat(),
            Check::Answer,
        ),
        ([complete("A"), refusal(), ready()].concat(), Check::Answer),
        (row(&[None]), Check::Answer),
    ] {
        let steps = vec![Send(copy_in()), Receive(copy_done()), Send(answer)];
        let (upload, script) = begun(steps).await;
        let mut upload = upload.unwrap();
        let failed = upload.finish().await.unwrap_err();
        match check {
            Check::Transient => assert!(failed.is_transient(), "{failed}"),
            Check::Sqlstate(expected) => assert_eq!(failed.sqlstate(), Some(expected)),
            Check::Answer => assert!(
                matches!(
                    failed,
                    BaseBackupError::Answer(
                        QueryError::Unexpected { .. } | QueryError::Incomplete { .. }
                    )
                ),
                "{failed}"
            ),
        }
        assert!(upload.into_connection().is_none());
        script.done().await;
    }
}

#[derive(Clone, Copy)]
enum Check {
    Transient,
    Sqlstate(&'static str),
    Answer,
}

/// A server that goes in the middle says why, where it does.
#[tokio::test]
async fn a_server_that_goes_while_it_is_sent_to_is_heard() {
    let steps = vec![Send(
        [copy_in(), error("FATAL", "57P01", "shutting down")].concat(),
    )];
    let (upload, script) = begun(steps).await;
    let mut upload = upload.unwrap();
    script.done().await;
    let failed = upload.send(&vec![0; 1 << 20]).await.unwrap_err();
    assert_eq!(failed.sqlstate(), Some("57P01"));
    assert!(matches!(upload.finish().await, Err(BaseBackupError::Ended)));
    assert!(upload.into_connection().is_none());
}

/// The archives' bytes, and the manifest's.
async fn received(backup: &mut BaseBackupStream) -> (Vec<u8>, Vec<u8>) {
    let (mut archives, mut manifest, mut in_manifest) = (Vec::new(), Vec::new(), false);
    loop {
        match backup.next().await.unwrap() {
            BackupMessage::Data(data) => match data[0] {
                b'm' => in_manifest = true,
                b'd' if in_manifest => manifest.extend_from_slice(&data[1..]),
                _ => archives.extend_from_slice(&data),
            },
            BackupMessage::Finished { .. } => return (archives, manifest),
            _ => {}
        }
    }
}

fn count(bytes: &[u8], part: &[u8]) -> usize {
    bytes
        .windows(part.len())
        .filter(|window| *window == part)
        .count()
}

async fn uploaded(connection: Connection, manifest: &[u8]) -> (bool, Connection) {
    let mut upload = connection.upload_manifest().await.unwrap();
    for part in manifest.chunks(10_000) {
        upload.send(part).await.unwrap();
    }
    let taken = upload.finish().await;
    assert!(
        taken.is_ok() || taken.as_ref().is_err_and(|e| e.sqlstate().is_some()),
        "{taken:?}"
    );
    (taken.is_ok(), upload.into_connection().unwrap())
}

#[tokio::test]
async fn receives_an_increment_where_the_version_has_them() {
    let server = Server::start(&[], &[]);
    let mut sql = server.sql().await;
    let connection = server.replication().await;
    let increment = BaseBackupOptions {
        kind: BackupKind::Increment,
        ..BaseBackupOptions::new("increment")
    };
    if connection.server_version_num() < 170_000 {
        let refused = connection.base_backup(increment).await.unwrap_err();
        assert!(
            matches!(refused, BaseBackupError::TooOld { .. }),
            "{refused}"
        );
        let refused = server
            .replication()
            .await
            .upload_manifest()
            .await
            .unwrap_err();
        assert!(
            matches!(refused, BaseBackupError::TooOld { .. }),
            "{refused}"
        );
        return;
    }
    sql.execute("ALTER SYSTEM SET summarize_wal = on")
        .await
        .unwrap();
    sql.execute("SELECT pg_reload_conf()").await.unwrap();
    sql.execute("CREATE TABLE t AS SELECT generate_series(1, 100000) a")
        .await
        .unwrap();

    let full = BaseBackupOptions::new("full");
    let mut backup = connection.base_backup(full).await.unwrap();
    let (archives, manifest) = received(&mut backup).await;
    assert_eq!(count(&archives, b"/INCREMENTAL."), 0);

    sql.execute("UPDATE t SET a = 0 WHERE a = 50000")
        .await
        .unwrap();
    let connection = backup.into_connection().unwrap();
    let (taken, connection) = uploaded(connection, &manifest).await;
    assert!(taken);
    let mut backup = connection.base_backup(increment.clone()).await.unwrap();
    let (archives, incremental) = received(&mut backup).await;
    assert!(count(&archives, b"/INCREMENTAL.") > 100);
    assert!(count(&incremental, b"INCREMENTAL.") > 100);
    assert_eq!(count(&archives, b"INCREMENTAL FROM LSN: "), 1);

    // half a manifest, a damaged one, and so none at all
    let connection = server.replication().await;
    let (taken, connection) = uploaded(connection, &manifest[..manifest.len() / 2]).await;
    assert!(!taken);
    let mut damaged = manifest.clone();
    damaged[manifest.len() / 2] ^= 1;
    let (taken, connection) = uploaded(connection, &damaged).await;
    assert!(!taken);
    let refused = connection.base_backup(increment).await.unwrap_err();
    assert_eq!(refused.sqlstate(), Some("55000"), "{refused}");
}

#[tokio::test]
async fn receives_archives_that_the_server_compressed_where_the_version_does() {
    let server = Server::start(&[], &[]);
    let connection = server.replication().await;
    let options = BaseBackupOptions {
        compression: Some(ServerCompression {
            level: 1,
            workers: 0,
        }),
        ..BaseBackupOptions::new("compressed")
    };
    if connection.server_version_num() < 150_000 {
        let refused = connection.base_backup(options).await.unwrap_err();
        assert!(
            matches!(refused, BaseBackupError::TooOld { .. }),
            "{refused}"
        );
        return;
    }
    let mut backup = match connection.base_backup(options).await {
        Ok(backup) => backup,
        // as a server says that was built without
        Err(BaseBackupError::Server(refused)) if refused.message.contains("support") => {
            assert_eq!(refused.sqlstate, "42601", "{refused}");
            assert!(refused.message.contains("ZSTD"), "{refused}");
            return;
        }
        Err(other) => panic!("{other}"),
    };
    let (archives, manifest) = received(&mut backup).await;
    assert_eq!(count(&archives, b"nbase.tar.zst\0\0"), 1);
    assert_eq!(count(&archives[..100], b"\x28\xb5\x2f\xfd"), 1);
    assert!(archives.len() < 10 << 20, "{}", archives.len());
    assert!(manifest.ends_with(b"\"}\n"));
}
