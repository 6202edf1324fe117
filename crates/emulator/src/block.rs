//! Decoded code: straight runs of instructions, kept until the page they came from is written.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use guest_memory::{GuestMemory, Offset};

use crate::insn::Insn;
use crate::mmu::NO_PAGE;
use crate::mode::Mode;

/// Instructions kept, at most; then all are forgotten.
const MOST_INSNS: usize = 1024 * 1024;
/// Entries of the table from RIP to block.
const RECENT: usize = 1 << 16;
/// No block.
pub const NO_BLOCK: u32 = u32::MAX;

/// No region.
pub const NO_REGION: u32 = u32::MAX;

/// A run of instructions that is entered at its first.
#[derive(Clone, Copy, Debug)]
pub struct Block {
    /// RIP of the first instruction.
    pub rip: u64,
    /// RIP behind the last one.
    pub end: u64,
    /// Its first instruction among [`Blocks::insns`].
    pub first: u32,
    /// How many there are.
    pub count: u32,
    /// The page it was decoded from, and the second where the only instruction crosses into it.
    pub pages: [Offset; 2],
    /// The pages' generations when it was decoded.
    generations: [u32; 2],
    /// Its bytes among [`Blocks::bytes`].
    bytes: u32,
    /// How many.
    len: u32,
    /// Where the bytes lie.
    pub offset: Offset,
    /// How often it was run without a translation.
    pub heat: u32,
    /// Where its translation starts; 0 while there is none.
    pub code: u64,
    /// The region that its translation is part of; [`NO_REGION`] while there is none.
    pub region: u32,
}

/// What finds a block: the same bytes mean something else at another address or in another mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// Where the bytes lie.
    pub offset: Offset,
    /// RIP of the first instruction.
    pub rip: u64,
    /// The mode they were decoded in.
    pub mode: Mode,
}

/// Which address space, mode and state of the translation cache a recent entry belongs to.
pub type Regime = u64;

#[derive(Clone, Copy)]
struct Recent {
    rip: u64,
    regime: Regime,
    block: u32,
}

const NOTHING: Recent = Recent { rip: 0, regime: u64::MAX, block: NO_BLOCK };

/// All decoded code of one vCPU.
pub struct Blocks {
    blocks: Vec<Block>,
    insns: Vec<Insn>,
    bytes: Vec<u8>,
    map: Map<Key, u32>,
    recent: Box<[Recent; RECENT]>,
    /// How often everything was forgotten.
    pub(crate) epoch: u64,
}

/// A map by addresses and small numbers.
pub type Map<K, V> = HashMap<K, V, BuildHasherDefault<Mix>>;

/// Multiplies and folds: the keys are addresses, not adversaries' strings, and the map is bounded.
#[derive(Default)]
pub struct Mix(u64);

impl Hasher for Mix {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|&b| self.write_u64(u64::from(b)));
    }
    fn write_u8(&mut self, value: u8) {
        self.write_u64(u64::from(value));
    }
    fn write_usize(&mut self, value: usize) {
        self.write_u64(value as u64);
    }
    fn write_u32(&mut self, value: u32) {
        self.write_u64(u64::from(value));
    }
    fn write_u64(&mut self, value: u64) {
        let mixed = (self.0 ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = mixed ^ mixed >> 29;
    }
}

/// What a new block is made of.
pub struct NewBlock<'a> {
    /// RIP of the first instruction.
    pub rip: u64,
    /// The mode it was decoded in.
    pub mode: Mode,
    /// Where its bytes lie.
    pub offset: Offset,
    /// The pages it comes from.
    pub pages: [Offset; 2],
    /// Their generations, read before the bytes were.
    pub generations: [u32; 2],
    /// Its bytes.
    pub bytes: &'a [u8],
    /// Its instructions.
    pub insns: &'a [Insn],
}

impl Blocks {
    /// None yet.
    pub fn new() -> Self {
        Self {
            blocks: Vec::new(),
            insns: Vec::new(),
            bytes: Vec::new(),
            map: Map::default(),
            recent: vec![NOTHING; RECENT].into_boxed_slice().try_into().unwrap_or_else(|_| unreachable!()),
            epoch: 0,
        }
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.epoch += 1;
        self.blocks.clear();
        self.insns.clear();
        self.bytes.clear();
        self.map.clear();
        self.recent.fill(NOTHING);
    }

    /// Whether it is time to forget everything.
    pub fn is_full(&self) -> bool {
        self.insns.len() >= MOST_INSNS
    }

    /// A block by its number.
    #[inline(always)]
    pub fn get(&self, block: u32) -> &Block {
        &self.blocks[block as usize]
    }

    /// A block's instructions.
    #[inline(always)]
    pub fn insns(&self, block: &Block) -> &[Insn] {
        &self.insns[block.first as usize..][..block.count as usize]
    }

    fn slot(rip: u64) -> usize {
        (rip ^ rip >> 12) as usize % RECENT
    }

    /// The block that was run last from an address in a regime.
    #[inline(always)]
    pub fn recent(&self, rip: u64, regime: Regime) -> Option<u32> {
        let entry = &self.recent[Self::slot(rip) ^ Self::salt(regime)];
        (entry.rip == rip && entry.regime == regime).then_some(entry.block)
    }

    /// Remembers it.
    pub fn remember(&mut self, rip: u64, regime: Regime, block: u32) {
        self.recent[Self::slot(rip) ^ Self::salt(regime)] = Recent { rip, regime, block };
    }

    /// Address spaces have entries of their own for the code that they share, the kernel's: what the number of an entry is
    /// XORed with.
    #[inline(always)]
    fn salt(regime: Regime) -> usize {
        ((regime >> 16).wrapping_mul(0x9e37_79b9) >> 12) as usize % RECENT
    }

    /// A block by its number, for changing what is known of it.
    pub fn get_mut(&mut self, block: u32) -> &mut Block {
        &mut self.blocks[block as usize]
    }

    /// A block's bytes.
    pub fn bytes(&self, block: &Block) -> &[u8] {
        &self.bytes[block.bytes as usize..][..block.len as usize]
    }

    /// All instructions, by the numbers that blocks count from.
    pub fn insn(&self, number: u32) -> &Insn {
        &self.insns[number as usize]
    }

    /// The block that was decoded from an offset for an address and a mode.
    pub fn find(&self, offset: Offset, rip: u64, mode: Mode) -> Option<u32> {
        self.map.get(&Key { offset, rip, mode }).copied()
    }

    /// Adds a block, or replaces the one of the same place.
    pub fn insert(&mut self, new: &NewBlock) -> u32 {
        let block = Block {
            rip: new.rip,
            end: new.rip.wrapping_add(new.bytes.len() as u64),
            first: self.insns.len() as u32,
            count: new.insns.len() as u32,
            pages: new.pages,
            generations: new.generations,
            bytes: self.bytes.len() as u32,
            len: new.bytes.len() as u32,
            offset: new.offset,
            heat: 0,
            code: 0,
            region: NO_REGION,
        };
        self.insns.extend_from_slice(new.insns);
        self.bytes.extend_from_slice(new.bytes);
        let key = Key { offset: new.offset, rip: new.rip, mode: new.mode };
        if let Some(&number) = self.map.get(&key) {
            self.blocks[number as usize] = block;
            return number;
        }
        let number = self.blocks.len() as u32;
        self.blocks.push(block);
        self.map.insert(key, number);
        number
    }

    /// Whether nobody wrote to the block's pages since it was decoded.
    #[inline(always)]
    pub fn is_fresh(&self, block: &Block, memory: &GuestMemory) -> bool {
        memory.marks().generation(block.pages[0]) == block.generations[0]
            && (block.pages[1] == NO_PAGE
                || memory.marks().generation(block.pages[1]) == block.generations[1])
    }

    /// After a write to its pages: whether the block's bytes are still the same. Then it is fresh again.
    /// `generations` are the pages' present ones, which the caller got by marking the pages.
    pub fn refresh(&mut self, number: u32, memory: &GuestMemory, generations: [u32; 2]) -> bool {
        let block = &mut self.blocks[number as usize];
        if block.pages[1] != NO_PAGE {
            return false;
        }
        let old = &self.bytes[block.bytes as usize..][..block.len as usize];
        let mut now = [0; 1024];
        let Some(now) = now.get_mut(..old.len()) else { return false };
        memory.read_bytes(block.offset, now);
        if now != old {
            return false;
        }
        block.generations = generations;
        true
    }

    /// Blocks and instructions kept.
    pub fn counts(&self) -> (usize, usize) {
        (self.blocks.len(), self.insns.len())
    }
}

impl Default for Blocks {
    fn default() -> Self {
        Self::new()
    }
}
