//! From a block's instructions to host code.
//!
//! An instruction that only computes on general registers is copied: its registers are renamed where they have to be,
//! its memory operand becomes the host address that an inline probe of the translation cache gives. Branches and the
//! stack are written out. For everything else, and whenever a probe finds nothing, the instruction's handler is
//! called: so each instruction has one meaning, the interpreter's, and a fault finds the guest's exact state. To
//! that end the flags are saved to the frame before anything that may leave.

mod flow;

use iced_x86::{
    Decoder, Encoder, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register,
    RflagsBits,
};

use super::Source;
use super::assembler::{ADDRESS, Assembler, GUEST_RSP, Host, Jump, RAX, RSP, SCRATCH};
use super::frame::{Stubs, slot};
use super::native_set::is_copied;
use crate::mmu::{Access, ENTRY_PAGE, ENTRY_READ, ENTRY_WRITE};

/// The arithmetic flags, as iced names them.
const FLAGS: u32 =
    RflagsBits::OF | RflagsBits::SF | RflagsBits::ZF | RflagsBits::AF | RflagsBits::CF | RflagsBits::PF;

/// A finished translation.
pub struct Translation {
    pub bytes: Vec<u8>,
    /// Displacements that lead to an offset in code memory outside this code.
    pub outward: Vec<(usize, usize)>,
    /// Exits to a known RIP: where the code of each starts. It may be replaced by a jump.
    pub exits: Vec<(u64, usize)>,
    /// Where the page's expected state stands.
    pub state_at: usize,
}

/// Where the guest's flags are.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Flags {
    /// In the frame alone.
    Frame,
    /// In the host's flags alone.
    Host,
    /// In both.
    Both,
}

/// A probe's way to the handler, and back.
struct Cold {
    from: Vec<Jump>,
    insn: u32,
    /// Whether the way back needs the flags in the host's.
    load_flags: bool,
    /// Where it goes on; `None` where the instruction ends the block, and RIP says where to go.
    resume: Option<usize>,
}

struct Translator<'a> {
    a: Assembler,
    source: &'a Source<'a>,
    stubs: Stubs,
    flags: Flags,
    cold: Vec<Cold>,
    /// The jump of a block with more instructions than may run: their count has overflowed.
    used_up: Option<Jump>,
    outward: Vec<(usize, usize)>,
    exits: Vec<(u64, usize)>,
    factory: InstructionInfoFactory,
    encoder: Encoder,
    /// The instruction's number among all of the vCPU's.
    insn: u32,
}

/// The instruction cannot be copied: call its handler.
struct NotCopied;

/// Translates a block of 64-bit code.
pub fn translate(source: &Source<'_>, stubs: Stubs, counts_down: bool) -> Translation {
    let block = source.block;
    let mut translator = Translator {
        a: Assembler::default(),
        source,
        stubs,
        flags: Flags::Frame,
        cold: Vec::new(),
        used_up: None,
        outward: Vec::new(),
        exits: Vec::new(),
        factory: InstructionInfoFactory::new(),
        encoder: Encoder::new(64),
        insn: block.first,
    };
    let state_at = translator.prologue(counts_down);
    let options = source.model.decoder_options();
    let mut decoder = Decoder::with_ip(64, source.bytes, block.rip, options);
    let mut instruction = Instruction::default();
    let mut ended = false;
    for _ in 0..block.count {
        decoder.decode_out(&mut instruction);
        ended = translator.instruction(&instruction);
        translator.insn += 1;
    }
    if !ended {
        translator.save_flags();
        translator.exit_to(block.end);
    }
    translator.cold_paths();
    Translation { bytes: translator.a.bytes, outward: translator.outward, exits: translator.exits, state_at }
}

impl Translator<'_> {
    /// Polls the attention word, compares the page's state, counts the instructions, up to those that may run where
    /// that matters. Gives where the state stands.
    fn prologue(&mut self, counts_down: bool) -> usize {
        let (source, block) = (self.source, self.source.block);
        self.a.load(SCRATCH, RSP, slot::ATTENTION);
        // cmp dword [r15], 0
        self.a.memory(false, &[0x83], 7, SCRATCH, 0);
        self.a.bytes.push(0);
        let attention = self.a.jump_if(5);
        self.a.mov_immediate(SCRATCH, source.state_address);
        // cmp dword [r15], state
        self.a.memory(false, &[0x81], 7, SCRATCH, 0);
        let state_at = self.a.here();
        self.a.bytes.extend_from_slice(&source.state.to_le_bytes());
        let stale = self.a.jump_if(5);
        // add qword [rsp + COUNT], count
        self.a.memory(true, &[0x81], 0, RSP, slot::COUNT);
        self.a.bytes.extend_from_slice(&block.count.to_le_bytes());
        self.used_up = counts_down.then(|| self.a.jump_if(2));
        // All leave with this block's RIP, which is put behind the code proper.
        self.cold.push(Cold {
            from: vec![attention, stale],
            insn: u32::MAX,
            load_flags: false,
            resume: None,
        });
        self.exits.push((block.rip, usize::MAX));
        state_at
    }

    /// Emits one instruction. Gives whether it ended the block.
    fn instruction(&mut self, instruction: &Instruction) -> bool {
        let start = (self.a.here(), self.cold.len(), self.outward.len(), self.exits.len(), self.flags);
        let done = match self.special(instruction) {
            Some(result) => result,
            None if is_copied(instruction) && self.source.model.allows(instruction.cpuid_features()) => {
                self.copy(instruction).map(|()| false)
            }
            None => Err(NotCopied),
        };
        done.unwrap_or_else(|NotCopied| {
            self.a.bytes.truncate(start.0);
            self.cold.truncate(start.1);
            self.outward.truncate(start.2);
            self.exits.truncate(start.3);
            self.flags = start.4;
            self.save_flags();
            self.call_handler(self.insn);
            self.flags = Flags::Frame;
            // A handler that ends the block gives the next RIP itself; behind it there is nothing to run.
            instruction.flow_control() != FlowControl::Next
        })
    }

    /// Saves the flags to the frame, if they are only in the host's. Leaves those as they are.
    fn save_flags(&mut self) {
        if self.flags != Flags::Host {
            return;
        }
        self.a.mov(SCRATCH, RAX);
        self.a.bytes.push(0x9f); // lahf
        self.a.memory(false, &[0x88], 4, RSP, slot::FLAGS); // mov [..], ah
        self.a.memory(false, &[0x0f, 0x90], 0, RSP, slot::FLAGS + 1); // seto [..]
        self.a.mov(RAX, SCRATCH);
        self.flags = Flags::Both;
    }

    /// Loads them into the host's.
    fn load_flags(&mut self) {
        if self.flags != Flags::Frame {
            return;
        }
        self.a.mov(SCRATCH, RAX);
        self.a.memory(false, &[0x8a], 4, RSP, slot::FLAGS); // mov ah, [..]
        self.a.memory(false, &[0x8a], 0, RSP, slot::FLAGS + 1); // mov al, [..]
        self.a.bytes.extend_from_slice(&[0x04, 0x7f]); // add al, 0x7f: OF
        self.a.bytes.push(0x9e); // sahf
        self.a.mov(RAX, SCRATCH);
        self.flags = Flags::Both;
    }

    /// Goes on at a known RIP. The flags are saved.
    fn exit_to(&mut self, rip: u64) {
        self.exits.push((rip, self.a.here()));
        self.a.mov_immediate(ADDRESS, rip);
        self.outward_jump(self.stubs.dispatch);
    }

    fn outward_jump(&mut self, to: usize) {
        let jump = self.a.jump();
        self.outward.push((Assembler::at(jump), to));
    }

    fn call_handler(&mut self, insn: u32) {
        self.a.mov_immediate(ADDRESS, u64::from(insn));
        self.a.mov_immediate(SCRATCH, u64::from(self.source.number));
        let call = self.a.call();
        self.outward.push((Assembler::at(call), self.stubs.step));
    }

    /// Turns the linear address in [`ADDRESS`] into the host's. Clobbers the host's flags and [`SCRATCH`]. The jumps
    /// that it gives are taken where the translation cache has no answer.
    fn probe(&mut self, access: Access, size: u32) -> Jump {
        let tag = if access == Access::Write { ENTRY_WRITE } else { ENTRY_READ };
        self.a.mov(SCRATCH, ADDRESS);
        self.a.shift(5, SCRATCH, 7);
        self.a.alu_immediate(false, 4, SCRATCH, 0x3ff << 5);
        self.a.memory(true, &[0x03], SCRATCH, RSP, slot::TLB);
        self.a.memory(true, &[0x33], ADDRESS, SCRATCH, tag);
        self.a.alu_immediate(true, 7, ADDRESS, 4096 - size as i32);
        let miss = self.a.jump_if(7);
        self.a.memory(true, &[0x03], ADDRESS, SCRATCH, ENTRY_PAGE);
        self.a.memory(true, &[0x03], ADDRESS, RSP, slot::RAM);
        miss
    }

    /// Remembers that a miss goes to the handler of the present instruction, and on from here.
    fn resume_here(&mut self, miss: Jump) {
        let resume = Some(self.a.here());
        let load_flags = self.flags != Flags::Frame;
        self.cold.push(Cold { from: vec![miss], insn: self.insn, load_flags, resume });
    }

    /// The same, where the instruction ends the block.
    fn no_resume(&mut self, miss: Jump) {
        self.cold.push(Cold { from: vec![miss], insn: self.insn, load_flags: false, resume: None });
    }

    /// The host register that holds a guest's: its own, or `scratch`, loaded from the frame.
    fn guest(&mut self, number: u8, scratch: Host) -> Host {
        match home(number) {
            Home::Host(host) => host,
            Home::Frame(at) => {
                self.a.load(scratch, RSP, at);
                scratch
            }
        }
    }

    /// Copies an instruction that only computes.
    fn copy(&mut self, i: &Instruction) -> Result<(), NotCopied> {
        let info = self.factory.info(i);
        let accesses: Vec<OpAccess> = (0..i.op_count()).map(|n| info.op_access(n)).collect();
        let memory = (0..i.op_count()).find(|&n| i.op_kind(n) == OpKind::Memory);
        let mut copy = *i;
        let mut miss = None;
        if let Some(n) = memory.filter(|_| i.mnemonic() != Mnemonic::Lea) {
            let writes = !matches!(accesses[n as usize], OpAccess::Read | OpAccess::CondRead);
            self.save_flags();
            self.effective_address(i, true)?;
            let access = if writes { Access::Write } else { Access::Read };
            miss = Some(self.probe(access, i.memory_size().size() as u32));
            self.flags = Flags::Frame;
        }
        let modified = i.rflags_modified() & FLAGS;
        if i.rflags_read() & FLAGS != 0 || modified != 0 && (modified != FLAGS || by_count(i)) {
            self.load_flags();
        }
        let mut free = if memory.is_some() { vec![SCRATCH] } else { vec![SCRATCH, ADDRESS] };
        if i.mnemonic() == Mnemonic::Lea {
            self.effective_address(i, false)?;
        }
        let mut spilled: Vec<(i32, Host)> = Vec::new();
        for n in 0..i.op_count() {
            if i.op_kind(n) == OpKind::Register {
                let register = self.rename(i.op_register(n), &mut free, &mut spilled)?;
                copy.set_op_register(n, register);
            }
        }
        if i.mnemonic() == Mnemonic::Lea {
            self.finish_lea(i, &copy);
        } else {
            if memory.is_some() {
                set_memory(&mut copy);
            }
            self.encode(&copy)?;
        }
        let writes = |n: usize| !matches!(accesses[n], OpAccess::Read | OpAccess::CondRead | OpAccess::None);
        for (at, host) in spilled {
            let written = (0..i.op_count()).any(|n| {
                writes(n as usize)
                    && copy.op_kind(n) == OpKind::Register
                    && copy.op_register(n).full_register().number() as u8 == host
            });
            if written {
                self.a.store(host, RSP, at);
            }
        }
        if modified != 0 {
            self.flags = Flags::Host;
        }
        if let Some(miss) = miss {
            self.resume_here(miss);
        }
        Ok(())
    }

    /// A register operand's host register. Those that live in the frame are loaded into a free scratch register.
    fn rename(
        &mut self,
        register: Register,
        free: &mut Vec<Host>,
        spilled: &mut Vec<(i32, Host)>,
    ) -> Result<Register, NotCopied> {
        if !register.is_gpr() {
            return Err(NotCopied);
        }
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

    fn encode(&mut self, instruction: &Instruction) -> Result<(), NotCopied> {
        self.encoder.set_buffer(std::mem::take(&mut self.a.bytes));
        let result = self.encoder.encode(instruction, 0);
        self.a.bytes = self.encoder.take_buffer();
        result.map(|_| ()).map_err(|_| NotCopied)
    }

    /// Puts a memory operand's address into [`ADDRESS`]: linear, or without the segment's base for LEA. Leaves the
    /// host's flags as they are unless a segment's base is added.
    fn effective_address(&mut self, i: &Instruction, linear: bool) -> Result<(), NotCopied> {
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

    /// LEA: its result is in [`ADDRESS`].
    fn finish_lea(&mut self, i: &Instruction, copy: &Instruction) {
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

    /// What is seldom run, behind the code that is run often.
    fn cold_paths(&mut self) {
        for cold in std::mem::take(&mut self.cold) {
            if let Some(used_up) = self.used_up.take() {
                let here = self.a.here();
                self.a.land(used_up, here);
                // sub qword [rsp + COUNT], count
                self.a.memory(true, &[0x81], 5, RSP, slot::COUNT);
                self.a.bytes.extend_from_slice(&self.source.block.count.to_le_bytes());
            }
            let here = self.a.here();
            cold.from.iter().for_each(|&jump| self.a.land(jump, here));
            if cold.insn == u32::MAX {
                // The prologue's: leave, with this block's RIP.
                let (rip, _) = self.exits.remove(0);
                self.a.mov_immediate(ADDRESS, rip);
                self.outward_jump(self.stubs.leave);
                continue;
            }
            self.call_handler(cold.insn);
            if cold.load_flags {
                self.flags = Flags::Frame;
                self.load_flags();
            }
            if let Some(resume) = cold.resume {
                let back = self.a.jump();
                self.a.land(back, resume);
            }
        }
    }
}

/// Where a guest register lives.
enum Home {
    Host(Host),
    Frame(i32),
}

fn home(number: u8) -> Home {
    match number {
        4 => Home::Host(GUEST_RSP),
        13..=15 => Home::Frame(slot::R13 + i32::from(number - 13) * 8),
        other => Home::Host(other),
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

/// The memory operand becomes `[ADDRESS]`.
fn set_memory(copy: &mut Instruction) {
    copy.set_segment_prefix(Register::None);
    copy.set_memory_base(Register::R14);
    copy.set_memory_index(Register::None);
    copy.set_memory_index_scale(1);
    copy.set_memory_displacement64(0);
    copy.set_memory_displ_size(0);
}

/// Shifts whose count may be zero, which leaves the flags alone.
fn by_count(i: &Instruction) -> bool {
    use Mnemonic::*;
    matches!(i.mnemonic(), Shl | Sal | Shr | Sar | Rol | Ror | Rcl | Rcr | Shld | Shrd)
}
