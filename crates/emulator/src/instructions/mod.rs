//! The one table that says what an instruction is.
//!
//! There are two kinds and no third: a *handler* is Rust code of ours, *native* instructions are executed by the host
//! ([`crate::native`]). What is neither raises #UD. Privilege and the exit reason are columns; the driver
//! ([`row`]) goes through feature, privilege, exit and execution in this order.

pub mod arithmetic;
pub mod bit;
pub mod control;
pub mod control_flow;
pub mod data;
pub mod direct_store;
pub mod event;
pub mod far;
pub mod flag;
pub mod gather;
pub mod io;
pub mod msr;
pub mod multiply;
pub mod processor;
pub mod segment;
pub mod shape;
pub mod shift;
pub mod stack;
pub mod string;
pub mod syscall;
pub(crate) mod task;
pub mod xsave;

mod exit;
mod table;

use iced_x86::{Instruction, Mnemonic};
use x86::ExitReason;

use crate::cpu::Cpu;
use crate::decode::operand_size;
use crate::insn::{Handler, Insn, Stop};
use crate::native;
use shape::Shape;
pub use table::lookup;

/// What a row says of an instruction.
#[derive(Clone, Copy)]
pub struct Row {
    kind: Kind,
    /// Only at CPL 0: #GP(0) elsewhere.
    privileged: bool,
    /// The exit that a hardware guest would take, for the ledger.
    exits: Option<ExitReason>,
    /// Whether what follows has to be looked up anew.
    ends_block: bool,
}

/// Who executes it.
#[derive(Clone, Copy)]
enum Kind {
    /// One function for all operands.
    Handler(Handler),
    /// An instance of a generic function, by operands; `None` where the instruction has no such form.
    Select(fn(&Shape) -> Option<Handler>),
    /// The host.
    Native,
    /// Nobody: #UD.
    Undefined,
}

impl Row {
    const fn of(kind: Kind) -> Self {
        Self { kind, privileged: false, exits: None, ends_block: false }
    }
    const fn privileged(self) -> Self {
        Self { privileged: true, ..self }
    }
    const fn exits(self, reason: ExitReason) -> Self {
        Self { exits: Some(reason), ..self }
    }
    const fn ends_block(self) -> Self {
        Self { ends_block: true, ..self }
    }
}

const fn handler(handler: Handler) -> Row {
    Row::of(Kind::Handler(handler))
}
const fn select(select: fn(&Shape) -> Option<Handler>) -> Row {
    Row::of(Kind::Select(select))
}
const fn native() -> Row {
    Row::of(Kind::Native)
}
const fn undefined_row() -> Row {
    Row::of(Kind::Undefined).ends_block()
}

/// What the driver chose for one instruction in one mode.
pub struct Chosen {
    /// What runs it.
    pub run: Handler,
    /// For native instructions, the index of its stub.
    pub aux: u32,
    /// Operand size in bytes.
    pub size: u8,
    /// Whether it ends the block.
    pub ends_block: bool,
}

/// #UD.
pub fn undefined(cpu: &mut Cpu, _: &Insn) -> Result<(), Stop> {
    Err(cpu.ud())
}

/// #GP(0), for what only CPL 0 may do.
fn forbidden(cpu: &mut Cpu, _: &Insn) -> Result<(), Stop> {
    Err(cpu.gp0())
}

/// What runs an instruction of more than 15 bytes: #GP(0).
pub fn too_long() -> Chosen {
    Chosen { run: forbidden, aux: 0, size: 0, ends_block: true }
}

/// Chooses what runs an instruction: feature, privilege, exit, execution.
pub fn row(cpu: &mut Cpu, instruction: &Instruction) -> Chosen {
    let code_size = cpu.mode.code_size();
    let mut shape = Shape::of(instruction, code_size);
    let size = operand_size(instruction, &shape);
    shape.size = size;
    let chosen = |run, ends_block| Chosen { run, aux: 0, size, ends_block };
    if instruction.is_invalid() || !cpu.wires.model.allows(instruction.cpuid_features()) {
        return chosen(undefined, true);
    }
    let row = lookup(instruction);
    if row.privileged && cpu.cpl() != 0 {
        // These two are not recognized in virtual-8086 mode, before they are privileged.
        let unknown = cpu.mode.is_v86() && matches!(instruction.mnemonic(), Mnemonic::Lldt | Mnemonic::Ltr);
        return chosen(if unknown { undefined } else { forbidden }, true);
    }
    if row.exits.is_some() && cpu.wires.recorder.is_some() {
        return chosen(exit::recorder(instruction), row.ends_block);
    }
    match row.kind {
        Kind::Handler(handler) if instruction.is_vsib() => match gather::refusal(cpu, instruction) {
            Some(refusal) => chosen(refusal, true),
            None => Chosen { aux: gather::parameters(instruction), ..chosen(handler, false) },
        },
        Kind::Handler(handler) => chosen(handler, row.ends_block),
        Kind::Select(select) => match select(&shape) {
            Some(handler) => chosen(handler, row.ends_block),
            None => chosen(undefined, true),
        },
        Kind::Native => native_row(cpu, instruction, size),
        Kind::Undefined => chosen(undefined, true),
    }
}

fn native_row(cpu: &mut Cpu, instruction: &Instruction, size: u8) -> Chosen {
    let legacy = instruction.encoding() == iced_x86::EncodingKind::Legacy;
    let prepared = cpu.native.unit.prepare(instruction).ok().filter(|_| legacy || !cpu.mode.is_real_or_v86());
    let Some(prepared) = prepared else {
        return Chosen { run: undefined, aux: 0, size, ends_block: true };
    };
    let run = native::execute::handler(instruction, &prepared, cpu.mode.vector());
    let aux = cpu.native.insns.len() as u32;
    cpu.native.insns.push(prepared);
    Chosen { run, aux, size, ends_block: false }
}
