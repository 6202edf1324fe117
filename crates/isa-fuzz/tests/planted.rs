//! The tester finds a bug that somebody put in.

use emulator::cpu::Cpu;
use emulator::insn::{Insn, Stop};
use emulator::width::Width;
use iced_x86::{Code, Mnemonic};
use isa_fuzz::{Config, Session};

/// DEC of a 32-bit register as a careless copy of SUB would have it: CF changes.
fn careless_dec(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let old = u32::read(&cpu.registers, insn.r1);
    let new = old.wrapping_sub(1);
    u32::write(&mut cpu.registers, insn.r1, new);
    cpu.flags.set_sub(old, 1u32, new);
    Ok(())
}

fn decrements(code: Code) -> bool {
    matches!(code, Code::Dec_r32)
}

fn differing(replaced: bool) -> u64 {
    let mut config = Config::new(1);
    config.only = Box::new(decrements);
    config.modes = vec![isa_fuzz::Mode::Bits32];
    config.replaced = replaced.then_some((Mnemonic::Dec, careless_dec as emulator::insn::Handler));
    let mut session = Session::new(config).expect("an oracle");
    session.run(0..2000).expect("the oracle stays");
    if !replaced {
        session.report.mismatches.iter().for_each(|mismatch| println!("{mismatch}"));
    }
    if replaced {
        let mismatches = std::mem::take(&mut session.report.mismatches);
        let first =
            mismatches.iter().find(|m| decrements(m.generated.instruction.code())).expect("a mismatch");
        let plain = session.minimize(first).expect("the oracle stays");
        assert!(plain.to_string().contains("flags: the host has"), "{plain}");
        let kept = plain.generated.case.gprs.iter().filter(|&&gpr| gpr != 0).count();
        assert!(kept <= 2, "{plain}");
    }
    session.report.different
}

#[test]
fn a_bug_planted_in_one_handler_is_found_and_made_plain() {
    assert_eq!(differing(false), 0);
    assert!(differing(true) > 0);
}
