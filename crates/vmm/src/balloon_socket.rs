//! The Unix socket by which a balloon is asked for another size while the machine runs.
//!
//! A client sends one line, `state` or `target BYTES`, and gets lines of a name and a number: `target`, `actual`,
//! `given-back` in bytes, and what the guest tells of its memory. A line that begins with `error` says what is wrong.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use virtio::balloon::BalloonControl;

use crate::outcome::Ending;
use crate::unix_socket::Listener;

/// The longest line of a client.
const LINE: usize = 64;
/// How long a client may take for it, and the guest for its statistics.
const PATIENCE: Duration = Duration::from_secs(1);

/// Starts the thread that answers clients until the run ends.
///
/// # Errors
/// The host's, where it gives no thread.
pub fn start(listener: Listener, control: BalloonControl, ending: &Ending) -> io::Result<JoinHandle<()>> {
    let ending = ending.clone();
    std::thread::Builder::new().name("balloon".into()).spawn(move || {
        while let Some(client) = listener.accept(&ending) {
            if let Err(error) = answer(&client, &control) {
                log::debug!("a client of the balloon: {error}");
            }
        }
    })
}

fn answer(mut client: &UnixStream, control: &BalloonControl) -> io::Result<()> {
    client.set_read_timeout(Some(PATIENCE))?;
    client.set_write_timeout(Some(PATIENCE))?;
    let mut line = Vec::new();
    let mut byte = [0];
    while line.len() < LINE && client.read(&mut byte)? == 1 && byte[0] != b'\n' {
        line.push(byte[0]);
    }
    let line = String::from_utf8_lossy(&line);
    let reply = match line.split_once(' ').map_or((&*line, ""), |(verb, rest)| (verb, rest.trim())) {
        ("state", "") => state(control),
        ("target", bytes) => match bytes.parse() {
            Ok(bytes) => {
                control.set_target(bytes);
                state(control)
            }
            Err(_) => format!("error {bytes:?} is no number of bytes\n"),
        },
        _ => format!("error {line:?} is neither `state` nor `target BYTES`\n"),
    };
    client.write_all(reply.as_bytes())?;
    client.shutdown(Shutdown::Write)?;
    // What is left unread would reset the connection, and the reply with it.
    let (mut rest, limit) = ([0; 512], Instant::now() + PATIENCE);
    while Instant::now() < limit && client.read(&mut rest)? > 0 {}
    Ok(())
}

/// How the balloon is, with statistics that are new where the guest gives any.
fn state(control: &BalloonControl) -> String {
    let (before, limit) = (control.state().told, Instant::now() + PATIENCE);
    if control.ask_for_statistics() {
        while control.state().told == before && Instant::now() < limit {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    let state = control.state();
    let own = [("target", state.target), ("actual", state.actual), ("given-back", state.given_back)];
    own.iter().chain(&state.statistics).map(|(name, value)| format!("{name} {value}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outcome::Outcome;
    use virtio::balloon::{Balloon, BalloonOptions};

    #[test]
    fn a_client_asks_for_a_size_and_hears_how_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("balloon");
        let (_balloon, control) = Balloon::new(BalloonOptions { size: 8192, ..BalloonOptions::default() });
        let ending = Ending::new();
        let thread = start(Listener::bind(&path).unwrap(), control.clone(), &ending).unwrap();
        let ask = |line: &str| {
            let mut stream = UnixStream::connect(&path).unwrap();
            stream.write_all(line.as_bytes()).unwrap();
            let mut reply = String::new();
            stream.read_to_string(&mut reply).unwrap();
            reply
        };
        assert_eq!(ask("state\n"), "target 8192\nactual 0\ngiven-back 0\n");
        assert!(ask("target 1048576\n").starts_with("target 1048576\n"));
        assert_eq!(control.state().target, 1 << 20);
        for wrong in ["target 1M\n", "what\n", "\n", &format!("{}\n", "x".repeat(200))] {
            assert!(ask(wrong).starts_with("error "), "{wrong}");
        }
        let refused = Listener::bind(&path).err().unwrap().to_string();
        assert!(refused.contains("balloon") && refused.contains("another process"), "{refused}");
        ending.report(Outcome::PowerOff);
        thread.join().unwrap();
        assert!(!path.exists());
    }
}
