//! The program that tells the machine how a command ended.
//!
//! A write to the debug-exit port needs I/O privilege, which a shell has no means for: `/dev/port` is not in every
//! kernel. So the initramfs holds this smallest of ELF programs, written here as the bytes it consists of. It is called as
//! `report STATUS` with the serial lines that carried the output as standard input and output.

/// The debug-exit port.
const PORT: u8 = 0xf4;

/// The instructions. Linux's system calls: 16 is ioctl, 173 ioperm, 60 exit.
#[rustfmt::skip]
const CODE: &[u8] = &[
    // Wait until the serial lines have sent everything: ioctl(0, TCSBRK, 1), which is tcdrain(3) …
    0x31, 0xff,                         //   xor   edi, edi
    0xbe, 0x09, 0x54, 0x00, 0x00,       //   mov   esi, 0x5409
    0x6a, 0x01, 0x5a,                   //   push  1; pop rdx
    0x6a, 0x10, 0x58,                   //   push  16; pop rax
    0x0f, 0x05,                         //   syscall
    // … and the same for standard output.
    0x6a, 0x01, 0x5f,                   //   push  1; pop rdi
    0x6a, 0x10, 0x58,                   //   push  16; pop rax
    0x0f, 0x05,                         //   syscall
    // ioperm(PORT, 4, 1); RDX is still 1.
    0xbf, PORT, 0x00, 0x00, 0x00,       //   mov   edi, PORT
    0x6a, 0x04, 0x5e,                   //   push  4; pop rsi
    0xb8, 0xad, 0x00, 0x00, 0x00,       //   mov   eax, 173
    0x0f, 0x05,                         //   syscall
    // The status, a decimal number, is the first argument.
    0x48, 0x8b, 0x74, 0x24, 0x10,       //   mov   rsi, [rsp+16]
    0x31, 0xc0,                         //   xor   eax, eax
    0x48, 0x85, 0xf6,                   //   test  rsi, rsi
    0x74, 0x15,                         //   jz    report
    // digit:
    0x0f, 0xb6, 0x0e,                   //   movzx ecx, byte [rsi]
    0x83, 0xe9, 0x30,                   //   sub   ecx, '0'
    0x83, 0xf9, 0x09,                   //   cmp   ecx, 9
    0x77, 0x0a,                         //   ja    report
    0x6b, 0xc0, 0x0a,                   //   imul  eax, eax, 10
    0x01, 0xc8,                         //   add   eax, ecx
    0x48, 0xff, 0xc6,                   //   inc   rsi
    0xeb, 0xeb,                         //   jmp   digit
    // report:
    0xe7, PORT,                         //   out   PORT, eax
    // Nobody took it: exit(0).
    0x31, 0xff,                         //   xor   edi, edi
    0x6a, 0x3c, 0x58,                   //   push  60; pop rax
    0x0f, 0x05,                         //   syscall
];

/// Where the program is loaded.
const BASE: u64 = 0x40_0000;
/// Bytes of the ELF header and of the one program header.
const HEADERS: u16 = 64 + 56;

/// The program as a static ELF file. ELF-64 Object File Format, *File Header* and *Program Header Table*.
pub fn program() -> Vec<u8> {
    let entry = BASE + u64::from(HEADERS);
    let size = u64::from(HEADERS) + CODE.len() as u64;
    let mut file = Vec::with_capacity(size as usize);
    // e_ident: 64 bits, little-endian, version 1, System V.
    file.extend_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    let mut half =
        |values: &[u16]| values.iter().for_each(|value| file.extend_from_slice(&value.to_le_bytes()));
    half(&[2, 62, 1, 0]); // e_type: executable; e_machine: x86-64; e_version
    for value in [entry, 64, 0] {
        file.extend_from_slice(&value.to_le_bytes()); // e_entry, e_phoff, e_shoff
    }
    let mut half =
        |values: &[u16]| values.iter().for_each(|value| file.extend_from_slice(&value.to_le_bytes()));
    half(&[0, 0, 64, 56, 1, 64, 0, 0]); // e_flags, e_ehsize, e_phentsize, e_phnum, no sections
    half(&[1, 0, 5, 0]); // p_type: load; p_flags: read and execute
    for value in [0, BASE, BASE, size, size, 4096] {
        file.extend_from_slice(&value.to_le_bytes()); // p_offset, p_vaddr, p_paddr, p_filesz, p_memsz, p_align
    }
    file.extend_from_slice(CODE);
    file
}

#[cfg(test)]
mod tests {
    use object::{Object, ObjectSegment};

    use super::*;

    #[test]
    fn the_program_is_an_executable_that_starts_at_its_code() {
        let elf = program();
        let file = object::File::parse(elf.as_slice()).unwrap();
        assert_eq!(file.kind(), object::ObjectKind::Executable);
        assert_eq!(file.entry(), BASE + u64::from(HEADERS));
        let segment = file.segments().next().unwrap();
        assert_eq!((segment.address(), segment.size()), (BASE, elf.len() as u64));
        assert_eq!(&elf[usize::from(HEADERS)..], CODE);
    }
}
