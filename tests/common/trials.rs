//! A guest that tries many short pieces of code one after another: whatever fault or interrupt ends one, the next begins
//! with the same registers. When all were tried it writes [`DONE`] to the debug-exit port.
//!
//! A timer's NMI ends pieces that never end, with interrupts off too. Pieces may still end the run: they run with all
//! privileges.

use iced_x86::code_asm::*;

use super::guest::{BASE, CODE_SELECTOR, Guest, Written, assemble};

/// The status of a run in which all pieces were tried.
pub const DONE: i32 = 0x42;
/// Bytes of a piece; its last two are UD2.
pub const PIECE: usize = 64;

const HANDLER: u64 = BASE + 0x1000;
const IDT: u64 = 0x21_0000;
const IDT_POINTER: u64 = 0x21_1000;
const INDEX: u64 = 0x21_2000;
const STACK: u64 = 0x22_0000;
/// Where the pieces are, but in real mode.
pub const PIECES: u64 = 0x28_0000;
/// What the registers of a piece point to, far from all else.
const SCRATCH: u64 = 0x100_0000;
/// RCX is small: it counts repeated string instructions and loops.
const COUNT: u64 = 0x2000;

/// The flags with which a piece begins: interrupts on.
const FLAGS: i32 = 0x202;

/// In real mode all code is in one segment.
const REAL_SEGMENT: u32 = 0x4000;
const REAL_BASE: u64 = (REAL_SEGMENT as u64) << 4;
const REAL_HANDLER: u64 = 0x100;
const REAL_INDEX: u64 = 0xff0;
const REAL_PIECES: u64 = 0x1000;
/// The most pieces that real mode has room for.
pub const REAL_MOST: usize = (0xf000 - REAL_PIECES as usize) / PIECE - 1;

/// Tries them in 64-bit mode.
pub fn long(pieces: &[Vec<u8>]) -> Guest {
    long_again(pieces, 1, SCRATCH)
}

/// The same, all of them in turn for so many rounds, so that they become worth translating. What the registers of a
/// piece point to starts at `target`: at [`PIECES`] they overwrite each other.
pub fn long_again(pieces: &[Vec<u8>], rounds: u32, target: u64) -> Guest {
    let low = HANDLER & 0xffff | u64::from(CODE_SELECTOR) << 16 | 1 << 32 | 0x8e << 40;
    let gate = [low | (HANDLER >> 16 & 0xffff) << 48, HANDLER >> 32];
    let idt: Vec<u8> = (0..256).flat_map(|_| gate).flat_map(u64::to_le_bytes).collect();
    let end = PIECES + ((pieces.len() + 1) * PIECE) as u64;
    let handler = assemble(64, HANDLER, |a| {
        let (mut done, mut go) = (a.create_label(), a.create_label());
        a.cli()?;
        a.cld()?;
        a.mov(rsp, STACK)?;
        a.add(qword_ptr(INDEX), PIECE as i32)?;
        a.mov(rax, qword_ptr(INDEX))?;
        a.cmp(rax, end as i32)?;
        a.jb(go)?;
        a.mov(eax, PIECES as i32)?;
        a.mov(qword_ptr(INDEX), rax)?;
        // Below zero where an NMI came in between.
        a.dec(qword_ptr(INDEX + 8))?;
        a.jle(done)?;
        a.set_label(&mut go)?;
        // IRET lets the next NMI in.
        a.push(i32::from(CODE_SELECTOR) + 8)?;
        a.push(STACK as i32)?;
        a.push(FLAGS)?;
        a.push(i32::from(CODE_SELECTOR))?;
        a.push(rax)?;
        let all = [rax, rdx, rbx, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15];
        for (index, register) in all.into_iter().enumerate() {
            a.mov(register, target + 0x100 * index as u64)?;
        }
        a.mov(rcx, COUNT)?;
        a.iretq()?;
        a.set_label(&mut done)?;
        a.mov(eax, DONE)?;
        a.out(0xf4, eax)?;
        a.hlt()
    });
    Guest::long(|a| {
        a.lidt(tbyte_ptr(IDT_POINTER))?;
        // The TSS is at 0: the stack of ring 0 and the one that all gates use.
        a.mov(dword_ptr(4), STACK as i32)?;
        a.mov(dword_ptr(0x24), STACK as i32)?;
        route_timer(a)?;
        a.mov(qword_ptr(INDEX), PIECES as i32 - PIECE as i32)?;
        a.mov(qword_ptr(INDEX + 8), rounds as i32)?;
        a.mov(eax, HANDLER as i32)?;
        a.jmp(rax)
    })
    .with(HANDLER, handler)
    .with(IDT, idt)
    .with(IDT_POINTER, [&0xfffu16.to_le_bytes()[..], &IDT.to_le_bytes()].concat())
    .with(PIECES, joined(64, pieces))
}

/// Tries them in 32-bit protected mode without paging.
pub fn protected(pieces: &[Vec<u8>]) -> Guest {
    let gate = HANDLER & 0xffff | u64::from(CODE_SELECTOR) << 16 | 0x8e << 40 | (HANDLER >> 16) << 48;
    let idt: Vec<u8> = (0..256).flat_map(|_| gate.to_le_bytes()).collect();
    let end = PIECES + ((pieces.len() + 1) * PIECE) as u64;
    let handler = assemble(32, HANDLER, |a| {
        let mut done = a.create_label();
        a.cli()?;
        a.cld()?;
        a.mov(eax, i32::from(CODE_SELECTOR) + 8)?;
        for register in [ss, ds, es, fs, gs] {
            a.mov(register, ax)?;
        }
        a.mov(esp, STACK as i32)?;
        a.add(dword_ptr(INDEX), PIECE as i32)?;
        a.mov(eax, dword_ptr(INDEX))?;
        a.cmp(eax, end as i32)?;
        a.jae(done)?;
        a.push(FLAGS)?;
        a.push(i32::from(CODE_SELECTOR))?;
        a.push(eax)?;
        for (index, register) in [eax, edx, ebx, ebp, esi, edi].into_iter().enumerate() {
            a.mov(register, SCRATCH as i32 + 0x100 * index as i32)?;
        }
        a.mov(ecx, COUNT as i32)?;
        a.iretd()?;
        a.set_label(&mut done)?;
        a.mov(eax, DONE)?;
        a.out(0xf4, eax)?;
        a.hlt()
    });
    Guest::protected(|a| {
        a.lidt(fword_ptr(IDT_POINTER))?;
        a.mov(dword_ptr(4), STACK as i32)?;
        a.mov(dword_ptr(8), i32::from(CODE_SELECTOR) + 8)?;
        route_timer(a)?;
        a.mov(dword_ptr(INDEX), PIECES as i32 - PIECE as i32)?;
        a.mov(eax, HANDLER as i32)?;
        a.jmp(eax)
    })
    .with(HANDLER, handler)
    .with(IDT, idt)
    .with(IDT_POINTER, [&0x7ffu16.to_le_bytes()[..], &IDT.to_le_bytes()].concat())
    .with(PIECES, joined(32, pieces))
}

/// Tries them in real mode; at most [`REAL_MOST`].
pub fn real(pieces: &[Vec<u8>]) -> Guest {
    assert!(pieces.len() <= REAL_MOST, "{} pieces", pieces.len());
    let end = REAL_PIECES + ((pieces.len() + 1) * PIECE) as u64;
    // A 16-bit code segment at REAL_BASE and a 16-bit data segment at 0: the way out of protected mode.
    let gdt = [0u64, 0x0000_9b04_0000_ffff, 0x0000_9300_0000_ffff];
    let handler = assemble(16, REAL_HANDLER, |a| {
        let mut done = a.create_label();
        a.cli()?;
        a.cld()?;
        a.mov(ax, 0x5000)?;
        a.mov(ss, ax)?;
        a.mov(sp, 0xfff0)?;
        a.mov(ax, 0x6000)?;
        a.mov(ds, ax)?;
        a.mov(es, ax)?;
        a.add(word_ptr(REAL_INDEX).cs(), PIECE as i32)?;
        a.mov(ax, word_ptr(REAL_INDEX).cs())?;
        a.cmp(ax, end as i32)?;
        a.jae(done)?;
        a.push(FLAGS)?;
        a.push(REAL_SEGMENT as i32)?;
        a.push(ax)?;
        for (index, register) in [eax, ecx, edx, ebx, ebp, esi, edi].into_iter().enumerate() {
            a.mov(register, 0x1000 + 0x100 * index as i32)?;
        }
        a.iret()?;
        a.set_label(&mut done)?;
        a.mov(eax, DONE)?;
        a.out(0xf4, eax)?;
        a.hlt()
    });
    let switch = assemble(16, 0, |a| {
        a.mov(eax, cr0)?;
        a.and(al, 0xfe)?;
        a.mov(cr0, eax)?;
        a.push(REAL_SEGMENT as i32)?;
        a.push(REAL_HANDLER as i32)?;
        a.retf()
    });
    Guest::protected(|a| {
        route_timer(a)?;
        a.xor(edi, edi)?;
        a.mov(ecx, 256)?;
        a.mov(eax, (REAL_SEGMENT << 16 | REAL_HANDLER as u32) as i32)?;
        a.rep().stosd()?;
        a.mov(word_ptr(REAL_BASE + REAL_INDEX), REAL_PIECES as i32 - PIECE as i32)?;
        a.lidt(fword_ptr(IDT_POINTER))?;
        a.lgdt(fword_ptr(IDT_POINTER + 0x10))?;
        a.push(8)?;
        a.push(0)?;
        // The stack stays flat until the code is 16-bit.
        a.mov(eax, 0x10)?;
        a.mov(ds, ax)?;
        a.retf()
    })
    .with(IDT_POINTER, [&0x3ffu16.to_le_bytes()[..], &[0; 4]].concat())
    .with(IDT_POINTER + 0x10, [&0x17u16.to_le_bytes()[..], &(IDT as u32).to_le_bytes()].concat())
    .with(IDT, gdt.iter().flat_map(|entry| entry.to_le_bytes()).collect::<Vec<_>>())
    .with(REAL_BASE, switch)
    .with(REAL_BASE + REAL_HANDLER, handler)
    .with(REAL_BASE + REAL_PIECES, joined(16, pieces))
}

/// Leads the timer through the I/O APIC's input 2 to the processor, as an NMI.
fn route_timer(a: &mut CodeAssembler) -> Written {
    const IO_APIC: u64 = 0xfec0_0000;
    // Its output rises now, before anybody looks.
    a.mov(al, 0x34)?;
    a.out(0x43, al)?;
    a.mov(ebx, IO_APIC as u32)?;
    for (register, value) in [(0x15, 0), (0x14, 0x400)] {
        a.mov(dword_ptr(ebx), register)?;
        a.mov(dword_ptr(ebx + 0x10), value)?;
    }
    Ok(())
}

/// The first piece: the timer, 4,000 times a second, now that there is somebody to take its NMI.
fn start_timer(bits: u32) -> Vec<u8> {
    assemble(bits, 0, |a| {
        a.mov(al, 0x2a)?;
        a.out(0x40, al)?;
        a.mov(al, 0x01)?;
        a.out(0x40, al)
    })
}

/// One after another, each of them [`PIECE`] bytes.
fn joined(bits: u32, pieces: &[Vec<u8>]) -> Vec<u8> {
    let padded = |piece: &Vec<u8>| {
        assert!(piece.len() <= PIECE - 2, "{} bytes", piece.len());
        let mut padded = piece.clone();
        padded.resize(PIECE - 2, 0x90);
        padded.extend([0x0f, 0x0b]);
        padded
    };
    [start_timer(bits)].iter().chain(pieces).flat_map(padded).collect()
}
