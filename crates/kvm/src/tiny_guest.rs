//! A guest of a few instructions in 64-bit mode, for the probe and the tests.

use std::sync::Arc;

use engine::{Attention, Bus, EngineError, Vcpu, VcpuState, VmExit};
use guest_memory::{GuestMemory, Region};
use x86::descriptor::Attributes;
use x86::paging::Entry;
use x86::{Cr0, Cr4, Efer, Flags, Gpr, Segment, Selector};

use crate::vm::Irqchip;
use crate::{KvmVcpu, KvmVm, VcpuConfig};

/// Bytes of RAM, all of it mapped at its own address.
const MEMORY: u64 = 0x20_0000;
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const DIRECTORY: u64 = 0x3000;
/// Where the program starts.
pub(crate) const CODE: u64 = 0x4000;
/// The top of its stack.
const STACK: u64 = 0x8000;

/// A machine with one vCPU, without interrupt controllers: HLT ends its run.
pub(crate) struct TinyGuest {
    pub(crate) memory: GuestMemory,
    pub(crate) vcpu: KvmVcpu,
    #[cfg(test)]
    pub(crate) attention: Arc<Attention>,
}

impl TinyGuest {
    /// A guest that is about to execute `code`.
    pub(crate) fn new(code: &[u8]) -> Result<Self, EngineError> {
        let memory = GuestMemory::new(&[Region { start: 0, len: MEMORY, read_only: false }])
            .map_err(|e| EngineError::Unavailable(e.to_string()))?;
        let table = (Entry::P | Entry::RW).bits();
        memory.store::<u64>(PML4, PDPT | table);
        memory.store::<u64>(PDPT, DIRECTORY | table);
        // Two pages of 2 MiB: the RAM, and one where only the bus answers.
        memory.store::<u64>(DIRECTORY, table | Entry::PS.bits());
        memory.store::<u64>(DIRECTORY + 8, MEMORY | table | Entry::PS.bits());
        let vm = KvmVm::with_irqchip(&memory, Irqchip::None)?;
        let attention = Attention::new();
        let mut vcpu =
            vm.create_vcpu(VcpuConfig { id: 0, attention: attention.clone(), cpuid: &[], recorder: None })?;
        memory.write_bytes(CODE, code);
        vcpu.set_state(&long_mode())?;
        Ok(Self {
            memory,
            vcpu,
            #[cfg(test)]
            attention,
        })
    }

    /// Runs until something happens that is not the bus's.
    pub(crate) fn run(&mut self, bus: &Arc<dyn Bus>) -> Result<VmExit, EngineError> {
        self.vcpu.run(bus)
    }

    /// Starts over with another program.
    pub(crate) fn load(&mut self, code: &[u8]) -> Result<(), EngineError> {
        self.memory.write_bytes(CODE, code);
        self.vcpu.set_state(&long_mode())
    }
}

/// Kernel mode with paging, at the start of the program.
pub(crate) fn long_mode() -> VcpuState {
    let segment =
        |selector, attributes| Segment { selector: Selector(selector), base: 0, limit: u32::MAX, attributes };
    let present = Attributes::P | Attributes::S | Attributes::G | Attributes::WRITABLE | Attributes::ACCESSED;
    let code = segment(8, present | Attributes::CODE | Attributes::L);
    let data = segment(16, present | Attributes::DB);
    let mut state = VcpuState {
        rip: CODE,
        rflags: Flags::FIXED,
        segments: [data, code, data, data, data, data],
        cr0: Cr0::PE | Cr0::PG | Cr0::ET | Cr0::NE | Cr0::WP,
        cr3: PML4,
        cr4: Cr4::PAE,
        efer: Efer::LME | Efer::LMA | Efer::SCE,
        ..VcpuState::reset()
    };
    state.gprs[Gpr::Rsp as usize] = STACK;
    state
}
