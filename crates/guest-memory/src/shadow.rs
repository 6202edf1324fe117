//! Shadow RAM: RAM that lies at the same addresses as a ROM. A host bridge's registers say, for each part of the area,
//! which of the two answers.

use std::ops::Range;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use crate::{Location, Offset, PAGE_SIZE};

/// Where shadow RAM and its ROM are, guest-physical.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShadowArea {
    /// The RAM: one of the memory's regions.
    pub ram: Range<u64>,
    /// The ROM: one of the memory's regions. Its end shows at the RAM's end where the RAM does not.
    pub rom: Range<u64>,
    /// The most bytes of the ROM that show there.
    pub shown: u64,
}

/// Which accesses to a part of the area the RAM answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shadowing {
    /// Loads; else the ROM answers them, or nothing.
    pub read: bool,
    /// Stores; else they are discarded.
    pub write: bool,
}

const READ: u8 = 1;
const WRITE: u8 = 2;

/// The area with the state of each of its pages. After power-up nothing is shadowed.
#[derive(Debug)]
pub(crate) struct Shadow {
    area: ShadowArea,
    /// Offset of the RAM's first byte.
    ram: Offset,
    /// Offset of the ROM byte that shows at the area's end.
    rom_end: Offset,
    pages: Box<[AtomicU8]>,
    generation: AtomicU64,
}

impl Shadow {
    pub(crate) fn new(area: ShadowArea, ram: Offset, rom: Offset) -> Self {
        let pages = (0..(area.ram.end - area.ram.start) / PAGE_SIZE).map(|_| AtomicU8::new(0)).collect();
        let rom_end = rom + (area.rom.end - area.rom.start);
        Self { area, ram, rom_end, pages, generation: AtomicU64::new(0) }
    }

    pub(crate) fn area(&self) -> &Range<u64> {
        &self.area.ram
    }

    /// Changes the state of the pages of `range` that are in the area.
    pub(crate) fn set(&self, range: Range<u64>, shadowing: Shadowing) {
        let state = if shadowing.read { READ } else { 0 } | if shadowing.write { WRITE } else { 0 };
        for (page, start) in self.pages.iter().zip((self.area.ram.start..).step_by(PAGE_SIZE as usize)) {
            if range.contains(&start) {
                page.store(state, Ordering::SeqCst);
            }
        }
        self.generation.fetch_add(1, Ordering::SeqCst);
    }

    pub(crate) fn generation(&self) -> u64 {
        self.generation.load(Ordering::SeqCst)
    }

    /// What is at `within` bytes from the area's start.
    ///
    /// Pages whose stores alone the RAM answers are plain RAM: firmware uses them to copy its ROM onto itself, and the
    /// machine fills the RAM with the ROM's bytes beforehand.
    pub(crate) fn locate(&self, within: u64) -> Option<Location> {
        let state = self.pages.get((within / PAGE_SIZE) as usize)?.load(Ordering::Relaxed);
        if state != 0 {
            return Some(Location { offset: self.ram + within, read_only: state & WRITE == 0 });
        }
        let before_end = self.area.ram.end - self.area.ram.start - within;
        let shown = self.area.shown.min(self.area.rom.end - self.area.rom.start);
        (before_end <= shown).then(|| Location { offset: self.rom_end - before_end, read_only: true })
    }
}
