//! What is stored of keys, for people and scripts.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use jiff::civil::Date;
use serde::Serialize;

use super::id::{KeyId, WrapId};
use super::people::Recipient;
use super::{Encryption, KeyError};

/// The keys of a repository whose wraps are stored.
#[derive(Debug, Serialize)]
pub struct KeyList {
    /// The repository's address.
    pub url: String,
    /// The keys, oldest first.
    pub keys: Vec<KeyRow>,
}

/// One key.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct KeyRow {
    /// Its id.
    pub id: KeyId,
    /// The day on which it was made, in UTC.
    pub made_on: Date,
    /// Whether it is the one that is kept in this archiver's `state_dir`.
    pub in_use: bool,
    /// Its wraps.
    pub wraps: Vec<WrapRow>,
    /// Configured recipients that have none.
    pub missing: Vec<String>,
}

/// One wrap of a key.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct WrapRow {
    /// Its id.
    pub id: WrapId,
    /// Whom it is for; `None` where that is nobody who is configured here.
    pub recipient: Option<String>,
}

impl Encryption {
    /// The keys that are stored, without opening any.
    pub async fn list(&self) -> Result<KeyList, KeyError> {
        let inner = &*self.inner;
        let kept = inner.state.as_ref().and_then(|state| state.read().ok()?);
        let in_use = kept.map(|kept| kept.id);
        let rows = inner.wraps.all().await?.into_iter();
        let people = self.people();
        Ok(KeyList {
            url: inner.root.url().to_owned(),
            keys: rows
                .map(|(id, wraps)| KeyRow {
                    made_on: id.day(),
                    in_use: in_use.as_ref() == Some(&id),
                    missing: missing(&inner.recipients, &wraps),
                    wraps: wraps.into_iter().map(|wrap| row(wrap, &people)).collect(),
                    id,
                })
                .collect(),
        })
    }

    /// Everybody who is known by the settings, by the id of the wraps for them.
    pub(super) fn people(&self) -> BTreeMap<WrapId, String> {
        let recipients = self.inner.recipients.iter().cloned();
        recipients
            .chain(self.inner.identities.recipients())
            .map(|one| (one.wrap_id(), one.as_str().to_owned()))
            .collect()
    }
}

impl fmt::Display for KeyList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "keys in {}", self.url)?;
        if self.keys.is_empty() {
            // an archiver without a state_dir stores none by themselves
            return write!(f, "\n  none (objects may carry their own)");
        }
        let wraps = self.keys.iter().flat_map(|key| &key.wraps);
        let wrapped = wraps.filter_map(|wrap| wrap.recipient.as_deref());
        let missing = self.keys.iter().flat_map(|key| &key.missing);
        let people: BTreeSet<&str> = wrapped.chain(missing.map(String::as_str)).collect();
        // a recipient has 62 letters: it is named once, and then by the id of its wraps, which stays
        // the same when others come and go, and is what `keys rotate` names
        for one in &people {
            write!(f, "\n  {} = {one}", WrapId::of(one))?;
        }
        for key in &self.keys {
            let whose = |wrap: &WrapRow| match &wrap.recipient {
                Some(_) => wrap.id.to_string(),
                None => format!("{} (nobody configured here)", wrap.id),
            };
            let whose: Vec<String> = key.wraps.iter().map(whose).collect();
            write!(
                f,
                "\n  {}  made {}  for {}",
                key.id,
                key.made_on,
                whose.join(", ")
            )?;
            if !key.missing.is_empty() {
                let missing = key.missing.iter().map(|one| WrapId::of(one).to_string());
                write!(f, ", not for {}", missing.collect::<Vec<_>>().join(", "))?;
            }
            if key.in_use {
                f.write_str("  in use")?;
            }
        }
        Ok(())
    }
}

fn missing(recipients: &[Recipient], wraps: &BTreeSet<WrapId>) -> Vec<String> {
    let without = recipients
        .iter()
        .filter(|recipient| !wraps.contains(&recipient.wrap_id()));
    without.map(|one| one.as_str().to_owned()).collect()
}

fn row(id: WrapId, people: &BTreeMap<WrapId, String>) -> WrapRow {
    WrapRow {
        recipient: people.get(&id).cloned(),
        id,
    }
}
