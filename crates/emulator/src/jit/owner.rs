//! Where the vCPU's state stands that translated code reads and writes itself: offsets in the interpreter that owns it.

use std::mem::offset_of;

use x86::{Segment, SegmentRegister};

use crate::interpreter::Interpreter;
use crate::mmu::{Tlb, View, ViewState};
use crate::pmu::Pmu;

/// RFLAGS without the arithmetic flags, 64 bits.
pub const SYSTEM_FLAGS: i32 = offset_of!(Interpreter, cpu.system_flags) as i32;
/// The mode, 32 bits.
pub const MODE: i32 = offset_of!(Interpreter, cpu.mode) as i32;
/// The present view, a byte.
pub const VIEW: i32 = offset_of!(Interpreter, cpu.mmu.view) as i32;
/// CR4.SMAP, a byte.
pub const SMAP: i32 = offset_of!(Interpreter, cpu.mmu.paging.smap) as i32;
/// CR4.
pub const CR4: i32 = offset_of!(Interpreter, cpu.cr4) as i32;
/// IA32_EFER.
pub const EFER: i32 = offset_of!(Interpreter, cpu.efer) as i32;
/// IA32_STAR.
pub const STAR: i32 = offset_of!(Interpreter, cpu.msrs.star) as i32;
/// IA32_LSTAR.
pub const LSTAR: i32 = offset_of!(Interpreter, cpu.msrs.lstar) as i32;
/// IA32_FMASK.
pub const FMASK: i32 = offset_of!(Interpreter, cpu.msrs.fmask) as i32;
/// IA32_KERNEL_GS_BASE.
pub const KERNEL_GS_BASE: i32 = offset_of!(Interpreter, cpu.msrs.kernel_gs_base) as i32;
/// IA32_TSC_AUX.
pub const TSC_AUX: i32 = offset_of!(Interpreter, cpu.msrs.tsc_aux) as i32;
/// What is added to the machine's time-stamp counter.
pub const TSC_OFFSET: i32 = offset_of!(Interpreter, cpu.msrs.tsc_offset) as i32;
/// Whether STI or a load of SS was the last instruction, a byte.
pub const SHADOW: i32 = offset_of!(Interpreter, cpu.shadow) as i32;
/// The count of instructions when that began.
pub const SHADOW_BEGAN: i32 = offset_of!(Interpreter, shadow_began) as i32;
/// Whether an interrupt waits for RFLAGS.IF, a byte.
pub const INTERRUPT_WAITS: i32 = offset_of!(Interpreter, interrupt_waits) as i32;
/// Whether performance counters may count, a byte.
pub const PMU_ACTIVE: i32 = (offset_of!(Interpreter, cpu.pmu) + Pmu::ACTIVE_OFFSET) as i32;

/// What translated code takes over with a view.
pub const fn view_state(view: View) -> i32 {
    (offset_of!(Interpreter, cpu.mmu.tlb) + Tlb::STATES_OFFSET + view as usize * size_of::<ViewState>())
        as i32
}

/// A segment register's hidden and visible parts.
pub const fn segment(register: SegmentRegister) -> i32 {
    (offset_of!(Interpreter, cpu.segments) + register as usize * size_of::<Segment>()) as i32
}

/// A segment register's base where accesses find it.
pub const fn base(register: SegmentRegister) -> i32 {
    offset_of!(Interpreter, cpu.bases) as i32 + register as i32 * 8
}

/// Offsets in a segment register.
pub const SEGMENT_SELECTOR: i32 = offset_of!(Segment, selector) as i32;
/// The base.
pub const SEGMENT_BASE: i32 = offset_of!(Segment, base) as i32;
/// The limit, 32 bits.
pub const SEGMENT_LIMIT: i32 = offset_of!(Segment, limit) as i32;
/// The attributes, 32 bits.
pub const SEGMENT_ATTRIBUTES: i32 = offset_of!(Segment, attributes) as i32;
