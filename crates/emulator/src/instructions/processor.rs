//! What the processor tells of itself, and its random numbers. SDM vol. 2, *CPUID*, *RDRAND*, *RDSEED*.
#![allow(unsafe_code)] // The host's RDRAND and RDSEED.

use std::arch::x86_64::{_rdrand64_step, _rdseed64_step};

use x86::apic::ApicBase;
use x86::{Cr4, Flags, msr};

use crate::cpu::Cpu;
use crate::cpuid::CpuidContext;
use crate::insn::{Insn, Stop};
use crate::msrs::misc_enable;

/// How often the host is asked before the guest is told that there is no number: as often as Intel advises software.
const TRIES: usize = 10;

impl Cpu {
    fn apic_is_disabled(&self) -> bool {
        let base = self.wires.interrupts.read_msr(msr::IA32_APIC_BASE).unwrap_or_default();
        !ApicBase::from_bits_retain(base).contains(ApicBase::EN)
    }

    /// What CPUID's answers depend on here and now.
    pub fn cpuid_context(&self) -> CpuidContext {
        CpuidContext {
            apic_id: self.id,
            tsc_hz: self.wires.time.tsc_frequency(),
            osxsave: self.cr4.contains(Cr4::OSXSAVE),
            ospke: self.cr4.contains(Cr4::PKE),
            xcr0: self.xcr0,
            xss: self.msrs.xss,
            without_apic: self.apic_is_disabled(),
            limited: self.msrs.misc_enable & misc_enable::LIMIT_CPUID != 0,
            without_nx: self.msrs.misc_enable & misc_enable::XD_DISABLE != 0,
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

#[cfg(test)]
mod tests {
    use x86::{Exception, Flags};

    use crate::cpu::Cpu;
    use crate::cpuid::feature;
    use crate::testing::{long, run, wires_for};

    const CPUID: [u8; 2] = [0x0f, 0xa2];

    #[test]
    fn cpuid_replaces_four_registers_whole() {
        let mut cpu = long();
        cpu.registers.all_mut().fill(u64::MAX);
        cpu.registers.set(0, 0xffff_ffff_0000_000b);
        cpu.registers.set(1, 0xffff_ffff_0000_0001);
        run(&mut cpu, &CPUID).unwrap();
        let expected = cpu.wires.model.cpuid(&cpu.cpuid_context(), 0xb, 1);
        assert_eq!([0, 3, 1, 2].map(|register| cpu.registers.get(register)), expected.map(u64::from));
        assert_eq!(cpu.registers.get(6), u64::MAX);
    }

    #[test]
    fn cpuid_follows_the_processors_state() {
        let osxsave = |cpu: &mut Cpu| {
            cpu.registers.set(0, 1);
            run(cpu, &CPUID).unwrap();
            cpu.registers.get(1) >> 27 & 1
        };
        let mut cpu = long();
        assert_eq!(osxsave(&mut cpu), 0);
        cpu.cr4 |= x86::Cr4::OSXSAVE;
        assert_eq!(osxsave(&mut cpu), 1);
    }

    /// RDRAND and RDSEED of RAX with 8, 4 and 2 bytes.
    fn random_instructions(modrm: u8) -> [(Vec<u8>, u64); 3] {
        [
            (vec![0x48, 0x0f, 0xc7, modrm], 0),
            (vec![0x0f, 0xc7, modrm], 0),
            (vec![0x66, 0x0f, 0xc7, modrm], !0xffff),
        ]
    }

    #[test]
    fn random_numbers_differ_and_set_the_carry_flag_alone() {
        for (feature, modrm) in [(feature::RDRAND, 0xf0), (feature::RDSEED, 0xf8)] {
            for (bytes, kept) in random_instructions(modrm) {
                let mut cpu = long();
                if !cpu.wires.model.has(feature) {
                    continue;
                }
                let mut numbers = std::collections::BTreeSet::new();
                for _ in 0..8 {
                    cpu.registers.set(0, u64::MAX);
                    cpu.flags.set_bits(Flags::ARITHMETIC.bits());
                    run(&mut cpu, &bytes).unwrap();
                    assert!(cpu.flags.bits() & !Flags::CF.bits() == 0);
                    if cpu.flags.cf() {
                        numbers.insert(cpu.registers.get(0));
                    }
                    assert_eq!(cpu.registers.get(0) & kept, kept, "{bytes:x?}");
                }
                assert!(numbers.len() != 1, "{bytes:x?} gives {numbers:x?} each time");
            }
        }
    }

    #[test]
    fn a_model_without_random_numbers_has_no_such_instructions() {
        let mut cpu = long();
        cpu.wires = wires_for("x86-64-v1");
        for modrm in [0xf0, 0xf8] {
            for (bytes, _) in random_instructions(modrm) {
                assert_eq!(run(&mut cpu, &bytes), Err(Exception::ud()));
            }
        }
    }
}
