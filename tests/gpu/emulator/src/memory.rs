//! The card's memory: allocations of this process, counted against the size that the card is said
//! to have, and looked up by every access of a kernel.

use std::alloc::{Layout, alloc, dealloc};

/// Allocations are aligned as a driver's are.
const ALIGN: usize = 256;
/// Bytes behind each allocation that nobody was given: to go past the end is seen.
const APART: usize = 256;

/// The live allocations, in order of their addresses.
#[derive(Debug, Default)]
pub(crate) struct Blocks {
    /// First byte and the one after the last.
    live: Vec<(u64, u64)>,
}

impl Blocks {
    /// The allocation that holds this address.
    pub(crate) fn holding(&self, address: u64) -> Option<(u64, u64)> {
        let after = self.live.partition_point(|block| block.0 <= address);
        let block = *self.live.get(after.checked_sub(1)?)?;
        (address < block.1).then_some(block)
    }

    /// Whether all of a range lies in one allocation.
    pub(crate) fn hold(&self, address: u64, bytes: usize) -> bool {
        let end = address.saturating_add(bytes as u64);
        bytes == 0 || self.holding(address).is_some_and(|block| end <= block.1)
    }

    /// Where an address lies that is in no allocation, in words.
    pub(crate) fn around(&self, address: u64) -> String {
        let after = self.live.partition_point(|block| block.0 <= address);
        let before = after.checked_sub(1).and_then(|i| self.live.get(i));
        match (before, self.live.get(after)) {
            (Some(block), _) if address - block.1 < 1 << 16 => format!(
                "{} bytes behind an allocation of {}",
                address - block.1,
                block.1 - block.0
            ),
            (_, Some(block)) if block.0 - address < 1 << 16 => format!(
                "{} bytes before an allocation of {}",
                block.0 - address,
                block.1 - block.0
            ),
            _ => "in no allocation".into(),
        }
    }
}

/// All of the card's memory.
#[derive(Debug)]
pub(crate) struct Memory {
    pub(crate) blocks: Blocks,
    /// Bytes that the card has.
    pub(crate) size: u64,
    pub(crate) used: u64,
    /// What the process keeps for itself: the most that was in use since it last gave some back.
    pub(crate) kept: u64,
    /// The most that was in use.
    pub(crate) most: u64,
    pub(crate) allocations: u64,
}

impl Memory {
    pub(crate) fn new(size: u64) -> Self {
        Self {
            blocks: Blocks::default(),
            size,
            used: 0,
            kept: 0,
            most: 0,
            allocations: 0,
        }
    }

    /// Bytes that an allocation takes.
    fn taken(bytes: usize) -> u64 {
        bytes.next_multiple_of(ALIGN) as u64
    }

    /// So many bytes, or nothing where the card has no more. What is in them is no number in any
    /// float type, so that what a kernel forgets to write shows.
    pub(crate) fn allocate(&mut self, bytes: usize) -> Option<u64> {
        let taken = Self::taken(bytes.max(1));
        if self.used + taken > self.size {
            return None;
        }
        let layout = Self::layout(bytes)?;
        // SAFETY: the layout is never of no bytes.
        let start = unsafe { alloc(layout) };
        if start.is_null() {
            return None;
        }
        // SAFETY: the allocation has as many bytes.
        unsafe { start.write_bytes(0xff, layout.size()) };
        let start = start as u64;
        let live = &mut self.blocks.live;
        let at = live.partition_point(|block| block.0 < start);
        live.insert(at, (start, start + bytes.max(1) as u64));
        self.used += taken;
        self.most = self.most.max(self.used);
        self.kept = self.kept.max(self.used);
        self.allocations += 1;
        Some(start)
    }

    fn layout(bytes: usize) -> Option<Layout> {
        Layout::from_size_align(bytes.max(1).checked_add(APART)?, ALIGN).ok()
    }

    /// Gives an allocation back; whether there was one.
    pub(crate) fn free(&mut self, start: u64) -> bool {
        let live = &mut self.blocks.live;
        let Ok(at) = live.binary_search_by_key(&start, |block| block.0) else {
            return false;
        };
        let (start, end) = live.remove(at);
        let bytes = (end - start) as usize;
        self.used -= Self::taken(bytes);
        if let Some(layout) = Self::layout(bytes) {
            // SAFETY: it was made with this layout, and is in the list once.
            unsafe { dealloc(start as *mut u8, layout) };
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accesses_are_found_to_the_byte() {
        let mut memory = Memory::new(4096);
        let a = memory.allocate(100).unwrap();
        assert!(memory.blocks.hold(a, 100));
        assert!(!memory.blocks.hold(a, 101));
        assert!(!memory.blocks.hold(a + 100, 1));
        assert!(!memory.blocks.hold(a - 1, 1));
        assert!(memory.free(a));
        assert!(!memory.free(a));
        assert!(!memory.blocks.hold(a, 1));
    }

    #[test]
    fn a_full_card_has_no_more_and_then_some_again() {
        let mut memory = Memory::new(1024);
        let a = memory.allocate(700).unwrap();
        assert_eq!(memory.allocate(300), None);
        assert!(memory.free(a));
        assert!(memory.allocate(1024).is_some());
        assert_eq!((memory.most, memory.allocations), (1024, 2));
    }
}
