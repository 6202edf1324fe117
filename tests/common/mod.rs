//! What the whole-machine tests share: the command to run, and the smallest of kernels.
#![allow(dead_code)] // Each test file uses its part.

pub mod c_program;
pub mod guest;
pub mod trials;
pub mod user;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// How long the default guest's download may take.
const FETCH_LIMIT: Duration = Duration::from_secs(900);

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

/// Fetches a guest where it is missing.
pub fn fetch_guest(name: &str) {
    let output = run_within(ringside().args(["guest", "fetch", name]), FETCH_LIMIT);
    assert!(output.status.success(), "{}", stderr(&output));
}

/// A file of the default guest in the user's cache folder; the guest is fetched where it is missing.
pub fn debian_file(name: &str) -> PathBuf {
    static FETCHED: OnceLock<()> = OnceLock::new();
    FETCHED.get_or_init(|| fetch_guest("debian"));
    let folder =
        |variable: &str| std::env::var_os(variable).map(PathBuf::from).filter(|path| path.is_absolute());
    let cache = folder("RINGSIDE_CACHE")
        .or_else(|| folder("XDG_CACHE_HOME").map(|path| path.join("ringside")))
        .or_else(|| folder("HOME").map(|path| path.join(".cache/ringside")));
    cache.expect("a cache folder").join("guests/debian").join(name)
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
