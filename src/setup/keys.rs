//! Identities, and the data keys of repositories: made, listed, rotated.

use std::fmt;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use jiff::Timestamp;
use serde::Serialize;
use zeroize::Zeroizing;

use crate::clock::SystemClock;
use crate::durable;
use crate::error::{Error, Result, io};
use crate::repository::RepositoryError;
use crate::repository::keys::{Encryption, KeyList, NewIdentity, RotationPlan};
use crate::repository::store::Store;

pub use crate::repository::PlaceSettings;

/// The keys of one repository.
fn open(place: &PlaceSettings) -> Result<Encryption> {
    let store = Store::open(&place.store, false)?;
    let clock = Arc::new(SystemClock);
    Ok(Encryption::new(&place.encryption, &store, clock)?)
}

/// An identity that was made, without its secret half.
#[derive(Debug, Serialize)]
pub struct Generated {
    schema: u32,
    /// Its public half, for `recipients`.
    pub recipient: String,
    /// The file that holds it.
    pub file: Option<PathBuf>,
}

/// Makes an identity. It goes to `file`, which must not be there yet; the text of the identity
/// file comes back where no file is given.
pub fn generate(
    file: Option<&Path>,
    now: Timestamp,
) -> Result<(Generated, Option<Zeroizing<String>>)> {
    let identity = NewIdentity::generate();
    let text = identity.file(now);
    let made = Generated {
        schema: 1,
        recipient: identity.recipient.clone(),
        file: file.map(Path::to_owned),
    };
    let Some(path) = file else {
        return Ok((made, Some(text)));
    };
    match durable::create_new(path, text.as_bytes()) {
        Ok(()) => Ok((made, None)),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Err(Error::usage(format!(
            "{} is there already, and an identity is never overwritten",
            path.display()
        ))
        .hint("name another file: what was encrypted to the old identity needs it")),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            Err(io("write", path, &error).hint("make its folder first, for its owner alone"))
        }
        Err(error) => Err(io("write", path, &error)),
    }
}

/// The keys of repositories.
#[derive(Debug, Serialize)]
pub struct KeyLists {
    schema: u32,
    repositories: Vec<KeyList>,
}

/// Lists the keys that are stored, without opening any.
pub async fn list(repositories: &[PlaceSettings]) -> Result<KeyLists> {
    let mut lists = Vec::new();
    for repository in repositories {
        lists.push(open(repository)?.list().await?);
    }
    Ok(KeyLists {
        schema: 1,
        repositories: lists,
    })
}

impl fmt::Display for KeyLists {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&joined(&self.repositories))
    }
}

/// What rotating does, in each repository.
#[derive(Debug, Serialize)]
pub struct Rotation {
    schema: u32,
    dry_run: bool,
    repositories: Vec<RotationPlan>,
    #[serde(skip)]
    encryption: Vec<Encryption>,
}

impl Rotation {
    /// Decides what to do. Writes nothing.
    pub async fn plan(repositories: &[PlaceSettings], dry_run: bool) -> Result<Self> {
        let mut rotation = Self {
            schema: 1,
            dry_run,
            repositories: Vec::new(),
            encryption: Vec::new(),
        };
        for repository in repositories {
            let encryption = open(repository)?;
            let plan = encryption.plan_rotation().await;
            rotation
                .repositories
                .push(plan.map_err(|error: RepositoryError| Error::from(error))?);
            rotation.encryption.push(encryption);
        }
        Ok(rotation)
    }

    /// Whether there is anything to do.
    pub fn changes_anything(&self) -> bool {
        self.repositories.iter().any(RotationPlan::changes_anything)
    }

    /// Does it. It may be stopped at any moment, and called again.
    pub async fn carry_out(&self) -> Result<()> {
        let mut outcome = Ok(());
        for (encryption, plan) in self.encryption.iter().zip(&self.repositories) {
            // what cannot be done in one repository is no reason to leave out the next
            let rotated = encryption.rotate(plan).await;
            let rotated = rotated.map_err(Error::from);
            outcome = outcome.and(rotated);
        }
        outcome
    }
}

impl fmt::Display for Rotation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&joined(&self.repositories))
    }
}

fn joined(parts: &[impl fmt::Display]) -> String {
    let parts: Vec<String> = parts.iter().map(ToString::to_string).collect();
    parts.join("\n")
}
