//! Operands: guest registers in host registers, and memory operands through the translation cache.

use iced_x86::{Code, EncodingKind, Instruction, Mnemonic, OpAccess, OpKind, Register};

use super::{Miss, NotCopied, StackMiss, Translator};
use crate::jit::assembler::{ADDRESS, AE, Host, Jump, RSP, SCRATCH};
use crate::jit::flat;
use crate::jit::frame::{Home, STACK_OPERAND, home, slot, stack_routine};
use crate::mmu::{Access, ENTRY_PAGE, ENTRY_READ, ENTRY_WRITE};

impl Translator<'_> {
    /// Turns the linear address in [`ADDRESS`] into the host's. Clobbers the host's flags and [`SCRATCH`]. The jump that
    /// it gives is taken where the translation cache has no answer.
    pub(super) fn probe(&mut self, access: Access, size: u32) -> Jump {
        let tag = if access == Access::Write { ENTRY_WRITE } else { ENTRY_READ };
        let miss = self.a.find_entry(tag, size as i32, self.stubs.layout);
        self.a.entry(&[0x03], ADDRESS, ENTRY_PAGE);
        miss
    }

    /// The same for an operand on the stack, which is looked for in the page that the one before it was found in. `place`: how
    /// far it is from the stack pointer, and whether that counts as a whole.
    pub(super) fn probe_stack(&mut self, access: Access, size: u32, place: (i32, bool)) -> Miss {
        if size > STACK_OPERAND as u32 {
            return self.probe(access, size).into();
        }
        self.a.memory(true, &[0x2b], ADDRESS, RSP, slot::STACK_PAGE);
        self.a.memory(true, &[0x3b], ADDRESS, RSP, slot::STACK_LIMIT);
        let from = self.a.jump_if(AE);
        self.a.memory(true, &[0x03], ADDRESS, RSP, slot::STACK_HOST);
        let (displacement, wide) = place;
        let routine = self.stubs.stack[stack_routine(access, size)];
        Miss { from, stack: Some(StackMiss { routine, found: self.a.here(), displacement, wide }) }
    }

    /// The jump is taken where the address in [`ADDRESS`] is no multiple of `alignment`, a power of two.
    pub(super) fn misaligned(&mut self, alignment: u16) -> Jump {
        // test r14d, alignment - 1
        self.a.bytes.extend_from_slice(&[0x41, 0xf7, 0xc6]);
        self.a.bytes.extend_from_slice(&(u32::from(alignment) - 1).to_le_bytes());
        self.a.jump_if(5)
    }

    /// The host register that holds a guest's: its own, or `scratch`, loaded from the frame.
    pub(super) fn guest(&mut self, number: u8, scratch: Host) -> Host {
        match home(number) {
            Home::Host(host) => host,
            Home::Frame(at) => {
                self.a.load(scratch, RSP, at);
                scratch
            }
        }
    }

    /// A general register operand's host register. Those that live in the frame are loaded into a free scratch register.
    pub(super) fn rename(
        &mut self,
        register: Register,
        only_written: bool,
        free: &mut Vec<Host>,
        spilled: &mut Vec<(i32, Host)>,
    ) -> Result<Register, NotCopied> {
        if matches!(register, Register::AH | Register::CH | Register::DH | Register::BH) {
            return Ok(register);
        }
        let host = match home(crate::decode::number(register)) {
            Home::Host(host) => host,
            Home::Frame(at) => match spilled.iter().find(|(slot, _)| *slot == at) {
                Some(&(_, host)) => host,
                None => {
                    let host = free.pop().ok_or(NotCopied)?;
                    if !only_written || register.size() < 4 {
                        self.a.load(host, RSP, at);
                    }
                    spilled.push((at, host));
                    host
                }
            },
        };
        Ok(sized(host, register.size()))
    }

    /// Puts the linear address of a memory operand of `size` bytes into [`ADDRESS`]. Leaves the host's flags as they are unless
    /// a segment's base is added.
    pub(super) fn effective_address(&mut self, i: &Instruction, size: u32) -> Result<(), NotCopied> {
        let wide = self.wide();
        if !wide && !flat::reaches(i, self.source.mode) {
            return Err(NotCopied);
        }
        self.effective_address_to(ADDRESS, wide, i)?;
        let base = match i.memory_segment() {
            Register::FS => slot::FS_BASE,
            Register::GS => slot::GS_BASE,
            _ => return Ok(()),
        };
        if !wide {
            // What goes over the segment's end gets an address that is not canonical, so that no probe finds it.
            self.a.lea(true, SCRATCH, Some(ADDRESS), None, size as i32 - 1);
            self.a.shift(5, SCRATCH, 32);
            self.a.shift(4, SCRATCH, 62);
        }
        self.a.memory(wide, &[0x03], ADDRESS, RSP, base);
        if !wide {
            self.a.registers(true, &[0x0b], ADDRESS, SCRATCH);
        }
        Ok(())
    }

    /// Puts a memory operand's effective address into a host register, or its low 32 bits where not `wide`. Uses both scratch
    /// registers; leaves the host's flags as they are.
    fn effective_address_to(&mut self, to: Host, wide: bool, i: &Instruction) -> Result<(), NotCopied> {
        let (base, index) = (i.memory_base(), i.memory_index());
        if base.is_segment_register() || index.is_vector_register() {
            return Err(NotCopied);
        }
        let narrow = [base, index].iter().any(|r| r.is_gpr32()) || base == Register::EIP;
        let displacement = i.memory_displacement64();
        let absolute = matches!(base, Register::None | Register::RIP | Register::EIP);
        if absolute && index == Register::None {
            let mask = if narrow || !wide { 0xffff_ffff } else { u64::MAX };
            self.a.mov_immediate(to, displacement & mask);
            return Ok(());
        }
        let disp = i32::try_from(displacement as i64).or(if narrow {
            Ok(displacement as u32 as i32)
        } else {
            Err(NotCopied)
        })?;
        let base = match base {
            Register::None => None,
            base if base.is_gpr64() || base.is_gpr32() => Some(self.guest(base.number() as u8, ADDRESS)),
            _ => return Err(NotCopied),
        };
        let index = match index {
            Register::None => None,
            index => {
                let host = self.guest(index.number() as u8, SCRATCH);
                Some((host, i.memory_index_scale().trailing_zeros() as u8))
            }
        };
        self.a.lea(wide && !narrow, to, base, index, disp);
        Ok(())
    }

    /// LEA.
    pub(super) fn lea(&mut self, i: &Instruction) -> Result<(), NotCopied> {
        let to = i.op_register(0);
        match (to.size(), home(crate::decode::number(to))) {
            (2, at) => {
                self.effective_address_to(ADDRESS, false, i)?;
                self.a.bytes.push(0x66);
                match at {
                    Home::Host(host) => self.a.registers(false, &[0x8b], host, ADDRESS),
                    Home::Frame(at) => self.a.memory(false, &[0x89], ADDRESS, RSP, at),
                }
            }
            (size, Home::Host(host)) => self.effective_address_to(host, size == 8, i)?,
            (size, Home::Frame(at)) => {
                self.effective_address_to(ADDRESS, size == 8, i)?;
                self.a.store(ADDRESS, RSP, at);
            }
        }
        Ok(())
    }

    /// BT and its kin with a bit number from a register, which reaches beyond the operand: the host does the same from an
    /// address that is as far before the one that was found.
    pub(super) fn bit_string(&mut self, i: &Instruction) -> Result<(), NotCopied> {
        let (size, bit) = (i.op_register(1).size() as u8, i.op_register(1).full_register().number() as u8);
        let wraps = i.memory_base().is_gpr32() || i.memory_index().is_gpr32();
        let goes_round = !matches!(i.memory_segment(), Register::FS | Register::GS);
        if size < 4 || wraps && self.wide() || !goes_round && !self.wide() {
            return Err(NotCopied);
        }
        self.give_up_flags();
        let call = self.call();
        self.effective_address(i, size.into())?;
        let scale = size.trailing_zeros() as u8;
        self.word_of_bit(bit, size);
        self.a.lea(self.wide(), ADDRESS, Some(ADDRESS), Some((SCRATCH, scale)), 0);
        let access = if i.mnemonic() == Mnemonic::Bt { Access::Read } else { Access::Write };
        let miss = self.probe(access, u32::from(size));
        self.word_of_bit(bit, size);
        self.a.registers(true, &[0xf7], 3, SCRATCH); // neg
        self.a.lea(true, ADDRESS, Some(ADDRESS), Some((SCRATCH, scale)), 0);
        // Another recipe than the frame has nobody needs here.
        if let super::Flags::Recipe(_) | super::Flags::Dynamic = self.at.flags {
            return Err(NotCopied);
        }
        self.load_flags();
        let number = self.guest(bit, SCRATCH);
        let mut copy = *i;
        copy.set_op_register(1, sized(number, size.into()));
        set_memory(&mut copy, i, None);
        self.encode(&copy)?;
        (self.at.flags, self.at.recipe) = (super::Flags::Host, None);
        self.resume_here(miss, call, i);
        Ok(())
    }

    /// How many words of `size` bytes a bit is away, to [`SCRATCH`].
    fn word_of_bit(&mut self, bit: u8, size: u8) {
        let number = self.guest(bit, SCRATCH);
        if size == 4 {
            self.a.registers(true, &[0x63], SCRATCH, number); // movsxd
            self.a.shift(7, SCRATCH, 5);
        } else {
            self.a.mov(SCRATCH, number);
            self.a.shift(7, SCRATCH, 6);
        }
    }
}

/// The host register of a number and a size in bytes.
fn sized(host: Host, size: usize) -> Register {
    let first = match size {
        1 if host < 4 => return Register::AL + u32::from(host),
        1 if host < 8 => return Register::SPL + u32::from(host - 4),
        1 => return Register::R8L + u32::from(host - 8),
        2 => Register::AX,
        4 => Register::EAX,
        _ => Register::RAX,
    };
    first + u32::from(host)
}

/// Whether it is BT, BTS, BTR or BTC of memory with a bit number from a register.
pub fn is_bit_string(i: &Instruction) -> bool {
    matches!(i.mnemonic(), Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc)
        && i.op_kind(0) == OpKind::Memory
        && i.op_kind(1) == OpKind::Register
}

/// A general register that is only read is read where it lives in the frame, if it does and the instruction can. Gives
/// whether it does now.
pub fn read_in_frame(copy: &mut Instruction, n: u32, access: OpAccess, loaded: &[(i32, Host)]) -> bool {
    let Home::Frame(at) = home(crate::decode::number(copy.op_register(n))) else { return false };
    let others = (0..copy.op_count()).any(|n| copy.op_kind(n) == OpKind::Memory);
    let is_loaded = loaded.iter().any(|&(slot, _)| slot == at);
    // In memory a bit's number reaches beyond the operand, and an exchange is locked.
    let differs = matches!(
        copy.mnemonic(),
        Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc | Mnemonic::Xchg | Mnemonic::Xadd
    );
    // With an operand in memory, the bit for rounding says something else.
    let rounds = copy.op_code().encoding() == EncodingKind::EVEX;
    if access != OpAccess::Read || others || is_loaded || differs || rounds {
        return false;
    }
    if n == 1 && copy.op_kind(0) == OpKind::Register {
        match copy.mnemonic() {
            Mnemonic::Test => {
                let (left, right) = (copy.op_register(0), copy.op_register(1));
                if home_is_frame(left) {
                    return false;
                }
                copy.set_op_register(0, right);
                copy.set_op_register(1, left);
                set_frame_operand(copy, 0, at);
                return true;
            }
            _ => {
                if let Some(code) = from_memory(copy.code()) {
                    copy.set_code(code);
                }
            }
        }
    }
    use iced_x86::OpCodeOperandKind::{r8_or_mem, r16_or_mem, r32_or_mem, r64_or_mem};
    let kind = copy.op_code().op_kind(n);
    if !matches!(kind, r8_or_mem | r16_or_mem | r32_or_mem | r64_or_mem) {
        return false;
    }
    set_frame_operand(copy, n, at);
    true
}

/// Whether an instruction that is to run writes to a host register, by what it does with its operands.
pub fn writes(copy: &Instruction, accesses: &[OpAccess], host: Host) -> bool {
    (0..copy.op_count()).zip(accesses).any(|(n, access)| {
        !matches!(access, OpAccess::Read | OpAccess::CondRead | OpAccess::None)
            && copy.op_kind(n) == OpKind::Register
            && copy.op_register(n).is_gpr()
            && copy.op_register(n).full_register().number() as u8 == host
    })
}

/// Whether no other operand is the same register, or part of it.
pub fn is_once(i: &Instruction, n: u32) -> bool {
    let register = i.op_register(n).full_register();
    let same = |m: u32| i.op_kind(m) == OpKind::Register && i.op_register(m).full_register() == register;
    !(0..i.op_count()).any(|m| m != n && same(m))
}

fn home_is_frame(register: Register) -> bool {
    matches!(home(crate::decode::number(register)), Home::Frame(_))
}

fn set_frame_operand(copy: &mut Instruction, n: u32, at: i32) {
    copy.set_op_kind(n, OpKind::Memory);
    copy.set_segment_prefix(Register::None);
    copy.set_memory_base(Register::RSP);
    copy.set_memory_index(Register::None);
    copy.set_memory_displacement64(at as u64);
    copy.set_memory_displ_size(1);
}

/// The form of an instruction with two register operands whose second may be in memory, where it is another one.
fn from_memory(code: Code) -> Option<Code> {
    macro_rules! forms {
        ($($from:ident $to:ident),* $(,)?) => {
            match code {
                $(Code::$from => Some(Code::$to),)*
                _ => None,
            }
        };
    }
    forms! {
        Mov_rm8_r8 Mov_r8_rm8, Mov_rm16_r16 Mov_r16_rm16, Mov_rm32_r32 Mov_r32_rm32, Mov_rm64_r64 Mov_r64_rm64,
        Add_rm8_r8 Add_r8_rm8, Add_rm16_r16 Add_r16_rm16, Add_rm32_r32 Add_r32_rm32, Add_rm64_r64 Add_r64_rm64,
        Sub_rm8_r8 Sub_r8_rm8, Sub_rm16_r16 Sub_r16_rm16, Sub_rm32_r32 Sub_r32_rm32, Sub_rm64_r64 Sub_r64_rm64,
        And_rm8_r8 And_r8_rm8, And_rm16_r16 And_r16_rm16, And_rm32_r32 And_r32_rm32, And_rm64_r64 And_r64_rm64,
        Or_rm8_r8 Or_r8_rm8, Or_rm16_r16 Or_r16_rm16, Or_rm32_r32 Or_r32_rm32, Or_rm64_r64 Or_r64_rm64,
        Xor_rm8_r8 Xor_r8_rm8, Xor_rm16_r16 Xor_r16_rm16, Xor_rm32_r32 Xor_r32_rm32, Xor_rm64_r64 Xor_r64_rm64,
        Cmp_rm8_r8 Cmp_r8_rm8, Cmp_rm16_r16 Cmp_r16_rm16, Cmp_rm32_r32 Cmp_r32_rm32, Cmp_rm64_r64 Cmp_r64_rm64,
        Adc_rm8_r8 Adc_r8_rm8, Adc_rm16_r16 Adc_r16_rm16, Adc_rm32_r32 Adc_r32_rm32, Adc_rm64_r64 Adc_r64_rm64,
        Sbb_rm8_r8 Sbb_r8_rm8, Sbb_rm16_r16 Sbb_r16_rm16, Sbb_rm32_r32 Sbb_r32_rm32, Sbb_rm64_r64 Sbb_r64_rm64,
    }
}

/// Whether the memory operand is on the stack: addressed by RSP alone.
pub fn is_on_stack(i: &Instruction) -> bool {
    matches!(i.memory_base(), Register::RSP | Register::ESP)
        && i.memory_index() == Register::None
        && !matches!(i.memory_segment(), Register::FS | Register::GS)
}

/// How far an operand on the stack is from the stack pointer, and whether that counts as a whole.
pub fn beside_stack(i: &Instruction) -> (i32, bool) {
    (displacement(i) as i32, i.memory_base() == Register::RSP)
}

/// The memory operand of a copy of `i` becomes what is at [`ADDRESS`], or in the window that begins there and at this
/// displacement.
pub fn set_memory(copy: &mut Instruction, i: &Instruction, window: Option<i64>) {
    let place = window.map_or(0, |low| displacement(i).wrapping_sub(low));
    copy.set_segment_prefix(Register::None);
    copy.set_memory_base(Register::R14);
    copy.set_memory_index(Register::None);
    copy.set_memory_index_scale(1);
    copy.set_memory_displacement64(place as u64);
    copy.set_memory_displ_size(u32::from(place != 0));
}

/// A memory operand's displacement, which has a sign also where addresses have 32 bits.
pub fn displacement(i: &Instruction) -> i64 {
    let narrow =
        i.memory_base().is_gpr32() || i.memory_index().is_gpr32() || i.memory_base() == Register::EIP;
    let displacement = i.memory_displacement64();
    if narrow { i64::from(displacement as u32 as i32) } else { displacement as i64 }
}
