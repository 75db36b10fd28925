//! A TCP proxy between a stream and its server: a network that cuts connections, falls silent, and is
//! slow.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::ground::lock;

/// Between two looks of a thread that waits for the network to be faster.
const TICK: Duration = Duration::from_millis(20);

/// A proxy on a port of 127.0.0.1. Connections end when it is dropped.
pub(crate) struct Proxy {
    port: u16,
    network: Arc<Network>,
}

struct Network {
    upstream: u16,
    closed: AtomicBool,
    /// In each direction of each connection; 0: as fast as it can.
    bytes_per_second: AtomicU64,
    links: Mutex<Vec<Link>>,
}

/// The two ends of one connection.
struct Link {
    ends: [TcpStream; 2],
    /// Nothing arrives any more, and nobody is told.
    silent: Arc<AtomicBool>,
}

impl Proxy {
    /// A proxy to `upstream`, a port of 127.0.0.1.
    pub(crate) fn to(upstream: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let network = Arc::new(Network {
            upstream,
            closed: AtomicBool::new(false),
            bytes_per_second: AtomicU64::new(0),
            links: Mutex::default(),
        });
        let accepting = Arc::clone(&network);
        std::thread::spawn(move || {
            for client in listener.incoming() {
                if accepting.closed.load(Ordering::Relaxed) {
                    return;
                }
                // a client that is gone already, or a server that is away: the connection is dropped
                if let Ok(client) = client {
                    drop(accepting.connect(client));
                }
            }
        });
        Self { port, network }
    }

    pub(crate) fn conninfo(&self) -> String {
        format!(
            "host=127.0.0.1 port={} user=postgres dbname=postgres sslmode=disable",
            self.port
        )
    }

    /// Cuts every connection, and returns how many those were.
    pub(crate) fn cut(&self) -> usize {
        let links = std::mem::take(&mut *lock(&self.network.links));
        for link in &links {
            link.shutdown();
        }
        links.len()
    }

    /// From now on nothing arrives on the connections that there are, in either direction, and they stay
    /// open: a firewall that forgot them. New ones work.
    pub(crate) fn forget_connections(&self) {
        for link in lock(&self.network.links).iter() {
            link.silent.store(true, Ordering::Relaxed);
        }
    }

    /// Lets so many bytes through in a second, in each direction of a connection; none: all.
    pub(crate) fn limit(&self, bytes_per_second: Option<u64>) {
        let rate = bytes_per_second.unwrap_or(0);
        self.network.bytes_per_second.store(rate, Ordering::Relaxed);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.network.closed.store(true, Ordering::Relaxed);
        self.cut();
        // the thread that accepts looks up
        drop(TcpStream::connect(("127.0.0.1", self.port)));
    }
}

impl Network {
    fn connect(self: &Arc<Self>, client: TcpStream) -> std::io::Result<()> {
        let server = TcpStream::connect(("127.0.0.1", self.upstream))?;
        for end in [&client, &server] {
            end.set_nodelay(true)?;
        }
        let silent = Arc::new(AtomicBool::new(false));
        let directions = [
            (client.try_clone()?, server.try_clone()?),
            (server.try_clone()?, client.try_clone()?),
        ];
        lock(&self.links).push(Link {
            ends: [client, server],
            silent: Arc::clone(&silent),
        });
        for (from, to) in directions {
            let (network, silent) = (Arc::clone(self), Arc::clone(&silent));
            std::thread::spawn(move || network.copy(from, to, &silent));
        }
        Ok(())
    }

    /// Copies until either end closes; what falls into silence is read and forgotten.
    fn copy(&self, mut from: TcpStream, mut to: TcpStream, silent: &AtomicBool) {
        let mut bytes = [0; 8 << 10];
        loop {
            let read = match from.read(&mut bytes) {
                Ok(0) => break,
                Ok(read) => read,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(_) => break,
            };
            self.delay(read);
            let heard = !silent.load(Ordering::Relaxed);
            if heard && to.write_all(&bytes[..read]).is_err() {
                break;
            }
        }
        if !silent.load(Ordering::Relaxed) {
            drop(to.shutdown(Shutdown::Both));
            drop(from.shutdown(Shutdown::Both));
        }
    }

    /// Takes the time that `bytes` take on this network; a network that becomes faster ends it.
    fn delay(&self, bytes: usize) {
        let since = Instant::now();
        loop {
            let rate = self.bytes_per_second.load(Ordering::Relaxed);
            let bytes = u32::try_from(bytes).expect("no more than the buffer has");
            let taken = Duration::from_secs(1) * bytes;
            let over = rate == 0 || taken / u32::try_from(rate).unwrap() <= since.elapsed();
            if over || self.closed.load(Ordering::Relaxed) {
                return;
            }
            std::thread::park_timeout(TICK);
        }
    }
}

impl Link {
    fn shutdown(&self) {
        for end in &self.ends {
            // one that has ended already is cut
            drop(end.shutdown(Shutdown::Both));
        }
    }
}
