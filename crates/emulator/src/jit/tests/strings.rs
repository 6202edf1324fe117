//! Repeated string instructions: what they store and where they leave their registers, against a model.

use super::changing::{DATA, PAGE, ROUNDS, fault, on_each_engine, with_page};
use crate::cpu::Cpu;
use crate::testing::*;

const RDI: u8 = 7;
const RSI: u8 = 6;
/// Bytes that are looked at afterwards.
const LEN: usize = 0x8000;
/// What RAX has.
const VALUE: u64 = 0x1122_3344_5566_7788;
/// What the destination, the source and the count grow by in each round.
const STEPS: (u64, u64, u64) = (197, 131, 5);

/// A repeated STOS or MOVS.
#[derive(Clone, Copy, Debug)]
struct Case {
    moves: bool,
    size: usize,
    backwards: bool,
    /// Where the first round's destination and source are, and the first count.
    start: (u64, u64, u64),
}

impl Case {
    /// Rounds of it, from RCX on.
    fn code(self) -> Vec<u8> {
        // cld or std; l: mov %r8, %rdi; mov %r9, %rsi; push %rcx; mov %r10, %rcx
        let mut code = vec![0xfc | u8::from(self.backwards)];
        let head = code.len();
        code.extend([0x4c, 0x89, 0xc7, 0x4c, 0x89, 0xce, 0x51, 0x4c, 0x89, 0xd1, 0xf3]);
        match self.size {
            2 => code.push(0x66),
            8 => code.push(0x48),
            _ => {}
        }
        code.push(if self.moves { 0xa4 } else { 0xaa } | u8::from(self.size > 1));
        // add %rcx, %r11; pop %rcx; add $.., %r8; add $.., %r9; add $.., %r10
        code.extend([0x49, 0x01, 0xcb, 0x59, 0x49, 0x81, 0xc0, STEPS.0 as u8, 0, 0, 0]);
        code.extend([0x49, 0x81, 0xc1, STEPS.1 as u8, 0, 0, 0, 0x49, 0x83, 0xc2, STEPS.2 as u8]);
        // dec %ecx; jnz l; hlt
        code.extend([0xff, 0xc9, 0x75]);
        code.push((head as i64 - (code.len() as i64 + 1)) as u8);
        code.push(0xf4);
        code
    }

    fn before(index: usize) -> u8 {
        (index * 7 + index / 251) as u8
    }

    /// What memory and RDI and RSI should be in the end.
    fn model(self) -> (Vec<u8>, u64, u64) {
        let mut memory: Vec<u8> = (0..LEN).map(Self::before).collect();
        let (mut to, mut from, mut count) = self.start;
        let (mut rdi, mut rsi) = (0, 0);
        let step = if self.backwards { -(self.size as i64) } else { self.size as i64 };
        for _ in 0..ROUNDS {
            (rdi, rsi) = (to, from);
            for _ in 0..count {
                let mut element = VALUE.to_le_bytes();
                let [at, source] = [rdi, rsi].map(|address| (address - DATA) as usize);
                if self.moves {
                    element[..self.size].copy_from_slice(&memory[source..source + self.size]);
                    rsi = rsi.wrapping_add_signed(step);
                }
                memory[at..at + self.size].copy_from_slice(&element[..self.size]);
                rdi = rdi.wrapping_add_signed(step);
            }
            (to, from, count) = (to + STEPS.0, from + STEPS.1, count + STEPS.2);
        }
        (memory, rdi, rsi)
    }

    fn check(self) {
        let machine = || {
            let mut cpu = long();
            (0..LEN).for_each(|index| put(&cpu, DATA + index as u64, Self::before(index)));
            let registers = [(0, VALUE), (8, self.start.0), (9, self.start.1), (10, self.start.2)];
            registers.into_iter().for_each(|(register, value)| cpu.registers.set(register, value));
            cpu
        };
        let (memory, rdi, rsi) = self.model();
        on_each_engine(&self.code(), machine, |cpu: &Cpu| {
            let differs = (0..LEN).find(|&at| get::<u8>(cpu, DATA + at as u64) != memory[at]);
            assert_eq!(differs, None, "{self:?}");
            let left = [RDI, RSI, 11].map(|register| cpu.registers.get(register));
            assert_eq!(left, [rdi, rsi, 0], "{self:?}");
        });
    }
}

#[test]
fn stores_and_moves_of_all_sizes_are_done_as_the_manual_says() {
    for (moves, size) in [false, true].into_iter().flat_map(|moves| [1, 2, 4, 8].map(|size| (moves, size))) {
        let case = |to, from, backwards| {
            // Several elements apart, overlapping, and by less than one.
            Case { moves, size, backwards, start: (DATA + to, DATA + from, 0) }.check();
        };
        case(100, 2100, false);
        case(1000, 996, false);
        case(301, 300, false);
        case(6000, 5000, true);
    }
}

#[test]
fn a_count_of_more_than_a_page_is_done() {
    for moves in [false, true] {
        Case { moves, size: 1, backwards: false, start: (DATA + 50, DATA + 3, 4000) }.check();
    }
}

#[test]
fn a_store_over_the_next_instruction_is_executed() {
    // l: mov %r8, %rdi; push %rcx; mov %r9, %rcx; mov %ecx, %eax; rep stosb; pop %rcx; next: add $0, %ebx; dec %ecx; jnz l; hlt
    // The byte that is stored is the immediate of `add`: it is 1 throughout, but 0 before.
    let code = [
        0x4c, 0x89, 0xc7, 0x51, 0x4c, 0x89, 0xc9, 0x89, 0xc8, 0xf3, 0xaa, 0x59, 0x83, 0xc3, 0, 0xff, 0xc9,
        0x75, 0xed, 0xf4,
    ];
    let machine = || {
        let mut cpu = long();
        cpu.registers.set(8, CODE + 14);
        cpu.registers.set(9, 1);
        cpu
    };
    on_each_engine(&code, machine, |cpu| assert_eq!(cpu.registers.get(3), ROUNDS));
}

#[test]
fn a_fault_in_the_middle_leaves_what_was_done() {
    // l: mov %r8, %rdi; push %rcx; mov %r9, %rcx; rep stosb; pop %rcx; add $0x40, %r8; dec %ecx; jnz l; hlt
    let code = [
        0x4c, 0x89, 0xc7, 0x51, 0x4c, 0x89, 0xc9, 0xf3, 0xaa, 0x59, 0x49, 0x83, 0xc0, 0x40, 0xff, 0xc9, 0x75,
        0xee, 0xf4,
    ];
    let machine = || {
        // The page behind it is not there.
        let mut cpu = with_page(DATA);
        cpu.registers.set(8, PAGE + 0x800);
        cpu.registers.set(9, 0x100);
        cpu
    };
    on_each_engine(&code, machine, |cpu| {
        // The 30th round's last bytes are the first behind the page.
        assert_eq!(fault(cpu).map(|(vector, error, _)| (vector, error)), Some((14, 2)));
        assert_eq!(cpu.cr2, PAGE + 0x1000);
        assert_eq!(cpu.registers.get(RDI), PAGE + 0x1000);
        let left = cpu.registers.get(1);
        assert_eq!(left, cpu.registers.get(8) + 0x100 - (PAGE + 0x1000));
    });
}
