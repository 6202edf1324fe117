//! Running a snippet in 64-bit or compatibility mode, in any ring.

use core::fmt::{self, Debug};
use core::ptr::addr_of;

use crate::cpu::{flag, vector};
use crate::tables::selector;

/// The registers' numbers, as instructions encode them.
pub mod reg {
    #![allow(missing_docs)]
    pub const AX: usize = 0;
    pub const CX: usize = 1;
    pub const DX: usize = 2;
    pub const BX: usize = 3;
    pub const SP: usize = 4;
    pub const BP: usize = 5;
    pub const SI: usize = 6;
    pub const DI: usize = 7;
    pub const R8: usize = 8;
    pub const R9: usize = 9;
    pub const R10: usize = 10;
    pub const R11: usize = 11;
}

/// All registers before a snippet, and after it with the event that ended it.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct State {
    /// RAX to R15.
    pub gprs: [u64; 16],
    /// RIP.
    pub rip: u64,
    /// RFLAGS.
    pub rflags: u64,
    /// CS.
    pub cs: u64,
    /// SS.
    pub ss: u64,
    /// DS.
    pub ds: u64,
    /// ES.
    pub es: u64,
    /// The event's vector.
    pub vector: u64,
    /// Its error code; 0 where it has none.
    pub error: u64,
    /// CR2 then.
    pub cr2: u64,
    /// Where the stack was when the processor began to push the event's frame.
    pub frame: u64,
    /// DR6 then.
    pub dr6: u64,
    /// CR0 then; it was restored, as were CR3 and CR4.
    pub cr0: u64,
    /// Where the snippet begins.
    pub start: u64,
}

#[repr(C, align(4096))]
struct Stack([u8; 0x4000]);

static mut STACK: Stack = Stack([0; 0x4000]);

/// Where snippets' stacks end; 8 KiB below it are theirs, and 8 KiB above.
pub fn stack() -> u64 {
    addr_of!(STACK) as u64 + 0x2000
}

unsafe extern "C" {
    fn long_run();
    static mut LONG_STATE: State;
}

/// An event, and how far from the snippet's beginning it came; RIP as it was saved.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Event {
    /// Vector.
    pub vector: u64,
    /// Error code.
    pub error: u64,
    /// Bytes from the snippet's beginning, where that matters.
    pub at: Option<u64>,
}

impl Debug for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_event(f, self.vector, self.error, self.at)
    }
}

fn write_event(f: &mut fmt::Formatter<'_>, vector: u64, error: u64, at: Option<u64>) -> fmt::Result {
    let names = [
        "DE", "DB", "NMI", "BP", "OF", "BR", "UD", "NM", "DF", "9", "TS", "NP", "SS", "GP", "PF", "15", "MF",
        "AC", "MC", "XM", "VE", "CP",
    ];
    match names.get(vector as usize) {
        Some(name) => write!(f, "#{name}({error:#x})")?,
        None if vector == vector::END => write!(f, "END")?,
        None => write!(f, "vector {vector:#x}")?,
    }
    match at {
        Some(at) => write!(f, " at +{}", at as i64),
        None => Ok(()),
    }
}

/// All of the snippet was executed.
pub const END: Event = Event { vector: vector::END, error: 0, at: None };

/// A fault of the first instruction.
pub const fn fault(vector: u64, error: u64) -> Event {
    Event { vector, error, at: Some(0) }
}

/// An event wherever it came.
pub const fn event(vector: u64, error: u64) -> Event {
    Event { vector, error, at: None }
}

/// An event that saved the address so many bytes from the snippet's beginning.
pub const fn event_at(vector: u64, error: u64, at: u64) -> Event {
    Event { vector, error, at: Some(at) }
}

impl State {
    /// A snippet in ring 0, with interrupts off.
    pub fn kernel(code: &[u8]) -> Self {
        let mut state = Self {
            gprs: [0; 16],
            rip: code.as_ptr() as u64,
            rflags: flag::ONE,
            cs: selector::CODE.into(),
            ss: selector::DATA.into(),
            ds: selector::DATA.into(),
            es: selector::DATA.into(),
            vector: 0,
            error: 0,
            cr2: 0,
            frame: 0,
            dr6: 0,
            cr0: 0,
            start: code.as_ptr() as u64,
        };
        state.gprs[reg::SP] = stack();
        state
    }

    /// A snippet in ring 3.
    pub fn user(code: &[u8]) -> Self {
        let data = selector::USER_DATA.into();
        Self { cs: selector::USER_CODE.into(), ss: data, ds: data, es: data, ..Self::kernel(code) }
    }

    /// The same with a register.
    pub fn with(mut self, register: usize, value: u64) -> Self {
        self.gprs[register] = value;
        self
    }

    /// The same with these flags too.
    pub fn flags(mut self, flags: u64) -> Self {
        self.rflags |= flags;
        self
    }

    /// The same in a code segment.
    pub fn cs(mut self, selector: u16) -> Self {
        self.cs = selector.into();
        self
    }

    /// Runs it until an event.
    pub fn run(self) -> Self {
        unsafe {
            LONG_STATE = self;
            long_run();
            (&raw const LONG_STATE).read_volatile()
        }
    }

    /// What ended it; with the place, or without it where `like` has none.
    pub fn event_like(&self, like: Event) -> Event {
        let at = like.at.map(|_| self.rip.wrapping_sub(self.start));
        Event { vector: self.vector, error: self.error, at }
    }

    /// A check of what ended it.
    pub fn check(&self, name: impl fmt::Display, expected: Event) {
        crate::report::equal(name, self.event_like(expected), expected);
    }
}
