//! Divisions that raise nothing, by the host's. The others, and the largest dividends, are left to the handler.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::{Flags, NotCopied, Translator};
use crate::jit::assembler::{ADDRESS, AE, BE, NE, RAX, RDX, SCRATCH};
use crate::mmu::Access;

impl Translator<'_> {
    /// DIV and IDIV by 32 and 64 bits. The flags, which the manual leaves undefined, stay as they are.
    pub(super) fn divide(&mut self, i: &Instruction) -> Result<(), NotCopied> {
        let in_memory = i.op_kind(0) == OpKind::Memory;
        let size = if in_memory { i.memory_size().size() } else { i.op_register(0).size() };
        if size < 4 || matches!(self.at.flags, Flags::Recipe(_) | Flags::Dynamic) {
            return Err(NotCopied);
        }
        let wide = size == 8;
        self.save_flags();
        self.lose_flags();
        let call = self.call();
        let mut ways = Vec::new();
        if in_memory {
            self.effective_address(i, size as u32)?;
            ways.push(self.probe(Access::Read, size as u32));
            self.a.memory(wide, &[0x8b], SCRATCH, ADDRESS, 0);
        } else {
            let divisor = self.guest(i.op_register(0).full_register().number() as u8, SCRATCH);
            self.a.registers(wide, &[0x8b], SCRATCH, divisor);
        }
        if i.mnemonic() == Mnemonic::Div {
            // The quotient fits where the dividend's upper half is less than the divisor.
            self.a.registers(wide, &[0x3b], RDX, SCRATCH);
            ways.push(self.a.jump_if(AE));
            self.a.registers(wide, &[0xf7], 6, SCRATCH);
        } else {
            // It does where the upper half is the lower one's sign, and the divisor neither 0 nor -1.
            self.a.registers(true, if wide { &[0x8b] } else { &[0x63] }, ADDRESS, RAX);
            self.a.shift(7, ADDRESS, 63);
            self.a.registers(wide, &[0x3b], ADDRESS, RDX);
            ways.push(self.a.jump_if(NE));
            self.a.lea(wide, ADDRESS, Some(SCRATCH), None, 1);
            self.a.alu_immediate(wide, 7, ADDRESS, 1);
            ways.push(self.a.jump_if(BE));
            self.a.registers(wide, &[0xf7], 7, SCRATCH);
        }
        ways.into_iter().for_each(|way| self.resume_here(way, call, i));
        Ok(())
    }
}
