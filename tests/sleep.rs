//! ACPI S3 through the whole command: the machine stops at once, and comes back with its memory and little else.

mod common;

use std::time::Duration;

use common::guest::{Guest, Written, assemble};
use common::{ringside, run_within, stderr};
use iced_x86::code_asm::*;

const LIMIT: Duration = Duration::from_secs(300);
/// Where the tables put the FACS.
const FACS: u32 = 0x9_f000;
const WAKING_VECTOR: u32 = 12;
/// Where the guest wants to be woken, and what it leaves in memory, relative to that.
const WAKING: u64 = 0x3_0000;
const MARK: u32 = 0x8000;
const PM1_EN: i32 = 0x602;
const PM1_CNT: i32 = 0x604;
const RTC_EN: i32 = 1 << 10;
/// SLP_EN and S3's SLP_TYP.
const SLEEP: i32 = 1 << 13 | 1 << 10;

fn write_cmos(a: &mut CodeAssembler, index: i32, value: i32) -> Written {
    a.mov(al, index)?;
    a.out(0x70, al)?;
    a.mov(al, value)?;
    a.out(0x71, al)
}

/// Sets an alarm for each second, masks some of the PIC, and sleeps; what it writes to memory from then on is 2.
fn goes_to_sleep(a: &mut CodeAssembler, waking_vector: u32) -> Written {
    let mut forever = a.create_label();
    a.mov(dword_ptr(FACS + WAKING_VECTOR), waking_vector as i32)?;
    for alarm in [1, 3, 5] {
        write_cmos(a, alarm, 0xff)?;
    }
    write_cmos(a, 0x0b, 0x22)?;
    a.mov(edx, PM1_EN)?;
    a.mov(eax, RTC_EN)?;
    a.out(dx, ax)?;
    a.mov(al, 0x12)?;
    a.out(0x21, al)?;
    a.mov(dword_ptr(WAKING as u32 + MARK), 1)?;
    a.mov(edx, PM1_CNT)?;
    a.mov(eax, SLEEP)?;
    a.out(dx, ax)?;
    a.set_label(&mut forever)?;
    a.mov(dword_ptr(WAKING as u32 + MARK), 2)?;
    a.jmp(forever)
}

#[test]
fn a_sleeping_guest_stops_at_once_and_wakes_in_real_mode_with_its_memory_and_fresh_devices() {
    let awake = assemble(16, WAKING, |a| {
        // The mark in bits 0 to 1, the clock's event in bit 2, WAK in bit 3, the PIC's mask after power-up in bit 4.
        a.mov(ecx, dword_ptr(MARK).cs())?;
        a.mov(dx, 0x600)?;
        a.in_(ax, dx)?;
        a.mov(ebx, eax)?;
        a.shr(eax, 8)?;
        a.and(eax, 4)?;
        a.or(ecx, eax)?;
        a.shr(ebx, 12)?;
        a.and(ebx, 8)?;
        a.or(ecx, ebx)?;
        a.in_(al, 0x21)?;
        a.cmp(al, 0xff)?;
        a.sete(al)?;
        a.movzx(eax, al)?;
        a.shl(eax, 4)?;
        a.or(eax, ecx)?;
        a.mov(dx, 0xf4)?;
        a.out(dx, eax)?;
        a.hlt()
    });
    let guest = Guest::protected(|a| goes_to_sleep(a, WAKING as u32)).with(WAKING, awake);
    guest.run().is(0b11101, &[]);
    guest.run_with(&["--cpus", "3"]).is(0b11101, &[]);
}

#[test]
fn a_guest_that_left_no_vector_is_reset_when_it_wakes() {
    Guest::protected(|a| goes_to_sleep(a, 0)).run().is(242, &["a sleep without a waking vector"]);
}

#[test]
fn debian_suspends_and_comes_back_at_its_alarm() {
    for cpus in ["1", "2"] {
        let mut command = ringside();
        command.args(["run", "--engine", "soft", "--cpus", cpus, "--exec"]);
        command.arg(
            "sum=$(sha256sum /bin/busybox); echo +3 > /sys/class/rtc/rtc0/wakealarm; echo mem > /sys/power/state; \
             echo status $? woken $(cat /sys/power/suspend_stats/success) processors $(nproc); \
             [ \"$sum\" = \"$(sha256sum /bin/busybox)\" ] && echo same",
        );
        let output = run_within(&mut command, LIMIT);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert_eq!(output.status.code(), Some(0), "{text}{}", stderr(&output));
        assert!(text.contains(&format!("status 0 woken 1 processors {cpus}")), "{text}");
        assert!(text.contains("same"), "{text}");
    }
}
