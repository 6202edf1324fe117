//! The engine on `/dev/kvm`: the same [`engine::Vcpu`] as the software CPU's, with the host processor below it.
//!
//! [`probe`] tells whether it is of use here: that the device opens is not enough, as some hosts emulate every guest
//! instruction in the kernel. [`KvmVm`] is a machine: its memory, its interrupt controllers (KVM's own PIC, I/O APIC, local
//! APICs and PIT, so the platform must bring none of them), and its clock. [`KvmVcpu`] is a virtual CPU.
//!
//! This crate sees no device: port and memory accesses that KVM cannot answer go to [`engine::Bus`], and it is there that
//! they are recorded. HLT, CPUID and most MSRs are handled in the kernel and never come here; what KVM counts of
//! them goes to the ledger untimed.

mod cpuid;
mod error;
mod exit_data;
mod kick;
mod msrs;
mod probe;
mod state;
mod statistics;
#[cfg(test)]
mod tests;
mod tiny_guest;
mod vcpu;
mod vm;

pub use cpuid::CpuidEntry;

pub use probe::{KvmInfo, probe};
pub use vcpu::{KvmVcpu, VcpuConfig};
pub use vm::KvmVm;
