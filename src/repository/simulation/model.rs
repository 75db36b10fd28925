//! What must hold whatever happens: who has acknowledged what, and what was written under which
//! name.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use bytes::Bytes;
use wal::{SegmentName, WalRange};

use super::content::{SEGMENT, start_of};
use super::faulty::Faulty;
use crate::repository::layout::{BackupId, ObjectName};
use crate::repository::{EncodedWal, Repository, stretch};

/// Where the objects of the simulated system lie in a store.
const BASE: &str = "main/7/";

/// What is known of one content of one name.
#[derive(Debug, Default)]
struct Held {
    /// The places that have acknowledged it.
    places: BTreeSet<usize>,
    /// In this process: more places may follow.
    wal: Option<Arc<EncodedWal>>,
    /// How many places had it when a writer was told so.
    told: Option<usize>,
}

/// A backup that was committed.
#[derive(Debug, Clone)]
pub(super) struct KeptBackup {
    /// The places that must hold it.
    pub(super) places: BTreeSet<usize>,
    /// Its label.
    pub(super) label: String,
    /// Its files, in the order of the manifest.
    pub(super) files: Vec<(String, Bytes)>,
}

/// What must hold.
pub(super) struct Model {
    stores: Vec<Faulty>,
    /// Plain bytes by digest.
    plains: HashMap<String, Bytes>,
    /// The contents that were written, or could be, under a name.
    written: BTreeMap<ObjectName, BTreeSet<String>>,
    held: BTreeMap<(ObjectName, String), Held>,
    /// Small objects, and the places that held them when they were acknowledged.
    small: BTreeMap<ObjectName, BTreeSet<usize>>,
    /// How many acknowledgements of slower places came after the writer was told.
    late_holders: usize,
    pub(super) backups: BTreeMap<BackupId, KeptBackup>,
}

impl Model {
    pub(super) fn new(stores: &[Faulty]) -> Self {
        Self {
            stores: stores.to_vec(),
            plains: HashMap::new(),
            written: BTreeMap::new(),
            held: BTreeMap::new(),
            small: BTreeMap::new(),
            late_holders: 0,
            backups: BTreeMap::new(),
        }
    }

    /// Somebody begins to write this; its digest.
    pub(super) fn writes(&mut self, name: &ObjectName, plain: &Bytes) -> String {
        let digest = container::digest(plain);
        self.plains.insert(digest.clone(), plain.clone());
        let written = self.written.entry(name.clone()).or_default();
        written.insert(digest.clone());
        digest
    }

    /// The places that take it have acknowledged it.
    pub(super) fn follows(&mut self, wal: &Arc<EncodedWal>) {
        let key = (wal.name.clone(), wal.digest().to_owned());
        let held = self.held.entry(key).or_default();
        held.places.extend(holders(wal));
        held.wal = Some(Arc::clone(wal));
    }

    /// What a process was told later is told no more.
    pub(super) fn process_ends(&mut self) {
        self.hear();
        for held in self.held.values_mut() {
            held.wal = None;
            held.told = None;
        }
    }

    fn hear(&mut self) {
        for held in self.held.values_mut() {
            if let Some(wal) = &held.wal {
                held.places.extend(holders(wal));
            }
            if let Some(told) = &mut held.told {
                let more = held.places.len().saturating_sub(*told);
                self.late_holders += more;
                *told += more;
            }
        }
    }

    /// The writer is told that it is stored.
    pub(super) fn is_told(&mut self, wal: &EncodedWal) {
        self.hear();
        let key = (wal.name.clone(), wal.digest().to_owned());
        if let Some(held) = self.held.get_mut(&key) {
            held.told = Some(held.places.len());
        }
    }

    /// The acknowledgements that came late, since this was last asked.
    pub(super) fn take_late_holders(&mut self) -> usize {
        std::mem::take(&mut self.late_holders)
    }

    /// A small object was acknowledged: those that hold it now must go on holding it.
    pub(super) fn small_is_kept(&mut self, name: &ObjectName) -> Result<(), String> {
        let there = self.places_with(name);
        if there.is_empty() {
            return Err(format!("{name} was acknowledged, and no place holds it"));
        }
        self.small.entry(name.clone()).or_default().extend(there);
        Ok(())
    }

    /// What a place held is gone, and nobody is to blame but the disk.
    pub(super) fn emptied(&mut self, place: usize) {
        self.process_ends();
        for held in self.held.values_mut() {
            held.places.remove(&place);
        }
        self.held.retain(|_, held| !held.places.is_empty());
        for places in self.small.values_mut() {
            places.remove(&place);
        }
        self.small.retain(|_, places| !places.is_empty());
        for backup in self.backups.values_mut() {
            backup.places.remove(&place);
        }
        self.backups.retain(|_, backup| !backup.places.is_empty());
    }

    /// The places that hold an object of this name now.
    pub(super) fn places_with(&self, name: &ObjectName) -> BTreeSet<usize> {
        let path = path_of(name);
        let numbered = self.stores.iter().enumerate();
        let there = numbered.filter(|(_, store)| store.stored(&path).is_some());
        there.map(|(number, _)| number).collect()
    }

    /// The digests that a name may have.
    pub(super) fn is_written(&self, name: &ObjectName, plain: &[u8]) -> bool {
        let digest = container::digest(plain);
        let written = self.written.get(name);
        written.is_some_and(|written| written.contains(&digest))
    }

    /// Some name that was written.
    pub(super) fn name_at(&self, lot: u64) -> Option<ObjectName> {
        let count = u64::try_from(self.written.len()).unwrap();
        let at = usize::try_from(lot.checked_rem(count)?).unwrap();
        self.written.keys().nth(at).cloned()
    }

    fn digest_at(&self, place: usize, name: &ObjectName) -> Option<String> {
        let bytes = self.stores[place].stored(&path_of(name))?;
        let size = u64::try_from(bytes.len()).unwrap();
        match container::read_trailer(&bytes, size) {
            Ok(container::Reading::Done(trailer)) => Some(trailer.digest),
            other => panic!("{name} in place {place} is no whole object: {other:?}"),
        }
    }

    /// The names of one segment's stretches in a place.
    pub(super) fn stretches(
        &self,
        place: usize,
        segment: SegmentName,
    ) -> Vec<(ObjectName, WalRange)> {
        let paths = self.stores[place].paths();
        let names = paths.iter().filter_map(|path| name_of(path.as_ref()));
        names
            .filter_map(|name| match name {
                ObjectName::Segment(s) if s == segment => {
                    let start = start_of(segment);
                    let range = WalRange::new(start, start.saturating_add(SEGMENT));
                    Some((name, range))
                }
                ObjectName::Piece { segment: s, range } if s == segment => Some((name, range)),
                _ => None,
            })
            .collect()
    }

    fn is_covered(&self, place: usize, name: &ObjectName, digest: &str) -> bool {
        let ObjectName::Piece { segment, range } = name else {
            return false;
        };
        let ours = &self.plains[digest];
        self.stretches(place, *segment)
            .iter()
            .any(|(other, covers)| {
                let there = self.digest_at(place, other);
                let there = there.and_then(|digest| self.plains.get(&digest));
                there.is_some_and(|plain| {
                    covers.covers(*range) && stretch(plain, covers.start, *range) == Some(ours)
                })
            })
    }

    /// Whether a place holds another object that covers this one.
    pub(super) fn gives(&self, place: usize, name: &ObjectName, plain: &[u8]) -> bool {
        self.is_covered(place, name, &container::digest(plain))
    }

    /// Whether a place holds a content, or another object that covers it.
    fn is_kept(&self, place: usize, name: &ObjectName, digest: &str) -> Result<(), String> {
        let found = self.digest_at(place, name);
        // a piece that gave way may have left its name to another history
        if found.as_deref() == Some(digest) || self.is_covered(place, name, digest) {
            return Ok(());
        }
        Err(match found {
            Some(found) => {
                format!("place {place} acknowledged {digest} as {name}, and holds {found}")
            }
            None => format!("place {place} acknowledged {name}, and lost it"),
        })
    }

    /// Whether a place holds all there is to hold of one acknowledged object.
    pub(super) fn holds(&self, place: usize, wal: &EncodedWal) -> bool {
        self.is_kept(place, &wal.name, wal.digest()).is_ok()
    }

    /// Nothing that was acknowledged is lost where it was acknowledged; nothing was done to a store
    /// that must not be.
    pub(super) fn check(&mut self) -> Result<(), String> {
        self.hear();
        for ((name, digest), held) in &self.held {
            for place in &held.places {
                self.is_kept(*place, name, digest)?;
            }
        }
        for (name, places) in &self.small {
            if let Some(lost) = places.difference(&self.places_with(name)).next() {
                return Err(format!("place {lost} acknowledged {name}, and lost it"));
            }
        }
        for (id, backup) in &self.backups {
            let name = ObjectName::Backup(id.clone());
            if let Some(lost) = backup.places.difference(&self.places_with(&name)).next() {
                return Err(format!("place {lost} acknowledged {name}, and lost it"));
            }
        }
        for store in &self.stores {
            if let Some(wrong) = store.wrongs().first() {
                return Err(format!("{store}: {wrong}"));
            }
        }
        Ok(())
    }

    /// Every place holds all that any has acknowledged; with `except`, but of that segment.
    pub(super) fn check_alike(&mut self, except: Option<SegmentName>) -> Result<(), String> {
        self.hear();
        let everywhere: BTreeSet<usize> = (0..self.stores.len()).collect();
        for ((name, digest), held) in &self.held {
            if held.places.is_empty() || (except.is_some() && segment_of(name) == except) {
                continue;
            }
            for place in &everywhere {
                let kept = self.is_kept(*place, name, digest);
                kept.map_err(|error| format!("not all places are alike: {error}"))?;
            }
        }
        for name in self.small.keys() {
            if let Some(lacks) = everywhere.difference(&self.places_with(name)).next() {
                return Err(format!("not all places are alike: {lacks} lacks {name}"));
            }
        }
        Ok(())
    }

    /// Every place holds these backups.
    pub(super) fn check_backups<'a>(
        &self,
        ids: impl IntoIterator<Item = &'a BackupId>,
    ) -> Result<(), String> {
        for id in ids {
            let there = self.places_with(&ObjectName::Backup(id.clone()));
            if let Some(lacks) = (0..self.stores.len()).find(|place| !there.contains(place)) {
                return Err(format!("place {lacks} lacks backup {id}"));
            }
        }
        Ok(())
    }

    /// A place that encrypts holds nothing plain; all objects belong to a cluster that says so.
    pub(super) fn check_sealed(&self, place: usize, encrypts: bool) -> Result<(), String> {
        let paths = self.stores[place].paths();
        let has_cluster = self.stores[place].stored(&path_of(&ObjectName::Cluster));
        for path in &paths {
            let Some(name) = name_of(path.as_ref()) else {
                continue;
            };
            if has_cluster.is_none() {
                return Err(format!("place {place} holds {name} and no cluster.json"));
            }
            if !encrypts || !is_container(&name) {
                continue;
            }
            let bytes = self.stores[place].stored(path.as_ref()).unwrap_or_default();
            let header = container::read_header(&bytes);
            let Ok(container::Reading::Done((header, _))) = header else {
                return Err(format!("{name} in place {place} has no header"));
            };
            if header.key.is_none() {
                return Err(format!("place {place} encrypts, and holds {name} plain"));
            }
        }
        Ok(())
    }

    /// Everything that a place must give back: names with the contents that it acknowledged, or
    /// that any did where `all` must be alike.
    pub(super) fn owed(&self, place: usize, all: bool) -> Vec<(ObjectName, Bytes)> {
        let held = self.held.iter();
        held.filter(|(_, held)| held.places.contains(&place) || (all && !held.places.is_empty()))
            .map(|((name, digest), _)| (name.clone(), self.plains[digest].clone()))
            .collect()
    }

    /// A listing's names without what is nobody's loss, of each place.
    pub(super) fn names(&self, place: usize) -> BTreeSet<ObjectName> {
        let paths = self.stores[place].paths();
        let names = paths.iter().filter_map(|path| name_of(path.as_ref()));
        names.collect()
    }

    /// Stored bytes, as they are.
    pub(super) fn bytes(&self, place: usize, name: &ObjectName) -> Option<Bytes> {
        self.stores[place].stored(&path_of(name))
    }
}

/// The places that have acknowledged a write so far.
pub(super) fn holders(wal: &EncodedWal) -> Vec<usize> {
    wal.held_by.lock().unwrap().clone()
}

/// The segment that an object is of.
pub(super) fn segment_of(name: &ObjectName) -> Option<SegmentName> {
    match name {
        ObjectName::Segment(segment) | ObjectName::Piece { segment, .. } => Some(*segment),
        _ => None,
    }
}

/// The number of a repository's only place.
pub(super) fn only_place(repository: &Repository) -> usize {
    let name = repository.first().name();
    name.trim_start_matches('p').parse().unwrap()
}

fn is_container(name: &ObjectName) -> bool {
    !matches!(
        name,
        ObjectName::Cluster
            | ObjectName::Hole { .. }
            | ObjectName::Intent(_)
            | ObjectName::Mark { .. }
            | ObjectName::Tip(_)
            | ObjectName::Backup(_)
            | ObjectName::Unfinished(_)
    )
}

fn path_of(name: &ObjectName) -> String {
    format!("{BASE}{}", name.path())
}

fn name_of(path: &str) -> Option<ObjectName> {
    ObjectName::parse(path.strip_prefix(BASE)?)
}
