//! The walk of the guest's page tables. SDM vol. 3, *Paging*.

use guest_memory::GuestMemory;
use x86::Exception;
use x86::exception::PageFaultCode;
use x86::paging::Entry;

use super::keys::KeyRights;
use super::paging::{Format, Paging};
use super::{Access, View};

/// Where a page lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation {
    /// Guest-physical address of the byte asked for.
    pub physical: u64,
    /// Whether stores are allowed and the dirty flag is set already.
    pub writable: bool,
    /// Whether loads are allowed.
    pub readable: bool,
    /// Whether fetches are allowed.
    pub executable: bool,
    /// Bits of an address within the page: 12, 21, 22 or 30.
    pub size_bits: u8,
    /// The page's protection key, where a register says what it allows; else 0.
    pub key: u8,
    /// Whether it is the same in every address space.
    pub global: bool,
}

/// The rights gathered on the way down.
#[derive(Clone, Copy)]
struct Rights {
    write: bool,
    user: bool,
    execute: bool,
    /// What the page's protection key forbids.
    key: KeyRights,
}

/// An entry and where it stands.
#[derive(Clone, Copy)]
struct Slot {
    entry: u64,
    address: u64,
    level: u8,
    wide: bool,
}

impl Slot {
    /// The entry of a table for a linear address. Tables where no RAM is read as all ones, as every read does that
    /// nobody answers.
    fn load(memory: &GuestMemory, table: u64, linear: u64, level: u8, wide: bool) -> Self {
        let shift = size_bits(level, wide);
        let (address, entry) = if wide {
            let address = table + (linear >> shift & 0x1ff) * 8;
            (address, memory.load_physical::<u64>(address).unwrap_or(u64::MAX))
        } else {
            let address = table + (linear >> shift & 0x3ff) * 4;
            (address, memory.load_physical::<u32>(address).map_or(u64::from(u32::MAX), u64::from))
        };
        Self { entry, address, level, wide }
    }

    fn has(&self, flag: Entry) -> bool {
        self.entry & flag.bits() != 0
    }

    /// The table that it leads to.
    fn table(&self) -> u64 {
        self.entry & table_mask(self.wide)
    }
}

/// Bits of an address within what an entry of a level maps.
fn size_bits(level: u8, wide: bool) -> u8 {
    if wide { 3 + 9 * level } else { 2 + 10 * level }
}

fn table_mask(wide: bool) -> u64 {
    if wide { x86::paging::ADDRESS_MASK } else { 0xffff_f000 }
}

/// Why a walk gives no page.
enum Ended {
    /// A page fault, with what the tables add to its error code.
    Fault(PageFaultCode),
    /// Another vCPU changed an entry between the look at it and the setting of its flags: walk again.
    Changed,
}

impl Paging {
    /// Walks the tables for one access; sets accessed and dirty flags.
    ///
    /// # Errors
    /// The page fault.
    pub fn walk(
        &self,
        memory: &GuestMemory,
        linear: u64,
        access: Access,
        view: View,
    ) -> Result<Translation, Exception> {
        let (levels, wide) = match self.format {
            Format::None => return Ok(untranslated(linear)),
            Format::Bits32 => (2, false),
            Format::Pae => (2, true),
            Format::Levels(levels) => (levels, true),
        };
        let fault = |code| Err(Exception::page_fault(linear, code | self.fault_code(access, view)));
        loop {
            let table = match self.format {
                Format::Pae => {
                    // These entries were checked when they were loaded; they have no rights and no flags.
                    let pointer = self.pointers[(linear >> 30 & 3) as usize];
                    if pointer & Entry::P.bits() == 0 {
                        return fault(PageFaultCode::empty());
                    }
                    pointer & table_mask(true)
                }
                _ => self.root & table_mask(wide),
            };
            let found = self.descend(memory, linear, table, levels, wide);
            match found.and_then(|(slot, rights)| self.finish(memory, slot, rights, access, view)) {
                Ok(translation) => {
                    let within = (1u64 << translation.size_bits) - 1;
                    let physical = translation.physical | linear & within;
                    return Ok(Translation { physical, ..translation });
                }
                Err(Ended::Fault(code)) => return fault(code),
                Err(Ended::Changed) => {}
            }
        }
    }

    /// Goes down to the entry that maps the page; gives it with the rights.
    #[inline(always)]
    fn descend(
        &self,
        memory: &GuestMemory,
        linear: u64,
        mut table: u64,
        levels: u8,
        wide: bool,
    ) -> Result<(Slot, Rights), Ended> {
        let mut rights = Rights { write: true, user: true, execute: true, key: KeyRights::default() };
        let mut level = levels;
        loop {
            let slot = Slot::load(memory, table, linear, level, wide);
            if !slot.has(Entry::P) {
                return Err(Ended::Fault(PageFaultCode::empty()));
            }
            let leaf = level == 1 || self.is_large(&slot);
            if self.has_reserved_bits(&slot, leaf) {
                return Err(Ended::Fault(PageFaultCode::PRESENT | PageFaultCode::RESERVED));
            }
            rights.write &= slot.has(Entry::RW);
            rights.user &= slot.has(Entry::US);
            rights.execute &= !(self.execute_disable && slot.has(Entry::XD));
            if leaf {
                return Ok((slot, rights));
            }
            set_flags(memory, &slot, Entry::A)?;
            table = slot.table();
            level -= 1;
        }
    }

    /// Checks the access, and sets the last entry's flags. Gives the page's first byte.
    #[inline(always)]
    fn finish(
        &self,
        memory: &GuestMemory,
        slot: Slot,
        mut rights: Rights,
        access: Access,
        view: View,
    ) -> Result<Translation, Ended> {
        let key = self.key_of(&slot, &mut rights);
        if !self.allows(rights, access, view) {
            let mut code = PageFaultCode::PRESENT;
            code.set(PageFaultCode::KEY, !self.key_allows(rights, access, view));
            return Err(Ended::Fault(code));
        }
        let write = access == Access::Write;
        set_flags(memory, &slot, if write { Entry::A | Entry::D } else { Entry::A })?;
        let size_bits = size_bits(slot.level, slot.wide);
        Ok(Translation {
            physical: page_address(&slot) & !((1u64 << size_bits) - 1),
            writable: (write || slot.has(Entry::D)) && self.allows(rights, Access::Write, view),
            readable: self.allows(rights, Access::Read, view),
            executable: self.allows(rights, Access::Fetch, view),
            size_bits,
            key,
            global: self.global_pages && slot.has(Entry::G),
        })
    }

    fn is_large(&self, slot: &Slot) -> bool {
        slot.has(Entry::PS)
            && match (slot.wide, slot.level) {
                (true, 2) => true,
                (true, 3) => self.huge_pages,
                (false, 2) => self.page_size_extension,
                _ => false,
            }
    }

    fn has_reserved_bits(&self, slot: &Slot, leaf: bool) -> bool {
        if !slot.wide {
            return leaf && slot.level == 2 && slot.entry & self.reserved_4m != 0;
        }
        let mut reserved = self.reserved;
        if !self.execute_disable {
            reserved |= Entry::XD.bits();
        }
        if self.format == Format::Pae {
            reserved |= 0x7ff0_0000_0000_0000;
        }
        if slot.level > 1 && leaf {
            // Bit 12 is PAT; those up to the page's size must be zero.
            reserved |= (1u64 << size_bits(slot.level, true)) - 1 & !0x1fff;
        } else if slot.level >= 3 {
            reserved |= Entry::PS.bits();
        }
        slot.entry & reserved != 0
    }

    /// The protection key of the page, where a register says what it allows, with the rights that it gives: pages of
    /// 4-level and 5-level paging have keys.
    fn key_of(&self, slot: &Slot, rights: &mut Rights) -> u8 {
        let register = if rights.user { self.keys.user } else { self.keys.supervisor };
        match (self.format, register) {
            (Format::Levels(_), Some(register)) => {
                let key = (slot.entry >> 59 & 15) as u8;
                rights.key = KeyRights::new(register, key);
                key
            }
            _ => 0,
        }
    }

    fn key_allows(&self, rights: Rights, access: Access, view: View) -> bool {
        rights.key.allow(access, view.is_user() || self.write_protect)
    }

    fn allows(&self, rights: Rights, access: Access, view: View) -> bool {
        let user_view = view.is_user();
        if user_view && !rights.user || !self.key_allows(rights, access, view) {
            return false;
        }
        let guarded = rights.user && view == View::Supervisor && self.smap;
        match access {
            Access::Read => !guarded,
            Access::Write => !guarded && (rights.write || !user_view && !self.write_protect),
            Access::Fetch => rights.execute && (user_view || !(rights.user && self.smep)),
        }
    }

    fn fault_code(&self, access: Access, view: View) -> PageFaultCode {
        let mut code = PageFaultCode::empty();
        code.set(PageFaultCode::USER, view.is_user());
        code.set(PageFaultCode::WRITE, access == Access::Write);
        let reports_fetch = self.smep || self.execute_disable && self.format != Format::Bits32;
        code.set(PageFaultCode::FETCH, access == Access::Fetch && reports_fetch);
        code
    }
}

/// Without paging, the lower 32 bits of a linear address are the physical one, and everything is allowed.
fn untranslated(linear: u64) -> Translation {
    let physical = linear & 0xffff_ffff;
    Translation {
        physical,
        writable: true,
        readable: true,
        executable: true,
        size_bits: 12,
        key: 0,
        global: true,
    }
}

/// Where the page of a last entry begins, with other bits below its size.
fn page_address(slot: &Slot) -> u64 {
    if slot.wide || slot.level == 1 {
        slot.table()
    } else {
        // PSE-36: bits 13 to 20 of a 4-MiB entry are bits 32 to 39 of its address.
        slot.entry & 0xffc0_0000 | (slot.entry >> 13 & 0xff) << 32
    }
}

/// Sets flags in an entry, unless it has changed.
#[inline(always)]
fn set_flags(memory: &GuestMemory, slot: &Slot, flags: Entry) -> Result<(), Ended> {
    let wanted = slot.entry | flags.bits();
    if wanted == slot.entry { Ok(()) } else { exchange(memory, slot, wanted) }
}

fn exchange(memory: &GuestMemory, slot: &Slot, wanted: u64) -> Result<(), Ended> {
    let Some(location) = memory.locate(slot.address).filter(|l| !l.read_only) else { return Ok(()) };
    let same = if slot.wide {
        memory.compare_exchange(location.offset, slot.entry, wanted) == slot.entry
    } else {
        memory.compare_exchange(location.offset, slot.entry as u32, wanted as u32) == slot.entry as u32
    };
    memory.marks().written(location.offset);
    if same { Ok(()) } else { Err(Ended::Changed) }
}
