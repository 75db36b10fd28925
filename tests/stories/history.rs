//! Targets of every kind, drawn by lot over a history that PostgreSQL's own `pg_waldump` has written down, on
//! two timelines: what is planned and what is restored is what the history says.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};

use jiff::Timestamp;
use serde_json::Value;

use crate::anywhen::{Ended, Stream};
use crate::chance::{Chance, rounds};
use crate::ground::{Programs, command, eventually};
use crate::judge::{End, assert_verified, start_restored};
use crate::record::{Record, now_of};
use crate::server::{Options, Server, Shutdown, execute, value};

const SESSIONS: u64 = 4;
/// So far behind the point a plan looks for what was left out.
const LOOK_AHEAD_BYTES: u64 = 16 << 20;
const QUICK_TIPS: [&str; 4] = ["--flush-interval", "200ms", "--tip-interval", "1s"];
/// A restore point that there is more than once.
const TWICE: &str = "made by all";

/// A commit that stands in WAL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Commit {
    lsn: u64,
    xid: u32,
    /// In microseconds since 1970.
    time: i64,
}

/// What `pg_waldump` says of a timeline and of those before it.
#[derive(Clone, Debug, Default)]
struct History {
    /// Where each record starts.
    records: Vec<u64>,
    commits: Vec<Commit>,
    /// Transactions that came to nothing, and where.
    aborted: BTreeMap<u32, u64>,
    points: Vec<(String, u64)>,
    /// The rows that each transaction made.
    rows: BTreeMap<u32, BTreeSet<u64>>,
    backups: Vec<Backup>,
    timeline: u32,
    /// What `status` calls the latest moment.
    latest: i64,
}

#[derive(Clone, Debug)]
struct Backup {
    id: String,
    start: u64,
    stop: u64,
    finished: i64,
}

/// What is asked for.
#[derive(Clone, Debug)]
enum Target {
    Time { at: i64, exclusive: bool },
    Lsn { at: u64, exclusive: bool },
    Xid { xid: u32, exclusive: bool },
    Name { name: String, exclusive: bool },
    Immediate { backup: String },
    Latest,
}

/// What must come of it.
#[derive(Debug)]
enum Expected {
    Refused,
    /// All commits before this position belong, and none behind it; the backup must have ended there.
    Up {
        to: u64,
    },
}

impl Target {
    fn arguments(&self) -> Vec<String> {
        let (named, exclusive) = match self {
            Self::Time { at, exclusive } => (vec!["--to-time".into(), rfc3339(*at)], *exclusive),
            Self::Lsn { at, exclusive } => (vec!["--to-lsn".into(), shown(*at)], *exclusive),
            Self::Xid { xid, exclusive } => (vec!["--to-xid".into(), xid.to_string()], *exclusive),
            Self::Name { name, exclusive } => (vec!["--to-name".into(), name.clone()], *exclusive),
            Self::Immediate { backup } => {
                let backup = ["--immediate", "--backup", backup];
                (backup.map(String::from).to_vec(), false)
            }
            Self::Latest => (Vec::new(), false),
        };
        let exclusive = exclusive.then(|| "--exclusive".to_owned());
        named.into_iter().chain(exclusive).collect()
    }
}

fn rfc3339(micros: i64) -> String {
    Timestamp::from_microsecond(micros).unwrap().to_string()
}

fn shown(lsn: u64) -> String {
    format!("{:X}/{:X}", lsn >> 32, lsn & 0xFFFF_FFFF)
}

fn lsn(text: &str) -> u64 {
    let (high, low) = text.split_once('/').unwrap();
    let part = |text| u64::from_str_radix(text, 16).unwrap();
    part(high) << 32 | part(low)
}

fn micros(text: &str) -> i64 {
    let time: Timestamp = text.parse().unwrap();
    time.as_microsecond()
}

impl History {
    /// The part of it that a timeline which left it at `fork` has too.
    fn up_to(&self, fork: u64) -> Self {
        let mut parent = self.clone();
        parent.records.retain(|start| *start < fork);
        parent.commits.retain(|commit| commit.lsn < fork);
        parent.points.retain(|(_, lsn)| *lsn < fork);
        parent.aborted.retain(|_, lsn| *lsn < fork);
        parent.backups.retain(|backup| backup.stop <= fork);
        parent
    }

    /// Adds what `pg_waldump` says of a server's own WAL on its timeline, from `start` up to `end`.
    fn add(&mut self, server: &Server, timeline: u32, start: u64, end: u64) {
        let mut dump = command(Programs::get().program("pg_waldump"));
        dump.arg("-p").arg(server.data().join("pg_wal"));
        dump.args([
            "-t",
            &timeline.to_string(),
            "-s",
            &shown(start),
            "-e",
            &shown(end),
        ]);
        let output = dump.env("TZ", "UTC").output().unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        for line in String::from_utf8(output.stdout).unwrap().lines() {
            self.take(line);
        }
        self.timeline = timeline;
        let rows = "select string_agg(xid || ':' || ids, ';') from
                    (select xid, string_agg(id::text, ',') ids from history group by xid) by_xid";
        self.rows = server
            .value(rows)
            .split(';')
            .map(|of_xid| {
                let (xid, ids) = of_xid.split_once(':').unwrap();
                let ids = ids.split(',').map(|id| id.parse().unwrap());
                (xid.parse().unwrap(), ids.collect())
            })
            .collect();
    }

    /// Takes a line of `pg_waldump`.
    fn take(&mut self, line: &str) {
        let field = |name: &str| {
            let (_, after) = line.split_once(name)?;
            Some(after.trim_start().split(',').next().unwrap().trim())
        };
        let Some(start) = field("lsn: ").map(lsn) else {
            return;
        };
        if self.records.last().is_some_and(|last| *last >= start) {
            return;
        }
        self.records.push(start);
        let (_, said) = line.split_once("desc: ").unwrap();
        let (word, said) = said.split_once(' ').unwrap_or((said, ""));
        let own_xid = || field("tx: ").unwrap().parse().unwrap();
        // as in `COMMIT 2026-11-23 01:02:03.456789 UTC; subxacts: 747`
        let time = |said: &str| micros(&format!("{}Z", &said[..26]));
        let prepared = || {
            let (xid, said) = said.split_once(": ").unwrap();
            (xid.parse::<u32>().unwrap(), said)
        };
        let is_transaction = line.starts_with("rmgr: Transaction");
        match word {
            "COMMIT" if is_transaction => self.commits.push(Commit {
                lsn: start,
                xid: own_xid(),
                time: time(said),
            }),
            "COMMIT_PREPARED" if is_transaction => {
                let (xid, said) = prepared();
                self.commits.push(Commit {
                    lsn: start,
                    xid,
                    time: time(said),
                });
            }
            "ABORT" if is_transaction => {
                self.aborted.insert(own_xid(), start);
            }
            "ABORT_PREPARED" if is_transaction => {
                self.aborted.insert(prepared().0, start);
            }
            "RESTORE_POINT" => self.points.push((said.to_owned(), start)),
            _ => {}
        }
    }

    /// The rows of all commits before this position.
    fn rows_before(&self, to: u64) -> String {
        let commits = self.commits.iter().filter(|commit| commit.lsn < to);
        let rows: BTreeSet<u64> = commits
            .filter_map(|commit| self.rows.get(&commit.xid))
            .flatten()
            .copied()
            .collect();
        let rows: Vec<String> = rows.iter().map(u64::to_string).collect();
        rows.join(",")
    }

    fn expected(&self, target: &Target) -> Expected {
        let up = |to| Expected::Up { to };
        let all = up(u64::MAX);
        let first_stop = self.backups.iter().map(|backup| backup.stop).min().unwrap();
        match target {
            Target::Latest => all,
            Target::Immediate { backup } => {
                let backup = self.backups.iter().find(|known| known.id == *backup);
                backup.map_or(Expected::Refused, |backup| up(backup.stop))
            }
            Target::Time { at, exclusive } => {
                let older = self.backups.iter().rev();
                for backup in older.filter(|backup| backup.finished <= *at) {
                    let is_out = |commit: &&Commit| {
                        let is_later = commit.time > *at || (*exclusive && commit.time == *at);
                        commit.lsn >= backup.start && is_later
                    };
                    match self.commits.iter().find(is_out) {
                        None if *at > self.latest => return Expected::Refused,
                        None => return all,
                        Some(out) if out.lsn >= backup.stop => return up(out.lsn),
                        Some(_) => {}
                    }
                }
                Expected::Refused
            }
            Target::Lsn { at, exclusive } => {
                let next = self.records.partition_point(|start| start < at);
                match self.records.get(next) {
                    Some(_) if *at < first_stop => Expected::Refused,
                    Some(start) if *exclusive => up(*start),
                    Some(start) => up(start + 1),
                    None => Expected::Refused,
                }
            }
            Target::Xid { xid, exclusive } => {
                let mut commits = self.commits.iter();
                let commit = commits.find(|commit| commit.xid == *xid && commit.lsn >= first_stop);
                match commit {
                    None => Expected::Refused,
                    Some(commit) if *exclusive => up(commit.lsn),
                    Some(commit) => up(commit.lsn + 1),
                }
            }
            Target::Name { name, .. } => {
                let first_start = self
                    .backups
                    .iter()
                    .map(|backup| backup.start)
                    .min()
                    .unwrap();
                let points = self.points.iter();
                let points: Vec<_> = points
                    .filter(|(known, lsn)| known == name && *lsn >= first_start)
                    .collect();
                match points.as_slice() {
                    [(_, lsn)] if *lsn >= first_stop => up(*lsn),
                    _ => Expected::Refused,
                }
            }
        }
    }

    /// What is named beside a transaction that cannot be restored to: where it was rolled back, or the end of the
    /// first backup, where it ended before that.
    fn nearest_to(&self, xid: u32) -> (Option<u64>, Option<i64>) {
        let first = &self.backups[0];
        let mut commits = self.commits.iter().filter(|commit| commit.xid == xid);
        let ended = commits.next().map(|commit| commit.lsn);
        let aborted = self.aborted.get(&xid).copied();
        match ended.or(aborted).filter(|at| *at >= first.start) {
            Some(at) if at < first.stop => (None, Some(first.finished)),
            at => (at, None),
        }
    }

    fn draw(&self, chance: &mut Chance) -> Target {
        let exclusive = chance.below(3) == 0;
        let any = |chance: &mut Chance, bound: usize| {
            usize::try_from(chance.below(bound as u64)).unwrap()
        };
        let commit = self.commits[any(chance, self.commits.len())];
        match chance.below(16) {
            0..=5 => {
                let near = [-1, 0, 1, i64::try_from(chance.below(3_000_000)).unwrap()];
                let at = commit.time + near[any(chance, near.len())];
                Target::Time { at, exclusive }
            }
            6 => {
                let near = [0, 1, 1000][any(chance, 3)];
                let (at, exclusive) = (self.latest + near, false);
                Target::Time { at, exclusive }
            }
            7 => {
                let backup = &self.backups[any(chance, self.backups.len())];
                let at = backup.finished + [-1, 0, 1][any(chance, 3)];
                Target::Time { at, exclusive }
            }
            8..=9 => {
                let start = self.records[any(chance, self.records.len() - 1)];
                let at = start + [0, 0, 1, 8, 24][any(chance, 5)];
                Target::Lsn { at, exclusive }
            }
            10 => {
                // at the edges of segments
                let at = commit.lsn >> 20 << 20;
                Target::Lsn { at, exclusive }
            }
            11..=12 => {
                let xid = commit.xid;
                Target::Xid { xid, exclusive }
            }
            13 => {
                // rolled back, part of another, or none
                let (xid, commits) = (commit.xid + 1, &self.commits);
                let own = commits.iter().any(|commit| commit.xid == xid);
                let aborted = self.aborted.keys().nth(any(chance, self.aborted.len()));
                let xid = if own { *aborted.unwrap() } else { xid };
                Target::Xid { xid, exclusive }
            }
            14 => {
                let (name, _) = self.points[any(chance, self.points.len())].clone();
                Target::Name { name, exclusive }
            }
            _ if exclusive => Target::Latest,
            _ => {
                let backup = self.backups[any(chance, self.backups.len())].id.clone();
                Target::Immediate { backup }
            }
        }
    }
}

/// Many small transactions of all sorts, by sessions beside each other.
fn work(server: &Server, next_id: &AtomicU64, seed: u64, transactions: u64) {
    std::thread::scope(|scope| {
        for session in 0..SESSIONS {
            scope.spawn(move || {
                let mut chance = Chance::of(seed * SESSIONS + session + 1);
                let mut sql = server.sql();
                let mut prepared = Vec::new();
                for number in 0..transactions {
                    let rows = chance.below(3) + 1;
                    let id = next_id.fetch_add(rows, Ordering::Relaxed);
                    let insert = format!(
                        "insert into history select n, pg_current_xact_id()::text::bigint
                         from generate_series({id}, {}) n;",
                        id + rows - 1
                    );
                    let gid = format!("{seed}-{session}-{number}");
                    let statements = match chance.below(14) {
                        0..=5 => {
                            let (from, to) = (chance.below(10), 10 + chance.below(10));
                            format!(
                                "begin; {insert} update balance set sum = sum - 1 where id = {from};
                                 update balance set sum = sum + 1 where id = {to}; commit"
                            )
                        }
                        6 => format!(
                            "begin; {insert} savepoint s; delete from history where id = {id};
                                      rollback to s; commit"
                        ),
                        7 => format!("begin; savepoint s; {insert} release s; commit"),
                        8 => format!("begin; {insert} rollback"),
                        9 => {
                            prepared.push(gid.clone());
                            format!("begin; {insert} prepare transaction '{gid}'")
                        }
                        10 => match prepared.pop() {
                            Some(gid) if number % 4 == 0 => format!("rollback prepared '{gid}'"),
                            Some(gid) => format!("commit prepared '{gid}'"),
                            None => insert,
                        },
                        11 => format!("select pg_create_restore_point('point {gid}')"),
                        12 if chance.below(8) == 0 => {
                            format!("select pg_create_restore_point('{TWICE}')")
                        }
                        12 => format!(
                            "begin; create table t{session}_{number} (id int); {insert}
                                       drop table t{session}_{number}; commit"
                        ),
                        _ if chance.below(2) == 0 => "select pg_switch_wal()".to_owned(),
                        _ => format!("{insert} select pg_sleep(0.002)"),
                    };
                    execute(&mut sql, &statements);
                }
            });
        }
    });
}

/// Works on the server, with a backup between, until all is stored and the latest moment lies behind it.
fn live(record: &Record, server: &Server, stream: &mut Stream, seed: u64, parts: u64) {
    let next_id = AtomicU64::new(seed * 1_000_000 + 1);
    for part in 0..parts {
        work(server, &next_id, seed + part, 25);
        std::thread::scope(|scope| {
            scope.spawn(|| work(server, &next_id, seed + part + 100, 10));
            record.anywhen.backup(server);
        });
    }
    work(server, &next_id, seed + 200, 25);
    stream.store_all(server);
    let done = micros(&now_of(server));
    eventually("the latest moment passes the last commit", || {
        latest(record, None) > done
    });
}

/// What `status` calls the latest moment, of one timeline or of all.
fn latest(record: &Record, timeline: Option<u32>) -> i64 {
    let status = record.anywhen.json(&["status"]);
    let windows = status["clusters"][0]["windows"].as_array().unwrap();
    let wanted = windows
        .iter()
        .filter(|window| timeline.is_none_or(|timeline| window["timeline"] == timeline));
    let latest = wanted
        .map(|window| micros(window["latest"].as_str().unwrap()))
        .max();
    latest.unwrap_or_default()
}

fn backups(record: &Record, timeline: u32) -> Vec<Backup> {
    let list = record.anywhen.json(&["list"]);
    let rows = list["backups"].as_array().unwrap().iter();
    let text = |row: &Value, name: &str| row[name].as_str().unwrap().to_owned();
    let of_timeline = rows.filter(|row| row["timeline"] == timeline);
    let backups = of_timeline.map(|row| Backup {
        id: text(row, "id"),
        start: lsn(&text(row, "start_lsn")),
        stop: lsn(&text(row, "stop_lsn")),
        finished: micros(&text(row, "finished_at")),
    });
    backups.collect()
}

/// That a plan says what the history does. Gives up to where its commits belong.
#[track_caller]
fn assert_planned(history: &History, target: &Target, planned: &Ended) -> Option<u64> {
    let to = match history.expected(target) {
        Expected::Refused => {
            assert_eq!(planned.code, Some(3), "{target:?} {planned}");
            if let Target::Time { at, .. } = target {
                let nearest = &planned.document()["error"]["nearest"];
                let moment = |side: &str| nearest[side].as_str().map(micros);
                let is_later = *at > history.latest;
                let before = is_later.then_some(history.latest);
                let after = (!is_later).then_some(history.backups[0].finished);
                let expected = (before, after);
                assert_eq!((moment("before"), moment("after")), expected, "{planned}");
            }
            if let Target::Xid { xid, .. } = target {
                let nearest = &planned.document()["error"]["nearest"];
                let (before, after) = history.nearest_to(*xid);
                assert_eq!(nearest["before"].as_str().map(lsn), before, "{planned}");
                assert_eq!(nearest["after"].as_str().map(micros), after, "{planned}");
                let there = before.map(|at| Target::Lsn {
                    at,
                    exclusive: false,
                });
                let there = there.map(|there| history.expected(&there));
                assert!(!matches!(there, Some(Expected::Refused)), "{planned}");
            }
            return None;
        }
        Expected::Up { to } => to,
    };
    assert_eq!(
        planned.code,
        Some(0),
        "{target:?} up to {}: {planned}",
        shown(to)
    );
    let plan = planned.document();
    let mut backups = history.backups.iter();
    let backup = backups.find(|known| plan["backup"] == known.id.as_str());
    let backup = backup.unwrap_or_else(|| panic!("{target:?}: a backup of another branch: {plan}"));
    // the record that is the last one in may end at the backup's end
    assert!(
        backup.stop <= to.saturating_add(LOOK_AHEAD_BYTES),
        "{target:?}: {plan}"
    );
    let of_plan = |name: &str| plan[name]["lsn"].as_str().map(lsn);
    let commits = || history.commits.iter().map(|commit| commit.lsn);
    let last_in = commits().rfind(|lsn| (backup.start..to).contains(lsn));
    assert_eq!(of_plan("last_in"), last_in, "{target:?}: {plan}");
    if !matches!(target, Target::Immediate { .. } | Target::Latest) {
        let mut out = commits().filter(|lsn| *lsn >= to);
        let first_out = out.find(|lsn| *lsn - to <= LOOK_AHEAD_BYTES);
        assert_eq!(of_plan("first_out"), first_out, "{target:?}: {plan}");
    }
    Some(to)
}

/// That what is restored has the rows that the history says.
#[track_caller]
fn assert_restored(
    record: &Record,
    history: &History,
    target: &Target,
    arguments: &[&str],
    to: u64,
) {
    let data = record.target("restored");
    record.anywhen.restore(&data, arguments);
    assert_verified(&data);
    let end = match target {
        Target::Latest => End::Promoted,
        _ => End::Paused,
    };
    let mut server = start_restored(&record.ground, &data, end);
    let mut sql = server.sql();
    let rows = "select coalesce(string_agg(id::text, ',' order by id), '') from history";
    let rows = value(&mut sql, rows);
    assert_eq!(rows, history.rows_before(to), "{target:?}");
    assert_eq!(
        value(&mut sql, "select sum(sum) from balance"),
        "0",
        "{target:?}"
    );
    drop(sql);
    server.stop(Shutdown::Fast);
    std::fs::remove_dir_all(&data).unwrap();
}

/// A history on timeline 1, and one on timeline 2, which left it in the middle.
fn recorded(seed: u64) -> (Record, [History; 2]) {
    let mut record = Record::of_server(&Options {
        wal_segment_mib: 1,
        settings: "max_prepared_transactions = 200\nwal_keep_size = '2GB'".to_owned(),
        ..Options::default()
    });
    record.server.execute(
        "create table history (id bigint, xid bigint);
         create table balance (id int primary key, sum bigint);
         insert into balance select n, 0 from generate_series(0, 19) n",
    );
    let mut stream = record.anywhen.stream_with(&record.server, &QUICK_TIPS);
    record.anywhen.backup(&record.server);
    live(&record, &record.server, &mut stream, seed, 2);
    stream.stop();
    let end = flushed(&record.server);
    let mut first = History {
        backups: backups(&record, 1),
        latest: latest(&record, Some(1)),
        ..History::default()
    };
    first.add(&record.server, 1, first.backups[0].start, end);
    record.server.stop(Shutdown::Fast);

    let middle = rfc3339(first.commits[first.commits.len() / 2 + 20].time);
    let data = record.target("branch");
    let to = ["--to-time", &middle, "--action", "promote"];
    record.anywhen.restore(&data, &to);
    let mut branch = start_restored(&record.ground, &data, End::Promoted);
    let mut stream = record.anywhen.stream_with(&branch, &QUICK_TIPS);
    live(&record, &branch, &mut stream, seed + 1000, 1);
    stream.stop();
    let parted = std::fs::read_to_string(data.join("pg_wal/00000002.history")).unwrap();
    let fork = lsn(parted.split('\t').nth(1).unwrap());
    let end = flushed(&branch);
    let mut second = first.up_to(fork);
    second.backups.extend(backups(&record, 2));
    second.latest = latest(&record, Some(2));
    second.add(&branch, 2, fork, end);
    branch.stop(Shutdown::Fast);
    (record, [first, second])
}

fn flushed(server: &Server) -> u64 {
    lsn(&server.value("select pg_current_wal_flush_lsn()"))
}

/// Each restore that brings back another moment than the one that was named is found out by nobody, until
/// the row that is missing is looked for.
#[test]
fn any_target_leads_to_the_rows_that_the_history_has_there() {
    let mut chance = Chance::new();
    let (record, histories) = recorded(chance.below(1000) + 1);
    let (plans, restores) = if rounds(0) == 0 { (60, 4) } else { (2000, 40) };
    let (mut refused, mut restored) = (0, 0);
    for number in 0..plans {
        let history = &histories[usize::try_from(chance.below(2)).unwrap()];
        let target = history.draw(&mut chance);
        let mut arguments = target.arguments();
        arguments.extend(["--timeline".to_owned(), history.timeline.to_string()]);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let planned = record.target("planned");
        let plan = [
            "restore",
            "--dry-run",
            "--json",
            "-D",
            planned.to_str().unwrap(),
        ];
        let planned = record.anywhen.run(&[&plan, arguments.as_slice()].concat());
        let Some(to) = assert_planned(history, &target, &planned) else {
            refused += 1;
            continue;
        };
        if restored * (plans / restores) <= number {
            assert_restored(&record, history, &target, &arguments, to);
            restored += 1;
        }
    }
    assert!(
        refused > 0 && restored >= restores / 2,
        "{refused} refused, {restored} restored"
    );
}
