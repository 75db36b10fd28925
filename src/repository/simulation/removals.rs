//! Backups that are taken and removed side by side, and killed meanwhile: every one that exists is whole.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use futures_util::future::{LocalBoxFuture, join_all};
use tokio::time::timeout;

use super::backups::{self, Taken};
use super::faults::wait;
use super::lots::Lots;
use super::model::KeptBackup;
use super::named::Places;
use super::{UnderWay, setting, show_all};
use crate::repository::layout::{BackupId, ObjectName};
use crate::repository::{Repository, RepositoryError};

/// How many orders of events; the full count is asked for.
const ORDERS: u64 = 400;
const BACKUPS: u64 = 6;
const REMOVALS: u64 = 4;
/// What was given up lands within two minutes.
const SETTLED: Duration = Duration::from_mins(3);

/// How often it came to what the rules are for.
#[derive(Debug, Default)]
struct Seen {
    shared: Cell<u32>,
    removed: Cell<u32>,
    packs_gone: Cell<u32>,
    packs_kept: Cell<u32>,
    spared: Cell<u32>,
    refused: Cell<u32>,
    failed: Cell<u32>,
    killed: Cell<u32>,
    unfinished: Cell<u32>,
    used: Cell<u32>,
}

fn count(cell: &Cell<u32>) {
    cell.set(cell.get() + 1);
}

#[tokio::test(start_paused = true)]
async fn in_whatever_order_backups_are_taken_and_removed_those_that_exist_are_whole() {
    // a pack that goes while another backup refers to it is the loss of that one, found on the day that it
    // is needed
    let seen = Seen::default();
    let under_way = UnderWay::begin();
    if let Some(seed) = setting("ANYWHEN_SCHEDULE_SEED") {
        show_all();
        return one_order(seed, &seen).await;
    }
    let seed = setting("ANYWHEN_SEED").unwrap_or(1);
    let orders = setting("ANYWHEN_SCHEDULES").unwrap_or(ORDERS).min(5000);
    for number in 0..orders {
        one_order(Lots::of(seed, number).next() >> 16, &seen).await;
    }
    drop(under_way);
    let counts = [
        &seen.shared,
        &seen.removed,
        &seen.packs_gone,
        &seen.packs_kept,
        &seen.spared,
        &seen.refused,
        &seen.failed,
        &seen.killed,
        &seen.unfinished,
        &seen.used,
    ];
    assert!(counts.iter().all(|count| count.get() > 0), "{seen:?}");
}

#[tokio::test(start_paused = true)]
async fn a_failed_backup_that_was_offered_unheard_leaves_what_another_refers_to() {
    // its offer was stored and the answer lost: the next backup used it, and removed the offer
    let places = Places::new();
    let leader = places.repository([&[], &[]]).await.leader();
    let (failed, kept) = backups::of_seed(&leader, "20261120T100000.000Z").await;
    let store = leader.first().store().unwrap();
    let record = ObjectName::Backup(failed.id.clone());
    store.delete(&record.path()).await.unwrap();
    leader.keep_unfinished(&failed).await.unwrap();
    let (next, all_kept) = backups::after(&leader, (&failed, &kept), "20261120T110000.000Z").await;
    assert_eq!(next.owners(), BTreeSet::from([failed.id.clone()]));
    let now = places.time.now_by_the_clock();
    leader.remove_unfinished(&next.id, now).await.unwrap();
    let offer = ObjectName::Unfinished(failed.id.clone());
    assert!(store.get(&offer.path()).await.is_err());

    leader.discard_backup(&failed.id, true, now).await.unwrap();
    backups::read(&leader, &next, &all_kept).await.unwrap();
    assert_eq!(leader.backups().await.unwrap().readable.len(), 1);
}

async fn one_order(seed: u64, seen: &Seen) {
    let mut lots = Lots::of(seed, "removals");
    let places = Places::of(seed);
    places.time.begin();
    let leader = places.repository([&[], &[]]).await.leader();
    let (known, asked) = (RefCell::default(), RefCell::default());
    // what is slow lets the others go far ahead
    places.stores[0].set_faults(lots.below(300));
    let mut all: Vec<LocalBoxFuture<'_, ()>> = Vec::new();
    for number in 0..BACKUPS + REMOVALS {
        let begins = lots.millis(0, 2500);
        let ends = lots.chance(150).then(|| lots.millis(50, 1500));
        let lot = lots.next();
        let (leader, known, asked, places) = (&leader, &known, &asked, &places);
        all.push(Box::pin(async move {
            wait(begins).await;
            let doing: LocalBoxFuture<'_, ()> = if number < BACKUPS {
                Box::pin(take(leader, places, lot, known, seen))
            } else {
                Box::pin(remove(leader, places, lot, (asked, seen)))
            };
            match ends {
                None => doing.await,
                Some(end) => {
                    if timeout(end, doing).await.is_err() {
                        count(&seen.killed);
                    }
                }
            }
        }));
    }
    join_all(all).await;
    places.stores[0].set_faults(0);
    wait(SETTLED).await;
    let backups = leader.backups().await.unwrap();
    for left_out in &backups.left_out {
        // its record was given up when it was first written, and lands once it was removed
        let was_removed = asked.borrow().contains(&left_out.id);
        assert!(
            was_removed,
            "order {seed}: {left_out:?}. run it alone with ANYWHEN_SCHEDULE_SEED={seed}"
        );
    }
    let known: BTreeMap<BackupId, KeptBackup> = known.take();
    for record in &backups.readable {
        let kept = &known[&record.id];
        let read = backups::read(&leader, record, kept).await;
        read.unwrap_or_else(|error| panic!("order {seed}: backup {}: {error:?}", record.id));
    }
}

async fn take(
    leader: &Repository,
    places: &Places,
    lot: u64,
    known: &RefCell<BTreeMap<BackupId, KeptBackup>>,
    seen: &Seen,
) {
    match backups::take_beside(leader, &places.time, lot, known).await {
        Ok(Taken::Unfinished) => count(&seen.unfinished),
        Ok(Taken::Whole {
            record,
            uses_unfinished,
        }) => {
            if !record.shared_packs.is_empty() {
                count(&seen.shared);
            }
            if uses_unfinished {
                count(&seen.used);
            }
        }
        Err(error) if error.is_damage() => count(&seen.refused),
        Err(error) if error.is_unreachable() => count(&seen.failed),
        // it existed, and was removed before its first answer came
        Err(error) if error.is_not_found() => {}
        // another one began in the same millisecond, and failed at once
        Err(RepositoryError::Conflict { .. }) => count(&seen.failed),
        Err(error) => panic!("{error:?}"),
    }
}

async fn remove(
    leader: &Repository,
    places: &Places,
    lot: u64,
    (asked, seen): (&RefCell<BTreeSet<BackupId>>, &Seen),
) {
    let Ok(backups) = leader.backup_records().await else {
        return count(&seen.failed);
    };
    let there = u64::try_from(backups.readable.len()).unwrap();
    let Some(nth) = lot.checked_rem(there) else {
        return;
    };
    let record = &backups.readable[usize::try_from(nth).unwrap()];
    asked.borrow_mut().insert(record.id.clone());
    match leader
        .remove_backup(&record.id, places.time.now_by_the_clock())
        .await
    {
        Ok(removed) => {
            count(&seen.removed);
            if removed.packs > 0 {
                count(&seen.packs_gone);
            } else if removed.spared.is_empty() {
                count(&seen.packs_kept);
            }
            if !removed.spared.is_empty() {
                count(&seen.spared);
            }
        }
        Err(error) if error.is_unreachable() => count(&seen.failed),
        // another removal was faster
        Err(error) if error.is_not_found() => {}
        Err(error) => panic!("{error:?}"),
    }
}
