//! The child: maps the pages at their addresses, shuts itself in, and executes cases.
//!
//! After [`run`] has begun, the FS register is the cases': nothing here may use thread-local storage, which the C
//! library's wrappers of system calls do. The mappings of libraries and stack lie above 4 GiB, out of reach of 16- and
//! 32-bit code.
#![allow(unsafe_code)] // Signals, mappings, segment registers.

use std::arch::{asm, x86_64};
use std::ptr::{null, null_mut};
use std::sync::atomic::Ordering;

use engine::XSAVE_AREA_SIZE;

use super::switch::{self, FRAME};
use super::{OracleError, Shared};
use crate::case::{COMPLETED, Case, Outcome, TIMED_OUT, Trap, WINDOW};
use crate::layout::{self, ARENA, ARENA_LEN, CODE, CODE_AT, EXIT, FILLER, Kind, LDT, PAGE};

/// The trap flag.
const TF: u64 = 1 << 8;
/// Flags that a case brings: arithmetic, DF, AC.
const CASE_FLAGS: u64 = 0x4_0cd5;
/// Microseconds of the processor's time in which a case comes back.
const PATIENCE: libc::suseconds_t = 50_000;
/// Where the XSAVE header begins.
const HEADER: usize = 512;
/// Bytes of the signal stack.
const STACK: usize = 256 << 10;

const SIGNALS: [i32; 6] =
    [libc::SIGTRAP, libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL, libc::SIGPROF];

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
            code: layout::code_page(),
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
    /// Bytes of code and of what leaves it, in the page of code.
    code_len: usize,
    /// Vector, error code and CR2 of the last signal.
    trapped: (u8, u64, u64),
    /// Cases done, and how many it were when the clock was last looked at.
    done: u64,
    seen: u64,
    /// Within a case.
    running: bool,
}

static mut STATE: State = State {
    shared: null_mut(),
    alias: null_mut(),
    pristine: null(),
    components: 0,
    area_len: 0,
    code_len: 0,
    trapped: (0, 0, 0),
    done: 0,
    seen: 0,
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
        FRAME.components = setup.components;
        serve(state)
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
            && map(CODE, PAGE, read_execute, ARENA_LEN)
            && map_exit();
        if !ok {
            return None;
        }
        let alias = alias.cast::<u8>();
        alias.copy_from_nonoverlapping(setup.pristine.as_ptr(), ARENA_LEN);
        alias.add(ARENA_LEN).copy_from_nonoverlapping(setup.code.as_ptr(), PAGE);
        Some(alias)
    }
}

/// Maps the page where cases leave to, and those that they are entered from.
unsafe fn map_exit() -> bool {
    let map = |address: u64| {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE | libc::MAP_POPULATE;
        let rights = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping that refuses to replace anything.
        let at = unsafe { libc::mmap(address as *mut _, PAGE, rights, flags, -1, 0) };
        (at as u64 == address).then_some(at)
    };
    if !layout::UPPER_HALVES.iter().all(|&upper| map(layout::entry_stack(upper)).is_some()) {
        return false;
    }
    // SAFETY: the new page; the code is JMP to the address behind it.
    unsafe {
        let Some(page) = map(EXIT & !0xfff) else { return false };
        let at = page.cast::<u8>().add((EXIT & 0xfff) as usize);
        at.copy_from_nonoverlapping([0xff, 0x25, 0, 0, 0, 0].as_ptr(), 6);
        at.add(6).cast::<u64>().write(switch::leave as *const () as u64);
        libc::mprotect(page, PAGE, libc::PROT_READ | libc::PROT_EXEC) == 0
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
        action.sa_sigaction = switch::on_signal as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
        let tick = libc::timeval { tv_sec: 0, tv_usec: PATIENCE };
        let clock = libc::itimerval { it_interval: tick, it_value: tick };
        libc::sigaltstack(&stack, null_mut()) == 0
            && libc::syscall(libc::SYS_setitimer, libc::ITIMER_PROF, &clock, 0) == 0
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

/// What came by a signal: to [`FRAME`] with it, and out of the case.
///
/// # Safety
/// The kernel's call of a handler, by way of [`switch::on_signal`].
#[allow(clippy::deref_addrof)] // Any other way to the one static is a lint as well.
pub unsafe extern "C" fn on_signal(number: i32, _: *const libc::siginfo_t, context: *const libc::ucontext_t) {
    // SAFETY: one thread, whose loop waits for `enter` to return; the kernel gives the context. The vector area is as
    // long as the host's XSAVE writes.
    unsafe {
        let (state, frame) = (&mut *(&raw mut STATE), &mut *(&raw mut FRAME));
        let registers = &(*context).uc_mcontext;
        let get = |register: i32| registers.gregs[register as usize] as u64;
        let mut vector = get(libc::REG_TRAPNO) as u8;
        if number == libc::SIGPROF {
            let seen = std::mem::replace(&mut state.seen, state.done);
            if !state.running || seen != state.done {
                return;
            }
            vector = TIMED_OUT;
        }
        if !state.running {
            libc::_exit(102);
        }
        for (value, at) in frame.gprs.iter_mut().zip(GPRS) {
            *value = get(at);
        }
        let segments = get(libc::REG_CSGSFS);
        (frame.rip, frame.rflags) = (get(libc::REG_RIP), get(libc::REG_EFL));
        (frame.code, frame.stack) = (segments & 0xffff, segments >> 48);
        state.trapped = (vector, get(libc::REG_ERR), get(libc::REG_CR2));
        if !frame.saved.is_null() {
            frame.saved.copy_from_nonoverlapping(registers.fpregs.cast::<u8>(), state.area_len);
        }
        switch::resume()
    }
}

/// Executes one batch of cases after another.
unsafe fn serve(state: *mut State) -> ! {
    // SAFETY: shared memory; the slot is the child's while `submitted` is 1.
    unsafe {
        let shared = (*state).shared;
        for number in (0..2).cycle() {
            let slot = &raw mut (*shared).slots[number];
            let submitted = &(*slot).submitted;
            while submitted.load(Ordering::Acquire) == 0 {
                futex(submitted.as_ptr(), libc::FUTEX_WAIT, 0);
            }
            for index in 0..((*slot).count as usize).min(super::BATCH) {
                (*shared).current.store(index as u32, Ordering::Relaxed);
                execute(state, &mut (*slot).cases[index], &mut (*slot).outcomes[index]);
            }
            submitted.store(0, Ordering::Release);
            futex(submitted.as_ptr(), libc::FUTEX_WAKE, 1);
        }
    }
    unreachable!()
}

/// Executes a case.
unsafe fn execute(state: *mut State, case: &mut Case, outcome: &mut Outcome) {
    // SAFETY: the handler of the signal that may come uses the same memory, but not while this does.
    unsafe {
        load(&mut *state, case, outcome);
        (*state).running = true;
        let completed = switch::enter();
        (*state).running = false;
        (*state).done += 1;
        record(&*state, case, outcome, completed);
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

/// Puts the machine into a case's state, as far as [`switch::enter`] does not.
#[allow(clippy::deref_addrof)] // Any other way to the one static is a lint as well.
unsafe fn load(state: &mut State, case: &mut Case, outcome: &mut Outcome) {
    // SAFETY: the handler does not run now; the alias has all pages; the selectors are good ones.
    unsafe {
        let frame = &mut *(&raw mut FRAME);
        frame.gprs = case.gprs;
        let step = if case.trap == Trap::Step { TF } else { 0 };
        frame.rflags = case.rflags & CASE_FLAGS | step | 0x202;
        frame.rip = case.mode.rip();
        (frame.code, frame.stack) = (case.mode.code_selector().into(), case.selectors[2].into());
        let narrow = case.mode != layout::Mode::Bits64 && layout::is_narrow_stack(case.selectors[2]);
        let upper = if narrow { (case.gprs[4] >> 16) as u16 } else { 0 };
        frame.entry = layout::entry_stack(upper) + PAGE as u64;
        (frame.area, frame.saved) = (null(), null_mut());
        if case.uses_vector {
            case.area.0[HEADER..HEADER + 64].fill(0);
            case.area.0[HEADER] = state.components as u8;
            (frame.area, frame.saved) = (case.area.0.as_ptr(), outcome.area.0.as_mut_ptr());
        }
        let window = state.alias.add((case.window_at as usize).min(ARENA_LEN - WINDOW));
        window.copy_from_nonoverlapping(case.window.as_ptr(), WINDOW);
        put_code(state, case);
        let [es, _, _, ds, fs, gs] = case.selectors;
        asm!("mov es, {0:x}", "mov ds, {1:x}", "mov fs, {2:x}", "mov gs, {3:x}",
            in(reg) es, in(reg) ds, in(reg) fs, in(reg) gs);
        if case.mode == layout::Mode::Bits64 {
            asm!("wrfsbase {0}", "wrgsbase {1}", in(reg) case.bases[0], in(reg) case.bases[1]);
        }
    }
}

/// Writes the code, with what leaves it behind it, over the one before.
unsafe fn put_code(state: &mut State, case: &Case) {
    let code = case.code();
    let (leave, leave_len) = layout::leave(case.mode, code.len());
    let len = code.len() + leave_len;
    // SAFETY: the alias has all pages, and the page of code room for the longest.
    unsafe {
        let at = state.alias.add(ARENA_LEN + CODE_AT as usize);
        at.copy_from_nonoverlapping(code.as_ptr(), code.len());
        at.add(code.len()).copy_from_nonoverlapping(leave.as_ptr(), leave_len);
        if state.code_len > len {
            at.add(len).write_bytes(FILLER, state.code_len - len);
        }
    }
    state.code_len = len;
}

/// Takes down what an instruction did.
#[allow(clippy::deref_addrof)] // Any other way to the one static is a lint as well.
unsafe fn record(state: &State, case: &Case, outcome: &mut Outcome, completed: bool) {
    // SAFETY: the handler does not run now; the alias has all pages.
    unsafe {
        let frame = &*(&raw const FRAME);
        outcome.gprs = frame.gprs;
        outcome.rflags = frame.rflags;
        (outcome.vector, outcome.error, outcome.cr2) =
            if completed || case.trap == Trap::Step && state.trapped.0 == 1 {
                (COMPLETED, 0, 0)
            } else {
                state.trapped
            };
        if outcome.vector != 14 {
            outcome.cr2 = 0;
        }
        outcome.rip = if completed { case.mode.rip() + case.code().len() as u64 } else { frame.rip };
        outcome.selectors[1] = if completed { case.mode.code_selector() } else { frame.code as u16 };
        outcome.selectors[2] = frame.stack as u16;
        let (es, ds, fs, gs): (u16, u16, u16, u16);
        asm!("mov {0:x}, es", "mov {1:x}, ds", "mov {2:x}, fs", "mov {3:x}, gs",
            out(reg) es, out(reg) ds, out(reg) fs, out(reg) gs);
        [outcome.selectors[0], outcome.selectors[3], outcome.selectors[4], outcome.selectors[5]] =
            [es, ds, fs, gs];
        asm!("rdfsbase {0}", "rdgsbase {1}", out(reg) outcome.bases[0], out(reg) outcome.bases[1]);
        let data = std::slice::from_raw_parts_mut(state.alias, ARENA_LEN);
        let pristine = std::slice::from_raw_parts(state.pristine, ARENA_LEN);
        outcome.take_lines(case, data, pristine);
    }
}
