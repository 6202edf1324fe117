//! Near control flow. SDM vol. 2, *JMP*, *Jcc*, *CALL*, *RET*, *LOOP*.

use x86::{Exception, Vector};

use super::shape::{Form, Shape};
use crate::cpu::Cpu;
use crate::insn::{Handler, Insn, Stop, flag};
use crate::width::Width;

/// Jcc: RIP already stands behind the block, which is where no jump leads.
pub fn jcc<const CC: u8>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    if cpu.flags.condition::<CC>() { branch(cpu, insn) } else { Ok(()) }
}

/// To the address in the instruction. Few in 64-bit mode can be one where no code may be.
#[inline(always)]
fn branch(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    if insn.has(flag::CHECKED) {
        cpu.check_near(insn.imm)?;
    }
    cpu.rip = insn.imm;
    Ok(())
}

/// JMP to an address in the instruction, a register or memory.
pub fn jmp(shape: &Shape) -> Option<Handler> {
    Some(match (shape.form, shape.size) {
        (Form::Reg, 2) => jmp_reg::<u16>,
        (Form::Reg, 4) => jmp_reg::<u32>,
        (Form::Reg, _) => jmp_reg::<u64>,
        (Form::Mem, 2) => jmp_mem::<u16>,
        (Form::Mem, 4) => jmp_mem::<u32>,
        (Form::Mem, _) => jmp_mem::<u64>,
        _ => jmp_near,
    })
}

fn jmp_near(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    branch(cpu, insn)
}
fn jmp_reg<W: Width>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let target = W::read(&cpu.registers, insn.r1).zext();
    cpu.check_near(target)?;
    cpu.rip = target;
    Ok(())
}
fn jmp_mem<W: Width>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let target = cpu.load::<W>(insn)?.zext();
    cpu.check_near(target)?;
    cpu.rip = target;
    Ok(())
}

impl Cpu {
    /// Whether a near branch may go to a target: canonical, or within the code segment.
    ///
    /// # Errors
    /// #GP(0).
    #[inline(always)]
    pub fn check_near(&mut self, target: u64) -> Result<(), Stop> {
        if self.mode.is_64() {
            if !self.mmu.paging.is_canonical(target) {
                return Err(self.gp0());
            }
        } else if target > u64::from(self.segments[1].limit) {
            return Err(self.gp0());
        }
        Ok(())
    }
}

/// CALL. The size of the return address is the stack operand's.
pub fn call(shape: &Shape) -> Option<Handler> {
    Some(match (shape.form, shape.size) {
        (Form::Reg, 2) => call_reg::<u16>,
        (Form::Reg, 4) => call_reg::<u32>,
        (Form::Reg, _) => call_reg::<u64>,
        (Form::Mem, 2) => call_mem::<u16>,
        (Form::Mem, 4) => call_mem::<u32>,
        (Form::Mem, _) => call_mem::<u64>,
        (_, 2) => call_near::<u16>,
        (_, 4) => call_near::<u32>,
        _ => call_near::<u64>,
    })
}

#[inline(always)]
fn call_to<W: Width>(cpu: &mut Cpu, insn: &Insn, target: u64) -> Result<(), Stop> {
    if let Err(stop) = cpu.check_near(target) {
        return Err(refused_call::<W>(cpu, insn, stop));
    }
    let next = cpu.next_rip(insn);
    cpu.push(W::truncate(next))?;
    cpu.rip = target;
    Ok(())
}
/// A call to where no code may be: the return address is stored first, and faults of the stack go before.
#[cold]
fn refused_call<W: Width>(cpu: &mut Cpu, insn: &Insn, stop: Stop) -> Stop {
    let (fault, next) = (cpu.fault, W::truncate(cpu.next_rip(insn)));
    let size = u64::from(W::BITS / 8);
    let pointer = cpu.registers.get(4).wrapping_sub(size);
    let on_stack = cpu.stack_linear(pointer, size, true);
    if let Err(stop) = on_stack.and_then(|linear| cpu.store_linear(linear, next)) {
        return stop;
    }
    cpu.fault = fault;
    stop
}
fn call_near<W: Width>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    call_to::<W>(cpu, insn, insn.imm)
}
fn call_reg<W: Width>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let target = W::read(&cpu.registers, insn.r1).zext();
    call_to::<W>(cpu, insn, target)
}
fn call_mem<W: Width>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let target = cpu.load::<W>(insn)?.zext();
    call_to::<W>(cpu, insn, target)
}

/// RET, with the bytes that it releases as immediate.
pub fn ret(shape: &Shape) -> Option<Handler> {
    Some(match shape.size {
        2 => ret_near::<u16>,
        4 => ret_near::<u32>,
        _ => ret_near::<u64>,
    })
}

fn ret_near<W: Width>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let target = cpu.peek::<W>(0)?.zext();
    cpu.check_near(target)?;
    cpu.discard(u64::from(W::BITS / 8) + (insn.imm & 0xffff));
    cpu.rip = target;
    Ok(())
}

/// What decides a LOOP after its count.
fn loop_while(cpu: &mut Cpu, insn: &Insn, condition: bool) -> Result<(), Stop> {
    let mask = insn.address_mask();
    let old = cpu.registers.get(1);
    let count = old.wrapping_sub(1) & mask;
    // A 32-bit count clears the upper half, a 16-bit one keeps what is above it.
    let kept = if mask == 0xffff { old & !mask } else { 0 };
    if count != 0 && condition {
        branch(cpu, insn)?;
    }
    cpu.registers.set(1, kept | count);
    Ok(())
}

/// LOOP.
pub fn loop_(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    loop_while(cpu, insn, true)
}
/// LOOPE.
pub fn loope(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let zf = cpu.flags.zf();
    loop_while(cpu, insn, zf)
}
/// LOOPNE.
pub fn loopne(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let zf = cpu.flags.zf();
    loop_while(cpu, insn, !zf)
}
/// JCXZ, JECXZ, JRCXZ.
pub fn jcxz(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    if cpu.registers.get(1) & insn.address_mask() == 0 { branch(cpu, insn) } else { Ok(()) }
}

/// BOUND: #BR where the index is not between the two bounds in memory.
pub fn bound(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let size = u64::from(insn.size);
    let linear = cpu.linear::<false>(insn, 2 * size)?;
    let lower = cpu.load_sized(linear, insn.size)?;
    let upper = cpu.load_sized(linear.wrapping_add(size) & 0xffff_ffff, insn.size)?;
    let index = cpu.gpr_sized(insn.r1, insn.size);
    let signed = |value: u64| if size == 2 { i64::from(value as i16) } else { i64::from(value as i32) };
    if signed(index) < signed(lower) || signed(index) > signed(upper) {
        return Err(cpu.raise(Exception::new(Vector::BoundRange)));
    }
    Ok(())
}
