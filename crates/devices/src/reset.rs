//! The registers that reset a PC: the chipset's reset control register at port 0xcf9, and port 0x92.
//!
//! 0xcf9 lies among the ports of PCI configuration mechanism #1, which takes double words only there: where both exist,
//! [`crate::pci::ConfigPorts`] holds the [`ResetControl`] and passes the byte on.

use bitflags::bitflags;

use crate::bus::ByteDevice;
use crate::request::{MachineRequest, RequestSink};

/// Port of the reset control register.
pub const RESET_CONTROL_PORT: u64 = 0xcf9;
/// What a write to it takes to reset all of the machine at once: the FADT's RESET_VALUE.
pub const RESET_CONTROL_FULL: u8 = 0x06;
/// Port of [`SystemControlA`].
pub const SYSTEM_CONTROL_A_PORT: u64 = 0x92;

bitflags! {
    /// The reset control register of Intel's south bridges.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct Control: u8 {
        /// The reset is a hard one.
        const SYS_RST = 1 << 1;
        /// A rising edge resets.
        const RST_CPU = 1 << 2;
        /// The power is cycled as well.
        const FULL_RST = 1 << 3;
    }

    /// PS/2 system control port A.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct PortA: u8 {
        /// A rising edge resets the processor.
        const FAST_INIT = 1 << 0;
        const A20 = 1 << 1;
        const _ = !0;
    }
}

/// The reset control register, at offset 0.
#[derive(Debug)]
pub struct ResetControl {
    control: Control,
    requests: RequestSink,
}

impl ResetControl {
    /// A register after power-up.
    pub fn new(requests: RequestSink) -> Self {
        Self { control: Control::empty(), requests }
    }

    /// The reset of the machine.
    pub fn reset(&mut self) {
        self.control = Control::empty();
    }
}

impl ByteDevice for ResetControl {
    fn read_register(&mut self, offset: u64) -> u8 {
        if offset == 0 { self.control.bits() } else { 0xff }
    }

    fn write_register(&mut self, offset: u64, value: u8) {
        if offset != 0 {
            return;
        }
        let before = std::mem::replace(&mut self.control, Control::from_bits_truncate(value));
        if self.control.difference(before).contains(Control::RST_CPU) {
            self.requests.send(MachineRequest::Reset("port 0xcf9"));
        }
    }

    fn register_name(&self, offset: u64, _write: bool) -> &'static str {
        if offset == 0 { "RST_CNT" } else { "none" }
    }

    fn lose_power(&mut self) {
        self.reset();
    }
}

/// Port 0x92, at offset 0: the fast way to reset the processor, and to open address line 20, which is always open here.
#[derive(Debug)]
pub struct SystemControlA {
    port: PortA,
    requests: RequestSink,
}

impl SystemControlA {
    /// A register after power-up.
    pub fn new(requests: RequestSink) -> Self {
        Self { port: PortA::A20, requests }
    }

    /// The reset of the machine.
    pub fn reset(&mut self) {
        self.port = PortA::A20;
    }
}

impl ByteDevice for SystemControlA {
    fn read_register(&mut self, offset: u64) -> u8 {
        if offset == 0 { self.port.bits() } else { 0xff }
    }

    fn write_register(&mut self, offset: u64, value: u8) {
        if offset != 0 {
            return;
        }
        let before = std::mem::replace(&mut self.port, PortA::from_bits_retain(value));
        if self.port.difference(before).contains(PortA::FAST_INIT) {
            self.requests.send(MachineRequest::Reset("port 0x92"));
        }
    }

    fn register_name(&self, offset: u64, _write: bool) -> &'static str {
        if offset == 0 { "PORT_A" } else { "none" }
    }

    fn lose_power(&mut self) {
        self.reset();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[test]
    fn the_rising_edge_of_rst_cpu_resets_once() {
        let (sink, requests) = RequestSink::recording();
        let mut control = ResetControl::new(sink);
        control.write_register(0, 0x02);
        assert!(requests.lock().unwrap().is_empty());
        control.write_register(0, RESET_CONTROL_FULL);
        control.write_register(0, RESET_CONTROL_FULL);
        assert_eq!(*requests.lock().unwrap(), [MachineRequest::Reset("port 0xcf9")]);
        assert_eq!(control.read_register(0), RESET_CONTROL_FULL);
    }

    #[test]
    fn port_92_resets_with_bit_0_and_keeps_the_gate_of_a20() {
        let (sink, requests) = RequestSink::recording();
        let mut port = SystemControlA::new(sink);
        assert_eq!(port.read_register(0), 0x02);
        port.write_register(0, 0x00);
        assert_eq!(port.read_register(0), 0x00);
        port.write_register(0, 0x03);
        assert_eq!(*requests.lock().unwrap(), [MachineRequest::Reset("port 0x92")]);
    }

    #[test]
    fn no_access_panics() {
        crate::fuzz::exercise(|_| Arc::new(Mutex::new(ResetControl::new(RequestSink::recording().0))));
        crate::fuzz::exercise(|_| Arc::new(Mutex::new(SystemControlA::new(RequestSink::recording().0))));
    }
}
