//! Which record is the last one wanted: decided from records alone. Pure.
//!
//! Recovery is given the start of one record and nothing else, so that every sort of target becomes
//! a record. For times and for excluded transactions that is the last commit (or preparation) that
//! belongs, not the last record before the first commit that does not: DROP DATABASE removes its
//! files by a record that stands before its commit, and replaying that leaves a database without
//! files.

mod alike;
mod passing;

use jiff::Timestamp;
use wal::{Body, Lsn, Parameters};

use crate::repository::walk::Flow;
use crate::repository::windows::timestamp;
pub(super) use alike::Alike;

/// How far behind the point we look for what was left out, in bytes of WAL: inversions of commit
/// times are a matter of moments.
pub(super) const LOOK_AHEAD_BYTES: u64 = 16 << 20;

/// One record, as far as targets care.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Seen {
    pub(super) span: Span,
    /// The transaction in its header; 0 for none.
    pub(super) xid: u32,
    pub(super) what: What,
}

/// Where a record stands: `[start, end)`, where `end` is a multiple of eight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// Its first byte.
    pub start: Lsn,
    /// The byte after its last.
    pub end: Lsn,
}

/// What a record says, as far as targets care.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum What {
    Commit {
        xid: u32,
        time: Timestamp,
        subxacts: Vec<u32>,
    },
    Abort {
        xid: u32,
        /// Of one that had been prepared.
        prepared: bool,
        time: Timestamp,
        subxacts: Vec<u32>,
    },
    Prepare {
        time: Timestamp,
    },
    /// The server was shut down with it.
    Shutdown,
    RestorePoint {
        name: Vec<u8>,
    },
    CreateTablespace {
        oid: u32,
        path: Vec<u8>,
    },
    DropDatabase {
        database: u32,
    },
    Parameters(Parameters),
    Other,
}

impl What {
    pub(super) fn of(body: Body) -> Self {
        match body {
            Body::Commit(end) => Self::Commit {
                xid: end.xid,
                time: timestamp(end.time),
                subxacts: end.subxacts,
            },
            Body::Abort(end) => Self::Abort {
                xid: end.xid,
                prepared: end.prepared,
                time: timestamp(end.time),
                subxacts: end.subxacts,
            },
            Body::Prepare { prepared_at, .. } => Self::Prepare {
                time: timestamp(prepared_at),
            },
            Body::Checkpoint { shutdown: true, .. } => Self::Shutdown,
            Body::RestorePoint { name, .. } => Self::RestorePoint {
                name: name.as_bytes().to_vec(),
            },
            Body::CreateTablespace { oid, path } => Self::CreateTablespace {
                oid,
                path: path.as_bytes().to_vec(),
            },
            Body::DropDatabase { database, .. } => Self::DropDatabase { database },
            Body::ParameterChange {
                max_connections,
                max_worker_processes,
                max_wal_senders,
                max_prepared_transactions,
                max_locks_per_transaction,
                wal_level: _,
            } => Self::Parameters(Parameters {
                max_connections,
                max_worker_processes,
                max_wal_senders,
                max_prepared_transactions,
                max_locks_per_transaction,
            }),
            _ => Self::Other,
        }
    }
}

/// What is looked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Wanted {
    /// Commits up to the first one stamped after this; with `exclusive`, at or after.
    Time { at: Timestamp, exclusive: bool },
    /// Up to the first record that starts here or later, with it unless `exclusive`.
    Lsn { at: Lsn, exclusive: bool },
    /// Up to this transaction's commit.
    Xid { xid: u32, exclusive: bool },
    /// Up to the point of this name.
    Name { name: String, exclusive: bool },
    /// Everything.
    Last,
}

/// A commit, for people.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CommitSeen {
    /// Where its record starts.
    pub lsn: Lsn,
    /// The transaction.
    pub xid: u32,
    /// Its stamp.
    pub time: Timestamp,
}

/// Where a target lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Point {
    /// The last record wanted; `None` where none since the walk began is.
    pub(super) last: Option<Span>,
    /// Nothing at or behind this position may be replayed: a backup must have ended by here.
    pub(super) boundary: Lsn,
    pub(super) last_in: Option<CommitSeen>,
    pub(super) first_out: Option<CommitSeen>,
}

/// Commits that stand behind the point though they are stamped before the target.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Behind {
    /// How many.
    pub count: u64,
    /// The LSN that would include all of them.
    pub through: Option<Lsn>,
}

/// What was learnt on the way.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Findings {
    /// Tablespaces that replay makes, with the place of the record.
    pub(super) tablespaces: Vec<(Lsn, u32, Vec<u8>)>,
    /// Databases whose files replay removes, with the place of the record and the transaction,
    /// which has not committed.
    pub(super) dropping: Vec<(Lsn, u32, u32)>,
    pub(super) parameters: Parameters,
}

impl Findings {
    /// Without what stands behind `end`, where replay ends.
    pub(super) fn up_to(mut self, end: Lsn) -> Self {
        self.tablespaces.retain(|(lsn, ..)| *lsn < end);
        self.dropping.retain(|(lsn, ..)| *lsn < end);
        self
    }
}

/// Takes records in order, and finds the last one wanted.
#[derive(Debug, Clone)]
pub(super) struct Resolver {
    wanted: Wanted,
    point: Option<Point>,
    at_point: Findings,
    findings: Findings,
    behind: Behind,
    last: Option<Span>,
    /// Where the backup ended.
    consistent_at: Lsn,
    /// The last record that ends there or before.
    last_of_backup: Option<Span>,
    /// The last record that is no shutdown's.
    last_but_shutdown: Option<Span>,
    /// Whether the last record wanted is a shutdown's, and the last before it that is none.
    point_is_shutdown: bool,
    before_point: Option<Span>,
    /// The last that decides on a transaction: a commit, a preparation or the end of one.
    last_kept: Option<Span>,
    last_commit: Option<CommitSeen>,
    newest_stamp: Option<Timestamp>,
    aborted_at: Option<Lsn>,
    subxact_of: Option<u32>,
    named_at: Option<Lsn>,
    again_at: Option<Lsn>,
    alike: Option<Alike>,
}

/// What a [`Resolver`] came to.
#[derive(Debug, Clone)]
pub(super) struct Resolved {
    /// Where the target lies; `None` if it is not among these records.
    pub(super) point: Option<Point>,
    /// What stands before the point, or in all.
    pub(super) findings: Findings,
    pub(super) behind: Behind,
    /// The last record of all.
    pub(super) last: Option<Span>,
    /// The last record that ends at or before the backup's end.
    pub(super) last_of_backup: Option<Span>,
    /// The last record that is no shutdown's.
    pub(super) last_but_shutdown: Option<Span>,
    /// Whether the last record wanted is a shutdown's, and the last before it that is none.
    pub(super) point_is_shutdown: bool,
    pub(super) before_point: Option<Span>,
    pub(super) last_kept: Option<Span>,
    pub(super) last_commit: Option<CommitSeen>,
    /// The latest stamp of any commit.
    pub(super) newest_stamp: Option<Timestamp>,
    /// Where the transaction was rolled back.
    pub(super) aborted_at: Option<Lsn>,
    /// The transaction of which the one that is looked for was a part.
    pub(super) subxact_of: Option<u32>,
    /// Where the named point stands.
    pub(super) named_at: Option<Lsn>,
    /// Where the named point stands a second time.
    pub(super) again_at: Option<Lsn>,
    /// The point behind the backup's end whose name is most like the one that is looked for.
    pub(super) alike: Option<Alike>,
}

impl Resolver {
    /// Looks for `wanted` from a backup that ended at `consistent_at`.
    pub(super) fn new(wanted: Wanted, consistent_at: Lsn) -> Self {
        Self {
            wanted,
            consistent_at,
            last_of_backup: None,
            point: None,
            at_point: Findings::default(),
            findings: Findings::default(),
            behind: Behind::default(),
            last: None,
            last_but_shutdown: None,
            point_is_shutdown: false,
            before_point: None,
            last_kept: None,
            last_commit: None,
            newest_stamp: None,
            aborted_at: None,
            subxact_of: None,
            named_at: None,
            again_at: None,
            alike: None,
        }
    }

    /// Takes the next record.
    pub(super) fn see(&mut self, record: &Seen) -> Flow {
        let flow = match &self.point {
            None => {
                if let Some(point) = self.decide(record) {
                    self.point_is_shutdown =
                        record.what == What::Shutdown && point.last == Some(record.span);
                    self.before_point = self.last_but_shutdown;
                    self.at_point = self.findings.clone();
                    if point.last == Some(record.span) {
                        self.at_point.note(record);
                    }
                    self.point = Some(point);
                }
                Flow::Continue
            }
            Some(point) => self.look_back(record, point.boundary),
        };
        self.note(record);
        flow
    }

    /// What was found, once no more records come.
    pub(super) fn finish(self) -> Resolved {
        let findings = if self.point.is_some() {
            self.at_point
        } else {
            self.findings
        };
        Resolved {
            point: self.point,
            findings,
            behind: self.behind,
            last: self.last,
            last_of_backup: self.last_of_backup,
            last_but_shutdown: self.last_but_shutdown,
            point_is_shutdown: self.point_is_shutdown,
            before_point: self.before_point,
            last_kept: self.last_kept,
            last_commit: self.last_commit,
            newest_stamp: self.newest_stamp,
            aborted_at: self.aborted_at,
            subxact_of: self.subxact_of,
            named_at: self.named_at,
            again_at: self.again_at,
            alike: self.alike,
        }
    }

    /// Whether the point is decided by this record.
    fn decide(&mut self, record: &Seen) -> Option<Point> {
        let at_record = |last_in| Point {
            last: Some(record.span),
            boundary: record.span.end,
            last_in,
            first_out: None,
        };
        let before_record = |last, last_in| Point {
            last,
            boundary: record.span.start,
            last_in,
            first_out: commit_of(record),
        };
        match (&self.wanted, &record.what) {
            (Wanted::Time { .. }, What::Commit { time, .. }) => self
                .is_out(*time)
                .then(|| before_record(self.last_kept, self.last_commit)),
            (Wanted::Lsn { at, exclusive }, _) if record.span.start >= *at => Some(if *exclusive {
                before_record(self.last, self.last_commit)
            } else {
                at_record(commit_of(record).or(self.last_commit))
            }),
            (
                Wanted::Xid { xid, exclusive },
                What::Commit {
                    xid: found,
                    subxacts,
                    ..
                },
            ) => {
                if subxacts.contains(xid) {
                    self.subxact_of = Some(*found);
                }
                (found == xid).then(|| {
                    if *exclusive {
                        before_record(self.last_kept, self.last_commit)
                    } else {
                        at_record(commit_of(record))
                    }
                })
            }
            (
                Wanted::Xid { xid, .. },
                What::Abort {
                    xid: found,
                    subxacts,
                    ..
                },
            ) if found == xid || subxacts.contains(xid) => {
                self.aborted_at = Some(record.span.start);
                None
            }
            (Wanted::Name { name, exclusive }, What::RestorePoint { name: found })
                if found == name.as_bytes() =>
            {
                self.named_at = Some(record.span.start);
                Some(if *exclusive {
                    before_record(self.last, self.last_commit)
                } else {
                    at_record(self.last_commit)
                })
            }
            (Wanted::Name { name, .. }, What::RestorePoint { name: found })
                if record.span.start >= self.consistent_at =>
            {
                let known = self.alike.take();
                self.alike = match Alike::new(found, record.span.start, name) {
                    Some(alike) => Some(alike.or(known)),
                    None => known,
                };
                None
            }
            _ => None,
        }
    }

    /// Behind the point: what was left out, and whether the name comes again.
    fn look_back(&mut self, record: &Seen, boundary: Lsn) -> Flow {
        let within = record.span.start.bytes_since(boundary) <= LOOK_AHEAD_BYTES;
        if let Some(commit) = commit_of(record).filter(|_| within) {
            if let Some(point) = &mut self.point {
                point.first_out.get_or_insert(commit);
            }
            if let Wanted::Time { at, exclusive } = self.wanted {
                let belongs = if exclusive {
                    commit.time < at
                } else {
                    commit.time <= at
                };
                if belongs {
                    self.behind.count = self.behind.count.saturating_add(1);
                    self.behind.through = Some(commit.lsn);
                }
            }
        }
        let has_out = self
            .point
            .as_ref()
            .is_some_and(|point| point.first_out.is_some());
        match (&self.wanted, &record.what) {
            (Wanted::Name { name, .. }, What::RestorePoint { name: found }) => {
                if found == name.as_bytes() {
                    self.again_at.get_or_insert(record.span.start);
                }
                Flow::Continue
            }
            (Wanted::Name { .. }, _) => Flow::Continue,
            (Wanted::Time { .. }, _) if within => Flow::Continue,
            _ if within && !has_out => Flow::Continue,
            _ => Flow::Stop,
        }
    }

    fn note(&mut self, record: &Seen) {
        self.last = Some(record.span);
        if record.span.end <= self.consistent_at {
            self.last_of_backup = self.last;
        }
        match &record.what {
            What::Commit { time, .. } => {
                self.last_kept = Some(record.span);
                self.last_commit = commit_of(record);
                self.newest_stamp = self.newest_stamp.max(Some(*time));
            }
            // a prepared transaction stands, or falls, by the time that it was
            What::Prepare { time } if !self.is_out(*time) => self.last_kept = Some(record.span),
            What::Abort {
                prepared: true,
                time,
                ..
            } if !self.is_out(*time) => {
                self.last_kept = Some(record.span);
            }
            _ => {}
        }
        if record.what != What::Shutdown {
            self.last_but_shutdown = self.last;
        }
        self.findings.note(record);
    }

    /// Whether something of this time lies behind a target that is a time.
    fn is_out(&self, time: Timestamp) -> bool {
        match self.wanted {
            Wanted::Time { at, exclusive } => {
                if exclusive {
                    time >= at
                } else {
                    time > at
                }
            }
            _ => false,
        }
    }
}

impl Findings {
    fn note(&mut self, record: &Seen) {
        match &record.what {
            What::Commit { xid, .. } => self.dropping.retain(|(_, by, _)| by != xid),
            What::CreateTablespace { oid, path } => {
                self.tablespaces
                    .push((record.span.start, *oid, path.clone()));
            }
            What::DropDatabase { database } => {
                self.dropping
                    .push((record.span.start, record.xid, *database));
            }
            What::Parameters(parameters) => self.parameters = self.parameters.max(*parameters),
            _ => {}
        }
    }
}

fn commit_of(record: &Seen) -> Option<CommitSeen> {
    match &record.what {
        What::Commit { xid, time, .. } => Some(CommitSeen {
            lsn: record.span.start,
            xid: *xid,
            time: *time,
        }),
        _ => None,
    }
}

#[cfg(test)]
mod passing_tests;

#[cfg(test)]
mod tests {
    use super::*;

    /// Records of 0x10 bytes each, one behind the other, from 0x100 on.
    fn records(whats: Vec<What>) -> Vec<Seen> {
        let spans = (0x100..).step_by(0x10).map(|at| Span {
            start: Lsn::new(at),
            end: Lsn::new(at + 0x10),
        });
        spans
            .zip(whats)
            .map(|(span, what)| Seen { span, xid: 5, what })
            .collect()
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn commit(xid: u32, second: i64) -> What {
        What::Commit {
            xid,
            time: at(second),
            subxacts: vec![xid + 1000],
        }
    }

    fn resolve(wanted: Wanted, records: &[Seen]) -> Resolved {
        let mut resolver = Resolver::new(wanted, Lsn::ZERO);
        for record in records {
            if resolver.see(record) == Flow::Stop {
                break;
            }
        }
        resolver.finish()
    }

    fn last(resolved: &Resolved) -> Option<u64> {
        resolved
            .point
            .as_ref()
            .unwrap()
            .last
            .map(|span| span.start.as_u64())
    }

    fn time(second: i64, exclusive: bool) -> Wanted {
        Wanted::Time {
            at: at(second),
            exclusive,
        }
    }

    #[test]
    fn a_commit_at_the_target_time_is_in_unless_excluded() {
        let records = records(vec![
            commit(1, 10),
            What::Other,
            commit(2, 20),
            commit(3, 30),
        ]);
        assert_eq!(last(&resolve(time(20, false), &records)), Some(0x120));
        assert_eq!(last(&resolve(time(20, true), &records)), Some(0x100));
        let between = resolve(time(25, false), &records).point.unwrap();
        assert_eq!(between.last_in.unwrap().xid, 2);
        assert_eq!(between.first_out.unwrap().xid, 3);
        assert_eq!(between.boundary, Lsn::new(0x130));
    }

    /// The removal of a database's files stands before the commit of DROP DATABASE.
    #[test]
    fn nothing_between_the_last_commit_in_and_the_first_out_is_replayed() {
        let drop = What::DropDatabase { database: 9 };
        let records = records(vec![
            commit(1, 10),
            What::Other,
            drop,
            What::Other,
            commit(5, 20),
        ]);
        for wanted in [
            time(15, false),
            Wanted::Xid {
                xid: 5,
                exclusive: true,
            },
        ] {
            let resolved = resolve(wanted, &records);
            let last = resolved.point.unwrap().last.unwrap();
            assert_eq!(last.start, Lsn::new(0x100));
            assert!(resolved.findings.up_to(last.end).dropping.is_empty());
        }
    }

    #[test]
    fn a_database_that_is_half_dropped_at_the_point_is_found() {
        let drop = What::DropDatabase { database: 9 };
        let records = records(vec![commit(1, 10), drop, commit(2, 12), commit(5, 20)]);
        let resolved = resolve(time(15, false), &records);
        assert_eq!(resolved.findings.dropping, [(Lsn::new(0x110), 5, 9)]);
    }

    /// A server that is stopped at a shutdown's checkpoint starts behind it the next time.
    #[test]
    fn the_record_before_a_shutdown_is_known() {
        let records = records(vec![
            commit(1, 10),
            What::Shutdown,
            What::Shutdown,
            commit(2, 20),
        ]);
        let wanted = Wanted::Lsn {
            at: Lsn::new(0x120),
            exclusive: false,
        };
        let resolved = resolve(wanted, &records);
        assert!(resolved.point_is_shutdown);
        assert_eq!(resolved.before_point.unwrap().start, Lsn::new(0x100));
        assert_eq!(
            resolve(Wanted::Last, &records[..3]).last_but_shutdown,
            resolved.before_point
        );
    }

    /// A prepared transaction outlives the server: it belongs to the state at that moment.
    #[test]
    fn a_preparation_before_the_target_is_kept() {
        let records = records(vec![
            commit(1, 10),
            What::Prepare { time: at(0) },
            What::Other,
            commit(2, 20),
        ]);
        assert_eq!(last(&resolve(time(15, false), &records)), Some(0x110));
    }

    /// One that was prepared behind the target would come back, and hold its locks; one that was
    /// rolled back before it would come back too.
    #[test]
    fn prepared_transactions_are_as_they_were_at_the_target() {
        let later = records(vec![
            commit(1, 10),
            What::Prepare { time: at(30) },
            commit(2, 40),
        ]);
        assert_eq!(last(&resolve(time(20, false), &later)), Some(0x100));
        let rolled_back = |second| What::Abort {
            xid: 7,
            prepared: true,
            time: at(second),
            subxacts: Vec::new(),
        };
        let ended = records(vec![commit(1, 10), rolled_back(15), commit(2, 40)]);
        assert_eq!(last(&resolve(time(20, false), &ended)), Some(0x110));
        let ends_later = records(vec![commit(1, 10), rolled_back(30), commit(2, 40)]);
        assert_eq!(last(&resolve(time(20, false), &ends_later)), Some(0x100));
    }

    #[test]
    fn commits_stamped_earlier_that_stand_behind_are_counted() {
        let records = records(vec![
            commit(1, 10),
            commit(2, 30),
            commit(3, 20),
            commit(4, 40),
            commit(5, 24),
        ]);
        let resolved = resolve(time(25, false), &records);
        assert_eq!(last(&resolved), Some(0x100));
        assert_eq!(
            resolved.behind,
            Behind {
                count: 2,
                through: Some(Lsn::new(0x140))
            }
        );
    }

    #[test]
    fn a_target_that_does_not_come_is_not_decided() {
        let records = records(vec![commit(1, 10), commit(2, 30), commit(3, 20)]);
        let resolved = resolve(time(30, false), &records);
        assert_eq!(resolved.point, None);
        assert_eq!(resolved.newest_stamp, Some(at(30)));
        assert_eq!(resolved.last_commit.unwrap().xid, 3);
        assert_eq!(
            resolve(Wanted::Last, &records).last.unwrap().start,
            Lsn::new(0x120)
        );
    }

    #[test]
    fn a_position_takes_the_record_that_starts_there_or_the_next_one() {
        let records = records(vec![What::Other, commit(1, 10), What::Other, commit(2, 20)]);
        let lsn = |at: u64, exclusive| Wanted::Lsn {
            at: Lsn::new(at),
            exclusive,
        };
        assert_eq!(last(&resolve(lsn(0x110, false), &records)), Some(0x110));
        assert_eq!(last(&resolve(lsn(0x110, true), &records)), Some(0x100));
        assert_eq!(last(&resolve(lsn(0x111, false), &records)), Some(0x120));
        assert_eq!(last(&resolve(lsn(0x111, true), &records)), Some(0x110));
        let resolved = resolve(lsn(0x110, false), &records).point.unwrap();
        assert_eq!(
            (
                resolved.last_in.unwrap().xid,
                resolved.first_out.unwrap().xid
            ),
            (1, 2)
        );
        assert_eq!(resolve(lsn(0x141, false), &records).point, None);
    }

    #[test]
    fn a_transaction_is_found_by_its_commit_alone() {
        let records = records(vec![
            commit(1, 10),
            What::Abort {
                xid: 2,
                prepared: false,
                time: at(0),
                subxacts: vec![1002],
            },
            commit(3, 30),
            What::Other,
            commit(4, 40),
        ]);
        let xid = |xid, exclusive| Wanted::Xid { xid, exclusive };
        assert_eq!(last(&resolve(xid(3, false), &records)), Some(0x120));
        assert_eq!(last(&resolve(xid(3, true), &records)), Some(0x100));
        let aborted = |number| resolve(xid(number, false), &records).aborted_at;
        assert_eq!(aborted(2), Some(Lsn::new(0x110)));
        assert_eq!(aborted(1002), Some(Lsn::new(0x110)));
        assert_eq!(resolve(xid(1003, false), &records).subxact_of, Some(3));
        assert_eq!(resolve(xid(9, false), &records).point, None);
    }

    #[test]
    fn a_name_that_was_given_twice_is_found_out() {
        for (names, again) in [(["a", "b"], None), (["a", "a"], Some(Lsn::new(0x110)))] {
            let points = names.map(|name| What::RestorePoint { name: name.into() });
            let wanted = Wanted::Name {
                name: "a".to_owned(),
                exclusive: false,
            };
            let resolved = resolve(wanted, &records(points.to_vec()));
            assert_eq!(last(&resolved), Some(0x100));
            assert_eq!(resolved.again_at, again);
        }
    }

    #[test]
    fn tablespaces_made_behind_the_point_do_not_count() {
        let make = |oid| What::CreateTablespace {
            oid,
            path: b"/p".to_vec(),
        };
        let records = records(vec![make(1), commit(1, 10), make(2), commit(2, 20)]);
        let found = |wanted| -> Vec<u32> {
            let resolved = resolve(wanted, &records);
            resolved
                .findings
                .tablespaces
                .iter()
                .map(|(_, oid, _)| *oid)
                .collect()
        };
        assert_eq!(found(time(15, false)), [1, 2]);
        let point = resolve(time(15, false), &records);
        assert_eq!(point.findings.up_to(Lsn::new(0x120)).tablespaces.len(), 1);
        assert_eq!(found(Wanted::Last), [1, 2]);
        assert_eq!(
            found(Wanted::Lsn {
                at: Lsn::new(0x120),
                exclusive: false
            }),
            [1, 2]
        );
    }
}
