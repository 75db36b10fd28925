//! An S3 endpoint for the stories: a child process that can be killed and started again on the same
//! port and folder. `cargo run --example s3_endpoint -- --help`
//!
//! s3s speaks the protocol and checks the signatures; [`objects`] keeps the objects as files, with what
//! S3 promises of them; [`faults`] misbehaves where it is told to, by seed. The first line on standard
//! output is the address.
#![expect(clippy::print_stdout, reason = "a program of the stories")]

mod faults;
mod objects;

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;

use async_trait::async_trait;
use clap::Parser;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use s3s::auth::{S3Auth, SecretKey};
use s3s::service::S3ServiceBuilder;
use s3s::{S3Result, s3_error};
use tokio::net::TcpSocket;

use crate::faults::{Faults, misbehaving};
use crate::objects::Objects;

/// An S3 endpoint on 127.0.0.1. Each folder in FOLDER is a bucket: make one to make a bucket.
#[derive(Debug, Parser)]
struct Arguments {
    /// Where the buckets are; an object is the file of its key.
    folder: PathBuf,
    /// 0: one that is free.
    #[arg(long, default_value_t = 0)]
    port: u16,
    #[arg(long, default_value = "stories")]
    access_key: String,
    #[arg(long, default_value = "stories-secret")]
    secret_key: String,
    /// Entries in one answer to a list, at most.
    #[arg(long, default_value_t = 1000)]
    page: usize,
    /// Takes every conditional write for an unconditional one, as some stores do.
    #[arg(long)]
    ignore_conditions: bool,
    #[command(flatten)]
    faults: Faults,
}

/// The one account that may do everything.
struct Account {
    access_key: String,
    secret_key: SecretKey,
}

#[async_trait]
impl S3Auth for Account {
    async fn get_secret_key(&self, access_key: &str) -> S3Result<SecretKey> {
        if access_key == self.access_key {
            Ok(self.secret_key.clone())
        } else {
            Err(s3_error!(InvalidAccessKeyId, "no access key {access_key}"))
        }
    }
}

fn main() -> std::io::Result<()> {
    let arguments = Arguments::parse();
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?
        .block_on(serve(arguments))
}

async fn serve(arguments: Arguments) -> std::io::Result<()> {
    let objects = Objects::open(
        &arguments.folder,
        arguments.page,
        arguments.ignore_conditions,
    )?;
    let mut service = S3ServiceBuilder::new(objects);
    service.set_auth(Account {
        access_key: arguments.access_key,
        secret_key: SecretKey::from(arguments.secret_key),
    });
    let service = misbehaving(service.build(), arguments.faults);

    let socket = TcpSocket::new_v4()?;
    // connections of the process that was killed on this port may linger
    socket.set_reuseaddr(true)?;
    socket.bind(SocketAddr::from((Ipv4Addr::LOCALHOST, arguments.port)))?;
    let listener = socket.listen(1024)?;
    println!("http://{}", listener.local_addr()?);
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        let service = service.clone();
        tokio::spawn(async move {
            // a connection that breaks is the client's to notice
            drop(
                Builder::new(TokioExecutor::new())
                    .serve_connection(TokioIo::new(stream), service)
                    .await,
            );
        });
    }
}
