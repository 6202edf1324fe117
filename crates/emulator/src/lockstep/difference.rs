//! Comparing two vCPUs, and telling a person where they differ.

use std::fmt::Write as _;

use iced_x86::{Decoder, FastFormatter, Instruction};
use x86::Flags;

use super::follow::{Run, Watch};
use crate::cpu::Cpu;
use crate::interpreter::Interpreter;

const NAMES: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14",
    "r15",
];

/// The registers that most code changes.
#[derive(Clone, Copy, Debug)]
pub struct Registers {
    gprs: [u64; 16],
    rip: u64,
    flags: u64,
}

impl Registers {
    /// Of a vCPU.
    pub fn of(cpu: &Cpu) -> Self {
        Self { gprs: *cpu.registers.all(), rip: cpu.rip, flags: cpu.rflags() }
    }
}

/// Whether both are in the same state; `undefined` flags do not count, vector registers where `vector` says so.
pub fn same_state(a: &Cpu, b: &Cpu, undefined: u16, vector: bool) -> bool {
    a.registers.all() == b.registers.all()
        && a.rip == b.rip
        && (a.rflags() ^ b.rflags()) & !u64::from(undefined) == 0
        && a.bases == b.bases
        && a.mode == b.mode
        && (a.cr0, a.cr2, a.cr3, a.cr4, a.efer, a.xcr0) == (b.cr0, b.cr2, b.cr3, b.cr4, b.efer, b.xcr0)
        && (a.shadow, a.stack_shadow, a.nmi_blocked, a.halted, a.waits_for_sipi)
            == (b.shadow, b.stack_shadow, b.nmi_blocked, b.halted, b.waits_for_sipi)
        && (a.debug_traps, a.instructions) == (b.debug_traps, b.instructions)
        && (!vector || same_vector(a, b))
}

fn same_vector(a: &Cpu, b: &Cpu) -> bool {
    a.vector == b.vector || a.vector.to_state() == b.vector.to_state()
}

/// Whether all of the registers are the same that few instructions change.
pub fn same_system_state(a: &Cpu, b: &Cpu) -> bool {
    a.segments == b.segments
        && (a.tr, a.ldtr, a.gdtr, a.idtr, a.debug) == (b.tr, b.ldtr, b.gdtr, b.idtr, b.debug)
        && a.msrs == b.msrs
        && same_vector(a, b)
}

/// The first place that differs among those that `watch` noted as stored to.
pub fn differing_store(a: &Cpu, b: &Cpu, watch: &Watch) -> Option<u64> {
    let (mut mine, mut theirs) = ([0; 64], [0; 64]);
    for &(offset, len) in &watch.stores {
        for at in (0..len).step_by(64) {
            let part = (len - at).min(64) as usize;
            let from = offset + u64::from(at);
            a.memory.read_bytes(from, &mut mine[..part]);
            b.memory.read_bytes(from, &mut theirs[..part]);
            if mine[..part] != theirs[..part] {
                let within = mine.iter().zip(&theirs).position(|(x, y)| x != y).unwrap_or(0);
                return Some(from + within as u64);
            }
        }
    }
    None
}

/// What is known where the two differ.
pub struct Difference<'a> {
    /// The translated side.
    pub translated: &'a Interpreter,
    /// The interpreted side.
    pub interpreted: &'a Interpreter,
    /// What the interpreted side did.
    pub watch: &'a Watch,
    /// Both sides' registers before it.
    pub before: Registers,
    /// Compared slices before this one.
    pub slices: u64,
    /// What differs, where it is not in the registers.
    pub what: &'a str,
}

impl Difference<'_> {
    /// The report: what differs, the state before, the guest's code, and both states after it.
    pub fn report(&self) -> String {
        let (a, b) = (&self.translated.cpu, &self.interpreted.cpu);
        let mut text = format!("the translated and the interpreted vCPU differ after {} slices", self.slices);
        let _ = writeln!(text, " and {} instructions: {}", a.instructions, self.what);
        let (x, y) = (Registers::of(a), Registers::of(b));
        text += "differing registers (translated, interpreted):\n";
        for (name, x, y) in pairs(a, b).into_iter().filter(|(_, x, y)| x != y) {
            let _ = writeln!(text, "  {name:<8}{x:#x}, {y:#x}");
        }
        if self.watch.undefined != 0 {
            let flags = Flags::from_bits_truncate(self.watch.undefined.into());
            let _ = writeln!(text, "  (flags undefined there: {flags:?})");
        }
        vector_differences(a, b, &mut text);
        memory_difference(a, b, self.watch, &mut text);
        let _ = write!(text, "before:\n{}", table(&self.before));
        text += "code:\n";
        let shown = self.watch.runs.len().saturating_sub(40);
        for run in &self.watch.runs[shown..] {
            code(self.interpreted, run, &mut text);
        }
        let _ = write!(text, "after, translated:\n{}after, interpreted:\n{}", table(&x), table(&y));
        text
    }
}

fn pairs(a: &Cpu, b: &Cpu) -> Vec<(String, u64, u64)> {
    let mut pairs: Vec<(String, u64, u64)> = NAMES
        .iter()
        .zip(a.registers.all().iter().zip(b.registers.all()))
        .map(|(name, (&x, &y))| ((*name).to_owned(), x, y))
        .collect();
    let more = |cpu: &Cpu| {
        let blocked = [cpu.shadow, cpu.stack_shadow, cpu.nmi_blocked, cpu.halted, cpu.waits_for_sipi];
        [
            ("rip", cpu.rip),
            ("rflags", cpu.rflags()),
            ("cr0", cpu.cr0.bits()),
            ("cr2", cpu.cr2),
            ("cr3", cpu.cr3),
            ("cr4", cpu.cr4.bits()),
            ("efer", cpu.efer.bits()),
            ("xcr0", cpu.xcr0),
            ("mode", u64::from(cpu.mode.0)),
            ("retired", cpu.instructions),
            ("traps", cpu.debug_traps),
            ("blocked", blocked.iter().fold(0, |bits, &bit| bits << 1 | u64::from(bit))),
        ]
    };
    pairs.extend(more(a).into_iter().zip(more(b)).map(|((name, x), (_, y))| (name.to_owned(), x, y)));
    let bases = a.bases.iter().zip(&b.bases).enumerate();
    pairs.extend(bases.map(|(n, (&x, &y))| (format!("base {n}"), x, y)));
    pairs
}

fn vector_differences(a: &Cpu, b: &Cpu, text: &mut String) {
    for (n, (x, y)) in a.vector.zmm.iter().zip(&b.vector.zmm).enumerate().filter(|(_, (x, y))| x != y) {
        let hex = |bytes: &[u8; 64]| bytes.iter().rev().map(|byte| format!("{byte:02x}")).collect::<String>();
        let _ = writeln!(text, "  zmm{n:<5}{}\n          {}", hex(x), hex(y));
    }
    for (n, (x, y)) in a.vector.k.iter().zip(&b.vector.k).enumerate().filter(|(_, (x, y))| x != y) {
        let _ = writeln!(text, "  k{n:<7}{x:#x}, {y:#x}");
    }
    let (x, y) = (a.vector.to_state(), b.vector.to_state());
    for at in (0..160).filter(|&at| x.0[at] != y.0[at]) {
        let _ = writeln!(text, "  x87 image, byte {at}: {:#x}, {:#x}", x.0[at], y.0[at]);
    }
}

fn memory_difference(a: &Cpu, b: &Cpu, watch: &Watch, text: &mut String) {
    let place = differing_store(a, b, watch).or_else(|| a.memory.first_difference(&b.memory));
    let Some(place) = place else { return };
    let (mut x, mut y) = ([0; 4096], [0; 4096]);
    a.memory.read_bytes(place & !0xfff, &mut x);
    b.memory.read_bytes(place & !0xfff, &mut y);
    let physical = a.memory.address_of(place & !0xfff).unwrap_or_default();
    for at in (0..4096).filter(|&at| x[at] != y[at]).take(16) {
        let _ = writeln!(text, "  memory at {:#x}: {:#04x}, {:#04x}", physical + at as u64, x[at], y[at]);
    }
}

fn table(registers: &Registers) -> String {
    let mut text = String::new();
    for (row, names) in NAMES.chunks(4).enumerate() {
        for (column, name) in names.iter().enumerate() {
            let _ = write!(text, "  {name:<4}{:016x}", registers.gprs[row * 4 + column]);
        }
        text.push('\n');
    }
    let _ = writeln!(text, "  rip {:016x}  rflags {:#x}", registers.rip, registers.flags);
    text
}

/// The instructions of a run.
fn code(vcpu: &Interpreter, run: &Run, text: &mut String) {
    let Some(number) = run.block else {
        let _ = writeln!(text, "  {:x}: one instruction, interpreted alone", run.rip);
        return;
    };
    let block = vcpu.blocks.get(number);
    let bytes = vcpu.blocks.bytes(block);
    let mut decoder = Decoder::with_ip(vcpu.cpu.mode.code_size(), bytes, block.rip, 0);
    let (mut instruction, mut formatter) = (Instruction::default(), FastFormatter::new());
    while decoder.can_decode() {
        let at = decoder.position();
        decoder.decode_out(&mut instruction);
        let hex: String = bytes[at..decoder.position()].iter().map(|byte| format!("{byte:02x}")).collect();
        let mut assembly = String::new();
        formatter.format(&instruction, &mut assembly);
        let _ = writeln!(text, "  {:x}: {hex:<24}{assembly}", instruction.ip());
    }
}
