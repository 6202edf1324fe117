//! A processor with a little memory for unit tests: real mode as after power-up, 32-bit protected mode, or 64-bit mode,
//! with tables in place. The outside is mocked here, once for all tests.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use engine::{Bus, CpuEvent, InterruptController, MsrFault, Space, TimeSource};
use guest_memory::{GuestMemory, Region, Scalar};
use x86::descriptor::Attributes;
use x86::{Cr0, Cr4, Descriptor, Efer, Exception, Segment, SegmentRegister, Selector, TableRegister};

use crate::cpu::{Cpu, Native, Wires};
use crate::cpuid::CpuModel;
use crate::insn::Stop;
use crate::mmu::NO_PAGE;
use crate::native::NativeUnit;

/// Bytes of RAM, from address 0.
pub const MEMORY: u64 = 4 << 20;
/// Where the global descriptor table is.
pub const GDT: u64 = 0x1000;
/// Where the interrupt descriptor table is.
pub const IDT: u64 = 0x2000;
/// Where the task-state segment is.
pub const TSS: u64 = 0x3000;
/// Where the page tables are: the PML4, then a PDPT, then a page directory of 2-MiB pages, all usable at CPL 3.
pub const TABLES: u64 = 0x1_0000;
/// Where code is.
pub const CODE: u64 = 0x10_0000;
/// The top of the stack in use.
pub const STACK: u64 = 0x20_8000;
/// The top of the stack that the task-state segment names for CPL 0.
pub const KERNEL_STACK: u64 = 0x20_0000;
/// The top of the stack that is entry 1 of the interrupt stack table.
pub const IST1: u64 = 0x21_0000;

/// Selectors of the descriptors in [`GDT`].
pub const KERNEL_CODE64: u16 = 0x08;
/// Data and stack, DPL 0.
pub const KERNEL_DATA: u16 = 0x10;
/// 32-bit code, DPL 3.
pub const USER_CODE32: u16 = 0x1b;
/// Data and stack, DPL 3.
pub const USER_DATA: u16 = 0x23;
/// 64-bit code, DPL 3.
pub const USER_CODE64: u16 = 0x2b;
/// 32-bit code, DPL 0.
pub const KERNEL_CODE32: u16 = 0x30;
/// The task-state segment, 16 bytes in long mode.
pub const TASK: u16 = 0x38;
/// 64-bit conforming code, DPL 0.
pub const CONFORMING: u16 = 0x48;
/// Data that is not present.
pub const ABSENT: u16 = 0x50;
/// Free for a test's own descriptor of up to 16 bytes.
pub const FREE: u16 = 0x58;

const DESCRIPTORS: [(u16, u64); 8] = [
    (KERNEL_CODE64, 0x00af_9a00_0000_ffff),
    (KERNEL_DATA, 0x00cf_9200_0000_ffff),
    (USER_CODE32, 0x00cf_fa00_0000_ffff),
    (USER_DATA, 0x00cf_f200_0000_ffff),
    (USER_CODE64, 0x00af_fa00_0000_ffff),
    (KERNEL_CODE32, 0x00cf_9a00_0000_ffff),
    (CONFORMING, 0x00af_9e00_0000_ffff),
    (ABSENT, 0x00cf_1200_0000_ffff),
];

/// A bus that answers reads with all ones and remembers writes.
#[derive(Default)]
pub struct MockBus {
    /// Space, address and bytes of each write.
    pub writes: Mutex<Vec<(Space, u64, Vec<u8>)>>,
}

impl Bus for MockBus {
    fn read(&self, _: Space, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn write(&self, space: Space, address: u64, data: &[u8]) {
        self.writes.lock().unwrap().push((space, address, data.to_vec()));
    }
}

/// A local APIC that keeps what is written to it.
#[derive(Default)]
pub struct MockInterrupts {
    /// What [`InterruptController::acknowledge`] gives.
    pub pending: Mutex<Option<u8>>,
    /// CR8.
    pub priority: AtomicU8,
    /// How often the performance counters interrupted.
    pub counter_interrupts: AtomicU64,
    /// Its registers by MSR.
    pub registers: Mutex<HashMap<u32, u64>>,
}

/// IA32_APIC_BASE until it is written: enabled.
const APIC_BASE: u64 = 0xfee0_0800;

impl InterruptController for MockInterrupts {
    fn has_interrupt(&self) -> bool {
        self.pending.lock().unwrap().is_some()
    }
    fn acknowledge(&self) -> Option<u8> {
        self.pending.lock().unwrap().take()
    }
    fn take_event(&self, _: bool) -> Option<CpuEvent> {
        None
    }
    fn task_priority(&self) -> u8 {
        self.priority.load(Ordering::Relaxed)
    }
    fn set_task_priority(&self, cr8: u8) {
        self.priority.store(cr8, Ordering::Relaxed);
    }
    fn performance_interrupt(&self) {
        self.counter_interrupts.fetch_add(1, Ordering::Relaxed);
    }
    fn read_msr(&self, index: u32) -> Result<u64, MsrFault> {
        let reset = if index == x86::msr::IA32_APIC_BASE { APIC_BASE } else { 0 };
        Ok(self.registers.lock().unwrap().get(&index).copied().unwrap_or(reset))
    }
    fn write_msr(&self, index: u32, value: u64) -> Result<(), MsrFault> {
        self.registers.lock().unwrap().insert(index, value);
        Ok(())
    }
}

/// Time that moves when a test says so, at 2 GHz.
#[derive(Default)]
pub struct MockTime(pub AtomicU64);

impl TimeSource for MockTime {
    fn now(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
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
        1_700_000_000_000_000_000 + self.now()
    }
}

/// RAM for a test.
pub fn memory() -> GuestMemory {
    GuestMemory::new(&[Region { start: 0, len: MEMORY, read_only: false }]).unwrap()
}

/// What a test's processor is connected to.
pub fn wires() -> Wires {
    wires_for("host")
}

/// The same with a named model.
pub fn wires_for(model: &str) -> Wires {
    Wires {
        bus: Arc::new(MockBus::default()),
        interrupts: Arc::new(MockInterrupts::default()),
        time: Arc::new(MockTime::default()),
        recorder: None,
        model: Arc::new(CpuModel::parse(model, 1).unwrap()),
    }
}

/// A processor as after power-up.
pub fn real() -> Cpu {
    let native = Native { unit: NativeUnit::new().unwrap(), insns: Vec::new() };
    let mut cpu = Cpu::power_up(0, memory(), wires(), native);
    cpu.set_segment(SegmentRegister::Cs, Segment::real_mode(0, true));
    cpu.registers.set(4, 0x8000);
    cpu.rip = 0x7c00;
    cpu
}

/// A processor in 32-bit protected mode at CPL 0, with flat segments and paging off.
pub fn protected() -> Cpu {
    let mut cpu = real();
    write_tables(&mut cpu, 8);
    put(&cpu, GDT + u64::from(TASK), 0x0000_8900_3000_0067u64);
    put(&cpu, TSS + 4, KERNEL_STACK as u32);
    put(&cpu, TSS + 8, u32::from(KERNEL_DATA));
    cpu.cr0 = Cr0::PE | Cr0::ET | Cr0::NE;
    load_all(&mut cpu, KERNEL_CODE32, KERNEL_DATA);
    cpu.tr = Descriptor(0x0000_8b00_3000_0067).segment(Selector(TASK));
    cpu.update_paging();
    cpu.rip = CODE;
    cpu
}

/// A processor in 64-bit mode at CPL 0. Memory is mapped one to one, for CPL 3 too.
pub fn long() -> Cpu {
    let mut cpu = real();
    write_tables(&mut cpu, 16);
    put(&cpu, GDT + u64::from(TASK), 0x0000_8900_3000_0067u64);
    put(&cpu, TSS + 4, KERNEL_STACK);
    put(&cpu, TSS + 0x24, IST1);
    put(&cpu, TABLES, TABLES + 0x1007);
    put(&cpu, TABLES + 0x1000, TABLES + 0x2007);
    for page in 0..MEMORY >> 21 {
        put(&cpu, TABLES + 0x2000 + 8 * page, page << 21 | 0x87);
    }
    cpu.cr0 = Cr0::PE | Cr0::PG | Cr0::ET | Cr0::NE | Cr0::WP;
    cpu.cr3 = TABLES;
    cpu.cr4 = Cr4::PAE | Cr4::OSFXSR;
    cpu.efer = Efer::LME | Efer::LMA | Efer::SCE | Efer::NXE;
    load_all(&mut cpu, KERNEL_CODE64, KERNEL_DATA);
    cpu.tr = Descriptor(0x0000_8b00_3000_0067).segment(Selector(TASK));
    cpu.update_paging();
    cpu.rip = CODE;
    cpu
}

/// Takes a protected-mode or 64-bit processor to CPL 3, to 64-bit or 32-bit code as it is.
pub fn to_user(cpu: &mut Cpu) {
    let code = if cpu.is_long() { USER_CODE64 } else { USER_CODE32 };
    load_all(cpu, code, USER_DATA);
}

/// Loads all segment registers as a processor does that finds nothing wrong with them.
pub fn load_all(cpu: &mut Cpu, code: u16, data: u16) {
    use SegmentRegister::{Cs, Ds, Es, Fs, Gs, Ss};
    for (register, selector) in [(Cs, code), (Ss, data), (Ds, data), (Es, data), (Fs, data), (Gs, data)] {
        let segment = descriptor(cpu, selector).segment(Selector(selector));
        let attributes = segment.attributes | Attributes::ACCESSED;
        cpu.set_segment(register, Segment { attributes, ..segment });
    }
    cpu.registers.set(4, STACK);
}

/// A descriptor of the global table as it stands in memory.
pub fn descriptor(cpu: &Cpu, selector: u16) -> Descriptor {
    Descriptor(get(cpu, GDT + u64::from(selector & !7)))
}

fn write_tables(cpu: &mut Cpu, gate_size: u64) {
    for (selector, descriptor) in DESCRIPTORS {
        put(cpu, GDT + u64::from(selector & !7), descriptor);
    }
    cpu.gdtr = TableRegister { base: GDT, limit: 0x7f };
    cpu.idtr = TableRegister { base: IDT, limit: (256 * gate_size - 1) as u16 };
}

/// Where [`set_gate`] lets a vector's handler be.
pub fn handler(vector: u8) -> u64 {
    CODE + 0x1000 + 16 * u64::from(vector)
}

/// Writes an interrupt gate of the processor's present mode for a vector, usable from `dpl`.
pub fn set_gate(cpu: &Cpu, vector: u8, dpl: u8, stack: u8) {
    set_gate_of(cpu, vector, 0x8e | dpl << 5, stack);
}

/// The same with the whole type byte: present, DPL and type.
pub fn set_gate_of(cpu: &Cpu, vector: u8, type_byte: u8, stack: u8) {
    let code = if cpu.is_long() { KERNEL_CODE64 } else { KERNEL_CODE32 };
    let offset = handler(vector);
    let low = offset & 0xffff
        | u64::from(code) << 16
        | u64::from(stack) << 32
        | u64::from(type_byte) << 40
        | (offset >> 16 & 0xffff) << 48;
    let size = if cpu.is_long() { 16 } else { 8 };
    put(cpu, IDT + size * u64::from(vector), low);
    if size == 16 {
        put(cpu, IDT + size * u64::from(vector) + 8, offset >> 32);
    }
}

/// Stores at a physical address.
pub fn put<T: Scalar>(cpu: &Cpu, address: u64, value: T) {
    cpu.memory.store(address, value);
}

/// Loads from a physical address.
pub fn get<T: Scalar>(cpu: &Cpu, address: u64) -> T {
    cpu.memory.load(address)
}

/// The 64-bit or 32-bit values on top of the stack.
pub fn stack<const N: usize>(cpu: &Cpu, size: u64) -> [u64; N] {
    let top = cpu.registers.get(4);
    std::array::from_fn(|n| {
        let at = top + size * n as u64;
        if size == 8 { get::<u64>(cpu, at) } else { u64::from(get::<u32>(cpu, at)) }
    })
}

/// Runs one instruction, given by its bytes, at RIP.
///
/// # Errors
/// The exception that it raises, with RIP at the instruction.
pub fn run(cpu: &mut Cpu, bytes: &[u8]) -> Result<(), Exception> {
    let rip = cpu.rip;
    let mut insns = Vec::new();
    let decoded = cpu.decode(rip, bytes, 1, &mut insns);
    assert_eq!((insns.len(), decoded.len), (1, bytes.len()), "not one instruction: {bytes:x?}");
    cpu.block_rip = rip;
    cpu.rip = rip.wrapping_add(bytes.len() as u64);
    cpu.mmu.executing = [NO_PAGE; 2];
    match (insns[0].run)(cpu, &insns[0]) {
        Ok(()) | Err(Stop::EndBlock) => Ok(()),
        Err(Stop::Fault) => {
            cpu.rip = rip;
            Err(cpu.fault.take().expect("a fault"))
        }
        Err(stop) => panic!("{stop:?}"),
    }
}
