//! What both protocols' devices share: threads that take requests out of queues and give answers back.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use super::{Errno, Result};
use crate::QueueHandle;
use crate::memory::DmaMemory;
use crate::queue::{Chain, QueueError};

/// How often a lock that somebody on the host may have is asked for again.
const RETRY: Duration = Duration::from_millis(20);
/// Bytes of a request that tell what it is.
const START: usize = 64;

/// Where the bytes of files come from and go to: the parts of a request and its answer that are no message.
pub trait Payload {
    /// Writes the request's bytes from `skip` on to a file.
    ///
    /// # Errors
    /// The host's.
    fn store(&mut self, skip: usize, len: usize, file: BorrowedFd<'_>, offset: u64) -> Result<usize>;
    /// Reads a file into the answer from `skip` on.
    ///
    /// # Errors
    /// The host's.
    fn load(&mut self, skip: usize, len: usize, file: BorrowedFd<'_>, offset: u64) -> Result<usize>;
    /// Copies the request's bytes from `skip` on; how many there were.
    ///
    /// # Errors
    /// `EFAULT` for memory that is not there.
    fn fetch(&mut self, skip: usize, data: &mut [u8]) -> Result<usize>;
}

/// What comes of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// Nothing is answered.
    None,
    /// These bytes, and behind them so many that [`Payload::load`] has put there.
    Bytes {
        /// The message.
        bytes: Vec<u8>,
        /// Bytes of a file behind it.
        loaded: usize,
    },
    /// It is to be asked again until it is answered; others know it by this number.
    Wait(u64),
    /// The request of this number is not to be waited for any more. Nothing is answered.
    Cancel(u64),
    /// As `Cancel`, and this is answered.
    Cancelled(u64, Vec<u8>),
}

/// A protocol: requests to answers. It is asked from several threads at a time.
pub trait Server: Send + Sync {
    /// How many of a request's bytes are its message, at most; its first ones are at hand.
    fn head_len(&self, start: &[u8]) -> usize;
    /// Whether a request may take so long that another thread should look at the next one meanwhile.
    fn is_slow(&self, head: &[u8]) -> bool;
    /// Carries out a request. There is room for so many bytes of an answer.
    fn handle(&self, head: &[u8], room: usize, payload: &mut dyn Payload) -> Reply;
    /// The answer to a request that is not carried out.
    fn refuse(&self, head: &[u8], error: Errno) -> Vec<u8>;
    /// The guest begins anew.
    fn reset(&self);
}

/// A request's buffers in guest memory.
struct ChainPayload<'a> {
    memory: &'a DmaMemory,
    chain: &'a Chain,
}

fn errno(error: &io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

impl Payload for ChainPayload<'_> {
    fn store(&mut self, skip: usize, len: usize, file: BorrowedFd<'_>, offset: u64) -> Result<usize> {
        let mut slices = self.memory.slices();
        let range = (skip as u64, len as u64);
        self.chain.add_readable(self.memory, range, &mut slices).map_err(|_| Errno::FAULT)?;
        transfer(slices.len(), offset, |done| {
            let mut rest = slices.clone();
            rest.skip(done);
            rest.write_to(file, Some(offset + done))
        })
    }

    fn load(&mut self, skip: usize, len: usize, file: BorrowedFd<'_>, offset: u64) -> Result<usize> {
        let mut slices = self.memory.slices();
        let range = (skip as u64, len as u64);
        self.chain.add_writable(self.memory, range, &mut slices).map_err(|_| Errno::FAULT)?;
        transfer(slices.len(), offset, |done| {
            let mut rest = slices.clone();
            rest.skip(done);
            rest.read_from(file, Some(offset + done))
        })
    }

    fn fetch(&mut self, skip: usize, data: &mut [u8]) -> Result<usize> {
        self.chain.read(self.memory, skip as u64, data).map_err(|_| Errno::FAULT)
    }
}

/// Moves bytes until all are moved, no more come or the host has an error: the host may take fewer at a time.
fn transfer(len: u64, offset: u64, mut step: impl FnMut(u64) -> io::Result<usize>) -> Result<usize> {
    if offset.checked_add(len).is_none_or(|end| end > i64::MAX as u64) {
        return Err(Errno::INVAL);
    }
    let mut done = 0;
    while done < len {
        match step(done) {
            Ok(0) => break,
            Ok(more) => done += more as u64,
            Err(error) if done == 0 => return Err(errno(&error)),
            Err(_) => break,
        }
    }
    Ok(done as usize)
}

/// A request that waits for a lock.
struct Waiting {
    queue: QueueHandle,
    chain: Chain,
    head: Vec<u8>,
    number: u64,
}

#[derive(Default)]
struct Bell {
    rung: bool,
    stopped: bool,
}

/// What the threads share.
struct Shared {
    server: Arc<dyn Server>,
    queues: Vec<QueueHandle>,
    bell: Mutex<Bell>,
    ringing: Condvar,
    waiting: Mutex<Vec<Waiting>>,
    /// The most requests that wait at a time: the others need entries of the ring as well.
    most_waiting: usize,
}

/// The threads of one device.
pub struct Workers {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Workers {
    /// Starts so many threads that answer what is in the queues. Where the host has no more threads the device is broken,
    /// and the log says why.
    pub fn begin(
        server: Arc<dyn Server>,
        queues: Vec<QueueHandle>,
        threads: usize,
        most_waiting: usize,
    ) -> Option<Self> {
        let handles = queues.clone();
        Self::start(server, queues, threads, most_waiting)
            .map_err(|error| {
                for queue in &handles {
                    queue.fail(format_args!("the host has no thread for it: {error}"));
                }
            })
            .ok()
    }

    fn start(
        server: Arc<dyn Server>,
        queues: Vec<QueueHandle>,
        threads: usize,
        most_waiting: usize,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            server,
            queues,
            bell: Mutex::default(),
            ringing: Condvar::new(),
            waiting: Mutex::default(),
            most_waiting,
        });
        let mut workers = Self { shared, threads: Vec::new() };
        for _ in 0..threads {
            let shared = workers.shared.clone();
            let thread = std::thread::Builder::new().name("share".to_owned()).spawn(move || shared.run())?;
            workers.threads.push(thread);
        }
        Ok(workers)
    }

    /// There is something in a queue.
    pub fn ring(&self) {
        self.shared.ring();
    }
}

impl Drop for Workers {
    /// Comes back when no thread works any more.
    fn drop(&mut self) {
        lock(&self.shared.bell).stopped = true;
        self.shared.ringing.notify_all();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn ring(&self) {
        lock(&self.bell).rung = true;
        self.ringing.notify_one();
    }

    fn is_stopped(&self) -> bool {
        lock(&self.bell).stopped
    }

    fn run(&self) {
        while self.wait() {
            let mut head = Vec::new();
            while let Some((queue, chain)) = self.next() {
                let _turn = queue.turn();
                if let Err(error) = self.answer(queue, chain, &mut head) {
                    queue.fail(error);
                }
                if self.is_stopped() {
                    return;
                }
            }
            self.ask_again();
        }
    }

    /// Waits until there is something to do; `false` at the end.
    fn wait(&self) -> bool {
        let mut bell = lock(&self.bell);
        while !bell.rung && !bell.stopped {
            if lock(&self.waiting).is_empty() {
                bell = self.ringing.wait(bell).unwrap_or_else(PoisonError::into_inner);
            } else {
                let (guard, timeout) =
                    self.ringing.wait_timeout(bell, RETRY).unwrap_or_else(PoisonError::into_inner);
                bell = guard;
                if timeout.timed_out() {
                    break;
                }
            }
        }
        bell.rung = false;
        !bell.stopped
    }

    /// The next request of any queue.
    fn next(&self) -> Option<(&QueueHandle, Chain)> {
        self.queues.iter().find_map(|queue| Some((queue, queue.pop()?)))
    }

    fn answer(
        &self,
        queue: &QueueHandle,
        chain: Chain,
        head: &mut Vec<u8>,
    ) -> std::result::Result<(), QueueError> {
        let memory = queue.memory();
        let len = usize::try_from(chain.readable_len()).unwrap_or(usize::MAX);
        head.resize(START.min(len), 0);
        chain.read(memory, 0, head)?;
        let message = self.server.head_len(head).min(len);
        if message > START {
            head.resize(message, 0);
            chain.read(memory, 0, head)?;
        }
        if self.server.is_slow(head) {
            self.ring();
        }
        let room = usize::try_from(chain.writable_len()).unwrap_or(usize::MAX);
        let mut payload = ChainPayload { memory, chain: &chain };
        match self.server.handle(head, room, &mut payload) {
            Reply::None => queue.complete(&chain, 0),
            Reply::Bytes { bytes, loaded } => give(queue, &chain, &bytes, loaded)?,
            Reply::Wait(number) => self.keep_waiting(queue, chain, head, number)?,
            Reply::Cancel(number) => {
                self.cancel(number)?;
                queue.complete(&chain, 0);
            }
            Reply::Cancelled(number, bytes) => {
                self.cancel(number)?;
                give(queue, &chain, &bytes, 0)?;
            }
        }
        Ok(())
    }

    fn keep_waiting(
        &self,
        queue: &QueueHandle,
        chain: Chain,
        head: &[u8],
        number: u64,
    ) -> std::result::Result<(), QueueError> {
        let mut waiting = lock(&self.waiting);
        if waiting.len() >= self.most_waiting {
            return give(queue, &chain, &self.server.refuse(head, Errno::NOLCK), 0);
        }
        waiting.push(Waiting { queue: queue.clone(), chain, head: head.to_vec(), number });
        Ok(())
    }

    /// Answers a request that waits, without what it waits for.
    fn cancel(&self, number: u64) -> std::result::Result<(), QueueError> {
        let mut waiting = lock(&self.waiting);
        let Some(index) = waiting.iter().position(|request| request.number == number) else { return Ok(()) };
        let Waiting { queue, chain, head, .. } = waiting.remove(index);
        give(&queue, &chain, &self.server.refuse(&head, Errno::INTR), 0)
    }

    /// Asks once more for what others wait for.
    fn ask_again(&self) {
        let mut waiting = lock(&self.waiting);
        waiting.retain(|request| {
            let Waiting { queue, chain, head, .. } = request;
            let _turn = queue.turn();
            let mut payload = ChainPayload { memory: queue.memory(), chain };
            let room = usize::try_from(chain.writable_len()).unwrap_or(usize::MAX);
            let Reply::Bytes { bytes, loaded } = self.server.handle(head, room, &mut payload) else {
                return true;
            };
            if let Err(error) = give(queue, chain, &bytes, loaded) {
                queue.fail(error);
            }
            false
        });
    }
}

/// Gives an answer back, as far as there is room for it.
fn give(
    queue: &QueueHandle,
    chain: &Chain,
    bytes: &[u8],
    loaded: usize,
) -> std::result::Result<(), QueueError> {
    let written = chain.write(queue.memory(), 0, bytes)?;
    queue.complete(chain, (written + loaded) as u32);
    Ok(())
}
