//! A guest that tries many short pieces of code one after another: whatever fault or interrupt ends one, the next begins
//! with the same registers. When all were tried it writes [`DONE`] to the debug-exit port.
//!
//! A timer interrupts pieces that never end. Pieces may still end the run: they run with all privileges.

use iced_x86::code_asm::*;

use super::guest::{BASE, CODE_SELECTOR, Guest, Written, assemble};

/// The status of a run in which all pieces were tried.
pub const DONE: i32 = 0x42;
/// Bytes of a piece; its last two are UD2.
pub const PIECE: usize = 32;

const HANDLER: u64 = BASE + 0x1000;
const IDT: u64 = 0x21_0000;
const IDT_POINTER: u64 = 0x21_1000;
const INDEX: u64 = 0x21_2000;
/// What the registers of a piece point to.
const SCRATCH: u64 = 0x22_0000;
const STACK: u64 = 0x24_0000;
const PIECES: u64 = 0x28_0000;

/// In real mode all code is in one segment.
const REAL_SEGMENT: u32 = 0x4000;
const REAL_BASE: u64 = (REAL_SEGMENT as u64) << 4;
const REAL_HANDLER: u64 = 0x100;
const REAL_INDEX: u64 = 0xff0;
const REAL_PIECES: u64 = 0x1000;
/// The most pieces that real mode has room for.
pub const REAL_MOST: usize = (0xf000 - REAL_PIECES as usize) / PIECE;

/// Tries them in 64-bit mode.
pub fn long(pieces: &[Vec<u8>]) -> Guest {
    let gate = |vector: u64| {
        let low = HANDLER & 0xffff | u64::from(CODE_SELECTOR) << 16 | 1 << 32 | 0x8e << 40;
        let _ = vector;
        [low | (HANDLER >> 16 & 0xffff) << 48, HANDLER >> 32]
    };
    let idt: Vec<u8> = (0..256).flat_map(gate).flat_map(u64::to_le_bytes).collect();
    let end = PIECES + (pieces.len() * PIECE) as u64;
    let handler = assemble(64, HANDLER, |a| {
        let mut done = a.create_label();
        a.cli()?;
        a.cld()?;
        a.mov(rsp, STACK)?;
        a.mov(al, 0x20)?;
        a.out(0x20, al)?;
        a.add(qword_ptr(INDEX), PIECE as i32)?;
        a.mov(rax, qword_ptr(INDEX))?;
        a.cmp(rax, end as i32)?;
        a.jae(done)?;
        a.push(rax)?;
        let all = [rax, rcx, rdx, rbx, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15];
        for (index, register) in all.into_iter().enumerate() {
            a.mov(register, SCRATCH + 0x1000 + 0x100 * index as u64)?;
        }
        a.sti()?;
        a.ret()?;
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
        begin(a)?;
        a.mov(qword_ptr(INDEX), PIECES as i32 - PIECE as i32)?;
        a.mov(eax, HANDLER as i32)?;
        a.jmp(rax)
    })
    .with(HANDLER, handler)
    .with(IDT, idt)
    .with(IDT_POINTER, [&0xfffu16.to_le_bytes()[..], &IDT.to_le_bytes()].concat())
    .with(PIECES, joined(pieces))
}

/// Tries them in 32-bit protected mode without paging.
pub fn protected(pieces: &[Vec<u8>]) -> Guest {
    let gate = HANDLER & 0xffff | u64::from(CODE_SELECTOR) << 16 | 0x8e << 40 | (HANDLER >> 16) << 48;
    let idt: Vec<u8> = (0..256).flat_map(|_| gate.to_le_bytes()).collect();
    let end = PIECES + (pieces.len() * PIECE) as u64;
    let handler = assemble(32, HANDLER, |a| {
        let mut done = a.create_label();
        a.cli()?;
        a.cld()?;
        a.mov(eax, i32::from(CODE_SELECTOR) + 8)?;
        for register in [ss, ds, es, fs, gs] {
            a.mov(register, ax)?;
        }
        a.mov(esp, STACK as i32)?;
        a.mov(al, 0x20)?;
        a.out(0x20, al)?;
        a.add(dword_ptr(INDEX), PIECE as i32)?;
        a.mov(eax, dword_ptr(INDEX))?;
        a.cmp(eax, end as i32)?;
        a.jae(done)?;
        a.push(eax)?;
        for (index, register) in [eax, ecx, edx, ebx, ebp, esi, edi].into_iter().enumerate() {
            a.mov(register, SCRATCH as i32 + 0x1000 + 0x100 * index as i32)?;
        }
        a.sti()?;
        a.ret()?;
        a.set_label(&mut done)?;
        a.mov(eax, DONE)?;
        a.out(0xf4, eax)?;
        a.hlt()
    });
    Guest::protected(|a| {
        a.lidt(fword_ptr(IDT_POINTER))?;
        a.mov(dword_ptr(4), STACK as i32)?;
        a.mov(dword_ptr(8), i32::from(CODE_SELECTOR) + 8)?;
        begin(a)?;
        a.mov(dword_ptr(INDEX), PIECES as i32 - PIECE as i32)?;
        a.mov(eax, HANDLER as i32)?;
        a.jmp(eax)
    })
    .with(HANDLER, handler)
    .with(IDT, idt)
    .with(IDT_POINTER, [&0x7ffu16.to_le_bytes()[..], &IDT.to_le_bytes()].concat())
    .with(PIECES, joined(pieces))
}

/// Tries them in real mode; at most [`REAL_MOST`].
pub fn real(pieces: &[Vec<u8>]) -> Guest {
    assert!(pieces.len() <= REAL_MOST);
    let end = REAL_PIECES + (pieces.len() * PIECE) as u64;
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
        a.mov(al, 0x20)?;
        a.out(0x20, al)?;
        a.add(word_ptr(REAL_INDEX).cs(), PIECE as i32)?;
        a.mov(ax, word_ptr(REAL_INDEX).cs())?;
        a.cmp(ax, end as i32)?;
        a.jae(done)?;
        a.push(ax)?;
        for (index, register) in [eax, ecx, edx, ebx, ebp, esi, edi].into_iter().enumerate() {
            a.mov(register, 0x1000 + 0x100 * index as i32)?;
        }
        a.sti()?;
        a.ret()?;
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
        begin(a)?;
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
    .with(REAL_BASE + REAL_PIECES, joined(pieces))
}

/// Interrupt controller and timer: vector 0x20, 1,000 times a second.
fn begin(a: &mut CodeAssembler) -> Written {
    for (port, value) in [
        (0x20, 0x11),
        (0x21, 0x20),
        (0x21, 0x04),
        (0x21, 0x01),
        (0x21, 0xfe),
        (0xa0, 0x11),
        (0xa1, 0x28),
        (0xa1, 0x02),
        (0xa1, 0x01),
        (0xa1, 0xff),
        (0x43, 0x34),
        (0x40, 0xa9),
        (0x40, 0x04),
    ] {
        a.mov(al, value)?;
        a.out(port, al)?;
    }
    Ok(())
}

/// One after another, each of them [`PIECE`] bytes.
fn joined(pieces: &[Vec<u8>]) -> Vec<u8> {
    let padded = |piece: &Vec<u8>| {
        assert!(piece.len() <= PIECE - 2, "{} bytes", piece.len());
        let mut padded = piece.clone();
        padded.resize(PIECE - 2, 0x90);
        padded.extend([0x0f, 0x0b]);
        padded
    };
    pieces.iter().flat_map(padded).collect()
}
