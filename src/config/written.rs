//! Settings as a configuration file has them, for a command that starts others.

use toml::{Table, Value};

use super::{AcknowledgedBy, ClusterSettings, FLAG_REPOSITORY, RepositorySettings, handed_over};
use crate::error::{Result, io};

/// The repository's name in a file where it came from a flag.
const NAME_IN_FILE: &str = "repo";

impl ClusterSettings {
    /// A file's tables for this cluster's repositories, and for a cluster of the name `cluster` that
    /// is kept in them, without a spool. Paths are absolute; `state_dir` and the connection are left
    /// to the caller.
    pub fn tables_for(&self, cluster: &str) -> Result<String> {
        let mut repositories = Table::new();
        for repository in &self.repositories {
            let name = match repository.name.as_str() {
                FLAG_REPOSITORY => NAME_IN_FILE,
                name => name,
            };
            repositories.insert(name.to_owned(), repository.table()?.into());
        }
        let acknowledge = match self.acknowledge {
            // whoever runs these commands has no spool, and waits for the repositories
            AcknowledgedBy::All | AcknowledgedBy::Spool => "all",
            AcknowledgedBy::Any => "any",
        };
        let one = Table::from_iter([("acknowledge".to_owned(), acknowledge.into())]);
        let clusters = Table::from_iter([(cluster.to_owned(), Value::from(one))]);
        let file = Table::from_iter([
            ("repository".to_owned(), Value::from(repositories)),
            ("cluster".to_owned(), Value::from(clusters)),
        ]);
        Ok(file.to_string())
    }
}

impl RepositorySettings {
    fn table(&self) -> Result<Table> {
        let identity_file = match &self.identity_file {
            // what systemd hands over is handed to whom we start too
            Some(path) if handed_over(path).is_none() => {
                let absolute = std::path::absolute(path);
                Some(absolute.map_err(|error| io("find", path, &error))?)
            }
            path => path.clone(),
        };
        let compression = Table::from_iter([
            ("wal".to_owned(), format!("zstd:{}", self.wal_level).into()),
            (
                "backup".to_owned(),
                format!("zstd:{}", self.backup_level).into(),
            ),
        ]);
        let store = &self.store;
        let path = |path: &std::path::Path| Value::from(path.to_string_lossy().into_owned());
        let text = |text: &Option<String>| text.clone().map(Value::from);
        let concurrency = store.concurrency.map(i64::try_from);
        let retry_for = store.retry_for;
        let set = [
            ("url", Some(self.url.clone().into())),
            ("compression", Some(compression.into())),
            ("recipients", Some(self.recipients.clone().into())),
            ("identity_file", identity_file.as_deref().map(path)),
            ("accept_plain", Some(self.accept_plain.into())),
            ("endpoint", text(&store.endpoint)),
            ("region", text(&store.region)),
            ("path_style", store.path_style.map(Value::from)),
            ("allow_http", Some(store.allow_http.into())),
            ("ca_file", store.ca_file.as_deref().map(path)),
            ("profile", text(&store.profile)),
            ("account", text(&store.account)),
            (
                "server_side_encryption",
                text(&store.server_side_encryption),
            ),
            ("kms_key_id", text(&store.kms_key_id)),
            ("bucket_key", store.bucket_key.map(Value::from)),
            ("storage_class", text(&store.storage_class)),
            (
                "concurrency",
                concurrency.map(|many| Value::from(many.unwrap_or(i64::MAX))),
            ),
            (
                "retry_for",
                retry_for.map(|time| Value::from(format!("{}ms", time.as_millis()))),
            ),
        ];
        let set = set
            .into_iter()
            .filter_map(|(key, value)| Some((key.to_owned(), value?)));
        Ok(set.collect())
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use crate::config::{GivenSettings, Settings};

    const FILE: &str = r#"
        [repository.one]
        url = "s3://bucket/prefix"
        compression = { wal = "zstd:2", backup = "zstd:9" }
        recipients = ["age1x"]
        identity_file = "identity"
        accept_plain = true
        endpoint = "http://host:9000"
        region = "here"
        path_style = false
        allow_http = true
        ca_file = "ca.pem"
        profile = "p"
        server_side_encryption = "aws:kms"
        kms_key_id = "k"
        bucket_key = false
        storage_class = "STANDARD_IA"
        concurrency = 3
        retry_for = "1500ms"
        [repository.two]
        url = "az://container"
        account = "a"
        [cluster.main]
        acknowledge = "any"
    "#;

    /// A setting that is forgotten here would send what is meant for one store to another.
    #[test]
    fn what_is_written_reads_back_as_the_same_settings() {
        let given = GivenSettings::default();
        let read = |text: &str| Settings::from_text(text, Path::new("/etc/a.toml"), &given);
        let settings = read(FILE).unwrap();
        let cluster = settings.cluster().unwrap();
        let written = cluster.tables_for("demo").unwrap();
        let again = read(&written).unwrap();
        let again = again.cluster().unwrap();
        assert_eq!(again.name, "demo");
        assert_eq!(again.repositories, cluster.repositories);
        assert_eq!(again.acknowledge, cluster.acknowledge);
    }

    #[test]
    fn a_repository_of_a_flag_has_a_name_in_a_file() {
        let given = GivenSettings {
            repo: Some("file:///backups".to_owned()),
            ..GivenSettings::default()
        };
        let settings = Settings::from_text("", Path::new(""), &given).unwrap();
        let written = settings.cluster().unwrap().tables_for("demo").unwrap();
        assert!(written.contains("[repository.repo]"), "{written}");
    }
}
