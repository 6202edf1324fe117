//! The frame that translated code runs in, and the code around it: entry, exit, dispatch and the call of a handler.
//!
//! While translated code runs, the host's RSP points at the frame. The guest's registers are in the host's of the same
//! name, but for RSP, which is in R10, and R10, R11, R14 and R15, which are in the frame: compilers use R10 and R11 least.
//! R11 points at the translation cache, R14 and R15 are scratch. Between blocks, the guest's arithmetic flags are in the frame.

use super::assembler::{ADDRESS, Assembler, GUEST_RSP, Host, Jump, RAX, RDI, RSI, RSP, SCRATCH, TLB};
use super::targets::Size;
use super::vectors::{self, Routines, Width};
use crate::mmu::{Access, ENTRY_PAGE, ENTRY_READ, ENTRY_WRITE};

/// Offsets in the frame, in bytes.
pub mod slot {
    /// The [`super::Context`].
    pub const CONTEXT: i32 = 0;
    /// The guest's R10.
    pub const R10: i32 = 8;
    /// The guest's R11.
    pub const R11: i32 = 16;
    /// The guest's R14.
    pub const R14: i32 = 24;
    /// The arithmetic flags: AH as LAHF gives it, then OF.
    pub const FLAGS: i32 = 32;
    /// The guest's R15.
    pub const R15: i32 = 40;
    /// The attention word's address.
    pub const ATTENTION: i32 = 48;
    /// The present regime's table from RIP to code: see [`super::super::targets`].
    pub const TARGETS: i32 = 56;
    /// How the arithmetic flags follow from registers, by a recipe's number; 0 where [`FLAGS`] has them. 32 bits.
    pub const RECIPE: i32 = 64;
    /// Which vector and x87 registers are in the host's: bits of [`super::vectors`]. 32 bits.
    pub const LIVE: i32 = 68;
    /// The linear address of the page that the stack was last found in: see [`super::Stubs::stack`].
    pub const STACK_PAGE: i32 = 72;
    /// Instructions executed, above [`super::Context::start`].
    pub const COUNT: i32 = 80;
    /// Whatever must survive a few instructions.
    pub const SPARE: i32 = 88;
    /// The bases of FS and GS.
    pub const FS_BASE: i32 = 96;
    /// GS follows FS.
    pub const GS_BASE: i32 = 104;
    /// How far from [`STACK_PAGE`] an operand on the stack may begin; 0 where no page is known.
    pub const STACK_LIMIT: i32 = 112;
    /// The host address of that page.
    pub const STACK_HOST: i32 = 120;
    /// An [`super::vectors::X87Area`].
    pub const X87_AREA: i32 = 128;
    /// The return address of a step.
    pub const RETURN: i32 = 136;
    /// The number of a call.
    pub const CALL: i32 = 144;
    /// RDX, while x87 state is saved or loaded.
    pub const KEPT: i32 = 152;
    /// RIP of the last x87 instruction, while x87 state is live.
    pub const X87_RIP: i32 = 160;
    /// The interpreter that runs the code: see [`super::super::owner`].
    pub const OWNER: i32 = 168;
    /// The guest's vector registers in memory.
    pub const VECTOR: i32 = 176;
    /// MXCSR for Rust code.
    pub const HOST_MXCSR: i32 = 184;
    /// The frame's size: with the return address and six saved registers a multiple of 16.
    pub const SIZE: i32 = 200;
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
    /// The present regime's table from RIP to code.
    pub targets: u64,
    /// Instructions executed, above [`Context::start`].
    pub count: u64,
    /// The base of FS.
    pub fs_base: u64,
    /// The base of GS.
    pub gs_base: u64,
    /// On exit: RIP of the next block, where the exit is [`exit::DISPATCH`].
    pub rip: u64,
    /// `extern "sysv64" fn(&mut Context, call: u32) -> u32`.
    pub step: u64,
    /// The interpreter, for `step` and for the code itself.
    pub owner: u64,
    /// What [`Context::count`] starts from: it overflows when as many instructions have run as may. Zero where any
    /// number may.
    pub start: u64,
    /// The guest's vector registers.
    pub vector: u64,
    /// An [`vectors::X87Area`].
    pub x87_area: u64,
    /// As [`slot::RECIPE`].
    pub recipe: u32,
}

/// Why translated code came back.
pub mod exit {
    /// Find the block at [`super::Context::rip`].
    pub const DISPATCH: u32 = 0;
    /// `step` said so; it has left the reason behind.
    pub const STOP: u32 = 1;
    /// The block at [`super::Context::rip`] has to be interpreted: its vector state cannot be in the host's registers.
    pub const REFUSED: u32 = 3;
}

const fn field(index: i32) -> i32 {
    index * 8
}
const REGISTERS: i32 = field(0);
const FLAGS: i32 = field(1);
const ENTRIES: i32 = field(2);
const TARGETS: i32 = field(4);
const COUNT: i32 = field(5);
const FS_BASE: i32 = field(6);
const GS_BASE: i32 = field(7);
const RIP: i32 = field(8);
const STEP: i32 = field(9);
const OWNER: i32 = field(10);
const VECTOR: i32 = field(12);
const X87_AREA: i32 = field(13);
const RECIPE: i32 = field(14);

/// MXCSR as Rust code expects it.
const RUST_MXCSR: u32 = 0x1f80;

/// What a step gives when the next block is to be found by RIP.
pub const STEP_DISPATCH: u32 = 2;

/// Context fields and the slots that they are copied to on entry.
const COPIED: [(i32, i32); 9] = [
    (FLAGS, slot::FLAGS),
    (field(3), slot::ATTENTION),
    (TARGETS, slot::TARGETS),
    (COUNT, slot::COUNT),
    (FS_BASE, slot::FS_BASE),
    (GS_BASE, slot::GS_BASE),
    (OWNER, slot::OWNER),
    (VECTOR, slot::VECTOR),
    (X87_AREA, slot::X87_AREA),
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
    /// The same with [`exit::REFUSED`].
    pub refuse: usize,
    /// Called: runs the handler that the call whose number is in [`ADDRESS`] names.
    pub step: usize,
    /// Called: finds an operand on the stack that does not lie in the page that is known, and makes its page known. The
    /// linear address in [`ADDRESS`] becomes the host's; CF is set where the translation cache has no answer. By
    /// [`stack_routine`].
    pub stack: [usize; STACK_ROUTINES],
    /// How all code looks into the tables.
    pub layout: Layout,
    /// Vector and x87 state.
    pub vectors: Routines,
}

/// How translated code looks into the tables.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    /// [`crate::mmu::Tlb::is_folded`].
    pub folded: bool,
    /// Those from RIP to code.
    pub targets: Size,
    /// Whether the host rotates without touching the flags.
    pub bmi2: bool,
}

/// The largest operand that is looked for with the stack, in bytes: a power of two.
pub const STACK_OPERAND: i32 = 128;
/// Operands of each power of two, for loads and for stores.
const STACK_ROUTINES: usize = 2 * (STACK_OPERAND.trailing_zeros() as usize + 1);

/// Which of [`Stubs::stack`] finds operands of so many bytes, at most [`STACK_OPERAND`].
pub const fn stack_routine(access: Access, size: u32) -> usize {
    let power = size.next_power_of_two().trailing_zeros() as usize;
    (2 * power + matches!(access, Access::Write) as usize) % STACK_ROUTINES
}

/// Generates the surrounding code, to be placed at offset `base`.
pub fn stubs(base: usize, leave_early: bool, layout: Layout) -> (Stubs, Vec<u8>) {
    let mut a = Assembler::default();
    let mut stubs = Stubs { layout, ..Stubs::default() };
    enter(&mut a, leave_early);
    stubs.vectors = vectors::routines(&mut a, Width::of_host());
    let save = stubs.vectors.save;
    stubs.leave = a.here();
    leave(&mut a, save, exit::DISPATCH);
    stubs.refuse = a.here();
    leave(&mut a, save, exit::REFUSED);
    stubs.dispatch = a.here();
    dispatch(&mut a, stubs.leave, layout.targets);
    stubs.step = a.here();
    step(&mut a, stubs.dispatch, save);
    for (n, routine) in stubs.stack.iter_mut().enumerate() {
        *routine = a.here();
        find_on_stack(&mut a, if n % 2 == 1 { ENTRY_WRITE } else { ENTRY_READ }, 1 << (n / 2), layout);
    }
    (stubs.at(base), a.bytes)
}

impl Stubs {
    /// Offsets into code memory of what was placed at `base`.
    fn at(self, base: usize) -> Self {
        let Routines { load_sse, load_full, load_x87, save } = self.vectors;
        let vectors = Routines {
            load_sse: base + load_sse,
            load_full: base + load_full,
            load_x87: base + load_x87,
            save: base + save,
        };
        Self {
            enter: base + self.enter,
            dispatch: base + self.dispatch,
            leave: base + self.leave,
            refuse: base + self.refuse,
            step: base + self.step,
            stack: self.stack.map(|routine| base + routine),
            layout: self.layout,
            vectors,
        }
    }
}

/// Saves vector and x87 state where it is live.
fn save_vectors(a: &mut Assembler, save: usize) {
    // cmp dword [live], 0
    a.memory(false, &[0x83], 7, RSP, slot::LIVE);
    a.bytes.push(0);
    let none = a.jump_if(4);
    let call = a.call();
    a.land(call, save);
    let here = a.here();
    a.land(none, here);
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
    // mov dword [..], immediate
    for (at, value) in [(slot::LIVE, 0), (slot::HOST_MXCSR, RUST_MXCSR), (slot::RECIPE, 0)] {
        a.memory(false, &[0xc7], 0, RSP, at);
        a.bytes.extend_from_slice(&value.to_le_bytes());
    }
    forget_stack(a);
    a.store(RSI, RSP, slot::SPARE);
    a.load(TLB, RDI, ENTRIES);
    a.load(SCRATCH, RDI, REGISTERS);
    load_guest(a);
    a.memory(false, &[0xff], 4, RSP, slot::SPARE);
}

/// Where a guest register lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Home {
    Host(Host),
    Frame(i32),
}

/// Where the guest register of a number lives.
pub const fn home(number: u8) -> Home {
    match number {
        4 => Home::Host(GUEST_RSP),
        10 => Home::Frame(slot::R10),
        11 => Home::Frame(slot::R11),
        14 => Home::Frame(slot::R14),
        15 => Home::Frame(slot::R15),
        other => Home::Host(other),
    }
}

/// Loads the guest's registers from the array at [`SCRATCH`].
fn load_guest(a: &mut Assembler) {
    for guest in 0..16u8 {
        let at = i32::from(guest) * 8;
        match home(guest) {
            Home::Host(host) => a.load(host, SCRATCH, at),
            Home::Frame(slot) => {
                a.load(ADDRESS, SCRATCH, at);
                a.store(ADDRESS, RSP, slot);
            }
        }
    }
}

/// Stores them there. Clobbers [`ADDRESS`], after `saved` was done with it.
fn store_guest(a: &mut Assembler) {
    for guest in 0..16u8 {
        let at = i32::from(guest) * 8;
        match home(guest) {
            Home::Host(host) => a.store(host, SCRATCH, at),
            Home::Frame(slot) => {
                a.load(ADDRESS, RSP, slot);
                a.store(ADDRESS, SCRATCH, at);
            }
        }
    }
}

/// Leaves with the RIP in [`ADDRESS`].
fn leave(a: &mut Assembler, save: usize, why: u32) {
    a.store(ADDRESS, RSP, slot::SPARE);
    save_vectors(a, save);
    a.load(ADDRESS, RSP, slot::SPARE);
    a.load(SCRATCH, RSP, slot::CONTEXT);
    a.store(ADDRESS, SCRATCH, RIP);
    a.load(SCRATCH, SCRATCH, REGISTERS);
    store_guest(a);
    a.load(RDI, RSP, slot::CONTEXT);
    a.load(RAX, RSP, slot::FLAGS);
    a.store(RAX, RDI, FLAGS);
    a.load(RAX, RSP, slot::COUNT);
    a.store(RAX, RDI, COUNT);
    a.memory(false, &[0x8b], RAX, RSP, slot::RECIPE);
    a.memory(false, &[0x89], RAX, RDI, RECIPE);
    a.mov_immediate(RAX, u64::from(why));
    unwind(a);
}

/// Drops the frame and returns what is in EAX.
fn unwind(a: &mut Assembler) {
    a.alu_immediate(true, 0, RSP, slot::SIZE);
    SAVED.iter().rev().for_each(|&register| pop(a, register));
    a.bytes.push(0xc3);
}

fn dispatch(a: &mut Assembler, leave: usize, tables: Size) {
    let another = a.find_target(tables);
    a.jump_to_target();
    a.land(another, leave);
}

/// One of [`Stubs::stack`]. The frame is 8 bytes further, behind the return address.
fn find_on_stack(a: &mut Assembler, tag: i32, size: i32, layout: Layout) {
    let slot = |slot: i32| slot + 8;
    let missing = a.find_entry(tag, size, layout);
    a.store(ADDRESS, RSP, slot(slot::KEPT));
    // Only a page that may be read and written is noted.
    a.entry(&[0x8b], ADDRESS, ENTRY_WRITE);
    a.entry(&[0x3b], ADDRESS, ENTRY_READ);
    let differ = a.jump_if(5);
    a.store(ADDRESS, RSP, slot(slot::STACK_PAGE));
    a.entry(&[0x8b], ADDRESS, ENTRY_PAGE);
    a.store(ADDRESS, RSP, slot(slot::STACK_HOST));
    a.memory(true, &[0xc7], 0, RSP, slot(slot::STACK_LIMIT));
    a.bytes.extend_from_slice(&(4096 - STACK_OPERAND + 1).to_le_bytes());
    let here = a.here();
    a.land(differ, here);
    a.load(ADDRESS, RSP, slot(slot::KEPT));
    a.entry(&[0x03], ADDRESS, ENTRY_PAGE);
    a.bytes.extend_from_slice(&[0xf8, 0xc3]); // clc; ret
    let here = a.here();
    a.land(missing, here);
    a.bytes.extend_from_slice(&[0xf9, 0xc3]); // stc; ret
}

/// `mov qword [..], 0`: the page of the stack is not known any more.
pub fn forget_stack(a: &mut Assembler) {
    a.memory(true, &[0xc7], 0, RSP, slot::STACK_LIMIT);
    a.bytes.extend_from_slice(&[0; 4]);
}

/// The return address is on the stack above the frame, and then in the spare slot.
fn step(a: &mut Assembler, dispatch: usize, save: usize) {
    a.memory(false, &[0x8f], 0, RSP, slot::RETURN); // pop [..]: addressed by the RSP that it leaves
    a.store(ADDRESS, RSP, slot::CALL);
    save_vectors(a, save);
    a.load(SCRATCH, RSP, slot::CONTEXT);
    a.load(SCRATCH, SCRATCH, REGISTERS);
    store_guest(a);
    a.load(RDI, RSP, slot::CONTEXT);
    a.load(RAX, RSP, slot::FLAGS);
    a.store(RAX, RDI, FLAGS);
    a.load(RAX, RSP, slot::COUNT);
    a.store(RAX, RDI, COUNT);
    a.memory(false, &[0x8b], RAX, RSP, slot::RECIPE);
    a.memory(false, &[0x89], RAX, RDI, RECIPE);
    a.load(RSI, RSP, slot::CALL);
    a.memory(false, &[0xff], 2, RDI, STEP);
    a.load(RDI, RSP, slot::CONTEXT);
    a.alu_immediate(false, 7, RAX, exit::STOP as i32);
    let stop = a.jump_if(4);
    a.mov(RSI, RAX);
    for (from, to) in [
        (FLAGS, slot::FLAGS),
        (TARGETS, slot::TARGETS),
        (FS_BASE, slot::FS_BASE),
        (GS_BASE, slot::GS_BASE),
        (VECTOR, slot::VECTOR),
    ] {
        a.load(RAX, RDI, from);
        a.store(RAX, RSP, to);
    }
    a.load(TLB, RDI, ENTRIES);
    a.load(RAX, RDI, RIP);
    a.store(RAX, RSP, slot::SPARE);
    // The translation cache may have changed.
    forget_stack(a);
    // The flags are in the frame now.
    a.memory(false, &[0xc7], 0, RSP, slot::RECIPE);
    a.bytes.extend_from_slice(&[0; 4]);
    a.alu_immediate(false, 7, RSI, STEP_DISPATCH as i32);
    let branch = a.jump_if(4);
    a.load(SCRATCH, RDI, REGISTERS);
    load_guest(a);
    a.memory(false, &[0xff], 4, RSP, slot::RETURN);
    // The next block is to be found by RIP.
    let here = a.here();
    a.land(branch, here);
    a.load(SCRATCH, RDI, REGISTERS);
    load_guest(a);
    a.load(ADDRESS, RSP, slot::SPARE);
    let out: Jump = a.jump();
    a.land(out, dispatch);
    // The registers are in Rust's hands, and so is the count.
    let here = a.here();
    a.land(stop, here);
    unwind(a);
}
