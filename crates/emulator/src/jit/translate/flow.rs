//! Branches and the stack, written out.

use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};

use super::{NotCopied, Translator};
use crate::jit::assembler::{ADDRESS, GUEST_RSP, Host, Jump, RBP, RSP, SCRATCH};
use crate::jit::flat::near_branch;
use crate::jit::frame::{Home, home, slot, stack_routine};
use crate::jit::region::is_on_count;
use crate::mmu::Access;

impl Translator<'_> {
    /// Branches and the stack; `None` for what is neither.
    pub(super) fn special(&mut self, i: &Instruction) -> Option<Result<bool, NotCopied>> {
        let (word, near) = (self.word(), near_branch(self.source.mode));
        let register = |n: u32| {
            let register = (i.op_kind(n) == OpKind::Register).then(|| i.op_register(n));
            register.filter(|r| r.is_gpr() && r.size() as i32 == word)
        };
        if i.op_kind(0) == OpKind::NearBranch64 && !is_canonical(i.near_branch_target()) {
            return Some(Err(NotCopied));
        }
        Some(match i.mnemonic() {
            Mnemonic::Nop | Mnemonic::Endbr64 | Mnemonic::Endbr32 => Ok(false),
            Mnemonic::Jmp if i.op_kind(0) == near => {
                self.edge(i.near_branch_target(), true);
                Ok(true)
            }
            _ if i.is_jcc_short_or_near() && i.op_kind(0) == near => {
                self.conditional_jump(i, condition_number(i));
                Ok(true)
            }
            _ if is_on_count(i) => {
                self.branch_on_count(i);
                Ok(true)
            }
            Mnemonic::Call if i.op_kind(0) == near => {
                self.begin_branch();
                self.push_next(i);
                self.exit_to(i.near_branch_target());
                Ok(true)
            }
            Mnemonic::Call if register(0).is_some() => {
                self.begin_branch();
                self.target_in(register(0)?);
                self.push_next(i);
                self.a.load(ADDRESS, RSP, slot::SPARE);
                self.dispatch();
                Ok(true)
            }
            Mnemonic::Jmp if register(0).is_some() => {
                self.begin_branch();
                let target = self.guest(register(0)?.number() as u8, ADDRESS);
                self.mov_word(ADDRESS, target);
                self.branch(|_| {});
                Ok(true)
            }
            _ if (i.is_call_near_indirect() || i.is_jmp_near_indirect())
                && i.memory_size().size() as i32 == word =>
            {
                self.branch_through_memory(i)
            }
            Mnemonic::Ret if i.stack_pointer_increment() >= word && i.op_code().operand_size() != 16 => {
                self.ret(i);
                Ok(true)
            }
            Mnemonic::Push if i.stack_pointer_increment() == -word && i.op_kind(0) != OpKind::Memory => {
                self.push(i)
            }
            Mnemonic::Push if i.stack_pointer_increment() == -word => self.push_memory(i),
            Mnemonic::Leave if matches!(i.code(), Code::Leaveq | Code::Leaved) => {
                self.leave(i);
                Ok(false)
            }
            Mnemonic::Lfence | Mnemonic::Mfence | Mnemonic::Sfence
                if self.source.model.allows(i.cpuid_features()) =>
            {
                self.encode(i).map(|()| false)
            }
            // Hints that the host's caches have no use for.
            Mnemonic::Prefetcht0
            | Mnemonic::Prefetcht1
            | Mnemonic::Prefetcht2
            | Mnemonic::Prefetchnta
            | Mnemonic::Prefetchw
                if self.source.model.allows(i.cpuid_features()) =>
            {
                Ok(false)
            }
            Mnemonic::Pop if i.stack_pointer_increment() == word && register(0).is_some() => {
                self.pop(i, register(0)?);
                Ok(false)
            }
            _ => return self.system(i),
        })
    }

    /// Bytes of what the stack holds by itself, of addresses in memory, and of registers that hold them.
    pub(super) fn word(&self) -> i32 {
        if self.source.mode.is_64() { 8 } else { 4 }
    }

    /// Whether those are 64 bits.
    pub(super) fn wide(&self) -> bool {
        self.source.mode.is_64()
    }

    pub(super) fn mov_word(&mut self, to: Host, from: Host) {
        self.a.registers(self.wide(), &[0x8b], to, from);
    }
    pub(super) fn load_word(&mut self, to: Host, base: Host, disp: i32) {
        self.a.memory(self.wide(), &[0x8b], to, base, disp);
    }
    pub(super) fn store_word(&mut self, from: Host, base: Host, disp: i32) {
        self.a.memory(self.wide(), &[0x89], from, base, disp);
    }

    /// The address so many bytes from where the stack pointer points.
    pub(super) fn beside_stack_pointer(&mut self, to: Host, bytes: i32) {
        self.a.lea(self.wide(), to, Some(GUEST_RSP), None, bytes);
    }

    /// Flags and count to the frame: nothing is left to do behind the branch.
    pub(super) fn begin_branch(&mut self) {
        self.save_flags();
        self.count_now();
        self.lose_flags();
    }

    fn push(&mut self, i: &Instruction) -> Result<bool, NotCopied> {
        self.give_up_flags();
        let call = self.call();
        let word = self.word();
        self.beside_stack_pointer(ADDRESS, -word);
        let miss = self.probe_stack(Access::Write, word as u32, (-word, self.wide()));
        use OpKind::{Immediate8to32, Immediate8to64, Immediate32, Immediate32to64};
        match i.op_kind(0) {
            OpKind::Register if i.op_register(0).is_gpr() => {
                let from = self.guest(i.op_register(0).number() as u8, SCRATCH);
                self.store_word(from, ADDRESS, 0);
            }
            Immediate8to64 | Immediate32to64 | Immediate8to32 | Immediate32 => {
                self.a.memory(self.wide(), &[0xc7], 0, ADDRESS, 0);
                self.a.bytes.extend_from_slice(&(i.immediate(0) as u32).to_le_bytes());
            }
            _ => return Err(NotCopied),
        }
        self.beside_stack_pointer(GUEST_RSP, -word);
        self.resume_here(miss, call, i);
        Ok(false)
    }

    fn pop(&mut self, i: &Instruction, register: Register) {
        self.give_up_flags();
        let call = self.call();
        self.mov_word(ADDRESS, GUEST_RSP);
        let miss = self.probe_stack(Access::Read, self.word() as u32, (0, self.wide()));
        self.beside_stack_pointer(GUEST_RSP, self.word());
        self.move_register(Access::Read, register.number() as u8, 0);
        self.resume_here(miss, call, i);
    }

    /// Pushes or pops of registers, one after another, by one probe. Where it finds nothing, see [`Translator::one_by_one`].
    pub(super) fn stack_group(&mut self, insns: &[Instruction]) {
        let (count, word) = (insns.len() as i32, self.word());
        let bytes = count * word;
        let pushes = insns[0].mnemonic() == Mnemonic::Push;
        self.give_up_flags();
        let call = self.call();
        let below = if pushes { -bytes } else { 0 };
        self.beside_stack_pointer(ADDRESS, below);
        let access = if pushes { Access::Write } else { Access::Read };
        let from = self.probe_stack(access, bytes as u32, (below, self.wide()));
        for (n, i) in (0..).zip(insns) {
            let at = word * if pushes { count - 1 - n } else { n };
            self.move_register(access, i.op_register(0).number() as u8, at);
        }
        self.beside_stack_pointer(GUEST_RSP, if pushes { -bytes } else { bytes });
        self.number += insns.len() - 1;
        self.resume_here(from, call, &insns[insns.len() - 1]);
        if let Some(cold) = self.cold.last_mut() {
            cold.group = Some((access, insns.iter().map(|i| i.op_register(0).number() as u8).collect()));
        }
    }

    /// The pushes or pops of a group one by one, where one probe for all found nothing: they may lie in two pages. Gives for each
    /// the jump that is taken where it finds nothing either.
    pub(super) fn one_by_one(&mut self, access: Access, registers: &[u8]) -> Vec<Jump> {
        let word = self.word();
        let step = if access == Access::Write { -word } else { word };
        let mut missing = Vec::new();
        for &register in registers {
            self.beside_stack_pointer(ADDRESS, step.min(0));
            self.call_out(self.stubs.stack[stack_routine(access, word as u32)]);
            missing.push(self.a.jump_if(2));
            self.move_register(access, register, 0);
            self.beside_stack_pointer(GUEST_RSP, step);
        }
        missing
    }

    /// Stores a register at [`ADDRESS`] and `displacement`, or loads it from there.
    fn move_register(&mut self, access: Access, register: u8, displacement: i32) {
        if access == Access::Write {
            let register = self.guest(register, SCRATCH);
            return self.store_word(register, ADDRESS, displacement);
        }
        match home(register) {
            Home::Host(host) => self.load_word(host, ADDRESS, displacement),
            Home::Frame(slot) => {
                self.a.load(SCRATCH, ADDRESS, displacement);
                self.a.store(SCRATCH, RSP, slot);
            }
        }
    }

    /// PUSH of a memory operand.
    fn push_memory(&mut self, i: &Instruction) -> Result<bool, NotCopied> {
        self.give_up_flags();
        let call = self.call();
        let word = self.word();
        self.effective_address(i, word as u32)?;
        let unread = self.probe(Access::Read, word as u32);
        self.load_word(ADDRESS, ADDRESS, 0);
        self.a.store(ADDRESS, RSP, slot::SPARE);
        self.beside_stack_pointer(ADDRESS, -word);
        let unwritten = self.probe_stack(Access::Write, word as u32, (-word, self.wide()));
        self.a.load(SCRATCH, RSP, slot::SPARE);
        self.store_word(SCRATCH, ADDRESS, 0);
        self.beside_stack_pointer(GUEST_RSP, -word);
        self.resume_here(unread, call, i);
        self.resume_here(unwritten, call, i);
        Ok(false)
    }

    /// LEAVE.
    fn leave(&mut self, i: &Instruction) {
        self.give_up_flags();
        let call = self.call();
        self.mov_word(ADDRESS, RBP);
        let miss = self.probe(Access::Read, self.word() as u32);
        self.a.lea(self.wide(), GUEST_RSP, Some(RBP), None, self.word());
        self.load_word(RBP, ADDRESS, 0);
        self.resume_here(miss, call, i);
    }

    /// Pushes the address of the next instruction.
    fn push_next(&mut self, i: &Instruction) {
        let word = self.word();
        self.beside_stack_pointer(ADDRESS, -word);
        let miss = self.probe_stack(Access::Write, word as u32, (-word, self.wide()));
        self.no_resume(miss);
        self.a.mov_immediate(SCRATCH, i.next_ip());
        self.store_word(SCRATCH, ADDRESS, 0);
        self.beside_stack_pointer(GUEST_RSP, -word);
    }

    /// Checks an indirect branch's target and puts it into the spare slot.
    fn target_in(&mut self, register: Register) {
        let target = self.guest(register.number() as u8, ADDRESS);
        self.mov_word(ADDRESS, target);
        self.keep_target();
    }

    /// Puts an indirect branch's target, which is in [`ADDRESS`], into the spare slot. Where no code may be, the handler is called.
    fn keep_target(&mut self) {
        self.a.store(ADDRESS, RSP, slot::SPARE);
        if self.wide() {
            let bad = self.not_canonical();
            self.no_resume(bad);
        }
    }

    /// CALL and JMP to an address in memory.
    fn branch_through_memory(&mut self, i: &Instruction) -> Result<bool, NotCopied> {
        self.begin_branch();
        let word = self.word() as u32;
        self.effective_address(i, word)?;
        let miss = self.probe(Access::Read, word);
        self.no_resume(miss);
        self.load_word(ADDRESS, ADDRESS, 0);
        if i.is_jmp_near_indirect() {
            self.branch(|_| {});
            return Ok(true);
        }
        self.keep_target();
        self.push_next(i);
        self.a.load(ADDRESS, RSP, slot::SPARE);
        self.dispatch();
        Ok(true)
    }

    /// Whether the address in [`ADDRESS`] is canonical: the jump is taken where not.
    pub(super) fn not_canonical(&mut self) -> Jump {
        self.a.mov(SCRATCH, ADDRESS);
        self.a.shift(7, SCRATCH, 47);
        self.a.alu_immediate(true, 0, SCRATCH, 1);
        self.a.alu_immediate(true, 7, SCRATCH, 1);
        self.a.jump_if(7)
    }

    fn ret(&mut self, i: &Instruction) {
        self.begin_branch();
        let (word, wide) = (self.word(), self.wide());
        self.mov_word(ADDRESS, GUEST_RSP);
        let miss = self.probe_stack(Access::Read, word as u32, (0, wide));
        self.no_resume(miss);
        self.load_word(ADDRESS, ADDRESS, 0);
        let released = if i.op_count() > 0 { i32::from(i.immediate16()) } else { 0 };
        self.branch(|a| a.lea(wide, GUEST_RSP, Some(GUEST_RSP), None, word + released));
    }
}

/// How many instructions from the first on are pushes, or pops, of registers of `word` bytes other than RSP, that can be done by
/// one probe; none of them the block's last.
pub fn stack_group(insns: &[Instruction], word: i32) -> usize {
    let Some((first, _)) = insns.split_first() else { return 0 };
    let kind = |i: &Instruction| {
        let register = i.op_register(0);
        i.mnemonic() == first.mnemonic()
            && i.stack_pointer_increment().abs() == word
            && i.op_kind(0) == OpKind::Register
            && register.is_gpr()
            && register.full_register() != Register::RSP
    };
    if !matches!(first.mnemonic(), Mnemonic::Push | Mnemonic::Pop) {
        return 0;
    }
    insns[..insns.len() - 1].iter().take_while(|i| kind(i)).count().min(16)
}

/// Whether an address is canonical with 4-level paging. With five levels more are: those are left to the handlers.
fn is_canonical(address: u64) -> bool {
    (address << 16) as i64 >> 16 == address as i64
}

fn condition_number(i: &Instruction) -> u8 {
    use iced_x86::ConditionCode::*;
    match i.condition_code() {
        o => 0,
        no => 1,
        b => 2,
        ae => 3,
        e => 4,
        ne => 5,
        be => 6,
        a => 7,
        s => 8,
        ns => 9,
        p => 10,
        np => 11,
        l => 12,
        ge => 13,
        le => 14,
        _ => 15,
    }
}
