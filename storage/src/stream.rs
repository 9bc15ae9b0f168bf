//! Many producers, one bounded queue, one consumer that appends in batches.
//!
//! Not here: reading files, and any order between producers beyond that of the queue. Events
//! that the store does not take go to the rejected events with their reason; the rest goes on.

use crate::error::{Result, StoreError};
use crate::store::{Ack, Store};
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use crate::sync::thread::{self, JoinHandle};
use crate::sync::{Condvar, Mutex, lock, wait};
use serde::{Deserialize, Serialize};
use simpatico_schema::Event;
use std::sync::{Arc, PoisonError};

/// What a full queue does to a sender.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WhenFull {
    /// It waits.
    #[default]
    Wait,
    /// It is refused with [`StoreError::Busy`].
    Busy,
}

/// How a stream is set up.
#[derive(Clone)]
pub struct StreamOptions {
    /// Events the queue holds.
    pub capacity: usize,
    /// The most events of one append.
    pub batch: usize,
    /// What a full queue does to a sender.
    pub when_full: WhenFull,
    /// How durable each append is before the next begins.
    pub ack: Ack,
    /// The name that rejected events are kept under.
    pub name: String,
    /// Called after each append, on the stream's thread, with the counts so far.
    pub progress: Option<Arc<dyn Fn(StreamCounts) + Send + Sync>>,
}

impl Default for StreamOptions {
    fn default() -> Self {
        Self {
            capacity: 65_536,
            batch: 8_192,
            when_full: WhenFull::Wait,
            ack: Ack::Durable,
            name: "stream".into(),
            progress: None,
        }
    }
}

/// What became of the events of a stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamCounts {
    /// Events sent.
    pub sent: u64,
    /// Events that changed a register.
    pub applied: u64,
    /// Events that changed nothing.
    pub unchanged: u64,
    /// Events that the store does not take; they are in the rejected events.
    pub rejected: u64,
}

impl StreamCounts {
    fn settled(&self) -> u64 {
        self.applied + self.unchanged + self.rejected
    }
}

/// A running stream. `Clone` it for each producer; [`Stream::finish`] the last one.
#[derive(Clone)]
pub struct Stream {
    sender: SyncSender<Event>,
    capacity: usize,
    when_full: WhenFull,
    state: Arc<StreamState>,
    consumer: Arc<Mutex<Option<JoinHandle<()>>>>,
}

struct StreamState {
    sent: AtomicU64,
    counts: Mutex<(StreamCounts, Option<String>)>,
    moved: Condvar,
}

impl Stream {
    /// Starts the consumer's thread.
    pub fn start(store: Arc<Store>, options: StreamOptions) -> Result<Self> {
        let (sender, receiver) = sync_channel(options.capacity.max(1));
        let state = Arc::new(StreamState {
            sent: AtomicU64::new(0),
            counts: Mutex::default(),
            moved: Condvar::new(),
        });
        let stream = Self {
            sender,
            capacity: options.capacity.max(1),
            when_full: options.when_full,
            state: state.clone(),
            consumer: Arc::default(),
        };
        let path = store.path().to_path_buf();
        let consumer = thread::Builder::new()
            .name("simpatico-stream".into())
            .spawn(move || consume(&store, &options, &receiver, &state))
            .map_err(StoreError::io("start a thread for", &path))?;
        *lock(&stream.consumer) = Some(consumer);
        Ok(stream)
    }

    /// Hands one event over. It is durable when [`Self::flush`] has returned.
    pub fn send(&self, event: Event) -> Result<()> {
        // Counted first: a flush that begins after this event was sent must wait for it.
        self.state.sent.fetch_add(1, Ordering::SeqCst);
        let sent = match self.when_full {
            WhenFull::Wait => self.sender.send(event).map_err(|_| self.failure()),
            WhenFull::Busy => self.sender.try_send(event).map_err(|e| match e {
                TrySendError::Full(_) => StoreError::Busy {
                    capacity: self.capacity,
                },
                TrySendError::Disconnected(_) => self.failure(),
            }),
        };
        if sent.is_err() {
            self.state.sent.fetch_sub(1, Ordering::SeqCst);
        }
        sent
    }

    fn failure(&self) -> StoreError {
        match &lock(&self.state.counts).1 {
            Some(reason) => StoreError::Poisoned {
                reason: reason.clone(),
            },
            None => StoreError::Closed,
        }
    }

    /// The counts so far.
    pub fn counts(&self) -> StreamCounts {
        StreamCounts {
            sent: self.state.sent.load(Ordering::SeqCst),
            ..lock(&self.state.counts).0
        }
    }

    /// Waits until everything sent before this call is settled.
    pub fn flush(&self) -> Result<StreamCounts> {
        let goal = self.state.sent.load(Ordering::SeqCst);
        let mut counts = lock(&self.state.counts);
        while counts.0.settled() < goal {
            if let Some(reason) = &counts.1 {
                let reason = reason.clone();
                return Err(StoreError::Poisoned { reason });
            }
            counts = wait(&self.state.moved, counts);
        }
        drop(counts);
        Ok(self.counts())
    }

    /// Settles everything, ends this handle, and with the last handle the consumer.
    pub fn finish(self) -> Result<StreamCounts> {
        let counts = self.flush()?;
        let Self {
            sender, consumer, ..
        } = self;
        drop(sender);
        if let Some(consumer) = Arc::into_inner(consumer) {
            let handle = consumer
                .into_inner()
                .unwrap_or_else(PoisonError::into_inner);
            if let Some(handle) = handle {
                let _ = handle.join();
            }
        }
        Ok(counts)
    }
}

fn consume(store: &Store, options: &StreamOptions, events: &Receiver<Event>, state: &StreamState) {
    let mut batch = Vec::with_capacity(options.batch);
    while let Ok(first) = events.recv() {
        batch.clear();
        batch.push(first);
        batch.extend(events.try_iter().take(options.batch.saturating_sub(1)));
        let settled = settle(store, options, &batch, state);
        let counts = {
            let mut counts = lock(&state.counts);
            match settled {
                Ok((applied, unchanged, rejected)) => {
                    counts.0.applied += applied;
                    counts.0.unchanged += unchanged;
                    counts.0.rejected += rejected;
                }
                Err(e) => {
                    counts.1 = Some(e.to_string());
                    state.moved.notify_all();
                    return;
                }
            }
            counts.0
        };
        state.moved.notify_all();
        if let Some(progress) = &options.progress {
            let sent = state.sent.load(Ordering::SeqCst);
            progress(StreamCounts { sent, ..counts });
        }
    }
}

/// Appends a batch and keeps its bad events apart.
fn settle(
    store: &Store,
    options: &StreamOptions,
    batch: &[Event],
    state: &StreamState,
) -> Result<(u64, u64, u64)> {
    let first = lock(&state.counts).0.settled();
    let receipt = store.append_with(batch, options.ack)?;
    for (index, reason) in &receipt.rejected {
        let raw = serde_json::to_vec(&batch[*index]).unwrap_or_default();
        store.reject(&options.name, first + *index as u64 + 1, reason, &raw)?;
    }
    Ok((
        receipt.applied,
        receipt.unchanged,
        receipt.rejected.len() as u64,
    ))
}
