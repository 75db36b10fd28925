//! Settings that a server in recovery must not have lower than its primary had them.

use wal::Parameters;

use super::settings::{Number, has_includes, number_of};

/// What the restored directory configures, as far as that can be read.
pub(super) struct Configured<'a> {
    /// `postgresql.auto.conf`, which counts before all others.
    pub(super) auto: &'a [u8],
    /// `postgresql.conf`; `None` where it is elsewhere.
    pub(super) conf: Option<&'a [u8]>,
    /// The server's major version.
    pub(super) major: u32,
}

/// Settings that the server in recovery would have lower than the primary had them when it wrote the backup's
/// `pg_control`, or `later`: a hot standby refuses to go on. A primary may have been given them on its command
/// line, or have read its files before they were changed.
///
/// What is configured in files that are not here is not known, and may be more: only what the primary raised
/// behind the backup is, since they are as old as that.
pub(super) fn raised(
    at_backup: Parameters,
    later: Parameters,
    configured: &Configured<'_>,
) -> Vec<(&'static str, i32)> {
    let needed = at_backup.max(later).list();
    let known = configured.conf.filter(|conf| !has_includes(conf));
    let both = needed.into_iter().zip(at_backup.list());
    let is_too_low = |((name, needed), (_, before)): &((&'static str, i32), (&str, i32))| {
        let set = match number_of(configured.auto, name) {
            Number::Unset => known.map_or(Number::Unset, |conf| number_of(conf, name)),
            set => set,
        };
        match set {
            Number::Of(set) => set < *needed,
            Number::Unclear => true,
            Number::Unset if known.is_some() => default_of(name, configured.major) < *needed,
            Number::Unset => before < needed,
        }
    };
    both.filter(is_too_low).map(|(needed, _)| needed).collect()
}

/// What is said of settings that were raised; nothing where none was.
pub(super) fn raised_note(raised: &[(&'static str, i32)]) -> Option<String> {
    let list = raised
        .iter()
        .map(|(name, value)| format!("{name} = {value}"));
    let list = list.collect::<Vec<_>>().join(", ");
    (!raised.is_empty()).then(|| {
        format!(
            "what is configured is less than the primary had: postgresql.auto.conf has {list} now, which counts \
             before other files"
        )
    })
}

/// What a server has where no file says otherwise (`postgresql.conf.sample`).
fn default_of(name: &str, major: u32) -> i32 {
    match name {
        "max_connections" => 100,
        "max_worker_processes" => 8,
        "max_wal_senders" => 10,
        "max_locks_per_transaction" if major >= 19 => 128,
        "max_locks_per_transaction" => 64,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn having(max_connections: i32, max_locks_per_transaction: i32) -> Parameters {
        Parameters {
            max_connections,
            max_worker_processes: 8,
            max_wal_senders: 10,
            max_prepared_transactions: 0,
            max_locks_per_transaction,
        }
    }

    #[test]
    fn only_what_is_known_to_be_too_low_is_raised() {
        let none = Parameters::default();
        let to = |value| vec![("max_connections", value)];
        for (auto, conf, later, expected) in [
            ("", Some("max_connections = 200"), none, vec![]),
            ("", Some("max_connections = 300"), none, vec![]),
            ("", Some("max_connections = 50"), none, to(200)),
            ("", Some(""), none, to(200)),
            (
                "max_connections = 50",
                Some("max_connections = 500"),
                none,
                to(200),
            ),
            (
                "max_connections = 0xFFF",
                Some("max_connections = 500"),
                none,
                to(200),
            ),
            (
                "max_connections = 500",
                Some("max_connections = 50"),
                none,
                vec![],
            ),
            ("", Some("max_connections = 200"), having(250, 0), to(250)),
            // what stands elsewhere may be more
            ("", None, none, vec![]),
            ("", None, having(250, 0), to(250)),
            ("", Some("include_dir 'conf.d'"), none, vec![]),
            ("", Some("include_dir 'conf.d'"), having(250, 0), to(250)),
            ("max_connections = 50", None, none, to(200)),
        ] {
            let configured = Configured {
                auto: auto.as_bytes(),
                conf: conf.map(str::as_bytes),
                major: 18,
            };
            let found = raised(having(200, 64), later, &configured);
            assert_eq!(found, expected, "{auto:?} {conf:?} {later:?}");
        }
    }

    #[test]
    fn defaults_are_those_of_the_major() {
        for (major, raised_to) in [(18, vec![("max_locks_per_transaction", 128)]), (19, vec![])] {
            let configured = Configured {
                auto: b"",
                conf: Some(b""),
                major,
            };
            let found = raised(having(100, 128), Parameters::default(), &configured);
            assert_eq!(found, raised_to, "{major}");
        }
    }
}
