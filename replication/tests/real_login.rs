//! Logging in to real servers, in every way that they ask for.
//!
//! The server is the judge of what we send it; what we must refuse is in `login` and `tls`, since
//! a real server does no harm.

use std::net::TcpListener;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::PathBuf;

use replication::authentication::LoginError;
use replication::connect::{AttemptError, ConnectError, Purpose, connect};
use replication::connection::Connection;
use replication::conninfo::{ConnectionSettings, Environment};
use replication::tls::{TlsError, VerifyError};
use tempfile::TempDir;

use crate::certificates::{Authority, Identity, of_ed25519, of_version_1, self_signed};
use crate::server::Server;

const PG_HBA: &str = "\
local    all         postgres                  trust
local    replication postgres                  trust
local    replication socket_user               reject
host     all         scram_user   127.0.0.1/32 scram-sha-256
host     replication scram_user   127.0.0.1/32 scram-sha-256
host     all         md5_user     127.0.0.1/32 md5
host     all         plain_user   127.0.0.1/32 password
hostssl  all         cert_user    127.0.0.1/32 cert
hostssl  all         tls_user     127.0.0.1/32 scram-sha-256
hostnossl all        bare_user    127.0.0.1/32 scram-sha-256
host     all         trusted      127.0.0.1/32 trust
host     replication plain_user   127.0.0.1/32 password
";

const ROLES: &str = "\
SET password_encryption = 'scram-sha-256';
CREATE ROLE scram_user LOGIN REPLICATION PASSWORD 'sé cret\\''';
CREATE ROLE tls_user LOGIN PASSWORD 'secret';
CREATE ROLE bare_user LOGIN PASSWORD 'secret';
CREATE ROLE plain_user LOGIN PASSWORD 'secret';
CREATE ROLE cert_user LOGIN;
CREATE ROLE trusted LOGIN;
SET password_encryption = 'md5';
CREATE ROLE md5_user LOGIN PASSWORD 'secret'";

/// `ROLES` writes it as SQL does, this as a connection string does.
const SCRAM: &str = r"user=scram_user password='sé cret\\\''";

/// Settings from a connection string alone, whoever runs the tests.
fn resolve(conninfo: &str) -> ConnectionSettings {
    ConnectionSettings::resolve(conninfo, &Environment::default()).unwrap()
}

struct World {
    server: Server,
    port: u16,
    /// Files of the client's.
    files: TempDir,
    authority: Authority,
}

impl World {
    async fn new() -> Self {
        let port = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let port_line = format!("port = {port}");
        let server = Server::start(&[], &["listen_addresses = '127.0.0.1'", &port_line]);
        let files = tempfile::tempdir().unwrap();
        let authority = Authority::new("test authority");
        let world = Self {
            server,
            port,
            files,
            authority,
        };
        world.superuser().await.execute(ROLES).await.unwrap();

        std::fs::write(world.server.data().join("pg_hba.conf"), PG_HBA).unwrap();
        let root = world.authority.certificate();
        world.file("root.crt", &root);
        world.server_file("root.crt", &root);
        let ssl = "ssl = on\nssl_cert_file = 'server.crt'\nssl_key_file = 'server.key'\n\
                   ssl_ca_file = 'root.crt'\n";
        let conf = world.server.data().join("postgresql.conf");
        let before = std::fs::read_to_string(&conf).unwrap();
        std::fs::write(&conf, before + ssl).unwrap();
        world.present(&world.authority.issue("db.test", &["db.test", "127.0.0.1"]));
        world
    }

    /// Has the server show this certificate from now on.
    fn present(&self, identity: &Identity) {
        self.server_file("server.crt", &identity.certificate);
        self.server_file("server.key", &identity.key);
        // to reload would not say when it is done
        self.server.stop();
        self.server.start_again();
    }

    /// Puts a file into the data directory, for the server's eyes only.
    fn server_file(&self, name: &str, contents: &str) {
        let data = self.server.data();
        let path = data.join(name);
        std::fs::write(&path, contents).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        let owner = std::fs::metadata(data).unwrap();
        std::os::unix::fs::chown(path, Some(owner.uid()), Some(owner.gid())).unwrap();
    }

    /// Settings that lead to the server's socket.
    fn socket(&self) -> String {
        let data = self.server.data();
        let folder = data.parent().unwrap().display();
        format!("host={folder} port={}", self.port)
    }

    async fn superuser(&self) -> Connection {
        let settings = format!("{} user=postgres dbname=postgres", self.socket());
        connect(&resolve(&settings), Purpose::Sql).await.unwrap()
    }

    async fn tcp(&self, settings: &str, purpose: Purpose) -> Result<Connection, ConnectError> {
        let settings = format!("hostaddr=127.0.0.1 port={} {settings}", self.port);
        connect(&resolve(&settings), purpose).await
    }

    fn file(&self, name: &str, contents: &str) -> PathBuf {
        let path = self.files.path().join(name);
        std::fs::write(&path, contents).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        path
    }

    fn path(&self, name: &str) -> String {
        self.files.path().join(name).display().to_string()
    }

    async fn sql(&self, settings: &str) -> Result<Connection, ConnectError> {
        self.tcp(&format!("dbname=postgres {settings}"), Purpose::Sql)
            .await
    }

    /// Connects, and says whether the server sees TLS.
    async fn tls_of(&self, settings: &str) -> bool {
        let mut connection = self.sql(settings).await.unwrap();
        let ssl = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()";
        connection.query_value(ssl).await.unwrap().as_deref() == Some("t")
    }

    async fn refusal(&self, settings: &str) -> AttemptError {
        last(self.sql(settings).await)
    }
}

fn last(outcome: Result<Connection, ConnectError>) -> AttemptError {
    outcome
        .expect_err("is refused")
        .attempts
        .pop()
        .unwrap()
        .error
}

#[tokio::test]
async fn every_password_method_is_spoken() {
    let world = World::new().await;
    for mode in ["disable", "require"] {
        for login in [
            SCRAM,
            "user=md5_user password=secret",
            "user=plain_user password=secret",
        ] {
            assert_eq!(
                world.tls_of(&format!("sslmode={mode} {login}")).await,
                mode == "require"
            );
        }
    }
    let connection = world.tcp(SCRAM, Purpose::Replication).await.unwrap();
    assert!(connection.server_version_num() >= 130_000);
    // a goodbye, so that the server's log stays clean
    connection.terminate().await.unwrap();

    assert!(
        world
            .tls_of(&format!("{SCRAM} sslmode=require channel_binding=require"))
            .await
    );
    assert!(
        world
            .tls_of(&format!("{SCRAM} sslmode=require channel_binding=disable"))
            .await
    );
    for method in ["scram-sha-256", "!password,!md5"] {
        world
            .tls_of(&format!("{SCRAM} require_auth={method}"))
            .await;
    }
    assert!(matches!(
        world
            .refusal("user=plain_user password=secret require_auth=scram-sha-256,md5")
            .await,
        AttemptError::Login(LoginError::MethodNotAllowed { .. })
    ));
    assert!(matches!(
        world
            .refusal(&format!("{SCRAM} sslmode=disable channel_binding=require"))
            .await,
        AttemptError::Login(LoginError::NotBound(_))
    ));
    assert!(matches!(
        world.refusal("user=trusted require_auth=!none").await,
        AttemptError::Login(LoginError::MethodNotAllowed { .. })
    ));
    world.tls_of("user=trusted require_auth=none").await;
}

#[tokio::test]
async fn refusals_say_what_to_do() {
    let world = World::new().await;
    let wrong = world
        .sql("user=scram_user password=wrong")
        .await
        .err()
        .unwrap();
    assert!(!wrong.is_transient());
    assert_eq!(wrong.attempts.len(), 1, "{wrong}");
    let said = wrong.to_string();
    assert!(
        said.contains("28P01") && said.contains("came from the connection string"),
        "{said}"
    );
    assert!(!said.contains("wrong"), "{said}");

    let missing = world
        .sql("user=scram_user passfile=/nowhere")
        .await
        .err()
        .unwrap()
        .to_string();
    assert!(
        missing.contains("looked in the connection string, PGPASSWORD, /nowhere (no such file)"),
        "{missing}"
    );

    let unlisted = world
        .sql("user=postgres sslmode=require")
        .await
        .err()
        .unwrap()
        .to_string();
    assert!(
        unlisted.contains("hostssl postgres,replication postgres 127.0.0.1/32 scram-sha-256"),
        "{unlisted}"
    );
    let plain = "user=plain_user password=secret";
    let no_right = world.tcp(plain, Purpose::Replication).await.err().unwrap();
    assert!(!no_right.is_transient());
    let no_right = no_right.to_string();
    assert!(
        no_right.contains(r#"ALTER ROLE "plain_user" REPLICATION"#),
        "{no_right}"
    );
    let no_database = world
        .tcp(&format!("{plain} dbname=nowhere"), Purpose::Sql)
        .await;
    let no_database = no_database.err().unwrap().to_string();
    assert!(
        no_database.contains("3D000") && no_database.contains("hint:"),
        "{no_database}"
    );
}

/// A password file is looked up under "replication" by every tool that streams.
#[tokio::test]
async fn the_password_file_is_asked_for_replication() {
    let world = World::new().await;
    let port = world.port;
    let line = format!("127.0.0.1:{port}:replication:scram_user:sé cret\\\\'\n");
    let passfile = world.file("pgpass", &line);
    let settings = format!("user=scram_user passfile={}", passfile.display());
    world.tcp(&settings, Purpose::Replication).await.unwrap();
    let said = world.sql(&settings).await.err().unwrap().to_string();
    assert!(
        said.contains(&format!("no line for 127.0.0.1:{port}:postgres:scram_user")),
        "{said}"
    );

    std::fs::set_permissions(&passfile, std::fs::Permissions::from_mode(0o644)).unwrap();
    let open = world
        .tcp(&settings, Purpose::Replication)
        .await
        .err()
        .unwrap()
        .to_string();
    assert!(
        open.contains("ignored, since others can read it: mode=0644"),
        "{open}"
    );
}

#[tokio::test]
async fn tls_is_used_where_the_mode_and_the_server_want_it() {
    let world = World::new().await;
    assert!(world.tls_of("user=trusted").await);
    assert!(!world.tls_of("user=trusted sslmode=allow").await);
    // where pg_hba.conf wants the other way, it is tried before a password is asked for
    assert!(
        world
            .tls_of("user=tls_user password=secret sslmode=allow")
            .await
    );
    assert!(
        !world
            .tls_of("user=bare_user password=secret sslmode=prefer")
            .await
    );
    let refused = world
        .sql("user=tls_user password=secret sslmode=disable")
        .await
        .err()
        .unwrap();
    assert!(refused.to_string().contains("28000"), "{refused}");
    for version in ["TLSv1.2", "TLSv1.3"] {
        let settings = format!(
            "{SCRAM} sslmode=require channel_binding=require \
             ssl_min_protocol_version={version} ssl_max_protocol_version={version}"
        );
        let mut connection = world.sql(&settings).await.unwrap();
        let used = "SELECT version FROM pg_stat_ssl WHERE pid = pg_backend_pid()";
        assert_eq!(
            connection.query_value(used).await.unwrap().as_deref(),
            Some(version)
        );
    }
    // direct TLS is new in 17; an older server takes the handshake for a broken startup message
    let direct = world
        .sql("user=trusted sslmode=require sslnegotiation=direct")
        .await;
    let version = world.superuser().await.server_version_num();
    assert_eq!(
        direct.is_ok(),
        version >= 170_000,
        "{version}: {:?}",
        direct.err()
    );
}

/// Someone who answers in the server's place would get the WAL's reader, if not the WAL.
#[tokio::test]
async fn a_server_is_only_believed_with_the_right_certificate() {
    let world = World::new().await;
    let root = world.path("root.crt");
    let full = format!("user=trusted sslmode=verify-full sslrootcert={root}");
    for name in ["host=db.test", "host=127.0.0.1", "host=DB.test"] {
        assert!(world.tls_of(&format!("{full} {name}")).await, "{name}");
    }
    assert!(matches!(
        world.refusal(&format!("{full} host=other.test")).await,
        AttemptError::Tls(TlsError::Verify(VerifyError::WrongName { .. }))
    ));
    assert!(matches!(
        world.refusal(&full).await,
        AttemptError::Tls(TlsError::NoHostName)
    ));
    let ca = format!("user=trusted sslmode=verify-ca sslrootcert={root}");
    assert!(world.tls_of(&format!("{ca} host=other.test")).await);

    let other = world.file("other.crt", &Authority::new("another").certificate());
    let other = other.display();
    for mode in ["require", "verify-ca", "verify-full"] {
        let settings = format!("user=trusted sslmode={mode} sslrootcert={other} host=db.test");
        assert!(
            matches!(
                world.refusal(&settings).await,
                AttemptError::Tls(TlsError::Verify(VerifyError::NotTrusted { .. }))
            ),
            "{mode}"
        );
    }
    let nowhere = "user=trusted sslmode=verify-ca sslrootcert=/nowhere";
    assert!(matches!(
        world.refusal(nowhere).await,
        AttemptError::Tls(TlsError::NoRoots { .. })
    ));
    let system = "user=trusted sslrootcert=system host=db.test";
    let refused = world.refusal(system).await;
    assert!(matches!(
        refused,
        AttemptError::Tls(TlsError::Verify(_) | TlsError::NoSystemRoots { .. })
    ));
}

/// The certificates that PostgreSQL's manual makes: signed by themselves, or of X.509 version 1,
/// with a common name alone. A stock TLS library refuses both.
#[tokio::test]
async fn certificates_of_the_manual_are_good_enough() {
    let world = World::new().await;
    let own = self_signed("db.test");
    world.present(&own);
    let root = world.file("own.crt", &own.certificate);
    let verify = |root: &str| format!("{SCRAM} channel_binding=require sslrootcert={root}");
    let own_root = verify(&root.display().to_string());
    assert!(
        world
            .tls_of(&format!("{own_root} sslmode=verify-full host=db.test"))
            .await
    );
    assert!(matches!(
        world
            .refusal(&format!("{own_root} sslmode=verify-full host=other.test"))
            .await,
        AttemptError::Tls(TlsError::Verify(VerifyError::WrongName { .. }))
    ));

    let (old, issuer) = of_version_1();
    world.present(&old);
    let root = world.file("v1.crt", issuer);
    let v1_root = verify(&root.display().to_string());
    assert!(
        world
            .tls_of(&format!("{v1_root} sslmode=verify-full host=db.test"))
            .await
    );
    for version in ["TLSv1.2", "TLSv1.3"] {
        let only = format!("ssl_min_protocol_version={version} ssl_max_protocol_version={version}");
        assert!(
            world
                .tls_of(&format!("{SCRAM} sslmode=require {only}"))
                .await
        );
        assert!(
            world
                .tls_of(&format!("{v1_root} sslmode=verify-ca {only}"))
                .await
        );
    }
    assert!(matches!(
        world
            .refusal(&format!("{own_root} sslmode=verify-ca"))
            .await,
        AttemptError::Tls(TlsError::Verify(VerifyError::NotTrusted { .. }))
    ));

    // no hash is defined for its signature, so that no channel can be bound to it
    world.present(&of_ed25519());
    assert!(world.tls_of(&format!("{SCRAM} sslmode=require")).await);
    assert!(matches!(
        world
            .refusal(&format!("{SCRAM} sslmode=require channel_binding=require"))
            .await,
        AttemptError::Login(LoginError::NotBound(_))
    ));
}

#[tokio::test]
async fn a_client_certificate_is_shown_and_its_key_guarded() {
    let world = World::new().await;
    let client = world.authority.issue("cert_user", &[]);
    let certificate = world.file("client.crt", &client.certificate);
    let key = world.file("client.key", &client.key);
    let settings = format!(
        "user=cert_user sslmode=require sslcert={} sslkey={}",
        certificate.display(),
        key.display()
    );
    assert!(world.tls_of(&settings).await);
    assert!(
        world
            .tls_of(&format!("{settings} sslcertmode=require"))
            .await
    );
    let unshown = world
        .sql(&format!("{settings} sslcertmode=disable"))
        .await
        .err()
        .unwrap();
    assert!(!unshown.is_transient(), "{unshown}");

    let stranger = Authority::new("another").issue("cert_user", &[]);
    world.file("client.crt", &stranger.certificate);
    world.file("client.key", &stranger.key);
    let strange = world.sql(&settings).await.err().unwrap();
    assert!(!strange.is_transient(), "{strange}");

    world.file("client.crt", &client.certificate);
    assert!(matches!(
        world.refusal(&settings).await,
        AttemptError::Tls(TlsError::BadKey { .. })
    ));
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o644)).unwrap();
    assert!(matches!(
        world.refusal(&settings).await,
        AttemptError::Tls(TlsError::KeyTooOpen { mode: 0o644, .. })
    ));
    let encrypted = client
        .key
        .replace("BEGIN PRIVATE", "BEGIN ENCRYPTED PRIVATE");
    world.file("client.key", &encrypted);
    assert!(matches!(
        world.refusal(&settings).await,
        AttemptError::Tls(TlsError::EncryptedKey { .. })
    ));
    std::fs::remove_file(&key).unwrap();
    assert!(matches!(
        world.refusal(&settings).await,
        AttemptError::Tls(TlsError::NoKey { .. })
    ));
}

#[tokio::test]
async fn a_socket_is_as_good_as_a_port() {
    let world = World::new().await;
    let socket = world.socket();
    let base = format!("{socket} user=postgres dbname=postgres");
    // TLS is a matter of TCP
    let mut sql = connect(
        &resolve(&format!("{base} sslmode=verify-full")),
        Purpose::Sql,
    )
    .await
    .unwrap();
    let name = sql.query_value("SHOW application_name").await.unwrap();
    assert_eq!(name.as_deref(), Some("anywhen"));
    let options = format!("{base} application_name=x options='-c geqo=off'");
    let mut sql = connect(&resolve(&options), Purpose::Sql).await.unwrap();
    assert_eq!(
        sql.query_value("SHOW geqo").await.unwrap().as_deref(),
        Some("off")
    );
    assert_eq!(
        sql.query_value("SHOW application_name")
            .await
            .unwrap()
            .as_deref(),
        Some("x")
    );

    let peer = std::fs::metadata(world.server.data()).unwrap();
    let owner = peer.uid();
    let owner = nix::unistd::User::from_uid(nix::unistd::Uid::from_raw(owner))
        .unwrap()
        .unwrap();
    let right = format!("{base} requirepeer={}", owner.name);
    connect(&resolve(&right), Purpose::Sql).await.unwrap();
    let wrong = connect(
        &resolve(&format!("{base} requirepeer=nobody-else")),
        Purpose::Sql,
    )
    .await;
    assert!(matches!(last(wrong), AttemptError::WrongPeer { .. }));

    let hint = format!("{socket} user=socket_user");
    let refused = connect(&resolve(&hint), Purpose::Replication)
        .await
        .err()
        .unwrap()
        .to_string();
    assert!(
        refused.contains("local postgres,replication socket_user scram-sha-256"),
        "{refused}"
    );
}

/// A receiver that follows the primary through a failover names all of its servers.
#[tokio::test]
async fn the_wanted_kind_of_server_is_found() {
    let world = World::new().await;
    let port = world.port;
    let list = format!("host=127.0.0.1,127.0.0.1 port=1,{port} user=trusted dbname=postgres");
    for (attrs, found) in [
        ("any", true),
        ("read-write", true),
        ("primary", true),
        ("prefer-standby", true),
        ("standby", false),
        ("read-only", false),
    ] {
        let settings = resolve(&format!("{list} target_session_attrs={attrs}"));
        let outcome = connect(&settings, Purpose::Sql).await;
        assert_eq!(outcome.is_ok(), found, "{attrs}");
        if let Err(error) = outcome {
            assert!(error.is_transient(), "{error}");
            assert_eq!(error.attempts.len(), 2, "{error}");
        }
    }
    let local = format!("{} user=postgres", world.socket());
    for (attrs, found) in [("primary", true), ("read-write", true), ("standby", false)] {
        let settings = resolve(&format!("{local} target_session_attrs={attrs}"));
        let outcome = connect(&settings, Purpose::Replication).await;
        assert_eq!(outcome.is_ok(), found, "{attrs}");
    }
    world
        .superuser()
        .await
        .execute("ALTER ROLE trusted SET default_transaction_read_only = on")
        .await
        .unwrap();
    let settings = resolve(&format!("{list} target_session_attrs=read-only"));
    connect(&settings, Purpose::Sql).await.unwrap();
    let settings = resolve(&format!("{list} target_session_attrs=primary"));
    connect(&settings, Purpose::Sql).await.unwrap();
}
