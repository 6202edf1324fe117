//! The machine: built from its configuration, run once.

use std::fs::File;
use std::io::{LineWriter, Write};
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use devices::bus::MachineBus;
use devices::clock::Timers;
use devices::debug_console::DebugConsole;
use engine::{Attention, HostTime, Space, TimeSource, VcpuState};
use exits::{Detail, Ledger, Report};
use guest_memory::GuestMemory;
use virtio::console::ConsoleHandle;

use crate::acpi_tables::{self, AcpiConfig, Ecam, MmioSlot};
use crate::config::{Boot, ConfigError, MachineConfig};
use crate::engines::{self, Engine};
use crate::error::BuildError;
use crate::event_loop::EventLoop;
use crate::fw_cfg;
use crate::host_sides::HostSides;
use crate::input::Input;
use crate::layout;
use crate::ledger_bus::LedgerBus;
use crate::memory_use::MemoryUse;
use crate::mmio_devices;
use crate::outcome::{Ending, Outcome, StopReason};
use crate::output::{Output, OutputThread};
use crate::pci_devices;
use crate::platform::{Platform, PlatformConfig, PowerButton};
use crate::pmem::{self, PmemFiles};
use crate::sleep::{self, Sleep};
use crate::start;
use crate::unix_socket::OwnedPath;
use crate::vcpu_thread::{Ended, Restart, Run, VcpuSummary, VcpuThread};
use crate::vsock;

/// How long a vCPU may take to notice that the run has ended.
const STOP_WITHIN: Duration = Duration::from_secs(5);

/// Where one serial port leads on the host.
pub struct SerialLine {
    /// Takes what the guest sends.
    pub output: Box<dyn Write + Send>,
    /// Gives what the guest receives.
    pub input: Option<Input>,
}

/// A machine that is ready to run.
pub struct Machine {
    platform: Platform,
    timers: Timers,
    vcpus: Vec<VcpuThread>,
    run: Arc<Run>,
    controls: Controls,
    outputs: Vec<OutputThread>,
    inputs: Vec<Option<Input>>,
    /// The socket device's name on the host, to the end of the run.
    _socket: Option<OwnedPath>,
    engine: &'static str,
    host_sides: HostSides,
    pmem: PmemFiles,
    memory: GuestMemory,
    counts_memory: bool,
}

/// What the world outside may do to a machine. Clones are for the same one.
#[derive(Clone)]
pub struct Controls {
    ending: Ending,
    power: PowerButton,
    bus: Arc<MachineBus>,
    console: Option<ConsoleHandle>,
    ledger: Option<Ledger>,
    tick_frequency: u64,
}

/// What a run was.
#[derive(Clone, Debug)]
pub struct Summary {
    /// How it ended.
    pub outcome: Outcome,
    /// The engine that ran the vCPUs.
    pub engine: &'static str,
    /// From the start of the vCPUs to the end.
    pub elapsed: Duration,
    /// When the first instruction began.
    pub first_instruction: Option<Instant>,
    /// The vCPUs, by number.
    pub vcpus: Vec<VcpuSummary>,
    /// The exits, where they were counted.
    pub exits: Option<Report>,
    /// What the process took of the host's memory at the end, where that was asked for and the host tells.
    pub memory: Option<MemoryUse>,
}

impl Machine {
    /// Builds what `config` says, with the serial ports COM1, COM2 … leading where `lines` say.
    ///
    /// # Errors
    /// [`BuildError`] for values that no machine can have, files that cannot be booted, and what the host refuses.
    pub fn build(config: &MachineConfig, lines: Vec<SerialLine>) -> Result<Self, BuildError> {
        config.check()?;
        layout::check_host(config.memory).map_err(ConfigError::Memory)?;
        let attentions: Vec<_> = (0..config.cpus).map(|_| Attention::new()).collect();
        let pmem = open_pmem(config)?;
        let mut virtio = pci_devices::devices(config, &pmem)?;
        let host_sides = HostSides::open(config, &mut virtio)?;
        let vsock = config.vsock.as_ref().map(vsock::device).transpose()?;
        let socket = vsock.map(|(device, socket)| {
            virtio.push(Box::new(device));
            socket
        });
        let virtio_mmio = mmio_devices::slots(config, virtio.len())?;
        let arguments = mmio_devices::kernel_arguments(config, &virtio_mmio);
        let (memory, boot_state) = start::load(config, &pmem.regions(), &arguments)?;
        let debug_console = config.debug_console.as_deref().map(debug_console).transpose()?;
        let time: Arc<dyn TimeSource> = Arc::new(HostTime::start());
        let timers = Timers::new(time.clone());
        let engine = Arc::new(Engine::new(config, &memory, &timers, &attentions)?);
        let acpi = describe(config, &engine, &memory, &virtio_mmio)?;
        let fw_cfg = fw_cfg::contents(config, &memory, &acpi)?;

        let (ending, sleep) = (Ending::new(), Sleep::new(config.cpus));
        let (outputs, sinks, inputs) = connect(lines, &ending)?;
        let platform = Platform::new(PlatformConfig {
            memory_bytes: config.memory,
            memory: &memory,
            cpus: config.cpus,
            fw_cfg: &fw_cfg,
            messages: engine.messages(),
            virtio,
            virtio_mmio: &virtio_mmio,
            virtio_withheld: config.virtio_withheld,
            attribute_map: start::attribute_map(&memory, &engine, &attentions),
            debug_console,
            debug_exit: config.debug_exit,
            testdev: config.testdev,
            irqs: engine.irqs(),
            timers: &timers,
            outputs: sinks,
            ending: &ending,
            sleep: &sleep,
        })?;
        engine.add_devices(platform.bus(), platform.timer_line())?;
        let ledger = config.ledger.then(Ledger::new);
        let restart = restart(&engine, platform.bus(), &memory);
        let run = Run::new(ending.clone(), config.cpus, sleep, restart);
        let mut vcpus = Vec::new();
        for (id, attention) in (0u32..).zip(attentions) {
            let recorder = ledger.as_ref().map(|ledger| ledger.recorder(id));
            let bus = platform.bus().clone();
            let (mut vcpu, mut bus) = engine.vcpu(id, bus, attention.clone(), recorder.clone())?;
            let power_up = VcpuState { waits_for_sipi: id != 0, ..sleep::power_up(vcpu.state()?) };
            vcpu.set_state(if id == 0 { &boot_state } else { &power_up })?;
            if let Some(recorder) = &recorder {
                bus = Arc::new(LedgerBus::new(bus, recorder.clone()));
            }
            vcpus.push(VcpuThread { id, vcpu, bus, attention, run: run.clone(), recorder, power_up });
        }
        let controls = Controls {
            ending,
            power: platform.power_button(),
            bus: platform.bus().clone(),
            console: host_sides.console(),
            ledger,
            tick_frequency: time.tsc_frequency(),
        };
        let (engine, counts_memory) = (engine.name(), false);
        Ok(Self {
            platform,
            timers,
            vcpus,
            run,
            controls,
            outputs,
            inputs,
            engine,
            host_sides,
            _socket: socket,
            pmem,
            memory,
            counts_memory,
        })
    }

    /// Whether its summary is to have what the process takes of the host's memory, which takes milliseconds.
    pub fn counting_memory(self, counts_memory: bool) -> Self {
        Self { counts_memory, ..self }
    }

    /// Says where the virtio console's terminal leads, where the machine has one.
    #[must_use]
    pub fn with_console(mut self, line: SerialLine) -> Self {
        self.host_sides.connect(line);
        self
    }

    /// What the world outside may do to it.
    pub fn controls(&self) -> Controls {
        self.controls.clone()
    }

    /// Runs it to its end. All its threads have ended then, and all its output is written.
    ///
    /// # Errors
    /// [`BuildError::Host`] where the host gives no thread; nothing runs then.
    pub fn run(self) -> Result<Summary, BuildError> {
        let ending = self.run.ending.clone();
        let events = EventLoop::start(self.timers, ending.clone())?;
        let mut feeders = Vec::new();
        for (port, input) in self.inputs.iter().enumerate() {
            let Some(input) = input else { continue };
            if let Some(port) = self.platform.serial_input(port, input) {
                feeders.push(input.feed(port, &ending)?);
            }
        }
        let working = self.host_sides.start(&ending)?;
        let watch = self.pmem.watch(&self.memory, &ending)?;
        let started = Instant::now();
        let threads: Vec<_> = self.vcpus.into_iter().map_while(|vcpu| start(vcpu, &ending)).collect();
        let outcome = ending.wait();
        let elapsed = started.elapsed();
        self.memory.end_waiting();
        let ended: Vec<Ended> = threads.into_iter().filter_map(join).collect();
        let memory = if self.counts_memory { MemoryUse::now(&self.memory) } else { None };
        let vcpus = ended.into_iter().map(|ended| ended.summary).collect();
        let exits = self.controls.exits();
        self.platform.virtio().stop();
        events.join();
        for feeder in feeders.into_iter().chain(watch) {
            // It only moves bytes; were it to fail, the run has ended all the same.
            let _ = feeder.join();
        }
        let stopped = matches!(outcome, Outcome::Stopped(_) | Outcome::HostError(_));
        while !stopped && !self.platform.flush_outputs() {
            std::thread::sleep(Duration::from_millis(1));
        }
        working.finish(stopped);
        for output in self.outputs {
            output.finish(stopped);
        }
        let first_instruction = self.run.first_instruction.get().copied();
        Ok(Summary { outcome, engine: self.engine, elapsed, first_instruction, vcpus, exits, memory })
    }
}

impl Controls {
    /// Ends the run.
    pub fn stop(&self, reason: StopReason) {
        self.ending.report(Outcome::Stopped(reason));
    }

    /// The terminal has another size, in columns and rows.
    pub fn resize_console(&self, columns: u16, rows: u16) {
        if let Some(console) = &self.console {
            console.resize(columns, rows);
        }
    }

    /// Asks the guest to power off.
    pub fn press_power_button(&self) {
        self.power.press();
    }

    /// The exits so far, where they are counted.
    pub fn exits(&self) -> Option<Report> {
        let name = |detail: &Detail| {
            let (space, address, write) = match *detail {
                Detail::Port { port, write, .. } => (Space::Port, u64::from(port), write),
                Detail::Memory { address, write, .. } => (Space::Memory, address, write),
                _ => return None,
            };
            let (device, register) = self.bus.describe(space, address, write)?;
            Some(format!("{device} {register} ({})", if write { "w" } else { "r" }))
        };
        self.ledger.as_ref().map(|ledger| Report::new(ledger, self.tick_frequency, &name))
    }
}

/// Opens the files of the persistent memory.
fn open_pmem(config: &MachineConfig) -> Result<PmemFiles, BuildError> {
    let limit = 1u64.checked_shl(engines::physical_bits(config)?).unwrap_or(u64::MAX);
    pmem::open(&config.pmem, config.memory, limit)
}

/// Starts the machine again after a sleep.
fn restart(engine: &Arc<Engine>, bus: &Arc<MachineBus>, memory: &GuestMemory) -> Restart {
    let (engine, bus, memory) = (engine.clone(), bus.clone(), memory.clone());
    Box::new(move |power_up| {
        bus.power_cycle();
        engine.reset_controllers();
        sleep::waking_state(&memory, power_up)
    })
}

/// What the ACPI tables tell. Writes them for a kernel; firmware has them from fw_cfg, and is not there any more to wake
/// the machine from sleep.
fn describe(
    config: &MachineConfig,
    engine: &Engine,
    memory: &GuestMemory,
    virtio_mmio: &[MmioSlot],
) -> Result<AcpiConfig, BuildError> {
    let by_kernel = matches!(config.boot, Boot::Kernel(_));
    let suspend = by_kernel && engine.can_sleep();
    let ecam = Ecam { base: layout::PCI_ECAM.start, last_bus: pci_devices::LAST_BUS };
    let virtio_mmio = virtio_mmio.to_vec();
    let acpi = AcpiConfig { cpus: config.cpus, ecam: Some(ecam), pci_mmio64: None, virtio_mmio, suspend };
    if by_kernel {
        acpi_tables::build(&acpi)?.write(memory)?;
    }
    Ok(acpi)
}

fn debug_console(path: &Path) -> Result<DebugConsole, BuildError> {
    let failed = |source| BuildError::Output { path: path.to_owned(), source };
    let file = File::options().append(true).create(true).open(path).map_err(failed)?;
    Ok(DebugConsole::new(Box::new(LineWriter::new(file))))
}

type Connected = (Vec<OutputThread>, Vec<Output>, Vec<Option<Input>>);

fn connect(lines: Vec<SerialLine>, ending: &Ending) -> Result<Connected, BuildError> {
    let (mut threads, mut sinks, mut inputs) = Connected::default();
    for line in lines {
        let (sink, thread) = Output::start(line.output, ending)?;
        threads.push(thread);
        sinks.push(sink);
        inputs.push(line.input);
    }
    Ok((threads, sinks, inputs))
}

type VcpuHandle = (u32, JoinHandle<Option<Ended>>);

/// Starts a vCPU's thread; ends the run where the host gives none.
fn start(vcpu: VcpuThread, ending: &Ending) -> Option<VcpuHandle> {
    let id = vcpu.id;
    match vcpu.start() {
        Ok(thread) => Some((id, thread)),
        Err(error) => {
            ending.report(Outcome::HostError(format!("cannot start a thread for vCPU {id}: {error}")));
            None
        }
    }
}

/// Waits for a vCPU's thread; not for ever, so that a defect in an engine cannot keep the terminal.
fn join((id, thread): VcpuHandle) -> Option<Ended> {
    let limit = Instant::now() + STOP_WITHIN;
    while !thread.is_finished() {
        if Instant::now() > limit {
            log::error!("vCPU {id} does not stop; it is left behind");
            return None;
        }
        std::thread::sleep(Duration::from_micros(100));
    }
    thread.join().ok().flatten()
}
