//! Whole programs at random: twenty or so instructions of 64-bit or 32-bit code with branches forward and one loop around them.
//!
//! Each instruction is one of the single cases' ([`crate::encode`]), mostly behind moves that make its memory operand
//! lie where something is, or just beside. What leaves flags undefined is followed by something that defines them.
//!
//! The segments of 32-bit code are flat most of the time, and change now and then.

use iced_x86::{
    Code, ConstantOffsets, Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic, OpKind, Register,
    RflagsBits,
};

use crate::case::{CODE_LEN, COMPLETED, Case, Trap};
use crate::encode;
use crate::exclusions::{excluded, loose, may_enter_kernel};
use crate::generate::{self, Generated};
use crate::host;
use crate::layout::{self, ARENA, ARENA_LEN, Mode, PAGE, USER_DATA, local};
use crate::random::Random;

/// Where a program counts its rounds.
const COUNTER: u64 = ARENA + 0x1f40;
/// Where its stack pointer begins.
const STACK: u64 = ARENA + 0x1c00;
/// Bytes of a program at which it is long enough.
const ENOUGH: usize = CODE_LEN - 120;

/// Selectors of flat data segments.
const FLAT: [u16; 2] = [local(2), USER_DATA];
/// What FS and GS of 32-bit code are at first: none, flat, all addresses from a base on, or fewer.
const OTHERS: [u16; 5] = [0, local(2), local(16), local(16), local(3)];

/// Whether programs have instructions of an encoding.
pub fn has(code: Code, mode: Mode) -> bool {
    use iced_x86::Mnemonic::*;
    let info = code.op_code();
    let segments = info.op_kinds().iter().any(|kind| {
        use iced_x86::OpCodeOperandKind::*;
        matches!(kind, seg_reg | cr_reg | dr_reg) || *kind == mem_offs && mode == Mode::Bits64
    });
    // With TF they would not come back; with a segment register they would have to be good ones.
    let others = matches!(
        code.mnemonic(),
        Popf | Popfd | Popfq | Les | Lds | Lss | Lfs | Lgs | Xlatb | Leave | Enter | Hlt
    );
    code.flow_control() == FlowControl::Next && !segments && !others && !code.is_privileged()
}

/// A program under way.
struct Program {
    mode: Mode,
    bytes: Vec<u8>,
    /// The bases of FS and GS that operands are aimed by.
    bases: [u64; 2],
    /// Where a branch's distance stands, and after how many more parts it leads to.
    branches: Vec<(usize, u64)>,
}

/// The program of a number.
pub fn program(codes: &[Code], allowed: &[bool], seed: u64, (number, mode): (u64, Mode)) -> Generated {
    let salt = if mode == Mode::Bits64 { 0xb10c } else { 0x3210c };
    let mut random = Random::new(seed ^ salt, number);
    let mut case = Case { mode, trap: Trap::Exit, uses_vector: true, ..Case::default() };
    generate::state(&mut case, &Instruction::default(), &mut random);
    calm(&mut case, &mut random);
    let mut bases = [0; 2];
    if mode == Mode::Bits64 {
        case.selectors = [0, 0, USER_DATA, 0, 0, 0];
    } else {
        if !random.one_in(16) {
            case.selectors = std::array::from_fn(|_| random.pick(&FLAT));
        }
        case.selectors[4..].fill_with(|| random.pick(&OTHERS));
        bases = [4, 5].map(|n| layout::base_of(case.selectors[n]));
    }
    case.gprs[4] = STACK + 8 * random.below(32);
    let mut program = Program { mode, bytes: Vec::new(), bases, branches: Vec::new() };
    let rounds = 1 + random.below(4) as u8;
    // movl $rounds, COUNTER
    program.at_counter(0xc7, 0);
    program.bytes.extend((COUNTER as u32).to_le_bytes());
    program.bytes.extend([rounds, 0, 0, 0]);
    let first = program.bytes.len();
    let most = 3 + random.below(28);
    for _ in 0..most {
        if program.bytes.len() > ENOUGH - 60 {
            break;
        }
        program.land();
        program.part(codes, allowed, &mut random);
    }
    program.finish(first);
    let code = &program.bytes[..program.bytes.len().min(CODE_LEN)];
    case.bytes[..code.len()].copy_from_slice(code);
    case.len = code.len() as u16;
    Generated { number, case, instruction: Instruction::default() }
}

/// Most programs run with SIMD and x87 exceptions masked and without alignment checks: they would not come far.
fn calm(case: &mut Case, random: &mut Random) {
    if !random.one_in(8) {
        case.rflags &= !(1 << 18);
    }
    // As for single instructions of half precision: exact tiny results do not show where underflow is masked.
    case.area.0[25] |= 8;
    if !random.one_in(6) {
        case.area.0[24] |= 0x80;
        case.area.0[25] |= 0x1f;
        case.area.0[0] |= 0x3f;
        // No summary without an unmasked exception.
        case.area.0[2] &= 0x7f;
        case.area.0[3] &= 0x7f;
    }
}

impl Program {
    /// Lets the branches that lead here do so.
    fn land(&mut self) {
        let here = self.bytes.len();
        for (at, parts) in &mut self.branches {
            *parts = parts.saturating_sub(1);
            if *parts == 0 {
                let distance = (here - (*at + 4)) as u32;
                self.bytes[*at..*at + 4].copy_from_slice(&distance.to_le_bytes());
            }
        }
        self.branches.retain(|(_, parts)| *parts != 0);
    }

    /// An opcode and what says that its operand is at an address alone, which follows.
    fn at_counter(&mut self, opcode: u8, group: u8) {
        match self.mode {
            Mode::Bits64 => self.bytes.extend([opcode, 0x04 | group << 3, 0x25]),
            _ => self.bytes.extend([opcode, 0x05 | group << 3]),
        }
    }

    /// The end of the loop, where all branches that are left lead to.
    fn finish(&mut self, first: usize) {
        self.branches.iter_mut().for_each(|(_, parts)| *parts = 1);
        self.land();
        // subl $1, COUNTER; jnz first; test %eax, %eax
        self.at_counter(0x83, 5);
        self.bytes.extend((COUNTER as u32).to_le_bytes());
        self.bytes.extend([1, 0x0f, 0x85]);
        let back = first as i32 - (self.bytes.len() as i32 + 4);
        self.bytes.extend(back.to_le_bytes());
        self.bytes.extend([0x39, 0xc0]);
    }

    fn part(&mut self, codes: &[Code], allowed: &[bool], random: &mut Random) {
        match random.below(24) {
            0..=2 => self.branch(random),
            3 if random.one_in(12) => self.interrupt(random),
            3 => self.call(random),
            4 if self.mode == Mode::Bits32 && random.one_in(3) => self.segment(random),
            4 => self.stack(random),
            _ => self.instruction(codes, allowed, random),
        }
    }

    /// A conditional branch or a jump over a few parts.
    fn branch(&mut self, random: &mut Random) {
        if random.one_in(5) {
            self.bytes.push(0xe9);
        } else {
            self.bytes.extend([0x0f, 0x80 | random.below(16) as u8]);
        }
        self.branches.push((self.bytes.len(), 2 + random.below(4)));
        self.bytes.extend([0; 4]);
    }

    /// Calls what comes next, or goes there through a register or the stack.
    fn call(&mut self, random: &mut Random) {
        let register = random.below(8) as u8;
        if random.one_in(4) {
            return self.bytes.extend([0xe8, 0, 0, 0, 0]);
        }
        // The move, and two bytes: jmp *register; call *register; push and ret.
        let length = 2 + if self.mode == Mode::Bits64 { 10 } else { 5 };
        let register = if register == 4 { 5 } else { register };
        let to = self.mode.rip() + self.bytes.len() as u64 + length;
        self.set(Register::RAX + u32::from(register), to);
        self.bytes.extend(match random.below(3) {
            0 => [0xff, 0xe0 | register],
            1 => [0xff, 0xd0 | register],
            _ => [0x50 | register, 0xc3],
        });
    }

    /// INT3, INT1 or INT n: the end.
    fn interrupt(&mut self, random: &mut Random) {
        match random.below(4) {
            0 => self.bytes.push(0xcc),
            1 => self.bytes.push(0xf1),
            2 => self.bytes.extend([0xcd, 3 + random.below(2) as u8]),
            _ => self.bytes.extend([0xcd, random.below(0x80) as u8]),
        }
    }

    /// pushl $selector; pop of a segment register.
    fn segment(&mut self, random: &mut Random) {
        let any = &layout::DATA_SELECTORS;
        let (pop, selectors): (&[u8], &[u16]) = match random.below(6) {
            0 => (&[0x17], &FLAT),
            1 => (&[0x0f, 0xa1], &OTHERS),
            2 => (&[0x0f, 0xa9], &OTHERS),
            3 if random.one_in(3) => (&[0x1f], any),
            4 if random.one_in(3) => (&[0x07], any),
            n if n % 2 == 0 => (&[0x07], &FLAT),
            _ => (&[0x1f], &FLAT),
        };
        let selector = random.pick(selectors);
        match pop {
            [0x0f, 0xa1] => self.bases[0] = layout::base_of(selector),
            [0x0f, 0xa9] => self.bases[1] = layout::base_of(selector),
            _ => {}
        }
        self.bytes.push(0x68);
        self.bytes.extend(u32::from(selector).to_le_bytes());
        self.bytes.extend(pop);
    }

    fn stack(&mut self, random: &mut Random) {
        let narrow = self.mode == Mode::Bits32;
        match random.below(6) {
            0 => self.set(Register::RSP, STACK + 8 * random.below(16)),
            1 => {
                self.bytes.push(0x68);
                self.bytes.extend((random.next() as u32).to_le_bytes());
            }
            2 | 3 if narrow => self.bytes.push(random.pick(&[0x58, 0x59, 0x5a, 0x5b, 0x5d, 0x5e, 0x5f])),
            4 if narrow && random.one_in(6) => self.bytes.push(random.pick(&[0x60, 0x61, 0x9c])),
            _ if narrow => self.bytes.push(0x50 | random.below(8) as u8),
            2 | 3 => self.bytes.extend([0x41, 0x58 | random.below(8) as u8]),
            _ => self.bytes.extend([0x41, 0x50 | random.below(8) as u8]),
        }
    }

    /// An instruction of an encoding at random, with what it needs before and after it.
    fn instruction(&mut self, codes: &[Code], allowed: &[bool], random: &mut Random) {
        for _ in 0..8 {
            let mut raw = encode::bytes(random.pick(codes), self.mode, random);
            let mut decoder = Decoder::new(self.mode.bits(), &raw, DecoderOptions::NONE);
            let instruction = decoder.decode();
            let constants = decoder.get_constant_offsets(&instruction);
            if !allowed[instruction.code() as usize] || !is_fit(&instruction, self.mode, random) {
                continue;
            }
            let before = self.bytes.len();
            if !random.one_in(30) {
                let displacement = self.aim(&instruction, random);
                patch(&mut raw, &constants, displacement);
            }
            let len = if instruction.is_invalid() { 15 } else { instruction.len() };
            self.bytes.extend(&raw[..len]);
            self.define(&instruction, random);
            let another = host::has_another(&instruction, self.mode, &raw[..len]).is_some();
            if another || may_enter_kernel(&self.bytes[before..]) {
                self.bytes.truncate(before);
                continue;
            }
            return;
        }
    }

    /// Moves an address near the data to the registers that the operand is found by. Gives the displacement that an
    /// operand without a base needs.
    fn aim(&mut self, instruction: &Instruction, random: &mut Random) -> Option<u64> {
        let mut displacement = None;
        for n in 0..instruction.op_count() {
            match instruction.op_kind(n) {
                OpKind::MemorySegRSI | OpKind::MemorySegESI => self.set(Register::RSI, place(random)),
                OpKind::MemoryESRDI | OpKind::MemorySegRDI | OpKind::MemoryESEDI | OpKind::MemorySegEDI => {
                    self.set(Register::RDI, place(random));
                }
                OpKind::Memory => displacement = self.aim_explicit(instruction, random),
                _ => {}
            }
        }
        if instruction.has_rep_prefix() || instruction.has_repne_prefix() {
            self.set(Register::RCX, random.below(50));
        }
        displacement
    }

    fn aim_explicit(&mut self, instruction: &Instruction, random: &mut Random) -> Option<u64> {
        let (base, index) = (instruction.memory_base(), instruction.memory_index());
        let mut wanted = place(random).wrapping_sub(match instruction.memory_segment() {
            Register::FS => self.bases[0],
            Register::GS => self.bases[1],
            _ => 0,
        });
        if index.is_gpr() && index.full_register() != base.full_register() {
            let small = random.below(64);
            self.set(index, small);
            wanted = wanted.wrapping_sub(small * u64::from(instruction.memory_index_scale()));
        }
        match base {
            Register::None => Some(wanted),
            Register::RIP | Register::EIP => {
                let next = self.mode.rip() + (self.bytes.len() + instruction.len()) as u64;
                Some(wanted.wrapping_sub(next))
            }
            _ if base.full_register() == Register::RSP => None,
            _ => {
                self.set(base, wanted.wrapping_sub(instruction.memory_displacement64()));
                None
            }
        }
    }

    /// `movabs $value, register`, or `movl` in 32-bit code.
    fn set(&mut self, register: Register, value: u64) {
        let number = register.full_register().number() as u8;
        if self.mode != Mode::Bits64 {
            self.bytes.push(0xb8 | number & 7);
            return self.bytes.extend((value as u32).to_le_bytes());
        }
        self.bytes.extend([0x48 | number >> 3, 0xb8 | number & 7]);
        self.bytes.extend(value.to_le_bytes());
    }

    /// Defines the flags that an instruction leaves undefined. After logic that is AF, which is clear on every host.
    fn define(&mut self, instruction: &Instruction, random: &mut Random) {
        let undefined = instruction.rflags_undefined();
        let logic = undefined == RflagsBits::AF && instruction.rflags_cleared() != 0;
        if undefined != 0 && !logic {
            // cmp, add, sub or neg of registers other than RSP
            let (one, other) = (random.below(4) as u8, random.below(4) as u8);
            if self.mode != Mode::Bits64 {
                return self.bytes.extend(match random.below(4) {
                    0 => [0x39, 0xc0 | one << 3 | other],
                    1 => [0x01, 0xc0 | one << 3 | other],
                    2 => [0x28, 0xc0 | one << 3 | other],
                    _ => [0xf7, 0xd8 | one],
                });
            }
            self.bytes.extend(match random.below(4) {
                0 => [0x48, 0x39, 0xc0 | one << 3 | other],
                1 => [0x49, 0x01, 0xc0 | one << 3 | other],
                2 => [0x45, 0x29, 0xc0 | one << 3 | other],
                _ => [0x48, 0xf7, 0xd8 | one],
            });
        }
    }
}

/// Whether programs should have an instruction: some only now and then, since it would be their end.
fn is_fit(instruction: &Instruction, mode: Mode, random: &mut Random) -> bool {
    if instruction.is_invalid() {
        return random.one_in(100);
    }
    let any =
        |holds: &dyn Fn(OpKind) -> bool| (0..instruction.op_count()).any(|n| holds(instruction.op_kind(n)));
    // Whether the upper halves of the registers are cleared without a turn differs.
    let narrow = mode == Mode::Bits64
        && any(&|kind| matches!(kind, OpKind::MemorySegESI | OpKind::MemorySegEDI | OpKind::MemoryESEDI));
    // A bit far away, and a vector of addresses.
    let register = instruction.op_count() > 1
        && instruction.op_kind(1) == OpKind::Register
        && any(&|kind| kind == OpKind::Memory);
    let far = register
        && matches!(instruction.mnemonic(), Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc);
    let rare =
        far || instruction.is_vsib() || names_stack_pointer(instruction) || has_small_address(instruction);
    has(instruction.code(), mode)
        && excluded(instruction).is_none()
        && !host::is_unlike_in_programs(instruction)
        && !narrow
        && (!rare || random.one_in(8))
        && !loose(instruction, COMPLETED).results
        && !matches!(instruction.mnemonic(), Mnemonic::Ud0 | Mnemonic::Ud1 | Mnemonic::Ud2 | Mnemonic::Xgetbv)
}

/// Writes a displacement of four bytes.
fn patch(raw: &mut [u8], constants: &ConstantOffsets, displacement: Option<u64>) {
    let at = constants.displacement_offset();
    if let Some(displacement) = displacement
        && constants.displacement_size() >= 4
        && let Some(field) = raw.get_mut(at..at + 4)
    {
        field.copy_from_slice(&(displacement as u32).to_le_bytes());
    }
}

/// Whether its operand is within the first 64 KiB.
fn has_small_address(instruction: &Instruction) -> bool {
    use OpKind::{Memory, MemoryESDI, MemorySegDI, MemorySegSI};
    (0..instruction.op_count()).any(|n| match instruction.op_kind(n) {
        Memory => {
            instruction.memory_base().is_gpr16()
                || instruction.memory_index().is_gpr16()
                || instruction.memory_displ_size() == 2
        }
        kind => matches!(kind, MemoryESDI | MemorySegDI | MemorySegSI),
    })
}

fn names_stack_pointer(instruction: &Instruction) -> bool {
    (0..instruction.op_count()).any(|n| {
        instruction.op_kind(n) == OpKind::Register
            && instruction.op_register(n).is_gpr()
            && instruction.op_register(n).full_register() == Register::RSP
    })
}

/// An address in the data, most of the time; else across its pages' borders, in what may only be read, or beside it.
fn place(random: &mut Random) -> u64 {
    let page = PAGE as u64;
    match random.below(40) {
        0 => ARENA + ARENA_LEN as u64 - random.below(80),
        1 => ARENA - random.below(80),
        2 => ARENA + 2 * page - random.below(80),
        3 => ARENA + 2 * page + random.below(page),
        4..=6 => ARENA + page - random.below(80),
        7..=16 => ARENA + random.below(0x1800),
        17..=19 => ARENA + 8 * random.below(0x300),
        _ => ARENA + 64 * random.below(0x60),
    }
}

/// The instruction that a program stood before when it raised an exception.
pub fn instruction_at(case: &Case, rip: u64) -> Instruction {
    let at = rip.wrapping_sub(case.mode.rip()) as usize;
    let bytes = case.code().get(at..).unwrap_or(&[]);
    Decoder::with_ip(case.mode.bits(), bytes, rip, DecoderOptions::NONE).decode()
}

/// The offsets of a program's instructions.
pub fn starts(case: &Case) -> Vec<usize> {
    let mut decoder = Decoder::new(case.mode.bits(), case.code(), DecoderOptions::NONE);
    let mut starts = Vec::new();
    while decoder.can_decode() {
        starts.push(decoder.position());
        let _ = decoder.decode();
    }
    starts
}
