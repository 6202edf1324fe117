//! What random programs are made of besides what is copied, in 64-bit code and in 32-bit code.

use iced_x86::{Code, Instruction, Register};

/// Forms of instructions by the size of code.
pub struct Words {
    pub bits: u32,
    /// How many general registers it can name, and the first of those that addresses are in.
    pub registers: u64,
    pub first: Register,
    mov: Code,
    pub store: Code,
    pub compare: Code,
    pub jmp: Code,
    pub call: Code,
    pub push: Code,
    pub pop: Code,
    pub push_immediate: [Code; 2],
    pub loop_: Code,
    pub jump_on_count: Code,
    /// `subl $1,` at an address and a number that follow.
    pub count_down: &'static [u8],
    /// Forms that only handlers or the native unit know.
    pub others: &'static [Code],
    /// Instructions without operands of their own, as bytes.
    pub fixed: &'static [&'static [u8]],
}

impl Words {
    /// Moves a number to a register.
    pub fn mov(&self, register: Register, value: u64) -> Instruction {
        match self.bits {
            64 => Instruction::with2(self.mov, register, value).unwrap(),
            _ => Instruction::with2(self.mov, register, value as u32).unwrap(),
        }
    }
}

/// The form of a direct branch that a size of code has, by that of 64-bit code.
pub fn narrowed(code: Code, words: &Words) -> Code {
    if words.bits == 64 {
        return code;
    }
    // iced has one after the other: of 16-bit, 32-bit and 64-bit code.
    let narrow = Code::try_from(code as usize - 1).unwrap();
    assert!(narrow.mnemonic() == code.mnemonic() && narrow.op_code().mode32(), "{narrow:?}");
    narrow
}

/// 64-bit code.
pub static WIDE: Words = Words {
    bits: 64,
    registers: 16,
    first: Register::RAX,
    mov: Code::Mov_r64_imm64,
    store: Code::Mov_rm64_r64,
    compare: Code::Cmp_r64_rm64,
    jmp: Code::Jmp_rm64,
    call: Code::Call_rm64,
    push: Code::Push_r64,
    pop: Code::Pop_r64,
    push_immediate: [Code::Pushq_imm32, Code::Pushq_imm8],
    loop_: Code::Loop_rel8_64_RCX,
    jump_on_count: Code::Jrcxz_rel8_64,
    count_down: &[0x83, 0x2c, 0x25],
    others: OTHERS,
    fixed: FIXED,
};

/// 32-bit code.
pub static NARROW: Words = Words {
    bits: 32,
    registers: 8,
    first: Register::EAX,
    mov: Code::Mov_r32_imm32,
    store: Code::Mov_rm32_r32,
    compare: Code::Cmp_r32_rm32,
    jmp: Code::Jmp_rm32,
    call: Code::Call_rm32,
    push: Code::Push_r32,
    pop: Code::Pop_r32,
    push_immediate: [Code::Pushd_imm32, Code::Pushd_imm8],
    loop_: Code::Loop_rel8_32_ECX,
    jump_on_count: Code::Jecxz_rel8_32,
    count_down: &[0x83, 0x2d],
    others: NARROW_OTHERS,
    fixed: NARROW_FIXED,
};

const OTHERS: &[Code] = {
    use Code::*;
    &[
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
};

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

const NARROW_OTHERS: &[Code] = {
    use Code::*;
    &[
        Div_rm8,
        Div_rm16,
        Div_rm32,
        Idiv_rm8,
        Idiv_rm32,
        Bt_rm16_r16,
        Bts_rm32_r32,
        Btr_rm32_r32,
        Btc_rm32_r32,
        Bt_rm32_r32,
        Cmpxchg8b_m64,
        Push_rm32,
        Push_rm16,
        Pop_rm32,
        Pop_rm16,
        Push_r16,
        Pop_r16,
        Inc_r32,
        Dec_r32,
        Inc_r16,
        Mov_EAX_moffs32,
        Mov_moffs32_EAX,
        Mov_AL_moffs8,
        Mov_moffs16_AX,
        Add_rm8_imm8_82,
        Cmp_rm8_imm8_82,
        Bound_r32_m3232,
        Arpl_rm16_r16,
        Movups_xmm_xmmm128,
        Movups_xmmm128_xmm,
        Movaps_xmm_xmmm128,
        Movdqa_xmmm128_xmm,
        Paddd_xmm_xmmm128,
        Pxor_xmm_xmmm128,
        Movd_xmm_rm32,
        Movd_rm32_xmm,
        Pmovmskb_r32_xmm,
        Cvtsi2sd_xmm_rm32,
        Addsd_xmm_xmmm64,
        Ucomisd_xmm_xmmm64,
        Cvttsd2si_r32_xmmm64,
        Pshufd_xmm_xmmm128_imm8,
        Movntq_m64_mm,
        Movnti_m32_r32,
        Fld_m64fp,
        Fstp_m64fp,
        Fld_m80fp,
        Call_rm32,
        Jmp_rm32,
        Call_rm16,
        Prefetcht0_m8,
        Nop_rm32,
        Enterd_imm16_imm8,
        Invlpg_m,
        VEX_Vpaddd_xmm_xmm_xmmm128,
        Movbe_r32_m32,
        Lea_r32_m,
    ]
};

/// The selectors are those of `crate::testing`, and of the machine's own segments.
const NARROW_FIXED: &[&[u8]] = &[
    &[0x9c],             // pushfl
    &[0x9d],             // popfl
    &[0x66, 0x9c],       // pushfw
    &[0x9f],             // lahf
    &[0x9e],             // sahf
    &[0xfc],             // cld
    &[0xfd],             // std
    &[0xa4],             // movsb
    &[0xa5],             // movsl
    &[0x66, 0xab],       // stosw
    &[0xf3, 0xaa],       // rep stosb
    &[0xf3, 0xa5],       // rep movsl
    &[0xf3, 0xa6],       // repe cmpsb
    &[0xf2, 0xae],       // repne scasb
    &[0xad],             // lodsl
    &[0xd7],             // xlatb
    &[0xc9],             // leave
    &[0x66, 0xc9],       // leavew
    &[0xcc],             // int3
    &[0x0f, 0x0b],       // ud2
    &[0x0f, 0xa2],       // cpuid
    &[0x0f, 0x31],       // rdtsc
    &[0xe6, 0x80],       // out %al, $0x80
    &[0xed],             // in (%dx), %eax
    &[0x0f, 0x01, 0xf8], // swapgs, which there is none of
    &[0x0f, 0x01, 0xca], // clac
    &[0x0f, 0x01, 0xcb], // stac
    &[0xfa],             // cli
    &[0xfb],             // sti
    &[0xfb, 0xfb],
    &[0xf3, 0x90],                         // pause
    &[0x0f, 0xae, 0xf0],                   // mfence
    &[0xc3],                               // ret
    &[0xc2, 0x10, 0x00],                   // ret $16
    &[0x66, 0xc3],                         // retw
    &[0x0f, 0x20, 0xd8, 0x0f, 0x22, 0xd8], // mov %cr3, %eax; mov %eax, %cr3
    &[0xb8, 0x10, 0, 0, 0, 0x8e, 0xd0],    // mov $0x10, %eax; mov %eax, %ss
    &[0xb8, 0x23, 0, 0, 0, 0x8e, 0xd0],    // mov $0x23, %eax; mov %eax, %ss
    &[0xb8, 0x23, 0, 0, 0, 0x8e, 0xd8],    // mov $0x23, %eax; mov %eax, %ds
    &[0xb8, 0x5b, 0, 0, 0, 0x8e, 0xd8],    // mov $0x5b, %eax; mov %eax, %ds
    &[0x6a, 0x23, 0x07],                   // push $0x23; pop %es
    &[0x6a, 0x5b, 0x07],                   // push $0x5b; pop %es
    &[0x6a, 0x23, 0x1f],                   // push $0x23; pop %ds
    &[0x6a, 0x5b, 0x0f, 0xa1],             // push $0x5b; pop %fs
    &[0x6a, 0x23, 0x0f, 0xa1],             // push $0x23; pop %fs
    &[0x31, 0xc0, 0x8e, 0xe8],             // xor %eax, %eax; mov %eax, %gs
    &[0x16, 0x0f, 0xa9],                   // push %ss; pop %gs
    &[0x0f, 0x06],                         // clts
    &[0x0f, 0x05, 0x90],                   // syscall
    &[0x0f, 0x34],                         // sysenter
    &[0xc8, 0x20, 0x00, 0x02],             // enter $32, $2
    &[0xf0, 0x90],                         // lock nop: undefined
    &[0xf0, 0x01, 0xc8],                   // lock add %ecx, %eax: undefined
    &[0x67, 0x8d, 0x42, 0x10],             // lea 16(%bp, %si), %eax
    &[0x67, 0x8b, 0x06, 0x10, 0x00],       // mov 0x10, %eax
    &[0x67, 0xa1, 0x10, 0x00],
    &[0x67, 0xe3, 0x00], // jcxz
    &[0x67, 0xe2, 0x00], // loop by %cx
    &[0x66, 0x90],
    &[0x0f, 0x1e, 0xfb], // endbr32
    &[0x8c, 0xd8],       // mov %ds, %eax
    &[0x0f, 0x01, 0xe0], // smsw %eax
    &[0x27],             // daa
    &[0x37],             // aaa
    &[0xd4, 0x0a],       // aam
    &[0xd6],             // salc
    &[0xce],             // into
    &[0x60],             // pushal
    &[0x61],             // popal
    &[0x50, 0x53, 0x56], // push %eax; push %ebx; push %esi
    &[0x5e, 0x5b, 0x58],
    &[0xc5, 0xf8, 0x77], // vzeroupper
];
