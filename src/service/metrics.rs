//! The endpoint that Prometheus scrapes: `GET /metrics`, and nothing else.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use super::exposition::Shown;
use crate::clock::Clock;
use crate::error::{Error, Result};
use crate::receive::StreamGauges;
use crate::repository::destination::OpenDestination;
use crate::retry::Backoff;

/// Connections at a time; more wait in the system's queue.
const CONNECTIONS_MAX: usize = 16;
/// How long a client may take to say what it wants.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);
/// How long one connection may last.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(15);
/// The most of a request's head that is read, in bytes: hyper's least is 8 KiB.
const HEAD_BYTES_MAX: usize = 8 << 10;

const TEXT_FORMAT: HeaderValue = HeaderValue::from_static("text/plain; version=0.0.4");
const PLAIN: HeaderValue = HeaderValue::from_static("text/plain; charset=utf-8");
const GET: HeaderValue = HeaderValue::from_static("GET");

/// A port that is listened on.
#[derive(Debug)]
pub(super) struct Endpoint {
    listener: TcpListener,
    address: SocketAddr,
}

/// What is shown of a stream.
pub(super) struct Source {
    pub(super) gauges: StreamGauges,
    pub(super) destination: OpenDestination,
    pub(super) clock: Arc<dyn Clock>,
}

impl Endpoint {
    /// Listens on `address`: a host or an IP address, and a port; port 0 is any that is free.
    pub(super) async fn bind(address: &str) -> Result<Self> {
        let bound = TcpListener::bind(address).await;
        let failed = |error| bind_error(address, &error);
        let listener = bound.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        Ok(Self { listener, address })
    }

    /// Where it listens.
    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Answers until it is dropped.
    pub(super) async fn serve(self, source: Source) {
        let source = Arc::new(source);
        let permits = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        let mut backoff = new_backoff();
        loop {
            let permit = Arc::clone(&permits).acquire_owned().await;
            match self.listener.accept().await {
                Ok((stream, _)) => {
                    backoff = new_backoff();
                    let source = Arc::clone(&source);
                    tokio::spawn(async move {
                        answer_one(stream, source).await;
                        drop(permit);
                    });
                }
                Err(error) => {
                    // no file descriptors, mostly: the stream needs them more than a scrape does
                    tracing::debug!("cannot accept a connection for metrics: {error}");
                    backoff.wait().await;
                }
            }
        }
    }
}

fn new_backoff() -> Backoff {
    Backoff::new(Duration::from_millis(50), Duration::from_secs(5))
}

fn bind_error(address: &str, error: &io::Error) -> Error {
    let failure = Error::usage(format!("cannot listen for metrics on {address}: {error}"));
    match error.kind() {
        io::ErrorKind::AddrInUse => failure.hint(
            "another process listens there, perhaps another stream: give each its own port, or \
             port 0 for any that is free",
        ),
        io::ErrorKind::PermissionDenied => {
            failure.hint("ports below 1024 need a right of their own: choose a higher one")
        }
        io::ErrorKind::AddrNotAvailable => {
            failure.hint("this machine has no such address: 127.0.0.1 is always there")
        }
        _ => failure.hint("an address is a host and a port, such as 127.0.0.1:9187"),
    }
}

async fn answer_one(stream: TcpStream, source: Arc<Source>) {
    let service = service_fn(move |request| {
        let source = Arc::clone(&source);
        async move { Ok::<_, Infallible>(answer(&request, &source)) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(HEAD_BYTES_MAX)
        // one scrape, one connection: none is kept idle
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    match tokio::time::timeout(CONNECTION_TIMEOUT, connection).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!("a connection for metrics failed: {error}"),
        Err(_) => tracing::debug!("a connection for metrics took too long"),
    }
}

fn answer(request: &Request<Incoming>, source: &Source) -> Response<Full<Bytes>> {
    if request.uri().path() != "/metrics" {
        let text = "there is only /metrics\n".to_owned();
        return response(StatusCode::NOT_FOUND, PLAIN, text);
    }
    if request.method() != Method::GET {
        let text = "metrics are only read\n".to_owned();
        let mut refused = response(StatusCode::METHOD_NOT_ALLOWED, PLAIN, text);
        refused.headers_mut().insert(ALLOW, GET);
        return refused;
    }
    let page = Shown {
        cluster: source.destination.cluster().as_str(),
        state: &source.gauges.read(),
        traffic: &source.destination.traffic(),
        now: source.clock.now(),
    };
    response(StatusCode::OK, TEXT_FORMAT, page.to_string())
}

fn response(status: StatusCode, kind: HeaderValue, text: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, kind);
    response
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;
    use crate::clock::SystemClock;
    use crate::repository::destination::Destination;

    async fn scrape(address: SocketAddr) -> String {
        let mut socket = TcpStream::connect(address).await.unwrap();
        let request = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n";
        socket.write_all(request).await.unwrap();
        let mut answer = String::new();
        socket.read_to_string(&mut answer).await.unwrap();
        answer
    }

    /// Clients that connect and say nothing would otherwise keep every scrape away for ever, and
    /// hold the descriptors that the stream needs.
    #[tokio::test(start_paused = true)]
    async fn clients_that_say_nothing_are_left() {
        let folder = tempfile::tempdir().unwrap();
        let clock: Arc<dyn Clock> = Arc::new(SystemClock);
        let destination = Destination::local(folder.path(), "main");
        let endpoint = Endpoint::bind("127.0.0.1:0").await.unwrap();
        let address = endpoint.address();
        let serving = tokio::spawn(endpoint.serve(Source {
            gauges: StreamGauges::default(),
            destination: destination.open(true, &clock).unwrap(),
            clock,
        }));
        let mut silent = Vec::new();
        for _ in 0..CONNECTIONS_MAX {
            silent.push(TcpStream::connect(address).await.unwrap());
        }
        let before = tokio::time::Instant::now();
        let answer = scrape(address).await;
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
        assert!(answer.contains("\nanywhen_stream_state{cluster=\"main\""));
        assert!(before.elapsed() >= HEADER_TIMEOUT, "more at a time");
        serving.abort();
    }

    #[tokio::test]
    async fn an_address_that_cannot_be_listened_on_is_wrong_usage() {
        let taken = Endpoint::bind("127.0.0.1:0").await.unwrap();
        for address in [&taken.address().to_string(), "127.0.0.1", "203.0.113.1:0"] {
            let error = Endpoint::bind(address).await.unwrap_err();
            assert_eq!(error.kind(), crate::error::Kind::Usage, "{error}");
            assert!(error.hint_text().is_some() && error.message().contains(address));
        }
    }
}
