//! Seeded schedules of faults over the rules of writing once and of several places.
//!
//! Stores fail, lag and go away; processes write, read, mend and are killed; and all the while, and
//! in the calm at the end, what was acknowledged must be where it was acknowledged, must be read
//! back as it was written, and must come to every place. Time is virtual, and everything is drawn
//! from the seed: a schedule that fails is run again by `ANYWHEN_SCHEDULE_SEED`.

mod backups;
mod content;
mod faults;
mod faulty;
pub(crate) mod lots;
mod model;
mod named;
mod removals;
mod schedule;
mod steps;
mod tally;
mod time;

use std::cell::Cell;
use std::io::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use lots::Lots;
use tally::Tally;

/// So many schedules take a few seconds.
const SCHEDULES: u64 = 400;

thread_local! {
    static UNDER_WAY: Cell<bool> = const { Cell::new(false) };
}

/// Whether a schedule runs on this thread.
pub(super) fn is_under_way() -> bool {
    UNDER_WAY.get()
}

/// A schedule runs on this thread, and nothing of it on another, for as long as this is kept.
struct UnderWay;

impl UnderWay {
    fn begin() -> Self {
        UNDER_WAY.set(true);
        Self
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        UNDER_WAY.set(false);
    }
}

/// Shows what a schedule that is run alone comes to.
fn show_all() {
    drop(
        tracing_subscriber::fmt()
            .with_max_level(tracing::Level::DEBUG)
            .with_ansi(false)
            .try_init(),
    );
}

pub(crate) fn setting(name: &str) -> Option<u64> {
    let value = std::env::var(name).ok()?;
    Some(
        value
            .parse()
            .unwrap_or_else(|_| panic!("{name} is no number: {value}")),
    )
}

/// The people of the simulation, in a file that places read.
fn identity_file(folder: &std::path::Path) -> PathBuf {
    let path = folder.join("identities");
    let secrets = schedule::PEOPLE.iter().map(|person| person.secret);
    std::fs::write(&path, secrets.collect::<Vec<_>>().join("\n")).unwrap();
    let mine = std::os::unix::fs::PermissionsExt::from_mode(0o600);
    std::fs::set_permissions(&path, mine).unwrap();
    path
}

/// Whether a schedule went well; says so where it did not, past the test harness, which keeps all
/// to itself until the end.
fn run_one(seed: u64, identities: &std::path::Path, tally: &Arc<Tally>) -> bool {
    let under_way = UnderWay::begin();
    let run = || schedule::run(seed, identities.to_owned(), tally);
    let outcome = catch_unwind(AssertUnwindSafe(run));
    drop(under_way);
    let Err(panic) = outcome else { return true };
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
    say(&format!("schedule {seed}: {}", text.unwrap_or("a panic")));
    false
}

pub(crate) fn say(line: &str) {
    writeln!(std::io::stderr(), "{line}").unwrap();
}

#[test]
fn what_is_acknowledged_survives_every_schedule_of_faults() {
    // a write that is acknowledged and lost, or read back as something else, is the loss of a
    // database; the ways there are too many to think of
    let folder = tempfile::tempdir().unwrap();
    let identities = identity_file(folder.path());
    let tally = Arc::new(Tally::new());
    if let Some(seed) = setting("ANYWHEN_SCHEDULE_SEED") {
        show_all();
        assert!(run_one(seed, &identities, &tally));
        return;
    }
    let seed = setting("ANYWHEN_SEED").unwrap_or(1);
    let schedules = setting("ANYWHEN_SCHEDULES").unwrap_or(SCHEDULES);
    let (next, failed) = (AtomicU64::new(0), AtomicU64::new(u64::MAX));
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= schedules || (failed.load(Ordering::Relaxed) != u64::MAX) {
                        return;
                    }
                    let schedule = Lots::of(seed, number).next() >> 16;
                    if !run_one(schedule, &identities, &tally) {
                        failed.store(schedule, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    let failed = failed.into_inner();
    assert!(
        failed == u64::MAX,
        "schedule {failed} failed: run it alone with ANYWHEN_SCHEDULE_SEED={failed}"
    );
    let (report, never) = tally.report();
    say(&format!(
        "\n{schedules} schedules of seed {seed}:\n{report}"
    ));
    assert!(never.is_empty(), "never occurred: {never:?}");
}
