//! What the debug registers ask to be watched. SDM vol. 3, *Debug Registers*.
//!
//! Breakpoints cost nothing where there are none: a page with a data breakpoint has no entry in the translation cache
//! for loads and stores, one with an instruction breakpoint has no kept blocks. What goes the slow way is compared here.

use x86::Cr4;

use crate::cpu::Cpu;
use crate::insn::Stop;
use crate::mmu::{Access, NO_PAGE};

/// When a breakpoint hits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// An instruction begins there.
    Code,
    /// A store.
    Write,
    /// Port I/O, with CR4.DE.
    Port,
    /// A load or a store.
    Access,
}

/// One of DR0 to DR3, enabled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Breakpoint {
    kind: Kind,
    /// Linear address or port.
    start: u64,
    /// Bytes: 1, 2, 4 or 8; the start is a multiple of it.
    len: u64,
}

impl Breakpoint {
    /// Breakpoint `number`, where DR7 enables it.
    fn new(debug: &[u64; 6], number: usize, ports: bool) -> Option<Self> {
        let dr7 = debug[5];
        if dr7 >> (2 * number) & 3 == 0 {
            return None;
        }
        let kind = match dr7 >> (16 + 4 * number) & 3 {
            0 => Kind::Code,
            1 => Kind::Write,
            2 if ports => Kind::Port,
            2 => return None,
            _ => Kind::Access,
        };
        let len = match dr7 >> (18 + 4 * number) & 3 {
            _ if kind == Kind::Code => 1,
            0 => 1,
            1 => 2,
            2 => 8,
            _ => 4,
        };
        Some(Self { kind, start: debug[number] & !(len - 1), len })
    }

    fn overlaps(&self, start: u64, len: u64) -> bool {
        start.wrapping_sub(self.start) < self.len || self.start.wrapping_sub(start) < len
    }

    fn in_page(&self, linear: u64) -> bool {
        (self.start ^ linear) >> 12 == 0
    }
}

/// The enabled breakpoints.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Breakpoints {
    all: [Option<Breakpoint>; 4],
    code: bool,
    data: bool,
    ports: bool,
}

impl Breakpoints {
    /// From the debug registers; `ports` is CR4.DE.
    fn new(debug: &[u64; 6], ports: bool) -> Self {
        let all = std::array::from_fn(|number| Breakpoint::new(debug, number, ports));
        let any = |wanted: &[Kind]| all.iter().flatten().any(|b| wanted.contains(&b.kind));
        Self {
            all,
            code: any(&[Kind::Code]),
            data: any(&[Kind::Write, Kind::Access]),
            ports: any(&[Kind::Port]),
        }
    }

    /// Whether there is any for instructions.
    pub fn has_code(&self) -> bool {
        self.code
    }

    /// Whether one for instructions lies in the page of `linear`.
    pub fn in_code_page(&self, linear: u64) -> bool {
        self.code && self.all.iter().flatten().any(|b| b.kind == Kind::Code && b.in_page(linear))
    }

    /// Whether one for data lies in the page of `linear`.
    pub fn in_data_page(&self, linear: u64) -> bool {
        let data = |b: &Breakpoint| matches!(b.kind, Kind::Write | Kind::Access);
        self.data && self.all.iter().flatten().any(|b| data(b) && b.in_page(linear))
    }

    /// DR6.B0 to B3 of those of some kinds that `len` bytes from `start` on hit.
    fn hits(&self, kinds: &[Kind], start: u64, len: u64) -> u64 {
        let hit =
            |b: &Option<Breakpoint>| b.is_some_and(|b| kinds.contains(&b.kind) && b.overlaps(start, len));
        (0..4).filter(|&n| hit(&self.all[n])).fold(0, |bits, n| bits | 1 << n)
    }
}

impl Cpu {
    /// Follows a change of the debug registers or CR4.DE.
    pub fn update_breakpoints(&mut self) {
        let new = Breakpoints::new(&self.debug, self.cr4.contains(Cr4::DE));
        let old = std::mem::replace(&mut self.breakpoints, new);
        if old != new && (old.code || old.data || new.code || new.data) {
            self.mmu.tlb.flush_all();
        }
    }

    /// Notes a hit for after the instruction. Only an instruction that runs alone may hit.
    fn note_hits(&mut self, hits: u64) -> Result<(), Stop> {
        if hits == 0 {
            return Ok(());
        }
        if self.mmu.executing != [NO_PAGE; 2] {
            return Err(Stop::OwnPage);
        }
        self.debug_traps |= hits;
        Ok(())
    }

    /// Compares an access to memory with the breakpoints.
    ///
    /// # Errors
    /// [`Stop::OwnPage`] where the instruction must run alone, so that the trap can follow it.
    #[inline]
    pub(crate) fn watch_data(&mut self, linear: u64, size: u64, access: Access) -> Result<(), Stop> {
        if !self.breakpoints.data {
            return Ok(());
        }
        let hits = match access {
            Access::Read => self.breakpoints.hits(&[Kind::Access], linear, size),
            Access::Write => self.breakpoints.hits(&[Kind::Write, Kind::Access], linear, size),
            Access::Fetch => 0,
        };
        self.note_hits(hits)
    }

    /// Compares an access to a port with the breakpoints.
    ///
    /// # Errors
    /// As [`Cpu::watch_data`].
    #[inline]
    pub(crate) fn watch_port(&mut self, port: u16, size: u32) -> Result<(), Stop> {
        if !self.breakpoints.ports {
            return Ok(());
        }
        let hits = self.breakpoints.hits(&[Kind::Port], u64::from(port), u64::from(size));
        self.note_hits(hits)
    }

    /// DR6.B0 to B3 of the breakpoints on the instruction at a linear address.
    pub(crate) fn code_breakpoints(&self, linear: u64) -> u64 {
        if self.breakpoints.code { self.breakpoints.hits(&[Kind::Code], linear, 1) } else { 0 }
    }
}

#[cfg(test)]
mod tests;
