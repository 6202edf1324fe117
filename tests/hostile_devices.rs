//! Guests that write whatever comes to mind to ports, device registers, model-specific and control registers: the
//! machine goes on, and a guest that survives its own doing can still tell so.

mod common;

use common::guest::{Guest, Random, Written, assemble};
use common::trials::{self, DONE};
use iced_x86::code_asm::*;

/// Ports at which a write can end the run, and the three before each of them, from which a wide write reaches it.
const ENDING_PORTS: &[(i32, i32)] = &[
    (0x61, 0x64),   // Keyboard controller: pulses the reset line.
    (0x8f, 0x92),   // System control port A.
    (0xf1, 0xf7),   // Debug exit.
    (0xcf6, 0xcf9), // Reset control.
    (0x601, 0x605), // ACPI power management control.
];

/// The next of a sequence in EBX (xorshift32), to EAX as well.
fn random(a: &mut CodeAssembler) -> Written {
    for (left, bits) in [(true, 13), (false, 17), (true, 5)] {
        a.mov(eax, ebx)?;
        if left {
            a.shl(eax, bits)?
        } else {
            a.shr(eax, bits)?
        }
        a.xor(ebx, eax)?;
    }
    a.mov(eax, ebx)
}

fn report(a: &mut CodeAssembler) -> Written {
    a.mov(eax, DONE)?;
    a.out(0xf4, eax)?;
    a.hlt()
}

/// Writes and reads each port three times, in each width.
fn every_port() -> Guest {
    Guest::protected(|a| {
        let (mut again, mut skip) = (a.create_label(), a.create_label());
        a.mov(ebx, 0x1234_5678)?;
        a.mov(ecx, 3)?;
        a.xor(edx, edx)?;
        a.set_label(&mut again)?;
        for &(first, last) in ENDING_PORTS {
            let mut below = a.create_label();
            a.cmp(edx, first)?;
            a.jb(below)?;
            a.cmp(edx, last)?;
            a.jbe(skip)?;
            a.set_label(&mut below)?;
            a.nop()?;
        }
        random(a)?;
        a.out(dx, al)?;
        a.out(dx, ax)?;
        a.out(dx, eax)?;
        a.in_(al, dx)?;
        a.in_(ax, dx)?;
        a.in_(eax, dx)?;
        a.set_label(&mut skip)?;
        a.inc(dx)?;
        a.jne(again)?;
        a.dec(ecx)?;
        a.jne(again)?;
        report(a)
    })
}

#[test]
fn random_writes_to_every_port_leave_the_machine_running() {
    every_port().run().is(DONE, &[]);
}

#[test]
fn a_ledger_of_every_port_stays_small_and_is_valid_json() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("exits.json");
    let file = every_port().file();
    let mut command = common::ringside();
    command.args(["run", "--engine", "soft", "--memory", "32M", "--debug-exit", "0xf4", "--kernel"]);
    command.arg(file.path()).arg("--exits").arg(format!("json={}", path.display())).arg("--stats");
    let output = common::run_within(&mut command, std::time::Duration::from_secs(60));
    assert_eq!(output.status.code(), Some(DONE), "{}", common::stderr(&output));
    let text = std::fs::read_to_string(&path).expect("the report");
    assert!(text.len() < 16 << 20, "{} bytes", text.len());
    let report = exits::Report::from_json(&text).expect("a report");
    let io = report.reasons.iter().find(|found| found.reason == "IO_INSTRUCTION").expect("ports");
    assert!(io.times.count > 3 * 6 * 65_000, "{}", io.times.count);
}

/// Writes and reads at EDI, in each width.
fn access(a: &mut CodeAssembler) -> Written {
    random(a)?;
    a.mov(byte_ptr(edi), al)?;
    a.mov(word_ptr(edi), ax)?;
    a.mov(dword_ptr(edi), eax)?;
    a.mov(al, byte_ptr(edi))?;
    a.mov(ax, word_ptr(edi))?;
    a.mov(eax, dword_ptr(edi))
}

#[test]
fn random_writes_all_over_the_device_hole_leave_the_machine_running() {
    let guest = Guest::protected(|a| {
        let (mut again, mut skip) = (a.create_label(), a.create_label());
        a.mov(ebx, 0x1234_5678)?;
        a.mov(edi, 0xc000_0000u32)?;
        a.set_label(&mut again)?;
        // The local APIC has its own test.
        a.mov(eax, edi)?;
        a.add(eax, 8)?;
        a.shr(eax, 12)?;
        a.cmp(eax, 0xf_ee00)?;
        a.je(skip)?;
        access(a)?;
        a.set_label(&mut skip)?;
        a.add(edi, 4093)?;
        a.jnc(again)?;
        report(a)
    });
    guest.run().is(DONE, &[]);
}

/// Writes to each register of a page; the interrupt command register alone is left alone.
fn every_register_at(page: u32) -> Guest {
    Guest::protected(|a| {
        let (mut again, mut skip) = (a.create_label(), a.create_label());
        a.mov(ebx, page as i32)?;
        a.mov(ecx, 4)?;
        a.mov(edi, page)?;
        a.set_label(&mut again)?;
        a.mov(eax, edi)?;
        a.and(eax, 0xff0)?;
        a.cmp(eax, 0x300)?;
        a.je(skip)?;
        a.cmp(eax, 0x2f0)?;
        a.je(skip)?;
        access(a)?;
        a.set_label(&mut skip)?;
        a.inc(edi)?;
        a.test(edi, 0xfff)?;
        a.jne(again)?;
        a.sub(edi, 0x1000)?;
        a.dec(ecx)?;
        a.jne(again)?;
        report(a)
    })
}

#[test]
fn random_writes_to_the_interrupt_controllers_leave_the_machine_running() {
    every_register_at(0xfec0_0000).run().is(DONE, &[]);
    // A local vector of its own may deliver an NMI, for which this guest has no gate.
    let end = every_register_at(0xfee0_0000).run();
    assert!(matches!(end.status, Some(DONE | 241)), "{end:?}");
    end.has_a_name();
}

/// Sends interprocessor interrupts of every delivery mode and destination but for those in `without`.
fn interrupt_commands(seed: u64, without: &[u64]) -> Guest {
    let mut random = Random::new(seed);
    let commands =
        std::iter::repeat_with(|| random.next()).filter(|command| !without.contains(&(command >> 8 & 7)));
    let pieces: Vec<_> = commands
        .take(1000)
        .map(|command| {
            assemble(64, 0, |a| {
                a.mov(ebx, 0xfee0_0000u32)?;
                a.mov(dword_ptr(rbx + 0xf0), 0x1ff)?;
                a.mov(dword_ptr(rbx + 0xb0), 0)?;
                a.mov(dword_ptr(rbx + 0x310), (command >> 32) as i32)?;
                a.mov(dword_ptr(rbx + 0x300), command as i32)
            })
        })
        .collect();
    trials::long(&pieces)
}

#[test]
fn random_interrupt_commands_leave_the_machine_running() {
    const INIT: u64 = 5;
    for cpus in ["1", "4"] {
        interrupt_commands(7, &[INIT]).run_with(&["--cpus", cpus]).has_a_name();
        interrupt_commands(8, &[]).run_with(&["--cpus", cpus]).has_a_name();
    }
}

#[test]
fn random_values_in_every_model_specific_register_fault_or_do_no_harm() {
    let mut random = Random::new(3);
    let indices = (0..0x1400)
        .chain(0xc000_0000u32..0xc000_0200)
        .chain(0xc001_0000..0xc001_0140)
        .chain(0x4b56_4d00..0x4b56_4d10);
    let pieces: Vec<_> = indices
        .map(|index| {
            let value = match random.next() % 4 {
                0 => u64::MAX,
                1 => 1 << (random.next() % 64),
                2 => random.next() & 0xffff_ffff_f000,
                _ => random.next(),
            };
            assemble(64, 0, |a| {
                a.mov(ecx, index)?;
                a.rdmsr()?;
                a.mov(eax, value as u32)?;
                a.mov(edx, (value >> 32) as u32)?;
                a.wrmsr()?;
                a.rdmsr()
            })
        })
        .collect();
    trials::long(&pieces).run().has_a_name();
}

#[test]
fn random_values_in_control_and_debug_registers_end_with_a_name() {
    for seed in 1..=8 {
        let mut random = Random::new(seed);
        let pieces: Vec<_> = (0..400)
            .map(|_| {
                let value = if random.next() & 1 == 0 { 1 << (random.next() % 64) } else { random.next() };
                let which = random.next() % 8;
                assemble(64, 0, |a| {
                    a.mov(rax, value)?;
                    match which {
                        0 => a.mov(cr4, rax),
                        1 => a.mov(cr8, rax),
                        2 => a.mov(dr7, rax),
                        3 => a.mov(dr6, rax),
                        4 => a.mov(dr0, rax),
                        5 => {
                            a.xor(ecx, ecx)?;
                            a.mov(rdx, rax)?;
                            a.xsetbv()
                        }
                        6 => {
                            a.push(rax)?;
                            a.popfq()
                        }
                        _ => {
                            a.mov(rcx, cr0)?;
                            a.or(rcx, rax)?;
                            a.mov(cr0, rcx)
                        }
                    }
                })
            })
            .collect();
        trials::long(&pieces).run().has_a_name();
    }
}
