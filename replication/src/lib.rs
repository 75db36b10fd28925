//! A replication connection to a PostgreSQL server: its settings as libpq reads them, TLS,
//! authentication, slots, the stream of WAL, `BASE_BACKUP`; and ordinary SQL over the same stack.
//!
//! [`ConnectionSettings::resolve`](conninfo::ConnectionSettings::resolve) turns what a user wrote
//! into settings, [`connect::connect`] turns settings into a [`connection::Connection`], and the
//! connection does the rest. Nothing here knows where WAL is kept.

pub mod conninfo;
pub mod passfile;
pub mod service_file;

pub mod authentication;
pub mod connect;
pub mod tls;

pub mod framing;
pub mod server_error;

pub mod connection;

pub mod commands;
pub mod slots;

pub mod stream;

pub mod base_backup;
pub mod upload_manifest;
