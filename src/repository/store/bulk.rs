//! Large objects under names that are never used twice: uploaded in parts.
//!
//! No service creates an object out of parts only if there is none. So what is stored this way
//! counts for nothing until a small object, created as usual, refers to it.

use bytes::Bytes;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use object_store::MultipartId;
use object_store::multipart::PartId;
use object_store::path::Path;

use super::bounded::Bounded;
use super::fault::Fault;
use super::{Conditions, Created, Store, StoreError};

/// Up to this size one request does.
const WHOLE_BYTES_MAX: usize = 64 << 20;

/// The usual size of a part: large enough to be fast, small enough to be sent again.
const PART_BYTES: usize = 16 << 20;

/// S3's bound on parts of one object; Azure's and Google's are not lower.
const PARTS_MAX: usize = 10_000;

/// Parts of one object under way at a time; the store's own bound applies besides.
const PARTS_AT_A_TIME: usize = 4;

impl Store {
    /// Creates an object that may be large, under a name that nobody else writes.
    ///
    /// Over 64 MiB it is looked for first, then uploaded in parts, which are given up when this
    /// fails or is dropped.
    pub async fn create_bulk(&self, path: &str, bytes: Bytes) -> Result<Created, StoreError> {
        if bytes.len() <= WHOLE_BYTES_MAX || !self.client.has_parts() {
            return self.create(path, bytes).await;
        }
        let at = self.at(path);
        if self.conditions() == Conditions::Honoured {
            tracing::debug!("uploading {} in parts", self.locate(path));
        }
        if self.ask("write", path, || self.client.exists(&at)).await? {
            return Ok(Created::Exists);
        }
        let id = self.ask("write", path, || self.client.begin_upload(&at));
        let upload = Upload {
            client: self.client.clone(),
            at: at.clone(),
            id: Some(id.await?),
        };
        match self.upload(path, &upload, &bytes).await {
            Ok(()) => {
                upload.finished();
                Ok(Created::New)
            }
            Err(error) => {
                upload.abort().await;
                Err(error)
            }
        }
    }

    async fn upload(&self, path: &str, upload: &Upload, bytes: &Bytes) -> Result<(), StoreError> {
        let Some(id) = &upload.id else { return Ok(()) };
        let at = &upload.at;
        let size = part_bytes(bytes.len());
        let parts = (0..bytes.len()).step_by(size).enumerate();
        let puts = parts.map(|(index, start)| {
            let part = bytes.slice(start..bytes.len().min(start + size));
            let put = move || self.client.put_part(at, id, index, part.clone());
            async move { self.ask("write", path, put).await }
        });
        let parts: Vec<PartId> = stream::iter(puts)
            .buffered(PARTS_AT_A_TIME)
            .try_collect()
            .await?;
        self.ask("write", path, || self.complete(at, id, parts.clone()))
            .await
    }

    /// An upload that an earlier attempt of ours completed is gone, and the object is there.
    async fn complete(&self, at: &Path, id: &MultipartId, parts: Vec<PartId>) -> Result<(), Fault> {
        match self.client.complete_upload(at, id, parts).await {
            Err(fault @ (Fault::NotFound | Fault::Refused { .. })) => {
                if self.client.exists(at).await? {
                    return Ok(());
                }
                Err(fault)
            }
            done => done,
        }
    }
}

/// So many bytes that the object has no more parts than it may have.
fn part_bytes(object_bytes: usize) -> usize {
    PART_BYTES.max(object_bytes.div_ceil(PARTS_MAX))
}

/// An upload that has begun; given up when it is dropped unfinished.
struct Upload {
    client: Bounded,
    at: Path,
    id: Option<MultipartId>,
}

impl Upload {
    fn finished(mut self) {
        self.id = None;
    }

    async fn abort(mut self) {
        if let Some(id) = self.id.take() {
            abort(&self.client, &self.at, &id).await;
        }
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        let (Some(id), Ok(runtime)) = (self.id.take(), tokio::runtime::Handle::try_current())
        else {
            return;
        };
        let (client, at) = (self.client.clone(), self.at.clone());
        runtime.spawn(async move { abort(&client, &at, &id).await });
    }
}

async fn abort(client: &Bounded, at: &Path, id: &MultipartId) {
    if let Err(fault) = client.abort_upload(at, id).await {
        tracing::warn!(
            "an unfinished upload of {at} could not be given up ({}): its parts cost money until \
             a lifecycle rule of the bucket removes them",
            fault.reason()
        );
    }
}
