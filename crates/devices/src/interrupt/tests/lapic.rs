//! Registers, priorities, modes and events of one local APIC.

use engine::CpuEvent;
use x86::msr::IA32_TSC_DEADLINE;

use super::*;

const LVTS: [u32; 7] = [
    offset::LVT_CMCI,
    offset::LVT_TIMER,
    offset::LVT_THERMAL,
    offset::LVT_PERFORMANCE,
    offset::LVT_LINT0,
    offset::LVT_LINT1,
    offset::LVT_ERROR,
];
const SELF: u32 = 1 << 18;
const NMI: u32 = 4 << 8;
const INIT: u32 = 5 << 8;
const SIPI: u32 = 6 << 8;
const ASSERT: u32 = 1 << 14;
const LEVEL: u32 = 1 << 15;

#[test]
fn the_registers_have_their_values_after_power_up() {
    let machine = Machine::new(2);
    let cpu = &machine.cpus[1];
    assert_eq!(machine.cpus[0].base(), DEFAULT_BASE | EN | BSP);
    assert_eq!(cpu.base(), DEFAULT_BASE | EN);
    assert_eq!(cpu.read(offset::ID), 1 << 24);
    assert_eq!(cpu.read(offset::VERSION), 0x0106_0014);
    assert_eq!(cpu.read(offset::SVR), 0xff);
    assert_eq!(cpu.read(offset::DFR), u32::MAX);
    for register in LVTS {
        assert_eq!(cpu.read(register), 0x1_0000, "{register:#x}");
    }
    for register in
        [offset::TPR, offset::LDR, offset::ICR_LOW, offset::ICR_HIGH, offset::ESR, offset::TIMER_DIVIDE]
    {
        assert_eq!(cpu.read(register), 0, "{register:#x}");
    }
}

#[test]
fn interrupts_come_in_the_order_of_their_vectors_and_nest_by_class() {
    let machine = Machine::enabled(1);
    let cpu = &machine.cpus[0];
    for vector in [0x31, 0x52, 0x58] {
        cpu.write(offset::ICR_LOW, SELF | vector);
    }
    assert_eq!(cpu.read(offset::IRR + 0x20), 1 << 0x12 | 1 << 0x18);
    assert_eq!(cpu.apic.acknowledge(), Some(0x58));
    assert_eq!((cpu.read(offset::IRR + 0x20), cpu.read(offset::ISR + 0x20)), (1 << 0x12, 1 << 0x18));
    assert_eq!(cpu.read(offset::PPR), 0x50);
    assert!(!cpu.apic.has_interrupt(), "0x52 is of the same class");
    cpu.write(offset::ICR_LOW, SELF | 0x61);
    assert_eq!(cpu.apic.acknowledge(), Some(0x61));
    cpu.eoi();
    cpu.eoi();
    assert_eq!(cpu.take_all(), [0x52, 0x31]);
}

#[test]
fn the_task_priority_holds_back_its_class_and_below() {
    let machine = Machine::enabled(1);
    let cpu = &machine.cpus[0];
    cpu.write(offset::TPR, 0x57);
    assert_eq!((cpu.read(offset::PPR), cpu.apic.task_priority()), (0x57, 5));
    cpu.write(offset::ICR_LOW, SELF | 0x5f);
    assert!(!cpu.apic.has_interrupt());
    machine.attention(0);
    cpu.apic.set_task_priority(4);
    assert_eq!(cpu.read(offset::TPR), 0x40);
    assert!(machine.attention(0), "what becomes deliverable raises the attention");
    assert_eq!(cpu.apic.acknowledge(), Some(0x5f));
    assert_eq!(cpu.read(offset::PPR), 0x50);
}

#[test]
fn an_eoi_that_frees_an_interrupt_raises_the_attention() {
    let machine = Machine::enabled(1);
    let cpu = &machine.cpus[0];
    cpu.write(offset::ICR_LOW, SELF | 0x42);
    cpu.apic.acknowledge();
    machine.attention(0);
    cpu.write(offset::ICR_LOW, SELF | 0x41);
    assert!(!machine.attention(0));
    cpu.eoi();
    assert!(machine.attention(0));
}

#[test]
fn the_arbitration_priority_follows_the_highest_of_the_three() {
    let machine = Machine::enabled(1);
    let cpu = &machine.cpus[0];
    cpu.write(offset::TPR, 0x35);
    assert_eq!(cpu.read(offset::APR), 0x35);
    cpu.write(offset::ICR_LOW, SELF | 0x48);
    assert_eq!(cpu.read(offset::APR), 0x40);
}

#[test]
fn software_disabling_masks_the_lvt_and_refuses_interrupts_but_not_nmis() {
    let machine = Machine::enabled(2);
    let (sender, cpu) = (&machine.cpus[0], &machine.cpus[1]);
    cpu.write(offset::LVT_LINT1, 0x31);
    sender.send(1, 0x41);
    cpu.write(offset::SVR, 0xff);
    assert_eq!(cpu.read(offset::LVT_LINT1), 0x1_0031);
    cpu.write(offset::LVT_LINT1, 0x32);
    assert_eq!(cpu.read(offset::LVT_LINT1), 0x1_0032, "the mask stays, the rest can be written");
    sender.send(1, 0x51);
    sender.send(1, NMI);
    assert_eq!(cpu.apic.take_event(true), Some(CpuEvent::Nmi));
    assert_eq!(cpu.take_all(), [0x41], "what was pending stays so");
}

#[test]
fn lvt_entries_keep_the_bits_that_they_have() {
    let machine = Machine::enabled(1);
    let cpu = &machine.cpus[0];
    let kept = [0x1_07ff, 0x7_00ff, 0x1_07ff, 0x1_07ff, 0x1_a7ff, 0x1_a7ff, 0x1_00ff];
    for (register, kept) in LVTS.into_iter().zip(kept) {
        cpu.write(register, u32::MAX);
        assert_eq!(cpu.read(register), kept, "{register:#x}");
    }
}

#[test]
fn read_only_registers_ignore_writes() {
    let machine = Machine::enabled(1);
    let cpu = &machine.cpus[0];
    for register in [offset::VERSION, offset::PPR, offset::APR, offset::ISR, offset::IRR + 0x70, offset::TMR]
    {
        let before = cpu.read(register);
        cpu.write(register, !before);
        assert_eq!(cpu.read(register), before, "{register:#x}");
    }
    cpu.write(offset::ESR, 0);
    assert_eq!(cpu.read(offset::ESR), 0);
}

#[test]
fn a_register_that_does_not_exist_is_an_error_that_a_write_of_esr_shows() {
    let machine = Machine::enabled(1);
    let cpu = &machine.cpus[0];
    cpu.write(offset::LVT_ERROR, 0xfe);
    assert_eq!(cpu.read(0x40), 0);
    assert_eq!(cpu.read(offset::ESR), 0);
    cpu.write(0x40, 0);
    assert_eq!(cpu.take_all(), [0xfe], "one error interrupt until ESR is written");
    cpu.write(offset::ESR, 0);
    assert_eq!(cpu.read(offset::ESR), 0x80);
    cpu.write(offset::ESR, 0);
    assert_eq!(cpu.read(offset::ESR), 0);
    cpu.write(offset::SELF_IPI, 0x41);
    assert_eq!(cpu.take_all(), [0xfe], "the self-IPI register is the x2APIC's");
}

#[test]
fn illegal_vectors_are_reported_where_they_are_sent_and_where_they_come() {
    let machine = Machine::enabled(2);
    let (cpu, other) = (&machine.cpus[0], &machine.cpus[1]);
    for icr in [0x0f, SELF | 0x0f] {
        cpu.send(1, icr);
        cpu.write(offset::ESR, 0);
        assert_eq!(cpu.read(offset::ESR), 0x20);
    }
    other.write(offset::ESR, 0);
    assert_eq!(other.read(offset::ESR), 0);
    machine.fabric.signal_msi(0xfee0_1000, 0x0f);
    other.write(offset::ESR, 0);
    assert_eq!(other.read(offset::ESR), 0x40);
    assert_eq!((cpu.take(), other.take()), (None, None));
}

#[test]
fn a_partial_or_misaligned_access_reaches_no_other_register() {
    let machine = Machine::enabled(1);
    let cpu = &machine.cpus[0];
    cpu.bus.write(Space::Memory, DEFAULT_BASE + u64::from(offset::TPR), &[0xff]);
    cpu.bus.write(Space::Memory, DEFAULT_BASE + u64::from(offset::TPR) + 4, &[0xff; 4]);
    assert_eq!(cpu.read(offset::TPR), 0);
    cpu.bus.write(Space::Memory, DEFAULT_BASE + u64::from(offset::TPR), &[0x20, 0, 0, 0, 1, 2, 3, 4]);
    let mut data = [0xff; 8];
    cpu.bus.read(Space::Memory, DEFAULT_BASE + u64::from(offset::TPR), &mut data);
    assert_eq!(data, [0x20, 0, 0, 0, 0, 0, 0, 0]);
    let mut byte = [0];
    cpu.bus.read(Space::Memory, DEFAULT_BASE + u64::from(offset::VERSION) + 2, &mut byte);
    assert_eq!(byte, [6]);
}

#[test]
fn only_the_legal_transitions_of_ia32_apic_base_are_made() {
    let machine = Machine::new(1);
    let cpu = &machine.cpus[0];
    let states = [0, EN, EN | EXTD];
    let legal = [[true, true, false], [true, true, true], [true, false, true]];
    for (from, row) in states.iter().zip(legal) {
        for (to, legal) in states.iter().zip(row) {
            cpu.set_base(DEFAULT_BASE).unwrap();
            cpu.set_base(DEFAULT_BASE | from & EN).unwrap();
            cpu.set_base(DEFAULT_BASE | from).unwrap();
            assert_eq!(cpu.set_base(DEFAULT_BASE | to).is_ok(), legal, "{from:#x} to {to:#x}");
            assert_eq!(cpu.set_base(DEFAULT_BASE | EXTD), Err(MsrFault));
        }
    }
}

#[test]
fn reserved_bits_of_ia32_apic_base_fault() {
    let machine = Machine::new(1);
    let cpu = &machine.cpus[0];
    for bit in (0..8).chain([9]).chain(46..64) {
        assert_eq!(cpu.set_base(cpu.base() | 1 << bit), Err(MsrFault), "bit {bit}");
    }
    let features = ApicFeatures { x2apic: false, physical_address_bits: 39, ..ApicFeatures::default() };
    let machine = Machine::with_features(1, features);
    assert_eq!(machine.cpus[0].set_base(DEFAULT_BASE | EN | 1 << 39), Err(MsrFault));
    assert_eq!(machine.cpus[0].set_base(DEFAULT_BASE | EN | EXTD), Err(MsrFault));
}

#[test]
fn the_page_moves_with_its_base() {
    let machine = Machine::new(1);
    let cpu = &machine.cpus[0];
    cpu.set_base(0xfed4_0000 | BSP | EN).unwrap();
    assert_eq!(cpu.apic.base(), Some(0xfed4_0000));
    assert_eq!(cpu.read_memory(0xfed4_0030), 0x0106_0014);
    assert_eq!(cpu.read(offset::VERSION), u32::MAX);
}

#[test]
fn a_disabled_apic_is_gone_and_comes_back_as_after_power_up() {
    let machine = Machine::enabled(1);
    let cpu = &machine.cpus[0];
    cpu.write(offset::ID, 7 << 24);
    cpu.write(offset::ICR_LOW, SELF | 0x41);
    assert_eq!(cpu.read(offset::ID), 7 << 24);
    let base = cpu.base();
    cpu.set_base(base & !EN).unwrap();
    assert_eq!((cpu.apic.base(), cpu.apic.is_enabled()), (None, false));
    assert_eq!(cpu.read(offset::VERSION), u32::MAX);
    cpu.apic.set_task_priority(9);
    assert_eq!(cpu.apic.task_priority(), 9, "CR8 works without an APIC");
    cpu.apic.set_task_priority(0);
    cpu.set_base(base).unwrap();
    assert_eq!((cpu.read(offset::SVR), cpu.read(offset::ID)), (0xff, 0));
    assert!(!cpu.apic.has_interrupt());
}

#[test]
fn entering_x2apic_mode_keeps_all_but_the_ids_and_the_destination() {
    let machine = Machine::enabled(18);
    let cpu = &machine.cpus[17];
    cpu.write(offset::ID, 5 << 24);
    cpu.write(offset::LDR, 1 << 24);
    cpu.write(offset::TPR, 0x20);
    cpu.write(offset::LVT_LINT0, 0x87);
    cpu.write(offset::ICR_HIGH, 9 << 24);
    cpu.enter_x2apic();
    let expected = [
        (offset::ID, 17),
        (offset::LDR, 1 << 16 | 2),
        (offset::TPR, 0x20),
        (offset::LVT_LINT0, 0x87),
        (offset::ICR_LOW, 0),
        (offset::SVR, 0x1ff),
        (offset::VERSION, 0x0106_0014),
    ];
    for (register, value) in expected {
        assert_eq!(cpu.rdmsr(register), Ok(value), "{register:#x}");
    }
    assert_eq!(cpu.read(offset::VERSION), u32::MAX, "there is no page in x2APIC mode");
}

#[test]
fn x2apic_registers_fault_outside_x2apic_mode() {
    let machine = Machine::enabled(1);
    for register in (0..0x1000).step_by(16) {
        assert_eq!(machine.cpus[0].rdmsr(register), Err(MsrFault));
        assert_eq!(machine.cpus[0].wrmsr(register, 0), Err(MsrFault));
    }
}

#[test]
fn x2apic_registers_are_as_the_manual_lists_them() {
    let machine = Machine::x2apic(1);
    let cpu = &machine.cpus[0];
    let read_only = [offset::ID, offset::VERSION, offset::PPR, offset::LDR, offset::TIMER_CURRENT_COUNT]
        .into_iter()
        .chain((offset::ISR..offset::ESR).step_by(16));
    let write_only = [offset::EOI, offset::SELF_IPI];
    let both = [
        offset::TPR,
        offset::SVR,
        offset::ESR,
        offset::ICR_LOW,
        offset::TIMER_INITIAL_COUNT,
        offset::TIMER_DIVIDE,
    ]
    .into_iter()
    .chain(LVTS);
    let (read_only, both): (Vec<_>, Vec<_>) = (read_only.collect(), both.collect());
    for register in (0..0x1000).step_by(16) {
        let readable = read_only.contains(&register) || both.contains(&register);
        let writable = write_only.contains(&register) || both.contains(&register);
        assert_eq!(cpu.rdmsr(register).is_ok(), readable, "reading {register:#x}");
        assert_eq!(cpu.wrmsr(register, 0).is_ok(), writable, "writing {register:#x}");
        if register != offset::ICR_LOW {
            assert_eq!(cpu.wrmsr(register, 1 << 32), Err(MsrFault), "high half of {register:#x}");
        }
    }
}

#[test]
fn reserved_bits_of_x2apic_registers_fault() {
    let machine = Machine::x2apic(1);
    let cpu = &machine.cpus[0];
    let reserved = [
        (offset::EOI, 1),
        (offset::ESR, 1),
        (offset::TPR, 0x100),
        (offset::SVR, 0x400),
        (offset::SELF_IPI, 0x100),
        (offset::TIMER_DIVIDE, 4),
        (offset::LVT_TIMER, 0x100),
        (offset::LVT_ERROR, 0x400),
        (offset::LVT_LINT0, 1 << 17),
        (offset::ICR_LOW, 1 << 13),
        (offset::ICR_LOW, 1 << 16),
        (offset::ICR_LOW, 1 << 20),
    ];
    for (register, value) in reserved {
        assert_eq!(cpu.wrmsr(register, value), Err(MsrFault), "{register:#x} {value:#x}");
    }
    assert_eq!(
        cpu.wrmsr(offset::ICR_LOW, 0x5_0000_1400),
        Ok(()),
        "the delivery status is written back by some"
    );
    assert_eq!(cpu.rdmsr(offset::ICR_LOW), Ok(0x5_0000_0400));
}

#[test]
fn a_self_ipi_leaves_the_icr_alone() {
    let machine = Machine::x2apic(1);
    let cpu = &machine.cpus[0];
    cpu.wrmsr(offset::SELF_IPI, 0x41).unwrap();
    assert_eq!(cpu.rdmsr(offset::ICR_LOW), Ok(0));
    assert_eq!(cpu.take_all(), [0x41]);
    cpu.wrmsr(offset::SELF_IPI, 0x0f).unwrap();
    cpu.wrmsr(offset::ESR, 0).unwrap();
    assert_eq!(cpu.rdmsr(offset::ESR), Ok(0x20));
}

#[test]
fn without_the_deadline_feature_its_msr_and_mode_do_not_exist() {
    let features = ApicFeatures { tsc_deadline: false, ..ApicFeatures::default() };
    let machine = Machine::with_features(1, features);
    let cpu = &machine.cpus[0];
    assert_eq!(cpu.apic.read_msr(IA32_TSC_DEADLINE), Err(MsrFault));
    assert_eq!(cpu.apic.write_msr(IA32_TSC_DEADLINE, 1), Err(MsrFault));
    cpu.write(offset::LVT_TIMER, 0x5_0041);
    assert_eq!(cpu.read(offset::LVT_TIMER), 0x1_0041);
}

#[test]
fn an_application_processor_starts_by_init_and_sipi() {
    let machine = Machine::enabled(2);
    let (bsp, ap) = (&machine.cpus[0], &machine.cpus[1].apic);
    machine.attention(1);
    bsp.send(1, INIT | LEVEL | ASSERT);
    assert!(machine.attention(1));
    bsp.send(1, INIT | LEVEL);
    assert_eq!(ap.take_event(true), Some(CpuEvent::Init));
    assert_eq!(ap.take_event(true), None, "the de-assertion is nothing");
    bsp.send(1, SIPI | 0x9a);
    assert_eq!(ap.take_event(true), Some(CpuEvent::Sipi(0x9a)));
    bsp.send(1, SIPI | 0x9a);
    assert_eq!(ap.take_event(true), None, "a SIPI is for a processor that waits for it");
}

#[test]
fn a_sipi_that_follows_an_init_closely_is_not_lost() {
    let machine = Machine::enabled(2);
    let (bsp, ap) = (&machine.cpus[0], &machine.cpus[1].apic);
    for _ in 0..2 {
        bsp.send(1, INIT | LEVEL | ASSERT);
        bsp.send(1, SIPI | 0x10);
        bsp.send(1, SIPI | 0x10);
        assert_eq!(ap.take_event(false), Some(CpuEvent::Init));
        assert!(machine.attention(1), "the SIPI is still to be taken");
        assert_eq!(ap.take_event(false), Some(CpuEvent::Sipi(0x10)));
        assert_eq!(ap.take_event(false), None);
    }
}

#[test]
fn init_resets_the_registers_but_neither_the_id_nor_the_mode() {
    let machine = Machine::x2apic(2);
    let (bsp, ap) = (&machine.cpus[0], &machine.cpus[1]);
    ap.wrmsr(offset::TPR, 0x80).unwrap();
    ap.wrmsr(offset::SELF_IPI, 0x41).unwrap();
    bsp.wrmsr(offset::ICR_LOW, 1 << 32 | u64::from(INIT | ASSERT)).unwrap();
    assert_eq!(ap.apic.take_event(true), Some(CpuEvent::Init));
    assert_eq!(ap.base(), DEFAULT_BASE | EN | EXTD);
    assert_eq!(
        (ap.rdmsr(offset::TPR), ap.rdmsr(offset::SVR), ap.rdmsr(offset::ID)),
        (Ok(0), Ok(0xff), Ok(1))
    );
    assert!(!ap.apic.has_interrupt());
}

#[test]
fn one_nmi_waits_behind_the_one_in_its_handler() {
    let machine = Machine::enabled(1);
    let cpu = &machine.cpus[0];
    for _ in 0..2 {
        cpu.send(0, NMI);
    }
    assert_eq!(cpu.apic.take_event(true), Some(CpuEvent::Nmi));
    assert_eq!(cpu.apic.take_event(true), Some(CpuEvent::Nmi), "both came before the first was taken");
    for _ in 0..10 {
        cpu.send(0, NMI);
        assert!(machine.attention(0));
        assert_eq!(cpu.apic.take_event(false), None);
        assert!(!machine.attention(0), "looking in vain does not raise the attention again");
    }
    assert_eq!(cpu.apic.take_event(true), Some(CpuEvent::Nmi));
    assert_eq!(cpu.apic.take_event(true), None);
}

#[test]
fn only_fixed_interrupts_go_to_self_and_to_all_by_shorthand() {
    let machine = Machine::enabled(2);
    let cpu = &machine.cpus[0];
    for shorthand in [1 << 18, 2 << 18] {
        for mode in [1 << 8, 2 << 8, NMI, INIT, SIPI, 7 << 8] {
            cpu.send(0, shorthand | mode | 0x41);
        }
    }
    for cpu in &machine.cpus {
        assert_eq!((cpu.apic.take_event(true), cpu.take()), (None, None));
    }
}

#[test]
fn the_icr_reads_back_without_its_delivery_status() {
    let machine = Machine::enabled(1);
    let cpu = &machine.cpus[0];
    cpu.write(offset::ICR_HIGH, u32::MAX);
    cpu.write(offset::ICR_LOW, 0x000c_d041 | 1 << 13 | 3 << 16);
    assert_eq!((cpu.read(offset::ICR_HIGH), cpu.read(offset::ICR_LOW)), (0xff00_0000, 0x000c_c041));
}

#[test]
fn the_performance_counters_interrupt_masks_its_entry_until_software_unmasks_it() {
    let machine = Machine::enabled(1);
    let cpu = &machine.cpus[0];
    cpu.apic.performance_interrupt();
    assert!(!cpu.apic.has_interrupt(), "masked since power-up");
    cpu.write(offset::LVT_PERFORMANCE, 0x45);
    cpu.apic.performance_interrupt();
    assert_eq!(cpu.read(offset::LVT_PERFORMANCE), 0x1_0045);
    cpu.apic.performance_interrupt();
    assert_eq!(cpu.take_all(), [0x45]);
    cpu.write(offset::LVT_PERFORMANCE, NMI);
    cpu.apic.performance_interrupt();
    assert_eq!(cpu.apic.take_event(true), Some(CpuEvent::Nmi));
    assert_eq!(cpu.apic.take_event(true), None);
}
