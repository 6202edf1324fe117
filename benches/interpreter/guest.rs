//! A bare machine for one loop: 64-bit mode, memory mapped one to one in pages of 4 KiB, no devices.

use std::sync::Arc;

use anyhow::{Context, bail};
use emulator::{CpuModel, Shared, SoftVcpu, VcpuConfig};
use engine::{Attention, Bus, HostTime, Nothing, Vcpu, VcpuState, VmExit};
use guest_memory::{GuestMemory, Region};
use x86::descriptor::Descriptor;
use x86::{Cr0, Cr4, Efer, Flags, Gpr, Segment, Selector};

use crate::kernels::DATA_BYTES;

/// Bytes of RAM, all mapped.
const RAM: u64 = 128 << 20;
/// An HLT, where the loop returns to.
const END: u64 = 0xf000;
/// The loop.
const CODE: u64 = 0x1_0000;
/// Bytes that a loop may have.
const CODE_BYTES: usize = 0x1_0000;
/// The stack's top, where the return address is.
const STACK: u64 = 0x8_0000;
/// The page tables: PML4, PDPT, page directory, then the page tables.
const TABLES: u64 = 0x10_0000;
/// What the loop works on.
pub const DATA: u64 = 0x100_0000;

const PRESENT_WRITABLE: u64 = 3;
const CODE_64: Descriptor = Descriptor(0x00af_9b00_0000_ffff);
const DATA_FLAT: Descriptor = Descriptor(0x00cf_9300_0000_ffff);
/// x87, SSE, AVX.
const XCR0_AVX: u64 = 7;

/// The machine.
pub struct Guest {
    vcpu: SoftVcpu,
    bus: Arc<dyn Bus>,
    memory: GuestMemory,
    state: VcpuState,
}

impl Guest {
    /// A machine with nothing to run yet.
    ///
    /// # Errors
    /// Where the host gives no memory.
    pub fn new() -> anyhow::Result<Self> {
        const { assert!(DATA + DATA_BYTES <= RAM) };
        let memory = GuestMemory::new(&[Region { start: 0, len: RAM, read_only: false }])?;
        write_tables(&memory);
        memory.write_bytes(END, &[0xf4]);
        let vcpu = SoftVcpu::new(VcpuConfig {
            id: 0,
            memory: memory.clone(),
            interrupts: Arc::new(Nothing),
            time: Arc::new(HostTime::start()),
            attention: Attention::new(),
            cpu: Arc::new(CpuModel::parse("host", 1)?),
            recorder: None,
            shared: Arc::new(Shared::new(1)),
            jit: false,
        })?;
        Ok(Self { vcpu, bus: Arc::new(Nothing), memory, state: state() })
    }

    /// Puts a loop into memory.
    ///
    /// # Errors
    /// Where it is too long.
    pub fn load(&mut self, code: &[u8]) -> anyhow::Result<()> {
        if code.len() > CODE_BYTES {
            bail!("{} bytes of code are too many", code.len());
        }
        self.memory.write_bytes(CODE, code);
        Ok(())
    }

    /// Runs the loop for so many turns; gives the instructions that it took.
    ///
    /// # Errors
    /// Where it does not come to its end.
    pub fn run(&mut self, turns: u64) -> anyhow::Result<u64> {
        self.memory.write_bytes(STACK - 8, &END.to_le_bytes());
        self.state.gprs[Gpr::Rsi as usize] = turns;
        self.vcpu.set_state(&self.state)?;
        let before = self.vcpu.instructions().context("the software CPU counts")?;
        match self.vcpu.run(&self.bus)? {
            VmExit::Halt => {}
            other => bail!("the guest ended with {other:?}"),
        }
        Ok(self.vcpu.instructions().context("the software CPU counts")? - before)
    }
}

/// Ready to call the loop: its first argument is the data, its second will be the turns.
fn state() -> VcpuState {
    let data = DATA_FLAT.segment(Selector(0x18));
    let code: Segment = CODE_64.segment(Selector(0x10));
    let mut state = VcpuState::reset();
    state.segments = [data, code, data, data, data, data];
    state.cr0 = Cr0::PE | Cr0::MP | Cr0::ET | Cr0::NE | Cr0::WP | Cr0::PG;
    state.cr3 = TABLES;
    state.cr4 = Cr4::PAE | Cr4::OSFXSR | Cr4::OSXMMEXCPT;
    state.efer = Efer::LME | Efer::LMA;
    if std::is_x86_feature_detected!("avx") {
        state.cr4 |= Cr4::OSXSAVE;
        state.xcr0 = XCR0_AVX;
    }
    state.rflags = Flags::FIXED;
    state.gprs = [0; 16];
    state.gprs[Gpr::Rsp as usize] = STACK - 8;
    state.gprs[Gpr::Rdi as usize] = DATA;
    state.rip = CODE;
    state
}

/// Every page of the RAM to itself.
fn write_tables(memory: &GuestMemory) {
    let word = |at: u64, value: u64| memory.write_bytes(at, &value.to_le_bytes());
    word(TABLES, (TABLES + 0x1000) | PRESENT_WRITABLE);
    word(TABLES + 0x1000, (TABLES + 0x2000) | PRESENT_WRITABLE);
    let pages = TABLES + 0x3000;
    for table in 0..RAM >> 21 {
        word(TABLES + 0x2000 + 8 * table, (pages + 0x1000 * table) | PRESENT_WRITABLE);
    }
    for page in 0..RAM >> 12 {
        word(pages + 8 * page, page << 12 | PRESENT_WRITABLE);
    }
}
