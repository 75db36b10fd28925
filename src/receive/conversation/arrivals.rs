//! What comes from the server: gathered, verified, and told to the rules.

use std::sync::Arc;
use std::time::Instant;

use futures_util::FutureExt as _;
use replication::stream::{StreamError, StreamEvent, WalStream};

use super::{Conversation, JobDone, Verified, pump};
use crate::error::Result;
use crate::receive::ended::{Ended, stream_failed};
use crate::receive::intake::{Finding, Unusable};
use crate::receive::session::Event;
use crate::repository::records::Hole;

/// So much WAL is verified where it came; more goes to another thread.
const VERIFIED_HERE_BYTES: u64 = 64 << 10;

impl Conversation<'_> {
    /// Takes what the server sent, and what WAL has come with it: a commit waits for each piece, and one
    /// piece for all of them is durable sooner than one for the first and one for the rest. Says so where
    /// the conversation is over.
    pub(super) fn heard_all(
        &mut self,
        first: Result<StreamEvent, StreamError>,
        stream: &mut Option<WalStream>,
    ) -> Result<Option<Ended>> {
        let mut event = first;
        loop {
            let is_wal = matches!(event, Ok(StreamEvent::Wal { .. }));
            let ended = self.heard(event)?;
            if !is_wal || self.gathered_bytes >= VERIFIED_HERE_BYTES {
                return Ok(ended);
            }
            match pump(stream, true).now_or_never() {
                Some(next) => event = next,
                None => return Ok(ended),
            }
        }
    }

    /// Takes what the server sent. Says so where the conversation is over.
    fn heard(&mut self, event: Result<StreamEvent, StreamError>) -> Result<Option<Ended>> {
        match event {
            Ok(StreamEvent::Wal {
                start,
                bytes,
                server_end,
                ..
            }) => {
                let came = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
                self.gathered_bytes += came;
                self.gathered.push((start, bytes));
                let now = self.clock.now();
                self.gauges.update(|state| {
                    state.heard_end(server_end, now);
                    state.received_at = Some(now);
                    state.received_bytes += came;
                });
                Ok(None)
            }
            Ok(StreamEvent::Keepalive {
                reply_requested,
                server_end,
                ..
            }) => {
                let now = self.clock.now();
                self.gauges.update(|state| state.heard_end(server_end, now));
                let reply = reply_requested;
                self.session
                    .handle(Event::Keepalive { reply }, Instant::now());
                // answered at once; what came before it is stored at once too, when it is verified
                self.reply_wanted |= reply && !self.is_all_verified();
                Ok(None)
            }
            Ok(StreamEvent::TimelineEnd { next, at }) => {
                tracing::info!(
                    "timeline {} ended at {at}: following timeline {next}",
                    self.timeline
                );
                Ok(Some(Ended::NextTimeline))
            }
            Ok(StreamEvent::ServerClosed) => {
                Ok(Some(Ended::Lost("the server shut down".to_owned())))
            }
            Err(error) => stream_failed(&error).map(Some),
        }
    }

    pub(super) fn is_all_verified(&self) -> bool {
        self.gathered.is_empty() && self.verifying.is_none()
    }

    /// Compares and verifies what has come: here where it is little, else on another thread.
    pub(super) fn verify_what_came(&mut self) -> Result<()> {
        if self.gathered.is_empty() {
            return Ok(());
        }
        let Some(mut intake) = self.intake.take() else {
            return Ok(());
        };
        let came = std::mem::take(&mut self.gathered);
        let bytes = std::mem::take(&mut self.gathered_bytes);
        if bytes <= VERIFIED_HERE_BYTES {
            let parts = intake.take_all(&came);
            self.take_back((intake, parts))
        } else {
            self.lent_bytes = bytes;
            self.verifying = Some(tokio::task::spawn_blocking(move || {
                let parts = intake.take_all(&came);
                (intake, parts)
            }));
            Ok(())
        }
    }

    pub(super) fn take_back(&mut self, (intake, parts): Verified) -> Result<()> {
        self.intake = Some(intake);
        self.lent_bytes = 0;
        let parts = parts?;
        for part in parts {
            for finding in &part.findings {
                self.note_finding(*finding);
            }
            let event = Event::Wal {
                end: part.end,
                shutdown: part.shutdown,
            };
            self.session.handle(event, Instant::now());
            if let Some(segment) = part.full {
                self.store_segment(segment)?;
            }
        }
        if std::mem::take(&mut self.reply_wanted) {
            let reply = Event::Keepalive { reply: true };
            self.session.handle(reply, Instant::now());
        }
        Ok(())
    }

    /// Says that WAL cannot be used, and notes that the window ends there, as it does at a hole. What
    /// is given to the store from now on counts once that is noted: nobody would know later.
    pub(super) fn note_finding(&mut self, finding: Finding) {
        let (from, timeline) = (finding.from, self.timeline);
        let reason = match finding.reason {
            Unusable::Unverified(reason) => {
                tracing::error!(
                    "WAL cannot be verified from {from} on timeline {timeline}: {reason}; it is \
                     stored as it came. hint: take a backup now, and check the server's disk"
                );
                format!("it could not be verified: {reason}")
            }
            Unusable::Minimal => {
                tracing::error!(
                    "the server ran with wal_level=minimal from {from} on: moments since then \
                     cannot be restored. hint: take a backup now"
                );
                Hole::MINIMAL_WAL.to_owned()
            }
        };
        let hole = Hole {
            timeline,
            start: from,
            end: self.size.end_of(from),
            found_at: self.clock.now(),
            reason,
            unverified: true,
        };
        let now = self.clock.now();
        self.gauges.update(|state| {
            state.holes += 1;
            state.failed(now, hole.reason.clone());
        });
        let repository = self.repository.clone();
        let failures = self.storing.failures().clone();
        let unrecorded = Arc::clone(&self.unrecorded);
        unrecorded.send_modify(|count| *count += 1);
        self.jobs.spawn(async move {
            let then =
                "that WAL cannot be used is not recorded yet, and nothing behind it is stored";
            failures
                .ask_until_answered(then, || repository.record_hole(&hole))
                .await?;
            unrecorded.send_modify(|count| *count -= 1);
            Ok(JobDone::Aside)
        });
    }
}
