//! Where QEMU's software CPU (TCG 7.2) differs from the manual: which checks of the guests it fails, and what the
//! manual says there, in other words.

/// Checks of one guest that QEMU fails for one reason.
pub struct Deviation {
    guest: &'static str,
    /// Names; a `*` stands for anything.
    checks: &'static [&'static str],
    /// What the manual says.
    #[allow(dead_code)] // For the reader.
    manual: &'static str,
}

/// Whether QEMU is known to fail a check.
pub fn fails(guest: &str, check: &str) -> bool {
    DEVIATIONS
        .iter()
        .any(|deviation| deviation.guest == guest && deviation.checks.iter().any(|name| matches(name, check)))
}

/// Whether a name is what a pattern says.
fn matches(pattern: &str, name: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == name,
        Some((start, rest)) => name.strip_prefix(start).is_some_and(|tail| {
            (0..=tail.len()).any(|at| tail.get(at..).is_some_and(|tail| matches(rest, tail)))
        }),
    }
}

const fn of(guest: &'static str, checks: &'static [&'static str], manual: &'static str) -> Deviation {
    Deviation { guest, checks, manual }
}

const DEVIATIONS: &[Deviation] = &[
    of(
        "exceptions",
        &["a fault pushes RF", "a double fault pushes RF", "REP*: RF"],
        "The RFLAGS image that a fault other than an instruction breakpoint pushes has RF set.",
    ),
    of(
        "exceptions",
        &["INT1 *"],
        "INT1 (F1) raises #DB as a trap; it looks at no DPL, and what its delivery raises is external to the program.",
    ),
    of(
        "exceptions",
        &[
            "INT n through a gate of ring 0",
            "INT 13 in ring 3",
            "not present",
            "a data type",
            "a call gate",
            "a task gate",
            "a 16-bit gate",
            "* through an absent gate",
            "beyond the IDT",
            "a gate's last byte beyond the IDT",
            "#NM, then #NP",
        ],
        "An error code with IDT set has the vector in its selector index: 8 times the vector, in 64-bit mode too; EXT is \
         set where an exception, and not an instruction, led there.",
    ),
    of(
        "exceptions",
        &["LOCK *"],
        "LOCK is for the listed read-modify-write instructions with a destination in memory; #UD elsewhere.",
    ),
    of("exceptions", &["SYSEXIT in ring 3"], "SYSEXIT exists in IA-32e mode; #GP(0) where CPL is not 0."),
    of(
        "exceptions",
        &["MMX with *", "SSE with EM and TS"],
        "EMMS: #NM with CR0.TS, #UD with CR0.EM. SSE instructions: #UD with CR0.EM comes before #NM with CR0.TS.",
    ),
    of(
        "exceptions",
        &["#MF before *", "#XM at *", "#UD for it without OSXMMEXCPT", "MXCSR's reserved bits"],
        "An unmasked x87 exception is raised before the next waiting instruction; an unmasked SIMD one at once, as #XM or, \
         without CR4.OSXMMEXCPT, #UD; LDMXCSR of a reserved bit is #GP(0).",
    ),
    of(
        "exceptions",
        &["#AC of *", "8 bytes on 4"],
        "With CR0.AM and EFLAGS.AC, at CPL 3, an operand that is not on its natural boundary is #AC(0).",
    ),
    of(
        "exceptions",
        &[
            "a load through RBP",
            "a segment override does not *",
            "a push",
            "a pop",
            "a return's stack",
            "LEAVE",
            "#SS, then #NP",
        ],
        "An address of the stack segment that is not canonical is #SS(0): RSP or RBP is its base.",
    ),
    of(
        "exceptions",
        &["an operand that leaves the lower half"],
        "All bytes of an operand must have canonical addresses.",
    ),
    of(
        "exceptions",
        &["JMP", "CALL", "RET", "RET leaves RSP then"],
        "A near branch to an address that is not canonical is a #GP(0) of the branch itself.",
    ),
    of(
        "exceptions",
        &["FS_BASE", "KERNEL_GS_BASE", "LSTAR", "SYSENTER_EIP", "an MSR that is not there", "EFER*"],
        "WRMSR and RDMSR: #GP(0) for an MSR that is not there, a reserved bit, an address that is not canonical; EFER.LME \
         cannot be changed under paging.",
    ),
    of(
        "exceptions",
        &["*, changed 0", "*, changed 1", "*, changed 2", "*, changed 3", "XCHG over *", "LOCK XADD over *"],
        "The error code's W/R bit says whether the access that caused the fault was a write: an instruction that writes its \
         operand checks for that before it reads.",
    ),
    of(
        "exceptions",
        &["CMPXCHG over *", "ADC over *", "BTS far off*", "SIDT over *", "a vector store over *"],
        "As above; and an instruction that faults has stored nothing of its operand.",
    ),
    of(
        "exceptions",
        &["CR0 with NW but not CD", "CR0 above 32 bits", "CR8 of 5 bits", "CR0's reserved bits stay 0"],
        "MOV CR: #GP(0) for NW without CD and for a 1 in CR0's upper half or CR8's reserved bits; CR0's lower reserved bits \
         stay as they are.",
    ),
    of(
        "segments",
        &["LAR in 64-bit mode", "LSL in 64-bit mode"],
        "In IA-32e mode the types 1, 3, 4 and 5 of system descriptors are not valid for LAR, nor 1 and 3 for LSL.",
    ),
    of("segments", &["LTR of NULL"], "LTR: #GP(0) for a NULL selector."),
    of(
        "segments",
        &[
            "limits",
            "read-only data, *",
            "readable *code, *",
            "a load through NULL",
            "a store through CS",
            "a load through execute-only CS",
            "a jump beyond the limit",
            "an instruction * the limit",
            "a gate beyond its segment's limit",
            "RETF beyond the limit",
        ],
        "The processor checks each access, and each branch's target, against its segment's limit and type.",
    ),
    of(
        "segments",
        &["stays in ring 3"],
        "A gate to conforming code leaves CPL, which is in CS's RPL, as it was.",
    ),
    of(
        "segments",
        &["RETF with absent SS"],
        "A far return: #SS(selector) for a stack segment that is not present.",
    ),
    of(
        "segments",
        &["JMP far to code with both L and D", "a gate to an address that is not canonical"],
        "A far transfer in IA-32e mode: #GP(selector) for a code segment with both L and D, #GP(0) for an offset that is \
         not canonical, both before anything is loaded.",
    ),
    of(
        "tasks",
        &["a task gate to the LDT"],
        "CALL: #GP(selector) for a task gate whose TSS selector is local.",
    ),
    of("tasks", &["with RF"], "The flags that a fault saves have RF set, in a TSS too."),
    of(
        "tasks",
        &["a task in conforming code with RPL 3"],
        "CS of a new task: conforming code may have a DPL below its RPL.",
    ),
    of("tasks", &["local breakpoints are disabled"], "A task switch clears L0 to L3 and LE."),
    of(
        "tasks",
        &["*: in the new task"],
        "What is wrong with the new task's selectors is found after the switch: the fault is the new task's, at its first \
         instruction.",
    ),
    of(
        "tasks",
        &["absent SS"],
        "Checks of a task switch: #SS(selector) for a stack segment that is not present.",
    ),
    of(
        "tasks",
        &["the T bit traps *", "with BT in DR6"],
        "A task whose TSS has T set raises #DB after the switch, before its first instruction, with DR6.BT.",
    ),
    of(
        "virtual_8086",
        &["4 bytes beyond *", "an offset of *", "the stack's limit", "PUSH at SP 1", "a fault's error code"],
        "Segments of virtual-8086 mode have a limit of 0xffff, which is checked.",
    ),
    of("virtual_8086", &["SYSCALL is undefined"], "SYSCALL: #UD outside 64-bit mode."),
    of(
        "real_mode",
        &[
            "a word at *",
            "a jump beyond *",
            "an offset of *",
            "an instruction beyond *",
            "and is 64 KiB again *",
        ],
        "Segments of real mode have the limit that was loaded last, 0xffff; an operand, a branch or an instruction beyond it \
         is #GP, or #SS of the stack segment.",
    ),
    of("debug", &["DR6's bit 12 *"], "DR6's bit 12 is always 0."),
    of("debug", &["STI does not hold it back"], "STI delays interrupts, not the single-step trap."),
    of("debug", &["INT1 *", "MOV SS, then INT1"], "INT1 (F1) raises #DB as a trap."),
    of(
        "debug",
        &[
            "MOV SS does not hold general detect back",
            "the handler finds GD cleared",
            "MOV * with GD",
            "DR6 has BD",
        ],
        "With DR7.GD an access to a debug register is #DB before it happens, with DR6.BD; the processor clears GD.",
    ),
    of(
        "debug",
        &["after MOV SS"],
        "An instruction breakpoint on the instruction after a load of SS is not reported.",
    ),
    of(
        "debug",
        &["on a repeated instruction, once"],
        "RF, which the handler sets, holds through all iterations of a repeated string instruction.",
    ),
    of(
        "debug",
        &["data breakpoints", "REP LODSD, at *", "REP OUTS"],
        "A breakpoint on data is hit by an access to any of the bytes that it covers, and by no other; it is reported after \
         the iteration that hits, which completes the instruction where it is the last.",
    ),
    of(
        "paging",
        &[
            "access rights",
            "bit * of it is reserved",
            "bit * of an entry, *",
            "bit 21 of a large page is reserved",
            "bit 62 is reserved *",
        ],
        "A reserved bit's fault has P and RSVD set in its error code.",
    ),
    of(
        "paging",
        &["a pointer's bit *", "a pointer is read when *"],
        "PAE paging: the four pointers are loaded into registers when CR3 is; #GP(0) for reserved bits of one that is \
         present.",
    ),
    of(
        "system_calls",
        &["FMASK *"],
        "SYSCALL clears those bits of RFLAGS, and no others, that are set in IA32_FMASK.",
    ),
    of(
        "system_calls",
        &["but neither RF nor VM *"],
        "SYSRET loads RFLAGS from R11 without RF, VM and reserved bits.",
    ),
    of(
        "system_calls",
        &["SYSRET to an address *", "is a fault in ring 0"],
        "SYSRET to an address that is not canonical is #GP(0), of SYSRET itself.",
    ),
    of(
        "system_calls",
        &["SYSENTER*", "SYSEXIT*", "its stack", "its stack segment"],
        "SYSENTER and SYSEXIT are available in IA-32e mode.",
    ),
    of(
        "system_calls",
        &["WRFSBASE that is not canonical"],
        "WRFSBASE: #GP(0) for an address that is not canonical.",
    ),
    of("processor_state", &["the TSC can be set"], "WRMSR of IA32_TIME_STAMP_COUNTER sets the counter."),
    of(
        "processor_state",
        &["WRMSR of *", "RDMSR of *"],
        "WRMSR and RDMSR: #GP(0) for an MSR that is not there, a reserved bit or value, an address that is not canonical.",
    ),
    of("processor_state", &["MXCSR's reserved bits"], "XRSTOR: #GP(0) for a 1 in a reserved bit of MXCSR."),
    of("processor_state", &["XSAVE with TS"], "XSAVE: #NM with CR0.TS."),
    of("processor_state", &["XSAVE to an absent page"], "XSAVE's access to its area is a write."),
    of("timers", &["BCD counts in digits"], "The 8254 counts in four decimal digits with its BCD bit."),
    of(
        "timers",
        &["without its gate channel 2 stands"],
        "The 8254's GATE input, low, holds a counter of mode 0.",
    ),
    of("interrupts", &["LVT error keeps its bits"], "The LVT's error entry has no delivery mode."),
    of(
        "interrupts",
        &["to all clusters"],
        "A logical destination of all ones reaches all processors, in clusters too.",
    ),
    of("interrupts", &["an entry's bits"], "The redirection entry's bits 17 to 55 are reserved."),
    of("interrupts", &["no edge, no interrupt"], "An edge-triggered input interrupts when it rises."),
    of("interrupts", &["an NMI"], "The delivery mode NMI ignores the vector, and comes while IF is clear."),
    of(
        "interrupts",
        &["disabling masks *", "and keeps it masked", "nor kept"],
        "While the APIC is disabled by software, the mask bits of its vector table are set and cannot be cleared, and fixed \
         interrupts are not accepted.",
    ),
    of(
        "interrupts",
        &["and has it again", "its reserved bits", "x2APIC mode without the enable bit"],
        "IA32_APIC_BASE: #GP(0) for reserved bits and for EXTD without EN; the processor's APIC can be disabled, and enabled \
         again.",
    ),
];
