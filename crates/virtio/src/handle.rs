//! What a device's threads hold: the way to a queue, and the way to its driver's attention.

use std::fmt::Display;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use guest_memory::DeviceTurn;

use crate::device_name;
use crate::memory::DmaMemory;
use crate::queue::{Chain, Queue, QueueError};
use crate::transport::{Event, Interrupts, Status};

/// What a device and its handles share with the transport.
pub(crate) struct Link {
    id: u16,
    status: AtomicU8,
    /// Counts changes of the configuration space.
    generation: AtomicU32,
    interrupts: Arc<dyn Interrupts>,
}

impl Link {
    pub(crate) fn new(id: u16, interrupts: Arc<dyn Interrupts>) -> Arc<Self> {
        let (status, generation) = (AtomicU8::new(0), AtomicU32::new(0));
        Arc::new(Self { id, status, generation, interrupts })
    }

    pub(crate) fn status(&self) -> Status {
        Status::from_bits_truncate(self.status.load(Ordering::SeqCst))
    }

    pub(crate) fn add_status(&self, status: Status) {
        self.status.fetch_or(status.bits(), Ordering::SeqCst);
    }

    pub(crate) fn clear_status(&self) {
        self.status.store(0, Ordering::SeqCst);
    }

    /// A number that changes with the configuration space.
    pub(crate) fn generation(&self) -> u32 {
        self.generation.load(Ordering::SeqCst)
    }

    /// Whether the driver is ready and nothing is broken.
    fn is_live(&self) -> bool {
        (self.status() & (Status::DRIVER_OK | Status::NEEDS_RESET)) == Status::DRIVER_OK
    }

    /// Nothing happens any more until the driver resets the device.
    pub(crate) fn fail(&self, queue: u16, reason: &dyn Display) {
        let before = self.status.fetch_or(Status::NEEDS_RESET.bits(), Ordering::SeqCst);
        if before & Status::NEEDS_RESET.bits() != 0 {
            return;
        }
        log::warn!("{}, queue {queue}: {reason}; the driver has to reset the device", device_name(self.id));
        if before & Status::DRIVER_OK.bits() != 0 {
            self.interrupts.raise(Event::Config);
        }
    }
}

/// The way to one queue, for any thread. Clones are for the same queue. Once the device is reset, or broken, it does
/// nothing.
#[derive(Clone)]
pub struct QueueHandle {
    index: u16,
    memory: DmaMemory,
    queue: Arc<Mutex<Option<Queue>>>,
    link: Arc<Link>,
}

impl QueueHandle {
    pub(crate) fn new(index: u16, queue: Queue, link: Arc<Link>) -> Self {
        let memory = queue.memory().clone();
        Self { index, memory, queue: Arc::new(Mutex::new(Some(queue))), link }
    }

    /// The queue's number.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// The memory that the queue's buffers are in.
    pub fn memory(&self) -> &DmaMemory {
        &self.memory
    }

    /// Whether the queue is still to be worked on: the device was neither reset nor broken meanwhile.
    pub fn is_live(&self) -> bool {
        self.lock().is_some() && self.link.is_live()
    }

    /// Works on the queue, with its lock held. Afterwards the driver gets its interrupt, if it wants one for what was
    /// completed. An error puts the device into the state that asks for a reset. `None` then, and where the queue is not
    /// there any more.
    pub fn with<T>(&self, work: impl FnOnce(&mut Queue) -> Result<T, QueueError>) -> Option<T> {
        let _turn = self.turn();
        let mut slot = self.lock();
        let queue = slot.as_mut().filter(|_| self.link.is_live())?;
        let done = work(queue).and_then(|value| Ok((value, queue.needs_notification()?)));
        // With the queue locked: after a reset, which takes it away, no interrupt comes.
        match done {
            Ok((value, notify)) => {
                if notify {
                    self.link.interrupts.raise(Event::Queue(self.index));
                }
                Some(value)
            }
            Err(error) => {
                self.link.fail(self.index, &format_args!("the driver gave {error}"));
                None
            }
        }
    }

    /// Where the guest is run twice and compared: a time in which it does not run, until this is dropped. A thread of a
    /// device's has it while it writes what the guest may see. Elsewhere it costs nothing.
    pub fn turn(&self) -> DeviceTurn<'_> {
        self.memory.guest().marks().device_turn()
    }

    /// Takes the next chain; `None` where there is none now, and then the driver is asked to notify.
    pub fn pop(&self) -> Option<Chain> {
        self.with(Queue::pop).flatten()
    }

    /// Gives a chain back, with so many bytes written to it.
    pub fn complete(&self, chain: &Chain, written: u32) {
        let _ = self.with(|queue| queue.complete(chain, written));
    }

    /// Answers what is in the queue, on the caller's thread: `request` gives the bytes that it wrote.
    pub fn serve(&self, mut request: impl FnMut(&DmaMemory, &Chain) -> Result<u32, QueueError>) {
        let _ = self.with(|queue| {
            while let Some(chain) = queue.pop()? {
                let written = request(&self.memory, &chain)?;
                queue.complete(&chain, written)?;
            }
            Ok(())
        });
    }

    /// Puts the device into the state that asks for a reset, with a reason for the log.
    pub fn fail(&self, reason: impl Display) {
        if self.lock().is_some() {
            self.link.fail(self.index, &reason);
        }
    }

    /// Takes the queue away from all clones. Nobody works on it any more when this comes back.
    pub(crate) fn close(&self) {
        *self.lock() = None;
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Queue>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Tells the driver that the configuration space has changed. Clones are for the same device.
#[derive(Clone)]
pub struct ConfigHandle(pub(crate) Arc<Link>);

impl ConfigHandle {
    /// What [`crate::Device::read_config`] gives is another thing now: the driver is to look, if it is there.
    pub fn changed(&self) {
        self.0.generation.fetch_add(1, Ordering::SeqCst);
        if self.0.is_live() {
            self.0.interrupts.raise(Event::Config);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;
    use std::sync::mpsc;
    use std::thread::JoinHandle;

    use super::*;
    use crate::features::{EVENT_IDX, INDIRECT_DESC, RING_PACKED};
    use crate::testing::{BUFFERS, Rig, WRITE};
    use crate::{Activation, Device};

    const FORMATS: [u64; 4] = [0, EVENT_IDX, RING_PACKED, RING_PACKED | EVENT_IDX];

    /// A device whose one queue is worked by a thread: it writes 7 to each buffer. `stopping` waits for its end.
    struct Threaded {
        worker: Option<(mpsc::Sender<()>, JoinHandle<()>)>,
        config: Arc<Mutex<Option<ConfigHandle>>>,
        /// The worker breaks the rules itself.
        gives_up: Arc<AtomicBool>,
        stale: Arc<Mutex<Vec<QueueHandle>>>,
    }

    impl Threaded {
        fn new() -> Self {
            let (config, gives_up, stale) = Default::default();
            Self { worker: None, config, gives_up, stale }
        }
    }

    fn work(queue: &QueueHandle, gives_up: &AtomicBool) {
        loop {
            queue.with(Queue::disable_notifications);
            while let Some(chain) = queue.pop() {
                if gives_up.load(Ordering::SeqCst) {
                    return queue.fail("the worker gave up");
                }
                let written = chain.write(queue.memory(), 0, &[7; 16]).unwrap();
                queue.complete(&chain, written as u32);
            }
            if queue.with(Queue::enable_notifications) != Some(true) {
                return;
            }
        }
    }

    impl Device for Threaded {
        fn id(&self) -> u16 {
            4
        }
        fn features(&self) -> u64 {
            0
        }
        fn queue_sizes(&self) -> &[u16] {
            &[16]
        }
        fn read_config(&mut self, _offset: u64, data: &mut [u8]) {
            data.fill(0);
        }
        fn write_config(&mut self, _offset: u64, _data: &[u8]) {}
        fn activate(&mut self, activation: Activation) {
            *self.config.lock().unwrap() = Some(activation.config.clone());
            let (queue, gives_up) = (activation.queue(0).unwrap(), self.gives_up.clone());
            self.stale.lock().unwrap().push(queue.clone());
            let (doorbell, rung) = mpsc::channel();
            let thread = std::thread::spawn(move || {
                while rung.recv().is_ok() {
                    work(&queue, &gives_up);
                }
            });
            self.worker = Some((doorbell, thread));
        }
        fn notify(&mut self, _index: u16) {
            self.worker.as_ref().unwrap().0.send(()).unwrap();
        }
        fn reset(&mut self) {
            if let Some((doorbell, thread)) = self.worker.take() {
                drop(doorbell);
                thread.join().unwrap();
            }
        }
    }

    #[test]
    fn a_thread_completes_requests_and_its_interrupts_come() {
        for format in FORMATS {
            let mut rig = Rig::new(Box::new(Threaded::new()), 16, format | INDIRECT_DESC);
            for round in 0..100 {
                rig.send(0, &[(BUFFERS, 8 + round % 4, true)]);
                assert_eq!(rig.wait_used(0).1, 8 + round % 4);
                if format & EVENT_IDX == 0 {
                    rig.wait_event(Event::Queue(0));
                }
                assert_eq!(rig.drivers[0].bytes(BUFFERS, 8), [7; 8]);
            }
        }
    }

    #[test]
    fn a_driver_that_notifies_only_when_asked_to_is_never_left_waiting() {
        for format in [0, RING_PACKED] {
            let mut rig = Rig::new(Box::new(Threaded::new()), 16, format);
            for _ in 0..3000 {
                rig.drivers[0].send(&[(BUFFERS, 4, true)], false);
                std::sync::atomic::fence(Ordering::SeqCst);
                if !rig.drivers[0].is_told_not_to_notify() {
                    rig.notify(0);
                }
                rig.wait_used(0);
            }
        }
    }

    #[test]
    fn after_a_reset_old_handles_do_nothing_and_new_ones_work() {
        for format in FORMATS {
            let device = Threaded::new();
            let stale = device.stale.clone();
            let mut rig = Rig::new(Box::new(device), 16, format);
            rig.restart();
            rig.take_events();
            let old = stale.lock().unwrap()[0].clone();
            rig.drivers[0].send(&[(BUFFERS, 4, true)], false);
            assert!(!old.is_live() && old.pop().is_none());
            old.complete(&Chain::default(), 3);
            old.fail("too late");
            assert_eq!((rig.status().bits(), rig.take_events()), (0xf, vec![]));
            rig.notify(0);
            assert_eq!(rig.wait_used(0).1, 4);
            rig.reset();
            assert_eq!(rig.status().bits(), 0);
        }
    }

    #[test]
    fn what_breaks_in_a_thread_asks_the_driver_for_a_reset_once() {
        for format in FORMATS {
            let mut rig = Rig::new(Box::new(Threaded::new()), 16, format);
            rig.drivers[0].publish(0, &[((u64::MAX - 1, 4), WRITE)]);
            rig.notify(0);
            rig.wait_event(Event::Config);
            assert_eq!(rig.status().bits(), 0x4f);
            rig.notify(0);
            rig.restart();
            rig.send(0, &[(BUFFERS, 4, true)]);
            assert_eq!(rig.wait_used(0).1, 4, "it works again");
        }
        let device = Threaded::new();
        device.gives_up.store(true, Ordering::SeqCst);
        let mut rig = Rig::new(Box::new(device), 16, 0);
        rig.send(0, &[(BUFFERS, 4, true)]);
        rig.wait_event(Event::Config);
        assert_eq!(rig.status().bits(), 0x4f);
    }

    #[test]
    fn a_change_of_the_configuration_is_told_while_there_is_a_driver() {
        let device = Threaded::new();
        let config = device.config.clone();
        let mut rig = Rig::new(Box::new(device), 16, 0);
        let (config, before) = (config.lock().unwrap().clone().unwrap(), rig.config_generation());
        config.changed();
        assert_ne!(rig.config_generation(), before);
        assert_eq!(rig.take_events(), [Event::Config]);
        rig.reset();
        config.changed();
        assert_eq!(rig.take_events(), []);
    }

    #[test]
    fn a_driver_with_more_requests_than_its_ring_has_room_for_is_stopped() {
        for format in [0, RING_PACKED] {
            let driver = crate::testing::Driver::new(4, format);
            let mut queue = driver.queue();
            let mut driver = driver;
            for _ in 0..4 {
                driver.send(&[(BUFFERS, 4, true)], false);
                queue.pop().unwrap().unwrap();
            }
            driver.send(&[(BUFFERS, 4, true)], false);
            assert_eq!(queue.pop(), Err(QueueError::InFlight(4)));
        }
    }
}
