//! What the service manager is told: `sd_notify(3)`'s protocol, one datagram for each message.
//!
//! Written out, for it is one datagram to the socket that `NOTIFY_SOCKET` names.

use std::ffi::OsStr;
use std::fmt;
use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Interval, MissedTickBehavior, interval};

use crate::receive::StreamGauges;
use crate::receive::state::{Connection, StreamState};

/// How often the status is told anew at most.
const STATUS_INTERVAL: Duration = Duration::from_secs(1);

/// No one is told more often than twice within this.
const WATCHDOG_MIN: Duration = Duration::from_millis(20);

/// How often it is told that we stop, until it takes that, and after which time once more.
const STOPPING_TRIES: usize = 20;
const STOPPING_AGAIN: Duration = Duration::from_millis(50);

/// The way to a service manager that wants to know.
#[derive(Debug)]
pub(super) struct ServiceManager {
    socket: UnixDatagram,
    address: SocketAddr,
    /// How long we may be silent before we are taken for hung, where that is watched.
    watchdog: Option<Duration>,
}

impl ServiceManager {
    /// The one that started this process and asked to be notified, if any did.
    pub(super) fn of_environment() -> Option<Self> {
        let socket = std::env::var_os("NOTIFY_SOCKET")?;
        let variable = |name: &str| std::env::var(name).ok();
        let watchdog = watchdog(
            variable("WATCHDOG_USEC").as_deref(),
            variable("WATCHDOG_PID").as_deref(),
        );
        match Self::at(&socket, watchdog) {
            Ok(manager) => Some(manager),
            Err(error) => {
                tracing::warn!("the service manager cannot be notified: {error}");
                None
            }
        }
    }

    fn at(socket: &OsStr, watchdog: Option<Duration>) -> io::Result<Self> {
        let address = match socket.as_bytes() {
            [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
            [b'/', ..] => SocketAddr::from_pathname(socket)?,
            _ => return Err(io::Error::other("NOTIFY_SOCKET names no Unix socket")),
        };
        let socket = UnixDatagram::unbound()?;
        // a manager that does not read must not stop the stream
        socket.set_nonblocking(true)?;
        Ok(Self {
            socket,
            address,
            watchdog,
        })
    }

    /// Tells it of the stream until a stop was asked for and told.
    pub(super) async fn keep_told(self, gauges: StreamGauges, mut stop: watch::Receiver<bool>) {
        let mut told = Told::default();
        let mut changes = gauges.subscribe();
        let mut status = ticks(STATUS_INTERVAL);
        let mut watchdog = self.watchdog.map(|interval| ticks(interval / 2));
        let mut pulse = Pulse::default();
        let is_asked = loop {
            tokio::select! {
                _ = status.tick() => {
                    let state = gauges.read();
                    if state.connection == Connection::Streaming && !told.ready {
                        told.ready = self.tell("READY=1");
                    }
                    self.tell_status(&mut told, &state);
                }
                // units that wait for this one go on at once
                Ok(_) = changes.wait_for(|state| state.connection == Connection::Streaming),
                    if !told.begun => {
                    told.begun = true;
                    status.reset_immediately();
                }
                () = next(&mut watchdog) => {
                    if pulse.is_felt(gauges.read().connection, gauges.beats()) {
                        self.tell("WATCHDOG=1");
                    }
                    gauges.nudge();
                }
                stopping = stop.wait_for(|asked| *asked) => break stopping.is_ok(),
            }
        };
        if is_asked {
            self.tell_of_the_stop().await;
        }
    }

    /// Nothing follows this one, so that it is said again where the manager had no room for it.
    async fn tell_of_the_stop(&self) {
        let mut again = ticks(STOPPING_AGAIN);
        for _ in 0..STOPPING_TRIES {
            again.tick().await;
            if self.tell("STOPPING=1\nSTATUS=stopping: storing what was received") {
                return;
            }
        }
    }

    fn tell_status(&self, told: &mut Told, state: &StreamState) {
        let text = Status(state).to_string();
        if text != told.status && self.tell(&format!("STATUS={text}")) {
            told.status = text;
        }
    }

    /// Whether the message was taken.
    fn tell(&self, message: &str) -> bool {
        let sent = self.socket.send_to_addr(message.as_bytes(), &self.address);
        if let Err(error) = &sent {
            tracing::debug!("the service manager was not told {message:?}: {error}");
        }
        sent.is_ok()
    }
}

/// What the service manager knows.
#[derive(Debug, Default)]
struct Told {
    /// Streaming has begun; READY follows, in another try where this one is not taken.
    begun: bool,
    ready: bool,
    status: String,
}

/// Whether the receiver lives: its loop turns. Where there is no loop, each step is bounded in time
/// by itself.
#[derive(Debug, Default)]
struct Pulse {
    beats: u64,
}

impl Pulse {
    fn is_felt(&mut self, connection: Connection, beats: u64) -> bool {
        let before = std::mem::replace(&mut self.beats, beats);
        connection != Connection::Streaming || before != beats
    }
}

/// How often we are expected, in `sd_watchdog_enabled(3)`'s words; for another process it is not.
fn watchdog(usec: Option<&str>, pid: Option<&str>) -> Option<Duration> {
    let is_ours = pid.is_none_or(|pid| pid.parse() == Ok(std::process::id()));
    let usec = usec?.parse().ok().filter(|usec| *usec > 0 && is_ours)?;
    Some(Duration::from_micros(usec).max(WATCHDOG_MIN))
}

/// The state in one line.
struct Status<'a>(&'a StreamState);

impl fmt::Display for Status<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.0;
        f.write_str(state.connection.word())?;
        if let Some(timeline) = state.timeline {
            write!(f, " timeline {timeline}")?;
        }
        if let Some(stored) = state.stored {
            write!(f, ", stored {stored}")?;
        }
        if let Some(lag) = state.lag_bytes() {
            write!(f, ", lag {lag} B")?;
        }
        match (state.connection, &state.last_error) {
            (Connection::Connecting | Connection::Waiting, Some(failure)) => {
                // a message of the protocol ends with the line
                write!(f, ": {}", failure.message.replace('\n', " "))
            }
            _ => Ok(()),
        }
    }
}

fn ticks(every: Duration) -> Interval {
    let mut ticks = interval(every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}

async fn next(ticks: &mut Option<Interval>) {
    match ticks {
        Some(ticks) => {
            ticks.tick().await;
        }
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use wal::{Lsn, TimelineId};

    use super::*;

    fn manager(watchdog: Option<Duration>) -> (ServiceManager, UnixDatagram, tempfile::TempDir) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let theirs = UnixDatagram::bind(&path).unwrap();
        theirs.set_nonblocking(true).unwrap();
        let manager = ServiceManager::at(path.as_os_str(), watchdog).unwrap();
        (manager, theirs, folder)
    }

    fn heard(socket: &UnixDatagram) -> Vec<String> {
        let mut messages = Vec::new();
        let mut buffer = [0; 4096];
        while let Ok(length) = socket.recv(&mut buffer) {
            messages.push(String::from_utf8(buffer[..length].to_vec()).unwrap());
        }
        messages
    }

    async fn pass(time: Duration) {
        tokio::time::advance(time).await;
        // the task that tells is woken by time, and by what it waits for
        for _ in 0..8 {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn is_ready_once_and_only_when_it_streams() {
        // what depends on the stream would begin without it
        let (manager, socket, _folder) = manager(None);
        let gauges = StreamGauges::default();
        let (stop, stopped) = watch::channel(false);
        let telling = tokio::spawn(manager.keep_told(gauges.clone(), stopped));
        pass(Duration::from_secs(3)).await;
        assert_eq!(heard(&socket), ["STATUS=connecting"]);
        gauges.update(|state| state.connection = Connection::Streaming);
        pass(Duration::ZERO).await;
        assert_eq!(heard(&socket), ["READY=1", "STATUS=streaming"]);
        gauges.update(|state| {
            state.connection = Connection::Waiting;
            state.failed(jiff::Timestamp::UNIX_EPOCH, "reset\nby peer");
        });
        pass(Duration::from_secs(1)).await;
        gauges.update(|state| state.connection = Connection::Streaming);
        pass(Duration::from_secs(1)).await;
        assert_eq!(
            heard(&socket),
            ["STATUS=waiting: reset by peer", "STATUS=streaming"]
        );
        stop.send(true).unwrap();
        telling.await.unwrap();
        let last = heard(&socket);
        assert!(
            matches!(&*last, [one] if one.starts_with("STOPPING=1\n")),
            "{last:?}"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn the_watchdog_hears_nothing_of_a_loop_that_hangs() {
        // a stream that stands still, and a service manager that thinks it lives
        let (manager, socket, _folder) = manager(Some(Duration::from_secs(20)));
        let gauges = StreamGauges::default();
        let (_stop, stopped) = watch::channel(false);
        tokio::spawn(manager.keep_told(gauges.clone(), stopped));
        let woken = |socket: &UnixDatagram| {
            let messages = heard(socket);
            messages.iter().any(|message| message == "WATCHDOG=1")
        };
        pass(Duration::from_secs(10)).await;
        assert!(woken(&socket), "nothing hangs while the server is met");
        gauges.update(|state| state.connection = Connection::Streaming);
        for _ in 0..3 {
            gauges.nudged().await;
            gauges.beat();
            pass(Duration::from_secs(10)).await;
            assert!(woken(&socket), "the loop turned when it was asked to");
        }
        for _ in 0..3 {
            pass(Duration::from_secs(10)).await;
            assert!(!woken(&socket), "the loop did not turn");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_manager_without_room_hears_of_the_stop_later_or_is_given_up() {
        let (manager, socket, _folder) = manager(None);
        while manager.tell("WATCHDOG=1") {}
        let (stop, stopped) = watch::channel(true);
        let telling = tokio::spawn(manager.keep_told(StreamGauges::default(), stopped.clone()));
        pass(STOPPING_AGAIN).await;
        assert!(!telling.is_finished());
        assert!(heard(&socket).iter().all(|message| message == "WATCHDOG=1"));
        pass(STOPPING_AGAIN).await;
        assert!(telling.is_finished());
        assert!(matches!(&*heard(&socket), [one] if one.starts_with("STOPPING=1\n")));

        let (manager, _socket, _folder) = self::manager(None);
        while manager.tell("WATCHDOG=1") {}
        let telling = tokio::spawn(manager.keep_told(StreamGauges::default(), stopped));
        for _ in 0..STOPPING_TRIES {
            pass(STOPPING_AGAIN).await;
        }
        assert!(telling.is_finished());
        drop(stop);
    }

    #[test]
    fn an_abstract_socket_is_reached() {
        let name = format!("anywhen-notify-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        let theirs = UnixDatagram::bind_addr(&address).unwrap();
        theirs.set_nonblocking(true).unwrap();
        let manager = ServiceManager::at(OsStr::new(&format!("@{name}")), None).unwrap();
        assert!(manager.tell("READY=1"));
        assert_eq!(heard(&theirs), ["READY=1"]);
        assert!(ServiceManager::at(OsStr::new("vsock:2:1"), None).is_err());
    }

    #[test]
    fn the_watchdog_of_another_process_is_not_ours() {
        let ours = std::process::id().to_string();
        let second = Some(Duration::from_secs(1));
        assert_eq!(watchdog(Some("1000000"), None), second);
        assert_eq!(watchdog(Some("1000000"), Some(&ours)), second);
        assert_eq!(watchdog(Some("1000000"), Some("1")), None);
        assert_eq!(watchdog(Some("0"), None), None);
        assert_eq!(watchdog(Some("x"), None), None);
        assert_eq!(watchdog(None, Some(&ours)), None);
    }

    #[test]
    fn the_status_is_one_line_that_tells_where_the_stream_is() {
        let state = StreamState {
            connection: Connection::Streaming,
            timeline: TimelineId::new(1),
            stored: Some(Lsn::new(0x300_0060)),
            server_end: Some(Lsn::new(0x300_0070)),
            ..StreamState::default()
        };
        assert_eq!(
            Status(&state).to_string(),
            "streaming timeline 1, stored 0/3000060, lag 16 B"
        );
    }
}
