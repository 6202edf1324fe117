//! Random bytes as code, with random state, tables and descriptors, in every mode and at CPL 0 and 3: the software CPU
//! neither panics nor runs on when it is kicked.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use emulator::{Shared, SoftVcpu, VcpuConfig};
use engine::{Attention, Bus, Vcpu, VcpuState};
use guest_memory::{GuestMemory, Region};
use isa_fuzz::interpreter::wires;
use isa_fuzz::random::Random;
use x86::descriptor::Attributes;
use x86::{Cr0, Cr4, Efer, Flags, Segment, Selector, TableRegister};

const MEMORY: u64 = 1 << 20;
const CASES: u64 = 300;
/// How long each may run before it is kicked.
const PATIENCE: Duration = Duration::from_millis(3);

/// Page tables of plausible entries in the first pages, then code and data.
fn fill(memory: &GuestMemory, random: &mut Random) {
    for page in 0..MEMORY >> 12 {
        let dense = random.one_in(2);
        for at in (0..4096).step_by(8) {
            let value = match (page, dense) {
                (0..16, true) => random.below(256) << 12 | random.next() & 0x8000_0000_0000_01ff | 7,
                (16..24, _) => random.next() & 0x00cf_ffff_ffff_ffff | 0x8000 << 32,
                _ => random.next(),
            };
            memory.store(page << 12 | at, value);
        }
    }
}

fn segment(random: &mut Random, long: bool, big: bool, cpl: u8, code: bool) -> Segment {
    let kind = if code { 0xb } else { 0x3 };
    let size = match (code && long, big) {
        (true, _) => 0x2000,
        (false, true) => 0x4000,
        (false, false) => 0,
    };
    let attributes = Attributes::from_bits_retain(kind | 0x90 | u32::from(cpl) << 5 | size);
    let (base, limit) = if random.one_in(2) { (0, 0xffff_ffff) } else { (random.below(MEMORY), 0xffff) };
    Segment { selector: Selector(random.next() as u16 & !3 | u16::from(cpl)), base, limit, attributes }
}

fn state(random: &mut Random) -> VcpuState {
    let (protected, paging) = (!random.one_in(4), random.one_in(2));
    let paging = protected && paging;
    let long = paging && random.one_in(2);
    let (wide, big) = (long && random.one_in(2), random.one_in(2));
    let cpl = if protected && random.one_in(2) { 3 } else { 0 };
    let mut state = VcpuState::reset();
    state
        .gprs
        .iter_mut()
        .for_each(|gpr| *gpr = if random.one_in(2) { random.below(MEMORY) } else { random.operand() });
    state.rip = random.below(if big || wide { MEMORY } else { 0xffff });
    state.rflags = Flags::from_bits_truncate(random.next() & 0x27_4dd5) | Flags::FIXED;
    if !protected || long {
        state.rflags -= Flags::VM;
    }
    for (n, slot) in state.segments.iter_mut().enumerate() {
        *slot = segment(random, wide, big, cpl, n == 1);
    }
    let bits = |flag: bool, value| if flag { value } else { Cr0::empty() };
    state.cr0 = Cr0::ET | bits(protected, Cr0::PE) | bits(paging, Cr0::PG) | bits(random.one_in(2), Cr0::WP);
    state.cr3 = random.below(16) << 12;
    state.cr4 =
        Cr4::OSFXSR | Cr4::OSXMMEXCPT | if long || random.one_in(2) { Cr4::PAE } else { Cr4::empty() };
    if long {
        state.efer = Efer::LME | Efer::LMA | Efer::SCE | Efer::NXE;
    }
    let table = |random: &mut Random| TableRegister {
        base: 0x1_0000 + random.below(0x8000),
        limit: random.next() as u16,
    };
    (state.gdtr, state.idtr) = (table(random), table(random));
    state
}

fn vcpu(memory: &GuestMemory, attention: &Arc<Attention>, jit: bool) -> SoftVcpu {
    let wires = wires();
    SoftVcpu::new(VcpuConfig {
        id: 0,
        memory: memory.clone(),
        interrupts: wires.interrupts,
        time: wires.time,
        attention: attention.clone(),
        cpu: wires.model,
        recorder: None,
        shared: Arc::new(Shared::new(1)),
        jit,
    })
    .expect("a processor")
}

fn random_code(jit: bool) {
    let mut random = Random::new(7, 7);
    let attention = Attention::new();
    let memory = GuestMemory::new(&[Region { start: 0, len: MEMORY, read_only: false }]).expect("memory");
    let mut vcpu = vcpu(&memory, &attention, jit);
    let bus: Arc<dyn Bus> = wires().bus;
    let over = Arc::new(AtomicBool::new(false));
    let kicker = std::thread::spawn({
        let (kick, over) = (vcpu.kick(), over.clone());
        move || {
            while !over.load(Ordering::Relaxed) {
                std::thread::sleep(PATIENCE);
                kick.kick();
            }
        }
    });
    let mut slowest = Duration::ZERO;
    for _ in 0..CASES {
        fill(&memory, &mut random);
        if vcpu.set_state(&state(&mut random)).is_err() {
            continue;
        }
        let start = Instant::now();
        // Ten goes: what ends with a shutdown stays there.
        for _ in 0..10 {
            let _ = vcpu.run(&bus).expect("an exit");
        }
        slowest = slowest.max(start.elapsed());
    }
    over.store(true, Ordering::Relaxed);
    kicker.join().expect("the kicker");
    assert!(slowest < Duration::from_secs(10), "a run took {slowest:?}");
}

#[test]
fn interpreted_random_code_never_panics_and_ends_when_kicked() {
    random_code(false);
}

#[test]
fn translated_random_code_never_panics_and_ends_when_kicked() {
    random_code(true);
}
