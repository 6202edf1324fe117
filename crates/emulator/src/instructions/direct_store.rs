//! Stores past the caches, which here are stores like others. SDM vol. 2, *MOVDIRI*, *MOVDIR64B*.

use x86::SegmentRegister;

use crate::cpu::Cpu;
use crate::insn::{Insn, Stop};

/// Bytes that MOVDIR64B moves, and that its destination is aligned to.
const LINE: u64 = 64;

/// MOVDIRI m32/m64, r32/r64.
pub fn movdiri(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let value = cpu.registers.get(insn.r2);
    if insn.size == 8 { cpu.store(insn, value) } else { cpu.store(insn, value as u32) }
}

/// MOVDIR64B: the destination's offset in ES is in a register, of the address size.
pub fn movdir64b(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let source = cpu.linear::<false>(insn, LINE)?;
    let mut line = [0; LINE as usize];
    // The destination is looked at once the source has been read.
    cpu.read_bytes(cpu.mmu.view, source, &mut line)?;
    let offset = cpu.registers.get(insn.r1) & insn.address_mask();
    let destination = if cpu.mode.is_64() {
        offset
    } else {
        cpu.string_linear(SegmentRegister::Es as u8, offset, LINE, true)?
    };
    // As aligned as it is, its first byte tells whether it is canonical; whatever the source's base is, this is #GP.
    if !destination.is_multiple_of(LINE) || !cpu.mmu.paging.is_data_canonical(destination) {
        return Err(cpu.gp0());
    }
    let place = cpu.place_linear(destination, LINE)?;
    cpu.write_place(place, &line);
    Ok(())
}

#[cfg(test)]
mod tests {
    use x86::{Exception, Vector};

    use crate::cpuid::feature;
    use crate::testing::{get, long, protected, put, run, wires_for};

    const MOVDIR64B_RAX_RBX: [u8; 5] = [0x66, 0x0f, 0x38, 0xf8, 0x03];

    #[test]
    fn movdiri_stores_a_register() {
        let mut cpu = long();
        cpu.registers.set(0, 0x1122_3344_5566_7788);
        cpu.registers.set(3, 0x5003);
        put(&cpu, 0x5003, u64::MAX);
        run(&mut cpu, &[0x0f, 0x38, 0xf9, 0x03]).unwrap();
        assert_eq!(get::<u64>(&cpu, 0x5003), 0xffff_ffff_5566_7788);
        run(&mut cpu, &[0x48, 0x0f, 0x38, 0xf9, 0x03]).unwrap();
        assert_eq!(get::<u64>(&cpu, 0x5003), 0x1122_3344_5566_7788);
    }

    #[test]
    fn movdir64b_moves_a_line_to_an_aligned_place() {
        for mut cpu in [long(), protected()] {
            (0..64).for_each(|n| put(&cpu, 0x5fe1 + n, n as u8 + 1));
            cpu.registers.set(0, 0x7040);
            cpu.registers.set(3, 0x5fe1);
            run(&mut cpu, &MOVDIR64B_RAX_RBX).unwrap();
            assert!((0..64).all(|n| get::<u8>(&cpu, 0x7040 + n) == n as u8 + 1));
            assert_eq!((get::<u8>(&cpu, 0x703f), get::<u8>(&cpu, 0x7080)), (0, 0));
            cpu.registers.set(0, 0x7048);
            assert_eq!(run(&mut cpu, &MOVDIR64B_RAX_RBX), Err(Exception::gp(0)));
        }
    }

    #[test]
    fn a_line_that_cannot_be_read_or_written_changes_nothing() {
        let mut cpu = long();
        cpu.registers.set(0, 0x7040);
        cpu.registers.set(3, 0x1_0000_0000);
        let fault = run(&mut cpu, &MOVDIR64B_RAX_RBX).unwrap_err();
        assert_eq!((fault.vector, fault.error_code), (Vector::PageFault, Some(0)));
        cpu.registers.set(3, 0x5000);
        cpu.registers.set(0, 0x1_0000_0000);
        let fault = run(&mut cpu, &MOVDIR64B_RAX_RBX).unwrap_err();
        assert_eq!((fault.vector, fault.error_code), (Vector::PageFault, Some(2)));
    }

    #[test]
    fn models_without_them_have_no_such_instructions() {
        let mut cpu = long();
        cpu.wires = wires_for("x86-64-v4");
        assert!(!cpu.wires.model.has(feature::MOVDIRI));
        for bytes in [&[0x0f, 0x38, 0xf9, 0x03][..], &MOVDIR64B_RAX_RBX] {
            assert_eq!(run(&mut cpu, bytes), Err(Exception::ud()));
        }
    }
}
