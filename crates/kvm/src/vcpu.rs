//! A virtual CPU in KVM, and the loop that runs it.

use std::sync::Arc;

use engine::{
    Attention, Bus, Counter, DebugEvent, EngineError, Fatal, Kick, Signals, Space, Vcpu, VcpuState, VmExit,
};
use exits::{Exit, Recorder};
use kvm_ioctls::{VcpuExit, VcpuFd};
use x86::ExitReason;

use crate::cpuid::{self, CpuidEntry};
use crate::error::host;
use crate::exit_data::{self, PortAccess};
use crate::kick::Kicker;
use crate::statistics::Statistics;
use crate::vm::Shared;
use crate::{msrs, state};

/// What a vCPU is created with.
pub struct VcpuConfig<'a> {
    /// Its number, which is its local APIC's ID; 0 is the boot processor.
    pub id: u32,
    /// What others raise to reach it. The vCPU takes its hook.
    pub attention: Arc<Attention>,
    /// The CPUID table of the machine's model, which is cut to what KVM offers; empty for all that the host can do.
    pub cpuid: &'a [CpuidEntry],
    /// Where it records the exits that the bus does not see.
    pub recorder: Option<Recorder>,
}

/// A virtual CPU on `/dev/kvm`.
///
/// Accesses to ports and device memory go to the bus given to [`Vcpu::run`] and are recorded there. KVM models HLT and the
/// wait for a SIPI itself, so `run` returns neither [`VmExit::Halt`] nor [`VmExit::WaitForSipi`]: it returns for
/// [`Signals::EXIT`], a shutdown, a debug event or a fatal error.
pub struct KvmVcpu {
    // Dropped before the machine that it belongs to.
    fd: VcpuFd,
    _machine: Arc<Shared>,
    kicker: Arc<Kicker>,
    attention: Arc<Attention>,
    recorder: Option<Recorder>,
    /// The kernel's counters, where there is a recorder that they go to.
    statistics: Option<Statistics>,
    /// Port exits that came to us.
    port_exits: u64,
    /// The model-specific registers of [`VcpuState::msrs`] that this vCPU has.
    msr_list: Vec<u32>,
}

impl KvmVcpu {
    pub(crate) fn new(shared: Arc<Shared>, config: VcpuConfig<'_>) -> Result<Self, EngineError> {
        let mut fd = shared.vm.create_vcpu(u64::from(config.id)).map_err(host("KVM_CREATE_VCPU"))?;
        let table = cpuid::for_vcpu(config.cpuid, &shared.supported_cpuid, config.id)?;
        fd.set_cpuid2(&table).map_err(host("KVM_SET_CPUID2"))?;
        let kicker = Kicker::new(&mut fd)?;
        let hook = kicker.clone();
        config.attention.set_hook(move || hook.kick());
        let msr_list = msrs::present(&fd);
        let statistics = config.recorder.as_ref().and_then(|_| Statistics::of(&fd));
        Ok(Self {
            fd,
            _machine: shared,
            kicker,
            attention: config.attention,
            recorder: config.recorder,
            statistics,
            port_exits: 0,
            msr_list,
        })
    }

    /// The guest's TSC frequency, in Hz.
    ///
    /// # Errors
    /// [`EngineError::Host`] where KVM does not know it.
    pub fn tsc_frequency(&self) -> Result<u64, EngineError> {
        self.fd.get_tsc_khz().map(|khz| u64::from(khz) * 1000).map_err(host("KVM_GET_TSC_KHZ"))
    }

    /// Counters that this kernel does not know; `None` where it has none at all.
    #[cfg(test)]
    pub(crate) fn missing_counters(&self) -> Option<Vec<&'static str>> {
        Statistics::of(&self.fd).map(|statistics| statistics.missing())
    }

    /// What a bare KVM_RUN left us with; `None` to go on.
    fn step(&mut self, bus: &dyn Bus) -> Result<Option<VmExit>, EngineError> {
        if self.attention.pending() {
            // Not asked for before, or asked for while we were outside. The kernel still completes a pending access.
            self.kicker.stop_next_entry();
        }
        let exit = match self.fd.run() {
            Ok(VcpuExit::IoIn(..) | VcpuExit::IoOut(..)) => {
                self.port_exits += 1;
                PortAccess::of(&mut self.fd).perform(bus);
                return Ok(None);
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                bus.read(Space::Memory, address, data);
                return Ok(None);
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                bus.write(Space::Memory, address, data);
                return Ok(None);
            }
            Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen | VcpuExit::SetTpr) => return Ok(self.look_around()),
            Ok(VcpuExit::Hlt) => VmExit::Halt,
            Ok(VcpuExit::Debug(event)) => {
                let reason = format!("debug exception {}, DR6 {:#x}", event.exception, event.dr6);
                VmExit::Debug(DebugEvent { rip: event.pc, reason })
            }
            Ok(VcpuExit::Shutdown | VcpuExit::SystemEvent(..)) => self.shutdown()?,
            Ok(VcpuExit::FailEntry(reason, cpu)) => self.fatal(exit_data::entry_failure(reason, cpu))?,
            Ok(VcpuExit::InternalError) => {
                let reason = exit_data::internal_error(&mut self.fd);
                self.fatal(reason)?
            }
            Ok(VcpuExit::MemoryFault { gpa, size, .. }) => {
                self.fatal(format!("the host has no memory behind {size:#x} bytes at {gpa:#x}"))?
            }
            Ok(other) => {
                let reason = format!("KVM left the guest for {other:?}, which nobody asked for");
                self.fatal(reason)?
            }
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                return Ok(self.look_around());
            }
            Err(error) => return Err(host("KVM_RUN")(error)),
        };
        Ok(Some(exit))
    }

    /// Something asked for attention: the interrupt controllers are KVM's, so only a request to leave matters.
    fn look_around(&mut self) -> Option<VmExit> {
        let start = exits::ticks();
        self.kicker.clear();
        let leave = self.attention.take(Signals::EXIT);
        self.attention.take(Signals(!Signals::EXIT.0));
        self.record(ExitReason::ExternalInterrupt, start);
        leave.then_some(VmExit::Interrupted)
    }

    fn record_kernel_counts(&self) {
        if let (Some(recorder), Some(statistics)) = (&self.recorder, &self.statistics) {
            recorder.set_kernel_counts(statistics.counts(self.port_exits));
        }
    }

    fn shutdown(&self) -> Result<VmExit, EngineError> {
        self.record(ExitReason::TripleFault, exits::ticks());
        let rip = self.fd.get_regs().map_err(host("KVM_GET_REGS"))?.rip;
        let sregs = self.fd.get_sregs().map_err(host("KVM_GET_SREGS"))?;
        let reason = format!(
            "triple fault (KVM does not tell its cause): CR0 {:#x}, CR2 {:#x}, CR3 {:#x}, IDT at {:#x}",
            sregs.cr0, sregs.cr2, sregs.cr3, sregs.idt.base
        );
        Ok(VmExit::Shutdown(DebugEvent { rip, reason }))
    }

    fn fatal(&self, reason: String) -> Result<VmExit, EngineError> {
        let rip = self.fd.get_regs().map_err(host("KVM_GET_REGS"))?.rip;
        Ok(VmExit::Fatal(Fatal { rip, reason }))
    }

    fn record(&self, reason: ExitReason, start: u64) {
        if let Some(recorder) = &self.recorder {
            recorder.record(Exit::new(reason), exits::ticks().wrapping_sub(start));
        }
    }
}

impl Vcpu for KvmVcpu {
    fn run(&mut self, bus: &Arc<dyn Bus>) -> Result<VmExit, EngineError> {
        let kicker = self.kicker.clone();
        let _running = kicker.enter();
        loop {
            if let Some(exit) = self.step(&**bus)? {
                self.record_kernel_counts();
                return Ok(exit);
            }
        }
    }

    fn state(&self) -> Result<VcpuState, EngineError> {
        state::read(&self.fd, &self.msr_list)
    }

    fn set_state(&mut self, state: &VcpuState) -> Result<(), EngineError> {
        state::write(&self.fd, state)
    }

    fn kick(&self) -> Kick {
        Kick::new(self.attention.clone())
    }

    fn counters(&self) -> Vec<Counter> {
        Vec::new()
    }

    fn instructions(&self) -> Option<u64> {
        None
    }
}
