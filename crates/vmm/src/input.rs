//! A serial port's input on its way from the host: a bounded queue and the thread that feeds the port.
//!
//! The port takes a few bytes at a time and the guest may be slow, or not there yet: what is read from the host waits
//! here, and its reader waits where the queue is full.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::outcome::Ending;

/// Bytes that wait for the guest.
const CAPACITY: usize = 64 * 1024;
/// How often the port is asked for room where it does not tell.
const ASK_AGAIN: Duration = Duration::from_millis(20);
/// Ctrl-D: end of input, to a terminal.
const END_OF_INPUT: u8 = 0x04;
/// How long after the first Ctrl-D another one is sent; the time doubles up to the bound.
const END_AGAIN: Duration = Duration::from_millis(100);
const END_AGAIN_AT_MOST: Duration = Duration::from_secs(8);

/// The guest's end of the line.
pub trait Port: Send + Sync {
    /// Whether the guest has opened the port: what arrives before is lost to it.
    fn is_open(&self) -> bool;
    /// Gives bytes to the port; how many it took.
    fn push(&self, data: &[u8]) -> usize;
    /// Whether the guest has read all that was pushed.
    fn is_empty(&self) -> bool;
}

/// The host's end of the line. Clones are the same line; it outlives the machines that are fed from it.
#[derive(Clone, Default)]
pub struct Input(Arc<Shared>);

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    queue: VecDeque<u8>,
    /// Whether bytes wait until the guest has opened the port.
    patient: bool,
    ended: bool,
    /// The last byte that was pushed.
    last: Option<u8>,
}

impl Input {
    /// A line for what a person types: bytes go to the guest as they come, whether it is ready or not.
    pub fn interactive() -> Self {
        Self::default()
    }

    /// A line for a file or a pipe: bytes wait until the guest has opened the port.
    pub fn patient() -> Self {
        let input = Self::default();
        input.0.lock().patient = true;
        input
    }

    /// Queues bytes, waiting for room.
    pub fn send(&self, mut data: &[u8]) {
        while !data.is_empty() {
            let sent = self.try_send(data);
            data = &data[sent..];
            if sent == 0 {
                let state = self.0.lock();
                if state.queue.len() >= CAPACITY {
                    drop(self.0.changed.wait(state).unwrap_or_else(PoisonError::into_inner));
                }
            }
        }
    }

    /// Queues what there is room for; how many bytes that is.
    pub fn try_send(&self, data: &[u8]) -> usize {
        let mut state = self.0.lock();
        let count = data.len().min(CAPACITY.saturating_sub(state.queue.len()));
        state.queue.extend(&data[..count]);
        self.0.changed.notify_all();
        count
    }

    /// No more will come. Once the guest has read the rest it gets an end of line, where that does not end in one,
    /// and Ctrl-D; and Ctrl-D again while the run goes on, for a program other than the shell may have taken it.
    pub fn end(&self) {
        self.0.lock().ended = true;
        self.0.changed.notify_all();
    }

    /// The port may have room again.
    pub fn nudge(&self) {
        self.0.changed.notify_all();
    }

    /// Starts the thread that feeds `port` until the run ends.
    ///
    /// # Errors
    /// The host's, where it gives no thread.
    pub fn feed(&self, port: Box<dyn Port>, ending: &Ending) -> std::io::Result<JoinHandle<()>> {
        let (shared, nudged, end) = (self.0.clone(), Arc::downgrade(&self.0), ending.clone());
        ending.calls(move || {
            if let Some(shared) = nudged.upgrade() {
                // With the lock, so that the feeder does not miss it between its look and its wait.
                drop(shared.lock());
                shared.changed.notify_all();
            }
        });
        std::thread::Builder::new().name("input".into()).spawn(move || {
            while !end.has_come() && shared.pass_on(&*port, &end) {}
            shared.insist_on_the_end(&*port, &end);
        })
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the port what it takes, or waits for something to change. False when all is given and read.
    fn pass_on(&self, port: &dyn Port, ending: &Ending) -> bool {
        let mut state = self.lock();
        if state.queue.is_empty() {
            if state.ended && port.is_empty() {
                return false;
            }
            let limit = if state.ended { Some(ASK_AGAIN) } else { None };
            self.wait(state, ending, limit);
            return true;
        }
        if state.patient && !port.is_open() {
            self.wait(state, ending, Some(ASK_AGAIN));
            return true;
        }
        let (chunk, _) = state.queue.as_slices();
        let taken = port.push(chunk).min(chunk.len());
        if taken == 0 {
            self.wait(state, ending, Some(ASK_AGAIN));
            return true;
        }
        state.last = chunk.get(taken - 1).copied();
        state.queue.drain(..taken);
        self.changed.notify_all();
        true
    }

    fn wait(&self, state: MutexGuard<'_, State>, ending: &Ending, limit: Option<Duration>) {
        if ending.has_come() {
            return;
        }
        match limit {
            None => drop(self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)),
            Some(limit) => {
                drop(self.changed.wait_timeout(state, limit).unwrap_or_else(PoisonError::into_inner));
            }
        }
    }

    fn insist_on_the_end(&self, port: &dyn Port, ending: &Ending) {
        let ends_in_a_line = matches!(self.lock().last, None | Some(b'\n' | b'\r'));
        let mut bytes: &[u8] = if ends_in_a_line { &[END_OF_INPUT] } else { &[b'\n', END_OF_INPUT] };
        let mut pause = END_AGAIN;
        while !ending.has_come() {
            if port.is_open() && port.is_empty() {
                let taken = port.push(bytes).min(bytes.len());
                bytes = &bytes[taken..];
                if bytes.is_empty() {
                    bytes = &[END_OF_INPUT];
                    self.rest(ending, pause);
                    pause = (pause * 2).min(END_AGAIN_AT_MOST);
                    continue;
                }
            }
            self.rest(ending, ASK_AGAIN);
        }
    }

    /// Waits so long, or until the run ends.
    fn rest(&self, ending: &Ending, pause: Duration) {
        let until = Instant::now() + pause;
        let mut state = self.lock();
        while !ending.has_come() && Instant::now() < until {
            let left = until.saturating_duration_since(Instant::now());
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outcome::Outcome;
    use std::sync::atomic::{AtomicBool, Ordering};

    /// A guest that reads when it is told to; the port's FIFO has 16 bytes.
    #[derive(Clone, Default)]
    struct Guest(Arc<(Mutex<VecDeque<u8>>, AtomicBool)>);

    impl Port for Guest {
        fn is_open(&self) -> bool {
            self.0.1.load(Ordering::SeqCst)
        }
        fn push(&self, data: &[u8]) -> usize {
            let mut fifo = self.0.0.lock().unwrap();
            let count = data.len().min(16 - fifo.len());
            fifo.extend(&data[..count]);
            count
        }
        fn is_empty(&self) -> bool {
            self.0.0.lock().unwrap().is_empty()
        }
    }

    impl Guest {
        fn open(&self) {
            self.0.1.store(true, Ordering::SeqCst);
        }
        fn read(&self) -> Vec<u8> {
            self.0.0.lock().unwrap().drain(..).collect()
        }
        fn read_until(&self, enough: impl Fn(&[u8]) -> bool) -> Vec<u8> {
            let (mut bytes, limit) = (Vec::new(), Instant::now() + Duration::from_secs(10));
            while !enough(&bytes) && Instant::now() < limit {
                bytes.extend(self.read());
                std::thread::sleep(Duration::from_millis(1));
            }
            bytes
        }
    }

    fn fed(input: &Input) -> (Guest, Ending, JoinHandle<()>) {
        let (guest, ending) = (Guest::default(), Ending::new());
        let thread = input.feed(Box::new(guest.clone()), &ending).unwrap();
        (guest, ending, thread)
    }

    fn stop(ending: &Ending, thread: JoinHandle<()>) {
        ending.report(Outcome::PowerOff);
        thread.join().unwrap();
    }

    #[test]
    fn a_pipes_bytes_wait_until_the_guest_has_opened_the_port() {
        let input = Input::patient();
        input.send(b"early\n");
        let (guest, ending, thread) = fed(&input);
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(guest.read(), b"");
        guest.open();
        assert_eq!(guest.read_until(|bytes| bytes.len() >= 6), b"early\n");
        stop(&ending, thread);
    }

    #[test]
    fn typed_bytes_do_not_wait() {
        let input = Input::interactive();
        let (guest, ending, thread) = fed(&input);
        input.send(b"x");
        assert_eq!(guest.read_until(|bytes| !bytes.is_empty()), b"x");
        stop(&ending, thread);
    }

    #[test]
    fn more_than_everyone_can_hold_arrives_whole_and_then_the_end() {
        let input = Input::patient();
        let (guest, ending, thread) = fed(&input);
        guest.open();
        let bytes: Vec<u8> = (0..CAPACITY + 5000).map(|i| i as u8 | 0x80).collect();
        let (sender, sent) = (input.clone(), bytes.clone());
        let sending = std::thread::spawn(move || {
            sender.send(&sent);
            sender.end();
        });
        let nudging = input.clone();
        let got = guest.read_until(|got| {
            nudging.nudge();
            got.ends_with(&[b'\n', END_OF_INPUT])
        });
        sending.join().unwrap();
        assert_eq!(got.len(), bytes.len() + 2);
        assert!(got.starts_with(&bytes));
        stop(&ending, thread);
    }

    #[test]
    fn the_end_is_told_again_while_the_guest_goes_on() {
        let input = Input::patient();
        input.send(b"exit\n");
        input.end();
        let (guest, ending, thread) = fed(&input);
        guest.open();
        assert_eq!(guest.read_until(|bytes| bytes.len() >= 7), b"exit\n\x04\x04");
        stop(&ending, thread);
    }

    #[test]
    fn a_full_queue_holds_up_nobody_who_only_tries() {
        let input = Input::interactive();
        assert_eq!(input.try_send(&vec![0; 2 * CAPACITY]), CAPACITY);
        assert_eq!(input.try_send(b"x"), 0);
    }
}
