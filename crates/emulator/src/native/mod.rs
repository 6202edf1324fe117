//! The `native` kind of the instruction table: the host executes the guest's instruction.
//!
//! For an instruction that only computes, the host processor is the definition. [`is_listed`] says which those are.
//! [`NativeUnit::prepare`] makes a stub for one (see `stub`): the instruction itself between loads and stores of the
//! guest registers that it uses. [`NativeUnit::run`] calls it. Where the memory operand lies, whether it may be
//! accessed, and whether the guest may use the registers at all (#NM, #UD) is the caller's to know; what it needs for
//! that stands in [`NativeInsn`].
//!
//! Host signals have no part in it. SIMD exceptions stay masked on the host and are raised from the flags they leave;
//! x87 exceptions wait, on the host as in the guest, for the next instruction, and are found before that runs.
#![allow(unsafe_code)] // The call of generated code.

mod allow_list;
pub(crate) mod code_memory;
pub mod execute;
mod features;
mod memory_use;
mod plan;
mod state;
mod stub;
#[cfg(test)]
mod tests;

use std::arch::asm;
use std::sync::atomic::{AtomicU64, Ordering};

use iced_x86::{CpuidFeature, EncodingKind, Instruction, InstructionInfoFactory, Mnemonic};

use crate::block::Map;
pub use allow_list::is_listed;
use code_memory::CodeMemory;
use features::Host;
pub use memory_use::{MemoryKind, MemoryUse};
use plan::{MxcsrUse, Plan, canonical};
pub use state::{Component, ReservedMxcsr, VectorRegisters};

/// Bytes of generated code that a unit keeps; when they are full, all of it is forgotten.
const CODE_BYTES: usize = 4 << 20;
/// The exception masks in MXCSR.
const MXCSR_MASKS: u32 = 0x1f80;
/// The exception flags in MXCSR.
const MXCSR_FLAGS: u32 = 0x3f;
/// Those that are found before the result is computed: invalid operation, denormal, division by zero.
const MXCSR_BEFORE: u32 = 0x07;
/// The underflow flag in MXCSR, its mask, and the bit that flushes tiny results to zero.
const MXCSR_UNDERFLOW: u32 = 1 << 4;
const MXCSR_UNDERFLOW_MASK: u32 = 1 << 11;
const MXCSR_FLUSH: u32 = 1 << 15;

/// Which registers an instruction uses, for the checks of CR0, CR4 and XCR0 that go before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StateClass {
    /// General registers only.
    General,
    /// x87.
    X87,
    /// FWAIT, which only CR0.MP and CR0.TS together keep from running.
    Wait,
    /// MMX registers, be it beside XMM registers.
    Mmx,
    /// XMM registers by the legacy encoding.
    Sse,
    /// VEX-encoded vector instructions.
    Avx,
    /// EVEX-encoded instructions, and those of opmask registers.
    Avx512,
}

/// How to run one native instruction. Small and `Copy`: one lives in every decoded instruction that is native.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NativeInsn {
    /// The generation of the unit that made it; it runs in no other.
    generation: u64,
    /// Offset of the stub in code memory.
    stub: u32,
    action: Action,
    /// Whether a pending x87 exception is raised first.
    waits: bool,
    /// Whether it is what FIP points to afterwards.
    pub(crate) is_pointed_to: bool,
    /// Whether FOP, FIP and FDP have to be put back after the stub, whose own place and opcode are not for the guest's eyes.
    /// AMD's processors lose them besides.
    restores_pointers: bool,
    /// What MXCSR has to do with it.
    mxcsr: MxcsrUse,
    /// Which registers it uses.
    pub class: StateClass,
    /// Its memory operand, if it has one.
    pub memory: Option<MemoryUse>,
}

/// What running an instruction means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    /// The stub, with nothing to check.
    Call,
    /// The stub, after checks of the x87 status or of MXCSR.
    CheckedCall,
    /// These five never touch the host's own registers.
    LoadMxcsr,
    StoreMxcsr,
    ZeroUpper,
    ZeroAll,
    Wait,
}

/// What an instruction raised instead of completing; nothing of the guest's state has changed but for MXCSR's flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NativeFault {
    /// #MF: an earlier instruction left an unmasked x87 exception.
    X87Exception,
    /// #XM, or #UD where CR4.OSXMMEXCPT is clear. MXCSR tells which.
    SimdException,
    /// #GP(0): LDMXCSR with reserved bits.
    GeneralProtection,
    /// No fault of the guest's: the stub is gone ([`NativeUnit::generation`]). Prepare the instruction anew.
    Stale,
}

/// The instruction is not on the allow-list, or cannot be rewritten.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the host cannot execute this instruction for the guest")]
pub struct Unsupported;

/// Generates and runs stubs. Each vCPU has its own.
pub struct NativeUnit {
    code: CodeMemory,
    stubs: Map<Instruction, NativeInsn>,
    factory: InstructionInfoFactory,
    generation: u64,
    host: Host,
}

/// A stub. Its arguments: general registers, vector registers, memory operand, RFLAGS.
type Stub = unsafe extern "sysv64" fn(*mut u64, *mut VectorRegisters, *mut u8, *mut u64);

impl NativeUnit {
    /// Maps the code memory.
    ///
    /// # Errors
    /// The host refuses memory files or executable mappings of them.
    pub fn new() -> std::io::Result<Self> {
        Self::with(CODE_BYTES, Host::get())
    }

    fn with(bytes: usize, host: Host) -> std::io::Result<Self> {
        Ok(Self {
            code: CodeMemory::new(bytes)?,
            stubs: Map::default(),
            factory: InstructionInfoFactory::new(),
            generation: next_generation(),
            host,
        })
    }

    /// Changes whenever all stubs are forgotten; instructions prepared before are then [`NativeFault::Stale`].
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Makes an instruction runnable. Instructions that differ only in where their memory operand is share a stub.
    ///
    /// # Errors
    /// The instruction is not listed, or its rewritten form cannot be encoded.
    pub fn prepare(&mut self, instruction: &Instruction) -> Result<NativeInsn, Unsupported> {
        if !is_listed(instruction) {
            return Err(Unsupported);
        }
        let key = canonical(instruction);
        if let Some(known) = self.stubs.get(&key) {
            return Ok(*known);
        }
        let plan = Plan::new(key, &mut self.factory);
        let action = action(&plan);
        let stub = match action {
            Action::Call | Action::CheckedCall => {
                let code = stub::generate(&plan, self.host).map_err(|_| Unsupported)?;
                self.push(&code)?
            }
            _ => 0,
        };
        let insn = NativeInsn {
            generation: self.generation,
            stub,
            action,
            waits: plan.waits,
            is_pointed_to: is_pointed_to(&plan),
            restores_pointers: plan.x87 && !sets_pointers(&plan),
            mxcsr: plan.mxcsr,
            class: class(&plan),
            memory: plan.memory,
        };
        self.stubs.insert(key, insn);
        Ok(insn)
    }

    /// What [`NativeUnit::prepare`] gave for an instruction, if it is still good.
    pub fn known(&self, instruction: &Instruction) -> Option<NativeInsn> {
        self.stubs.get(&canonical(instruction)).copied()
    }

    fn push(&mut self, code: &[u8]) -> Result<u32, Unsupported> {
        if let Some(offset) = self.code.push(code) {
            return Ok(offset);
        }
        self.code.clear();
        self.stubs.clear();
        self.generation = next_generation();
        self.code.push(code).ok_or(Unsupported)
    }

    /// Executes an instruction.
    ///
    /// # Errors
    /// The exception that the guest's instruction raises, or [`NativeFault::Stale`].
    ///
    /// # Safety
    /// If [`NativeInsn::memory`] is present, then `memory` is aligned as it says, and the bytes from there that
    /// [`MemoryUse::touched`] names are mapped, readable and writable as the instruction reads and writes them.
    #[inline]
    pub unsafe fn run(
        &self,
        insn: &NativeInsn,
        gprs: &mut [u64; 16],
        rflags: &mut u64,
        vector: &mut VectorRegisters,
        memory: *mut u8,
    ) -> Result<(), NativeFault> {
        if insn.generation != self.generation {
            return Err(NativeFault::Stale);
        }
        if insn.action == Action::Call {
            // SAFETY: the caller's promise for memory; the stub is of this generation.
            unsafe { self.call(insn, gprs, rflags, vector, memory) };
            return Ok(());
        }
        // SAFETY: the same promise.
        unsafe { self.run_checked(insn, gprs, rflags, vector, memory) }
    }

    /// Calls a stub.
    ///
    /// # Safety
    /// As for [`NativeUnit::run`], and the stub is of this generation.
    #[inline(always)]
    unsafe fn call(
        &self,
        insn: &NativeInsn,
        gprs: &mut [u64; 16],
        rflags: &mut u64,
        vector: &mut VectorRegisters,
        memory: *mut u8,
    ) {
        // SAFETY: a stub of this generation starts at this offset, and follows this type's calling convention.
        let stub = unsafe { std::mem::transmute::<*const u8, Stub>(self.code.address(insn.stub)) };
        // SAFETY: the stub accesses the three values and the memory operand, as the caller promised it may.
        unsafe { stub(gprs.as_mut_ptr(), vector, memory, rflags) };
    }

    /// # Safety
    /// As for [`NativeUnit::call`].
    unsafe fn run_checked(
        &self,
        insn: &NativeInsn,
        gprs: &mut [u64; 16],
        rflags: &mut u64,
        vector: &mut VectorRegisters,
        memory: *mut u8,
    ) -> Result<(), NativeFault> {
        if insn.waits && vector.x87_exception_pending() {
            return Err(NativeFault::X87Exception);
        }
        match insn.action {
            Action::Wait => {}
            Action::ZeroUpper => vector.zero_upper(),
            Action::ZeroAll => vector.zero_all(),
            Action::LoadMxcsr => {
                let value: u32;
                // SAFETY: the four bytes of the operand are readable. Guest memory is read by one instruction.
                unsafe {
                    asm!("mov {:e}, [{}]", out(reg) value, in(reg) memory, options(nostack, preserves_flags, readonly));
                }
                return vector.set_mxcsr(value).map_err(|_| NativeFault::GeneralProtection);
            }
            // SAFETY: the four bytes of the operand are writable. Guest memory is written by one instruction.
            Action::StoreMxcsr => unsafe {
                asm!("mov [{}], {:e}", in(reg) memory, in(reg) vector.mxcsr(), options(nostack, preserves_flags));
            },
            Action::Call | Action::CheckedCall
                if insn.mxcsr != MxcsrUse::None && vector.mxcsr() & MXCSR_MASKS != MXCSR_MASKS =>
            {
                // SAFETY: the caller's promise.
                return unsafe { self.run_unmasked(insn, gprs, rflags, vector, memory) };
            }
            Action::Call | Action::CheckedCall => {
                let pointers = vector.x87_pointers();
                // SAFETY: the caller's promise.
                unsafe { self.call(insn, gprs, rflags, vector, memory) };
                if insn.restores_pointers {
                    vector.set_x87_pointers(pointers);
                }
            }
        }
        Ok(())
    }

    /// Runs an instruction for a guest that has SIMD exceptions unmasked: masked, on copies, which only become the
    /// guest's state if no unmasked exception was found. SDM vol. 1, *SIMD Floating-Point Exceptions*.
    ///
    /// # Safety
    /// As for [`NativeUnit::call`].
    #[cold]
    unsafe fn run_unmasked(
        &self,
        insn: &NativeInsn,
        gprs: &mut [u64; 16],
        rflags: &mut u64,
        vector: &mut VectorRegisters,
        memory: *mut u8,
    ) -> Result<(), NativeFault> {
        let control = vector.mxcsr();
        let mut masked = (control | MXCSR_MASKS) & !MXCSR_FLAGS;
        if control & MXCSR_UNDERFLOW_MASK == 0 && insn.mxcsr == MxcsrUse::Raises {
            // Nothing is flushed to zero where underflow is unmasked.
            masked &= !MXCSR_FLUSH;
        }
        let mut operand = Operand::new(insn.memory, vector);
        // SAFETY: the caller's promise, for the bytes that the instruction touches.
        unsafe { operand.read(memory) };
        let execute = |mxcsr: u32| {
            let (mut gprs, mut rflags, mut vector, mut copy) =
                (*gprs, *rflags, vector.clone(), operand.bytes);
            vector.mxcsr = mxcsr;
            // SAFETY: the copies are as good as the originals; the operand's copy is aligned and as long as any.
            unsafe { self.call(insn, &mut gprs, &mut rflags, &mut vector, copy.0.as_mut_ptr()) };
            (gprs, rflags, vector, copy)
        };
        let (gprs_after, rflags_after, mut after, bytes) = execute(masked);
        let mut raised = after.mxcsr & MXCSR_FLAGS;
        if control & MXCSR_UNDERFLOW_MASK == 0 {
            // Unmasked, a tiny result raises underflow even if it is exact. So it does when it is flushed to zero.
            raised |= execute(masked | MXCSR_FLUSH).2.mxcsr & MXCSR_UNDERFLOW;
        }
        let unmasked = raised & !(control >> 7);
        if unmasked != 0 && insn.mxcsr == MxcsrUse::Raises {
            let before = unmasked & MXCSR_BEFORE != 0;
            vector.mxcsr |= if before { raised & MXCSR_BEFORE } else { raised };
            return Err(NativeFault::SimdException);
        }
        after.mxcsr = control | raised;
        operand.bytes = bytes;
        let pointers = vector.x87_pointers();
        (*gprs, *rflags, *vector) = (gprs_after, rflags_after, after);
        if insn.restores_pointers {
            vector.set_x87_pointers(pointers);
        }
        // SAFETY: the caller's promise, for the bytes that the instruction touches.
        unsafe { operand.write(memory) };
        Ok(())
    }
}

/// A copy of a memory operand: only instructions of vector registers have one made, so 64 bytes suffice.
struct Operand {
    bytes: OperandBytes,
    usage: Option<MemoryUse>,
    touched: u64,
}

#[derive(Clone, Copy)]
#[repr(align(64))]
struct OperandBytes([u8; 64]);

impl Operand {
    fn new(usage: Option<MemoryUse>, vector: &VectorRegisters) -> Self {
        let touched = usage.map_or(0, |usage| usage.touched(vector));
        Self { bytes: OperandBytes([0; 64]), usage, touched }
    }

    fn touched_bytes(&self) -> impl Iterator<Item = usize> + use<> {
        let (size, touched) = (self.usage.map_or(0, |usage| usize::from(usage.size)).min(64), self.touched);
        (0..size).filter(move |i| touched >> i & 1 != 0)
    }

    /// # Safety
    /// The touched bytes from `memory` are mapped.
    unsafe fn read(&mut self, memory: *const u8) {
        if self.usage.is_some_and(|usage| usage.reads) {
            for i in self.touched_bytes() {
                // SAFETY: a touched byte.
                self.bytes.0[i] = unsafe { memory.add(i).read_volatile() };
            }
        }
    }

    /// # Safety
    /// The touched bytes from `memory` are writable if the instruction writes them.
    unsafe fn write(&self, memory: *mut u8) {
        if self.usage.is_some_and(|usage| usage.writes) {
            for i in self.touched_bytes() {
                // SAFETY: a touched byte.
                unsafe { memory.add(i).write_volatile(self.bytes.0[i]) };
            }
        }
    }
}

/// Numbers that no two generations of any two units share.
fn next_generation() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

fn action(plan: &Plan) -> Action {
    match plan.instruction.mnemonic() {
        Mnemonic::Ldmxcsr | Mnemonic::Vldmxcsr => Action::LoadMxcsr,
        Mnemonic::Stmxcsr | Mnemonic::Vstmxcsr => Action::StoreMxcsr,
        Mnemonic::Vzeroupper => Action::ZeroUpper,
        Mnemonic::Vzeroall => Action::ZeroAll,
        Mnemonic::Wait => Action::Wait,
        _ if plan.x87 || plan.mxcsr != MxcsrUse::None => Action::CheckedCall,
        _ => Action::Call,
    }
}

/// Whether the processor notes where an instruction is: all of x87 but those that work on the unit's controls.
fn is_pointed_to(plan: &Plan) -> bool {
    use Mnemonic::*;
    plan.waits
        && class(plan) == StateClass::X87
        && !matches!(plan.instruction.mnemonic(), Fldcw | Fldenv | Frstor | Frstpm)
}

/// Whether an instruction loads the pointers to the last one, or clears them.
fn sets_pointers(plan: &Plan) -> bool {
    use Mnemonic::*;
    matches!(plan.instruction.mnemonic(), Fldenv | Frstor | Frstpm | Fninit | Finit | Fnsave | Fsave)
}

fn class(plan: &Plan) -> StateClass {
    let instruction = &plan.instruction;
    let opmask = (0..instruction.op_count()).any(|i| instruction.op_register(i).is_k());
    let mmx = instruction.code().cpuid_features().contains(&CpuidFeature::MMX)
        || (0..instruction.op_count()).any(|i| instruction.op_register(i).is_mm());
    let vector = |class| if is_general(plan) { StateClass::General } else { class };
    match instruction.code().encoding() {
        _ if instruction.mnemonic() == Mnemonic::Wait => StateClass::Wait,
        EncodingKind::EVEX => StateClass::Avx512,
        EncodingKind::VEX if opmask => StateClass::Avx512,
        EncodingKind::VEX => vector(StateClass::Avx),
        _ if mmx => StateClass::Mmx,
        _ if plan.x87 => StateClass::X87,
        _ => vector(StateClass::Sse),
    }
}

/// BMI and its kin have general operands only; LDMXCSR and VZEROUPPER name no register, but are not of that kind.
fn is_general(plan: &Plan) -> bool {
    matches!(action(plan), Action::Call)
        && plan.vectors.is_empty()
        && !plan.x87
        && plan.masks_read | plan.masks_written == 0
}
