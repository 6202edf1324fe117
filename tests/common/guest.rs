//! Bare-metal guests, assembled in the test: an ELF file that is entered in 32-bit mode by PVH or in 64-bit mode as
//! Linux is, and the command that runs it.

use std::process::Command;
use std::time::Duration;

use iced_x86::IcedError;
use iced_x86::code_asm::CodeAssembler;

use super::{KernelFile, ringside, run_within, stderr};

/// Where a guest's code is loaded and entered.
pub const BASE: u64 = 0x20_0000;
/// The flat code segment that the machine starts a guest with; the flat data segment is the next.
pub const CODE_SELECTOR: u16 = 0x10;
/// RAM of the machines that guests run in.
pub const MEMORY: &str = "32M";
/// The first guest-physical address after it.
pub const RAM_END: u64 = 32 << 20;
/// A guest-physical address where nothing is: in the PCI window.
pub const NOTHING: u64 = 0xd000_0000;
/// A guest that takes longer hangs.
const LIMIT: Duration = Duration::from_secs(60);

/// The result of writing instructions.
pub type Written = Result<(), IcedError>;

/// Assembles code for a mode of `bits` (16, 32, 64) that runs at `address`.
pub fn assemble(bits: u32, address: u64, write: impl FnOnce(&mut CodeAssembler) -> Written) -> Vec<u8> {
    let mut assembler = CodeAssembler::new(bits).expect("16, 32 or 64");
    write(&mut assembler).expect("valid instructions");
    assembler.assemble(address).expect("code that can be encoded")
}

/// A guest's memory and how it is entered.
#[derive(Clone, Debug)]
pub struct Guest {
    segments: Vec<(u64, Vec<u8>)>,
    pvh: bool,
}

impl Guest {
    /// Entered at [`BASE`] in 32-bit mode: flat segments, no paging, interrupts off, no IDT.
    pub fn protected(write: impl FnOnce(&mut CodeAssembler) -> Written) -> Self {
        Self::of_bytes(&assemble(32, BASE, write))
    }

    /// The same of code that is assembled already.
    pub fn of_bytes(code: &[u8]) -> Self {
        Self { segments: vec![(BASE, code.to_vec())], pvh: true }
    }

    /// Entered at [`BASE`] in 64-bit mode: the first 4 GiB mapped one to one, interrupts off, no IDT.
    pub fn long(write: impl FnOnce(&mut CodeAssembler) -> Written) -> Self {
        Self { segments: vec![(BASE, assemble(64, BASE, write))], pvh: false }
    }

    /// With these bytes at a guest-physical address from 0x3_0000 on.
    pub fn with(mut self, address: u64, bytes: impl Into<Vec<u8>>) -> Self {
        self.segments.push((address, bytes.into()));
        self
    }

    /// The ELF file.
    pub fn elf(&self) -> Vec<u8> {
        let mut note = Vec::new();
        if self.pvh {
            note.extend([4u32, 4, 18].iter().flat_map(|word| word.to_le_bytes()));
            note.extend(b"Xen\0");
            note.extend((BASE as u32).to_le_bytes());
        }
        let count = self.segments.len() + usize::from(self.pvh);
        let mut offset = 64 + 56 * count as u64;
        let mut file = elf_header(count as u16);
        let mut data = Vec::new();
        let mut add = |kind: u32, address: u64, bytes: &[u8]| {
            file.extend([kind, 7].iter().flat_map(|word| word.to_le_bytes()));
            let len = bytes.len() as u64;
            let quads = [offset, address, address, len, len, 1];
            file.extend(quads.iter().flat_map(|quad| quad.to_le_bytes()));
            offset += len;
            data.extend_from_slice(bytes);
        };
        if self.pvh {
            add(4, 0, &note);
        }
        for (address, bytes) in &self.segments {
            add(1, *address, bytes);
        }
        file.extend(data);
        file
    }

    /// Its file.
    pub fn file(&self) -> KernelFile {
        KernelFile::new(&self.elf())
    }

    /// Runs it to its end.
    pub fn run(&self) -> End {
        self.run_with(&[])
    }

    /// Runs it to its end, with more arguments.
    pub fn run_with(&self, arguments: &[&str]) -> End {
        let file = self.file();
        let output = run_within(machine(&file).args(arguments), LIMIT);
        End { status: output.status.code(), message: stderr(&output) }
    }
}

/// How a guest's run ended.
#[derive(Clone, Debug)]
pub struct End {
    /// The exit status; `None` where a signal killed Ringside.
    pub status: Option<i32>,
    /// What stderr says.
    pub message: String,
}

impl End {
    /// It has this status, and the message has all of these.
    #[track_caller]
    pub fn is(&self, status: i32, parts: &[&str]) {
        assert_eq!(self.status, Some(status), "{}", self.message);
        for part in parts {
            assert!(self.message.contains(part), "no {part:?} in {:?}", self.message);
        }
        self.has_a_name();
    }

    /// It ended in one of the documented ways, none of which is a defect of Ringside.
    #[track_caller]
    pub fn has_a_name(&self) {
        let Self { status, message } = self;
        assert!(!message.contains("panicked"), "{message}");
        let named = match status {
            Some(0) => message.is_empty() || message.contains("debug-exit port"),
            _ if message.contains("debug-exit port") => true,
            Some(241) => message.contains("the guest reset itself: vCPU ") && message.contains(" at RIP 0x"),
            Some(242) => message.contains("the guest asked for a reset through "),
            Some(245) => message.contains("halted with interrupts off"),
            Some(143) => message.contains("ended by signal 15"),
            _ => false,
        };
        assert!(named, "{status:?}: {message}");
    }
}

/// The command that runs a guest on the software CPU.
pub fn machine(kernel: &KernelFile) -> Command {
    let mut command = ringside();
    command.args(["run", "--engine", "soft", "--memory", MEMORY, "--debug-exit", "0xf4", "--exits", "off"]);
    command.arg("--kernel").arg(kernel.path());
    command
}

fn elf_header(segments: u16) -> Vec<u8> {
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0".to_vec();
    file.extend([BASE, 64, 0].iter().flat_map(|quad| quad.to_le_bytes()));
    file.extend(0u32.to_le_bytes());
    file.extend([64u16, 56, segments, 64, 0, 0].iter().flat_map(|half| half.to_le_bytes()));
    file
}

/// Numbers that look random and are the same in every run.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The sequence of a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// The next number (xorshift64*).
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// So many bytes.
    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| (self.next() >> 56) as u8).collect()
    }
}
