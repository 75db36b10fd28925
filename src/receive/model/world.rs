//! Servers, a store, a spool and one shell, and every step that any of them can take.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use wal::{Lsn, SegmentSize, TimelineId, WalRange};

use super::content::Content;
use super::server::Server;
use super::shell::{End, Shell};
use super::store::Objects;
use super::tally::{Seen, Tally};
use crate::receive::resume::ResumeAt;
use crate::receive::session::Event;

/// Segments are as small as a server's can be.
pub(super) const SEGMENT: u64 = 1 << 20;

/// What can happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// The server writes so much.
    Write(u64),
    /// The server sends so much at most.
    Send(u64),
    Keepalive(bool),
    /// The server's last record is a shutdown checkpoint.
    ShutDown,
    Cut,
    /// The timeline goes over into another one, on the same server.
    Promote,
    /// A standby is promoted that has this much less.
    FailOver(u64),
    /// The next connection goes to the server that was left behind.
    GoBack,
    /// The next connection goes to a copy that went its own way so far before its end.
    GoAstray(u64),
    Recycle,
    LoseSlot,
    Verified,
    /// Whether what comes is verified elsewhere.
    Lend(bool),
    /// The store does it and says nothing.
    Land(usize),
    Acknowledge(usize),
    /// The spool takes it.
    Spool(usize),
    Drain,
    Outage(bool),
    Hold(bool),
    Waited(bool),
    /// A removal is carried out.
    Remove(usize),
    /// What a killed process had asked for is done.
    LandLate,
    /// A tip is written.
    Tip,
    Connect,
    Stop,
    /// The process dies; what was under way is done all the same, later, or not.
    Kill(bool),
    /// So much time passes, or what is left until the next deadline.
    Pass(Duration),
    Deadline,
}

/// A piece that is to go.
#[derive(Debug, Clone)]
pub(super) struct Removal {
    pub(super) timeline: TimelineId,
    pub(super) piece: WalRange,
    pub(super) by: WalRange,
}

/// Everything there is.
#[derive(Debug, Clone)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a switch of a schedule"
)]
pub(super) struct World {
    pub(super) size: SegmentSize,
    pub(super) now: Instant,
    pub(super) servers: Vec<Server>,
    /// The one that is connected to next.
    pub(super) current: usize,
    /// The one that is the newest.
    pub(super) newest: usize,
    pub(super) timelines: u32,
    pub(super) store: Objects,
    pub(super) spool: Objects,
    pub(super) late: Vec<(TimelineId, Content)>,
    pub(super) removals: Vec<Removal>,
    pub(super) tips: BTreeMap<TimelineId, Lsn>,
    pub(super) holes: Vec<(TimelineId, WalRange)>,
    /// Where the first stream began.
    pub(super) first: Option<Lsn>,
    /// What servers were told: it must be stored for ever.
    pub(super) owed: Vec<(TimelineId, Content)>,
    /// The server that no longer had what it was asked for, where the stream was to go on, and from
    /// where on it asked.
    pub(super) refused: Option<(usize, ResumeAt, Lsn)>,
    pub(super) shell: Option<Shell>,
    pub(super) lends: bool,
    pub(super) outage: bool,
    pub(super) waited: bool,
    pub(super) spool_counts: bool,
    pub(super) tally: Tally,
}

impl World {
    pub(super) fn new(start: Lsn, now: Instant) -> Self {
        let size = SegmentSize::from_bytes(SEGMENT).unwrap();
        Self {
            size,
            now,
            servers: vec![Server::new(start)],
            current: 0,
            newest: 0,
            timelines: 1,
            store: Objects::new(size),
            spool: Objects::new(size),
            late: Vec::new(),
            removals: Vec::new(),
            tips: BTreeMap::new(),
            holes: Vec::new(),
            first: None,
            owed: Vec::new(),
            refused: None,
            shell: None,
            lends: false,
            outage: false,
            waited: false,
            spool_counts: false,
            tally: Tally::new(),
        }
    }

    pub(super) fn server(&self) -> &Server {
        &self.servers[self.current]
    }

    pub(super) fn removal_count(&self) -> usize {
        self.removals.len()
    }

    /// Whether a step can be taken now.
    pub(super) fn can(&self, step: Step) -> bool {
        let shell = self.shell.as_ref();
        let open = shell.filter(|shell| shell.connected && shell.ended.is_none());
        let reads = open.is_some_and(Shell::is_reading);
        let server = self.server();
        match step {
            Step::Write(_) => !server.shutdown,
            Step::Send(_) => reads && open.is_some_and(|open| self.unsent(open) > 0),
            Step::Keepalive(_) => reads,
            Step::ShutDown => reads && !server.shutdown && self.is_on_newest_timeline(),
            Step::Cut => open.is_some(),
            Step::Promote | Step::FailOver(_) | Step::GoAstray(_) => {
                let quiet = self.current == self.newest && !server.shutdown;
                quiet && (step == Step::Promote || self.knows_beginning()) && self.timelines < 9
            }
            Step::GoBack => self.current == self.newest && self.servers.len() > 1,
            Step::LoseSlot => server.slot.is_some() && self.knows_beginning(),
            Step::Verified => shell.is_some_and(|shell| shell.lent),
            Step::Lend(lends) => self.lends != lends,
            Step::Land(at) | Step::Acknowledge(at) => {
                !self.outage && shell.is_some_and(|shell| at < shell.jobs.len())
            }
            Step::Spool(at) => self.outage && shell.is_some_and(|shell| at < shell.jobs.len()),
            Step::Drain => !self.outage && !self.spool.is_empty(),
            Step::Outage(outage) => self.outage != outage,
            Step::Hold(held) => open.is_some_and(|open| open.held != held),
            Step::Waited(waited) => open.is_some() && self.waited != waited,
            Step::Remove(at) => !self.outage && at < self.removals.len(),
            Step::LandLate => !self.outage && !self.late.is_empty(),
            Step::Tip => !self.outage && shell.is_some(),
            Step::Connect => shell.is_none() && !self.outage,
            Step::Stop | Step::Kill(_) => open.is_some() || shell.is_some(),
            Step::Recycle | Step::Pass(_) | Step::Deadline => true,
        }
    }

    /// A slot that is gone takes with it where the first stream began, unless that is stored.
    fn knows_beginning(&self) -> bool {
        let told = |(_, content): &(_, Content)| !content.range().is_empty();
        !self.tips.is_empty() || self.owed.iter().any(told)
    }

    fn is_on_newest_timeline(&self) -> bool {
        let shell = self.shell.as_ref();
        shell.is_some_and(|shell| shell.timeline == self.servers[shell.server].branch.timeline())
    }

    /// What the server could send, in bytes.
    fn unsent(&self, shell: &Shell) -> u64 {
        let (until, _) = self.servers[shell.server].sends_until(shell.timeline);
        until.bytes_since(shell.sent)
    }

    /// Takes a step that can be taken.
    pub(super) fn take(&mut self, step: Step) {
        let Some(mut shell) = self.shell.take() else {
            self.without_shell(step);
            return;
        };
        let ok = self.with_shell(step, &mut shell);
        if ok.is_none() {
            return;
        }
        let server = self.servers[shell.server].clone();
        match shell.turn(&server, self.lends, self.now, &mut self.tally) {
            Ok(wants) => {
                for want in wants {
                    self.wants(&mut shell, want);
                }
            }
            Err(at) => return self.two_histories(&shell, at),
        }
        if matches!(step, Step::Keepalive(true)) {
            assert_eq!(shell.reported_at, self.now, "no answer to a keepalive");
        }
        shell.check(self.now);
        if shell.finished {
            self.ends(&shell);
        } else {
            self.shell = Some(shell);
        }
    }

    fn without_shell(&mut self, step: Step) {
        match step {
            Step::Connect => self.connect(),
            Step::Pass(time) => self.now += time,
            Step::Deadline => self.now += Duration::from_secs(1),
            step => self.aside(step),
        }
    }

    /// `None` where the shell is gone.
    fn with_shell(&mut self, step: Step, shell: &mut Shell) -> Option<()> {
        let now = self.now;
        match step {
            Step::Send(bytes) => {
                let end = shell.sent.saturating_add(bytes.min(self.unsent(shell)));
                self.send(shell, end, false);
            }
            Step::ShutDown => {
                let server = &mut self.servers[shell.server];
                server.end = server.end.saturating_add(100);
                server.shutdown = true;
                let end = server.end;
                shell.hears_wal(end, true);
                self.tally.count(Seen::ShutDown);
            }
            Step::Keepalive(reply) => {
                shell.hears_keepalive(reply, now, &mut self.tally);
                if reply {
                    self.tally.count(Seen::KeepaliveReply);
                }
            }
            Step::Cut => {
                shell.ended = Some(End::Lost);
                self.tally.count(Seen::Cut);
            }
            Step::Stop => {
                shell.ended.get_or_insert(End::Stopped);
                self.tally.count(Seen::Stopped);
            }
            Step::Verified => {
                let server = self.servers[shell.server].clone();
                if let Err(at) = shell.verified(&server, now, &mut self.tally) {
                    self.two_histories(shell, at);
                    return None;
                }
            }
            Step::Land(at) => {
                let content = shell.jobs[at].content.clone();
                self.put(shell.timeline, content);
                self.tally.count(Seen::FailedAfter);
            }
            Step::Acknowledge(at) => self.acknowledge(shell, at),
            Step::Spool(at) => {
                let (job, superseded) = shell.job_done(at, true, now, &mut self.tally);
                assert!(superseded.is_empty(), "the spool supersedes nothing");
                self.spool.put(shell.timeline, job.content).unwrap();
                self.tally.count(Seen::Spooled);
            }
            Step::Drain => self.drain_one(Some(shell)),
            Step::Hold(held) => {
                shell.held = held;
                shell.session.hold(held, now);
                self.tally.count(Seen::Held);
            }
            Step::Waited(waited) => {
                self.waited = waited;
                shell.session.handle(Event::Waited(waited), now);
                self.tally.count(Seen::WaitedFor);
            }
            Step::Tip => self.write_tip(shell),
            Step::Kill(lands) => {
                self.killed(shell, lands);
                return None;
            }
            Step::Deadline => {
                self.now = self.now.max(shell.deadline());
                shell.session.handle(Event::Deadline, self.now);
            }
            Step::Pass(time) => self.pass(shell, time),
            step => self.aside(step),
        }
        self.notice(shell);
        Some(())
    }

    /// Time passes up to the next deadline at most, which is kept.
    fn pass(&mut self, shell: &mut Shell, time: Duration) {
        self.now = (self.now + time).min(shell.deadline());
        if self.now == shell.deadline() {
            shell.session.handle(Event::Deadline, self.now);
        }
    }

    fn send(&mut self, shell: &mut Shell, end: Lsn, shutdown: bool) {
        shell.hears_wal(end, shutdown);
        if !shell.is_reading() {
            self.tally.count(Seen::BackPressure);
        }
    }

    /// What the shell is told by the connection without anybody's doing.
    fn notice(&mut self, shell: &mut Shell) {
        if !shell.connected || shell.ended.is_some() {
            return;
        }
        if shell.server != self.current || self.server().slot.is_none() {
            // it went away, and another one takes its place; or it gave up the slot
            shell.ended = Some(End::Lost);
            return;
        }
        let server = &self.servers[shell.server];
        let (until, over) = server.sends_until(shell.timeline);
        if over && shell.sent == until {
            shell.ended = Some(End::NextTimeline);
            self.tally.count(Seen::TimelineEnd);
        } else if server.shutdown && shell.session.progress().reported() == server.end {
            shell.ended = Some(End::Lost);
            self.tally.count(Seen::ShutDownTold);
        }
    }

    /// What has nothing to do with a shell.
    fn aside(&mut self, step: Step) {
        let size = self.size;
        let end = self.server().end;
        match step {
            Step::Write(bytes) => {
                let server = &mut self.servers[self.current];
                server.end = server.end.saturating_add(bytes);
            }
            Step::Recycle => {
                self.servers[self.current].recycle(size);
                self.tally.count(Seen::Recycled);
            }
            Step::LoseSlot => {
                self.servers[self.current].loses_slot(size);
                self.tally.count(Seen::SlotLost);
            }
            Step::Promote => {
                self.timelines += 1;
                let next = self.server().promoted(end, self.timelines);
                self.servers[self.current] = next;
                self.tally.count(Seen::Promoted);
            }
            Step::FailOver(less) => {
                let fork = end.saturating_sub(less).max(self.server().oldest);
                let fork = fork.max(self.last_fork());
                self.timelines += 1;
                let mut next = self.server().promoted(fork, self.timelines);
                next.slot = None;
                self.servers.push(next);
                self.current = self.servers.len() - 1;
                self.newest = self.current;
                self.tally.count(Seen::FailedOver);
            }
            Step::GoBack => {
                let old = self.servers.iter().rposition(|server| {
                    !server.is_copy && server.branch.timeline() < self.server().branch.timeline()
                });
                if let Some(old) = old {
                    self.current = old;
                    self.servers[old].shutdown = false;
                }
            }
            Step::GoAstray(less) => self.go_astray(less),
            Step::Lend(lends) => self.lends = lends,
            Step::Outage(outage) => {
                self.outage = outage;
                self.tally.count(Seen::Outage);
            }
            Step::Drain => self.drain_one(None),
            Step::Remove(at) => self.remove(at),
            Step::LandLate => {
                if let Some((timeline, content)) = self.late.pop() {
                    self.put(timeline, content);
                    self.tally.count(Seen::LandedLate);
                }
            }
            step => panic!("{step:?} cannot be taken now"),
        }
    }

    fn last_fork(&self) -> Lsn {
        let entries = self.server().branch.entries();
        entries.last().map_or(Lsn::ZERO, |entry| entry.end)
    }
}
