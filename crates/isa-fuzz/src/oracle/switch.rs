//! From the child's loop into a case, and back: by the code's own jump behind it, or by a signal.
//!
//! [`enter`] loads the whole state from [`FRAME`] with XRSTOR, moves and IRETQ. A case that completes jumps to
//! [`layout::EXIT`](crate::layout::EXIT), where a jump to [`leave`] stands: it saves all of it in [`FRAME`] again and
//! returns from [`enter`]. A signal's handler copies the kernel's frame there, and does not return from the signal but
//! from [`enter`] too ([`resume`]). So a case that completes makes no system call and raises no exception.
#![allow(unsafe_code)] // All of it.

use std::arch::naked_asm;
use std::mem::offset_of;

/// The state that a case begins in, then that it ends in.
#[repr(C, align(64))]
pub struct Frame {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15.
    pub gprs: [u64; 16],
    /// RFLAGS.
    pub rflags: u64,
    /// RIP; not set by [`leave`].
    pub rip: u64,
    /// CS; not set by [`leave`].
    pub code: u64,
    /// SS.
    pub stack: u64,
    /// The XSAVE area to begin with, or null.
    pub area: *const u8,
    /// Where [`leave`] saves the vector state, or null.
    pub saved: *mut u8,
    /// The components of both.
    pub components: u64,
    /// Where the frame of the IRET to a case ends.
    pub entry: u64,
    loop_rsp: u64,
    mxcsr: u32,
}

/// The one that the code here uses.
pub static mut FRAME: Frame = Frame {
    gprs: [0; 16],
    rflags: 0,
    rip: 0,
    code: 0,
    stack: 0,
    area: std::ptr::null(),
    saved: std::ptr::null_mut(),
    components: 0,
    entry: 0,
    loop_rsp: 0,
    mxcsr: 0x1f80,
};

/// Executes the case in [`FRAME`]. Gives false where it ended by a signal.
///
/// # Safety
/// The frame is a state that a program may be in, and its areas are good ones. Nobody uses thread-local storage until
/// FS is the C library's again.
#[unsafe(naked)]
pub unsafe extern "sysv64" fn enter() -> bool {
    naked_asm!(
        "push rbx", "push rbp", "push r12", "push r13", "push r14", "push r15",
        "mov [rip + {frame} + {loop_rsp}], rsp",
        "mov rcx, [rip + {frame} + {area}]",
        "test rcx, rcx",
        "jz 2f",
        "mov eax, [rip + {frame} + {components}]",
        "xor edx, edx",
        "xrstor64 [rcx]",
        "2:",
        "mov rsp, [rip + {frame} + {entry}]",
        "push qword ptr [rip + {frame} + {stack}]",
        "push qword ptr [rip + {frame} + 32]",
        "push qword ptr [rip + {frame} + {rflags}]",
        "push qword ptr [rip + {frame} + {code}]",
        "push qword ptr [rip + {frame} + {rip}]",
        "mov rax, [rip + {frame}]",
        "mov rcx, [rip + {frame} + 8]",
        "mov rdx, [rip + {frame} + 16]",
        "mov rbx, [rip + {frame} + 24]",
        "mov rbp, [rip + {frame} + 40]",
        "mov rsi, [rip + {frame} + 48]",
        "mov rdi, [rip + {frame} + 56]",
        "mov r8, [rip + {frame} + 64]",
        "mov r9, [rip + {frame} + 72]",
        "mov r10, [rip + {frame} + 80]",
        "mov r11, [rip + {frame} + 88]",
        "mov r12, [rip + {frame} + 96]",
        "mov r13, [rip + {frame} + 104]",
        "mov r14, [rip + {frame} + 112]",
        "mov r15, [rip + {frame} + 120]",
        "iretq",
        frame = sym FRAME,
        entry = const offset_of!(Frame, entry),
        loop_rsp = const offset_of!(Frame, loop_rsp),
        area = const offset_of!(Frame, area),
        components = const offset_of!(Frame, components),
        stack = const offset_of!(Frame, stack),
        rflags = const offset_of!(Frame, rflags),
        code = const offset_of!(Frame, code),
        rip = const offset_of!(Frame, rip),
    )
}

/// Where a completed case comes to: 64-bit code, any registers, flags, stack and vector state.
///
/// # Safety
/// Only after [`enter`].
#[unsafe(naked)]
pub unsafe extern "sysv64" fn leave() {
    naked_asm!(
        "mov [rip + {frame}], rax",
        "mov [rip + {frame} + 8], rcx",
        "mov [rip + {frame} + 16], rdx",
        "mov [rip + {frame} + 24], rbx",
        "mov [rip + {frame} + 32], rsp",
        "mov [rip + {frame} + 40], rbp",
        "mov [rip + {frame} + 48], rsi",
        "mov [rip + {frame} + 56], rdi",
        "mov [rip + {frame} + 64], r8",
        "mov [rip + {frame} + 72], r9",
        "mov [rip + {frame} + 80], r10",
        "mov [rip + {frame} + 88], r11",
        "mov [rip + {frame} + 96], r12",
        "mov [rip + {frame} + 104], r13",
        "mov [rip + {frame} + 112], r14",
        "mov [rip + {frame} + 120], r15",
        "mov eax, ss",
        "mov [rip + {frame} + {stack}], rax",
        "mov rsp, [rip + {frame} + {loop_rsp}]",
        "pushfq",
        "pop qword ptr [rip + {frame} + {rflags}]",
        "push 0x202",
        "popfq",
        "mov eax, 0x2b",
        "mov ss, eax",
        "mov rcx, [rip + {frame} + {saved}]",
        "test rcx, rcx",
        "jz 2f",
        "mov eax, [rip + {frame} + {components}]",
        "xor edx, edx",
        "xsave64 [rcx]",
        "2:",
        "ldmxcsr [rip + {frame} + {mxcsr}]",
        "mov eax, 1",
        "pop r15", "pop r14", "pop r13", "pop r12", "pop rbp", "pop rbx",
        "ret",
        frame = sym FRAME,
        loop_rsp = const offset_of!(Frame, loop_rsp),
        saved = const offset_of!(Frame, saved),
        components = const offset_of!(Frame, components),
        stack = const offset_of!(Frame, stack),
        rflags = const offset_of!(Frame, rflags),
        mxcsr = const offset_of!(Frame, mxcsr),
    )
}

/// Returns from [`enter`], out of a signal's handler.
///
/// # Safety
/// Only in the handler of a signal that came after [`enter`].
#[unsafe(naked)]
pub unsafe extern "sysv64" fn resume() -> ! {
    naked_asm!(
        "mov rsp, [rip + {frame} + {loop_rsp}]",
        "xor eax, eax",
        "pop r15", "pop r14", "pop r13", "pop r12", "pop rbp", "pop rbx",
        "ret",
        frame = sym FRAME,
        loop_rsp = const offset_of!(Frame, loop_rsp),
    )
}

/// What the kernel calls for a signal. Alignment checks may be on.
///
/// # Safety
/// Only as a signal's handler.
#[unsafe(naked)]
pub unsafe extern "sysv64" fn on_signal() {
    naked_asm!("push 0x202", "popfq", "jmp {handler}", handler = sym super::child::on_signal)
}
