//! Receiving WAL until stopped: the rules are pure ([`session`], [`progress`], [`resume`]), the
//! shell around them is one loop (`conversation`), in one that meets the server again
//! ([`receiver`]).

mod contact;
mod conversation;
mod moments;
pub mod progress;
pub mod receiver;
pub mod resume;
pub mod session;
