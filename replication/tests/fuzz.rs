//! Hostile servers: every reader of what a server sends, over a corpus and its mutations.
//!
//! A target is a function of bytes that must return, whatever they are. `ANYWHEN_FUZZ_SECONDS`
//! says how long each one is tried (1 unless set), `ANYWHEN_FUZZ_SEED` repeats a run.

use std::collections::BTreeMap;
use std::io::Cursor;
use std::pin::pin;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use bytes::Bytes;
use replication::base_backup::BaseBackupOptions;
use replication::connection::Connection;
use replication::framing::Framed;
use replication::stream::{Started, decode_event};
use wal::{Lsn, TimelineId};

use crate::scripted::{
    columns, complete, copy_both, copy_data, copy_done, copy_in, copy_out, error, keepalive,
    message, notice, ready, row, wal,
};

type Target = fn(&[u8]);

#[test]
fn framing_survives_any_bytes() {
    fuzz(framing);
}

#[test]
fn sub_messages_survive_any_bytes() {
    fuzz(sub_messages);
}

#[test]
fn commands_survive_any_answer() {
    fuzz(commands);
}

#[test]
fn a_stream_survives_any_server() {
    fuzz(stream);
}

#[test]
fn an_upload_survives_any_server() {
    fuzz(upload);
}

#[test]
fn a_base_backup_survives_any_server() {
    fuzz(base_backup);
}

/// A peer that sends `data` and closes. It never lets anyone wait, so one poll ends any future.
fn peer(data: &[u8]) -> Framed {
    Framed::new(tokio::io::join(
        Cursor::new(data.to_vec()),
        tokio::io::sink(),
    ))
}

fn connection(version: &str, data: &[u8]) -> Connection {
    let parameters = BTreeMap::from([("server_version".to_owned(), version.to_owned())]);
    Connection::new(peer(data), parameters, "a hostile server".to_owned())
}

fn finish<T>(future: impl Future<Output = T>) -> T {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => value,
        Poll::Pending => panic!("waits for a peer that has closed"),
    }
}

fn framing(data: &[u8]) {
    let mut framed = peer(data);
    let mut messages = 0;
    while finish(framed.read_message()).is_ok() {
        messages += 1;
    }
    assert!(messages <= data.len() / 5);
}

fn sub_messages(data: &[u8]) {
    let data = Bytes::copy_from_slice(data);
    drop(decode_event(data.clone()));
    // Wherever a message of the stream may begin, cut off as a keepalive and not at all.
    for at in 0..data.len() {
        if matches!(data[at], b'w' | b'k') {
            drop(decode_event(data.slice(at..)));
            drop(decode_event(data.slice(at..data.len().min(at + 18))));
        }
    }
}

fn commands(data: &[u8]) {
    finish(async {
        drop(connection("18", data).simple_query("SELECT").await);
        drop(connection("18", data).identify_system().await);
        drop(connection("18", data).wal_segment_size().await);
        drop(connection("18", data).timeline_history(first()).await);
        drop(connection("18", data).read_slot_by_command("a").await);
        drop(replication::slots::read_slot(&mut connection("13", data), "a").await);
    });
}

fn stream(data: &[u8]) {
    for is_stopped in [false, true] {
        let connection = connection("18", data);
        let started = finish(connection.start_replication(None, Lsn::new(0x300_0000), first()));
        let Ok(Started::Streaming(mut stream)) = started else {
            return;
        };
        if is_stopped {
            drop(finish(stream.stop()));
        } else {
            let mut position = stream.position();
            while finish(stream.next()).is_ok() {
                assert!(stream.position() >= position);
                position = stream.position();
            }
            drop(stream.into_connection());
        }
    }
}

fn base_backup(data: &[u8]) {
    for version in ["18", "13"] {
        let backup = finish(connection(version, data).base_backup(BaseBackupOptions::new("x")));
        if let Ok(mut backup) = backup {
            while finish(backup.next()).is_ok() {}
        }
    }
}

fn upload(data: &[u8]) {
    let Ok(mut upload) = finish(connection("18", data).upload_manifest()) else {
        return;
    };
    finish(upload.send(b"manifest")).unwrap();
    let is_taken = finish(upload.finish()).is_ok();
    finish(upload.finish()).unwrap_err();
    assert!(upload.into_connection().is_some() || !is_taken);
}

fn first() -> TimelineId {
    TimelineId::new(1).unwrap()
}

/// Conversations that go well, as messages: what mutations start from.
fn corpus() -> Vec<Vec<Vec<u8>>> {
    let position = || {
        vec![
            columns(&["recptr", "tli"]),
            row(&[Some("0/2000028"), Some("1")]),
            complete("S"),
        ]
    };
    let query = vec![
        columns(&["a", "b"]),
        row(&[Some("x"), None]),
        complete("SELECT 1"),
        ready(),
    ];
    let identity = vec![
        columns(&["systemid", "timeline", "xlogpos", "dbname"]),
        row(&[Some("7"), Some("1"), Some("0/3000000"), None]),
        complete("IDENTIFY_SYSTEM"),
        ready(),
    ];
    let streamed = vec![
        copy_both(),
        wal(0x300_0000, b"one"),
        keepalive(0x300_0003, true),
        notice("n"),
        wal(0x300_0003, b"two"),
        copy_done(),
        columns(&["next_tli", "next_tli_startpos"]),
        row(&[Some("2"), Some("0/3000006")]),
        complete("START_STREAMING"),
        complete("START_REPLICATION"),
        ready(),
    ];
    let refused = vec![copy_both(), error("ERROR", "58P01", "gone"), ready()];
    let shut_down = vec![copy_both(), wal(0x300_0000, b"x"), complete("COPY 0")];
    let tablespaces = vec![
        columns(&["o", "l", "s"]),
        row(&[None, None, None]),
        complete("S"),
    ];
    let copy = vec![
        copy_out(),
        copy_data(b"nbase.tar\0\0"),
        copy_data(b"dx"),
        copy_done(),
    ];
    let end = vec![complete("BASE_BACKUP"), ready()];
    let newer = [
        position(),
        tablespaces.clone(),
        copy.clone(),
        position(),
        end.clone(),
    ]
    .concat();
    let older = [position(), tablespaces, copy.clone(), copy, position(), end].concat();
    let others = vec![
        message(b'S', b"name\0value\0"),
        message(b'A', b"\0\0\0\x01c\0p\0"),
        message(b'v', b"\0\x03\0\0\0\0\0\x01_pq_.x\0"),
        message(b'K', &[0; 8]),
        message(b'R', &[0, 0, 0, 10, b'S', 0, 0]),
        message(b'I', b""),
    ];
    let uploaded = vec![copy_in(), notice("n"), complete("UPLOAD_MANIFEST"), ready()];
    vec![
        uploaded, query, identity, streamed, refused, shut_down, newer, older, others,
    ]
}

#[expect(clippy::print_stdout, reason = "a failure is repeated by its seed")]
fn fuzz(target: Target) {
    let seconds = setting("ANYWHEN_FUZZ_SECONDS").unwrap_or(1);
    let seed = setting("ANYWHEN_FUZZ_SEED").unwrap_or(0x5EED);
    println!("ANYWHEN_FUZZ_SEED={seed}");
    let corpus = corpus();
    for messages in &corpus {
        let whole = messages.concat();
        for end in 0..=whole.len() {
            target(&whole[..end]);
        }
        // What a message carries is a target's input too.
        for message in messages {
            target(&message[5..]);
        }
    }
    let mut random = Random(seed);
    let until = Instant::now() + Duration::from_secs(seconds);
    let mut runs = 0_u64;
    while Instant::now() < until {
        for _ in 0..100 {
            target(&mutated(&corpus, &mut random));
            runs += 1;
        }
    }
    println!("runs={runs}");
    assert!(runs > 0);
}

fn setting(name: &str) -> Option<u64> {
    let value = std::env::var(name).ok()?;
    Some(
        value
            .parse()
            .unwrap_or_else(|_| panic!("{name} is no number: {value}")),
    )
}

/// A conversation with messages swapped, repeated, dropped, mixed in from others, and bytes
/// changed.
fn mutated(corpus: &[Vec<Vec<u8>>], random: &mut Random) -> Vec<u8> {
    let mut messages = corpus[random.below(corpus.len())].clone();
    for _ in 0..random.below(4) {
        let at = random.below(messages.len());
        match random.below(5) {
            0 => drop(messages.remove(at)),
            1 => messages.insert(at, messages[at].clone()),
            2 => {
                let other = random.below(messages.len());
                messages.swap(at, other);
            }
            3 => {
                let others = &corpus[random.below(corpus.len())];
                messages.insert(at, others[random.below(others.len())].clone());
            }
            _ => {
                // A message of another length that says so.
                let body = messages[at][5..].to_vec();
                let keep = random.below(body.len() + 1);
                messages[at] = message(messages[at][0], &body[..keep]);
            }
        }
        if messages.is_empty() {
            return Vec::new();
        }
    }
    let mut bytes = messages.concat();
    for _ in 0..random.below(4) {
        let at = random.below(bytes.len());
        bytes[at] = match random.below(3) {
            0 => 0xFF,
            1 => bytes[at] ^ (1 << random.below(8)),
            _ => u8::try_from(random.below(256)).unwrap(),
        };
    }
    bytes.truncate(if random.below(4) == 0 {
        random.below(bytes.len() + 1)
    } else {
        bytes.len()
    });
    bytes
}

/// splitmix64
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() % u64::try_from(end.max(1)).unwrap()).unwrap()
    }
}
