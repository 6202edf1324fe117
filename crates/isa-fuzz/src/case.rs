//! A case and what came of it: plain data, shared with the sandboxed child.

use engine::XSAVE_AREA_SIZE;

use crate::layout::{ARENA_LEN, Mode};

/// Bytes of the data that a case brings.
pub const WINDOW: usize = 256;
/// Changed lines of data that an outcome can tell, of 64 bytes each.
pub const LINES: usize = 12;

/// Bytes of code that a case can bring.
pub const CODE_LEN: usize = 1024;

/// What makes the oracle come back after the instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Trap {
    /// RFLAGS.TF, after the first instruction.
    Step,
    /// The jump behind the code.
    Exit,
}

/// An x87 and vector state as XSAVE writes it in the standard format.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(C, align(64))]
pub struct Area(pub [u8; XSAVE_AREA_SIZE]);

/// One instruction and the state that it begins in.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Case {
    /// The code.
    pub bytes: [u8; CODE_LEN],
    /// Bytes of it that count; of a single instruction 15 at most, 16 of too long a one.
    pub len: u16,
    /// The size of code.
    pub mode: Mode,
    /// How the oracle comes back.
    pub trap: Trap,
    /// Whether the vector state counts.
    pub uses_vector: bool,
    /// ES, CS (ignored), SS, DS, FS, GS.
    pub selectors: [u16; 6],
    /// RAX to R15.
    pub gprs: [u64; 16],
    /// Arithmetic flags, DF and AC.
    pub rflags: u64,
    /// In 64-bit mode: the bases of FS and GS.
    pub bases: [u64; 2],
    /// Offset into the data where [`Case::window`] lies.
    pub window_at: u32,
    /// Data.
    pub window: [u8; WINDOW],
    /// x87 and vector registers.
    pub area: Area,
}

/// What an instruction did.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Outcome {
    /// The exception's vector; [`COMPLETED`] where there was none.
    pub vector: u8,
    /// How many lines of data changed; more than [`LINES`] are only counted.
    pub lines_changed: u8,
    /// ES, CS, SS, DS, FS, GS.
    pub selectors: [u16; 6],
    /// A digest of all lines of data that changed.
    pub digest: u64,
    /// The exception's error code.
    pub error: u64,
    /// CR2, with a page fault.
    pub cr2: u64,
    /// RIP.
    pub rip: u64,
    /// RFLAGS.
    pub rflags: u64,
    /// RAX to R15.
    pub gprs: [u64; 16],
    /// The bases of FS and GS.
    pub bases: [u64; 2],
    /// Number and contents of the lines of data that changed.
    pub lines: [(u16, [u8; 64]); LINES],
    /// x87 and vector registers.
    pub area: Area,
}

/// No exception.
pub const COMPLETED: u8 = 0xff;
/// It did not come back in time.
pub const TIMED_OUT: u8 = 0xfe;

impl Default for Case {
    fn default() -> Self {
        Self {
            bytes: [0; CODE_LEN],
            len: 0,
            mode: Mode::Bits64,
            trap: Trap::Step,
            uses_vector: false,
            selectors: [0; 6],
            gprs: [0; 16],
            rflags: 0,
            bases: [0; 2],
            window_at: 0,
            window: [0; WINDOW],
            area: Area(*engine::VectorState::default().0),
        }
    }
}

impl Default for Outcome {
    fn default() -> Self {
        Self {
            vector: COMPLETED,
            lines_changed: 0,
            selectors: [0; 6],
            digest: 0,
            error: 0,
            cr2: 0,
            rip: 0,
            rflags: 0,
            gprs: [0; 16],
            bases: [0; 2],
            lines: [(0, [0; 64]); LINES],
            area: Area([0; XSAVE_AREA_SIZE]),
        }
    }
}

impl Case {
    /// The code's bytes.
    pub fn code(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len).min(CODE_LEN)]
    }
}

impl Outcome {
    /// Records the lines of the data that changed, and makes the data pristine again.
    pub fn take_lines(&mut self, case: &Case, data: &mut [u8], pristine: &[u8]) {
        const CHUNK: usize = 512;
        (self.lines_changed, self.digest) = (0, 0);
        let chunks =
            data.as_chunks_mut::<CHUNK>().0.iter_mut().zip(pristine.as_chunks::<CHUNK>().0).enumerate();
        for (number, (now, base)) in chunks {
            if now == base {
                continue;
            }
            let lines = now.as_chunks_mut::<64>().0.iter_mut().zip(base.as_chunks::<64>().0).enumerate();
            for (line, (now, base)) in lines {
                if now != base {
                    self.take_line(case, number * (CHUNK / 64) + line, now, base);
                    *now = *base;
                }
            }
        }
    }

    /// Records a line that is not pristine, unless it is the case's own data as it was.
    fn take_line(&mut self, case: &Case, number: usize, now: &[u8; 64], base: &[u8; 64]) {
        let (first, window) = (number * 64, case.window_at as usize);
        let mut before = *base;
        let (from, to) = (first.max(window), (first + 64).min(window + WINDOW));
        if from < to {
            before[from - first..to - first].copy_from_slice(&case.window[from - window..to - window]);
        }
        if *now != before {
            if let Some(line) = self.lines.get_mut(usize::from(self.lines_changed)) {
                *line = (number as u16, *now);
            }
            self.lines_changed = self.lines_changed.saturating_add(1);
            for word in now.as_chunks::<8>().0 {
                let mixed = (self.digest ^ u64::from_le_bytes(*word)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
                self.digest = mixed ^ mixed >> 29;
            }
            self.digest = self.digest.wrapping_add(number as u64);
        }
    }

    /// The changed lines that it tells.
    pub fn changed(&self) -> &[(u16, [u8; 64])] {
        &self.lines[..usize::from(self.lines_changed).min(LINES)]
    }
}

/// The last offset into the data at which a window fits.
pub const LAST_WINDOW: u32 = (ARENA_LEN - WINDOW) as u32;
