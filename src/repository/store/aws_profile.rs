//! Credentials of AWS's shared files, `~/.aws/credentials` and `~/.aws/config`, which
//! `object_store` does not read.
//!
//! Profiles that need a sign-in or another account's role are beyond us; `credential_process`
//! reaches them.

use std::fmt;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::sync::Arc;

use object_store::CredentialProvider;
use object_store::aws::{AwsCredential, AwsCredentialProvider};
use tokio::sync::Mutex;

use super::aws_files::{self, Credentials, DEFAULT, ProfileError, Sections};
use super::credential_process::{self, Handed};

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
        let shared = Shared {
            source: self.clone(),
            read: Mutex::default(),
        };
        Given::Provider(Arc::new(SharedFiles(Arc::new(shared))))
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

/// What tells one state of the two files from another.
type Stamp = Vec<Option<(u64, u64, i64, i64)>>;

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
        if let Some(text) = self
            .config
            .as_deref()
            .map(aws_files::text)
            .transpose()?
            .flatten()
        {
            sections.add(&text, true, self.config.as_deref())?;
        }
        if let Some(text) = self
            .credentials
            .as_deref()
            .map(aws_files::text)
            .transpose()?
            .flatten()
        {
            sections.add(&text, false, self.credentials.as_deref())?;
        }
        Ok(sections)
    }

    /// What tells one state of the files from another.
    fn stamp(&self) -> Stamp {
        let paths = [&self.credentials, &self.config];
        let stamp = |path: &Option<PathBuf>| {
            let metadata = std::fs::metadata(path.as_ref()?).ok()?;
            let (seconds, nanos) = (metadata.mtime(), metadata.mtime_nsec());
            Some((metadata.ino(), metadata.len(), seconds, nanos))
        };
        paths.into_iter().map(stamp).collect()
    }
}

/// Gives a profile's credentials, read anew when a file changed: keys are rotated under a
/// running stream.
#[derive(Debug)]
struct SharedFiles(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    source: Source,
    read: Mutex<Option<Read>>,
}

/// What was read, and from which state of the files.
struct Read {
    stamp: Stamp,
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
        let shared = Arc::clone(&self.0);
        // a slow process goes on when the request that needed it is given up; the next one gets
        // what it says
        let asked = tokio::spawn(async move { shared.credential().await }).await;
        let asked = asked.map_err(|error| object_store::Error::JoinError { source: error })?;
        asked.map_err(|error| object_store::Error::Generic {
            store: "S3",
            source: Box::new(error),
        })
    }
}

impl Shared {
    async fn credential(&self) -> Result<Arc<AwsCredential>, ProfileError> {
        let mut read = self.read.lock().await;
        let stamp = self.source.files.stamp();
        if let Some(read) = read.as_ref()
            && read.stamp == stamp
            && read.handed.is_fresh()
        {
            return Ok(Arc::clone(&read.handed.credential));
        }
        let handed = self.source.ask().await?;
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

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder with both files, and what they are.
    fn files(credentials: &str, config: &str) -> (tempfile::TempDir, Files) {
        let folder = tempfile::tempdir().unwrap();
        let files = Files {
            credentials: Some(folder.path().join("credentials")),
            config: Some(folder.path().join("config")),
        };
        for (path, text) in [(&files.credentials, credentials), (&files.config, config)] {
            std::fs::write(path.as_ref().unwrap(), text).unwrap();
        }
        (folder, files)
    }

    async fn keys(files: &Files, named: Option<&str>) -> (String, String, Option<String>) {
        let found = files.find(named, false, false).unwrap();
        let source = found.profile.unwrap().source.unwrap();
        let Given::Provider(provider) = source.provider() else {
            panic!("no provider");
        };
        let keys = provider.get_credential().await.unwrap();
        (
            keys.key_id.clone(),
            keys.secret_key.clone(),
            keys.token.clone(),
        )
    }

    #[tokio::test]
    async fn finds_keys_and_settings_where_aws_tools_do() {
        let (_folder, files) = files(
            "# mine\n[default]\naws_access_key_id = ID\naws_secret_access_key=a+b/c=\n\
             [ work ]\nAWS_ACCESS_KEY_ID=W\naws_secret_access_key = S ; not mine\n\
             aws_session_token = T\n",
            "[default]\nregion = eu-west-1\n[profile work]\nregion=us-east-2\n\
             endpoint_url = https://other\nservices = mine\ns3 =\n  addressing_style = path\n\
             [services mine]\ns3 =\n  endpoint_url = https://store:9000\n",
        );
        let secret = "a+b/c=".to_owned();
        assert_eq!(keys(&files, None).await, ("ID".to_owned(), secret, None));
        let work = ("W".to_owned(), "S".to_owned(), Some("T".to_owned()));
        assert_eq!(keys(&files, Some("work")).await, work);
        let found = files.find(Some("work"), false, false).unwrap();
        let profile = found.profile.unwrap();
        assert_eq!(profile.region.as_deref(), Some("us-east-2"));
        assert_eq!(profile.endpoint_url.as_deref(), Some("https://store:9000"));
        let shown = format!("{profile:?} {}", profile.source.as_ref().unwrap());
        assert!(
            !shown.contains("a+b") && shown.contains("profile work"),
            "{shown}"
        );
    }

    #[tokio::test]
    async fn keys_that_were_rotated_are_used_at_once() {
        // a stream runs for months; its keys do not
        let text = |id| format!("[default]\naws_access_key_id={id}\naws_secret_access_key=S\n");
        let (_folder, files) = files(&text("FIRST"), "");
        let found = files.find(None, false, false).unwrap();
        let source = found.profile.unwrap().source.unwrap();
        let Given::Provider(provider) = source.provider() else {
            panic!("no provider");
        };
        assert_eq!(provider.get_credential().await.unwrap().key_id, "FIRST");
        std::fs::write(files.credentials.as_ref().unwrap(), text("SECOND!")).unwrap();
        assert_eq!(provider.get_credential().await.unwrap().key_id, "SECOND!");
        std::fs::write(files.credentials.as_ref().unwrap(), "[other]\n").unwrap();
        assert!(provider.get_credential().await.is_err());
    }

    #[test]
    fn what_is_not_supported_is_said_with_the_way_out() {
        let unsupported = [
            "role_arn = arn:aws:iam::1:role/x\nsource_profile = base",
            "sso_session = mine\nsso_account_id = 1",
            "sso_start_url = https://x",
            "login_session = arn:x",
        ];
        for lines in unsupported {
            let (_folder, files) = files("", &format!("[profile x]\n{lines}\n"));
            let error = files.find(Some("x"), false, false).unwrap_err();
            assert!(matches!(error, ProfileError::Unsupported { .. }), "{error}");
            assert!(error.way_out().contains("export-credentials --profile x"));
        }
        for lines in ["aws_access_key_id = x", "aws_secret_access_key = x"] {
            let (_folder, files) = files(&format!("[x]\n{lines}\n"), "");
            let error = files.find(Some("x"), false, false).unwrap_err();
            assert!(matches!(error, ProfileError::Half { .. }), "{error}");
        }
        let (_folder, files) = files("[x]\n", "");
        let error = |name| files.find(Some(name), false, false).unwrap_err();
        assert!(matches!(error("y"), ProfileError::Missing { .. }));
        assert!(matches!(error("x"), ProfileError::Empty { .. }));
    }

    #[test]
    fn a_profile_that_nobody_chose_stands_in_nobodys_way() {
        let (_folder, sso) = files("", "[default]\nsso_session = x\nregion = eu-west-1\n");
        assert!(sso.find(None, false, false).is_err());
        for has_keys in [false, true] {
            let found = sso.find(None, true, has_keys).unwrap().profile.unwrap();
            assert!(found.source.is_none());
            assert_eq!(found.region.as_deref(), Some("eu-west-1"));
        }
        let (_folder, plain) = files("", "[default]\nregion = x\n");
        let found = plain.find(None, false, false).unwrap().profile.unwrap();
        assert!(found.source.is_none());
        let none = Files {
            credentials: None,
            config: Some(PathBuf::from("/nonexistent/config")),
        };
        assert!(none.find(None, false, false).unwrap().profile.is_none());
        assert!(none.find(Some("x"), false, true).unwrap().profile.is_none());
    }

    #[test]
    fn hostile_files_are_refused_and_never_repeated() {
        for text in [
            "aws_secret_access_key = SECRET",
            "[default\nSECRET",
            "[default]\nSECRET",
            "[default]\n= SECRET\nSECRET\n",
            "\u{0}\u{1}SECRET",
            "[]\n[[]]\n[\n",
        ] {
            let (_folder, files) = files(text, "");
            let error = files.find(Some("default"), false, false).unwrap_err();
            let said = format!("{error} {error:?} {}", error.way_out());
            assert!(!said.contains("SECRET"), "{said}");
        }
        let (_folder, large) = files(&"#".repeat(2 << 20), "");
        let error = large.find(None, false, false).unwrap_err();
        assert!(matches!(error, ProfileError::Unread { .. }), "{error}");
        let (folder, binary) = files("", "");
        std::fs::write(folder.path().join("credentials"), [0xff, 0xfe, 0x00]).unwrap();
        let error = binary.find(None, false, false).unwrap_err();
        assert!(matches!(error, ProfileError::Unread { .. }), "{error}");
        assert!(
            binary.find(None, true, true).is_ok(),
            "keys are in the environment"
        );
    }

    #[test]
    fn a_web_identity_of_a_profile_is_handed_on() {
        let lines = "[profile x]\nrole_arn = R\nweb_identity_token_file = /t\n";
        let (_folder, files) = files("", lines);
        let found = files.find(Some("x"), false, false).unwrap();
        let given = found.profile.unwrap().source.unwrap().provider();
        assert!(matches!(given, Given::WebIdentity { role, .. } if role == "R"));
    }

    #[tokio::test]
    async fn a_process_is_asked_again_when_its_credentials_end() {
        let (folder, files) = files("", "");
        let count = folder.path().join("count");
        let set = |expiration: &str| {
            let json = format!(
                r#"{{"Version":1,"AccessKeyId":"P","SecretAccessKey":"S","SessionToken":"T"{expiration}}}"#
            );
            let command = format!("echo x >> {}; echo '{json}'", count.display());
            let text = format!("[profile x]\ncredential_process = {command}\n");
            std::fs::write(files.config.as_ref().unwrap(), text).unwrap();
            let found = files.find(Some("x"), false, false).unwrap();
            let Given::Provider(provider) = found.profile.unwrap().source.unwrap().provider()
            else {
                panic!("no provider");
            };
            provider
        };
        let runs = || std::fs::read_to_string(&count).map_or(0, |text| text.lines().count());
        for (expiration, expected) in [
            ("", 1),
            (r#","Expiration":"2999-01-01T00:00:00Z""#, 1),
            (r#","Expiration":"2001-01-01T00:00:00Z""#, 2),
        ] {
            let (provider, before) = (set(expiration), runs());
            for _ in 0..2 {
                assert_eq!(provider.get_credential().await.unwrap().key_id, "P");
            }
            assert_eq!(runs() - before, expected, "{expiration}");
        }
    }
}
