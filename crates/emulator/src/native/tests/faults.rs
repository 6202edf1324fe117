use std::collections::{BTreeMap, BTreeSet};

use iced_x86::{Code, InstructionInfoFactory, OpKind, Register};

use super::Random;
use super::differential::{constrain, random_machine};
use super::samples::{Form, has_form, sample};
use super::truth::{Machine, Truth};
use crate::native::allow_list::runs_here;
use crate::native::memory_use::MemoryUse;
use crate::native::{Component, MemoryKind, is_listed};

/// Masks all floating-point exceptions.
fn only_memory_faults(machine: &mut Machine) {
    machine.vector.init_component(Component::X87);
    machine.vector.set_mxcsr(0x1f80).unwrap();
}

#[test]
fn the_host_faults_on_exactly_the_bytes_that_an_instruction_touches() {
    let (mut truth, mut random) = (Truth::new(), Random::new(2));
    let mut factory = InstructionInfoFactory::new();
    let end = truth.next_page();
    truth.protect_next_page(libc::PROT_NONE);
    let (mut wrong, mut kinds) = (BTreeMap::<String, BTreeSet<String>>::new(), BTreeMap::<&str, u32>::new());
    for code in Code::values().filter(|&code| runs_here(code) && has_form(code, Form::Memory)) {
        for _ in 0..8 {
            let rip = truth.rip();
            let Some(mut instruction) = sample(code, Form::Memory, &mut random, end, rip) else { continue };
            if !is_listed(&instruction) {
                continue;
            }
            let info = factory.info(&instruction);
            let Some(usage) = MemoryUse::of(&instruction, info) else { continue };
            // Whether MASKMOVDQU faults on bytes that it leaves alone is the processor's choice.
            if usage.alignment > 1 || instruction.op0_kind() == OpKind::MemorySegRDI {
                continue;
            }
            let inside = random.below(u64::from(usage.size));
            if instruction.memory_base() == Register::RIP {
                instruction.set_memory_displacement64(end - inside);
            }
            let mut before = random_machine(&mut random);
            only_memory_faults(&mut before);
            before.vector.k = std::array::from_fn(|_| random.next() & random.next() & random.next());
            constrain(code, &mut before, end - inside);
            let touched = usage.touched(&before.vector) & usage.all_bytes();
            let expected = usage.kind == MemoryKind::Whole || touched >> inside != 0;
            let faulted = truth.run(&instruction, &before).0.is_some();
            *kinds
                .entry(match usage.kind {
                    MemoryKind::Whole => "whole",
                    MemoryKind::Masked { .. } => "masked",
                    MemoryKind::Packed { .. } => "packed",
                    MemoryKind::Signs { .. } => "signs",
                    MemoryKind::MmxSigns { .. } => "MMX signs",
                })
                .or_default() += 1;
            if expected != faulted {
                let what = format!(
                    "{code:?} {:?} bcst {} faulted {faulted} inside {inside}",
                    usage.kind,
                    instruction.is_broadcast()
                );
                wrong.entry(format!("{:?}", code.mnemonic())).or_default().insert(what);
            }
        }
    }
    truth.protect_next_page(libc::PROT_READ | libc::PROT_WRITE);
    println!("{kinds:?}");
    assert!(wrong.is_empty(), "{} mnemonics: {:#?}", wrong.len(), wrong);
}

#[test]
fn the_host_faults_on_a_misaligned_operand_exactly_where_alignment_is_asked_for() {
    let (mut truth, mut random) = (Truth::new(), Random::new(4));
    let mut factory = InstructionInfoFactory::new();
    let mut wrong = BTreeSet::new();
    for code in Code::values().filter(|&code| runs_here(code) && has_form(code, Form::Memory)) {
        for offset in [1, 2, 4, 8, 16, 32] {
            let (address, rip) = (truth.address() + offset, truth.rip());
            let Some(instruction) = sample(code, Form::Memory, &mut random, address, rip) else { continue };
            if !is_listed(&instruction) {
                continue;
            }
            let Some(usage) = MemoryUse::of(&instruction, factory.info(&instruction)) else { continue };
            let mut before = random_machine(&mut random);
            only_memory_faults(&mut before);
            before.memory[offset as usize..][..4].copy_from_slice(&0x1f80u32.to_le_bytes());
            constrain(code, &mut before, address);
            let faulted = truth.run(&instruction, &before).0.is_some();
            // AMD's processors take the operands of the SHA extensions from anywhere, the guest's model does not.
            let lenient = !faulted && format!("{:?}", code.mnemonic()).starts_with("Sha");
            if !lenient && faulted != usage.is_misaligned(address, &before.vector) {
                wrong.insert(format!("{code:?} at {offset}: {}", usage.alignment));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}
