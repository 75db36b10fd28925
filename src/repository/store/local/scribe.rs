//! The thread that puts objects through the journal: whatever waits at one moment is synced once.
//!
//! One thread that is woken for each object is faster than any of a pool, and it has time to get
//! ready for the next object while nobody waits for it.

use std::io;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use bytes::Bytes;
use tokio::sync::oneshot;

use super::journal::{Entry, Journal, Settings};
use super::{Root, STAGING, Writer};
use crate::durable::Staged;

/// So many objects are put together at most.
const TOGETHER_MAX: usize = 64;

/// What became of an object; `None` where nothing was done, and it can be stored without a journal.
pub(super) type Outcome = Option<io::Result<()>>;

/// An object to be put.
struct Order {
    writer: Writer,
    bytes: Bytes,
    done: oneshot::Sender<Outcome>,
}

/// The thread, and its journal. Dropping it closes the journal.
#[derive(Debug)]
pub(super) struct Scribe {
    journal: Arc<Journal>,
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
        let (root, shared) = (root.clone(), Arc::clone(&journal));
        let thread = std::thread::Builder::new()
            .name("journal".to_owned())
            .spawn(move || write(&root, &shared, &received))?;
        Ok(Self {
            journal,
            at_work: Mutex::new(Some(AtWork { orders, thread })),
        })
    }

    /// What it writes.
    pub(super) fn journal(&self) -> &Arc<Journal> {
        &self.journal
    }

    /// Puts an object. Once this returns `Some(Ok(()))`, it is durable, and can be read.
    pub(super) async fn put(&self, writer: Writer, bytes: Bytes) -> Outcome {
        let (done, outcome) = oneshot::channel();
        self.take(Order {
            writer,
            bytes,
            done,
        })?;
        // a thread that is no more has done nothing that was not told
        let lost = |_| Some(Err(io::Error::other("the journal's thread is gone")));
        outcome.await.unwrap_or_else(lost)
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

fn write(root: &Root, journal: &Journal, orders: &Receiver<Order>) {
    let staging = root.folder.join(STAGING);
    let mut spare = None;
    while let Ok(first) = orders.recv() {
        let mut batch = vec![first];
        batch.extend(orders.try_iter().take(TOGETHER_MAX - 1));
        // what lies on another disk by now is not stored
        let there = root.check();
        let put = there.and_then(|()| {
            let outcomes = put_together(journal, &batch, &mut spare);
            root.check().map(|()| outcomes)
        });
        let outcomes = put.unwrap_or_else(|error| {
            let refused = || io::Error::new(error.kind(), error.to_string());
            batch.iter().map(|_| Some(Err(refused()))).collect()
        });
        for (order, outcome) in batch.into_iter().zip(outcomes) {
            if order.done.send(outcome).is_err() {
                tracing::debug!("nobody waits for {}", order.writer.path);
            }
        }
        spare = Staged::empty(&staging).ok();
    }
}

/// Puts objects through the journal with one sync.
fn put_together(journal: &Journal, batch: &[Order], spare: &mut Option<Staged>) -> Vec<Outcome> {
    let begun: Vec<_> = batch
        .iter()
        .map(|order| begin(journal, order, spare.take()))
        .collect();
    let last = begun.iter().flatten().last();
    let synced = last.is_none_or(|(_, entry)| entry.sync().is_ok());
    let named = batch.iter().zip(begun).map(|(order, begun)| {
        let (staged, entry) = begun.filter(|_| synced)?;
        order.writer.name(staged, entry)
    });
    named.collect()
}

/// Writes an object to its file, which has no name yet, and to the journal.
fn begin<'a>(
    journal: &'a Journal,
    order: &'a Order,
    spare: Option<Staged>,
) -> Option<(Staged, Entry<'a>)> {
    let staged = order.writer.stage_unsynced(&order.bytes, spare)?;
    let entry = journal.append(&order.writer.path, &order.bytes)?;
    Some((staged, entry))
}
