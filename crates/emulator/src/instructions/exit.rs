//! The ledger's view of instructions that a hardware guest would leave for.

use exits::{Detail, Exit};
use iced_x86::Mnemonic;
use x86::ExitReason;

use super::{Kind, table};
use crate::cpu::Cpu;
use crate::insn::{Insn, Stop};

/// Runs an instruction and enters it into the ledger.
pub fn recorded(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let mnemonic = Mnemonic::try_from(usize::from(insn.mnemonic)).unwrap_or(Mnemonic::INVALID);
    let row = table::by_mnemonic(mnemonic);
    let (Kind::Handler(handler), Some(reason)) = (row.kind, row.exits) else { return Err(cpu.ud()) };
    cpu.recorded(|cpu| Exit { reason, detail: detail(cpu, insn, reason) }, |cpu| handler(cpu, insn))
}

fn detail(cpu: &Cpu, insn: &Insn, reason: ExitReason) -> Detail {
    match reason {
        ExitReason::Cpuid => Detail::Leaf(cpu.registers.get(0) as u32),
        ExitReason::MsrRead | ExitReason::MsrWrite => Detail::Msr(cpu.registers.get(1) as u32),
        ExitReason::Vmcall => Detail::Hypercall(cpu.registers.get(0)),
        _ => {
            let _ = insn;
            Detail::None
        }
    }
}
