//! Rotation: every data key is wrapped for whom the settings name now, and for nobody else.
//!
//! No data is rewritten. Wraps are added and read back first; only then are others retired, so
//! that at every moment, and after a crash at any, each key has a wrap that opens it.

use std::collections::BTreeMap;
use std::fmt;

use container::DataKey;
use serde::Serialize;

use super::carried::{Carried, Census, carried};
use super::id::{KeyId, WrapId};
use super::people::Recipient;
use super::stored::StoredWrap;
use super::wrap::{self, Unwrapped};
use super::{Encryption, Inner, KeyError};
use crate::repository::RepositoryError;

/// How often a wrap is stored that does not read back.
const ADD_ATTEMPTS: usize = 3;

/// What a rotation will do to the keys of one repository.
#[derive(Debug, Serialize)]
pub struct RotationPlan {
    /// The repository's address.
    pub url: String,
    /// Every key that is stored or that an object names, oldest first.
    pub keys: Vec<KeyRotation>,
    /// How many objects are damaged so that it is not known which key they need.
    pub unreadable: u64,
    /// One of those.
    pub unreadable_example: Option<String>,
}

/// What a rotation will do to one key.
#[derive(Debug, Serialize)]
pub struct KeyRotation {
    /// The key's id.
    pub id: KeyId,
    /// How many objects are encrypted with it.
    pub objects: u64,
    /// One of those.
    pub example: Option<String>,
    /// Whether objects carry wraps of it themselves; those cannot be retired.
    pub carried: bool,
    /// Recipients that get a wrap.
    pub add: Vec<String>,
    /// Recipients whose wrap is written anew, since it is damaged, or is all that would be left
    /// and cannot be checked with the identities at hand.
    pub renew: Vec<String>,
    /// Wraps that are removed, and for whom, where that is known.
    pub retire: Vec<Retired>,
    /// Why nothing can be done, where something ought to be.
    pub blocked: Option<Blocked>,
    #[serde(skip)]
    key: Option<DataKey>,
}

/// A wrap that is removed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Retired {
    /// Its id.
    pub id: WrapId,
    /// Whom it is for, where an identity at hand tells.
    pub recipient: Option<String>,
}

/// Why a key cannot be rotated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Blocked {
    /// None of the identities at hand opens a wrap of it.
    NotOurs,
    /// A wrap for one of them does not hold the key.
    Damaged,
    /// There is no wrap of it.
    Gone,
}

impl fmt::Display for Blocked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotOurs => "none of the configured identities opens it",
            Self::Damaged => "its wrap is damaged",
            Self::Gone => "no wrap of it is stored: what it encrypts cannot be read by anybody",
        })
    }
}

/// What a stored wrap turned out to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Found {
    Opens,
    NotOurs,
    Damaged,
}

/// Everything that is known of a key before it is decided what to do.
#[derive(Debug, Default)]
struct KeyFacts {
    stored: BTreeMap<WrapId, Found>,
    key: Option<DataKey>,
    carried_damaged: bool,
    carried_wraps: usize,
    objects: u64,
    example: Option<String>,
}

impl Encryption {
    /// Decides what a rotation to the configured recipients does. Reads the header of every object,
    /// to find the keys that objects carry themselves; writes nothing.
    pub async fn plan_rotation(&self) -> Result<RotationPlan, RepositoryError> {
        let inner = &*self.inner;
        if inner.recipients.is_empty() {
            return Err(KeyError::NobodyToRotateTo.into());
        }
        if inner.identities.is_empty() {
            return Err(KeyError::NothingToRotateWith.into());
        }
        let Census {
            keys: mut named,
            unreadable,
            unreadable_example,
        } = carried(&inner.root).await?;
        let mut facts: BTreeMap<KeyId, KeyFacts> = BTreeMap::new();
        for (id, wraps) in inner.wraps.all().await? {
            let mut known = KeyFacts::default();
            for wrap in wraps {
                inner.look_into(&id, wrap, &mut known).await?;
            }
            if let Some(carried) = named.remove(&id) {
                inner.look_into_carried(&id, &carried, &mut known);
            }
            facts.insert(id, known);
        }
        for (id, carried) in named {
            let mut known = KeyFacts::default();
            inner.look_into_carried(&id, &carried, &mut known);
            facts.insert(id, known);
        }
        let people = self.people();
        let keys = facts.into_iter();
        Ok(RotationPlan {
            url: inner.root.url().to_owned(),
            keys: keys
                .map(|(id, known)| decide(id, known, &inner.recipients, &people))
                .collect(),
            unreadable,
            unreadable_example,
        })
    }

    /// Carries out a plan. It may be stopped at any moment, and planned and carried out again.
    ///
    /// Keys that could not be opened are left as they are, and are an error at the end; so are
    /// objects of which it is not known which key they need.
    pub async fn rotate(&self, plan: &RotationPlan) -> Result<(), KeyError> {
        for key in &plan.keys {
            self.inner.rotate_key(key).await?;
        }
        let blocked = plan.keys.iter().filter(|key| key.blocked.is_some());
        let mut blocked = blocked.map(|key| key.id.to_string());
        let first_key = blocked.next();
        let keys = usize::from(first_key.is_some()).saturating_add(blocked.count());
        match (&plan.unreadable_example, first_key) {
            (Some(first), _) => Err(KeyError::UnknownKeys {
                objects: plan.unreadable,
                keys,
                first: first.clone(),
            }),
            (None, Some(first)) => Err(KeyError::NotRotated {
                keys,
                any_gone: plan
                    .keys
                    .iter()
                    .any(|key| key.blocked == Some(Blocked::Gone)),
                first,
            }),
            (None, None) => Ok(()),
        }
    }
}

impl RotationPlan {
    /// Whether carrying it out changes anything.
    pub fn changes_anything(&self) -> bool {
        self.keys.iter().any(KeyRotation::changes_anything)
    }
}

impl KeyRotation {
    fn changes_anything(&self) -> bool {
        !(self.add.is_empty() && self.renew.is_empty() && self.retire.is_empty())
    }
}

/// What is to be done with a key of which `facts` are known. Pure.
fn decide(
    id: KeyId,
    facts: KeyFacts,
    recipients: &[Recipient],
    people: &BTreeMap<WrapId, String>,
) -> KeyRotation {
    let found = |recipient: &&Recipient| facts.stored.get(&recipient.wrap_id()).copied();
    let those = |wanted: &dyn Fn(Option<Found>) -> bool| -> Vec<String> {
        let chosen = recipients.iter().filter(|one| wanted(found(one)));
        chosen.map(|one| one.as_str().to_owned()).collect()
    };
    let retire: Vec<Retired> = facts
        .stored
        .keys()
        .filter(|wrap| !recipients.iter().any(|one| one.wrap_id() == **wrap))
        .map(|wrap| Retired {
            id: wrap.clone(),
            recipient: people.get(wrap).cloned(),
        })
        .collect();
    let add = those(&|found| found.is_none());
    let mut renew = those(&|found| found == Some(Found::Damaged));
    // of what stays, something must be known to open before anything goes
    let is_sure = !add.is_empty()
        || !renew.is_empty()
        || !those(&|found| found == Some(Found::Opens)).is_empty();
    if !retire.is_empty() && !is_sure {
        renew = those(&|found| found == Some(Found::NotOurs));
    }
    let mut rotation = KeyRotation {
        id,
        objects: facts.objects,
        example: facts.example,
        carried: facts.carried_wraps > 0,
        add,
        renew,
        retire,
        blocked: None,
        key: facts.key,
    };
    if rotation.key.is_none() && rotation.changes_anything() {
        let damaged =
            facts.carried_damaged || facts.stored.values().any(|found| *found == Found::Damaged);
        rotation.blocked = Some(match (damaged, facts.stored.len() + facts.carried_wraps) {
            (true, _) => Blocked::Damaged,
            (false, 0) => Blocked::Gone,
            (false, _) => Blocked::NotOurs,
        });
        rotation.add.clear();
        rotation.renew.clear();
        rotation.retire.clear();
    }
    rotation
}

impl Inner {
    async fn look_into(
        &self,
        id: &KeyId,
        wrap: WrapId,
        facts: &mut KeyFacts,
    ) -> Result<(), KeyError> {
        let found = match self.unwrap_stored(id, &wrap).await? {
            None => return Ok(()),
            Some(Unwrapped::Key(key)) => {
                facts.key = Some(key);
                Found::Opens
            }
            Some(Unwrapped::NotOurs) => Found::NotOurs,
            Some(Unwrapped::Damaged(reason)) => {
                tracing::warn!("damaged wrap {}: {reason}", self.wraps.locate(id, &wrap));
                Found::Damaged
            }
        };
        facts.stored.insert(wrap, found);
        Ok(())
    }

    fn look_into_carried(&self, id: &KeyId, carried: &Carried, facts: &mut KeyFacts) {
        facts.objects = carried.objects;
        facts.example = Some(carried.example.clone());
        facts.carried_wraps = carried.wraps.len();
        for text in &carried.wraps {
            match self.unwrap_carried(id, text) {
                Unwrapped::Key(key) => facts.key = Some(key),
                Unwrapped::NotOurs => {}
                Unwrapped::Damaged(reason) => {
                    tracing::warn!("damaged wrap in {}: {reason}", carried.example);
                    facts.carried_damaged = true;
                }
            }
        }
    }

    async fn rotate_key(&self, rotation: &KeyRotation) -> Result<(), KeyError> {
        let Some(key) = rotation
            .key
            .as_ref()
            .filter(|_| rotation.changes_anything())
        else {
            return Ok(());
        };
        let id = &rotation.id;
        for recipient in &self.recipients {
            let text = recipient.as_str();
            if rotation.renew.iter().any(|one| one == text) {
                // other wraps still open the key, or this one did not
                self.wraps.retire(id, &recipient.wrap_id()).await?;
            } else if !rotation.add.iter().any(|one| one == text) {
                continue;
            }
            self.add_surely(id, key, recipient).await?;
        }
        for retired in &rotation.retire {
            self.wraps.retire(id, &retired.id).await?;
        }
        if rotation.retire.is_empty() {
            return Ok(());
        }
        // who rotated to other recipients at the same time retired what this relies on
        let left = self.wraps.of_key(id).await?;
        for recipient in &self.recipients {
            if !left.contains(&recipient.wrap_id()) {
                // whatever is there by now was just put there by whoever checks it
                self.add_and_compare(id, key, recipient).await?;
            }
        }
        Ok(())
    }

    /// Stores a wrap, and makes sure that it is what is read from now on. Other wraps open the key
    /// meanwhile: one that an archiver, or a rotation that was stopped, brings in between goes.
    async fn add_surely(
        &self,
        id: &KeyId,
        key: &DataKey,
        recipient: &Recipient,
    ) -> Result<(), KeyError> {
        for _ in 0..ADD_ATTEMPTS {
            if self.add_and_compare(id, key, recipient).await? {
                return Ok(());
            }
            self.wraps.retire(id, &recipient.wrap_id()).await?;
        }
        Err(KeyError::ReadsBackOther {
            path: self.wraps.locate(id, &recipient.wrap_id()),
        })
    }

    /// Stores a wrap unless there is one, and says whether this very one is there now.
    async fn add_and_compare(
        &self,
        id: &KeyId,
        key: &DataKey,
        recipient: &Recipient,
    ) -> Result<bool, KeyError> {
        let wrap = recipient.wrap_id();
        let bytes = wrap::wrap(key, recipient)?;
        self.wraps.add(id, &wrap, bytes.clone()).await?;
        let read = self.wraps.read(id, &wrap).await?;
        Ok(matches!(read, StoredWrap::Bytes(read) if read == bytes))
    }
}

impl fmt::Display for RotationPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "keys in {}", self.url)?;
        if self.keys.is_empty() {
            write!(f, "\n  none")?;
        }
        let mut in_order: usize = 0;
        for key in &self.keys {
            match (key.blocked, key.changes_anything()) {
                (Some(blocked), _) => {
                    write!(f, "\n  {}: left as it is, {blocked}", key.id)?;
                    if let Some(example) = &key.example {
                        write!(
                            f,
                            "\n    {} objects need it, such as {example}",
                            key.objects
                        )?;
                    }
                }
                (None, true) => write!(f, "\n  {key}")?,
                (None, false) => in_order = in_order.saturating_add(1),
            }
        }
        if in_order > 0 {
            write!(f, "\n  {in_order} in order: nothing to do")?;
        }
        let stay = |key: &&KeyRotation| key.carried && key.blocked.is_none();
        let carried: u64 = self.keys.iter().filter(stay).map(|key| key.objects).sum();
        if carried > 0 {
            write!(
                f,
                "\n  wraps that objects carry themselves stay, and open them for whom they are made: \
                 objects={carried}"
            )?;
        }
        if let Some(example) = &self.unreadable_example {
            let objects = self.unreadable;
            write!(
                f,
                "\n  {objects} damaged objects do not tell which key they need, such as {example}"
            )?;
        }
        Ok(())
    }
}

impl fmt::Display for KeyRotation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:", self.id)?;
        for (doing, people) in [("add", &self.add), ("write anew", &self.renew)] {
            for recipient in people {
                write!(f, "\n    {doing} {recipient}")?;
            }
        }
        for retired in &self.retire {
            let whose = retired.recipient.as_deref().unwrap_or("somebody else");
            write!(f, "\n    retire {} of {whose}", retired.id)?;
        }
        Ok(())
    }
}
