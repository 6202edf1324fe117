use engine::EngineError;
use kvm_ioctls::Error;

/// A failed ioctl as the engine's error: `map_err(host("KVM_SET_SREGS"))`.
pub(crate) fn host(what: &'static str) -> impl Fn(Error) -> EngineError {
    move |error| EngineError::Host { what, source: error.into() }
}

/// A state that KVM refuses.
pub(crate) fn refused(what: &'static str) -> impl Fn(Error) -> EngineError {
    move |error| EngineError::BadState(format!("KVM refuses {what}: {error}"))
}
