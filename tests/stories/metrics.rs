//! The stream shows what it does: to Prometheus, and to the service manager that started it.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::anywhen::Stream;
use crate::ground::{PATIENCE, eventually, eventually_some};
use crate::record::Record;
use crate::server::Options;
use crate::standbys::{follow, standby_of};

/// A `stream` command with `flags`.
fn stream_command(record: &Record, flags: &[&str]) -> Command {
    let mut command = record.anywhen.command(&["stream"]);
    command
        .args(["-d", &record.server.conninfo(), "--flush-interval", "200ms"])
        .args(flags);
    command
}

/// Where the stream says that its metrics are: `host:port`.
fn metrics_address(stream: &Stream) -> String {
    eventually_some("the stream says where its metrics are", || {
        let said = stream.stderr();
        let (_, rest) = said.split_once("metrics are at http://")?;
        let (address, _) = rest.split_once("/metrics")?;
        Some(address.to_owned())
    })
}

/// The whole answer to one request.
fn ask(address: &str, request: &str) -> String {
    let mut socket = TcpStream::connect(address).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let request = format!("{request} HTTP/1.1\r\nHost: anywhen\r\n\r\n");
    socket.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    // the answer ends with the connection
    socket.read_to_string(&mut answer).unwrap();
    answer
}

/// Every sample by its series.
fn scrape(address: &str) -> BTreeMap<String, f64> {
    let answer = ask(address, "GET /metrics");
    let (head, page) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
    assert!(head.contains("text/plain; version=0.0.4"), "{head}");
    let samples = page.lines().filter(|line| !line.starts_with('#'));
    let sample = |line: &str| {
        let (series, value) = line.rsplit_once(' ').unwrap();
        (series.to_owned(), value.parse().unwrap())
    };
    samples.map(sample).collect()
}

#[test]
fn metrics_follow_what_the_server_writes() {
    let mut record = Record::of_server(&Options::default());
    let command = stream_command(&record, &["--metrics", "127.0.0.1:0"]);
    record.stream = Some(record.anywhen.stream_of(&record.server, command));
    let address = metrics_address(record.stream.as_ref().unwrap());
    record.store_all();
    let of = |samples: &BTreeMap<String, f64>, name: &str| {
        let series = format!("{name}{{cluster=\"main\"}}");
        *samples
            .get(&series)
            .unwrap_or_else(|| panic!("no {series}: {samples:?}"))
    };
    let before = scrape(&address);
    let streaming = r#"anywhen_stream_state{cluster="main",state="streaming"}"#;
    assert!(before[streaming] > 0.0, "{before:?}");
    assert!(of(&before, "anywhen_timeline") > 0.0, "{before:?}");

    record.insert(1);
    record.fill_segments(1);
    record.store_all();
    let after = scrape(&address);
    for name in [
        "anywhen_server_lsn_bytes",
        "anywhen_received_lsn_bytes",
        "anywhen_stored_lsn_bytes",
        "anywhen_received_bytes_total",
        "anywhen_stored_bytes_total",
        "anywhen_segments_stored_total",
        "anywhen_stored_timestamp_seconds",
    ] {
        assert!(of(&after, name) > of(&before, name), "{name} stands still");
    }
    let puts = |samples: &BTreeMap<String, f64>| -> f64 {
        let is_put = |series: &str| series.contains("request=\"put\",outcome=\"ok\"");
        let found = samples.iter().filter(|(series, _)| is_put(series));
        found.map(|(_, count)| count).sum()
    };
    assert!(puts(&after) > puts(&before), "{after:?}");
    assert!(of(&after, "anywhen_received_lsn_bytes") >= of(&after, "anywhen_stored_lsn_bytes"));
    assert!(of(&after, "anywhen_stored_lsn_bytes") >= of(&after, "anywhen_reported_lsn_bytes"));

    // nobody writes: an alarm on lag must not ring
    eventually("an idle stream has no lag", || {
        let idle = scrape(&address);
        of(&idle, "anywhen_lag_bytes") <= 0.0 && of(&idle, "anywhen_lag_seconds") <= 0.0
    });
}

/// A lag that is not known for as long as something is missing is an alarm that never rings.
#[test]
fn a_stream_from_a_standby_knows_what_can_be_restored() {
    let mut record = Record::begun(&Options::default());
    let standby = standby_of(&record, &record.ground);
    record.store_all();
    record.stop_stream();
    let mut command = record.anywhen.command(&["stream"]);
    command.args(["-d", &standby.conninfo(), "--flush-interval", "200ms"]);
    command.args(["--metrics", "127.0.0.1:0"]);
    let stream = record.anywhen.stream_of(&standby, command);
    let address = metrics_address(&stream);
    let committed = record.server.value(
        "with one as (insert into moments values (1)) select extract(epoch from clock_timestamp())::bigint",
    );
    follow(&record, &standby);
    // a stamp counts a second earlier than it says
    let committed = committed.parse::<f64>().unwrap() - 2.0;
    let series = "anywhen_restorable_timestamp_seconds{cluster=\"main\"}";
    eventually("the moment of the commit is shown", || {
        let samples = scrape(&address);
        samples.get(series).is_some_and(|shown| *shown >= committed)
    });
    stream.stop();
}

#[test]
fn the_endpoint_gives_metrics_and_nothing_else() {
    let mut record = Record::of_server(&Options::default());
    let command = stream_command(&record, &["--metrics", "localhost:0"]);
    record.stream = Some(record.anywhen.stream_of(&record.server, command));
    let address = metrics_address(record.stream.as_ref().unwrap());
    for (request, status) in [
        ("GET /", "404"),
        ("GET /metrics/x", "404"),
        ("POST /metrics", "405"),
        ("GET /metrics?x=1", "200"),
        ("nonsense", "400"),
    ] {
        let answer = ask(&address, request);
        let expected = format!("HTTP/1.1 {status} ");
        assert!(answer.starts_with(&expected), "{request}: {answer}");
    }
    // a client that says nothing keeps nobody waiting
    let silent: Vec<TcpStream> = (0..8)
        .map(|_| TcpStream::connect(&address).unwrap())
        .collect();
    scrape(&address);
    drop(silent);
    record.stream.as_mut().unwrap().assert_running();

    let command = stream_command(&record, &["--slot", "another", "--metrics", &address]);
    let ended = record.anywhen.run_command(command);
    ended.failed_with(2);
    ended.says(&["cannot listen for metrics", &address, "hint:"]);
}

#[test]
fn the_service_manager_is_told_when_the_stream_begins_lives_and_ends() {
    let record = Record::of_server(&Options::default());
    let name = format!("anywhen-story-{}", record.server.port());
    let address = SocketAddr::from_abstract_name(&name).unwrap();
    let in_a_folder = record.ground.path("notify");
    for (socket, variable) in [
        (
            UnixDatagram::bind_addr(&address).unwrap(),
            format!("@{name}"),
        ),
        (
            UnixDatagram::bind(&in_a_folder).unwrap(),
            in_a_folder.display().to_string(),
        ),
    ] {
        if variable.starts_with('/') {
            // the stories' account writes to it
            fs::set_permissions(&in_a_folder, fs::Permissions::from_mode(0o666)).unwrap();
        }
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut command = stream_command(&record, &[]);
        command
            .env("NOTIFY_SOCKET", &variable)
            .env("WATCHDOG_USEC", "100000");
        let mut running = record.anywhen.launch(command);
        let mut heard = vec![];
        hear(&socket, &mut heard, |message| message == "READY=1");
        hear(&socket, &mut heard, |message| {
            message.starts_with("STATUS=streaming timeline 1, stored ")
                && message.contains(", lag 0 B")
        });
        // an idle loop, which has something to do a few times in ten seconds, turns as often as it is
        // watched: twenty times in a second
        let since = Instant::now();
        for _ in 0..60 {
            hear(&socket, &mut heard, |message| message == "WATCHDOG=1");
        }
        assert!(since.elapsed() < Duration::from_secs(15), "{heard:?}");
        running.signal(Signal::TERM);
        hear(&socket, &mut heard, |message| {
            message.starts_with("STOPPING=1")
        });
        let status = running.end("the stream that was asked to stop");
        assert_eq!(status.code(), Some(0), "{}", running.stderr());
        let ready = heard.iter().filter(|message| *message == "READY=1").count();
        assert_eq!(ready, 1, "{heard:?}");
    }
}

/// Reads messages until one is `wanted`.
#[track_caller]
fn hear(socket: &UnixDatagram, heard: &mut Vec<String>, wanted: impl Fn(&str) -> bool) {
    let mut buffer = [0; 4096];
    loop {
        let length = socket
            .recv(&mut buffer)
            .unwrap_or_else(|error| panic!("nothing more is heard: {error}: {heard:?}"));
        let message = String::from_utf8_lossy(&buffer[..length]).into_owned();
        let is_wanted = wanted(&message);
        heard.push(message);
        if is_wanted {
            return;
        }
        assert!(heard.len() < 10_000, "what was waited for did not come");
    }
}
