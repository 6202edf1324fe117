use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use crate::{Attention, Bus, Signals, VcpuState};

/// Why [`Vcpu::run`] came back: the vocabulary of the vCPU loop, the ledger and the tests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VmExit {
    /// HLT with nothing deliverable: call `run` again once the attention word is raised.
    Halt,
    /// [`Signals::EXIT`] was raised; it has been taken.
    Interrupted,
    /// The guest can go no further (a triple fault): the machine resets or stops.
    Shutdown(DebugEvent),
    /// The CPU waits for a SIPI: call `run` again once the attention word is raised.
    WaitForSipi,
    /// A breakpoint or a single step that the debugger asked for.
    Debug(DebugEvent),
    /// The engine cannot go on with this guest.
    Fatal(Fatal),
    /// Two executors that must do the same did not: the engine is wrong.
    Differs(DebugEvent),
}

/// Where the guest stood, and what stopped it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DebugEvent {
    /// RIP of the instruction.
    pub rip: u64,
    /// What happened, for a person: "triple fault: #GP while delivering #PF at 0x10".
    pub reason: String,
}

/// Something that no guest can be told of.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("at RIP {rip:#x}: {reason}")]
pub struct Fatal {
    /// RIP of the instruction.
    pub rip: u64,
    /// What happened.
    pub reason: String,
}

/// The engine refused something or its host failed it.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// A system call failed.
    #[error("{what}: {source}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// The host's error.
        source: std::io::Error,
    },
    /// The state cannot be that of an x86-64 processor.
    #[error("impossible vCPU state: {0}")]
    BadState(String),
    /// The engine cannot run here.
    #[error("{0}")]
    Unavailable(String),
}

/// Makes a running or sleeping vCPU come back from `run`.
#[derive(Clone, Debug)]
pub struct Kick(Arc<Attention>);

impl Kick {
    /// A kick through the vCPU's attention word.
    pub fn new(attention: Arc<Attention>) -> Self {
        Self(attention)
    }
    /// Makes `run` return [`VmExit::Interrupted`] soon.
    pub fn kick(&self) {
        self.0.raise(Signals::EXIT);
    }
}

/// Something that an engine counted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counter {
    /// What, for a person.
    pub name: Cow<'static, str>,
    /// How much of it.
    pub value: CounterValue,
}

/// How much, and of what kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CounterValue {
    /// Times or things.
    Count(u64),
    /// Bytes.
    Bytes(u64),
    /// Time.
    Time(Duration),
}

impl Counter {
    /// Times or things.
    pub fn count(name: impl Into<Cow<'static, str>>, count: u64) -> Self {
        Self { name: name.into(), value: CounterValue::Count(count) }
    }
    /// Bytes.
    pub fn bytes(name: impl Into<Cow<'static, str>>, bytes: u64) -> Self {
        Self { name: name.into(), value: CounterValue::Bytes(bytes) }
    }
    /// Time.
    pub fn time(name: impl Into<Cow<'static, str>>, time: Duration) -> Self {
        Self { name: name.into(), value: CounterValue::Time(time) }
    }
}

/// One virtual CPU of any engine.
pub trait Vcpu: Send {
    /// Runs the guest until something needs a decision from outside.
    ///
    /// # Errors
    /// [`EngineError`] where the host fails the engine; a guest's faults are its own.
    fn run(&mut self, bus: &Arc<dyn Bus>) -> Result<VmExit, EngineError>;
    /// The architectural state: the same plain data for every engine.
    ///
    /// # Errors
    /// [`EngineError::Host`] where the engine cannot read it.
    fn state(&self) -> Result<VcpuState, EngineError>;
    /// Replaces the state.
    ///
    /// # Errors
    /// [`EngineError::BadState`] where no processor can have it.
    fn set_state(&mut self, state: &VcpuState) -> Result<(), EngineError>;
    /// What brings `run` back from another thread.
    fn kick(&self) -> Kick;
    /// Instructions retired so far; `None` where the engine does not count them.
    fn instructions(&self) -> Option<u64>;
    /// The engine's own counters, by name: empty where it has none.
    fn counters(&self) -> Vec<Counter>;
}
