//! Misbehaviour on purpose: which request suffers is drawn by seed, and every fault is counted, so that
//! a story can say that each of them came to pass. So are the requests, by the kinds that a store
//! charges for. `GET /-/faults` answers with the counts.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use clap::Args;
use futures_util::future::BoxFuture;
use futures_util::{StreamExt as _, stream};
use hyper::body::{Body as _, Incoming};
use hyper::header::{HeaderMap, HeaderValue};
use hyper::service::Service;
use hyper::{Method, Request};
use s3s::dto::StreamingBlob;
use s3s::service::S3Service;
use s3s::stream::DynByteStream;
use s3s::{Body, HttpError, HttpResponse, S3Error, S3ErrorCode};

/// What the counts are asked for with, without a signature.
const COUNTS: &str = "/-/faults";
/// A request on its way for no longer than this keeps nobody waiting for ever.
const HALF_OPEN: Duration = Duration::from_mins(10);

/// How often each fault falls on a request, in per cent.
#[derive(Debug, Clone, Args)]
pub(crate) struct Faults {
    /// Where the draws begin.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// 503 `SlowDown`, and nothing done.
    #[arg(long, default_value_t = 0)]
    slow_down: u64,
    /// 500 `InternalError`, and nothing done.
    #[arg(long, default_value_t = 0)]
    fail_before: u64,
    /// Everything done, and the connection dropped without an answer.
    #[arg(long, default_value_t = 0)]
    fail_after: u64,
    /// Nothing done, and never an answer.
    #[arg(long, default_value_t = 0)]
    half_open: u64,
    /// Half of the body sent, and the connection dropped. Counts only where there is a body.
    #[arg(long, default_value_t = 0)]
    cut: u64,
    /// Every request waits this many milliseconds at most.
    #[arg(long, default_value_t = 0)]
    slow: u64,
    /// Every request is answered with this S3 error.
    #[arg(long)]
    answer: Option<String>,
    /// `--answer` for reads or for writes alone.
    #[arg(long, value_enum, requires = "answer")]
    answer_to: Option<AnswerTo>,
    /// The region that `--answer` names.
    #[arg(long, requires = "answer")]
    region: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum AnswerTo {
    Reads,
    Writes,
}

#[derive(Debug, Default)]
struct Counts {
    requests: AtomicU64,
    puts: AtomicU64,
    /// Bytes of their bodies.
    put_bytes: AtomicU64,
    gets: AtomicU64,
    heads: AtomicU64,
    lists: AtomicU64,
    /// Of one object; those of many are posts.
    deletes: AtomicU64,
    posts: AtomicU64,
    slow_down: AtomicU64,
    fail_before: AtomicU64,
    fail_after: AtomicU64,
    half_open: AtomicU64,
    cut: AtomicU64,
    slow: AtomicU64,
    answer: AtomicU64,
}

impl Counts {
    /// Counts a request as what it asks for.
    fn note(&self, request: &Request<Incoming>) {
        let query = request.uri().query().unwrap_or_default();
        count(match *request.method() {
            Method::PUT => {
                let bytes = request.body().size_hint().lower();
                self.put_bytes.fetch_add(bytes, Ordering::SeqCst);
                &self.puts
            }
            Method::HEAD => &self.heads,
            Method::DELETE => &self.deletes,
            Method::POST => &self.posts,
            _ if query.contains("list-type=") => &self.lists,
            _ => &self.gets,
        });
    }
}

/// An S3 service that misbehaves.
struct Faulty {
    inner: S3Service,
    faults: Faults,
    counts: Counts,
}

/// What falls on one request.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fault {
    None,
    SlowDown,
    FailBefore,
    FailAfter,
    HalfOpen,
    Cut,
}

impl Faulty {
    fn draw(&self, number: u64) -> Fault {
        let mut drawn = mixed(self.faults.seed, number) % 100;
        let each = [
            (self.faults.slow_down, Fault::SlowDown),
            (self.faults.fail_before, Fault::FailBefore),
            (self.faults.fail_after, Fault::FailAfter),
            (self.faults.half_open, Fault::HalfOpen),
            (self.faults.cut, Fault::Cut),
        ];
        for (per_cent, fault) in each {
            match drawn.checked_sub(per_cent) {
                None => return fault,
                Some(rest) => drawn = rest,
            }
        }
        Fault::None
    }

    fn fixed_answer(&self, method: &Method) -> Option<S3Error> {
        let code = self.faults.answer.as_ref()?;
        let read = matches!(*method, Method::GET | Method::HEAD);
        match self.faults.answer_to {
            Some(AnswerTo::Reads) if !read => return None,
            Some(AnswerTo::Writes) if read => return None,
            _ => {}
        }
        let code = S3ErrorCode::from_bytes(code.as_bytes())?;
        let mut error = S3Error::with_message(code, "the endpoint was told to say so");
        if let Some(region) = &self.faults.region {
            let mut headers = HeaderMap::new();
            headers.insert("x-amz-bucket-region", HeaderValue::from_str(region).ok()?);
            error.set_headers(headers);
        }
        Some(error)
    }

    fn counts(&self) -> String {
        let Counts {
            requests,
            puts,
            put_bytes,
            gets,
            heads,
            lists,
            deletes,
            posts,
            slow_down,
            fail_before,
            fail_after,
            half_open,
            cut,
            slow,
            answer,
        } = &self.counts;
        let each = [
            ("requests", requests),
            ("puts", puts),
            ("put_bytes", put_bytes),
            ("gets", gets),
            ("heads", heads),
            ("lists", lists),
            ("deletes", deletes),
            ("posts", posts),
            ("slow_down", slow_down),
            ("fail_before", fail_before),
            ("fail_after", fail_after),
            ("half_open", half_open),
            ("cut", cut),
            ("slow", slow),
            ("answer", answer),
        ]
        .map(|(name, count)| format!("\"{name}\":{}", count.load(Ordering::SeqCst)));
        format!("{{{}}}\n", each.join(","))
    }

    async fn answer(
        self: Arc<Self>,
        request: Request<Incoming>,
    ) -> Result<HttpResponse, HttpError> {
        if request.uri().path() == COUNTS {
            return Ok(HttpResponse::new(Body::from(self.counts())));
        }
        let number = self.counts.requests.fetch_add(1, Ordering::SeqCst);
        self.counts.note(&request);
        if let Some(error) = self.fixed_answer(request.method()) {
            count(&self.counts.answer);
            return answered(error, request).await;
        }
        if let Some(wait) = mixed(!self.faults.seed, number).checked_rem(self.faults.slow) {
            count(&self.counts.slow);
            wait_ms(wait).await;
        }
        match self.draw(number) {
            Fault::SlowDown => {
                count(&self.counts.slow_down);
                answered(S3ErrorCode::SlowDown.into(), request).await
            }
            Fault::FailBefore => {
                count(&self.counts.fail_before);
                answered(S3ErrorCode::InternalError.into(), request).await
            }
            Fault::HalfOpen => {
                count(&self.counts.half_open);
                wait_ms(u64::try_from(HALF_OPEN.as_millis()).unwrap_or(u64::MAX)).await;
                Err(dropped())
            }
            Fault::FailAfter => {
                self.inner.call(request.map(Body::from)).await?;
                count(&self.counts.fail_after);
                Err(dropped())
            }
            Fault::Cut => {
                let (head, mut body) = self.inner.call(request.map(Body::from)).await?.into_parts();
                let mut chunks: Vec<Bytes> = Vec::new();
                while let Some(chunk) = body.next().await {
                    chunks.push(chunk.map_err(HttpError::new)?);
                }
                let whole = Bytes::from(chunks.concat());
                if whole.is_empty() {
                    return Ok(HttpResponse::from_parts(head, Body::empty()));
                }
                count(&self.counts.cut);
                Ok(HttpResponse::from_parts(head, half_of(&whole)))
            }
            Fault::None => self.inner.call(request.map(Body::from)).await,
        }
    }
}

/// An S3 service that misbehaves as `faults` say.
pub(crate) fn misbehaving(inner: S3Service, faults: Faults) -> Shared {
    Shared(Arc::new(Faulty {
        inner,
        faults,
        counts: Counts::default(),
    }))
}

/// [`Faulty`], shared by the connections.
#[derive(Clone)]
pub(crate) struct Shared(Arc<Faulty>);

impl Service<Request<Incoming>> for Shared {
    type Response = HttpResponse;
    type Error = HttpError;
    type Future = BoxFuture<'static, Result<HttpResponse, HttpError>>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        Box::pin(Arc::clone(&self.0).answer(request))
    }
}

/// The answer to a request whose body was read to its end: else the client would see a broken
/// connection and never the answer.
async fn answered(error: S3Error, request: Request<Incoming>) -> Result<HttpResponse, HttpError> {
    let mut body = Body::from(request.into_body());
    while body.next().await.is_some_and(|chunk| chunk.is_ok()) {}
    error
        .to_http_response()
        .map_err(|error| HttpError::new(Box::new(error)))
}

/// The first half of a body, and then the end of the connection.
fn half_of(whole: &Bytes) -> Body {
    let half = whole.slice(..whole.len() / 2);
    let broken = std::io::Error::other("cut on purpose");
    let chunks = stream::iter([Ok(half), Err(broken)]);
    Body::from(DynByteStream::from(StreamingBlob::wrap(chunks)))
}

fn dropped() -> HttpError {
    HttpError::new("dropped on purpose".into())
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::SeqCst);
}

#[expect(
    clippy::disallowed_methods,
    reason = "slowness is what this endpoint is asked for"
)]
async fn wait_ms(wait: u64) {
    tokio::time::sleep(Duration::from_millis(wait)).await;
}

/// `SplitMix64`: well spread also for seeds and numbers that follow one another.
fn mixed(seed: u64, number: u64) -> u64 {
    let mut z = seed
        .wrapping_mul(0x9E37_79B9_7F4A_7C15)
        .wrapping_add(number.wrapping_add(1).wrapping_mul(0xD1B5_4A32_D192_ED03));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}
