//! How a timeline came to be, and what it may read of those before it.

use thiserror::Error;

use crate::lsn::Lsn;
use crate::timeline::TimelineId;

/// More promotions than a cluster sees in its life: a longer file is damaged, or hostile.
const ENTRIES_MAX: usize = 10_000;

/// A timeline and the timelines that it grew out of, as in its `.history` file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TimelineHistory {
    timeline: TimelineId,
    entries: Vec<HistoryEntry>,
}

/// One line of a history file: an ancestor and where it was left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HistoryEntry {
    /// The ancestor.
    pub timeline: TimelineId,
    /// Where it was left, as the file says. An ancestor's log may be read up to here at most;
    /// less if a later line names an earlier place, see [`TimelineHistory::reach`].
    pub end: Lsn,
    /// Why, in the server's words: `no recovery target specified`, `before 2000-01-01 …`.
    pub reason: String,
}

/// How far the log of one timeline belongs to a branch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// All of it: the timeline is the branch itself.
    Whole,
    /// An ancestor: what lies before this position.
    Until(Lsn),
    /// Nothing: the branch did not grow out of it.
    NotAncestor,
}

/// A stretch of a branch that is read from one timeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HistoryPart {
    /// Whose log holds it.
    pub timeline: TimelineId,
    /// Its first byte; 0/0 for the oldest.
    pub start: Lsn,
    /// The byte after its last; none for the branch itself, which goes on.
    pub end: Option<Lsn>,
}

/// A history file that PostgreSQL would refuse, or that we do not trust. Lines count from 1.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum HistoryError {
    /// No number at the start of a line.
    #[error("timeline history has no timeline number: line={line}, found={found:?}")]
    NoTimeline {
        /// The line.
        line: usize,
        /// What stands there.
        found: String,
    },
    /// No position after the number.
    #[error("timeline history has no switch point: line={line}, found={found:?}")]
    NoSwitchPoint {
        /// The line.
        line: usize,
        /// What stands there.
        found: String,
    },
    /// An ancestor is not younger than the one before it.
    #[error("timeline history does not increase: line={line}, previous={previous}, found={found}")]
    NotIncreasing {
        /// The line.
        line: usize,
        /// The timeline of the line before.
        previous: TimelineId,
        /// The timeline of this line.
        found: TimelineId,
    },
    /// An ancestor that is not older than the timeline itself.
    #[error("timeline history names no ancestor: line={line}, timeline={timeline}, found={found}")]
    NotBeforeChild {
        /// The line.
        line: usize,
        /// Whose history it is.
        timeline: TimelineId,
        /// The timeline of the line.
        found: TimelineId,
    },
    /// More ancestors than a timeline can have.
    #[error("timeline history is too long: line={line}, most_entries={ENTRIES_MAX}")]
    TooLong {
        /// The line of the first that is too many.
        line: usize,
    },
}

impl TimelineHistory {
    /// The history of a timeline that grew out of none, and has no history file.
    pub const fn new_first(timeline: TimelineId) -> Self {
        Self {
            timeline,
            entries: Vec::new(),
        }
    }

    /// Reads the history file of `timeline` as `timeline.c`, `readTimeLineHistory` does: lines of
    /// timeline, position and reason; blank ones and those that start with `#` say nothing.
    ///
    /// `file` may be damaged or hostile: never panics, allocates in proportion to its length, and
    /// takes 10,000 ancestors at most.
    pub fn parse(timeline: TimelineId, file: &[u8]) -> Result<Self, HistoryError> {
        let mut entries: Vec<HistoryEntry> = Vec::new();
        for (index, bytes) in file.split(|byte| *byte == b'\n').enumerate() {
            let line = index.saturating_add(1);
            let text = String::from_utf8_lossy(bytes);
            let text = text.trim_ascii();
            if text.is_empty() || text.starts_with('#') {
                continue;
            }
            if entries.len() == ENTRIES_MAX {
                return Err(HistoryError::TooLong { line });
            }
            let entry = parse_line(line, text)?;
            let previous = entries.last().map(|entry| entry.timeline);
            if let Some(previous) = previous.filter(|previous| entry.timeline <= *previous) {
                return Err(HistoryError::NotIncreasing {
                    line,
                    previous,
                    found: entry.timeline,
                });
            }
            if entry.timeline >= timeline {
                return Err(HistoryError::NotBeforeChild {
                    line,
                    timeline,
                    found: entry.timeline,
                });
            }
            entries.push(entry);
        }
        Ok(Self { timeline, entries })
    }

    /// Whose history it is.
    pub const fn timeline(&self) -> TimelineId {
        self.timeline
    }

    /// The lines of the file, oldest ancestor first.
    pub fn entries(&self) -> &[HistoryEntry] {
        &self.entries
    }

    /// How far `timeline` belongs to this branch.
    ///
    /// A timeline that was made by recovering to a point before its parent began has a history
    /// whose positions run backwards; the bytes that belong to the branch end at the earliest
    /// position of the line and those after it (`timeline.c`, `tliOfPointInHistory`, asks the
    /// newest first).
    pub fn reach(&self, timeline: TimelineId) -> Reach {
        if timeline == self.timeline {
            return Reach::Whole;
        }
        let from = self
            .entries
            .iter()
            .skip_while(|entry| entry.timeline != timeline);
        from.map(|entry| entry.end)
            .min()
            .map_or(Reach::NotAncestor, Reach::Until)
    }

    /// The timeline whose log holds the byte at `lsn` of this branch.
    pub fn timeline_at(&self, lsn: Lsn) -> TimelineId {
        let left = self.entries.iter().rposition(|entry| entry.end <= lsn);
        // the first line after the last one that ends at or before `lsn`
        let next = left.map_or(0, |index| index.saturating_add(1));
        self.entries
            .get(next)
            .map_or(self.timeline, |entry| entry.timeline)
    }

    /// The stretches of this branch and where to read each, oldest first; none is empty.
    pub fn parts(&self) -> Vec<HistoryPart> {
        // as `reach`, for all of them at once: the earliest position of a line and those after it
        let mut ends: Vec<Lsn> = self.entries.iter().map(|entry| entry.end).collect();
        let mut earliest = Lsn::new(u64::MAX);
        for end in ends.iter_mut().rev() {
            earliest = earliest.min(*end);
            *end = earliest;
        }
        let mut parts = Vec::new();
        let mut start = Lsn::ZERO;
        for (entry, end) in self.entries.iter().zip(ends) {
            if start < end {
                parts.push(HistoryPart {
                    timeline: entry.timeline,
                    start,
                    end: Some(end),
                });
                start = end;
            }
        }
        parts.push(HistoryPart {
            timeline: self.timeline,
            start,
            end: None,
        });
        parts
    }
}

fn parse_line(line: usize, text: &str) -> Result<HistoryEntry, HistoryError> {
    let excerpt = || text.chars().take(80).collect();
    let (number, rest) = text
        .split_once(|c: char| c.is_ascii_whitespace())
        .unwrap_or((text, ""));
    let Ok(timeline) = number.parse() else {
        return Err(HistoryError::NoTimeline {
            line,
            found: excerpt(),
        });
    };
    let rest = rest.trim_ascii_start();
    let (position, reason) = rest
        .split_once(|c: char| c.is_ascii_whitespace())
        .unwrap_or((rest, ""));
    let Ok(end) = position.parse() else {
        return Err(HistoryError::NoSwitchPoint {
            line,
            found: excerpt(),
        });
    };
    Ok(HistoryEntry {
        timeline,
        end,
        reason: reason.trim_ascii().to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(number: u32) -> TimelineId {
        TimelineId::new(number).unwrap()
    }

    fn lsn(text: &str) -> Lsn {
        text.parse().unwrap()
    }

    const FILE: &[u8] = b"# made by a test\n1\t0/A000098\tno recovery target specified\n\n\
        \t2\t16/B374D848\tbefore 2000-01-01 00:00:00+00\n";

    #[test]
    fn reads_what_a_server_writes() {
        let history = TimelineHistory::parse(id(3), FILE).unwrap();
        assert_eq!(history.entries()[0].reason, "no recovery target specified");
        assert_eq!(history.reach(id(1)), Reach::Until(lsn("0/A000098")));
        assert_eq!(history.reach(id(2)), Reach::Until(lsn("16/B374D848")));
        assert_eq!(history.reach(id(3)), Reach::Whole);
        assert_eq!(history.reach(id(4)), Reach::NotAncestor);
        let parts: Vec<_> = history
            .parts()
            .iter()
            .map(|p| (p.timeline.get(), p.start))
            .collect();
        assert_eq!(
            parts,
            [
                (1, Lsn::ZERO),
                (2, lsn("0/A000098")),
                (3, lsn("16/B374D848"))
            ]
        );
    }

    /// The byte at the fork is the first one of the new timeline.
    #[test]
    fn an_ancestor_ends_before_the_byte_at_the_fork() {
        let history = TimelineHistory::parse(id(3), FILE).unwrap();
        assert_eq!(history.timeline_at(lsn("0/A000097")), id(1));
        assert_eq!(history.timeline_at(lsn("0/A000098")), id(2));
        assert_eq!(history.timeline_at(lsn("16/B374D848")), id(3));
    }

    /// Recovering along timeline 2 to a point that lies before timeline 2 began gives timeline 3
    /// this history; giving out timeline 1 up to 0/5000 would replay work that 3 never had.
    #[test]
    fn positions_that_run_backwards_cut_the_ancestors() {
        let history = TimelineHistory::parse(id(3), b"1\t0/5000\tx\n2\t0/3000\ty\n").unwrap();
        assert_eq!(history.reach(id(1)), Reach::Until(lsn("0/3000")));
        assert_eq!(history.reach(id(2)), Reach::Until(lsn("0/3000")));
        assert_eq!(history.timeline_at(lsn("0/2FFF")), id(1));
        assert_eq!(history.timeline_at(lsn("0/4000")), id(3));
        let parts = history.parts();
        assert_eq!(parts.len(), 2);
        assert_eq!(
            (parts[0].timeline, parts[0].end),
            (id(1), Some(lsn("0/3000")))
        );
        assert_eq!((parts[1].timeline, parts[1].start), (id(3), lsn("0/3000")));
    }

    /// A file of megabytes would keep a thread busy for minutes, and the stream with it.
    #[test]
    fn refuses_a_file_of_more_lines_than_there_are_promotions() {
        use std::fmt::Write as _;
        let mut file = String::new();
        for line in 1..=ENTRIES_MAX {
            writeln!(file, "{line}\t0/{line:X}\tx").unwrap();
        }
        let history = TimelineHistory::parse(id(20_000), file.as_bytes()).unwrap();
        assert_eq!(history.parts().len(), ENTRIES_MAX + 1);
        file.push_str("10001\t1/0\tx\n");
        assert_eq!(
            TimelineHistory::parse(id(20_000), file.as_bytes()),
            Err(HistoryError::TooLong { line: 10_001 })
        );
    }

    /// What is read from each part is what `reach` allows, also where positions run backwards.
    #[test]
    fn parts_end_where_the_branch_left_them() {
        let file = b"1\t0/5000\tx\n2\t0/3000\ty\n3\t0/9000\tz\n4\t0/7000\tw\n";
        let history = TimelineHistory::parse(id(5), file).unwrap();
        let parts = history.parts();
        let ends: Vec<_> = parts.iter().filter_map(|part| part.end).collect();
        assert_eq!(ends, [lsn("0/3000"), lsn("0/7000")]);
        for part in parts.iter().filter(|part| part.end.is_some()) {
            let until = part.end.map(Reach::Until).unwrap();
            assert_eq!(history.reach(part.timeline), until);
        }
    }

    #[test]
    fn a_first_timeline_reads_itself_alone() {
        let history = TimelineHistory::new_first(id(1));
        assert_eq!(history.timeline_at(Lsn::ZERO), id(1));
        assert_eq!(history.parts().len(), 1);
        assert_eq!(TimelineHistory::parse(id(1), b""), Ok(history));
    }

    #[test]
    fn refuses_what_postgres_refuses() {
        let parse = |file: &[u8]| TimelineHistory::parse(id(3), file);
        assert!(matches!(
            parse(b"x 0/0 y"),
            Err(HistoryError::NoTimeline { line: 1, .. })
        ));
        assert!(matches!(
            parse(b"0\t0/0\ty"),
            Err(HistoryError::NoTimeline { .. })
        ));
        assert!(matches!(
            parse(b"\n1"),
            Err(HistoryError::NoSwitchPoint { line: 2, .. })
        ));
        assert!(matches!(
            parse(b"1\t5000\ty"),
            Err(HistoryError::NoSwitchPoint { .. })
        ));
        assert!(matches!(
            parse(b"2\t0/1\ty\n1\t0/2\tz"),
            Err(HistoryError::NotIncreasing { line: 2, .. })
        ));
        assert!(matches!(
            parse(b"3\t0/1\ty"),
            Err(HistoryError::NotBeforeChild { .. })
        ));
    }
}
