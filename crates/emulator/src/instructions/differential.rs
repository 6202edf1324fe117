//! Every handler of an instruction that the host may execute too, against the host's processor: random operands,
//! and the same registers, defined flags and memory afterwards.

use std::collections::BTreeMap;

use iced_x86::{
    Code, CodeSize, Decoder, DecoderOptions, Encoder, Instruction, MemoryOperand, OpCodeOperandKind, OpKind,
    Register,
};

use super::Kind;
use super::table::lookup;
use crate::cpu::Cpu;
use crate::insn::Insn;
use crate::native::{NativeUnit, VectorRegisters, is_listed};
use crate::testing;

/// Where the memory operand lies in the test's RAM.
const OPERAND: u64 = 0x18_0010;
const WINDOW: usize = 256;
const RFLAGS_ARITHMETIC: u64 = 0x8d5;

/// SplitMix64, seeded per run of the test.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }
    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
    /// Numbers at the edges more often than chance would have them.
    fn operand(&mut self) -> u64 {
        match self.below(8) {
            0 => 0,
            1 => u64::MAX,
            2 => 1 << self.below(64),
            3 => (1u64 << self.below(64)).wrapping_sub(1),
            4 => self.below(256),
            5 => self.next() as i32 as u64,
            _ => self.next(),
        }
    }
}

/// General registers of each size that the test may use: not RSP, and not RSI, which addresses memory.
fn register(random: &mut Random, size: u32) -> Register {
    let pick = |registers: &[Register], random: &mut Random| {
        registers[random.below(registers.len() as u64) as usize]
    };
    use Register::*;
    match size {
        8 => pick(&[AL, CL, DL, BL, AH, CH, DH, BH, R8L, R12L, R15L, DIL], random),
        16 => pick(&[AX, CX, DX, BX, DI, R9W, R13W], random),
        32 => pick(&[EAX, ECX, EDX, EBX, EDI, R10D, R14D], random),
        _ => pick(&[RAX, RCX, RDX, RBX, RDI, R11, R15], random),
    }
}

/// An instruction of a form, with random operands; `None` where the test cannot make one.
fn instance(code: Code, random: &mut Random) -> Option<Instruction> {
    use OpCodeOperandKind::*;
    let mut instruction = Instruction::new();
    instruction.set_code(code);
    instruction.set_code_size(CodeSize::Code64);
    let memory = MemoryOperand::with_base_displ(Register::RSI, 0x10);
    let as_memory = random.below(2) == 0;
    for (n, kind) in code.op_code().op_kinds().iter().copied().enumerate() {
        let n = n as u32;
        let size = match kind {
            r8_or_mem | r8_reg | r8_opcode => 8,
            r16_or_mem | r16_reg | r16_reg_mem | r16_rm | r16_opcode => 16,
            r32_or_mem | r32_reg | r32_reg_mem | r32_rm | r32_opcode | r32_vvvv => 32,
            r64_or_mem | r64_reg | r64_reg_mem | r64_rm | r64_opcode | r64_vvvv => 64,
            _ => 0,
        };
        match kind {
            mem => set_memory(&mut instruction, n, memory),
            r8_or_mem | r16_or_mem | r32_or_mem | r64_or_mem if as_memory => {
                set_memory(&mut instruction, n, memory);
            }
            _ if size != 0 => instruction.set_op_register(n, register(random, size)),
            al => instruction.set_op_register(n, Register::AL),
            cl => instruction.set_op_register(n, Register::CL),
            ax => instruction.set_op_register(n, Register::AX),
            eax => instruction.set_op_register(n, Register::EAX),
            rax => instruction.set_op_register(n, Register::RAX),
            imm8 => immediate(&mut instruction, n, OpKind::Immediate8, random),
            imm8_const_1 => {
                instruction.set_op_kind(n, OpKind::Immediate8);
                instruction.set_immediate8(1);
            }
            imm8sex16 => immediate(&mut instruction, n, OpKind::Immediate8to16, random),
            imm8sex32 => immediate(&mut instruction, n, OpKind::Immediate8to32, random),
            imm8sex64 => immediate(&mut instruction, n, OpKind::Immediate8to64, random),
            imm16 => immediate(&mut instruction, n, OpKind::Immediate16, random),
            imm32 => immediate(&mut instruction, n, OpKind::Immediate32, random),
            imm32sex64 => immediate(&mut instruction, n, OpKind::Immediate32to64, random),
            imm64 => immediate(&mut instruction, n, OpKind::Immediate64, random),
            _ => return Option::None,
        }
    }
    Some(instruction)
}

fn set_memory(instruction: &mut Instruction, n: u32, memory: MemoryOperand) {
    instruction.set_op_kind(n, OpKind::Memory);
    instruction.set_memory_base(memory.base);
    instruction.set_memory_displacement64(memory.displacement as u64);
    instruction.set_memory_displ_size(1);
    instruction.set_memory_index_scale(1);
}

fn immediate(instruction: &mut Instruction, n: u32, kind: OpKind, random: &mut Random) {
    instruction.set_op_kind(n, kind);
    let value = random.operand();
    match kind {
        OpKind::Immediate8 => instruction.set_immediate8(value as u8),
        OpKind::Immediate8to16 => instruction.set_immediate8to16(value as i8 as i16),
        OpKind::Immediate8to32 => instruction.set_immediate8to32(i32::from(value as i8)),
        OpKind::Immediate8to64 => instruction.set_immediate8to64(i64::from(value as i8)),
        OpKind::Immediate16 => instruction.set_immediate16(value as u16),
        OpKind::Immediate32 => instruction.set_immediate32(value as u32),
        OpKind::Immediate32to64 => instruction.set_immediate32to64(i64::from(value as i32)),
        _ => instruction.set_immediate64(value),
    }
}

/// What an instruction left behind.
#[derive(PartialEq, Eq)]
struct After {
    gprs: [u64; 16],
    flags: u64,
    memory: Vec<u8>,
}

/// Encodes the instruction and decodes it again, as the guest's bytes would be.
fn encoded(instruction: &Instruction) -> Option<(Instruction, Vec<u8>)> {
    let mut encoder = Encoder::new(64);
    encoder.encode(instruction, 0x1000).ok()?;
    let bytes = encoder.take_buffer();
    let decoded = Decoder::with_ip(64, &bytes, 0x1000, DecoderOptions::NONE).decode();
    (decoded.code() == instruction.code()).then_some((decoded, bytes))
}

fn by_handler(cpu: &mut Cpu, bytes: &[u8], before: &After) -> After {
    cpu.registers.all_mut().copy_from_slice(&before.gprs);
    cpu.flags.set_bits(before.flags);
    cpu.memory.write_bytes(OPERAND - 128, &before.memory);
    let mut insns: Vec<Insn> = Vec::new();
    cpu.decode(0x1000, bytes, 1, &mut insns);
    (insns[0].run)(cpu, &insns[0]).unwrap_or_else(|stop| panic!("{bytes:02x?}: {stop:?} {:?}", cpu.fault));
    let mut memory = vec![0; WINDOW];
    cpu.memory.read_bytes(OPERAND - 128, &mut memory);
    After { gprs: *cpu.registers.all(), flags: cpu.flags.bits(), memory }
}

#[allow(unsafe_code)] // The host's execution of an instruction is the oracle.
fn by_host(unit: &mut NativeUnit, instruction: &Instruction, before: &After) -> Option<After> {
    let native = unit.prepare(instruction).ok()?;
    let (mut gprs, mut flags) = (before.gprs, before.flags);
    let mut memory = before.memory.clone();
    let mut vector = VectorRegisters::reset();
    let at = memory[128..].as_mut_ptr();
    // SAFETY: the operand has 128 bytes to either side of it, more than any offset that the test makes.
    unsafe { unit.run(&native, &mut gprs, &mut flags, &mut vector, at) }.ok()?;
    Some(After { gprs, flags: flags & RFLAGS_ARITHMETIC, memory })
}

#[test]
fn handlers_agree_with_the_host_processor() {
    let mut cpu = testing::long();
    let mut unit = NativeUnit::new().unwrap();
    let mut random = Random(0x5eed);
    let mut forms: BTreeMap<String, u32> = BTreeMap::new();
    for code in Code::values() {
        let mut done = 0;
        for _ in 0..400 {
            let Some(instruction) = instance(code, &mut random) else { break };
            if !is_listed(&instruction) || matches!(lookup(&instruction).kind, Kind::Native | Kind::Undefined)
            {
                break;
            }
            let Some((instruction, bytes)) = encoded(&instruction) else { continue };
            let mut gprs = [0; 16];
            gprs.iter_mut().for_each(|gpr| *gpr = random.operand());
            gprs[6] = OPERAND - 0x10;
            let memory = (0..WINDOW).map(|_| random.next() as u8).collect();
            let before = After { gprs, flags: random.next() & RFLAGS_ARITHMETIC, memory };
            let Some(host) = by_host(&mut unit, &instruction, &before) else { break };
            let ours = by_handler(&mut cpu, &bytes, &before);
            let defined = !u64::from(rflags(instruction.rflags_undefined()));
            assert!(
                ours.gprs == host.gprs
                    && (ours.flags ^ host.flags) & defined & RFLAGS_ARITHMETIC == 0
                    && ours.memory == host.memory,
                "{code:?} {bytes:02x?} with registers {:x?} flags {:x}: flags {:x} against {:x}, registers\n{:x?}\n{:x?}",
                before.gprs,
                before.flags,
                ours.flags,
                host.flags,
                ours.gprs,
                host.gprs,
            );
            done += 1;
        }
        if done > 0 {
            *forms.entry(format!("{:?}", code.mnemonic())).or_default() += 1;
        }
    }
    println!("{} forms of {} mnemonics agree", forms.values().sum::<u32>(), forms.len());
    assert!(forms.values().sum::<u32>() > 300, "only {forms:?}");
}

/// iced's flag bits as RFLAGS has them.
fn rflags(bits: u32) -> u32 {
    use iced_x86::RflagsBits as Iced;
    [(Iced::CF, 0), (Iced::PF, 2), (Iced::AF, 4), (Iced::ZF, 6), (Iced::SF, 7), (Iced::OF, 11)]
        .iter()
        .fold(0, |flags, &(iced, at)| if bits & iced != 0 { flags | 1 << at } else { flags })
}
