//! Random programs of 64-bit or 32-bit code: by rule over everything that the translator copies, with branches, the stack and
//! instructions that only handlers know in between.

use iced_x86::{
    Code, CodeSize, Decoder, DecoderOptions, Encoder, Instruction, Mnemonic, OpCodeOperandKind, OpKind,
    Register, RflagsBits,
};

use super::machine::{COUNTER, STACK_PAGE, WINDOW, WINDOW_PAGES};
use super::words::{Words, narrowed};
use crate::jit::flat::widened;
use crate::jit::native_set::is_copied;

/// SplitMix64.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
    pub fn one_in(&mut self, bound: u64) -> bool {
        self.below(bound) == 0
    }
    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }
    /// Numbers at the edges more often than chance would have them.
    pub fn operand(&mut self) -> u64 {
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
    /// A place in the window: mostly in its ordinary pages, often near a page's end.
    pub fn address(&mut self) -> u64 {
        let page = if self.one_in(4) { self.below(WINDOW_PAGES + 1) } else { self.pick(&[0, 1, 4, 8, 14]) };
        let within = match self.below(6) {
            0 => 4096 - self.below(17),
            1 => self.below(16),
            2 => self.below(4096),
            _ => self.below(512) * 8,
        };
        WINDOW + page * 4096 + within
    }
    /// A register's value: an address, or any number.
    pub fn value(&mut self) -> u64 {
        match self.below(20) {
            0 => 0x0000_7fff_ffff_fff8 + self.below(16),
            1 => self.next() | 0x00ff_0000_0000_0000,
            2..6 => self.operand(),
            _ => self.address(),
        }
    }
}

/// Part of a program.
enum Item {
    Instruction(Instruction),
    /// One that defines the flags which the one before left undefined: both lie in one page, so that nothing comes
    /// between them.
    Defines(Instruction),
    /// One with the address of an item as its target or immediate.
    Towards(Instruction, usize),
    Bytes(Vec<u8>),
}

/// A program and where its instructions start.
pub struct Program {
    pub rip: u64,
    pub bytes: Vec<u8>,
    pub starts: Vec<u64>,
    pub end: u64,
}

/// The forms of instructions that programs are made of.
pub struct Forms {
    pub copied: Vec<Code>,
    pub words: &'static Words,
}

impl Forms {
    /// Everything that is copied of a size of code, found by making each and asking.
    pub fn new(words: &'static Words) -> Self {
        let mut random = Random(1);
        let copied = |&code: &Code| {
            (0..8).any(|_| {
                instance(code, &mut random, words)
                    .and_then(|i| encoded(&i, words))
                    .is_some_and(|i| is_copied(&widened(i)) && i.code() == code)
            })
        };
        let mut all: Vec<Code> = Code::values().filter(copied).collect();
        all.retain(|code| code.op_code().is_instruction());
        Self { copied: all, words }
    }
}

fn register(random: &mut Random, size: usize, words: &Words) -> Register {
    if size == 1 && words.bits == 32 {
        return Register::AL + random.below(8) as u32;
    }
    if size == 1 {
        use Register::*;
        let all = [AL, CL, DL, BL, AH, CH, DH, BH, SPL, BPL, SIL, DIL, R8L, R9L, R12L, R13L, R14L, R15L];
        return random.pick(&all);
    }
    let first = match size {
        2 => Register::AX,
        4 => Register::EAX,
        8 => Register::RAX,
        _ => Register::XMM0,
    };
    // RSP seldom, or nothing works after it.
    let number = random.below(words.registers) as u32;
    if size <= 8 && number == 4 && !random.one_in(4) { first } else { first + number }
}

/// Gives an instruction a random memory operand.
fn memory(instruction: &mut Instruction, n: u32, random: &mut Random, words: &Words) {
    instruction.set_op_kind(n, OpKind::Memory);
    instruction.set_memory_index_scale(1);
    let narrow = words.bits == 32 || random.one_in(8);
    let first = if narrow { Register::EAX } else { Register::RAX };
    let any = |random: &mut Random| first + random.below(words.registers) as u32;
    let small = random.below(256).wrapping_sub(128);
    let (mut base, mut index, mut displacement, mut size) = (Register::None, Register::None, small, 1);
    match random.below(16) {
        0 if words.bits == 64 => {
            base = if narrow { Register::EIP } else { Register::RIP };
            (displacement, size) = (random.address(), 8);
        }
        0 | 1 => (displacement, size) = (random.address(), if narrow { 4 } else { 8 }),
        2 => (base, displacement, size) = (any(random), u64::from(random.next() as u32) as i32 as u64, 8),
        3 => {
            (index, displacement, size) = (any(random), random.address(), 8);
            instruction.set_memory_index_scale(random.pick(&[1, 2, 4, 8]));
        }
        4 | 5 => {
            (base, index) = (any(random), any(random));
            instruction.set_memory_index_scale(random.pick(&[1, 1, 2, 8]));
        }
        6 => (base, displacement, size) = (any(random), 0, 0),
        // Fields of one structure, often near each other.
        7..=11 => {
            (base, displacement, size) = (first + 3, (small as i64 * random.pick(&[1, 2, 4, 16])) as u64, 4);
        }
        _ => base = any(random),
    }
    if matches!(index, Register::RSP | Register::ESP) {
        index = Register::None;
    }
    if narrow && size != 0 {
        (displacement, size) =
            (displacement & 0xffff_ffff, if base == Register::EIP { 4 } else { size.min(4) });
    }
    instruction.set_memory_base(base);
    instruction.set_memory_index(index);
    instruction.set_memory_displacement64(displacement);
    instruction.set_memory_displ_size(size);
    match random.below(16) {
        0 => instruction.set_segment_prefix(Register::FS),
        1 => instruction.set_segment_prefix(Register::GS),
        2 => instruction.set_segment_prefix(Register::DS),
        3 if words.bits == 32 => {
            instruction.set_segment_prefix(random.pick(&[Register::CS, Register::SS, Register::ES]));
        }
        _ => {}
    }
}

fn immediate(instruction: &mut Instruction, n: u32, kind: OpKind, random: &mut Random) {
    instruction.set_op_kind(n, kind);
    let value = random.operand();
    match kind {
        OpKind::Immediate8 => instruction.set_immediate8(value as u8),
        OpKind::Immediate8_2nd => instruction.set_immediate8_2nd(value as u8 & 3),
        OpKind::Immediate8to16 => instruction.set_immediate8to16(value as i8 as i16),
        OpKind::Immediate8to32 => instruction.set_immediate8to32(i32::from(value as i8)),
        OpKind::Immediate8to64 => instruction.set_immediate8to64(i64::from(value as i8)),
        OpKind::Immediate16 => instruction.set_immediate16(value as u16),
        OpKind::Immediate32 => instruction.set_immediate32(value as u32),
        OpKind::Immediate32to64 => instruction.set_immediate32to64(i64::from(value as i32)),
        _ => instruction.set_immediate64(value),
    }
}

/// Where the kind of an operand leaves a choice, the bytes of a register.
fn register_size(kind: OpCodeOperandKind) -> usize {
    use OpCodeOperandKind::*;
    match kind {
        r8_or_mem | r8_reg | r8_opcode => 1,
        r16_or_mem | r16_reg | r16_reg_mem | r16_rm | r16_opcode => 2,
        r32_or_mem | r32_reg | r32_reg_mem | r32_rm | r32_opcode | r32_vvvv => 4,
        r64_or_mem | r64_reg | r64_reg_mem | r64_rm | r64_opcode | r64_vvvv => 8,
        xmm_or_mem | xmm_reg | xmm_rm | xmm_vvvv => 16,
        _ => 0,
    }
}

/// An instruction of a form, with random operands; `None` where there is no rule for one of them.
fn instance(code: Code, random: &mut Random, words: &Words) -> Option<Instruction> {
    use OpCodeOperandKind::*;
    let mut instruction = Instruction::new();
    instruction.set_code(code);
    instruction.set_code_size(if words.bits == 64 { CodeSize::Code64 } else { CodeSize::Code32 });
    let as_memory = random.below(5) < 2;
    for (n, kind) in code.op_code().op_kinds().iter().copied().enumerate() {
        let n = n as u32;
        match kind {
            mem => memory(&mut instruction, n, random, words),
            mem_offs => {
                instruction.set_op_kind(n, OpKind::Memory);
                instruction.set_memory_displacement64(random.address());
                instruction.set_memory_displ_size(words.bits / 8);
            }
            r8_or_mem | r16_or_mem | r32_or_mem | r64_or_mem | xmm_or_mem if as_memory => {
                memory(&mut instruction, n, random, words);
            }
            _ if register_size(kind) != 0 => {
                instruction.set_op_register(n, register(random, register_size(kind), words));
            }
            mm_reg => instruction.set_op_register(n, Register::MM1),
            al => instruction.set_op_register(n, Register::AL),
            cl => instruction.set_op_register(n, Register::CL),
            ax => instruction.set_op_register(n, Register::AX),
            eax => instruction.set_op_register(n, Register::EAX),
            rax => instruction.set_op_register(n, Register::RAX),
            imm8 => immediate(
                &mut instruction,
                n,
                if n > 0 && code.mnemonic() == Mnemonic::Enter {
                    OpKind::Immediate8_2nd
                } else {
                    OpKind::Immediate8
                },
                random,
            ),
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
    if as_memory
        && code.op_code().can_use_lock_prefix()
        && instruction.op0_kind() == OpKind::Memory
        && random.one_in(3)
    {
        instruction.set_has_lock_prefix(true);
    }
    Some(instruction)
}

/// The instruction as its own bytes say it.
fn encoded(instruction: &Instruction, words: &Words) -> Option<Instruction> {
    let mut encoder = Encoder::new(words.bits);
    encoder.encode(instruction, 0x10_4000).ok()?;
    let bytes = encoder.take_buffer();
    Some(Decoder::with_ip(words.bits, &bytes, 0x10_4000, DecoderOptions::NONE).decode())
}

/// Sets all six flags from registers.
fn definer(random: &mut Random, words: &Words) -> Item {
    let code = random.pick(&[words.compare, Code::Add_r32_rm32, Code::Sub_r8_rm8, Code::Neg_rm16]);
    loop {
        let made = instance(code, random, words)
            .filter(|i| (0..i.op_count()).all(|n| i.op_kind(n) == OpKind::Register));
        if let Some(made) = made.filter(|i| encoded(i, words).is_some()) {
            return Item::Defines(made);
        }
    }
}

/// Adds an instruction, and another that defines the flags where it leaves them undefined: those that are undefined
/// may differ. After logic only AF is, and both engines clear it.
fn add(items: &mut Vec<Item>, instruction: Instruction, random: &mut Random, words: &Words) {
    let undefined = instruction.rflags_undefined();
    items.push(Item::Instruction(instruction));
    let logic = undefined == RflagsBits::AF && instruction.rflags_cleared() != 0;
    if undefined != 0 && !logic {
        items.push(definer(random, words));
    }
}

fn random_form(items: &mut Vec<Item>, forms: &[Code], random: &mut Random, words: &Words) {
    for _ in 0..8 {
        let code = random.pick(forms);
        if let Some(made) = instance(code, random, words)
            && encoded(&made, words).is_some_and(|i| i.code() == code)
        {
            return add(items, made, random, words);
        }
    }
}

/// A branch to an item further on.
fn branch(items: &mut Vec<Item>, random: &mut Random, words: &Words) {
    let to = items.len() + 1 + random.below(6) as usize;
    let near = |code: Code| Instruction::with_branch(narrowed(code, words), 0).unwrap();
    let register = words.first + random.below(words.registers) as u32;
    let target = || words.mov(register, 0);
    match random.below(11) {
        n @ (7 | 8) => {
            // mov $target, %register; mov %register, (STACK_PAGE - 8); then through it, in either way.
            let place = iced_x86::MemoryOperand::with_displ(STACK_PAGE - 8, words.bits / 8);
            let store = Instruction::with2(words.store, place, register).unwrap();
            let code = if n == 7 { words.jmp } else { words.call };
            items.push(Item::Towards(target(), to + 2));
            items.push(Item::Instruction(store));
            items.push(Item::Instruction(Instruction::with1(code, place).unwrap()));
        }
        0 => items.push(Item::Towards(near(Code::Jmp_rel32_64), to)),
        1 => items.push(Item::Towards(near(Code::Call_rel32_64), to)),
        2 => items.push(Item::Towards(Instruction::with_branch(words.loop_, 0).unwrap(), to)),
        3 => items.push(Item::Towards(Instruction::with_branch(words.jump_on_count, 0).unwrap(), to)),
        n @ (4 | 5) => {
            items.push(Item::Towards(target(), to + 1));
            let code = if n == 4 { words.jmp } else { words.call };
            items.push(Item::Instruction(Instruction::with1(code, register).unwrap()));
        }
        6 => {
            items.push(Item::Towards(target(), to + 2));
            items.push(Item::Instruction(Instruction::with1(words.push, register).unwrap()));
            items.push(Item::Bytes(random.pick(&[&[0xc3u8][..], &[0xc2, 0x20, 0]]).to_vec()));
        }
        _ => {
            let code = random.pick(&[
                Code::Jo_rel32_64,
                Code::Jno_rel32_64,
                Code::Jb_rel32_64,
                Code::Jae_rel32_64,
                Code::Je_rel32_64,
                Code::Jne_rel32_64,
                Code::Jbe_rel32_64,
                Code::Ja_rel32_64,
                Code::Js_rel32_64,
                Code::Jns_rel32_64,
                Code::Jp_rel32_64,
                Code::Jnp_rel32_64,
                Code::Jl_rel32_64,
                Code::Jge_rel32_64,
                Code::Jle_rel32_64,
                Code::Jg_rel32_64,
            ]);
            items.push(Item::Towards(near(code), to));
        }
    }
}

fn stack(items: &mut Vec<Item>, random: &mut Random, words: &Words) {
    let register = words.first + random.below(words.registers) as u32;
    items.push(match random.below(8) {
        0 => Item::Instruction(words.mov(words.first + 4, STACK_PAGE + 0x800)),
        1 => Item::Instruction(Instruction::with1(words.push_immediate[0], random.next() as i32).unwrap()),
        2 => Item::Instruction(
            Instruction::with1(words.push_immediate[1], random.next() as i8 as i32).unwrap(),
        ),
        3 | 4 => Item::Instruction(Instruction::with1(words.pop, register).unwrap()),
        _ => Item::Instruction(Instruction::with1(words.push, register).unwrap()),
    });
}

fn one(items: &mut Vec<Item>, forms: &Forms, random: &mut Random) {
    let words = forms.words;
    match random.below(100) {
        0..15 => {
            let number = random.below(words.registers) as u32;
            let number = if number == 4 { 5 } else { number };
            items.push(Item::Instruction(words.mov(words.first + number, random.value())));
        }
        15..23 => stack(items, random, words),
        23..29 => branch(items, random, words),
        29..36 => random_form(items, words.others, random, words),
        36..40 => {
            items.push(Item::Bytes(vec![0xb9, random.below(40) as u8, 0, 0, 0])); // mov $n, %ecx
            items.push(Item::Bytes(random.pick(words.fixed).to_vec()));
        }
        _ => random_form(items, &forms.copied, random, words),
    }
}

/// A random program: what [`one`] gives, a few times round, and a HLT.
pub fn program(random: &mut Random, forms: &Forms) -> Program {
    let words = forms.words;
    let mut items = Vec::new();
    let count = 5 + random.below(36);
    while (items.len() as u64) < count {
        one(&mut items, forms, random);
    }
    // subl $1, COUNTER; jnz to the first
    let mut count_down = words.count_down.to_vec();
    count_down.extend_from_slice(&(COUNTER as u32).to_le_bytes());
    count_down.push(1);
    items.push(Item::Bytes(count_down));
    items.push(Item::Towards(Instruction::with_branch(narrowed(Code::Jne_rel32_64, words), 0).unwrap(), 0));
    items.push(Item::Bytes(vec![0xf4]));
    let mut rip = super::machine::PROGRAM + random.pick(&[0, 0x100, 0xf80, 0xfc0, 0xff0]) + random.below(16);
    loop {
        let program = assemble(rip, &mut items, words);
        let page = |n: usize| program.starts[n] >> 12;
        if (0..items.len()).all(|n| !matches!(items[n], Item::Defines(_)) || page(n - 1) == page(n + 1)) {
            return program;
        }
        rip -= 1;
    }
}

fn assemble(rip: u64, items: &mut [Item], words: &Words) -> Program {
    let mut starts = vec![rip; items.len()];
    let mut bytes = Vec::new();
    let mut encoder = Encoder::new(words.bits);
    // Once for the lengths, which do not depend on where branches lead, and once more.
    for _ in 0..2 {
        bytes.clear();
        for n in 0..items.len() {
            let here = rip + bytes.len() as u64;
            starts[n] = here;
            let instruction = match &mut items[n] {
                Item::Bytes(raw) => {
                    bytes.extend_from_slice(raw);
                    continue;
                }
                Item::Instruction(instruction) | Item::Defines(instruction) => *instruction,
                Item::Towards(instruction, to) => {
                    let target = starts[(*to).min(starts.len() - 1)];
                    match (instruction.op_count(), words.bits) {
                        (2, 64) => instruction.set_immediate64(target),
                        (2, _) => instruction.set_immediate32(target as u32),
                        (_, bits) => {
                            let target = near_enough(instruction.code(), words, here, target);
                            match bits {
                                64 => instruction.set_near_branch64(target),
                                _ => instruction.set_near_branch32(target as u32),
                            }
                        }
                    }
                    *instruction
                }
            };
            if encoder.encode(&instruction, here).is_ok() {
                bytes.extend_from_slice(&encoder.take_buffer());
            } else {
                let _ = encoder.take_buffer();
                bytes.push(0x90);
            }
        }
    }
    let end = rip + bytes.len() as u64;
    Program { rip, bytes, starts, end }
}

/// LOOP and JRCXZ reach 127 bytes.
fn near_enough(code: Code, words: &Words, here: u64, target: u64) -> u64 {
    let short = code == words.loop_ || code == words.jump_on_count;
    if short && target.wrapping_sub(here) > 120 { here + 2 } else { target }
}
