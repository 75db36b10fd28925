//! What processes do in a schedule, and what each answer must be.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;
use wal::{Lsn, WalRange};

use super::backups;
use super::content::{
    CONTESTED, SEGMENT, checked, piece, segment, size, start_of, timeline, whole,
};
use super::faulty::Outage;
use super::lots::Lots;
use super::model::{holders, segment_of};
use super::schedule::{IDENTITY, World, count_changes, health};
use super::tally::Seen;
use crate::repository::layout::ObjectName;
use crate::repository::records::{Hole, Tip};
use crate::repository::{EncodedWal, Repository, RepositoryError, Stored, stretch};

/// One thing that happens.
#[derive(Debug, Clone)]
pub(super) enum Step {
    /// A stretch is stored, and what it covers is removed.
    Put {
        number: u64,
        from: u64,
        to: u64,
        tries: u32,
        /// Another server writes, with bytes of its own.
        rogue: bool,
    },
    History,
    Hole(u64),
    Tip(u64),
    Backup(backups::Plan),
    Mend {
        all: bool,
    },
    Read {
        lot: u64,
        strict: bool,
    },
    ReadSegment {
        number: u64,
        strict: bool,
    },
    Catalog {
        strict: bool,
    },
    ReadBackup(u64),
    Places,
    Outage {
        place: usize,
        kind: Outage,
        /// How long; else it goes on.
        lasts: Option<Duration>,
    },
    Ends,
}

impl Step {
    pub(super) fn draw(lots: &mut Lots, world: &World) -> Self {
        let rogue = world.has_rogue() && lots.chance(200);
        match lots.below(100) {
            0..=41 => Self::draw_put(lots, rogue),
            42..=43 => Self::History,
            44..=46 => Self::Hole(lots.below(3)),
            47..=49 => Self::Tip(lots.below(1 << 20)),
            50..=55 => Self::Backup(backups::Plan::draw(lots)),
            56..=66 => Self::Mend {
                all: lots.chance(500),
            },
            67..=70 => Self::Read {
                lot: lots.next(),
                strict: lots.chance(500),
            },
            71..=74 => Self::ReadSegment {
                number: lots.between(1, CONTESTED),
                strict: lots.chance(500),
            },
            75..=77 => Self::Catalog {
                strict: lots.chance(500),
            },
            78..=80 => Self::ReadBackup(lots.next()),
            81 => Self::Places,
            82..=91 => Self::Outage {
                place: lots.index(world.stores.len()),
                kind: lots.pick(&[
                    Outage::Refusing,
                    Outage::Refusing,
                    Outage::Silent,
                    Outage::Busy,
                    Outage::Denied,
                    Outage::Full,
                ]),
                lasts: lots.chance(600).then(|| lots.millis(500, 60_000)),
            },
            _ => Self::Ends,
        }
    }

    fn draw_put(lots: &mut Lots, rogue: bool) -> Self {
        let steps = SEGMENT / 512;
        let (from, to) = if lots.chance(250) {
            (0, steps)
        } else {
            let from = if lots.chance(400) {
                0
            } else {
                lots.below(steps)
            };
            (from, lots.between(from + 1, steps))
        };
        Self::Put {
            number: if rogue {
                CONTESTED
            } else {
                lots.between(1, CONTESTED)
            },
            from: from * 512,
            to: to * 512,
            tries: u32::try_from(lots.between(1, 4)).unwrap(),
            rogue,
        }
    }

    pub(super) async fn run(&self, world: &World, repository: &Repository) {
        match self {
            Self::Put {
                number,
                from,
                to,
                tries,
                rogue,
            } => {
                let (name, range) = piece(*number, *from, *to);
                if *rogue {
                    let open = world.open();
                    if let Ok(other) = open.repository(IDENTITY, false).await {
                        put(world, &other, name, range, 1, 0xff).await;
                    }
                } else {
                    put(world, repository, name, range, *tries, 0).await;
                }
            }
            Self::History => history(world, repository).await,
            Self::Hole(number) => hole(world, repository, *number).await,
            Self::Tip(offset) => tip(world, repository, *offset).await,
            Self::Backup(plan) if world.sealed.get().is_none() => {
                backups::run(world, plan).await;
            }
            Self::Backup(_) => {}
            Self::Mend { all } => mend(world, repository, *all).await,
            Self::Read { lot, strict } => read(world, &asked(repository, *strict), *lot).await,
            Self::ReadSegment { number, strict } => {
                read_segment(world, &asked(repository, *strict), *number).await;
            }
            Self::Catalog { strict } => catalog(world, &asked(repository, *strict)).await,
            Self::ReadBackup(lot) => backups::read_one(world, repository, *lot).await,
            Self::Places => drop(repository.places().await),
            Self::Outage { place, kind, lasts } => {
                let store = &world.stores[*place];
                store.set_outage(Some(*kind));
                if let Some(lasts) = lasts {
                    tokio::time::sleep_until(Instant::now() + *lasts).await;
                    store.set_outage(None);
                }
            }
            Self::Ends => {
                for store in &world.stores {
                    store.set_outage(None);
                }
            }
        }
    }
}

fn asked(repository: &Repository, strict: bool) -> Repository {
    let reader = repository.clone();
    if strict { reader.strict() } else { reader }
}

/// Whether every place was asked by a reader that began at `since`: those that could not be are
/// remembered for a while.
fn all_were_asked(repository: &Repository, since: Instant) -> bool {
    repository.strict
        || (repository.unheard().is_empty() && since.elapsed() < Duration::from_secs(50))
}

async fn put(
    world: &World,
    repository: &Repository,
    name: ObjectName,
    range: WalRange,
    tries: u32,
    history: u8,
) {
    let segment = segment_of(&name).unwrap();
    let bytes = whole(segment, history);
    let plain = Bytes::copy_from_slice(stretch(&bytes, start_of(segment), range).unwrap());
    world.model.borrow_mut().writes(&name, &plain);
    world.written_now.borrow_mut().insert(name.clone());
    let checked = checked(range, &plain);
    let wal = match repository
        .encode_wal(name, timeline(1), size(), checked)
        .await
    {
        Ok(wal) => wal,
        Err(error) => return expect_outage(world, &error),
    };
    world.model.borrow_mut().follows(&wal);
    let is_contested = world.contested() == Some(segment);
    let mut stored = None;
    for attempt in 0..tries {
        if attempt > 0 {
            tokio::time::sleep_until(Instant::now() + Duration::from_secs(1)).await;
        }
        if health(repository).iter().all(|(is_away, _)| *is_away) {
            world.count(Seen::AllAway);
        }
        match repository.put_wal(&wal).await {
            Ok(come_to) => {
                stored = Some(come_to);
                break;
            }
            Err(RepositoryError::Conflict { .. }) if is_contested => {
                world.count(Seen::ConflictRefused);
                return;
            }
            Err(error) => expect_outage(world, &error),
        }
    }
    let Some(stored) = stored else { return };
    acknowledged(world, repository, &wal, stored);
    world.model.borrow_mut().is_told(&wal);
    let (had, superseded) = (holders(&wal), range.start == start_of(segment));
    if superseded {
        let pieces = |world: &World| -> usize {
            let model = world.model.borrow();
            let places = had.iter();
            places
                .map(|place| model.stretches(*place, segment).len())
                .sum()
        };
        let before = pieces(world);
        match repository.remove_superseded_pieces(segment, &wal).await {
            Ok(_) if pieces(world) < before => world.count(Seen::PieceRemoved),
            Ok(_) => {}
            Err(RepositoryError::Conflict { .. }) if is_contested => {
                world.count(Seen::ConflictRefused);
            }
            Err(error) => expect_outage(world, &error),
        }
    }
}

/// What an acknowledgement promises at the moment when it is given.
fn acknowledged(world: &World, repository: &Repository, wal: &Arc<EncodedWal>, stored: Stored) {
    let model = world.model.borrow();
    let count = world.stores.len();
    let there = (0..count).filter(|place| model.holds(*place, wal)).count();
    match stored {
        Stored::Everywhere => {
            world.count(Seen::Everywhere);
            assert_eq!(there, count, "{} is said to be everywhere", wal.name);
        }
        Stored::Partly => {
            world.count(Seen::Partly);
            assert!(there > 0, "{} is said to be somewhere", wal.name);
        }
    }
    for place in holders(wal) {
        assert!(model.holds(place, wal), "{} is not in {place}", wal.name);
    }
    // this is what an archiver tells the server by
    if repository.is_whole() {
        assert_eq!(
            there, count,
            "{} is not in all places, which are said to be whole",
            wal.name
        );
    }
}

/// An error that another attempt may pass; nothing else may happen to what is only out of reach.
pub(super) fn expect_outage(world: &World, error: &RepositoryError) {
    assert!(error.is_unreachable(), "no outage: {error:?}");
    world.count(Seen::ByNone);
}

async fn history(world: &World, repository: &Repository) {
    let name = ObjectName::History(timeline(2));
    let text = Bytes::from_static(b"1\t0/380000\tno recovery target specified\n");
    world.model.borrow_mut().writes(&name, &text);
    world.written_now.borrow_mut().insert(name.clone());
    match repository.store_file(&name, text).await {
        Ok(()) => kept(world, &name),
        Err(error) => expect_outage(world, &error),
    }
}

async fn hole(world: &World, repository: &Repository, number: u64) {
    let hole = Hole {
        timeline: timeline(1),
        start: Lsn::new((8 + number) << 20),
        end: Lsn::new((9 + number) << 20),
        found_at: world.time.now_by_the_clock(),
        reason: "the slot was gone".to_owned(),
        unverified: false,
    };
    let name = ObjectName::Hole {
        timeline: hole.timeline,
        range: hole.range(),
    };
    world.written_now.borrow_mut().insert(name.clone());
    match repository.record_hole(&hole).await {
        Ok(()) => kept(world, &name),
        Err(error) => expect_outage(world, &error),
    }
}

fn kept(world: &World, name: &ObjectName) {
    let kept = world.model.borrow_mut().small_is_kept(name);
    kept.unwrap_or_else(|wrong| panic!("{wrong}"));
}

async fn tip(world: &World, repository: &Repository, offset: u64) {
    let tip = Tip {
        lsn: Lsn::new((1 << 20) + offset),
        confirmed_at: world.time.now_by_the_clock(),
        moment: None,
    };
    if let Err(error) = repository.write_tip(timeline(1), &tip).await {
        expect_outage(world, &error);
    }
}

async fn mend(world: &World, repository: &Repository, all: bool) {
    let count = world.stores.len();
    let listing = || -> Vec<BTreeSet<ObjectName>> {
        let model = world.model.borrow();
        (0..count).map(|place| model.names(place)).collect()
    };
    let (names, before) = (listing(), health(repository));
    let is_whole = world.mend(repository, all).await;
    count_changes(world, &before, &health(repository));
    world.count(if is_whole {
        Seen::MendedWhole
    } else {
        Seen::NotMended
    });
    if let Some(sealed) = world.sealed.get()
        && !is_whole
        && repository.members[sealed].place().is_away()
    {
        world.count(Seen::WasGone);
    }
    let now = listing();
    for (place, names_now) in now.iter().enumerate() {
        for name in names_now.difference(&names[place]) {
            count_copy(world, place, name, &names);
        }
    }
}

/// Counts how an object came to a place that did not have it before a mend.
fn count_copy(world: &World, place: usize, name: &ObjectName, names: &[BTreeSet<ObjectName>]) {
    if world.written_now.borrow().contains(name) {
        return;
    }
    let model = world.model.borrow();
    let new = model.bytes(place, name);
    let mut sources = (0..names.len()).filter(|source| names[*source].contains(name));
    let Some(first) = sources.next() else { return };
    let as_is = model.bytes(first, name) == new || sources.any(|s| model.bytes(s, name) == new);
    world.count(match (name, as_is) {
        (ObjectName::Pack { .. }, true) => Seen::BackupCopiedAsIs,
        (ObjectName::Pack { .. }, false) => Seen::BackupRepacked,
        (ObjectName::Segment(_) | ObjectName::Piece { .. }, true) => Seen::CopiedAsIs,
        (ObjectName::Segment(_) | ObjectName::Piece { .. }, false) => Seen::EncodedAnew,
        _ => return,
    });
}

/// An error of a read.
pub(super) fn expect_unreadable(world: &World, error: &RepositoryError) {
    if error.lacks_key() && !world.has_identity() {
        world.count(Seen::ReadLocked);
        return;
    }
    assert!(error.is_unreachable(), "no outage: {error:?}");
    world.count(Seen::ReadNot);
}

async fn read(world: &World, repository: &Repository, lot: u64) {
    let Some(name) = world.model.borrow().name_at(lot) else {
        return;
    };
    let before = world.model.borrow().places_with(&name);
    let since = Instant::now();
    match repository.fetch(&name).await {
        Ok(fetched) => {
            let written = world.model.borrow().is_written(&name, &fetched.plain);
            assert!(written, "{name} was read with bytes that nobody wrote");
            world.count(Seen::ReadAll);
            if !before.contains(&0) || world.stores[0].is_out() {
                world.count(Seen::ReadElsewhere);
            }
        }
        Err(error) if error.is_not_found() => {
            let after = world.model.borrow().places_with(&name);
            let there = before.intersection(&after).next();
            if all_were_asked(repository, since) {
                assert_eq!(there, None, "{name} was not found, and is there");
            }
            world.count(Seen::NotThere);
        }
        Err(error) => expect_unreadable(world, &error),
    }
}

/// How far a segment is stored without a break in the places together.
fn reach(world: &World, number: u64) -> BTreeMap<usize, BTreeSet<WalRange>> {
    let model = world.model.borrow();
    let of = |place| {
        let stretches = model.stretches(place, segment(number)).into_iter();
        stretches.map(|(_, range)| range).collect()
    };
    (0..world.stores.len())
        .map(|place| (place, of(place)))
        .collect()
}

/// The end of what was there all the time.
fn reached(
    before: &BTreeMap<usize, BTreeSet<WalRange>>,
    after: &BTreeMap<usize, BTreeSet<WalRange>>,
    start: Lsn,
) -> Lsn {
    let kept = before
        .iter()
        .flat_map(|(place, ranges)| ranges.intersection(&after[place]).copied());
    let mut kept: Vec<WalRange> = kept.collect();
    kept.sort();
    kept.iter().fold(start, |end, range| {
        if range.start <= end {
            end.max(range.end)
        } else {
            end
        }
    })
}

async fn read_segment(world: &World, repository: &Repository, number: u64) {
    let name = segment(number);
    let is_contested = world.contested() == Some(name);
    let (before, since) = (reach(world, number), Instant::now());
    let read = repository.segment_content(name, size(), None).await;
    let content = match read {
        Ok(content) => content,
        Err(RepositoryError::TwoHistories { .. }) if is_contested => return,
        Err(error) => return expect_unreadable(world, &error),
    };
    let bytes = content.as_ref().map_or(&[][..], |content| &content.bytes);
    if !is_contested {
        let wrong = whole(name, 0).iter().zip(bytes).position(|(a, b)| a != b);
        assert_eq!(wrong, None, "segment {number} was read with other bytes");
    }
    if content.as_ref().is_some_and(|content| content.complete) {
        world.count(Seen::WholeSegment);
        assert_eq!(bytes.len(), usize::try_from(SEGMENT).unwrap());
    } else if !bytes.is_empty() {
        world.count(Seen::Pieced);
    }
    if world.lists_at_once() && all_were_asked(repository, since) {
        let must = reached(&before, &reach(world, number), start_of(name));
        let must = must.bytes_since(start_of(name));
        assert!(
            u64::try_from(bytes.len()).unwrap() >= must,
            "of segment {number} {} bytes were read, and {must} are there",
            bytes.len()
        );
    }
}

async fn catalog(world: &World, repository: &Repository) {
    let before: Vec<_> = (1..=CONTESTED).map(|number| reach(world, number)).collect();
    let backups: Vec<_> = world.model.borrow().backups.keys().cloned().collect();
    let since = Instant::now();
    let catalog = match repository.catalog().await {
        Ok(catalog) => catalog,
        Err(error) => return expect_unreadable(world, &error),
    };
    world.count(Seen::Listed);
    if !world.lists_at_once() || !all_were_asked(repository, since) {
        return;
    }
    for id in backups {
        let listed = catalog.backups.iter().any(|backup| backup.id == id);
        assert!(listed, "backup {id} is not in the catalog");
    }
    let wal = catalog
        .timelines
        .get(&timeline(1))
        .cloned()
        .unwrap_or_default();
    for (before, number) in before.iter().zip(1..) {
        let start = start_of(segment(number));
        let must = reached(before, &reach(world, number), start);
        let found = wal.covered_from(start, size());
        assert!(
            found >= must,
            "segment {number}: found={found}, there={must}"
        );
    }
}
