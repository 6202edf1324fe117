//! The devices together on one bus, at a PC's addresses, as a guest finds them.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use devices::acpi_pm::{self, AcpiPm};
use devices::bus::{MachineBus, SharedDevice, Window};
use devices::clock::Timers;
use devices::cmos::{self, Cmos, CmosConfig};
use devices::debug_exit::{self, DebugExit};
use devices::i8042::{self, I8042};
use devices::irq::{IrqLine, RecordedLines};
use devices::pci::{self, ConfigPorts, Ecam, PciBus};
use devices::pit::{self, Pit};
use devices::request::{MachineRequest, RequestSink};
use devices::reset::{self, ResetControl, SystemControlA};
use devices::serial::{self, Serial};
use engine::{Bus, HostTime, Space, TimeSource};

struct Platform {
    bus: Arc<MachineBus>,
    timers: Timers,
    lines: Arc<RecordedLines>,
    requests: Arc<Mutex<Vec<MachineRequest>>>,
    console: Arc<Mutex<Vec<u8>>>,
}

const ECAM_BASE: u64 = 0xb000_0000;

fn ports(base: u64, len: u64) -> Window {
    Window { space: Space::Port, base, len, offset: 0 }
}

fn platform(time: Arc<dyn TimeSource>) -> Platform {
    let (bus, lines, timers) = (Arc::new(MachineBus::new()), RecordedLines::new(), Timers::new(time));
    let (sink, requests) = RequestSink::recording();
    let console = Arc::new(Mutex::new(Vec::new()));
    let shown = console.clone();
    let output = move |bytes: &[u8]| {
        let mut shown = shown.lock().unwrap();
        if shown.len() < 1 << 20 {
            shown.extend_from_slice(bytes);
        }
        bytes.len()
    };
    let line = |number: u32| -> IrqLine { lines.line(number) };
    let map = |windows: &[Window], name: &str, device: SharedDevice| {
        for &window in windows {
            bus.insert_window(window, name, device.clone()).unwrap();
        }
    };
    let com1 = Serial::new(line(serial::COM1_IRQ), Box::new(output), &timers);
    map(&[ports(serial::COM1_BASE, serial::PORTS)], "serial0", com1);
    let speaker = Window { space: Space::Port, base: pit::SPEAKER_PORT, len: 1, offset: pit::SPEAKER_OFFSET };
    map(&[ports(pit::BASE, pit::PORTS), speaker], "pit", Pit::new(line(pit::IRQ), &timers));
    let config = CmosConfig { memory_below_4g: 1 << 30, memory_above_4g: 0, cpus: 1 };
    map(&[ports(cmos::BASE, cmos::PORTS)], "cmos", Cmos::new(&config, line(cmos::IRQ), &timers));
    let keyboard = I8042::new([i8042::KEYBOARD_IRQ, i8042::MOUSE_IRQ].map(line), sink.clone());
    map(&i8042::WINDOWS, "i8042", Arc::new(Mutex::new(keyboard)));
    map(&acpi_pm::WINDOWS, "acpi", AcpiPm::new(line(acpi_pm::SCI_IRQ), sink.clone(), &timers));
    let port_a = SystemControlA::new(sink.clone());
    map(&[ports(reset::SYSTEM_CONTROL_A_PORT, 1)], "port92", Arc::new(Mutex::new(port_a)));
    let exit = Arc::new(Mutex::new(DebugExit::new(sink.clone())));
    map(&[ports(debug_exit::DEFAULT_PORT, debug_exit::PORTS)], "debug-exit", exit);
    let pci_bus = PciBus::with_host_bridge();
    let config = ConfigPorts::new(pci_bus.clone(), ResetControl::new(sink));
    map(&[ports(pci::CONFIG_BASE, pci::CONFIG_PORTS)], "pci", Arc::new(Mutex::new(config)));
    let ecam = Window { space: Space::Memory, base: ECAM_BASE, len: pci::ECAM_BUS_SIZE, offset: 0 };
    map(&[ecam], "ecam", Arc::new(Mutex::new(Ecam::new(pci_bus))));
    Platform { bus, timers, lines, requests, console }
}

fn out(platform: &Platform, port: u64, data: &[u8]) {
    platform.bus.write(Space::Port, port, data);
}

#[test]
fn a_guest_finds_each_device_at_its_address() {
    let platform = platform(Arc::new(HostTime::start()));
    b"hello\n".iter().for_each(|&byte| out(&platform, serial::COM1_BASE, &[byte]));
    assert_eq!(*platform.console.lock().unwrap(), b"hello\n");
    out(&platform, 0xcf8, &0x8000_0000u32.to_le_bytes());
    let mut identity = [0; 4];
    platform.bus.read(Space::Port, 0xcfc, &mut identity);
    let mut through_memory = [0; 4];
    platform.bus.read(Space::Memory, ECAM_BASE, &mut through_memory);
    assert_eq!((identity, through_memory), ([0x86, 0x80, 0x37, 0x12], identity));
    out(&platform, 0xcf9, &[6]);
    out(&platform, 0x64, &[0xfe]);
    out(&platform, acpi_pm::PM1A_CNT.into(), &(1u16 << 13 | 5 << 10).to_le_bytes());
    out(&platform, 0xf4, &[42]);
    let wanted = [
        MachineRequest::Reset("port 0xcf9"),
        MachineRequest::Reset("i8042 pulse"),
        MachineRequest::PowerOff,
        MachineRequest::DebugExit(42),
    ];
    assert_eq!(*platform.requests.lock().unwrap(), wanted);
    let name = |port: u64| platform.bus.describe(Space::Port, port, false).unwrap();
    assert_eq!(name(0x3fd), ("serial0".into(), "LSR"));
    assert_eq!(name(0x61), ("pit".into(), "NMI_SC"));
    assert_eq!(name(0x608), ("acpi".into(), "PM_TMR"));
    assert_eq!(name(0xcf9), ("pci".into(), "RST_CNT"));
}

#[test]
fn several_vcpus_and_the_event_loop_share_the_devices_without_a_deadlock() {
    let platform = Arc::new(platform(Arc::new(HostTime::start())));
    // Timers of all kinds: PIT at 1 kHz, RTC at 8 kHz, the PM timer's event.
    out(&platform, 0x43, &[0x34]);
    out(&platform, 0x40, &[0xa9]);
    out(&platform, 0x40, &[0x04]);
    out(&platform, 0x70, &[0x0a, 0x23]);
    out(&platform, 0x70, &[0x0b, 0x42]);
    out(&platform, 0x602, &[1, 0]);
    let stop = Arc::new(AtomicBool::new(false));
    let event_loop = {
        let (platform, stop) = (platform.clone(), stop.clone());
        std::thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                platform.timers.run_due();
                std::thread::yield_now();
            }
        })
    };
    let vcpus = [1u64, 7, 13].map(|seed| {
        let platform = platform.clone();
        std::thread::spawn(move || hammer(&platform, seed))
    });
    vcpus.into_iter().for_each(|vcpu| vcpu.join().unwrap());
    stop.store(true, Ordering::Relaxed);
    event_loop.join().unwrap();
    assert!(platform.lines.take_edges(pit::IRQ) > 0);
}

/// Accesses everything, in an order that depends on `seed`.
fn hammer(platform: &Platform, seed: u64) {
    let addresses = [
        0x40, 0x42, 0x43, 0x61, 0x60, 0x64, 0x71, 0x92, 0x3f8, 0x3f9, 0x3fd, 0x600, 0x602, 0x608, 0x620,
        0xcf8, 0xcfc,
    ];
    let mut state = seed;
    for _ in 0..20_000 {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let port = addresses[(state >> 33) as usize % addresses.len()];
        let mut data = [0; 4];
        let len = [1, 2, 4][(state >> 20) as usize % 3];
        if state >> 60 < 9 {
            platform.bus.read(Space::Port, port, &mut data[..len]);
        } else if !matches!(port, 0x40 | 0x43) {
            platform.bus.write(Space::Port, port, &(state >> 40).to_le_bytes()[..len]);
        }
        platform.bus.read(Space::Memory, ECAM_BASE + (state >> 40 & 0xff8), &mut data);
    }
}
