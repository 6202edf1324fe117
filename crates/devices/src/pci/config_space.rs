use super::ConfigWrite;

/// What a function's header (type 0) says of it for good.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Base class, sub-class and programming interface, 8 bits each from the top.
    pub class: u32,
    /// Revision.
    pub revision: u8,
    /// Subsystem vendor id.
    pub subsystem_vendor: u16,
    /// Subsystem id.
    pub subsystem: u16,
    /// Interrupt pin: 0 for none, 1 for INTA# to 4 for INTD#.
    pub interrupt_pin: u8,
    /// The device has other functions.
    pub multifunction: bool,
}

/// What a base address register asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarKind {
    /// I/O ports.
    Io,
    /// Memory below 4 GiB.
    Memory32,
    /// Memory anywhere, prefetchable: the register has two double words.
    Memory64,
}

/// A base address register and where it points.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bar {
    /// Its kind.
    pub kind: BarKind,
    /// Its length in bytes, a power of two.
    pub size: u64,
    /// The first port or guest-physical address; none while the guest has its space disabled in the command register.
    pub base: Option<u64>,
}

/// Why a function cannot be built as it was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// No such base address register, or it is taken.
    #[error("base address register {0} is taken or does not exist")]
    NoBar(usize),
    /// The size is not a power of two in the kind's range.
    #[error("a base address register cannot have {0:#x} bytes")]
    BadSize(u64),
    /// More interrupt vectors than the capability can have, or none.
    #[error("a function cannot have {0} interrupt vectors")]
    BadVectors(u32),
    /// The capabilities leave no room.
    #[error("no room for a capability of {0} bytes")]
    NoRoom(usize),
}

// Double words of the header, by number.
const IDENTITY: usize = 0;
const COMMAND: usize = 1;
const CLASS: usize = 2;
const HEADER_TYPE: usize = 3;
const BAR_0: usize = 4;
const SUBSYSTEM: usize = 11;
const CAPABILITIES: usize = 13;
const INTERRUPT: usize = 15;

/// Command register: I/O space, memory space, bus master, parity response, SERR#, interrupt disable.
const COMMAND_WRITABLE: u32 = 0x0547;
const COMMAND_IO: u32 = 1 << 0;
const COMMAND_MEMORY: u32 = 1 << 1;
const COMMAND_MASTER: u32 = 1 << 2;
const COMMAND_NO_INTX: u32 = 1 << 10;
/// Status register: there is a list of capabilities.
const STATUS_CAPABILITIES: u32 = 1 << (16 + 4);
/// Status register: INTx is asserted.
const STATUS_INTERRUPT: u32 = 1 << (16 + 3);
/// Header type register: other functions follow.
const MULTIFUNCTION: u32 = 1 << 23;

const BAR_IO: u32 = 1;
const BAR_MEMORY_64_PREFETCHABLE: u32 = 0xc;

/// Where capabilities begin, after the header.
const FIRST_CAPABILITY: usize = 0x40;
/// Bytes that mechanism #1 reaches.
const SIZE: usize = 256;
const REGISTERS: usize = SIZE / 4;
const BARS: usize = 6;

/// A function's configuration space: a type 0 header, its base address registers and its capabilities.
///
/// Every register has a mask of the bits that the guest may change; all else is constant. Reads beyond the 256 bytes give
/// zeros: there are no extended capabilities.
#[derive(Clone, Debug)]
pub struct ConfigSpace {
    registers: [u32; REGISTERS],
    writable: [u32; REGISTERS],
    /// As they are after a reset.
    initial: [u32; REGISTERS],
    bars: [Option<(BarKind, u64)>; BARS],
    /// Offset of the last capability, 0 for none.
    last_capability: usize,
    /// The first byte that no capability has.
    free: usize,
}

impl ConfigSpace {
    /// The space of a function without base address registers and capabilities.
    pub fn new(header: &Header) -> Self {
        let mut registers = [0; REGISTERS];
        let mut writable = [0; REGISTERS];
        registers[IDENTITY] = u32::from(header.device) << 16 | u32::from(header.vendor);
        registers[CLASS] = header.class << 8 | u32::from(header.revision);
        registers[HEADER_TYPE] = if header.multifunction { MULTIFUNCTION } else { 0 };
        registers[SUBSYSTEM] = u32::from(header.subsystem) << 16 | u32::from(header.subsystem_vendor);
        registers[INTERRUPT] = u32::from(header.interrupt_pin) << 8;
        writable[COMMAND] = COMMAND_WRITABLE;
        // The cache line size, which conventional PCI keeps for software.
        writable[HEADER_TYPE] = 0xff;
        writable[INTERRUPT] = 0xff;
        let (bars, last_capability, free) = ([None; BARS], 0, FIRST_CAPABILITY);
        Self { initial: registers, registers, writable, bars, last_capability, free }
    }

    /// Gives the function base address register `index` (0 to 5; one of 64 bits has the next one too).
    ///
    /// # Errors
    /// [`ConfigError`] where the register is taken or `size` is none for its kind.
    pub fn add_bar(&mut self, index: usize, kind: BarKind, size: u64) -> Result<(), ConfigError> {
        let (least, most) = match kind {
            BarKind::Io => (4, 256),
            BarKind::Memory32 => (16, 1 << 31),
            BarKind::Memory64 => (16, 1 << 62),
        };
        if !size.is_power_of_two() || size < least || size > most {
            return Err(ConfigError::BadSize(size));
        }
        let registers = if kind == BarKind::Memory64 { 2 } else { 1 };
        let is_free =
            |index: usize| index < BARS && self.bars[index].is_none() && self.writable[BAR_0 + index] == 0;
        // A register of 64 bits so large that its low half has no writable bit still has its flags there.
        let is_upper_half =
            index > 0 && matches!(self.bars.get(index - 1), Some(Some((BarKind::Memory64, _))));
        if is_upper_half || !(index..index + registers).all(is_free) {
            return Err(ConfigError::NoBar(index));
        }
        let mask = !(size - 1);
        let flags = match kind {
            BarKind::Io => BAR_IO,
            BarKind::Memory32 => 0,
            BarKind::Memory64 => BAR_MEMORY_64_PREFETCHABLE,
        };
        self.set_initial(BAR_0 + index, flags);
        self.writable[BAR_0 + index] = mask as u32;
        if kind == BarKind::Memory64 {
            self.writable[BAR_0 + index + 1] = (mask >> 32) as u32;
        }
        self.bars[index] = Some((kind, size));
        Ok(())
    }

    /// Appends a capability with id `id`, whose bytes after its id and link are `body`, and gives its offset. The guest
    /// may change the bits of `writable`, which has a byte for each of `body` or fewer.
    ///
    /// # Errors
    /// [`ConfigError::NoRoom`] where it does not fit into the 256 bytes.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> Result<u8, ConfigError> {
        let (offset, len) = (self.free, body.len() + 2);
        if offset + len > SIZE {
            return Err(ConfigError::NoRoom(len));
        }
        for (index, &byte) in [id, 0].iter().chain(body).enumerate() {
            self.set_initial_byte(offset + index, byte);
        }
        for (index, &mask) in writable.iter().take(body.len()).enumerate() {
            let at = offset + 2 + index;
            self.writable[at / 4] |= u32::from(mask) << (8 * (at % 4));
        }
        let link = if self.last_capability == 0 { CAPABILITIES * 4 } else { self.last_capability + 1 };
        self.set_initial_byte(link, offset as u8);
        self.set_initial(COMMAND, self.initial[COMMAND] | STATUS_CAPABILITIES);
        self.last_capability = offset;
        self.free = (offset + len).next_multiple_of(4);
        Ok(offset as u8)
    }

    /// The reset of the machine.
    pub fn reset(&mut self) {
        self.registers = self.initial;
    }

    /// Reads the double word at `offset`.
    pub fn read(&self, offset: u16) -> u32 {
        self.registers.get(usize::from(offset) / 4).copied().unwrap_or(0)
    }

    /// Writes the double word at `offset`, and gives what the register was before.
    pub fn write(&mut self, offset: u16, write: ConfigWrite) -> u32 {
        let index = usize::from(offset) / 4;
        let Some(&before) = self.registers.get(index) else { return 0 };
        let writable = self.writable[index];
        self.registers[index] = before & !writable | write.merge(before) & writable;
        before
    }

    /// Sets the double word at `offset`, whatever the guest may change of it: a register that shows the function's state.
    pub fn set(&mut self, offset: u16, value: u32) {
        if let Some(register) = self.registers.get_mut(usize::from(offset) / 4) {
            *register = value;
        }
    }

    /// Lets the guest change the bits of `mask` in the byte at `offset`, a register of the function's own.
    pub fn make_writable(&mut self, offset: u16, mask: u8) {
        let offset = usize::from(offset);
        if let Some(writable) = self.writable.get_mut(offset / 4) {
            *writable |= u32::from(mask) << (8 * (offset % 4));
        }
    }

    /// Base address register `index`, where the function has one.
    pub fn bar(&self, index: usize) -> Option<Bar> {
        let (kind, size) = (*self.bars.get(index)?)?;
        let low = u64::from(self.registers[BAR_0 + index]);
        let (base, enable) = match kind {
            BarKind::Io => (low & !3, COMMAND_IO),
            BarKind::Memory32 => (low & !0xf, COMMAND_MEMORY),
            BarKind::Memory64 => {
                (low & !0xf | u64::from(self.registers[BAR_0 + index + 1]) << 32, COMMAND_MEMORY)
            }
        };
        let base = (self.registers[COMMAND] & enable != 0).then_some(base);
        Some(Bar { kind, size, base })
    }

    /// Whether the function may read and write memory.
    pub fn is_bus_master(&self) -> bool {
        self.registers[COMMAND] & COMMAND_MASTER != 0
    }

    /// Notes in the status register whether INTx is asserted, and tells whether its line is to be: the guest may have
    /// disabled it.
    pub fn set_interrupt(&mut self, asserted: bool) -> bool {
        self.registers[COMMAND] &= !STATUS_INTERRUPT;
        if asserted {
            self.registers[COMMAND] |= STATUS_INTERRUPT;
        }
        asserted && self.registers[COMMAND] & COMMAND_NO_INTX == 0
    }

    fn set_initial(&mut self, register: usize, value: u32) {
        self.initial[register] = value;
        self.registers[register] = value;
    }

    fn set_initial_byte(&mut self, offset: usize, byte: u8) {
        let shift = 8 * (offset % 4);
        let value = self.initial[offset / 4] & !(0xff << shift) | u32::from(byte) << shift;
        self.set_initial(offset / 4, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write32(space: &mut ConfigSpace, offset: u16, value: u32) {
        space.write(offset, ConfigWrite { value, mask: u32::MAX });
    }

    #[test]
    fn a_driver_sizes_and_places_base_address_registers() {
        let mut space = ConfigSpace::new(&Header::default());
        space.add_bar(0, BarKind::Io, 0x20).unwrap();
        space.add_bar(1, BarKind::Memory32, 0x1000).unwrap();
        space.add_bar(2, BarKind::Memory64, 1 << 33).unwrap();
        for (offset, size_mask) in
            [(0x10, 0xffff_ffe1), (0x14, 0xffff_f000), (0x18, 0xc), (0x1c, 0xffff_fffe), (0x20, 0)]
        {
            write32(&mut space, offset, u32::MAX);
            assert_eq!(space.read(offset), size_mask, "{offset:#x}");
        }
        write32(&mut space, 0x10, 0xc000);
        write32(&mut space, 0x18, 0);
        write32(&mut space, 0x1c, 0x10);
        assert_eq!(space.bar(0).unwrap().base, None, "disabled");
        write32(&mut space, 0x04, 0x3);
        assert_eq!(space.bar(0).unwrap().base, Some(0xc000));
        assert_eq!(
            space.bar(2).unwrap(),
            Bar { kind: BarKind::Memory64, size: 1 << 33, base: Some(0x10 << 32) }
        );
        assert_eq!(space.bar(3), None);
    }

    #[test]
    fn base_address_registers_that_cannot_be_are_refused() {
        let mut space = ConfigSpace::new(&Header::default());
        space.add_bar(0, BarKind::Memory64, 1 << 40).unwrap();
        for index in [0, 1, 6, 100] {
            assert_eq!(space.add_bar(index, BarKind::Io, 16), Err(ConfigError::NoBar(index)));
        }
        assert_eq!(space.add_bar(5, BarKind::Memory64, 16), Err(ConfigError::NoBar(5)));
        for size in [0, 3, 8, 1 << 32] {
            assert_eq!(space.add_bar(2, BarKind::Memory32, size), Err(ConfigError::BadSize(size)));
        }
    }

    #[test]
    fn capabilities_form_a_list() {
        let mut space = ConfigSpace::new(&Header::default());
        assert_eq!(space.read(4) >> 16 & 0x10, 0);
        let first = space.add_capability(0x09, &[1, 2, 3], &[]).unwrap();
        let second = space.add_capability(0x11, &[0, 0, 9, 9, 9, 9], &[0, 0xc0]).unwrap();
        assert_eq!((first, second), (0x40, 0x48));
        assert_eq!(space.read(4) >> 16 & 0x10, 0x10);
        assert_eq!(space.read(0x34) & 0xff, 0x40);
        assert_eq!(space.read(0x40), 0x0201_4809);
        write32(&mut space, 0x48, u32::MAX);
        assert_eq!(space.read(0x48), 0xc000_0011, "only the writable bits");
        assert_eq!(space.add_capability(0, &[0; 200], &[]), Err(ConfigError::NoRoom(202)));
        space.reset();
        assert_eq!(space.read(0x48), 0x0000_0011);
    }

    #[test]
    fn identity_cannot_be_written() {
        let header = Header {
            vendor: 0x1af4,
            device: 0x1000,
            class: 0x02_0000,
            interrupt_pin: 1,
            ..Header::default()
        };
        let mut space = ConfigSpace::new(&header);
        for offset in (0..0x1000).step_by(4) {
            write32(&mut space, offset, u32::MAX);
        }
        assert_eq!(space.read(0), 0x1000_1af4);
        assert_eq!(space.read(8), 0x0200_0000);
        assert_eq!(space.read(0x3c), 0x0000_01ff);
        assert_eq!(space.read(4), 0x0547);
        assert_eq!(space.read(0x100), 0);
    }

    #[test]
    fn intx_is_shown_and_can_be_disabled() {
        let mut space = ConfigSpace::new(&Header::default());
        assert!(space.set_interrupt(true));
        assert_eq!(space.read(4) >> 16, 8);
        write32(&mut space, 4, 1 << 10);
        assert!(!space.set_interrupt(true));
        assert!(!space.set_interrupt(false));
        assert_eq!(space.read(4) >> 16, 0);
    }
}
