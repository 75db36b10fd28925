//! Lists of more objects than a store gives in one answer: folder by folder, at the same time, since
//! one page after another takes a year's WAL too long.
//!
//! Others write meanwhile, and what they write must not look as if something were missing: a backup is
//! listed before the packs and the WAL that it needs, and the newest WAL before what comes before it,
//! which is there by then.

use futures_util::future::BoxFuture;
use futures_util::{FutureExt as _, StreamExt as _, TryStreamExt as _, stream};

use super::store::{FolderList, Listed, Store, StoreError};

/// So many folders are listed at the same time.
const FOLDERS_AT_ONCE: usize = 16;

/// Every object below `folder` (which ends in `/`, or is empty), sorted by path.
pub(super) async fn list(store: &Store, folder: &str) -> Result<Vec<Listed>, StoreError> {
    let mut listed = match store.list_few(folder).await? {
        Some(few) => return Ok(few),
        None => many(store, folder).await?,
    };
    listed.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(listed)
}

/// What is below a folder in one that holds much.
fn below(store: &Store, folder: String) -> BoxFuture<'_, Result<Vec<Listed>, StoreError>> {
    async move {
        match Order::of(&folder) {
            Order::Together => store.list(&folder).await,
            // most of what there is
            Order::ByName | Order::NewestFirst => many(store, &folder).await,
            Order::AtOnce => list(store, &folder).await,
        }
    }
    .boxed()
}

/// How the folders in a folder are listed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Order {
    /// One after another, by name.
    ByName,
    /// All at once.
    AtOnce,
    /// The last by name, then the others at once.
    NewestFirst,
    /// Not by themselves: a segment and its pieces are seen at the same time.
    Together,
}

impl Order {
    fn of(folder: &str) -> Self {
        let parts: Vec<&str> = folder.split_terminator('/').collect();
        match parts.as_slice() {
            [] | ["wal"] => Self::ByName,
            [_other_than_wal] => Self::AtOnce,
            ["wal", _timeline] => Self::NewestFirst,
            _ => Self::Together,
        }
    }
}

async fn many(store: &Store, folder: &str) -> Result<Vec<Listed>, StoreError> {
    let order = Order::of(folder);
    if order == Order::Together {
        return store.list(folder).await;
    }
    let FolderList {
        mut objects,
        folders,
    } = store.list_folder(folder).await?;
    let mut folders: Vec<String> = folders
        .iter()
        .map(|name| format!("{folder}{name}/"))
        .collect();
    if order == Order::NewestFirst
        && let Some(newest) = folders.pop()
    {
        objects.extend(below(store, newest).await?);
    }
    let at_once = match order {
        Order::ByName => 1,
        _ => FOLDERS_AT_ONCE,
    };
    let listed = folders.into_iter().map(|folder| below(store, folder));
    let listed: Vec<Vec<Listed>> = stream::iter(listed).buffered(at_once).try_collect().await?;
    objects.extend(listed.into_iter().flatten());
    Ok(objects)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use bytes::Bytes;
    use object_store::memory::InMemory;

    use super::*;
    use crate::repository::store::StoreOptions;

    /// What a listing leaves out is not restored, and is copied, or removed, as if it were not there.
    #[tokio::test]
    async fn folder_by_folder_nothing_is_left_out() {
        let folder = tempfile::tempdir().unwrap();
        let url = format!("file://{}", folder.path().display());
        let store = Store::open(&StoreOptions::at(&url), true).unwrap();
        let paths = [
            "backups/20261120T140300.123Z/backup.json",
            "backups/20261120T140300.123Z/files/00000000",
            "backups/20261121T140300.123Z/backup.json",
            "cluster.json",
            "holes/00000001/0000000001000000-0000000002000000",
            "index/00000001/000000010000000000000000",
            "packs/20261120T140300.123Z/00000000",
            "tip/00000001",
            "wal/00000001/0000000100000000/000000010000000000000001",
            "wal/00000001/0000000100000000/000000010000000000000002.pieces/0000000002000000-0000000002000010",
            "wal/00000001/0000000100000001/000000010000000100000000",
            "wal/00000001/0000000100000002/000000010000000200000000",
            "wal/00000002.history",
            "wal/00000002/0000000200000002/000000020000000200000001",
        ];
        for path in paths {
            let bytes = Bytes::from(path.as_bytes().to_vec());
            store.create(path, bytes).await.unwrap();
        }
        let folders = [
            "",
            "wal/",
            "wal/00000001/",
            "packs/",
            "wal/00000001/0000000100000000/",
        ];
        for folder in folders {
            let mut by_folder = many(&store, folder).await.unwrap();
            by_folder.sort_by(|a, b| a.path.cmp(&b.path));
            assert_eq!(by_folder, store.list(folder).await.unwrap(), "{folder}");
            assert_eq!(by_folder, list(&store, folder).await.unwrap(), "{folder}");
        }
        let found = list(&store, "").await.unwrap();
        let found: Vec<&str> = found.iter().map(|object| object.path.as_str()).collect();
        assert_eq!(found, paths);
    }

    /// Whoever asks a bucket of a year's WAL must not wait for a hundred answers one after another.
    #[tokio::test]
    async fn what_one_answer_does_not_hold_is_listed_whole() {
        let options = StoreOptions {
            objects: Some(Arc::new(InMemory::new())),
            ..StoreOptions::at("s3://bucket")
        };
        let store = Store::open(&options, true).unwrap();
        let mut paths = vec!["cluster.json".to_owned()];
        for number in 0..1200 {
            let (folder, low) = (number / 256, number % 256);
            paths.push(format!(
                "wal/00000001/000000010000000{folder}/000000010000000{folder}000000{low:02X}"
            ));
        }
        for path in &paths {
            store.create(path, Bytes::from_static(b"x")).await.unwrap();
        }
        assert_eq!(store.list_few("").await.unwrap(), None);
        let few = store
            .list_few("wal/00000001/0000000100000001/")
            .await
            .unwrap();
        assert_eq!(few.map(|few| few.len()), Some(256));
        let found = list(&store, "").await.unwrap();
        let found: Vec<String> = found.into_iter().map(|object| object.path).collect();
        assert_eq!(found, paths);
    }

    #[test]
    fn what_is_needed_is_listed_after_what_needs_it() {
        // a backup, then its packs and WAL, by their names
        assert!("backups" < "packs" && "packs" < "wal" && "tip" < "wal");
        assert_eq!(Order::of(""), Order::ByName);
        assert_eq!(Order::of("wal/00000001/"), Order::NewestFirst);
        assert_eq!(Order::of("wal/00000001/0000000100000000/"), Order::Together);
    }
}
