//! Logging in to servers that are not what they say, and to lists of servers.
//!
//! Each server here is a task that speaks just enough of the protocol to be up to something.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use replication::authentication::LoginError;
use replication::connect::{AttemptError, ConnectError, Purpose, connect};
use replication::connection::Connection;
use replication::conninfo::{ConnectionSettings, Environment};
use replication::tls::{TlsError, VerifyError};
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;

use crate::certificates::{Identity, self_signed, self_signed_in_the_past};

/// A listener on a port of its own, whose first connection `serve` gets.
async fn once<F, S>(serve: S) -> (u16, JoinHandle<()>)
where
    S: FnOnce(TcpStream) -> F + Send + 'static,
    F: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let served = tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        serve(stream).await;
    });
    (port, served)
}

async fn sql(conninfo: &str) -> Result<Connection, ConnectError> {
    let conninfo = format!("user=u dbname=d {conninfo}");
    let settings = ConnectionSettings::resolve(&conninfo, &Environment::default()).unwrap();
    connect(&settings, Purpose::Sql).await
}

async fn refused(conninfo: &str) -> ConnectError {
    let error = sql(conninfo).await.expect_err("is refused");
    let shown = format!("{error} {error:?}");
    assert!(!shown.contains("horse"), "shows the password: {shown}");
    error
}

async fn refusal(conninfo: &str) -> AttemptError {
    refused(conninfo).await.attempts.pop().unwrap().error
}

fn message(tag: u8, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len() + 4).unwrap().to_be_bytes();
    [&[tag], &length[..], body].concat()
}

/// An authentication request: its code (protocol.h, `AUTH_REQ_…`) and what follows it.
fn request(code: u32, rest: &[u8]) -> Vec<u8> {
    message(b'R', &[&code.to_be_bytes()[..], rest].concat())
}

fn authentication_ok() -> Vec<u8> {
    request(0, &[])
}

fn sasl(mechanisms: &[&str]) -> Vec<u8> {
    let list: Vec<u8> = mechanisms
        .iter()
        .flat_map(|name| [name.as_bytes(), &[0]].concat())
        .collect();
    request(10, &[&list[..], &[0]].concat())
}

fn error(sqlstate: &str, text: &str) -> Vec<u8> {
    let body = format!("SFATAL\0VFATAL\0C{sqlstate}\0M{text}\0\0");
    message(b'E', body.as_bytes())
}

fn parameter(name: &str, value: &str) -> Vec<u8> {
    message(b'S', format!("{name}\0{value}\0").as_bytes())
}

fn ready() -> Vec<u8> {
    message(b'Z', b"I")
}

/// Reads the startup message, and returns its parameters as text.
async fn startup(stream: &mut (impl AsyncRead + Unpin)) -> String {
    let length = stream.read_u32().await.unwrap();
    let mut body = vec![0; usize::try_from(length).unwrap() - 4];
    stream.read_exact(&mut body).await.unwrap();
    assert_eq!(body[..4], [0, 3, 0, 0], "protocol 3.0");
    String::from_utf8(body[4..].to_vec()).unwrap()
}

/// Reads `SSLRequest`.
async fn ssl_request(stream: &mut TcpStream) {
    let mut request = [0; 8];
    stream.read_exact(&mut request).await.unwrap();
    assert_eq!(request, [0, 0, 0, 8, 4, 210, 22, 47]);
}

async fn send(stream: &mut (impl AsyncWrite + Unpin), messages: &[Vec<u8>]) {
    for message in messages {
        stream.write_all(message).await.unwrap();
    }
    stream.flush().await.unwrap();
}

/// A message of the client's: its tag and body.
async fn receive(stream: &mut (impl AsyncRead + Unpin)) -> (u8, Vec<u8>) {
    let tag = stream.read_u8().await.unwrap();
    let length = stream.read_u32().await.unwrap();
    let mut body = vec![0; usize::try_from(length).unwrap() - 4];
    stream.read_exact(&mut body).await.unwrap();
    (tag, body)
}

/// Asserts that the client goes without another word.
async fn says_nothing_more(stream: &mut (impl AsyncRead + Unpin)) {
    let mut rest = Vec::new();
    let end = tokio::time::timeout(Duration::from_secs(20), stream.read_to_end(&mut rest));
    // a reset is a way to go, too; TLS says goodbye below this
    drop(end.await.expect("the client goes"));
    assert_eq!(rest, b"", "the client went on");
}

/// A server without TLS that sends these after the startup message, and must hear nothing then.
async fn asking(messages: Vec<Vec<u8>>) -> (u16, JoinHandle<()>) {
    once(async move |mut stream| {
        startup(&mut stream).await;
        send(&mut stream, &messages).await;
        says_nothing_more(&mut stream).await;
    })
    .await
}

/// `sslmode=disable`, the password, and what else is given.
fn plain(port: u16, rest: &str) -> String {
    format!("hostaddr=127.0.0.1 port={port} sslmode=disable password=horse {rest}")
}

#[tokio::test]
async fn a_session_starts_with_what_was_asked_for() {
    let (port, server) = once(async |mut stream| {
        let asked = startup(&mut stream).await;
        for parameter in [
            "user\0u\0",
            "database\0d\0",
            "application_name\0me\0",
            "options\0-c x=y\0",
        ] {
            assert!(asked.contains(parameter), "{asked:?}");
        }
        assert!(!asked.contains("replication"), "{asked:?}");
        // an older server says that it knows less, others talk in passing
        let negotiate = message(b'v', &[0, 3, 0, 0, 0, 0, 0, 0]);
        let notice = message(b'N', b"SNOTICE\0VNOTICE\0C00000\0Mhello\0\0");
        let key = message(b'K', &[0; 8]);
        let version = parameter("server_version", "18.6 (Debian 18.6-1)");
        let all = [
            negotiate,
            notice,
            authentication_ok(),
            version,
            key,
            ready(),
        ];
        send(&mut stream, &all).await;
        says_nothing_more(&mut stream).await;
    })
    .await;
    let settings = plain(port, "application_name=me options='-c x=y'");
    let connection = sql(&settings).await.unwrap();
    assert_eq!(connection.server_version_num(), 180_006);
    drop(connection);
    server.await.unwrap();
}

#[tokio::test]
async fn replication_is_asked_for() {
    let (port, server) = once(async |mut stream| {
        let asked = startup(&mut stream).await;
        assert!(asked.contains("replication\0true\0"), "{asked:?}");
        send(&mut stream, &[authentication_ok(), ready()]).await;
    })
    .await;
    let conninfo = format!("user=u {}", plain(port, ""));
    let settings = ConnectionSettings::resolve(&conninfo, &Environment::default()).unwrap();
    connect(&settings, Purpose::Replication).await.unwrap();
    server.await.unwrap();
}

/// One who poses as the server asks for the password itself.
#[tokio::test]
async fn a_password_is_not_given_where_the_user_forbids_it() {
    let cases = [
        (request(3, &[]), "require_auth=scram-sha-256"),
        (request(3, &[]), "require_auth=!password"),
        (request(5, &[1, 2, 3, 4]), "require_auth=scram-sha-256"),
        (sasl(&["SCRAM-SHA-256"]), "require_auth=md5"),
        (authentication_ok(), "require_auth=scram-sha-256"),
    ];
    for (asked, settings) in cases {
        let (port, server) = asking(vec![asked]).await;
        let refusal = refusal(&plain(port, settings)).await;
        assert!(
            matches!(
                refusal,
                AttemptError::Login(LoginError::MethodNotAllowed { .. })
            ),
            "{settings}: {refusal}"
        );
        server.await.unwrap();
    }
    let bound = [
        request(3, &[]),
        request(5, &[1, 2, 3, 4]),
        sasl(&["SCRAM-SHA-256"]),
        authentication_ok(),
    ];
    for asked in bound {
        let (port, server) = asking(vec![asked]).await;
        let refusal = refusal(&plain(port, "channel_binding=require")).await;
        assert!(
            matches!(refusal, AttemptError::Login(LoginError::NotBound(_))),
            "{refusal}"
        );
        server.await.unwrap();
    }
}

#[tokio::test]
async fn methods_that_are_not_spoken_are_named() {
    for (asked, name) in [
        (request(7, &[]), "GSSAPI"),
        (request(9, &[]), "SSPI"),
        (request(2, &[]), "Kerberos 5"),
        (sasl(&["OAUTHBEARER"]), "OAUTHBEARER"),
    ] {
        let (port, server) = asking(vec![asked]).await;
        let refusal = refused(&plain(port, "")).await;
        let said = refusal.to_string();
        assert!(
            said.contains(name) && said.contains("pg_hba.conf"),
            "{said}"
        );
        assert!(!refusal.is_transient());
        server.await.unwrap();
    }
}

/// A SCRAM server that answers the client's first message by `first`, made from the client's
/// nonce, and its second by `second`.
async fn scram(first: fn(&str) -> String, second: Vec<u8>) -> (u16, JoinHandle<()>) {
    once(async move |mut stream| {
        startup(&mut stream).await;
        send(&mut stream, &[sasl(&["SCRAM-SHA-256"])]).await;
        let (_, body) = receive(&mut stream).await;
        let body = String::from_utf8_lossy(&body).into_owned();
        let (_, nonce) = body.split_once("r=").unwrap();
        send(&mut stream, &[request(11, first(nonce).as_bytes())]).await;
        if !second.is_empty() {
            receive(&mut stream).await;
            send(&mut stream, &[second]).await;
        }
        says_nothing_more(&mut stream).await;
    })
    .await
}

fn challenge(nonce: &str) -> String {
    format!("r={nonce}abc,s=c2FsdA==,i=4096")
}

/// Half of SCRAM is that the server proves itself.
#[tokio::test]
async fn a_server_that_does_not_know_the_password_is_not_believed() {
    let proof = request(12, b"v=AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=");
    let (port, server) = scram(challenge, [proof, authentication_ok(), ready()].concat()).await;
    let forged = refusal(&plain(port, "")).await;
    assert!(
        matches!(forged, AttemptError::Login(LoginError::Scram(_))),
        "{forged}"
    );
    server.await.unwrap();

    let (port, server) = scram(challenge, [authentication_ok(), ready()].concat()).await;
    let skipped = refusal(&plain(port, "")).await;
    assert!(
        matches!(skipped, AttemptError::Login(LoginError::Incomplete)),
        "{skipped}"
    );
    server.await.unwrap();
}

#[tokio::test]
async fn what_scram_cannot_be_answered_is_refused() {
    let too_many = |nonce: &str| format!("r={nonce}abc,s=c2FsdA==,i=100001");
    let (port, server) = scram(too_many, Vec::new()).await;
    let refused = refusal(&plain(port, "")).await;
    assert!(
        matches!(
            refused,
            AttemptError::Login(LoginError::Iterations { found: 100_001 })
        ),
        "{refused}"
    );
    server.await.unwrap();

    let faults: [fn(&str) -> String; 3] = [
        |_| "r=other,s=c2FsdA==,i=1".to_owned(),
        |_| String::new(),
        |nonce| format!("r={nonce}"),
    ];
    for fault in faults {
        let (port, server) = scram(fault, Vec::new()).await;
        let refused = refusal(&plain(port, "")).await;
        assert!(
            matches!(refused, AttemptError::Login(LoginError::Scram(_))),
            "{refused}"
        );
        server.await.unwrap();
    }
}

#[tokio::test]
async fn messages_out_of_turn_end_the_attempt() {
    let twice = once(async |mut stream| {
        startup(&mut stream).await;
        send(&mut stream, &[request(3, &[]), request(3, &[])]).await;
        assert_eq!(receive(&mut stream).await, (b'p', b"horse\0".to_vec()));
        says_nothing_more(&mut stream).await;
    });
    let (port, server) = twice.await;
    let unasked = refusal(&plain(port, "")).await;
    assert!(
        matches!(unasked, AttemptError::Login(LoginError::Unexpected { .. })),
        "{unasked}"
    );
    server.await.unwrap();

    let (port, server) = asking(vec![authentication_ok(), message(b'D', &[0, 0])]).await;
    let unasked = refusal(&plain(port, "")).await;
    assert!(
        matches!(unasked, AttemptError::Login(LoginError::Unexpected { .. })),
        "{unasked}"
    );
    server.await.unwrap();

    let (port, server) = asking(vec![b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec()]).await;
    let error = refused(&plain(port, "")).await;
    assert!(!error.is_transient(), "{error}");
    server.await.unwrap();
}

#[tokio::test]
async fn without_tls_only_those_go_on_who_need_none() {
    for (settings, goes_on) in [("sslmode=prefer", true), ("sslmode=require", false)] {
        let (port, server) = once(async move |mut stream| {
            ssl_request(&mut stream).await;
            stream.write_all(b"N").await.unwrap();
            if goes_on {
                startup(&mut stream).await;
                send(&mut stream, &[authentication_ok(), ready()]).await;
            }
            says_nothing_more(&mut stream).await;
        })
        .await;
        let outcome = sql(&format!("hostaddr=127.0.0.1 port={port} {settings}")).await;
        assert_eq!(outcome.is_ok(), goes_on, "{settings}");
        match outcome {
            Ok(connection) => drop(connection),
            Err(error) => {
                assert!(matches!(
                    error.attempts[0].error,
                    AttemptError::Tls(TlsError::NotOffered)
                ));
            }
        }
        server.await.unwrap();
    }
}

/// CVE-2021-23222: what someone adds in clear text after the consent to TLS must not be taken
/// for what the server says through it. CVE-2024-10977: nor must an error, to be shown.
#[tokio::test]
async fn nothing_before_tls_is_believed() {
    let (port, server) = once(async |mut stream| {
        ssl_request(&mut stream).await;
        send(
            &mut stream,
            &[[b"S".to_vec(), authentication_ok(), ready()].concat()],
        )
        .await;
        // the start of the client's handshake, then its farewell
        drop(stream.read_to_end(&mut Vec::new()).await);
    })
    .await;
    let stuffed = refusal(&format!("hostaddr=127.0.0.1 port={port} sslmode=require")).await;
    assert!(
        matches!(stuffed, AttemptError::Tls(TlsError::Handshake(_))),
        "{stuffed}"
    );
    server.await.unwrap();

    for answer in [error("28000", "visit evil.example"), b"X".to_vec()] {
        let (port, server) = once(async |mut stream| {
            ssl_request(&mut stream).await;
            send(&mut stream, &[answer]).await;
            says_nothing_more(&mut stream).await;
        })
        .await;
        let said = refused(&format!("hostaddr=127.0.0.1 port={port} sslmode=require")).await;
        assert!(!said.to_string().contains("evil"), "{said}");
        server.await.unwrap();
    }
}

/// What a server of rustls needs, with or without a protocol to agree on.
fn acceptor(identity: &Identity, protocol: Option<&[u8]>) -> TlsAcceptor {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let certificate = CertificateDer::from_pem_slice(identity.certificate.as_bytes()).unwrap();
    let key = PrivateKeyDer::from_pem_slice(identity.key.as_bytes()).unwrap();
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate], key)
        .unwrap();
    config.alpn_protocols = protocol.map(<[u8]>::to_vec).into_iter().collect();
    TlsAcceptor::from(Arc::new(config))
}

/// A server that consents to TLS and then sends these.
async fn with_tls(identity: &Identity, messages: Vec<Vec<u8>>) -> (u16, JoinHandle<()>) {
    let acceptor = acceptor(identity, None);
    once(async move |mut stream| {
        ssl_request(&mut stream).await;
        stream.write_all(b"S").await.unwrap();
        // a client that does not like the certificate ends it here
        let Ok(mut stream) = acceptor.accept(stream).await else {
            return;
        };
        startup(&mut stream).await;
        send(&mut stream, &messages).await;
        says_nothing_more(&mut stream).await;
    })
    .await
}

/// One in the middle takes the offer of channel binding away; TLS as such is its own.
#[tokio::test]
async fn a_downgrade_of_channel_binding_is_refused() {
    let identity = self_signed("db.test");
    let asked = [
        sasl(&["SCRAM-SHA-256"]),
        request(3, &[]),
        request(5, &[1, 2, 3, 4]),
        authentication_ok(),
    ];
    for asked in asked {
        let (port, server) = with_tls(&identity, vec![asked]).await;
        let settings = format!(
            "hostaddr=127.0.0.1 port={port} sslmode=require channel_binding=require password=horse"
        );
        let refused = refusal(&settings).await;
        assert!(
            matches!(refused, AttemptError::Login(LoginError::NotBound(_))),
            "{refused}"
        );
        server.await.unwrap();
    }
    let (port, server) = asking(vec![sasl(&["SCRAM-SHA-256-PLUS", "SCRAM-SHA-256"])]).await;
    let refused = refusal(&plain(port, "")).await;
    assert!(
        matches!(refused, AttemptError::Login(LoginError::BindingWithoutTls)),
        "{refused}"
    );
    server.await.unwrap();
}

/// Where the server seems not to offer it, the client says that it could have: the server
/// can tell then that someone took it away.
#[tokio::test]
async fn the_client_tells_what_it_could_have_bound() {
    let identity = self_signed("db.test");
    for (mode, offered, told) in [
        ("prefer", &["SCRAM-SHA-256"][..], "y,,"),
        ("disable", &["SCRAM-SHA-256"], "n,,"),
        ("disable", &["SCRAM-SHA-256-PLUS", "SCRAM-SHA-256"], "n,,"),
        (
            "prefer",
            &["SCRAM-SHA-256-PLUS", "SCRAM-SHA-256"],
            "p=tls-server-end-point,,",
        ),
    ] {
        let acceptor = acceptor(&identity, None);
        let (port, server) = once(async move |mut stream| {
            ssl_request(&mut stream).await;
            stream.write_all(b"S").await.unwrap();
            let mut stream = acceptor.accept(stream).await.unwrap();
            startup(&mut stream).await;
            send(&mut stream, &[sasl(offered)]).await;
            let (_, body) = receive(&mut stream).await;
            let body = String::from_utf8_lossy(&body).into_owned();
            assert!(body.contains(told), "{body:?}");
        })
        .await;
        let settings = format!(
            "hostaddr=127.0.0.1 port={port} sslmode=require channel_binding={mode} password=horse"
        );
        assert!(
            refused(&settings).await.is_transient(),
            "the server just went"
        );
        server.await.unwrap();
    }
}

#[tokio::test]
async fn a_certificate_whose_time_is_over_is_refused() {
    let identity = self_signed_in_the_past("db.test");
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root.crt");
    std::fs::write(&root, &identity.certificate).unwrap();
    let (port, server) = with_tls(&identity, vec![authentication_ok(), ready()]).await;
    let root = root.display();
    let settings = format!("hostaddr=127.0.0.1 port={port} sslmode=verify-ca sslrootcert={root}");
    let refused = refusal(&settings).await;
    assert!(
        matches!(
            refused,
            AttemptError::Tls(TlsError::Verify(VerifyError::NotValidNow))
        ),
        "{refused}"
    );
    server.await.unwrap();
}

/// ALPACA: a server of another protocol, with a good certificate, must not be talked to.
#[tokio::test]
async fn direct_tls_needs_agreement_on_the_protocol() {
    let identity = self_signed("db.test");
    for (protocol, accepted) in [(Some(&b"postgresql"[..]), true), (None, false)] {
        let acceptor = acceptor(&identity, protocol);
        let (port, server) = once(async move |stream| {
            let mut stream = acceptor.accept(stream).await.unwrap();
            if accepted {
                startup(&mut stream).await;
                send(&mut stream, &[authentication_ok(), ready()]).await;
            }
            says_nothing_more(&mut stream).await;
        })
        .await;
        let settings =
            format!("hostaddr=127.0.0.1 port={port} sslmode=require sslnegotiation=direct");
        let outcome = sql(&settings).await;
        assert_eq!(outcome.is_ok(), accepted, "{:?}", outcome.err());
        drop(outcome);
        server.await.unwrap();
    }
}

/// After a failover the first of the list is down or starting up.
#[tokio::test]
async fn the_next_server_is_tried_where_the_first_cannot() {
    let (starting, first) =
        asking(vec![error("57P03", "the database system is starting up")]).await;
    let (good, second) = asking(vec![authentication_ok(), ready()]).await;
    let closed = TcpListener::bind("127.0.0.1:0")
        .await
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let hosts = "127.0.0.1,127.0.0.1,127.0.0.1";
    let settings = format!("hostaddr={hosts} port={closed},{starting},{good} sslmode=disable");
    drop(sql(&settings).await.unwrap());
    first.await.unwrap();
    second.await.unwrap();

    let (starting, first) =
        asking(vec![error("57P03", "the database system is starting up")]).await;
    let settings = format!("hostaddr={hosts} port={closed},{starting},{closed} sslmode=disable");
    let error = refused(&settings).await;
    assert!(error.is_transient());
    assert_eq!(error.attempts.len(), 3);
    assert!(error.to_string().contains("57P03"), "{error}");
    first.await.unwrap();
}

/// Trying one wrong password on every server locks the account on every server.
#[tokio::test]
async fn a_refused_password_is_not_tried_elsewhere() {
    let wrong = once(async |mut stream| {
        startup(&mut stream).await;
        send(&mut stream, &[request(3, &[])]).await;
        receive(&mut stream).await;
        send(
            &mut stream,
            &[error("28P01", "password authentication failed")],
        )
        .await;
    });
    let (port, first) = wrong.await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let other = listener.local_addr().unwrap().port();
    let settings =
        format!("hostaddr=127.0.0.1,127.0.0.1 port={port},{other} sslmode=disable password=horse");
    let error = refused(&settings).await;
    assert_eq!(error.attempts.len(), 1, "{error}");
    assert!(!error.is_transient());
    first.await.unwrap();
}

#[tokio::test]
async fn a_server_that_says_nothing_is_given_up() {
    let (port, server) = asking(Vec::new()).await;
    let error = refused(&plain(port, "connect_timeout=1")).await;
    assert!(
        matches!(error.attempts[0].error, AttemptError::TimedOut { timeout } if timeout == Duration::from_secs(1)),
        "{error}"
    );
    assert!(error.is_transient());
    server.await.unwrap();
}

/// A server of 14 and later tells by itself what it is.
#[tokio::test]
async fn a_standby_is_known_by_what_it_reports() {
    for (attrs, standby, read_only, wanted) in [
        ("standby", "on", "off", true),
        ("standby", "off", "on", false),
        ("primary", "on", "off", false),
        ("primary", "off", "on", true),
        ("read-write", "off", "off", true),
        ("read-write", "on", "off", false),
        ("read-write", "off", "on", false),
        ("read-only", "off", "on", true),
        ("read-only", "on", "off", true),
        ("read-only", "off", "off", false),
        ("prefer-standby", "on", "off", true),
    ] {
        let (port, served) = once(async move |mut stream| {
            startup(&mut stream).await;
            let reported = [
                authentication_ok(),
                parameter("in_hot_standby", standby),
                parameter("default_transaction_read_only", read_only),
                ready(),
            ];
            send(&mut stream, &reported).await;
            drop(stream.read_to_end(&mut Vec::new()).await);
        })
        .await;
        let outcome = sql(&plain(port, &format!("target_session_attrs={attrs}"))).await;
        assert_eq!(outcome.is_ok(), wanted, "{attrs} {standby} {read_only}");
        drop(outcome);
        served.await.unwrap();
    }
}
