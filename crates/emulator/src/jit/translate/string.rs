//! Repeated STOS and MOVS within a page, by the host's. What reaches into another page, runs backwards or takes more than a
//! page is left to the handler.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::{NotCopied, Translator};
use crate::jit::assembler::{A, ADDRESS, Host, Jump, NE, RCX, RDI, RSI, RSP, SCRATCH};
use crate::jit::frame::slot;
use crate::jit::owner;
use crate::mmu::{ENTRY_PAGE, ENTRY_READ, ENTRY_WRITE};

const DF: i32 = x86::Flags::DF.bits() as i32;
const PAGE: i32 = 4096;

/// Whether an instruction is a repeated STOS or MOVS of 64-bit code, without a base for its operands.
pub fn is_repeated(i: &Instruction) -> bool {
    use Mnemonic::{Movsb, Movsd, Movsq, Movsw, Stosb, Stosd, Stosq, Stosw};
    let plain = match i.mnemonic() {
        Stosb | Stosw | Stosd | Stosq => true,
        Movsb | Movsw | Movsd | Movsq => {
            i.op_kind(1) == OpKind::MemorySegRSI && !matches!(i.memory_segment(), Register::FS | Register::GS)
        }
        _ => false,
    };
    plain && i.has_rep_prefix() && i.op_kind(0) == OpKind::MemoryESRDI
}

impl Translator<'_> {
    /// REP STOS and REP MOVS. The guest's registers change once nothing can go wrong any more.
    pub(super) fn repeated(&mut self, i: &Instruction) -> Result<(), NotCopied> {
        if !self.wide() {
            return Err(NotCopied);
        }
        let moves = i.op_kind(1) == OpKind::MemorySegRSI;
        let size = i.memory_size().size() as u8;
        let scale = size.trailing_zeros() as u8;
        self.give_up_flags();
        let call = self.call();
        self.owner();
        let mut ways = vec![self.test(owner::SYSTEM_FLAGS, DF, NE)];
        self.a.alu_immediate(true, 7, RCX, PAGE >> scale);
        ways.push(self.a.jump_if(A));
        if moves {
            ways.extend(self.end_of(RSI, scale, ENTRY_READ));
            self.a.store(ADDRESS, RSP, slot::SPARE);
        }
        ways.extend(self.end_of(RDI, scale, ENTRY_WRITE));
        // Where the guest's registers will be; neither slot is used before a handler is called.
        self.a.lea(true, SCRATCH, Some(RDI), Some((RCX, scale)), 0);
        self.a.store(SCRATCH, RSP, slot::KEPT);
        if moves {
            self.a.lea(true, SCRATCH, Some(RSI), Some((RCX, scale)), 0);
            self.a.store(SCRATCH, RSP, slot::CALL);
        }
        // The host's begin so many bytes before their ends.
        self.a.lea(true, SCRATCH, None, Some((RCX, scale)), 0);
        self.a.mov(RDI, ADDRESS);
        self.a.registers(true, &[0x2b], RDI, SCRATCH);
        if moves {
            self.a.load(RSI, RSP, slot::SPARE);
            self.a.registers(true, &[0x2b], RSI, SCRATCH);
        }
        self.a.bytes.push(0xf3);
        match size {
            2 => self.a.bytes.push(0x66),
            8 => self.a.bytes.push(0x48),
            _ => {}
        }
        self.a.bytes.push(if moves { 0xa4 } else { 0xaa } | u8::from(size > 1));
        self.a.load(RDI, RSP, slot::KEPT);
        if moves {
            self.a.load(RSI, RSP, slot::CALL);
        }
        ways.into_iter().for_each(|way| self.resume_here(way, call, i));
        Ok(())
    }

    /// The host's address of the end of RCX elements at a register, to [`ADDRESS`]. The jumps are taken where the translation
    /// cache has no answer, and where they reach into another page.
    fn end_of(&mut self, register: Host, scale: u8, tag: i32) -> [Jump; 2] {
        self.a.mov(ADDRESS, register);
        let miss = self.a.find_entry(tag, 1, self.stubs.layout);
        self.a.lea(true, ADDRESS, Some(ADDRESS), Some((RCX, scale)), 0);
        self.a.alu_immediate(true, 7, ADDRESS, PAGE);
        let crosses = self.a.jump_if(A);
        self.a.entry(&[0x03], ADDRESS, ENTRY_PAGE);
        [miss, crosses]
    }
}
