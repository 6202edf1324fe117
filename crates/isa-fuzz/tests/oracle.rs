//! The oracle itself: what it executes, and what it gets back.

use isa_fuzz::Mode;
use isa_fuzz::case::{COMPLETED, Case, TIMED_OUT, Trap};
use isa_fuzz::layout;
use isa_fuzz::oracle::Oracle;

fn case(mode: Mode, code: &[u8]) -> Case {
    let mut case = Case { mode, trap: Trap::Exit, len: code.len() as u16, ..Case::default() };
    case.bytes[..code.len()].copy_from_slice(code);
    case.selectors = [layout::USER_DATA; 6];
    case
}

#[test]
fn several_instructions_run_and_come_back() {
    let mut oracle = Oracle::start().expect("an oracle");
    for mode in Mode::ALL {
        // inc %eax (in two bytes); add %eax, %ecx; again
        let outcome = oracle.run_one(&case(mode, &[0xff, 0xc0, 0x01, 0xc1].repeat(20))).expect("an outcome");
        assert_eq!((outcome.vector, outcome.gprs[0], outcome.gprs[1]), (COMPLETED, 20, 210));
        assert_eq!(outcome.rip, mode.rip() + 80);
    }
}

#[test]
fn a_case_that_does_not_come_back_is_given_up_and_the_next_one_runs() {
    let mut oracle = Oracle::start().expect("an oracle");
    let outcome = oracle.run_one(&case(Mode::Bits64, &[0xeb, 0xfe])).expect("an outcome");
    assert_eq!((outcome.vector, outcome.rip), (TIMED_OUT, Mode::Bits64.rip()));
    let outcome = oracle.run_one(&case(Mode::Bits64, &[0x0f, 0x0b])).expect("an outcome");
    assert_eq!((outcome.vector, outcome.rip), (6, Mode::Bits64.rip()));
}

#[test]
fn sixteen_bit_stacks_keep_the_upper_half_of_the_stack_pointer() {
    let mut oracle = Oracle::start().expect("an oracle");
    for upper in layout::UPPER_HALVES {
        let mut case = case(Mode::Bits32, &[0x50]);
        let narrow = layout::local(12);
        assert!(layout::is_narrow_stack(narrow));
        case.selectors[2] = narrow;
        case.gprs[4] = u64::from(upper) << 16 | 0x104;
        let outcome = oracle.run_one(&case).expect("an outcome");
        // 32-bit code does not see more of it: AMD's processors leave what was there.
        let pointer = outcome.gprs[4] & 0xffff_ffff;
        assert_eq!((outcome.vector, pointer), (COMPLETED, u64::from(upper) << 16 | 0x100));
    }
}

/// Prints what the host executes of what no model promises.
#[test]
fn what_the_host_has_and_no_model_promises_is_known() {
    let model = isa_fuzz::interpreter::model();
    let mut oracle = Oracle::start().expect("an oracle");
    let mut random = isa_fuzz::random::Random::new(1, 1);
    let mut executed = std::collections::BTreeSet::new();
    for code in isa_fuzz::encode::codes(Mode::Bits64) {
        let refused = !model.allows(code.cpuid_features());
        for _ in 0..if refused { 12 } else { 0 } {
            let bytes = isa_fuzz::encode::bytes(code, Mode::Bits64, &mut random);
            let mut decoder = iced_x86::Decoder::new(64, &bytes, 0);
            let instruction = decoder.decode();
            let code_bytes = &bytes[..instruction.len()];
            if instruction.code() != code
                || isa_fuzz::exclusions::excluded(&instruction).is_some()
                || isa_fuzz::exclusions::may_enter_kernel(code_bytes)
            {
                continue;
            }
            let mut case = case(Mode::Bits64, code_bytes);
            case.trap = Trap::Step;
            let outcome = oracle.run_one(&case).expect("an outcome");
            if outcome.vector != 6 {
                executed.insert(format!("{:?}", code.mnemonic()));
            }
        }
    }
    println!("{executed:?}");
    // Nothing of it changes what a guest can see of itself: a guest that looks at CPUID does not use it.
    let known = [
        "Ptwrite",
        "Clgi",
        "Clzero",
        "Extrq",
        "Insertq",
        "Invlpga",
        "Movntsd",
        "Movntss",
        "Pvalidate",
        "Skinit",
        "Stgi",
        "Vmload",
        "Vmsave",
    ];
    let unknown: Vec<_> = executed.iter().filter(|name| !known.contains(&name.as_str())).collect();
    assert!(unknown.is_empty(), "{unknown:?}");
}
