//! Guests that do what no guest should: each ends in a way that has a name and an exit status of its own.

mod common;

use std::io::Read;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use common::guest::{BASE, CODE_SELECTOR, Guest, NOTHING, RAM_END, machine};
use common::{KernelFile, finish, stderr};
use iced_x86::code_asm::*;
use rustix::process::{Pid, Signal, kill_process};

const LIMIT: Duration = Duration::from_secs(60);
/// How long a run may go on after it was told to end.
const AT_ONCE: Duration = Duration::from_secs(1);

/// Where the local APIC is.
const LAPIC: u64 = 0xfee0_0000;
/// Where guests put their tables.
const TABLES: u64 = 0x30_0000;

#[test]
fn a_power_off_is_success_and_says_nothing() {
    let end = Guest::protected(|a| {
        a.mov(dx, 0x604)?;
        a.mov(ax, 0x3400)?;
        a.out(dx, ax)?;
        a.hlt()
    })
    .run();
    assert_eq!((end.status, end.message.as_str()), (Some(0), ""));
}

#[test]
fn a_value_at_the_debug_exit_port_is_the_status_and_is_shown_whole() {
    let write = |width| {
        Guest::protected(|a| {
            a.mov(eax, 0x1234_5607)?;
            match width {
                1 => a.out(0xf4, al)?,
                2 => a.out(0xf4, ax)?,
                _ => a.out(0xf4, eax)?,
            }
            a.hlt()
        })
        .run()
    };
    write(1).is(7, &["wrote 0x7 "]);
    write(2).is(7, &["wrote 0x5607 "]);
    write(4).is(7, &["wrote 0x12345607 "]);
}

#[test]
fn a_triple_fault_is_named_with_rip_and_reason() {
    Guest::protected(|a| a.ud2()).run().is(241, &["vCPU 0 at RIP 0x200000", "#UD"]);
    // The same in 64-bit mode, with a page fault.
    Guest::long(|a| {
        a.mov(rax, 0x1234_5678_9000u64)?;
        a.mov(qword_ptr(rax), rax)?;
        a.hlt()
    })
    .run()
    .is(241, &["RIP 0x20000a", "#PF", "0x123456789000"]);
}

#[test]
fn a_jump_to_nothing_is_named_too() {
    for target in [NOTHING, RAM_END, 0xa_0000, 0xffff_f000] {
        let end = Guest::protected(|a| {
            a.mov(eax, target as u32)?;
            a.jmp(eax)
        })
        .run();
        end.is(241, &[&format!("RIP {target:#x}")]);
    }
}

#[test]
fn code_that_runs_off_the_end_of_the_memory_stops_there() {
    let last = RAM_END - 16;
    let end = Guest::protected(|a| {
        a.mov(eax, last as u32)?;
        a.jmp(eax)
    })
    .with(last, [0x90; 16])
    .run();
    end.is(241, &[&format!("RIP {RAM_END:#x}")]);
}

#[test]
fn a_stack_where_nothing_is_takes_no_return_address() {
    // What is read back is all ones: the jump goes to 0xffffffff, and from there whoever knows where.
    let end = Guest::protected(|a| {
        let mut function = a.create_label();
        a.mov(esp, NOTHING as u32)?;
        a.call(function)?;
        a.set_label(&mut function)?;
        a.ret()
    })
    .run();
    end.is(241, &["triple fault"]);
}

#[test]
fn a_reset_is_named_by_the_port_that_asked_for_it() {
    for (port, value, name) in [(0xcf9, 6, "0xcf9"), (0x64, 0xfe, ""), (0x92, 1, "0x92")] {
        let end = Guest::protected(|a| {
            a.mov(edx, port)?;
            a.mov(eax, value)?;
            a.out(dx, al)?;
            a.cli()?;
            a.hlt()
        })
        .run();
        end.is(242, &[name]);
    }
}

#[test]
fn a_halt_with_interrupts_off_is_called_stuck() {
    let halt = Guest::protected(|a| {
        a.cli()?;
        a.hlt()
    });
    halt.run().is(245, &["RIP 0x20000"]);
    // The other vCPU waits for its start-up interrupt, which nobody can send any more.
    halt.run_with(&["--cpus", "2"]).is(245, &[]);
}

#[test]
fn page_tables_that_make_no_sense_end_in_a_named_triple_fault() {
    let with_cr3 = |entry: u64| {
        let table: Vec<u8> = (0..512).flat_map(|_| entry.to_le_bytes()).collect();
        Guest::long(|a| {
            a.mov(rax, TABLES)?;
            a.mov(cr3, rax)?;
            a.hlt()
        })
        .with(TABLES, table)
        .run()
    };
    for entry in [
        TABLES | 3,                // Every address leads to the table itself.
        NOTHING | 3,               // Tables where nothing is: all ones, reserved bits set.
        LAPIC | 3,                 // Tables in the local APIC.
        0xe_0000 | 3,              // Tables in the ROM.
        (RAM_END - 4096) | 3,      // Tables of zeros.
        0x000f_ffff_ffff_f000 | 3, // Tables above the processor's addresses.
        0,
    ] {
        let end = with_cr3(entry);
        assert!(matches!(end.status, Some(241 | 245)), "{entry:#x}: {end:?}");
        end.has_a_name();
    }
}

#[test]
fn a_cr3_that_leads_nowhere_is_a_named_triple_fault() {
    for target in [NOTHING, LAPIC, 0xa_0000, RAM_END] {
        let end = Guest::long(|a| {
            a.mov(rax, target)?;
            a.mov(cr3, rax)?;
            a.hlt()
        })
        .run();
        end.is(241, &["RIP 0x20000", "#PF"]);
    }
}

#[test]
fn an_idt_in_nothing_or_with_odd_gates_is_a_named_triple_fault() {
    let with_idt = |base: u64, limit: u16, gate: u64| {
        let table: Vec<u8> = (0..256).flat_map(|_| gate.to_le_bytes()).collect();
        let pointer = [&limit.to_le_bytes()[..], &base.to_le_bytes()].concat();
        Guest::protected(|a| {
            a.lidt(fword_ptr(TABLES + 0x1000))?;
            a.ud2()
        })
        .with(TABLES, table)
        .with(TABLES + 0x1000, pointer)
        .run()
    };
    let gate = |kind: u64, selector: u64| BASE & 0xffff | selector << 16 | kind << 40 | (BASE >> 16) << 48;
    for (base, limit, gate) in [
        (NOTHING, 0x7ff, 0),
        (0xffff_fff8, 0x7ff, 0),
        (TABLES, 0x30, gate(0x8e, CODE_SELECTOR.into())), // Cut within the gate of #UD.
        (TABLES, 0x7ff, 0),
        (TABLES, 0x7ff, gate(0x85, 0x20)), // A task gate to the busy TSS.
        (TABLES, 0x7ff, gate(0x85, 0xfff8)),
        (TABLES, 0x7ff, gate(0x8e, 0)),
        (TABLES, 0x7ff, gate(0x8e, 0x18)), // Data where code should be.
        (TABLES, 0x7ff, gate(0x8f, 0x7fff)),
        (TABLES, 0x7ff, gate(0x80, CODE_SELECTOR.into())),
    ] {
        let end = with_idt(base, limit, gate);
        end.is(241, &["RIP 0x200007", "#UD"]);
    }
}

#[test]
fn a_gdt_in_nothing_is_a_named_triple_fault() {
    let end = Guest::protected(|a| {
        a.lgdt(fword_ptr(TABLES))?;
        a.mov(eax, 0x18)?;
        a.mov(ss, ax)?;
        a.hlt()
    })
    .with(TABLES, [0xff, 0xff, 0, 0, 0, 0xd0])
    .run();
    end.is(241, &["#GP"]);
}

/// Starts a guest with all its output read by nobody, and gives it time to do what it does.
fn start(kernel: &KernelFile) -> Child {
    let mut command = machine(kernel);
    let child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("ringside starts");
    std::thread::sleep(Duration::from_millis(700));
    child
}

/// It ends at SIGTERM, at once.
#[track_caller]
fn ends_at_sigterm(child: Child) {
    let started = Instant::now();
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    let output = finish(child, LIMIT);
    assert_eq!(output.status.code(), Some(143), "{}", stderr(&output));
    assert!(started.elapsed() < AT_ONCE, "{:?}", started.elapsed());
    assert!(!stderr(&output).contains("panicked"), "{}", stderr(&output));
}

#[test]
fn a_guest_that_spins_with_interrupts_off_ends_at_sigterm() {
    let spin = Guest::protected(|a| {
        let mut again = a.create_label();
        a.cli()?;
        a.set_label(&mut again)?;
        a.jmp(again)
    });
    ends_at_sigterm(start(&spin.file()));
    ends_at_sigterm(start(&flood().file()));
}

#[test]
fn one_instruction_that_takes_for_ever_ends_at_sigterm() {
    for (from, to) in [(NOTHING, BASE + 0x10_0000), (BASE, 0xe_0000), (LAPIC, NOTHING), (BASE, RAM_END)] {
        let copy = Guest::long(|a| {
            a.mov(rsi, from)?;
            a.mov(rdi, to)?;
            a.mov(rcx, -1i64)?;
            a.rep().movsb()?;
            a.hlt()
        });
        ends_at_sigterm(start(&copy.file()));
    }
    let compare = Guest::protected(|a| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.mov(edi, NOTHING as u32)?;
        a.mov(ecx, -1)?;
        a.mov(eax, -1)?;
        a.repe().scasb()?;
        a.jmp(again)
    });
    ends_at_sigterm(start(&compare.file()));
    let input = Guest::protected(|a| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.mov(edx, 0x80)?;
        a.mov(edi, NOTHING as u32)?;
        a.mov(ecx, 0x0fff_ffff)?;
        a.rep().insb()?;
        a.jmp(again)
    });
    ends_at_sigterm(start(&input.file()));
}

#[test]
fn a_storm_of_exceptions_or_of_interrupts_ends_at_sigterm() {
    // Every gate leads back to the instruction that faults.
    let gate = BASE & 0xffff | u64::from(CODE_SELECTOR) << 16 | 0x8e << 40 | (BASE >> 16) << 48;
    let table: Vec<u8> = (0..256).flat_map(|_| gate.to_le_bytes()).collect();
    let pointer = [&0x7ffu16.to_le_bytes()[..], &TABLES.to_le_bytes()].concat();
    let storm = |instruction: fn(&mut CodeAssembler) -> common::guest::Written| {
        Guest::protected(|a| {
            a.mov(esp, 0x38_0000)?;
            a.lidt(fword_ptr(TABLES + 0x1000))?;
            instruction(a)
        })
        .with(TABLES, table.clone())
        .with(TABLES + 0x1000, pointer.clone())
    };
    ends_at_sigterm(start(&storm(|a| a.ud2()).file()));
    ends_at_sigterm(start(&storm(|a| a.int(0x80)).file()));
    // An interrupt to itself through the local APIC, which is never ended: only the first is delivered.
    let own = storm(|a| {
        let mut again = a.create_label();
        a.sti()?;
        a.mov(dword_ptr(LAPIC + 0xf0), 0x1ff)?;
        a.set_label(&mut again)?;
        a.mov(dword_ptr(LAPIC + 0x300), 0x4_0040)?;
        a.mov(dword_ptr(LAPIC + 0xb0), 0)?;
        a.jmp(again)
    });
    ends_at_sigterm(start(&own.file()));
}

#[test]
fn a_timer_of_the_shortest_period_does_not_keep_the_run_from_its_end() {
    let pointer = [&0x7ffu16.to_le_bytes()[..], &TABLES.to_le_bytes()].concat();
    // Each of its interrupts is taken and ended.
    let handler = BASE + 0x1000;
    let gate = handler & 0xffff | u64::from(CODE_SELECTOR) << 16 | 0x8e << 40 | (handler >> 16) << 48;
    let table: Vec<u8> = (0..256).flat_map(|_| gate.to_le_bytes()).collect();
    let storm = Guest::protected(|a| {
        let mut again = a.create_label();
        a.mov(esp, 0x38_0000)?;
        a.lidt(fword_ptr(TABLES + 0x1000))?;
        a.mov(dword_ptr(LAPIC + 0xf0), 0x1ff)?;
        a.mov(dword_ptr(LAPIC + 0x3e0), 0xb)?;
        a.mov(dword_ptr(LAPIC + 0x320), 0x2_0040)?;
        a.mov(dword_ptr(LAPIC + 0x380), 1)?;
        a.sti()?;
        a.set_label(&mut again)?;
        a.hlt()?;
        a.jmp(again)
    })
    .with(TABLES, table)
    .with(TABLES + 0x1000, pointer)
    .with(
        handler,
        common::guest::assemble(32, handler, |a| {
            a.mov(dword_ptr(LAPIC + 0xb0), 0)?;
            a.iretd()
        }),
    );
    ends_at_sigterm(start(&storm.file()));
}

#[test]
fn writes_to_rom_and_to_unmapped_space_are_lost_and_reads_are_all_ones() {
    let end = Guest::protected(|a| {
        let mut wrong = a.create_label();
        a.mov(dword_ptr(0xe_0000), 0)?;
        a.mov(dword_ptr(NOTHING), 0)?;
        for address in [NOTHING, 0xa_0000, RAM_END, 0xffff_fff0] {
            a.cmp(dword_ptr(address), -1)?;
            a.jne(wrong)?;
        }
        for port in [0x80, 0x1f0, 0x500, 0xfffc] {
            a.mov(edx, port)?;
            a.xor(eax, eax)?;
            a.in_(eax, dx)?;
            a.cmp(eax, -1)?;
            a.jne(wrong)?;
        }
        // "RSD ", with which the ACPI tables begin.
        a.mov(eax, dword_ptr(0xe_0000))?;
        a.out(0xf4, eax)?;
        a.set_label(&mut wrong)?;
        a.mov(eax, 1)?;
        a.out(0xf4, eax)?;
        a.hlt()
    })
    .run();
    end.is(i32::from(b'R'), &["0x20445352"]);
}

/// Starts the second vCPU at page `vector` and halts for good.
fn starts_another_at(vector: u32) -> Guest {
    Guest::protected(|a| {
        a.mov(dword_ptr(LAPIC + 0xf0), 0x1ff)?;
        a.mov(dword_ptr(LAPIC + 0x310), 1 << 24)?;
        a.mov(dword_ptr(LAPIC + 0x300), 0x4500)?;
        a.mov(dword_ptr(LAPIC + 0x310), 1 << 24)?;
        a.mov(dword_ptr(LAPIC + 0x300), 0x4600 | vector)?;
        a.cli()?;
        a.hlt()
    })
}

#[test]
fn a_second_vcpu_that_is_started_in_garbage_ends_the_run_under_its_own_name() {
    // Nothing at all, where all ones are no instruction; its vector table is the zeros at 0.
    let end = starts_another_at(0x40)
        .with(
            0x4_0000,
            common::guest::assemble(16, 0x4_0000, |a| {
                // An empty vector table: the fault cannot be delivered.
                a.lidt(fword_ptr(0x10))?;
                a.ud2()
            }),
        )
        .run_with(&["--cpus", "2"]);
    assert!(matches!(end.status, Some(241 | 245)), "{end:?}");
    end.has_a_name();
    assert!(end.message.contains("vCPU"), "{end:?}");
    for vector in [0xa0, 0xff, 0] {
        let file = starts_another_at(vector).file();
        let mut child = machine(&file);
        let child = child.args(["--cpus", "2"]).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(700));
        let _ = kill_process(Pid::from_child(&child), Signal::TERM);
        let output = finish(child, LIMIT);
        let end = common::guest::End { status: output.status.code(), message: stderr(&output) };
        end.has_a_name();
    }
}

#[test]
fn a_second_vcpu_that_halts_for_good_leaves_the_guest_stuck() {
    let end = starts_another_at(0x40).with(0x4_0000, [0xfa, 0xf4, 0xeb, 0xfd]).run_with(&["--cpus", "2"]);
    end.is(245, &[]);
}

/// Writes to the serial port without end.
fn flood() -> Guest {
    Guest::protected(|a| {
        let mut again = a.create_label();
        a.mov(dx, 0x3f8)?;
        a.mov(al, i32::from(b'x'))?;
        a.set_label(&mut again)?;
        a.out(dx, al)?;
        a.jmp(again)
    })
}

#[test]
fn a_flooding_guest_ends_cleanly_when_nobody_reads_any_more() {
    let kernel = flood().file();
    let mut child = machine(&kernel).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut some = [0; 100_000];
    child.stdout.as_mut().unwrap().read_exact(&mut some).unwrap();
    assert!(some.iter().all(|&byte| byte == b'x'));
    drop(child.stdout.take());
    let output = finish(child, LIMIT);
    assert_eq!((output.status.code(), stderr(&output).as_str()), (Some(141), ""));
}

#[test]
fn a_flooding_guest_that_nobody_reads_takes_no_memory_and_ends_at_sigterm() {
    let kernel = flood().file();
    let child = machine(&kernel).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(1500));
    let resident = peak_kib(child.id());
    assert!(resident < 150 * 1024, "{resident} KiB");
    ends_at_sigterm(child);
}

#[test]
fn output_that_cannot_be_written_ends_the_run_and_says_why() {
    let kernel = flood().file();
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let child = machine(&kernel).stdout(full).stderr(Stdio::piped()).spawn().unwrap();
    let output = finish(child, LIMIT);
    let message = stderr(&output);
    assert_eq!(output.status.code(), Some(240), "{message}");
    assert!(
        message.contains("cannot write the guest's output") && message.contains("No space left"),
        "{message}"
    );
}

/// The most memory that a process ever had, in KiB.
fn peak_kib(id: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{id}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}
