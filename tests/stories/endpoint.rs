//! A real S3 endpoint as a child process (`tests/s3_endpoint`), which can be killed and started again on
//! the same port and folder.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use rustix::process::Signal;
use serde_json::Value;

use crate::anywhen::install;
use crate::ground::{PATIENCE, Running, command, eventually_some};

/// The bucket that every endpoint has.
pub(crate) const BUCKET: &str = "stories";
const SECRET_KEY: &str = "stories-secret";
pub(crate) const REGION: &str = "eu-north-1";

pub(crate) struct Endpoint {
    running: Option<Running>,
    folder: PathBuf,
    out: PathBuf,
    port: u16,
    /// Another for each endpoint: while one is down, its port may become another story's.
    access_key: String,
}

impl Endpoint {
    /// Serves `folder`, which holds the buckets and belongs to the account of the stories.
    pub(crate) fn start(folder: &Path, out: PathBuf) -> Self {
        let ground = folder.parent().unwrap().file_name().unwrap();
        let mut endpoint = Self {
            running: None,
            folder: folder.to_owned(),
            out,
            port: 0,
            access_key: ground.to_str().unwrap().to_owned(),
        };
        endpoint.go_on(&[]);
        endpoint
    }

    /// Starts it where it was, misbehaving as `flags` say (`s3_endpoint --help`).
    #[track_caller]
    pub(crate) fn go_on(&mut self, flags: &[&str]) {
        assert!(self.running.is_none(), "the endpoint runs");
        // the port may still be busy for a moment
        self.running = Some(eventually_some("the endpoint starts", || {
            let mut program = command(program());
            program
                .arg(&self.folder)
                .args(["--port", &self.port.to_string()])
                .args(["--access-key", &self.access_key, "--secret-key", SECRET_KEY])
                .args(flags);
            let mut running = Running::start(program, self.out.clone());
            let address = eventually_some("the endpoint says where it is", || {
                let said = running.stdout();
                let ended = running.ended().is_some();
                (ended || said.ends_with('\n')).then_some(said)
            });
            let port = address.trim().rsplit_once(':')?.1;
            self.port = port.parse().unwrap();
            Some(running)
        }));
    }

    /// What a power cut does to it.
    #[track_caller]
    pub(crate) fn kill9(&mut self) {
        let mut running = self.running.take().expect("a running endpoint");
        running.signal(Signal::KILL);
        running.end("the killed endpoint");
    }

    /// Stops it where it is, or lets it go on: connections stay, and nobody answers.
    pub(crate) fn signal(&self, signal: Signal) {
        self.running
            .as_ref()
            .expect("a running endpoint")
            .signal(signal);
    }

    /// `http://127.0.0.1:PORT`.
    pub(crate) fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// The folder of the bucket, where an object is the file of its key.
    pub(crate) fn bucket(&self) -> PathBuf {
        self.folder.join(BUCKET)
    }

    /// How many uploads in parts were begun and neither completed nor aborted.
    pub(crate) fn open_uploads(&self) -> usize {
        std::fs::read_dir(self.folder.join(".uploads"))
            .unwrap()
            .count()
    }

    /// How many requests there were since it was started, and how often each fault fell on one.
    #[track_caller]
    pub(crate) fn counts(&self) -> Value {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let request = "GET /-/faults HTTP/1.1\r\nhost: stories\r\nconnection: close\r\n\r\n";
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (_, body) = answer.split_once("\r\n\r\n").unwrap();
        serde_json::from_str(body).unwrap()
    }

    /// What a client's environment says of it.
    pub(crate) fn environment(&self) -> Vec<(&'static str, String)> {
        vec![
            ("AWS_ACCESS_KEY_ID", self.access_key.clone()),
            ("AWS_SECRET_ACCESS_KEY", SECRET_KEY.to_owned()),
            ("AWS_REGION", REGION.to_owned()),
            ("AWS_ENDPOINT_URL", self.url()),
            ("AWS_ALLOW_HTTP", "true".to_owned()),
        ]
    }
}

/// The program, where the account of the stories can run it.
fn program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let built = Path::new(env!("CARGO_BIN_EXE_anywhen")).with_file_name("examples/s3_endpoint");
        assert!(
            built.exists(),
            "{} is not built: run ./check, or cargo build --example s3_endpoint",
            built.display()
        );
        install(&built, "s3_endpoint")
    })
}
