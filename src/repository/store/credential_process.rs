//! A program that hands out AWS credentials.
//!
//! The contract: <https://docs.aws.amazon.com/sdkref/latest/guide/feature-process-credentials.html>.

use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use object_store::aws::AwsCredential;
use serde::Deserialize;
use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::process::Command;
use tokio::time::timeout;

use crate::clock::{Clock as _, SystemClock};

/// A sign-in may ask a service or two.
const RUN_MAX: Duration = Duration::from_mins(1);

/// The answer is a few hundred bytes.
const OUTPUT_BYTES_MAX: u64 = 64 << 10;

/// New credentials are asked for this long before the old ones end.
const BEFORE_END: Duration = Duration::from_mins(5);

/// Credentials, and how long they last.
pub(super) struct Handed {
    pub(super) credential: Arc<AwsCredential>,
    expires: Option<Timestamp>,
}

impl Handed {
    /// Credentials that do not end by themselves.
    pub(super) fn for_good(credential: AwsCredential) -> Self {
        Self {
            credential: Arc::new(credential),
            expires: None,
        }
    }

    /// Whether they will do for the next request.
    pub(super) fn is_fresh(&self) -> bool {
        let now = SystemClock.now();
        self.expires.is_none_or(|expires| {
            now.duration_until(expires).unsigned_abs() > BEFORE_END && now < expires
        })
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Output {
    version: u32,
    access_key_id: String,
    secret_access_key: String,
    session_token: Option<String>,
    expiration: Option<Timestamp>,
}

/// Runs `command` in a shell and reads what it says. The error never holds its output: that may
/// be a secret.
pub(super) async fn run(command: &str) -> Result<Handed, String> {
    match timeout(RUN_MAX, output(command)).await {
        Ok(output) => parse(&output?),
        Err(_) => Err(format!("it did not end within {} s", RUN_MAX.as_secs())),
    }
}

async fn output(command: &str) -> Result<Vec<u8>, String> {
    let failed = |error: std::io::Error| format!("cannot run it: {error}");
    let mut child = Command::new("/bin/sh")
        .args(["-c", command])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(failed)?;
    let (out, err) = (child.stdout.take(), child.stderr.take());
    let (output, errors) = tokio::join!(limited(out), limited(err));
    let status = child.wait().await.map_err(failed)?;
    if !status.success() {
        let errors = String::from_utf8_lossy(&errors.unwrap_or_default()).into_owned();
        let said = errors.trim().lines().next_back().unwrap_or_default();
        return Err(format!("it failed ({status}): {said}"));
    }
    output.ok_or_else(|| "its output could not be read".to_owned())
}

async fn limited(stream: Option<impl AsyncRead + Unpin>) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut stream = stream?.take(OUTPUT_BYTES_MAX);
    stream.read_to_end(&mut bytes).await.ok()?;
    Some(bytes)
}

fn parse(output: &[u8]) -> Result<Handed, String> {
    let output: Output = serde_json::from_slice(output).map_err(|error| {
        format!(
            "its output is not the JSON of credentials: line {}, column {}",
            error.line(),
            error.column()
        )
    })?;
    if output.version != 1 {
        return Err(format!("its output has version {}, not 1", output.version));
    }
    Ok(Handed {
        credential: Arc::new(AwsCredential {
            key_id: output.access_key_id,
            secret_key: output.secret_access_key,
            token: output.session_token.filter(|token| !token.is_empty()),
        }),
        expires: output.expiration,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_process_that_gives_nothing_is_said_so_without_what_it_printed() {
        for (command, word) in [
            ("echo SECRET", "JSON"),
            ("echo '{\"Version\":1,\"AccessKeyId\":\"SECRET\"}'", "JSON"),
            (
                "echo '{\"Version\":2,\"AccessKeyId\":\"SECRET\",\"SecretAccessKey\":\"SECRET\"}'",
                "version",
            ),
            ("echo SECRET; echo no session >&2; exit 3", "no session"),
            ("exec /nonexistent/program", "failed"),
            ("yes SECRET", "failed"),
            ("true", "JSON"),
        ] {
            let error = run(command).await.err().unwrap();
            assert!(error.contains(word), "{command}: {error}");
            assert!(!error.contains("SECRET"), "{command}: {error}");
        }
    }
}
