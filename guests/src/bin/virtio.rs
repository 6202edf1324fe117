//! A hostile driver of the virtio entropy device, in memory at 0xfec1_0000 or as PCI function 00:01.0: each ring that
//! breaks the rules ends in DEVICE_NEEDS_RESET and nothing worse, and after a reset the device works. *Virtual I/O Device
//! (VIRTIO) Version 1.2, Basic Facilities of a Virtio Device*.
#![no_std]
#![no_main]

use guests::port;
use guests::report::{self, Many};

guests::guest!(main);

/// Where the device is: in memory, or where this guest puts its first base address register.
const MMIO: u64 = 0xfec1_0000;
const BAR: u64 = 0xd000_0000;
/// The entropy device's id, and what it has on PCI.
const ENTROPY: u32 = 4;
const PCI_ID: u32 = 0x1044_1af4;

/// The guest's memory: the rings and a buffer, and where RAM of 256 MiB ends.
const DESCRIPTORS: u64 = 0x400_0000;
const DRIVER: u64 = 0x400_1000;
const USED: u64 = 0x400_2000;
const TABLE: u64 = 0x400_3000;
const BUFFER: u64 = 0x400_4000;
const RAM_END: u64 = 0x1000_0000;
const ROM: u64 = 0xe_0000;
/// Entries of the ring.
const SIZE: u16 = 8;

const VERSION_1: u64 = 1 << 32;
const INDIRECT_DESC: u64 = 1 << 28;
const RING_PACKED: u64 = 1 << 34;
const NEEDS_RESET: u32 = 0x40;
/// Flags of descriptors.
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// An available descriptor of a packed ring in its first round.
const AVAILABLE: u16 = 1 << 7;

fn main() {
    let Some(device) = Device::find() else {
        report::skip("virtio", "the machine has no entropy device");
        return;
    };
    works(&device, "at first");
    areas(&device);
    split(&device);
    packed(&device);
    works(&device, "after all");
}

fn write<T>(address: u64, value: T) {
    // SAFETY: this guest's memory, or a device's registers.
    unsafe { (address as *mut T).write_volatile(value) };
}

fn read<T>(address: u64) -> T {
    // SAFETY: as above.
    unsafe { (address as *const T).read_volatile() }
}

/// The device by its registers, of either transport.
enum Device {
    Mmio,
    Pci,
}

/// Where the queue's areas are.
#[derive(Clone, Copy)]
struct Areas {
    size: u16,
    descriptors: u64,
    driver: u64,
    device: u64,
}

const AREAS: Areas = Areas { size: SIZE, descriptors: DESCRIPTORS, driver: DRIVER, device: USED };

impl Device {
    fn find() -> Option<Self> {
        let config = |offset: u32| port::write32(0xcf8, 0x8000_0800 | offset);
        config(0);
        if port::read32(0xcfc) == PCI_ID {
            for (offset, value) in [(0x10, BAR as u32), (0x14, 0), (0x04, 6)] {
                config(offset);
                port::write32(0xcfc, value);
            }
            return Some(Self::Pci);
        }
        let there = read::<u32>(MMIO) == 0x7472_6976 && read::<u32>(MMIO + 8) == ENTROPY;
        there.then_some(Self::Mmio)
    }

    fn status(&self) -> u32 {
        match self {
            Self::Mmio => read(MMIO + 0x70),
            Self::Pci => read::<u8>(BAR + 0x14).into(),
        }
    }

    fn set_status(&self, value: u8) {
        match self {
            Self::Mmio => write(MMIO + 0x70, u32::from(value)),
            Self::Pci => write(BAR + 0x14, value),
        }
    }

    fn notify(&self) {
        match self {
            Self::Mmio => write(MMIO + 0x50, 0u32),
            Self::Pci => write(BAR + 0x3000, 0u16),
        }
    }

    /// Resets the device and starts it again, with rings of zeros.
    fn start(&self, features: u64, areas: Areas) {
        self.set_status(0);
        for word in 0..0x4000 / 8 {
            write(DESCRIPTORS + 8 * word, 0u64);
        }
        self.set_status(3);
        for half in 0..2u32 {
            let word = ((features | VERSION_1) >> (32 * half)) as u32;
            let (select, value) = match self {
                Self::Mmio => (MMIO + 0x24, MMIO + 0x20),
                Self::Pci => (BAR + 0x08, BAR + 0x0c),
            };
            write(select, half);
            write(value, word);
        }
        self.set_status(0xb);
        let places = [areas.descriptors, areas.driver, areas.device];
        match self {
            Self::Mmio => {
                write(MMIO + 0x30, 0u32);
                write(MMIO + 0x38, u32::from(areas.size));
                for (offset, place) in [0x80, 0x90, 0xa0].into_iter().zip(places) {
                    write(MMIO + offset, place as u32);
                    write(MMIO + offset + 4, (place >> 32) as u32);
                }
                write(MMIO + 0x44, 1u32);
            }
            Self::Pci => {
                write(BAR + 0x16, 0u16);
                write(BAR + 0x18, areas.size);
                for (offset, place) in [0x20, 0x28, 0x30].into_iter().zip(places) {
                    write(BAR + offset, place as u32);
                    write(BAR + offset + 4, (place >> 32) as u32);
                }
                write(BAR + 0x1c, 1u16);
            }
        }
        self.set_status(0xf);
    }
}

/// A descriptor as the split ring has it, or the packed one, whose last two fields are the other way round.
fn descriptor(table: u64, index: u64, (address, len): (u64, u32), last: (u16, u16)) {
    let at = table + 16 * index;
    write(at, address);
    write(at + 8, len);
    write(at + 12, last.0);
    write(at + 14, last.1);
}

/// Makes the split ring's descriptor `head` available, with the index going on to `index`.
fn publish(head: u16, index: u16) {
    write(DRIVER + 4, head);
    write(DRIVER + 2, index);
}

/// A request in either format is filled with bytes.
fn works(device: &Device, when: &'static str) {
    let mut many = Many::new("a request is filled");
    for (name, format) in [("split", 0), ("packed", RING_PACKED)] {
        device.start(format, AREAS);
        write(BUFFER, [0u64; 4]);
        if format == 0 {
            descriptor(DESCRIPTORS, 0, (BUFFER, 32), (WRITE, 0));
            publish(0, 1);
        } else {
            descriptor(DESCRIPTORS, 0, (BUFFER, 32), (0, WRITE | AVAILABLE));
        }
        device.notify();
        let len = if format == 0 { read::<u32>(USED + 8) } else { read::<u32>(DESCRIPTORS + 8) };
        let filled = read::<[u64; 4]>(BUFFER) != [0; 4];
        many.equal(format_args!("{when}, {name}"), (device.status(), len, filled), (0xf, 32, true));
    }
    many.finish();
}

/// The device asks for a reset, and its status says it still after another notification.
fn refused(many: &mut Many, device: &Device, case: &'static str) {
    device.notify();
    device.notify();
    many.equal(case, device.status() & NEEDS_RESET, NEEDS_RESET);
}

fn areas(device: &Device) {
    let mut many = Many::new("areas that cannot be");
    let cases = [
        ("descriptors behind the RAM", Areas { descriptors: RAM_END, ..AREAS }),
        ("descriptors across its end", Areas { descriptors: RAM_END - 64, ..AREAS }),
        ("descriptors in a device", Areas { descriptors: 0xfee0_0000, ..AREAS }),
        ("descriptors at the end of all addresses", Areas { descriptors: u64::MAX - 15, ..AREAS }),
        ("descriptors on an odd address", Areas { descriptors: DESCRIPTORS + 8, ..AREAS }),
        ("the driver's area behind the RAM", Areas { driver: 1 << 40, ..AREAS }),
        ("the device's area in the ROM", Areas { device: ROM, ..AREAS }),
        ("the device's area across the RAM's end", Areas { device: RAM_END - 4, ..AREAS }),
        ("a size that is too large", Areas { size: 1024, ..AREAS }),
        ("a size of none", Areas { size: 0, ..AREAS }),
    ];
    for (case, areas) in cases {
        device.start(0, areas);
        refused(&mut many, device, case);
    }
    many.finish();
}

/// Buffers that no device may touch.
const BUFFERS: [(&str, u64, u32); 8] = [
    ("behind the RAM", RAM_END, 16),
    ("across the RAM's end", RAM_END - 8, 16),
    ("in the ROM", ROM, 16),
    ("from the RAM into the hole", 0x9_fff8, 16),
    ("in the device's own registers", MMIO, 16),
    ("in a base address register", BAR, 16),
    ("round the end of all addresses", u64::MAX - 7, 16),
    ("of no bytes", BUFFER, 0),
];

fn split(device: &Device) {
    let mut many = Many::new("split rings");
    for (case, address, len) in BUFFERS {
        device.start(0, AREAS);
        descriptor(DESCRIPTORS, 0, (address, len), (WRITE, 0));
        publish(0, 1);
        refused(&mut many, device, case);
    }
    let entry = (BUFFER, 16);
    let cases: [(&str, u64, u16, u16, &[((u64, u32), (u16, u16))]); 9] = [
        ("a chain that goes round", 0, 0, 1, &[(entry, (NEXT | WRITE, 0))]),
        (
            "a chain of two that goes round",
            0,
            0,
            1,
            &[(entry, (NEXT | WRITE, 1)), (entry, (NEXT | WRITE, 0))],
        ),
        ("a chain that leaves the table", 0, 0, 1, &[(entry, (NEXT | WRITE, SIZE))]),
        ("a head that is not in the table", 0, SIZE, 1, &[]),
        ("a head far away", 0, 0xffff, 1, &[]),
        ("an index that jumps", 0, 0, SIZE + 1, &[(entry, (WRITE, 0))]),
        ("an index that jumps back", 0, 0, 0xffff, &[(entry, (WRITE, 0))]),
        ("a buffer to read behind one to write", 0, 0, 1, &[(entry, (NEXT | WRITE, 1)), (entry, (0, 0))]),
        ("a table without the feature", 0, 0, 1, &[((TABLE, 16), (INDIRECT, 0))]),
    ];
    for (case, features, head, index, chain) in cases {
        device.start(features, AREAS);
        for (at, &(place, last)) in (0..).zip(chain) {
            descriptor(DESCRIPTORS, at, place, last);
        }
        publish(head, index);
        refused(&mut many, device, case);
    }
    let tables: [(&str, (u64, u32), u16, (u16, u16)); 7] = [
        ("a table of a part of a descriptor", (TABLE, 17), INDIRECT, (WRITE, 0)),
        ("an empty table", (TABLE, 0), INDIRECT, (WRITE, 0)),
        ("a table of 256 MiB", (0, 0x1000_0000), INDIRECT, (WRITE, 0)),
        ("a table behind the RAM", (RAM_END, 16), INDIRECT, (WRITE, 0)),
        ("a table with more behind it", (TABLE, 16), INDIRECT | NEXT, (WRITE, 0)),
        ("a table in a table", (TABLE, 16), INDIRECT, (INDIRECT, 0)),
        ("a table that goes round", (TABLE, 32), INDIRECT, (WRITE | NEXT, 0)),
    ];
    for (case, table, flags, inner) in tables {
        device.start(INDIRECT_DESC, AREAS);
        descriptor(TABLE, 0, (BUFFER, 16), inner);
        descriptor(DESCRIPTORS, 0, table, (flags, 0));
        publish(0, 1);
        refused(&mut many, device, case);
    }
    many.finish();
}

fn packed(device: &Device) {
    let mut many = Many::new("packed rings");
    for (case, address, len) in BUFFERS {
        device.start(RING_PACKED, AREAS);
        descriptor(DESCRIPTORS, 0, (address, len), (0, WRITE | AVAILABLE));
        refused(&mut many, device, case);
    }
    device.start(RING_PACKED, AREAS);
    for index in 0..u64::from(SIZE) {
        descriptor(DESCRIPTORS, index, (BUFFER, 16), (0, WRITE | NEXT | AVAILABLE));
    }
    refused(&mut many, device, "a chain without an end");
    device.start(RING_PACKED, AREAS);
    descriptor(DESCRIPTORS, 1, (BUFFER, 16), (0, AVAILABLE));
    descriptor(DESCRIPTORS, 0, (BUFFER, 16), (0, WRITE | NEXT | AVAILABLE));
    refused(&mut many, device, "a buffer to read behind one to write");
    device.start(RING_PACKED | INDIRECT_DESC, AREAS);
    descriptor(TABLE, 0, (BUFFER, 16), (0, INDIRECT));
    descriptor(DESCRIPTORS, 0, (TABLE, 16), (0, INDIRECT | AVAILABLE));
    refused(&mut many, device, "a table in a table");
    device.start(RING_PACKED | INDIRECT_DESC, AREAS);
    descriptor(TABLE, 0, (RAM_END, 16), (0, WRITE));
    descriptor(DESCRIPTORS, 0, (TABLE, 16), (0, INDIRECT | AVAILABLE));
    refused(&mut many, device, "a table with a buffer behind the RAM");
    many.finish();
}
