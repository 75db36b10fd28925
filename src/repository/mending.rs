//! Filling up the places that missed something from those that have it.
//!
//! A place is whole once it was seen to hold everything that the others hold, and has missed
//! nothing since. Objects are copied as they are stored where both places encrypt alike, which
//! takes no key; else they are decoded and encoded anew. A damaged object is not copied.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use bytes::Bytes;
use container::Header;
use tokio::sync::watch;
use wal::Lsn;

use super::contents::first_difference;
use super::layout::{BackupId, ObjectName};
use super::member::Member;
use super::{Repository, RepositoryError, Result};
use crate::retry::Backoff;

/// Places that seem whole are compared again this often: another program may write to one of them.
const COMPARED_AGAIN: Duration = Duration::from_hours(1);

/// What could not be copied, though no place seems to be away, is tried again this often: it may be
/// damaged for good, and each attempt lists every place.
const NOT_COPIED_AGAIN: Duration = Duration::from_mins(5);

/// How one place stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlaceState {
    /// Its name in settings.
    pub name: String,
    /// Its address.
    pub url: String,
    /// How many objects and backups it lacks that another place has; an error where it cannot be
    /// asked.
    pub missing: Result<usize, String>,
}

/// What a place lacks, in the order in which it is copied.
#[derive(Debug, Default, PartialEq, Eq)]
struct Lacking {
    /// Histories, WAL, holes.
    objects: Vec<ObjectName>,
    /// Backups, oldest first.
    backups: Vec<BackupId>,
}

impl Repository {
    /// Whether every place holds everything.
    pub fn is_whole(&self) -> bool {
        let mut members = self.members.iter();
        self.members.len() == 1 || members.all(|member| member.place().is_whole())
    }

    /// How each place stands beside the others.
    pub async fn places(&self) -> Vec<PlaceState> {
        let mut listings = Vec::new();
        for member in &self.members {
            let listed = match self.members.len() {
                // there is nothing to compare it with
                1 => Ok(BTreeSet::new()),
                _ => member.list("").await.map(|listed| names(&listed)),
            };
            listings.push((member, listed));
        }
        let heard = listings
            .iter()
            .filter_map(|(_, listed)| listed.as_ref().ok());
        let all: BTreeSet<ObjectName> = heard.flatten().cloned().collect();
        let state = |(member, listed): (&Member, Result<BTreeSet<ObjectName>>)| PlaceState {
            name: member.name().to_owned(),
            url: member.place().url().to_owned(),
            missing: listed.map_err(|error| error.to_string()).map(|listed| {
                let lacking = lacking(&all, &BTreeSet::new(), &listed);
                lacking.objects.len().saturating_add(lacking.backups.len())
            }),
        };
        listings.into_iter().map(state).collect()
    }

    /// Fills up places that fall behind, for as long as it is polled, and says after each attempt
    /// whether all of them are whole.
    pub async fn keep_whole(self, whole: watch::Sender<bool>) {
        let new = || Backoff::new(Duration::from_secs(1), Duration::from_secs(30));
        let mut backoff = new();
        let mut compared: Option<(Instant, Duration)> = None;
        loop {
            let is_due = compared.is_none_or(|(at, interval)| at.elapsed() > interval);
            if is_due || !self.is_whole() {
                let again_after = if self.mend(is_due).await {
                    COMPARED_AGAIN
                } else {
                    NOT_COPIED_AGAIN
                };
                compared = Some((Instant::now(), again_after));
            }
            let is_whole = self.is_whole();
            // also where nothing seems to have changed: it may have ceased to be and become again
            whole.send_replace(is_whole);
            if is_whole {
                backoff = new();
            }
            backoff.wait().await;
        }
    }

    /// Fills up every place that is not whole (`all`: every place) from the others. Says whether
    /// every place holds everything then, backups too.
    pub async fn mend(&self, all: bool) -> bool {
        let mut all_copied = true;
        for target in &self.members {
            if self.members.len() == 1 || !(all || target.place().is_to_fill()) {
                continue;
            }
            let was_whole = !target.place().is_to_fill();
            match self.fill_up(target).await {
                Ok(filled) => {
                    all_copied &= filled.backups_too;
                    let is_news = filled.copied > 0 || !was_whole;
                    let is_news_left = target.place().is_news_left(filled.left.len());
                    if is_news_left && !filled.left.is_empty() {
                        tracing::warn!(
                            "repository {} is not complete: copied to it={}, cannot be copied={}",
                            target.name(),
                            filled.copied,
                            filled.left.len()
                        );
                    } else if is_news
                        && filled.left.is_empty()
                        && filled.backups_too
                        && !target.place().is_to_fill()
                    {
                        tracing::info!(
                            "repository {} is complete: copied to it={}",
                            target.name(),
                            filled.copied
                        );
                    }
                }
                Err(error) => {
                    all_copied = false;
                    if error.is_unreachable() {
                        target.place().missed(None, Some(&error));
                    } else {
                        target.place().missed(None, None);
                        tracing::error!(
                            "repository {} cannot be filled up: {error}",
                            target.name()
                        );
                    }
                }
            }
        }
        all_copied && self.is_whole()
    }

    /// Copies what `target` lacks: WAL first, since acknowledgements may wait for it, then backups.
    async fn fill_up(&self, target: &Member) -> Result<Filled> {
        if let Some((identity, new_system)) = self.identity {
            target.prepare(identity, new_system).await?;
        }
        // from here on new objects are written to it again; what passed it over, and ends after this,
        // is counted among what it has missed
        let missed = target.place().answers();
        let mut filled = Filled {
            copied: 0,
            left: BTreeSet::new(),
            backups_too: true,
        };
        let mut all_heard = true;
        let mut backups: Vec<(&Member, BackupId)> = Vec::new();
        for source in &self.members {
            if source.name() == target.name() {
                continue;
            }
            let listed = if source.place().is_away() {
                None
            } else {
                heard(source, source.list("").await)?
            };
            let Some(listed) = listed else {
                all_heard = false;
                continue;
            };
            let there = names(&target.list("").await?);
            // a listing may be late; what this process has written is looked for by name
            let written = target.place().missed_names();
            let lacking = lacking(&names(&listed), &written, &there);
            let count = lacking.objects.len() + lacking.backups.len();
            if count > 0 && target.place().was_made_beside(source.place()) {
                // a disk that is not mounted leaves an empty folder, to which all would be copied
                tracing::warn!(
                    "repository {} was made anew, and lacks {count} objects that {} holds: they are copied \
                     to it. hint: if it was there before, is its disk mounted?",
                    target.name(),
                    source.name()
                );
            }
            for name in &lacking.objects {
                let copied = match self.agree(source, target, name, &there).await {
                    Ok(()) => self.copied_or_damaged(source, target, name).await?,
                    Err(error) if excused(source, target, &error) => Copied::Left,
                    Err(error) => return Err(error),
                };
                match copied {
                    Copied::Held => {
                        filled.copied += 1;
                        filled.left.remove(name);
                    }
                    Copied::Left => {
                        filled.left.insert(name.clone());
                        // what this process wrote is not acknowledged yet
                        all_heard &= !target.place().has_missed(name);
                    }
                    Copied::Unheard => {
                        all_heard = false;
                        break;
                    }
                }
            }
            backups.extend(lacking.backups.into_iter().map(|id| (source, id)));
        }
        if all_heard {
            target.place().filled_up(missed);
        }
        filled.backups_too &= all_heard;
        for (source, id) in backups {
            let name = ObjectName::Backup(id.clone());
            match source.copy_backup(target, &id).await {
                Ok(()) => {
                    filled.copied += 1;
                    filled.left.remove(&name);
                }
                Err(error) if excused(source, target, &error) => {
                    filled.left.insert(name);
                }
                Err(error) if target.list("intents/").await.is_ok() && error.is_unreachable() => {
                    // it is the source that does not answer
                    filled.backups_too = false;
                }
                Err(error) => return Err(error),
            }
        }
        let mut left = filled.left.iter();
        filled.backups_too &= !left.any(|name| matches!(name, ObjectName::Backup(_)));
        Ok(filled)
    }

    /// Refuses WAL of another history than the target has in the same segment: a segment is read instead of
    /// its pieces, and would hide them. Where a key lacks, or one of both is damaged, nothing can be said.
    async fn agree(
        &self,
        source: &Member,
        target: &Member,
        name: &ObjectName,
        there: &BTreeSet<ObjectName>,
    ) -> Result<()> {
        let (ObjectName::Segment(segment) | ObjectName::Piece { segment, .. }) = name else {
            return Ok(());
        };
        let of_segment = |other: &&ObjectName| matches!(other, ObjectName::Piece { segment: s, .. } if s == segment);
        let Some(held) = there.iter().find(of_segment) else {
            return Ok(());
        };
        let (source, target) = (self.only(source), self.only(target));
        let size = target.segment_size_of(held).await?;
        let ours = source.readable_content(*segment, size).await;
        let theirs = target.readable_content(*segment, size).await;
        let (Ok(ours), Ok(theirs)) = (ours, theirs) else {
            return Ok(());
        };
        let Some(at) = first_difference(&ours.content, &theirs.content) else {
            return Ok(());
        };
        let start = segment.start(size).unwrap_or(Lsn::ZERO);
        Err(RepositoryError::TwoHistories {
            lsn: start.saturating_add(u64::try_from(at).unwrap_or(u64::MAX)),
            timeline: segment.timeline,
            path: target.locate(held),
        })
    }

    /// Copies an object.
    async fn copied_or_damaged(
        &self,
        source: &Member,
        target: &Member,
        name: &ObjectName,
    ) -> Result<Copied> {
        let stored = match source.raw(name).await {
            Ok(stored) => stored,
            // gone since it was listed: a piece gave way to its segment
            Err(error) if error.is_not_found() => return Ok(Copied::Held),
            read => match heard(source, read)? {
                Some(stored) => stored,
                None => return Ok(Copied::Unheard),
            },
        };
        match source.copy(target, name, stored).await {
            Ok(()) => Ok(Copied::Held),
            Err(error) if excused(source, target, &error) => Ok(Copied::Left),
            // the wraps of its key, perhaps, which the source has: one of both did not answer, and
            // it is not the target
            Err(error) if error.is_unreachable() && target.check_format().await.is_ok() => {
                Ok(Copied::Unheard)
            }
            Err(error) => Err(error),
        }
    }

    /// Whether every place holds a backup.
    pub async fn has_everywhere(&self, id: &BackupId) -> Result<bool> {
        for member in &self.members {
            if member.backup_fields(id).await?.is_none() {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// What became of an object that a place lacks.
enum Copied {
    /// The place has it, or need not have it any more.
    Held,
    /// It cannot be copied: damaged, or of another history, or its key is not at hand.
    Left,
    /// The source does not answer.
    Unheard,
}

/// What a place was filled up with.
struct Filled {
    /// How many objects and backups were copied.
    copied: usize,
    /// What can be copied from nowhere.
    left: BTreeSet<ObjectName>,
    /// Whether it has every backup too.
    backups_too: bool,
}

/// What a source said; `None` where it does not answer, which is no fault of the target's.
fn heard<T>(source: &Member, answer: Result<T>) -> Result<Option<T>> {
    match answer {
        Err(error) if error.is_unreachable() => {
            source.place().missed(None, Some(&error));
            Ok(None)
        }
        answer => answer.map(Some),
    }
}

/// Whether the others are copied all the same; the error is said then.
fn excused(source: &Member, target: &Member, error: &RepositoryError) -> bool {
    let is_conflict = matches!(
        error,
        RepositoryError::Conflict { .. } | RepositoryError::TwoHistories { .. }
    );
    let excused = is_conflict || error.is_damage() || error.lacks_key();
    if excused {
        tracing::error!(
            "cannot be copied from repository {} to {}: {error}",
            source.name(),
            target.name()
        );
    }
    excused
}

fn names(listed: &[super::store::Listed]) -> BTreeSet<ObjectName> {
    let names = listed.iter().map(|object| ObjectName::parse(&object.path));
    names.flatten().collect()
}

/// What is listed `here`, or was `written` and may be, and is not `there`. Hints, summaries (which can be made
/// anew), and what belongs to an unfinished backup are nobody's loss.
///
/// A segment that is listed is copied instead of its pieces; one that was written may be nowhere.
fn lacking(
    here: &BTreeSet<ObjectName>,
    written: &BTreeSet<ObjectName>,
    there: &BTreeSet<ObjectName>,
) -> Lacking {
    let mut lacking = Lacking::default();
    for name in here.union(written).filter(|name| !there.contains(name)) {
        match name {
            ObjectName::Backup(id) => lacking.backups.push(id.clone()),
            ObjectName::Piece { segment, range } => {
                let covered = there.contains(&ObjectName::Segment(*segment))
                    || here.contains(&ObjectName::Segment(*segment))
                    || there.iter().any(|other| {
                        matches!(other, ObjectName::Piece { segment: s, range: r }
                            if s == segment && r.start <= range.start && range.end <= r.end)
                    });
                if !covered {
                    lacking.objects.push(name.clone());
                }
            }
            ObjectName::Segment(_)
            | ObjectName::Partial(_)
            | ObjectName::BackupHistory { .. }
            | ObjectName::History(_)
            | ObjectName::Hole { .. } => lacking.objects.push(name.clone()),
            ObjectName::Cluster
            | ObjectName::Intent(_)
            | ObjectName::Unfinished(_)
            | ObjectName::Mark { .. }
            | ObjectName::Tip(_)
            | ObjectName::Index(_)
            | ObjectName::Manifest(_)
            | ObjectName::FileList { .. }
            | ObjectName::Pack { .. } => {}
        }
    }
    // histories first: without them the WAL of a timeline has no place
    lacking
        .objects
        .sort_by_key(|name| !matches!(name, ObjectName::History(_)));
    lacking
}

impl Member {
    /// Copies one object that is no backup's.
    async fn copy(&self, target: &Self, name: &ObjectName, stored: Bytes) -> Result<()> {
        if let ObjectName::Hole { .. } = name {
            return match target.create_text(name, stored).await {
                // the same hole, found at another time
                Err(RepositoryError::Conflict { .. }) => Ok(()),
                other => other,
            };
        }
        let was = self.header_in(name, &stored)?;
        if self.copies_to(target, name, &was).await? {
            let (_, trailer) =
                container::check_stored(&stored).map_err(|error| self.damaged(name, &error))?;
            return target.create_object(name, stored, &trailer.digest).await;
        }
        self.encode_anew(target, name, was, stored).await
    }

    /// Decodes an object with this header, and stores it as `target` encodes.
    pub(super) async fn encode_anew(
        &self,
        target: &Self,
        name: &ObjectName,
        was: Header,
        stored: Bytes,
    ) -> Result<()> {
        let fetched = self.decode(name, stored).await?;
        let adapt = |header: &mut Header| {
            header.timeline = was.timeline;
            header.start = was.start;
            header.end = was.end;
            header.segment_bytes = was.segment_bytes;
        };
        let level = target.place().settings().wal_level;
        target
            .store_container(name, adapt, fetched.facts, fetched.plain.into(), level)
            .await
    }

    /// Whether an object can be copied as it is stored; the wraps of its key are copied then.
    pub(super) async fn copies_to(
        &self,
        target: &Self,
        name: &ObjectName,
        header: &Header,
    ) -> Result<bool> {
        let (here, there) = (self.place().open()?, target.place().open()?);
        if !here.encryption.reads_like(&there.encryption) {
            return Ok(false);
        }
        match &header.key {
            None => Ok(!there.encryption.is_configured()),
            Some(key) => {
                let path = self.locate(name);
                let wraps = here.encryption.copy_wraps(&there.encryption, key, &path);
                // without a wrap nobody could open it there
                Ok(wraps.await? > 0 || !header.wraps.is_empty())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use wal::{Lsn, SegmentName, SegmentSize, TimelineId, Verifier, WalRange, WalkerStart};

    use super::*;
    use crate::clock::{Clock, SystemClock};
    use crate::repository::ServerIdentity;
    use crate::repository::destination::Destination;

    fn segment(number: u64) -> SegmentName {
        let size = SegmentSize::from_bytes(16 << 20).unwrap();
        let timeline = TimelineId::from_hex8("00000001").unwrap();
        SegmentName::of(timeline, Lsn::new(number << 24), size)
    }

    fn piece(number: u64, start: u64, end: u64) -> ObjectName {
        let at = |offset| Lsn::new((number << 24) + offset);
        ObjectName::Piece {
            segment: segment(number),
            range: WalRange {
                start: at(start),
                end: at(end),
            },
        }
    }

    #[test]
    fn lacks_what_nothing_there_covers() {
        let id: BackupId = "20261121T000000.000Z".parse().unwrap();
        let here = BTreeSet::from([
            ObjectName::Cluster,
            ObjectName::Segment(segment(1)),
            piece(1, 0, 100),
            piece(2, 0, 100),
            piece(2, 100, 200),
            ObjectName::Backup(id.clone()),
            ObjectName::Pack {
                backup: id.clone(),
                number: 0,
            },
        ]);
        let there = BTreeSet::from([ObjectName::Cluster, piece(2, 0, 150)]);
        let found = lacking(&here, &BTreeSet::new(), &there);
        assert_eq!(found.backups, [id]);
        assert_eq!(
            found.objects,
            [ObjectName::Segment(segment(1)), piece(2, 100, 200)]
        );
        assert_eq!(lacking(&here, &here, &here), Lacking::default());
    }

    /// A segment that no place took would stand for the piece that one of them has acknowledged.
    #[test]
    fn what_was_written_in_vain_covers_nothing() {
        let whole = ObjectName::Segment(segment(1));
        let here = BTreeSet::from([piece(1, 0, 100)]);
        let written = BTreeSet::from([whole.clone(), piece(1, 0, 100)]);
        let found = lacking(&here, &written, &BTreeSet::new());
        assert_eq!(found.objects, [whole, piece(1, 0, 100)]);
    }

    const MIB: u64 = 1 << 20;

    /// A folder in which a segment's bytes up to `end` are stored, each of them `byte`.
    async fn place(folder: &Path, end: u64, byte: u8) -> Destination {
        let destination = Destination::local(folder, "main");
        let size = SegmentSize::from_bytes(MIB).unwrap();
        let timeline = TimelineId::from_hex8("00000001").unwrap();
        let range = WalRange::new(Lsn::new(MIB), Lsn::new(MIB + end));
        let segment = SegmentName::of(timeline, range.start, size);
        let mut verifier = Verifier::new(WalkerStart {
            at: range.start,
            segment_size: size,
            major: None,
            timeline,
            system_id: None,
            skip_to: None,
        });
        let bytes = vec![byte; usize::try_from(end).unwrap()];
        verifier.push(&bytes);
        let checked = verifier.check(range, bytes);
        let name = if end == MIB {
            ObjectName::Segment(segment)
        } else {
            ObjectName::Piece { segment, range }
        };
        let repository = opened(&destination).await;
        let encoded = repository.encode_wal(name, timeline, size, checked).await;
        repository.put_wal(&encoded.unwrap()).await.unwrap();
        destination
    }

    async fn opened(destination: &Destination) -> Repository {
        let clock: Arc<dyn Clock> = Arc::new(SystemClock);
        let identity = ServerIdentity {
            system_id: 7,
            major: 18,
            block_bytes: 8192,
        };
        let open = destination.open(true, &clock).unwrap();
        open.repository(identity, false).await.unwrap()
    }

    /// A segment is read instead of its pieces: commits that only these have would be gone.
    #[tokio::test]
    async fn another_history_is_not_copied_over_the_pieces_of_a_segment() {
        for (theirs, is_copied) in [(1, true), (2, false)] {
            let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
            let mut both = place(folders[0].path(), MIB, 1).await;
            let mut second = place(folders[1].path(), 1000, theirs).await;
            second.places[0].name = "second".to_owned();
            both.places.append(&mut second.places);
            let repository = opened(&both).await;
            repository.mend(true).await;
            let second = repository.only(&repository.members[1]);
            let stored = names(&second.members[0].list("wal/").await.unwrap());
            let has_segment = stored
                .iter()
                .any(|name| matches!(name, ObjectName::Segment(_)));
            assert_eq!(has_segment, is_copied, "{stored:?}");
        }
    }
}
