//! What the process's exit status says.
//!
//! Ringside's own statuses lie where commands and shells have none of theirs (0 to 2, 64 to 78, 124 to 127, and 128
//! plus a signal's number), so that a script can tell them from the status of `--exec`'s command.

use vmm::{Outcome, StopReason};

/// The guest powered off, or ended the run by itself with nothing wrong.
pub const POWERED_OFF: u8 = 0;
/// The machine could not be built, or the host failed it.
pub const HOST_ERROR: u8 = 240;
/// The guest triple-faulted.
pub const TRIPLE_FAULT: u8 = 241;
/// The guest asked for a reset.
pub const RESET: u8 = 242;
/// The engine could not go on with the guest.
pub const CANNOT_GO_ON: u8 = 243;
/// Ctrl-A x.
pub const QUIT: u8 = 244;
/// Every vCPU is halted with interrupts off: nothing can wake the guest.
pub const STUCK: u8 = 245;
/// With `--exec`: the guest powered off before the command's status was there.
pub const NO_STATUS: u8 = 246;
/// With `--jit lockstep`: the translator and the interpreter did not do the same.
pub const DIFFERS: u8 = 247;
/// What is added to the number of the signal that ended Ringside, as shells do.
pub const SIGNAL: u8 = 128;

/// The table in `--help`.
pub const HELP: &str = "\
Exit status:
  0      the guest powered off
  N      with --exec: the status of CMD; with --debug-exit: the low 8 bits of
         the value that the guest wrote (the whole value is shown on stderr)
  2      the command line is wrong; nothing was started
  128+N  ended by signal N (SIGHUP, SIGINT, SIGQUIT, SIGTERM); 141: nobody reads
         stdout any more
  240    the machine could not be built, or the host failed it
  241    the guest triple-faulted (RIP and reason are shown on stderr)
  242    the guest asked for a reset, and --reboot was not given
  243    the engine could not go on with the guest (RIP and reason on stderr)
  244    ended with Ctrl-A x
  245    every vCPU is halted with interrupts off: nothing can wake the guest
  246    with --exec: the guest ended before CMD's status was known
  247    with --jit lockstep: the translator and the interpreter did not do the
         same (where, and how they differ, is shown on stderr)";

/// The status of a run that ended so; `exec` says whether it ran a command.
pub fn of(outcome: &Outcome, exec: bool) -> u8 {
    match outcome {
        Outcome::PowerOff if exec => NO_STATUS,
        Outcome::PowerOff => POWERED_OFF,
        Outcome::DebugExit(value) => (value & 0xff) as u8,
        Outcome::Reset { .. } => RESET,
        Outcome::TripleFault { .. } => TRIPLE_FAULT,
        Outcome::Fatal { .. } => CANNOT_GO_ON,
        Outcome::Stuck { .. } => STUCK,
        Outcome::Differs { .. } => DIFFERS,
        Outcome::Stopped(StopReason::Quit) => QUIT,
        Outcome::Stopped(StopReason::Signal(number)) => SIGNAL.wrapping_add((number & 0x7f) as u8),
        Outcome::Stopped(StopReason::OutputClosed) => SIGNAL + libc::SIGPIPE as u8,
        Outcome::HostError(_) => HOST_ERROR,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_end_has_its_status() {
        let of = |outcome| super::of(&outcome, false);
        assert_eq!(of(Outcome::PowerOff), 0);
        assert_eq!(of(Outcome::DebugExit(0x107)), 7);
        assert_eq!(of(Outcome::Reset { by: "port 0xcf9" }), 242);
        assert_eq!(of(Outcome::TripleFault { vcpu: 0, event: Default::default() }), 241);
        assert_eq!(of(Outcome::Stopped(StopReason::Quit)), 244);
        assert_eq!(of(Outcome::Stopped(StopReason::Signal(15))), 143);
        assert_eq!(of(Outcome::Stopped(StopReason::OutputClosed)), 141);
        assert_eq!(of(Outcome::HostError("disk on fire".into())), 240);
    }

    #[test]
    fn a_command_without_a_status_does_not_look_like_success() {
        assert_eq!(super::of(&Outcome::PowerOff, true), NO_STATUS);
        assert_eq!(super::of(&Outcome::DebugExit(0), true), 0);
    }

    #[test]
    fn the_help_names_every_status_of_ours() {
        for status in [HOST_ERROR, TRIPLE_FAULT, RESET, CANNOT_GO_ON, QUIT, STUCK, NO_STATUS, DIFFERS] {
            assert!(HELP.contains(&format!("\n  {status}    ")), "{status}");
        }
    }
}
