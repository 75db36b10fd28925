//! Anywhen brings a PostgreSQL cluster back to any moment.
//!
//! The parts are laid out as DESIGN.md says, and arrows between them point one way.

pub mod backup;
pub mod clock;
pub mod config;
pub mod durable;
pub mod error;
pub mod receive;
pub mod repository;
pub mod retry;
pub mod server;
