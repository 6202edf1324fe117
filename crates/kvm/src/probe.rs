//! Whether KVM is of use here: it is tried, not looked at.

use std::io::ErrorKind;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use engine::{Bus, EngineError, Nothing, Vcpu, VmExit};
use kvm_bindings::KVM_API_VERSION;
use kvm_ioctls::{Cap, Kvm};

use crate::tiny_guest::TinyGuest;

/// A KVM that runs guests.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct KvmInfo {
    /// The most vCPUs that a machine may have.
    pub max_vcpus: usize,
    /// What an exit to us for a port costs, in nanoseconds.
    pub exit_ns: u64,
    /// What an instruction in the guest's kernel costs, in nanoseconds.
    pub instruction_ns: f64,
}

/// Above this an instruction of the guest is not executed but emulated: a processor needs below 1 ns.
const SLOWEST_INSTRUCTION_NS: f64 = 30.0;
/// What a probe may take where a guest hangs.
const PATIENCE: Duration = Duration::from_millis(500);

/// What [`crate::KvmVm`] and [`crate::KvmVcpu`] use.
const REQUIRED: &[(Cap, &str)] = &[
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Pit2, "KVM_CAP_PIT2"),
    (Cap::SignalMsi, "KVM_CAP_SIGNAL_MSI"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::SetIdentityMapAddr, "KVM_CAP_SET_IDENTITY_MAP_ADDR"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
    (Cap::Debugregs, "KVM_CAP_DEBUGREGS"),
    (Cap::Xsave, "KVM_CAP_XSAVE"),
    (Cap::Xcrs, "KVM_CAP_XCRS"),
    (Cap::ReadonlyMem, "KVM_CAP_READONLY_MEM"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
];

/// Opens `/dev/kvm`, runs a guest of a few instructions in kernel mode and times it.
///
/// That takes a millisecond where KVM works, and half a second at most.
///
/// # Errors
/// The reason why the engine cannot be used, for a person.
pub fn probe() -> Result<KvmInfo, String> {
    let kvm = open()?;
    check_version(&kvm)?;
    let missing: Vec<_> =
        REQUIRED.iter().filter(|(cap, _)| !kvm.check_extension(*cap)).map(|(_, name)| *name).collect();
    if !missing.is_empty() {
        return Err(format!("this KVM is too old or too small: it lacks {}", missing.join(", ")));
    }
    let (exit_ns, instruction_ns) = measure()?;
    if instruction_ns > SLOWEST_INSTRUCTION_NS {
        return Err(format!(
            "/dev/kvm has no hardware virtualization below it: a guest's instruction takes {instruction_ns:.0} ns and a \
             port exit {:.1} µs, so the host emulates each of them",
            exit_ns as f64 / 1000.0
        ));
    }
    Ok(KvmInfo { max_vcpus: kvm.get_max_vcpus(), exit_ns, instruction_ns })
}

fn open() -> Result<Kvm, String> {
    Kvm::new().map_err(|error| {
        let error = std::io::Error::from(error);
        match error.kind() {
            ErrorKind::NotFound => "there is no /dev/kvm".to_owned(),
            ErrorKind::PermissionDenied => {
                "no permission to open /dev/kvm: is the user in the group kvm?".to_owned()
            }
            _ => format!("/dev/kvm does not open: {error}"),
        }
    })
}

fn check_version(kvm: &Kvm) -> Result<(), String> {
    let version = kvm.get_api_version();
    if u32::try_from(version) == Ok(KVM_API_VERSION) {
        return Ok(());
    }
    Err(format!(
        "/dev/kvm (file {}) speaks version {version} of KVM's interface, not {KVM_API_VERSION}",
        kvm.as_raw_fd()
    ))
}

/// Port exits in the program that does nothing else.
const EXITS: u32 = 50;
/// Rounds of the loop that only computes.
const ROUNDS: u32 = 2_000;

/// MOV ECX, count; OUT 80H, AL; DEC ECX; JNZ to the OUT; HLT.
fn port_program(count: u32) -> Vec<u8> {
    [&[0xb9][..], &count.to_le_bytes(), &[0xe6, 0x80, 0xff, 0xc9, 0x75, 0xfa, 0xf4]].concat()
}

/// MOV ECX, count; DEC ECX; JNZ to the DEC; HLT.
fn loop_program(count: u32) -> Vec<u8> {
    [&[0xb9][..], &count.to_le_bytes(), &[0xff, 0xc9, 0x75, 0xfc, 0xf4]].concat()
}

/// Nanoseconds of a port exit and of an instruction, the best of three.
fn measure() -> Result<(u64, f64), String> {
    let unusable = |error: EngineError| format!("/dev/kvm opens but cannot make a machine: {error}");
    let mut guest = TinyGuest::new(&[]).map_err(unusable)?;
    let mut best = |program: Vec<u8>| -> Result<f64, String> {
        let mut best = f64::INFINITY;
        for _ in 0..3 {
            guest.load(&program).map_err(unusable)?;
            best = best.min(timed(&mut guest)?.as_nanos() as f64);
        }
        Ok(best)
    };
    let entry = best(port_program(1))?;
    let exits = best(port_program(EXITS))?;
    let rounds = best(loop_program(ROUNDS))?;
    let exit_ns = (exits - entry).max(0.0) / f64::from(EXITS - 1);
    // A round is two instructions.
    Ok((exit_ns as u64, (rounds - entry).max(0.0) / f64::from(ROUNDS * 2)))
}

/// Runs the guest to its HLT, with a thread that takes it out should it hang.
fn timed(guest: &mut TinyGuest) -> Result<Duration, String> {
    let kick = guest.vcpu.kick();
    let (done, wait) = channel::<()>();
    let bus: Arc<dyn Bus> = Arc::new(Nothing);
    std::thread::scope(|scope| {
        scope.spawn(move || {
            if wait.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
                kick.kick();
            }
        });
        let start = Instant::now();
        let exit = guest.run(&bus);
        let elapsed = start.elapsed();
        drop(done);
        match exit {
            Ok(VmExit::Halt) => Ok(elapsed),
            Ok(VmExit::Interrupted) => Err(format!(
                "/dev/kvm opens but a guest of {ROUNDS} instructions does not end within {PATIENCE:?}"
            )),
            Ok(other) => Err(format!("/dev/kvm opens but a guest of a few instructions fails: {other:?}")),
            Err(error) => Err(format!("/dev/kvm opens but does not run a guest: {error}")),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_probe_gives_figures_or_a_reason() {
        let start = Instant::now();
        match probe() {
            Ok(info) => {
                println!("{info:?}");
                assert!(info.max_vcpus > 0 && info.instruction_ns <= SLOWEST_INSTRUCTION_NS);
            }
            Err(reason) => {
                println!("KVM is unusable here: {reason}");
                assert!(!reason.is_empty());
            }
        }
        println!("probed for {:?}", start.elapsed());
    }
}
