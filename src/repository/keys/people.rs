//! Who may open data keys: recipients, which are public, and the identities that answer to them.
//!
//! Both are age's (age-encryption.org/v1, X25519): what `age-keygen` makes works here, and the
//! `age` command opens what is wrapped here.

use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use age::secrecy::{ExposeSecret as _, SecretString};
use age::x25519;
use zeroize::Zeroizing;

use super::KeyError;
use super::id::WrapId;

/// The secret half of a recipient begins so.
const SECRET_PREFIX: &str = "AGE-SECRET-KEY-";
/// A file of identities is small; what is longer is something else.
const IDENTITY_FILE_BYTES_MAX: u64 = 1 << 20;
/// Room for some ten identities with their comments.
const IDENTITY_FILE_BYTES_USUAL: usize = 4096;
/// Everybody may read or write the file.
const MODE_OTHERS: u32 = 0o006;

/// Somebody to encrypt to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Recipient {
    key: x25519::Recipient,
    text: String,
}

impl Recipient {
    /// Reads `age1…`.
    pub(super) fn parse(text: &str) -> Result<Self, KeyError> {
        let text = text.trim();
        if text.to_ascii_uppercase().contains(SECRET_PREFIX) {
            return Err(KeyError::SecretAsRecipient);
        }
        match text.parse::<x25519::Recipient>() {
            Ok(key) => Ok(Self::of(key)),
            Err(_reason) => Err(KeyError::Recipient {
                found: text.to_owned(),
            }),
        }
    }

    /// Reads a list; somebody who stands in it twice is taken once. Sorted.
    pub(super) fn parse_all(texts: &[String]) -> Result<Vec<Self>, KeyError> {
        let mut recipients: Vec<Self> = texts
            .iter()
            .map(|text| Self::parse(text))
            .collect::<Result<_, _>>()?;
        recipients.sort_by(|a, b| a.text.cmp(&b.text));
        recipients.dedup();
        Ok(recipients)
    }

    fn of(key: x25519::Recipient) -> Self {
        // spelt in one way only, since the wrap id is made from it
        let text = key.to_string();
        Self { key, text }
    }

    /// As age spells it, `age1…`.
    pub(super) fn as_str(&self) -> &str {
        &self.text
    }

    /// The id of the wraps for it.
    pub(super) fn wrap_id(&self) -> WrapId {
        WrapId::of(&self.text)
    }

    pub(super) fn as_age(&self) -> &x25519::Recipient {
        &self.key
    }
}

/// The identities of a file; none where no file is configured.
#[derive(Default)]
pub(super) struct Identities {
    list: Vec<x25519::Identity>,
}

impl std::fmt::Debug for Identities {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} identities", self.list.len())
    }
}

impl Identities {
    /// Reads an identity file. A file that everybody can read is said so, and used.
    pub(super) fn read(path: &Path) -> Result<Self, KeyError> {
        let unreadable = |error: &dyn std::fmt::Display| KeyError::IdentityFile {
            path: path.to_owned(),
            reason: error.to_string(),
        };
        let file = File::open(path).map_err(|error| unreadable(&error))?;
        let metadata = file.metadata().map_err(|error| unreadable(&error))?;
        if metadata.mode() & MODE_OTHERS != 0 && metadata.is_file() {
            tracing::warn!(
                "the identity file {} is open to every user of this machine: chmod 600 it",
                path.display()
            );
        }
        // room from the start, for a usual file: growing would leave copies behind
        let mut text = Zeroizing::new(Vec::with_capacity(IDENTITY_FILE_BYTES_USUAL));
        file.take(IDENTITY_FILE_BYTES_MAX)
            .read_to_end(&mut text)
            .map_err(|error| unreadable(&error))?;
        Self::parse(&text, path)
    }

    /// Reads the text of an identity file; `path` is for messages.
    fn parse(text: &[u8], path: &Path) -> Result<Self, KeyError> {
        let path = path.to_owned();
        // binary and armoured age files
        if text.starts_with(b"age-encryption.org/") || text.starts_with(b"-----BEGIN AGE ENCRYPTED")
        {
            return Err(KeyError::IdentityFileEncrypted { path });
        }
        let mut list = Vec::new();
        for (at, line) in text.split(|byte| *byte == b'\n').enumerate() {
            let line = line.trim_ascii();
            if line.is_empty() || line.starts_with(b"#") {
                continue;
            }
            let identity = str::from_utf8(line).ok().and_then(|line| line.parse().ok());
            let Some(identity) = identity else {
                let line = at.saturating_add(1);
                return Err(KeyError::NotAnIdentity { path, line });
            };
            list.push(identity);
        }
        if list.is_empty() {
            return Err(KeyError::NoIdentityInFile { path });
        }
        Ok(Self { list })
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.list.len()
    }

    /// Whether there are none.
    pub(super) fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// Whom they answer to.
    pub(super) fn recipients(&self) -> impl Iterator<Item = Recipient> {
        self.list
            .iter()
            .map(|identity| Recipient::of(identity.to_public()))
    }

    pub(super) fn as_age(&self) -> impl Iterator<Item = &dyn age::Identity> {
        self.list
            .iter()
            .map(|identity| -> &dyn age::Identity { identity })
    }
}

/// Where an identity file is: a relative one is looked up in the folder of credentials that
/// systemd hands to a service (systemd.exec(5), `LoadCredential=`), then in the working directory.
pub(super) fn find(path: &Path, credentials: Option<&Path>) -> PathBuf {
    let handed = credentials
        .filter(|_| path.is_relative())
        .map(|folder| folder.join(path));
    match handed {
        Some(file) if file.exists() => file,
        _ => path.to_owned(),
    }
}

/// An identity that was made just now.
#[derive(Debug)]
pub struct NewIdentity {
    /// Its public half.
    pub recipient: String,
    secret: SecretString,
}

impl NewIdentity {
    /// Makes one.
    pub fn generate() -> Self {
        let identity = x25519::Identity::generate();
        Self {
            recipient: identity.to_public().to_string(),
            secret: identity.to_string(),
        }
    }

    /// The identity file, as age-keygen writes it.
    pub fn file(&self, made_at: jiff::Timestamp) -> Zeroizing<String> {
        // room from the start: growing would leave copies behind
        let mut text = Zeroizing::new(String::with_capacity(512));
        for part in [
            "# created: ",
            &made_at.strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
            "\n# public key: ",
            &self.recipient,
            "\n",
            self.secret.expose_secret(),
            "\n",
        ] {
            text.push_str(part);
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Identities, KeyError> {
        Identities::parse(text.as_bytes(), Path::new("id"))
    }

    #[test]
    fn a_new_identity_is_read_back_and_answers_to_its_recipient() {
        let new = NewIdentity::generate();
        let file = new.file(jiff::Timestamp::UNIX_EPOCH);
        let crlf = format!("\r\n{}", file.replace('\n', "\r\n"));
        for text in [file.as_str(), crlf.as_str()] {
            let read = parse(text).unwrap();
            let answers: Vec<Recipient> = read.recipients().collect();
            assert_eq!(answers, [Recipient::parse(&new.recipient).unwrap()]);
        }
        assert!(!format!("{new:?}").contains("SECRET-KEY-1"));
    }

    #[test]
    fn a_secret_is_never_echoed() {
        // it would end up in logs and in tickets
        let new = NewIdentity::generate();
        let secret = new.secret.expose_secret().to_owned();
        for given in [
            secret.clone(),
            secret.to_ascii_lowercase(),
            format!(" {secret}x"),
        ] {
            let error = Recipient::parse(&given).unwrap_err();
            assert!(matches!(error, KeyError::SecretAsRecipient));
            let shown = crate::error::Error::from(error).to_string().to_uppercase();
            assert!(!shown.contains(&secret[20..]), "{shown}");
        }
        let cut = &secret[..secret.len() - 1];
        let error = parse(&format!("# mine\n{cut}\n")).unwrap_err();
        assert!(matches!(error, KeyError::NotAnIdentity { line: 2, .. }));
        assert!(!format!("{error} {error:?}").contains(&secret[20..40]));
    }

    #[test]
    fn says_what_is_wrong_with_an_identity_file() {
        let public = NewIdentity::generate().recipient;
        assert!(matches!(
            parse("# none\n\n"),
            Err(KeyError::NoIdentityInFile { .. })
        ));
        assert!(matches!(
            parse(&public),
            Err(KeyError::NotAnIdentity { line: 1, .. })
        ));
        for encrypted in [
            "age-encryption.org/v1\n-> scrypt x 18\n",
            "-----BEGIN AGE ENCRYPTED FILE-----\n",
        ] {
            let error = parse(encrypted).unwrap_err();
            assert!(matches!(error, KeyError::IdentityFileEncrypted { .. }));
        }
        let binary = b"age-encryption.org/v1\n-> scrypt x 18\n\xff\x00";
        let error = Identities::parse(binary, Path::new("id")).unwrap_err();
        assert!(matches!(error, KeyError::IdentityFileEncrypted { .. }));
        let missing = Identities::read(Path::new("/nonexistent/id"));
        assert!(matches!(missing, Err(KeyError::IdentityFile { .. })));
    }

    #[test]
    fn a_recipient_that_is_none_is_named_with_how_one_looks() {
        for bad in ["", "age1x", "ssh-ed25519 AAAA", "age1yubikey1qwt50d05"] {
            let error = crate::error::Error::from(Recipient::parse(bad).unwrap_err());
            assert_eq!(error.kind(), crate::error::Kind::Usage, "{bad}");
            assert!(error.message().contains(&format!("{bad:?}")), "{error}");
            assert!(error.hint_text().unwrap().contains("age1"), "{error}");
        }
        let good = NewIdentity::generate().recipient;
        let shouted = Recipient::parse(&good.to_ascii_uppercase()).unwrap();
        let twice = Recipient::parse_all(&[good.clone(), good.to_ascii_uppercase()]).unwrap();
        assert_eq!((shouted.as_str(), twice.len()), (good.as_str(), 1));
    }

    #[test]
    fn a_relative_identity_file_is_looked_up_among_credentials_first() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("identity"), "").unwrap();
        let found = |path: &str| find(Path::new(path), Some(folder.path()));
        assert_eq!(found("identity"), folder.path().join("identity"));
        assert_eq!(found("other"), Path::new("other"));
        assert_eq!(found("/etc/identity"), Path::new("/etc/identity"));
    }
}

#[cfg(test)]
pub(super) mod testing {
    use super::*;

    impl Identities {
        /// All of several.
        pub(crate) fn joined(several: &[&Self]) -> Self {
            let list = several.iter().flat_map(|one| one.list.iter().cloned());
            Self {
                list: list.collect(),
            }
        }
    }

    /// Somebody new: the identity, and whom it answers to.
    pub(crate) fn identity() -> (Identities, Recipient) {
        let identity = x25519::Identity::generate();
        let recipient = Recipient::of(identity.to_public());
        let list = vec![identity];
        (Identities { list }, recipient)
    }
}
