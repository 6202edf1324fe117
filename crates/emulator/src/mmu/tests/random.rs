//! Random page tables, descriptors, gates and task-state segments under random instructions that use them: whatever a
//! guest leaves in its tables, no instruction panics, and each ends. The environment variable `RINGSIDE_RANDOM_SCALE` makes
//! it more, with other numbers.

use engine::VcpuState;
use x86::{Cr0, Cr4, Descriptor, Efer, Flags, Segment, SegmentRegister, Selector, TableRegister};

use crate::cpu::Cpu;
use crate::insn::Stop;
use crate::instructions::event::Event;
use crate::mmu::{Access, NO_PAGE, View};
use crate::testing::{MEMORY, long, put};

/// A generator of numbers (xorshift64*).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 32) % n
    }

    fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    fn one_of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len() as u64) as usize]
    }

    /// An address: in RAM, somewhere, or where canonical ones, pages and 32 bits end.
    fn address(&mut self) -> u64 {
        match self.below(8) {
            0..=4 => self.below(MEMORY),
            5 => self.next(),
            6 => self.below(MEMORY) & !0xfff | 0xff8 + self.below(8),
            _ => {
                let end = self.one_of(&[0, 1 << 32, 1 << 47, 1 << 56, !0 << 47, !0 << 56, MEMORY]);
                end.wrapping_add(self.below(32)).wrapping_sub(16)
            }
        }
    }
}

/// How much of it, and the generator: another one for another scale.
fn start(seed: u64) -> (u32, Random) {
    let scale = std::env::var("RINGSIDE_RANDOM_SCALE").ok().and_then(|text| text.parse().ok()).unwrap_or(1);
    (scale, Random(seed ^ u64::from(scale)))
}

/// Where the tables are: all of them in a few pages, so that they meet.
const TABLES: u64 = 0x1_0000;
const TABLE_PAGES: u64 = 8;
/// The descriptor tables and the task-state segment.
const SYSTEM: u64 = 0x1000;
const SYSTEM_BYTES: u64 = 0x3000;
/// Where code is: what the tables map may be any of it.
const CODE: u64 = 0x10_0000;

fn page_tables(random: &mut Random, cpu: &Cpu) {
    for slot in 0..TABLE_PAGES * 512 {
        let entry = match random.below(8) {
            0..=3 => TABLES + (random.below(TABLE_PAGES) << 12) | 0x7,
            4 => random.below(MEMORY >> 12) << 12 | 0x67,
            5 => random.below(MEMORY >> 21) << 21 | 0xe7,
            6 => random.next() & random.next(),
            _ => random.next(),
        };
        let flipped = if random.chance(10) { 1 << random.below(64) } else { 0 };
        put(cpu, TABLES + 8 * slot, entry ^ flipped);
    }
}

/// A descriptor or gate of any type, with a base and limit that tend to reach RAM.
fn descriptor(random: &mut Random) -> u64 {
    let mut value = random.next();
    if random.chance(70) {
        value &= 0x00f0_ff3f_ffff_ffff;
    }
    if random.chance(80) {
        value |= 1 << 47;
    }
    if random.chance(60) {
        // As gates: a selector within the table.
        value = value & !(0xffff << 16) | (random.below(64) << 3 | random.below(4)) << 16;
    }
    value
}

fn system_tables(random: &mut Random, cpu: &Cpu) {
    for slot in 0..SYSTEM_BYTES / 8 {
        put(cpu, SYSTEM + 8 * slot, descriptor(random));
    }
}

/// Instructions that read tables, change modes, or move much; some with an operand at RBX or in RAX.
const INSTRUCTIONS: [&[u8]; 60] = [
    &[0x8e, 0xd8],                               // mov %eax, %ds
    &[0x8e, 0xd0],                               // mov %eax, %ss
    &[0x8e, 0xe8],                               // mov %eax, %gs
    &[0x0f, 0x00, 0xd0],                         // lldt %eax
    &[0x0f, 0x00, 0xd8],                         // ltr %eax
    &[0x0f, 0x00, 0xe0],                         // verr %eax
    &[0x0f, 0x02, 0xc8],                         // lar %eax, %ecx
    &[0x0f, 0x03, 0xc8],                         // lsl %eax, %ecx
    &[0x0f, 0xb2, 0x23],                         // lss (%ebx), %esp
    &[0x0f, 0xb4, 0x13],                         // lfs (%ebx), %edx
    &[0xff, 0x1b],                               // lcall *(%ebx)
    &[0xff, 0x2b],                               // ljmp *(%ebx)
    &[0x48, 0xff, 0x1b],                         // rex.w lcall *(%rbx)
    &[0xcb],                                     // lret
    &[0xca, 0x08, 0x00],                         // lret $8
    &[0xcf],                                     // iret
    &[0x48, 0xcf],                               // iretq
    &[0xcd, 0x30],                               // int $0x30
    &[0xcc],                                     // int3
    &[0xf1],                                     // int1
    &[0x0f, 0x0b],                               // ud2
    &[0x0f, 0x05],                               // syscall
    &[0x48, 0x0f, 0x07],                         // sysretq
    &[0x0f, 0x34],                               // sysenter
    &[0x48, 0x0f, 0x35],                         // sysexitq
    &[0x0f, 0x22, 0xc0],                         // mov %eax, %cr0
    &[0x0f, 0x22, 0xd8],                         // mov %eax, %cr3
    &[0x0f, 0x22, 0xe0],                         // mov %eax, %cr4
    &[0x0f, 0x22, 0xd9],                         // mov %ecx, %cr3
    &[0x0f, 0x30],                               // wrmsr
    &[0x0f, 0x01, 0x13],                         // lgdt (%ebx)
    &[0x0f, 0x01, 0x1b],                         // lidt (%ebx)
    &[0x0f, 0x01, 0x3b],                         // invlpg (%ebx)
    &[0x66, 0x0f, 0x38, 0x82, 0x03],             // invpcid (%ebx), %eax
    &[0x0f, 0x01, 0xf8],                         // swapgs
    &[0x0f, 0x01, 0xca],                         // clac
    &[0x0f, 0x01, 0xcb],                         // stac
    &[0x0f, 0x01, 0xef],                         // wrpkru
    &[0x0f, 0x01, 0xd1],                         // xsetbv
    &[0x0f, 0xae, 0x23],                         // xsave (%ebx)
    &[0x0f, 0xae, 0x2b],                         // xrstor (%ebx)
    &[0x0f, 0xc7, 0x23],                         // xsavec (%ebx)
    &[0x0f, 0xae, 0x03],                         // fxsave (%ebx)
    &[0x9d],                                     // popf
    &[0x50],                                     // push %eax
    &[0x5b],                                     // pop %ebx
    &[0xc8, 0x40, 0x00, 0x1f],                   // enter $64, $31
    &[0x61],                                     // popa
    &[0xc3],                                     // ret
    &[0xff, 0xe0],                               // jmp *%eax
    &[0xff, 0x13],                               // call *(%ebx)
    &[0x8b, 0x03],                               // mov (%ebx), %eax
    &[0x89, 0x03],                               // mov %eax, (%ebx)
    &[0xf0, 0x48, 0x0f, 0xc7, 0x0b],             // lock cmpxchg16b (%rbx)
    &[0xf3, 0xa4],                               // rep movsb
    &[0xf3, 0x48, 0xab],                         // rep stosq
    &[0xf3, 0x6c],                               // rep insb
    &[0x62, 0xf1, 0x7c, 0x48, 0x11, 0x03],       // vmovups %zmm0, (%rbx)
    &[0x62, 0xf2, 0x7d, 0x49, 0x90, 0x0c, 0x03], // vpgatherdd (%rbx, %zmm0), %zmm1 {%k1}
    &[0xee],                                     // out %al, %dx
];

fn code(random: &mut Random, cpu: &Cpu) {
    for page in 0..16 {
        let mut at = CODE + (page << 16);
        for _ in 0..256 {
            if random.chance(5) {
                put(cpu, at, random.next());
            }
            for &byte in random.one_of(&INSTRUCTIONS) {
                put(cpu, at, byte);
                at += 1;
            }
        }
    }
}

fn start_of_code(random: &mut Random) -> u64 {
    CODE + (random.below(16) << 16) + random.below(256)
}

/// Registers of any mode. What no instruction could have made is made all the same.
fn registers(random: &mut Random, cpu: &mut Cpu) {
    let mut state = VcpuState::reset();
    state.gprs =
        std::array::from_fn(|_| if random.chance(40) { random.below(512) } else { random.address() });
    state.rip = start_of_code(random);
    let paging = random.chance(80);
    let long = paging && random.chance(50);
    state.cr0 = Cr0::ET | if paging || random.chance(70) { Cr0::PE } else { Cr0::empty() };
    state.cr0.set(Cr0::PG, paging);
    state.cr0.set(Cr0::WP, random.chance(50));
    state.cr0.set(Cr0::AM, random.chance(30));
    let allowed = cpu.wires.model.control_bits();
    state.cr4 = Cr4::from_bits_truncate(random.next()) & allowed;
    state.cr4.set(Cr4::PAE, long || random.chance(50));
    state.efer = if long { Efer::LME | Efer::LMA } else { Efer::empty() };
    state.efer.set(Efer::NXE, random.chance(70));
    state.efer.set(Efer::SCE, random.chance(70));
    state.cr3 = TABLES + (random.below(TABLE_PAGES) << 12) | random.next() & (3 << 61);
    state.xcr0 = if random.chance(50) { cpu.wires.model.xsave_states().bits() } else { 1 };
    state.gdtr = TableRegister { base: SYSTEM + 8 * random.below(64), limit: random.next() as u16 };
    state.idtr = TableRegister { base: SYSTEM + 8 * random.below(256), limit: random.next() as u16 };
    let mut segment = |register| {
        let selector = Selector(random.next() as u16);
        let mut segment = Descriptor(descriptor(random)).segment(selector);
        if random.chance(70) {
            segment = Segment::real_mode(0, register == SegmentRegister::Cs);
            segment.limit = 0xffff_ffff;
        }
        segment
    };
    use SegmentRegister::{Cs, Ds, Es, Fs, Gs, Ss};
    state.segments = [Es, Cs, Ss, Ds, Fs, Gs].map(&mut segment);
    (state.tr, state.ldtr) = (segment(Ds), segment(Ds));
    if long && random.chance(60) {
        state.segments[1] = Descriptor(0x00af_9b00_0000_ffff).segment(Selector(8));
    }
    let changeable = Flags::ARITHMETIC | Flags::IF | Flags::IOPL | Flags::NT | Flags::AC;
    state.rflags = Flags::from_bits_truncate(random.next()) & changeable | Flags::FIXED;
    state.rflags.set(Flags::VM, !long && state.cr0.contains(Cr0::PE) && random.chance(10));
    cpu.set_state(&state).unwrap();
    cpu.write_pkru(random.next() as u32);
}

/// Fetches, decodes and runs one instruction, and delivers what it raises. Gives whether there is a next one.
fn step(cpu: &mut Cpu) -> bool {
    let rip = cpu.rip;
    let mut bytes = [0; 15];
    let base = if cpu.mode.is_64() { 0 } else { cpu.bases[1] };
    let fetched = (0..15).try_for_each(|n| {
        let at = rip.wrapping_add(base).wrapping_add(n);
        cpu.fetch_bytes(cpu.mmu.view, at, &mut bytes[n as usize..][..1])
    });
    let mut insns = Vec::new();
    let stop = fetched.and_then(|()| {
        let decoded = cpu.decode(rip, &bytes, 1, &mut insns);
        (cpu.block_rip, cpu.mmu.executing) = (rip, [NO_PAGE; 2]);
        cpu.rip = rip.wrapping_add(decoded.len as u64);
        (insns[0].run)(cpu, &insns[0])
    });
    match stop {
        Ok(()) | Err(Stop::EndBlock) => true,
        Err(Stop::Repeat) => {
            cpu.rip = rip;
            true
        }
        Err(Stop::Fault) => {
            cpu.rip = rip;
            let fault = cpu.fault.take().unwrap();
            cpu.deliver(Event::Exception(fault)).is_ok()
        }
        Err(Stop::Exit | Stop::OwnPage) => false,
    }
}

#[test]
fn random_tables_and_descriptors_end_every_instruction() {
    let (scale, mut random) = start(0x7ab1_e5ee_d5ee_d001);
    let mut cpu = long();
    let (mut steps, mut modes) = (0u32, [0u32; 4]);
    for round in 0..1500 * scale {
        if round % 10 == 0 {
            page_tables(&mut random, &cpu);
        }
        system_tables(&mut random, &cpu);
        code(&mut random, &cpu);
        registers(&mut random, &mut cpu);
        modes[usize::from(cpu.mode.is_long()) * 2 + usize::from(cpu.cr0.contains(Cr0::PG))] += 1;
        for _ in 0..64 {
            steps += 1;
            let goes_on = step(&mut cpu);
            let vector = random.next() as u8;
            let delivered = !random.chance(5) || cpu.deliver(Event::Interrupt(vector)).is_ok();
            if !(goes_on && delivered) || random.chance(10) {
                // Shut down, or nearly: the state that this left goes on elsewhere.
                cpu.rip = start_of_code(&mut random);
            }
        }
    }
    assert!(
        steps == 96_000 * scale && modes[0] > 100 && modes[1] > 100 && modes[3] > 100,
        "{steps} {modes:?}"
    );
}

#[test]
fn random_tables_translate_or_fault() {
    let (scale, mut random) = start(0x0dd5_eed5_0fac_ce55);
    let mut cpu = long();
    let (mut found, mut faults) = (0u32, 0u32);
    for _ in 0..200 * scale {
        page_tables(&mut random, &cpu);
        registers(&mut random, &mut cpu);
        for _ in 0..500 {
            let view =
                random.one_of(&[View::Supervisor, View::SupervisorUnguarded, View::User, View::UserAligned]);
            let address = if cpu.is_long() { random.next() << 16 >> 16 } else { random.next() & 0xffff_ffff };
            let address = if random.chance(20) { random.address() } else { address };
            let access = random.one_of(&[Access::Read, Access::Write, Access::Fetch]);
            let result = match random.below(4) {
                0 => cpu.load_as::<u64>(view, address).map(|_| ()),
                1 => cpu.store_as(view, address, random.next() as u32),
                2 => cpu.read_bytes(view, address, &mut [0; 2696]),
                _ => cpu.target(view, address, access).map(|_| ()),
            };
            match result {
                Ok(()) => found += 1,
                Err(stop) => {
                    assert_eq!(stop, Stop::Fault);
                    cpu.fault.take().unwrap();
                    faults += 1;
                }
            }
        }
    }
    assert!(found > 1_000 && faults > 1_000, "{found} {faults}");
}
