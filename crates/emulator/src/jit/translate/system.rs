//! Instructions of the operating system, written out: what is on the way of every system call and of every access to a
//! program's memory. Whatever is not plain goes to the handler.

use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};
use x86::descriptor::Attributes;
use x86::{Cr4, Efer, SegmentRegister};

use super::{NotCopied, Translator};
use crate::jit::assembler::{
    ADDRESS, Assembler, E, GUEST_RSP, Host, Jump, NE, RAX, RCX, RDX, RSP, SCRATCH, TLB,
};
use crate::jit::frame::{Home, home};
use crate::jit::frame::{forget_stack, slot};
use crate::jit::owner;
use crate::mmu::{Access, View, ViewState};

const ARITHMETIC: i32 = x86::Flags::ARITHMETIC.bits() as i32;
const FIXED: i32 = x86::Flags::FIXED.bits() as i32;
const IF: i32 = x86::Flags::IF.bits() as i32;
const AC: i32 = x86::Flags::AC.bits() as i32;
const TF: i32 = x86::Flags::TF.bits() as i32;
/// What PUSHF does not tell.
const HIDDEN: i32 = (x86::Flags::RF.bits() | x86::Flags::VM.bits()) as i32;
/// What SYSRET may load here: the others change how memory is accessed, or what happens between instructions.
const RETURNED: i32 = ARITHMETIC
    | FIXED
    | IF
    | (x86::Flags::DF.bits() | x86::Flags::NT.bits() | x86::Flags::ID.bits() | x86::Flags::IOPL.bits())
        as i32;
/// The flags that LAHF tells, and OF's bit.
const LAHF: i32 = 0xd5;
const OF_BIT: u8 = 11;

/// Extensions of 81 /n.
const OR: u8 = 1;
const AND: u8 = 4;

impl Translator<'_> {
    /// Instructions of the operating system; `None` for others.
    pub(super) fn system(&mut self, i: &Instruction) -> Option<Result<bool, NotCopied>> {
        let kernel = self.source.mode.cpl() == 0;
        let result = match i.mnemonic() {
            Mnemonic::Cli if kernel => self.clear_interrupts(),
            Mnemonic::Sti if kernel => self.set_interrupts(),
            Mnemonic::Swapgs if kernel => self.swap_gs(),
            Mnemonic::Stac | Mnemonic::Clac if kernel && self.allows(i) => {
                self.set_access(i.mnemonic() == Mnemonic::Stac)
            }
            Mnemonic::Pushfq | Mnemonic::Pushfd => self.push_flags(i),
            Mnemonic::Rdtsc => return self.source.tsc_start.map(|start| self.read_tsc(start, false)),
            Mnemonic::Rdtscp if self.allows(i) => {
                return self.source.tsc_start.map(|start| self.read_tsc(start, true));
            }
            Mnemonic::Rdfsbase | Mnemonic::Rdgsbase | Mnemonic::Wrfsbase | Mnemonic::Wrgsbase
                if self.wide() && self.allows(i) =>
            {
                self.segment_base(i)
            }
            Mnemonic::Mov if i.op_kind(0) == OpKind::Register && i.op_register(1).is_segment_register() => {
                self.read_selector(i);
                Ok(())
            }
            // What waits, and changed code, are looked at where the next block is entered.
            Mnemonic::Serialize if self.allows(i) => {
                self.begin_branch();
                self.exit_to(i.next_ip());
                return Some(Ok(true));
            }
            Mnemonic::Pause => {
                self.begin_branch();
                self.a.bytes.extend_from_slice(&[0xf3, 0x90]);
                self.exit_to(i.next_ip());
                return Some(Ok(true));
            }
            Mnemonic::Syscall if !kernel && self.wide() => {
                self.system_call(i);
                return Some(Ok(true));
            }
            Mnemonic::Sysretq if kernel && i.code() == Code::Sysretq => {
                self.system_return();
                return Some(Ok(true));
            }
            _ => return None,
        };
        Some(result.map(|()| false))
    }

    fn allows(&self, i: &Instruction) -> bool {
        self.source.model.allows(i.cpuid_features())
    }

    /// The interpreter's address, to [`SCRATCH`].
    pub(super) fn owner(&mut self) {
        self.a.load(SCRATCH, RSP, slot::OWNER);
    }

    /// CLI.
    fn clear_interrupts(&mut self) -> Result<(), NotCopied> {
        self.give_up_flags();
        self.owner();
        self.a.alu_memory(AND, SCRATCH, owner::SYSTEM_FLAGS, !IF);
        Ok(())
    }

    /// STI, where nothing waits for it. The instruction after it is covered by its shadow.
    fn set_interrupts(&mut self) -> Result<(), NotCopied> {
        self.begin_branch();
        self.owner();
        let waits = self.byte_is(owner::INTERRUPT_WAITS, 0, NE);
        let counts = self.byte_is(owner::PMU_ACTIVE, 0, NE);
        self.a.load(ADDRESS, RSP, slot::ATTENTION);
        self.a.memory(false, &[0x83], 7, ADDRESS, 0); // cmp dword [r14], 0
        self.a.bytes.push(0);
        let attention = self.a.jump_if(NE);
        [waits, counts, attention].into_iter().for_each(|jump| self.no_resume(jump));
        let set = self.test(owner::SYSTEM_FLAGS, IF, NE);
        self.a.alu_memory(OR, SCRATCH, owner::SYSTEM_FLAGS, IF);
        self.a.store_byte(SCRATCH, owner::SHADOW, 1);
        self.a.load(ADDRESS, RSP, slot::COUNT);
        self.a.store(ADDRESS, SCRATCH, owner::SHADOW_BEGAN);
        let here = self.a.here();
        self.a.land(set, here);
        Ok(())
    }

    /// Compares a byte of the owner's with a value.
    fn byte_is(&mut self, at: i32, value: u8, condition: u8) -> Jump {
        self.a.memory(false, &[0x80], 7, SCRATCH, at);
        self.a.bytes.push(value);
        self.a.jump_if(condition)
    }

    /// SWAPGS. No instruction of it changes the host's flags.
    fn swap_gs(&mut self) -> Result<(), NotCopied> {
        self.owner();
        self.a.load(ADDRESS, SCRATCH, owner::KERNEL_GS_BASE);
        self.a.store(ADDRESS, RSP, slot::SPARE);
        self.a.load(ADDRESS, RSP, slot::GS_BASE);
        self.a.store(ADDRESS, SCRATCH, owner::KERNEL_GS_BASE);
        self.a.load(ADDRESS, RSP, slot::SPARE);
        self.a.store(ADDRESS, RSP, slot::GS_BASE);
        self.a.store(ADDRESS, SCRATCH, owner::base(SegmentRegister::Gs));
        let hidden = owner::segment(SegmentRegister::Gs) + owner::SEGMENT_BASE;
        self.a.store(ADDRESS, SCRATCH, hidden);
        Ok(())
    }

    /// STAC and CLAC: the view of memory changes where CR4.SMAP is set.
    fn set_access(&mut self, allowed: bool) -> Result<(), NotCopied> {
        self.give_up_flags();
        self.owner();
        if allowed {
            self.a.alu_memory(OR, SCRATCH, owner::SYSTEM_FLAGS, AC);
        } else {
            self.a.alu_memory(AND, SCRATCH, owner::SYSTEM_FLAGS, !AC);
        }
        let unguarded = self.byte_is(owner::SMAP, 0, E);
        let view = if allowed { View::SupervisorUnguarded } else { View::Supervisor };
        self.a.store_byte(SCRATCH, owner::VIEW, view as u8);
        self.a.load(TLB, SCRATCH, owner::view_state(view));
        forget_stack(&mut self.a);
        let here = self.a.here();
        self.a.land(unguarded, here);
        Ok(())
    }

    /// PUSHF of all flags.
    fn push_flags(&mut self, i: &Instruction) -> Result<(), NotCopied> {
        if matches!(self.at.flags, super::Flags::Recipe(_)) {
            return Err(NotCopied);
        }
        self.save_flags();
        self.lose_flags();
        let call = self.call();
        let word = self.word();
        self.beside_stack_pointer(ADDRESS, -word);
        let miss = self.probe_stack(Access::Write, word as u32, (-word, self.wide()));
        self.arithmetic_flags(SCRATCH);
        self.a.store(SCRATCH, RSP, slot::SPARE);
        self.owner();
        self.a.load(SCRATCH, SCRATCH, owner::SYSTEM_FLAGS);
        self.a.alu_immediate(true, AND, SCRATCH, !(ARITHMETIC | HIDDEN));
        self.a.memory(true, &[0x0b], SCRATCH, RSP, slot::SPARE);
        self.store_word(SCRATCH, ADDRESS, 0);
        self.beside_stack_pointer(GUEST_RSP, -word);
        self.resume_here(miss, call, i);
        Ok(())
    }

    /// The arithmetic flags in the frame as RFLAGS has them, with the bit that is always one.
    fn arithmetic_flags(&mut self, to: Host) {
        self.a.memory(false, &[0x0f, 0xb6], to, RSP, slot::FLAGS + 1);
        self.a.shift(4, to, OF_BIT);
        self.a.memory(false, &[0x0a], to, RSP, slot::FLAGS);
        self.a.alu_immediate(false, OR, to, FIXED);
    }

    /// Puts RFLAGS, of which nobody looks at the reserved bits, into the frame and the owner at [`SCRATCH`]. `from` is
    /// another register than `temporary`, and stays as it is.
    fn put_flags(&mut self, from: Home, temporary: Host) {
        let fetch = |a: &mut Assembler| match from {
            Home::Host(host) => a.registers(false, &[0x8b], temporary, host),
            Home::Frame(slot) => a.memory(false, &[0x8b], temporary, RSP, slot),
        };
        fetch(&mut self.a);
        self.a.alu_immediate(false, AND, temporary, !ARITHMETIC);
        self.a.alu_immediate(false, OR, temporary, FIXED);
        self.a.store(temporary, SCRATCH, owner::SYSTEM_FLAGS);
        fetch(&mut self.a);
        self.a.alu_immediate(false, AND, temporary, LAHF);
        self.a.alu_immediate(false, OR, temporary, FIXED);
        self.a.store_low(temporary, RSP, slot::FLAGS);
        fetch(&mut self.a);
        self.a.shift(5, temporary, OF_BIT);
        self.a.alu_immediate(false, AND, temporary, 1);
        self.a.store_low(temporary, RSP, slot::FLAGS + 1);
    }

    /// RDFSBASE and its kin.
    fn segment_base(&mut self, i: &Instruction) -> Result<(), NotCopied> {
        use Mnemonic::{Rdfsbase, Rdgsbase, Wrfsbase};
        let (at, segment) = match i.mnemonic() {
            Rdfsbase | Wrfsbase => (slot::FS_BASE, SegmentRegister::Fs),
            _ => (slot::GS_BASE, SegmentRegister::Gs),
        };
        let (register, wide) =
            (i.op_register(0).full_register().number() as u8, i.op_register(0).size() == 8);
        self.give_up_flags();
        let call = self.call();
        self.owner();
        let disabled = self.test(owner::CR4, Cr4::FSGSBASE.bits() as i32, E);
        if matches!(i.mnemonic(), Rdfsbase | Rdgsbase) {
            self.a.memory(wide, &[0x8b], ADDRESS, RSP, at);
            self.put(register, ADDRESS);
        } else {
            let from = self.guest(register, ADDRESS);
            self.a.registers(wide, &[0x8b], ADDRESS, from);
            let bad = self.not_canonical();
            self.owner();
            self.a.store(ADDRESS, RSP, at);
            self.a.store(ADDRESS, SCRATCH, owner::base(segment));
            self.a.store(ADDRESS, SCRATCH, owner::segment(segment) + owner::SEGMENT_BASE);
            self.resume_here(bad, call, i);
        }
        self.resume_here(disabled, call, i);
        Ok(())
    }

    /// Puts all of a host register into a guest's.
    fn put(&mut self, register: u8, from: Host) {
        match home(register) {
            Home::Host(host) => self.a.mov(host, from),
            Home::Frame(at) => self.a.store(from, RSP, at),
        }
    }

    /// MOV from a segment register to a general one.
    fn read_selector(&mut self, i: &Instruction) {
        let segment = match i.op_register(1) {
            Register::ES => SegmentRegister::Es,
            Register::CS => SegmentRegister::Cs,
            Register::SS => SegmentRegister::Ss,
            Register::DS => SegmentRegister::Ds,
            Register::FS => SegmentRegister::Fs,
            _ => SegmentRegister::Gs,
        };
        self.owner();
        let at = owner::segment(segment) + owner::SEGMENT_SELECTOR;
        self.a.memory(false, &[0x0f, 0xb7], ADDRESS, SCRATCH, at); // movzx
        let register = i.op_register(0);
        let number = register.full_register().number() as u8;
        match home(number) {
            _ if register.size() > 2 => self.put(number, ADDRESS),
            Home::Host(host) => {
                self.a.bytes.push(0x66);
                self.a.registers(false, &[0x8b], host, ADDRESS);
            }
            Home::Frame(at) => {
                self.a.bytes.push(0x66);
                self.a.memory(false, &[0x89], ADDRESS, RSP, at);
            }
        }
    }

    /// RDTSC and RDTSCP, where the machine's counter is the host's but for where it starts.
    fn read_tsc(&mut self, start: u64, with_aux: bool) -> Result<bool, NotCopied> {
        self.give_up_flags();
        let call = self.call();
        if self.source.mode.cpl() != 0 {
            self.owner();
            let forbidden = self.test(owner::CR4, Cr4::TSD.bits() as i32, NE);
            let i = self.part().insns[self.number];
            // The handler is called instead: where it is done, so is the instruction.
            self.sum_tsc(start, with_aux);
            self.resume_here(forbidden, call, &i);
        } else {
            self.owner();
            self.sum_tsc(start, with_aux);
        }
        Ok(false)
    }

    fn sum_tsc(&mut self, start: u64, with_aux: bool) {
        if with_aux {
            self.a.bytes.extend_from_slice(&[0x0f, 0xae, 0xe8]); // lfence: what comes before is done
            self.a.memory(false, &[0x8b], RCX, SCRATCH, owner::TSC_AUX);
        }
        self.a.bytes.extend_from_slice(&[0x0f, 0x31]);
        self.a.shift(4, RDX, 32);
        self.a.registers(true, &[0x0b], RAX, RDX);
        self.a.mov_immediate(ADDRESS, start.wrapping_neg());
        self.a.registers(true, &[0x03], RAX, ADDRESS);
        self.a.memory(true, &[0x03], RAX, SCRATCH, owner::TSC_OFFSET);
        self.a.mov(RDX, RAX);
        self.a.shift(5, RDX, 32);
        self.a.registers(false, &[0x8b], RAX, RAX);
    }

    /// Tests bits of a double word of the owner's.
    pub(super) fn test(&mut self, at: i32, bits: i32, condition: u8) -> Jump {
        self.a.memory(false, &[0xf7], 0, SCRATCH, at);
        self.a.bytes.extend_from_slice(&bits.to_le_bytes());
        self.a.jump_if(condition)
    }

    /// SYSCALL of a program, to an operating system with SMAP that clears AC and TF.
    fn system_call(&mut self, i: &Instruction) {
        self.begin_branch();
        self.owner();
        let disabled = self.test(owner::EFER, Efer::SCE.bits() as i32, E);
        self.a.memory(false, &[0x8b], ADDRESS, SCRATCH, owner::FMASK);
        self.a.alu_immediate(false, AND, ADDRESS, AC | TF);
        self.a.alu_immediate(false, 7, ADDRESS, AC | TF);
        let keeps = self.a.jump_if(NE);
        let unknown = self.unknown(View::Supervisor, 0);
        let unguarded = self.byte_is(owner::SMAP, 0, E);
        let aligned = self.byte_is(owner::VIEW, View::User as u8, NE);
        let counts = self.byte_is(owner::PMU_ACTIVE, 0, NE);
        [disabled, keeps, unknown, unguarded, aligned, counts]
            .into_iter()
            .for_each(|jump| self.no_resume(jump));
        self.arithmetic_flags(ADDRESS);
        self.a.memory(false, &[0x8b], RCX, SCRATCH, owner::SYSTEM_FLAGS);
        self.a.alu_immediate(false, AND, RCX, !ARITHMETIC);
        self.a.registers(false, &[0x0b], RCX, ADDRESS);
        self.a.store(RCX, RSP, slot::R11);
        self.a.memory(false, &[0x8b], ADDRESS, SCRATCH, owner::FMASK);
        self.a.registers(false, &[0xf7], 2, ADDRESS); // not r14d
        self.a.registers(false, &[0x23], ADDRESS, RCX);
        self.put_flags(Home::Host(ADDRESS), RCX);
        self.a.mov_immediate(RCX, i.next_ip());
        self.a.load(ADDRESS, SCRATCH, owner::STAR);
        self.a.shift(5, ADDRESS, 32);
        self.a.alu_immediate(false, AND, ADDRESS, 0xfffc);
        self.put_segment(SegmentRegister::Cs, 0, true);
        self.a.alu_immediate(false, 0, ADDRESS, 8);
        self.put_segment(SegmentRegister::Ss, 0, false);
        self.change_view(View::Supervisor, 0);
        self.a.load(ADDRESS, SCRATCH, owner::LSTAR);
        self.dispatch();
    }

    /// SYSRET to a 64-bit program in the lower half of the addresses.
    fn system_return(&mut self) {
        self.begin_branch();
        self.owner();
        let disabled = self.test(owner::EFER, Efer::SCE.bits() as i32, E);
        let unguarded = self.byte_is(owner::VIEW, View::Supervisor as u8, NE);
        let counts = self.byte_is(owner::PMU_ACTIVE, 0, NE);
        let waits = self.byte_is(owner::INTERRUPT_WAITS, 0, NE);
        let unknown = self.unknown(View::User, 3);
        self.a.mov(ADDRESS, RCX);
        self.a.shift(5, ADDRESS, 47);
        let high = self.a.jump_if(NE);
        self.a.memory(true, &[0xf7], 0, RSP, slot::R11); // test qword [..], ..
        self.a.bytes.extend_from_slice(&(!RETURNED).to_le_bytes());
        let special = self.a.jump_if(NE);
        let not_here = [disabled, unguarded, counts, waits, unknown, high, special];
        not_here.into_iter().for_each(|jump| self.no_resume(jump));
        self.put_flags(Home::Frame(slot::R11), ADDRESS);
        self.a.load(ADDRESS, SCRATCH, owner::STAR);
        self.a.shift(5, ADDRESS, 48);
        self.a.alu_immediate(false, 0, ADDRESS, 8);
        self.a.alu_immediate(false, OR, ADDRESS, 3);
        self.put_segment(SegmentRegister::Ss, 3, false);
        // RPL is 3 whatever the sum's low bits are.
        self.a.load(ADDRESS, SCRATCH, owner::STAR);
        self.a.shift(5, ADDRESS, 48);
        self.a.alu_immediate(false, 0, ADDRESS, 16);
        self.a.alu_immediate(false, OR, ADDRESS, 3);
        self.put_segment(SegmentRegister::Cs, 3, true);
        self.change_view(View::User, 3);
        self.a.mov(ADDRESS, RCX);
        self.dispatch();
    }

    /// Loads CS or SS as SYSCALL and SYSRET do; the selector is in [`ADDRESS`].
    fn put_segment(&mut self, register: SegmentRegister, dpl: u8, code: bool) {
        let at = owner::segment(register);
        let attributes = if code {
            crate::instructions::syscall::code_attributes(dpl, true)
        } else {
            crate::instructions::syscall::stack_attributes(dpl)
        };
        self.a.bytes.push(0x66);
        self.a.memory(false, &[0x89], ADDRESS, SCRATCH, at + owner::SEGMENT_SELECTOR);
        self.a.store_immediate(true, SCRATCH, at + owner::SEGMENT_BASE, 0);
        self.a.store_immediate(false, SCRATCH, at + owner::SEGMENT_LIMIT, -1);
        let attributes: Attributes = attributes;
        self.a.store_immediate(false, SCRATCH, at + owner::SEGMENT_ATTRIBUTES, attributes.bits() as i32);
        self.a.store_immediate(true, SCRATCH, owner::base(register), 0);
    }

    /// The jump is taken where it is not known where the code of another privilege is.
    fn unknown(&mut self, view: View, cpl: u8) -> Jump {
        // cmp qword [..], mode
        self.a.memory(true, &[0x81], 7, SCRATCH, owner::view_state(view) + ViewState::MODE);
        self.a.bytes.extend_from_slice(&self.source.mode.with_cpl(cpl).0.to_le_bytes());
        self.a.jump_if(NE)
    }

    /// The mode and the view follow CPL.
    fn change_view(&mut self, view: View, cpl: u8) {
        let mode = self.source.mode.with_cpl(cpl).0 as i32;
        self.a.store_immediate(false, SCRATCH, owner::MODE, mode);
        self.a.store_byte(SCRATCH, owner::VIEW, view as u8);
        let state = owner::view_state(view);
        self.a.load(TLB, SCRATCH, state);
        forget_stack(&mut self.a);
        self.a.load(ADDRESS, SCRATCH, state + ViewState::TARGETS);
        self.a.store(ADDRESS, RSP, slot::TARGETS);
    }
}

impl Assembler {
    /// `op dword [base + disp], value` by the operation's number: OR, AND …
    fn alu_memory(&mut self, extension: u8, base: Host, disp: i32, value: i32) {
        self.memory(false, &[0x81], extension, base, disp);
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }

    /// `mov byte [base + disp], value`.
    fn store_byte(&mut self, base: Host, disp: i32, value: u8) {
        self.memory(false, &[0xc6], 0, base, disp);
        self.bytes.push(value);
    }

    /// `mov dword [base + disp], value`, or a sign-extended `qword`.
    fn store_immediate(&mut self, wide: bool, base: Host, disp: i32, value: i32) {
        self.memory(wide, &[0xc7], 0, base, disp);
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }

    /// Stores a register's lowest byte; of RAX, RCX, RDX, RBX or those from R8 on.
    fn store_low(&mut self, from: Host, base: Host, disp: i32) {
        self.memory(false, &[0x88], from, base, disp);
    }
}
