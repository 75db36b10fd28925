//! The thread that puts objects through the journal: whatever waits at one moment is synced once.
//!
//! One thread that is woken for each object is faster than any of a pool, and it has time to give
//! objects their files while nobody waits for it.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::oneshot;

use super::journal::{Appended, Journal, Settings};
use super::watch::Watch;
use super::{Root, Writer};

/// So many objects are put together at most.
const TOGETHER_MAX: usize = 64;
/// Objects get their files when no more have come for so long,
const IDLE: Duration = Duration::from_millis(20);
/// and those that have waited for so long also while more come, some at a time: most are superseded
/// by then, and need none.
const NAMED_AFTER: Duration = Duration::from_millis(500);
const NAMED_EVERY: Duration = Duration::from_millis(100);
const NAMED_TOGETHER: usize = 64;

/// What became of an object; `None` where nothing was done, and it can be stored without a journal.
pub(super) type Outcome = Option<io::Result<()>>;

/// What the thread is asked for.
enum Order {
    Put(Put),
    /// Objects were put past it: they need files later.
    Look,
}

/// An object to be put.
struct Put {
    writer: Writer,
    bytes: Bytes,
    done: oneshot::Sender<Outcome>,
}

/// The thread, and its journal. Dropping it closes the journal.
#[derive(Debug)]
pub(super) struct Scribe {
    root: Root,
    journal: Arc<Journal>,
    /// Sees to objects that are put where they come from; `None` where others would wait for them.
    watch: Option<Watch>,
    /// The thread looks for objects without files now and then.
    looks: Arc<AtomicBool>,
    /// `None` once it has ended.
    at_work: Mutex<Option<AtWork>>,
}

#[derive(Debug)]
struct AtWork {
    orders: Sender<Order>,
    thread: JoinHandle<()>,
}

impl Scribe {
    /// Makes a journal in a folder, and begins to write it.
    pub(super) fn begin(root: &Root, settings: Settings) -> io::Result<Self> {
        let journal = Arc::new(Journal::create(root, settings)?);
        let (orders, received) = mpsc::channel();
        let looks = Arc::new(AtomicBool::new(false));
        let work = Work {
            root: root.clone(),
            journal: Arc::clone(&journal),
            looks: Arc::clone(&looks),
            orders: received,
        };
        let thread = std::thread::Builder::new()
            .name("journal".to_owned())
            .spawn(move || work.go_on())?;
        Ok(Self {
            root: root.clone(),
            journal,
            watch: Watch::begin(),
            looks,
            at_work: Mutex::new(Some(AtWork { orders, thread })),
        })
    }

    /// What it writes.
    pub(super) fn journal(&self) -> &Arc<Journal> {
        &self.journal
    }

    /// Puts an object. Once this returns `Some(Ok(()))`, it is durable, and can be read: from the journal,
    /// or from its file.
    pub(super) async fn put(&self, writer: Writer, bytes: Bytes) -> Outcome {
        let (done, outcome) = oneshot::channel();
        self.take(Order::Put(Put {
            writer,
            bytes,
            done,
        }))?;
        // a thread that is no more has done nothing that was not told
        let lost = |_| Some(Err(io::Error::other("the journal's thread is gone")));
        outcome.await.unwrap_or_else(lost)
    }

    #[cfg(test)]
    pub(super) fn watch(&self) -> &Watch {
        self.watch.as_ref().unwrap()
    }

    /// Puts an object on the calling thread, which waits for the disk, where others take over what else
    /// it serves if that hangs. Whether it is done: durable, and to be read.
    pub(super) fn put_here(&self, writer: impl FnOnce() -> Writer, bytes: &Bytes) -> bool {
        let Some(watched) = self.watch.as_ref().and_then(Watch::sync_here) else {
            return false;
        };
        let writer = writer();
        let appended = append(&self.journal, &writer, bytes);
        let Appended::Through(through) = appended else {
            return false;
        };
        // what lies on another disk by now is not stored
        let is_durable = self
            .journal
            .sync(through)
            .and_then(|()| watched.once_in_a_while(|| self.root.check()))
            .is_ok();
        if !is_durable {
            self.journal.withdraw(&writer.path, through);
        }
        drop(watched);
        if !self.looks.swap(true, Ordering::AcqRel) {
            self.take(Order::Look);
        }
        is_durable
    }

    fn take(&self, order: Order) -> Option<()> {
        let at_work = self.at_work.lock().unwrap_or_else(PoisonError::into_inner);
        at_work.as_ref()?.orders.send(order).ok()
    }

    /// Puts what waits, and closes the journal: nothing more is taken, and nothing is left behind.
    pub(super) fn end(&self) -> io::Result<()> {
        let mut at_work = self.at_work.lock().unwrap_or_else(PoisonError::into_inner);
        let ended = at_work.take();
        drop(at_work);
        if let Some(AtWork { orders, thread }) = ended {
            drop(orders);
            if thread.join().is_err() {
                tracing::debug!("the journal's thread has failed");
            }
        }
        self.journal.close()
    }
}

impl Drop for Scribe {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            tracing::debug!("a journal stays: {error}");
        }
    }
}

/// What the thread has at hand.
struct Work {
    root: Root,
    journal: Arc<Journal>,
    looks: Arc<AtomicBool>,
    orders: Receiver<Order>,
}

impl Work {
    fn go_on(self) {
        let (mut looked_at, mut seen) = (Instant::now(), 0);
        let mut idle = IDLE;
        loop {
            let next = if self.looks.load(Ordering::Acquire) {
                self.orders.recv_timeout(idle)
            } else {
                self.orders.recv().map_err(RecvTimeoutError::from)
            };
            match next {
                Ok(Order::Put(first)) => {
                    self.looks.store(true, Ordering::Release);
                    self.put_together(first);
                }
                Ok(Order::Look) | Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            let appended = self.journal.appended();
            let is_idle = appended == seen;
            if looked_at.elapsed() < if is_idle { idle } else { NAMED_EVERY } {
                continue;
            }
            (looked_at, seen) = (Instant::now(), appended);
            if is_idle {
                self.journal.name(Duration::ZERO, usize::MAX);
                // what is put from now on asks for another look, and what was put before is seen
                self.looks.store(false, Ordering::Release);
                let is_left = self.journal.has_nameless();
                if is_left {
                    self.looks.store(true, Ordering::Release);
                }
                // a disk that is full is not asked as often
                idle = if is_left { NAMED_AFTER } else { IDLE };
            } else {
                self.journal.name(NAMED_AFTER, NAMED_TOGETHER);
            }
        }
    }

    /// Puts what waits at this moment.
    fn put_together(&self, first: Put) {
        let mut batch = vec![first];
        let waiting = self.orders.try_iter().filter_map(|order| match order {
            Order::Put(put) => Some(put),
            Order::Look => None,
        });
        batch.extend(waiting.take(TOGETHER_MAX - 1));
        let outcomes = put_all(&self.root, &self.journal, &batch);
        for (put, outcome) in batch.into_iter().zip(outcomes) {
            if put.done.send(outcome).is_err() {
                tracing::debug!("nobody waits for {}", put.writer.path);
            }
        }
    }
}

/// Puts objects through the journal with one sync.
fn put_all(root: &Root, journal: &Journal, batch: &[Put]) -> Vec<Outcome> {
    let outcomes = put_durably(journal, batch);
    // what lies on another disk by now is not stored
    match root.check() {
        Ok(()) => outcomes,
        Err(error) => {
            let refused = || io::Error::new(error.kind(), error.to_string());
            batch.iter().map(|_| Some(Err(refused()))).collect()
        }
    }
}

fn put_durably(journal: &Journal, batch: &[Put]) -> Vec<Outcome> {
    let appended: Vec<Appended> = batch
        .iter()
        .map(|put| append(journal, &put.writer, &put.bytes))
        .collect();
    let through = appended.iter().filter_map(|appended| match appended {
        Appended::Through(through) => Some(*through),
        Appended::Exists | Appended::Refused => None,
    });
    let synced = through
        .max()
        .is_none_or(|through| journal.sync(through).is_ok());
    let outcomes = batch.iter().zip(appended);
    outcomes
        .map(|(put, appended)| match appended {
            Appended::Through(_) if synced => Some(Ok(())),
            Appended::Through(through) => {
                journal.withdraw(&put.writer.path, through);
                None
            }
            Appended::Exists => Some(Err(io::ErrorKind::AlreadyExists.into())),
            Appended::Refused => None,
        })
        .collect()
}

fn append(journal: &Journal, writer: &Writer, bytes: &Bytes) -> Appended {
    if writer.may_be_journaled() {
        journal.append(&writer.path, bytes)
    } else {
        Appended::Refused
    }
}
