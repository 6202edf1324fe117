//! A vCPU's registers for a person.

use std::fmt::Write;

use engine::VcpuState;

const GPRS: [&str; 16] = [
    "RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI", "R8", "R9", "R10", "R11", "R12", "R13", "R14",
    "R15",
];
const SEGMENTS: [&str; 6] = ["ES", "CS", "SS", "DS", "FS", "GS"];

/// The registers that tell where a guest stands, in lines of about 100 columns.
pub fn table(state: &VcpuState) -> String {
    let mut text = format!(
        "RIP={:016x} RFLAGS={:08x} halted={} waits for SIPI={}\n",
        state.rip,
        state.rflags.bits(),
        state.halted,
        state.waits_for_sipi
    );
    for (index, (name, value)) in GPRS.iter().zip(state.gprs).enumerate() {
        let end = if index % 4 == 3 { '\n' } else { ' ' };
        // Writing to a string cannot fail.
        let _ = write!(text, "{name:<3}={value:016x}{end}");
    }
    for (index, (name, segment)) in SEGMENTS.iter().zip(&state.segments).enumerate() {
        let end = if index % 2 == 1 { '\n' } else { ' ' };
        let _ = write!(
            text,
            "{name}={:04x} base={:016x} limit={:08x} attributes={:05x}{end}",
            segment.selector.0,
            segment.base,
            segment.limit,
            segment.attributes.bits()
        );
    }
    let _ = writeln!(
        text,
        "CR0={:08x} CR2={:016x} CR3={:016x} CR4={:08x} EFER={:04x} XCR0={:x}",
        state.cr0.bits(),
        state.cr2,
        state.cr3,
        state.cr4.bits(),
        state.efer.bits(),
        state.xcr0
    );
    let _ = write!(
        text,
        "GDT={:016x}+{:x} IDT={:016x}+{:x} TR={:04x} LDT={:04x}",
        state.gdtr.base,
        state.gdtr.limit,
        state.idtr.base,
        state.idtr.limit,
        state.tr.selector.0,
        state.ldtr.selector.0
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_are_named_and_whole() {
        let mut state = VcpuState::reset();
        state.gprs[15] = 0x1234_5678_9abc_def0;
        let text = table(&state);
        assert!(text.contains("RIP=000000000000fff0") && text.contains("R15=123456789abcdef0"), "{text}");
        assert!(text.contains("CS=f000 base=00000000ffff0000"), "{text}");
    }
}
