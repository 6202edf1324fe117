use std::sync::Arc;

use super::{Address, PciBus};
use crate::bus::Device;

/// Bytes of the window for each bus number.
pub const ECAM_BUS_SIZE: u64 = 1 << 20;

/// The memory window to configuration space: 4 KiB a function. Map it for a multiple of [`ECAM_BUS_SIZE`], bus 0 first.
pub struct Ecam(Arc<PciBus>);

impl Ecam {
    /// The window to `bus`.
    pub fn new(bus: Arc<PciBus>) -> Self {
        Self(bus)
    }
}

/// The function and the register at `offset` in the window.
fn target(offset: u64) -> Option<(Address, u16)> {
    let bus = u8::try_from(offset / ECAM_BUS_SIZE).ok()?;
    let address = Address { bus, device: (offset >> 15 & 0x1f) as u8, function: (offset >> 12 & 7) as u8 };
    Some((address, (offset & 0xfff) as u16))
}

/// The parts of an access of `len` bytes at `offset`, none of which leaves its double word: where each begins in the
/// data, and its length.
fn parts(offset: u64, len: usize) -> impl Iterator<Item = (usize, usize)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let lane = (offset.wrapping_add(at as u64) & 3) as usize;
        let part = (at, (4 - lane).min(len - at));
        at += part.1;
        (part.1 > 0).then_some(part)
    })
}

impl Device for Ecam {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (at, len) in parts(offset, data.len()) {
            let part = &mut data[at..at + len];
            match target(offset.wrapping_add(at as u64)) {
                Some((address, register)) => self.0.read(address, register, part),
                None => part.fill(0xff),
            }
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        for (at, len) in parts(offset, data.len()) {
            if let Some((address, register)) = target(offset.wrapping_add(at as u64)) {
                self.0.write(address, register, &data[at..at + len]);
            }
        }
    }

    fn register(&self, _offset: u64, _write: bool) -> &'static str {
        "CONFIG_SPACE"
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[test]
    fn each_function_has_its_page() {
        let mut ecam = Ecam::new(PciBus::with_host_bridge());
        let mut data = [0; 8];
        ecam.read(0, &mut data);
        assert_eq!(data[..4], [0x86, 0x80, 0x37, 0x12]);
        ecam.read(1 << 15, &mut data);
        assert_eq!(data, [0xff; 8]);
        ecam.read(0xff8, &mut data);
        assert_eq!(data, [0; 8], "no extended capabilities");
        let mut odd = [0; 4];
        ecam.read(2, &mut odd);
        assert_eq!(odd[..2], [0x37, 0x12], "an access may cross double words");
    }

    #[test]
    fn no_access_panics() {
        crate::fuzz::exercise(|_| Arc::new(Mutex::new(Ecam::new(PciBus::with_host_bridge()))));
    }
}
