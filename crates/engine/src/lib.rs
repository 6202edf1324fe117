//! What an engine is: the traits and the plain data that the software CPU, `/dev/kvm` and the machine share.
//!
//! An engine runs one virtual CPU on the thread that calls [`Vcpu::run`]. It sees no device: it reads and writes
//! through [`Bus`], it takes interrupts from [`InterruptController`], and others reach it through its [`Attention`].

mod attention;
mod bus;
mod host_xsave;
mod interrupt;
mod nothing;
mod state;
mod time;
mod vcpu;

pub use attention::{Attention, Signals};
pub use bus::{Bus, Space};
pub use host_xsave::HostXsave;
pub use interrupt::{CpuEvent, InterruptController, MsrFault};
pub use nothing::Nothing;
pub use state::{VcpuState, VectorState, XSAVE_AREA_SIZE};
pub use time::{HostTime, TimeSource};
pub use vcpu::{Counter, CounterValue, DebugEvent, EngineError, Fatal, Kick, Vcpu, VmExit};
