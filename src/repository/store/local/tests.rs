//! Tests of a folder as a store.

use std::os::unix::fs::PermissionsExt as _;

use super::super::{Created, Store, StoreError, StoreOptions};
use super::*;

fn open(folder: &FilePath) -> Store {
    Store::open(&StoreOptions::at(folder.to_str().unwrap()), true).unwrap()
}

fn everything(folder: &FilePath) -> Vec<PathBuf> {
    let mut found = vec![folder.to_owned()];
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(everything(&path));
        } else {
            found.push(path);
        }
    }
    found
}

#[tokio::test]
async fn nobody_else_may_read_what_is_stored() {
    // WAL holds every row of every table; umask is 022 nearly everywhere
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("new/root");
    let store = open(&root).below("main");
    store
        .create("a/b/x", Bytes::from_static(b"x"))
        .await
        .unwrap();
    store
        .overwrite("tip/1", Bytes::from_static(b"1"))
        .await
        .unwrap();
    store
        .overwrite("tip/1", Bytes::from_static(b"2"))
        .await
        .unwrap();
    let found = everything(&folder.path().join("new"));
    assert_eq!(found.iter().filter(|path| path.is_file()).count(), 2);
    for path in found {
        let expected = if path.is_dir() { 0o700 } else { 0o600 };
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, expected, "{}", path.display());
    }
}

#[tokio::test]
async fn what_a_killed_process_left_is_no_object_and_is_cleared() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    store
        .create("main/x", Bytes::from_static(b"x"))
        .await
        .unwrap();
    let staging = folder.path().join(STAGING);
    let half = staging.join("1-0");
    std::fs::write(&half, b"half an obj").unwrap();
    let living = Staged::write(&staging, b"whole").unwrap();
    let listed = store.list("").await.unwrap();
    assert_eq!(listed.len(), 1, "{listed:?}");
    assert_eq!(store.folders("").await.unwrap(), ["main"]);
    let again = open(folder.path());
    assert!(!half.exists());
    living.create(&folder.path().join("main/y")).unwrap();
    assert_eq!(again.get("main/y").await.unwrap(), "whole");
    assert_eq!(std::fs::read_dir(&staging).unwrap().count(), 0);
}

#[tokio::test]
async fn one_of_many_writers_creates_and_the_object_is_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let writers = (0..16_u8).map(|writer| {
        let store = store.clone();
        async move { store.create("x", Bytes::from(vec![writer; 100_000])).await }
    });
    let created = futures_util::future::join_all(writers).await;
    let new: Vec<usize> = (0..16)
        .filter(|writer| matches!(created[*writer], Ok(Created::New)))
        .collect();
    assert_eq!(new.len(), 1);
    let stored = store.get("x").await.unwrap();
    assert!(stored.iter().all(|byte| usize::from(*byte) == new[0]));
}

#[tokio::test]
async fn reads_end_where_the_object_does() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    store
        .create("x", Bytes::from_static(b"0123456789"))
        .await
        .unwrap();
    store.create("empty", Bytes::new()).await.unwrap();
    assert_eq!(store.get_range("x", 8, 5).await.unwrap(), "89");
    for (offset, length) in [(10, 1), (11, 5), (u64::MAX, 1), (3, 0)] {
        assert_eq!(store.get_range("x", offset, length).await.unwrap(), "");
    }
    let missing = store.get_range("y", 8, 5).await;
    assert!(matches!(missing, Err(StoreError::NotFound { .. })));
    assert_eq!(store.get_tail("empty", 5).await.unwrap().1, 0);
    let all = (Bytes::from_static(b"0123456789"), 10);
    assert_eq!(store.get_tail("x", 50).await.unwrap(), all);
}

#[tokio::test]
async fn a_disk_that_takes_no_more_is_not_one_that_is_away() {
    let folder = tempfile::tempdir().unwrap();
    for (name, kind) in [
        ("full", io::ErrorKind::StorageFull),
        ("quota", io::ErrorKind::QuotaExceeded),
        ("read-only", io::ErrorKind::ReadOnlyFilesystem),
        ("rights", io::ErrorKind::PermissionDenied),
    ] {
        let fault = super::super::fault::Fault::from(failed(io::Error::from(kind)));
        let shown = format!("{fault:?}");
        let expected = if matches!(name, "full" | "quota") {
            "Full"
        } else {
            "Forbidden"
        };
        assert!(shown.starts_with(expected), "{name}: {shown}");
    }
    // a file where a folder should be
    let store = open(folder.path());
    store.create("a", Bytes::new()).await.unwrap();
    let error = store.create("a/b", Bytes::new()).await.unwrap_err();
    assert!(matches!(error, StoreError::Unreachable { .. }), "{error:?}");
}
