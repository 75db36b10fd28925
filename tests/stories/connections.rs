//! Ways to connect: md5, SCRAM, TLS with a name that is checked, a password file.

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};

use crate::ground::write_as_account;
use crate::judge::{End, moments, start_restored};
use crate::record::Record;
use crate::server::{Options, Shutdown};

/// The role of the README, with a password.
const ROLE: &str = "create role anywhen login replication password 'correct horse'";

fn record_with(hba_method: &str, settings: &str) -> Record {
    Record::of_server(&Options {
        hba: format!(
            "host all anywhen 127.0.0.1/32 {hba_method}\nhost replication anywhen 127.0.0.1/32 {hba_method}"
        ),
        settings: settings.to_owned(),
        tcp: true,
        ..Options::default()
    })
}

/// Streams, backs up and restores with `conninfo`.
#[track_caller]
fn works_with(record: &Record, conninfo: &str) {
    record.insert(0);
    let stream = record
        .anywhen
        .command(&["stream", "--flush-interval", "200ms", "-d", conninfo]);
    let mut stream = record.anywhen.stream_of(&record.server, stream);
    record
        .anywhen
        .run(&["backup", "--checkpoint", "fast", "-d", conninfo])
        .succeeded();
    record.insert(1);
    stream.store_all(&record.server);
    stream.stop();
    let target = record.target("restored");
    record.anywhen.restore(&target, &[]);
    let mut restored = start_restored(&record.ground, &target, End::Promoted);
    assert_eq!(moments(&restored), "0,1");
    restored.stop(Shutdown::Fast);
}

fn tcp_conninfo(record: &Record, more: &str) -> String {
    format!(
        "host=127.0.0.1 port={} user=anywhen dbname=postgres {more}",
        record.server.port()
    )
}

#[test]
fn works_with_an_md5_password() {
    let record = record_with("md5", "password_encryption = md5\n");
    record.server.execute(ROLE);
    let conninfo = tcp_conninfo(&record, "password='correct horse'");
    works_with(&record, &conninfo);
}

/// The password comes from the password file, so that it stands in no process list.
#[test]
fn works_with_scram_and_a_password_file() {
    let record = record_with("scram-sha-256", "password_encryption = 'scram-sha-256'\n");
    record.server.execute(ROLE);
    let line = format!(
        "127.0.0.1:{}:*:anywhen:correct horse\n",
        record.server.port()
    );
    record.ground.write("home/.pgpass", &line, 0o600);
    works_with(&record, &tcp_conninfo(&record, ""));
}

/// A wrong password says so, and shows no password to anybody who reads the log.
#[test]
fn a_wrong_password_is_named_and_not_shown() {
    let record = record_with("scram-sha-256", "password_encryption = 'scram-sha-256'\n");
    record.server.execute(ROLE);
    let conninfo = tcp_conninfo(&record, "password=battery_staple");
    for command in ["stream", "backup"] {
        let ended = record.anywhen.run(&[command, "-d", &conninfo]);
        ended.failed();
        ended.says(&["password", "anywhen"]);
        assert!(!ended.stderr.contains("battery_staple"), "{ended}");
    }
    let missing = record
        .anywhen
        .run(&["backup", "-d", &tcp_conninfo(&record, "")]);
    missing.failed();
    missing.says(&["password"]);
}

/// verify-full means that the certificate's name is the one that was connected to: without that check
/// anybody with any certificate of the same authority is the server.
#[test]
fn verify_full_takes_the_right_name_and_refuses_another() {
    let record = tls_record();
    let ca = record.ground.path("ca.crt");
    let tls = |host: &str| {
        format!(
            "host={host} hostaddr=127.0.0.1 port={} user=anywhen dbname=postgres password='correct horse' \
             sslmode=verify-full sslrootcert={}",
            record.server.port(),
            ca.display()
        )
    };
    let wrong = record
        .anywhen
        .run(&["backup", "-d", &tls("db.example.com")]);
    wrong.failed();
    wrong.says(&["db.example.com", "certificate"]);
    let stranger = other_authority(&record);
    let untrusted = record.anywhen.run(&[
        "backup",
        "-d",
        &tls("localhost").replace(ca.to_str().unwrap(), &stranger),
    ]);
    untrusted.failed();
    untrusted.says(&["certificate"]);
    let list = record.anywhen.run(&["list", "--json"]);
    assert!(!list.stdout.contains("start_lsn"), "{list}");
    works_with(&record, &tls("localhost"));
}

/// A server that takes TLS alone, with a certificate for `localhost`.
fn tls_record() -> Record {
    let mut record = Record::of_server(&Options {
        hba: "hostssl all anywhen 127.0.0.1/32 scram-sha-256\nhostssl replication anywhen 127.0.0.1/32 scram-sha-256"
            .to_owned(),
        settings: "password_encryption = 'scram-sha-256'\n".to_owned(),
        tcp: true,
        ..Options::default()
    });
    record.server.execute(ROLE);
    let authority = authority();
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
    params
        .distinguished_name
        .push(DnType::CommonName, "localhost");
    let certificate = params.signed_by(&key, &authority).unwrap();
    record.ground.write("ca.crt", &authority.pem(), 0o644);
    let data = record.server.data().to_owned();
    write_as_account(
        &data.join("server.crt"),
        certificate.pem().as_bytes(),
        0o600,
    );
    write_as_account(
        &data.join("server.key"),
        key.serialize_pem().as_bytes(),
        0o600,
    );
    record.server.execute("alter system set ssl = on");
    record.server.stop(Shutdown::Fast);
    record.server.start();
    record
}

fn authority() -> CertifiedIssuer<'static, KeyPair> {
    let mut params = CertificateParams::default();
    params
        .distinguished_name
        .push(DnType::CommonName, "the authority of a story");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

/// The path of the certificate of an authority that signed nothing here.
fn other_authority(record: &Record) -> String {
    let path = record
        .ground
        .write("stranger.crt", &authority().pem(), 0o644);
    path.to_str().unwrap().to_owned()
}
