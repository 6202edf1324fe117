//! A vCPU's life: run, see why it came back, act.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use engine::{Attention, Bus, Counter, DebugEvent, Vcpu, VcpuState, VmExit};
use exits::{Exit, Recorder};
use x86::{ExitReason, Flags};

use crate::outcome::{Ending, Outcome};
use crate::sleep::Sleep;

/// How long a vCPU is halted before it is asked whether anything can wake it.
const STUCK_AFTER: Duration = Duration::from_secs(1);

/// One vCPU and what its thread needs.
pub struct VcpuThread {
    /// Its number, from 0.
    pub id: u32,
    /// The engine's vCPU.
    pub vcpu: Box<dyn Vcpu>,
    /// What it sees of the machine.
    pub bus: Arc<dyn Bus>,
    /// What wakes it.
    pub attention: Arc<Attention>,
    /// The run that it is part of.
    pub run: Arc<Run>,
    /// Where its halts are recorded.
    pub recorder: Option<Recorder>,
    /// Its state after power-up, which it has again after a sleep.
    pub power_up: VcpuState,
}

/// Starts the machine again after a sleep, and says where the boot processor goes on, from its state after power-up;
/// `None` where the guest has left no place for that.
pub type Restart = Box<dyn Fn(&VcpuState) -> Option<VcpuState> + Send + Sync>;

/// What the threads of one run share.
pub struct Run {
    /// How it ends.
    pub ending: Ending,
    /// Its pauses.
    pub sleep: Sleep,
    /// How it goes on after one.
    pub restart: Restart,
    /// When the first instruction began.
    pub first_instruction: OnceLock<Instant>,
    /// vCPUs that a device's interrupt can still wake, or that run.
    awake: AtomicU32,
}

impl Run {
    /// A run of so many vCPUs, all of them able to go on.
    pub fn new(ending: Ending, vcpus: u32, sleep: Sleep, restart: Restart) -> Arc<Self> {
        let sleeper = sleep.clone();
        ending.calls(move || sleeper.interrupt());
        let awake = AtomicU32::new(vcpus);
        Arc::new(Self { ending, sleep, restart, first_instruction: OnceLock::new(), awake })
    }
}

/// What is left of a vCPU when its thread has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VcpuSummary {
    /// Its number.
    pub id: u32,
    /// Instructions retired, where the engine counts them.
    pub instructions: Option<u64>,
    /// How long it was halted or waited for its start-up interrupt.
    pub idle: Duration,
    /// The engine's counters.
    pub counters: Vec<Counter>,
}

/// A vCPU whose thread has ended.
pub struct Ended {
    /// What there is to say of it.
    pub summary: VcpuSummary,
    /// Itself: what it holds can still be counted.
    pub vcpu: Box<dyn Vcpu>,
}

impl VcpuThread {
    /// Starts the thread. It ends with the run; its panic ends the run.
    ///
    /// # Errors
    /// The host's, where it gives no thread.
    pub fn start(self) -> std::io::Result<JoinHandle<Option<Ended>>> {
        let (id, run) = (self.id, self.run.clone());
        let body = move || catch_unwind(AssertUnwindSafe(|| self.live()));
        std::thread::Builder::new().name(format!("vcpu{id}")).spawn(move || {
            body()
                .inspect_err(|_| {
                    let message =
                        format!("vCPU {id} failed (a defect in Ringside; the panic is shown above)");
                    run.ending.report(Outcome::HostError(message));
                })
                .ok()
        })
    }

    fn live(mut self) -> Ended {
        let mut idle = Duration::ZERO;
        let ending = self.run.ending.clone();
        ending.stops_vcpu(self.vcpu.kick());
        self.run.sleep.stops_vcpu(self.vcpu.kick());
        // A sleeping vCPU must wake at its deadline, not when the kernel finds it convenient.
        let _ = rustix::thread::set_current_timer_slack(std::num::NonZeroU64::new(1));
        self.run.first_instruction.get_or_init(Instant::now);
        while !ending.has_come() {
            if self.run.sleep.has_come() {
                idle += self.suspend();
                continue;
            }
            match self.vcpu.run(&self.bus) {
                Ok(VmExit::Halt) => idle += self.halt(),
                Ok(VmExit::WaitForSipi) => idle += self.wait_for_sipi(),
                Ok(VmExit::Interrupted) => {}
                Ok(VmExit::Shutdown(event)) => ending.report(Outcome::TripleFault { vcpu: self.id, event }),
                Ok(VmExit::Debug(event)) => self.debug(&event),
                Ok(VmExit::Fatal(fatal)) => ending.report(Outcome::Fatal { vcpu: self.id, fatal }),
                Ok(VmExit::Differs(event)) => ending.report(Outcome::Differs { vcpu: self.id, event }),
                Err(error) => ending.report(Outcome::HostError(format!("vCPU {}: {error}", self.id))),
            }
        }
        if log::log_enabled!(log::Level::Info)
            && let Ok(state) = self.vcpu.state()
        {
            log::info!("vCPU {} at the end:\n{}", self.id, crate::registers::table(&state));
        }
        let summary = VcpuSummary {
            id: self.id,
            instructions: self.vcpu.instructions(),
            idle,
            counters: self.vcpu.counters(),
        };
        Ended { summary, vcpu: self.vcpu }
    }

    /// The machine sleeps, until it has been started again; this vCPU is then as after power-up.
    fn suspend(&mut self) -> Duration {
        let start = Instant::now();
        let run = self.run.clone();
        let mut state = Some(self.power_up.clone());
        let mut restart = || state = (run.restart)(&self.power_up);
        let is_boot_processor = self.id == 0;
        run.sleep.park(&run.ending, is_boot_processor.then_some(&mut restart));
        if run.ending.has_come() {
            return start.elapsed();
        }
        match state.map(|state| self.vcpu.set_state(&state)) {
            Some(Ok(())) => {}
            Some(Err(error)) => {
                run.ending.report(Outcome::HostError(format!("vCPU {}: {error}", self.id)));
            }
            None => run.ending.report(Outcome::Reset { by: "a sleep without a waking vector" }),
        }
        start.elapsed()
    }

    /// HLT: sleeps until somebody wants attention.
    fn halt(&mut self) -> Duration {
        let (start, ticks) = (Instant::now(), exits::ticks());
        self.attention.sleep(Some(STUCK_AFTER));
        if !self.attention.pending() {
            match self.interrupts_off_at() {
                Some(rip) => self.sleep_for_good(rip),
                None => self.attention.sleep(None),
            }
        }
        if let Some(recorder) = &self.recorder {
            recorder.record(Exit::new(ExitReason::Hlt), exits::ticks().saturating_sub(ticks));
        }
        start.elapsed()
    }

    fn wait_for_sipi(&self) -> Duration {
        let start = Instant::now();
        self.sleep_dependent(|| {});
        start.elapsed()
    }

    /// RIP, where only an NMI, INIT or SIPI can wake the halted vCPU.
    fn interrupts_off_at(&self) -> Option<u64> {
        let state = self.vcpu.state().ok()?;
        (!state.rflags.contains(Flags::IF)).then_some(state.rip)
    }

    fn sleep_for_good(&self, rip: u64) {
        self.sleep_dependent(|| self.run.ending.report(Outcome::Stuck { vcpu: self.id, rip }));
    }

    /// Sleeps as one that only another vCPU can wake; the last one that is awake calls `alone` before it does.
    fn sleep_dependent(&self, alone: impl FnOnce()) {
        if self.run.awake.fetch_sub(1, Ordering::SeqCst) == 1 {
            alone();
        }
        self.attention.sleep(None);
        self.run.awake.fetch_add(1, Ordering::SeqCst);
    }

    fn debug(&self, event: &DebugEvent) {
        let message = format!("vCPU {}: nobody asked for a debug stop at RIP {:#x}", self.id, event.rip);
        self.run.ending.report(Outcome::HostError(message));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outcome::StopReason;
    use engine::{EngineError, Fatal, Kick, Nothing, Signals};
    use std::collections::VecDeque;

    /// A vCPU that comes back with what it is told to, then waits for its kick as a busy guest does.
    struct Scripted {
        exits: VecDeque<VmExit>,
        state: VcpuState,
        attention: Arc<Attention>,
    }

    impl Vcpu for Scripted {
        fn run(&mut self, _bus: &Arc<dyn Bus>) -> Result<VmExit, EngineError> {
            assert!(self.state.rip != 0xbad, "meant to fail");
            self.attention.take(Signals::INTERRUPT);
            if let Some(exit) = self.exits.pop_front() {
                return Ok(exit);
            }
            while !self.attention.take(Signals::EXIT) {
                std::thread::yield_now();
            }
            Ok(VmExit::Interrupted)
        }
        fn state(&self) -> Result<VcpuState, EngineError> {
            Ok(self.state.clone())
        }
        fn set_state(&mut self, state: &VcpuState) -> Result<(), EngineError> {
            self.state = state.clone();
            Ok(())
        }
        fn kick(&self) -> Kick {
            Kick::new(self.attention.clone())
        }
        fn counters(&self) -> Vec<Counter> {
            Vec::new()
        }
        fn instructions(&self) -> Option<u64> {
            Some(42)
        }
    }

    /// A halted vCPU that tells where it is put.
    struct Watched {
        seen: std::sync::mpsc::Sender<u64>,
        state: VcpuState,
        attention: Arc<Attention>,
    }

    impl Vcpu for Watched {
        fn run(&mut self, _bus: &Arc<dyn Bus>) -> Result<VmExit, EngineError> {
            Ok(if self.attention.take(Signals::EXIT) { VmExit::Interrupted } else { VmExit::WaitForSipi })
        }
        fn state(&self) -> Result<VcpuState, EngineError> {
            Ok(self.state.clone())
        }
        fn set_state(&mut self, state: &VcpuState) -> Result<(), EngineError> {
            self.seen.send(state.rip).unwrap();
            Ok(())
        }
        fn kick(&self) -> Kick {
            Kick::new(self.attention.clone())
        }
        fn counters(&self) -> Vec<Counter> {
            Vec::new()
        }
        fn instructions(&self) -> Option<u64> {
            None
        }
    }

    fn thread(run: &Arc<Run>, id: u32, exits: impl Into<VecDeque<VmExit>>) -> VcpuThread {
        let attention = Attention::new();
        let vcpu = Scripted { exits: exits.into(), state: VcpuState::reset(), attention: attention.clone() };
        VcpuThread {
            id,
            vcpu: Box::new(vcpu),
            bus: Arc::new(Nothing),
            attention,
            run: run.clone(),
            recorder: None,
            power_up: VcpuState::reset(),
        }
    }

    fn run_of(vcpus: u32) -> Arc<Run> {
        Run::new(Ending::new(), vcpus, Sleep::new(vcpus), Box::new(|_| None))
    }

    fn one(exits: impl Into<VecDeque<VmExit>>) -> (Arc<Run>, VcpuThread) {
        let run = run_of(1);
        let thread = thread(&run, 0, exits);
        (run, thread)
    }

    #[test]
    fn a_busy_vcpu_stops_when_the_run_ends() {
        let (run, thread) = one([]);
        let handle = thread.start().unwrap();
        std::thread::sleep(Duration::from_millis(5));
        run.ending.report(Outcome::Stopped(StopReason::Quit));
        let summary = handle.join().unwrap().unwrap().summary;
        assert_eq!(summary.instructions, Some(42));
        assert!(run.first_instruction.get().is_some());
    }

    #[test]
    fn a_halted_vcpu_sleeps_until_attention_is_raised_and_the_wait_is_recorded() {
        let (run, mut thread) = one([VmExit::Halt]);
        let ledger = exits::Ledger::new();
        thread.recorder = Some(ledger.recorder(0));
        let attention = thread.attention.clone();
        let handle = thread.start().unwrap();
        std::thread::sleep(Duration::from_millis(30));
        attention.raise(Signals::INTERRUPT);
        std::thread::sleep(Duration::from_millis(10));
        run.ending.report(Outcome::PowerOff);
        let summary = handle.join().unwrap().unwrap().summary;
        assert!(summary.idle >= Duration::from_millis(25), "{:?}", summary.idle);
        assert!(summary.idle < Duration::from_millis(900), "{:?}", summary.idle);
        let report = exits::Report::new(&ledger, 1_000_000_000, &|_| None);
        assert_eq!((report.reasons[0].reason.as_str(), report.reasons[0].times.count), ("HLT", 1));
    }

    #[test]
    fn a_triple_fault_ends_the_run_with_rip_and_reason() {
        let event = DebugEvent { rip: 0x7c00, reason: "triple fault".into() };
        let (run, thread) = one([VmExit::Shutdown(event.clone())]);
        let handle = thread.start().unwrap();
        assert_eq!(run.ending.wait(), Outcome::TripleFault { vcpu: 0, event });
        handle.join().unwrap().unwrap();
    }

    #[test]
    fn what_the_engine_cannot_do_ends_the_run() {
        let fatal = Fatal { rip: 1, reason: "no such thing".into() };
        let (run, thread) = one([VmExit::Fatal(fatal.clone())]);
        let handle = thread.start().unwrap();
        assert_eq!(run.ending.wait(), Outcome::Fatal { vcpu: 0, fatal });
        handle.join().unwrap().unwrap();
    }

    #[test]
    fn a_guest_halted_with_interrupts_off_is_called_stuck_when_no_other_vcpu_can_wake_it() {
        let run = run_of(2);
        let threads = [thread(&run, 0, [VmExit::Halt]), thread(&run, 1, [VmExit::WaitForSipi])];
        let handles = threads.map(|thread| thread.start().unwrap());
        assert_eq!(run.ending.wait(), Outcome::Stuck { vcpu: 0, rip: 0xfff0 });
        for handle in handles {
            handle.join().unwrap().unwrap();
        }
    }

    #[test]
    fn vcpus_come_back_from_a_sleep_as_after_power_up_and_the_boot_processor_at_its_vector() {
        let restart = |power_up: &VcpuState| Some(VcpuState { rip: 0x9a, ..power_up.clone() });
        let run = Run::new(Ending::new(), 2, Sleep::new(2), Box::new(restart));
        let mut threads = [thread(&run, 0, []), thread(&run, 1, [])];
        let (seen, states) = std::sync::mpsc::channel();
        for thread in &mut threads {
            let state = VcpuState { rip: 0x1234, ..VcpuState::reset() };
            thread.vcpu =
                Box::new(Watched { seen: seen.clone(), attention: thread.attention.clone(), state });
        }
        let handles = threads.map(|thread| thread.start().unwrap());
        std::thread::sleep(Duration::from_millis(20));
        run.sleep.begin();
        assert!(states.recv_timeout(Duration::from_millis(20)).is_err());
        run.sleep.wake();
        let mut rips = [(); 2].map(|()| states.recv_timeout(Duration::from_secs(10)).unwrap());
        rips.sort_unstable();
        assert_eq!(rips, [0x9a, 0xfff0]);
        run.ending.report(Outcome::PowerOff);
        for handle in handles {
            handle.join().unwrap();
        }
    }

    #[test]
    fn a_sleep_without_a_waking_vector_ends_in_a_reset() {
        let (run, thread) = one([]);
        let handle = thread.start().unwrap();
        std::thread::sleep(Duration::from_millis(5));
        run.sleep.begin();
        run.sleep.wake();
        assert_eq!(run.ending.wait(), Outcome::Reset { by: "a sleep without a waking vector" });
        handle.join().unwrap();
    }

    #[test]
    fn a_panic_on_a_vcpu_thread_ends_the_run_with_a_message() {
        let (run, mut thread) = one([]);
        let state = VcpuState { rip: 0xbad, ..VcpuState::reset() };
        thread.vcpu.set_state(&state).unwrap();
        let handle = thread.start().unwrap();
        assert!(matches!(run.ending.wait(), Outcome::HostError(message) if message.contains("vCPU 0")));
        assert!(handle.join().unwrap().is_none());
    }
}
