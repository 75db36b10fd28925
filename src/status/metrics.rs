//! What can be restored, as numbers for Prometheus.

use std::fmt::{self, Display};

use jiff::Timestamp;

use super::{ClusterStatus, Status, Window};
use crate::exposition::{Kind, Page, Seconds, since_epoch};

/// `status --metrics`.
pub struct Metrics<'a> {
    /// What is shown.
    pub status: &'a Status,
    /// When it was found out.
    pub at: Timestamp,
}

/// A number of a cluster; `None` where it is not known, which is no zero.
type Number = fn(&ClusterStatus) -> Option<String>;

/// Name, help, and where it comes from.
const NUMBERS: &[(&str, &str, Number)] = &[
    (
        "anywhen_seconds_at_risk",
        "How much work a loss of the server would take with it: the age of the newest restorable moment.",
        |cluster| cluster.seconds_at_risk.map(|seconds| seconds.to_string()),
    ),
    (
        "anywhen_holes",
        "Stretches of WAL that are missing, or cannot be used.",
        |cluster| Some(cluster.holes.len().to_string()),
    ),
    (
        "anywhen_damaged_wal",
        "Places where WAL is stored that cannot be read, and ends a window.",
        |cluster| Some(cluster.damaged.len().to_string()),
    ),
    ("anywhen_backups", "Backups that can be read.", |cluster| {
        Some(cluster.backup_count.to_string())
    }),
    (
        "anywhen_unreadable_backups",
        "Backups that are there and cannot be read.",
        |cluster| Some(cluster.unreadable_backups.len().to_string()),
    ),
    (
        "anywhen_last_backup_timestamp_seconds",
        "From when on the newest backup can be restored.",
        |cluster| Some(since_epoch(cluster.last_backup_at?).to_string()),
    ),
    (
        "anywhen_tip_timestamp_seconds",
        "When the stream last confirmed where it was.",
        |cluster| Some(since_epoch(cluster.tip.as_ref()?.confirmed_at).to_string()),
    ),
    (
        "anywhen_wal_stored_bytes",
        "What the WAL takes in the repository.",
        |cluster| Some(cluster.stored.wal_bytes.to_string()),
    ),
    (
        "anywhen_backups_stored_bytes",
        "What the backups take in the repository.",
        |cluster| Some(cluster.stored.backup_bytes.to_string()),
    ),
];

impl Display for Metrics<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut page = Page::new(f, &[]);
        page.only(
            "anywhen_status_timestamp_seconds",
            Kind::Gauge,
            "When this was found out.",
            Some(since_epoch(self.at)),
        )?;
        self.windows(&mut page)?;
        for (name, help, number) in NUMBERS {
            page.family(name, Kind::Gauge, help)?;
            for cluster in &self.status.clusters {
                if let Some(value) = number(cluster) {
                    page.sample(name, &of(cluster), value)?;
                }
            }
        }
        let name = "anywhen_repository_reachable";
        page.family(name, Kind::Gauge, "1 where the repository could be asked.")?;
        for cluster in &self.status.clusters {
            for repository in &cluster.repositories {
                let [cluster, system] = of(cluster);
                let labels = [cluster, system, ("repository", repository.name.as_str())];
                page.sample(name, &labels, u8::from(repository.reachable))?;
            }
        }
        Ok(())
    }
}

impl Metrics<'_> {
    /// Each window's ends: several of one timeline are told apart by where they begin.
    fn windows(&self, page: &mut Page<'_, '_>) -> fmt::Result {
        type End = fn(&Window) -> Seconds;
        let ends: [(&str, &str, End); 2] = [
            (
                "anywhen_window_earliest_timestamp_seconds",
                "The first moment of a range that can be restored.",
                |window| since_epoch(window.earliest),
            ),
            (
                "anywhen_window_latest_timestamp_seconds",
                "The last moment of a range that can be restored.",
                |window| since_epoch(window.latest),
            ),
        ];
        for (name, help, end) in ends {
            page.family(name, Kind::Gauge, help)?;
            for cluster in &self.status.clusters {
                for window in cluster
                    .windows
                    .iter()
                    .filter(|one| is_furthest(one, cluster))
                {
                    let (timeline, begins) =
                        (window.timeline.to_string(), window.earliest_lsn.to_string());
                    let [cluster, system] = of(cluster);
                    let labels = [
                        cluster,
                        system,
                        ("timeline", timeline.as_str()),
                        ("earliest_lsn", begins.as_str()),
                    ];
                    page.sample(name, &labels, end(window))?;
                }
            }
        }
        Ok(())
    }
}

/// Whether no other window that begins there reaches further: where a fork could not be passed, two branches
/// begin alike.
fn is_furthest(window: &Window, cluster: &ClusterStatus) -> bool {
    let begins =
        |one: &&Window| one.timeline == window.timeline && one.earliest_lsn == window.earliest_lsn;
    let alike = cluster.windows.iter().filter(begins);
    let furthest = alike.max_by_key(|one| one.latest_lsn);
    furthest.is_some_and(|furthest| std::ptr::eq(furthest, window))
}

/// What tells a cluster's system from every other one.
fn of(cluster: &ClusterStatus) -> [(&str, &str); 2] {
    [
        ("cluster", &cluster.name),
        ("system_id", &cluster.system_id),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_is_in_the_documents() {
        let status = Status {
            schema: 1,
            clusters: Vec::new(),
        };
        let at = Timestamp::UNIX_EPOCH;
        let page = Metrics {
            status: &status,
            at,
        };
        let page = page.to_string();
        let shown = page.lines().filter_map(|line| {
            let family = line.strip_prefix("# TYPE ")?;
            family.split(' ').next()
        });
        let documents = include_str!("../../docs/metrics.md");
        let (_, documents) = documents.split_once("| number | what |").unwrap();
        let (table, _) = documents.split_once("```").unwrap();
        let told = table.lines().filter_map(|line| {
            let (name, _) = line.strip_prefix("| `")?.split_once('`')?;
            Some(name)
        });
        let shown: Vec<&str> = shown.collect();
        assert_eq!(told.collect::<Vec<_>>(), shown);
        assert!(
            page.contains("\nanywhen_status_timestamp_seconds 0.000000\n"),
            "{page}"
        );
    }
}
