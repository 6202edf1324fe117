//! Multiboot images through the whole command: what they find when they are entered, and that what they say comes out.

mod common;

use std::time::Duration;

use common::guest::{Written, assemble};
use common::{KernelFile, ringside, run_within, stderr};
use iced_x86::code_asm::*;

const LIMIT: Duration = Duration::from_secs(60);
/// Where images are linked to.
const BASE: u32 = 0x40_0000;
/// Bytes of an ELF32 file's headers here.
const HEADERS: u32 = 52 + 32;
/// Bytes of a Multiboot header with its address fields.
const HEADER: u32 = 32;
const ENTRY: u32 = BASE + HEADERS + HEADER;
const ADDRESSES: u32 = 1 << 16;

/// A Multiboot header with these flags, for an image that is loaded whole at `base`.
fn header(flags: u32, base: u32, offset: u32, entry: u32) -> Vec<u8> {
    let magic = 0x1bad_b002u32;
    let words =
        [magic, flags, 0u32.wrapping_sub(magic.wrapping_add(flags)), base + offset, base, 0, 0, entry];
    words.into_iter().flat_map(u32::to_le_bytes).collect()
}

/// An ELF32 image at `base` whose one segment is the whole file and 64 KiB of zeros.
fn elf32(base: u32, bits: u32, write: impl FnOnce(&mut CodeAssembler) -> Written) -> Vec<u8> {
    let entry = base + HEADERS + HEADER;
    let code = assemble(bits, entry.into(), write);
    let len = HEADERS + HEADER + code.len() as u32;
    let mut file = b"\x7fELF\x01\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x03\0\x01\0\0\0".to_vec();
    file.extend([entry, 52, 0, 0].into_iter().flat_map(u32::to_le_bytes));
    file.extend([52u16, 32, 1, 40, 0, 0].into_iter().flat_map(u16::to_le_bytes));
    file.extend([1, 0, base, base, len, len + 0x1_0000, 7, 0x1000].into_iter().flat_map(u32::to_le_bytes));
    file.extend(header(0, 0, 0, 0));
    file.extend(code);
    file
}

/// A flat image: some bytes before the header, the header, the code.
fn flat(base: u32, write: impl FnOnce(&mut CodeAssembler) -> Written) -> Vec<u8> {
    const BEFORE: u32 = 64;
    let entry = base + BEFORE + HEADER;
    let code = assemble(32, entry.into(), write);
    [vec![0x90; BEFORE as usize], header(ADDRESSES | 3, base, BEFORE, entry), code].concat()
}

/// Writes the string at ESI to the serial port and a newline after it.
fn print(a: &mut CodeAssembler) -> Written {
    let (mut next, mut wait, mut done) = (a.create_label(), a.create_label(), a.create_label());
    a.set_label(&mut next)?;
    a.mov(bl, byte_ptr(esi))?;
    a.inc(esi)?;
    a.test(bl, bl)?;
    a.jne(wait)?;
    a.jmp(done)?;
    a.set_label(&mut wait)?;
    a.mov(edx, 0x3fd)?;
    a.in_(al, dx)?;
    a.test(al, 0x20)?;
    a.je(wait)?;
    a.mov(edx, 0x3f8)?;
    a.mov(al, bl)?;
    a.out(dx, al)?;
    a.jmp(next)?;
    a.set_label(&mut done)?;
    a.mov(edx, 0x3f8)?;
    a.mov(al, 10)?;
    a.out(dx, al)
}

fn exit(a: &mut CodeAssembler) -> Written {
    a.out(0xf4, eax)?;
    a.hlt()
}

/// Runs an image; gives its exit status and what it printed.
#[track_caller]
fn run(image: &[u8], arguments: &[&str]) -> (i32, String) {
    let file = KernelFile::new(image);
    let mut command = ringside();
    command.args(["run", "--engine", "soft", "--debug-exit", "0xf4", "--kernel"]).arg(file.path());
    if !arguments.contains(&"--memory") {
        command.args(["--memory", "256M"]);
    }
    let output = run_within(command.args(arguments), LIMIT);
    let text = String::from_utf8(output.stdout.clone()).expect("text");
    (output.status.code().unwrap_or_else(|| panic!("{}", stderr(&output))), text)
}

/// Exits with 1 where the loader's state is right, else with the number of what is wrong.
fn check_entry_state(a: &mut CodeAssembler) -> Written {
    let mut wrong = a.create_label();
    a.mov(esp, 0x7_0000)?;
    a.mov(ecx, 2)?;
    a.cmp(eax, 0x2bad_b002u32 as i32)?;
    a.jne(wrong)?;
    a.inc(ecx)?;
    a.mov(eax, cr0)?;
    a.and(eax, 0x8000_0001u32 as i32)?;
    a.cmp(eax, 1)?;
    a.jne(wrong)?;
    a.inc(ecx)?;
    a.pushfd()?;
    a.pop(eax)?;
    a.test(eax, 0x2_0200)?;
    a.jne(wrong)?;
    a.inc(ecx)?;
    // A20: 0x10_0000 is not 0.
    a.mov(dword_ptr(0x10_0000), 0x55)?;
    a.mov(dword_ptr(0), 0)?;
    a.cmp(dword_ptr(0x10_0000), 0x55)?;
    a.jne(wrong)?;
    a.inc(ecx)?;
    // Memory, command line, memory map, loader's name; no module.
    a.mov(eax, dword_ptr(ebx))?;
    a.cmp(eax, 0b10_0100_0101)?;
    a.jne(wrong)?;
    a.inc(ecx)?;
    // 255 MiB from 1 MiB on.
    a.cmp(dword_ptr(ebx + 8), 255 << 10)?;
    a.jne(wrong)?;
    a.mov(ecx, 1)?;
    a.set_label(&mut wrong)?;
    a.mov(eax, ecx)?;
    exit(a)
}

#[test]
fn an_image_is_entered_as_the_specification_says() {
    for image in [elf32(BASE, 32, check_entry_state), flat(BASE, check_entry_state)] {
        assert_eq!(run(&image, &[]).0, 1);
        assert_eq!(run(&image, &["--boot", "multiboot"]).0, 1);
    }
}

#[test]
fn an_image_may_be_linked_to_conventional_memory() {
    for base in [0x4000, 0x1_0000, 0x9_0000] {
        let image = flat(base, |a| {
            a.mov(eax, dword_ptr(ebx + 8))?;
            a.shr(eax, 10)?;
            exit(a)
        });
        assert_eq!(run(&image, &[]).0, 255, "{base:#x}");
    }
}

#[test]
fn the_command_line_begins_with_the_path_and_all_output_comes_out() {
    let image = elf32(BASE, 32, |a| {
        a.mov(esi, dword_ptr(ebx + 16))?;
        print(a)?;
        a.mov(eax, 7)?;
        exit(a)
    });
    let file = KernelFile::new(&image);
    let mut command = ringside();
    command.args(["run", "--engine", "soft", "--debug-exit", "0xf4", "--kernel"]).arg(file.path());
    let output = run_within(command.args(["--cmdline", "first 'second"]), LIMIT);
    assert_eq!(output.status.code(), Some(7), "{}", stderr(&output));
    let expected = format!("{} first 'second\n", file.path().display());
    assert_eq!(String::from_utf8_lossy(&output.stdout), expected);
}

#[test]
fn the_initrd_is_the_module_and_its_string_is_its_path() {
    let image = elf32(BASE, 32, |a| {
        a.mov(ebp, ebx)?;
        let mut wrong = a.create_label();
        a.cmp(dword_ptr(ebp + 20), 1)?;
        a.jne(wrong)?;
        a.mov(edi, dword_ptr(ebp + 24))?;
        a.mov(esi, dword_ptr(edi))?;
        // It lies on a page after the image.
        a.test(esi, 0xfff)?;
        a.jne(wrong)?;
        a.cmp(esi, BASE as i32 + 0x1_0000)?;
        a.jb(wrong)?;
        print(a)?;
        a.mov(esi, dword_ptr(edi + 8))?;
        print(a)?;
        a.mov(eax, dword_ptr(edi + 4))?;
        a.sub(eax, dword_ptr(edi))?;
        exit(a)?;
        a.set_label(&mut wrong)?;
        a.mov(eax, 99)?;
        exit(a)
    });
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("environment");
    std::fs::write(&path, b"NR_CPUS=2\n").expect("written");
    let (status, text) = run(&image, &["--initrd", path.to_str().expect("text")]);
    assert_eq!((status, text), (10, format!("NR_CPUS=2\n\n{}\n", path.display())));
}

#[test]
fn code_of_64_bits_in_a_file_of_32_bits_enters_long_mode_by_itself() {
    const TABLES: u32 = 0x60_0000;
    const GDT: u32 = TABLES + 0x3000;
    let long = assemble(64, 0x50_0000, |a| {
        a.mov(rax, 0x1234_5678_9abc_def0u64)?;
        a.shr(rax, 60)?;
        a.out(0xf4, eax)?;
        a.hlt()
    });
    let image = elf32(BASE, 32, |a| {
        for (index, bytes) in long.chunks(4).enumerate() {
            let mut word = [0x90; 4];
            word[..bytes.len()].copy_from_slice(bytes);
            a.mov(dword_ptr(0x50_0000 + 4 * index as u32), u32::from_le_bytes(word) as i32)?;
        }
        a.mov(dword_ptr(TABLES), TABLES as i32 + 0x1007)?;
        a.mov(dword_ptr(TABLES + 0x1000), TABLES as i32 + 0x2007)?;
        for page in 0..4 {
            a.mov(dword_ptr(TABLES + 0x2000 + 8 * page), (page as i32) << 21 | 0x87)?;
        }
        a.mov(dword_ptr(GDT + 8), 0xffff)?;
        a.mov(dword_ptr(GDT + 12), 0x00af_9b00)?;
        a.mov(dword_ptr(GDT + 0x100), 0xf | (GDT << 16) as i32)?;
        a.mov(dword_ptr(GDT + 0x104), (GDT >> 16) as i32)?;
        a.mov(eax, TABLES as i32)?;
        a.mov(cr3, eax)?;
        a.mov(eax, cr4)?;
        a.or(eax, 0x20)?;
        a.mov(cr4, eax)?;
        a.mov(ecx, 0xc000_0080u32 as i32)?;
        a.rdmsr()?;
        a.or(eax, 0x100)?;
        a.wrmsr()?;
        a.mov(eax, cr0)?;
        a.or(eax, 0x8000_0000u32 as i32)?;
        a.mov(cr0, eax)?;
        a.lgdt(fword_ptr(GDT + 0x100))?;
        a.mov(esp, 0x7_0000)?;
        a.push(8)?;
        a.push(0x50_0000)?;
        a.retf()
    });
    assert_eq!(run(&image, &[]).0, 1);
}

#[test]
fn the_memory_map_has_the_ram_above_4_gib_too() {
    // Exits with the number of available ranges above 4 GiB.
    let image = elf32(BASE, 32, |a| {
        let (mut again, mut below, mut done) = (a.create_label(), a.create_label(), a.create_label());
        a.mov(esi, dword_ptr(ebx + 48))?;
        a.mov(edi, esi)?;
        a.add(edi, dword_ptr(ebx + 44))?;
        a.xor(eax, eax)?;
        a.set_label(&mut again)?;
        a.cmp(esi, edi)?;
        a.jae(done)?;
        a.cmp(dword_ptr(esi + 20), 1)?;
        a.jne(below)?;
        a.cmp(dword_ptr(esi + 8), 0)?;
        a.je(below)?;
        a.inc(eax)?;
        a.set_label(&mut below)?;
        a.add(esi, dword_ptr(esi))?;
        a.add(esi, 4)?;
        a.jmp(again)?;
        a.set_label(&mut done)?;
        exit(a)
    });
    assert_eq!(run(&image, &[]).0, 0);
    assert_eq!(run(&image, &["--memory", "4G"]).0, 1);
}

#[test]
fn bad_images_are_refused_by_what_is_wrong() {
    let refused = |image: &[u8], arguments: &[&str], why: &str| {
        let file = KernelFile::new(image);
        let output = run_within(ringside().args(["run", "--kernel"]).arg(file.path()).args(arguments), LIMIT);
        let message = stderr(&output);
        assert_eq!(output.status.code(), Some(240), "{message}");
        assert!(message.contains(why), "{message}");
    };
    let nothing = |a: &mut CodeAssembler| a.hlt();
    let changed = |offset: usize, value: u32| {
        let mut image = flat(BASE, nothing);
        image[64 + offset..64 + offset + 4].copy_from_slice(&value.to_le_bytes());
        image
    };
    refused(&changed(16, BASE + 65), &[], "load_addr is 0x400041");
    refused(&changed(20, BASE - 1), &[], "load_end_addr");
    refused(&changed(20, BASE + 0x1000), &[], "truncated");
    refused(&changed(24, u32::MAX), &[], "too big for the memory");
    refused(&changed(28, BASE + 0x1000), &[], "entry_addr");
    refused(&[header(0, 0, 0, 0), vec![0; 100]].concat(), &[], "no addresses");
    refused(&header(0x10, 0, 0, 0), &[], "flags 0x10");
    refused(&elf32(0xa_0000, 32, nothing), &[], "not free RAM");
    refused(b"nothing of the kind", &["--boot", "multiboot"], "no Multiboot header");
    assert!(elf32(BASE, 32, nothing).len() as u32 > ENTRY - BASE);
}
