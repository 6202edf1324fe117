//! A decoded instruction: what both executors run.

use crate::cpu::Cpu;
use crate::registers::NONE;

/// Runs one instruction.
pub type Handler = fn(&mut Cpu, &Insn) -> Result<(), Stop>;

/// Why a handler did not simply finish.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Stop {
    /// The instruction raised [`Cpu::fault`] and left the guest's state as it was.
    Fault,
    /// The instruction is complete, and what follows must be looked up anew (the mode, the translation or an
    /// interrupt's masking changed). RIP has been advanced.
    EndBlock,
    /// The instruction wants to write to the page that it was decoded from: run it again, alone.
    OwnPage,
    /// A repeated instruction has done part of its work: look at interrupts, then run it again from the same RIP.
    Repeat,
    /// `run` has to return: [`Cpu::exit`] says why. RIP is right.
    Exit,
}

/// Bits of [`Insn::flags`].
pub mod flag {
    /// LOCK prefix.
    pub const LOCK: u8 = 1;
    /// REP or REPE prefix.
    pub const REP: u8 = 2;
    /// REPNE prefix.
    pub const REPNE: u8 = 4;
    /// The memory operand's segment must be checked (outside 64-bit mode), or the target of a branch.
    pub const CHECKED: u8 = 8;
    /// It pushes or pops: faults of other than its memory operand are stack faults.
    pub const STACK: u8 = 16;
}

/// Index of a base that is always zero in [`Cpu::bases`]: flat segments in 64-bit mode.
pub const FLAT: u8 = 7;

/// One decoded instruction, 48 bytes.
#[derive(Clone, Copy, Debug)]
pub struct Insn {
    /// What runs it.
    pub run: Handler,
    /// The immediate operand, sign-extended, or a branch's target.
    pub imm: u64,
    /// The memory operand's displacement, with RIP folded in.
    pub disp: u64,
    /// More than the fields above can say: the index of a native stub, the second immediate …
    pub aux: u32,
    /// Bytes from the block's start to the instruction.
    pub offset: u16,
    /// The instruction's length in bytes.
    pub len: u8,
    /// How many instructions of its block go before it.
    pub number: u8,
    /// [`flag`].
    pub flags: u8,
    /// The memory operand's base register.
    pub base: u8,
    /// Its index register.
    pub index: u8,
    /// Its scale, as a shift.
    pub scale: u8,
    /// Its segment: an index into [`Cpu::bases`].
    pub segment: u8,
    /// 0, 32 or 48: how far the address mask is shifted for 64-, 32- and 16-bit addresses.
    pub address_shift: u8,
    /// First, second and third register operands.
    pub r1: u8,
    /// Second.
    pub r2: u8,
    /// Third.
    pub r3: u8,
    /// Operand size in bytes.
    pub size: u8,
    /// The mnemonic, for exits and counters ([`iced_x86::Mnemonic`]).
    pub mnemonic: u16,
}

impl Insn {
    /// An instruction without operands.
    pub fn new(run: Handler) -> Self {
        Self {
            run,
            imm: 0,
            disp: 0,
            aux: 0,
            offset: 0,
            len: 0,
            number: 0,
            flags: 0,
            base: NONE,
            index: NONE,
            scale: 0,
            segment: FLAT,
            address_shift: 0,
            r1: 0,
            r2: 0,
            r3: 0,
            size: 0,
            mnemonic: 0,
        }
    }

    /// Whether a flag is set.
    #[inline(always)]
    pub fn has(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }

    /// The mask for addresses of this instruction's address size.
    #[inline(always)]
    pub fn address_mask(&self) -> u64 {
        u64::MAX >> self.address_shift
    }
}
