//! Segment selectors and descriptors. SDM vol. 3, *Protected-Mode Memory Management*.

use bitflags::bitflags;

/// A segment selector.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Selector(pub u16);

impl Selector {
    /// Requested privilege level.
    pub const fn rpl(self) -> u8 {
        (self.0 & 3) as u8
    }
    /// Whether it refers to the local descriptor table.
    pub const fn is_local(self) -> bool {
        self.0 & 4 != 0
    }
    /// The descriptor's offset in its table, in bytes.
    pub const fn offset(self) -> u32 {
        (self.0 & 0xfff8) as u32
    }
    /// Whether it is a null selector (index 0 of the GDT, whatever the RPL).
    pub const fn is_null(self) -> bool {
        self.0 & 0xfffc == 0
    }
    /// The selector as an exception's error code, with EXT and IDT clear.
    pub const fn error_code(self) -> u32 {
        (self.0 & 0xfffc) as u32
    }
}

bitflags! {
    /// A segment's attributes, laid out as the access rights of a VMCS:
    /// bits 0–3 type, 4 S, 5–6 DPL, 7 P, 12 AVL, 13 L, 14 D/B, 15 G, 16 unusable.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Attributes: u32 {
        /// Accessed (code and data).
        const ACCESSED = 1 << 0;
        /// Writable data, or readable code.
        const WRITABLE = 1 << 1;
        /// Expand-down data, or conforming code.
        const EXPAND_DOWN = 1 << 2;
        /// Code.
        const CODE = 1 << 3;
        /// Code or data rather than a system segment.
        const S = 1 << 4;
        /// Privilege level.
        const DPL = 3 << 5;
        /// Present.
        const P = 1 << 7;
        /// Available to software.
        const AVL = 1 << 12;
        /// 64-bit code.
        const L = 1 << 13;
        /// 32-bit default size.
        const DB = 1 << 14;
        /// The limit counts pages.
        const G = 1 << 15;
        /// The register holds no usable segment (a null selector).
        const UNUSABLE = 1 << 16;
    }
}

/// The visible and hidden parts of a segment register.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    /// The visible part.
    pub selector: Selector,
    /// Base linear address.
    pub base: u64,
    /// Last valid offset, in bytes, scaled by the granularity.
    pub limit: u32,
    /// Type, DPL, present and the rest.
    pub attributes: Attributes,
}

impl Segment {
    /// Descriptor privilege level.
    pub const fn dpl(&self) -> u8 {
        (self.attributes.bits() >> 5 & 3) as u8
    }
    /// A segment as real mode has it: base 16 times the selector, 64 KiB, writable.
    pub const fn real_mode(selector: u16, code: bool) -> Self {
        Self {
            selector: Selector(selector),
            base: (selector as u64) << 4,
            limit: 0xffff,
            attributes: Attributes::from_bits_retain(if code { 0x9b } else { 0x93 }),
        }
    }
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TableRegister {
    /// Base linear address.
    pub base: u64,
    /// Last valid offset, in bytes.
    pub limit: u16,
}

/// The type field of a system descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum SystemType {
    Tss16Available = 1,
    Ldt = 2,
    Tss16Busy = 3,
    CallGate16 = 4,
    TaskGate = 5,
    InterruptGate16 = 6,
    TrapGate16 = 7,
    TssAvailable = 9,
    TssBusy = 11,
    CallGate = 12,
    InterruptGate = 14,
    TrapGate = 15,
}

impl SystemType {
    /// The type of a system descriptor's four bits; `None` for reserved ones.
    pub const fn from_bits(bits: u8) -> Option<Self> {
        Some(match bits {
            1 => Self::Tss16Available,
            2 => Self::Ldt,
            3 => Self::Tss16Busy,
            4 => Self::CallGate16,
            5 => Self::TaskGate,
            6 => Self::InterruptGate16,
            7 => Self::TrapGate16,
            9 => Self::TssAvailable,
            11 => Self::TssBusy,
            12 => Self::CallGate,
            14 => Self::InterruptGate,
            15 => Self::TrapGate,
            _ => return None,
        })
    }
}

/// An 8-byte descriptor as it stands in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Descriptor(pub u64);

impl Descriptor {
    /// The base's low 32 bits.
    pub const fn base(self) -> u32 {
        (self.0 >> 16 & 0xff_ffff) as u32 | (self.0 >> 32 & 0xff00_0000) as u32
    }
    /// The limit, in bytes, scaled by the granularity.
    pub const fn limit(self) -> u32 {
        let raw = (self.0 & 0xffff) as u32 | (self.0 >> 32 & 0xf_0000) as u32;
        if self.attributes().contains(Attributes::G) { raw << 12 | 0xfff } else { raw }
    }
    /// The attributes.
    pub const fn attributes(self) -> Attributes {
        Attributes::from_bits_retain((self.0 >> 40) as u32 & 0xf0ff)
    }
    /// Descriptor privilege level.
    pub const fn dpl(self) -> u8 {
        (self.0 >> 45 & 3) as u8
    }
    /// Whether it is code or data.
    pub const fn is_code_or_data(self) -> bool {
        self.0 >> 44 & 1 != 0
    }
    /// The type of a system descriptor.
    pub const fn system_type(self) -> Option<SystemType> {
        SystemType::from_bits((self.0 >> 40 & 15) as u8)
    }
    /// The code segment that a gate leads to.
    pub const fn gate_selector(self) -> Selector {
        Selector((self.0 >> 16) as u16)
    }
    /// The low 32 bits of the offset that a 32-bit or 64-bit gate leads to; 16-bit gates have 16 of them.
    pub const fn gate_offset(self) -> u32 {
        (self.0 & 0xffff) as u32 | (self.0 >> 32 & 0xffff_0000) as u32
    }
    /// A 64-bit gate's entry of the interrupt stack table, 1 to 7; zero for none.
    pub const fn gate_stack(self) -> u8 {
        (self.0 >> 32 & 7) as u8
    }
    /// How many parameters a call gate copies.
    pub const fn gate_parameters(self) -> u8 {
        (self.0 >> 32 & 31) as u8
    }
    /// The contents of a segment register loaded from this descriptor.
    pub const fn segment(self, selector: Selector) -> Segment {
        Segment { selector, base: self.base() as u64, limit: self.limit(), attributes: self.attributes() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flat_code_descriptor_has_base_0_and_4_gib() {
        let code = Descriptor(0x00cf_9b00_0000_ffff);
        assert_eq!((code.base(), code.limit(), code.dpl()), (0, u32::MAX, 0));
        assert!(
            code.attributes().contains(Attributes::CODE | Attributes::P | Attributes::DB | Attributes::G)
        );
    }
}
