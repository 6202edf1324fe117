//! Message-signalled interrupts: where functions send them, and the MSI capability. "PCI Local Bus Specification", *MSI
//! and MSI-X Operation*.

use std::sync::{Arc, Mutex, PoisonError};

use super::{ConfigError, ConfigSpace};

/// Where interrupt messages go.
///
/// It may be called with a function's lock held, so an implementation never calls back into a device.
pub trait MsiSink: Send + Sync {
    /// Carries out a function's write of `data` to `address`.
    fn send(&self, address: u64, data: u32);
}

impl MsiSink for crate::interrupt::InterruptFabric {
    fn send(&self, address: u64, data: u32) {
        self.signal_msi(address, data);
    }
}

/// An [`MsiSink`] for tests that remembers the messages, up to a bound.
#[derive(Debug, Default)]
pub struct RecordedMessages(Mutex<Vec<(u64, u32)>>);

impl RecordedMessages {
    /// A sink without messages.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Takes the messages since the last call, in their order.
    pub fn take(&self) -> Vec<(u64, u32)> {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl MsiSink for RecordedMessages {
    fn send(&self, address: u64, data: u32) {
        const LIMIT: usize = 65536;
        let mut messages = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if messages.len() < LIMIT {
            messages.push((address, data));
        }
    }
}

/// The capability's id.
const ID: u8 = 0x05;
/// Message control: enable, the log2 of the vectors that there are and that are enabled, 64-bit address, masking.
mod control {
    pub(super) const ENABLE: u16 = 1 << 0;
    pub(super) const CAPABLE_SHIFT: u16 = 1;
    pub(super) const ENABLED_SHIFT: u16 = 4;
    pub(super) const ENABLED: u16 = 7 << ENABLED_SHIFT;
    pub(super) const ADDRESS_64: u16 = 1 << 7;
    pub(super) const MASKING: u16 = 1 << 8;
}
/// Offsets in the capability.
const ADDRESS: u16 = 4;
const ADDRESS_HIGH: u16 = 8;
const DATA: u16 = 12;
const MASK: u16 = 16;
const PENDING: u16 = 20;
/// Bytes after its id and link.
const BODY: usize = 22;

/// The MSI capability of a function, with 64-bit addresses and a mask bit for each vector. Its registers are the
/// configuration space's.
pub struct Msi {
    /// Offset of the capability.
    at: u16,
    vectors: u32,
    pending: u32,
    sink: Arc<dyn MsiSink>,
}

impl Msi {
    /// Gives the function the capability for `vectors` vectors: a power of two up to 32.
    ///
    /// # Errors
    /// [`ConfigError`] where it has no room, or there cannot be so many vectors.
    pub fn new(config: &mut ConfigSpace, vectors: u32, sink: Arc<dyn MsiSink>) -> Result<Self, ConfigError> {
        if !vectors.is_power_of_two() || vectors > 32 {
            return Err(ConfigError::BadVectors(vectors));
        }
        let capable = (vectors.trailing_zeros() as u16) << control::CAPABLE_SHIFT;
        let mut body = [0; BODY];
        body[..2].copy_from_slice(&(control::ADDRESS_64 | control::MASKING | capable).to_le_bytes());
        let mut writable = [0; BODY];
        writable[..2].copy_from_slice(&(control::ENABLE | control::ENABLED).to_le_bytes());
        writable[2..6].copy_from_slice(&[0xfc, 0xff, 0xff, 0xff]);
        writable[6..12].fill(0xff);
        let all = u32::MAX >> (32 - vectors);
        writable[14..18].copy_from_slice(&all.to_le_bytes());
        let at = config.add_capability(ID, &body, &writable)?.into();
        Ok(Self { at, vectors, pending: 0, sink })
    }

    /// Whether the guest has the function use MSI: INTx is silent then.
    pub fn is_enabled(&self, config: &ConfigSpace) -> bool {
        self.control(config) & control::ENABLE != 0
    }

    /// Sends the message of `vector`, or notes it while it is masked. Vectors beyond the enabled ones share the last.
    pub fn signal(&mut self, config: &mut ConfigSpace, vector: u32) {
        if !self.is_enabled(config) {
            return;
        }
        let enabled = 1u32 << ((self.control(config) & control::ENABLED) >> control::ENABLED_SHIFT).min(5);
        let enabled = enabled.min(self.vectors);
        let vector = vector.min(enabled - 1);
        if config.read(self.at + MASK) & 1 << vector != 0 {
            self.pending |= 1 << vector;
            config.set(self.at + PENDING, self.pending);
            return;
        }
        let address =
            u64::from(config.read(self.at + ADDRESS)) | u64::from(config.read(self.at + ADDRESS_HIGH)) << 32;
        let data = config.read(self.at + DATA) & 0xffff & !(enabled - 1) | vector;
        self.sink.send(address, data);
    }

    /// After a write to the configuration space: sends what waited for its mask to go.
    pub fn config_written(&mut self, config: &mut ConfigSpace) {
        let ready = self.pending & !config.read(self.at + MASK);
        if ready == 0 || !self.is_enabled(config) {
            return;
        }
        self.pending &= !ready;
        config.set(self.at + PENDING, self.pending);
        for vector in (0..32).filter(|vector| ready & 1 << vector != 0) {
            self.signal(config, vector);
        }
    }

    /// The reset of the function, whose configuration space is reset by itself.
    pub fn reset(&mut self) {
        self.pending = 0;
    }

    fn control(&self, config: &ConfigSpace) -> u16 {
        (config.read(self.at) >> 16) as u16
    }
}

#[cfg(test)]
mod tests {
    use super::super::{ConfigWrite, Header};
    use super::*;

    const AT: u16 = 0x40;

    fn function(vectors: u32) -> (ConfigSpace, Msi, Arc<RecordedMessages>) {
        let messages = RecordedMessages::new();
        let mut config = ConfigSpace::new(&Header::default());
        let msi = Msi::new(&mut config, vectors, messages.clone()).unwrap();
        (config, msi, messages)
    }

    fn write(config: &mut ConfigSpace, msi: &mut Msi, offset: u16, value: u32) {
        config.write(AT + offset, ConfigWrite { value, mask: u32::MAX });
        msi.config_written(config);
    }

    #[test]
    fn a_vector_is_a_message_once_the_guest_enables_it() {
        let (mut config, mut msi, messages) = function(4);
        assert_eq!(config.read(AT), 0x0184_0005);
        msi.signal(&mut config, 0);
        write(&mut config, &mut msi, ADDRESS, 0xfee0_1003);
        write(&mut config, &mut msi, DATA, 0x4041);
        write(&mut config, &mut msi, 0, 0x0021_0000);
        assert!(msi.is_enabled(&config));
        msi.signal(&mut config, 0);
        msi.signal(&mut config, 3);
        assert_eq!(messages.take(), [(0xfee0_1000, 0x4040), (0xfee0_1000, 0x4043)]);
        write(&mut config, &mut msi, 0, 0x0001_0000);
        msi.signal(&mut config, 3);
        assert_eq!(messages.take(), [(0xfee0_1000, 0x4041)], "one vector is for all");
    }

    #[test]
    fn a_masked_vector_waits_in_the_pending_bits() {
        let (mut config, mut msi, messages) = function(2);
        write(&mut config, &mut msi, 0, 0x0011_0000);
        write(&mut config, &mut msi, MASK, u32::MAX);
        assert_eq!(config.read(AT + MASK), 3, "only the bits of its vectors");
        msi.signal(&mut config, 1);
        msi.signal(&mut config, 1);
        assert_eq!((config.read(AT + PENDING), messages.take()), (2, vec![]));
        write(&mut config, &mut msi, PENDING, u32::MAX);
        assert_eq!(config.read(AT + PENDING), 2, "read-only");
        write(&mut config, &mut msi, MASK, 1);
        assert_eq!((config.read(AT + PENDING), messages.take()), (0, vec![(0, 1)]));
    }

    #[test]
    fn counts_that_cannot_be_are_refused() {
        let mut config = ConfigSpace::new(&Header::default());
        for vectors in [0, 3, 64] {
            let refused = Msi::new(&mut config, vectors, RecordedMessages::new()).err();
            assert_eq!(refused, Some(ConfigError::BadVectors(vectors)));
        }
    }
}
