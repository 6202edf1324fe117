//! Linux's own sockets to and from the host, through `--vsock`: what one side writes is what the other reads.

mod common;

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use common::c_program::Programs;
use common::{debian_file, ringside, run_within, stderr};
use sha2::{Digest, Sha256};

/// Fetching socat is in it.
const LIMIT: Duration = Duration::from_secs(900);

fn guest(socket: &Path, more: &[&str], script: &str) -> String {
    let mut command = ringside();
    command.args(["run", "--engine", "soft", "--package", "socat", "--vsock"]);
    command.arg(format!("cid=7,path={}", socket.display())).args(more).args(["--exec", script]);
    let output = run_within(&mut command, LIMIT);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn hash(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn pattern(len: u32) -> Vec<u8> {
    (0..len / 4).flat_map(|word| word.wrapping_mul(0x9e37_79b9).to_le_bytes()).collect()
}

/// Connects to a port of the guest, once there is a guest and it listens there.
fn connect(socket: &Path, port: u32) -> UnixStream {
    let until = Instant::now() + LIMIT;
    loop {
        assert!(Instant::now() < until, "the guest never listened");
        let Ok(mut stream) = UnixStream::connect(socket) else {
            std::thread::sleep(Duration::from_millis(50));
            continue;
        };
        let (mut line, mut byte) = (Vec::new(), [0]);
        stream.write_all(format!("CONNECT {port}\n").as_bytes()).unwrap();
        while line.last() != Some(&b'\n') && stream.read(&mut byte).is_ok_and(|count| count == 1) {
            line.push(byte[0]);
        }
        if line.starts_with(b"OK ") {
            return stream;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_guests_program_sends_to_a_socket_of_the_host_and_gets_the_answer() {
    for transport in ["pci", "mmio"] {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("vm");
        let listener = UnixListener::bind(folder.path().join("vm_80")).unwrap();
        let serving = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut got = Vec::new();
            stream.read_to_end(&mut got).unwrap();
            stream.write_all(&pattern(1 << 20)).unwrap();
            got
        });
        let script = "yes ringside | head -c 3000000 > sent; sha256sum < sent\n\
                      socat -t 60 - VSOCK-CONNECT:2:80 < sent | sha256sum\n\
                      socat - VSOCK-CONNECT:2:81 < /dev/null 2> /dev/null; echo $?";
        let printed = guest(&socket, &["--transport", transport], script);
        let (sent, answer) = (hash(&serving.join().unwrap()), hash(&pattern(1 << 20)));
        assert_eq!(printed, format!("{sent}  -\n{answer}  -\n1\n"), "{transport}");
        assert!(!socket.exists(), "the socket is left behind");
    }
}

#[test]
fn a_program_of_the_host_reaches_one_that_listens_in_the_guest() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("vm");
    let path = socket.clone();
    let asking = std::thread::spawn(move || {
        let mut stream = connect(&path, 1234);
        stream.write_all(&pattern(2 << 20)).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    });
    guest(&socket, &["--cpus", "2"], "socat -t 60 VSOCK-LISTEN:1234 SYSTEM:sha256sum");
    assert_eq!(asking.join().unwrap(), format!("{}  -\n", hash(&pattern(2 << 20))));
}

#[test]
fn each_of_many_short_connections_is_answered_at_once() {
    const CONNECTIONS: u32 = 400;
    debian_file("vmlinux");
    let programs = Programs::new(&["vsock_echo"]);
    for options in [
        &["--transport", "pci", "--cpus", "2"][..],
        &["--transport", "mmio", "--cpus", "2"],
        &["--transport", "mmio", "--cpus", "2", "--virtio-features", "packed=off,event-idx=off"],
        &["--transport", "mmio", "--virtio-features", "packed=off"],
    ] {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("vm");
        let path = socket.clone();
        let asking = std::thread::spawn(move || {
            let longest = (0..CONNECTIONS).map(|number| {
                let mut stream = connect(&path, 1234);
                let (start, mut answer) = (Instant::now(), [0; 4]);
                stream.write_all(&number.to_le_bytes()).unwrap();
                stream.read_exact(&mut answer).unwrap();
                assert_eq!(answer, number.to_le_bytes());
                start.elapsed()
            });
            longest.max()
        });
        let mut run = programs.run(&format!("/ringside/vsock_echo 1234 {CONNECTIONS}"));
        run.arg("--vsock").arg(format!("cid=7,path={}", socket.display())).args(options);
        let output = run_within(&mut run, LIMIT);
        assert_eq!(output.status.code(), Some(0), "{options:?}: {}", stderr(&output));
        // An idle guest has no ticks: a notification that is lost is found by chance, or never.
        let longest = asking.join().unwrap().unwrap();
        assert!(longest < Duration::from_secs(5), "{options:?}: {longest:?}");
    }
}

#[test]
fn a_path_that_is_taken_is_an_error_before_the_guest_starts() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    std::fs::write(&file, "kept").unwrap();
    let mut command = ringside();
    command.args(["run", "--exec", "true", "--vsock"]).arg(format!("cid=3,path={}", file.display()));
    let output = run_within(&mut command, LIMIT);
    assert_eq!(output.status.code(), Some(240));
    assert!(stderr(&output).contains("no socket"), "{}", stderr(&output));
    assert_eq!(std::fs::read(&file).unwrap(), b"kept");
}
