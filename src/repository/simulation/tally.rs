//! How often each fault and each transition occurred: a run in which one never did has not tested
//! what it says.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! countable {
    ($($name:ident => $words:literal,)*) => {
        /// What is counted.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(super) enum Seen { $($name,)* }

        const ALL: &[(Seen, &str)] = &[$((Seen::$name, $words),)*];
    };
}

countable! {
    FailedBefore => "fault: failed before storing",
    FailedAfter => "fault: failed after storing",
    Slow => "fault: slow",
    SlowDown => "fault: 503 SlowDown",
    HalfOpen => "fault: half-open, nothing done",
    HalfOpenDone => "fault: half-open, done all the same",
    LandedLate => "fault: a request that was given up landed later",
    Truncated => "fault: body cut short",
    BodyBroke => "fault: connection lost within a body",
    BodyStalled => "fault: body stalled",
    ListBroke => "fault: listing broke off",
    ListedLate => "fault: an object was listed late",
    StillListed => "fault: a removed object was still listed",
    Refusing => "outage: connections refused",
    Silent => "outage: no answer",
    Busy => "outage: 503 to everything",
    Denied => "outage: access denied",
    Full => "outage: no room left",
    Emptied => "outage: came back empty",
    ConditionIgnored => "store: ignored a condition",
    ConditionUnknown => "store: did not know the condition",
    Everywhere => "write: acknowledged by every place",
    Partly => "write: acknowledged by some",
    ByNone => "write: no place took it",
    AllAway => "write: while every place was away",
    LateHolder => "write: a slower place took it after the acknowledgement",
    ConflictRefused => "write: other content refused",
    OwnCreateFound => "write: a retried create found its own first attempt",
    GuardFound => "write: a guarded create found the object",
    PieceRemoved => "write: a piece gave way",
    Killed => "process: killed",
    Ended => "process: ended",
    FellBehind => "place: fell behind",
    CameBack => "place: came back",
    FilledUp => "place: filled up",
    WasGone => "place: what was stored was gone",
    MendedWhole => "mend: all whole",
    NotMended => "mend: not whole",
    CopiedAsIs => "copy: as it is stored",
    EncodedAnew => "copy: encoded anew",
    BackupCopiedAsIs => "copy: a backup as it is stored",
    BackupRepacked => "copy: a backup repacked",
    BackupCommitted => "backup: committed",
    BackupShared => "backup: refers to what another has stored",
    BackupDiscarded => "backup: failed and discarded",
    BackupKilled => "backup: killed",
    BackupRead => "backup: read back",
    ReadAll => "read: right bytes",
    ReadElsewhere => "read: another place had it",
    ReadNot => "read: a place could not be asked",
    ReadLocked => "read: without the key",
    NotThere => "read: not there",
    WholeSegment => "read: a whole segment",
    Pieced => "read: a segment out of pieces",
    Listed => "read: the catalog",
    DayChanged => "keys: a new day",
    RecipientAdded => "keys: a recipient more",
}

/// The counts of a run.
#[derive(Debug)]
pub(super) struct Tally {
    counts: Vec<AtomicU64>,
}

impl Tally {
    pub(super) fn new() -> Self {
        Self {
            counts: ALL.iter().map(|_| AtomicU64::new(0)).collect(),
        }
    }

    pub(super) fn count(&self, seen: Seen) {
        let at = ALL.iter().position(|(one, _)| *one == seen).unwrap();
        self.counts[at].fetch_add(1, Ordering::Relaxed);
    }

    /// A line for each, and what never occurred.
    pub(super) fn report(&self) -> (String, Vec<&'static str>) {
        let (mut lines, mut never) = (String::new(), Vec::new());
        for ((_, words), count) in ALL.iter().zip(&self.counts) {
            let count = count.load(Ordering::Relaxed);
            writeln!(lines, "  {count:>9}  {words}").unwrap();
            if count == 0 {
                never.push(*words);
            }
        }
        (lines, never)
    }
}
