//! A serial port's output on its way to the host: a bounded queue and the thread that writes it.
//!
//! The guest writes a byte at a time and must not wait for a system call each. The queue is bounded: where nobody
//! reads it fills up, and the port keeps the guest waiting. When the run ends, what is queued is still written.

use std::io::{self, ErrorKind, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use devices::serial::SerialOutput;

use crate::outcome::{Ending, Outcome, StopReason};

/// Bytes that wait to be written before the guest waits too.
const CAPACITY: usize = 64 * 1024;
/// How long the writer lets bytes gather after it has written some: the guest sends a line byte by byte.
const GATHER: Duration = Duration::from_millis(2);
/// How long a reader that does not read may hold up the end of a run that was stopped from outside.
const LINGER: Duration = Duration::from_millis(200);

/// The port's end: it takes what there is room for. Clones write to the same queue.
#[derive(Clone)]
pub struct Output(Arc<Shared>);

/// The writing thread's handle.
pub struct OutputThread {
    shared: Arc<Shared>,
    thread: JoinHandle<()>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    /// Something to write, or the end.
    work: Condvar,
    /// Written out, or given up.
    finished: Condvar,
}

#[derive(Default)]
struct State {
    queue: Vec<u8>,
    /// The writer waits for `work`.
    idle: bool,
    /// No more will come.
    closed: bool,
    /// The writer has ended.
    done: bool,
}

impl Output {
    /// Starts the thread that writes to `sink`. Where that fails, the run ends.
    ///
    /// # Errors
    /// The host's, where it gives no thread.
    pub fn start(mut sink: Box<dyn Write + Send>, ending: &Ending) -> io::Result<(Self, OutputThread)> {
        let shared = Arc::new(Shared::default());
        let (writer, end) = (shared.clone(), ending.clone());
        let thread = std::thread::Builder::new().name("output".into()).spawn(move || {
            if let Err(error) = writer.write_out(&mut *sink) {
                end.report(failed(&error));
            }
            let mut state = writer.lock();
            state.done = true;
            state.queue.clear();
            writer.finished.notify_all();
        })?;
        Ok((Self(shared.clone()), OutputThread { shared, thread }))
    }
}

/// A reader that went away is no error of ours.
fn failed(error: &io::Error) -> Outcome {
    match error.kind() {
        ErrorKind::BrokenPipe => Outcome::Stopped(StopReason::OutputClosed),
        _ => Outcome::HostError(format!("cannot write the guest's output: {error}")),
    }
}

impl SerialOutput for Output {
    /// Once the writer has given up, bytes go nowhere: the guest must not wait for a reader that will never come.
    fn accept(&mut self, bytes: &[u8]) -> usize {
        let mut state = self.0.lock();
        if state.done {
            return bytes.len();
        }
        let count = bytes.len().min(CAPACITY.saturating_sub(state.queue.len()));
        state.queue.extend_from_slice(&bytes[..count]);
        if state.idle {
            state.idle = false;
            self.0.work.notify_one();
        }
        count
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_out(&self, sink: &mut dyn Write) -> io::Result<()> {
        let mut batch = Vec::with_capacity(CAPACITY);
        while self.take(&mut batch) {
            write_whole(sink, &batch)?;
            batch.clear();
            let state = self.lock();
            if state.queue.is_empty() && !state.closed {
                // An idle writer is woken for each byte; one that gathers is not.
                drop(self.work.wait_timeout(state, GATHER));
            }
        }
        Ok(())
    }

    /// Waits for bytes and takes them all; false when no more will come.
    fn take(&self, batch: &mut Vec<u8>) -> bool {
        let mut state = self.lock();
        while state.queue.is_empty() {
            if state.closed {
                return false;
            }
            state.idle = true;
            state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
            state.idle = false;
        }
        std::mem::swap(batch, &mut state.queue);
        true
    }
}

/// Writes and flushes all of it, also to a terminal that somebody has made non-blocking.
fn write_whole(sink: &mut dyn Write, mut bytes: &[u8]) -> io::Result<()> {
    loop {
        let done = if bytes.is_empty() { sink.flush().map(|()| 0) } else { sink.write(bytes) };
        match done {
            Ok(_) if bytes.is_empty() => return Ok(()),
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(count) => bytes = &bytes[count.min(bytes.len())..],
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => std::thread::sleep(GATHER),
            Err(error) => return Err(error),
        }
    }
}

impl OutputThread {
    /// Writes out what is queued and ends. A run that was stopped from outside does not wait for a reader that does
    /// not read.
    pub fn finish(self, stopped: bool) {
        let limit = stopped.then(|| Instant::now() + LINGER);
        let mut state = self.shared.lock();
        state.closed = true;
        self.shared.work.notify_all();
        while !state.done {
            match limit.map(|limit| limit.saturating_duration_since(Instant::now())) {
                None => state = self.shared.finished.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(Duration::ZERO) => return,
                Some(left) => {
                    state = self
                        .shared
                        .finished
                        .wait_timeout(state, left)
                        .unwrap_or_else(PoisonError::into_inner)
                        .0;
                }
            }
        }
        drop(state);
        // It has ended but for its last few instructions.
        let _ = self.thread.join();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    /// Takes what is written once it is let.
    struct Gate(mpsc::Receiver<()>, Arc<Mutex<Vec<u8>>>);

    impl Write for Gate {
        fn write(&mut self, data: &[u8]) -> io::Result<usize> {
            let _ = self.0.recv();
            self.1.lock().unwrap().extend_from_slice(data);
            Ok(data.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// An output to a [`Gate`] that dropping `open` lets.
    struct Gated {
        output: Output,
        thread: OutputThread,
        open: mpsc::Sender<()>,
        written: Arc<Mutex<Vec<u8>>>,
    }

    fn gated() -> Gated {
        let (open, gate) = mpsc::channel();
        let written = Arc::new(Mutex::new(Vec::new()));
        let sink = Box::new(Gate(gate, written.clone()));
        let (output, thread) = Output::start(sink, &Ending::new()).unwrap();
        Gated { output, thread, open, written }
    }

    fn write(output: &mut Output, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            bytes = &bytes[output.accept(bytes)..];
        }
    }

    #[test]
    fn everything_is_written_in_order_by_the_end() {
        let Gated { mut output, thread, open, written } = gated();
        drop(open);
        let bytes: Vec<u8> = (0..200_000u32).map(|i| i as u8).collect();
        for byte in &bytes {
            write(&mut output, &[*byte]);
        }
        thread.finish(false);
        assert!(*written.lock().unwrap() == bytes);
    }

    #[test]
    fn a_flood_is_refused_once_the_queue_is_full_and_a_stopped_run_does_not_wait_for_the_reader() {
        let Gated { mut output, thread, open, .. } = gated();
        let taken: usize = (0..10).map(|_| output.accept(&vec![0; CAPACITY])).sum();
        assert!((CAPACITY..=2 * CAPACITY).contains(&taken), "{taken}");
        assert_eq!(output.accept(b"x"), 0);
        thread.finish(true);
        drop(open);
    }

    #[test]
    fn a_sink_that_does_not_block_still_gets_everything() {
        struct Reluctant(u32, Arc<Mutex<Vec<u8>>>);
        impl Write for Reluctant {
            fn write(&mut self, data: &[u8]) -> io::Result<usize> {
                self.0 += 1;
                if self.0 % 2 == 1 {
                    return Err(ErrorKind::WouldBlock.into());
                }
                self.1.lock().unwrap().push(data[0]);
                Ok(1)
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let written = Arc::new(Mutex::new(Vec::new()));
        let sink = Box::new(Reluctant(0, written.clone()));
        let (mut output, thread) = Output::start(sink, &Ending::new()).unwrap();
        write(&mut output, b"hello");
        thread.finish(false);
        assert_eq!(*written.lock().unwrap(), b"hello");
    }

    #[test]
    fn a_reader_that_went_away_ends_the_run() {
        struct Closed;
        impl Write for Closed {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let ending = Ending::new();
        let (mut output, thread) = Output::start(Box::new(Closed), &ending).unwrap();
        write(&mut output, b"x");
        assert_eq!(ending.wait(), Outcome::Stopped(StopReason::OutputClosed));
        write(&mut output, &vec![0; 2 * CAPACITY]);
        thread.finish(false);
    }
}
