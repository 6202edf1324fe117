//! A virtual CPU's state, and what every handler uses of it.

use std::sync::Arc;

use engine::{Bus, InterruptController, TimeSource, VmExit};
use exits::{Exit, Recorder};
use guest_memory::GuestMemory;
use x86::descriptor::Attributes;
use x86::{Cr0, Cr4, Efer, Exception, Flags, Segment, SegmentRegister, TableRegister};

use crate::breakpoints::Breakpoints;
use crate::cpuid::CpuModel;
use crate::flags::LazyFlags;
use crate::insn::{FLAT, Insn, Stop};
use crate::mmu::Mmu;
use crate::mode::{Mode, VectorMode};
use crate::msrs::Msrs;
use crate::native::{NativeInsn, NativeUnit, VectorRegisters};
use crate::pmu::{Moment, Pmu};
use crate::registers::Registers;

/// What a vCPU is connected to.
pub struct Wires {
    /// Device registers.
    pub bus: Arc<dyn Bus>,
    /// The local APIC.
    pub interrupts: Arc<dyn InterruptController>,
    /// Time.
    pub time: Arc<dyn TimeSource>,
    /// The ledger, where it is on.
    pub recorder: Option<Recorder>,
    /// CPUID and the features.
    pub model: Arc<CpuModel>,
}

/// The host-executed part of the instruction set.
pub struct Native {
    /// Generates and runs the stubs.
    pub unit: NativeUnit,
    /// The stubs in use, by [`Insn::aux`].
    pub insns: Vec<NativeInsn>,
}

/// A virtual CPU.
pub struct Cpu {
    /// General-purpose registers.
    pub registers: Registers,
    /// The arithmetic flags.
    pub flags: LazyFlags,
    /// RFLAGS without the arithmetic flags.
    pub system_flags: Flags,
    /// Between instructions: the next one. During a block: where the block ends, or the target of its branch.
    pub rip: u64,
    /// RIP of the running block's first instruction.
    pub block_rip: u64,
    /// Segment bases by register number; [`FLAT`] is always zero.
    pub bases: [u64; 8],
    /// What decoding and translation depend on; follows the registers below ([`Cpu::update_mode`]).
    pub mode: Mode,
    /// Translation of addresses and the accesses through it.
    pub mmu: Mmu,
    /// RAM.
    pub memory: GuestMemory,
    /// ES, CS, SS, DS, FS, GS. Change them through [`Cpu::set_segment`].
    pub segments: [Segment; 6],
    /// Task register.
    pub tr: Segment,
    /// Local descriptor table.
    pub ldtr: Segment,
    /// Global descriptor table.
    pub gdtr: TableRegister,
    /// Interrupt descriptor table.
    pub idtr: TableRegister,
    /// CR0. Change the control registers through `instructions::control`.
    pub cr0: Cr0,
    /// CR2.
    pub cr2: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: Cr4,
    /// XCR0.
    pub xcr0: u64,
    /// IA32_EFER.
    pub efer: Efer,
    /// DR0 to DR3, DR6, DR7.
    pub debug: [u64; 6],
    /// Model-specific registers.
    pub msrs: Msrs,
    /// The performance counters.
    pub pmu: Pmu,
    /// x87 and vector registers.
    pub vector: Box<VectorRegisters>,
    /// The host-executed instructions.
    pub native: Native,
    /// With [`Stop::Fault`]: what to deliver.
    pub fault: Option<Exception>,
    /// With [`Stop::Exit`]: what `run` returns.
    pub exit: Option<VmExit>,
    /// STI, MOV SS or POP SS was the last instruction: no interrupt before the next.
    pub shadow: bool,
    /// Bits of DR6 for traps of what has just been completed: #DB comes before the next instruction.
    pub debug_traps: u64,
    /// MOV SS or POP SS was the last instruction: no debug exception before the next has run.
    pub stack_shadow: bool,
    /// What the debug registers watch; follows them ([`Cpu::update_breakpoints`]).
    pub breakpoints: Breakpoints,
    /// Between an NMI and the next IRET.
    pub nmi_blocked: bool,
    /// HLT waits for an interrupt.
    pub halted: bool,
    /// INIT: waits for a SIPI.
    pub waits_for_sipi: bool,
    /// Instructions retired, as of the last time that a block or translated code was left.
    pub instructions: u64,
    /// In a handler that translated code called: the instructions that retired in it before the present block.
    pub translated: u64,
    /// This vCPU's number.
    pub id: u32,
    /// The outside.
    pub wires: Wires,
}

impl Cpu {
    /// The address of the instruction after `insn`.
    #[inline(always)]
    pub fn next_rip(&self, insn: &Insn) -> u64 {
        let next = self.block_rip.wrapping_add(u64::from(insn.offset) + u64::from(insn.len));
        if self.mode.is_64() { next } else { next & self.rip_mask() }
    }

    /// The address of `insn`.
    #[inline(always)]
    pub fn this_rip(&self, insn: &Insn) -> u64 {
        let rip = self.block_rip.wrapping_add(u64::from(insn.offset));
        if self.mode.is_64() { rip } else { rip & self.rip_mask() }
    }

    /// IP and EIP wrap; RIP does not.
    fn rip_mask(&self) -> u64 {
        u64::MAX >> (64 - self.mode.code_size())
    }

    /// Ends the block after this instruction, which is complete.
    ///
    /// # Errors
    /// Always [`Stop::EndBlock`]: `return cpu.end_block(insn)`.
    pub fn end_block(&mut self, insn: &Insn) -> Result<(), Stop> {
        self.rip = self.next_rip(insn);
        Err(Stop::EndBlock)
    }

    /// Raises an exception.
    #[cold]
    pub fn raise(&mut self, exception: Exception) -> Stop {
        self.fault = Some(exception);
        Stop::Fault
    }

    /// #GP(0).
    #[cold]
    pub fn gp0(&mut self) -> Stop {
        self.raise(Exception::gp(0))
    }

    /// #UD.
    #[cold]
    pub fn ud(&mut self) -> Stop {
        self.raise(Exception::ud())
    }

    /// Current privilege level.
    #[inline(always)]
    pub fn cpl(&self) -> u8 {
        self.mode.cpl()
    }

    /// Whether the processor is in 64-bit or compatibility mode.
    pub fn is_long(&self) -> bool {
        self.efer.contains(Efer::LMA)
    }

    /// RFLAGS.
    pub fn rflags(&self) -> u64 {
        self.system_flags.bits() & !Flags::ARITHMETIC.bits() | Flags::FIXED.bits() | self.flags.bits()
    }

    /// Sets RFLAGS: every bit of `value` that `writable` names; reserved bits keep their fixed values.
    pub fn set_rflags(&mut self, value: u64, writable: Flags) {
        let old = self.rflags();
        let new = Flags::from_bits_truncate(old & !writable.bits() | value & writable.bits()) | Flags::FIXED;
        self.flags.set_bits(new.bits());
        self.system_flags = new - Flags::ARITHMETIC;
        if (old ^ new.bits()) & (Flags::VM | Flags::AC).bits() != 0 {
            self.update_mode();
        }
    }

    /// A segment register.
    pub fn segment(&self, register: SegmentRegister) -> &Segment {
        &self.segments[register as usize]
    }

    /// Loads a segment register with its hidden part. Does not check anything.
    pub fn set_segment(&mut self, register: SegmentRegister, segment: Segment) {
        self.segments[register as usize] = segment;
        self.bases[register as usize] = segment.base;
        if matches!(register, SegmentRegister::Cs | SegmentRegister::Ss) {
            self.update_mode();
        } else {
            self.mode = self.mode.with_segments(&self.segments);
        }
    }

    /// The stack pointer's mask: by SS.B outside 64-bit mode.
    #[inline(always)]
    pub fn stack_mask(&self) -> u64 {
        if self.mode.is_64() {
            u64::MAX
        } else if self.segments[SegmentRegister::Ss as usize].attributes.contains(Attributes::DB) {
            0xffff_ffff
        } else {
            0xffff
        }
    }

    /// Follows a change of CR0, CR4, EFER, XCR0, CS, SS or RFLAGS.VM/AC: the mode and the MMU's view.
    ///
    /// CPL is SS.DPL, which every load of SS or CS keeps equal to the privilege level.
    pub fn update_mode(&mut self) {
        let (protected, long) = (self.cr0.contains(Cr0::PE), self.efer.contains(Efer::LMA));
        let v86 = protected && self.system_flags.contains(Flags::VM);
        let cpl = match (protected, v86) {
            (false, _) => 0,
            (true, true) => 3,
            (true, false) => self.segments[SegmentRegister::Ss as usize].dpl(),
        };
        let code = self.segments[SegmentRegister::Cs as usize].attributes;
        let size = match (long && code.contains(Attributes::L), code.contains(Attributes::DB) && !v86) {
            (true, _) => 64,
            (false, true) => 32,
            (false, false) => 16,
        };
        let mode = Mode::new(size, long, protected, v86, cpl, self.vector_mode());
        self.mode = mode.with_segments(&self.segments);
        self.bases[usize::from(FLAT)] = 0;
        self.mmu.set_view(cpl, self.system_flags.contains(Flags::AC));
    }

    fn vector_mode(&self) -> VectorMode {
        let flag = |set: bool, bit: u8| if set { bit } else { 0 };
        let avx = self.cr4.contains(Cr4::OSXSAVE) && self.xcr0 & 6 == 6;
        VectorMode(
            flag(self.cr0.contains(Cr0::EM), VectorMode::EM)
                | flag(self.cr0.contains(Cr0::TS), VectorMode::TS)
                | flag(self.cr0.contains(Cr0::MP), VectorMode::MP)
                | flag(self.cr4.contains(Cr4::OSFXSR), VectorMode::OSFXSR)
                | flag(avx, VectorMode::AVX)
                | flag(avx && self.xcr0 & 0xe0 == 0xe0, VectorMode::AVX512),
        )
    }

    /// The guest's time-stamp counter.
    pub fn tsc(&self) -> u64 {
        self.wires.time.tsc().wrapping_add(self.msrs.tsc_offset)
    }

    /// The moment before `insn`, which is being executed.
    pub fn moment(&self, insn: &Insn) -> Moment {
        let instructions = self.instructions.wrapping_add(self.translated);
        Moment { instructions: instructions.wrapping_add(u64::from(insn.number)), ..self.boundary_moment() }
    }

    /// The moment between two blocks.
    pub fn boundary_moment(&self) -> Moment {
        Moment { instructions: self.instructions, ticks: self.wires.time.tsc() }
    }

    /// Runs `work` and enters it into the ledger, where that is on.
    #[inline]
    pub fn recorded<T>(&mut self, exit: impl FnOnce(&Self) -> Exit, work: impl FnOnce(&mut Self) -> T) -> T {
        if self.wires.recorder.is_none() {
            return work(self);
        }
        let (exit, start) = (exit(self), exits::ticks());
        let result = work(self);
        if let Some(recorder) = &self.wires.recorder {
            recorder.record(exit, exits::ticks().wrapping_sub(start));
        }
        result
    }
}
