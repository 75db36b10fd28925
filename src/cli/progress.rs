//! Progress of long work: a bar on a terminal, a plain line now and then elsewhere.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use indicatif::{HumanBytes, HumanDuration, ProgressBar, ProgressStyle};
use jiff::Timestamp;
use jiff::tz::TimeZone;

use super::output::draws_progress;

/// How often a line is printed where no bar can be drawn.
const LINE_INTERVAL: Duration = Duration::from_secs(10);

/// Shows how far a copy has come, in bytes.
pub(super) struct Progress {
    bar: Option<ProgressBar>,
    lines: Mutex<Lines>,
}

/// What goes on, when the first bytes of it came, and when the last line was printed.
struct Lines {
    doing: &'static str,
    since: Option<(Instant, Instant)>,
    /// The moment up to which a replay has come.
    reached: Option<Timestamp>,
}

impl Lines {
    fn of(doing: &'static str) -> Self {
        Self {
            doing,
            since: None,
            reached: None,
        }
    }

    /// What goes on, and where it stands, in local time.
    fn message(&self) -> String {
        let reached = self.reached.map_or_else(String::new, |reached| {
            let zoned = reached.to_zoned(TimeZone::system());
            format!(", at {}", zoned.strftime("%Y-%m-%d %H:%M:%S %Z"))
        });
        format!("{}{reached}", self.doing)
    }
}

impl Progress {
    /// Begins to show; nothing is drawn if `quiet`.
    pub(super) fn new(doing: &'static str, quiet: bool) -> Self {
        let bar = (draws_progress() && !quiet).then(|| {
            let bar = ProgressBar::new(0);
            let form = "{msg} {bar:30} {bytes}/{total_bytes} {bytes_per_sec} {eta} left";
            if let Ok(style) = ProgressStyle::with_template(form) {
                bar.set_style(style);
            }
            bar.set_message(doing);
            bar
        });
        let lines = Mutex::new(Lines::of(doing));
        Self { bar, lines }
    }

    /// Something else is counted from now on, if it is.
    pub(super) fn begin(&self, doing: &'static str) {
        let Ok(mut lines) = self.lines.lock() else {
            return;
        };
        if lines.doing == doing {
            return;
        }
        *lines = Lines::of(doing);
        if let Some(bar) = &self.bar {
            bar.set_message(doing);
            bar.reset();
        }
    }

    /// What goes on has come to this moment of the cluster's life, where that is known.
    pub(super) fn reached(&self, moment: Option<Timestamp>) {
        let Ok(mut lines) = self.lines.lock() else {
            return;
        };
        if moment.is_none() || lines.reached == moment {
            return;
        }
        lines.reached = moment;
        if let Some(bar) = &self.bar {
            bar.set_message(lines.message());
        }
    }

    /// So much is done, of about so much.
    pub(super) fn at(&self, done: u64, total: u64) {
        if let Some(bar) = &self.bar {
            bar.set_length(total.max(done));
            bar.set_position(done);
            return;
        }
        let Ok(mut lines) = self.lines.lock() else {
            return;
        };
        // a checkpoint may have been waited for until now
        let now = Instant::now();
        let (started, last) = lines.since.get_or_insert((now, now));
        if last.elapsed() < LINE_INTERVAL {
            return;
        }
        *last = now;
        let seconds = started.elapsed().as_secs().max(1);
        let rate = (done / seconds).max(1);
        let left = Duration::from_secs(total.saturating_sub(done) / rate);
        tracing::info!(
            "{}: {} of about {}, {}/s, {} left",
            lines.message(),
            HumanBytes(done),
            HumanBytes(total.max(done)),
            HumanBytes(rate),
            HumanDuration(left)
        );
    }

    /// Takes the bar away.
    pub(super) fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
