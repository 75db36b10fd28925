//! The settings of a restored server: what stands in its `postgresql.auto.conf`. Pure.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::PathBuf;

use wal::{Lsn, TimelineId};

use super::target::TargetAction;
use crate::repository::layout::ClusterName;

/// Variables with their values, which may be secrets: only the names are ever shown.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Environment(pub Vec<(OsString, OsString)>);

impl std::fmt::Debug for Environment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set()
            .entries(self.0.iter().map(|(name, _)| name))
            .finish()
    }
}

/// How the restored server calls this program for WAL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RestoreCommand {
    /// This program's full path.
    pub program: PathBuf,
    /// The configuration file, where one is in use.
    pub config: Option<PathBuf>,
    /// The repository's address, where it was given without a file.
    pub repo: Option<String>,
    /// Which of the file's repositories, where not all of them are used.
    pub repositories: Vec<String>,
    /// What reads encrypted objects, where it was given without a file.
    pub identity_file: Option<PathBuf>,
    /// The cluster.
    pub cluster: ClusterName,
    /// Variables of this process with which it reached the repository, and the restored server
    /// must; none where the repository is a folder and no identity was handed over.
    pub environment: Environment,
}

impl RestoreCommand {
    /// The names of the variables that the restored server must be started with.
    pub(super) fn environment_names(&self) -> Vec<String> {
        let names = self.environment.0.iter();
        names
            .map(|(name, _)| name.to_string_lossy().into_owned())
            .collect()
    }

    /// The words of the command, without those that PostgreSQL puts in.
    fn words(&self, fetching: Fetching) -> Vec<OsString> {
        let mut words = vec![self.program.clone().into_os_string()];
        if let Some(config) = &self.config {
            words.extend(["--config".into(), config.clone().into_os_string()]);
        }
        if let Some(repo) = &self.repo {
            words.extend(["--repo".into(), repo.into()]);
        }
        if !self.repositories.is_empty() {
            words.extend(["--repository".into(), self.repositories.join(",").into()]);
        }
        if let Some(identity) = &self.identity_file {
            words.extend(["--identity-file".into(), identity.clone().into_os_string()]);
        }
        words.extend(["--cluster".into(), self.cluster.as_str().into()]);
        words.extend(["--system-id".into(), fetching.system_id.to_string().into()]);
        words.push("wal-fetch".into());
        if let Some(timeline) = fetching.timeline {
            words.extend(["--timeline".into(), timeline.to_string().into()]);
        }
        if let Some(until) = fetching.until {
            words.extend(["--until".into(), until.to_string().into()]);
        }
        words
    }

    /// The command for a shell, with `file` and `path` in the places of `%f` and `%p`.
    pub(super) fn shell_line(&self, fetching: Fetching, file: &str, path: &str) -> OsString {
        let mut line: Vec<u8> = Vec::new();
        let words = self.words(fetching);
        let words = words.iter().map(OsString::as_os_str);
        for word in words.chain([OsStr::new(file), OsStr::new(path)]) {
            if !line.is_empty() {
                line.push(b' ');
            }
            line.extend(shell_quoted(word.as_bytes()));
        }
        OsString::from_vec(line)
    }

    /// The value of `restore_command`: as [`Self::shell_line`], where a `%` that is not
    /// PostgreSQL's is doubled.
    fn setting(&self, fetching: Fetching) -> Vec<u8> {
        let mut line: Vec<u8> = Vec::new();
        for word in self.words(fetching) {
            for byte in shell_quoted(word.as_bytes()) {
                line.push(byte);
                if byte == b'%' {
                    line.push(byte);
                }
            }
            line.push(b' ');
        }
        line.extend(b"%f %p");
        line
    }
}

/// What WAL a recovery asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Fetching {
    pub(super) system_id: u64,
    /// The branch; `None` is the newest timeline, for a standby that follows.
    pub(super) timeline: Option<TimelineId>,
    /// The end of the last record wanted; `None` for a standby that follows.
    pub(super) until: Option<Lsn>,
}

/// A word as a shell takes it: as it is where it is harmless, else within single quotes.
fn shell_quoted(word: &[u8]) -> Vec<u8> {
    let harmless = |byte: &u8| byte.is_ascii_alphanumeric() || b"_-./:=@,+".contains(byte);
    if !word.is_empty() && word.iter().all(harmless) {
        return word.to_vec();
    }
    let mut quoted = vec![b'\''];
    for byte in word {
        match byte {
            b'\'' => quoted.extend(br"'\''"),
            byte => quoted.push(*byte),
        }
    }
    quoted.push(b'\'');
    quoted
}

/// A value as PostgreSQL's configuration files take it (`guc-file.l`, `GUC_scanstr`).
fn conf_quoted(value: &[u8]) -> Vec<u8> {
    let mut quoted = vec![b'\''];
    for byte in value {
        match byte {
            b'\'' => quoted.extend(b"''"),
            b'\\' => quoted.extend(br"\\"),
            b'\n' => quoted.extend(br"\n"),
            b'\r' => quoted.extend(br"\r"),
            byte => quoted.push(*byte),
        }
    }
    quoted.push(b'\'');
    quoted
}

/// Where recovery stops.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopAt {
    /// At the backup's end.
    Immediate,
    /// After the record that starts here.
    After(Lsn),
    /// Never: a standby follows.
    Never,
}

/// Everything that the settings of a restored server are made from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RecoverySettings {
    pub(super) restore_command: RestoreCommand,
    /// Its timeline is `recovery_target_timeline` too.
    pub(super) fetching: Fetching,
    pub(super) stop: StopAt,
    pub(super) action: TargetAction,
    pub(super) standby: bool,
    /// How a standby reaches its primary, where that was said.
    pub(super) primary_conninfo: Option<String>,
    /// Over a cluster: the lines by which it followed its primary, which take the place of the source's.
    pub(super) follows: Option<Vec<u8>>,
    pub(super) archive_mode_preserve: bool,
    /// Tablespaces inside of the data directory are there, or replay makes some.
    pub(super) in_place_tablespaces: bool,
    /// Settings that would be too low for a recovery, with what they must be at least.
    pub(super) raised: Vec<(&'static str, i32)>,
}

/// Stands above our settings.
const HEADING: &str = "# written by anywhen restore";
/// Settings of recovery: those that a backup brings along are another recovery's.
const OF_RECOVERY: [&str; 12] = [
    "archive_cleanup_command",
    "recovery_end_command",
    "recovery_min_apply_delay",
    "recovery_target",
    "recovery_target_action",
    "recovery_target_inclusive",
    "recovery_target_lsn",
    "recovery_target_name",
    "recovery_target_time",
    "recovery_target_timeline",
    "recovery_target_xid",
    "restore_command",
];
/// Settings by which a server follows another.
const OF_STANDBYS: [&str; 3] = [
    "primary_conninfo",
    "primary_slot_name",
    "promote_trigger_file",
];

impl RecoverySettings {
    /// The settings in the order in which they must stand.
    pub(super) fn list(&self) -> Vec<(&'static str, Vec<u8>)> {
        let text = |text: &str| text.as_bytes().to_vec();
        let command = self.restore_command.setting(self.fetching);
        let mut list = vec![("restore_command", command)];
        // postgresql.conf may name another target, and two are an error. The empty ones stand
        // first: each forgets the target that was read before it (xlogrecovery.c,
        // assign_recovery_target_*)
        list.extend(
            [
                "recovery_target",
                "recovery_target_name",
                "recovery_target_time",
                "recovery_target_xid",
                "recovery_target_lsn",
            ]
            .into_iter()
            .filter(|name| Some(*name) != self.target_setting())
            .map(|name| (name, Vec::new())),
        );
        match self.stop {
            StopAt::Immediate => list.push(("recovery_target", text("immediate"))),
            StopAt::After(lsn) => {
                list.push(("recovery_target_inclusive", text("on")));
                list.push(("recovery_target_lsn", text(&lsn.to_string())));
            }
            StopAt::Never => {}
        }
        let timeline = self
            .fetching
            .timeline
            .map_or_else(|| "latest".to_owned(), |id| id.to_string());
        list.push(("recovery_target_timeline", timeline.into_bytes()));
        list.push(("recovery_target_action", text(self.action.word())));
        list.push(("recovery_end_command", Vec::new()));
        if self.action == TargetAction::Pause && self.stop != StopAt::Never {
            // without it a server shuts down where it should pause (xlogrecovery.c,
            // validateRecoveryParameters)
            list.push(("hot_standby", text("on")));
        }
        if !self.standby {
            list.push(("archive_cleanup_command", Vec::new()));
            list.push(("recovery_min_apply_delay", text("0")));
            list.push(("primary_conninfo", Vec::new()));
            list.push(("primary_slot_name", Vec::new()));
            // its subscriptions are the source's: both would use the same slots of the publisher
            list.push(("max_logical_replication_workers", text("0")));
        } else if let Some(conninfo) = &self.primary_conninfo {
            list.push(("primary_conninfo", text(conninfo)));
        }
        if !self.archive_mode_preserve {
            list.push(("archive_mode", text("off")));
        }
        if self.in_place_tablespaces {
            // without it recovery ends with PANIC at the first sight of one (xlogrecovery.c,
            // CheckTablespaceDirectory)
            list.push(("allow_in_place_tablespaces", text("on")));
        }
        list.push(("synchronous_standby_names", Vec::new()));
        list.extend(
            self.raised
                .iter()
                .map(|(name, value)| (*name, value.to_string().into_bytes())),
        );
        list
    }

    fn target_setting(&self) -> Option<&'static str> {
        match self.stop {
            StopAt::Immediate => Some("recovery_target"),
            StopAt::After(_) => Some("recovery_target_lsn"),
            StopAt::Never => None,
        }
    }

    /// The new `postgresql.auto.conf`: what the backup's one says, without what would disturb this
    /// recovery, and ours below.
    pub(super) fn auto_conf(&self, before: &[u8]) -> Vec<u8> {
        let ours = self.list();
        let names = |name: &str| {
            let mut ours = ours.iter();
            ours.any(|(other, _)| other.eq_ignore_ascii_case(name))
        };
        let replaced = |name: &str| {
            let is = |other: &&str| other.eq_ignore_ascii_case(name);
            let of_standby = OF_STANDBYS.iter().any(is);
            names(name)
                || (OF_RECOVERY.iter().any(is) && !self.keeps(name))
                || (of_standby && (!self.standby || self.follows.is_some()))
        };
        let mut out: Vec<u8> = Vec::new();
        for line in before.split_inclusive(|byte| *byte == b'\n') {
            let is_ours = line.trim_ascii_end() == HEADING.as_bytes();
            if !is_ours && !setting_name(line).is_some_and(|name| replaced(&name)) {
                out.extend_from_slice(line);
            }
        }
        if out.last().is_some_and(|last| *last != b'\n') {
            out.push(b'\n');
        }
        if let (true, Some(follows)) = (self.standby, &self.follows) {
            let lines = follows.split_inclusive(|byte| *byte == b'\n');
            let is_wanted = |line: &&[u8]| setting_name(line).is_some_and(|name| !names(&name));
            out.extend(lines.filter(is_wanted).flatten());
        }
        out.extend(HEADING.as_bytes());
        out.push(b'\n');
        for (name, value) in ours {
            out.extend(name.as_bytes());
            out.extend(b" = ");
            out.extend(conf_quoted(&value));
            out.push(b'\n');
        }
        out
    }

    /// A standby keeps cleaning and lagging as it did.
    fn keeps(&self, name: &str) -> bool {
        self.standby
            && ["archive_cleanup_command", "recovery_min_apply_delay"]
                .iter()
                .any(|kept| kept.eq_ignore_ascii_case(name))
    }
}

/// The lines of a configuration file by which a server follows another, each with its end: of each setting the
/// last one, which counts, if it says anything.
pub(super) fn lines_that_follow(file: &[u8]) -> Vec<u8> {
    let mut follows = Vec::new();
    for name in ["primary_conninfo", "primary_slot_name"] {
        if let Some(line) = last_line(file, name).filter(|line| !is_empty(line)) {
            follows.extend_from_slice(line);
            follows.push(b'\n');
        }
    }
    follows
}

/// The line of a configuration file that counts for `name`, without its end.
fn last_line<'a>(file: &'a [u8], name: &str) -> Option<&'a [u8]> {
    let mut lines = file.rsplit(|byte| *byte == b'\n');
    lines.find(|line| setting_name(line).is_some_and(|found| found.eq_ignore_ascii_case(name)))
}

/// Whether a line sets its name to nothing.
fn is_empty(line: &[u8]) -> bool {
    value_in(line)
        .strip_prefix("''")
        .is_some_and(|rest| !rest.starts_with('\''))
}

/// What stands behind the name in a line, quotes and comments with it.
fn value_in(line: &[u8]) -> String {
    let line = String::from_utf8_lossy(line);
    let name = |c: char| c.is_ascii_alphanumeric() || "_.$".contains(c);
    let value = line.trim_start().trim_start_matches(name).trim_start();
    let value = value.strip_prefix('=').unwrap_or(value).trim_start();
    value.to_owned()
}

/// What a configuration file sets a whole number to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Number {
    Unset,
    Of(i32),
    /// Something that servers read in other ways: a hexadecimal or octal number, or a fraction.
    Unclear,
}

/// The whole number that a configuration file sets `name` to.
pub(super) fn number_of(file: &[u8], name: &str) -> Number {
    let Some(line) = last_line(file, name) else {
        return Number::Unset;
    };
    let value = value_in(line);
    let value = value.split('#').next().unwrap_or_default().trim();
    let value = value.trim_matches('\'').trim();
    let is_plain = value == "0" || !value.starts_with('0');
    match value.parse() {
        Ok(number) if is_plain => Number::Of(number),
        _ => Number::Unclear,
    }
}

/// Whether a configuration file says that others are read too.
pub(super) fn has_includes(file: &[u8]) -> bool {
    ["include", "include_dir", "include_if_exists"]
        .iter()
        .any(|name| last_line(file, name).is_some())
}

/// The name that a line of a configuration file sets.
fn setting_name(line: &[u8]) -> Option<String> {
    let line = String::from_utf8_lossy(line);
    let line = line.trim_start();
    let end = line.find(|c: char| !(c.is_ascii_alphanumeric() || "_.$".contains(c)))?;
    let name = line.get(..end)?;
    (!name.is_empty()).then(|| name.to_owned())
}

/// Whether a configuration file sets `name` to something.
pub(super) fn sets(file: &[u8], name: &str) -> bool {
    last_line(file, name).is_some_and(|line| !is_empty(line))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(program: &[u8], stop: StopAt) -> RecoverySettings {
        RecoverySettings {
            restore_command: RestoreCommand {
                program: PathBuf::from(OsStr::from_bytes(program)),
                config: None,
                environment: Environment::default(),
                repositories: Vec::new(),
                identity_file: None,
                repo: Some("file:///backups".to_owned()),
                cluster: "main".parse().unwrap(),
            },
            fetching: Fetching {
                system_id: 7,
                timeline: TimelineId::new(3),
                until: Some(Lsn::new(0x20)),
            },
            stop,
            action: TargetAction::Pause,
            standby: false,
            primary_conninfo: None,
            follows: None,
            archive_mode_preserve: false,
            in_place_tablespaces: false,
            raised: Vec::new(),
        }
    }

    const FOLLOWS: Fetching = Fetching {
        system_id: 7,
        timeline: None,
        until: None,
    };

    fn value_of<'a>(list: &'a [(&str, Vec<u8>)], name: &str) -> &'a [u8] {
        &list
            .iter()
            .rev()
            .find(|(other, _)| *other == name)
            .unwrap()
            .1
    }

    #[test]
    fn the_last_number_in_a_file_counts() {
        let file = b"max_connections = 20\n#max_connections = 7\nMAX_connections='300' # more\n\
                     max_wal_senders 5\nmax_worker_processes = 010\n";
        for (name, number) in [
            ("max_connections", Number::Of(300)),
            ("max_wal_senders", Number::Of(5)),
            ("max_worker_processes", Number::Unclear),
            ("max_prepared_transactions", Number::Unset),
        ] {
            assert_eq!(number_of(file, name), number, "{name}");
        }
        assert!(!has_includes(file));
        assert!(has_includes(b"a = 1\n  Include_Dir 'conf.d'\n"));
    }

    #[test]
    fn a_plain_path_needs_no_quotes() {
        let list = settings(b"/usr/bin/anywhen", StopAt::Immediate).list();
        assert_eq!(
            str::from_utf8(value_of(&list, "restore_command")).unwrap(),
            "/usr/bin/anywhen --repo file:///backups --cluster main --system-id 7 wal-fetch \
             --timeline 3 --until 0/20 %f %p"
        );
    }

    /// A path with a quote in it would otherwise run something else as the server's user, and one
    /// with a percent sign would name another file.
    #[test]
    fn hostile_paths_survive_shell_configuration_file_and_percent_signs() {
        let path = "/o'brien & sons/100%/back\\slash/$(date)/größe\n2/anywhen";
        let settings = settings(path.as_bytes(), StopAt::Immediate);
        let conf = settings.auto_conf(b"");
        let line = conf
            .split(|b| *b == b'\n')
            .find(|line| line.starts_with(b"restore_command"));
        let quoted = line.unwrap().strip_prefix(b"restore_command = ").unwrap();
        let value = scan_conf_string(quoted);
        // PostgreSQL's own substitution
        let shell = String::from_utf8(value)
            .unwrap()
            .replace("%f", "F")
            .replace("%p", "P");
        let shell = shell.replace("%%", "%");
        let output = std::process::Command::new("sh")
            .args(["-c", &format!("printf '%s|' {shell}")])
            .output()
            .unwrap();
        let words = String::from_utf8(output.stdout).unwrap();
        assert_eq!(words.split('|').next(), Some(path));
        assert!(words.ends_with("|F|P|"), "{words}");
        let direct = settings
            .restore_command
            .shell_line(settings.fetching, "F", "P");
        assert!(direct.to_str().unwrap().contains("100%/"));
    }

    /// `guc-file.l`: what stands between the quotes, with its escapes resolved.
    fn scan_conf_string(quoted: &[u8]) -> Vec<u8> {
        let inner = quoted
            .strip_prefix(b"'")
            .unwrap()
            .strip_suffix(b"'")
            .unwrap();
        let mut value = Vec::new();
        let mut rest = inner.iter();
        while let Some(byte) = rest.next() {
            match byte {
                b'\'' => {
                    assert_eq!(rest.next(), Some(&b'\''));
                    value.push(b'\'');
                }
                b'\\' => match rest.next().unwrap() {
                    b'n' => value.push(b'\n'),
                    b'r' => value.push(b'\r'),
                    other => value.push(*other),
                },
                other => value.push(*other),
            }
        }
        value
    }

    /// Two targets stop a server from starting, and an empty one forgets the one before it.
    #[test]
    fn the_one_target_stands_behind_the_empty_ones() {
        let list = settings(b"/a", StopAt::After(Lsn::new(0x16))).list();
        let at = |name: &str| list.iter().position(|(other, _)| *other == name).unwrap();
        let target = at("recovery_target_lsn");
        assert_eq!(list[target].1, b"0/16");
        for other in [
            "recovery_target",
            "recovery_target_name",
            "recovery_target_time",
            "recovery_target_xid",
        ] {
            assert!(
                list[at(other)].1.is_empty() && at(other) < target,
                "{other}"
            );
        }
        let names: Vec<_> = list.iter().map(|(name, _)| *name).collect();
        let mut unique = names.clone();
        unique.sort_unstable();
        unique.dedup();
        assert_eq!(unique.len(), names.len(), "{names:?}");
    }

    #[test]
    fn what_another_recovery_left_is_dropped_and_the_rest_is_kept() {
        let before = b"# kept comment\nwork_mem = '64MB'\nRecovery_Target_Time = '2020-01-01'\n\
            primary_conninfo = 'host=live'\nrestore_command = 'cp'\narchive_mode = 'on'\n\
            promote_trigger_file='x'\nmy.extension = 'a'";
        let conf = settings(b"/a", StopAt::Immediate).auto_conf(before);
        let conf = String::from_utf8(conf).unwrap();
        assert!(
            conf.starts_with("# kept comment\nwork_mem = '64MB'\nmy.extension = 'a'\n"),
            "{conf}"
        );
        for gone in [
            "2020-01-01",
            "host=live",
            "'cp'",
            "promote_trigger_file",
            "'on'\nmy",
        ] {
            assert!(!conf.contains(gone), "{gone}: {conf}");
        }
        for ours in [
            "archive_mode = 'off'\n",
            "primary_conninfo = ''\n",
            "synchronous_standby_names = ''\n",
            "max_logical_replication_workers = '0'\n",
            "recovery_target = 'immediate'\n",
            "recovery_target_timeline = '3'\n",
        ] {
            assert!(conf.contains(ours), "{ours}: {conf}");
        }
        // a second restore from a backup of a restored server changes nothing
        let again = settings(b"/a", StopAt::Immediate).auto_conf(conf.as_bytes());
        assert_eq!(
            String::from_utf8(again)
                .unwrap()
                .matches("restore_command")
                .count(),
            1
        );
    }

    #[test]
    fn a_standby_keeps_the_primary_that_it_follows() {
        let standby = RecoverySettings {
            standby: true,
            fetching: FOLLOWS,
            ..settings(b"/a", StopAt::Never)
        };
        let conf = standby.auto_conf(b"primary_conninfo = 'host=live'\nprimary_slot_name = 's'\n");
        let conf = String::from_utf8(conf).unwrap();
        assert!(conf.contains("primary_conninfo = 'host=live'"), "{conf}");
        assert!(conf.contains("primary_slot_name = 's'"), "{conf}");
        assert!(
            conf.contains("recovery_target_timeline = 'latest'"),
            "{conf}"
        );
        assert!(!conf.contains("--timeline"), "{conf}");
        assert!(!conf.contains("max_logical_replication_workers"), "{conf}");
    }

    /// The backup may be the primary's, which follows nobody, or of a standby of another one.
    #[test]
    fn a_standby_that_is_restored_over_itself_follows_as_it_did_unless_told_otherwise() {
        let before = b"work_mem = '1MB'\nPrimary_ConnInfo 'host=live'\nprimary_slot_name = 'mine'";
        let follows = lines_that_follow(before);
        assert_eq!(
            str::from_utf8(&follows).unwrap(),
            "Primary_ConnInfo 'host=live'\nprimary_slot_name = 'mine'\n"
        );
        let standby = RecoverySettings {
            standby: true,
            follows: Some(follows),
            fetching: FOLLOWS,
            ..settings(b"/a", StopAt::Never)
        };
        let of_backup = b"primary_conninfo = 'host=other'\nprimary_slot_name = 'theirs'\n";
        let conf = String::from_utf8(standby.auto_conf(of_backup)).unwrap();
        assert!(conf.contains("Primary_ConnInfo 'host=live'\n"), "{conf}");
        assert!(conf.contains("primary_slot_name = 'mine'\n"), "{conf}");
        assert!(
            !conf.contains("other") && !conf.contains("theirs"),
            "{conf}"
        );

        let told = RecoverySettings {
            primary_conninfo: Some("host='x y'".to_owned()),
            ..standby
        };
        let conf = String::from_utf8(told.auto_conf(of_backup)).unwrap();
        assert!(
            conf.contains("primary_conninfo = 'host=''x y'''\n"),
            "{conf}"
        );
        assert!(conf.contains("primary_slot_name = 'mine'"), "{conf}");
        for gone in ["live", "theirs", "other"] {
            assert!(!conf.contains(gone), "{gone}: {conf}");
        }
        assert!(lines_that_follow(b"primary_conninfo = 'x'\nprimary_conninfo ''\n").is_empty());
    }

    #[test]
    fn finds_settings_but_not_comments() {
        assert!(sets(b"a = 1\n  Data_Directory '/x'\n", "data_directory"));
        assert!(!sets(b"#data_directory = 'x'\n", "data_directory"));
    }
}
