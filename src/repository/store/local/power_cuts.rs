//! Tests of what a journal makes good: a power cut is a copy of the folder, in which whatever was
//! not synced is torn or gone.

use std::fs;
use std::os::unix::fs::symlink;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use container::Header;
use object_store::ObjectStoreExt as _;
use tempfile::TempDir;

use super::frame::{self, Frame, Note};
use super::journal::Settings;
use super::*;

/// So that objects of a kilobyte fill a half now and then.
const SMALL_HALF: u64 = 128 << 10;

fn open(folder: &FilePath) -> Local {
    Local::open(folder, true).unwrap()
}

/// Gives what is in the journal alone its files, as it gets them in a moment without work.
fn name_all(local: &Local) {
    let journal = local.journal().unwrap();
    journal.name(Duration::ZERO, usize::MAX);
    assert!(!journal.has_nameless());
}

/// What others see under a path.
async fn seen(local: &Local, path: &str) -> Option<Vec<u8>> {
    let got = local.get(&Path::from(path)).await.ok()?;
    Some(got.bytes().await.unwrap().to_vec())
}

async fn listed(local: &Local) -> Vec<String> {
    let found: Vec<ObjectMeta> = local.list(None).try_collect().await.unwrap();
    let mut found: Vec<String> = found.iter().map(|it| it.location.to_string()).collect();
    found.sort();
    found
}

fn small(folder: &FilePath) -> Local {
    let settings = Settings {
        half_bytes: SMALL_HALF,
        ..Settings::default()
    };
    open(folder).with_journal(settings).unwrap()
}

async fn put(local: &Local, path: &str, bytes: &[u8]) -> Result<()> {
    let mut extensions = object_store::Extensions::new();
    extensions.insert(Brief);
    let options = PutOptions {
        mode: PutMode::Create,
        extensions,
        ..PutOptions::default()
    };
    let payload = PutPayload::from(bytes.to_vec());
    local.put_opts(&Path::from(path), payload, options).await?;
    Ok(())
}

/// An object as a repository holds it, which knows by itself whether it is whole.
fn object(name: &str, plain: &[u8]) -> Vec<u8> {
    let header = Header::new("piece", name, "main", "1");
    container::encode(&header, plain, serde_json::Map::new(), 1, None).unwrap()
}

fn name(number: usize) -> String {
    format!("main/1/wal/{number:04}")
}

async fn put_some(local: &Local, count: usize) -> Vec<(String, Vec<u8>)> {
    let mut put_there = Vec::new();
    for number in 0..count {
        let (path, bytes) = (name(number), object(&name(number), &[7; 100]));
        put(local, &path, &bytes).await.unwrap();
        put_there.push((path, bytes));
    }
    put_there
}

/// Bytes that zstd makes little of.
fn noise(number: usize) -> u8 {
    let mixed = number.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    (mixed >> 40).to_le_bytes()[0]
}

/// The folder as another machine finds it on the disk.
fn copy_of(folder: &FilePath) -> TempDir {
    fn copy(from: &FilePath, to: &FilePath) {
        for entry in fs::read_dir(from).unwrap() {
            let entry = entry.unwrap();
            let to = to.join(entry.file_name());
            if entry.path().is_dir() {
                fs::create_dir(&to).unwrap();
                copy(&entry.path(), &to);
            } else {
                fs::copy(entry.path(), to).unwrap();
            }
        }
    }
    let to = tempfile::tempdir().unwrap();
    copy(folder, to.path());
    to
}

fn journals(folder: &FilePath) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder.join(JOURNALS)).unwrap();
    entries.map(|entry| entry.unwrap().path()).collect()
}

fn only_journal(folder: &FilePath) -> PathBuf {
    let found = journals(folder);
    assert_eq!(found.len(), 1, "{found:?}");
    found[0].clone()
}

fn salt_of(journal: &FilePath) -> u64 {
    let name = journal.file_name().unwrap().to_str().unwrap();
    u64::from_str_radix(name.split_once('-').unwrap().1, 16).unwrap()
}

fn read(folder: &FilePath, path: &str) -> Option<Vec<u8>> {
    fs::read(folder.join(path)).ok()
}

#[tokio::test]
async fn what_a_power_cut_tore_is_whole_again() {
    // it was acknowledged, and the server has forgotten it
    let folder = tempfile::tempdir().unwrap();
    let local = small(folder.path());
    let stored = put_some(&local, 8).await;
    name_all(&local);
    let cut = copy_of(folder.path());
    for (number, (path, bytes)) in stored.iter().enumerate() {
        let at = cut.path().join(path);
        let half = bytes.len() / 2;
        let mut zeroed = bytes.clone();
        zeroed[half..].fill(0);
        match number % 5 {
            0 => fs::remove_file(&at).unwrap(),
            1 => fs::write(&at, b"").unwrap(),
            2 => fs::write(&at, &bytes[..half]).unwrap(),
            3 => fs::write(&at, zeroed).unwrap(),
            _ => fs::write(&at, vec![0; bytes.len()]).unwrap(),
        }
    }
    // whoever only reads puts it right too
    drop(Local::open(cut.path(), false).unwrap());
    for (path, bytes) in &stored {
        assert_eq!(read(cut.path(), path).as_ref(), Some(bytes), "{path}");
    }
    assert!(journals(cut.path()).is_empty());
    // and the folder that it lay in may be gone as well
    let cut = copy_of(folder.path());
    fs::remove_dir_all(cut.path().join("main")).unwrap();
    drop(open(cut.path()));
    for (path, bytes) in &stored {
        assert_eq!(read(cut.path(), path).as_ref(), Some(bytes), "{path}");
    }
}

#[tokio::test]
async fn a_journal_torn_anywhere_gives_what_is_before_the_tear() {
    let folder = tempfile::tempdir().unwrap();
    let local = small(folder.path());
    let stored = put_some(&local, 5).await;
    let cut = copy_of(folder.path());
    let journal = only_journal(cut.path());
    let whole = fs::read(&journal).unwrap();
    let notes: Vec<_> = stored
        .iter()
        .map(|(path, object)| Note::Put { path, object })
        .collect();
    let lengths = notes.iter().map(|note| Frame::encoded_bytes(note).unwrap());
    let ends: Vec<usize> = lengths
        .scan(0, |end, length| {
            *end += length;
            Some(*end)
        })
        .collect();
    for tear in (0..=*ends.last().unwrap()).step_by(24).chain(ends.clone()) {
        let mut torn = whole.clone();
        torn[tear..].fill(0);
        fs::write(&journal, &torn).unwrap();
        fs::remove_dir_all(cut.path().join("main")).ok();
        drop(open(cut.path()));
        for ((path, bytes), end) in stored.iter().zip(&ends) {
            let found = read(cut.path(), path);
            // the last bytes of a frame are padding, and nothing is lost with them
            let is_there = *end <= tear.next_multiple_of(frame::ALIGNED);
            assert!(
                found.is_none_or(|found| found == *bytes),
                "{path} at {tear}"
            );
            if is_there && *end <= tear {
                assert!(read(cut.path(), path).is_some(), "{path} at {tear}");
            }
        }
    }
}

#[tokio::test]
async fn a_damaged_journal_costs_one_object_and_makes_nothing_up() {
    let folder = tempfile::tempdir().unwrap();
    let local = small(folder.path());
    let stored = put_some(&local, 3).await;
    let cut = copy_of(folder.path());
    let journal = only_journal(cut.path());
    let whole = fs::read(&journal).unwrap();
    for at in (0..1500).step_by(7) {
        let mut damaged = whole.clone();
        damaged[at] ^= 0x10;
        fs::write(&journal, &damaged).unwrap();
        fs::remove_dir_all(cut.path().join("main")).ok();
        drop(open(cut.path()));
        let found: Vec<_> = stored
            .iter()
            .filter_map(|(path, bytes)| Some((read(cut.path(), path)?, bytes)))
            .collect();
        assert!(found.len() >= 2, "byte {at}");
        assert!(found.iter().all(|(found, bytes)| found == *bytes));
    }
}

#[tokio::test]
async fn acknowledges_and_shows_nothing_before_the_journal_is_synced() {
    // a commit would return, and a power cut would take it
    let folder = tempfile::tempdir().unwrap();
    let (begun_in, begun) = mpsc::channel();
    let (go_on, wait) = mpsc::channel::<()>();
    let wait = Mutex::new(wait);
    let settings = Settings {
        sync: Box::new(move |file| {
            begun_in.send(()).unwrap();
            wait.lock().unwrap().recv().unwrap();
            durable::sync_data(file)
        }),
        ..Settings::default()
    };
    let local = open(folder.path()).with_journal(settings).unwrap();
    let names: Vec<String> = (0..20).map(name).collect();
    let mut puts: Vec<_> = names
        .iter()
        .map(|name| Box::pin(put(&local, name, b"x")))
        .collect();
    assert!(futures_util::poll!(&mut puts[0]).is_pending());
    begun.recv().unwrap();
    // what comes meanwhile waits for the next sync, all of it together
    for put in &mut puts {
        assert!(futures_util::poll!(put).is_pending());
    }
    assert!(listed(&local).await.is_empty());
    assert_eq!(seen(&local, &names[0]).await, None);
    go_on.send(()).unwrap();
    begun.recv().unwrap();
    assert_eq!(listed(&local).await, names[..1]);
    assert!(puts.remove(0).await.is_ok());
    for put in &mut puts {
        assert!(futures_util::poll!(put).is_pending());
    }
    go_on.send(()).unwrap();
    for put in puts {
        put.await.unwrap();
    }
    assert_eq!(listed(&local).await, names);
    assert!(begun.try_recv().is_err());
}

#[tokio::test]
async fn a_journal_that_cannot_be_synced_is_done_without() {
    let folder = tempfile::tempdir().unwrap();
    let asked = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&asked);
    let settings = Settings {
        sync: Box::new(move |file| {
            if counted.fetch_add(1, Ordering::Relaxed) < 2 {
                return durable::sync_data(file);
            }
            Err(io::Error::other("the disk is failing"))
        }),
        ..Settings::default()
    };
    let local = open(folder.path()).with_journal(settings).unwrap();
    let stored = put_some(&local, 6).await;
    assert_eq!(asked.load(Ordering::Relaxed), 3);
    for (path, bytes) in &stored {
        assert_eq!(seen(&local, path).await.as_ref(), Some(bytes));
    }
    drop(local);
    for (path, bytes) in &stored {
        assert_eq!(read(folder.path(), path).as_ref(), Some(bytes));
    }
    assert!(journals(folder.path()).is_empty());
}

#[tokio::test]
async fn a_journal_stays_whose_objects_could_not_be_synced() {
    // a disk that lost what it could not write says so once: the next sync of the same file succeeds
    let folder = tempfile::tempdir().unwrap();
    let asked = AtomicUsize::new(0);
    let settings = Settings {
        sync_objects: Box::new(move |_, _| match asked.fetch_add(1, Ordering::Relaxed) {
            0 => Err(io::Error::other("the disk is failing")),
            _ => Ok(()),
        }),
        ..Settings::default()
    };
    let local = open(folder.path()).with_journal(settings).unwrap();
    let stored = put_some(&local, 3).await;
    for _ in 0..2 {
        assert!(local.settle().await.is_err());
    }
    drop(local);
    let cut = copy_of(folder.path());
    fs::write(cut.path().join(&stored[0].0), b"").unwrap();
    drop(open(cut.path()));
    for (path, bytes) in &stored {
        assert_eq!(read(cut.path(), path).as_ref(), Some(bytes));
    }
}

#[tokio::test]
async fn what_is_there_is_written_anew_before_its_journal_goes() {
    // it is there in memory: whether the disk has it, or has lost it, nobody can ask any more
    let folder = tempfile::tempdir().unwrap();
    let local = small(folder.path());
    let stored = put_some(&local, 1).await;
    name_all(&local);
    let cut = copy_of(folder.path());
    let inode = || fs::metadata(cut.path().join(&stored[0].0)).unwrap().ino();
    let before = inode();
    drop(open(cut.path()));
    assert_ne!(inode(), before);
    assert_eq!(read(cut.path(), &stored[0].0).as_ref(), Some(&stored[0].1));
}

#[test]
fn below_a_file_there_is_no_journal_to_be_afraid_of() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("file"), b"").unwrap();
    let error = Local::open(&folder.path().join("file/below"), true).unwrap_err();
    assert!(!error.to_string().contains("journal"), "{error}");
}

#[tokio::test]
async fn a_journal_begun_after_the_end_is_not_begun() {
    let folder = tempfile::tempdir().unwrap();
    let local = open(folder.path());
    local.settle().await.unwrap();
    put_some(&local, WITHOUT_JOURNAL + 3).await;
    assert!(!folder.path().join(JOURNALS).exists());
}

#[tokio::test]
async fn a_journal_that_somebody_removed_is_done_without() {
    // nobody would find it after a power cut
    let folder = tempfile::tempdir().unwrap();
    let local = small(folder.path());
    put_some(&local, 2).await;
    fs::remove_file(only_journal(folder.path())).unwrap();
    let other = object(&name(5), b"5");
    put(&local, &name(5), &other).await.unwrap();
    let scribe = local.scribe.get().unwrap().as_ref().unwrap();
    let appended = scribe.journal().append(&name(6), &Bytes::from_static(b"6"));
    assert_eq!(appended, journal::Appended::Refused);
    assert_eq!(read(folder.path(), &name(5)), Some(other));
}

#[tokio::test]
async fn what_root_puts_right_stays_its_owners() {
    // the stream, which is another user's, could not read it
    let folder = tempfile::tempdir().unwrap();
    let local = small(folder.path());
    let stored = put_some(&local, 1).await;
    let cut = copy_of(folder.path());
    let at = cut.path().join(&stored[0].0);
    let journal = only_journal(cut.path());
    let ours = fs::metadata(&journal).unwrap().uid();
    let owner = if ours == 0 { 12_345 } else { ours };
    std::os::unix::fs::chown(&journal, Some(owner), None).unwrap();
    drop(open(cut.path()));
    assert_eq!(fs::metadata(&at).unwrap().uid(), owner);
}

#[tokio::test]
async fn what_is_settled_leaves_nothing_behind() {
    let folder = tempfile::tempdir().unwrap();
    let local = small(folder.path());
    let stored = put_some(&local, 3).await;
    local.settle().await.unwrap();
    assert!(journals(folder.path()).is_empty());
    let staged = fs::read_dir(folder.path().join(STAGING)).unwrap().count();
    assert_eq!(staged, 0);
    put(&local, &name(3), b"x").await.unwrap();
    assert!(journals(folder.path()).is_empty());
    for (path, bytes) in &stored {
        assert_eq!(read(folder.path(), path).as_ref(), Some(bytes));
    }
}

#[tokio::test]
async fn a_journal_is_begun_once_it_is_worth_it() {
    let folder = tempfile::tempdir().unwrap();
    let local = open(folder.path());
    put_some(&local, WITHOUT_JOURNAL).await;
    assert!(local.scribe.get().is_none());
    assert!(!folder.path().join(JOURNALS).exists());
    // the one that it is begun for may find it begun
    put(&local, &name(WITHOUT_JOURNAL), b"x").await.unwrap();
    let begun = Instant::now();
    while local.scribe.get().is_none() {
        assert!(begun.elapsed() < Duration::from_mins(1), "it is not begun");
        tokio::task::yield_now().await;
    }
    let frames = || {
        let bytes = fs::read(only_journal(folder.path())).unwrap();
        let salt = salt_of(&only_journal(folder.path()));
        let found = frame::newest(salt, &bytes);
        let is_put = |frame: &&Frame<'_>| matches!(frame.note, Note::Put { .. });
        found.iter().filter(is_put).count()
    };
    let before = frames();
    assert!(before <= 1);
    put(&local, &name(WITHOUT_JOURNAL + 1), b"x").await.unwrap();
    assert_eq!(frames(), before + 1);
}

#[tokio::test]
async fn filled_again_and_again_it_still_holds_what_is_not_synced() {
    let folder = tempfile::tempdir().unwrap();
    let local = small(folder.path());
    let mut stored = Vec::new();
    for number in 0..600 {
        let plain: Vec<u8> = (0..900).map(|at| noise(at * 1000 + number)).collect();
        let (path, bytes) = (name(number), object(&name(number), &plain));
        put(&local, &path, &bytes).await.unwrap();
        stored.push((path, bytes));
        if number % 16 == 15 {
            // fifteen are superseded
            for (path, _) in stored.drain(stored.len() - 15..) {
                local.delete(&Path::from(path)).await.unwrap();
            }
        }
        if number % 50 == 0 {
            name_all(&local);
        }
    }
    let cut = copy_of(folder.path());
    let journal = only_journal(cut.path());
    let bytes = fs::read(&journal).unwrap();
    let (first, second) = bytes.split_at(bytes.len() / 2);
    let salt = salt_of(&journal);
    let frames = [frame::newest(salt, first), frame::newest(salt, second)].concat();
    assert!(
        frames.iter().any(|frame| frame.epoch > 2),
        "not filled again"
    );
    let synced: Vec<u64> = frames
        .iter()
        .filter_map(|frame| match frame.note {
            Note::Safe { epoch } => Some(epoch),
            _ => None,
        })
        .collect();
    let mut torn = 0;
    for frame in &frames {
        if let Note::Put { path, .. } = frame.note
            && !synced.contains(&frame.epoch)
            && fs::remove_file(cut.path().join(path)).is_ok()
        {
            torn += 1;
        }
    }
    assert!(torn > 0);
    let reopened = open(cut.path());
    let found: Vec<_> = reopened.list(None).try_collect().await.unwrap();
    let mut found: Vec<String> = found
        .into_iter()
        .map(|object: ObjectMeta| object.location.to_string())
        .collect();
    found.sort();
    let expected: Vec<String> = stored.iter().map(|(path, _)| path.clone()).collect();
    let missing: Vec<_> = expected
        .iter()
        .filter(|path| !found.contains(path))
        .collect();
    assert!(missing.is_empty(), "{missing:?}");
    found.retain(|path| !expected.contains(path));
    assert!(found.is_empty(), "came back: {found:?}");
    for (path, bytes) in &stored {
        assert_eq!(read(cut.path(), path).as_ref(), Some(bytes), "{path}");
    }
}

/// Two archivers of one cluster put the same, and each finds the other's in its place.
#[tokio::test]
async fn a_copy_of_another_writer_is_as_good() {
    let folder = tempfile::tempdir().unwrap();
    let local = open(folder.path())
        .with_journal(Settings::default())
        .unwrap();
    let ours = object(&name(0), b"the same");
    let header = Header::new("piece", &name(0), "main", "1");
    let nothing = serde_json::Map::new();
    let theirs = container::encode(&header, b"the same", nothing, 9, None).unwrap();
    put(&local, &name(0), &ours).await.unwrap();
    let at = folder.path().join(name(0));
    fs::create_dir_all(at.parent().unwrap()).unwrap();
    if let Err(error) = fs::write(&at, &theirs) {
        panic!("{error}");
    }
    local.settle().await.unwrap();
    assert!(journals(folder.path()).is_empty());
    assert_eq!(listed(&local).await, [name(0)]);
}

/// Two archivers of two primaries: the slower one's bytes must not come over the other's, and what was
/// acknowledged is not lost either.
#[tokio::test]
async fn another_writers_object_is_never_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let (ours, theirs) = (object(&name(0), b"ours"), object(&name(0), b"theirs"));
    // the other one is faster with its file
    let (at, other) = (folder.path().join(name(0)), theirs.clone());
    let settings = Settings {
        sync: Box::new(move |file| {
            durable::sync_data(file)?;
            fs::write(&at, &other)
        }),
        ..Settings::default()
    };
    let local = open(folder.path()).with_journal(settings).unwrap();
    put(&local, &name(0), &ours).await.unwrap();
    name_all(&local);
    // whoever reads finds theirs, and is told of two histories; superseded, ours alone would go
    assert_eq!(seen(&local, &name(0)).await.as_ref(), Some(&theirs));
    local.delete(&Path::from(name(0))).await.unwrap();
    assert_eq!(read(folder.path(), &name(0)), Some(theirs.clone()));
    local.settle().await.unwrap_err();
    let journal = only_journal(folder.path());
    assert_eq!(read(folder.path(), &name(0)), Some(theirs.clone()));
    drop(local);
    // and whoever opens it says so, and leaves both
    drop(open(folder.path()));
    let kept = only_journal(folder.path());
    assert_eq!(kept, journal.with_extension("conflict"));
    assert_eq!(read(folder.path(), &name(0)), Some(theirs));
    let bytes = fs::read(kept).unwrap();
    assert!(bytes.windows(ours.len()).any(|found| found == ours));
}

/// A second create of one name is no success, whichever way it goes.
#[tokio::test]
async fn what_has_no_file_yet_is_there_all_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let settings = Settings {
        half_bytes: 1 << 20,
        ..Settings::default()
    };
    let local = open(folder.path()).with_journal(settings).unwrap();
    let path = name(0);
    put(&local, &path, b"0123456789").await.unwrap();
    let again = put(&local, &path, b"other").await;
    assert!(
        matches!(again, Err(Error::AlreadyExists { .. })),
        "{again:?}"
    );
    let options = PutOptions::from(PutMode::Create);
    let at = Path::from(path.as_str());
    let plainly = local.put_opts(&at, PutPayload::from_static(b"other"), options);
    let plainly = plainly.await;
    assert!(
        matches!(plainly, Err(Error::AlreadyExists { .. })),
        "{plainly:?}"
    );
    // once with a journal alone, once with a file
    for _ in 0..2 {
        assert_eq!(seen(&local, &path).await.unwrap(), b"0123456789");
        let ranges = [2..5, 0..1];
        let ranges = local.get_ranges(&at, &ranges).await.unwrap();
        assert_eq!(
            ranges,
            [Bytes::from_static(b"234"), Bytes::from_static(b"0")]
        );
        assert_eq!(local.head(&at).await.unwrap().size, 10);
        let found: Vec<ObjectMeta> = local.list(None).try_collect().await.unwrap();
        assert_eq!((found.len(), found[0].size), (1, 10));
        // a prefix is a folder, not the beginning of a name, nor an object
        for (prefix, count) in [("main/1", 1), ("main/1/wa", 0), (path.as_str(), 0)] {
            let prefix = Path::from(prefix);
            let found: Vec<ObjectMeta> = local.list(Some(&prefix)).try_collect().await.unwrap();
            assert_eq!(found.len(), count, "{prefix}");
        }
        name_all(&local);
    }
    local.delete(&at).await.unwrap();
    assert!(listed(&local).await.is_empty());
}

/// Thousands come in a second, and nearly all of them are superseded before they need a file.
#[tokio::test]
async fn what_is_removed_in_time_never_was_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let local = small(folder.path());
    let stored = put_some(&local, 10).await;
    let gone: Vec<Result<Path>> = stored[..9]
        .iter()
        .map(|(path, _)| Ok(Path::from(path.as_str())))
        .collect();
    let gone: Vec<_> = local
        .delete_stream(stream::iter(gone).boxed())
        .try_collect()
        .await
        .unwrap();
    assert_eq!(gone.len(), 9);
    assert_eq!(listed(&local).await, [name(9)]);
    name_all(&local);
    let files = fs::read_dir(folder.path().join("main/1/wal")).unwrap();
    assert_eq!(files.count(), 1);
    // nor does it come back
    let cut = copy_of(folder.path());
    drop(open(cut.path()));
    let files = fs::read_dir(cut.path().join("main/1/wal")).unwrap();
    assert_eq!(files.count(), 1);
}

/// A restore on the same machine, while the server's disk is gone and the stream does not answer.
#[tokio::test]
async fn others_see_what_a_living_writer_has_acknowledged() {
    let folder = tempfile::tempdir().unwrap();
    let local = small(folder.path());
    let reader = Local::open(folder.path(), false).unwrap();
    let mut expected = Vec::new();
    for (number, (path, bytes)) in put_some(&local, 30).await.into_iter().enumerate() {
        if number == 10 {
            name_all(&local);
        }
        expected.push((path, bytes));
    }
    for (path, _) in expected.drain(5..12) {
        local.delete(&Path::from(path)).await.unwrap();
    }
    let names: Vec<String> = expected.iter().map(|(path, _)| path.clone()).collect();
    assert_eq!(listed(&reader).await, names);
    for (path, bytes) in &expected {
        assert_eq!(seen(&reader, path).await.as_ref(), Some(bytes), "{path}");
    }
    // what leaves the journal after it was listed is read all the same
    name_all(&local);
    for (path, bytes) in &expected {
        assert_eq!(seen(&reader, path).await.as_ref(), Some(bytes), "{path}");
    }
    assert_eq!(listed(&reader).await, names);
}

/// Filled again and again by a writer that lives: whatever moment others look at, nothing that was
/// acknowledged is missing.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn others_miss_nothing_while_halves_are_filled_again() {
    let folder = tempfile::tempdir().unwrap();
    let local = small(folder.path());
    let reader = Local::open(folder.path(), false).unwrap();
    let (told, mut acknowledged) = tokio::sync::watch::channel(0_usize);
    let writer = tokio::spawn(async move {
        for number in 0..1500 {
            let plain: Vec<u8> = (0..700).map(|at| noise(at * 1000 + number)).collect();
            let bytes = object(&name(number), &plain);
            put(&local, &name(number), &bytes).await.unwrap();
            told.send(number + 1).unwrap();
        }
        local
    });
    let mut looks = 0;
    while acknowledged.changed().await.is_ok() {
        let count = *acknowledged.borrow();
        let found = listed(&reader).await;
        let missing: Vec<String> = (0..count)
            .map(name)
            .filter(|name| found.binary_search(name).is_err())
            .collect();
        assert!(missing.is_empty(), "of {count}: {missing:?}");
        looks += 1;
    }
    assert!(looks > 5, "{looks} looks");
    let local = writer.await.unwrap();
    let frames = fs::read(only_journal(folder.path())).unwrap();
    let found = frame::newest(salt_of(&only_journal(folder.path())), &frames);
    assert!(found[0].epoch > 4, "not filled again: {}", found[0].epoch);
    drop(local);
}

/// Others look at journals first and at files then: whoever stores an object to remove what it covers finds
/// it in the journal, perhaps, where an answer was lost.
#[tokio::test]
async fn what_is_stored_again_to_stay_has_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let local = small(folder.path());
    let (path, bytes) = put_some(&local, 1).await.remove(0);
    let again = local
        .put_opts(
            &Path::from(path.as_str()),
            PutPayload::from(bytes.clone()),
            PutMode::Create.into(),
        )
        .await;
    assert!(
        matches!(again, Err(Error::AlreadyExists { .. })),
        "{again:?}"
    );
    assert_eq!(read(folder.path(), &path), Some(bytes));
}

/// A folder that was away for a moment, just after the sync: what is durable may have its file by now,
/// and whoever puts it again takes that for stored.
#[tokio::test]
async fn what_is_durable_is_not_withdrawn() {
    let folder = tempfile::tempdir().unwrap();
    let local = small(folder.path());
    let (path, bytes) = put_some(&local, 1).await.remove(0);
    local.journal().unwrap().withdraw(&path, 1);
    assert_eq!(seen(&local, &path).await.as_ref(), Some(&bytes));
    let again = put(&local, &path, &bytes).await;
    assert!(
        matches!(again, Err(Error::AlreadyExists { .. })),
        "{again:?}"
    );
    name_all(&local);
    assert_eq!(read(folder.path(), &path), Some(bytes));
}

/// What is under a name may be no object at all: what was acknowledged is kept beside it.
#[tokio::test]
async fn what_lies_in_the_way_costs_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let local = small(folder.path());
    let stored = put_some(&local, 1).await;
    let at = folder.path().join(&stored[0].0);
    fs::create_dir_all(&at).unwrap();
    name_all(&local);
    drop(local);
    drop(open(folder.path()));
    let kept = fs::read(only_journal(folder.path())).unwrap();
    let ours = &stored[0].1;
    assert!(kept.windows(ours.len()).any(|found| found == ours));
    assert!(at.is_dir());
}

/// Whoever may not write reads from the journal of a writer that was killed.
#[tokio::test]
async fn a_reader_that_may_not_write_sees_what_a_killed_writer_acknowledged() {
    let folder = tempfile::tempdir().unwrap();
    let local = small(folder.path());
    let stored = put_some(&local, 3).await;
    let cut = copy_of(folder.path());
    let left = replay::nameless_in(cut.path(), None).unwrap();
    let expected: HashMap<String, Bytes> = stored
        .iter()
        .map(|(path, bytes)| (path.clone(), Bytes::from(bytes.clone())))
        .collect();
    assert_eq!(left, expected);
    assert_eq!(
        replay::nameless_in(cut.path(), Some(&only_journal(cut.path()))).unwrap(),
        HashMap::new()
    );
}

/// The folder is mounted over, or the disk is full: what was acknowledged stays where it is, and is read
/// from there.
#[tokio::test]
async fn what_gets_no_file_stays_in_the_journal_and_is_read_there() {
    let folder = tempfile::tempdir().unwrap();
    let local = small(folder.path());
    let stored = put_some(&local, 3).await;
    let staging = folder.path().join(STAGING);
    fs::remove_dir_all(&staging).unwrap();
    fs::write(&staging, b"").unwrap();
    let journal = local.journal().unwrap();
    journal.name(Duration::ZERO, usize::MAX);
    assert!(journal.has_nameless());
    local.settle().await.unwrap_err();
    for (path, bytes) in &stored {
        assert_eq!(seen(&local, path).await.as_ref(), Some(bytes));
        assert_eq!(read(folder.path(), path), None);
    }
    fs::remove_file(&staging).unwrap();
    local.settle().await.unwrap();
    for (path, bytes) in &stored {
        assert_eq!(read(folder.path(), path).as_ref(), Some(bytes));
    }
    assert!(journals(folder.path()).is_empty());
}

#[tokio::test]
async fn a_whole_object_of_another_is_kept_and_a_torn_one_of_ours_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let local = small(folder.path());
    let ours = object(&name(0), b"our bytes, some more than theirs");
    let theirs = object(&name(0), b"theirs");
    put(&local, &name(0), &ours).await.unwrap();
    name_all(&local);
    let there_then = |there: &[u8]| {
        let cut = copy_of(folder.path());
        fs::write(cut.path().join(name(0)), there).unwrap();
        drop(open(cut.path()));
        read(cut.path(), &name(0)).unwrap()
    };
    assert_eq!(there_then(&theirs), theirs);
    // what the journal alone has is kept for whoever has to choose
    let cut = copy_of(folder.path());
    fs::write(cut.path().join(name(0)), &theirs).unwrap();
    drop(open(cut.path()));
    let left = fs::read_dir(cut.path().join(JOURNALS)).unwrap();
    let left: Vec<_> = left.map(|entry| entry.unwrap().path()).collect();
    assert!(
        left.iter()
            .any(|path| path.extension().is_some_and(|it| it == "conflict")),
        "{left:?}"
    );
    drop(open(cut.path()));
    assert_eq!(there_then(&theirs[..theirs.len() - 1]), ours);
    assert_eq!(there_then(&ours[..ours.len() - 1]), ours);
}

#[tokio::test]
async fn what_was_removed_does_not_come_back() {
    let folder = tempfile::tempdir().unwrap();
    let local = small(folder.path());
    let stored = put_some(&local, 3).await;
    let (removed, bytes) = &stored[0];
    name_all(&local);
    local.delete(&Path::from(removed.as_str())).await.unwrap();
    let cut = copy_of(folder.path());
    drop(open(cut.path()));
    assert_eq!(read(cut.path(), removed), None);
    // its removal was not durable, nor were its bytes
    let cut = copy_of(folder.path());
    fs::write(cut.path().join(removed), &bytes[..50]).unwrap();
    drop(open(cut.path()));
    assert_eq!(read(cut.path(), removed), None);
    assert!(read(cut.path(), &stored[1].0).is_some());
    // put again, it is an object like any other
    put(&local, removed, bytes).await.unwrap();
    let cut = copy_of(folder.path());
    drop(open(cut.path()));
    assert_eq!(read(cut.path(), removed).as_ref(), Some(bytes));
}

#[tokio::test]
async fn a_journal_belongs_to_whoever_writes_it() {
    let folder = tempfile::tempdir().unwrap();
    let local = small(folder.path());
    let stored = put_some(&local, 3).await;
    // one that reads, and one that writes besides
    let reader = Local::open(folder.path(), false).unwrap();
    let other = small(folder.path());
    put(&other, "main/1/wal/other", b"x").await.unwrap();
    assert_eq!(journals(folder.path()).len(), 2);
    let listed: Vec<_> = reader.list(None).try_collect().await.unwrap();
    assert_eq!(listed.len(), 4, "{listed:?}");
    let folders = reader.list_with_delimiter(None).await.unwrap();
    assert_eq!(folders.common_prefixes, [Path::from("main")]);
    drop(other);
    only_journal(folder.path());
    drop(local);
    assert!(journals(folder.path()).is_empty());
    for (path, bytes) in &stored {
        assert_eq!(read(folder.path(), path).as_ref(), Some(bytes));
    }
}

#[tokio::test]
async fn many_may_open_at_once_what_a_power_cut_left() {
    let folder = tempfile::tempdir().unwrap();
    let local = small(folder.path());
    let stored = put_some(&local, 20).await;
    let cut = copy_of(folder.path());
    fs::remove_dir_all(cut.path().join("main")).ok();
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let _opened = Local::open(cut.path(), false).unwrap();
                for (path, bytes) in &stored {
                    assert_eq!(read(cut.path(), path).as_ref(), Some(bytes), "{path}");
                }
            });
        }
    });
}

#[tokio::test]
async fn what_cannot_be_put_right_is_not_read() {
    // a folder that takes no writes: what is torn in it would be read as it is
    let folder = tempfile::tempdir().unwrap();
    let local = small(folder.path());
    let stored = put_some(&local, 2).await;
    name_all(&local);
    let cut = copy_of(folder.path());
    fs::write(cut.path().join(&stored[0].0), b"").unwrap();
    fs::remove_dir_all(cut.path().join(STAGING)).unwrap();
    fs::write(cut.path().join(STAGING), b"").unwrap();
    let refused = Local::open(cut.path(), false).unwrap_err();
    assert!(refused.to_string().contains("played back"), "{refused}");
    only_journal(cut.path());
    fs::remove_file(cut.path().join(STAGING)).unwrap();
    drop(Local::open(cut.path(), false).unwrap());
    assert_eq!(read(cut.path(), &stored[0].0).as_ref(), Some(&stored[0].1));
}

#[test]
fn a_journal_of_a_later_version_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join(JOURNALS)).unwrap();
    let later = folder.path().join(JOURNALS).join("3-00000000000000ff");
    fs::write(later, b"who knows").unwrap();
    let refused = Local::open(folder.path(), false).unwrap_err();
    assert!(refused.to_string().contains("upgrade anywhen"), "{refused}");
}

#[test]
fn a_hostile_journal_writes_nowhere_but_in_the_folder() {
    let outside = tempfile::tempdir().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("repository");
    fs::create_dir_all(root.join(JOURNALS)).unwrap();
    fs::create_dir(root.join("main")).unwrap();
    symlink(outside.path(), root.join("main/link")).unwrap();
    symlink(outside.path().join("made"), root.join("main/dangling")).unwrap();
    let absolute = outside.path().join("x").display().to_string();
    let paths = [
        "../x",
        "main/../../x",
        "main/link/x",
        "main/link/deep/x",
        "main/dangling",
        "main//x",
        "./x",
        "",
        "main",
        ".journal/x",
        ".staging/x",
        absolute.as_str(),
        "main/good",
    ];
    let mut journal = Vec::new();
    for (number, path) in paths.into_iter().enumerate() {
        let frame = Frame {
            epoch: 1,
            sequence: u64::try_from(number).unwrap(),
            durable: u64::MAX,
            note: Note::Put { path, object: b"x" },
        };
        journal.extend(frame.encode(5).unwrap());
    }
    journal.resize(journal.len() * 2, 0xA5);
    fs::write(root.join(JOURNALS).join(journal::name(5)), journal).unwrap();
    drop(open(&root));
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    assert_eq!(read(&root, "main/good").unwrap(), b"x");
    let listed = fs::read_dir(root.join("main")).unwrap().count();
    assert_eq!(listed, 3);
}

#[tokio::test]
async fn what_is_large_or_leads_elsewhere_needs_no_journal() {
    let elsewhere = tempfile::tempdir().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let local = small(folder.path());
    let large = vec![7; OBJECT_BYTES_MAX + 1];
    put(&local, "main/large", &large).await.unwrap();
    symlink(elsewhere.path(), folder.path().join("link")).unwrap();
    put(&local, "link/x", b"x").await.unwrap();
    put(&local, "main/small", b"small").await.unwrap();
    let bytes = fs::read(only_journal(folder.path())).unwrap();
    let found = frame::newest(salt_of(&only_journal(folder.path())), &bytes);
    let put = |frame: &Frame<'_>| match frame.note {
        Note::Put { path, .. } => Some(path.to_owned()),
        _ => None,
    };
    let found: Vec<String> = found.iter().filter_map(put).collect();
    assert_eq!(found, ["main/small"]);
    assert_eq!(read(folder.path(), "main/large"), Some(large));
    assert_eq!(read(elsewhere.path(), "x").unwrap(), b"x");
}

#[test]
fn no_bytes_make_it_panic() {
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join(JOURNALS)).unwrap();
    let note = Note::Put {
        path: "main/x",
        object: b"some bytes",
    };
    let frame = Frame {
        epoch: 1,
        sequence: 0,
        durable: 0,
        note,
    };
    let sound = frame.encode(1).unwrap().repeat(6);
    for length in 0..300 {
        let mut bytes = sound[..length].to_vec();
        for byte in &mut bytes {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            if state >> 60 == 0 {
                *byte = (state >> 32).to_le_bytes()[0];
            }
        }
        let journal = folder.path().join(JOURNALS).join(journal::name(1));
        fs::write(journal, &bytes).unwrap();
        drop(open(folder.path()));
        assert!(journals(folder.path()).is_empty());
    }
}
