//! The controllers as software and devices see them.

mod fuzz;
mod lapic;
mod routing;
mod timer;

use std::sync::Arc;

use engine::{Attention, Bus, InterruptController, MsrFault, Signals, Space};
use x86::apic::{DEFAULT_BASE, offset};
use x86::msr;

use super::{ApicFeatures, InterruptFabric, LocalApicHandle, VcpuBus};
use crate::bus::MachineBus;
use crate::clock::{ManualTime, Timers};
use crate::irq::IrqSink;

const BSP: u64 = 1 << 8;
const EXTD: u64 = 1 << 10;
const EN: u64 = 1 << 11;

/// A machine of interrupt controllers alone.
struct Machine {
    time: Arc<ManualTime>,
    timers: Timers,
    fabric: Arc<InterruptFabric>,
    attentions: Vec<Arc<Attention>>,
    cpus: Vec<Cpu>,
}

/// A vCPU's handle and bus.
struct Cpu {
    apic: LocalApicHandle,
    bus: VcpuBus,
}

impl Machine {
    fn new(cpus: usize) -> Self {
        Self::with_features(cpus, ApicFeatures::default())
    }

    fn with_features(cpus: usize, features: ApicFeatures) -> Self {
        let time = ManualTime::new();
        let timers = Timers::new(time.clone());
        let attentions: Vec<_> = (0..cpus).map(|_| Attention::new()).collect();
        let fabric = InterruptFabric::new(features, &timers, &attentions);
        let bus = Arc::new(MachineBus::new());
        fabric.attach(&bus).unwrap();
        let cpus = (0..cpus)
            .map(|index| {
                let apic = fabric.local_apic(index).unwrap();
                Cpu { bus: VcpuBus::new(apic.clone(), bus.clone()), apic }
            })
            .collect();
        Self { time, timers, fabric, attentions, cpus }
    }

    /// A machine whose local APICs are all enabled by software.
    fn enabled(cpus: usize) -> Self {
        let machine = Self::new(cpus);
        for cpu in &machine.cpus {
            cpu.write(offset::SVR, 0x1ff);
        }
        machine
    }

    /// The same in x2APIC mode.
    fn x2apic(cpus: usize) -> Self {
        let machine = Self::enabled(cpus);
        for cpu in &machine.cpus {
            cpu.enter_x2apic();
        }
        machine
    }

    /// The application processors have been started.
    fn started(self) -> Self {
        for (id, cpu) in (0u8..).zip(&self.cpus).skip(1) {
            self.cpus[0].send(id, 6 << 8 | 0x10);
            assert_eq!(cpu.apic.take_event(true), Some(engine::CpuEvent::Sipi(0x10)));
        }
        self
    }

    fn run(&self, ns: u64) {
        self.time.run(&self.timers, ns);
    }

    fn set_line(&self, line: u32, level: bool) {
        self.fabric.set_line(line, level);
    }

    /// Whether vCPU `index` has been told to look since the last call.
    fn attention(&self, index: usize) -> bool {
        self.attentions[index].take(Signals::INTERRUPT)
    }

    fn set_redirection(&self, pin: u32, entry: u64) {
        let cpu = &self.cpus[0];
        for (index, value) in [(0x11 + 2 * pin, (entry >> 32) as u32), (0x10 + 2 * pin, entry as u32)] {
            cpu.write_memory(0xfec0_0000, index);
            cpu.write_memory(0xfec0_0010, value);
        }
    }

    fn redirection(&self, pin: u32) -> u32 {
        let cpu = &self.cpus[0];
        cpu.write_memory(0xfec0_0000, 0x10 + 2 * pin);
        cpu.read_memory(0xfec0_0010)
    }

    /// Both PICs with vectors 0x30 and up, everything unmasked.
    fn start_pic(&self) {
        for (port, base, icw3) in [(0x20, 0x30, 4), (0xa0, 0x38, 2)] {
            self.out(port, 0x11);
            for value in [base, icw3, 1, 0] {
                self.out(port + 1, value);
            }
        }
    }

    fn out(&self, port: u64, value: u8) {
        self.cpus[0].bus.write(Space::Port, port, &[value]);
    }
}

impl Cpu {
    fn read_memory(&self, address: u64) -> u32 {
        let mut data = [0; 4];
        self.bus.read(Space::Memory, address, &mut data);
        u32::from_le_bytes(data)
    }

    fn write_memory(&self, address: u64, value: u32) {
        self.bus.write(Space::Memory, address, &value.to_le_bytes());
    }

    /// Reads an xAPIC register.
    fn read(&self, register: u32) -> u32 {
        self.read_memory(DEFAULT_BASE + u64::from(register))
    }

    fn write(&self, register: u32, value: u32) {
        self.write_memory(DEFAULT_BASE + u64::from(register), value);
    }

    /// Reads an x2APIC register.
    fn rdmsr(&self, register: u32) -> Result<u64, MsrFault> {
        self.apic.read_msr(msr::X2APIC_BASE + register / 16)
    }

    fn wrmsr(&self, register: u32, value: u64) -> Result<(), MsrFault> {
        self.apic.write_msr(msr::X2APIC_BASE + register / 16, value)
    }

    fn base(&self) -> u64 {
        self.apic.read_msr(msr::IA32_APIC_BASE).unwrap()
    }

    fn set_base(&self, value: u64) -> Result<(), MsrFault> {
        self.apic.write_msr(msr::IA32_APIC_BASE, value)
    }

    fn enter_x2apic(&self) {
        self.set_base(self.base() | EXTD).unwrap();
    }

    /// Takes one interrupt and ends it.
    fn take(&self) -> Option<u8> {
        let vector = self.apic.acknowledge()?;
        self.eoi();
        Some(vector)
    }

    fn eoi(&self) {
        if self.base() & EXTD != 0 {
            self.wrmsr(offset::EOI, 0).unwrap();
        } else {
            self.write(offset::EOI, 0);
        }
    }

    /// Takes and ends all interrupts that are deliverable.
    fn take_all(&self) -> Vec<u8> {
        std::iter::from_fn(|| self.take()).collect()
    }

    /// Writes the xAPIC's ICR.
    fn send(&self, destination: u8, icr: u32) {
        self.write(offset::ICR_HIGH, u32::from(destination) << 24);
        self.write(offset::ICR_LOW, icr);
    }
}
