//! Running a native instruction as part of the guest: the checks that go before it, and its memory operand.

use guest_memory::Offset;
use iced_x86::{CodeSize, Instruction, Mnemonic};
use x86::{Cr4, Exception, Vector};

use super::{MemoryKind, MemoryUse, NativeFault, NativeInsn, StateClass, VectorRegisters};
use crate::cpu::Cpu;
use crate::insn::{Handler, Insn, Stop, flag};
use crate::mmu::{Access, Place, View};
use crate::mode::VectorMode;

/// The largest memory operand, in bytes.
const LARGEST: usize = 128;

/// Picks the handler of a native instruction: by what it needs besides its registers.
pub fn handler(instruction: &Instruction, native: &NativeInsn, mode: VectorMode) -> Handler {
    if let Some(refusal) = refusal(native.class, mode) {
        return refusal;
    }
    if instruction.code_size() != CodeSize::Code64 {
        match instruction.mnemonic() {
            Mnemonic::Vzeroupper => return zero_upper_of_eight,
            Mnemonic::Vzeroall => return zero_all_of_eight,
            _ => {}
        }
    }
    let flags = instruction.rflags_read() | instruction.rflags_modified() != 0;
    match (native.memory, flags) {
        (None, false) => registers,
        (None, true) => registers_and_flags,
        (Some(_), false) => memory,
        (Some(_), true) => memory_and_flags,
    }
}

/// What CR0, CR4 and XCR0 make of a class of instructions. SDM vol. 3, *Providing Operating System Support for
/// Instructions Using x87 and Vector State*.
pub(crate) fn refusal(class: StateClass, mode: VectorMode) -> Option<Handler> {
    let (em, ts) = (mode.has(VectorMode::EM), mode.has(VectorMode::TS));
    let undefined = match class {
        StateClass::General | StateClass::X87 | StateClass::Wait => false,
        StateClass::Mmx => em,
        StateClass::Sse => em || !mode.has(VectorMode::OSFXSR),
        StateClass::Avx => !mode.has(VectorMode::AVX),
        StateClass::Avx512 => !mode.has(VectorMode::AVX512),
    };
    let unavailable = match class {
        StateClass::General => false,
        StateClass::X87 => em || ts,
        StateClass::Wait => ts && mode.has(VectorMode::MP),
        _ => ts,
    };
    match (undefined, unavailable) {
        (true, _) => Some(crate::instructions::undefined),
        (false, true) => Some(device_not_available),
        (false, false) => None,
    }
}

/// VZEROUPPER where only eight registers can be named.
fn zero_upper_of_eight(cpu: &mut Cpu, _: &Insn) -> Result<(), Stop> {
    cpu.vector.zmm[..8].iter_mut().for_each(|zmm| zmm[16..].fill(0));
    Ok(())
}

/// VZEROALL where only eight registers can be named.
fn zero_all_of_eight(cpu: &mut Cpu, _: &Insn) -> Result<(), Stop> {
    cpu.vector.zmm[..8].fill([0; 64]);
    Ok(())
}

/// #NM.
fn device_not_available(cpu: &mut Cpu, _: &Insn) -> Result<(), Stop> {
    Err(cpu.raise(Exception::new(Vector::DeviceNotAvailable)))
}

fn registers(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let native = cpu.native.insns[insn.aux as usize];
    let mut flags = 0;
    call(cpu, insn, &native, &mut flags, std::ptr::null_mut())
}

fn registers_and_flags(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let native = cpu.native.insns[insn.aux as usize];
    let mut flags = cpu.flags.bits();
    call(cpu, insn, &native, &mut flags, std::ptr::null_mut())?;
    cpu.flags.set_bits(flags);
    Ok(())
}

fn memory(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    with_memory(cpu, insn, &mut 0)
}

fn memory_and_flags(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let mut flags = cpu.flags.bits();
    with_memory(cpu, insn, &mut flags)?;
    cpu.flags.set_bits(flags);
    Ok(())
}

#[inline(always)]
fn with_memory(cpu: &mut Cpu, insn: &Insn, flags: &mut u64) -> Result<(), Stop> {
    let native = cpu.native.insns[insn.aux as usize];
    let Some(operand) = native.memory else { return call(cpu, insn, &native, flags, std::ptr::null_mut()) };
    let size = u64::from(operand.size).max(1);
    if native.waits && cpu.vector.x87_exception_pending() {
        // An earlier instruction's exception goes before this one's faults.
        return Err(raise(cpu, NativeFault::X87Exception));
    }
    let linear = if insn.has(flag::CHECKED) {
        match checked_linear(cpu, insn, operand) {
            Ok(linear) => linear,
            Err(stop) => return refused_store(cpu, insn, &native, flags, stop),
        }
    } else {
        let linear = cpu.linear::<false>(insn, size)?;
        if operand.alignment > 1 && operand.is_misaligned(linear, &cpu.vector) {
            return Err(cpu.gp0());
        }
        linear
    };
    let view = cpu.mmu.view;
    let found = if operand.writes {
        // What it reads besides may be read where it may be written.
        cpu.mmu.tlb.write(view, linear, size)
    } else {
        cpu.mmu.tlb.read(view, linear, size)
    };
    match found {
        Some(offset) => in_place(cpu, insn, &native, flags, offset),
        None => through_copy(cpu, insn, &native, flags, linear),
    }
}

/// The operand's linear address outside 64-bit mode: alignment goes before the segment's limit and type, and bytes
/// that a mask leaves alone count for neither.
#[inline(never)]
fn checked_linear(cpu: &mut Cpu, insn: &Insn, operand: MemoryUse) -> Result<u64, Stop> {
    let offset = cpu.effective(insn);
    let linear = offset.wrapping_add(cpu.bases[usize::from(insn.segment & 7)]) & 0xffff_ffff;
    if operand.is_misaligned(linear, &cpu.vector) {
        return Err(cpu.gp0());
    }
    if operand.kind == MemoryKind::Whole {
        for (at, size) in pieces(operand.size.into()) {
            cpu.segmented(insn.segment, offset.wrapping_add(at) & 0xffff_ffff, size, operand.writes)?;
        }
        return Ok(linear);
    }
    let touched = operand.touched(&cpu.vector) & operand.all_bytes();
    for at in (0..u64::from(operand.size).min(64)).filter(|at| touched >> at & 1 != 0) {
        cpu.segmented(insn.segment, offset.wrapping_add(at) & 0xffff_ffff, 1, operand.writes)?;
    }
    Ok(linear)
}

/// The accesses that an operand is made of, as places in it and sizes: each of them is on one side of 4 GiB, or refused.
/// x87's environment has seven fields, an 80-bit number its significand and the rest.
fn pieces(size: u64) -> impl Iterator<Item = (u64, u64)> {
    let (fields, field, numbers) = match size {
        10 => (0, 0, 1),
        14 => (7, 2, 0),
        28 => (7, 4, 0),
        94 => (7, 2, 8),
        108 => (7, 4, 8),
        _ => (1, size.max(1), 0),
    };
    let numbers = (0..numbers).map(move |n| fields * field + 10 * n).flat_map(|at| [(at, 8), (at + 8, 2)]);
    (0..fields).map(move |n| (n * field, field)).chain(numbers)
}

#[inline(always)]
fn in_place(
    cpu: &mut Cpu,
    insn: &Insn,
    native: &NativeInsn,
    flags: &mut u64,
    offset: Offset,
) -> Result<(), Stop> {
    let at = cpu.memory.host_address(offset).unwrap_or(0);
    call(cpu, insn, native, flags, at as *mut u8)
}

/// Executes the instruction; `at` is its operand, present whenever it has one, and no shorter than it.
#[inline(always)]
fn call(cpu: &mut Cpu, insn: &Insn, native: &NativeInsn, flags: &mut u64, at: *mut u8) -> Result<(), Stop> {
    // SAFETY: `at` is either a copy on the stack that is as large as any operand, or guest RAM within a page
    // (the translation cache gave its offset for the operand's whole size), which stays mapped while `cpu` has it.
    let result = unsafe { cpu.native.unit.run(native, cpu.registers.all_mut(), flags, &mut cpu.vector, at) };
    result.map_err(|fault| raise(cpu, fault))?;
    if native.is_pointed_to {
        note_x87(cpu, insn, native);
    }
    Ok(())
}

/// An x87 instruction is complete: FIP points to it. FOP and FDP follow only where it raised an exception that is not
/// masked. SDM vol. 1, *x87 FPU Instruction and Data (Operand) Pointers*.
fn note_x87(cpu: &mut Cpu, insn: &Insn, native: &NativeInsn) {
    let (mut opcode, _, mut data) = cpu.vector.x87_pointers();
    if cpu.vector.x87_exception_pending() {
        opcode = x87_opcode(cpu, insn).unwrap_or(opcode);
        if native.memory.is_some() {
            data = cpu.effective(insn);
        }
    }
    let instruction = cpu.this_rip(insn);
    cpu.vector.set_x87_pointers((opcode, instruction, data));
}

/// FOP of an instruction: the low bits of its first opcode byte, and the second byte.
#[cold]
fn x87_opcode(cpu: &mut Cpu, insn: &Insn) -> Option<u16> {
    let mut bytes = [0; 15];
    let bytes = bytes.get_mut(..usize::from(insn.len))?;
    let rip = cpu.this_rip(insn);
    let linear = if cpu.mode.is_64() { rip } else { rip.wrapping_add(cpu.bases[1]) & 0xffff_ffff };
    if cpu.fetch_bytes(cpu.mmu.fetch_view(), linear, bytes).is_err() {
        // Another processor has taken the page away meanwhile.
        cpu.fault = None;
        return None;
    }
    // No prefix looks like these opcodes.
    let at = bytes.iter().position(|byte| byte & 0xf8 == 0xd8)?;
    Some(u16::from(bytes[at] & 7) << 8 | u16::from(*bytes.get(at + 1)?))
}

#[cold]
fn raise(cpu: &mut Cpu, fault: NativeFault) -> Stop {
    match fault {
        NativeFault::X87Exception => cpu.raise(Exception::new(Vector::X87FloatingPoint)),
        NativeFault::SimdException if cpu.cr4.contains(Cr4::OSXMMEXCPT) => {
            cpu.raise(Exception::new(Vector::SimdFloatingPoint))
        }
        NativeFault::SimdException => cpu.ud(),
        NativeFault::GeneralProtection => cpu.gp0(),
        // Stubs are only forgotten while a block is decoded, and every block with them.
        NativeFault::Stale => cpu.ud(),
    }
}

#[repr(align(64))]
struct Copy([u8; LARGEST]);

/// The slow way: the operand crosses a page, is not in the translation cache, or is a device's.
#[cold]
#[inline(never)]
fn through_copy(
    cpu: &mut Cpu,
    insn: &Insn,
    native: &NativeInsn,
    flags: &mut u64,
    linear: u64,
) -> Result<(), Stop> {
    let Some(operand) = native.memory else { return Ok(()) };
    let size = usize::from(operand.size).clamp(1, LARGEST);
    let access = if operand.writes { Access::Write } else { Access::Read };
    if operand.kind == MemoryKind::Whole && !operand.reads {
        return store_copy(cpu, insn, native, flags, linear);
    }
    if operand.kind == MemoryKind::Whole {
        let place = place(cpu, operand, linear, access)?;
        let mut copy = Copy([0; LARGEST]);
        if operand.reads {
            cpu.read_place(place, &mut copy.0[..size]);
        }
        call(cpu, insn, native, flags, copy.0.as_mut_ptr())?;
        if operand.writes {
            cpu.write_place(place, &copy.0[..size]);
        }
        return Ok(());
    }
    // Masked: only the touched bytes may fault; each is looked up alone.
    let mask = if cpu.mode.is_64() { u64::MAX } else { 0xffff_ffff };
    let touched = operand.touched(&cpu.vector);
    let bytes = (0..size.min(64) as u64).filter(|at| touched >> at & 1 != 0);
    if let Some(bad) =
        bytes.map(|at| linear.wrapping_add(at) & mask).find(|&at| !cpu.mmu.paging.is_data_canonical(at))
    {
        // Before any of it is looked up.
        return Err(cpu.raise(Exception { address: bad, ..Exception::gp(0) }));
    }
    if operand.checks_alignment && touched != 0 && cpu.mmu.view == View::UserAligned {
        cpu.check_alignment(linear, size as u64)?;
    }
    let mut places: [Option<Place>; 64] = [None; 64];
    let mut copy = Copy([0; LARGEST]);
    for (at, slot) in
        places.iter_mut().enumerate().take(size.min(64)).filter(|(at, _)| touched >> at & 1 != 0)
    {
        let place = cpu.place_for(linear.wrapping_add(at as u64) & mask, 1, access)?;
        if operand.reads {
            cpu.read_place(place, &mut copy.0[at..=at]);
        }
        *slot = Some(place);
    }
    call(cpu, insn, native, flags, copy.0.as_mut_ptr())?;
    if operand.writes {
        for (at, place) in places.iter().enumerate() {
            if let Some(place) = place {
                cpu.write_place(*place, &copy.0[at..=at]);
            }
        }
    }
    Ok(())
}

/// Where a whole operand lies.
fn place(cpu: &mut Cpu, operand: MemoryUse, linear: u64, access: Access) -> Result<Place, Stop> {
    let size = u64::from(operand.size).clamp(1, LARGEST as u64);
    match operand.checks_alignment {
        true => cpu.place_for(linear, size, access),
        false => cpu.place_unchecked(linear, size, access),
    }
}

/// A plain store: what computing its value raises goes before the faults of the access, and an unmasked x87 exception
/// other than the inexact result keeps it from happening. SDM vol. 1, *x87 FPU Exception Conditions*.
fn store_copy(
    cpu: &mut Cpu,
    insn: &Insn,
    native: &NativeInsn,
    flags: &mut u64,
    linear: u64,
) -> Result<(), Stop> {
    let Some(operand) = native.memory else { return Ok(()) };
    let size = usize::from(operand.size).clamp(1, LARGEST);
    let mut copy = Copy([0; LARGEST]);
    // Where there is a place, nothing will have to be undone. A breakpoint there is not to be met before that.
    let last = linear.wrapping_add(size as u64 - 1);
    if !cpu.breakpoints.in_data_page(linear) && !cpu.breakpoints.in_data_page(last) {
        if let Ok(place) = place(cpu, operand, linear, Access::Write) {
            if computes(cpu, insn, native, flags, &mut copy)? {
                cpu.write_place(place, &copy.0[..size]);
            }
            return Ok(());
        }
        cpu.fault = None;
    }
    let before = cpu.vector.clone();
    if !computes(cpu, insn, native, flags, &mut copy)? {
        return Ok(());
    }
    match place(cpu, operand, linear, Access::Write) {
        // Another processor has made one meanwhile.
        Ok(place) => {
            cpu.write_place(place, &copy.0[..size]);
            Ok(())
        }
        Err(stop) => {
            undo(cpu, before);
            Err(stop)
        }
    }
}

/// Computes what a store would write. Tells whether it is to be written.
fn computes(
    cpu: &mut Cpu,
    insn: &Insn,
    native: &NativeInsn,
    flags: &mut u64,
    copy: &mut Copy,
) -> Result<bool, Stop> {
    /// All but the inexact result.
    const BEFORE_STORE: u16 = 0x1f;
    let pending = cpu.vector.x87_exception_pending();
    call(cpu, insn, native, flags, copy.0.as_mut_ptr())?;
    let unmasked = cpu.vector.x87_status() & !cpu.vector.x87_control() & BEFORE_STORE;
    Ok(native.class != StateClass::X87 || unmasked == 0 || pending)
}

/// After the fault of a store: the registers as before; the flags in MXCSR stay.
fn undo(cpu: &mut Cpu, before: Box<VectorRegisters>) {
    let mxcsr = cpu.vector.mxcsr();
    cpu.vector = before;
    // What was there a moment ago has no reserved bits.
    let _ = cpu.vector.set_mxcsr(mxcsr);
}

/// A segment refuses the operand: still a store's own exceptions go first.
#[cold]
fn refused_store(
    cpu: &mut Cpu,
    insn: &Insn,
    native: &NativeInsn,
    flags: &mut u64,
    stop: Stop,
) -> Result<(), Stop> {
    if native.memory.is_none_or(|operand| operand.reads || operand.kind != MemoryKind::Whole) {
        return Err(stop);
    }
    let (fault, before) = (cpu.fault, cpu.vector.clone());
    if !computes(cpu, insn, native, flags, &mut Copy([0; LARGEST]))? {
        return Ok(());
    }
    undo(cpu, before);
    cpu.fault = fault;
    Err(stop)
}
