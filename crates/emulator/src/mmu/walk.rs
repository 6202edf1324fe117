//! The walk of the guest's page tables. SDM vol. 3, *Paging*.

use guest_memory::GuestMemory;
use x86::exception::PageFaultCode;
use x86::paging::Entry;
use x86::{Cr0, Cr4, Efer, Exception};

use super::{Access, View};

/// Which tables are walked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// Linear addresses are physical ones.
    #[default]
    None,
    /// 32-bit paging: two levels of 4-byte entries.
    Bits32,
    /// PAE paging: 8-byte entries, the four topmost cached by MOV CR3.
    Pae,
    /// 4-level or 5-level paging.
    Levels(u8),
}

/// What the control registers say of paging.
#[derive(Clone, Copy, Debug, Default)]
pub struct Paging {
    /// Which tables.
    pub format: Format,
    /// CR3.
    pub root: u64,
    /// CR4.SMAP.
    pub smap: bool,
    /// CR0.AM.
    pub alignment_mask: bool,
    /// The four topmost entries of PAE paging, as the last load of CR3 or change of paging found them.
    pub pointers: [u64; 4],
    /// IA32_PKRS with CR4.PKS: two bits for each key of supervisor pages.
    pub supervisor_keys: Option<u32>,
    smep: bool,
    write_protect: bool,
    execute_disable: bool,
    page_size_extension: bool,
    /// Address bits in an entry that must be zero.
    reserved: u64,
}

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
    /// Whether the page is larger than 4 KiB.
    pub large: bool,
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

/// The two bits of a protection key's rights.
#[derive(Clone, Copy, Debug, Default)]
struct KeyRights {
    access_disabled: bool,
    write_disabled: bool,
}

/// An entry and where it stands.
struct Slot {
    entry: u64,
    address: u64,
    wide: bool,
}

impl Paging {
    /// From the control registers; `physical_bits` is MAXPHYADDR.
    pub fn new(cr0: Cr0, cr3: u64, cr4: Cr4, efer: Efer, physical_bits: u32) -> Self {
        let format = if !cr0.contains(Cr0::PG) {
            Format::None
        } else if efer.contains(Efer::LMA) {
            Format::Levels(if cr4.contains(Cr4::LA57) { 5 } else { 4 })
        } else if cr4.contains(Cr4::PAE) {
            Format::Pae
        } else {
            Format::Bits32
        };
        Self {
            format,
            root: cr3,
            smap: cr4.contains(Cr4::SMAP),
            alignment_mask: cr0.contains(Cr0::AM),
            pointers: [0; 4],
            supervisor_keys: None,
            smep: cr4.contains(Cr4::SMEP),
            write_protect: cr0.contains(Cr0::WP),
            execute_disable: efer.contains(Efer::NXE),
            page_size_extension: cr4.contains(Cr4::PSE),
            reserved: x86::paging::ADDRESS_MASK & !((1 << physical_bits) - 1),
        }
    }

    /// Whether an address is canonical where that matters.
    pub fn is_canonical(&self, linear: u64) -> bool {
        match self.format {
            Format::Levels(levels) => {
                let unused = if levels == 5 { 7 } else { 16 };
                ((linear << unused) as i64 >> unused) as u64 == linear
            }
            _ => true,
        }
    }

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
        let fault = |code: PageFaultCode| Exception::page_fault(linear, code | self.fault_code(access, view));
        let (levels, wide) = match self.format {
            Format::None => {
                let physical = linear & 0xffff_ffff;
                return Ok(Translation {
                    physical,
                    writable: true,
                    readable: true,
                    executable: true,
                    large: false,
                });
            }
            Format::Bits32 => (2, false),
            Format::Pae => (3, true),
            Format::Levels(levels) => (levels, true),
        };
        let mut rights = Rights { write: true, user: true, execute: true, key: KeyRights::default() };
        let mut table = self.root & self.table_mask(wide);
        for level in (1..=levels).rev() {
            let pdpte = self.format == Format::Pae && level == 3;
            let slot = if pdpte {
                Slot { entry: self.pointers[(linear >> 30 & 3) as usize], address: 0, wide }
            } else {
                Self::slot(memory, table, linear, level, wide)
            };
            let entry = Entry::from_bits_retain(slot.entry);
            if !entry.contains(Entry::P) {
                return Err(fault(PageFaultCode::empty()));
            }
            let leaf = level == 1 || !pdpte && self.is_large(entry, level, wide);
            // Those of PAE's topmost entries were checked when they were loaded.
            if !pdpte && self.has_reserved_bits(slot.entry, level, leaf, wide) {
                return Err(fault(PageFaultCode::PRESENT | PageFaultCode::RESERVED));
            }
            if !pdpte {
                rights.write &= entry.contains(Entry::RW);
                rights.user &= entry.contains(Entry::US);
                rights.execute &= !(wide && self.execute_disable && entry.contains(Entry::XD));
            }
            if leaf {
                rights.key = self.key_rights(slot.entry, rights.user);
                if !self.allows(rights, access, view) {
                    let mut code = PageFaultCode::PRESENT;
                    code.set(PageFaultCode::KEY, !self.key_allows(rights, access));
                    return Err(fault(code));
                }
                let dirty = if access == Access::Write { Entry::A | Entry::D } else { Entry::A };
                if !set_flags(memory, &slot, dirty) {
                    return self.walk(memory, linear, access, view);
                }
                let dirty = access == Access::Write || entry.contains(Entry::D);
                return Ok(self.translation(slot.entry, linear, level, wide, rights, view, dirty));
            }
            if !pdpte && !set_flags(memory, &slot, Entry::A) {
                return self.walk(memory, linear, access, view);
            }
            table = slot.entry & self.table_mask(wide);
        }
        Err(fault(PageFaultCode::empty()))
    }

    #[allow(clippy::too_many_arguments)] // The leaf, whole.
    fn translation(
        &self,
        entry: u64,
        linear: u64,
        level: u8,
        wide: bool,
        rights: Rights,
        view: View,
        dirty: bool,
    ) -> Translation {
        let shift = if wide { 12 + 9 * (u32::from(level) - 1) } else { 12 + 10 * (u32::from(level) - 1) };
        let within = (1u64 << shift) - 1;
        let base = if wide || level == 1 {
            entry & self.table_mask(wide)
        } else {
            // PSE-36: bits 13 to 20 of a 4-MiB entry are bits 32 to 39 of its address.
            entry & 0xffc0_0000 | (entry >> 13 & 0xff) << 32
        };
        Translation {
            physical: base & !within | linear & within,
            writable: dirty && self.allows(rights, Access::Write, view),
            readable: self.allows(rights, Access::Read, view),
            executable: self.allows(rights, Access::Fetch, view),
            large: level > 1,
        }
    }

    fn slot(memory: &GuestMemory, table: u64, linear: u64, level: u8, wide: bool) -> Slot {
        let index = if wide {
            (linear >> (12 + 9 * (u32::from(level) - 1)) & 0x1ff) * 8
        } else {
            (linear >> (12 + 10 * (u32::from(level) - 1)) & 0x3ff) * 4
        };
        let address = table + index;
        // Tables where no RAM is read as all ones, as every read does that nobody answers.
        let entry = if wide {
            memory.load_physical::<u64>(address).unwrap_or(u64::MAX)
        } else {
            u64::from(memory.load_physical::<u32>(address).unwrap_or(u32::MAX))
        };
        Slot { entry, address, wide }
    }

    fn is_large(&self, entry: Entry, level: u8, wide: bool) -> bool {
        entry.contains(Entry::PS)
            && match (wide, level) {
                (true, 2 | 3) => true,
                (false, 2) => self.page_size_extension,
                _ => false,
            }
    }

    fn has_reserved_bits(&self, entry: u64, level: u8, leaf: bool, wide: bool) -> bool {
        if !wide {
            return leaf && level == 2 && entry & 1 << 21 != 0;
        }
        let mut reserved = self.reserved;
        if !self.execute_disable {
            reserved |= Entry::XD.bits();
        }
        if self.format == Format::Pae {
            reserved |= 0x7ff0_0000_0000_0000;
        }
        if leaf && level > 1 {
            // Bit 12 is PAT; those up to the page's size must be zero.
            reserved |= (1u64 << (12 + 9 * (u32::from(level) - 1))) - 1 & !0x1fff;
        }
        if level >= 4 {
            reserved |= Entry::PS.bits();
        }
        entry & reserved != 0
    }

    fn table_mask(&self, wide: bool) -> u64 {
        if wide { x86::paging::ADDRESS_MASK } else { 0xffff_f000 }
    }

    /// The rights of a leaf's protection key: supervisor pages of 4-level and 5-level paging have some with CR4.PKS.
    fn key_rights(&self, entry: u64, user: bool) -> KeyRights {
        match (self.format, self.supervisor_keys) {
            (Format::Levels(_), Some(keys)) if !user => {
                let rights = keys >> (2 * (entry >> 59 & 15));
                KeyRights { access_disabled: rights & 1 != 0, write_disabled: rights & 2 != 0 }
            }
            _ => KeyRights::default(),
        }
    }

    fn key_allows(&self, rights: Rights, access: Access) -> bool {
        match access {
            Access::Read => !rights.key.access_disabled,
            Access::Write => {
                let write_disabled = rights.key.write_disabled && self.write_protect;
                !(rights.key.access_disabled || write_disabled)
            }
            Access::Fetch => true,
        }
    }

    fn allows(&self, rights: Rights, access: Access, view: View) -> bool {
        let user_view = view.is_user();
        if user_view && !rights.user || !self.key_allows(rights, access) {
            return false;
        }
        match access {
            Access::Read => user_view || !(rights.user && view == View::Supervisor && self.smap),
            Access::Write => {
                (rights.write || !user_view && !self.write_protect)
                    && (user_view || !(rights.user && view == View::Supervisor && self.smap))
            }
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

/// Sets flags in an entry. Gives whether the entry was still the same: if not, the walk starts over.
fn set_flags(memory: &GuestMemory, slot: &Slot, flags: Entry) -> bool {
    let wanted = slot.entry | flags.bits();
    if wanted == slot.entry {
        return true;
    }
    let Some(location) = memory.locate(slot.address).filter(|l| !l.read_only) else { return true };
    let same = if slot.wide {
        memory.compare_exchange(location.offset, slot.entry, wanted) == slot.entry
    } else {
        memory.compare_exchange(location.offset, slot.entry as u32, wanted as u32) == slot.entry as u32
    };
    memory.marks().written(location.offset);
    same
}
