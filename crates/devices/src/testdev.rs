//! What suites of bare-metal unit tests expect of a machine that they run in: ports and memory that keep what is
//! written to them, and ports that drive the I/O APIC's lines.
//!
//! ```text
//! port   0xe0 - 0xe3          4 bytes that read back what was written, in accesses of 8, 16 and 32 bits
//! port   0x2000 + n           n below 24: a write of 1 raises line n, one of 0 lowers it
//! memory 0xff00_0000, 64 KiB  the same as RAM, but for that each access is a device's
//! ```

use engine::Space;

use crate::bus::{Device, Window};
use crate::irq::IrqLine;

/// Lines that can be driven.
pub const LINES: usize = 24;
/// Bytes of memory.
const MEMORY: usize = 64 * 1024;
/// Bytes behind the ports.
const LATCH: usize = 4;

/// The device's offsets of its three ranges.
const LATCH_OFFSET: u64 = 0;
const LINES_OFFSET: u64 = 0x100;
const MEMORY_OFFSET: u64 = 0x1_0000;

/// Where it is mapped.
pub const WINDOWS: [Window; 3] = [
    Window { space: Space::Port, base: 0xe0, len: LATCH as u64, offset: LATCH_OFFSET },
    Window { space: Space::Port, base: 0x2000, len: LINES as u64, offset: LINES_OFFSET },
    Window { space: Space::Memory, base: 0xff00_0000, len: MEMORY as u64, offset: MEMORY_OFFSET },
];

/// The device.
pub struct TestDevice {
    latch: [u8; LATCH],
    memory: Box<[u8]>,
    lines: Vec<IrqLine>,
}

impl TestDevice {
    /// A device that drives `lines`, of which it has at most [`LINES`].
    pub fn new(lines: Vec<IrqLine>) -> Self {
        Self { latch: [0; LATCH], memory: vec![0; MEMORY].into(), lines }
    }

    /// The bytes from `offset` on that keep what is written to them; none where there are no such bytes.
    fn bytes(&mut self, offset: u64) -> &mut [u8] {
        let (bytes, start): (&mut [u8], u64) = match offset {
            MEMORY_OFFSET.. => (&mut self.memory, MEMORY_OFFSET),
            LINES_OFFSET.. => (&mut [], LINES_OFFSET),
            _ => (&mut self.latch, LATCH_OFFSET),
        };
        let start = usize::try_from(offset - start).unwrap_or(usize::MAX);
        bytes.get_mut(start..).unwrap_or_default()
    }
}

impl Device for TestDevice {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        for (to, from) in data.iter_mut().zip(self.bytes(offset)) {
            *to = *from;
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        for (to, from) in self.bytes(offset).iter_mut().zip(data) {
            *to = *from;
        }
        // One line for each access, whatever its width: the bytes above the first belong to no other line.
        let line = offset.checked_sub(LINES_OFFSET).and_then(|line| usize::try_from(line).ok());
        if let (Some(line), [level, ..]) = (line.and_then(|line| self.lines.get(line)), data) {
            line.set(*level != 0);
        }
    }

    fn register(&self, offset: u64, _write: bool) -> &'static str {
        match offset {
            MEMORY_OFFSET.. => "MEMORY",
            LINES_OFFSET.. => "LINE",
            _ => "LATCH",
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::bus::MachineBus;
    use crate::irq::RecordedLines;
    use engine::Bus;

    fn on_a_bus() -> (MachineBus, Arc<RecordedLines>) {
        let (bus, lines) = (MachineBus::new(), RecordedLines::new());
        let driven = (0..LINES as u32).map(|number| lines.line(number)).collect();
        let device = Arc::new(Mutex::new(TestDevice::new(driven)));
        for window in WINDOWS {
            bus.insert_window(window, "testdev", device.clone()).unwrap();
        }
        (bus, lines)
    }

    fn read<const N: usize>(bus: &MachineBus, space: Space, address: u64) -> [u8; N] {
        let mut data = [0; N];
        bus.read(space, address, &mut data);
        data
    }

    #[test]
    fn ports_read_back_what_was_written_in_every_width() {
        let (bus, _) = on_a_bus();
        bus.write(Space::Port, 0xe0, &[1, 2, 3, 4]);
        assert_eq!(read(&bus, Space::Port, 0xe0), [1, 2, 3, 4]);
        bus.write(Space::Port, 0xe1, &[7]);
        bus.write(Space::Port, 0xe2, &[8, 9]);
        assert_eq!(read(&bus, Space::Port, 0xe0), [1, 7, 8, 9]);
        assert_eq!(read(&bus, Space::Port, 0xe3), [9]);
    }

    #[test]
    fn memory_keeps_what_is_written_to_it_up_to_its_last_byte() {
        let (bus, _) = on_a_bus();
        bus.write(Space::Memory, 0xff00_0000, &[1; 8]);
        bus.write(Space::Memory, 0xff00_fffc, &[2, 3, 4, 5]);
        assert_eq!(read(&bus, Space::Memory, 0xff00_0004), [1, 1, 1, 1, 0, 0, 0, 0]);
        assert_eq!(read(&bus, Space::Memory, 0xff00_fffe), [4, 5, 0xff, 0xff]);
    }

    #[test]
    fn ports_drive_the_lines() {
        let (bus, lines) = on_a_bus();
        bus.write(Space::Port, 0x2000 + 14, &[1]);
        assert!(lines.level(14));
        bus.write(Space::Port, 0x2000 + 14, &[0]);
        bus.write(Space::Port, 0x2000 + 23, &[1, 0, 0, 0]);
        bus.write(Space::Port, 0x2000 + 24, &[1]);
        assert_eq!(lines.take_changes(), [(14, true), (14, false), (23, true)]);
        assert_eq!(read(&bus, Space::Port, 0x2000), [0xff]);
    }

    #[test]
    fn no_access_panics() {
        crate::fuzz::exercise(|_| Arc::new(Mutex::new(TestDevice::new(vec![IrqLine::unconnected()]))));
    }
}
