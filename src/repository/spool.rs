//! The spool: a local folder that takes WAL while no repository does, and is emptied into it.
//!
//! It is laid out as a repository, `<dir>/<cluster>/<system identifier>/…`, and holds the same
//! objects: one that lies here can be copied to the repository as it is. They are sealed to the
//! repository's recipients and carry the wraps of their key themselves, so that nothing else is
//! needed to read them. Nothing is ever dropped: an object leaves the spool once the repository
//! has acknowledged it, or something that covers it with equal bytes.

mod contents;
mod drain;
mod index;

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use tokio::sync::Notify;
use wal::{SegmentName, WalRange};

use super::keys::EncryptionSettings;
use super::layout::ObjectName;
use super::member::{Cover, Member};
use super::place::Place;
use super::store::StoreOptions;
use super::writing::{ENCODERS, encode_each};
use super::{
    EncodedWal, PlaceSettings, Repository, RepositoryError, Result, ServerIdentity, blocking,
};
use crate::clock::Clock;
use crate::durable;
use index::{Index, Reserved};

pub use contents::SpoolContents;
pub use drain::Drained;

/// The file in a cluster's folder that says that it is a spool's, and is locked while one is used.
const LOCK: &str = "spool.lock";
/// Where objects are put that cannot be read.
const ASIDE: &str = "damaged";
/// What a small file takes at most beside its bytes.
const FILE_ROOM_BYTES: u64 = 16 << 10;
/// What a spool may hold unless that is set, in bytes.
pub const SPOOL_BYTES_MAX: u64 = 10 << 30;

/// A spool as settings have it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpoolSettings {
    /// Its folder, which several clusters may share.
    pub dir: PathBuf,
    /// How much it may hold for one cluster, in bytes as they are stored.
    pub bytes_max: u64,
    /// Whether the server is told that what is in it is stored.
    pub acknowledges: bool,
}

/// Whether the spool took an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpoolPut {
    /// It is durable in the spool.
    Stored,
    /// There is no room for it: nothing was written.
    Full,
}

/// The spool of one cluster's system, held by this process alone.
#[derive(Debug)]
pub struct Spool {
    member: Member,
    settings: SpoolSettings,
    index: Mutex<Index>,
    /// No repository took the last object that one was asked to take.
    is_away: AtomicBool,
    /// It was said that there is no room.
    is_full: AtomicBool,
    /// Something was put in.
    filled: Notify,
    /// Held while one object leaves.
    leaving: tokio::sync::Mutex<()>,
    /// Locked until it is dropped.
    _lock: File,
}

impl Spool {
    /// Opens the spool of a repository's cluster and system, makes it where there is none, and
    /// finds what an earlier process left in it.
    ///
    /// Refused where another process holds it, where the folder is a repository's, and where the
    /// cluster's repositories do not encrypt alike.
    pub async fn open(
        settings: &SpoolSettings,
        repository: &Repository,
        identity: ServerIdentity,
        clock: Arc<dyn Clock>,
    ) -> Result<Arc<Self>> {
        let place = place_settings(settings, repository)?;
        for member in &repository.members {
            // one that cannot be opened now is no folder that could be shared
            if let Ok(opened) = member.place().open()
                && opened.store.shares_folder(&settings.dir)
            {
                return Err(RepositoryError::SpoolInRepository {
                    dir: shown(&settings.dir),
                    url: member.place().url().to_owned(),
                });
            }
        }
        let cluster = settings.dir.join(repository.cluster.as_str());
        let system = cluster.join(repository.system_id.to_string());
        let made = settings.clone();
        let lock = blocking(move || hold(&made.dir, &cluster, &system)).await?;
        let place = Arc::new(Place::new(place, true, clock));
        let member = Member::new(place, repository.cluster.clone(), repository.system_id);
        // what another system of this name left waits for that one
        member.prepare(identity, true).await?;
        let mut index = Index::default();
        for listed in member.list("").await? {
            if let Some(name) = ObjectName::parse(&listed.path) {
                index.found(&name, listed.bytes);
            }
        }
        member.place().persist();
        Ok(Arc::new(Self {
            member,
            settings: settings.clone(),
            index: Mutex::new(index),
            is_away: AtomicBool::new(false),
            is_full: AtomicBool::new(false),
            filled: Notify::new(),
            leaving: tokio::sync::Mutex::default(),
            _lock: lock,
        }))
    }

    /// As it was asked for.
    pub fn settings(&self) -> &SpoolSettings {
        &self.settings
    }

    /// What it holds, in bytes as they are stored.
    pub fn bytes(&self) -> u64 {
        self.index().bytes()
    }

    /// How many objects it holds.
    pub fn objects(&self) -> usize {
        self.index().len()
    }

    /// What is in it, in the order in which it leaves.
    pub fn names(&self) -> Vec<ObjectName> {
        self.index().names()
    }

    /// Whether something lies here of the stretch `range` of `segment`.
    pub fn holds(&self, segment: SegmentName, range: WalRange) -> bool {
        self.index().holds(segment, range)
    }

    /// Of which system.
    pub fn system_id(&self) -> u64 {
        self.member.system_id()
    }

    /// Notes that no repository took what it was given: what follows need not try. Whether that is
    /// news.
    pub fn repository_is_away(&self) -> bool {
        !self.is_away.swap(true, Ordering::Relaxed)
    }

    /// Whether nobody was told yet that it is full; from now on somebody was, until it takes
    /// something again.
    pub fn says_that_it_is_full(&self) -> bool {
        !self.is_full.swap(true, Ordering::Relaxed)
    }

    /// Notes that a repository took something.
    pub fn repository_answers(&self) {
        self.is_away.store(false, Ordering::Relaxed);
    }

    /// Whether no repository took what it was last given.
    pub fn is_repository_away(&self) -> bool {
        self.is_away.load(Ordering::Relaxed)
    }

    /// Returns once there is something to drain.
    pub async fn filled(&self) {
        loop {
            let filled = self.filled.notified();
            if self.index().has_more() {
                return;
            }
            filled.await;
        }
    }

    /// Stores a segment or a piece. Once this returns [`SpoolPut::Stored`], it is durable here, and
    /// pieces that it covers are gone. It may be tried again.
    pub async fn put(self: &Arc<Self>, wal: &Arc<EncodedWal>) -> Result<SpoolPut> {
        let object = self.encode(wal).await?;
        let bytes = u64::try_from(object.len()).unwrap_or(u64::MAX);
        let reserved = self
            .index()
            .reserve(&wal.name, bytes, self.settings.bytes_max);
        if reserved == Reserved::Full {
            return Ok(SpoolPut::Full);
        }
        let (spool, wal) = (Arc::clone(self), Arc::clone(wal));
        // not given up with whoever asked for it: what lies in the folder is counted
        let written = tokio::spawn(async move { spool.write(&wal, object).await });
        written
            .await
            .map_err(|_panicked| RepositoryError::Interrupted)??;
        self.is_full.store(false, Ordering::Relaxed);
        Ok(SpoolPut::Stored)
    }

    /// Stores a small file of the server's, as [`Self::put`] does.
    pub async fn put_file(&self, name: &ObjectName, bytes: Bytes) -> Result<SpoolPut> {
        let room = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        let room = room.saturating_add(FILE_ROOM_BYTES);
        let reserved = self.index().reserve(name, room, self.settings.bytes_max);
        if reserved == Reserved::Full {
            return Ok(SpoolPut::Full);
        }
        if let Err(error) = self.member.store_file(name, bytes).await {
            self.index().not_written(name);
            return Err(error);
        }
        self.index().written(name);
        self.filled.notify_waiters();
        Ok(SpoolPut::Stored)
    }

    async fn encode(&self, wal: &Arc<EncodedWal>) -> Result<Bytes> {
        let recipe = wal.adapt(self.member.recipe(&wal.name).await?);
        let level = self.member.place().settings().wal_level;
        let shared = Arc::clone(wal);
        let _core = ENCODERS.acquire().await;
        let encoded = blocking(move || encode_each(vec![(0, recipe, level)], &shared)).await;
        let encoded = encoded.map_err(|error| self.member.damaged(&wal.name, &error))?;
        let (_, object) = encoded.into_iter().next().expect("one recipe, one object");
        Ok(object)
    }

    async fn write(&self, wal: &EncodedWal, object: Bytes) -> Result<()> {
        let name = &wal.name;
        let created = self.member.create_object(name, object, wal.digest()).await;
        if created.is_err() {
            self.index().not_written(name);
        }
        created?;
        self.index().written(name);
        self.filled.notify_waiters();
        match segment_of(name) {
            Some(segment) => self.remove_covered(&wal.cover(segment)).await,
            None => Ok(()),
        }
    }

    /// Removes the pieces here that `wal` covers, which every repository has acknowledged.
    ///
    /// A piece that differs is left, and is an error: it is another history.
    pub async fn remove_superseded_pieces(&self, wal: &EncodedWal) -> Result<()> {
        let range = wal.checked.range();
        let here = segment_of(&wal.name).filter(|segment| self.holds(*segment, range));
        let Some(segment) = here else {
            return Ok(());
        };
        // not while one of them is on its way to the repository, where nothing would remove it
        let _alone = self.leaving.lock().await;
        self.remove_covered(&wal.cover(segment)).await
    }

    async fn remove_covered(&self, cover: &Cover<'_>) -> Result<()> {
        for removed in self.member.remove_superseded_pieces(cover).await? {
            self.index().remove(&removed);
        }
        Ok(())
    }

    fn index(&self) -> MutexGuard<'_, Index> {
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where an object's file is.
    fn file(&self, name: &ObjectName) -> PathBuf {
        self.system_dir().join(name.path())
    }

    fn system_dir(&self) -> PathBuf {
        let cluster = self.settings.dir.join(self.member.cluster().as_str());
        cluster.join(self.member.system_id().to_string())
    }
}

/// The segment that an object belongs to.
fn segment_of(name: &ObjectName) -> Option<SegmentName> {
    match name {
        ObjectName::Segment(segment) | ObjectName::Piece { segment, .. } => Some(*segment),
        _ => None,
    }
}

/// Makes the folder of a cluster, and takes the lock in it.
fn hold(dir: &Path, cluster: &Path, system: &Path) -> Result<File> {
    let failed = |error: io::Error| RepositoryError::SpoolFolder {
        dir: shown(dir),
        reason: error.to_string(),
    };
    let path = cluster.join(LOCK);
    // a repository's folder would be emptied into itself
    if system.exists() && !path.exists() {
        return Err(RepositoryError::SpoolInRepository {
            dir: shown(dir),
            url: shown(dir),
        });
    }
    if let Some(file) = cluster
        .ancestors()
        .find(|part| part.exists() && !part.is_dir())
    {
        return Err(RepositoryError::SpoolFolder {
            dir: shown(dir),
            reason: format!("{} is a file, and no folder", file.display()),
        });
    }
    durable::create_dir_all(cluster).map_err(failed)?;
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .map_err(failed)?;
    durable::sync_dir(cluster).map_err(failed)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(RepositoryError::SpoolHeld { path: shown(&path) }),
        Err(TryLockError::Error(error)) => Err(failed(error)),
    }
}

/// The folder as a place, which encrypts as the repository does.
fn place_settings(settings: &SpoolSettings, repository: &Repository) -> Result<PlaceSettings> {
    let recipients_of = |member: &Member| {
        let mut recipients = member.place().settings().encryption.recipients.clone();
        recipients.sort_unstable();
        recipients.dedup();
        recipients
    };
    let first = repository.first();
    let recipients = recipients_of(first);
    for member in &repository.members {
        if recipients_of(member) != recipients {
            return Err(RepositoryError::SpoolUnlike {
                first: first.name().to_owned(),
                other: member.name().to_owned(),
            });
        }
    }
    let of_first = first.place().settings();
    let url = settings
        .dir
        .to_str()
        .ok_or_else(|| RepositoryError::SpoolFolder {
            dir: shown(&settings.dir),
            reason: "its name is not UTF-8".to_owned(),
        })?;
    Ok(PlaceSettings {
        name: "spool".to_owned(),
        store: StoreOptions::at(url),
        wal_level: of_first.wal_level,
        backup_level: of_first.backup_level,
        encryption: EncryptionSettings {
            // what was spooled before encryption was set up is sealed on its way out
            accept_plain: of_first.encryption.accept_plain || !recipients.is_empty(),
            recipients,
            identity_file: of_first.encryption.identity_file.clone(),
            // each object carries the wraps of its key
            state_dir: None,
            scope: String::new(),
        },
    })
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

#[cfg(test)]
mod tests;
