//! Rules of translation that are about more than one entry's rights: what is loaded and invalidated when, where pages of
//! each size lie, and who an access is for.

use x86::{Cr0, Cr4, Efer, Exception, Flags, Vector};

use crate::cpu::Cpu;
use crate::insn::Stop;
use crate::mmu::{Access, Target, View};
use crate::testing::*;

const MOV_CR0_RAX: [u8; 3] = [0x0f, 0x22, 0xc0];
const MOV_CR3_RAX: [u8; 3] = [0x0f, 0x22, 0xd8];
const MOV_CR4_RAX: [u8; 3] = [0x0f, 0x22, 0xe0];
const INVLPG_RAX: [u8; 3] = [0x0f, 0x01, 0x38];
const INVPCID_RCX_RAX: [u8; 5] = [0x66, 0x0f, 0x38, 0x82, 0x08];

/// A page of the supervisor and one of programs, both of 4 KiB, with the tables of [`long`].
const SUPERVISOR: u64 = 0x4000_0000;
const USER: u64 = 0x4000_1000;
/// The table that maps both, and the entries' addresses.
const LEAVES: u64 = TABLES + 0x4000;
const SUPERVISOR_ENTRY: u64 = LEAVES;
const USER_ENTRY: u64 = LEAVES + 8;

fn with_rax(cpu: &mut Cpu, value: u64, bytes: &[u8]) -> Result<(), Exception> {
    cpu.registers.set(0, value);
    run(cpu, bytes)
}

/// 64-bit mode with the two pages.
fn with_pages() -> Cpu {
    let cpu = long();
    put(&cpu, TABLES + 0x1008, TABLES + 0x3007);
    put(&cpu, TABLES + 0x3000, LEAVES | 7);
    put(&cpu, SUPERVISOR_ENTRY, 0x5003u64);
    put(&cpu, USER_ENTRY, 0x6007u64);
    cpu
}

/// Vector and error code of what an access raises.
fn fault<T>(cpu: &mut Cpu, result: Result<T, Stop>) -> Option<(Vector, u32)> {
    assert!(matches!(result, Ok(_) | Err(Stop::Fault)));
    cpu.fault.take().filter(|_| result.is_err()).map(|fault| (fault.vector, fault.error_code.unwrap()))
}

/// Writes a byte below the end of pages and reads it through `linear`: where that leads.
fn leads_to(cpu: &mut Cpu, linear: u64) -> u64 {
    match cpu.target(cpu.mmu.view, linear, Access::Read) {
        Ok(Target::Ram(at) | Target::ReadOnly(at) | Target::Device(at)) => at,
        Err(_) => panic!("{:?}", cpu.fault),
    }
}

#[test]
fn a_4_mib_page_may_lie_above_4_gib() {
    let mut cpu = protected();
    cpu.cr4 = Cr4::PSE;
    cpu.cr3 = TABLES;
    put(&cpu, TABLES + 4, 0xc000_0083u32 | 0x2b << 13);
    cpu.cr0.insert(Cr0::PG);
    cpu.update_paging();
    assert_eq!(leads_to(&mut cpu, 0x0051_2345), 0x2b_c011_2345);
    cpu.cr4 = Cr4::empty();
    put(&cpu, TABLES + 4, 0x0001_4083u32);
    put(&cpu, TABLES + 0x4000 + 4 * 0x112, 0x5003u32);
    cpu.update_paging();
    assert_eq!(leads_to(&mut cpu, 0x0051_2345), 0x5345, "without PSE it is a table");
}

#[test]
fn pages_of_each_size_cover_their_addresses() {
    let mut cpu = long();
    let far = 0x3fff_f123u64;
    put(&cpu, TABLES + 0x1008, 0x0000_0080_c000_0083u64);
    assert_eq!(leads_to(&mut cpu, 0x4000_0000 | far), 0x80_c000_0000 | far);
    put(&cpu, TABLES + 0x2010, 0x0000_0090_0060_0083u64);
    assert_eq!(leads_to(&mut cpu, 0x0040_0000 | 0x1f_f123), 0x90_007f_f123);
    // Bit 12 of a large page's entry is PAT.
    put(&cpu, TABLES + 0x2018, 0x0000_0090_0060_1083u64);
    assert_eq!(leads_to(&mut cpu, 0x0060_0000), 0x90_0060_0000);
}

/// Protected mode with PAE paging, all of it in 2-MiB pages, and its pointers.
fn with_pae() -> Cpu {
    let mut cpu = protected();
    for n in 0..4 {
        put(&cpu, TABLES + 8 * n, TABLES + 0x1001);
    }
    put(&cpu, TABLES + 0x1000, 0x83u64);
    put(&cpu, TABLES + 0x2000, 0x20_0083u64);
    cpu.cr4 = Cr4::PAE;
    cpu.cr3 = TABLES;
    with_rax(&mut cpu, (Cr0::PG | Cr0::PE | Cr0::ET | Cr0::CD).bits(), &MOV_CR0_RAX).unwrap();
    assert_eq!(leads_to(&mut cpu, 0x5000), 0x5000);
    cpu
}

#[test]
fn directory_pointers_are_loaded_by_the_changes_that_the_manual_names() {
    let cases: [(&[u8], u64, bool); 9] = [
        (&MOV_CR3_RAX, TABLES, true),
        (&MOV_CR0_RAX, (Cr0::PG | Cr0::PE | Cr0::ET).bits(), true),
        (&MOV_CR0_RAX, (Cr0::PG | Cr0::PE | Cr0::ET | Cr0::CD | Cr0::NW).bits(), true),
        (&MOV_CR0_RAX, (Cr0::PG | Cr0::PE | Cr0::ET | Cr0::CD | Cr0::WP).bits(), false),
        (&MOV_CR4_RAX, (Cr4::PAE | Cr4::PGE).bits(), true),
        (&MOV_CR4_RAX, (Cr4::PAE | Cr4::PSE).bits(), true),
        (&MOV_CR4_RAX, (Cr4::PAE | Cr4::SMEP).bits(), true),
        (&MOV_CR4_RAX, (Cr4::PAE | Cr4::SMAP).bits(), false),
        (&MOV_CR4_RAX, (Cr4::PAE | Cr4::OSFXSR).bits(), false),
    ];
    for (bytes, value, loads) in cases {
        let mut cpu = with_pae();
        put(&cpu, TABLES, TABLES + 0x2001);
        with_rax(&mut cpu, value, bytes).unwrap();
        cpu.mmu.tlb.flush_all();
        assert_eq!(
            leads_to(&mut cpu, 0x5000),
            if loads { 0x20_5000 } else { 0x5000 },
            "{bytes:x?} {value:#x}"
        );
        // A pointer with reserved bits: whoever loads it faults and changes nothing, any other does not look.
        for bit in [1u64 << 1, 1 << 2, 1 << 5, 1 << 8, 1 << 46, 1 << 52, 1 << 63] {
            let mut cpu = with_pae();
            let before = (cpu.cr0, cpu.cr3, cpu.cr4);
            put(&cpu, TABLES + 24, TABLES + 0x2001 | bit);
            let result = with_rax(&mut cpu, value, bytes);
            assert_eq!(
                result,
                if loads { Err(Exception::gp(0)) } else { Ok(()) },
                "{bytes:x?} {value:#x} {bit:#x}"
            );
            assert!(!loads || before == (cpu.cr0, cpu.cr3, cpu.cr4));
            assert_eq!(leads_to(&mut cpu, 0xc000_5000), 0x5000);
        }
    }
}

#[test]
fn a_directory_pointer_that_is_not_present_may_hold_anything() {
    let mut cpu = with_pae();
    put(&cpu, TABLES + 8, !1u64);
    with_rax(&mut cpu, TABLES, &MOV_CR3_RAX).unwrap();
    let read = cpu.load_linear::<u8>(0x4000_0000);
    assert_eq!(fault(&mut cpu, read), Some((Vector::PageFault, 0)));
}

/// Whether `change` makes the processor forget where the page of programs was, with the entry's bits.
fn forgets(flags: u64, change: impl Fn(&mut Cpu)) -> bool {
    let mut cpu = with_pages();
    cpu.cr4.insert(Cr4::PGE | Cr4::PCIDE);
    cpu.cr3 = TABLES | 1;
    cpu.update_paging();
    put(&cpu, USER_ENTRY, 0x6007 | flags);
    assert_eq!(leads_to(&mut cpu, USER), 0x6000);
    put(&cpu, USER_ENTRY, 0x7007 | flags);
    change(&mut cpu);
    leads_to(&mut cpu, USER) == 0x7000
}

/// INVPCID with a descriptor.
fn invpcid(cpu: &mut Cpu, kind: u64, pcid: u64, address: u64) -> Result<(), Exception> {
    put(cpu, 0x8000, pcid);
    put(cpu, 0x8008, address);
    cpu.registers.set(1, kind);
    with_rax(cpu, 0x8000, &INVPCID_RCX_RAX)
}

#[test]
fn what_must_be_invalidated_is() {
    let global = 1 << 8;
    let to = |cpu: &mut Cpu, cr3: u64| with_rax(cpu, TABLES | cr3, &MOV_CR3_RAX).unwrap();
    let away_and_back = |change: fn(&mut Cpu)| {
        move |cpu: &mut Cpu| {
            let to = |cpu: &mut Cpu, pcid: u64| with_rax(cpu, TABLES | pcid | 1 << 63, &MOV_CR3_RAX).unwrap();
            to(cpu, 2);
            change(cpu);
            to(cpu, 1);
        }
    };
    assert!(forgets(0, |cpu| to(cpu, 1)), "MOV CR3");
    assert!(
        !forgets(0, |cpu| to(cpu, 1 << 63 | 1)),
        "MOV CR3 that keeps; processors may forget, this one does not"
    );
    assert!(forgets(0, |cpu| to(cpu, 1 << 63 | 2)), "another space has its own");
    assert!(!forgets(0, away_and_back(|_| {})), "and the first keeps its own");
    for flags in [0, global] {
        let invlpg = |cpu: &mut Cpu| with_rax(cpu, USER | 0xabc, &INVLPG_RAX).unwrap();
        assert!(forgets(flags, invlpg), "INVLPG");
        assert!(forgets(flags, |cpu| invpcid(cpu, 2, 0, 0).unwrap()), "INVPCID of everything");
        let toggle =
            |bit: Cr4| move |cpu: &mut Cpu| with_rax(cpu, (cpu.cr4 ^ bit).bits(), &MOV_CR4_RAX).unwrap();
        assert!(forgets(flags, toggle(Cr4::PGE)), "CR4.PGE");
        assert!(forgets(flags, toggle(Cr4::SMEP)), "CR4.SMEP");
        let without_pcids = |cpu: &mut Cpu| {
            with_rax(cpu, (cpu.cr4 - Cr4::PCIDE).bits(), &MOV_CR4_RAX).unwrap();
        };
        assert!(forgets(flags, without_pcids), "CR4.PCIDE");
    }
    assert!(
        forgets(global, away_and_back(|cpu| with_rax(cpu, USER, &INVLPG_RAX).unwrap())),
        "global, elsewhere"
    );
    assert!(forgets(0, |cpu| invpcid(cpu, 0, 1, USER).unwrap()), "INVPCID of the address");
    assert!(forgets(0, |cpu| invpcid(cpu, 1, 1, 0).unwrap()), "INVPCID of the space");
    assert!(forgets(0, |cpu| invpcid(cpu, 3, 0, 0).unwrap()), "INVPCID of all spaces");
    assert!(forgets(0, away_and_back(|cpu| invpcid(cpu, 0, 1, USER).unwrap())), "of the address, elsewhere");
    assert!(forgets(0, away_and_back(|cpu| invpcid(cpu, 1, 1, 0).unwrap())), "of the space, elsewhere");
    assert!(!forgets(0, |cpu| invpcid(cpu, 1, 2, 0).unwrap()), "of another space");
}

#[test]
fn invpcid_refuses_what_names_no_space_and_no_address() {
    let mut cpu = with_pages();
    let gp = Err(Exception::gp(0));
    for pcids in [false, true] {
        cpu.cr4.set(Cr4::PCIDE, pcids);
        cpu.update_paging();
        for kind in 0..4 {
            assert_eq!(invpcid(&mut cpu, kind, 0, 0), Ok(()), "{kind}");
            assert_eq!(invpcid(&mut cpu, kind, 0x1000, 0), gp, "{kind}: a reserved bit");
            assert_eq!(invpcid(&mut cpu, kind, 1 << 63, 0), gp, "{kind}: a reserved bit");
            let named = if kind < 2 && !pcids { gp } else { Ok(()) };
            assert_eq!(invpcid(&mut cpu, kind, 5, 0), named, "{kind}: a space");
            // The processor's widest addresses count, whichever are in use.
            assert_eq!(invpcid(&mut cpu, kind, 0, 1 << 48), Ok(()));
            assert_eq!(invpcid(&mut cpu, kind, 0, 1 << 56), if kind == 0 { gp } else { Ok(()) }, "{kind}");
        }
        for kind in [4, 5, 1 << 32, u64::MAX] {
            assert_eq!(invpcid(&mut cpu, kind, 0, 0), gp);
        }
    }
    cpu.registers.set(0, 1 << 62);
    assert!(run(&mut cpu, &INVPCID_RCX_RAX).is_err(), "the descriptor is not canonical");
    let locked: Vec<u8> = [0xf0].into_iter().chain(INVPCID_RCX_RAX).collect();
    assert_eq!(run(&mut cpu, &locked), Err(Exception::ud()));
}

#[test]
fn paging_stays_on_while_there_are_process_contexts() {
    let mut cpu = long();
    cpu.cr4.insert(Cr4::PCIDE);
    // From compatibility mode, so that nothing else stands against it.
    to_compatibility(&mut cpu);
    let unpaged = (cpu.cr0 - Cr0::PG).bits();
    assert_eq!(with_rax(&mut cpu, unpaged, &MOV_CR0_RAX), Err(Exception::gp(0)));
    cpu.cr4.remove(Cr4::PCIDE);
    assert_eq!(with_rax(&mut cpu, unpaged, &MOV_CR0_RAX), Ok(()));
}

/// To 32-bit code of the kernel.
fn to_compatibility(cpu: &mut Cpu) {
    let selector = x86::Selector(KERNEL_CODE32);
    let segment = descriptor(cpu, KERNEL_CODE32).segment(selector);
    cpu.set_segment(x86::SegmentRegister::Cs, segment);
    assert!(cpu.is_long() && !cpu.mode.is_64());
}

#[test]
fn the_processor_reads_its_tables_as_the_supervisor_whatever_ac_says() {
    let mov_ds_eax = [0x8e, 0xd8];
    let mut cpu = with_pages();
    cpu.cr4.insert(Cr4::SMAP);
    cpu.system_flags.insert(Flags::AC);
    cpu.update_paging();
    // The descriptor table lies in a page of programs: AC opens it for loads, not for the loading of descriptors.
    assert!(cpu.load_linear::<u64>(GDT).is_ok());
    let fault = with_rax(&mut cpu, u64::from(KERNEL_DATA), &mov_ds_eax).unwrap_err();
    assert_eq!((fault.vector, fault.error_code), (Vector::PageFault, Some(1)));
    assert_eq!(fault.address, GDT + u64::from(KERNEL_DATA));
    // In a page of the supervisor it can be read, by a program's LAR too.
    put(&cpu, SUPERVISOR_ENTRY, 0x1003u64);
    cpu.gdtr.base = SUPERVISOR;
    with_rax(&mut cpu, u64::from(KERNEL_DATA), &mov_ds_eax).unwrap();
    to_user(&mut cpu);
    cpu.cr4.remove(Cr4::SMAP);
    cpu.update_paging();
    cpu.gdtr.base = SUPERVISOR;
    with_rax(&mut cpu, u64::from(USER_DATA), &[0x0f, 0x02, 0xc8]).unwrap();
    assert!(cpu.flags.zf());
    put(&cpu, SUPERVISOR_ENTRY, 0u64);
    run(&mut long(), &[0x90]).unwrap();
    cpu.mmu.tlb.flush_all();
    let fault = with_rax(&mut cpu, u64::from(USER_DATA), &[0x0f, 0x02, 0xc8]).unwrap_err();
    assert_eq!(
        (fault.vector, fault.error_code),
        (Vector::PageFault, Some(0)),
        "not an access of the program"
    );
}

#[test]
fn a_programs_ac_does_not_let_interrupts_push_to_its_pages() {
    let mut cpu = with_pages();
    for vector in [8, 0x40] {
        set_gate(&cpu, vector, 3, 0);
    }
    // The tables of the processor lie in pages of the supervisor, the stack that the TSS names does not.
    put(&cpu, TABLES + 0x2000, 0x83u64);
    put(&cpu, TABLES + 0x2008, 0x20_0087u64);
    put(&cpu, TSS + 4, KERNEL_STACK + 0x1000);
    cpu.cr4.insert(Cr4::SMAP);
    to_user(&mut cpu);
    cpu.system_flags.insert(Flags::AC);
    cpu.update_paging();
    let pushed = cpu.deliver(crate::instructions::event::Event::Interrupt(0x40));
    assert!(pushed.is_err(), "neither it nor the page fault has a stack");
    cpu.cr4.remove(Cr4::SMAP);
    cpu.update_paging();
    cpu.deliver(crate::instructions::event::Event::Interrupt(0x40)).unwrap();
    assert_eq!(cpu.cpl(), 0);
}

#[test]
fn a_store_across_pages_changes_nothing_unless_both_allow_it() {
    let mut cpu = with_pages();
    put(&cpu, 0x6ffc, 0x1122_3344u32);
    put(&cpu, LEAVES + 16, 0x7001u64);
    let linear = USER + 0xffc;
    cpu.load_linear::<u64>(linear).unwrap();
    let stored = cpu.store_linear(linear, u64::MAX);
    assert_eq!(cpu.fault.map(|fault| fault.address), Some(USER + 0x1000));
    assert_eq!(fault(&mut cpu, stored), Some((Vector::PageFault, 3)));
    assert_eq!(get::<u32>(&cpu, 0x6ffc), 0x1122_3344);
    assert_eq!(get::<u64>(&cpu, USER_ENTRY) & 0x60, 0x60, "the first page's entry was used for a store");
    assert_eq!(get::<u64>(&cpu, LEAVES + 16) & 0x60, 0x20);
}

#[test]
fn the_dirty_flag_is_set_by_the_first_store_though_loads_went_before() {
    let mut cpu = with_pages();
    cpu.load_linear::<u64>(USER).unwrap();
    assert_eq!(get::<u64>(&cpu, USER_ENTRY), 0x6027);
    cpu.store_linear(USER, 1u8).unwrap();
    assert_eq!(get::<u64>(&cpu, USER_ENTRY), 0x6067);
    // A locked operation that does not change its operand stores all the same.
    put(&cpu, USER_ENTRY, 0x6007u64);
    with_rax(&mut cpu, USER, &INVLPG_RAX).unwrap();
    cpu.registers.set(1, 5);
    with_rax(&mut cpu, USER, &[0xf0, 0x0f, 0xb0, 0x08]).unwrap();
    assert_eq!(get::<u64>(&cpu, USER_ENTRY), 0x6067, "LOCK CMPXCHG");
}

#[test]
fn branches_to_where_no_code_may_be_fault_where_they_stand() {
    let branches: [&[u8]; 7] = [
        &[0xeb, 0x7f],                         // jmp +127
        &[0xe9, 0x00, 0x10, 0x00, 0x00],       // jmp +4096
        &[0x74, 0x7f],                         // je +127
        &[0x0f, 0x84, 0x00, 0x10, 0x00, 0x00], // je +4096
        &[0xe2, 0x7f],                         // loop +127
        &[0xe3, 0x7f],                         // jrcxz +127
        &[0xe8, 0x00, 0x10, 0x00, 0x00],       // call +4096
    ];
    for levels in [4, 5] {
        for bytes in branches {
            let mut cpu = long();
            if levels == 5 {
                put(&cpu, 0x7000, TABLES + 7);
                cpu.cr4.insert(Cr4::LA57);
                cpu.cr3 = 0x7000;
                cpu.update_paging();
            }
            cpu.flags.set_zf(true);
            let count = if bytes[0] == 0xe3 { 0 } else { 5 };
            cpu.registers.set(1, count);
            cpu.rip = 0x7fff_ffff_ffc0;
            let (rip, rsp) = (cpu.rip, cpu.registers.get(4));
            let result = run(&mut cpu, bytes);
            if levels == 5 {
                assert_eq!((result, cpu.rip >> 47), (Ok(()), 1), "{bytes:x?}");
            } else {
                assert_eq!((result, cpu.rip), (Err(Exception::gp(0)), rip), "{bytes:x?}");
                assert_eq!((cpu.registers.get(1), cpu.registers.get(4)), (count, rsp), "{bytes:x?}");
            }
        }
    }
}

#[test]
fn only_some_instructions_can_be_locked_and_only_with_memory() {
    let refused: [&[u8]; 12] = [
        &[0x89, 0x00],             // mov %eax, (%rax)
        &[0x01, 0xc0],             // add %eax, %eax
        &[0x39, 0x00],             // cmp %eax, (%rax)
        &[0x85, 0x00],             // test %eax, (%rax)
        &[0x03, 0x00],             // add (%rax), %eax
        &[0x0f, 0xa3, 0x00],       // bt %eax, (%rax)
        &[0xd1, 0x20],             // shll (%rax)
        &[0x0f, 0xb1, 0xc0],       // cmpxchg %eax, %eax
        &[0x90],                   // nop
        &[0x0f, 0x01, 0x38],       // invlpg (%rax)
        &[0x0f, 0x20, 0xd8],       // mov %cr3, %rax
        &[0x66, 0x0f, 0x6f, 0x00], // movdqa (%rax), %xmm0
    ];
    for bytes in refused {
        let mut cpu = long();
        let locked: Vec<u8> = [0xf0].into_iter().chain(bytes.iter().copied()).collect();
        assert_eq!(with_rax(&mut cpu, 0x5000, &locked), Err(Exception::ud()), "{bytes:x?}");
    }
    let accepted: [&[u8]; 6] = [
        &[0x01, 0x00],       // add %eax, (%rax)
        &[0xf7, 0x10],       // notl (%rax)
        &[0x0f, 0xab, 0x00], // bts %eax, (%rax)
        &[0x87, 0x00],       // xchg %eax, (%rax)
        &[0x0f, 0xc1, 0x00], // xadd %eax, (%rax)
        &[0x0f, 0xc7, 0x08], // cmpxchg8b (%rax)
    ];
    for bytes in accepted {
        let mut cpu = long();
        let locked: Vec<u8> = [0xf0].into_iter().chain(bytes.iter().copied()).collect();
        assert_eq!(with_rax(&mut cpu, 0x5000, &locked), Ok(()), "{bytes:x?}");
    }
}

#[test]
fn programs_with_alignment_checks_are_stopped_where_an_operand_is_not_aligned() {
    let cases: [(&[u8], u64, bool); 12] = [
        (&[0x66, 0x8b, 0x00], 1, true),       // mov (%rax), %ax
        (&[0x8b, 0x00], 2, true),             // mov (%rax), %eax
        (&[0x48, 0x8b, 0x00], 4, true),       // mov (%rax), %rax
        (&[0x48, 0x8b, 0x00], 8, false),      //
        (&[0x8a, 0x00], 1, false),            // mov (%rax), %al
        (&[0x48, 0x89, 0x08], 4, true),       // mov %rcx, (%rax)
        (&[0xf0, 0x01, 0x08], 2, true),       // lock add %ecx, (%rax)
        (&[0xff, 0x30], 4, true),             // push (%rax)
        (&[0xdd, 0x00], 4, true),             // fldl (%rax)
        (&[0xdb, 0x28], 4, true),             // fldt (%rax)
        (&[0xf3, 0x0f, 0x10, 0x00], 2, true), // movss (%rax), %xmm0
        (&[0x0f, 0x10, 0x00], 8, false),      // movups (%rax), %xmm0
    ];
    let aligned_and_not = |program: bool, flags: Flags, mask: bool, bytes: &[u8], at: u64| {
        let mut cpu = long();
        cpu.cr0.set(Cr0::AM, mask);
        if program {
            to_user(&mut cpu);
        }
        cpu.system_flags.insert(flags);
        cpu.update_paging();
        with_rax(&mut cpu, 0x5000 + at, bytes)
    };
    for (bytes, at, checked) in cases {
        let expected = if checked { Err(Exception::with_code(Vector::AlignmentCheck, 0)) } else { Ok(()) };
        assert_eq!(aligned_and_not(true, Flags::AC, true, bytes, at), expected, "{bytes:x?}");
        assert_eq!(aligned_and_not(false, Flags::AC, true, bytes, at), Ok(()), "{bytes:x?}");
        assert_eq!(aligned_and_not(true, Flags::empty(), true, bytes, at), Ok(()), "{bytes:x?}");
        assert_eq!(aligned_and_not(true, Flags::AC, false, bytes, at), Ok(()), "{bytes:x?}");
    }
}

#[test]
fn a_misaligned_operand_is_found_before_its_page_is_looked_up() {
    let mut cpu = with_pages();
    cpu.cr0.insert(Cr0::AM);
    to_user(&mut cpu);
    cpu.system_flags.insert(Flags::AC);
    cpu.update_paging();
    assert_eq!(cpu.mmu.view, View::UserAligned);
    for (at, vector, code) in [(1, Vector::AlignmentCheck, 0), (0, Vector::PageFault, 5)] {
        let fault = with_rax(&mut cpu, SUPERVISOR + at, &[0x8b, 0x00]).unwrap_err();
        assert_eq!((fault.vector, fault.error_code), (vector, Some(code)), "{at}");
    }
}

#[test]
fn no_execute_is_a_reserved_bit_until_it_is_enabled() {
    let mut cpu = with_pages();
    put(&cpu, USER_ENTRY, 1 << 63 | 0x6007u64);
    let fetched = cpu.target(View::User, USER, Access::Fetch);
    assert_eq!(fault(&mut cpu, fetched), Some((Vector::PageFault, 0x15)));
    cpu.write_msr(x86::msr::IA32_EFER, (cpu.efer - Efer::NXE).bits()).unwrap();
    let read = cpu.load_linear::<u8>(USER);
    assert_eq!(fault(&mut cpu, read), Some((Vector::PageFault, 9)));
}

#[test]
fn an_alignment_check_whose_delivery_raises_another_ends() {
    let mut cpu = protected();
    let at = handler(17);
    let gate = at & 0xffff | u64::from(USER_CODE32) << 16 | 0xee << 40 | (at >> 16 & 0xffff) << 48;
    put(&cpu, IDT + 8 * 17, gate);
    to_user(&mut cpu);
    cpu.cr0.insert(Cr0::AM);
    cpu.system_flags.insert(Flags::AC);
    // The handler runs at the same privilege, on the same stack.
    cpu.registers.set(4, STACK + 1);
    cpu.update_paging();
    let event = crate::instructions::event::Event::Exception(Exception::with_code(Vector::AlignmentCheck, 0));
    let shutdown = cpu.deliver(event).unwrap_err();
    assert!(shutdown.reason.contains("#AC(0x1) while delivering #AC"), "{}", shutdown.reason);
    assert!(shutdown.reason.len() < 1000, "{}", shutdown.reason);
}
