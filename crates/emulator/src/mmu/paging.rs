//! What the control registers and CPUID say of how linear addresses are translated. SDM vol. 3, *Paging*; linear-address
//! masking: SDM vol. 1, *Linear-Address Masking*.

use x86::paging::{is_canonical, sign_extended};
use x86::{Cr0, Cr3, Cr4, Efer};

use super::keys::Keys;

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

/// What CPUID says of addresses and pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// MAXPHYADDR: bits of a physical address.
    pub physical_bits: u32,
    /// Whether there are pages of 1 GiB.
    pub huge_pages: bool,
}

/// What the control registers say of paging.
#[derive(Clone, Copy, Debug, Default)]
pub struct Paging {
    /// Which tables.
    pub format: Format,
    /// CR3.
    pub(crate) root: u64,
    /// CR4.SMAP.
    pub smap: bool,
    /// CR0.AM.
    pub alignment_mask: bool,
    /// The four topmost entries of PAE paging, as the last load of CR3 or change of paging found them.
    pub pointers: [u64; 4],
    /// What the protection keys allow.
    pub keys: Keys,
    pub(super) smep: bool,
    pub(super) write_protect: bool,
    pub(super) execute_disable: bool,
    pub(super) page_size_extension: bool,
    /// Whether there are pages of 1 GiB.
    pub(super) huge_pages: bool,
    /// CR4.PGE.
    pub(super) global_pages: bool,
    /// Address bits in an entry that must be zero.
    pub(super) reserved: u64,
    /// The same of a 4-MiB page's entry.
    pub(super) reserved_4m: u64,
    /// CR4.LAM_SUP.
    masks_supervisor: bool,
    /// Whether any pointers are masked.
    masks: bool,
}

impl Paging {
    /// From the control registers; `sizes` are what CPUID tells.
    pub fn new(cr0: Cr0, cr3: u64, cr4: Cr4, efer: Efer, sizes: Sizes) -> Self {
        let format = if !cr0.contains(Cr0::PG) {
            Format::None
        } else if efer.contains(Efer::LMA) {
            Format::Levels(if cr4.contains(Cr4::LA57) { 5 } else { 4 })
        } else if cr4.contains(Cr4::PAE) {
            Format::Pae
        } else {
            Format::Bits32
        };
        let mut paging = Self {
            format,
            root: 0,
            smap: cr4.contains(Cr4::SMAP),
            alignment_mask: cr0.contains(Cr0::AM),
            pointers: [0; 4],
            keys: Keys::default(),
            smep: cr4.contains(Cr4::SMEP),
            write_protect: cr0.contains(Cr0::WP),
            execute_disable: efer.contains(Efer::NXE),
            page_size_extension: cr4.contains(Cr4::PSE),
            huge_pages: sizes.huge_pages,
            global_pages: cr4.contains(Cr4::PGE),
            reserved: x86::paging::ADDRESS_MASK & !((1 << sizes.physical_bits) - 1),
            reserved_4m: reserved_of_4m(sizes.physical_bits),
            masks_supervisor: cr4.contains(Cr4::LAM_SUP),
            masks: false,
        };
        paging.set_root(cr3);
        paging
    }

    /// Another CR3.
    pub(super) fn set_root(&mut self, cr3: u64) {
        self.root = cr3;
        let masks_user = Cr3::from_bits_truncate(cr3).intersects(Cr3::LAM_U48 | Cr3::LAM_U57);
        self.masks = matches!(self.format, Format::Levels(_)) && (self.masks_supervisor || masks_user);
    }

    /// Whether an address is canonical where that matters.
    pub fn is_canonical(&self, linear: u64) -> bool {
        match self.format {
            Format::Levels(levels) => is_canonical(linear, linear_bits(levels)),
            _ => true,
        }
    }

    /// The same of a pointer to data, which may be masked.
    pub fn is_data_canonical(&self, pointer: u64) -> bool {
        self.is_canonical(self.masked(pointer))
    }

    /// The linear address that a pointer to data means: without the bits that linear-address masking lets software use.
    /// It need not be canonical.
    #[inline(always)]
    pub fn masked(&self, pointer: u64) -> u64 {
        if self.masks { self.mask(pointer) } else { pointer }
    }

    #[cold]
    fn mask(&self, pointer: u64) -> u64 {
        const SIGN: u64 = 1 << 63;
        let Format::Levels(levels) = self.format else { return pointer };
        let cr3 = Cr3::from_bits_truncate(self.root);
        let bits = match pointer & SIGN != 0 {
            true if self.masks_supervisor => linear_bits(levels),
            false if cr3.contains(Cr3::LAM_U57) => 57,
            false if cr3.contains(Cr3::LAM_U48) => 48,
            _ => return pointer,
        };
        sign_extended(pointer, bits) & !SIGN | pointer & SIGN
    }
}

/// Bits of a linear address that 4-level and 5-level paging translate.
fn linear_bits(levels: u8) -> u32 {
    if levels == 5 { 57 } else { 48 }
}

/// The bits of a 4-MiB page's entry that must be zero: bits 13 to 20 are bits 32 to 39 of its address (PSE-36), of which
/// a processor may have fewer.
fn reserved_of_4m(physical_bits: u32) -> u64 {
    let first = physical_bits.clamp(32, 40) - 32 + 13;
    (1 << 22) - (1 << first)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn four_levels(cr3: Cr3, cr4: Cr4) -> Paging {
        let sizes = Sizes { physical_bits: 46, huge_pages: true };
        Paging::new(Cr0::PE | Cr0::PG, cr3.bits(), cr4 | Cr4::PAE, Efer::LMA, sizes)
    }

    #[test]
    fn a_4_mib_page_has_as_many_reserved_bits_as_its_address_lacks() {
        assert_eq!(reserved_of_4m(46), 1 << 21);
        assert_eq!(reserved_of_4m(40), 1 << 21);
        assert_eq!(reserved_of_4m(36), 0x3e_0000);
    }

    #[test]
    fn masking_takes_out_the_bits_between_the_sign_and_the_address() {
        let tagged = 0x7e00_7fff_1234_5678;
        let off = four_levels(Cr3::empty(), Cr4::empty());
        assert_eq!(off.masked(tagged), tagged);
        let wide = four_levels(Cr3::LAM_U57, Cr4::empty());
        assert_eq!(wide.masked(tagged), 0x7fff_1234_5678);
        assert_eq!(
            wide.masked(0x7fff_7fff_1234_5678),
            0x7fff_7fff_1234_5678,
            "bit 56 is part of the address"
        );
        let narrow = four_levels(Cr3::LAM_U48, Cr4::empty());
        assert_eq!(narrow.masked(0x7fff_7fff_1234_5678), 0x7fff_1234_5678);
        let both = four_levels(Cr3::LAM_U48 | Cr3::LAM_U57, Cr4::empty());
        assert_eq!(both.masked(0x7fff_7fff_1234_5678), 0x7fff_7fff_1234_5678, "the smaller mask wins");
        assert!(!narrow.is_canonical(narrow.masked(0x1234_8000_0000_0000)), "bit 47 is not the sign");
    }

    #[test]
    fn the_pointers_sign_says_whose_mask_it_has() {
        let tagged = 0x8123_8000_0000_1000;
        for cr3 in [Cr3::empty(), Cr3::LAM_U48, Cr3::LAM_U57] {
            assert_eq!(four_levels(cr3, Cr4::empty()).masked(tagged), tagged);
            assert_eq!(four_levels(cr3, Cr4::LAM_SUP).masked(tagged), 0xffff_8000_0000_1000);
        }
        let five = four_levels(Cr3::LAM_U48, Cr4::LAM_SUP | Cr4::LA57);
        assert_eq!(five.masked(0xff12_3800_0000_1000), 0xff12_3800_0000_1000, "57 bits");
        assert_eq!(five.masked(0xa312_3800_0000_1000), 0xff12_3800_0000_1000, "57 bits");
        let user = four_levels(Cr3::empty(), Cr4::LAM_SUP);
        assert_eq!(user.masked(0x0123_0000_0000_1000), 0x0123_0000_0000_1000);
    }
}
