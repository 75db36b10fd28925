//! AWS's shared files, `~/.aws/credentials` and `~/.aws/config`, which `object_store` does not
//! read.
//!
//! The format: <https://docs.aws.amazon.com/sdkref/latest/guide/file-format.html>. Profiles that
//! need a sign-in or another account's role are beyond us; `credential_process` reaches them.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use object_store::CredentialProvider;
use object_store::aws::{AwsCredential, AwsCredentialProvider};
use tokio::sync::Mutex;

use super::credential_process::{self, Handed};

/// The files hold a few lines per profile.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// The profile that is taken where none is named.
const DEFAULT: &str = "default";

/// Why the shared files give no credentials.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum ProfileError {
    /// No such section.
    #[error("there is no profile {name} in {files}")]
    Missing { name: String, files: String },
    /// The profile is there and holds no credentials.
    #[error("profile {name} in {files} holds no keys and no credential_process")]
    Empty { name: String, files: String },
    /// The profile wants what we do not do.
    #[error("profile {name} wants {what}, which anywhen does not do by itself")]
    Unsupported { name: String, what: &'static str },
    /// Half a key pair.
    #[error("profile {name} has {found} without {missing}")]
    Half {
        name: String,
        found: &'static str,
        missing: &'static str,
    },
    /// A file that could not be read.
    #[error("cannot read {path}: {reason}")]
    Unread { path: String, reason: String },
    /// A line that is neither a section nor a setting.
    #[error("not a line of an AWS settings file: {path}:{line}")]
    Syntax { path: String, line: usize },
    /// The program of `credential_process` gave nothing.
    #[error("credential_process of profile {name}: {reason}")]
    Process { name: String, reason: String },
}

impl ProfileError {
    /// What to do about it.
    pub(super) fn way_out(&self) -> String {
        match self {
            Self::Unsupported { name, .. } => format!(
                "make a profile with credential_process = aws configure export-credentials \
                 --profile {name}, and name that one"
            ),
            Self::Missing { .. } => "check AWS_PROFILE or the repository's profile".to_owned(),
            Self::Syntax { .. } => "each line is [section], name = value, or # comment".to_owned(),
            Self::Process { .. } => "run its command by hand as this user".to_owned(),
            Self::Empty { .. } | Self::Half { .. } => {
                "it needs aws_access_key_id and aws_secret_access_key".to_owned()
            }
            Self::Unread { .. } => "check the file and this user's rights".to_owned(),
        }
    }
}

/// What the shared files say, if anything.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// The profile that applies.
    pub(super) profile: Option<Profile>,
}

/// What one profile says.
#[derive(Debug)]
pub(super) struct Profile {
    pub(super) region: Option<String>,
    pub(super) endpoint_url: Option<String>,
    /// Where it takes credentials from; none for a profile that only has settings.
    pub(super) source: Option<Source>,
}

/// A profile that credentials come from.
#[derive(Debug, Clone)]
pub(super) struct Source {
    files: Files,
    name: String,
    web_identity: Option<(String, String)>,
}

/// How `object_store` is given a profile's credentials.
#[derive(Debug)]
pub(super) enum Given {
    /// Asked before each request.
    Provider(AwsCredentialProvider),
    /// A token in a file, to be changed for a role's keys.
    WebIdentity { token_file: String, role: String },
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "profile {} of {}", self.name, self.files)
    }
}

impl Source {
    pub(super) fn provider(&self) -> Given {
        if let Some((token_file, role)) = self.web_identity.clone() {
            return Given::WebIdentity { token_file, role };
        }
        Given::Provider(Arc::new(SharedFiles {
            source: self.clone(),
            read: Mutex::default(),
        }))
    }
}

/// Reads the profile that applies: `asked`, else `AWS_PROFILE`, else `default` if there is one.
pub(super) fn find(asked: Option<&str>) -> Result<Found, ProfileError> {
    let named = asked.map(str::to_owned).or_else(|| variable("AWS_PROFILE"));
    let in_machine = [
        "AWS_WEB_IDENTITY_TOKEN_FILE",
        "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
        "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    ];
    let has_keys = asked.is_none() && variable("AWS_ACCESS_KEY_ID").is_some();
    let has_others = has_keys || in_machine.iter().any(|name| variable(name).is_some());
    Files::of_environment().find(named.as_deref(), has_others, has_keys)
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// The two shared files.
#[derive(Debug, Clone)]
struct Files {
    credentials: Option<PathBuf>,
    config: Option<PathBuf>,
}

impl fmt::Display for Files {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let paths = [&self.credentials, &self.config];
        let shown: Vec<_> = paths
            .into_iter()
            .flatten()
            .map(|path| path.display().to_string())
            .collect();
        f.write_str(&shown.join(" and "))
    }
}

impl Files {
    fn of_environment() -> Self {
        let home = variable("HOME").map(|home| PathBuf::from(home).join(".aws"));
        let path = |name: &str, file: &str| {
            let set = variable(name).map(PathBuf::from);
            set.or_else(|| home.as_ref().map(|home| home.join(file)))
        };
        Self {
            credentials: path("AWS_SHARED_CREDENTIALS_FILE", "credentials"),
            config: path("AWS_CONFIG_FILE", "config"),
        }
    }

    /// `has_others`: credentials would be found elsewhere if the default profile gives none.
    /// `has_keys`: those in the environment win, and only the profile's settings count.
    fn find(
        &self,
        named: Option<&str>,
        has_others: bool,
        has_keys: bool,
    ) -> Result<Found, ProfileError> {
        let name = named.unwrap_or(DEFAULT);
        let read = self.read();
        let sections = match read {
            Err(_) if named.is_none() && has_keys => return Ok(Found::default()),
            read => read?,
        };
        let Some(section) = sections.profile(name) else {
            return match named {
                Some(_) if !has_keys => Err(self.missing(name)),
                _ => Ok(Found::default()),
            };
        };
        let source = match section.credentials(name) {
            _ if has_keys => None,
            Ok(_) => Some(Source {
                files: self.clone(),
                name: name.to_owned(),
                web_identity: section.web_identity(),
            }),
            // a profile of settings, or one that is not the user's choice
            Err(ProfileError::Empty { .. }) if named.is_none() => None,
            Err(_) if named.is_none() && has_others => None,
            Err(ProfileError::Empty { name, .. }) => {
                return Err(ProfileError::Empty {
                    name,
                    files: self.to_string(),
                });
            }
            Err(error) => return Err(error),
        };
        Ok(Found {
            profile: Some(Profile {
                region: section.get("region"),
                endpoint_url: sections.endpoint_url(section),
                source,
            }),
        })
    }

    fn missing(&self, name: &str) -> ProfileError {
        ProfileError::Missing {
            name: name.to_owned(),
            files: self.to_string(),
        }
    }

    /// Both files; one that is not there says nothing. Where both say something, the one for
    /// credentials wins.
    fn read(&self) -> Result<Sections, ProfileError> {
        let mut sections = Sections::default();
        if let Some(text) = self.config.as_deref().map(text).transpose()?.flatten() {
            sections.add(&text, true, self.config.as_deref())?;
        }
        if let Some(text) = self.credentials.as_deref().map(text).transpose()?.flatten() {
            sections.add(&text, false, self.credentials.as_deref())?;
        }
        Ok(sections)
    }

    /// What tells one state of the files from another.
    fn stamp(&self) -> Vec<Option<(u64, u64, i64, i64)>> {
        let paths = [&self.credentials, &self.config];
        let stamp = |path: &Option<PathBuf>| {
            let metadata = std::fs::metadata(path.as_ref()?).ok()?;
            let (seconds, nanos) = (metadata.mtime(), metadata.mtime_nsec());
            Some((metadata.ino(), metadata.len(), seconds, nanos))
        };
        paths.into_iter().map(stamp).collect()
    }
}

fn text(path: &Path) -> Result<Option<String>, ProfileError> {
    let unread = |reason: String| ProfileError::Unread {
        path: path.display().to_string(),
        reason,
    };
    let file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(unread(error.to_string())),
    };
    let mut text = String::new();
    let read = file.take(FILE_BYTES_MAX + 1).read_to_string(&mut text);
    match read.map(u64::try_from) {
        Ok(Ok(length)) if length <= FILE_BYTES_MAX => Ok(Some(text)),
        Ok(_) => Err(unread(format!("it is larger than {FILE_BYTES_MAX} bytes"))),
        Err(error) => Err(unread(error.to_string())),
    }
}

/// The sections of both files, by what they are called in the config file.
#[derive(Debug, Default)]
struct Sections(BTreeMap<String, Section>);

/// One section; a setting below a setting is `outer.inner`. Never shown: it holds secrets.
#[derive(Default)]
struct Section(BTreeMap<String, String>);

impl fmt::Debug for Section {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

impl Sections {
    /// Takes over what a file says. In the config file a profile's section is `[profile name]`,
    /// but `[default]`; in the other it is `[name]`.
    fn add(
        &mut self,
        text: &str,
        is_config: bool,
        path: Option<&Path>,
    ) -> Result<(), ProfileError> {
        let mut section: Option<&mut Section> = None;
        let mut outer = String::new();
        for (index, line) in text.lines().enumerate() {
            let syntax = || ProfileError::Syntax {
                path: path
                    .map(|path| path.display().to_string())
                    .unwrap_or_default(),
                line: index + 1,
            };
            let is_nested = line.starts_with([' ', '\t']);
            let line = without_comment(line).trim();
            if line.is_empty() {
                continue;
            }
            if let Some(rest) = line.strip_prefix('[') {
                let name = rest.strip_suffix(']').ok_or_else(syntax)?;
                let name = section_name(name, is_config);
                section = Some(self.0.entry(name).or_default());
                outer.clear();
                continue;
            }
            let (name, value) = line.split_once('=').ok_or_else(syntax)?;
            let section = section.as_mut().ok_or_else(syntax)?;
            let (name, value) = (name.trim().to_ascii_lowercase(), value.trim());
            if is_nested && !outer.is_empty() {
                section
                    .0
                    .insert(format!("{outer}.{name}"), value.to_owned());
                continue;
            }
            outer = if value.is_empty() {
                name.clone()
            } else {
                String::new()
            };
            section.0.insert(name, value.to_owned());
        }
        Ok(())
    }

    fn profile(&self, name: &str) -> Option<&Section> {
        self.0.get(&format!("profile {name}"))
    }

    /// A service's own section, named by the profile, wins over the profile's own setting.
    fn endpoint_url(&self, profile: &Section) -> Option<String> {
        let services = profile.get("services");
        let services = services.and_then(|name| self.0.get(&format!("services {name}")));
        services
            .and_then(|services| services.get("s3.endpoint_url"))
            .or_else(|| profile.get("s3.endpoint_url"))
            .or_else(|| profile.get("endpoint_url"))
    }
}

/// `#` and `;` begin a comment at the beginning of a line, and after white space.
fn without_comment(line: &str) -> &str {
    if line.trim_start().starts_with(['#', ';']) {
        return "";
    }
    let begins = [" #", " ;", "\t#", "\t;"];
    let at = begins.iter().filter_map(|begin| line.find(begin)).min();
    at.map_or(line, |at| &line[..at])
}

fn section_name(name: &str, is_config: bool) -> String {
    let words: Vec<&str> = name.split_whitespace().collect();
    match (words.as_slice(), is_config) {
        ([DEFAULT], _) => format!("profile {DEFAULT}"),
        ([name], false) => format!("profile {name}"),
        (words, _) => words.join(" "),
    }
}

/// What a profile's credentials are.
enum Credentials {
    Keys(AwsCredential),
    Process(String),
    WebIdentity,
}

impl Section {
    fn get(&self, name: &str) -> Option<String> {
        self.0.get(name).filter(|value| !value.is_empty()).cloned()
    }

    fn web_identity(&self) -> Option<(String, String)> {
        let token_file = self.get("web_identity_token_file")?;
        Some((token_file, self.get("role_arn")?))
    }

    /// In the order of AWS's own tools: a role first, then keys, then a process.
    fn credentials(&self, name: &str) -> Result<Credentials, ProfileError> {
        let name = || name.to_owned();
        let unsupported = |what| ProfileError::Unsupported { name: name(), what };
        if self.web_identity().is_some() {
            return Ok(Credentials::WebIdentity);
        }
        if self.get("role_arn").is_some() {
            return Err(unsupported("to take on another role (role_arn)"));
        }
        let half = |found, missing| ProfileError::Half {
            name: name(),
            found,
            missing,
        };
        let (id, secret) = ("aws_access_key_id", "aws_secret_access_key");
        match (self.get(id), self.get(secret)) {
            (Some(key_id), Some(secret_key)) => {
                return Ok(Credentials::Keys(AwsCredential {
                    key_id,
                    secret_key,
                    token: self.get("aws_session_token"),
                }));
            }
            (Some(_), None) => return Err(half(id, secret)),
            (None, Some(_)) => return Err(half(secret, id)),
            (None, None) => {}
        }
        if let Some(command) = self.get("credential_process") {
            return Ok(Credentials::Process(command));
        }
        if self.get("sso_session").is_some() || self.get("sso_start_url").is_some() {
            return Err(unsupported("a single sign-on (sso)"));
        }
        if self.get("login_session").is_some() {
            return Err(unsupported("a console sign-in (login_session)"));
        }
        Err(ProfileError::Empty {
            name: name(),
            files: String::new(),
        })
    }
}

/// Gives a profile's credentials, read anew when a file changed: keys are rotated under a
/// running stream.
#[derive(Debug)]
struct SharedFiles {
    source: Source,
    read: Mutex<Option<Read>>,
}

/// What was read, and from which state of the files.
struct Read {
    stamp: Vec<Option<(u64, u64, i64, i64)>>,
    handed: Handed,
}

impl fmt::Debug for Read {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Read")
    }
}

#[async_trait::async_trait]
impl CredentialProvider for SharedFiles {
    type Credential = AwsCredential;

    async fn get_credential(&self) -> object_store::Result<Arc<AwsCredential>> {
        let mut read = self.read.lock().await;
        let stamp = self.source.files.stamp();
        if let Some(read) = read.as_ref()
            && read.stamp == stamp
            && read.handed.is_fresh()
        {
            return Ok(Arc::clone(&read.handed.credential));
        }
        let handed = self
            .source
            .ask()
            .await
            .map_err(|error| object_store::Error::Generic {
                store: "S3",
                source: Box::new(error),
            })?;
        let credential = Arc::clone(&handed.credential);
        *read = Some(Read { stamp, handed });
        Ok(credential)
    }
}

impl Source {
    async fn ask(&self) -> Result<Handed, ProfileError> {
        let sections = self.files.read()?;
        let section = sections
            .profile(&self.name)
            .ok_or_else(|| self.files.missing(&self.name))?;
        match section.credentials(&self.name)? {
            Credentials::Keys(keys) => Ok(Handed::for_good(keys)),
            Credentials::Process(command) => {
                let run = credential_process::run(&command).await;
                run.map_err(|reason| ProfileError::Process {
                    name: self.name.clone(),
                    reason,
                })
            }
            Credentials::WebIdentity => Err(ProfileError::Empty {
                name: self.name.clone(),
                files: self.files.to_string(),
            }),
        }
    }
}
