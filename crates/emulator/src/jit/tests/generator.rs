//! Random programs of 64-bit code: by rule over everything that the translator copies, with branches, the stack and
//! instructions that only handlers know in between.

use iced_x86::{
    Code, CodeSize, Decoder, DecoderOptions, Encoder, Instruction, OpCodeOperandKind, OpKind, Register,
    RflagsBits,
};

use super::machine::{COUNTER, STACK_PAGE, WINDOW, WINDOW_PAGES};
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
    others: Vec<Code>,
}

impl Forms {
    /// Everything that is copied, found by making each and asking.
    pub fn new() -> Self {
        let mut random = Random(1);
        let copied = |&code: &Code| {
            (0..8).any(|_| {
                instance(code, &mut random)
                    .and_then(|i| encoded(&i))
                    .is_some_and(|i| is_copied(&i) && i.code() == code)
            })
        };
        let mut all: Vec<Code> = Code::values().filter(copied).collect();
        all.retain(|code| code.op_code().is_instruction());
        Self { copied: all, others: others() }
    }
}

/// Forms that only handlers or the native unit know.
fn others() -> Vec<Code> {
    use Code::*;
    vec![
        Div_rm8,
        Div_rm16,
        Div_rm32,
        Div_rm64,
        Idiv_rm8,
        Idiv_rm32,
        Idiv_rm64,
        Bt_rm16_r16,
        Bts_rm32_r32,
        Btr_rm64_r64,
        Btc_rm64_r64,
        Cmpxchg8b_m64,
        Cmpxchg16b_m128,
        Push_rm64,
        Push_rm16,
        Pop_rm64,
        Pop_rm16,
        Push_r16,
        Pop_r16,
        Movups_xmm_xmmm128,
        Movups_xmmm128_xmm,
        Movaps_xmm_xmmm128,
        Movdqu_xmm_xmmm128,
        Movdqa_xmmm128_xmm,
        Paddd_xmm_xmmm128,
        Pxor_xmm_xmmm128,
        Movd_xmm_rm32,
        Movq_xmm_rm64,
        Movq_rm64_xmm,
        Movd_rm32_xmm,
        Pmovmskb_r32_xmm,
        Cvtsi2sd_xmm_rm64,
        Addsd_xmm_xmmm64,
        Ucomisd_xmm_xmmm64,
        Comiss_xmm_xmmm32,
        Cvttsd2si_r64_xmmm64,
        Mulss_xmm_xmmm32,
        Pshufd_xmm_xmmm128_imm8,
        Movntq_m64_mm,
        Movnti_m64_r64,
        Fld_m64fp,
        Fstp_m64fp,
        Fld_m80fp,
        Call_rm64,
        Jmp_rm64,
        Wrfsbase_r64,
        Wrgsbase_r64,
        Rdfsbase_r64,
        Prefetcht0_m8,
        Nop_rm32,
        Enterq_imm16_imm8,
        Invlpg_m,
        VEX_Vpaddd_xmm_xmm_xmmm128,
        Movbe_r64_m64,
    ]
}

/// Instructions without operands of their own, as bytes.
const FIXED: &[&[u8]] = &[
    &[0x9c],             // pushfq
    &[0x9d],             // popfq
    &[0x9f],             // lahf
    &[0x9e],             // sahf
    &[0xfc],             // cld
    &[0xfd],             // std
    &[0xa4],             // movsb
    &[0x48, 0xa5],       // movsq
    &[0x66, 0xab],       // stosw
    &[0xf3, 0xaa],       // rep stosb
    &[0xf3, 0x48, 0xa5], // rep movsq
    &[0xf3, 0xa6],       // repe cmpsb
    &[0xf2, 0xae],       // repne scasb
    &[0xad],             // lodsd
    &[0xd7],             // xlatb
    &[0xc9],             // leave
    &[0xcc],             // int3
    &[0x0f, 0x0b],       // ud2
    &[0x0f, 0xa2],       // cpuid
    &[0x0f, 0x31],       // rdtsc
    &[0xe6, 0x80],       // out %al, $0x80
    &[0xed],             // in (%dx), %eax
    &[0x0f, 0x01, 0xf8], // swapgs
    &[0x0f, 0x01, 0xca], // clac
    &[0x0f, 0x01, 0xcb], // stac
    &[0xfa],             // cli
    &[0xfb],             // sti
    &[0xfb, 0xfb],
    &[0xf3, 0x90],                                  // pause
    &[0x0f, 0xae, 0xf0],                            // mfence
    &[0xc3],                                        // ret
    &[0xc2, 0x10, 0x00],                            // ret $16
    &[0x0f, 0x20, 0xd8, 0x0f, 0x22, 0xd8],          // mov %cr3, %rax; mov %rax, %cr3
    &[0xb8, 0x10, 0, 0, 0, 0x8e, 0xd0],             // mov $0x10, %eax; mov %eax, %ss
    &[0x31, 0xc0, 0x8e, 0xd8],                      // xor %eax, %eax; mov %eax, %ds
    &[0x0f, 0x06],                                  // clts
    &[0x0f, 0x05, 0x90],                            // syscall
    &[0xc8, 0x20, 0x00, 0x02],                      // enter $32, $2
    &[0xf0, 0x90],                                  // lock nop: undefined
    &[0xf0, 0x01, 0xc8],                            // lock add %ecx, %eax: undefined
    &[0x48, 0xa1, 0x10, 0x00, 0x40, 0, 0, 0, 0, 0], // movabs 0x400010, %rax
    &[0x67, 0xa0, 0x10, 0x00, 0x40, 0x00],          // addr32 mov 0x400010, %al
    &[0x67, 0x8d, 0x44, 0x88, 0xf0],                // lea -16(%eax,%ecx,4), %eax
    &[0x66, 0x90],
    &[0x0f, 0x1e, 0xfa], // endbr64
    &[0x8c, 0xd8],       // mov %ds, %eax
    &[0x0f, 0x01, 0xe0], // smsw %eax
];

fn register(random: &mut Random, size: usize) -> Register {
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
    let number = random.below(16) as u32;
    if size <= 8 && number == 4 && !random.one_in(4) { first } else { first + number }
}

/// Gives an instruction a random memory operand.
fn memory(instruction: &mut Instruction, n: u32, random: &mut Random) {
    instruction.set_op_kind(n, OpKind::Memory);
    instruction.set_memory_index_scale(1);
    let narrow = random.one_in(8);
    let first = if narrow { Register::EAX } else { Register::RAX };
    let any = |random: &mut Random| first + random.below(16) as u32;
    let small = random.below(256).wrapping_sub(128);
    let (mut base, mut index, mut displacement, mut size) = (Register::None, Register::None, small, 1);
    match random.below(10) {
        0 => {
            base = if narrow { Register::EIP } else { Register::RIP };
            (displacement, size) = (random.address(), 8);
        }
        1 => (displacement, size) = (random.address(), if narrow { 4 } else { 8 }),
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
fn instance(code: Code, random: &mut Random) -> Option<Instruction> {
    use OpCodeOperandKind::*;
    let mut instruction = Instruction::new();
    instruction.set_code(code);
    instruction.set_code_size(CodeSize::Code64);
    let as_memory = random.below(5) < 2;
    for (n, kind) in code.op_code().op_kinds().iter().copied().enumerate() {
        let n = n as u32;
        match kind {
            mem => memory(&mut instruction, n, random),
            r8_or_mem | r16_or_mem | r32_or_mem | r64_or_mem | xmm_or_mem if as_memory => {
                memory(&mut instruction, n, random);
            }
            _ if register_size(kind) != 0 => {
                instruction.set_op_register(n, register(random, register_size(kind)));
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
                if n > 0 && code == Code::Enterq_imm16_imm8 {
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
fn encoded(instruction: &Instruction) -> Option<Instruction> {
    let mut encoder = Encoder::new(64);
    encoder.encode(instruction, 0x10_4000).ok()?;
    let bytes = encoder.take_buffer();
    Some(Decoder::with_ip(64, &bytes, 0x10_4000, DecoderOptions::NONE).decode())
}

/// Sets all six flags from registers.
fn definer(random: &mut Random) -> Item {
    let code = random.pick(&[Code::Cmp_r64_rm64, Code::Add_r32_rm32, Code::Sub_r8_rm8, Code::Neg_rm16]);
    loop {
        let made =
            instance(code, random).filter(|i| (0..i.op_count()).all(|n| i.op_kind(n) == OpKind::Register));
        if let Some(made) = made.filter(|i| encoded(i).is_some()) {
            return Item::Defines(made);
        }
    }
}

/// Adds an instruction, and another that defines the flags where it leaves them undefined: those that are undefined
/// may differ. After logic only AF is, and both engines clear it.
fn add(items: &mut Vec<Item>, instruction: Instruction, random: &mut Random) {
    let undefined = instruction.rflags_undefined();
    items.push(Item::Instruction(instruction));
    let logic = undefined == RflagsBits::AF && instruction.rflags_cleared() != 0;
    if undefined != 0 && !logic {
        items.push(definer(random));
    }
}

fn random_form(items: &mut Vec<Item>, forms: &[Code], random: &mut Random) {
    for _ in 0..8 {
        let code = random.pick(forms);
        if let Some(made) = instance(code, random)
            && encoded(&made).is_some_and(|i| i.code() == code)
        {
            return add(items, made, random);
        }
    }
}

/// A branch to an item further on.
fn branch(items: &mut Vec<Item>, random: &mut Random) {
    let to = items.len() + 1 + random.below(6) as usize;
    let near = |code: Code| Instruction::with_branch(code, 0).unwrap();
    let register = Register::RAX + random.below(16) as u32;
    match random.below(11) {
        n @ (7 | 8) => {
            // mov $target, %register; mov %register, (STACK_PAGE - 8); then through it, in either way.
            let place = iced_x86::MemoryOperand::with_displ(STACK_PAGE - 8, 8);
            let store = Instruction::with2(Code::Mov_rm64_r64, place, register).unwrap();
            let code = if n == 7 { Code::Jmp_rm64 } else { Code::Call_rm64 };
            items.push(Item::Towards(
                Instruction::with2(Code::Mov_r64_imm64, register, 0u64).unwrap(),
                to + 2,
            ));
            items.push(Item::Instruction(store));
            items.push(Item::Instruction(Instruction::with1(code, place).unwrap()));
        }
        0 => items.push(Item::Towards(near(Code::Jmp_rel32_64), to)),
        1 => items.push(Item::Towards(near(Code::Call_rel32_64), to)),
        2 => items.push(Item::Towards(near(Code::Loop_rel8_64_RCX), to)),
        3 => items.push(Item::Towards(near(Code::Jrcxz_rel8_64), to)),
        n @ (4 | 5) => {
            items.push(Item::Towards(
                Instruction::with2(Code::Mov_r64_imm64, register, 0u64).unwrap(),
                to + 1,
            ));
            let code = if n == 4 { Code::Jmp_rm64 } else { Code::Call_rm64 };
            items.push(Item::Instruction(Instruction::with1(code, register).unwrap()));
        }
        6 => {
            items.push(Item::Towards(
                Instruction::with2(Code::Mov_r64_imm64, register, 0u64).unwrap(),
                to + 2,
            ));
            items.push(Item::Instruction(Instruction::with1(Code::Push_r64, register).unwrap()));
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

fn stack(items: &mut Vec<Item>, random: &mut Random) {
    let register = Register::RAX + random.below(16) as u32;
    items.push(match random.below(8) {
        0 => Item::Instruction(
            Instruction::with2(Code::Mov_r64_imm64, Register::RSP, STACK_PAGE + 0x800).unwrap(),
        ),
        1 => Item::Instruction(Instruction::with1(Code::Pushq_imm32, random.next() as i32).unwrap()),
        2 => Item::Instruction(Instruction::with1(Code::Pushq_imm8, random.next() as i8 as i32).unwrap()),
        3 | 4 => Item::Instruction(Instruction::with1(Code::Pop_r64, register).unwrap()),
        _ => Item::Instruction(Instruction::with1(Code::Push_r64, register).unwrap()),
    });
}

fn one(items: &mut Vec<Item>, forms: &Forms, random: &mut Random) {
    match random.below(100) {
        0..15 => {
            let register = Register::RAX + random.below(16) as u32;
            let register = if register == Register::RSP { Register::RBP } else { register };
            items.push(Item::Instruction(
                Instruction::with2(Code::Mov_r64_imm64, register, random.value()).unwrap(),
            ));
        }
        15..23 => stack(items, random),
        23..29 => branch(items, random),
        29..36 => random_form(items, &forms.others, random),
        36..40 => {
            items.push(Item::Bytes(vec![0xb9, random.below(40) as u8, 0, 0, 0])); // mov $n, %ecx
            items.push(Item::Bytes(random.pick(FIXED).to_vec()));
        }
        _ => random_form(items, &forms.copied, random),
    }
}

/// A random program: what [`one`] gives, a few times round, and a HLT.
pub fn program(random: &mut Random, forms: &Forms) -> Program {
    let mut items = Vec::new();
    let count = 5 + random.below(36);
    while (items.len() as u64) < count {
        one(&mut items, forms, random);
    }
    // subl $1, COUNTER; jnz to the first
    let mut count_down = vec![0x83, 0x2c, 0x25];
    count_down.extend_from_slice(&(COUNTER as u32).to_le_bytes());
    count_down.push(1);
    items.push(Item::Bytes(count_down));
    items.push(Item::Towards(Instruction::with_branch(Code::Jne_rel32_64, 0).unwrap(), 0));
    items.push(Item::Bytes(vec![0xf4]));
    let mut rip = super::machine::PROGRAM + random.pick(&[0, 0x100, 0xf80, 0xfc0, 0xff0]) + random.below(16);
    loop {
        let program = assemble(rip, &mut items);
        let page = |n: usize| program.starts[n] >> 12;
        if (0..items.len()).all(|n| !matches!(items[n], Item::Defines(_)) || page(n - 1) == page(n + 1)) {
            return program;
        }
        rip -= 1;
    }
}

fn assemble(rip: u64, items: &mut [Item]) -> Program {
    let mut starts = vec![rip; items.len()];
    let mut bytes = Vec::new();
    let mut encoder = Encoder::new(64);
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
                    if instruction.op_count() == 2 {
                        instruction.set_immediate64(target);
                    } else {
                        instruction.set_near_branch64(near_enough(instruction.code(), here, target));
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
fn near_enough(code: Code, here: u64, target: u64) -> u64 {
    let short = matches!(code, Code::Loop_rel8_64_RCX | Code::Jrcxz_rel8_64);
    if short && target.wrapping_sub(here) > 120 { here + 2 } else { target }
}
