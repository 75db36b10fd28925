//! One schedule: its places and their nature, the processes that come and go, and the calm at its
//! end, in which everything must be found again.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::{Instant, timeout};

use super::backups;
use super::content::{CONTESTED, segment};
use super::faulty::{Conditions, Faulty, Nature};
use super::lots::Lots;
use super::model::Model;
use super::steps::Step;
use super::tally::{Seen, Tally};
use super::time::Time;
use crate::clock::Clock;
use crate::repository::destination::{Destination, OpenDestination};
use crate::repository::keys::EncryptionSettings;
use crate::repository::layout::ObjectName;
use crate::repository::store::StoreOptions;
use crate::repository::{Acknowledge, PlaceSettings, Repository, RepositoryError, ServerIdentity};

/// Somebody who can read what is encrypted to them.
#[derive(Debug)]
pub(super) struct Person {
    pub(super) recipient: &'static str,
    pub(super) secret: &'static str,
}

/// Two people of the simulation; they guard nothing else.
pub(super) const PEOPLE: [Person; 2] = [
    Person {
        recipient: "age1qsgnpdh7d65ppdjjvelhtt328lu78k7ncudjlflaj56tjkcu09jq2na8nv",
        secret: "AGE-SECRET-KEY-16A8VYJX8DHGXHUD25HRR50DHUKWF0U7JUA3279ZVVKFRE09RXUUSTEXVAP",
    },
    Person {
        recipient: "age19y7dprqh084nwxac6065cjuzqkzw7n0ur4m5gk545mkwd48hdcasf2jq0k",
        secret: "AGE-SECRET-KEY-1EX29Z4NJZCG5NNTN2N7WEPESSZ2MS2R62G0JV3LGQMQ4K6LN83GSAV9X93",
    },
];

pub(super) const IDENTITY: ServerIdentity = ServerIdentity {
    system_id: 7,
    major: 18,
    block_bytes: 8192,
};

/// Within this time everything that was given up has landed, and every listing has caught up.
const CALM: Duration = Duration::from_mins(10);

/// One place.
#[derive(Debug, Clone)]
struct PlaceKind {
    nature: Nature,
    /// Whom it is encrypted to, by number.
    people: Vec<usize>,
    level: i32,
}

/// What a schedule is about.
#[derive(Debug)]
struct Setting {
    places: Vec<PlaceKind>,
    acknowledge: Acknowledge,
    has_identity: bool,
    keeps_state: bool,
    has_rogue: bool,
    faults: u64,
}

impl Setting {
    fn draw(lots: &mut Lots) -> Self {
        let count = lots.pick(&[1, 2, 2, 2, 3, 3]);
        let late = lots.chance(200);
        let sound = lots.chance(300).then(|| lots.index(count));
        let encryption = lots.below(10);
        let alike = lots.chance(500);
        let kind = |place: usize, lots: &mut Lots| {
            let conditions = match lots.below(10) {
                0 => Conditions::Ignored,
                1 => Conditions::Unknown,
                _ => Conditions::Honoured,
            };
            let nature = Nature {
                conditions,
                late: if late {
                    lots.millis(0, 20_000)
                } else {
                    Duration::ZERO
                },
                is_sound: sound == Some(place),
            };
            let people = match encryption {
                0..=3 => vec![],
                4..=6 => vec![0],
                7..=8 => [vec![0], vec![1], vec![0, 1]][place].clone(),
                _ => [vec![], vec![0], vec![1]][place].clone(),
            };
            let level = if alike { 2 } else { lots.pick(&[1, 2, 5]) };
            PlaceKind {
                nature,
                people,
                level,
            }
        };
        let has_rogue = lots.chance(150);
        let mut places: Vec<PlaceKind> = (0..count).map(|place| kind(place, lots)).collect();
        if has_rogue {
            // two archivers are not kept apart where conditions are ignored
            for place in &mut places {
                place.nature.conditions = Conditions::Honoured;
            }
        }
        Self {
            places,
            acknowledge: lots.pick(&[Acknowledge::All, Acknowledge::Any]),
            has_identity: lots.chance(850),
            keeps_state: lots.chance(300),
            has_rogue,
            faults: lots.pick(&[0, 30, 100, 250]),
        }
    }
}

/// Everything that a schedule has.
pub(super) struct World {
    setting: Setting,
    pub(super) stores: Vec<Faulty>,
    pub(super) time: Arc<Time>,
    pub(super) tally: Arc<Tally>,
    pub(super) model: RefCell<Model>,
    /// What steps of this round write.
    pub(super) written_now: RefCell<BTreeSet<ObjectName>>,
    /// A place that lost everything while a process knew it: nobody but that process may act.
    pub(super) sealed: Cell<Option<usize>>,
    /// Held by who mends, where stores ignore conditions: two who copy one backup to such a store
    /// are not kept apart.
    mending: tokio::sync::Mutex<()>,
    /// Everybody is a recipient by now.
    all_people: Cell<bool>,
    identity_file: PathBuf,
    state_dir: Option<tempfile::TempDir>,
}

impl World {
    fn new(seed: u64, lots: &mut Lots, identity_file: PathBuf, tally: &Arc<Tally>) -> Self {
        let setting = Setting::draw(lots);
        tracing::debug!("{setting:?}");
        let time = Arc::new(Time::default());
        let numbered = setting.places.iter().enumerate();
        let stores: Vec<Faulty> = numbered
            .map(|(number, place)| Faulty::new(number, seed, place.nature, &time, tally))
            .collect();
        Self {
            model: RefCell::new(Model::new(&stores)),
            state_dir: setting.keeps_state.then(|| tempfile::tempdir().unwrap()),
            setting,
            stores,
            time,
            tally: Arc::clone(tally),
            written_now: RefCell::default(),
            sealed: Cell::new(None),
            mending: tokio::sync::Mutex::new(()),
            all_people: Cell::new(false),
            identity_file,
        }
    }

    pub(super) fn has_rogue(&self) -> bool {
        self.setting.has_rogue
    }

    /// The archiver can read what it writes.
    pub(super) fn has_identity(&self) -> bool {
        self.setting.has_identity
    }

    /// A mend, alone where it has to be.
    pub(super) async fn mend(&self, repository: &Repository, all: bool) -> bool {
        let honours = |store: &Faulty| store.nature().conditions == Conditions::Honoured;
        if self.stores.iter().all(honours) {
            return repository.mend(all).await;
        }
        let _alone = self.mending.lock().await;
        repository.mend(all).await
    }

    /// Listings show what is there.
    pub(super) fn lists_at_once(&self) -> bool {
        self.stores
            .iter()
            .all(|store| store.nature().late.is_zero())
    }

    /// A mend can make all places alike.
    fn can_converge(&self) -> bool {
        let kinds = &self.setting.places;
        let alike = kinds.iter().all(|kind| kind.people == kinds[0].people);
        self.setting.has_identity || alike
    }

    /// What a mend calls whole is whole.
    pub(super) fn whole_is_whole(&self) -> bool {
        self.lists_at_once() && self.can_converge()
    }

    /// The segment that places may disagree about.
    pub(super) fn contested(&self) -> Option<wal::SegmentName> {
        self.setting.has_rogue.then(|| segment(CONTESTED))
    }

    fn place(&self, number: usize, reads: bool) -> PlaceSettings {
        let kind = &self.setting.places[number];
        let mut store = StoreOptions::at(format!("s3://place/{number}"));
        store.objects = Some(Arc::new(self.stores[number].clone()));
        let mut people = kind.people.clone();
        if self.all_people.get() && !people.is_empty() {
            people = vec![0, 1];
        }
        let encrypts = !people.is_empty();
        let state_dir = self.state_dir.as_ref().map(|dir| dir.path().to_owned());
        PlaceSettings {
            name: format!("p{number}"),
            store,
            wal_level: kind.level,
            backup_level: kind.level,
            encryption: EncryptionSettings {
                recipients: people
                    .iter()
                    .map(|person| PEOPLE[*person].recipient.to_owned())
                    .collect(),
                identity_file: (encrypts && (reads || self.setting.has_identity))
                    .then(|| self.identity_file.clone()),
                accept_plain: false,
                state_dir: state_dir.filter(|_| !reads),
                scope: String::new(),
            },
        }
    }

    /// A process opens its places.
    pub(super) fn open(&self) -> OpenDestination {
        self.open_places((0..self.stores.len()).map(|number| self.place(number, false)))
    }

    /// Somebody reads one place alone.
    fn open_one(&self, number: usize) -> OpenDestination {
        self.open_places([self.place(number, true)])
    }

    fn open_places(&self, places: impl IntoIterator<Item = PlaceSettings>) -> OpenDestination {
        let destination = Destination {
            cluster: "main".to_owned(),
            places: places.into_iter().collect(),
            acknowledge: self.setting.acknowledge,
        };
        let clock: Arc<dyn Clock> = Arc::<Time>::clone(&self.time);
        destination.open(true, &clock).unwrap()
    }

    pub(super) fn count(&self, seen: Seen) {
        self.tally.count(seen);
    }

    /// What must hold at any time.
    fn check(&self) {
        let mut model = self.model.borrow_mut();
        model.check().unwrap_or_else(|wrong| panic!("{wrong}"));
        for _ in 0..model.take_late_holders() {
            self.count(Seen::LateHolder);
        }
        for (number, kind) in self.setting.places.iter().enumerate() {
            let sealed = model.check_sealed(number, !kind.people.is_empty());
            sealed.unwrap_or_else(|wrong| panic!("{wrong}"));
        }
    }

    /// What must hold between the rounds of a process.
    fn check_process(&self, repository: &Repository) {
        self.check();
        if repository.is_whole() && self.whole_is_whole() && self.stores.len() > 1 {
            let alike = self.model.borrow_mut().check_alike(self.contested());
            alike.unwrap_or_else(|wrong| panic!("said to be whole: {wrong}"));
        }
        for (store, member) in self.stores.iter().zip(&repository.members) {
            let is_sound = store.nature().is_sound;
            assert!(
                !is_sound || !member.place().is_away(),
                "{store}, which answers, was given up"
            );
        }
    }
}

/// Runs one schedule.
pub(super) fn run(seed: u64, identity_file: PathBuf, tally: &Arc<Tally>) {
    crate::retry::replayed::begin(seed);
    let mut lots = Lots::new(seed);
    let world = World::new(seed, &mut lots, identity_file, tally);
    for _ in 0..lots.between(1, 4) {
        let life = Life::draw(&mut lots, &world);
        in_runtime(&world, life.run(&world));
        world.model.borrow_mut().process_ends();
        between_lives(&world, &mut lots);
        world.check();
    }
    in_runtime(&world, calm(&world));
}

fn in_runtime<F: Future<Output = ()>>(world: &World, what: F) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap();
    runtime.block_on(async {
        world.time.begin();
        what.await;
        world.time.end();
    });
    // what goes on beside ends here, as with a process
}

fn between_lives(world: &World, lots: &mut Lots) {
    world.sealed.set(None);
    for store in &world.stores {
        store.unseal();
    }
    if lots.chance(100) && world.stores.len() > 1 {
        let place = lots.index(world.stores.len());
        if !world.stores[place].nature().is_sound {
            world.stores[place].empty(false);
            world.model.borrow_mut().emptied(place);
        }
    }
    if lots.chance(150) {
        world.time.next_day();
        world.count(Seen::DayChanged);
    }
    if lots.chance(100) && !world.all_people.replace(true) {
        world.count(Seen::RecipientAdded);
    }
    world.time.pass(lots.millis(0, 60_000));
}

/// What happens while one process lives.
struct Life {
    rounds: Vec<Vec<(Duration, Step)>>,
    /// Killed so long after it began.
    ends: Option<Duration>,
    /// For what is drawn between rounds.
    lots: Lots,
}

impl Life {
    fn draw(lots: &mut Lots, world: &World) -> Self {
        let rounds = (0..lots.between(1, 5)).map(|_| {
            let steps = (0..lots.between(1, 6)).map(|_| {
                let step = Step::draw(lots, world);
                (lots.millis(0, 3000), step)
            });
            steps.collect()
        });
        Self {
            rounds: rounds.collect(),
            ends: lots.chance(400).then(|| lots.millis(100, 60_000)),
            lots: Lots::new(lots.next()),
        }
    }

    async fn run(mut self, world: &World) {
        let end = self.ends;
        let going = self.go_on(world);
        match end {
            None => going.await,
            Some(end) => {
                if timeout(end, going).await.is_err() {
                    world.count(Seen::Killed);
                    return;
                }
            }
        }
        world.count(Seen::Ended);
    }

    async fn go_on(&mut self, world: &World) {
        for store in &world.stores {
            store.set_faults(world.setting.faults);
        }
        let open = world.open();
        let Some(repository) = prepared(&open).await else {
            return;
        };
        for round in &self.rounds {
            tracing::debug!("{:?}: {round:?}", world.time.now());
            world.written_now.borrow_mut().clear();
            let before = health(&repository);
            let steps = round.iter().map(|(delay, step)| {
                let repository = &repository;
                async move {
                    tokio::time::sleep_until(Instant::now() + *delay).await;
                    step.run(world, repository).await;
                }
            });
            join_all(steps).await;
            count_changes(world, &before, &health(&repository));
            world.check_process(&repository);
            lose_a_place(world, &repository, &mut self.lots);
        }
    }
}

/// A repository that can be written to, at the third attempt at the latest.
async fn prepared(open: &OpenDestination) -> Option<Repository> {
    for _ in 0..3 {
        match open.repository(IDENTITY, false).await {
            Ok(repository) => return Some(repository),
            Err(error) if error.is_unreachable() => {
                tokio::time::sleep_until(Instant::now() + Duration::from_secs(5)).await;
            }
            Err(error) => panic!("cannot be prepared: {error:?}"),
        }
    }
    None
}

/// A place that a process knows to be away comes back without anything in it.
fn lose_a_place(world: &World, repository: &Repository, lots: &mut Lots) {
    let waits = repository.acknowledge() == Acknowledge::All && !world.has_rogue();
    if world.stores.len() < 2 || !waits || world.sealed.get().is_some() || !lots.chance(300) {
        return;
    }
    let members = repository.members.iter().enumerate();
    let mut away =
        members.filter(|(_, member)| member.place().is_away() && member.place().was_met());
    if let Some((place, _)) = away.next() {
        world.stores[place].empty(true);
        world.stores[place].set_outage(None);
        world.sealed.set(Some(place));
        world.model.borrow_mut().emptied(place);
    }
}

/// Whether each place is away, and whether it is whole.
pub(super) fn health(repository: &Repository) -> Vec<(bool, bool)> {
    let members = repository.members.iter();
    members
        .map(|member| (member.place().is_away(), member.place().is_whole()))
        .collect()
}

pub(super) fn count_changes(world: &World, before: &[(bool, bool)], after: &[(bool, bool)]) {
    for (before, after) in before.iter().zip(after) {
        match (before.0, after.0) {
            (false, true) => world.count(Seen::FellBehind),
            (true, false) => world.count(Seen::CameBack),
            _ => {}
        }
        if !before.1 && after.1 {
            world.count(Seen::FilledUp);
        }
    }
}

/// The faults end: all places are filled up, and give back what they hold.
async fn calm(world: &World) {
    for store in &world.stores {
        store.set_faults(0);
        store.set_outage(None);
    }
    tokio::time::sleep_until(Instant::now() + CALM).await;
    world.check();
    let open = world.open();
    let repository = open.repository(IDENTITY, false).await;
    let repository = repository.unwrap_or_else(|error| panic!("in the calm: {error:?}"));
    let mut is_whole = false;
    for _ in 0..3 {
        // what was copied is listed late too
        tokio::time::sleep_until(Instant::now() + CALM).await;
        is_whole = repository.mend(true).await;
    }
    if world.can_converge() {
        assert!(is_whole, "not whole after a mend in the calm");
        let mut model = world.model.borrow_mut();
        let alike = model.check_alike(world.contested());
        alike.unwrap_or_else(|wrong| panic!("in the calm: {wrong}"));
        let alike = model.check_backups(model.backups.keys());
        alike.unwrap_or_else(|wrong| panic!("in the calm: {wrong}"));
    }
    if world.whole_is_whole() && world.contested().is_none() {
        for place in repository.places().await {
            assert_eq!(place.missing, Ok(0), "{}", place.name);
        }
    }
    world.check();
    for number in 0..world.stores.len() {
        read_back(world, number).await;
    }
}

/// One place alone gives back all that it owes.
async fn read_back(world: &World, number: usize) {
    let open = world.open_one(number);
    let reader = match open.stored(None).await {
        Ok(reader) => reader,
        Err(error) => panic!("place {number} in the calm: {error:?}"),
    };
    let owed = world.model.borrow().owed(number, world.can_converge());
    for (name, plain) in owed {
        let is_contested =
            world.contested().is_some() && super::model::segment_of(&name) == world.contested();
        match reader.fetch(&name).await {
            Ok(fetched) if fetched.plain == plain => {}
            Ok(_) if is_contested => {}
            Ok(_) => panic!("place {number} gives other bytes for {name}"),
            Err(error) if error.is_not_found() => {
                let covered = world.model.borrow().gives(number, &name, &plain);
                assert!(covered || is_contested, "place {number} has no {name}");
            }
            Err(error) => panic!("place {number} does not give {name}: {error:?}"),
        }
    }
    let backups = world.model.borrow().backups.clone();
    for (id, backup) in backups {
        if !backup.places.contains(&number) && !world.can_converge() {
            continue;
        }
        match reader.holding(&id).await {
            Ok(Some((repository, record))) => {
                let read = backups::read(&repository, &record, &backup).await;
                read.unwrap_or_else(|error| panic!("backup {id} in place {number}: {error:?}"));
            }
            other => panic!("backup {id} in place {number}: {other:?}"),
        }
    }
    let catalog = reader.catalog().await;
    let known: Result<_, RepositoryError> = catalog.map(|catalog| catalog.backups.len());
    known.unwrap_or_else(|error| panic!("the catalog of place {number}: {error:?}"));
}
