//! Summaries of segments: each stands in its segment's trailer, and those of neighbours together in
//! one object, so that a year of WAL is looked through in a few hundred requests.
//!
//! Whatever is here can be made anew from the segments, and a reader that finds none does without.

mod keeping;

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap};

use bytes::Bytes;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use serde::{Deserialize, Serialize};
use tokio::sync::{Mutex, mpsc};
use wal::{Lsn, SegmentName, SegmentSize, TimelineId, Verifier, WalkerStart};

use super::catalog::{Catalog, TimelineWal};
use super::layout::{ObjectName, index_prefix};
use super::member::Member;
use super::records::WalFacts;
use super::summary::{SUMMARY_FACT, SegmentSummary};
use super::{Repository, RepositoryError, Result};
use crate::error::chain;
use keeping::Keeping;

/// So many neighbours share an object: 4 GiB of WAL in segments of 16 MiB.
pub const GROUP_SEGMENTS: u64 = 256;
/// So many of those objects are read at once, since whoever looks for a moment looks far.
const GROUPS_AT_ONCE: usize = 16;
/// So many trailers are read at once.
const TRAILERS_AT_ONCE: usize = 32;
/// Summaries are forgotten when those of more segments than these are known.
const KNOWN_MAX: usize = 64 * 256;

/// One line of an index object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct IndexLine {
    /// The segment's name.
    segment: String,
    /// Absent where it could not be verified.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    summary: Option<SegmentSummary>,
}

/// Neighbouring segments, whose numbers begin with a multiple of [`GROUP_SEGMENTS`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Group {
    first: SegmentName,
    size: SegmentSize,
}

impl Group {
    /// The group of a segment; `None` if no segment of this size has the name.
    fn of(segment: SegmentName, size: SegmentSize) -> Option<Self> {
        let start = segment.start(size)?;
        let bytes = size.bytes().saturating_mul(GROUP_SEGMENTS);
        let first = start.saturating_sub(start.as_u64() % bytes);
        Some(Self {
            first: SegmentName::of(segment.timeline, first, size),
            size,
        })
    }

    fn segments(self) -> impl Iterator<Item = SegmentName> {
        let all = std::iter::successors(Some(self.first), move |name| name.next(self.size));
        all.take(usize::try_from(GROUP_SEGMENTS).unwrap_or(usize::MAX))
    }

    fn next(self) -> Option<Self> {
        let last = self.segments().last()?;
        Self::of(last.next(self.size)?, self.size)
    }

    fn is_ended_by(self, segment: SegmentName) -> bool {
        self.segments().last() == Some(segment)
    }

    fn is_whole_in(self, wal: &TimelineWal) -> bool {
        self.segments()
            .all(|segment| wal.segments.contains(&segment))
    }

    fn name(self) -> ObjectName {
        ObjectName::Index(self.first)
    }

    /// The lines of the group's object: one for each of its segments, in order, and nothing else.
    fn lines_in(self, text: &[u8]) -> Option<Vec<IndexLine>> {
        let mut texts = text.split(|byte| *byte == b'\n');
        let mut lines = Vec::new();
        for segment in self.segments() {
            let line: IndexLine = serde_json::from_slice(texts.next()?).ok()?;
            if line.segment != segment.to_string() {
                return None;
            }
            lines.push(line);
        }
        let ends = texts.next().is_some_and(<[u8]>::is_empty) && texts.next().is_none();
        ends.then_some(lines)
    }
}

/// What is known of segments without reading them, asked for as it is needed.
pub struct Summaries<'a> {
    repository: &'a Repository,
    catalog: &'a Catalog,
    size: SegmentSize,
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    /// The groups that have an object, of the timelines that were looked at.
    indexed: BTreeMap<TimelineId, BTreeSet<SegmentName>>,
    segments: HashMap<SegmentName, Option<SegmentSummary>>,
}

impl<'a> Summaries<'a> {
    /// Of the segments in a catalog.
    pub fn new(repository: &'a Repository, catalog: &'a Catalog, size: SegmentSize) -> Self {
        Self {
            repository,
            catalog,
            size,
            known: Mutex::default(),
        }
    }

    /// The summary of a segment; `None` where it has to be read: it is not stored whole, has none, or
    /// its trailer is damaged.
    pub async fn of(&self, segment: SegmentName) -> Result<Option<SegmentSummary>> {
        let stored = self.catalog.timelines.get(&segment.timeline);
        let Some(stored) = stored.filter(|wal| wal.segments.contains(&segment)) else {
            return Ok(None);
        };
        let mut known = self.known.lock().await;
        if let Some(summary) = known.segments.get(&segment) {
            return Ok(summary.clone());
        }
        if known.segments.len() > KNOWN_MAX {
            known.segments.clear();
        }
        self.load(&mut known, segment, stored).await?;
        Ok(known.segments.get(&segment).cloned().flatten())
    }

    /// Loads what stands in one object with the segment, and what comes behind it; else the trailers
    /// of its group.
    async fn load(
        &self,
        known: &mut Known,
        segment: SegmentName,
        stored: &TimelineWal,
    ) -> Result<()> {
        let timeline = segment.timeline;
        if let Entry::Vacant(unknown) = known.indexed.entry(timeline) {
            unknown.insert(self.repository.indexed(timeline).await?);
        }
        let Some(group) = Group::of(segment, self.size) else {
            return Ok(());
        };
        let of_timeline = known.indexed.get(&timeline);
        let indexed = std::iter::successors(Some(group), |group| group.next())
            .take(GROUPS_AT_ONCE)
            .take_while(|group| of_timeline.is_some_and(|all| all.contains(&group.first)));
        let read = indexed.map(|group| self.repository.read_index(group));
        let read: Vec<Option<Vec<IndexLine>>> = stream::iter(read)
            .buffered(GROUPS_AT_ONCE)
            .try_collect()
            .await?;
        for line in read.into_iter().flatten().flatten() {
            if let Ok(name) = line.segment.parse() {
                known.segments.insert(name, line.summary);
            }
        }
        if known.segments.contains_key(&segment) {
            return Ok(());
        }
        let of_group = group
            .segments()
            .filter(|one| *one >= segment && stored.segments.contains(one));
        let unknown: Vec<SegmentName> = of_group.collect();
        let read = unknown.into_iter().map(async |segment| {
            let summary = self.repository.vouched_summary(segment).await?;
            Ok::<_, RepositoryError>((segment, summary))
        });
        let read: Vec<_> = stream::iter(read)
            .buffer_unordered(TRAILERS_AT_ONCE)
            .try_collect()
            .await?;
        known.segments.extend(read);
        Ok(())
    }
}

/// Tells who puts summaries together which segments were stored.
#[derive(Debug, Clone)]
pub struct IndexKeeper(mpsc::UnboundedSender<(SegmentName, SegmentSize)>);

impl IndexKeeper {
    /// Takes note that a segment is stored.
    pub fn is_stored(&self, segment: SegmentName, size: SegmentSize) {
        // nobody listens any more: the next archiver catches up
        self.0.send((segment, size)).ok();
    }
}

/// What became of the groups of a timeline's segments.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct IndexState {
    /// Objects that were there and can be read.
    pub kept: u64,
    /// Objects that were written.
    pub written: u64,
    /// Groups of which segments are missing, or still to come.
    pub unfinished: u64,
}

impl Repository {
    /// The groups of a timeline that have an object, by their first segments.
    async fn indexed(&self, timeline: TimelineId) -> Result<BTreeSet<SegmentName>> {
        let listed = self.list(&index_prefix(timeline)).await?;
        let names = listed.iter().map(|object| ObjectName::parse(&object.path));
        Ok(names
            .filter_map(|name| match name {
                Some(ObjectName::Index(first)) => Some(first),
                _ => None,
            })
            .collect())
    }

    /// The lines of a group's object; `None` where it is gone or damaged.
    async fn read_index(&self, group: Group) -> Result<Option<Vec<IndexLine>>> {
        let fetched = match self.fetch(&group.name()).await {
            Ok(fetched) => fetched,
            Err(error) if error.is_not_found() => return Ok(None),
            Err(error) if error.is_damage() && !error.lacks_key() => {
                tracing::warn!(
                    "the segments are looked at one by one: {}. hint: `anywhen index rebuild` writes \
                     this object anew",
                    chain(&error)
                );
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        let lines = group.lines_in(&fetched.plain);
        if lines.is_none() {
            tracing::warn!(
                "the segments are looked at one by one: what {} says is not of its segments. hint: \
                 `anywhen index rebuild` writes this object anew",
                self.locate(&group.name())
            );
        }
        Ok(lines)
    }

    /// What a segment's trailer says, with its writer's word for it; `None` where it says nothing, or
    /// cannot be read.
    async fn vouched_summary(&self, segment: SegmentName) -> Result<Option<SegmentSummary>> {
        let name = ObjectName::Segment(segment);
        let name = &name;
        let trailer = self.first_of(|member| async move { member.vouched_trailer(name).await });
        let facts = match trailer.await {
            Ok(trailer) => trailer.facts,
            Err(error) if error.is_not_found() => return Ok(None),
            // whoever reads the segment says what is wrong with it
            Err(error) if error.is_damage() && !error.lacks_key() => return Ok(None),
            Err(error) => return Err(error),
        };
        let verified = facts.get("wal").cloned().unwrap_or_default();
        let verified = serde_json::from_value::<WalFacts>(verified);
        let summary = facts.get(SUMMARY_FACT).cloned();
        let summary = summary.and_then(|summary| serde_json::from_value(summary).ok());
        Ok(summary.filter(|_| verified.is_ok_and(|facts| facts.verified)))
    }

    /// Puts the summaries together that are not yet, of a timeline of which all this is stored.
    ///
    /// With `anew`, what is there is read, and replaced where it cannot be. `told` hears how many groups
    /// were looked at.
    pub async fn roll_up(
        &self,
        timeline: TimelineId,
        size: SegmentSize,
        anew: bool,
        told: &(dyn Fn(u64) + Sync),
    ) -> Result<IndexState> {
        let wal = self.timeline_wal(timeline).await?;
        let indexed = self.indexed(timeline).await?;
        let groups = wal.segments.iter();
        let groups: BTreeSet<Group> = groups.filter_map(|name| Group::of(*name, size)).collect();
        let mut state = IndexState::default();
        for group in groups {
            let is_there = indexed.contains(&group.first);
            if is_there && (!anew || self.read_index(group).await?.is_some()) {
                state.kept += 1;
            } else if group.is_whole_in(&wal) {
                if is_there {
                    self.remove_index(group).await?;
                }
                self.roll_up_group(group).await?;
                state.written += 1;
            } else {
                state.unfinished += 1;
            }
            told(state.kept + state.written + state.unfinished);
        }
        Ok(state)
    }

    /// As [`Self::roll_up`], of the group of which this segment is the last; whether it is there now.
    pub async fn roll_up_behind(&self, segment: SegmentName, size: SegmentSize) -> Result<bool> {
        let Some(group) = Group::of(segment, size) else {
            return Ok(false);
        };
        if !group.is_ended_by(segment) {
            return Ok(false);
        }
        if self.indexed(segment.timeline).await?.contains(&group.first) {
            return Ok(true);
        }
        // those of a group lie in one folder, or each in its own where they are large
        let mut folders: Vec<String> = group.segments().map(SegmentName::prefix16).collect();
        folders.dedup();
        let mut catalog = Catalog::default();
        for folder in folders {
            let folder = format!("wal/{}/{folder}/", segment.timeline.hex8());
            catalog.add_listing(&self.list(&folder).await?);
        }
        let wal = catalog.timelines.remove(&segment.timeline);
        if !wal.is_some_and(|wal| group.is_whole_in(&wal)) {
            return Ok(false);
        }
        self.roll_up_group(group).await?;
        Ok(true)
    }

    /// Who puts summaries together as segments are stored, and what does it for as long as it is polled.
    pub fn keep_indexed(self) -> (IndexKeeper, impl Future<Output = ()> + Send) {
        let (keeper, mut stored) = mpsc::unbounded_channel::<(SegmentName, SegmentSize)>();
        let keep = async move {
            let mut keeping = Keeping::default();
            while let Some((segment, size)) = stored.recv().await {
                if let Err(error) = keeping.take(&self, segment, size).await {
                    tell_not_rolled_up(&error);
                }
            }
        };
        (IndexKeeper(keeper), keep)
    }

    /// Writes the object of a group that is stored whole.
    async fn roll_up_group(&self, group: Group) -> Result<()> {
        let before = group.first.start(group.size).unwrap_or(Lsn::ZERO);
        let before = (before > Lsn::ZERO)
            .then(|| SegmentName::of(group.first.timeline, before.saturating_sub(1), group.size));
        let asked = before.into_iter().chain(group.segments());
        let asked = asked.map(async |segment| {
            let summary = self.vouched_summary(segment).await?;
            Ok::<_, RepositoryError>((segment, summary))
        });
        let found: Vec<(SegmentName, Option<SegmentSummary>)> = stream::iter(asked)
            .buffered(TRAILERS_AT_ONCE)
            .try_collect()
            .await?;
        let mut end_before = None;
        let mut lines = Vec::new();
        for (segment, found) in found {
            let meets = |summary: &SegmentSummary| Some(summary.start) == end_before;
            let summary = match found {
                Some(summary) if Some(segment) == before || meets(&summary) => Some(summary),
                // it does not say what lies between it and the one before, whose bytes may
                found => self.summary_of_bytes(segment, group.size).await?.or(found),
            };
            end_before = summary.as_ref().map(|summary| summary.end);
            if Some(segment) != before {
                let segment = segment.to_string();
                lines.push(IndexLine { segment, summary });
            }
        }
        self.write_index(group, &lines).await
    }

    /// What the records of a segment say, by its bytes and those of the one before; `None` where they
    /// cannot be had or verified.
    async fn summary_of_bytes(
        &self,
        segment: SegmentName,
        size: SegmentSize,
    ) -> Result<Option<SegmentSummary>> {
        let Some(range) = segment.range(size) else {
            return Ok(None);
        };
        let mut verifier: Option<Verifier> = None;
        let before = SegmentName::of(segment.timeline, range.start.saturating_sub(1), size);
        for name in [before, segment] {
            let content = match self.fetch(&ObjectName::Segment(name)).await {
                Ok(fetched) => fetched.plain,
                Err(error) if error.is_not_found() || error.lacks_key() || error.is_damage() => {
                    continue;
                }
                Err(error) => return Err(error),
            };
            let verifier = verifier.get_or_insert_with(|| {
                Verifier::new(WalkerStart {
                    at: name.start(size).unwrap_or(Lsn::ZERO),
                    segment_size: size,
                    major: None,
                    timeline: name.timeline,
                    system_id: Some(self.system_id()),
                    skip_to: None,
                })
            });
            verifier.push(&content);
            if name == segment {
                let checked = verifier.check(range, content);
                return Ok(checked.summary().map(SegmentSummary::from));
            }
        }
        Ok(None)
    }

    async fn write_index(&self, group: Group, lines: &[IndexLine]) -> Result<()> {
        let mut text = Vec::new();
        for line in lines {
            text.extend(serde_json::to_vec(line).unwrap_or_default());
            text.push(b'\n');
        }
        let (name, text) = (group.name(), Bytes::from(text));
        let written = self.write_everywhere(|member| {
            let (name, text) = (name.clone(), text.clone());
            async move { member.write_index(&name, text).await }
        });
        match written.await {
            // another archiver was here before: it says the same, or less
            Ok(_) | Err(RepositoryError::Conflict { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    async fn remove_index(&self, group: Group) -> Result<()> {
        let path = group.name().path();
        let path = &path;
        self.write_everywhere(|member| async move { Ok(member.store()?.delete(path).await?) })
            .await
            .map(drop)
    }
}

/// A restore does without it, and takes longer to be planned.
fn tell_not_rolled_up(error: &RepositoryError) {
    if error.lacks_key() || error.is_unreachable() {
        tracing::debug!("summaries are not put together now: {}", chain(error));
    } else {
        tracing::warn!(
            "summaries cannot be put together: {}. hint: `anywhen index rebuild` tries again",
            chain(error)
        );
    }
}

impl Member {
    async fn write_index(&self, name: &ObjectName, text: Bytes) -> Result<()> {
        let level = self.place().settings().wal_level;
        let facts = serde_json::Map::new();
        self.store_container(name, |_| {}, facts, text, level).await
    }
}
