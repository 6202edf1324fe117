//! The software CPU as an engine: [`engine::Vcpu`].

use std::sync::Arc;

use engine::{
    Attention, Bus, Counter, EngineError, InterruptController, Kick, Nothing, TimeSource, Vcpu, VcpuState,
    VmExit,
};
use exits::Recorder;
use guest_memory::GuestMemory;
use x86::{Flags, SegmentRegister};

use crate::breakpoints::Breakpoints;
use crate::cpu::{Cpu, Native, Wires};
use crate::cpuid::CpuModel;
use crate::flags::LazyFlags;
use crate::interpreter::Interpreter;
use crate::mmu::Mmu;
use crate::mode::Mode;
use crate::msrs::Msrs;
use crate::native::{NativeUnit, VectorRegisters};
use crate::pmu::Pmu;
use crate::registers::Registers;
use crate::shared::{Peers, Shared};

/// What a software vCPU needs.
pub struct VcpuConfig {
    /// Its number, from 0; also its APIC id.
    pub id: u32,
    /// RAM.
    pub memory: GuestMemory,
    /// Its local APIC.
    pub interrupts: Arc<dyn InterruptController>,
    /// The machine's time.
    pub time: Arc<dyn TimeSource>,
    /// Its attention word.
    pub attention: Arc<Attention>,
    /// What CPUID says.
    pub cpu: Arc<CpuModel>,
    /// The ledger, where it is on.
    pub recorder: Option<Recorder>,
    /// What it shares with the machine's other vCPUs.
    pub shared: Arc<Shared>,
    /// Whether hot code is translated; else all of it is interpreted.
    pub jit: bool,
}

/// A virtual CPU in software.
pub struct SoftVcpu {
    interpreter: Interpreter,
    attention: Arc<Attention>,
}

impl SoftVcpu {
    /// A vCPU in its state after power-up.
    ///
    /// # Errors
    /// [`EngineError::Host`] where the host gives no memory for code.
    pub fn new(config: VcpuConfig) -> Result<Self, EngineError> {
        let unit =
            NativeUnit::new().map_err(|source| EngineError::Host { what: "mapping code memory", source })?;
        let wires = Wires {
            // Until `run` brings the machine's.
            bus: Arc::new(Nothing),
            interrupts: config.interrupts,
            time: config.time,
            recorder: config.recorder,
            model: config.cpu,
        };
        let cpu = Cpu::power_up(config.id, config.memory, wires, Native { unit, insns: Vec::new() });
        let peers = Peers::join(config.shared, config.id, config.attention.clone());
        let mut interpreter = Interpreter::new(cpu, config.attention.clone(), peers);
        if config.jit {
            interpreter
                .enable_jit()
                .map_err(|source| EngineError::Host { what: "mapping code memory", source })?;
        }
        Ok(Self { interpreter, attention: config.attention })
    }
}

impl Vcpu for SoftVcpu {
    fn run(&mut self, bus: &Arc<dyn Bus>) -> Result<VmExit, EngineError> {
        if !Arc::ptr_eq(bus, &self.interpreter.cpu.wires.bus) {
            self.interpreter.cpu.wires.bus = bus.clone();
        }
        Ok(self.interpreter.run())
    }

    fn state(&self) -> Result<VcpuState, EngineError> {
        Ok(self.interpreter.cpu.state())
    }

    fn set_state(&mut self, state: &VcpuState) -> Result<(), EngineError> {
        self.interpreter.cpu.set_state(state)?;
        self.interpreter.reset_code();
        Ok(())
    }

    fn kick(&self) -> Kick {
        Kick::new(self.attention.clone())
    }

    fn counters(&self) -> Vec<Counter> {
        self.interpreter.counters()
    }

    fn instructions(&self) -> Option<u64> {
        Some(self.interpreter.cpu.instructions)
    }
}

impl Cpu {
    /// A processor after power-up.
    pub fn power_up(id: u32, memory: GuestMemory, wires: Wires, native: Native) -> Self {
        let reset = VcpuState::reset();
        let mut cpu = Self {
            registers: Registers::new(&reset.gprs),
            flags: LazyFlags::default(),
            system_flags: Flags::FIXED,
            rip: reset.rip,
            block_rip: reset.rip,
            bases: [0; 8],
            mode: Mode::default(),
            mmu: Mmu::new(),
            memory,
            segments: reset.segments,
            tr: reset.tr,
            ldtr: reset.ldtr,
            gdtr: reset.gdtr,
            idtr: reset.idtr,
            cr0: reset.cr0,
            cr2: 0,
            cr3: 0,
            cr4: reset.cr4,
            xcr0: 1,
            efer: reset.efer,
            debug: reset.debug,
            msrs: Msrs::reset(),
            pmu: Pmu::reset(),
            vector: Box::new(VectorRegisters::reset()),
            native,
            fault: None,
            exit: None,
            shadow: false,
            debug_traps: 0,
            stack_shadow: false,
            breakpoints: Breakpoints::default(),
            nmi_blocked: false,
            halted: false,
            waits_for_sipi: false,
            instructions: 0,
            translated: 0,
            id,
            wires,
        };
        cpu.take_architectural(&reset);
        cpu
    }

    /// INIT: as a reset, but the vector registers, most MSRs and the time-stamp counter keep their values.
    /// SDM vol. 3, *Processor State After Reset*, the column for INIT.
    pub fn init(&mut self) {
        let mut state = VcpuState::reset();
        state.waits_for_sipi = self.id != 0;
        state.cr0 |= self.cr0 & (x86::Cr0::CD | x86::Cr0::NW);
        state.xcr0 = self.xcr0;
        self.take_architectural(&state);
    }

    /// A start-up IPI: real mode at `vector << 12`. Without an INIT before it is ignored.
    pub fn start(&mut self, vector: u8) {
        if !self.waits_for_sipi {
            return;
        }
        self.waits_for_sipi = false;
        self.halted = false;
        self.rip = 0;
        let code = x86::Segment::real_mode(u16::from(vector) << 8, true);
        self.set_segment(SegmentRegister::Cs, code);
    }

    /// Takes everything of a state but the vector registers and the MSRs.
    fn take_architectural(&mut self, state: &VcpuState) {
        self.registers = Registers::new(&state.gprs);
        self.rip = state.rip;
        self.flags.set_bits(state.rflags.bits());
        self.system_flags = state.rflags - Flags::ARITHMETIC | Flags::FIXED;
        self.segments = state.segments;
        for (base, segment) in self.bases.iter_mut().zip(&state.segments) {
            *base = segment.base;
        }
        (self.tr, self.ldtr, self.gdtr, self.idtr) = (state.tr, state.ldtr, state.gdtr, state.idtr);
        (self.cr0, self.cr2, self.cr3, self.cr4) = (state.cr0, state.cr2, state.cr3, state.cr4);
        (self.efer, self.xcr0, self.debug) = (state.efer, state.xcr0, state.debug);
        (self.shadow, self.nmi_blocked, self.debug_traps) = (false, false, 0);
        (self.halted, self.waits_for_sipi) = (state.halted, state.waits_for_sipi);
        self.stack_shadow = false;
        self.update_breakpoints();
        self.update_paging();
        self.mmu.paging.pointers = self.read_directory_pointers(self.cr3);
    }

    /// The architectural state.
    pub fn state(&self) -> VcpuState {
        VcpuState {
            gprs: *self.registers.all(),
            rip: self.rip,
            rflags: Flags::from_bits_retain(self.rflags()),
            segments: self.segments,
            tr: self.tr,
            ldtr: self.ldtr,
            gdtr: self.gdtr,
            idtr: self.idtr,
            cr0: self.cr0,
            cr2: self.cr2,
            cr3: self.cr3,
            cr4: self.cr4,
            efer: self.efer,
            xcr0: self.xcr0,
            debug: self.debug,
            vector: self.vector.to_state(),
            msrs: self.saved_msrs(),
            waits_for_sipi: self.waits_for_sipi,
            halted: self.halted,
        }
    }

    /// Replaces the architectural state.
    ///
    /// # Errors
    /// [`EngineError::BadState`] where a register has a value that no processor can have.
    pub fn set_state(&mut self, state: &VcpuState) -> Result<(), EngineError> {
        use x86::{Cr0, Cr4, Efer};
        let bad = |what: &str| Err(EngineError::BadState(what.into()));
        if state.cr0.contains(Cr0::PG) && !state.cr0.contains(Cr0::PE) {
            return bad("paging without protected mode");
        }
        if state.efer.contains(Efer::LMA) && !(state.cr0.contains(Cr0::PG) && state.cr4.contains(Cr4::PAE)) {
            return bad("long mode without paging or PAE");
        }
        if state.xcr0 & 1 == 0 {
            return bad("XCR0 without x87");
        }
        self.take_architectural(state);
        *self.vector = VectorRegisters::from_state(&state.vector);
        self.update_keys();
        for &(index, value) in &state.msrs {
            self.restore_msr(index, value)
                .map_err(|_| EngineError::BadState(format!("MSR {index:#x} with {value:#x}")))?;
            self.update_keys();
        }
        Ok(())
    }
}
