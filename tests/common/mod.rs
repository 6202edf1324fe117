//! What the whole-machine tests share: the command to run, and the smallest of kernels.
#![allow(dead_code)] // Each test file uses its part.

pub mod guest;
pub mod trials;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// The `ringside` command.
pub fn ringside() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ringside"));
    command.stdin(Stdio::null()).env_remove("TERM");
    command
}

/// Runs it to its end; one that takes longer than `limit` is killed, and the test fails.
pub fn run_within(command: &mut Command, limit: Duration) -> Output {
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("ringside starts");
    finish(child, limit)
}

/// Waits for a child with piped output.
pub fn finish(mut child: Child, limit: Duration) -> Output {
    let (id, started) = (child.id(), Instant::now());
    let (done, wait) = std::sync::mpsc::channel::<()>();
    let watch = std::thread::spawn(move || {
        if wait.recv_timeout(limit) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
            let pid = rustix::process::Pid::from_raw(id as i32).expect("a child's number");
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    });
    drop(child.stdin.take());
    let output = child.wait_with_output().expect("its output");
    drop(done);
    watch.join().expect("the watch");
    assert!(
        started.elapsed() < limit,
        "took longer than {limit:?}: stdout {:?}, stderr {:?}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

/// Its standard error, as text.
pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// A kernel file in a folder of its own, which is removed with it.
pub struct KernelFile(tempfile::TempDir);

impl KernelFile {
    /// A file with these bytes.
    pub fn new(bytes: &[u8]) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let mut file = std::fs::File::create(folder.path().join("kernel")).expect("a file");
        file.write_all(bytes).expect("written");
        Self(folder)
    }

    /// A kernel that executes this 32-bit code, entered by PVH: flat segments, no paging, interrupts off.
    pub fn with_code(code: &[u8]) -> Self {
        Self::new(&elf(code))
    }

    /// Its path.
    pub fn path(&self) -> PathBuf {
        self.0.path().join("kernel")
    }

    /// The folder that it is in.
    pub fn folder(&self) -> &Path {
        self.0.path()
    }
}

/// An ELF kernel that executes this 32-bit code.
pub fn elf(code: &[u8]) -> Vec<u8> {
    guest::Guest::of_bytes(code).elf()
}
