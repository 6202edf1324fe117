//! The ledger of VM exits: how often the guest left, why, at which device register, and what handling it cost.
//!
//! Whoever handles an exit records it with the time that it took ([`Recorder::record`]); a [`Report`] sums up, as a table
//! for a person ([`Report::table`]) or as JSON. The reasons are Intel's on every engine ([`x86::ExitReason`]), so that
//! reports of a machine on `/dev/kvm` and of one on the software CPU read alike.
//!
//! Time is counted in ticks of the host's time-stamp counter ([`ticks`]) and turned into nanoseconds by the report.
//! The memory that a ledger takes does not depend on the guest: each vCPU keeps at most [`MAX_DETAILS`] details of a
//! reason apart, the rest are counted as "others".
//!
//! This crate knows the processor's vocabulary and nothing of engines or devices: a report asks a function of its
//! caller's what an address is.

mod exit;
mod histogram;
mod ledger;
mod names;
mod report;
mod table;

pub use exit::{Detail, Exit};
pub use histogram::Histogram;
pub use ledger::{KernelCounts, Ledger, MAX_DETAILS, Recorder};
pub use report::{
    Bucket, DetailReport, FORMAT, KernelReason, KernelReport, ReasonReport, Report, Times, VcpuReport,
};

/// The host's time-stamp counter: what the time of an exit is measured in.
#[inline]
#[allow(unsafe_code)] // One intrinsic.
pub fn ticks() -> u64 {
    // SAFETY: RDTSC has no effect but its result; Linux leaves it enabled in user mode.
    unsafe { core::arch::x86_64::_rdtsc() }
}
