//! Two sides that agree, and every kind of disagreement planted: the code of the interpreted side is changed after the
//! copy, which is what a mistake of the translator looks like.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use engine::{Attention, Bus, CpuEvent, InterruptController, MsrFault, Signals, Space, Vcpu, VmExit};
use guest_memory::GuestMemory;
use vm_memory::{Bytes, GuestAddress};
use x86::{Cr4, Flags};

use super::LockstepVcpu;
use crate::testing::{CODE, MockTime, STACK, get, handler, long, put, set_gate};
use crate::{Shared, VcpuConfig};

const DATA: u64 = 0x28_0000;
const ROUNDS: u64 = 200;
const VECTOR: u8 = 0x40;

/// `l: add $3, %eax; push %rax; pop %rdx; mov %eax, DATA; mul %edx; rdtsc; xor %edx, %eax; movd %eax, %xmm0;
/// paddd %xmm0, %xmm1; fld1; fstpl DATA+16; in $0x70, %al; out %al, $0x71; mov $DATA+0x1000, %edi; stosb; add DATA+64, %ebx;
/// dec %ecx; jnz l; hlt`
const PROGRAM: &[&[u8]] = &[
    &[0x83, 0xc0, 3],
    &[0x50],
    &[0x5a],
    &[0x89, 0x04, 0x25, 0, 0, 0x28, 0],
    &[0xf7, 0xe2],
    &[0x0f, 0x31],
    &[0x31, 0xd0],
    &[0x66, 0x0f, 0x6e, 0xc0],
    &[0x66, 0x0f, 0xfe, 0xc8],
    &[0xd9, 0xe8],
    &[0xdd, 0x1c, 0x25, 0x10, 0, 0x28, 0],
    &[0xe4, 0x70],
    &[0xe6, 0x71],
    &[0xbf, 0, 0x10, 0x28, 0],
    &[0xaa],
    &[0x03, 0x1c, 0x25, 0x40, 0, 0x28, 0],
    &[0xff, 0xc9],
    &[0x75, 0xc8],
    &[0xf4],
];

/// A device whose register counts, that writes to RAM at each write to it, and interrupts at every third access.
struct Device {
    memory: GuestMemory,
    attention: Arc<Attention>,
    interrupts: Arc<Interrupts>,
    accesses: AtomicU64,
}

impl Device {
    fn accessed(&self) -> u64 {
        let count = self.accesses.fetch_add(1, Ordering::Relaxed);
        if count.is_multiple_of(3) {
            *self.interrupts.0.lock().unwrap() = Some(VECTOR);
            self.attention.raise(Signals::INTERRUPT);
        }
        count
    }
}

impl Bus for Device {
    fn read(&self, _: Space, _: u64, data: &mut [u8]) {
        data.fill(self.accessed() as u8);
    }
    fn write(&self, _: Space, _: u64, _: &[u8]) {
        let count = self.accessed();
        self.memory.vm().write_obj(count as u32, GuestAddress(DATA + 64)).unwrap();
    }
}

#[derive(Default)]
struct Interrupts(Mutex<Option<u8>>);

impl InterruptController for Interrupts {
    fn has_interrupt(&self) -> bool {
        self.0.lock().unwrap().is_some()
    }
    fn acknowledge(&self) -> Option<u8> {
        self.0.lock().unwrap().take()
    }
    fn take_event(&self, _: bool) -> Option<CpuEvent> {
        None
    }
    fn task_priority(&self) -> u8 {
        0
    }
    fn set_task_priority(&self, _: u8) {}
    fn read_msr(&self, _: u32) -> Result<u64, MsrFault> {
        Ok(0)
    }
    fn write_msr(&self, _: u32, _: u64) -> Result<(), MsrFault> {
        Ok(())
    }
    fn performance_interrupt(&self) {}
}

/// Time that passes whenever somebody looks.
#[derive(Default)]
struct Passing(MockTime);

impl engine::TimeSource for Passing {
    fn now(&self) -> u64 {
        self.0.0.fetch_add(7, Ordering::Relaxed)
    }
    fn tsc(&self) -> u64 {
        self.now() * 2
    }
    fn host_tsc_start(&self) -> Option<u64> {
        None
    }
    fn tsc_frequency(&self) -> u64 {
        2_000_000_000
    }
    fn wall_clock(&self) -> u64 {
        self.now()
    }
}

/// The two sides with a program, and the bus.
fn machine(program: &[u8]) -> (LockstepVcpu, Arc<dyn Bus>) {
    let mut cpu = long();
    (CODE..).zip(program).for_each(|(at, &byte)| put(&cpu, at, byte));
    set_gate(&cpu, VECTOR, 0, 0);
    set_gate(&cpu, 6, 0, 0);
    put(&cpu, handler(6), 0xf4u8);
    // The handler: iretq.
    put(&cpu, handler(VECTOR), 0xcf48u16);
    cpu.cr4 |= Cr4::OSFXSR | Cr4::OSXMMEXCPT;
    cpu.update_paging();
    cpu.rip = CODE;
    cpu.registers.set(1, ROUNDS);
    cpu.registers.set(4, STACK);
    cpu.set_rflags(Flags::IF.bits(), Flags::IF);
    let (attention, interrupts) = (Attention::new(), Arc::new(Interrupts::default()));
    let memory = cpu.memory.clone();
    let bus: Arc<dyn Bus> = Arc::new(Device {
        memory: memory.clone(),
        attention: attention.clone(),
        interrupts: interrupts.clone(),
        accesses: AtomicU64::new(1),
    });
    let mut vcpu = LockstepVcpu::new(VcpuConfig {
        id: 0,
        memory,
        interrupts,
        time: Arc::new(Passing::default()),
        attention,
        cpu: cpu.wires.model.clone(),
        recorder: None,
        shared: Arc::new(Shared::new(1)),
        jit: true,
    })
    .unwrap();
    vcpu.set_state(&cpu.state()).unwrap();
    vcpu.every = 64;
    (vcpu, bus)
}

fn program() -> Vec<u8> {
    PROGRAM.concat()
}

/// Runs the program with another instruction in the interpreted side's memory; gives the report.
#[track_caller]
fn planted(program: &[&[u8]], at: usize, other: &[u8]) -> String {
    assert_eq!(program[at].len(), other.len());
    let (mut vcpu, bus) = machine(&program.concat());
    let place = CODE + program[..at].concat().len() as u64;
    // The copy, as `run` makes it before the first slice.
    vcpu.interpreted.cpu.memory.copy_from(&vcpu.translated.cpu.memory);
    vcpu.slices = 1;
    vcpu.interpreted.cpu.memory.write_bytes(place, other);
    vcpu.every = u64::MAX;
    match vcpu.run(&bus).unwrap() {
        VmExit::Differs(event) => event.reason,
        exit => panic!("{exit:?} with {other:x?}"),
    }
}

#[test]
fn the_two_agree_on_a_loop_with_devices_time_interrupts_and_undefined_flags() {
    let (mut vcpu, bus) = machine(&program());
    assert_eq!(vcpu.run(&bus).unwrap(), VmExit::Halt);
    assert!(vcpu.slices > ROUNDS / 2, "{} slices", vcpu.slices);
    assert!(vcpu.translated.jit_statistics().unwrap().blocks > 1);
    let (a, b) = (&vcpu.translated.cpu, &vcpu.interpreted.cpu);
    assert_eq!(a.state(), b.state());
    assert_eq!(a.memory.first_difference(&b.memory), None);
    assert!(get::<u32>(a, DATA + 64) > ROUNDS as u32, "the device wrote");
}

#[test]
fn a_wrong_register_is_found_with_its_code() {
    let report = planted(&[&[0x83, 0xc0, 3], &[0xf4]], 0, &[0x83, 0xc0, 5]);
    assert!(report.contains("\n  rax     0x3, 0x5\n"), "{report}");
    assert!(report.contains("100000: 83c005"), "{report}");
    assert!(report.contains("after, translated:"), "{report}");
}

#[test]
fn a_wrong_flag_is_found() {
    // stc; clc in its place.
    let report = planted(&[&[0xf9], &[0xf4]], 0, &[0xf8]);
    assert!(report.contains("rflags"), "{report}");
}

#[test]
fn a_wrong_value_in_memory_is_found_though_no_register_tells() {
    let store = |value| [0xc7, 0x04, 0x25, 0, 0, 0x28, 0, value, 0, 0, 0];
    let report = planted(&[&store(1), &[0xf4]], 0, &store(2));
    assert!(report.contains("memory at 0x280000: 0x01, 0x02"), "{report}");
    // push $1; push $2 in its place.
    let report = planted(&[&[0x6a, 1], &[0xf4]], 0, &[0x6a, 2]);
    assert!(report.contains("memory at 0x207ff8: 0x01, 0x02"), "{report}");
}

#[test]
fn a_store_by_one_side_alone_is_found_though_no_register_tells() {
    // l: mov %ebx, DATA+0x3004; dec %ecx; jnz l; hlt
    let store = [0x89, 0x1c, 0x25, 4, 0x30, 0x28, 0];
    let program: [&[u8]; 4] = [&store, &[0xff, 0xc9], &[0x75, 0xf5], &[0xf4]];
    let (mut vcpu, bus) = machine(&program.concat());
    vcpu.translated.cpu.registers.set(3, 0x77);
    vcpu.interpreted.cpu.registers.set(3, 0x77);
    vcpu.interpreted.cpu.memory.copy_from(&vcpu.translated.cpu.memory);
    vcpu.slices = 1;
    // A NOP of seven bytes.
    vcpu.interpreted.cpu.memory.write_bytes(CODE, &[0x0f, 0x1f, 0x80, 0, 0, 0, 0]);
    let VmExit::Differs(event) = vcpu.run(&bus).unwrap() else { panic!("not found") };
    assert!(event.reason.contains("the slice that stored to it was an earlier one"), "{}", event.reason);
}

#[test]
fn a_wrong_vector_register_is_found() {
    // pxor %xmm0, %xmm0; pcmpeqd %xmm0, %xmm0 in its place.
    let report = planted(&[&[0x66, 0x0f, 0xef, 0xc0], &[0xf4]], 0, &[0x66, 0x0f, 0x76, 0xc0]);
    assert!(report.contains("zmm0"), "{report}");
    // fld1; fldpi in its place.
    let report = planted(&[&[0xd9, 0xe8], &[0xf4]], 0, &[0xd9, 0xeb]);
    assert!(report.contains("x87 image"), "{report}");
}

#[test]
fn another_question_to_a_device_is_found() {
    let report = planted(PROGRAM, 11, &[0xe4, 0x71]);
    assert!(report.contains("the outside was asked Read(Port, 71, 1)"), "{report}");
    let report = planted(PROGRAM, 11, &[0x66, 0x90]);
    assert!(report.contains("the outside was asked Write"), "{report}");
    let report = planted(PROGRAM, 5, &[0x66, 0x90]);
    assert!(report.contains("Tsc"), "{report}");
}

#[test]
fn a_fault_on_one_side_is_found() {
    // ud2 where the other goes on, and the other way round.
    let report = planted(&[&[0x66, 0x90], &[0xf4]], 0, &[0x0f, 0x0b]);
    assert!(report.contains("raised an exception that the translated one did not"), "{report}");
    let report = planted(&[&[0x0f, 0x0b], &[0xf4]], 0, &[0x66, 0x90]);
    assert!(report.contains("completed an instruction that faulted"), "{report}");
}

#[test]
fn a_branch_that_goes_elsewhere_is_found() {
    // jnz l becomes jz l.
    let report = planted(PROGRAM, 17, &[0x74, 0xc8]);
    assert!(report.contains("rip"), "{report}");
}

#[test]
fn a_mistake_that_shows_long_after_the_loop_was_translated_is_found_where_it_shows() {
    // l: cmp $50, %ecx; cmove %ecx, %edx; add %edx, %eax; dec %ecx; jnz l; hlt
    let program: [&[u8]; 6] =
        [&[0x83, 0xf9, 50], &[0x0f, 0x44, 0xd1], &[0x01, 0xd0], &[0xff, 0xc9], &[0x75, 0xf4], &[0xf4]];
    let report = planted(&program, 0, &[0x83, 0xf9, 51]);
    assert!(report.contains("rdx     0x600, 0x33\n"), "{report}");
    let instructions = 5 * (ROUNDS - 51 + 1);
    assert!(report.contains(&format!(" and {instructions} instructions")), "{report}");
}
