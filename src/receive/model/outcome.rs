//! What steps lead to in the world: objects, removals, connections; and what must hold of them.

use wal::{Lsn, TimelineId, WalRange};

use super::content::Content;
use super::server::Server;
use super::shell::{Beginning, Kind, Shell, Wants, options};
use super::store::stretches;
use super::tally::Seen;
use super::world::{Removal, SEGMENT, World};
use crate::receive::pieces::Superseded;
use crate::receive::resume::{ResumeAt, floor, last_before, resume_at, skip_to_earliest};
use crate::receive::session::{Before, Event};

impl World {
    pub(super) fn put(&mut self, timeline: TimelineId, content: Content) {
        let put = self.store.put(timeline, content);
        assert_eq!(put, Ok(()), "two histories are stored");
    }

    pub(super) fn acknowledge(&mut self, shell: &mut Shell, at: usize) {
        let content = shell.jobs[at].content.clone();
        self.put(shell.timeline, content);
        let (job, superseded) = shell.job_done(at, false, self.now, &mut self.tally);
        let merged = job.kind == Kind::Merge;
        self.stored(shell, job.content.range(), merged, superseded);
    }

    /// One object goes on from the spool to the repository.
    pub(super) fn drain_one(&mut self, shell: Option<&mut Shell>) {
        let Some((timeline, content)) = self.spool.take_first() else {
            return;
        };
        self.tally.count(Seen::Drained);
        let range = content.range();
        self.put(timeline, content);
        if let Some(shell) = shell.filter(|shell| shell.timeline == timeline) {
            let merged = shell.session.is_merge(range);
            let superseded = shell.tell_stored(Event::Stored(range), self.now);
            self.stored(shell, range, merged, superseded);
        }
    }

    fn stored(&mut self, shell: &Shell, range: WalRange, merged: bool, gone: Vec<Superseded>) {
        let timeline = shell.timeline;
        for Superseded { piece, by } in gone {
            assert_ne!(piece, by, "a piece supersedes itself");
            self.removals.push(Removal {
                timeline,
                piece,
                by,
            });
        }
        let start = self.size.start_of(range.start);
        let is_segment = range == self.size.range_of(start);
        if is_segment || (merged && range.start == start) {
            for piece in self.store.pieces(timeline, start) {
                let known = self.removals.iter().any(|removal| removal.piece == piece);
                if !known && piece != range && range.covers(piece) {
                    self.tally.count(Seen::OthersGone);
                    self.removals.push(Removal {
                        timeline,
                        piece,
                        by: range,
                    });
                }
            }
        }
    }

    /// Invariant 5: what covers a piece is there before it goes.
    pub(super) fn remove(&mut self, at: usize) {
        let Removal {
            timeline,
            piece,
            by,
        } = self.removals.swap_remove(at);
        let Some(content) = self.store.remove(timeline, piece) else {
            return;
        };
        // what covered it may have given way to something larger meanwhile
        let covered = self
            .store
            .of(timeline)
            .any(|cover| cover.range().covers(piece) && cover.agrees_with(&content));
        assert!(
            covered && by.covers(piece),
            "{piece} went, and nothing covers it, not {by}"
        );
        self.tally.count(Seen::PieceGone);
        self.check_owed();
    }

    pub(super) fn write_tip(&mut self, shell: &Shell) {
        let stored = shell.session.progress().stored();
        self.tips.insert(shell.timeline, stored);
    }

    pub(super) fn killed(&mut self, shell: &Shell, lands: bool) {
        self.tally.count(Seen::Killed);
        if lands {
            let jobs = shell.jobs.iter();
            let late = jobs.map(|job| (shell.timeline, job.content.clone()));
            self.late.extend(late);
        }
        self.removals.clear();
        self.refused = None;
        self.waited = false;
        self.check_owed();
    }

    pub(super) fn two_histories(&mut self, shell: &Shell, at: Lsn) {
        let is_copy = self.servers[shell.server].is_copy;
        assert!(is_copy, "our own server was refused at {at}");
        self.tally.count(Seen::TwoHistories);
        self.current = self.newest;
        self.refused = None;
        self.removals.clear();
        self.waited = false;
    }

    /// The conversation is over.
    pub(super) fn ends(&mut self, shell: &Shell) {
        self.refused = None;
        self.servers[shell.server].shutdown = false;
        self.waited = false;
        self.check_owed();
    }

    pub(super) fn wants(&mut self, shell: &mut Shell, want: Wants) {
        match want {
            Wants::Leave => self.tally.count(Seen::Disconnected),
            Wants::Tell(flush) if shell.connected => self.tell(shell, flush),
            Wants::Tell(_) => {}
        }
    }

    /// Invariant 3: what a server is told, it may remove, and release commits for.
    fn tell(&mut self, shell: &mut Shell, flush: Lsn) {
        if shell.received() < shell.before.known {
            assert_eq!(flush, Lsn::ZERO, "reported before it was sent again");
            self.tally.count(Seen::ToldNothing);
        }
        self.servers[shell.server].told(flush);
        if flush <= shell.told {
            assert!(flush == shell.told, "taken back: {flush}");
            return;
        }
        assert!(flush <= shell.sent, "reported what was not sent: {flush}");
        assert!(!shell.held, "reported while a repository lacks some of it");
        shell.told = flush;
        self.tally.count(Seen::ToldMore);
        let server = &self.servers[shell.server];
        let counts = self.spool_counts && !self.waited;
        let spool = counts.then_some(&self.spool);
        let wanted = server.content(WalRange::new(shell.before.start, flush));
        let lacking = self.store.lacks(None, shell.timeline, &wanted);
        if let Some(at) = lacking {
            let spooled = self.store.lacks(spool, shell.timeline, &wanted).is_none();
            assert!(
                counts && spooled,
                "reported {flush}, and {at} is not stored"
            );
            self.tally.count(Seen::SpoolTold);
        }
        self.check_branch(server, flush);
        let (timeline, start) = (shell.timeline, shell.before.start);
        let same =
            |owed: &(TimelineId, Content)| owed.0 == timeline && owed.1.range().start == start;
        self.owed
            .retain(|owed| !same(owed) || owed.1.range().end > flush);
        self.owed.push((timeline, wanted));
    }

    /// From where the first stream began everything on the branch is stored, or a known hole.
    fn check_branch(&self, server: &Server, until: Lsn) {
        let Some(first) = self.first else { return };
        for (timeline, range) in stretches(&server.branch, first, until) {
            let holes = self.holes.iter().filter(|(of, _)| *of == timeline);
            let mut holes: Vec<WalRange> = holes.map(|(_, hole)| *hole).collect();
            holes.sort_unstable();
            let mut from = range.start;
            if holes.is_empty() && range.start > first {
                // recovery asks for the child's copy of the segment that the parent began
                from = self.size.start_of(range.start).max(first);
            }
            let end = WalRange::new(range.end, range.end);
            for hole in holes.into_iter().chain([end]) {
                let wanted = WalRange::new(from, hole.start.min(range.end));
                if !wanted.is_empty() {
                    let wanted = server.content(wanted);
                    let lacks = self.store.lacks(Some(&self.spool), timeline, &wanted);
                    assert_eq!(
                        lacks, None,
                        "not stored on {timeline}, told {until}: {wanted:?}"
                    );
                }
                from = from.max(hole.end);
            }
        }
    }

    /// What any server was told can be read back.
    pub(super) fn check_owed(&self) {
        for (timeline, wanted) in &self.owed {
            let lacks = self.store.lacks(Some(&self.spool), *timeline, wanted);
            assert_eq!(
                lacks, None,
                "told, and not stored: timeline {timeline}, {wanted:?}"
            );
        }
    }

    fn resumes_at(&mut self) -> Option<(ResumeAt, usize)> {
        let catalog = self.store.catalog(&self.tips);
        let server = &self.servers[self.current];
        let branch = &server.branch;
        let floor = floor(branch, &catalog, server.slot, self.size).unwrap_or(server.end);
        let needed = match resume_at(branch, &catalog, floor, self.size) {
            Ok(needed) => needed,
            Err(error) => {
                assert_ne!(self.current, self.newest, "{error}");
                self.tally.count(Seen::Older);
                self.current = self.newest;
                self.refused = None;
                return None;
            }
        };
        let pieces = self.store.pieces(needed.timeline, needed.start).len();
        if needed.known >= self.size.end_of(needed.start) {
            self.tally.count(Seen::Compared);
        }
        Some((needed, pieces))
    }

    pub(super) fn connect(&mut self) {
        while !self.spool.is_empty() {
            self.drain_one(None);
        }
        let size = self.size;
        let server = &mut self.servers[self.current];
        server.shutdown = false;
        let redo = server.oldest.max(server.end.saturating_sub(SEGMENT / 2));
        server.slot.get_or_insert(redo);
        let Some((mut at, pieces)) = self.resumes_at() else {
            return;
        };
        // another server may still have it, and meanwhile it may have been stored
        let resumed = at;
        let refused = self
            .refused
            .take()
            .filter(|(server, was, _)| (*server, *was) == (self.current, at));
        if let Some((_, _, start)) = refused {
            at = self.skips(at, start);
        }
        let server = &self.servers[self.current];
        let (until, over) = server.sends_until(at.timeline);
        if at.start < server.oldest {
            self.tally.count(Seen::Removed);
            if server.is_copy {
                self.current = self.newest;
            } else {
                self.refused = Some((self.current, resumed, at.start));
            }
            return;
        }
        assert!(at.start <= until, "{at:?} lies behind {until}");
        assert!(!over || at.start < until, "{at:?} was over at {until}");
        let catalog = self.store.catalog(&self.tips);
        if last_before(&server.branch, &catalog, server.end, size).is_none() {
            // what was stored before lies on branches that this one is none of
            self.first = Some(at.start);
        }
        self.first.get_or_insert(at.start);
        self.refused = None;
        let stored = self.store.assembled(at.timeline, at.start);
        let before = Before {
            start: at.start,
            known: stored.range().end.min(at.known),
            pieces,
        };
        let known = if before.known > before.start {
            Some(stored)
        } else {
            self.known_of_parent(server, at)
        };
        let beginning = Beginning {
            server: self.current,
            timeline: at.timeline,
            before,
            known,
            options: options(size, false, self.spool_counts),
        };
        self.shell = Some(Shell::new(beginning, self.now));
        self.tally.count(Seen::Connected);
    }

    /// Notes holes, and goes on behind them.
    fn skips(&mut self, at: ResumeAt, refused: Lsn) -> ResumeAt {
        let server = &self.servers[self.current];
        let mut places = vec![server.oldest, server.end];
        places.extend(server.slot);
        let catalog = self.store.catalog(&self.tips);
        let (branch, size) = (&server.branch, self.size);
        let skipped = skip_to_earliest(at, branch, &catalog, &places, refused, size);
        let (holes, next) = skipped.expect("what was removed lies before what the server has");
        for hole in holes {
            self.tally.count(Seen::Hole);
            self.holes.push(hole);
        }
        next
    }

    fn known_of_parent(&self, server: &Server, at: ResumeAt) -> Option<Content> {
        let parts = server.branch.parts();
        let own = parts.iter().position(|part| part.timeline == at.timeline)?;
        let parent = parts.get(own.checked_sub(1)?)?;
        let fork = parent
            .end
            .filter(|fork| self.size.start_of(*fork) == at.start)?;
        Some(self.store.assembled(parent.timeline, at.start).until(fork))
    }

    /// The next connection goes to a copy that wrote other WAL from shortly before what is stored
    /// ends: all of that is compared.
    pub(super) fn go_astray(&mut self, less: u64) {
        self.refused = None;
        if self.servers[self.current].slot.is_none() {
            return;
        }
        let Some((at, _)) = self.resumes_at() else {
            return;
        };
        let is_own = at.timeline == self.server().branch.timeline();
        if at.known == at.start || !is_own {
            return;
        }
        let split = at.known.saturating_sub(1 + less).max(at.start);
        let number = 1000 + u32::try_from(self.servers.len()).unwrap();
        let copy = self.server().copied(split, number);
        self.servers.push(copy);
        self.current = self.servers.len() - 1;
    }
}
