//! What can go wrong in a store, each with what was expected, what was found, and what to do.

use simpatico_schema::EventError;
use std::io;
use std::path::{Path, PathBuf};

/// The result of a store's call.
pub type Result<T, E = StoreError> = std::result::Result<T, E>;

/// Why a store could not do what was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The operating system refused.
    #[error("{what} {}: {source}", path.display())]
    Io {
        /// What was being done ("write", "sync", "open" …).
        what: &'static str,
        /// To which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Another store handle owns the directory.
    #[error(
        "{} is in use by {owner}: expected to be its only owner; close that program, or give this one another store",
        path.display()
    )]
    Locked {
        /// The store.
        path: PathBuf,
        /// "process 1234", or "another process".
        owner: String,
    },
    /// A directory that holds other things.
    #[error(
        "{}: expected an empty directory or a store, got {found}; give another directory",
        path.display()
    )]
    NotAStore {
        /// The directory.
        path: PathBuf,
        /// What is in it.
        found: String,
    },
    /// No store, and none was to be made.
    #[error("{}: expected a store, got nothing; ingest events to make one", path.display())]
    Missing {
        /// The directory.
        path: PathBuf,
    },
    /// A file of a format that this program does not read.
    #[error(
        "{}: expected {format} version {expected}, got {got}; use the program that wrote it to export, then ingest here",
        path.display()
    )]
    Version {
        /// The file.
        path: PathBuf,
        /// Which format.
        format: &'static str,
        /// The version this program reads.
        expected: u32,
        /// The version in the file.
        got: u32,
    },
    /// Bytes that were written whole are no longer what they were.
    #[error(
        "{} is damaged at byte {offset}: {reason}; bring back a snapshot with restore, or keep what is whole with check --repair",
        file.display()
    )]
    Corrupt {
        /// The file.
        file: PathBuf,
        /// Where in it.
        offset: u64,
        /// What was expected and what was found.
        reason: String,
    },
    /// The log ends before something that was acknowledged.
    #[error(
        "{} was rolled back: expected events up to {expected}, got {found}; bring back the newest log or a snapshot, or accept the loss with check --repair",
        path.display()
    )]
    RolledBack {
        /// The store.
        path: PathBuf,
        /// The last sequence number known to have been durable.
        expected: u64,
        /// The last one found.
        found: u64,
    },
    /// A write or sync failed earlier; nothing is taken until the store is opened again.
    #[error(
        "the store takes no more writes since this failed: {reason}; free what is lacking, then open it again (nothing acknowledged is lost)"
    )]
    Poisoned {
        /// The first failure.
        reason: String,
    },
    /// The store is being closed.
    #[error("the store is closed; open it again")]
    Closed,
    /// An item of a list has a name that the store does not take; nothing was stored.
    #[error("item {index}: {reason}; nothing was stored")]
    Event {
        /// Its place in the batch, from 0.
        index: usize,
        /// What is wrong with it.
        reason: EventError,
    },
    /// A value that the store does not take.
    #[error("{what}: expected {expected}, got {got}")]
    Invalid {
        /// Which value.
        what: &'static str,
        /// What would be taken.
        expected: String,
        /// What was given.
        got: String,
    },
    /// A user the store does not know.
    #[error("user {user:?} is not in the store; names are compared byte by byte")]
    UnknownUser {
        /// The name asked for.
        user: String,
    },
    /// Embeddings were asked for, but no encoder is set.
    #[error(
        "no encoder is set: embeddings need GraphSAGE weights; train them with train sage, or set them with set_encoder"
    )]
    NoEncoder,
    /// The encoder's weights are not usable.
    #[error("encoder {}: {reason}; set the encoder again", path.display())]
    Encoder {
        /// The weights file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The queue of a stream is full, and the caller chose not to wait.
    #[error(
        "the stream's queue of {capacity} events is full; send again later, or send with waiting"
    )]
    Busy {
        /// How many events it holds.
        capacity: usize,
    },
    /// There are more users, attributes or events than numbers for them.
    #[error("{what}: expected at most {max}; split the data over several stores")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many there may be.
        max: u64,
    },
    /// The mirror in sled failed; answers do not depend on it.
    #[error("sled in {}: {reason}; delete that directory, it is rebuilt at the next open", path.display())]
    Mirror {
        /// sled's directory.
        path: PathBuf,
        /// What sled said.
        reason: String,
    },
}

impl StoreError {
    /// An I/O error with its deed and file, for `map_err`.
    pub(crate) fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io {
            what,
            path: path.into(),
            source,
        }
    }

    /// Damage at a place.
    pub(crate) fn corrupt(file: &Path, offset: u64, reason: impl Into<String>) -> Self {
        Self::Corrupt {
            file: file.into(),
            offset,
            reason: reason.into(),
        }
    }
}
