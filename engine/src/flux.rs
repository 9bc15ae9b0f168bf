//! The Flux family.
