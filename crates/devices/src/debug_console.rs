//! The port that firmware writes its messages to, byte by byte, where a read tells that it is there.
//! Bochs user manual, *The port 0xE9 hack*; SeaBIOS and others look for the same at another port.

use std::io::Write;

use crate::bus::ByteDevice;

/// Where firmware of virtual machines looks for it.
pub const PORT: u64 = 0x402;
/// What a read gives.
const PRESENT: u8 = 0xe9;

/// One register: what is written there goes to the host.
pub struct DebugConsole {
    output: Box<dyn Write + Send>,
    failed: bool,
}

impl DebugConsole {
    /// A console whose bytes go to `output`.
    pub fn new(output: Box<dyn Write + Send>) -> Self {
        Self { output, failed: false }
    }
}

impl ByteDevice for DebugConsole {
    fn read_register(&mut self, _offset: u64) -> u8 {
        PRESENT
    }

    fn write_register(&mut self, _offset: u64, value: u8) {
        if self.failed {
            return;
        }
        if let Err(error) = self.output.write_all(&[value]) {
            log::warn!("the debug console's output is lost: {error}");
            self.failed = true;
        }
    }

    fn register_name(&self, _offset: u64, _write: bool) -> &'static str {
        "DEBUG"
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Kept(Arc<Mutex<Vec<u8>>>);

    impl Write for Kept {
        fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
            let mut kept = self.0.lock().unwrap();
            if kept.len() >= 5 {
                return Err(std::io::ErrorKind::StorageFull.into());
            }
            kept.extend(data);
            Ok(data.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn what_firmware_writes_comes_out_until_the_host_refuses() {
        let kept = Kept::default();
        let mut console = DebugConsole::new(Box::new(kept.clone()));
        assert_eq!(console.read_register(0), 0xe9);
        b"hello, world".iter().for_each(|&byte| console.write_register(0, byte));
        assert_eq!(*kept.0.lock().unwrap(), b"hello");
    }

    #[test]
    fn no_access_panics() {
        crate::fuzz::exercise(|_| Arc::new(Mutex::new(DebugConsole::new(Box::new(std::io::sink())))));
    }
}
