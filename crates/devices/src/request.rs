//! What a guest asks of the machine as a whole through a device register.

use std::sync::{Arc, Mutex};

/// Something that only the machine can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MachineRequest {
    /// Power off (ACPI S5).
    PowerOff,
    /// Reset the machine; what asked for it, for a person: "port 0xcf9".
    Reset(&'static str),
    /// End with this value: the debug-exit port was written.
    DebugExit(u32),
    /// Enter the ACPI sleep state of this number (S1 to S4).
    Sleep(u8),
    /// Come back from it: a wake event has happened.
    Wake,
}

/// Where devices put their [`MachineRequest`]s.
///
/// It is called on a vCPU's thread with the device's lock held: the machine notes the request and lets the vCPUs come
/// back, it does not act on the spot.
#[derive(Clone)]
pub struct RequestSink(Arc<dyn Fn(MachineRequest) + Send + Sync>);

impl RequestSink {
    /// A sink that calls `accept` for each request.
    pub fn new(accept: impl Fn(MachineRequest) + Send + Sync + 'static) -> Self {
        Self(Arc::new(accept))
    }

    /// A sink for tests and the list that it appends to (up to a bound).
    pub fn recording() -> (Self, Arc<Mutex<Vec<MachineRequest>>>) {
        let requests = Arc::new(Mutex::new(Vec::new()));
        let list = requests.clone();
        let accept = move |request| {
            let mut list = list.lock().unwrap_or_else(|e| e.into_inner());
            if list.len() < 4096 {
                list.push(request);
            }
        };
        (Self::new(accept), requests)
    }

    /// Asks.
    pub fn send(&self, request: MachineRequest) {
        (self.0)(request);
    }
}

impl std::fmt::Debug for RequestSink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("RequestSink")
    }
}
