//! The stack. SDM vol. 2, *PUSH*, *POP*, *PUSHA*, *POPA*, *ENTER*, *LEAVE*.

use x86::SegmentRegister;

use super::shape::{Form, Shape, by_size_from_16};
use crate::cpu::Cpu;
use crate::insn::{Handler, Insn, Stop};
use crate::width::Width;

/// RSP's number.
const RSP: u8 = 4;
/// RBP's number.
const RBP: u8 = 5;

impl Cpu {
    /// The linear address of `size` bytes at a stack pointer.
    ///
    /// # Errors
    /// [`Stop::Fault`] with #SS(0) outside the stack segment.
    #[inline(always)]
    pub fn stack_linear(&mut self, pointer: u64, size: u64, write: bool) -> Result<u64, Stop> {
        if self.mode.is_64() {
            return Ok(pointer);
        }
        self.segmented(SegmentRegister::Ss as u8, pointer & self.stack_mask(), size, write)
    }

    /// Sets RSP, ESP or SP, whichever the stack segment uses.
    #[inline(always)]
    pub fn set_stack_pointer(&mut self, value: u64) {
        let mask = self.stack_mask();
        let old = self.registers.get(RSP);
        let kept = if mask == 0xffff { old & !mask } else { 0 };
        self.registers.set(RSP, kept | value & mask);
    }

    /// Pushes a value.
    ///
    /// # Errors
    /// [`Stop::Fault`], with the stack pointer unchanged.
    #[inline(always)]
    pub fn push<W: Width>(&mut self, value: W) -> Result<(), Stop> {
        let size = u64::from(W::BITS / 8);
        let pointer = self.registers.get(RSP).wrapping_sub(size);
        let linear = self.stack_linear(pointer, size, true)?;
        self.store_linear(linear, value)?;
        self.set_stack_pointer(pointer);
        Ok(())
    }

    /// Pushes a value of 2, 4 or 8 bytes.
    ///
    /// # Errors
    /// As [`Cpu::push`].
    pub fn push_sized(&mut self, size: u8, value: u64) -> Result<(), Stop> {
        match size {
            2 => self.push(value as u16),
            4 => self.push(value as u32),
            _ => self.push(value),
        }
    }

    /// Reads the value `depth` bytes above the stack pointer, which stays.
    ///
    /// # Errors
    /// [`Stop::Fault`].
    #[inline(always)]
    pub fn peek<W: Width>(&mut self, depth: u64) -> Result<W, Stop> {
        let pointer = self.registers.get(RSP).wrapping_add(depth);
        let linear = self.stack_linear(pointer, u64::from(W::BITS / 8), false)?;
        self.load_linear(linear)
    }

    /// Reads a value of 2, 4 or 8 bytes above the stack pointer.
    ///
    /// # Errors
    /// [`Stop::Fault`].
    pub fn peek_sized(&mut self, size: u8, depth: u64) -> Result<u64, Stop> {
        match size {
            2 => self.peek::<u16>(depth).map(u64::from),
            4 => self.peek::<u32>(depth).map(u64::from),
            _ => self.peek::<u64>(depth),
        }
    }

    /// Moves the stack pointer up.
    #[inline(always)]
    pub fn discard(&mut self, bytes: u64) {
        let pointer = self.registers.get(RSP).wrapping_add(bytes);
        self.set_stack_pointer(pointer);
    }
}

/// PUSH of a general register, memory or an immediate.
pub fn push(shape: &Shape) -> Option<Handler> {
    Some(match shape.form {
        Form::Reg => by_size_from_16!(shape.size, push_reg),
        Form::Mem => by_size_from_16!(shape.size, push_mem),
        Form::Imm => by_size_from_16!(shape.size, push_imm),
        _ => return None,
    })
}

fn push_reg<W: Width>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let value = W::read(&cpu.registers, insn.r1);
    cpu.push(value)
}
fn push_mem<W: Width>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let value = cpu.load::<W>(insn)?;
    cpu.push(value)
}
fn push_imm<W: Width>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    cpu.push(W::truncate(insn.imm))
}

/// POP to a general register or memory.
pub fn pop(shape: &Shape) -> Option<Handler> {
    Some(match shape.form {
        Form::Reg => by_size_from_16!(shape.size, pop_reg),
        Form::Mem => by_size_from_16!(shape.size, pop_mem),
        _ => return None,
    })
}

fn pop_reg<W: Width>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let value = cpu.peek::<W>(0)?;
    cpu.discard(u64::from(W::BITS / 8));
    W::write(&mut cpu.registers, insn.r1, value);
    Ok(())
}

/// An address that uses RSP is computed after the stack pointer has moved.
fn pop_mem<W: Width>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let value = cpu.peek::<W>(0)?;
    let before = cpu.registers.get(RSP);
    cpu.discard(u64::from(W::BITS / 8));
    cpu.store(insn, value).inspect_err(|_| cpu.registers.set(RSP, before))
}

/// PUSHA and PUSHAD.
pub fn pusha(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let before = cpu.registers.get(RSP);
    for number in 0..8 {
        let value = if number == RSP { before } else { cpu.registers.get(number) };
        cpu.push_sized(insn.size, value).inspect_err(|_| cpu.registers.set(RSP, before))?;
    }
    Ok(())
}

/// POPA and POPAD.
pub fn popa(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let size = u64::from(insn.size);
    let mut values = [0; 8];
    for (at, value) in values.iter_mut().enumerate() {
        *value = cpu.peek_sized(insn.size, at as u64 * size)?;
    }
    for (number, &value) in (0..8u8).rev().zip(&values).filter(|&(number, _)| number != RSP) {
        match insn.size {
            2 => u16::write(&mut cpu.registers, number, value as u16),
            _ => u32::write(&mut cpu.registers, number, value as u32),
        }
    }
    cpu.discard(8 * size);
    Ok(())
}

/// LEAVE.
pub fn leave(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let before = cpu.registers.get(RSP);
    let frame = cpu.registers.get(RBP);
    cpu.set_stack_pointer(frame);
    let value = cpu.peek_sized(insn.size, 0).inspect_err(|_| cpu.registers.set(RSP, before))?;
    cpu.discard(u64::from(insn.size));
    write_sized(cpu, insn.size, RBP, value);
    Ok(())
}

/// ENTER, with its nesting level.
pub fn enter(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let (before, frame) = (cpu.registers.get(RSP), cpu.registers.get(RBP));
    build_frame(cpu, insn, frame).inspect_err(|_| cpu.registers.set(RSP, before))
}

fn build_frame(cpu: &mut Cpu, insn: &Insn, frame: u64) -> Result<(), Stop> {
    let (size, level, locals) = (u64::from(insn.size), insn.aux as u64 & 31, insn.imm & 0xffff);
    cpu.push_sized(insn.size, frame)?;
    let new_frame = cpu.registers.get(RSP);
    for n in 1..level {
        let linear = cpu.stack_linear(frame.wrapping_sub(n * size), size, false)?;
        let outer = match size {
            2 => u64::from(cpu.load_linear::<u16>(linear)?),
            4 => u64::from(cpu.load_linear::<u32>(linear)?),
            _ => cpu.load_linear::<u64>(linear)?,
        };
        cpu.push_sized(insn.size, outer)?;
    }
    if level > 0 {
        cpu.push_sized(insn.size, new_frame)?;
    }
    let pointer = cpu.registers.get(RSP).wrapping_sub(locals);
    // The last byte of the frame must be writable.
    let linear = cpu.stack_linear(pointer, size, true)?;
    cpu.place_linear(linear, size)?;
    cpu.set_stack_pointer(pointer);
    write_sized(cpu, insn.size, RBP, new_frame);
    Ok(())
}

fn write_sized(cpu: &mut Cpu, size: u8, number: u8, value: u64) {
    match size {
        2 => u16::write(&mut cpu.registers, number, value as u16),
        4 => u32::write(&mut cpu.registers, number, value as u32),
        _ => cpu.registers.set(number, value),
    }
}
