//! What the outside did to the translated vCPU, for doing the same to the interpreted one.
//!
//! All that a vCPU learns from outside comes through its wires: device registers, time and the local APIC. [`Recording`]
//! stands before the real ones and notes every answer; [`Replay`] gives the same answers to the same questions, in the
//! same order. A question that was not asked the first time is a difference.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use engine::{Bus, CpuEvent, InterruptController, MsrFault, Space, TimeSource};
use guest_memory::{GuestMemory, Offset};

/// A question to the outside.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Question {
    Read(Space, u64, usize),
    Write(Space, u64, Vec<u8>),
    Now,
    Tsc,
    WallClock,
    HasInterrupt,
    Acknowledge,
    TakeEvent(bool),
    TaskPriority,
    SetTaskPriority(u8),
    PerformanceInterrupt,
    ReadMsr(u32),
    WriteMsr(u32, u64),
}

/// And its answer.
#[derive(Clone, Debug)]
enum Answer {
    /// A number, or whether something is so.
    Number(u64),
    Vector(Option<u8>),
    Event(Option<CpuEvent>),
    Msr(Result<u64, MsrFault>),
    /// What a device's register gave, or that it was written; devices wrote this to RAM meanwhile.
    Accessed([u8; 8], Vec<(Offset, Vec<u8>)>),
}

/// What was asked during one slice.
#[derive(Debug, Default)]
struct Entries {
    asked: Vec<(Question, Answer)>,
    /// How many of them were asked again.
    replayed: usize,
    wrong: Option<String>,
}

/// The questions and answers of one slice, shared by both sides.
#[derive(Debug, Default)]
pub struct Log(Mutex<Entries>);

impl Log {
    fn lock(&self) -> MutexGuard<'_, Entries> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets the last slice.
    pub fn start(&self) {
        let mut entries = self.lock();
        entries.asked.clear();
        entries.replayed = 0;
    }

    /// What the second vCPU asked that the first did not, or did not ask.
    pub fn difference(&self) -> Option<String> {
        let mut entries = self.lock();
        if let Some(wrong) = entries.wrong.take() {
            return Some(wrong);
        }
        let (question, _) = entries.asked.get(entries.replayed)?;
        Some(format!("{question:x?} was asked of the outside by the translated vCPU alone"))
    }

    fn record(&self, question: Question, answer: Answer) {
        self.lock().asked.push((question, answer));
    }

    fn replay(&self, question: &Question) -> Option<Answer> {
        let mut entries = self.lock();
        let at = entries.replayed;
        match entries.asked.get(at) {
            Some((asked, answer)) if asked == question => {
                let answer = answer.clone();
                entries.replayed += 1;
                Some(answer)
            }
            other => {
                let first = other.map_or("nothing".to_owned(), |(asked, _)| format!("{asked:x?}"));
                let text = format!("the outside was asked {question:x?}, and {first} by the translated vCPU");
                entries.wrong.get_or_insert(text);
                None
            }
        }
    }
}

/// Before a real wire, on the translated side.
pub struct Recording<T> {
    inner: T,
    log: Arc<Log>,
    memory: GuestMemory,
}

impl<T> Recording<T> {
    /// Before `inner`; what devices write to `memory` is noted too.
    pub fn new(inner: T, log: &Arc<Log>, memory: &GuestMemory) -> Arc<Self> {
        Arc::new(Self { inner, log: log.clone(), memory: memory.clone() })
    }

    fn number(&self, question: Question, number: u64) -> u64 {
        self.log.record(question, Answer::Number(number));
        number
    }
}

/// What devices wrote to RAM since it was last asked.
pub fn device_writes(memory: &GuestMemory) -> Vec<(Offset, Vec<u8>)> {
    let bytes = |(offset, len): (Offset, u64)| {
        let mut bytes = vec![0; len.min(memory.len().saturating_sub(offset)) as usize];
        memory.read_bytes(offset, &mut bytes);
        (offset, bytes)
    };
    memory.marks().take_device_writes().into_iter().map(bytes).collect()
}

impl Recording<Arc<dyn Bus>> {
    /// Asks a device. It may have threads of its own reach RAM, and wait for them.
    fn access(&self, question: Question, access: impl FnOnce(&dyn Bus) -> [u8; 8]) {
        let marks = self.memory.marks();
        marks.end_vcpu_turn();
        let bytes = access(&*self.inner);
        marks.begin_vcpu_turn();
        self.log.record(question, Answer::Accessed(bytes, device_writes(&self.memory)));
    }
}

impl Bus for Recording<Arc<dyn Bus>> {
    fn read(&self, space: Space, address: u64, data: &mut [u8]) {
        self.access(Question::Read(space, address, data.len()), |bus| {
            bus.read(space, address, data);
            let mut bytes = [0; 8];
            bytes.iter_mut().zip(&*data).for_each(|(to, &from)| *to = from);
            bytes
        });
    }
    fn write(&self, space: Space, address: u64, data: &[u8]) {
        self.access(Question::Write(space, address, data.to_vec()), |bus| {
            bus.write(space, address, data);
            [0; 8]
        });
    }
}

impl TimeSource for Recording<Arc<dyn TimeSource>> {
    fn now(&self) -> u64 {
        self.number(Question::Now, self.inner.now())
    }
    fn tsc(&self) -> u64 {
        self.number(Question::Tsc, self.inner.tsc())
    }
    fn host_tsc_start(&self) -> Option<u64> {
        None
    }
    fn tsc_frequency(&self) -> u64 {
        self.inner.tsc_frequency()
    }
    fn wall_clock(&self) -> u64 {
        self.number(Question::WallClock, self.inner.wall_clock())
    }
}

impl InterruptController for Recording<Arc<dyn InterruptController>> {
    fn has_interrupt(&self) -> bool {
        self.number(Question::HasInterrupt, self.inner.has_interrupt().into()) != 0
    }
    fn acknowledge(&self) -> Option<u8> {
        let vector = self.inner.acknowledge();
        self.log.record(Question::Acknowledge, Answer::Vector(vector));
        vector
    }
    fn take_event(&self, nmi_allowed: bool) -> Option<CpuEvent> {
        let event = self.inner.take_event(nmi_allowed);
        self.log.record(Question::TakeEvent(nmi_allowed), Answer::Event(event));
        event
    }
    fn task_priority(&self) -> u8 {
        self.number(Question::TaskPriority, self.inner.task_priority().into()) as u8
    }
    fn set_task_priority(&self, cr8: u8) {
        self.inner.set_task_priority(cr8);
        self.number(Question::SetTaskPriority(cr8), 0);
    }
    fn performance_interrupt(&self) {
        self.inner.performance_interrupt();
        self.number(Question::PerformanceInterrupt, 0);
    }
    fn read_msr(&self, index: u32) -> Result<u64, MsrFault> {
        let value = self.inner.read_msr(index);
        self.log.record(Question::ReadMsr(index), Answer::Msr(value));
        value
    }
    fn write_msr(&self, index: u32, value: u64) -> Result<(), MsrFault> {
        let result = self.inner.write_msr(index, value);
        self.log.record(Question::WriteMsr(index, value), Answer::Msr(result.map(|()| 0)));
        result
    }
}

/// In place of all wires, on the interpreted side.
pub struct Replay {
    log: Arc<Log>,
    memory: GuestMemory,
    frequency: u64,
}

impl Replay {
    /// Answers from `log`; writes to `memory` what devices wrote. `frequency` is the time-stamp counter's, in Hz.
    pub fn new(log: &Arc<Log>, memory: &GuestMemory, frequency: u64) -> Arc<Self> {
        Arc::new(Self { log: log.clone(), memory: memory.clone(), frequency })
    }

    fn number(&self, question: &Question) -> u64 {
        match self.log.replay(question) {
            Some(Answer::Number(number)) => number,
            _ => 0,
        }
    }

    fn msr(&self, question: &Question) -> Result<u64, MsrFault> {
        match self.log.replay(question) {
            Some(Answer::Msr(value)) => value,
            _ => Err(MsrFault),
        }
    }
}

/// Writes to RAM what devices wrote elsewhere.
pub fn write_again(memory: &GuestMemory, writes: &[(Offset, Vec<u8>)]) {
    for (offset, bytes) in writes {
        memory.write_bytes(*offset, bytes);
        let pages = (offset & !0xfff..*offset + bytes.len() as u64).step_by(4096);
        pages.for_each(|page| {
            memory.marks().written(page);
        });
    }
}

impl Replay {
    fn access(&self, question: &Question) -> [u8; 8] {
        match self.log.replay(question) {
            Some(Answer::Accessed(bytes, writes)) => {
                write_again(&self.memory, &writes);
                bytes
            }
            _ => [0; 8],
        }
    }
}

impl Bus for Replay {
    fn read(&self, space: Space, address: u64, data: &mut [u8]) {
        let bytes = self.access(&Question::Read(space, address, data.len()));
        data.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
    }
    fn write(&self, space: Space, address: u64, data: &[u8]) {
        self.access(&Question::Write(space, address, data.to_vec()));
    }
}

impl TimeSource for Replay {
    fn now(&self) -> u64 {
        self.number(&Question::Now)
    }
    fn tsc(&self) -> u64 {
        self.number(&Question::Tsc)
    }
    fn host_tsc_start(&self) -> Option<u64> {
        None
    }
    fn tsc_frequency(&self) -> u64 {
        self.frequency
    }
    fn wall_clock(&self) -> u64 {
        self.number(&Question::WallClock)
    }
}

impl InterruptController for Replay {
    fn has_interrupt(&self) -> bool {
        self.number(&Question::HasInterrupt) != 0
    }
    fn acknowledge(&self) -> Option<u8> {
        match self.log.replay(&Question::Acknowledge) {
            Some(Answer::Vector(vector)) => vector,
            _ => None,
        }
    }
    fn take_event(&self, nmi_allowed: bool) -> Option<CpuEvent> {
        match self.log.replay(&Question::TakeEvent(nmi_allowed)) {
            Some(Answer::Event(event)) => event,
            _ => None,
        }
    }
    fn task_priority(&self) -> u8 {
        self.number(&Question::TaskPriority) as u8
    }
    fn set_task_priority(&self, cr8: u8) {
        self.number(&Question::SetTaskPriority(cr8));
    }
    fn performance_interrupt(&self) {
        self.number(&Question::PerformanceInterrupt);
    }
    fn read_msr(&self, index: u32) -> Result<u64, MsrFault> {
        self.msr(&Question::ReadMsr(index))
    }
    fn write_msr(&self, index: u32, value: u64) -> Result<(), MsrFault> {
        self.msr(&Question::WriteMsr(index, value)).map(|_| ())
    }
}
