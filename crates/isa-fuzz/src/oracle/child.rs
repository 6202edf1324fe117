//! The child: maps the pages at their addresses, shuts itself in, and executes cases in its signal handler.
//!
//! After [`run`] has begun, the FS register is the cases': nothing here may use thread-local storage, which the C
//! library's wrappers of system calls do. The mappings of libraries and stack lie above 4 GiB, out of reach of 16- and
//! 32-bit code.
#![allow(unsafe_code)] // Signals, mappings, segment registers.

use std::arch::{asm, x86_64};
use std::ptr::{null, null_mut};
use std::sync::atomic::Ordering;

use engine::XSAVE_AREA_SIZE;

use super::{OracleError, Shared};
use crate::case::{COMPLETED, Case, Outcome, Trap, WINDOW};
use crate::layout::{self, ARENA, ARENA_LEN, CODE, CODE_AT, FILLER, Kind, LDT, PAGE};

/// The trap flag.
const TF: u64 = 1 << 8;
/// Flags that a case brings: arithmetic, DF, AC.
const CASE_FLAGS: u64 = 0x4_0cd5;
/// In `uc_flags`: SS is restored exactly as it stands.
const STRICT_SS: u64 = 0x4 | 0x2;
/// Where the kernel's own part of the FXSAVE image begins.
const LEGACY_END: usize = 416;
/// Where the XSAVE header begins.
const HEADER: usize = 512;
/// Bytes of the signal stack.
const STACK: usize = 256 << 10;

const SIGNALS: [i32; 6] =
    [libc::SIGTRAP, libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL, libc::SIGSYS];

/// What the child needs and the parent can make without a risk.
pub struct Setup {
    pristine: Vec<u8>,
    code: Vec<u8>,
    stack: Vec<u8>,
    /// Components of the vector state that the host has.
    components: u64,
    /// Bytes of it.
    area_len: usize,
}

impl Setup {
    pub fn new() -> Result<Self, OracleError> {
        if !std::is_x86_feature_detected!("xsave") {
            return Err(OracleError::Lacks("use XSAVE"));
        }
        // SAFETY: the host has XSAVE, and its kernel has switched it on.
        let (components, leaf) = unsafe { (xcr0(), x86_64::__cpuid_count(0xd, 0)) };
        Ok(Self {
            pristine: layout::pristine(),
            code: vec![FILLER; PAGE],
            stack: vec![0; STACK],
            components: components & 0xe7,
            area_len: (leaf.ebx as usize).min(XSAVE_AREA_SIZE),
        })
    }
}

#[target_feature(enable = "xsave")]
fn xcr0() -> u64 {
    // SAFETY: register 0 always exists.
    unsafe { x86_64::_xgetbv(0) }
}

/// The handler's memory.
struct State {
    shared: *mut Shared,
    /// The pages at a second place, where all may be written.
    alias: *mut u8,
    pristine: *const u8,
    components: u64,
    area_len: usize,
    slot: usize,
    index: usize,
    running: bool,
}

static mut STATE: State = State {
    shared: null_mut(),
    alias: null_mut(),
    pristine: null(),
    components: 0,
    area_len: 0,
    slot: 0,
    index: 0,
    running: false,
};

/// The child's life. It ends with the parent, or by a signal that no case should raise.
pub fn run(setup: Setup, shared: *mut Shared) -> ! {
    // SAFETY: this process has one thread, and its memory is a copy that no one else relies on. `setup` is never
    // dropped.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        let Some(alias) = map_pages(&setup) else { libc::_exit(100) };
        let state = &raw mut STATE;
        (*state).shared = shared;
        (*state).alias = alias;
        (*state).pristine = setup.pristine.as_ptr();
        (*state).components = setup.components;
        (*state).area_len = setup.area_len;
        if !set_ldt() || !catch_signals(&setup) || !shut_in() {
            libc::_exit(101);
        }
        asm!("int3");
        libc::abort()
    }
}

/// Maps the arena and the code at their addresses, and all of it once more.
unsafe fn map_pages(setup: &Setup) -> Option<*mut u8> {
    let len = ARENA_LEN + PAGE;
    let (rw, fixed) = (
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_SHARED | libc::MAP_FIXED_NOREPLACE | libc::MAP_POPULATE,
    );
    // SAFETY: new mappings; the fixed ones refuse to replace anything.
    unsafe {
        let file = libc::memfd_create(c"cases".as_ptr(), 0);
        if file < 0 || libc::ftruncate(file, len as libc::off_t) < 0 {
            return None;
        }
        let alias = libc::mmap(null_mut(), len, rw, libc::MAP_SHARED, file, 0);
        let map = |address: u64, len: usize, protection: i32, offset: usize| {
            let at = libc::mmap(address as *mut _, len, protection, fixed, file, offset as libc::off_t);
            at as u64 == address
        };
        let read_execute = libc::PROT_READ | libc::PROT_EXEC;
        let ok = alias != libc::MAP_FAILED
            && map(ARENA, 2 * PAGE, rw, 0)
            && map(ARENA + 2 * PAGE as u64, PAGE, libc::PROT_READ, 2 * PAGE)
            && map(CODE, PAGE, read_execute, ARENA_LEN);
        if !ok {
            return None;
        }
        let alias = alias.cast::<u8>();
        alias.copy_from_nonoverlapping(setup.pristine.as_ptr(), ARENA_LEN);
        alias.add(ARENA_LEN).copy_from_nonoverlapping(setup.code.as_ptr(), PAGE);
        Some(alias)
    }
}

/// As modify_ldt(2) takes a descriptor.
#[repr(C)]
struct UserDesc {
    entry: u32,
    base: u32,
    limit: u32,
    flags: u32,
}

unsafe fn set_ldt() -> bool {
    LDT.iter().enumerate().all(|(index, entry)| {
        let contents = match entry.kind {
            Kind::Data | Kind::ReadOnly | Kind::Absent => 0,
            Kind::ExpandDown => 1,
            Kind::Code | Kind::ExecuteOnly => 2,
        };
        let read_only = matches!(entry.kind, Kind::ReadOnly | Kind::ExecuteOnly);
        let flags = u32::from(entry.big)
            | contents << 1
            | u32::from(read_only) << 3
            | u32::from(entry.pages) << 4
            | u32::from(entry.kind == Kind::Absent) << 5;
        let desc = UserDesc { entry: index as u32, base: entry.base, limit: entry.limit, flags };
        // SAFETY: the kernel reads `desc`.
        unsafe { libc::syscall(libc::SYS_modify_ldt, 0x11, &desc, size_of::<UserDesc>()) == 0 }
    })
}

unsafe fn catch_signals(setup: &Setup) -> bool {
    // SAFETY: plain system calls; the stack is never freed.
    unsafe {
        let stack =
            libc::stack_t { ss_sp: setup.stack.as_ptr() as *mut _, ss_flags: 0, ss_size: setup.stack.len() };
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_signal as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
        libc::sigaltstack(&stack, null_mut()) == 0
            && SIGNALS.iter().all(|&signal| libc::sigaction(signal, &action, null_mut()) == 0)
    }
}

/// From here on no system call but two.
unsafe fn shut_in() -> bool {
    const LOAD: u16 = 0x20;
    const EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    const X86_64: u32 = 0xc000_003e;
    let line = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let mut filter = [
        line(LOAD, 0, 0, 4),
        line(EQUAL, 0, 4, X86_64),
        line(LOAD, 0, 0, 0),
        line(EQUAL, 1, 0, libc::SYS_rt_sigreturn as u32),
        line(EQUAL, 0, 1, libc::SYS_futex as u32),
        line(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW),
        line(RETURN, 0, 0, libc::SECCOMP_RET_KILL_PROCESS),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: the kernel reads the program.
    unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
            && libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &program) == 0
    }
}

#[allow(clippy::deref_addrof)] // Any other way to the one static is a lint as well.
unsafe extern "C" fn on_signal(_: i32, _: *const libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: one thread, and no signal comes while this runs; the kernel gives the context.
    unsafe {
        let state = &mut *(&raw mut STATE);
        let context = &mut *context.cast::<libc::ucontext_t>();
        if state.running {
            let slot = &raw mut (*state.shared).slots[state.slot];
            let (case, outcome) = (&(*slot).cases[state.index], &mut (*slot).outcomes[state.index]);
            record(state, case, context, outcome);
            state.index += 1;
        }
        let case = next_case(state);
        load(state, case, context);
        state.running = true;
    }
}

/// The next case; waits for a batch where there is none.
unsafe fn next_case(state: &mut State) -> &'static Case {
    // SAFETY: shared memory; the slot is the child's while `submitted` is 1.
    unsafe {
        loop {
            let slot = &raw mut (*state.shared).slots[state.slot];
            let submitted = &(*slot).submitted;
            while submitted.load(Ordering::Acquire) == 0 {
                futex(submitted.as_ptr(), libc::FUTEX_WAIT, 0);
            }
            if state.index < (*slot).count as usize {
                (*state.shared).current.store(state.index as u32, Ordering::Relaxed);
                return &(*slot).cases[state.index];
            }
            submitted.store(0, Ordering::Release);
            futex(submitted.as_ptr(), libc::FUTEX_WAKE, 1);
            state.slot ^= 1;
            state.index = 0;
        }
    }
}

/// The system call alone: no errno.
unsafe fn futex(word: *mut u32, operation: i32, value: u32) {
    // SAFETY: SYSCALL changes RAX, RCX and R11.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") libc::SYS_futex => _,
            in("rdi") word,
            in("rsi") i64::from(operation),
            in("rdx") u64::from(value),
            in("r10") 0,
            out("rcx") _,
            out("r11") _,
        );
    }
}

/// Which entry of `gregs` holds a general register.
const GPRS: [i32; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

/// Puts the machine into a case's state, as of the return from the signal.
unsafe fn load(state: &State, case: &Case, context: &mut libc::ucontext_t) {
    // Flags that the return from a signal leaves as they are: NT and ID.
    // SAFETY: the same flags as Rust code expects.
    unsafe { asm!("push 0x202", "popfq") };
    let registers = &mut context.uc_mcontext.gregs;
    for (at, value) in GPRS.iter().zip(case.gprs) {
        registers[*at as usize] = value as i64;
    }
    let step = if case.trap == Trap::Step { TF } else { 0 };
    registers[libc::REG_EFL as usize] = (case.rflags & CASE_FLAGS | step | 0x202) as i64;
    registers[libc::REG_RIP as usize] = case.mode.rip() as i64;
    let (code, stack) = (u64::from(case.mode.code_selector()), u64::from(case.selectors[2]));
    registers[libc::REG_CSGSFS as usize] = (code | stack << 48) as i64;
    context.uc_flags |= STRICT_SS;
    // SAFETY: the alias has all pages; the kernel gives the vector area; the selectors are good ones.
    unsafe {
        let window = state.alias.add((case.window_at as usize).min(ARENA_LEN - WINDOW));
        window.copy_from_nonoverlapping(case.window.as_ptr(), WINDOW);
        let code = state.alias.add(ARENA_LEN + CODE_AT as usize);
        for at in 0..32 {
            *code.add(at) = if at < case.code().len() { case.code()[at] } else { FILLER };
        }
        if case.uses_vector {
            let area = context.uc_mcontext.fpregs.cast::<u8>();
            area.copy_from_nonoverlapping(case.area.0.as_ptr(), LEGACY_END);
            area.add(HEADER).cast::<u64>().write(state.components);
            let rest = HEADER + 64;
            area.add(rest).copy_from_nonoverlapping(case.area.0.as_ptr().add(rest), state.area_len - rest);
        }
        let [es, _, _, ds, fs, gs] = case.selectors;
        asm!("mov es, {0:x}", "mov ds, {1:x}", "mov fs, {2:x}", "mov gs, {3:x}",
            in(reg) es, in(reg) ds, in(reg) fs, in(reg) gs);
        if case.mode == layout::Mode::Bits64 {
            asm!("wrfsbase {0}", "wrgsbase {1}", in(reg) case.bases[0], in(reg) case.bases[1]);
        }
    }
}

/// Takes down what an instruction did.
unsafe fn record(state: &State, case: &Case, context: &libc::ucontext_t, outcome: &mut Outcome) {
    let registers = &context.uc_mcontext.gregs;
    let get = |register: i32| registers[register as usize] as u64;
    for (value, at) in outcome.gprs.iter_mut().zip(GPRS) {
        *value = get(at);
    }
    outcome.rip = get(libc::REG_RIP);
    outcome.rflags = get(libc::REG_EFL);
    outcome.vector = get(libc::REG_TRAPNO) as u8;
    outcome.error = get(libc::REG_ERR);
    outcome.cr2 = if outcome.vector == 14 { get(libc::REG_CR2) } else { 0 };
    let done = case.mode.rip() + case.code().len() as u64;
    match (case.trap, outcome.vector) {
        (Trap::Step, 1) => outcome.vector = COMPLETED,
        (Trap::Breakpoint, 3) if outcome.rip == done + 1 => {
            outcome.vector = COMPLETED;
            outcome.rip = done;
        }
        _ => {}
    }
    let segments = get(libc::REG_CSGSFS);
    outcome.selectors[1] = segments as u16;
    outcome.selectors[2] = (segments >> 48) as u16;
    // SAFETY: the kernel gives the vector area, which is as long as the host's XSAVE writes; the alias has all pages.
    unsafe {
        let (es, ds, fs, gs): (u16, u16, u16, u16);
        asm!("mov {0:x}, es", "mov {1:x}, ds", "mov {2:x}, fs", "mov {3:x}, gs",
            out(reg) es, out(reg) ds, out(reg) fs, out(reg) gs);
        [outcome.selectors[0], outcome.selectors[3], outcome.selectors[4], outcome.selectors[5]] =
            [es, ds, fs, gs];
        asm!("rdfsbase {0}", "rdgsbase {1}", out(reg) outcome.bases[0], out(reg) outcome.bases[1]);
        let area = context.uc_mcontext.fpregs.cast::<u8>();
        if case.uses_vector {
            area.copy_to_nonoverlapping(outcome.area.0.as_mut_ptr(), state.area_len);
        }
        let data = std::slice::from_raw_parts_mut(state.alias, ARENA_LEN);
        let pristine = std::slice::from_raw_parts(state.pristine, ARENA_LEN);
        outcome.take_lines(case, data, pristine);
    }
}
