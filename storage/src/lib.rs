//! The living graph: a preference store that is durable, exact and always fresh.
//!
//! It takes likes and dislikes from many threads, and answers at any moment who is like whom
//! and what vector describes a user. It knows nothing of language models, pictures or
//! programs; it starts no async runtime; and sled, which mirrors the tables, is seen nowhere
//! outside.
//!
//! ```
//! use simpatico_schema::{Event, OverlapMode, Polarity};
//! use simpatico_storage::{Options, Store};
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let dir = tempfile::tempdir()?;
//! # let path = dir.path().join("store");
//! let store = Store::open(path, Options::default())?;
//! for user in ["ada", "ben"] {
//!     store.append(&[Event::new(user, "rustic wood", Polarity::Like)])?; // on disk
//! }
//! let moment = store.snapshot(); // never changes, whatever is appended now
//! let similar = moment.similar("ada", 10, OverlapMode::Shared)?;
//! assert_eq!(similar.neighbors[0].user, "ben");
//! # Ok(()) }
//! ```
//!
//! # Map
//!
//! | module | holds | is deliberately without |
//! |---|---|---|
//! | [`Store`] | the directory, its lock, group commit | any reading of the graph |
//! | [`Snapshot`] | every question | any lock, any file |
//! | `state` | what the log means | files, clocks |
//! | `log`, `mark` | the truth on disk | the graph |
//! | [`graph`] | similar users, in memory | files |
//! | [`sage`] | users' vectors, in memory | edges, files |
//!
//! The bytes on disk are described in FORMAT.md beside this crate.

mod check;
mod compact;
mod embed;
mod error;
mod export;
mod forgotten;
#[doc(hidden)]
pub mod fuzzing;
pub mod graph;
mod log;
mod mark;
mod maximum_file;
mod renumber;
pub mod sage;
mod sled_mirror;
mod snapshot;
mod state;
mod store;
mod stream;
mod sync;
mod threads;
pub mod workload;

pub use check::CheckReport;
pub use compact::{CompactReport, RestoreReport, SnapshotReport};
pub use error::{Result, StoreError};
pub use export::{Node, communities};
#[cfg(feature = "planted")]
pub use log::planted::BUGS as PLANTED_BUGS;
pub use snapshot::{By, Counts, Embedding, Polarities, Profile, Similar, Snapshot, Suggestion};
pub use store::{Ack, ForgetReceipt, Options, Receipt, Stats, Store};
pub use stream::{Stream, StreamCounts, StreamOptions, WhenFull};
