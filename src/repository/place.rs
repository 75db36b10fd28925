//! One place of a repository, a URL: opened when it is needed, and how it fares in this process.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use super::keys::{Encryption, EncryptionSettings};
use super::layout::ObjectName;
use super::store::{Store, StoreOptions, Traffic};
use super::{RepositoryError, Result, in_place};
use crate::clock::Clock;

/// So many objects may be on their way to a place that is not waited for; they are held in memory.
const OWED_MAX: usize = 8;

/// A place that could not be asked is not asked again for so long, where others can be.
const SILENCE: Duration = Duration::from_mins(1);

/// So many names of objects that a place has missed are remembered; where there are more, every one
/// counts as missed.
const NAMES_MAX: usize = 200_000;

/// A place as settings have it.
#[derive(Debug, Clone)]
pub struct PlaceSettings {
    /// Its name in settings, for messages.
    pub name: String,
    /// Where it is, and how it is reached.
    pub store: StoreOptions,
    /// The zstd level for WAL.
    pub wal_level: i32,
    /// The zstd level for backups.
    pub backup_level: i32,
    /// To whom its objects are encrypted, and who reads them.
    pub encryption: EncryptionSettings,
}

/// A place that is used by this process. Shared by all that use it, so that one outage is noticed
/// once.
pub(super) struct Place {
    settings: PlaceSettings,
    /// Whether a local folder that is missing is made.
    create: bool,
    clock: Arc<dyn Clock>,
    opened: OnceLock<Opened>,
    /// Held by whoever opens it.
    opening: Mutex<()>,
    /// Whoever asks goes on asking.
    is_persistent: AtomicBool,
    /// The cluster was made here by this process.
    made: AtomicBool,
    health: Mutex<Health>,
    /// Why the last write failed: what is new is not tried until it was met again.
    away: watch::Sender<Option<String>>,
    /// When it could not be asked, and why.
    silent: Mutex<Option<(Instant, String)>>,
    /// Why it could not be asked at some time.
    unheard: Mutex<Option<String>>,
}

/// A place that was opened.
#[derive(Debug, Clone)]
pub(super) struct Opened {
    pub(super) store: Store,
    pub(super) encryption: Encryption,
}

/// How a place fares, where a cluster has several.
#[derive(Debug, Default)]
struct Health {
    /// The cluster was found or made there.
    met: bool,
    /// That it falls behind was said.
    said: bool,
    /// It holds everything that the others hold, but for what is owed.
    whole: bool,
    /// How many writes go on that were acknowledged by another place.
    owed: usize,
    /// How many objects cannot be copied to it, as it was said last.
    left: usize,
    /// How many objects did not get there.
    missed: u64,
    /// Which ones, since it was last whole.
    names: BTreeSet<ObjectName>,
}

impl Place {
    pub(super) fn new(settings: PlaceSettings, create: bool, clock: Arc<dyn Clock>) -> Self {
        Self {
            settings,
            create,
            clock,
            opened: OnceLock::new(),
            opening: Mutex::default(),
            is_persistent: AtomicBool::new(false),
            made: AtomicBool::new(false),
            health: Mutex::new(Health::default()),
            away: watch::Sender::new(None),
            silent: Mutex::new(None),
            unheard: Mutex::new(None),
        }
    }

    pub(super) fn settings(&self) -> &PlaceSettings {
        &self.settings
    }

    pub(super) fn url(&self) -> &str {
        &self.settings.store.url
    }

    /// The place, opened now if it was not.
    pub(super) fn open(&self) -> Result<Opened> {
        match self.opened.get() {
            Some(opened) => Ok(opened.clone()),
            None => in_place(|| self.open_now()),
        }
    }

    /// The place, where it is open.
    pub(super) fn opened(&self) -> Option<&Opened> {
        self.opened.get()
    }

    /// Opens it. A folder's disk may not answer, and its journals take time to be played back.
    fn open_now(&self) -> Result<Opened> {
        let _alone = lock(&self.opening);
        if let Some(opened) = self.opened.get() {
            return Ok(opened.clone());
        }
        let store = Store::open(&self.settings.store, self.create)?;
        let clock = Arc::clone(&self.clock);
        let encryption = Encryption::new(&self.settings.encryption, &store, clock)?;
        let opened = self.opened.get_or_init(|| Opened { store, encryption });
        // one that was asked for meanwhile found nothing open
        if self.is_persistent.load(Ordering::SeqCst) {
            opened.store.persist();
        }
        Ok(opened.clone())
    }

    /// Whoever asks goes on asking from now on, whatever fails: the log tells of an outage as a whole.
    pub(super) fn persist(&self) {
        self.is_persistent.store(true, Ordering::SeqCst);
        if let Some(opened) = self.opened.get() {
            opened.store.persist();
        }
    }

    /// Leaves nothing behind that another process would have to put right. What cannot be settled
    /// is put right when the place is opened again.
    pub(super) async fn settle(&self) {
        if let Some(opened) = self.opened.get()
            && let Err(error) = opened.store.settle().await
        {
            tracing::debug!("not settled: {}", crate::error::chain(&error));
        }
    }

    /// What was asked of it by this process; nothing where it was never opened.
    pub(super) fn traffic(&self) -> Traffic {
        let store = self.opened.get().map(|opened| &opened.store);
        store.map(Store::traffic).unwrap_or_default()
    }

    /// Notes that it could not be asked; whether that is news.
    pub(super) fn is_silent(&self, why: &dyn std::fmt::Display) -> bool {
        let is_news = self.silence().is_none();
        if is_news {
            *lock(&self.silent) = Some((Instant::now(), why.to_string()));
            lock(&self.unheard).get_or_insert_with(|| why.to_string());
        }
        is_news
    }

    /// Why it could not be asked at some time in the life of this process: what was read then may
    /// lack what only it has.
    pub(super) fn unheard(&self) -> Option<String> {
        lock(&self.unheard).clone()
    }

    /// Why it could not be asked a moment ago.
    pub(super) fn silence(&self) -> Option<String> {
        let silent = lock(&self.silent);
        let recent = silent
            .as_ref()
            .filter(|(since, _)| since.elapsed() < SILENCE);
        recent.map(|(_, why)| why.clone())
    }

    /// The cluster is made here by this process.
    pub(super) fn is_made(&self) {
        self.made.store(true, Ordering::Relaxed);
    }

    /// Whether this process made the cluster here, and not in the other place: it was not here before,
    /// or not to be seen. Says so once.
    pub(super) fn was_made_beside(&self, other: &Self) -> bool {
        !other.made.load(Ordering::Relaxed) && self.made.swap(false, Ordering::Relaxed)
    }

    /// Whether the cluster was found or made here before, by this process.
    pub(super) fn was_met(&self) -> bool {
        lock(&self.health).met
    }

    pub(super) fn is_met(&self) {
        lock(&self.health).met = true;
    }

    /// Whether it answered when it was last written to.
    pub(super) fn is_away(&self) -> bool {
        self.away.borrow().is_some()
    }

    /// What a write comes to, which ends when the place is away: tried again and again, it could come
    /// to whatever answers there later, and that is met before it is written to.
    pub(super) async fn while_it_answers<T>(
        &self,
        write: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        let mut away = self.away.subscribe();
        tokio::select! {
            biased;
            Ok(why) = away.wait_for(Option::is_some) => Err(RepositoryError::Silent {
                reason: why.clone().unwrap_or_default(),
            }),
            written = write => written,
        }
    }

    /// Whether it is known to hold everything that the others hold.
    pub(super) fn is_whole(&self) -> bool {
        let health = lock(&self.health);
        health.whole && health.owed == 0
    }

    /// It is not known to be whole until it has been compared with the others again.
    pub(super) fn is_to_compare(&self) {
        lock(&self.health).whole = false;
    }

    /// Whether so much goes on to it, which another place has acknowledged, that it is passed over.
    pub(super) fn owes_much(&self) -> bool {
        lock(&self.health).owed >= OWED_MAX
    }

    /// Whether it is known to lack something that this process has written.
    pub(super) fn is_behind(&self) -> bool {
        let health = lock(&self.health);
        health.owed > 0 || !health.names.is_empty()
    }

    /// How many objects cannot be copied to it; whether that is another number than was said last.
    pub(super) fn is_news_left(&self, left: usize) -> bool {
        std::mem::replace(&mut lock(&self.health).left, left) != left
    }

    /// Whether it lacks something that no write will bring.
    pub(super) fn is_to_fill(&self) -> bool {
        !lock(&self.health).whole
    }

    /// A write goes on that another place has acknowledged: this one is not whole until it has
    /// ended.
    pub(super) fn owe(self: &Arc<Self>) -> Owed {
        lock(&self.health).owed += 1;
        Owed(Arc::clone(self))
    }

    /// An object did not get there; `why` says that the place is away.
    pub(super) fn missed(&self, name: Option<&ObjectName>, why: Option<&dyn std::fmt::Display>) {
        let mut health = lock(&self.health);
        health.missed = health.missed.saturating_add(1);
        health.whole = false;
        if let Some(name) = name
            && health.names.len() < NAMES_MAX
        {
            health.names.insert(name.clone());
        }
        let Some(why) = why else { return };
        self.away.send_replace(Some(why.to_string()));
        if !std::mem::replace(&mut health.said, true) {
            tracing::warn!(
                "repository {} falls behind; what it misses is filled up from the others once it \
                 answers: {why}",
                self.settings.name
            );
        }
    }

    /// What this process has written since the place was last whole, and what did not get there.
    pub(super) fn missed_names(&self) -> BTreeSet<ObjectName> {
        lock(&self.health).names.clone()
    }

    /// Whether this object was written by this process and did not get there.
    pub(super) fn has_missed(&self, name: &ObjectName) -> bool {
        let health = lock(&self.health);
        health.names.len() >= NAMES_MAX || health.names.contains(name)
    }

    /// It is tried again from now on; how many objects it has missed so far.
    pub(super) fn answers(&self) -> u64 {
        let health = lock(&self.health);
        self.away.send_replace(None);
        health.missed
    }

    /// It was filled up, unless it has missed more than `missed` objects by now.
    pub(super) fn filled_up(&self, missed: u64) {
        let mut health = lock(&self.health);
        if health.missed == missed {
            health.whole = true;
            health.said = false;
            health.names.clear();
        }
    }
}

/// A write that goes on, until it is dropped.
pub(super) struct Owed(Arc<Place>);

impl Drop for Owed {
    fn drop(&mut self) {
        let mut health = lock(&self.0.health);
        health.owed = health.owed.saturating_sub(1);
    }
}

impl std::fmt::Debug for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Place")
            .field("name", &self.settings.name)
            .field("url", &self.url())
            .finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
