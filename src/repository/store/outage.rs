//! One outage of a store: when it begins, how long it lasts, and when the log says so. Pure.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;

/// The time between two lines about one outage.
const REMINDER: Duration = Duration::from_mins(1);

/// The time between the end of one outage and the first line about another.
const QUIET_AFTER: Duration = Duration::from_secs(5);

/// Whether a store answers, as all know that ask it.
#[derive(Debug, Default)]
pub(super) struct Outage {
    /// By what is asked of it: rights may be missing for that alone, and lastingly.
    under_way: BTreeMap<&'static str, UnderWay>,
    /// No line is written before.
    next_line: Option<Instant>,
}

#[derive(Debug)]
struct UnderWay {
    since: Instant,
    last_failure: Instant,
    told: bool,
}

impl Outage {
    /// Whether the last that is known of the store is that it did not do this.
    pub(super) fn is_under_way(&self, doing: &str) -> bool {
        self.under_way.contains_key(doing)
    }

    /// An attempt failed. Where that is to be told, for how long they have failed; it is where it
    /// `is_tried_again`, at first and once a minute.
    pub(super) fn failed(
        &mut self,
        doing: &'static str,
        now: Instant,
        is_tried_again: bool,
    ) -> Option<Duration> {
        let outage = self.under_way.entry(doing).or_insert(UnderWay {
            since: now,
            last_failure: now,
            told: false,
        });
        outage.last_failure = now;
        if !is_tried_again || self.next_line.is_some_and(|next| now < next) {
            return None;
        }
        outage.told = true;
        self.next_line = Some(now + REMINDER);
        Some(now - outage.since)
    }

    /// An attempt was answered that began at `began`. Where that ends an outage that was told, how
    /// long it lasted.
    pub(super) fn answered(
        &mut self,
        doing: &'static str,
        began: Instant,
        now: Instant,
    ) -> Option<Duration> {
        // what was under way when another attempt failed says nothing of the time since
        if began < self.under_way.get(doing)?.last_failure {
            return None;
        }
        let outage = self.under_way.remove(doing)?;
        // the next one is news, but a store that is only busy does not fill the log
        self.next_line = self.next_line.map(|next| next.min(now + QUIET_AFTER));
        outage.told.then(|| now - outage.since)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WRITE: &str = "write";

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    /// A line for each attempt of each object would bury what else happens in an outage of hours.
    #[test]
    fn an_outage_is_told_when_it_begins_and_once_a_minute_and_when_it_is_over() {
        let mut outage = Outage::default();
        let begin = Instant::now();
        let told: Vec<u64> = (0..150)
            .filter_map(|second| outage.failed(WRITE, begin + seconds(second), true))
            .map(|lasts| lasts.as_secs())
            .collect();
        assert_eq!(told, [0, 60, 120]);
        let end = begin + seconds(150);
        assert_eq!(outage.answered(WRITE, end, end), Some(seconds(150)));
        assert_eq!(outage.answered(WRITE, end, end), None, "told once");
    }

    #[test]
    fn the_next_outage_is_news_unless_it_comes_at_once() {
        let mut outage = Outage::default();
        let begin = Instant::now();
        let at = |second| begin + seconds(second);
        assert!(outage.failed(WRITE, at(0), true).is_some());
        assert!(outage.answered(WRITE, at(10), at(10)).is_some());
        assert_eq!(outage.failed(WRITE, at(12), true), None);
        assert_eq!(
            outage.answered(WRITE, at(13), at(13)),
            None,
            "nobody was told"
        );
        assert_eq!(outage.failed(WRITE, at(30), true), Some(seconds(0)));
    }

    /// "It answers again" while every new attempt fails.
    #[test]
    fn what_was_under_way_and_what_is_allowed_all_the_same_end_no_outage() {
        let mut outage = Outage::default();
        let begin = Instant::now();
        let at = |second| begin + seconds(second);
        outage.failed(WRITE, at(5), true);
        assert_eq!(outage.answered(WRITE, at(4), at(6)), None);
        assert_eq!(outage.answered("read", at(6), at(6)), None);
        assert!(outage.is_under_way(WRITE) && !outage.is_under_way("read"));
        assert!(outage.answered(WRITE, at(6), at(7)).is_some());
    }

    /// A policy that forbids deleting would hide every outage that comes after.
    #[test]
    fn what_is_forbidden_for_good_hides_no_outage() {
        let mut outage = Outage::default();
        let begin = Instant::now();
        let at = |second| begin + seconds(second);
        assert!(outage.failed("delete", at(0), true).is_some());
        assert_eq!(outage.failed(WRITE, at(61), true), Some(seconds(0)));
        let over = outage.answered(WRITE, at(70), at(70));
        assert_eq!(over, Some(seconds(9)));
        assert!(outage.is_under_way("delete") && !outage.is_under_way(WRITE));
    }

    /// Whoever gives up says so himself.
    #[test]
    fn what_is_not_tried_again_is_not_told() {
        let mut outage = Outage::default();
        let now = Instant::now();
        assert_eq!(outage.failed(WRITE, now, false), None);
        assert!(outage.is_under_way(WRITE));
        assert_eq!(outage.answered(WRITE, now, now), None);
        assert!(!outage.is_under_way(WRITE));
    }
}
