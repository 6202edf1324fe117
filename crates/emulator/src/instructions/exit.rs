//! The ledger's view of instructions that a hardware guest would leave for.

use exits::{Detail, Exit};
use iced_x86::{Instruction, Mnemonic};
use x86::ExitReason;

use super::{Kind, control, table};
use crate::cpu::Cpu;
use crate::insn::{Handler, Insn, Stop};

/// What runs an instruction and enters it into the ledger. Moves of control and debug registers share their mnemonic
/// with all others, so they are told apart here.
pub fn recorder(instruction: &Instruction) -> Handler {
    let (first, second) = (instruction.op0_register(), instruction.op1_register());
    match instruction.mnemonic() {
        Mnemonic::Mov if first.is_cr() => to_control_register,
        Mnemonic::Mov if second.is_cr() => from_control_register,
        Mnemonic::Mov if first.is_dr() => to_debug_register,
        Mnemonic::Mov => from_debug_register,
        _ => recorded,
    }
}

fn to_control_register(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let detail = Detail::ControlRegister { number: insn.r1, write: true };
    cpu.recorded(|_| Exit::at(ExitReason::CrAccess, detail), |cpu| control::mov_to_cr(cpu, insn))
}

fn from_control_register(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let detail = Detail::ControlRegister { number: insn.r2, write: false };
    cpu.recorded(|_| Exit::at(ExitReason::CrAccess, detail), |cpu| control::mov_from_cr(cpu, insn))
}

fn to_debug_register(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    cpu.recorded(|_| Exit::new(ExitReason::DrAccess), |cpu| control::mov_to_dr(cpu, insn))
}

fn from_debug_register(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    cpu.recorded(|_| Exit::new(ExitReason::DrAccess), |cpu| control::mov_from_dr(cpu, insn))
}

fn recorded(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let mnemonic = Mnemonic::try_from(usize::from(insn.mnemonic)).unwrap_or(Mnemonic::INVALID);
    let row = table::by_mnemonic(mnemonic);
    let (Kind::Handler(handler), Some(reason)) = (row.kind, row.exits) else { return Err(cpu.ud()) };
    cpu.recorded(|cpu| Exit { reason, detail: detail(cpu, reason) }, |cpu| handler(cpu, insn))
}

fn detail(cpu: &Cpu, reason: ExitReason) -> Detail {
    match reason {
        ExitReason::Cpuid => Detail::Leaf(cpu.registers.get(0) as u32),
        ExitReason::MsrRead | ExitReason::MsrWrite => Detail::Msr(cpu.registers.get(1) as u32),
        ExitReason::Vmcall => Detail::Hypercall(cpu.registers.get(0)),
        _ => Detail::None,
    }
}

#[cfg(test)]
mod tests {
    use exits::Ledger;

    use crate::testing::*;

    #[test]
    fn with_the_ledger_on_every_exit_still_does_its_work() {
        let ledger = Ledger::new();
        let mut cpu = long();
        cpu.wires.recorder = Some(ledger.recorder(0));
        cpu.registers.set(0, 7);
        run(&mut cpu, &[0x44, 0x0f, 0x22, 0xc0]).unwrap();
        assert_eq!(cpu.wires.interrupts.task_priority(), 7);
        run(&mut cpu, &[0x0f, 0x20, 0xd9]).unwrap();
        assert_eq!(cpu.registers.get(1), TABLES);
        run(&mut cpu, &[0x0f, 0x23, 0xc0]).unwrap();
        run(&mut cpu, &[0x0f, 0x21, 0xc1]).unwrap();
        assert_eq!(cpu.registers.get(1), 7);
        cpu.registers.set(1, 0x277);
        run(&mut cpu, &[0x0f, 0x32]).unwrap();
        assert_eq!(cpu.registers.get(0), 0x0007_0406);
        run(&mut cpu, &[0x0f, 0x01, 0x38]).unwrap();
        run(&mut cpu, &[0x0f, 0xa2]).unwrap();
    }
}
