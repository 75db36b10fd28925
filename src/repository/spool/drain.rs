//! Emptying a spool into its repository: in order, one object at a time, and each removed only
//! once it is acknowledged. Stopped anywhere and begun anew, it comes to the same.

use bytes::Bytes;

use super::{ASIDE, Spool, segment_of};
use crate::durable;
use crate::error::chain;
use crate::repository::layout::ObjectName;
use crate::repository::member::{Cover, Member};
use crate::repository::{Acknowledge, Repository, RepositoryError, Result, Stored, blocking};

/// What became of one object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Drained {
    /// It is in the repository.
    Stored(ObjectName, Stored),
    /// It could not be read any more: what it held must be received again.
    Lost(ObjectName),
}

/// A spooled object that can leave.
struct Readable {
    /// As it is stored.
    object: Bytes,
    /// What it holds; `None` where its key is not at hand.
    plain: Option<Vec<u8>>,
}

impl Spool {
    /// Stores everything in the repository, oldest first, and removes here what is acknowledged.
    /// Says whether nothing waits any more: where every place must hold what is acknowledged, and
    /// one is away, objects stay.
    ///
    /// What cannot be read is put aside, named in the log, and told as [`Drained::Lost`]. Other
    /// bytes in the repository are an error that names both; the object stays here.
    pub async fn drain(
        &self,
        repository: &Repository,
        mut told: impl FnMut(Drained),
    ) -> Result<bool> {
        let mut last = None;
        loop {
            let _alone = self.leaving.lock().await;
            let next = self
                .index()
                .next_after(last.as_ref(), repository.is_whole());
            let Some((turn, name)) = next else {
                return Ok(!self.index().has_more());
            };
            told(self.drain_one(repository, &name).await?);
            last = Some(turn);
        }
    }

    async fn drain_one(&self, repository: &Repository, name: &ObjectName) -> Result<Drained> {
        let Readable { object, plain } = match self.read(name).await {
            Ok(readable) => readable,
            Err(error) if error.is_damage() || error.is_not_found() => {
                tracing::error!(
                    "a spooled object is lost: what it held is received again, if the server still \
                     has it: {}",
                    chain(&error)
                );
                self.put_aside(name).await?;
                return Ok(Drained::Lost(name.clone()));
            }
            Err(error) => return Err(error),
        };
        let stored = repository.take_over(&self.member, name, &object).await;
        let stored = stored.map_err(|error| self.names_both(name, error))?;
        self.repository_answers();
        if stored == Stored::Everywhere || repository.acknowledge() == Acknowledge::Any {
            if let Some(plain) = plain {
                self.remove_covered_by(repository, name, &object, &plain, stored)
                    .await?;
            }
            self.member.store()?.delete(&name.path()).await?;
            self.index().remove(name);
        } else {
            self.index().copied(name);
        }
        Ok(Drained::Stored(name.clone(), stored))
    }

    /// An object as it was written, which is found out before a repository is given any of it: one
    /// that cannot be decoded would be taken there for the WAL that it is named after.
    async fn read(&self, name: &ObjectName) -> Result<Readable> {
        let object = self.member.raw(name).await?;
        self.member.header_in(name, &object)?;
        container::check_stored(&object).map_err(|error| self.member.damaged(name, &error))?;
        let plain = match self.member.decode(name, object.clone()).await {
            Ok(fetched) => Some(fetched.plain),
            // an archiver that was started anew may lack it; whoever reads the repository has it
            Err(error) if error.lacks_key() || error.is_damaged_key() => None,
            Err(error) => return Err(error),
        };
        Ok(Readable { object, plain })
    }

    /// Removes the pieces that an object covers, here and in the repository.
    async fn remove_covered_by(
        &self,
        repository: &Repository,
        name: &ObjectName,
        object: &[u8],
        plain: &[u8],
        stored: Stored,
    ) -> Result<()> {
        let Some((segment, start)) = segment_of(name).zip(self.start_of(name, object)?) else {
            return Ok(());
        };
        let cover = Cover {
            segment,
            name,
            start,
            plain,
        };
        match self.remove_covered(&cover).await {
            // a piece here: when its turn comes, it is put aside
            Err(error) if error.is_damage() => {
                tracing::warn!("a superseded piece stays for now: {}", chain(&error));
            }
            removed => removed?,
        }
        if stored != Stored::Everywhere {
            return Ok(());
        }
        for member in &repository.members {
            match member.remove_superseded_pieces(&cover).await {
                Err(error) if error.is_unreachable() => {
                    tracing::warn!("superseded pieces stay for now: {}", chain(&error));
                }
                removed => removed.map(drop)?,
            }
        }
        Ok(())
    }

    fn start_of(&self, name: &ObjectName, object: &[u8]) -> Result<Option<wal::Lsn>> {
        if let ObjectName::Piece { range, .. } = name {
            return Ok(Some(range.start));
        }
        let header = self.member.header_in(name, object)?;
        Ok(header.start.and_then(|start| start.parse().ok()))
    }

    /// Moves an object out of the way, so that the rest can leave.
    async fn put_aside(&self, name: &ObjectName) -> Result<()> {
        let from = self.file(name);
        let aside = self.system_dir().join(ASIDE).join(name.path());
        let moved = blocking(move || {
            if !from.exists() {
                return Ok(None);
            }
            let folder = aside.parent().expect("it is below the folder of a system");
            durable::create_dir_all(folder)?;
            let taken = |path: &std::path::Path| path.exists();
            let mut to = aside.clone();
            let mut number = 1_u32;
            while taken(&to) {
                to = aside.with_extension(number.to_string());
                number = number.saturating_add(1);
            }
            durable::rename(&from, &to).map(|()| Some(to))
        });
        match moved.await {
            Ok(Some(to)) => tracing::error!("it was put aside: {}", to.display()),
            Ok(None) => {}
            Err(error) => {
                return Err(RepositoryError::SpoolFolder {
                    dir: self.settings.dir.display().to_string(),
                    reason: error.to_string(),
                });
            }
        }
        self.index().put_aside(name);
        Ok(())
    }

    fn names_both(&self, name: &ObjectName, error: RepositoryError) -> RepositoryError {
        match error {
            RepositoryError::Conflict { path, stored, new } => RepositoryError::SpoolConflict {
                spooled: self.member.locate(name),
                path,
                stored,
                new,
            },
            other => other,
        }
    }
}

impl Repository {
    /// Stores an object of a spool in every place.
    async fn take_over(&self, spool: &Member, name: &ObjectName, object: &Bytes) -> Result<Stored> {
        self.write_everywhere(|target| {
            let (spool, object) = (spool.clone(), object.clone());
            async move { spool.hand_over(&target, name, object).await }
        })
        .await
    }
}

impl Member {
    /// Stores an object of a spool in a place: as it is, unless it is to be sealed there. What is
    /// sealed carries the wraps of its key.
    async fn hand_over(&self, target: &Self, name: &ObjectName, object: Bytes) -> Result<()> {
        let header = self.header_in(name, &object)?;
        if header.key.is_none() && target.place().open()?.encryption.is_configured() {
            return self.encode_anew(target, name, header, object).await;
        }
        let (_, trailer) =
            container::check_stored(&object).map_err(|error| self.damaged(name, &error))?;
        target.create_object(name, object, &trailer.digest).await
    }
}
