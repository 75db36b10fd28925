//! The key that the stories encrypt to, and what opens their objects without the product's key ring:
//! age's own programs.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use container::{DataKey, Header, Reading, read_header};

use crate::ground::{give, shared_folder};

/// An age identity, made once for all stories of this run.
pub(crate) struct Identity {
    pub(crate) recipient: String,
    pub(crate) file: PathBuf,
}

impl Identity {
    pub(crate) fn get() -> &'static Self {
        static IDENTITY: OnceLock<Identity> = OnceLock::new();
        IDENTITY.get_or_init(|| Self::new(&shared_folder().join("identity")))
    }

    /// Another identity, which opens nothing of the others'.
    pub(crate) fn new(file: &Path) -> Self {
        run(Command::new("age-keygen").arg("-o").arg(file));
        give(file);
        Self {
            recipient: recipient_of(file),
            file: file.to_owned(),
        }
    }
}

/// The recipient of an identity, by age's own word.
pub(crate) fn recipient_of(identity: &Path) -> String {
    let recipient = run(Command::new("age-keygen").arg("-y").arg(identity));
    String::from_utf8(recipient).unwrap().trim().to_owned()
}

/// Whether a stored object is encrypted; none where it is no container.
#[track_caller]
pub(crate) fn is_sealed(object: &Path) -> Option<bool> {
    let stored = fs::read(object).unwrap();
    match read_header(&stored) {
        Ok(Reading::Done((header, _))) => Some(header.key.is_some()),
        _ => None,
    }
}

/// What age makes of a wrapped key.
#[track_caller]
pub(crate) fn unwrapped(wrap: &Path) -> DataKey {
    let identity = &Identity::get().file;
    let mut age = Command::new("age");
    let hex = run(age.arg("-d").arg("-i").arg(identity).arg(wrap));
    DataKey::from_hex(String::from_utf8(hex).unwrap().trim()).unwrap()
}

/// The data key of a stored object; none where the object is not encrypted.
#[track_caller]
pub(crate) fn data_key(object: &Path, header: &Header) -> Option<DataKey> {
    let id = header.key.as_ref()?;
    if let Some(wrap) = header.wraps.first() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&BASE64.decode(wrap).unwrap()).unwrap();
        return Some(unwrapped(file.path()));
    }
    let repository = object
        .ancestors()
        .find(|folder| folder.join("keys").join(id).is_dir())
        .unwrap_or_else(|| panic!("nothing wraps {id}, the key of {}", object.display()));
    let wraps = fs::read_dir(repository.join("keys").join(id)).unwrap();
    let wrap = wraps.into_iter().next().expect("a wrap").unwrap().path();
    Some(unwrapped(&wrap))
}

#[track_caller]
fn run(command: &mut Command) -> Vec<u8> {
    let Output {
        status,
        stdout,
        stderr,
    } = command
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}: the package age has it"));
    assert!(
        status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&stderr)
    );
    stdout
}
