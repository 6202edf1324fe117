//! The command on a terminal: raw while the guest runs, its keys, and put back however the run ends.

mod common;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use common::{KernelFile, ringside};
use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, OutputModes, Winsize, tcgetattr, tcsetwinsize};

const LIMIT: Duration = Duration::from_secs(120);

/// `ringside` on a terminal of its own, with a guest that does nothing.
struct Session {
    child: Child,
    keyboard: File,
    screen: Receiver<Vec<u8>>,
    seen: Vec<u8>,
    program: OwnedFd,
    _kernel: Option<KernelFile>,
}

/// A terminal: the user's end and the program's end.
fn pty() -> (OwnedFd, OwnedFd) {
    let user = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&user).unwrap();
    unlockpt(&user).unwrap();
    let name = ptsname(&user, Vec::new()).unwrap();
    let program = rustix::fs::open(name, OFlags::RDWR | OFlags::NOCTTY, Mode::empty()).unwrap();
    (user, program)
}

impl Session {
    fn start() -> Self {
        let kernel = KernelFile::with_code(b"\xfa\xeb\xfe");
        let path = kernel.path();
        Self::with(&["--memory", "32M", "--kernel", path.to_str().unwrap()], Some(kernel))
    }

    fn with(arguments: &[&str], kernel: Option<KernelFile>) -> Self {
        let (user, program) = pty();
        let end = || Stdio::from(program.try_clone().unwrap());
        let mut command = ringside();
        command.args(["--engine", "soft"]).args(arguments);
        let child = command.stdin(end()).stdout(end()).stderr(end()).spawn().unwrap();
        let keyboard = File::from(user.try_clone().unwrap());
        let (send, screen) = channel();
        std::thread::spawn(move || {
            let (mut user, mut buffer) = (File::from(user), [0; 4096]);
            while let Ok(count) = user.read(&mut buffer) {
                if count == 0 || send.send(buffer[..count].to_vec()).is_err() {
                    break;
                }
            }
        });
        let session = Self { child, keyboard, screen, seen: Vec::new(), program, _kernel: kernel };
        session.wait_until_raw();
        session
    }

    fn is_raw(&self) -> bool {
        let modes = tcgetattr(&self.program).unwrap();
        !modes.local_modes.intersects(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG)
            && !modes.output_modes.contains(OutputModes::OPOST)
    }

    fn wait_until_raw(&self) {
        let limit = Instant::now() + LIMIT;
        while !self.is_raw() {
            assert!(Instant::now() < limit, "the terminal never became raw");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn press(&mut self, keys: &[u8]) {
        self.keyboard.write_all(keys).unwrap();
    }

    fn see(&mut self, text: &str) {
        self.see_until(text, |seen| seen.contains(text));
    }

    fn see_until(&mut self, text: &str, enough: impl Fn(&str) -> bool) {
        let limit = Instant::now() + LIMIT;
        while !enough(&String::from_utf8_lossy(&self.seen)) {
            let left = limit.saturating_duration_since(Instant::now());
            let more = self.screen.recv_timeout(left);
            let seen = String::from_utf8_lossy(&self.seen).into_owned();
            self.seen.extend(more.unwrap_or_else(|_| panic!("no {text:?} in {seen:?}")));
        }
    }

    fn end(mut self) -> Option<i32> {
        let limit = Instant::now() + LIMIT;
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < limit, "it does not end: {:?}", String::from_utf8_lossy(&self.seen));
            std::thread::sleep(Duration::from_millis(5));
        };
        assert!(!self.is_raw(), "the terminal is left raw");
        status.code()
    }

    fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn ctrl_a_h_lists_the_keys_and_ctrl_a_x_quits() {
    let mut session = Session::start();
    session.press(b"\x01h");
    session.see("Ctrl-A x   end the run\r\n");
    session.press(b"\x01e");
    session.see("VM exits: ");
    session.press(b"\x01");
    session.press(b"x");
    session.see("ended by the user");
    assert_eq!(session.end(), Some(244));
}

#[test]
fn ctrl_c_is_the_guests() {
    let mut session = Session::start();
    session.press(b"\x03");
    session.press(b"\x01h");
    session.see("Ctrl-A h");
    session.press(b"\x01x");
    assert_eq!(session.end(), Some(244));
}

#[test]
fn signals_restore_the_terminal() {
    for (signal, status) in [(Signal::TERM, 143), (Signal::INT, 130), (Signal::HUP, 129), (Signal::QUIT, 131)]
    {
        let session = Session::start();
        kill_process(session.pid(), signal).unwrap();
        assert_eq!(session.end(), Some(status));
    }
}

#[test]
fn after_a_stop_and_a_continue_the_terminal_is_raw_again() {
    let mut session = Session::start();
    kill_process(session.pid(), Signal::STOP).unwrap();
    let mut cooked = tcgetattr(&session.program).unwrap();
    cooked.local_modes |= LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG;
    rustix::termios::tcsetattr(&session.program, rustix::termios::OptionalActions::Now, &cooked).unwrap();
    kill_process(session.pid(), Signal::CONT).unwrap();
    session.wait_until_raw();
    session.press(b"\x01x");
    assert_eq!(session.end(), Some(244));
}

#[test]
fn the_guests_shell_is_a_shell() {
    let mut session = Session::with(&["--exits", "off"], None);
    session.see(":~# ");
    // The program that Ctrl-C is to end says itself that it runs in the foreground.
    session.press(b"sh -c 'echo $((6 * 7))th; exec sleep 1000'\r");
    session.see("\n42th\r\n");
    session.press(b"\x03");
    session.press(b"echo status $?\r");
    session.see("\nstatus 130\r\n");
    // Ctrl-D ends the shell. One that comes before its line editor reads keys again is lost: then the next one does.
    let limit = Instant::now() + LIMIT;
    while session.child.try_wait().unwrap().is_none() && Instant::now() < limit {
        session.press(b"\x04");
        std::thread::sleep(Duration::from_millis(500));
    }
    assert_eq!(session.end(), Some(0));
}

#[test]
fn a_flood_of_output_ends_at_ctrl_a_x_even_where_nobody_reads() {
    // mov dx, 0x3f8; mov al, 'x'; out dx, al; jmp to the write
    let kernel = KernelFile::with_code(b"\x66\xba\xf8\x03\xb0\x78\xee\xeb\xfd");
    let (user, program) = pty();
    let end = || Stdio::from(program.try_clone().unwrap());
    let mut command = ringside();
    command.args(["--engine", "soft", "--memory", "32M", "--exits", "off", "--kernel"]).arg(kernel.path());
    let mut child = command.stdin(end()).stdout(end()).stderr(Stdio::null()).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(700));
    let pressed = Instant::now();
    File::from(user.try_clone().unwrap()).write_all(b"\x01x").unwrap();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if pressed.elapsed() > Duration::from_secs(2) {
            child.kill().unwrap();
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    assert_eq!(status.code(), Some(244));
}

#[test]
fn a_run_that_is_refused_leaves_the_terminal_as_it_was() {
    for arguments in
        [&["run", "--kernel", "/nonexistent"][..], &["run", "--cpus", "0"], &["run", "--kernel", "/tmp"]]
    {
        let (_user, program) = pty();
        let before = tcgetattr(&program).unwrap();
        let end = || Stdio::from(program.try_clone().unwrap());
        let status = ringside().args(arguments).stdin(end()).stdout(end()).stderr(end()).status().unwrap();
        assert!(matches!(status.code(), Some(2 | 240)), "{status}");
        let after = tcgetattr(&program).unwrap();
        assert_eq!(
            (after.local_modes, after.input_modes, after.output_modes, after.control_modes),
            (before.local_modes, before.input_modes, before.output_modes, before.control_modes)
        );
    }
}

#[test]
fn a_guest_on_the_virtio_console_learns_of_the_terminals_size_and_of_its_changes() {
    common::debian_file("vmlinux");
    let mut session = Session::with(&["--console", "virtio", "--exits", "off"], None);
    session.see("~# ");
    session.press(b"stty size\r");
    session.see("24 80\r");
    let size = Winsize { ws_row: 40, ws_col: 132, ws_xpixel: 0, ws_ypixel: 0 };
    tcsetwinsize(&session.program, size).unwrap();
    kill_process(Pid::from_child(&session.child), Signal::WINCH).unwrap();
    // The guest is told by an interrupt, and looks when it has time.
    session.press(b"until stty size | grep 132; do sleep 1; done\r");
    session.see("40 132\r");
    session.press(b"exit\r");
    assert_eq!(session.end(), Some(0));
}
