//! Seeded schedules and every interleaving of a small world over the rules of receiving.
//!
//! A scripted server sends, asks, shuts down, is promoted, loses WAL; a store acknowledges in any
//! order, late or not at all; a shell without sockets does what the real one does, and is cut,
//! stopped and killed. After every step, what a server was told must be stored, what is stored must
//! stay, and everything must come to its end. Time is simulated, and everything is drawn from the
//! seed: a schedule that fails is run again by `ANYWHEN_SCHEDULE_SEED`.

mod content;
mod exhaustive;
mod outcome;
mod schedule;
mod server;
mod shell;
mod store;
mod tally;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::repository::simulation::lots::Lots;
use crate::repository::simulation::{say, setting};
use tally::Tally;

/// So many schedules take a few seconds.
const SCHEDULES: u64 = 1000;

/// What a schedule counted; says so where it did not go well.
fn run_one(seed: u64) -> Option<Tally> {
    let panic = match catch_unwind(AssertUnwindSafe(|| schedule::run(seed))) {
        Ok(tally) => return Some(tally),
        Err(panic) => panic,
    };
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
    say(&format!("schedule {seed}: {}", text.unwrap_or("a panic")));
    None
}

#[test]
fn what_a_server_is_told_is_stored_in_every_schedule() {
    // a server believes any position, removes what lies before it, and releases commits on it
    if let Some(seed) = setting("ANYWHEN_SCHEDULE_SEED") {
        schedule::run_aloud(seed);
        return;
    }
    let seed = setting("ANYWHEN_SEED").unwrap_or(1);
    let schedules = setting("ANYWHEN_SCHEDULES").unwrap_or(SCHEDULES);
    let mut tally = Tally::new();
    for number in 0..schedules {
        let schedule = Lots::of(seed, number).next() >> 16;
        match run_one(schedule) {
            Some(counted) => tally.add(&counted),
            None => panic!(
                "schedule {schedule} failed: run it alone with ANYWHEN_SCHEDULE_SEED={schedule}"
            ),
        }
    }
    let (report, never) = tally.report();
    say(&format!(
        "\n{schedules} schedules of seed {seed}:\n{report}"
    ));
    assert!(never.is_empty(), "never occurred: {never:?}");
}
