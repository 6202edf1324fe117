//! QEMU's firmware configuration device: numbers and files that firmware and bare-metal guests ask for by key.
//! QEMU documentation, *QEMU Firmware Configuration (fw_cfg) Device*.
//!
//! ```text
//! port 0x510  16 bits, write   the key; reading begins anew
//! port 0x511   8 bits, read    the next byte of what the key stands for; zeros after the last
//! port 0x514  64 bits, big-endian: the address of a DMA descriptor in two halves, of which the lower one starts it;
//!             read: "QEMU CFG"
//! ```

use bitflags::bitflags;

use crate::bus::Device;

/// First port.
pub const BASE: u64 = 0x510;
/// Ports at [`BASE`].
pub const PORTS: u64 = 12;

const SELECTOR: u64 = 0;
const DATA: u64 = 1;
/// The DMA address register's halves.
const DMA_HIGH: u64 = 4;
const DMA_LOW: u64 = 8;
/// What the DMA address register reads as.
const DMA_SIGNATURE: [u8; 8] = *b"QEMU CFG";

/// Keys whose meaning is fixed.
mod key {
    pub(super) const SIGNATURE: u16 = 0x00;
    pub(super) const INTERFACES: u16 = 0x01;
    pub(super) const RAM_SIZE: u16 = 0x03;
    /// No display.
    pub(super) const NO_GRAPHIC: u16 = 0x04;
    pub(super) const NB_CPUS: u16 = 0x05;
    /// Whether firmware offers its boot menu.
    pub(super) const BOOT_MENU: u16 = 0x0e;
    pub(super) const MAX_CPUS: u16 = 0x0f;
    pub(super) const FILE_DIRECTORY: u16 = 0x19;
    /// The first file's; the others follow.
    pub(super) const FIRST_FILE: u16 = 0x20;
    /// PC: whether ISA interrupt 0 comes in at the I/O APIC's pin 2.
    pub(super) const IRQ0_OVERRIDE: u16 = 0x8002;
}

/// The ports, and DMA.
const INTERFACES: u32 = 0b11;
/// Bytes of a file's name in the directory, with its NUL.
const NAME_SIZE: usize = 56;
/// The most bytes of a file's name.
pub const MAX_NAME: usize = NAME_SIZE - 1;
/// Bytes of a DMA descriptor.
const DESCRIPTOR_SIZE: usize = 16;
/// Bytes that DMA moves at a time.
const CHUNK: usize = 4096;

bitflags! {
    /// The control word of a DMA descriptor. Its upper half is the key to select.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct Control: u32 {
        const ERROR = 1 << 0;
        const READ = 1 << 1;
        const SKIP = 1 << 2;
        const SELECT = 1 << 3;
        const WRITE = 1 << 4;
    }
}

/// Guest memory, as far as DMA needs it. Addresses are guest-physical.
pub trait DmaMemory: Send {
    /// Fills `data` from memory; false where not all of it is RAM.
    fn read(&self, address: u64, data: &mut [u8]) -> bool;
    /// Copies `data` to memory; false where not all of it is RAM that the guest may write.
    fn write(&self, address: u64, data: &[u8]) -> bool;
}

/// What the machine tells.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FwCfgConfig {
    /// Bytes of RAM.
    pub memory: u64,
    /// vCPUs, all of which are there from the start.
    pub cpus: u16,
    /// Whether firmware offers its boot menu.
    pub boot_menu: bool,
    /// Names, of at most [`MAX_NAME`] bytes, and contents.
    pub files: Vec<(String, Vec<u8>)>,
}

/// The device.
pub struct FwCfg {
    items: Vec<(u16, Vec<u8>)>,
    selected: u16,
    /// How many bytes of the selected item have been read.
    position: usize,
    dma_high: u32,
    memory: Box<dyn DmaMemory>,
}

impl FwCfg {
    /// A device that tells `config` and reaches `memory`.
    pub fn new(config: &FwCfgConfig, memory: Box<dyn DmaMemory>) -> Self {
        let mut items = vec![
            (key::SIGNATURE, b"QEMU".to_vec()),
            (key::INTERFACES, INTERFACES.to_le_bytes().to_vec()),
            (key::RAM_SIZE, config.memory.to_le_bytes().to_vec()),
            (key::NO_GRAPHIC, 1u16.to_le_bytes().to_vec()),
            (key::NB_CPUS, config.cpus.to_le_bytes().to_vec()),
            (key::BOOT_MENU, u16::from(config.boot_menu).to_le_bytes().to_vec()),
            (key::MAX_CPUS, config.cpus.to_le_bytes().to_vec()),
            (key::IRQ0_OVERRIDE, 1u32.to_le_bytes().to_vec()),
            (key::FILE_DIRECTORY, directory(&config.files)),
        ];
        items.extend((key::FIRST_FILE..).zip(config.files.iter().map(|(_, bytes)| bytes.clone())));
        Self { items, selected: key::SIGNATURE, position: 0, dma_high: 0, memory }
    }

    /// The reset of the machine.
    pub fn reset(&mut self) {
        self.select(key::SIGNATURE);
        self.dma_high = 0;
    }

    fn select(&mut self, key: u16) {
        (self.selected, self.position) = (key, 0);
    }

    /// The bytes of the selected item that have not been read.
    fn rest(&self) -> &[u8] {
        let item = self.items.iter().find(|(key, _)| *key == self.selected);
        item.and_then(|(_, bytes)| bytes.get(self.position..)).unwrap_or_default()
    }

    /// The item's next bytes, then zeros.
    fn take(&mut self, data: &mut [u8]) {
        let rest = self.rest();
        let count = rest.len().min(data.len());
        data[..count].copy_from_slice(&rest[..count]);
        data[count..].fill(0);
        self.position += count;
    }

    /// Carries out the descriptor at `address`, and tells in it how that went.
    fn dma(&mut self, address: u64) {
        let mut descriptor = [0; DESCRIPTOR_SIZE];
        if !self.memory.read(address, &mut descriptor) {
            return;
        }
        let word = |at: usize| descriptor[at..].first_chunk().map_or(0, |word| u32::from_be_bytes(*word));
        let (control, len) = (word(0), word(4));
        let target = u64::from(word(8)) << 32 | u64::from(word(12));
        let flags = Control::from_bits_truncate(control);
        if flags.contains(Control::SELECT) {
            self.select((control >> 16) as u16);
        }
        let done = if flags.contains(Control::READ) {
            self.dma_read(target, len)
        } else if flags.contains(Control::WRITE) {
            // Nothing here can be written.
            false
        } else {
            if flags.contains(Control::SKIP) {
                self.position += self.rest().len().min(len as usize);
            }
            true
        };
        let result = if done { Control::empty() } else { Control::ERROR };
        // The descriptor was readable; in ROM it keeps its value, and the guest waits for itself.
        self.memory.write(address, &result.bits().to_be_bytes());
    }

    fn dma_read(&mut self, mut address: u64, len: u32) -> bool {
        let mut left = len as usize;
        let mut chunk = [0; CHUNK];
        while left > 0 {
            let part = &mut chunk[..left.min(CHUNK)];
            self.take(part);
            let Some(next) = address.checked_add(part.len() as u64) else { return false };
            if !self.memory.write(address, part) {
                return false;
            }
            left -= part.len();
            address = next;
        }
        true
    }
}

/// The file directory: their count, and of each its size, its key and its name.
fn directory(files: &[(String, Vec<u8>)]) -> Vec<u8> {
    let mut bytes = (files.len() as u32).to_be_bytes().to_vec();
    for (key, (name, contents)) in (key::FIRST_FILE..).zip(files) {
        bytes.extend((contents.len() as u32).to_be_bytes());
        bytes.extend(key.to_be_bytes());
        bytes.extend([0; 2]);
        let mut field = [0; NAME_SIZE];
        let len = name.len().min(MAX_NAME);
        field[..len].copy_from_slice(&name.as_bytes()[..len]);
        bytes.extend(field);
    }
    bytes
}

impl Device for FwCfg {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        match offset {
            SELECTOR | DATA => self.take(data),
            DMA_HIGH.. => {
                data.fill(0xff);
                let signature = DMA_SIGNATURE.iter().skip((offset - DMA_HIGH).min(8) as usize);
                for (to, from) in data.iter_mut().zip(signature) {
                    *to = *from;
                }
            }
            _ => data.fill(0xff),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (SELECTOR, &[low, high]) => self.select(u16::from_le_bytes([low, high])),
            (DMA_HIGH, &[a, b, c, d]) => self.dma_high = u32::from_be_bytes([a, b, c, d]),
            (DMA_LOW, &[a, b, c, d]) => {
                let low = u32::from_be_bytes([a, b, c, d]);
                let high = std::mem::take(&mut self.dma_high);
                self.dma(u64::from(high) << 32 | u64::from(low));
            }
            _ => {}
        }
    }

    fn register(&self, offset: u64, write: bool) -> &'static str {
        match offset {
            SELECTOR if write => "SELECTOR",
            SELECTOR | DATA => "DATA",
            DMA_HIGH.. => "DMA",
            _ => "none",
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    /// Memory from address 0 on.
    #[derive(Clone)]
    struct Ram(Arc<Mutex<Vec<u8>>>);

    impl Ram {
        fn new() -> Self {
            Self(Arc::new(Mutex::new(vec![0xcc; 0x4000])))
        }

        fn bytes(&self, address: usize, len: usize) -> Vec<u8> {
            self.0.lock().unwrap()[address..address + len].to_vec()
        }
    }

    impl DmaMemory for Ram {
        fn read(&self, address: u64, data: &mut [u8]) -> bool {
            let ram = self.0.lock().unwrap();
            let start = usize::try_from(address).unwrap_or(usize::MAX);
            let Some(bytes) = ram.get(start..start.saturating_add(data.len())) else { return false };
            data.copy_from_slice(bytes);
            true
        }

        fn write(&self, address: u64, data: &[u8]) -> bool {
            let mut ram = self.0.lock().unwrap();
            let start = usize::try_from(address).unwrap_or(usize::MAX);
            let Some(bytes) = ram.get_mut(start..start.saturating_add(data.len())) else { return false };
            bytes.copy_from_slice(data);
            true
        }
    }

    fn device(memory: &Ram) -> FwCfg {
        let files = vec![("etc/one".into(), vec![1; 5]), ("etc/two".into(), (0..100).collect())];
        FwCfg::new(
            &FwCfgConfig { memory: 3 << 30, cpus: 4, boot_menu: true, files },
            Box::new(memory.clone()),
        )
    }

    fn item(device: &mut FwCfg, key: u16, len: usize) -> Vec<u8> {
        device.write(0, &key.to_le_bytes());
        let byte = |_| {
            let mut byte = [0xaa];
            device.read(1, &mut byte);
            byte[0]
        };
        (0..len).map(byte).collect()
    }

    #[test]
    fn numbers_are_read_byte_by_byte_and_end_in_zeros() {
        let mut device = device(&Ram::new());
        assert_eq!(item(&mut device, 0, 6), b"QEMU\0\0");
        assert_eq!(item(&mut device, 1, 4), [3, 0, 0, 0]);
        assert_eq!(item(&mut device, 3, 8), (3u64 << 30).to_le_bytes());
        assert_eq!(item(&mut device, 5, 3), [4, 0, 0]);
        assert_eq!(item(&mut device, 0x0f, 2), [4, 0]);
        assert_eq!(item(&mut device, 0x0e, 2), [1, 0]);
        assert_eq!(item(&mut device, 0x7777, 2), [0, 0]);
    }

    #[test]
    fn files_are_found_by_name_in_the_directory() {
        let mut device = device(&Ram::new());
        let directory = item(&mut device, 0x19, 4 + 2 * 64);
        assert_eq!(directory[..4], 2u32.to_be_bytes());
        let second = &directory[4 + 64..];
        assert_eq!((second[..4].to_vec(), &second[8..16]), (vec![0, 0, 0, 100], &b"etc/two\0"[..]));
        let key = u16::from_be_bytes([second[4], second[5]]);
        assert_eq!(item(&mut device, key, 100), (0..100).collect::<Vec<u8>>());
    }

    /// Runs a descriptor at 0x1000; gives its control word afterwards.
    fn dma(device: &mut FwCfg, memory: &Ram, control: u32, len: u32, address: u64) -> u32 {
        let descriptor = [&control.to_be_bytes()[..], &len.to_be_bytes(), &address.to_be_bytes()].concat();
        assert!(memory.write(0x1000, &descriptor));
        device.write(4, &[0; 4]);
        device.write(8, &0x1000u32.to_be_bytes());
        u32::from_be_bytes(memory.bytes(0x1000, 4).try_into().unwrap())
    }

    #[test]
    fn dma_selects_skips_and_reads_in_one_go() {
        let memory = Ram::new();
        let mut device = device(&memory);
        let mut signature = [0; 8];
        device.read(4, &mut signature);
        assert_eq!(&signature, b"QEMU CFG");
        assert_eq!(dma(&mut device, &memory, 0x21 << 16 | 8 | 4, 90, 0), 0);
        assert_eq!(dma(&mut device, &memory, 2, 12, 0x2000), 0);
        assert_eq!(memory.bytes(0x2000, 13), [90, 91, 92, 93, 94, 95, 96, 97, 98, 99, 0, 0, 0xcc]);
    }

    #[test]
    fn dma_to_where_no_ram_is_and_writes_fail() {
        let memory = Ram::new();
        let mut device = device(&memory);
        assert_eq!(dma(&mut device, &memory, 8 | 2, u32::MAX, 0x3000), 1);
        assert_eq!(dma(&mut device, &memory, 8 | 2, 8, u64::MAX - 3), 1);
        assert_eq!(dma(&mut device, &memory, 0x20 << 16 | 8 | 16, 1, 0x2000), 1);
        // A descriptor that is not in RAM does nothing.
        device.write(4, &u32::MAX.to_be_bytes());
        device.write(8, &u32::MAX.to_be_bytes());
    }

    #[test]
    fn no_access_panics() {
        crate::fuzz::exercise(|_| Arc::new(Mutex::new(device(&Ram::new()))));
    }
}
