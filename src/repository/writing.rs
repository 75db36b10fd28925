//! Storing: segments, pieces, small files, the records of backups.

use bytes::Bytes;
use container::Header;
use jiff::Timestamp;
use serde::Serialize;
use wal::{Checked, SegmentName, SegmentSize, TimelineId, Verdict};

use super::layout::{BackupId, ObjectName};
use super::records::{BackupRecord, FORMAT, Hole, Tip, WalFacts};
use super::store::Created;
use super::{EncodedWal, Repository, RepositoryError, Result, blocking, stretch};

impl Repository {
    /// The header of an object of this system.
    pub fn header(&self, name: &ObjectName) -> Header {
        Header {
            format: FORMAT,
            kind: name.kind().to_owned(),
            name: name.path(),
            cluster: self.cluster.to_string(),
            system_id: self.system_id.to_string(),
            timeline: None,
            start: None,
            end: None,
            segment_bytes: None,
            codec: "zstd".to_owned(),
            key: None,
            cipher: None,
            salt: None,
            wraps: Vec::new(),
        }
    }

    /// Makes a segment or a piece into the object that [`Self::put_wal`] stores.
    pub async fn encode_wal(
        &self,
        name: ObjectName,
        timeline: TimelineId,
        size: SegmentSize,
        checked: Checked<'static>,
    ) -> Result<EncodedWal> {
        let mut header = self.header(&name);
        header.timeline = Some(timeline.get());
        header.start = Some(checked.range().start.to_string());
        header.end = Some(checked.range().end.to_string());
        header.segment_bytes = Some(size.bytes());
        let mut facts = serde_json::Map::new();
        facts.insert("wal".to_owned(), to_value(&wal_facts(&checked)));
        let level = self.wal_level;
        let encoded = blocking(move || {
            let object = container::encode(&header, checked.bytes(), facts, level, None)?;
            Ok((object, container::digest(checked.bytes()), checked))
        });
        let (object, digest, checked) =
            encoded.await.map_err(|error| self.damaged(&name, &error))?;
        Ok(EncodedWal {
            name,
            object: object.into(),
            digest,
            checked,
        })
    }

    /// Stores a segment or a piece. Once this returns, it is durable; it may be tried again.
    pub async fn put_wal(&self, wal: &EncodedWal) -> Result<()> {
        self.create_object(&wal.name, wal.object.clone(), &wal.digest)
            .await
    }

    /// Stores a small file of the server's, byte for byte: a history, a backup history.
    pub async fn store_file(&self, name: &ObjectName, bytes: Bytes) -> Result<()> {
        let mut header = self.header(name);
        header.timeline = match name {
            ObjectName::History(timeline) => Some(timeline.get()),
            _ => None,
        };
        self.store_container(name, header, serde_json::Map::new(), bytes, self.wal_level)
            .await
    }

    async fn store_container(
        &self,
        name: &ObjectName,
        header: Header,
        facts: serde_json::Map<String, serde_json::Value>,
        plain: Bytes,
        level: i32,
    ) -> Result<()> {
        let (object, digest) = blocking(move || {
            let digest = container::digest(&plain);
            container::encode(&header, &plain, facts, level, None).map(|object| (object, digest))
        })
        .await
        .map_err(|error| self.damaged(name, &error))?;
        self.create_object(name, object.into(), &digest).await
    }

    /// Creates an object that was encoded already; `digest` is that of its plain bytes.
    pub async fn create_object(
        &self,
        name: &ObjectName,
        object: Bytes,
        digest: &str,
    ) -> Result<()> {
        match self.store.create(&name.path(), object).await? {
            Created::New => Ok(()),
            Created::Exists => {
                let stored = self.trailer(name).await?.digest;
                if stored == digest {
                    Ok(())
                } else {
                    Err(RepositoryError::Conflict {
                        path: self.locate(name),
                        stored,
                        new: digest.to_owned(),
                    })
                }
            }
        }
    }

    pub(super) async fn create_json<T: Serialize>(
        &self,
        name: &ObjectName,
        value: &T,
    ) -> Result<()> {
        let bytes = Bytes::from(json_of(value));
        match self.store.create(&name.path(), bytes.clone()).await? {
            Created::New => Ok(()),
            Created::Exists => {
                let stored = self.store.get(&name.path()).await?;
                if stored == bytes {
                    return Ok(());
                }
                Err(RepositoryError::Conflict {
                    path: self.locate(name),
                    stored: container::digest(&stored),
                    new: container::digest(&bytes),
                })
            }
        }
    }

    /// Takes an id for a backup that begins at `time`, or the first moment after it that is free.
    pub async fn announce_backup(&self, time: Timestamp) -> Result<BackupId> {
        let mut at = time;
        loop {
            let id = BackupId::at(at);
            let intent = Bytes::from(json_of(&serde_json::json!({ "format": FORMAT, "id": id })));
            match self
                .store
                .create(&ObjectName::Intent(id.clone()).path(), intent)
                .await?
            {
                Created::New => return Ok(id),
                Created::Exists => {
                    at = at
                        .checked_add(jiff::SignedDuration::from_millis(1))
                        .unwrap_or(at);
                }
            }
        }
    }

    /// Makes a backup exist. Everything that it refers to must be stored before.
    pub async fn commit_backup(&self, record: &BackupRecord) -> Result<()> {
        self.create_json(&ObjectName::Backup(record.id.clone()), record)
            .await?;
        self.store
            .delete(&ObjectName::Intent(record.id.clone()).path())
            .await?;
        Ok(())
    }

    /// Removes what a backup that did not come to its end has stored.
    pub async fn discard_backup(&self, id: &BackupId) -> Result<()> {
        if self
            .find::<BackupRecord>(&ObjectName::Backup(id.clone()))
            .await?
            .is_some()
        {
            return Ok(());
        }
        for object in self.store.list(&format!("packs/{id}/")).await? {
            self.store.delete(&object.path).await?;
        }
        self.store
            .delete(&ObjectName::Manifest(id.clone()).path())
            .await?;
        self.store
            .delete(&ObjectName::Intent(id.clone()).path())
            .await?;
        Ok(())
    }

    /// Records that a stretch cannot be had.
    pub async fn record_hole(&self, hole: &Hole) -> Result<()> {
        let name = ObjectName::Hole {
            timeline: hole.timeline,
            range: hole.range(),
        };
        match self.create_json(&name, hole).await {
            // the same hole, found at another time
            Err(RepositoryError::Conflict { .. }) | Ok(()) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Rewrites the tip of a timeline.
    pub async fn write_tip(&self, timeline: TimelineId, tip: &Tip) -> Result<()> {
        let path = ObjectName::Tip(timeline).path();
        Ok(self.store.overwrite(&path, json_of(tip).into()).await?)
    }

    /// Removes those pieces of a segment whose bytes `by` holds, which must be acknowledged.
    ///
    /// A piece that differs is left, and is an error: it is another history.
    pub async fn remove_superseded_pieces(
        &self,
        segment: SegmentName,
        by: &EncodedWal,
    ) -> Result<()> {
        let (start, plain) = (by.checked.range().start, by.checked.bytes());
        for name in self.pieces_of(segment).await? {
            if name == by.name {
                continue;
            }
            let ObjectName::Piece { range, .. } = &name else {
                continue;
            };
            let Some(ours) = stretch(plain, start, *range) else {
                continue;
            };
            let stored = match self.trailer(&name).await {
                Ok(trailer) => trailer.digest,
                Err(error) if error.is_not_found() => continue,
                Err(error) => return Err(error),
            };
            let new = container::digest(ours);
            if stored != new {
                return Err(RepositoryError::Conflict {
                    path: self.locate(&name),
                    stored,
                    new,
                });
            }
            self.store.delete(&name.path()).await?;
        }
        Ok(())
    }
}

fn wal_facts(checked: &Checked<'_>) -> WalFacts {
    let (verified, unverified_from, reason) = match checked.verdict() {
        Verdict::Verified => (true, None, None),
        Verdict::Unverified { from, reason } => (false, Some(from), Some(reason.to_string())),
    };
    WalFacts {
        verified,
        unverified_from,
        reason,
        first_record: checked.first_record(),
        last_record: checked.last_record(),
        records_end: checked.whole_records_end(),
    }
}

fn to_value<T: Serialize>(value: &T) -> serde_json::Value {
    serde_json::to_value(value).expect("our own records have string keys and finite numbers")
}

fn json_of<T: Serialize>(value: &T) -> Vec<u8> {
    let mut bytes = serde_json::to_vec_pretty(&to_value(value)).expect("a value is always JSON");
    bytes.push(b'\n');
    bytes
}
