//! RDMSR and WRMSR: which model-specific registers there are, and where each one lives.
//! SDM vol. 4, *Architectural MSRs*; Linux, *Documentation/virt/kvm/x86/msr.rst*.
//!
//! An index that is not here raises #GP, as on the hardware; Linux asks for many that way.

use engine::MsrFault;
use x86::{Efer, SegmentRegister, msr};

use crate::cpu::Cpu;
use crate::cpuid::feature;
use crate::insn::{Insn, Stop};
use crate::msrs::{MACHINE_CHECK_BANKS, MICROCODE_REVISION, MemoryTypes, misc_enable};
use crate::pmu::Pmu;

/// IA32_BIOS_UPDT_TRIG: a write would load microcode.
const BIOS_UPDATE_TRIGGER: u32 = 0x79;
/// MSR_SMI_COUNT.
const SMI_COUNT: u32 = 0x34;
/// MSR_PLATFORM_INFO.
const PLATFORM_INFO: u32 = 0xce;
/// IA32_MC0_CTL; four registers follow for each bank.
const MACHINE_CHECK_0: u32 = 0x400;
const MACHINE_CHECK_LAST: u32 = MACHINE_CHECK_0 + 4 * MACHINE_CHECK_BANKS as u32 - 1;
/// IA32_DEBUGCTL: LBR, which is kept and does nothing, and BTF.
const DEBUGCTL_LBR_BTF: u64 = 3;
/// IA32_DEBUGCTL: FREEZE_LBRS_ON_PMI and FREEZE_PERFMON_ON_PMI.
const DEBUGCTL_FREEZE: u64 = 3 << 11;
/// IA32_FEATURE_CONTROL: locked, with nothing enabled.
const FEATURE_CONTROL_LOCKED: u64 = 1;

/// IA32_ARCH_CAPABILITIES. This processor speculates nothing across privileges of its guest, so it says that it has
/// none of the weaknesses for which there is a bit, and that IBRS once set holds (IBRS_ALL): Linux then chooses
/// "Enhanced IBRS", which costs one write at boot, instead of retpolines and flushes on every entry.
const ARCH_CAPABILITIES: u64 = {
    let rdcl_no = 1 << 0;
    let ibrs_all = 1 << 1;
    let skip_l1dfl_vmentry = 1 << 3;
    let ssb_no = 1 << 4;
    let mds_no = 1 << 5;
    let pschange_mc_no = 1 << 6;
    let taa_no = 1 << 8;
    let sbdr_ssdp_no = 1 << 13;
    let fbsdp_no = 1 << 14;
    let psdp_no = 1 << 15;
    let bhi_no = 1 << 20;
    let pbrsb_no = 1 << 24;
    let gds_no = 1 << 26;
    let rfds_no = 1 << 27;
    let its_no = 1 << 62;
    rdcl_no
        | ibrs_all
        | skip_l1dfl_vmentry
        | ssb_no
        | mds_no
        | pschange_mc_no
        | taa_no
        | sbdr_ssdp_no
        | fbsdp_no
        | psdp_no
        | bhi_no
        | pbrsb_no
        | gds_no
        | rfds_no
        | its_no
};

/// RDMSR. The driver has checked the privilege.
pub fn rdmsr(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let index = cpu.gpr_sized(1, 4) as u32;
    cpu.advance_counters(insn);
    let value = cpu.read_msr(index).map_err(|MsrFault| cpu.gp0())?;
    cpu.set_gpr_sized(0, 4, value & 0xffff_ffff);
    cpu.set_gpr_sized(2, 4, value >> 32);
    Ok(())
}

/// WRMSR. The driver has checked the privilege.
pub fn wrmsr(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let index = cpu.gpr_sized(1, 4) as u32;
    let value = cpu.gpr_sized(2, 4) << 32 | cpu.gpr_sized(0, 4);
    let result = if Pmu::has(index) {
        let now = cpu.moment(insn).after();
        cpu.write_counter_msr(index, value, now)
    } else {
        cpu.write_msr(index, value)
    };
    result.map_err(|MsrFault| cpu.gp0())?;
    cpu.end_block(insn)
}

/// Whether the local APIC keeps it.
fn is_apic(index: u32) -> bool {
    index == msr::IA32_APIC_BASE || (msr::X2APIC_BASE..=msr::X2APIC_LAST).contains(&index)
}

impl Cpu {
    /// Reads a model-specific register.
    ///
    /// # Errors
    /// [`MsrFault`] where there is no such register, or none that can be read.
    pub fn read_msr(&self, index: u32) -> Result<u64, MsrFault> {
        if is_apic(index) {
            return self.wires.interrupts.read_msr(index);
        }
        if let Some(value) = self.msrs.memory_types.read(index) {
            return Ok(value);
        }
        let msrs = &self.msrs;
        Ok(match index {
            msr::IA32_EFER => self.efer.bits(),
            msr::IA32_STAR => msrs.star,
            msr::IA32_LSTAR => msrs.lstar,
            msr::IA32_CSTAR => msrs.cstar,
            msr::IA32_FMASK => msrs.fmask,
            msr::IA32_FS_BASE => self.segment(SegmentRegister::Fs).base,
            msr::IA32_GS_BASE => self.segment(SegmentRegister::Gs).base,
            msr::IA32_KERNEL_GS_BASE => msrs.kernel_gs_base,
            msr::IA32_SYSENTER_CS => msrs.sysenter_cs,
            msr::IA32_SYSENTER_ESP => msrs.sysenter_esp,
            msr::IA32_SYSENTER_EIP => msrs.sysenter_eip,
            msr::IA32_MISC_ENABLE => {
                let counters =
                    if self.wires.model.has(feature::ARCH_PERFMON) { misc_enable::COUNTERS } else { 0 };
                msrs.misc_enable | counters
            }
            msr::IA32_DEBUGCTL => msrs.debugctl,
            msr::IA32_XSS => self.has(feature::XSAVES).map(|()| msrs.xss)?,
            msr::IA32_PKRS => self.has(feature::PKS).map(|()| u64::from(msrs.pkrs))?,
            msr::IA32_FEATURE_CONTROL => FEATURE_CONTROL_LOCKED,
            msr::IA32_PLATFORM_ID | SMI_COUNT => 0,
            msr::IA32_BIOS_SIGN_ID => MICROCODE_REVISION << 32,
            // The ratio to the 100 MHz of the bus.
            PLATFORM_INFO => ((self.wires.time.tsc_frequency() / 100_000_000) & 0xff) << 8,
            msr::IA32_MCG_CAP => MACHINE_CHECK_BANKS as u64,
            msr::IA32_MCG_STATUS => msrs.machine_check_status,
            MACHINE_CHECK_0..=MACHINE_CHECK_LAST => {
                let n = (index - MACHINE_CHECK_0) as usize;
                msrs.machine_check[n / 4][n % 4]
            }
            msr::IA32_TSC | msr::IA32_TSC_ADJUST | msr::IA32_TSC_AUX | msr::IA32_TSC_DEADLINE => {
                return self.read_time_msr(index);
            }
            msr::IA32_SPEC_CTRL | msr::IA32_ARCH_CAPABILITIES => return self.read_speculation_msr(index),
            msr::KVM_WALL_CLOCK..=msr::KVM_SYSTEM_TIME | msr::KVM_WALL_CLOCK_NEW..=msr::KVM_POLL_CONTROL => {
                return self.read_kvm_msr(index);
            }
            _ => return self.read_counter_msr(index),
        })
    }

    /// Writes a model-specific register.
    ///
    /// # Errors
    /// [`MsrFault`] where there is no such register, or it refuses the value.
    pub fn write_msr(&mut self, index: u32, value: u64) -> Result<(), MsrFault> {
        if is_apic(index) {
            return self.wires.interrupts.write_msr(index, value);
        }
        let physical_bits = self.wires.model.physical_bits();
        if let Some(result) = self.msrs.memory_types.write(index, value, physical_bits) {
            return result;
        }
        match index {
            msr::IA32_EFER => return self.write_efer(value),
            msr::IA32_STAR => self.msrs.star = value,
            msr::IA32_LSTAR => self.msrs.lstar = self.canonical(value)?,
            msr::IA32_CSTAR => self.msrs.cstar = self.canonical(value)?,
            msr::IA32_FMASK => self.msrs.fmask = fits(value, 0xffff_ffff)?,
            msr::IA32_FS_BASE => {
                let base = self.canonical(value)?;
                self.set_segment_base(SegmentRegister::Fs, base);
            }
            msr::IA32_GS_BASE => {
                let base = self.canonical(value)?;
                self.set_segment_base(SegmentRegister::Gs, base);
            }
            msr::IA32_KERNEL_GS_BASE => self.msrs.kernel_gs_base = self.canonical(value)?,
            msr::IA32_SYSENTER_CS => self.msrs.sysenter_cs = value & 0xffff_ffff,
            msr::IA32_SYSENTER_ESP => self.msrs.sysenter_esp = self.canonical(value)?,
            msr::IA32_SYSENTER_EIP => self.msrs.sysenter_eip = self.canonical(value)?,
            msr::IA32_MISC_ENABLE => {
                let mut writable = misc_enable::WRITABLE;
                if !self.wires.model.has(feature::NX) {
                    writable &= !misc_enable::XD_DISABLE;
                }
                let value = fits(value, writable | misc_enable::READ_ONLY)? & writable;
                self.msrs.misc_enable = self.msrs.misc_enable & misc_enable::READ_ONLY | value;
            }
            msr::IA32_XSS => {
                self.has(feature::XSAVES)?;
                self.msrs.xss = fits(value, 0)?;
            }
            msr::IA32_DEBUGCTL => {
                let counters = self.wires.model.has(feature::ARCH_PERFMON);
                let allowed = DEBUGCTL_LBR_BTF | if counters { DEBUGCTL_FREEZE } else { 0 };
                self.msrs.debugctl = fits(value, allowed)?;
            }
            msr::IA32_PKRS => {
                self.has(feature::PKS)?;
                self.msrs.pkrs = fits(value, 0xffff_ffff)? as u32;
                self.update_keys();
            }
            // Software clears the revision, asks CPUID, and reads it: that it is always there does no harm.
            msr::IA32_BIOS_SIGN_ID | BIOS_UPDATE_TRIGGER => {}
            msr::IA32_MCG_STATUS => self.msrs.machine_check_status = fits(value, 7)?,
            MACHINE_CHECK_0..=MACHINE_CHECK_LAST => {
                let n = (index - MACHINE_CHECK_0) as usize;
                self.msrs.machine_check[n / 4][n % 4] = bank_value(n % 4, value)?;
            }
            msr::IA32_TSC | msr::IA32_TSC_ADJUST | msr::IA32_TSC_AUX | msr::IA32_TSC_DEADLINE => {
                return self.write_time_msr(index, value);
            }
            msr::IA32_SPEC_CTRL | msr::IA32_PRED_CMD | msr::IA32_FLUSH_CMD => {
                return self.write_speculation_msr(index, value);
            }
            msr::KVM_WALL_CLOCK..=msr::KVM_SYSTEM_TIME | msr::KVM_WALL_CLOCK_NEW..=msr::KVM_POLL_CONTROL => {
                return self.write_kvm_msr(index, value);
            }
            _ => return self.write_counter_msr(index, value, self.boundary_moment()),
        }
        Ok(())
    }

    fn canonical(&self, address: u64) -> Result<u64, MsrFault> {
        let unused = 64 - self.wires.model.linear_bits();
        let canonical = ((address << unused) as i64 >> unused) as u64 == address;
        canonical.then_some(address).ok_or(MsrFault)
    }

    fn has(&self, feature: feature::Feature) -> Result<(), MsrFault> {
        self.wires.model.has(feature).then_some(()).ok_or(MsrFault)
    }

    fn has_tsc_aux(&self) -> Result<(), MsrFault> {
        self.has(feature::RDTSCP).or_else(|MsrFault| self.has(feature::RDPID))
    }

    fn write_efer(&mut self, value: u64) -> Result<(), MsrFault> {
        let mut allowed = Efer::LMA | Efer::LME | Efer::SCE;
        let disabled = self.msrs.misc_enable & misc_enable::XD_DISABLE != 0 && !self.efer.contains(Efer::NXE);
        allowed.set(Efer::NXE, self.wires.model.has(feature::NX) && !disabled);
        let value = Efer::from_bits_retain(value);
        let changes = (self.efer ^ value) & allowed;
        if !allowed.contains(value) || changes.contains(Efer::LME) && self.paging_enabled() {
            return Err(MsrFault);
        }
        // LMA follows CR0.PG alone.
        self.efer = (value - Efer::LMA) | (self.efer & Efer::LMA);
        if changes.contains(Efer::NXE) {
            self.update_paging();
        }
        Ok(())
    }

    /// The deadline is one of the guest's counter; the local APIC knows the machine's.
    fn read_time_msr(&self, index: u32) -> Result<u64, MsrFault> {
        Ok(match index {
            msr::IA32_TSC => self.tsc(),
            msr::IA32_TSC_ADJUST => self.has(feature::TSC_ADJUST).map(|()| self.msrs.tsc_adjust)?,
            msr::IA32_TSC_AUX => self.has_tsc_aux().map(|()| self.msrs.tsc_aux)?,
            _ => {
                match self.has(feature::TSC_DEADLINE).and_then(|()| self.wires.interrupts.read_msr(index))? {
                    0 => 0,
                    deadline => deadline.wrapping_add(self.msrs.tsc_offset).max(1),
                }
            }
        })
    }

    fn write_time_msr(&mut self, index: u32, value: u64) -> Result<(), MsrFault> {
        match index {
            msr::IA32_TSC => self.move_counter(value.wrapping_sub(self.tsc())),
            msr::IA32_TSC_ADJUST => {
                self.has(feature::TSC_ADJUST)?;
                self.move_counter(value.wrapping_sub(self.msrs.tsc_adjust));
            }
            msr::IA32_TSC_AUX => {
                self.has_tsc_aux()?;
                self.msrs.tsc_aux = fits(value, 0xffff_ffff)?;
            }
            _ => {
                self.has(feature::TSC_DEADLINE)?;
                let deadline = if value == 0 { 0 } else { value.wrapping_sub(self.msrs.tsc_offset).max(1) };
                return self.wires.interrupts.write_msr(index, deadline);
            }
        }
        Ok(())
    }

    /// A write of the counter or of its adjustment moves both.
    fn move_counter(&mut self, by: u64) {
        self.msrs.tsc_offset = self.msrs.tsc_offset.wrapping_add(by);
        self.msrs.tsc_adjust = self.msrs.tsc_adjust.wrapping_add(by);
        self.msrs.clock.publish(&self.memory, &*self.wires.time, self.msrs.tsc_offset);
    }

    fn read_speculation_msr(&self, index: u32) -> Result<u64, MsrFault> {
        match index {
            msr::IA32_SPEC_CTRL => self.has(feature::SPEC_CTRL).map(|()| self.msrs.spec_ctrl),
            _ => self.has(feature::ARCH_CAPABILITIES).map(|()| ARCH_CAPABILITIES),
        }
    }

    /// IBRS, STIBP and SSBD are kept; barriers and flushes have nothing to do.
    fn write_speculation_msr(&mut self, index: u32, value: u64) -> Result<(), MsrFault> {
        match index {
            msr::IA32_SPEC_CTRL => {
                self.has(feature::SPEC_CTRL)?;
                let bit = |feature, bit: u64| if self.wires.model.has(feature) { bit } else { 0 };
                let (ibrs, stibp, ssbd) = (1, bit(feature::STIBP, 2), bit(feature::SSBD, 4));
                self.msrs.spec_ctrl = fits(value, ibrs | stibp | ssbd)?;
            }
            msr::IA32_PRED_CMD => {
                self.has(feature::SPEC_CTRL)?;
                fits(value, 1)?;
            }
            _ => {
                self.has(feature::FLUSH_L1D)?;
                fits(value, 1)?;
            }
        }
        Ok(())
    }

    fn read_kvm_msr(&self, index: u32) -> Result<u64, MsrFault> {
        self.has(feature::HYPERVISOR)?;
        match index {
            msr::KVM_SYSTEM_TIME | msr::KVM_SYSTEM_TIME_NEW => Ok(self.msrs.clock.system_time),
            msr::KVM_WALL_CLOCK | msr::KVM_WALL_CLOCK_NEW => Ok(self.msrs.clock.wall_clock),
            // The feature leaf of CPUID offers none of the others.
            _ => Err(MsrFault),
        }
    }

    fn write_kvm_msr(&mut self, index: u32, value: u64) -> Result<(), MsrFault> {
        self.has(feature::HYPERVISOR)?;
        match index {
            msr::KVM_SYSTEM_TIME | msr::KVM_SYSTEM_TIME_NEW => {
                self.msrs.clock.system_time = value;
                self.msrs.clock.publish(&self.memory, &*self.wires.time, self.msrs.tsc_offset);
            }
            msr::KVM_WALL_CLOCK | msr::KVM_WALL_CLOCK_NEW => {
                self.msrs.clock.wall_clock = value;
                self.msrs.clock.publish_wall_clock(&self.memory, &*self.wires.time);
            }
            _ => return Err(MsrFault),
        }
        Ok(())
    }

    /// The model-specific registers that stand nowhere else in a saved state: index and value.
    pub fn saved_msrs(&self) -> Vec<(u32, u64)> {
        let banks = MACHINE_CHECK_0..=MACHINE_CHECK_LAST;
        let indices = SAVED.iter().copied().chain(banks).chain(MemoryTypes::indices()).chain(Pmu::indices());
        indices.filter_map(|index| self.read_msr(index).ok().map(|value| (index, value))).collect()
    }

    /// Restores one of [`Cpu::saved_msrs`].
    ///
    /// # Errors
    /// [`MsrFault`] for a register that this model does not have, or a value that it refuses.
    pub fn restore_msr(&mut self, index: u32, value: u64) -> Result<(), MsrFault> {
        if index == msr::IA32_TSC_ADJUST {
            // The counter itself is restored by its own value.
            self.msrs.tsc_adjust = value;
            return Ok(());
        }
        if index == msr::IA32_PERF_GLOBAL_STATUS {
            self.has(feature::ARCH_PERFMON)?;
            return self.pmu.restore_status(value);
        }
        self.write_msr(index, value)
    }
}

/// What is saved, in the order of restoring: the counter before its adjustment and before the deadline, the local
/// APIC's own registers by the local APIC.
const SAVED: [u32; 19] = [
    msr::IA32_TSC,
    msr::IA32_TSC_ADJUST,
    msr::IA32_TSC_AUX,
    msr::IA32_STAR,
    msr::IA32_LSTAR,
    msr::IA32_CSTAR,
    msr::IA32_FMASK,
    msr::IA32_KERNEL_GS_BASE,
    msr::IA32_SYSENTER_CS,
    msr::IA32_SYSENTER_ESP,
    msr::IA32_SYSENTER_EIP,
    msr::IA32_MISC_ENABLE,
    msr::IA32_DEBUGCTL,
    msr::IA32_PKRS,
    msr::IA32_SPEC_CTRL,
    msr::IA32_MCG_STATUS,
    msr::KVM_SYSTEM_TIME_NEW,
    msr::KVM_WALL_CLOCK_NEW,
    msr::IA32_TSC_DEADLINE,
];

/// What a register of a machine-check bank becomes. All errors of a bank are reported or none (P6's processors have
/// no other values of CTL, but old systems clear its bits 0 and 10), and STATUS can only be cleared.
fn bank_value(register: usize, value: u64) -> Result<u64, MsrFault> {
    let good = match register {
        0 => value == 0 || value | 0x401 == u64::MAX,
        1 => value == 0,
        _ => true,
    };
    good.then_some(value).ok_or(MsrFault)
}

/// The value, where it has no bits but these.
fn fits(value: u64, allowed: u64) -> Result<u64, MsrFault> {
    (value & !allowed == 0).then_some(value).ok_or(MsrFault)
}

#[cfg(test)]
mod tests;
