//! KVM's own counters: the exits that it handles in the kernel and that never come to us.
//!
//! A descriptor for each vCPU is read like a file: a header, descriptions with names, values. Kernel documentation,
//! `virt/kvm/api.rst`, *KVM_GET_STATS_FD*.
#![allow(unsafe_code)] // An ioctl that the library has no wrapper for.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;

use exits::KernelCounts;
use kvm_ioctls::VcpuFd;
use x86::ExitReason;

/// `_IO(KVMIO, 0xce)`.
const KVM_GET_STATS_FD: libc::c_ulong = 0xaece;
/// Bytes of the header, and of a description without its name.
const HEADER: usize = 24;
const DESCRIPTION: usize = 16;
/// More than any kernel has, so that a garbled header is no allocation.
const MAX_COUNTERS: usize = 1024;
const MAX_NAME: usize = 256;
const MAX_VALUES: usize = 1 << 16;

/// One vCPU's counters.
pub(crate) struct Statistics {
    file: File,
    /// Byte offsets of the counters of interest in the file.
    places: BTreeMap<String, u64>,
}

/// KVM's counters that are exits, and what the processor calls them.
const REASONS: &[(&str, ExitReason)] = &[
    ("halt_exits", ExitReason::Hlt),
    ("irq_exits", ExitReason::ExternalInterrupt),
    ("irq_window_exits", ExitReason::InterruptWindow),
    ("nmi_window_exits", ExitReason::NmiWindow),
    ("io_exits", ExitReason::IoInstruction),
    ("pf_taken", ExitReason::EptViolation),
    ("hypercalls", ExitReason::Vmcall),
    ("invlpg", ExitReason::Invlpg),
];

impl Statistics {
    /// Of a vCPU; `None` where this kernel (before 5.14) has no such descriptor.
    pub(crate) fn of(vcpu: &VcpuFd) -> Option<Self> {
        // SAFETY: the request takes no argument and gives a descriptor, which nobody else owns.
        let file = unsafe {
            let fd = libc::ioctl(vcpu.as_raw_fd(), KVM_GET_STATS_FD, 0);
            (fd >= 0).then(|| File::from_raw_fd(fd))?
        };
        let places = places(&file)?;
        Some(Self { file, places })
    }

    /// What KVM has counted so far. `seen` is how many port exits came to us: those are not the kernel's.
    pub(crate) fn counts(&self, seen: u64) -> KernelCounts {
        let value = |name: &str| self.value(name).unwrap_or(0);
        let count = |&(name, reason): &(&str, ExitReason)| match reason {
            ExitReason::IoInstruction => (reason, value(name).saturating_sub(seen)),
            _ => (reason, value(name)),
        };
        KernelCounts {
            exits: value("exits"),
            halted_ns: value("halt_wait_ns"),
            by_reason: REASONS.iter().map(count).filter(|(_, count)| *count > 0).collect(),
        }
    }

    /// Those of our names that this kernel does not know.
    #[cfg(test)]
    pub(crate) fn missing(&self) -> Vec<&'static str> {
        let names = REASONS.iter().map(|(name, _)| *name).chain(["exits", "halt_wait_ns"]);
        names.filter(|&name| self.value(name).is_none()).collect()
    }

    fn value(&self, name: &str) -> Option<u64> {
        let mut value = [0; 8];
        self.file.read_exact_at(&mut value, *self.places.get(name)?).ok()?;
        Some(u64::from_le_bytes(value))
    }
}

/// Where the value of each counter stands; `None` for a header that makes no sense.
fn places(file: &File) -> Option<BTreeMap<String, u64>> {
    let mut header = [0; HEADER];
    file.read_exact_at(&mut header, 0).ok()?;
    let field = |n: usize| word(&header, n * 4);
    let (name_size, number) = (field(1)? as usize, field(2)? as usize);
    let (descriptions, values) = (u64::from(field(4)?), u64::from(field(5)?));
    if name_size > MAX_NAME || number > MAX_COUNTERS {
        return None;
    }
    let mut table = vec![0; number * (DESCRIPTION + name_size)];
    file.read_exact_at(&mut table, descriptions).ok()?;
    let place = |description: &[u8]| {
        let offset = word(description, 8).filter(|&offset| offset as usize <= MAX_VALUES)?;
        let name = description[DESCRIPTION..].split(|&byte| byte == 0).next()?;
        Some((String::from_utf8(name.to_vec()).ok()?, values + u64::from(offset)))
    };
    Some(table.chunks_exact(DESCRIPTION + name_size).filter_map(place).collect())
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4)?.try_into().ok().map(u32::from_le_bytes)
}
