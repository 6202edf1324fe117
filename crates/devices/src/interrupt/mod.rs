//! The interrupt controllers: PIC, I/O APIC and local APICs, and the wires and messages between them.
//!
//! ```text
//!   ISA interrupts 0-15 ----> PIC (8259A pair) -----> LINT0 of the bootstrap processor's local APIC
//!        |                        \-----------------> pin 0 \
//!        \---- 0 as pin 2, the others as themselves ------>  I/O APIC
//!   GSIs 16-23 ------------------------------------------->     |
//!                                                               |  interrupt messages
//!   MSIs  ------------------------------------------------------+----> local APICs <----> IPIs
//! ```
//!
//! [`InterruptFabric`] owns them all. A vCPU's view is a [`LocalApicHandle`]; what it reads and writes in memory goes
//! through a [`VcpuBus`], because the local APIC's page is a different one for each vCPU.
//!
//! # Lock order
//!
//! PIC, then I/O APIC, then one local APIC, then the timers' queue. A later one may be taken with an earlier one held,
//! never the reverse, and never two local APICs at once:
//!
//! - The PIC's output drives the I/O APIC's pin and LINT0 with the PIC locked, and the I/O APIC delivers its messages
//!   with itself locked, so that edges and remote IRR keep their order.
//! - A local APIC calls nobody. What an access to it means for others (an IPI, an EOI for the I/O APIC, the vector of
//!   an ExtINT) is carried out once its lock is free again; so vCPUs that send IPIs to each other never wait in a ring.
//! - A device's own lock comes before all of these, and nothing here calls a device. The functions that wake a vCPU
//!   ([`engine::Attention::set_hook`]) or the event loop ([`crate::clock::Timers::set_wake`]) may be called with a local APIC
//!   locked, so they must not come back here.

mod fabric;
mod handle;
mod ioapic;
mod lapic;
mod message;
mod pic;
#[cfg(test)]
mod tests;

pub use fabric::InterruptFabric;
pub use handle::{LocalApicHandle, VcpuBus};
pub use ioapic::PINS as IOAPIC_PINS;
pub use lapic::{ApicFeatures, TIMER_FREQUENCY, register_name as local_apic_register};
pub use message::{InterruptMessage, TriggerMode};
