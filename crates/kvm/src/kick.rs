//! How another thread gets a vCPU out of the guest.
//!
//! KVM looks at `kvm_run.immediate_exit` on every entry, and leaves the guest for a signal. Whoever wants attention has
//! raised the attention word; its hook then sets `immediate_exit` and sends the signal. In this order nothing is lost:
//! outside KVM_RUN the flag ends the next one at once, inside it the signal does.
#![allow(unsafe_code)] // The flag in memory shared with the kernel, and a signal to a thread.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use engine::EngineError;
use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use crate::error::host;

/// Where a vCPU is, for those who kick it. Lock order: this one is taken last and nothing is called under it.
pub(crate) struct Kicker {
    flag: ImmediateExit,
    /// The thread that runs the vCPU; none while it is outside `run`, where no signal is needed.
    thread: Mutex<Option<libc::pthread_t>>,
}

/// `kvm_run.immediate_exit`.
struct ImmediateExit(NonNull<u8>);

// SAFETY: the byte is only accessed as an atomic, see `ImmediateExit::store`.
unsafe impl Send for ImmediateExit {}
// SAFETY: as above.
unsafe impl Sync for ImmediateExit {}

/// While it lives, kicks send a signal to this thread.
pub(crate) struct Running<'a>(&'a Kicker);

impl Kicker {
    /// For a vCPU. Harmless once the vCPU is gone: then nothing is inside `run`.
    pub(crate) fn new(vcpu: &mut VcpuFd) -> Result<Arc<Self>, EngineError> {
        register_handler()?;
        let run: *mut kvm_run = vcpu.get_kvm_run();
        // SAFETY: `run` points to a whole kvm_run, which is mapped as long as the descriptor lives.
        let flag = unsafe { NonNull::new_unchecked(&raw mut (*run).immediate_exit) };
        Ok(Arc::new(Self { flag: ImmediateExit(flag), thread: Mutex::new(None) }))
    }

    /// The vCPU is entered on this thread.
    pub(crate) fn enter(&self) -> Running<'_> {
        // SAFETY: it has no preconditions.
        *self.lock() = Some(unsafe { libc::pthread_self() });
        Running(self)
    }

    /// Makes KVM_RUN return, now or as soon as it is entered. To be called after the attention word was raised.
    pub(crate) fn kick(&self) {
        let thread = self.lock();
        let Some(thread) = *thread else { return };
        self.flag.store(1);
        // SAFETY: the thread is inside `run` until it takes this lock again, so its handle is valid.
        unsafe {
            if libc::pthread_equal(thread, libc::pthread_self()) == 0 {
                libc::pthread_kill(thread, SIGRTMIN());
            }
        }
    }

    /// Ends the next KVM_RUN at once. Only for the vCPU's own thread.
    pub(crate) fn stop_next_entry(&self) {
        self.flag.store(1);
    }

    /// Forgets kicks. Only for the vCPU's own thread, which must look at its attention word afterwards.
    pub(crate) fn clear(&self) {
        self.flag.store(0);
    }

    fn lock(&self) -> MutexGuard<'_, Option<libc::pthread_t>> {
        self.thread.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        *self.0.lock() = None;
    }
}

impl ImmediateExit {
    fn store(&self, value: u8) {
        // SAFETY: stores happen inside `KvmVcpu::run` only: on its thread, or on another one while `Kicker::thread` says
        // that it is inside. The vCPU's descriptor, and with it the mapping, lives through `run`. Besides us only the
        // kernel looks at the byte.
        unsafe { AtomicU8::from_ptr(self.0.as_ptr()) }.store(value, Ordering::SeqCst);
    }
}

/// A handler that does nothing: that the signal arrives is enough.
fn register_handler() -> Result<(), EngineError> {
    extern "C" fn ignore(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    static REGISTERED: OnceLock<Result<(), kvm_ioctls::Error>> = OnceLock::new();
    REGISTERED.get_or_init(|| register_signal_handler(SIGRTMIN(), ignore)).map_err(host("sigaction"))
}
