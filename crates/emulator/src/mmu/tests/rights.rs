//! All combinations of what decides whether an access is allowed, against the model: the outcome, the error code, the
//! accessed and dirty flags of every entry, and where the access goes.

use x86::{Cr0, Cr4, Efer, Vector};

use super::model::{Controls, Kind, Mode, Who};
use crate::cpu::Cpu;
use crate::insn::Stop;
use crate::mmu::{Access, Paging, Sizes, Target, View};
use crate::testing::{get, long, put};

/// Where all mappings lead.
const PHYSICAL: u64 = 0x30_5000;
/// What all of them map, in as many bits as the mode has.
const LINEAR: u64 = 0x7a5a_c030_5000;
/// The tables, the top one first.
const TABLES: u64 = 0x10_0000;

const P: u64 = 1;
const RW: u64 = 1 << 1;
const US: u64 = 1 << 2;
const A: u64 = 1 << 5;
const D: u64 = 1 << 6;
const PS: u64 = 1 << 7;
const XD: u64 = 1 << 63;

/// A way through the tables: the mode, and the level of the entry that maps the page.
#[derive(Clone, Copy, Debug)]
struct Way {
    mode: Mode,
    leaf: usize,
}

impl Way {
    fn levels(self) -> usize {
        match self.mode {
            Mode::ThirtyTwo { .. } | Mode::Pae => 2,
            Mode::Four => 4,
            Mode::Five => 5,
        }
    }

    fn entry_bytes(self) -> u64 {
        if matches!(self.mode, Mode::ThirtyTwo { .. }) { 4 } else { 8 }
    }

    fn index_bits(self) -> usize {
        if self.entry_bytes() == 4 { 10 } else { 9 }
    }

    fn linear(self) -> u64 {
        match self.mode {
            Mode::ThirtyTwo { .. } | Mode::Pae => LINEAR & 0xffff_ffff,
            Mode::Four => LINEAR,
            Mode::Five => LINEAR | 0xab << 48,
        }
    }

    /// Where the table of a level is.
    fn table(self, level: usize) -> u64 {
        TABLES + 0x1000 * (self.levels() - level) as u64
    }

    /// Where the entry of a level is.
    fn slot(self, level: usize) -> u64 {
        let index = self.linear() >> (12 + self.index_bits() * (level - 1)) & ((1 << self.index_bits()) - 1);
        self.table(level) + index * self.entry_bytes()
    }

    /// An entry that allows everything.
    fn open(self, level: usize) -> u64 {
        if level > self.leaf {
            return self.table(level - 1) | P | RW | US;
        }
        let size = 1u64 << (12 + self.index_bits() * (level - 1));
        PHYSICAL & !(size - 1) | P | RW | US | if level > 1 { PS } else { 0 }
    }

    fn write(self, cpu: &Cpu, level: usize, entry: u64) {
        if self.entry_bytes() == 4 {
            put(cpu, self.slot(level), entry as u32);
        } else {
            put(cpu, self.slot(level), entry);
        }
    }

    fn read(self, cpu: &Cpu, level: usize) -> u64 {
        if self.entry_bytes() == 4 {
            u64::from(get::<u32>(cpu, self.slot(level)))
        } else {
            get(cpu, self.slot(level))
        }
    }

    /// Bits to try out in an entry, one set of them at a time. `narrow`: physical addresses have 36 bits.
    fn reserved_bits(self, level: usize, narrow: bool) -> &'static [u64] {
        match (self.mode, level == self.leaf, level) {
            (Mode::ThirtyTwo { .. }, true, 2) if narrow => &[1 << 17, 1 << 20, 1 << 21],
            (Mode::ThirtyTwo { .. }, true, 2) => &[1 << 21, 1 << 20 | 1 << 21],
            (Mode::ThirtyTwo { .. }, ..) => &[],
            _ if narrow => &[1 << 36, 1 << 45],
            (Mode::Pae, true, 2) => &[1 << 13, 1 << 20, 1 << 46, 1 << 52, 1 << 62],
            (Mode::Pae, ..) => &[1 << 51, 1 << 52, 1 << 59],
            (_, true, 2) => &[1 << 13, 1 << 51],
            (_, true, 3) => &[1 << 13, 1 << 29, 1 << 46],
            (_, true, _) => &[1 << 46, 1 << 51],
            (_, false, 4 | 5) => &[PS, 1 << 51],
            (_, false, _) => &[1 << 46],
        }
    }
}

fn apply(cpu: &mut Cpu, controls: &Controls) {
    let paged = Cr0::PE | Cr0::PG | Cr0::ET;
    cpu.cr0 = if controls.wp { paged | Cr0::WP } else { paged };
    cpu.cr3 = TABLES;
    cpu.cr4 = Cr4::empty();
    cpu.cr4.set(Cr4::PAE, !matches!(controls.mode, Mode::ThirtyTwo { .. }));
    cpu.cr4.set(Cr4::PSE, controls.mode == Mode::ThirtyTwo { pse: true });
    cpu.cr4.set(Cr4::LA57, controls.mode == Mode::Five);
    cpu.cr4.set(Cr4::SMEP, controls.smep);
    cpu.cr4.set(Cr4::SMAP, controls.smap);
    cpu.cr4.set(Cr4::PKE, controls.pkru.is_some());
    cpu.cr4.set(Cr4::PKS, controls.pkrs.is_some());
    cpu.efer =
        if matches!(controls.mode, Mode::Four | Mode::Five) { Efer::LME | Efer::LMA } else { Efer::empty() };
    cpu.efer.set(Efer::NXE, controls.nxe);
    cpu.vector.pkru = controls.pkru.unwrap_or(0);
    cpu.msrs.pkrs = controls.pkrs.unwrap_or(0);
    cpu.update_paging();
    let sizes = Sizes { physical_bits: controls.physical_bits, huge_pages: controls.gigabyte_pages };
    let keys = cpu.mmu.paging.keys;
    cpu.mmu.paging = Paging::new(cpu.cr0, cpu.cr3, cpu.cr4, cpu.efer, sizes);
    (cpu.mmu.paging.keys, cpu.mmu.paging.pointers) = (keys, [0, 0, 0, TABLES | P]);
}

/// One access of the processor, as the model tells of its own.
fn access(cpu: &mut Cpu, linear: u64, who: Who, kind: Kind) -> Result<(), u32> {
    match who {
        Who::Program => cpu.mmu.set_view(3, false),
        Who::Supervisor { ac } => cpu.mmu.set_view(0, ac),
        Who::Implicit => {}
    }
    let view = if who == Who::Implicit { View::Supervisor } else { cpu.mmu.view };
    let access = match kind {
        Kind::Read => Access::Read,
        Kind::Write => Access::Write,
        Kind::Fetch => Access::Fetch,
    };
    match cpu.target(view, linear, access) {
        Ok(target) => {
            assert_eq!(target, Target::Ram(PHYSICAL));
            Ok(())
        }
        Err(stop) => {
            assert_eq!(stop, Stop::Fault);
            let fault = cpu.fault.take().unwrap();
            assert_eq!((fault.vector, fault.address), (Vector::PageFault, linear));
            Err(fault.error_code.unwrap())
        }
    }
}

const ACCESSES: [(Who, Kind); 11] = [
    (Who::Supervisor { ac: false }, Kind::Read),
    (Who::Program, Kind::Read),
    (Who::Implicit, Kind::Read),
    (Who::Supervisor { ac: true }, Kind::Fetch),
    (Who::Program, Kind::Fetch),
    (Who::Supervisor { ac: true }, Kind::Read),
    (Who::Implicit, Kind::Write),
    (Who::Supervisor { ac: false }, Kind::Fetch),
    (Who::Program, Kind::Write),
    (Who::Supervisor { ac: false }, Kind::Write),
    (Who::Supervisor { ac: true }, Kind::Write),
];

/// Counts the accesses, and goes through them in another order each time.
struct Run {
    cpu: Cpu,
    done: u64,
    turn: usize,
}

impl Run {
    fn new(cpu: Cpu) -> Self {
        Self { cpu, done: 0, turn: 0 }
    }

    /// All accesses with these entries, without invalidating in between.
    fn all(&mut self, controls: &Controls, way: Way, entries: &mut [u64]) {
        // Steps that have no factor in common with their number go through all of them.
        let step = self.turn % 10 + 1;
        let start = self.turn / 10 % ACCESSES.len();
        self.turn += 1;
        for n in 0..ACCESSES.len() {
            let (who, kind) = ACCESSES[(start + n * step) % ACCESSES.len()];
            let before: [u64; 5] = std::array::from_fn(|n| entries.get(n).copied().unwrap_or(0));
            let expected = controls.access(who, kind, entries);
            let got = access(&mut self.cpu, way.linear(), who, kind);
            let flags = (0..entries.len()).all(|n| way.read(&self.cpu, way.levels() - n) == entries[n]);
            assert!(
                got == expected && flags,
                "{who:?} {kind:?} through {before:x?} with {controls:?}:\n{got:x?} for {expected:x?}, entries {:x?} for \
                 {entries:x?}",
                (0..entries.len()).map(|n| way.read(&self.cpu, way.levels() - n)).collect::<Vec<_>>(),
            );
            self.done += 1;
        }
    }

    /// All accesses with these entries after INVLPG, and again after they were made to allow more without INVLPG.
    fn case(&mut self, controls: &Controls, way: Way, entries: &[u64], raises: bool) {
        let mut now: [u64; 5] = [0; 5];
        let now = &mut now[..entries.len()];
        now.copy_from_slice(entries);
        let write = |cpu: &Cpu, entries: &[u64]| {
            entries.iter().enumerate().for_each(|(n, &entry)| way.write(cpu, way.levels() - n, entry));
        };
        write(&self.cpu, now);
        self.cpu.mmu.tlb.invalidate_page(way.linear());
        self.all(controls, way, now);
        if raises {
            for (n, entry) in now.iter_mut().enumerate() {
                // A page given to programs is taken from the supervisor, by SMEP, SMAP and its key: so U/S stays.
                let kept = *entry & (US | A | D | 0xf << 59);
                *entry = way.open(way.levels() - n) & !US | kept;
            }
            write(&self.cpu, now);
            self.all(controls, way, now);
        }
    }

    /// Every set of bits in the entry that maps the page, with every single restriction in the entries above it.
    fn entries(&mut self, controls: &Controls, way: Way) {
        let (wide, narrow) = (way.entry_bytes() == 8, controls.physical_bits == 36);
        let open: Vec<u64> = (way.leaf..=way.levels()).rev().map(|level| way.open(level)).collect();
        let mut above: Vec<(usize, u64)> = vec![(0, 0)];
        for n in 0..open.len() - 1 {
            above.extend([P, RW, US, A].map(|bit| (n, bit)));
            let reserved = way.reserved_bits(way.levels() - n, narrow);
            above.extend(reserved.iter().map(|&bits| (n, bits)));
            if wide {
                above.push((n, XD));
            }
        }
        let key = if matches!(way.mode, Mode::Four | Mode::Five) { 2u64 << 59 } else { 0 };
        let leaf_bits = [P, RW, US, A, D];
        let mut extra = vec![0];
        extra.extend_from_slice(way.reserved_bits(way.leaf, narrow));
        if wide {
            extra.push(XD);
        }
        for (n, bits) in above {
            for set in 0..1u64 << leaf_bits.len() {
                for &more in &extra {
                    // Without P nothing else counts: one of those is enough.
                    if set & 1 == 0 && (set != 0 || more != 0) {
                        continue;
                    }
                    let chosen = (0..leaf_bits.len()).filter(|bit| set >> bit & 1 != 0);
                    let flags = chosen.fold(0, |flags, bit| flags | leaf_bits[bit]);
                    let mut entries = [0; 5];
                    let entries = &mut entries[..open.len()];
                    entries.copy_from_slice(&open);
                    entries[n] ^= bits;
                    let leaf = entries.last_mut().unwrap();
                    *leaf = *leaf & !(P | RW | US) | flags | more | key;
                    self.case(controls, way, entries, more == 0 || bits == 0);
                }
            }
        }
    }
}

/// With every combination of control bits.
fn every_control(way: Way, sizes: Sizes, mut each: impl FnMut(&Controls)) {
    let long = matches!(way.mode, Mode::Four | Mode::Five);
    // Key 2 is the page's; the others' rights are the opposite.
    let registers: &[Option<u32>] =
        if long { &[None, Some(0x10), Some(0x20), Some(0xffff_ffcf)] } else { &[None] };
    for bits in 0..16 {
        let bit = |n: u32| bits >> n & 1 != 0;
        for &pkru in registers {
            for &pkrs in &registers[..registers.len().min(3)] {
                each(&Controls {
                    mode: way.mode,
                    physical_bits: sizes.physical_bits,
                    gigabyte_pages: sizes.huge_pages,
                    wp: bit(0),
                    smep: bit(1),
                    smap: bit(2),
                    nxe: bit(3),
                    pkru,
                    pkrs,
                });
            }
        }
    }
}

const WIDE: Sizes = Sizes { physical_bits: 46, huge_pages: true };

fn compare(ways: &[(Mode, usize)], sizes: Sizes, least: u64) {
    let mut run = Run::new(long());
    for &(mode, leaf) in ways {
        let way = Way { mode, leaf };
        every_control(way, sizes, |controls| {
            apply(&mut run.cpu, controls);
            run.entries(controls, way);
        });
    }
    assert!(run.done >= least, "{} accesses", run.done);
}

#[test]
fn thirty_two_bit_paging_allows_what_the_model_allows() {
    let (pse, no_pse) = (Mode::ThirtyTwo { pse: true }, Mode::ThirtyTwo { pse: false });
    compare(&[(pse, 1), (pse, 2), (no_pse, 1)], WIDE, 70_000);
}

#[test]
fn pae_paging_allows_what_the_model_allows() {
    compare(&[(Mode::Pae, 1), (Mode::Pae, 2)], WIDE, 200_000);
}

#[test]
fn four_level_paging_allows_what_the_model_allows() {
    compare(&[(Mode::Four, 1), (Mode::Four, 2), (Mode::Four, 3)], WIDE, 7_000_000);
}

#[test]
fn five_level_paging_allows_what_the_model_allows() {
    compare(&[(Mode::Five, 1), (Mode::Five, 2), (Mode::Five, 3)], WIDE, 11_000_000);
}

#[test]
fn processors_with_narrow_addresses_and_without_huge_pages_have_more_reserved_bits() {
    let narrow = Sizes { physical_bits: 36, huge_pages: false };
    let ways = [
        (Mode::ThirtyTwo { pse: true }, 2),
        (Mode::Pae, 1),
        (Mode::Four, 1),
        (Mode::Four, 3),
        (Mode::Five, 3),
    ];
    compare(&ways, narrow, 8_000_000);
}
