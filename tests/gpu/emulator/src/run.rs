//! Runs a kernel: blocks beside each other, a block's warps one after another from barrier to
//! barrier, a warp's 32 lanes together for as long as they go the same way.
//!
//! Where lanes part, those furthest behind go on until they meet the others. Every access is
//! checked as a sanitizer would: to the byte, and for alignment.

use crate::alu::{Alu, Lanes};
use crate::memory::Blocks;
use crate::ptx::{
    Action, Address, Instruction, Kernel, LOCAL, SHARED, Shuffle, Space, Special, Value,
};
use rayon::prelude::*;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

/// Why a kernel was ended.
#[derive(Clone, Debug)]
pub(crate) struct Fault {
    pub(crate) kind: FaultKind,
    pub(crate) text: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FaultKind {
    IllegalAddress,
    Misaligned,
    Assertion,
    Launch,
}

/// A kernel's launch.
pub(crate) struct Launch<'a> {
    pub(crate) kernel: &'a Kernel,
    pub(crate) grid: [u32; 3],
    pub(crate) block: [u32; 3],
    /// Bytes of shared memory behind the kernel's own.
    pub(crate) shared: usize,
    /// The parameters' bytes, as they lie.
    pub(crate) parameters: &'a [u8],
    /// Whether later warps go first: what a missing barrier leaves to chance then shows.
    pub(crate) reversed: bool,
}

/// Instructions a warp may take between barriers: no kernel of ours comes near.
const MOST_STEPS: u64 = 1 << 33;

/// One atomic operation at a time.
static ATOMIC: Mutex<()> = Mutex::new(());

/// Runs it to its end; `blocks` is what may be read and written.
pub(crate) fn run(launch: &Launch, blocks: &Blocks) -> Result<(), Fault> {
    let count: usize = launch.grid.iter().map(|n| *n as usize).product();
    let failed = AtomicBool::new(false);
    let one = |workspace: &mut Workspace, at: usize| {
        if failed.load(Ordering::Relaxed) {
            return Ok(());
        }
        let done = workspace.block(at, blocks);
        if done.is_err() {
            failed.store(true, Ordering::Relaxed);
        }
        done
    };
    // Few threads are not worth waking others for.
    let threads: usize = launch.block.iter().map(|n| *n as usize).product();
    if count < 2 || count * threads < 2048 {
        let mut workspace = Workspace::new(launch);
        (0..count).try_for_each(|at| one(&mut workspace, at))
    } else {
        (0..count)
            .into_par_iter()
            .map_init(|| Workspace::new(launch), one)
            .collect()
    }
}

/// What the threads of one block need.
struct Workspace<'a> {
    launch: &'a Launch<'a>,
    warps: Vec<Warp>,
    shared: Vec<u8>,
}

/// What a block's warps share.
struct Block<'a> {
    launch: &'a Launch<'a>,
    /// Its number on each axis.
    at: [usize; 3],
    shared: &'a mut [u8],
    blocks: &'a Blocks,
}

/// Bytes on their way into shared memory.
struct Piece {
    /// Where in shared memory.
    to: usize,
    from: *const u8,
    bytes: usize,
}
// SAFETY: what it points to may be read by any thread while the kernel runs.
unsafe impl Send for Piece {}

struct Warp {
    registers: Vec<Lanes>,
    /// Each thread's own memory, lane by lane.
    local: Vec<u8>,
    at: [usize; 32],
    /// Lanes that have not ended, and those of them at a barrier.
    alive: u32,
    waiting: u32,
    /// Lanes that want to exchange with some that have not come yet.
    early: u32,
    /// Copies that have been asked for, with their lane and its number of groups before.
    copies: Vec<(usize, usize, Piece)>,
    groups: [usize; 32],
    /// The block of memory that the last access was in.
    last: (u64, u64),
}

impl<'a> Workspace<'a> {
    fn new(launch: &'a Launch<'a>) -> Self {
        let threads: usize = launch.block.iter().map(|n| *n as usize).product();
        // Without barriers, one warp ends before the next begins.
        let warps = match launch.kernel.waits {
            true => threads.div_ceil(32),
            false => 1,
        };
        let behind = launch.kernel.shared.next_multiple_of(16);
        Self {
            launch,
            warps: (0..warps).map(|_| Warp::new(launch.kernel)).collect(),
            shared: vec![0; behind + launch.shared],
        }
    }

    fn block(&mut self, at: usize, blocks: &Blocks) -> Result<(), Fault> {
        let launch = self.launch;
        let threads: usize = launch.block.iter().map(|n| *n as usize).product();
        let count = threads.div_ceil(32);
        let [across, down, _] = launch.grid.map(|n| n as usize);
        // What a block before left must not look like this one's.
        self.shared.fill(0xff);
        let mut block = Block {
            launch,
            at: [at % across, at / across % down, at / across / down],
            shared: &mut self.shared,
            blocks,
        };
        let order = |i: usize| if launch.reversed { count - 1 - i } else { i };
        if self.warps.len() < count {
            let warp = &mut self.warps[0];
            for number in (0..count).map(order) {
                warp.begin(&block, number, threads);
                warp.run(&mut block).map_err(|fault| told(&block, fault))?;
            }
            return Ok(());
        }
        for (number, warp) in self.warps.iter_mut().enumerate() {
            warp.begin(&block, number, threads);
        }
        loop {
            for number in (0..count).map(order) {
                let done = self.warps[number].run(&mut block);
                done.map_err(|fault| told(&block, fault))?;
            }
            // All that live have come to the barrier.
            if self.warps.iter().all(|warp| warp.alive == 0) {
                return Ok(());
            }
            self.warps.iter_mut().for_each(|warp| warp.waiting = 0);
        }
    }
}

fn told(block: &Block, fault: Fault) -> Fault {
    let launch = block.launch;
    Fault {
        text: format!(
            "{} (kernel {}, block {:?} of {:?}, {:?} threads each)",
            fault.text, launch.kernel.name, block.at, launch.grid, launch.block
        ),
        ..fault
    }
}

impl Warp {
    fn new(kernel: &Kernel) -> Self {
        let mut registers = vec![[0; 32]; kernel.registers];
        for (slot, value) in &kernel.constants {
            registers[*slot] = [*value; 32];
        }
        Self {
            registers,
            local: vec![0; 32 * kernel.local],
            at: [0; 32],
            alive: 0,
            waiting: 0,
            early: 0,
            copies: Vec::new(),
            groups: [0; 32],
            last: (0, 0),
        }
    }

    fn begin(&mut self, block: &Block, number: usize, threads: usize) {
        let launch = block.launch;
        let first = number * 32;
        self.at = [0; 32];
        self.waiting = 0;
        self.early = 0;
        self.copies.clear();
        self.groups = [0; 32];
        self.alive = match threads - first {
            n if n >= 32 => u32::MAX,
            n => (1 << n) - 1,
        };
        self.last = (0, 0);
        let [wide, high, _] = launch.block.map(|n| n as usize);
        for (slot, special) in &launch.kernel.specials {
            for (lane, value) in self.registers[*slot].iter_mut().enumerate() {
                let thread = first + lane;
                *value = match *special {
                    Special::Thread(0) => thread % wide,
                    Special::Thread(1) => thread / wide % high,
                    Special::Thread(_) => thread / wide / high,
                    Special::Threads(axis) => launch.block[axis] as usize,
                    Special::Block(axis) => block.at[axis],
                    Special::Blocks(axis) => launch.grid[axis] as usize,
                    Special::Lane => lane,
                } as u64;
            }
        }
    }

    /// Goes on until every lane has ended or stands at a barrier.
    fn run(&mut self, block: &mut Block) -> Result<(), Fault> {
        let code = block.launch.kernel.code.as_slice();
        let mut steps = 0;
        let mut none_comes = false;
        loop {
            let mut able = self.alive & !self.waiting & !self.early;
            if able == 0 {
                // Whoever was to come is here, or never will be.
                none_comes = true;
                able = std::mem::take(&mut self.early) & self.alive;
            }
            if able == 0 {
                return Ok(());
            }
            // Those furthest behind, and where the next ones stand.
            let lanes = || lanes_of(able);
            let here = lanes().map(|i| self.at[i]).min().unwrap_or_default();
            let mask = lanes()
                .filter(|i| self.at[*i] == here)
                .fold(0u32, |mask, i| mask | 1 << i);
            let next = lanes()
                .map(|i| self.at[i])
                .filter(|at| *at > here)
                .min()
                .unwrap_or(usize::MAX);
            self.together(block, here, mask, next, &mut steps)?;
            if none_comes && self.early != 0 {
                return Err(Fault {
                    kind: FaultKind::Launch,
                    text: format!(
                        "lanes {:#x} exchange with others that do not come, PTX line {}",
                        self.early, code[here].line
                    ),
                });
            }
            none_comes = false;
            if steps > MOST_STEPS {
                return Err(Fault {
                    kind: FaultKind::Launch,
                    text: "a warp does not come to an end".into(),
                });
            }
        }
    }

    /// The lanes of `mask`, all at `here`, until they part, meet others at `next`, wait or end.
    fn together(
        &mut self,
        block: &mut Block,
        mut here: usize,
        mask: u32,
        next: usize,
        steps: &mut u64,
    ) -> Result<(), Fault> {
        let code = block.launch.kernel.code.as_slice();
        loop {
            *steps += 1;
            let instruction = &code[here];
            let chosen = match instruction.guard {
                None => mask,
                Some((slot, wanted)) => {
                    let truth = &self.registers[slot];
                    let holds = (0..32).fold(0u32, |m, i| m | ((truth[i] & 1) as u32) << i);
                    mask & if wanted { holds } else { !holds }
                }
            };
            let mut to = here + 1;
            match instruction.action {
                _ if chosen == 0 => {}
                Action::Alu { f, into, from } => {
                    let [a, b, c] = from;
                    if into != a && into != b && into != c {
                        // SAFETY: `into` is another register than those read, and all are below
                        // the count that the kernel was read with.
                        unsafe {
                            let all = self.registers.as_mut_ptr();
                            f(
                                chosen,
                                &*all.add(a),
                                &*all.add(b),
                                &*all.add(c),
                                &mut *all.add(into),
                            );
                        }
                    } else {
                        let (a, b, c) = (self.registers[a], self.registers[b], self.registers[c]);
                        f(chosen, &a, &b, &c, &mut self.registers[into]);
                    }
                }
                Action::Load { value, at } => self
                    .load(block, chosen, value, at)
                    .map_err(|fault| lined(fault, instruction))?,
                Action::Store { value, at } => self
                    .store(block, chosen, value, at)
                    .map_err(|fault| lined(fault, instruction))?,
                Action::Atomic { f, value, at, with } => self
                    .atomic(block, chosen, f, value, at, with)
                    .map_err(|fault| lined(fault, instruction))?,
                Action::Shuffle {
                    kind,
                    into,
                    valid,
                    from,
                } => {
                    if !self.shuffle(chosen, kind, into, valid, from) {
                        self.place(mask, here);
                        self.early |= chosen;
                        return Ok(());
                    }
                }
                // All lanes take part in these two.
                Action::Matrices { .. } | Action::Product { .. } if chosen != self.alive => {
                    self.place(mask, here);
                    self.early |= chosen;
                    return Ok(());
                }
                Action::Matrices { into, at, turned } => self
                    .matrices(block, into, at, turned)
                    .map_err(|fault| lined(fault, instruction))?,
                Action::Product { d, a, b, c } => self.product(d, a, b, c),
                Action::Copy { to, from, bytes } => self
                    .copy(block, chosen, to, from, bytes)
                    .map_err(|fault| lined(fault, instruction))?,
                Action::Commit => lanes_of(chosen).for_each(|lane| self.groups[lane] += 1),
                Action::Await { but } => self.arrive(block, chosen, but),
                Action::Branch { to: target } if chosen == mask => to = target,
                Action::Branch { to: target } => {
                    self.place(mask & !chosen, here + 1);
                    self.place(chosen, target);
                    return Ok(());
                }
                Action::Barrier => {
                    self.place(mask, here + 1);
                    self.waiting |= chosen;
                    return Ok(());
                }
                Action::Exit => {
                    self.place(mask, here + 1);
                    self.alive &= !chosen;
                    return Ok(());
                }
                Action::Stop => {
                    return Err(lined(
                        Fault {
                            kind: FaultKind::Assertion,
                            text: "an assertion of the kernel failed".into(),
                        },
                        instruction,
                    ));
                }
            }
            here = to;
            if here >= next || *steps > MOST_STEPS {
                self.place(mask, here);
                return Ok(());
            }
        }
    }

    fn place(&mut self, mask: u32, at: usize) {
        lanes_of(mask).for_each(|lane| self.at[lane] = at);
    }

    fn set(&mut self, mask: u32, into: usize, value: u64) {
        let register = &mut self.registers[into];
        lanes_of(mask).for_each(|lane| register[lane] = value);
    }

    /// Whether all came that were to.
    fn shuffle(
        &mut self,
        mask: u32,
        kind: Shuffle,
        into: usize,
        valid: Option<usize>,
        from: [usize; 4],
    ) -> bool {
        let [values, by, clamp, members] = from.map(|slot| self.registers[slot]);
        let lanes = || lanes_of(mask);
        if lanes().any(|lane| members[lane] as u32 & self.alive & !mask != 0) {
            return false;
        }
        for lane in lanes() {
            // PTX ISA 9.0, section 9.7.9.6.
            let (b, c) = (by[lane] & 31, clamp[lane]);
            let (segment, most) = (c >> 8 & 31, c & 31);
            let l = lane as u64;
            let first = l & segment;
            let last = first | (most & !segment);
            let (source, reached) = match kind {
                Shuffle::Up => (l as i64 - b as i64, l as i64 - b as i64 >= last as i64),
                Shuffle::Down => ((l + b) as i64, l + b <= last),
                Shuffle::Butterfly => ((l ^ b) as i64, l ^ b <= last),
                Shuffle::Index => {
                    let j = first | (b & !segment);
                    (j as i64, j <= last)
                }
            };
            let source = if reached { source as usize } else { lane };
            self.registers[into][lane] = values[source];
            if let Some(valid) = valid {
                self.registers[valid][lane] = u64::from(reached);
            }
        }
        true
    }

    /// PTX ISA 9.0, section 9.7.14.5.15.
    fn matrices(
        &mut self,
        block: &mut Block,
        into: [usize; 4],
        at: Address,
        turned: bool,
    ) -> Result<(), Fault> {
        let rows = self.places(block, u32::MAX, at, 16, "reads")?;
        let half = |matrix: usize, row: usize, column: usize| {
            // SAFETY: `places` has looked up 16 bytes for each row.
            unsafe { read(rows[8 * matrix + row].add(2 * column), 2) }
        };
        for (matrix, slot) in into.into_iter().enumerate() {
            self.registers[slot] = std::array::from_fn(|lane| {
                let (row, column) = (lane / 4, 2 * (lane % 4));
                match turned {
                    false => half(matrix, row, column) | half(matrix, row, column + 1) << 16,
                    true => half(matrix, column, row) | half(matrix, column + 1, row) << 16,
                }
            });
        }
        Ok(())
    }

    /// PTX ISA 9.0, section 9.7.14.5.8: rows and columns of a lane's numbers. The order of a sum is
    /// a card's own; here it is that of the columns.
    fn product(&mut self, d: [usize; 4], a: [usize; 4], b: [usize; 2], c: [usize; 4]) {
        let half = |bits: u64, at: usize| f32::from_bits((bits as u32 >> (16 * at)) << 16);
        let (mut left, mut right) = ([[0f32; 16]; 16], [[0f32; 16]; 8]);
        let mut sums = [[0f32; 8]; 16];
        for lane in 0..32 {
            let (group, two) = (lane / 4, 2 * (lane % 4));
            for (i, slot) in a.into_iter().enumerate() {
                let (row, column) = (group + 8 * (i % 2), two + 8 * (i / 2));
                let bits = self.registers[slot][lane];
                (left[row][column], left[row][column + 1]) = (half(bits, 0), half(bits, 1));
            }
            for (i, slot) in b.into_iter().enumerate() {
                let bits = self.registers[slot][lane];
                let row = two + 8 * i;
                (right[group][row], right[group][row + 1]) = (half(bits, 0), half(bits, 1));
            }
            for (i, slot) in c.into_iter().enumerate() {
                let bits = self.registers[slot][lane] as u32;
                sums[group + 8 * (i / 2)][two + i % 2] = f32::from_bits(bits);
            }
        }
        for (sums, row) in sums.iter_mut().zip(&left) {
            for (sum, column) in sums.iter_mut().zip(&right) {
                let products = row.iter().zip(column).map(|(x, y)| x * y);
                *sum = products.fold(*sum, |sum, product| sum + product);
            }
        }
        for (i, slot) in d.into_iter().enumerate() {
            self.registers[slot] = std::array::from_fn(|lane| {
                let (group, two) = (lane / 4, 2 * (lane % 4));
                u64::from(sums[group + 8 * (i / 2)][two + i % 2].to_bits())
            });
        }
    }

    fn copy(
        &mut self,
        block: &mut Block,
        mask: u32,
        to: Address,
        from: Address,
        bytes: usize,
    ) -> Result<(), Fault> {
        let from = self.places(block, mask, from, bytes, "copies")?;
        self.places(block, mask, to, bytes, "copies to")?;
        let pieces = lanes_of(mask).map(|lane| {
            let to = self.registers[to.base][lane].wrapping_add(to.offset as u64) as usize;
            let from = from[lane].cast_const();
            (lane, self.groups[lane], Piece { to, from, bytes })
        });
        self.copies.extend(pieces);
        Ok(())
    }

    /// Makes these lanes' copies, all but those of the latest so many groups.
    fn arrive(&mut self, block: &mut Block, mask: u32, but: usize) {
        let groups = self.groups;
        self.copies.retain(|(lane, group, piece)| {
            let stays = mask >> lane & 1 == 0 || group + but >= groups[*lane];
            if !stays {
                let to = &mut block.shared[piece.to..][..piece.bytes];
                // SAFETY: it was looked up when the copy was asked for, and lives while the kernel
                // runs.
                unsafe { std::ptr::copy(piece.from, to.as_mut_ptr(), piece.bytes) };
            }
            stays
        });
    }

    /// Where an access of all lanes goes, if all want one allocation, as is the rule.
    #[inline(always)]
    fn places_at_once(
        &mut self,
        block: &Block,
        mask: u32,
        at: Address,
        bytes: usize,
    ) -> Option<Places> {
        if mask != u32::MAX || !matches!(at.space, Space::Global | Space::Generic) {
            return None;
        }
        let addresses = self.registers[at.base].map(|base| base.wrapping_add(at.offset as u64));
        let (mut least, mut most, mut bits) = (u64::MAX, 0, 0);
        for address in addresses {
            least = least.min(address);
            most = most.max(address);
            bits |= address;
        }
        if most >= SHARED || bits & (bytes as u64 - 1) != 0 {
            return None;
        }
        let within = |block: (u64, u64)| least >= block.0 && most + bytes as u64 <= block.1;
        if !within(self.last) {
            self.last = block.blocks.holding(least)?;
        }
        within(self.last).then(|| addresses.map(|address| address as *mut u8))
    }

    /// Where an access goes for each lane of the mask: as many bytes, in memory that is live while
    /// the kernel runs, at an address that their count divides.
    #[inline(always)]
    fn places(
        &mut self,
        block: &mut Block,
        mask: u32,
        at: Address,
        bytes: usize,
        wants: &'static str,
    ) -> Result<Places, Fault> {
        if let Some(places) = self.places_at_once(block, mask, at, bytes) {
            return Ok(places);
        }
        let mut places = [std::ptr::null_mut(); 32];
        for lane in lanes_of(mask) {
            places[lane] = self.reach(block, lane, at, bytes, wants)?;
        }
        Ok(places)
    }

    /// Where an access of a lane goes, checked.
    #[inline(always)]
    fn reach(
        &mut self,
        block: &mut Block,
        lane: usize,
        at: Address,
        bytes: usize,
        wants: &'static str,
    ) -> Result<*mut u8, Fault> {
        let address = self.registers[at.base][lane].wrapping_add(at.offset as u64);
        if !address.is_multiple_of(bytes as u64) {
            return Err(Fault {
                kind: FaultKind::Misaligned,
                text: format!("{wants} {bytes} bytes at {address:#x}, which they do not divide"),
            });
        }
        let (space, offset) = match at.space {
            Space::Generic if address >= LOCAL => (Space::Local, address - LOCAL),
            Space::Generic if address >= SHARED => (Space::Shared, address - SHARED),
            Space::Generic => (Space::Global, address),
            space => (space, address),
        };
        let within = |all: &mut [u8], from: usize, size: usize| {
            let end = offset.checked_add(bytes as u64);
            match end.is_some_and(|end| end <= size as u64) {
                // SAFETY: the offset lies inside, as was asked just now.
                true => Ok(unsafe { all.as_mut_ptr().add(from + offset as usize) }),
                false => Err(Fault {
                    kind: FaultKind::IllegalAddress,
                    text: format!("{wants} {bytes} bytes at {offset} of {size} of its memory"),
                }),
            }
        };
        match space {
            Space::Shared => {
                let size = block.shared.len();
                within(block.shared, 0, size)
            }
            Space::Local => {
                let size = self.local.len() / 32;
                within(&mut self.local, lane * size, size)
            }
            _ => {
                let end = address.saturating_add(bytes as u64);
                if address < self.last.0 || end > self.last.1 {
                    match block.blocks.holding(address) {
                        Some(found) if end <= found.1 => self.last = found,
                        near => {
                            return Err(Fault {
                                kind: FaultKind::IllegalAddress,
                                text: format!(
                                    "lane {lane} {wants} {bytes} bytes at {address:#x}, {}",
                                    match near {
                                        Some(found) => format!(
                                            "past the end of an allocation of {} bytes",
                                            found.1 - found.0
                                        ),
                                        None => block.blocks.around(address),
                                    }
                                ),
                            });
                        }
                    }
                }
                Ok(address as *mut u8)
            }
        }
    }

    fn load(
        &mut self,
        block: &mut Block,
        mask: u32,
        value: Value,
        at: Address,
    ) -> Result<(), Fault> {
        if at.space == Space::Param {
            for part in 0..value.count {
                let from = self.registers[at.base][0] as usize + at.offset as usize;
                let from = from + part * value.size;
                let mut bytes = [0u8; 8];
                let given = block.launch.parameters.get(from..from + value.size);
                let given = given.ok_or_else(|| Fault {
                    kind: FaultKind::Launch,
                    text: format!("no parameter at byte {from}"),
                })?;
                bytes[..value.size].copy_from_slice(given);
                let bits = widened(u64::from_le_bytes(bytes), value);
                self.set(mask, value.slots[part], bits);
            }
            return Ok(());
        }
        let places = self.places(block, mask, at, value.size * value.count, "reads")?;
        for part in 0..value.count {
            let into = &mut self.registers[value.slots[part]];
            for lane in lanes_of(mask) {
                // SAFETY: `places` has looked them up. Another thread may write them meanwhile, as
                // on a card: a whole number of these sizes is read at once.
                let bits = unsafe { read(places[lane].add(part * value.size), value.size) };
                into[lane] = widened(bits, value);
            }
        }
        Ok(())
    }

    fn store(
        &mut self,
        block: &mut Block,
        mask: u32,
        value: Value,
        at: Address,
    ) -> Result<(), Fault> {
        let places = self.places(block, mask, at, value.size * value.count, "writes")?;
        for part in 0..value.count {
            let from = &self.registers[value.slots[part]];
            for lane in lanes_of(mask) {
                // SAFETY: as in `load`.
                unsafe { write(places[lane].add(part * value.size), value.size, from[lane]) };
            }
        }
        Ok(())
    }

    fn atomic(
        &mut self,
        block: &mut Block,
        mask: u32,
        f: Alu,
        value: Value,
        at: Address,
        with: usize,
    ) -> Result<(), Fault> {
        let places = self.places(block, mask, at, value.size, "changes")?;
        let _one_at_a_time = ATOMIC.lock().unwrap_or_else(|e| e.into_inner());
        for lane in lanes_of(mask) {
            let operand = self.registers[with][lane];
            let mut new = [0; 32];
            // SAFETY: as in `load`.
            unsafe {
                let old = read(places[lane], value.size);
                f(1, &[old; 32], &[operand; 32], &[0; 32], &mut new);
                write(places[lane], value.size, new[0]);
                self.registers[value.slots[0]][lane] = old;
            }
        }
        Ok(())
    }
}

/// Where each lane's access goes; nowhere for lanes that make none.
type Places = [*mut u8; 32];

fn lanes_of(mask: u32) -> impl Iterator<Item = usize> {
    (0..32).filter(move |lane| mask >> lane & 1 == 1)
}

fn lined(fault: Fault, instruction: &Instruction) -> Fault {
    Fault {
        text: format!("{}, PTX line {}", fault.text, instruction.line),
        ..fault
    }
}

/// A number as a register holds it.
#[inline(always)]
fn widened(bits: u64, value: Value) -> u64 {
    if !value.signed {
        return bits;
    }
    match value.size {
        1 => bits as i8 as u64,
        2 => bits as i16 as u64,
        4 => bits as i32 as u64,
        _ => bits,
    }
}

/// # Safety
/// `size` is 1, 2, 4 or 8, and as many bytes at `from`, which it divides, are live.
#[inline(always)]
unsafe fn read(from: *const u8, size: usize) -> u64 {
    // SAFETY: the caller's promise.
    unsafe {
        match size {
            1 => u64::from(from.read_volatile()),
            2 => u64::from(from.cast::<u16>().read_volatile()),
            4 => u64::from(from.cast::<u32>().read_volatile()),
            _ => from.cast::<u64>().read_volatile(),
        }
    }
}

/// # Safety
/// As for `read`.
#[inline(always)]
unsafe fn write(to: *mut u8, size: usize, bits: u64) {
    // SAFETY: the caller's promise.
    unsafe {
        match size {
            1 => to.write_volatile(bits as u8),
            2 => to.cast::<u16>().write_volatile(bits as u16),
            4 => to.cast::<u32>().write_volatile(bits as u32),
            _ => to.cast::<u64>().write_volatile(bits),
        }
    }
}
