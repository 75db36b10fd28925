//! Small backups: taken by a process of their own, killed now and then, and read back.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bytes::Bytes;
use jiff::Timestamp;
use tokio::time::{Instant, timeout};
use wal::Lsn;

use super::content::timeline;
use super::lots::Lots;
use super::model::{KeptBackup, only_place};
use super::schedule::{IDENTITY, World};
use super::steps::{expect_outage, expect_unreadable};
use super::tally::Seen;
use super::time::Time;
use crate::repository::layout::{BackupId, ObjectName};
use crate::repository::manifest::{self, ManifestText};
use crate::repository::records::{
    BackupRecord, Extent, FORMAT, ManifestEntry, ManifestLine, ManifestPath,
};
use crate::repository::sharing::{EarlierBackup, EarlierExtent};
use crate::repository::{BackupRecipe, PLAIN_BYTES_MAX, Repository, RepositoryError, Result};

/// Files are cut so, which are smaller.
const EXTENT_BYTES: u64 = 512 << 10;

/// What a backup will be.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    seed: u64,
    /// Whether it has the files of the backup before it too.
    shares: bool,
    /// Killed so long after it began.
    ends: Option<Duration>,
}

/// An earlier backup, and its files.
type Earlier = (EarlierBackup, Vec<(String, Bytes)>);

impl Plan {
    pub(super) fn draw(lots: &mut Lots) -> Self {
        Self {
            seed: lots.next(),
            shares: lots.chance(600),
            ends: lots.chance(250).then(|| lots.millis(50, 5000)),
        }
    }

    fn kept(&self, place: usize, record: &BackupRecord, earlier: Option<&Earlier>) -> KeptBackup {
        let mut files: Vec<_> = self.packs().into_iter().flatten().collect();
        files.extend(earlier.iter().flat_map(|(_, files)| files.clone()));
        KeptBackup {
            places: [place].into(),
            label: record.label.clone(),
            files,
        }
    }

    /// Its files, pack by pack.
    fn packs(&self) -> Vec<Vec<(String, Bytes)>> {
        let mut lots = Lots::new(self.seed);
        let file = |lots: &mut Lots| {
            let name = format!("base/{}", lots.next());
            let words = lots.between(1, 200);
            let bytes = (0..words).flat_map(|_| (lots.next() % 1000).to_le_bytes());
            (name, bytes.collect())
        };
        let packs = lots.between(1, 2);
        let pack = |lots: &mut Lots| (0..lots.between(1, 3)).map(|_| file(lots)).collect();
        (0..packs).map(|_| pack(&mut lots)).collect()
    }
}

/// Takes a backup as the command does, in a process of its own.
pub(super) async fn run(world: &World, plan: &Plan) {
    let taking = take(world, plan);
    match plan.ends {
        None => taking.await,
        Some(end) => {
            if timeout(end, taking).await.is_err() {
                world.count(Seen::BackupKilled);
            }
        }
    }
}

async fn take(world: &World, plan: &Plan) {
    let open = world.open();
    let everywhere = match open.repository(IDENTITY, false).await {
        Ok(everywhere) => everywhere,
        Err(error) => return expect_outage(world, &error),
    };
    let leader = everywhere.leader();
    let place = only_place(&leader);
    let newest = match leader.newest_backup().await {
        Ok(newest) => newest.filter(|_| plan.shares),
        Err(error) => return expect_outage(world, &error),
    };
    let now = world.time.now_by_the_clock();
    let id = match leader.announce_backup(now, &newest).await {
        Ok(id) => id,
        Err(error) => return expect_outage(world, &error),
    };
    let recipe = match leader.backup_recipe().await {
        Ok(recipe) => recipe,
        Err(error) => return expect_outage(world, &error),
    };
    let earlier = match &newest {
        Some(newest) => match earlier(world, &leader, newest).await {
            Ok(earlier) => earlier,
            Err(error) => return expect_outage(world, &error),
        },
        None => None,
    };
    let record = match store(now, &leader, &recipe, &id, plan, earlier.as_ref()).await {
        Ok(record) => record,
        Err(error) => {
            expect_outage(world, &error);
            if let Err(error) = leader.discard_backup(&id, false, now).await {
                expect_outage(world, &error);
            } else {
                world.count(Seen::BackupDiscarded);
            }
            return;
        }
    };
    if !commit(world, &leader, &record, &recipe).await {
        return;
    }
    if !record.shared_packs.is_empty() {
        world.count(Seen::BackupShared);
    }
    let kept = plan.kept(place, &record, earlier.as_ref());
    world.model.borrow_mut().backups.insert(id.clone(), kept);
    world.count(Seen::BackupCommitted);
    world.mend(&everywhere, true).await;
    if matches!(everywhere.has_everywhere(&id).await, Ok(true)) {
        let alike = world.model.borrow().check_backups([&id]);
        alike.unwrap_or_else(|wrong| panic!("a backup was spread: {wrong}"));
    }
}

/// A backup of one seed, stored and committed.
pub(super) async fn of_seed(leader: &Repository, id: &str) -> (BackupRecord, KeptBackup) {
    let plan = Plan {
        seed: 1,
        shares: false,
        ends: None,
    };
    let id: BackupId = id.parse().unwrap();
    let now = Timestamp::UNIX_EPOCH;
    let recipe = leader.backup_recipe().await.unwrap();
    let record = store(now, leader, &recipe, &id, &plan, None).await.unwrap();
    leader.commit_backup(&record, &recipe).await.unwrap();
    let kept = plan.kept(only_place(leader), &record, None);
    (record, kept)
}

/// A backup that has the files of an earlier one, and one more pack of its own.
pub(super) async fn after(
    leader: &Repository,
    (record, kept): (&BackupRecord, &KeptBackup),
    id: &str,
) -> (BackupRecord, KeptBackup) {
    let plan = Plan {
        seed: 2,
        shares: true,
        ends: None,
    };
    let (id, now): (BackupId, _) = (id.parse().unwrap(), Timestamp::UNIX_EPOCH);
    let recipe = leader.backup_recipe().await.unwrap();
    let earlier = leader.earlier_backup(record, EXTENT_BYTES).await;
    let earlier = (earlier.unwrap(), kept.files.clone());
    let record = store(now, leader, &recipe, &id, &plan, Some(&earlier)).await;
    let record = record.unwrap();
    leader.commit_backup(&record, &recipe).await.unwrap();
    let kept = plan.kept(only_place(leader), &record, Some(&earlier));
    (record, kept)
}

/// What came of a backup that was taken.
pub(super) enum Taken {
    /// It exists.
    Whole {
        record: Box<BackupRecord>,
        /// It has what one that failed had stored.
        uses_unfinished: bool,
    },
    /// It broke off, and the next one is to use what it has stored.
    Unfinished,
}

/// Takes a backup as the command does, with the files of the newest one too where it can refer to them, and of
/// one that failed since. What it has is `known` before it exists.
pub(super) async fn take_beside(
    leader: &Repository,
    time: &Time,
    seed: u64,
    known: &RefCell<BTreeMap<BackupId, KeptBackup>>,
) -> Result<Taken> {
    let plan = Plan {
        seed,
        shares: true,
        ends: None,
    };
    let newest = leader.newest_backup().await?;
    let unfinished = leader.unfinished_since(newest.as_ref()).await?;
    let now = time.now_by_the_clock();
    let before = || newest.iter().chain(&unfinished);
    let id = leader.announce_backup(now, before()).await?;
    let recipe = leader.backup_recipe().await?;
    let breaks_off = seed.is_multiple_of(4);
    let taken = async {
        let mut earlier: Option<Earlier> = None;
        for record in before() {
            match leader.earlier_backup(record, EXTENT_BYTES).await {
                Ok(found) => {
                    let files = known.borrow()[&record.id].files.clone();
                    earlier = Some(match earlier.take() {
                        None => (found, files),
                        Some((before, mut all)) => {
                            let is_new = |(path, _): &(String, Bytes)| {
                                all.iter().all(|(known, _)| known != path)
                            };
                            let new: Vec<_> = files.into_iter().filter(is_new).collect();
                            all.extend(new);
                            (before.with(found), all)
                        }
                    });
                }
                Err(error) if error.is_unreachable() => return Err(error),
                Err(_) => {}
            }
        }
        if let Some((found, files)) = &mut earlier {
            files.retain(|(path, _)| found.file(path.as_bytes()).is_some());
        }
        let record = store(now, leader, &recipe, &id, &plan, earlier.as_ref()).await?;
        let kept = plan.kept(only_place(leader), &record, earlier.as_ref());
        known.borrow_mut().insert(id.clone(), kept);
        if breaks_off {
            leader.keep_unfinished(&record).await?;
        } else {
            leader.check_stays(&record).await?;
        }
        Ok(record)
    };
    let record = match taken.await {
        Ok(_) if breaks_off => return Ok(Taken::Unfinished),
        Ok(record) => record,
        Err(error) => {
            // what cannot be discarded stays, and harms nobody
            drop(leader.discard_backup(&id, breaks_off, now).await);
            return Err(error);
        }
    };
    leader.commit_backup(&record, &recipe).await?;
    // what cannot be removed stays for the next one
    drop(leader.remove_unfinished(&id, time.now_by_the_clock()).await);
    let owners = record.owners();
    Ok(Taken::Whole {
        uses_unfinished: unfinished.iter().any(|one| owners.contains(&one.id)),
        record: Box::new(record),
    })
}

/// What the newest backup has, where all of it can be referred to.
async fn earlier(
    world: &World,
    leader: &Repository,
    newest: &BackupRecord,
) -> Result<Option<Earlier>> {
    let earlier = match leader.earlier_backup(newest, EXTENT_BYTES).await {
        Ok(earlier) => earlier,
        // the command stores everything then
        Err(error) if error.lacks_key() || error.is_damage() || error.is_not_found() => {
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    let kept = world.model.borrow().backups.get(&newest.id).cloned();
    let files = kept.map(|kept| kept.files).unwrap_or_default();
    // a pack may be listed late
    let is_stored = |(path, _): &(String, Bytes)| earlier.file(path.as_bytes()).is_some();
    let files: Vec<_> = files.into_iter().filter(is_stored).collect();
    Ok((!files.is_empty()).then_some((earlier, files)))
}

/// Whether the backup exists now.
async fn commit(
    world: &World,
    leader: &Repository,
    record: &BackupRecord,
    recipe: &BackupRecipe,
) -> bool {
    for _ in 0..3 {
        match leader.commit_backup(record, recipe).await {
            Ok(()) => return true,
            Err(error) => expect_outage(world, &error),
        }
        tokio::time::sleep_until(Instant::now() + Duration::from_secs(1)).await;
    }
    false
}

async fn store(
    now: Timestamp,
    leader: &Repository,
    recipe: &BackupRecipe,
    id: &BackupId,
    plan: &Plan,
    earlier: Option<&Earlier>,
) -> Result<BackupRecord> {
    let (mut lines, mut stored_bytes, mut bytes) = (Vec::new(), 0, 0);
    for (number, files) in (0..).zip(plan.packs()) {
        let name = ObjectName::Pack {
            backup: id.clone(),
            number,
        };
        let path = name.path();
        lines.push(ManifestLine::Pack { number, path });
        let (mut encoder, mut object) = (recipe.encoder(&name)?, Vec::new());
        for (path, content) in files {
            let frame = encoder.frame(&content, &mut object).unwrap();
            let size = u64::try_from(content.len()).unwrap();
            bytes += size;
            let hash = blake3::hash(&content).to_string();
            let extent = Extent::Stored(number, frame.offset, frame.stored_bytes, size, hash);
            lines.push(file_line(path, extent));
        }
        let trailer = encoder.finish(serde_json::Map::new(), &mut object).unwrap();
        stored_bytes += u64::try_from(object.len()).unwrap();
        leader
            .create_object(&name, object.into(), &trailer.digest)
            .await?;
    }
    let mut shared = BTreeSet::new();
    if let Some((earlier, files)) = earlier {
        for (path, content) in files {
            let stretches = earlier.file(path.as_bytes()).unwrap();
            let [EarlierExtent::Stored(stored)] = &*stretches else {
                panic!("{path} is in one extent: {stretches:?}");
            };
            assert_eq!(stored.hash, *blake3::hash(content).as_bytes());
            let number = 1000 + stored.pack;
            if shared.insert(stored.pack) {
                let path = earlier.pack_name(stored.pack).unwrap().path();
                lines.push(ManifestLine::Pack { number, path });
            }
            bytes += u64::from(stored.plain_bytes);
            lines.push(file_line(
                path.clone(),
                Extent::Stored(
                    number,
                    stored.offset.into(),
                    stored.stored_bytes.into(),
                    stored.plain_bytes.into(),
                    blake3::hash(content).to_string(),
                ),
            ));
        }
    }
    let shared_packs = earlier.map(|(earlier, _)| earlier.shared(&shared));
    // some in one text, most in several
    let mut manifest = ManifestText::new(id, usize::try_from(plan.seed % 4).unwrap() * 150 + 1);
    for line in &lines {
        if let Some(list) = manifest.add(line) {
            stored_bytes += store_text(leader, recipe, &list.name, &list.text).await?;
        }
    }
    let manifest = manifest.finish();
    let name = ObjectName::Manifest(id.clone());
    stored_bytes += store_text(leader, recipe, &name, &manifest).await?;
    Ok(BackupRecord {
        format: FORMAT,
        id: id.clone(),
        cluster: "main".to_owned(),
        system_id: "7".to_owned(),
        timeline: timeline(1),
        start_lsn: Lsn::new(1 << 20),
        stop_lsn: Lsn::new((1 << 20) + 512),
        started_at: now,
        finished_at: now,
        label: format!("of {}", plan.seed),
        postgres_version: "18.1".to_owned(),
        major: 18,
        segment_bytes: 1 << 20,
        files: u64::try_from(lines.len()).unwrap(),
        bytes,
        stored_bytes,
        shared_packs: shared_packs.unwrap_or_default(),
        tablespaces: Vec::new(),
        manifest_digest: container::digest(&manifest),
        from_standby: false,
        damaged_page_count: 0,
        damaged_pages: Vec::new(),
        outside: Vec::new(),
        sealed: None,
        digest: None,
    })
}

/// Stores a manifest or a file list; how many bytes it takes.
async fn store_text(
    leader: &Repository,
    recipe: &BackupRecipe,
    name: &ObjectName,
    text: &[u8],
) -> Result<u64> {
    let (mut encoder, mut object) = (recipe.encoder(name)?, Vec::new());
    encoder.frame(text, &mut object).unwrap();
    let trailer = encoder.finish(serde_json::Map::new(), &mut object).unwrap();
    let bytes = u64::try_from(object.len()).unwrap();
    leader
        .create_object(name, object.into(), &trailer.digest)
        .await?;
    Ok(bytes)
}

fn file_line(path: String, extent: Extent) -> ManifestLine {
    ManifestLine::File {
        entry: ManifestEntry {
            path: ManifestPath::Text(path),
            mode: 0o600,
            mtime: 0,
        },
        size: extent.plain_bytes(),
        extents: vec![extent],
    }
}

/// Reads one of the backups, from wherever it is.
pub(super) async fn read_one(world: &World, repository: &Repository, lot: u64) {
    let backups = world.model.borrow().backups.clone();
    let count = u64::try_from(backups.len()).unwrap();
    let Some(at) = lot.checked_rem(count) else {
        return;
    };
    let (id, kept) = backups.iter().nth(usize::try_from(at).unwrap()).unwrap();
    match repository.holding(id).await {
        Ok(None) => panic!("backup {id} was not found"),
        Ok(Some((holder, record))) => match read(&holder, &record, kept).await {
            Ok(()) => world.count(Seen::BackupRead),
            Err(error) => expect_unreadable(world, &error),
        },
        Err(error) => expect_unreadable(world, &error),
    }
}

/// Reads a whole backup, and finds it to be what was backed up.
pub(super) async fn read(
    repository: &Repository,
    record: &BackupRecord,
    kept: &KeptBackup,
) -> Result<()> {
    assert_eq!(record.label, kept.label);
    let name = ObjectName::Manifest(record.id.clone());
    let text = repository
        .manifest_text(&name, &record.manifest_digest)
        .await?;
    let (mut packs, mut texts) = (BTreeMap::new(), Vec::new());
    for line in manifest::lines(&text).map(std::result::Result::unwrap) {
        match line {
            ManifestLine::Pack { number, path } => {
                packs.insert(number, ObjectName::parse(&path).unwrap());
            }
            ManifestLine::Files { path, digest } => {
                let list = manifest::file_list(&path).unwrap();
                texts.push(repository.manifest_text(&list, &digest).await?);
            }
            _ => {}
        }
    }
    texts.push(text);
    let mut files = Vec::new();
    for line in texts.iter().flat_map(|text| manifest::lines(text)) {
        let ManifestLine::File { entry, extents, .. } = line.unwrap() else {
            continue;
        };
        let ManifestPath::Text(path) = entry.path else {
            panic!("{:?}", entry.path)
        };
        let mut content = Vec::new();
        for extent in &extents {
            content.extend(read_extent(repository, &packs, extent).await?);
        }
        files.push((path, Bytes::from(content)));
    }
    assert_eq!(files, kept.files);
    Ok(())
}

async fn read_extent(
    repository: &Repository,
    packs: &BTreeMap<u32, ObjectName>,
    extent: &Extent,
) -> Result<Vec<u8>> {
    let Extent::Stored(number, offset, stored, plain, hash) = extent else {
        panic!("{extent:?}")
    };
    assert!(*plain <= PLAIN_BYTES_MAX);
    let name = &packs[number];
    let frames = repository.frames(name).await?;
    let bytes = repository.fetch_range(name, *offset, *stored).await?;
    let plain = frames.frame(*offset, &bytes, usize::try_from(*plain).unwrap());
    let plain = plain.map_err(|error| RepositoryError::Damaged {
        path: name.path(),
        reason: error.to_string(),
    })?;
    assert_eq!(blake3::hash(&plain).to_string(), *hash);
    Ok(plain)
}
