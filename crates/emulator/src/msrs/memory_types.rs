//! The page-attribute table and the memory-type range registers. SDM vol. 3, *Memory Cache Control*.
//!
//! They are kept and checked, and have no effect: a guest's caches are the host's.

use engine::MsrFault;
use x86::msr;

/// Variable ranges.
const RANGES: usize = 8;
/// IA32_MTRRCAP: the number of variable ranges, fixed ranges, write-combining.
const CAPABILITIES: u64 = RANGES as u64 | 1 << 8 | 1 << 10;
/// Write-back.
const WRITE_BACK: u64 = 6;
/// IA32_MTRR_DEF_TYPE.E: the ranges are in force.
const ENABLE: u64 = 1 << 11;
/// IA32_MTRR_DEF_TYPE.FE: the fixed ones too.
const ENABLE_FIXED: u64 = 1 << 10;

/// The registers' values.
#[derive(Clone, Debug, PartialEq)]
pub struct MemoryTypes {
    pat: u64,
    default: u64,
    fixed: [u64; 11],
    /// Base and mask of each variable range.
    variable: [[u64; 2]; RANGES],
}

impl MemoryTypes {
    /// PAT as after power-up; the ranges as firmware leaves them: write-back everywhere but in the window of the
    /// first megabyte where devices and option ROMs are. Linux gives PAT up where the ranges are not in force.
    pub fn reset() -> Self {
        let (write_back, write_protect) = (0x0606_0606_0606_0606, 0x0505_0505_0505_0505);
        let mut fixed = [write_protect; 11];
        fixed[..3].copy_from_slice(&[write_back, write_back, 0]);
        Self {
            pat: 0x0007_0406_0007_0406,
            default: ENABLE | ENABLE_FIXED | WRITE_BACK,
            fixed,
            variable: [[0; 2]; RANGES],
        }
    }

    /// Reads one of the registers; `None` where the index is another's.
    pub fn read(&self, index: u32) -> Option<u64> {
        Some(match index {
            msr::IA32_PAT => self.pat,
            msr::IA32_MTRRCAP => CAPABILITIES,
            msr::IA32_MTRR_DEF_TYPE => self.default,
            _ => match (fixed_slot(index), variable_slot(index)) {
                (Some(n), _) => self.fixed[n],
                (_, Some((n, part))) => self.variable[n][part],
                _ => return None,
            },
        })
    }

    /// Writes one of them; `None` where the index is another's. `physical_bits` is MAXPHYADDR.
    pub fn write(&mut self, index: u32, value: u64, physical_bits: u32) -> Option<Result<(), MsrFault>> {
        let (slot, good) = match index {
            msr::IA32_PAT => (&mut self.pat, value.to_le_bytes().iter().all(|&t| is_type(t) || t == 7)),
            msr::IA32_MTRRCAP => return Some(Err(MsrFault)),
            msr::IA32_MTRR_DEF_TYPE => {
                let reserved = !(ENABLE | ENABLE_FIXED | 0xff);
                (&mut self.default, value & reserved == 0 && is_type(value as u8))
            }
            _ => match (fixed_slot(index), variable_slot(index)) {
                (Some(n), _) => (&mut self.fixed[n], value.to_le_bytes().iter().all(|&t| is_type(t))),
                (_, Some((n, part))) => {
                    let address = value >> physical_bits == 0;
                    let low = if part == 0 {
                        value & 0xf00 == 0 && is_type(value as u8)
                    } else {
                        value & 0x7ff == 0
                    };
                    (&mut self.variable[n][part], address && low)
                }
                _ => return None,
            },
        };
        if good {
            *slot = value;
        }
        Some(good.then_some(()).ok_or(MsrFault))
    }

    /// The indices of all registers that can be written.
    pub fn indices() -> impl Iterator<Item = u32> {
        let variable = (0..2 * RANGES as u32).map(|n| msr::IA32_MTRR_PHYSBASE0 + n);
        let fixed = [msr::IA32_MTRR_FIX64K_00000, msr::IA32_MTRR_FIX16K_80000, msr::IA32_MTRR_FIX16K_A0000]
            .into_iter()
            .chain(msr::IA32_MTRR_FIX4K_C0000..=msr::IA32_MTRR_FIX4K_F8000);
        [msr::IA32_PAT, msr::IA32_MTRR_DEF_TYPE].into_iter().chain(variable).chain(fixed)
    }
}

fn fixed_slot(index: u32) -> Option<usize> {
    Some(match index {
        msr::IA32_MTRR_FIX64K_00000 => 0,
        msr::IA32_MTRR_FIX16K_80000 => 1,
        msr::IA32_MTRR_FIX16K_A0000 => 2,
        msr::IA32_MTRR_FIX4K_C0000..=msr::IA32_MTRR_FIX4K_F8000 => {
            3 + (index - msr::IA32_MTRR_FIX4K_C0000) as usize
        }
        _ => return None,
    })
}

fn variable_slot(index: u32) -> Option<(usize, usize)> {
    let n = index.checked_sub(msr::IA32_MTRR_PHYSBASE0)? as usize;
    (n < 2 * RANGES).then_some((n / 2, n % 2))
}

/// Uncacheable, write-combining, write-through, write-protected, write-back.
fn is_type(memory_type: u8) -> bool {
    matches!(memory_type, 0 | 1 | 4 | 5 | 6)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reserved_memory_types_are_refused() {
        let mut types = MemoryTypes::reset();
        assert_eq!(types.write(msr::IA32_PAT, 2, 46), Some(Err(MsrFault)));
        assert_eq!(types.write(msr::IA32_PAT, 0x0007_0106_0007_0106, 46), Some(Ok(())));
        assert_eq!(types.write(msr::IA32_MTRR_PHYSBASE0, 0x4000_0000_0000, 46), Some(Err(MsrFault)));
        assert_eq!(types.write(msr::IA32_MTRR_PHYSBASE0 + 16, 0, 46), None);
        assert_eq!(types.read(msr::IA32_PAT), Some(0x0007_0106_0007_0106));
    }

    #[test]
    fn every_listed_register_can_be_read_and_written_back() {
        let mut types = MemoryTypes::reset();
        for index in MemoryTypes::indices() {
            let value = types.read(index).unwrap();
            assert_eq!(types.write(index, value, 46), Some(Ok(())), "{index:#x}");
        }
    }
}
