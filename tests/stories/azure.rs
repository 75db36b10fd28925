//! Azure Blob, as far as its emulator Azurite goes: stream, backup and restore over `az://`.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::Command;

use aws_lc_rs::hmac;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;

use crate::anywhen::Anywhen;
use crate::ground::{Ground, PATIENCE, Running, command, eventually_some};
use crate::judge::End;
use crate::record::Record;
use crate::sealed::Identity;
use crate::server::Options;

/// Azurite's account and its key are the same everywhere
/// (learn.microsoft.com/azure/storage/common/storage-use-azurite).
const ACCOUNT: &str = "devstoreaccount1";
const KEY: &str =
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==";
const CONTAINER: &str = "stories";

struct Azurite {
    /// Killed with it.
    #[expect(dead_code, reason = "it is kept, not used")]
    running: Running,
    port: u16,
}

impl Azurite {
    fn start(ground: &Ground) -> Self {
        let tools = std::env::var_os("ANYWHEN_TOOLS_DIR");
        let tools = tools.map_or_else(|| PathBuf::from("/var/tmp/anywhen-tools"), PathBuf::from);
        let program = tools.join("azurite/node_modules/azurite/dist/src/blob/main.js");
        assert!(
            program.exists(),
            "{} is not there: run ./check, or tests/azurite/install",
            program.display()
        );
        let mut node = command("node");
        node.arg(program)
            .args([
                "--blobPort",
                "0",
                "--skipApiVersionCheck",
                "--disableTelemetry",
                "--silent",
            ])
            .arg("--location")
            .arg(ground.make_dir("azurite", 0o700));
        let mut running = Running::start(node, ground.path("azurite"));
        let port = eventually_some("Azurite listens", || {
            assert!(running.ended().is_none(), "{}", running.stderr());
            let said = running.stdout();
            let (_, address) = said.split_once("listens on http://127.0.0.1:")?;
            address.split_once('\n')?.0.trim().parse().ok()
        });
        let azurite = Self { running, port };
        azurite.create_container();
        azurite
    }

    /// `PUT container?restype=container`, signed with the account's key
    /// (learn.microsoft.com/rest/api/storageservices/authorize-with-shared-key).
    fn create_container(&self) {
        let date = Command::new("date")
            .env("LC_ALL", "C")
            .args(["-u", "+%a, %d %b %Y %H:%M:%S GMT"])
            .output()
            .unwrap();
        let date = String::from_utf8(date.stdout).unwrap();
        let headers = format!("x-ms-date:{}\nx-ms-version:2023-11-03", date.trim());
        let resource = format!("/{ACCOUNT}/{ACCOUNT}/{CONTAINER}\nrestype:container");
        let signed = format!("PUT{}{headers}\n{resource}", "\n".repeat(12));
        let key = hmac::Key::new(hmac::HMAC_SHA256, &BASE64_STANDARD.decode(KEY).unwrap());
        let signature = BASE64_STANDARD.encode(hmac::sign(&key, signed.as_bytes()));
        let request = format!(
            "PUT /{ACCOUNT}/{CONTAINER}?restype=container HTTP/1.1\r\nhost: 127.0.0.1:{}\r\n\
             {}\r\ncontent-length: 0\r\nconnection: close\r\n\
             authorization: SharedKey {ACCOUNT}:{signature}\r\n\r\n",
            self.port,
            headers.replace('\n', "\r\n")
        );
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 201"), "{answer}");
    }
}

/// What is stored in Azure comes back, encrypted on the way.
#[test]
fn a_cluster_is_streamed_to_azure_backed_up_and_restored() {
    let ground = Ground::on_disk().with_environment(vec![
        ("AZURE_STORAGE_ACCOUNT_NAME", ACCOUNT.to_owned()),
        ("AZURE_STORAGE_ACCOUNT_KEY", KEY.to_owned()),
    ]);
    let azurite = Azurite::start(&ground);
    let mut record = Record::on(ground, &Options::default());
    let url = format!("az://{CONTAINER}/postgres/here");
    let Identity { recipient, file } = Identity::get();
    let table = format!(
        "[repository.azure]\nurl = \"{url}\"\nendpoint = \"http://127.0.0.1:{}/{ACCOUNT}\"\n\
         allow_http = true\nrecipients = [\"{recipient}\"]\nidentity_file = \"{}\"\n",
        azurite.port,
        file.display()
    );
    record.anywhen = Anywhen::with_table(&record.ground, "azure", url, &table);
    let mut record = record.begin();
    record.insert(1);
    record.fill_segments(1);
    record.store_all();
    record.stop_stream();
    assert_eq!(record.rows_at("latest", &[], End::Promoted), "0,1");
    let status = record.anywhen.json(&["status"]);
    let windows = status["clusters"][0]["windows"].as_array().map(Vec::len);
    assert_eq!(windows, Some(1), "{status}");
}
