//! The user's side of a run: standard input on its way to the guest, the keys that are ours, and signals.
//!
//! Both threads here live as long as the process and follow the machine that runs now, so that a reboot loses no
//! input.

use std::io::{self, Read};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ringside::guest;
use rustix::event::{PollFd, PollFlags, poll};
use signal_hook::consts::{SIGCONT, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGWINCH};
use signal_hook::iterator::Signals;
use vmm::input::Input;
use vmm::{Controls, StopReason};

use crate::keys::{self, Action, Keys};
use crate::{exit_status, terminal};

/// The machine that runs now. Clones follow the same one.
#[derive(Clone, Default)]
pub struct Present(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    /// Whether a machine is being built, or was.
    begun: bool,
    controls: Option<Controls>,
    /// What ended the runs while there was no machine.
    stopped: Option<StopReason>,
}

impl Present {
    /// From here on a signal ends a machine, not the process: all that a machine needs is there.
    pub fn begin(&self) {
        self.lock().begun = true;
    }

    /// This machine runs from now on. It is stopped at once where that was asked for before.
    pub fn set(&self, controls: Controls) {
        let mut state = self.lock();
        if let Some(reason) = state.stopped {
            controls.stop(reason);
        }
        state.controls = Some(controls);
    }

    /// The machine does not run any more.
    pub fn forget(&self) {
        self.lock().controls = None;
    }

    /// What asked for the end, if anything has.
    pub fn stopped(&self) -> Option<StopReason> {
        self.lock().stopped
    }

    fn stop(&self, reason: StopReason) {
        let mut state = self.lock();
        state.stopped = Some(reason);
        if let Some(controls) = &state.controls {
            controls.stop(reason);
        }
    }

    fn has_begun(&self) -> bool {
        self.lock().begun
    }

    fn controls(&self) -> Option<Controls> {
        self.lock().controls.clone()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Makes SIGINT, SIGTERM, SIGHUP and SIGQUIT end the run cleanly, and the second of them end the process at once. Before
/// the run, while something is fetched for it, the first does, and with it what was started for that.
///
/// # Errors
/// The host's, where it gives no handler or no thread.
pub fn follow_signals(present: &Present) -> io::Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGCONT, SIGWINCH])?;
    let present = present.clone();
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        let mut stopped = false;
        for signal in signals.forever() {
            match signal {
                SIGCONT => terminal::resume(),
                SIGWINCH => {
                    if let Some(controls) = present.controls() {
                        let (columns, rows) = terminal::size();
                        controls.resize_console(columns, rows);
                    }
                }
                number if stopped || !present.has_begun() => leave(number),
                number => {
                    stopped = true;
                    present.stop(StopReason::Signal(number));
                }
            }
        }
    })?;
    Ok(())
}

/// For a run that does not end as it should, or does not begin.
fn leave(signal: i32) -> ! {
    terminal::restore();
    guest::end_children();
    std::process::exit(i32::from(exit_status::SIGNAL) + signal)
}

/// Passes standard input on to the guest. At a terminal the keys of [`keys`] are ours; elsewhere the end of the input
/// is the end of the guest's shell.
///
/// # Errors
/// The host's, where it gives no thread.
pub fn follow_stdin(present: &Present, input: &Input, terminal: bool) -> io::Result<()> {
    let (present, input) = (present.clone(), input.clone());
    let read = move || if terminal { read_keys(&present, &input) } else { read_bytes(&input) };
    std::thread::Builder::new().name("stdin".into()).spawn(read)?;
    Ok(())
}

fn read_keys(present: &Present, input: &Input) {
    let mut keys = Keys::default();
    let mut buffer = [0; 4096];
    loop {
        let count = read_some(&mut buffer);
        if count == 0 {
            break;
        }
        for action in keys.read(&buffer[..count]) {
            act(action, present, input);
        }
    }
    // The terminal has gone away: SIGHUP usually tells so as well.
    present.stop(StopReason::Signal(SIGHUP));
}

fn act(action: Action, present: &Present, input: &Input) {
    match (action, present.controls()) {
        (Action::Send(bytes), _) => {
            // Without room it is dropped, as by a keyboard: waiting for a guest that does not read would make
            // Ctrl-A x wait as well.
            if input.try_send(&bytes) < bytes.len() {
                log::warn!("the guest does not read its input; some is lost");
            }
        }
        (Action::Quit, _) => present.stop(StopReason::Quit),
        (Action::Help, _) => terminal::say(&format!("\n{}", keys::HELP)),
        (Action::PowerButton, Some(controls)) => controls.press_power_button(),
        (Action::Exits, Some(controls)) => match controls.exits() {
            Some(report) => terminal::say(&format!("\n{}", report.table())),
            None => terminal::say("\nexits are not counted: start with --exits table\n"),
        },
        (Action::PowerButton | Action::Exits, None) => {}
    }
}

fn read_bytes(input: &Input) {
    let mut buffer = [0; 4096];
    loop {
        match read_some(&mut buffer) {
            0 => break,
            count => input.send(&buffer[..count]),
        }
    }
    input.end();
}

/// Waits for input; 0 where no more will come.
fn read_some(buffer: &mut [u8]) -> usize {
    loop {
        match io::stdin().lock().read(buffer) {
            Ok(count) => return count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // Somebody has made the terminal non-blocking.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let stdin = io::stdin();
                let _ = poll(&mut [PollFd::new(&stdin, PollFlags::IN)], None);
            }
            Err(error) => {
                log::warn!("no more input: {error}");
                return 0;
            }
        }
    }
}
