//! The claims of this module, against a local repository.

mod failing;
mod reading;
mod rotation;
mod writing;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use container::Header;
use jiff::{SignedDuration, Timestamp};

use super::people::testing::identity;
use super::*;
use crate::repository::store::StoreOptions;

/// A repository in a folder, with people around it.
struct Stage {
    folder: tempfile::TempDir,
    clock: Arc<SetClock>,
}

/// A clock that stands until it is set.
struct SetClock(Mutex<Timestamp>);

impl Clock for SetClock {
    fn now(&self) -> Timestamp {
        *self.0.lock().unwrap()
    }
}

/// What an [`Encryption`] of the test is told.
#[derive(Default)]
struct Told {
    recipients: Vec<Recipient>,
    identities: Identities,
    accept_plain: bool,
    shares_state: bool,
}

impl Told {
    fn archiver(recipients: &[&Recipient]) -> Self {
        Self {
            recipients: recipients.iter().copied().cloned().collect(),
            shares_state: true,
            ..Self::default()
        }
    }

    fn reader(identities: Identities) -> Self {
        Self {
            identities,
            ..Self::default()
        }
    }
}

impl Stage {
    fn new() -> Self {
        let noon: Timestamp = "2026-11-20T12:00:00Z".parse().unwrap();
        Self {
            folder: tempfile::tempdir().unwrap(),
            clock: Arc::new(SetClock(Mutex::new(noon))),
        }
    }

    fn repository(&self) -> PathBuf {
        self.folder.path().join("repository")
    }

    fn store(&self) -> Store {
        let options = StoreOptions::at(self.repository().to_str().unwrap());
        Store::open(&options, true).unwrap()
    }

    fn later(&self, hours: i64) {
        let mut now = self.clock.0.lock().unwrap();
        *now = now.checked_add(SignedDuration::from_hours(hours)).unwrap();
    }

    /// A new process with these settings.
    fn process(&self, told: Told) -> Encryption {
        self.process_over(&self.store(), told)
    }

    /// The same over another store.
    fn process_over(&self, store: &Store, told: Told) -> Encryption {
        let mut recipients = told.recipients;
        recipients.sort_by(|a, b| a.as_str().cmp(b.as_str()));
        let settings = EncryptionSettings {
            recipients: Vec::new(),
            identity_file: None,
            accept_plain: told.accept_plain,
            state_dir: told.shares_state.then(|| self.folder.path().join("state")),
            scope: String::new(),
        };
        let clock: Arc<dyn Clock> = Arc::clone(&self.clock) as _;
        Encryption::of(&settings, recipients, told.identities, store, clock)
    }

    /// The wraps that are stored, below `keys/`.
    async fn wraps(&self) -> Vec<String> {
        let listed = self.store().below(FOLDER).list("").await.unwrap();
        listed.into_iter().map(|object| object.path).collect()
    }

    fn wrap_file(&self, id: &KeyId, recipient: &Recipient) -> PathBuf {
        let path = id::wrap_path(id, &recipient.wrap_id());
        self.repository().join(FOLDER).join(path)
    }

    /// Stores a history file as an archiver does, and returns its header.
    async fn store_object(&self, archiver: &Encryption, timeline: u32) -> Header {
        store_object_in(&self.store(), archiver, timeline).await
    }
}

async fn store_object_in(store: &Store, archiver: &Encryption, timeline: u32) -> Header {
    let name = format!("wal/{timeline:08X}.history");
    let (header, object) = object_of(archiver, "history", &name).await;
    let store = store.below("main").below("7");
    store.create(&name, Bytes::from(object)).await.unwrap();
    header
}

/// An object as an archiver makes it, with its header.
async fn object_of(archiver: &Encryption, kind: &str, name: &str) -> (Header, Vec<u8>) {
    let mut header = Header::new(kind, name, "main", "7");
    let sealing = archiver.sealing().await.unwrap();
    if let Some(sealing) = &sealing {
        sealing.header_fields(&mut header).unwrap();
    }
    let key = sealing.as_ref().map(Sealing::key);
    let object = container::encode(&header, b"plain", serde_json::Map::new(), 1, key).unwrap();
    (header, object)
}

/// Opens the key of a header.
async fn open(reader: &Encryption, header: &Header) -> Result<Option<DataKey>, KeyError> {
    reader.key_for(header, "main/7/x").await
}

async fn opens(reader: &Encryption, header: &Header) -> bool {
    open(reader, header).await.is_ok_and(|key| key.is_some())
}

async fn id_now(archiver: &Encryption) -> KeyId {
    archiver.sealing().await.unwrap().unwrap().key_id().clone()
}

fn flip_last_byte(path: &Path) {
    let mut bytes = std::fs::read(path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(path, bytes).unwrap();
}
