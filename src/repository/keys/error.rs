//! What can be wrong with keys, each in one sentence, and what a user does about it.

use std::path::PathBuf;

use crate::error::{Error, Kind};
use crate::repository::store::StoreError;

/// Why something cannot be encrypted or read.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// A recipient that is none, or of a sort that this build does not know.
    #[error("not a recipient to encrypt to: {found:?}")]
    Recipient {
        /// As it was given.
        found: String,
    },
    /// The secret half stands where the public one belongs. Never shown.
    #[error("an identity (AGE-SECRET-KEY-…) is given as a recipient, and that is the secret half")]
    SecretAsRecipient,
    /// The identity file cannot be read.
    #[error("cannot read the identity file {}: {reason}", path.display())]
    IdentityFile {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        reason: String,
    },
    /// The identity file holds comments at most.
    #[error("no identity in the identity file {}", path.display())]
    NoIdentityInFile {
        /// The file.
        path: PathBuf,
    },
    /// The identity file needs a passphrase.
    #[error("the identity file {} is encrypted itself", path.display())]
    IdentityFileEncrypted {
        /// The file.
        path: PathBuf,
    },
    /// A line of the identity file is no identity. The line is never shown: it may be secret.
    #[error("line {line} of the identity file {} is no identity", path.display())]
    NotAnIdentity {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1.
        line: usize,
    },
    /// There is something to write, and only an identity to encrypt with.
    #[error("an identity file is configured, and no recipients to encrypt to")]
    NoRecipients,
    /// A rotation needs to know for whom.
    #[error("no recipients are configured to rotate to")]
    NobodyToRotateTo,
    /// A rotation opens each key.
    #[error("no identity file is configured, and rotating opens each key")]
    NothingToRotateWith,
    /// The object is encrypted, and nothing can open it.
    #[error("{path} is encrypted, and no identity file is configured: key={key}")]
    NoIdentity {
        /// The object.
        path: String,
        /// The id of its key.
        key: String,
    },
    /// The object is encrypted, and the settings do not speak of encryption at all.
    #[error("{path} is encrypted, and no encryption is configured for this repository: key={key}")]
    NotConfigured {
        /// The object.
        path: String,
        /// The id of its key.
        key: String,
    },
    /// None of the key's wraps is for one of the identities.
    #[error(
        "none of the configured identities opens the key of {path}: key={key}, wraps={wraps}, \
         identities={identities}"
    )]
    WrongIdentity {
        /// The object, or the key itself.
        path: String,
        /// The id of the key.
        key: String,
        /// How many wraps it has.
        wraps: usize,
        /// How many identities were tried on each.
        identities: usize,
    },
    /// There is no wrap of the key, neither stored nor in the object.
    #[error("the key of {path} is gone: no wrap of it is stored: key={key}")]
    KeyGone {
        /// The object.
        path: String,
        /// The id of its key.
        key: String,
    },
    /// A wrap is for one of the identities, and what it holds is not the key.
    #[error("damaged wrap {path}: {reason}")]
    DamagedWrap {
        /// The wrap, or the object that carries it.
        path: String,
        /// What was found.
        reason: String,
    },
    /// The object's header names a key in a way that no archiver does.
    #[error("the header of {path} names no key that could be: {found:?}")]
    BadKeyId {
        /// The object.
        path: String,
        /// What it names.
        found: String,
    },
    /// The object is not encrypted, and should be.
    #[error("{path} is not encrypted, and this repository is configured to be")]
    PlainObject {
        /// The object.
        path: String,
    },
    /// The operating system refused something with the data key of the day.
    #[error("cannot {doing} the data key of the day in {}: {reason}", path.display())]
    State {
        /// What was asked for.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        reason: String,
    },
    /// A later version keeps the data key of the day.
    #[error("{} was written by a later version: format={format}", path.display())]
    NewerState {
        /// The file.
        path: PathBuf,
        /// Its format.
        format: u64,
    },
    /// Another process has held the lock for longer than it could need it.
    #[error("another anywhen holds the lock {} for too long", path.display())]
    StateBusy {
        /// The lock file.
        path: PathBuf,
    },
    /// The key of a new day could not be kept, in a process that has written with others.
    #[error(transparent)]
    NewDay(Box<Self>),
    /// The machine gives no random numbers.
    #[error("this machine gives no random numbers")]
    NoRandomness,
    /// A key could not be wrapped.
    #[error("cannot wrap a data key to {recipient}: {reason}")]
    Wrapping {
        /// The recipient.
        recipient: String,
        /// What the library said.
        reason: String,
    },
    /// What was stored reads back as something else.
    #[error("a wrap reads back as other bytes than were written: {path}")]
    ReadsBackOther {
        /// The wrap.
        path: String,
    },
    /// Some keys could not be rotated; the others were.
    #[error(
        "{keys} of the data keys could not be opened, and were left as they are: first={first}"
    )]
    NotRotated {
        /// How many.
        keys: usize,
        /// Whether some of them are gone: no wrap is stored that anybody could open.
        any_gone: bool,
        /// The first of them.
        first: String,
    },
    /// Damaged objects may need keys that nothing else names; all others were rotated.
    #[error(
        "{objects} damaged objects do not tell which key they need, which may not be rotated: \
         keys left as they were={keys}, first={first}"
    )]
    UnknownKeys {
        /// How many objects.
        objects: u64,
        /// How many keys that are known could not be opened.
        keys: usize,
        /// The first of the objects.
        first: String,
    },
    /// The store's own answer.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl KeyError {
    /// Whether an object is sealed, and what opens it is not configured here.
    pub fn lacks_key(&self) -> bool {
        matches!(
            self,
            Self::NotConfigured { .. } | Self::NoIdentity { .. } | Self::WrongIdentity { .. }
        )
    }

    /// Whether another attempt may succeed.
    pub fn is_unreachable(&self) -> bool {
        match self {
            Self::Store(error) => error.may_pass(),
            Self::NewDay(_) => true,
            _ => false,
        }
    }

    /// The same for a process that has kept keys before: its settings are right, and a disk that is
    /// full or a lock that is held may pass.
    pub(super) fn on_a_new_day(self) -> Self {
        match self {
            Self::State { .. } | Self::StateBusy { .. } => Self::NewDay(Box::new(self)),
            other => other,
        }
    }

    /// Whether it is the object or its key that must be distrusted, rather than the settings.
    pub fn is_damage(&self) -> bool {
        matches!(
            self,
            Self::KeyGone { .. }
                | Self::DamagedWrap { .. }
                | Self::BadKeyId { .. }
                | Self::PlainObject { .. }
                | Self::ReadsBackOther { .. }
                | Self::UnknownKeys { .. }
        )
    }

    fn kind(&self) -> Kind {
        match self {
            // the settings do not fit the repository: other settings do
            Self::Recipient { .. }
            | Self::SecretAsRecipient
            | Self::IdentityFile { .. }
            | Self::NoIdentityInFile { .. }
            | Self::IdentityFileEncrypted { .. }
            | Self::NotAnIdentity { .. }
            | Self::NoRecipients
            | Self::NobodyToRotateTo
            | Self::NothingToRotateWith
            | Self::NoIdentity { .. }
            | Self::NotConfigured { .. }
            | Self::WrongIdentity { .. }
            | Self::NotRotated {
                any_gone: false, ..
            } => Kind::Usage,
            // no settings help: what is stored is not what was stored
            Self::KeyGone { .. }
            | Self::DamagedWrap { .. }
            | Self::BadKeyId { .. }
            | Self::PlainObject { .. }
            | Self::ReadsBackOther { .. }
            | Self::NotRotated { any_gone: true, .. }
            | Self::UnknownKeys { .. } => Kind::Damaged,
            Self::State { .. }
            | Self::NewerState { .. }
            | Self::StateBusy { .. }
            | Self::NoRandomness
            | Self::Wrapping { .. } => Kind::Failure,
            Self::NewDay(_) | Self::Store(_) => Kind::Unreachable,
        }
    }

    fn hint(&self) -> Option<&'static str> {
        Some(match self {
            Self::Recipient { .. } => {
                "a recipient is age1 and 58 more letters and digits, as `anywhen keys generate` \
                 and age-keygen print it"
            }
            Self::SecretAsRecipient => {
                "give the public key, age1…, that `age-keygen -y FILE` prints; and make a new \
                 identity if this one was seen by anybody"
            }
            Self::IdentityFile { .. } => {
                "check identity_file; `anywhen keys generate -o FILE` makes a new one, which opens \
                 nothing that is stored already"
            }
            Self::NoIdentityInFile { .. } => {
                "the file of `anywhen keys generate` or age-keygen holds a line AGE-SECRET-KEY-1…"
            }
            Self::IdentityFileEncrypted { .. } => {
                "anywhen asks for no passphrase: decrypt it with `age -d`, and keep the result \
                 where only this user can read it"
            }
            Self::NotAnIdentity { .. } => {
                "each line is AGE-SECRET-KEY-1…, or a comment that begins with #; keys of ssh and \
                 of plugins are not supported"
            }
            Self::NoRecipients => {
                "set recipients to the age1… that the identity file names; or accept_plain to \
                 write without encryption from now on"
            }
            Self::NobodyToRotateTo => {
                "set recipients (--recipient) to all that shall open the keys from now on"
            }
            Self::NothingToRotateWith => {
                "set identity_file (--identity-file) to the file of somebody who opens them now"
            }
            Self::NoIdentity { .. } => {
                "set identity_file (--identity-file) to the file that belongs to one of the \
                 recipients"
            }
            Self::NotConfigured { .. } => {
                "set identity_file (--identity-file) to read it, and recipients to go on writing \
                 encrypted"
            }
            Self::WrongIdentity { .. } => {
                "`anywhen keys list` shows for whom the keys are wrapped; configure the identity \
                 of one of them"
            }
            Self::KeyGone { .. } => {
                "restore the folder keys/ from a copy of the repository; without it this object \
                 cannot be read by anybody"
            }
            Self::DamagedWrap { .. } => {
                "restore the folder keys/ from a copy of the repository, or use another identity; \
                 `anywhen keys rotate` with an identity that still opens the key writes it anew"
            }
            Self::BadKeyId { .. } => "restore this object from a copy of the repository",
            Self::PlainObject { .. } => {
                "whoever can write to the repository could have put it there; accept_plain = true \
                 reads what was stored before encryption was set up"
            }
            Self::State { .. } => {
                "state_dir must belong to the user that runs anywhen, with room on its disk"
            }
            Self::NewerState { .. } => "upgrade anywhen, or choose another state_dir",
            Self::StateBusy { .. } => "is one of them stuck? stop it, then try again",
            Self::ReadsBackOther { .. } => "nothing was retired; is the store sound?",
            Self::NotRotated { any_gone: true, .. } => {
                "the keys of which no wrap is stored are gone: restore the folder keys/ from a copy \
                 of the repository, then rotate again; `anywhen keys rotate --dry-run` names each"
            }
            Self::NotRotated { .. } => {
                "add the identities that open them to the identity file, then rotate again"
            }
            Self::UnknownKeys { .. } => {
                "restore these objects from a copy of the repository, or remove them, then rotate \
                 again; the log names each"
            }
            Self::NewDay(inner) => return inner.hint(),
            Self::NoRandomness | Self::Wrapping { .. } | Self::Store(_) => return None,
        })
    }
}

impl From<KeyError> for Error {
    fn from(error: KeyError) -> Self {
        let failure = Self::new(error.kind(), error.to_string());
        let hint = error.hint();
        match (error, hint) {
            (KeyError::Store(inner), _) => inner.into(),
            (_, Some(hint)) => failure.hint(hint),
            (_, None) => failure,
        }
    }
}
