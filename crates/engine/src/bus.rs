/// Which of the processor's two address spaces an access goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Space {
    /// I/O ports, 0 to 0xffff.
    Port,
    /// Guest-physical addresses that no RAM backs.
    Memory,
}

/// What a vCPU may ask of the machine while it runs: device registers.
///
/// `data` has 1, 2, 4 or 8 bytes (ports: 1, 2 or 4). Nothing here fails: a read that nobody answers gives all ones,
/// a write that nobody takes is lost, as on the hardware.
pub trait Bus: Send + Sync {
    /// Reads `data.len()` bytes at `address`.
    fn read(&self, space: Space, address: u64, data: &mut [u8]);
    /// Writes `data` at `address`.
    fn write(&self, space: Space, address: u64, data: &[u8]);
}
