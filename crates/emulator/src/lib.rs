//! The software CPU: an x86-64 processor that needs no hardware virtualization.
//!
//! Guest code is decoded once into blocks ([`block`]) of [`insn::Insn`]s, which the [`interpreter`] runs. One table
//! ([`instructions`]) says of each instruction whether Rust code of ours or the host ([`native`]) executes it. Memory
//! is reached through [`mmu`]. [`SoftVcpu`] is what the rest of the machine sees.
//!
//! This crate stands beside `kvm` on top of `engine`, and knows no device: it reads and writes `engine::Bus`, and takes
//! interrupts from `engine::InterruptController`.

pub mod block;
pub mod breakpoints;
pub mod cpu;
pub mod cpuid;
pub mod decode;
pub mod flags;
pub mod insn;
pub mod instructions;
pub mod interpreter;
pub mod jit;
pub mod lockstep;
pub mod mmu;
pub mod mode;
pub mod msrs;
pub mod native;
pub mod pmu;
pub mod registers;
pub mod shared;
#[cfg(test)]
pub mod testing;
pub mod undefined;
pub mod vcpu;
pub mod width;

pub use cpuid::{CpuModel, CpuModelError};
pub use lockstep::LockstepVcpu;
pub use shared::Shared;
pub use vcpu::{SoftVcpu, VcpuConfig};
