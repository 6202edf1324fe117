//! The same case on the software CPU: a processor at CPL 3 with the oracle's address space and descriptor tables.

use std::sync::Arc;

use emulator::cpu::{Cpu, Native, Wires};
use emulator::cpuid::CpuModel;
use emulator::insn::{Handler, Insn, Stop};
use emulator::mmu::NO_PAGE;
use emulator::native::{Component, NativeUnit, VectorRegisters};
use engine::{Nothing, TimeSource, XSAVE_AREA_SIZE};
use guest_memory::{GuestMemory, Region};
use iced_x86::Mnemonic;
use x86::{Cr0, Cr4, Descriptor, Efer, Flags, Segment, SegmentRegister, Selector, TableRegister};

use crate::case::{COMPLETED, Case, Outcome, Trap, WINDOW};
use crate::layout::{self, ARENA, ARENA_LEN, CODE, Mode, PAGE};

/// Where the page tables are: PML4, PDPT, page directory and page table of the low half, PDPT of the high half.
const TABLES: u64 = 0x1000;
/// Where the descriptor tables are.
const GDT: u64 = 0x8000;
const LDT: u64 = 0x9000;
/// Where the task-state segment and the interrupt descriptor table are, the code of the latter's handlers, and the top
/// of their stack.
const TSS: u64 = 0xb000;
const IDT: u64 = 0xa000;
const HANDLERS: u64 = 0xc000;
const KERNEL_STACK: u64 = 0xf000;
/// Linear addresses of the handlers and of the top of their stack.
pub const HANDLERS_AT: u64 = HIGH + HANDLERS;
/// See [`HANDLERS_AT`].
pub const KERNEL_STACK_AT: u64 = HIGH + KERNEL_STACK;
/// Where the data and the code are.
const DATA: u64 = 0x1_0000;
/// Physical address of the page of code.
pub const CODE_PAGE: u64 = 0x2_0000;
/// Bytes of RAM.
const MEMORY: u64 = 0x4_0000;
/// The high half of the address space, all of it the kernel's, maps physical address 0.
pub const HIGH: u64 = 0xffff_8000_0000_0000;
/// How often a repeated instruction may come back to look at interrupts.
const MOST_REPEATS: u32 = 100_000;
/// Bits of RFLAGS that a case brings.
const CASE_FLAGS: Flags = Flags::ARITHMETIC.union(Flags::DF).union(Flags::AC);

/// Time that stands.
struct Still;

impl TimeSource for Still {
    fn now(&self) -> u64 {
        0
    }
    fn tsc(&self) -> u64 {
        0
    }
    fn host_tsc_start(&self) -> Option<u64> {
        None
    }
    fn tsc_frequency(&self) -> u64 {
        2_000_000_000
    }
    fn wall_clock(&self) -> u64 {
        0
    }
}

/// The host's own model, whose features decide what the host may have that a guest may not.
pub fn model() -> CpuModel {
    CpuModel::parse("host", 1).expect("the host's own model")
}

/// The outside, where there is none.
pub fn wires() -> Wires {
    Wires {
        bus: Arc::new(Nothing),
        interrupts: Arc::new(Nothing),
        time: Arc::new(Still),
        recorder: None,
        model: Arc::new(model()),
    }
}

/// Something that executes cases.
pub trait Executor {
    /// What it is.
    fn name(&self) -> &'static str;
    /// Runs a case.
    fn run(&mut self, case: &Case) -> Outcome;
}

/// The software CPU, ready for single instructions.
pub struct Subject {
    cpu: Cpu,
    memory: Pages,
    /// A handler to use for a mnemonic instead of its own: how a test plants a bug.
    pub replaced: Option<(Mnemonic, Handler)>,
}

impl Subject {
    /// Sets the processor up.
    ///
    /// # Errors
    /// The host gives no memory for code.
    pub fn new() -> std::io::Result<Self> {
        let cpu = processor()?;
        let memory = Pages::new(&cpu.memory);
        Ok(Self { cpu, memory, replaced: None })
    }

    /// Decodes and runs the instruction until it is complete or has raised an exception.
    fn execute(&mut self, insn: &Insn, outcome: &mut Outcome) {
        let mut repeats = 0;
        let mut result = (insn.run)(&mut self.cpu, insn);
        while result == Err(Stop::Repeat) && repeats < MOST_REPEATS {
            repeats += 1;
            result = (insn.run)(&mut self.cpu, insn);
        }
        self.cpu.refine_fault(insn);
        if let (Err(Stop::Fault), Some(fault)) = (result, self.cpu.fault.take()) {
            self.cpu.rip = self.cpu.block_rip;
            outcome.vector = fault.vector as u8;
            outcome.error = fault.error_code.map_or(0, u64::from);
            outcome.cr2 = if outcome.vector == 14 { fault.address } else { 0 };
        }
    }
}

impl Executor for Subject {
    fn name(&self) -> &'static str {
        "interpreter"
    }

    fn run(&mut self, case: &Case) -> Outcome {
        load(&mut self.cpu, case);
        self.memory.put(&self.cpu.memory, case);
        let rip = case.mode.rip();
        let mut insns = Vec::with_capacity(1);
        self.cpu.native.insns.clear();
        let mut bytes = [layout::FILLER; 32];
        let (code, (leave, _)) = (case.code(), layout::leave(case.mode, case.code().len()));
        for (byte, from) in bytes.iter_mut().zip(code.iter().chain(&leave)) {
            *byte = *from;
        }
        let decoded = self.cpu.decode(rip, &bytes, 1, &mut insns);
        let mut outcome = Outcome::default();
        if let Some(mut insn) = insns.first().copied() {
            if let Some((_, handler)) =
                self.replaced.filter(|(mnemonic, _)| *mnemonic as u16 == insn.mnemonic)
            {
                insn.run = handler;
            }
            self.cpu.block_rip = rip;
            self.cpu.rip = rip.wrapping_add(decoded.len as u64);
            self.cpu.mmu.executing = [NO_PAGE; 2];
            self.cpu.fault = None;
            self.execute(&insn, &mut outcome);
        }
        record(&self.cpu, case, &mut outcome);
        self.memory.take(&self.cpu.memory, case, &mut outcome);
        outcome
    }
}

/// A processor at CPL 3 with the oracle's address space and descriptor tables.
pub fn processor() -> std::io::Result<Cpu> {
    let memory = GuestMemory::new(&[Region { start: 0, len: MEMORY, read_only: false }])
        .map_err(std::io::Error::other)?;
    let native = Native { unit: NativeUnit::new()?, insns: Vec::new() };
    let mut cpu = Cpu::power_up(0, memory, wires(), native);
    write_tables(&cpu.memory);
    cpu.cr0 = Cr0::PE | Cr0::PG | Cr0::ET | Cr0::NE | Cr0::WP | Cr0::MP | Cr0::AM;
    cpu.cr3 = TABLES;
    cpu.cr4 = Cr4::PAE
        | Cr4::OSFXSR
        | Cr4::OSXMMEXCPT
        | Cr4::OSXSAVE
        | Cr4::FSGSBASE
        | Cr4::UMIP
        | Cr4::SMEP
        | Cr4::SMAP
        | Cr4::PGE;
    cpu.efer = Efer::LME | Efer::LMA | Efer::SCE | Efer::NXE;
    cpu.xcr0 = host_xcr0();
    cpu.gdtr = TableRegister { base: HIGH + GDT, limit: 127 };
    cpu.idtr = TableRegister { base: HIGH + IDT, limit: 0xfff };
    let table = Descriptor(0x0000_8200_0000_0000).segment(Selector(0x50));
    cpu.ldtr = Segment { base: HIGH + LDT, limit: (8 * layout::LDT.len() - 1) as u32, ..table };
    let task = Descriptor(layout::gdt()[8]).segment(Selector(0x40));
    cpu.tr = Segment { base: HIGH + TSS, ..task };
    cpu.update_paging();
    Ok(cpu)
}

/// The pages that cases use, in a processor's RAM.
pub struct Pages {
    pristine: Vec<u8>,
    data: Vec<u8>,
    /// Bytes of code and of what leaves it, in the page of code.
    code_len: usize,
}

impl Pages {
    /// Fills them.
    pub fn new(memory: &GuestMemory) -> Self {
        let pristine = layout::pristine();
        memory.write_bytes(DATA, &pristine);
        memory.write_bytes(CODE_PAGE, &layout::code_page());
        Self { data: pristine.clone(), pristine, code_len: 0 }
    }

    /// Writes a case's data, and its code with what leaves it behind it over the one before.
    pub fn put(&mut self, memory: &GuestMemory, case: &Case) {
        memory.write_bytes(DATA + u64::from(case.window_at), &case.window);
        let code = case.code();
        let (leave, leave_len) = layout::leave(case.mode, code.len());
        let (at, len) = (CODE_PAGE + layout::CODE_AT, code.len() + leave_len);
        memory.write_bytes(at, code);
        memory.write_bytes(at + code.len() as u64, &leave[..leave_len]);
        memory.fill(at + len as u64, layout::FILLER, self.code_len.saturating_sub(len) as u64);
        self.code_len = len;
    }

    /// Takes down which data changed, and makes all of it pristine again.
    pub fn take(&mut self, memory: &GuestMemory, case: &Case, outcome: &mut Outcome) {
        memory.read_bytes(DATA, &mut self.data);
        outcome.take_lines(case, &mut self.data, &self.pristine);
        let window = case.window_at as usize..case.window_at as usize + WINDOW;
        memory.write_bytes(DATA + window.start as u64, &self.pristine[window]);
        if usize::from(outcome.lines_changed) > outcome.changed().len() {
            memory.write_bytes(DATA, &self.pristine);
        }
        for &(line, _) in outcome.changed() {
            let at = usize::from(line) * 64;
            memory.write_bytes(DATA + at as u64, &self.pristine[at..at + 64]);
        }
    }
}

/// Puts a processor into the state that a case begins in.
pub fn load(cpu: &mut Cpu, case: &Case) {
    cpu.registers.all_mut().copy_from_slice(&case.gprs);
    for (register, selector) in [
        (SegmentRegister::Es, case.selectors[0]),
        (SegmentRegister::Cs, case.mode.code_selector()),
        (SegmentRegister::Ss, case.selectors[2]),
        (SegmentRegister::Ds, case.selectors[3]),
        (SegmentRegister::Fs, case.selectors[4]),
        (SegmentRegister::Gs, case.selectors[5]),
    ] {
        cpu.set_segment(register, segment(selector));
    }
    if case.mode == Mode::Bits64 {
        for (register, base) in [SegmentRegister::Fs, SegmentRegister::Gs].into_iter().zip(case.bases) {
            let segment = *cpu.segment(register);
            cpu.set_segment(register, Segment { base, ..segment });
        }
    }
    let trace = if case.trap == Trap::Step { Flags::TF } else { Flags::empty() };
    cpu.set_rflags(
        case.rflags | (trace | Flags::IF).bits(),
        CASE_FLAGS | Flags::TF | Flags::IF | Flags::NT | Flags::ID,
    );
    if case.uses_vector {
        load_vectors(&mut cpu.vector, &case.area.0);
    }
    cpu.shadow = false;
    cpu.update_mode();
}

/// Takes down a processor's state.
pub fn record(cpu: &Cpu, case: &Case, outcome: &mut Outcome) {
    outcome.gprs = *cpu.registers.all();
    outcome.rip = cpu.rip;
    outcome.rflags = cpu.rflags();
    for (selector, segment) in outcome.selectors.iter_mut().zip(&cpu.segments) {
        *selector = segment.selector.0;
    }
    outcome.bases = [cpu.segments[4].base, cpu.segments[5].base];
    if case.uses_vector {
        save_vectors(&cpu.vector, &mut outcome.area.0);
    }
}

/// The vector state of an XSAVE area whose components are all present.
fn load_vectors(vector: &mut VectorRegisters, area: &[u8; XSAVE_AREA_SIZE]) {
    for component in Component::ALL {
        vector.load_component(component, &area[component.offset()..]);
    }
    let mxcsr = u32::from_le_bytes([area[24], area[25], area[26], area[27]]);
    // Cases bring no reserved bits.
    let _ = vector.set_mxcsr(mxcsr);
}

/// All components of the vector state, as an XSAVE area that says that they are present.
fn save_vectors(vector: &VectorRegisters, area: &mut [u8; XSAVE_AREA_SIZE]) {
    for component in Component::ALL {
        vector.save_component(component, &mut area[component.offset()..]);
    }
    area[24..32].copy_from_slice(&vector.mxcsr_field());
    area[512] = 0xe7;
}

/// XCR0 as the host has it, as far as the software CPU has it too.
fn host_xcr0() -> u64 {
    let mut xcr0 = 3;
    if std::is_x86_feature_detected!("avx") {
        xcr0 |= 4;
    }
    if std::is_x86_feature_detected!("avx512f") {
        xcr0 |= 0xe0;
    }
    xcr0
}

/// A segment register after the load of a selector that is a good one.
fn segment(selector: u16) -> Segment {
    let descriptor = if selector & 4 != 0 {
        layout::LDT.get(usize::from(selector >> 3)).map_or(0, layout::Entry::descriptor)
    } else {
        layout::gdt()[usize::from(selector >> 3) & 15]
    };
    let segment = Descriptor(descriptor).segment(Selector(selector));
    if selector & !3 == 0 {
        let attributes = x86::descriptor::Attributes::UNUSABLE;
        return Segment { selector: Selector(selector), base: 0, limit: 0, attributes };
    }
    segment
}

/// Page tables and descriptor tables.
fn write_tables(memory: &GuestMemory) {
    const USER: u64 = 7;
    const NO_EXECUTE: u64 = 1 << 63;
    let index = |address: u64, level: u64| address >> (12 + 9 * level) & 0x1ff;
    let put = |table: u64, index: u64, entry: u64| memory.store(TABLES + 0x1000 * table + 8 * index, entry);
    put(0, 0, TABLES + 0x1000 | USER);
    put(1, index(ARENA, 2), TABLES + 0x2000 | USER);
    put(2, index(ARENA, 1), TABLES + 0x3000 | USER);
    for page in 0..(ARENA_LEN / PAGE) as u64 {
        let rights = if page < 2 { 0x67 } else { 0x65 } | NO_EXECUTE;
        put(3, index(ARENA, 0) + page, DATA + page * PAGE as u64 | rights);
    }
    put(3, index(CODE, 0), CODE_PAGE | 0x65);
    // The high half: there, but not for programs.
    for entry in 256..512 {
        put(0, entry, TABLES + 0x4000 | 0x23);
    }
    for entry in 0..512 {
        put(4, entry, 0xe3);
    }
    layout::gdt().iter().enumerate().for_each(|(at, entry)| memory.store(GDT + 8 * at as u64, *entry));
    layout::LDT
        .iter()
        .enumerate()
        .for_each(|(at, entry)| memory.store(LDT + 8 * at as u64, entry.descriptor()));
    // Every handler is a HLT. Programs may call those of INT3 and INTO.
    for vector in 0..256u64 {
        let to = HIGH + HANDLERS + vector;
        let access = if matches!(vector, 3 | 4) { 0xee00 } else { 0x8e00 };
        let gate = to & 0xffff | 0x10 << 16 | access << 32 | (to >> 16 & 0xffff) << 48;
        memory.store(IDT + 16 * vector, gate);
        memory.store(IDT + 16 * vector + 8, to >> 32);
        memory.store(HANDLERS + vector, 0xf4u8);
    }
    memory.store(TSS + 4, HIGH + KERNEL_STACK);
    // No I/O permission bitmap.
    memory.store(TSS + 0x66, 0xffffu16);
}

/// The vector that stands for no exception.
pub const NO_EXCEPTION: u8 = COMPLETED;
