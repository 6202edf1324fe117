//! What an access through given page-table entries does: a second reading of SDM vol. 3, *Paging*, that shares nothing
//! with the walker. Slow, and in the order of the manual's text.

/// Which tables there are, from the top.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// 32-bit paging; with CR4.PSE a directory's entry may map 4 MiB.
    ThirtyTwo {
        /// CR4.PSE.
        pse: bool,
    },
    /// PAE paging below its directory pointers.
    Pae,
    /// 4-level paging.
    Four,
    /// 5-level paging.
    Five,
}

/// The control bits.
#[derive(Clone, Copy, Debug)]
pub struct Controls {
    /// Which tables.
    pub mode: Mode,
    /// MAXPHYADDR.
    pub physical_bits: u32,
    /// CPUID's Page1GB.
    pub gigabyte_pages: bool,
    /// CR0.WP.
    pub wp: bool,
    /// CR4.SMEP.
    pub smep: bool,
    /// CR4.SMAP.
    pub smap: bool,
    /// IA32_EFER.NXE.
    pub nxe: bool,
    /// PKRU with CR4.PKE.
    pub pkru: Option<u32>,
    /// IA32_PKRS with CR4.PKS.
    pub pkrs: Option<u32>,
}

/// What is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A data read.
    Read,
    /// A data write.
    Write,
    /// An instruction fetch.
    Fetch,
}

/// Who does it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    /// A program at CPL 3.
    Program,
    /// An instruction at CPL 0 to 2 with RFLAGS.AC as told.
    Supervisor {
        /// RFLAGS.AC.
        ac: bool,
    },
    /// The processor itself, for a system table, at any CPL.
    Implicit,
}

const P: u64 = 1 << 0;
const RW: u64 = 1 << 1;
const US: u64 = 1 << 2;
const A: u64 = 1 << 5;
const D: u64 = 1 << 6;
const PS: u64 = 1 << 7;
const XD: u64 = 1 << 63;

/// All bits from one to another.
fn bits(from: u32, to: u32) -> u64 {
    (from..=to).fold(0, |bits, bit| bits | 1 << bit)
}

impl Controls {
    fn is_long(&self) -> bool {
        matches!(self.mode, Mode::Four | Mode::Five)
    }

    /// Whether an entry of a level, 1 being the lowest, maps a page.
    fn maps_a_page(&self, level: usize, entry: u64) -> bool {
        match (self.mode, level) {
            (_, 1) => true,
            (Mode::ThirtyTwo { pse }, 2) => pse && entry & PS != 0,
            (_, 2) => entry & PS != 0,
            (Mode::Four | Mode::Five, 3) => self.gigabyte_pages && entry & PS != 0,
            _ => false,
        }
    }

    /// The bits of a present entry that must be zero: *Formats of CR3 and Paging-Structure Entries*.
    fn reserved(&self, level: usize, entry: u64) -> u64 {
        let page = self.maps_a_page(level, entry);
        if let Mode::ThirtyTwo { .. } = self.mode {
            let m = self.physical_bits.min(40);
            return if page && level == 2 { bits(m - 19, 21) } else { 0 };
        }
        let mut reserved = if self.physical_bits < 52 { bits(self.physical_bits, 51) } else { 0 };
        if !self.nxe {
            reserved |= XD;
        }
        if self.mode == Mode::Pae {
            reserved |= bits(52, 62);
        }
        match (level, page) {
            (2, true) => reserved |= bits(13, 20),
            (3, true) => reserved |= bits(13, 29),
            (3, false) => reserved |= PS,
            (4 | 5, _) => reserved |= PS,
            _ => {}
        }
        reserved
    }

    /// *Determination of Access Rights*: whether the paging-structure entries allow it, keys aside.
    fn entries_allow(&self, who: Who, kind: Kind, path: &[u64]) -> bool {
        let every = |bit: u64| path.iter().all(|entry| entry & bit != 0);
        let user_address = every(US);
        let execute_disabled = !matches!(self.mode, Mode::ThirtyTwo { .. })
            && self.nxe
            && path.iter().any(|entry| entry & XD != 0);
        if who == Who::Program {
            return user_address
                && match kind {
                    Kind::Read => true,
                    Kind::Write => every(RW),
                    Kind::Fetch => !execute_disabled,
                };
        }
        let data_of_programs = !self.smap || who == Who::Supervisor { ac: true };
        match kind {
            Kind::Read if user_address => data_of_programs,
            Kind::Read => true,
            Kind::Write if user_address => data_of_programs && (!self.wp || every(RW)),
            Kind::Write => !self.wp || every(RW),
            Kind::Fetch if user_address && self.smep => false,
            Kind::Fetch => !execute_disabled,
        }
    }

    /// *Protection Keys*.
    fn key_allows(&self, who: Who, kind: Kind, path: &[u64]) -> bool {
        let user_address = path.iter().all(|entry| entry & US != 0);
        let register = match (self.is_long(), user_address) {
            (false, _) => None,
            (_, true) => self.pkru,
            (_, false) => self.pkrs,
        };
        let Some(register) = register else { return true };
        let key = path.last().unwrap() >> 59 & 15;
        let disables_access = register >> (2 * key) & 1 != 0;
        let disables_writes = register >> (2 * key + 1) & 1 != 0;
        match kind {
            Kind::Fetch => true,
            Kind::Read => !disables_access,
            Kind::Write if disables_access => false,
            Kind::Write => !(disables_writes && (who == Who::Program || self.wp)),
        }
    }

    /// The outcome of an access through `entries`, from the top: nothing, or a page fault's error code. Sets accessed
    /// and dirty flags. Entries behind the one that maps the page are not looked at.
    pub fn access(&self, who: Who, kind: Kind, entries: &mut [u64]) -> Result<(), u32> {
        let mut code = 0;
        if kind == Kind::Write {
            code |= 1 << 1;
        }
        if who == Who::Program {
            code |= 1 << 2;
        }
        let pae = !matches!(self.mode, Mode::ThirtyTwo { .. });
        if kind == Kind::Fetch && (self.smep || pae && self.nxe) {
            code |= 1 << 4;
        }
        let levels = match self.mode {
            Mode::ThirtyTwo { .. } | Mode::Pae => 2,
            Mode::Four => 4,
            Mode::Five => 5,
        };
        for n in 0..levels {
            let level = levels - n;
            if entries[n] & P == 0 {
                return Err(code);
            }
            if entries[n] & self.reserved(level, entries[n]) != 0 {
                return Err(code | 1 << 3 | 1 << 0);
            }
            if !self.maps_a_page(level, entries[n]) {
                entries[n] |= A;
                continue;
            }
            let path = &entries[..=n];
            let key_allows = self.key_allows(who, kind, path);
            if !key_allows {
                code |= 1 << 5;
            }
            if !key_allows || !self.entries_allow(who, kind, path) {
                return Err(code | 1 << 0);
            }
            entries[n] |= if kind == Kind::Write { A | D } else { A };
            return Ok(());
        }
        unreachable!("the lowest level maps a page")
    }
}
