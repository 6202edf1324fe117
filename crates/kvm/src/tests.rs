//! The engine with guests of a few instructions. They run wherever KVM can make a machine at all, also where it emulates
//! each instruction and [`crate::probe`] says no; elsewhere each prints that it was skipped.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use engine::{Bus, EngineError, Kick, Nothing, Signals, Space, Vcpu, VcpuState, VmExit};
use exits::{Ledger, Report};
use guest_memory::{GuestMemory, Region};
use x86::{Cr0, Flags, Gpr, Segment, Selector, msr};

use crate::tiny_guest::{CODE, TinyGuest, long_mode};
use crate::{KvmVm, VcpuConfig};

/// One access, as the bus saw it.
type Access = (Space, u64, bool, Vec<u8>);

/// Notes every access; answers reads with 0x11, 0x12, 0x13 ...; kicks the vCPU at a write to port 0x99.
#[derive(Default)]
struct Script {
    seen: Mutex<Vec<Access>>,
    kick: Mutex<Option<Kick>>,
}

impl Bus for Script {
    fn read(&self, space: Space, address: u64, data: &mut [u8]) {
        let mut seen = self.seen.lock().unwrap();
        let answered: usize = seen.iter().filter(|access| !access.2).map(|access| access.3.len()).sum();
        data.iter_mut().enumerate().for_each(|(n, byte)| *byte = (0x11 + answered + n) as u8);
        seen.push((space, address, false, data.to_vec()));
        if address == 0x99 {
            self.kick.lock().unwrap().iter().for_each(Kick::kick);
        }
    }
    fn write(&self, space: Space, address: u64, data: &[u8]) {
        self.seen.lock().unwrap().push((space, address, true, data.to_vec()));
    }
}

impl Script {
    fn seen(&self) -> Vec<Access> {
        self.seen.lock().unwrap().clone()
    }
}

fn out(port: u64, data: &[u8]) -> Access {
    (Space::Port, port, true, data.to_vec())
}

/// The result, or `None` with a line that says that the test is skipped: KVM cannot make a machine here.
fn or_skip<T>(made: Result<T, EngineError>) -> Option<T> {
    match made {
        Ok(made) => Some(made),
        Err(EngineError::Host { what: what @ ("open /dev/kvm" | "KVM_CREATE_VM"), source }) => {
            println!("skipped: {what}: {source}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// Runs a program in 64-bit mode to its end.
fn run(code: &[u8]) -> Option<(TinyGuest, Vec<Access>, VmExit)> {
    let mut guest = or_skip(TinyGuest::new(code))?;
    let script = Arc::new(Script::default());
    let bus: Arc<dyn Bus> = script.clone();
    let exit = guest.run(&bus).unwrap();
    Some((guest, script.seen(), exit))
}

#[test]
fn ports_go_to_the_bus_and_hlt_comes_back() {
    // MOV AL, 'a'; OUT 0x80, AL; MOV DX, 0x1234; IN EAX, DX; HLT
    let code = [0xb0, b'a', 0xe6, 0x80, 0x66, 0xba, 0x34, 0x12, 0xed, 0xf4];
    let Some((guest, seen, exit)) = run(&code) else { return };
    assert_eq!(exit, VmExit::Halt);
    let read = (Space::Port, 0x1234, false, vec![0x11, 0x12, 0x13, 0x14]);
    assert_eq!(seen, [out(0x80, b"a"), read]);
    let state = guest.vcpu.state().unwrap();
    assert_eq!((state.gprs[Gpr::Rax as usize], state.rip), (0x1413_1211, CODE + code.len() as u64));
}

#[test]
fn string_instructions_are_single_accesses_for_the_bus() {
    // MOV ESI, CODE+0x30; MOV ECX, 3; MOV DX, 0x70; CLD; REP OUTSW; MOV EDI, 0x5000; MOV ECX, 2; REP INSW; HLT
    let mut code =
        vec![0xbe, 0x30, 0x40, 0, 0, 0xb9, 3, 0, 0, 0, 0x66, 0xba, 0x70, 0, 0xfc, 0xf3, 0x66, 0x6f];
    code.extend([0xbf, 0, 0x50, 0, 0, 0xb9, 2, 0, 0, 0, 0xf3, 0x66, 0x6d, 0xf4]);
    code.resize(0x30, 0x90);
    code.extend(b"abcdef");
    let Some((guest, seen, exit)) = run(&code) else { return };
    assert_eq!(exit, VmExit::Halt);
    assert_eq!(seen[..3], [out(0x70, b"ab"), out(0x70, b"cd"), out(0x70, b"ef")]);
    assert!(seen[3..].iter().all(|access| access.0 == Space::Port && !access.2 && access.3.len() == 2));
    assert_eq!(guest.memory.load::<u32>(0x5000), 0x1413_1211);
}

#[test]
fn device_memory_goes_to_the_bus() {
    // MOV EBX, 0x200008; MOV DWORD [RBX], 0x04030201; MOV RAX, [RBX]; HLT
    let code = [0xbb, 8, 0, 0x20, 0, 0xc7, 0x03, 1, 2, 3, 4, 0x48, 0x8b, 0x03, 0xf4];
    let Some((guest, seen, _)) = run(&code) else { return };
    assert_eq!(seen[0], (Space::Memory, 0x20_0008, true, vec![1, 2, 3, 4]));
    assert_eq!(
        seen[1],
        (Space::Memory, 0x20_0008, false, vec![0x11, 0x12, 0x13, 0x14, 0x15, 0x16, 0x17, 0x18])
    );
    assert_eq!(guest.vcpu.state().unwrap().gprs[Gpr::Rax as usize], 0x1817_1615_1413_1211);
}

#[test]
fn a_triple_fault_is_a_shutdown_that_tells_where() {
    // LIDT of a table with limit 0 (the stack's zeros), then UD2.
    let code = [0x0f, 0x01, 0x1c, 0x24, 0x0f, 0x0b];
    let Some((_, _, exit)) = run(&code) else { return };
    let VmExit::Shutdown(event) = exit else { panic!("{exit:?}") };
    assert!(event.reason.contains("triple fault"), "{event:?}");
}

#[test]
fn another_thread_gets_a_spinning_guest_out() {
    // JMP $
    let Some(mut guest) = or_skip(TinyGuest::new(&[0xeb, 0xfe])) else { return };
    let bus: Arc<dyn Bus> = Arc::new(Script::default());
    for _ in 0..20 {
        let kick = guest.vcpu.kick();
        let kicker = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_micros(300));
            kick.kick();
        });
        assert_eq!(guest.run(&bus).unwrap(), VmExit::Interrupted);
        kicker.join().unwrap();
    }
    assert!(!guest.attention.pending());
}

#[test]
fn a_kick_before_the_run_is_not_lost() {
    let Some(mut guest) = or_skip(TinyGuest::new(&[0xeb, 0xfe])) else { return };
    let bus: Arc<dyn Bus> = Arc::new(Script::default());
    guest.vcpu.kick().kick();
    assert_eq!(guest.run(&bus).unwrap(), VmExit::Interrupted);
}

#[test]
fn no_kick_is_lost_however_it_falls() {
    // OUT 0x80, AL; JMP back: in and out of KVM all the time.
    let Some(mut guest) = or_skip(TinyGuest::new(&[0xe6, 0x80, 0xeb, 0xfc])) else { return };
    let bus: Arc<dyn Bus> = Arc::new(Nothing);
    let kick = guest.vcpu.kick();
    let (tell, told) = std::sync::mpsc::channel();
    let kicker = std::thread::spawn(move || {
        for _ in 0..500 {
            kick.kick();
            told.recv_timeout(Duration::from_secs(10)).expect("a kick was lost");
        }
    });
    for _ in 0..500 {
        assert_eq!(guest.run(&bus).unwrap(), VmExit::Interrupted);
        tell.send(()).unwrap();
    }
    kicker.join().unwrap();
}

#[test]
fn signals_that_the_engine_has_no_use_for_do_not_end_a_run() {
    let Some(mut guest) = or_skip(TinyGuest::new(&[0xf4])) else { return };
    let bus: Arc<dyn Bus> = Arc::new(Nothing);
    guest.attention.raise(Signals::INTERRUPT);
    assert_eq!(guest.run(&bus).unwrap(), VmExit::Halt);
    assert!(!guest.attention.pending());
}

#[test]
fn a_device_that_kicks_during_a_read_does_not_lose_the_data() {
    // IN AL, 0x99; JMP $
    let Some(mut guest) = or_skip(TinyGuest::new(&[0xe4, 0x99, 0xeb, 0xfe])) else { return };
    let script = Arc::new(Script::default());
    *script.kick.lock().unwrap() = Some(guest.vcpu.kick());
    let bus: Arc<dyn Bus> = script.clone();
    assert_eq!(guest.run(&bus).unwrap(), VmExit::Interrupted);
    let state = guest.vcpu.state().unwrap();
    assert_eq!((state.gprs[Gpr::Rax as usize] as u8, state.rip), (0x11, CODE + 2));
    assert_eq!(script.seen().len(), 1);
}

#[test]
fn the_state_that_is_set_is_the_state_that_is_read() {
    let Some(mut guest) = or_skip(TinyGuest::new(&[0xf4])) else { return };
    let mut state = long_mode();
    state.gprs = std::array::from_fn(|n| 0x1111_0000_0000 + n as u64);
    state.rflags = Flags::FIXED | Flags::CF | Flags::IF | Flags::DF;
    state.cr2 = 0xdead_beef;
    state.debug = [0x1000, 0x2000, 0x3000, 0x4000, 0xffff_0ff0, 0x400];
    state.xcr0 = 3;
    // XMM3, and XSTATE_BV says that x87 and SSE are in use.
    state.vector.0[160 + 3 * 16..160 + 4 * 16].fill(0x5a);
    state.msrs = vec![(msr::IA32_LSTAR, 0xffff_8000_1234_5678), (msr::IA32_KERNEL_GS_BASE, 0x7777)];
    state.halted = false;
    guest.vcpu.set_state(&state).unwrap();
    let read = guest.vcpu.state().unwrap();
    for wanted in &state.msrs {
        assert!(read.msrs.contains(wanted), "{wanted:x?}");
    }
    assert_eq!(read.vector.0[160..416], state.vector.0[160..416]);
    assert_eq!(
        VcpuState { msrs: vec![], vector: state.vector.clone(), ..read },
        VcpuState { msrs: vec![], ..state }
    );
    let again = guest.vcpu.state().unwrap();
    guest.vcpu.set_state(&again).unwrap();
    assert_eq!(without_tsc(guest.vcpu.state().unwrap()), without_tsc(again));
}

/// What time changes, left out.
fn without_tsc(mut state: VcpuState) -> VcpuState {
    state.msrs.retain(|(index, _)| !matches!(*index, msr::IA32_TSC | msr::IA32_TSC_ADJUST));
    state
}

#[test]
fn an_impossible_state_is_refused() {
    let Some(mut guest) = or_skip(TinyGuest::new(&[0xf4])) else { return };
    let paging_without_protection = VcpuState { cr0: Cr0::PG | Cr0::ET, ..long_mode() };
    assert!(matches!(guest.vcpu.set_state(&paging_without_protection), Err(EngineError::BadState(_))));
    let no_such_register = VcpuState { msrs: vec![(0x1234_5678, 1)], ..long_mode() };
    let refused = guest.vcpu.set_state(&no_such_register).unwrap_err().to_string();
    assert!(refused.contains("0x12345678"), "{refused}");
    let cleared = VcpuState { msrs: vec![(0x1234_5678, 0), (msr::IA32_LSTAR, 5)], ..long_mode() };
    guest.vcpu.set_state(&cleared).unwrap();
    assert!(guest.vcpu.state().unwrap().msrs.contains(&(msr::IA32_LSTAR, 5)));
}

#[test]
fn kicks_are_in_the_ledger() {
    let ledger = Ledger::new();
    let Some((vm, _memory)) = machine(&[0xeb, 0xfe]) else { return };
    let attention = engine::Attention::new();
    let config = VcpuConfig { id: 0, attention, cpuid: &[], recorder: Some(ledger.recorder(0)) };
    let mut vcpu = vm.create_vcpu(config).unwrap();
    vcpu.set_state(&real_mode()).unwrap();
    vcpu.kick().kick();
    let bus: Arc<dyn Bus> = Arc::new(Nothing);
    assert_eq!(vcpu.run(&bus).unwrap(), VmExit::Interrupted);
    let report = Report::new(&ledger, 1, &|_| None);
    assert_eq!(report.reasons[0].reason, "EXTERNAL_INTERRUPT");
}

/// A machine with interrupt controllers: 64 KiB of RAM with code at 0x1000, and a read-only page at 0xf0000.
fn machine(code: &[u8]) -> Option<(KvmVm, GuestMemory)> {
    let region = |start, len, read_only| Region { start, len, read_only };
    let memory = GuestMemory::new(&[region(0, 0x10000, false), region(0xf0000, 0x1000, true)]).unwrap();
    memory.write_bytes(0x1000, code);
    let vm = or_skip(KvmVm::new(&memory))?;
    Some((vm, memory))
}

/// Real mode at 0x1000, with a stack below 0x8000.
fn real_mode() -> VcpuState {
    let mut state = VcpuState { rip: 0x1000, rflags: Flags::FIXED, ..VcpuState::reset() };
    state.segments = [Segment { selector: Selector(0), ..Segment::real_mode(0, false) }; 6];
    state.segments[1] = Segment::real_mode(0, true);
    state.gprs[Gpr::Rsp as usize] = 0x8000;
    state
}

/// Runs the boot processor in real mode until a write to port 0x99 by whichever vCPU.
fn run_real_mode(vm: &KvmVm, before: impl FnOnce(&KvmVm)) -> Vec<Access> {
    let attention = engine::Attention::new();
    let config = VcpuConfig { id: 0, attention, cpuid: &[], recorder: None };
    let mut vcpu = vm.create_vcpu(config).unwrap();
    vcpu.set_state(&real_mode()).unwrap();
    before(vm);
    let script = Arc::new(Script::default());
    *script.kick.lock().unwrap() = Some(vcpu.kick());
    let bus: Arc<dyn Bus> = script.clone();
    assert_eq!(vcpu.run(&bus).unwrap(), VmExit::Interrupted);
    script.seen()
}

#[test]
fn writes_to_read_only_memory_go_to_the_bus_and_change_nothing() {
    // MOV AX, 0xf000; MOV DS, AX; MOV BYTE [0x10], 0x55; IN AL, 0x99; JMP $
    let code = [0xb8, 0, 0xf0, 0x8e, 0xd8, 0xc6, 0x06, 0x10, 0, 0x55, 0xe4, 0x99, 0xeb, 0xfe];
    let Some((vm, memory)) = machine(&code) else { return };
    let seen = run_real_mode(&vm, |_| ());
    assert_eq!(seen[0], (Space::Memory, 0xf0010, true, vec![0x55]));
    assert_eq!(memory.load_physical::<u8>(0xf0010), Some(0));
}

#[test]
fn an_interrupt_line_reaches_the_guest_through_the_pic() {
    // The PIC's words (vectors from 0x20, all unmasked), the handler's address at 4 * 0x24, STI; HLT; JMP $.
    // The handler at 0x1100: MOV AL, 0x77; OUT 0x80, AL; IN AL, 0x99; IRET
    let mut code = vec![];
    for (port, value) in [(0x20, 0x11), (0x21, 0x20), (0x21, 0x04), (0x21, 0x01), (0x21, 0x00)] {
        code.extend([0xb0, value, 0xe6, port]);
    }
    code.extend([0xc7, 0x06, 0x90, 0, 0x00, 0x11, 0xc7, 0x06, 0x92, 0, 0, 0, 0xfb, 0xf4, 0xeb, 0xfe]);
    code.resize(0x100, 0x90);
    code.extend([0xb0, 0x77, 0xe6, 0x80, 0xe4, 0x99, 0xcf]);
    let Some((vm, _memory)) = machine(&code) else { return };
    let line = vm.clone();
    let device = std::thread::spawn(move || {
        for level in [true, false].into_iter().cycle().take(200) {
            std::thread::sleep(Duration::from_millis(2));
            line.set_irq_line(4, level).unwrap();
        }
    });
    let seen = run_real_mode(&vm, |_| ());
    assert_eq!(seen[0], out(0x80, &[0x77]));
    device.join().unwrap();
}

#[test]
fn a_second_vcpu_waits_for_its_sipi() {
    let Some((vm, _memory)) = machine(&[0xf4]) else { return };
    let config = |id| VcpuConfig { id, attention: engine::Attention::new(), cpuid: &[], recorder: None };
    let boot = vm.create_vcpu(config(0)).unwrap();
    let mut second = vm.create_vcpu(config(1)).unwrap();
    assert!(!boot.state().unwrap().waits_for_sipi);
    assert!(second.state().unwrap().waits_for_sipi);
    let waiting = VcpuState { waits_for_sipi: true, ..VcpuState::reset() };
    second.set_state(&waiting).unwrap();
    assert!(second.state().unwrap().waits_for_sipi);
    let bus: Arc<dyn Bus> = Arc::new(Nothing);
    let kick = second.kick();
    let kicker = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(5));
        kick.kick();
    });
    assert_eq!(second.run(&bus).unwrap(), VmExit::Interrupted);
    kicker.join().unwrap();
}

/// The local APIC's page as a real-mode data segment, so that code there needs no paging.
fn with_apic_segment(mut state: VcpuState) -> VcpuState {
    state.segments[3].base = x86::apic::DEFAULT_BASE;
    state
}

/// MOV DWORD [offset], value with a 16-bit address.
fn store(offset: u16, value: u32) -> Vec<u8> {
    [&[0x66, 0xc7, 0x06][..], &offset.to_le_bytes(), &value.to_le_bytes()].concat()
}

#[test]
fn init_and_sipi_start_a_second_vcpu() {
    // The boot processor enables its local APIC, sends INIT and SIPI (vector 2) to APIC ID 1, and spins.
    let mut code = [store(0xf0, 0x1ff), store(0x310, 1 << 24), store(0x300, 0x4500)].concat();
    code.extend([store(0x310, 1 << 24), store(0x300, 0x4602), vec![0xeb, 0xfe]].concat());
    let Some((vm, memory)) = machine(&code) else { return };
    // The second one, at 0x2000: MOV AX, CS; OUT 0x80, AX; IN AL, 0x99; JMP $
    memory.write_bytes(0x2000, &[0x8c, 0xc8, 0xe7, 0x80, 0xe4, 0x99, 0xeb, 0xfe]);
    let config = |id| VcpuConfig { id, attention: engine::Attention::new(), cpuid: &[], recorder: None };
    let mut boot = vm.create_vcpu(config(0)).unwrap();
    let mut second = vm.create_vcpu(config(1)).unwrap();
    boot.set_state(&with_apic_segment(real_mode())).unwrap();
    let (stop, script) = (boot.kick(), Arc::new(Script::default()));
    *script.kick.lock().unwrap() = Some(second.kick());
    let bus: Arc<dyn Bus> = script.clone();
    let thread = std::thread::spawn(move || boot.run(&(Arc::new(Nothing) as Arc<dyn Bus>)).unwrap());
    assert_eq!(second.run(&bus).unwrap(), VmExit::Interrupted);
    assert_eq!(script.seen()[0], out(0x80, &[0x00, 0x02]));
    assert!(!second.state().unwrap().waits_for_sipi);
    stop.kick();
    assert_eq!(thread.join().unwrap(), VmExit::Interrupted);
}

#[test]
fn a_message_signalled_interrupt_reaches_the_guest() {
    // Enable the local APIC, STI; HLT; JMP $. Vector 0x40's handler at 0x1100: OUT 0x80, AL; IN AL, 0x99; IRET
    let mut code = [store(0xf0, 0x1ff), vec![0xfb, 0xe6, 0x81, 0xf4, 0xeb, 0xfe]].concat();
    code.resize(0x100, 0x90);
    code.extend([0xe6, 0x80, 0xe4, 0x99, 0xcf]);
    let Some((vm, memory)) = machine(&code) else { return };
    memory.store::<u32>(0x40 * 4, 0x1100);
    let config = VcpuConfig { id: 0, attention: engine::Attention::new(), cpuid: &[], recorder: None };
    let mut vcpu = vm.create_vcpu(config).unwrap();
    vcpu.set_state(&with_apic_segment(real_mode())).unwrap();
    let script = Arc::new(Script::default());
    *script.kick.lock().unwrap() = Some(vcpu.kick());
    let bus: Arc<dyn Bus> = script.clone();
    let (device, watched) = (vm.clone(), script.clone());
    let thread = std::thread::spawn(move || {
        while watched.seen().is_empty() {
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(device.signal_msi(0xfee0_0000, 0x40).unwrap());
    });
    assert_eq!(vcpu.run(&bus).unwrap(), VmExit::Interrupted);
    thread.join().unwrap();
    let ports: Vec<_> = script.seen().iter().map(|access| access.1).collect();
    assert_eq!(ports, [0x81, 0x80, 0x99]);
}

#[test]
fn the_paravirtual_clock_runs_and_can_be_set() {
    let Some((vm, _memory)) = machine(&[0xf4]) else { return };
    vm.set_clock(1_000_000_000_000).unwrap();
    let clock = vm.clock().unwrap();
    assert!((1_000_000_000_000..1_100_000_000_000).contains(&clock), "{clock}");
}

#[test]
fn what_kvm_handles_itself_is_in_the_ledger_too() {
    let ledger = Ledger::new();
    // IN AL, 0x21 (KVM's PIC) three times, OUT 0x80, AL; IN AL, 0x99; JMP $
    let code = [0xe4, 0x21, 0xe4, 0x21, 0xe4, 0x21, 0xe6, 0x80, 0xe4, 0x99, 0xeb, 0xfe];
    let Some((vm, _memory)) = machine(&code) else { return };
    let attention = engine::Attention::new();
    let config = VcpuConfig { id: 0, attention, cpuid: &[], recorder: Some(ledger.recorder(0)) };
    let mut vcpu = vm.create_vcpu(config).unwrap();
    vcpu.set_state(&real_mode()).unwrap();
    let script = Arc::new(Script::default());
    *script.kick.lock().unwrap() = Some(vcpu.kick());
    let bus: Arc<dyn Bus> = script.clone();
    assert_eq!(vcpu.run(&bus).unwrap(), VmExit::Interrupted);
    let Some(kernel) = Report::new(&ledger, 1, &|_| None).kernel else {
        println!("skipped: this kernel has no statistics of its exits");
        return;
    };
    println!("{kernel:?}");
    assert!(kernel.exits > 0, "{kernel:?}");
}

#[test]
fn kvms_counters_are_found_by_their_names() {
    let Some(guest) = or_skip(TinyGuest::new(&[0xf4])) else { return };
    let Some(missing) = guest.vcpu.missing_counters() else {
        println!("skipped: this kernel has no statistics of its exits");
        return;
    };
    assert!(missing.is_empty(), "{missing:?}");
}
