//! What KVM tells of an exit in the memory that it shares with us, where its wrapper tells less.
#![allow(unsafe_code)] // The union of kvm_run, and the data page behind it.

use engine::{Bus, Space};
use kvm_bindings::{
    KVM_EXIT_IO_OUT, KVM_INTERNAL_ERROR_DELIVERY_EV, KVM_INTERNAL_ERROR_EMULATION,
    KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES, KVM_INTERNAL_ERROR_SIMUL_EX,
    KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON, kvm_run,
};
use kvm_ioctls::VcpuFd;

/// A port exit: one access, or several of the same size for a repeated string instruction.
pub(crate) struct PortAccess<'a> {
    port: u16,
    size: usize,
    write: bool,
    data: &'a mut [u8],
}

impl<'a> PortAccess<'a> {
    /// Of a vCPU whose last KVM_RUN ended with KVM_EXIT_IO.
    pub(crate) fn of(vcpu: &'a mut VcpuFd) -> Self {
        let run: *mut kvm_run = vcpu.get_kvm_run();
        // SAFETY: the kernel has filled this member of the union for the exit reason that the caller saw.
        let io = unsafe { (*run).__bindgen_anon_1.io };
        let len = usize::from(io.size) * io.count as usize;
        // SAFETY: the kernel has put `len` bytes at that offset of the vCPU's mapping, which is as long as it says. They are
        // ours until the next KVM_RUN, for which the descriptor must be borrowed again.
        let data =
            unsafe { std::slice::from_raw_parts_mut(run.cast::<u8>().add(io.data_offset as usize), len) };
        let write = u32::from(io.direction) == KVM_EXIT_IO_OUT;
        Self { port: io.port, size: usize::from(io.size).max(1), write, data }
    }

    /// Lets the bus answer, one access at a time.
    pub(crate) fn perform(self, bus: &dyn Bus) {
        for item in self.data.chunks_exact_mut(self.size) {
            if self.write {
                bus.write(Space::Port, u64::from(self.port), item);
            } else {
                bus.read(Space::Port, u64::from(self.port), item);
            }
        }
    }
}

/// What KVM could not do, after KVM_EXIT_INTERNAL_ERROR.
pub(crate) fn internal_error(vcpu: &mut VcpuFd) -> String {
    // SAFETY: the kernel has filled this member of the union for the exit reason that the caller saw.
    let error = unsafe { vcpu.get_kvm_run().__bindgen_anon_1.internal };
    let data = &error.data[..error.data.len().min(error.ndata as usize)];
    let what = match error.suberror {
        KVM_INTERNAL_ERROR_EMULATION => {
            return format!("KVM cannot emulate an instruction{}", instruction(data));
        }
        KVM_INTERNAL_ERROR_SIMUL_EX => "exceptions at the same time",
        KVM_INTERNAL_ERROR_DELIVERY_EV => "an exit while an event was delivered",
        KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => "an exit reason that it does not expect",
        _ => "an internal error",
    };
    format!("KVM met {what} (suberror {}, data {data:x?})", error.suberror)
}

/// ": 0f 01 c1", where KVM gives the instruction's bytes: flags, then a count and up to 15 bytes.
fn instruction(data: &[u64]) -> String {
    let &[flags, first, second, ..] = data else { return String::new() };
    if flags & u64::from(KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES) == 0 {
        return String::new();
    }
    let bytes = [first.to_le_bytes(), second.to_le_bytes()].concat();
    let count = usize::from(bytes[0]).min(15);
    let listed: Vec<String> = bytes[1..=count].iter().map(|byte| format!("{byte:02x}")).collect();
    format!(": {}", listed.join(" "))
}

/// Why the processor refused to enter the guest. SDM vol. 3, *VM-Entry Failures*.
pub(crate) fn entry_failure(reason: u64, cpu: u32) -> String {
    /// The basic exit reason of an entry that failed, with the bit that says so.
    const INVALID_GUEST_STATE: u64 = 0x8000_0021;
    const MSR_LOADING: u64 = 0x8000_0022;
    let what = match reason {
        INVALID_GUEST_STATE => "invalid guest state",
        MSR_LOADING => "a model-specific register was refused",
        _ => "no reason known here",
    };
    format!("the processor refuses to enter the guest on host CPU {cpu}: {what} ({reason:#x})")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_instruction_that_kvm_could_not_emulate_is_named() {
        let flag = u64::from(KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES);
        let packed = u64::from_le_bytes([3, 0x0f, 0x01, 0xc1, 0, 0, 0, 0]);
        assert_eq!(instruction(&[flag, packed, 0]), ": 0f 01 c1");
        assert_eq!(instruction(&[0, packed, 0]), "");
        assert_eq!(instruction(&[flag]), "");
        assert_eq!(instruction(&[flag, 0xff, 0]).len(), 1 + 15 * 3, "a count that is a lie reads no further");
    }
}
