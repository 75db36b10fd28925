//! Where the stream stands: shown, asked of the server, and noted as the tip.

use std::time::Instant;

use jiff::SignedDuration;
use wal::{Lsn, WalRange};

use super::{Conversation, JobDone};
use crate::error::chain;
use crate::receive::session::Event;
use crate::repository::layout::ObjectName;
use crate::repository::records::Tip;
use crate::server::{self, Moment, Standing, SyncState};

/// A commit is stamped before its record is written: moments are counted this much earlier.
const COMMIT_STAMP_ALLOWANCE: SignedDuration = SignedDuration::from_secs(1);
/// So many moments wait for their position to be stored at most; a store that is further behind
/// gets some of them only.
const MOMENTS_MAX: usize = 256;

impl Conversation<'_> {
    /// Takes note that something came into the spool or left it.
    pub(super) fn spool_moved(&mut self) {
        // what goes from the spool takes the pieces with it that it covers
        while self.session.poll_superseded().is_some() {}
        self.show_spool();
    }

    /// Shows what lies in the spool.
    pub(super) fn show_spool(&self) {
        let (bytes, objects) = self.storing.spool_size();
        self.gauges
            .update(|state| (state.spool_bytes, state.spool_objects) = (bytes, objects));
    }

    /// Shows where the connection stands.
    pub(super) fn show(&mut self) {
        self.gauges.beat();
        let progress = self.session.progress();
        let now = (progress.received(), progress.stored(), progress.reported());
        if self.shown.replace(now) == Some(now) {
            return;
        }
        self.gauges.update(|state| {
            state.received = Some(now.0);
            state.stored_to(now.1);
            state.reported = Some(now.2);
        });
    }

    /// Counts an object that the repository has acknowledged.
    pub(super) fn show_stored(&self, name: &ObjectName, range: WalRange, merged: bool) {
        let (now, bytes) = (self.clock.now(), range.len_bytes());
        let is_segment = matches!(name, ObjectName::Segment(_));
        self.gauges.update(|state| {
            state.stored_at = Some(now);
            match (is_segment, merged) {
                (true, _) => state.segments_stored += 1,
                (false, true) => state.merges += 1,
                (false, false) => state.pieces_stored += 1,
            }
            if !merged {
                state.stored_bytes += bytes;
            }
        });
    }

    /// Takes note of whether the server waits for us, and of what it keeps for us.
    pub(super) fn stands(&mut self, standing: &Standing) {
        let waits = standing.waits_for_us() || self.options.synchronous;
        if waits != self.session.is_waited_for() {
            let what = if waits { "wait" } else { "no longer wait" };
            tracing::info!("commits on the server {what} for this stream");
            if waits && self.storing.spool_acknowledges() {
                tracing::error!(
                    "acknowledge = \"spool\" is refused while commits wait for this stream: only what \
                     is in the repository is reported. hint: take anywhen out of \
                     synchronous_standby_names, or set acknowledge to \"all\""
                );
            }
        }
        let now = Instant::now();
        self.session.handle(Event::Waited(waits), now);
        if !standing.is_asynchronous() {
            self.session.handle(Event::Unsure, now);
        }
        let is_hidden = standing.sync_state == Some(SyncState::Hidden);
        if is_hidden && !waits && !std::mem::replace(&mut self.warned_hidden, true) {
            tracing::warn!(
                "the server does not show whether commits wait for this stream: if they do, they wait \
                 for the flush interval, and a spool is not acknowledged. hint: GRANT pg_monitor TO the \
                 stream's role; with --synchronous it need not be known"
            );
        }
        if waits && standing.remote_apply && !std::mem::replace(&mut self.warned_apply, true) {
            tracing::warn!(
                "synchronous_commit is remote_apply, and an archiver applies nothing: commits that \
                 ask for it wait for ever. hint: synchronous_commit = on"
            );
        }
        self.gauges.update(|state| {
            state.synchronous = waits;
            state.slot_state.clone_from(&standing.slot_state);
            state.retained_bytes = standing.retained_bytes;
        });
    }

    /// Keeps a moment until its position is stored.
    pub(super) fn keep_moment(&mut self, moment: Moment) {
        if self.moments.len() == MOMENTS_MAX {
            // the newest gives way: the oldest will be reached first
            self.moments.pop_back();
        }
        self.moments.push_back(moment);
        self.advance_tip();
    }

    /// Rewrites the tip once the position of a newer moment is stored, and it is time.
    pub(super) fn advance_tip(&mut self) {
        let stored = self.session.progress().stored();
        if stored == Lsn::ZERO {
            return;
        }
        while let Some(moment) = self.moments.front()
            && moment
                .lsn
                .is_none_or(|lsn| server::without_page_header(lsn, self.size) <= stored)
        {
            self.moment = self.moments.pop_front();
        }
        let Some(moment) = self.moment else { return };
        let time = moment
            .lsn
            .map(|_known| moment.time - COMMIT_STAMP_ALLOWANCE);
        if time.is_some() {
            self.gauges.update(|state| state.moment = time);
        }
        let is_due = self
            .tip_written_at
            .is_none_or(|at| at.elapsed() >= self.options.tip_interval);
        let tip = Tip {
            lsn: stored,
            confirmed_at: self.clock.now(),
            moment: time,
        };
        if !is_due || self.tip.as_ref().is_some_and(|last| last.lsn > tip.lsn) {
            return;
        }
        self.moment = None;
        self.tip_written_at = Some(Instant::now());
        self.tip = Some(tip.clone());
        let repository = self.repository.clone();
        let failures = self.storing.failures().clone();
        let timeline = self.timeline;
        self.jobs.spawn(async move {
            match repository.write_tip(timeline, &tip).await {
                Ok(()) => {}
                Err(error) if error.is_unreachable() => {
                    failures.note(&error, "the tip was not rewritten");
                }
                Err(error) => tracing::warn!("the tip was not rewritten: {}", chain(&error)),
            }
            Ok(JobDone::Aside)
        });
    }
}
