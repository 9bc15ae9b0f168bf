//! Bugs planted on purpose, so that the fault suite can show that it would find them. Built
//! only with the feature `planted`, which no program turns on; even then nothing happens until
//! the environment variable `SIMPATICO_PLANTED` names one of [`BUGS`].

use super::{LogWriter, Payload};
use crate::error::{Result, StoreError};
use std::collections::HashMap;
use std::sync::OnceLock;

/// The bugs by name.
pub const BUGS: [&str; 10] = [
    "drop-sync",
    "sync-before-write",
    "skip-directory-sync",
    "mark-apart",
    "acknowledge-before-sync",
    "ignore-sync-error",
    "skip-checksum",
    "register-less-than",
    "iterate-hash-map",
    "forget-one-cache",
];

/// Whether this bug is the picked one.
pub(crate) fn is(bug: &str) -> bool {
    static PICKED: OnceLock<String> = OnceLock::new();
    PICKED.get_or_init(|| std::env::var("SIMPATICO_PLANTED").unwrap_or_default()) == bug
}

/// Mixes the order of equals, as a result taken from a hash map would be.
pub(crate) fn scramble(best: &mut Vec<(u32, u32)>) {
    if is("iterate-hash-map") {
        let map: HashMap<u32, u32> = best.iter().copied().collect();
        *best = map.into_iter().collect();
        best.sort_by_key(|b| std::cmp::Reverse(b.1));
    }
}

impl LogWriter {
    /// A commit with one of the bugs of the log; `None` where none of them is picked.
    pub(super) fn planted_commit(&mut self, payloads: &mut [Payload]) -> Option<Result<()>> {
        let steps: &[fn(&mut Self, &mut [Payload]) -> Result<()>] = if is("drop-sync") {
            &[Self::planted_write, Self::planted_mark]
        } else if is("sync-before-write") {
            &[Self::planted_sync, Self::planted_write, Self::planted_mark]
        } else if is("mark-apart") {
            &[Self::planted_write, Self::planted_mark, Self::planted_sync]
        } else if is("ignore-sync-error") {
            let deaf = |this: &mut Self, payloads: &mut [Payload]| {
                let _ = this.planted_sync(payloads);
                Ok(())
            };
            &[Self::planted_write, deaf, Self::planted_mark]
        } else {
            return None;
        };
        Some(steps.iter().try_for_each(|step| step(self, payloads)))
    }

    fn planted_write(&mut self, payloads: &mut [Payload]) -> Result<()> {
        payloads.iter_mut().try_for_each(|p| self.write_frame(p))
    }

    fn planted_sync(&mut self, _: &mut [Payload]) -> Result<()> {
        let synced = self.file.sync_data();
        synced.map_err(StoreError::io("sync", &self.path))
    }

    fn planted_mark(&mut self, _: &mut [Payload]) -> Result<()> {
        let at = self.at;
        self.mark.as_mut().map_or(Ok(()), |mark| mark.write(&at))
    }
}
