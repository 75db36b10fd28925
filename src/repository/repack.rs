//! Copying a backup from one place to another.
//!
//! Where both encrypt alike, objects are copied as they are. Else every frame of every pack is
//! decoded and encoded anew; frames come to lie elsewhere, so the manifest is written anew too.

use std::collections::BTreeMap;

use bytes::Bytes;
use container::{DataKey, Encoder, FrameReader, Header};

use super::layout::{BackupId, ObjectName};
use super::member::{Member, Recipe};
use super::records::{BackupRecord, Extent, FORMAT, ManifestLine};
use super::{RepositoryError, Result, blocking};

/// Where a frame lies: first stored byte, stored length.
type Place = (u64, u64);
/// The plain length of each frame of a pack, by its place.
type Frames = BTreeMap<Place, u64>;

impl Member {
    /// Copies a backup with all that it refers to; its record last, as when it was taken.
    pub(super) async fn copy_backup(&self, target: &Self, id: &BackupId) -> Result<()> {
        let name = ObjectName::Backup(id.clone());
        let manifest_name = ObjectName::Manifest(id.clone());
        let record = self.backup(id).await;
        // as a backup that is being taken: so that a clean-up spares what it has stored so far
        let intent = ObjectName::Intent(id.clone());
        let announced = serde_json::json!({ "format": FORMAT, "id": id });
        target.create_json(&intent, &announced).await?;
        let manifest = self.raw(&manifest_name).await?;
        if self.copies_to(target, &manifest_name, &manifest).await? {
            let packs = self.list(&format!("packs/{id}/")).await?;
            for pack in packs
                .iter()
                .filter_map(|pack| ObjectName::parse(&pack.path))
            {
                self.copy_as_it_is(target, &pack).await?;
            }
            self.copy_as_it_is(target, &manifest_name).await?;
            let record = self.raw(&name).await?;
            target.create_text(&name, record).await?;
            return target.forget_intent(id).await;
        }
        let record = record?.ok_or_else(|| RepositoryError::absent(self.locate(&name)))?;
        self.repack(target, record).await
    }

    async fn copy_as_it_is(&self, target: &Self, name: &ObjectName) -> Result<()> {
        let stored = self.raw(name).await?;
        let checked = stored.clone();
        let checked = blocking(move || container::check_stored(&checked)).await;
        let (_, trailer) = checked.map_err(|error| self.damaged(name, &error))?;
        target.create_object(name, stored, &trailer.digest).await
    }

    async fn repack(&self, target: &Self, record: BackupRecord) -> Result<()> {
        let name = ObjectName::Manifest(record.id.clone());
        let mut lines = self.manifest_lines(&name).await?;
        let mut stored_bytes: u64 = 0;
        let mut moved: BTreeMap<(u32, Place), Place> = BTreeMap::new();
        for (number, (path, frames)) in packs_of(&lines) {
            let Some(pack @ ObjectName::Pack { .. }) = ObjectName::parse(&path) else {
                return Err(self.bad_manifest(&name, format!("no pack has this path: {path}")));
            };
            let repacked = self.repack_one(target, &pack, frames).await?;
            stored_bytes = stored_bytes.saturating_add(repacked.bytes);
            for (from, to) in repacked.moved {
                moved.insert((number, from), to);
            }
        }
        for line in &mut lines {
            move_extents(line, &moved).map_err(|reason| self.bad_manifest(&name, reason))?;
        }
        let manifest = text_of(&lines);
        let Recipe { header, key } = target.recipe(&name).await?;
        let level = target.place().settings().backup_level;
        let encoded = blocking(move || {
            let facts = serde_json::Map::new();
            let digest = container::digest(&manifest);
            container::encode(&header, &manifest, facts, level, key.as_ref())
                .map(|object| (Bytes::from(object), digest))
        });
        let (object, digest) = encoded
            .await
            .map_err(|error| target.damaged(&name, &error))?;
        let bytes = u64::try_from(object.len()).unwrap_or(u64::MAX);
        target.create_object(&name, object, &digest).await?;
        let record = BackupRecord {
            stored_bytes: stored_bytes.saturating_add(bytes),
            manifest_digest: digest,
            ..record
        };
        target.commit_backup(&record).await
    }

    async fn manifest_lines(&self, name: &ObjectName) -> Result<Vec<ManifestLine>> {
        let plain = self.fetch(name).await?.plain;
        let lines = plain
            .split(|byte| *byte == b'\n')
            .filter(|line| !line.is_empty());
        lines
            .map(serde_json::from_slice)
            .collect::<Result<_, _>>()
            .map_err(|error| self.bad_manifest(name, error.to_string()))
    }

    fn bad_manifest(&self, name: &ObjectName, reason: String) -> RepositoryError {
        RepositoryError::Damaged {
            path: self.locate(name),
            reason,
        }
    }

    async fn repack_one(
        &self,
        target: &Self,
        name: &ObjectName,
        frames: Frames,
    ) -> Result<Repacked> {
        let reader = self.frames(name).await?;
        let stored = self.raw(name).await?;
        let Recipe { header, key } = target.recipe(name).await?;
        let level = target.place().settings().backup_level;
        let repacked = blocking(move || {
            encode_frames(&stored, &reader, &frames, &header, level, key.as_ref())
        });
        let repacked = repacked.await.map_err(|error| self.damaged(name, &error))?;
        target
            .create_object(name, repacked.object.clone(), &repacked.digest)
            .await?;
        Ok(repacked)
    }
}

/// A pack in its new form.
struct Repacked {
    object: Bytes,
    digest: String,
    bytes: u64,
    /// From where to where each frame has moved.
    moved: Vec<(Place, Place)>,
}

fn encode_frames(
    stored: &[u8],
    reader: &FrameReader,
    frames: &Frames,
    header: &Header,
    level: i32,
    key: Option<&DataKey>,
) -> Result<Repacked, container::Error> {
    let mut encoder = Encoder::new(header, level, key)?;
    let mut object = Vec::new();
    let mut moved = Vec::with_capacity(frames.len());
    for ((offset, length), plain_bytes) in frames {
        let place = |position: u64| usize::try_from(position).unwrap_or(usize::MAX);
        let end = place(offset.saturating_add(*length));
        // a stretch that the object does not have is refused as a frame cut short
        let frame = stored.get(place(*offset)..end).unwrap_or_default();
        let plain = reader.frame(*offset, frame, place(*plain_bytes))?;
        let new = encoder.frame(&plain, &mut object)?;
        moved.push(((*offset, *length), (new.offset, new.stored_bytes)));
    }
    let trailer = encoder.finish(serde_json::Map::new(), &mut object)?;
    Ok(Repacked {
        bytes: u64::try_from(object.len()).unwrap_or(u64::MAX),
        object: object.into(),
        digest: trailer.digest,
        moved,
    })
}

/// The packs that a manifest names, each with the frames that it refers to.
fn packs_of(lines: &[ManifestLine]) -> BTreeMap<u32, (String, Frames)> {
    let mut packs: BTreeMap<u32, (String, Frames)> = BTreeMap::new();
    for line in lines {
        match line {
            ManifestLine::Pack { number, path } => {
                packs.insert(*number, (path.clone(), Frames::new()));
            }
            ManifestLine::File { extents, .. } => {
                for extent in extents {
                    if let Extent::Stored(pack, offset, stored, plain, _) = extent
                        && let Some((_, frames)) = packs.get_mut(pack)
                    {
                        frames.insert((*offset, *stored), *plain);
                    }
                }
            }
            ManifestLine::Directory(_) | ManifestLine::Link { .. } => {}
        }
    }
    packs
}

fn move_extents(
    line: &mut ManifestLine,
    moved: &BTreeMap<(u32, Place), Place>,
) -> Result<(), String> {
    let ManifestLine::File { extents, .. } = line else {
        return Ok(());
    };
    for extent in extents {
        if let Extent::Stored(pack, offset, stored, _, _) = extent {
            let to = moved.get(&(*pack, (*offset, *stored)));
            let to = to.ok_or_else(|| format!("no pack has this number: {pack}"))?;
            (*offset, *stored) = *to;
        }
    }
    Ok(())
}

fn text_of(lines: &[ManifestLine]) -> Vec<u8> {
    let mut text = Vec::new();
    for line in lines {
        let line = serde_json::to_vec(line).expect("our own records are JSON");
        text.extend_from_slice(&line);
        text.push(b'\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extents_follow_their_frames() {
        let lines = [
            r#"{"pack":{"number":0,"path":"packs/x/00000000"}}"#,
            r#"{"file":{"path":"a","mode":384,"mtime":0,"size":8,"extents":[[0,10,5,4,"aa"],[0,15,6,4,"bb"]]}}"#,
            r#"{"file":{"path":"b","mode":384,"mtime":0,"size":4,"extents":[[0,10,5,4,"aa"]]}}"#,
        ];
        let mut lines: Vec<ManifestLine> = lines
            .iter()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        let packs = packs_of(&lines);
        let frames: Vec<_> = packs[&0].1.keys().copied().collect();
        assert_eq!(frames, [(10, 5), (15, 6)]);
        let moved = BTreeMap::from([((0, (10, 5)), (40, 29)), ((0, (15, 6)), (69, 30))]);
        for line in &mut lines {
            move_extents(line, &moved).unwrap();
        }
        let text = String::from_utf8(text_of(&lines)).unwrap();
        assert_eq!(text.matches("[0,40,29,4,\"aa\"]").count(), 2, "{text}");
        assert!(text.contains("[0,69,30,4,\"bb\"]"), "{text}");
        assert!(move_extents(&mut lines[1], &BTreeMap::new()).is_err());
    }
}
