//! The words, shapes and formats every part of Simpatico shares.
//!
//! This crate knows nothing of disks, models or programs: plain values with serde, the
//! readers of the outer formats, and the seeded generator. Absent on purpose: any I/O
//! besides reading from a `Read`, any tensor, any clock.
//!
//! # Glossary (one word, one meaning)
//!
//! | word | meaning |
//! |---|---|
//! | **user** | somebody with a taste; named by a string of 1 to 256 bytes |
//! | **attribute** | a short phrase one can like or dislike ("rustic wood") |
//! | **event** | one statement of a user on an attribute: like, dislike, pass or clear, at a time |
//! | **register** | the state of one (user, attribute): the event with the greatest (`at`, `id`) |
//! | **edge** | a register whose polarity is like or dislike; its [`Sign`] says which |
//! | **overlap** | how many attributes two users share ([`OverlapMode`] says which count) |
//! | **similarity** | overlap divided by the graph-wide maximum overlap (Eq. 6) |
//! | **neighbor** | one of a user's K most similar other users |
//! | **feature** | the given text vector of an attribute, or the learned vector of a user |
//! | **embedding** | GraphSAGE's output vector for a user |
//! | **soft prompt** | the 8 token vectors made from an embedding |
//! | **caption** | words that describe a picture |
//! | **cue** | a wish that comes with a request ("make it cosy") |
//! | **instruction** | the sentence that says how to edit a picture |
//! | **prompt** | the tokens a model is given: of the language model, unless "picture prompt" is said |
//! | **pair** | two instructions for one user and caption, one preferred, one rejected |
//! | **bundle** | a folder with everything the engine loads |
//! | **provenance** | all that is needed to make the same picture again |
//!
//! # Example
//!
//! ```
//! use simpatico_schema::{Event, Polarity, read_jsonl_event};
//! let line = br#"{"user":"ada","attribute":"rustic wood","polarity":"like","at":1700000000000}"#;
//! let event: Event = read_jsonl_event(line).unwrap();
//! assert_eq!(event.polarity, Polarity::Like);
//! assert!(event.check_names().is_ok());
//! ```

pub mod edit;
mod event;
pub mod formats;
pub mod random;

pub use event::{
    Event, EventError, MAX_NAME_BYTES, Neighbor, OverlapMode, Polarity, Sign, check_name,
};
pub use formats::read_jsonl_event;
