//! Reading: objects checked against what they say they are, and what names tell.

use std::collections::BTreeSet;

use bytes::Bytes;
use container::Header;
use serde::de::DeserializeOwned;
use wal::{SegmentName, SegmentSize, TimelineHistory, TimelineId};

use super::catalog::{Catalog, TimelineWal};
use super::layout::{BackupId, ObjectName, pieces_prefix, timeline_prefix};
use super::records::{BackupRecord, FORMAT, Hole, Tip, WalFacts};
use super::store::StoreError;
use super::{
    Fetched, PLAIN_BYTES_MAX, Repository, RepositoryError, Result, SegmentContent, blocking,
};
use crate::error::chain;

/// How much of an object's end is read to find its trailer.
const TAIL_BYTES: u64 = 16 << 10;

impl Repository {
    /// Reads, checks and decodes an object.
    pub async fn fetch(&self, name: &ObjectName) -> Result<Fetched> {
        let object = self.store.get(&name.path()).await?;
        let decoded = blocking(move || container::decode(&object, PLAIN_BYTES_MAX, None))
            .await
            .map_err(|error| self.damaged(name, &error))?;
        self.check_header(name, &decoded.header)?;
        Ok(Fetched {
            plain: decoded.plain,
            facts: decoded.trailer.facts,
        })
    }

    /// `length` stored bytes of an object from `offset`.
    pub async fn fetch_range(&self, name: &ObjectName, offset: u64, length: u64) -> Result<Bytes> {
        Ok(self.store.get_range(&name.path(), offset, length).await?)
    }

    fn check_header(&self, name: &ObjectName, header: &Header) -> Result<()> {
        let expected = (
            name.path(),
            self.cluster.as_str(),
            self.system_id.to_string(),
        );
        if (&header.name, header.cluster.as_str(), &header.system_id)
            == (&expected.0, expected.1, &expected.2)
        {
            return Ok(());
        }
        Err(RepositoryError::Damaged {
            path: self.locate(name),
            reason: format!(
                "it says that it is another object: cluster={}, system={}, name={}",
                header.cluster, header.system_id, header.name
            ),
        })
    }

    pub(super) async fn trailer(&self, name: &ObjectName) -> Result<container::Trailer> {
        let mut wanted = TAIL_BYTES;
        loop {
            let (tail, object_bytes) = self.store.get_tail(&name.path(), wanted).await?;
            match container::read_trailer(&tail, object_bytes) {
                Ok(container::Reading::Done(trailer)) => return Ok(trailer),
                Ok(container::Reading::NeedMore(bytes)) if bytes > wanted => wanted = bytes,
                Ok(container::Reading::NeedMore(_)) => {
                    return Err(RepositoryError::Damaged {
                        path: self.locate(name),
                        reason: "no whole trailer at its end".to_owned(),
                    });
                }
                Err(error) => return Err(self.damaged(name, &error)),
            }
        }
    }

    pub(super) fn damaged(&self, name: &ObjectName, error: &container::Error) -> RepositoryError {
        match error {
            container::Error::NewerFormat { found, .. } => RepositoryError::Newer {
                path: self.locate(name),
                format: *found,
            },
            other => RepositoryError::Damaged {
                path: self.locate(name),
                reason: chain(other),
            },
        }
    }

    pub(super) async fn find<T: DeserializeOwned>(&self, name: &ObjectName) -> Result<Option<T>> {
        let bytes = match self.store.get(&name.path()).await {
            Ok(bytes) => bytes,
            Err(StoreError::NotFound { .. }) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let damaged = |error: serde_json::Error| RepositoryError::Damaged {
            path: self.locate(name),
            reason: error.to_string(),
        };
        let format: Format = serde_json::from_slice(&bytes).map_err(damaged)?;
        if let Some(format) = format.format.filter(|format| *format > FORMAT) {
            return Err(RepositoryError::Newer {
                path: self.locate(name),
                format,
            });
        }
        serde_json::from_slice(&bytes).map(Some).map_err(damaged)
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

    /// A backup by its id; `None` if there is none, or it never came to its end.
    pub async fn backup(&self, id: &BackupId) -> Result<Option<BackupRecord>> {
        self.find(&ObjectName::Backup(id.clone())).await
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
        let piece = || {
            let (segment, ranges) = wal.pieces.last_key_value()?;
            let range = *ranges.last()?;
            Some(ObjectName::Piece {
                segment: *segment,
                range,
            })
        };
        let segment = wal
            .segments
            .last()
            .map(|segment| ObjectName::Segment(*segment));
        let Some(name) = segment.or_else(piece) else {
            return Ok(());
        };
        let stored = self.segment_size_of(&name).await?;
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
        Ok(self.store.sync().await?)
    }

    /// What is stored of WAL, and where streams have been.
    pub async fn wal_catalog(&self) -> Result<Catalog> {
        let mut catalog = Catalog::default();
        catalog.add_listing(&self.store.list("wal/").await?);
        for object in self.store.list("tip/").await? {
            if let Some(name @ ObjectName::Tip(timeline)) = ObjectName::parse(&object.path)
                && let Ok(Some(tip)) = self.find::<Tip>(&name).await
            {
                catalog.tips.insert(timeline, tip);
            }
        }
        Ok(catalog)
    }

    /// Every backup that came to its end, oldest first.
    pub async fn backups(&self) -> Result<Vec<BackupRecord>> {
        let mut backups = Vec::new();
        for object in self.store.list("backups/").await? {
            if let Some(name @ ObjectName::Backup(_)) = ObjectName::parse(&object.path) {
                backups.extend(self.find_or_warn::<BackupRecord>(&name).await?);
            }
        }
        backups.sort_by(|a, b| (a.started_at, &a.id).cmp(&(b.started_at, &b.id)));
        Ok(backups)
    }

    /// The stored WAL of a timeline.
    pub async fn timeline_wal(&self, timeline: TimelineId) -> Result<TimelineWal> {
        let mut catalog = Catalog::default();
        catalog.add_listing(&self.store.list(&timeline_prefix(timeline)).await?);
        Ok(catalog.timelines.remove(&timeline).unwrap_or_default())
    }

    /// The timelines of which WAL is stored.
    pub async fn timelines(&self) -> Result<BTreeSet<TimelineId>> {
        let folders = self.store.folders("wal/").await?;
        Ok(folders
            .iter()
            .filter_map(|folder| TimelineId::from_hex8(folder))
            .collect())
    }

    /// The newest timeline of which WAL or the history is stored.
    pub async fn newest_timeline(&self) -> Result<Option<TimelineId>> {
        let histories = self.store.files("wal/").await?;
        let histories = histories
            .iter()
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

    fn parse_history(&self, timeline: TimelineId, text: &[u8]) -> Result<TimelineHistory> {
        TimelineHistory::parse(timeline, text).map_err(|error| RepositoryError::Damaged {
            path: self.locate(&ObjectName::History(timeline)),
            reason: error.to_string(),
        })
    }

    /// Everything that names and small objects tell.
    pub async fn catalog(&self) -> Result<Catalog> {
        let mut catalog = Catalog::default();
        let listed = self.store.list("").await?;
        catalog.add_listing(&listed);
        for object in &listed {
            match ObjectName::parse(&object.path) {
                Some(name @ ObjectName::Backup(_)) => {
                    catalog
                        .backups
                        .extend(self.find::<BackupRecord>(&name).await?);
                }
                Some(ObjectName::History(timeline)) => {
                    if let Some(text) = self.history(timeline).await? {
                        catalog
                            .histories
                            .insert(timeline, self.parse_history(timeline, &text)?);
                    }
                }
                Some(name @ ObjectName::Tip(timeline)) => {
                    // a hint: one that cannot be read is as good as none
                    if let Ok(Some(tip)) = self.find::<Tip>(&name).await {
                        catalog.tips.insert(timeline, tip);
                    }
                }
                Some(name @ ObjectName::Hole { .. }) => {
                    catalog
                        .holes
                        .extend(self.find_or_warn::<Hole>(&name).await?);
                }
                _ => {}
            }
        }
        catalog
            .backups
            .sort_by(|a, b| (a.started_at, &a.id).cmp(&(b.started_at, &b.id)));
        catalog.segment_size = self.segment_size(&catalog).await?;
        Ok(catalog)
    }

    async fn segment_size(&self, catalog: &Catalog) -> Result<Option<SegmentSize>> {
        if let Some(backup) = catalog.backups.last() {
            let name = ObjectName::Backup(backup.id.clone());
            return self
                .checked_size(&name, Some(backup.segment_bytes))
                .map(Some);
        }
        for wal in catalog.timelines.values() {
            let piece = wal.pieces.iter().next();
            let piece = piece.and_then(|(segment, ranges)| {
                ranges.first().map(|range| ObjectName::Piece {
                    segment: *segment,
                    range: *range,
                })
            });
            let name = wal
                .segments
                .first()
                .map(|segment| ObjectName::Segment(*segment))
                .or(piece);
            if let Some(name) = name {
                return self.segment_size_of(&name).await.map(Some);
            }
        }
        Ok(None)
    }

    /// The segment size that the header of a stored segment or piece names.
    pub async fn segment_size_of(&self, name: &ObjectName) -> Result<SegmentSize> {
        let prefix = self.store.get_range(&name.path(), 0, 4096).await?;
        let bytes = match container::read_header(&prefix) {
            Ok(container::Reading::Done((header, _))) => header.segment_bytes,
            Ok(container::Reading::NeedMore(_)) => None,
            Err(error) => return Err(self.damaged(name, &error)),
        };
        self.checked_size(name, bytes)
    }

    fn checked_size(&self, name: &ObjectName, bytes: Option<u64>) -> Result<SegmentSize> {
        let size = bytes.and_then(|bytes| SegmentSize::from_bytes(bytes).ok());
        size.ok_or_else(|| RepositoryError::Damaged {
            path: self.locate(name),
            reason: format!("not a WAL segment size: {bytes:?}"),
        })
    }

    /// The bytes of a segment, from the complete one or put together from its pieces; `None`
    /// where nothing from its beginning on is stored.
    pub async fn segment_content(
        &self,
        segment: SegmentName,
        size: SegmentSize,
    ) -> Result<Option<SegmentContent>> {
        // a piece that was listed may be gone when it is read: the segment has taken its place
        for _ in 0..3 {
            match self.fetch(&ObjectName::Segment(segment)).await {
                Ok(fetched) => {
                    return Ok(Some(SegmentContent {
                        bytes: fetched.plain,
                        complete: true,
                    }));
                }
                Err(error) if error.is_not_found() => {}
                Err(error) => return Err(error),
            }
            match self.assemble(segment, size).await {
                Ok(bytes) => {
                    return Ok(bytes.map(|bytes| SegmentContent {
                        bytes,
                        complete: false,
                    }));
                }
                Err(error) if error.is_not_found() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    pub(super) async fn pieces_of(&self, segment: SegmentName) -> Result<Vec<ObjectName>> {
        let listed = self.store.list(&pieces_prefix(segment)).await?;
        let names = listed
            .iter()
            .filter_map(|object| ObjectName::parse(&object.path));
        Ok(names
            .filter(|name| matches!(name, ObjectName::Piece { .. }))
            .collect())
    }

    async fn assemble(&self, segment: SegmentName, size: SegmentSize) -> Result<Option<Vec<u8>>> {
        let Some(start) = segment.start(size) else {
            return Ok(None);
        };
        let mut bytes: Vec<u8> = Vec::new();
        // listed by path, so by start: each piece overlaps what is there, follows it, or is beyond
        for name in self.pieces_of(segment).await? {
            let ObjectName::Piece { range, .. } = &name else {
                continue;
            };
            let at = range.start.bytes_since(start);
            let have = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
            if at > have {
                break;
            }
            let piece = self.fetch(&name).await?.plain;
            let damaged = |reason: String| RepositoryError::Damaged {
                path: self.locate(&name),
                reason,
            };
            if u64::try_from(piece.len()).ok() != Some(range.end.bytes_since(range.start))
                || range.end.bytes_since(start) > size.bytes()
            {
                return Err(damaged(format!(
                    "its name does not fit its length: {}",
                    piece.len()
                )));
            }
            let overlap = usize::try_from(have.saturating_sub(at)).unwrap_or(usize::MAX);
            let overlap = overlap.min(piece.len());
            let (known, new) = piece.split_at(overlap);
            let from = usize::try_from(at).unwrap_or(usize::MAX);
            let stored = bytes
                .get(from..from.saturating_add(overlap))
                .unwrap_or_default();
            if let Some(differs) = known.iter().zip(stored).position(|(a, b)| a != b) {
                return Err(RepositoryError::TwoHistories {
                    lsn: range
                        .start
                        .saturating_add(u64::try_from(differs).unwrap_or(u64::MAX)),
                    timeline: segment.timeline,
                    path: self.locate(&name),
                });
            }
            bytes.extend_from_slice(new);
        }
        Ok((!bytes.is_empty()).then_some(bytes))
    }
}

/// What is read of any small object before the rest: whether we can know the rest.
#[derive(serde::Deserialize)]
struct Format {
    format: Option<u32>,
}
