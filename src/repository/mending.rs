//! Filling up the places that missed something from those that have it.
//!
//! A place is whole once it was seen to hold everything that the others hold, and has missed
//! nothing since. Objects are copied as they are stored where both places encrypt alike, which
//! takes no key; else they are decoded and encoded anew. A damaged object is not copied.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use container::{Header, Reading};
use tokio::sync::watch;

use super::layout::{BackupId, ObjectName};
use super::member::Member;
use super::{Repository, RepositoryError, Result};
use crate::retry::Backoff;

/// Places that seem whole are compared again this often: another program may write to one of them.
const COMPARED_AGAIN: Duration = Duration::from_hours(1);

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
                let lacking = lacking(&all, &listed);
                lacking.objects.len().saturating_add(lacking.backups.len())
            }),
        };
        listings.into_iter().map(state).collect()
    }

    /// Fills up places that fall behind, for as long as it is polled, and says whenever all of them
    /// have become whole or have ceased to be.
    pub async fn keep_whole(self, whole: watch::Sender<bool>) {
        let new = || Backoff::new(Duration::from_secs(1), Duration::from_secs(30));
        let mut backoff = new();
        let mut compared = None;
        loop {
            let is_due = compared.is_none_or(|at: Instant| at.elapsed() > COMPARED_AGAIN);
            if is_due || !self.is_whole() {
                self.mend(is_due).await;
                compared = Some(Instant::now());
            }
            let is_whole = self.is_whole();
            whole.send_if_modified(|was| std::mem::replace(was, is_whole) != is_whole);
            if is_whole {
                backoff = new();
            }
            backoff.wait().await;
        }
    }

    /// Fills up every place that is not whole (`all`: every place) from the others. Says whether
    /// all are whole then.
    pub async fn mend(&self, all: bool) -> bool {
        for target in &self.members {
            if self.members.len() == 1 || (target.place().is_whole() && !all) {
                continue;
            }
            let was_whole = target.place().is_whole();
            match self.fill_up(target).await {
                Ok(copied) if target.place().is_whole() && (copied > 0 || !was_whole) => {
                    tracing::info!(
                        "repository {} is complete: objects copied to it={copied}",
                        target.name()
                    );
                }
                Ok(_) => {}
                Err(error) if error.is_unreachable() => {
                    target.place().missed(None, Some(&error));
                }
                Err(error) => {
                    target.place().missed(None, None);
                    tracing::error!("repository {} cannot be filled up: {error}", target.name());
                }
            }
        }
        self.is_whole()
    }

    /// Copies what `target` lacks; how many objects that were.
    async fn fill_up(&self, target: &Member) -> Result<usize> {
        if let Some((identity, new_system)) = self.identity {
            target.prepare(identity, new_system).await?;
        }
        // from here on new objects are written to it again; once those have ended that were not,
        // what is listed below is all that it can lack
        let missed = target.place().answers();
        self.in_flight.settle().await;
        let mut copied = 0;
        let mut all_heard = true;
        for source in &self.members {
            if source.name() == target.name() {
                continue;
            }
            if source.place().is_away() {
                all_heard = false;
                continue;
            }
            let listed = match source.list("").await {
                Ok(listed) => listed,
                Err(error) if error.is_unreachable() => {
                    all_heard = false;
                    continue;
                }
                Err(error) => return Err(error),
            };
            let there = names(&target.list("").await?);
            let lacking = lacking(&names(&listed), &there);
            for name in &lacking.objects {
                all_heard &= self.copied_or_damaged(source, target, name).await?;
                copied += 1;
            }
            for id in &lacking.backups {
                match source.copy_backup(target, id).await {
                    Ok(()) => copied += 1,
                    Err(error) if excused(source, target, &error) => {}
                    Err(error) => return Err(error),
                }
            }
        }
        if all_heard {
            target.place().filled_up(missed);
        }
        Ok(copied)
    }

    /// Copies an object. One that cannot be is left; the place is not whole then if it was written
    /// by this process, which has not acknowledged it yet.
    async fn copied_or_damaged(
        &self,
        source: &Member,
        target: &Member,
        name: &ObjectName,
    ) -> Result<bool> {
        match source.copy(target, name).await {
            Ok(()) => Ok(true),
            // gone since it was listed: a piece gave way to its segment
            Err(error) if error.is_not_found() => Ok(true),
            Err(error) if excused(source, target, &error) => Ok(!target.place().has_missed(name)),
            Err(error) => Err(error),
        }
    }
}

/// Whether the others are copied all the same; the error is said then.
fn excused(source: &Member, target: &Member, error: &RepositoryError) -> bool {
    let excused = matches!(
        error,
        RepositoryError::Damaged { .. } | RepositoryError::Conflict { .. }
    ) || error.lacks_key();
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

/// What of `here` is not `there`. Hints and what belongs to an unfinished backup are nobody's loss.
fn lacking(here: &BTreeSet<ObjectName>, there: &BTreeSet<ObjectName>) -> Lacking {
    let mut lacking = Lacking::default();
    for name in here.difference(there) {
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
            | ObjectName::Tip(_)
            | ObjectName::Manifest(_)
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
    async fn copy(&self, target: &Self, name: &ObjectName) -> Result<()> {
        let stored = self.raw(name).await?;
        if let ObjectName::Hole { .. } = name {
            return match target.create_text(name, stored).await {
                // the same hole, found at another time
                Err(RepositoryError::Conflict { .. }) => Ok(()),
                other => other,
            };
        }
        if self.copies_to(target, name, &stored).await? {
            let (_, trailer) =
                container::check_stored(&stored).map_err(|error| self.damaged(name, &error))?;
            return target.create_object(name, stored, &trailer.digest).await;
        }
        let Ok(Reading::Done((was, _))) = container::read_header(&stored) else {
            return Err(self.decode(name, stored).await.err().unwrap_or_else(|| {
                RepositoryError::Damaged {
                    path: self.locate(name),
                    reason: "it has no header".to_owned(),
                }
            }));
        };
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
        stored: &[u8],
    ) -> Result<bool> {
        let header = self.header_in(name, stored)?;
        let (here, there) = (self.place().open()?, target.place().open()?);
        if !here.encryption.reads_like(&there.encryption) {
            return Ok(false);
        }
        match &header.key {
            None => Ok(!there.encryption.is_configured()),
            Some(key) => {
                let path = self.locate(name);
                here.encryption
                    .copy_wraps(&there.encryption, key, &path)
                    .await?;
                Ok(true)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use wal::{Lsn, SegmentName, TimelineId, WalRange};

    use super::*;

    fn segment(number: u64) -> SegmentName {
        let size = wal::SegmentSize::from_bytes(16 << 20).unwrap();
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
        let found = lacking(&here, &there);
        assert_eq!(found.backups, [id]);
        assert_eq!(
            found.objects,
            [ObjectName::Segment(segment(1)), piece(2, 100, 200)]
        );
        assert_eq!(lacking(&here, &here), Lacking::default());
    }
}
