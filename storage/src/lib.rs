//! storage

pub mod graph;
pub mod sage;
