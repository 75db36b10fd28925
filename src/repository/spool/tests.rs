//! The claims of this module, between folders.

use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use wal::{Lsn, SegmentName, SegmentSize, TimelineId, Verifier, WalRange, WalkerStart};

use super::*;
use crate::clock::SystemClock;
use crate::repository::destination::Destination;
use crate::repository::keys::NewIdentity;
use crate::repository::{Drained, EncodedWal, Stored};

const MIB: u64 = 1 << 20;
const SYSTEM: u64 = 7;

/// A repository and a spool beside each other.
struct Stage {
    folder: tempfile::TempDir,
    recipients: Vec<String>,
    identity_file: Option<PathBuf>,
    bytes_max: u64,
}

impl Stage {
    fn new() -> Self {
        Self {
            folder: tempfile::tempdir().unwrap(),
            recipients: Vec::new(),
            identity_file: None,
            bytes_max: SPOOL_BYTES_MAX,
        }
    }

    fn at(&self, path: &str) -> PathBuf {
        self.folder.path().join(path)
    }

    fn settings(&self, dir: &str) -> SpoolSettings {
        SpoolSettings {
            dir: self.at(dir),
            bytes_max: self.bytes_max,
            acknowledges: false,
        }
    }

    async fn repository(&self) -> Repository {
        let mut destination = Destination::local(&self.at("repository"), "main");
        let encryption = &mut destination.places[0].encryption;
        encryption.recipients.clone_from(&self.recipients);
        encryption.identity_file.clone_from(&self.identity_file);
        let clock: Arc<dyn Clock> = Arc::new(SystemClock);
        let open = destination.open(true, &clock).unwrap();
        open.repository(identity(), false).await.unwrap()
    }

    async fn open(&self, repository: &Repository, dir: &str) -> Result<Arc<Spool>> {
        let clock = Arc::new(SystemClock);
        Spool::open(&self.settings(dir), repository, identity(), clock).await
    }

    async fn spool(&self, repository: &Repository) -> Arc<Spool> {
        self.open(repository, "spool").await.unwrap()
    }

    fn spooled_file(&self, name: &ObjectName) -> PathBuf {
        self.at(&format!("spool/main/{SYSTEM}/{}", name.path()))
    }

    fn stored_file(&self, name: &ObjectName) -> PathBuf {
        self.at(&format!("repository/main/{SYSTEM}/{}", name.path()))
    }

    /// An outage: the folder is not there.
    fn set_reachable(&self, reachable: bool) {
        let (here, aside) = (self.at("repository"), self.at("aside"));
        if reachable {
            durable::rename(&aside, &here).unwrap();
        } else {
            durable::rename(&here, &aside).unwrap();
        }
    }
}

fn identity() -> ServerIdentity {
    ServerIdentity {
        system_id: SYSTEM,
        major: 18,
        block_bytes: 8192,
    }
}

fn size() -> SegmentSize {
    SegmentSize::from_bytes(MIB).unwrap()
}

fn timeline(id: u32) -> TimelineId {
    TimelineId::new(id).unwrap()
}

fn segment(id: u32, number: u64) -> SegmentName {
    SegmentName::of(timeline(id), Lsn::new(number * MIB), size())
}

/// The bytes of a segment; `seed` tells histories apart.
fn content(number: u64, seed: u8) -> Vec<u8> {
    let bytes = (0..MIB).map(|at| (at * 7 + at / 253 + number).to_le_bytes()[0] ^ seed);
    bytes.collect()
}

/// A stretch of a segment, the whole of it where it ends at its end.
fn wal_of(
    repository: &Repository,
    (id, number): (u32, u64),
    (from, to): (u64, u64),
    seed: u8,
) -> Arc<EncodedWal> {
    let start = Lsn::new(number * MIB);
    let range = WalRange {
        start: start.saturating_add(from),
        end: start.saturating_add(to),
    };
    let segment = segment(id, number);
    let name = if (from, to) == (0, MIB) {
        ObjectName::Segment(segment)
    } else {
        ObjectName::Piece { segment, range }
    };
    let at = |offset: u64| usize::try_from(offset).unwrap();
    let bytes = content(number, seed)[at(from)..at(to)].to_vec();
    let verifier = Verifier::new(WalkerStart {
        at: range.start,
        segment_size: size(),
        major: None,
        timeline: timeline(id),
        system_id: None,
        skip_to: None,
    });
    let checked = verifier.check(range, bytes);
    repository.take_wal(name, timeline(id), size(), checked, true)
}

/// An object as a writer that digested other bytes would have left it: its stored bytes are whole.
fn with_another_digest(object: &[u8]) -> Vec<u8> {
    let mut object = object.to_vec();
    let tail = object.len() - 16;
    let length = u32::from_le_bytes(object[tail..tail + 4].try_into().unwrap());
    let json = tail - usize::try_from(length).unwrap()..tail;
    let text = String::from_utf8(object[json.clone()].to_vec()).unwrap();
    let (before, digest) = text.split_once("blake3:").unwrap();
    let other = if digest.starts_with('0') { "1" } else { "0" };
    let text = format!("{before}blake3:{other}{}", &digest[1..]);
    object[json].copy_from_slice(text.as_bytes());
    let sum = crc32(text.as_bytes()).to_le_bytes();
    object[tail + 4..tail + 8].copy_from_slice(&sum);
    object
}

/// CRC-32 (IEEE 802.3), bit by bit.
fn crc32(bytes: &[u8]) -> u32 {
    let mut register = u32::MAX;
    for byte in bytes {
        register ^= u32::from(*byte);
        for _ in 0..8 {
            let carried = register & 1 == 1;
            register >>= 1;
            if carried {
                register ^= 0xEDB8_8320;
            }
        }
    }
    !register
}

async fn put(spool: &Arc<Spool>, wal: &Arc<EncodedWal>) -> SpoolPut {
    spool.put(wal).await.unwrap()
}

/// Drains, and gives the names of what left or was lost.
async fn drain(spool: &Spool, repository: &Repository) -> Result<(bool, Vec<Drained>)> {
    let mut told = Vec::new();
    let emptied = spool
        .drain(repository, |drained| told.push(drained))
        .await?;
    Ok((emptied, told))
}

fn stored(name: &ObjectName) -> Drained {
    Drained::Stored(name.clone(), Stored::Everywhere)
}

/// A history that comes after the WAL of its timeline leaves WAL that no branch leads to.
#[tokio::test]
async fn leaves_in_order_and_whole() {
    let stage = Stage::new();
    let repository = stage.repository().await;
    let spool = stage.spool(&repository).await;
    let mut expected = Vec::new();
    for (of, stretch) in [
        ((1, 2), (0, MIB)),
        ((1, 3), (0, MIB)),
        ((1, 4), (0, 100)),
        ((1, 4), (100, 300)),
        ((2, 4), (0, MIB)),
    ] {
        expected.push(wal_of(&repository, of, stretch, 0));
    }
    for wal in expected.iter().rev() {
        assert_eq!(put(&spool, wal).await, SpoolPut::Stored);
    }
    let history = ObjectName::History(timeline(2));
    let plain = Bytes::from_static(b"1\t0/480000\tno recovery target\n");
    let written = spool.put_file(&history, plain).await.unwrap();
    assert_eq!((written, spool.objects()), (SpoolPut::Stored, 6));
    // another process finds what this one left
    drop(spool);
    let spool = stage.spool(&repository).await;
    assert_eq!(spool.objects(), 6);

    let (emptied, told) = drain(&spool, &repository).await.unwrap();
    let mut names = vec![stored(&history)];
    names.extend(expected.iter().map(|wal| stored(&wal.name)));
    assert!(emptied);
    assert_eq!(told, names);
    assert_eq!((spool.objects(), spool.bytes()), (0, 0));
    for wal in &expected {
        let fetched = repository.fetch(&wal.name).await.unwrap();
        assert_eq!(fetched.plain, wal.checked.bytes());
        assert!(!stage.spooled_file(&wal.name).exists());
    }
}

/// Invariant 5: nothing leaves before it is acknowledged elsewhere.
#[tokio::test]
async fn keeps_everything_while_the_repository_is_away() {
    let stage = Stage::new();
    let repository = stage.repository().await;
    let spool = stage.spool(&repository).await;
    let wal = wal_of(&repository, (1, 2), (0, MIB), 0);
    put(&spool, &wal).await;
    spool.repository_is_away();
    stage.set_reachable(false);
    let error = drain(&spool, &repository).await.unwrap_err();
    assert!(error.is_unreachable(), "{error}");
    assert!(stage.spooled_file(&wal.name).exists() && spool.is_repository_away());
    stage.set_reachable(true);
    assert!(drain(&spool, &repository).await.unwrap().0);
    assert!(stage.stored_file(&wal.name).exists() && !spool.is_repository_away());
}

/// Where both must hold what is acknowledged, one alone is not enough to forget it here.
#[tokio::test]
async fn keeps_what_one_of_two_repositories_lacks_until_that_is_filled_up() {
    let stage = Stage::new();
    let mut destination = Destination::local(&stage.at("repository"), "main");
    let mut second = Destination::local(&stage.at("second"), "main").places;
    second[0].name = "second".to_owned();
    destination.places.append(&mut second);
    let clock: Arc<dyn Clock> = Arc::new(SystemClock);
    let open = destination.open(true, &clock).unwrap();
    let repository = open.repository(identity(), false).await.unwrap();
    assert!(repository.mend(true).await);
    let spool = stage.spool(&repository).await;
    let wal = wal_of(&repository, (1, 2), (0, MIB), 0);
    put(&spool, &wal).await;
    stage.set_reachable(false);
    let partly = Drained::Stored(wal.name.clone(), Stored::Partly);
    let drained = drain(&spool, &repository).await.unwrap();
    assert_eq!(drained, (false, vec![partly]));
    // not asked for again and again
    assert_eq!(drain(&spool, &repository).await.unwrap(), (false, vec![]));
    assert!(stage.spooled_file(&wal.name).exists());
    stage.set_reachable(true);
    assert!(repository.mend(true).await);
    let drained = drain(&spool, &repository).await.unwrap();
    assert_eq!(drained, (true, vec![stored(&wal.name)]));
    assert!(stage.stored_file(&wal.name).exists());
    assert!(!stage.spooled_file(&wal.name).exists());
}

/// A spool that dropped what it has no room for would lose WAL that was acknowledged.
#[tokio::test]
async fn takes_nothing_more_than_it_may_hold_and_keeps_what_it_has() {
    let mut stage = Stage::new();
    stage.bytes_max = 3000;
    let repository = stage.repository().await;
    let spool = stage.spool(&repository).await;
    let mut taken = Vec::new();
    for number in 2..12 {
        let wal = wal_of(&repository, (1, number), (0, 300), 0);
        if put(&spool, &wal).await == SpoolPut::Stored {
            taken.push(wal);
        }
    }
    assert!((1..10).contains(&taken.len()), "{}", taken.len());
    let on_disk = |wal: &Arc<EncodedWal>| {
        let file = stage.spooled_file(&wal.name);
        std::fs::metadata(file).unwrap().len()
    };
    let bytes: u64 = taken.iter().map(on_disk).sum();
    assert_eq!((spool.bytes(), spool.objects()), (bytes, taken.len()));
    assert!(bytes <= 3000);
    // what is there already needs no room
    assert_eq!(put(&spool, &taken[0]).await, SpoolPut::Stored);
    assert_eq!(spool.bytes(), bytes);
    assert!(drain(&spool, &repository).await.unwrap().0);
    let wal = wal_of(&repository, (1, 20), (0, 300), 0);
    assert_eq!(put(&spool, &wal).await, SpoolPut::Stored);
}

/// Two streams would take away from each other what they told their servers is stored.
#[tokio::test]
async fn refuses_a_spool_that_another_process_holds() {
    let stage = Stage::new();
    let repository = stage.repository().await;
    let spool = stage.spool(&repository).await;
    let error = stage.open(&repository, "spool").await.unwrap_err();
    assert!(
        matches!(error, RepositoryError::SpoolHeld { .. }),
        "{error}"
    );
    drop(spool);
    stage.open(&repository, "spool").await.unwrap();
}

/// It would be emptied into itself: each object acknowledged by itself, and removed.
#[tokio::test]
async fn refuses_a_folder_that_is_the_repositorys() {
    let stage = Stage::new();
    let repository = stage.repository().await;
    let wal = wal_of(&repository, (1, 2), (0, MIB), 0);
    repository.put_wal(&wal).await.unwrap();
    let refused = |error: RepositoryError| {
        let is_refused = matches!(error, RepositoryError::SpoolInRepository { .. });
        assert!(is_refused, "{error}");
    };
    refused(stage.open(&repository, "repository").await.unwrap_err());
    let within = stage.open(&repository, "repository/spool").await;
    refused(within.unwrap_err());
    assert!(!stage.at("repository/spool").exists());
    std::os::unix::fs::symlink(stage.at("repository"), stage.at("link")).unwrap();
    refused(stage.open(&repository, "link").await.unwrap_err());
    // also where it was a spool before it was a repository
    std::fs::write(stage.at("repository/main").join(LOCK), "").unwrap();
    refused(stage.open(&repository, "repository").await.unwrap_err());
    assert!(stage.stored_file(&wal.name).exists());
}

/// Invariant 4: another history under the same name is never overwritten, and never dropped.
#[tokio::test]
async fn stops_at_other_bytes_and_names_both() {
    let stage = Stage::new();
    let repository = stage.repository().await;
    let spool = stage.spool(&repository).await;
    let theirs = wal_of(&repository, (1, 2), (0, MIB), 1);
    repository.put_wal(&theirs).await.unwrap();
    let ours = wal_of(&repository, (1, 2), (0, MIB), 0);
    put(&spool, &ours).await;
    let error = drain(&spool, &repository).await.unwrap_err();
    assert!(!error.is_unreachable());
    let said = error.to_string();
    let path = format!("{SYSTEM}/{}", ours.name.path());
    for folder in ["spool", "repository"] {
        assert!(said.contains(&format!("{folder}/main/{path}")), "{said}");
    }
    assert!(stage.spooled_file(&ours.name).exists());
    let kept = repository.fetch(&ours.name).await.unwrap();
    assert_eq!(kept.plain, theirs.checked.bytes());
}

/// One damaged object must not hold up all that follows, nor reach the repository.
#[tokio::test]
async fn puts_a_damaged_object_aside_and_lets_the_rest_leave() {
    let stage = Stage::new();
    let repository = stage.repository().await;
    let spool = stage.spool(&repository).await;
    let bad = wal_of(&repository, (1, 2), (0, MIB), 0);
    let gone = wal_of(&repository, (1, 3), (0, MIB), 0);
    let good = wal_of(&repository, (1, 4), (0, MIB), 0);
    for wal in [&bad, &gone, &good] {
        put(&spool, wal).await;
    }
    let file = stage.spooled_file(&bad.name);
    let mut bytes = std::fs::read(&file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&file, &bytes).unwrap();
    std::fs::remove_file(stage.spooled_file(&gone.name)).unwrap();

    let (emptied, told) = drain(&spool, &repository).await.unwrap();
    assert!(emptied);
    let expected = [
        Drained::Lost(bad.name.clone()),
        Drained::Lost(gone.name.clone()),
        stored(&good.name),
    ];
    assert_eq!(told, expected);
    let aside = stage.at(&format!("spool/main/{SYSTEM}/damaged/{}", bad.name.path()));
    assert_eq!(std::fs::read(aside).unwrap(), bytes);
    assert!(!stage.stored_file(&bad.name).exists());
    // nobody may take it for stored, until it was received again
    assert!(spool.holds(segment(1, 2), bad.checked.range()));
    assert_eq!((spool.objects(), spool.bytes()), (0, 0));
    put(&spool, &bad).await;
    assert_eq!(
        drain(&spool, &repository).await.unwrap().1,
        [stored(&bad.name)]
    );
    assert!(!spool.holds(segment(1, 2), bad.checked.range()));
}

/// A crash between the copy and the removal: the copy is found equal, and nothing is there twice.
#[tokio::test]
async fn what_was_copied_and_not_removed_is_removed_when_it_is_begun_anew() {
    let stage = Stage::new();
    let repository = stage.repository().await;
    let spool = stage.spool(&repository).await;
    let wal = wal_of(&repository, (1, 2), (0, MIB), 0);
    let later = wal_of(&repository, (1, 3), (0, 500), 0);
    put(&spool, &wal).await;
    put(&spool, &later).await;
    let spooled = std::fs::read(stage.spooled_file(&wal.name)).unwrap();
    drain(&spool, &repository).await.unwrap();
    let copied = std::fs::read(stage.stored_file(&wal.name)).unwrap();
    drop(spool);
    std::fs::write(stage.spooled_file(&wal.name), spooled).unwrap();

    let spool = stage.spool(&repository).await;
    assert_eq!(spool.names(), std::slice::from_ref(&wal.name));
    assert!(drain(&spool, &repository).await.unwrap().0);
    assert!(!stage.spooled_file(&wal.name).exists());
    assert_eq!(std::fs::read(stage.stored_file(&wal.name)).unwrap(), copied);
}

/// An outage of hours leaves a piece a second; only the segments need be uploaded.
#[tokio::test]
async fn a_segment_takes_the_place_of_its_pieces() {
    let stage = Stage::new();
    let repository = stage.repository().await;
    let spool = stage.spool(&repository).await;
    let before = wal_of(&repository, (1, 2), (0, 100), 0);
    repository.put_wal(&before).await.unwrap();
    for stretch in [(100, 200), (200, 400)] {
        let piece = wal_of(&repository, (1, 2), stretch, 0);
        put(&spool, &piece).await;
    }
    let other = wal_of(&repository, (1, 3), (0, 100), 0);
    put(&spool, &other).await;
    let whole = wal_of(&repository, (1, 2), (0, MIB), 0);
    put(&spool, &whole).await;
    assert_eq!(spool.names(), [whole.name.clone(), other.name.clone()]);
    assert!(spool.holds(segment(1, 2), before.checked.range()));
    drain(&spool, &repository).await.unwrap();
    // the piece that was in the repository before gives way too
    assert!(!stage.stored_file(&before.name).exists());
    assert!(stage.stored_file(&whole.name).exists());

    // a segment that found the repository there again makes spooled pieces superfluous
    let piece = wal_of(&repository, (1, 4), (0, 100), 0);
    put(&spool, &piece).await;
    let whole = wal_of(&repository, (1, 4), (0, MIB), 0);
    repository.put_wal(&whole).await.unwrap();
    spool.remove_superseded_pieces(&whole).await.unwrap();
    assert_eq!(spool.objects(), 0);
    let differs = wal_of(&repository, (1, 4), (0, 100), 1);
    put(&spool, &differs).await;
    let error = spool.remove_superseded_pieces(&whole).await.unwrap_err();
    assert!(matches!(error, RepositoryError::Conflict { .. }), "{error}");
    assert_eq!(spool.objects(), 1);
}

/// What was written wrongly has checksums that fit: the stream would stop at it for ever, with the repository
/// taking it for the WAL that it is named after.
#[tokio::test]
async fn an_object_that_does_not_decode_is_put_aside_before_the_repository_has_any_of_it() {
    let stage = Stage::new();
    let repository = stage.repository().await;
    let spool = stage.spool(&repository).await;
    let bad = wal_of(&repository, (1, 2), (0, MIB), 0);
    let good = wal_of(&repository, (1, 3), (0, MIB), 0);
    for wal in [&bad, &good] {
        put(&spool, wal).await;
    }
    let file = stage.spooled_file(&bad.name);
    let bytes = with_another_digest(&std::fs::read(&file).unwrap());
    container::check_stored(&bytes).unwrap();
    std::fs::write(&file, &bytes).unwrap();

    let (emptied, told) = drain(&spool, &repository).await.unwrap();
    assert!(emptied);
    assert_eq!(told, [Drained::Lost(bad.name.clone()), stored(&good.name)]);
    assert!(!stage.stored_file(&bad.name).exists());
    put(&spool, &bad).await;
    let (_, told) = drain(&spool, &repository).await.unwrap();
    assert_eq!(told, [stored(&bad.name)]);
}

/// A piece that nobody needs any more would hold up the segment that covers it, and all that follows.
#[tokio::test]
async fn a_damaged_piece_does_not_keep_the_segment_that_covers_it() {
    let stage = Stage::new();
    let repository = stage.repository().await;
    let spool = stage.spool(&repository).await;
    let whole = wal_of(&repository, (1, 2), (0, MIB), 0);
    let piece = wal_of(&repository, (1, 2), (0, 100), 0);
    for wal in [&whole, &piece] {
        put(&spool, wal).await;
    }
    let file = stage.spooled_file(&piece.name);
    let bytes = std::fs::read(&file).unwrap();
    std::fs::write(&file, &bytes[..bytes.len() - 1]).unwrap();

    let (emptied, told) = drain(&spool, &repository).await.unwrap();
    assert!(emptied);
    let lost = Drained::Lost(piece.name.clone());
    assert_eq!(told, [stored(&whole.name), lost]);
}

/// The spool's copy may be the only good one: it is not to be thrown out for what another disk did.
#[tokio::test]
async fn damage_in_the_repository_is_not_taken_for_the_spools() {
    let stage = Stage::new();
    let repository = stage.repository().await;
    let spool = stage.spool(&repository).await;
    let wal = wal_of(&repository, (1, 2), (0, MIB), 0);
    repository.put_wal(&wal).await.unwrap();
    put(&spool, &wal).await;
    let file = stage.stored_file(&wal.name);
    let mut bytes = std::fs::read(&file).unwrap();
    let end = bytes.len() - 6;
    bytes[end] ^= 1;
    std::fs::write(&file, &bytes).unwrap();

    let error = drain(&spool, &repository).await.unwrap_err();
    let at = stage.at("repository").display().to_string();
    assert!(
        error.is_damage() && error.to_string().contains(&at),
        "{error}"
    );
    assert!(stage.spooled_file(&wal.name).exists());
}

/// The bucket's owner took care that nobody else reads it; the archiver's disk is somebody's too.
#[tokio::test]
async fn is_sealed_where_the_repository_is_and_leaves_without_an_identity() {
    let mut stage = Stage::new();
    let repository = stage.repository().await;
    let spool = stage.spool(&repository).await;
    let plain = wal_of(&repository, (1, 2), (0, 5000), 0);
    put(&spool, &plain).await;
    drop(spool);

    let identity = NewIdentity::generate();
    stage.recipients = vec![identity.recipient.clone()];
    durable::rename(&stage.at("repository"), &stage.at("old")).unwrap();
    let repository = stage.repository().await;
    let spool = stage.spool(&repository).await;
    let sealed = wal_of(&repository, (1, 3), (0, 5000), 0);
    put(&spool, &sealed).await;
    let file = std::fs::read(stage.spooled_file(&sealed.name)).unwrap();
    let header = spool.member.header_in(&sealed.name, &file).unwrap();
    assert!(header.key.is_some() && !header.wraps.is_empty());
    // a process that has made no key, and knows none
    drop((spool, repository));
    let repository = stage.repository().await;
    let spool = stage.spool(&repository).await;
    assert!(drain(&spool, &repository).await.unwrap().0);
    drop((spool, repository));

    let path = stage.at("identity");
    std::fs::write(&path, identity.file(jiff::Timestamp::UNIX_EPOCH).as_bytes()).unwrap();
    stage.identity_file = Some(path);
    let reader = stage.repository().await;
    for wal in [plain, sealed] {
        let fetched = reader.fetch(&wal.name).await.unwrap();
        assert_eq!(fetched.plain, wal.checked.bytes(), "{}", wal.name);
        let file = std::fs::read(stage.stored_file(&wal.name)).unwrap();
        let header = reader.first().header_in(&wal.name, &file).unwrap();
        assert!(header.key.is_some(), "{} went out in the clear", wal.name);
    }
}

#[tokio::test]
async fn tells_what_it_holds_without_a_key_while_another_process_has_it() {
    let mut stage = Stage::new();
    stage.recipients = vec![NewIdentity::generate().recipient];
    let repository = stage.repository().await;
    let read = async || {
        let clock = Arc::new(SystemClock);
        let cluster = "main".parse().unwrap();
        SpoolContents::read(&stage.at("spool"), &cluster, SYSTEM, clock)
            .await
            .unwrap()
    };
    assert_eq!(read().await, None);
    let spool = stage.spool(&repository).await;
    assert_eq!(read().await, None);
    for (of, stretch) in [((1, 9), (0, MIB)), ((2, 3), (0, MIB)), ((2, 4), (0, 100))] {
        let wal = wal_of(&repository, of, stretch, 0);
        put(&spool, &wal).await;
    }
    let expected = SpoolContents {
        objects: 3,
        bytes: spool.bytes(),
        timeline: Some(timeline(2)),
        start: Some(Lsn::new(3 * MIB)),
        end: Some(Lsn::new(4 * MIB + 100)),
    };
    assert_eq!(read().await, Some(expected));
}

/// `status` would say that everything is in the bucket while WAL lies on this disk alone.
#[tokio::test]
async fn a_spool_that_cannot_be_looked_into_is_not_taken_for_an_empty_one() {
    let stage = Stage::new();
    let cluster = "main".parse().unwrap();
    let clock: Arc<dyn Clock> = Arc::new(SystemClock);
    let absent = stage.at("absent");
    let read = SpoolContents::read(&absent, &cluster, SYSTEM, Arc::clone(&clock));
    assert_eq!(read.await.unwrap(), None);
    let read = SpoolContents::read_every_system(&absent, &cluster, &clock);
    assert_eq!(read.await.unwrap(), []);

    // every way in ends at a file, for root too
    let spool = stage.at("spool");
    std::fs::write(&spool, "").unwrap();
    let one = SpoolContents::read(&spool, &cluster, SYSTEM, Arc::clone(&clock)).await;
    let every = SpoolContents::read_every_system(&spool, &cluster, &clock).await;
    for error in [one.unwrap_err(), every.unwrap_err()] {
        let is_said = matches!(error, RepositoryError::SpoolFolder { .. });
        assert!(is_said, "{error}");
    }
}

/// "File exists" leaves whoever mistook a file for a folder with a riddle.
#[tokio::test]
async fn a_file_in_the_place_of_the_spool_is_named() {
    let stage = Stage::new();
    let file = stage.at("file");
    std::fs::write(&file, "").unwrap();
    for dir in [file.clone(), file.join("spool")] {
        let cluster = dir.join("main");
        let refused = hold(&dir, &cluster, &cluster.join("7")).unwrap_err();
        let said = crate::error::Error::from(refused);
        let expected = format!("{} is a file, and no folder", file.display());
        assert!(said.message().ends_with(&expected), "{said}");
        assert!(said.hint_text().is_some_and(|hint| hint.contains("folder")));
    }
}
