//! What a stream shows of itself: written by the receiver, read by metrics and the service manager.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use jiff::{SignedDuration, Timestamp};
use tokio::sync::{Notify, watch};
use wal::{Lsn, TimelineId};

/// The state of one stream as it is now. Pure data; positions are on `timeline`, byte counts begin
/// with the process.
///
/// `received >= stored >= reported` while connected; each is as far as this connection has come.
/// Where the spool acknowledges, `reported` may be ahead of `stored`: what lies between is there.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StreamState {
    /// Whether there is a server to receive from.
    pub connection: Connection,
    /// The server that is, or was last, connected: `host:port`.
    pub server: Option<String>,
    /// The replication slot; `None` without one.
    pub slot: Option<String>,
    /// What the server says of the slot: `wal_status` of `pg_replication_slots`, or why there is
    /// none.
    pub slot_state: Option<String>,
    /// WAL that the server keeps for the slot, in bytes.
    pub retained_bytes: Option<u64>,
    /// The timeline that is received.
    pub timeline: Option<TimelineId>,
    /// The end of what was received, exclusive.
    pub received: Option<Lsn>,
    /// The end of what is durable in the repository, exclusive.
    pub stored: Option<Lsn>,
    /// What the server was last told.
    pub reported: Option<Lsn>,
    /// The end of WAL as the server last said it, in a message of WAL or a keepalive.
    pub server_end: Option<Lsn>,
    /// Since when there is WAL on the server that is not stored, on this connection.
    pub unstored: Unstored,
    /// When WAL was last received.
    pub received_at: Option<Timestamp>,
    /// When the repository last acknowledged WAL.
    pub stored_at: Option<Timestamp>,
    /// The newest moment that is known to be restorable, given a backup.
    pub moment: Option<Timestamp>,
    /// Whether commits on the server wait for this stream.
    pub synchronous: bool,
    /// Plain WAL received, in bytes; what was sent twice counts twice.
    pub received_bytes: u64,
    /// Plain WAL that the repository has acknowledged, in bytes; merged pieces count once.
    pub stored_bytes: u64,
    /// Complete segments stored.
    pub segments_stored: u64,
    /// Pieces stored, merged ones left out.
    pub pieces_stored: u64,
    /// Pieces stored to take the place of smaller ones.
    pub merges: u64,
    /// Pieces removed because another object covers them.
    pub pieces_removed: u64,
    /// Holes that this process noted: removed before they were received, unverifiable, or written
    /// with `wal_level=minimal`.
    pub holes: u64,
    /// How often the stream began again after it had been lost.
    pub reconnects: u64,
    /// What is in the spool and not in the repository, in bytes as stored.
    pub spool_bytes: u64,
    /// The same, in objects.
    pub spool_objects: u64,
    /// What last went wrong, also where it is over.
    pub last_error: Option<StreamFailure>,
}

/// Whether there is a server to receive from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Connection {
    /// It is being met: connecting, reading what is stored, comparing.
    #[default]
    Connecting,
    /// WAL comes as the server writes it.
    Streaming,
    /// It was lost, and is met again after a wait.
    Waiting,
    /// The stream was asked to end, and stores what it has.
    Stopping,
    /// It is over.
    Stopped,
}

/// Something that went wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamFailure {
    /// When.
    pub at: Timestamp,
    /// What was said of it.
    pub message: String,
}

impl Connection {
    /// Every value.
    pub const ALL: [Self; 5] = [
        Self::Connecting,
        Self::Streaming,
        Self::Waiting,
        Self::Stopping,
        Self::Stopped,
    ];

    /// The word for it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Connecting => "connecting",
            Self::Streaming => "streaming",
            Self::Waiting => "waiting",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
        }
    }
}

impl StreamState {
    /// WAL that the server is known to have and the repository has not, in bytes.
    pub fn lag_bytes(&self) -> Option<u64> {
        let (end, stored) = (self.server_end?, self.stored?);
        Some(if end > stored {
            end.bytes_since(stored)
        } else {
            0
        })
    }

    /// How much time would be lost if the server were lost at `now`: zero while everything that it
    /// is known to have is stored, otherwise the age of the oldest of that which is not. Of what was
    /// there before this connection, and where the server cannot be heard, that is the age of the
    /// newest restorable moment; `None` where none is known.
    pub fn lag(&self, now: Timestamp) -> Option<SignedDuration> {
        let mut since = self.moment;
        if self.connection == Connection::Streaming {
            if self.lag_bytes() == Some(0) {
                return Some(SignedDuration::ZERO);
            }
            since = self.unstored.since().or(since);
        }
        Some(now.duration_since(since?).max(SignedDuration::ZERO))
    }

    /// The server was connected, perhaps another one than before.
    pub fn begins(&mut self) {
        // it may be behind the last one
        self.server_end = None;
        self.unstored = Unstored::default();
    }

    /// The server said at `now` that its WAL ends at `end`.
    pub fn heard_end(&mut self, end: Lsn, now: Timestamp) {
        self.server_end = self.server_end.max(Some(end));
        self.unstored.heard(end, now);
        // where all of it is stored, that is not said again
        if let Some(stored) = self.stored {
            self.unstored.stored(stored);
        }
    }

    /// Everything before `end` is stored.
    pub fn stored_to(&mut self, end: Lsn) {
        self.stored = Some(end);
        self.unstored.stored(end);
    }

    /// Notes what went wrong.
    pub fn failed(&mut self, at: Timestamp, message: impl Into<String>) {
        let message = message.into();
        self.last_error = Some(StreamFailure { at, message });
    }
}

/// Ends of the server's WAL that are not stored, and when they were heard of.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Unstored {
    /// Oldest first. The first one of a connection has no time: what it ends was there before.
    ends: VecDeque<(Lsn, Option<Timestamp>)>,
    begun: bool,
}

impl Unstored {
    /// So many ends are kept apart; where more come, the last one stands for them.
    const ENDS_MAX: usize = 600;
    /// What is heard within so long of an end counts as heard with it.
    const APART: SignedDuration = SignedDuration::from_millis(100);

    /// When the oldest WAL that is not stored was heard of; `None` where it was there before.
    fn since(&self) -> Option<Timestamp> {
        self.ends.front().and_then(|(_, heard)| *heard)
    }

    fn heard(&mut self, end: Lsn, now: Timestamp) {
        let heard = std::mem::replace(&mut self.begun, true).then_some(now);
        let is_full = self.ends.len() >= Self::ENDS_MAX;
        match self.ends.back_mut() {
            Some((last, _)) if *last >= end => {}
            Some((last, Some(then))) if is_full || now.duration_since(*then) < Self::APART => {
                *last = end;
            }
            _ => self.ends.push_back((end, heard)),
        }
    }

    fn stored(&mut self, to: Lsn) {
        while self.ends.pop_front_if(|(end, _)| *end <= to).is_some() {}
    }
}

/// The one state of a stream, shared by those who write and those who read it.
#[derive(Debug, Clone, Default)]
pub struct StreamGauges {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    state: watch::Sender<StreamState>,
    beats: AtomicU64,
    nudge: Notify,
}

impl Default for Inner {
    fn default() -> Self {
        Self {
            state: watch::Sender::new(StreamState::default()),
            beats: AtomicU64::new(0),
            nudge: Notify::new(),
        }
    }
}

impl StreamGauges {
    /// Changes the state; `change` must not call this again.
    pub fn update(&self, change: impl FnOnce(&mut StreamState)) {
        self.inner.state.send_modify(change);
    }

    /// The state as it is now.
    pub fn read(&self) -> StreamState {
        self.inner.state.borrow().clone()
    }

    /// Tells of every change from now on.
    pub fn subscribe(&self) -> watch::Receiver<StreamState> {
        self.inner.state.subscribe()
    }

    /// The receiver's loop has turned once.
    pub fn beat(&self) {
        self.inner.beats.fetch_add(1, Ordering::Relaxed);
    }

    /// How often the loop has turned.
    pub fn beats(&self) -> u64 {
        self.inner.beats.load(Ordering::Relaxed)
    }

    /// Asks the loop to turn once, though it has nothing to do.
    pub fn nudge(&self) {
        self.inner.nudge.notify_one();
    }

    /// Returns once the loop is asked to turn: for the loop alone. Nothing is lost when this is
    /// dropped.
    pub async fn nudged(&self) {
        self.inner.nudge.notified().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(seconds).unwrap()
    }

    fn state(stored: u64, server_end: u64) -> StreamState {
        StreamState {
            connection: Connection::Streaming,
            stored: Some(Lsn::new(stored)),
            server_end: Some(Lsn::new(server_end)),
            moment: Some(at(100)),
            ..StreamState::default()
        }
    }

    #[test]
    fn nothing_is_behind_on_an_idle_server() {
        // an alarm at night because nobody writes is an alarm that is switched off
        let state = state(500, 500);
        assert_eq!(state.lag_bytes(), Some(0));
        assert_eq!(state.lag(at(100_000)), Some(SignedDuration::ZERO));
    }

    #[test]
    fn what_is_not_stored_ages_from_the_newest_restorable_moment() {
        let state = state(500, 700);
        assert_eq!(state.lag_bytes(), Some(200));
        assert_eq!(state.lag(at(130)), Some(SignedDuration::from_secs(30)));
        // the server's clock is ahead of ours
        assert_eq!(state.lag(at(90)), Some(SignedDuration::ZERO));
    }

    /// With a commit on its way at every moment, the age of a moment that is asked for every few
    /// seconds would be an alarm.
    #[test]
    fn what_came_on_this_connection_ages_from_when_it_was_heard_of() {
        let mut state = state(500, 500);
        let lag_ms = |state: &StreamState, millis: i64| {
            let now = at(1000) + SignedDuration::from_millis(millis);
            state.lag(now).map(|lag| lag.as_millis())
        };
        let hear = |state: &mut StreamState, end, millis| {
            let now = at(1000) + SignedDuration::from_millis(millis);
            state.heard_end(Lsn::new(end), now);
        };
        state.begins();
        // it was there before: how old it is, is not known
        hear(&mut state, 600, 0);
        assert_eq!(lag_ms(&state, 500), Some(900_500));
        hear(&mut state, 700, 1000);
        hear(&mut state, 750, 1099);
        hear(&mut state, 800, 1100);
        assert_eq!(lag_ms(&state, 1100), Some(901_100));
        state.stored_to(Lsn::new(600));
        assert_eq!(lag_ms(&state, 1200), Some(200));
        state.stored_to(Lsn::new(749));
        assert_eq!(lag_ms(&state, 1200), Some(200));
        state.stored_to(Lsn::new(750));
        assert_eq!(lag_ms(&state, 1200), Some(100));
        state.stored_to(Lsn::new(800));
        assert_eq!(lag_ms(&state, 1200), Some(0));
        // the server repeats itself
        hear(&mut state, 800, 5000);
        hear(&mut state, 801, 5500);
        assert_eq!(lag_ms(&state, 6000), Some(500));
        // nothing was there before this connection that is not stored
        state.stored_to(Lsn::new(801));
        state.begins();
        hear(&mut state, 801, 7000);
        hear(&mut state, 802, 8000);
        assert_eq!(lag_ms(&state, 8500), Some(500));
    }

    #[test]
    fn a_store_that_is_away_for_hours_takes_no_more_memory() {
        let mut unstored = Unstored::default();
        for second in 0..10_000_u32 {
            unstored.heard(Lsn::new(u64::from(second) + 1), at(second.into()));
        }
        assert_eq!(unstored.ends.len(), Unstored::ENDS_MAX);
        unstored.stored(Lsn::new(9_999));
        // older than it is, and never younger
        assert_eq!(unstored.since(), Some(at(599)));
        unstored.stored(Lsn::new(10_000));
        assert_eq!(unstored.since(), None);
    }

    #[test]
    fn a_server_that_is_not_heard_may_have_written_more() {
        // "no lag" for as long as the network is down
        for connection in [Connection::Connecting, Connection::Waiting] {
            let state = StreamState {
                connection,
                ..state(500, 500)
            };
            assert_eq!(state.lag(at(130)), Some(SignedDuration::from_secs(30)));
        }
    }

    #[test]
    fn what_is_not_known_is_not_shown_as_nothing() {
        let nothing = StreamState::default();
        assert_eq!((nothing.lag_bytes(), nothing.lag(at(1))), (None, None));
        // stored by another connection, and the server says less
        assert_eq!(state(700, 500).lag_bytes(), Some(0));
    }

    #[tokio::test]
    async fn a_nudge_waits_for_a_loop_that_is_busy() {
        let gauges = StreamGauges::default();
        gauges.nudge();
        gauges.nudged().await;
        gauges.clone().beat();
        assert_eq!(gauges.beats(), 1);
    }
}
