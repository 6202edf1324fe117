//! Nothing that a guest writes makes a controller panic, or leaves it in a state that contradicts itself.

use proptest::prelude::*;

use super::*;

#[derive(Clone, Debug)]
enum Step {
    Memory(u64, Vec<u8>),
    ReadMemory(u64, usize),
    Port(u64, u8),
    ReadPort(u64),
    Base(u64),
    Msr(u32, u64),
    ReadMsr(u32),
    Line(u32, bool),
    Msi(u64, u32),
    Nmi(bool),
    Time(u64),
    TscOffset(u64),
    Cr8(u8),
    Take(bool),
    Reset,
}

/// Values whose interesting bits are low, and all others.
fn value() -> impl Strategy<Value = u64> {
    prop_oneof![
        0u64..0x400,
        any::<u64>(),
        any::<u32>().prop_map(u64::from),
        (0u64..64).prop_map(|bit| 1 << bit)
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let register = (0u64..0x40).prop_map(|index| DEFAULT_BASE + index * 16);
    let address = prop_oneof![
        8 => register,
        2 => DEFAULT_BASE..DEFAULT_BASE + 0x1000,
        2 => prop::sample::select(vec![0xfec0_0000, 0xfec0_0010, 0xfec0_0040]),
        1 => 0xfec0_0000u64..0xfec0_1000,
    ];
    let bytes = prop_oneof![
        4 => value().prop_map(|value| (value as u32).to_le_bytes().to_vec()),
        1 => prop::collection::vec(any::<u8>(), 1..=8),
    ];
    let port = prop::sample::select(vec![0x20, 0x21, 0xa0, 0xa1, 0x4d0, 0x4d1]);
    let index = prop_oneof![8 => 0x800u32..0x840, 1 => 0x800u32..0x900, 2 => Just(msr::IA32_TSC_DEADLINE)];
    let base = prop_oneof![
        4 => (0u64..4).prop_map(|mode| DEFAULT_BASE | mode << 10),
        1 => any::<u64>(),
    ];
    prop_oneof![
        6 => (address.clone(), bytes).prop_map(|(address, bytes)| Step::Memory(address, bytes)),
        3 => (address, 1usize..=8).prop_map(|(address, len)| Step::ReadMemory(address, len)),
        3 => (port.clone(), any::<u8>()).prop_map(|(port, value)| Step::Port(port, value)),
        1 => port.prop_map(Step::ReadPort),
        1 => base.prop_map(Step::Base),
        4 => (index.clone(), value()).prop_map(|(index, value)| Step::Msr(index, value)),
        2 => index.prop_map(Step::ReadMsr),
        3 => (0u32..26, any::<bool>()).prop_map(|(line, level)| Step::Line(line, level)),
        1 => (any::<u32>(), any::<u32>()).prop_map(|(low, data)| Step::Msi(0xfee0_0000 | u64::from(low >> 12), data)),
        1 => any::<bool>().prop_map(Step::Nmi),
        2 => (0u64..100_000).prop_map(Step::Time),
        1 => any::<u64>().prop_map(Step::TscOffset),
        1 => (0u8..16).prop_map(Step::Cr8),
        4 => any::<bool>().prop_map(Step::Take),
        1 => Just(Step::Reset),
    ]
}

fn apply(machine: &Machine, cpu: &Cpu, step: Step) {
    match step {
        Step::Memory(address, bytes) => cpu.bus.write(Space::Memory, address, &bytes),
        Step::ReadMemory(address, len) => cpu.bus.read(Space::Memory, address, &mut vec![0; len]),
        Step::Port(port, value) => cpu.bus.write(Space::Port, port, &[value]),
        Step::ReadPort(port) => cpu.bus.read(Space::Port, port, &mut [0]),
        Step::Base(value) => drop(cpu.set_base(value)),
        Step::Msr(index, value) => drop(cpu.apic.write_msr(index, value)),
        Step::ReadMsr(index) => drop(cpu.apic.read_msr(index)),
        Step::Line(line, level) => machine.set_line(line, level),
        Step::Msi(address, data) => drop(machine.fabric.signal_msi(address, data)),
        Step::Nmi(level) => machine.fabric.set_nmi(level),
        Step::Time(ns) => machine.run(ns),
        Step::TscOffset(offset) => cpu.apic.set_tsc_offset(offset),
        Step::Cr8(value) => cpu.apic.set_task_priority(value),
        Step::Take(nmi_allowed) => {
            let _ = cpu.apic.take_event(nmi_allowed);
            let expected = cpu.apic.has_interrupt();
            assert_eq!(cpu.apic.acknowledge().is_some(), expected);
        }
        Step::Reset => machine.fabric.reset(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn any_sequence_of_accesses_is_survived(steps in prop::collection::vec((0usize..3, step()), 1..300)) {
        let machine = Machine::enabled(3);
        for (cpu, step) in steps {
            machine.attention(cpu);
            let had = machine.cpus[cpu].apic.has_interrupt();
            apply(&machine, &machine.cpus[cpu], step);
            let has = machine.cpus[cpu].apic.has_interrupt();
            prop_assert!(had || !has || machine.attention(cpu), "an interrupt without attention");
            prop_assert!(machine.cpus[cpu].apic.task_priority() < 16);
        }
    }
}
