//! What goes to the store, and what comes of it.

use std::sync::Arc;
use std::time::Instant;

use wal::{Checked, SegmentName, WalRange};

use super::{Conversation, JobDone};
use crate::error::{Error, Result, chain};
use crate::receive::intake::TwoHistories;
use crate::receive::pieces::Superseded;
use crate::receive::session::{Event, Store};
use crate::receive::storing::{self, Kept, SpoolNews};
use crate::repository::layout::ObjectName;
use crate::repository::{Drained, EncodedWal, RepositoryError, Stored};

impl Conversation<'_> {
    /// Gives the store what the rules want it to have, if the bytes are here and not lent out.
    pub(super) fn store_what_is_due(&mut self) -> Result<()> {
        let Some(intake) = &self.intake else {
            return Ok(());
        };
        self.others
            .compare(|range, digest| intake.agrees(range, digest))
            .map_err(|at| {
                let timeline = self.timeline;
                Error::from(TwoHistories { at, timeline })
            })?;
        let mut due = Vec::new();
        while let Some(store) = self.session.poll_store(Instant::now()) {
            let (Store::Piece(range) | Store::Merged(range) | Store::Segment(range)) = store;
            let checked = intake.stretch(range).ok_or_else(|| {
                Error::failure(format!(
                    "no bytes at hand for {} to {}",
                    range.start, range.end
                ))
            })?;
            due.push(checked);
        }
        for (name, checked) in self.others.released() {
            self.store(name, checked);
        }
        for checked in due {
            self.store_piece(checked);
        }
        self.say_who_is_ahead();
        Ok(())
    }

    /// Stores a piece once it is known what else is stored of its segment.
    fn store_piece(&mut self, checked: Checked<'static>) {
        let range = checked.range();
        self.unstored_bytes += range.len_bytes();
        let segment = SegmentName::of(self.timeline, range.start, self.size);
        let piece = (ObjectName::Piece { segment, range }, checked);
        let (free, is_new) = self.others.admit(segment, piece, Instant::now());
        if is_new {
            let looked = Arc::clone(&self.storing).look(segment, self.compared);
            self.jobs.spawn(async move {
                let found = looked.await?;
                Ok(JobDone::Looked(segment, found))
            });
        }
        for (name, checked) in free {
            self.store(name, checked);
        }
    }

    fn say_who_is_ahead(&mut self) {
        if let Some(end) = self.others.suspicion(Instant::now()) {
            let timeline = self.timeline;
            tracing::error!(
                "another archiver has stored WAL up to {end} on timeline {timeline}, which this server \
                 does not send: nothing more is acknowledged until it does. hint: do two servers take \
                 themselves for the primary? a standby that is behind catches up"
            );
        }
    }

    pub(super) fn store_segment(&mut self, checked: Checked<'static>) -> Result<()> {
        let range = checked.range();
        let due = self.session.poll_store(Instant::now());
        if due != Some(Store::Segment(range)) {
            return Err(Error::failure(format!(
                "a whole segment was not expected at {}: {due:?}",
                range.start
            )));
        }
        let segment = SegmentName::of(self.timeline, range.start, self.size);
        self.unstored_bytes += range.len_bytes();
        self.store(ObjectName::Segment(segment), checked);
        for (name, checked) in self.others.leave() {
            self.store(name, checked);
        }
        Ok(())
    }

    fn store(&mut self, name: ObjectName, checked: Checked<'static>) {
        self.stores_under_way += 1;
        let storing = Arc::clone(&self.storing);
        let unrecorded = Arc::clone(&self.unrecorded);
        let supersedes = self.session.is_merge(checked.range());
        self.jobs.spawn(async move {
            // whoever looks must not find what follows before he finds the note
            if *unrecorded.borrow() > 0 {
                let recorded = unrecorded
                    .subscribe()
                    .wait_for(|count| *count == 0)
                    .await
                    .is_ok();
                assert!(recorded, "this job holds the sender itself");
            }
            let wal = storing.take(name, checked, supersedes);
            if storing.keep_here(&wal) {
                return Ok(JobDone::Kept(Kept::Stored(wal, Stored::Everywhere)));
            }
            // a large future, and a commit waits for each job that is made
            let kept = Box::pin(storing.keep(wal)).await?;
            Ok(JobDone::Kept(kept))
        });
    }

    pub(super) fn job_done(
        &mut self,
        done: Result<Result<JobDone, RepositoryError>, tokio::task::JoinError>,
    ) -> Result<()> {
        self.note_what_is_stored();
        let done = done.map_err(|error| Error::failure(format!("a store job failed: {error}")))?;
        let (wal, stored) = match done? {
            JobDone::Kept(Kept::Stored(wal, stored)) => {
                self.stores_under_way -= 1;
                (wal, stored)
            }
            JobDone::Kept(Kept::Spooled(range)) => {
                self.stores_under_way -= 1;
                self.spooled(range);
                return Ok(());
            }
            JobDone::Looked(segment, found) => {
                self.others.found(segment, found);
                return Ok(());
            }
            JobDone::Cleaned(bytes) => {
                self.cleaning_bytes -= bytes;
                return Ok(());
            }
            JobDone::Aside => return Ok(()),
        };
        let range = wal.checked.range();
        if stored == Stored::Partly {
            self.hold_unless_whole();
        }
        self.unstored_bytes = self.unstored_bytes.saturating_sub(range.len_bytes());
        let merged = self.session.is_merge(range);
        let now = Instant::now();
        self.session.handle(Event::Stored(range), now);
        // what it covers has no other way out of the spool
        for covered in self.in_spool.left(range) {
            self.session.handle(Event::Stored(covered), now);
        }
        self.stored = Some((wal, merged));
        Ok(())
    }

    /// Does what is left to do for what was stored last.
    pub(super) fn note_what_is_stored(&mut self) {
        let Some((wal, merged)) = self.stored.take() else {
            return;
        };
        self.show_stored(&wal.name, wal.checked.range(), merged);
        self.tell_index(&wal.name);
        self.show_spool();
        self.advance_tip();
        self.remove_superseded(wal, merged);
    }

    fn tell_index(&self, name: &ObjectName) {
        if let (Some(indexing), ObjectName::Segment(segment)) = (&self.indexing, name) {
            indexing.is_stored(*segment, self.size);
        }
    }

    /// Takes note that a stretch is durable in the spool, and in memory no longer.
    pub(super) fn spooled(&mut self, range: WalRange) {
        self.unstored_bytes = self.unstored_bytes.saturating_sub(range.len_bytes());
        let event = if self.storing.is_spooled(range) {
            self.in_spool.insert(range);
            Event::Spooled(range)
        } else {
            // it has gone on to the repository before this was heard
            Event::Stored(range)
        };
        self.session.handle(event, Instant::now());
        self.spool_moved();
    }

    /// Takes note of what went on from the spool to the repository. Only what this connection
    /// received counts: nothing else was compared with what this server sends.
    pub(super) fn heard_of_spool(&mut self, news: SpoolNews) -> Result<()> {
        match news {
            SpoolNews::Failed(error) => Err(error.into()),
            SpoolNews::Drained(Drained::Lost(name)) => match self.storing.range_of(&name) {
                Some(_) => Err(storing::lost(&name)),
                None => Ok(()),
            },
            SpoolNews::Drained(Drained::Stored(name, stored)) => {
                let Some(stretch) = self.storing.range_of(&name) else {
                    return Ok(());
                };
                if stored == Stored::Partly {
                    self.hold_unless_whole();
                }
                self.show_stored(&name, stretch, false);
                self.tell_index(&name);
                for range in self.in_spool.left(stretch) {
                    self.session.handle(Event::Stored(range), Instant::now());
                }
                self.spool_moved();
                self.advance_tip();
                Ok(())
            }
        }
    }

    /// Removes the pieces that an acknowledged object covers.
    pub(super) fn remove_superseded(&mut self, wal: Arc<EncodedWal>, merged: bool) {
        let range = wal.checked.range();
        let (mut pieces, mut late) = (Vec::new(), Vec::new());
        while let Some(Superseded { piece, by }) = self.session.poll_superseded() {
            let name = self.piece_name(piece);
            if by == range {
                pieces.push(name);
            } else {
                // of a piece that came late
                let segment = SegmentName::of(self.timeline, by.start, self.size);
                late.push((name, ObjectName::Segment(segment)));
            }
        }
        let is_segment = matches!(wal.name, ObjectName::Segment(_));
        let from_start = range.start == self.size.start_of(range.start);
        // pieces of other connections and of backups are looked for
        let others = is_segment || (merged && from_start);
        if !others && pieces.is_empty() && late.is_empty() {
            return;
        }
        let segment = SegmentName::of(self.timeline, range.start, self.size);
        let (repository, gauges) = (self.repository.clone(), self.gauges.clone());
        let held_bytes = range.len_bytes();
        self.cleaning_bytes += held_bytes;
        self.jobs.spawn(async move {
            let removed = async {
                let mut removed = repository.remove_pieces(&pieces, &wal).await?;
                for (piece, by) in &late {
                    removed += repository.remove_piece_covered(piece, by).await?;
                }
                if others {
                    removed += repository.remove_superseded_pieces(segment, &wal).await?;
                }
                Ok(removed)
            };
            match removed.await {
                Ok(removed) => gauges.update(|state| state.pieces_removed += removed),
                Err(error) if RepositoryError::is_unreachable(&error) => {
                    tracing::warn!("superseded pieces stay for now: {}", chain(&error));
                }
                Err(error) => return Err(error),
            }
            drop(wal);
            Ok(JobDone::Cleaned(held_bytes))
        });
    }

    pub(super) fn piece_name(&self, range: WalRange) -> ObjectName {
        let segment = SegmentName::of(self.timeline, range.start, self.size);
        ObjectName::Piece { segment, range }
    }
}
