//! MSI-X: a table of messages in a function's memory, with a mask and a pending bit for each. "PCI Local Bus
//! Specification", *MSI-X Capability and Table Structures*.

use std::sync::Arc;

use super::{ConfigError, ConfigSpace, MsiSink};

/// The capability's id.
const ID: u8 = 0x11;
/// Message control: all vectors are masked; the function uses MSI-X.
const FUNCTION_MASK: u16 = 1 << 14;
const ENABLE: u16 = 1 << 15;
/// The most vectors that a function can have.
pub const MAX_VECTORS: u16 = 2048;

/// Bytes of a table entry: address, data, vector control.
pub const ENTRY_SIZE: u64 = 16;
const CONTROL_WORD: usize = 3;
/// Vector control: the vector is masked.
const MASKED: u32 = 1;

/// Where the table and the pending bits are: in one base address register's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsixPlace {
    /// The base address register's index.
    pub bar: u8,
    /// The table's offset in it, a multiple of 8.
    pub table: u32,
    /// That of the pending bits, a multiple of 8.
    pub pending: u32,
}

/// The MSI-X capability of a function with its table.
pub struct Msix {
    /// Offset of the capability.
    at: u16,
    /// Address low and high, data, control.
    table: Vec<[u32; 4]>,
    pending: Vec<u64>,
    sink: Arc<dyn MsiSink>,
}

impl Msix {
    /// Gives the function the capability for `vectors` vectors.
    ///
    /// # Errors
    /// [`ConfigError`] where it has no room, or there cannot be so many vectors.
    pub fn new(
        config: &mut ConfigSpace,
        vectors: u16,
        place: MsixPlace,
        sink: Arc<dyn MsiSink>,
    ) -> Result<Self, ConfigError> {
        if vectors == 0 || vectors > MAX_VECTORS {
            return Err(ConfigError::BadVectors(vectors.into()));
        }
        let mut body = (vectors - 1).to_le_bytes().to_vec();
        for offset in [place.table, place.pending] {
            body.extend((offset & !7 | u32::from(place.bar & 7)).to_le_bytes());
        }
        let writable = (FUNCTION_MASK | ENABLE).to_le_bytes();
        let at = config.add_capability(ID, &body, &writable)?.into();
        let table = vec![[0, 0, 0, MASKED]; vectors.into()];
        let pending = vec![0; usize::from(vectors).div_ceil(64)];
        Ok(Self { at, table, pending, sink })
    }

    /// Vectors that there are.
    pub fn vectors(&self) -> u16 {
        self.table.len() as u16
    }

    /// Whether the guest has the function use MSI-X: INTx is silent then.
    pub fn is_enabled(&self, config: &ConfigSpace) -> bool {
        self.control(config) & ENABLE != 0
    }

    /// Sends the message of `vector`, or notes it while it is masked.
    pub fn signal(&mut self, config: &ConfigSpace, vector: u16) {
        if !self.is_enabled(config) {
            return;
        }
        let index = usize::from(vector);
        let Some(&[low, high, data, control]) = self.table.get(index) else { return };
        if control & MASKED != 0 || self.control(config) & FUNCTION_MASK != 0 {
            self.pending[index / 64] |= 1 << (index % 64);
        } else {
            self.sink.send(u64::from(high) << 32 | u64::from(low), data);
        }
    }

    /// After a write to the configuration space or to the table: sends what waited for its mask to go.
    pub fn send_unmasked(&mut self, config: &ConfigSpace) {
        if !self.is_enabled(config) || self.control(config) & FUNCTION_MASK != 0 {
            return;
        }
        for word in 0..self.pending.len() {
            let mut waiting = self.pending[word];
            while waiting != 0 {
                let bit = waiting.trailing_zeros() as usize;
                waiting &= waiting - 1;
                let vector = word * 64 + bit;
                if self.table[vector][CONTROL_WORD] & MASKED == 0 {
                    self.pending[word] &= !(1 << bit);
                    self.signal(config, vector as u16);
                }
            }
        }
    }

    /// Reads the table: naturally aligned accesses of 4 or 8 bytes; ones otherwise.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if !is_proper(offset, data.len()) {
            return;
        }
        for (word, part) in (offset / 4..).zip(data.chunks_exact_mut(4)) {
            if let Some(entry) = self.table.get((word / 4) as usize) {
                part.copy_from_slice(&entry[(word % 4) as usize].to_le_bytes());
            }
        }
    }

    /// Writes the table, as it can be read, and sends what that unmasks.
    pub fn write_table(&mut self, config: &ConfigSpace, offset: u64, data: &[u8]) {
        if !is_proper(offset, data.len()) {
            return;
        }
        for (word, part) in (offset / 4..).zip(data.chunks_exact(4)) {
            let value = part.first_chunk().map_or(0, |part| u32::from_le_bytes(*part));
            if let Some(entry) = self.table.get_mut((word / 4) as usize) {
                let mask = match word % 4 {
                    0 => !3,
                    3 => MASKED,
                    _ => u32::MAX,
                };
                entry[(word % 4) as usize] = value & mask;
            }
        }
        self.send_unmasked(config);
    }

    /// Reads the pending bits, as the table.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if !is_proper(offset, data.len()) {
            return;
        }
        for (byte, to) in (offset..).zip(data) {
            let word = self.pending.get((byte / 8) as usize).copied().unwrap_or(0);
            *to = word.to_le_bytes()[(byte % 8) as usize];
        }
    }

    /// The reset of the function, whose configuration space is reset by itself.
    pub fn reset(&mut self) {
        self.table.fill([0, 0, 0, MASKED]);
        self.pending.fill(0);
    }

    fn control(&self, config: &ConfigSpace) -> u16 {
        (config.read(self.at) >> 16) as u16
    }
}

/// Whether an access is one that the specification defines.
fn is_proper(offset: u64, len: usize) -> bool {
    matches!(len, 4 | 8) && offset.is_multiple_of(len as u64)
}

#[cfg(test)]
mod tests {
    use super::super::{ConfigWrite, Header, RecordedMessages};
    use super::*;

    const AT: u16 = 0x40;

    fn function() -> (ConfigSpace, Msix, Arc<RecordedMessages>) {
        let messages = RecordedMessages::new();
        let mut config = ConfigSpace::new(&Header::default());
        let place = MsixPlace { bar: 2, table: 0x1000, pending: 0x1800 };
        let msix = Msix::new(&mut config, 70, place, messages.clone()).unwrap();
        (config, msix, messages)
    }

    fn control(config: &mut ConfigSpace, msix: &mut Msix, value: u16) {
        config.write(AT, ConfigWrite { value: u32::from(value) << 16, mask: 0xffff_0000 });
        msix.send_unmasked(config);
    }

    fn entry(config: &ConfigSpace, msix: &mut Msix, vector: u64, words: [u32; 4]) {
        for (index, word) in (0..).zip(words) {
            msix.write_table(config, vector * ENTRY_SIZE + 4 * index, &word.to_le_bytes());
        }
    }

    #[test]
    fn the_capability_tells_where_table_and_pending_bits_are() {
        let (config, ..) = function();
        assert_eq!(config.read(AT), 0x0045_0011);
        assert_eq!((config.read(AT + 4), config.read(AT + 8)), (0x1002, 0x1802));
    }

    #[test]
    fn an_unmasked_vector_is_its_message() {
        let (mut config, mut msix, messages) = function();
        entry(&config, &mut msix, 69, [0xfee0_2003, 1, 0x55, 0]);
        msix.signal(&config, 69);
        assert_eq!(messages.take(), [], "not enabled");
        control(&mut config, &mut msix, ENABLE);
        msix.signal(&config, 69);
        msix.signal(&config, 70);
        assert_eq!(messages.take(), [(0x1_fee0_2000, 0x55)]);
        let mut quad = [0; 8];
        msix.read_table(69 * ENTRY_SIZE + 8, &mut quad);
        assert_eq!(quad, [0x55, 0, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn masked_vectors_wait_and_come_once_when_unmasked() {
        let (mut config, mut msix, messages) = function();
        control(&mut config, &mut msix, ENABLE | FUNCTION_MASK);
        entry(&config, &mut msix, 65, [0xfee0_0000, 0, 7, 0]);
        entry(&config, &mut msix, 3, [0xfee0_0000, 0, 8, 1]);
        for vector in [65, 65, 3] {
            msix.signal(&config, vector);
        }
        let pending = |msix: &Msix, offset| {
            let mut data = [0; 8];
            msix.read_pending(offset, &mut data);
            u64::from_le_bytes(data)
        };
        assert_eq!((pending(&msix, 0), pending(&msix, 8), messages.take()), (8, 2, vec![]));
        control(&mut config, &mut msix, ENABLE);
        assert_eq!((pending(&msix, 8), messages.take()), (0, vec![(0xfee0_0000, 7)]));
        msix.write_table(&config, 3 * ENTRY_SIZE + 12, &[0; 4]);
        assert_eq!((pending(&msix, 0), messages.take()), (0, vec![(0xfee0_0000, 8)]));
    }

    #[test]
    fn odd_accesses_read_as_ones_and_change_nothing() {
        let (config, mut msix, _) = function();
        for (offset, len) in [(0, 1), (2, 4), (4, 8), (0, 2)] {
            let mut data = vec![0; len];
            msix.read_table(offset, &mut data);
            assert_eq!(data, vec![0xff; len]);
            msix.write_table(&config, offset, &data);
        }
        let mut word = [0xaa; 4];
        msix.read_table(0, &mut word);
        assert_eq!(word, [0; 4]);
        msix.read_table(70 * ENTRY_SIZE, &mut word);
        assert_eq!(word, [0xff; 4], "beyond the table");
    }
}
