//! The debug-exit port: a guest ends the machine with a value of its own, as small test guests do.

use crate::bus::Device;
use crate::request::{MachineRequest, RequestSink};

/// The port where guests expect it.
pub const DEFAULT_PORT: u64 = 0xf4;
/// Ports that it takes.
pub const PORTS: u64 = 4;

/// One write-only register at offset 0, of 1, 2 or 4 bytes as it is written.
#[derive(Debug)]
pub struct DebugExit(RequestSink);

impl DebugExit {
    /// A port that reports the values to `requests`.
    pub fn new(requests: RequestSink) -> Self {
        Self(requests)
    }
}

impl Device for DebugExit {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if offset != 0 || !matches!(data.len(), 1 | 2 | 4) {
            return;
        }
        let value = data.iter().rev().fold(0, |value, &byte| value << 8 | u32::from(byte));
        self.0.send(MachineRequest::DebugExit(value));
    }

    fn register(&self, offset: u64, _write: bool) -> &'static str {
        if offset == 0 { "EXIT" } else { "none" }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[test]
    fn the_value_is_as_wide_as_the_write() {
        let (sink, requests) = RequestSink::recording();
        let mut port = DebugExit::new(sink);
        port.write(0, &[0x12]);
        port.write(0, &[0x12, 0x34]);
        port.write(0, &[0x12, 0x34, 0x56, 0x78]);
        port.write(1, &[0x99]);
        let values = [0x12, 0x3412, 0x7856_3412].map(MachineRequest::DebugExit);
        assert_eq!(*requests.lock().unwrap(), values);
    }

    #[test]
    fn no_access_panics() {
        crate::fuzz::exercise(|_| Arc::new(Mutex::new(DebugExit::new(RequestSink::recording().0))));
    }
}
