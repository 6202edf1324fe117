//! Boot sectors of the old kind, `sectors.s`: 512 bytes of 16-bit code at 0x7c00 that need no firmware.
#![no_std]
#![no_main]

use guests::apic;
use guests::legacy::{State, low, tables};
use guests::long::END;
use guests::long::reg::AX;
use guests::report;

guests::guest!(main);

core::arch::global_asm!(include_str!("../sectors.s"), options(att_syntax));

type Sector = [u8; 512];

unsafe extern "C" {
    static sector_moves: Sector;
    static sector_protected: Sector;
    static sector_hooks: Sector;
}

fn main() {
    tables().reset();
    // Interrupts of the 8259s pass through, as firmware leaves it.
    apic::enable();
    apic::write(apic::offset::LVT_LINT0, 7 << 8);
    // SAFETY: the assembled sectors.
    unsafe {
        boot("a sector that moves itself", &sector_moves);
        boot("a sector that enters protected mode", &sector_protected);
        boot("a sector that hooks the timer", &sector_hooks);
        boot("the first one once more", &sector_moves);
    }
    apic::write(apic::offset::LVT_LINT0, 1 << 16);
}

/// Loads a sector and enters it.
fn boot(name: &str, sector: &Sector) {
    report::equal(format_args!("{name}: its signature"), &sector[510..], &[0x55, 0xaa]);
    let mut state = State::real(sector);
    // SAFETY: conventional memory, which nothing else uses.
    unsafe { low::<Sector>(0x7c00).write_volatile(*sector) };
    (state.cs, state.eip) = (0, 0x7c00);
    (state.ss, state.ds, state.es) = (0, 0, 0);
    state.gprs[guests::long::reg::SP] = 0x7c00;
    state.gprs[guests::long::reg::DX] = 0x80;
    let out = state.run();
    out.check(format_args!("{name} ends"), END);
    report::equal(format_args!("{name}: what it found wrong"), out.gprs[AX] & 0xffff, 0);
}
