//! One attempt at each request: bounded in time, in number, and in what it believes.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::StreamExt as _;
use object_store::multipart::{MultipartStore, PartId};
use object_store::path::Path;
use object_store::{
    Attribute, Attributes, Extensions, GetOptions, GetRange, GetResult, GetResultPayload,
    ListResult, MultipartId, ObjectMeta, ObjectStore, ObjectStoreExt as _, PutMode,
    PutMultipartOptions, PutOptions,
};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::fault::Fault;
use super::local::Brief;
use super::traffic::{Meter, Request};

/// A line slower than this is taken for dead: it could not keep up with any server's WAL.
const SLOWEST_BYTES_PER_SECOND: u64 = 64 << 10;

/// More than this is not set aside on a service's word alone.
const BODY_RESERVE_MAX: u64 = 16 << 20;

type Result<T> = std::result::Result<T, Fault>;

/// What a read gave.
#[derive(Debug)]
pub(super) struct Body {
    pub(super) bytes: Bytes,
    /// The size of the whole object.
    pub(super) object_bytes: u64,
}

/// A provider's store, asked within bounds.
#[derive(Debug, Clone)]
pub(super) struct Bounded {
    objects: Arc<dyn ObjectStore>,
    parts: Option<Parts>,
    permits: Arc<Semaphore>,
    silence: Duration,
    attributes: Attributes,
    meter: Meter,
    /// Whether "the last bytes" can be asked for without knowing the size.
    has_suffixes: bool,
}

/// Uploads in parts, for stores that have them.
#[derive(Clone)]
struct Parts(Arc<dyn MultipartStore>);

impl std::fmt::Debug for Parts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Parts")
    }
}

impl Bounded {
    /// `silence` is how long the store may take to begin an answer or to go on with one.
    pub(super) fn new(
        objects: Arc<dyn ObjectStore>,
        concurrency: usize,
        silence: Duration,
    ) -> Self {
        Self {
            objects,
            parts: None,
            permits: Arc::new(Semaphore::new(concurrency.clamp(1, Semaphore::MAX_PERMITS))),
            silence,
            attributes: Attributes::default(),
            meter: Meter::default(),
            has_suffixes: true,
        }
    }

    /// For a service that gives no last bytes of an object whose size it is not told.
    pub(super) fn without_suffixes(self) -> Self {
        Self {
            has_suffixes: false,
            ..self
        }
    }

    /// With uploads in parts.
    pub(super) fn with_parts(self, parts: Arc<dyn MultipartStore>) -> Self {
        Self {
            parts: Some(Parts(parts)),
            ..self
        }
    }

    /// With a storage class for what is written.
    pub(super) fn with_storage_class(mut self, class: &str) -> Self {
        self.attributes
            .insert(Attribute::StorageClass, class.to_owned().into());
        self
    }

    /// What is counted of all that is asked of it.
    pub(super) fn meter(&self) -> &Meter {
        &self.meter
    }

    /// Whether objects can be uploaded in parts.
    pub(super) fn has_parts(&self) -> bool {
        self.parts.is_some()
    }

    /// Writes an object; with `PutMode::Create`, only where there is none.
    pub(super) async fn put(&self, path: &Path, bytes: Bytes, mode: PutMode) -> Result<()> {
        self.put_with(path, bytes, mode, Extensions::new()).await
    }

    /// Creates an object where there is none, and says that it is soon superseded.
    pub(super) async fn create_brief(&self, path: &Path, bytes: Bytes) -> Result<()> {
        let mut extensions = Extensions::new();
        extensions.insert(Brief);
        self.put_with(path, bytes, PutMode::Create, extensions)
            .await
    }

    async fn put_with(
        &self,
        path: &Path,
        bytes: Bytes,
        mode: PutMode,
        extensions: Extensions,
    ) -> Result<()> {
        let bound = self.transfer(bytes.len());
        let options = PutOptions {
            mode,
            attributes: self.attributes.clone(),
            extensions,
            ..PutOptions::default()
        };
        let length = bytes.len();
        let put = self.objects.put_opts(path, bytes.into(), options);
        let put = self.within(Request::Put, bound, put).await;
        if matches!(put, Ok(_) | Err(Fault::Exists)) {
            self.meter.written(length);
        }
        put.map(|_| ())
    }

    /// Whether there is such an object.
    pub(super) async fn exists(&self, path: &Path) -> Result<bool> {
        let head = self.objects.head(path);
        match self.within(Request::Head, self.silence, head).await {
            Ok(_) => Ok(true),
            Err(Fault::NotFound) => Ok(false),
            Err(fault) => Err(fault),
        }
    }

    /// Reads an object, or a range of it. What is shorter than the store said is an error.
    pub(super) async fn read(&self, path: &Path, range: Option<GetRange>) -> Result<Body> {
        match range {
            Some(GetRange::Suffix(length)) if !self.has_suffixes => {
                self.read_end(path, length).await
            }
            range => self.read_now(path, range).await,
        }
    }

    /// Objects are written once, so the size does not change in between.
    async fn read_end(&self, path: &Path, length: u64) -> Result<Body> {
        let head = self.objects.head(path);
        let size = self.within(Request::Head, self.silence, head).await?.size;
        if size == 0 || length == 0 {
            return Ok(Body {
                bytes: Bytes::new(),
                object_bytes: size,
            });
        }
        let range = GetRange::Bounded(size.saturating_sub(length)..size);
        self.read_now(path, Some(range)).await
    }

    async fn read_now(&self, path: &Path, range: Option<GetRange>) -> Result<Body> {
        let _permit = self.permit().await?;
        let read = self.read_once(path, range);
        let body = self.meter.counted(Request::Get, read).await?;
        self.meter.read(body.bytes.len());
        Ok(body)
    }

    async fn read_once(&self, path: &Path, range: Option<GetRange>) -> Result<Body> {
        let options = GetOptions {
            range,
            ..GetOptions::default()
        };
        let got = self.in_time(self.silence, self.objects.get_opts(path, options));
        let got = got.await?;
        let object_bytes = got.meta.size;
        let expected = got.range.end.saturating_sub(got.range.start);
        let size = usize::try_from(expected).unwrap_or(usize::MAX);
        let bytes = timeout(self.transfer(size), self.body(got, expected));
        let bytes = bytes
            .await
            .unwrap_or_else(|_| Err(too_slow(self.transfer(size))))?;
        Ok(Body {
            bytes,
            object_bytes,
        })
    }

    async fn body(&self, got: GetResult, expected: u64) -> Result<Bytes> {
        if matches!(got.payload, GetResultPayload::File(..)) {
            let bytes = got.bytes().await?;
            return whole(bytes, expected);
        }
        let mut stream = got.into_stream();
        let first = self.chunk(&mut stream).await?.unwrap_or_default();
        if u64::try_from(first.len()) == Ok(expected) {
            return Ok(first);
        }
        let reserve = usize::try_from(expected.min(BODY_RESERVE_MAX)).unwrap_or_default();
        let mut bytes = BytesMut::with_capacity(reserve);
        bytes.extend_from_slice(&first);
        while u64::try_from(bytes.len()).is_ok_and(|length| length <= expected) {
            match self.chunk(&mut stream).await? {
                Some(chunk) => bytes.extend_from_slice(&chunk),
                None => break,
            }
        }
        whole(bytes.freeze(), expected)
    }

    async fn chunk<S>(&self, stream: &mut S) -> Result<Option<Bytes>>
    where
        S: futures_util::Stream<Item = object_store::Result<Bytes>> + Unpin,
    {
        match timeout(self.silence, stream.next()).await {
            Ok(next) => Ok(next.transpose()?),
            Err(_) => Err(silent(self.silence)),
        }
    }

    /// Every object below a prefix, in no order.
    pub(super) async fn list(&self, prefix: &Path) -> Result<Vec<ObjectMeta>> {
        let _permit = self.permit().await?;
        let listed = self.list_once(prefix, usize::MAX);
        let listed = self.meter.counted(Request::List, listed).await?;
        Ok(listed.unwrap_or_default())
    }

    /// The same; `None` where there are more than `most`.
    pub(super) async fn list_at_most(
        &self,
        prefix: &Path,
        most: usize,
    ) -> Result<Option<Vec<ObjectMeta>>> {
        let _permit = self.permit().await?;
        let listed = self.list_once(prefix, most);
        self.meter.counted(Request::List, listed).await
    }

    async fn list_once(&self, prefix: &Path, most: usize) -> Result<Option<Vec<ObjectMeta>>> {
        let mut stream = self.objects.list(Some(prefix));
        let mut found = Vec::new();
        loop {
            match timeout(self.silence, stream.next()).await {
                Ok(Some(_)) if found.len() == most => return Ok(None),
                Ok(Some(object)) => found.push(object?),
                Ok(None) => return Ok(Some(found)),
                Err(_) => return Err(silent(self.silence)),
            }
        }
    }

    /// The objects and the folders directly below a prefix.
    pub(super) async fn entries(&self, prefix: &Path) -> Result<ListResult> {
        // pages of a thousand; a folder of ours holds a few of them
        let bound = self.silence.saturating_mul(4);
        let list = self.objects.list_with_delimiter(Some(prefix));
        self.within(Request::List, bound, list).await
    }

    /// Deletes an object that may not be there.
    pub(super) async fn delete(&self, path: &Path) -> Result<()> {
        let delete = self.objects.delete(path);
        match self.within(Request::Delete, self.silence, delete).await {
            Ok(()) | Err(Fault::NotFound) => Ok(()),
            Err(fault) => Err(fault),
        }
    }

    /// Deletes objects that may not be there, in the store's own way of deleting many.
    pub(super) async fn delete_all(&self, paths: Vec<Path>) -> Result<()> {
        let paths = futures_util::stream::iter(paths.into_iter().map(Ok)).boxed();
        let mut deletions = self.objects.delete_stream(paths);
        let deleted = async {
            while let Some(deleted) = deletions.next().await {
                match deleted {
                    Ok(_) | Err(object_store::Error::NotFound { .. }) => {}
                    Err(error) => return Err(error),
                }
            }
            Ok(())
        };
        self.within(Request::Delete, self.silence, deleted).await
    }

    /// Begins an upload in parts.
    pub(super) async fn begin_upload(&self, path: &Path) -> Result<MultipartId> {
        let options = PutMultipartOptions {
            attributes: self.attributes.clone(),
            ..PutMultipartOptions::default()
        };
        let begun = self.parts()?.create_multipart_opts(path, options);
        self.within(Request::Part, self.silence, begun).await
    }

    /// Uploads one part.
    pub(super) async fn put_part(
        &self,
        path: &Path,
        id: &MultipartId,
        index: usize,
        bytes: Bytes,
    ) -> Result<PartId> {
        let bound = self.transfer(bytes.len());
        let length = bytes.len();
        let put = self.parts()?.put_part(path, id, index, bytes.into());
        let part = self.within(Request::Part, bound, put).await?;
        self.meter.written(length);
        Ok(part)
    }

    /// Makes the object out of its parts.
    pub(super) async fn complete_upload(
        &self,
        path: &Path,
        id: &MultipartId,
        parts: Vec<PartId>,
    ) -> Result<()> {
        // a store may take minutes to put thousands of parts together
        let bound = self.silence.saturating_mul(10);
        let completed = self.parts()?.complete_multipart(path, id, parts);
        self.within(Request::Part, bound, completed)
            .await
            .map(|_| ())
    }

    /// Gives an upload up, so that its parts cost nothing.
    pub(super) async fn abort_upload(&self, path: &Path, id: &MultipartId) -> Result<()> {
        let aborted = self.parts()?.abort_multipart(path, id);
        self.within(Request::Part, self.silence, aborted).await
    }

    fn parts(&self) -> Result<&dyn MultipartStore> {
        match &self.parts {
            Some(Parts(parts)) => Ok(parts.as_ref()),
            None => Err(Fault::Unsupported {
                reason: "this store takes no uploads in parts".to_owned(),
            }),
        }
    }

    async fn within<T>(
        &self,
        kind: Request,
        bound: Duration,
        request: impl Future<Output = object_store::Result<T>>,
    ) -> Result<T> {
        let _permit = self.permit().await?;
        let attempt = self.in_time(bound, request);
        self.meter.counted(kind, attempt).await
    }

    async fn in_time<T>(
        &self,
        bound: Duration,
        request: impl Future<Output = object_store::Result<T>>,
    ) -> Result<T> {
        match timeout(bound, request).await {
            Ok(answer) => Ok(answer?),
            Err(_) => Err(silent(bound)),
        }
    }

    /// How long it may take to move that much.
    fn transfer(&self, bytes: usize) -> Duration {
        let bytes = u64::try_from(bytes).unwrap_or(u64::MAX);
        let moving = Duration::from_secs(bytes / SLOWEST_BYTES_PER_SECOND);
        self.silence.saturating_add(moving)
    }

    async fn permit(&self) -> Result<tokio::sync::SemaphorePermit<'_>> {
        let permit = self.permits.acquire().await;
        permit.map_err(|closed| Fault::transient(closed.to_string()))
    }
}

fn whole(bytes: Bytes, expected: u64) -> Result<Bytes> {
    if u64::try_from(bytes.len()) == Ok(expected) {
        return Ok(bytes);
    }
    Err(Fault::transient(format!(
        "the answer is not as long as announced: expected={expected} bytes, received={}",
        bytes.len()
    )))
}

fn silent(bound: Duration) -> Fault {
    Fault::transient(format!("no answer within {} s", bound.as_secs()))
}

fn too_slow(bound: Duration) -> Fault {
    Fault::transient(format!(
        "not all of the answer within {} s",
        bound.as_secs()
    ))
}
