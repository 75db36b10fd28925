//! A store in memory whose requests go wrong as a test says.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::{self, BoxStream};
use object_store::client::{HttpError, HttpErrorKind};
use object_store::memory::InMemory;
use object_store::multipart::{MultipartStore, PartId};
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, GetResultPayload, ListResult, MultipartId,
    MultipartUpload, ObjectMeta, ObjectStore, PutMode, PutMultipartOptions, PutOptions, PutPayload,
    PutResult, RenameOptions, Result,
};

use super::answer::Answer;

/// What happens to one request.
#[derive(Debug, Clone)]
pub(super) enum Step {
    /// It is done.
    Do,
    /// The service refuses.
    Refuse(Answer),
    /// The connection breaks before the service has it.
    FailBefore,
    /// The service does it, and the connection breaks before the answer.
    FailAfter,
    /// Nobody ever answers.
    Hang,
    /// It is done, and nobody hears of it.
    HangAfter,
    /// The body of the answer ends after so many bytes, with no error.
    Cut(usize),
    /// The body of the answer stops after so many bytes, and the connection stays.
    Stall(usize),
    /// Whatever is there is written over.
    IgnoreCondition,
}

/// The store; what the script does not say is done.
#[derive(Debug, Default)]
pub(super) struct Scripted {
    pub(super) inner: InMemory,
    script: Mutex<VecDeque<Step>>,
    asked: Mutex<Vec<String>>,
}

impl Scripted {
    pub(super) fn new(steps: impl IntoIterator<Item = Step>) -> Arc<Self> {
        Arc::new(Self {
            script: Mutex::new(steps.into_iter().collect()),
            ..Self::default()
        })
    }

    /// The requests so far, by kind.
    pub(super) fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }

    fn step(&self, request: &str) -> Step {
        self.asked.lock().unwrap().push(request.to_owned());
        let next = self.script.lock().unwrap().pop_front();
        next.unwrap_or(Step::Do)
    }

    async fn play<T>(&self, request: &str, work: impl Future<Output = Result<T>>) -> Result<T> {
        match self.step(request) {
            Step::Refuse(answer) => Err(generic(HttpError::new(HttpErrorKind::Unknown, answer))),
            Step::FailBefore => Err(broken()),
            Step::Hang => std::future::pending().await,
            Step::FailAfter => {
                work.await?;
                Err(broken())
            }
            Step::HangAfter => {
                work.await?;
                std::future::pending().await
            }
            Step::Do | Step::Cut(_) | Step::Stall(_) | Step::IgnoreCondition => work.await,
        }
    }
}

fn generic(error: HttpError) -> Error {
    Error::Generic {
        store: "scripted",
        source: Box::new(error),
    }
}

fn broken() -> Error {
    let reset = std::io::Error::from(std::io::ErrorKind::ConnectionReset);
    generic(HttpError::new(HttpErrorKind::Interrupted, reset))
}

impl fmt::Display for Scripted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("scripted")
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl ObjectStore for Scripted {
    async fn put_opts(
        &self,
        location: &Path,
        payload: PutPayload,
        mut options: PutOptions,
    ) -> Result<PutResult> {
        let request = match options.mode {
            PutMode::Create => "create",
            _ => "put",
        };
        let next = self.script.lock().unwrap().front().cloned();
        if matches!(next, Some(Step::IgnoreCondition)) {
            options.mode = PutMode::Overwrite;
        }
        let put = self.inner.put_opts(location, payload, options);
        self.play(request, put).await
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(location, options).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        let request = if options.head { "head" } else { "get" };
        let next = self.script.lock().unwrap().front().cloned();
        let got = self.play(request, self.inner.get_opts(location, options));
        let got = got.await?;
        let (length, rest) = match next {
            Some(Step::Cut(length)) => (length, stream::empty().boxed()),
            Some(Step::Stall(length)) => (length, stream::pending().boxed()),
            _ => return Ok(got),
        };
        let (meta, range) = (got.meta.clone(), got.range.clone());
        let (attributes, extensions) = (got.attributes.clone(), got.extensions.clone());
        let bytes = got.bytes().await?.slice(..length);
        let body = stream::iter([Ok(bytes)]).chain(rest);
        Ok(GetResult {
            payload: GetResultPayload::Stream(body.boxed()),
            meta,
            range,
            attributes,
            extensions,
        })
    }

    async fn get_ranges(
        &self,
        location: &Path,
        ranges: &[std::ops::Range<u64>],
    ) -> Result<Vec<Bytes>> {
        self.inner.get_ranges(location, ranges).await
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        self.inner.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let listed = self.inner.list(prefix);
        match self.step("list") {
            Step::Do => listed,
            Step::Stall(length) => listed.take(length).chain(stream::pending()).boxed(),
            _ => listed.take(1).chain(stream::iter([Err(broken())])).boxed(),
        }
    }

    fn list_with_offset(
        &self,
        prefix: Option<&Path>,
        offset: &Path,
    ) -> BoxStream<'static, Result<ObjectMeta>> {
        self.inner.list_with_offset(prefix, offset)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        let listed = self.inner.list_with_delimiter(prefix);
        self.play("list", listed).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.inner.copy_opts(from, to, options).await
    }

    async fn rename_opts(&self, from: &Path, to: &Path, options: RenameOptions) -> Result<()> {
        self.inner.rename_opts(from, to, options).await
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl MultipartStore for Scripted {
    async fn create_multipart(&self, path: &Path) -> Result<MultipartId> {
        self.inner.create_multipart(path).await
    }

    async fn create_multipart_opts(
        &self,
        path: &Path,
        options: PutMultipartOptions,
    ) -> Result<MultipartId> {
        let begun = self.inner.create_multipart_opts(path, options);
        self.play("begin", begun).await
    }

    async fn put_part(
        &self,
        path: &Path,
        id: &MultipartId,
        index: usize,
        data: PutPayload,
    ) -> Result<PartId> {
        let put = self.inner.put_part(path, id, index, data);
        self.play("part", put).await
    }

    async fn complete_multipart(
        &self,
        path: &Path,
        id: &MultipartId,
        parts: Vec<PartId>,
    ) -> Result<PutResult> {
        let completed = self.inner.complete_multipart(path, id, parts);
        self.play("complete", completed).await
    }

    async fn abort_multipart(&self, path: &Path, id: &MultipartId) -> Result<()> {
        self.play("abort", self.inner.abort_multipart(path, id))
            .await
    }
}
