//! Receiving WAL until stopped: the rules are pure ([`session`], [`progress`], [`resume`]), the
//! shell around them is one loop (`conversation`), in one that meets the server again
//! ([`receiver`]).

pub mod comparison;
mod contact;
mod conversation;
mod ended;
mod failures;
mod histories;
mod intake;
mod known;
#[cfg(test)]
mod model;
mod moments;
mod options;
mod others;
pub mod pieces;
pub mod progress;
pub mod receiver;
pub mod resume;
pub mod session;
pub mod state;
mod storing;
mod trouble;

pub use options::ReceiverOptions;
pub use state::StreamGauges;
