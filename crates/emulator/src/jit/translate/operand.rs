//! Operands: guest registers in host registers, and memory operands through the translation cache.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::{NotCopied, Translator};
use crate::jit::assembler::{ADDRESS, GUEST_RSP, Host, Jump, RSP, SCRATCH};
use crate::jit::frame::slot;
use crate::mmu::{Access, ENTRY_MASK, ENTRY_PAGE, ENTRY_READ, ENTRY_WRITE};

/// Where a guest register lives.
pub enum Home {
    Host(Host),
    Frame(i32),
}

/// Where the guest register of a number lives.
pub fn home(number: u8) -> Home {
    match number {
        4 => Home::Host(GUEST_RSP),
        13..=15 => Home::Frame(slot::R13 + i32::from(number - 13) * 8),
        other => Home::Host(other),
    }
}

impl Translator<'_> {
    /// Turns the linear address in [`ADDRESS`] into the host's. Clobbers the host's flags and [`SCRATCH`]. The jump that
    /// it gives is taken where the translation cache has no answer.
    pub(super) fn probe(&mut self, access: Access, size: u32) -> Jump {
        let tag = if access == Access::Write { ENTRY_WRITE } else { ENTRY_READ };
        self.a.mov(SCRATCH, ADDRESS);
        self.a.shift(5, SCRATCH, 7);
        self.a.alu_immediate(false, 4, SCRATCH, ENTRY_MASK);
        self.a.memory(true, &[0x03], SCRATCH, RSP, slot::TLB);
        self.a.memory(true, &[0x33], ADDRESS, SCRATCH, tag);
        self.a.alu_immediate(true, 7, ADDRESS, 4096 - size as i32);
        let miss = self.a.jump_if(7);
        self.a.memory(true, &[0x03], ADDRESS, SCRATCH, ENTRY_PAGE);
        miss
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
                    self.a.load(host, RSP, at);
                    spilled.push((at, host));
                    host
                }
            },
        };
        Ok(sized(host, register.size()))
    }

    /// Puts a memory operand's address into [`ADDRESS`]: linear, or without the segment's base for LEA. Leaves the
    /// host's flags as they are unless a segment's base is added.
    pub(super) fn effective_address(&mut self, i: &Instruction, linear: bool) -> Result<(), NotCopied> {
        let (base, index) = (i.memory_base(), i.memory_index());
        if base.is_segment_register() || index.is_vector_register() {
            return Err(NotCopied);
        }
        let narrow = [base, index].iter().any(|r| r.is_gpr32()) || base == Register::EIP;
        let displacement = i.memory_displacement64();
        let absolute = matches!(base, Register::None | Register::RIP | Register::EIP);
        if absolute && index == Register::None {
            let address = if narrow { displacement & 0xffff_ffff } else { displacement };
            self.a.mov_immediate(ADDRESS, address);
        } else {
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
            self.a.lea(!narrow, ADDRESS, base, index, disp);
        }
        match i.memory_segment() {
            Register::FS if linear => self.a.memory(true, &[0x03], ADDRESS, RSP, slot::FS_BASE),
            Register::GS if linear => self.a.memory(true, &[0x03], ADDRESS, RSP, slot::GS_BASE),
            _ => {}
        }
        Ok(())
    }

    /// BT and its kin with a bit number from a register, which reaches beyond the operand: the host does the same from an
    /// address that is as far before the one that was found.
    pub(super) fn bit_string(&mut self, i: &Instruction) -> Result<(), NotCopied> {
        let (size, bit) = (i.op_register(1).size() as u8, i.op_register(1).full_register().number() as u8);
        if size < 4 || i.memory_base().is_gpr32() || i.memory_index().is_gpr32() {
            return Err(NotCopied);
        }
        self.give_up_flags();
        let call = self.call();
        self.effective_address(i, true)?;
        let scale = size.trailing_zeros() as u8;
        self.word_of_bit(bit, size);
        self.a.lea(true, ADDRESS, Some(ADDRESS), Some((SCRATCH, scale)), 0);
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
        set_memory(&mut copy);
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

    /// LEA: its result is in [`ADDRESS`].
    pub(super) fn finish_lea(&mut self, i: &Instruction, copy: &Instruction) {
        let to = copy.op_register(0).full_register().number() as u8;
        match i.op_register(0).size() {
            2 => {
                self.a.bytes.push(0x66);
                self.a.registers(false, &[0x8b], to, ADDRESS);
            }
            4 => self.a.registers(false, &[0x8b], to, ADDRESS),
            _ => self.a.mov(to, ADDRESS),
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

/// The memory operand becomes `[ADDRESS]`.
pub fn set_memory(copy: &mut Instruction) {
    copy.set_segment_prefix(Register::None);
    copy.set_memory_base(Register::R14);
    copy.set_memory_index(Register::None);
    copy.set_memory_index_scale(1);
    copy.set_memory_displacement64(0);
    copy.set_memory_displ_size(0);
}
