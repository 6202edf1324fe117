//! Port I/O. SDM vol. 1, *Input/Output*.

use engine::Space;
use x86::descriptor::Attributes;

use super::shape::{Form, Shape};
use crate::cpu::Cpu;
use crate::insn::{Handler, Insn, Stop};
use crate::mmu::View;
use crate::width::Width;

impl Cpu {
    /// Whether the program may use a port: CPL within IOPL, or the task's I/O permission bitmap allows it. Breakpoints
    /// on the port are noted.
    ///
    /// # Errors
    /// #GP(0); [`Stop::OwnPage`] for a breakpoint.
    pub fn check_port(&mut self, port: u16, size: u32) -> Result<(), Stop> {
        self.check_port_rights(port, size)?;
        self.watch_port(port, size)
    }

    fn check_port_rights(&mut self, port: u16, size: u32) -> Result<(), Stop> {
        if !self.mode.is_protected() || !self.mode.is_v86() && self.cpl() <= self.system_flags.iopl() {
            return Ok(());
        }
        let tss = self.tr;
        let is_32_bit = tss.attributes.bits() & 0xd == 9;
        if !is_32_bit || tss.limit < 103 || !tss.attributes.contains(Attributes::P) {
            return Err(self.gp0());
        }
        let map = self.load_as::<u16>(View::Supervisor, tss.base.wrapping_add(102))?;
        let byte = u32::from(map) + u32::from(port) / 8;
        if byte + 1 > tss.limit {
            return Err(self.gp0());
        }
        let bits = self.load_as::<u16>(View::Supervisor, tss.base.wrapping_add(u64::from(byte)))?;
        if bits >> (port % 8) & ((1 << size) - 1) != 0 {
            return Err(self.gp0());
        }
        Ok(())
    }
}

/// IN from a port in the instruction or in DX.
pub fn in_(shape: &Shape) -> Option<Handler> {
    Some(match (shape.form, shape.size) {
        (Form::RegImm, 1) => in_imm::<u8>,
        (Form::RegImm, 2) => in_imm::<u16>,
        (Form::RegImm, _) => in_imm::<u32>,
        (_, 1) => in_dx::<u8>,
        (_, 2) => in_dx::<u16>,
        _ => in_dx::<u32>,
    })
}

fn input<W: Width>(cpu: &mut Cpu, port: u16) -> Result<(), Stop> {
    cpu.check_port(port, W::BITS / 8)?;
    let mut bytes = [0; 8];
    cpu.wires.bus.read(Space::Port, u64::from(port), &mut bytes[..W::BITS as usize / 8]);
    W::write(&mut cpu.registers, 0, W::truncate(u64::from_le_bytes(bytes)));
    Ok(())
}
fn in_imm<W: Width>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    input::<W>(cpu, insn.imm as u8 as u16)
}
fn in_dx<W: Width>(cpu: &mut Cpu, _: &Insn) -> Result<(), Stop> {
    let port = cpu.registers.get(2) as u16;
    input::<W>(cpu, port)
}

/// OUT to a port in the instruction or in DX. The data's size is the second operand's.
pub fn out(shape: &Shape) -> Option<Handler> {
    Some(match (shape.form == Form::RegReg, shape.source_size) {
        (false, 1) => out_imm::<u8>,
        (false, 2) => out_imm::<u16>,
        (false, _) => out_imm::<u32>,
        (true, 1) => out_dx::<u8>,
        (true, 2) => out_dx::<u16>,
        (true, _) => out_dx::<u32>,
    })
}

/// What a device does may stop or change the machine: look up what follows.
fn output<W: Width>(cpu: &mut Cpu, insn: &Insn, port: u16) -> Result<(), Stop> {
    cpu.check_port(port, W::BITS / 8)?;
    let bytes = W::read(&cpu.registers, 0).zext().to_le_bytes();
    cpu.wires.bus.write(Space::Port, u64::from(port), &bytes[..W::BITS as usize / 8]);
    cpu.end_block(insn)
}
fn out_imm<W: Width>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    output::<W>(cpu, insn, insn.imm as u8 as u16)
}
fn out_dx<W: Width>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let port = cpu.registers.get(2) as u16;
    output::<W>(cpu, insn, port)
}
