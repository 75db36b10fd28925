//! Where received WAL goes: to the repository, or into the spool while no repository takes it; and
//! back from there.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{OnceCell, mpsc};
use tokio::task::JoinHandle;
use wal::{Checked, Lsn, SegmentName, SegmentSize, TimelineId, WalRange};

use super::contact::Contact;
use super::failures::Failures;
use super::histories::Histories;
use super::state::StreamGauges;
use crate::clock::Clock;
use crate::error::{Error, Kind, Result, chain};
use crate::repository::layout::{ClusterName, ObjectName};
use crate::repository::{
    Drained, EncodedWal, Repository, RepositoryError, ServerIdentity, Spool, SpoolContents,
    SpoolPut, SpoolSettings, Stored,
};
use crate::retry::Backoff;

/// Where a stretch is durable now.
pub(super) enum Kept {
    /// In the repository.
    Stored(Arc<EncodedWal>, Stored),
    /// In the spool alone.
    Spooled(WalRange),
}

pub(super) fn new_backoff() -> Backoff {
    Backoff::new(Duration::from_millis(200), Duration::from_secs(15))
}

/// Stores what one conversation receives.
pub(super) struct Storing {
    histories: Histories,
    repository: Repository,
    spool: Option<Arc<Spool>>,
    timeline: TimelineId,
    size: SegmentSize,
    failures: Failures,
}

impl Storing {
    /// A segment or a piece, which `supersedes` others or not, to be stored.
    pub(super) fn take(
        &self,
        name: ObjectName,
        checked: Checked<'static>,
        supersedes: bool,
    ) -> Arc<EncodedWal> {
        let (timeline, size) = (self.timeline, self.size);
        self.repository
            .take_wal(name, timeline, size, checked, supersedes)
    }

    /// Stores it on this very thread, where no other way takes so little time. Whether it is durable now;
    /// if not, nothing was done, and [`Self::keep`] does it.
    pub(super) fn keep_here(&self, wal: &EncodedWal) -> bool {
        self.spool.is_none() && self.histories.are_stored() && self.repository.put_wal_here(wal)
    }

    /// Stores it, however long that takes: this returns once it is durable.
    pub(super) async fn keep(&self, wal: Arc<EncodedWal>) -> Result<Kept, RepositoryError> {
        let Self {
            histories,
            repository,
            spool,
            failures,
            ..
        } = self;
        histories
            .store(repository, spool.as_deref(), failures)
            .await?;
        let mut backoff = new_backoff();
        let mut only_repository = spool.is_none();
        loop {
            let is_away = spool
                .as_ref()
                .is_some_and(|spool| spool.is_repository_away());
            if only_repository || !is_away {
                match repository.put_wal(&wal).await {
                    Ok(stored) => return stored_in(spool.as_deref(), wal, stored).await,
                    Err(error) if error.is_unreachable() => {
                        is_away_now(spool.as_deref(), failures, &error);
                    }
                    Err(error) => return Err(error),
                }
            }
            if let Some(spool) = spool {
                match put_aside(spool, &wal).await? {
                    SpoolPut::Stored => {
                        return Ok(Kept::Spooled(wal.checked.range()));
                    }
                    // nobody else asks the repository, perhaps: the spool may be of no use at all
                    SpoolPut::Full => only_repository = true,
                }
            }
            backoff.wait().await;
        }
    }

    /// What is stored of a segment beyond a position: stretches, and the digests of their bytes. It is
    /// asked until the repository answers, unless what follows goes to the spool meanwhile.
    pub(super) async fn look(
        self: Arc<Self>,
        segment: SegmentName,
        beyond: Lsn,
    ) -> Result<Vec<(WalRange, String)>, RepositoryError> {
        let mut backoff = new_backoff();
        loop {
            let spool = self.spool.as_ref();
            if spool.is_some_and(|spool| spool.is_repository_away()) {
                return Ok(Vec::new());
            }
            let looked = self.repository.segment_digests(segment, self.size, beyond);
            match looked.await {
                Ok(found) => {
                    for (_, error) in found.damaged {
                        tracing::warn!("what others stored is not compared: {error}");
                    }
                    return Ok(found.content);
                }
                Err(error) if error.is_unreachable() => {
                    is_away_now(self.spool.as_deref(), &self.failures, &error);
                }
                // the stream goes on: what it stores is none the worse for it
                Err(error) => {
                    tracing::warn!(
                        "what others stored of {segment} is not compared: {}",
                        chain(&error)
                    );
                    return Ok(Vec::new());
                }
            }
            backoff.wait().await;
        }
    }

    /// Who notes what the repository does not do.
    pub(super) fn failures(&self) -> &Failures {
        &self.failures
    }

    /// The stretch that an object of the spool holds, where it belongs to this conversation.
    pub(super) fn range_of(&self, name: &ObjectName) -> Option<WalRange> {
        let (segment, range) = match name {
            ObjectName::Segment(segment) => (segment, segment.range(self.size)?),
            ObjectName::Piece { segment, range } => (segment, *range),
            _ => return None,
        };
        (segment.timeline == self.timeline).then_some(range)
    }

    /// Whether something of a stretch lies in the spool.
    pub(super) fn is_spooled(&self, range: WalRange) -> bool {
        let segment = SegmentName::of(self.timeline, range.start, self.size);
        let spool = self.spool.as_ref();
        spool.is_some_and(|spool| spool.holds(segment, range))
    }

    /// What lies in the spool: bytes, objects.
    pub(super) fn spool_size(&self) -> (u64, u64) {
        let spool = self.spool.as_ref();
        spool.map_or((0, 0), |spool| {
            let objects = u64::try_from(spool.objects()).unwrap_or(u64::MAX);
            (spool.bytes(), objects)
        })
    }

    /// Whether the server is told that what is spooled is stored.
    pub(super) fn spool_acknowledges(&self) -> bool {
        let spool = self.spool.as_ref();
        spool.is_some_and(|spool| spool.settings().acknowledges)
    }
}

/// It is in the repository: what it covers need not follow.
async fn stored_in(
    spool: Option<&Spool>,
    wal: Arc<EncodedWal>,
    stored: Stored,
) -> Result<Kept, RepositoryError> {
    if let Some(spool) = spool {
        spool.repository_answers();
        if stored == Stored::Everywhere {
            match spool.remove_superseded_pieces(&wal).await {
                Err(error) if error.is_unreachable() => {
                    tracing::warn!("superseded pieces stay in the spool: {}", chain(&error));
                }
                removed => removed?,
            }
        }
    }
    Ok(Kept::Stored(wal, stored))
}

/// Notes that the repository does not answer: what comes goes to the spool, if there is one.
pub(super) fn is_away_now(spool: Option<&Spool>, failures: &Failures, error: &RepositoryError) {
    failures.note(error, "cannot store WAL, trying again");
    if spool.is_some_and(Spool::repository_is_away) {
        tracing::warn!("cannot store WAL, it goes to the spool: {}", chain(error));
    }
}

/// Puts it into the spool. A spool that fails is one that is full, until it is mended.
async fn put_aside(spool: &Arc<Spool>, wal: &Arc<EncodedWal>) -> Result<SpoolPut, RepositoryError> {
    match spool.put(wal).await {
        Ok(SpoolPut::Full) => {
            if spool.says_that_it_is_full() {
                tracing::warn!(
                    "the spool is full: nothing more is received until the repository answers: \
                     bytes={}, most={}. hint: the server keeps its WAL meanwhile; watch its disk",
                    spool.bytes(),
                    spool.settings().bytes_max
                );
            }
            Ok(SpoolPut::Full)
        }
        Err(error) if error.is_unreachable() => {
            // its store tells of that
            tracing::debug!("cannot spool WAL, trying again: {}", chain(&error));
            Ok(SpoolPut::Full)
        }
        put => put,
    }
}

/// What the spool tells a conversation.
#[derive(Debug)]
pub(super) enum SpoolNews {
    /// An object is in the repository now, or is lost.
    Drained(Drained),
    /// It cannot be emptied.
    Failed(RepositoryError),
}

/// The spool of a receiver, if it was asked for one: opened at the first contact, and emptied for
/// as long as the receiver lives, whether the server is there or not.
pub(super) struct Spooling {
    settings: Option<SpoolSettings>,
    clock: Arc<dyn Clock>,
    gauges: StreamGauges,
    draining: OnceCell<Draining>,
}

struct Draining {
    spool: Arc<Spool>,
    /// The conversation at hand.
    listener: Arc<Mutex<Option<mpsc::UnboundedSender<SpoolNews>>>>,
    task: JoinHandle<()>,
}

impl Spooling {
    pub(super) fn new(
        settings: Option<SpoolSettings>,
        clock: Arc<dyn Clock>,
        gauges: StreamGauges,
    ) -> Self {
        Self {
            settings,
            clock,
            gauges,
            draining: OnceCell::new(),
        }
    }

    /// Shows what an earlier process left in the spool: a server may have to be waited for before it
    /// is opened.
    pub(super) async fn show_what_is_left(&self, cluster: &ClusterName) {
        let Some(settings) = &self.settings else {
            return;
        };
        match SpoolContents::read_every_system(&settings.dir, cluster, &self.clock).await {
            Ok(systems) => {
                let objects: usize = systems.iter().map(|system| system.objects).sum();
                let bytes = systems.iter().map(|system| system.bytes).sum();
                self.show(bytes, objects);
            }
            // whoever opens it says what is wrong with it
            Err(error) => tracing::debug!("what is spooled is not known: {}", chain(&error)),
        }
    }

    fn failures(&self) -> Failures {
        Failures::new(self.gauges.clone(), Arc::clone(&self.clock))
    }

    fn show(&self, bytes: u64, objects: usize) {
        let objects = u64::try_from(objects).unwrap_or(u64::MAX);
        self.gauges
            .update(|state| (state.spool_bytes, state.spool_objects) = (bytes, objects));
    }

    /// Empties the spool into the repository, before anybody looks at what that holds: what an
    /// earlier connection or process left there comes first.
    pub(super) async fn empty_into(
        &self,
        repository: &Repository,
        identity: ServerIdentity,
    ) -> Result<()> {
        let Some(settings) = &self.settings else {
            return Ok(());
        };
        let draining = self
            .draining
            .get_or_try_init(|| async {
                let clock = Arc::clone(&self.clock);
                let spool = Spool::open(settings, repository, identity, clock).await?;
                let repository = repository.clone();
                Ok::<_, RepositoryError>(Draining::begin(spool, repository, self.failures()))
            })
            .await?;
        if draining.spool.system_id() != repository.system_id() {
            return Err(Error::failure(format!(
                "another system than the one that is spooled: spooled={}, server={}",
                draining.spool.system_id(),
                repository.system_id()
            )));
        }
        let left = draining.spool.objects();
        self.show(draining.spool.bytes(), left);
        if left > 0 {
            tracing::info!("storing what was spooled: objects={left}");
            let spool = &draining.spool;
            let told = |_drained: Drained| self.show(spool.bytes(), spool.objects());
            spool.drain(repository, told).await?;
        }
        Ok(())
    }

    /// What stores the WAL of a conversation, and what it hears of the spool.
    pub(super) fn storing(
        &self,
        contact: &Contact,
    ) -> (Arc<Storing>, mpsc::UnboundedReceiver<SpoolNews>) {
        let (repository, timeline) = (&contact.repository, contact.at.timeline);
        let size = contact.facts.segment_size;
        let (sender, news) = mpsc::unbounded_channel();
        let draining = self.draining.get();
        if let Some(draining) = draining {
            let listener = &draining.listener;
            *listener.lock().unwrap_or_else(PoisonError::into_inner) = Some(sender);
        }
        let storing = Storing {
            histories: Histories::until(timeline, &contact.histories),
            repository: repository.clone(),
            spool: draining.map(|draining| Arc::clone(&draining.spool)),
            timeline,
            size,
            failures: self.failures(),
        };
        (Arc::new(storing), news)
    }
}

impl Draining {
    fn begin(spool: Arc<Spool>, repository: Repository, failures: Failures) -> Self {
        let listener = Arc::default();
        let task = keep_empty(
            Arc::clone(&spool),
            repository,
            Arc::clone(&listener),
            failures,
        );
        Self {
            spool,
            listener,
            task: tokio::spawn(task),
        }
    }
}

impl Drop for Draining {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Empties the spool whenever there is something in it and the repository takes it.
async fn keep_empty(
    spool: Arc<Spool>,
    repository: Repository,
    listener: Arc<Mutex<Option<mpsc::UnboundedSender<SpoolNews>>>>,
    failures: Failures,
) {
    let tell = |news: SpoolNews| {
        let listener = listener.lock().unwrap_or_else(PoisonError::into_inner);
        // nobody listens between two conversations: the next one begins with an empty spool
        let heard = listener
            .as_ref()
            .map(|listener| listener.send(news).is_ok());
        heard.unwrap_or_default()
    };
    let new = || Backoff::new(Duration::from_millis(500), Duration::from_secs(15));
    let mut backoff = new();
    let lost = AtomicUsize::new(0);
    loop {
        spool.filled().await;
        let drained = spool.drain(&repository, |drained| {
            if matches!(drained, Drained::Lost(_)) {
                lost.fetch_add(1, Ordering::Relaxed);
            }
            tell(SpoolNews::Drained(drained));
        });
        match drained.await {
            Ok(true) => {
                match lost.swap(0, Ordering::Relaxed) {
                    0 => tracing::info!("the spool is empty: all of it is in the repository"),
                    lost => tracing::warn!(
                        "the spool is empty: all that could be read is in the repository, objects lost={lost}"
                    ),
                }
                backoff = new();
                continue;
            }
            Ok(false) => {}
            Err(error) if error.is_unreachable() => {
                failures.note(&error, "the spool waits");
            }
            Err(error) => {
                tell(SpoolNews::Failed(error));
            }
        }
        backoff.wait().await;
    }
}

/// Why a conversation ends where something spooled was lost: another one receives it again.
pub(super) fn lost(name: &ObjectName) -> Error {
    let path = name.path();
    Error::new(
        Kind::Unreachable,
        format!("a spooled object is lost, receiving it again: {path}"),
    )
}

/// What a conversation received that lies in the spool alone. Pure.
#[derive(Debug, Default)]
pub(super) struct InSpool {
    ranges: BTreeSet<(Lsn, Lsn)>,
}

impl InSpool {
    pub(super) fn insert(&mut self, range: WalRange) {
        self.ranges.insert((range.start, range.end));
    }

    /// Takes out what lies within a stretch that is in the repository now.
    pub(super) fn left(&mut self, stretch: WalRange) -> Vec<WalRange> {
        let within = |(start, end): &(Lsn, Lsn)| stretch.start <= *start && *end <= stretch.end;
        let left: Vec<(Lsn, Lsn)> = self.ranges.iter().copied().filter(within).collect();
        for range in &left {
            self.ranges.remove(range);
        }
        let ranges = left.into_iter();
        ranges.map(|(start, end)| WalRange { start, end }).collect()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, end: u64) -> WalRange {
        WalRange {
            start: Lsn::new(start),
            end: Lsn::new(end),
        }
    }

    /// What this connection did not receive was not compared with what this server sends.
    #[test]
    fn what_leaves_the_spool_counts_as_far_as_it_was_received_here() {
        let mut spooled = InSpool::default();
        for piece in [range(100, 200), range(200, 300), range(300, 400)] {
            spooled.insert(piece);
        }
        assert_eq!(spooled.left(range(0, 250)), [range(100, 200)]);
        assert_eq!(spooled.left(range(0, 250)), []);
        assert_eq!(spooled.left(range(300, 400)), [range(300, 400)]);
        assert!(!spooled.is_empty());
        assert_eq!(spooled.left(range(0, 1000)), [range(200, 300)]);
        assert!(spooled.is_empty());
    }
}
