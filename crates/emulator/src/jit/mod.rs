//! The translator: hot blocks of 64-bit code, and of 32-bit code in flat segments, as host code.
//!
//! [`translate`] turns a block into host code, [`frame`] is what surrounds it, and [`Jit`] keeps the code memory and
//! the links between translations. The interpreter decides what is hot, enters, and handles whatever comes back.
#![allow(unsafe_code)] // The entry into generated code, and what that calls.

mod assembler;
mod call;
mod flat;
mod frame;
mod links;
mod native_set;
mod owner;
mod recipe;
mod region;
mod run;
mod targets;
mod translate;
mod vectors;

use std::time::{Duration, Instant};

use engine::Counter;

use iced_x86::Instruction;

use crate::block::{Key, Regime};
use crate::cpuid::CpuModel;
use crate::mmu::NO_PAGE;
use crate::mode::Mode;
use crate::native::code_memory::CodeMemory;
use call::Calls;
pub use call::{Call, DYNAMIC};
pub use frame::{Context, STEP_DISPATCH, exit};
use frame::{Layout, Stubs, stubs};
use links::{FarLinks, Links};
use region::Region;
use targets::{FarExit, Name, Targets};
use translate::{Translation, translate};
pub use vectors::Use;
use vectors::X87Area;

/// How eager the translator is, and how much it keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Bytes of translated code that a vCPU keeps; when they are full, all of it is forgotten.
    pub code_bytes: usize,
    /// Runs of a block before it is translated.
    pub hot: u32,
    /// Whether translated code comes back as soon as [`Context::attention`], a number of bytes then, says so.
    pub leave_early: bool,
    /// Blocks that are translated together, at most.
    pub region: usize,
    /// Rounds of a block that leads to itself that are translated together, at most.
    pub rounds: usize,
}

impl Default for Settings {
    fn default() -> Self {
        Self { code_bytes: 64 << 20, hot: 16, leave_early: false, region: 32, rounds: 4 }
    }
}

/// A vCPU's translations.
pub struct Jit {
    memory: CodeMemory,
    hot: u32,
    leave_early: bool,
    region: usize,
    rounds: usize,
    /// Translations stop where the instructions that they may run are used up.
    counts_down: bool,
    stubs: Stubs,
    /// Exits that go to a block in the same page, by the block: jumps stand there, or will.
    links: Links<Key>,
    /// Exits that go to another page.
    far: FarLinks,
    /// The regions' blocks, one region's after another's: their numbers, and their first instructions'.
    parts: Vec<(u32, u32)>,
    /// The regions that were translated, by their numbers.
    regions: Vec<Translated>,
    /// Offsets in code memory of the states that regions expect of their pages.
    states: Vec<u32>,
    calls: Calls,
    targets: Targets,
    x87_area: Box<X87Area>,
    statistics: Statistics,
    /// Calls of handlers, by mnemonic.
    by_mnemonic: Vec<u64>,
}

/// What the translator did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Blocks translated.
    pub blocks: u64,
    /// Regions that they are part of.
    pub regions: u64,
    /// Bytes of guest code in them.
    pub guest_bytes: u64,
    /// Bytes of host code made of them.
    pub host_bytes: u64,
    /// How often all code was forgotten, because its memory was full or what is kept of instructions was.
    pub evictions: u64,
    /// Calls of handlers from translated code.
    pub handler_calls: u64,
    /// How often translated code was entered.
    pub entries: u64,
    /// How often it came back because the next block could not be found, or something was to be looked at.
    pub chain_breaks: u64,
    /// Time spent on translating.
    pub translation_time: Duration,
    /// The longest that forgetting all code took.
    pub longest_pause: Duration,
}

/// Mnemonics that [`Jit::counters`] names, those with the most calls.
const NAMED: usize = 15;

/// What a translation needs to know besides the instructions.
pub struct Source<'a> {
    /// The mode that the blocks were decoded in.
    pub mode: Mode,
    /// The states of their page, or of both that the only instruction lies in, read no later than the pages were last found
    /// unchanged since their bytes were; and where the states are.
    pub states: Vec<(u32, u64)>,
    /// What instructions there are.
    pub model: &'a CpuModel,
    /// How an instruction that only computes uses vector or x87 state; `None` where its handler has to be called.
    pub vector_use: &'a dyn Fn(&Instruction) -> Option<Use>,
    /// Whether a block's instructions are counted when it is entered, and it is left where more than may have run.
    pub counts_at_entry: bool,
    /// What is subtracted from the host's time-stamp counter to get the machine's, where nothing else has to be done.
    pub tsc_start: Option<u64>,
}

/// A region with its code.
#[derive(Clone, Debug)]
pub struct Translated {
    /// Its blocks among [`Jit::parts`].
    blocks: (u32, u32),
    /// Where in code memory the page's expected state stands: among [`Jit::states`].
    states: (u32, u32),
}

/// A new translation.
pub struct Added {
    /// The region's number.
    pub region: u32,
    /// Blocks that can be entered, by number, and where their code starts.
    pub entries: Vec<(u32, u64)>,
    /// The blocks in the same page that it leaves to: [`Jit::connect`] those that are translated.
    pub exits: Vec<Key>,
}

/// The type of the code that enters translated code.
type Enter = unsafe extern "sysv64" fn(*mut Context, u64) -> u32;

impl Jit {
    /// Maps the code memory, near the pages' states where there is room. `folded`: as [`crate::mmu::Tlb::is_folded`].
    ///
    /// # Errors
    /// The host refuses it.
    pub fn new(settings: Settings, states: u64, folded: bool) -> std::io::Result<Self> {
        let mut jit = Self {
            memory: CodeMemory::near(settings.code_bytes, states)?,
            hot: settings.hot,
            leave_early: settings.leave_early,
            region: settings.region,
            rounds: settings.rounds,
            counts_down: false,
            stubs: Stubs::default(),
            links: Links::default(),
            far: FarLinks::default(),
            parts: Vec::new(),
            regions: Vec::new(),
            states: Vec::new(),
            calls: Calls::default(),
            targets: Targets::default(),
            x87_area: Box::default(),
            statistics: Statistics::default(),
            by_mnemonic: Vec::new(),
        };
        jit.place_stubs(folded);
        Ok(jit)
    }

    fn place_stubs(&mut self, folded: bool) {
        let bmi2 = std::is_x86_feature_detected!("bmi2");
        let layout = Layout { folded, targets: self.targets.size(), bmi2 };
        let (stubs, code) = stubs(self.memory.next(), self.leave_early, layout);
        self.memory.push(&code);
        self.stubs = stubs;
    }

    /// Forgets all translations. From now on they find entries of the translation cache as [`crate::mmu::Tlb::is_folded`]
    /// says.
    pub fn clear(&mut self, folded: bool) {
        self.memory.clear();
        self.links.clear();
        self.far.clear();
        self.parts.clear();
        self.regions.clear();
        self.states.clear();
        self.calls.clear();
        self.targets.clear();
        self.place_stubs(folded);
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

    /// Notes a call of an instruction's handler.
    pub fn count_handler_call(&mut self, mnemonic: u16) {
        self.statistics.handler_calls += 1;
        let mnemonic = usize::from(mnemonic);
        if self.by_mnemonic.len() <= mnemonic {
            self.by_mnemonic.resize(mnemonic + 1, 0);
        }
        self.by_mnemonic[mnemonic] += 1;
    }

    /// Notes an entry into translated code, and whether it came back for want of a next block.
    pub fn count_entry(&mut self, is_break: bool) {
        self.statistics.entries += 1;
        self.statistics.chain_breaks += u64::from(is_break);
    }

    /// Notes that all code was forgotten, and how long it took.
    pub fn count_pause(&mut self, pause: Duration) {
        self.statistics.evictions += 1;
        self.statistics.longest_pause = self.statistics.longest_pause.max(pause);
    }

    /// What was done, by name.
    pub fn counters(&self) -> Vec<Counter> {
        let done = &self.statistics;
        let mut counters = vec![
            Counter::count("blocks translated", done.blocks),
            Counter::bytes("guest code translated", done.guest_bytes),
            Counter::bytes("host code made of it", done.host_bytes),
            Counter::bytes("code memory in use", self.memory.next() as u64),
            Counter::time("time spent on translating", done.translation_time),
            Counter::count("times that all code was forgotten", done.evictions),
            Counter::time("the longest of these", done.longest_pause),
            Counter::count("entries into translated code", done.entries),
            Counter::count("of these, left for want of a next block", done.chain_breaks),
            Counter::count("handlers called from translated code", done.handler_calls),
        ];
        let mut calls: Vec<(usize, u64)> = self.by_mnemonic.iter().copied().enumerate().collect();
        calls.retain(|&(_, count)| count != 0);
        calls.sort_by_key(|&(_, count)| std::cmp::Reverse(count));
        counters.extend(calls.iter().take(NAMED).map(|&(mnemonic, count)| {
            let name = iced_x86::Mnemonic::try_from(mnemonic).map(|mnemonic| format!("{mnemonic:?}"));
            Counter::count(format!("  {}", name.unwrap_or_default().to_lowercase()), count)
        }));
        counters
    }

    /// Blocks that are translated together, at most: one where the count of instructions is watched; and rounds of one that
    /// leads to itself.
    pub fn most_blocks(&self) -> (usize, usize) {
        (if self.counts_down { 1 } else { self.region }, self.rounds)
    }

    /// Whether a block's instructions are counted when it is entered.
    pub fn counts_at_entry(&self) -> bool {
        self.counts_down
    }

    /// Translates a region. `None` where code memory is full: then the caller forgets all blocks and calls [`Jit::clear`].
    pub fn add(&mut self, source: &Source<'_>, region: &Region) -> Option<Added> {
        let start = Instant::now();
        let base = self.memory.next();
        let address = self.memory.address(base as u32) as u64;
        let mut translation = translate(source, region, &mut self.calls, (self.stubs, address));
        for &(at, to) in &translation.outward {
            let disp = to as i64 - (base + at + 4) as i64;
            translation.bytes[at..at + 4].copy_from_slice(&(disp as i32).to_le_bytes());
        }
        let offset = self.memory.push(&translation.bytes)?;
        self.statistics.blocks += region.parts.len() as u64;
        self.statistics.regions += 1;
        self.statistics.guest_bytes += region.parts.iter().map(|p| p.block.end - p.block.rip).sum::<u64>();
        self.statistics.host_bytes += translation.bytes.len() as u64;
        let exits = self.link(base, source.mode, region, &translation);
        let code = self.memory.address(offset) as u64;
        self.statistics.translation_time += start.elapsed();
        let number = |part: usize| region.parts[part].number;
        let entries =
            translation.entries.iter().map(|&(part, at)| (number(part), code + at as u64)).collect();
        let first = self.parts.len() as u32;
        self.parts.extend(region.parts.iter().map(|part| (part.number, part.block.first)));
        let blocks = (first, self.parts.len() as u32);
        let first = self.states.len() as u32;
        self.states.extend(translation.states.iter().map(|&at| (base + at) as u32));
        self.regions.push(Translated { blocks, states: (first, self.states.len() as u32) });
        Some(Added { region: self.regions.len() as u32 - 1, entries, exits })
    }

    /// Notes where a new translation leaves to, and lets all that leave to it jump here.
    fn link(&mut self, base: usize, mode: Mode, region: &Region, translation: &Translation) -> Vec<Key> {
        let page = region.parts[0].block.offset & !0xfff;
        let mut keys = Vec::new();
        for &(rip, at) in &translation.exits {
            let key = Key { offset: page | rip & 0xfff, rip, mode };
            self.links.add(key, base + at);
            keys.push(key);
        }
        for &(part, entry) in &translation.entries {
            let block = &region.parts[part].block;
            if block.pages[1] != NO_PAGE {
                continue;
            }
            let key = Key { offset: block.offset, rip: block.rip, mode };
            for at in self.links.to(key) {
                jump(&mut self.memory, at, base + entry);
            }
        }
        for &(rip, exit) in &translation.far {
            let exit = FarExit(base + exit.0);
            let known = self.far.add(rip, exit.0).filter(|&(name, _)| self.targets.is_in_use(name));
            if let Some((name, code)) = known.or_else(|| self.targets.known(rip)) {
                let target = self.offset(code);
                exit.lead(&mut self.memory, name, target);
            }
        }
        keys
    }

    /// Makes exits to another page go to code that became known in the regime whose table has a name.
    fn lead(&mut self, rip: u64, name: Name, code: u64) {
        let target = self.offset(code);
        for at in self.far.lead(rip, (name, code), |name| self.targets.is_in_use(name)) {
            FarExit(at).lead(&mut self.memory, name, target);
        }
    }

    /// Where in code memory an address is.
    fn offset(&self, code: u64) -> usize {
        code.wrapping_sub(self.memory.address(0) as u64) as usize
    }

    /// Makes a new translation's exits jump to one that is there already.
    pub fn connect(&mut self, key: Key, code: u64) {
        let target = self.offset(code);
        for at in self.links.to(key) {
            jump(&mut self.memory, at, target);
        }
    }

    /// A region by its number.
    fn region(&self, number: u32) -> Option<&Translated> {
        self.regions.get(number as usize)
    }

    /// A region's blocks: their numbers, and their first instructions', which a block that took a number's place does not
    /// share.
    pub fn blocks_of(&self, region: u32) -> Option<&[(u32, u32)]> {
        let (first, end) = self.region(region)?.blocks;
        self.parts.get(first as usize..end as usize)
    }

    /// The page's state changed, and the region's bytes did not: its translation expects the new state.
    pub fn expect(&mut self, region: u32, state: u32) {
        let Some((first, end)) = self.region(region).map(|region| region.states) else { return };
        for &at in &self.states[first as usize..end as usize] {
            self.memory.patch(at as usize, &state.to_le_bytes());
        }
    }

    /// What a call in translated code calls, and how the flags are computed there where they are not in the frame.
    pub fn call(&self, number: u32) -> Call {
        self.calls.get(number)
    }

    /// The flags by the recipe of a number; `frame` are those in the frame.
    pub fn flags(&self, recipe: u32, registers: &[u64; 16], frame: u64) -> u64 {
        self.calls.flags(recipe, registers, frame)
    }

    /// A regime's table from RIP to code; and whether another regime's was given up for it.
    pub fn targets(&mut self, regime: Regime) -> (u64, bool) {
        self.targets.table(regime)
    }

    /// Whether [`Jit::grow_targets`] is due: so many RIPs took another's place in the tables from RIP to code.
    pub fn wants_growth(&self) -> bool {
        self.targets.want_growth()
    }

    /// Makes the tables from RIP to code larger where that is due. Gives whether it was: then the caller forgets all blocks
    /// and calls [`Jit::clear`].
    pub fn grow_targets(&mut self) -> bool {
        let due = self.wants_growth();
        if due {
            self.targets.grow();
        }
        due
    }

    /// Remembers where the code for a RIP is, in the regime whose table was asked for last.
    pub fn remember(&mut self, rip: u64, regime: Regime, code: u64) {
        if let Some(name) = self.targets.remember(rip, regime, code) {
            self.lead(rip, name, code);
        }
    }

    /// The same where that takes no other RIP's place.
    pub fn suggest(&mut self, rip: u64, regime: Regime, code: u64) {
        if let Some(name) = self.targets.suggest(rip, regime, code) {
            self.lead(rip, name, code);
        }
    }

    /// For [`Context::x87_area`].
    pub fn x87_area(&mut self) -> u64 {
        (&raw mut *self.x87_area) as u64
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
