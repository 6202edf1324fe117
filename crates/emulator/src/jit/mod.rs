//! The translator: hot blocks of 64-bit code as host code.
//!
//! [`translate`] turns a block into host code, [`frame`] is what surrounds it, and [`Jit`] keeps the code memory and
//! the links between translations. The interpreter decides what is hot, enters, and handles whatever comes back.
#![allow(unsafe_code)] // The entry into generated code, and what that calls.

mod assembler;
mod frame;
mod native_set;
mod run;
mod translate;

use std::collections::HashMap;
use std::hash::BuildHasherDefault;

use crate::block::{Block, Key, Mix};
use crate::cpuid::CpuModel;
use crate::mode::Mode;
use crate::native::code_memory::CodeMemory;
pub use frame::{Context, STEP_DISPATCH, exit};
use frame::{Stubs, stubs};
use translate::translate;

/// How eager the translator is, and how much it keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Bytes of translated code that a vCPU keeps; when they are full, all of it is forgotten.
    pub code_bytes: usize,
    /// Runs of a block before it is translated.
    pub hot: u32,
    /// Whether translated code comes back as soon as [`Context::attention`], a number of bytes then, says so.
    pub leave_early: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self { code_bytes: 32 << 20, hot: 16, leave_early: false }
    }
}

/// A vCPU's translations.
pub struct Jit {
    memory: CodeMemory,
    hot: u32,
    leave_early: bool,
    /// Translations stop where the instructions that they may run are used up.
    counts_down: bool,
    stubs: Stubs,
    /// Exits that go to a block in the same page, by the block: jumps stand there, or will.
    links: HashMap<Key, Vec<usize>, BuildHasherDefault<Mix>>,
    statistics: Statistics,
}

/// What the translator did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Blocks translated.
    pub blocks: u64,
    /// Bytes of guest code in them.
    pub guest_bytes: u64,
    /// Bytes of host code made of them.
    pub host_bytes: u64,
    /// How often all code was forgotten because its memory was full.
    pub evictions: u64,
    /// Calls of handlers from translated code.
    pub handler_calls: u64,
}

/// What is translated.
pub struct Source<'a> {
    /// The block's number, for its handlers.
    pub number: u32,
    /// The block.
    pub block: &'a Block,
    /// The mode that it was decoded in.
    pub mode: Mode,
    /// Its bytes.
    pub bytes: &'a [u8],
    /// The page's state, read no later than the page was last found unchanged since the bytes were.
    pub state: u32,
    /// Where that state is.
    pub state_address: u64,
    /// What instructions there are.
    pub model: &'a CpuModel,
}

/// A new translation.
pub struct Added {
    /// Where its code starts.
    pub code: u64,
    /// Where in code memory the page's expected state stands.
    pub state_at: u32,
    /// The blocks in the same page that it leaves to: [`Jit::connect`] those that are translated.
    pub exits: Vec<Key>,
}

/// The type of the code that enters translated code.
type Enter = unsafe extern "sysv64" fn(*mut Context, u64) -> u32;

impl Jit {
    /// Maps the code memory.
    ///
    /// # Errors
    /// The host refuses it.
    pub fn new(settings: Settings) -> std::io::Result<Self> {
        let mut jit = Self {
            memory: CodeMemory::new(settings.code_bytes)?,
            hot: settings.hot,
            leave_early: settings.leave_early,
            counts_down: false,
            stubs: Stubs::default(),
            links: HashMap::default(),
            statistics: Statistics::default(),
        };
        jit.place_stubs();
        Ok(jit)
    }

    fn place_stubs(&mut self) {
        let (stubs, code) = stubs(self.memory.next(), self.leave_early);
        self.memory.push(&code);
        self.stubs = stubs;
    }

    /// Forgets all translations.
    pub fn clear(&mut self) {
        self.memory.clear();
        self.links.clear();
        self.place_stubs();
    }

    /// What was done so far.
    pub fn statistics(&self) -> Statistics {
        self.statistics
    }

    /// From now on translations stop where the instructions that they may run are used up. Gives whether this is new:
    /// then the caller forgets those that do not.
    pub fn count_down(&mut self) -> bool {
        !std::mem::replace(&mut self.counts_down, true)
    }

    /// Runs of a block before it is translated.
    pub fn hot(&self) -> u32 {
        self.hot
    }

    /// What [`Context::attention`] has to be for code that comes back at the end of the first block after which so many
    /// instructions have been executed (1 or 256); `None` where it is the attention word's address.
    pub fn leaves_after(&self, instructions: u64) -> Option<u64> {
        self.leave_early.then_some(u64::from(instructions > 1))
    }

    /// Notes a call of a handler.
    pub fn count_handler_call(&mut self) {
        self.statistics.handler_calls += 1;
    }

    /// Translates a block. `None` where code memory is full: then the caller forgets all blocks and calls [`Jit::clear`].
    pub fn add(&mut self, source: &Source<'_>) -> Option<Added> {
        let mut translation = translate(source, self.stubs, self.counts_down);
        let base = self.memory.next();
        for &(at, to) in &translation.outward {
            let disp = to as i64 - (base + at + 4) as i64;
            translation.bytes[at..at + 4].copy_from_slice(&(disp as i32).to_le_bytes());
        }
        let Some(offset) = self.memory.push(&translation.bytes) else {
            self.statistics.evictions += 1;
            return None;
        };
        self.statistics.blocks += 1;
        self.statistics.guest_bytes += source.bytes.len() as u64;
        self.statistics.host_bytes += translation.bytes.len() as u64;
        let exits = self.link(base, source.block, source.mode, &translation.exits);
        let code = self.memory.address(offset) as u64;
        Some(Added { code, state_at: (base + translation.state_at) as u32, exits })
    }

    /// Notes where a new translation leaves to, and lets all that leave to it jump here.
    fn link(&mut self, base: usize, block: &Block, mode: Mode, exits: &[(u64, usize)]) -> Vec<Key> {
        let mut keys = Vec::new();
        for &(rip, at) in exits.iter().filter(|(rip, _)| (rip ^ block.rip) >> 12 == 0) {
            let key = Key { offset: block.offset & !0xfff | rip & 0xfff, rip, mode };
            self.links.entry(key).or_default().push(base + at);
            keys.push(key);
        }
        let key = Key { offset: block.offset, rip: block.rip, mode };
        for &at in self.links.get(&key).into_iter().flatten() {
            jump(&mut self.memory, at, base);
        }
        keys
    }

    /// Makes a new translation's exits jump to one that is there already.
    pub fn connect(&mut self, key: Key, code: u64) {
        let target = code.wrapping_sub(self.memory.address(0) as u64) as usize;
        for &at in self.links.get(&key).into_iter().flatten() {
            jump(&mut self.memory, at, target);
        }
    }

    /// The page's state changed, and the block's bytes did not: its translation expects the new state.
    pub fn expect(&mut self, state_at: u32, state: u32) {
        self.memory.patch(state_at as usize, &state.to_le_bytes());
    }

    /// Runs translated code.
    ///
    /// # Safety
    /// `code` is an address that [`Jit::add`] gave since the last [`Jit::clear`]; what the context points to is good
    /// and of nobody else's while the code runs; `step` is a function of the type that it says.
    pub unsafe fn enter(&self, context: *mut Context, code: u64) -> u32 {
        // SAFETY: the stub of this type starts there.
        let enter =
            unsafe { std::mem::transmute::<*const u8, Enter>(self.memory.address(self.stubs.enter as u32)) };
        // SAFETY: the caller's promise.
        unsafe { enter(context, code) }
    }
}

/// Writes a jump over the start of an exit.
fn jump(memory: &mut CodeMemory, at: usize, target: usize) {
    let disp = (target as i64 - (at as i64 + 5)) as i32;
    let mut bytes = [0xe9, 0, 0, 0, 0];
    bytes[1..].copy_from_slice(&disp.to_le_bytes());
    memory.patch(at, &bytes);
}

#[cfg(test)]
mod tests;
