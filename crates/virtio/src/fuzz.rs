//! Random drivers, for the tests of all devices: whatever they write to rings, buffers, configuration and registers, the
//! device neither panics nor goes on for ever, and works again after a reset.

use std::sync::{Arc, Mutex};

use devices::bus::{Device as Registers, MachineBus};
use devices::irq::RecordedLines;
use devices::pci::{ConfigWrite, PciFunction, RecordedMessages};

use crate::queue::QueueConfig;
use crate::testing::{BUFFERS, Buffer, Driver, RAM, ROM, Rig, memory};
use crate::transport::Status;
use crate::transport::mmio::VirtioMmio;
use crate::transport::pci::{Connections, VirtioPci};
use crate::{Device, features};

/// Drivers for each device, and what each of them does.
const DRIVERS: u64 = 60;
const STEPS: u32 = 150;
/// Register accesses for each device and transport.
const ACCESSES: u32 = 40_000;

/// A sequence that is the same each time (xorshift64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Below `limit`.
    fn below(&mut self, limit: u64) -> u64 {
        (self.next() >> 16) % limit
    }

    /// Once in so many times.
    fn seldom(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }

    /// An address: mostly of a buffer, at times of the rings, the edges of RAM and ROM, or anywhere.
    fn address(&mut self) -> u64 {
        let near = self.below(64).wrapping_sub(32);
        match self.below(32) {
            0 => 0x1000 + self.below(0x8000),
            1 => RAM.wrapping_add(near),
            2 => ROM.wrapping_add(near),
            3 => self.next(),
            4 => near,
            _ => BUFFERS + self.below(0x1_0000),
        }
    }

    fn len(&mut self) -> u32 {
        match self.below(16) {
            0 => 0,
            1 => self.next() as u32,
            2 => 4096,
            3..=8 => [1, 7, 8, 10, 12, 16][self.below(6) as usize],
            _ => self.below(600) as u32,
        }
    }

    fn buffers(&mut self) -> Vec<Buffer> {
        let count = self.below(5) + 1;
        let first_writable = self.below(count + 1);
        (0..count)
            .map(|index| {
                let writable = (index >= first_writable) ^ self.seldom(40);
                (self.address(), self.len(), writable)
            })
            .collect()
    }

    /// Fills buffers with small numbers: what requests consist of.
    fn fill(&mut self, rig: &Rig) {
        for _ in 0..16 {
            let words: Vec<u8> = (0..8)
                .flat_map(|_| {
                    let word = self.next() as u32;
                    (if word & 3 == 0 { word >> 2 } else { word >> 2 & 0xf }).to_le_bytes()
                })
                .collect();
            rig.drivers[0].put(BUFFERS + self.below(0x1_0000 - 32), &words);
        }
    }
}

/// Lets random drivers loose on devices that `make` makes, by their queues and by the registers of both transports.
pub(crate) fn exercise(make: impl Fn() -> Box<dyn Device>) {
    for seed in 1..=DRIVERS {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let ring = [0, features::RING_PACKED][seed as usize % 2];
        let more = [0, features::EVENT_IDX, features::INDIRECT_DESC][seed as usize % 3];
        let own = make().features();
        let mut rig = Rig::new(make(), 16, ring | more | own);
        rig.drivers.iter_mut().for_each(Driver::expect_no_order);
        for _ in 0..STEPS {
            drive(&mut rig, &mut random);
        }
        rig.restart();
        assert_eq!(rig.status().bits(), 0xf, "it works again after a reset");
        rig.reset();
    }
    pci(&make);
    mmio(&make);
}

/// One thing that a driver does.
fn drive(rig: &mut Rig, random: &mut Random) {
    let queue = random.below(rig.drivers.len() as u64) as u16;
    match random.below(16) {
        0 => random.fill(rig),
        1 => drop(rig.config(random.below(80), 1 << random.below(4))),
        2 => {
            let bytes = random.next().to_le_bytes();
            rig.write_config(random.below(80), &bytes[..1 << random.below(4)]);
        }
        3 => rig.notify(random.next() as u16),
        4 if random.seldom(4) => {
            // Garbage in the rings.
            let QueueConfig { descriptors, .. } = rig.drivers[usize::from(queue)].config;
            let bytes = random.next().to_le_bytes();
            rig.drivers[0].put(descriptors + random.below(0x7000), &bytes[..1 << random.below(4)]);
            rig.notify(queue);
        }
        _ => {
            let buffers = random.buffers();
            rig.send(queue, &buffers);
            while rig.drivers[usize::from(queue)].used().is_some() {}
        }
    }
    rig.take_events();
    if rig.status().contains(Status::NEEDS_RESET) {
        rig.restart();
    }
}

/// A value for a register: small ones, those of the status, addresses.
fn value(random: &mut Random) -> u64 {
    match random.below(6) {
        0 => random.next(),
        1 => [0, 1, 3, 0xb, 0xf, 0x4f, 0x80][random.below(7) as usize],
        2 => random.address() & !0xf,
        _ => random.below(20),
    }
}

fn pci(make: &impl Fn() -> Box<dyn Device>) {
    let mut random = Random(0x1234_5678_9abc_def1);
    let lines = RecordedLines::new();
    let connections = Connections {
        bus: Arc::new(MachineBus::new()),
        memory: memory(),
        withheld: 0,
        messages: RecordedMessages::new(),
        line: lines.line(17),
    };
    let function: Arc<Mutex<VirtioPci>> = VirtioPci::new(make(), connections).unwrap();
    let mut function = function.lock().unwrap();
    for _ in 0..ACCESSES {
        let within = if random.seldom(8) { 0x1000 } else { 0x40 };
        let offset = random.below(9) * 0x1000 + random.below(within);
        let (len, value) = (1 << random.below(4), value(&mut random));
        match random.below(16) {
            0 => drop(function.read_config((random.below(64) * 4) as u16)),
            1 => {
                let write = ConfigWrite { value: value as u32, mask: u32::MAX };
                function.write_config((random.below(64) * 4) as u16, write);
            }
            2 => function.write_config(4, ConfigWrite { value: 6, mask: 0xffff }),
            3..=6 => function.read(offset, &mut vec![0; len]),
            _ => function.write(offset, &value.to_le_bytes()[..len]),
        }
    }
    function.power_cycle();
}

fn mmio(make: &impl Fn() -> Box<dyn Device>) {
    let mut random = Random(0xfeed_5678_9abc_def1);
    let lines = RecordedLines::new();
    let mut device = VirtioMmio::new(make(), memory(), 0, lines.line(5));
    for _ in 0..ACCESSES {
        let (offset, value) = (random.below(0x50) * 4, value(&mut random));
        match random.below(16) {
            0 => device.write(random.below(0x200), &value.to_le_bytes()[..1 << random.below(4)]),
            1..=5 => device.read(offset, &mut [0; 4]),
            _ => device.write(offset, &(value as u32).to_le_bytes()),
        }
    }
    device.power_cycle();
}

#[cfg(test)]
mod tests {
    use super::*;
    use disk::Format;

    use crate::balloon::{Balloon, BalloonOptions};
    use crate::block::{Block, BlockOptions, Limits};
    use crate::console::{Console, PortKind};
    use crate::pmem::{Pmem, PmemOptions};
    use crate::rng::Rng;
    use crate::vsock::Vsock;

    #[test]
    fn the_entropy_device_survives_random_drivers() {
        exercise(|| Box::new(Rng::new(Box::new(std::io::repeat(7)))));
    }

    #[test]
    fn the_balloon_survives_random_drivers() {
        let options = BalloonOptions { size: 1 << 20, deflate_on_oom: true, free_page_reporting: true };
        exercise(|| Box::new(Balloon::new(options).0));
    }

    #[test]
    fn persistent_memory_survives_random_drivers() {
        exercise(|| {
            let mut flushes = 0;
            let sync = move || {
                flushes += 1;
                if flushes % 8 == 0 { Err(std::io::Error::other("now and then")) } else { Ok(()) }
            };
            let (range, label) = (ROM..ROM + 0x1000, "a file".to_owned());
            Box::new(Pmem::new(PmemOptions { range, read_only: true, label, sync: Box::new(sync) }))
        });
    }

    #[test]
    fn the_socket_device_survives_random_drivers() {
        let folder = tempfile::tempdir().unwrap();
        let made = std::cell::Cell::new(0);
        exercise(|| {
            made.set(made.get() + 1);
            let path = folder.path().join(made.get().to_string());
            let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
            Box::new(Vsock::new(3, listener, &path).unwrap())
        });
    }

    #[test]
    fn the_console_survives_random_drivers() {
        exercise(|| Box::new(Console::new(vec![PortKind::Console], (80, 25)).0));
        let kinds = vec![PortKind::Console, PortKind::Channel("a".into()), PortKind::Channel("b".into())];
        exercise(|| Box::new(Console::new(kinds.clone(), (80, 25)).0));
    }

    /// Lets random drivers loose on a disk of 1 MiB, opened as `change` says; the folder with the image, and
    /// with what it was before.
    fn exercise_block(
        format: Format,
        threads: bool,
        limits: Limits,
        change: impl Fn(&mut disk::Options),
    ) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        disk::create(&disk::Creation::new(&path, format, 1 << 20)).unwrap();
        std::fs::copy(&path, folder.path().join("before")).unwrap();
        let mut image = disk::Options { format: Some(format), ..disk::Options::new(&path) };
        change(&mut image);
        exercise(|| {
            let (label, serial) = ("image".to_owned(), "disk0".to_owned());
            let disk = disk::open(&image).unwrap();
            let block = Block::new(BlockOptions { disk, label, serial, queues: 2, limits });
            Box::new(if threads { block } else { block.without_threads() })
        });
        folder
    }

    #[test]
    fn disks_of_either_format_survive_random_drivers() {
        for threads in [true, false] {
            for format in [Format::Raw, Format::Qcow2] {
                let folder = exercise_block(format, threads, Limits::default(), |_| {});
                let image = folder.path().join("image");
                assert_eq!(disk::open(&disk::Options::new(&image)).unwrap().size(), 1 << 20);
                if format == Format::Qcow2 {
                    let found = disk::qcow2::check(&image).unwrap();
                    assert!(found.is_clean(), "{found:?}");
                }
            }
        }
    }

    #[test]
    fn read_only_disks_and_snapshots_survive_random_drivers_and_keep_their_bytes() {
        for format in [Format::Raw, Format::Qcow2] {
            for read_only in [true, false] {
                let change = |image: &mut disk::Options| {
                    (image.read_only, image.snapshot) = (read_only, !read_only);
                };
                let folder = exercise_block(format, true, Limits::default(), change);
                let bytes = |name| std::fs::read(folder.path().join(name)).unwrap();
                assert!(bytes("image") == bytes("before"), "{format:?} {read_only}");
            }
        }
    }

    #[test]
    fn disks_with_limits_or_without_the_page_cache_survive_random_drivers() {
        let limits = Limits { iops: Some(20_000), bps: Some(1 << 30) };
        exercise_block(Format::Raw, true, limits, |_| {});
        exercise_block(Format::Raw, true, Limits::default(), |image| image.cache = disk::Cache::Direct);
    }
}
