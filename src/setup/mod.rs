//! What prepares a server and a repository and shows what there is: slot, keys, and the demo.

pub mod demo;
pub mod index;
pub mod keys;
pub mod slot;
