//! Keys: whom objects are encrypted to, the data key of the day, and finding the key of an object.
//!
//! An archiver needs public recipients only. It makes a data key a day, wraps it to each of them
//! with age, and forgets it once there are two newer ones: what was stored before, it cannot read.
//! The wraps lie under `keys/` where a `state_dir` lets all calls of an archiver share the key, else
//! in each object. A wrap is stored before anything that needs it.

mod carried;
mod error;
mod id;
mod list;
mod people;
mod rotate;
mod state;
mod stored;
mod wrap;

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use aws_lc_rs::rand::{SecureRandom as _, SystemRandom};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use container::{DataKey, Header, KEY_BYTES};
use jiff::civil::Date;
use jiff::{SignedDuration, Timestamp};
use zeroize::Zeroizing;

use super::blocking;
use super::store::Store;
use crate::clock::Clock;
use id::day_of;
use people::{Identities, Recipient};
use state::{EpochKey, StateFile};
use stored::{StoredWrap, StoredWraps};
use wrap::Unwrapped;

pub use error::KeyError;
pub use id::{FOLDER, InvalidKeyId, KeyId, WrapId};
pub use list::{KeyList, KeyRow, WrapRow};
pub use people::NewIdentity;
pub use rotate::{Blocked, KeyRotation, Retired, RotationPlan};

/// So often a stream looks whether the wraps of the key that it uses are stored: one request.
const WRAPS_LOOKED_FOR: SignedDuration = SignedDuration::from_mins(10);

/// What the settings say of encryption, for one repository.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EncryptionSettings {
    /// Whom to encrypt to, `age1…`; none: what is written is not encrypted.
    pub recipients: Vec<String>,
    /// The file of identities that open what is encrypted.
    pub identity_file: Option<PathBuf>,
    /// Read objects that are not encrypted, although encryption is configured.
    pub accept_plain: bool,
    /// Where the data key of the day is kept, so that the calls of one archiver share it.
    pub state_dir: Option<PathBuf>,
    /// What tells the repository from another at the same address, such as its endpoint; empty
    /// where nothing needs to.
    pub scope: String,
}

impl EncryptionSettings {
    /// Whether recipients and identities can be read; asks no repository.
    pub fn check(&self) -> Result<(), KeyError> {
        self.people().map(drop)
    }

    fn people(&self) -> Result<(Vec<Recipient>, Identities), KeyError> {
        let identities = match &self.identity_file {
            Some(path) => {
                let credentials = std::env::var_os("CREDENTIALS_DIRECTORY").map(PathBuf::from);
                Identities::read(&people::find(path, credentials.as_deref()))?
            }
            None => Identities::default(),
        };
        Ok((Recipient::parse_all(&self.recipients)?, identities))
    }
}

/// Encrypts what goes to one repository, and finds the keys of what comes from it. Clones share
/// their keys.
#[derive(Clone)]
pub struct Encryption {
    inner: Arc<Inner>,
}

struct Inner {
    recipients: Vec<Recipient>,
    identities: Identities,
    accept_plain: bool,
    root: Store,
    wraps: StoredWraps,
    state: Option<StateFile>,
    clock: Arc<dyn Clock>,
    epoch: tokio::sync::Mutex<Epoch>,
    /// Keys that were opened or made.
    known: Mutex<HashMap<KeyId, DataKey>>,
    /// Held while a key is opened, so that objects read side by side open it once.
    opening: tokio::sync::Mutex<()>,
}

/// The key for what is written now.
#[derive(Default)]
struct Epoch {
    current: Option<Sealing>,
    /// What `current` took the place of. It is still known: a write that is tried again across
    /// midnight looks at what it wrote before.
    previous: Option<KeyId>,
    /// Made, and not in use yet: a second attempt must not make another.
    made: Option<EpochKey>,
    /// When the wraps of `current` were last seen to be stored.
    looked_at: Option<Timestamp>,
}

/// The data key for an object that is written now.
#[derive(Debug, Clone)]
pub struct Sealing {
    id: KeyId,
    key: DataKey,
    /// Base64 of the wraps, where they are not stored by themselves.
    wraps: Vec<String>,
}

impl Sealing {
    /// The data key's id.
    pub fn key_id(&self) -> &KeyId {
        &self.id
    }

    /// The data key.
    pub fn key(&self) -> &DataKey {
        &self.key
    }

    /// Makes a header that of an encrypted object: with the key's id, the cipher, the wraps that it
    /// must carry, and a salt of its own. Each upload needs this anew, also a second attempt with
    /// other bytes: a salt that is used twice gives two contents one key and nonce.
    pub fn header_fields(&self, header: &mut Header) -> Result<(), KeyError> {
        header.encrypt(&self.id.to_string(), &*random()?, self.wraps.clone());
        Ok(())
    }
}

impl Encryption {
    /// Encryption as the settings have it, for the repository whose root is `root`. Reads the
    /// identity file; nothing is asked of the store yet.
    pub fn new(
        settings: &EncryptionSettings,
        root: &Store,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, KeyError> {
        let (recipients, identities) = settings.people()?;
        Ok(Self::of(settings, recipients, identities, root, clock))
    }

    fn of(
        settings: &EncryptionSettings,
        recipients: Vec<Recipient>,
        identities: Identities,
        root: &Store,
        clock: Arc<dyn Clock>,
    ) -> Self {
        let state_dir = settings.state_dir.as_deref();
        let inner = Inner {
            recipients,
            identities,
            accept_plain: settings.accept_plain,
            root: root.clone(),
            wraps: StoredWraps::of(root),
            state: state_dir.map(|folder| StateFile::at(folder, root.address(), &settings.scope)),
            clock,
            epoch: tokio::sync::Mutex::default(),
            known: Mutex::default(),
            opening: tokio::sync::Mutex::default(),
        };
        Self {
            inner: Arc::new(inner),
        }
    }

    /// Whether what is written is encrypted.
    pub fn is_configured(&self) -> bool {
        !self.inner.recipients.is_empty()
    }

    /// The folder in `state_dir` for the manifests of backups, where this archiver cannot read what it writes.
    pub fn manifests_folder(&self) -> Option<PathBuf> {
        let state = self.inner.state.as_ref().filter(|_| self.is_blind());
        state?.folder("manifests")
    }

    /// Whether what is written here cannot be read here, once the key of the day is gone.
    pub fn is_blind(&self) -> bool {
        self.is_configured() && self.inner.identities.is_empty()
    }

    /// Whether whoever reads what is written here reads what the other writes, and nobody else.
    pub fn reads_like(&self, other: &Self) -> bool {
        let texts = |one: &Self| -> BTreeSet<String> {
            let recipients = one.inner.recipients.iter();
            recipients.map(|one| one.as_str().to_owned()).collect()
        };
        texts(self) == texts(other)
    }

    /// Copies the wraps of a key to another repository, so that objects that it encrypts can be
    /// copied there as they are; how many there are then. `id` is what an object's header says.
    pub async fn copy_wraps(&self, to: &Self, id: &str, path: &str) -> Result<usize, KeyError> {
        let id = key_id(id, path)?;
        let stored = to.inner.wraps.of_key(&id).await?;
        let mut count = stored.len();
        for wrap in self.inner.wraps.of_key(&id).await?.difference(&stored) {
            if let StoredWrap::Bytes(bytes) = self.inner.wraps.read(&id, wrap).await? {
                to.inner.wraps.add(&id, wrap, bytes.to_vec()).await?;
                count = count.saturating_add(1);
            }
        }
        Ok(count)
    }

    /// Whether every recipient of now can open a stored object, and nobody needs to where there are none;
    /// `path` is the object's, for messages.
    pub async fn is_for_all(&self, header: &Header, path: &str) -> Result<bool, KeyError> {
        let inner = &*self.inner;
        let wrap_ids = |people: &mut dyn Iterator<Item = WrapId>| people.collect::<BTreeSet<_>>();
        let all = wrap_ids(&mut inner.recipients.iter().map(Recipient::wrap_id));
        match &header.key {
            None => Ok(all.is_empty()),
            Some(_) if all.is_empty() => Ok(false),
            Some(id) if header.wraps.is_empty() => {
                let wraps = inner.wraps.of_key(&key_id(id, path)?).await?;
                Ok(wraps.is_superset(&all))
            }
            // wraps that an object carries do not tell whose they are: it is known where there is but one
            Some(_) => {
                let mut readers = inner.identities.recipients().map(|one| one.wrap_id());
                Ok(all.len() == 1 && wrap_ids(&mut readers) == all)
            }
        }
    }

    /// The key for what is written now; `None` where it is not to be encrypted.
    ///
    /// A new day begins a new key: ask for each object. When this returns, whoever holds the
    /// identity of a recipient can open what the key encrypts, whatever happens to this process.
    /// An error must never lead to a plain write.
    pub async fn sealing(&self) -> Result<Option<Sealing>, KeyError> {
        let inner = &*self.inner;
        if inner.recipients.is_empty() {
            if inner.identities.is_empty() || inner.accept_plain {
                return Ok(None);
            }
            return Err(KeyError::NoRecipients);
        }
        let today = day_of(inner.clock.now());
        let mut epoch = inner.epoch.lock().await;
        let current = epoch.current.clone();
        if let Some(current) = current.filter(|key| serves(&key.id, today)) {
            if inner.is_to_look(&current, &mut epoch.looked_at) {
                // nobody waits for it: a repository that is away must not hold up a spool, or another one
                let (inner, current) = (Arc::clone(&self.inner), current.clone());
                tokio::spawn(async move { inner.look_for_wraps(&current).await });
            }
            return Ok(Some(current));
        }
        let sealing = match &inner.state {
            Some(state) => {
                let shared = inner.shared_key(state, today, &mut epoch.made).await;
                let shared = match epoch.current {
                    Some(_) => shared.map_err(KeyError::on_a_new_day)?,
                    None => shared?,
                };
                Sealing {
                    id: shared.id,
                    key: shared.key,
                    wraps: Vec::new(),
                }
            }
            None => inner.own_key(today)?,
        };
        inner.remember(&sealing.id, &sealing.key);
        let replaced = epoch.current.replace(sealing.clone()).map(|key| key.id);
        let before = std::mem::replace(&mut epoch.previous, replaced);
        if let Some(before) = before.filter(|before| *before != sealing.id) {
            inner.forget(&before);
        }
        epoch.made = None;
        epoch.looked_at = Some(inner.clock.now());
        Ok(Some(sealing))
    }

    /// The key of a stored object; `None` where it is not encrypted, and that is fine. `path` is
    /// the object's, for messages.
    ///
    /// The header is not verified yet: whoever decodes with the key finds out whether it is whole.
    pub async fn key_for(&self, header: &Header, path: &str) -> Result<Option<DataKey>, KeyError> {
        let inner = &*self.inner;
        let Some(found) = &header.key else {
            let expects = self.is_configured() || !inner.identities.is_empty();
            if expects && !inner.accept_plain {
                let path = path.to_owned();
                return Err(KeyError::PlainObject { path });
            }
            return Ok(None);
        };
        let id = key_id(found, path)?;
        if let Some(key) = inner.known(&id) {
            return Ok(Some(key));
        }
        let _one_at_a_time = inner.opening.lock().await;
        if let Some(key) = inner.known(&id) {
            return Ok(Some(key));
        }
        let key = inner.open(&id, &header.wraps, path).await?;
        inner.remember(&id, &key);
        Ok(Some(key))
    }
}

/// The id that an object's header gives.
fn key_id(text: &str, path: &str) -> Result<KeyId, KeyError> {
    text.parse().map_err(|InvalidKeyId| KeyError::BadKeyId {
        path: path.to_owned(),
        found: text.to_owned(),
    })
}

impl fmt::Debug for Encryption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Encryption")
            .field("recipients", &self.inner.recipients)
            .field("identities", &self.inner.identities)
            .finish_non_exhaustive()
    }
}

/// Whether a key is for what is written on `today`. One of tomorrow too: then the clock was set
/// back across midnight. One of later days is not: a clock that once was years ahead must not keep
/// a key in use for years.
fn serves(id: &KeyId, today: Date) -> bool {
    id.day() == today || today.tomorrow().is_ok_and(|tomorrow| id.day() == tomorrow)
}

impl Inner {
    /// The key that the calls of this archiver share, with its wraps in the repository.
    async fn shared_key(
        &self,
        state: &StateFile,
        today: Date,
        made: &mut Option<EpochKey>,
    ) -> Result<EpochKey, KeyError> {
        // most calls find a key, and need no lock to read it
        if let Some(kept) = self.kept(state, today)? {
            self.store_missing_wraps(&kept).await?;
            return Ok(kept);
        }
        let lock = state.lock().await?;
        if let Some(kept) = self.kept(state, today)? {
            drop(lock);
            self.store_missing_wraps(&kept).await?;
            return Ok(kept);
        }
        let new = match made.take() {
            Some(again) if serves(&again.id, today) => again,
            _ => self.make(today)?,
        };
        // durable before the key is kept, and so before anything uses it
        self.store_missing_wraps(made.insert(new.clone())).await?;
        let state = state.clone();
        blocking(move || state.write(&new, &lock).map(|()| new)).await
    }

    /// The key in `state_dir`, if it is for today and for these recipients.
    fn kept(&self, state: &StateFile, today: Date) -> Result<Option<EpochKey>, KeyError> {
        let kept = state.read()?;
        let texts = || self.recipients.iter().map(Recipient::as_str);
        Ok(kept.filter(|kept| serves(&kept.id, today) && kept.recipients.iter().eq(texts())))
    }

    /// A key of this process alone, whose wraps each object carries.
    fn own_key(&self, today: Date) -> Result<Sealing, KeyError> {
        let EpochKey { id, key, .. } = self.make(today)?;
        let wraps = self.recipients.iter();
        let wraps = wraps.map(|recipient| Ok(BASE64.encode(wrap::wrap(&key, recipient)?)));
        let wraps = wraps.collect::<Result<_, KeyError>>()?;
        Ok(Sealing { id, key, wraps })
    }

    fn make(&self, today: Date) -> Result<EpochKey, KeyError> {
        let key = DataKey::new(&*random()?);
        let id = KeyId::new(today, &key.fingerprint());
        let id = id.expect("a fingerprint is 32 hex digits, and today's year has four");
        let recipients = self.recipients.iter();
        Ok(EpochKey {
            id,
            key,
            recipients: recipients.map(|one| one.as_str().to_owned()).collect(),
        })
    }

    /// Stores the wraps that the repository does not hold: all of a new key, and those of a kept
    /// one if the repository was emptied, or is another one, since it was made.
    async fn store_missing_wraps(&self, epoch: &EpochKey) -> Result<(), KeyError> {
        self.store_wraps(&epoch.id, &epoch.key).await.map(drop)
    }

    /// Stores those wraps of a key that the repository does not hold; how many these are.
    async fn store_wraps(&self, key_id: &KeyId, key: &DataKey) -> Result<usize, KeyError> {
        let stored = self.wraps.of_key(key_id).await?;
        let mut count = 0;
        for recipient in &self.recipients {
            let id = recipient.wrap_id();
            if !stored.contains(&id) {
                let bytes = wrap::wrap(key, recipient)?;
                self.wraps.add(key_id, &id, bytes).await?;
                count += 1;
            }
        }
        Ok(count)
    }

    /// Whether it is time to look again for the wraps of the key in use, where they are stored by
    /// themselves.
    fn is_to_look(&self, current: &Sealing, looked_at: &mut Option<Timestamp>) -> bool {
        let now = self.clock.now();
        // a clock that was set back must not put it off
        let is_due = looked_at.is_none_or(|at| now.duration_since(at).abs() > WRAPS_LOOKED_FOR);
        let is_to_look = is_due && current.wraps.is_empty();
        if is_to_look {
            *looked_at = Some(now);
        }
        is_to_look
    }

    /// Looks whether the wraps of the key in use are still there: whoever removes them leaves what is
    /// written from then on to nobody.
    async fn look_for_wraps(&self, current: &Sealing) {
        match self.store_wraps(&current.id, &current.key).await {
            Ok(0) => {}
            Ok(count) => tracing::error!(
                "{count} wraps of the key {} were gone from {}, and are stored again: what was encrypted \
                 with older keys is lost if theirs are gone too. hint: `anywhen keys list`; does \
                 something expire objects there?",
                current.id,
                self.root.address()
            ),
            // the store tells of its outages itself
            Err(error) if error.is_unreachable() => {
                tracing::debug!("the wraps of the key in use were not looked for: {error}");
            }
            Err(error) => tracing::error!("the wraps of the key in use cannot be stored: {error}"),
        }
    }

    /// Finds the key `id`: kept, carried by the object itself, or stored.
    async fn open(&self, id: &KeyId, carried: &[String], path: &str) -> Result<DataKey, KeyError> {
        // a kept key that cannot be read is no reason not to look further
        let kept = self.state.as_ref().and_then(|state| state.read().ok()?);
        let kept = kept.filter(|kept| kept.id == *id).map(|kept| kept.key);
        if self.identities.is_empty() {
            return match kept {
                // what this archiver wrote itself today
                Some(key) if !self.recipients.is_empty() => Ok(key),
                _ => self.unwrap_any(id, carried, path).await,
            };
        }
        // an identity that opens nothing must not pass for one that does
        match (self.unwrap_any(id, carried, path).await, kept) {
            (Err(error @ KeyError::KeyGone { .. }), Some(key)) => {
                tracing::error!(
                    "read with the key of the day in state_dir, which will be gone tomorrow: {error}. \
                     hint: `anywhen backup` stores its wraps again"
                );
                Ok(key)
            }
            (opened, _) => opened,
        }
    }

    /// Finds the key `id` with the identities: carried by the object itself, or stored.
    async fn unwrap_any(
        &self,
        id: &KeyId,
        carried: &[String],
        path: &str,
    ) -> Result<DataKey, KeyError> {
        if self.identities.is_empty() {
            let (path, key) = (path.to_owned(), id.to_string());
            return Err(if self.recipients.is_empty() {
                KeyError::NotConfigured { path, key }
            } else {
                KeyError::NoIdentity { path, key }
            });
        }
        let mut tried = Tried::default();
        for text in carried {
            let unwrapped = Some(self.unwrap_carried(id, text));
            if let Some(key) = tried.take(unwrapped, || path.to_owned()) {
                return Ok(key);
            }
        }
        // the wraps for our identities first, unasked: mostly that is one request
        let ours: BTreeSet<WrapId> = self.our_wraps().collect();
        for wrap in &ours {
            let unwrapped = self.unwrap_stored(id, wrap).await?;
            if let Some(key) = tried.take(unwrapped, || self.wraps.locate(id, wrap)) {
                return Ok(key);
            }
        }
        for wrap in self.wraps.of_key(id).await?.difference(&ours) {
            let unwrapped = self.unwrap_stored(id, wrap).await?;
            if let Some(key) = tried.take(unwrapped, || self.wraps.locate(id, wrap)) {
                return Ok(key);
            }
        }
        Err(tried.into_error(id, path, self.identities.len()))
    }

    /// The ids that wraps for the configured identities have.
    fn our_wraps(&self) -> impl Iterator<Item = WrapId> {
        self.identities.recipients().map(|one| one.wrap_id())
    }

    /// Opens a wrap that an object carries.
    fn unwrap_carried(&self, id: &KeyId, text: &str) -> Unwrapped {
        match BASE64.decode(text) {
            Ok(bytes) => wrap::unwrap(&bytes, &self.identities, id),
            Err(error) => Unwrapped::Damaged(format!("not base64: {error}")),
        }
    }

    /// Opens a stored wrap; `None` where it is not there.
    async fn unwrap_stored(
        &self,
        id: &KeyId,
        wrap: &WrapId,
    ) -> Result<Option<Unwrapped>, KeyError> {
        Ok(match self.wraps.read(id, wrap).await? {
            StoredWrap::Bytes(bytes) => Some(wrap::unwrap(&bytes, &self.identities, id)),
            StoredWrap::TooLong => Some(Unwrapped::Damaged("it is too long for one".to_owned())),
            StoredWrap::Gone => None,
        })
    }

    fn known(&self, id: &KeyId) -> Option<DataKey> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.get(id).cloned()
    }

    fn remember(&self, id: &KeyId, key: &DataKey) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.insert(id.clone(), key.clone());
    }

    /// Whoever takes this machine over must not find the keys of weeks in its memory. With an
    /// identity the key can be opened again, and without one it must not be at hand.
    fn forget(&self, id: &KeyId) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.remove(id);
    }
}

/// What trying wraps came to, for the case that none opens.
#[derive(Default)]
struct Tried {
    wraps: usize,
    damaged: Option<KeyError>,
}

impl Tried {
    fn take(
        &mut self,
        unwrapped: Option<Unwrapped>,
        path: impl FnOnce() -> String,
    ) -> Option<DataKey> {
        self.wraps = self.wraps.saturating_add(usize::from(unwrapped.is_some()));
        match unwrapped? {
            Unwrapped::Key(key) => return Some(key),
            Unwrapped::NotOurs => {}
            Unwrapped::Damaged(reason) => {
                self.damaged = Some(KeyError::DamagedWrap {
                    path: path(),
                    reason,
                });
            }
        }
        None
    }

    fn into_error(self, id: &KeyId, path: &str, identities: usize) -> KeyError {
        let (path, key) = (path.to_owned(), id.to_string());
        match self {
            Self {
                damaged: Some(error),
                ..
            } => error,
            Self { wraps: 0, .. } => KeyError::KeyGone { path, key },
            Self { wraps, .. } => KeyError::WrongIdentity {
                path,
                key,
                wraps,
                identities,
            },
        }
    }
}

/// Random bytes for a key or a salt, from the operating system's generator.
fn random() -> Result<Zeroizing<[u8; KEY_BYTES]>, KeyError> {
    let mut bytes = Zeroizing::new([0; KEY_BYTES]);
    match SystemRandom::new().fill(&mut *bytes) {
        Ok(()) => Ok(bytes),
        Err(aws_lc_rs::error::Unspecified) => Err(KeyError::NoRandomness),
    }
}

#[cfg(test)]
mod tests;
