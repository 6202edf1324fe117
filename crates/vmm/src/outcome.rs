//! How a machine's run ends, and the one place where it is decided.

use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use devices::request::MachineRequest;
use engine::{DebugEvent, Fatal, Kick};

/// Why somebody outside of the machine stopped it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopReason {
    /// The user asked for it at the terminal.
    Quit,
    /// A signal of this number.
    Signal(i32),
    /// Nobody reads the guest's output any more.
    OutputClosed,
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The guest powered off.
    PowerOff,
    /// The guest asked for a reset.
    Reset {
        /// What it asked: "port 0xcf9".
        by: &'static str,
    },
    /// A vCPU can go no further; on hardware the machine would reset.
    TripleFault {
        /// Which one.
        vcpu: u32,
        /// Where it stood and why.
        event: DebugEvent,
    },
    /// The guest wrote this value to the debug-exit port.
    DebugExit(u32),
    /// Every vCPU is halted with interrupts off.
    Stuck {
        /// The vCPU that was the last to halt.
        vcpu: u32,
        /// Where it stands.
        rip: u64,
    },
    /// The engine cannot go on with this guest.
    Fatal {
        /// Which vCPU.
        vcpu: u32,
        /// Where it stood and why.
        fatal: Fatal,
    },
    /// The translator and the interpreter did not do the same with the guest.
    Differs {
        /// Which vCPU.
        vcpu: u32,
        /// Where it stood, and all that is known.
        event: DebugEvent,
    },
    /// Stopped from outside.
    Stopped(StopReason),
    /// The host or Ringside itself failed.
    HostError(String),
}

impl Outcome {
    /// Whether hardware would start again from reset.
    pub fn is_reset(&self) -> bool {
        matches!(self, Self::Reset { .. } | Self::TripleFault { .. })
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PowerOff => write!(f, "the guest powered off"),
            Self::Reset { by } => write!(f, "the guest asked for a reset through {by}"),
            Self::TripleFault { vcpu, event } => {
                write!(f, "the guest reset itself: vCPU {vcpu} at RIP {:#x}: {}", event.rip, event.reason)
            }
            Self::DebugExit(value) => write!(f, "the guest wrote {value:#x} to the debug-exit port"),
            Self::Stuck { vcpu, rip } => write!(
                f,
                "the guest is stuck: every vCPU is halted with interrupts off (vCPU {vcpu} at RIP {rip:#x})"
            ),
            Self::Fatal { vcpu, fatal } => write!(f, "the engine cannot go on with vCPU {vcpu} {fatal}"),
            Self::Differs { vcpu, event } => {
                write!(f, "lockstep: vCPU {vcpu} at RIP {:#x}: {}", event.rip, event.reason)
            }
            Self::Stopped(StopReason::Quit) => write!(f, "ended by the user"),
            Self::Stopped(StopReason::Signal(number)) => write!(f, "ended by signal {number}"),
            Self::Stopped(StopReason::OutputClosed) => write!(f, "nobody reads the guest's output any more"),
            Self::HostError(message) => f.write_str(message),
        }
    }
}

/// The end of a run: the first to report one decides it, and everyone is brought to a stop.
///
/// Clones are the same ending. Any thread may report, a device with its lock held too.
#[derive(Clone, Default)]
pub struct Ending(Arc<Shared>);

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

type Stop = Box<dyn Fn() + Send + Sync>;

#[derive(Default)]
struct State {
    outcome: Option<Outcome>,
    kicks: Vec<Kick>,
    stops: Vec<Arc<Stop>>,
}

impl Ending {
    /// A run that has not ended.
    pub fn new() -> Self {
        Self::default()
    }

    /// Kicks this vCPU when the run ends (at once, where it has).
    pub fn stops_vcpu(&self, kick: Kick) {
        let mut state = self.lock();
        if state.outcome.is_some() {
            kick.kick();
        }
        state.kicks.push(kick);
    }

    /// Calls `stop` when the run ends. It runs on the thread that reported the end, and must only wake others.
    pub fn calls(&self, stop: impl Fn() + Send + Sync + 'static) {
        let stop: Arc<Stop> = Arc::new(Box::new(stop));
        let ended = {
            let mut state = self.lock();
            state.stops.push(stop.clone());
            state.outcome.is_some()
        };
        if ended {
            stop();
        }
    }

    /// Ends the run so, unless it has ended already. Never blocks for long.
    pub fn report(&self, outcome: Outcome) {
        let (kicks, stops) = {
            let mut state = self.lock();
            if state.outcome.is_some() {
                return;
            }
            log::debug!("the run ends: {outcome}");
            state.outcome = Some(outcome);
            (state.kicks.clone(), state.stops.clone())
        };
        self.0.changed.notify_all();
        for kick in kicks {
            kick.kick();
        }
        for stop in stops {
            stop();
        }
    }

    /// What a device's request does to the run.
    pub fn request(&self, request: MachineRequest) {
        match request {
            MachineRequest::PowerOff => self.report(Outcome::PowerOff),
            MachineRequest::Reset(by) => self.report(Outcome::Reset { by }),
            MachineRequest::DebugExit(value) => self.report(Outcome::DebugExit(value)),
            MachineRequest::Sleep(state) => log::warn!("the guest asked for sleep state S{state}: ignored"),
            MachineRequest::Wake => {}
        }
    }

    /// Whether the run has ended.
    pub fn has_come(&self) -> bool {
        self.lock().outcome.is_some()
    }

    /// Waits for the end.
    pub fn wait(&self) -> Outcome {
        let mut state = self.lock();
        loop {
            match &state.outcome {
                Some(outcome) => return outcome.clone(),
                None => state = self.0.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use engine::{Attention, Signals};
    use std::sync::atomic::{AtomicU32, Ordering};

    #[test]
    fn the_first_report_decides() {
        let ending = Ending::new();
        ending.request(MachineRequest::Sleep(3));
        assert!(!ending.has_come());
        ending.request(MachineRequest::DebugExit(7));
        ending.request(MachineRequest::PowerOff);
        assert_eq!(ending.wait(), Outcome::DebugExit(7));
    }

    #[test]
    fn the_end_kicks_vcpus_and_wakes_threads_early_and_late_ones() {
        let ending = Ending::new();
        let (early, late) = (Attention::new(), Attention::new());
        let calls = Arc::new(AtomicU32::new(0));
        let count = |calls: &Arc<AtomicU32>| {
            let calls = calls.clone();
            move || {
                calls.fetch_add(1, Ordering::SeqCst);
            }
        };
        ending.stops_vcpu(Kick::new(early.clone()));
        ending.calls(count(&calls));
        ending.report(Outcome::Stopped(StopReason::Quit));
        ending.stops_vcpu(Kick::new(late.clone()));
        ending.calls(count(&calls));
        assert!(early.is_raised(Signals::EXIT) && late.is_raised(Signals::EXIT));
        assert_eq!(calls.load(Ordering::SeqCst), 2);
    }

    #[test]
    fn a_triple_fault_is_told_with_rip_and_reason() {
        let event = DebugEvent { rip: 0xffff_8000, reason: "triple fault: #PF while delivering #DF".into() };
        let text = Outcome::TripleFault { vcpu: 2, event }.to_string();
        assert!(text.contains("vCPU 2 at RIP 0xffff8000: triple fault: #PF while delivering #DF"), "{text}");
    }
}
