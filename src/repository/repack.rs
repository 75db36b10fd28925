//! Copying a backup from one place to another.
//!
//! Where both encrypt alike, objects are copied as they are. Else every frame of every pack is
//! decoded and encoded anew; frames come to lie elsewhere, so the manifest is written anew too.

use std::collections::BTreeMap;

use bytes::Bytes;
use container::{DataKey, Encoder, Frame, FrameReader, Header};

use super::keys::Sealing;
use super::layout::{BackupId, ObjectName};
use super::manifest::{add_line, file_list};
use super::member::{Member, Recipe};
use super::records::{BackupRecord, Extent, ManifestLine};
use super::sharing::{Intent, SharedPacks, pack_name};
use super::store::Listed;
use super::{RepositoryError, Result, blocking};

/// Where a frame lies: first stored byte, stored length.
type Place = (u64, u64);
/// A frame, and how many plain bytes it holds.
type PlacedFrame = (Frame, u64);

/// From where to where the frames of packs have moved, by the packs' numbers.
type Moved = BTreeMap<(u32, Place), Place>;

fn place_of(frame: &Frame) -> Place {
    (frame.offset, frame.stored_bytes)
}

impl Member {
    /// Copies a backup with all that it refers to; its record last, as when it was taken.
    pub(super) async fn copy_backup(&self, target: &Self, id: &BackupId) -> Result<()> {
        let name = ObjectName::Backup(id.clone());
        let manifest = ObjectName::Manifest(id.clone());
        let record = match self.backup(id).await {
            // a copy as it is needs no key
            Err(error) if error.lacks_key() => None,
            record => Some(record?.ok_or_else(|| RepositoryError::absent(self.locate(&name)))?),
        };
        let fields = self.backup_fields(id).await?;
        let fields = fields.ok_or_else(|| RepositoryError::absent(self.locate(&name)))?;
        // as a backup that is being taken: so that a clean-up spares what it has stored so far
        let intent = ObjectName::Intent(id.clone());
        let announced = Intent::of(id, fields.owners());
        let known = target.find::<Intent>(&intent).await?;
        if !known.is_some_and(|known| known.covers(&announced)) {
            target.create_json(&intent, &announced).await?;
        }
        let (_, header) = self.head(&manifest).await?;
        // before anything is written: a manifest fits packs in one form
        if self.copies_to(target, &manifest, &header).await?
            && self.shared_lie_alike(target, &fields).await?
        {
            match self.copy_backup_as_it_is(target, id).await {
                // an earlier copy, in another form, was broken off: this one goes on in that form
                Err(RepositoryError::Conflict { .. }) if record.is_some() => {}
                copied => return copied,
            }
        }
        match record {
            Some(record) => self.repack(target, record).await,
            None => self.backup(id).await.map(drop),
        }
    }

    async fn copy_backup_as_it_is(&self, target: &Self, id: &BackupId) -> Result<()> {
        let name = ObjectName::Backup(id.clone());
        let sizes = |listed: Vec<Listed>| -> BTreeMap<String, u64> {
            let sizes = listed.into_iter().map(|object| (object.path, object.bytes));
            sizes.collect()
        };
        // lists name places in packs: like the manifest they come once all packs are there in this form
        let folders = [format!("packs/{id}/"), format!("backups/{id}/files/")];
        let (mut here, mut there) = (Vec::new(), BTreeMap::new());
        for folder in folders {
            here.extend(sizes(self.list(&folder).await?));
            there.append(&mut sizes(target.list(&folder).await?));
        }
        let stored = self.raw(&name).await?;
        let record = self.find_record(&name).await?;
        let record = record.ok_or_else(|| RepositoryError::absent(self.locate(&name)))?;
        self.check_shared(&record).await?;
        for pack in record.shared_packs.iter().flat_map(SharedPacks::each) {
            let pack = pack_name(pack);
            if !self.lies_alike(target, &pack).await?.unwrap_or_default() {
                self.copy_as_it_is(target, &pack).await?;
            }
        }
        let mut copied: u64 = 0;
        for (path, bytes) in &here {
            let Some(object) = ObjectName::parse(path) else {
                continue;
            };
            let is_there = there.get(path) == Some(bytes)
                && self.lies_alike(target, &object).await? == Some(true);
            if is_there {
                // from an earlier attempt
                copied = copied.saturating_add(*bytes);
            } else {
                copied = copied.saturating_add(self.copy_as_it_is(target, &object).await?);
            }
        }
        let manifest = ObjectName::Manifest(id.clone());
        copied = copied.saturating_add(self.copy_as_it_is(target, &manifest).await?);
        if record.stored_bytes != copied {
            return Err(self.lacks_objects(&record, copied));
        }
        target.check_stays(&record).await?;
        if let Some(sealed) = self.sealed_header(&name, &record)? {
            self.copies_to(target, &name, &sealed).await?;
        }
        target.create_text(&name, stored).await?;
        target.forget_intent(id).await
    }

    /// Whether the target has the packs of others that a backup refers to in the same form, as far as it
    /// has them.
    async fn shared_lie_alike(&self, target: &Self, record: &BackupRecord) -> Result<bool> {
        for pack in record.shared_packs.iter().flat_map(SharedPacks::each) {
            if self.lies_alike(target, &pack_name(pack)).await? == Some(false) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Whether the target has an object in the same form; `None` where it has none.
    async fn lies_alike(&self, target: &Self, name: &ObjectName) -> Result<Option<bool>> {
        match target.trailer(name).await {
            Ok(theirs) => Ok(Some(theirs == self.trailer(name).await?)),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Copies an object with the wraps of its key; how many bytes it has.
    async fn copy_as_it_is(&self, target: &Self, name: &ObjectName) -> Result<u64> {
        let stored = self.raw(name).await?;
        let header = self.header_in(name, &stored)?;
        if !self.copies_to(target, name, &header).await? {
            return Err(RepositoryError::Damaged {
                path: self.locate(name),
                reason: "it is not encrypted as its backup is".to_owned(),
            });
        }
        let checked = stored.clone();
        let checked = blocking(move || container::check_stored(&checked)).await;
        let (_, trailer) = checked.map_err(|error| self.damaged(name, &error))?;
        let bytes = u64::try_from(stored.len()).unwrap_or(u64::MAX);
        target.create_object(name, stored, &trailer.digest).await?;
        Ok(bytes)
    }

    async fn repack(&self, target: &Self, record: BackupRecord) -> Result<()> {
        let name = ObjectName::Manifest(record.id.clone());
        // one key for all of a backup, however long it takes
        let sealing = target.sealing().await?;
        let mut lines = self
            .manifest_lines_of(&name, &record.manifest_digest)
            .await?;
        let mut stored_bytes: u64 = 0;
        let mut moved: Moved = BTreeMap::new();
        let (mut stored, mut shared) = (Vec::new(), BTreeMap::new());
        for (number, path) in packs_of(&lines) {
            let Some(ObjectName::Pack {
                backup,
                number: nth,
            }) = ObjectName::parse(&path)
            else {
                return Err(self.bad_manifest(&name, format!("no pack has this path: {path}")));
            };
            let is_own = backup == record.id;
            let id = (backup, nth);
            let pack = pack_name(id.clone());
            let (_, Header { digest_of, .. }) = self.head(&pack).await?;
            let header = Header {
                digest_of,
                ..target.plain_header(&pack)
            };
            let recipe = Recipe::new(header, sealing.as_ref())?;
            let repacked = self.repack_one(target, &pack, recipe).await?;
            if is_own {
                stored_bytes = stored_bytes.saturating_add(repacked.bytes);
            } else {
                shared.insert(id, repacked.bytes);
            }
            for (from, to) in repacked.moved {
                moved.insert((number, from), to);
            }
            stored.push((pack, repacked.stored_crc32));
        }
        for (pack, ours) in &stored {
            target.check_is_ours(pack, *ours).await?;
        }
        for line in &mut lines {
            if let ManifestLine::Files { path, digest } = line {
                let list = file_list(path);
                let list = list.ok_or_else(|| {
                    self.bad_manifest(&name, format!("no file list has this path: {path}"))
                })?;
                let mut files = self.manifest_lines_of(&list, digest).await?;
                self.move_all(&list, &mut files, &moved)?;
                let (new, bytes) = target
                    .store_lines(&record.id, &list, &files, sealing.as_ref())
                    .await?;
                *digest = new;
                stored_bytes = stored_bytes.saturating_add(bytes);
            }
        }
        self.move_all(&name, &mut lines, &moved)?;
        let (digest, bytes) = target
            .store_lines(&record.id, &name, &lines, sealing.as_ref())
            .await?;
        // what was given up by another copier may land meanwhile
        for (pack, ours) in &stored {
            target.check_is_ours(pack, *ours).await?;
        }
        let record = BackupRecord {
            stored_bytes: stored_bytes.saturating_add(bytes),
            shared_packs: SharedPacks::of(&shared),
            manifest_digest: digest,
            ..record
        };
        target.commit_backup(&record, sealing.as_ref()).await
    }

    /// Refuses a pack that somebody has written over since, in another form. A store that ignores
    /// conditions lets two copiers do that, and the manifest would name places that are not there.
    async fn check_is_ours(&self, name: &ObjectName, stored_crc32: u32) -> Result<()> {
        let found = self.trailer(name).await?;
        if found.stored_crc32 == stored_crc32 {
            return Ok(());
        }
        Err(RepositoryError::Conflict {
            path: self.locate(name),
            stored: format!("{}, crc32 {:08x}", found.digest, found.stored_crc32),
            new: format!("{}, crc32 {stored_crc32:08x}", found.digest),
        })
    }

    fn move_all(&self, name: &ObjectName, lines: &mut [ManifestLine], moved: &Moved) -> Result<()> {
        let mut lines = lines.iter_mut();
        let all = lines.try_for_each(|line| move_extents(line, moved));
        all.map_err(|reason| self.bad_manifest(name, reason))
    }

    /// Whether lines of a backup that are there say where frames of its packs were that somebody has written
    /// over since: a store that ignores conditions lets a write that was given up land later. Nothing else
    /// reads them: there is no such backup here.
    async fn is_of_a_lost_copy(&self, id: &BackupId) -> Result<bool> {
        Ok(!self.store()?.honours_conditions() && self.backup_fields(id).await?.is_none())
    }

    /// Stores a manifest or a file list of a backup. Gives its digest, and how many bytes it has there.
    async fn store_lines(
        &self,
        id: &BackupId,
        name: &ObjectName,
        lines: &[ManifestLine],
        sealing: Option<&Sealing>,
    ) -> Result<(String, u64)> {
        let mut text = Vec::new();
        for line in lines {
            add_line(&mut text, line);
        }
        let Recipe { header, key } = Recipe::new(self.plain_header(name), sealing)?;
        let level = self.place().settings().backup_level;
        let encoded = blocking(move || {
            let facts = serde_json::Map::new();
            let digest = container::digest(&text);
            container::encode(&header, &text, facts, level, key.as_ref())
                .map(|object| (Bytes::from(object), digest))
        });
        let (object, digest) = encoded.await.map_err(|error| self.damaged(name, &error))?;
        match self.create_object(name, object.clone(), &digest).await {
            Err(RepositoryError::Conflict { .. }) if self.is_of_a_lost_copy(id).await? => {
                self.store()?.delete(&name.path()).await?;
                self.create_object(name, object, &digest).await?;
            }
            created => created?,
        }
        // an earlier copy may have stored it, with another length
        let (_, bytes) = self.trailer_and_size(name).await?;
        Ok((digest, bytes))
    }

    /// Makes the target have a pack, with all of its frames: other backups refer to others of them.
    async fn repack_one(
        &self,
        target: &Self,
        name: &ObjectName,
        Recipe { header, key }: Recipe,
    ) -> Result<Repacked> {
        let stored = self.raw(name).await?;
        let frames = self.frame_places(name, &stored).await?;
        match target.trailer(name).await {
            Ok(theirs) if theirs.digest == self.trailer(name).await?.digest => {
                return target.as_it_lies(name, &frames, theirs.stored_crc32).await;
            }
            Err(error) if !error.is_not_found() => return Err(error),
            _ => {}
        }
        let reader = self.frames(name).await?;
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

    /// A pack that is there, from an earlier copy or for another backup: its frames may lie elsewhere than
    /// in ours, since keys and levels change.
    async fn as_it_lies(
        &self,
        name: &ObjectName,
        ours: &[PlacedFrame],
        stored_crc32: u32,
    ) -> Result<Repacked> {
        let stored = self.raw(name).await?;
        let frames = self.frame_places(name, &stored).await?;
        if frames.len() != ours.len() {
            return Err(RepositoryError::Damaged {
                path: self.locate(name),
                reason: format!(
                    "it is cut into other frames: expected={}, found={}",
                    ours.len(),
                    frames.len()
                ),
            });
        }
        let moved = std::iter::zip(ours, &frames);
        Ok(Repacked {
            bytes: u64::try_from(stored.len()).unwrap_or(u64::MAX),
            object: stored,
            digest: String::new(),
            stored_crc32,
            moved: moved
                .map(|((from, _), (to, _))| (place_of(from), place_of(to)))
                .collect(),
        })
    }

    /// The frames of a pack, and how many plain bytes each holds.
    async fn frame_places(&self, name: &ObjectName, stored: &Bytes) -> Result<Vec<PlacedFrame>> {
        let header = self.header_in(name, stored)?;
        let key = self.key_for(name, &header).await?;
        let read = stored.clone();
        // nothing of it is kept: 32 MiB may hold more than is ever read at once
        let frames = blocking(move || container::frame_places(&read, u64::MAX, key.as_ref()));
        frames.await.map_err(|error| self.damaged(name, &error))
    }
}

/// A pack in its new form.
struct Repacked {
    object: Bytes,
    digest: String,
    /// Of the stored bytes: two encodings of one content differ in it.
    stored_crc32: u32,
    bytes: u64,
    /// From where to where each frame has moved.
    moved: Vec<(Place, Place)>,
}

fn encode_frames(
    stored: &[u8],
    reader: &FrameReader,
    frames: &[PlacedFrame],
    header: &Header,
    level: i32,
    key: Option<&DataKey>,
) -> Result<Repacked, container::Error> {
    let mut encoder = Encoder::new(header, level, key)?;
    let mut object = Vec::new();
    let mut moved = Vec::with_capacity(frames.len());
    for (frame, plain_bytes) in frames {
        let (offset, length) = place_of(frame);
        let place = |position: u64| usize::try_from(position).unwrap_or(usize::MAX);
        let end = place(offset.saturating_add(length));
        // a stretch that the object does not have is refused as a frame cut short
        let frame = stored.get(place(offset)..end).unwrap_or_default();
        let plain = reader.frame(offset, frame, place(*plain_bytes))?;
        let new = encoder.frame(&plain, &mut object)?;
        moved.push(((offset, length), place_of(&new)));
    }
    let trailer = encoder.finish(serde_json::Map::new(), &mut object)?;
    Ok(Repacked {
        bytes: u64::try_from(object.len()).unwrap_or(u64::MAX),
        object: object.into(),
        digest: trailer.digest,
        stored_crc32: trailer.stored_crc32,
        moved,
    })
}

/// The packs that a manifest names, with their paths.
fn packs_of(lines: &[ManifestLine]) -> BTreeMap<u32, String> {
    let packs = lines.iter().filter_map(|line| match line {
        ManifestLine::Pack { number, path } => Some((*number, path.clone())),
        _ => None,
    });
    packs.collect()
}

fn move_extents(line: &mut ManifestLine, moved: &Moved) -> Result<(), String> {
    let extents = match line {
        ManifestLine::File { extents, .. } | ManifestLine::Outside { extents, .. } => extents,
        ManifestLine::Pack { .. }
        | ManifestLine::Directory(_)
        | ManifestLine::Files { .. }
        | ManifestLine::Link { .. } => return Ok(()),
    };
    for extent in extents {
        if let Extent::Stored(pack, offset, stored, _, _) = extent {
            let to = moved.get(&(*pack, (*offset, *stored)));
            let to = to
                .ok_or_else(|| format!("pack {pack} has no frame of {stored} bytes at {offset}"))?;
            (*offset, *stored) = *to;
        }
    }
    Ok(())
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
            r#"{"outside":{"path":"/c","mode":384,"mtime":0,"size":4,"extents":[[0,15,6,4,"bb"]]}}"#,
        ];
        let mut lines: Vec<ManifestLine> = lines
            .iter()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        let packs = packs_of(&lines);
        assert_eq!(packs[&0], "packs/x/00000000");
        let moved = BTreeMap::from([((0, (10, 5)), (40, 29)), ((0, (15, 6)), (69, 30))]);
        for line in &mut lines {
            move_extents(line, &moved).unwrap();
        }
        let mut text = Vec::new();
        for line in &lines {
            add_line(&mut text, line);
        }
        let text = String::from_utf8(text).unwrap();
        assert_eq!(text.matches("[0,40,29,4,\"aa\"]").count(), 2, "{text}");
        assert!(text.contains("[0,69,30,4,\"bb\"]"), "{text}");
        assert!(move_extents(&mut lines[1], &BTreeMap::new()).is_err());
    }
}
