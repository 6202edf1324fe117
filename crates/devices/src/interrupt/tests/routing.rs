//! Interrupts on their way: from lines, MSIs and IPIs to the processors that they are for.

use engine::CpuEvent;

use super::*;

const LEVEL: u64 = 1 << 15;
const LOGICAL: u32 = 1 << 11;
const LOWEST: u32 = 1 << 8;
const EXTINT: u32 = 7 << 8;
const ALL: u32 = 2 << 18;
const OTHERS: u32 = 3 << 18;

/// The processors that got `vector`, and nothing else.
fn receivers(machine: &Machine, vector: u8) -> Vec<usize> {
    let took = machine.cpus.iter().map(Cpu::take_all).collect::<Vec<_>>();
    assert!(took.iter().flatten().all(|&v| v == vector));
    (0..took.len()).filter(|&index| !took[index].is_empty()).collect()
}

#[test]
fn xapic_ipis_reach_physical_destinations_and_shorthands() {
    let machine = Machine::enabled(4);
    let cpu = &machine.cpus[1];
    for (destination, icr, expected) in [
        (2, 0x41, vec![2]),
        (1, 0x41, vec![1]),
        (9, 0x41, vec![]),
        (0xff, 0x41, vec![0, 1, 2, 3]),
        (0, ALL | 0x41, vec![0, 1, 2, 3]),
        (0, OTHERS | 0x41, vec![0, 2, 3]),
        (0, 1 << 18 | 0x41, vec![1]),
    ] {
        cpu.send(destination, icr);
        assert_eq!(receivers(&machine, 0x41), expected, "{destination} {icr:#x}");
    }
}

#[test]
fn an_ipi_raises_the_attention_of_its_receiver_alone() {
    let machine = Machine::enabled(3);
    machine.cpus[0].send(2, 0x41);
    assert_eq!([0, 1, 2].map(|index| machine.attention(index)), [false, false, true]);
}

#[test]
fn flat_and_cluster_logical_destinations_are_told_apart() {
    let machine = Machine::enabled(4);
    for (index, cpu) in machine.cpus.iter().enumerate() {
        cpu.write(offset::LDR, 1 << (24 + index));
    }
    machine.cpus[0].send(0b1010, LOGICAL | 0x41);
    assert_eq!(receivers(&machine, 0x41), [1, 3]);
    for (cpu, ldr) in machine.cpus.iter().zip([0x11, 0x12, 0x21, 0x22]) {
        cpu.write(offset::DFR, 0x0fff_ffff);
        cpu.write(offset::LDR, ldr << 24);
    }
    machine.cpus[0].send(0x23, LOGICAL | 0x41);
    assert_eq!(receivers(&machine, 0x41), [2, 3]);
    machine.cpus[0].send(0x12, LOGICAL | 0x41);
    assert_eq!(receivers(&machine, 0x41), [1]);
    machine.cpus[0].send(0xff, LOGICAL | 0x41);
    assert_eq!(receivers(&machine, 0x41), [0, 1, 2, 3]);
}

#[test]
fn x2apic_ipis_reach_ids_clusters_and_all() {
    let machine = Machine::x2apic(20);
    let cpu = &machine.cpus[0];
    let logical = u64::from(LOGICAL);
    let send = |destination: u64, icr: u64| {
        cpu.wrmsr(offset::ICR_LOW, destination << 32 | icr | 0x41).unwrap();
        receivers(&machine, 0x41)
    };
    assert_eq!(send(19, 0), [19]);
    assert_eq!(send(0xff, 0), [0usize; 0], "all ones of eight bits are an ID here");
    assert_eq!(send(0xffff_ffff, 0).len(), 20);
    assert_eq!(send(0x1_0005, logical), [16, 18]);
    assert_eq!(send(0x0_8001, logical), [0, 15]);
    assert_eq!(send(0, u64::from(OTHERS)).len(), 19);
}

#[test]
fn an_x2apic_sender_starts_a_processor_in_xapic_mode() {
    let machine = Machine::new(2);
    machine.cpus[0].enter_x2apic();
    machine.cpus[0].wrmsr(offset::ICR_LOW, 1 << 32 | 0x4500).unwrap();
    assert_eq!(machine.cpus[1].apic.take_event(true), Some(CpuEvent::Init));
}

#[test]
fn a_processor_beyond_255_can_be_reached() {
    let machine = Machine::new(300);
    machine.cpus[0].enter_x2apic();
    machine.cpus[0].wrmsr(offset::ICR_LOW, 290 << 32 | 0x4500).unwrap();
    assert_eq!(machine.cpus[290].apic.take_event(true), Some(CpuEvent::Init));
    assert_eq!(machine.cpus[34].apic.take_event(true), None, "not the one whose ID has the same eight bits");
}

#[test]
fn a_moved_xapic_id_is_followed() {
    let machine = Machine::enabled(2);
    machine.cpus[1].write(offset::ID, 0x33 << 24);
    machine.cpus[0].send(0x33, 0x41);
    assert_eq!(receivers(&machine, 0x41), [1]);
    machine.cpus[0].send(1, 0x41);
    assert_eq!(receivers(&machine, 0x41), [0usize; 0]);
}

#[test]
fn processors_that_share_an_xapic_id_all_get_what_is_sent_to_it() {
    let machine = Machine::enabled(3);
    for id in [0, 1, 7, 0xfe] {
        machine.cpus[0].write(offset::ID, id << 24);
        machine.cpus[1].write(offset::ID, id << 24);
        machine.cpus[2].send(id as u8, 0x41);
        assert_eq!(receivers(&machine, 0x41), [0, 1], "ID {id}");
    }
}

#[test]
fn the_lowest_priority_gets_the_interrupt_and_equals_take_turns() {
    let machine = Machine::enabled(3);
    for (index, cpu) in machine.cpus.iter().enumerate() {
        cpu.write(offset::LDR, 1 << (24 + index));
    }
    machine.cpus[1].write(offset::TPR, 0x20);
    let mut counts = [0; 3];
    for _ in 0..10 {
        machine.cpus[0].send(0b111, LOGICAL | LOWEST | 0x41);
        let receivers = receivers(&machine, 0x41);
        assert_eq!(receivers.len(), 1);
        counts[receivers[0]] += 1;
    }
    assert_eq!(counts, [5, 0, 5]);
    machine.cpus[0].write(offset::SVR, 0xff);
    machine.cpus[2].write(offset::SVR, 0xff);
    machine.cpus[0].send(0b111, LOGICAL | LOWEST | 0x41);
    assert_eq!(receivers(&machine, 0x41), [1], "one that is disabled is no candidate");
}

#[test]
fn an_msi_reaches_its_destination() {
    let machine = Machine::enabled(2);
    assert!(machine.fabric.signal_msi(0xfee0_1000, 0x0041));
    assert_eq!(receivers(&machine, 0x41), [1]);
    assert!(!machine.fabric.signal_msi(0xfee0_5000, 0x0041));
    assert!(machine.fabric.signal_msi(0xfeef_f000, 0x0041));
    assert_eq!(receivers(&machine, 0x41), [0, 1]);
    machine.fabric.signal_msi(0xfee0_0000, 0x0400);
    assert_eq!(machine.cpus[0].apic.take_event(true), Some(CpuEvent::Nmi));
}

#[test]
fn a_device_reaches_all_x2apics_by_all_ones_and_a_cluster_by_its_bits() {
    let machine = Machine::x2apic(3);
    machine.fabric.signal_msi(0xfeef_f000, 0x0041);
    assert_eq!(receivers(&machine, 0x41), [0, 1, 2]);
    machine.fabric.signal_msi(0xfee0_6004, 0x0041);
    assert_eq!(receivers(&machine, 0x41), [1, 2]);
}

#[test]
fn isa_interrupts_reach_their_pins_and_the_timer_pin_2() {
    let machine = Machine::enabled(1);
    machine.set_redirection(2, 0x50);
    machine.set_redirection(4, 0x54);
    machine.set_redirection(20, 0x64 | LEVEL);
    for line in [0, 2, 4, 20, 24, 4000] {
        machine.set_line(line, true);
        machine.set_line(line, false);
    }
    assert_eq!(machine.cpus[0].take_all(), [0x64, 0x54, 0x50]);
}

#[test]
fn a_level_interrupt_comes_back_after_the_eoi_broadcast() {
    let machine = Machine::enabled(1);
    let cpu = &machine.cpus[0];
    machine.set_redirection(17, 0x61 | LEVEL);
    machine.set_line(17, true);
    assert_eq!(cpu.apic.acknowledge(), Some(0x61));
    assert_eq!(cpu.read(offset::TMR + 0x30), 2);
    assert!(!cpu.apic.has_interrupt());
    machine.attention(0);
    cpu.eoi();
    assert!(machine.attention(0));
    assert_eq!(cpu.apic.acknowledge(), Some(0x61));
    machine.set_line(17, false);
    cpu.eoi();
    assert!(!cpu.apic.has_interrupt());
}

#[test]
fn suppressed_eoi_broadcasts_leave_the_eoi_to_the_ioapics_register() {
    let machine = Machine::x2apic(1);
    let cpu = &machine.cpus[0];
    cpu.wrmsr(offset::SVR, 0x11ff).unwrap();
    machine.set_redirection(17, 0x61 | LEVEL);
    machine.set_line(17, true);
    assert_eq!(cpu.take_all(), [0x61]);
    assert_eq!(machine.redirection(17), 0xc061);
    cpu.write_memory(0xfec0_0040, 0x61);
    assert_eq!(cpu.take_all(), [0x61]);
}

#[test]
fn an_edge_takes_the_vector_out_of_the_trigger_mode_register() {
    let machine = Machine::enabled(1);
    let cpu = &machine.cpus[0];
    machine.set_redirection(17, 0x61 | LEVEL);
    machine.set_line(17, true);
    machine.set_line(17, false);
    cpu.take();
    cpu.write(offset::ICR_LOW, 1 << 18 | 0x61);
    assert_eq!(cpu.read(offset::TMR + 0x30), 0);
}

#[test]
fn the_pic_reaches_a_processor_whose_apic_is_off() {
    for base in [DEFAULT_BASE | BSP, DEFAULT_BASE | BSP | EN] {
        let machine = Machine::new(2);
        machine.start_pic();
        machine.cpus[0].set_base(base).unwrap();
        machine.set_line(0, true);
        assert!(machine.attention(0) && machine.cpus[0].apic.has_interrupt());
        assert!(!machine.cpus[1].apic.has_interrupt());
        assert_eq!(machine.cpus[0].apic.acknowledge(), Some(0x30));
        assert!(!machine.cpus[0].apic.has_interrupt());
        machine.out(0x20, 0x20);
    }
}

#[test]
fn lint0_as_extint_is_the_virtual_wire() {
    let machine = Machine::new(1);
    let cpu = &machine.cpus[0];
    machine.start_pic();
    machine.fabric.enable_virtual_wire();
    cpu.apic.set_task_priority(15);
    machine.set_line(4, true);
    machine.set_line(3, true);
    assert_eq!(cpu.apic.acknowledge(), Some(0x33), "ExtINT knows no task priority");
    assert!(!cpu.apic.has_interrupt());
    machine.attention(0);
    machine.out(0x20, 0x20);
    assert!(machine.attention(0));
    assert_eq!(cpu.apic.acknowledge(), Some(0x34));
    cpu.write(offset::LVT_LINT0, 0x1_0000 | EXTINT);
    machine.out(0x20, 0x20);
    machine.set_line(5, true);
    assert!(!cpu.apic.has_interrupt(), "masked");
    machine.attention(0);
    cpu.write(offset::LVT_LINT0, EXTINT);
    assert!(machine.attention(0));
    assert_eq!(cpu.apic.acknowledge(), Some(0x35));
}

#[test]
fn lint0_as_fixed_is_one_interrupt_for_an_edge_and_a_lasting_one_for_a_level() {
    let machine = Machine::enabled(1);
    let cpu = &machine.cpus[0];
    machine.start_pic();
    cpu.write(offset::LVT_LINT0, 0x71);
    machine.set_line(4, true);
    assert_eq!(cpu.take_all(), [0x71]);
    cpu.write(offset::LVT_LINT0, 0x8072);
    assert_eq!(cpu.read(offset::LVT_LINT0), 0xc072);
    assert_eq!(cpu.apic.acknowledge(), Some(0x72));
    cpu.eoi();
    assert_eq!(cpu.apic.acknowledge(), Some(0x72), "the PIC's output is still high");
    machine.out(0x21, 0xff);
    cpu.eoi();
    assert_eq!((cpu.take(), cpu.read(offset::LVT_LINT0)), (None, 0x8072));
}

#[test]
fn the_pic_reaches_the_processor_through_the_ioapics_pin_0() {
    let machine = Machine::enabled(2);
    machine.start_pic();
    machine.set_redirection(0, 1 << 56 | u64::from(EXTINT));
    machine.set_line(3, true);
    machine.set_line(1, true);
    let cpu = &machine.cpus[1];
    assert_eq!(cpu.apic.acknowledge(), Some(0x31));
    assert!(!cpu.apic.has_interrupt());
    machine.out(0x20, 0x20);
    assert_eq!(cpu.apic.acknowledge(), Some(0x33));
}

#[test]
fn what_is_left_after_an_acknowledgement_is_a_new_edge_at_pin_0() {
    let machine = Machine::enabled(1);
    let cpu = &machine.cpus[0];
    machine.start_pic();
    // Automatic EOI: the next request follows at once.
    machine.out(0x20, 0x11);
    for value in [0x30, 4, 3, 0] {
        machine.out(0x21, value);
    }
    machine.set_redirection(0, u64::from(EXTINT));
    machine.set_line(3, true);
    machine.set_line(4, true);
    assert_eq!(cpu.apic.acknowledge(), Some(0x33));
    assert_eq!(cpu.apic.acknowledge(), Some(0x34));
    assert_eq!(cpu.apic.acknowledge(), None);
}

#[test]
fn the_nmi_line_goes_through_lint1() {
    let machine = Machine::enabled(2);
    machine.cpus[0].write(offset::LVT_LINT1, 4 << 8);
    machine.cpus[1].set_base(DEFAULT_BASE).unwrap();
    machine.fabric.set_nmi(true);
    machine.fabric.set_nmi(true);
    for cpu in &machine.cpus {
        assert_eq!(cpu.apic.take_event(true), Some(CpuEvent::Nmi));
        assert_eq!(cpu.apic.take_event(true), None);
    }
    machine.fabric.set_nmi(false);
    machine.cpus[0].write(offset::LVT_LINT1, 0x1_0400);
    machine.fabric.set_nmi(true);
    assert_eq!(machine.cpus[0].apic.take_event(true), None);
}

#[test]
fn a_disabled_apic_gets_no_messages() {
    let machine = Machine::enabled(2);
    machine.cpus[1].set_base(DEFAULT_BASE).unwrap();
    machine.cpus[0].send(1, 0x4500);
    machine.cpus[0].send(0xff, 0x41);
    assert_eq!(machine.cpus[1].apic.take_event(true), None);
    assert_eq!(receivers(&machine, 0x41), [0]);
}

#[test]
fn a_reset_forgets_everything() {
    let machine = Machine::enabled(2);
    machine.start_pic();
    machine.set_redirection(4, 0x54);
    machine.cpus[0].write(offset::LVT_LINT0, EXTINT);
    machine.set_line(4, true);
    machine.cpus[0].send(1, 0x4400);
    machine.cpus[0].enter_x2apic();
    machine.fabric.reset();
    assert_eq!(machine.cpus[0].base(), DEFAULT_BASE | BSP | EN);
    assert_eq!(machine.redirection(4), 0x1_0000);
    for cpu in &machine.cpus {
        assert_eq!((cpu.apic.take_event(true), cpu.apic.acknowledge()), (None, None));
    }
}

#[test]
fn processors_that_interrupt_each_other_do_not_deadlock() {
    let machine = Machine::x2apic(3);
    machine.start_pic();
    machine.set_redirection(17, 0x61 | LEVEL);
    const ROUNDS: u64 = 3000;
    std::thread::scope(|scope| {
        for (index, cpu) in machine.cpus.iter().enumerate() {
            scope.spawn(move || {
                for round in 0..ROUNDS {
                    let vector = 0x40 + (round & 0x7f);
                    cpu.wrmsr(offset::ICR_LOW, u64::from(OTHERS) | vector).unwrap();
                    cpu.wrmsr(offset::ICR_LOW, ((index as u64 + 1) % 3) << 32 | vector).unwrap();
                    cpu.take();
                }
            });
        }
        scope.spawn(|| {
            for round in 0..ROUNDS {
                machine.set_line(17, round % 2 == 0);
                machine.set_line((round % 16) as u32, round % 3 == 0);
                machine.fabric.signal_msi(0xfeef_f000, 0x41);
            }
        });
    });
}
