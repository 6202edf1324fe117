use std::sync::Arc;

use super::{Address, PciBus};
use crate::bus::{ByteDevice, Device};
use crate::reset::ResetControl;

/// CONFIG_ADDRESS's port; CONFIG_DATA's follow it.
pub const CONFIG_BASE: u64 = 0xcf8;
/// Ports of the two.
pub const CONFIG_PORTS: u64 = 8;

const DATA: u64 = 4;
/// The reset control register's port, 0xcf9.
const RESET_CONTROL: u64 = 1;

/// CONFIG_ADDRESS: accesses to CONFIG_DATA are configuration accesses.
const ENABLE: u32 = 1 << 31;
/// CONFIG_ADDRESS: the bits that exist.
const WRITABLE: u32 = 0x80ff_fffc;

/// Configuration mechanism #1, and the reset control register that lies in its midst. Map it at [`CONFIG_BASE`].
pub struct ConfigPorts {
    address: u32,
    bus: Arc<PciBus>,
    reset_control: ResetControl,
}

impl ConfigPorts {
    /// The ports of `bus`.
    pub fn new(bus: Arc<PciBus>, reset_control: ResetControl) -> Self {
        Self { address: 0, bus, reset_control }
    }

    /// The reset of the machine.
    pub fn reset(&mut self) {
        self.address = 0;
        self.reset_control.reset();
    }

    /// The function and the double word that CONFIG_ADDRESS points to.
    fn target(&self) -> Option<(Address, u16)> {
        let [register, device_function, bus, _] = self.address.to_le_bytes();
        let address = Address { bus, device: device_function >> 3, function: device_function & 7 };
        (self.address & ENABLE != 0).then_some((address, register.into()))
    }
}

impl Device for ConfigPorts {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        match (offset, data.len()) {
            (0, 4) => data.copy_from_slice(&self.address.to_le_bytes()),
            (RESET_CONTROL, 1) => data[0] = self.reset_control.read_register(0),
            (DATA..=7, 1..=4) => match self.target() {
                Some((address, register)) => self.bus.read(address, register + (offset - DATA) as u16, data),
                None => data.fill(0xff),
            },
            _ => data.fill(0xff),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (0, &[a, b, c, d]) => self.address = u32::from_le_bytes([a, b, c, d]) & WRITABLE,
            (RESET_CONTROL, &[value]) => self.reset_control.write_register(0, value),
            (DATA..=7, data) if data.len() <= 4 => {
                if let Some((address, register)) = self.target() {
                    self.bus.write(address, register + (offset - DATA) as u16, data);
                }
            }
            _ => {}
        }
    }

    fn register(&self, offset: u64, _write: bool) -> &'static str {
        match offset {
            RESET_CONTROL => "RST_CNT",
            0..DATA => "CONFIG_ADDRESS",
            DATA..=7 => "CONFIG_DATA",
            _ => "none",
        }
    }

    fn power_cycle(&mut self) {
        self.reset();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::pci::{BarKind, ConfigSpace, ConfigWrite, Header, PciFunction};
    use crate::request::{MachineRequest, RequestSink};

    struct Function(ConfigSpace);

    impl PciFunction for Function {
        fn read_config(&mut self, offset: u16) -> u32 {
            self.0.read(offset)
        }
        fn write_config(&mut self, offset: u16, write: ConfigWrite) {
            self.0.write(offset, write);
        }
    }

    fn ports() -> (ConfigPorts, Arc<Mutex<Vec<MachineRequest>>>) {
        let (sink, requests) = RequestSink::recording();
        let bus = PciBus::with_host_bridge();
        let header = Header { vendor: 0x1af4, device: 0x1041, class: 0x02_0000, ..Header::default() };
        let mut space = ConfigSpace::new(&header);
        space.add_bar(0, BarKind::Memory32, 0x1000).unwrap();
        assert!(bus.insert(Address::on_bus_0(1, 0), Arc::new(Mutex::new(Function(space)))));
        (ConfigPorts::new(bus, ResetControl::new(sink)), requests)
    }

    fn select(ports: &mut ConfigPorts, device: u32, register: u32) {
        ports.write(0, &(ENABLE | device << 11 | register).to_le_bytes());
    }

    fn read32(ports: &mut ConfigPorts, device: u32, register: u32) -> u32 {
        select(ports, device, register);
        let mut data = [0; 4];
        ports.read(DATA, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn linux_finds_mechanism_1_and_the_host_bridge() {
        let (mut ports, _) = ports();
        ports.write(3, &[1]);
        ports.write(0, &0x8000_0000u32.to_le_bytes());
        let mut data = [0; 4];
        ports.read(0, &mut data);
        assert_eq!(u32::from_le_bytes(data), 0x8000_0000);
        assert_eq!(read32(&mut ports, 0, 0x00), 0x1237_8086);
        assert_eq!(read32(&mut ports, 0, 0x08) >> 16, 0x0600, "class: host bridge");
        assert_eq!(read32(&mut ports, 2, 0x00), u32::MAX);
    }

    #[test]
    fn bytes_and_words_reach_their_lanes() {
        let (mut ports, _) = ports();
        select(&mut ports, 1, 0x00);
        let mut word = [0; 2];
        ports.read(DATA + 2, &mut word);
        assert_eq!(u16::from_le_bytes(word), 0x1041);
        let mut byte = [0; 1];
        select(&mut ports, 1, 0x08);
        ports.read(DATA + 3, &mut byte);
        assert_eq!(byte, [0x02]);
        select(&mut ports, 1, 0x3c);
        ports.write(DATA, &[11]);
        assert_eq!(read32(&mut ports, 1, 0x3c) & 0xff, 11);
        select(&mut ports, 1, 0x10);
        ports.write(DATA + 2, &[0x34, 0x12]);
        assert_eq!(read32(&mut ports, 1, 0x10), 0x1234_0000);
    }

    #[test]
    fn without_the_enable_bit_nothing_answers() {
        let (mut ports, _) = ports();
        ports.write(0, &[0; 4]);
        let mut data = [0; 4];
        ports.read(DATA, &mut data);
        assert_eq!(data, [0xff; 4]);
    }

    #[test]
    fn a_byte_at_0xcf9_resets_and_leaves_the_address_alone() {
        let (mut ports, requests) = ports();
        select(&mut ports, 1, 0x08);
        ports.write(RESET_CONTROL, &[6]);
        assert_eq!(*requests.lock().unwrap(), [MachineRequest::Reset("port 0xcf9")]);
        let mut data = [0; 4];
        ports.read(0, &mut data);
        assert_eq!(u32::from_le_bytes(data), ENABLE | 1 << 11 | 8);
    }

    #[test]
    fn no_access_panics() {
        crate::fuzz::exercise(|_| {
            let (mut ports, _) = ports();
            select(&mut ports, 1, 0x10);
            Arc::new(Mutex::new(ports))
        });
    }
}
