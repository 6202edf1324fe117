//! Branches and the stack, written out.

use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};

use super::operand::{Home, home};
use super::{NotCopied, Translator};
use crate::jit::assembler::{ADDRESS, GUEST_RSP, Jump, RBP, RSP, SCRATCH};
use crate::jit::frame::slot;
use crate::mmu::Access;

impl Translator<'_> {
    /// Branches and the stack; `None` for what is neither.
    pub(super) fn special(&mut self, i: &Instruction) -> Option<Result<bool, NotCopied>> {
        let register = |n: u32| (i.op_kind(n) == OpKind::Register).then(|| i.op_register(n));
        if i.op_kind(0) == OpKind::NearBranch64 && !is_canonical(i.near_branch_target()) {
            return Some(Err(NotCopied));
        }
        Some(match i.mnemonic() {
            Mnemonic::Nop | Mnemonic::Endbr64 | Mnemonic::Endbr32 => Ok(false),
            Mnemonic::Jmp if i.op_kind(0) == OpKind::NearBranch64 => {
                self.edge(i.near_branch_target(), true);
                Ok(true)
            }
            _ if i.is_jcc_short_or_near() && i.op_kind(0) == OpKind::NearBranch64 => {
                self.conditional_jump(i, condition_number(i));
                Ok(true)
            }
            _ if matches!(i.code(), Code::Loop_rel8_64_RCX | Code::Jrcxz_rel8_64) => {
                self.branch_on_rcx(i);
                Ok(true)
            }
            Mnemonic::Call if i.op_kind(0) == OpKind::NearBranch64 => {
                self.begin_branch();
                self.push_next(i);
                self.exit_to(i.near_branch_target());
                Ok(true)
            }
            Mnemonic::Call if register(0).is_some_and(|r| r.is_gpr64()) => {
                self.begin_branch();
                self.target_in(register(0)?);
                self.push_next(i);
                self.a.load(ADDRESS, RSP, slot::SPARE);
                self.dispatch();
                Ok(true)
            }
            Mnemonic::Jmp if register(0).is_some_and(|r| r.is_gpr64()) => {
                self.begin_branch();
                let target = self.guest(register(0)?.number() as u8, ADDRESS);
                self.a.mov(ADDRESS, target);
                self.branch(|_| {});
                Ok(true)
            }
            _ if (i.is_call_near_indirect() || i.is_jmp_near_indirect()) && i.memory_size().size() == 8 => {
                self.branch_through_memory(i)
            }
            Mnemonic::Ret if i.stack_pointer_increment() >= 8 && i.op_code().operand_size() != 16 => {
                self.ret(i);
                Ok(true)
            }
            Mnemonic::Push if i.stack_pointer_increment() == -8 && i.op_kind(0) != OpKind::Memory => {
                self.push(i)
            }
            Mnemonic::Push if i.stack_pointer_increment() == -8 => self.push_memory(i),
            Mnemonic::Leave if i.code() == Code::Leaveq => {
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
            Mnemonic::Pop
                if i.stack_pointer_increment() == 8 && register(0).is_some_and(|r| r.is_gpr64()) =>
            {
                self.pop(i, register(0)?);
                Ok(false)
            }
            _ => return self.system(i),
        })
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
        self.a.lea(true, ADDRESS, Some(GUEST_RSP), None, -8);
        let miss = self.probe_stack(Access::Write, 8);
        match i.op_kind(0) {
            OpKind::Register if i.op_register(0).is_gpr64() => {
                let from = self.guest(i.op_register(0).number() as u8, SCRATCH);
                self.a.store(from, ADDRESS, 0);
            }
            OpKind::Immediate8to64 | OpKind::Immediate32to64 => {
                self.a.memory(true, &[0xc7], 0, ADDRESS, 0);
                self.a.bytes.extend_from_slice(&(i.immediate(0) as u32).to_le_bytes());
            }
            _ => return Err(NotCopied),
        }
        self.a.lea(true, GUEST_RSP, Some(GUEST_RSP), None, -8);
        self.resume_here(miss, call, i);
        Ok(false)
    }

    fn pop(&mut self, i: &Instruction, register: Register) {
        self.give_up_flags();
        let call = self.call();
        self.a.mov(ADDRESS, GUEST_RSP);
        let miss = self.probe_stack(Access::Read, 8);
        self.a.lea(true, GUEST_RSP, Some(GUEST_RSP), None, 8);
        match home(register.number() as u8) {
            Home::Host(host) => self.a.load(host, ADDRESS, 0),
            Home::Frame(at) => {
                self.a.load(SCRATCH, ADDRESS, 0);
                self.a.store(SCRATCH, RSP, at);
            }
        }
        self.resume_here(miss, call, i);
    }

    /// Pushes or pops of registers, one after another, by one probe. Where it finds nothing, each has its handler called.
    pub(super) fn stack_group(&mut self, insns: &[Instruction]) {
        let (count, bytes) = (insns.len() as i32, insns.len() as i32 * 8);
        let pushes = insns[0].mnemonic() == Mnemonic::Push;
        self.give_up_flags();
        let call = self.call();
        let below = if pushes { -bytes } else { 0 };
        self.a.lea(true, ADDRESS, Some(GUEST_RSP), None, below);
        let access = if pushes { Access::Write } else { Access::Read };
        let from = self.probe_stack(access, bytes as u32);
        for (n, i) in (0..).zip(insns) {
            let (register, at) =
                (i.op_register(0).number() as u8, 8 * if pushes { count - 1 - n } else { n });
            if pushes {
                let register = self.guest(register, SCRATCH);
                self.a.store(register, ADDRESS, at);
                continue;
            }
            match home(register) {
                Home::Host(host) => self.a.load(host, ADDRESS, at),
                Home::Frame(slot) => {
                    self.a.load(SCRATCH, ADDRESS, at);
                    self.a.store(SCRATCH, RSP, slot);
                }
            }
        }
        self.a.lea(true, GUEST_RSP, Some(GUEST_RSP), None, if pushes { -bytes } else { bytes });
        let (first, last) = (self.number, self.number + insns.len() - 1);
        self.number = last;
        self.resume_here(from, call, &insns[insns.len() - 1]);
        if let Some(cold) = self.cold.last_mut() {
            cold.more = (last - first) as u32;
        }
    }

    /// PUSH of a memory operand.
    fn push_memory(&mut self, i: &Instruction) -> Result<bool, NotCopied> {
        self.give_up_flags();
        let call = self.call();
        self.effective_address(i)?;
        let unread = self.probe(Access::Read, 8);
        self.a.load(ADDRESS, ADDRESS, 0);
        self.a.store(ADDRESS, RSP, slot::SPARE);
        self.a.lea(true, ADDRESS, Some(GUEST_RSP), None, -8);
        let unwritten = self.probe_stack(Access::Write, 8);
        self.a.load(SCRATCH, RSP, slot::SPARE);
        self.a.store(SCRATCH, ADDRESS, 0);
        self.a.lea(true, GUEST_RSP, Some(GUEST_RSP), None, -8);
        self.resume_here(unread, call, i);
        self.resume_here(unwritten, call, i);
        Ok(false)
    }

    /// LEAVE.
    fn leave(&mut self, i: &Instruction) {
        self.give_up_flags();
        let call = self.call();
        self.a.mov(ADDRESS, RBP);
        let miss = self.probe(Access::Read, 8);
        self.a.lea(true, GUEST_RSP, Some(RBP), None, 8);
        self.a.load(RBP, ADDRESS, 0);
        self.resume_here(miss, call, i);
    }

    /// Pushes the address of the next instruction.
    fn push_next(&mut self, i: &Instruction) {
        self.a.lea(true, ADDRESS, Some(GUEST_RSP), None, -8);
        let miss = self.probe_stack(Access::Write, 8);
        self.no_resume(miss);
        self.a.mov_immediate(SCRATCH, i.next_ip());
        self.a.store(SCRATCH, ADDRESS, 0);
        self.a.lea(true, GUEST_RSP, Some(GUEST_RSP), None, -8);
    }

    /// Checks an indirect branch's target and puts it into the spare slot.
    fn target_in(&mut self, register: Register) {
        let target = self.guest(register.number() as u8, ADDRESS);
        self.a.mov(ADDRESS, target);
        self.a.store(ADDRESS, RSP, slot::SPARE);
        let bad = self.not_canonical();
        self.no_resume(bad);
    }

    /// CALL and JMP to an address in memory.
    fn branch_through_memory(&mut self, i: &Instruction) -> Result<bool, NotCopied> {
        self.begin_branch();
        self.effective_address(i)?;
        let miss = self.probe(Access::Read, 8);
        self.no_resume(miss);
        self.a.load(ADDRESS, ADDRESS, 0);
        if i.is_jmp_near_indirect() {
            self.branch(|_| {});
            return Ok(true);
        }
        self.a.store(ADDRESS, RSP, slot::SPARE);
        let bad = self.not_canonical();
        self.no_resume(bad);
        self.push_next(i);
        self.a.load(ADDRESS, RSP, slot::SPARE);
        self.dispatch();
        Ok(true)
    }

    /// Whether the address in [`ADDRESS`] is canonical: the jump is taken where not.
    fn not_canonical(&mut self) -> Jump {
        self.a.mov(SCRATCH, ADDRESS);
        self.a.shift(7, SCRATCH, 47);
        self.a.alu_immediate(true, 0, SCRATCH, 1);
        self.a.alu_immediate(true, 7, SCRATCH, 1);
        self.a.jump_if(7)
    }

    fn ret(&mut self, i: &Instruction) {
        self.begin_branch();
        self.a.mov(ADDRESS, GUEST_RSP);
        let miss = self.probe_stack(Access::Read, 8);
        self.no_resume(miss);
        self.a.load(ADDRESS, ADDRESS, 0);
        let released = if i.op_count() > 0 { i32::from(i.immediate16()) } else { 0 };
        self.branch(|a| a.lea(true, GUEST_RSP, Some(GUEST_RSP), None, 8 + released));
    }
}

/// How many instructions from the first on are pushes, or pops, of 64-bit registers other than RSP, that can be done by one
/// probe; none of them the block's last.
pub fn stack_group(insns: &[Instruction]) -> usize {
    let Some((first, _)) = insns.split_first() else { return 0 };
    let kind = |i: &Instruction| {
        let register = i.op_register(0);
        i.mnemonic() == first.mnemonic()
            && i.stack_pointer_increment().abs() == 8
            && i.op_kind(0) == OpKind::Register
            && register.is_gpr64()
            && register != Register::RSP
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
