//! storage

pub mod graph;
