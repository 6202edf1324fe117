//! The guest's x87 and vector registers, as stubs load and store them, and their XSAVE components.
//! SDM vol. 1, *Managing State Using the XSAVE Feature Set*.

use engine::VectorState;
use x86::Xcr0;

/// Bytes of the part of an FXSAVE image that holds x87 state: the header and eight registers.
const X87_IMAGE: usize = 160;
/// Offset of MXCSR in an FXSAVE image.
const IMAGE_MXCSR: usize = 24;
/// Offset of XMM0 in an FXSAVE image.
const IMAGE_XMM: usize = 160;
/// Offset of XSTATE_BV in an XSAVE area.
const XSTATE_BV: usize = 512;
/// MXCSR after reset: all exceptions masked, round to nearest.
pub(super) const MXCSR_RESET: u32 = 0x1f80;
/// The bits of MXCSR that software may set, as FXSAVE reports them.
const MXCSR_MASK: u32 = 0xffff;
/// The exception flags in the x87 status word, and their masks in the control word.
const X87_EXCEPTIONS: u16 = 0x3f;
/// Exception summary and busy in the x87 status word.
const X87_SUMMARY: u16 = 0x8080;

/// Guest x87, SSE, AVX and AVX-512 state.
#[derive(Clone, Debug, PartialEq, Eq)]
#[repr(C, align(64))]
pub struct VectorRegisters {
    /// ZMM0 to ZMM31; XMM and YMM registers are their low bytes.
    pub zmm: [[u8; 64]; 32],
    /// K0 to K7.
    pub k: [u64; 8],
    /// An FXSAVE image of which only the x87 part counts (bytes 0 to 159 without MXCSR).
    pub(super) x87: [u8; 512],
    /// Never has reserved bits set: LDMXCSR in a stub would fault on the host.
    pub(super) mxcsr: u32,
    /// What stubs put back for Rust code.
    pub(super) host_mxcsr: u32,
    /// PKRU: XSAVE manages it with the registers, though no stub knows it. Change it through `Cpu::write_pkru`.
    pub(crate) pkru: u32,
}

/// A value for MXCSR with reserved bits set: #GP for the instruction that loads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("MXCSR {0:#x} has reserved bits set")]
pub struct ReservedMxcsr(pub u32);

/// A component of XSAVE-managed state that [`VectorRegisters`] holds; the discriminant is its bit in XCR0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Component {
    /// x87 and MMX.
    X87 = 0,
    /// XMM0 to XMM15. MXCSR goes with it, and with [`Component::Avx`]; see [`VectorRegisters::set_mxcsr`].
    Sse = 1,
    /// Upper halves of YMM0 to YMM15.
    Avx = 2,
    /// K0 to K7.
    Opmask = 5,
    /// Upper halves of ZMM0 to ZMM15.
    ZmmHi256 = 6,
    /// ZMM16 to ZMM31.
    Hi16Zmm = 7,
    /// The rights of user pages' protection keys.
    Pkru = 9,
}

impl Component {
    /// All of them, in the order of their bits.
    pub const ALL: [Self; 7] =
        [Self::X87, Self::Sse, Self::Avx, Self::Opmask, Self::ZmmHi256, Self::Hi16Zmm, Self::Pkru];

    /// Its bit in XCR0 and XSTATE_BV.
    pub const fn bit(self) -> Xcr0 {
        Xcr0::from_bits_retain(1 << self as u8)
    }

    /// Where it begins in an XSAVE area of the standard format, in bytes.
    pub const fn offset(self) -> usize {
        match self {
            Self::X87 => 0,
            Self::Sse => IMAGE_XMM,
            Self::Avx => 576,
            Self::Opmask => 1088,
            Self::ZmmHi256 => 1152,
            Self::Hi16Zmm => 1664,
            Self::Pkru => 2688,
        }
    }

    /// Its size in bytes. The size of [`Component::X87`] spans MXCSR, which is not part of it.
    pub const fn size(self) -> usize {
        match self {
            Self::X87 => X87_IMAGE,
            Self::Sse | Self::Avx => 256,
            Self::Opmask => 64,
            Self::ZmmHi256 => 512,
            Self::Hi16Zmm => 1024,
            Self::Pkru => 8,
        }
    }
}

impl VectorRegisters {
    /// Where the x87 image and MXCSR lie, in bytes, for translated code.
    pub(crate) const X87_OFFSET: usize = std::mem::offset_of!(Self, x87);
    /// The same of MXCSR.
    pub(crate) const MXCSR_OFFSET: usize = std::mem::offset_of!(Self, mxcsr);

    /// Every component in its initial configuration: the state after FNINIT with MXCSR at its default.
    pub fn reset() -> Self {
        let mut state = Self {
            zmm: [[0; 64]; 32],
            k: [0; 8],
            x87: [0; 512],
            mxcsr: MXCSR_RESET,
            host_mxcsr: MXCSR_RESET,
            pkru: 0,
        };
        state.init_component(Component::X87);
        state
    }

    /// From the engines' common form: components whose bit in XSTATE_BV is clear get their initial configuration.
    /// Reserved bits of MXCSR are dropped.
    pub fn from_state(state: &VectorState) -> Self {
        let area = &state.0[..];
        let mut this = Self::reset();
        let present = Xcr0::from_bits_retain(u64::from(read_u32(area, XSTATE_BV)));
        for component in Component::ALL {
            if present.contains(component.bit()) {
                this.load_component(component, &area[component.offset()..]);
            }
        }
        this.mxcsr = read_u32(area, IMAGE_MXCSR) & MXCSR_MASK;
        this
    }

    /// To the engines' common form.
    pub fn to_state(&self) -> VectorState {
        let mut state = VectorState::default();
        let area = &mut state.0[..];
        for component in Component::ALL {
            self.save_component(component, &mut area[component.offset()..]);
        }
        area[IMAGE_MXCSR..IMAGE_MXCSR + 8].copy_from_slice(&self.mxcsr_field());
        let present = self.in_use() | Component::X87.bit() | Component::Sse.bit();
        area[XSTATE_BV..XSTATE_BV + 8].copy_from_slice(&present.bits().to_le_bytes());
        state
    }

    /// The control and status register of SSE.
    pub fn mxcsr(&self) -> u32 {
        self.mxcsr
    }

    /// Loads MXCSR.
    ///
    /// # Errors
    /// The value has reserved bits set, which is #GP; nothing changes.
    pub fn set_mxcsr(&mut self, value: u32) -> Result<(), ReservedMxcsr> {
        if value & !MXCSR_MASK != 0 {
            return Err(ReservedMxcsr(value));
        }
        self.mxcsr = value;
        Ok(())
    }

    /// MXCSR and MXCSR_MASK as bytes 24 to 31 of an FXSAVE image hold them.
    pub fn mxcsr_field(&self) -> [u8; 8] {
        (u64::from(self.mxcsr) | u64::from(MXCSR_MASK) << 32).to_le_bytes()
    }

    /// The components that are not in their initial configuration (XINUSE). MXCSR does not count.
    pub fn in_use(&self) -> Xcr0 {
        let low = &self.zmm[..16];
        let mut used = Xcr0::empty();
        used.set(Component::X87.bit(), !self.x87_is_initial());
        used.set(Component::Sse.bit(), low.iter().any(|z| z[..16] != [0; 16]));
        used.set(Component::Avx.bit(), low.iter().any(|z| z[16..32] != [0; 16]));
        used.set(Component::Opmask.bit(), self.k != [0; 8]);
        used.set(Component::ZmmHi256.bit(), low.iter().any(|z| z[32..] != [0; 32]));
        used.set(Component::Hi16Zmm.bit(), self.zmm[16..].iter().any(|z| *z != [0; 64]));
        used.set(Component::Pkru.bit(), self.pkru != 0);
        used
    }

    /// Writes a component to the first [`Component::size`] bytes of `area`; bytes within that span that belong to
    /// another component (MXCSR) are left as they are. Nothing happens if `area` is shorter.
    pub fn save_component(&self, component: Component, area: &mut [u8]) {
        let Some(area) = area.get_mut(..component.size()) else { return };
        match component {
            Component::X87 => {
                area[..IMAGE_MXCSR].copy_from_slice(&self.x87[..IMAGE_MXCSR]);
                area[32..].copy_from_slice(&self.x87[32..X87_IMAGE]);
            }
            Component::Opmask => {
                for (bytes, mask) in area.chunks_exact_mut(8).zip(&self.k) {
                    bytes.copy_from_slice(&mask.to_le_bytes());
                }
            }
            Component::Pkru => area.copy_from_slice(&u64::from(self.pkru).to_le_bytes()),
            _ => {
                let (registers, part) = slices(component);
                for (bytes, zmm) in area.chunks_exact_mut(part.len()).zip(&self.zmm[registers]) {
                    bytes.copy_from_slice(&zmm[part.clone()]);
                }
            }
        }
    }

    /// Loads a component from the first [`Component::size`] bytes of `area`, without MXCSR. Nothing happens if
    /// `area` is shorter.
    pub fn load_component(&mut self, component: Component, area: &[u8]) {
        let Some(area) = area.get(..component.size()) else { return };
        match component {
            Component::X87 => {
                self.x87[..IMAGE_MXCSR].copy_from_slice(&area[..IMAGE_MXCSR]);
                self.x87[32..X87_IMAGE].copy_from_slice(&area[32..]);
                self.normalize_x87();
            }
            Component::Opmask => {
                for (bytes, mask) in area.as_chunks::<8>().0.iter().zip(&mut self.k) {
                    *mask = u64::from_le_bytes(*bytes);
                }
            }
            Component::Pkru => self.pkru = read_u32(area, 0),
            _ => {
                let (registers, part) = slices(component);
                for (bytes, zmm) in area.chunks_exact(part.len()).zip(&mut self.zmm[registers]) {
                    zmm[part.clone()].copy_from_slice(bytes);
                }
            }
        }
    }

    /// Puts a component into its initial configuration, without MXCSR.
    pub fn init_component(&mut self, component: Component) {
        match component {
            Component::X87 => {
                self.x87 = [0; 512];
                self.x87[..2].copy_from_slice(&0x037fu16.to_le_bytes());
            }
            Component::Opmask => self.k = [0; 8],
            Component::Pkru => self.pkru = 0,
            _ => {
                let (registers, part) = slices(component);
                self.zmm[registers].iter_mut().for_each(|zmm| zmm[part.clone()].fill(0));
            }
        }
    }

    /// The x87 control word (FCW).
    pub fn x87_control(&self) -> u16 {
        u16::from_le_bytes([self.x87[0], self.x87[1]])
    }

    /// The x87 status word (FSW).
    pub fn x87_status(&self) -> u16 {
        u16::from_le_bytes([self.x87[2], self.x87[3]])
    }

    /// Opcode, instruction pointer and data pointer of the last x87 instructions (FOP, FIP and FDP).
    pub fn x87_pointers(&self) -> (u16, u64, u64) {
        let pointer = |at: usize| self.x87[at..at + 8].first_chunk().map_or(0, |b| u64::from_le_bytes(*b));
        (u16::from_le_bytes([self.x87[6], self.x87[7]]), pointer(8), pointer(16))
    }

    /// Sets them. FCS and FDS are always zero, as leaf 07H of CPUID says.
    pub fn set_x87_pointers(&mut self, (opcode, instruction, data): (u16, u64, u64)) {
        self.x87[6..8].copy_from_slice(&(opcode & 0x7ff).to_le_bytes());
        self.x87[8..16].copy_from_slice(&instruction.to_le_bytes());
        self.x87[16..24].copy_from_slice(&data.to_le_bytes());
    }

    /// Whether an unmasked x87 exception waits: #MF at the next waiting x87 or MMX instruction.
    #[inline]
    pub fn x87_exception_pending(&self) -> bool {
        self.x87_status() & !self.x87_control() & X87_EXCEPTIONS != 0
    }

    /// VZEROUPPER, with all registers that 64-bit mode has.
    pub fn zero_upper(&mut self) {
        self.zmm[..16].iter_mut().for_each(|zmm| zmm[16..].fill(0));
    }

    /// VZEROALL, with all registers that 64-bit mode has.
    pub fn zero_all(&mut self) {
        self.zmm[..16].fill([0; 64]);
    }

    /// The processor derives exception summary and busy from flags and masks when it loads an image, and keeps bit 6
    /// of the control word set and the registers' padding zero.
    fn normalize_x87(&mut self) {
        let control = self.x87_control() & 0x1f3f | 0x40;
        self.x87[..2].copy_from_slice(&control.to_le_bytes());
        let summary = if self.x87_exception_pending() { X87_SUMMARY } else { 0 };
        let status = self.x87_status() & !X87_SUMMARY | summary;
        self.x87[2..4].copy_from_slice(&status.to_le_bytes());
        self.x87[5] = 0;
        self.x87[7] &= 7;
        for register in self.x87[32..X87_IMAGE].chunks_exact_mut(16) {
            register[10..].fill(0);
        }
    }

    fn x87_is_initial(&self) -> bool {
        self.x87_control() == 0x037f
            && self.x87[2..IMAGE_MXCSR].iter().all(|&byte| byte == 0)
            && self.x87[32..X87_IMAGE].iter().all(|&byte| byte == 0)
    }
}

/// Which registers, and which of their bytes, a component of vector registers covers.
fn slices(component: Component) -> (std::ops::Range<usize>, std::ops::Range<usize>) {
    match component {
        Component::Avx => (0..16, 16..32),
        Component::ZmmHi256 => (0..16, 32..64),
        Component::Hi16Zmm => (16..32, 0..64),
        _ => (0..16, 0..16),
    }
}

fn read_u32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reset_state_is_the_engines_default() {
        assert_eq!(VectorRegisters::reset().to_state(), VectorState::default());
        assert_eq!(VectorRegisters::reset().in_use(), Xcr0::empty());
    }

    #[test]
    fn state_survives_the_engines_form() {
        let mut registers = VectorRegisters::reset();
        for (i, zmm) in registers.zmm.iter_mut().enumerate() {
            zmm.fill(i as u8 + 1);
        }
        registers.k = std::array::from_fn(|i| 0x0101_0101_0101_0101 * i as u64);
        registers.x87[..2].copy_from_slice(&0x0f7fu16.to_le_bytes());
        registers.x87[32..42].fill(0x5a);
        registers.set_mxcsr(0x9fc0).unwrap();
        registers.pkru = 0x5555_5554;
        assert_eq!(VectorRegisters::from_state(&registers.to_state()), registers);
    }

    #[test]
    fn mxcsr_refuses_reserved_bits() {
        let mut registers = VectorRegisters::reset();
        assert_eq!(registers.set_mxcsr(0x1_0000), Err(ReservedMxcsr(0x1_0000)));
        assert_eq!(registers.mxcsr(), 0x1f80);
        let mut state = VectorState::default();
        state.0[24..28].fill(0xff);
        assert_eq!(VectorRegisters::from_state(&state).mxcsr(), 0xffff);
    }

    #[test]
    fn loaded_x87_status_summarizes_its_flags_and_masks() {
        let mut registers = VectorRegisters::reset();
        let mut image = [0u8; 160];
        image[0] = 0x7b; // zero-divide unmasked
        image[2] = 0x04; // zero-divide raised, summary clear
        registers.load_component(Component::X87, &image);
        assert!(registers.x87_exception_pending());
        assert_eq!(registers.x87_status(), 0x8084);
        image[..4].copy_from_slice(&[0x7f, 0x03, 0x84, 0x80]);
        registers.load_component(Component::X87, &image);
        assert_eq!(registers.x87_status(), 0x0004);
    }

    #[test]
    fn each_component_counts_as_in_use_alone() {
        for component in Component::ALL {
            let mut registers = VectorRegisters::reset();
            registers.load_component(component, &[0x55; 1024]);
            assert_eq!(registers.in_use(), component.bit());
            registers.init_component(component);
            assert_eq!(registers, VectorRegisters::reset());
        }
    }
}
