//! A part that is loaded when first needed.

use crate::Result;
use std::sync::{Arc, Mutex};

pub(crate) struct Slot<T>(Mutex<Option<Arc<T>>>);

impl<T> Slot<T> {
    pub fn empty() -> Self {
        Self(Mutex::new(None))
    }

    /// The part; whoever comes first loads it, the others wait.
    pub fn get(&self, load: impl FnOnce() -> Result<T>) -> Result<Arc<T>> {
        let mut slot = self.0.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(part) = slot.as_ref() {
            return Ok(part.clone());
        }
        let part = Arc::new(load()?);
        *slot = Some(part.clone());
        Ok(part)
    }

    pub fn is_loaded(&self) -> bool {
        self.0.lock().unwrap_or_else(|e| e.into_inner()).is_some()
    }

    pub fn release(&self) {
        *self.0.lock().unwrap_or_else(|e| e.into_inner()) = None;
    }
}
