//! The text of AWS's shared files.
//!
//! The format: <https://docs.aws.amazon.com/sdkref/latest/guide/file-format.html>.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Read as _};
use std::path::Path;

use object_store::aws::AwsCredential;

/// The files hold a few lines per profile.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// The profile that is taken where none is named.
pub(super) const DEFAULT: &str = "default";

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

/// What a profile's credentials are.
pub(super) enum Credentials {
    Keys(AwsCredential),
    Process(String),
    WebIdentity,
}

pub(super) fn text(path: &Path) -> Result<Option<String>, ProfileError> {
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
pub(super) struct Sections(BTreeMap<String, Section>);

/// One section; a setting below a setting is `outer.inner`. Never shown: it holds secrets.
#[derive(Default)]
pub(super) struct Section(BTreeMap<String, String>);

impl fmt::Debug for Section {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

impl Sections {
    /// Takes over what a file says. In the config file a profile's section is `[profile name]`,
    /// but `[default]`; in the other it is `[name]`.
    pub(super) fn add(
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

    pub(super) fn profile(&self, name: &str) -> Option<&Section> {
        self.0.get(&format!("profile {name}"))
    }

    /// A service's own section, named by the profile, wins over the profile's own setting.
    pub(super) fn endpoint_url(&self, profile: &Section) -> Option<String> {
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

impl Section {
    pub(super) fn get(&self, name: &str) -> Option<String> {
        self.0.get(name).filter(|value| !value.is_empty()).cloned()
    }

    pub(super) fn web_identity(&self) -> Option<(String, String)> {
        let token_file = self.get("web_identity_token_file")?;
        Some((token_file, self.get("role_arn")?))
    }

    /// In the order of AWS's own tools: a role first, then keys, then a process.
    pub(super) fn credentials(&self, name: &str) -> Result<Credentials, ProfileError> {
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
