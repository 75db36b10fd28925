//! Storing: segments, pieces and small files.
//!
//! Writes go to every place. One that is away falls behind, and is filled up by
//! [`Repository::mend`]; at least one must take what is written.

use std::sync::{Arc, LazyLock, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use container::{DataKey, Encoder, Header, LEVEL_STORED};
use futures_util::StreamExt as _;
use futures_util::future::join_all;
use futures_util::stream::FuturesUnordered;
use tokio::sync::Semaphore;
use tokio::time::Instant;
use wal::{Checked, SegmentName, SegmentSize, TimelineHistory, TimelineId, Verdict};

use super::layout::ObjectName;
use super::member::{Cover, Member, Recipe};
use super::place::Owed;
use super::records::{AncestorFacts, HISTORY_FACTS, Hole, Tip, WalFacts};
use super::summary::{SUMMARY_FACT, SegmentSummary};
use super::{
    Acknowledge, EncodedWal, Repository, RepositoryError, Result, ServerIdentity, blocking,
    buffers, json_of, to_value,
};

/// One for each core.
pub(super) static ENCODERS: LazyLock<Semaphore> = LazyLock::new(|| {
    let cores = std::thread::available_parallelism();
    Semaphore::new(cores.map_or(1, usize::from))
});
/// So little is encoded where it is: another thread would take longer to wake than to encode it.
const ENCODED_HERE_BYTES: usize = 64 << 10;
/// Pieces of so few bytes are compressed at a level that takes less time than their commit would wait
/// for: it makes no tables of its own.
const QUICKLY_ENCODED_BYTES: usize = 16 << 10;
const QUICK_LEVEL: i32 = -5;
/// Where everything must be everywhere, a place that is so much slower than another is no longer
/// waited for: what comes next goes on to the faster one.
const SLOWER_AT_MOST: Duration = Duration::from_secs(10);

/// Where a write has come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stored {
    /// Every place has acknowledged it.
    Everywhere,
    /// Some have; the others fall behind.
    Partly,
}

impl Repository {
    /// Makes the places ready to be written to for a server; those that are away fall behind.
    pub(super) async fn prepare(
        &mut self,
        identity: ServerIdentity,
        new_system: bool,
    ) -> Result<()> {
        self.identity = Some((identity, new_system));
        if self.members.len() > 1 {
            // what is stored since they were compared, another program's too, may be in one alone
            for member in &self.members {
                member.place().is_to_compare();
            }
        }
        self.write_everywhere(|member| async move { member.prepare(identity, new_system).await })
            .await?;
        Ok(())
    }

    /// Writes to every place; an error where a place refuses, or none can be reached.
    pub(super) async fn write_everywhere<Write>(
        &self,
        write: impl Fn(Member) -> Write,
    ) -> Result<Stored>
    where
        Write: Future<Output = Result<()>>,
    {
        if let [only] = self.members.as_slice() {
            write(only.clone()).await?;
            return Ok(Stored::Everywhere);
        }
        let tried = self.members_to_try().await?;
        let writes = tried.iter().map(|(_, member)| {
            let write = write((*member).clone());
            member.place().while_it_answers(write)
        });
        let mut outcome = Outcome::new(&self.members, None);
        for ((number, _), written) in tried.iter().zip(join_all(writes).await) {
            outcome.take(*number, written)?;
        }
        outcome.end()
    }

    /// The members that are not known to be away, with their numbers.
    fn members_there(&self) -> Vec<(usize, &Member)> {
        let numbered = self.members.iter().enumerate();
        numbered
            .filter(|(_, member)| self.members.len() == 1 || !member.place().is_away())
            .collect()
    }

    /// The members that are written to. Where every one is away, those that can be met again: what
    /// comes back may be another disk, or never have been met.
    async fn members_to_try(&self) -> Result<Vec<(usize, &Member)>> {
        let there = self.members_there();
        let (false, Some((identity, new_system))) = (!there.is_empty(), self.identity) else {
            return Ok(there);
        };
        let meetings = self.members.iter().map(async |member| {
            member.prepare(identity, new_system).await?;
            member.place().answers();
            Ok(())
        });
        let (mut met, mut outage) = (Vec::new(), None);
        for (numbered, meeting) in self
            .members
            .iter()
            .enumerate()
            .zip(join_all(meetings).await)
        {
            match meeting {
                Ok(()) => met.push(numbered),
                Err(error) => {
                    outage.get_or_insert(error);
                }
            }
        }
        match outage {
            Some(error) if met.is_empty() => Err(error),
            _ => Ok(met),
        }
    }

    /// Makes a segment or a piece into what [`Self::put_wal`] stores.
    pub async fn encode_wal(
        &self,
        name: ObjectName,
        timeline: TimelineId,
        size: SegmentSize,
        checked: Checked<'static>,
    ) -> Result<Arc<EncodedWal>> {
        let wal = self.take_wal(name, timeline, size, checked, true);
        match self.encode_missing(&wal, &self.members_there()).await {
            // the key of a new day needs the store: it is asked for again when this is stored
            Err(error) if error.is_unreachable() => {}
            encoded => encoded?,
        }
        Ok(wal)
    }

    /// The same, without encoding it for anybody yet. A piece that does not `supersede` others may be
    /// stored where others find it last; what they are removed for must not be.
    pub fn take_wal(
        &self,
        name: ObjectName,
        timeline: TimelineId,
        size: SegmentSize,
        checked: Checked<'static>,
        supersedes: bool,
    ) -> Arc<EncodedWal> {
        Arc::new(EncodedWal {
            is_brief: !supersedes && matches!(name, ObjectName::Piece { .. }),
            name,
            timeline,
            size,
            checked,
            digest: OnceLock::new(),
            objects: Mutex::default(),
            held_by: Mutex::default(),
        })
    }

    /// Encodes for those of `tried` that it was not encoded for before.
    async fn encode_missing(
        &self,
        wal: &Arc<EncodedWal>,
        tried: &[(usize, &Member)],
    ) -> Result<()> {
        let mut recipes: Vec<(usize, Recipe, i32)> = Vec::new();
        let needed = tried
            .iter()
            .filter(|(number, _)| wal.object(*number).is_none());
        let asked =
            needed.map(async |&(number, member)| (number, member, member.recipe(&wal.name).await));
        for (number, member, recipe) in join_all(asked).await {
            match recipe {
                Ok(recipe) => {
                    let level = member.place().settings().wal_level;
                    recipes.push((number, wal.adapt(recipe), wal.level(level)));
                }
                Err(error) if error.is_unreachable() && self.members.len() > 1 => {
                    member.place().missed(Some(&wal.name), Some(&error));
                }
                Err(error) => return Err(error),
            }
        }
        if recipes.is_empty() {
            return Ok(());
        }
        let encoded = if wal.checked.bytes().len() <= ENCODED_HERE_BYTES {
            encode_each(recipes, wal)
        } else {
            // each takes as much memory again as it encodes: no more of them than have a core
            let _core = ENCODERS.acquire().await;
            let shared = Arc::clone(wal);
            blocking(move || encode_each(recipes, &shared)).await
        };
        let encoded = encoded.map_err(|error| self.first().damaged(&wal.name, &error))?;
        for (number, object) in encoded {
            wal.set_object(number, object);
        }
        Ok(())
    }

    /// Stores a segment or a piece. Once this returns, it is durable in every place that is not
    /// away, or in one where that is what [`Acknowledge::Any`] asks for; it may be tried again.
    pub async fn put_wal(&self, wal: &Arc<EncodedWal>) -> Result<Stored> {
        let tried = self.members_to_try().await?;
        self.encode_missing(wal, &tried).await?;
        if let ([_], [(_, only)]) = (self.members.as_slice(), tried.as_slice()) {
            return self.put_wal_to(only, wal).await;
        }
        let mut outcome = Outcome::new(&self.members, Some(&wal.name));
        let mut writes = FuturesUnordered::new();
        for (number, member) in tried {
            let Some(object) = wal.object(number) else {
                continue;
            };
            if member.place().owes_much() {
                // slower than what comes: it is filled up rather than waited for
                continue;
            }
            let (member, wal) = (member.clone(), Arc::clone(wal));
            // not given up when another place has been faster
            let write = tokio::spawn(async move {
                let write = member.create_wal(&wal, object);
                let written = member.place().while_it_answers(write).await;
                if written.is_ok() {
                    wal.is_held_by(number);
                }
                (number, written)
            });
            outcome.begins(number);
            writes.push(write);
        }
        let patience = match self.acknowledge {
            Acknowledge::All => SLOWER_AT_MOST,
            Acknowledge::Any => Duration::ZERO,
        };
        let mut until: Option<Instant> = None;
        loop {
            let next = match until {
                None => Ok(writes.next().await),
                Some(until) => tokio::time::timeout_at(until, writes.next()).await,
            };
            let Ok(Some(write)) = next else { break };
            let (number, written) = write.map_err(|_panicked| RepositoryError::Interrupted)?;
            outcome.take(number, written)?;
            if outcome.stored() > 0 {
                until.get_or_insert_with(|| Instant::now() + patience);
            }
        }
        if !writes.is_empty() {
            let rest = outcome.underway();
            tokio::spawn(take_the_rest(rest, wal.name.clone(), writes));
        }
        outcome.end()
    }

    /// Stores a small piece on this very thread, where the one place is a folder of this machine whose
    /// disk is quick: no other way takes so little time. Whether it is durable now; if not, nothing was
    /// done, and [`Self::put_wal`] does it.
    pub fn put_wal_here(&self, wal: &EncodedWal) -> bool {
        let [only] = self.members.as_slice() else {
            return false;
        };
        if !wal.is_brief || wal.checked.bytes().len() > ENCODED_HERE_BYTES {
            return false;
        }
        // it is part of something larger soon
        let level = LEVEL_STORED;
        let is_stored = only.create_wal_here(&wal.name, |recipe| {
            let encoded = encode_each(vec![(0, wal.adapt(recipe), level)], wal).ok();
            encoded.and_then(|mut encoded| encoded.pop().map(|(_, object)| object))
        });
        if is_stored {
            wal.is_held_by(0);
        }
        is_stored
    }

    /// Stores it in the one place that there is.
    async fn put_wal_to(&self, only: &Member, wal: &EncodedWal) -> Result<Stored> {
        let object = wal.object(0).expect("encoded before, or refused");
        only.create_wal(wal, object).await?;
        wal.is_held_by(0);
        Ok(Stored::Everywhere)
    }

    /// Stores a small file of the server's, byte for byte: a history, a backup history.
    pub async fn store_file(&self, name: &ObjectName, bytes: Bytes) -> Result<()> {
        self.write_everywhere(|member| {
            let bytes = bytes.clone();
            async move { member.store_file(name, bytes).await }
        })
        .await
        .map(drop)
    }

    /// Whether every place holds a small file of the server's. Other bytes in one of them are an error.
    pub async fn holds_file(&self, name: &ObjectName, bytes: &[u8]) -> Result<bool> {
        let new = container::digest(bytes);
        let mut everywhere = true;
        for member in &self.members {
            match member.trailer(name).await {
                Ok(trailer) if trailer.digest == new => {}
                Ok(trailer) => {
                    return Err(RepositoryError::Conflict {
                        path: member.locate(name),
                        stored: trailer.digest,
                        new,
                    });
                }
                Err(error) if error.is_not_found() => everywhere = false,
                Err(error) if error.is_unreachable() && self.members.len() > 1 => {
                    everywhere = false;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(everywhere)
    }

    /// Records that a stretch cannot be had.
    pub async fn record_hole(&self, hole: &Hole) -> Result<()> {
        let name = ObjectName::Hole {
            timeline: hole.timeline,
            range: hole.range(),
        };
        let name = &name;
        self.write_everywhere(|member| async move {
            match member.create_json(name, hole).await {
                // the same hole, found at another time
                Err(RepositoryError::Conflict { .. }) | Ok(()) => Ok(()),
                Err(error) => Err(error),
            }
        })
        .await
        .map(drop)
    }

    /// Rewrites the tip of a timeline.
    pub async fn write_tip(&self, timeline: TimelineId, tip: &Tip) -> Result<()> {
        let path = ObjectName::Tip(timeline).path();
        let bytes = Bytes::from(json_of(tip));
        // what it says must be true of the place by itself
        let lacks = |member: &&Member| {
            self.members.len() > 1 && (member.place().is_away() || member.place().is_behind())
        };
        let tried: Vec<Member> = self
            .members
            .iter()
            .filter(|member| !lacks(member))
            .cloned()
            .collect();
        let writes = tried.into_iter().map(|member| {
            let (path, bytes) = (&path, bytes.clone());
            async move { Ok(member.store()?.overwrite(path, bytes).await?) }
        });
        // a hint: a place that misses it has not fallen behind
        let written = join_all(writes).await;
        written.into_iter().collect::<Result<Vec<()>>>().map(drop)
    }

    /// Removes those pieces of a segment whose bytes `by` holds, where that is acknowledged.
    ///
    /// They are looked for, whoever stored them. A piece that differs is left, and is an error: it is
    /// another history. Gives how many were removed.
    pub async fn remove_superseded_pieces(
        &self,
        segment: SegmentName,
        by: &EncodedWal,
    ) -> Result<u64> {
        debug_assert!(!by.is_brief, "{:?} may be found last", by.name);
        let mut removed = 0;
        for member in self.holders(by) {
            let pieces = member.remove_superseded_pieces(&by.cover(segment)).await?;
            removed += u64::try_from(pieces.len()).unwrap_or(u64::MAX);
        }
        Ok(removed)
    }

    /// Removes pieces that this process stored and `by` covers, where that is acknowledged. Gives
    /// how many.
    pub async fn remove_pieces(&self, pieces: &[ObjectName], by: &EncodedWal) -> Result<u64> {
        debug_assert!(pieces.is_empty() || !by.is_brief, "{:?}", by.name);
        for member in self.holders(by) {
            let store = member.store()?;
            let paths: Vec<String> = pieces.iter().map(ObjectName::path).collect();
            store.delete_all(&paths).await?;
        }
        Ok(u64::try_from(pieces.len()).unwrap_or(u64::MAX))
    }

    /// Removes a piece that this process stored, wherever `by`, which it stored too and which covers
    /// it, is. Gives how many were removed.
    pub async fn remove_piece_covered(&self, piece: &ObjectName, by: &ObjectName) -> Result<u64> {
        for member in &self.members {
            match member.trailer(by).await {
                Ok(_) => member.store()?.delete(&piece.path()).await?,
                Err(error) if error.is_not_found() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(1)
    }

    /// The places that have acknowledged an object.
    fn holders(&self, wal: &EncodedWal) -> impl Iterator<Item = &Member> {
        let held_by = wal.holders();
        let numbered = self.members.iter().enumerate();
        numbered.filter_map(move |(number, member)| held_by.contains(&number).then_some(member))
    }
}

impl EncodedWal {
    /// The stretch of a segment that it holds.
    pub(super) fn cover(&self, segment: SegmentName) -> Cover<'_> {
        Cover {
            segment,
            name: &self.name,
            start: self.checked.range().start,
            plain: self.checked.bytes(),
        }
    }

    pub(super) fn adapt(&self, mut recipe: Recipe) -> Recipe {
        recipe.header.timeline = Some(self.timeline.get());
        recipe.header.start = Some(self.checked.range().start.to_string());
        recipe.header.end = Some(self.checked.range().end.to_string());
        recipe.header.segment_bytes = Some(self.size.bytes());
        recipe
    }

    /// The zstd level for it, where `configured` is what settings say. A commit may wait for a small
    /// piece, and it becomes part of something larger soon.
    fn level(&self, configured: i32) -> i32 {
        let is_small = self.checked.bytes().len() <= QUICKLY_ENCODED_BYTES;
        match self.name {
            ObjectName::Piece { .. } if is_small => configured.min(QUICK_LEVEL),
            _ => configured,
        }
    }

    /// Of the plain bytes; known since they were first encoded.
    pub(super) fn digest(&self) -> &str {
        self.digest
            .get_or_init(|| container::digest(self.checked.bytes()))
    }

    fn object(&self, number: usize) -> Option<Bytes> {
        let objects = self.objects.lock().unwrap_or_else(PoisonError::into_inner);
        objects.get(number).cloned().flatten()
    }

    fn set_object(&self, number: usize, object: Bytes) {
        let mut objects = self.objects.lock().unwrap_or_else(PoisonError::into_inner);
        if objects.len() <= number {
            objects.resize(number + 1, None);
        }
        if let Some(slot) = objects.get_mut(number) {
            *slot = Some(object);
        }
    }

    fn is_held_by(&self, number: usize) {
        let mut held_by = self.held_by.lock().unwrap_or_else(PoisonError::into_inner);
        held_by.push(number);
    }

    fn holders(&self) -> Vec<usize> {
        let held_by = self.held_by.lock().unwrap_or_else(PoisonError::into_inner);
        held_by.clone()
    }
}

/// How a write to several places goes.
struct Outcome<'a> {
    members: &'a [Member],
    name: Option<&'a ObjectName>,
    /// How it stands with each place.
    states: Vec<WriteState>,
    outage: Option<RepositoryError>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum WriteState {
    /// It was passed over, or has failed.
    Missed,
    Underway,
    Stored,
}

impl<'a> Outcome<'a> {
    fn new(members: &'a [Member], name: Option<&'a ObjectName>) -> Self {
        Self {
            members,
            name,
            states: vec![WriteState::Missed; members.len()],
            outage: None,
        }
    }

    fn begins(&mut self, number: usize) {
        self.set(number, WriteState::Underway);
    }

    fn set(&mut self, number: usize, state: WriteState) {
        if let Some(slot) = self.states.get_mut(number) {
            *slot = state;
        }
    }

    /// Takes one place's answer; what is no outage is an error at once.
    fn take(&mut self, number: usize, written: Result<()>) -> Result<()> {
        match written {
            Ok(()) => self.set(number, WriteState::Stored),
            Err(error) if error.is_unreachable() => {
                self.set(number, WriteState::Missed);
                if let Some(member) = self.members.get(number) {
                    member.place().missed(self.name, Some(&error));
                }
                self.outage.get_or_insert(error);
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }

    fn stored(&self) -> usize {
        let stored = |state: &&WriteState| **state == WriteState::Stored;
        self.states.iter().filter(stored).count()
    }

    fn in_state(&self, state: WriteState) -> impl Iterator<Item = (usize, &Member)> {
        let numbered = self.members.iter().enumerate().zip(&self.states);
        numbered
            .filter(move |(_, is)| **is == state)
            .map(|(numbered, _)| numbered)
    }

    /// The writes that go on when this one returns. Their places are not whole until they have
    /// ended.
    fn underway(&self) -> Vec<(usize, Member, Owed)> {
        self.in_state(WriteState::Underway)
            .map(|(number, member)| (number, member.clone(), member.place().owe()))
            .collect()
    }

    /// What it has come to. Places that lack what is acknowledged now are noted now: one that was
    /// filled up while another was still writing was compared with what was there before.
    fn end(self) -> Result<Stored> {
        match self.stored() {
            0 => return Err(self.outage.unwrap_or(RepositoryError::NoPlace)),
            stored if stored == self.members.len() => return Ok(Stored::Everywhere),
            _ => {}
        }
        for (_, member) in self.in_state(WriteState::Missed) {
            member.place().missed(self.name, None);
        }
        Ok(Stored::Partly)
    }
}

/// Waits for the places that were slower, and notes those that failed.
async fn take_the_rest(
    rest: Vec<(usize, Member, Owed)>,
    name: ObjectName,
    mut writes: FuturesUnordered<tokio::task::JoinHandle<(usize, Result<()>)>>,
) {
    let mut rest = rest;
    while let Some(write) = writes.next().await {
        let Ok((number, written)) = write else {
            continue;
        };
        let Some(at) = rest.iter().position(|(pending, ..)| *pending == number) else {
            continue;
        };
        let (_, member, _owed) = rest.swap_remove(at);
        match written {
            Ok(()) => {}
            Err(error) if error.is_unreachable() => {
                member.place().missed(Some(&name), Some(&error));
            }
            Err(error) => {
                tracing::error!(
                    "repository {} refuses what another took: {error}",
                    member.name()
                );
                member.place().missed(Some(&name), None);
            }
        }
    }
    // tasks that broke off
    for (_, member, _owed) in rest {
        member.place().missed(Some(&name), None);
    }
}

/// The objects for each place, by its number; places with the same recipe share one.
pub(super) fn encode_each(
    recipes: Vec<(usize, Recipe, i32)>,
    wal: &EncodedWal,
) -> std::result::Result<Vec<(usize, Bytes)>, container::Error> {
    let mut facts = serde_json::Map::new();
    facts.insert("wal".to_owned(), to_value(&wal_facts(&wal.checked)));
    if let Some(summary) = wal.checked.summary() {
        let summary = SegmentSummary::from(summary);
        facts.insert(SUMMARY_FACT.to_owned(), to_value(&summary));
    }
    let mut plain_objects: Vec<(i32, Bytes)> = Vec::new();
    let mut objects = Vec::with_capacity(recipes.len());
    for (number, Recipe { header, key }, level) in recipes {
        let known = plain_objects.iter().find(|(known, _)| *known == level);
        if let (None, Some((_, object))) = (&key, known) {
            objects.push((number, object.clone()));
            continue;
        }
        let facts = facts.clone();
        let object = encode_one(&header, wal, facts, level, key.as_ref())?;
        if key.is_none() {
            plain_objects.push((level, object.clone()));
        }
        objects.push((number, object));
    }
    Ok(objects)
}

fn encode_one(
    header: &Header,
    wal: &EncodedWal,
    facts: serde_json::Map<String, serde_json::Value>,
    level: i32,
    key: Option<&DataKey>,
) -> std::result::Result<Bytes, container::Error> {
    let plain = wal.checked.bytes();
    // for what cannot be compressed, with header and trailer
    let mut room = buffers::ENCODED.take(plain.len() + (plain.len() >> 7) + (4 << 10));
    let mut encoder = Encoder::new(header, level, key)?;
    encoder.frame(plain, &mut room)?;
    let trailer = encoder.finish(facts, &mut room)?;
    wal.digest.get_or_init(|| trailer.digest);
    // room was made for what cannot be compressed; of a large one only what was written is memory
    Ok(buffers::ENCODED.lend(room))
}

impl Drop for EncodedWal {
    fn drop(&mut self) {
        // of pieces there are all sizes, and they would keep out what can be used again
        if !matches!(self.name, ObjectName::Segment(_)) {
            return;
        }
        let nothing = Checked::nothing(self.checked.range().start);
        let plain = std::mem::replace(&mut self.checked, nothing).into_bytes();
        buffers::PLAIN.put_back(plain.into_owned());
    }
}

impl Member {
    /// Stores a small file of the server's, byte for byte.
    pub(super) async fn store_file(&self, name: &ObjectName, bytes: Bytes) -> Result<()> {
        let timeline = match name {
            ObjectName::History(timeline) => Some(timeline.get()),
            _ => None,
        };
        let level = self.place().settings().wal_level;
        let adapt = |header: &mut Header| header.timeline = timeline;
        let facts = file_facts(name, &bytes);
        self.store_container(name, adapt, facts, bytes, level).await
    }
}

/// What everybody may know of a small file: of a history, where the branch left its ancestors, so
/// that windows can be told without a key.
fn file_facts(name: &ObjectName, bytes: &[u8]) -> serde_json::Map<String, serde_json::Value> {
    let mut facts = serde_json::Map::new();
    if let ObjectName::History(timeline) = name
        && let Ok(history) = TimelineHistory::parse(*timeline, bytes)
    {
        let entries = history.entries().iter();
        let entries = entries.map(|entry| AncestorFacts {
            timeline: entry.timeline,
            end: entry.end,
        });
        let entries: Vec<AncestorFacts> = entries.collect();
        facts.insert(HISTORY_FACTS.to_owned(), to_value(&entries));
    }
    facts
}

fn wal_facts(checked: &Checked<'_>) -> WalFacts {
    let (verified, unverified_from, reason) = match checked.verdict() {
        Verdict::Verified => (true, None, None),
        Verdict::Unverified { from, reason } => (false, Some(from), Some(reason.to_string())),
    };
    WalFacts {
        verified,
        unverified_from,
        reason,
        first_record: checked.first_record(),
        last_record: checked.last_record(),
        records_end: checked.whole_records_end(),
    }
}

#[cfg(test)]
mod tests {
    use wal::{Lsn, Verifier, WalRange, WalkerStart};

    use super::*;
    use crate::clock::{Clock, SystemClock};
    use crate::repository::destination::Destination;

    #[tokio::test]
    async fn a_place_lacks_what_passed_it_over_however_late_that_ends() {
        // under acknowledge = "all" the server would drop WAL that only one of two places has
        let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let mut destination = Destination::local(folders[0].path(), "main");
        let mut second = Destination::local(folders[1].path(), "main").places;
        second[0].name = "second".to_owned();
        destination.places.append(&mut second);
        let clock: Arc<dyn Clock> = Arc::new(SystemClock);
        let open = destination.open(true, &clock).unwrap();
        let identity = ServerIdentity {
            system_id: 7,
            major: 18,
            block_bytes: 8192,
        };
        let repository = open.repository(identity, false).await.unwrap();
        let name = ObjectName::Cluster;

        let mut write = Outcome::new(&repository.members, Some(&name));
        write.begins(0);
        assert!(repository.mend(true).await);
        write.take(0, Ok(())).unwrap();
        assert_eq!(write.end().unwrap(), Stored::Partly);
        assert!(!repository.is_whole());

        assert!(repository.mend(true).await);
        let mut write = Outcome::new(&repository.members, Some(&name));
        write.begins(0);
        write.begins(1);
        write.take(0, Ok(())).unwrap();
        let slower = write.underway();
        assert_eq!(write.end().unwrap(), Stored::Partly);
        assert!(!repository.is_whole());
        drop(slower);
        assert!(repository.is_whole());
    }

    /// Others look at journals first and at files then: what was put between the two, and is all that has
    /// the bytes of pieces that are gone, must have a file.
    #[tokio::test]
    async fn what_supersedes_others_has_a_file_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let destination = Destination::local(folder.path(), "main");
        let clock: Arc<dyn Clock> = Arc::new(SystemClock);
        let identity = ServerIdentity {
            system_id: 7,
            major: 18,
            block_bytes: 8192,
        };
        let open = destination.open(true, &clock).unwrap();
        let repository = open.repository(identity, false).await.unwrap();
        let timeline = TimelineId::new(1).unwrap();
        let size = SegmentSize::from_bytes(1 << 20).unwrap();
        let put = async |start: u64, end: u64, supersedes: bool| {
            let range = WalRange::new(Lsn::new(start), Lsn::new(end));
            let segment = SegmentName::of(timeline, range.start, size);
            let name = ObjectName::Piece { segment, range };
            let mut verifier = Verifier::new(WalkerStart {
                at: range.start,
                segment_size: size,
                major: None,
                timeline,
                system_id: None,
                skip_to: None,
            });
            let bytes = vec![7; usize::try_from(end - start).unwrap()];
            verifier.push(&bytes);
            let checked = verifier.check(range, bytes);
            let wal = repository.take_wal(name.clone(), timeline, size, checked, supersedes);
            let stored = repository.put_wal(&wal).await.unwrap();
            assert_eq!(stored, Stored::Everywhere);
            folder
                .path()
                .join("main/7")
                .join(name.path())
                .try_exists()
                .unwrap()
        };
        let mut pieces = 0;
        while put(pieces * 8, pieces * 8 + 8, false).await {
            pieces += 1;
            assert!(pieces < 10_000, "a journal was never begun");
        }
        assert!(put(0, (pieces + 1) * 8, true).await);
    }
}
