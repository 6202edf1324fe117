//! The platform's devices: what a PC has besides its processors and its memory.
//!
//! A device is a register file with a story: [`bus::Device`] is its whole outside. It is mapped on
//! [`bus::MachineBus`], the machine's [`engine::Bus`], which takes the device's lock around each access. What a
//! device does to the rest of the machine goes through handles that it is given when it is made:
//!
//! - [`irq::IrqLine`]: its interrupt line;
//! - [`clock::Timers`] and [`clock::Timer`]: time, and to be called at a time;
//! - [`request::RequestSink`]: power off, reset, exit.
//!
//! Devices never hold each other, know nothing of engines, of the ledger or of the machine that they are in, and touch
//! no file, terminal or clock of the host: all of that is passed in, so that each runs in a test with none.
//!
//! Everything that a guest writes is hostile: no access panics, and no queue grows without a bound.

pub mod acpi_pm;
pub mod bus;
pub mod clock;
pub mod cmos;
pub mod debug_console;
pub mod debug_exit;
#[cfg(test)]
mod fuzz;
pub mod fw_cfg;
pub mod hpet;
pub mod i8042;
pub mod interrupt;
pub mod irq;
pub mod pci;
pub mod pit;
pub mod request;
pub mod reset;
pub mod serial;
pub mod testdev;
