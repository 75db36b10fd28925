//! Every interleaving of a small world: a server with a few stretches to send, a store that answers
//! in any order, and a few faults, each at every point where it can be.

use std::collections::HashSet;
use std::fmt::Write as _;
use std::hash::{DefaultHasher, Hasher as _};
use std::time::Instant;

use wal::Lsn;

use super::schedule::calm;
use super::tally::Tally;
use super::world::{SEGMENT, Step, World};
use crate::repository::simulation::say;

/// What may happen, and how often.
type Bounds = Vec<(Step, u8)>;

/// Takes text in and keeps its hash.
struct Hashed(DefaultHasher);

impl std::fmt::Write for Hashed {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        self.0.write(text.as_bytes());
        Ok(())
    }
}

/// What tells two states apart.
fn key(world: &World, left: &Bounds) -> u64 {
    let mut hashed = Hashed(DefaultHasher::new());
    write!(hashed, "{world:?}{left:?}").unwrap();
    hashed.0.finish()
}

/// Steps that are always among the choices: what is under way goes on.
const ALWAYS: [Step; 4] = [
    Step::Verified,
    Step::Acknowledge(0),
    Step::Acknowledge(1),
    Step::Connect,
];

/// Visits every state that `world` can come to, and lets each come to its end; their number.
fn search(world: World, bounds: Bounds) -> usize {
    let mut seen = HashSet::new();
    let mut open = vec![(world, bounds, Vec::new())];
    while let Some((world, left, path)) = open.pop() {
        if !seen.insert(key(&world, &left)) {
            continue;
        }
        let mut next = |step: Step, left: Bounds| {
            let mut path: Vec<Step> = path.clone();
            path.push(step);
            let Some(world) = after(&world, step, &path) else {
                return;
            };
            open.push((world, left, path));
        };
        for step in ALWAYS {
            next(step, left.clone());
        }
        for at in 0..left.len() {
            let mut left = left.clone();
            if left[at].1 > 0 {
                left[at].1 -= 1;
                next(left[at].0, left);
            }
        }
        ends(world, &path);
    }
    seen.len()
}

fn after(world: &World, step: Step, path: &[Step]) -> Option<World> {
    if !world.can(step) {
        return None;
    }
    let mut world = world.clone();
    said(path, || world.take(step));
    // not what the world is, but how it came to be
    world.tally = Tally::new();
    Some(world)
}

fn ends(mut world: World, path: &[Step]) {
    said(path, || calm(&mut world, false));
}

/// Says the way to a state that is wrong.
fn said(path: &[Step], what: impl FnOnce()) {
    let what = std::panic::AssertUnwindSafe(what);
    if let Err(panic) = std::panic::catch_unwind(what) {
        say(&format!("after {path:?}"));
        std::panic::resume_unwind(panic);
    }
}

/// A server with three and a half stretches to send: a segment and most of another.
fn world() -> World {
    let start = Lsn::new(3 * SEGMENT);
    let mut world = World::new(start, Instant::now());
    world.servers[0].end = start.saturating_add(SEGMENT * 7 / 4);
    world.take(Step::Connect);
    world
}

const SEND: Step = Step::Send(SEGMENT / 2);

#[test]
fn no_interleaving_of_requests_and_ends_tells_a_server_too_much() {
    // the cut that comes between an answer and what it is about, the stop between two pieces
    let bounds = vec![
        (SEND, 4),
        (Step::Keepalive(true), 1),
        (Step::Waited(true), 1),
        (Step::Waited(false), 1),
        (Step::Deadline, 1),
        (Step::Cut, 1),
        (Step::Stop, 1),
    ];
    let states = search(world(), bounds);
    say(&format!("\n{states} states of requests and ends"));
    assert!(states > 1000);
}

#[test]
fn no_interleaving_of_kills_and_outages_loses_what_was_told() {
    let mut world = world();
    world.spool_counts = true;
    let bounds = vec![
        (SEND, 3),
        (Step::Keepalive(true), 1),
        (Step::Waited(true), 1),
        (Step::Outage(true), 1),
        (Step::Outage(false), 1),
        (Step::Spool(0), 2),
        (Step::Drain, 1),
        (Step::Kill(true), 1),
        (Step::LandLate, 1),
        (Step::Recycle, 1),
    ];
    let states = search(world, bounds);
    say(&format!("\n{states} states of kills and outages"));
    assert!(states > 1000);
}

#[test]
fn no_interleaving_of_promotions_and_shutdowns_carries_a_position_over() {
    let bounds = vec![
        (SEND, 3),
        (Step::Lend(true), 1),
        (Step::Hold(true), 1),
        (Step::ShutDown, 1),
        (Step::Deadline, 1),
        (Step::Promote, 1),
        (Step::Kill(false), 1),
    ];
    let states = search(world(), bounds);
    say(&format!("\n{states} states of promotions and shutdowns"));
    assert!(states > 1000);
}
