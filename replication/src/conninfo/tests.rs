use std::path::Path;

use super::*;

/// A home directory, a user and nothing else.
fn environment() -> Environment {
    Environment {
        home: Some("/home/someone".into()),
        user_name: Some("someone".to_owned()),
        ..Environment::default()
    }
}

fn with(vars: &[(&str, &str)]) -> Environment {
    let vars = vars
        .iter()
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    Environment {
        vars: vars.collect(),
        ..environment()
    }
}

fn resolve(conninfo: &str) -> ConnectionSettings {
    ConnectionSettings::resolve(conninfo, &environment()).unwrap()
}

fn refusal(conninfo: &str) -> String {
    ConnectionSettings::resolve(conninfo, &environment())
        .unwrap_err()
        .to_string()
}

fn password(settings: &ConnectionSettings) -> Option<&[u8]> {
    settings
        .login
        .password
        .as_ref()
        .map(|(secret, _)| secret.expose())
}

#[test]
fn nothing_given_means_libpqs_defaults() {
    let settings = resolve("");
    assert_eq!(settings.display(), "host=localhost port=5432 user=someone");
    assert_eq!(settings.dbname(), "someone");
    assert!(!settings.names_dbname());
    assert_eq!(settings.application_name(), "anywhen");
    assert_eq!(settings.connect_timeout, Some(Duration::from_secs(30)));
    assert_eq!(settings.target_session_attrs, TargetSessionAttrs::Any);
    assert_eq!(settings.tls.mode, SslMode::Prefer);
    assert_eq!(
        settings.tls.roots,
        Roots::File(FileChoice::Default(Some(
            "/home/someone/.postgresql/root.crt".into()
        )))
    );
    assert_eq!(
        settings.login.passfile.as_deref(),
        Some(Path::new("/home/someone/.pgpass"))
    );
    assert_eq!(settings.login.channel_binding, ChannelBindingMode::Prefer);
    assert!(settings.tcp.keepalives);
    assert!(!settings.load_balance);
}

#[test]
fn a_socket_where_distributions_put_it_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let dirs = [dir.path().join("run"), dir.path().join("tmp")];
    for dir in &dirs {
        std::fs::create_dir(dir).unwrap();
    }
    let environment = Environment {
        default_socket_dirs: dirs.to_vec(),
        ..environment()
    };
    let place = |conninfo: &str| {
        ConnectionSettings::resolve(conninfo, &environment)
            .unwrap()
            .hosts[0]
            .clone()
    };
    assert_eq!(place("").place, Place::Name("localhost".to_owned()));
    std::fs::write(dirs[1].join(".s.PGSQL.5432"), "").unwrap();
    assert_eq!(place("").place, Place::Unix(dirs[1].display().to_string()));
    std::fs::write(dirs[0].join(".s.PGSQL.5432"), "").unwrap();
    assert_eq!(place("").place, Place::Unix(dirs[0].display().to_string()));
    assert_eq!(place("").passfile_name, "localhost");
    assert_eq!(
        place("port=5433").place,
        Place::Name("localhost".to_owned())
    );
    assert_eq!(
        place(&format!("host={}", dirs[1].display())).passfile_name,
        "localhost"
    );
    assert_eq!(place("host=/elsewhere").passfile_name, "/elsewhere");
}

#[test]
fn hosts_and_ports_are_paired() {
    let shown = |conninfo: &str| resolve(conninfo).display();
    assert_eq!(
        shown("host=a,b,c port=1,2,3 user=u"),
        "host=a,b,c port=1,2,3 user=u"
    );
    assert_eq!(shown("host=a,b port=7 user=u"), "host=a,b port=7,7 user=u");
    assert_eq!(
        shown("host=a,b port=,8 user=u"),
        "host=a,b port=5432,8 user=u"
    );
    assert_eq!(shown("host=a,b user=u"), "host=a,b port=5432,5432 user=u");
    assert_eq!(
        shown("postgresql://u@a:1,[::1]:2,b/d"),
        "host=a,::1,b port=1,2,5432 user=u"
    );
    assert_eq!(
        shown("hostaddr=10.0.0.1,::1 user=u"),
        "host=10.0.0.1,::1 port=5432,5432 user=u"
    );
    assert_eq!(
        shown("host=a hostaddr=10.0.0.1 user=u"),
        "host=a(10.0.0.1) port=5432 user=u"
    );
    assert_eq!(
        shown("host=@abstract user=u"),
        "host=@abstract port=5432 user=u"
    );

    assert!(refusal("host=a,b port=1,2,3").contains("entries=3, hosts=2"));
    assert!(refusal("host=a hostaddr=10.0.0.1,10.0.0.2").contains("entries=1, hosts=2"));
    for port in ["0", "65536", "-1", "x", "5432x"] {
        assert!(
            refusal(&format!("port={port}")).contains("1 to 65535"),
            "{port}"
        );
    }
    assert!(refusal("hostaddr=localhost").contains("IPv4 or IPv6"));
}

#[test]
fn the_connection_string_comes_before_service_before_environment() {
    let dir = tempfile::tempdir().unwrap();
    let services = dir.path().join("services");
    let section = "[s]\nhost=service\nport=2\nuser=service\npassword=service\n";
    std::fs::write(&services, section).unwrap();
    let environment_with_all = with(&[
        ("PGSERVICEFILE", services.to_str().unwrap()),
        ("PGHOST", "environment"),
        ("PGPORT", "3"),
        ("PGUSER", "environment"),
        ("PGDATABASE", "environment"),
        ("PGPASSWORD", "environment"),
        ("PGSSLMODE", "require"),
        ("PGAPPNAME", "named"),
    ]);
    let resolve =
        |conninfo: &str| ConnectionSettings::resolve(conninfo, &environment_with_all).unwrap();

    let settings = resolve("service=s host=conninfo");
    assert_eq!(settings.display(), "host=conninfo port=2 user=service");
    assert_eq!(settings.dbname(), "environment");
    assert_eq!(password(&settings), Some(&b"service"[..]));
    assert_eq!(settings.tls.mode, SslMode::Require);
    assert_eq!(settings.application_name(), "named");
    assert_eq!(
        settings
            .with_default_application_name("ours")
            .application_name(),
        "named"
    );

    let settings = resolve("");
    assert_eq!(
        settings.display(),
        "host=environment port=3 user=environment"
    );
    // empty hides what comes later
    assert_eq!(password(&resolve("password=''")), None);
    assert_eq!(resolve("user=a user=b").user(), "b");

    let named = format!("service=s servicefile={}", services.display());
    let settings = ConnectionSettings::resolve(&named, &environment()).unwrap();
    assert_eq!(settings.user(), "service");
    let missing = ConnectionSettings::resolve("service=other", &environment_with_all).unwrap_err();
    assert!(
        missing
            .to_string()
            .starts_with("definition of service \"other\" not found"),
        "{missing}"
    );
}

#[test]
fn faults_in_a_service_name_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let services = dir.path().join("services");
    std::fs::write(&services, "[s]\nsslmode=maybe\n[t]\nhots=x\n").unwrap();
    let refusal = |service: &str| {
        refusal(&format!(
            "service={service} servicefile={}",
            services.display()
        ))
    };
    assert!(refusal("s").ends_with(&format!("from=service s in {}", services.display())));
    let unknown = refusal("t");
    assert!(
        unknown.contains("\"hots\" (did you mean \"host\"?)"),
        "{unknown}"
    );
}

#[test]
fn unknown_and_mistyped_is_refused_with_what_is_known() {
    assert_eq!(
        refusal("hots=a"),
        "unknown connection keyword \"hots\" (did you mean \"host\"?): from=the connection string"
    );
    assert_eq!(
        refusal("sslmode=verify"),
        "invalid sslmode: expected disable, allow, prefer, require, verify-ca, verify-full: \
         value=\"verify\", from=the connection string"
    );
    assert!(refusal("postgresql://h/?wal=1").contains("unknown connection keyword \"wal\""));
    let from_variable = ConnectionSettings::resolve("", &with(&[("PGSSLMODE", "full")]))
        .unwrap_err()
        .to_string();
    assert!(from_variable.ends_with("from=PGSSLMODE"), "{from_variable}");
}

/// What is asked for and not done must not look as if it were done.
#[test]
fn what_cannot_be_honoured_is_refused() {
    for conninfo in [
        "sslcrl=/x",
        "sslcrldir=/x",
        "sslpassword=x",
        "sslkeylogfile=/x",
        "gssencmode=require",
        "oauth_issuer=x",
        "scram_client_key=x",
        "client_encoding=latin1",
        "min_protocol_version=3.2",
        "replication=database",
        "require_auth=gss",
        "require_auth=oauth",
        "sslkey=engine:key",
        "ssl_max_protocol_version=TLSv1.1",
        "ssl_min_protocol_version=TLSv1.3 ssl_max_protocol_version=TLSv1.2",
        "sslnegotiation=direct",
        "sslnegotiation=direct sslmode=prefer",
        "sslrootcert=system sslmode=require",
        "load_balance_hosts=yes",
        "target_session_attrs=master",
        "connect_timeout=soon",
        "channel_binding=maybe",
    ] {
        refusal(conninfo);
    }
}

#[test]
fn what_changes_nothing_is_accepted() {
    for conninfo in [
        "gssencmode=prefer krbsrvname=postgres gsslib=gssapi gssdelegation=0",
        "gssencmode=disable sslcompression=0",
        "client_encoding=UTF8 replication=true max_protocol_version=latest",
        "sslcrl='' sslpassword='' min_protocol_version=3.0",
        "ssl_min_protocol_version=TLSv1 tty=x authtype=x",
        "keepalives=1 keepalives_idle=10 keepalives_interval=0 keepalives_count=-1",
    ] {
        resolve(conninfo);
    }
}

#[test]
fn modes_that_imply_others() {
    assert_eq!(resolve("sslrootcert=system").tls.mode, SslMode::VerifyFull);
    assert_eq!(resolve("requiressl=1").tls.mode, SslMode::Require);
    assert_eq!(resolve("requiressl=0").tls.mode, SslMode::Prefer);
    assert_eq!(
        resolve("postgresql://h/?ssl=true").tls.mode,
        SslMode::Require
    );
    let environment = with(&[("PGREQUIRESSL", "1")]);
    let settings = ConnectionSettings::resolve("", &environment).unwrap();
    assert_eq!(settings.tls.mode, SslMode::Require);
    assert!(resolve("sslnegotiation=direct sslmode=require").tls.direct);
    assert_eq!(resolve("connect_timeout=0").connect_timeout, None);
    assert_eq!(resolve("connect_timeout=-1").connect_timeout, None);
    assert_eq!(
        resolve("connect_timeout=' 7 '").connect_timeout,
        Some(Duration::from_secs(7))
    );
    let tcp = resolve("keepalives=0 keepalives_idle=9 tcp_user_timeout=1500").tcp;
    assert!(!tcp.keepalives);
    assert_eq!(tcp.idle, Some(Duration::from_secs(9)));
    assert_eq!(tcp.interval, None);
    assert_eq!(tcp.user_timeout, Some(Duration::from_millis(1500)));
}

#[test]
fn names_can_be_changed_afterwards() {
    let settings = resolve("user=u dbname=d");
    assert_eq!(
        settings
            .clone()
            .with_default_application_name("ours")
            .application_name(),
        "ours"
    );
    assert_eq!(settings.clone().with_dbname("e").dbname(), "e");
    let fallback = resolve("fallback_application_name=f");
    assert_eq!(fallback.application_name(), "f");
    assert_eq!(
        fallback.with_application_name("ours").application_name(),
        "ours"
    );
}

/// Settings travel into logs by `{:?}` sooner or later.
#[test]
fn a_password_is_never_shown() {
    let environment = with(&[("PGPASSWORD", "horse-in-environment")]);
    let shown = format!("{environment:?}");
    assert!(!shown.contains("horse"), "{shown}");
    for conninfo in ["", "password=horse", "postgresql://u:horse@h/d"] {
        let settings = ConnectionSettings::resolve(conninfo, &environment).unwrap();
        assert!(password(&settings).is_some());
        let shown = format!("{settings:?} {}", settings.display());
        assert!(!shown.contains("horse"), "{shown}");
    }
    // an @ in a password that is not encoded leaves its tail in the host
    for conninfo in [
        "postgresql://u:correct@horse@h/d",
        "password=horse sslmode=x",
        "password=horse battery=x",
    ] {
        let error = ConnectionSettings::resolve(conninfo, &environment).unwrap_err();
        assert!(!format!("{error} {error:?}").contains("horse"), "{error}");
    }
}

#[test]
fn no_user_is_said() {
    let error = ConnectionSettings::resolve("", &Environment::default()).unwrap_err();
    assert!(matches!(error, ConninfoError::NoUser), "{error}");
    assert_eq!(
        ConnectionSettings::resolve("user=u", &Environment::default())
            .unwrap()
            .user(),
        "u"
    );
}
