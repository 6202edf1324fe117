//! The machine: RAM, platform devices, vCPUs and the threads that run them, made from one plain configuration.
//!
//! ```text
//! MachineConfig ──Machine::build──▶ Machine ──run──▶ Summary { outcome, .. }
//!                                     │
//!            ┌────────────────┬───────┴────────┬─────────────────┐
//!       vcpu_thread        event_loop        platform          output
//!   run → match → act    runs the timers   devices on a bus   serial ports' bytes
//!            └────────────────┴───────┬────────┴─────────────────┘
//!                                  Ending: the first report of any of them decides how the run ends
//! ```
//!
//! This is the only crate that knows engines and devices both; it knows no terminal, no command line and no guest by
//! name. Nothing here acts on a device from two places: threads hold handles, and meet in [`Ending`].

pub mod acpi_tables;
mod balloon_socket;
pub mod boot;
pub mod config;
mod console_ports;
mod engines;
mod error;
pub mod event_loop;
mod fw_cfg;
mod host_sides;
pub mod input;
pub mod layout;
pub mod ledger_bus;
pub mod machine;
mod memory_use;
mod mmio_devices;
pub mod outcome;
pub mod output;
mod pci_devices;
pub mod platform;
mod pmem;
mod registers;
mod shares;
mod sleep;
mod smbios;
mod start;
mod unix_socket;
pub mod vcpu_thread;
mod vsock;

pub use config::{ConfigError, EngineChoice, MachineConfig, Translation};
pub use engine::{Counter, CounterValue};
pub use error::BuildError;
pub use machine::{Controls, Machine, SerialLine, Summary};
pub use memory_use::MemoryUse;
pub use outcome::{Ending, Outcome, StopReason};
pub use vcpu_thread::VcpuSummary;
