//! The loops. Each is a function of the host as well as bytes for the guest: position-independent, its data at RDI, its
//! turns in RSI, and it changes no register that a function has to keep. `loops.s` has their text.

#![allow(unsafe_code)] // The host calls functions that are written in assembly, and reads their bytes.

use std::arch::global_asm;

/// Bytes of data that a loop may touch.
pub const DATA_BYTES: u64 = 64 << 20;

global_asm!(include_str!("loops.s"));

type Function = unsafe extern "sysv64" fn(data: *mut u8, turns: u64);

macro_rules! assembly {
    ($($name:ident $end:ident),* $(,)?) => {
        unsafe extern "sysv64" {
            $(fn $name(data: *mut u8, turns: u64); static $end: u8;)*
        }
    };
}

assembly!(
    loop_alu loop_alu_end,
    loop_mul loop_mul_end,
    loop_load_store loop_load_store_end,
    loop_byte_copy loop_byte_copy_end,
    loop_call loop_call_end,
    loop_predictable loop_predictable_end,
    loop_unpredictable loop_unpredictable_end,
    loop_indirect loop_indirect_end,
    loop_movsb loop_movsb_end,
    loop_stosq loop_stosq_end,
    loop_locked loop_locked_end,
    loop_pages loop_pages_end,
    loop_sse loop_sse_end,
    loop_avx2 loop_avx2_end,
    loop_x87 loop_x87_end,
    loop_cpuid loop_cpuid_end,
    loop_rdtsc loop_rdtsc_end,
    loop_port loop_port_end,
    loop_cr3 loop_cr3_end,
);

/// What the host needs to run a loop at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Needs {
    /// x86-64.
    Nothing,
    /// AVX2.
    Avx2,
    /// It cannot: the loop is for CPL 0, or means something else outside a guest.
    Guest,
}

/// One loop.
pub struct Kernel {
    /// What it does.
    pub name: &'static str,
    function: Function,
    end: *const u8,
    needs: Needs,
}

/// All of them, in the order of the table.
pub fn all() -> Vec<Kernel> {
    let kernel = |name, function: Function, end: *const u8, needs| Kernel { name, function, end, needs };
    use Needs::{Avx2, Guest, Nothing};
    vec![
        kernel("add, sub, xor, lea on registers", loop_alu, &raw const loop_alu_end, Nothing),
        kernel("multiply, shift, rotate", loop_mul, &raw const loop_mul_end, Nothing),
        kernel("loads and stores, 4 KiB", loop_load_store, &raw const loop_load_store_end, Nothing),
        kernel("copy byte by byte", loop_byte_copy, &raw const loop_byte_copy_end, Nothing),
        kernel("call, push, pop, return", loop_call, &raw const loop_call_end, Nothing),
        kernel("branches, predictable", loop_predictable, &raw const loop_predictable_end, Nothing),
        kernel("branches, unpredictable", loop_unpredictable, &raw const loop_unpredictable_end, Nothing),
        kernel(
            "indirect jumps (a bytecode's dispatch)",
            loop_indirect,
            &raw const loop_indirect_end,
            Nothing,
        ),
        kernel("rep movsb, 4 KiB a turn", loop_movsb, &raw const loop_movsb_end, Nothing),
        kernel("rep stosq, 4 KiB a turn", loop_stosq, &raw const loop_stosq_end, Nothing),
        kernel("lock xadd, lock cmpxchg", loop_locked, &raw const loop_locked_end, Nothing),
        kernel("a load from each page of 64 MiB", loop_pages, &raw const loop_pages_end, Nothing),
        kernel("SSE2 on memory and registers", loop_sse, &raw const loop_sse_end, Nothing),
        kernel("AVX2 on memory and registers", loop_avx2, &raw const loop_avx2_end, Avx2),
        kernel("x87", loop_x87, &raw const loop_x87_end, Nothing),
        kernel("cpuid", loop_cpuid, &raw const loop_cpuid_end, Guest),
        kernel("rdtsc", loop_rdtsc, &raw const loop_rdtsc_end, Nothing),
        kernel("in from a port", loop_port, &raw const loop_port_end, Guest),
        kernel("mov cr3 (flush), then 8 pages", loop_cr3, &raw const loop_cr3_end, Guest),
    ]
}

impl Kernel {
    /// Whether the host has the instructions.
    pub fn can_run(&self) -> bool {
        self.needs != Needs::Avx2 || std::is_x86_feature_detected!("avx2")
    }

    /// The function's bytes.
    pub fn code(&self) -> &'static [u8] {
        let start = self.function as *const u8;
        let len = (self.end as usize).saturating_sub(start as usize);
        // SAFETY: the assembly defines the end after the function, in one section that is readable for ever.
        unsafe { std::slice::from_raw_parts(start, len) }
    }

    /// The function on the host, with data of its own; `None` where only a guest can run it.
    pub fn native(&self) -> Option<impl FnMut(u64) + use<>> {
        let mut data = vec![0u8; DATA_BYTES as usize];
        let function = self.function;
        (self.needs != Needs::Guest).then_some(move |turns| {
            // SAFETY: no loop touches anything but DATA_BYTES at its data, its stack, and registers that a function may
            // change; `can_run` has said that the host has its instructions.
            unsafe { function(data.as_mut_ptr(), turns) }
        })
    }
}
