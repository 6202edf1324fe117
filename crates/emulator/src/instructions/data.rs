//! Moves, exchanges and conversions. SDM vol. 2.

use super::shape::{Form, Shape, by_size, by_size_from_16};
use crate::cpu::Cpu;
use crate::insn::{Handler, Insn, Stop};
use crate::mmu::Access;
use crate::width::Width;

/// MOV between general registers, memory and immediates.
pub fn mov(shape: &Shape) -> Option<Handler> {
    Some(match shape.form {
        Form::RegReg => by_size!(shape.size, mov_reg_reg),
        Form::RegMem => by_size!(shape.size, mov_reg_mem),
        Form::MemReg => by_size!(shape.size, mov_mem_reg),
        Form::RegImm => by_size!(shape.size, mov_reg_imm),
        Form::MemImm => by_size!(shape.size, mov_mem_imm),
        _ => return None,
    })
}

fn mov_reg_reg<W: Width>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let value = W::read(&cpu.registers, insn.r2);
    W::write(&mut cpu.registers, insn.r1, value);
    Ok(())
}

fn mov_reg_mem<W: Width>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let value = cpu.load::<W>(insn)?;
    W::write(&mut cpu.registers, insn.r1, value);
    Ok(())
}

fn mov_mem_reg<W: Width>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let value = W::read(&cpu.registers, insn.r2);
    cpu.store(insn, value)
}

fn mov_reg_imm<W: Width>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    W::write(&mut cpu.registers, insn.r1, W::truncate(insn.imm));
    Ok(())
}

fn mov_mem_imm<W: Width>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    cpu.store(insn, W::truncate(insn.imm))
}

/// MOVZX.
pub fn movzx(shape: &Shape) -> Option<Handler> {
    extend::<Zero>(shape)
}

/// MOVSX and MOVSXD.
pub fn movsx(shape: &Shape) -> Option<Handler> {
    extend::<Sign>(shape)
}

/// How a narrow value becomes a wide one.
trait Extension {
    fn extend<S: Width>(value: S) -> u64;
}
struct Zero;
struct Sign;
impl Extension for Zero {
    fn extend<S: Width>(value: S) -> u64 {
        value.zext()
    }
}
impl Extension for Sign {
    fn extend<S: Width>(value: S) -> u64 {
        value.sext()
    }
}

fn extend<E: Extension + 'static>(shape: &Shape) -> Option<Handler> {
    Some(match shape.source_size {
        1 => extend_from::<E, u8>(shape)?,
        2 => extend_from::<E, u16>(shape)?,
        _ => extend_from::<E, u32>(shape)?,
    })
}

fn extend_from<E: Extension + 'static, S: Width>(shape: &Shape) -> Option<Handler> {
    Some(match (shape.form, shape.size) {
        (Form::RegReg, 2) => extend_reg::<E, S, u16>,
        (Form::RegReg, 4) => extend_reg::<E, S, u32>,
        (Form::RegReg, _) => extend_reg::<E, S, u64>,
        (Form::RegMem, 2) => extend_mem::<E, S, u16>,
        (Form::RegMem, 4) => extend_mem::<E, S, u32>,
        (Form::RegMem, _) => extend_mem::<E, S, u64>,
        _ => return None,
    })
}

fn extend_reg<E: Extension, S: Width, W: Width>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let value = E::extend(S::read(&cpu.registers, insn.r2));
    W::write(&mut cpu.registers, insn.r1, W::truncate(value));
    Ok(())
}

fn extend_mem<E: Extension, S: Width, W: Width>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let value = E::extend(cpu.load::<S>(insn)?);
    W::write(&mut cpu.registers, insn.r1, W::truncate(value));
    Ok(())
}

/// LEA.
pub fn lea(shape: &Shape) -> Option<Handler> {
    Some(by_size_from_16!(shape.size, lea_to))
}

fn lea_to<W: Width>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let address = cpu.effective(insn);
    W::write(&mut cpu.registers, insn.r1, W::truncate(address));
    Ok(())
}

/// XCHG: with memory it is always locked.
pub fn xchg(shape: &Shape) -> Option<Handler> {
    Some(match shape.form {
        Form::RegReg => by_size!(shape.size, xchg_reg),
        Form::MemReg | Form::RegMem => by_size!(shape.size, xchg_mem),
        _ => return None,
    })
}

fn xchg_reg<W: Width>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let (a, b) = (W::read(&cpu.registers, insn.r1), W::read(&cpu.registers, insn.r2));
    W::write(&mut cpu.registers, insn.r1, b);
    W::write(&mut cpu.registers, insn.r2, a);
    Ok(())
}

fn xchg_mem<W: Width>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    // The register is operand 1 or operand 0; the other's number is zero, as no memory operand has one.
    let register = insn.r1 | insn.r2;
    let place = cpu.place::<W>(insn)?;
    let value = W::read(&cpu.registers, register);
    let old = cpu.exchange_place(place, |_| value);
    W::write(&mut cpu.registers, register, old);
    Ok(())
}

/// XADD.
pub fn xadd(shape: &Shape) -> Option<Handler> {
    Some(match shape.form {
        Form::RegReg => by_size!(shape.size, xadd_reg),
        Form::MemReg => by_size!(shape.size, xadd_mem),
        _ => return None,
    })
}

fn xadd_reg<W: Width>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let (a, b) = (W::read(&cpu.registers, insn.r1), W::read(&cpu.registers, insn.r2));
    let sum = W::truncate(a.zext().wrapping_add(b.zext()));
    cpu.flags.set_add(a, b, sum);
    W::write(&mut cpu.registers, insn.r2, a);
    W::write(&mut cpu.registers, insn.r1, sum);
    Ok(())
}

fn xadd_mem<W: Width>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let place = cpu.place::<W>(insn)?;
    let b = W::read(&cpu.registers, insn.r2);
    let sum = |a: W| W::truncate(a.zext().wrapping_add(b.zext()));
    let old = if insn.has(crate::insn::flag::LOCK) {
        cpu.exchange_place(place, sum)
    } else {
        let old = cpu.load_place(place);
        cpu.store_place(place, sum(old));
        old
    };
    cpu.flags.set_add(old, b, sum(old));
    W::write(&mut cpu.registers, insn.r2, old);
    Ok(())
}

/// CMPXCHG.
pub fn cmpxchg(shape: &Shape) -> Option<Handler> {
    Some(match shape.form {
        Form::RegReg => by_size!(shape.size, cmpxchg_reg),
        Form::MemReg => by_size!(shape.size, cmpxchg_mem),
        _ => return None,
    })
}

fn compare_accumulator<W: Width>(cpu: &mut Cpu, value: W) -> bool {
    let accumulator = W::read(&cpu.registers, 0);
    cpu.flags.set_sub(accumulator, value, W::truncate(accumulator.zext().wrapping_sub(value.zext())));
    accumulator == value
}

fn cmpxchg_reg<W: Width>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let value = W::read(&cpu.registers, insn.r1);
    if compare_accumulator(cpu, value) {
        let new = W::read(&cpu.registers, insn.r2);
        W::write(&mut cpu.registers, insn.r1, new);
    } else {
        W::write(&mut cpu.registers, 0, value);
    }
    Ok(())
}

fn cmpxchg_mem<W: Width>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let place = cpu.place::<W>(insn)?;
    let (accumulator, new) = (W::read(&cpu.registers, 0), W::read(&cpu.registers, insn.r2));
    // The processor writes in either case: what it compared, where that differs.
    let held = match place {
        crate::mmu::Place::Ram(offset) => cpu.memory.compare_exchange(offset, accumulator, new),
        slow => cpu.exchange_place(slow, |held| if held == accumulator { new } else { held }),
    };
    if !compare_accumulator(cpu, held) {
        W::write(&mut cpu.registers, 0, held);
    }
    Ok(())
}

/// CMPXCHG8B.
pub fn cmpxchg8b(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let place = cpu.place::<u64>(insn)?;
    let pair = |cpu: &Cpu, high: u8, low: u8| {
        u64::from(cpu.registers.get(high) as u32) << 32 | u64::from(cpu.registers.get(low) as u32)
    };
    let (expected, new) = (pair(cpu, 2, 0), pair(cpu, 1, 3));
    let held = match place {
        crate::mmu::Place::Ram(offset) => cpu.memory.compare_exchange(offset, expected, new),
        slow => cpu.exchange_place(slow, |held| if held == expected { new } else { held }),
    };
    if held != expected {
        u32::write(&mut cpu.registers, 0, held as u32);
        u32::write(&mut cpu.registers, 2, (held >> 32) as u32);
    }
    cpu.flags.set_zf(held == expected);
    Ok(())
}

/// CMPXCHG16B.
pub fn cmpxchg16b(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let linear = cpu.linear::<true>(insn, 16)?;
    if linear % 16 != 0 {
        return Err(cpu.gp0());
    }
    let place = cpu.place_linear(linear, 16)?;
    let pair = |cpu: &Cpu, high: u8, low: u8| {
        u128::from(cpu.registers.get(high)) << 64 | u128::from(cpu.registers.get(low))
    };
    let (expected, new) = (pair(cpu, 2, 0), pair(cpu, 1, 3));
    let held = match place {
        crate::mmu::Place::Ram(offset) => cpu.memory.compare_exchange_16(offset, expected, new),
        slow => {
            let mut bytes = [0; 16];
            cpu.read_place(slow, &mut bytes);
            let held = u128::from_le_bytes(bytes);
            if held == expected {
                cpu.write_place(slow, &new.to_le_bytes());
            }
            held
        }
    };
    if held != expected {
        cpu.registers.set(0, held as u64);
        cpu.registers.set(2, (held >> 64) as u64);
    }
    cpu.flags.set_zf(held == expected);
    Ok(())
}

/// CMOVcc: loads in either case, and a doubleword destination is cleared above in either case.
pub fn cmov<const CC: u8>(shape: &Shape) -> Option<Handler> {
    Some(match (shape.form, shape.size) {
        (Form::RegReg, 2) => cmov_reg::<CC, u16>,
        (Form::RegReg, 4) => cmov_reg::<CC, u32>,
        (Form::RegReg, _) => cmov_reg::<CC, u64>,
        (Form::RegMem, 2) => cmov_mem::<CC, u16>,
        (Form::RegMem, 4) => cmov_mem::<CC, u32>,
        (Form::RegMem, _) => cmov_mem::<CC, u64>,
        _ => return None,
    })
}

fn cmov_reg<const CC: u8, W: Width>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let source = if cpu.flags.condition::<CC>() { insn.r2 } else { insn.r1 };
    let value = W::read(&cpu.registers, source);
    W::write(&mut cpu.registers, insn.r1, value);
    Ok(())
}

fn cmov_mem<const CC: u8, W: Width>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let loaded = cpu.load::<W>(insn)?;
    let value = if cpu.flags.condition::<CC>() { loaded } else { W::read(&cpu.registers, insn.r1) };
    W::write(&mut cpu.registers, insn.r1, value);
    Ok(())
}

/// SETcc.
pub fn set<const CC: u8>(shape: &Shape) -> Option<Handler> {
    Some(match shape.form {
        Form::Reg => set_reg::<CC>,
        Form::Mem => set_mem::<CC>,
        _ => return None,
    })
}

fn set_reg<const CC: u8>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let value = u8::from(cpu.flags.condition::<CC>());
    u8::write(&mut cpu.registers, insn.r1, value);
    Ok(())
}

fn set_mem<const CC: u8>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    cpu.store(insn, u8::from(cpu.flags.condition::<CC>()))
}

/// BSWAP; of a word it gives zero, as Intel's processors do.
pub fn bswap(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    match insn.size {
        8 => {
            let value = cpu.registers.get(insn.r1).swap_bytes();
            cpu.registers.set(insn.r1, value);
        }
        4 => {
            let value = (cpu.registers.get(insn.r1) as u32).swap_bytes();
            u32::write(&mut cpu.registers, insn.r1, value);
        }
        _ => u16::write(&mut cpu.registers, insn.r1, 0),
    }
    Ok(())
}

/// CLFLUSH, CLFLUSHOPT and CLWB: nothing is flushed, but the line is looked up as a load's byte is.
pub fn flush_line(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let linear = cpu.linear::<false>(insn, 1)?;
    cpu.place_for(linear, 1, Access::Read)?;
    Ok(())
}

/// XLATB.
pub fn xlatb(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let offset = (cpu.registers.get(3).wrapping_add(cpu.registers.get(0) & 0xff)) & insn.address_mask();
    let linear = cpu.string_linear(insn.segment, offset, 1, false)?;
    let value = cpu.load_linear::<u8>(linear)?;
    u8::write(&mut cpu.registers, 0, value);
    Ok(())
}

/// CBW, CWDE, CDQE: the accumulator's lower half sign-extended into it.
pub fn extend_accumulator(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let a = cpu.registers.get(0);
    match insn.size {
        2 => u16::write(&mut cpu.registers, 0, a as i8 as u16),
        4 => u32::write(&mut cpu.registers, 0, a as i16 as u32),
        _ => cpu.registers.set(0, a as i32 as u64),
    }
    Ok(())
}

/// CWD, CDQ, CQO: the accumulator's sign fills RDX.
pub fn extend_into_rdx(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let a = cpu.registers.get(0);
    match insn.size {
        2 => u16::write(&mut cpu.registers, 2, (a as i16 >> 15) as u16),
        4 => u32::write(&mut cpu.registers, 2, (a as i32 >> 31) as u32),
        _ => cpu.registers.set(2, (a as i64 >> 63) as u64),
    }
    Ok(())
}
