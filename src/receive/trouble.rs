//! What goes wrong again and again while a server is met: told when it is news. Pure.

use std::time::{Duration, Instant};

/// So often the same is told again.
const REMINDER: Duration = Duration::from_mins(1);

/// The trouble that was last told, until it is over.
#[derive(Debug, Default)]
pub(super) struct Trouble {
    told: Option<Told>,
}

#[derive(Debug)]
struct Told {
    what: String,
    at: Instant,
    since: Instant,
}

impl Trouble {
    /// Whether `message` is to be told: something else goes wrong than a moment ago, or it has gone
    /// on for another minute. Other numbers in it are no news: positions move, times pass.
    pub(super) fn is_news(&mut self, message: &str, now: Instant) -> bool {
        let what = without_numbers(message);
        let since = self.told.as_ref().map_or(now, |told| told.since);
        let is_known = |told: &Told| told.what == what && now < told.at + REMINDER;
        if self.told.as_ref().is_some_and(is_known) {
            return false;
        }
        self.told = Some(Told {
            what,
            at: now,
            since,
        });
        true
    }

    /// It is over; how long it lasted, where it was told.
    pub(super) fn is_over(&mut self, now: Instant) -> Option<Duration> {
        self.told.take().map(|told| now - told.since)
    }
}

/// The words without a digit.
fn without_numbers(message: &str) -> String {
    let words = message.split(' ');
    let words = words.filter(|word| !word.contains(|letter: char| letter.is_ascii_digit()));
    words.collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_trouble_is_told_once_a_minute_and_another_at_once() {
        let mut trouble = Trouble::default();
        let begin = Instant::now();
        let at = |second| begin + Duration::from_secs(second);
        let behind = |lsn: &str| format!("the server is behind: it has WAL up to {lsn}");
        assert_eq!(trouble.is_over(at(0)), None);
        assert!(trouble.is_news(&behind("0/3000060"), at(0)));
        // a standby comes on, and each attempt would be a line
        assert!(!trouble.is_news(&behind("0/4000060"), at(5)));
        assert!(!trouble.is_news(&behind("0/3000060"), at(59)));
        assert!(trouble.is_news(&behind("0/5000060"), at(60)));
        assert!(trouble.is_news("cannot connect: refused", at(61)));
        assert_eq!(trouble.is_over(at(90)), Some(Duration::from_secs(90)));
        assert!(trouble.is_news("cannot connect: refused", at(91)));
    }
}
