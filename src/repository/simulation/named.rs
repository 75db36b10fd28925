//! Schedules that failed once, by name.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use super::content::{checked, piece, size, timeline, whole};
use super::faults::wait;
use super::faulty::{Conditions, Faulty, Nature, Outage};
use super::model::holders;
use super::schedule::{IDENTITY, PEOPLE};
use super::tally::Tally;
use super::time::Time;
use super::{backups, identity_file};
use crate::clock::Clock;
use crate::repository::destination::Destination;
use crate::repository::keys::EncryptionSettings;
use crate::repository::layout::{BackupId, ObjectName};
use crate::repository::records::BackupRecord;
use crate::repository::store::StoreOptions;
use crate::repository::{
    Acknowledge, EncodedWal, PlaceSettings, Repository, RepositoryError, Stored,
};

pub(super) struct Places {
    pub(super) stores: [Faulty; 2],
    pub(super) time: Arc<Time>,
    folder: tempfile::TempDir,
}

impl Places {
    pub(super) fn new() -> Self {
        Self::of(1)
    }

    /// With the faults of a seed.
    pub(super) fn of(seed: u64) -> Self {
        let (time, tally) = (Arc::new(Time::default()), Arc::new(Tally::new()));
        let nature = Nature {
            conditions: Conditions::Honoured,
            late: Duration::ZERO,
            is_sound: false,
        };
        let store = |number| Faulty::new(number, seed, nature, &time, &tally);
        Self {
            stores: [store(0), store(1)],
            time,
            folder: tempfile::tempdir().unwrap(),
        }
    }

    /// A process that encrypts to these people in the first and in the second place.
    pub(super) async fn repository(&self, people: [&[usize]; 2]) -> Repository {
        let identities = identity_file(self.folder.path());
        let place =
            |number: usize| place(&self.stores[number], number, people[number], &identities);
        let destination = Destination {
            cluster: "main".to_owned(),
            places: vec![place(0), place(1)],
            acknowledge: Acknowledge::All,
        };
        let clock: Arc<dyn Clock> = Arc::<Time>::clone(&self.time);
        let open = destination.open(true, &clock).unwrap();
        open.repository(IDENTITY, false).await.unwrap()
    }

    fn has(&self, place: usize, name: &ObjectName) -> bool {
        let path = format!("main/7/{}", name.path());
        self.stores[place].stored(&path).is_some()
    }
}

fn place(store: &Faulty, number: usize, people: &[usize], identities: &Path) -> PlaceSettings {
    let mut options = StoreOptions::at(format!("s3://place/{number}"));
    options.objects = Some(Arc::new(store.clone()));
    let people = people.iter().map(|person| &PEOPLE[*person]);
    let recipients: Vec<String> = people.map(|one| one.recipient.to_owned()).collect();
    PlaceSettings {
        name: format!("p{number}"),
        store: options,
        wal_level: 2,
        backup_level: 3,
        encryption: EncryptionSettings {
            identity_file: (!recipients.is_empty()).then(|| identities.to_owned()),
            recipients,
            accept_plain: false,
            state_dir: None,
            scope: String::new(),
        },
    }
}

async fn encoded(repository: &Repository, bytes: u16) -> Arc<EncodedWal> {
    let (name, range) = piece(1, 0, bytes.into());
    let plain = whole(super::content::segment(1), 0).slice(..usize::from(bytes));
    let checked = checked(range, &plain);
    let encoded = repository.encode_wal(name, timeline(1), size(), checked);
    encoded.await.unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_place_that_was_never_met_is_met_before_it_is_written_to() {
    // another server's WAL may lie there, or it may be the empty disk below a mount
    let places = Places::new();
    places.stores[1].set_outage(Some(Outage::Refusing));
    let repository = places.repository([&[], &[]]).await;
    places.stores[0].set_outage(Some(Outage::Refusing));
    let wal = encoded(&repository, 512).await;
    let refused = repository.put_wal(&wal).await.unwrap_err();
    assert!(refused.is_unreachable(), "{refused}");
    places.stores[1].set_outage(None);
    repository.put_wal(&wal).await.unwrap();
    assert!(places.has(1, &wal.name) && places.has(1, &ObjectName::Cluster));
}

#[tokio::test(start_paused = true)]
async fn a_place_that_came_back_empty_is_not_written_to() {
    // acknowledged on the wrong disk, WAL would be hidden when the right one comes back
    let places = Places::new();
    let repository = places.repository([&[], &[]]).await;
    for store in &places.stores {
        store.set_outage(Some(Outage::Refusing));
    }
    let wal = encoded(&repository, 512).await;
    repository.put_wal(&wal).await.unwrap_err();
    places.stores[1].empty(true);
    places.stores[1].set_outage(None);
    let gone = repository.put_wal(&wal).await.unwrap_err();
    assert!(gone.is_unreachable(), "{gone}");
    assert!(places.stores[1].paths().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_write_ends_when_its_place_goes_away() {
    // schedule 206304106871074: tried again and again while nobody waits for it, it would come to
    // whatever answers there in the end, and say that this is the place
    let places = Places::new();
    let repository = places.repository([&[], &[]]).await;
    places.stores[1].set_outage(Some(Outage::Refusing));
    let first = encoded(&repository, 512).await;
    let second = encoded(&repository, 1024).await;
    let later = async {
        wait(Duration::from_secs(5)).await;
        repository.put_wal(&second).await
    };
    let swapped = async {
        while !repository.members[1].place().is_away() {
            wait(Duration::from_millis(100)).await;
        }
        places.stores[1].empty(true);
        places.stores[1].set_outage(None);
    };
    let (first, stored, ()) = tokio::join!(repository.put_wal(&first), later, swapped);
    assert_eq!(
        (first.unwrap(), stored.unwrap()),
        (Stored::Partly, Stored::Partly)
    );
    wait(Duration::from_mins(2)).await;
    assert!(!repository.mend(true).await);
    assert!(places.stores[1].paths().is_empty());
    assert_eq!(holders(&second), [0]);
}

#[tokio::test(start_paused = true)]
async fn what_lies_on_another_disk_does_not_pass_for_the_place_that_was_met() {
    // a request that was on its way, or an old copy: the place would be filled up on the wrong disk
    let places = Places::new();
    let repository = places.repository([&[], &[]]).await;
    places.stores[1].set_outage(Some(Outage::Refusing));
    let wal = encoded(&repository, 512).await;
    assert_eq!(repository.put_wal(&wal).await.unwrap(), Stored::Partly);
    places.stores[1].empty(false);
    places.stores[1].set_outage(None);
    let store = repository.members[1].store().unwrap();
    let late = Bytes::from_static(b"late");
    store.create(&wal.name.path(), late).await.unwrap();
    assert!(!repository.mend(true).await);
    assert!(!places.has(1, &ObjectName::Cluster));
}

#[tokio::test(start_paused = true)]
async fn a_copy_of_a_backup_that_was_broken_off_is_finished_in_its_form() {
    // packs that lie there are never written over, and new recipients make longer headers: the
    // backup would never be complete in that place
    let places = Places::new();
    let first = places.repository([&[], &[0]]).await;
    let (record, kept) = backups::of_seed(&first.leader(), "20261120T100000.000Z").await;
    assert!(first.mend(true).await);
    let lost = [
        ObjectName::Backup(record.id.clone()),
        ObjectName::Manifest(record.id.clone()),
    ];
    for name in &lost {
        first.members[1]
            .store()
            .unwrap()
            .delete(&name.path())
            .await
            .unwrap();
    }
    let later = places.repository([&[], &[0, 1]]).await;
    assert!(later.mend(true).await);
    assert!(later.has_everywhere(&record.id).await.unwrap());
    let second = later.only(&later.members[1]);
    let (holder, record) = second.holding(&record.id).await.unwrap().unwrap();
    backups::read(&holder, &record, &kept).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_copy_that_was_broken_off_in_another_form_is_finished_though_it_could_be_copied_as_it_is_now()
 {
    // lists that name places of one form beside packs of another would be refused for ever
    let places = Places::new();
    let first = places.repository([&[0], &[0, 1]]).await;
    let (record, kept) = backups::of_seed(&first.leader(), "20261120T100000.000Z").await;
    assert!(first.mend(true).await);
    let store = first.members[1].store().unwrap();
    let mut lists = 0;
    for path in places.stores[1].paths() {
        let path = path.to_string();
        let below = path.split_once("/7/").map(|(_, below)| below);
        let Some(name) = below.and_then(ObjectName::parse) else {
            continue;
        };
        let is_list = matches!(name, ObjectName::FileList { .. });
        if is_list || matches!(name, ObjectName::Backup(_) | ObjectName::Manifest(_)) {
            lists += u32::from(is_list);
            store.delete(&name.path()).await.unwrap();
        }
    }
    assert!(lists > 0);
    let later = places.repository([&[0], &[0]]).await;
    assert!(later.mend(true).await);
    assert!(later.has_everywhere(&record.id).await.unwrap());
    let second = later.only(&later.members[1]);
    let (holder, record) = second.holding(&record.id).await.unwrap().unwrap();
    backups::read(&holder, &record, &kept).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_backup_that_lacks_a_pack_is_not_copied_as_if_it_were_whole() {
    // a listing that is late, or a pack that somebody removed: the copy would look complete
    let places = Places::new();
    let repository = places.repository([&[], &[]]).await;
    let (record, _) = backups::of_seed(&repository.leader(), "20261120T100000.000Z").await;
    let pack = ObjectName::Pack {
        backup: record.id.clone(),
        number: 0,
    };
    let store = repository.members[0].store().unwrap();
    store.delete(&pack.path()).await.unwrap();
    repository.mend(true).await;
    let id: &BackupId = &record.id;
    assert!(!places.has(1, &ObjectName::Backup(id.clone())));
    assert!(!repository.has_everywhere(id).await.unwrap());
}

#[tokio::test(start_paused = true)]
async fn a_backup_is_copied_with_the_packs_of_others_that_it_refers_to() {
    // as they are stored, and in another form, where frames lie elsewhere; whether the backup that they
    // are of is there, or not
    for keys in [[].as_slice(), &[0]] {
        for first_is_there in [true, false] {
            let places = Places::new();
            let repository = places.repository([&[], keys]).await;
            let leader = repository.leader();
            let (first, kept) = backups::of_seed(&leader, "20261120T100000.000Z").await;
            if first_is_there {
                assert!(repository.mend(true).await);
            }
            let (second, more_kept) =
                backups::after(&leader, (&first, &kept), "20261120T110000.000Z").await;
            let shared: u64 = second.shared_packs.iter().map(|packs| packs.bytes).sum();
            assert!(shared > 0);
            if !first_is_there {
                let store = repository.members[0].store().unwrap();
                let record = ObjectName::Backup(first.id.clone());
                store.delete(&record.path()).await.unwrap();
            }
            assert!(repository.mend(true).await);
            let copy = repository.only(&repository.members[1]);
            let (holder, record) = copy.holding(&second.id).await.unwrap().unwrap();
            backups::read(&holder, &record, &more_kept).await.unwrap();
            assert_eq!(record.owners(), second.owners());
            let of_first = copy.holding(&first.id).await.unwrap();
            assert_eq!(of_first.is_some(), first_is_there);
            if let Some((holder, record)) = of_first {
                backups::read(&holder, &record, &kept).await.unwrap();
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_backup_is_copied_where_what_it_shares_lies_in_another_form() {
    // the other place's recipient has changed since the first copy, whose packs stay as they are
    let places = Places::new();
    let before = places.repository([&[], &[1]]).await;
    let (first, kept) = backups::of_seed(&before.leader(), "20261120T100000.000Z").await;
    assert!(before.mend(true).await);
    let after = places.repository([&[], &[0]]).await;
    let (second, kept) =
        backups::after(&after.leader(), (&first, &kept), "20261120T110000.000Z").await;
    assert!(!second.shared_packs.is_empty());
    assert!(after.mend(true).await);
    let copy = after.only(&after.members[1]);
    let (holder, record) = copy.holding(&second.id).await.unwrap().unwrap();
    backups::read(&holder, &record, &kept).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_backup_whose_shared_pack_is_gone_is_not_committed_nor_taken_for_whole() {
    let places = Places::new();
    let repository = places.repository([&[], &[]]).await;
    let leader = repository.leader();
    let (first, kept) = backups::of_seed(&leader, "20261120T100000.000Z").await;
    let (second, _) = backups::after(&leader, (&first, &kept), "20261120T110000.000Z").await;
    let listed = leader.backups().await.unwrap();
    assert_eq!(listed.readable.len(), 2);
    let pack = ObjectName::Pack {
        backup: first.id.clone(),
        number: 0,
    };
    let store = repository.members[0].store().unwrap();
    store.delete(&pack.path()).await.unwrap();
    let listed = leader.backups().await.unwrap();
    assert!(listed.readable.is_empty());
    assert!(
        listed.left_out[1].reason.contains(&pack.path()),
        "{:?}",
        listed.left_out
    );
    let recipe = leader.backup_recipe().await.unwrap();
    let third = BackupRecord {
        id: "20261120T120000.000Z".parse().unwrap(),
        ..second
    };
    let refused = leader.commit_backup(&third, &recipe).await.unwrap_err();
    assert!(refused.is_damage(), "{refused}");
    assert!(!places.has(0, &ObjectName::Backup(third.id)));
}

#[tokio::test(start_paused = true)]
async fn nothing_is_removed_where_a_record_cannot_be_read() {
    // what it refers to is not known; and marks that stay would keep later backups from sharing
    let places = Places::new();
    let repository = places.repository([&[], &[]]).await;
    let leader = repository.leader();
    let (first, kept) = backups::of_seed(&leader, "20261120T100000.000Z").await;
    let (second, _) = backups::after(&leader, (&first, &kept), "20261120T110000.000Z").await;
    let store = repository.members[0].store().unwrap();
    let record = ObjectName::Backup(second.id.clone());
    let whole = store.get(&record.path()).await.unwrap();
    store.delete(&record.path()).await.unwrap();
    let damaged = Bytes::from_static(b"{}");
    store.create(&record.path(), damaged).await.unwrap();
    let before = places.stores[0].paths();
    let now = Clock::now(&*places.time);
    let refused = leader.remove_backup(&first.id, now).await.unwrap_err();
    assert!(refused.is_damage(), "{refused}");
    assert_eq!(places.stores[0].paths(), before);

    store.delete(&record.path()).await.unwrap();
    store.create(&record.path(), whole).await.unwrap();
    let removed = leader.remove_backup(&first.id, now).await.unwrap();
    assert_eq!((removed.packs, removed.spared.len()), (0, 0), "{removed:?}");
    let left = leader.backups().await.unwrap();
    assert!(left.left_out.is_empty(), "{:?}", left.left_out);
    assert_eq!(left.readable, [second]);
}

#[tokio::test(start_paused = true)]
async fn other_content_under_a_name_is_refused_and_leaves_the_first() {
    let places = Places::new();
    let repository = places.repository([&[], &[0]]).await;
    let wal = encoded(&repository, 512).await;
    repository.put_wal(&wal).await.unwrap();
    let (name, range) = piece(1, 0, 512);
    let other = Bytes::from(vec![0xff; 512]);
    let checked = checked(range, &other);
    let other = repository.encode_wal(name, timeline(1), size(), checked);
    let refused = repository.put_wal(&other.await.unwrap()).await;
    assert!(matches!(refused, Err(RepositoryError::Conflict { .. })));
    let first = repository.fetch(&wal.name).await.unwrap().plain;
    assert_eq!(first, wal.checked.bytes());
}
