//! What the processor tells of itself, and its random numbers. SDM vol. 2, *CPUID*, *RDRAND*, *RDSEED*.
#![allow(unsafe_code)] // The host's RDRAND and RDSEED.

use std::arch::x86_64::{_rdrand64_step, _rdseed64_step};

use x86::{Cr4, Flags};

use crate::cpu::Cpu;
use crate::cpuid::CpuidContext;
use crate::insn::{Insn, Stop};

/// How often the host is asked before the guest is told that there is no number: as often as Intel advises software.
const TRIES: usize = 10;

impl Cpu {
    /// What CPUID's answers depend on here and now.
    pub fn cpuid_context(&self) -> CpuidContext {
        CpuidContext {
            apic_id: self.id,
            tsc_hz: self.wires.time.tsc_frequency(),
            osxsave: self.cr4.contains(Cr4::OSXSAVE),
            xcr0: self.xcr0,
        }
    }
}

/// CPUID: the leaf in EAX, its part in ECX.
pub fn cpuid(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let (leaf, subleaf) = (cpu.registers.get(0) as u32, cpu.registers.get(1) as u32);
    let [eax, ebx, ecx, edx] = cpu.wires.model.cpuid(&cpu.cpuid_context(), leaf, subleaf);
    for (register, value) in [(0, eax), (3, ebx), (1, ecx), (2, edx)] {
        cpu.registers.set(register, u64::from(value));
    }
    cpu.end_block(insn)
}

/// RDRAND.
pub fn rdrand(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let number = (0..TRIES).find_map(|_| host_rdrand());
    random(cpu, insn, number)
}

/// RDSEED.
pub fn rdseed(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let number = (0..TRIES).find_map(|_| host_rdseed());
    random(cpu, insn, number)
}

/// CF tells whether there was a number; without, the register is zero. The other arithmetic flags are clear.
fn random(cpu: &mut Cpu, insn: &Insn, number: Option<u64>) -> Result<(), Stop> {
    cpu.set_gpr_sized(insn.r1, insn.size, number.unwrap_or(0));
    cpu.flags.set_bits(if number.is_some() { Flags::CF.bits() } else { 0 });
    Ok(())
}

fn host_rdrand() -> Option<u64> {
    #[target_feature(enable = "rdrand")]
    fn step() -> Option<u64> {
        let mut number = 0;
        (_rdrand64_step(&mut number) == 1).then_some(number)
    }
    // SAFETY: the host has the instruction.
    std::arch::is_x86_feature_detected!("rdrand").then(|| unsafe { step() }).flatten()
}

fn host_rdseed() -> Option<u64> {
    #[target_feature(enable = "rdseed")]
    fn step() -> Option<u64> {
        let mut number = 0;
        (_rdseed64_step(&mut number) == 1).then_some(number)
    }
    // SAFETY: the host has the instruction.
    std::arch::is_x86_feature_detected!("rdseed").then(|| unsafe { step() }).flatten()
}
