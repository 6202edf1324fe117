//! The few host instructions that translated code is made of besides the guest's own.

use super::frame::Layout;
use crate::mmu::{ENTRY_MASK, FOLD};

/// A host register by its number in an encoding.
pub type Host = u8;

pub const RAX: Host = 0;
pub const RCX: Host = 1;
pub const RDX: Host = 2;
pub const RSP: Host = 4;
pub const RBP: Host = 5;
pub const RDI: Host = 7;
pub const RSI: Host = 6;
/// Where the guest's stack pointer lives.
pub const GUEST_RSP: Host = 10;
/// The present view's entries of the translation cache.
pub const TLB: Host = 11;
/// Scratch: the memory operand's address.
pub const ADDRESS: Host = 14;
/// Scratch.
pub const SCRATCH: Host = 15;

/// Conditions by their numbers in an encoding: above or equal, equal, not equal, below or equal, above.
pub const AE: u8 = 3;
pub const E: u8 = 4;
pub const NE: u8 = 5;
pub const BE: u8 = 6;
pub const A: u8 = 7;

/// Bytes of code in the making.
#[derive(Default)]
pub struct Assembler {
    pub bytes: Vec<u8>,
}

/// A place whose 32-bit displacement is filled in later.
#[derive(Clone, Copy, Debug)]
pub struct Jump(usize);

impl Assembler {
    pub fn here(&self) -> usize {
        self.bytes.len()
    }

    fn rex(&mut self, wide: bool, reg: Host, index: Host, base: Host) {
        let rex = 0x40 | u8::from(wide) << 3 | (reg >> 3) << 2 | (index >> 3) << 1 | base >> 3;
        if rex != 0x40 {
            self.bytes.push(rex);
        }
    }

    /// `op reg, rm` or `op rm, reg`, both registers.
    pub fn registers(&mut self, wide: bool, opcode: &[u8], reg: Host, rm: Host) {
        self.rex(wide, reg, 0, rm);
        self.bytes.extend_from_slice(opcode);
        self.bytes.push(0xc0 | (reg & 7) << 3 | rm & 7);
    }

    /// `op reg, [base + disp]` or the other way round.
    pub fn memory(&mut self, wide: bool, opcode: &[u8], reg: Host, base: Host, disp: i32) {
        self.rex(wide, reg, 0, base);
        self.bytes.extend_from_slice(opcode);
        self.mod_rm_disp(reg, base, disp);
    }

    fn mod_rm_disp(&mut self, reg: Host, base: Host, disp: i32) {
        let short = i8::try_from(disp);
        let mode = match short {
            Ok(0) if base & 7 != RBP => 0,
            Ok(_) => 0x40,
            Err(_) => 0x80,
        };
        self.bytes.push(mode | (reg & 7) << 3 | base & 7);
        if base & 7 == RSP {
            self.bytes.push(0x24);
        }
        match short {
            Ok(_) if mode == 0 => {}
            Ok(short) => self.bytes.push(short as u8),
            Err(_) => self.bytes.extend_from_slice(&disp.to_le_bytes()),
        }
    }

    /// `lea reg, [base + index * 2^scale + disp]`; without base or index where they are `None`. A `mov` where that is the same.
    pub fn lea(&mut self, wide: bool, reg: Host, base: Option<Host>, index: Option<(Host, u8)>, disp: i32) {
        if let (Some(base), None, 0) = (base, index, disp) {
            return self.registers(wide, &[0x8b], reg, base);
        }
        if let (Some(base), None) = (base, index) {
            return self.memory(wide, &[0x8d], reg, base, disp);
        }
        let (index, scale) = index.unwrap_or((RSP, 0));
        self.rex(wide, reg, index, base.unwrap_or(0));
        self.bytes.push(0x8d);
        let short = i8::try_from(disp).ok().filter(|_| base.is_some());
        let mode = match (base, short) {
            (None, _) => 0,
            (Some(base), Some(0)) if base & 7 != RBP => 0,
            (_, Some(_)) => 0x40,
            _ => 0x80,
        };
        self.bytes.push(mode | (reg & 7) << 3 | RSP);
        self.bytes.push(scale << 6 | (index & 7) << 3 | base.unwrap_or(RBP) & 7);
        match short {
            Some(short) if mode != 0 => self.bytes.push(short as u8),
            Some(_) => {}
            None => self.bytes.extend_from_slice(&disp.to_le_bytes()),
        }
    }

    pub fn mov(&mut self, to: Host, from: Host) {
        self.registers(true, &[0x8b], to, from);
    }
    pub fn load(&mut self, to: Host, base: Host, disp: i32) {
        self.memory(true, &[0x8b], to, base, disp);
    }
    pub fn store(&mut self, from: Host, base: Host, disp: i32) {
        self.memory(true, &[0x89], from, base, disp);
    }

    /// The shortest move of a 64-bit value.
    pub fn mov_immediate(&mut self, to: Host, value: u64) {
        if let Ok(value) = u32::try_from(value) {
            self.rex(false, 0, 0, to);
            self.bytes.push(0xb8 | to & 7);
            self.bytes.extend_from_slice(&value.to_le_bytes());
        } else if let Ok(value) = i32::try_from(value as i64) {
            self.rex(true, 0, 0, to);
            self.bytes.extend_from_slice(&[0xc7, 0xc0 | to & 7]);
            self.bytes.extend_from_slice(&value.to_le_bytes());
        } else {
            self.rex(true, 0, 0, to);
            self.bytes.push(0xb8 | to & 7);
            self.bytes.extend_from_slice(&value.to_le_bytes());
        }
    }

    /// Shifts: `extension` is the operation's number in ModRM.reg (5 SHR, 7 SAR, 4 SHL).
    pub fn shift(&mut self, extension: u8, register: Host, count: u8) {
        self.rex(true, 0, 0, register);
        self.bytes.extend_from_slice(&[0xc1, 0xc0 | extension << 3 | register & 7, count]);
    }

    /// Puts a register's value into another, shifted or rotated to the right: what comes to the top is not defined.
    fn rotated(&mut self, to: Host, from: Host, count: u8, bmi2: bool) {
        if bmi2 {
            // rorx
            let registers = (!to >> 3 & 1) << 7 | 1 << 6 | (!from >> 3 & 1) << 5;
            let modes = 0xc0 | (to & 7) << 3 | from & 7;
            return self.bytes.extend_from_slice(&[0xc4, registers | 3, 0xfb, 0xf0, modes, count]);
        }
        self.mov(to, from);
        self.shift(5, to, count);
    }

    /// ALU operations with a 32-bit immediate: 0 ADD, 4 AND, 7 CMP.
    pub fn alu_immediate(&mut self, wide: bool, extension: u8, register: Host, value: i32) {
        self.rex(wide, 0, 0, register);
        self.bytes.extend_from_slice(&[0x81, 0xc0 | extension << 3 | register & 7]);
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }

    /// Looks for the linear address in [`ADDRESS`] in the translation cache: the entry's distance from [`TLB`] to [`SCRATCH`],
    /// the place in the page to [`ADDRESS`]. The jump is taken where the tag at `tag` is not that of `size` bytes there.
    /// Overwrites the flags.
    pub fn find_entry(&mut self, tag: i32, size: i32, layout: Layout) -> Jump {
        // Neither the fold nor the mask looks at what a rotation brings to the top.
        if layout.folded {
            self.rotated(SCRATCH, ADDRESS, FOLD, layout.bmi2);
            self.registers(true, &[0x33], SCRATCH, ADDRESS);
            self.shift(5, SCRATCH, 7);
        } else {
            self.rotated(SCRATCH, ADDRESS, 7, layout.bmi2);
        }
        self.alu_immediate(false, 4, SCRATCH, ENTRY_MASK);
        self.entry(&[0x33], ADDRESS, tag);
        self.alu_immediate(true, 7, ADDRESS, 4096 - size);
        self.jump_if(7)
    }

    /// `op reg, [entry + field]`, with the entry that [`Assembler::find_entry`] found.
    pub fn entry(&mut self, opcode: &[u8], reg: Host, field: i32) {
        self.rex(true, reg, SCRATCH, TLB);
        self.bytes.extend_from_slice(opcode);
        // A byte has room for a field's offset.
        self.bytes.extend_from_slice(&[
            0x40 | (reg & 7) << 3 | RSP,
            (SCRATCH & 7) << 3 | TLB & 7,
            field as u8,
        ]);
    }

    /// Instructions that do nothing, up to a multiple of `alignment`, where this code is going to be at `address`.
    pub fn align(&mut self, address: u64, alignment: u64) {
        // nop dword [rax + rax + 0] with a 32-bit displacement, and nop with prefixes.
        const LONG: [u8; 8] = [0x0f, 0x1f, 0x84, 0, 0, 0, 0, 0];
        const SHORT: [u8; 8] = [0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x90];
        let here = address + self.here() as u64;
        let missing = (here.next_multiple_of(alignment) - here) as usize;
        (0..missing / 8).for_each(|_| self.bytes.extend_from_slice(&LONG));
        self.bytes.extend_from_slice(&SHORT[8 - missing % 8..]);
    }

    /// `jcc rel32` by the condition's number.
    pub fn jump_if(&mut self, condition: u8) -> Jump {
        self.bytes.extend_from_slice(&[0x0f, 0x80 | condition, 0, 0, 0, 0]);
        Jump(self.here() - 4)
    }
    /// `jmp rel32`.
    pub fn jump(&mut self) -> Jump {
        self.bytes.extend_from_slice(&[0xe9, 0, 0, 0, 0]);
        Jump(self.here() - 4)
    }
    /// `call rel32`.
    pub fn call(&mut self) -> Jump {
        self.bytes.extend_from_slice(&[0xe8, 0, 0, 0, 0]);
        Jump(self.here() - 4)
    }

    /// Makes a jump lead to a place in this code.
    pub fn land(&mut self, jump: Jump, target: usize) {
        let disp = target as i64 - (jump.0 as i64 + 4);
        self.bytes[jump.0..jump.0 + 4].copy_from_slice(&(disp as i32).to_le_bytes());
    }

    /// Where a jump's displacement stands.
    pub fn at(jump: Jump) -> usize {
        jump.0
    }
}
