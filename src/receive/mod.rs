//! Receiving WAL until stopped: the rules are pure ([`session`], [`progress`]), the shell around
//! them is one loop ([`receiver`]).

pub mod progress;
pub mod receiver;
pub mod resume;
pub mod session;
