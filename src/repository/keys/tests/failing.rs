//! A store in memory that fails from some request on, before or after it did what was asked.

use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};

use async_trait::async_trait;
use futures_util::StreamExt as _;
use futures_util::stream::{self, BoxStream};
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta,
    ObjectStore, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};

use super::*;
use crate::repository::store::StoreOptions;

/// Whether the first request that fails was done nevertheless.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fails {
    Before,
    After,
}

#[derive(Debug)]
struct Failing {
    inner: Arc<InMemory>,
    left: AtomicUsize,
    fails: Fails,
}

/// A store over `objects` that fails after `requests`, for good.
pub(super) fn failing(objects: &Arc<InMemory>, requests: usize, fails: Fails) -> Store {
    over(Arc::new(Failing {
        inner: Arc::clone(objects),
        left: AtomicUsize::new(requests),
        fails,
    }))
}

/// A store over `objects` that does not fail.
pub(super) fn sound(objects: &Arc<InMemory>) -> Store {
    over(Arc::clone(objects) as _)
}

fn over(objects: Arc<dyn ObjectStore>) -> Store {
    let mut options = StoreOptions::at("s3://bucket");
    options.retry_budget = std::time::Duration::ZERO;
    Store::over(objects, &options)
}

/// What becomes of a request.
enum Fate {
    Done,
    DoneAndFailed,
    Failed,
}

impl Failing {
    fn fate(&self) -> Fate {
        let less = |left: usize| left.checked_sub(1);
        match self
            .left
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, less)
        {
            Ok(1) if self.fails == Fails::After => Fate::DoneAndFailed,
            Ok(_) => Fate::Done,
            Err(_none) => Fate::Failed,
        }
    }

    async fn play<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        match self.fate() {
            Fate::Done => work.await,
            Fate::DoneAndFailed => work.await.and(Err(broken())),
            Fate::Failed => Err(broken()),
        }
    }
}

fn broken() -> Error {
    Error::Generic {
        store: "failing",
        source: "it fails".into(),
    }
}

impl fmt::Display for Failing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("failing")
    }
}

#[async_trait]
impl ObjectStore for Failing {
    async fn put_opts(
        &self,
        location: &Path,
        payload: PutPayload,
        options: PutOptions,
    ) -> Result<PutResult> {
        self.play(self.inner.put_opts(location, payload, options))
            .await
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.play(self.inner.put_multipart_opts(location, options))
            .await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        self.play(self.inner.get_opts(location, options)).await
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        let deleted = self.inner.delete_stream(locations);
        match self.fate() {
            Fate::Done => deleted,
            Fate::DoneAndFailed => deleted.map(|done| done.and(Err(broken()))).boxed(),
            Fate::Failed => stream::iter([Err(broken())]).boxed(),
        }
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        match self.fate() {
            Fate::Done => self.inner.list(prefix),
            Fate::DoneAndFailed | Fate::Failed => stream::iter([Err(broken())]).boxed(),
        }
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.play(self.inner.list_with_delimiter(prefix)).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.play(self.inner.copy_opts(from, to, options)).await
    }
}
