//! ACPI S3: the machine sleeps with nothing but its memory, and comes back where its guest wants.
//!
//! ```text
//!           the guest writes SLP_EN                  all vCPUs have parked, and a wake event has come
//!   awake ──────────────────────────> asleep ───────────────────────────────────────────────────────> restarting
//!     <──────────────────────────────────────────────────────────────────────────────────────────────────┘
//!           the boot processor has put the machine into its state after power-up: all go on
//! ```
//!
//! ACPI Specification, *Waking and Sleeping*. What a PC's firmware does on the way back is done here: it enables the boot
//! processor's local APIC and jumps to the vector that the guest left in the FACS.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use engine::{Kick, VcpuState};
use guest_memory::GuestMemory;
use x86::descriptor::Attributes;
use x86::{Cr0, Segment, Selector, msr};

use crate::layout;
use crate::outcome::Ending;

/// A machine's sleep. Clones are the same one.
#[derive(Clone)]
pub struct Sleep(Arc<Shared>);

struct Shared {
    vcpus: u32,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    phase: Phase,
    /// How often the machine has woken up.
    wakes: u64,
    kicks: Vec<Kick>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Phase {
    #[default]
    Awake,
    /// The guest has asked for it; so many vCPUs have stopped since.
    Asleep { parked: u32, woken: bool },
    /// All have stopped, and the boot processor's thread starts the machine again.
    Restarting,
}

impl Sleep {
    /// A machine of so many vCPUs that is awake.
    pub fn new(vcpus: u32) -> Self {
        Self(Arc::new(Shared { vcpus, state: Mutex::default(), changed: Condvar::new() }))
    }

    /// This vCPU has to be stopped for a sleep.
    pub fn stops_vcpu(&self, kick: Kick) {
        self.lock().kicks.push(kick);
    }

    /// The guest asks for sleep: every vCPU comes back to its thread. It may be called with a device's lock held.
    pub fn begin(&self) {
        let kicks = {
            let mut state = self.lock();
            if state.phase != Phase::Awake {
                return;
            }
            log::info!("the guest sleeps (S3)");
            state.phase = Phase::Asleep { parked: 0, woken: false };
            state.kicks.clone()
        };
        kicks.iter().for_each(Kick::kick);
    }

    /// A wake event has come. It may be called with a device's lock held.
    pub fn wake(&self) {
        if let Phase::Asleep { woken, .. } = &mut self.lock().phase {
            *woken = true;
        }
        self.0.changed.notify_all();
    }

    /// Wakes the threads that wait here, to see that the run has ended.
    pub fn interrupt(&self) {
        // With the lock taken once, nobody is between looking and waiting.
        drop(self.lock());
        self.0.changed.notify_all();
    }

    /// Whether a vCPU has to [`Self::park`].
    pub fn has_come(&self) -> bool {
        self.lock().phase != Phase::Awake
    }

    /// Keeps a vCPU's thread until the machine has woken up, or the run has ended. On the boot processor's thread,
    /// `restart` is called in between, while all vCPUs stand still.
    pub fn park(&self, ending: &Ending, restart: Option<&mut dyn FnMut()>) {
        let mut state = self.lock();
        let before = state.wakes;
        if let Phase::Asleep { parked, .. } = &mut state.phase {
            *parked += 1;
            self.0.changed.notify_all();
        }
        match restart {
            None => drop(self.wait(state, ending, |state| state.wakes != before)),
            Some(restart) => {
                let all = self.0.vcpus;
                let ready = Phase::Asleep { parked: all, woken: true };
                let mut state = self.wait(state, ending, |state| state.phase == ready);
                if ending.has_come() {
                    return;
                }
                state.phase = Phase::Restarting;
                drop(state);
                restart();
                let mut state = self.lock();
                (state.phase, state.wakes) = (Phase::Awake, before + 1);
                self.0.changed.notify_all();
                log::info!("the guest wakes up");
            }
        }
    }

    fn wait<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        ending: &Ending,
        until: impl Fn(&State) -> bool,
    ) -> MutexGuard<'a, State> {
        while !until(&state) && !ending.has_come() {
            state = self.0.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The state after power-up, for the next one: but for the time-stamp counter, which counts on through a sleep as on
/// processors with a nonstop one.
pub fn power_up(mut state: VcpuState) -> VcpuState {
    state.msrs.retain(|&(index, _)| !matches!(index, msr::IA32_TSC | msr::IA32_TSC_ADJUST));
    state
}

/// The FACS's fields. ACPI Specification, *Firmware ACPI Control Structure (FACS)*.
mod facs {
    pub(super) const WAKING_VECTOR: u64 = 12;
    pub(super) const X_WAKING_VECTOR: u64 = 24;
}

/// The boot processor's state where the guest wants to be woken, with the rest as in `power_up`; `None` where it has
/// left no vector.
///
/// The tables do not offer a wake in 64-bit mode, so the vector of 64 bits is entered in 32-bit mode.
pub fn waking_state(memory: &GuestMemory, power_up: &VcpuState) -> Option<VcpuState> {
    let field = |offset| memory.load_physical::<u32>(layout::FACS + offset).unwrap_or(0);
    let (vector, extended) = (field(facs::WAKING_VECTOR), field(facs::X_WAKING_VECTOR));
    let mut state = power_up.clone();
    if extended != 0 {
        state.cr0 = Cr0::ET | Cr0::PE;
        let flat = |selector: u16, kind: u32| Segment {
            selector: Selector(selector),
            base: 0,
            limit: u32::MAX,
            attributes: Attributes::from_bits_retain(kind),
        };
        let (code, data) = (flat(0x08, FLAT_CODE), flat(0x10, FLAT_DATA));
        state.segments = [data, code, data, data, data, data];
        state.rip = u64::from(extended);
    } else if vector != 0 {
        state.cr0 = Cr0::ET;
        state.segments[1] = Segment::real_mode((vector >> 4) as u16, true);
        state.rip = u64::from(vector & 0xf);
    } else {
        return None;
    }
    (state.halted, state.waits_for_sipi) = (false, false);
    Some(state)
}

/// Attributes of flat segments of 32 bits: present, accessed, readable code, writable data.
const FLAT_CODE: u32 = 0xc09b;
const FLAT_DATA: u32 = 0xc093;

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::time::Duration;

    use engine::{Attention, Signals};
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::outcome::Outcome;

    fn memory(vector: u32, extended: u64) -> GuestMemory {
        let memory = GuestMemory::new(&layout::regions(32 << 20).unwrap()).unwrap();
        memory.vm().write_obj(vector, GuestAddress(layout::FACS + 12)).unwrap();
        memory.vm().write_obj(extended, GuestAddress(layout::FACS + 24)).unwrap();
        memory
    }

    #[test]
    fn a_vector_below_1_mib_is_entered_in_real_mode() {
        let state = waking_state(&memory(0x9_8765, 0), &VcpuState::reset()).unwrap();
        let code = state.segments[1];
        assert_eq!((code.selector.0, code.base, state.rip), (0x9876, 0x9_8760, 5));
        assert_eq!(state.cr0, Cr0::ET);
    }

    #[test]
    fn the_extended_vector_is_entered_in_flat_protected_mode() {
        let state = waking_state(&memory(0x1000, 0x12_3456), &VcpuState::reset()).unwrap();
        assert_eq!((state.rip, state.segments[1].base, state.segments[1].limit), (0x12_3456, 0, u32::MAX));
        assert_eq!(state.cr0, Cr0::ET | Cr0::PE);
    }

    #[test]
    fn without_a_vector_there_is_nowhere_to_go() {
        assert_eq!(waking_state(&memory(0, 0), &VcpuState::reset()), None);
    }

    #[test]
    fn the_machine_restarts_once_all_vcpus_stand_still_and_an_event_has_come() {
        let (sleep, ending) = (Sleep::new(3), Ending::new());
        let attention = Attention::new();
        sleep.stops_vcpu(Kick::new(attention.clone()));
        sleep.wake();
        assert!(!sleep.has_come(), "an event for a machine that is awake is nothing");
        for round in 1..=20 {
            sleep.begin();
            assert!(sleep.has_come() && attention.take(Signals::EXIT));
            let (restarts, running) = (AtomicU32::new(0), AtomicU32::new(3));
            std::thread::scope(|scope| {
                for id in 0..3 {
                    let (sleep, ending, restarts, running) = (&sleep, &ending, &restarts, &running);
                    scope.spawn(move || {
                        if id == round % 3 {
                            std::thread::sleep(Duration::from_millis(1));
                        }
                        running.fetch_sub(1, Ordering::SeqCst);
                        let mut restart = || {
                            assert_eq!(running.load(Ordering::SeqCst), 0);
                            restarts.fetch_add(1, Ordering::SeqCst);
                        };
                        sleep.park(ending, (id == 0).then_some(&mut restart));
                        assert_eq!(restarts.load(Ordering::SeqCst), 1);
                    });
                }
                sleep.wake();
            });
            assert!(!sleep.has_come());
        }
    }

    #[test]
    fn the_end_of_the_run_ends_the_sleep() {
        let (sleep, ending) = (Sleep::new(2), Ending::new());
        let sleeper = sleep.clone();
        ending.calls(move || sleeper.interrupt());
        sleep.begin();
        std::thread::scope(|scope| {
            scope.spawn(|| sleep.park(&ending, Some(&mut || panic!("nobody woke it"))));
            scope.spawn(|| sleep.park(&ending, None));
            std::thread::sleep(Duration::from_millis(5));
            ending.report(Outcome::PowerOff);
        });
    }
}
