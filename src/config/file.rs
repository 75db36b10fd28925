//! The configuration file: its tables, read and checked.
//!
//! It may hold a password, or an identity where it does not belong: what is wrong is said by place
//! and name, and neither a line of it nor a value is ever shown.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Deserialize;
use toml::{Table, Value};

use super::{AcknowledgedBy, StoreSettings, parse_bytes, parse_duration};

/// A configuration file, as written.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct File {
    pub(super) state_dir: Option<PathBuf>,
    #[serde(default)]
    pub(super) repository: BTreeMap<String, RepositoryTable>,
    #[serde(default)]
    pub(super) cluster: BTreeMap<String, ClusterTable>,
}

// unknown keys are refused by `check_keys`: serde cannot do it beside `flatten`
#[derive(Debug, Clone, Deserialize)]
pub(super) struct RepositoryTable {
    pub(super) url: String,
    #[serde(default)]
    pub(super) compression: CompressionTable,
    #[serde(default)]
    pub(super) recipients: Vec<String>,
    pub(super) identity_file: Option<PathBuf>,
    #[serde(default)]
    pub(super) accept_plain: bool,
    #[serde(flatten)]
    pub(super) store: StoreSettings,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct CompressionTable {
    pub(super) wal: Option<String>,
    pub(super) backup: Option<String>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ClusterTable {
    pub(super) repositories: Option<Vec<String>>,
    #[serde(default)]
    pub(super) acknowledge: AcknowledgedBy,
    pub(super) connection: Option<String>,
    pub(super) flush_interval: Option<String>,
    pub(super) slot: Option<String>,
    pub(super) spool_dir: Option<PathBuf>,
    pub(super) spool_bytes_max: Option<String>,
    pub(super) metrics: Option<String>,
}

/// What a key holds.
#[derive(Debug, Clone, Copy)]
enum Wanted {
    Text,
    Texts,
    Switch,
    Number,
    Duration,
    Bytes,
    Acknowledge,
    Table,
}

type Keys = &'static [(&'static str, Wanted)];

const FILE_KEYS: Keys = &[
    ("state_dir", Wanted::Text),
    ("repository", Wanted::Table),
    ("cluster", Wanted::Table),
];
const REPOSITORY_KEYS: Keys = &[
    ("url", Wanted::Text),
    ("compression", Wanted::Table),
    ("recipients", Wanted::Texts),
    ("identity_file", Wanted::Text),
    ("accept_plain", Wanted::Switch),
    ("endpoint", Wanted::Text),
    ("region", Wanted::Text),
    ("path_style", Wanted::Switch),
    ("allow_http", Wanted::Switch),
    ("ca_file", Wanted::Text),
    ("profile", Wanted::Text),
    ("account", Wanted::Text),
    ("server_side_encryption", Wanted::Text),
    ("kms_key_id", Wanted::Text),
    ("bucket_key", Wanted::Switch),
    ("storage_class", Wanted::Text),
    ("concurrency", Wanted::Number),
    ("retry_for", Wanted::Duration),
];
const COMPRESSION_KEYS: Keys = &[("wal", Wanted::Text), ("backup", Wanted::Text)];
const CLUSTER_KEYS: Keys = &[
    ("repositories", Wanted::Texts),
    ("acknowledge", Wanted::Acknowledge),
    ("connection", Wanted::Text),
    ("flush_interval", Wanted::Duration),
    ("slot", Wanted::Text),
    ("spool_dir", Wanted::Text),
    ("spool_bytes_max", Wanted::Bytes),
    ("metrics", Wanted::Text),
];

impl Wanted {
    fn fits(self, value: &Value) -> bool {
        match self {
            Self::Text => value.is_str(),
            Self::Texts => {
                let list = value.as_array();
                list.is_some_and(|list| list.iter().all(Value::is_str))
            }
            Self::Switch => value.is_bool(),
            Self::Number => {
                let number = value.as_integer();
                number.is_some_and(|number| usize::try_from(number).is_ok())
            }
            Self::Duration => value
                .as_str()
                .is_some_and(|text| parse_duration(text).is_ok()),
            Self::Bytes => value.as_str().is_some_and(|text| parse_bytes(text).is_ok()),
            Self::Acknowledge => matches!(value.as_str(), Some("all" | "any" | "spool")),
            Self::Table => value.is_table(),
        }
    }

    fn called(self) -> &'static str {
        match self {
            Self::Text => "a text in quotes",
            Self::Texts => "a list of texts in quotes",
            Self::Switch => "true or false",
            Self::Number => "a whole number",
            Self::Duration => "a length of time, such as \"1s\" or \"250ms\"",
            Self::Bytes => "a size, such as \"10GB\" or \"512MB\"",
            Self::Acknowledge => "\"all\", \"any\" or \"spool\"",
            Self::Table => "a table",
        }
    }
}

/// Reads the text of a file. The error is a sentence that holds nothing secret.
pub(super) fn parse(text: &str) -> Result<File, String> {
    let table: Table = toml::from_str(text).map_err(|error| unparsed(text, &error))?;
    check_keys(&table)?;
    table
        .try_into()
        .map_err(|_may_hold_a_value: toml::de::Error| "a setting has the wrong type".to_owned())
}

fn unparsed(text: &str, error: &toml::de::Error) -> String {
    let before = error.span().and_then(|span| text.get(..span.start));
    let Some(before) = before else {
        return error.message().to_owned();
    };
    let line = before.matches('\n').count().saturating_add(1);
    let column = before.rsplit('\n').next().unwrap_or_default();
    let column = column.chars().count().saturating_add(1);
    format!("line {line}, column {column}: {}", error.message())
}

/// Refuses keys that do not exist, naming the nearest one that does, and values of a wrong type.
fn check_keys(table: &Table) -> Result<(), String> {
    check_table(table, FILE_KEYS, "")?;
    for (section, keys) in [("repository", REPOSITORY_KEYS), ("cluster", CLUSTER_KEYS)] {
        let Some(Value::Table(named)) = table.get(section) else {
            continue;
        };
        for (name, value) in named {
            let Value::Table(inner) = value else {
                return Err(format!("[{section}.{name}] is not a table"));
            };
            check_table(inner, keys, &format!("{section}.{name}."))?;
            if let Some(Value::Table(compression)) = inner.get("compression") {
                let at = format!("{section}.{name}.compression.");
                check_table(compression, COMPRESSION_KEYS, &at)?;
            }
            if section == "repository" && !inner.contains_key("url") {
                return Err(format!("repository.{name} has no url"));
            }
        }
    }
    Ok(())
}

fn check_table(table: &Table, known: Keys, at: &str) -> Result<(), String> {
    for (key, value) in table {
        let Some((_, wanted)) = known.iter().find(|(name, _)| key == name) else {
            let nearest = known
                .iter()
                .min_by_key(|(name, _)| strsim::levenshtein(key, name));
            let nearest = nearest.map_or("", |(name, _)| name);
            return Err(format!(
                "unknown key {at}{key}; did you mean {at}{nearest}?"
            ));
        };
        if !wanted.fits(value) {
            return Err(format!("{at}{key} is not {}", wanted.called()));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_is_said_without_the_line_or_the_value() {
        // such messages go to logs, and to whoever is asked for help
        for (text, said) in [
            ("[cluster.a]\nconnection = SECRET", "line 2, column 14"),
            ("[cluster.a]\nconnection = \"password=SECRET", "line 2"),
            ("AGE-SECRET-KEY-1SECRET", "line 1"),
            ("\n\nAGE-SECRET-KEY-1SECRET\n", "line 3"),
            ("[repository.a]\nurl = \"s3://SECRET@b\" SECRET", "line 2"),
            ("[repository.a]\nurl = 'x'\nurl = 'SECRET'", "line 3"),
            (
                "[cluster.a]\nconnection = [\"SECRET\"]",
                "cluster.a.connection is not a text",
            ),
            (
                "[cluster.a]\nconnection = { password = \"SECRET\" }",
                "is not a text",
            ),
            (
                "[cluster.a]\nacknowledge = \"SECRET\"",
                "cluster.a.acknowledge is not \"all\"",
            ),
            (
                "[cluster.a]\nflush_interval = \"SECRET\"",
                "cluster.a.flush_interval is not a length",
            ),
            (
                "[cluster.a]\nspool_bytes_max = \"SECRET\"",
                "cluster.a.spool_bytes_max is not a size",
            ),
            ("[cluster]\na = \"SECRET\"", "[cluster.a] is not a table"),
            ("cluster = \"SECRET\"", "cluster is not a table"),
            (
                "[repository.a]\nrecipients = \"SECRET\"",
                "repository.a.recipients is not a list",
            ),
            (
                "[repository.a]\nrecipients = [\"x\", 1]",
                "repository.a.recipients is not a list",
            ),
            (
                "[repository.a]\nretry_for = \"SECRET\"",
                "repository.a.retry_for is not a length",
            ),
            (
                "[repository.a]\nconcurrency = -1",
                "repository.a.concurrency is not a whole number",
            ),
            (
                "[repository.a]\nallow_http = \"SECRET\"",
                "repository.a.allow_http is not true",
            ),
            (
                "[repository.a]\nregion = \"SECRET\"",
                "repository.a has no url",
            ),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(said), "{text:?}: {error}");
            assert!(!error.contains("SECRET"), "{error}");
        }
    }

    #[test]
    fn every_key_that_is_checked_is_read() {
        let values = |keys: Keys| -> String {
            let line = |(key, wanted): &(&str, Wanted)| match wanted {
                Wanted::Text => format!("{key} = \"x\"\n"),
                Wanted::Texts => format!("{key} = [\"x\"]\n"),
                Wanted::Switch => format!("{key} = true\n"),
                Wanted::Number => format!("{key} = 1\n"),
                Wanted::Duration => format!("{key} = \"1s\"\n"),
                Wanted::Bytes => format!("{key} = \"1GB\"\n"),
                Wanted::Acknowledge => format!("{key} = \"any\"\n"),
                Wanted::Table => String::new(),
            };
            keys.iter().map(line).collect()
        };
        let text = format!(
            "{}[repository.a]\n{}[repository.a.compression]\n{}[cluster.a]\n{}",
            values(FILE_KEYS),
            values(REPOSITORY_KEYS),
            values(COMPRESSION_KEYS),
            values(CLUSTER_KEYS)
        );
        let file = parse(&text).unwrap();
        let store = &file.repository["a"].store;
        assert_eq!((store.concurrency, store.bucket_key), (Some(1), Some(true)));
        assert_eq!(file.cluster["a"].acknowledge, AcknowledgedBy::Any);
    }
}
