//! Gathers and scatters: one memory operand for each element. SDM vol. 2, *VGATHERDPS*, *VPSCATTERDD* and their kin.
//!
//! A fault leaves the elements before it done, and their mask bits clear: the instruction goes on from there.

use iced_x86::{EncodingKind, Instruction, OpKind};
use x86::{Exception, Vector};

use crate::cpu::Cpu;
use crate::insn::{FLAT, Handler, Insn, Stop, flag};
use crate::mmu::View;
use crate::native::StateClass;
use crate::native::execute;

/// What the operands' numbers do not say, as [`Insn::aux`] keeps it.
#[derive(Clone, Copy)]
struct Parameters {
    /// The opmask register that chooses elements; without one, the signs of a vector register's elements do.
    opmask: Option<u8>,
    /// Bytes of an index: 4 or 8.
    index: usize,
    /// Bytes of an element: 4 or 8.
    element: usize,
    /// How many elements there are.
    count: usize,
}

/// Packs the parameters of an instruction.
pub fn parameters(instruction: &Instruction) -> u32 {
    let index: usize = if instruction.is_vsib64() { 8 } else { 4 };
    let element = if instruction.memory_size().size() == 8 { 8 } else { 4 };
    let data = (0..2).find(|&n| instruction.op_kind(n) == OpKind::Register).unwrap_or(0);
    let data = instruction.op_register(data).size() / element;
    let count = data.min(instruction.memory_index().size() / index);
    let opmask = match instruction.encoding() {
        EncodingKind::EVEX => 8 | instruction.op_mask().number() as u32,
        _ => 0,
    };
    opmask | (index as u32) << 4 | (element as u32) << 8 | (count as u32) << 12
}

impl Parameters {
    fn of(insn: &Insn) -> Self {
        let aux = insn.aux;
        Self {
            opmask: (aux & 8 != 0).then_some((aux & 7) as u8),
            index: (aux >> 4 & 15) as usize,
            element: (aux >> 8 & 15) as usize,
            count: (aux >> 12 & 31) as usize,
        }
    }
}

/// What runs instead where the processor's state does not allow the instruction.
pub(super) fn refusal(cpu: &Cpu, instruction: &Instruction) -> Option<Handler> {
    if cpu.mode.is_real_or_v86() {
        return Some(super::undefined);
    }
    let evex = instruction.encoding() == EncodingKind::EVEX;
    let class = if evex { StateClass::Avx512 } else { StateClass::Avx };
    execute::refusal(class, cpu.mode.vector())
}

/// The linear address of an element, checked where there are segments to check.
fn linear(cpu: &mut Cpu, insn: &Insn, how: Parameters, n: usize, write: bool) -> Result<u64, Stop> {
    let indices = &cpu.vector.zmm[usize::from(insn.index & 31)];
    let at = n * how.index;
    let index = if how.index == 8 {
        indices[at..].first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes))
    } else {
        indices[at..].first_chunk().map_or(0, |bytes| i32::from_le_bytes(*bytes) as u64)
    };
    let offset = cpu.registers.get(insn.base).wrapping_add(index << insn.scale).wrapping_add(insn.disp)
        & insn.address_mask();
    if insn.has(flag::CHECKED) {
        return cpu.segmented(insn.segment, offset, how.element as u64, write);
    }
    let address = offset.wrapping_add(cpu.bases[usize::from(insn.segment & 7)]);
    if !cpu.mmu.paging.is_data_canonical(address) {
        // RSP and RBP as the base mean the stack.
        let stack = matches!(insn.base, 4 | 5) && insn.segment == FLAT;
        let vector = if stack { Vector::StackFault } else { Vector::GeneralProtection };
        return Err(cpu.raise(Exception::with_code(vector, 0)));
    }
    Ok(address)
}

/// Whether an element is chosen.
fn chosen(cpu: &Cpu, insn: &Insn, how: Parameters, n: usize) -> bool {
    match how.opmask {
        Some(mask) => cpu.vector.k[usize::from(mask & 7)] >> n & 1 != 0,
        None => cpu.vector.zmm[usize::from(insn.r3 & 31)][(n + 1) * how.element - 1] >> 7 != 0,
    }
}

/// An element is done: it is no longer chosen.
fn done(cpu: &mut Cpu, insn: &Insn, how: Parameters, n: usize) {
    match how.opmask {
        Some(mask) => cpu.vector.k[usize::from(mask & 7)] &= !(1 << n),
        None => cpu.vector.zmm[usize::from(insn.r3 & 31)][n * how.element..(n + 1) * how.element].fill(0),
    }
}

/// Runs a gather or scatter: neither checks alignment.
fn without_alignment_checks(
    cpu: &mut Cpu,
    insn: &Insn,
    run: fn(&mut Cpu, &Insn) -> Result<(), Stop>,
) -> Result<(), Stop> {
    let view = cpu.mmu.view;
    if view == View::UserAligned {
        cpu.mmu.view = View::User;
    }
    let result = run(cpu, insn);
    cpu.mmu.view = view;
    result
}

/// VGATHER and VPGATHER.
pub fn gather(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    without_alignment_checks(cpu, insn, gather_elements)
}

/// VSCATTER and VPSCATTER.
pub fn scatter(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    without_alignment_checks(cpu, insn, scatter_elements)
}

fn gather_elements(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let how = Parameters::of(insn);
    let destination = usize::from(insn.r1 & 31);
    if how.opmask.is_none() {
        // The mask is widened to whole elements before anything is read.
        for n in 0..how.count {
            let fill = if chosen(cpu, insn, how, n) { 0xff } else { 0 };
            cpu.vector.zmm[usize::from(insn.r3 & 31)][n * how.element..(n + 1) * how.element].fill(fill);
        }
    }
    for n in 0..how.count {
        if chosen(cpu, insn, how, n) {
            let at = linear(cpu, insn, how, n, false)?;
            let value = cpu.load_sized(at, how.element as u8)?.to_le_bytes();
            let range = n * how.element..(n + 1) * how.element;
            cpu.vector.zmm[destination][range].copy_from_slice(&value[..how.element]);
        }
        done(cpu, insn, how, n);
    }
    cpu.vector.zmm[destination][how.count * how.element..].fill(0);
    match how.opmask {
        Some(mask) => cpu.vector.k[usize::from(mask & 7)] = 0,
        None => cpu.vector.zmm[usize::from(insn.r3 & 31)].fill(0),
    }
    Ok(())
}

fn scatter_elements(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let how = Parameters::of(insn);
    let source = usize::from(insn.r2 & 31);
    for n in (0..how.count).filter(|&n| n < 64) {
        if chosen(cpu, insn, how, n) {
            let at = linear(cpu, insn, how, n, true)?;
            let part = &cpu.vector.zmm[source][n * how.element..(n + 1) * how.element];
            if how.element == 8 {
                let value = part.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
                cpu.store_linear(at, value)?;
            } else {
                let value = part.first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes));
                cpu.store_linear(at, value)?;
            }
        }
        done(cpu, insn, how, n);
    }
    if let Some(mask) = how.opmask {
        cpu.vector.k[usize::from(mask & 7)] = 0;
    }
    Ok(())
}
