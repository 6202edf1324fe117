//! Devices that firmware and suites of bare-metal tests expect, through the whole command.

mod common;

use common::guest::{CODE_SELECTOR, Guest, Written, assemble};
use iced_x86::code_asm::*;

const FW_CFG: u32 = 0x510;
const HPET: u32 = 0xfed0_0000;
const IOAPIC: u32 = 0xfec0_0000;
const LAPIC: u32 = 0xfee0_0000;
const IDT: u32 = 0x30_0000;
/// Where the handler of all interrupts counts them.
const COUNT: u32 = 0x31_0000;
const STACK: u32 = 0x32_0000;
const HANDLER: u64 = 0x33_0000;
const VECTOR: i32 = 0x40;

fn exit_with_eax(a: &mut CodeAssembler) -> Written {
    a.out(0xf4, eax)?;
    a.hlt()
}

#[test]
fn a_guest_reads_the_number_of_its_cpus_and_its_memory_from_fw_cfg() {
    let item = |key: i32, skip: usize| {
        Guest::protected(move |a| {
            a.mov(edx, FW_CFG as i32)?;
            a.mov(eax, key)?;
            a.out(dx, ax)?;
            a.inc(edx)?;
            for _ in 0..=skip {
                a.in_(al, dx)?;
            }
            a.movzx(eax, al)?;
            exit_with_eax(a)
        })
    };
    item(5, 0).run_with(&["--cpus", "3"]).is(3, &[]);
    item(15, 0).run_with(&["--cpus", "2"]).is(2, &[]);
    // 32 MiB are 0x200_0000 bytes.
    item(3, 3).run().is(2, &[]);
    item(0, 0).run().is(b'Q'.into(), &[]);
}

#[test]
fn the_test_devices_ports_and_memory_keep_what_is_written() {
    let guest = Guest::protected(|a| {
        let mut wrong = a.create_label();
        a.mov(eax, 0x1234_5678)?;
        a.out(0xe0, eax)?;
        a.xor(eax, eax)?;
        a.in_(ax, 0xe1)?;
        a.cmp(eax, 0x3456)?;
        a.jne(wrong)?;
        a.mov(ebx, 0xff00_0000u32 as i32)?;
        a.mov(dword_ptr(ebx + 0xfffc), 0x0102_0304)?;
        a.inc(byte_ptr(ebx + 0xffff))?;
        a.mov(eax, dword_ptr(ebx + 0xfffc))?;
        a.cmp(eax, 0x0202_0304)?;
        a.jne(wrong)?;
        a.mov(eax, 1)?;
        exit_with_eax(a)?;
        a.set_label(&mut wrong)?;
        a.mov(eax, 2)?;
        exit_with_eax(a)
    });
    guest.run_with(&["--testdev"]).is(1, &[]);
    guest.run().is(2, &[]);
}

/// A guest with the handler that counts interrupts.
fn with_handler(write: impl FnOnce(&mut CodeAssembler) -> Written) -> Guest {
    let handler = assemble(32, HANDLER, |a| {
        a.inc(dword_ptr(COUNT))?;
        a.mov(dword_ptr(LAPIC + 0xb0), 0)?;
        a.iretd()
    });
    Guest::protected(write).with(HANDLER, handler)
}

/// Sends interrupts of any vector to the handler, and those of an I/O APIC's pin to this processor.
fn count_interrupts_of_pin(a: &mut CodeAssembler, pin: u32, flags: i32) -> Written {
    let mut fill = a.create_label();
    a.mov(esp, STACK as i32)?;
    a.mov(edi, IDT as i32)?;
    a.mov(ecx, 256)?;
    a.mov(eax, HANDLER as i32)?;
    a.set_label(&mut fill)?;
    a.mov(word_ptr(edi), ax)?;
    a.mov(word_ptr(edi + 2), i32::from(CODE_SELECTOR))?;
    a.mov(word_ptr(edi + 4), 0x8e00)?;
    a.mov(ebx, eax)?;
    a.shr(ebx, 16)?;
    a.mov(word_ptr(edi + 6), bx)?;
    a.add(edi, 8)?;
    a.dec(ecx)?;
    a.jne(fill)?;
    a.mov(word_ptr(COUNT + 0x10), 0x7ff)?;
    a.mov(dword_ptr(COUNT + 0x12), IDT as i32)?;
    a.lidt(fword_ptr(COUNT + 0x10))?;
    a.mov(dword_ptr(LAPIC + 0xf0), 0x1ff)?;
    a.mov(dword_ptr(IOAPIC), 0x11 + 2 * pin as i32)?;
    a.mov(dword_ptr(IOAPIC + 0x10), 0)?;
    a.mov(dword_ptr(IOAPIC), 0x10 + 2 * pin as i32)?;
    a.mov(dword_ptr(IOAPIC + 0x10), VECTOR | flags)?;
    // No interrupt through the PICs.
    a.mov(al, 0xff)?;
    a.out(0x21, al)?;
    a.out(0xa1, al)?;
    a.sti()
}

#[test]
fn the_test_device_drives_an_ioapics_line() {
    with_handler(|a| {
        count_interrupts_of_pin(a, 14, 0)?;
        a.mov(edx, 0x2000 + 14)?;
        for _ in 0..3 {
            for level in [1, 0] {
                a.mov(al, level)?;
                a.out(dx, al)?;
                a.nop()?;
            }
        }
        a.mov(eax, dword_ptr(COUNT))?;
        exit_with_eax(a)
    })
    .run_with(&["--testdev"])
    .is(3, &[]);
}

/// Waits for `count` interrupts and exits with as many milliseconds as the HPET's counter says.
fn wait_for(a: &mut CodeAssembler, count: i32) -> Written {
    let mut again = a.create_label();
    a.set_label(&mut again)?;
    a.hlt()?;
    a.cmp(dword_ptr(COUNT), count)?;
    a.jb(again)?;
    a.cli()?;
    a.mov(eax, dword_ptr(HPET + 0xf0))?;
    a.xor(edx, edx)?;
    a.mov(ecx, 100_000)?;
    a.div(ecx)?;
    a.add(eax, 1)?;
    exit_with_eax(a)
}

/// Five periods of 10 ms are 50 ms, and rarely much more.
#[track_caller]
fn took_50_ms(guest: &Guest) {
    let end = guest.run();
    assert!(matches!(end.status, Some(51..=240)), "{end:?}");
}

#[test]
fn a_comparator_interrupts_periodically_as_it_is_routed() {
    took_50_ms(&with_handler(|a| {
        count_interrupts_of_pin(a, 10, 0)?;
        a.mov(dword_ptr(HPET + 0x140), 10 << 9 | 0x14c)?;
        a.mov(dword_ptr(HPET + 0x148), 1_000_000)?;
        a.mov(dword_ptr(HPET + 0x148), 1_000_000)?;
        a.mov(dword_ptr(HPET + 0x10), 1)?;
        wait_for(a, 5)
    }));
}

#[test]
fn legacy_replacement_interrupts_where_the_interval_timer_did() {
    took_50_ms(&with_handler(|a| {
        // The interval timer at 1 kHz, which must not be heard.
        for (port, value) in [(0x43, 0x34), (0x40, 0xa9), (0x40, 0x04)] {
            a.mov(al, value)?;
            a.out(port, al)?;
        }
        a.mov(dword_ptr(HPET + 0x10), 3)?;
        a.mov(dword_ptr(HPET + 0x10), 2)?;
        count_interrupts_of_pin(a, 2, 0)?;
        a.mov(dword_ptr(HPET + 0xf0), 0)?;
        a.mov(dword_ptr(HPET + 0x100), 0x14c)?;
        a.mov(dword_ptr(HPET + 0x108), 1_000_000)?;
        a.mov(dword_ptr(HPET + 0x108), 1_000_000)?;
        a.mov(dword_ptr(HPET + 0x10), 3)?;
        wait_for(a, 5)
    }));
}
