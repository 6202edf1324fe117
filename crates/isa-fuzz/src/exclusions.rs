//! What is not compared, and why.

use engine::HostXsave;
use iced_x86::{Instruction, Mnemonic};

use crate::case::Case;
use crate::layout::Mode;

/// Why an instruction is not given to the oracle.
pub fn excluded(instruction: &Instruction) -> Option<&'static str> {
    use Mnemonic::*;
    Some(match instruction.mnemonic() {
        Syscall | Sysenter => "enters the kernel: a system call",
        // Of INT n, what Linux lets programs call: system calls, and what single cases are delivered for.
        Int if matches!(instruction.immediate8(), 3 | 4 | 0x80) => "enters the kernel: an event's delivery",
        Int3 | Int1 => "is delivered where it completes: programs have it",
        Sgdt | Sidt | Sldt | Str | Smsw => "is emulated by Linux where UMIP refuses it",
        Xsaveopt | Xsaveopt64 | Xsavec | Xsavec64 => {
            "leaves out what the processor knows to be unchanged, or not in use"
        }
        Xsave | Xsave64 | Xrstor | Xrstor64 if !HostXsave::get().is_ours() => {
            "has the state's components at other places on this host"
        }
        Fxsave | Fxsave64 | Fnsave | Fnstenv | Xsave | Xsave64 if !crate::host::keeps_x87_pointers() => {
            "tells where the last x87 instruction was, which this host does not keep"
        }
        Xbegin | Xend | Xabort | Xtest | Xsusldtrk | Xresldtrk => "is of transactions, which no model has",
        Wrpkru | Rdpkru => "is of protection keys, which hosts do not have that models have",
        Enqcmd | Enqcmds | Monitor | Mwait | Monitorx | Mwaitx | Umonitor | Umwait | Tpause => {
            "is of a feature that no model has"
        }
        Vmcall | Vmmcall | Vmfunc | Getsec => "is the hypervisor's affair on the host",
        _ => return None,
    })
}

/// Whether bytes could enter the kernel however they are decoded: SYSCALL, SYSENTER and INT 80h are nowhere in them.
pub fn may_enter_kernel(bytes: &[u8]) -> bool {
    // VMCALL and its kin with odd prefixes are the hypervisor's affair.
    let hypervisor = bytes
        .windows(3)
        .any(|three| matches!(three, [0x0f, 0x01, 0xc0 | 0xc1 | 0xc5..=0xc9 | 0xcc..=0xcf | 0xd2..=0xd9]));
    hypervisor || bytes.windows(2).any(|pair| matches!(pair, [0x0f, 0x05 | 0x34] | [0xcd, 0x80]))
}

/// Why a case may well not have come back from the host.
pub fn endless(instruction: &Instruction, case: &Case) -> Option<&'static str> {
    let far = instruction.is_call_far() || instruction.is_call_far_indirect();
    (far && case.mode != Mode::Bits64 && case.gprs[4] < 8).then_some(
        "pushes at the top of the address space: Linux tries the page fault of that again for ever",
    )
}

/// What an outcome leaves to the processor's maker.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Loose {
    /// Which of several addresses that fault is reported.
    pub cr2: bool,
    /// Whether a masked access of no bytes faults: nothing is compared.
    pub all: bool,
    /// Which of several faults goes first: of the parts of a frame or a far pointer.
    pub order: bool,
    /// The flags of a repeated instruction that faults.
    pub repeated: bool,
    /// The upper halves of the count and the index registers of a repeated instruction with 32-bit addresses in 64-bit
    /// mode: whether they are cleared where nothing was done yet.
    pub halves: bool,
    /// The data.
    pub data: bool,
    /// What it gives is another thing each time, or another host's: registers are not compared.
    pub results: bool,
    /// The vector registers.
    pub vectors: bool,
    /// The x87 state: an MMX instruction that faults may have reset the top of the stack.
    pub x87: bool,
    /// Bits of MXCSR.
    pub mxcsr: u32,
}

/// Whether an instruction stores or loads a whole state, whose parts fault in an order of the processor's own; #AC may
/// go before #GP.
pub fn is_of_whole_state(instruction: &Instruction) -> bool {
    use Mnemonic::*;
    matches!(
        instruction.mnemonic(),
        Xsave | Xsave64 | Xrstor | Xrstor64 | Fxsave | Fxsave64 | Fxrstor | Fxrstor64 | Fnsave | Fnstenv
    )
}

/// What is not compared of an instruction, after the host raised `vector` (or none).
pub fn loose(instruction: &Instruction, vector: u8) -> Loose {
    use Mnemonic::*;
    let mmx = (0..instruction.op_count()).any(|n| instruction.op_register(n).is_mm());
    Loose {
        order: matches!(
            instruction.mnemonic(),
            Les | Lds
                | Lss
                | Lfs
                | Lgs
                | Iret
                | Iretd
                | Iretq
                | Retf
                | Enter
                | Leave
                | Bound
                | Pusha
                | Pushad
                | Popa
        ) || instruction.mnemonic() == Popad
            || matches!(
                instruction.mnemonic(),
                Push | Pop | Vcvtps2ph | Fld | Fstp | Fbld | Fbstp | Frstor | Fldenv | INVALID
            )
            || is_of_whole_state(instruction)
            || instruction.is_jmp_far_indirect()
            || instruction.is_call_far_indirect()
            || instruction.is_call_far(),
        repeated: vector != crate::case::COMPLETED && instruction.is_string_instruction(),
        halves: (0..instruction.op_count()).any(|n| {
            use iced_x86::OpKind::*;
            matches!(instruction.op_kind(n), MemorySegESI | MemorySegEDI | MemoryESEDI)
        }),
        // The order in which a frame's parts are read.
        cr2: matches!(instruction.mnemonic(), Iret | Iretd | Iretq | Retf)
            // Of a masked operand.
            || instruction.op_mask() != iced_x86::Register::None
            || matches!(instruction.mnemonic(), Vmaskmovps | Vmaskmovpd | Vpmaskmovd | Vpmaskmovq)
            // Of a large one.
            || matches!(instruction.mnemonic(), Frstor | Fldenv),
        // Of a masked store the first byte, or the first that is written; and its fault where none is.
        all: vector != crate::case::COMPLETED
            && matches!(instruction.mnemonic(), Maskmovq | Maskmovdqu | Vmaskmovdqu)
            // The whole area is probed, be it loaded or not.
            || vector == 14 && matches!(instruction.mnemonic(), Xrstor | Xrstor64),
        // Its 80 bits are stored in two parts, the first of which may stay.
        data: vector == 14 && matches!(instruction.mnemonic(), Fbstp | Fstp)
            || crate::host::pushes_selector(instruction),
        results: matches!(instruction.mnemonic(), Rdtsc | Rdtscp | Rdrand | Rdseed | Cpuid | Rdpid),
        // A gather that faults leaves more of its mask and destination than the manual says changed.
        vectors: vector != crate::case::COMPLETED && instruction.is_vsib(),
        x87: mmx && vector != crate::case::COMPLETED,
        // With the overflow unmasked, whether the result would have been inexact with a larger exponent.
        mxcsr: match vector {
            // Sums of products, which stop at the first step that raises one.
            19 if matches!(instruction.mnemonic(), Dpps | Dppd | Vdpps | Vdppd) => 0x3f,
            19 => 1 << 5,
            // The exceptions of a conversion whose store then faults.
            12..=14 if instruction.mnemonic() == Vcvtps2ph => 0x3f,
            _ => 0,
        },
    }
}
