//! The machine that random programs run on: a window of pages of every kind, and handlers that halt.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use engine::{Attention, Bus, Signals, Space, VcpuState, VmExit};
use x86::{Cr4, Flags, Segment, SegmentRegister};

use super::generator::{Program, Random};
use crate::interpreter::Interpreter;
use crate::jit::Settings;
use crate::shared::{Peers, Shared};
use crate::testing::{self, IST1, TABLES, get, put};

/// Where programs are.
pub const PROGRAM: u64 = 0x10_4000;
/// Linear address of the window of pages of every kind.
pub const WINDOW: u64 = 0x40_0000;
/// Its pages; behind them nothing is mapped.
pub const WINDOW_PAGES: u64 = 16;
/// Where the window's pages lie in RAM.
const DATA: u64 = 0x30_0000;
/// Counts a program's rounds.
pub const COUNTER: u64 = 0x28_0000;
/// The program's stack ends here.
pub const STACK_PAGE: u64 = 0x20_7000;
/// The vector of the interrupt that devices raise.
pub const VECTOR: u8 = 0x40;

const PRESENT: u64 = 1;
const WRITE: u64 = 2;
const USER: u64 = 4;
const DIRTY: u64 = 0x60;
const NO_EXECUTE: u64 = 1 << 63;

/// What programs may change, and what is compared: start and length in RAM.
const CHANGES: [(u64, usize); 5] =
    [(0, 0x1_6000), (PROGRAM - 0x4000, 0x8000), (0x20_0000, 0x1_0000), (COUNTER, 0x1000), (DATA, 0x1_0000)];

/// A device that counts its accesses, and raises an interrupt at every so many.
struct Device {
    attention: Arc<Attention>,
    interrupts: Arc<testing::MockInterrupts>,
    accesses: AtomicU64,
    is_quiet: AtomicBool,
}

impl Device {
    fn accessed(&self) {
        let third = self.accesses.fetch_add(1, Ordering::Relaxed).is_multiple_of(3);
        if third && !self.is_quiet.load(Ordering::Relaxed) {
            *self.interrupts.pending.lock().unwrap() = Some(VECTOR);
            self.attention.raise(Signals::INTERRUPT);
        }
    }
}

impl Bus for Device {
    fn read(&self, _: Space, address: u64, data: &mut [u8]) {
        self.accessed();
        data.fill(address as u8 ^ 0x5a);
    }
    fn write(&self, _: Space, _: u64, _: &[u8]) {
        self.accessed();
    }
}

/// One of the machines that are compared.
pub struct Machine {
    pub interpreter: Interpreter,
    pub attention: Arc<Attention>,
    interrupts: Arc<testing::MockInterrupts>,
    device: Arc<Device>,
    /// The states at CPL 0 and 3.
    states: [VcpuState; 2],
    bits: u32,
    image: Vec<Vec<u64>>,
}

/// What a program starts with.
pub struct Start {
    pub gprs: [u64; 16],
    pub flags: u64,
    pub user: bool,
    pub smap: bool,
    pub task_switched: bool,
    pub writable_code: bool,
    /// Whether the code of programs before is kept, and has to be found stale.
    pub keeps_code: bool,
    pub bases: [u64; 2],
    pub data: u64,
}

impl Start {
    pub fn new(random: &mut Random) -> Self {
        let mut gprs = [0; 16];
        gprs.iter_mut().for_each(|gpr| *gpr = random.value());
        gprs[4] = STACK_PAGE + 0x1000 - 8 * random.below(8);
        Self {
            gprs,
            flags: random.next() & Flags::ARITHMETIC.bits() | random.below(2) << 9,
            user: random.one_in(2),
            smap: random.one_in(12),
            task_switched: random.one_in(12),
            writable_code: random.one_in(6),
            keeps_code: random.one_in(2),
            bases: [random.below(64), random.value()],
            data: random.next(),
        }
    }
}

impl Machine {
    /// The device raises no interrupts: a region takes them later than a block.
    pub fn quiet(self) -> Self {
        self.device.is_quiet.store(true, Ordering::Relaxed);
        self
    }

    /// For code of so many bits.
    pub fn new(bits: u32, jit: Option<Settings>) -> Self {
        let mut cpu = testing::long();
        cpu.cr4 |= Cr4::FSGSBASE | Cr4::OSFXSR | Cr4::OSXMMEXCPT;
        write_tables(&cpu);
        for vector in (0..20).chain([VECTOR]) {
            testing::set_gate(&cpu, vector, 3, 1);
            put(&cpu, testing::handler(vector), 0xf4u8);
        }
        // Where SYSCALL leads without an OS that set it up.
        put(&cpu, 0, 0xf4u8);
        cpu.update_paging();
        let attention = Attention::new();
        let interrupts = Arc::new(testing::MockInterrupts::default());
        let device = Arc::new(Device {
            attention: attention.clone(),
            interrupts: interrupts.clone(),
            accesses: AtomicU64::new(0),
            is_quiet: AtomicBool::new(false),
        });
        (cpu.wires.interrupts, cpu.wires.bus) = (interrupts.clone(), device.clone());
        if bits == 32 {
            // All of RAM but not all addresses.
            put(
                &cpu,
                testing::GDT + u64::from(testing::FREE),
                0x00c0_f300_0000_0000u64 | (testing::MEMORY >> 12) + 0x1ff,
            );
            testing::load_all(&mut cpu, testing::KERNEL_CODE32, testing::KERNEL_DATA);
        }
        let kernel = cpu.state();
        let code = if bits == 32 { testing::USER_CODE32 } else { testing::USER_CODE64 };
        testing::load_all(&mut cpu, code, testing::USER_DATA);
        let user = cpu.state();
        let image = CHANGES.iter().map(|&(at, len)| read(&cpu, at, len)).collect();
        let peers = Peers::join(Arc::new(Shared::new(1)), 0, attention.clone());
        let mut interpreter = Interpreter::new(cpu, attention.clone(), peers);
        if let Some(settings) = jit {
            interpreter.enable_jit_with(settings).unwrap();
        }
        Self { interpreter, attention, interrupts, device, states: [kernel, user], bits, image }
    }

    /// Puts a program and its data in place.
    pub fn prepare(&mut self, program: &Program, start: &Start) {
        let cpu = &mut self.interpreter.cpu;
        for (&(at, _), bytes) in CHANGES.iter().zip(&self.image) {
            for (at, &word) in (at..).step_by(8).zip(bytes) {
                if get::<u64>(cpu, at) != word {
                    put(cpu, at, word);
                }
            }
        }
        let mut data = Random(start.data);
        (DATA..DATA + 0x1_0000).step_by(8).for_each(|at| put(cpu, at, data.next()));
        cpu.memory.write_bytes(program.rip, &program.bytes);
        put(cpu, COUNTER, 4u32);
        // As a device's writes do it.
        for (at, len) in CHANGES {
            (at..at + len as u64).step_by(4096).for_each(|page| {
                cpu.memory.marks().written(page);
            });
        }
        if start.writable_code {
            put(cpu, TABLES + 0x5000 + 8 * 13, PROGRAM | PRESENT | WRITE | USER);
        }
        let mut state = self.states[usize::from(start.user)].clone();
        state.gprs = start.gprs;
        let mask = u64::MAX >> (64 - self.bits);
        state.rip = program.rip;
        state.rflags = Flags::from_bits_retain(start.flags) | Flags::FIXED;
        state.cr4.set(Cr4::SMAP, start.smap);
        state.cr0.set(x86::Cr0::TS, start.task_switched);
        for (register, base) in [SegmentRegister::Fs, SegmentRegister::Gs].into_iter().zip(start.bases) {
            state.segments[register as usize].base = base & mask;
        }
        cpu.set_state(&state).unwrap();
        cpu.instructions = 0;
        (cpu.fault, cpu.exit) = (None, None);
        if !start.keeps_code {
            self.interpreter.reset_code();
        }
        *self.interrupts.pending.lock().unwrap() = None;
        self.interrupts.priority.store(0, Ordering::Relaxed);
        self.device.accesses.store(0, Ordering::Relaxed);
    }

    /// Runs until it halts or dies. `None`: it goes on for too long.
    pub fn run(&mut self) -> Option<String> {
        for _ in 0..3 {
            match self.interpreter.run() {
                VmExit::Interrupted => {}
                exit => return Some(format!("{exit:?}")),
            }
        }
        None
    }

    /// Whether it stopped in the program, or by a fault of it. What strays into random bytes may see undefined flags.
    pub fn is_in(&self, program: &Program) -> bool {
        let cpu = &self.interpreter.cpu;
        let frame = cpu.registers.get(4);
        let mut places = vec![cpu.rip.wrapping_sub(1)];
        if (0..=VECTOR).any(|vector| cpu.rip == testing::handler(vector) + 1)
            && (IST1 - 64..IST1).contains(&frame)
        {
            places.extend([get::<u64>(cpu, frame), get::<u64>(cpu, frame + 8)]);
        }
        places.iter().any(|place| (program.rip..program.end).contains(place))
    }

    /// Whether the program is as it was.
    pub fn holds(&self, program: &Program) -> bool {
        (program.rip..).zip(&program.bytes).all(|(at, &byte)| get::<u8>(&self.interpreter.cpu, at) == byte)
    }

    /// Goes on behind a halt: at the next instruction after a fault, where an interrupt or trap came after it. Gives
    /// false where the program has ended or left its code.
    pub fn resume(&mut self, program: &Program, user: bool) -> bool {
        let cpu = &mut self.interpreter.cpu;
        let Some(vector) = (0..=VECTOR).find(|&v| cpu.rip == testing::handler(v) + 1) else { return false };
        let coded = matches!(vector, 8 | 10..=14 | 17);
        let frame = cpu.registers.get(4);
        if vector == 8 || !(IST1 - 64..IST1).contains(&frame) {
            return false;
        }
        let frame = frame + if coded { 8 } else { 0 };
        let at: u64 = get(cpu, frame);
        let after = if matches!(vector, 1 | 3 | VECTOR) {
            at
        } else {
            match program.starts.iter().find(|&&start| start > at) {
                Some(&next) if at >= program.rip => next,
                _ => return false,
            }
        };
        if !(program.rip..program.end).contains(&after) {
            return false;
        }
        self.return_to(frame, after, user);
        true
    }

    /// What IRETQ from a handler does with the frame at `frame`, but to RIP `after`.
    pub fn return_to(&mut self, frame: u64, after: u64, user: bool) {
        let cpu = &mut self.interpreter.cpu;
        let (code, stack) =
            (self.states[usize::from(user)].segments[1], self.states[usize::from(user)].segments[2]);
        cpu.set_segment(SegmentRegister::Cs, code);
        cpu.set_segment(SegmentRegister::Ss, Segment { ..stack });
        cpu.set_rflags(get::<u64>(cpu, frame + 16), Flags::ARITHMETIC | Flags::IF | Flags::DF | Flags::AC);
        cpu.system_flags.remove(Flags::TF | Flags::RF);
        cpu.registers.set(4, get(cpu, frame + 24));
        (cpu.rip, cpu.halted, cpu.shadow) = (after, false, false);
    }

    /// An interrupt is there to be taken.
    pub fn interrupt(&self) {
        *self.interrupts.pending.lock().unwrap() = Some(VECTOR);
        self.attention.raise(Signals::INTERRUPT);
    }
}

/// The first place in RAM that differs.
pub fn difference(one: &Machine, other: &Machine) -> Option<u64> {
    let (one, other) = (&one.interpreter.cpu, &other.interpreter.cpu);
    let places = CHANGES.iter().flat_map(|&(at, len)| (at..at + len as u64).step_by(8));
    places.into_iter().find(|&at| get::<u64>(one, at) != get::<u64>(other, at))
}

fn read(cpu: &crate::cpu::Cpu, at: u64, len: usize) -> Vec<u64> {
    (at..at + len as u64).step_by(8).map(|at| get(cpu, at)).collect()
}

/// The first MiB cannot be written; code only through the window; the window has one page of each kind.
fn write_tables(cpu: &crate::cpu::Cpu) {
    for descriptor in (0..0x60u64).step_by(8) {
        let old: u64 = get(cpu, testing::GDT + descriptor);
        if old != 0 && descriptor != u64::from(testing::TASK) && descriptor != u64::from(testing::TASK) + 8 {
            put(cpu, testing::GDT + descriptor, old | 1 << 40);
        }
    }
    for table in 0..3u64 {
        put(cpu, TABLES + 0x2000 + 8 * table, TABLES + 0x3000 + 0x1000 * table | PRESENT | WRITE | USER);
    }
    for page in 0..512u64 {
        let low = match page {
            0..0x100 => PRESENT,
            0x1ff => PRESENT | WRITE,
            _ => PRESENT | USER,
        };
        put(cpu, TABLES + 0x3000 + 8 * page, page << 12 | low);
        // Only what is compared, and put back for the next program.
        let high = match page {
            0xf => PRESENT | WRITE,
            0..0xf | 0x80 | 0x100..0x110 => PRESENT | WRITE | USER,
            _ => 0,
        };
        put(cpu, TABLES + 0x4000 + 8 * page, 0x20_0000 | page << 12 | high);
    }
    let all = PRESENT | WRITE | USER;
    for page in 0..WINDOW_PAGES {
        let own = DATA + (page << 12);
        let entry = match page {
            3 => 0,
            5 => own | PRESENT | USER,
            7 => own | PRESENT | WRITE,
            9 => 0x8000_0000 | all,
            10 => DATA | all,
            11 => own | all | NO_EXECUTE,
            13 => PROGRAM | PRESENT | USER,
            15 => own | all | 1 << 51,
            12 => own | all,
            _ => own | all | DIRTY,
        };
        put(cpu, TABLES + 0x5000 + 8 * page, entry);
    }
}
