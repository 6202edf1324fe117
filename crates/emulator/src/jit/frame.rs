//! The frame that translated code runs in, and the code around it: entry, exit, dispatch and the call of a handler.
//!
//! While translated code runs, the host's RSP points at the frame. The guest's registers are in the host's of the same
//! name, but for RSP, which is in R13, and R13 to R15, which are in the frame. R14 and R15 are scratch. Between
//! blocks, the guest's arithmetic flags are in the frame.

use super::assembler::{ADDRESS, Assembler, GUEST_RSP, Host, Jump, RAX, RDI, RSI, RSP, SCRATCH};

/// Offsets in the frame, in bytes.
pub mod slot {
    /// The [`super::Context`].
    pub const CONTEXT: i32 = 0;
    /// The guest's R13; R14 and R15 follow.
    pub const R13: i32 = 8;
    /// The arithmetic flags: AH as LAHF gives it, then OF.
    pub const FLAGS: i32 = 32;
    /// The present view's entries of the translation cache.
    pub const TLB: i32 = 40;
    /// The attention word's address.
    pub const ATTENTION: i32 = 48;
    /// The RAM's host address.
    pub const RAM: i32 = 56;
    /// The table from RIP to code.
    pub const RECENT: i32 = 64;
    /// The regime that its entries must have.
    pub const REGIME: i32 = 72;
    /// Instructions executed, above [`super::Context::start`].
    pub const COUNT: i32 = 80;
    /// Whatever must survive a few instructions.
    pub const SPARE: i32 = 88;
    /// The bases of FS and GS.
    pub const FS_BASE: i32 = 96;
    /// GS follows FS.
    pub const GS_BASE: i32 = 104;
    /// The frame's size: with the return address and six saved registers a multiple of 16.
    pub const SIZE: i32 = 120;
}

/// What the code that surrounds translated code shares with Rust. The first fields are copied into the frame.
#[repr(C)]
#[derive(Debug, Default)]
pub struct Context {
    /// The guest's RAX to R15.
    pub registers: u64,
    /// As [`slot::FLAGS`].
    pub flags: u64,
    /// The present view's entries of the translation cache.
    pub tlb: u64,
    /// The attention word's address; with [`super::Settings::leave_early`] the number of low bytes of `count` that may be
    /// set before translated code comes back.
    pub attention: u64,
    /// The RAM's host address.
    pub ram: u64,
    /// The table from RIP to code.
    pub recent: u64,
    /// The regime that its entries must have.
    pub regime: u64,
    /// Instructions executed, above [`Context::start`].
    pub count: u64,
    /// The base of FS.
    pub fs_base: u64,
    /// The base of GS.
    pub gs_base: u64,
    /// On exit: RIP of the next block, where the exit is [`exit::DISPATCH`].
    pub rip: u64,
    /// `extern "sysv64" fn(&mut Context, insn: u32, block: u32) -> u32`.
    pub step: u64,
    /// For `step`: the vCPU.
    pub owner: u64,
    /// What [`Context::count`] starts from: it overflows when as many instructions have run as may. Zero where any
    /// number may.
    pub start: u64,
}

/// Why translated code came back.
pub mod exit {
    /// Find the block at [`super::Context::rip`].
    pub const DISPATCH: u32 = 0;
    /// `step` said so; it has left the reason behind.
    pub const STOP: u32 = 1;
}

const fn field(index: i32) -> i32 {
    index * 8
}
const REGISTERS: i32 = field(0);
const FLAGS: i32 = field(1);
const TLB: i32 = field(2);
const REGIME: i32 = field(6);
const COUNT: i32 = field(7);
const FS_BASE: i32 = field(8);
const GS_BASE: i32 = field(9);
const RIP: i32 = field(10);
const STEP: i32 = field(11);

/// What a step gives when the next block is to be found by RIP.
pub const STEP_DISPATCH: u32 = 2;

/// Context fields and the slots that they are copied to on entry.
const COPIED: [(i32, i32); 9] = [
    (FLAGS, slot::FLAGS),
    (TLB, slot::TLB),
    (field(3), slot::ATTENTION),
    (field(4), slot::RAM),
    (field(5), slot::RECENT),
    (REGIME, slot::REGIME),
    (COUNT, slot::COUNT),
    (FS_BASE, slot::FS_BASE),
    (GS_BASE, slot::GS_BASE),
];

/// Where the surrounding code starts, as offsets into code memory.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stubs {
    /// `extern "sysv64" fn(&mut Context, code: u64) -> u32`.
    pub enter: usize,
    /// Goes to the block whose RIP is in [`ADDRESS`].
    pub dispatch: usize,
    /// Leaves with [`exit::DISPATCH`] and the RIP in [`ADDRESS`].
    pub leave: usize,
    /// Called: runs the handler of the instruction whose number is in [`ADDRESS`], of the block in [`SCRATCH`].
    pub step: usize,
}

/// Bytes of an entry of the table from RIP to code, and its fields' offsets.
pub const RECENT_SHIFT: u8 = 5;
const RECENT_REGIME: i32 = 8;
const RECENT_CODE: i32 = 16;

/// Generates the surrounding code, to be placed at offset `base`.
pub fn stubs(base: usize, leave_early: bool) -> (Stubs, Vec<u8>) {
    let mut a = Assembler::default();
    let mut stubs = Stubs { enter: base, ..Stubs::default() };
    enter(&mut a, leave_early);
    stubs.leave = base + a.here();
    leave(&mut a);
    stubs.dispatch = base + a.here();
    dispatch(&mut a, stubs.leave - base);
    stubs.step = base + a.here();
    step(&mut a, stubs.dispatch - base);
    (stubs, a.bytes)
}

/// RBX, RBP, R12 to R15.
const SAVED: [Host; 6] = [3, 5, 12, 13, 14, 15];

fn push(a: &mut Assembler, register: Host) {
    if register >= 8 {
        a.bytes.push(0x41);
    }
    a.bytes.push(0x50 | register & 7);
}
fn pop(a: &mut Assembler, register: Host) {
    if register >= 8 {
        a.bytes.push(0x41);
    }
    a.bytes.push(0x58 | register & 7);
}

fn enter(a: &mut Assembler, leave_early: bool) {
    SAVED.iter().for_each(|&register| push(a, register));
    a.alu_immediate(true, 5, RSP, slot::SIZE);
    a.store(RDI, RSP, slot::CONTEXT);
    for (from, to) in COPIED {
        a.load(RAX, RDI, from);
        a.store(RAX, RSP, to);
    }
    if leave_early {
        // What the blocks poll is the count of instructions, without its lowest bytes where the context says so.
        a.memory(true, &[0x8d], RAX, RSP, slot::COUNT);
        a.memory(true, &[0x03], RAX, RSP, slot::ATTENTION);
        a.store(RAX, RSP, slot::ATTENTION);
    }
    a.store(RSI, RSP, slot::SPARE);
    a.load(SCRATCH, RDI, REGISTERS);
    load_guest(a, 0);
    a.memory(false, &[0xff], 4, RSP, slot::SPARE);
}

/// Loads the guest's registers from the array at [`SCRATCH`]. `pushed`: bytes on the stack above the frame.
fn load_guest(a: &mut Assembler, pushed: i32) {
    for guest in 13..16u8 {
        a.load(ADDRESS, SCRATCH, i32::from(guest) * 8);
        a.store(ADDRESS, RSP, pushed + slot::R13 + i32::from(guest - 13) * 8);
    }
    for guest in (0..13u8).filter(|&guest| guest != RSP) {
        a.load(guest, SCRATCH, i32::from(guest) * 8);
    }
    a.load(GUEST_RSP, SCRATCH, i32::from(RSP) * 8);
}

/// Stores them there. Clobbers [`ADDRESS`], after `saved` was done with it.
fn store_guest(a: &mut Assembler, pushed: i32) {
    for guest in (0..13u8).filter(|&guest| guest != RSP) {
        a.store(guest, SCRATCH, i32::from(guest) * 8);
    }
    a.store(GUEST_RSP, SCRATCH, i32::from(RSP) * 8);
    for guest in 13..16u8 {
        a.load(ADDRESS, RSP, pushed + slot::R13 + i32::from(guest - 13) * 8);
        a.store(ADDRESS, SCRATCH, i32::from(guest) * 8);
    }
}

/// Leaves with the RIP in [`ADDRESS`].
fn leave(a: &mut Assembler) {
    a.load(SCRATCH, RSP, slot::CONTEXT);
    a.store(ADDRESS, SCRATCH, RIP);
    a.load(SCRATCH, SCRATCH, REGISTERS);
    store_guest(a, 0);
    a.load(RDI, RSP, slot::CONTEXT);
    a.load(RAX, RSP, slot::FLAGS);
    a.store(RAX, RDI, FLAGS);
    a.load(RAX, RSP, slot::COUNT);
    a.store(RAX, RDI, COUNT);
    a.mov_immediate(RAX, u64::from(exit::DISPATCH));
    unwind(a);
}

/// Drops the frame and returns what is in EAX.
fn unwind(a: &mut Assembler) {
    a.alu_immediate(true, 0, RSP, slot::SIZE);
    SAVED.iter().rev().for_each(|&register| pop(a, register));
    a.bytes.push(0xc3);
}

fn dispatch(a: &mut Assembler, leave: usize) {
    a.store(ADDRESS, RSP, slot::SPARE);
    // The slot's number: (rip ^ rip >> 12) % 4096.
    a.mov(SCRATCH, ADDRESS);
    a.shift(5, SCRATCH, 12);
    a.registers(true, &[0x33], SCRATCH, ADDRESS);
    a.alu_immediate(false, 4, SCRATCH, 0xfff);
    a.shift(4, SCRATCH, RECENT_SHIFT);
    a.memory(true, &[0x03], SCRATCH, RSP, slot::RECENT);
    a.memory(true, &[0x3b], ADDRESS, SCRATCH, 0);
    let another = a.jump_if(5);
    a.load(ADDRESS, RSP, slot::REGIME);
    a.memory(true, &[0x3b], ADDRESS, SCRATCH, RECENT_REGIME);
    let elsewhere = a.jump_if(5);
    a.load(ADDRESS, SCRATCH, RECENT_CODE);
    a.registers(true, &[0x85], ADDRESS, ADDRESS);
    let untranslated = a.jump_if(4);
    // jmp r14
    a.bytes.extend_from_slice(&[0x41, 0xff, 0xe6]);
    let here = a.here();
    for jump in [another, elsewhere, untranslated] {
        a.land(jump, here);
    }
    a.load(ADDRESS, RSP, slot::SPARE);
    let out = a.jump();
    a.land(out, leave);
}

/// The return address is on the stack above the frame.
fn step(a: &mut Assembler, dispatch: usize) {
    const PUSHED: i32 = 8;
    // Numbers of the instruction and the block, before the scratch registers are used.
    a.store(ADDRESS, RSP, PUSHED + slot::SPARE);
    a.mov(ADDRESS, SCRATCH);
    push(a, ADDRESS);
    const BOTH: i32 = 16;
    a.load(SCRATCH, RSP, BOTH + slot::CONTEXT);
    a.load(SCRATCH, SCRATCH, REGISTERS);
    store_guest(a, BOTH);
    a.load(RDI, RSP, BOTH + slot::CONTEXT);
    a.load(RAX, RSP, BOTH + slot::FLAGS);
    a.store(RAX, RDI, FLAGS);
    a.load(RAX, RSP, BOTH + slot::COUNT);
    a.store(RAX, RDI, COUNT);
    a.load(RSI, RSP, BOTH + slot::SPARE);
    pop(a, 2); // The block's number, the third argument.
    a.alu_immediate(true, 5, RSP, 8); // The stack is aligned for the call.
    a.memory(false, &[0xff], 2, RDI, STEP);
    a.alu_immediate(true, 0, RSP, 8);
    a.load(RDI, RSP, PUSHED + slot::CONTEXT);
    a.alu_immediate(false, 7, RAX, exit::STOP as i32);
    let stop = a.jump_if(4);
    a.mov(RSI, RAX);
    for (from, to) in [
        (FLAGS, slot::FLAGS),
        (TLB, slot::TLB),
        (REGIME, slot::REGIME),
        (FS_BASE, slot::FS_BASE),
        (GS_BASE, slot::GS_BASE),
    ] {
        a.load(RAX, RDI, from);
        a.store(RAX, RSP, PUSHED + to);
    }
    a.load(RAX, RDI, RIP);
    a.store(RAX, RSP, PUSHED + slot::SPARE);
    a.alu_immediate(false, 7, RSI, STEP_DISPATCH as i32);
    let branch = a.jump_if(4);
    a.load(SCRATCH, RDI, REGISTERS);
    load_guest(a, PUSHED);
    a.bytes.push(0xc3);
    // The next block is to be found by RIP.
    let here = a.here();
    a.land(branch, here);
    a.load(SCRATCH, RDI, REGISTERS);
    load_guest(a, PUSHED);
    a.alu_immediate(true, 0, RSP, PUSHED);
    a.load(ADDRESS, RSP, slot::SPARE);
    let out: Jump = a.jump();
    a.land(out, dispatch);
    // The registers are in Rust's hands, and so is the count.
    let here = a.here();
    a.land(stop, here);
    a.alu_immediate(true, 0, RSP, PUSHED);
    unwind(a);
}
