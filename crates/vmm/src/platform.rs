//! The platform: every device at its address, with its interrupt line.

use std::sync::{Arc, Mutex, PoisonError};

use devices::acpi_pm::{self, AcpiPm};
use devices::bus::{BusError, MachineBus, SharedDevice};
use devices::clock::Timers;
use devices::cmos::{self, Cmos, CmosConfig};
use devices::debug_console::{self, DebugConsole};
use devices::debug_exit::{self, DebugExit};
use devices::fw_cfg::FwCfgConfig;
use devices::hpet::{self, Hpet, LegacyLine};
use devices::i8042::{self, I8042};
use devices::irq::{IrqLine, IrqSink, SharedLine, Sharing};
use devices::pci::{self, ConfigPorts, HostBridge, MsiSink, PamEffect, PciBus};
use devices::pit;
use devices::request::{MachineRequest, RequestSink};
use devices::reset::{self, ResetControl, SystemControlA};
use devices::serial::{self, Serial};
use devices::testdev::{self, TestDevice};
use engine::Space;
use guest_memory::GuestMemory;

use crate::acpi_tables::MmioSlot;
use crate::error::BuildError;
use crate::fw_cfg;
use crate::input::{Input, Port};
use crate::layout;
use crate::mmio_devices;
use crate::outcome::Ending;
use crate::output::Output;
use crate::pci_devices::{self, VirtioDevices, Wiring};
use crate::sleep::Sleep;

/// COM3's first port; it shares COM1's interrupt.
const COM3_BASE: u64 = 0x3e8;
/// The serial ports there can be: name, first port, interrupt.
const SERIAL_PORTS: [(&str, u64, u32); 3] = [
    ("serial0", serial::COM1_BASE, serial::COM1_IRQ),
    ("serial1", serial::COM2_BASE, serial::COM2_IRQ),
    ("serial2", COM3_BASE, serial::COM1_IRQ),
];

/// What the platform's devices are made with.
pub struct PlatformConfig<'a> {
    /// RAM in bytes, as the CMOS tells it.
    pub memory_bytes: u64,
    /// The RAM itself, for devices that read and write it.
    pub memory: &'a GuestMemory,
    /// vCPUs.
    pub cpus: u32,
    /// What the firmware configuration device tells.
    pub fw_cfg: &'a FwCfgConfig,
    /// What carries out the host bridge's attribute map, where there is one.
    pub attribute_map: Option<PamEffect>,
    /// Where interrupt messages go.
    pub messages: Arc<dyn MsiSink>,
    /// The virtio devices.
    pub virtio: Vec<Box<dyn virtio::Device>>,
    /// Where they are in memory; none of them where they are on the PCI bus.
    pub virtio_mmio: &'a [MmioSlot],
    /// Virtio features that are not offered although they could be.
    pub virtio_withheld: u64,
    /// The console that firmware writes its messages to.
    pub debug_console: Option<DebugConsole>,
    /// The port whose value ends the run.
    pub debug_exit: Option<u16>,
    /// Whether there is the device that suites of unit tests expect.
    pub testdev: bool,
    /// The interrupt controllers' input lines: the ISA interrupts.
    pub irqs: Arc<dyn IrqSink>,
    /// The machine's timers.
    pub timers: &'a Timers,
    /// Where the serial ports' bytes go: at most as many as there are ports.
    pub outputs: Vec<Output>,
    /// What the guest's requests end.
    pub ending: &'a Ending,
    /// What it asks for sleep.
    pub sleep: &'a Sleep,
}

/// The devices but for the interrupt controllers.
pub struct Platform {
    bus: Arc<MachineBus>,
    serial: Vec<Arc<Mutex<Serial>>>,
    pm: Arc<Mutex<AcpiPm>>,
    timer_line: IrqLine,
    virtio: VirtioDevices,
}

impl Platform {
    /// Puts the devices on a bus of their own.
    ///
    /// # Errors
    /// [`BuildError::Bus`] where the debug-exit port is another device's.
    pub fn new(config: PlatformConfig<'_>) -> Result<Self, BuildError> {
        let bus = Arc::new(MachineBus::new());
        let (ending, sleep) = (config.ending.clone(), config.sleep.clone());
        let requests = RequestSink::new(move |request| match request {
            MachineRequest::Sleep(3) => sleep.begin(),
            MachineRequest::Wake => sleep.wake(),
            request => ending.request(request),
        });
        let line = |number| IrqLine::new(config.irqs.clone(), number);

        let pm = AcpiPm::new(line(acpi_pm::SCI_IRQ), requests.clone(), config.timers);
        for window in acpi_pm::WINDOWS {
            bus.insert_window(window, "acpi", pm.clone())?;
        }
        let legacy = [pit::IRQ, cmos::IRQ].map(|number| LegacyLine::new(line(number)));
        let [timer_line, clock_line] = [0, 1].map(|index: usize| legacy[index].pc_end());
        let hpet = Hpet::new(hpet::ROUTES.map(line), legacy, config.timers);
        bus.insert(Space::Memory, layout::HPET, hpet::SIZE, "hpet", hpet)?;
        let clock_line = IrqLine::both(clock_line, lock(&pm).clock_line());
        let cmos = Cmos::new(&cmos_config(config.memory_bytes, config.cpus), clock_line, config.timers);
        bus.insert(Space::Port, cmos::BASE, cmos::PORTS, "cmos", cmos)?;
        let keyboard =
            shared(I8042::new([i8042::KEYBOARD_IRQ, i8042::MOUSE_IRQ].map(line), requests.clone()));
        for window in i8042::WINDOWS {
            bus.insert_window(window, "i8042", keyboard.clone())?;
        }
        let bridge = config.attribute_map.map_or_else(HostBridge::new, HostBridge::with_pam);
        let pci = PciBus::with(bridge);
        add_pci_and_resets(&bus, pci.clone(), &requests)?;
        let wiring = Wiring {
            memory: config.memory,
            irqs: config.irqs.clone(),
            withheld: config.virtio_withheld,
            messages: config.messages,
        };
        let virtio = add_virtio(&bus, &pci, &wiring, config.virtio_mmio, config.virtio)?;
        let fw_cfg = fw_cfg::device(config.fw_cfg, config.memory);
        bus.insert(Space::Port, devices::fw_cfg::BASE, devices::fw_cfg::PORTS, "fw-cfg", shared(fw_cfg))?;
        if let Some(console) = config.debug_console {
            bus.insert(Space::Port, debug_console::PORT, 1, "debug-console", shared(console))?;
        }
        if config.testdev {
            add_test_device(&bus, &config.irqs)?;
        }

        let com1_and_com3 = SharedLine::new(line(serial::COM1_IRQ), Sharing::Edge);
        let mut ports = Vec::new();
        for ((name, base, irq), output) in SERIAL_PORTS.into_iter().zip(config.outputs) {
            let line = if irq == serial::COM1_IRQ { com1_and_com3.input() } else { line(irq) };
            let port = Serial::new(line, Box::new(output), config.timers);
            bus.insert(Space::Port, base, serial::PORTS, name, port.clone())?;
            ports.push(port);
        }
        if let Some(port) = config.debug_exit {
            let len = debug_exit::PORTS.min(0x1_0000 - u64::from(port));
            bus.insert(Space::Port, u64::from(port), len, "debug-exit", shared(DebugExit::new(requests)))?;
        }
        Ok(Self { bus, serial: ports, pm, timer_line, virtio })
    }

    /// What the vCPUs see.
    pub fn bus(&self) -> &Arc<MachineBus> {
        &self.bus
    }

    /// The interval timer's interrupt line.
    pub fn timer_line(&self) -> IrqLine {
        self.timer_line.clone()
    }

    /// The power button.
    pub fn power_button(&self) -> PowerButton {
        PowerButton(self.pm.clone())
    }

    /// The guest's end of a serial port, to be fed from `input`; `None` where there is no such port.
    pub fn serial_input(&self, port: usize, input: &Input) -> Option<Box<dyn Port>> {
        let serial = self.serial.get(port)?.clone();
        let input = input.clone();
        lock(&serial).set_input_wake(move || input.nudge());
        Some(Box::new(SerialInput(serial)))
    }

    /// The virtio devices.
    pub fn virtio(&self) -> &VirtioDevices {
        &self.virtio
    }

    /// Passes on what the serial ports hold back, once the vCPUs have stopped; whether that is all.
    pub fn flush_outputs(&self) -> bool {
        self.serial.iter().all(|serial| {
            let mut serial = lock(serial);
            serial.output_ready();
            serial.is_output_empty()
        })
    }
}

/// The machine's power button. Clones are the same one.
#[derive(Clone)]
pub struct PowerButton(Arc<Mutex<AcpiPm>>);

impl PowerButton {
    /// Asks the guest to shut down.
    pub fn press(&self) {
        lock(&self.0).press_power_button();
    }
}

struct SerialInput(Arc<Mutex<Serial>>);

impl Port for SerialInput {
    fn is_open(&self) -> bool {
        lock(&self.0).wants_input()
    }
    fn push(&self, data: &[u8]) -> usize {
        lock(&self.0).push_input(data)
    }
    fn is_empty(&self) -> bool {
        lock(&self.0).is_input_empty()
    }
}

/// The machine as the CMOS tells it.
fn cmos_config(memory_bytes: u64, cpus: u32) -> CmosConfig {
    let below = memory_bytes.min(layout::MMIO_HOLE.start);
    CmosConfig { memory_below_4g: below, memory_above_4g: memory_bytes - below, cpus }
}

/// The PCI configuration ports, the reset port among them, and port 0x92.
fn add_pci_and_resets(
    bus: &MachineBus,
    pci_bus: Arc<PciBus>,
    requests: &RequestSink,
) -> Result<(), BusError> {
    let config_ports = ConfigPorts::new(pci_bus, ResetControl::new(requests.clone()));
    bus.insert(Space::Port, pci::CONFIG_BASE, pci::CONFIG_PORTS, "pci", shared(config_ports))?;
    let system_control = shared(SystemControlA::new(requests.clone()));
    bus.insert(Space::Port, reset::SYSTEM_CONTROL_A_PORT, 1, "system-control", system_control)
}

/// The PCI bus with its configuration space in memory, and the virtio devices there or in memory.
fn add_virtio(
    bus: &Arc<MachineBus>,
    pci: &Arc<PciBus>,
    wiring: &Wiring<'_>,
    mmio: &[MmioSlot],
    devices: Vec<Box<dyn virtio::Device>>,
) -> Result<VirtioDevices, BuildError> {
    if mmio.is_empty() {
        return pci_devices::attach(bus, pci, wiring, devices);
    }
    pci_devices::attach(bus, pci, wiring, Vec::new())?;
    mmio_devices::attach(bus, wiring, mmio, devices)
}

/// The device for suites of unit tests, with all of the I/O APIC's lines.
fn add_test_device(bus: &MachineBus, irqs: &Arc<dyn IrqSink>) -> Result<(), BusError> {
    let lines = (0..testdev::LINES as u32).map(|number| IrqLine::new(irqs.clone(), number)).collect();
    let device = shared(TestDevice::new(lines));
    testdev::WINDOWS.into_iter().try_for_each(|window| bus.insert_window(window, "testdev", device.clone()))
}

fn shared(device: impl devices::bus::Device + 'static) -> SharedDevice {
    Arc::new(Mutex::new(device))
}

fn lock<T>(device: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outcome::{Outcome, StopReason};
    use devices::clock::ManualTime;
    use devices::irq::RecordedLines;
    use engine::Bus;

    fn platform(debug_exit: Option<u16>) -> (Ending, Result<Platform, BuildError>) {
        let ending = Ending::new();
        let timers = Timers::new(ManualTime::new());
        let memory = GuestMemory::new(&layout::regions(64 << 20).unwrap()).unwrap();
        let config = PlatformConfig {
            memory_bytes: 64 << 20,
            memory: &memory,
            cpus: 1,
            fw_cfg: &FwCfgConfig::default(),
            attribute_map: None,
            messages: devices::pci::RecordedMessages::new(),
            virtio: Vec::new(),
            virtio_mmio: &[],
            virtio_withheld: 0,
            debug_console: None,
            debug_exit,
            testdev: true,
            irqs: RecordedLines::new(),
            timers: &timers,
            outputs: Vec::new(),
            ending: &ending,
            sleep: &Sleep::new(1),
        };
        let platform = Platform::new(config);
        (ending, platform)
    }

    #[test]
    fn a_guests_request_ends_the_run() {
        let (ending, platform) = platform(Some(0xf4));
        platform.unwrap().bus().write(Space::Port, 0xf4, &[7, 1, 0, 0]);
        assert_eq!(ending.wait(), Outcome::DebugExit(0x107));
    }

    #[test]
    fn a_reset_is_named_by_its_port() {
        let (ending, platform) = platform(None);
        platform.unwrap().bus().write(Space::Port, 0xcf9, &[6]);
        assert_eq!(ending.wait(), Outcome::Reset { by: "port 0xcf9" });
    }

    #[test]
    fn a_debug_exit_port_where_a_device_is_is_refused() {
        let (ending, platform) = platform(Some(0x600));
        let message = platform.err().unwrap().to_string();
        assert!(message.contains("debug-exit") && message.contains("acpi"), "{message}");
        ending.report(Outcome::Stopped(StopReason::Quit));
    }

    #[test]
    fn a_debug_exit_port_at_the_end_of_the_ports_has_what_room_there_is() {
        assert!(platform(Some(0xffff)).1.is_ok());
    }
}
