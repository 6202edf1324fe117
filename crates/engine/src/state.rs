use x86::descriptor::Attributes;
use x86::{Cr0, Cr4, Efer, Flags, Segment, Selector, TableRegister};

/// Bytes of an XSAVE area in the standard format, up to and including PKRU.
pub const XSAVE_AREA_SIZE: usize = 2696;

/// x87, SSE, AVX and AVX-512 state as an XSAVE area in the standard format, each component where Intel's processors have it
/// ([`crate::HostXsave`] where the host does).
/// SDM vol. 1, *Managing State Using the XSAVE Feature Set*.
#[derive(Clone, PartialEq, Eq)]
pub struct VectorState(pub Box<[u8; XSAVE_AREA_SIZE]>);

impl Default for VectorState {
    /// The state after FNINIT with MXCSR at its default, all of it in XSTATE_BV's initial configuration.
    fn default() -> Self {
        let mut area = Box::new([0; XSAVE_AREA_SIZE]);
        area[0..2].copy_from_slice(&0x037fu16.to_le_bytes());
        area[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
        area[28..32].copy_from_slice(&0xffffu32.to_le_bytes());
        area[512] = 0x3;
        Self(area)
    }
}

impl std::fmt::Debug for VectorState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("VectorState(..)")
    }
}

/// A vCPU's architectural state, common to all engines: what one saves another resumes.
#[derive(Clone, Debug, PartialEq)]
pub struct VcpuState {
    /// RAX to R15 in the order of their encoding ([`x86::Gpr`]).
    pub gprs: [u64; 16],
    /// Instruction pointer.
    pub rip: u64,
    /// Flags.
    pub rflags: Flags,
    /// ES, CS, SS, DS, FS, GS in the order of their encoding ([`x86::SegmentRegister`]).
    pub segments: [Segment; 6],
    /// Task register.
    pub tr: Segment,
    /// Local descriptor table register.
    pub ldtr: Segment,
    /// Global descriptor table.
    pub gdtr: TableRegister,
    /// Interrupt descriptor table.
    pub idtr: TableRegister,
    /// CR0.
    pub cr0: Cr0,
    /// CR2: the last page fault's linear address.
    pub cr2: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: Cr4,
    /// IA32_EFER.
    pub efer: Efer,
    /// XCR0.
    pub xcr0: u64,
    /// DR0 to DR3, DR6, DR7.
    pub debug: [u64; 6],
    /// x87 and vector registers.
    pub vector: VectorState,
    /// Model-specific registers: index and value, without those that stand elsewhere here.
    pub msrs: Vec<(u32, u64)>,
    /// Whether the vCPU is an application processor that waits for its SIPI.
    pub waits_for_sipi: bool,
    /// Whether the vCPU is halted.
    pub halted: bool,
}

impl VcpuState {
    /// The state after power-up. SDM vol. 3, *Processor State After Reset*.
    pub fn reset() -> Self {
        let data = Segment::real_mode(0, false);
        let code = Segment { base: 0xffff_0000, ..Segment::real_mode(0xf000, true) };
        let system = |kind: u32| Segment {
            selector: Selector(0),
            base: 0,
            limit: 0xffff,
            attributes: Attributes::from_bits_retain(kind),
        };
        let mut gprs = [0; 16];
        gprs[2] = 0x600;
        Self {
            gprs,
            rip: 0xfff0,
            rflags: Flags::FIXED,
            segments: [data, code, data, data, data, data],
            tr: system(0x8b),
            ldtr: system(0x82),
            gdtr: TableRegister { base: 0, limit: 0xffff },
            idtr: TableRegister { base: 0, limit: 0xffff },
            cr0: Cr0::CD | Cr0::NW | Cr0::ET,
            cr2: 0,
            cr3: 0,
            cr4: Cr4::empty(),
            efer: Efer::empty(),
            xcr0: 1,
            debug: [0, 0, 0, 0, 0xffff_0ff0, 0x400],
            vector: VectorState::default(),
            msrs: Vec::new(),
            waits_for_sipi: false,
            halted: false,
        }
    }
}
