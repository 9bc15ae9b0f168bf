//! Reads PTX: a module's kernels and variables, and a kernel's instructions in the form that
//! `run` executes.
//!
//! Understood is what compilers write for candle's kernels and ours (PTX ISA 9.0): a kernel that
//! asks for more is refused by name when it is looked up, the others of its module work.

use crate::alu::{Alu, alu};
use std::collections::{HashMap, HashSet};

/// Where an address is looked up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Space {
    Param,
    Global,
    Shared,
    Local,
    Generic,
}

/// Generic addresses from here on are a block's shared memory, and a thread's own.
pub(crate) const SHARED: u64 = 1 << 60;
pub(crate) const LOCAL: u64 = 1 << 61;

/// An address: what a register holds, and bytes behind it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Address {
    pub(crate) space: Space,
    pub(crate) base: usize,
    pub(crate) offset: i64,
}

/// The numbers of a load or store: up to four registers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Value {
    /// Bytes of one.
    pub(crate) size: usize,
    pub(crate) signed: bool,
    pub(crate) count: usize,
    pub(crate) slots: [usize; 4],
}

/// How a lane finds the one that it reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shuffle {
    Up,
    Down,
    Butterfly,
    Index,
}

/// What an instruction does.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Action {
    Alu {
        f: Alu,
        into: usize,
        from: [usize; 3],
    },
    Load {
        value: Value,
        at: Address,
    },
    Store {
        value: Value,
        at: Address,
    },
    /// The number in memory becomes f of it and a register's.
    Atomic {
        f: Alu,
        value: Value,
        at: Address,
        with: usize,
    },
    Shuffle {
        kind: Shuffle,
        into: usize,
        valid: Option<usize>,
        from: [usize; 4],
    },
    /// Four matrices of 8 by 8 halves out of shared memory: lane i has the address of row i, and
    /// gets a row's part of each, or a column's.
    Matrices {
        into: [usize; 4],
        at: Address,
        turned: bool,
    },
    /// d = a · b + c for 16 by 16 and 16 by 8 numbers in bf16, summed in f32, spread over the lanes.
    Product {
        d: [usize; 4],
        a: [usize; 4],
        b: [usize; 2],
        c: [usize; 4],
    },
    /// A copy into shared memory that comes about when it is waited for, and not before.
    Copy {
        to: Address,
        from: Address,
        bytes: usize,
    },
    /// The copies since the last one are a group.
    Commit,
    /// Waits for all but the latest so many groups.
    Await {
        but: usize,
    },
    Branch {
        to: usize,
    },
    Barrier,
    Exit,
    /// A device function that ends the kernel, such as a failed assertion.
    Stop,
}

/// An instruction; with a guard only for the lanes whose predicate is as it says.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Instruction {
    pub(crate) guard: Option<(usize, bool)>,
    pub(crate) action: Action,
    /// The line of the module's text.
    pub(crate) line: u32,
}

/// A register that is given with the launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Special {
    Thread(usize),
    Threads(usize),
    Block(usize),
    Blocks(usize),
    Lane,
}

/// A kernel, ready to be run.
#[derive(Debug)]
pub(crate) struct Kernel {
    pub(crate) name: String,
    pub(crate) code: Vec<Instruction>,
    pub(crate) registers: usize,
    pub(crate) constants: Vec<(usize, u64)>,
    pub(crate) specials: Vec<(usize, Special)>,
    /// Offset and bytes of each parameter.
    pub(crate) parameters: Vec<(usize, usize)>,
    /// Bytes that its own variables in shared memory take; what a launch asks for lies behind.
    pub(crate) shared: usize,
    pub(crate) local: usize,
    pub(crate) waits: bool,
    /// Threads of a block, where the kernel was compiled for no more.
    pub(crate) most_threads: Option<usize>,
}

/// A variable in global memory and its first bytes.
#[derive(Debug)]
pub(crate) struct Variable {
    pub(crate) name: String,
    pub(crate) bytes: Vec<u8>,
}

/// A module's text, cut where kernels begin and end.
#[derive(Debug, Default)]
pub(crate) struct Module {
    kernels: HashMap<String, (u32, String)>,
    pub(crate) variables: Vec<Variable>,
    /// Names for the shared memory that a launch asks for.
    behind: HashSet<String>,
}

type Result<T> = std::result::Result<T, String>;

impl Module {
    /// Cuts a module's text.
    pub(crate) fn read(text: &str) -> Result<Self> {
        let mut module = Self::default();
        let mut lines = text.lines().zip(1u32..);
        while let Some((line, number)) = lines.next() {
            let line = line.trim();
            let words: Vec<&str> = line.split_whitespace().collect();
            if let Some(at) = words.iter().position(|w| *w == ".entry" || *w == ".func") {
                let mut body = String::new();
                let mut depth = 0i32;
                let mut opened = false;
                let mut rest = Some((line, number));
                // Up to the brace that closes the first one, or the end of a declaration.
                while let Some((line, _)) = rest {
                    body.push_str(line);
                    body.push('\n');
                    let bare = line.split("//").next().unwrap_or_default();
                    depth += bare.matches('{').count() as i32 - bare.matches('}').count() as i32;
                    opened |= bare.contains('{');
                    if (opened && depth <= 0) || (!opened && bare.trim_end().ends_with(';')) {
                        break;
                    }
                    rest = lines.next();
                }
                if words[at] == ".entry" {
                    let name = words.get(at + 1).copied().unwrap_or_default();
                    let name = name.split('(').next().unwrap_or_default();
                    module.kernels.insert(name.to_string(), (number, body));
                }
            } else if words.contains(&".extern") && words.contains(&".shared") {
                let of = words.last().copied().unwrap_or_default();
                let (name, _) = array(of.trim_end_matches(';'))?;
                module.behind.insert(name.to_string());
            } else if words.contains(&".global") || words.contains(&".const") {
                let mut whole = line.to_string();
                while !whole.contains(';') {
                    let Some((more, _)) = lines.next() else { break };
                    whole.push_str(more);
                }
                module.variables.push(variable(&whole)?);
            }
        }
        Ok(module)
    }

    /// Reads a kernel, given where the module's variables were put.
    pub(crate) fn kernel(&self, name: &str, at: &HashMap<String, u64>) -> Result<Option<Kernel>> {
        let Some((line, text)) = self.kernels.get(name) else {
            return Ok(None);
        };
        let kernel = Reader::new(name, at, &self.behind).read(text, *line);
        kernel.map(Some).map_err(|e| format!("kernel {name}: {e}"))
    }
}

/// `.global .align 4 .b8 name[24] = {65, 144, …};`
fn variable(text: &str) -> Result<Variable> {
    let (declared, first) = match text.split_once('=') {
        Some((declared, first)) => (declared, Some(first)),
        None => (text, None),
    };
    let declared = declared.trim().trim_end_matches(';');
    let of = declared.split_whitespace().last().unwrap_or_default();
    let (name, count) = array(of)?;
    let size = declared
        .split_whitespace()
        .find_map(|word| size_of(word.strip_prefix('.')?).ok())
        .ok_or_else(|| format!("no type in {declared}"))?;
    let mut bytes = vec![0u8; count.unwrap_or(1) * size];
    let first = first.unwrap_or_default().trim().trim_end_matches(';');
    let numbers = first.trim_start_matches('{').trim_end_matches('}');
    for (i, word) in numbers.split(',').map(str::trim).enumerate() {
        if word.is_empty() {
            continue;
        }
        let value = literal(word).ok_or_else(|| format!("no number: {word}"))?;
        bytes[i * size..(i + 1) * size].copy_from_slice(&value.to_le_bytes()[..size]);
    }
    Ok(Variable {
        name: name.to_string(),
        bytes,
    })
}

/// A name, and how many it is an array of; `name[]` is one of none.
fn array(text: &str) -> Result<(&str, Option<usize>)> {
    match text.split_once('[') {
        None => Ok((text, None)),
        Some((name, rest)) => {
            let count = rest.trim_end_matches(']').trim();
            match count.is_empty() {
                true => Ok((name, Some(0))),
                false => Ok((
                    name,
                    Some(count.parse().map_err(|_| format!("no length: {text}"))?),
                )),
            }
        }
    }
}

/// Bytes of a type.
fn size_of(name: &str) -> Result<usize> {
    Ok(match name {
        "b8" | "u8" | "s8" => 1,
        "b16" | "u16" | "s16" | "f16" | "bf16" => 2,
        "b32" | "u32" | "s32" | "f32" | "f16x2" | "bf16x2" => 4,
        "b64" | "u64" | "s64" | "f64" => 8,
        _ => return Err(format!("unknown type .{name}")),
    })
}

/// A number as text: whole, or the bits of a float.
fn literal(text: &str) -> Option<u64> {
    let (negative, digits) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let digits = digits.trim_end_matches('U');
    let value = if let Some(hex) = digits.strip_prefix("0f").or(digits.strip_prefix("0F")) {
        u64::from_str_radix(hex, 16).ok()?
    } else if let Some(hex) = digits.strip_prefix("0d").or(digits.strip_prefix("0D")) {
        u64::from_str_radix(hex, 16).ok()?
    } else if let Some(hex) = digits.strip_prefix("0x").or(digits.strip_prefix("0X")) {
        u64::from_str_radix(hex, 16).ok()?
    } else {
        digits.parse().ok()?
    };
    Some(if negative {
        value.wrapping_neg()
    } else {
        value
    })
}

/// Reads one kernel.
struct Reader<'a> {
    kernel: Kernel,
    globals: &'a HashMap<String, u64>,
    behind: &'a HashSet<String>,
    /// The register with the address of what a launch asks for in shared memory.
    behind_at: Option<usize>,
    /// Registers by scope, the innermost last: inline assembly has its own in braces.
    scopes: Vec<HashMap<String, usize>>,
    constants: HashMap<u64, usize>,
    specials: HashMap<Special, usize>,
    shared: HashMap<String, usize>,
    local: HashMap<String, usize>,
    parameters: HashMap<String, usize>,
    labels: HashMap<String, usize>,
    /// Branches whose label has not come yet.
    pending: Vec<(usize, String)>,
    carry: Option<usize>,
    guard: Option<(usize, bool)>,
    line: u32,
}

impl<'a> Reader<'a> {
    fn new(name: &str, globals: &'a HashMap<String, u64>, behind: &'a HashSet<String>) -> Self {
        Self {
            kernel: Kernel {
                name: name.to_string(),
                code: Vec::new(),
                registers: 0,
                constants: Vec::new(),
                specials: Vec::new(),
                parameters: Vec::new(),
                shared: 0,
                local: 0,
                waits: false,
                most_threads: None,
            },
            globals,
            behind,
            behind_at: None,
            scopes: vec![HashMap::new()],
            constants: HashMap::new(),
            specials: HashMap::new(),
            shared: HashMap::new(),
            local: HashMap::new(),
            parameters: HashMap::new(),
            labels: HashMap::new(),
            pending: Vec::new(),
            carry: None,
            guard: None,
            line: 0,
        }
    }

    fn read(mut self, text: &str, first_line: u32) -> Result<Kernel> {
        let open = text.find('{').ok_or("it has no body")?;
        self.parameters_of(&text[..open])?;
        self.line = first_line + text[..open].matches('\n').count() as u32;
        let mut statement = String::new();
        // Braces inside a statement hold the parts of a vector.
        let mut parts = 0;
        for line in text[open + 1..].split_inclusive('\n') {
            let code = line.split("//").next().unwrap_or_default();
            for c in code.chars() {
                let empty = statement.trim().is_empty();
                match c {
                    '{' if empty => self.scopes.push(HashMap::new()),
                    '}' if empty => {
                        if self.scopes.len() > 1 {
                            self.scopes.pop();
                        }
                    }
                    ';' => {
                        self.statement(statement.trim())
                            .map_err(|e| format!("line {}: {e}", self.line))?;
                        statement.clear();
                    }
                    ':' if parts == 0 && !statement.contains([' ', '\t', '.', '['].as_slice()) => {
                        let label = statement.trim().to_string();
                        self.labels.insert(label, self.kernel.code.len());
                        statement.clear();
                    }
                    _ => {
                        parts += i32::from(c == '{') - i32::from(c == '}');
                        if !(empty && c.is_whitespace()) {
                            statement.push(c);
                        }
                    }
                }
            }
            if line.ends_with('\n') && !statement.is_empty() {
                statement.push(' ');
            }
            self.line += 1;
        }
        self.push(Action::Exit);
        for (at, label) in std::mem::take(&mut self.pending) {
            let to = *self
                .labels
                .get(&label)
                .ok_or_else(|| format!("no label {label}"))?;
            self.kernel.code[at].action = Action::Branch { to };
        }
        self.kernel.constants = self.constants.iter().map(|(v, slot)| (*slot, *v)).collect();
        let behind = self.kernel.shared.next_multiple_of(16) as u64;
        let behind = self.behind_at.map(|slot| (slot, behind));
        self.kernel.constants.extend(behind);
        self.kernel.specials = self.specials.iter().map(|(s, slot)| (*slot, *s)).collect();
        Ok(self.kernel)
    }

    /// `.visible .entry name( .param .u64 name_param_0, .param .align 8 .b8 name_param_1[24] )`
    fn parameters_of(&mut self, head: &str) -> Result<()> {
        let Some((_, list)) = head.split_once('(') else {
            return Ok(());
        };
        let (list, rest) = list.split_once(')').unwrap_or((list, ""));
        self.kernel.most_threads = rest.split_once(".maxntid").and_then(|(_, counts)| {
            let first = counts
                .trim_start()
                .split(|c: char| !c.is_ascii_digit())
                .next();
            first?.parse().ok()
        });
        let mut offset = 0usize;
        for one in list.split(',').map(str::trim).filter(|p| !p.is_empty()) {
            let words: Vec<&str> = one.split_whitespace().collect();
            let (name, count) = array(words.last().copied().unwrap_or_default())?;
            let size = words
                .iter()
                .find_map(|w| size_of(w.strip_prefix('.')?).ok())
                .ok_or_else(|| format!("no type in {one}"))?;
            let align = words
                .windows(2)
                .find(|w| w[0] == ".align")
                .and_then(|w| w[1].parse().ok())
                .unwrap_or(size);
            let bytes = size * count.unwrap_or(1);
            offset = offset.next_multiple_of(align);
            self.kernel.parameters.push((offset, bytes));
            self.parameters.insert(name.to_string(), offset);
            offset += bytes;
        }
        Ok(())
    }

    fn slot(&mut self) -> usize {
        self.kernel.registers += 1;
        self.kernel.registers - 1
    }

    fn constant(&mut self, value: u64) -> usize {
        if let Some(slot) = self.constants.get(&value) {
            return *slot;
        }
        let slot = self.slot();
        self.constants.insert(value, slot);
        slot
    }

    fn register(&self, name: &str) -> Option<usize> {
        self.scopes.iter().rev().find_map(|s| s.get(name)).copied()
    }

    /// Where an operand stands: a register, a number, a special register or a variable's address.
    fn operand(&mut self, text: &str) -> Result<usize> {
        let text = text.trim();
        if let Some(slot) = self.register(text) {
            return Ok(slot);
        }
        if let Some(value) = literal(text) {
            return Ok(self.constant(value));
        }
        let axis = |name: &str| ["x", "y", "z"].iter().position(|a| *a == name);
        let special = match text.split_once('.') {
            Some(("%tid", a)) => axis(a).map(Special::Thread),
            Some(("%ntid", a)) => axis(a).map(Special::Threads),
            Some(("%ctaid", a)) => axis(a).map(Special::Block),
            Some(("%nctaid", a)) => axis(a).map(Special::Blocks),
            _ => match text {
                "%laneid" => Some(Special::Lane),
                _ => None,
            },
        };
        if let Some(special) = special {
            if let Some(slot) = self.specials.get(&special) {
                return Ok(*slot);
            }
            let slot = self.slot();
            self.specials.insert(special, slot);
            return Ok(slot);
        }
        match text {
            "WARP_SZ" => return Ok(self.constant(32)),
            "_" => return Ok(self.slot()),
            _ => {}
        }
        if self.behind.contains(text) {
            let slot = self.behind_at.unwrap_or_else(|| self.slot());
            self.behind_at = Some(slot);
            return Ok(slot);
        }
        let address = self
            .shared
            .get(text)
            .or(self.local.get(text))
            .map(|a| *a as u64);
        let address = address.or_else(|| self.globals.get(text).copied());
        let address = address.or_else(|| self.parameters.get(text).map(|a| *a as u64));
        match address {
            Some(address) => Ok(self.constant(address)),
            None => Err(format!("unknown operand {text}")),
        }
    }

    /// `[%rd1+8]`, `[name]`, `[name+4]`.
    fn address(&mut self, space: Space, text: &str) -> Result<Address> {
        let inner = text.trim().trim_start_matches('[').trim_end_matches(']');
        let (base, offset) = match inner.rsplit_once('+') {
            Some((base, offset)) => (
                base,
                literal(offset.trim()).ok_or_else(|| format!("no offset: {text}"))? as i64,
            ),
            None => (inner, 0),
        };
        Ok(Address {
            space,
            base: self.operand(base)?,
            offset,
        })
    }

    fn push(&mut self, action: Action) {
        self.kernel.code.push(Instruction {
            guard: self.guard,
            action,
            line: self.line,
        });
    }

    fn compute(&mut self, opcode: &str, into: usize, from: &[usize]) -> Result<()> {
        let f = alu(opcode).ok_or_else(|| format!("unknown instruction {opcode}"))?;
        let any = from.first().copied().unwrap_or(into);
        let at = |i: usize| from.get(i).copied().unwrap_or(any);
        self.push(Action::Alu {
            f,
            into,
            from: [at(0), at(1), at(2)],
        });
        Ok(())
    }

    fn statement(&mut self, text: &str) -> Result<()> {
        if let Some(directive) = text.strip_prefix('.') {
            return self.directive(directive);
        }
        let (guard, text) = match text.strip_prefix('@') {
            None => (None, text),
            Some(rest) => {
                let (name, rest) = rest.split_once(char::is_whitespace).ok_or("no guard")?;
                let (wanted, name) = match name.strip_prefix('!') {
                    Some(name) => (false, name),
                    None => (true, name),
                };
                let slot = self.register(name).ok_or("unknown guard")?;
                (Some((slot, wanted)), rest.trim())
            }
        };
        self.guard = guard;
        let done = self.instruction(text);
        self.guard = None;
        done
    }

    fn directive(&mut self, text: &str) -> Result<()> {
        let words: Vec<&str> = text.split_whitespace().collect();
        match words.first().copied().unwrap_or_default() {
            "reg" => {
                let names = words.get(2..).unwrap_or_default().join(" ");
                for name in names.split(',').map(str::trim) {
                    // `%r<10>` is %r0 to %r9.
                    match name.split_once('<') {
                        Some((stem, count)) => {
                            let count: usize = count
                                .trim_end_matches('>')
                                .parse()
                                .map_err(|_| format!("no count: {name}"))?;
                            for i in 0..count {
                                let slot = self.slot();
                                self.scope().insert(format!("{stem}{i}"), slot);
                            }
                        }
                        None => {
                            let slot = self.slot();
                            self.scope().insert(name.to_string(), slot);
                        }
                    }
                }
            }
            kind @ ("shared" | "local") => {
                let (name, count) = array(words.last().copied().unwrap_or_default())?;
                let size = words
                    .iter()
                    .find_map(|w| size_of(w.strip_prefix('.')?).ok())
                    .ok_or_else(|| format!("no type in .{text}"))?;
                let bytes = size * count.unwrap_or(1);
                let (all, names) = match kind {
                    "shared" => (&mut self.kernel.shared, &mut self.shared),
                    _ => (&mut self.kernel.local, &mut self.local),
                };
                let at = all.next_multiple_of(16);
                *all = at + bytes;
                names.insert(name.to_string(), at);
            }
            // Arguments of a call; the only functions called end the kernel.
            "param" | "pragma" | "loc" | "file" => {}
            other => return Err(format!("unknown directive .{other}")),
        }
        Ok(())
    }

    fn scope(&mut self) -> &mut HashMap<String, usize> {
        let last = self.scopes.len() - 1;
        &mut self.scopes[last]
    }

    fn instruction(&mut self, text: &str) -> Result<()> {
        let (opcode, rest) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
        let operands = split(rest);
        let operand = |i: usize| -> Result<&str> {
            let one = operands.get(i).map(String::as_str);
            one.ok_or_else(|| format!("{opcode} wants more operands"))
        };
        let parts: Vec<&str> = opcode.split('.').collect();
        match parts.as_slice() {
            ["bra", ..] => {
                self.pending
                    .push((self.kernel.code.len(), operand(0)?.to_string()));
                self.push(Action::Exit);
            }
            ["ret" | "exit", ..] => self.push(Action::Exit),
            ["trap" | "call", ..] => self.push(Action::Stop),
            ["bar" | "barrier", how, ..] => match *how {
                "warp" => {}
                _ => {
                    self.kernel.waits = true;
                    self.push(Action::Barrier);
                }
            },
            // Threads run one after another between barriers.
            ["membar" | "fence" | "prefetch" | "prefetchu", ..] => {}
            ["st", "param", ..] => {}
            ["ld", kind @ ..] => self.moved(kind, operand(0)?, operand(1)?, true)?,
            ["st", kind @ ..] => self.moved(kind, operand(1)?, operand(0)?, false)?,
            ["atom" | "red", kind @ ..] => self.atomic(parts[0] == "red", kind, &operands)?,
            ["shfl", "sync", how, "b32"] => {
                let kind = match *how {
                    "up" => Shuffle::Up,
                    "down" => Shuffle::Down,
                    "bfly" => Shuffle::Butterfly,
                    _ => Shuffle::Index,
                };
                let (into, valid) = match operand(0)?.split_once('|') {
                    Some((into, valid)) => (into, Some(self.operand(valid)?)),
                    None => (operand(0)?, None),
                };
                let into = self.operand(into)?;
                let mut from = [0; 4];
                for (i, slot) in from.iter_mut().enumerate() {
                    *slot = self.operand(operand(i + 1)?)?;
                }
                self.push(Action::Shuffle {
                    kind,
                    into,
                    valid,
                    from,
                });
            }
            [
                "ldmatrix",
                "sync",
                "aligned",
                "x4",
                turned @ ..,
                "m8n8",
                "shared",
                "b16",
            ] if matches!(turned, [] | ["trans"]) => {
                let into = self.parts(operand(0)?)?;
                let at = self.address(Space::Shared, operand(1)?)?;
                self.push(Action::Matrices {
                    into,
                    at,
                    turned: !turned.is_empty(),
                });
            }
            [
                "mma",
                "sync",
                "aligned",
                "m16n8k16",
                "row",
                "col",
                "f32",
                "bf16",
                "bf16",
                "f32",
            ] => {
                let d = self.parts(operand(0)?)?;
                let a = self.parts(operand(1)?)?;
                let b = self.parts(operand(2)?)?;
                let c = self.parts(operand(3)?)?;
                self.push(Action::Product { d, a, b, c });
            }
            ["cp", "async", "commit_group"] => self.push(Action::Commit),
            ["cp", "async", "wait_group"] => {
                let but = operand(0)?.parse();
                let but = but.map_err(|_| format!("{opcode} wants a number"))?;
                self.push(Action::Await { but });
            }
            // The rest of the name says what a cache may read ahead.
            ["cp", "async", "ca" | "cg", "shared", "global", ..] if operands.len() == 3 => {
                let bytes = operand(2)?.parse();
                let bytes = bytes.map_err(|_| format!("{opcode} wants a number of bytes"))?;
                let to = self.address(Space::Shared, operand(0)?)?;
                let from = self.address(Space::Global, operand(1)?)?;
                self.push(Action::Copy { to, from, bytes });
            }
            ["cvta", rest @ ..] => {
                // Global addresses are generic ones.
                let window = match *rest {
                    ["shared", _] | ["to", "shared", _] => SHARED,
                    ["local", _] | ["to", "local", _] => LOCAL,
                    _ => 0,
                };
                let (into, from) = (self.operand(operand(0)?)?, self.operand(operand(1)?)?);
                let by = self.constant(window);
                let how = if rest[0] == "to" {
                    "sub.u64"
                } else {
                    "add.u64"
                };
                self.compute(how, into, &[from, by])?;
            }
            ["mov", kind] if rest.contains('{') => {
                let bits = 8 * size_of(kind)?;
                self.packed(bits, operand(0)?, operand(1)?)?;
            }
            ["bfi", kind] => {
                let slots = self.all(&operands)?;
                self.bit_field(kind, &slots)?;
            }
            [
                base @ ("add" | "addc" | "sub" | "subc" | "mad" | "madc"),
                mods @ ..,
                kind,
            ] if mods.contains(&"cc") || base.ends_with('c') => {
                let slots = self.all(&operands)?;
                self.with_carry(base, mods, kind, &slots)?;
            }
            ["setp", compared, joined @ ("and" | "or" | "xor"), kind @ ..] => {
                let slots = self.all(&operands)?;
                let found = self.slot();
                let opcode = format!("setp.{compared}.{}", kind.join("."));
                self.compute(&opcode, found, &slots[1..3])?;
                self.compute(&format!("{joined}.pred"), slots[0], &[found, slots[3]])?;
            }
            _ => {
                let slots = self.all(&operands)?;
                let (into, from) = slots.split_first().ok_or("no operands")?;
                self.compute(opcode, *into, from)?;
            }
        }
        Ok(())
    }

    fn all(&mut self, operands: &[String]) -> Result<Vec<usize>> {
        operands.iter().map(|o| self.operand(o)).collect()
    }

    /// `{%a, %b}`: as many registers as are wanted.
    fn parts<const N: usize>(&mut self, text: &str) -> Result<[usize; N]> {
        let inner = text.trim().trim_start_matches('{').trim_end_matches('}');
        let slots = inner.split(',').map(|name| self.operand(name));
        let slots = slots.collect::<Result<Vec<_>>>()?;
        let count = slots.len();
        let slots = slots.try_into();
        slots.map_err(|_| format!("expected {N} registers, got {count}"))
    }

    /// A load or store, its parts after the first.
    fn moved(&mut self, kind: &[&str], value: &str, at: &str, load: bool) -> Result<()> {
        let (value, space) = self.value(kind, value)?;
        let at = self.address(space, at)?;
        self.push(match load {
            true => Action::Load { value, at },
            false => Action::Store { value, at },
        });
        Ok(())
    }

    fn value(&mut self, kind: &[&str], value: &str) -> Result<(Value, Space)> {
        let kind_of = kind.last().copied().unwrap_or_default();
        let space = kind.iter().find_map(|k| match *k {
            "param" => Some(Space::Param),
            "global" | "const" => Some(Space::Global),
            "shared" => Some(Space::Shared),
            "local" => Some(Space::Local),
            _ => None,
        });
        let names = value.trim().trim_start_matches('{').trim_end_matches('}');
        let mut slots = [0; 4];
        let mut count = 0;
        for name in names.split(',') {
            *slots.get_mut(count).ok_or("more than four numbers")? = self.operand(name)?;
            count += 1;
        }
        let value = Value {
            size: size_of(kind_of)?,
            signed: kind_of.starts_with('s'),
            count,
            slots,
        };
        Ok((value, space.unwrap_or(Space::Generic)))
    }

    /// `atom{.space}.op.type d, [a], b`; `red` has no d.
    fn atomic(&mut self, silent: bool, kind: &[&str], operands: &[String]) -> Result<()> {
        let mut operands: Vec<&str> = operands.iter().map(String::as_str).collect();
        if silent {
            operands.insert(0, "_");
        }
        let [into, at, with] = operands.as_slice() else {
            return Err("an atomic operation wants an address and an operand".into());
        };
        let known = |k: &&&str| matches!(**k, "add" | "min" | "max" | "and" | "or" | "xor");
        let op = kind.iter().find(known);
        let op = op.ok_or_else(|| format!("unknown atomic {}", kind.join(".")))?;
        let name = format!("{op}.{}", kind.last().copied().unwrap_or_default());
        let (value, space) = self.value(kind, into)?;
        let at = self.address(space, at)?;
        let with = self.operand(with)?;
        let f = alu(&name).ok_or_else(|| format!("unknown atomic {name}"))?;
        self.push(Action::Atomic { f, value, at, with });
        Ok(())
    }

    /// `mov.b32 %r, {%a, %b}` and `mov.b32 {%a, %b}, %r`.
    fn packed(&mut self, bits: usize, into: &str, from: &str) -> Result<()> {
        let parts = |text: &str| -> Vec<String> {
            let inner = text.trim().trim_start_matches('{').trim_end_matches('}');
            inner.split(',').map(|p| p.trim().to_string()).collect()
        };
        if into.contains('{') {
            let parts = self.all(&parts(into))?;
            let width = bits / parts.len();
            let whole = self.operand(from)?;
            // A part may be the whole's own register.
            let kept = self.slot();
            self.compute("mov.b64", kept, &[whole])?;
            for (i, part) in parts.into_iter().enumerate() {
                let by = self.constant((i * width) as u64);
                self.compute("shr.u64", part, &[kept, by])?;
                self.compute(&format!("mov.b{width}"), part, &[part])?;
            }
        } else {
            let parts = self.all(&parts(from))?;
            let width = bits / parts.len();
            let into = self.operand(into)?;
            let (whole, moved) = (self.slot(), self.slot());
            self.compute("mov.b64", whole, &[parts[0]])?;
            for (i, part) in parts.iter().enumerate().skip(1) {
                let by = self.constant((i * width) as u64);
                self.compute("shl.b64", moved, &[*part, by])?;
                self.compute("or.b64", whole, &[whole, moved])?;
            }
            self.compute("mov.b64", into, &[whole])?;
        }
        Ok(())
    }

    /// `bfi.b32 f, a, b, c, d`: d bits of a at position c of b.
    fn bit_field(&mut self, kind: &str, slots: &[usize]) -> Result<()> {
        let [into, a, b, at, count] = *slots else {
            return Err("bfi wants five operands".into());
        };
        let (ones, part, rest) = (self.slot(), self.slot(), self.slot());
        let one = self.constant(1);
        self.compute("shl.b64", ones, &[one, count])?;
        self.compute("sub.u64", ones, &[ones, one])?;
        self.compute("and.b64", part, &[a, ones])?;
        self.compute("shl.b64", part, &[part, at])?;
        self.compute("shl.b64", ones, &[ones, at])?;
        self.compute("not.b64", ones, &[ones])?;
        self.compute("and.b64", rest, &[b, ones])?;
        self.compute("or.b64", rest, &[rest, part])?;
        self.compute(&format!("mov.{kind}"), into, &[rest])
    }

    /// Additions and subtractions that leave a carry or take one.
    fn with_carry(&mut self, base: &str, mods: &[&str], kind: &str, slots: &[usize]) -> Result<()> {
        let carry = match self.carry {
            Some(slot) => slot,
            None => self.slot(),
        };
        self.carry = Some(carry);
        let (into, mut from) = (slots[0], slots[1..].to_vec());
        if base.starts_with("mad") {
            let part = mods.iter().find(|m| matches!(**m, "lo" | "hi"));
            let product = self.slot();
            self.compute(
                &format!("mul.{}.{kind}", part.unwrap_or(&"lo")),
                product,
                &from[..2],
            )?;
            from = vec![product, from[2]];
        }
        let adds = if base.starts_with("sub") {
            "subc"
        } else {
            "addc"
        };
        let before = match base.ends_with('c') {
            true => carry,
            false => self.constant(0),
        };
        from.push(before);
        let (sum, left) = (self.slot(), self.slot());
        self.compute(&format!("{adds}.{kind}"), sum, &from)?;
        if mods.contains(&"cc") {
            self.compute(&format!("{adds}.carry.{kind}"), left, &from)?;
            self.compute("mov.b64", carry, &[left])?;
        }
        self.compute("mov.b64", into, &[sum])
    }
}

/// Operands, apart; what stands in brackets or braces stays together.
fn split(text: &str) -> Vec<String> {
    let mut all = Vec::new();
    let mut one = String::new();
    let mut depth = 0;
    for c in text.chars() {
        depth += i32::from("[{(".contains(c)) - i32::from("]})".contains(c));
        if c == ',' && depth == 0 {
            all.push(std::mem::take(&mut one).trim().to_string());
        } else {
            one.push(c);
        }
    }
    if !one.trim().is_empty() {
        all.push(one.trim().to_string());
    }
    all
}
