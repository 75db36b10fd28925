//! One schedule: steps drawn by seed, and the calm at its end, in which everything is stored.

use std::time::{Duration, Instant};

use wal::Lsn;

use super::store::stretches;
use super::tally::{Seen, Tally};
use super::world::{SEGMENT, Step, World};
use crate::repository::simulation::lots::Lots;
use crate::repository::simulation::say;

/// What a schedule is about, as weights.
#[derive(Debug, Clone, Copy)]
struct Nature {
    /// How much the server writes and sends at once, in bytes.
    stretch: u64,
    /// How often a store answers.
    store: u64,
    /// How often something goes wrong.
    faults: u64,
    /// How often the server becomes another one.
    changes: u64,
}

impl Nature {
    fn draw(lots: &mut Lots) -> Self {
        Self {
            stretch: lots.pick(&[300, 20_000, SEGMENT / 4, SEGMENT]),
            store: lots.pick(&[10, 60, 200]),
            faults: lots.pick(&[0, 10, 40]),
            changes: lots.pick(&[0, 5, 30]),
        }
    }
}

/// Runs one schedule.
pub(super) fn run(seed: u64) -> Tally {
    play(seed, false)
}

/// Runs one schedule and says each step.
pub(super) fn run_aloud(seed: u64) {
    play(seed, true);
}

fn play(seed: u64, aloud: bool) -> Tally {
    let mut lots = Lots::new(seed);
    let mut world = World::new(Lsn::new(3 * SEGMENT), Instant::now());
    world.spool_counts = lots.chance(400);
    let nature = Nature::draw(&mut lots);
    for _ in 0..lots.between(50, 800) {
        let step = draw(&mut lots, &nature, &world);
        if !world.can(step) {
            continue;
        }
        take(&mut world, step, aloud);
    }
    calm(&mut world, aloud);
    world.tally
}

fn draw(lots: &mut Lots, nature: &Nature, world: &World) -> Step {
    let jobs = world.shell.as_ref().map_or(0, |shell| shell.jobs.len());
    let job = lots.index(jobs.max(1));
    let job = if lots.chance(500) { 0 } else { job };
    let some = |lots: &mut Lots| lots.between(1, nature.stretch);
    let row = [
        (100, Step::Write(some(lots))),
        (200, Step::Send(some(lots))),
        (20, Step::Keepalive(lots.chance(500))),
        (60, Step::Verified),
        (10, Step::Lend(lots.chance(300))),
        (nature.store, Step::Acknowledge(job)),
        (nature.store / 10, Step::Land(job)),
        (30, Step::Spool(job)),
        (30, Step::Drain),
        (40, Step::Remove(lots.index(world.removal_count().max(1)))),
        (10, Step::LandLate),
        (10, Step::Tip),
        (60, Step::Pass(lots.millis(0, 400))),
        (40, Step::Deadline),
        (300, Step::Connect),
        (15, Step::Waited(lots.chance(600))),
        (10, Step::Recycle),
        (nature.faults, Step::Outage(lots.chance(500))),
        (nature.faults / 2, Step::Hold(lots.chance(500))),
        (nature.faults, Step::Cut),
        (nature.faults / 2, Step::Stop),
        (nature.faults, Step::Kill(lots.chance(500))),
        (nature.faults / 10, Step::LoseSlot),
        (nature.changes, Step::ShutDown),
        (nature.changes, Step::Promote),
        (
            nature.changes,
            Step::FailOver(lots.below(2 * nature.stretch)),
        ),
        (nature.changes, Step::GoBack),
        (
            nature.changes / 2,
            Step::GoAstray(lots.below(nature.stretch)),
        ),
    ];
    let mut lot = lots.below(row.iter().map(|(weight, _)| *weight).sum());
    for (weight, step) in row {
        if lot < weight {
            return step;
        }
        lot -= weight;
    }
    unreachable!("the weights were added up")
}

/// Nothing goes wrong any more: the server is told all that it has, and a stop ends.
pub(super) fn calm(world: &mut World, aloud: bool) {
    for step in [Step::Outage(false), Step::Hold(false), Step::Lend(false)] {
        if world.can(step) {
            world.take(step);
        }
    }
    // the last one that was met is the cluster now
    if world.current != world.newest {
        world.current = world.newest;
        world.take(Step::Pass(Duration::ZERO));
    }
    let mut turns = 0;
    while !is_all_told(world) {
        turns += 1;
        assert!(turns < 20_000, "no end in the calm");
        take_one(world, aloud);
    }
    // nothing waits for merges and removals, and a stop gives up on them
    for step in [Step::Acknowledge(0), Step::Remove(0), Step::LandLate] {
        while world.can(step) {
            turns += 1;
            assert!(turns < 20_000, "no end to {step:?}");
            take(world, step, aloud);
        }
    }
    if world.can(Step::Stop) {
        world.take(Step::Stop);
    }
    while world.shell.is_some() {
        turns += 1;
        assert!(turns < 20_000, "no end after a stop");
        take_one(world, aloud);
    }
    world.check_owed();
    check_pieces(world);
}

fn is_all_told(world: &World) -> bool {
    let server = world.server();
    world.shell.as_ref().is_some_and(|shell| {
        let own = shell.server == world.current && shell.timeline == server.branch.timeline();
        own && shell.ended.is_none() && shell.told == server.end
    })
}

fn take_one(world: &mut World, aloud: bool) {
    let row = [
        Step::Verified,
        Step::Drain,
        Step::Acknowledge(0),
        Step::Remove(0),
        Step::LandLate,
        Step::Connect,
        Step::Send(SEGMENT / 3),
        Step::Deadline,
    ];
    let step = row.into_iter().find(|step| world.can(*step));
    let step = step.expect("time can pass at any time");
    take(world, step, aloud);
}

fn take(world: &mut World, step: Step, aloud: bool) {
    world.take(step);
    if aloud {
        let shell = world.shell.as_ref().map(|shell| {
            let (timeline, known, ended) = (shell.timeline, shell.before.known, shell.ended);
            let (received, told, jobs) = (shell.received(), shell.told, shell.jobs.len());
            format!("on {timeline}, known {known}, {received}, told {told}, {jobs} jobs, {ended:?}")
        });
        let server = world.server();
        let (from, to) = (server.oldest, server.end);
        let shell = shell.unwrap_or_default();
        say(&format!("{step:?}: server {from} to {to}; {shell}"));
    }
}

/// Few pieces are left of what was stored, however slowly it came.
fn check_pieces(world: &mut World) {
    let Some(first) = world.first else { return };
    let end = world.server().end;
    for (timeline, range) in stretches(&world.server().branch, first, end) {
        let mut at = world.size.start_of(range.start);
        while at < range.end {
            let pieces = world.store.pieces(timeline, at).len();
            assert!(
                pieces <= 64,
                "{pieces} pieces of {at} on timeline {timeline}"
            );
            at = world.size.end_of(at);
        }
    }
    world.tally.count(Seen::Finished);
}
