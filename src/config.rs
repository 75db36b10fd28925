//! Settings: flags, over `ANYWHEN_*`, over a file; checked, and handed on as small options.

mod address;
mod file;
mod written;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use crate::error::{Error, Result, io};
use file::{ClusterTable, RepositoryTable};

/// The cluster's name where none is given.
const DEFAULT_CLUSTER: &str = "main";
/// The repository's name in messages where it came from a flag.
const FLAG_REPOSITORY: &str = "--repo";

/// What flags and environment say, for every command.
#[derive(Debug, Clone, Default)]
pub struct GivenSettings {
    /// `--config`.
    pub config: Option<PathBuf>,
    /// `--repo`.
    pub repo: Option<String>,
    /// `-d`.
    pub connection: Option<String>,
    /// `--cluster`.
    pub cluster: Option<String>,
    /// `--repository`: which of the configured ones.
    pub repositories: Vec<String>,
    /// `--recipient`.
    pub recipients: Vec<String>,
    /// `--identity-file`.
    pub identity_file: Option<PathBuf>,
    /// `--state-dir`.
    pub state_dir: Option<PathBuf>,
}

/// The settings of one command, checked.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The file that was read, for messages and for `restore_command`.
    pub file: Option<PathBuf>,
    clusters: BTreeMap<String, ClusterSettings>,
    chosen: Option<String>,
    repo_from_flag: bool,
    names_clusters: bool,
    file_repositories: Vec<String>,
}

/// A repository, checked. How a store is reached is the store's to judge.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RepositorySettings {
    /// Its name, for messages and to choose it.
    pub name: String,
    /// Its address.
    pub url: String,
    /// The zstd level for WAL.
    pub wal_level: i32,
    /// The zstd level for backups.
    pub backup_level: i32,
    /// To whom its objects are encrypted; to nobody where there are none.
    pub recipients: Vec<String>,
    /// What reads them.
    pub identity_file: Option<PathBuf>,
    /// Whether objects from before encryption was set up are read.
    pub accept_plain: bool,
    /// Where the keys of the day are kept.
    pub state_dir: Option<PathBuf>,
    /// How the store is reached, where that is set.
    pub store: StoreSettings,
}

impl RepositorySettings {
    /// What tells this repository from another at the same address: buckets of one name are
    /// different ones at another endpoint, and in another account. Empty for a folder.
    pub fn scope(&self) -> String {
        if address::is_folder(&self.url) {
            return String::new();
        }
        let endpoint = self.store.endpoint.as_deref();
        let endpoint = endpoint.map(|endpoint| endpoint.trim_end_matches('/'));
        let parts = [
            ("endpoint", endpoint),
            ("account", self.store.account.as_deref()),
        ];
        let set = parts
            .iter()
            .filter_map(|(name, value)| Some(format!("{name}={}", (*value)?)));
        set.collect::<Vec<_>>().join(" ")
    }
}

/// What the file says of how a store is reached; what is absent is the provider's usual.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub struct StoreSettings {
    /// The address of a store that is not the provider's own.
    pub endpoint: Option<String>,
    /// The region.
    pub region: Option<String>,
    /// Whether the bucket stands in the path, and not in the host's name.
    pub path_style: Option<bool>,
    /// Whether an endpoint without TLS is used.
    #[serde(default)]
    pub allow_http: bool,
    /// Certificates of the authority that vouches for the endpoint.
    pub ca_file: Option<PathBuf>,
    /// The profile in AWS's shared files.
    pub profile: Option<String>,
    /// The storage account, of Azure.
    pub account: Option<String>,
    /// `AES256`, `aws:kms` or `aws:kms:dsse`.
    pub server_side_encryption: Option<String>,
    /// The key for it.
    pub kms_key_id: Option<String>,
    /// Whether S3 asks its key service once a bucket, not once an object.
    pub bucket_key: Option<bool>,
    /// The storage class of new objects.
    pub storage_class: Option<String>,
    /// Requests at a time.
    pub concurrency: Option<usize>,
    /// How long a request is tried again.
    #[serde(default, deserialize_with = "optional_duration")]
    pub retry_for: Option<Duration>,
}

fn optional_duration<'de, D: serde::Deserializer<'de>>(
    deserializer: D,
) -> std::result::Result<Option<Duration>, D::Error> {
    let text = Option::<String>::deserialize(deserializer)?;
    let parsed = text.as_deref().map(parse_duration).transpose();
    parsed.map_err(serde::de::Error::custom)
}

/// When something counts as acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AcknowledgedBy {
    /// Once every repository of the cluster holds it.
    #[default]
    All,
    /// Once one of them holds it.
    Any,
    /// Once every one of them holds it, or the spool does while they are away.
    Spool,
}

/// A cluster, checked.
#[derive(Debug, Clone)]
pub struct ClusterSettings {
    /// Its name.
    pub name: String,
    /// Where its objects go; at least one place.
    pub repositories: Vec<RepositorySettings>,
    /// When something counts as acknowledged.
    pub acknowledge: AcknowledgedBy,
    /// How its server is reached; `None` where no conninfo was given.
    pub connection: Option<String>,
    /// How long WAL waits before it is stored, where that is set.
    pub flush_interval: Option<Duration>,
    /// The replication slot.
    pub slot: String,
    /// Where WAL goes while no repository takes it; absolute.
    pub spool_dir: Option<PathBuf>,
    /// How much that may be, in bytes.
    pub spool_bytes_max: Option<u64>,
    /// Where the stream's metrics are read: `host:port`.
    pub metrics: Option<String>,
}

impl Settings {
    /// Reads the configuration file, if there is one, and puts flags and environment over it.
    pub fn load(given: &GivenSettings) -> Result<Self> {
        let file = match &given.config {
            Some(path) => Some(absolute(path)?),
            None => default_files().into_iter().find(|path| path.exists()),
        };
        let text = match &file {
            Some(path) => std::fs::read_to_string(path).map_err(|error| unread(path, &error))?,
            None => String::new(),
        };
        let shown = file.as_deref().unwrap_or_else(|| Path::new("(no file)"));
        Self::from_text(&text, shown, given).map(|settings| Self { file, ..settings })
    }

    /// The same for commands that touch no repository.
    pub fn load_without_repository(mut given: GivenSettings) -> Result<Self> {
        // never opened; it only stands in for one that is not needed
        given.repo.get_or_insert_with(|| "file:///".to_owned());
        Self::load(&given)
    }

    fn from_text(text: &str, shown: &Path, given: &GivenSettings) -> Result<Self> {
        let bad = |message: String| Error::usage(format!("{}: {message}", shown.display()));
        let file = file::parse(text).map_err(bad)?;
        let folder = shown.parent().unwrap_or_else(|| Path::new(""));
        let mut repositories = BTreeMap::new();
        for (name, table) in &file.repository {
            let checked = check_repository(name, table, folder).map_err(|error| {
                error.context(format!("{}: repository {name}", shown.display()))
            })?;
            repositories.insert(name.clone(), checked);
        }
        let file_repositories = repositories.keys().cloned().collect();
        let repo_from_flag = given.repo.is_some();
        if let Some(url) = &given.repo {
            let meant = repository_of_flag(url, repositories, &given.repositories)?;
            repositories = BTreeMap::from([(meant.name.clone(), meant)]);
        }
        let state_dir = given.state_dir.as_ref().or(file.state_dir.as_ref());
        for repository in repositories.values_mut() {
            encrypt_as_given(repository, given, state_dir);
        }
        let chosen = given.cluster.clone();
        let mut tables = file.cluster;
        let names_clusters = !tables.is_empty();
        if tables.is_empty() {
            let name = chosen.as_deref().unwrap_or(DEFAULT_CLUSTER);
            tables.insert(name.to_owned(), ClusterTable::default());
        }
        let mut clusters = BTreeMap::new();
        for (name, table) in &tables {
            if chosen.as_ref().is_some_and(|chosen| chosen != name) {
                continue;
            }
            let context = format!("cluster {name}");
            let checked = check_cluster(name, table, &repositories, given, repo_from_flag)
                .map_err(|error| {
                    if text.is_empty() {
                        error
                    } else {
                        error.context(context)
                    }
                })?;
            clusters.insert(name.clone(), checked);
        }
        if let Some(name) = chosen.as_ref().filter(|name| !clusters.contains_key(*name)) {
            let known: Vec<&str> = tables.keys().map(String::as_str).collect();
            return Err(Error::usage(format!(
                "no cluster {name} in {}: configured={}",
                shown.display(),
                known.join(", ")
            ))
            .hint(format!(
                "name one of these with --cluster, or add [cluster.{name}] to the file"
            )));
        }
        if state_dir.is_some_and(|path| !path.is_absolute()) {
            return Err(bad("state_dir is not an absolute path".to_owned()));
        }
        Ok(Self {
            file: None,
            clusters,
            chosen,
            repo_from_flag,
            names_clusters,
            file_repositories,
        })
    }

    /// The one cluster that a command acts on.
    pub fn cluster(&self) -> Result<&ClusterSettings> {
        match self.clusters.values().collect::<Vec<_>>().as_slice() {
            [only] => Ok(only),
            several => {
                let names: Vec<&str> = several.iter().map(|one| one.name.as_str()).collect();
                Err(Error::usage(format!(
                    "several clusters are configured: {}",
                    names.join(", ")
                ))
                .hint("name one with --cluster"))
            }
        }
    }

    /// The clusters that `status` and `list` show: the one that was named, or all configured.
    pub fn clusters(&self) -> impl Iterator<Item = &ClusterSettings> {
        self.clusters.values()
    }

    /// Whether a cluster was named.
    pub fn cluster_is_chosen(&self) -> bool {
        self.chosen.is_some()
    }

    /// Whether the file names clusters.
    pub fn names_clusters(&self) -> bool {
        self.names_clusters
    }

    /// The names of the repositories that the file has, whether they are used or not.
    pub fn file_repositories(&self) -> &[String] {
        &self.file_repositories
    }

    /// Whether the repository's address came from a flag or the environment, not from the file.
    pub fn repo_is_given(&self) -> bool {
        self.repo_from_flag
    }
}

fn default_files() -> Vec<PathBuf> {
    let home = std::env::var_os("XDG_CONFIG_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| Path::new(&home).join(".config")));
    let own = home.map(|folder| folder.join("anywhen/anywhen.toml"));
    own.into_iter()
        .chain([PathBuf::from("/etc/anywhen/anywhen.toml")])
        .collect()
}

fn unread(path: &Path, error: &std::io::Error) -> Error {
    let hint = match error.kind() {
        std::io::ErrorKind::NotFound => {
            "give --config (or ANYWHEN_CONFIG) a file that is there; left out, \
             ~/.config/anywhen/anywhen.toml is read, or /etc/anywhen/anywhen.toml"
        }
        std::io::ErrorKind::PermissionDenied => {
            "run as a user that may read it, or give another with --config"
        }
        _ => "give --config (or ANYWHEN_CONFIG) a file that can be read",
    };
    Error::usage(io("read", path, error).message()).hint(hint)
}

fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).map_err(|error| io("find", path, &error))
}

fn repository_at(name: &str, url: &str) -> RepositorySettings {
    RepositorySettings {
        name: name.to_owned(),
        url: address::tidied(url),
        wal_level: 1,
        backup_level: 3,
        ..RepositorySettings::default()
    }
}

/// The repository at the address that a flag gives: the one that the file has there, with all that
/// it says of it, or one of which nothing else is known.
fn repository_of_flag(
    url: &str,
    configured: BTreeMap<String, RepositorySettings>,
    chosen: &[String],
) -> Result<RepositorySettings> {
    let address = address::cleaned(url);
    let mut there: Vec<RepositorySettings> = configured
        .into_values()
        .filter(|one| chosen.is_empty() || chosen.contains(&one.name))
        .filter(|one| address::cleaned(&one.url) == address)
        .collect();
    if there.len() > 1 {
        let names: Vec<&str> = there.iter().map(|one| one.name.as_str()).collect();
        return Err(Error::usage(format!(
            "several repositories are configured at the address of --repo: {}",
            names.join(", ")
        ))
        .hint("name one with --repository"));
    }
    Ok(there
        .pop()
        .unwrap_or_else(|| repository_at(FLAG_REPOSITORY, url)))
}

/// Flags say how all repositories of the command encrypt.
fn encrypt_as_given(
    repository: &mut RepositorySettings,
    given: &GivenSettings,
    state_dir: Option<&PathBuf>,
) {
    repository.state_dir = state_dir.cloned();
    if !given.recipients.is_empty() {
        repository.recipients.clone_from(&given.recipients);
    }
    if given.identity_file.is_some() {
        repository.identity_file.clone_from(&given.identity_file);
    }
}

/// What a relative path names in the folder of credentials that systemd hands to a service
/// (systemd.exec(5), `LoadCredential=`); `None` unless it is there.
pub fn handed_over(path: &Path) -> Option<PathBuf> {
    let folder = std::env::var_os("CREDENTIALS_DIRECTORY")?;
    handed_over_in(Path::new(&folder), path)
}

fn handed_over_in(credentials: &Path, path: &Path) -> Option<PathBuf> {
    let file = credentials.join(path);
    (path.is_relative() && file.exists()).then_some(file)
}

/// `folder` is the file's: what it names is there, wherever the command is called.
fn check_repository(
    name: &str,
    table: &RepositoryTable,
    folder: &Path,
) -> Result<RepositorySettings> {
    // an identity that is handed over stays relative: a restored server is handed its own
    let identity_file = table
        .identity_file
        .as_ref()
        .map(|path| match handed_over(path) {
            Some(_) => path.clone(),
            None => folder.join(path),
        });
    let ca_file = table.store.ca_file.as_ref();
    let ca_file = ca_file.map(|path| handed_over(path).unwrap_or_else(|| folder.join(path)));
    let plain = repository_at(name, &table.url);
    let level =
        |text: &Option<String>, default| text.as_deref().map_or(Ok(default), parse_compression);
    Ok(RepositorySettings {
        wal_level: level(&table.compression.wal, plain.wal_level)?,
        backup_level: level(&table.compression.backup, plain.backup_level)?,
        recipients: table.recipients.clone(),
        identity_file,
        accept_plain: table.accept_plain,
        store: StoreSettings {
            ca_file,
            ..table.store.clone()
        },
        ..plain
    })
}

fn parse_compression(text: &str) -> Result<i32> {
    let level = text
        .strip_prefix("zstd:")
        .and_then(|level| level.parse().ok());
    level
        .filter(|level| (1..=19).contains(level))
        .ok_or_else(|| Error::usage(format!("compression is zstd:1 to zstd:19: found {text:?}")))
}

fn named(
    repositories: &BTreeMap<String, RepositorySettings>,
    wanted: &str,
) -> Result<RepositorySettings> {
    let known = repositories.get(wanted).cloned();
    known.ok_or_else(|| {
        let names: Vec<&str> = repositories.keys().map(String::as_str).collect();
        Error::usage(format!(
            "there is no repository of this name: found={wanted}, configured={}",
            names.join(", ")
        ))
        .hint(format!(
            "add [repository.{wanted}] with its url to the file"
        ))
    })
}

/// Two names for one place would look like two copies.
fn check_distinct(places: &[RepositorySettings]) -> Result<()> {
    let place_of = |place: &RepositorySettings| (address::cleaned(&place.url), place.scope());
    for (number, place) in places.iter().enumerate() {
        let rest = places.iter().skip(number + 1);
        for other in rest {
            if place_of(place) == place_of(other) {
                return Err(Error::usage(format!(
                    "two repositories of the cluster are one place: {} and {}: url={}",
                    place.name, other.name, place.url
                )));
            }
        }
    }
    Ok(())
}

fn check_cluster(
    name: &str,
    table: &ClusterTable,
    repositories: &BTreeMap<String, RepositorySettings>,
    given: &GivenSettings,
    repo_from_flag: bool,
) -> Result<ClusterSettings> {
    let mut chosen: Vec<RepositorySettings> = match table.repositories.as_ref() {
        Some(names) if !repo_from_flag => names
            .iter()
            .map(|wanted| named(repositories, wanted))
            .collect::<Result<_>>()?,
        _ => repositories.values().cloned().collect(),
    };
    for wanted in &given.repositories {
        if !chosen.iter().any(|place| place.name == *wanted) {
            let known: Vec<&str> = chosen.iter().map(|place| place.name.as_str()).collect();
            return Err(Error::usage(format!(
                "the cluster has no repository of this name: found={wanted}, configured={}",
                known.join(", ")
            ))
            .hint("name one of these with --repository, or leave it out for all of them"));
        }
    }
    if !given.repositories.is_empty() {
        chosen.retain(|place| given.repositories.contains(&place.name));
    }
    if chosen.is_empty() {
        return Err(Error::usage("no repository is given").hint(
            "give one with --repo file:///path/to/repository, or ANYWHEN_REPO, or a \
             [repository.NAME] with a url in the configuration file",
        ));
    }
    check_distinct(&chosen)?;
    if let Some(dir) = table.spool_dir.as_ref().filter(|dir| !dir.is_absolute()) {
        return Err(Error::usage(format!(
            "spool_dir is not an absolute path: {}",
            dir.display()
        )));
    }
    let bytes = table.spool_bytes_max.as_deref().map(parse_bytes);
    let slot = table
        .slot
        .clone()
        .unwrap_or_else(|| format!("anywhen_{name}"));
    Ok(ClusterSettings {
        name: name.to_owned(),
        repositories: chosen,
        acknowledge: table.acknowledge,
        connection: given
            .connection
            .clone()
            .or_else(|| table.connection.clone()),
        flush_interval: table
            .flush_interval
            .as_deref()
            .map(parse_duration)
            .transpose()
            .map_err(Error::usage)?,
        slot,
        spool_dir: table.spool_dir.clone(),
        spool_bytes_max: bytes.transpose().map_err(Error::usage)?,
        metrics: table.metrics.clone(),
    })
}

/// A size as people write it, in PostgreSQL's units, which are powers of 1024: `512MB`, `10 GiB`;
/// without a unit, bytes.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    const UNITS: &[(&str, u32)] = &[("k", 10), ("m", 20), ("g", 30), ("t", 40)];
    let bad = || format!("not a size, such as 512MB or 10GB: {text:?}");
    let digits = text.trim().trim_end_matches(|c: char| !c.is_ascii_digit());
    let unit = text.trim()[digits.len()..].trim().to_ascii_lowercase();
    let unit = unit.trim_end_matches('b').trim_end_matches('i');
    let shift = match UNITS.iter().find(|(name, _)| *name == unit) {
        Some((_, shift)) => *shift,
        None if unit.is_empty() => 0,
        None => return Err(bad()),
    };
    let number: u64 = digits.parse().map_err(|_not_a_number| bad())?;
    number.checked_mul(1 << shift).ok_or_else(bad)
}

/// A length of time as people write it: `1s`, `250ms`, `2 minutes`.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let span: jiff::SignedDuration = text.parse().map_err(|_how_it_is_parsed: jiff::Error| {
        format!("expected a length of time such as 1s, 500ms or 5min: found {text:?}")
    })?;
    Duration::try_from(span).map_err(|_negative| format!("a length of time below zero: {text:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = r#"
        state_dir = "/var/lib/anywhen"
        [repository.near]
        url = "file:///backups"
        compression = { wal = "zstd:1", backup = "zstd:9" }
        [cluster.main]
        repositories = ["near"]
        connection = "host=db1 user=anywhen"
        flush_interval = "250ms"
        [cluster.second]
    "#;

    fn settings(text: &str, given: &GivenSettings) -> Result<Settings> {
        Settings::from_text(text, Path::new("anywhen.toml"), given)
    }

    fn given(cluster: Option<&str>, repo: Option<&str>) -> GivenSettings {
        GivenSettings {
            cluster: cluster.map(str::to_owned),
            repo: repo.map(str::to_owned),
            ..GivenSettings::default()
        }
    }

    #[test]
    fn reads_the_file_of_the_design() {
        let settings = settings(FILE, &given(Some("main"), None)).unwrap();
        let cluster = settings.cluster().unwrap();
        assert_eq!(cluster.repositories[0].wal_level, 1);
        assert_eq!(cluster.flush_interval, Some(Duration::from_millis(250)));
        assert_eq!(cluster.connection.as_deref(), Some("host=db1 user=anywhen"));
        assert_eq!(cluster.slot, "anywhen_main");
    }

    #[test]
    fn flags_win_over_the_file() {
        let settings = settings(FILE, &given(Some("main"), Some("file:///other"))).unwrap();
        assert_eq!(
            settings.cluster().unwrap().repositories[0].url,
            "file:///other"
        );
    }

    #[test]
    fn the_address_of_a_configured_repository_means_all_that_is_configured_of_it() {
        // a bare one would write to a bucket in the clear that its owner takes for encrypted
        let text = "[repository.a]\nurl = \"/x\"\nrecipients = [\"age1x\"]\n\
                    [repository.b]\nurl = \"s3://b/p\"\nendpoint = \"https://one\"\n\
                    [repository.c]\nurl = \"s3://b/p/\"\nendpoint = \"https://two\"\n\
                    [cluster.main]\nrepositories = [\"b\"]";
        let chosen = |repo: &str, named: &[&str]| {
            let mut flags = given(None, Some(repo));
            flags.repositories = named.iter().map(|name| (*name).to_owned()).collect();
            let settings = settings(text, &flags)?;
            Ok::<_, Error>(settings.cluster()?.repositories.clone())
        };
        for repo in ["file:///x", "file://localhost//x/", "/x/"] {
            let found = chosen(repo, &[]).unwrap();
            assert_eq!((found.len(), found[0].name.as_str()), (1, "a"), "{repo}");
            assert_eq!(found[0].recipients, ["age1x"]);
        }
        let bare = chosen("file:///x/y", &[]).unwrap();
        assert_eq!(
            (bare[0].name.as_str(), bare[0].recipients.len()),
            ("--repo", 0)
        );
        let error = chosen("s3://b//p", &[]).unwrap_err();
        assert!(error.message().ends_with("b, c"), "{error}");
        let named = chosen("s3://b//p", &["c"]).unwrap();
        assert_eq!(named[0].store.endpoint.as_deref(), Some("https://two"));
    }

    #[test]
    fn one_place_under_two_names_is_refused_and_two_places_are_not() {
        let both = |one: &str, other: &str| {
            let text = format!("[repository.a]\n{one}\n[repository.b]\n{other}\n");
            settings(&text, &given(None, None)).map(drop)
        };
        let bucket = "url = \"az://c/p\"";
        let of = |account: &str| format!("{bucket}\naccount = \"{account}\"");
        let at = |endpoint: &str| format!("{bucket}\nendpoint = \"{endpoint}\"");
        both(&of("x"), &of("y")).unwrap();
        both(&at("https://x"), &at("https://y")).unwrap();
        both(bucket, &of("y")).unwrap();
        both("url = \"s3://c/p\"", bucket).unwrap();
        both(&of("x"), &of("x")).unwrap_err();
        both(&at("https://x"), &at("https://x/")).unwrap_err();
        both("url = \"file:///x//y\"", "url = \"/x/y/\"").unwrap_err();
        both("url = \"file:///x%20y\"", "url = \"/x y\"").unwrap_err();
    }

    #[test]
    fn what_the_file_names_is_beside_the_file_unless_it_is_handed_over() {
        let text = "[repository.a]\nurl = \"file:///x\"\nidentity_file = \"i\"\nca_file = \"/c\"";
        let flags = given(None, None);
        let settings = Settings::from_text(text, Path::new("/etc/a/b.toml"), &flags).unwrap();
        let place = &settings.cluster().unwrap().repositories[0];
        assert_eq!(place.identity_file.as_deref(), Some(Path::new("/etc/a/i")));
        assert_eq!(place.store.ca_file.as_deref(), Some(Path::new("/c")));
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("i");
        std::fs::write(&file, "").unwrap();
        let found = |path: &Path| handed_over_in(folder.path(), path);
        assert_eq!(found(Path::new("i")), Some(file.clone()));
        assert_eq!((found(Path::new("j")), found(&file)), (None, None));
    }

    #[test]
    fn names_the_nearest_key_for_one_that_does_not_exist() {
        let error = settings(
            "[cluster.main]\nflush_intervall = \"1s\"",
            &given(None, Some("/x")),
        );
        let error = error.unwrap_err();
        assert!(
            error
                .message()
                .contains("did you mean cluster.main.flush_interval?"),
            "{error}"
        );
    }

    #[test]
    fn flags_say_how_every_repository_encrypts() {
        let text = "[repository.a]\nurl = \"file:///x\"\nrecipients = [\"age1x\"]";
        let mut flags = given(None, None);
        let place = |flags: &GivenSettings| {
            let settings = settings(text, flags).unwrap();
            settings.cluster().unwrap().repositories[0].clone()
        };
        assert_eq!(place(&flags).recipients, ["age1x"]);
        flags.recipients = vec!["age1y".to_owned()];
        flags.state_dir = Some(PathBuf::from("/state"));
        assert_eq!(place(&flags).recipients, ["age1y"]);
        assert_eq!(place(&flags).state_dir, flags.state_dir);
    }

    #[test]
    fn a_cluster_is_kept_in_every_repository_that_it_names() {
        let text = "[repository.a]\nurl = \"file:///x\"\n[repository.b]\nurl = \"file:///y\"\n\
                    [cluster.main]\nrepositories = [\"b\", \"a\"]\nacknowledge = \"any\"";
        let both = settings(text, &given(None, None)).unwrap();
        let cluster = both.cluster().unwrap();
        let names: Vec<_> = cluster
            .repositories
            .iter()
            .map(|place| &place.name)
            .collect();
        assert_eq!(names, ["b", "a"]);
        assert_eq!(cluster.acknowledge, AcknowledgedBy::Any);
        let mut one = given(None, None);
        one.repositories = vec!["a".to_owned()];
        let one = settings(text, &one).unwrap();
        assert_eq!(one.cluster().unwrap().repositories.len(), 1);
        let twice = text.replace("file:///y", "file:///x/");
        let error = settings(&twice, &given(None, None)).unwrap_err();
        assert!(error.message().contains("are one place"), "{error}");
    }

    /// A name that is mistyped is seen at once beside those that there are.
    #[test]
    fn an_unknown_name_is_answered_with_the_known_ones_and_what_to_do() {
        let refused = |given: &GivenSettings| {
            let error = settings(FILE, given).unwrap_err();
            (
                error.message().to_owned(),
                error.hint_text().map(str::to_owned),
            )
        };
        let mut cluster = given(None, None);
        cluster.cluster = Some("mian".to_owned());
        let mut repository = given(None, None);
        repository.repositories = vec!["nera".to_owned()];
        for (given, known, flag) in [
            (cluster, "configured=main, second", "--cluster"),
            (repository, "configured=near", "--repository"),
        ] {
            let (message, hint) = refused(&given);
            assert!(message.contains(known), "{message}");
            assert!(hint.is_some_and(|hint| hint.contains(flag)), "{message}");
        }
        let text = FILE.replace("[\"near\"]", "[\"far\"]");
        let error = settings(&text, &given(None, None)).unwrap_err();
        assert!(error.message().contains("configured=near"), "{error}");
        assert!(error.hint_text().unwrap().contains("[repository.far]"));
    }

    #[test]
    fn an_address_is_shown_without_slashes_that_mean_nothing() {
        let text = "[repository.a]\nurl = \"file:///x//y/\"\n[cluster.main]";
        let url = |settings: Settings| settings.cluster().unwrap().repositories[0].url.clone();
        assert_eq!(
            url(settings(text, &given(None, None)).unwrap()),
            "file:///x/y"
        );
        assert_eq!(url(settings("", &given(None, Some("/x/"))).unwrap()), "/x");
    }

    #[test]
    fn a_length_of_time_that_is_none_is_answered_with_what_one_looks_like() {
        assert_eq!(parse_duration("5min"), Ok(Duration::from_mins(5)));
        for text in ["never", "", "10", "1 fortnight"] {
            let said = parse_duration(text).unwrap_err();
            let expected = "expected a length of time such as 1s, 500ms or 5min: found";
            assert_eq!(said, format!("{expected} {text:?}"));
        }
    }

    #[test]
    fn sizes_are_read_as_postgresql_reads_them() {
        for (text, bytes) in [
            ("0", 0),
            ("17", 17),
            ("17 B", 17),
            ("4kB", 4 << 10),
            ("512MB", 512 << 20),
            ("10 GiB", 10 << 30),
            ("1g", 1 << 30),
            ("2TB", 2 << 40),
        ] {
            assert_eq!(parse_bytes(text), Ok(bytes), "{text}");
        }
        for text in [
            "",
            "GB",
            "-1GB",
            "1.5GB",
            "1PB",
            "1 G B",
            "99999999999TB",
            "1ib x",
        ] {
            assert!(parse_bytes(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_spool_is_a_clusters() {
        let text = "[cluster.main]\nspool_dir = \"/spool\"\nspool_bytes_max = \"1GB\"\n\
                    acknowledge = \"spool\"";
        let spooled = settings(text, &given(None, Some("/x"))).unwrap();
        let cluster = spooled.cluster().unwrap();
        assert_eq!(cluster.spool_dir.as_deref(), Some(Path::new("/spool")));
        assert_eq!(cluster.spool_bytes_max, Some(1 << 30));
        assert_eq!(cluster.acknowledge, AcknowledgedBy::Spool);
        let relative = text.replace("/spool", "spool");
        let error = settings(&relative, &given(None, Some("/x"))).unwrap_err();
        assert!(error.message().contains("absolute"), "{error}");
    }

    #[test]
    fn works_without_a_file() {
        let settings = settings("", &given(None, Some("file:///x"))).unwrap();
        assert_eq!(settings.cluster().unwrap().name, "main");
        let without = Settings::from_text("", Path::new("none"), &GivenSettings::default());
        assert!(without.unwrap_err().hint_text().unwrap().contains("--repo"));
    }

    #[test]
    fn a_command_for_one_cluster_asks_which() {
        let error = settings(FILE, &given(None, None)).unwrap();
        assert!(
            error
                .cluster()
                .unwrap_err()
                .hint_text()
                .unwrap()
                .contains("--cluster")
        );
    }
}
