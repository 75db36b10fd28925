//! What prepares a server and shows what there is: its slot, and the demo.

pub mod demo;
pub mod slot;
