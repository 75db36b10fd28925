//! How often each event and each fault occurred: a run in which one never did has not tested what
//! it says.

use std::fmt::Write as _;

macro_rules! countable {
    ($($name:ident => $words:literal,)*) => {
        /// What is counted.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(super) enum Seen { $($name,)* }

        const ALL: &[(Seen, &str)] = &[$((Seen::$name, $words),)*];
    };
}

countable! {
    Connected => "server: met",
    Cut => "server: connection cut",
    KeepaliveReply => "server: wants a reply",
    ShutDown => "server: shutdown checkpoint sent",
    ShutDownTold => "server: shut down with all told",
    Recycled => "server: removed what was reported",
    SlotLost => "server: gave up the slot",
    TimelineEnd => "server: timeline ended while streaming",
    Removed => "server: no longer has what is needed",
    Promoted => "server: promoted",
    FailedOver => "server: another one was promoted behind it",
    Older => "server: left behind, refused",
    TwoHistories => "server: another history, refused",
    WaitedFor => "server: commits wait for us",
    BackPressure => "shell: no room, reading stopped",
    Lent => "shell: verified elsewhere",
    ReplyLater => "shell: reply wanted behind what is verified",
    Killed => "shell: killed",
    Stopped => "shell: asked to stop",
    Finished => "shell: everything stored",
    Resending => "shell: ended while the server was sending again",
    Compared => "shell: began a segment earlier to compare",
    Hole => "shell: a hole was noted",
    Piece => "store: a piece given",
    Overlapping => "store: a piece given while another is under way",
    Segment => "store: a segment given",
    Merged => "store: a merge given",
    OutOfOrder => "store: acknowledged out of order",
    FailedAfter => "store: done, and not acknowledged",
    LandedLate => "store: a request of a killed process landed later",
    Outage => "store: outage",
    Held => "store: held back for another repository",
    Spooled => "spool: took it",
    Drained => "spool: drained",
    SpoolTold => "spool: the server was told what only it has",
    PieceGone => "piece: gave way",
    OthersGone => "piece: of another connection gave way",
    Disconnected => "rules: left a server that shuts down",
    ToldNothing => "rules: reported 0/0 until it was sent again",
    ToldMore => "rules: reported more",
}

/// The counts of a run.
#[derive(Debug, Clone)]
pub(super) struct Tally {
    counts: Vec<u64>,
}

impl Tally {
    pub(super) fn new() -> Self {
        Self {
            counts: vec![0; ALL.len()],
        }
    }

    pub(super) fn count(&mut self, seen: Seen) {
        let at = ALL.iter().position(|(one, _)| *one == seen).unwrap();
        self.counts[at] += 1;
    }

    pub(super) fn add(&mut self, other: &Self) {
        for (count, more) in self.counts.iter_mut().zip(&other.counts) {
            *count += more;
        }
    }

    /// A line for each, and what never occurred.
    pub(super) fn report(&self) -> (String, Vec<&'static str>) {
        let (mut lines, mut never) = (String::new(), Vec::new());
        for ((_, words), count) in ALL.iter().zip(&self.counts) {
            writeln!(lines, "  {count:>9}  {words}").unwrap();
            if *count == 0 {
                never.push(*words);
            }
        }
        (lines, never)
    }
}
