//! Reading: what any place holds, and what names tell.
//!
//! Reads take the first place that has the object. A place that cannot be asked never turns into
//! "not found", and a damaged copy only where no place has a good one.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;
use container::{FrameReader, Trailer};
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use serde::de::DeserializeOwned;
use wal::{SegmentSize, TimelineHistory, TimelineId};

use super::backup_record::StoredBackups;
use super::catalog::{Catalog, LeftOut, ListedBackups, TimelineWal};
use super::layout::{BackupId, ObjectName, timeline_prefix};
use super::member::Member;
use super::records::{AncestorFacts, BackupRecord, HISTORY_FACTS, Hole, Tip, WalFacts};
use super::store::Listed;
use super::{Fetched, Repository, RepositoryError, Result};

/// So many small objects are read at the same time.
const RECORDS_AT_ONCE: usize = 16;

impl Repository {
    /// Asks the places in their order until one has an answer.
    ///
    /// The error is "not found" only if every place that can be asked says so, and where the
    /// repository is strict, only if every place does; else it is the first other one.
    pub(super) async fn first_of<T, Answer>(&self, ask: impl Fn(Member) -> Answer) -> Result<T>
    where
        Answer: Future<Output = Result<T>>,
    {
        let (mut absent, mut failed) = (None, None);
        for member in &self.members {
            let asked = match self.silence_of(member) {
                Some(silence) => Err(silence),
                None => ask(member.clone()).await,
            };
            match asked {
                Ok(answer) => {
                    if let Some(error @ RepositoryError::Damaged { .. }) = &failed {
                        tracing::error!("read from repository {} instead: {error}", member.name());
                    }
                    return Ok(answer);
                }
                Err(error) if error.is_not_found() => {
                    absent.get_or_insert(error);
                }
                Err(error) => {
                    if error.is_unreachable() {
                        self.note_unheard(member, &error);
                    }
                    // what is damaged says more than who is away
                    let is_more =
                        |known: &RepositoryError| known.is_unreachable() && !error.is_unreachable();
                    if failed.as_ref().is_none_or(is_more) {
                        failed = Some(error);
                    }
                }
            }
        }
        let other_than_silent = failed.as_ref().is_some_and(|error| !error.is_unreachable());
        let first = if self.strict || other_than_silent {
            failed.or(absent)
        } else {
            // what is absent where it could be asked: `unheard` says where it could not
            absent.or(failed)
        };
        Err(first.expect("a repository has a place, and it answered"))
    }

    /// The error of a place that could not be asked a moment ago, and is not asked again: where
    /// there are others, they are not waited for again and again.
    pub(super) fn silence_of(&self, member: &Member) -> Option<RepositoryError> {
        if self.strict || self.members.len() == 1 {
            return None;
        }
        let reason = member.place().silence()?;
        Some(RepositoryError::Silent { reason })
    }

    /// Reads, checks and decodes an object.
    pub async fn fetch(&self, name: &ObjectName) -> Result<Fetched> {
        self.first_of(|member| async move { member.fetch(name).await })
            .await
    }

    /// `length` stored bytes of an object from `offset`.
    pub async fn fetch_range(&self, name: &ObjectName, offset: u64, length: u64) -> Result<Bytes> {
        self.first_of(|member| async move { member.fetch_range(name, offset, length).await })
            .await
    }

    /// What single frames of an object are decoded with.
    pub async fn frames(&self, name: &ObjectName) -> Result<Arc<FrameReader>> {
        self.first_of(|member| async move { member.frames(name).await })
            .await
    }

    pub(super) async fn trailer(&self, name: &ObjectName) -> Result<Trailer> {
        self.first_of(|member| async move { member.trailer(name).await })
            .await
    }

    pub(super) async fn find<T: DeserializeOwned>(&self, name: &ObjectName) -> Result<Option<T>> {
        let found = self.first_of(|member| async move {
            let found = member.find(name).await?;
            found.ok_or_else(|| RepositoryError::absent(member.locate(name)))
        });
        match found.await {
            Ok(value) => Ok(Some(value)),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Refuses what a later version wrote.
    pub(super) async fn check_format(&self) -> Result<()> {
        self.first_of(|member| async move { member.check_format().await })
            .await
    }

    /// Every object below `folder` in any place that can be asked, sorted by path.
    pub(super) async fn list(&self, folder: &str) -> Result<Vec<Listed>> {
        Ok(together(self.list_each(folder).await?))
    }

    /// Every object below `folder` in each place that can be asked, with the place's name.
    async fn list_each(&self, folder: &str) -> Result<Vec<(String, Vec<Listed>)>> {
        let listed = self.every_place(|member| async move {
            let listed = member.list(folder).await?;
            Ok((member.name().to_owned(), listed))
        });
        listed.await
    }

    /// The answers of the places that can be asked. Those that cannot are remembered; where none
    /// can, or the repository is strict, it is an error.
    async fn every_place<T, Answer>(&self, ask: impl Fn(Member) -> Answer) -> Result<Vec<T>>
    where
        Answer: Future<Output = Result<T>>,
    {
        let (mut answers, mut failed) = (Vec::new(), None);
        for member in &self.members {
            let asked = match self.silence_of(member) {
                Some(silence) => Err(silence),
                None => ask(member.clone()).await,
            };
            match asked {
                Ok(answer) => answers.push(answer),
                Err(error) if error.is_unreachable() && !self.strict => {
                    self.note_unheard(member, &error);
                    failed.get_or_insert(error);
                }
                Err(error) => return Err(error),
            }
        }
        match failed {
            Some(error) if answers.is_empty() => Err(error),
            _ => Ok(answers),
        }
    }

    fn note_unheard(&self, member: &Member, error: &RepositoryError) {
        let is_news = member.place().is_silent(error);
        if is_news && self.members.len() > 1 {
            tracing::warn!(
                "repository {} cannot be asked; what only it has is not seen: {error}",
                member.name()
            );
        }
    }

    /// The places that could not be asked at some time, each with the reason.
    pub fn unheard(&self) -> Vec<(String, String)> {
        let silent = self.members.iter().filter_map(|member| {
            let reason = member.place().unheard()?;
            Some((member.name().to_owned(), reason))
        });
        silent.collect()
    }

    /// The names of the places that could not be asked a moment ago.
    pub fn silent(&self) -> Vec<String> {
        let silent = self
            .members
            .iter()
            .filter(|member| self.silence_of(member).is_some());
        silent.map(|member| member.name().to_owned()).collect()
    }

    /// The names of the places that can be asked.
    pub fn heard(&self) -> Vec<String> {
        let heard = self
            .members
            .iter()
            .filter(|member| member.place().unheard().is_none());
        heard.map(|member| member.name().to_owned()).collect()
    }

    /// Takes in a backup's record as lists show it: where the key is not at hand, without its names.
    /// One that cannot be read does not hide the others.
    async fn list_backup(
        &self,
        id: BackupId,
        stored: &StoredByPlace,
        listed: &mut ListedBackups,
    ) -> Result<()> {
        match self.listed_backup(&id, stored).await {
            Ok(Some(record)) => listed.readable.push(record),
            Ok(None) => {}
            // one that was planted, or whose key is gone, does not hide the others either
            Err(error) if error.is_damage() => {
                let error = crate::error::Error::from(error);
                listed.left_out.push(LeftOut {
                    id,
                    reason: error.message().to_owned(),
                    hint: error.hint_text().map(str::to_owned),
                });
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }

    async fn listed_backup(
        &self,
        id: &BackupId,
        stored: &StoredByPlace,
    ) -> Result<Option<BackupRecord>> {
        let listed = self.first_of(|member| async move {
            let record = member.listed_backup(id).await?;
            let name = ObjectName::Backup(id.clone());
            let record = record.ok_or_else(|| RepositoryError::absent(member.locate(&name)))?;
            if let Some(stored) = stored.get(member.name()) {
                member.check_is_stored(&record, stored).await?;
            }
            Ok(record)
        });
        match listed.await {
            Ok(record) => Ok(Some(record)),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// As [`Self::find`]; one damaged object among many is said, and does not hide the others.
    async fn find_or_warn<T: DeserializeOwned>(&self, name: &ObjectName) -> Result<Option<T>> {
        match self.find(name).await {
            Err(error @ RepositoryError::Damaged { .. }) => {
                tracing::error!("left out: {error}");
                Ok(None)
            }
            other => other,
        }
    }

    /// Whether the WAL in a segment or a piece was checked and found whole.
    pub async fn is_verified(&self, name: &ObjectName) -> Result<bool> {
        let facts = self.trailer(name).await?.facts;
        let facts = facts.get("wal").cloned().unwrap_or_default();
        let facts: WalFacts =
            serde_json::from_value(facts).map_err(|error| RepositoryError::Damaged {
                path: self.locate(name),
                reason: format!("its trailer does not say what was verified: {error}"),
            })?;
        Ok(facts.verified)
    }

    /// Refuses a server whose segment size is not that of what is stored.
    pub async fn check_segment_size(&self, size: SegmentSize) -> Result<()> {
        let Some(newest) = self.timelines().await?.last().copied() else {
            return Ok(());
        };
        let wal = self.timeline_wal(newest).await?;
        let found = match self.size_of_any(names_of(&wal).rev()).await {
            // one that cannot be read says nothing, and does not stop what comes
            Err(error) if error.is_damage() => {
                tracing::error!("the segment size of what is stored is not known: {error}");
                return Ok(());
            }
            found => found?,
        };
        let Some((name, stored)) = found else {
            return Ok(());
        };
        if stored == size {
            return Ok(());
        }
        Err(RepositoryError::OtherSegmentSize {
            stored: stored.bytes(),
            found: size.bytes(),
            path: self.locate(&name),
        })
    }

    /// Makes everything durable that a listing shows.
    pub async fn sync(&self) -> Result<()> {
        let synced = self.every_place(|member| async move { Ok(member.store()?.sync().await?) });
        synced.await.map(drop)
    }

    /// What is stored of WAL in each place that can be asked.
    pub async fn wal_catalogs(&self) -> Result<Vec<Catalog>> {
        let listed = self.every_place(|member| async move { member.list("wal/").await });
        let catalog = |listed: Vec<Listed>| {
            let mut catalog = Catalog::default();
            catalog.add_listing(&listed);
            catalog
        };
        Ok(listed.await?.into_iter().map(catalog).collect())
    }

    /// What is stored of WAL, and where streams have been.
    pub async fn wal_catalog(&self) -> Result<Catalog> {
        let mut catalog = Catalog::default();
        catalog.add_listing(&self.list("wal/").await?);
        catalog.add_listing(&self.list("tip/").await?);
        for timeline in catalog.streamed.clone() {
            let tip = self.tip(timeline).await?;
            catalog.tips.extend(tip.map(|tip| (timeline, tip)));
        }
        Ok(catalog)
    }

    /// A timeline's tip. A hint: one that is damaged is as good as none, and one that cannot be asked
    /// for is not taken for none.
    async fn tip(&self, timeline: TimelineId) -> Result<Option<Tip>> {
        let name = &ObjectName::Tip(timeline);
        let found = self.every_place(|member| async move {
            match member.find::<Tip>(name).await {
                Err(error @ RepositoryError::Damaged { .. }) => {
                    tracing::warn!("passed over, and written anew by the next stream: {error}");
                    Ok(None)
                }
                found => found,
            }
        });
        // one place may have been away when the other was told
        let found = found.await?.into_iter().flatten();
        Ok(found.max_by_key(|tip| tip.lsn))
    }

    /// Every backup that came to its end, oldest first, by its record alone.
    pub async fn backup_records(&self) -> Result<ListedBackups> {
        let listed = self.list("backups/").await?;
        self.backups_among(&listed, &StoredByPlace::new()).await
    }

    /// Every backup that came to its end, oldest first. One that lacks packs or its manifest is among
    /// those that cannot be read.
    pub async fn backups(&self) -> Result<ListedBackups> {
        let mut listed = self.list_each("backups/").await?;
        let packs: BTreeMap<_, _> = self.list_each("packs/").await?.into_iter().collect();
        for (name, listed) in &mut listed {
            listed.extend(packs.get(name).into_iter().flatten().cloned());
        }
        let stored = stored_by_place(&listed);
        self.backups_among(&together(listed), &stored).await
    }

    /// The backups that a listing shows.
    async fn backups_among(
        &self,
        listed: &[Listed],
        stored: &StoredByPlace,
    ) -> Result<ListedBackups> {
        let of_backups = listed
            .iter()
            .filter(|object| object.path.starts_with("backups/"));
        let ids = of_backups.filter_map(|object| match ObjectName::parse(&object.path) {
            Some(ObjectName::Backup(id)) => Some(id),
            _ => None,
        });
        let read = ids.map(async |id| {
            let mut backup = ListedBackups::default();
            self.list_backup(id, stored, &mut backup).await?;
            Ok::<_, RepositoryError>(backup)
        });
        let mut backups = ListedBackups::default();
        let mut read = stream::iter(read.collect::<Vec<_>>()).buffered(RECORDS_AT_ONCE);
        while let Some(backup) = read.try_next().await? {
            backups.readable.extend(backup.readable);
            backups.left_out.extend(backup.left_out);
        }
        drop(read);
        let in_order =
            |a: &BackupRecord, b: &BackupRecord| (a.started_at, &a.id).cmp(&(b.started_at, &b.id));
        backups.readable.sort_by(in_order);
        Ok(backups)
    }

    /// The stored WAL of a timeline.
    pub async fn timeline_wal(&self, timeline: TimelineId) -> Result<TimelineWal> {
        let mut catalog = Catalog::default();
        catalog.add_listing(&self.list(&timeline_prefix(timeline)).await?);
        Ok(catalog.timelines.remove(&timeline).unwrap_or_default())
    }

    /// The timelines of which WAL is stored.
    pub async fn timelines(&self) -> Result<BTreeSet<TimelineId>> {
        let folders =
            self.every_place(|member| async move { Ok(member.store()?.folders("wal/").await?) });
        let folders = folders.await?;
        Ok(folders
            .iter()
            .flatten()
            .filter_map(|folder| TimelineId::from_hex8(folder))
            .collect())
    }

    /// The newest timeline of which WAL or the history is stored.
    pub async fn newest_timeline(&self) -> Result<Option<TimelineId>> {
        let files =
            self.every_place(|member| async move { Ok(member.store()?.files("wal/").await?) });
        let files = files.await?;
        let histories = files
            .iter()
            .flatten()
            .filter_map(|name| TimelineId::from_hex8(name.strip_suffix(".history")?));
        Ok(histories.max().max(self.timelines().await?.last().copied()))
    }

    /// A timeline's history file, as the server wrote it.
    pub async fn history(&self, timeline: TimelineId) -> Result<Option<Vec<u8>>> {
        match self.fetch(&ObjectName::History(timeline)).await {
            Ok(fetched) => Ok(Some(fetched.plain)),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The branch that ends in `timeline`, from its stored history.
    pub async fn branch(&self, timeline: TimelineId) -> Result<TimelineHistory> {
        match self.history(timeline).await? {
            None => Ok(TimelineHistory::new_first(timeline)),
            Some(text) => self.parse_history(timeline, &text),
        }
    }

    /// A timeline's history, without its reasons where the key is not at hand.
    async fn listed_history(&self, timeline: TimelineId) -> Result<Option<TimelineHistory>> {
        match self.history(timeline).await {
            Ok(Some(text)) => self.parse_history(timeline, &text).map(Some),
            Ok(None) => Ok(None),
            Err(error) if error.lacks_key() => {
                let facts = match self.trailer(&ObjectName::History(timeline)).await {
                    // the place that has it has fallen silent since
                    Err(error) if error.is_not_found() => return Ok(None),
                    trailer => trailer?.facts,
                };
                let ancestors = facts.get(HISTORY_FACTS).cloned().unwrap_or_default();
                let Ok(ancestors) = serde_json::from_value::<Vec<AncestorFacts>>(ancestors) else {
                    return Err(error);
                };
                let lines = ancestors
                    .iter()
                    .map(|ancestor| format!("{}\t{}\tsealed\n", ancestor.timeline, ancestor.end));
                let text: String = lines.collect();
                self.parse_history(timeline, text.as_bytes()).map(Some)
            }
            Err(error) => Err(error),
        }
    }

    fn parse_history(&self, timeline: TimelineId, text: &[u8]) -> Result<TimelineHistory> {
        TimelineHistory::parse(timeline, text).map_err(|error| RepositoryError::Damaged {
            path: self.locate(&ObjectName::History(timeline)),
            reason: error.to_string(),
        })
    }

    /// Everything that names and small objects tell.
    pub async fn catalog(&self) -> Result<Catalog> {
        let mut catalog = Catalog::default();
        let listed = self.list_each("").await?;
        let stored = stored_by_place(&listed);
        let listed = together(listed);
        catalog.add_listing(&listed);
        let backups = self.backups_among(&listed, &stored).await?;
        catalog.backups = backups.readable;
        catalog.left_out = backups.left_out;
        for object in &listed {
            match ObjectName::parse(&object.path) {
                Some(ObjectName::History(timeline)) => {
                    let history = self.listed_history(timeline).await?;
                    let history = history.map(|history| (timeline, history));
                    catalog.histories.extend(history);
                }
                Some(ObjectName::Tip(timeline)) => {
                    let tip = self.tip(timeline).await?;
                    catalog.tips.extend(tip.map(|tip| (timeline, tip)));
                }
                Some(name @ ObjectName::Hole { .. }) => {
                    catalog
                        .holes
                        .extend(self.find_or_warn::<Hole>(&name).await?);
                }
                _ => {}
            }
        }
        catalog.segment_size = self.segment_size(&catalog).await?;
        self.look_again_for_ends(&mut catalog).await?;
        Ok(catalog)
    }

    /// Lists timelines again of which a tip says more than was listed: it was read later, and a stream
    /// may be going on.
    async fn look_again_for_ends(&self, catalog: &mut Catalog) -> Result<()> {
        let Some(size) = catalog.segment_size else {
            return Ok(());
        };
        let tips: Vec<TimelineId> = catalog.tips.keys().copied().collect();
        for timeline in tips {
            if catalog.lost_end(timeline, size).is_some() {
                let wal = self.timeline_wal(timeline).await?;
                let known = catalog.timelines.get(&timeline);
                // a place may have fallen silent since
                if known.and_then(|known| known.end(size)) <= wal.end(size) {
                    catalog.timelines.insert(timeline, wal);
                }
            }
        }
        Ok(())
    }

    async fn segment_size(&self, catalog: &Catalog) -> Result<Option<SegmentSize>> {
        if let Some(backup) = catalog.backups.last() {
            let name = ObjectName::Backup(backup.id.clone());
            return self
                .checked_size(&name, Some(backup.segment_bytes))
                .map(Some);
        }
        let wals = catalog.timelines.values();
        let names = wals.flat_map(|wal| names_of(wal).rev());
        Ok(self.size_of_any(names).await?.map(|(_, size)| size))
    }

    /// The segment size that the first of these objects names, with its name. A piece that was listed
    /// may have given way since, or be damaged: then the next is asked.
    pub async fn size_of_any(
        &self,
        names: impl Iterator<Item = ObjectName>,
    ) -> Result<Option<(ObjectName, SegmentSize)>> {
        let (mut any_gone, mut damaged) = (false, None);
        for name in names {
            match self.segment_size_of(&name).await {
                Ok(size) => return Ok(Some((name, size))),
                Err(error) if error.is_not_found() => any_gone = true,
                Err(error) if error.is_damage() => {
                    damaged.get_or_insert(error);
                }
                Err(error) => return Err(error),
            }
        }
        if let Some(error) = damaged {
            return Err(error);
        }
        match self.unheard().pop() {
            // it may be in a place that has fallen silent since
            Some((_, reason)) if any_gone => Err(RepositoryError::Silent { reason }),
            _ => Ok(None),
        }
    }

    /// The segment size that the header of a stored segment or piece names.
    pub async fn segment_size_of(&self, name: &ObjectName) -> Result<SegmentSize> {
        let header = self.first_of(|member| async move { Ok(member.head(name).await?.1) });
        let bytes = header.await?.segment_bytes;
        self.checked_size(name, bytes)
    }

    fn checked_size(&self, name: &ObjectName, bytes: Option<u64>) -> Result<SegmentSize> {
        let size = bytes.and_then(|bytes| SegmentSize::from_bytes(bytes).ok());
        size.ok_or_else(|| RepositoryError::Damaged {
            path: self.locate(name),
            reason: format!("not a WAL segment size: {bytes:?}"),
        })
    }
}

/// What each place has of backups, by the place's name.
type StoredByPlace = BTreeMap<String, StoredBackups>;

fn stored_by_place(listed: &[(String, Vec<Listed>)]) -> StoredByPlace {
    let by_place = listed.iter();
    by_place
        .map(|(name, listed)| (name.clone(), StoredBackups::among(listed)))
        .collect()
}

/// What any place has, sorted by path.
fn together(listed: Vec<(String, Vec<Listed>)>) -> Vec<Listed> {
    let listed = match <[_; 1]>::try_from(listed) {
        Ok([(_, only)]) => return only,
        Err(several) => several,
    };
    let mut objects = BTreeMap::new();
    for object in listed.into_iter().flat_map(|(_, listed)| listed) {
        objects.entry(object.path).or_insert(object.bytes);
    }
    objects
        .into_iter()
        .map(|(path, bytes)| Listed { path, bytes })
        .collect()
}

/// Every piece of a timeline, and after them every segment.
fn names_of(wal: &TimelineWal) -> impl DoubleEndedIterator<Item = ObjectName> {
    let segments = wal.segments.iter().copied().map(ObjectName::Segment);
    let pieces = wal.pieces.iter().flat_map(|(segment, ranges)| {
        ranges.iter().map(|range| ObjectName::Piece {
            segment: *segment,
            range: *range,
        })
    });
    pieces.chain(segments)
}
