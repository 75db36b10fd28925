//! Anywhen brings a PostgreSQL cluster back to any moment.
//!
//! The binary is a thin shell around [`cli::main`]; the parts are laid out as DESIGN.md says, and
//! arrows between them point one way.

pub mod backup;
pub mod cli;
pub mod clock;
pub mod config;
pub mod durable;
pub mod error;
pub mod exposition;
pub mod receive;
pub mod repository;
pub mod restore;
pub mod retry;
pub mod server;
pub mod service;
pub mod setup;
pub mod status;
