//! What a detail is called where nobody knows better.

use x86::ExitReason;

use crate::Detail;

/// A short name for a detail: "port 0x3f8 (w)", "IA32_TSC_DEADLINE", "CR3 (w)".
pub(crate) fn name(reason: ExitReason, detail: &Detail) -> String {
    match *detail {
        Detail::None => String::from("-"),
        Detail::Port { port, write, .. } => format!("port {port:#x} ({})", direction(write)),
        Detail::Memory { address, write, .. } => format!("{address:#x} ({})", direction(write)),
        Detail::Msr(index) => msr(index),
        Detail::ControlRegister { number, write } => format!("CR{number} ({})", direction(write)),
        Detail::Vector(vector) if reason == ExitReason::ExceptionOrNmi => exception(vector),
        Detail::Vector(vector) => format!("vector {vector:#x}"),
        Detail::Leaf(leaf) => format!("leaf {leaf:#x}"),
        Detail::Hypercall(number) => format!("hypercall {number}"),
    }
}

const fn direction(write: bool) -> &'static str {
    if write { "w" } else { "r" }
}

fn msr(index: u32) -> String {
    match x86::msr::name(index) {
        Some(name) => name.to_owned(),
        None if (x86::msr::X2APIC_BASE..=x86::msr::X2APIC_LAST).contains(&index) => {
            format!("x2APIC {:#x}", (index - x86::msr::X2APIC_BASE) << 4)
        }
        None => format!("MSR {index:#x}"),
    }
}

fn exception(vector: u8) -> String {
    const MNEMONICS: [&str; 22] = [
        "#DE",
        "#DB",
        "NMI",
        "#BP",
        "#OF",
        "#BR",
        "#UD",
        "#NM",
        "#DF",
        "vector 9",
        "#TS",
        "#NP",
        "#SS",
        "#GP",
        "#PF",
        "vector 15",
        "#MF",
        "#AC",
        "#MC",
        "#XM",
        "#VE",
        "#CP",
    ];
    MNEMONICS.get(usize::from(vector)).map_or_else(|| format!("vector {vector}"), |&name| name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn details_have_names_of_their_own() {
        for (reason, detail, expected) in [
            (ExitReason::IoInstruction, Detail::Port { port: 0x3f8, size: 1, write: true }, "port 0x3f8 (w)"),
            (
                ExitReason::EptViolation,
                Detail::Memory { address: 0xfee0_00b0, size: 4, write: false },
                "0xfee000b0 (r)",
            ),
            (ExitReason::MsrWrite, Detail::Msr(0x6e0), "IA32_TSC_DEADLINE"),
            (ExitReason::MsrWrite, Detail::Msr(0x80b), "x2APIC EOI"),
            (ExitReason::MsrRead, Detail::Msr(0x1234), "MSR 0x1234"),
            (ExitReason::CrAccess, Detail::ControlRegister { number: 3, write: true }, "CR3 (w)"),
            (ExitReason::ExceptionOrNmi, Detail::Vector(14), "#PF"),
            (ExitReason::ExternalInterrupt, Detail::Vector(0x30), "vector 0x30"),
            (ExitReason::Cpuid, Detail::Leaf(0x4000_0000), "leaf 0x40000000"),
            (ExitReason::Vmcall, Detail::Hypercall(5), "hypercall 5"),
        ] {
            assert_eq!(name(reason, &detail), expected);
        }
    }
}
