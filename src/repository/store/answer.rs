//! What a store's service says when it refuses, kept as data.
//!
//! `object_store` turns an answer into one of a few errors and keeps the rest as text. Here,
//! between it and the network, the status, the provider's code and the headers are still there:
//! they decide what is tried again, and what a user is told.

use std::fmt;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt as _;
use object_store::ClientOptions;
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse,
    HttpResponseBody, HttpService, ReqwestConnector,
};

use super::fault::Fault;

/// An error's body is a few hundred bytes; more of a hostile one is not read.
const BODY_BYTES_MAX: usize = 64 << 10;

/// Words of a service in a message of ours.
const MESSAGE_CHARS_MAX: usize = 200;

/// No service may make us wait longer than this at a time.
const RETRY_AFTER_MAX: Duration = Duration::from_mins(1);

/// A refusal, as the service worded it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Answer {
    /// The HTTP status.
    pub(super) status: u16,
    /// The provider's code, such as `SlowDown`; empty where it gave none.
    pub(super) code: String,
    /// The provider's sentence; empty where it gave none.
    pub(super) message: String,
    /// The bucket's region, where the answer names it.
    pub(super) region: Option<String>,
    /// The service's clock.
    pub(super) date: Option<String>,
    /// How long to wait before another attempt.
    pub(super) retry_after: Option<Duration>,
    /// Whether a service that hands out credentials said it, not the store.
    pub(super) about_credentials: bool,
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.status)?;
        for part in [&self.code, &self.message] {
            if !part.is_empty() {
                write!(f, " {part}")?;
            }
        }
        if self.about_credentials {
            f.write_str(" (while asking for credentials)")?;
        }
        Ok(())
    }
}

impl std::error::Error for Answer {}

/// No credentials were configured, and the service that gives a machine its own did not answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no credentials were found, and {host} gave none: {reason}")]
pub(super) struct NoCredentials {
    /// Who was asked.
    pub(super) host: String,
    /// What happened.
    pub(super) reason: String,
}

/// Makes connections whose refusals are [`Answer`]s.
#[derive(Debug, Default)]
pub(super) struct Answering;

impl HttpConnector for Answering {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        let inner = ReqwestConnector::default().connect(options)?;
        let falls_back = std::env::var("AWS_IMDSV1_FALLBACK").is_ok_and(|value| value == "true");
        Ok(HttpClient::new(Service { inner, falls_back }))
    }
}

#[derive(Debug)]
struct Service {
    inner: HttpClient,
    /// Whether an instance whose metadata service is of the older version is asked its way.
    falls_back: bool,
}

#[async_trait::async_trait]
impl HttpService for Service {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let host = request.uri().host().unwrap_or_default().to_owned();
        let about_credentials = hands_out_credentials(&host);
        let method = request.method().as_str().to_owned();
        let is_imds_token = self.falls_back && request.uri().path() == "/latest/api/token";
        let response = match self.inner.execute(request).await {
            Ok(response) => response,
            Err(error) if about_credentials => {
                let reason = crate::error::chain(&error);
                return Err(HttpError::new(error.kind(), NoCredentials { host, reason }));
            }
            Err(error) => return Err(error),
        };
        let status = response.status().as_u16();
        // 304 and 412 are answers to conditions; a machine without IMDSv2 says 403 to its token
        let is_plain = matches!(status, 100..=299 | 304 | 412) || (is_imds_token && status == 403);
        if is_plain {
            return Ok(response);
        }
        let (parts, body) = response.into_parts();
        let header = |name: &str| {
            let value = parts.headers.get(name)?.to_str().ok()?;
            Some(clipped(value))
        };
        let text = beginning(body).await;
        let answer = Answer {
            status,
            code: element(&text, "Code")
                .or_else(|| header("x-ms-error-code"))
                .unwrap_or_default(),
            message: message(&text),
            region: header("x-amz-bucket-region").or_else(|| element(&text, "Region")),
            date: header("date"),
            retry_after: header("retry-after")
                .and_then(|seconds| seconds.parse().ok())
                .map(|seconds| Duration::from_secs(seconds).min(RETRY_AFTER_MAX)),
            about_credentials,
        };
        if answer.is_for_object_store(&method) {
            let body = HttpResponseBody::from(text);
            return Ok(HttpResponse::from_parts(parts, body));
        }
        Err(HttpError::new(HttpErrorKind::Unknown, answer))
    }
}

impl Answer {
    /// Whether `object_store` itself knows best what it means: an object that is not there, or
    /// one that is there already.
    ///
    /// "Not found" must come from an object store and be about an object: a proxy's 404 taken for
    /// one would end an archive recovery early. Only HEAD has no body to tell by.
    fn is_for_object_store(&self, method: &str) -> bool {
        match self.status {
            404 if self.about_credentials => false,
            404 if matches!(self.code.as_str(), "NoSuchKey" | "BlobNotFound") => true,
            404 => matches!(method, "HEAD" | "DELETE") && self.code.is_empty(),
            // Azure's word for it; elsewhere it is a 412
            409 => self.code == "BlobAlreadyExists",
            _ => false,
        }
    }

    /// There is no bucket, which is no answer about an object.
    fn is_no_bucket(&self) -> bool {
        matches!(
            self.code.as_str(),
            "NoSuchBucket" | "ContainerNotFound" | "ContainerBeingDeleted"
        )
    }

    /// Two requests met; the object may be there or not.
    fn is_conflict(&self) -> bool {
        matches!(
            self.code.as_str(),
            "ConditionalRequestConflict" | "OperationAborted"
        )
    }

    /// What it means for whoever asked.
    pub(super) fn fault(&self) -> Fault {
        let reason = self.to_string();
        if self.is_no_bucket() {
            return Fault::NoBucket { reason };
        }
        match self.code.as_str() {
            "RequestTimeTooSkewed" => return self.clock_skew(),
            "AuthenticationFailed" if self.message.contains("date header too old") => {
                return self.clock_skew();
            }
            "PermanentRedirect" | "TemporaryRedirect" | "IllegalLocationConstraintException" => {
                return self.wrong_region();
            }
            "AuthorizationHeaderMalformed" if self.region.is_some() => return self.wrong_region(),
            "ExpiredToken"
            | "ExpiredTokenException"
            | "TokenRefreshRequired"
            | "InvalidToken"
            | "InvalidAccessKeyId"
            | "SignatureDoesNotMatch" => return Fault::Denied { reason },
            "SlowDown"
            | "RequestTimeout"
            | "InternalError"
            | "IncompleteBody"
            | "BadDigest"
            | "XAmzContentSHA256Mismatch" => return self.transient(),
            "QuotaExceeded" | "StorageFull" | "XMinioStorageFull" | "InsufficientStorage" => {
                return Fault::Full { reason };
            }
            "NotImplemented" => return Fault::Unsupported { reason },
            _ => {}
        }
        match self.status {
            300..=399 => self.wrong_region(),
            400 if self.code.is_empty() && self.region.is_some() => self.wrong_region(),
            401 | 403 => Fault::Denied { reason },
            400..=499 if self.about_credentials && !matches!(self.status, 408 | 429) => {
                Fault::Denied { reason }
            }
            409 if self.is_conflict() => self.transient(),
            416 => Fault::PastEnd,
            501 => Fault::Unsupported { reason },
            507 => Fault::Full { reason },
            408 | 425 | 429 | 500..=599 => self.transient(),
            _ => Fault::Refused { reason },
        }
    }

    fn transient(&self) -> Fault {
        Fault::Transient {
            reason: self.to_string(),
            retry_after: self.retry_after,
        }
    }

    fn wrong_region(&self) -> Fault {
        Fault::WrongRegion {
            region: self.region.clone(),
            reason: self.to_string(),
        }
    }

    fn clock_skew(&self) -> Fault {
        let reason = match &self.date {
            Some(date) => format!("{self} (the store's clock: {date})"),
            None => self.to_string(),
        };
        Fault::ClockSkew { reason }
    }
}

/// The services that the providers' own libraries ask for credentials.
fn hands_out_credentials(host: &str) -> bool {
    matches!(
        host,
        "169.254.169.254"
            | "169.254.170.2"
            | "169.254.170.23"
            | "metadata.google.internal"
            | "metadata"
            | "oauth2.googleapis.com"
            | "login.microsoftonline.com"
    ) || host.starts_with("sts.")
}

async fn beginning(body: HttpResponseBody) -> String {
    let mut stream = body.bytes_stream();
    let mut bytes: Vec<u8> = Vec::new();
    while let Some(Ok(chunk)) = stream.next().await {
        let chunk: Bytes = chunk;
        let room = BODY_BYTES_MAX - bytes.len();
        bytes.extend_from_slice(&chunk[..chunk.len().min(room)]);
        if bytes.len() >= BODY_BYTES_MAX {
            break;
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The text of the first XML element of that name; entities stay as they are.
fn element(text: &str, name: &str) -> Option<String> {
    let (_, after) = text.split_once(&format!("<{name}>"))?;
    let (inner, _) = after.split_once(&format!("</{name}>"))?;
    // Azure's sentences are followed by numbers of the request
    Some(clipped(inner.trim().lines().next()?))
}

/// The provider's sentence, with Azure's second one, which says what was wrong with a signature.
fn message(text: &str) -> String {
    let message = element(text, "Message").unwrap_or_else(|| first_line(text));
    match element(text, "AuthenticationErrorDetail") {
        Some(detail) => format!("{message} {detail}"),
        None => message,
    }
}

fn first_line(text: &str) -> String {
    let text = text.trim();
    if text.starts_with('<') {
        // a page of markup tells a user nothing
        return String::new();
    }
    clipped(text.lines().next().unwrap_or_default())
}

/// One line that is safe to show.
fn clipped(text: &str) -> String {
    text.trim()
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(MESSAGE_CHARS_MAX)
        .collect()
}

/// What a client gives for a refusal, as it comes out of [`Answering`].
#[cfg(test)]
pub(in crate::repository) fn refusal(
    status: u16,
    code: &str,
    retry_after: Option<Duration>,
) -> object_store::Error {
    let answer = Answer {
        status,
        code: code.to_owned(),
        retry_after,
        ..Answer::default()
    };
    object_store::Error::Generic {
        store: "simulated",
        source: Box::new(HttpError::new(HttpErrorKind::Unknown, answer)),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use object_store::aws::AmazonS3Builder;
    use object_store::{ObjectStore, RetryConfig};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    use super::super::{Store, StoreError, StoreOptions};
    use super::*;

    /// An S3 client whose service gives this one answer to every request.
    async fn client(answer: &'static str) -> Store {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async move {
            loop {
                let (mut socket, _) = listener.accept().await.unwrap();
                let mut request = Vec::new();
                while !request.windows(4).any(|end| end == b"\r\n\r\n") {
                    let mut buffer = [0; 4096];
                    let length = socket.read(&mut buffer).await.unwrap();
                    request.extend_from_slice(&buffer[..length]);
                }
                let (head, body) = answer.split_once('\n').unwrap_or((answer, ""));
                let head = head.replace('|', "\r\n");
                let text = format!("HTTP/1.1 {head}\r\nconnection: close\r\n");
                let text = if head.contains("content-length") {
                    format!("{text}\r\n{body}")
                } else {
                    format!("{text}content-length: {}\r\n\r\n{body}", body.len())
                };
                socket.write_all(text.as_bytes()).await.unwrap();
            }
        });
        let s3 = AmazonS3Builder::new()
            .with_bucket_name("bucket")
            .with_endpoint(endpoint)
            .with_allow_http(true)
            .with_access_key_id("id")
            .with_secret_access_key("secret")
            .with_retry(RetryConfig {
                max_retries: 0,
                ..RetryConfig::default()
            })
            .with_http_connector(Answering)
            .build()
            .unwrap();
        let objects: Arc<dyn ObjectStore> = Arc::new(s3);
        let options = StoreOptions {
            retry_budget: Duration::ZERO,
            ..StoreOptions::at("s3://bucket")
        };
        Store::over(objects, &options)
    }

    async fn read(answer: &'static str) -> StoreError {
        client(answer).await.get("x").await.unwrap_err()
    }

    #[tokio::test]
    async fn only_an_object_store_says_that_an_object_is_not_there() {
        // a proxy's 404 taken for it ends an archive recovery early, and PostgreSQL promotes
        let key = read("404 Not Found\n<Error><Code>NoSuchKey</Code></Error>").await;
        assert!(matches!(key, StoreError::NotFound { .. }), "{key:?}");
        let bucket = "404 Not Found\n<Error><Code>NoSuchBucket</Code><Message>No</Message></Error>";
        let error = read(bucket).await;
        assert!(matches!(error, StoreError::NoBucket { .. }), "{error:?}");
        let listed = client(bucket).await.list("").await.unwrap_err();
        assert!(matches!(listed, StoreError::NoBucket { .. }), "{listed:?}");
        let created = client(bucket).await.create("x", Bytes::new()).await;
        assert!(
            matches!(created, Err(StoreError::NoBucket { .. })),
            "{created:?}"
        );
        for page in [
            "404 Not Found\n",
            "404 Not Found\n<html>nginx</html>",
            "404 Not Found\n404 page not found",
        ] {
            let error = read(page).await;
            assert!(matches!(error, StoreError::Refused { .. }), "{error:?}");
        }
    }

    #[tokio::test]
    async fn refusals_are_told_apart() {
        let error = read(
            "403 Forbidden|date: Fri, 20 Nov 2026 10:00:00 GMT\n\
             <Error><Code>RequestTimeTooSkewed</Code><Message>Too far</Message></Error>",
        )
        .await;
        assert!(matches!(error, StoreError::ClockSkew { .. }), "{error:?}");
        assert!(error.to_string().contains("10:00:00"), "{error}");
        let error = read(
            "301 Moved Permanently|x-amz-bucket-region: eu-central-1\n\
             <Error><Code>PermanentRedirect</Code></Error>",
        )
        .await;
        assert!(error.to_string().contains("region eu-central-1"), "{error}");
        let error = read(
            "400 Bad Request\n<Error><Code>AuthorizationHeaderMalformed</Code>\
             <Region>eu-north-1</Region></Error>",
        )
        .await;
        assert!(error.to_string().contains("region eu-north-1"), "{error}");
        let error = read("403 Forbidden\n<Error><Code>AccessDenied</Code></Error>").await;
        assert!(error.to_string().contains("no credentials"), "{error}");
        let error = read("503 Slow Down\n<html>busy</html>").await;
        assert!(matches!(error, StoreError::Unreachable { .. }), "{error:?}");
        assert!(!error.to_string().contains("html"), "{error}");
    }

    #[tokio::test]
    async fn conditions_keep_their_answers() {
        use super::super::Created;
        let exists = "412 Precondition Failed\n<Error><Code>PreconditionFailed</Code></Error>";
        let created = client(exists).await.create("x", Bytes::new()).await;
        assert_eq!(created.unwrap(), Created::Exists);
        let conflict = "409 Conflict\n<Error><Code>ConditionalRequestConflict</Code></Error>";
        let created = client(conflict).await.create("x", Bytes::new()).await;
        assert!(
            matches!(created, Err(StoreError::Unreachable { .. })),
            "{created:?}"
        );
    }

    #[tokio::test]
    async fn a_connection_that_breaks_in_a_body_is_an_error() {
        let head =
            "200 OK|content-length: 100|last-modified: Fri, 20 Nov 2026 10:00:00 GMT|etag: x";
        let cut: &'static str = Box::leak(format!("{head}\nhalf").into_boxed_str());
        let error = read(cut).await;
        assert!(matches!(error, StoreError::Unreachable { .. }), "{error:?}");
    }

    #[test]
    fn hostile_answers_are_clipped() {
        let long = format!("<Message>{}</Message>", "x\u{1b}[31m\n".repeat(1000));
        let said = message(&long);
        assert!(said.len() <= MESSAGE_CHARS_MAX && !said.contains(['\u{1b}', '\n']));
        assert_eq!(element("<Code>", "Code"), None);
        assert_eq!(element("</Code><Code>", "Code"), None);
        assert_eq!(message("<html>\n<body>"), "");
    }
}
