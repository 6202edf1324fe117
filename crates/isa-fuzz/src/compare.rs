//! Whether two outcomes agree.

use std::fmt::Write;

use iced_x86::{Instruction, Mnemonic, RflagsBits};

use crate::case::{COMPLETED, Case, Outcome};
use crate::exclusions::{Loose, is_of_whole_state, loose};
use crate::host;
use crate::layout::{ARENA, Mode};

/// The arithmetic flags, DF, NT, AC and ID.
const COMPARED: u64 = 0x24_4cd5;

const REGISTERS: [&str; 16] = [
    "RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI", "R8", "R9", "R10", "R11", "R12", "R13", "R14",
    "R15",
];

/// iced's flag bits as RFLAGS has them.
fn rflags(bits: u32) -> u64 {
    use RflagsBits as Iced;
    [(Iced::CF, 0), (Iced::PF, 2), (Iced::AF, 4), (Iced::ZF, 6), (Iced::SF, 7), (Iced::OF, 11)]
        .iter()
        .fold(0, |flags, &(iced, at)| if bits & iced != 0 { flags | 1 << at } else { flags })
}

/// The vector area without what has no meaning: the header, and what an instruction leaves open.
fn normalized(outcome: &Outcome, loose: Loose) -> engine::VectorState {
    use emulator::native::VectorRegisters;
    let state = engine::VectorState(Box::new(outcome.area.0));
    let mut state = VectorRegisters::from_state(&state).to_state();
    state.0[24] &= !(loose.mxcsr as u8);
    if !host::keeps_x87_pointers() {
        state.0[6..24].fill(0);
    }
    if loose.x87 {
        state.0[..24].fill(0);
        state.0[32..160].fill(0);
    }
    state
}

/// Whether a register is the result of LSL on the descriptor whose limit is the processor's number, where Linux keeps it.
fn is_number(instruction: &Instruction, number: usize, ours: &Outcome) -> bool {
    instruction.mnemonic() == Mnemonic::Lsl
        && instruction.op0_register().full_register().number() == number
        && ours.gprs[number] & 0xffff == 0
}

/// Whether the vector states agree without any allowance. Components that the host's area does not hold are in their
/// initial configuration, which is zero but for x87's.
fn same_vectors(host: &Outcome, ours: &Outcome) -> bool {
    const PARTS: [(u8, usize, usize); 5] =
        [(1, 160, 416), (2, 576, 832), (5, 1088, 1152), (6, 1152, 1664), (7, 1664, 2688)];
    let (host, ours) = (&host.area.0, &ours.area.0);
    let x87 = host[512] & 1 != 0 && host[..24] == ours[..24] && host[32..160] == ours[32..160];
    x87 && host[24..28] == ours[24..28]
        && PARTS
            .iter()
            .all(|&(bit, first, last)| host[512] >> bit & 1 != 0 && host[first..last] == ours[first..last])
}

/// What differs, as text; empty where the outcomes agree.
pub fn difference(case: &Case, instruction: &Instruction, host: &Outcome, ours: &Outcome) -> String {
    let mut text = String::new();
    let loose = loose(instruction, host.vector);
    let both_fault = host.vector != COMPLETED && ours.vector != COMPLETED;
    if loose.all || loose.order && both_fault || host::differs_by_maker(host, ours) {
        return text;
    }
    // Where nothing but an area's header is accessed, the limits of the rest are the processor's affair.
    let header_alone = is_of_whole_state(instruction) && case.gprs[0] & 7 == 0;
    if header_alone && (host.vector == COMPLETED) != (ours.vector == COMPLETED) {
        return text;
    }
    if host.vector != ours.vector {
        let _ = writeln!(text, "  exception: the host has {:#x}, we have {:#x}", host.vector, ours.vector);
        let (codes, addresses) = ([host.error, ours.error], [host.cr2, ours.cr2]);
        let _ = writeln!(text, "  error codes {codes:x?}, CR2 {addresses:x?}");
        return text;
    }
    let mut line = |what: &str, host: u64, ours: u64| {
        if host != ours {
            let _ = writeln!(text, "  {what}: the host has {host:#x}, we have {ours:#x}");
        }
    };
    if host.vector != COMPLETED {
        // Linux takes the last page below the gap for its own.
        let known = if host.cr2 >> 12 == 0x7_ffff_ffff { !1 } else { !0 };
        line("error code", host.error & known, ours.error & known);
        if !loose.cr2 {
            line("CR2", host.cr2, ours.cr2);
        }
    }
    line("RIP", host.rip, ours.rip);
    let mask = if case.mode == Mode::Bits64 { u64::MAX } else { 0xffff_ffff };
    let registers = if case.mode == Mode::Bits64 { 16 } else { 8 };
    for (number, name) in REGISTERS.iter().enumerate().take(registers) {
        let half = loose.halves && matches!(number, 1 | 6 | 7);
        let mask = if half { mask & 0xffff_ffff } else { mask };
        let mask = if loose.results && host.vector == COMPLETED || is_number(instruction, number, ours) {
            0
        } else {
            mask
        };
        line(name, host.gprs[number] & mask, ours.gprs[number] & mask);
    }
    let undefined_flags = if host.vector == COMPLETED { rflags(instruction.rflags_undefined()) } else { 0 };
    let compared = COMPARED & !undefined_flags & if loose.repeated { !0x8d5 } else { !0 };
    // RDRAND and RDSEED may have found nothing.
    let compared = compared & if loose.results { !1 } else { !0 };
    line("flags", host.rflags & compared, ours.rflags & compared);
    for (n, name) in ["ES", "CS", "SS", "DS", "FS", "GS"].iter().enumerate() {
        // The return to a program makes any null selector 0, but for that in SS.
        let plain = |selector: u16| if selector & !3 == 0 { 0 } else { u64::from(selector) };
        line(name, plain(host.selectors[n]), plain(ours.selectors[n]));
    }
    line("FS base", host.bases[0], ours.bases[0]);
    line("GS base", host.bases[1], ours.bases[1]);
    if !loose.data {
        data(host, ours, &mut text);
    }
    if case.uses_vector && !loose.vectors {
        vectors(host, ours, loose, is_of_whole_state(instruction), &mut text);
    }
    text
}

fn data(host: &Outcome, ours: &Outcome, text: &mut String) {
    if host.lines_changed == ours.lines_changed && host.digest == ours.digest {
        return;
    }
    for (who, outcome) in [("host", host), ("ours", ours)] {
        for (line, bytes) in outcome.changed() {
            let _ = writeln!(text, "  data at {:#x} ({who}): {bytes:02x?}", ARENA + 64 * u64::from(*line));
        }
    }
    let _ = writeln!(text, "  lines of data changed: {} and {}", host.lines_changed, ours.lines_changed);
}

fn vectors(host: &Outcome, ours: &Outcome, loose: Loose, loaded: bool, text: &mut String) {
    if same_vectors(host, ours) {
        return;
    }
    let (mut host, mut ours) = (normalized(host, loose), normalized(ours, loose));
    if loaded {
        // What the pointers cannot be: above the bits of linear addresses, which differ from host to host.
        for area in [&mut host.0, &mut ours.0] {
            (area[14], area[15], area[22], area[23]) = (0, 0, 0, 0);
        }
    }
    if host == ours {
        return;
    }
    for (at, (theirs, own)) in host.0.chunks(8).zip(ours.0.chunks(8)).enumerate() {
        if theirs != own {
            let at = at * 8;
            let _ = writeln!(text, "  vector state at {at} ({}): {theirs:02x?} and {own:02x?}", place(at));
        }
    }
}

/// What lies at an offset of the XSAVE area.
fn place(at: usize) -> String {
    match at {
        0..32 => "x87 control, MXCSR".into(),
        32..160 => format!("ST{}", (at - 32) / 16),
        160..416 => format!("XMM{}", (at - 160) / 16),
        512..576 => "header".into(),
        576..832 => format!("upper half of YMM{}", (at - 576) / 16),
        1088..1152 => format!("K{}", (at - 1088) / 8),
        1152..1664 => format!("upper half of ZMM{}", (at - 1152) / 32),
        1664..2688 => format!("ZMM{}", 16 + (at - 1664) / 64),
        _ => "reserved".into(),
    }
}
