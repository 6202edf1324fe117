//! Bytes of an encoding: opcode and prefixes as the decoder's tables have them, all the rest at random.

use iced_x86::{Code, EncodingKind, MandatoryPrefix, OpCodeInfo, OpCodeTableKind};

use crate::layout::Mode;
use crate::random::Random;

const SEGMENT_PREFIXES: [u8; 6] = [0x26, 0x2e, 0x36, 0x3e, 0x64, 0x65];

/// The encodings that a mode has, but for the directives of the decoder's tables.
pub fn codes(mode: Mode) -> Vec<Code> {
    Code::values()
        .filter(|code| {
            let info = code.op_code();
            let here = match mode {
                Mode::Bits16 => info.mode16(),
                Mode::Bits32 => info.mode32(),
                Mode::Bits64 => info.mode64(),
            };
            let known =
                matches!(info.encoding(), EncodingKind::Legacy | EncodingKind::VEX | EncodingKind::EVEX);
            info.is_instruction() && here && known && !info.fwait()
        })
        .collect()
}

/// Bytes that begin with an instruction of this encoding, most of the time; the tail is random.
pub fn bytes(code: Code, mode: Mode, random: &mut Random) -> [u8; 32] {
    let info = code.op_code();
    let mut out = Writer::default();
    match info.encoding() {
        EncodingKind::VEX => vex(info, mode, random, &mut out),
        EncodingKind::EVEX => evex(info, mode, random, &mut out),
        _ => legacy(info, mode, random, &mut out),
    }
    out.opcode(info);
    out.push(modrm(info, random));
    while out.len < out.bytes.len() {
        // A SIB byte or displacement, an immediate.
        out.push(if random.one_in(4) { random.operand() as u8 } else { random.next() as u8 });
    }
    out.bytes
}

#[derive(Default)]
struct Writer {
    bytes: [u8; 32],
    len: usize,
}

impl Writer {
    fn push(&mut self, byte: u8) {
        if let Some(slot) = self.bytes.get_mut(self.len) {
            *slot = byte;
            self.len += 1;
        }
    }

    fn opcode(&mut self, info: &OpCodeInfo) {
        if info.op_code_len() == 2 {
            self.push((info.op_code() >> 8) as u8);
        }
        self.push(info.op_code() as u8);
    }
}

/// ModRM: the operation's number in a group, the rest at random. Half of all are registers.
fn modrm(info: &OpCodeInfo, random: &mut Random) -> u8 {
    let mut byte = random.next() as u8;
    if random.one_in(3) {
        byte |= 0xc0;
    }
    if info.is_group() {
        byte = byte & !0x38 | (info.group_index() as u8) << 3;
    }
    if info.is_rm_group() {
        byte = byte & !7 | info.rm_group_index() as u8;
    }
    byte
}

fn stray_prefixes(random: &mut Random, lockable: bool, out: &mut Writer) {
    if random.one_in(8) {
        out.push(random.pick(&SEGMENT_PREFIXES));
    }
    if random.one_in(12) {
        out.push(0x67);
    }
    if random.one_in(if lockable { 4 } else { 80 }) {
        out.push(0xf0);
    }
    if random.one_in(40) {
        let count = 1 + random.below(3);
        (0..count).for_each(|_| out.push(random.pick(&[0x66, 0xf2, 0xf3, 0x2e, 0x67, 0x66])));
    }
}

fn legacy(info: &OpCodeInfo, mode: Mode, random: &mut Random, out: &mut Writer) {
    stray_prefixes(random, info.can_use_lock_prefix(), out);
    let sized = if mode == Mode::Bits16 { 32 } else { 16 };
    if info.operand_size() == sized {
        out.push(0x66);
    }
    let other_address = match mode {
        Mode::Bits16 => 32,
        Mode::Bits32 => 16,
        Mode::Bits64 => 32,
    };
    if info.address_size() == other_address {
        out.push(0x67);
    }
    match info.mandatory_prefix() {
        MandatoryPrefix::P66 => out.push(0x66),
        MandatoryPrefix::PF3 => out.push(0xf3),
        MandatoryPrefix::PF2 => out.push(0xf2),
        _ => {
            let repeats = info.can_use_rep_prefix() || info.can_use_repne_prefix();
            if repeats && random.one_in(2) {
                out.push(random.pick(&[0xf2, 0xf3, 0xf3]));
            }
        }
    }
    if mode == Mode::Bits64 {
        let wide = info.operand_size() == 64 && !info.default_op_size64() && !info.force_op_size64();
        if wide || random.one_in(3) {
            let w = if wide || info.operand_size() == 0 && random.one_in(4) { 8 } else { 0 };
            out.push(0x40 | random.next() as u8 & 7 | w);
        }
    }
    match info.table() {
        OpCodeTableKind::T0F => out.push(0x0f),
        OpCodeTableKind::T0F38 => [0x0f, 0x38].into_iter().for_each(|byte| out.push(byte)),
        OpCodeTableKind::T0F3A => [0x0f, 0x3a].into_iter().for_each(|byte| out.push(byte)),
        _ => {}
    }
}

fn simd_prefix(info: &OpCodeInfo) -> u8 {
    match info.mandatory_prefix() {
        MandatoryPrefix::P66 => 1,
        MandatoryPrefix::PF3 => 2,
        MandatoryPrefix::PF2 => 3,
        _ => 0,
    }
}

fn map(info: &OpCodeInfo) -> u8 {
    match info.table() {
        OpCodeTableKind::T0F => 1,
        OpCodeTableKind::T0F38 => 2,
        OpCodeTableKind::T0F3A => 3,
        OpCodeTableKind::MAP5 => 5,
        OpCodeTableKind::MAP6 => 6,
        _ => 0,
    }
}

fn vvvv(info: &OpCodeInfo, random: &mut Random) -> u8 {
    use iced_x86::OpCodeOperandKind::*;
    let used = info.op_kinds().iter().any(|kind| {
        matches!(
            kind,
            r32_vvvv | r64_vvvv | k_vvvv | xmm_vvvv | ymm_vvvv | zmm_vvvv | xmmp3_vvvv | zmmp3_vvvv
        )
    });
    if used || random.one_in(60) { random.next() as u8 & 0xf } else { 0xf }
}

/// W as the encoding wants it.
fn w(info: &OpCodeInfo, random: &mut Random) -> bool {
    if info.is_wig() || random.one_in(60) { random.one_in(2) } else { info.w() != 0 }
}

fn length(info: &OpCodeInfo, random: &mut Random, most: u64) -> u8 {
    if info.is_lig() || random.one_in(60) { random.below(most) as u8 } else { info.l() as u8 }
}

fn vex(info: &OpCodeInfo, mode: Mode, random: &mut Random, out: &mut Writer) {
    if random.one_in(10) {
        stray_prefixes(random, false, out);
    }
    let mut rxb = random.next() as u8 & 0xe0;
    if mode != Mode::Bits64 {
        // Clear (inverted) bits would make it LES or LDS.
        rxb |= 0xc0;
    }
    let w = u8::from(w(info, random));
    let tail = vvvv(info, random) << 3 | length(info, random, 2) << 2 | simd_prefix(info);
    if map(info) == 1 && w == 0 && random.one_in(2) {
        out.push(0xc5);
        out.push(rxb & 0x80 | if mode == Mode::Bits64 { 0 } else { 0x40 } | tail);
    } else {
        out.push(0xc4);
        out.push(rxb | map(info));
        out.push(w << 7 | tail);
    }
}

fn evex(info: &OpCodeInfo, mode: Mode, random: &mut Random, out: &mut Writer) {
    if random.one_in(10) {
        stray_prefixes(random, false, out);
    }
    let mut high = random.next() as u8 & 0xf0;
    if mode != Mode::Bits64 {
        high |= 0xc0;
    }
    out.push(0x62);
    out.push(high | map(info));
    out.push(u8::from(w(info, random)) << 7 | vvvv(info, random) << 3 | 4 | simd_prefix(info));
    let broadcast =
        if info.can_broadcast() || info.can_use_rounding_control() || info.can_suppress_all_exceptions() {
            random.one_in(3)
        } else {
            random.one_in(80)
        };
    let mask = if info.can_use_op_mask_register() && random.one_in(2) || random.one_in(60) {
        random.next() as u8 & 7
    } else if info.require_op_mask_register() {
        1 + random.below(7) as u8
    } else {
        0
    };
    let zeroing = mask != 0 && info.can_use_zeroing_masking() && random.one_in(2);
    let upper = if random.one_in(2) || mode != Mode::Bits64 { 8 } else { 0 };
    out.push(u8::from(zeroing) << 7 | length(info, random, 3) << 5 | u8::from(broadcast) << 4 | upper | mask);
}
