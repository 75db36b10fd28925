//! Progress of long work: a bar on a terminal, a plain line now and then elsewhere.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use indicatif::{HumanBytes, HumanDuration, ProgressBar, ProgressStyle};

use super::output::draws_progress;

/// How often a line is printed where no bar can be drawn.
const LINE_INTERVAL: Duration = Duration::from_secs(10);

/// Shows how far a copy has come, in bytes.
pub(super) struct Progress {
    doing: &'static str,
    bar: Option<ProgressBar>,
    lines: Mutex<Option<Lines>>,
}

/// When the first bytes came, and when the last line was printed.
struct Lines {
    started: Instant,
    last: Instant,
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
        Self {
            doing,
            bar,
            lines: Mutex::new(None),
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
        let lines = lines.get_or_insert_with(|| Lines {
            started: Instant::now(),
            last: Instant::now(),
        });
        if lines.last.elapsed() < LINE_INTERVAL {
            return;
        }
        lines.last = Instant::now();
        let seconds = lines.started.elapsed().as_secs().max(1);
        let rate = (done / seconds).max(1);
        let left = Duration::from_secs(total.saturating_sub(done) / rate);
        tracing::info!(
            "{}: {} of about {}, {}/s, {} left",
            self.doing,
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
