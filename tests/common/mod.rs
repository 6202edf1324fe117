//! What the whole-machine tests share: the command to run, and the smallest of kernels.
#![allow(dead_code)] // Each test file uses its part.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// Where a kernel of [`elf`] is loaded and entered.
const BASE: u32 = 0x20_0000;

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

/// An ELF file of one segment with `code` at its start, which is its PVH entry as well.
pub fn elf(code: &[u8]) -> Vec<u8> {
    const HEADERS: u64 = 64 + 2 * 56;
    let mut note = Vec::new();
    for word in [4u32, 4, 18] {
        note.extend(word.to_le_bytes());
    }
    note.extend(b"Xen\0");
    note.extend(BASE.to_le_bytes());

    let mut file = Vec::new();
    file.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    file.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    for quad in [u64::from(BASE), 64, 0] {
        file.extend(quad.to_le_bytes());
    }
    file.extend(0u32.to_le_bytes());
    for half in [64u16, 56, 2, 64, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    let (note_at, code_at) = (HEADERS, HEADERS + note.len() as u64);
    let mut header = |kind: u32, flags: u32, offset: u64, address: u64, len: u64| {
        file.extend(kind.to_le_bytes());
        file.extend(flags.to_le_bytes());
        for quad in [offset, address, address, len, len, 4] {
            file.extend(quad.to_le_bytes());
        }
    };
    header(4, 4, note_at, 0, note.len() as u64);
    header(1, 7, code_at, u64::from(BASE), code.len() as u64);
    file.extend(note);
    file.extend(code);
    file
}
