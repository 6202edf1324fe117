//! The ledger as a decorator of the bus: no device and no engine knows that it is there.

use std::sync::Arc;

use engine::{Bus, Space};
use exits::{Detail, Exit, Recorder, ticks};
use x86::ExitReason;

/// One vCPU's bus that records each access with its time and passes it on.
///
/// Ports are `IO_INSTRUCTION`. Device memory is `EPT_VIOLATION`: a page that the guest's EPT does not map, as a
/// processor without the misconfiguration trick of Linux' KVM would tell it.
pub struct LedgerBus {
    inner: Arc<dyn Bus>,
    recorder: Recorder,
}

impl LedgerBus {
    /// Records what goes to `inner`.
    pub fn new(inner: Arc<dyn Bus>, recorder: Recorder) -> Self {
        Self { inner, recorder }
    }

    fn timed(&self, space: Space, address: u64, size: usize, write: bool, access: impl FnOnce(&dyn Bus)) {
        let start = ticks();
        access(&*self.inner);
        self.recorder.record(exit(space, address, size, write), ticks().wrapping_sub(start));
    }
}

impl Bus for LedgerBus {
    fn read(&self, space: Space, address: u64, data: &mut [u8]) {
        self.timed(space, address, data.len(), false, |bus| bus.read(space, address, data));
    }

    fn write(&self, space: Space, address: u64, data: &[u8]) {
        self.timed(space, address, data.len(), true, |bus| bus.write(space, address, data));
    }
}

/// The exit that an access is, in Intel's vocabulary.
fn exit(space: Space, address: u64, size: usize, write: bool) -> Exit {
    // An access has at most 8 bytes; a port is at most 0xffff.
    let size = u8::try_from(size).unwrap_or(u8::MAX);
    match space {
        Space::Port => {
            Exit::at(ExitReason::IoInstruction, Detail::Port { port: address as u16, size, write })
        }
        Space::Memory => Exit::at(ExitReason::EptViolation, Detail::Memory { address, size, write }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use exits::{Ledger, Report};

    /// Answers every read with the address's low byte.
    struct Echo;

    impl Bus for Echo {
        fn read(&self, _: Space, address: u64, data: &mut [u8]) {
            data.fill(address as u8);
        }
        fn write(&self, _: Space, _: u64, _: &[u8]) {}
    }

    #[test]
    fn accesses_pass_through_and_are_recorded() {
        let ledger = Ledger::new();
        let bus = LedgerBus::new(Arc::new(Echo), ledger.recorder(0));
        let mut data = [0; 4];
        bus.read(Space::Memory, 0xfee0_0020, &mut data);
        bus.write(Space::Port, 0x3f8, b"a");
        bus.write(Space::Port, 0x3f8, b"b");
        assert_eq!(data, [0x20; 4]);
        let report = Report::new(&ledger, 1_000_000_000, &|_| None);
        let details = |name: &str| {
            let reason = report.reasons.iter().find(|r| r.reason == name).unwrap();
            reason.details.iter().map(|d| (d.detail, d.times.count)).collect::<Vec<_>>()
        };
        assert_eq!(details("IO_INSTRUCTION"), [(Detail::Port { port: 0x3f8, size: 1, write: true }, 2)]);
        assert_eq!(
            details("EPT_VIOLATION"),
            [(Detail::Memory { address: 0xfee0_0020, size: 4, write: false }, 1)]
        );
    }
}
