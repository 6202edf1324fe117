//! What the vCPUs of a machine tell each other: that a page now holds translated code.
//!
//! A vCPU may hold a translation-cache entry that lets it store to a page without looking. When another decodes code
//! from that page, the entry has to go. The decoding vCPU does not wait for that: it marks the page, asks the others,
//! and goes on. Whoever finds such an entry drops it and makes the page's code stale, as a store would have. The
//! processor's rules for cross-modifying code (SDM vol. 3, *Handling Self- and Cross-Modifying Code*) let old code
//! run until a serializing instruction, so only that one waits for the answers ([`Peers::settle`]).

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use engine::{Attention, Signals};
use guest_memory::Offset;

/// One vCPU as the others see it.
#[derive(Debug)]
struct Peer {
    attention: Mutex<Option<Arc<Attention>>>,
    /// Whether it executes guest code or is about to. Otherwise it looks at its requests before it does.
    running: AtomicBool,
    requests: Mutex<Requests>,
}

#[derive(Debug, Default)]
struct Requests {
    pages: BTreeSet<Offset>,
    /// Each is counted down by one when all of the pages are done.
    open: Vec<Arc<AtomicU32>>,
}

/// One a machine.
#[derive(Debug)]
pub struct Shared(Box<[Peer]>);

impl Shared {
    /// For a number of vCPUs.
    pub fn new(cpus: u32) -> Self {
        let peer = || Peer {
            attention: Mutex::new(None),
            running: AtomicBool::new(false),
            requests: Mutex::default(),
        };
        Self((0..cpus).map(|_| peer()).collect())
    }
}

/// One vCPU's side of [`Shared`].
#[derive(Debug)]
pub struct Peers {
    shared: Arc<Shared>,
    me: usize,
    open: Arc<AtomicU32>,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

impl Peers {
    /// Joins as vCPU `me`.
    pub fn join(shared: Arc<Shared>, me: u32, attention: Arc<Attention>) -> Self {
        let me = me as usize;
        if let Some(peer) = shared.0.get(me) {
            *lock(&peer.attention) = Some(attention);
        }
        Self { shared, me, open: Arc::default() }
    }

    /// About to execute guest code: others have to ask from now on. Call [`Peers::take_requests`] after it.
    pub fn enter(&self) {
        if let Some(peer) = self.shared.0.get(self.me) {
            peer.running.store(true, Ordering::SeqCst);
        }
    }

    /// No longer executing guest code.
    pub fn leave(&self) {
        if let Some(peer) = self.shared.0.get(self.me) {
            peer.running.store(false, Ordering::SeqCst);
        }
    }

    /// A page holds translated code now: asks the others to stop storing to it unseen.
    pub fn announce_code(&self, page: Offset) {
        for (_, peer) in self.shared.0.iter().enumerate().filter(|&(n, _)| n != self.me) {
            let mut requests = lock(&peer.requests);
            requests.pages.insert(page);
            if peer.running.load(Ordering::SeqCst) {
                self.open.fetch_add(1, Ordering::SeqCst);
                requests.open.push(self.open.clone());
            }
            drop(requests);
            if peer.running.load(Ordering::SeqCst)
                && let Some(attention) = &*lock(&peer.attention)
            {
                attention.raise(Signals::ENGINE);
            }
        }
    }

    /// Answers what the others asked: `drop_writes` drops the translation-cache entries and says whether there were
    /// any, `stale` makes the page's code stale.
    pub fn take_requests(&self, mut drop_writes: impl FnMut(Offset) -> bool, stale: impl Fn(Offset)) {
        let Some(peer) = self.shared.0.get(self.me) else { return };
        let mut requests = lock(&peer.requests);
        for page in std::mem::take(&mut requests.pages) {
            if drop_writes(page) {
                stale(page);
            }
        }
        for open in requests.open.drain(..) {
            open.fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// Whether all requests were answered.
    pub fn is_settled(&self) -> bool {
        self.open.load(Ordering::SeqCst) == 0
    }
}
