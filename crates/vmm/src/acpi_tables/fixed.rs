//! The FADT: where the fixed hardware is. ACPI Specification, *Fixed ACPI Description Table (FADT)*.

use ::acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use ::acpi_tables::gas::{AccessSize, AddressSpace, GAS};

use devices::{acpi_pm, cmos, reset};

use super::{OEM, OEM_REVISION, OEM_TABLE, bytes};

/// Latencies that mean "there is no such state", in microseconds.
const NO_C2: u16 = 101;
const NO_C3: u16 = 1001;

/// Bits of the IA-PC boot architecture flags. The 8042 and devices of a PC are there.
mod boot_architecture {
    pub(super) const LEGACY_DEVICES: u16 = 1 << 0;
    pub(super) const I8042: u16 = 1 << 1;
    pub(super) const NO_VGA: u16 = 1 << 2;
}

/// The table, with the DSDT at `dsdt` and the FACS at `facs`.
///
/// The power button is fixed hardware (its flag is clear), and so is the wake-up by the clock; there is no sleep button.
pub(super) fn fadt(dsdt: u64, facs: u64) -> Vec<u8> {
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .firmware_ctrl_32(facs as u32)
        .preferred_pm_profile(PmProfile::Unspecified);
    for flag in [Flags::Wbinvd, Flags::ProcC1, Flags::SlpButton, Flags::ResetRegSup] {
        fadt = fadt.flag(flag);
    }
    fadt.dsdt = (dsdt as u32).into();
    fadt.x_dsdt = dsdt.into();
    fadt.sci_int = (acpi_pm::SCI_IRQ as u16).into();
    fadt.smi_cmd = u32::from(acpi_pm::SMI_CMD).into();
    fadt.acpi_enable = acpi_pm::ACPI_ENABLE;
    fadt.acpi_disable = acpi_pm::ACPI_DISABLE;
    fadt.pm1a_evt_blk = u32::from(acpi_pm::PM1A_EVT).into();
    fadt.pm1a_cnt_blk = u32::from(acpi_pm::PM1A_CNT).into();
    fadt.pm_tmr_blk = u32::from(acpi_pm::PM_TMR).into();
    fadt.gpe0_blk = u32::from(acpi_pm::GPE0).into();
    fadt.pm1_evt_len = acpi_pm::PM1_EVT_LEN;
    fadt.pm1_cnt_len = acpi_pm::PM1_CNT_LEN;
    fadt.pm_tmr_len = acpi_pm::PM_TMR_LEN;
    fadt.gpe0_blk_len = acpi_pm::GPE0_LEN;
    fadt.x_pm1a_evt_blk = port(acpi_pm::PM1A_EVT, 8 * acpi_pm::PM1_EVT_LEN, AccessSize::WordAccess);
    fadt.x_pm1a_cnt_blk = port(acpi_pm::PM1A_CNT, 8 * acpi_pm::PM1_CNT_LEN, AccessSize::WordAccess);
    fadt.x_pm_tmr_blk = port(acpi_pm::PM_TMR, 8 * acpi_pm::PM_TMR_LEN, AccessSize::DwordAccess);
    fadt.x_gpe0_blk = port(acpi_pm::GPE0, 8 * acpi_pm::GPE0_LEN, AccessSize::ByteAccess);
    fadt.p_lvl2_lat = NO_C2.into();
    fadt.p_lvl3_lat = NO_C3.into();
    fadt.century = cmos::CENTURY;
    let architecture =
        boot_architecture::LEGACY_DEVICES | boot_architecture::I8042 | boot_architecture::NO_VGA;
    fadt.iapc_boot_arch = architecture.into();
    fadt.reset_reg = port(reset::RESET_CONTROL_PORT as u16, 8, AccessSize::ByteAccess);
    fadt.reset_value = reset::RESET_CONTROL_FULL;
    bytes(&fadt.finalize())
}

fn port(port: u16, bits: u8, access: AccessSize) -> GAS {
    GAS::new(AddressSpace::SystemIo, bits, 0, access, port.into())
}
