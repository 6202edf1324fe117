use super::{ConfigSpace, ConfigWrite, Header, PciFunction};

/// The host bridge at 00:00.0: an Intel 440FX by its identity, so that guests know what it is, with none of its
/// registers, since the memory behind it needs no controlling.
#[derive(Debug)]
pub struct HostBridge(ConfigSpace);

impl HostBridge {
    /// The bridge.
    pub fn new() -> Self {
        let header =
            Header { vendor: 0x8086, device: 0x1237, class: 0x06_0000, revision: 2, ..Header::default() };
        Self(ConfigSpace::new(&header))
    }
}

impl Default for HostBridge {
    fn default() -> Self {
        Self::new()
    }
}

impl PciFunction for HostBridge {
    fn read_config(&mut self, offset: u16) -> u32 {
        self.0.read(offset)
    }

    fn write_config(&mut self, offset: u16, write: ConfigWrite) {
        self.0.write(offset, write);
    }
}
