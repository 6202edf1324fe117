use std::sync::Arc;
use std::sync::atomic::Ordering;

use engine::{Attention, VmExit};
use x86::{Exception, Flags};

use super::*;
use crate::interpreter::Interpreter;
use crate::jit::Settings;
use crate::shared::{Peers, Shared};
use crate::testing::*;

/// Instructions at every privilege.
const INSTRUCTIONS: u64 = 0x0043_00c0;
const INTERRUPT: u64 = 1 << 20;
const ROUNDS: u64 = 1000;
/// `mov (%rsi), %rax; nop × 7; loop`.
const LOOP: [u8; 12] = [0x48, 0x8b, 0x06, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0xe2, 0xf4];
const IN_LOOP: u64 = 9;
const RDPMC: [u8; 2] = [0x0f, 0x33];

/// A 64-bit processor that is to run [`LOOP`] and what is around it.
fn prepared() -> Cpu {
    let mut cpu = long();
    cpu.registers.set(3, ROUNDS);
    cpu.registers.set(6, 0x8000);
    cpu.write_msr(msr::IA32_PERF_GLOBAL_CTRL, 0).unwrap();
    cpu.write_msr(msr::IA32_PERFEVTSEL0, INSTRUCTIONS).unwrap();
    cpu
}

/// `mov $index, %ecx; mov $value, %eax; xor %edx, %edx; wrmsr`.
fn write_msr(index: u32, value: u32) -> Vec<u8> {
    let mut code = vec![0xb9];
    code.extend(index.to_le_bytes());
    code.push(0xb8);
    code.extend(value.to_le_bytes());
    code.extend([0x31, 0xd2, 0x0f, 0x30]);
    code
}

/// Enables the counters of `mask`, runs the loop, and disables them with the last instruction that they count.
fn measured(mask: u32) -> Vec<u8> {
    let mut code = write_msr(msr::IA32_PERF_GLOBAL_CTRL, mask);
    code.extend([0x89, 0xcf, 0x89, 0xd9]); // mov %ecx, %edi; mov %ebx, %ecx
    code.extend(LOOP);
    code.extend([0x89, 0xf9, 0x31, 0xc0, 0x31, 0xd2, 0x0f, 0x30]); // mov %edi, %ecx; xor; xor; wrmsr
    code
}
/// The instructions of [`measured`] that count.
const MEASURED: u64 = 2 + ROUNDS * IN_LOOP + 4;

/// Runs code until it halts, interpreted or translated.
fn execute(mut cpu: Cpu, code: &[u8], translated: bool) -> Cpu {
    for (at, &byte) in (CODE..).zip(code.iter().chain(&[0xf4])) {
        put(&cpu, at, byte);
    }
    for vector in [6, 13, 14] {
        set_gate(&cpu, vector, 0, 0);
        put(&cpu, handler(vector), 0xf4u8);
    }
    cpu.rip = CODE;
    let attention = Attention::new();
    let peers = Peers::join(Arc::new(Shared::new(1)), 0, attention.clone());
    let mut interpreter = Interpreter::new(cpu, attention, peers);
    if translated {
        let settings = Settings { hot: 2, ..Settings::default() };
        interpreter.enable_jit_with(settings).unwrap();
    }
    assert!(matches!(interpreter.run(), VmExit::Halt));
    if translated && code.windows(LOOP.len()).any(|part| part == LOOP) {
        assert!(interpreter.jit_statistics().unwrap().blocks > 0, "nothing was translated");
    }
    interpreter.cpu
}

#[test]
fn instructions_are_counted_exactly_interpreted_and_translated() {
    for translated in [false, true] {
        let cpu = execute(prepared(), &measured(1), translated);
        assert_eq!(cpu.pmu.counters[0], MEASURED, "translated: {translated}");
        assert!(!cpu.pmu.is_active());
    }
}

#[test]
fn fixed_counters_count_instructions_and_as_many_cycles() {
    for translated in [false, true] {
        let mut cpu = prepared();
        cpu.write_msr(msr::IA32_FIXED_CTR_CTRL, 0x333).unwrap();
        // The general counters are not enabled.
        let mut code = write_msr(msr::IA32_PERF_GLOBAL_CTRL, 0);
        code.splice(5.., [0x31, 0xc0, 0xba, 0x07, 0, 0, 0, 0x0f, 0x30]); // xor %eax, %eax; mov $7, %edx; wrmsr
        code.extend([0x89, 0xd9]);
        code.extend(LOOP);
        let cpu = execute(cpu, &code, translated);
        let read = |n| cpu.read_msr(msr::IA32_FIXED_CTR0 + n).unwrap();
        // With the HLT at the end.
        let expected = 1 + ROUNDS * IN_LOOP + 1;
        assert_eq!([read(0), read(1)], [expected; 2]);
        assert_eq!(cpu.pmu.counters[0], 0);
    }
}

#[test]
fn an_overflow_interrupts_exactly_then_and_can_stop_all_counters() {
    for translated in [false, true] {
        for before in (1..40).chain(MEASURED - 20..=MEASURED) {
            let mut cpu = prepared();
            cpu.write_msr(msr::IA32_PERFEVTSEL0, INSTRUCTIONS | INTERRUPT).unwrap();
            cpu.write_msr(msr::IA32_PERFEVTSEL0 + 1, INSTRUCTIONS).unwrap();
            cpu.write_msr(msr::IA32_A_PMC0, MASK + 1 - before).unwrap();
            cpu.write_msr(msr::IA32_DEBUGCTL, 1 << 12).unwrap();
            let interrupts = Arc::new(MockInterrupts::default());
            cpu.wires.interrupts = interrupts.clone();
            let cpu = execute(cpu, &measured(3), translated);
            let what = format!("after {before}, translated: {translated}");
            assert_eq!(interrupts.counter_interrupts.load(Ordering::Relaxed), 1, "{what}");
            assert_eq!(cpu.read_msr(msr::IA32_PERF_GLOBAL_STATUS), Ok(1), "{what}");
            assert_eq!(cpu.pmu.counters[..2], [0, before], "{what}");
        }
    }
}

#[test]
fn an_overflow_without_interrupt_is_found_in_the_status_and_can_be_cleared() {
    let mut cpu = prepared();
    cpu.write_msr(msr::IA32_A_PMC0, MASK - 4).unwrap();
    let mut cpu = execute(cpu, &measured(1), true);
    assert_eq!(cpu.read_msr(msr::IA32_PERF_GLOBAL_STATUS), Ok(1));
    assert_eq!(cpu.pmu.counters[0], MEASURED - 5);
    assert_eq!(cpu.write_msr(msr::IA32_PERF_GLOBAL_STATUS, 0), Err(MsrFault));
    cpu.write_msr(msr::IA32_PERF_GLOBAL_OVF_CTRL, 3 << 62 | 1).unwrap();
    assert_eq!(cpu.read_msr(msr::IA32_PERF_GLOBAL_STATUS), Ok(0));
}

#[test]
fn each_privilege_is_counted_by_itself() {
    for translated in [false, true] {
        let mut cpu = prepared();
        cpu.write_msr(msr::IA32_PERFEVTSEL0, INSTRUCTIONS & !(1 << 17)).unwrap();
        cpu.write_msr(msr::IA32_PERFEVTSEL0 + 1, INSTRUCTIONS & !(1 << 16)).unwrap();
        cpu.write_msr(msr::IA32_PERF_GLOBAL_CTRL, 3).unwrap();
        to_user(&mut cpu);
        cpu.system_flags.insert(Flags::IF);
        cpu.registers.set(1, ROUNDS);
        // HLT faults, and the handler's HLT is the kernel's only instruction.
        let cpu = execute(cpu, &LOOP, translated);
        assert_eq!(cpu.pmu.counters[..2], [ROUNDS * IN_LOOP, 1], "translated: {translated}");
    }
}

#[test]
fn rdpmc_sees_what_went_before_it_in_its_block() {
    let mut code = LOOP.to_vec();
    code.extend([0x31, 0xc9, 0x0f, 0x33, 0x89, 0xc3]); // xor %ecx, %ecx; rdpmc; mov %eax, %ebx
    code.extend([0x90; 5]);
    code.extend([0x0f, 0x33, 0x29, 0xd8]); // rdpmc; sub %ebx, %eax
    // Often enough to be translated.
    code.extend([0x41, 0xff, 0xc8, 0x0f, 0x85]); // dec %r8d; jnz
    let back = -(code.len() as i32 + 4 - LOOP.len() as i32);
    code.extend(back.to_le_bytes());
    for translated in [false, true] {
        let mut cpu = prepared();
        cpu.write_msr(msr::IA32_PERF_GLOBAL_CTRL, 1).unwrap();
        cpu.registers.set(1, 10);
        cpu.registers.set(8, 10);
        let cpu = execute(cpu, &code, translated);
        // RDPMC itself, MOV, and five NOPs.
        assert_eq!((cpu.registers.get(0), cpu.registers.get(2)), (7, 0), "translated: {translated}");
    }
}

#[test]
fn rdpmc_reads_the_counters_that_there_are_where_it_may() {
    let mut cpu = prepared();
    cpu.write_msr(msr::IA32_A_PMC0 + 3, 0x1234_5678_9abc).unwrap();
    cpu.write_msr(msr::IA32_FIXED_CTR0 + 2, 0x42).unwrap();
    let read = |cpu: &mut Cpu, number: u64| {
        cpu.registers.set(1, number);
        run(cpu, &RDPMC).map(|()| (cpu.registers.get(2), cpu.registers.get(0)))
    };
    assert_eq!(read(&mut cpu, 0xffff_ffff_0000_0003), Ok((0x1234, 0x5678_9abc)));
    assert_eq!(read(&mut cpu, 1 << 30 | 2), Ok((0, 0x42)));
    for absent in [4, 64, 1 << 30 | 3, 1 << 29, 1 << 31, u64::from(u32::MAX)] {
        assert_eq!(read(&mut cpu, absent), Err(Exception::gp(0)), "{absent:#x}");
    }
    to_user(&mut cpu);
    assert_eq!(read(&mut cpu, 3), Err(Exception::gp(0)));
    cpu.cr4 |= Cr4::PCE;
    assert_eq!(read(&mut cpu, 3), Ok((0x1234, 0x5678_9abc)));
    let mut without = long();
    without.wires = wires_for("host,-arch_perfmon");
    assert_eq!(read(&mut without, 0), Err(Exception::gp(0)));
}

#[test]
fn narrow_writes_are_sign_extended_and_wide_ones_must_fit() {
    let mut cpu = prepared();
    let (narrow, wide) = (msr::IA32_PMC0 + 1, msr::IA32_A_PMC0 + 1);
    for (written, kept) in
        [(0xffff_ff01_2345_6789, 0x2345_6789), (0x01_2345_6789, 0x2345_6789), (0x8000_0000, 0xffff_8000_0000)]
    {
        cpu.write_msr(narrow, written).unwrap();
        assert_eq!((cpu.read_msr(narrow), cpu.read_msr(wide)), (Ok(kept), Ok(kept)), "{written:#x}");
    }
    cpu.write_msr(wide, MASK).unwrap();
    assert_eq!(cpu.read_msr(narrow), Ok(MASK));
    assert_eq!(cpu.write_msr(wide, MASK + 1), Err(MsrFault));
    assert_eq!(cpu.write_msr(msr::IA32_FIXED_CTR0, MASK + 1), Err(MsrFault));
    assert_eq!(cpu.read_msr(msr::IA32_PERF_CAPABILITIES).unwrap() >> 13 & 1, 1, "wide writes are promised");
}

#[test]
fn reserved_bits_fault_and_all_others_are_kept() {
    let registers = [
        (msr::IA32_PERFEVTSEL0 + 3, 0xffdf_ffff),
        (msr::IA32_FIXED_CTR_CTRL, 0xbbb),
        (msr::IA32_PERF_GLOBAL_CTRL, 0x7_0000_000f),
    ];
    for (index, allowed) in registers {
        let mut cpu = prepared();
        for bit in 0..64 {
            let expected = if allowed >> bit & 1 != 0 { Ok(()) } else { Err(MsrFault) };
            assert_eq!(cpu.write_msr(index, 1 << bit), expected, "{index:#x} bit {bit}");
        }
        cpu.write_msr(index, allowed).unwrap();
        assert_eq!(cpu.read_msr(index), Ok(allowed));
    }
    let mut cpu = prepared();
    assert_eq!(cpu.write_msr(msr::IA32_PERF_GLOBAL_OVF_CTRL, 1 << 4), Err(MsrFault));
    assert_eq!(cpu.read_msr(msr::IA32_PERF_GLOBAL_OVF_CTRL), Ok(0));
    for absent in
        [msr::IA32_PMC0 + 4, msr::IA32_PERFEVTSEL0 + 4, msr::IA32_A_PMC0 + 4, msr::IA32_FIXED_CTR0 + 3]
    {
        assert_eq!(cpu.read_msr(absent), Err(MsrFault), "{absent:#x}");
    }
    cpu.wires = wires_for("host,-arch_perfmon");
    assert_eq!(cpu.read_msr(msr::IA32_PERF_GLOBAL_CTRL), Err(MsrFault));
    assert_eq!(cpu.write_msr(msr::IA32_PERFEVTSEL0, 0), Err(MsrFault));
}

#[test]
fn reference_cycles_pass_with_the_time_and_not_while_halted() {
    let mut pmu = Pmu::reset();
    let at = |instructions, ticks| Moment { instructions, ticks };
    pmu.write(msr::IA32_FIXED_CTR_CTRL, 0xb00, at(0, 1000)).unwrap();
    pmu.write(msr::IA32_PERF_GLOBAL_CTRL, 1 << 34, at(0, 1000)).unwrap();
    pmu.advance(at(50, 1700));
    assert_eq!(pmu.by_number(1 << 30 | 2), Ok(700));
    pmu.resume(at(50, 90_000));
    pmu.advance(at(60, 90_010));
    assert_eq!(pmu.by_number(1 << 30 | 2), Ok(710));
    assert!(pmu.deadline() - 60 <= CLOCK_LOOK, "the clock is looked at now and then");
    pmu.write(msr::IA32_FIXED_CTR0 + 2, MASK, at(60, 90_010)).unwrap();
    assert!(pmu.look(at(61, 90_020), false));
    assert_eq!((pmu.status, pmu.by_number(1 << 30 | 2)), (1 << 34, Ok(9)));
}

#[test]
fn a_counter_mask_asks_for_more_in_a_cycle_than_happens() {
    let counts = |chosen| event(chosen) != Event::Nothing;
    assert!(counts(0xc0) && counts(0x3c) && counts(0x13c));
    assert!(counts(0xc0 | 1 << 24) && !counts(0xc0 | 2 << 24));
    assert!(!counts(0xc0 | 1 << 24 | 1 << 23) && counts(0xc0 | 2 << 24 | 1 << 23));
    assert!(!counts(0xc4) && !counts(0x412e), "leaf 0AH says that they are not there");
}

#[test]
fn what_is_saved_while_counting_goes_on_after_being_restored() {
    let mut cpu = prepared();
    cpu.write_msr(msr::IA32_PERF_GLOBAL_CTRL, 1).unwrap();
    cpu.write_msr(msr::IA32_A_PMC0, 1000).unwrap();
    cpu.pmu.restore_status(2).unwrap();
    let mut other = long();
    other.instructions = 77;
    for (index, value) in cpu.saved_msrs() {
        other.restore_msr(index, value).unwrap();
    }
    assert_eq!(other.read_msr(msr::IA32_PERF_GLOBAL_STATUS), Ok(2));
    other.pmu.advance(Moment { instructions: 80, ticks: 0 });
    assert_eq!(other.pmu.by_number(0), Ok(1003));
}
