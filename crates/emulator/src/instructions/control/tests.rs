use x86::{Cr0, Cr4, Efer, Exception, Flags, Vector};

use crate::cpu::Cpu;
use crate::testing::*;

const MOV_CR0_RAX: [u8; 3] = [0x0f, 0x22, 0xc0];
const MOV_CR3_RAX: [u8; 3] = [0x0f, 0x22, 0xd8];
const MOV_CR4_RAX: [u8; 3] = [0x0f, 0x22, 0xe0];

fn with_rax(cpu: &mut Cpu, value: u64, bytes: &[u8]) -> Result<(), Exception> {
    cpu.registers.set(0, value);
    run(cpu, bytes)
}

#[test]
fn cr0_refuses_what_no_processor_has() {
    let mut cpu = long();
    let before = cpu.cr0;
    let bad = [
        before.bits() | 1 << 32,
        (before - Cr0::PE).bits(),
        (before | Cr0::NW).bits(),
        (before - Cr0::PG).bits(),
    ];
    for value in bad {
        assert_eq!(with_rax(&mut cpu, value, &MOV_CR0_RAX), Err(Exception::gp(0)), "{value:#x}");
        assert_eq!(cpu.cr0, before);
    }
}

#[test]
fn paging_with_lme_set_starts_long_mode_and_without_it_ends_it() {
    let mut cpu = protected();
    let source = long();
    for page in 0..3 * 512 {
        put(&cpu, TABLES + 8 * page, get::<u64>(&source, TABLES + 8 * page));
    }
    cpu.cr3 = TABLES;
    cpu.efer = Efer::LME;
    let paged = (cpu.cr0 | Cr0::PG).bits();
    assert_eq!(with_rax(&mut cpu, paged, &MOV_CR0_RAX), Err(Exception::gp(0)), "without PAE");
    with_rax(&mut cpu, Cr4::PAE.bits(), &MOV_CR4_RAX).unwrap();
    with_rax(&mut cpu, paged, &MOV_CR0_RAX).unwrap();
    assert!(cpu.is_long() && !cpu.mode.is_64());
    assert_eq!(with_rax(&mut cpu, 0, &MOV_CR4_RAX), Err(Exception::gp(0)), "PAE holds long mode up");
    let unpaged = (cpu.cr0 - Cr0::PG).bits();
    with_rax(&mut cpu, unpaged, &MOV_CR0_RAX).unwrap();
    assert!(!cpu.is_long() && cpu.efer == Efer::LME);
}

#[test]
fn protected_mode_starts_and_ends_by_cr0() {
    let mut cpu = real();
    with_rax(&mut cpu, 0x11, &MOV_CR0_RAX).unwrap();
    assert!(cpu.mode.is_protected());
    with_rax(&mut cpu, 0x10, &[0x0f, 0x01, 0xf0]).unwrap();
    assert!(cpu.mode.is_protected(), "LMSW does not clear PE");
    with_rax(&mut cpu, 0x10, &MOV_CR0_RAX).unwrap();
    assert!(!cpu.mode.is_protected());
}

#[test]
fn cr3_refuses_addresses_beyond_the_physical_ones() {
    let mut cpu = long();
    let bits = cpu.wires.model.physical_bits();
    assert_eq!(with_rax(&mut cpu, TABLES | 1 << bits, &MOV_CR3_RAX), Err(Exception::gp(0)));
    assert_eq!(with_rax(&mut cpu, TABLES | 1 << 63, &MOV_CR3_RAX), Err(Exception::gp(0)));
    with_rax(&mut cpu, TABLES, &MOV_CR3_RAX).unwrap();
}

#[test]
fn process_contexts_want_long_mode_and_context_zero() {
    let mut cpu = long();
    let pcids = (cpu.cr4 | Cr4::PCIDE).bits();
    cpu.cr3 = TABLES | 5;
    assert_eq!(with_rax(&mut cpu, pcids, &MOV_CR4_RAX), Err(Exception::gp(0)));
    cpu.cr3 = TABLES;
    with_rax(&mut cpu, pcids, &MOV_CR4_RAX).unwrap();
    with_rax(&mut cpu, TABLES | 5 | 1 << 63, &MOV_CR3_RAX).unwrap();
    assert_eq!(cpu.cr3, TABLES | 5);
}

#[test]
fn cr4_has_no_bits_of_absent_features() {
    let mut cpu = long();
    for bit in [Cr4::VMXE, Cr4::SMXE, Cr4::CET] {
        let value = (cpu.cr4 | bit).bits();
        assert_eq!(with_rax(&mut cpu, value, &MOV_CR4_RAX), Err(Exception::gp(0)), "{bit:?}");
    }
    let value = cpu.cr4.bits() | 1 << 40;
    assert_eq!(with_rax(&mut cpu, value, &MOV_CR4_RAX), Err(Exception::gp(0)));
}

#[test]
fn cr8_is_the_task_priority() {
    let mut cpu = long();
    let mov_cr8_rax = [0x44, 0x0f, 0x22, 0xc0];
    with_rax(&mut cpu, 9, &mov_cr8_rax).unwrap();
    assert_eq!(cpu.wires.interrupts.task_priority(), 9);
    run(&mut cpu, &[0x44, 0x0f, 0x20, 0xc1]).unwrap();
    assert_eq!(cpu.registers.get(1), 9);
    assert_eq!(with_rax(&mut cpu, 16, &mov_cr8_rax), Err(Exception::gp(0)));
}

#[test]
fn control_registers_are_the_kernels() {
    let mut cpu = long();
    to_user(&mut cpu);
    for bytes in
        [&[0x0f, 0x20, 0xc0][..], &MOV_CR3_RAX, &[0x0f, 0x06], &[0xf4], &[0x0f, 0x30], &[0x0f, 0x21, 0xc0]]
    {
        assert_eq!(run(&mut cpu, bytes), Err(Exception::gp(0)), "{bytes:x?}");
    }
}

#[test]
fn debug_registers_keep_their_fixed_bits() {
    let mut cpu = long();
    with_rax(&mut cpu, 0, &[0x0f, 0x23, 0xf0]).unwrap();
    assert_eq!(cpu.debug[4], 0xffff_0ff0);
    with_rax(&mut cpu, 0xffff_dfff, &[0x0f, 0x23, 0xf8]).unwrap();
    assert_eq!(cpu.debug[5], 0xffff_07ff);
    assert_eq!(with_rax(&mut cpu, 1 << 32, &[0x0f, 0x23, 0xf8]), Err(Exception::gp(0)));
    run(&mut cpu, &[0x0f, 0x21, 0xe8]).unwrap();
    assert_eq!(cpu.registers.get(0), 0xffff_07ff, "DR5 is DR7");
    cpu.cr4.insert(Cr4::DE);
    assert_eq!(run(&mut cpu, &[0x0f, 0x21, 0xe8]), Err(Exception::ud()));
}

#[test]
fn general_detect_traps_debug_register_accesses() {
    let mut cpu = long();
    set_gate(&cpu, 1, 0, 0);
    cpu.debug[5] |= super::DR7_GENERAL_DETECT;
    let fault = run(&mut cpu, &[0x0f, 0x21, 0xc0]).unwrap_err();
    assert_eq!(fault.vector, Vector::Debug);
    cpu.deliver(crate::instructions::event::Event::Exception(fault)).unwrap();
    assert_eq!((cpu.debug[4], cpu.debug[5]), (0xffff_2ff0, 0x400));
}

#[test]
fn sti_shadows_one_instruction_where_it_opens_interrupts() {
    let mut cpu = long();
    run(&mut cpu, &[0xfb]).unwrap();
    assert!(cpu.shadow && cpu.system_flags.contains(Flags::IF));
    cpu.shadow = false;
    run(&mut cpu, &[0xfb]).unwrap();
    assert!(!cpu.shadow);
    run(&mut cpu, &[0xfa]).unwrap();
    assert!(!cpu.system_flags.contains(Flags::IF));
    to_user(&mut cpu);
    assert_eq!(run(&mut cpu, &[0xfb]), Err(Exception::gp(0)));
}

#[test]
fn popf_changes_what_the_privilege_allows() {
    let mut cpu = long();
    let everything = 0x0024_7fd5u64;
    cpu.push(everything).unwrap();
    run(&mut cpu, &[0x9d]).unwrap();
    assert_eq!(cpu.rflags(), everything | 2);
    to_user(&mut cpu);
    cpu.system_flags.remove(Flags::IOPL);
    cpu.push(2u64).unwrap();
    run(&mut cpu, &[0x9d]).unwrap();
    assert_eq!(cpu.rflags(), 0x202, "IF stays");
}

#[test]
fn access_control_changes_the_view_of_memory() {
    let mut cpu = long();
    cpu.cr4.insert(Cr4::SMAP);
    cpu.update_paging();
    let load = [0x8a, 0x04, 0x25, 0, 0x50, 0, 0];
    assert_eq!(run(&mut cpu, &load).unwrap_err().vector, Vector::PageFault);
    run(&mut cpu, &[0x0f, 0x01, 0xcb]).unwrap();
    run(&mut cpu, &load).unwrap();
    run(&mut cpu, &[0x0f, 0x01, 0xca]).unwrap();
    assert_eq!(run(&mut cpu, &load).unwrap_err().vector, Vector::PageFault);
    to_user(&mut cpu);
    assert_eq!(run(&mut cpu, &[0x0f, 0x01, 0xcb]), Err(Exception::ud()));
}

#[test]
fn a_shadow_stack_pointer_that_is_not_there_leaves_the_register_alone() {
    let mut cpu = long();
    cpu.registers.set(0, 77);
    run(&mut cpu, &[0xf3, 0x48, 0x0f, 0x1e, 0xc8]).unwrap();
    assert_eq!(cpu.registers.get(0), 77);
}

#[test]
fn hlt_waits_behind_itself() {
    let mut cpu = long();
    run(&mut cpu, &[0xf4]).unwrap();
    assert_eq!((cpu.halted, cpu.rip), (true, CODE + 1));
}

#[test]
fn an_unknown_hypercall_is_enosys() {
    let mut cpu = long();
    with_rax(&mut cpu, 77, &[0x0f, 0x01, 0xc1]).unwrap();
    assert_eq!(cpu.registers.get(0) as i64, -1000);
}

#[test]
fn programs_may_be_denied_the_counter() {
    let mut cpu = long();
    cpu.msrs.tsc_offset = 0x1_0000_0002;
    run(&mut cpu, &[0x0f, 0x31]).unwrap();
    assert_eq!((cpu.registers.get(0), cpu.registers.get(2)), (2, 1));
    cpu.cr4.insert(Cr4::TSD);
    to_user(&mut cpu);
    assert_eq!(run(&mut cpu, &[0x0f, 0x31]), Err(Exception::gp(0)));
}

#[test]
fn xcr0_takes_states_only_together_with_those_they_need() {
    let mut cpu = long();
    assert_eq!(run(&mut cpu, &[0x0f, 0x01, 0xd0]), Err(Exception::ud()), "XGETBV without OSXSAVE");
    cpu.cr4.insert(Cr4::OSXSAVE);
    cpu.registers.set(1, 0);
    cpu.registers.set(2, 0);
    for (value, good) in
        [(3, true), (1, true), (2, false), (0, false), (5, false), (0x23, false), (1 << 3, false)]
    {
        assert_eq!(with_rax(&mut cpu, value, &[0x0f, 0x01, 0xd1]).is_ok(), good, "{value:#x}");
    }
    run(&mut cpu, &[0x0f, 0x01, 0xd0]).unwrap();
    assert_eq!(cpu.registers.get(0), 1);
}

#[test]
fn invlpg_and_invpcid_accept_what_they_should() {
    let mut cpu = long();
    cpu.registers.set(0, 0x5000);
    run(&mut cpu, &[0x0f, 0x01, 0x38]).unwrap();
    let invpcid = [0x66, 0x0f, 0x38, 0x82, 0x08];
    put(&cpu, 0x5000, 0u64);
    for (kind, good) in [(0u64, true), (1, true), (2, true), (3, true), (4, false)] {
        cpu.registers.set(1, kind);
        assert_eq!(run(&mut cpu, &invpcid).is_ok(), good, "{kind}");
    }
    put(&cpu, 0x5000, 5u64);
    cpu.registers.set(1, 1);
    assert_eq!(run(&mut cpu, &invpcid), Err(Exception::gp(0)), "a PCID without CR4.PCIDE");
}

#[test]
fn pae_paging_keeps_its_topmost_entries_until_cr3_is_loaded() {
    let mut cpu = protected();
    // One to one with 2-MiB pages, and a second directory that maps the first 2 MiB to the next.
    for (directory, first) in [(0x1_1000u64, 0x83u64), (0x1_2000, 0x20_0083)] {
        put(&cpu, directory, first);
        put(&cpu, directory + 8, 0x20_0083u64);
    }
    put(&cpu, 0x1_0000, 0x1_1001u64);
    for n in 1..4 {
        put(&cpu, 0x1_0000 + 8 * n, 0u64);
    }
    with_rax(&mut cpu, Cr4::PAE.bits(), &MOV_CR4_RAX).unwrap();
    with_rax(&mut cpu, 0x1_0000, &MOV_CR3_RAX).unwrap();
    let paged = (cpu.cr0 | Cr0::PG).bits();
    with_rax(&mut cpu, paged, &MOV_CR0_RAX).unwrap();
    put(&cpu, 0x8_0000, 1u8);
    put(&cpu, 0x28_0000, 2u8);
    assert_eq!(cpu.load_linear::<u8>(0x8_0000), Ok(1));
    put(&cpu, 0x1_0000, 0x1_2001u64);
    cpu.mmu.tlb.flush_all();
    assert_eq!(cpu.load_linear::<u8>(0x8_0000), Ok(1), "memory is not looked at again");
    with_rax(&mut cpu, 0x1_0000, &MOV_CR3_RAX).unwrap();
    assert_eq!(cpu.load_linear::<u8>(0x8_0000), Ok(2));
    put(&cpu, 0x1_0000, 0x1_1003u64);
    assert_eq!(with_rax(&mut cpu, 0x1_0000, &MOV_CR3_RAX), Err(Exception::gp(0)), "a reserved bit");
    assert_eq!(cpu.load_linear::<u8>(0x8_0000), Ok(2));
}

/// The error code of the last fault.
fn cpu_fault(cpu: &mut Cpu) -> Option<u32> {
    cpu.fault.take().and_then(|fault| fault.error_code)
}

#[test]
fn supervisor_pages_obey_their_protection_key() {
    const PKRS: u32 = 0x6e1;
    let mut cpu = long();
    // The page from 2 MiB on is the supervisor's, with key 3.
    put(&cpu, TABLES + 0x2008, 0x20_0083u64 | 3 << 59);
    let address = 0x20_1000;
    let try_both = |cpu: &mut Cpu| {
        let read = cpu.load_linear::<u8>(address).is_err().then(|| cpu_fault(cpu)).flatten();
        let write = cpu.store_linear(address, 1u8).is_err().then(|| cpu_fault(cpu)).flatten();
        (read, write)
    };
    let with_keys = (cpu.cr4 | Cr4::PKS).bits();
    with_rax(&mut cpu, with_keys, &MOV_CR4_RAX).unwrap();
    assert_eq!(try_both(&mut cpu), (None, None));
    cpu.write_msr(PKRS, 2 << 6).unwrap();
    assert_eq!(try_both(&mut cpu), (None, Some(0x23)), "writes are disabled");
    cpu.write_msr(PKRS, 1 << 6).unwrap();
    assert_eq!(try_both(&mut cpu), (Some(0x21), Some(0x23)), "all accesses are");
    cpu.write_msr(PKRS, 3 << 8).unwrap();
    assert_eq!(try_both(&mut cpu), (None, None), "another key");
    assert!(cpu.write_msr(PKRS, 1 << 32).is_err());
}

const RDPKRU: [u8; 3] = [0x0f, 0x01, 0xee];
const WRPKRU: [u8; 3] = [0x0f, 0x01, 0xef];

#[test]
fn pkru_is_read_and_written_where_cr4_allows_it_and_the_other_registers_are_zero() {
    let mut cpu = long();
    for bytes in [RDPKRU, WRPKRU] {
        assert_eq!(run(&mut cpu, &bytes), Err(Exception::ud()), "without CR4.PKE");
    }
    let with_keys = (cpu.cr4 | Cr4::PKE).bits();
    with_rax(&mut cpu, with_keys, &MOV_CR4_RAX).unwrap();
    to_user(&mut cpu);
    let set =
        |cpu: &mut Cpu, rax, rcx, rdx| [(0, rax), (1, rcx), (2, rdx)].map(|(r, v)| cpu.registers.set(r, v));
    let high = 0xffff_ffff << 32;
    set(&mut cpu, high | 0x5555_5554, high, high);
    run(&mut cpu, &WRPKRU).unwrap();
    set(&mut cpu, u64::MAX, high, u64::MAX);
    run(&mut cpu, &RDPKRU).unwrap();
    assert_eq!((cpu.registers.get(0), cpu.registers.get(2)), (0x5555_5554, 0));
    for (rcx, rdx, bytes) in [(1, 0, RDPKRU), (1, 0, WRPKRU), (0, 1, WRPKRU)] {
        set(&mut cpu, 0, rcx, rdx);
        assert_eq!(run(&mut cpu, &bytes), Err(Exception::gp(0)), "{rcx} {rdx} {bytes:x?}");
    }
    assert_eq!(cpu.vector.pkru, 0x5555_5554);
}

#[test]
fn programs_pages_obey_their_protection_key_at_every_privilege() {
    let mut cpu = long();
    // The page from 2 MiB on has key 3; it may not be written, but for CR0.WP.
    put(&cpu, TABLES + 0x2008, 0x20_0085u64 | 3 << 59);
    cpu.cr4.insert(Cr4::PKE);
    cpu.update_paging();
    let address = 0x20_1000;
    let codes = |cpu: &mut Cpu| {
        let read = cpu.load_linear::<u8>(address).is_err().then(|| cpu_fault(cpu)).flatten();
        let write = cpu.store_linear(address, 1u8).is_err().then(|| cpu_fault(cpu)).flatten();
        (read, write)
    };
    let pkru = |cpu: &mut Cpu, value| {
        cpu.registers.set(1, 0);
        cpu.registers.set(2, 0);
        with_rax(cpu, value, &WRPKRU).unwrap();
    };
    pkru(&mut cpu, 3 << 6);
    assert_eq!(codes(&mut cpu), (Some(0x21), Some(0x23)));
    pkru(&mut cpu, 2 << 6);
    assert_eq!(codes(&mut cpu), (None, Some(0x23)));
    pkru(&mut cpu, !(3 << 6) & 0xffff_fffc);
    assert_eq!(codes(&mut cpu), (None, Some(3)), "other keys; the entry alone forbids it");
    let unprotected = (cpu.cr0 - Cr0::WP).bits();
    with_rax(&mut cpu, unprotected, &MOV_CR0_RAX).unwrap();
    pkru(&mut cpu, 2 << 6);
    assert_eq!(codes(&mut cpu), (None, None), "CR0.WP is clear");
    pkru(&mut cpu, 1 << 6);
    assert_eq!(codes(&mut cpu), (Some(0x21), Some(0x23)), "but all accesses are disabled");
    pkru(&mut cpu, 2 << 6);
    to_user(&mut cpu);
    assert_eq!(codes(&mut cpu), (None, Some(0x27)));
    assert!(cpu.target(cpu.mmu.view, address, crate::mmu::Access::Fetch).is_ok(), "fetches have no keys");
}

#[test]
fn tagged_pointers_reach_data_where_masking_is_on_and_nothing_else() {
    let mut cpu = long();
    put(&cpu, 0x5000, 0x77u8);
    let tagged = 0x2a << 57 | 0x5000u64;
    let with = |cpu: &mut Cpu, bits: u64| with_rax(cpu, TABLES | bits, &MOV_CR3_RAX);
    assert!(cpu.load_linear::<u8>(tagged).is_err());
    with(&mut cpu, 1 << 61).unwrap();
    assert_eq!(cpu.cr3, TABLES | 1 << 61);
    assert_eq!(cpu.load_linear::<u8>(tagged), Ok(0x77));
    assert!(cpu.load_linear::<u8>(1 << 48 | 0x5000).is_err(), "bit 48 is no tag");
    cpu.store_linear(tagged | 0xffe, 0x1122_3344u32).unwrap();
    assert_eq!(get::<u32>(&cpu, 0x5ffe), 0x1122_3344, "across the page");
    with(&mut cpu, 1 << 62).unwrap();
    assert_eq!(cpu.load_linear::<u8>(1 << 48 | 0x5000), Ok(0x77));
    // A page fault tells the address without the tag.
    assert!(cpu.load_linear::<u8>(tagged | 1 << 32).is_err());
    assert_eq!(cpu.fault.take().map(|f| (f.vector, f.address)), Some((Vector::PageFault, 0x5000 | 1 << 32)));
    // Jumps and fetches know no tags, and INVLPG of a tagged address does nothing.
    cpu.registers.set(0, 0x2a << 57 | CODE);
    assert_eq!(run(&mut cpu, &[0xff, 0xe0]), Err(Exception::gp(0)));
    cpu.registers.set(0, tagged);
    assert!(cpu.mmu.tlb.holds(cpu.mmu.view, 0x5000, crate::mmu::Access::Read));
    run(&mut cpu, &[0x0f, 0x01, 0x38]).unwrap();
    assert!(cpu.mmu.tlb.holds(cpu.mmu.view, 0x5000, crate::mmu::Access::Read));
    // Supervisor pointers are CR4's.
    let supervisor = 0xaa00_8000_0000_0000;
    assert!(cpu.load_linear::<u8>(supervisor).is_err());
    assert_eq!(cpu.fault.take().map(|f| f.vector), Some(Vector::GeneralProtection));
    let masked = (cpu.cr4 | Cr4::LAM_SUP).bits();
    with_rax(&mut cpu, masked, &MOV_CR4_RAX).unwrap();
    assert!(cpu.load_linear::<u8>(supervisor).is_err());
    assert_eq!(
        cpu.fault.take().map(|f| (f.vector, f.address)),
        Some((Vector::PageFault, 0xffff_8000_0000_0000))
    );
    cpu.wires = wires_for("host,-lam");
    assert_eq!(with(&mut cpu, 1 << 61), Err(Exception::gp(0)), "a reserved bit of CR3");
}

#[test]
fn five_level_paging_translates_57_bits_and_is_chosen_outside_long_mode() {
    let mut cpu = long();
    let toggled = (cpu.cr4 | Cr4::LA57).bits();
    assert_eq!(with_rax(&mut cpu, toggled, &MOV_CR4_RAX), Err(Exception::gp(0)));
    // A fifth level whose entry 1 leads to the same tables as entry 0.
    put(&cpu, 0x7000, TABLES + 7);
    put(&cpu, 0x7008, TABLES + 7);
    cpu.cr4.insert(Cr4::LA57);
    cpu.cr3 = 0x7000;
    cpu.update_paging();
    put(&cpu, 0x5000, 0x77u8);
    assert_eq!(cpu.load_linear::<u8>(1 << 48 | 0x5000), Ok(0x77));
    assert_eq!(get::<u64>(&cpu, 0x7008) & 0x20, 0x20, "accessed");
    assert!(cpu.load_linear::<u8>(1 << 57).is_err());
    assert_eq!(cpu.fault.take().map(|f| f.vector), Some(Vector::GeneralProtection));
    assert!(cpu.load_linear::<u8>(1 << 56 | !0 << 57).is_err());
    assert_eq!(cpu.fault.take().map(|f| f.vector), Some(Vector::PageFault), "canonical, but not mapped");
}
