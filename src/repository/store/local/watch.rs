//! Lets the thread that serves a conversation sync the journal itself, which spares a commit two changes
//! of threads, and sees to it that nothing else waits for a disk that hangs.
//!
//! While that thread syncs, the rest of what it serves waits. Tokio's other threads take that over once
//! they are woken, and nobody wakes them who does not know: that is done from here.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::runtime::{Handle, RuntimeFlavor};

/// Other threads are woken when a sync has taken so long.
const HANGS_AFTER: Duration = Duration::from_millis(50);
/// A disk that takes so long is left to a thread of its own
const SLOW: Duration = Duration::from_millis(10);
/// for so long: most that are slow once are quick again.
const LEFT_ALONE_FOR: Duration = Duration::from_millis(100);
/// Where nothing was synced for so long, nobody looks.
const LOOKED_FOR: Duration = Duration::from_secs(1);

/// What is looked at once in a while is looked at after so long, in microseconds: to follow a path takes
/// a tenth of the time of a sync.
const LOOKED_AT_AFTER: u64 = 10_000;

/// Sees to syncs that others might wait for.
#[derive(Debug)]
pub(super) struct Watch {
    shared: Arc<Shared>,
    /// `None` once it has ended.
    thread: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug)]
struct Shared {
    /// From here on time is counted.
    start: Instant,
    /// When the sync under way began, in microseconds; 0 where there is none.
    began: AtomicU64,
    /// Until then the disk is left alone, in microseconds.
    slow_until: AtomicU64,
    /// When [`Watched::once_in_a_while`] last found all well, in microseconds; 0 for never.
    looked_at: AtomicU64,
    /// Nothing was synced for a while, and nobody looks.
    sleeps: AtomicBool,
    over: AtomicBool,
    /// Whose threads are woken.
    runtime: Handle,
}

impl Shared {
    fn now(&self) -> u64 {
        // never 0
        1 + u64::try_from(self.start.elapsed().as_micros()).unwrap_or(u64::MAX - 1)
    }
}

/// A sync under way.
pub(super) struct Watched<'a> {
    shared: &'a Shared,
    began: u64,
}

impl Watch {
    /// Begins to watch, where other threads could take over: `None` where there are none.
    pub(super) fn begin() -> Option<Self> {
        let runtime = Handle::try_current().ok()?;
        let has_others = runtime.runtime_flavor() == RuntimeFlavor::MultiThread
            && runtime.metrics().num_workers() > 1;
        if !has_others {
            return None;
        }
        let shared = Arc::new(Shared {
            start: Instant::now(),
            began: AtomicU64::new(0),
            slow_until: AtomicU64::new(0),
            looked_at: AtomicU64::new(0),
            sleeps: AtomicBool::new(true),
            over: AtomicBool::new(false),
            runtime,
        });
        let watched = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("journal-watch".to_owned())
            .spawn(move || watch(&watched))
            .ok()?;
        Some(Self {
            shared,
            thread: Mutex::new(Some(thread)),
        })
    }

    /// Begins a sync on this thread; `None` where it is better left to another one.
    pub(super) fn sync_here(&self) -> Option<Watched<'_>> {
        let shared = self.shared.as_ref();
        let began = shared.now();
        if shared.slow_until.load(Ordering::Relaxed) > began {
            return None;
        }
        let free = shared
            .began
            .compare_exchange(0, began, Ordering::SeqCst, Ordering::Relaxed);
        free.ok()?;
        if shared.sleeps.swap(false, Ordering::SeqCst) {
            let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(thread) = thread.as_ref() {
                thread.thread().unpark();
            }
        }
        Some(Watched { shared, began })
    }
}

impl Watched<'_> {
    /// Asks `look`, unless it has said a moment ago that all is well.
    pub(super) fn once_in_a_while(&self, look: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let looked_at = self.shared.looked_at.load(Ordering::Relaxed);
        let since = self.shared.now().saturating_sub(looked_at);
        if looked_at != 0 && since < LOOKED_AT_AFTER {
            return Ok(());
        }
        look()?;
        self.shared.looked_at.store(self.began, Ordering::Relaxed);
        Ok(())
    }
}

impl Drop for Watched<'_> {
    fn drop(&mut self) {
        let (now, micros) = (self.shared.now(), |time: Duration| {
            u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
        });
        if now - self.began > micros(SLOW) {
            let until = now.saturating_add(micros(LEFT_ALONE_FOR));
            self.shared.slow_until.store(until, Ordering::Relaxed);
        }
        self.shared.began.store(0, Ordering::Release);
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::Release);
        let thread = self
            .thread
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(thread) = thread {
            thread.thread().unpark();
            if thread.join().is_err() {
                tracing::debug!("the thread that watches a journal has failed");
            }
        }
    }
}

fn watch(shared: &Shared) {
    let mut last = shared.now();
    while !shared.over.load(Ordering::Acquire) {
        if shared.sleeps.load(Ordering::Acquire) {
            std::thread::park();
            last = shared.now();
            continue;
        }
        std::thread::park_timeout(HANGS_AFTER);
        let began = shared.began.load(Ordering::Acquire);
        let since = |then: u64| Duration::from_micros(shared.now().saturating_sub(then));
        if began == 0 {
            if since(last) > LOOKED_FOR {
                shared.sleeps.store(true, Ordering::SeqCst);
                // one that began before that was to be seen wakes nobody
                if shared.began.load(Ordering::SeqCst) != 0 {
                    shared.sleeps.store(false, Ordering::SeqCst);
                }
            }
        } else {
            last = began;
            if since(began) >= HANGS_AFTER {
                // whoever comes for it looks after everything else that waits
                shared.runtime.spawn(async {});
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use bytes::Bytes;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::{TcpListener, TcpStream};

    use super::super::Local;
    use super::super::journal::Settings;
    use super::*;

    /// A journal whose disk does what `sync` does.
    fn local(folder: &std::path::Path, sync: impl Fn() + Send + Sync + 'static) -> Local {
        let settings = Settings {
            sync: Box::new(move |file| {
                sync();
                crate::durable::sync_data(file)
            }),
            ..Settings::default()
        };
        let local = Local::open(folder, true).unwrap();
        local.with_journal(settings).unwrap()
    }

    fn put_here(local: &Local, number: usize) -> bool {
        local.put_brief_here(&format!("main/{number}"), &Bytes::from_static(b"x"))
    }

    fn runtime(threads: usize) -> tokio::runtime::Runtime {
        let mut runtime = tokio::runtime::Builder::new_multi_thread();
        runtime.worker_threads(threads).enable_all();
        runtime.build().unwrap()
    }

    async fn after(milliseconds: u64) {
        let at = tokio::time::Instant::now() + Duration::from_millis(milliseconds);
        tokio::time::sleep_until(at).await;
    }

    /// The server would not hear from us, and give us up.
    #[test]
    fn a_disk_that_hangs_holds_up_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let (hangs, hung) = mpsc::channel();
        let (go_on, wait) = mpsc::channel::<()>();
        let wait = Mutex::new(wait);
        let runtime = runtime(2);
        let _inside = runtime.enter();
        let local = local(folder.path(), move || {
            hangs.send(()).unwrap_or_default();
            wait.lock().unwrap().recv().unwrap_or_default();
        });
        // dropped first: nothing hangs any more when this comes to its end
        let go_on = go_on;
        for round in 0..10 {
            let (done, all_done) = mpsc::channel();
            // what waits for the network and the clock is served by the thread that it wakes next, and
            // that one hangs
            runtime.spawn(async move {
                let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
                let here = TcpStream::connect(listener.local_addr().unwrap());
                let (here, there) = tokio::join!(here, listener.accept());
                let (mut here, mut there) = (here.unwrap(), there.unwrap().0);
                for _ in 0..5 {
                    after(10).await;
                    here.write_all(b"x").await.unwrap();
                    there.read_u8().await.unwrap();
                }
                done.send(()).unwrap();
            });
            let putting = {
                let local = local.clone();
                runtime.spawn(async move {
                    after(5).await;
                    // a job of its own, as the stream's are
                    let job = tokio::spawn(async move { put_here(&local, round) });
                    job.await.unwrap()
                })
            };
            hung.recv().unwrap();
            let waited = all_done.recv_timeout(Duration::from_secs(10));
            go_on.send(()).unwrap();
            assert!(runtime.block_on(putting).unwrap(), "not put there");
            waited.expect("the rest hangs too");
            // until it is trusted again
            let watch = local.scribe.get().unwrap().as_ref().unwrap().watch();
            watch.shared.slow_until.store(0, Ordering::Relaxed);
        }
    }

    #[test]
    fn a_slow_disk_is_left_to_a_thread_of_its_own() {
        let folder = tempfile::tempdir().unwrap();
        let runtime = runtime(2);
        let _inside = runtime.enter();
        let local = local(folder.path(), || {
            let until = Instant::now() + SLOW * 2;
            while Instant::now() < until {
                std::thread::park_timeout(SLOW);
            }
        });
        assert!(put_here(&local, 0));
        assert!(!put_here(&local, 1));
    }

    /// Nobody could take over what it serves.
    #[test]
    fn a_thread_that_is_alone_does_not_wait_for_a_disk() {
        let folder = tempfile::tempdir().unwrap();
        let runtime = runtime(1);
        let _inside = runtime.enter();
        let local = local(folder.path(), || ());
        assert!(!put_here(&local, 0));
    }
}
